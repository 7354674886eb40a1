// Alpha blending, CUDA backend: every pixel takes the splats of its tile front to back. See blend.h for the mapping.
#include "blend.h"

namespace gs::cuda {
namespace {

template <bool kInvDepthWanted>
struct PixelState {
    float threshold, transmittance = 1.f;
    float r = 0.f, g = 0.f, b = 0.f, inv_depth = 0.f;

    __device__ void begin(bool inside) { threshold = inside ? kLog2AlphaMin : kNever; }

    __device__ __forceinline__ void take(float e, float log2_opacity, float4 look) {
        const Contribution c = contribution(e, log2_opacity, transmittance, threshold);
        r = fmaf(c.weight, look.x, r);
        g = fmaf(c.weight, look.y, g);
        b = fmaf(c.weight, look.z, b);
        if (kInvDepthWanted) inv_depth = fmaf(c.weight, look.w, inv_depth);
        transmittance = c.next;
    }

    // For the backward: what has been seen so far; no transmittance says that the pixel is done.
    __device__ __forceinline__ void store_passed(const Trace& trace, int64_t at) const {
        static_cast<float4*>(trace.passed)[at] = {threshold == kNever ? 0.f : transmittance, r, g, b};
        if (kInvDepthWanted && trace.passed_inv_depth) trace.passed_inv_depth[at] = inv_depth;
    }

    __device__ __forceinline__ void store(const BlendForward& p, int column, int row) const {
        const int64_t plane = int64_t(p.grid.width) * p.grid.height, pixel = int64_t(row) * p.grid.width + column;
        p.color[pixel] = fmaf(transmittance, p.background[0], r);
        p.color[pixel + plane] = fmaf(transmittance, p.background[1], g);
        p.color[pixel + 2 * plane] = fmaf(transmittance, p.background[2], b);
        p.alpha[pixel] = 1.f - transmittance;
        if (p.trace.left) p.trace.left[pixel] = transmittance;
        if (kInvDepthWanted) p.inv_depth[pixel] = inv_depth;
    }
};

// A lane has one pixel or two. Two share work. But with few tiles a GPU has nothing else to do while a warp waits for a
// load: then more warps with less to do each, which load a splat while they blend the one before, are done sooner.
constexpr unsigned kFewTiles = 3000;

template <int kPixels>
constexpr int kThreads = kWarp * kStrips / kPixels;

struct Falloff {
    float2 mean;
    float4 shape;
};

template <int kPixels>
struct Batch {
    static constexpr int kSize = kThreads<kPixels>;  // one splat per thread
    float4 place[kSize];                             // x, y, extent_x, extent_y
    float4 shape[kSize];                             // xx, xy, yy, log2_opacity
    float4 look[kSize];                              // r, g, b, inv_depth

