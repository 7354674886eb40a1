// project_backward.h: from the records of a splat's tiles back to its parameters, sixteen splats at a time.
//
// Everything between the parameters and the screen is computed again: cheaper than to have kept it.
#pragma once
#include "memory.h"
#include "project.h"

namespace gs::cpu::GS_ISA {

constexpr double kLn2 = 0.6931471805599453;

// The pose gradient of one chunk: of the rotation (3x3), the translation and the camera center.
template <typename T>
struct PoseGrad { T rotation[9], translation[3], center[3]; };
using PoseSum = PoseGrad<double>;

GS_INLINE void add_outer(F* m, Vec3<F> a, Vec3<F> b) {
    const F u[3] = {a.x, a.y, a.z}, v[3] = {b.x, b.y, b.z};
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) m[3 * i + j] = fma(u[i], v[j], m[3 * i + j]);
}

// The gradient of the coefficients goes to `rest` rows; that of the direction is returned. (Not inline: three degrees in one
// function take longer to compile than all other kernels.)
template <int Degree>
GS_APART Vec3<F> sh_color_vjp(const Gaussians<Number>& g, const int32_t* ids, int lanes, Vec3<F> direction,
                               Vec3<F> color, Number* rest, int64_t first) {
    constexpr int kCount = sh_count(Degree), kRest = 3 * (kCount - 1);
    F basis[kCount], c[kRest + kLanes], weight[kCount];
    sh_basis<Degree>(direction, basis);
    const Number* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = g.sh_rest + 3 * int64_t(ids[i]) * g.rest_count;
    load_rows<kRest>(row, c);
    weight[0] = F(0);
    for (int k = 1; k < kCount; ++k)
        weight[k] = fma(c[3 * k - 3], color.x, fma(c[3 * k - 2], color.y, c[3 * k - 1] * color.z));
    if (rest) {
        for (int k = 1; k < kCount; ++k) {
            c[3 * k - 3] = basis[k] * color.x, c[3 * k - 2] = basis[k] * color.y, c[3 * k - 1] = basis[k] * color.z;
        }
        Number* to[kLanes];
        for (int i = 0; i < lanes; ++i) to[i] = rest + 3 * (ids[i] - first) * g.rest_count;
        store_rows<kRest>(to, c, lanes);
    }
    return sh_basis_vjp<Degree>(direction, weight);
}

// The sum of a splat's records. Few have more than four, and how many of these there are costs no branch.
GS_INLINE F sum_records(const Number* records, SlotRange slots) {
    constexpr int kFew = 4;
    const Number* record = records + int64_t(slots.begin) * kRecord;
    const int64_t count = slots.end - slots.begin;
    F sum = F(0);
    _Pragma("GCC unroll 4") for (int k = 0; k < kFew; ++k) sum = sum + load_if(k < count, record + k * kRecord);
    for (int64_t k = kFew; k < count; ++k) sum = sum + load(record + k * kRecord);
    return sum;
}

// What a splat will need. One splat at a time: the processor waits for no more than a few dozen lines at once.
GS_INLINE void fetch_ahead(const Gaussians<Number>& g, const Frame<Number>& f, const Number* records, int32_t splat) {
    const Number* record = records + int64_t(f.slots[splat].begin) * kRecord;
    __builtin_prefetch(&f.splats[splat]);
    for (int k = 0; k < 4; ++k) __builtin_prefetch(record + k * kRecord);
    if (!g.sh_rest) return;
    const Number* rest = g.sh_rest + 3 * int64_t(splat) * g.rest_count;
    for (int k = 0; k < 3 * g.rest_count; k += 64 / int(sizeof(Number))) __builtin_prefetch(rest + k, 0, 2);
}

template <int Columns>
GS_INLINE void put_row(Number* to, int64_t row, const Number* from) {
    if (!to) return;
    for (int k = 0; k < Columns; ++k) to[row * Columns + k] = from[k];
}

// From the sums of records to gradients of the screen.
struct ScreenGrad {
    Vec2<F> mean;
    Sym2<F> cov;
    F opacity;
};

GS_INLINE ScreenGrad screen_vjp(const Gaussians<Number>& g, const Geometry& s, const F* sum) {
    const F half = F(0.5), g_log_opacity = sum[0];
    const Sym2<F> q = s.conic;
    ScreenGrad o;
    o.mean = {q.xx * sum[1] + q.xy * sum[2], q.xy * sum[1] + q.yy * sum[2]};
    o.cov = inverse_vjp(s.wide, s.det, q, Sym2<F>{-half * sum[3], -sum[4], -half * sum[5]});
    o.opacity = g_log_opacity / s.opacity;
    if (g.antialiasing) {
        const Sym2<F> more = antialias_factor_vjp(s.thin, g_log_opacity / s.antialias);
        o.cov = {o.cov.xx + more.xx, o.cov.xy + more.xy, o.cov.yy + more.yy};
    }
    o.opacity = select(s.opacity > F(0), o.opacity, F(0));
    if (g.raw) o.opacity = g_log_opacity * (F(1) - s.opacity);
    return o;
}

