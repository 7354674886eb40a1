// blend.h: front to back over each tile's splats, one 4x4 block of pixels in sixteen lanes.
//
// A tile's splats are staged in batches. Staging also tests each against the tile's sixteen blocks, sixteen splats at
// once, with the ellipse on which its alpha is 1/255. Then block after block walks the set bits of its list, its
// sixteen pixels staying in registers, and drops out when all of them are saturated.
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
    alignas(64) Number lane[kLanes];
    const int x = t.x + pixel_x(b, 0), y = t.y + pixel_y(b, 0);
    if (t.whole(b)) {
        for (int r = 0; r < kBlock; ++r)
            std::memcpy(lane + kBlock * r, plane + int64_t(y + r) * t.width + x, kBlock * sizeof(Number));
    } else {
        for (int i = 0; i < kLanes; ++i) {
            const int u = x + (i & 3), v = y + (i >> 2);
            lane[i] = u < t.width && v < t.height ? plane[int64_t(v) * t.width + u] : Number(0);
        }
    }
    return load(lane);
}

GS_INLINE void store_block(Number* plane, const TilePlace& t, int b, F value) {
    alignas(64) Number lane[kLanes];
    store(lane, value);
    const int x = t.x + pixel_x(b, 0), y = t.y + pixel_y(b, 0);
    for (int r = 0; r < kBlock && y + r < t.height; ++r) {
        const int n = t.width - x < kBlock ? t.width - x : kBlock;
        if (n > 0) std::memcpy(plane + int64_t(y + r) * t.width + x, lane + kBlock * r, n * sizeof(Number));
    }
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

// Tests sixteen splats against the sixteen blocks of a tile: bit i of hits[b] says that splat i can reach alpha 1/255
// in block b. The test is that of tiles.h, with everything taken out of the loop that a row or column shares.
GS_INLINE void test_blocks(const F* field, const TilePlace& t, uint32_t* hits) {
    const F x = field[0], y = field[1], a = field[2], b = field[3], c = field[4];
    const F zero = F(0), edge = F(kBlock - 1);
    const F reach = field[5] + F(7.994353436858858 + 2e-3);     // log2(255 opacity) and a margin
    const F slope_x = b * F(-0.5) / a, slope_y = b * F(-0.5) / c;  // best x for given y, and the other way
    const F slack = F(1 - 4e-6);
    F ex[4], x0[4], x1[4], best_y[4], qx[4], ey[4], y0[4], y1[4], best_x[4], qy[4];
    for (int k = 0; k < 4; ++k) {
        x0[k] = F(t.x + kBlock * k + 0.5) - x, x1[k] = x0[k] + edge;
        y0[k] = F(t.y + kBlock * k + 0.5) - y, y1[k] = y0[k] + edge;
        ex[k] = clamp(zero, x0[k], x1[k]), ey[k] = clamp(zero, y0[k], y1[k]);
        best_y[k] = slope_y * ex[k], best_x[k] = slope_x * ey[k];
        qx[k] = fma(a * ex[k], ex[k] * slack, reach), qy[k] = fma(c * ey[k], ey[k] * slack, reach);
    }
    for (int row = 0; row < 4; ++row) {
        for (int col = 0; col < 4; ++col) {
            const F v = clamp(best_y[col], y0[row], y1[row]), u = clamp(best_x[row], x0[col], x1[col]);
            const F along_x = fma(v, fma(c * slack, v, b * ex[col]), qx[col]);
            const F along_y = fma(u, fma(a * slack, u, b * ey[row]), qy[row]);
            hits[4 * row + col] = bits(max(along_x, along_y) >= zero);
        }
    }
}

// What a block carries through a tile's list.
struct BlockState {
    F T, red, green, blue, inv_depth, threshold;  // threshold: 1/255, or infinity for a pixel that is done
    I last;
};

static void blend_tile(const Frame<Number>& f, const Number* background, const Image<Number>& out, int64_t tile) {
    const TilePlace t = place(f, tile);
    const PixelCenters centers(t);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1];
    BlockState state[kBlocks];
    Splat<Number> staged[kBatch];
    uint64_t hits[kBlocks];
    uint16_t touched[kBatch];

    uint32_t alive = 0;  // blocks with a pixel that still takes light
    for (int b = 0; b < kBlocks; ++b) {
        const M inside = t.inside(b);
        state[b] = {F(1), F(0), F(0), F(0), F(0), select(inside, F(kAlphaMin), F(INFINITY)), I(-1)};
        alive |= uint32_t(any(inside)) << b;
    }

    for (int64_t base = begin; base < end; base += kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        if (!alive) {
            std::memset(f.touched + base, 0, (end - base) * sizeof *f.touched);
            break;
        }
        std::memset(hits, 0, sizeof hits);
        std::memset(touched, 0, sizeof touched);
        for (int g = 0; g < count; g += kLanes) {
            F row[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int e = g + i < count ? g + i : count - 1;
                const Splat<Number>& s = f.splats[f.entries[base + e].splat];
                row[i] = load(&s.x);
                store(&staged[g + i].x, row[i]);
            }
            transpose(row);
            uint32_t group[kBlocks];
            test_blocks(row, t, group);
            for (int b = 0; b < kBlocks; ++b) hits[b] |= uint64_t(group[b]) << g;
        }
        const uint64_t real = count == kBatch ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
        const int64_t next = base + kBatch, next_end = next + kBatch < end ? next + kBatch : end;
        for (int64_t e = next; e < next_end; ++e) __builtin_prefetch(&f.splats[f.entries[e].splat]);

        for (uint32_t todo = alive; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo);
            const F px = centers.x[b & 3], py = centers.y[b >> 2];
            BlockState s = state[b];
            for (uint64_t list = hits[b] & real; list; list &= list - 1) {
                const int j = __builtin_ctzll(list);
                const Splat<Number>& splat = staged[j];
                const F alpha = min(ex2(log2_alpha(splat, px - F(splat.x), py - F(splat.y))), F(kAlphaMax));
                M lit = alpha >= s.threshold;
                F weight = alpha * s.T;
                const M stop = lit & (s.T - weight < F(kStopAt));
                if (__builtin_expect(any(stop), 0)) {
                    s.threshold = select(stop, F(INFINITY), s.threshold);
                    lit = lit & !stop;
                    if (!any(s.threshold < F(1))) {
                        alive &= ~(1u << b);
                        if (!any(lit)) break;
                        list = list & (~list + 1);  // this splat is the last
                    }
                }
                weight = zero_unless(lit, weight);
                s.T = s.T - weight;
                s.red = fma(weight, F(splat.red), s.red);
                s.green = fma(weight, F(splat.green), s.green);
                s.blue = fma(weight, F(splat.blue), s.blue);
                s.inv_depth = fma(weight, F(splat.inv_z), s.inv_depth);
                s.last = select(lit, I(int(base - begin) + j), s.last);
                touched[j] |= uint16_t(uint32_t(any(lit)) << b);
            }
            state[b] = s;
        }
        std::memcpy(f.touched + base, touched, count * sizeof *touched);
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
        store_block(out.alpha, t, b, F(1) - s.T);
        store_block(out.inv_depth, t, b, s.inv_depth);
    }
}

static void blend(const Frame<Number>& f, const Number* background, const Image<Number>& out) {
    parallel(f.tiles(), [&](int64_t i) { blend_tile(f, background, out, f.tile_order[i]); });
}

}  // namespace gs::cpu::GS_ISA
