// ops_cuda.cpp: the operators of ops.cpp for tensors on a GPU.
//
// Here tensors become pointers and buffers are allocated, from PyTorch's allocator; the work is in cuda/, whose stages.h
// is its table of contents. Everything is enqueued on the current stream. The host waits once per image, for the number
// of (tile, splat) entries, and spends that time while the GPU sorts.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>

#include "cuda/stages.h"

namespace gs {
namespace {

// The device of a call, made current while it lasts, and its stream.
struct Device {
    explicit Device(const Tensor& tensor)
        : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()),
          device(tensor.device()) {}

    Tensor empty(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) const {
        return at::empty(shape, at::TensorOptions().dtype(dtype).device(device));
    }
    Tensor zeros(at::IntArrayRef shape) const {
        return at::zeros(shape, at::TensorOptions().dtype(at::kFloat).device(device));
    }
    Tensor bytes(size_t count) const { return empty({int64_t(count)}, at::kByte); }

    c10::cuda::CUDAGuard guard;
    cudaStream_t stream;
    at::Device device;
};

template <typename T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? data<T>(*tensor) : nullptr;
}

Gaussians<float> gaussians(const RasterizeInputs& in, double scale_modifier, bool antialiasing, bool raw) {
    Gaussians<float> g;
    g.count = in.count();
    g.means = data<float>(in.means);
    g.quats = data<float>(in.quats);
    g.scales = data<float>(in.scales);
    g.cov3d = data<float>(in.cov3d);
    g.opacities = data<float>(in.opacities);
    g.sh_dc = data<float>(in.sh_dc);
    g.sh_rest = data<float>(in.sh_rest);
    g.colors = data<float>(in.colors);
    g.rest_count = int(in.rest());
    g.sh_degree = int(in.sh_degree);
    g.scale_modifier = float(scale_modifier);
    g.antialiasing = antialiasing;
    g.raw = raw;
    return g;
}

View<float> view(const RasterizeInputs& in) {
    return {data<float>(in.world_to_camera), data<float>(in.K), data<float>(in.camera_center),
            data<float>(in.background),      int(in.width),     int(in.height)};
}

