// project.h: sixteen Gaussians at a time, from their parameters to what blending needs.
//
// Two passes over a chunk: first the geometry of all, then the color of those that are in view, packed together.
#pragma once
#include "../common/covariance.h"
#include "../common/projection.h"
#include "../common/sh.h"
#include "../common/tiles.h"
#include "simd.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu::GS_ISA {

constexpr double kLog2e = 1.4426950408889634;

GS_INLINE Camera<F> broadcast_camera(const View<Number>& v) {
    const Camera<Number> c = make_camera(v.world_to_camera, v.intrinsics, v.camera_center, v.width, v.height);
    const auto wide = [](Vec3<Number> a) { return Vec3<F>{F(a.x), F(a.y), F(a.z)}; };
    return {{wide(c.rotation.r0), wide(c.rotation.r1), wide(c.rotation.r2)},
            wide(c.translation),
            wide(c.center),
            F(c.fx),
            F(c.fy),
            F(c.cx),
            F(c.cy),
            F(c.limit_x),
            F(c.limit_y)};
}

// Sixteen Gaussians' parameters, activated, and the way to the screen. The backward pass walks it again.
struct Geometry {
    Vec3<F> mean, p;     // in the world, in camera space
    Vec4<F> quat;        // as used: unit length if raw
    F quat_norm;         // its length before
    Vec3<F> scale;       // as used: with the modifier
    Sym3<F> cov;         // in space
    Sym2<F> thin, wide;  // on the screen, without and with the blur
    F det;
    Sym2<F> conic;
    F opacity, antialias;  // activated; what antialiasing leaves of it
};

// What it is before it meets the lens. ids[0 .. 16): which Gaussians; repeat one where there are fewer.
GS_INLINE Geometry in_space(const Gaussians<Number>& g, const Camera<F>& camera, const int32_t* ids) {
    Geometry o;
    // One row per Gaussian, mean | quat or covariance | scale | opacity, turned around at once.
    alignas(64) Number rows[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const int64_t n = ids[i];
        Number* row = rows[i];
        std::memcpy(row, g.means + 3 * n, 3 * sizeof(Number));
        if (g.cov3d) {
            std::memcpy(row + 3, g.cov3d + 6 * n, 6 * sizeof(Number));
        } else {
            std::memcpy(row + 3, g.quats + 4 * n, 4 * sizeof(Number));
            std::memcpy(row + 7, g.scales + 3 * n, 3 * sizeof(Number));
        }
        row[10] = g.opacities[n];
        for (int k = 11; k < kLanes; ++k) row[k] = 0;
    }
    F c[kLanes];
    for (int i = 0; i < kLanes; ++i) c[i] = load(rows[i]);
    transpose(c);

    o.mean = {c[0], c[1], c[2]};
    o.p = to_camera(camera, o.mean);
    if (g.cov3d) {
        o.cov = {c[3], c[4], c[5], c[6], c[7], c[8]};
    } else {
        o.quat = {c[3], c[4], c[5], c[6]};
        o.scale = {c[7], c[8], c[9]};
        if (g.raw) {
            o.quat_norm = quat_norm(o.quat);
            o.quat = normalize_quat(o.quat);
            o.scale = {exp(o.scale.x), exp(o.scale.y), exp(o.scale.z)};
        }
        o.scale = mul(F(g.scale_modifier), o.scale);
        o.cov = covariance(o.quat, o.scale);
    }
    o.opacity = g.raw ? sigmoid(c[10]) : c[10];
    return o;
}

GS_INLINE Geometry geometry(const Gaussians<Number>& g, const Camera<F>& camera, const int32_t* ids) {
    Geometry o = in_space(g, camera, ids);
    o.thin = project_covariance(camera, o.p, o.cov);
    o.wide = blurred(o.thin);
    o.det = determinant(o.wide);
    o.conic = inverse(o.wide, o.det);
    o.antialias = g.antialiasing ? antialias_factor(o.thin) : F(1);
    return o;
}

