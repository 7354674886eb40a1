// Which splats does each tile blend, and in which order? CUDA backend.
//
// Splats are sorted by depth once. Then each writes one entry (tile, splat) per tile it can reach, in that order, and a
// stable sort by tile alone leaves every tile with its splats front to back. Sorting few 32-bit depths and many 16-bit
// tile ids moves half the bytes of sorting many 64-bit keys.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <iterator>

#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;

// tile_counts[depth_order[i]] as an iterator, for the scan.
struct CountsInDepthOrder {
    using iterator_category = std::random_access_iterator_tag;
    using value_type = uint32_t;
    using difference_type = int64_t;
    using pointer = const uint32_t*;
    using reference = uint32_t;

    const uint32_t* counts;
    const uint32_t* order;

    __host__ __device__ uint32_t operator*() const { return counts[*order]; }
    __host__ __device__ uint32_t operator[](int64_t i) const { return counts[order[i]]; }
    __host__ __device__ CountsInDepthOrder operator+(int64_t i) const { return {counts, order + i}; }
};

int bits_for(uint32_t largest) {
    int bits = 1;
    while (bits < 32 && (largest >> bits)) ++bits;
    return bits;
}

// A thread per splat, in depth order.
template <typename TileId>
__global__ void __launch_bounds__(kThreads) emit_kernel(Emit p) {
    const int64_t rank = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    TileId* const tiles = static_cast<TileId*>(p.tiles);

    uint32_t index = 0, wanted = 0, offset = 0;
    Footprint f{};
    if (rank < p.count) {
        index = p.depth_order[rank];
        wanted = p.tile_counts[index];
        offset = p.offsets[rank];
        if (wanted) {
            const float4* splat = reinterpret_cast<const float4*>(p.splats + index);
            f = footprint(splat[0], splat[1], float(p.radii[index]), p.grid);
        }
    }

    // Several values of the owner are needed where the warp helps out: they are fetched from the owner's registers
    // through its lane number.
    const int self = lane_id();
    uint32_t* const ids = p.ids;
    const Emit* const args = &p;
    const int64_t warp_rank = rank - self;
    const uint32_t found = walk_tiles(wanted > 0, f, uint32_t(self), p.grid, [=](uint32_t owner, uint32_t nth, int tile) {
        uint32_t at = offset, id = index, room = wanted;
        if (owner != uint32_t(self)) {  // rare: a large splat of another lane
            id = args->depth_order[warp_rank + owner];
            at = args->offsets[warp_rank + owner];
            room = args->tile_counts[id];
        }
        if (nth < room) {
            tiles[at + nth] = TileId(tile);
            ids[at + nth] = id;
        }
    });

    // preprocess counted with the same function, so both agree; should rounding ever differ between the two kernels,
    // no entry may stay unwritten: a tile past the last is sorted to the end, where nobody reads.
    for (uint32_t i = found; i < wanted; ++i) {
        tiles[offset + i] = TileId(p.grid.tiles_x * p.grid.tiles_y);
        ids[offset + i] = index;
    }
}

template <typename TileId>
__global__ void __launch_bounds__(kThreads) ranges_kernel(const TileId* tiles, int64_t entries, uint32_t tile_count,
                                                          uint32_t* ranges) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= entries) return;
    const uint32_t tile = tiles[i];
    const uint32_t before = i > 0 ? tiles[i - 1] : UINT32_MAX;
    if (tile != before) {
        if (tile < tile_count) ranges[2 * int64_t(tile)] = uint32_t(i);
        if (i > 0 && before < tile_count) ranges[2 * int64_t(before) + 1] = uint32_t(i);
    }
    if (i == entries - 1 && tile < tile_count) ranges[2 * int64_t(tile) + 1] = uint32_t(entries);
}

template <typename TileId>
void sort_and_mark(const SortByTile& p, Stream stream) {
    const auto* tiles = static_cast<const TileId*>(p.tiles);
    auto* tiles_out = static_cast<TileId*>(p.tiles_out);
    size_t bytes = p.workspace_bytes;
    check(cub::DeviceRadixSort::SortPairs(p.workspace, bytes, tiles, tiles_out, p.ids, p.ids_out,
                                          int(p.entries), 0,
                                          bits_for(uint32_t(p.grid.tiles())), native(stream)),
          "sorting by tile");
    ranges_kernel<TileId><<<blocks_for(p.entries, kThreads), kThreads, 0, native(stream)>>>(
        tiles_out, p.entries, uint32_t(p.grid.tiles()), p.ranges);
    check_launch("ranges_kernel");
}

}  // namespace

size_t depth_sort_workspace(int64_t count) {
    size_t bytes = 0;
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                          static_cast<uint32_t*>(nullptr), static_cast<const uint32_t*>(nullptr),
                                          static_cast<uint32_t*>(nullptr), int(count), 0, 31),
          "sizing the depth sort");
    return bytes;
}

void sort_by_depth(int64_t count, const uint32_t* keys, uint32_t* keys_out, const uint32_t* indices,
                   uint32_t* indices_out, void* workspace, size_t workspace_bytes, Stream stream) {
    if (count == 0) return;
    check(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, keys, keys_out, indices, indices_out,
                                          int(count), 0, 31, native(stream)),  // depths are positive: no sign bit
          "sorting by depth");
}

size_t offsets_workspace(int64_t count) {
    size_t bytes = 0;
    check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, CountsInDepthOrder{nullptr, nullptr},
                                        static_cast<uint32_t*>(nullptr), int(count)),
          "sizing the scan of tile counts");
    return bytes;
}

void count_offsets(int64_t count, const uint32_t* tile_counts, const uint32_t* depth_order, uint32_t* offsets,
                   void* workspace, size_t workspace_bytes, Stream stream) {
    if (count == 0) return;
    check(cub::DeviceScan::ExclusiveSum(workspace, workspace_bytes, CountsInDepthOrder{tile_counts, depth_order},
                                        offsets, int(count), native(stream)),
          "scanning tile counts");
}

void emit(const Emit& args, Stream stream) {
    if (args.count == 0) return;
    const unsigned blocks = blocks_for(args.count, kThreads);
    if (small_tile_ids(args.grid)) emit_kernel<uint16_t><<<blocks, kThreads, 0, native(stream)>>>(args);
    else emit_kernel<uint32_t><<<blocks, kThreads, 0, native(stream)>>>(args);
    check_launch("emit_kernel");
}

size_t tile_sort_workspace(const TileGrid& grid, int64_t entries) {
    size_t bytes = 0;
    const int bits = bits_for(uint32_t(grid.tiles()));
    const uint32_t* ids = nullptr;
    if (small_tile_ids(grid))
        check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint16_t*>(nullptr),
                                              static_cast<uint16_t*>(nullptr), ids, static_cast<uint32_t*>(nullptr),
                                              int(entries), 0, bits),
              "sizing the tile sort");
    else
        check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                              static_cast<uint32_t*>(nullptr), ids, static_cast<uint32_t*>(nullptr),
                                              int(entries), 0, bits),
              "sizing the tile sort");
    return bytes;
}

void sort_by_tile(const SortByTile& args, Stream stream) {
    check(cudaMemsetAsync(args.ranges, 0, size_t(args.grid.tiles()) * 2 * sizeof(uint32_t), native(stream)),
          "clearing tile ranges");
    if (args.entries == 0) return;
    if (small_tile_ids(args.grid)) sort_and_mark<uint16_t>(args, stream);
    else sort_and_mark<uint32_t>(args, stream);
}

}  // namespace gs::cuda
