// simd.h: sixteen numbers at a time, whatever the machine.
//
// The kernels of this folder are written once, for F (sixteen numbers), M (sixteen truth values) and I (sixteen
// integers). Sixteen lanes are a 4x4 block of pixels, or sixteen splats. A file isa_*.cpp chooses what they are
// made of by defining, before it includes the kernels:
//     GS_ISA     the namespace all of it goes into, so that no two instruction sets share a symbol
//     GS_WIDTH   numbers per native register: 16 (AVX-512), 8 (AVX2), 4 (NEON), 1 (plain scalar code)
//     GS_NUMBER  float, or double, which exists so that gradcheck means something
// Width 16 is written with intrinsics; the others with the compilers' vector extension, which is as fast at the
// machine's own width. The formulas of ../common take F for their T: the functions they call are found here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && GS_WIDTH > 1
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // the header's own "undefined" values
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__) && GS_WIDTH > 1
#include <arm_neon.h>
#endif

#define GS_INLINE static inline __attribute__((always_inline))
#define GS_MEMBER inline __attribute__((always_inline))
#define GS_APART static __attribute__((noinline))  // once in the library: it is long, and not where the time goes
#if GS_WIDTH == 1
#define GS_LOOPED inline __attribute__((noinline))
#define GS_OP \
    static inline __attribute__((noinline))  // sixteen times unrolled everywhere, it would compile for minutes
#else
#define GS_LOOPED GS_MEMBER
#define GS_OP GS_INLINE
#endif

