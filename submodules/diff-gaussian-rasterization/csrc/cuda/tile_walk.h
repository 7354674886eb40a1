// tile_walk.h: visits the tiles a splat belongs to. Used by preprocess to count them and by emit to write them.
//
// Most splats touch a few tiles, and their own lane tests those. A splat with a large rectangle would keep 31 lanes
// waiting, so its rectangle is tested by the whole warp, 32 tiles at a time.
#pragma once
#include "../common/tiles.h"
#include "device.h"

namespace gs::cuda {

constexpr int kTilesPerLane = 8;  // larger rectangles are walked by the warp

struct Footprint {
    Vec2<float> mean;
    Sym2<float> conic;  // in units of log2(alpha), as `reach`
    float reach;
    TileRect rect;
};

__device__ __forceinline__ Footprint footprint(float4 place, float4 shape, float radius, const TileGrid& grid) {
    Footprint f;
    f.mean = {place.x, place.y};
    f.conic = {-2.f * shape.x, -shape.y, -2.f * shape.z};
    f.reach = shape.w - kLog2AlphaMin;
    f.rect = tile_rect(f.mean, radius, grid.tiles_x, grid.tiles_y);
    return f;
}

__device__ __forceinline__ bool touches(const Footprint& f, int tile_x, int tile_y, const TileGrid& grid) {
    return reaches(f.mean, f.conic, f.reach, tile_box<float>(tile_x, tile_y, grid.width, grid.height));
}

__device__ __forceinline__ Footprint broadcast(const Footprint& f, int lane) {
    const auto get = [lane](auto v) { return __shfl_sync(kFullWarp, v, lane); };
    return {{get(f.mean.x), get(f.mean.y)},
            {get(f.conic.xx), get(f.conic.xy), get(f.conic.yy)},
            get(f.reach),
            {get(f.rect.x0), get(f.rect.y0), get(f.rect.x1), get(f.rect.y1)}};
}

// Calls visit(tag, nth, tile) for every tile of this lane's splat, nth = 0, 1, ...; returns how many there were.
// All 32 lanes must call; the visits of a large splat are made by other lanes, with the owner's tag.
template <typename Visit>
__device__ __forceinline__ uint32_t walk_tiles(bool active, const Footprint& own, uint32_t tag, const TileGrid& grid,
                                               Visit visit) {
    const int area = active && !empty(own.rect) ? (own.rect.x1 - own.rect.x0) * (own.rect.y1 - own.rect.y0) : 0;
    uint32_t found = 0;
    if (area > 0 && area <= kTilesPerLane) {
        for (int y = own.rect.y0; y < own.rect.y1; ++y)
            for (int x = own.rect.x0; x < own.rect.x1; ++x)
                if (touches(own, x, y, grid)) visit(tag, found++, y * grid.tiles_x + x);
    }

    unsigned large = __ballot_sync(kFullWarp, area > kTilesPerLane);
    while (large) {
        const int owner = __ffs(large) - 1;
        large &= large - 1;
        const Footprint f = broadcast(own, owner);
        const uint32_t owner_tag = __shfl_sync(kFullWarp, tag, owner);
        const int columns = f.rect.x1 - f.rect.x0, tiles = columns * (f.rect.y1 - f.rect.y0);
        uint32_t count = 0;
        for (int first = 0; first < tiles; first += kWarp) {
            const int i = first + lane_id();
            const int x = f.rect.x0 + i % columns, y = f.rect.y0 + i / columns;
            const bool hit = i < tiles && touches(f, x, y, grid);
            const unsigned hits = __ballot_sync(kFullWarp, hit);
            if (hit) visit(owner_tag, count + __popc(hits & lanes_below()), y * grid.tiles_x + x);
            count += __popc(hits);
        }
        if (lane_id() == owner) found = count;
    }
    return found;
}

}  // namespace gs::cuda
