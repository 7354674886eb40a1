// ops_cpu.cpp: the operators of ops.cpp for tensors on the CPU.
//
// Here tensors become pointers and memory is laid out; the work is in cpu/, whose stages.h is its table of contents. Results
// and what the backward wants again live in blocks that return to a pool (cpu/memory.h) with their tensor.
#include "ops_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "common/constants.h"
#include "cpu/clock.h"
#include "cpu/threads.h"

namespace gs::cpu {

int thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Every thread begins with a share of its own, the same one in every stage, and finds in its caches what it left there; then
// it helps the others, since tasks differ tenfold in cost.
void run_tasks(int64_t count, void (*body)(void*, int64_t), void* context) {
    const int64_t threads = std::min<int64_t>(thread_count(), count);
    if (threads <= 1) {
        for (int64_t task = 0; task < count; ++task) body(context, task);
        return;
    }
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares(threads);
    for (int64_t i = 0; i < threads; ++i)
        shares[i].next = count * i / threads, shares[i].end = count * (i + 1) / threads;
    at::parallel_for(0, threads, 1, [&](int64_t self, int64_t) {
        for (int64_t i = 0; i < threads; ++i) {
            Share& share = shares[(self + i) % threads];
            for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                body(context, task);
        }
    });
}

}  // namespace gs::cpu

