// ops_stages_cpu.cpp: the operators of ops_stages.cpp for tensors on the CPU.
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/threads.h"
#include "ops_cpu.h"
#include "ops_stages.h"

namespace gs {
namespace {

using cpu::Frame;

// Calls run(0.0) or run(0.0f).
template <typename Run>
auto in_dtype_of(const Tensor& like, Run run) {
    return like.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

template <typename T>
OnScreen<T> on_screen(const ScreenTensors& s) {
    return {data<T>(s.means2d), data<T>(s.conics), data<T>(s.opacities), data<T>(s.depths), data<int32_t>(s.radii)};
}

ProjectedTensors project(const ProjectCall& call) {
    const at::ScalarType number = call.in.means.scalar_type();
    const int64_t N = call.in.count();
    const Tensor means2d = pooled({N, 2}, number), conics = pooled({N, 3}, number), opacities = pooled({N}, number);
    const Tensor depths = pooled({N}, number), radii = pooled({N}, at::kInt);
    in_dtype_of(call.in.means, [&](auto zero) {
        using T = decltype(zero);
        cpu::kernels<T>().stage_project(gaussians<T>(call.in, call.scale_modifier, false, call.raw),
                                        view<T>(call.in, call.near_depth), call.optics<T>(),
                                        on_screen<T>({means2d, conics, opacities, depths, radii}));
    });
    return {means2d, conics, opacities, depths, radii};
}

std::vector<Tensor> project_backward(const ProjectBackwardCall& call) {
    const auto& [in, wanted] = std::tie(call.forward.in, call.wanted);
    const OptionalTensor like[] = {in.means, in.quats, in.scales, in.cov3d, in.opacities, in.world_to_camera};
    std::vector<Tensor> grads;
    for (size_t i = 0; i < wanted.size(); ++i)
        grads.push_back(pooled(wanted[i] && like[i] ? like[i]->sizes() : at::IntArrayRef{0}, in.means.scalar_type()));
    in_dtype_of(in.means, [&](auto zero) {
        using T = decltype(zero);
        const auto at = [&](size_t i) -> T* { return grads[i].numel() ? data<T>(grads[i]) : nullptr; };
        GaussianGrads<T> out = {};
        out.means = at(0), out.quats = at(1), out.scales = at(2), out.cov3d = at(3), out.opacities = at(4);
        out.world_to_camera = at(5);
        const OnScreenGrads<T> screen = {data<T>(call.grad_means2d), data<T>(call.grad_conics),
                                         data<T>(call.grad_opacities), data<T>(call.grad_depths), nullptr};
        cpu::kernels<T>().stage_project_backward(
            gaussians<T>(call.forward.in, call.forward.scale_modifier, false, call.forward.raw),
            view<T>(call.forward.in, call.forward.near_depth), call.forward.optics<T>(), data<int32_t>(call.radii),
            screen, out);
    });
    return grads;
}

// The order of the tensors of the lists, and of what a blending keeps.
enum Lists { kVisible, kVisibleCount, kSlots, kTileBegin, kTileOrder, kEntries, kMargin, kListsCount };
enum Kept { kSplats, kTransmittance, kLast, kTouched, kKeptCount };

int64_t tiles_along(int64_t pixels) { return (pixels + kTileSize - 1) / kTileSize; }

StateLayout lists_layout(int64_t N, at::ScalarType number, int64_t width, int64_t height, int64_t entries) {
    const int64_t tiles = tiles_along(width) * tiles_along(height), chunks = (N + cpu::kChunk - 1) / cpu::kChunk;
    return {{{N}, at::kInt},     {{chunks}, at::kInt},     {{N, 2}, at::kInt}, {{tiles + 1}, at::kLong},
            {{tiles}, at::kInt}, {{entries, 2}, at::kInt}, {{1}, number}};
}

StateLayout kept_layout(int64_t N, at::ScalarType number, int64_t width, int64_t height, int64_t entries) {
    const int64_t tiles = tiles_along(width) * tiles_along(height);
    return {{{N, 16}, number}, {{tiles, 256}, number}, {{tiles, 256}, at::kInt}, {{entries}, at::kShort}};
}

std::vector<Tensor> allocate(const StateLayout& layout) {
    std::vector<Tensor> tensors;
    for (const auto& [shape, dtype] : layout) tensors.push_back(pooled(shape, dtype));
    return tensors;
}

template <typename T>
Frame<T> frame_of(int64_t N, int64_t width, int64_t height, const std::vector<Tensor>& lists) {
    const auto at = [&](Lists i) -> void* { return const_cast<void*>(lists[i].const_data_ptr()); };
    Frame<T> f = {};
    f.count = N;
    f.width = int(width), f.height = int(height);
    f.tiles_x = int(tiles_along(width)), f.tiles_y = int(tiles_along(height));
    f.visible = static_cast<int32_t*>(at(kVisible));
    f.visible_count = static_cast<int32_t*>(at(kVisibleCount));
    f.slots = static_cast<cpu::SlotRange*>(at(kSlots));
    f.tile_begin = static_cast<int64_t*>(at(kTileBegin));
    f.tile_order = static_cast<int32_t*>(at(kTileOrder));
    f.entries = static_cast<cpu::Entry*>(at(kEntries));
    f.margin = *static_cast<T*>(at(kMargin));
    return f;
}

template <typename T>
cpu::Splat<T>* splats_in(const Tensor& tensor) {
    return reinterpret_cast<cpu::Splat<T>*>(data<T>(tensor));
}

template <typename T>
void add_kept(Frame<T>& f, const std::vector<Tensor>& kept) {
    f.splats = splats_in<T>(kept[kSplats]);
    f.transmittance = data<T>(kept[kTransmittance]);
    f.last = data<int32_t>(kept[kLast]);
    f.touched = static_cast<uint16_t*>(const_cast<void*>(kept[kTouched].const_data_ptr()));
}

// Lists that come from the caller's hands, and the splats that are walked.
template <typename T>
Frame<T> walked_frame(const WalkCall& call, const Tensor& splats) {
    const int64_t N = call.screen.count(), entries = state_rows(call.lists, kEntries);
    const Tensor& means2d = call.screen.means2d;
    check_state(call.lists, lists_layout(N, means2d.scalar_type(), call.width, call.height, entries), means2d.device());
    Frame<T> f = frame_of<T>(N, call.width, call.height, call.lists);
    TILESPLAT_CHECK(within_bounds(f, entries),
                    "lists must be those of this projection, but their numbers have been altered");
    f.splats = splats_in<T>(splats);
    return f;
}

std::vector<Tensor> lists(const ListsCall& call) {
    const Tensor& means2d = call.screen.means2d;
    const int64_t N = call.screen.count();
    std::vector<Tensor> tensors = allocate(lists_layout(N, means2d.scalar_type(), call.width, call.height, 0));
    tensors[kMargin] = at::full({1}, call.margin, means2d.options());
    in_dtype_of(means2d, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = frame_of<T>(N, call.width, call.height, tensors);
        const Tensor splats = pooled({N, 16}, means2d.scalar_type());
        f.splats = splats_in<T>(splats);
        cpu::Buffer keys(f.count * sizeof(cpu::DepthKey<T>));
        cpu::kernels<T>().pack(on_screen<T>(call.screen), f, keys.as<cpu::DepthKey<T>>());
        const auto make_room = [](void* context, Frame<T>& frame, int64_t entries) {
            Tensor& tensor = (*static_cast<std::vector<Tensor>*>(context))[kEntries];
            tensor = pooled({entries, 2}, at::kInt);
            frame.entries = static_cast<cpu::Entry*>(tensor.mutable_data_ptr());
        };
        cpu::bin<T>(cpu::kernels<T>(), f, keys.as<cpu::DepthKey<T>>(), make_room, &tensors);
    });
    return tensors;
}

StateLayout kept_layout(const BlendCall& call) {
    const WalkCall& w = call.walk;
    return kept_layout(w.screen.count(), call.features.scalar_type(), w.width, w.height, state_rows(w.lists, kEntries));
}

template <typename T>
cpu::Features<T> features_of(const BlendCall& call) {
    return {data<T>(call.features), int(call.features.size(1)), data<T>(call.walk.offset)};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> blend(const BlendCall& call) {
    const at::ScalarType number = call.features.scalar_type();
    const int64_t height = call.walk.height, width = call.walk.width;
    const Tensor image = pooled({call.features.size(1), height, width}, number);
    const Tensor left = pooled({1, height, width}, number);
    std::vector<Tensor> kept = allocate(kept_layout(call));
    in_dtype_of(call.features, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = walked_frame<T>(call.walk, kept[kSplats]);
        add_kept(f, kept);
        cpu::kernels<T>().pack_again(on_screen<T>(call.walk.screen), f);
        cpu::kernels<T>().blend_features(f, features_of<T>(call), data<T>(image), data<T>(left));
    });
    return {image, left, kept};
}

std::vector<Tensor> blend_backward(const BlendBackwardCall& call) {
    const WalkCall& walk = call.forward.walk;
    const Tensor& features = call.forward.features;
    const int64_t N = walk.screen.count();
    check_state(call.kept, kept_layout(call.forward), features.device());
    const auto zeros = [&](at::IntArrayRef shape) { return at::zeros(shape, features.options()); };
    const std::vector<Tensor> grads = {zeros({N, 2}), zeros({N, 3}), zeros({N}), zeros(features.sizes()),
                                       call.absolute ? zeros({N, 2}) : zeros({0})};
    in_dtype_of(features, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = walked_frame<T>(walk, call.kept[kSplats]);
        add_kept(f, call.kept);
        const OnScreenGrads<T> out = {data<T>(grads[0]), data<T>(grads[1]), data<T>(grads[2]), nullptr,
                                      call.absolute ? data<T>(grads[4]) : nullptr};
        cpu::kernels<T>().blend_features_backward(
            f, features_of<T>(call.forward), on_screen<T>(walk.screen),
            {data<T>(call.grad_image), data<T>(call.grad_left), data<T>(grads[3]), out});
    });
    return grads;
}

std::tuple<Tensor, Tensor, Tensor> scores(const ScoresCall& call) {
    const WalkCall& walk = call.walk;
    const int64_t N = walk.screen.count(), height = walk.height, width = walk.width;
    const Tensor& means2d = walk.screen.means2d;
    const Tensor sums = at::zeros({N, cpu::kScores}, means2d.options());
    const Tensor largest = pooled({height, width}, at::kInt), median = pooled({height, width}, at::kInt);
    const Tensor splats = pooled({N, 16}, means2d.scalar_type());
    in_dtype_of(means2d, [&](auto zero) {
        using T = decltype(zero);
        const Frame<T> f = walked_frame<T>(walk, splats);
        cpu::kernels<T>().pack_again(on_screen<T>(walk.screen), f);
        cpu::kernels<T>().scores(
            f, data<T>(walk.offset),
            {data<T>(call.weights), data<T>(call.colors), data<T>(call.gradient), data<T>(call.picture),
             data<T>(call.along), data<T>(sums), data<int32_t>(largest), data<int32_t>(median)});
    });
    return {sums, largest, median};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CPU, m) {
    m.impl("project", gs::project_op<gs::project, true>);
    m.impl("project_backward", gs::project_backward_op<gs::project_backward, true>);
    m.impl("lists", gs::lists_op<gs::lists, true>);
    m.impl("blend", gs::blend_op<gs::blend, true>);
    m.impl("blend_backward", gs::blend_backward_op<gs::blend_backward, true>);
    m.impl("scores", gs::scores_op<gs::scores, true>);
}
