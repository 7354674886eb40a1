// Colors of pairs of a camera and a Gaussian, CUDA backend: a thread for each pair, and back, one for each Gaussian, so
// that no sum depends on which thread came first.
#include "../common/pair_colors.h"
#include "device.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;

template <int Degree>
__global__ void __launch_bounds__(kThreads) pair_colors_kernel(PairColors<float> p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < p.pairs) pair_color<Degree>(p, i);
}

template <int Degree>
__global__ void __launch_bounds__(kThreads) pair_colors_backward_kernel(PairColorsBackward<float> p) {
    const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (row < p.forward.count) row_colors_vjp<Degree>(p, row);
}

unsigned blocks_for(int64_t count) { return unsigned((count + kThreads - 1) / kThreads); }

// run(degree as a constant)
template <typename Run>
void with_degree(int degree, Run run) {
    if (degree == 0) run(std::integral_constant<int, 0>());
    if (degree == 1) run(std::integral_constant<int, 1>());
    if (degree == 2) run(std::integral_constant<int, 2>());
    if (degree == 3) run(std::integral_constant<int, 3>());
}

}  // namespace

void pair_colors(const PairColors<float>& p, int degree, void* stream) {
    if (p.pairs == 0) return;
    with_degree(degree, [&](auto d) {
        pair_colors_kernel<decltype(d)::value>
            <<<blocks_for(p.pairs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    check_launch("pair_colors_kernel");
}

void pair_colors_backward(const PairColorsBackward<float>& p, int degree, void* stream) {
    if (p.forward.count == 0) return;
    with_degree(degree, [&](auto d) {
        pair_colors_backward_kernel<decltype(d)::value>
            <<<blocks_for(p.forward.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    check_launch("pair_colors_backward_kernel");
}

}  // namespace gs::cuda