namespace gs {

// Whether every index in a state leads into the state: whoever kept it may have written to it.
template <typename T>
bool within_bounds(const cpu::Frame<T>& f, int64_t entries) {
    const auto below = [](int64_t value, int64_t limit) { return uint64_t(value) < uint64_t(limit); };
    bool tiles = f.tile_begin[0] == 0 && f.tile_begin[f.tiles()] == entries;
    for (int64_t t = 0; t < f.tiles(); ++t)
        tiles &= f.tile_begin[t] <= f.tile_begin[t + 1] && below(f.tile_order[t], f.tiles());
    std::atomic<bool> all{tiles};
    constexpr int64_t kTask = 1 << 14;
    cpu::parallel((entries + kTask - 1) / kTask, [&](int64_t task) {
        bool good = true;
        for (int64_t i = task * kTask; i < std::min(entries, (task + 1) * kTask); ++i)
            good &= below(f.entries[i].splat, f.count) & below(f.entries[i].slot, entries);
        if (!good) all = false;
    });
    cpu::parallel(f.chunks(), [&](int64_t chunk) {
        const int64_t first = chunk * cpu::kChunk, rows = std::min<int64_t>(cpu::kChunk, f.count - first);
        const int32_t* visible = f.visible + first;
        bool good = below(f.visible_count[chunk], rows + 1);
        for (int32_t i = 0; good && i < f.visible_count[chunk]; ++i) {
            good = below(visible[i] - first, rows);
            if (good) good = f.slots[visible[i]].begin <= f.slots[visible[i]].end && f.slots[visible[i]].end <= entries;
        }
        if (!good) all = false;
    });
    return all;
}

template bool within_bounds(const cpu::Frame<float>&, int64_t);
template bool within_bounds(const cpu::Frame<double>&, int64_t);

namespace {

using gs::cpu::Frame;

// The order of the tensors in `state`.
enum State {
    kSplats,
    kVisible,
    kVisibleCount,
    kSlots,
    kTileBegin,
    kTileOrder,
    kTransmittance,
    kLast,
    kEntries,
    kTouched,
    kStateCount
};

template <typename T>
Frame<T> frame_of(const RasterizeInputs& in, const std::vector<Tensor>& state) {
    const auto at = [&](State i) -> void* { return const_cast<void*>(state[i].const_data_ptr()); };
    Frame<T> f;
    f.count = in.count();
    f.width = int(in.width), f.height = int(in.height);
    f.tiles_x = (f.width + gs::kTileSize - 1) / gs::kTileSize,
    f.tiles_y = (f.height + gs::kTileSize - 1) / gs::kTileSize;
    f.splats = static_cast<gs::cpu::Splat<T>*>(at(kSplats));
    f.visible = static_cast<int32_t*>(at(kVisible));
    f.visible_count = static_cast<int32_t*>(at(kVisibleCount));
    f.slots = static_cast<gs::cpu::SlotRange*>(at(kSlots));
    f.tile_begin = static_cast<int64_t*>(at(kTileBegin));
    f.tile_order = static_cast<int32_t*>(at(kTileOrder));
    f.transmittance = static_cast<T*>(at(kTransmittance));
    f.last = static_cast<int32_t*>(at(kLast));
    f.entries = static_cast<gs::cpu::Entry*>(at(kEntries));
    f.touched = static_cast<uint16_t*>(at(kTouched));
    return f;
}

StateLayout state_layout(const RasterizeInputs& in, int64_t entries) {
    const at::ScalarType number = in.means.scalar_type();
    const int64_t N = in.count(), chunks = (N + gs::cpu::kChunk - 1) / gs::cpu::kChunk;
    const int64_t tiles = ((in.width + 15) / 16) * ((in.height + 15) / 16);
    StateLayout layout(kStateCount);
    layout[kSplats] = {{N, 16}, number};
    layout[kVisible] = {{N}, at::kInt};
    layout[kVisibleCount] = {{chunks}, at::kInt};
    layout[kSlots] = {{N, 2}, at::kInt};
    layout[kTileBegin] = {{tiles + 1}, at::kLong};
    layout[kTileOrder] = {{tiles}, at::kInt};
    layout[kTransmittance] = {{tiles, 256}, number};
    layout[kLast] = {{tiles, 256}, at::kInt};
    layout[kEntries] = {{entries, 2}, at::kInt};
    layout[kTouched] = {{entries}, at::kShort};
    return layout;
}

std::vector<Tensor> new_state(const RasterizeInputs& in) {
    std::vector<Tensor> state;
    for (const auto& [shape, dtype] : state_layout(in, 0)) state.push_back(pooled(shape, dtype));
    return state;
}

// Project, bin, blend. Entries get their memory as soon as their number is known.
template <typename T>
void render(const gs::Gaussians<T>& g, const gs::View<T>& v, Frame<T>& f, std::vector<Tensor>& state,
            const gs::Image<T>& out) {
    const auto& kernels = cpu::kernels<T>();
    cpu::Buffer key_block(g.count * sizeof(cpu::DepthKey<T>));
    cpu::DepthKey<T>* keys = key_block.as<cpu::DepthKey<T>>();
    {
        cpu::Clock clock(cpu::Stage::project);
        kernels.project(g, v, f, out.radii, keys);
    }
    const auto allocate = [](void* context, Frame<T>& frame, int64_t entries) {
        std::vector<Tensor>& tensors = *static_cast<std::vector<Tensor>*>(context);
        tensors[kEntries] = pooled({entries, 2}, at::kInt);
        tensors[kTouched] = pooled({entries}, at::kShort);
        frame.entries = static_cast<cpu::Entry*>(tensors[kEntries].mutable_data_ptr());
        frame.touched = static_cast<uint16_t*>(tensors[kTouched].mutable_data_ptr());
    };
    cpu::bin<T>(kernels, f, keys, allocate, &state);
    cpu::Clock clock(cpu::Stage::blend);
    kernels.blend(f, v.background, out);
}

template <typename T>
Rasterized rasterize_as(const RasterizeCall& call) {
    const RasterizeInputs& in = call.in;
    const gs::Gaussians<T> g = gaussians<T>(in, call.scale_modifier, call.antialiasing, call.raw);
    const gs::View<T> v = view<T>(in, call.near_depth);
    const at::ScalarType number = in.means.scalar_type();
    const int64_t N = in.count(), H = in.height, W = in.width;

    Tensor color = pooled({3, H, W}, number), alpha = pooled({1, H, W}, number), inv_depth = pooled({1, H, W}, number);
    Tensor radii = pooled({N}, at::kInt);
    std::vector<Tensor> state = new_state(in);
    Frame<T> f = frame_of<T>(in, state);

    render(g, v, f, state, {data<T>(color), data<T>(alpha), data<T>(inv_depth), data<int32_t>(radii)});
    return {color, alpha, inv_depth, radii, state};
}

Rasterized rasterize_one(const RasterizeCall& call) {
    return call.in.means.scalar_type() == at::kDouble ? rasterize_as<double>(call) : rasterize_as<float>(call);
}

// Several views follow each other: one keeps the machine busy.
RasterizeInputs with_camera(const RasterizeInputs& in, const Tensor& world_to_camera) {
    return {in.means,        in.quats, in.scales,        in.cov3d,      in.opacities, in.sh_dc,  in.sh_rest,  in.colors,
            world_to_camera, in.K,     in.camera_center, in.background, in.width,     in.height, in.sh_degree};
}

Rasterized rasterize(const RasterizeCall& call) {
    if (!call.in.several()) return rasterize_one(call);
    std::vector<Tensor> images, alphas, inv_depths, radii, states;
    for (const Tensor& camera : call.in.world_to_camera.unbind()) {
        auto [image, alpha, inv_depth, own_radii, state] =
            rasterize_one({with_camera(call.in, camera), call.scale_modifier, call.antialiasing, call.raw, call.keep,
                           call.near_depth});
        images.push_back(image), alphas.push_back(alpha), inv_depths.push_back(inv_depth), radii.push_back(own_radii);
        states.insert(states.end(), state.begin(), state.end());
    }
    return {at::stack(images), at::stack(alphas), at::stack(inv_depths), at::stack(radii), states};
}

// The order of the tensors that rasterize_backward returns.
enum Grads {
    kMeans,
    kQuats,
    kScales,
    kCov3d,
    kOpacities,
    kShDc,
    kShRest,
    kColors,
    kWorldToCamera,
    kBackground,
    kMeans2d,
    kGradsCount
};

template <typename T>
std::vector<Tensor> backward_as(const BackwardCall& call) {
    const auto& [in, state, wanted] = std::tie(call.in, call.state, call.wanted);
    const gs::ImageGrads<T> image_grads = {data<T>(call.grad_image), data<T>(call.grad_alpha),
                                           data<T>(call.grad_inv_depth)};
    const cpu::Statistics statistics = {data<float>(call.grad_norm_sum), data<float>(call.visits),
                                        data<float>(call.abs_grad_norm_sum)};
    const gs::Gaussians<T> g = gaussians<T>(in, call.scale_modifier, call.antialiasing, call.raw);
    const gs::View<T> v = view<T>(in);
    const auto& kernels = cpu::kernels<T>();
    const Frame<T> f = frame_of<T>(in, state);
    const at::ScalarType number = in.means.scalar_type();
    TILESPLAT_CHECK(within_bounds(f, state[kEntries].size(0)),
                    "state must be what rasterize returned for these inputs, but its numbers have been altered");

    std::vector<Tensor> grads(kGradsCount);
    const auto like = [&](const OptionalTensor& input) {
        return pooled(input ? input->sizes() : at::IntArrayRef{0}, number);
    };
    grads[kMeans] = like(in.means);
    grads[kQuats] = like(in.quats);
    grads[kScales] = like(in.scales);
    grads[kCov3d] = like(in.cov3d);
    grads[kOpacities] = like(in.opacities);
    grads[kShDc] = like(in.sh_dc);
    grads[kShRest] = like(in.sh_rest);
    grads[kColors] = like(in.colors);
    const auto if_wanted = [&](Grads i, at::IntArrayRef shape) {
        return pooled(wanted[i] ? shape : at::IntArrayRef{0}, number);
    };
    grads[kWorldToCamera] = if_wanted(kWorldToCamera, {4, 4});
    grads[kBackground] = if_wanted(kBackground, {3});
    grads[kMeans2d] = if_wanted(kMeans2d, {in.count(), 3});
    const auto at = [&](Grads i) -> T* { return grads[i].numel() ? data<T>(grads[i]) : nullptr; };
    gs::GaussianGrads<T> out = {};
    out.means = at(kMeans), out.quats = at(kQuats), out.scales = at(kScales), out.cov3d = at(kCov3d);
    out.opacities = at(kOpacities), out.sh_dc = at(kShDc), out.sh_rest = at(kShRest), out.colors = at(kColors);
    out.world_to_camera = at(kWorldToCamera), out.background = at(kBackground), out.means2d = at(kMeans2d);

    cpu::Buffer records(state[kEntries].size(0) * cpu::kRecord * sizeof(T));
    {
        cpu::Clock clock(cpu::Stage::blend_backward);
        kernels.blend_backward(f, v.background, image_grads, statistics.abs_grad_norm_sum != nullptr, records.as<T>(),
                               out.background);
    }
    cpu::Clock clock(cpu::Stage::project_backward);
    kernels.project_backward(g, v, f, records.as<T>(), image_grads.inv_depth != nullptr, out, statistics);
    return grads;
}

std::vector<Tensor> backward_one(const BackwardCall& call) {
    const Tensor& means = call.in.means;
    check_state(call.state, state_layout(call.in, state_rows(call.state, kEntries)), means.device());
    return means.scalar_type() == at::kDouble ? backward_as<double>(call) : backward_as<float>(call);
}

// Of one view of several.
std::vector<Tensor> backward_of(const BackwardCall& call, int64_t view) {
    const auto own = [view](const OptionalTensor& all) { return all ? OptionalTensor((*all)[view]) : all; };
    const Tensor camera = call.in.world_to_camera[view], radii = call.radii[view], grad_image = call.grad_image[view];
    const OptionalTensor grad_alpha = own(call.grad_alpha), grad_inv_depth = own(call.grad_inv_depth);
    const auto first = call.state.begin() + view * kStateCount;
    const std::vector<Tensor> state(first, first + kStateCount);
    return backward_one({with_camera(call.in, camera), call.scale_modifier, call.antialiasing, call.raw, radii, state,
                         grad_image, grad_alpha, grad_inv_depth, call.wanted, call.grad_norm_sum, call.visits,
                         call.abs_grad_norm_sum});
}

std::vector<Tensor> rasterize_backward(const BackwardCall& call) {
    if (!call.in.several()) return backward_one(call);
    const int64_t views = call.in.views();
    TILESPLAT_CHECK(int64_t(call.state.size()) == views * kStateCount,
                    "state must be what the forward returned on cpu: ", views * kStateCount, " tensors, got ",
                    call.state.size());
    std::vector<Tensor> total, cameras(views);
    for (int64_t view = views - 1; view >= 0; --view) {
        std::vector<Tensor> grads = backward_of(call, view);
        cameras[view] = grads[kWorldToCamera];
        for (size_t i = 0; i < total.size(); ++i)
            if (i != kWorldToCamera) total[i].add_(grads[i]);
        if (total.empty()) total = std::move(grads);
    }
    if (call.wanted[kWorldToCamera]) total[kWorldToCamera] = at::stack(cameras);
    return total;
}

Tensor mark_visible(const Tensor& means, const Tensor& world_to_camera, double near_depth) {
    check_points(means, "means", true);
    check_near(near_depth);
    CHECK_TENSOR(world_to_camera, means, 4, 4);
    Tensor out = at::empty({means.size(0)}, at::TensorOptions().dtype(at::kBool));
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        cpu::mark_visible(data<T>(means), means.size(0), data<T>(world_to_camera), T(near_depth),
                          out.mutable_data_ptr<bool>());
    };
    means.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
    return out;
}

Tensor knn_mean_dist2(const Tensor& points) {
    check_points(points, "points", true);
    Tensor out = at::empty({points.size(0)}, points.options());
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        cpu::knn_mean_dist2(data<T>(points), points.size(0), data<T>(out));
    };
    points.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
    return out;
}

