// Checks that both backends make for the operators of ops_stages.cpp.
#pragma once
#include "common/args.h"
#include "ops.h"

namespace gs {

// Gaussians on the screen, as `project` returns them.
struct ScreenTensors {
    const Tensor& means2d;    // [N, 2]
    const Tensor& conics;     // [N, 3]
    const Tensor& opacities;  // [N]
    const Tensor& depths;     // [N]; undefined where nobody asks
    const Tensor& radii;      // [N] int32, likewise

    int64_t count() const { return means2d.size(0); }
};
void check_screen(const ScreenTensors& in, bool allow_double);

// What `project` is told about camera and filter.
struct ProjectOptions {
    double near, blur;
    int64_t compensation, camera;
    const std::vector<double>& distortion;  // k1 to k4

    template <typename T>
    Optics<T> optics() const {
        const Lens<T> lens = {LensKind(camera), T(distortion[0]), T(distortion[1]), T(distortion[2]), T(distortion[3])};
        return {lens, T(blur), Compensation(compensation)};
    }
};
void check_project(const RasterizeInputs& in, const ProjectOptions& options, bool allow_double);

constexpr int64_t kMaxChannels = 512;
constexpr int64_t kMaxAbsoluteChannels = 16;  // absolute gradients are not linear in the channels

// features [N, D], D at most kMaxChannels; offset [2, H, W].
void check_features(const Tensor& features, const OptionalTensor& offset, int64_t width, int64_t height,
                    bool allow_double);

// The gradients that `project_backward` and `blend_backward` are given.
void check_screen_grads(const Tensor& means, const Tensor& radii, const OptionalTensor& grad_means2d,
                        const OptionalTensor& grad_conics, const OptionalTensor& grad_opacities,
                        const OptionalTensor& grad_depths);
void check_blend_backward(const Tensor& features, int64_t width, int64_t height, const Tensor& image,
                          const OptionalTensor& grad_image, const OptionalTensor& grad_left, bool absolute);

// The pictures and colors that `scores` is given; gradient and along come with colors and picture.
void check_scores(const Tensor& opacities, const OptionalTensor& offset, int64_t width, int64_t height,
                  const OptionalTensor& weights, const OptionalTensor& colors, const OptionalTensor& picture,
                  const OptionalTensor& gradient, const OptionalTensor& along);

}  // namespace gs
