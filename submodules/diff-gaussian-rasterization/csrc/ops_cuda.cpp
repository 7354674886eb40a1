// ops_cuda.cpp: the operators of ops.cpp for tensors on a GPU.
//
// Here tensors become pointers and buffers are allocated, from PyTorch's allocator; the work is in cuda/, whose stages.h
// is its table of contents. Everything is enqueued on the current stream. The host waits once per call, for the number
// of (tile, splat) entries, and spends that time while the GPU sorts; in a training step only if it has no guess.
#include "ops_cuda.h"

#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

namespace gs {
namespace {

// The order of the tensors in `state`. The last three are there if the backward is to add up in a fixed order.
enum State {
    kSplats,
    kIds,
    kRanges,
    kImage,
    kInvDepth,
    kTotals,
    kTrace,
    kStateCount,
    kPairs = kStateCount,
    kOffsets,
    kOrder,
    kOrderedStateCount
};

constexpr int64_t kSplatFloats = sizeof(cuda::Splat) / sizeof(float), kTotalsCount = 4;
static_assert(sizeof(cuda::Totals) == kTotalsCount * sizeof(int64_t));

// Views are drawn as one: see cuda::TileGrid.
cuda::TileGrid grid_of(const RasterizeInputs& in) {
    const int64_t views = in.views(), splats = views * in.count(), most = INT32_MAX;
    const int64_t tiles = views * ((in.width + kTileSize - 1) / kTileSize) * ((in.height + kTileSize - 1) / kTileSize);
    TILESPLAT_CHECK(views <= most && splats <= most && tiles <= most, "views in one call may have at most ", most,
                    " splats and tiles in all, got ", views, " views with ", splats, " and ", tiles);
    return {int(in.width), int(in.height), int(views)};
}

StateLayout state_layout(const RasterizeInputs& in, int64_t entries, bool ordered) {
    const cuda::TileGrid grid = grid_of(in);
    const int64_t splats = in.views() * in.count();
    StateLayout layout(kStateCount);
    layout[kSplats] = {{splats, kSplatFloats}, at::kFloat};
    layout[kIds] = {{entries}, at::kInt};
    layout[kRanges] = {{grid.tiles(), 2}, at::kInt};
    layout[kImage] = {in.per_view({3, in.height, in.width}), at::kFloat};
    layout[kInvDepth] = {in.per_view({1, in.height, in.width}), at::kFloat};
    layout[kTotals] = {{kTotalsCount}, at::kLong};
    layout[kTrace] = {{int64_t(cuda::trace_bytes(grid, entries, true))}, at::kByte};
    if (ordered) layout.insert(layout.end(), {{{entries}, at::kInt}, {{splats}, at::kInt}, {{splats}, at::kInt}});
    return layout;
}

constexpr int kCameraGrad = 8, kBackgroundGrad = 9;  // among the gradients of rasterize_backward

Rasterized rasterize(const RasterizeCall& call) {
    const RasterizeInputs& in = call.in;
    const bool keep = call.keep;
    const Device device(in.means);
    const cuda::TileGrid grid = grid_of(in);
    Counted counted(device.stream);
    const Gaussians<float> g = gaussians(in, call.scale_modifier, call.antialiasing, call.raw);
    const View<float> v = view(in, call.near_depth);
    Projected projected(device, grid.views * g.count, grid, counted.place(),
                        [&](const cuda::Screen& s) { cuda::preprocess(g, v, s, device.stream, grid.views); });
    counted.enqueued();
    Tensor order = depth_order(device, projected);
    const int64_t entries = counted.wait();
    const TileLists lists(device, grid, projected, order, entries, keep && deterministic());
    const Tensor trace = keep ? device.bytes(cuda::trace_bytes(grid, entries, true)) : Tensor();

    const auto planes = [&](int64_t count) { return device.empty(in.per_view({count, in.height, in.width})); };
    const Tensor color = planes(3), alpha = planes(1), inv_depth = planes(1);
    cuda::blend_forward(
        {grid, projected.screen.splats, data<uint32_t>(lists.ids), data<uint32_t>(projected.ranges),
         data<float>(in.background), data<float>(color), data<float>(alpha), data<float>(inv_depth),
         keep ? cuda::trace_in(trace.data_ptr(), grid, entries, true) : cuda::Trace{}, projected.screen.totals},
        device.stream);
    std::vector<Tensor> state;
    if (keep)
        state = {projected.splats, lists.ids, projected.ranges, at::clone(color), at::clone(inv_depth),
                 projected.totals, trace};
    if (lists.pairs.defined()) state.insert(state.end(), {lists.pairs, lists.offsets, order});
    return {color, alpha, inv_depth, at::_unsafe_view(projected.radii, in.per_view({g.count})), state};
}

std::vector<Tensor> rasterize_backward(const BackwardCall& call) {
    const RasterizeInputs& in = call.in;
    const std::vector<Tensor>& state = call.state;
    const GradsWanted& wanted = call.wanted;
    const bool ordered = state.size() == kOrderedStateCount;
    check_state(state, state_layout(in, state_rows(state, kIds), ordered), in.means.device());
    const Device device(in.means);
    const int64_t N = in.count();
    const cuda::TileGrid grid = grid_of(in);

    const Tensor splat_grads = device.zeros({grid.views * N, cuda::kGradSize});
    const auto* splats = data<cuda::Splat>(state[kSplats]);
    const int64_t entries = state[kIds].numel();
    const cuda::Trace trace = cuda::trace_in(state[kTrace].data_ptr(), grid, entries, true);
    cuda::BlendBackward blend = {grid,
                                 splats,
                                 data<uint32_t>(state[kIds]),
                                 data<uint32_t>(state[kRanges]),
                                 entries,
                                 trace,
                                 data<cuda::Totals>(state[kTotals]),
                                 data<float>(in.background),
                                 data<float>(state[kImage]),
                                 data<float>(state[kInvDepth]),
                                 data<float>(call.grad_image),
                                 data<float>(call.grad_alpha),
                                 data<float>(call.grad_inv_depth),
                                 call.abs_grad_norm_sum.has_value(),
                                 data<float>(splat_grads)};
    const Tensor records = ordered ? device.zeros({entries, cuda::kRecords, cuda::kGradSize}) : Tensor();
    if (ordered) blend.ordered = in_order(state[kPairs], state[kOffsets], state[kOrder], records);
    cuda::check_kept(blend, grid.views * N, device.stream);
    cuda::blend_backward(blend, device.stream);

    const OptionalTensor inputs[] = {in.means,   in.quats,  in.scales,          in.cov3d,      in.opacities, in.sh_dc,
                                     in.sh_rest, in.colors, in.world_to_camera, in.background, in.means};
    std::vector<Tensor> grads;
    for (size_t i = 0; i < wanted.size(); ++i)
        grads.push_back(wanted[i] && inputs[i] ? at::empty_like(*inputs[i]) : device.empty({0}));
    // Blocks write sums of their own for these two.
    const int64_t blocks = cuda::background_grad_blocks(grid);
    if (wanted[kCameraGrad]) grads[kCameraGrad] = device.empty({grid.views, cuda::preprocess_backward_blocks(N), 4, 4});
    if (wanted[kBackgroundGrad]) grads[kBackgroundGrad] = device.empty({grid.views, blocks, 3});
    const auto at = [&](size_t i) { return grads[i].numel() ? data<float>(grads[i]) : nullptr; };
    const GaussianGrads<float> out = {at(0),
                                      at(1),
                                      at(2),
                                      at(3),
                                      at(4),
                                      at(5),
                                      at(6),
                                      at(7),
                                      at(8),
                                      at(9),
                                      at(10),
                                      data<float>(call.grad_norm_sum),
                                      data<float>(call.visits),
                                      data<float>(call.abs_grad_norm_sum)};
    for (int64_t view = 0; out.background && view < grid.views; ++view) {
        const int64_t plane = in.width * in.height;
        cuda::background_grad(grid, trace.left + view * plane, data<float>(call.grad_image) + 3 * view * plane,
                              out.background + 3 * view * blocks, device.stream);
    }
    cuda::preprocess_backward({gaussians(in, call.scale_modifier, call.antialiasing, call.raw), view(in),
                               data<int32_t>(call.radii), splats, data<float>(splat_grads), out, grid.views},
                              device.stream);
    if (wanted[kCameraGrad])
        grads[kCameraGrad] = at::_unsafe_view(at::sum(grads[kCameraGrad], 1), in.world_to_camera.sizes());
    if (wanted[kBackgroundGrad]) grads[kBackgroundGrad] = at::sum(grads[kBackgroundGrad].view({-1, 3}), 0);
    return grads;
}

Tensor mark_visible(const Tensor& means, const Tensor& world_to_camera, double near_depth) {
    check_points(means, "means", false);
    check_near(near_depth);
    CHECK_TENSOR(world_to_camera, means, 4, 4);
    const Device device(means);
    const Tensor visible = device.empty({means.size(0)}, at::kBool);
    cuda::mark_visible(means.size(0), data<float>(means), data<float>(world_to_camera), float(near_depth),
                       data<bool>(visible), device.stream);
    return visible;
}

// ---- losses --------------------------------------------------------------------------------------------------------

// Images [B, C, H, W] as B C planes, with room for the sums of their blocks.
struct SsimCall {
    cuda::Ssim args{};
    Tensor partial_ssim, partial_l1;
    int64_t blocks;
    double count;

