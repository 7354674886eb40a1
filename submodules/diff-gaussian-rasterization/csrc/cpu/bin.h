// bin.h: where a splat can show: which tiles it reaches, and later which blocks of a tile.
//
// A splat shows where alpha >= 1/255: inside an ellipse. Sixteen splats at once are tested against a grid of 4x4 boxes,
// exactly: the largest alpha in a box that does not hold the mean lies on an edge that faces it, and along such an edge
// log(alpha) is a parabola. What a row or column shares is taken out of the loop. Rounding errs towards yes.
//
// find_tiles walks splats in depth order and writes the tiles of each behind each other. order.cpp turns the counts
// into places and then fills every tile's list in the same order, so the test is made once.
#pragma once
#include "../common/tiles.h"
#include "memory.h"
#include "simd.h"
#include "stages.h"

namespace gs::cpu::GS_ISA {

constexpr double kLog2Of255 = 7.994353436858858;

// 4x4 boxes of pixel centers.
struct Grid {
    F x, y;          // the first box's first pixel center
    int size;        // pixels per box and side
    F end_x, end_y;  // the last pixel center there is
    Number margin;   // how far from a pixel's center the point lies that it looks at
};

// field: the vectors x, y, a, b, c, bias of sixteen splats. hits[4 row + column]: the splats that can show in that box.
template <bool kLimited>
GS_INLINE void test_grid(const F* field, const Grid& grid, M* hits) {
    const F x = field[0], y = field[1], a = field[2], b = field[3], c = field[4];
    const F zero = F(0), edge = F(grid.size - 1 + 2 * grid.margin), slack = F(1 - 4e-6);
    const F reach = field[5] + F(kLog2Of255 + 2e-3);
    const F slope_x = b * F(-0.5) / a, slope_y = b * F(-0.5) / c;  // the best x for a given y, and the other way
    F ex[4], x0[4], x1[4], best_y[4], qx[4], ey[4], y0[4], y1[4], best_x[4], qy[4];
    for (int k = 0; k < 4; ++k) {
        x0[k] = grid.x + F(grid.size * k) - x, y0[k] = grid.y + F(grid.size * k) - y;
        x1[k] = x0[k] + edge, y1[k] = y0[k] + edge;
        if (kLimited) x1[k] = min(x1[k], grid.end_x - x), y1[k] = min(y1[k], grid.end_y - y);
        ex[k] = clamp(zero, x0[k], x1[k]), ey[k] = clamp(zero, y0[k], y1[k]);  // facing edges; 0: mean is between
        best_y[k] = slope_y * ex[k], best_x[k] = slope_x * ey[k];
        qx[k] = fma(a * ex[k], ex[k] * slack, reach), qy[k] = fma(c * ey[k], ey[k] * slack, reach);
    }
    const F a_slack = a * slack, c_slack = c * slack;
    for (int row = 0; row < 4; ++row) {
        for (int col = 0; col < 4; ++col) {
            const F v = clamp(best_y[col], y0[row], y1[row]), u = clamp(best_x[row], x0[col], x1[col]);
            const F along_x = fma(v, fma(c_slack, v, b * ex[col]), qx[col]);
            const F along_y = fma(u, fma(a_slack, u, b * ey[row]), qy[row]);
            hits[4 * row + col] = max(along_x, along_y) >= zero;
        }
    }
}

// The tiles of sixteen splats that lie in their rectangles, as windows of 4x4 tiles.
struct Windows {
    int32_t x0[kLanes], y0[kLanes], columns[kLanes], rows[kLanes];  // rectangles
    int32_t hit[kLanes];                                            // bit 4 row + column, of the first 4x4
};

GS_INLINE void first_windows(const F* field, const Frame<Number>& f, Windows& w) {
    const Rect<I> r = tile_rect(Vec2<F>{field[0], field[1]}, field[10], f.tiles_x, f.tiles_y);
    const F size = F(kTileSize), first = F(0.5 - f.margin);
    const Grid grid = {fma(to_number(r.x0), size, first), fma(to_number(r.y0), size, first), kTileSize,
                       F(f.width - 0.5 + f.margin),       F(f.height - 0.5 + f.margin),      f.margin};
    M hits[kLanes];
    test_grid<true>(field, grid, hits);
    const I columns = r.x1 - r.x0, rows = r.y1 - r.y0;
    I hit = I(0);
    for (int k = 0; k < kLanes; ++k)
        hit = with_bits(hits[k] & (I(k % 4 + 1) <= columns) & (I(k / 4 + 1) <= rows), hit, 1 << k);
    store(w.x0, r.x0), store(w.y0, r.y0), store(w.columns, columns), store(w.rows, rows), store(w.hit, hit);
}

// A splat with more than 4x4 tiles: sixteen copies of it, moved window by window.
GS_INLINE uint32_t other_window(const Splat<Number>& s, const Frame<Number>& f, int x, int y, int columns, int rows) {
    // One vector of 4x4 boxes is more than is asked: the same test, of sixteen equal lanes.
    const F field[6] = {F(s.x), F(s.y), F(s.a), F(s.b), F(s.c), F(s.bias)};
    const Grid grid = {F(x * kTileSize + 0.5 - f.margin), F(y * kTileSize + 0.5 - f.margin), kTileSize,
                       F(f.width - 0.5 + f.margin),       F(f.height - 0.5 + f.margin),      f.margin};
    M hits[kLanes];
    test_grid<true>(field, grid, hits);
    uint32_t hit = 0;
    for (int k = 0; k < kLanes; ++k) hit |= (bits(hits[k]) & uint32_t(k % 4 < columns && k / 4 < rows)) << k;
    return hit;
}

static int64_t find_tiles(const Frame<Number>& f, const int32_t* order, int64_t begin, int64_t end, Buffer& tiles,
                          uint32_t* per_tile) {
    int64_t total = 0;
    int32_t offset[kLanes];  // of the tiles of a window
    for (int k = 0; k < kLanes; ++k) offset[k] = (k >> 2) * f.tiles_x + (k & 3);
    const auto put = [&](uint32_t hit, int x, int y) {  // with room for sixteen
        total += pick(tiles.as<int32_t>() + total, offset, y * f.tiles_x + x, hit);
    };
    const auto reserve = [&](int64_t more) { tiles.grow((total + more) * sizeof(int32_t)); };
    for (int64_t r = begin; r < end; r += kLanes) {
        const int lanes = end - r < kLanes ? int(end - r) : kLanes;
        for (int64_t k = r + 2 * kLanes; k < r + 3 * kLanes && k < end; ++k) __builtin_prefetch(&f.splats[order[k]]);
        F field[kLanes];
        for (int i = 0; i < kLanes; ++i) field[i] = load(&f.splats[order[r + (i < lanes ? i : 0)]].x);
        transpose(field);
        Windows w;
        first_windows(field, f, w);
        reserve(kLanes * kLanes);
        for (int i = 0; i < lanes; ++i) {
            const int64_t before = total;
            put(uint32_t(w.hit[i]), w.x0[i], w.y0[i]);
            if (w.columns[i] > 4 || w.rows[i] > 4) {
                reserve(int64_t(w.columns[i] + 4) * (w.rows[i] + 4) + kLanes * kLanes);
                for (int y = 0; y < w.rows[i]; y += 4) {
                    for (int x = 0; x < w.columns[i]; x += 4) {
                        if (x == 0 && y == 0) continue;
                        const uint32_t hit = other_window(f.splats[order[r + i]], f, w.x0[i] + x, w.y0[i] + y,
                                                          w.columns[i] - x, w.rows[i] - y);
                        put(hit, w.x0[i] + x, w.y0[i] + y);
                    }
                }
            }
            f.slots[order[r + i]] = {0, uint32_t(total - before)};  // how many; where, order.cpp finds out
        }
    }
    // Counted here, and not as they come: how many a splat has is anybody's guess, and costs a branch each time.
    for (int64_t i = 0; i < total; ++i) ++per_tile[tiles.as<int32_t>()[i]];
    return total;
}

}  // namespace gs::cpu::GS_ISA
