// bin.h: which tiles a splat reaches. Sixteen tiles are tested at once, a window of 4x4 of them.
//
// find_tiles walks splats in depth order and writes the tiles of each behind each other. The glue turns the counts
// into places and then fills every tile's list in the same order (order.cpp), so the test is made once.
#pragma once
#include "../common/tiles.h"
#include "memory.h"
#include "simd.h"
#include "stages.h"

namespace gs::cpu::GS_ISA {

GS_INLINE uint32_t reached_in_window(const Splat<Number>& s, int tile_x, int tile_y, int width, int height) {
    Number column[kLanes], row[kLanes];
    for (int i = 0; i < kLanes; ++i) column[i] = Number((i & 3) * kTileSize), row[i] = Number((i >> 2) * kTileSize);
    const F x0 = load(column) + F(tile_x * kTileSize + 0.5), y0 = load(row) + F(tile_y * kTileSize + 0.5);
    const F x1 = min(x0 + F(kTileSize - 1), F(width - 0.5)), y1 = min(y0 + F(kTileSize - 1), F(height - 0.5));
    // In units of log2(e), in which the reach is log2(255 opacity).
    const Sym2<F> q = {F(-2 * s.a), F(-s.b), F(-2 * s.c)};
    return bits(reaches(Vec2<F>{F(s.x), F(s.y)}, q, F(s.bias + Number(7.994353436858858)), Box<F>{x0, y0, x1, y1}));
}

// Calls found(tile) for every tile of the splat, always in the same order.
template <typename Found>
GS_INLINE void for_each_tile(const Splat<Number>& s, const Frame<Number>& f, Found found) {
    const TileRect r = tile_rect(Vec2<Number>{s.x, s.y}, s.radius, f.tiles_x, f.tiles_y);
    if (!(s.bias > Number(-8.1))) return;  // fainter than 1/255 at its very center, or never to be shown
    for (int y = r.y0; y < r.y1; y += 4) {
        for (int x = r.x0; x < r.x1; x += 4) {
            uint32_t hit = reached_in_window(s, x, y, f.width, f.height);
            const int columns = r.x1 - x, rows = r.y1 - y;
            if (columns < 4) hit &= 0x1111u * ((1u << columns) - 1);
            if (rows < 4) hit &= (1u << 4 * rows) - 1;
            for (; hit; hit &= hit - 1) {
                const int lane = __builtin_ctz(hit);
                found(int64_t(y + (lane >> 2)) * f.tiles_x + x + (lane & 3));
            }
        }
    }
}

static int64_t find_tiles(const Frame<Number>& f, const int32_t* order, int64_t begin, int64_t end, Buffer& tiles,
                          uint32_t* per_tile, uint32_t* per_splat) {
    int64_t total = 0;
    for (int64_t r = begin; r < end; ++r) {
        if (r + 8 < end) __builtin_prefetch(&f.splats[order[r + 8]]);
        const int64_t before = total;
        for_each_tile(f.splats[order[r]], f, [&](int64_t tile) {
            if (size_t(total + 1) * sizeof(int32_t) > tiles.capacity) tiles.grow((total + 1) * sizeof(int32_t));
            tiles.as<int32_t>()[total++] = int32_t(tile);
            ++per_tile[tile];
        });
        per_splat[r - begin] = uint32_t(total - before);
    }
    return total;
}

}  // namespace gs::cpu::GS_ISA