    SsimCall(const Device& device, int64_t planes, int64_t height, int64_t width, bool valid) {
        blocks = cuda::ssim_blocks(int(planes), int(height), int(width));
        partial_ssim = device.empty({blocks});
        args.planes = int(planes), args.height = int(height), args.width = int(width);
        args.crop = valid ? 5 : 0;
        args.partial_ssim = data<float>(partial_ssim);
        count = double(planes) * double(height - 2 * args.crop) * double(width - 2 * args.crop);
    }
};

std::tuple<Tensor, std::vector<Tensor>> ssim(const Tensor& a, const Tensor& b, bool valid, bool train) {
    check_ssim(a, b, valid, false);
    const Device device(a);
    SsimCall call(device, a.size(0) * a.size(1), a.size(2), a.size(3), valid);
    const Tensor value = device.empty({});
    const Tensor maps = train ? device.empty({3, a.size(0), a.size(1), a.size(2), a.size(3)}) : Tensor();
    call.args.a = data<float>(a);
    call.args.b_float = data<float>(b);
    call.args.maps = train ? data<float>(maps) : nullptr;
    cuda::ssim_forward(call.args, device.stream);
    cuda::ssim_value(call.args.partial_ssim, call.blocks, call.count, data<float>(value), device.stream);
    return {value, train ? std::vector<Tensor>{maps} : std::vector<Tensor>{}};
}

Tensor ssim_backward(const Tensor& a, const Tensor& b, bool valid, const std::vector<Tensor>& state,
                     const Tensor& grad) {
    check_ssim(a, b, valid, false);
    check_state(state, {{{3, a.size(0), a.size(1), a.size(2), a.size(3)}, at::kFloat}}, a.device());
    check_ssim_grad(grad, a);
    const Device device(a);
    SsimCall call(device, a.size(0) * a.size(1), a.size(2), a.size(3), valid);
    const Tensor g_a = at::empty_like(a);
    call.args.a = data<float>(a);
    call.args.b_float = data<float>(b);
    call.args.maps = data<float>(state[0]);
    cuda::ssim_backward({call.args, data<float>(grad), 1.f, 0.f, call.count, data<float>(g_a)}, device.stream);
    return g_a;
}

// Fills the gradient g_image [3, H, W]; the loss is left as sums of blocks.
SsimCall photometric(const Device& device, const Tensor& image, const Tensor& target, const OptionalTensor& mask,
                     double lambda_dssim, const Tensor& g_image) {
    SsimCall call(device, 3, image.size(1), image.size(2), false);
    const Tensor maps = device.empty({3, 3, image.size(1), image.size(2)});
    call.partial_l1 = device.empty({call.blocks});
    const bool bytes = target.scalar_type() == at::kByte;
    call.args.a = data<float>(image);
    call.args.b_float = bytes ? nullptr : data<float>(target);
    call.args.b_bytes = bytes ? data<uint8_t>(target) : nullptr;
    call.args.mask = data<float>(mask);
    call.args.clamped = true;
    call.args.maps = data<float>(maps);
    call.args.partial_l1 = data<float>(call.partial_l1);
    cuda::ssim_forward(call.args, device.stream);
    cuda::ssim_backward(
        {call.args, nullptr, float(-lambda_dssim), float(1.0 - lambda_dssim), call.count, data<float>(g_image)},
        device.stream);
    return call;
}

std::tuple<Tensor, Tensor, Tensor> photometric_loss(const Tensor& image, const Tensor& target,
                                                    const OptionalTensor& mask, double lambda_dssim) {
    check_photometric(image, target, mask, false);
    const Device device(image);
    const Tensor loss = device.empty({}), l1 = device.empty({}), g_image = at::empty_like(image);
    const SsimCall call = photometric(device, image, target, mask, lambda_dssim, g_image);
    cuda::photometric_value(call.args.partial_ssim, call.args.partial_l1, call.blocks, call.count, float(lambda_dssim),
                            data<float>(loss), data<float>(l1), device.stream);
    return {loss, l1, g_image};
}

// ---- Adam, neighbors -----------------------------------------------------------------------------------------------

void adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
               const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
               const OptionalTensor& visible) {
    check_adam(params, grads, exp_avg, exp_avg_sq, lrs, visible, false);
    TILESPLAT_CHECK(step >= 1, "step must be at least 1, got ", step);
    if (params.empty()) return;
    const Device device(params[0]);
    const double bias1 = visible ? 1.0 : 1.0 - std::pow(beta1, double(step));
    for (size_t first = 0; first < params.size(); first += cuda::kMaxAdamTensors) {
        cuda::Adam call{};
        call.rates = adam_rates(beta1, beta2, eps, visible ? 1.0 : 1.0 - std::pow(beta2, double(step)));
        call.visible = data<bool>(visible);
        for (size_t i = first; i < params.size() && call.count < cuda::kMaxAdamTensors; ++i) {
            const int64_t size = params[i].numel(), rows = params[i].dim() ? params[i].size(0) : 1;
            call.tensors[call.count++] = {data<float>(params[i]),
                                          data<float>(grads[i]),
                                          data<float>(exp_avg[i]),
                                          data<float>(exp_avg_sq[i]),
                                          size,
                                          rows ? size / rows : 1,
                                          float(lrs[i] / bias1)};
        }
        cuda::adam(call, device.stream);
    }
}

Tensor knn_mean_dist2(const Tensor& points) {
    check_points(points, "points", false);
    const Device device(points);
    const int64_t N = points.size(0);
    const Tensor result = device.empty({N});
    if (N == 0) return result;
    const size_t bytes = cuda::knn_workspace(N);
    const Tensor workspace = device.bytes(bytes);
    cuda::knn_mean_dist2(N, data<float>(points), data<float>(result), workspace.data_ptr(), bytes, device.stream);
    return result;
}

// ---- the fused training step ---------------------------------------------------------------------------------------

cuda::Waiting waiting_in(int64_t count, const Tensor& means, const OptionalTensor& moved_at,
                         const OptionalTensor& missed) {
    TILESPLAT_CHECK(moved_at.has_value() == missed.has_value(), "moved_at and missed must be given together");
    CHECK_TENSOR_DTYPE(moved_at, means, at::kInt, count);
    CHECK_TENSOR(missed, means, cuda::kWindow, int64_t(sizeof(cuda::Missed) / sizeof(float)));
    return {data<int32_t>(moved_at), data<cuda::Missed>(missed)};
}

cuda::Trained trained_tensor(const Tensor& param, const Tensor& avg, const Tensor& avg_sq, double step_size) {
    for (const Tensor& t : {param, avg, avg_sq})
        TILESPLAT_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "params and moments must be aligned to ",
                        "16 bytes, as all new tensors are");
    return {data<float>(param), data<float>(avg), data<float>(avg_sq), float(step_size)};
}

