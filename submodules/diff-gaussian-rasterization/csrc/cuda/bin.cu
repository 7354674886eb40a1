// Which splats does each tile blend, and in which order? CUDA backend.
//
// Splats are sorted by depth once. Then each writes one entry (tile, splat) per tile it can reach, in that order, and a
// stable sort by tile alone leaves every tile with its splats front to back. Sorting few 32-bit depths and many 16-bit
// tile ids moves half the bytes of sorting many 64-bit keys.
#include <cub/device/device_radix_sort.cuh>

#include "scan.h"
#include "tile_walk.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) begin_lists_kernel(BeginLists p, int64_t blocks, int64_t bounds) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < blocks) p.published[i] = 0;
    if (i < bounds) p.ranges[i] = 0;
    if (i == 0 && p.entries) *p.entries = int64_t(p.totals->entries);
}

// The number of its view's first tile.
__device__ __forceinline__ uint32_t first_tile(const Emit& p, uint32_t splat) {
    if (p.grid.views == 1) return 0;
    return splat / (uint32_t(p.count) / uint32_t(p.grid.views)) * uint32_t(p.grid.tiles_x * p.grid.tiles_y);
}

__device__ __forceinline__ uint32_t no_tile(const TileGrid& grid) {
    return uint32_t(grid.views * grid.tiles_x * grid.tiles_y);
}

int bits_for(uint32_t largest) {
    int bits = 1;
    while (bits < 32 && (largest >> bits)) ++bits;
    return bits;
}

// The first lane whose inclusive sum exceeds `position`, which all do at lane 31.
__device__ __forceinline__ int owner_of(uint32_t position, uint32_t inclusive) {
    int owner = 0;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
        if (__shfl_sync(kFullWarp, inclusive, owner + step - 1) <= position) owner += step;
    return owner;
}

// A warp holds 32 splats, neighbors in depth order, so their entries follow each other in memory. Its lanes write
// neighboring entries: each looks up which splat its entry belongs to, and which of that splat's tiles it is.
template <typename TileId>
__global__ void __launch_bounds__(kThreads) emit_kernel(Emit p) {
    const uint64_t thread = uint64_t(blockIdx.x) * kThreads + threadIdx.x, threads = uint64_t(gridDim.x) * kThreads;
    const Totals totals = *p.totals;
    const uint64_t capacity = uint64_t(p.capacity);
    TileId* const tiles = static_cast<TileId*>(p.tiles);
    for (uint64_t i = totals.entries + thread; i < capacity; i += threads) {
        tiles[i] = TileId(no_tile(p.grid));
        p.ids[i] = 0;
    }

    const uint64_t first_rank = uint64_t(blockIdx.x) * kThreads, rank = first_rank + threadIdx.x;
    if (first_rank >= totals.visible) return;
    const int lane = lane_id();
    const bool inside = rank < totals.visible;
    uint32_t index = 0;
    TileSet own{};
    if (inside) {
        index = p.depth_order[rank];
        own = p.tile_sets[index];
    }
    const uint64_t offset = exclusive_sum<kThreads>(own.count, p.published);
    if (inside && p.offsets) p.offsets[rank] = uint32_t(::min(offset, capacity));

    const bool small = !is_large(own);
    const uint32_t inclusive = warp_inclusive_sum(small ? own.count : 0);
    const uint32_t total = __shfl_sync(kFullWarp, inclusive, kWarp - 1);
    const uint32_t before = inclusive - (small ? own.count : 0);
    const uint32_t corner = first_tile(p, index) + uint32_t(own.y0) * uint32_t(p.grid.tiles_x) + own.x0;
    for (uint32_t first = 0; first < total; first += kWarp) {
        const uint32_t position = ::min(first + lane, total - 1);
        const int owner = owner_of(position, inclusive);
        const uint32_t n = position - __shfl_sync(kFullWarp, before, owner);
        const uint32_t mask = __shfl_sync(kFullWarp, own.mask, owner);
        const int columns = __shfl_sync(kFullWarp, int(own.columns), owner);
        const uint32_t tile_corner = __shfl_sync(kFullWarp, corner, owner);
        const uint64_t at = __shfl_sync(kFullWarp, offset, owner) + n;
        const uint32_t id = __shfl_sync(kFullWarp, index, owner);

        const int bit = nth_set_bit(mask, int(n));
        const int row = int((float(bit) + 0.5f) * reciprocal_fast(float(columns)));  // exact: bit < 32
        if (first + lane < total && at < capacity) {
            tiles[at] = TileId(tile_corner + row * p.grid.tiles_x + (bit - row * columns));
            p.ids[at] = id;
        }
    }

    // Large splats are neighbors in depth, too: they are left to all warps of a kernel of their own.
    const bool pending = !small && offset < capacity;
    const unsigned large = __ballot_sync(kFullWarp, pending);
    uint32_t at = 0;
    if (large && lane == 0) at = uint32_t(atomicAdd(&p.totals->large, static_cast<unsigned long long>(__popc(large))));
    at = __shfl_sync(kFullWarp, at, 0) + __popc(large & lanes_below());
    if (pending) p.large[at] = index, p.tile_sets[index].mask = uint32_t(offset);
}

