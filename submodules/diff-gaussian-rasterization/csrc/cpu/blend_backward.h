// blend_backward.h: back to front over each tile's splats, and what each of them would have to change.
//
// The tile's 256 pixels carry two numbers from splat to splat: the light T that reaches the splat, and the dot product
// `behind` of the image gradient with the color that comes from behind it. A splat visits only the blocks it added
// light to. Its sums over pixels stay in registers through all its blocks, and end up in one record:
//     0      sum of g, g being dL/d(log alpha) of a pixel
//     1..5   sums of g dx, g dy, g dx^2, g dx dy, g dy^2, (dx, dy) = pixel - mean
//     6..8   dL/dcolor        9   dL/d(1/z)       10, 11   sums of |dL/dmean| per pixel, if wanted
#pragma once
#include "blend.h"
#include "memory.h"

namespace gs::cpu::GS_ISA {

struct BackwardState {
    F T[kBlocks], behind[kBlocks];
    F red[kBlocks], green[kBlocks], blue[kBlocks], inv_depth[kBlocks];  // gradient of the image
    I last[kBlocks];
};

template <bool kInvDepth, bool kAbsolute>
static void blend_backward_tile(const Frame<Number>& f, const Number* background, const ImageGrads<Number>& grad,
                                Number* records, double* background_sum, int64_t tile) {
    const TilePlace t = place(f, tile);
    const PixelCenters centers(t);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1], plane = int64_t(f.width) * f.height;
    BackwardState s;
    F sum_red = F(0), sum_green = F(0), sum_blue = F(0);
    for (int b = 0; b < kBlocks; ++b) {
        const int64_t at = tile * kBlocks * kLanes + b * kLanes;
        s.T[b] = load(f.transmittance + at);
        s.last[b] = load(f.last + at);
        s.red[b] = load_block(grad.color, t, b);
        s.green[b] = load_block(grad.color + plane, t, b);
        s.blue[b] = load_block(grad.color + 2 * plane, t, b);
        if (kInvDepth) s.inv_depth[b] = load_block(grad.inv_depth, t, b);
        F from_back = s.red[b] * F(background[0]) + s.green[b] * F(background[1]) + s.blue[b] * F(background[2]);
        if (grad.alpha) from_back = from_back - load_block(grad.alpha, t, b);
        s.behind[b] = s.T[b] * from_back;
        sum_red = fma(s.T[b], s.red[b], sum_red);
        sum_green = fma(s.T[b], s.green[b], sum_green);
        sum_blue = fma(s.T[b], s.blue[b], sum_blue);
    }
    background_sum[0] = sum(sum_red), background_sum[1] = sum(sum_green), background_sum[2] = sum(sum_blue);

    constexpr int kSums = kAbsolute ? 12 : kInvDepth ? 10 : 9;
    for (int64_t e = end - 1; e >= begin; --e) {
        if (e - 16 >= begin) __builtin_prefetch(&f.splats[f.entries[e - 16].splat]);
        const Splat<Number>& splat = f.splats[f.entries[e].splat];
        Number* record = records + int64_t(f.entries[e].slot) * kRecord;
        F total[12];
        for (F& v : total) v = F(0);
        const I position = I(int(e - begin));
        for (uint32_t blocks = f.touched[e]; blocks; blocks &= blocks - 1) {
            const int b = __builtin_ctz(blocks);
            const F dx = centers.x[b & 3] - F(splat.x), dy = centers.y[b >> 2] - F(splat.y);
            const F uncapped = ex2(log2_alpha(splat, dx, dy));
            const F alpha = min(uncapped, F(kAlphaMax));
            const M lit = (alpha >= F(kAlphaMin)) & (position <= s.last[b]);
            // From here on T is the light before this splat.
            const F inv = recip(F(1) - alpha), T_after = s.T[b], T = select(lit, T_after * inv, T_after);
            const F weight = zero_unless(lit, alpha * T);
            F along = fma(F(splat.red), s.red[b], fma(F(splat.green), s.green[b], F(splat.blue) * s.blue[b]));
            if (kInvDepth) along = fma(F(splat.inv_z), s.inv_depth[b], along);
            const F g_alpha = inv * fma(T_after, along, -s.behind[b]);
            const F g = zero_unless(lit, g_alpha * uncapped);  // the cap lets the gradient through
            s.T[b] = T;
            s.behind[b] = fma(weight, along, s.behind[b]);

            const F gx = g * dx, gy = g * dy;
            total[0] = total[0] + g;
            total[1] = total[1] + gx;
            total[2] = total[2] + gy;
            total[3] = fma(gx, dx, total[3]);
            total[4] = fma(gx, dy, total[4]);
            total[5] = fma(gy, dy, total[5]);
            total[6] = fma(weight, s.red[b], total[6]);
            total[7] = fma(weight, s.green[b], total[7]);
            total[8] = fma(weight, s.blue[b], total[8]);
            if (kInvDepth) total[9] = fma(weight, s.inv_depth[b], total[9]);
            if (kAbsolute) {  // dL/dmean of this pixel is g Q (dx, dy); Q = -2 ln 2 (a, b/2, c)
                total[10] = total[10] + abs(fma(F(2 * splat.a), gx, F(splat.b) * gy));
                total[11] = total[11] + abs(fma(F(2 * splat.c), gy, F(splat.b) * gx));
            }
        }
        store(record, sums<kSums>(total));
    }
}

static void blend_backward(const Frame<Number>& f, const Number* background, const ImageGrads<Number>& grad,
                           bool absolute, Number* records, Number* grad_background) {
    Buffer partial(f.tiles() * 3 * sizeof(double));
    double* sums = partial.as<double>();
    parallel(f.tiles(), [&](int64_t i) {
        const int64_t tile = f.tile_order[i];
        double* mine = sums + 3 * tile;
        if (absolute && grad.inv_depth) blend_backward_tile<true, true>(f, background, grad, records, mine, tile);
        else if (absolute) blend_backward_tile<false, true>(f, background, grad, records, mine, tile);
        else if (grad.inv_depth) blend_backward_tile<true, false>(f, background, grad, records, mine, tile);
        else blend_backward_tile<false, false>(f, background, grad, records, mine, tile);
    });
    if (!grad_background) return;
    double total[3] = {0, 0, 0};
    for (int64_t t = 0; t < f.tiles(); ++t)
        for (int c = 0; c < 3; ++c) total[c] += sums[3 * t + c];
    for (int c = 0; c < 3; ++c) grad_background[c] = Number(total[c]);
}

}  // namespace gs::cpu::GS_ISA