Tensor scalar(double value, at::ScalarType dtype) { return at::full({}, value, at::TensorOptions().dtype(dtype)); }

// `state` is the gradient of the value for a, computed along with it.
std::tuple<Tensor, std::vector<Tensor>> ssim(const Tensor& a, const Tensor& b, bool valid, bool train) {
    check_ssim(a, b, valid, true);
    std::vector<Tensor> state;
    if (train) state.push_back(pooled(a.sizes(), a.scalar_type()));
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        cpu::Ssim<T> s = {data<T>(a),
                          data<T>(b),
                          a.size(0) * a.size(1),
                          int(a.size(3)),
                          int(a.size(2)),
                          valid,
                          train ? data<T>(state[0]) : nullptr,
                          0};
        cpu::kernels<T>().ssim(s);
        return s.mean;
    };
    const double mean = a.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
    return {scalar(mean, a.scalar_type()), state};
}

Tensor ssim_backward(const Tensor& a, const Tensor& b, bool valid, const std::vector<Tensor>& state,
                     const Tensor& grad) {
    check_ssim(a, b, valid, true);
    check_state(state, {{a.sizes().vec(), a.scalar_type()}}, a.device());
    check_ssim_grad(grad, a);
    return at::mul(state[0], grad);
}

std::tuple<Tensor, Tensor, Tensor> photometric_loss(const Tensor& image, const Tensor& target,
                                                    const OptionalTensor& mask, double lambda_dssim) {
    check_photometric(image, target, mask, true);
    Tensor grad = pooled(image.sizes(), image.scalar_type());
    const bool bytes = target.scalar_type() == at::kByte;
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        cpu::Photometric<T> l = {data<T>(image),
                                 bytes ? nullptr : data<T>(target),
                                 bytes ? data<uint8_t>(target) : nullptr,
                                 data<T>(mask),
                                 int(image.size(2)),
                                 int(image.size(1)),
                                 lambda_dssim,
                                 data<T>(grad),
                                 0,
                                 0};
        cpu::Clock clock(cpu::Stage::loss);
        cpu::kernels<T>().photometric(l);
        return std::pair<double, double>{l.loss, l.l1};
    };
    const auto [loss, l1] = image.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
    return {scalar(loss, image.scalar_type()), scalar(l1, image.scalar_type()), grad};
}