namespace gs::cpu::GS_ISA {

using Number = GS_NUMBER;
constexpr bool kDouble = sizeof(Number) == 8;
constexpr int kLanes = 16;

// 2^f = sum of kEx2[k] f^k for |f| <= 1/2, to 1.6e-7: the polynomial with the least relative error that is exact at 0.
constexpr float kEx2[6] = {1.f, 6.931469776e-1f, 2.402224201e-1f, 5.550733769e-2f, 9.671517535e-3f, 1.326473523e-3f};

#if GS_WIDTH == 16

struct M { __mmask16 v; };
struct I {
    __m512i v;
    I() = default;
    GS_MEMBER I(__m512i x) : v(x) {}
    GS_MEMBER explicit I(int x) : v(_mm512_set1_epi32(x)) {}
};
struct F {
    __m512 v;
    F() = default;
    GS_MEMBER F(__m512 x) : v(x) {}
    template <typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>
    GS_MEMBER explicit F(S x) : v(_mm512_set1_ps(float(x))) {}
};

GS_OP F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
GS_OP F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
GS_OP F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
GS_OP F operator/(F a, F b) { return _mm512_div_ps(a.v, b.v); }
GS_OP F operator-(F a) { return -a.v; }
GS_OP M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
GS_OP M operator<=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
GS_OP M operator>(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
GS_OP M operator>=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
GS_OP M operator==(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
GS_OP M operator!=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
GS_OP M operator<=(I a, I b) { return {_mm512_cmple_epi32_mask(a.v, b.v)}; }
GS_OP I operator-(I a, I b) { return _mm512_sub_epi32(a.v, b.v); }
GS_OP I with_bits(M m, I a, int b) { return _mm512_mask_or_epi32(a.v, m.v, a.v, _mm512_set1_epi32(b)); }
GS_OP M operator&(M a, M b) { return {__mmask16(a.v & b.v)}; }
GS_OP M operator|(M a, M b) { return {__mmask16(a.v | b.v)}; }
GS_OP M operator!(M a) { return {__mmask16(~a.v)}; }
GS_OP uint32_t bits(M m) { return m.v; }
GS_OP bool any(M m) { return m.v != 0; }
GS_OP M from_bits(uint32_t b) { return {__mmask16(b)}; }
GS_OP M and_not(M a, M b) { return {__mmask16(a.v & ~b.v)}; }
// In the chosen lanes: a < b, and so on. The others are false.
GS_OP M less(M m, F a, F b) { return {_mm512_mask_cmp_ps_mask(m.v, a.v, b.v, _CMP_LT_OQ)}; }
GS_OP M not_less(M m, F a, F b) { return {_mm512_mask_cmp_ps_mask(m.v, a.v, b.v, _CMP_GE_OQ)}; }
GS_OP M at_most(M m, I a, I b) { return {_mm512_mask_cmple_epi32_mask(m.v, a.v, b.v)}; }

GS_OP F select(M m, F a, F b) { return _mm512_mask_blend_ps(m.v, b.v, a.v); }
GS_OP I select(M m, I a, I b) { return _mm512_mask_blend_epi32(m.v, b.v, a.v); }
GS_OP F zero_unless(M m, F a) { return _mm512_maskz_mov_ps(m.v, a.v); }
GS_OP F fma_where(M m, F a, F b, F c) { return _mm512_mask3_fmadd_ps(a.v, b.v, c.v, m.v); }  // c elsewhere
GS_OP I select(M m, const int32_t* a, I b) { return _mm512_mask_set1_epi32(b.v, m.v, *a); }
GS_OP F min(F a, F b) { return _mm512_min_ps(a.v, b.v); }  // b where either is not a number
GS_OP F max(F a, F b) { return _mm512_max_ps(a.v, b.v); }
GS_OP F sqrt(F a) { return _mm512_sqrt_ps(a.v); }
GS_OP F abs(F a) { return _mm512_abs_ps(a.v); }
GS_OP F ceil(F a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
GS_OP F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
GS_OP F recip(F a) {  // to about one unit in the last place
    const __m512 r = _mm512_rcp14_ps(a.v);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.f)), r);
}
GS_OP I to_int(F a) { return _mm512_cvttps_epi32(a.v); }
GS_OP F to_number(I a) { return _mm512_cvtepi32_ps(a.v); }
GS_OP F load(const float* p) { return _mm512_loadu_ps(p); }
GS_OP void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
GS_OP F load_fours(const float* p, int64_t stride) {  // four rows of four
    const __m256 upper = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
    const __m256 lower =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 2 * stride)), _mm_loadu_ps(p + 3 * stride), 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(upper), lower, 1);
}
GS_OP I load(const int32_t* p) { return _mm512_loadu_si512(p); }
GS_OP void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
GS_OP F load_if(bool wanted, const float* p) {  // else zeros, and nothing is read
    return _mm512_maskz_loadu_ps(__mmask16(-int(wanted)), p);
}
GS_OP F load_some(const float* p, int count) {  // zeros behind the first `count`
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
GS_OP void store_some(float* p, F a, int count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), a.v); }
GS_OP void store_some(int32_t* p, I a, int count) { _mm512_mask_storeu_epi32(p, __mmask16((1u << count) - 1), a.v); }
GS_OP F load_bytes(const uint8_t* p, int count) {  // the first `count` as numbers, zeros behind them
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), p)));
}
GS_OP float sum(F a) { return _mm512_reduce_add_ps(a.v); }
GS_OP int compress(float* p, F a, M m) {  // the chosen lanes, side by side; may write all sixteen places
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.v, a.v));
    return __builtin_popcount(m.v);
}
// base + from[k] for every set bit k, side by side; may write all sixteen places.
GS_OP int pick(int32_t* p, const int32_t* from, int32_t base, uint32_t chosen) {
    const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(from), _mm512_set1_epi32(base));
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(chosen), sum));
    return __builtin_popcount(chosen);
}

// 2^a to two units in the last place; 0 far below, infinity far above.
GS_OP F ex2(F a) {
    const __m512 n = _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(a.v, n);
    __m512 p = _mm512_set1_ps(kEx2[5]);
    for (int k = 4; k >= 0; --k) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kEx2[k]));
    return _mm512_scalef_ps(p, n);
}

// The bits of 2^(i / 32), less those that i itself adds to them below.
struct Ex2Table {
    int32_t at[32];
    constexpr Ex2Table() : at() {
        double power = 1;
        for (int i = 0; i < 32; ++i, power *= 1.0218971486541166)
            at[i] = 0x3f800000 + int32_t((power - 1) * 8388608 + 0.5) - (i << 18);
    }
};
alignas(64) constexpr Ex2Table kEx2Table;

