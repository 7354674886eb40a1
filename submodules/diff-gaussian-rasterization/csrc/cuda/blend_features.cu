// Blending of any number of channels by the very rule of blend_forward.cu, and back. CUDA backend. See blend.h.
//
// A block takes a tile and up to 16 channels; where there are more, several blocks walk the tile. What the first of them
// leaves in the trace serves all: alpha and transmittance do not depend on the channels. Backward, a block takes a segment
// of a tile's list and again up to 16 channels. The derivative is linear in the channels, so their shares add up.
#include "blend.h"
#include "records.h"
#include "visits.h"
#include "walk.h"
#include "warp_reduce.h"

namespace gs::cuda {
namespace {

constexpr uint32_t kDoneAt = 0x60000000;  // as in blend_forward.cu

// ---- forward -------------------------------------------------------------------------------------------------------

constexpr int kThreads = kWarp * kStrips, kBatch = 128;

template <int kQuads>
struct Batch {
    float4 place[kBatch], shape[kBatch], look[kBatch][kQuads];
};

// Starts to copy a batch: every thread some quarters of cache lines.
template <int kQuads>
__device__ __forceinline__ void fetch(const BlendFeatures& p, Batch<kQuads>& batch, uint32_t begin, uint32_t end) {
    constexpr int kParts = kQuads + 2;
#pragma unroll
    for (int first = 0; first < kBatch * kParts; first += kThreads) {
        const uint32_t part = first + threadIdx.x, entry = part / kParts, k = part % kParts;
        if (part >= kBatch * kParts || begin + entry >= end) continue;
        const uint32_t id = p.ids[begin + entry];
        const float4* splat = reinterpret_cast<const float4*>(p.splats + id);
        const float4* row = reinterpret_cast<const float4*>(p.features + int64_t(id) * p.stride) + blockIdx.y * kQuads;
        if (k == 0)
            copy_async16(&batch.place[entry], splat);
        else if (k == 1)
            copy_async16(&batch.shape[entry], splat + 1);
        else
            copy_async16(&batch.look[entry][k - 2], row + k - 2);
    }
}

template <int kQuads>
struct FeaturePixel {
    float threshold, transmittance = 1.f;
    float4 sum[kQuads] = {};

    __device__ bool done() const { return threshold > 0.f; }

    __device__ __forceinline__ void take(uint32_t done_at, float e, float log2_opacity, const float4* look) {
        const bool reached = e >= threshold;
        const float alpha = fminf(uncapped_alpha(e, log2_opacity), float(kAlphaMax));
        const float weight = __fmul_rn(alpha, transmittance), next = __fmaf_rn(-alpha, transmittance, transmittance);
        const bool lit = reached && next >= float(kStopAt);
        if (reached && !lit) threshold = __uint_as_float(done_at);
        if (!lit) return;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const float4 f = look[q];
            sum[q].x = fmaf(weight, f.x, sum[q].x), sum[q].y = fmaf(weight, f.y, sum[q].y);
            sum[q].z = fmaf(weight, f.z, sum[q].z), sum[q].w = fmaf(weight, f.w, sum[q].w);
        }
        transmittance = next;
    }

    __device__ __forceinline__ void store_passed(const BlendFeatures& p, int64_t at) const {
        if (blockIdx.y == 0) p.trace.passed_light[at] = transmittance;
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
            static_cast<float4*>(p.trace.passed)[(blockIdx.y * kQuads + q) * p.trace.passed_count + at] = sum[q];
    }