// A row: mean 0..2, covariance or quat and scale from 3, opacity 10.
GS_INLINE void put_geometry(const GaussianGrads<Number>& out, int64_t n, const Number* row) {
    put_row<3>(out.means, n, row);
    put_row<6>(out.cov3d, n, row + 3);
    put_row<4>(out.quats, n, row + 3);
    put_row<3>(out.scales, n, row + 7);
    put_row<1>(out.opacities, n, row + 10);
}

// The norms of sixteen splats' gradients of the mean, and of the sums of absolute ones.
GS_INLINE void add_statistics(const Statistics& to, const View<Number>& v, const int32_t* ids, int lanes, F ndc_x,
                              F ndc_y, const F* sum) {
    alignas(64) Number norms[kLanes], absolute[kLanes];
    store(norms, sqrt(ndc_x * ndc_x + ndc_y * ndc_y));
    const F ax = sum[10] * F(kLn2 * 0.5 * v.width), ay = sum[11] * F(kLn2 * 0.5 * v.height);
    store(absolute, sqrt(ax * ax + ay * ay));
    for (int k = 0; k < lanes; ++k) {
        if (to.grad_norm_sum) to.grad_norm_sum[ids[k]] += float(norms[k]);
        if (to.visits) to.visits[ids[k]] += 1;
        if (to.abs_grad_norm_sum) to.abs_grad_norm_sum[ids[k]] += float(absolute[k]);
    }
}

GS_INLINE void clear_rows(const GaussianGrads<Number>& out, int64_t rows, int rest_count) {
    const auto clear = [&](Number* p, int64_t columns) {
        if (p) std::memset(p, 0, rows * columns * sizeof(Number));
    };
    clear(out.means, 3), clear(out.quats, 4), clear(out.scales, 3), clear(out.cov3d, 6), clear(out.opacities, 1);
    clear(out.sh_dc, 3), clear(out.sh_rest, 3 * rest_count), clear(out.colors, 3), clear(out.means2d, 3);
}

// Of sixteen splats' colors: what passes the clamp at 0. `color` is the gradient of what was blended.
GS_INLINE Vec3<F> clamp_vjp(const Frame<Number>& f, const int32_t* ids, Vec3<F> color) {
    alignas(64) Number drawn[3][kLanes];
    for (int k = 0; k < kLanes; ++k) {
        const Splat<Number>& splat = f.splats[ids[k]];
        drawn[0][k] = splat.red, drawn[1][k] = splat.green, drawn[2][k] = splat.blue;
    }
    const F zero = F(0);
    return {zero_unless(load(drawn[0]) > zero, color.x), zero_unless(load(drawn[1]) > zero, color.y),
            zero_unless(load(drawn[2]) > zero, color.z)};
}

// The gradient of the mean by way of the direction in which its color is seen; that of the camera's center is its negative.
GS_INLINE Vec3<F> seen_from_vjp(const Gaussians<Number>& g, const Camera<F>& camera, const int32_t* ids, int lanes,
                                Vec3<F> mean, Vec3<F> color, Number* rest, int64_t first) {
    F inv_length;
    const Vec3<F> d = view_direction(camera, mean, inv_length);
    const auto of_degree = g.sh_degree == 1   ? sh_color_vjp<1>
                           : g.sh_degree == 2 ? sh_color_vjp<2>
                                              : sh_color_vjp<3>;
    return normalize_vjp(d, inv_length, of_degree(g, ids, lanes, d, color, rest, first));
}

// Adds what sixteen splats do to the pose: p is the gradient of their means in camera space.
GS_INLINE void add_pose(PoseGrad<F>& to, M real, Vec3<F> p, Vec3<F> center, Vec3<F> mean, const Mat3<F>& rotation) {
    const auto keep = [&](Vec3<F> a) {
        return Vec3<F>{zero_unless(real, a.x), zero_unless(real, a.y), zero_unless(real, a.z)};
    };
    p = keep(p), center = keep(center);
    add_outer(to.rotation, p, mean);
    const Mat3<F>& r = rotation;
    const F more[9] = {r.r0.x, r.r0.y, r.r0.z, r.r1.x, r.r1.y, r.r1.z, r.r2.x, r.r2.y, r.r2.z};
    for (int k = 0; k < 9; ++k) to.rotation[k] = to.rotation[k] + zero_unless(real, more[k]);
    to.translation[0] = to.translation[0] + p.x, to.translation[1] = to.translation[1] + p.y;
    to.translation[2] = to.translation[2] + p.z;
    to.center[0] = to.center[0] + center.x, to.center[1] = to.center[1] + center.y;
    to.center[2] = to.center[2] + center.z;
}

