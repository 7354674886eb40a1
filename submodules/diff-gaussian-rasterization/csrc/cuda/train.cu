// The end of a training step: from gradients of splats to moved Gaussians, in one pass over memory. CUDA backend.
//
// It is preprocess_backward and Adam in one, so no gradient of a Gaussian is ever stored. The step is bound by memory, 12
// bytes read and 12 written for each of the 59 numbers of a Gaussian, and so by how evenly these are read, and by how few:
// rows that the view does not show wait (see Waiting), and catch_up lets them make up for it before a view can show them.
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
constexpr int kDealtBlocksPerSm = 4;  // it keeps more in registers
constexpr int kAhead = 2;             // loads of 16 bytes that a thread has under way, per array

__device__ __forceinline__ void load4(float (&to)[4], const float* from) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void store4(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// Some of a block's rows, in shared memory.
struct RowSet {
    uint32_t words[kThreads / kWarp];

    // All threads call, each for its row; a barrier must follow.
    __device__ __forceinline__ void set(bool own) {
        const unsigned word = __ballot_sync(kFullWarp, own);
        if (lane_id() == 0) words[threadIdx.x / kWarp] = word;
    }
    __device__ __forceinline__ bool has(int row) const { return words[row / kWarp] >> (row % kWarp) & 1; }
};

// Which row the i-th of a block's numbers belongs to, with 3 or 3 rest_count of them in a row.
struct RowOfThree {
    __device__ __forceinline__ int operator()(int i) const { return i / 3; }
};
struct RowOfRest {
    uint32_t inverse;  // 2^32 / row length, rounded up: exact for small i
    explicit RowOfRest(int rest_count) : inverse(rest_count ? UINT32_MAX / (3 * uint32_t(rest_count)) + 1 : 0) {}
    __device__ __forceinline__ int operator()(int i) const { return int(uint64_t(i) * inverse >> 32); }
};

// What a block shares. Rows are an odd number of floats apart, so that 32 lanes writing theirs hit 32 banks.
template <int Degree>
struct Shared {
    static constexpr int kBasis = sh_count(Degree) - 1;
    static constexpr int kPitch = (kBasis + 3) | 1;

    Camera<float> camera;
    alignas(16) float rest[kThreads * 3 * kMaxRestCount];  // the parameters, as they lie in memory
    alignas(16) float mean_grads[3 * kThreads];
    alignas(16) float scale_grads[3 * kThreads];
    float light[kThreads * kPitch];  // per row: basis[1 ..], then the gradient of the color
    RowSet moving;
};

// Calls update(i, m, v, param) for those of a block's `count` numbers from `begin` on whose rows are in `moving`. `staged`:
// the parameters, where they are in shared memory already.
template <typename RowOf, typename Update>
__device__ __forceinline__ void walk(const Trained& t, int64_t begin, int count, const float* staged,
                                     const RowSet& moving, RowOf row_of, Update update) {
    float *const param = t.param + begin, *const m = t.exp_avg + begin, *const v = t.exp_avg_sq + begin;
    const int whole = count / 4 * 4;
    constexpr int kStride = 4 * kThreads;
    for (int at = 4 * int(threadIdx.x); at < whole; at += kAhead * kStride) {
        float p4[kAhead][4], m4[kAhead][4], v4[kAhead][4];
        bool first[kAhead], last[kAhead];  // four numbers belong to at most two rows
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int i = at + k * kStride;
            first[k] = i < whole && moving.has(row_of(i)), last[k] = i < whole && moving.has(row_of(i + 3));
            if (!first[k] && !last[k]) continue;
            load4(m4[k], m + i), load4(v4[k], v + i), load4(p4[k], (staged ? staged : param) + i);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int i = at + k * kStride;
            if (!first[k] && !last[k]) continue;
            const int row = row_of(i);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (row_of(i + e) == row ? first[k] : last[k]) update(i + e, m4[k][e], v4[k][e], p4[k][e]);
            store4(m + i, m4[k]), store4(v + i, v4[k]), store4(param + i, p4[k]);
        }
    }
    for (int i = whole + int(threadIdx.x); i < count; i += kThreads)
        if (moving.has(row_of(i))) update(i, m[i], v[i], param[i]);
}