void train_step(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
                const Tensor& world_to_camera, const Tensor& K, const Tensor& background, const Tensor& target,
                const OptionalTensor& mask, int64_t sh_degree, bool antialiasing, double lambda_dssim,
                const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                const OptionalTensor& abs_grad_norm_sum, const Tensor& losses, int64_t capacity,
                const OptionalTensor& entries, const OptionalTensor& moved_at, const OptionalTensor& missed) {
    check_train_params(params);
    const OptionalTensor none, sh_dc = params[1], sh_rest = params[2], scales = params[4], quats = params[5];
    const auto [height, width] = check_target_size(target);
    const RasterizeInputs in{params[0],       quats, scales, none,       params[3], sh_dc,  sh_rest,  none,
                             world_to_camera, K,     none,   background, width,     height, sh_degree};
    check_train(in, params, exp_avg, exp_avg_sq, lrs, step, target, mask, grad_norm_sum, visits, abs_grad_norm_sum,
                losses, entries, false);
    TILESPLAT_CHECK(!entries || entries->is_pinned(), "entries must be in pinned memory");
    const Device device(params[0]);
    const cuda::TileGrid grid{int(width), int(height)};
    const Gaussians<float> g = gaussians(in, 1.0, antialiasing, true);
    const View<float> v = view(in);

    const double bias1 = 1.0 - std::pow(beta1, double(step)), bias2 = 1.0 - std::pow(beta2, double(step));
    const auto trained = [&](int i) { return trained_tensor(params[i], exp_avg[i], exp_avg_sq[i], lrs[i] / bias1); };
    const cuda::Waiting waiting = waiting_in(g.count, params[0], moved_at, missed);
    if (waiting.moved_at)
        cuda::catch_up({g.count,
                        g.rest_count,
                        trained(0),
                        trained(1),
                        trained(2),
                        trained(3),
                        trained(4),
                        trained(5),
                        float(eps * std::sqrt(bias2)),
                        waiting,
                        int(step - 1),
                        false,
                        {v},
                        1},
                       device.stream);

    std::optional<Counted> counted;  // without a capacity, wait for the number of entries
    if (capacity <= 0) counted.emplace(device.stream);
    Projected projected(device, g.count, grid, counted ? counted->place() : data<int64_t>(entries),
                        [&](const cuda::Screen& s) { cuda::preprocess(g, v, s, device.stream); });
    if (counted) counted->enqueued();
    Tensor order = depth_order(device, projected);
    const int64_t room = counted ? counted->wait() : g.count ? std::min(capacity, cuda::kMaxEntries) : 0;
    if (counted && entries) *data<int64_t>(entries) = room;
    const TileLists lists(device, grid, projected, order, room, deterministic());
    Listed listed = {g.count,
                     room,
                     projected.screen.splats,
                     data<uint32_t>(lists.ids),
                     data<uint32_t>(projected.ranges),
                     projected.screen.totals,
                     {}};
    if (lists.pairs.defined()) listed.order = in_order(lists.pairs, lists.offsets, order, Tensor());
    const Compared found =
        compared(device, grid, listed, background, target, mask, lambda_dssim, abs_grad_norm_sum.has_value());
    const cuda::LossSums sums = {data<float>(found.partial_ssim), data<float>(found.partial_l1), found.blocks,
                                 found.count, float(lambda_dssim)};
    cuda::preprocess_backward_adam({g,
                                    v,
                                    projected.screen.radii,
                                    projected.screen.splats,
                                    data<float>(found.splat_grads),
                                    trained(0),
                                    trained(1),
                                    trained(2),
                                    trained(3),
                                    trained(4),
                                    trained(5),
                                    adam_rates(beta1, beta2, eps, bias2),
                                    float(beta1),
                                    waiting,
                                    int(step),
                                    data<float>(grad_norm_sum),
                                    data<float>(visits),
                                    data<float>(abs_grad_norm_sum),
                                    projected.screen.totals,
                                    room,
                                    sums,
                                    data<float>(losses)},
                                   device.stream);
}

