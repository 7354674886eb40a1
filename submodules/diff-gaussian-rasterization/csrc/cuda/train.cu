// The end of a training step: from gradients of splats to moved Gaussians, in one pass over memory. CUDA backend.
//
// It is preprocess_backward and Adam in one, so no gradient of a Gaussian is ever stored. All rows move, also those that
// the view does not show: their gradient is zero. The step is bound by memory, 12 bytes read and 12 written for each of
// the 59 numbers of a Gaussian, and so by how evenly these are read.
//
// A block owns consecutive rows. First, a thread per row finds the row's gradients, and leaves them in shared memory:
// for the spherical harmonics only the basis and the gradient of the color, whose products they are. Then all threads
// walk through the rows' numbers as they lie in memory, four at a time.
#include "adam.h"
#include "gaussian_vjp.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 5;
constexpr int kAhead = 2;  // loads of 16 bytes that a thread has under way, per array

// What a block shares. Rows are an odd number of floats apart, so that 32 lanes writing theirs hit 32 banks.
template <int Degree>
struct Shared {
    static constexpr int kBasis = sh_count(Degree) - 1;
    static constexpr int kPitch = (kBasis + 3) | 1;

    Camera<float> camera;
    alignas(16) float rest[kThreads * 3 * kMaxRestCount];  // the parameters, as they lie in memory
    alignas(16) float mean_grads[3 * kThreads];
    alignas(16) float scale_grads[3 * kThreads];
    float light[kThreads * kPitch];                        // per row: basis[1 ..], then the gradient of the color
};

// Moves `count` numbers from `begin` on; grad(i) is the gradient of the i-th of them. `staged`: the parameters, where they
// are in shared memory already.
template <typename Grad>
__device__ __forceinline__ void move(const Trained& t, const AdamRates& rates, int64_t begin, int count,
                                     const float* staged, Grad grad) {
    float *const param = t.param + begin, *const m = t.exp_avg + begin, *const v = t.exp_avg_sq + begin;
    const int whole = count / 4 * 4;
    constexpr int kStride = 4 * kThreads;
    for (int at = 4 * int(threadIdx.x); at < whole; at += kAhead * kStride) {
        float4 p4[kAhead], m4[kAhead], v4[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int i = at + k * kStride;
            if (i >= whole) break;
            m4[k] = *reinterpret_cast<const float4*>(m + i);
            v4[k] = *reinterpret_cast<const float4*>(v + i);
            p4[k] = *reinterpret_cast<const float4*>((staged ? staged : param) + i);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int i = at + k * kStride;
            if (i >= whole) break;
            const float4 g4 = {grad(i), grad(i + 1), grad(i + 2), grad(i + 3)};
            adam_four(rates, t.step_size, g4, m4[k], v4[k], p4[k]);
            *reinterpret_cast<float4*>(m + i) = m4[k];
            *reinterpret_cast<float4*>(v + i) = v4[k];
            *reinterpret_cast<float4*>(param + i) = p4[k];
        }
    }
    for (int i = whole + int(threadIdx.x); i < count; i += kThreads)
        adam_value(rates, t.step_size, grad(i), m[i], v[i], param[i]);
}

// Opacity and quaternion of row i: one and four numbers a row, which a thread per row reads as evenly.
__device__ __forceinline__ void move_own(const PreprocessBackwardAdam& p, int64_t i, const GaussianGrad& grad) {
    const Trained &o = p.opacities, &q = p.quats;
    adam_value(p.rates, o.step_size, grad.opacity, o.exp_avg[i], o.exp_avg_sq[i], o.param[i]);
    float4 *const param = reinterpret_cast<float4*>(q.param) + i, *const m = reinterpret_cast<float4*>(q.exp_avg) + i,
                  *const v = reinterpret_cast<float4*>(q.exp_avg_sq) + i;
    float4 p4 = *param, m4 = *m, v4 = *v;
    adam_four(p.rates, q.step_size, {grad.quat.x, grad.quat.y, grad.quat.z, grad.quat.w}, m4, v4, p4);
    *param = p4, *m = m4, *v = v4;
}

// `count` floats from global to shared memory, without waiting for them.
__device__ __forceinline__ void copy_async(float* shared, const float* global, int count) {
    const int whole = count / 4 * 4;
    for (int i = 4 * int(threadIdx.x); i < whole; i += 4 * kThreads) copy_async16(shared + i, global + i);
    for (int i = whole + int(threadIdx.x); i < count; i += kThreads) shared[i] = global[i];
}

