// Splats on their way between processes: what is seen of a process's Gaussians becomes records, one camera after the other,
// and what a process has got from all of them is put in the order of all rows, so that equal depths are blended as in one
// process. CUDA backend.
#include "scan.h"
#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int kWarps = kThreads / kWarp;

// One thread per Gaussian. Records are in the order of rows.
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Append p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const bool seen = i < p.count && p.screen.radii[i] > 0;
    int64_t at = int64_t(exclusive_sum<kThreads>(seen, p.published));
    for (int camera = 0; camera < p.camera; ++camera) at += int64_t(p.totals[camera].visible);
    const bool fits = seen && at < p.capacity;
    if (i < p.count && !fits) p.slots[i] = -1;
    if (!fits) return;
    Splat splat = p.screen.splats[i];
    splat.inv_depth = __uint_as_float(p.screen.depth_keys[i]);
    TileSet tiles = p.screen.tile_sets[i];
    if (is_large(tiles)) tiles.mask = tiles.count;
    tiles.count = uint32_t(i * p.ranks + p.rank);
    p.records[at] = {splat, tiles};
    p.slots[i] = int32_t(at << kChannelBits | (splat.r > 0.f) | (splat.g > 0.f) << 1 | (splat.b > 0.f) << 2);
}

// The first from `begin` to `end` whose row is not below `row`.
__device__ __forceinline__ int64_t lower_bound(const Record* records, int64_t begin, int64_t end, uint32_t row) {
    while (begin < end) {
        const int64_t middle = (begin + end) / 2;
        if (records[middle].tiles.count < row)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

// The same by a warp, which looks at 32 places at a time.
__device__ __forceinline__ int64_t lower_bound_by_warp(const Record* records, int64_t begin, int64_t end,
                                                       uint32_t row) {
    while (begin < end) {
        const int64_t step = (end - begin + kWarp - 1) / kWarp, at = begin + lane_id() * step;
        const int below = __popc(__ballot_sync(kFullWarp, at < end && records[at].tiles.count < row));
        if (below == 0) return begin;
        end = ::min(begin + below * step, end);
        begin += (below - 1) * step + 1;
    }
    return begin;
}

// Where, in the records of each process, those between the lowest and the highest row of a block of threads are.
struct Bounds {
    uint32_t low, high;
    int64_t first[kMaxCameras], last[kMaxCameras];

    // All threads call.
    __device__ __forceinline__ void find(const Unpack& p, bool inside, uint32_t row) {
        if (threadIdx.x == 0) low = UINT32_MAX, high = 0;
        __syncthreads();
        if (inside) atomicMin(&low, row), atomicMax(&high, row);
        __syncthreads();
        for (int task = threadIdx.x / kWarp; task < 2 * p.blocks; task += kWarps) {
            const int block = task / 2;
            const int64_t at =
                lower_bound_by_warp(p.records, p.begin[block], p.begin[block + 1], task % 2 ? high : low);
            if (lane_id() == 0) (task % 2 ? last : first)[block] = at;
        }
        __syncthreads();
    }
};

// One thread per record.
__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ Unpack p) {
    __shared__ Bounds bounds;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const bool inside = i < p.count;
    const Record own = inside ? p.records[i] : Record{};
    TileSet set = own.tiles;
    const uint32_t row = set.count;
    bounds.find(p, inside, row);
    set.count = 0;
    if (inside) {
        int64_t place = 0;  // how many records of all processes are of lower rows
        for (int block = 0; block < p.blocks; ++block) {
            const int64_t begin = p.begin[block], end = p.begin[block + 1];
            const bool among = i >= begin && i < end;
            place += (among ? i : lower_bound(p.records, bounds.first[block], bounds.last[block], row)) - begin;
        }
        set.count = is_large(set) ? set.mask : __popc(set.mask);
        p.out.splats[i] = own.splat;
        p.out.tile_sets[i] = set;
        p.out.depth_keys[place] = __float_as_uint(own.splat.inv_depth);
        p.out.indices[place] = uint32_t(i);
    }
    add_totals<kThreads>(inside, set.count, p.out.totals);
}

}  // namespace

void append(const Append& args, Stream stream) {
    if (args.count == 0) return;
    append_kernel<<<unsigned(emit_blocks(args.count)), kThreads, 0, native(stream)>>>(args);
    check_launch("append_kernel");
}

void unpack(const Unpack& args, Stream stream) {
    check(cudaMemsetAsync(args.out.totals, 0, sizeof(Totals), native(stream)), "clearing totals");
    if (args.count == 0) return;
    unpack_kernel<<<blocks_for(args.count, kThreads), kThreads, 0, native(stream)>>>(args);
    check_launch("unpack_kernel");
}

}  // namespace gs::cuda