// Opacity and quaternion of row i: one and four numbers a row, which a thread per row reads as evenly.
template <typename Args>
__device__ __forceinline__ void move_own(const Args& p, int64_t i, const GaussianGrad& grad) {
    const Trained &o = p.opacities, &q = p.quats;
    adam_value(p.rates, o.step_size, grad.opacity, o.exp_avg[i], o.exp_avg_sq[i], o.param[i]);
    float4 *const param = reinterpret_cast<float4*>(q.param) + i, *const m = reinterpret_cast<float4*>(q.exp_avg) + i,
                  *const v = reinterpret_cast<float4*>(q.exp_avg_sq) + i;
    float4 p4 = *param, m4 = *m, v4 = *v;
    adam_four(p.rates, q.step_size, {grad.quat.x, grad.quat.y, grad.quat.z, grad.quat.w}, m4, v4, p4);
    *param = p4, *m = m4, *v = v4;
}

// `count` floats from global to shared memory, at least those of the rows that move, without waiting for them.
template <typename RowOf>
__device__ __forceinline__ void copy_async(float* shared, const float* global, int count, const RowSet& moving,
                                           RowOf row_of) {
    const int whole = count / 4 * 4;
    for (int i = 4 * int(threadIdx.x); i < whole; i += 4 * kThreads)
        if (moving.has(row_of(i)) || moving.has(row_of(i + 3))) copy_async16(shared + i, global + i);
    for (int i = whole + int(threadIdx.x); i < count; i += kThreads) shared[i] = global[i];
}

// By one block. Sums in double, so that the size of the image does not show.
__device__ __forceinline__ void add_losses(const LossSums& sums, float* losses) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ double of_warp[2][kWarps];
    double ssim = 0.0, l1 = 0.0;
    for (int64_t i = threadIdx.x; i < sums.blocks; i += kThreads) ssim += sums.ssim[i], l1 += sums.l1[i];
    ssim = warp_sum(ssim), l1 = warp_sum(l1);
    if (lane_id() == 0) of_warp[0][threadIdx.x / kWarp] = ssim, of_warp[1][threadIdx.x / kWarp] = l1;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double total_ssim = 0.0, total_l1 = 0.0;
    for (int w = 0; w < kWarps; ++w) total_ssim += of_warp[0][w], total_l1 += of_warp[1][w];
    const double mean_ssim = total_ssim / sums.count, mean_l1 = total_l1 / sums.count;
    losses[0] += float((1.0 - sums.lambda) * mean_l1 + sums.lambda * (1.0 - mean_ssim));
    losses[1] += float(mean_l1);
    losses[2] += 1.f;
}

// By one block: a step more is missed since each step of the window, and none since this one.
template <typename Args>
__device__ __forceinline__ void note_step(const Args& p, bool taken) {
    static_assert(kWindow == kThreads);
    Missed& slot = p.waiting.missed[threadIdx.x];
    if (int(threadIdx.x) == p.step % kWindow) {
        slot = {{0.f, 0.f, 0.f, 0.f, 0.f, 0.f}, 1.f, 1.f};
    } else if (taken) {
        Missed missed = slot;
        missed.decay1 *= p.beta1, missed.decay2 *= p.rates.beta2;
        const float ratio = missed.decay1 * rsqrtf(missed.decay2) / p.rates.inv_sqrt_bias2;
        const Trained* trained[6] = {&p.means, &p.sh_dc, &p.sh_rest, &p.opacities, &p.scales, &p.quats};
#pragma unroll
        for (int k = 0; k < 6; ++k) missed.drift[k] = fmaf(trained[k]->step_size, ratio, missed.drift[k]);
        slot = missed;
    }
}