    __device__ __forceinline__ void store(const BlendFeatures& p, int column, int row, uint32_t entries) const {
        const int64_t plane = int64_t(p.grid.width) * p.grid.height, pixel = int64_t(row) * p.grid.width + column;
        const float* numbers = &sum[0].x;
        const int first = int(blockIdx.y) * 4 * kQuads;
#pragma unroll
        for (int c = 0; c < 4 * kQuads; ++c)
            if (first + c < p.channels) p.image[(first + c) * plane + pixel] = numbers[c];
        if (blockIdx.y > 0) return;
        p.left[pixel] = transmittance;
        if (!p.trace.common.taken) return;
        p.trace.common.stop[pixel] = done() ? __float_as_uint(threshold) - kDoneAt : entries;
        p.trace.common.left[pixel] = transmittance;
    }
};

template <int kQuads>
__global__ void __launch_bounds__(kThreads) blend_features_kernel(BlendFeatures p) {
    __shared__ Batch<kQuads> batches[2];
    const uint32_t tile = blockIdx.x;
    const int strip = int(threadIdx.x) / kWarp;
    const bool traces = p.trace.common.taken, leads = traces && blockIdx.y == 0;
    const Pixels<1> pixels(p.grid, tile, strip);
    const float2 target = target_of(p.offset, p.grid, pixels.column, pixels.row);
    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[tile];
    FeaturePixel<kQuads> state;
    state.threshold = pixels.inside[0] ? kLog2AlphaMin : INFINITY;

    fetch(p, batches[0], range.x, range.y);
    bool done = false;
    int turn = 0;
    uint32_t walked = 0, begin = range.x;
    for (; begin < range.y; begin += kBatch, turn ^= 1) {
        copy_async_wait();
        if (__syncthreads_and(done)) break;  // the batch has arrived, and nobody reads the other one any more
        fetch(p, batches[turn ^ 1], begin + kBatch, range.y);
        if (done) continue;
        const uint32_t segment = (begin - range.x) / kSegment;
        if (traces && segment && (begin - range.x) % kSegment == 0)
            state.store_passed(p, passed_at(range.x, segment, strip));
        const Batch<kQuads>& batch = batches[turn];
        const uint32_t count = ::min(range.y - begin, uint32_t(kBatch));
        for (uint32_t group = 0; group < count && !done; group += kWarp) {
            const uint32_t asked = group + lane_id(), done_at = kDoneAt + walked * kWarp;
            unsigned hits = __ballot_sync(kFullWarp, asked < count && overlap(batch.place[asked], pixels.box));
            unsigned taken = 0;
            while (hits) {
                const int bit = __ffs(hits) - 1, entry = int(group) + bit;
                hits &= hits - 1;
                const float4 shape = batch.shape[entry];
                const float e = exponent(__fsub_rn(target.x, batch.place[entry].x),
                                         __fsub_rn(target.y, batch.place[entry].y), shape);
                if (!__any_sync(kFullWarp, e >= state.threshold)) continue;
                state.take(done_at + bit, e, shape.w, batch.look[entry]);
                taken |= 1u << bit;
            }
            if (leads && lane_id() == 0) p.trace.common.taken[taken_at(tile, range.x, walked, strip)] = taken;
            ++walked;
            done = __all_sync(kFullWarp, state.done());
        }
    }
    if (leads) {
        if (lane_id() == 0) p.trace.common.walked[tile * kStrips + strip] = walked;
        const uint32_t segments = (::min(begin, range.y) - range.x + kSegment - 1) / kSegment;
        if (threadIdx.x == 0 && segments) {
            const uint64_t first = atomicAdd(&p.totals->segments, static_cast<unsigned long long>(segments));
            for (uint32_t s = 0; s < segments; ++s)
                reinterpret_cast<uint2*>(p.trace.common.segments)[first + s] = {tile, s};
        }
    }
    if (pixels.inside[0]) state.store(p, pixels.column, pixels.row, range.y - range.x);
}

// ---- backward ------------------------------------------------------------------------------------------------------

constexpr int kPixels = 2, kBackThreads = kWarp * kStrips / kPixels;
constexpr int kMoments = 6;
constexpr uint32_t kOrderUnit = 1 << kPixels;  // as in blend_backward.cu

template <int kQuads>
struct FeatureGradPixel {
    static constexpr int kChannels = 4 * kQuads;
    uint32_t stop = 0;
    float transmittance = 0.f, behind = 0.f;
    float g[kChannels] = {};
    float2 target;

