// From Gaussians to splats: activation, projection, extent, tiles, color. CUDA backend.
//
// One thread per Gaussian. The mean alone decides whether a Gaussian lies in front of the camera, and most of what is not
// seen leaves here. Colors are read last, only for what lands in the image. Of several views, the blocks of the same
// Gaussians follow each other, and find them in the caches.
#include "gaussian.h"
#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;  // small blocks: shared memory is what limits how many fit
constexpr int kNoSh = -1;      // colors are given

struct Projected {
    Vec2<float> mean;
    Sym2<float> conic;
    Sym2<float> cov;  // blurred
    float det;        // of cov
    float opacity, radius, depth;
    TileRect rect;  // of the published rule
};

// False if the Gaussian is not in this view.
__device__ __forceinline__ bool project(const Gaussians<float>& g, const Camera<float>& camera, float near_depth,
                                        int64_t i, const TileGrid& grid, Projected& out) {
    const Vec3<float> p = to_camera(camera, load3(g.means, i));
    if (!(p.z > near_depth)) return false;

    const Shape shape = load_shape(g, i);
    const Sym2<float> sharp = project_covariance(camera, p, shape.cov);
    out.cov = blurred(sharp);
    const float det = exact_determinant(out.cov);
    if (det == 0.f) return false;

    out.det = det;
    out.depth = p.z;
    out.mean = project_mean(camera, p);
    out.conic = inverse(out.cov, det);
    out.radius = splat_radius(out.cov);
    out.opacity = load_opacity(g, i) * (g.antialiasing ? antialias_factor(sharp) : 1.f);
    if (det < 0.f) out.opacity = 0.f;  // rounding left no ellipse
    const bool finite = isfinite(out.conic.xx + out.conic.xy + out.conic.yy + out.opacity) && out.radius < 1e9f;
    out.rect = tile_rect(out.mean, out.radius, grid.tiles_x, grid.tiles_y);
    return finite && !empty(out.rect);
}

// Not clamped yet.
template <int Degree>
__device__ __forceinline__ Vec3<float> sh_color(const Gaussians<float>& g, const Camera<float>& camera, int64_t i,
                                                const float* rest) {
    constexpr int kCount = sh_count(Degree);
    const Vec3<float> offset = sub(load3(g.means, i), camera.center);
    float basis[kCount];
    sh_basis<Degree>(normalize(offset, inverse_length(offset)), basis);
    Vec3<float> color = add(mul(basis[0], load3(g.sh_dc, i)), Vec3<float>{0.5f, 0.5f, 0.5f});
#pragma unroll
    for (int k = 1; k < kCount; ++k) color = add(color, mul(basis[k], load3(rest, k - 1)));
    return color;
}

// The first half of a Splat: where, and how it fades.
struct Falloff {
    float4 place, shape;
    bool reaches;  // alpha = 1/255 somewhere
};

__device__ __forceinline__ Falloff falloff_of(const Projected& s) {
    Falloff f;
    const float log2_opacity = log2f(s.opacity);  // NaN below 0: reaches nothing
    const float reach = kLn2 * (log2_opacity - kLog2AlphaMin), slack = 1.0001f * sqrtf(2.f * reach);
    f.reaches = reach >= 0.f;
    f.place = {s.mean.x, s.mean.y, f.reaches ? slack * sqrtf(s.cov.xx) + 0.01f : -1e30f,
               f.reaches ? slack * sqrtf(s.cov.yy) + 0.01f : -1e30f};
    f.shape = {-0.5f * kLog2e * s.conic.xx, -kLog2e * s.conic.xy, -0.5f * kLog2e * s.conic.yy, log2_opacity};
    return f;
}

