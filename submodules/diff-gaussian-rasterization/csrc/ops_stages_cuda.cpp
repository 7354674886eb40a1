// ops_stages_cuda.cpp: the operators of ops_stages.cpp for tensors on a GPU.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <optional>

#include "ops_cuda.h"
#include "ops_stages.h"

namespace gs {
namespace {

const Tensor kNone;
const OptionalTensor kNothing;

RasterizeInputs inputs(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                       const OptionalTensor& cov3d, const Tensor& opacities, const Tensor& world_to_camera,
                       const Tensor& K, int64_t width, int64_t height) {
    return {means,           quats, scales,   cov3d, opacities, kNothing, kNothing, kNothing,
            world_to_camera, K,     kNothing, kNone, width,     height,   0};
}

OnScreen<float> on_screen(const ScreenTensors& s) {
    const auto at = [](const Tensor& t) { return t.defined() ? data<float>(t) : nullptr; };
    return {at(s.means2d), at(s.conics), at(s.opacities), at(s.depths),
            s.radii.defined() ? data<int32_t>(s.radii) : nullptr};
}

using ProjectedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ProjectedTensors project(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                         const OptionalTensor& cov3d, const Tensor& opacities, const Tensor& world_to_camera,
                         const Tensor& K, int64_t width, int64_t height, double scale_modifier, bool raw,
                         double near_depth, double blur, int64_t compensation, int64_t camera,
                         std::vector<double> distortion) {
    const RasterizeInputs in = inputs(means, quats, scales, cov3d, opacities, world_to_camera, K, width, height);
    const ProjectOptions options{near_depth, blur, compensation, camera, distortion};
    check_project(in, options, false);
    const Device device(means);
    const int64_t N = in.count();
    const Tensor means2d = device.empty({N, 2}), conics = device.empty({N, 3}), dimmed = device.empty({N});
    const Tensor depths = device.empty({N}), radii = device.empty({N}, at::kInt);
    cuda::stage_project(gaussians(in, scale_modifier, false, raw), view(in, near_depth), options.optics<float>(),
                        on_screen({means2d, conics, dimmed, depths, radii}), device.stream);
    return {means2d, conics, dimmed, depths, radii};
}

std::vector<Tensor> project_backward(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                                     const OptionalTensor& cov3d, const Tensor& opacities,
                                     const Tensor& world_to_camera, const Tensor& K, int64_t width, int64_t height,
                                     double scale_modifier, bool raw, double near_depth, double blur,
                                     int64_t compensation, int64_t camera, std::vector<double> distortion,
                                     const Tensor& radii, const OptionalTensor& grad_means2d,
                                     const OptionalTensor& grad_conics, const OptionalTensor& grad_opacities,
                                     const OptionalTensor& grad_depths, std::array<bool, 6> wanted) {
    const RasterizeInputs in = inputs(means, quats, scales, cov3d, opacities, world_to_camera, K, width, height);
    const ProjectOptions options{near_depth, blur, compensation, camera, distortion};
    check_project(in, options, false);
    check_screen_grads(means, radii, grad_means2d, grad_conics, grad_opacities, grad_depths);
    const Device device(means);
    const OptionalTensor like[] = {means, quats, scales, cov3d, opacities};
    std::vector<Tensor> grads;
    for (size_t i = 0; i < 5; ++i) grads.push_back(wanted[i] && like[i] ? at::empty_like(*like[i]) : device.empty({0}));
    const Tensor poses = wanted[5] ? device.empty({cuda::stage_project_backward_blocks(in.count()), 4, 4}) : Tensor();
    const auto at = [&](size_t i) { return grads[i].numel() ? data<float>(grads[i]) : nullptr; };
    GaussianGrads<float> out = {};
    out.means = at(0), out.quats = at(1), out.scales = at(2), out.cov3d = at(3), out.opacities = at(4);
    out.world_to_camera = wanted[5] ? data<float>(poses) : nullptr;
    cuda::stage_project_backward({gaussians(in, scale_modifier, false, raw),
                                  view(in, near_depth),
                                  options.optics<float>(),
                                  data<int32_t>(radii),
                                  {data<float>(grad_means2d), data<float>(grad_conics), data<float>(grad_opacities),
                                   data<float>(grad_depths), nullptr},
                                  out},
                                 device.stream);
    grads.push_back(wanted[5] ? at::sum(poses, 0) : device.empty({0}));
    return grads;
}

// The order of the tensors of the lists, and of what a blending keeps.
enum Lists { kIds, kRanges, kCounted, kListsCount };
enum Kept { kSplats, kTrace, kTotals, kKeptCount };
constexpr int64_t kSplatFloats = sizeof(cuda::Splat) / sizeof(float);
constexpr int64_t kTotalsCount = sizeof(cuda::Totals) / sizeof(int64_t);

StateLayout lists_layout(const cuda::TileGrid& grid, int64_t entries) {
    return {{{entries}, at::kInt}, {{grid.tiles(), 2}, at::kInt}, {{kTotalsCount}, at::kLong}};
}

std::vector<Tensor> lists(const Tensor& means2d, const Tensor& conics, const Tensor& opacities, const Tensor& depths,
                          const Tensor& radii, int64_t width, int64_t height, double margin, int64_t capacity) {
    const ScreenTensors screen{means2d, conics, opacities, depths, radii};
    check_screen(screen, false);
    check_size(width, height);
    const Device device(means2d);
    const cuda::TileGrid grid{int(width), int(height)};
    std::optional<Counted> counted;  // without a capacity, wait for the number of entries
    if (capacity <= 0) counted.emplace(device.stream);
    const Projected projected(device, screen.count(), grid, counted ? counted->place() : nullptr,
                              [&](const cuda::Screen& s) {
                                  cuda::pack(screen.count(), on_screen(screen), grid, margin > 0, s, device.stream);
                              });
    if (counted) counted->enqueued();
    const Tensor order = depth_order(device, projected);
    const int64_t room = counted ? counted->wait() : screen.count() ? std::min(capacity, cuda::kMaxEntries) : 0;
    const TileLists tiles(device, grid, projected, order, room, false);
    return {tiles.ids, projected.ranges, projected.totals};
}

// Lists that come from the caller's hands, ready to be walked.
struct Walk {
    cuda::TileGrid grid;
    Tensor splats, totals;
    const uint32_t *ids, *ranges;
    int64_t entries;

