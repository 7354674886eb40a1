// Projection alone, with all its options, and back; and from what it leaves to the splats that lists and blending want.
// CUDA backend. One thread per Gaussian.
#include "camera_grad.h"
#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;

// A Gaussian behind a lens. Both ways walk it.
struct Seen {
    Vec3<float> mean, p;
    Shape shape;
    Equidistant<float> fisheye;
    Sym2<float> sharp, wide, conic;
    float det, opacity, factor;  // factor: what compensation leaves of the opacity
};

__device__ __forceinline__ Seen through_lens(const Gaussians<float>& g, const Camera<float>& camera,
                                             const Optics<float>& optics, int64_t i) {
    Seen s{};
    s.mean = load3(g.means, i);
    s.p = to_camera(camera, s.mean);
    s.shape = load_shape(g, i);
    if (optics.lens.kind == LensKind::fisheye) s.fisheye = equidistant(optics.lens, s.p);
    s.sharp = lens_covariance(camera, optics.lens, s.fisheye, s.p, s.shape.cov);
    s.wide = blurred(s.sharp, optics.blur);
    s.det = exact_determinant(s.wide);
    s.conic = inverse(s.wide, s.det);
    s.opacity = load_opacity(g, i);
    s.factor = compensation_factor(optics.compensation, s.sharp, optics.blur);
    return s;
}

// Rows that are not drawn hold numbers that do no harm.
__device__ __forceinline__ void store_row(const OnScreen<float>& out, int64_t i, Vec2<float> mean, Sym2<float> conic,
                                          float opacity, float depth, int32_t radius) {
    out.means2d[2 * i] = mean.x, out.means2d[2 * i + 1] = mean.y;
    store3(out.conics, i, {conic.xx, conic.xy, conic.yy});
    out.opacities[i] = opacity;
    out.depths[i] = depth;
    out.radii[i] = radius;
}

__device__ __forceinline__ void load_camera(const View<float>& view, Camera<float>& shared) {
    if (threadIdx.x == 0)
        shared = make_camera(view.world_to_camera, view.intrinsics, view.camera_center, view.width, view.height);
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    stage_project_kernel(Gaussians<float> g, View<float> view, Optics<float> optics, TileGrid grid,
                         OnScreen<float> out) {
    __shared__ Camera<float> camera;
    load_camera(view, camera);
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= g.count) return;
    store_row(out, i, {0.f, 0.f}, {1.f, 0.f, 1.f}, 0.f, 1.f, 0);
    if (!sees(optics.lens, to_camera(camera, load3(g.means, i)), view.near_depth)) return;
    const Seen s = through_lens(g, camera, optics, i);
    const Vec2<float> mean = lens_mean(camera, optics.lens, s.fisheye, s.p);
    const float radius = splat_radius(s.wide), depth = lens_depth(optics.lens, s.p);
    const float opacity = s.det < 0.f ? 0.f : s.opacity * s.factor;  // rounding left no ellipse
    const bool finite = isfinite(s.conic.xx + s.conic.xy + s.conic.yy + opacity + depth) && radius < 1e9f;
    if (s.det == 0.f || !finite || empty(tile_rect(mean, radius, grid.tiles_x, grid.tiles_y))) return;
    store_row(out, i, mean, s.conic, opacity, depth, int32_t(radius));
}

// Gradients of one Gaussian on their way back.
struct Back {
    ProjectCovarianceGrad<float> cov;
    Vec3<float> p;
    float opacity;
};