template <int Degree>
__global__ void __launch_bounds__(kThreads)
    preprocess_kernel(Gaussians<float> g, View<float> view, TileGrid grid, Screen out) {
    __shared__ Camera<float> camera;
    __shared__ alignas(16) float rest[Degree > 0 ? kThreads * kRestPitch<Degree> : 4];
    const unsigned own_view = blockIdx.x % unsigned(grid.views), block = blockIdx.x / unsigned(grid.views);
    if (threadIdx.x == 0)
        camera = make_camera(view.world_to_camera + 16 * int64_t(own_view), view.intrinsics, view.camera_center,
                             view.width, view.height);
    __syncthreads();

    const int64_t i = int64_t(block) * kThreads + threadIdx.x, row = own_view * g.count + i;
    Projected s{};
    bool seen = i < g.count && project(g, camera, view.near_depth, i, grid, s);
    const unsigned seen_lanes = __ballot_sync(kFullWarp, seen);
    TileSet set{};
    if (seen_lanes) {
        float* own_rest = rest;
        if constexpr (Degree > 0) {  // these arrive while tiles are found
            float* warp_rest = rest + (threadIdx.x / kWarp) * kWarp * kRestPitch<Degree>;
            start_rest<Degree>(g, i - lane_id(), seen_lanes, warp_rest);
            own_rest = warp_rest + lane_id() * kRestPitch<Degree>;
        }
        const Falloff falloff = seen ? falloff_of(s) : Falloff{};
        set = find_tiles<false>(
            seen && falloff.reaches,
            [&] { return outline(s.mean, s.cov, s.det, kLn2 * (falloff.shape.w - kLog2AlphaMin)); }, s.rect,
            falloff.place, falloff.shape, grid);

        Vec3<float> color = {0.f, 0.f, 0.f};
        if constexpr (Degree > 0) await_rest();
        if (seen) {
            if constexpr (Degree == kNoSh)
                color = load3(g.colors, i);
            else
                color = sh_color<Degree>(g, camera, i, own_rest);
        }
        seen = seen && isfinite(color.x + color.y + color.z);
        if (Degree != kNoSh) color = {max(color.x, 0.f), max(color.y, 0.f), max(color.z, 0.f)};
        if (seen) {
            float4* splat = reinterpret_cast<float4*>(out.splats + row);
            splat[0] = falloff.place;
            splat[1] = falloff.shape;
            splat[2] = {color.x, color.y, color.z, 1.f / s.depth};
            out.tile_sets[row] = set;
        }
    }
    if (i < g.count) {
        out.radii[row] = seen ? int32_t(s.radius) : 0;
        out.depth_keys[row] = seen ? __float_as_uint(s.depth) : kCulledKey;
        out.indices[row] = uint32_t(row);
    }
    add_totals<kThreads>(seen, set.count, out.totals);
}

__global__ void __launch_bounds__(kThreads)
    mark_visible_kernel(int64_t count, const float* means, const float* w, float near_depth, bool* visible) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    const Vec3<float> m = load3(means, i);
    visible[i] = w[8] * m.x + w[9] * m.y + w[10] * m.z + w[11] > near_depth;
}

}  // namespace

void preprocess(const Gaussians<float>& gaussians, const View<float>& view, const Screen& out, Stream stream,
                int views) {
    check(cudaMemsetAsync(out.totals, 0, sizeof(Totals), native(stream)), "clearing totals");
    if (gaussians.count == 0) return;
    const TileGrid grid(view.width, view.height, views);
    const unsigned blocks = blocks_for(gaussians.count, kThreads) * unsigned(views);
    const auto launch = [&](auto kernel) {
        kernel<<<blocks, kThreads, 0, native(stream)>>>(gaussians, view, grid, out);
        check_launch("preprocess_kernel");
    };
    if (gaussians.colors) return launch(preprocess_kernel<kNoSh>);
    switch (gaussians.sh_degree) {
        case 0:
            return launch(preprocess_kernel<0>);
        case 1:
            return launch(preprocess_kernel<1>);
        case 2:
            return launch(preprocess_kernel<2>);
        default:
            return launch(preprocess_kernel<3>);
    }
}

void mark_visible(int64_t count, const float* means, const float* world_to_camera, float near_depth, bool* visible,
                  Stream stream) {
    if (count == 0) return;
    mark_visible_kernel<<<blocks_for(count, kThreads), kThreads, 0, native(stream)>>>(count, means, world_to_camera,
                                                                                      near_depth, visible);
    check_launch("mark_visible_kernel");
}

}  // namespace gs::cuda
