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

const Tensor kNone;
const OptionalTensor kNothing;

RasterizeInputs inputs(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                       const OptionalTensor& cov3d, const Tensor& opacities, const Tensor& world_to_camera,
                       const Tensor& K, int64_t width, int64_t height) {
    return {means,           quats, scales,   cov3d, opacities, kNothing, kNothing, kNothing,
            world_to_camera, K,     kNothing, kNone, width,     height,   0};
}

template <typename T>
OnScreen<T> on_screen(const ScreenTensors& s) {
    return {data<T>(s.means2d), data<T>(s.conics), data<T>(s.opacities), data<T>(s.depths), data<int32_t>(s.radii)};
}

using ProjectedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ProjectedTensors project(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                         const OptionalTensor& cov3d, const Tensor& opacities, const Tensor& world_to_camera,
                         const Tensor& K, int64_t width, int64_t height, double scale_modifier, bool raw,
                         double near_depth, double blur, int64_t compensation, int64_t camera,
                         std::vector<double> distortion) {
    const RasterizeInputs in = inputs(means, quats, scales, cov3d, opacities, world_to_camera, K, width, height);
    const ProjectOptions options{near_depth, blur, compensation, camera, distortion};
    check_project(in, options, true);
    const at::ScalarType number = means.scalar_type();
    const int64_t N = in.count();
    const Tensor means2d = pooled({N, 2}, number), conics = pooled({N, 3}, number), dimmed = pooled({N}, number);
    const Tensor depths = pooled({N}, number), radii = pooled({N}, at::kInt);
    in_dtype_of(means, [&](auto zero) {
        using T = decltype(zero);
        cpu::kernels<T>().stage_project(gaussians<T>(in, scale_modifier, false, raw), view<T>(in, near_depth),
                                        options.optics<T>(), on_screen<T>({means2d, conics, dimmed, depths, radii}));
    });
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
    check_project(in, options, true);
    check_screen_grads(means, radii, grad_means2d, grad_conics, grad_opacities, grad_depths);
    const OptionalTensor like[] = {means, quats, scales, cov3d, opacities, world_to_camera};
    std::vector<Tensor> grads;
    for (size_t i = 0; i < wanted.size(); ++i)
        grads.push_back(pooled(wanted[i] && like[i] ? like[i]->sizes() : at::IntArrayRef{0}, means.scalar_type()));
    in_dtype_of(means, [&](auto zero) {
        using T = decltype(zero);
        const auto at = [&](size_t i) -> T* { return grads[i].numel() ? data<T>(grads[i]) : nullptr; };
        GaussianGrads<T> out = {};
        out.means = at(0), out.quats = at(1), out.scales = at(2), out.cov3d = at(3), out.opacities = at(4);
        out.world_to_camera = at(5);
        cpu::kernels<T>().stage_project_backward(
            gaussians<T>(in, scale_modifier, false, raw), view<T>(in, near_depth), options.optics<T>(),
            data<int32_t>(radii),
            {data<T>(grad_means2d), data<T>(grad_conics), data<T>(grad_opacities), data<T>(grad_depths), nullptr}, out);
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

// Lists that come from the caller's hands.
template <typename T>
Frame<T> checked_frame(const Tensor& like, int64_t width, int64_t height, const std::vector<Tensor>& lists) {
    const int64_t N = like.size(0), entries = state_rows(lists, kEntries);
    check_state(lists, lists_layout(N, like.scalar_type(), width, height, entries), like.device());
    const Frame<T> f = frame_of<T>(N, width, height, lists);
    TILESPLAT_CHECK(within_bounds(f, entries),
                    "lists must be those of this projection, but their numbers have been altered");
    return f;
}

std::vector<Tensor> lists(const Tensor& means2d, const Tensor& conics, const Tensor& opacities, const Tensor& depths,
                          const Tensor& radii, int64_t width, int64_t height, double margin, int64_t /*capacity*/) {
    const ScreenTensors screen{means2d, conics, opacities, depths, radii};
    check_screen(screen, true);
    check_size(width, height);
    std::vector<Tensor> tensors = allocate(lists_layout(screen.count(), means2d.scalar_type(), width, height, 0));
    tensors[kMargin] = at::full({1}, margin, means2d.options());
    in_dtype_of(means2d, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = frame_of<T>(screen.count(), width, height, tensors);
        const Tensor splats = pooled({screen.count(), 16}, means2d.scalar_type());
        f.splats = splats_in<T>(splats);
        cpu::Buffer keys(f.count * sizeof(cpu::DepthKey<T>));
        cpu::kernels<T>().pack(on_screen<T>(screen), f, keys.as<cpu::DepthKey<T>>());
        const auto make_room = [](void* context, Frame<T>& frame, int64_t entries) {
            Tensor& tensor = (*static_cast<std::vector<Tensor>*>(context))[kEntries];
            tensor = pooled({entries, 2}, at::kInt);
            frame.entries = static_cast<cpu::Entry*>(tensor.mutable_data_ptr());
        };
        cpu::bin<T>(cpu::kernels<T>(), f, keys.as<cpu::DepthKey<T>>(), make_room, &tensors);
    });
    return tensors;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> blend(const Tensor& means2d, const Tensor& conics,
                                                      const Tensor& opacities, const Tensor& features,
                                                      const OptionalTensor& /*absolute*/,
                                                      const std::vector<Tensor>& lists, const OptionalTensor& offset,
                                                      int64_t width, int64_t height, bool /*keep*/) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, true);
    check_features(features, offset, width, height, true);
    const int64_t D = features.size(1);
    CHECK_TENSOR(features, means2d, means2d.size(0), D);
    const at::ScalarType number = features.scalar_type();
    const Tensor image = pooled({D, height, width}, number), left = pooled({1, height, width}, number);
    std::vector<Tensor> kept =
        allocate(kept_layout(means2d.size(0), number, width, height, state_rows(lists, kEntries)));
    in_dtype_of(features, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = checked_frame<T>(features, width, height, lists);
        add_kept(f, kept);
        cpu::kernels<T>().pack_again(on_screen<T>(screen), f);
        cpu::kernels<T>().blend_features(f, {data<T>(features), int(D), data<T>(offset)}, data<T>(image),
                                         data<T>(left));
    });
    return {image, left, kept};
}

