// What the glue files of the CPU backend share: tensors become pointers and the structs of common/args.h.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "common/constants.h"
#include "cpu/memory.h"
#include "cpu/stages.h"
#include "ops.h"

namespace gs {

// A tensor whose memory comes from the pool and goes back to it.
inline Tensor pooled(at::IntArrayRef shape, at::ScalarType dtype) {
    int64_t bytes = int64_t(c10::elementSize(dtype));
    for (const int64_t n : shape) bytes *= n;
    if (bytes == 0) return at::empty(shape, at::TensorOptions().dtype(dtype));
    void* block = gs::cpu::acquire(size_t(bytes));
    return at::from_blob(block, shape, [](void* p) { gs::cpu::release(p); }, at::TensorOptions().dtype(dtype));
}

template <typename T>
T* data(const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? const_cast<T*>(tensor->template const_data_ptr<T>()) : nullptr;
}

template <typename T>
gs::Gaussians<T> gaussians(const RasterizeInputs& in, double scale_modifier, bool antialiasing, bool raw) {
    gs::Gaussians<T> g;
    g.count = in.count();
    g.means = data<T>(in.means);
    g.quats = data<T>(in.quats);
    g.scales = data<T>(in.scales);
    g.cov3d = data<T>(in.cov3d);
    g.opacities = data<T>(in.opacities);
    g.sh_dc = data<T>(in.sh_dc);
    g.sh_rest = data<T>(in.sh_rest);
    g.colors = data<T>(in.colors);
    g.rest_count = int(in.rest());
    g.sh_degree = int(in.sh_degree);
    g.scale_modifier = T(scale_modifier);
    g.antialiasing = antialiasing;
    g.raw = raw;
    return g;
}

template <typename T>
gs::View<T> view(const RasterizeInputs& in, double near_depth = gs::kNearDepth) {
    return {data<T>(in.world_to_camera),
            data<T>(in.K),
            data<T>(in.camera_center),
            data<T>(in.background),
            int(in.width),
            int(in.height),
            T(near_depth)};
}

// Whether every index in a state leads into the state: whoever kept it may have written to it.
template <typename T>
bool within_bounds(const cpu::Frame<T>& frame, int64_t entries);

}  // namespace gs
