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

void check_project(const RasterizeInputs& in, const ProjectOptions& options, bool allow_double) {
    check_gaussians(in, allow_double);
    const Tensor &means = in.means, &world_to_camera = in.world_to_camera, &K = in.K;
    CHECK_TENSOR(world_to_camera, means, 4, 4);
    CHECK_TENSOR(K, means, 3, 3);
    check_size(in.width, in.height);
    check_near(options.near);
    TILESPLAT_CHECK(options.blur >= 0 && std::isfinite(options.blur), "blur must be a finite number, 0 or more, got ",
                    options.blur);
    TILESPLAT_CHECK(
        options.compensation >= 0 && options.compensation <= 2 && options.camera >= 0 && options.camera <= 2,
        "compensation and camera must be 0, 1 or 2, got ", options.compensation, " and ", options.camera);
    TILESPLAT_CHECK(options.distortion.size() == 4, "distortion must be four numbers, got ", options.distortion.size());
}

void check_features(const Tensor& features, const OptionalTensor& offset, int64_t width, int64_t height,
                    bool allow_double) {
    const bool doubles = allow_double && features.scalar_type() == at::kDouble;
    check_tensor(features, "features", {kAny, kAny}, doubles ? at::kDouble : at::kFloat, features.device());
    TILESPLAT_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxChannels, "features must have 1 to ", kMaxChannels,
                    " channels, got ", features.size(1));
    check_size(width, height);
    CHECK_TENSOR(offset, features, 2, height, width);
}

void check_screen_grads(const Tensor& means, const Tensor& radii, const OptionalTensor& grad_means2d,
                        const OptionalTensor& grad_conics, const OptionalTensor& grad_opacities,
                        const OptionalTensor& grad_depths) {
    const int64_t N = means.size(0);
    CHECK_TENSOR_DTYPE(radii, means, at::kInt, N);
    CHECK_TENSOR(grad_means2d, means, N, 2);
    CHECK_TENSOR(grad_conics, means, N, 3);
    CHECK_TENSOR(grad_opacities, means, N);
    CHECK_TENSOR(grad_depths, means, N);
}

void check_blend_backward(const Tensor& features, int64_t width, int64_t height, const Tensor& image,
                          const OptionalTensor& grad_image, const OptionalTensor& grad_left, bool absolute) {
    const int64_t D = features.size(1);
    CHECK_TENSOR(image, features, D, height, width);
    CHECK_TENSOR(grad_image, features, D, height, width);
    CHECK_TENSOR(grad_left, features, 1, height, width);
    TILESPLAT_CHECK(!absolute || D <= kMaxAbsoluteChannels, "features must have at most ", kMaxAbsoluteChannels,
                    " channels for absolute gradients, got ", D);
}

void check_scores(const Tensor& opacities, const OptionalTensor& offset, int64_t width, int64_t height,
                  const OptionalTensor& weights, const OptionalTensor& colors, const OptionalTensor& picture,
                  const OptionalTensor& gradient, const OptionalTensor& along) {
    check_size(width, height);
    CHECK_TENSOR(offset, opacities, 2, height, width);
    CHECK_TENSOR(weights, opacities, height, width);
    CHECK_TENSOR(colors, opacities, opacities.size(0), 3);
    CHECK_TENSOR(picture, opacities, height, width);
    CHECK_TENSOR(gradient, opacities, 3, height, width);
    CHECK_TENSOR(along, opacities, height, width);
    TILESPLAT_CHECK(
        colors.has_value() == picture.has_value() && gradient.has_value() == along.has_value() && (colors || !gradient),
        "picture must come with colors, along with gradient, and gradient with colors");
}

}  // namespace gs