// The shape in space, into a row from 3 on: covariance, or quat and scale.
GS_INLINE void shape_vjp(const Gaussians<Number>& g, const Geometry& s, const Sym3<F>& cov, F* row) {
    if (g.cov3d) {
        row[3] = cov.xx, row[4] = cov.xy, row[5] = cov.xz;
        row[6] = cov.yy, row[7] = cov.yz, row[8] = cov.zz;
        return;
    }
    CovarianceGrad<F> c = covariance_vjp(s.quat, s.scale, cov);
    c.s = g.raw ? Vec3<F>{c.s.x * s.scale.x, c.s.y * s.scale.y, c.s.z * s.scale.z} : mul(F(g.scale_modifier), c.s);
    if (g.raw) c.q = normalize_quat_vjp(s.quat, s.quat_norm, c.q);
    row[3] = c.q.x, row[4] = c.q.y, row[5] = c.q.z, row[6] = c.q.w;
    row[7] = c.s.x, row[8] = c.s.y, row[9] = c.s.z;
}

// Sixteen splats' rows, to where each belongs.
GS_INLINE void put_rows(const Gaussians<Number>& g, const GaussianGrads<Number>& out, const int32_t* ids, int lanes,
                        int64_t first, F* row) {
    transpose(row);
    alignas(64) Number one[kLanes];
    for (int k = 0; k < lanes; ++k) {
        const int64_t n = ids[k] - first;
        store(one, row[k]);
        put_geometry(out, n, one);
        if (out.means2d) out.means2d[3 * n] = one[11], out.means2d[3 * n + 1] = one[12];
        put_row<3>(g.colors ? out.colors : out.sh_dc, n, one + 13);
    }
}

// What the splats of one chunk are computed from, and where it goes.
struct ChunkBackward {
    const Gaussians<Number>& g;
    const View<Number>& v;
    const Camera<F>& camera;
    const Frame<Number>& f;
    const Number* records;
    bool inv_depth;
    int64_t first;
    const GaussianGrads<Number>& out;
    const Statistics& statistics;
};

// Sums of the records of sixteen splats: number k of all of them in sum[k].
GS_INLINE void gather_records(const ChunkBackward& c, const int32_t* ids, int lanes, int i, int visible, F* sum) {
    for (int k = 0; k < kLanes; ++k) {
        sum[k] = k < lanes ? sum_records(c.records, c.f.slots[ids[k]]) : F(0);
        if (i + kLanes + k < visible) fetch_ahead(c.g, c.f, c.records, c.f.visible[c.first + i + kLanes + k]);
    }
    transpose(sum);
}

// Sixteen of the chunk's visible splats, from the i-th on.
GS_INLINE void project_backward_some(const ChunkBackward& c, int i, int visible, PoseGrad<F>* pose) {
    const Gaussians<Number>& g = c.g;
    int32_t ids[kLanes];
    const int lanes = take_ids(c.f.visible + c.first, i, visible, ids);
    F sum[kLanes], row[kLanes];
    gather_records(c, ids, lanes, i, visible, sum);
    const Geometry s = geometry(g, c.camera, ids);

    const ScreenGrad screen = screen_vjp(g, s, sum);
    const ProjectCovarianceGrad<F> back = project_covariance_vjp(c.camera, s.p, s.cov, screen.cov);
    Vec3<F> g_p = add(project_mean_vjp(c.camera, s.p, screen.mean), back.p);
    if (c.inv_depth) g_p.z = g_p.z - sum[9] / (s.p.z * s.p.z);
    Vec3<F> g_mean = matvec_transposed(c.camera.rotation, g_p);

    const F zero = F(0);
    Vec3<F> g_color = {sum[6], sum[7], sum[8]}, g_center = {zero, zero, zero};
    if (!g.colors) g_color = clamp_vjp(c.f, ids, g_color);
    if (!g.colors && g.sh_degree > 0) {
        const Vec3<F> g_offset = seen_from_vjp(g, c.camera, ids, lanes, s.mean, g_color, c.out.sh_rest, c.first);
        g_mean = add(g_mean, g_offset);
        g_center = sub(g_center, g_offset);
    }
    if (pose) add_pose(*pose, first_lanes(lanes), g_p, g_center, s.mean, back.rotation);

    const F ndc_x = screen.mean.x * F(0.5 * c.v.width), ndc_y = screen.mean.y * F(0.5 * c.v.height);
    const F factor = g.colors ? F(1) : F(kSh0);
    for (F& x : row) x = zero;
    row[0] = g_mean.x, row[1] = g_mean.y, row[2] = g_mean.z;
    shape_vjp(g, s, back.cov, row);
    row[10] = screen.opacity;
    row[11] = ndc_x, row[12] = ndc_y;
    row[13] = g_color.x * factor, row[14] = g_color.y * factor, row[15] = g_color.z * factor;
    put_rows(g, c.out, ids, lanes, c.first, row);
    add_statistics(c.statistics, c.v, ids, lanes, ndc_x, ndc_y, sum);
}