// Calls body(begin, end) for every run of true values.
template <typename Body>
void for_each_run(const bool* flags, int64_t begin, int64_t end, Body body) {
    for (int64_t i = begin; i < end;) {
        if (!flags[i]) {
            ++i;
            continue;
        }
        int64_t stop = i + 1;
        while (stop < end && flags[stop]) ++stop;
        body(i, stop);
        i = stop;
    }
}

void adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
               const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
               const OptionalTensor& visible) {
    check_adam(params, grads, exp_avg, exp_avg_sq, lrs, visible, true);
    TILESPLAT_CHECK(step >= 1, "step must be at least 1, got ", step);
    cpu::Clock clock(cpu::Stage::adam);
    const bool* rows_wanted = visible ? visible->const_data_ptr<bool>() : nullptr;
    for (size_t i = 0; i < params.size(); ++i) {
        if (params[i].numel() == 0) continue;
        cpu::AdamRates rates = {lrs[i], beta1, beta2, eps, 1, 1};
        if (!visible) rates.correction1 = 1 - std::pow(beta1, step), rates.correction2 = 1 - std::pow(beta2, step);
        const int64_t rows = visible ? visible->size(0) : params[i].numel(), columns = params[i].numel() / rows;
        const int64_t per_task = std::max<int64_t>(1, 32768 / columns);
        const auto run = [&](auto zero) {
            using T = decltype(zero);
            const auto& kernels = cpu::kernels<T>();
            T *p = data<T>(params[i]), *g = data<T>(grads[i]), *m = data<T>(exp_avg[i]), *v = data<T>(exp_avg_sq[i]);
            cpu::parallel((rows + per_task - 1) / per_task, [&](int64_t task) {
                const auto move = [&](int64_t from, int64_t to) {
                    const int64_t at = from * columns;
                    kernels.adam(p + at, g + at, m + at, v + at, (to - from) * columns, rates);
                };
                const int64_t begin = task * per_task, end = std::min(rows, begin + per_task);
                if (rows_wanted)
                    for_each_run(rows_wanted, begin, end, move);
                else
                    move(begin, end);
            });
        };
        params[i].scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
    }
}

