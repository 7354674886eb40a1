// visits.h: what the forward took, for those who walk it backward.
#pragma once
#include "blend.h"

namespace gs::cuda {

constexpr int kVisitStrips = 2;  // of a warp: a square of 8x8 pixels, two pixels a lane

// Which entries of a segment the two strips of a warp took. Lane i < kGroups knows about the i-th 32 of them.
struct Visits {
    uint32_t strips[kVisitStrips];
    uint32_t before;  // entries taken in the groups of the lanes below
    uint32_t total;

    __device__ __forceinline__ Visits(const Trace& trace, uint32_t tile, uint32_t begin, uint32_t segment, int strip) {
        const uint32_t group = segment * kGroups + lane_id();
#pragma unroll
        for (int i = 0; i < kVisitStrips; ++i) {
            const bool known = lane_id() < kGroups && group < trace.walked[tile * kStrips + strip + i];
            strips[i] = known ? trace.taken[taken_at(tile, begin, group, strip + i)] : 0;
        }
        const uint32_t own = __popc(strips[0] | strips[1]);
        uint32_t up_to = own;
#pragma unroll
        for (int offset = 1; offset < kGroups; offset *= 2) {
            const uint32_t lower = __shfl_up_sync(kFullWarp, up_to, offset);
            if (lane_id() >= offset) up_to += lower;
        }
        before = up_to - own;
        total = __shfl_sync(kFullWarp, up_to, kGroups - 1);
    }

    // The n-th entry taken, counted from the segment's first, and by which strips. All lanes must call.
    __device__ __forceinline__ uint32_t nth(uint32_t n, uint32_t& by) const {
        int owner = 0;
#pragma unroll
        for (int step = kGroups / 2; step > 0; step /= 2)
            if (__shfl_sync(kFullWarp, before, owner + step) <= n) owner += step;
        const uint32_t upper = __shfl_sync(kFullWarp, strips[0], owner),
                       lower = __shfl_sync(kFullWarp, strips[1], owner);
        const int bit = nth_set_bit(upper | lower, int(n - __shfl_sync(kFullWarp, before, owner)));
        by = (upper >> bit & 1) | (lower >> bit & 1) << 1;
        return owner * kWarp + bit;
    }
};

}  // namespace gs::cuda
