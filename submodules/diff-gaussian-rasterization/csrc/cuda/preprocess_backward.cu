// From gradients of splats to gradients of Gaussians and of the camera, and density control's statistics. CUDA backend.
//
// One thread per Gaussian, in storage order, so that all reads and writes of a warp are neighbors; the rows of spherical
// harmonics go through shared memory for the same reason. What the view does not show gets zeros.
#include "camera_grad.h"
#include "gaussian_vjp.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kNoSh = -1;

// Writes 32 rows of the gradient of sh_rest: the staged floats where a lane is `seen`, zeros elsewhere.
template <int Degree>
__device__ __forceinline__ void write_rest(const Gaussians<float>& g, int64_t first, unsigned seen, const float* shared,
                                           float* out) {
    constexpr int kFloats = Degree > 0 ? kRestFloats<Degree> : 0, kPitch = kRestPitch<Degree>;
    const int stride = 3 * g.rest_count;
    const int rows = int(::min(g.count - first, int64_t(kWarp)));
    float* const base = out + first * stride;
    __syncwarp();
    if (stride == kFloats && kPitch == kFloats && rows == kWarp && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
        for (int at = 0; at < kWarp * kFloats; at += 4 * kWarp) {
            const int i = at + 4 * lane_id();
            if (i >= kWarp * kFloats) break;
            float4 v = *reinterpret_cast<const float4*>(shared + i);
            if (!(seen >> (i / kPitch) & 1)) v.x = 0.f;
            if (!(seen >> ((i + 1) / kPitch) & 1)) v.y = 0.f;
            if (!(seen >> ((i + 2) / kPitch) & 1)) v.z = 0.f;
            if (!(seen >> ((i + 3) / kPitch) & 1)) v.w = 0.f;
            *reinterpret_cast<float4*>(base + i) = v;
        }
        return;
    }
    for (int i = lane_id(); i < rows * stride; i += kWarp) {
        const int row = i / stride, column = i % stride;
        base[i] = column < kFloats && (seen >> row & 1) ? shared[row * kPitch + column] : 0.f;
    }
}

__device__ __forceinline__ void write_geometry(const GaussianGrads<float>& out, int64_t i, const GaussianGrad& g,
                                               Vec3<float> mean) {
    if (out.means) store3(out.means, i, mean);
    if (out.opacities) out.opacities[i] = g.opacity;
    if (out.scales) store3(out.scales, i, g.scale);
    if (out.quats) {
        float* q = out.quats + 4 * i;
        q[0] = g.quat.x, q[1] = g.quat.y, q[2] = g.quat.z, q[3] = g.quat.w;
    }
    if (out.cov3d) {
        float* c = out.cov3d + 6 * i;
        c[0] = g.cov.xx, c[1] = g.cov.xy, c[2] = g.cov.xz, c[3] = g.cov.yy, c[4] = g.cov.yz, c[5] = g.cov.zz;
    }
}

template <int Degree, bool CameraGrad>
__global__ void __launch_bounds__(kThreads) preprocess_backward_kernel(PreprocessBackward p) {
    __shared__ Camera<float> camera;
    __shared__ alignas(16) float rest[Degree > 0 ? kThreads * kRestPitch<Degree> : 4];
    const Gaussians<float>& g = p.gaussians;
    const GaussianGrads<float>& out = p.out;
    if (threadIdx.x == 0)
        camera =
            make_camera(p.view.world_to_camera, p.view.intrinsics, p.view.camera_center, p.view.width, p.view.height);
    __syncthreads();

    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first = i - lane_id();
    const bool inside = i < g.count;
    const bool seen = inside && p.radii[i] > 0;
    const unsigned seen_lanes = __ballot_sync(kFullWarp, seen);
    float* warp_rest = rest;
    if constexpr (Degree > 0) {
        warp_rest = rest + (threadIdx.x / kWarp) * kWarp * kRestPitch<Degree>;
        if (seen_lanes) stage_rest<Degree>(g, first, seen_lanes, warp_rest);
    }

    GaussianGrad grad{};
    Vec3<float> mean = {0.f, 0.f, 0.f}, g_offset = mean, g_color = mean, g_dc = mean;
    Vec2<float> ndc = {0.f, 0.f};
    if (seen) {
        grad = gaussian_vjp(g, camera, i, p.grads + i * kGradSize);
        mean = load3(g.means, i);
        g_color = grad.splat.color;
        if constexpr (Degree >= 0) {
            float* const own_rest = warp_rest + lane_id() * kRestPitch<Degree>;
            float basis[sh_count(Degree)];
            g_color = through_clamp(p.splats[i], g_color);
            g_offset = sh_color_vjp<Degree>(g, camera, i, g_color, own_rest, basis);
            g_dc = mul(basis[0], g_color);
#pragma unroll
            for (int k = 1; k < sh_count(Degree); ++k) store3(own_rest, k - 1, mul(basis[k], g_color));
        }
        ndc = add_statistics(grad.splat, p.view.width, p.view.height, i, out.grad_norm_sum, out.visits,
                             out.abs_grad_norm_sum);
    }
    if (inside) {
        write_geometry(out, i, grad, add(grad.mean, g_offset));
        if (out.means2d) store3(out.means2d, i, {ndc.x, ndc.y, 0.f});
        if (out.colors) store3(out.colors, i, g_color);
        if (out.sh_dc) store3(out.sh_dc, i, g_dc);
    }
    if constexpr (Degree >= 0) {
        if (out.sh_rest && first < g.count) write_rest<Degree>(g, first, seen_lanes, warp_rest, out.sh_rest);
    }
    if constexpr (CameraGrad) {
        add_camera_grad<kThreads>(camera, p.view.camera_center != nullptr, mean, grad.p, grad.rotation, g_offset,
                                  out.world_to_camera);
    }
}

}  // namespace

int64_t preprocess_backward_blocks(int64_t count) { return blocks_for(count, kThreads); }

void preprocess_backward(const PreprocessBackward& args, Stream stream) {
    const bool camera_grad = args.out.world_to_camera != nullptr;
    if (args.gaussians.count == 0) return;
    const unsigned blocks = blocks_for(args.gaussians.count, kThreads);
    const auto launch = [&](auto kernel, auto kernel_with_camera) {
        (camera_grad ? kernel_with_camera : kernel)<<<blocks, kThreads, 0, native(stream)>>>(args);
        check_launch("preprocess_backward_kernel");
    };
    if (args.gaussians.colors)
        return launch(preprocess_backward_kernel<kNoSh, false>, preprocess_backward_kernel<kNoSh, true>);
    switch (args.gaussians.sh_degree) {
        case 0:
            return launch(preprocess_backward_kernel<0, false>, preprocess_backward_kernel<0, true>);
        case 1:
            return launch(preprocess_backward_kernel<1, false>, preprocess_backward_kernel<1, true>);
        case 2:
            return launch(preprocess_backward_kernel<2, false>, preprocess_backward_kernel<2, true>);
        default:
            return launch(preprocess_backward_kernel<3, false>, preprocess_backward_kernel<3, true>);
    }
}

}  // namespace gs::cuda
