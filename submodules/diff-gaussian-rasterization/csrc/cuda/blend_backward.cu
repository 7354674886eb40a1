// The derivative of alpha blending, CUDA backend. See blend.h for the mapping.
//
// With T_k the transmittance in front of splat k and B_k the color that is seen behind it, a pixel is
//   C = T_k (a_k c_k + (1 - a_k) B_k) + what lies in front,  so  dC/da_k = T_k (c_k - B_k).
// The walk is back to front: B starts as the background and becomes a c + (1 - a) B at each splat, T is divided by 1 - a.
// Only B . gradient of the pixel is needed, one number. Alpha and inverse depth are further channels; alpha's is a
// background of -1.
//
// A block walks one segment of a tile's list, a warp one square of 8x8 pixels: it gathers the splats that its pixels took,
// 32 at a time. A lane adds up its two pixels, the warp adds up its lanes (warp_reduce.h), and the warps of the image meet
// in atomics; or, where the same bits are wanted every time, each leaves its sum in a place of its own, to be added in
// order. Gradients are kept as moments of g = dLoss / dlog(alpha) over dx, dy: what they mean for mean and covariance is
// the same for all pixels and is left to preprocess_backward.
#include "blend.h"
#include "records.h"
#include "visits.h"
#include "warp_reduce.h"

namespace gs::cuda {
namespace {

constexpr int kPixels = kVisitStrips;  // of a lane
constexpr int kThreads = kWarp * kStrips / kPixels;
constexpr uint32_t kOrderUnit = 1 << kPixels;  // the order of a splat: its place in the segment, and by which strips

template <bool kInvDepthWanted>
struct PixelState {
    uint32_t stop = 0;                                         // nothing is taken from here on, as Visited's order
    float transmittance = 0.f, behind = 0.f;                   // T, B . gradient
    float g_r = 0.f, g_g = 0.f, g_b = 0.f, g_inv_depth = 0.f;  // gradient of this pixel

    // As the segment ends.
    __device__ __forceinline__ void begin(const BlendBackward& p, int view, int column, int row, uint32_t segment,
                                          int64_t next_passed) {
        const int64_t plane = int64_t(p.grid.width) * p.grid.height;
        const int64_t pixel = view * plane + int64_t(row) * p.grid.width + column, red = pixel + 2 * view * plane;
        const uint32_t first = segment * kSegment, stopped = p.trace.stop[pixel];
        if (stopped <= first) return;  // before this segment
        stop = ::min(stopped - first, uint32_t(kSegment)) * kOrderUnit;
        g_r = p.g_color[red], g_g = p.g_color[red + plane], g_b = p.g_color[red + 2 * plane];
        if (kInvDepthWanted) g_inv_depth = p.g_inv_depth[pixel];
        const float left = p.trace.left[pixel], g_alpha = p.g_alpha ? p.g_alpha[pixel] : 0.f;
        if (stopped - first <= kSegment) {
            transmittance = left;
            behind = p.background[0] * g_r + p.background[1] * g_g + p.background[2] * g_b - g_alpha;
            return;
        }
        const float4 passed = static_cast<const float4*>(p.trace.passed)[next_passed];
        transmittance = passed.x;
        behind = (p.color[red] - passed.y) * g_r + (p.color[red + plane] - passed.z) * g_g +
                 (p.color[red + 2 * plane] - passed.w) * g_b - left * g_alpha;
        if (kInvDepthWanted)
            behind = fmaf(p.inv_depth[pixel] - p.trace.passed_inv_depth[next_passed], g_inv_depth, behind);
        behind /= transmittance;
    }

    // From behind a splat to before it. Returns its weight; g is dLoss / dlog(alpha). The cap on alpha lets the gradient
    // through.
    __device__ __forceinline__ float pass(uint32_t order, float e, float log2_opacity, float4 look, float& g) {
        const float alpha_free = e >= kLog2AlphaMin && order < stop ? uncapped_alpha(e, log2_opacity) : 0.f;
        const float alpha = fminf(alpha_free, float(kAlphaMax));
        float share = fmaf(look.x, g_r, fmaf(look.y, g_g, look.z * g_b));
        if (kInvDepthWanted) share = fmaf(look.w, g_inv_depth, share);
        const float stands_out = share - behind;
        transmittance *= reciprocal_fast(1.f - alpha);
        behind = fmaf(alpha, stands_out, behind);
        g = alpha_free * transmittance * stands_out;
        return alpha * transmittance;
    }
};

struct Visited {
    float4 place, shape, look;  // place: x, y, where its gradient goes, its order