// Rows that wait, which are to be up to date with the step. With or without colors: see check_waiting_params.
cuda::CatchUp behind(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq, double beta2, double eps,
                     int64_t step, const Tensor& moved_at, const Tensor& missed) {
    check_waiting_params(params);
    check_adam(params, params, exp_avg, exp_avg_sq, std::vector<double>(params.size(), 0.0), std::nullopt, false);
    TILESPLAT_CHECK(step >= 0 && step <= INT32_MAX, "step must be at least 0, got ", step);
    const auto trained = [&](size_t i) { return trained_tensor(params[i], exp_avg[i], exp_avg_sq[i], 0.0); };
    const size_t colors = params.size() - 4;
    cuda::CatchUp rows{};
    rows.count = params[0].size(0);
    rows.means = trained(0);
    if (colors) rows.sh_dc = trained(1), rows.sh_rest = trained(2), rows.rest_count = int(params[2].size(1));
    rows.opacities = trained(colors + 1), rows.scales = trained(colors + 2), rows.quats = trained(colors + 3);
    rows.eps = float(eps * std::sqrt(1.0 - std::pow(beta2, double(step))));
    rows.waiting = waiting_in(rows.count, params[0], moved_at, missed);
    rows.step = int(step);
    return rows;
}

void settle(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq, double beta2, double eps,
            int64_t step, const Tensor& moved_at, const Tensor& missed) {
    cuda::CatchUp rows = behind(params, exp_avg, exp_avg_sq, beta2, eps, step, moved_at, missed);
    rows.all = true;
    cuda::catch_up(rows, Device(params[0]).stream);
}