// 2^a where -126 < a < 127; anything elsewhere. Adding 1.5 * 2^18 rounds to thirty-seconds and leaves their number in the
// low bits: the lowest five choose from a table, the others go straight into the exponent. For what remains, |f| <= 1/64,
// two terms give 5e-8.
GS_OP F ex2_near(F a) {
    const __m512 magic = _mm512_set1_ps(393216.f), shifted = _mm512_add_ps(a.v, magic);
    const __m512 f = _mm512_sub_ps(a.v, _mm512_sub_ps(shifted, magic));
    const __m512i steps = _mm512_castps_si512(shifted);
    const __m512i bits =
        _mm512_permutex2var_epi32(_mm512_load_si512(kEx2Table.at), steps, _mm512_load_si512(kEx2Table.at + 16));
    const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_slli_epi32(steps, 18)));
    const __m512 rest =
        _mm512_mul_ps(_mm512_fmadd_ps(f, _mm512_set1_ps(0.240226507f), _mm512_set1_ps(0.693157344f)), f);
    return _mm512_fmadd_ps(power, rest, power);
}

// The binary exponent as a number, and the rest, within [1/sqrt 2, sqrt 2): for log().
GS_OP F split_exponent(F a, F& mantissa) {
    const __m512 e = _mm512_getexp_ps(_mm512_mul_ps(a.v, _mm512_set1_ps(1.41421356f)));
    mantissa = _mm512_scalef_ps(a.v, _mm512_sub_ps(_mm512_setzero_ps(), e));
    return e;
}

// Sixteen vectors become their transpose: lane j of result i is lane i of argument j.
GS_OP void transpose(F* r) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
        const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
        t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        r[i].v = _mm512_shuffle_f32x4(a, c, 0x88), r[8 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
        r[4 + i].v = _mm512_shuffle_f32x4(b, d, 0x88), r[12 + i].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

// Lane i of the result is the sum over the lanes of r[i]: sixteen sums for the price of a transpose.
// Only r[0 .. Count) exist; the other lanes come out as anything.
template <int Count>
GS_OP F sums(const F* r) {
    constexpr int kQuads = (Count + 3) / 4;
    __m512 t[4];
    for (int i = 0; i < kQuads; ++i) {
        const F* q = r + 4 * i;
        const int n = Count - 4 * i;
        const __m512 q1 = n > 1 ? q[1].v : q[0].v, q2 = n > 2 ? q[2].v : q[0].v, q3 = n > 3 ? q[3].v : q[0].v;
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(q[0].v, q1), _mm512_unpackhi_ps(q[0].v, q1));
        const __m512 b = n > 2 ? _mm512_add_ps(_mm512_unpacklo_ps(q2, q3), _mm512_unpackhi_ps(q2, q3)) : a;
        t[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    for (int i = kQuads; i < 4; ++i) t[i] = t[i - 1];
    const __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
    const __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x88), _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x88), _mm512_shuffle_f32x4(u, v, 0xdd));
}

#else  // narrower machines: sixteen lanes are kParts native vectors

constexpr int kWidth = GS_WIDTH, kParts = kLanes / kWidth;
using Integer = std::conditional_t<kDouble, int64_t, int32_t>;
#if GS_WIDTH == 1
using V = Number;
using W = Integer;
#else
typedef Number V __attribute__((vector_size(sizeof(Number) * GS_WIDTH)));
typedef Integer W __attribute__((vector_size(sizeof(Number) * GS_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * GS_WIDTH)));  // bits of floats: sums may run over
#endif

struct M {
    W v[kParts];  // 0 or -1
};
struct I {
    W v[kParts];
    I() = default;
    GS_LOOPED explicit I(int x) {
        for (W& w : v) w = W{} + Integer(x);
    }
};
struct F {
    V v[kParts];
    F() = default;
    template <typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>
    GS_LOOPED explicit F(S x) {
        for (V& p : v) p = V{} + Number(x);
    }
};

#define GS_EACH _Pragma("GCC unroll 16") for (int k = 0; k < kParts; ++k)
#if GS_WIDTH == 1
#define GS_TRUTH(x) (-W(x))
#else
#define GS_TRUTH(x) (x)
#endif

#define GS_ARITHMETIC(op)                  \
    GS_OP F operator op(F a, F b) {        \
        F r;                               \
        GS_EACH r.v[k] = a.v[k] op b.v[k]; \
        return r;                          \
    }
GS_ARITHMETIC(+)
GS_ARITHMETIC(-)
GS_ARITHMETIC(*)
GS_ARITHMETIC(/)
#define GS_COMPARISON(op)                            \
    GS_OP M operator op(F a, F b) {                  \
        M r;                                         \
        GS_EACH r.v[k] = GS_TRUTH(a.v[k] op b.v[k]); \
        return r;                                    \
    }
