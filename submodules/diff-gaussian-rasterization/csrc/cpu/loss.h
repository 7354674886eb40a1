// loss.h: structural similarity and the photometric loss of training, value and gradient in one pass over the rows.
//
// The 11x11 Gaussian window is separable. Rows stream through two rings of twelve: source rows, blurred along x, wait in
// the first until a window's rows are complete; the derivatives of that row of windows, blurred along x again, wait in
// the second until a row of the gradient is complete. SSIM needs four blurred maps (a, b, a^2 + b^2, ab), its gradient
// three: with S the similarity of a window,
//     dL/da = blur(dS/dmean_a) + 2 a blur(dS/dE[a^2]) + b blur(dS/dE[ab]).
// Rows are taken two at a time, since two windows share ten of their eleven rows. A task is a band of rows of one plane; it
// computes the rows around its band again.
#pragma once
#include "memory.h"
#include "simd.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu::GS_ISA {

constexpr int kReach = 5, kTaps = 2 * kReach + 1, kRing = kTaps + 1,
              kMargin = kLanes;  // zeros to the left and right of a row
constexpr double kSsimC1 = 0.01 * 0.01, kSsimC2 = 0.03 * 0.03;

// What is compared: planes of [H, W], the second one perhaps in bytes, both times the mask if there is one.
struct Planes {
    const Number* a;
    const Number* b;
    const uint8_t* b_bytes;
    const Number* mask;  // [H, W], the same for every plane
    int width, height;
    bool valid;    // only windows inside the image
    bool clamped;  // a counts as if it lay in [0, 1]
};

struct LossWeights {
    Number l1, ssim;  // of sign(a - b) and of dS/da in the gradient
};

struct LossSums { double l1, ssim; };

struct Window {
    F tap[kReach + 1];  // center outward
    Window() {
        double w[kReach + 1], total = 0;
        for (int i = 0; i <= kReach; ++i) {
            w[i] = std::exp(-i * i / (2 * 1.5 * 1.5));
            total += i ? 2 * w[i] : w[i];
        }
        for (int i = 0; i <= kReach; ++i) tap[i] = F(w[i] / total);
    }
};

// A whole row; `from` has its margins of zeros. A ring holds one vector of all its rows side by side, then the next: that is
// how they will be read.
GS_INLINE void blur_row(const Number* from, Number* to, int vectors, const Window& w) {
    F before = load(from - kLanes), here = load(from);
    for (int x = 0; x < vectors * kLanes; x += kLanes) {
        const Number* p = from + x;
        const F next = load(p + kLanes);
        F sum = w.tap[0] * here;
        sum = fma(w.tap[1], ahead<15>(before, here, p - kLanes) + ahead<1>(here, next, p), sum);
        sum = fma(w.tap[2], ahead<14>(before, here, p - kLanes) + ahead<2>(here, next, p), sum);
        sum = fma(w.tap[3], ahead<13>(before, here, p - kLanes) + ahead<3>(here, next, p), sum);
        sum = fma(w.tap[4], ahead<12>(before, here, p - kLanes) + ahead<4>(here, next, p), sum);
        sum = fma(w.tap[5], ahead<11>(before, here, p - kLanes) + ahead<5>(here, next, p), sum);
        store(to + kRing * x, sum);
        before = here, here = next;
    }
}

// Two rows of windows, one below the other, of which eleven and eleven of twelve rows are needed.
struct TwoRows { F upper, lower; };

GS_INLINE TwoRows blur_along_y(const Number* const* row, int x, const Window& w) {
    F r[kTaps + 1];
    for (int i = 0; i <= kTaps; ++i) r[i] = load(row[i] + kRing * x);
    TwoRows sum = {w.tap[0] * r[kReach], w.tap[0] * r[kReach + 1]};
    for (int i = 1; i <= kReach; ++i) {
        sum.upper = fma(w.tap[i], r[kReach - i] + r[kReach + i], sum.upper);
        sum.lower = fma(w.tap[i], r[kReach + 1 - i] + r[kReach + 1 + i], sum.lower);
    }
    return sum;
}

struct SsimTerms { F value, mean_a, square, product; };  // S; its derivatives for mean_a, E[a^2 + b^2] and E[ab]

GS_INLINE SsimTerms ssim_terms(F mean_a, F mean_b, F square, F product) {
    const F c1 = F(kSsimC1), c2 = F(kSsimC2), two = F(2);
    const F mean_ab = mean_a * mean_b, mean_aa_bb = fma(mean_a, mean_a, mean_b * mean_b);
    const F a1 = fma(two, mean_ab, c1), a2 = fma(two, product - mean_ab, c2);
    const F b1 = mean_aa_bb + c1, b2 = square - mean_aa_bb + c2;
    const F inv = F(1) / (b1 * b2), inv_b1 = inv * b2, inv_b2 = inv * b1;
    const F s = a1 * a2 * inv;
    return {s, two * (mean_b * (a2 - a1) * inv - s * mean_a * (inv_b1 - inv_b2)), -s * inv_b2, two * a1 * inv};
}

