// The operators of TileSplat: their schemas, and the checks both backends make before they touch a pointer.
//
// Start here: this is the whole native interface, but for the stages one by one, which are in ops_stages.cpp. ops_cpu.cpp
// and ops_cuda.cpp implement these operators for their device (TORCH_LIBRARY_IMPL), PyTorch's dispatcher chooses by the
// device of the tensors, and the autograd formulas are in diff_gaussian_rasterization/api.py. Shapes are in ops.h;
// reference.py says in plain PyTorch what each one computes.
#include "ops.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#define GAUSSIANS                                                                    \
    "Tensor means, Tensor? quats, Tensor? scales, Tensor? cov3d, Tensor opacities, " \
    "Tensor? sh_dc, Tensor? sh_rest, Tensor? colors, "
#define CAMERA "Tensor world_to_camera, Tensor K, Tensor? camera_center, Tensor background, "
#define SETTINGS "int width, int height, int sh_degree, float scale_modifier, bool antialiasing, bool raw"

TORCH_LIBRARY(tilesplat, m) {
    // Gaussians and a camera -> image [3, H, W], alpha [1, H, W], inverse depth [1, H, W], radii int32 [N], and what the
    // backward wants to find again: all of it, so that the images are the caller's to change. With `raw`, scales are
    // logarithms, opacities logits and quats unnormalized. What is not farther away than `near` is not drawn.
    // With world_to_camera [C, 4, 4], images and radii are [C, ...], and to the last bit what each view would be alone.
    m.def("rasterize(" GAUSSIANS CAMERA SETTINGS
          ", bool keep, float near=0.2) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");

    // The gradients of means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, background and
    // means2d (NDC units, [N, 3]), in this order; an empty tensor where the input was None or the gradient not `wanted`.
    // Of several views, they are added up from the last to the first, but for world_to_camera's: [C, 4, 4].
    // Adds to the densification statistics, each float32 [N], where they are given.
    m.def("rasterize_backward(" GAUSSIANS CAMERA SETTINGS
          ", "
          "Tensor radii, Tensor[] state, "
          "Tensor grad_image, Tensor? grad_alpha, Tensor? grad_inv_depth, bool[11] wanted, "
          "Tensor(a!)? grad_norm_sum, Tensor(b!)? visits, Tensor(c!)? abs_grad_norm_sum) -> "
          "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

    // bool [N]: in front of the near plane, z > near.
    m.def("mark_visible(Tensor means, Tensor world_to_camera, float near=0.2) -> Tensor");

    // Mean SSIM of a and b [B, C, H, W], 11 x 11 Gaussian window, sigma 1.5; `valid` leaves out windows over the border.
    // `train` keeps what the gradient for a needs.
    m.def("ssim(Tensor a, Tensor b, bool valid, bool train) -> (Tensor, Tensor[])");
    m.def("ssim_backward(Tensor a, Tensor b, bool valid, Tensor[] state, Tensor grad) -> Tensor");

    // (1 - lambda) L1 + lambda (1 - SSIM) of image [3, H, W] and target (float, or uint8 meaning 0..255), both times the
    // mask [H, W] if there is one. Returns loss, L1 alone, and the gradient of the loss for the image.
    m.def(
        "photometric_loss(Tensor image, Tensor target, Tensor? mask, float lambda_dssim) -> (Tensor, Tensor, Tensor)");

    // One step of Adam for all tensors at once, with bias correction as torch.optim.Adam; `step` counts from 1.
    // With `visible` bool [N], only those rows move, and there is no bias correction.
    m.def(
        "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float[] lrs, "
        "float beta1, float beta2, float eps, int step, Tensor? visible) -> ()");

    // One training iteration in one call: render, loss, backward, Adam and the densification statistics. Everything is
    // raw; params are means, sh_dc, sh_rest, opacities, scales, quats, with one learning rate each. Adds loss, L1, 1 and 0
    // to `losses` [4], which stays on the device, so that nobody waits for it.
    // `capacity` is for how many (tile, splat) entries the GPU makes room. A step that wants more moves nothing and adds
    // 0, 0, 0 and 1 to `losses`. With a capacity of 0 or less, the call waits for the exact number. `entries`, one int64 in
    // pinned memory, receives that number some time after the call returns. The CPU needs neither.
    m.def(
        "train_step(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float[] lrs, float beta1, "
        "float beta2, float eps, int step, Tensor world_to_camera, Tensor K, Tensor background, Tensor target, "
        "Tensor? mask, int sh_degree, bool antialiasing, float lambda_dssim, Tensor(d!)? grad_norm_sum, "
        "Tensor(e!)? visits, Tensor(f!)? abs_grad_norm_sum, Tensor(g!) losses, int capacity, Tensor(h!)? entries, "
        "Tensor(i!)? moved_at=None, Tensor(j!)? missed=None) -> ()");

    // With moved_at, int32 [N], and missed [128, 8], a GPU's train_step leaves rows alone that the view does not show.
    // Before such a row can be seen, it makes up for the steps it missed, which come to the same as gradients of zero.
    // `settle` does it for all rows: it must be called before anyone looks at them, and at least every 127 steps. Row i is
    // up to date with step moved_at[i]; begin with the step before the first, and with rows of six 0 and two 1 in `missed`.
    // Of Gaussians whose colors are elsewhere, `params` are means, opacities, scales and quats.
    m.def(
        "settle(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float beta2, float eps, "
        "int step, Tensor(d!) moved_at, Tensor missed) -> ()");

    // Mask [N] of the rows that the camera may show: it is false only where `rasterize` finds radius 0. They are brought up
    // to date. On a GPU.
    m.def(
        "near_rows(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float beta2, float eps, "
        "int step, Tensor(d!) moved_at, Tensor missed, Tensor world_to_camera, Tensor K, int width, int height) "
        "-> Tensor");

    // [N]: mean squared distance of every point [N, 3] to its three nearest others.
    m.def("knn_mean_dist2(Tensor points) -> Tensor");

    // The instruction sets the CPU backend was built with and can use here, best first, and which one is in use.
    // Implemented for CompositeExplicitAutograd, since no tensor says a device. TILESPLAT_ISA=<name> in the environment
    // or set_cpu_isa(<name>) choose another one ("" = the best).
    m.def("cpu_isas() -> str[]");
    m.def("cpu_isa() -> str");
    m.def("set_cpu_isa(str name) -> ()");
}

namespace gs {
namespace {

const char* dtype_name(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return "float32";
        case at::kDouble:
            return "float64";
        case at::kHalf:
            return "float16";
        case at::kBFloat16:
            return "bfloat16";
        case at::kInt:
            return "int32";
        case at::kLong:
            return "int64";
        case at::kByte:
            return "uint8";
        case at::kBool:
            return "bool";
        default:
            return c10::toString(dtype);
    }
}

std::string shape_name(at::IntArrayRef shape) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < shape.size(); ++i) {
        if (i) out << ", ";
        if (shape[i] == kAny)
            out << 'N';
        else
            out << shape[i];
    }
    out << ']';
    return out.str();
}

