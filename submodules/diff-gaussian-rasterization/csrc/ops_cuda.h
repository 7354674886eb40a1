// What the glue files of the CUDA backend share: buffers from PyTorch's allocator, and the way to the lists of tiles.
#pragma once
#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/stages.h"
#include "ops.h"

namespace gs {

// The device of a call, made current while it lasts, and its stream.
struct Device {
    explicit Device(const Tensor& tensor)
        : guard(tensor.device()),
          stream(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()),
          device(tensor.device()) {}

    Tensor empty(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) const {
        return at::empty(shape, at::TensorOptions().dtype(dtype).device(device));
    }
    Tensor zeros(at::IntArrayRef shape) const {
        return at::zeros(shape, at::TensorOptions().dtype(at::kFloat).device(device));
    }
    Tensor bytes(size_t count) const { return empty({int64_t(count)}, at::kByte); }

    c10::cuda::CUDAGuard guard;
    cudaStream_t stream;
    at::Device device;
};

template <typename T>
T* data(const Tensor& tensor) {
    return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <typename T>
T* data(const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? data<T>(*tensor) : nullptr;
}

inline Gaussians<float> gaussians(const RasterizeInputs& in, double scale_modifier, bool antialiasing, bool raw) {
    Gaussians<float> g;
    g.count = in.count();
    g.means = data<float>(in.means);
    g.quats = data<float>(in.quats);
    g.scales = data<float>(in.scales);
    g.cov3d = data<float>(in.cov3d);
    g.opacities = data<float>(in.opacities);
    g.sh_dc = data<float>(in.sh_dc);
    g.sh_rest = data<float>(in.sh_rest);
    g.colors = data<float>(in.colors);
    g.rest_count = int(in.rest());
    g.sh_degree = int(in.sh_degree);
    g.scale_modifier = float(scale_modifier);
    g.antialiasing = antialiasing;
    g.raw = raw;
    return g;
}

inline View<float> view(const RasterizeInputs& in, double near_depth = kNearDepth) {
    return {data<float>(in.world_to_camera),
            data<float>(in.K),
            data<float>(in.camera_center),
            data<float>(in.background),
            int(in.width),
            int(in.height),
            float(near_depth)};
}

// Room for Gaussians as one camera sees them, and the first steps towards the lists of the tiles.
struct Projected {
    Tensor splats, radii, keys, indices, tile_sets, totals, published, ranges;
    cuda::Screen screen;
    int64_t count;

    // Of several views, N is of all together. `fill(screen)` enqueues what fills them. `entries`, in pinned memory, is set as soon as they are counted.
    template <typename Fill>
    Projected(const Device& device, int64_t N, const cuda::TileGrid& grid, int64_t* entries, Fill fill) : count(N) {
        splats = device.empty({count, int64_t(sizeof(cuda::Splat) / sizeof(float))});
        radii = device.empty({count}, at::kInt), keys = device.empty({count}, at::kInt);
        indices = device.empty({count}, at::kInt), totals = device.empty({4}, at::kLong);
        tile_sets = device.bytes(count * sizeof(cuda::TileSet));
        published = device.empty({cuda::emit_blocks(count)}, at::kLong);
        ranges = device.empty({grid.tiles(), 2}, at::kInt);
        screen = {data<cuda::Splat>(splats), data<int32_t>(radii),           data<uint32_t>(keys),
                  data<uint32_t>(indices),   data<cuda::TileSet>(tile_sets), data<cuda::Totals>(totals)};
        fill(screen);
        cuda::begin_lists({count, grid, screen.totals, data<uint64_t>(published), data<uint32_t>(ranges), entries},
                          device.stream);
    }

    // What only emit reads.
    void forget_tiles() {
        tile_sets = keys = indices = published = Tensor();
        screen.tile_sets = nullptr, screen.depth_keys = screen.indices = nullptr;
    }
};

// Indices of the splats, front to back.
inline Tensor depth_order(const Device& device, const Projected& p) {
    const Tensor keys_sorted = device.empty({p.count}, at::kInt), order = device.empty({p.count}, at::kInt);
    const size_t bytes = cuda::key_sort_workspace(p.count);
    const Tensor scratch = device.bytes(bytes);
    cuda::sort_by_key(p.count, p.screen.depth_keys, data<uint32_t>(keys_sorted), p.screen.indices,
                      data<uint32_t>(order), scratch.data_ptr(), bytes, device.stream);
    return order;
}

// torch.use_deterministic_algorithms(True): the backward adds up in a fixed order, at the price of time and memory.
inline bool deterministic() { return at::globalContext().deterministicAlgorithms(); }

// The splats of every tile, front to back. What nobody needs afterwards is given up on the way.
struct TileLists {
    Tensor ids;
    Tensor pairs, offsets;  // to add up in a fixed order, else undefined: see cuda::BlendBackward

    TileLists(const Device& device, const cuda::TileGrid& grid, Projected& p, Tensor& order, int64_t capacity,
              bool ordered) {
        const int64_t id_bytes = int64_t(cuda::tile_id_bytes(grid));
        const Tensor tiles = device.bytes(capacity * id_bytes), unsorted = device.empty({capacity}, at::kInt);
        if (ordered) offsets = device.empty({p.count}, at::kInt);
        cuda::emit({p.count, data<uint32_t>(order), p.screen.tile_sets, p.screen.splats, p.screen.totals, grid,
                    capacity, tiles.data_ptr(), data<uint32_t>(unsorted), ordered ? data<uint32_t>(offsets) : nullptr,
                    p.screen.depth_keys, data<uint64_t>(p.published)},
                   device.stream);
        p.forget_tiles();
        if (!ordered) order = Tensor();
        const size_t bytes = capacity ? cuda::tile_sort_workspace(grid, capacity) : 0;
        const Tensor scratch = device.bytes(bytes), tiles_too = at::empty_like(tiles),
                     values_too = at::empty_like(unsorted);
        const Tensor values = ordered ? at::arange(capacity, unsorted.options()) : unsorted;
        const bool in_too =
            cuda::sort_by_tile({grid, capacity, tiles.data_ptr(), tiles_too.data_ptr(), data<uint32_t>(values),
                                data<uint32_t>(values_too), data<uint32_t>(p.ranges), scratch.data_ptr(), bytes},
                               device.stream);
        const Tensor sorted = in_too ? values_too : values;
        if (ordered) pairs = sorted;
        ids = ordered ? at::index_select(unsorted, 0, sorted) : sorted;
    }
};

inline cuda::Ordered in_order(const Tensor& pairs, const Tensor& offsets, const Tensor& order, const Tensor& records) {
    return {data<uint32_t>(pairs), data<uint32_t>(offsets), data<uint32_t>(order), data<float>(records), order.numel()};
}

// The number of entries. The host waits for it while the GPU goes on with what has been enqueued since.
class Counted {
  public:
    explicit Counted(cudaStream_t stream) : stream_(stream) {
        host_ = at::empty({1}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
        C10_CUDA_CHECK(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
    }
    ~Counted() {
        cudaEventSynchronize(ready_);  // the number must not outlive its place
        cudaEventDestroy(ready_);
    }
    int64_t* place() const { return data<int64_t>(host_); }
    void enqueued() { C10_CUDA_CHECK(cudaEventRecord(ready_, stream_)); }
    int64_t wait() {
        C10_CUDA_CHECK(cudaEventSynchronize(ready_));
        const int64_t entries = *place();
        TORCH_CHECK(entries <= cuda::kMaxEntries, "an image may have at most ", cuda::kMaxEntries,
                    " pairs of tile and splat, got ", entries, ": render it at a smaller size or with fewer Gaussians");
        return entries;
    }

  private:
    Tensor host_;
    cudaStream_t stream_;
    cudaEvent_t ready_;
};

// What Adam does the same to all tensors. bias2 = 1 - beta2^step.
cuda::AdamRates adam_rates(double beta1, double beta2, double eps, double bias2);

// Splats and the lists of their tiles.
struct Listed {
    int64_t count, entries;  // or room for so many entries
    const cuda::Splat* splats;
    const uint32_t *ids, *ranges;
    cuda::Totals* totals;
    cuda::Ordered order;  // without records; nulls: sums are made in any order
};

// A picture against its photo: the loss, as sums of blocks, and the gradients of splats [N, kGradSize]. `absolute`: those
// that --absgrad asks for as well. `sparing`: where that saves much memory, blend twice, and wait for the GPU in between.
struct Compared {
    Tensor partial_ssim, partial_l1;
    int64_t blocks;
    double count;
    Tensor splat_grads;
};
Compared compared(const Device& device, const cuda::TileGrid& grid, const Listed& listed, const Tensor& background,
                  const Tensor& target, const OptionalTensor& mask, double lambda_dssim, bool absolute,
                  bool sparing = false);

}  // namespace gs
