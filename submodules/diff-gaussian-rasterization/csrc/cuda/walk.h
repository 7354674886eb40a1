// walk.h: what those who walk the lists of tiles besides blend_forward.cu need, with its arithmetic.
#pragma once
#include "blend.h"

namespace gs::cuda {

// Where a pixel looks.
__device__ __forceinline__ float2 target_of(const float* offset, const TileGrid& grid, int column, int row) {
    float2 target = {float(column) + 0.5f, float(row) + 0.5f};
    if (offset && column < grid.width && row < grid.height) {
        const int64_t pixel = int64_t(row) * grid.width + column;
        target.x += offset[pixel], target.y += offset[pixel + int64_t(grid.width) * grid.height];
    }
    return target;
}

// log2(alpha), by the arithmetic of Exponents.
__device__ __forceinline__ float exponent(float dx, float dy, float4 shape) {
    const float constant = __fmaf_rn(__fmul_rn(shape.x, dx), dx, shape.w), linear = __fmul_rn(shape.y, dx);
    return __fmaf_rn(dy, __fmaf_rn(shape.z, dy, linear), constant);
}

}  // namespace gs::cuda