std::string describe(at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
    return shape_name(shape) + " " + dtype_name(dtype) + " on " + device.str();
}

bool same_shape(at::IntArrayRef actual, at::IntArrayRef expected) {
    return actual.size() == expected.size() && std::equal(actual.begin(), actual.end(), expected.begin(),
                                                          [](int64_t a, int64_t e) { return e == kAny || a == e; });
}

// The tensor that gives everything else its dtype and device.
void check_leading(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, bool allow_double) {
    const bool dtype_ok = tensor.scalar_type() == at::kFloat || (allow_double && tensor.scalar_type() == at::kDouble);
    check_tensor(tensor, name, shape, dtype_ok ? tensor.scalar_type() : at::kFloat, tensor.device());
}

void check_opacities(const Tensor& opacities, const Tensor& means) {
    if (opacities.dim() == 1)
        CHECK_TENSOR(opacities, means, means.size(0));
    else
        CHECK_TENSOR(opacities, means, means.size(0), 1);
}

}  // namespace

std::string describe(const Tensor& tensor) {
    if (!tensor.defined()) return "None";
    return describe(tensor.sizes(), tensor.scalar_type(), tensor.device()) +
           (tensor.is_contiguous() ? "" : ", not contiguous");
}

void check_tensor(const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                  at::Device device) {
    const bool ok = tensor.defined() && same_shape(tensor.sizes(), shape) && tensor.scalar_type() == dtype &&
                    tensor.device() == device && tensor.is_contiguous();
    TILESPLAT_CHECK(ok, name, " must be ", describe(shape, dtype, device),
                    tensor.defined() && !tensor.is_contiguous() ? ", contiguous" : "", ", got ", describe(tensor));
}