// Totals on their way to the host, while the GPU goes on with other work.
class TotalsReadback {
  public:
    TotalsReadback(const cuda::Totals* totals, cudaStream_t stream)
        : host_(at::empty({2}, at::TensorOptions().dtype(at::kLong).pinned_memory(true))) {
        C10_CUDA_CHECK(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
        C10_CUDA_CHECK(cudaMemcpyAsync(host_.data_ptr(), totals, sizeof(*totals), cudaMemcpyDeviceToHost, stream));
        C10_CUDA_CHECK(cudaEventRecord(ready_, stream));
    }
    ~TotalsReadback() {
        cudaEventSynchronize(ready_);  // the copy must not outlive its target
        cudaEventDestroy(ready_);
    }
    cuda::Totals wait() {
        C10_CUDA_CHECK(cudaEventSynchronize(ready_));
        return *static_cast<const cuda::Totals*>(host_.data_ptr());
    }

  private:
    Tensor host_;
    cudaEvent_t ready_;
};

// The order of the tensors in `state`.
enum State { kSplats, kIds, kRanges, kInvDepth, kStateCount };

using Rasterized = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Rasterized rasterize(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                     const OptionalTensor& cov3d, const Tensor& opacities, const OptionalTensor& sh_dc,
                     const OptionalTensor& sh_rest, const OptionalTensor& colors, const Tensor& world_to_camera,
                     const Tensor& K, const OptionalTensor& camera_center, const Tensor& background, int64_t width,
                     int64_t height, int64_t sh_degree, double scale_modifier, bool antialiasing, bool raw) {
    const RasterizeInputs in{means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K,
                             camera_center, background, width, height, sh_degree};
    check_inputs(in, false);
    const Device device(means);
    const int64_t N = in.count();
    const cuda::TileGrid grid{int(width), int(height)};

    const Tensor splats = device.empty({N, sizeof(cuda::Splat) / sizeof(float)}), radii = device.empty({N}, at::kInt);
    const Tensor keys = device.empty({N}, at::kInt), indices = device.empty({N}, at::kInt);
    const Tensor tile_counts = device.empty({N}, at::kInt), totals = device.empty({2}, at::kLong);
    const cuda::Screen screen = {data<cuda::Splat>(splats),     data<int32_t>(radii),        data<uint32_t>(keys),
                                 data<uint32_t>(indices),       data<uint32_t>(tile_counts), data<cuda::Totals>(totals)};
    cuda::preprocess(gaussians(in, scale_modifier, antialiasing, raw), view(in), screen, device.stream);
    TotalsReadback readback(screen.totals, device.stream);

    const Tensor keys_sorted = device.empty({N}, at::kInt), order = device.empty({N}, at::kInt);
    const Tensor offsets = device.empty({N}, at::kInt);
    const size_t scratch_bytes = std::max(cuda::depth_sort_workspace(N), cuda::offsets_workspace(N));
    const Tensor scratch = device.bytes(scratch_bytes);
    cuda::sort_by_depth(N, screen.depth_keys, data<uint32_t>(keys_sorted), screen.indices, data<uint32_t>(order),
                        scratch.data_ptr(), scratch_bytes, device.stream);
    cuda::count_offsets(N, screen.tile_counts, data<uint32_t>(order), data<uint32_t>(offsets), scratch.data_ptr(),
                        scratch_bytes, device.stream);

    const uint64_t wanted = readback.wait().entries;
    TORCH_CHECK(wanted <= uint64_t(cuda::kMaxEntries), "an image may have at most ", cuda::kMaxEntries,
                " pairs of tile and splat, got ", wanted, ": render it at a smaller size or with fewer Gaussians");
    const int64_t entries = int64_t(wanted), id_bytes = int64_t(cuda::tile_id_bytes(grid));
    const Tensor tiles = device.bytes(entries * id_bytes), tiles_sorted = device.bytes(entries * id_bytes);
    const Tensor ids = device.empty({entries}, at::kInt), ids_sorted = device.empty({entries}, at::kInt);
    const Tensor ranges = device.empty({grid.tiles(), 2}, at::kInt);
    const size_t sort_bytes = entries ? cuda::tile_sort_workspace(grid, entries) : 0;
    const Tensor sort_scratch = device.bytes(sort_bytes);
    cuda::emit({N, data<uint32_t>(order), data<uint32_t>(offsets), screen.tile_counts, screen.splats, screen.radii, grid,
                tiles.data_ptr(), data<uint32_t>(ids)},
               device.stream);
    cuda::sort_by_tile({grid, entries, tiles.data_ptr(), tiles_sorted.data_ptr(), data<uint32_t>(ids),
                        data<uint32_t>(ids_sorted), data<uint32_t>(ranges), sort_scratch.data_ptr(), sort_bytes},
                       device.stream);

    const Tensor color = device.empty({3, height, width}), alpha = device.empty({1, height, width});
    const Tensor inv_depth = device.empty({1, height, width});
    cuda::blend_forward({grid, screen.splats, data<uint32_t>(ids_sorted), data<uint32_t>(ranges), data<float>(background),
                         data<float>(color), data<float>(alpha), data<float>(inv_depth)},
                        device.stream);
    return {color, alpha, inv_depth, radii, {splats, ids_sorted, ranges, inv_depth}};
}

std::vector<Tensor> rasterize_backward(
    const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales, const OptionalTensor& cov3d,
    const Tensor& opacities, const OptionalTensor& sh_dc, const OptionalTensor& sh_rest, const OptionalTensor& colors,
    const Tensor& world_to_camera, const Tensor& K, const OptionalTensor& camera_center, const Tensor& background,
    int64_t width, int64_t height, int64_t sh_degree, double scale_modifier, bool antialiasing, bool raw,
    const Tensor& image, const Tensor& alpha, const Tensor& radii, const std::vector<Tensor>& state,
    const Tensor& grad_image, const OptionalTensor& grad_alpha, const OptionalTensor& grad_inv_depth, bool camera_grad,
    const OptionalTensor& grad_norm_sum, const OptionalTensor& visits, const OptionalTensor& abs_grad_norm_sum) {
    const RasterizeInputs in{means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K,
                             camera_center, background, width, height, sh_degree};
    check_inputs(in, false);
    check_backward(in, image, alpha, radii, grad_image, grad_alpha, grad_inv_depth, grad_norm_sum, visits,
                   abs_grad_norm_sum);
    TILESPLAT_CHECK(state.size() == kStateCount, "state must be what rasterize returned on cuda: ", int(kStateCount),
                    " tensors, got ", state.size());
    const Device device(means);
    const int64_t N = in.count();
    const cuda::TileGrid grid{int(width), int(height)};

    const Tensor splat_grads = device.zeros({N, cuda::kGradSize});
    const auto* splats = data<cuda::Splat>(state[kSplats]);
    cuda::blend_backward({grid, splats, data<uint32_t>(state[kIds]), data<uint32_t>(state[kRanges]), data<float>(image),
                          data<float>(alpha), data<float>(state[kInvDepth]), data<float>(grad_image),
                          data<float>(grad_alpha), data<float>(grad_inv_depth), abs_grad_norm_sum.has_value(),
                          data<float>(splat_grads)},
                         device.stream);

    const auto like = [&](const OptionalTensor& input) { return input ? at::empty_like(*input) : device.empty({0}); };
    const Tensor g_world_to_camera = camera_grad ? device.empty({4, 4}) : device.empty({0});
    std::vector<Tensor> grads = {at::empty_like(means), like(quats),  like(scales),  like(cov3d),
                                 at::empty_like(opacities), like(sh_dc), like(sh_rest), like(colors),
                                 g_world_to_camera, device.empty({3}), device.empty({N, 3})};
    const auto wanted = [&](size_t i) { return grads[i].numel() ? data<float>(grads[i]) : nullptr; };
    const GaussianGrads<float> out = {wanted(0), wanted(1), wanted(2), wanted(3),  wanted(4), wanted(5),
                                      wanted(6), wanted(7), wanted(8), wanted(9), wanted(10), data<float>(grad_norm_sum),
                                      data<float>(visits), data<float>(abs_grad_norm_sum)};
    cuda::background_grad(grid, data<float>(alpha), data<float>(grad_image), out.background, device.stream);
    cuda::preprocess_backward({gaussians(in, scale_modifier, antialiasing, raw), view(in), data<int32_t>(radii), splats,
                               data<float>(splat_grads), grad_inv_depth.has_value(), out},
                              device.stream);
    return grads;
}

Tensor mark_visible(const Tensor& means, const Tensor& world_to_camera) {
    check_points(means, "means", false);
    CHECK_TENSOR(world_to_camera, means, 4, 4);
    const Device device(means);
    const Tensor visible = device.empty({means.size(0)}, at::kBool);
    cuda::mark_visible(means.size(0), data<float>(means), data<float>(world_to_camera), data<bool>(visible),
                       device.stream);
    return visible;
}

// ---- losses --------------------------------------------------------------------------------------------------------

// Images [B, C, H, W] as B C planes, with room for the sums of their blocks.
struct SsimCall {
    cuda::Ssim args{};
    Tensor partial_ssim, partial_l1;
    int64_t blocks;
    double count;

