// The operators for callers who take the stages of rendering one by one: their schemas and checks. ops_stages_cpu.cpp and
// ops_stages_cuda.cpp implement them; the autograd formulas are in diff_gaussian_rasterization/stages.py.
#include "ops_stages.h"

#include <torch/library.h>

#include <cmath>

#define SPACE \
    "Tensor means, Tensor? quats, Tensor? scales, Tensor? cov3d, Tensor opacities, Tensor world_to_camera, Tensor K, "
#define OPTIONS                                                                                                     \
    "int width, int height, float scale_modifier, bool raw, float near, float blur, int compensation, int camera, " \
    "float[] distortion"
#define SCREEN "Tensor means2d, Tensor conics, Tensor opacities, "
#define PICTURE "Tensor[] lists, Tensor? offset, int width, int height"

TORCH_LIBRARY_FRAGMENT(tilesplat, m) {
    // Gaussians and a camera -> means2d [N, 2], conics [N, 3], opacities [N], depths [N], radii int32 [N]. Of compensation
    // and camera, the number in the lists of stages.py.
    m.def("project(" SPACE OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

    // The gradients of means, quats, scales, cov3d, opacities and world_to_camera; [0] where not wanted.
    m.def("project_backward(" SPACE OPTIONS
          ", Tensor radii, Tensor? grad_means2d, Tensor? grad_conics, Tensor? grad_opacities, Tensor? grad_depths, "
          "bool[6] wanted) -> Tensor[]");

    // The splats of every tile, front to back, as the backend keeps them. Pixels may look at points up to `margin` away
    // from their centers. With a `capacity` for entries (tile, splat), a GPU's call does not wait for their number; those
    // beyond it, the farthest, are left out.
    m.def("lists(" SCREEN
          "Tensor depths, Tensor radii, int width, int height, float margin, int capacity=0) -> Tensor[]");

    // features [N, D] -> their sums [D, H, W], the light that passes all splats [1, H, W], and with `keep` what the backward
    // wants to find again. offset [2, H, W], from a pixel's center to the point it looks at. `absolute` [N, 2] is not read:
    // its gradient is the sum over pixels of the absolute gradients of means2d.
    m.def("blend(" SCREEN "Tensor features, Tensor? absolute, " PICTURE ", bool keep) -> (Tensor, Tensor, Tensor[])");

    // The gradients of means2d, conics, opacities, features and absolute; the last [0] if it is not `wanted`.
    m.def("blend_backward(" SCREEN "Tensor features, " PICTURE
          ", Tensor[] kept, Tensor image, Tensor? grad_image, Tensor? grad_left, bool wanted) -> Tensor[]");

    // Sums of every splat [N, 8], see cpu/scores.h; the splat that gives a pixel most, and that at which half of its light is
    // gone, int32 [H, W]. colors [N, 3] with their picture's sum of channels [H, W]; a gradient [3, H, W] with the sum of
    // picture times gradient [H, W].
    m.def("scores(" SCREEN PICTURE
          ", Tensor? weights, Tensor? colors, Tensor? picture, Tensor? gradient, Tensor? along) -> "
          "(Tensor, Tensor, Tensor)");
}

namespace gs {

namespace {

void check_screen(const ScreenTensors& in, bool allow_double) {
    const auto& [means2d, conics, opacities, depths, radii] = in;
    const bool doubles = allow_double && means2d.scalar_type() == at::kDouble;
    const int64_t N = means2d.dim() ? means2d.size(0) : 0;
    check_tensor(means2d, "means2d", {N, 2}, doubles ? at::kDouble : at::kFloat, means2d.device());
    CHECK_TENSOR(conics, means2d, N, 3);
    CHECK_TENSOR(opacities, means2d, N);
    if (depths.defined()) CHECK_TENSOR(depths, means2d, N);
    if (radii.defined()) CHECK_TENSOR_DTYPE(radii, means2d, at::kInt, N);
    TILESPLAT_CHECK(N <= INT32_MAX, "means2d must have at most ", INT32_MAX, " rows, got ", N);
}

void check_walk(const WalkCall& call, bool allow_double) {
    const OptionalTensor& offset = call.offset;
    check_screen(call.screen, allow_double);
    check_size(call.width, call.height);
    CHECK_TENSOR(offset, call.screen.means2d, 2, call.height, call.width);
}

}  // namespace

void check_project(const ProjectCall& call, bool allow_double) {
    check_gaussians(call.in, allow_double);
    const Tensor &means = call.in.means, &world_to_camera = call.in.world_to_camera, &K = call.in.K;
    CHECK_TENSOR(world_to_camera, means, 4, 4);
    CHECK_TENSOR(K, means, 3, 3);
    check_size(call.in.width, call.in.height);
    check_near(call.near_depth);
    TILESPLAT_CHECK(call.blur >= 0 && std::isfinite(call.blur), "blur must be a finite number, 0 or more, got ",
                    call.blur);
    TILESPLAT_CHECK(call.compensation >= 0 && call.compensation <= 2 && call.camera >= 0 && call.camera <= 2,
                    "compensation and camera must be 0, 1 or 2, got ", call.compensation, " and ", call.camera);
    TILESPLAT_CHECK(call.distortion.size() == 4, "distortion must be four numbers, got ", call.distortion.size());
}

void check_project_backward(const ProjectBackwardCall& call, bool allow_double) {
    check_project(call.forward, allow_double);
    const auto& [forward, radii, grad_means2d, grad_conics, grad_opacities, grad_depths, wanted] = call;
    const Tensor& means = forward.in.means;
    const int64_t N = means.size(0);
    CHECK_TENSOR_DTYPE(radii, means, at::kInt, N);
    CHECK_TENSOR(grad_means2d, means, N, 2);
    CHECK_TENSOR(grad_conics, means, N, 3);
    CHECK_TENSOR(grad_opacities, means, N);
    CHECK_TENSOR(grad_depths, means, N);
}

void check_lists(const ListsCall& call, bool allow_double) {
    check_screen(call.screen, allow_double);
    check_size(call.width, call.height);
    TILESPLAT_CHECK(call.margin >= 0 && std::isfinite(call.margin), "margin must be a finite number, 0 or more, got ",
                    call.margin);
}

void check_blend(const BlendCall& call, bool allow_double) {
    check_walk(call.walk, allow_double);
    const Tensor &features = call.features, &means2d = call.walk.screen.means2d;
    const int64_t N = means2d.size(0), D = features.dim() == 2 ? features.size(1) : 0;
    CHECK_TENSOR(features, means2d, N, D);
    TILESPLAT_CHECK(D >= 1 && D <= kMaxChannels, "features must have 1 to ", kMaxChannels, " channels, got ", D);
}

void check_blend_backward(const BlendBackwardCall& call, bool allow_double) {
    check_blend(call.forward, allow_double);
    const auto& [forward, kept, image, grad_image, grad_left, absolute] = call;
    const Tensor& features = forward.features;
    const int64_t D = features.size(1), height = forward.walk.height, width = forward.walk.width;
    CHECK_TENSOR(image, features, D, height, width);
    CHECK_TENSOR(grad_image, features, D, height, width);
    CHECK_TENSOR(grad_left, features, 1, height, width);
    TILESPLAT_CHECK(!absolute || D <= kMaxAbsoluteChannels, "features must have at most ", kMaxAbsoluteChannels,
                    " channels for absolute gradients, got ", D);
}

void check_scores(const ScoresCall& call, bool allow_double) {
    check_walk(call.walk, allow_double);
    const auto& [walk, weights, colors, picture, gradient, along] = call;
    const Tensor& like = walk.screen.means2d;
    CHECK_TENSOR(weights, like, walk.height, walk.width);
    CHECK_TENSOR(colors, like, like.size(0), 3);
    CHECK_TENSOR(picture, like, walk.height, walk.width);
    CHECK_TENSOR(gradient, like, 3, walk.height, walk.width);
    CHECK_TENSOR(along, like, walk.height, walk.width);
    TILESPLAT_CHECK(
        colors.has_value() == picture.has_value() && gradient.has_value() == along.has_value() && (colors || !gradient),
        "picture must come with colors, along with gradient, and gradient with colors");
}

}  // namespace gs