    __device__ __forceinline__ void begin(const BlendFeaturesBackward& p, int portion, int column, int row,
                                          uint32_t segment, int64_t next_passed) {
        const BlendFeatures& f = p.forward;
        const int64_t plane = int64_t(f.grid.width) * f.grid.height, pixel = int64_t(row) * f.grid.width + column;
        const uint32_t first = segment * kSegment, stopped = f.trace.common.stop[pixel];
        if (stopped <= first) return;  // before this segment
        stop = ::min(stopped - first, uint32_t(kSegment)) * kOrderUnit;
        const int channel = portion * kChannels;
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
            g[c] = p.g_image && channel + c < f.channels ? p.g_image[(channel + c) * plane + pixel] : 0.f;
        // The light that passes is a channel of its own, which is one behind all splats; it belongs to the first portion.
        const float g_left = p.g_left && portion == 0 ? p.g_left[pixel] : 0.f, left = f.trace.common.left[pixel];
        if (stopped - first <= kSegment) {
            transmittance = left;
            behind = g_left;
            return;
        }
        transmittance = f.trace.passed_light[next_passed];
        behind = left * g_left;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const float4 passed =
                static_cast<const float4*>(f.trace.passed)[(portion * kQuads + q) * f.trace.passed_count + next_passed];
            const float so_far[4] = {passed.x, passed.y, passed.z, passed.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int c = 4 * q + k;
                if (channel + c < f.channels)
                    behind = fmaf(f.image[(channel + c) * plane + pixel] - so_far[k], g[c], behind);
            }
        }
        behind /= transmittance;
    }

    // As PixelState::pass of blend_backward.cu.
    __device__ __forceinline__ float pass(uint32_t order, float e, float log2_opacity, const float4* look, float& out) {
        const float alpha_free = e >= kLog2AlphaMin && order < stop ? uncapped_alpha(e, log2_opacity) : 0.f;
        const float alpha = fminf(alpha_free, float(kAlphaMax));
        float share = 0.f;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const float4 f = look[q];
            share =
                fmaf(f.x, g[4 * q], fmaf(f.y, g[4 * q + 1], fmaf(f.z, g[4 * q + 2], fmaf(f.w, g[4 * q + 3], share))));
        }
        const float stands_out = share - behind;
        transmittance *= reciprocal_fast(1.f - alpha);
        behind = fmaf(alpha, stands_out, behind);
        out = alpha_free * transmittance * stands_out;
        return alpha * transmittance;
    }
};

// 32 splats of a warp, twice: one set is read while the other arrives.
template <int kQuads>
struct Visited {
    float4 place[2][kWarp], shape[2][kWarp], look[2][kWarp][kQuads];
    uint32_t target[2][kWarp], order[2][kWarp];  // target: whose record or row its gradient goes to

    // The n-th of those taken, counted from the segment's last, into the lane's place.
    __device__ __forceinline__ void fetch(const BlendFeaturesBackward& back, int portion, const Visits& visits,
                                          uint32_t first_entry, int turn, uint32_t n) {
        const BlendFeatures& p = back.forward;
        uint32_t by = 0;
        const uint32_t at = visits.nth(visits.total - 1 - ::min(n, visits.total - 1), by);
        const uint32_t own = p.ids[first_entry + at];
        const int lane = lane_id();
        const float4* splat = reinterpret_cast<const float4*>(p.splats + own);
        const float4* row = reinterpret_cast<const float4*>(p.features + int64_t(own) * p.stride) + portion * kQuads;
        copy_async16(&place[turn][lane], splat);
        copy_async16(&shape[turn][lane], splat + 1);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) copy_async16(&look[turn][lane][q], row + q);
        target[turn][lane] = back.ordered.pairs ? back.ordered.pairs[first_entry + at] : own;
        order[turn][lane] = at * kOrderUnit + by;
    }
};

