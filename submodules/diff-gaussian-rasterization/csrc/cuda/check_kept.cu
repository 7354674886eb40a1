// What the forward kept for the backward, after it has been in other hands: does every index still lead into its array?
//
// The host does not wait for the answer: an assertion stops the GPU before a later kernel reads anything, and the next
// call that waits reports it. One pass over the lists, small beside the walk that follows.
#undef NDEBUG  // the assertions are the point
#include <cassert>

#include "blend.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 256;

struct Kept {
    BlendBackward p;
    int64_t count;  // N
    int64_t tiles, max_segments, pixels;
};

struct List {
    uint32_t begin, length;
    __device__ __forceinline__ List(const Kept& k, int64_t tile) {
        const uint2 range = reinterpret_cast<const uint2*>(k.p.ranges)[tile];
        assert(range.x <= range.y && range.y <= k.p.entries && "ranges lead into ids");
        begin = range.x, length = range.y - range.x;
    }
};

__device__ __forceinline__ void check_entry(const Kept& k, int64_t i) {
    assert(k.p.ids[i] < k.count && "ids are splats");
    if (k.p.ordered.pairs) assert(k.p.ordered.pairs[i] < k.p.entries && "pairs are entries");
}

// What a strip took lies within its tile's list.
__device__ __forceinline__ void check_strip(const Kept& k, int64_t i) {
    const uint32_t tile = uint32_t(i / kStrips), walked = k.p.trace.walked[i];
    const List list(k, tile);
    assert(walked <= (list.length + kWarp - 1) / kWarp && "strips walk the list of their tile");
    if (walked == 0 || walked <= list.length / kWarp) return;  // whole groups
    const uint32_t last = k.p.trace.taken[taken_at(tile, list.begin, walked - 1, int(i % kStrips))];
    assert(last >> list.length % kWarp == 0 && "strips take what is in the list");
}

__device__ __forceinline__ void check_segment(const Kept& k, int64_t i) {
    const uint2 task = reinterpret_cast<const uint2*>(k.p.trace.segments)[i];
    assert(task.x < k.tiles && "segments have a tile");
    assert(uint64_t(task.y) * kSegment < List(k, task.x).length && "segments lie in the list");
}

__device__ __forceinline__ void check_pixel(const Kept& k, int64_t i) {
    const TileGrid& grid = k.p.grid;
    const int column = int(i % grid.width);
    const int64_t row = i / grid.width, view = row / grid.height;
    const int64_t tile_row = view * grid.tiles_y + (row - view * grid.height) / kTileSize;
    const List list(k, tile_row * grid.tiles_x + column / kTileSize);
    assert(k.p.trace.stop[i] <= list.length && "pixels stop in the list");
}

// Only where sums are made in a fixed order.
__device__ __forceinline__ void check_rank(const Kept& k, int64_t i) {
    assert(k.p.ordered.offsets[i] <= k.p.entries && "offsets lead into pairs");
    assert(k.p.ordered.depth_order[i] < k.count && "the order is of splats");
}

__global__ void __launch_bounds__(kThreads) check_kept_kernel(Kept k) {
    const Totals totals = *k.p.totals;
    const int64_t strips = k.tiles * kStrips;
    assert(totals.segments <= k.max_segments && totals.visible <= k.count && totals.entries == k.p.entries &&
           "totals are those of the lists");
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = first; i < k.p.entries; i += step) check_entry(k, i);
    for (int64_t i = first; i < strips; i += step) check_strip(k, i);
    for (int64_t i = first; i < int64_t(totals.segments); i += step) check_segment(k, i);
    for (int64_t i = first; i < k.pixels; i += step) check_pixel(k, i);
    if (k.p.ordered.offsets)
        for (int64_t i = first; i < int64_t(totals.visible); i += step) check_rank(k, i);
}

__global__ void __launch_bounds__(kThreads) check_lists_kernel(Kept k) {
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
    const Totals totals = *k.p.totals;
    assert(totals.visible <= k.count && "totals are those of the lists");
    for (int64_t i = first; i < k.p.entries; i += step) check_entry(k, i);
    for (int64_t i = first; i < k.tiles; i += step) List(k, i);
    if (k.p.ordered.offsets)
        for (int64_t i = first; i < int64_t(totals.visible); i += step) check_rank(k, i);
}

}  // namespace

void check_lists(const BlendBackward& args, int64_t count, Stream stream) {
    const unsigned blocks = std::min(blocks_for(std::max(args.entries, int64_t(args.grid.tiles())), kThreads), 4096u);
    check_lists_kernel<<<blocks, kThreads, 0, native(stream)>>>({args, count, args.grid.tiles(), 0, 0});
    check_launch("check_lists_kernel");
}

void check_kept(const BlendBackward& args, int64_t count, Stream stream) {
    const int64_t most = std::max(args.entries, args.grid.pixels());
    const unsigned blocks = std::min(blocks_for(most, kThreads), 4096u);
    check_kept_kernel<<<blocks, kThreads, 0, native(stream)>>>(
        {args, count, args.grid.tiles(), max_segments(args.grid, args.entries), args.grid.pixels()});
    check_launch("check_kept_kernel");
}

}  // namespace gs::cuda
