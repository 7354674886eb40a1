// ops_dealt_cuda.cpp: the operators of ops_dealt.cpp.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "ops_cuda.h"
#include "ops_dealt.h"

namespace gs {
namespace {

constexpr int64_t kSplatFloats = sizeof(cuda::Splat) / sizeof(float);
constexpr int64_t kRecordFloats = sizeof(cuda::Record) / sizeof(float);
constexpr int64_t kTotalsCount = sizeof(cuda::Totals) / sizeof(int64_t);

// A process's Gaussians, their moments, and the cameras of a step.
struct Dealt {
    at::TensorList params, exp_avg, exp_avg_sq;
    const std::vector<double>& lrs;
    double beta1, beta2, eps;
    int64_t step;
    at::TensorList world_to_camera, K;
    at::IntArrayRef widths, heights;
    int64_t sh_degree;
    bool antialiasing;

    const Tensor& means() const { return params[0]; }
    int64_t count() const { return means().size(0); }
    int cameras() const { return int(world_to_camera.size()); }
    double bias1() const { return 1.0 - std::pow(beta1, double(step)); }
    double bias2() const { return 1.0 - std::pow(beta2, double(step)); }

    void check() const {
        check_train_params(params);
        check_adam(params, params, exp_avg, exp_avg_sq, lrs, std::nullopt, false);
        for (const at::TensorList tensors : {params, exp_avg, exp_avg_sq})
            for (const Tensor& t : tensors)
                TILESPLAT_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
                                "params and moments must be aligned to 16 bytes, as all new tensors are");
        TILESPLAT_CHECK(step >= 1 && step <= INT32_MAX, "step must be at least 1, got ", step);
        TILESPLAT_CHECK(sh_degree >= 0 && (sh_degree + 1) * (sh_degree + 1) - 1 <= params[2].size(1),
                        "sh_rest has too few coefficients for degree ", sh_degree);
        const size_t C = world_to_camera.size();
        TILESPLAT_CHECK(C >= 1 && C <= size_t(cuda::kMaxCameras), "there must be 1 to ", cuda::kMaxCameras,
                        " cameras, got ", C);
        TILESPLAT_CHECK(K.size() == C && widths.size() == C && heights.size() == C,
                        "K, widths and heights must have an entry for each of ", C, " cameras");
        for (size_t c = 0; c < C; ++c) {
            check_tensor(world_to_camera[c], "world_to_camera", {4, 4}, at::kFloat, means().device());
            check_tensor(K[c], "K", {3, 3}, at::kFloat, means().device());
            check_size(widths[c], heights[c]);
        }
    }

    Gaussians<float> gaussians() const {
        Gaussians<float> g{};
        g.count = count();
        g.means = data<float>(params[0]), g.sh_dc = data<float>(params[1]), g.sh_rest = data<float>(params[2]);
        g.opacities = data<float>(params[3]), g.scales = data<float>(params[4]), g.quats = data<float>(params[5]);
        g.rest_count = int(params[2].size(1)), g.sh_degree = int(sh_degree);
        g.scale_modifier = 1.f, g.antialiasing = antialiasing, g.raw = true;
        return g;
    }

    View<float> view(int c) const {
        return {data<float>(world_to_camera[c]),
                data<float>(K[c]),
                nullptr,
                nullptr,
                int(widths[c]),
                int(heights[c]),
                float(kNearDepth)};
    }

    cuda::Trained trained(int i) const {
        return {data<float>(params[i]), data<float>(exp_avg[i]), data<float>(exp_avg_sq[i]), float(lrs[i] / bias1())};
    }

    cuda::Waiting waiting(const OptionalTensor& moved_at, const OptionalTensor& missed) const {
        TILESPLAT_CHECK(moved_at.has_value() == missed.has_value(), "moved_at and missed must be given together");
        CHECK_TENSOR_DTYPE(moved_at, means(), at::kInt, count());
        CHECK_TENSOR(missed, means(), cuda::kWindow, int64_t(sizeof(cuda::Missed) / sizeof(float)));
        return {data<int32_t>(moved_at), data<cuda::Missed>(missed)};
    }
};

void catch_up(const Dealt& call, const cuda::Waiting& waiting, const Device& device) {
    if (!waiting.moved_at) return;
    cuda::CatchUp rows = {call.count(),
                          int(call.params[2].size(1)),
                          call.trained(0),
                          call.trained(1),
                          call.trained(2),
                          call.trained(3),
                          call.trained(4),
                          call.trained(5),
                          float(call.eps * std::sqrt(call.bias2())),
                          waiting,
                          int(call.step - 1),
                          false,
                          {},
                          call.cameras()};
    for (int c = 0; c < call.cameras(); ++c) rows.views[c] = call.view(c);
    cuda::catch_up(rows, device.stream);
}

// Room for what one camera sees of N Gaussians, in one piece.
struct ScreenRoom {
    Tensor memory;
    cuda::Screen screen{};

