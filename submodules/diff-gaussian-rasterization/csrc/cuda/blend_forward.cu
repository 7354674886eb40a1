// Alpha blending, CUDA backend: every pixel takes the splats of its tile front to back. See blend.h for the mapping.
#include "blend.h"

namespace gs::cuda {
namespace {

template <bool kInvDepthWanted>
struct PixelState {
    float threshold, transmittance = 1.f;
    float r = 0.f, g = 0.f, b = 0.f, inv_depth = 0.f;

    __device__ explicit PixelState(bool inside) : threshold(inside ? kLog2AlphaMin : kNever) {}

    __device__ __forceinline__ void take(float e, float log2_opacity, float4 look) {
        const Contribution c = contribution(e, log2_opacity, transmittance, threshold);
        r = fmaf(c.weight, look.x, r);
        g = fmaf(c.weight, look.y, g);
        b = fmaf(c.weight, look.z, b);
        if (kInvDepthWanted) inv_depth = fmaf(c.weight, look.w, inv_depth);
        transmittance = c.next;
    }

    __device__ __forceinline__ void store(const BlendForward& p, int column, int row) const {
        const int64_t plane = int64_t(p.grid.width) * p.grid.height, pixel = int64_t(row) * p.grid.width + column;
        p.color[pixel] = fmaf(transmittance, p.background[0], r);
        p.color[pixel + plane] = fmaf(transmittance, p.background[1], g);
        p.color[pixel + 2 * plane] = fmaf(transmittance, p.background[2], b);
        p.alpha[pixel] = 1.f - transmittance;
        if (kInvDepthWanted) p.inv_depth[pixel] = inv_depth;
    }
};

template <bool kInvDepthWanted>
__global__ void __launch_bounds__(kBlendThreads) blend_forward_kernel(BlendForward p) {
    __shared__ Batch batches[2];
    const Pixels pixels = own_pixels(p.grid);
    PixelState<kInvDepthWanted> first(pixels.inside0), second(pixels.inside1);

    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[blockIdx.x];
    const uint32_t thread = threadIdx.x;
    // Two loads follow each other for every splat, its id and its data: ids are fetched one batch further ahead.
    if (range.x + thread < range.y) stage<Place::kExtent>(batches[0], p.splats, p.ids[range.x + thread]);
    uint32_t next_id = range.x + kBatch + thread < range.y ? p.ids[range.x + kBatch + thread] : 0;

    bool done = false;
    int turn = 0;
    uint32_t walked = 0;
    for (uint32_t begin = range.x; begin < range.y; begin += kBatch, turn ^= 1) {
        copy_async_wait();
        // This batch has arrived, and nobody reads the other one any more.
        if (__syncthreads_and(done)) break;
        const uint32_t next = begin + kBatch;
        if (next + thread < range.y) stage<Place::kExtent>(batches[turn ^ 1], p.splats, next_id);
        next_id = next + kBatch + thread < range.y ? p.ids[next + kBatch + thread] : 0;
        if (done) continue;

        const Batch& batch = batches[turn];
        const uint32_t count = ::min(range.y - begin, uint32_t(kBatch));
        for (uint32_t group = 0; group < count; group += kWarp) {
            const float4 candidate = batch.place[group + lane_id()];
            const bool hit = group + lane_id() < count && candidate.x + candidate.z >= pixels.box.x0 &&
                             candidate.x - candidate.z <= pixels.box.x1 && candidate.y + candidate.w >= pixels.box.y0 &&
                             candidate.y - candidate.w <= pixels.box.y1;
            unsigned hits = __ballot_sync(kFullWarp, hit);
            Taken taken = {0, 0};
            while (hits) {
                const unsigned bit = hits & (0u - hits);
                hits ^= bit;
                const uint32_t k = group + __ffs(bit) - 1;
                const float2 mean = *reinterpret_cast<const float2*>(&batch.place[k]);
                const float4 shape = batch.shape[k];
                const Exponents e = exponents(pixels, mean, shape);
                const bool upper = __any_sync(kFullWarp, e.e0 >= first.threshold);
                const bool lower = __any_sync(kFullWarp, e.e1 >= second.threshold);
                if (upper) {
                    first.take(e.e0, shape.w, batch.look[k]);
                    taken.upper |= bit;
                }
                if (lower) {
                    second.take(e.e1, shape.w, batch.look[k]);
                    taken.lower |= bit;
                }
            }
            if (p.record && lane_id() == 0) p.record[record_at(p.grid, range.x, walked)] = taken;
            ++walked;
            __syncwarp();
            done = __all_sync(kFullWarp, first.threshold == kNever && second.threshold == kNever);
            if (done) break;
        }
    }

    if (p.record && lane_id() == 0) p.record[walked_at()] = {walked, 0};
    if (pixels.inside0) first.store(p, pixels.column, pixels.row);
    if (pixels.inside1) second.store(p, pixels.column, pixels.row + 4);
}

}  // namespace

void blend_forward(const BlendForward& args, Stream stream) {
    const unsigned tiles = unsigned(args.grid.tiles());
    if (args.inv_depth) blend_forward_kernel<true><<<tiles, kBlendThreads, 0, native(stream)>>>(args);
    else blend_forward_kernel<false><<<tiles, kBlendThreads, 0, native(stream)>>>(args);
    check_launch("blend_forward_kernel");
}

}  // namespace gs::cuda
