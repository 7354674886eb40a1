// warp_reduce.h: sums N values over the 32 lanes of a warp, and leaves each total in a lane of its own.
//
// Summing the values one after the other takes 5 N shuffles. Here a shuffle serves two values: in the first step, a lane
// and its partner 16 lanes away split the N values between them, each adding up its own half for both, then the halves
// are halved again. 9 values: 5 + 3 + 2 + 1 + 1 = 12 shuffles. It is a matrix transposition that adds on the way.
#pragma once

#if defined(__CUDACC__)
#define GS_WARP __device__ __forceinline__
#else
#define GS_WARP inline  // tests run it on an emulated warp
#endif

namespace gs::cuda {

// `exchange(value, mask)` returns the value that lane (own lane ^ mask) passed in. The total ends up in v[0].
template <int N, int Mask, typename V, typename Exchange, typename Add>
GS_WARP void transpose_step(V (&v)[N], int lane, Exchange exchange, Add add) {
    constexpr int kHalf = (N + 1) / 2;
    V kept[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
        if (k + kHalf < N) {
            const bool upper = lane & Mask;
            const V mine = upper ? v[k + kHalf] : v[k], theirs = upper ? v[k] : v[k + kHalf];
            kept[k] = add(mine, exchange(theirs, Mask));
        } else {
            kept[k] = add(v[k], exchange(v[k], Mask));  // the odd one: both keep it
        }
    }
    if constexpr (Mask > 1) { transpose_step<kHalf, Mask / 2>(kept, lane, exchange, add); }
    v[0] = kept[0];
}

// Which of the N values' totals this lane ends up with: the same steps, on numbers instead of sums.
template <int N>
GS_WARP int transpose_slot(int lane) {
    int numbers[N];
#pragma unroll
    for (int k = 0; k < N; ++k) numbers[k] = k;
    transpose_step<N, 16>(numbers, lane, [](int n, int) { return n; }, [](int mine, int) { return mine; });
    return numbers[0];
}

#if defined(__CUDACC__)

template <int N>
GS_WARP float transpose_sum(float (&v)[N], int lane) {
    transpose_step<N, 16>(
        v, lane, [](float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); },
        [](float a, float b) { return a + b; });
    return v[0];
}

// Several lanes can hold the same total; true in the first of them. All 32 lanes must call.
GS_WARP bool first_with_slot(int slot, int lane) {
    unsigned peers = 0;
    for (int other = 0; other < 32; ++other)
        if (__shfl_sync(0xffffffffu, slot, other) == slot) peers |= 1u << other;
    return lane == __ffs(peers) - 1;
}

#endif

}  // namespace gs::cuda
