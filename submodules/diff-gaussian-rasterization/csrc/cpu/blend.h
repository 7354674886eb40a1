// blend.h: front to back over each tile's splats, one 4x4 block of pixels in sixteen lanes.
//
// A tile's splats are staged in batches. Staging also tests each against the tile's sixteen blocks (bin.h). Then block
// after block walks the set bits of its list, its sixteen pixels staying in registers, and drops out when all of them
// are saturated.
#pragma once
#include "../common/constants.h"
#include "bin.h"
#include "simd.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu::GS_ISA {

constexpr int kBlock = 4, kBlocks = 16, kBatch = 64;  // pixels a side; blocks per tile; splats staged at once

// Where lane i of block b lies in its tile.
GS_INLINE int pixel_x(int b, int lane) { return (b & 3) * kBlock + (lane & 3); }
GS_INLINE int pixel_y(int b, int lane) { return (b >> 2) * kBlock + (lane >> 2); }

struct TilePlace {
    int x, y, width, height;  // its first pixel; the image

    GS_MEMBER bool whole(int b) const {
        return x + pixel_x(b, 0) + kBlock <= width && y + pixel_y(b, 0) + kBlock <= height;
    }
    GS_MEMBER M inside(int b) const {
        if (whole(b)) return from_bits(0xffff);
        uint32_t m = 0;
        for (int i = 0; i < kLanes; ++i) m |= uint32_t(x + pixel_x(b, i) < width && y + pixel_y(b, i) < height) << i;
        return from_bits(m);
    }
};

template <typename T>
GS_INLINE TilePlace place(const Frame<T>& f, int64_t tile) {
    return {int(tile % f.tiles_x) * kTileSize, int(tile / f.tiles_x) * kTileSize, f.width, f.height};
}

// One block of a plane [H, W]; zeros outside the image.
GS_INLINE F load_block(const Number* plane, const TilePlace& t, int b) {
    const int x = t.x + pixel_x(b, 0), y = t.y + pixel_y(b, 0);
    if (t.whole(b)) return load_fours(plane + int64_t(y) * t.width + x, t.width);
    Number lane[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const int u = x + (i & 3), v = y + (i >> 2);
        lane[i] = u < t.width && v < t.height ? plane[int64_t(v) * t.width + u] : Number(0);
    }
    return load(lane);
}

GS_INLINE void store_block(Number* plane, const TilePlace& t, int b, F value) {
    alignas(64) Number lane[kLanes];
    store(lane, value);
    const int x = t.x + pixel_x(b, 0), y = t.y + pixel_y(b, 0);
    if (t.whole(b)) {
        for (int r = 0; r < kBlock; ++r)
            std::memcpy(plane + int64_t(y + r) * t.width + x, lane + kBlock * r, kBlock * sizeof(Number));
        return;
    }
    for (int r = 0; r < kBlock && y + r < t.height; ++r)
        for (int i = 0; i < kBlock && x + i < t.width; ++i)
            plane[int64_t(y + r) * t.width + x + i] = lane[kBlock * r + i];
}

// The pixel centers of a tile: x of the four columns of blocks, y of the four rows.
struct PixelCenters {
    F x[4], y[4];
    GS_MEMBER explicit PixelCenters(const TilePlace& t) {
        Number u[kLanes], v[kLanes];
        for (int i = 0; i < kLanes; ++i) u[i] = Number(i & 3), v[i] = Number(i >> 2);
        for (int k = 0; k < 4; ++k) {
            x[k] = load(u) + F(t.x + kBlock * k + 0.5);
            y[k] = load(v) + F(t.y + kBlock * k + 0.5);
        }
    }
};

// log2(alpha) before the cap.
GS_INLINE F log2_alpha(const Splat<Number>& s, F dx, F dy) {
    return fma(dx, fma(F(s.a), dx, F(s.b) * dy), fma(F(s.c) * dy, dy, F(s.bias)));
}

// The tile's blocks as a grid of boxes.
GS_INLINE Grid block_grid(const TilePlace& t, Number margin) {
    return {F(t.x + 0.5 - margin), F(t.y + 0.5 - margin), kBlock, F(INFINITY), F(INFINITY), margin};
}