void check_tensor(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                  at::Device device) {
    if (tensor) check_tensor(*tensor, name, shape, dtype, device);
}

void check_gaussians(const RasterizeInputs& in, bool allow_double) {
    const Tensor &means = in.means, &opacities = in.opacities;
    const OptionalTensor &quats = in.quats, &scales = in.scales, &cov3d = in.cov3d;
    check_points(means, "means", allow_double);
    const int64_t N = means.size(0);
    TILESPLAT_CHECK(quats.has_value() == scales.has_value() && quats.has_value() != cov3d.has_value(),
                    "exactly one of (quats and scales) and cov3d must be given, got quats ",
                    describe(quats.value_or(Tensor())), ", scales ", describe(scales.value_or(Tensor())), ", cov3d ",
                    describe(cov3d.value_or(Tensor())));
    CHECK_TENSOR(quats, means, N, 4);
    CHECK_TENSOR(scales, means, N, 3);
    CHECK_TENSOR(cov3d, means, N, 6);
    check_opacities(opacities, means);
}

void check_size(int64_t width, int64_t height) {
    constexpr int64_t kMaxSize = 1 << 16;
    TILESPLAT_CHECK(width >= 1 && width <= kMaxSize, "width must be 1 to ", kMaxSize, ", got ", width);
    TILESPLAT_CHECK(height >= 1 && height <= kMaxSize, "height must be 1 to ", kMaxSize, ", got ", height);
}

void check_inputs(const RasterizeInputs& in, bool allow_double) {
    check_gaussians(in, allow_double);
    const auto& [means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K, camera_center,
                 background, width, height, sh_degree] = in;
    const int64_t N = means.size(0);
    TILESPLAT_CHECK(sh_dc.has_value() != colors.has_value(),
                    "exactly one of sh_dc and colors must be given, got sh_dc ", describe(sh_dc.value_or(Tensor())),
                    ", colors ", describe(colors.value_or(Tensor())));
    TILESPLAT_CHECK(!sh_rest || sh_dc, "sh_rest must come with sh_dc, got sh_dc None");
    CHECK_TENSOR(sh_dc, means, N, 1, 3);
    CHECK_TENSOR(colors, means, N, 3);
    TILESPLAT_CHECK(sh_degree >= 0 && sh_degree <= 3, "sh_degree must be 0, 1, 2 or 3, got ", sh_degree);
    if (sh_dc) {
        const int64_t needed = (sh_degree + 1) * (sh_degree + 1) - 1;
        if (sh_rest) CHECK_TENSOR(sh_rest, means, N, std::max(needed, sh_rest->dim() == 3 ? sh_rest->size(1) : 0), 3);
        TILESPLAT_CHECK(sh_rest || needed == 0, "sh_rest must be [", N, ", ", needed, ", 3] for sh_degree ", sh_degree,
                        ", got None");
    }
    check_tensor(world_to_camera, "world_to_camera", in.per_view({4, 4}), means.scalar_type(), means.device());
    TILESPLAT_CHECK(in.views() >= 1, "world_to_camera must be of at least one view, got ", describe(world_to_camera));
    CHECK_TENSOR(K, means, 3, 3);
    CHECK_TENSOR(camera_center, means, 3);
    CHECK_TENSOR(background, means, 3);
    check_size(width, height);
}

void check_near(double near_depth) {
    TILESPLAT_CHECK(near_depth >= 0 && std::isfinite(near_depth), "near must be a finite number, 0 or more, got ",
                    near_depth);
}

