// sh.h: real spherical harmonics up to degree 3, with the signs and order that trained models are stored in.
//
// Color of a splat seen along the unit vector d: max(0, 0.5 + sum_k basis_k(d) * coefficient_k), per channel.
// Memory layouts differ between backends, so this header knows only the basis and its derivative.
#pragma once
#include "types.h"

namespace gs {

constexpr double kSh0 = 0.28209479177387814;   // 1/2 sqrt(1/pi)
constexpr double kSh1 = 0.4886025119029199;    // sqrt(3/(4 pi))
constexpr double kSh2a = 1.0925484305920792;   // 1/2 sqrt(15/pi)
constexpr double kSh2b = 0.31539156525252005;  // 1/4 sqrt(5/pi)
constexpr double kSh2c = 0.5462742152960396;   // 1/4 sqrt(15/pi)
constexpr double kSh3a = 0.5900435899266435;   // 1/4 sqrt(35/(2 pi))
constexpr double kSh3b = 2.890611442640554;    // 1/2 sqrt(105/pi)
constexpr double kSh3c = 0.4570457994644658;   // 1/4 sqrt(21/(2 pi))
constexpr double kSh3d = 0.3731763325901154;   // 1/4 sqrt(7/pi)
constexpr double kSh3e = 1.445305721320277;    // 1/4 sqrt(105/pi)

GS_HD constexpr int sh_count(int degree) { return (degree + 1) * (degree + 1); }

// basis[0 .. sh_count(Degree)) for the unit vector d.
template <int Degree, typename T>
GS_HD void sh_basis(Vec3<T> d, T* basis) {
    const T x = d.x, y = d.y, z = d.z;
    basis[0] = T(kSh0);
    if (Degree < 1) return;
    basis[1] = T(-kSh1) * y;
    basis[2] = T(kSh1) * z;
    basis[3] = T(-kSh1) * x;
    if (Degree < 2) return;
    const T xx = x * x, yy = y * y, zz = z * z;
    basis[4] = T(kSh2a) * x * y;
    basis[5] = T(-kSh2a) * y * z;
    basis[6] = T(kSh2b) * (T(2) * zz - xx - yy);
    basis[7] = T(-kSh2a) * x * z;
    basis[8] = T(kSh2c) * (xx - yy);
    if (Degree < 3) return;
    basis[9] = T(-kSh3a) * y * (T(3) * xx - yy);
    basis[10] = T(kSh3b) * x * y * z;
    basis[11] = T(-kSh3c) * y * (T(4) * zz - xx - yy);
    basis[12] = T(kSh3d) * z * (T(2) * zz - T(3) * (xx + yy));
    basis[13] = T(-kSh3c) * x * (T(4) * zz - xx - yy);
    basis[14] = T(kSh3e) * z * (xx - yy);
    basis[15] = T(-kSh3a) * x * (xx - T(3) * yy);
}

// sum_k weight[k] * (gradient of basis_k at d). weight[k] is the dot product of the color's gradient with
// coefficient k; weight[0] is not read. The result still has to go through normalize_vjp.
template <int Degree, typename T>
GS_HD Vec3<T> sh_basis_vjp(Vec3<T> d, const T* weight) {
    const T x = d.x, y = d.y, z = d.z;
    Vec3<T> g = {T(0), T(0), T(0)};
    if (Degree < 1) return g;
    g = {T(-kSh1) * weight[3], T(-kSh1) * weight[1], T(kSh1) * weight[2]};
    if (Degree < 2) return g;
    const T xx = x * x, yy = y * y, zz = z * z;
    {
        const T a = T(kSh2a) * weight[4], b = T(-kSh2a) * weight[5], c = T(2 * kSh2b) * weight[6];
        const T e = T(-kSh2a) * weight[7], f = T(2 * kSh2c) * weight[8];
        g.x = g.x + a * y - c * x + e * z + f * x;
        g.y = g.y + a * x + b * z - c * y - f * y;
        g.z = g.z + b * y + T(2) * c * z + e * x;
    }
    if (Degree < 3) return g;
    {
        const T a = T(-kSh3a) * weight[9], b = T(kSh3b) * weight[10], c = T(-kSh3c) * weight[11];
        const T e = T(kSh3d) * weight[12], f = T(-kSh3c) * weight[13], h = T(kSh3e) * weight[14];
        const T i = T(-kSh3a) * weight[15], three = T(3), six = T(6);
        const T xy = x * y, yz = y * z, xz = x * z;
        g.x = g.x + a * six * xy + b * yz - c * T(2) * xy - e * six * xz + f * (T(4) * zz - three * xx - yy) +
              h * T(2) * xz + i * three * (xx - yy);
        g.y = g.y + a * three * (xx - yy) + b * xz + c * (T(4) * zz - xx - three * yy) - e * six * yz - f * T(2) * xy -
              h * T(2) * yz - i * six * xy;
        g.z = g.z + b * xy + c * T(8) * yz + e * (six * zz - three * (xx + yy)) + f * T(8) * xz + h * (xx - yy);
    }
    return g;
}

// d = v / |v|
template <typename T>
GS_HD Vec3<T> normalize(Vec3<T> v, T inv_length) {
    return mul(inv_length, v);
}

template <typename T>
GS_HD Vec3<T> normalize_vjp(Vec3<T> d, T inv_length, Vec3<T> g) {
    return mul(inv_length, sub(g, mul(dot(d, g), d)));
}

template <typename T>
GS_HD T inverse_length(Vec3<T> v) {
    return T(1) / sqrt(max(dot(v, v), T(1e-24)));
}

}  // namespace gs
