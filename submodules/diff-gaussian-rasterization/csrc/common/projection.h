// projection.h: a 3D Gaussian seen by a pinhole camera is, to first order, a 2D Gaussian (EWA splatting).
//
// Mean: p = R m + t, then u = fx x/z + cx, v = fy y/z + cy, in pixels whose centers lie at (i + 0.5, j + 0.5).
// Covariance: (J R) Sigma (J R)^T + blur, J being the derivative of the projection at p.
#pragma once
#include "constants.h"
#include "types.h"

namespace gs {

template <typename T>
struct Camera {
    Mat3<T> rotation;  // world to camera: x right, y down, z forward
    Vec3<T> translation;
    Vec3<T> center;      // the camera's place in the world
    T fx, fy, cx, cy;    // pixels
    T limit_x, limit_y;  // J is taken at |x/z|, |y/z| no larger than these
};

// world_to_camera [4, 4] and intrinsics [3, 3] row by row; center [3], or null to derive it from the rigid motion.
template <typename T>
GS_HD Camera<T> make_camera(const T* world_to_camera, const T* intrinsics, const T* center, int width, int height) {
    const T* w = world_to_camera;
    Camera<T> c;
    c.rotation = {{w[0], w[1], w[2]}, {w[4], w[5], w[6]}, {w[8], w[9], w[10]}};
    c.translation = {w[3], w[7], w[11]};
    c.center = matvec_transposed(c.rotation, Vec3<T>{-w[3], -w[7], -w[11]});
    if (center) c.center = {center[0], center[1], center[2]};
    c.fx = intrinsics[0], c.fy = intrinsics[4], c.cx = intrinsics[2], c.cy = intrinsics[5];
    c.limit_x = T(kFovMargin) * T(width) / (T(2) * c.fx);
    c.limit_y = T(kFovMargin) * T(height) / (T(2) * c.fy);
    return c;
}

template <typename T>
GS_HD Vec3<T> to_camera(const Camera<T>& c, Vec3<T> mean) {
    return add(matvec(c.rotation, mean), c.translation);
}

template <typename T>
GS_HD Vec2<T> project_mean(const Camera<T>& c, Vec3<T> p) {
    const T inv_z = T(1) / p.z;
    return {c.fx * p.x * inv_z + c.cx, c.fy * p.y * inv_z + c.cy};
}

template <typename T>
GS_HD Vec3<T> project_mean_vjp(const Camera<T>& c, Vec3<T> p, Vec2<T> g) {
    const T inv_z = T(1) / p.z;
    const T gx = g.x * c.fx * inv_z, gy = g.y * c.fy * inv_z;
    return {gx, gy, -(gx * p.x + gy * p.y) * inv_z};
}

// The two rows of J R. J = [[fx/z, 0, -fx x/z^2], [0, fy/z, -fy y/z^2]] with x/z and y/z held within the limits.
template <typename T>
struct JacobianRows {
    Vec3<T> u, v;
};

template <typename T>
GS_HD JacobianRows<T> jacobian_rows(const Camera<T>& c, Vec3<T> p) {
    const T inv_z = T(1) / p.z;
    const T jx = c.fx * inv_z, jy = c.fy * inv_z;
    const T tx = clamp(p.x * inv_z, -c.limit_x, c.limit_x), ty = clamp(p.y * inv_z, -c.limit_y, c.limit_y);
    return {sub(mul(jx, c.rotation.r0), mul(jx * tx, c.rotation.r2)),
            sub(mul(jy, c.rotation.r1), mul(jy * ty, c.rotation.r2))};
}

// Without the blur.
template <typename T>
GS_HD Sym2<T> project_covariance(const Camera<T>& c, Vec3<T> p, Sym3<T> cov) {
    const JacobianRows<T> j = jacobian_rows(c, p);
    const Vec3<T> su = matvec(cov, j.u), sv = matvec(cov, j.v);
    return {dot(j.u, su), dot(j.u, sv), dot(j.v, sv)};
}

// Of S in (u S u, u S v, v S v).
template <typename T>
GS_HD Sym3<T> quadratic_form_vjp(JacobianRows<T> j, Sym2<T> g) {
    const T two = T(2);
    return {g.xx * j.u.x * j.u.x + g.xy * j.u.x * j.v.x + g.yy * j.v.x * j.v.x,
            two * (g.xx * j.u.x * j.u.y + g.yy * j.v.x * j.v.y) + g.xy * (j.u.x * j.v.y + j.u.y * j.v.x),
            two * (g.xx * j.u.x * j.u.z + g.yy * j.v.x * j.v.z) + g.xy * (j.u.x * j.v.z + j.u.z * j.v.x),
            g.xx * j.u.y * j.u.y + g.xy * j.u.y * j.v.y + g.yy * j.v.y * j.v.y,
            two * (g.xx * j.u.y * j.u.z + g.yy * j.v.y * j.v.z) + g.xy * (j.u.y * j.v.z + j.u.z * j.v.y),
            g.xx * j.u.z * j.u.z + g.xy * j.u.z * j.v.z + g.yy * j.v.z * j.v.z};
}

template <typename T>
struct ProjectCovarianceGrad {
    Vec3<T> p;
    Sym3<T> cov;
    Mat3<T> rotation;
};

// Where x/z or y/z sits at its limit, the limited camera-space coordinate is a constant for the gradient,
// its dependence on depth included: training results of the original depend on it.
template <typename T>
GS_HD ProjectCovarianceGrad<T> project_covariance_vjp(const Camera<T>& c, Vec3<T> p, Sym3<T> cov, Sym2<T> g) {
    const JacobianRows<T> j = jacobian_rows(c, p);
    const Vec3<T> su = matvec(cov, j.u), sv = matvec(cov, j.v);
    const Vec3<T> gu = add(mul(T(2) * g.xx, su), mul(g.xy, sv));
    const Vec3<T> gv = add(mul(g.xy, su), mul(T(2) * g.yy, sv));

    ProjectCovarianceGrad<T> out;
    out.cov = quadratic_form_vjp(j, g);
    const T inv_z = T(1) / p.z, jx = c.fx * inv_z, jy = c.fy * inv_z;
    const T rx = p.x * inv_z, ry = p.y * inv_z;
    const T tx = clamp(rx, -c.limit_x, c.limit_x), ty = clamp(ry, -c.limit_y, c.limit_y);
    const T g_jx = dot(gu, c.rotation.r0), g_jxz = dot(gu, c.rotation.r2);  // of fx/z and of -fx x/z^2
    const T g_jy = dot(gv, c.rotation.r1), g_jyz = dot(gv, c.rotation.r2);
    const T zero = T(0), two = T(2);
    out.p.x = select(tx == rx, -jx * inv_z * g_jxz, zero);
    out.p.y = select(ty == ry, -jy * inv_z * g_jyz, zero);
    out.p.z = inv_z * (jx * (two * tx * g_jxz - g_jx) + jy * (two * ty * g_jyz - g_jy));

    out.rotation = {mul(jx, gu), mul(jy, gv), sub(mul(-jx * tx, gu), mul(jy * ty, gv))};
    return out;
}

template <typename T>
GS_HD T determinant(Sym2<T> m) {
    return m.xx * m.yy - m.xy * m.xy;
}

template <typename T>
GS_HD Sym2<T> blurred(Sym2<T> cov, T blur = T(kBlur)) {
    return {cov.xx + blur, cov.xy, cov.yy + blur};
}

template <typename T>
GS_HD Sym2<T> inverse(Sym2<T> m, T det) {
    const T inv = T(1) / det;
    return {m.yy * inv, -m.xy * inv, m.xx * inv};
}

// Of the covariance m, where q = m^-1 and det its determinant: d(m) of q = adj(m) / det. Shorter is -q g q, but for long
// thin ellipses that loses ten times more to rounding.
template <typename T>
GS_HD Sym2<T> inverse_vjp(Sym2<T> m, T det, Sym2<T> q, Sym2<T> g) {
    const T inv = T(1) / det, along = g.xx * q.xx + g.xy * q.xy + g.yy * q.yy;
    return {inv * (g.yy - along * m.yy), inv * (T(2) * along * m.xy - g.xy), inv * (g.xx - along * m.xx)};
}

// Antialiasing: what blurring adds in width it takes away in opacity, by sqrt(det(cov) / det(cov + blur)).
template <typename T>
GS_HD T antialias_factor(Sym2<T> cov, T blur = T(kBlur)) {
    return sqrt(max(T(kAntialiasFloor), determinant(cov) / determinant(blurred(cov, blur))));
}

template <typename T>
GS_HD Sym2<T> antialias_factor_vjp(Sym2<T> cov, T g, T blur = T(kBlur)) {
    const Sym2<T> wide = blurred(cov, blur);
    const T inv_det = T(1) / determinant(wide), ratio = determinant(cov) * inv_det;
    const T floor = T(kAntialiasFloor);
    const T g_ratio = select(ratio > floor, T(0.5) * g / sqrt(max(floor, ratio)), T(0)) * inv_det;
    return {g_ratio * (cov.yy - ratio * wide.yy), T(-2) * g_ratio * cov.xy * (T(1) - ratio),
            g_ratio * (cov.xx - ratio * wide.xx)};
}

// Mip-Splatting's rule for the same: sqrt(det(cov) / (det(cov + blur) + 1e-6) + 1e-6), and 0 where either is 1e-6 or less.
template <typename T>
GS_HD T mip_factor(Sym2<T> cov, T blur) {
    const T least = T(kMipFloor), thin = determinant(cov), wide = determinant(blurred(cov, blur));
    return select((thin > least) & (wide > least), sqrt(max(thin / (wide + least) + least, T(0))), T(0));
}

template <typename T>
GS_HD Sym2<T> mip_factor_vjp(Sym2<T> cov, T g, T blur) {
    const Sym2<T> broad = blurred(cov, blur);
    const T least = T(kMipFloor), thin = determinant(cov), wide = determinant(broad);
    const T ratio = thin / (wide + least), slope = T(0.5) * g / (sqrt(max(ratio, T(0)) + least) * (wide + least));
    const T scaled = select((thin > least) & (wide > least), slope, T(0));
    return {scaled * (cov.yy - ratio * broad.yy), T(-2) * scaled * cov.xy * (T(1) - ratio),
            scaled * (cov.xx - ratio * broad.xx)};
}

// What the blur leaves of the opacity.
enum class Compensation { none, antialiasing, mip };

template <typename T>
GS_HD T compensation_factor(Compensation rule, Sym2<T> cov, T blur) {
    if (rule == Compensation::none) return T(1);
    return rule == Compensation::mip ? mip_factor(cov, blur) : antialias_factor(cov, blur);
}

template <typename T>
GS_HD Sym2<T> compensation_factor_vjp(Compensation rule, Sym2<T> cov, T g, T blur) {
    if (rule == Compensation::none) return {T(0), T(0), T(0)};
    return rule == Compensation::mip ? mip_factor_vjp(cov, g, blur) : antialias_factor_vjp(cov, g, blur);
}

// In pixels: three standard deviations along the longer axis, rounded up. `cov` includes the blur.
template <typename T>
GS_HD T splat_radius(Sym2<T> cov) {
    const T mid = T(0.5) * (cov.xx + cov.yy);
    const T spread = sqrt(max(T(kDiscriminantFloor), mid * mid - determinant(cov)));
    return ceil(T(kExtentSigmas) * sqrt(mid + spread));
}

}  // namespace gs
