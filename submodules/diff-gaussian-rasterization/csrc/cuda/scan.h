// scan.h: sums of the numbers of all threads before one, over all blocks of a grid.
#pragma once
#include "device.h"

namespace gs::cuda {

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t v) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const uint32_t before = __shfl_up_sync(kFullWarp, v, offset);
        if (lane_id() >= offset) v += before;
    }
    return v;
}

// The sum of what the blocks before this one have, without a kernel for it: each publishes its own number, then looks
// back, 32 blocks at a time, until one of them knows the sum of all before it. By one warp. It waits for blocks of lower
// number, which have been started before it: CUB's scan relies on that too.
constexpr uint64_t kOwn = 1ull << 62, kSum = 2ull << 62;  // marks of what a block has published

__device__ __forceinline__ uint64_t sum_before(uint64_t* published, uint64_t own) {
    volatile uint64_t* const words = published;
    const int block = int(blockIdx.x);
    if (lane_id() == 0) words[block] = kOwn | own;
    unsigned long long before = 0;
    for (int end = block; end > 0; end -= kWarp) {
        const int other = end - 1 - lane_id();
        unsigned long long word = kSum;
        while (other >= 0 && (word = words[other]) < kOwn) {}
        const unsigned know_sum = __ballot_sync(kFullWarp, word >= kSum);
        const int last = know_sum ? __ffs(know_sum) - 1 : kWarp - 1;
        before += warp_sum(lane_id() <= last ? word & (kOwn - 1) : 0ull);
        if (know_sum) break;
    }
    if (lane_id() == 0) words[block] = kSum | (before + own);
    return before;
}

// The sum of the numbers of all threads before this one, in the blocks before too. All threads must call.
template <int kThreads>
__device__ __forceinline__ uint64_t exclusive_sum(uint32_t own, uint64_t* published) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ uint32_t sums[kWarps];
    __shared__ uint64_t blocks_before;
    const int warp = threadIdx.x / kWarp;
    const uint32_t inclusive = warp_inclusive_sum(own);
    if (lane_id() == kWarp - 1) sums[warp] = inclusive;
    __syncthreads();
    uint32_t warps_before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) warps_before += sums[w];
        all += sums[w];
    }
    if (warp == 0) {
        const uint64_t before = sum_before(published, all);
        if (threadIdx.x == 0) blocks_before = before;
    }
    __syncthreads();
    return blocks_before + warps_before + inclusive - own;
}

}  // namespace gs::cuda
