// stage_project.h: projection alone, with all its options, and back. Sixteen Gaussians at a time, in their own order.
#pragma once
#include "project_backward.h"

namespace gs::cpu::GS_ISA {

GS_INLINE Lens<F> broadcast_lens(const Lens<Number>& l) { return {l.kind, F(l.k1), F(l.k2), F(l.k3), F(l.k4)}; }

// Gaussians on their way to the screen; the way back walks it again.
struct Sight : Geometry { Equidistant<F> fisheye; };

GS_APART void through_lens(const Gaussians<Number>& g, const Camera<F>& camera, const Optics<Number>& optics,
                           const int32_t* ids, Sight& o) {
    static_cast<Geometry&>(o) = in_space(g, camera, ids);
    const Lens<F> lens = broadcast_lens(optics.lens);
    const F blur = F(optics.blur);
    if (lens.kind == LensKind::fisheye) o.fisheye = equidistant(lens, o.p);
    o.thin = lens_covariance(camera, lens, o.fisheye, o.p, o.cov);
    o.wide = blurred(o.thin, blur);
    o.det = determinant(o.wide);
    o.conic = inverse(o.wide, o.det);
    o.antialias = compensation_factor(optics.compensation, o.thin, blur);
}

static void stage_project_some(const Gaussians<Number>& g, const View<Number>& v, const Optics<Number>& optics,
                               const Camera<F>& camera, int64_t first, int64_t end, const OnScreen<Number>& out) {
    int32_t ids[kLanes];
    const int lanes = sixteen_from(first, end, ids);
    const Lens<F> lens = broadcast_lens(optics.lens);
    Sight s;
    through_lens(g, camera, optics, ids, s);
    const Vec2<F> m = lens_mean(camera, lens, s.fisheye, s.p);
    const F zero = F(0), one = F(1), depth = lens_depth(lens, s.p), opacity = s.opacity * s.antialias;
    const int tiles_x = (v.width + kTileSize - 1) / kTileSize, tiles_y = (v.height + kTileSize - 1) / kTileSize;
    const M drawn =
        first_lanes(lanes) & sees(lens, s.p, F(v.near_depth)) & in_picture(s, m, opacity, depth, tiles_x, tiles_y);

    // Rows that are not drawn hold numbers that do no harm.
    F row[kLanes] = {zero_unless(drawn, m.x),        zero_unless(drawn, m.y),
                     select(drawn, s.conic.xx, one), zero_unless(drawn, s.conic.xy),
                     select(drawn, s.conic.yy, one), zero_unless(drawn & is_ellipse(s), opacity),
                     select(drawn, depth, one)};
    for (int k = 7; k < kLanes; ++k) row[k] = zero;
    store_some(out.radii + first, to_int(zero_unless(drawn, radius_of(s))), lanes);
    store_some(out.opacities + first, row[5], lanes);
    store_some(out.depths + first, row[6], lanes);
    transpose(row);
    for (int k = 0; k < lanes; ++k) {
        alignas(64) Number one_row[kLanes];
        store(one_row, row[k]);
        std::memcpy(out.means2d + 2 * (first + k), one_row, 2 * sizeof(Number));
        std::memcpy(out.conics + 3 * (first + k), one_row + 2, 3 * sizeof(Number));
    }
}

static void stage_project(const Gaussians<Number>& g, const View<Number>& v, const Optics<Number>& optics,
                          const OnScreen<Number>& out) {
    const Camera<F> camera = broadcast_camera(v);
    parallel((g.count + kChunk - 1) / kChunk, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * kChunk < g.count ? (chunk + 1) * kChunk : g.count;
        for (int64_t i = chunk * kChunk; i < end; i += kLanes) stage_project_some(g, v, optics, camera, i, end, out);
    });
}

// Sixteen rows of the screen's gradients, zeros where there are none: mean 0..1, conic 2..4, opacity 5, depth 6.
GS_APART void load_screen_grads(const OnScreenGrads<Number>& grads, const int32_t* ids, M drawn, F* out) {
    alignas(64) Number rows[kLanes][kLanes] = {};
    const auto take = [&](const Number* from, int i, int at, int columns) {
        if (from) std::memcpy(rows[i] + at, from + int64_t(ids[i]) * columns, columns * sizeof(Number));
    };
    for (int i = 0; i < kLanes; ++i)
        take(grads.means2d, i, 0, 2), take(grads.conics, i, 2, 3), take(grads.opacities, i, 5, 1),
            take(grads.depths, i, 6, 1);
    for (int i = 0; i < kLanes; ++i) out[i] = load(rows[i]);
    transpose(out);
    for (int i = 0; i < 7; ++i) out[i] = zero_unless(drawn, out[i]);
}