Tensor near_rows(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq, double beta2, double eps,
                 int64_t step, const Tensor& moved_at, const Tensor& missed, const Tensor& world_to_camera,
                 const Tensor& K, int64_t width, int64_t height) {
    cuda::CatchUp rows = behind(params, exp_avg, exp_avg_sq, beta2, eps, step, moved_at, missed);
    check_tensor(world_to_camera, "world_to_camera", {4, 4}, at::kFloat, params[0].device());
    check_tensor(K, "K", {3, 3}, at::kFloat, params[0].device());
    check_size(width, height);
    const Device device(params[0]);
    const Tensor mask = device.empty({rows.count}, at::kBool);
    rows.views[0] = {
        data<float>(world_to_camera), data<float>(K), nullptr, nullptr, int(width), int(height), float(kNearDepth)};
    rows.cameras = 1, rows.may_show = data<bool>(mask);
    cuda::catch_up(rows, device.stream);
    return mask;
}

}  // namespace

cuda::AdamRates adam_rates(double beta1, double beta2, double eps, double bias2) {
    return {float(beta2), float(eps), float(1.0 - beta1), float(1.0 - beta2), float(1.0 / std::sqrt(bias2))};
}

namespace {

constexpr int64_t kSparedBytes = 1 << 27;  // of a trace; less is not worth a second call

// What blend_forward leaves, in as little memory as it takes if `sparing`.
struct Traced {
    Tensor memory, passed;
    cuda::Trace trace;
    std::optional<Counted> segments;