    // The n-th of those taken, counted from the segment's last.
    template <bool kOrdered>
    __device__ __forceinline__ void fetch(const BlendBackward& p, const Visits& visits, uint32_t first_entry,
                                          uint32_t n) {
        uint32_t by = 0;
        const uint32_t at = visits.nth(visits.total - 1 - ::min(n, visits.total - 1), by), entry = first_entry + at;
        const uint32_t id = p.ids[entry];
        const float4* splat = reinterpret_cast<const float4*>(p.splats + id);
        place = splat[0], shape = splat[1], look = splat[2];
        place.z = __uint_as_float(kOrdered ? p.ordered.pairs[entry] : id);
        place.w = __uint_as_float(at * kOrderUnit + by);
    }
};

template <bool kInvDepthWanted, bool kAbsolute, bool kOrdered>
__global__ void __launch_bounds__(kThreads) blend_backward_kernel(BlendBackward p) {
    constexpr int kAbsAt = kBlue + 1 + (kInvDepthWanted ? 1 : 0);
    constexpr int kValues = kAbsAt + (kAbsolute ? 2 : 0);
    __shared__ Visited visited[kThreads];
    if (blockIdx.x >= p.totals->segments) return;
    const uint2 task = reinterpret_cast<const uint2*>(p.trace.segments)[blockIdx.x];
    const uint32_t tile = task.x, segment = task.y, begin = p.ranges[2 * int64_t(tile)];
    const int lane = lane_id(), warp_first = int(threadIdx.x) - lane, strip = warp_first / kWarp * kPixels;
    const Visits visits(p.trace, tile, begin, segment, strip);
    if (visits.total == 0) return;

    const Pixels<kPixels> pixels(p.grid, tile, strip);
    PixelState<kInvDepthWanted> state[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
        if (__any_sync(kFullWarp, visits.strips[i] != 0) && pixels.inside[i])
            state[i].begin(p, pixels.view, pixels.column, pixels.row + 4 * i, segment,
                           passed_at(p.trace, tile, begin, segment + 1, strip + i));

    int slot = transpose_slot<kValues>(lane);
    const bool writes = first_with_slot(slot, lane);
    if (kAbsolute && !kInvDepthWanted && slot >= kAbsAt) slot += kAbsX - kAbsAt;
    float* const own_slot = kOrdered ? p.ordered.records + strip / kPixels * kGradSize + slot : p.grads + slot;

    const uint32_t first_entry = begin + segment * kSegment;
    Visited next;
    next.fetch<kOrdered>(p, visits, first_entry, lane);
    for (uint32_t done = 0; done < visits.total; done += kWarp) {
        __syncwarp();
        visited[threadIdx.x] = next;
        __syncwarp();
        if (done + kWarp < visits.total) next.fetch<kOrdered>(p, visits, first_entry, done + kWarp + lane);
        const int count = int(::min(visits.total - done, uint32_t(kWarp)));
        for (int k = warp_first; k < warp_first + count; ++k) {
            const auto [place, shape, look] = visited[k];
            const uint32_t order = __float_as_uint(place.w);
            const Exponents<kPixels> at(pixels, {place.x, place.y}, shape);
            float g0 = 0.f, g1 = 0.f, w0 = 0.f, w1 = 0.f;
            if (order & 1) w0 = state[0].pass(order, at.e[0], shape.w, look, g0);
            if (order & 2) w1 = state[1].pass(order, at.e[1], shape.w, look, g1);
            const float g0y = g0 * at.dy[0], g1y = g1 * at.dy[1];

            float v[kValues];
            v[kG] = g0 + g1;
            v[kGx] = v[kG] * at.dx;
            v[kGy] = g0y + g1y;
            v[kGxx] = v[kGx] * at.dx;
            v[kGxy] = v[kGy] * at.dx;
            v[kGyy] = fmaf(g0y, at.dy[0], g1y * at.dy[1]);
            v[kRed] = fmaf(w0, state[0].g_r, w1 * state[1].g_r);
            v[kGreen] = fmaf(w0, state[0].g_g, w1 * state[1].g_g);
            v[kBlue] = fmaf(w0, state[0].g_b, w1 * state[1].g_b);
            if constexpr (kInvDepthWanted) v[kInvDepth] = fmaf(w0, state[0].g_inv_depth, w1 * state[1].g_inv_depth);
            if constexpr (kAbsolute) {  // |gradient of the mean| per pixel, in pixels, but for a factor of ln 2
                const float bx = shape.y * at.dx, ax2 = 2.f * shape.x * at.dx;
                v[kAbsAt] = fabsf(g0 * fmaf(shape.y, at.dy[0], ax2)) + fabsf(g1 * fmaf(shape.y, at.dy[1], ax2));
                v[kAbsAt + 1] =
                    fabsf(g0 * fmaf(2.f * shape.z, at.dy[0], bx)) + fabsf(g1 * fmaf(2.f * shape.z, at.dy[1], bx));
            }
            const float total = transpose_sum(v, lane);
            const int64_t target = __float_as_uint(place.z);
            if (writes && kOrdered) own_slot[target * (kRecords * kGradSize)] = total;
            if (writes && !kOrdered) atomicAdd(own_slot + target * kGradSize, total);
        }
    }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
    background_grad_kernel(int64_t pixels, const float* left, const float* g_color, float* g_background) {
    __shared__ float sums[3][kSumThreads / kWarp];
    const int64_t stride = int64_t(gridDim.x) * kSumThreads;
    float sum[3] = {0.f, 0.f, 0.f};
    for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < pixels; i += stride) {
        for (int c = 0; c < 3; ++c) sum[c] = fmaf(left[i], g_color[i + c * pixels], sum[c]);
    }
    for (int c = 0; c < 3; ++c) {
        const float total = warp_sum(sum[c]);
        if (lane_id() == 0) sums[c][threadIdx.x / kWarp] = total;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    float total = 0.f;
    for (const float warp : sums[threadIdx.x]) total += warp;
    g_background[3 * blockIdx.x + threadIdx.x] = total;
}

}  // namespace

void blend_backward(const BlendBackward& args, Stream stream) {
    const unsigned blocks = blocks_for(max_segments(args.grid, args.entries), 1);
    const auto launch = [&](auto kernel, auto ordered_kernel) {
        (args.ordered.pairs ? ordered_kernel : kernel)<<<blocks, kThreads, 0, native(stream)>>>(args);
        check_launch("blend_backward_kernel");
    };
    if (args.g_inv_depth && args.absolute)
        launch(blend_backward_kernel<true, true, false>, blend_backward_kernel<true, true, true>);
    else if (args.g_inv_depth)
        launch(blend_backward_kernel<true, false, false>, blend_backward_kernel<true, false, true>);
    else if (args.absolute)
        launch(blend_backward_kernel<false, true, false>, blend_backward_kernel<false, true, true>);
    else
        launch(blend_backward_kernel<false, false, false>, blend_backward_kernel<false, false, true>);
    const auto store = [grads = args.grads] __device__(int64_t id, int slot, float sum) {
        grads[id * kGradSize + slot] = sum;
    };
    if (args.ordered.pairs) add_records(args.ordered, args.totals, kRecords, kGradSize, store, stream);
}

int64_t background_grad_blocks(const TileGrid& grid) {
    return std::min<int64_t>(blocks_for(int64_t(grid.width) * grid.height, kSumThreads), 264);
}

void background_grad(const TileGrid& grid, const float* left, const float* g_color, float* g_background,
                     Stream stream) {
    background_grad_kernel<<<unsigned(background_grad_blocks(grid)), kSumThreads, 0, native(stream)>>>(
        int64_t(grid.width) * grid.height, left, g_color, g_background);
    check_launch("background_grad_kernel");
}

}  // namespace gs::cuda
