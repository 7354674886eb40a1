// covariance.h: a Gaussian's shape in space from its quaternion and scales, and the derivative.
//
// Sigma = M M^T with M = R(q) diag(s). The quaternion (w, x, y, z) is used as it is: whoever wants a
// rotation normalizes it first (normalize_quat below).
#pragma once
#include "types.h"

namespace gs {

template <typename T>
GS_HD Mat3<T> rotation(Vec4<T> q) {  // q.x holds w, then x, y, z
    const T w = q.x, x = q.y, y = q.z, z = q.w, one = T(1), two = T(2);
    return {{one - two * (y * y + z * z), two * (x * y - w * z), two * (x * z + w * y)},
            {two * (x * y + w * z), one - two * (x * x + z * z), two * (y * z - w * x)},
            {two * (x * z - w * y), two * (y * z + w * x), one - two * (x * x + y * y)}};
}

template <typename T>
GS_HD Vec4<T> rotation_vjp(Vec4<T> q, Mat3<T> g) {
    const T w = q.x, x = q.y, y = q.z, z = q.w, two = T(2);
    const T a = g.r2.y - g.r1.z, b = g.r0.z - g.r2.x, c = g.r1.x - g.r0.y;  // antisymmetric part
    const T d = g.r0.y + g.r1.x, e = g.r0.z + g.r2.x, f = g.r1.z + g.r2.y;  // symmetric part
    return {two * (x * a + y * b + z * c), two * (w * a + y * d + z * e) - T(4) * x * (g.r1.y + g.r2.z),
            two * (w * b + x * d + z * f) - T(4) * y * (g.r0.x + g.r2.z),
            two * (w * c + x * e + y * f) - T(4) * z * (g.r0.x + g.r1.y)};
}

template <typename T>
GS_HD Sym3<T> covariance(Vec4<T> q, Vec3<T> s) {
    const Mat3<T> r = rotation(q);
    const Vec3<T> m0 = {r.r0.x * s.x, r.r0.y * s.y, r.r0.z * s.z};
    const Vec3<T> m1 = {r.r1.x * s.x, r.r1.y * s.y, r.r1.z * s.z};
    const Vec3<T> m2 = {r.r2.x * s.x, r.r2.y * s.y, r.r2.z * s.z};
    return {dot(m0, m0), dot(m0, m1), dot(m0, m2), dot(m1, m1), dot(m1, m2), dot(m2, m2)};
}

template <typename T>
struct CovarianceGrad {
    Vec4<T> q;
    Vec3<T> s;
};

template <typename T>
GS_HD CovarianceGrad<T> covariance_vjp(Vec4<T> q, Vec3<T> s, Sym3<T> g) {
    const Mat3<T> r = rotation(q);
    const T h = T(0.5);
    const Sym3<T> full = {g.xx, h * g.xy, h * g.xz, g.yy, h * g.yz, g.zz};
    // dM = 2 dSigma M, one column of M at a time; column j of M is s_j times column j of R.
    const Vec3<T> c0 = {r.r0.x, r.r1.x, r.r2.x}, c1 = {r.r0.y, r.r1.y, r.r2.y}, c2 = {r.r0.z, r.r1.z, r.r2.z};
    const Vec3<T> d0 = mul(T(2) * s.x, matvec(full, c0));
    const Vec3<T> d1 = mul(T(2) * s.y, matvec(full, c1));
    const Vec3<T> d2 = mul(T(2) * s.z, matvec(full, c2));
    const Mat3<T> g_r = {{d0.x * s.x, d1.x * s.y, d2.x * s.z},
                         {d0.y * s.x, d1.y * s.y, d2.y * s.z},
                         {d0.z * s.x, d1.z * s.y, d2.z * s.z}};
    return {rotation_vjp(q, g_r), {dot(c0, d0), dot(c1, d1), dot(c2, d2)}};
}

template <typename T>
GS_HD T quat_norm(Vec4<T> q) {
    return max(sqrt(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w), T(1e-12));
}

template <typename T>
GS_HD Vec4<T> normalize_quat(Vec4<T> q) {
    const T inv = T(1) / quat_norm(q);
    return {q.x * inv, q.y * inv, q.z * inv, q.w * inv};
}

// `unit` is the normalized quaternion, `norm` the length it had, `g` the gradient of `unit`.
template <typename T>
GS_HD Vec4<T> normalize_quat_vjp(Vec4<T> unit, T norm, Vec4<T> g) {
    const T along = unit.x * g.x + unit.y * g.y + unit.z * g.z + unit.w * g.w, inv = T(1) / norm;
    return {(g.x - unit.x * along) * inv, (g.y - unit.y * along) * inv, (g.z - unit.z * along) * inv,
            (g.w - unit.w * along) * inv};
}

template <typename T>
GS_HD T sigmoid(T v) {
    return T(1) / (T(1) + exp(-v));
}

}  // namespace gs