GS_COMPARISON(<)
GS_COMPARISON(<=)
GS_COMPARISON(>)
GS_COMPARISON(>=)
GS_COMPARISON(==)
GS_COMPARISON(!=)
#undef GS_ARITHMETIC
#undef GS_COMPARISON

GS_OP F operator-(F a) {
    GS_EACH a.v[k] = -a.v[k];
    return a;
}
GS_OP M operator<=(I a, I b) {
    M r;
    GS_EACH r.v[k] = GS_TRUTH(a.v[k] <= b.v[k]);
    return r;
}
GS_OP I operator-(I a, I b) {
    GS_EACH a.v[k] -= b.v[k];
    return a;
}
GS_OP I with_bits(M m, I a, int b) {  // a | b in the chosen lanes
    GS_EACH a.v[k] |= m.v[k] & (W{} + Integer(b));
    return a;
}
GS_OP M operator&(M a, M b) {
    GS_EACH a.v[k] &= b.v[k];
    return a;
}
GS_OP M operator|(M a, M b) {
    GS_EACH a.v[k] |= b.v[k];
    return a;
}
GS_OP M operator!(M a) {
    GS_EACH a.v[k] = ~a.v[k];
    return a;
}
GS_OP uint32_t bits_of(W w) {
#if GS_WIDTH == 1
    return uint32_t(w) & 1;
#elif GS_WIDTH == 8
    return uint32_t(_mm256_movemask_ps((__m256)w));
#elif defined(__x86_64__)
    return uint32_t(_mm_movemask_ps((__m128)w));
#else
    const W weights = {1, 2, 4, 8};
    return uint32_t(vaddvq_s32((int32x4_t)(w & weights)));
#endif
}
GS_OP uint32_t bits(M m) {
    uint32_t b = 0;
    GS_EACH b |= bits_of(m.v[k]) << (k * kWidth);
    return b;
}
GS_OP bool any(M m) {
    W w = m.v[0];
    _Pragma("GCC unroll 16") for (int k = 1; k < kParts; ++k) w |= m.v[k];
    return bits_of(w) != 0;
}
GS_OP M from_bits(uint32_t b) {
    Integer lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = -Integer(b >> i & 1);
    M m;
    std::memcpy(&m, lane, sizeof m);
    return m;
}
GS_OP F select(M m, F a, F b) {
    GS_EACH a.v[k] = m.v[k] ? a.v[k] : b.v[k];
    return a;
}
GS_OP I select(M m, I a, I b) {
    GS_EACH a.v[k] = m.v[k] ? a.v[k] : b.v[k];
    return a;
}
GS_OP I select(M m, const int32_t* a, I b) { return select(m, I(*a), b); }
GS_OP F zero_unless(M m, F a) { return select(m, a, F(0)); }
GS_OP M and_not(M a, M b) { return a & !b; }
GS_OP M less(M m, F a, F b) { return m & (a < b); }
GS_OP M not_less(M m, F a, F b) { return m & (a >= b); }
GS_OP M at_most(M m, I a, I b) { return m & (a <= b); }
GS_INLINE F fma_where(M m, F a, F b, F c) { return zero_unless(m, a) * b + c; }
GS_OP F min(F a, F b) {
    GS_EACH a.v[k] = a.v[k] < b.v[k] ? a.v[k] : b.v[k];
    return a;
}
GS_OP F max(F a, F b) {
    GS_EACH a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
    return a;
}
GS_OP V native_sqrt(V a) {
#if GS_WIDTH == 1
    return std::sqrt(a);
#elif GS_WIDTH == 8
    return (V)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
    return (V)_mm_sqrt_ps((__m128)a);
#else
    return (V)vsqrtq_f32((float32x4_t)a);
#endif
}
GS_OP F sqrt(F a) {
    GS_EACH a.v[k] = native_sqrt(a.v[k]);
    return a;
}
GS_OP F abs(F a) {
    GS_EACH a.v[k] = a.v[k] < 0 ? -a.v[k] : a.v[k];
    return a;
}
GS_OP F fma(F a, F b, F c) { return a * b + c; }  // contracted where the machine can
GS_OP F recip(F a) { return F(1) / a; }
GS_OP I to_int(F a) {
    I r;
#if GS_WIDTH == 1
    GS_EACH r.v[k] = W(a.v[k]);
#else
    GS_EACH r.v[k] = __builtin_convertvector(a.v[k], W);
#endif
    return r;
}
GS_OP F to_number(I a) {
    F r;
#if GS_WIDTH == 1
    GS_EACH r.v[k] = V(a.v[k]);
#else
    GS_EACH r.v[k] = __builtin_convertvector(a.v[k], V);
#endif
    return r;
}
GS_OP F ceil(F a) {  // of numbers an integer can hold; larger ones have no fraction
    const F whole = to_number(to_int(min(max(a, F(-1e9)), F(1e9))));
    return select(abs(a) < F(8388608), select(whole < a, whole + F(1), whole), a);
}
// Register by register: compilers copy larger things in smaller pieces, and reading such pieces as one stalls.
GS_OP F load(const Number* p) {
    F r;
    GS_EACH std::memcpy(&r.v[k], p + k * kWidth, sizeof(V));
    return r;
}
GS_OP F load_fours(const Number* p, int64_t stride) {  // four rows of four
#if GS_WIDTH == 8
    F r;
    GS_EACH r.v[k] = (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 2 * k * stride)),
                                             _mm_loadu_ps(p + (2 * k + 1) * stride), 1);
    return r;