// Where the sum with this number goes: a moment of a splat or, from kMoments on, a channel of its features' gradient.
struct Slot {
    float* base;
    int64_t stride;
    bool exists;

    __device__ __forceinline__ Slot(const BlendFeaturesBackward& p, int channels, int portion, int number) {
        const int channel = portion * channels + number - kMoments;
        const bool feature = number >= kMoments && number < kMoments + channels;
        base = feature ? p.g_features + channel : p.moments + (number < kMoments ? number : number - channels);
        stride = feature ? p.forward.stride : kMomentCount;
        exists = !feature || channel < p.forward.channels;
    }
};

// Where a lane leaves the sum that ends up with it.
struct LaneSlot {
    float* base;
    int64_t stride;
    bool writes, adds;

    template <int kChannels, int kValues>
    __device__ __forceinline__ static LaneSlot of(const BlendFeaturesBackward& p, int portion, int strip) {
        const int number = transpose_slot<kValues>(lane_id());
        const Slot slot(p, kChannels, portion, number);
        const bool writes = first_with_slot(number, lane_id()) && slot.exists;
        if (!p.ordered.pairs) return {slot.base, slot.stride, writes, true};
        return {p.ordered.records + strip / kPixels * kValues + number, kRecords * kValues, writes, false};
    }

    __device__ __forceinline__ void leave(uint32_t target, float sum) const {
        if (!writes) return;
        float* const at = base + int64_t(target) * stride;
        adds ? void(atomicAdd(at, sum)) : void(*at = sum);
    }
};

template <int kQuads, bool kAbsolute>
__global__ void __launch_bounds__(kBackThreads) blend_features_backward_kernel(BlendFeaturesBackward p) {
    constexpr int kChannels = 4 * kQuads, kAbsAt = kMoments + kChannels, kValues = kAbsAt + (kAbsolute ? 2 : 0);
    __shared__ Visited<kQuads> of_warp[kBackThreads / kWarp];
    const BlendFeatures& f = p.forward;
    if (blockIdx.x >= f.totals->segments) return;
    const uint2 task = reinterpret_cast<const uint2*>(f.trace.common.segments)[blockIdx.x];
    const uint32_t tile = task.x, segment = task.y, begin = f.ranges[2 * int64_t(tile)];
    const int warp = int(threadIdx.x) / kWarp, strip = warp * kPixels, lane = lane_id();
    const int portion = p.portion + int(blockIdx.y);
    const Visits visits(f.trace.common, tile, begin, segment, strip);
    if (visits.total == 0) return;
    Visited<kQuads>& visited = of_warp[warp];

    const Pixels<kPixels> pixels(f.grid, tile, strip);
    FeatureGradPixel<kQuads> state[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        state[i].target = target_of(f.offset, f.grid, pixels.column, pixels.row + 4 * i);
        if (__any_sync(kFullWarp, visits.strips[i] != 0) && pixels.inside[i])
            state[i].begin(p, portion, pixels.column, pixels.row + 4 * i, segment,
                           passed_at(begin, segment + 1, strip + i));
    }
    const LaneSlot slot = LaneSlot::of<kChannels, kValues>(p, portion, strip);

    const uint32_t first_entry = begin + segment * kSegment;
    int turn = 0;
    visited.fetch(p, portion, visits, first_entry, turn, lane);
    for (uint32_t done = 0; done < visits.total; done += kWarp, turn ^= 1) {
        copy_async_wait();
        __syncwarp();
        if (done + kWarp < visits.total) visited.fetch(p, portion, visits, first_entry, turn ^ 1, done + kWarp + lane);
        const int count = int(::min(visits.total - done, uint32_t(kWarp)));
        for (int k = 0; k < count; ++k) {
            const float4 place = visited.place[turn][k], shape = visited.shape[turn][k];
            const uint32_t order = visited.order[turn][k];
            float g[kPixels] = {}, w[kPixels] = {}, dx[kPixels], dy[kPixels];
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                dx[i] = __fsub_rn(state[i].target.x, place.x), dy[i] = __fsub_rn(state[i].target.y, place.y);
                if (order & (1u << i))
                    w[i] = state[i].pass(order, exponent(dx[i], dy[i], shape), shape.w, visited.look[turn][k], g[i]);
            }
            float v[kValues];
            const float gx[kPixels] = {g[0] * dx[0], g[1] * dx[1]}, gy[kPixels] = {g[0] * dy[0], g[1] * dy[1]};
            v[0] = g[0] + g[1];
            v[1] = gx[0] + gx[1];
            v[2] = gy[0] + gy[1];
            v[3] = fmaf(gx[0], dx[0], gx[1] * dx[1]);
            v[4] = fmaf(gx[0], dy[0], gx[1] * dy[1]);
            v[5] = fmaf(gy[0], dy[0], gy[1] * dy[1]);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) v[kMoments + c] = fmaf(w[0], state[0].g[c], w[1] * state[1].g[c]);
            if constexpr (kAbsolute) {  // |gradient of the mean| per pixel, but for a factor of ln 2
                v[kAbsAt] =
                    fabsf(2.f * shape.x * gx[0] + shape.y * gy[0]) + fabsf(2.f * shape.x * gx[1] + shape.y * gy[1]);
                v[kAbsAt + 1] =
                    fabsf(2.f * shape.z * gy[0] + shape.y * gx[0]) + fabsf(2.f * shape.z * gy[1] + shape.y * gx[1]);
            }
            slot.leave(visited.target[turn][k], transpose_sum(v, lane));
        }
        __syncwarp();
    }
}

