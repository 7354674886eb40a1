// Adam for many tensors in one launch. CUDA backend.
//
// The step is bound by memory: 16 bytes read and 12 written per value, four values per thread where alignment allows.
#include "adam.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerThread = 4;
constexpr int64_t kPerBlock = kThreads * kPerThread;

struct Launch {
    Adam adam;
    int64_t first_block[kMaxAdamTensors + 1];  // blocks of tensor t: first_block[t] .. first_block[t + 1]
};

__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ Launch launch) {
    const Adam& a = launch.adam;
    int tensor = 0;
    while (int64_t(blockIdx.x) >= launch.first_block[tensor + 1]) ++tensor;
    const AdamTensor& t = a.tensors[tensor];
    const int64_t begin = (int64_t(blockIdx.x) - launch.first_block[tensor]) * kPerBlock + threadIdx.x * kPerThread;

    const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                                reinterpret_cast<uintptr_t>(t.exp_avg) | reinterpret_cast<uintptr_t>(t.exp_avg_sq);
    if (!a.visible && addresses % 16 == 0 && begin + kPerThread <= t.size) {
        float4 *param = reinterpret_cast<float4*>(t.param + begin), *m = reinterpret_cast<float4*>(t.exp_avg + begin),
               *v = reinterpret_cast<float4*>(t.exp_avg_sq + begin);
        const float4 g = *reinterpret_cast<const float4*>(t.grad + begin);
        float4 p4 = *param, m4 = *m, v4 = *v;
        adam_four(a.rates, t.step_size, g, m4, v4, p4);
        *param = p4, *m = m4, *v = v4;
        return;
    }
    for (int64_t i = begin; i < ::min(begin + kPerThread, t.size); ++i) {
        if (a.visible && !a.visible[i / t.row]) continue;
        adam_value(a.rates, t.step_size, t.grad[i], t.exp_avg[i], t.exp_avg_sq[i], t.param[i]);
    }
}

}  // namespace

void adam(const Adam& args, Stream stream) {
    Launch launch{args, {}};
    for (int t = 0; t < args.count; ++t)
        launch.first_block[t + 1] = launch.first_block[t] + (args.tensors[t].size + kPerBlock - 1) / kPerBlock;
    const int64_t blocks = launch.first_block[args.count];
    if (blocks == 0) return;
    adam_kernel<<<blocks_for(blocks, 1), kThreads, 0, native(stream)>>>(launch);
    check_launch("adam_kernel");
}

}  // namespace gs::cuda
