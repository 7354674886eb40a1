// Alpha blending, CUDA backend: every pixel takes the splats of its tile front to back. See blend.h for the mapping.
#include "blend.h"

namespace gs::cuda {
namespace {

// As the threshold of a pixel that is done: beyond reach, and the bits above tell at which entry. Room for 2^28 and more.
constexpr uint32_t kDoneAt = 0x60000000;

template <bool kInvDepthWanted>
struct PixelState {
    float threshold;  // for log2(alpha)
    float transmittance = 1.f;
    float r = 0.f, g = 0.f, b = 0.f, inv_depth = 0.f;

    __device__ void begin(bool inside) { threshold = inside ? kLog2AlphaMin : INFINITY; }

    __device__ bool done() const { return threshold > 0.f; }

    // A pixel is done when a splat would leave less than kStopAt of the light: that one is not taken, nor any behind it.
    __device__ __forceinline__ void take(uint32_t done_at, float e, float log2_opacity, float4 look) {
        const bool reached = e >= threshold;
        const float alpha = fminf(uncapped_alpha(e, log2_opacity), float(kAlphaMax));
        const float weight = __fmul_rn(alpha, transmittance), next = __fmaf_rn(-alpha, transmittance, transmittance);
        const bool lit = reached && next >= float(kStopAt);
        if (reached && !lit) threshold = __uint_as_float(done_at);
        if (lit) {
            r = fmaf(weight, look.x, r);
            g = fmaf(weight, look.y, g);
            b = fmaf(weight, look.z, b);
            if (kInvDepthWanted) inv_depth = fmaf(weight, look.w, inv_depth);
            transmittance = next;
        }
    }

    // For the backward: what has been seen so far.
    __device__ __forceinline__ void store_passed(const Trace& trace, int64_t at) const {
        static_cast<float4*>(trace.passed)[at] = {transmittance, r, g, b};
        if (kInvDepthWanted && trace.passed_inv_depth) trace.passed_inv_depth[at] = inv_depth;
    }

    __device__ __forceinline__ void store(const BlendForward& p, int view, int column, int row,
                                          uint32_t entries) const {
        const int64_t plane = int64_t(p.grid.width) * p.grid.height;
        const int64_t pixel = view * plane + int64_t(row) * p.grid.width + column;
        float* const color = p.color + pixel + 2 * view * plane;
        color[0] = fmaf(transmittance, p.background[0], r);
        color[plane] = fmaf(transmittance, p.background[1], g);
        color[2 * plane] = fmaf(transmittance, p.background[2], b);
        if (p.alpha) p.alpha[pixel] = 1.f - transmittance;
        if (p.left) p.left[pixel] = transmittance;
        if (p.trace.taken) {
            p.trace.stop[pixel] = done() ? __float_as_uint(threshold) - kDoneAt : entries;
            p.trace.left[pixel] = transmittance;
        }
        if (kInvDepthWanted) p.inv_depth[pixel] = inv_depth;
    }
};

// A lane has one pixel or two. Two share work. But with few tiles a GPU has nothing else to do while a warp waits for a
// load: then more warps with less to do each, which load a splat while they blend the one before, are done sooner.
constexpr unsigned kFewTiles = 3000;

template <int kPixels>
constexpr int kThreads = kWarp * kStrips / kPixels;

// A splat in shared memory. 48 bytes from one to the next put eight of them into different banks.
struct Staged {
    float4 place;  // x, y, extent_x, extent_y
    float4 shape;  // xx, xy, yy, log2_opacity
    float4 look;   // r, g, b, inv_depth