std::vector<Tensor> blend_backward(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                   const Tensor& features, const std::vector<Tensor>& lists,
                                   const OptionalTensor& offset, int64_t width, int64_t height,
                                   const std::vector<Tensor>& kept, const Tensor& image,
                                   const OptionalTensor& grad_image, const OptionalTensor& grad_left, bool absolute) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, true);
    check_features(features, offset, width, height, true);
    const int64_t N = screen.count(), D = features.size(1);
    CHECK_TENSOR(features, means2d, N, D);
    check_blend_backward(features, width, height, image, grad_image, grad_left, absolute);
    check_state(kept, kept_layout(N, features.scalar_type(), width, height, state_rows(lists, kEntries)),
                features.device());
    const auto zeros = [&](at::IntArrayRef shape) { return at::zeros(shape, features.options()); };
    const std::vector<Tensor> grads = {zeros({N, 2}), zeros({N, 3}), zeros({N}), zeros({N, D}),
                                       absolute ? zeros({N, 2}) : zeros({0})};
    in_dtype_of(features, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = checked_frame<T>(features, width, height, lists);
        add_kept(f, kept);
        const OnScreenGrads<T> out = {data<T>(grads[0]), data<T>(grads[1]), data<T>(grads[2]), nullptr,
                                      absolute ? data<T>(grads[4]) : nullptr};
        cpu::kernels<T>().blend_features_backward(f, {data<T>(features), int(D), data<T>(offset)}, on_screen<T>(screen),
                                                  {data<T>(grad_image), data<T>(grad_left), data<T>(grads[3]), out});
    });
    return grads;
}

std::tuple<Tensor, Tensor, Tensor> scores(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                          const std::vector<Tensor>& lists, const OptionalTensor& offset, int64_t width,
                                          int64_t height, const OptionalTensor& weights, const OptionalTensor& colors,
                                          const OptionalTensor& picture, const OptionalTensor& gradient,
                                          const OptionalTensor& along) {
    const ScreenTensors screen{means2d, conics, opacities, kNone, kNone};
    check_screen(screen, true);
    check_scores(opacities, offset, width, height, weights, colors, picture, gradient, along);
    const int64_t N = opacities.size(0);
    const Tensor sums = at::zeros({N, cpu::kScores}, opacities.options());
    const Tensor largest = pooled({height, width}, at::kInt), median = pooled({height, width}, at::kInt);
    in_dtype_of(opacities, [&](auto zero) {
        using T = decltype(zero);
        Frame<T> f = checked_frame<T>(opacities, width, height, lists);
        const Tensor splats = pooled({N, 16}, opacities.scalar_type());
        f.splats = splats_in<T>(splats);
        cpu::kernels<T>().pack_again(on_screen<T>(screen), f);
        cpu::kernels<T>().scores(f, data<T>(offset),
                                 {data<T>(weights), data<T>(colors), data<T>(gradient), data<T>(picture),
                                  data<T>(along), data<T>(sums), data<int32_t>(largest), data<int32_t>(median)});
    });
    return {sums, largest, median};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CPU, m) {
    m.impl("project", gs::project);
    m.impl("project_backward", gs::project_backward);
    m.impl("lists", gs::lists);
    m.impl("blend", gs::blend);
    m.impl("blend_backward", gs::blend_backward);
    m.impl("scores", gs::scores);
}