void check_state(const std::vector<Tensor>& state, const StateLayout& expected, at::Device device) {
    TILESPLAT_CHECK(state.size() == expected.size(), "state must be what the forward returned on ", device.str(), ": ",
                    expected.size(), " tensors, got ", state.size());
    for (size_t i = 0; i < state.size(); ++i) {
        const std::string name = "state[" + std::to_string(i) + "]";
        check_tensor(state[i], name.c_str(), expected[i].shape, expected[i].dtype, device);
        TILESPLAT_CHECK(reinterpret_cast<uintptr_t>(state[i].const_data_ptr()) % 16 == 0, name,
                        " must be aligned to 16 bytes, as all new tensors are");
    }
}

int64_t state_rows(const std::vector<Tensor>& state, size_t i) {
    return i < state.size() && state[i].defined() && state[i].dim() ? state[i].size(0) : 0;
}

void check_backward(const BackwardCall& call) {
    const auto& [in, scale_modifier, antialiasing, raw, radii, state, grad_image, grad_alpha, grad_inv_depth, wanted,
                 grad_norm_sum, visits, abs_grad_norm_sum] = call;
    const Tensor& means = in.means;
    const int64_t N = in.count();
    const auto check = [&](const OptionalTensor& tensor, const char* name, std::vector<int64_t> shape, auto dtype) {
        check_tensor(tensor, name, in.per_view(std::move(shape)), dtype, means.device());
    };
    const at::ScalarType number = means.scalar_type();
    check(radii, "radii", {N}, at::kInt);
    check(grad_image, "grad_image", {3, in.height, in.width}, number);
    check(grad_alpha, "grad_alpha", {1, in.height, in.width}, number);
    check(grad_inv_depth, "grad_inv_depth", {1, in.height, in.width}, number);
    CHECK_TENSOR_DTYPE(grad_norm_sum, means, at::kFloat, N);
    CHECK_TENSOR_DTYPE(visits, means, at::kFloat, N);
    CHECK_TENSOR_DTYPE(abs_grad_norm_sum, means, at::kFloat, N);
}

void check_ssim(const Tensor& a, const Tensor& b, bool valid, bool allow_double) {
    check_leading(a, "a", {kAny, kAny, kAny, kAny}, allow_double);
    CHECK_TENSOR(b, a, a.size(0), a.size(1), a.size(2), a.size(3));
    TILESPLAT_CHECK(a.numel() > 0, "a must not be empty, got ", describe(a));
    TILESPLAT_CHECK(!valid || (a.size(2) >= 11 && a.size(3) >= 11),
                    "a must be at least 11 x 11 for padding \"valid\", got ", describe(a));
}

void check_ssim_grad(const Tensor& grad, const Tensor& a) {
    check_tensor(grad, "grad", {}, a.scalar_type(), a.device());
}

void check_photometric(const Tensor& image, const Tensor& target, const OptionalTensor& mask, bool allow_double) {
    check_leading(image, "image", {3, kAny, kAny}, allow_double);
    TILESPLAT_CHECK(image.numel() > 0, "image must not be empty, got ", describe(image));
    const bool bytes = target.defined() && target.scalar_type() == at::kByte;
    CHECK_TENSOR_DTYPE(target, image, bytes ? at::kByte : image.scalar_type(), 3, image.size(1), image.size(2));
    CHECK_TENSOR(mask, image, image.size(1), image.size(2));
}

void check_adam(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                const std::vector<double>& lrs, const OptionalTensor& visible, bool allow_double) {
    const size_t count = params.size();
    TILESPLAT_CHECK(
        grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count && lrs.size() == count,
        "grads, exp_avg, exp_avg_sq and lrs must have ", count, " entries like params, got ", grads.size(), ", ",
        exp_avg.size(), ", ", exp_avg_sq.size(), " and ", lrs.size());
    const auto check_like = [](const Tensor& tensor, const std::string& name, const Tensor& param) {
        const bool ok = tensor.defined() && tensor.sizes() == param.sizes() && tensor.is_contiguous() &&
                        tensor.scalar_type() == param.scalar_type() && tensor.device() == param.device();
        TILESPLAT_CHECK(ok, name, " must be ", describe(param), ", contiguous, got ", describe(tensor));
    };
    for (size_t i = 0; i < count; ++i) {
        const std::string row = "[" + std::to_string(i) + "]";
        const bool dtype_ok =
            params[i].scalar_type() == at::kFloat || (allow_double && params[i].scalar_type() == at::kDouble);
        TILESPLAT_CHECK(dtype_ok && params[i].is_contiguous() && params[i].device() == params[0].device(), "params",
                        row, " must be float32 on ", params[0].device().str(), ", contiguous, got ",
                        describe(params[i]));
        check_like(grads[i], "grads" + row, params[i]);
        check_like(exp_avg[i], "exp_avg" + row, params[i]);
        check_like(exp_avg_sq[i], "exp_avg_sq" + row, params[i]);
        if (visible) {
            const int64_t rows = params[i].dim() ? params[i].size(0) : 1;
            CHECK_TENSOR_DTYPE(visible, params[i], at::kBool, rows);
        }
    }
}

