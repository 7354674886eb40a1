// The derivative of alpha blending, CUDA backend. See blend.h for the mapping.
//
// With T_k the transmittance in front of splat k, a pixel is  C = sum_k c_k a_k T_k + T_end background,  so
//   dC/da_k = T_k c_k - (what lies behind k) / (1 - a_k).
// "What lies behind", times the gradient of the pixel, is one number S: it starts as color . gradient and loses each
// splat's share as the walk, front to back like the forward's, passes it. So no transmittance has to be divided out.
// Alpha and inverse depth are further channels of the same sum; alpha's is a background of -1.
//
// A lane adds up its two pixels, the warp adds up its lanes (warp_reduce.h), and the warps of the image meet in atomics.
// Gradients are kept as moments of g = dLoss / dlog(alpha) over dx, dy: what they mean for mean and covariance is the
// same for all pixels and is left to preprocess_backward.
#include "blend.h"
#include "warp_reduce.h"

namespace gs::cuda {
namespace {

template <bool kInvDepthWanted>
struct PixelState {
    float threshold, transmittance = 1.f;
    float behind = 0.f;                                   // S
    float g_r = 0.f, g_g = 0.f, g_b = 0.f, g_inv_depth = 0.f;  // gradient of this pixel

    __device__ PixelState(const BlendBackward& p, bool inside, int column, int row)
        : threshold(inside ? kLog2AlphaMin : kNever) {
        if (!inside) return;
        const int64_t plane = int64_t(p.grid.width) * p.grid.height, pixel = int64_t(row) * p.grid.width + column;
        g_r = p.g_color[pixel], g_g = p.g_color[pixel + plane], g_b = p.g_color[pixel + 2 * plane];
        behind = p.color[pixel] * g_r + p.color[pixel + plane] * g_g + p.color[pixel + 2 * plane] * g_b;
        if (kInvDepthWanted) {
            g_inv_depth = p.g_inv_depth[pixel];
            behind = fmaf(p.inv_depth[pixel], g_inv_depth, behind);
        }
        if (p.g_alpha) behind = fmaf(p.alpha[pixel] - 1.f, p.g_alpha[pixel], behind);
    }