    Traced(const Device& device, const cuda::BlendForward& call, int64_t entries, bool sparing) {
        sparing = sparing && int64_t(cuda::passed_bytes(entries / cuda::kSegment)) > kSparedBytes;
        memory =
            device.bytes(sparing ? cuda::walk_bytes(call.grid, entries) : cuda::trace_bytes(call.grid, entries, false));
        trace = sparing ? cuda::walk_in(memory.data_ptr(), call.grid, entries)
                        : cuda::trace_in(memory.data_ptr(), call.grid, entries, false);
        blend(call, trace, device);
        if (!sparing) return;
        segments.emplace(device.stream);
        C10_CUDA_CHECK(cudaMemcpyAsync(segments->place(), &call.totals->segments, sizeof(int64_t),
                                       cudaMemcpyDeviceToHost, device.stream));
        segments->enqueued();
    }

    // The host waits for the first call; what has been enqueued since runs meanwhile.
    void complete(const Device& device, const cuda::BlendForward& call) {
        if (!segments) return;
        passed = device.bytes(cuda::passed_bytes(segments->wait()));
        trace.passed = passed.data_ptr();
        cuda::Trace only_passed{};
        only_passed.passed = trace.passed, only_passed.first = trace.first;
        blend(call, only_passed, device);
    }