// Color before the clamp at 0, for sixteen Gaussians seen along `direction`.
template <int Degree>
GS_INLINE Vec3<F> sh_color(const Gaussians<Number>& g, const int32_t* ids, Vec3<F> direction) {
    constexpr int kRest = 3 * (sh_count(Degree) - 1);
    F basis[sh_count(Degree)], c[kRest + kLanes];
    sh_basis<Degree>(direction, basis);
    const Number* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = g.sh_dc + 3 * int64_t(ids[i]);
    load_rows<3>(row, c);
    Vec3<F> color = {fma(basis[0], c[0], F(0.5)), fma(basis[0], c[1], F(0.5)), fma(basis[0], c[2], F(0.5))};
    if (Degree > 0) {
        for (int i = 0; i < kLanes; ++i) row[i] = g.sh_rest + 3 * int64_t(ids[i]) * g.rest_count;
        load_rows<kRest>(row, c);
        for (int k = 1; k < sh_count(Degree); ++k) {
            color.x = fma(basis[k], c[3 * k - 3], color.x);
            color.y = fma(basis[k], c[3 * k - 2], color.y);
            color.z = fma(basis[k], c[3 * k - 1], color.z);
        }
    }
    return color;
}

GS_INLINE Vec3<F> view_direction(const Camera<F>& camera, Vec3<F> mean, F& inv_length) {
    const Vec3<F> v = sub(mean, camera.center);
    inv_length = inverse_length(v);
    return normalize(v, inv_length);
}

static Vec3<F> unclamped_color(const Gaussians<Number>& g, const Camera<F>& camera, const int32_t* ids, Vec3<F> mean) {
    if (g.colors) {
        const Number* row[kLanes];
        for (int i = 0; i < kLanes; ++i) row[i] = g.colors + 3 * int64_t(ids[i]);
        F c[3];
        load_rows<3>(row, c);
        return {c[0], c[1], c[2]};
    }
    F inv_length;
    const Vec3<F> d = view_direction(camera, mean, inv_length);
    switch (g.sh_degree) {
        case 0:
            return sh_color<0>(g, ids, d);
        case 1:
            return sh_color<1>(g, ids, d);
        case 2:
            return sh_color<2>(g, ids, d);
        default:
            return sh_color<3>(g, ids, d);
    }
}

// Lane i is list[begin + i], the last one repeated behind the end.
GS_INLINE int take_ids(const int32_t* list, int64_t begin, int64_t end, int32_t* ids) {
    const int n = end - begin < kLanes ? int(end - begin) : kLanes;
    for (int i = 0; i < kLanes; ++i) ids[i] = list[begin + (i < n ? i : n - 1)];
    return n;
}

GS_INLINE M first_lanes(int n) { return from_bits((1u << n) - 1); }

// Zero where x is finite, not a number elsewhere.
GS_INLINE F poison(F x) { return x * F(0); }

// `ids` and how many of them there are, for sixteen Gaussians in a row.
GS_INLINE int sixteen_from(int64_t first, int64_t end, int32_t* ids) {
    const int lanes = end - first < kLanes ? int(end - first) : kLanes;
    for (int k = 0; k < kLanes; ++k) ids[k] = int32_t(first + (k < lanes ? k : lanes - 1));
    return lanes;
}

// As an integer holds it.
GS_INLINE F radius_of(const Geometry& s) { return min(splat_radius(s.wide), F(1 << 30)); }

// Which splats are finite and touch a tile.
GS_INLINE M in_picture(const Geometry& s, Vec2<F> mean, F opacity, F depth, int tiles_x, int tiles_y) {
    const F bad = poison(mean.x) + poison(mean.y) + poison(s.conic.xx) + poison(s.conic.xy) + poison(s.conic.yy) +
                  poison(opacity) + poison(splat_radius(s.wide)) + poison(depth);
    return (s.det != F(0)) & (bad == F(0)) & !empty(tile_rect(mean, radius_of(s), tiles_x, tiles_y));
}

// What rounding has made other than an ellipse is in view, but shows nowhere.
GS_INLINE M is_ellipse(const Geometry& s) { return (s.conic.xx > F(0)) & (s.conic.yy > F(0)) & (s.det > F(0)); }

// The fields of a Splat, in its order, and the depth behind them.
constexpr int kFields = 12;

// Those of a chunk that the geometry puts in view, side by side.
struct InView {
    alignas(64) Number field[kFields][kChunk + kLanes];
    alignas(64) Number mean[3][kChunk + kLanes];
    alignas(64) int32_t ids[kChunk + kLanes];
    int count = 0;
};

// Colors are wanted later: they are fetched while there is much to compute and little to read.
GS_INLINE void fetch_rest(const Gaussians<Number>& g, int64_t first, int lanes) {
    if (!g.sh_rest) return;
    const char* rest = reinterpret_cast<const char*>(g.sh_rest + 3 * first * g.rest_count);
    for (int64_t at = 0; at < 3 * lanes * g.rest_count * int64_t(sizeof(Number)); at += 64)
        __builtin_prefetch(rest + at, 0, 2);
}

