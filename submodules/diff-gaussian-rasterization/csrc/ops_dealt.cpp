// Gaussians that several processes hold, or whose colors the host holds: schemas, checks, and the CPU's part, which is
// colors. The rest is in ops_dealt_cuda.cpp: only GPUs have it.
#include "ops_dealt.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/threads.h"

#define MODEL                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float[] lrs, float beta1, float beta2, " \
    "float eps, int step, Tensor[] world_to_camera, Tensor[] K, int[] widths, int[] heights, int sh_degree, "      \
    "bool antialiasing, "
#define PAIRS "Tensor means, Tensor sh_dc, Tensor? sh_rest, Tensor centers, Tensor pairs, int sh_degree"

TORCH_LIBRARY_FRAGMENT(tilesplat, m) {
    // What each of C cameras sees of the N Gaussians here, which are the rows rank, rank + ranks, ... of all: records
    // [capacity, 16], one camera after the other, each in the order of rows; slots [C, N] int32, eight times the number of a
    // Gaussian's record plus a bit for each channel that is not dark, or -1; and totals [C, 4] int64, of which the second
    // column is how many records a camera has. Should they be more than `capacity`, the call has to be repeated. The moments
    // are for rows that wait (see train_step, which has the same first arguments): those that the cameras can show catch up.
    m.def("dealt_project" MODEL
          "int rank, int ranks, int capacity, Tensor(d!)? moved_at=None, Tensor? missed=None) "
          "-> (Tensor, Tensor, Tensor)");

    // Of records that have come from several processes, counts[i] of them from the i-th: splats [M, 12] and the lists of
    // their tiles, which are ids [entries], ranges [tiles, 2] and totals [4]. The memory of the records is given up.
    m.def("dealt_lists(Tensor(a!) records, int[] counts, int width, int height) -> (Tensor, Tensor, Tensor, Tensor)");

    // Their picture against the photo `target`: gradients of the splats [M, 12]. losses [2]: loss and L1 loss.
    m.def(
        "dealt_blend(Tensor splats, Tensor ids, Tensor ranges, Tensor(a!) totals, Tensor background, Tensor target, "
        "Tensor? mask, float lambda_dssim, bool absolute, Tensor(b!) losses) -> Tensor");

    // Adam's step along the mean of the cameras' gradients [M, 12], which have come back for what dealt_project has left,
    // and along those of the pulls times the sums of opacities and of scales.
    m.def("dealt_step" MODEL
          "Tensor slots, Tensor grads, float opacity_pull, float scale_pull, Tensor(d!)? grad_norm_sum, Tensor(e!)? "
          "visits, "
          "Tensor(f!)? abs_grad_norm_sum, Tensor(g!)? moved_at=None, Tensor(h!)? missed=None) -> ()");

    // Rows of a table [., 3 w] in pinned memory, which the GPU sees as its own: w coefficients of a Gaussian's color, then
    // the first moments of them, then the second. `values` are sh_dc [V, 1, 3] and sh_rest [V, w / 3 - 1, 3] of these rows,
    // then their first moments, then their second. What is fetched makes up for the steps since step moved_at[row]:
    // sums [L, 2] are the drifts of sh_dc and sh_rest since step first + i, and decays [L, 2] how far the moments had decayed
    // then, as logarithms; `now` is the last step there. just_moved: only rows that are up to date already, or only others.
    m.def(
        "fetch_rows(Tensor table, Tensor rows, Tensor moved_at, int first, int now, Tensor sums, Tensor decays, "
        "float eps, bool? just_moved, Tensor(a!)[] values) -> ()");

    // And back, of the rows in the mask `wanted` [V].
    m.def("store_rows(Tensor(a!) table, Tensor rows, Tensor wanted, Tensor[] values) -> ()");

    // Colors [M, 3] of pairs of a camera and a Gaussian, at least 0. A pair is camera * N + Gaussian.
    m.def("pair_colors(" PAIRS ") -> Tensor");

    // The gradients of means, sh_dc and sh_rest. slots [C, N] int32 is the number of a camera's and a Gaussian's pair, -1
    // where there is none.
    m.def("pair_colors_backward(" PAIRS ", Tensor slots, Tensor colors, Tensor grad) -> (Tensor, Tensor, Tensor)");
}