#else
    Number lane[kLanes];
    for (int r = 0; r < 4; ++r) std::memcpy(lane + 4 * r, p + r * stride, 4 * sizeof(Number));
    return load(lane);
#endif
}
GS_OP void store(Number* p, F a) { GS_EACH std::memcpy(p + k * kWidth, &a.v[k], sizeof(V)); }
GS_OP I load(const int32_t* p) {
    Integer lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = p[i];
    I r;
    std::memcpy(&r, lane, sizeof r);
    return r;
}
GS_OP void store(int32_t* p, I a) {
    Integer lane[kLanes];
    std::memcpy(lane, &a, sizeof a);
    for (int i = 0; i < kLanes; ++i) p[i] = int32_t(lane[i]);
}
GS_OP F load_if(bool wanted, const Number* p) { return wanted ? load(p) : F(0); }
GS_OP F load_some(const Number* p, int count) {
    if (count >= kLanes) return load(p);
    Number lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = i < count ? p[i] : Number(0);
    return load(lane);
}
GS_OP void store_some(Number* p, F a, int count) {
    if (count >= kLanes) return store(p, a);
    Number lane[kLanes];
    store(lane, a);
    for (int i = 0; i < count; ++i) p[i] = lane[i];
}
GS_OP void store_some(int32_t* p, I a, int count) {
    int32_t lane[kLanes];
    store(lane, a);
    for (int i = 0; i < count; ++i) p[i] = lane[i];
}
GS_OP F load_bytes(const uint8_t* p, int count) {
    uint8_t some[kLanes] = {};
    if (count < kLanes) p = static_cast<const uint8_t*>(std::memcpy(some, p, count));
#if GS_WIDTH == 8
    const auto part = [&](int k) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * k));
        return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    };
    F r;
    GS_EACH r.v[k] = part(k);
    return r;
#else
    Number lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = Number(p[i]);
    return load(lane);