template <int Degree>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    preprocess_backward_adam_kernel(const __grid_constant__ PreprocessBackwardAdam p, RowOfRest row_of_rest) {
    using Shared = Shared<Degree>;
    __shared__ Shared s;
    const Gaussians<float>& g = p.gaussians;
    const int stride = 3 * g.rest_count;
    const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
    const int rows = int(::min(g.count - first, int64_t(kThreads)));
    const bool inside = i < g.count, seen = inside && p.radii[i] > 0;
    const bool moves = inside && (seen || !p.waiting.moved_at);
    s.moving.set(moves);
    if (threadIdx.x == 0)
        s.camera =
            make_camera(p.view.world_to_camera, p.view.intrinsics, p.view.camera_center, p.view.width, p.view.height);
    const bool taken = int64_t(p.totals->entries) <= p.capacity;
    if (blockIdx.x == 0) {
        if (p.waiting.moved_at) note_step(p, taken);
        if (taken)
            add_losses(p.loss, p.losses);
        else if (threadIdx.x == 0)
            p.losses[3] += 1.f;
    }
    if (!taken) return;
    __syncthreads();
    copy_async(s.rest, p.sh_rest.param + first * stride, rows * stride, s.moving, row_of_rest);

    GaussianGrad grad{};
    if (seen) grad = gaussian_vjp(g, s.camera, i, p.grads + i * kGradSize);
    copy_async_wait();
    __syncthreads();

    float basis[sh_count(Degree)] = {};
    Vec3<float> g_color = {0.f, 0.f, 0.f};
    if (seen) {
        g_color = through_clamp(p.splats[i], grad.splat.color);
        grad.mean = add(grad.mean, sh_color_vjp<Degree>(g, s.camera, i, g_color, s.rest + threadIdx.x * stride, basis));
        add_statistics(grad.splat, p.view.width, p.view.height, i, p.grad_norm_sum, p.visits, p.abs_grad_norm_sum);
    }
    if (moves) {
        move_own(p, i, grad);
        if (p.waiting.moved_at) p.waiting.moved_at[i] = p.step;
    }
    float* const light = s.light + threadIdx.x * Shared::kPitch;
#pragma unroll
    for (int k = 0; k < Shared::kBasis; ++k) light[k] = basis[k + 1];
    store3(light + Shared::kBasis, 0, g_color);
    store3(s.mean_grads, threadIdx.x, grad.mean);
    store3(s.scale_grads, threadIdx.x, grad.scale);
    __syncthreads();

    const auto move = [&](const Trained& t, int64_t begin, int count, const float* staged, auto row_of, auto grad_of) {
        walk(t, begin, count, staged, s.moving, row_of, [&](int at, float& m, float& v, float& param) {
            adam_value(p.rates, t.step_size, grad_of(at), m, v, param);
        });
    };
    move(p.sh_rest, first * stride, rows * stride, s.rest, row_of_rest, [&](int at) {
        const int row = row_of_rest(at), column = at - row * stride, k = column / 3;
        const float* const light = s.light + row * Shared::kPitch;
        return k < Shared::kBasis ? light[k] * light[Shared::kBasis + column - 3 * k] : 0.f;
    });
    move(p.sh_dc, 3 * first, 3 * rows, nullptr, RowOfThree(),
         [&](int at) { return float(kSh0) * s.light[at / 3 * Shared::kPitch + Shared::kBasis + at % 3]; });
    move(p.means, 3 * first, 3 * rows, nullptr, RowOfThree(), [&](int at) { return s.mean_grads[at]; });
    move(p.scales, 3 * first, 3 * rows, nullptr, RowOfThree(), [&](int at) { return s.scale_grads[at]; });
}

// ---- the same, of several cameras ------------------------------------------------------------------------------------

__device__ __forceinline__ Camera<float> camera_of(const View<float>& v) {
    return make_camera(v.world_to_camera, v.intrinsics, v.camera_center, v.width, v.height);
}

__device__ __forceinline__ const float* grad_of(const DealtBackwardAdam& p, int32_t slot) {
    return p.grads + int64_t(slot >> kChannelBits) * kGradSize;
}

// The sum over cameras of what passes the projection, and the statistics of each.
__device__ __forceinline__ GaussianGrad geometry_vjp(const DealtBackwardAdam& p, const Camera<float>* cameras,
                                                     int64_t i) {
    GaussianGrad sum{};
    for (int c = 0; c < p.cameras; ++c) {
        const int32_t slot = p.slots[c * p.gaussians.count + i];
        if (slot < 0) continue;
        const GaussianGrad one = gaussian_vjp(p.gaussians, cameras[c], i, grad_of(p, slot));
        sum.mean = add(sum.mean, one.mean);
        sum.scale = add(sum.scale, one.scale);
        sum.quat = {sum.quat.x + one.quat.x, sum.quat.y + one.quat.y, sum.quat.z + one.quat.z, sum.quat.w + one.quat.w};
        sum.opacity += one.opacity;
        add_statistics(one.splat, p.views[c].width, p.views[c].height, i, p.grad_norm_sum, p.visits,
                       p.abs_grad_norm_sum);
    }
    return sum;
}