// The fused iteration: the same stages on the same numbers as rasterize, photometric_loss, their backward and adam_step.
template <typename T>
void train_as(const RasterizeInputs& in, bool antialiasing, const Tensor& target, const OptionalTensor& mask,
              double lambda, const cpu::Trained<T>& trained, const cpu::Statistics& statistics, const Tensor& losses) {
    const gs::Gaussians<T> g = gaussians<T>(in, 1.0, antialiasing, true);
    const gs::View<T> v = view<T>(in);
    const auto& kernels = cpu::kernels<T>();
    std::vector<Tensor> state = new_state(in);
    Frame<T> f = frame_of<T>(in, state);
    const int64_t pixels = in.width * in.height;
    cpu::Buffer image(3 * pixels * sizeof(T)), radii(g.count * sizeof(int32_t)), grad(3 * pixels * sizeof(T));
    T* color = image.as<T>();
    render(g, v, f, state, {color, nullptr, nullptr, radii.as<int32_t>()});

    const bool bytes = target.scalar_type() == at::kByte;
    cpu::Photometric<T> l = {color,
                             bytes ? nullptr : data<T>(target),
                             bytes ? data<uint8_t>(target) : nullptr,
                             data<T>(mask),
                             f.width,
                             f.height,
                             lambda,
                             grad.as<T>(),
                             0,
                             0};
    {
        cpu::Clock clock(cpu::Stage::loss);
        kernels.photometric(l);
    }
    cpu::Buffer records(state[kEntries].size(0) * cpu::kRecord * sizeof(T));
    {
        cpu::Clock clock(cpu::Stage::blend_backward);
        kernels.blend_backward(f, v.background, {grad.as<T>(), nullptr, nullptr},
                               statistics.abs_grad_norm_sum != nullptr, records.as<T>(), nullptr);
    }
    cpu::Clock clock(cpu::Stage::project_backward);
    kernels.project_backward_and_step(g, v, f, records.as<T>(), trained, statistics);
    float* sums = losses.mutable_data_ptr<float>();
    sums[0] += float(l.loss), sums[1] += float(l.l1), sums[2] += 1;
}