    Walk(const Device& device, const ScreenTensors& screen, const std::vector<Tensor>& lists, bool everywhere,
         int64_t width, int64_t height)
        : grid{int(width), int(height)}, entries(state_rows(lists, kIds)) {
        check_state(lists, lists_layout(grid, entries), device.device);
        ids = data<uint32_t>(lists[kIds]), ranges = data<uint32_t>(lists[kRanges]);
        splats = device.empty({screen.count(), kSplatFloats}), totals = device.empty({kTotalsCount}, at::kLong);
        cuda::pack_again(screen.count(), on_screen(screen), everywhere, entries, data<cuda::Splat>(splats),
                         data<cuda::Totals>(totals), device.stream);
    }
};

// The host does not wait for the answer; see check_kept.
cuda::BlendBackward to_check(const cuda::BlendFeatures& f) {
    return {f.grid, f.splats, f.ids, f.ranges, f.entries, f.trace.common, f.totals};
}

// Rows of whole portions of channels, as the kernels read them.
Tensor padded(const Tensor& features) {
    const int64_t D = features.size(1), stride = cuda::feature_stride(int(D));
    const bool aligned = reinterpret_cast<uintptr_t>(features.data_ptr()) % 16 == 0;
    if (stride == D) return aligned ? features : features.clone();
    return at::constant_pad_nd(features, {0, stride - D});
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> blend(const Tensor& means2d, const Tensor& conics,
                                                      const Tensor& opacities, const Tensor& features,
                                                      const OptionalTensor& /*absolute*/,
                                                      const std::vector<Tensor>& lists, const OptionalTensor& offset,
                                                      int64_t width, int64_t height, bool keep) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, false);
    check_features(features, offset, width, height, false);
    const int64_t D = features.size(1);
    CHECK_TENSOR(features, means2d, screen.count(), D);
    const Device device(means2d);
    const Walk walk(device, screen, lists, offset.has_value(), width, height);
    const Tensor image = device.empty({D, height, width}), left = device.empty({1, height, width});
    const Tensor rows = padded(features);
    const int stride = int(rows.size(1));
    const Tensor trace = keep ? device.bytes(cuda::feature_trace_bytes(walk.grid, walk.entries, stride)) : Tensor();
    const cuda::FeatureTrace t =
        keep ? cuda::feature_trace_in(trace.data_ptr(), walk.grid, walk.entries, stride) : cuda::FeatureTrace{};
    cuda::BlendFeatures call = {walk.grid,
                                data<cuda::Splat>(walk.splats),
                                walk.ids,
                                walk.ranges,
                                walk.entries,
                                data<float>(rows),
                                int(D),
                                stride,
                                data<float>(offset),
                                data<float>(image),
                                data<float>(left),
                                t,
                                data<cuda::Totals>(walk.totals)};
    cuda::check_lists(to_check(call), screen.count(), device.stream);
    cuda::blend_features(call, device.stream);
    return {image, left, keep ? std::vector<Tensor>{walk.splats, trace, walk.totals} : std::vector<Tensor>{}};
}

std::vector<Tensor> blend_backward(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                   const Tensor& features, const std::vector<Tensor>& lists,
                                   const OptionalTensor& offset, int64_t width, int64_t height,
                                   const std::vector<Tensor>& kept, const Tensor& image,
                                   const OptionalTensor& grad_image, const OptionalTensor& grad_left, bool absolute) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, false);
    check_features(features, offset, width, height, false);
    const int64_t N = screen.count(), D = features.size(1), entries = state_rows(lists, kIds);
    const cuda::TileGrid grid{int(width), int(height)};
    const int stride = cuda::feature_stride(int(D));
    CHECK_TENSOR(features, means2d, N, D);
    check_blend_backward(features, width, height, image, grad_image, grad_left, absolute);
    const at::Device where = means2d.device();
    check_state(lists, lists_layout(grid, entries), where);
    const int64_t bytes = int64_t(cuda::feature_trace_bytes(grid, entries, stride));
    check_state(kept, {{{N, kSplatFloats}, at::kFloat}, {{bytes}, at::kByte}, {{kTotalsCount}, at::kLong}}, where);
    at::globalContext().alertNotDeterministic("tilesplat::blend_backward");
    const Device device(means2d);
    const Tensor rows = padded(features), g_rows = device.zeros({N, stride});
    const Tensor moments = device.zeros({N, cuda::kMomentCount});
    const std::vector<Tensor> grads = {device.empty({N, 2}), device.empty({N, 3}), device.empty({N}), Tensor(),
                                       device.empty({absolute ? N : 0, 2})};
    const cuda::BlendFeatures forward = {grid,
                                         data<cuda::Splat>(kept[kSplats]),
                                         data<uint32_t>(lists[kIds]),
                                         data<uint32_t>(lists[kRanges]),
                                         entries,
                                         data<float>(rows),
                                         int(D),
                                         stride,
                                         data<float>(offset),
                                         data<float>(image),
                                         nullptr,
                                         cuda::feature_trace_in(kept[kTrace].data_ptr(), grid, entries, stride),
                                         data<cuda::Totals>(kept[kTotals])};
    cuda::check_kept(to_check(forward), N, device.stream);
    cuda::blend_features_backward({forward,
                                   data<float>(grad_image),
                                   data<float>(grad_left),
                                   N,
                                   on_screen(screen),
                                   data<float>(moments),
                                   data<float>(g_rows),
                                   {data<float>(grads[0]), data<float>(grads[1]), data<float>(grads[2]), nullptr,
                                    absolute ? data<float>(grads[4]) : nullptr}},
                                  device.stream);
    const Tensor g_features = stride == D ? g_rows : at::narrow(g_rows, 1, 0, D).contiguous();
    return {grads[0], grads[1], grads[2], g_features, absolute ? grads[4] : device.empty({0})};
}