// Sixteen Gaussians from `first` on: their radii, and what is in view.
GS_INLINE void project_some(const Gaussians<Number>& g, const Camera<F>& camera, F near_depth, const Frame<Number>& f,
                            int64_t first, int64_t end, int32_t* radii, InView& out) {
    int32_t ids[kLanes];
    const int lanes = sixteen_from(first, end, ids);
    fetch_rest(g, first, lanes);
    const Geometry s = geometry(g, camera, ids);
    const Vec2<F> m = project_mean(camera, s.p);
    const F zero = F(0), one = F(1), radius = radius_of(s), opacity = s.opacity * s.antialias;
    const M drawn = first_lanes(lanes) & (s.p.z > near_depth) & in_picture(s, m, opacity, s.p.z, f.tiles_x, f.tiles_y);
    const M shown = is_ellipse(s) & (opacity > zero);
    const F bias = select(shown, log(opacity) * F(kLog2e), F(-1e30));
    store_some(radii + first, to_int(zero_unless(drawn, radius)), lanes);

    const F field[kFields] = {m.x,
                              m.y,
                              select(shown, s.conic.xx * F(-0.5 * kLog2e), F(-1)),
                              zero_unless(shown, s.conic.xy * F(-kLog2e)),
                              select(shown, s.conic.yy * F(-0.5 * kLog2e), F(-1)),
                              bias,
                              zero,
                              zero,
                              zero,
                              one / s.p.z,
                              radius,
                              s.p.z};
    for (int k = 0; k < kFields; ++k)
        if (k < 6 || k > 8) compress(out.field[k] + out.count, field[k], drawn);
    compress(out.mean[0] + out.count, s.mean.x, drawn);
    compress(out.mean[1] + out.count, s.mean.y, drawn);
    compress(out.mean[2] + out.count, s.mean.z, drawn);
    for (uint32_t b = bits(drawn); b; b &= b - 1) out.ids[out.count++] = int32_t(first) + __builtin_ctz(b);
}

// Sixteen of those in view, from the i-th on, become splats. Returns those whose color is finite, as bits.
GS_INLINE uint32_t color_some(const Gaussians<Number>& g, const Camera<F>& camera, const Frame<Number>& f,
                              const InView& in, int i) {
    int32_t ids[kLanes];
    const int lanes = take_ids(in.ids, i, in.count, ids);
    const Vec3<F> mean = {load(in.mean[0] + i), load(in.mean[1] + i), load(in.mean[2] + i)};
    const Vec3<F> color = unclamped_color(g, camera, ids, mean);
    const F zero = F(0);
    F row[kLanes];
    for (int k = 0; k < kFields - 1; ++k) row[k] = load(in.field[k] + i);
    row[6] = g.colors ? color.x : max(color.x, zero);
    row[7] = g.colors ? color.y : max(color.y, zero);
    row[8] = g.colors ? color.z : max(color.z, zero);
    for (int k = kFields - 1; k < kLanes; ++k) row[k] = zero;
    transpose(row);
    for (int k = 0; k < lanes; ++k) store(&f.splats[ids[k]].x, row[k]);
    return bits(first_lanes(lanes) & (poison(color.x) + poison(color.y) + poison(color.z) == zero));
}

static void project_chunk(const Gaussians<Number>& g, const Camera<F>& camera, F near_depth, const Frame<Number>& f,
                          int64_t chunk, int32_t* radii, DepthKey<Number>* keys) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < g.count ? begin + kChunk : g.count;
    InView in;
    for (int64_t i = begin; i < end; i += kLanes) project_some(g, camera, near_depth, f, i, end, radii, in);
    int64_t visible = begin;
    for (int i = 0; i < in.count; i += kLanes) {
        const uint32_t finite = color_some(g, camera, f, in, i);
        for (int k = 0; k < kLanes && i + k < in.count; ++k) {
            const int32_t id = in.ids[i + k];
            if (finite >> k & 1) {
                f.visible[visible] = id;
                std::memcpy(&keys[visible++], &in.field[kFields - 1][i + k], sizeof(Number));
            } else {
                radii[id] = 0;
            }
        }
    }
    f.visible_count[chunk] = int32_t(visible - begin);
}

static void project(const Gaussians<Number>& g, const View<Number>& v, const Frame<Number>& f, int32_t* radii,
                    DepthKey<Number>* keys) {
    const Camera<F> camera = broadcast_camera(v);
    parallel(f.chunks(), [&](int64_t chunk) { project_chunk(g, camera, F(v.near_depth), f, chunk, radii, keys); });
}

}  // namespace gs::cpu::GS_ISA
