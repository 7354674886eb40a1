// gaussian_vjp.h: the way back from a splat on the screen to the Gaussian it came from.
#pragma once
#include "gaussian.h"

namespace gs::cuda {

// What blend_backward collected for one splat, in natural units.
struct SplatGrad {
    Vec2<float> mean;  // pixels
    Sym2<float> conic;
    float log_opacity;
    Vec3<float> color;
    float inv_depth;
    Vec2<float> abs_mean;  // sum over pixels of |gradient of mean|
};

__device__ __forceinline__ SplatGrad load_splat_grad(const float* grad, Sym2<float> conic) {
    const float4* record = reinterpret_cast<const float4*>(grad);
    const float4 a = record[0], b = record[1], c = record[2];
    static_assert(kG == 0 && kGx == 1 && kGy == 2 && kGxx == 3 && kGxy == 4 && kGyy == 5 && kRed == 6 && kAbsY == 11);
    SplatGrad g;
    g.log_opacity = a.x;
    g.mean = {conic.xx * a.y + conic.xy * a.z, conic.xy * a.y + conic.yy * a.z};
    g.conic = {-0.5f * a.w, -b.x, -0.5f * b.y};
    g.color = {b.z, b.w, c.x};
    g.inv_depth = c.y;
    g.abs_mean = {kLn2 * c.z, kLn2 * c.w};
    return g;
}

struct GaussianGrad {
    Vec3<float> mean;  // without what comes through the color's viewing direction
    Vec4<float> quat;  // these are gradients of the stored numbers
    Vec3<float> scale;
    Sym3<float> cov;
    float opacity;
    Vec3<float> p;         // of the mean in camera space
    Mat3<float> rotation;  // of the world-to-camera rotation, without p's part
    SplatGrad splat;
};

// `splat_grad` [kGradSize], of Gaussian i's splat.
__device__ __forceinline__ GaussianGrad gaussian_vjp(const Gaussians<float>& g, const Camera<float>& camera, int64_t i,
                                                     const float* splat_grad) {
    const Vec3<float> p = to_camera(camera, load3(g.means, i));
    const Shape shape = load_shape(g, i);
    const Sym2<float> sharp = project_covariance(camera, p, shape.cov);
    const Sym2<float> wide = blurred(sharp);
    const float det = exact_determinant(wide);
    const Sym2<float> conic = inverse(wide, det);

    GaussianGrad out;
    out.splat = load_splat_grad(splat_grad, conic);
    Sym2<float> g_cov = inverse_vjp(wide, det, conic, out.splat.conic);

    const float opacity = load_opacity(g, i);
    float g_opacity = opacity > 0.f ? out.splat.log_opacity / opacity : 0.f;
    if (g.antialiasing) {  // log(opacity * factor): the factor's share needs no opacity
        const Sym2<float> through = antialias_factor_vjp(sharp, out.splat.log_opacity / antialias_factor(sharp));
        g_cov = {g_cov.xx + through.xx, g_cov.xy + through.xy, g_cov.yy + through.yy};
    }
    out.opacity = g.raw ? out.splat.log_opacity * (1.f - opacity) : g_opacity;

    const ProjectCovarianceGrad<float> back = project_covariance_vjp(camera, p, shape.cov, g_cov);
    out.p = add(back.p, project_mean_vjp(camera, p, out.splat.mean));
    out.p.z -= out.splat.inv_depth / (p.z * p.z);
    out.rotation = back.rotation;
    out.cov = back.cov;
    out.mean = matvec_transposed(camera.rotation, out.p);

    if (!g.cov3d) {
        const CovarianceGrad<float> shape_grad = covariance_vjp(shape.quat, shape.scale, back.cov);
        out.quat = shape_grad.q;
        out.scale = mul(g.scale_modifier, shape_grad.s);
        if (g.raw) {
            out.quat = normalize_quat_vjp(shape.quat, shape.norm, shape_grad.q);
            out.scale = {shape_grad.s.x * shape.scale.x, shape_grad.s.y * shape.scale.y,
                         shape_grad.s.z * shape.scale.z};
        }
    }
    return out;
}

// A channel that was clamped at zero is dark for a reason.
__device__ __forceinline__ Vec3<float> through_clamp(const Splat& s, Vec3<float> g_color) {
    return {s.r > 0.f ? g_color.x : 0.f, s.g > 0.f ? g_color.y : 0.f, s.b > 0.f ? g_color.z : 0.f};
}

// The color's part. `rest` are the coefficients of this Gaussian. Returns the gradient of mean - camera center, and the
// basis: the gradient of coefficient k is basis[k] times that of the color.
template <int Degree>
__device__ __forceinline__ Vec3<float> sh_color_vjp(const Gaussians<float>& g, const Camera<float>& camera, int64_t i,
                                                    Vec3<float> g_color, const float* rest,
                                                    float (&basis)[sh_count(Degree)]) {
    const Vec3<float> offset = sub(load3(g.means, i), camera.center);
    const float inv_length = inverse_length(offset);
    const Vec3<float> direction = normalize(offset, inv_length);
    float weight[sh_count(Degree)];
    sh_basis<Degree>(direction, basis);
#pragma unroll
    for (int k = 1; k < sh_count(Degree); ++k) weight[k] = dot(g_color, load3(rest, k - 1));
    return normalize_vjp(direction, inv_length, sh_basis_vjp<Degree>(direction, weight));
}

// What density control collects of a Gaussian that the view shows; any of the sums may be null. Returns the gradient of
// the mean in NDC units.
__device__ __forceinline__ Vec2<float> add_statistics(const SplatGrad& g, int width, int height, int64_t i,
                                                      float* grad_norm_sum, float* visits, float* abs_grad_norm_sum) {
    const Vec2<float> half = {0.5f * float(width), 0.5f * float(height)};
    const Vec2<float> ndc = {g.mean.x * half.x, g.mean.y * half.y};
    const Vec2<float> abs_ndc = {g.abs_mean.x * half.x, g.abs_mean.y * half.y};
    if (grad_norm_sum) grad_norm_sum[i] += sqrtf(ndc.x * ndc.x + ndc.y * ndc.y);
    if (visits) visits[i] += 1.f;
    if (abs_grad_norm_sum) abs_grad_norm_sum[i] += sqrtf(abs_ndc.x * abs_ndc.x + abs_ndc.y * abs_ndc.y);
    return ndc;
}

}  // namespace gs::cuda