void train_step(at::TensorList params, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                const std::vector<double>& lrs, double beta1, double beta2, double eps, int64_t step,
                const Tensor& world_to_camera, const Tensor& K, const Tensor& background, const Tensor& target,
                const OptionalTensor& mask, int64_t sh_degree, bool antialiasing, double lambda_dssim,
                const OptionalTensor& grad_norm_sum, const OptionalTensor& visits,
                const OptionalTensor& abs_grad_norm_sum, const Tensor& losses, int64_t, const OptionalTensor& entries,
                const OptionalTensor&, const OptionalTensor&) {
    check_train_params(params);
    const OptionalTensor none, sh_dc = params[1], sh_rest = params[2], scales = params[4], quats = params[5];
    const auto [height, width] = check_target_size(target);
    const RasterizeInputs in{params[0],       quats, scales, none,       params[3], sh_dc,  sh_rest,  none,
                             world_to_camera, K,     none,   background, width,     height, sh_degree};
    check_train(in, params, exp_avg, exp_avg_sq, lrs, step, target, mask, grad_norm_sum, visits, abs_grad_norm_sum,
                losses, entries, true);
    const Tensor& means = params[0];

    const cpu::Statistics statistics = {data<float>(grad_norm_sum), data<float>(visits),
                                        data<float>(abs_grad_norm_sum)};
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        cpu::Trained<T> trained;
        for (int i = 0; i < cpu::kTrained; ++i) {
            trained.param[i] = data<T>(params[i]);
            trained.avg[i] = data<T>(exp_avg[i]), trained.avg_sq[i] = data<T>(exp_avg_sq[i]);
            trained.rates[i] = {lrs[i], beta1, beta2, eps, 1 - std::pow(beta1, step), 1 - std::pow(beta2, step)};
        }
        train_as<T>(in, antialiasing, target, mask, lambda_dssim, trained, statistics, losses);
    };
    means.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

// Milliseconds per stage since the last call: of the clock, and of the calling thread's processor time.
std::tuple<std::vector<std::string>, std::vector<double>, std::vector<double>> cpu_stage_times() {
    std::vector<std::string> names;
    std::vector<double> wall, own;
    for (int i = 0; i < int(cpu::Stage::count); ++i) {
        names.push_back(cpu::kStageNames[i]);
        wall.push_back(1e3 * cpu::stage_times[i].wall), own.push_back(1e3 * cpu::stage_times[i].own);
        cpu::stage_times[i] = {};
    }
    return {names, wall, own};
}

std::vector<std::string> cpu_isas() { return gs::cpu::available_isas(); }
std::string cpu_isa() { return gs::cpu::kernels<float>().name; }
void set_cpu_isa(std::string name) {
    std::string known;
    for (const std::string& isa : cpu_isas()) known += (known.empty() ? "" : ", ") + isa;
    TILESPLAT_CHECK(gs::cpu::set_isa(name), "name must be one of ", known, ", or empty for the best, got ", name);
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CPU, m) {
    m.impl("rasterize", gs::rasterize_op<gs::rasterize, true>);
    m.impl("rasterize_backward", gs::rasterize_backward_op<gs::rasterize_backward, true>);
    m.impl("mark_visible", gs::mark_visible);
    m.impl("ssim", gs::ssim);
    m.impl("ssim_backward", gs::ssim_backward);
    m.impl("photometric_loss", gs::photometric_loss);
    m.impl("adam_step", gs::adam_step);
    m.impl("knn_mean_dist2", gs::knn_mean_dist2);
    m.impl("train_step", gs::train_step);
}

// For benchmarks: names of the stages, milliseconds of each since the last call, and the calling thread's share.
TORCH_LIBRARY_FRAGMENT(tilesplat, m) { m.def("cpu_stage_times() -> (str[], float[], float[])", gs::cpu_stage_times); }

TORCH_LIBRARY_IMPL(tilesplat, CompositeExplicitAutograd, m) {
    m.impl("cpu_isas", gs::cpu_isas);
    m.impl("cpu_isa", gs::cpu_isa);
    m.impl("set_cpu_isa", gs::set_cpu_isa);
}