// The same of colors: of the coefficients [sh_count(Degree)], and the mean's part.
template <int Degree>
__device__ __forceinline__ Vec3<float> colors_vjp(const DealtBackwardAdam& p, const Camera<float>* cameras, int64_t i,
                                                  const float* rest, Vec3<float> (&sh)[sh_count(Degree)]) {
    Vec3<float> mean = {0.f, 0.f, 0.f};
    for (int c = 0; c < p.cameras; ++c) {
        const int32_t slot = p.slots[c * p.gaussians.count + i];
        if (slot < 0) continue;
        const float* const grad = grad_of(p, slot);
        const Vec3<float> g_color = {slot & 1 ? grad[kRed] : 0.f, slot & 2 ? grad[kGreen] : 0.f,
                                     slot & 4 ? grad[kBlue] : 0.f};
        float basis[sh_count(Degree)];
        mean = add(mean, sh_color_vjp<Degree>(p.gaussians, cameras[c], i, g_color, rest, basis));
#pragma unroll
        for (int k = 0; k < sh_count(Degree); ++k) sh[k] = add(sh[k], mul(basis[k], g_color));
    }
    return mean;
}

__device__ __forceinline__ Vec3<float> scale_pull(const DealtBackwardAdam& p, int64_t i) {
    const Vec3<float> log_scale = load3(p.gaussians.scales, i);
    return mul(p.scale_pull, Vec3<float>{expf(log_scale.x), expf(log_scale.y), expf(log_scale.z)});
}

__device__ __forceinline__ bool seen_by_any(const DealtBackwardAdam& p, int64_t i) {
    bool seen = false;
    for (int c = 0; c < p.cameras; ++c) seen |= p.slots[c * p.gaussians.count + i] >= 0;
    return seen;
}

template <int Degree>
__global__ void __launch_bounds__(kThreads, kDealtBlocksPerSm)
    dealt_backward_adam_kernel(const __grid_constant__ DealtBackwardAdam p, RowOfRest row_of_rest) {
    __shared__ Camera<float> cameras[kMaxCameras];
    __shared__ alignas(16) float rest[kThreads * 3 * kMaxRestCount];  // the parameters, later their gradients
    __shared__ float dc_grads[3 * kThreads], mean_grads[3 * kThreads], scale_grads[3 * kThreads];
    __shared__ RowSet moving;
    const Gaussians<float>& g = p.gaussians;
    const int stride = 3 * g.rest_count;
    const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
    const int rows = int(::min(g.count - first, int64_t(kThreads)));
    const bool inside = i < g.count, seen = inside && seen_by_any(p, i);
    const bool moves = inside && (seen || !p.waiting.moved_at);
    moving.set(moves);
    if (int(threadIdx.x) < p.cameras) cameras[threadIdx.x] = camera_of(p.views[threadIdx.x]);
    if (blockIdx.x == 0 && p.waiting.moved_at) note_step(p, true);
    __syncthreads();
    copy_async(rest, p.sh_rest.param + first * stride, rows * stride, moving, row_of_rest);

    GaussianGrad grad{};
    if (seen) grad = geometry_vjp(p, cameras, i);
    copy_async_wait();
    __syncthreads();

    Vec3<float> sh[sh_count(Degree)] = {};
    float* const own_rest = rest + threadIdx.x * stride;
    if (seen) grad.mean = add(grad.mean, colors_vjp<Degree>(p, cameras, i, own_rest, sh));
    const float part = 1.f / float(p.cameras);
    if (moves) {
        const float opacity = sigmoid(g.opacities[i]);
        grad.opacity = fmaf(part, grad.opacity, p.opacity_pull * opacity * (1.f - opacity));
        grad.quat = {part * grad.quat.x, part * grad.quat.y, part * grad.quat.z, part * grad.quat.w};
        move_own(p, i, grad);
        if (p.waiting.moved_at) p.waiting.moved_at[i] = p.step;
    }
#pragma unroll
    for (int k = 1; k < sh_count(Degree); ++k) store3(own_rest, k - 1, mul(part, sh[k]));
    for (int k = 3 * (sh_count(Degree) - 1); k < stride; ++k) own_rest[k] = 0.f;
    store3(dc_grads, threadIdx.x, mul(part, sh[0]));
    store3(mean_grads, threadIdx.x, mul(part, grad.mean));
    store3(scale_grads, threadIdx.x, add(mul(part, grad.scale), moves ? scale_pull(p, i) : Vec3<float>{0.f, 0.f, 0.f}));
    __syncthreads();

    const auto move = [&](const Trained& t, int length, const float* grads, auto row_of) {
        walk(t, first * length, rows * length, nullptr, moving, row_of, [&](int at, float& m, float& v, float& param) {
            adam_value(p.rates, t.step_size, grads[at], m, v, param);
        });
    };
    move(p.sh_rest, stride, rest, row_of_rest);
    move(p.sh_dc, 3, dc_grads, RowOfThree());
    move(p.means, 3, mean_grads, RowOfThree());
    move(p.scales, 3, scale_grads, RowOfThree());
}

