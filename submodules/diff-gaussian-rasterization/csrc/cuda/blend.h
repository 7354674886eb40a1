// blend.h: what blending forward and backward share: how pixels map to threads, and the very same arithmetic up to alpha,
// so that both agree on what a pixel takes.
//
// A 16x16 tile is eight strips of 8x4 pixels, one pixel a lane; two strips above each other are a square. The forward
// gives a strip or a square to each of its warps. The tile's entries pass through shared memory in batches; of 32 staged
// splats, each lane asks whether one can reach its warp's pixels at all, and the warp visits only those that can.
//
// The forward leaves a trace. For every pixel: how far it went, and the transmittance there. For every strip and 32
// entries: which of them some pixel of the strip took. For every segment of 256 entries: what each pixel had seen when it
// began. So the backward can walk all segments of all tiles at the same time, a block each, and visits only what was
// taken: lists of very different length, and pictures of few tiles, keep the whole GPU busy.
#pragma once
#include "../common/tiles.h"
#include "device.h"

namespace gs::cuda {

constexpr int kGroups = kSegment / kWarp;  // of 32 entries, in a segment

// The pixels of a lane: one of a strip, or two, four rows apart, of a square.
template <int kPixels>
struct Pixels {
    int view;
    int column, row;       // of the first
    float x, y;            // its center
    bool inside[kPixels];  // the image
    Box<float> box;        // the warp's pixels within the image, from center to center; may be empty

    __device__ Pixels(const TileGrid& grid, uint32_t tile, int strip) {
        const int left = int(tile) % grid.tiles_x * kTileSize + (strip >> 1 & 1) * 8;
        const int tile_row = int(tile) / grid.tiles_x;  // of all views
        view = tile_row / grid.tiles_y;
        const int top = (tile_row - view * grid.tiles_y) * kTileSize + (strip >> 2) * 8 + (strip & 1) * 4;
        column = left + (lane_id() & 7);
        row = top + (lane_id() >> 3);
        x = float(column) + 0.5f;
        y = float(row) + 0.5f;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) inside[i] = column < grid.width && row + 4 * i < grid.height;
        box = {float(left) + 0.5f, float(top) + 0.5f, float(::min(left + 8, grid.width)) - 0.5f,
               float(::min(top + 4 * kPixels, grid.height)) - 0.5f};
    }
};

// log2(alpha) of a splat at the pixels of a lane. They share a column, hence all terms in dx.
template <int kPixels>
struct Exponents {
    float dx, dy[kPixels], e[kPixels];

    __device__ __forceinline__ Exponents(const Pixels<kPixels>& p, float2 mean, float4 shape) {
        dx = __fsub_rn(p.x, mean.x);
        const float constant = __fmaf_rn(__fmul_rn(shape.x, dx), dx, shape.w);
        const float linear = __fmul_rn(shape.y, dx);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            dy[i] = __fsub_rn(p.y + 4.f * i, mean.y);
            e[i] = __fmaf_rn(dy[i], __fmaf_rn(shape.z, dy[i], linear), constant);
        }
    }
};

// Tiles share no group of 32, so each may begin one more than its predecessors' entries would fill.
__device__ __forceinline__ int64_t taken_at(uint32_t tile, uint32_t begin, uint32_t group, int strip) {
    return (int64_t(begin) / kWarp + tile + group) * kStrips + strip;
}

// The first segment of a tile has seen nothing. The others begin in different multiples of 256.
__device__ __forceinline__ int64_t passed_at(uint32_t begin, uint32_t segment, int strip) {
    return ((int64_t(begin) / kSegment + segment) * kStrips + strip) * kWarp + lane_id();
}

// The same where only what is walked has room.
__device__ __forceinline__ int64_t passed_at(const Trace& trace, uint32_t tile, uint32_t begin, uint32_t segment,
                                             int strip) {
    return passed_at(trace.first ? trace.first[tile] * kSegment : begin, segment, strip);
}

// Whether a splat can show in a box at all.
__device__ __forceinline__ bool overlap(float4 place, const Box<float>& box) {
    return place.x + place.z >= box.x0 && place.x - place.z <= box.x1 && place.y + place.w >= box.y0 &&
           place.y - place.w <= box.y1;
}

// Opacity times falloff, before the cap. A falloff above one is rounding, in splats thousands of times longer than wide:
// taken as one.
__device__ __forceinline__ float uncapped_alpha(float e, float log2_opacity) {
    return exp2_fast(fminf(e, log2_opacity));
}

// How many pixels leave what they had seen when a segment began: see passed_at.
inline int64_t passed_count(int64_t entries) { return (entries / kSegment + 1) * kStrips * kWarp; }

// The next array of a piece of memory, aligned to 16 bytes.
template <typename T>
T* take(char*& next, int64_t count) {
    T* const begin = reinterpret_cast<T*>(next);
    next += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return begin;
}

// Of a trace, what does not depend on the channels.
inline void lay_out_walk(Trace& t, char*& next, const TileGrid& grid, int64_t entries) {
    t.taken = take<uint32_t>(next, (entries / kWarp + grid.tiles()) * kStrips);
    t.walked = take<uint32_t>(next, int64_t(grid.tiles()) * kStrips);
    t.segments = take<uint32_t>(next, 2 * max_segments(grid, entries));
    t.stop = take<uint32_t>(next, grid.pixels());
    t.left = take<float>(next, grid.pixels());
}

}  // namespace gs::cuda
