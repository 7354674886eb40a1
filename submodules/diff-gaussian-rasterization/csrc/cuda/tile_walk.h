// tile_walk.h: finds the tiles a splat belongs to.
//
// Most splats have a small rectangle of tiles: their own lane finds, row by row, where the ellipse of alpha = 1/255
// begins and ends, and marks the tiles between in a mask. A large rectangle would keep 31 lanes waiting: its tiles are
// tested by the whole warp, 32 at a time, here and again when they are written down.
#pragma once
#include "../common/tiles.h"
#include "device.h"

namespace gs::cuda {

constexpr float kOutlineSlack = 0.01f;  // pixels; rounding errs towards too many tiles

// The ellipse of alpha = 1/255 around a splat: d^T cov^-1 d = limit.
struct Outline {
    Vec2<float> mean;
    float extent_x, extent_y;  // half of its bounding box
    float limit;
    float slope;           // of the line of row centers: on row dy they lie at slope dy, with half the width
    float narrow, inv_yy;  // sqrt(narrow (limit - dy^2 inv_yy))
    float rightmost;       // dy of the rightmost point; the leftmost is at -rightmost
};

// `reach` as in falloff_reach. The conic that blending uses is rounded, which makes long thin ellipses wobble: they
// get as much more as `reaches` allows them.
__device__ __forceinline__ Outline outline(Vec2<float> mean, Sym2<float> cov, float det, float reach) {
    Outline o;
    o.mean = mean;
    const float sigma = reach + 1e-3f;
    o.limit = 2.f * sigma * (1.f + 8e-6f * cov.xx * cov.yy / det);
    o.extent_x = sqrtf(o.limit * cov.xx) + kOutlineSlack;
    o.extent_y = sqrtf(o.limit * cov.yy) + kOutlineSlack;
    o.inv_yy = 1.f / cov.yy;
    o.slope = cov.xy * o.inv_yy;
    o.narrow = det * o.inv_yy;
    o.rightmost = o.slope * cov.yy * sqrtf(o.limit / cov.xx);
    return o;
}

// The tiles of `r` whose pixel centers the interval can touch: the outer ones are cut off.
__device__ __forceinline__ void cut(int& first, int& end, float low, float high) {
    const float size = float(kTileSize);
    first = int(fmaxf(float(first), ceilf((low - (size - 0.5f)) * (1.f / size))));  // as floats: these may be infinite
    end = int(fminf(float(end), floorf((high - 0.5f) * (1.f / size)) + 1.f));
}

// The rectangle of the published rule without the tiles beside the outline's bounding box.
__device__ __forceinline__ TileRect tight_rect(const Outline& o, TileRect r, const TileGrid& grid) {
    const float left = o.mean.x - o.extent_x, top = o.mean.y - o.extent_y;
    cut(r.x0, r.x1, left, o.mean.x + o.extent_x);
    cut(r.y0, r.y1, top, o.mean.y + o.extent_y);
    if (left > float(grid.width) - 0.5f || top > float(grid.height) - 0.5f) r.x1 = r.x0;
    return r;
}

// Bit y columns + x for every tile of the rectangle that the ellipse touches. At most kMaskTiles tiles.
__device__ __forceinline__ uint32_t tile_mask(const Outline& o, TileRect r, const TileGrid& grid) {
    const int columns = r.x1 - r.x0;
    uint32_t mask = 0;
    for (int y = r.y0, shift = 0; y < r.y1; ++y, shift += columns) {
        const Box<float> box = tile_box<float>(0, y, grid.width, grid.height);
        // The ellipse reaches farthest right at `rightmost`, or at the row's edge that is closest to it.
        const float low = box.y0 - o.mean.y, high = box.y1 - o.mean.y;
        const float dy_right = clamp(o.rightmost, low, high), dy_left = clamp(-o.rightmost, low, high);
        const float in_right = o.limit - dy_right * dy_right * o.inv_yy,
                    in_left = o.limit - dy_left * dy_left * o.inv_yy;
        const float right = o.mean.x + fmaf(o.slope, dy_right, sqrtf(max(0.f, o.narrow * in_right))) + kOutlineSlack;
        const float left = o.mean.x + fmaf(o.slope, dy_left, -sqrtf(max(0.f, o.narrow * in_left))) - kOutlineSlack;
        int first = r.x0, end = r.x1;
        cut(first, end, left, right);
        if (end > first && left <= float(grid.width) - 0.5f)
            mask |= (0xffffffffu >> (32 - (end - first))) << (shift + first - r.x0);
    }
    return mask;
}

// ---- large rectangles ----------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_large(const TileSet& s) { return int(s.columns) * int(s.rows) > kMaskTiles; }

struct Footprint {
    Vec2<float> mean;
    Sym2<float> conic;  // in units of log2(alpha), as `reach`
    float reach;
};

__device__ __forceinline__ Footprint footprint(float4 place, float4 shape) {
    return {{place.x, place.y}, {-2.f * shape.x, -shape.y, -2.f * shape.z}, shape.w - kLog2AlphaMin};
}

// Calls visit(nth, tile) for every tile that is reached, nth = 0, 1, ...; returns how many there were. All 32 lanes
// call with the same splat, and share the visits.
template <typename Visit>
__device__ __forceinline__ uint32_t walk_tiles(const Footprint& f, const TileSet& set, const TileGrid& grid,
                                               Visit visit) {
    const int columns = set.columns, tiles = columns * set.rows;
    uint32_t count = 0;
    for (int first = 0; first < tiles; first += kWarp) {
        const int i = first + lane_id();
        const int x = set.x0 + i % columns, y = set.y0 + i / columns;
        const bool hit = i < tiles && reaches(f.mean, f.conic, f.reach, tile_box<float>(x, y, grid.width, grid.height));
        const unsigned hits = __ballot_sync(kFullWarp, hit);
        if (hit) visit(count + __popc(hits & lanes_below()), y * grid.tiles_x + x);
        count += __popc(hits);
    }
    return count;
}

}  // namespace gs::cuda
