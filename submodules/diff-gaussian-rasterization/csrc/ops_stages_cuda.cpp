// ops_stages_cuda.cpp: the operators of ops_stages.cpp for tensors on a GPU.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <optional>

#include "ops_cuda.h"
#include "ops_stages.h"

// In PyTorch's sentence: "... does not have a deterministic implementation, but you set ..."
#define UNORDERED(op) "tilesplat::" op " with lists that were made without torch.use_deterministic_algorithms(True)"

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

// The order of the tensors of the lists, and of what a blending keeps. The last three of the lists are there if sums are to
// be made in a fixed order.
enum Lists { kIds, kRanges, kCounted, kListsCount, kPairs = kListsCount, kOffsets, kOrder, kOrderedListsCount };
enum Kept { kSplats, kTrace, kTotals, kKeptCount };
constexpr int64_t kSplatFloats = sizeof(cuda::Splat) / sizeof(float);
constexpr int64_t kTotalsCount = sizeof(cuda::Totals) / sizeof(int64_t);

bool ordered(const std::vector<Tensor>& lists) { return lists.size() == kOrderedListsCount; }

StateLayout lists_layout(const WalkCall& call, int64_t entries) {
    const cuda::TileGrid grid{int(call.width), int(call.height)};
    const int64_t N = call.screen.count();
    StateLayout layout = {{{entries}, at::kInt}, {{grid.tiles(), 2}, at::kInt}, {{kTotalsCount}, at::kLong}};
    if (ordered(call.lists)) layout.insert(layout.end(), {{{entries}, at::kInt}, {{N}, at::kInt}, {{N}, at::kInt}});
    return layout;
}

std::vector<Tensor> lists(const ListsCall& call) {
    const ScreenTensors& screen = call.screen;
    const Device device(screen.means2d);
    const cuda::TileGrid grid{int(call.width), int(call.height)};
    std::optional<Counted> counted;  // without a capacity, wait for the number of entries
    if (call.capacity <= 0) counted.emplace(device.stream);
    Projected projected(device, screen.count(), grid, counted ? counted->place() : nullptr, [&](const cuda::Screen& s) {
        cuda::pack(screen.count(), on_screen(screen), grid, call.margin > 0, s, device.stream);
    });
    if (counted) counted->enqueued();
    Tensor order = depth_order(device, projected);
    const int64_t room = counted ? counted->wait() : screen.count() ? std::min(call.capacity, cuda::kMaxEntries) : 0;
    const TileLists tiles(device, grid, projected, order, room, deterministic());
    std::vector<Tensor> tensors = {tiles.ids, projected.ranges, projected.totals};
    if (deterministic()) tensors.insert(tensors.end(), {tiles.pairs, tiles.offsets, order});
    return tensors;
}

// Lists that come from the caller's hands: their sizes are right. Whether their numbers are, see check_kept.
struct Walk {
    cuda::TileGrid grid;
    const uint32_t *ids, *ranges;
    const cuda::Totals* counted;
    int64_t entries, count;
    cuda::Ordered order;  // without records

    Walk(const Device& device, const WalkCall& call)
        : grid{int(call.width), int(call.height)},
          entries(state_rows(call.lists, kIds)),
          count(call.screen.count()),
          order{} {
        check_state(call.lists, lists_layout(call, entries), device.device);
        ids = data<uint32_t>(call.lists[kIds]), ranges = data<uint32_t>(call.lists[kRanges]);
        counted = data<cuda::Totals>(call.lists[kCounted]);
        if (ordered(call.lists))
            order = in_order(call.lists[kPairs], call.lists[kOffsets], call.lists[kOrder], Tensor());
    }

    // The host does not wait for the answer.
    void check(const Device& device, const Tensor& splats, const Tensor& totals) const {
        cuda::check_lists(checked(splats, totals, {}), count, device.stream);
    }
    void check_kept(const Device& device, const Tensor& splats, const Tensor& totals, const cuda::Trace& trace) const {
        cuda::check_kept(checked(splats, totals, trace), count, device.stream);
    }

  private:
    cuda::BlendBackward checked(const Tensor& splats, const Tensor& totals, const cuda::Trace& trace) const {
        cuda::BlendBackward call = {grid,  data<cuda::Splat>(splats), ids, ranges, entries,
                                    trace, data<cuda::Totals>(totals)};
        call.ordered = order;
        return call;
    }
};

// The splats of a walk, and the totals of its lists.
struct Packed {
    Tensor splats, totals;

    Packed(const Device& device, const WalkCall& call, const Walk& walk, const float* colors) {
        splats = device.empty({walk.count, kSplatFloats}), totals = device.empty({kTotalsCount}, at::kLong);
        cuda::pack_again({walk.count, on_screen(call.screen), call.offset.has_value(), colors, walk.entries,
                          walk.counted, data<cuda::Splat>(splats), data<cuda::Totals>(totals)},
                         device.stream);
    }
};

