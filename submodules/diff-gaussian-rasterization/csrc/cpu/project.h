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

// The fields of a Splat, in its order, and the depth behind them.
constexpr int kFields = 12;

static void project_chunk(const Gaussians<Number>& g, const Camera<F>& camera, F near_depth, const Frame<Number>& f,
                          int64_t chunk, int32_t* radii, DepthKey<Number>* keys) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < g.count ? begin + kChunk : g.count;
    alignas(64) Number field[kFields][kChunk + kLanes];
    alignas(64) Number means[3][kChunk + kLanes];
    alignas(64) int32_t found[kChunk + kLanes];
    int count = 0;

    for (int64_t i = begin; i < end; i += kLanes) {
        const int lanes = end - i < kLanes ? int(end - i) : kLanes;
        int32_t ids[kLanes];
        for (int k = 0; k < kLanes; ++k) ids[k] = int32_t(i + (k < lanes ? k : lanes - 1));
        if (g.sh_rest) {  // the second pass wants them: fetched while there is much to compute and little to read
            const char* rest = reinterpret_cast<const char*>(g.sh_rest + 3 * i * g.rest_count);
            for (int64_t at = 0; at < 3 * lanes * g.rest_count * int64_t(sizeof(Number)); at += 64)
                __builtin_prefetch(rest + at, 0, 2);
        }
        const Geometry s = geometry(g, camera, ids);
        const Vec2<F> m = project_mean(camera, s.p);
        const F radius = min(splat_radius(s.wide), F(1 << 30)), opacity = s.opacity * s.antialias;

        // The same rectangle as tile_rect's, to know whether it is empty.
        const F size = F(kTileSize), zero = F(0), tx = F(f.tiles_x), ty = F(f.tiles_y), half = F(0.5), one = F(1);
        const I x0 = to_int(clamp((m.x - half - radius) / size, zero, tx));
        const I y0 = to_int(clamp((m.y - half - radius) / size, zero, ty));
        const I x1 = to_int(clamp((m.x - half + radius + size - one) / size, zero, tx));
        const I y1 = to_int(clamp((m.y - half + radius + size - one) / size, zero, ty));

        const F bad = poison(m.x) + poison(m.y) + poison(s.conic.xx) + poison(s.conic.xy) + poison(s.conic.yy) +
                      poison(opacity) + poison(splat_radius(s.wide)) + poison(s.p.z);
        const M drawn =
            first_lanes(lanes) & (s.p.z > near_depth) & (s.det != zero) & (bad == zero) & !(x1 <= x0) & !(y1 <= y0);
        // What rounding has made other than an ellipse is in view, but shows nowhere.
        const M shown = (s.conic.xx > zero) & (s.conic.yy > zero) & (s.det > zero) & (opacity > zero);
        const F bias = select(shown, log(opacity) * F(kLog2e), F(-1e30));
        store_some(radii + i, to_int(zero_unless(drawn, radius)), lanes);

        const F out[kFields] = {m.x,
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
        for (int k = 0; k < kFields; ++k) {
            if (k < 6 || k > 8) compress(field[k] + count, out[k], drawn);
        }
        compress(means[0] + count, s.mean.x, drawn);
        compress(means[1] + count, s.mean.y, drawn);
        compress(means[2] + count, s.mean.z, drawn);
        for (uint32_t b = bits(drawn); b; b &= b - 1) found[count++] = int32_t(i) + __builtin_ctz(b);
    }

    int visible = 0;
    for (int i = 0; i < count; i += kLanes) {
        int32_t ids[kLanes];
        const int lanes = take_ids(found, i, count, ids);
        const Vec3<F> mean = {load(means[0] + i), load(means[1] + i), load(means[2] + i)};
        const Vec3<F> color = unclamped_color(g, camera, ids, mean);
        const F zero = F(0);
        const M good = first_lanes(lanes) & (poison(color.x) + poison(color.y) + poison(color.z) == zero);
        F row[kLanes];
        for (int k = 0; k < kFields - 1; ++k) row[k] = load(field[k] + i);
        row[6] = g.colors ? color.x : max(color.x, zero);
        row[7] = g.colors ? color.y : max(color.y, zero);
        row[8] = g.colors ? color.z : max(color.z, zero);
        for (int k = kFields - 1; k < kLanes; ++k) row[k] = zero;
        transpose(row);
        for (int k = 0; k < lanes; ++k) store(&f.splats[ids[k]].x, row[k]);

        const uint32_t keep = bits(good);
        for (int k = 0; k < lanes; ++k) {
            if (keep >> k & 1) {
                f.visible[begin + visible] = ids[k];
                std::memcpy(&keys[begin + visible], &field[kFields - 1][i + k], sizeof(Number));
                ++visible;
            } else {
                radii[ids[k]] = 0;
            }
        }
    }
    f.visible_count[chunk] = visible;
}

static void project(const Gaussians<Number>& g, const View<Number>& v, const Frame<Number>& f, int32_t* radii,
                    DepthKey<Number>* keys) {
    const Camera<F> camera = broadcast_camera(v);
    parallel(f.chunks(), [&](int64_t chunk) { project_chunk(g, camera, F(v.near_depth), f, chunk, radii, keys); });
}

}  // namespace gs::cpu::GS_ISA
