// tile_walk.h: finds the tiles a splat belongs to.
//
// In each row of tiles, those between where the ellipse of alpha = 1/255 begins and ends. Most splats have a small
// rectangle of tiles: their own lane goes through its rows, and marks the tiles in a mask. A large rectangle would keep 31
// lanes waiting: a whole warp takes its rows, 32 at a time, to count its tiles and again to write them down.
#pragma once
#include "../common/tiles.h"
#include "gaussian.h"

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

// alpha >= 1/255 where 1/2 d^T cov^-1 d <= reach. The conic that blending uses is rounded, and so is what it makes of it,
// which makes long thin ellipses wobble: the thinner they are, the more they get.
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

// Of the tiles first .. end, those whose pixel centers the interval can touch: the outer ones are cut off.
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

struct Span {
    int first, end;  // of the tiles of a row
    __device__ __forceinline__ int count() const { return end - first; }
};

// The tiles of `r` in row y that the ellipse touches.
__device__ __forceinline__ Span row_span(const Outline& o, TileRect r, int y, const TileGrid& grid) {
    const Box<float> box = tile_box<float>(0, y, grid.width, grid.height);
    // The ellipse reaches farthest right at `rightmost`, or at the row's edge that is closest to it.
    const float low = box.y0 - o.mean.y, high = box.y1 - o.mean.y;
    const float dy_right = clamp(o.rightmost, low, high), dy_left = clamp(-o.rightmost, low, high);
    const float in_right = o.limit - dy_right * dy_right * o.inv_yy, in_left = o.limit - dy_left * dy_left * o.inv_yy;
    const float right = o.mean.x + fmaf(o.slope, dy_right, sqrtf(max(0.f, o.narrow * in_right))) + kOutlineSlack;
    const float left = o.mean.x + fmaf(o.slope, dy_left, -sqrtf(max(0.f, o.narrow * in_left))) - kOutlineSlack;
    Span span = {r.x0, r.x1};
    cut(span.first, span.end, left, right);
    return span.end > span.first && left <= float(grid.width) - 0.5f ? span : Span{0, 0};
}

// Bit y columns + x for every tile of the rectangle that the ellipse touches. At most kMaskTiles tiles.
__device__ __forceinline__ uint32_t tile_mask(const Outline& o, TileRect r, const TileGrid& grid) {
    uint32_t mask = 0;
    for (int y = r.y0, shift = 0; y < r.y1; ++y, shift += r.x1 - r.x0) {
        const Span span = row_span(o, r, y, grid);
        if (span.count() > 0) mask |= (0xffffffffu >> (32 - span.count())) << (shift + span.first - r.x0);
    }
    return mask;
}

// ---- large rectangles ----------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_large(const TileSet& s) { return int(s.columns) * int(s.rows) > kMaskTiles; }

__device__ __forceinline__ TileRect rect_of(const TileSet& s) { return {s.x0, s.y0, s.x0 + s.columns, s.y0 + s.rows}; }

// All of the rectangle is touched.
__device__ __forceinline__ Outline everywhere(Vec2<float> mean) {
    return {mean, INFINITY, INFINITY, INFINITY, 0.f, 1.f, 0.f, 0.f};
}

// From what emit knows of a splat. No ellipse, where rounding has left none or an infinite extent says so.
__device__ __forceinline__ Outline large_outline(float4 place, float4 shape) {
    const Vec2<float> mean = {place.x, place.y};
    const Sym2<float> conic = {-2.f * shape.x, -shape.y, -2.f * shape.z};  // in units of log2(alpha)
    const float det = exact_determinant(conic);
    if (!(det > 1e-7f * conic.xx * conic.yy) || isinf(place.z)) return everywhere(mean);
    return outline(mean, inverse(conic, det), 1.f / det, shape.w - kLog2AlphaMin);
}

// The tiles of a splat, of its published rectangle `rect`. All 32 lanes must call: they help those with large splats.
// Where a splat `shows`, `make` gives its outline. `kEverywhere`: the rectangle's tiles, all of them.
template <bool kEverywhere, typename MakeOutline>
__device__ __forceinline__ TileSet find_tiles(bool shows, MakeOutline make, TileRect rect, float4 place, float4 shape,
                                              const TileGrid& grid) {
    TileSet set{};
    if (shows) {
        const Outline o = make();
        const TileRect r = tight_rect(o, rect, grid);
        if (!empty(r)) {
            set.x0 = uint16_t(r.x0), set.y0 = uint16_t(r.y0);
            set.columns = uint16_t(r.x1 - r.x0), set.rows = uint16_t(r.y1 - r.y0);
            if (!is_large(set)) {
                set.mask = tile_mask(o, r, grid);
                set.count = __popc(set.mask);
            }
        }
    }
    unsigned large = __ballot_sync(kFullWarp, is_large(set));
    while (large) {
        const int owner = __ffs(large) - 1;
        large &= large - 1;
        const auto get = [owner](auto v) { return __shfl_sync(kFullWarp, v, owner); };
        const Outline o = large_outline({get(place.x), get(place.y), kEverywhere ? INFINITY : 0.f, 0.f},
                                        {get(shape.x), get(shape.y), get(shape.z), get(shape.w)});
        const TileRect r = {get(int(set.x0)), get(int(set.y0)), get(set.x0 + set.columns), get(set.y0 + set.rows)};
        uint32_t count = 0;
        for (int y = r.y0 + lane_id(); y < r.y1; y += kWarp) count += row_span(o, r, y, grid).count();
        count = warp_sum(count);
        if (lane_id() == owner) set.count = count;
    }
    return set;
}

// Adds the splats of a block of kThreads to the totals. All threads must call.
template <int kThreads>
__device__ __forceinline__ void add_totals(bool seen, uint32_t tiles, Totals* totals) {
    __shared__ unsigned long long sums[kThreads / kWarp];
    __shared__ int seen_in[kThreads / kWarp];
    const unsigned long long sum = warp_sum(static_cast<unsigned long long>(seen ? tiles : 0u));
    const unsigned lanes = __ballot_sync(kFullWarp, seen);
    if (lane_id() == 0) sums[threadIdx.x / kWarp] = sum, seen_in[threadIdx.x / kWarp] = __popc(lanes);
    __syncthreads();
    if (threadIdx.x > 0) return;
    unsigned long long entries = 0, visible = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) entries += sums[w], visible += seen_in[w];
    if (visible) {
        atomicAdd(&totals->entries, entries);
        atomicAdd(&totals->visible, visible);
    }
}

}  // namespace gs::cuda