// What a block carries through a tile's list. `through` is the light that passes all splats so far, be they blended or not:
// a pixel takes light until `through` falls below kStopAt. `T` is the light that passes those that were blended.
struct BlockState {
    F through, T, red, green, blue, inv_depth;
    I last;
};

// alpha >= 1/255, said of its logarithm: known before the exponential is.
constexpr double kLog2AlphaMin = -7.994353436858858;

// A batch of a tile's list. One more than there are: behind the last comes one that shows nowhere.
struct Batch {
    Splat<Number> splat[kBatch + 1];
    int32_t position[kBatch + 1];  // in the tile's list
    uint64_t hits[kBlocks];        // bit j: splat j may show in this block
    uint16_t touched[kBatch + 1];  // bit b: it did in block b
};

GS_INLINE int first_bit(uint64_t list) { return list ? __builtin_ctzll(list) : kBatch; }

// Blends the listed splats into one block, four at a time: their alphas do not depend on one another. Nor does anything
// wait for the test whether a pixel is done: `through` only falls, so once it is below the limit it stays there. And as long
// as it is above for all sixteen, which is most of the time, nothing has to be chosen.
template <bool kInvDepth>
GS_INLINE void blend_block(BlockState& state, uint64_t list, Batch& batch, int b, F px, F py) {
    constexpr int kGroup = 4;
    constexpr bool kTwoWays = GS_WIDTH == 16;  // fewer registers would spill what is gained
    BlockState s = state;
    F& T = kTwoWays ? state.T : s.T;  // looked after only where a pixel is done: before, it is `through`
    const auto keep_T = [&] { T = select(s.through >= F(kStopAt), s.through, T); };
    while (list) {
        int j[kGroup];
        F alpha[kGroup], passed = s.through;
        M lit[kGroup];
        _Pragma("GCC unroll 4") for (int k = 0; k < kGroup; ++k) {
            j[k] = first_bit(list);
            list &= list - 1;
            const Splat<Number>& splat = batch.splat[j[k]];
            const F q = log2_alpha(splat, px - F(splat.x), py - F(splat.y));
            lit[k] = q >= F(kLog2AlphaMin);
            alpha[k] = zero_unless(lit[k], min(ex2_near(q), F(kAlphaMax)));
            if (kTwoWays) passed = fma(-alpha[k], passed, passed);
        }
        const auto add = [&](auto all_open) __attribute__((always_inline)) {
            _Pragma("GCC unroll 4") for (int k = 0; k < kGroup; ++k) {
                const Splat<Number>& splat = batch.splat[j[k]];
                const F weight = alpha[k] * s.through;
                s.through = fma(-alpha[k], s.through, s.through);
                const M blended = s.through >= F(kStopAt), lit_now = all_open ? lit[k] : lit[k] & blended;
                const auto with = [&](F sum, Number value) {
                    return all_open ? fma(weight, F(value), sum) : fma_where(blended, weight, F(value), sum);
                };
                if (!all_open) T = select(blended, s.through, T);
                s.red = with(s.red, splat.red), s.green = with(s.green, splat.green), s.blue = with(s.blue, splat.blue);
                if (kInvDepth) s.inv_depth = with(s.inv_depth, splat.inv_z);
                s.last = select(lit_now, &batch.position[j[k]], s.last);
                batch.touched[j[k]] |= uint16_t(uint32_t(any(lit_now)) << b);
            }
        };
        if (kTwoWays && bits(passed >= F(kStopAt)) == 0xffff) {
            add(std::true_type());
        } else {
            if (kTwoWays) keep_T();
            add(std::false_type());
            if (!any(s.through >= F(kStopAt))) break;
        }
    }
    if (kTwoWays) keep_T();
    s.T = T;
    state = s;
}

