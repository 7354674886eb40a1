// The operators of ops_stages.cpp as both backends see them, and the checks that both make.
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

// Each operator's arguments in one piece, and the wrappers that check them: see ops.h.

struct ProjectCall {
    RasterizeInputs in;  // without colors
    double scale_modifier;
    bool raw;
    double near_depth, blur;
    int64_t compensation, camera;
    const std::vector<double>& distortion;  // k1 to k4

    template <typename T>
    Optics<T> optics() const {
        const Lens<T> lens = {LensKind(camera), T(distortion[0]), T(distortion[1]), T(distortion[2]), T(distortion[3])};
        return {lens, T(blur), Compensation(compensation)};
    }
};
void check_project(const ProjectCall& call, bool allow_double);

inline const Tensor kNone;
inline const OptionalTensor kNothing;

using ProjectedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <auto Backend, bool kDoubles>
ProjectedTensors project_op(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                            const OptionalTensor& cov3d, const Tensor& opacities, const Tensor& world_to_camera,
                            const Tensor& K, int64_t width, int64_t height, double scale_modifier, bool raw,
                            double near_depth, double blur, int64_t compensation, int64_t camera,
                            std::vector<double> distortion) {
    const ProjectCall call = {{means, quats, scales, cov3d, opacities, kNothing, kNothing, kNothing, world_to_camera, K,
                               kNothing, kNone, width, height, 0},
                              scale_modifier,
                              raw,
                              near_depth,
                              blur,
                              compensation,
                              camera,
                              distortion};
    check_project(call, kDoubles);
    return Backend(call);
}

struct ProjectBackwardCall {
    ProjectCall forward;
    const Tensor& radii;
    const OptionalTensor &grad_means2d, &grad_conics, &grad_opacities, &grad_depths;
    std::array<bool, 6> wanted;  // means, quats, scales, cov3d, opacities, world_to_camera
};
void check_project_backward(const ProjectBackwardCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
std::vector<Tensor> project_backward_op(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                                        const OptionalTensor& cov3d, const Tensor& opacities,
                                        const Tensor& world_to_camera, const Tensor& K, int64_t width, int64_t height,
                                        double scale_modifier, bool raw, double near_depth, double blur,
                                        int64_t compensation, int64_t camera, std::vector<double> distortion,
                                        const Tensor& radii, const OptionalTensor& grad_means2d,
                                        const OptionalTensor& grad_conics, const OptionalTensor& grad_opacities,
                                        const OptionalTensor& grad_depths, std::array<bool, 6> wanted) {
    const ProjectBackwardCall call = {{{means, quats, scales, cov3d, opacities, kNothing, kNothing, kNothing,
                                        world_to_camera, K, kNothing, kNone, width, height, 0},
                                       scale_modifier,
                                       raw,
                                       near_depth,
                                       blur,
                                       compensation,
                                       camera,
                                       distortion},
                                      radii,
                                      grad_means2d,
                                      grad_conics,
                                      grad_opacities,
                                      grad_depths,
                                      wanted};
    check_project_backward(call, kDoubles);
    return Backend(call);
}

struct ListsCall {
    ScreenTensors screen;
    int64_t width, height;
    double margin;
    int64_t capacity;
};
void check_lists(const ListsCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
std::vector<Tensor> lists_op(const Tensor& means2d, const Tensor& conics, const Tensor& opacities, const Tensor& depths,
                             const Tensor& radii, int64_t width, int64_t height, double margin, int64_t capacity) {
    const ListsCall call = {{means2d, conics, opacities, depths, radii}, width, height, margin, capacity};
    check_lists(call, kDoubles);
    return Backend(call);
}

// What every walk over the lists is given.
struct WalkCall {
    ScreenTensors screen;              // no depths, no radii
    const std::vector<Tensor>& lists;  // the backend checks them
    const OptionalTensor& offset;      // [2, H, W]
    int64_t width, height;
};

constexpr int64_t kMaxChannels = 512;
constexpr int64_t kMaxAbsoluteChannels = 16;  // absolute gradients are not linear in the channels

struct BlendCall {
    WalkCall walk;
    const Tensor& features;  // [N, D]
    bool keep;
};
void check_blend(const BlendCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
std::tuple<Tensor, Tensor, std::vector<Tensor>> blend_op(const Tensor& means2d, const Tensor& conics,
                                                         const Tensor& opacities, const Tensor& features,
                                                         const OptionalTensor& /*absolute*/,
                                                         const std::vector<Tensor>& lists, const OptionalTensor& offset,
                                                         int64_t width, int64_t height, bool keep) {
    const BlendCall call = {{{means2d, conics, opacities, kNone, kNone}, lists, offset, width, height}, features, keep};
    check_blend(call, kDoubles);
    return Backend(call);
}

struct BlendBackwardCall {
    BlendCall forward;
    const std::vector<Tensor>& kept;  // the backend checks them
    const Tensor& image;
    const OptionalTensor &grad_image, &grad_left;
    bool absolute;
};
void check_blend_backward(const BlendBackwardCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
std::vector<Tensor> blend_backward_op(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                      const Tensor& features, const std::vector<Tensor>& lists,
                                      const OptionalTensor& offset, int64_t width, int64_t height,
                                      const std::vector<Tensor>& kept, const Tensor& image,
                                      const OptionalTensor& grad_image, const OptionalTensor& grad_left,
                                      bool absolute) {
    const BlendBackwardCall call = {
        {{{means2d, conics, opacities, kNone, kNone}, lists, offset, width, height}, features, true},
        kept,
        image,
        grad_image,
        grad_left,
        absolute};
    check_blend_backward(call, kDoubles);
    return Backend(call);
}

struct ScoresCall {
    WalkCall walk;
    const OptionalTensor &weights, &colors, &picture, &gradient, &along;
};
void check_scores(const ScoresCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
std::tuple<Tensor, Tensor, Tensor> scores_op(const Tensor& means2d, const Tensor& conics, const Tensor& opacities,
                                             const std::vector<Tensor>& lists, const OptionalTensor& offset,
                                             int64_t width, int64_t height, const OptionalTensor& weights,
                                             const OptionalTensor& colors, const OptionalTensor& picture,
                                             const OptionalTensor& gradient, const OptionalTensor& along) {
    const ScoresCall call = {{{means2d, conics, opacities, kNone, kNone}, lists, offset, width, height},
                             weights,
                             colors,
                             picture,
                             gradient,
                             along};
    check_scores(call, kDoubles);
    return Backend(call);
}

}  // namespace gs
