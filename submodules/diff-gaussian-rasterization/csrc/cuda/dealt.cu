// Splats on their way between processes: what is seen of a process's Gaussians becomes records, one camera after the other,
// and what a process has got from all of them becomes the screen of its own camera. CUDA backend.
#include "scan.h"
#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ uint32_t row_of(const Record* record) { return record->tiles.count; }

// One thread per Gaussian. Records are in the order of rows.
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Append p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const bool seen = i < p.count && p.screen.radii[i] > 0;
    int64_t at = int64_t(exclusive_sum<kThreads>(seen, p.published));
    for (int camera = 0; camera < p.camera; ++camera) at += int64_t(p.totals[camera].visible);
    const bool fits = seen && at < p.capacity;
    if (i < p.count) p.slots[i] = fits ? int32_t(at) : -1;
    if (!fits) return;
    Record record;
    record.splat = p.screen.splats[i];
    record.splat.inv_depth = __uint_as_float(p.screen.depth_keys[i]);
    record.tiles = p.screen.tile_sets[i];
    if (is_large(record.tiles)) record.tiles.mask = record.tiles.count;
    record.tiles.count = uint32_t(i * p.ranks + p.rank);
    p.records[at] = record;
}

// The first of the records from `begin` to `end` whose row is not below `row`.
__device__ __forceinline__ int64_t lower_bound(const Record* records, int64_t begin, int64_t end, uint32_t row) {
    while (begin < end) {
        const int64_t middle = (begin + end) / 2;
        if (row_of(records + middle) < row)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

struct Rows { uint32_t low, high; };

// The lowest and the highest row of a warp's records.
__device__ __forceinline__ Rows rows_of_warp(bool inside, uint32_t row) {
    Rows rows = {inside ? row : UINT32_MAX, inside ? row : 0u};
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        rows.low = ::min(rows.low, __shfl_xor_sync(kFullWarp, rows.low, offset));
        rows.high = ::max(rows.high, __shfl_xor_sync(kFullWarp, rows.high, offset));
    }
    return rows;
}

// How many records of all processes are of lower rows than record i. A warp's rows are close to each other, so it looks for
// all of them together first.
__device__ __forceinline__ int64_t place_of(const Unpack& p, bool inside, int64_t i, uint32_t row) {
    const Rows rows = rows_of_warp(inside, row);
    int64_t place = 0;
    for (int block = 0; block < p.blocks; ++block) {
        const int64_t begin = p.begin[block], end = p.begin[block + 1];
        if (inside && i >= begin && i < end) {
            place += i - begin;
        } else if (rows.low <= rows.high) {
            const int64_t first = lower_bound(p.records, begin, end, rows.low);
            const int64_t last = lower_bound(p.records, first, end, rows.high);
            place += lower_bound(p.records, first, last, row) - begin;
        }
    }
    return place;
}

// One thread per record. They come in the order of rows.
__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ Unpack p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const bool inside = i < p.count;
    const uint32_t row = inside ? row_of(p.records + i) : 0u;
    const int64_t place = place_of(p, inside, i, row);
    uint32_t tiles = 0;
    if (inside) {
        Record record = p.records[i];
        const float depth = record.splat.inv_depth;
        record.splat.inv_depth = 1.f / depth;
        tiles = is_large(record.tiles) ? record.tiles.mask : __popc(record.tiles.mask);
        record.tiles.count = tiles;
        p.out.splats[place] = record.splat;
        p.out.tile_sets[place] = record.tiles;
        p.out.depth_keys[place] = __float_as_uint(depth);
        p.out.indices[place] = uint32_t(place);
        p.out.radii[place] = 1;
        p.places[i] = int32_t(place);
    }
    add_totals<kThreads>(inside, tiles, p.out.totals);
}

}  // namespace

void append(const Append& args, Stream stream) {
    if (args.count == 0) return;
    check(cudaMemsetAsync(args.published, 0, emit_blocks(args.count) * sizeof(uint64_t), native(stream)),
          "clearing sums of blocks");
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
