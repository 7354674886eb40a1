// loss.h: structural similarity and the photometric loss of training, value and gradient in one pass over the rows.
//
// The 11x11 Gaussian window is separable. Rows stream through two rings of eleven: source rows, blurred along x, wait in
// the first until a window's rows are complete; the derivatives of that row of windows, blurred along x again, wait in
// the second until a row of the gradient is complete. SSIM needs four blurred maps (a, b, a^2 + b^2, ab), its gradient
// three: with S the similarity of a window,
//     dL/da = blur(dS/dmean_a) + 2 a blur(dS/dE[a^2]) + b blur(dS/dE[ab]).
// A task is a band of rows of one plane; it computes the rows around its band again.
#pragma once
#include "memory.h"
#include "simd.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu::GS_ISA {

constexpr int kReach = 5, kTaps = 2 * kReach + 1, kMargin = kLanes;  // zeros to the left and right of a row
constexpr double kSsimC1 = 0.01 * 0.01, kSsimC2 = 0.03 * 0.03;

// What is compared: planes of [H, W], the second one perhaps in bytes, both times the mask if there is one.
struct Planes {
    const Number* a;
    const Number* b;
    const uint8_t* b_bytes;
    const Number* mask;  // [H, W], the same for every plane
    int width, height;
    bool valid;  // only windows inside the image
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

GS_INLINE F blur_along_x(const Number* p, const Window& w) {  // p: the center
    F sum = w.tap[0] * load(p);
    for (int i = 1; i <= kReach; ++i) sum = fma(w.tap[i], load(p - i) + load(p + i), sum);
    return sum;
}

GS_INLINE F blur_along_y(const Number* const* row, int x, const Window& w) {  // row[kReach]: the center
    F sum = w.tap[0] * load(row[kReach] + x);
    for (int i = 1; i <= kReach; ++i) sum = fma(w.tap[i], load(row[kReach - i] + x) + load(row[kReach + i] + x), sum);
    return sum;
}

struct SsimTerms { F value, mean_a, square, product; };  // S; its derivatives for mean_a, E[a^2 + b^2] and E[ab]

GS_INLINE SsimTerms ssim_terms(F mean_a, F mean_b, F square, F product) {
    const F c1 = F(kSsimC1), c2 = F(kSsimC2), two = F(2);
    const F mean_ab = mean_a * mean_b, mean_aa_bb = fma(mean_a, mean_a, mean_b * mean_b);
    const F a1 = fma(two, mean_ab, c1), a2 = fma(two, product - mean_ab, c2);
    const F b1 = mean_aa_bb + c1, b2 = square - mean_aa_bb + c2;
    const F inv_b1 = F(1) / b1, inv_b2 = F(1) / b2, inv = inv_b1 * inv_b2;
    const F s = a1 * a2 * inv;
    return {s, two * (mean_b * (a2 - a1) * inv - s * mean_a * (inv_b1 - inv_b2)), -s * inv_b2, two * a1 * inv};
}

// Rows of one band, each with room for a margin on both sides.
struct BandRows {
    int stride, vectors;  // numbers per row; vectors that cover the image's width
    Buffer block;
    Number *a, *b, *square, *product;  // the row that came in, and its products
    Number *d_mean, *d_square, *d_product;
    Number *blurred[4], *d_blurred[3];  // rings of kTaps rows
    Number* weight;                     // 1 where a window may be centered, 0 elsewhere