#endif
}
GS_OP Number sum(F a) {
    Number lane[kLanes];
    store(lane, a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
    return lane[0];
}
GS_OP int pick(int32_t* p, const int32_t* from, int32_t base, uint32_t chosen) {
    int n = 0;
    for (; chosen; chosen &= chosen - 1) p[n++] = base + from[__builtin_ctz(chosen)];
    return n;
}
GS_OP int compress(Number* p, F a, M m) {
    Number lane[kLanes];
    store(lane, a);
    int n = 0;
    for (uint32_t b = bits(m); b; b &= b - 1) p[n++] = lane[__builtin_ctz(b)];
    return n;
}

#if GS_WIDTH == 1
GS_OP F ex2(F a) {
    GS_EACH a.v[k] = std::exp2(a.v[k]);
    return a;
}
GS_INLINE F ex2_near(F a) { return ex2(a); }
GS_OP F log(F a) {
    GS_EACH a.v[k] = std::log(a.v[k]);
    return a;
}
GS_OP F exp(F a) {
    GS_EACH a.v[k] = std::exp(a.v[k]);
    return a;
}
#else
// 2^a to two units in the last place. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
GS_OP F ex2(F a) {
    F r;
    GS_EACH {
        const V magic = V{} + 12582912.f;
        V x = a.v[k] > -126.f ? a.v[k] : V{} - 126.f;
        x = x < 127.f ? x : V{} + 127.f;
        const V shifted = x + magic, f = x - (shifted - magic);
        V p = V{} + kEx2[5];
        for (int i = 4; i >= 0; --i) p = p * f + kEx2[i];
        const U scale = ((U)shifted + 127) << 23;  // the sum's high bits fall out of the shift
        const V y = p * (V)scale;
        r.v[k] = a.v[k] >= -126.f ? (a.v[k] <= 127.5f ? y : y * V(V{} + 3.4e38f)) : V{};
    }
    return r;
}
GS_OP F ex2_near(F a) {
    F r;
    GS_EACH {
        const V magic = V{} + 12582912.f, shifted = a.v[k] + magic, f = a.v[k] - (shifted - magic);
        V p = V{} + kEx2[5];
        for (int i = 4; i >= 0; --i) p = p * f + kEx2[i];
        r.v[k] = (V)((U)p + ((U)shifted << 23));
    }
    return r;
}
GS_OP F split_exponent(F a, F& mantissa) {
    F e;
    GS_EACH {
        const U b = (U)a.v[k], shifted = b - 0x3f3504f3;  // the bits of 1/sqrt 2
        const W n = (W)shifted >> 23;
        mantissa.v[k] = (V)(b - ((U)n << 23));
        e.v[k] = __builtin_convertvector(n, V);
    }
    return e;
}
#endif

#if GS_WIDTH == 8
// Eight vectors of eight become their transpose.
GS_INLINE void transpose8(const __m256* r, __m256* out) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        out[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}

GS_OP void transpose(F* r) {
    __m256 in[2][2][8], out[2][2][8];  // quarters: rows 8 i .. 8 i + 7, part j
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            for (int k = 0; k < 8; ++k) in[i][j][k] = (__m256)r[8 * i + k].v[j];
            transpose8(in[i][j], out[j][i]);
        }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
            for (int k = 0; k < 8; ++k) r[8 * i + k].v[j] = (V)out[i][j][k];
}

// Lane i of the result is the sum over the lanes of r[i].
template <int Count>
GS_OP F sums(const F* r) {
    F total = F(0);
    _Pragma("GCC unroll 2") for (int i = 0; i < Count; i += 8) {
        __m256 x[8];
        for (int k = 0; k < 8; ++k)
            x[k] = i + k < Count ? (__m256)(r[i + k].v[0] + r[i + k].v[1]) : _mm256_setzero_ps();
        const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
        const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
        total.v[i / 8] = (V)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    return total;
}
#else
GS_OP void transpose(F* r) {
    Number a[kLanes][kLanes], b[kLanes][kLanes];
    std::memcpy(a, r, sizeof a);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) b[i][j] = a[j][i];
    std::memcpy(r, b, sizeof b);
}

template <int Count>
GS_OP F sums(const F* r) {
    Number lane[kLanes] = {};
    for (int i = 0; i < Count; ++i) lane[i] = sum(r[i]);
    return load(lane);
}

#endif

#endif

// The angle of (x, y), y at least 0: 0 to pi.
#if GS_WIDTH == 1
GS_OP F atan2(F y, F x) {
    GS_EACH y.v[k] = std::atan2(y.v[k], x.v[k]);
    return y;
}
#else
GS_OP F atan2(F y, F x) {
    const F a = abs(x), low = min(a, y), high = max(max(a, y), F(1e-30f)), t = low / high;
    const M upper = t > F(0.414213562f);  // tan(pi / 8): atan(t) = pi / 4 + atan((t - 1) / (t + 1))
    const F r = select(upper, (t - F(1)) / (t + F(1)), t), z = r * r;
    const F p = fma(fma(fma(fma(fma(z, F(-0.0614221f), F(0.1061958f)), z, F(-0.1424713f)), z, F(0.1999867f)), z,
                        F(-0.3333332f)),
                    z, F(1)) *
                r;  // to 1e-8
    const F octant = select(upper, p + F(0.785398163f), p);
    const F quadrant = select(y > a, F(1.57079633f) - octant, octant);
    return select(x < F(0), F(3.14159265f) - quadrant, quadrant);
}
#endif

