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

OnScreen<float> on_screen(const ScreenTensors& s) {
    const auto at = [](const Tensor& t) { return t.defined() ? data<float>(t) : nullptr; };
    return {at(s.means2d), at(s.conics), at(s.opacities), at(s.depths),
            s.radii.defined() ? data<int32_t>(s.radii) : nullptr};
}

ProjectedTensors project(const ProjectCall& call) {
    const Device device(call.in.means);
    const int64_t N = call.in.count();
    const Tensor means2d = device.empty({N, 2}), conics = device.empty({N, 3}), opacities = device.empty({N});
    const Tensor depths = device.empty({N}), radii = device.empty({N}, at::kInt);
    cuda::stage_project(gaussians(call.in, call.scale_modifier, false, call.raw), view(call.in, call.near_depth),
                        call.optics<float>(), on_screen({means2d, conics, opacities, depths, radii}), device.stream);
    return {means2d, conics, opacities, depths, radii};
}

std::vector<Tensor> project_backward(const ProjectBackwardCall& call) {
    const ProjectCall& forward = call.forward;
    const RasterizeInputs& in = forward.in;
    const Device device(in.means);
    const OptionalTensor like[] = {in.means, in.quats, in.scales, in.cov3d, in.opacities};
    std::vector<Tensor> grads;
    for (size_t i = 0; i < 5; ++i)
        grads.push_back(call.wanted[i] && like[i] ? at::empty_like(*like[i]) : device.empty({0}));
    // Blocks write sums of their own for the pose.
    const bool pose = call.wanted[5];
    const Tensor poses = pose ? device.empty({cuda::stage_project_backward_blocks(in.count()), 4, 4}) : Tensor();
    const auto at = [&](size_t i) { return grads[i].numel() ? data<float>(grads[i]) : nullptr; };
    GaussianGrads<float> out = {};
    out.means = at(0), out.quats = at(1), out.scales = at(2), out.cov3d = at(3), out.opacities = at(4);
    out.world_to_camera = pose && poses.numel() ? data<float>(poses) : nullptr;
    const OnScreenGrads<float> screen = {data<float>(call.grad_means2d), data<float>(call.grad_conics),
                                         data<float>(call.grad_opacities), data<float>(call.grad_depths), nullptr};
    cuda::stage_project_backward(
        {gaussians(in, forward.scale_modifier, false, forward.raw), view(in, forward.near_depth),
         forward.optics<float>(), data<int32_t>(call.radii), screen, out},
        device.stream);
    grads.push_back(pose ? at::sum(poses, 0) : device.empty({0}));
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

std::vector<Tensor> lists(const ListsCall& call) {
    const ScreenTensors& screen = call.screen;
    const Device device(screen.means2d);
    const cuda::TileGrid grid{int(call.width), int(call.height)};
    std::optional<Counted> counted;  // without a capacity, wait for the number of entries
    if (call.capacity <= 0) counted.emplace(device.stream);
    const Projected projected(
        device, screen.count(), grid, counted ? counted->place() : nullptr, [&](const cuda::Screen& s) {
            cuda::pack(screen.count(), on_screen(screen), grid, call.margin > 0, s, device.stream);
        });
    if (counted) counted->enqueued();
    const Tensor order = depth_order(device, projected);
    const int64_t room = counted ? counted->wait() : screen.count() ? std::min(call.capacity, cuda::kMaxEntries) : 0;
    const TileLists tiles(device, grid, projected, order, room, false);
    return {tiles.ids, projected.ranges, projected.totals};
}

// Lists that come from the caller's hands, ready to be walked.
struct Walk {
    cuda::TileGrid grid;
    Tensor splats, totals;
    const uint32_t *ids, *ranges;
    int64_t entries;

    Walk(const Device& device, const WalkCall& call)
        : grid{int(call.width), int(call.height)}, entries(state_rows(call.lists, kIds)) {
        check_state(call.lists, lists_layout(grid, entries), device.device);
        const int64_t N = call.screen.count();
        ids = data<uint32_t>(call.lists[kIds]), ranges = data<uint32_t>(call.lists[kRanges]);
        splats = device.empty({N, kSplatFloats}), totals = device.empty({kTotalsCount}, at::kLong);
        cuda::pack_again(N, on_screen(call.screen), call.offset.has_value(), entries, data<cuda::Splat>(splats),
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

std::tuple<Tensor, Tensor, std::vector<Tensor>> blend(const BlendCall& call) {
    const int64_t D = call.features.size(1), N = call.walk.screen.count();
    const int64_t height = call.walk.height, width = call.walk.width;
    const Device device(call.features);
    const Walk walk(device, call.walk);
    const Tensor image = device.empty({D, height, width}), left = device.empty({1, height, width});
    const Tensor rows = padded(call.features);
    const int stride = int(rows.size(1));
    const Tensor trace =
        call.keep ? device.bytes(cuda::feature_trace_bytes(walk.grid, walk.entries, stride)) : Tensor();
    const cuda::BlendFeatures args = {
        walk.grid,
        data<cuda::Splat>(walk.splats),
        walk.ids,
        walk.ranges,
        walk.entries,
        data<float>(rows),
        int(D),
        stride,
        data<float>(call.walk.offset),
        data<float>(image),
        data<float>(left),
        call.keep ? cuda::feature_trace_in(trace.data_ptr(), walk.grid, walk.entries, stride) : cuda::FeatureTrace{},
        data<cuda::Totals>(walk.totals)};
    cuda::check_lists(to_check(args), N, device.stream);
    cuda::blend_features(args, device.stream);
    return {image, left, call.keep ? std::vector<Tensor>{walk.splats, trace, walk.totals} : std::vector<Tensor>{}};
}

void check_kept_state(const BlendBackwardCall& call, const cuda::TileGrid& grid, int64_t entries, int stride) {
    const WalkCall& walk = call.forward.walk;
    const at::Device device = walk.screen.means2d.device();
    const int64_t bytes = int64_t(cuda::feature_trace_bytes(grid, entries, stride));
    check_state(walk.lists, lists_layout(grid, entries), device);
    check_state(call.kept,
                {{{walk.screen.count(), kSplatFloats}, at::kFloat}, {{bytes}, at::kByte}, {{kTotalsCount}, at::kLong}},
                device);
}

std::vector<Tensor> blend_backward(const BlendBackwardCall& call) {
    const WalkCall& walk = call.forward.walk;
    const Tensor& features = call.forward.features;
    const int64_t N = walk.screen.count(), D = features.size(1), entries = state_rows(walk.lists, kIds);
    const cuda::TileGrid grid{int(walk.width), int(walk.height)};
    const int stride = cuda::feature_stride(int(D));
    check_kept_state(call, grid, entries, stride);
    at::globalContext().alertNotDeterministic("tilesplat::blend_backward");
    const Device device(features);
    const Tensor rows = padded(features), g_rows = device.zeros({N, stride});
    const Tensor moments = device.zeros({N, cuda::kMomentCount});
    const std::vector<Tensor> grads = {device.empty({N, 2}), device.empty({N, 3}), device.empty({N}),
                                       device.empty({call.absolute ? N : 0, 2})};
    const cuda::BlendFeatures forward = {grid,
                                         data<cuda::Splat>(call.kept[kSplats]),
                                         data<uint32_t>(walk.lists[kIds]),
                                         data<uint32_t>(walk.lists[kRanges]),
                                         entries,
                                         data<float>(rows),
                                         int(D),
                                         stride,
                                         data<float>(walk.offset),
                                         data<float>(call.image),
                                         nullptr,
                                         cuda::feature_trace_in(call.kept[kTrace].data_ptr(), grid, entries, stride),
                                         data<cuda::Totals>(call.kept[kTotals])};
    cuda::check_kept(to_check(forward), N, device.stream);
    const OnScreenGrads<float> out = {data<float>(grads[0]), data<float>(grads[1]), data<float>(grads[2]), nullptr,
                                      call.absolute ? data<float>(grads[3]) : nullptr};
    cuda::blend_features_backward({forward, data<float>(call.grad_image), data<float>(call.grad_left), N,
                                   on_screen(walk.screen), data<float>(moments), data<float>(g_rows), out},
                                  device.stream);
    const Tensor g_features = stride == D ? g_rows : at::narrow(g_rows, 1, 0, D).contiguous();
    return {grads[0], grads[1], grads[2], g_features, call.absolute ? grads[3] : device.empty({0})};
}

std::tuple<Tensor, Tensor, Tensor> scores(const ScoresCall& call) {
    const int64_t N = call.walk.screen.count(), height = call.walk.height, width = call.walk.width;
    at::globalContext().alertNotDeterministic("tilesplat::scores");
    const Device device(call.walk.screen.means2d);
    const Walk walk(device, call.walk);
    const Tensor sums = device.zeros({N, cuda::kScoreSize});
    const Tensor largest = device.empty({height, width}, at::kInt), median = device.empty({height, width}, at::kInt);
    cuda::BlendFeatures lists_alone = {walk.grid, data<cuda::Splat>(walk.splats), walk.ids, walk.ranges, walk.entries};
    lists_alone.totals = data<cuda::Totals>(walk.totals);
    cuda::check_lists(to_check(lists_alone), N, device.stream);
    cuda::scores(
        {walk.grid, data<cuda::Splat>(walk.splats), walk.ids, walk.ranges, data<float>(call.walk.offset),
         data<float>(call.weights), data<float>(call.colors), data<float>(call.gradient), data<float>(call.picture),
         data<float>(call.along), data<float>(sums), data<int32_t>(largest), data<int32_t>(median)},
        device.stream);
    return {sums, largest, median};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    m.impl("project", gs::project_op<gs::project, false>);
    m.impl("project_backward", gs::project_backward_op<gs::project_backward, false>);
    m.impl("lists", gs::lists_op<gs::lists, false>);
    m.impl("blend", gs::blend_op<gs::blend, false>);
    m.impl("blend_backward", gs::blend_backward_op<gs::blend_backward, false>);
    m.impl("scores", gs::scores_op<gs::scores, false>);
}