// Three channels without offsets go the way of colors, blend_forward.cu and back; others that of blend_features.cu.
bool as_colors(const BlendCall& call) { return call.features.size(1) == 3 && !call.walk.offset; }

int64_t trace_size(const BlendCall& call, const Walk& walk) {
    if (as_colors(call)) return int64_t(cuda::trace_bytes(walk.grid, walk.entries, false));
    const int stride = cuda::feature_stride(int(call.features.size(1)));
    return int64_t(cuda::feature_trace_bytes(walk.grid, walk.entries, stride));
}

// Rows of whole portions of channels, as the kernels read them.
Tensor padded(const Tensor& features) {
    const int64_t D = features.size(1), stride = cuda::feature_stride(int(D));
    const bool aligned = reinterpret_cast<uintptr_t>(features.data_ptr()) % 16 == 0;
    if (stride == D) return aligned ? features : features.clone();
    return at::constant_pad_nd(features, {0, stride - D});
}

cuda::BlendFeatures features_call(const BlendCall& call, const Walk& walk, const Tensor& rows, const Tensor& splats,
                                  const Tensor& trace, const Tensor& totals, const Tensor& image) {
    const int stride = int(rows.size(1));
    return {
        walk.grid,
        data<cuda::Splat>(splats),
        walk.ids,
        walk.ranges,
        walk.entries,
        data<float>(rows),
        int(call.features.size(1)),
        stride,
        data<float>(call.walk.offset),
        data<float>(image),
        nullptr,
        call.keep ? cuda::feature_trace_in(trace.data_ptr(), walk.grid, walk.entries, stride) : cuda::FeatureTrace{},
        data<cuda::Totals>(totals)};
}

