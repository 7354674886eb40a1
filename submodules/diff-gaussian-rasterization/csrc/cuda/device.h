// device.h: what every kernel file needs: launch arithmetic, error reports, warp-wide helpers.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "stages.h"

namespace gs::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2AlphaMin = -7.994353436858858f;  // log2(1 / 255)

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

inline void check(cudaError_t error, const char* doing) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error));
}

// After a kernel launch: reports a launch that was refused.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Blocks to cover `count` items. Grids are one-dimensional: only x may exceed 65,535.
inline unsigned blocks_for(int64_t count, int threads) {
    const int64_t blocks = (count + threads - 1) / threads;
    if (blocks > INT32_MAX) throw std::runtime_error("too many items for one CUDA launch");
    return static_cast<unsigned>(blocks);
}

__device__ __forceinline__ int lane_id() { return threadIdx.x & (kWarp - 1); }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory without passing through registers, where the GPU can (8.0 and later).
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<float4*>(shared) = *static_cast<const float4*>(global);
#endif
}

// The copies this thread has started are complete. A barrier must follow before other threads may read them.
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ int highest_bit(uint32_t mask) {
    int at;
    asm("bfind.u32 %0, %1;" : "=r"(at) : "r"(mask));
    return at;
}

// Position of the n-th set bit, n = 0, 1, ...
__device__ __forceinline__ int nth_set_bit(uint32_t mask, int n) {
    int at = 0;
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
        const int below = __popc(mask & ((1u << width) - 1u));
        if (n >= below) n -= below, mask >>= width, at += width;
    }
    return at;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
    return v;
}

}  // namespace gs::cuda
