// lens.h: cameras other than the pinhole of projection.h, each as the place of a point in the image and its derivative.
//
// Orthographic: u = fx x + cx, v = fy y + cy; K holds pixels per unit of length.
// Fisheye, equidistant: a point at the angle a off the axis lands rho(a) from the center, rho(a) = a (1 + k1 a^2 + k2 a^4 +
// k3 a^6 + k4 a^8). With s^2 = x^2 + y^2 and d^2 = s^2 + z^2 that is (u, v) = h (fx x, fy y) + (cx, cy), h = rho / s. As
// h depends on s and z alone, its derivatives are h_x = k x, h_y = k y, h_z = m.
#pragma once
#include "projection.h"

namespace gs {

enum class LensKind { pinhole, fisheye, orthographic };

template <typename T>
struct Lens {
    LensKind kind;
    T k1, k2, k3, k4;
};

// d(u, v)/dp, in the camera's axes.
template <typename T>
struct Jacobian {
    Vec3<T> u, v;
};

template <typename T>
struct Equidistant {
    T h, k, m;        // the above
    T k_s, k_z, m_z;  // dk/ds / s, which times x is dk/dx; dk/dz, also dm/ds / s; dm/dz
    T angle, distance;
};

// The functions below want it for a fisheye only.
template <typename T>
GS_HD Equidistant<T> equidistant(const Lens<T>& lens, Vec3<T> p) {
    const T one = T(1), two = T(2), q = max(p.x * p.x + p.y * p.y, T(1e-24)), s = sqrt(q), z = p.z;
    Equidistant<T> o;
    o.angle = atan2(s, z);
    const T a = o.angle, aa = a * a;
    const T rho = a * (one + aa * (lens.k1 + aa * (lens.k2 + aa * (lens.k3 + aa * lens.k4))));
    const T rho1 = one + aa * (T(3) * lens.k1 + aa * (T(5) * lens.k2 + aa * (T(7) * lens.k3 + aa * T(9) * lens.k4)));
    const T rho2 = a * (T(6) * lens.k1 + aa * (T(20) * lens.k2 + aa * (T(42) * lens.k3 + aa * T(72) * lens.k4)));
    const T inv2 = one / (q + z * z), inv4 = inv2 * inv2, inv_s = one / s, inv_q = inv_s * inv_s;
    o.distance = sqrt(q + z * z);
    o.h = rho * inv_s;
    o.m = -rho1 * inv2;
    o.m_z = (rho2 * s + two * z * rho1) * inv4;
    o.k_z = (two * rho1 - rho2 * z * inv_s) * inv4;
    // Close to the axis, k is a small difference over a small number: there its limit is better.
    const T limit = (two * lens.k1 - two / T(3)) * o.h * o.h * o.h;
    const auto close = (q < T(1e-4) * z * z) & (z > T(0));
    o.k = select(close, limit, (rho1 * z * inv2 - o.h) * inv_q);
    o.k_s = select(close, T(0), ((rho2 * z * inv_s - two * rho1) * z * inv4 - T(3) * o.k) * inv_q);
    return o;
}

// Whether the lens sees a point, and how deep it lies: along the axis, or for a fisheye from the camera.
template <typename T>
GS_HD decltype(T() > T()) sees(const Lens<T>& lens, Vec3<T> p, T near_depth) {
    if (lens.kind != LensKind::fisheye) return p.z > near_depth;
    const T off = sqrt(p.x * p.x + p.y * p.y);
    return (sqrt(p.x * p.x + p.y * p.y + p.z * p.z) > near_depth) & (atan2(off, p.z) < T(kMaxAngle));
}

template <typename T>
GS_HD T lens_depth(const Lens<T>& lens, Vec3<T> p) {
    return lens.kind == LensKind::fisheye ? sqrt(p.x * p.x + p.y * p.y + p.z * p.z) : p.z;
}

template <typename T>
GS_HD Vec3<T> lens_depth_vjp(const Lens<T>& lens, Vec3<T> p, T g) {
    return lens.kind == LensKind::fisheye ? mul(g / lens_depth(lens, p), p) : Vec3<T>{T(0), T(0), g};
}

template <typename T>
GS_HD Jacobian<T> lens_jacobian(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e, Vec3<T> p) {
    const T zero = T(0);
    if (lens.kind == LensKind::orthographic) return {{c.fx, zero, zero}, {zero, c.fy, zero}};
    const T xx = e.h + e.k * p.x * p.x, xy = e.k * p.x * p.y, yy = e.h + e.k * p.y * p.y;
    return {mul(c.fx, Vec3<T>{xx, xy, e.m * p.x}), mul(c.fy, Vec3<T>{xy, yy, e.m * p.y})};
}

// g: of the Jacobian's entries. Returns that of p.
template <typename T>
GS_HD Vec3<T> lens_jacobian_vjp(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e, Vec3<T> p,
                                Jacobian<T> g) {
    if (lens.kind == LensKind::orthographic) return {T(0), T(0), T(0)};
    const Vec3<T> u = mul(c.fx, g.u), v = mul(c.fy, g.v);
    const T g_h = u.x + v.y, g_k = p.x * (u.x * p.x + (u.y + v.x) * p.y) + v.y * p.y * p.y, g_m = u.z * p.x + v.z * p.y;
    const T along = g_h * e.k + g_k * e.k_s + g_m * e.k_z, cross = u.y + v.x;
    return {along * p.x + e.k * (T(2) * p.x * u.x + p.y * cross) + e.m * u.z,
            along * p.y + e.k * (T(2) * p.y * v.y + p.x * cross) + e.m * v.z, g_h * e.m + g_k * e.k_z + g_m * e.m_z};
}

template <typename T>
GS_HD Vec2<T> lens_mean(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e, Vec3<T> p) {
    if (lens.kind == LensKind::pinhole) return project_mean(c, p);
    const T h = lens.kind == LensKind::fisheye ? e.h : T(1);
    return {c.fx * h * p.x + c.cx, c.fy * h * p.y + c.cy};
}

template <typename T>
GS_HD Vec3<T> lens_mean_vjp(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e, Vec3<T> p, Vec2<T> g) {
    if (lens.kind == LensKind::pinhole) return project_mean_vjp(c, p, g);
    const Jacobian<T> j = lens_jacobian(c, lens, e, p);
    return add(mul(g.x, j.u), mul(g.y, j.v));
}

// Without the blur.
template <typename T>
GS_HD Sym2<T> lens_covariance(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e, Vec3<T> p,
                              Sym3<T> cov) {
    if (lens.kind == LensKind::pinhole) return project_covariance(c, p, cov);
    const Jacobian<T> j = lens_jacobian(c, lens, e, p);
    const Vec3<T> u = matvec_transposed(c.rotation, j.u), v = matvec_transposed(c.rotation, j.v);
    const Vec3<T> su = matvec(cov, u), sv = matvec(cov, v);
    return {dot(u, su), dot(u, sv), dot(v, sv)};
}

template <typename T>
GS_HD ProjectCovarianceGrad<T> lens_covariance_vjp(const Camera<T>& c, const Lens<T>& lens, const Equidistant<T>& e,
                                                   Vec3<T> p, Sym3<T> cov, Sym2<T> g) {
    if (lens.kind == LensKind::pinhole) return project_covariance_vjp(c, p, cov, g);
    const Jacobian<T> j = lens_jacobian(c, lens, e, p);
    const Vec3<T> u = matvec_transposed(c.rotation, j.u), v = matvec_transposed(c.rotation, j.v);
    const Vec3<T> su = matvec(cov, u), sv = matvec(cov, v);
    const Vec3<T> gu = add(mul(T(2) * g.xx, su), mul(g.xy, sv)), gv = add(mul(g.xy, su), mul(T(2) * g.yy, sv));
    ProjectCovarianceGrad<T> out;
    out.cov = quadratic_form_vjp(JacobianRows<T>{u, v}, g);
    out.p = lens_jacobian_vjp(c, lens, e, p, Jacobian<T>{matvec(c.rotation, gu), matvec(c.rotation, gv)});
    out.rotation = {add(mul(j.u.x, gu), mul(j.v.x, gv)), add(mul(j.u.y, gu), mul(j.v.y, gv)),
                    add(mul(j.u.z, gu), mul(j.v.z, gv))};
    return out;
}

}  // namespace gs