std::tuple<Tensor, Tensor, Tensor> scores(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                          const std::vector<Tensor>& lists, const OptionalTensor& offset, int64_t width,
                                          int64_t height, const OptionalTensor& weights, const OptionalTensor& colors,
                                          const OptionalTensor& picture, const OptionalTensor& gradient,
                                          const OptionalTensor& along) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, false);
    check_scores(opacities, offset, width, height, weights, colors, picture, gradient, along);
    const Device device(means2d);
    const Walk walk(device, screen, lists, offset.has_value(), width, height);
    const Tensor sums = device.zeros({screen.count(), cuda::kScoreSize});
    const Tensor largest = device.empty({height, width}, at::kInt), median = device.empty({height, width}, at::kInt);
    cuda::BlendFeatures lists_alone = {walk.grid, data<cuda::Splat>(walk.splats), walk.ids, walk.ranges, walk.entries};
    lists_alone.totals = data<cuda::Totals>(walk.totals);
    cuda::check_lists(to_check(lists_alone), screen.count(), device.stream);
    cuda::scores({walk.grid, data<cuda::Splat>(walk.splats), walk.ids, walk.ranges, data<float>(offset),
                  data<float>(weights), data<float>(colors), data<float>(gradient), data<float>(picture),
                  data<float>(along), data<float>(sums), data<int32_t>(largest), data<int32_t>(median)},
                 device.stream);
    return {sums, largest, median};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    m.impl("project", gs::project);
    m.impl("project_backward", gs::project_backward);
    m.impl("lists", gs::lists);
    m.impl("blend", gs::blend);
    m.impl("blend_backward", gs::blend_backward);
    m.impl("scores", gs::scores);
}
