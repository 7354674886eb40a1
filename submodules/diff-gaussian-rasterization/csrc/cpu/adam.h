// adam.h: one step of Adam (Kingma and Ba 2015) over plain arrays.
#pragma once
#include "simd.h"
#include "stages.h"

namespace gs::cpu::GS_ISA {

static void adam(Number* param, const Number* grad, Number* avg, Number* avg_sq, int64_t count, const AdamRates& r) {
    const F take1 = F(1 - r.beta1), keep2 = F(r.beta2), take2 = F(1 - r.beta2), eps = F(r.eps);
    const F rate = F(r.lr / r.correction1), inv_root = F(1 / std::sqrt(r.correction2));
    for (int64_t i = 0; i < count; i += kLanes) {
        const int n = count - i < kLanes ? int(count - i) : kLanes;
        const bool whole = n == kLanes;
        const F g = whole ? load(grad + i) : load_some(grad + i, n);
        F m = whole ? load(avg + i) : load_some(avg + i, n), v = whole ? load(avg_sq + i) : load_some(avg_sq + i, n);
        F p = whole ? load(param + i) : load_some(param + i, n);
        m = fma(g - m, take1, m);
        v = fma(g * take2, g, v * keep2);
        p = p - rate * m / fma(sqrt(v), inv_root, eps);
        if (whole) {
            store(avg + i, m), store(avg_sq + i, v), store(param + i, p);
        } else {
            store_some(avg + i, m, n), store_some(avg_sq + i, v, n), store_some(param + i, p, n);
        }
    }
}

}  // namespace gs::cpu::GS_ISA