// A warp writes the entries of a large splat, row by row.
template <typename TileId>
__global__ void __launch_bounds__(kThreads) emit_large_kernel(Emit p) {
    constexpr int kWarps = kThreads / kWarp;
    const int lane = lane_id();
    TileId* const tiles = static_cast<TileId*>(p.tiles);
    for (uint64_t n = blockIdx.x * kWarps + threadIdx.x / kWarp; n < p.totals->large; n += gridDim.x * kWarps) {
        const uint32_t id = p.large[n], first_of_view = first_tile(p, id);
        const TileSet set = p.tile_sets[id];
        const uint32_t end = uint32_t(::min(uint64_t(set.mask) + set.count, uint64_t(p.capacity)));
        const auto write = [&](uint32_t at, TileId tile) {
            if (at < end) tiles[at] = tile, p.ids[at] = id;
        };
        const float4* splat = reinterpret_cast<const float4*>(p.splats + id);
        const Outline o = large_outline(splat[0], splat[1]);
        const TileRect r = rect_of(set);
        uint32_t at = set.mask;
        for (int top = r.y0; top < r.y1; top += kWarp) {
            const Span own = top + lane < r.y1 ? row_span(o, r, top + lane, p.grid) : Span{0, 0};
            const uint32_t up_to = at + warp_inclusive_sum(own.count());
            for (int y = top; y < ::min(top + kWarp, r.y1); ++y) {
                const int first = __shfl_sync(kFullWarp, own.first, y - top),
                          last = __shfl_sync(kFullWarp, own.end, y - top);
                const uint32_t next_row = __shfl_sync(kFullWarp, up_to, y - top);
                for (int x = first + lane; x < last; x += kWarp)
                    write(next_row - (last - x), TileId(first_of_view + y * p.grid.tiles_x + x));
            }
            at = __shfl_sync(kFullWarp, up_to, kWarp - 1);
        }
        // preprocess counted with the same function; should rounding ever differ between the two kernels, no entry may
        // stay unwritten.
        for (at += lane; at < end; at += kWarp) write(at, TileId(no_tile(p.grid)));
    }
}

// A thread looks at 16 bytes of sorted tile ids, and writes down where a tile begins or ends there.
template <typename TileId>
constexpr int kIdsPerThread = 16 / sizeof(TileId);

template <typename TileId>
__global__ void __launch_bounds__(kThreads)
    ranges_kernel(const TileId* tiles, int64_t entries, uint32_t tile_count, uint32_t* ranges) {
    constexpr int kIds = kIdsPerThread<TileId>;
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kIds;
    if (first >= entries) return;
    alignas(16) TileId own[kIds];
    const int count = int(::min(entries - first, int64_t(kIds)));
    if (count == kIds)
        *reinterpret_cast<uint4*>(own) = *reinterpret_cast<const uint4*>(tiles + first);
    else
        for (int k = 0; k < count; ++k) own[k] = tiles[first + k];

    uint32_t before = first > 0 ? tiles[first - 1] : UINT32_MAX;
#pragma unroll
    for (int k = 0; k < kIds; ++k) {
        if (k == count) break;
        const uint32_t tile = own[k], i = uint32_t(first) + k;
        if (tile != before) {
            if (tile < tile_count) ranges[2 * int64_t(tile)] = i;
            if (i > 0 && before < tile_count) ranges[2 * int64_t(before) + 1] = i;
        }
        if (i + 1 == entries && tile < tile_count) ranges[2 * int64_t(tile) + 1] = i + 1;
        before = tile;
    }
}

