// Adam for many tensors in one launch. CUDA backend.
//
// The step is bound by memory: 16 bytes read and 12 written per value, four values per thread where alignment allows.
#include "device.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerThread = 4;
constexpr int64_t kPerBlock = kThreads * kPerThread;

struct Launch {
    Adam adam;
    int64_t first_block[kMaxAdamTensors + 1];  // blocks of tensor t: first_block[t] .. first_block[t + 1]
};

__device__ __forceinline__ void step(const Adam& a, const AdamTensor& t, float grad, float& m, float& v, float& param) {
    m = fmaf(a.rest1, grad - m, m);
    v = fmaf(a.beta2, v, a.rest2 * grad * grad);
    param -= t.step_size * m / fmaf(sqrtf(v), a.inv_sqrt_bias2, a.eps);
}

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
        step(a, t, g.x, m4.x, v4.x, p4.x);
        step(a, t, g.y, m4.y, v4.y, p4.y);
        step(a, t, g.z, m4.z, v4.z, p4.z);
        step(a, t, g.w, m4.w, v4.w, p4.w);
        *param = p4, *m = m4, *v = v4;
        return;
    }
    for (int64_t i = begin; i < ::min(begin + kPerThread, t.size); ++i) {
        if (a.visible && !a.visible[i / t.row]) continue;
        step(a, t, t.grad[i], t.exp_avg[i], t.exp_avg_sq[i], t.param[i]);
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