constexpr int kFinishThreads = 256;

// From sums over pixels to the gradients of what blending was given. `m`: the moments; absolute sums are at `abs_at`.
__device__ __forceinline__ void store_screen_grads(const OnScreen<float>& s, int64_t i, const float* m, int abs_at,
                                                   const OnScreenGrads<float>& out) {
    const float xx = s.conics[3 * i], xy = s.conics[3 * i + 1], yy = s.conics[3 * i + 2];
    // Zeros stay zeros, whatever the row of a splat holds that is not drawn.
    const bool any = m[0] != 0.f || m[1] != 0.f || m[2] != 0.f || m[3] != 0.f || m[5] != 0.f;
    out.means2d[2 * i] = any ? xx * m[1] + xy * m[2] : 0.f;
    out.means2d[2 * i + 1] = any ? xy * m[1] + yy * m[2] : 0.f;
    out.conics[3 * i] = -0.5f * m[3], out.conics[3 * i + 1] = -m[4], out.conics[3 * i + 2] = -0.5f * m[5];
    out.opacities[i] = s.opacities[i] > 0.f ? m[0] / s.opacities[i] : 0.f;
    if (out.absolute) out.absolute[2 * i] = kLn2 * m[abs_at], out.absolute[2 * i + 1] = kLn2 * m[abs_at + 1];
}

__global__ void __launch_bounds__(kFinishThreads)
    screen_grads_kernel(int64_t count, OnScreen<float> s, const float* moments, OnScreenGrads<float> out) {
    const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
    if (i < count) store_screen_grads(s, i, moments + i * kMomentCount, kMoments, out);
}

// From the sums of blend_backward.cu.
__global__ void __launch_bounds__(kFinishThreads)
    screen_grads_of_three_kernel(int64_t count, OnScreen<float> s, const float* grads, float* g_features,
                                 OnScreenGrads<float> out) {
    const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
    if (i >= count) return;
    const float* own = grads + i * kGradSize;
    store_screen_grads(s, i, own, kAbsX, out);
    for (int c = 0; c < 3; ++c) g_features[3 * i + c] = own[kRed + c];
}