// Rows of one band, each with room for a margin on both sides.
struct BandRows {
    int stride, vectors;  // numbers per row; vectors that cover the image's width
    Buffer block;
    Number *a, *b, *square, *product;   // the row that came in, and its products
    Number* d[2][3];                    // two rows of the derivatives for mean_a, E[a^2 + b^2] and E[ab]
    Number *blurred[4], *d_blurred[3];  // rings of kRing rows
    Number* weight;                     // 1 where a window may be centered, 0 elsewhere

    explicit BandRows(const Planes& p)
        : stride((p.width + kLanes - 1) / kLanes * kLanes + 2 * kMargin),
          vectors((p.width + kLanes - 1) / kLanes),
          block((11 + 7 * kRing) * stride * sizeof(Number)) {
        std::memset(block.data, 0, 11 * stride * sizeof(Number));  // rings are written before they are read
        Number* next = block.as<Number>() + kMargin;
        const auto take = [&](int rows) {
            Number* r = next;
            next += rows * stride;
            return r;
        };
        a = take(1), b = take(1), square = take(1), product = take(1);
        weight = take(1);
        for (Number*& row : d[0]) row = take(1);
        for (Number*& row : d[1]) row = take(1);
        for (Number*& ring : blurred) ring = take(kRing);
        for (Number*& ring : d_blurred) ring = take(kRing);
        const int edge = p.valid ? kReach : 0;
        for (int x = edge; x < p.width - edge; ++x) weight[x] = 1;
    }
    // Of a row's first vector in a ring.
    int place(int row) const { return (row + 4 * kRing) % kRing * kLanes; }
};

// Row y of a and b, masked, into rows.a and rows.b.
GS_INLINE void read_row(const Planes& p, int64_t plane, int y, BandRows& rows) {
    const int64_t at = (plane * p.height + y) * p.width;
    const Number* mask = p.mask ? p.mask + int64_t(y) * p.width : nullptr;
    for (int x = 0; x < p.width; x += kLanes) {
        const int n = p.width - x < kLanes ? p.width - x : kLanes;
        F a = load_some(p.a + at + x, n), b;
        if (p.clamped) a = min(max(a, F(0)), F(1));
        if (p.b_bytes) {
            b = load_bytes(p.b_bytes + at + x, n) / F(255);
        } else {
            b = load_some(p.b + at + x, n);
        }
        if (mask) {
            const F m = load_some(mask + x, n);
            a = a * m, b = b * m;
        }
        store(rows.a + x, a);
        store(rows.b + x, b);
    }
}

GS_INLINE void clear_in_ring(Number* to, int vectors) {
    for (int x = 0; x < vectors * kLanes; x += kLanes) store(to + kRing * x, F(0));
}

static void source_row(const Planes& p, int64_t plane, int y, BandRows& rows, const Window& w) {
    const int at = rows.place(y);
    if (y < 0 || y >= p.height) {
        for (Number* ring : rows.blurred) clear_in_ring(ring + at, rows.vectors);
        return;
    }
    read_row(p, plane, y, rows);
    for (int x = 0; x < rows.vectors * kLanes; x += kLanes) {
        const F a = load(rows.a + x), b = load(rows.b + x);
        store(rows.square + x, fma(a, a, b * b));
        store(rows.product + x, a * b);
    }
    const Number* from[4] = {rows.a, rows.b, rows.square, rows.product};
    for (int k = 0; k < 4; ++k) blur_row(from[k], rows.blurred[k] + at, rows.vectors, w);
}

// The windows centered in rows y and y + 1: the sums of their S, and their derivatives into the second ring.
static void window_rows(const Planes& p, int y, bool gradient, BandRows& rows, const Window& w, double* sums) {
    const int edge = p.valid ? kReach : 0;
    const bool real[2] = {y >= edge && y < p.height - edge, y + 1 >= edge && y + 1 < p.height - edge};
    const Number* row[4][kRing];
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < kRing; ++i) row[k][i] = rows.blurred[k] + rows.place(y + i - kReach);
    F total[2] = {F(0), F(0)};
    for (int x = 0; x < rows.vectors * kLanes; x += kLanes) {
        const F weight = load(rows.weight + x);
        const TwoRows a = blur_along_y(row[0], x, w), b = blur_along_y(row[1], x, w);
        const TwoRows square = blur_along_y(row[2], x, w), product = blur_along_y(row[3], x, w);
        const SsimTerms s[2] = {ssim_terms(a.upper, b.upper, square.upper, product.upper),
                                ssim_terms(a.lower, b.lower, square.lower, product.lower)};
        for (int i = 0; i < 2; ++i) {
            total[i] = fma(weight, s[i].value, total[i]);
            store(rows.d[i][0] + x, weight * s[i].mean_a);
            store(rows.d[i][1] + x, weight * s[i].square);
            store(rows.d[i][2] + x, weight * s[i].product);
        }
    }
    for (int i = 0; i < 2; ++i) {
        sums[i] = real[i] ? double(sum(total[i])) : 0.0;
        for (int k = 0; k < 3 && gradient; ++k) {
            Number* to = rows.d_blurred[k] + rows.place(y + i);
            if (real[i])
                blur_row(rows.d[i][k], to, rows.vectors, w);
            else
                clear_in_ring(to, rows.vectors);
        }
    }
}