// Writes the gradients of the splats of one chunk. Row i of every output belongs to splat first + i; rows of splats out of
// view become zero.
static void project_backward_chunk(const Gaussians<Number>& g, const View<Number>& v, const Camera<F>& camera,
                                   const Frame<Number>& f, const Number* records, bool inv_depth, int64_t chunk,
                                   const GaussianGrads<Number>& out, const Statistics& statistics, PoseSum* pose) {
    const int64_t first = chunk * kChunk, rows = g.count - first < kChunk ? g.count - first : kChunk;
    const ChunkBackward c = {g, v, camera, f, records, inv_depth, first, out, statistics};
    clear_rows(out, rows, g.rest_count);
    PoseGrad<F> sums;
    for (F& x : sums.rotation) x = F(0);
    for (F& x : sums.translation) x = F(0);
    for (F& x : sums.center) x = F(0);
    const int visible = f.visible_count[chunk];
    for (int i = 0; i < visible; i += kLanes) project_backward_some(c, i, visible, pose ? &sums : nullptr);
    if (!pose) return;
    for (int k = 0; k < 9; ++k) pose->rotation[k] = sum(sums.rotation[k]);
    for (int k = 0; k < 3; ++k) pose->translation[k] = sum(sums.translation[k]), pose->center[k] = sum(sums.center[k]);
}

// The camera center, if derived, is -R^T t.
static void add_poses(const View<Number>& v, const PoseSum* poses, int64_t count, Number* grad) {
    PoseSum total = {};
    for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < 9; ++k) total.rotation[k] += poses[i].rotation[k];
        for (int k = 0; k < 3; ++k) total.translation[k] += poses[i].translation[k];
        for (int k = 0; k < 3; ++k) total.center[k] += poses[i].center[k];
    }
    for (int i = 0; i < 3 && !v.camera_center; ++i) {
        for (int j = 0; j < 3; ++j) {
            total.rotation[3 * i + j] -= v.world_to_camera[4 * i + 3] * total.center[j];
            total.translation[i] -= v.world_to_camera[4 * i + j] * total.center[j];
        }
    }
    for (int i = 0; i < 16; ++i) {
        const int row = i / 4, column = i % 4;
        grad[i] =
            row == 3 ? Number(0) : Number(column == 3 ? total.translation[row] : total.rotation[3 * row + column]);
    }
}

// The same pointers, advanced to row `n`.
GS_INLINE GaussianGrads<Number> from_row(GaussianGrads<Number> out, int64_t n, int rest_count) {
    const auto move = [&](Number*& p, int64_t columns) {
        if (p) p += n * columns;
    };
    move(out.means, 3), move(out.quats, 4), move(out.scales, 3), move(out.cov3d, 6), move(out.opacities, 1);
    move(out.sh_dc, 3), move(out.sh_rest, 3 * int64_t(rest_count)), move(out.colors, 3), move(out.means2d, 3);
    return out;
}

static void project_backward(const Gaussians<Number>& g, const View<Number>& v, const Frame<Number>& f,
                             const Number* records, bool inv_depth, const GaussianGrads<Number>& out,
                             const Statistics& statistics) {
    const Camera<F> camera = broadcast_camera(v);
    Buffer poses(f.chunks() * sizeof(PoseSum));
    PoseSum* pose = out.world_to_camera ? poses.as<PoseSum>() : nullptr;
    parallel(f.chunks(), [&](int64_t c) {
        project_backward_chunk(g, v, camera, f, records, inv_depth, c, from_row(out, c * kChunk, g.rest_count),
                               statistics, pose ? pose + c : nullptr);
    });
    if (pose) add_poses(v, pose, f.chunks(), out.world_to_camera);
}

}  // namespace gs::cpu::GS_ISA