void check_train_params(at::TensorList params) {
    TILESPLAT_CHECK(params.size() == 6, "params must be means, sh_dc, sh_rest, opacities, scales and quats, got ",
                    params.size(), " tensors");
    const Tensor &means = params[0], &sh_dc = params[1], &sh_rest = params[2], &opacities = params[3],
                 &scales = params[4], &quats = params[5];
    check_points(means, "means", true);
    const int64_t N = means.size(0), rest = sh_rest.dim() == 3 ? sh_rest.size(1) : 0;
    CHECK_TENSOR(sh_dc, means, N, 1, 3);
    CHECK_TENSOR(sh_rest, means, N, rest, 3);
    TILESPLAT_CHECK(rest <= 15, "sh_rest must have at most 15 coefficients per channel, got ", rest);
    check_opacities(opacities, means);
    CHECK_TENSOR(scales, means, N, 3);
    CHECK_TENSOR(quats, means, N, 4);
}

void check_waiting_params(at::TensorList params) {
    if (params.size() == 6) return check_train_params(params);
    TILESPLAT_CHECK(params.size() == 4, "params must be means, opacities, scales and quats, and with colors sh_dc and ",
                    "sh_rest after means, got ", params.size(), " tensors");
    const Tensor &means = params[0], &scales = params[2], &quats = params[3];
    check_points(means, "means", true);
    const int64_t N = means.size(0);
    check_opacities(params[1], means);
    CHECK_TENSOR(scales, means, N, 3);
    CHECK_TENSOR(quats, means, N, 4);
}

std::pair<int64_t, int64_t> check_target_size(const Tensor& target) {
    TILESPLAT_CHECK(target.dim() == 3 && target.size(0) == 3, "target must be [3, H, W], got ", describe(target));
    return {target.size(1), target.size(2)};
}

void check_train(const RasterizeInputs& in, at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 const std::vector<double>& lrs, int64_t step, const Tensor& target, const OptionalTensor& mask,
                 const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                 const OptionalTensor& abs_grad_norm_sum, const Tensor& losses, const OptionalTensor& entries,
                 bool allow_double) {
    check_inputs(in, allow_double);
    check_tensor(in.world_to_camera, "world_to_camera", {4, 4}, in.means.scalar_type(), in.means.device());
    check_adam(params, params, exp_avg, exp_avg_sq, lrs, std::nullopt, allow_double);
    TILESPLAT_CHECK(step >= 1 && step <= INT32_MAX, "step must be at least 1, got ", step);
    const Tensor& means = in.means;
    const int64_t N = in.count();
    const bool bytes = target.scalar_type() == at::kByte;
    CHECK_TENSOR_DTYPE(target, means, bytes ? at::kByte : means.scalar_type(), 3, in.height, in.width);
    CHECK_TENSOR(mask, means, in.height, in.width);
    CHECK_TENSOR_DTYPE(grad_norm_sum, means, at::kFloat, N);
    CHECK_TENSOR_DTYPE(visits, means, at::kFloat, N);
    CHECK_TENSOR_DTYPE(abs_grad_norm_sum, means, at::kFloat, N);
    CHECK_TENSOR_DTYPE(losses, means, at::kFloat, 4);
    if (entries) check_tensor(*entries, "entries", {1}, at::kLong, at::kCPU);
}

void check_points(const Tensor& points, const char* name, bool allow_double) {
    check_leading(points, name, {kAny, 3}, allow_double);
    TILESPLAT_CHECK(points.size(0) <= INT32_MAX, name, " must have at most ", INT32_MAX, " rows, got ", points.size(0));
}

}  // namespace gs