// Rows y and, unless it is `end`, y + 1 of the gradient; returns the sum of |a - b|.
static double gradient_rows(const Planes& p, int64_t plane, int y, int end, LossWeights weights, Number* grad,
                            BandRows& rows, const Window& w) {
    const Number* row[3][kRing];
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < kRing; ++i) row[k][i] = rows.d_blurred[k] + rows.place(y + i - kReach);
    Number* const spare[3] = {rows.d[0][0], rows.d[0][1], rows.d[0][2]};  // done with: the lower row's blurs
    double total_l1 = 0;
    for (int i = 0; i < 2 && y + i < end; ++i) {
        read_row(p, plane, y + i, rows);
        const Number* mask = p.mask ? p.mask + int64_t(y + i) * p.width : nullptr;
        const int64_t at = (plane * p.height + y + i) * p.width;
        const Number* image = p.a + at;
        Number* out = grad + at;
        F total = F(0);
        for (int x = 0; x < p.width; x += kLanes) {
            F blur[3];
            for (int k = 0; k < 3; ++k) {
                if (i == 0) {
                    const TwoRows both = blur_along_y(row[k], x, w);
                    store(spare[k] + x, both.lower);
                    blur[k] = both.upper;
                } else {
                    blur[k] = load(spare[k] + x);
                }
            }
            const int n = p.width - x < kLanes ? p.width - x : kLanes;
            const F a = load(rows.a + x), b = load(rows.b + x), d = a - b, zero = F(0);
            total = total + abs(d);
            const F s = fma(b, blur[2], fma(a + a, blur[1], blur[0]));
            const F sign = select(d > zero, F(weights.l1), select(d < zero, F(-weights.l1), zero));
            F g = fma(F(weights.ssim), s, sign);
            if (mask) g = g * load_some(mask + x, n);
            if (p.clamped) {  // nothing passes what was clamped
                const F raw = load_some(image + x, n);
                g = zero_unless((raw >= zero) & (raw <= F(1)), g);
            }
            store_some(out + x, g, n);
        }
        total_l1 += sum(total);
    }
    return total_l1;
}

// Value, and gradient where `grad` is not null, of all planes.
static LossSums compare(const Planes& p, int64_t planes, LossWeights weights, Number* grad) {
    const int bands = p.height < 112 ? 1 : (p.height + 37) / 75, band = (p.height + bands - 1) / bands;
    const int reach = grad ? kReach : 0;
    const Window window;
    Buffer partial(planes * bands * sizeof(LossSums));
    LossSums* sums = partial.as<LossSums>();
    parallel(planes * bands, [&](int64_t task) {
        const int64_t plane = task / bands;
        const int y0 = int(task % bands) * band, y1 = y0 + band < p.height ? y0 + band : p.height;
        BandRows rows(p);
        LossSums mine = {0, 0};
        for (int y = y0 - reach - kReach;; y += 2) {
            source_row(p, plane, y, rows, window);
            source_row(p, plane, y + 1, rows, window);
            const int center = y - kReach, done = center - kReach;  // rows that are complete now, and the next ones
            if (center >= y0 - reach) {
                double s[2];
                window_rows(p, center, grad != nullptr, rows, window, s);
                for (int i = 0; i < 2; ++i)
                    if (center + i >= y0 && center + i < y1) mine.ssim += s[i];
            }
            if (grad && done >= y0) mine.l1 += gradient_rows(p, plane, done, y1, weights, grad, rows, window);
            if ((grad ? done : center) + 2 >= y1) break;
        }
        sums[task] = mine;
    });
    LossSums total = {0, 0};
    for (int64_t i = 0; i < planes * bands; ++i) total.l1 += sums[i].l1, total.ssim += sums[i].ssim;
    return total;
}

static void ssim(Ssim<Number>& s) {
    const int edge = s.valid ? 2 * kReach : 0;
    const double windows = double(s.planes) * (s.width - edge) * (s.height - edge);
    const Planes p = {s.a, s.b, nullptr, nullptr, s.width, s.height, s.valid, false};
    s.mean = compare(p, s.planes, {Number(0), Number(1 / windows)}, s.grad).ssim / windows;
}

static void photometric(Photometric<Number>& l) {
    const double pixels = 3.0 * l.width * l.height;
    const Planes p = {l.image, l.target, l.target_bytes, l.mask, l.width, l.height, false, true};
    const LossWeights weights = {Number((1 - l.lambda) / pixels), Number(-l.lambda / pixels)};
    const LossSums sums = compare(p, 3, weights, l.grad);
    l.l1 = sums.l1 / pixels;
    l.loss = (1 - l.lambda) * l.l1 + l.lambda * (1 - sums.ssim / pixels);
}

}  // namespace gs::cpu::GS_ISA