// ---- catching up ---------------------------------------------------------------------------------------------------

// Where a parameter is after the steps that its row missed.
__device__ __forceinline__ float drifted(float param, float m, float v, float drift, float eps) {
    return param - drift * m / (sqrtf(v) + eps);
}

__device__ __forceinline__ Vec3<float> drifted3(const Trained& t, int64_t i, float drift, float eps) {
    const Vec3<float> p = load3(t.param, i), m = load3(t.exp_avg, i), v = load3(t.exp_avg_sq, i);
    return {drifted(p.x, m.x, v.x, drift, eps), drifted(p.y, m.y, v.y, drift, eps), drifted(p.z, m.z, v.z, drift, eps)};
}

// False only if preprocess finds radius 0 for such a Gaussian, wherever within `moves` it lies, and though the logarithms
// of its scales be larger by `grows`: it is behind the camera, or its splat, estimated generously, beside the image.
__device__ __forceinline__ bool near_the_image(const View<float>& view, const Camera<float>& camera, Vec3<float> mean,
                                               Vec3<float> log_scale, float moves = 0.f, float grows = 0.f) {
    const Vec3<float> at = to_camera(camera, mean);
    if (at.z + moves <= view.near_depth) return false;
    const float closest = at.z - moves;
    if (closest <= view.near_depth) return true;
    const float sigma = expf(max(log_scale.x, max(log_scale.y, log_scale.z)) + grows) + moves;
    const float jx = camera.fx * camera.fx * (1.f + camera.limit_x * camera.limit_x);
    const float jy = camera.fy * camera.fy * (1.f + camera.limit_y * camera.limit_y);
    const float spread = (jx + jy) * (sigma / closest) * (sigma / closest);  // at least the splat's largest variance
    const float reach = float(kExtentSigmas) * sqrtf(spread + float(kBlur) + 1.f) + float(kTileSize) + 2.f;
    const Vec2<float> center = project_mean(camera, at);
    return !(center.x < -reach || center.y < -reach || center.x > float(view.width) + reach ||
             center.y > float(view.height) + reach);
}

// The most that |m| / sqrt(v) can be, by the inequality of Cauchy and Schwarz: (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 /
// beta2)), for 0.9 and 0.999 or powers of them.
constexpr float kFastest = 7.3f;

// If not, row i may go on waiting: neither where it should be nor where it still is does a view show it. Moments are not
// read of what is too far off to have come near.
__device__ __forceinline__ bool may_be_seen(const CatchUp& p, const Camera<float>* cameras, int64_t i,
                                            const Missed& missed) {
    const Vec3<float> mean_now = load3(p.means.param, i), scale_now = load3(p.scales.param, i);
    const float moves = sqrtf(3.f) * kFastest * missed.drift[0], grows = kFastest * missed.drift[4];
    bool seen = false;
    for (int c = 0; c < p.cameras && !seen; ++c)
        seen = near_the_image(p.views[c], cameras[c], mean_now, scale_now, moves, grows);
    if (!seen) return false;
    const Vec3<float> mean = drifted3(p.means, i, missed.drift[0], p.eps);
    const Vec3<float> scale = drifted3(p.scales, i, missed.drift[4], p.eps);
    seen = false;
    for (int c = 0; c < p.cameras && !seen; ++c)
        seen = near_the_image(p.views[c], cameras[c], mean, scale) ||
               near_the_image(p.views[c], cameras[c], mean_now, scale_now);
    return seen;
}