namespace gs {

void check_pair_colors(const PairColorsCall& call, bool allow_double) {
    const auto& [means, sh_dc, sh_rest, centers, pairs, sh_degree] = call;
    const bool doubles = allow_double && means.scalar_type() == at::kDouble;
    const int64_t N = means.dim() ? means.size(0) : 0;
    check_tensor(means, "means", {N, 3}, doubles ? at::kDouble : at::kFloat, means.device());
    CHECK_TENSOR(sh_dc, means, N, 1, 3);
    CHECK_TENSOR(sh_rest, means, N, kAny, 3);
    CHECK_TENSOR(centers, means, kAny, 3);
    CHECK_TENSOR_DTYPE(pairs, means, at::kLong, kAny);
    const int64_t rest = sh_rest ? sh_rest->size(1) : 0;
    TILESPLAT_CHECK(sh_degree >= 0 && sh_degree <= 3, "sh_degree must be 0 to 3, got ", sh_degree);
    TILESPLAT_CHECK(rest >= sh_count(int(sh_degree)) - 1, "sh_rest must have at least ", sh_count(int(sh_degree)) - 1,
                    " rows for degree ", sh_degree, ", got ", rest);
}

void check_pair_colors_backward(const PairColorsBackwardCall& call, bool allow_double) {
    check_pair_colors(call.forward, allow_double);
    const auto& [forward, slots, colors, grad] = call;
    const int64_t M = forward.pairs.size(0);
    CHECK_TENSOR_DTYPE(slots, forward.means, at::kInt, forward.centers.size(0), forward.means.size(0));
    CHECK_TENSOR(colors, forward.means, M, 3);
    CHECK_TENSOR(grad, forward.means, M, 3);
}

namespace {

constexpr int64_t kTask = 1024;  // pairs or Gaussians

void* data(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

template <int Degree, typename T>
void forward_some(const PairColors<T>& p) {
    cpu::parallel((p.pairs + kTask - 1) / kTask, [&](int64_t task) {
        for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, p.pairs); ++i) pair_color<Degree>(p, i);
    });
}

template <int Degree, typename T>
void backward_some(const PairColorsBackward<T>& p) {
    cpu::parallel((p.forward.count + kTask - 1) / kTask, [&](int64_t task) {
        for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, p.forward.count); ++i)
            row_colors_vjp<Degree>(p, i);
    });
}

// run(degree as a constant)
template <typename Run>
void with_degree(int64_t degree, Run run) {
    if (degree == 0) run(std::integral_constant<int, 0>());
    if (degree == 1) run(std::integral_constant<int, 1>());
    if (degree == 2) run(std::integral_constant<int, 2>());
    if (degree == 3) run(std::integral_constant<int, 3>());
}

Tensor pair_colors(const PairColorsCall& call) {
    const Tensor colors = at::empty({call.pairs.size(0), 3}, call.means.options());
    with_degree(call.sh_degree, [&](auto d) {
        if (call.means.scalar_type() == at::kDouble)
            forward_some<decltype(d)::value>(pair_colors_of<double>(call, colors, data));
        else
            forward_some<decltype(d)::value>(pair_colors_of<float>(call, colors, data));
    });
    return colors;
}

std::tuple<Tensor, Tensor, Tensor> pair_colors_backward(const PairColorsBackwardCall& call) {
    const PairColorsCall& in = call.forward;
    const Tensor means = at::empty_like(in.means), dc = at::empty_like(in.sh_dc);
    const Tensor rest = in.sh_rest ? at::empty_like(*in.sh_rest) : at::empty({0}, in.means.options());
    with_degree(in.sh_degree, [&](auto d) {
        if (in.means.scalar_type() == at::kDouble)
            backward_some<decltype(d)::value>(pair_colors_backward_of<double>(call, means, dc, rest, data));
        else
            backward_some<decltype(d)::value>(pair_colors_backward_of<float>(call, means, dc, rest, data));
    });
    return {means, dc, rest};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CPU, m) {
    m.impl("pair_colors", gs::pair_colors_op<gs::pair_colors, true>);
    m.impl("pair_colors_backward", gs::pair_colors_backward_op<gs::pair_colors_backward, true>);
}
