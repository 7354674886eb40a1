// blend.h: what blending forward and backward share: how pixels map to threads, how splats reach shared memory, and the
// very same arithmetic, so that the backward meets exactly the transmittances that the forward met.
//
// One block per 16x16 tile, four warps; a warp owns 8x8 pixels, a lane the two pixels (x, y) and (x, y + 4). The tile's
// entries pass through shared memory in batches. Of 32 staged splats, each lane asks whether one can reach its warp's
// pixels at all; the warp then visits only those that can.
//
// The forward leaves a record: for every warp and 32 entries, which of them some pixel of the warp's upper or lower half
// took. The backward visits those, and asks nothing again.
#pragma once
#include "../common/tiles.h"
#include "device.h"

namespace gs::cuda {

constexpr int kBlendThreads = 128;
constexpr int kBatch = kBlendThreads;  // splats staged at a time, one per thread
constexpr int kGroups = kBatch / kWarp;
constexpr int kWarpPixels = 8;         // a warp's square is 8x8
constexpr float kNever = INFINITY;     // as `threshold`: this pixel takes no more splats

struct Batch {
    float4 place[kBatch];  // x, y, extent_x, extent_y; or x, y, id
    float4 shape[kBatch];  // xx, xy, yy, log2_opacity
    float4 look[kBatch];   // r, g, b, inv_depth
};

struct Pixels {
    int column, row;           // of the first pixel; the second is 4 rows below
    float x, y0, y1;           // their centers
    bool inside0, inside1;
    Box<float> box;            // the warp's pixels within the image, from center to center; may be empty
};

__device__ __forceinline__ Pixels own_pixels(const TileGrid& grid) {
    const int warp = threadIdx.x / kWarp, lane = lane_id();
    const int left = int(blockIdx.x) % grid.tiles_x * kTileSize + (warp & 1) * kWarpPixels;
    const int top = int(blockIdx.x) / grid.tiles_x * kTileSize + (warp >> 1) * kWarpPixels;
    Pixels p;
    p.column = left + (lane & 7);
    p.row = top + (lane >> 3);
    p.x = float(p.column) + 0.5f;
    p.y0 = float(p.row) + 0.5f;
    p.y1 = p.y0 + 4.f;
    p.inside0 = p.column < grid.width && p.row < grid.height;
    p.inside1 = p.column < grid.width && p.row + 4 < grid.height;
    p.box = {float(left) + 0.5f, float(top) + 0.5f, float(::min(left + kWarpPixels, grid.width)) - 0.5f,
             float(::min(top + kWarpPixels, grid.height)) - 0.5f};
    return p;
}

enum class Place { kExtent, kId };  // what follows x and y in a batch

template <Place kPlace>
__device__ __forceinline__ void stage(Batch& batch, const Splat* splats, uint32_t id) {
    const float4* splat = reinterpret_cast<const float4*>(splats + id);
    if (kPlace == Place::kExtent) {
        copy_async16(&batch.place[threadIdx.x], splat);
    } else {
        copy_async8(&batch.place[threadIdx.x], splat);
        batch.place[threadIdx.x].z = __uint_as_float(id);
    }
    copy_async16(&batch.shape[threadIdx.x], splat + 1);
    copy_async16(&batch.look[threadIdx.x], splat + 2);
}

// log2(alpha) of a splat at the two pixels of a lane. They share a column, hence all terms in dx.
struct Exponents { float dx, dy0, dy1, e0, e1; };

__device__ __forceinline__ Exponents exponents(const Pixels& p, float2 mean, float4 shape) {
    Exponents e;
    e.dx = __fsub_rn(p.x, mean.x);
    e.dy0 = __fsub_rn(p.y0, mean.y);
    e.dy1 = __fsub_rn(p.y1, mean.y);
    const float constant = __fmaf_rn(__fmul_rn(shape.x, e.dx), e.dx, shape.w);
    const float linear = __fmul_rn(shape.y, e.dx);
    e.e0 = __fmaf_rn(e.dy0, __fmaf_rn(shape.z, e.dy0, linear), constant);
    e.e1 = __fmaf_rn(e.dy1, __fmaf_rn(shape.z, e.dy1, linear), constant);
    return e;
}

// Where the record of 32 entries of this block's tile is, for the calling warp. The first numbers of a record are for
// the number of such groups that each warp has walked.
static_assert(kBlendThreads / kWarp == kBlendWarps);

__device__ __forceinline__ int64_t walked_at() { return int64_t(blockIdx.x) * kBlendWarps + threadIdx.x / kWarp; }

__device__ __forceinline__ int64_t record_at(const TileGrid& grid, uint32_t begin, uint32_t group) {
    // Tiles share no group of 32, so each may begin one more than its predecessors' entries would fill.
    const int64_t first = int64_t(begin) / kWarp + blockIdx.x + int64_t(grid.tiles_x) * grid.tiles_y;
    return (first + group) * kBlendWarps + threadIdx.x / kWarp;
}

// One pixel's opinion of one splat. Everything is zero where the pixel does not take it: it is too faint there, or the
// pixel is done. A pixel is done (threshold = kNever) when this splat would leave less than kStopAt of the light.
struct Contribution {
    float alpha_free;  // opacity times falloff, before the cap
    float alpha;
    float weight;      // alpha times the transmittance in front
    float next;        // the transmittance behind
};

__device__ __forceinline__ Contribution contribution(float e, float log2_opacity, float transmittance,
                                                     float& threshold) {
    Contribution c;
    // A falloff above one is rounding, in splats thousands of times longer than wide: taken as one.
    c.alpha_free = e >= threshold ? exp2_fast(fminf(e, log2_opacity)) : 0.f;
    c.alpha = fminf(c.alpha_free, float(kAlphaMax));
    c.next = __fmaf_rn(-c.alpha, transmittance, transmittance);
    if (c.next < float(kStopAt)) {
        threshold = kNever;
        c.alpha = c.alpha_free = 0.f;
        c.next = transmittance;
    }
    c.weight = __fmul_rn(c.alpha, transmittance);
    return c;
}

}  // namespace gs::cuda
