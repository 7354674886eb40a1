// What each splat does to the picture, by one walk front to back: see cpu/scores.h for the sums. CUDA backend.
//
// A block takes a tile, a warp a strip, a lane a pixel. The warp adds up its lanes, and the warps meet in atomics.
#include "blend.h"
#include "records.h"
#include "walk.h"
#include "warp_reduce.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = kWarp * kStrips;

struct ScorePixel {
    float threshold, transmittance = 1.f, best = 0.f;
    int32_t largest = -1, median = -1;
    float weight = 1.f, picture = 0.f, along = 0.f, r = 0.f, g = 0.f, b = 0.f;  // of this pixel
    float seen_picture = 0.f, seen_along = 0.f;                                 // so far

    __device__ ScorePixel(const Scores& p, bool inside, int column, int row) {
        threshold = inside ? kLog2AlphaMin : INFINITY;
        if (!inside) return;
        const int64_t plane = int64_t(p.grid.width) * p.grid.height, pixel = int64_t(row) * p.grid.width + column;
        if (p.weights) weight = p.weights[pixel];
        if (p.picture) picture = p.picture[pixel];
        if (!p.gradient) return;
        along = p.along[pixel];
        r = p.gradient[pixel], g = p.gradient[pixel + plane], b = p.gradient[pixel + 2 * plane];
    }

    template <bool kMoments>
    __device__ __forceinline__ void take(float e, float log2_opacity, Vec3<float> color, int32_t id, float* v) {
        const bool reached = e >= threshold;
        const float alpha_free = uncapped_alpha(e, log2_opacity), alpha = fminf(alpha_free, float(kAlphaMax));
        const float share = __fmul_rn(alpha, transmittance), next = __fmaf_rn(-alpha, transmittance, transmittance);
        const bool lit = reached && next >= float(kStopAt);
        if (reached && !lit) threshold = INFINITY;
        if (!lit) return;
        v[0] = share * weight;
        v[1] = 1.f;
        v[2] = transmittance > 0.5f ? 1.f : 0.f;
        if (share > best) best = share, largest = id;
        if (transmittance > 0.5f && next <= 0.5f) median = id;
        if constexpr (kMoments) {
            const float all = color.x + color.y + color.z, toward = fmaf(color.x, r, fmaf(color.y, g, color.z * b));
            seen_picture = fmaf(share, all, seen_picture), seen_along = fmaf(share, toward, seen_along);
            const float inv = 1.f / (1.f - alpha);
            const float of_picture = fmaf(transmittance, all, (seen_picture - picture) * inv);
            const float of_loss = fmaf(transmittance, toward, (seen_along - along) * inv);
            v[3] = of_picture * of_picture;
            v[4] = of_loss * of_loss;
            v[5] = of_loss * alpha_free;
            v[6] = v[5] * v[5];
        }
        transmittance = next;
    }
};

struct Staged {
    float4 place, shape;
    Vec3<float> color;
    uint32_t id, target;  // target: whose record or row its sums go to
};

template <bool kMoments>
__device__ __forceinline__ void stage(const Scores& p, uint32_t entry, Staged& to) {
    const uint32_t id = p.ids[entry];
    const float4* splat = reinterpret_cast<const float4*>(p.splats + id);
    to.place = splat[0], to.shape = splat[1], to.id = id;
    to.target = p.ordered.pairs ? p.ordered.pairs[entry] : id;
    if constexpr (kMoments)
        to.color = {p.colors[3 * int64_t(id)], p.colors[3 * int64_t(id) + 1], p.colors[3 * int64_t(id) + 2]};
}

template <bool kMoments>
__global__ void __launch_bounds__(kThreads) scores_kernel(Scores p) {
    constexpr int kValues = kMoments ? 7 : 3;
    __shared__ Staged batch[kThreads];
    const uint32_t tile = blockIdx.x;
    const int strip = int(threadIdx.x) / kWarp, lane = lane_id();
    const Pixels<1> pixels(p.grid, tile, strip);
    const float2 target = target_of(p.offset, p.grid, pixels.column, pixels.row);
    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[tile];
    const int slot = transpose_slot<kValues>(lane);
    const bool writes = first_with_slot(slot, lane);
    ScorePixel state(p, pixels.inside[0], pixels.column, pixels.row);

    bool done = false;
    for (uint32_t begin = range.x; begin < range.y; begin += kThreads) {
        if (__syncthreads_and(done)) break;  // nobody reads the batch any more
        if (begin + threadIdx.x < range.y) stage<kMoments>(p, begin + threadIdx.x, batch[threadIdx.x]);
        __syncthreads();
        const uint32_t count = ::min(range.y - begin, uint32_t(kThreads));
        for (uint32_t group = 0; group < count && !done; group += kWarp) {
            const uint32_t asked = group + lane;
            unsigned hits = __ballot_sync(kFullWarp, asked < count && overlap(batch[asked].place, pixels.box));
            for (; hits; hits &= hits - 1) {
                const Staged& splat = batch[group + __ffs(hits) - 1];
                const float e =
                    exponent(__fsub_rn(target.x, splat.place.x), __fsub_rn(target.y, splat.place.y), splat.shape);
                if (!__any_sync(kFullWarp, e >= state.threshold)) continue;
                float v[kValues] = {};
                state.take<kMoments>(e, splat.shape.w, splat.color, int32_t(splat.id), v);
                const float total = transpose_sum(v, lane);
                if (!writes) continue;
                if (p.ordered.pairs)
                    p.ordered.records[(int64_t(splat.target) * kStrips + strip) * kScoreSize + slot] = total;
                else
                    atomicAdd(p.sums + int64_t(splat.target) * kScoreSize + slot, total);
            }
            done = __all_sync(kFullWarp, state.threshold > 0.f);
        }
    }
    if (!pixels.inside[0]) return;
    const int64_t pixel = int64_t(pixels.row) * p.grid.width + pixels.column;
    p.largest[pixel] = state.largest, p.median[pixel] = state.median;
}

}  // namespace

void scores(const Scores& args, Stream stream) {
    const unsigned tiles = unsigned(args.grid.tiles());
    (args.colors ? scores_kernel<true> : scores_kernel<false>)<<<tiles, kThreads, 0, native(stream)>>>(args);
    check_launch("scores_kernel");
    const auto store = [sums = args.sums] __device__(int64_t id, int slot, float sum) {
        sums[id * kScoreSize + slot] = sum;
    };
    if (args.ordered.pairs) add_records(args.ordered, args.totals, kStrips, kScoreSize, store, stream);
}

}  // namespace gs::cuda
