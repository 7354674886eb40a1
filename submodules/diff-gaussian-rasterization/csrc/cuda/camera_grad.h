// camera_grad.h: what all Gaussians of a block say about the camera's pose.
#pragma once
#include "gaussian.h"
#include "warp_reduce.h"

namespace gs::cuda {

constexpr int kCameraValues = 15;  // rotation 9, translation 3, center 3

// Writes the block's share of the camera gradient: `p` and `rotation` are gradients of the mean in camera space, and of the
// rotation without the mean's part. All threads must call.
template <int kThreads>
__device__ __forceinline__ void add_camera_grad(const Camera<float>& camera, bool center_given, Vec3<float> mean,
                                                Vec3<float> p, Mat3<float> rotation, Vec3<float> g_offset,
                                                float* world_to_camera) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float of_warp[kWarps][kCameraValues], of_block[kCameraValues];
    const Vec3<float> r0 = add(rotation.r0, mul(p.x, mean)), r1 = add(rotation.r1, mul(p.y, mean)),
                      r2 = add(rotation.r2, mul(p.z, mean));
    float v[kCameraValues] = {r0.x, r0.y, r0.z, r1.x, r1.y,        r1.z,        r2.x,       r2.y,
                              r2.z, p.x,  p.y,  p.z,  -g_offset.x, -g_offset.y, -g_offset.z};
    const int lane = lane_id(), slot = transpose_slot<kCameraValues>(lane);
    const bool writes = first_with_slot(slot, lane);
    const float total = transpose_sum(v, lane);
    if (writes) of_warp[threadIdx.x / kWarp][slot] = total;
    __syncthreads();
    if (threadIdx.x < kCameraValues) {
        float sum = 0.f;
        for (int w = 0; w < kWarps; ++w) sum += of_warp[w][threadIdx.x];
        of_block[threadIdx.x] = sum;
    }
    __syncthreads();

    if (threadIdx.x < 12) {
        const int row = threadIdx.x / 4, column = threadIdx.x % 4;
        const float t[3] = {camera.translation.x, camera.translation.y, camera.translation.z};
        const Vec3<float> c = {of_block[12], of_block[13], of_block[14]};
        const Vec3<float> r = row == 0 ? camera.rotation.r0 : row == 1 ? camera.rotation.r1 : camera.rotation.r2;
        float value = column < 3 ? of_block[3 * row + column] : of_block[9 + row];
        if (!center_given) value -= column < 3 ? t[row] * of_block[12 + column] : dot(r, c);  // center = -R^T t
        world_to_camera[16 * int64_t(blockIdx.x) + threadIdx.x] = value;
    } else if (threadIdx.x < 16) {
        world_to_camera[16 * int64_t(blockIdx.x) + threadIdx.x] = 0.f;
    }
}

}  // namespace gs::cuda
