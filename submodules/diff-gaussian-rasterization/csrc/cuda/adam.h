// adam.h: what Adam (Kingma and Ba 2015) does to one number.
#pragma once
#include "device.h"

namespace gs::cuda {

__device__ __forceinline__ void adam_value(const AdamRates& rates, float step_size, float grad, float& m, float& v,
                                           float& param) {
    m = fmaf(rates.rest1, grad - m, m);
    v = fmaf(rates.beta2, v, rates.rest2 * grad * grad);
    param -= step_size * m / fmaf(sqrtf(v), rates.inv_sqrt_bias2, rates.eps);
}

__device__ __forceinline__ void adam_four(const AdamRates& rates, float step_size, float4 grad, float4& m, float4& v,
                                          float4& param) {
    adam_value(rates, step_size, grad.x, m.x, v.x, param.x);
    adam_value(rates, step_size, grad.y, m.y, v.y, param.y);
    adam_value(rates, step_size, grad.z, m.z, v.z, param.z);
    adam_value(rates, step_size, grad.w, m.w, v.w, param.w);
}

}  // namespace gs::cuda
