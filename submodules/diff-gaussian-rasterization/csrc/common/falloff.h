// falloff.h: how a splat fades from its center, and the derivative.
#pragma once
#include "types.h"

namespace gs {

// sigma = 1/2 d^T Q d, with d = pixel - mean and Q the inverse covariance; alpha = opacity * exp(-sigma).
template <typename T>
GS_HD T falloff(Vec2<T> d, Sym2<T> q) {
    return T(0.5) * (q.xx * d.x * d.x + q.yy * d.y * d.y) + q.xy * d.x * d.y;
}

template <typename T>
struct FalloffGrad {
    Vec2<T> d;
    Sym2<T> q;
};

template <typename T>
GS_HD FalloffGrad<T> falloff_vjp(Vec2<T> d, Sym2<T> q, T g) {
    return {{g * (q.xx * d.x + q.xy * d.y), g * (q.xy * d.x + q.yy * d.y)},
            {g * T(0.5) * d.x * d.x, g * d.x * d.y, g * T(0.5) * d.y * d.y}};
}

}  // namespace gs