FeatureTrace lay_out(char*& next, const TileGrid& grid, int64_t entries, int stride) {
    FeatureTrace t{};
    t.passed_count = passed_count(entries);
    t.passed = take<float4>(next, t.passed_count * (stride / 4));
    t.passed_light = take<float>(next, t.passed_count);
    lay_out_walk(t.common, next, grid, entries);
    return t;
}

}  // namespace

size_t feature_trace_bytes(const TileGrid& grid, int64_t entries, int stride) {
    char* next = nullptr;
    lay_out(next, grid, entries, stride);
    return reinterpret_cast<size_t>(next);
}

FeatureTrace feature_trace_in(void* memory, const TileGrid& grid, int64_t entries, int stride) {
    char* next = static_cast<char*>(memory);
    return lay_out(next, grid, entries, stride);
}

void blend_features(const BlendFeatures& args, Stream stream) {
    const int quads = feature_quads(args.channels);
    const dim3 blocks(unsigned(args.grid.tiles()), unsigned(args.stride / (4 * quads)));
    const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, native(stream)>>>(args); };
    quads == 1   ? launch(blend_features_kernel<1>)
    : quads == 2 ? launch(blend_features_kernel<2>)
                 : launch(blend_features_kernel<4>);
    check_launch("blend_features_kernel");
}

namespace {

// Some portions of channels.
void walk_back(const BlendFeaturesBackward& args, int portions, Stream stream) {
    const BlendFeatures& f = args.forward;
    const int quads = feature_quads(f.channels);
    const dim3 blocks(blocks_for(max_segments(f.grid, f.entries), 1), unsigned(portions));
    const auto launch = [&](auto kernel, auto absolute) {
        (args.out.absolute ? absolute : kernel)<<<blocks, kBackThreads, 0, native(stream)>>>(args);
        check_launch("blend_features_backward_kernel");
    };
    if (quads == 1)
        launch(blend_features_backward_kernel<1, false>, blend_features_backward_kernel<1, true>);
    else if (quads == 2)
        launch(blend_features_backward_kernel<2, false>, blend_features_backward_kernel<2, true>);
    else
        launch(blend_features_backward_kernel<4, false>, blend_features_backward_kernel<4, true>);
}

// One portion after the other, which share the memory for records.
void walk_back_in_order(BlendFeaturesBackward args, int portions, Stream stream) {
    const BlendFeatures& f = args.forward;
    const int channels = 4 * feature_quads(f.channels), size = feature_record(f.channels, args.out.absolute);
    const size_t bytes = size_t(f.entries) * kRecords * size * sizeof(float);
    for (args.portion = 0; args.portion < portions; ++args.portion) {
        if (args.portion) check(cudaMemsetAsync(args.ordered.records, 0, bytes, native(stream)), "clearing records");
        walk_back(args, 1, stream);
        const auto store = [args, channels] __device__(int64_t id, int number, float sum) {
            const Slot slot(args, channels, args.portion, number);
            if (slot.exists) slot.base[id * slot.stride] += sum;
        };
        add_records(args.ordered, f.totals, kRecords, size, store, stream);
    }
}

}  // namespace

void blend_features_backward(const BlendFeaturesBackward& args, Stream stream) {
    const int portions = args.forward.stride / (4 * feature_quads(args.forward.channels));
    args.ordered.pairs ? walk_back_in_order(args, portions, stream) : walk_back(args, portions, stream);
    if (args.count == 0) return;
    screen_grads_kernel<<<blocks_for(args.count, kFinishThreads), kFinishThreads, 0, native(stream)>>>(
        args.count, args.screen, args.moments, args.out);
    check_launch("screen_grads_kernel");
}

void screen_grads(int64_t count, const OnScreen<float>& screen, const float* grads, float* g_features,
                  const OnScreenGrads<float>& out, Stream stream) {
    if (count == 0) return;
    screen_grads_of_three_kernel<<<blocks_for(count, kFinishThreads), kFinishThreads, 0, native(stream)>>>(
        count, screen, grads, g_features, out);
    check_launch("screen_grads_of_three_kernel");
}

}  // namespace gs::cuda