template <typename TileId>
bool sort_and_mark(const SortByTile& p, Stream stream) {
    cub::DoubleBuffer<TileId> tiles(static_cast<TileId*>(p.tiles), static_cast<TileId*>(p.tiles_too));
    cub::DoubleBuffer<uint32_t> ids(p.ids, p.ids_too);
    size_t bytes = p.workspace_bytes;
    check(cub::DeviceRadixSort::SortPairs(p.workspace, bytes, tiles, ids, int(p.entries), 0,
                                          bits_for(uint32_t(p.grid.tiles())), native(stream)),
          "sorting by tile");
    ranges_kernel<TileId><<<blocks_for(p.entries, kThreads * kIdsPerThread<TileId>), kThreads, 0, native(stream)>>>(
        tiles.Current(), p.entries, uint32_t(p.grid.tiles()), p.ranges);
    check_launch("ranges_kernel");
    return ids.Current() == p.ids_too;
}

template <typename TileId>
size_t sort_workspace(const TileGrid& grid, int64_t entries) {
    size_t bytes = 0;
    cub::DoubleBuffer<TileId> tiles;
    cub::DoubleBuffer<uint32_t> ids;
    check(
        cub::DeviceRadixSort::SortPairs(nullptr, bytes, tiles, ids, int(entries), 0, bits_for(uint32_t(grid.tiles()))),
        "sizing the tile sort");
    return bytes;
}

}  // namespace

size_t key_sort_workspace(int64_t count) {
    size_t bytes = 0;
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                          static_cast<uint32_t*>(nullptr), static_cast<const uint32_t*>(nullptr),
                                          static_cast<uint32_t*>(nullptr), int(count), 0, 31),
          "sizing the sort by key");
    return bytes;
}

void sort_by_key(int64_t count, const uint32_t* keys, uint32_t* keys_out, const uint32_t* indices,
                 uint32_t* indices_out, void* workspace, size_t workspace_bytes, Stream stream) {
    if (count == 0) return;
    check(cub::DeviceRadixSort::SortPairs(
              workspace, workspace_bytes, keys, keys_out, indices, indices_out, int(count), 0, 31,
              native(stream)),  // no key has its highest bit: depths are positive, Morton codes are short
          "sorting by key");
}

void begin_lists(const BeginLists& args, Stream stream) {
    const int64_t numbers = std::max(emit_blocks(args.count), int64_t(2) * args.grid.tiles());
    begin_lists_kernel<<<blocks_for(numbers, kThreads), kThreads, 0, native(stream)>>>(args, emit_blocks(args.count),
                                                                                       int64_t(2) * args.grid.tiles());
    check_launch("begin_lists_kernel");
}

int64_t emit_blocks(int64_t count) { return blocks_for(count, kThreads); }

void emit(const Emit& args, Stream stream) {
    if (args.count == 0) return;
    const auto launch = [&](auto kernel, auto large_kernel) {
        kernel<<<unsigned(emit_blocks(args.count)), kThreads, 0, native(stream)>>>(args);
        check_launch("emit_kernel");
        large_kernel<<<::min(blocks_for(args.count, kThreads / kWarp), 1024u), kThreads, 0, native(stream)>>>(args);
        check_launch("emit_large_kernel");
    };
    small_tile_ids(args.grid) ? launch(emit_kernel<uint16_t>, emit_large_kernel<uint16_t>)
                              : launch(emit_kernel<uint32_t>, emit_large_kernel<uint32_t>);
}

size_t tile_sort_workspace(const TileGrid& grid, int64_t entries) {
    return small_tile_ids(grid) ? sort_workspace<uint16_t>(grid, entries) : sort_workspace<uint32_t>(grid, entries);
}

bool sort_by_tile(const SortByTile& args, Stream stream) {
    if (args.entries == 0) return false;
    return small_tile_ids(args.grid) ? sort_and_mark<uint16_t>(args, stream) : sort_and_mark<uint32_t>(args, stream);
}

}  // namespace gs::cuda