// By one block. Sums in double, so that the size of the image does not show.
__device__ __forceinline__ void add_losses(const LossSums& sums, float* losses) {
    __shared__ double total_ssim, total_l1;
    if (threadIdx.x == 0) total_ssim = total_l1 = 0.0;
    __syncthreads();
    double ssim = 0.0, l1 = 0.0;
    for (int64_t i = threadIdx.x; i < sums.blocks; i += kThreads) ssim += sums.ssim[i], l1 += sums.l1[i];
    atomicAdd(&total_ssim, ssim);
    atomicAdd(&total_l1, l1);
    __syncthreads();
    if (threadIdx.x != 0) return;
    const double mean_ssim = total_ssim / sums.count, mean_l1 = total_l1 / sums.count;
    losses[0] += float((1.0 - sums.lambda) * mean_l1 + sums.lambda * (1.0 - mean_ssim));
    losses[1] += float(mean_l1);
    losses[2] += 1.f;
}

template <int Degree>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    preprocess_backward_adam_kernel(const __grid_constant__ PreprocessBackwardAdam p, uint32_t rest_inverse) {
    using Shared = Shared<Degree>;
    __shared__ Shared s;
    const Gaussians<float>& g = p.gaussians;
    const int stride = 3 * g.rest_count;
    const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
    const int rows = int(::min(g.count - first, int64_t(kThreads)));
    copy_async(s.rest, p.sh_rest.param + first * stride, rows * stride);
    if (threadIdx.x == 0)
        s.camera = make_camera(p.view.world_to_camera, p.view.intrinsics, p.view.camera_center, p.view.width, p.view.height);
    const bool inside = i < g.count, seen = inside && p.radii[i] > 0;
    if (int64_t(p.totals->entries) > p.capacity) {
        if (i == 0) p.losses[3] += 1.f;
        return;
    }
    if (blockIdx.x == 0) add_losses(p.loss, p.losses);
    __syncthreads();

    GaussianGrad grad{};
    if (seen) grad = gaussian_vjp(g, s.camera, i, p.grads);
    copy_async_wait();
    __syncthreads();

    float basis[sh_count(Degree)] = {};
    Vec3<float> g_color = {0.f, 0.f, 0.f};
    if (seen) {
        g_color = through_clamp(p.splats[i], grad.splat.color);
        grad.mean = add(grad.mean, sh_color_vjp<Degree>(g, s.camera, i, g_color, s.rest + threadIdx.x * stride, basis));
        add_statistics(grad.splat, p.view.width, p.view.height, i, p.grad_norm_sum, p.visits, p.abs_grad_norm_sum);
    }
    if (inside) move_own(p, i, grad);
    float* const light = s.light + threadIdx.x * Shared::kPitch;
#pragma unroll
    for (int k = 0; k < Shared::kBasis; ++k) light[k] = basis[k + 1];
    store3(light + Shared::kBasis, 0, g_color);
    store3(s.mean_grads, threadIdx.x, grad.mean);
    store3(s.scale_grads, threadIdx.x, grad.scale);
    __syncthreads();

    move(p.sh_rest, p.rates, first * stride, rows * stride, s.rest, [&](int at) {
        const int row = int(uint64_t(at) * rest_inverse >> 32), column = at - row * stride, k = column / 3;
        const float* const light = s.light + row * Shared::kPitch;
        return k < Shared::kBasis ? light[k] * light[Shared::kBasis + column - 3 * k] : 0.f;
    });
    move(p.sh_dc, p.rates, 3 * first, 3 * rows, nullptr, [&](int at) {
        return float(kSh0) * s.light[at / 3 * Shared::kPitch + Shared::kBasis + at % 3];
    });
    move(p.means, p.rates, 3 * first, 3 * rows, nullptr, [&](int at) { return s.mean_grads[at]; });
    move(p.scales, p.rates, 3 * first, 3 * rows, nullptr, [&](int at) { return s.scale_grads[at]; });
}

}  // namespace

void preprocess_backward_adam(const PreprocessBackwardAdam& args, Stream stream) {
    PreprocessBackwardAdam p = args;
    p.gaussians.raw = true;
    p.gaussians.cov3d = p.gaussians.colors = nullptr;
    const uint32_t stride = 3 * uint32_t(args.gaussians.rest_count);
    const uint32_t rest_inverse = stride ? UINT32_MAX / stride + 1 : 0;  // at * inverse >> 32 is at / stride for small at
    const unsigned blocks = std::max(1u, blocks_for(args.gaussians.count, kThreads));  // one keeps the books
    const auto launch = [&](auto kernel) {
        kernel<<<blocks, kThreads, 0, native(stream)>>>(p, rest_inverse);
        check_launch("preprocess_backward_adam_kernel");
    };
    switch (args.gaussians.sh_degree) {
        case 0: return launch(preprocess_backward_adam_kernel<0>);
        case 1: return launch(preprocess_backward_adam_kernel<1>);
        case 2: return launch(preprocess_backward_adam_kernel<2>);
        default: return launch(preprocess_backward_adam_kernel<3>);
    }
}

}  // namespace gs::cuda