__global__ void __launch_bounds__(kThreads) catch_up_kernel(const __grid_constant__ CatchUp p, RowOfRest row_of_rest) {
    __shared__ Missed missed[kThreads];
    __shared__ Camera<float> cameras[kMaxCameras];
    __shared__ RowSet moving;
    const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
    const int rows = int(::min(p.count - first, int64_t(kThreads))), stride = 3 * p.rest_count;
    const int moved_at = i < p.count ? p.waiting.moved_at[i] : p.step;
    bool moves = moved_at != p.step;
    const bool asked = moves || (p.may_show && i < p.count);
    if (int(threadIdx.x) < p.cameras && !p.all) cameras[threadIdx.x] = camera_of(p.views[threadIdx.x]);
    if (!__syncthreads_or(asked)) return;
    Missed& own = missed[threadIdx.x];
    if (asked) {
        own = p.waiting.missed[uint32_t(moved_at) % kWindow];
        const bool shown = p.all || may_be_seen(p, cameras, i, own);
        if (p.may_show) p.may_show[i] = shown;
        moves = moves && shown;
    }
    moving.set(moves);
    if (!__syncthreads_or(moves)) return;

    const auto update = [&](const Missed& row, int which, float& m, float& v, float& param) {
        param = drifted(param, m, v, row.drift[which], p.eps);
        m *= row.decay1, v *= row.decay2;
    };
    if (moves) {
        p.waiting.moved_at[i] = p.step;
        update(own, 3, p.opacities.exp_avg[i], p.opacities.exp_avg_sq[i], p.opacities.param[i]);
        float m[4], v[4], q[4];
        load4(m, p.quats.exp_avg + 4 * i), load4(v, p.quats.exp_avg_sq + 4 * i), load4(q, p.quats.param + 4 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) update(own, 5, m[e], v[e], q[e]);
        store4(p.quats.exp_avg + 4 * i, m), store4(p.quats.exp_avg_sq + 4 * i, v), store4(p.quats.param + 4 * i, q);
    }
    const auto move = [&](const Trained& t, int which, int length, auto row_of) {
        walk(t, first * length, rows * length, nullptr, moving, row_of,
             [&](int at, float& m, float& v, float& param) { update(missed[row_of(at)], which, m, v, param); });
    };
    if (p.sh_dc.param) {
        move(p.sh_rest, 2, stride, row_of_rest);
        move(p.sh_dc, 1, 3, RowOfThree());
    }
    move(p.means, 0, 3, RowOfThree());
    move(p.scales, 4, 3, RowOfThree());
}

}  // namespace

void preprocess_backward_adam(const PreprocessBackwardAdam& args, Stream stream) {
    PreprocessBackwardAdam p = args;
    p.gaussians.raw = true;
    p.gaussians.cov3d = p.gaussians.colors = nullptr;
    const RowOfRest row_of_rest(args.gaussians.rest_count);
    const unsigned blocks = std::max(1u, blocks_for(args.gaussians.count, kThreads));  // one keeps the books
    const auto launch = [&](auto kernel) {
        kernel<<<blocks, kThreads, 0, native(stream)>>>(p, row_of_rest);
        check_launch("preprocess_backward_adam_kernel");
    };
    switch (args.gaussians.sh_degree) {
        case 0:
            return launch(preprocess_backward_adam_kernel<0>);
        case 1:
            return launch(preprocess_backward_adam_kernel<1>);
        case 2:
            return launch(preprocess_backward_adam_kernel<2>);
        default:
            return launch(preprocess_backward_adam_kernel<3>);
    }
}

void dealt_backward_adam(const DealtBackwardAdam& args, Stream stream) {
    const unsigned blocks = std::max(1u, blocks_for(args.gaussians.count, kThreads));  // one keeps the books
    const auto launch = [&](auto kernel) {
        kernel<<<blocks, kThreads, 0, native(stream)>>>(args, RowOfRest(args.gaussians.rest_count));
        check_launch("dealt_backward_adam_kernel");
    };
    switch (args.gaussians.sh_degree) {
        case 0:
            return launch(dealt_backward_adam_kernel<0>);
        case 1:
            return launch(dealt_backward_adam_kernel<1>);
        case 2:
            return launch(dealt_backward_adam_kernel<2>);
        default:
            return launch(dealt_backward_adam_kernel<3>);
    }
}

void catch_up(const CatchUp& args, Stream stream) {
    if (args.count == 0) return;
    catch_up_kernel<<<blocks_for(args.count, kThreads), kThreads, 0, native(stream)>>>(args,
                                                                                       RowOfRest(args.rest_count));
    check_launch("catch_up_kernel");
}

}  // namespace gs::cuda