    SsimCall(const Device& device, int64_t planes, int64_t height, int64_t width, bool valid) {
        blocks = cuda::ssim_blocks(int(planes), int(height), int(width));
        partial_ssim = device.empty({blocks});
        args.planes = int(planes), args.height = int(height), args.width = int(width);
        args.crop = valid ? 5 : 0;
        args.partial_ssim = data<float>(partial_ssim);
        count = double(planes) * double(height - 2 * args.crop) * double(width - 2 * args.crop);
    }
};

std::tuple<Tensor, std::vector<Tensor>> ssim(const Tensor& a, const Tensor& b, bool valid, bool train) {
    check_ssim(a, b, valid, false);
    const Device device(a);
    SsimCall call(device, a.size(0) * a.size(1), a.size(2), a.size(3), valid);
    const Tensor value = device.empty({});
    const Tensor maps = train ? device.empty({3, a.size(0), a.size(1), a.size(2), a.size(3)}) : Tensor();
    call.args.a = data<float>(a);
    call.args.b_float = data<float>(b);
    call.args.maps = train ? data<float>(maps) : nullptr;
    cuda::ssim_forward(call.args, device.stream);
    cuda::ssim_value(call.args.partial_ssim, call.blocks, call.count, data<float>(value), device.stream);
    return {value, train ? std::vector<Tensor>{maps} : std::vector<Tensor>{}};
}

Tensor ssim_backward(const Tensor& a, const Tensor& b, bool valid, const std::vector<Tensor>& state, const Tensor& grad) {
    check_ssim(a, b, valid, false);
    TILESPLAT_CHECK(state.size() == 1, "state must be what ssim with train=True returned, got ", state.size(), " tensors");
    TILESPLAT_CHECK(grad.numel() == 1 && grad.scalar_type() == at::kFloat && grad.device() == a.device(),
                    "grad must be one float32 on ", a.device().str(), ", got ", describe(grad));
    const Device device(a);
    SsimCall call(device, a.size(0) * a.size(1), a.size(2), a.size(3), valid);
    const Tensor g_a = at::empty_like(a);
    call.args.a = data<float>(a);
    call.args.b_float = data<float>(b);
    call.args.maps = data<float>(state[0]);
    cuda::ssim_backward({call.args, data<float>(grad), 1.f, 0.f, call.count, data<float>(g_a)}, device.stream);
    return g_a;
}

std::tuple<Tensor, Tensor, Tensor> photometric_loss(const Tensor& image, const Tensor& target, const OptionalTensor& mask,
                                                    double lambda_dssim) {
    check_photometric(image, target, mask, false);
    const Device device(image);
    SsimCall call(device, 3, image.size(1), image.size(2), false);
    const Tensor loss = device.empty({}), l1 = device.empty({}), g_image = at::empty_like(image);
    const Tensor maps = device.empty({3, 3, image.size(1), image.size(2)}), partial_l1 = device.empty({call.blocks});
    const bool bytes = target.scalar_type() == at::kByte;
    call.args.a = data<float>(image);
    call.args.b_float = bytes ? nullptr : data<float>(target);
    call.args.b_bytes = bytes ? data<uint8_t>(target) : nullptr;
    call.args.mask = data<float>(mask);
    call.args.maps = data<float>(maps);
    call.args.partial_l1 = data<float>(partial_l1);
    cuda::ssim_forward(call.args, device.stream);
    cuda::photometric_value(call.args.partial_ssim, call.args.partial_l1, call.blocks, call.count, float(lambda_dssim),
                            data<float>(loss), data<float>(l1), device.stream);
    cuda::ssim_backward({call.args, nullptr, float(-lambda_dssim), float(1.0 - lambda_dssim), call.count,
                         data<float>(g_image)},
                        device.stream);
    return {loss, l1, g_image};
}

// ---- Adam, neighbors -----------------------------------------------------------------------------------------------

void adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
               const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
               const OptionalTensor& visible) {
    check_adam(params, grads, exp_avg, exp_avg_sq, lrs, visible, false);
    TILESPLAT_CHECK(step >= 1, "step must be at least 1, got ", step);
    if (params.empty()) return;
    const Device device(params[0]);
    const double bias1 = visible ? 1.0 : 1.0 - std::pow(beta1, double(step));
    const double bias2 = visible ? 1.0 : 1.0 - std::pow(beta2, double(step));
    for (size_t first = 0; first < params.size(); first += cuda::kMaxAdamTensors) {
        cuda::Adam call{};
        call.beta2 = float(beta2), call.eps = float(eps);
        call.rest1 = float(1.0 - beta1), call.rest2 = float(1.0 - beta2);
        call.inv_sqrt_bias2 = float(1.0 / std::sqrt(bias2));
        call.visible = data<bool>(visible);
        for (size_t i = first; i < params.size() && call.count < cuda::kMaxAdamTensors; ++i) {
            const int64_t size = params[i].numel(), rows = params[i].dim() ? params[i].size(0) : 1;
            call.tensors[call.count++] = {data<float>(params[i]),     data<float>(grads[i]), data<float>(exp_avg[i]),
                                          data<float>(exp_avg_sq[i]), size,                  rows ? size / rows : 1,
                                          float(lrs[i] / bias1)};
        }
        cuda::adam(call, device.stream);
    }
}

Tensor knn_mean_dist2(const Tensor& points) {
    check_points(points, "points", false);
    TILESPLAT_CHECK(points.size(0) <= INT32_MAX, "points must have at most ", INT32_MAX, " rows, got ", points.size(0));
    const Device device(points);
    const int64_t N = points.size(0);
    const Tensor result = device.empty({N});
    if (N == 0) return result;
    const size_t bytes = cuda::knn_workspace(N);
    const Tensor workspace = device.bytes(bytes);
    cuda::knn_mean_dist2(N, data<float>(points), data<float>(result), workspace.data_ptr(), bytes, device.stream);
    return result;
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    m.impl("rasterize", gs::rasterize);
    m.impl("rasterize_backward", gs::rasterize_backward);
    m.impl("mark_visible", gs::mark_visible);
    m.impl("ssim", gs::ssim);
    m.impl("ssim_backward", gs::ssim_backward);
    m.impl("photometric_loss", gs::photometric_loss);
    m.impl("adam_step", gs::adam_step);
    m.impl("knn_mean_dist2", gs::knn_mean_dist2);
}