__device__ __forceinline__ Back back_through_lens(const Gaussians<float>& g, const Camera<float>& camera,
                                                  const Optics<float>& optics, const Seen& s,
                                                  const OnScreenGrads<float>& grads, int64_t i) {
    const Vec3<float> c = grads.conics ? load3(grads.conics, i) : Vec3<float>{0.f, 0.f, 0.f};
    const Vec2<float> m =
        grads.means2d ? Vec2<float>{grads.means2d[2 * i], grads.means2d[2 * i + 1]} : Vec2<float>{0.f, 0.f};
    const float g_opacity = grads.opacities ? grads.opacities[i] : 0.f, g_depth = grads.depths ? grads.depths[i] : 0.f;
    Sym2<float> g_cov = inverse_vjp(s.wide, s.det, s.conic, Sym2<float>{c.x, c.y, c.z});
    const Sym2<float> more = compensation_factor_vjp(optics.compensation, s.sharp, g_opacity * s.opacity, optics.blur);
    g_cov = {g_cov.xx + more.xx, g_cov.xy + more.xy, g_cov.yy + more.yy};
    Back b;
    b.opacity = g_opacity * s.factor * (g.raw ? s.opacity * (1.f - s.opacity) : 1.f);
    b.cov = lens_covariance_vjp(camera, optics.lens, s.fisheye, s.p, s.shape.cov, g_cov);
    b.p = add(add(b.cov.p, lens_mean_vjp(camera, optics.lens, s.fisheye, s.p, m)),
              lens_depth_vjp(optics.lens, s.p, g_depth));
    return b;
}

__device__ __forceinline__ void store_shape(const Gaussians<float>& g, const GaussianGrads<float>& out, int64_t i,
                                            const Shape& shape, Sym3<float> g_cov) {
    if (out.cov3d) {
        float* c = out.cov3d + 6 * i;
        c[0] = g_cov.xx, c[1] = g_cov.xy, c[2] = g_cov.xz, c[3] = g_cov.yy, c[4] = g_cov.yz, c[5] = g_cov.zz;
    }
    if (g.cov3d) return;
    CovarianceGrad<float> grad = covariance_vjp(shape.quat, shape.scale, g_cov);
    grad.s = g.raw ? Vec3<float>{grad.s.x * shape.scale.x, grad.s.y * shape.scale.y, grad.s.z * shape.scale.z}
                   : mul(g.scale_modifier, grad.s);
    if (g.raw) grad.q = normalize_quat_vjp(shape.quat, shape.norm, grad.q);
    if (out.scales) store3(out.scales, i, grad.s);
    if (!out.quats) return;
    float* q = out.quats + 4 * i;
    q[0] = grad.q.x, q[1] = grad.q.y, q[2] = grad.q.z, q[3] = grad.q.w;
}

__global__ void __launch_bounds__(kThreads) stage_project_backward_kernel(StageProjectBackward p) {
    __shared__ Camera<float> camera;
    load_camera(p.view, camera);
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const bool inside = i < p.gaussians.count;
    Seen s{};
    s.shape.norm = 1.f;  // what is not drawn has gradients of 0, not of 0 / 0
    Back b{};
    if (inside && p.radii[i] > 0) {
        s = through_lens(p.gaussians, camera, p.optics, i);
        b = back_through_lens(p.gaussians, camera, p.optics, s, p.grads, i);
    }
    if (inside) {
        if (p.out.means) store3(p.out.means, i, matvec_transposed(camera.rotation, b.p));
        if (p.out.opacities) p.out.opacities[i] = b.opacity;
        store_shape(p.gaussians, p.out, i, s.shape, b.cov.cov);
    }
    if (p.out.world_to_camera)
        add_camera_grad<kThreads>(camera, true, s.mean, b.p, b.cov.rotation, {0.f, 0.f, 0.f}, p.out.world_to_camera);
}

// ---- from there to what lists and blending want --------------------------------------------------------------------

struct Packed {
    float4 place, shape;
    bool shows;
};

// `everywhere`: pixels look at points around their centers, nobody knows how far.
__device__ __forceinline__ Packed packed(const OnScreen<float>& s, int64_t i, bool everywhere) {
    const Vec2<float> mean = {s.means2d[2 * i], s.means2d[2 * i + 1]};
    const Vec3<float> c = load3(s.conics, i);
    const float log2_opacity = log2f(s.opacities[i]);  // NaN below 0: shows nowhere
    Packed r;
    r.shape = {-0.5f * kLog2e * c.x, -kLog2e * c.y, -0.5f * kLog2e * c.z, log2_opacity};
    r.shows = log2_opacity >= kLog2AlphaMin && c.x > 0.f && c.z > 0.f && isfinite(mean.x + mean.y + c.x + c.y + c.z);
    r.place = {mean.x, mean.y, -1e30f, -1e30f};
    if (!r.shows) return r;
    const Outline o = large_outline({mean.x, mean.y, everywhere ? INFINITY : 0.f, 0.f}, r.shape);
    r.place.z = o.extent_x, r.place.w = o.extent_y;
    return r;
}