void blend_colors(const Device& device, const Walk& walk, const Packed& packed, const Tensor& trace,
                  const Tensor& image, const Tensor& left) {
    const Tensor background = device.zeros({3});
    const cuda::Trace traced =
        trace.defined() ? cuda::trace_in(trace.data_ptr(), walk.grid, walk.entries, false) : cuda::Trace{};
    cuda::blend_forward(
        {walk.grid, data<cuda::Splat>(packed.splats), walk.ids, walk.ranges, data<float>(background),
         data<float>(image), nullptr, nullptr, traced, data<cuda::Totals>(packed.totals), data<float>(left)},
        device.stream);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> blend(const BlendCall& call) {
    const int64_t height = call.walk.height, width = call.walk.width;
    const Device device(call.features);
    const Walk walk(device, call.walk);
    const Packed packed(device, call.walk, walk, as_colors(call) ? data<float>(call.features) : nullptr);
    const Tensor image = device.empty({call.features.size(1), height, width}), left = device.empty({1, height, width});
    const Tensor trace = call.keep ? device.bytes(trace_size(call, walk)) : Tensor();
    walk.check(device, packed.splats, packed.totals);
    if (as_colors(call)) {
        blend_colors(device, walk, packed, trace, image, left);
    } else {
        const Tensor rows = padded(call.features);
        cuda::BlendFeatures args = features_call(call, walk, rows, packed.splats, trace, packed.totals, image);
        args.left = data<float>(left);
        cuda::blend_features(args, device.stream);
    }
    return {image, left, call.keep ? std::vector<Tensor>{packed.splats, trace, packed.totals} : std::vector<Tensor>{}};
}

// What the backward of a blending writes.
struct BlendGrads {
    Tensor means2d, conics, opacities, absolute;
    OnScreenGrads<float> screen;

    BlendGrads(const Device& device, int64_t N, bool with_absolute)
        : means2d(device.empty({N, 2})), conics(device.empty({N, 3})), opacities(device.empty({N})) {
        absolute = device.empty(with_absolute ? at::IntArrayRef{N, 2} : at::IntArrayRef{0});
        screen = {data<float>(means2d), data<float>(conics), data<float>(opacities), nullptr,
                  with_absolute ? data<float>(absolute) : nullptr};
    }
};

Tensor records_for(const Device& device, const Walk& walk, int64_t per_entry, int64_t size) {
    return walk.order.pairs ? device.zeros({walk.entries, per_entry, size}) : Tensor();
}

cuda::Ordered with_records(const Walk& walk, const Tensor& records) {
    cuda::Ordered order = walk.order;
    if (records.defined()) order.records = data<float>(records);
    return order;
}

// What color's backward calls the gradient of alpha is minus that of the light that passes. Returns that of the features.
Tensor blend_colors_backward(const Device& device, const BlendBackwardCall& call, const Walk& walk,
                             const cuda::Trace& trace, const OnScreenGrads<float>& out) {
    const at::IntArrayRef size = call.image.sizes();
    const Tensor background = device.zeros({3}), sums = device.zeros({walk.count, cuda::kGradSize});
    const Tensor g_image = call.grad_image ? *call.grad_image : device.zeros(size);
    const Tensor g_alpha = call.grad_left ? at::neg(*call.grad_left) : Tensor();
    const Tensor records = records_for(device, walk, cuda::kRecords, cuda::kGradSize);
    const Tensor g_features = device.empty({walk.count, 3});
    cuda::blend_backward({walk.grid, data<cuda::Splat>(call.kept[kSplats]), walk.ids, walk.ranges, walk.entries, trace,
                          data<cuda::Totals>(call.kept[kTotals]), data<float>(background), data<float>(call.image),
                          nullptr, data<float>(g_image), data<float>(OptionalTensor(g_alpha)), nullptr, call.absolute,
                          data<float>(sums), with_records(walk, records)},
                         device.stream);
    cuda::screen_grads(walk.count, on_screen(call.forward.walk.screen), data<float>(sums), data<float>(g_features), out,
                       device.stream);
    return g_features;
}

Tensor blend_features_backward(const Device& device, const BlendBackwardCall& call, const Walk& walk,
                               const OnScreenGrads<float>& out) {
    const int64_t D = call.forward.features.size(1);
    const Tensor rows = padded(call.forward.features), g_rows = device.zeros(rows.sizes());
    const Tensor moments = device.zeros({walk.count, cuda::kMomentCount});
    const Tensor records = records_for(device, walk, cuda::kRecords, cuda::feature_record(int(D), call.absolute));
    cuda::blend_features_backward(
        {features_call(call.forward, walk, rows, call.kept[kSplats], call.kept[kTrace], call.kept[kTotals], call.image),
         data<float>(call.grad_image), data<float>(call.grad_left), walk.count, on_screen(call.forward.walk.screen),
         data<float>(moments), data<float>(g_rows), out, with_records(walk, records), 0},
        device.stream);
    return rows.size(1) == D ? g_rows : at::narrow(g_rows, 1, 0, D).contiguous();
}

std::vector<Tensor> blend_backward(const BlendBackwardCall& call) {
    const Device device(call.forward.features);
    const Walk walk(device, call.forward.walk);
    const int64_t N = walk.count;
    check_state(
        call.kept,
        {{{N, kSplatFloats}, at::kFloat}, {{trace_size(call.forward, walk)}, at::kByte}, {{kTotalsCount}, at::kLong}},
        device.device);
    if (!walk.order.pairs) at::globalContext().alertNotDeterministic(UNORDERED("blend_backward"));
    void* const memory = call.kept[kTrace].data_ptr();
    const bool colors = as_colors(call.forward);
    const int stride = cuda::feature_stride(int(call.forward.features.size(1)));
    const cuda::Trace trace = colors ? cuda::trace_in(memory, walk.grid, walk.entries, false)
                                     : cuda::feature_trace_in(memory, walk.grid, walk.entries, stride).common;
    walk.check_kept(device, call.kept[kSplats], call.kept[kTotals], trace);
    const BlendGrads grads(device, N, call.absolute);
    const Tensor g_features = colors ? blend_colors_backward(device, call, walk, trace, grads.screen)
                                     : blend_features_backward(device, call, walk, grads.screen);
    return {grads.means2d, grads.conics, grads.opacities, g_features, grads.absolute};
}

std::tuple<Tensor, Tensor, Tensor> scores(const ScoresCall& call) {
    const int64_t height = call.walk.height, width = call.walk.width;
    const Device device(call.walk.screen.means2d);
    const Walk walk(device, call.walk);
    if (!walk.order.pairs) at::globalContext().alertNotDeterministic(UNORDERED("scores"));
    const Packed packed(device, call.walk, walk, nullptr);
    const Tensor sums = device.zeros({walk.count, cuda::kScoreSize});
    const Tensor largest = device.empty({height, width}, at::kInt), median = device.empty({height, width}, at::kInt);
    const Tensor records = records_for(device, walk, cuda::kStrips, cuda::kScoreSize);
    walk.check(device, packed.splats, packed.totals);
    cuda::scores({walk.grid, data<cuda::Splat>(packed.splats), walk.ids, walk.ranges, data<float>(call.walk.offset),
                  data<float>(call.weights), data<float>(call.colors), data<float>(call.gradient),
                  data<float>(call.picture), data<float>(call.along), data<float>(sums), data<int32_t>(largest),
                  data<int32_t>(median), data<cuda::Totals>(packed.totals), with_records(walk, records)},
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