// Entries [base, base + count) of the tile into the batch, tested against the blocks.
GS_INLINE void stage(const Frame<Number>& f, const TilePlace& t, int64_t base, int count, Batch& batch,
                     Number margin = 0) {
    std::memset(batch.hits, 0, sizeof batch.hits);
    std::memset(batch.touched, 0, sizeof batch.touched);
    for (int g = 0; g < count; g += kLanes) {
        F row[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int e = g + i < count ? g + i : count - 1;
            const Splat<Number>& s = f.splats[f.entries[base + e].splat];
            row[i] = load(&s.x);
            store(&batch.splat[g + i].x, row[i]);
        }
        transpose(row);
        M group[kBlocks];
        test_grid<false>(row, block_grid(t, margin), group);
        for (int b = 0; b < kBlocks; ++b) batch.hits[b] |= uint64_t(bits(group[b])) << g;
    }
    const uint64_t real = count == kBatch ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    for (uint64_t& h : batch.hits) h &= real;
}

// A few of the next batch, for every block: the processor waits for no more than some dozen lines at once.
constexpr int kFetch = kBatch / kBlocks;
GS_INLINE void fetch_splats(const Frame<Number>& f, const Entry* from, const Entry* end) {
    for (const Entry* e = from; e < from + kFetch && e < end; ++e) __builtin_prefetch(&f.splats[e->splat]);
}

// `next_tile` is the one that this thread will probably turn to.
template <bool kInvDepth>
static void blend_tile(const Frame<Number>& f, const Number* background, const Image<Number>& out, int64_t tile,
                       int64_t next_tile) {
    const TilePlace t = place(f, tile);
    const PixelCenters centers(t);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1];
    BlockState state[kBlocks];
    Batch batch;
    batch.splat[kBatch] = {0, 0, 0, 0, 0, Number(-1e30), 0, 0, 0, 0, 0, {}};

    uint32_t alive = 0;  // blocks with an open pixel
    for (int b = 0; b < kBlocks; ++b) {
        const M inside = t.inside(b);
        state[b] = {select(inside, F(1), F(0)), F(1), F(0), F(0), F(0), F(0), I(-1)};
        alive |= uint32_t(any(inside)) << b;
    }

    for (int64_t base = begin; base < end; base += kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        if (!alive) {
            std::memset(f.touched + base, 0, (end - base) * sizeof *f.touched);
            break;
        }
        stage(f, t, base, count, batch);
        for (int e = 0; e <= kBatch; ++e) batch.position[e] = int32_t(base - begin) + e;
        const bool more = base + kBatch < end;
        const Entry* ahead = f.entries + (more ? base + kBatch : f.tile_begin[next_tile]);
        const Entry* ahead_end = f.entries + (more ? end : f.tile_begin[next_tile + 1]);
        for (uint32_t todo = alive; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo);
            fetch_splats(f, ahead + b * kFetch, ahead_end);
            blend_block<kInvDepth>(state[b], batch.hits[b], batch, b, centers.x[b & 3], centers.y[b >> 2]);
            if (!any(state[b].through >= F(kStopAt))) alive &= ~(1u << b);
        }
        std::memcpy(f.touched + base, batch.touched, count * sizeof *f.touched);
    }

    const int64_t plane = int64_t(f.width) * f.height;
    for (int b = 0; b < kBlocks; ++b) {
        const BlockState& s = state[b];
        const int64_t at = tile * kBlocks * kLanes + b * kLanes;
        store(f.transmittance + at, s.T);
        store(f.last + at, s.last);
        store_block(out.color, t, b, fma(s.T, F(background[0]), s.red));
        store_block(out.color + plane, t, b, fma(s.T, F(background[1]), s.green));
        store_block(out.color + 2 * plane, t, b, fma(s.T, F(background[2]), s.blue));
        if (out.alpha) store_block(out.alpha, t, b, F(1) - s.T);
        if (kInvDepth) store_block(out.inv_depth, t, b, s.inv_depth);
    }
}

static void blend(const Frame<Number>& f, const Number* background, const Image<Number>& out) {
    parallel(f.tiles(), [&](int64_t i) {
        const int64_t next = f.tile_order[i + 1 < f.tiles() ? i + 1 : i];
        if (out.inv_depth)
            blend_tile<true>(f, background, out, f.tile_order[i], next);
        else
            blend_tile<false>(f, background, out, f.tile_order[i], next);
    });
}

}  // namespace gs::cpu::GS_ISA
