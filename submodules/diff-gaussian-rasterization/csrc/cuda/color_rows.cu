// Colors between a table in the host's memory and the GPU's own. CUDA backend.
//
// The table is pinned: kernels read and write it through the bus, a row in one piece. The bus is what takes the time. Few
// blocks keep it busy; more of them, above all of those that write, hold up the kernels of other streams.
#include "device.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 192;
constexpr int kRows = 16;  // that a block has under way
constexpr unsigned kFetchBlocks = 128, kStoreBlocks = 64;

// Some rows in shared memory, as they lie in the table.
struct Staged {
    alignas(16) float numbers[kRows * 3 * kMaxWidth];
    int64_t row[kRows];  // of the table, -1: not this one
};

// copy(shared, global) for all numbers of the wanted rows, four at a time where rows are multiples of that.
template <typename Four, typename One>
__device__ __forceinline__ void for_rows(const ColorRows& p, Staged& s, int rows, Four four, One one) {
    const int length = 3 * p.width, step = length % 4 == 0 ? 4 : 1, words = length / step;
    for (int i = threadIdx.x; i < rows * words; i += kThreads) {
        const int at = i / words, column = (i - at * words) * step;
        if (s.row[at] < 0) continue;
        float *const shared = s.numbers + at * length + column, *const global = p.table + s.row[at] * length + column;
        if (step == 4)
            four(shared, global);
        else
            one(shared, global);
    }
}

// Where number j of part k (0: coefficients, 1, 2: their moments) of the i-th row is, outside the table.
__device__ __forceinline__ float& value_at(const ColorRows& p, int64_t i, int k, int j) {
    return j < 3 ? p.values[2 * k][3 * i + j] : p.values[2 * k + 1][(p.width - 3) * i + j - 3];
}

__global__ void __launch_bounds__(kThreads) fetch_rows_kernel(const __grid_constant__ FetchRows p) {
    __shared__ Staged s;
    __shared__ float drift[kRows][2], decay[kRows][2];
    const ColorRows& c = p.colors;
    for (int64_t first = int64_t(blockIdx.x) * kRows; first < c.count; first += int64_t(gridDim.x) * kRows) {
        const int rows = int(::min(c.count - first, int64_t(kRows))), at = threadIdx.x;
        bool wanted = false;
        if (at < rows) {
            const int64_t row = c.rows[first + at];
            const int since = p.moved_at[row] - p.first;
            wanted = p.just_moved < 0 || (since == p.now) == (p.just_moved == 1);
            s.row[at] = wanted ? row : -1;
            const double2 sums = p.sums[since], then = p.decays[since], now = p.decays[p.now];
            drift[at][0] = float(sums.x), drift[at][1] = float(sums.y);
            decay[at][0] = float(exp(now.x - then.x)), decay[at][1] = float(exp(now.y - then.y));
        }
        if (!__syncthreads_or(wanted)) continue;
        for_rows(
            c, s, rows, [](float* shared, const float* global) { copy_async16(shared, global); },
            [](float* shared, const float* global) { *shared = *global; });
        copy_async_wait();
        __syncthreads();
        for (int i = threadIdx.x; i < rows * c.width; i += kThreads) {
            const int r = i / c.width, j = i - r * c.width;
            if (s.row[r] < 0) continue;
            const float* const numbers = s.numbers + r * 3 * c.width + j;
            const float param = numbers[0], m = numbers[c.width], v = numbers[2 * c.width];
            value_at(c, first + r, 0, j) = param - drift[r][j >= 3] * (m / (sqrtf(v) + p.eps));
            value_at(c, first + r, 1, j) = decay[r][0] * m;
            value_at(c, first + r, 2, j) = decay[r][1] * v;
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads)
    store_rows_kernel(const __grid_constant__ ColorRows p, const bool* __restrict__ wanted) {
    __shared__ Staged s;
    for (int64_t first = int64_t(blockIdx.x) * kRows; first < p.count; first += int64_t(gridDim.x) * kRows) {
        const int rows = int(::min(p.count - first, int64_t(kRows))), at = threadIdx.x;
        if (at < rows) s.row[at] = wanted[first + at] ? p.rows[first + at] : -1;
        __syncthreads();
        for (int i = threadIdx.x; i < rows * p.width; i += kThreads) {
            const int r = i / p.width, j = i - r * p.width;
            if (s.row[r] < 0) continue;
            for (int k = 0; k < 3; ++k) s.numbers[(3 * r + k) * p.width + j] = value_at(p, first + r, k, j);
        }
        __syncthreads();
        for_rows(
            p, s, rows,
            [](const float* shared, float* global) {
                *reinterpret_cast<float4*>(global) = *reinterpret_cast<const float4*>(shared);
            },
            [](const float* shared, float* global) { *global = *shared; });
        __syncthreads();
    }
}

}  // namespace

void fetch_rows(const FetchRows& args, Stream stream) {
    if (args.colors.count == 0) return;
    const unsigned blocks = std::min(blocks_for(args.colors.count, kRows), kFetchBlocks);
    fetch_rows_kernel<<<blocks, kThreads, 0, native(stream)>>>(args);
    check_launch("fetch_rows_kernel");
}

void store_rows(const ColorRows& args, const bool* wanted, Stream stream) {
    if (args.count == 0) return;
    const unsigned blocks = std::min(blocks_for(args.count, kRows), kStoreBlocks);
    store_rows_kernel<<<blocks, kThreads, 0, native(stream)>>>(args, wanted);
    check_launch("store_rows_kernel");
}

}  // namespace gs::cuda