#if GS_WIDTH > 1
// The natural exponential: 2^(a log2 e), the product carried in two pieces so that large arguments stay accurate.
GS_OP F exp(F a) {
    const F x = min(max(a, F(-200)), F(200));
    const F hi = x * F(1.44269502f), lo = fma(x, F(1.44269502f), -hi) + x * F(1.92596299e-8f);
    const F y = ex2(hi);
    return select(a == a, fma(y, lo * F(0.693147181f), y), a);
}
// For positive numbers; minus infinity at 0 and among the denormals, not a number below.
GS_OP F log(F a) {
    F m;
    const F e = split_exponent(a, m), f = m - F(1), s = f / (F(2) + f), z = s * s;
    // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| < 0.1716
    const F p = fma(fma(fma(fma(z, F(0.2222222f), F(0.2857143f)), z, F(0.4f)), z, F(0.6666667f)), z, F(0.f)) * s;
    const F y = fma(e, F(0.693359375f), fma(e, F(-2.12194440e-4f), p) + F(2) * s);
    const F edge = select(a >= F(0), F(-INFINITY), F(NAN));
    return select(a > F(1.17549435e-38f), select(a < F(INFINITY), y, a), edge);
}
#endif

// Sixteen numbers that begin `Shift` places behind those of `here` in memory, `next` being the sixteen that follow it.
// In registers, or read again from p, where `here` came from: whichever keeps both ways equally busy.
template <int Shift>
GS_INLINE F ahead(F here, F next, const Number* p) {
#if GS_WIDTH == 16
    if (Shift % 2)
        return _mm512_castsi512_ps(
            _mm512_alignr_epi32(_mm512_castps_si512(next.v), _mm512_castps_si512(here.v), Shift));
#endif
    return load(p + Shift);
}

// Bit `bit` of each of 64 numbers.
GS_INLINE uint64_t column_of_bits(const uint16_t* p, int bit) {
#if GS_WIDTH == 16
    const __m512i m = _mm512_set1_epi16(int16_t(1 << bit));
    return uint64_t(_mm512_test_epi16_mask(_mm512_loadu_si512(p), m)) |
           uint64_t(_mm512_test_epi16_mask(_mm512_loadu_si512(p + 32), m)) << 32;
#elif GS_WIDTH == 8
    const __m128i to_sign = _mm_cvtsi32_si128(15 - bit);
    const auto half = [&](const uint16_t* q) {
        const __m256i a = _mm256_sll_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), to_sign);
        const __m256i b = _mm256_sll_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 16)), to_sign);
        return uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8))));
    };
    return half(p) | half(p + 32) << 32;
#else
    // Eight numbers at a time: their bits, spread over eight bytes, are gathered into one by a multiplication.
    uint64_t column = 0;
    for (int i = 0; i < 64; i += 8) {
        uint64_t bytes = 0;
        for (int k = 0; k < 8; ++k) bytes |= uint64_t(p[i + k] >> bit & 1) << (8 * k);
        column |= (bytes * 0x0102040810204080u >> 56) << i;
    }
    return column;
#endif
}

// ---- built from the above -------------------------------------------------------------------------------------

// Sixteen rows of `Columns` numbers each, turned into `Columns` vectors: out[k] holds number k of every row.
template <int Columns>
GS_INLINE void load_rows(const Number* const* row, F* out) {
    _Pragma("GCC unroll 4") for (int c = 0; c < Columns; c += kLanes) {
        const int n = Columns - c < kLanes ? Columns - c : kLanes;
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = n == kLanes ? load(row[i] + c) : load_some(row[i] + c, n);
        transpose(block);
        for (int k = 0; k < n; ++k) out[c + k] = block[k];
    }
}

template <int Columns>
GS_INLINE void store_rows(Number* const* row, const F* in, int rows) {
    _Pragma("GCC unroll 4") for (int c = 0; c < Columns; c += kLanes) {
        const int n = Columns - c < kLanes ? Columns - c : kLanes;
        F block[kLanes];
        for (int k = 0; k < kLanes; ++k) block[k] = k < n ? in[c + k] : F(0);
        transpose(block);
        for (int i = 0; i < rows; ++i) {
            if (n == kLanes)
                store(row[i] + c, block[i]);
            else
                store_some(row[i] + c, block[i], n);
        }
    }
}

}  // namespace gs::cpu::GS_ISA
