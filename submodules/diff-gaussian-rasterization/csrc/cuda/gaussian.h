// gaussian.h: one Gaussian on its way to the screen. preprocess runs it forward, preprocess_backward runs it again
// and then back.
#pragma once
#include "../common/covariance.h"
#include "../common/projection.h"
#include "../common/sh.h"
#include "device.h"

namespace gs::cuda {

__device__ __forceinline__ Vec3<float> load3(const float* p, int64_t i) {
    return {p[3 * i], p[3 * i + 1], p[3 * i + 2]};
}
__device__ __forceinline__ void store3(float* p, int64_t i, Vec3<float> v) {
    p[3 * i] = v.x, p[3 * i + 1] = v.y, p[3 * i + 2] = v.z;
}

// Between stored and used: logarithms, logits and unnormalized quaternions are what training optimizes.
struct Shape {
    Vec4<float> quat;   // as used
    float norm;         // length of the stored one, where it was normalized
    Vec3<float> scale;  // as used, scale_modifier included
    Sym3<float> cov;
};

__device__ __forceinline__ Shape load_shape(const Gaussians<float>& g, int64_t i) {
    Shape s{};
    if (g.cov3d) {
        const float* c = g.cov3d + 6 * i;
        s.cov = {c[0], c[1], c[2], c[3], c[4], c[5]};
        return s;
    }
    const float* q = g.quats + 4 * i;
    s.quat = {q[0], q[1], q[2], q[3]};
    s.scale = load3(g.scales, i);
    s.norm = 1.f;
    if (g.raw) {
        s.norm = quat_norm(s.quat);
        s.quat = normalize_quat(s.quat);
        s.scale = {expf(s.scale.x), expf(s.scale.y), expf(s.scale.z)};
    }
    s.scale = mul(g.scale_modifier, s.scale);
    s.cov = covariance(s.quat, s.scale);
    return s;
}

__device__ __forceinline__ float load_opacity(const Gaussians<float>& g, int64_t i) {
    return g.raw ? sigmoid(g.opacities[i]) : g.opacities[i];
}

// The determinant of a long thin ellipse is a small difference of large products: this is exact to an ulp or two.
__device__ __forceinline__ float exact_determinant(Sym2<float> m) {
    const float w = __fmul_rn(m.xy, m.xy);
    return __fadd_rn(__fmaf_rn(m.xx, m.yy, -w), __fmaf_rn(-m.xy, m.xy, w));
}

// Coefficients of the color that a degree needs beyond the first, as floats per Gaussian.
template <int Degree>
constexpr int kRestFloats = Degree > 0 ? 3 * ((Degree + 1) * (Degree + 1) - 1) : 1;

// Rows of the shared copy are an odd number of floats apart, so that 32 lanes reading their rows hit 32 banks.
template <int Degree>
constexpr int kRestPitch = kRestFloats<Degree> | 1;

// Copies the first kRestFloats floats of 32 consecutive rows of sh_rest into shared memory, with whole-warp loads:
// a lane reading its own 180-byte row would touch 32 sectors per instruction. Rows outside `wanted` are skipped. The
// copy has arrived after await_rest.
template <int Degree>
__device__ __forceinline__ void start_rest(const Gaussians<float>& g, int64_t first, unsigned wanted, float* shared) {
    constexpr int kFloats = kRestFloats<Degree>, kPitch = kRestPitch<Degree>;
    const int stride = 3 * g.rest_count;
    const float* rows = g.sh_rest + first * stride;
    const int lane = lane_id();
    const bool whole = stride == kFloats && kPitch == kFloats && first + kWarp <= g.count &&
                       reinterpret_cast<uintptr_t>(g.sh_rest) % 16 == 0;
    if (whole) {  // the copy has the layout of the original: 16 bytes at a time
#pragma unroll
        for (int at = 0; at < kWarp * kFloats; at += 4 * kWarp) {
            const int i = at + 4 * lane;
            const unsigned rows_of_these = (1u << (i / kFloats)) | (1u << ((i + 3) / kFloats));
            if (i < kWarp * kFloats && (wanted & rows_of_these)) copy_async16(shared + i, rows + i);
        }
    } else {
#pragma unroll 5
        for (int i = lane; i < kWarp * kFloats; i += kWarp) {
            const int row = i / kFloats, column = i % kFloats;
            if (wanted >> row & 1) shared[row * kPitch + column] = rows[int64_t(row) * stride + column];
        }
    }
}

__device__ __forceinline__ void await_rest() {
    copy_async_wait();
    __syncwarp();
}

template <int Degree>
__device__ __forceinline__ void stage_rest(const Gaussians<float>& g, int64_t first, unsigned wanted, float* shared) {
    start_rest<Degree>(g, first, wanted, shared);
    await_rest();
}

}  // namespace gs::cuda
