// blend_backward.h: back to front over each tile's splats, and what each of them would have to change.
//
// A pixel carries two numbers from splat to splat: the light T that reaches the splat, and the dot product `behind` of the
// image gradient with the color that would be seen without the splat and all before it. The tile's list is taken in
// batches, each in two passes:
//   1. block after block, its sixteen pixels in registers, over the splats that added light to it; every visit leaves a
//      weight alpha T, which is dcolor, and g = dL/d(log alpha);
//   2. splat after splat, over the blocks it added light to: sums of those over pixels, in registers, into one record:
//     0      sum of g
//     1..5   sums of g dx, g dy, g dx^2, g dx dy, g dy^2, (dx, dy) = pixel - mean
//     6..8   dL/dcolor        9   dL/d(1/z)       10, 11   sums of |dL/dmean| per pixel, if wanted
#pragma once
#include "blend.h"
#include "memory.h"

namespace gs::cpu::GS_ISA {

// What a block's pixels carry from splat to splat.
struct Behind {
    F T, behind;
    I last;
};

struct BlockBackward : Behind { F red, green, blue, inv_depth; };  // gradient of the image

// What one splat did to one block.
struct Visit { F weight, g; };

struct BackwardBatch {
    Splat<Number> splat[kBatch];
    int32_t position[kBatch];     // in the tile's list
    uint16_t touched[kBatch];     // bit b: the splat added light to block b
    int32_t first_visit[kBatch];  // visits lie splat after splat, each splat's in the order of its blocks
    Visit visit[kBatch * kBlocks];
};

// The splats of a batch, and where the visits of each lie.
GS_INLINE void begin_backward_batch(const Frame<Number>& f, int64_t base, int count, int64_t begin,
                                    BackwardBatch& batch) {
    std::memset(batch.touched, 0, sizeof batch.touched);
    std::memcpy(batch.touched, f.touched + base, count * sizeof *f.touched);
    int visits = 0;
    for (int j = 0; j < count; ++j) {
        batch.first_visit[j] = visits;
        batch.position[j] = int32_t(base - begin) + j;
        visits += __builtin_popcount(batch.touched[j]);
        store(&batch.splat[j].x, load(&f.splats[f.entries[base + j].splat].x));
    }
}

// share(j): the product of what the batch's j-th splat looks like and the gradient of the block's pixels.
template <typename Share>
GS_INLINE void revisit_block(Behind& state, uint64_t list, BackwardBatch& batch, int b, F px, F py, Share share) {
    Behind s = state;
    const uint32_t before = (1u << b) - 1;
    while (list) {
        const int j = 63 - __builtin_clzll(list);
        list ^= uint64_t(1) << j;
        const Splat<Number>& splat = batch.splat[j];
        const F q = log2_alpha(splat, px - F(splat.x), py - F(splat.y));
        const M lit = at_most(q >= F(kLog2AlphaMin), I(batch.position[j]), s.last);
        const F uncapped = zero_unless(lit, ex2_near(q)), alpha = min(uncapped, F(kAlphaMax));
        const F change = share(j) - s.behind;  // dL/dalpha per light that reaches the splat
        s.T = s.T * recip(F(1) - alpha);
        s.behind = fma(alpha, change, s.behind);
        Visit& v = batch.visit[batch.first_visit[j] + __builtin_popcount(batch.touched[j] & before)];
        v.weight = alpha * s.T;
        v.g = s.T * uncapped * change;  // the cap lets the gradient through
    }
    state = s;
}

// Of colors.
template <bool kInvDepth>
GS_INLINE void revisit_colors(BlockBackward& s, uint64_t list, BackwardBatch& batch, int b, F px, F py) {
    const F red = s.red, green = s.green, blue = s.blue, inv_depth = s.inv_depth;
    revisit_block(s, list, batch, b, px, py, [&](int j) {
        const Splat<Number>& splat = batch.splat[j];
        const F along = fma(F(splat.red), red, fma(F(splat.green), green, F(splat.blue) * blue));
        return kInvDepth ? fma(F(splat.inv_z), inv_depth, along) : along;
    });
}

// The sums of one splat over its visits.
template <bool kInvDepth, bool kAbsolute>
GS_INLINE F sum_visits(const Splat<Number>& splat, uint32_t blocks, int count, const Visit* v,
                       const BlockBackward* state, const PixelCenters& centers) {
    constexpr int kSums = kAbsolute ? 12 : kInvDepth ? 10 : 9;
    F total[12];
    for (F& t : total) t = F(0);
    const F x = F(splat.x), y = F(splat.y);
    for (int k = 0; k < count; ++k, ++v) {
        const int b = __builtin_ctz(blocks);
        blocks &= blocks - 1;
        const BlockBackward& s = state[b];
        const F dx = centers.x[b & 3] - x, dy = centers.y[b >> 2] - y, gx = v->g * dx, gy = v->g * dy;
        total[0] = total[0] + v->g;
        total[1] = total[1] + gx;
        total[2] = total[2] + gy;
        total[3] = fma(gx, dx, total[3]);
        total[4] = fma(gx, dy, total[4]);
        total[5] = fma(gy, dy, total[5]);
        total[6] = fma(v->weight, s.red, total[6]);
        total[7] = fma(v->weight, s.green, total[7]);
        total[8] = fma(v->weight, s.blue, total[8]);
        if (kInvDepth) total[9] = fma(v->weight, s.inv_depth, total[9]);
        if (kAbsolute) {  // dL/dmean of this pixel is g Q (dx, dy); Q = -2 ln 2 (a, b/2, c)
            total[10] = total[10] + abs(fma(F(2 * splat.a), gx, F(splat.b) * gy));
            total[11] = total[11] + abs(fma(F(2 * splat.c), gy, F(splat.b) * gx));
        }
    }
    return sums<kSums>(total);
}

// Indices 0 .. count, those with the same number of blocks side by side: loops of one length in a row cost no
// mispredicted branches.
GS_INLINE void sort_by_block_count(const uint16_t* touched, int count, uint8_t* order) {
    uint8_t place[kBlocks + 2] = {}, blocks[kBatch];
    for (int j = 0; j < count; ++j) ++place[(blocks[j] = uint8_t(__builtin_popcount(touched[j]))) + 1];
    for (int n = 0; n < kBlocks; ++n) place[n + 1] = uint8_t(place[n + 1] + place[n]);
    for (int j = 0; j < count; ++j) order[place[blocks[j]]++] = uint8_t(j);
}

template <bool kInvDepth, bool kAbsolute>
static void blend_backward_tile(const Frame<Number>& f, const Number* background, const ImageGrads<Number>& grad,
                                Number* records, double* background_sum, int64_t tile) {
    const TilePlace t = place(f, tile);
    const PixelCenters centers(t);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1], plane = int64_t(f.width) * f.height;
    BlockBackward state[kBlocks];
    F sum_red = F(0), sum_green = F(0), sum_blue = F(0);
    for (int b = 0; b < kBlocks; ++b) {
        BlockBackward& s = state[b];
        const int64_t at = tile * kBlocks * kLanes + b * kLanes;
        s.T = load(f.transmittance + at);
        s.last = load(f.last + at);
        s.red = load_block(grad.color, t, b);
        s.green = load_block(grad.color + plane, t, b);
        s.blue = load_block(grad.color + 2 * plane, t, b);
        s.inv_depth = kInvDepth ? load_block(grad.inv_depth, t, b) : F(0);
        s.behind = s.red * F(background[0]) + s.green * F(background[1]) + s.blue * F(background[2]);
        if (grad.alpha) s.behind = s.behind - load_block(grad.alpha, t, b);
        sum_red = fma(s.T, s.red, sum_red);
        sum_green = fma(s.T, s.green, sum_green);
        sum_blue = fma(s.T, s.blue, sum_blue);
    }
    background_sum[0] = sum(sum_red), background_sum[1] = sum(sum_green), background_sum[2] = sum(sum_blue);