    // Returns the weight; g is dLoss / dlog(alpha). The cap on alpha lets the gradient through.
    __device__ __forceinline__ float pass(float e, float log2_opacity, float4 look, float& g) {
        const Contribution c = contribution(e, log2_opacity, transmittance, threshold);
        float share = fmaf(look.x, g_r, fmaf(look.y, g_g, look.z * g_b));
        if (kInvDepthWanted) share = fmaf(look.w, g_inv_depth, share);
        behind = fmaf(-c.weight, share, behind);
        g = c.alpha_free * fmaf(transmittance, share, -behind * reciprocal_fast(1.f - c.alpha));
        transmittance = c.next;
        return c.weight;
    }
};

template <bool kInvDepthWanted, bool kAbsolute>
__global__ void __launch_bounds__(kBlendThreads) blend_backward_kernel(BlendBackward p) {
    constexpr int kAbsAt = kBlue + 1 + (kInvDepthWanted ? 1 : 0);
    constexpr int kValues = kAbsAt + (kAbsolute ? 2 : 0);
    __shared__ Batch batches[2];

    const Pixels pixels = own_pixels(p.grid);
    PixelState<kInvDepthWanted> first(p, pixels.inside0, pixels.column, pixels.row);
    PixelState<kInvDepthWanted> second(p, pixels.inside1, pixels.column, pixels.row + 4);

    const int lane = lane_id();
    int slot = transpose_slot<kValues>(lane);
    const bool writes = first_with_slot(slot, lane);
    if (kAbsolute && !kInvDepthWanted && slot >= kAbsAt) slot += kAbsX - kAbsAt;

    float* const own_slot = p.grads + slot;

    const uint2 range = reinterpret_cast<const uint2*>(p.ranges)[blockIdx.x];
    const uint32_t thread = threadIdx.x;
    uint32_t next_id = range.x + thread < range.y ? p.ids[range.x + thread] : 0;
    if (range.x + thread < range.y) stage<Place::kId>(batches[0], p.splats, next_id);
    next_id = range.x + kBatch + thread < range.y ? p.ids[range.x + kBatch + thread] : 0;

    // The record of four groups, a batch, is read a batch ahead, by as many lanes.
    const uint32_t walked = range.x < range.y ? p.record[walked_at()].upper : 0;
    const auto load_record = [&](uint32_t group) {
        group += lane % kGroups;
        return group < walked ? p.record[record_at(p.grid, range.x, group)] : Taken{0, 0};
    };
    Taken next_taken = load_record(0);
    uint32_t groups_left = walked;
    int turn = 0;
    for (uint32_t begin = range.x; begin < range.y; begin += kBatch, turn ^= 1) {
        copy_async_wait();
        if (__syncthreads_and(groups_left == 0)) break;  // this batch has arrived, and nobody reads the other one any more
        const uint32_t next = begin + kBatch;
        if (next + thread < range.y) stage<Place::kId>(batches[turn ^ 1], p.splats, next_id);
        next_id = next + kBatch + thread < range.y ? p.ids[next + kBatch + thread] : 0;
        if (groups_left == 0) continue;

        const Batch& batch = batches[turn];
        const Taken taken = next_taken;
        next_taken = load_record((next - range.x) / kWarp);
        const uint32_t groups = ::min(groups_left, uint32_t(kGroups));
        groups_left -= groups;
        for (uint32_t group = 0; group < groups; ++group) {
            const unsigned upper = __shfl_sync(kFullWarp, taken.upper, group), lower = __shfl_sync(kFullWarp, taken.lower, group);
            unsigned visits = upper | lower;
            while (visits) {
                const unsigned bit = visits & (0u - visits);
                visits ^= bit;
                const uint32_t k = group * kWarp + __ffs(bit) - 1;
                const float4 place = batch.place[k], shape = batch.shape[k], look = batch.look[k];
                const Exponents e = exponents(pixels, {place.x, place.y}, shape);
                float g0 = 0.f, g1 = 0.f, w0 = 0.f, w1 = 0.f;
                if (upper & bit) w0 = first.pass(e.e0, shape.w, look, g0);
                if (lower & bit) w1 = second.pass(e.e1, shape.w, look, g1);
                const float g0y = g0 * e.dy0, g1y = g1 * e.dy1;

                float v[kValues];
                v[kG] = g0 + g1;
                v[kGx] = v[kG] * e.dx;
                v[kGy] = g0y + g1y;
                v[kGxx] = v[kGx] * e.dx;
                v[kGxy] = v[kGy] * e.dx;
                v[kGyy] = fmaf(g0y, e.dy0, g1y * e.dy1);
                v[kRed] = fmaf(w0, first.g_r, w1 * second.g_r);
                v[kGreen] = fmaf(w0, first.g_g, w1 * second.g_g);
                v[kBlue] = fmaf(w0, first.g_b, w1 * second.g_b);
                if constexpr (kInvDepthWanted) v[kInvDepth] = fmaf(w0, first.g_inv_depth, w1 * second.g_inv_depth);
                if constexpr (kAbsolute) {  // |gradient of the mean| per pixel, in pixels, but for a factor of ln 2
                    const float bx = shape.y * e.dx, ax2 = 2.f * shape.x * e.dx;
                    v[kAbsAt] = fabsf(g0 * fmaf(shape.y, e.dy0, ax2)) + fabsf(g1 * fmaf(shape.y, e.dy1, ax2));
                    v[kAbsAt + 1] = fabsf(g0 * fmaf(2.f * shape.z, e.dy0, bx)) + fabsf(g1 * fmaf(2.f * shape.z, e.dy1, bx));
                }
                const float total = transpose_sum(v, lane);
                if (writes) atomicAdd(own_slot + int64_t(__float_as_uint(place.z)) * kGradSize, total);
            }
        }
    }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) background_grad_kernel(int64_t pixels, const float* alpha,
                                                                      const float* g_color, float* g_background) {
    const int64_t stride = int64_t(gridDim.x) * kSumThreads;
    float sum[3] = {0.f, 0.f, 0.f};
    for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < pixels; i += stride) {
        const float transmittance = 1.f - alpha[i];
        for (int c = 0; c < 3; ++c) sum[c] = fmaf(transmittance, g_color[i + c * pixels], sum[c]);
    }
    for (int c = 0; c < 3; ++c) {
        const float total = warp_sum(sum[c]);
        if (lane_id() == 0) atomicAdd(g_background + c, total);
    }
}

}  // namespace

void blend_backward(const BlendBackward& args, Stream stream) {
    const unsigned tiles = unsigned(args.grid.tiles());
    const auto launch = [&](auto kernel) {
        kernel<<<tiles, kBlendThreads, 0, native(stream)>>>(args);
        check_launch("blend_backward_kernel");
    };
    if (args.g_inv_depth) launch(args.absolute ? blend_backward_kernel<true, true> : blend_backward_kernel<true, false>);
    else launch(args.absolute ? blend_backward_kernel<false, true> : blend_backward_kernel<false, false>);
}

void background_grad(const TileGrid& grid, const float* alpha, const float* g_color, float* g_background,
                     Stream stream) {
    check(cudaMemsetAsync(g_background, 0, 3 * sizeof(float), native(stream)), "clearing the background gradient");
    const int64_t pixels = int64_t(grid.width) * grid.height;
    const unsigned blocks = unsigned(std::min<int64_t>(blocks_for(pixels, kSumThreads), 264));
    background_grad_kernel<<<blocks, kSumThreads, 0, native(stream)>>>(pixels, alpha, g_color, g_background);
    check_launch("background_grad_kernel");
}

}  // namespace gs::cuda
