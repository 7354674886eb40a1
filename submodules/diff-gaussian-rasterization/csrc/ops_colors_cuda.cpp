// ops_colors_cuda.cpp: the operators of ops_colors.cpp for tensors on a GPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops_colors.h"
#include "ops_cuda.h"

namespace gs {
namespace {

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
    m.impl("pair_colors", gs::pair_colors_op<gs::pair_colors, false>);
    m.impl("pair_colors_backward", gs::pair_colors_backward_op<gs::pair_colors_backward, false>);
}