    BackwardBatch batch;
    for (int64_t base = begin + (end - begin - 1) / kBatch * kBatch; base >= begin && begin < end; base -= kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        begin_backward_batch(f, base, count, begin, batch);
        for (int b = 0; b < kBlocks; ++b) {
            // For the next batch, and for the second pass of this one.
            if (base > begin) fetch_splats(f, f.entries + base - kBatch + b * kFetch, f.entries + base);
            for (int j = b * kFetch; j < (b + 1) * kFetch && j < count; ++j)
                __builtin_prefetch(records + int64_t(f.entries[base + j].slot) * kRecord, 1);
            const uint64_t list = column_of_bits(batch.touched, b);
            if (list) revisit_colors<kInvDepth>(state[b], list, batch, b, centers.x[b & 3], centers.y[b >> 2]);
        }
        uint8_t order[kBatch];
        sort_by_block_count(batch.touched, count, order);
        for (int i = 0; i < count; ++i) {
            const int j = order[i], blocks = __builtin_popcount(batch.touched[j]);
            store(records + int64_t(f.entries[base + j].slot) * kRecord,
                  sum_visits<kInvDepth, kAbsolute>(batch.splat[j], batch.touched[j], blocks,
                                                   batch.visit + batch.first_visit[j], state, centers));
        }
    }
}

static void blend_backward(const Frame<Number>& f, const Number* background, const ImageGrads<Number>& grad,
                           bool absolute, Number* records, Number* grad_background) {
    Buffer partial(f.tiles() * 3 * sizeof(double));
    double* sums = partial.as<double>();
    parallel(f.tiles(), [&](int64_t i) {
        const int64_t tile = f.tile_order[i];
        double* mine = sums + 3 * tile;
        if (absolute && grad.inv_depth)
            blend_backward_tile<true, true>(f, background, grad, records, mine, tile);
        else if (absolute)
            blend_backward_tile<false, true>(f, background, grad, records, mine, tile);
        else if (grad.inv_depth)
            blend_backward_tile<true, false>(f, background, grad, records, mine, tile);
        else
            blend_backward_tile<false, false>(f, background, grad, records, mine, tile);
    });
    if (!grad_background) return;
    double total[3] = {0, 0, 0};
    for (int64_t t = 0; t < f.tiles(); ++t)
        for (int c = 0; c < 3; ++c) total[c] += sums[3 * t + c];
    for (int c = 0; c < 3; ++c) grad_background[c] = Number(total[c]);
}

}  // namespace gs::cpu::GS_ISA