__device__ __forceinline__ void store_splat(Splat* splats, int64_t i, const Packed& s, Vec3<float> color) {
    float4* splat = reinterpret_cast<float4*>(splats + i);
    splat[0] = s.place, splat[1] = s.shape, splat[2] = {color.x, color.y, color.z, 0.f};
}

template <bool kEverywhere>
__global__ void __launch_bounds__(kThreads) pack_kernel(int64_t count, OnScreen<float> s, TileGrid grid, Screen out) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const float depth = i < count ? s.depths[i] : 0.f;
    const bool seen =
        i < count && s.radii[i] > 0 && depth >= 0.f && isfinite(depth + s.means2d[2 * i] + s.means2d[2 * i + 1]);
    Packed splat{};
    TileRect rect{};
    if (seen) {
        splat = packed(s, i, kEverywhere);
        rect = tile_rect(Vec2<float>{splat.place.x, splat.place.y}, float(s.radii[i]), grid.tiles_x, grid.tiles_y);
        store_splat(out.splats, i, splat, {0.f, 0.f, 0.f});
    }
    const auto make = [&] {
        return large_outline({splat.place.x, splat.place.y, kEverywhere ? INFINITY : 0.f, 0.f}, splat.shape);
    };
    const TileSet set =
        find_tiles<kEverywhere>(seen && splat.shows && !empty(rect), make, rect, splat.place, splat.shape, grid);
    if (i < count) {
        out.tile_sets[i] = set;
        out.depth_keys[i] = seen ? __float_as_uint(depth) : kCulledKey;
        out.indices[i] = uint32_t(i);
    }
    add_totals<kThreads>(seen, set.count, out.totals);
}

__global__ void __launch_bounds__(kThreads) pack_again_kernel(PackAgain p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i == 0) *p.totals = {static_cast<unsigned long long>(p.entries), p.counted->visible, 0, 0};
    if (i >= p.count) return;
    store_splat(p.splats, i, packed(p.screen, i, p.everywhere),
                p.colors ? load3(p.colors, i) : Vec3<float>{0.f, 0.f, 0.f});
}

}  // namespace

void stage_project(const Gaussians<float>& gaussians, const View<float>& view, const Optics<float>& optics,
                   const OnScreen<float>& out, Stream stream) {
    if (gaussians.count == 0) return;
    stage_project_kernel<<<blocks_for(gaussians.count, kThreads), kThreads, 0, native(stream)>>>(
        gaussians, view, optics, TileGrid(view.width, view.height), out);
    check_launch("stage_project_kernel");
}

int64_t stage_project_backward_blocks(int64_t count) { return blocks_for(count, kThreads); }

void stage_project_backward(const StageProjectBackward& args, Stream stream) {
    if (args.gaussians.count == 0) return;
    stage_project_backward_kernel<<<blocks_for(args.gaussians.count, kThreads), kThreads, 0, native(stream)>>>(args);
    check_launch("stage_project_backward_kernel");
}

void pack(int64_t count, const OnScreen<float>& screen, const TileGrid& grid, bool everywhere, const Screen& out,
          Stream stream) {
    check(cudaMemsetAsync(out.totals, 0, sizeof(Totals), native(stream)), "clearing totals");
    if (count == 0) return;
    (everywhere ? pack_kernel<true> : pack_kernel<false>)<<<blocks_for(count, kThreads), kThreads, 0, native(stream)>>>(
        count, screen, grid, out);
    check_launch("pack_kernel");
}

void pack_again(const PackAgain& args, Stream stream) {
    pack_again_kernel<<<blocks_for(std::max<int64_t>(args.count, 1), kThreads), kThreads, 0, native(stream)>>>(args);
    check_launch("pack_again_kernel");
}

}  // namespace gs::cuda