// Gradients of sixteen Gaussians on their way back.
struct Back {
    Sight s;
    ProjectCovarianceGrad<F> cov;
    F opacity;
    Vec3<F> p;  // of the mean in camera space
};

GS_APART void back_through_lens(const Gaussians<Number>& g, const Camera<F>& camera, const Optics<Number>& optics,
                                const int32_t* ids, const F* grad, Back& b) {
    const Lens<F> lens = broadcast_lens(optics.lens);
    through_lens(g, camera, optics, ids, b.s);
    const Sight& s = b.s;
    Sym2<F> g_cov = inverse_vjp(s.wide, s.det, s.conic, Sym2<F>{grad[2], grad[3], grad[4]});
    const Sym2<F> more = compensation_factor_vjp(optics.compensation, s.thin, grad[5] * s.opacity, F(optics.blur));
    g_cov = {g_cov.xx + more.xx, g_cov.xy + more.xy, g_cov.yy + more.yy};
    b.opacity = grad[5] * s.antialias;
    if (g.raw) b.opacity = b.opacity * s.opacity * (F(1) - s.opacity);
    b.cov = lens_covariance_vjp(camera, lens, s.fisheye, s.p, s.cov, g_cov);
    b.p = add(add(b.cov.p, lens_mean_vjp(camera, lens, s.fisheye, s.p, Vec2<F>{grad[0], grad[1]})),
              lens_depth_vjp(lens, s.p, grad[6]));
}

// Adds what sixteen Gaussians say about the pose; only the chosen lanes.
GS_APART void add_pose(const Back& b, M drawn, PoseSum& pose) {
    const Vec3<F>& p = b.p;
    const Mat3<F>& r = b.cov.rotation;
    const F of_p[3] = {p.x, p.y, p.z}, mean[3] = {b.s.mean.x, b.s.mean.y, b.s.mean.z};
    const F more[9] = {r.r0.x, r.r0.y, r.r0.z, r.r1.x, r.r1.y, r.r1.z, r.r2.x, r.r2.y, r.r2.z};
    for (int i = 0; i < 3; ++i) {
        pose.translation[i] += gs::cpu::GS_ISA::sum(zero_unless(drawn, of_p[i]));
        for (int j = 0; j < 3; ++j)
            pose.rotation[3 * i + j] +=
                gs::cpu::GS_ISA::sum(zero_unless(drawn, fma(of_p[i], mean[j], more[3 * i + j])));
    }
}

// Rows as put_geometry takes them.
GS_APART void rows_of(const Gaussians<Number>& g, const Camera<F>& camera, const Back& b, F* row) {
    const Vec3<F> mean = matvec_transposed(camera.rotation, b.p);
    for (int k = 0; k < kLanes; ++k) row[k] = F(0);
    row[0] = mean.x, row[1] = mean.y, row[2] = mean.z, row[10] = b.opacity;
    if (g.cov3d) {
        const Sym3<F>& c = b.cov.cov;
        row[3] = c.xx, row[4] = c.xy, row[5] = c.xz, row[6] = c.yy, row[7] = c.yz, row[8] = c.zz;
    } else {
        CovarianceGrad<F> c = covariance_vjp(b.s.quat, b.s.scale, b.cov.cov);
        const Vec3<F>& scale = b.s.scale;
        c.s = g.raw ? Vec3<F>{c.s.x * scale.x, c.s.y * scale.y, c.s.z * scale.z} : mul(F(g.scale_modifier), c.s);
        if (g.raw) c.q = normalize_quat_vjp(b.s.quat, b.s.quat_norm, c.q);
        row[3] = c.q.x, row[4] = c.q.y, row[5] = c.q.z, row[6] = c.q.w, row[7] = c.s.x, row[8] = c.s.y, row[9] = c.s.z;
    }
    transpose(row);
}