    static void blend(cuda::BlendForward call, const cuda::Trace& trace, const Device& device) {
        call.trace = trace;
        cuda::blend_forward(call, device.stream);
    }
};

}  // namespace

Compared compared(const Device& device, const cuda::TileGrid& grid, const Listed& listed, const Tensor& background,
                  const Tensor& target, const OptionalTensor& mask, double lambda_dssim, bool absolute, bool sparing) {
    const int64_t entries = listed.entries;
    const Tensor image = device.empty({3, grid.height, grid.width}), g_image = at::empty_like(image);
    const cuda::BlendForward blended = {
        grid,    listed.splats, listed.ids, listed.ranges, data<float>(background), data<float>(image),
        nullptr, nullptr,       {},         listed.totals};
    Traced traced(device, blended, entries, sparing);
    const SsimCall loss = photometric(device, image, target, mask, lambda_dssim, g_image);
    traced.complete(device, blended);

    const Tensor splat_grads = device.zeros({listed.count, cuda::kGradSize});
    cuda::BlendBackward blend = {grid,
                                 listed.splats,
                                 listed.ids,
                                 listed.ranges,
                                 entries,
                                 traced.trace,
                                 listed.totals,
                                 data<float>(background),
                                 data<float>(image),
                                 nullptr,
                                 data<float>(g_image),
                                 nullptr,
                                 nullptr,
                                 absolute,
                                 data<float>(splat_grads)};
    blend.ordered = listed.order;
    const bool ordered = listed.order.pairs;
    const Tensor records = ordered ? device.zeros({entries, cuda::kRecords, cuda::kGradSize}) : Tensor();
    if (ordered) blend.ordered.records = data<float>(records);
    cuda::blend_backward(blend, device.stream);
    return {loss.partial_ssim, loss.partial_l1, loss.blocks, loss.count, splat_grads};
}

}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    m.impl("rasterize", gs::rasterize_op<gs::rasterize, false>);
    m.impl("rasterize_backward", gs::rasterize_backward_op<gs::rasterize_backward, false>);
    m.impl("mark_visible", gs::mark_visible);
    m.impl("ssim", gs::ssim);
    m.impl("ssim_backward", gs::ssim_backward);
    m.impl("photometric_loss", gs::photometric_loss);
    m.impl("adam_step", gs::adam_step);
    m.impl("knn_mean_dist2", gs::knn_mean_dist2);
    m.impl("train_step", gs::train_step);
    m.impl("settle", gs::settle);
    m.impl("near_rows", gs::near_rows);
}