    ScreenRoom(const Device& device, int64_t N) {
        const int64_t padded = (N + 3) / 4 * 4;  // all begin at multiples of 16 bytes
        memory = device.bytes(padded * (sizeof(cuda::Splat) + sizeof(cuda::TileSet) + 3 * sizeof(int32_t)));
        screen.splats = data<cuda::Splat>(memory);
        screen.tile_sets = reinterpret_cast<cuda::TileSet*>(screen.splats + padded);
        screen.radii = reinterpret_cast<int32_t*>(screen.tile_sets + padded);
        screen.depth_keys = reinterpret_cast<uint32_t*>(screen.radii + padded);
        screen.indices = screen.depth_keys + padded;
    }
};

std::tuple<Tensor, Tensor, Tensor> dealt_project(at::TensorList params, at::TensorList exp_avg,
                                                 at::TensorList exp_avg_sq, const std::vector<double>& lrs,
                                                 double beta1, double beta2, double eps, int64_t step,
                                                 at::TensorList world_to_camera, at::TensorList K,
                                                 at::IntArrayRef widths, at::IntArrayRef heights, int64_t sh_degree,
                                                 bool antialiasing, int64_t rank, int64_t ranks, int64_t capacity,
                                                 const OptionalTensor& moved_at, const OptionalTensor& missed) {
    const Dealt call = {params, exp_avg,         exp_avg_sq, lrs,    beta1,   beta2,     eps,
                        step,   world_to_camera, K,          widths, heights, sh_degree, antialiasing};
    call.check();
    TILESPLAT_CHECK(rank >= 0 && rank < ranks, "rank must be 0 to ", ranks - 1, ", got ", rank);
    TILESPLAT_CHECK(capacity >= 0 && capacity <= INT32_MAX / 8, "capacity must be 0 to ", INT32_MAX / 8, ", got ",
                    capacity);
    TILESPLAT_CHECK(call.count() * ranks <= INT32_MAX, "there are too many Gaussians: ", call.count() * ranks);
    const cuda::Waiting waiting = call.waiting(moved_at, missed);
    const Device device(call.means());
    const int64_t N = call.count(), C = call.cameras();
    const Tensor records = device.empty({capacity, kRecordFloats});
    const Tensor slots = device.empty({C, N}, at::kInt);
    const Tensor totals = device.empty({C, kTotalsCount}, at::kLong);
    const Tensor published = at::zeros({C, cuda::emit_blocks(N)}, totals.options());
    const ScreenRoom room(device, N);  // of one camera after the other
    catch_up(call, waiting, device);
    for (int c = 0; c < C; ++c) {
        cuda::Screen screen = room.screen;
        screen.totals = data<cuda::Totals>(totals) + c;
        cuda::preprocess(call.gaussians(), call.view(c), screen, device.stream);
        cuda::append(
            {N, screen, data<cuda::Totals>(totals), c, int(rank), int(ranks), capacity, data<cuda::Record>(records),
             data<int32_t>(slots) + c * N, data<uint64_t>(published) + c * cuda::emit_blocks(N)},
            device.stream);
    }
    return {records, slots, totals};
}

cuda::Unpack unpacking(const Tensor& records, at::IntArrayRef counts) {
    TILESPLAT_CHECK(!counts.empty() && counts.size() <= size_t(cuda::kMaxCameras), "counts must be 1 to ",
                    cuda::kMaxCameras, " numbers, got ", counts.size());
    cuda::Unpack call{};
    call.count = records.size(0), call.blocks = int(counts.size());
    for (size_t r = 0; r < counts.size(); ++r) {
        TILESPLAT_CHECK(counts[r] >= 0, "counts must be at least 0, got ", counts[r]);
        call.begin[r + 1] = call.begin[r] + counts[r];
    }
    TILESPLAT_CHECK(call.begin[counts.size()] == call.count, "counts must add up to ", call.count, ", got ",
                    call.begin[counts.size()]);
    call.records = data<cuda::Record>(records);
    return call;
}

// The memory of a tensor that nobody will look into again.
void give_up(const Tensor& tensor) {
    tensor.storage().set_data_ptr_noswap(c10::DataPtr(nullptr, tensor.device()));
    tensor.storage().set_nbytes(0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dealt_lists(const Tensor& records, at::IntArrayRef counts, int64_t width,
                                                       int64_t height) {
    check_tensor(records, "records", {kAny, kRecordFloats}, at::kFloat, records.device());
    check_size(width, height);
    const Device device(records);
    const cuda::TileGrid grid{int(width), int(height)};
    cuda::Unpack unpack = unpacking(records, counts);
    Counted counted(device.stream);
    const auto fill = [&](const cuda::Screen& s) {
        unpack.out = s;
        cuda::unpack(unpack, device.stream);
    };
    Projected projected(device, unpack.count, grid, counted.place(), fill);
    counted.enqueued();
    give_up(records);
    Tensor order = depth_order(device, projected);
    const TileLists lists(device, grid, projected, order, counted.wait(), false);
    return {projected.splats, lists.ids, projected.ranges, projected.totals};
}

Tensor dealt_blend(const Tensor& splats, const Tensor& ids, const Tensor& ranges, const Tensor& totals,
                   const Tensor& background, const Tensor& target, const OptionalTensor& mask, double lambda_dssim,
                   bool absolute, const Tensor& losses) {
    const auto [height, width] = check_target_size(target);
    check_size(width, height);
    const cuda::TileGrid grid{int(width), int(height)};
    check_tensor(splats, "splats", {kAny, kSplatFloats}, at::kFloat, splats.device());
    CHECK_TENSOR_DTYPE(ids, splats, at::kInt, kAny);
    CHECK_TENSOR_DTYPE(ranges, splats, at::kInt, grid.tiles(), 2);
    CHECK_TENSOR_DTYPE(totals, splats, at::kLong, kTotalsCount);
    CHECK_TENSOR(background, splats, 3);
    CHECK_TENSOR_DTYPE(target, splats, target.scalar_type() == at::kByte ? at::kByte : at::kFloat, 3, height, width);
    CHECK_TENSOR(mask, splats, height, width);
    CHECK_TENSOR(losses, splats, 2);
    const Device device(splats);
    const Listed listed = {splats.size(0),
                           ids.numel(),
                           data<cuda::Splat>(splats),
                           data<uint32_t>(ids),
                           data<uint32_t>(ranges),
                           data<cuda::Totals>(totals),
                           {}};
    const Compared found = compared(device, grid, listed, background, target, mask, lambda_dssim, absolute, true);
    cuda::photometric_value(data<float>(found.partial_ssim), data<float>(found.partial_l1), found.blocks, found.count,
                            float(lambda_dssim), data<float>(losses), data<float>(losses) + 1, device.stream);
    return found.splat_grads;
}

void dealt_step(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
                at::TensorList world_to_camera, at::TensorList K, at::IntArrayRef widths, at::IntArrayRef heights,
                int64_t sh_degree, bool antialiasing, const Tensor& slots, const Tensor& grads, double opacity_pull,
                double scale_pull, const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                const OptionalTensor& abs_grad_norm_sum, const OptionalTensor& moved_at, const OptionalTensor& missed) {
    const Dealt call = {params, exp_avg,         exp_avg_sq, lrs,    beta1,   beta2,     eps,
                        step,   world_to_camera, K,          widths, heights, sh_degree, antialiasing};
    call.check();
    const Tensor& means = call.means();
    const int64_t N = call.count(), C = call.cameras();
    CHECK_TENSOR_DTYPE(slots, means, at::kInt, C, N);
    CHECK_TENSOR(grads, means, kAny, cuda::kGradSize);
    for (const OptionalTensor& sum : {grad_norm_sum, visits, abs_grad_norm_sum}) CHECK_TENSOR(sum, means, N);
    const Device device(means);
    cuda::DealtBackwardAdam step_of{};
    step_of.gaussians = call.gaussians();
    for (int c = 0; c < C; ++c) step_of.views[c] = call.view(c);
    step_of.cameras = int(C);
    step_of.slots = data<int32_t>(slots);
    step_of.grads = data<float>(grads);
    step_of.opacity_pull = float(opacity_pull), step_of.scale_pull = float(scale_pull);
    step_of.means = call.trained(0), step_of.sh_dc = call.trained(1), step_of.sh_rest = call.trained(2);
    step_of.opacities = call.trained(3), step_of.scales = call.trained(4), step_of.quats = call.trained(5);
    step_of.rates = adam_rates(beta1, beta2, eps, call.bias2());
    step_of.beta1 = float(beta1);
    step_of.waiting = call.waiting(moved_at, missed);
    step_of.step = int(step);
    step_of.grad_norm_sum = data<float>(grad_norm_sum), step_of.visits = data<float>(visits);
    step_of.abs_grad_norm_sum = data<float>(abs_grad_norm_sum);
    cuda::dealt_backward_adam(step_of, device.stream);
}

cuda::ColorRows color_rows(const Tensor& table, const Tensor& rows, at::TensorList values) {
    check_tensor(table, "table", {kAny, kAny}, at::kFloat, table.device());
    CHECK_TENSOR_DTYPE(rows, table, at::kLong, kAny);
    const int64_t width = table.size(1) / 3, V = rows.size(0);
    TILESPLAT_CHECK(table.size(1) == 3 * width && width >= 3 && width % 3 == 0 && width <= cuda::kMaxWidth,
                    "a row of the table must be three times 3, 12, 27 or 48 numbers, got ", table.size(1));
    TILESPLAT_CHECK(values.size() == 6, "values must be six tensors, got ", values.size());
    cuda::ColorRows call = {V, int(width), data<float>(table), data<int64_t>(rows), {}};
    for (size_t i = 0; i < values.size(); ++i) {
        check_tensor(values[i], "values", {V, i % 2 ? width / 3 - 1 : 1, 3}, at::kFloat, table.device());
        call.values[i] = data<float>(values[i]);
    }
    return call;
}

void fetch_rows(const Tensor& table, const Tensor& rows, const Tensor& moved_at, int64_t first, int64_t now,
                const Tensor& sums, const Tensor& decays, double eps, std::optional<bool> just_moved,
                at::TensorList values) {
    cuda::FetchRows call{};
    call.colors = color_rows(table, rows, values);
    CHECK_TENSOR_DTYPE(moved_at, table, at::kInt, table.size(0));
    CHECK_TENSOR_DTYPE(sums, table, at::kDouble, kAny, 2);
    CHECK_TENSOR_DTYPE(decays, table, at::kDouble, sums.size(0), 2);
    TILESPLAT_CHECK(first >= 0 && now >= 0 && now < sums.size(0), "now must be 0 to ", sums.size(0) - 1, ", got ", now);
    call.moved_at = data<int32_t>(moved_at);
    call.first = int(first), call.now = int(now);
    call.sums = data<double2>(sums), call.decays = data<double2>(decays);
    call.eps = float(eps);
    call.just_moved = just_moved ? int(*just_moved) : -1;
    cuda::fetch_rows(call, Device(table).stream);
}

void store_rows(const Tensor& table, const Tensor& rows, const Tensor& wanted, at::TensorList values) {
    const cuda::ColorRows call = color_rows(table, rows, values);
    CHECK_TENSOR_DTYPE(wanted, table, at::kBool, rows.size(0));
    cuda::store_rows(call, data<bool>(wanted), Device(table).stream);
}

void* pointer(const Tensor& tensor) { return tensor.data_ptr(); }

Tensor pair_colors(const PairColorsCall& call) {
    const Device device(call.means);
    const Tensor colors = device.empty({call.pairs.size(0), 3});
    cuda::pair_colors(pair_colors_of<float>(call, colors, pointer), int(call.sh_degree), device.stream);
    return colors;
}

std::tuple<Tensor, Tensor, Tensor> pair_colors_backward(const PairColorsBackwardCall& call) {
    const PairColorsCall& in = call.forward;
    const Device device(in.means);
    const Tensor means = at::empty_like(in.means), dc = at::empty_like(in.sh_dc);
    const Tensor rest = in.sh_rest ? at::empty_like(*in.sh_rest) : device.empty({0});
    cuda::pair_colors_backward(pair_colors_backward_of<float>(call, means, dc, rest, pointer), int(in.sh_degree),
                               device.stream);
    return {means, dc, rest};
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    m.impl("dealt_project", gs::dealt_project);
    m.impl("dealt_lists", gs::dealt_lists);
    m.impl("dealt_blend", gs::dealt_blend);
    m.impl("dealt_step", gs::dealt_step);
    m.impl("fetch_rows", gs::fetch_rows);
    m.impl("store_rows", gs::store_rows);
    m.impl("pair_colors", gs::pair_colors_op<gs::pair_colors, false>);
    m.impl("pair_colors_backward", gs::pair_colors_backward_op<gs::pair_colors_backward, false>);
}
