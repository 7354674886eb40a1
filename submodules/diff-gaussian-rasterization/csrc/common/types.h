// types.h: the small vocabulary in which the formulas of this folder are written.
//
// Everything is templated on a number type T: float on the GPU, float or double in scalar CPU code, and
// a SIMD vector of floats in the fast CPU code. So formulas never branch on a T; they use select().
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GS_HD static __host__ __device__ __forceinline__
#define GS_UNROLL _Pragma("unroll")
#else
// Internal linkage: each instruction set compiles its own copy and the linker cannot mix them up.
#define GS_HD static inline __attribute__((always_inline))
#define GS_UNROLL
#endif

namespace gs {

template <typename T> struct Vec2 { T x, y; };
template <typename T> struct Vec3 { T x, y, z; };
template <typename T> struct Vec4 { T x, y, z, w; };
template <typename T> struct Mat3 { Vec3<T> r0, r1, r2; };        // three rows
template <typename T> struct Sym2 { T xx, xy, yy; };              // symmetric 2x2
template <typename T> struct Sym3 { T xx, xy, xz, yy, yz, zz; };  // symmetric 3x3

// Gradients of Sym2 and Sym3 are with respect to the stored numbers: an off-diagonal one counts twice.

GS_HD float select(bool m, float a, float b) { return m ? a : b; }
GS_HD double select(bool m, double a, double b) { return m ? a : b; }
GS_HD float min(float a, float b) { return a < b ? a : b; }
GS_HD double min(double a, double b) { return a < b ? a : b; }
GS_HD float max(float a, float b) { return a > b ? a : b; }
GS_HD double max(double a, double b) { return a > b ? a : b; }
GS_HD float sqrt(float a) { return ::sqrtf(a); }
GS_HD double sqrt(double a) { return ::sqrt(a); }
GS_HD float exp(float a) { return ::expf(a); }
GS_HD double exp(double a) { return ::exp(a); }
GS_HD float log(float a) { return ::logf(a); }
GS_HD double log(double a) { return ::log(a); }
GS_HD float atan2(float y, float x) { return ::atan2f(y, x); }
GS_HD double atan2(double y, double x) { return ::atan2(y, x); }
GS_HD int to_int(float a) { return int(a); }
GS_HD int to_int(double a) { return int(a); }
GS_HD float ceil(float a) { return ::ceilf(a); }
GS_HD double ceil(double a) { return ::ceil(a); }

template <typename T> GS_HD T clamp(T v, T lo, T hi) { return min(max(v, lo), hi); }
template <typename T> GS_HD T dot(Vec3<T> a, Vec3<T> b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
template <typename T> GS_HD Vec3<T> add(Vec3<T> a, Vec3<T> b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
template <typename T> GS_HD Vec3<T> sub(Vec3<T> a, Vec3<T> b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
template <typename T> GS_HD Vec3<T> mul(T s, Vec3<T> a) { return {s * a.x, s * a.y, s * a.z}; }

template <typename T> GS_HD Vec3<T> matvec(Mat3<T> m, Vec3<T> v) { return {dot(m.r0, v), dot(m.r1, v), dot(m.r2, v)}; }
template <typename T> GS_HD Vec3<T> matvec_transposed(Mat3<T> m, Vec3<T> v) {
    return add(add(mul(v.x, m.r0), mul(v.y, m.r1)), mul(v.z, m.r2));
}
template <typename T> GS_HD Vec3<T> matvec(Sym3<T> m, Vec3<T> v) {
    return {m.xx * v.x + m.xy * v.y + m.xz * v.z, m.xy * v.x + m.yy * v.y + m.yz * v.z,
            m.xz * v.x + m.yz * v.y + m.zz * v.z};
}

}  // namespace gs