static void stage_project_backward_some(const Gaussians<Number>& g, const Camera<F>& camera,
                                        const Optics<Number>& optics, const int32_t* radii,
                                        const OnScreenGrads<Number>& grads, int64_t first, int64_t end,
                                        const GaussianGrads<Number>& out, PoseSum* pose) {
    int32_t ids[kLanes];
    const int lanes = sixteen_from(first, end, ids);
    uint32_t seen = 0;
    for (int k = 0; k < lanes; ++k) seen |= uint32_t(radii[first + k] > 0) << k;
    F row[kLanes];
    for (F& x : row) x = F(0);
    if (seen) {
        const M drawn = from_bits(seen);
        F grad[kLanes];
        load_screen_grads(grads, ids, drawn, grad);
        Back b;
        back_through_lens(g, camera, optics, ids, grad, b);
        if (pose) add_pose(b, drawn, *pose);
        rows_of(g, camera, b, row);
    }
    for (int k = 0; k < lanes; ++k) {
        alignas(64) Number one[kLanes] = {};
        if (seen >> k & 1) store(one, row[k]);
        put_geometry(out, first + k, one);
    }
}

static void stage_project_backward(const Gaussians<Number>& g, const View<Number>& v, const Optics<Number>& optics,
                                   const int32_t* radii, const OnScreenGrads<Number>& grads,
                                   const GaussianGrads<Number>& out) {
    const Camera<F> camera = broadcast_camera(v);
    const int64_t chunks = (g.count + kChunk - 1) / kChunk;
    Buffer poses(chunks * sizeof(PoseSum));
    PoseSum* pose = out.world_to_camera ? poses.as<PoseSum>() : nullptr;
    parallel(chunks, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * kChunk < g.count ? (chunk + 1) * kChunk : g.count;
        if (pose) pose[chunk] = {};
        for (int64_t i = chunk * kChunk; i < end; i += kLanes)
            stage_project_backward_some(g, camera, optics, radii, grads, i, end, out, pose ? pose + chunk : nullptr);
    });
    if (pose) add_poses(v, pose, chunks, out.world_to_camera);
}

// A splat as the lists and the blending want it. It shows nowhere if it is no ellipse.
GS_INLINE Splat<Number> packed(const OnScreen<Number>& s, int64_t n, Number radius) {
    const Number x = s.means2d[2 * n], y = s.means2d[2 * n + 1], opacity = s.opacities[n];
    const Number xx = s.conics[3 * n], xy = s.conics[3 * n + 1], yy = s.conics[3 * n + 2];
    const bool finite = (x + y + xx + xy + yy + opacity) * 0 == 0;
    if (!(finite && xx > 0 && yy > 0 && opacity > 0)) return {0, 0, -1, 0, -1, Number(-1e30), 0, 0, 0, 0, radius, {}};
    const Number half = Number(-0.5 * kLog2e), whole = Number(-kLog2e);
    return {x, y, xx * half, xy * whole, yy * half, Number(std::log2(opacity)), 0, 0, 0, 0, radius, {}};
}

// All visible splats, and which these are: what has a radius, and is finite.
static void pack(const OnScreen<Number>& s, const Frame<Number>& f, DepthKey<Number>* keys) {
    parallel(f.chunks(), [&](int64_t chunk) {
        const int64_t first = chunk * kChunk, end = first + kChunk < f.count ? first + kChunk : f.count;
        int32_t visible = 0;
        for (int64_t n = first; n < end; ++n) {
            const Number place = s.means2d[2 * n] + s.means2d[2 * n + 1] + s.depths[n];
            if (!(s.radii[n] > 0 && place * 0 == 0 && s.depths[n] >= 0)) continue;
            f.splats[n] = packed(s, n, Number(s.radii[n]));
            f.visible[first + visible] = int32_t(n);
            std::memcpy(&keys[first + visible++], &s.depths[n], sizeof(Number));
        }
        f.visible_count[chunk] = visible;
    });
}

// Those that the frame already knows as visible.
static void pack_again(const OnScreen<Number>& s, const Frame<Number>& f) {
    parallel(f.chunks(), [&](int64_t chunk) {
        for (int32_t i = 0; i < f.visible_count[chunk]; ++i) {
            const int32_t n = f.visible[chunk * kChunk + i];
            f.splats[n] = packed(s, n, 0);
        }
    });
}

}  // namespace gs::cpu::GS_ISA