    explicit BandRows(const Planes& p)
        : stride((p.width + kLanes - 1) / kLanes * kLanes + 2 * kMargin), vectors((p.width + kLanes - 1) / kLanes),
          block((8 + 7 * kTaps) * stride * sizeof(Number)) {
        std::memset(block.data, 0, (8 + 7 * kTaps) * stride * sizeof(Number));
        Number* next = block.as<Number>() + kMargin;
        const auto take = [&](int rows) {
            Number* r = next;
            next += rows * stride;
            return r;
        };
        a = take(1), b = take(1), square = take(1), product = take(1);
        d_mean = take(1), d_square = take(1), d_product = take(1), weight = take(1);
        for (Number*& ring : blurred) ring = take(kTaps);
        for (Number*& ring : d_blurred) ring = take(kTaps);
        const int edge = p.valid ? kReach : 0;
        for (int x = edge; x < p.width - edge; ++x) weight[x] = 1;
    }
    int place(int row) const { return (row + 2 * kTaps) % kTaps * stride; }
};

// Row y of a and b, masked, into rows.a and rows.b.
GS_INLINE void read_row(const Planes& p, int64_t plane, int y, BandRows& rows) {
    const int64_t at = (plane * p.height + y) * p.width;
    const Number* mask = p.mask ? p.mask + int64_t(y) * p.width : nullptr;
    for (int x = 0; x < p.width; x += kLanes) {
        const int n = p.width - x < kLanes ? p.width - x : kLanes;
        F a = load_some(p.a + at + x, n), b;
        if (p.b_bytes) {
            uint8_t bytes[kLanes] = {};
            std::memcpy(bytes, p.b_bytes + at + x, n);
            b = load_bytes(bytes) / F(255);
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

static void source_row(const Planes& p, int64_t plane, int y, BandRows& rows, const Window& w) {
    const int at = rows.place(y);
    if (y < 0 || y >= p.height) {
        for (Number* ring : rows.blurred) std::memset(ring + at, 0, rows.vectors * kLanes * sizeof(Number));
        return;
    }
    read_row(p, plane, y, rows);
    for (int x = 0; x < rows.vectors * kLanes; x += kLanes) {
        const F a = load(rows.a + x), b = load(rows.b + x);
        store(rows.square + x, fma(a, a, b * b));
        store(rows.product + x, a * b);
    }
    const Number* from[4] = {rows.a, rows.b, rows.square, rows.product};
    for (int k = 0; k < 4; ++k)
        for (int x = 0; x < rows.vectors * kLanes; x += kLanes)
            store(rows.blurred[k] + at + x, blur_along_x(from[k] + x, w));
}

// The windows centered in row y: the sum of their S, and their derivatives into the second ring.
static double window_row(const Planes& p, int y, bool gradient, BandRows& rows, const Window& w) {
    const int edge = p.valid ? kReach : 0, at = rows.place(y);
    if (y < edge || y >= p.height - edge) {
        for (Number* ring : rows.d_blurred) std::memset(ring + at, 0, rows.vectors * kLanes * sizeof(Number));
        return 0;
    }
    const Number* row[4][kTaps];
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < kTaps; ++i) row[k][i] = rows.blurred[k] + rows.place(y + i - kReach);
    F total = F(0);
    for (int x = 0; x < rows.vectors * kLanes; x += kLanes) {
        const F weight = load(rows.weight + x);
        const SsimTerms s = ssim_terms(blur_along_y(row[0], x, w), blur_along_y(row[1], x, w),
                                       blur_along_y(row[2], x, w), blur_along_y(row[3], x, w));
        total = fma(weight, s.value, total);
        store(rows.d_mean + x, weight * s.mean_a);
        store(rows.d_square + x, weight * s.square);
        store(rows.d_product + x, weight * s.product);
    }
    if (gradient) {
        const Number* from[3] = {rows.d_mean, rows.d_square, rows.d_product};
        for (int k = 0; k < 3; ++k)
            for (int x = 0; x < rows.vectors * kLanes; x += kLanes)
                store(rows.d_blurred[k] + at + x, blur_along_x(from[k] + x, w));
    }
    return sum(total);
}

// Row y of the gradient; returns the sum of |a - b|.
static double gradient_row(const Planes& p, int64_t plane, int y, LossWeights weights, Number* grad, BandRows& rows,
                           const Window& w) {
    const Number* row[3][kTaps];
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < kTaps; ++i) row[k][i] = rows.d_blurred[k] + rows.place(y + i - kReach);
    read_row(p, plane, y, rows);
    const Number* mask = p.mask ? p.mask + int64_t(y) * p.width : nullptr;
    Number* out = grad + (plane * p.height + y) * p.width;
    F total = F(0);
    for (int x = 0; x < p.width; x += kLanes) {
        const int n = p.width - x < kLanes ? p.width - x : kLanes;
        const F a = load(rows.a + x), b = load(rows.b + x), d = a - b, zero = F(0);
        total = total + abs(d);
        const F s = fma(b, blur_along_y(row[2], x, w), fma(a + a, blur_along_y(row[1], x, w), blur_along_y(row[0], x, w)));
        const F sign = select(d > zero, F(weights.l1), select(d < zero, F(-weights.l1), zero));
        F g = fma(F(weights.ssim), s, sign);
        if (mask) g = g * load_some(mask + x, n);
        store_some(out + x, g, n);
    }
    return sum(total);
}

// Value, and gradient where `grad` is not null, of all planes.
static LossSums compare(const Planes& p, int64_t planes, LossWeights weights, Number* grad) {
    constexpr int kBand = 48;
    const int bands = (p.height + kBand - 1) / kBand, reach = grad ? kReach : 0;
    const Window window;
    Buffer partial(planes * bands * sizeof(LossSums));
    LossSums* sums = partial.as<LossSums>();
    parallel(planes * bands, [&](int64_t task) {
        const int64_t plane = task / bands;
        const int y0 = int(task % bands) * kBand, y1 = y0 + kBand < p.height ? y0 + kBand : p.height;
        BandRows rows(p);
        LossSums mine = {0, 0};
        for (int y = y0 - reach - kReach; y < y1 + reach + kReach; ++y) {
            source_row(p, plane, y, rows, window);
            const int center = y - kReach, done = center - kReach;
            if (center < y0 - reach) continue;
            const double s = window_row(p, center, grad != nullptr, rows, window);
            if (center >= y0 && center < y1) mine.ssim += s;
            if (grad && done >= y0) mine.l1 += gradient_row(p, plane, done, weights, grad, rows, window);
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
    const Planes p = {s.a, s.b, nullptr, nullptr, s.width, s.height, s.valid};
    s.mean = compare(p, s.planes, {Number(0), Number(1 / windows)}, s.grad).ssim / windows;
}

static void photometric(Photometric<Number>& l) {
    const double pixels = 3.0 * l.width * l.height;
    const Planes p = {l.image, l.target, l.target_bytes, l.mask, l.width, l.height, false};
    const LossWeights weights = {Number((1 - l.lambda) / pixels), Number(-l.lambda / pixels)};
    const LossSums sums = compare(p, 3, weights, l.grad);
    l.l1 = sums.l1 / pixels;
    l.loss = (1 - l.lambda) * l.l1 + l.lambda * (1 - sums.ssim / pixels);
}

}  // namespace gs::cpu::GS_ISA