    __device__ __forceinline__ void fetch(const Splat* splats, uint32_t id) {
        const float4* splat = reinterpret_cast<const float4*>(splats + id);
        copy_async16(&place, splat);
        copy_async16(&shape, splat + 1);
        copy_async16(&look, splat + 2);
    }
};

// What of it says how it fades.
struct Falloff {
    float2 mean;
    float4 shape;
    __device__ __forceinline__ explicit Falloff(const Staged& s)
        : mean(*reinterpret_cast<const float2*>(&s.place)), shape(s.shape) {}
};

template <bool kInvDepthWanted, int kPixels>
__global__ void __launch_bounds__(kThreads<kPixels>, 6 * kPixels) blend_forward_kernel(BlendForward p) {
    constexpr int kBatch = kThreads<kPixels>;
    __shared__ Staged batches[2][kBatch];
    const uint32_t tile = blockIdx.x, thread = threadIdx.x;
    const int strip = int(thread) / kWarp * kPixels;  // the first of this warp
    const Pixels<kPixels> pixels(p.grid, tile, strip);
    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[tile];
    PixelState<kInvDepthWanted> state[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) state[i].begin(pixels.inside[i]);

    // Two loads follow each other for every splat, its id and its data: ids are fetched one batch further ahead.
    if (range.x + thread < range.y) batches[0][thread].fetch(p.splats, p.ids[range.x + thread]);
    uint32_t next_id = range.x + kBatch + thread < range.y ? p.ids[range.x + kBatch + thread] : 0;

    bool done = false;
    int turn = 0;
    uint32_t walked = 0, begin = range.x;
    for (; begin < range.y; begin += kBatch, turn ^= 1) {
        copy_async_wait();
        // This batch has arrived, and nobody reads the other one any more.
        if (__syncthreads_and(done)) break;
        const uint32_t next = begin + kBatch;
        if (next + thread < range.y) batches[turn ^ 1][thread].fetch(p.splats, next_id);
        next_id = next + kBatch + thread < range.y ? p.ids[next + kBatch + thread] : 0;
        if (done) continue;

        const uint32_t segment = (begin - range.x) / kSegment;
        if (p.trace.passed && segment && (begin - range.x) % kSegment == 0) {
#pragma unroll
            for (int i = 0; i < kPixels; ++i)
                state[i].store_passed(p.trace, passed_at(p.trace, tile, range.x, segment, strip + i));
        }
        const Staged* const batch = batches[turn];
        const uint32_t count = ::min(range.y - begin, uint32_t(kBatch));
        for (uint32_t group = 0; group < count && !done; group += kWarp) {
            // The group's last entry is bit 0: the first one hit is then the highest bit, found in one instruction.
            const uint32_t done_at = kDoneAt + walked * kWarp + kWarp - 1;
            const Staged* const top = batch + group + kWarp - 1;
            const uint32_t asked = group + kWarp - 1 - lane_id();
            unsigned hits = __ballot_sync(kFullWarp, asked < count && overlap(batch[asked].place, pixels.box));
            unsigned taken[kPixels] = {};
            Falloff ahead(*(top - highest_bit(hits | 1)));
            while (hits) {
                const uint32_t bit_at = highest_bit(hits), bit = 1u << bit_at;
                const Staged& splat = *(top - bit_at);
                hits ^= bit;
                const Falloff own = kPixels == 1 ? ahead : Falloff(splat);
                if (kPixels == 1) ahead = Falloff(*(top - highest_bit(hits | 1)));
                const float4 shape = own.shape;
                const Exponents<kPixels> at(pixels, own.mean, shape);
#pragma unroll
                for (int i = 0; i < kPixels; ++i) {
                    if (!__any_sync(kFullWarp, at.e[i] >= state[i].threshold)) continue;
                    state[i].take(done_at - bit_at, at.e[i], shape.w, splat.look);
                    taken[i] |= bit;
                }
            }
            bool over = true;
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                if (p.trace.taken && lane_id() == 0)
                    p.trace.taken[taken_at(tile, range.x, walked, strip + i)] = __brev(taken[i]);
                over = over && state[i].done();
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
            if (p.trace.first) p.trace.first[tile] = uint32_t(first);
        }
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
        if (pixels.inside[i]) state[i].store(p, pixels.view, pixels.column, pixels.row + 4 * i, range.y - range.x);
}

Trace lay_out(char*& next, const TileGrid& grid, int64_t entries, bool inv_depth) {
    const int64_t passed = passed_count(entries);
    Trace t{};
    t.passed = take<float4>(next, passed);
    lay_out_walk(t, next, grid, entries);
    if (inv_depth) t.passed_inv_depth = take<float>(next, passed);
    return t;
}

Trace lay_out_sparing(char*& next, const TileGrid& grid, int64_t entries) {
    Trace t{};
    lay_out_walk(t, next, grid, entries);
    t.first = take<uint32_t>(next, grid.tiles());
    return t;
}

}  // namespace

size_t trace_bytes(const TileGrid& grid, int64_t entries, bool inv_depth) {
    char* next = nullptr;
    lay_out(next, grid, entries, inv_depth);
    return reinterpret_cast<size_t>(next);
}

Trace trace_in(void* memory, const TileGrid& grid, int64_t entries, bool inv_depth) {
    char* next = static_cast<char*>(memory);
    return lay_out(next, grid, entries, inv_depth);
}

size_t walk_bytes(const TileGrid& grid, int64_t entries) {
    char* next = nullptr;
    lay_out_sparing(next, grid, entries);
    return reinterpret_cast<size_t>(next);
}

Trace walk_in(void* memory, const TileGrid& grid, int64_t entries) {
    char* next = static_cast<char*>(memory);
    return lay_out_sparing(next, grid, entries);
}

size_t passed_bytes(int64_t segments) { return size_t(segments) * kStrips * kWarp * sizeof(float4); }

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
