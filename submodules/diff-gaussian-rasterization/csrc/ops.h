// What the two glue files ops_cpu.cpp and ops_cuda.cpp share: argument checks with readable messages.
//
// An operator receives tensors from anywhere; the kernels behind it receive bare pointers. Between the two, everything that
// could be wrong is checked once, here. A message names the argument, what it must be and what it is:
//     means must be [6, 3] float32 on cpu, got [6, 2] float32 on cpu
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace gs {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// In an expected shape: this extent may be anything. Written N in messages.
constexpr int64_t kAny = -1;

// "[6, 2] float64 on cuda:0", with ", not contiguous" where that matters.
std::string describe(const Tensor& tensor);

// Throws unless `tensor` is contiguous and has this shape, dtype and device.
void check_tensor(const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                  at::Device device);
void check_tensor(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                  at::Device device);

// Throws `ValueError` in Python: for numbers and combinations, where there is no tensor to describe.
#define TILESPLAT_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

// check_tensor under the argument's own name: CHECK_TENSOR(means, like, N, 3), where `like` gives dtype and device.
#define CHECK_TENSOR(tensor, like, ...) \
    ::gs::check_tensor(tensor, #tensor, {__VA_ARGS__}, (like).scalar_type(), (like).device())
#define CHECK_TENSOR_DTYPE(tensor, like, dtype, ...) \
    ::gs::check_tensor(tensor, #tensor, {__VA_ARGS__}, dtype, (like).device())

// The inputs of `rasterize`, as both backends receive them. N splats, K spherical harmonics per channel.
struct RasterizeInputs {
    const Tensor& means;                  // [N, 3]
    const OptionalTensor& quats;          // [N, 4]     w x y z
    const OptionalTensor& scales;         // [N, 3]
    const OptionalTensor& cov3d;          // [N, 6]     xx xy xz yy yz zz, instead of quats and scales
    const Tensor& opacities;              // [N, 1] or [N]
    const OptionalTensor& sh_dc;          // [N, 1, 3]
    const OptionalTensor& sh_rest;        // [N, K-1, 3]
    const OptionalTensor& colors;         // [N, 3]     instead of the two above
    const Tensor& world_to_camera;        // [4, 4], or [C, 4, 4] where several views are drawn
    const Tensor& K;                      // [3, 3]
    const OptionalTensor& camera_center;  // [3]
    const Tensor& background;             // [3]
    int64_t width, height;
    int64_t sh_degree;  // 0 to 3; sh_rest must hold at least (degree + 1)^2 - 1 rows

    int64_t count() const { return means.size(0); }
    int64_t rest() const { return sh_rest ? sh_rest->size(1) : 0; }
    bool several() const { return world_to_camera.dim() == 3; }
    int64_t views() const { return several() ? world_to_camera.size(0) : 1; }
    // Of what every view has one of: [shape], or [C, shape].
    std::vector<int64_t> per_view(std::vector<int64_t> shape) const {
        if (several()) shape.insert(shape.begin(), views());
        return shape;
    }
};

// The first five of them.
void check_gaussians(const RasterizeInputs& in, bool allow_double);

// Width and height of a picture.
void check_size(int64_t width, int64_t height);

// Everything above, checked against `means`, which must be float32 (or float64 where `allow_double`).
void check_inputs(const RasterizeInputs& in, bool allow_double);

// Which gradients `rasterize_backward` is asked for, in the order in which it returns them.
using GradsWanted = std::array<bool, 11>;

// The near plane is at a finite depth of 0 or more: what lies behind the camera has no place in the image.
void check_near(double near_depth);

// What a forward keeps for its backward: shape and dtype of every tensor. The caller holds it meanwhile, and hands in
// whatever it likes.
struct StateTensor {
    std::vector<int64_t> shape;
    at::ScalarType dtype;
};
using StateLayout = std::vector<StateTensor>;
void check_state(const std::vector<Tensor>& state, const StateLayout& expected, at::Device device);

// Rows of state[i], which is yet to be checked.
int64_t state_rows(const std::vector<Tensor>& state, size_t i);

// Radii, cotangents and statistics of `rasterize_backward`.
struct BackwardCall;
void check_backward(const BackwardCall& call);

// a and b are [B, C, H, W]; at least 11 x 11 when `valid`.
void check_ssim(const Tensor& a, const Tensor& b, bool valid, bool allow_double);

// grad [] of the mean, like a.
void check_ssim_grad(const Tensor& grad, const Tensor& a);

// image [3, H, W] float; target the same or uint8; mask [H, W].
void check_photometric(const Tensor& image, const Tensor& target, const OptionalTensor& mask, bool allow_double);

// Lists of equal length; every param, grad and moment of one shape; rows match `visible`.
void check_adam(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                const std::vector<double>& lrs, const OptionalTensor& visible, bool allow_double);

// The six parameters of `train_step` and `settle`: means, sh_dc, sh_rest, opacities, scales, quats.
void check_train_params(at::TensorList params);

// These six of `settle`, or four of them, without the colors.
void check_waiting_params(at::TensorList params);

// Height and width of target [3, H, W].
std::pair<int64_t, int64_t> check_target_size(const Tensor& target);

// Everything else that `train_step` is given; `in` are its parameters, seen as the inputs of `rasterize`.
void check_train(const RasterizeInputs& in, at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 const std::vector<double>& lrs, int64_t step, const Tensor& target, const OptionalTensor& mask,
                 const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                 const OptionalTensor& abs_grad_norm_sum, const Tensor& losses, const OptionalTensor& entries,
                 bool allow_double);

// points [N, 3].
void check_points(const Tensor& points, const char* name, bool allow_double);

// ---- operators with long signatures --------------------------------------------------------------------------------
//
// What they are given, checked and in one piece: so each backend has `rasterize(const RasterizeCall&)`, registers
// rasterize_op<rasterize, doubles>, and the dispatcher's signatures are written down once. Double only where `kDoubles`.

struct RasterizeCall {
    RasterizeInputs in;
    double scale_modifier;
    bool antialiasing, raw, keep;
    double near_depth;
};
using Rasterized = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <auto Backend, bool kDoubles>
Rasterized rasterize_op(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                        const OptionalTensor& cov3d, const Tensor& opacities, const OptionalTensor& sh_dc,
                        const OptionalTensor& sh_rest, const OptionalTensor& colors, const Tensor& world_to_camera,
                        const Tensor& K, const OptionalTensor& camera_center, const Tensor& background, int64_t width,
                        int64_t height, int64_t sh_degree, double scale_modifier, bool antialiasing, bool raw,
                        bool keep, double near_depth) {
    const RasterizeCall call = {{means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K,
                                 camera_center, background, width, height, sh_degree},
                                scale_modifier,
                                antialiasing,
                                raw,
                                keep,
                                near_depth};
    check_inputs(call.in, kDoubles);
    check_near(near_depth);
    return Backend(call);
}

struct BackwardCall {
    RasterizeInputs in;
    double scale_modifier;
    bool antialiasing, raw;
    const Tensor& radii;
    const std::vector<Tensor>& state;  // the backend checks it
    const Tensor& grad_image;
    const OptionalTensor &grad_alpha, &grad_inv_depth;
    GradsWanted wanted;
    const OptionalTensor &grad_norm_sum, &visits, &abs_grad_norm_sum;
};

// Eleven tensors, not a list of them: what writes to its arguments may not return lists under torch.compile.
template <size_t... I>
auto as_tuple(const std::vector<Tensor>& tensors, std::index_sequence<I...>) {
    return std::make_tuple(tensors[I]...);
}

template <auto Backend, bool kDoubles>
auto rasterize_backward_op(const Tensor& means, const OptionalTensor& quats, const OptionalTensor& scales,
                           const OptionalTensor& cov3d, const Tensor& opacities, const OptionalTensor& sh_dc,
                           const OptionalTensor& sh_rest, const OptionalTensor& colors, const Tensor& world_to_camera,
                           const Tensor& K, const OptionalTensor& camera_center, const Tensor& background,
                           int64_t width, int64_t height, int64_t sh_degree, double scale_modifier, bool antialiasing,
                           bool raw, const Tensor& radii, const std::vector<Tensor>& state, const Tensor& grad_image,
                           const OptionalTensor& grad_alpha, const OptionalTensor& grad_inv_depth, GradsWanted wanted,
                           const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                           const OptionalTensor& abs_grad_norm_sum) {
    const BackwardCall call = {{means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K,
                                camera_center, background, width, height, sh_degree},
                               scale_modifier,
                               antialiasing,
                               raw,
                               radii,
                               state,
                               grad_image,
                               grad_alpha,
                               grad_inv_depth,
                               wanted,
                               grad_norm_sum,
                               visits,
                               abs_grad_norm_sum};
    check_inputs(call.in, kDoubles);
    check_backward(call);
    return as_tuple(Backend(call), std::make_index_sequence<std::tuple_size_v<GradsWanted>>());
}

}  // namespace gs
