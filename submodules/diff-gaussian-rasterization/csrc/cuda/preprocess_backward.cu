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

// Of several views, a thread adds up what they say about its Gaussian, the last view's first.
template <bool Several>
__device__ __forceinline__ float added(float sum, float value) {
    return Several ? __fadd_rn(sum, value) : value;
}

template <bool Several>
__device__ __forceinline__ Vec3<float> added(Vec3<float> a, Vec3<float> b) {
    return {added<Several>(a.x, b.x), added<Several>(a.y, b.y), added<Several>(a.z, b.z)};
}

// What a thread writes.
struct Sums {
    GaussianGrad geometry{};
    Vec3<float> mean{}, color{}, dc{};
    Vec2<float> ndc{};

    template <bool Several>
    __device__ __forceinline__ void add_geometry(const GaussianGrad& g, Vec3<float> of_mean) {
        mean = added<Several>(mean, of_mean);
        geometry.scale = added<Several>(geometry.scale, g.scale);
        geometry.opacity = added<Several>(geometry.opacity, g.opacity);
        const Vec4<float> q = geometry.quat;
        geometry.quat = {added<Several>(q.x, g.quat.x), added<Several>(q.y, g.quat.y), added<Several>(q.z, g.quat.z),
                         added<Several>(q.w, g.quat.w)};
        const Sym3<float> c = geometry.cov;
        geometry.cov = {added<Several>(c.xx, g.cov.xx), added<Several>(c.xy, g.cov.xy), added<Several>(c.xz, g.cov.xz),
                        added<Several>(c.yy, g.cov.yy), added<Several>(c.yz, g.cov.yz), added<Several>(c.zz, g.cov.zz)};
    }
};

template <int Degree, bool CameraGrad, bool Several>
__global__ void __launch_bounds__(kThreads) preprocess_backward_kernel(PreprocessBackward p) {
    constexpr int kRest = Degree > 0 ? kThreads * kRestPitch<Degree> : 4;
    __shared__ Camera<float> camera;
    __shared__ alignas(16) float rest[kRest], rest_sums[Several ? kRest : 4];
    const Gaussians<float>& g = p.gaussians;
    const GaussianGrads<float>& out = p.out;
    const int views = Several ? p.views : 1;

    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first = i - lane_id();
    const bool inside = i < g.count;
    bool ever_seen = false;
    for (int view = 0; view < views; ++view) ever_seen |= inside && p.radii[view * g.count + i] > 0;
    const unsigned seen_lanes = __ballot_sync(kFullWarp, ever_seen);
    // Coefficients, and what is written in the end: of one view, in the place of its coefficients.
    float *warp_rest = rest, *warp_sums = rest;
    if constexpr (Degree > 0) {
        const int at = (threadIdx.x / kWarp) * kWarp * kRestPitch<Degree>;
        warp_rest = rest + at, warp_sums = (Several ? rest_sums : rest) + at;
        if (seen_lanes) stage_rest<Degree>(g, first, seen_lanes, warp_rest);
    }
    float* const own_rest = warp_rest + lane_id() * (Degree > 0 ? kRestPitch<Degree> : 0);
    float* const own_sums = warp_sums + lane_id() * (Degree > 0 ? kRestPitch<Degree> : 0);
    if constexpr (Several && Degree > 0)
        for (int k = 0; k < kRestFloats<Degree>; ++k) own_sums[k] = 0.f;

    Sums sums;
    for (int view = views - 1; view >= 0; --view) {
        if (Several) __syncthreads();  // the view before is done with the camera
        if (threadIdx.x == 0)
            camera = make_camera(p.view.world_to_camera + 16 * view, p.view.intrinsics, p.view.camera_center,
                                 p.view.width, p.view.height);
        __syncthreads();
        const int64_t row = view * g.count + i;
        GaussianGrad grad{};
        Vec3<float> mean = {0.f, 0.f, 0.f}, g_offset = mean;
        if (inside && p.radii[row] > 0) {
            grad = gaussian_vjp(g, camera, i, p.grads + row * kGradSize);
            mean = load3(g.means, i);
            Vec3<float> g_color = grad.splat.color;
            if constexpr (Degree >= 0) {
                float basis[sh_count(Degree)];
                g_color = through_clamp(p.splats[row], g_color);
                g_offset = sh_color_vjp<Degree>(g, camera, i, g_color, own_rest, basis);
                sums.dc = added<Several>(sums.dc, mul(basis[0], g_color));
#pragma unroll
                for (int k = 1; k < sh_count(Degree); ++k)
                    store3(own_sums, k - 1, added<Several>(load3(own_sums, k - 1), mul(basis[k], g_color)));
            }
            const Vec2<float> ndc = add_statistics(grad.splat, p.view.width, p.view.height, i, out.grad_norm_sum,
                                                   out.visits, out.abs_grad_norm_sum);
            sums.ndc = {added<Several>(sums.ndc.x, ndc.x), added<Several>(sums.ndc.y, ndc.y)};
            sums.color = added<Several>(sums.color, g_color);
            sums.add_geometry<Several>(grad, add(grad.mean, g_offset));
        }
        if (CameraGrad && out.world_to_camera) {
            add_camera_grad<kThreads>(camera, p.view.camera_center != nullptr, mean, grad.p, grad.rotation, g_offset,
                                      out.world_to_camera + int64_t(view) * gridDim.x * 16);
        }
    }
    if (inside) {
        write_geometry(out, i, sums.geometry, sums.mean);
        if (out.means2d) store3(out.means2d, i, {sums.ndc.x, sums.ndc.y, 0.f});
        if (out.colors) store3(out.colors, i, sums.color);
        if (out.sh_dc) store3(out.sh_dc, i, sums.dc);
    }
    if constexpr (Degree >= 0) {
        if (out.sh_rest && first < g.count) write_rest<Degree>(g, first, seen_lanes, warp_sums, out.sh_rest);
    }
}

template <int Degree>
void launch(const PreprocessBackward& args, Stream stream) {
    const auto kernel = args.views > 1             ? preprocess_backward_kernel<Degree, true, true>
                        : args.out.world_to_camera ? preprocess_backward_kernel<Degree, true, false>
                                                   : preprocess_backward_kernel<Degree, false, false>;
    kernel<<<blocks_for(args.gaussians.count, kThreads), kThreads, 0, native(stream)>>>(args);
    check_launch("preprocess_backward_kernel");
}

}  // namespace

int64_t preprocess_backward_blocks(int64_t count) { return blocks_for(count, kThreads); }

void preprocess_backward(const PreprocessBackward& args, Stream stream) {
    if (args.gaussians.count == 0) return;
    if (args.gaussians.colors) return launch<kNoSh>(args, stream);
    switch (args.gaussians.sh_degree) {
        case 0:
            return launch<0>(args, stream);
        case 1:
            return launch<1>(args, stream);
        case 2:
            return launch<2>(args, stream);
        default:
            return launch<3>(args, stream);
    }
}

}  // namespace gs::cuda