    __device__ __forceinline__ void fetch(const Splat* splats, uint32_t id) {
        const float4* splat = reinterpret_cast<const float4*>(splats + id);
        copy_async16(&place[threadIdx.x], splat);
        copy_async16(&shape[threadIdx.x], splat + 1);
        copy_async16(&look[threadIdx.x], splat + 2);
    }
    __device__ __forceinline__ Falloff falloff(uint32_t k) const {
        return {*reinterpret_cast<const float2*>(&place[k]), shape[k]};
    }
};

__device__ __forceinline__ bool overlap(float4 place, const Box<float>& box) {
    return place.x + place.z >= box.x0 && place.x - place.z <= box.x1 && place.y + place.w >= box.y0 &&
           place.y - place.w <= box.y1;
}

template <bool kInvDepthWanted, int kPixels>
__global__ void __launch_bounds__(kThreads<kPixels>, 6 * kPixels) blend_forward_kernel(BlendForward p) {
    constexpr int kBatch = Batch<kPixels>::kSize;
    __shared__ Batch<kPixels> batches[2];
    const uint32_t tile = blockIdx.x, thread = threadIdx.x;
    const int strip = int(thread) / kWarp * kPixels;  // the first of this warp
    const Pixels<kPixels> pixels(p.grid, tile, strip);
    PixelState<kInvDepthWanted> state[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) state[i].begin(pixels.inside[i]);

    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[tile];
    // Two loads follow each other for every splat, its id and its data: ids are fetched one batch further ahead.
    if (range.x + thread < range.y) batches[0].fetch(p.splats, p.ids[range.x + thread]);
    uint32_t next_id = range.x + kBatch + thread < range.y ? p.ids[range.x + kBatch + thread] : 0;

    bool done = false;
    int turn = 0;
    uint32_t walked = 0, begin = range.x;
    for (; begin < range.y; begin += kBatch, turn ^= 1) {
        copy_async_wait();
        // This batch has arrived, and nobody reads the other one any more.
        if (__syncthreads_and(done)) break;
        const uint32_t next = begin + kBatch;
        if (next + thread < range.y) batches[turn ^ 1].fetch(p.splats, next_id);
        next_id = next + kBatch + thread < range.y ? p.ids[next + kBatch + thread] : 0;
        if (done) continue;

        const uint32_t segment = (begin - range.x) / kSegment;
        if (p.trace.taken && segment && (begin - range.x) % kSegment == 0) {
#pragma unroll
            for (int i = 0; i < kPixels; ++i) state[i].store_passed(p.trace, passed_at(range.x, segment, strip + i));
        }
        const Batch<kPixels>& batch = batches[turn];
        const uint32_t count = ::min(range.y - begin, uint32_t(kBatch));
        for (uint32_t group = 0; group < count && !done; group += kWarp) {
            const bool hit = group + lane_id() < count && overlap(batch.place[group + lane_id()], pixels.box);
            unsigned hits = __ballot_sync(kFullWarp, hit), taken[kPixels] = {};
            const auto load_first = [&] { return batch.falloff(group + (hits ? __ffs(hits) - 1 : 0)); };
            Falloff ahead = load_first();
            while (hits) {
                const unsigned bit = hits & (0u - hits);
                const uint32_t k = group + __ffs(bit) - 1;
                const Falloff own = kPixels == 1 ? ahead : batch.falloff(k);
                hits ^= bit;
                if (kPixels == 1) ahead = load_first();
                const float4 shape = own.shape;
                const Exponents<kPixels> at(pixels, own.mean, shape);
#pragma unroll
                for (int i = 0; i < kPixels; ++i) {
                    if (!__any_sync(kFullWarp, at.e[i] >= state[i].threshold)) continue;
                    state[i].take(at.e[i], shape.w, batch.look[k]);
                    taken[i] |= bit;
                }
            }
            bool over = true;
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                if (p.trace.taken && lane_id() == 0)
                    p.trace.taken[taken_at(tile, range.x, walked, strip + i)] = taken[i];
                over = over && state[i].threshold == kNever;
            }
            ++walked;
            __syncwarp();
            done = __all_sync(kFullWarp, over);
        }
    }

    if (p.trace.taken) {
        if (lane_id() < kPixels) p.trace.walked[tile * kStrips + strip + lane_id()] = walked;
        const uint32_t segments = (::min(begin, range.y) - range.x + kSegment - 1) / kSegment;
        if (thread == 0 && segments) {
            const uint64_t first = atomicAdd(&p.totals->segments, static_cast<unsigned long long>(segments));
            for (uint32_t s = 0; s < segments; ++s) reinterpret_cast<uint2*>(p.trace.segments)[first + s] = {tile, s};
        }
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
        if (pixels.inside[i]) state[i].store(p, pixels.column, pixels.row + 4 * i);
}

template <typename T>
T* take(char*& next, int64_t count) {
    T* const begin = reinterpret_cast<T*>(next);
    next += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return begin;
}

Trace lay_out(char*& next, const TileGrid& grid, int64_t entries, bool full) {
    const int64_t passed = (entries / kSegment + 1) * kStrips * kWarp;
    Trace t{};
    t.passed = take<float4>(next, passed);
    t.taken = take<uint32_t>(next, (entries / kWarp + grid.tiles()) * kStrips);
    t.walked = take<uint32_t>(next, int64_t(grid.tiles()) * kStrips);
    t.segments = take<uint32_t>(next, 2 * max_segments(grid, entries));
    if (full) {
        t.passed_inv_depth = take<float>(next, passed);
        t.left = take<float>(next, int64_t(grid.width) * grid.height);
    }
    return t;
}

}  // namespace

size_t trace_bytes(const TileGrid& grid, int64_t entries, bool full) {
    char* next = nullptr;
    lay_out(next, grid, entries, full);
    return reinterpret_cast<size_t>(next);
}

Trace trace_in(void* memory, const TileGrid& grid, int64_t entries, bool full) {
    char* next = static_cast<char*>(memory);
    return lay_out(next, grid, entries, full);
}

void blend_forward(const BlendForward& args, Stream stream) {
    const unsigned tiles = unsigned(args.grid.tiles());
    const auto launch = [&](auto kernel, int threads) { kernel<<<tiles, threads, 0, native(stream)>>>(args); };
    if (tiles < kFewTiles)
        launch(args.inv_depth ? blend_forward_kernel<true, 1> : blend_forward_kernel<false, 1>, kThreads<1>);
    else
        launch(args.inv_depth ? blend_forward_kernel<true, 2> : blend_forward_kernel<false, 2>, kThreads<2>);
    check_launch("blend_forward_kernel");
}

}  // namespace gs::cuda
