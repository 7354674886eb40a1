// order.cpp: from the visible splats to the list of every tile, front to back.
//
// Splats are sorted by depth once. Then pieces of that order are walked in parallel: each finds the tiles of its splats and
// counts them per tile; running sums over tiles and pieces say where each piece writes in each tile's list, and a second
// walk writes. Depth order within a tile follows from that of the pieces, whatever their number.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "clock.h"
#include "memory.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu {
namespace {

// The visible splats' indices, front to back. Splats of equal depth keep the order of their indices.
template <typename T>
int64_t depth_order(const Frame<T>& f, const DepthKey<T>* keys, DepthKey<T>* sorted_keys, int32_t* order) {
    int64_t visible = 0;
    for (int64_t c = 0; c < f.chunks(); ++c) {
        const int64_t n = f.visible_count[c];
        std::memcpy(order + visible, f.visible + c * kChunk, n * sizeof *order);
        std::memcpy(sorted_keys + visible, keys + c * kChunk, n * sizeof *keys);
        visible += n;
    }
    sort_pairs(sorted_keys, order, visible);
    return visible;
}

template <typename T>
void order_tiles_by_cost(const Frame<T>& f) {
    Buffer keys(f.tiles() * sizeof(uint32_t));
    for (int64_t t = 0; t < f.tiles(); ++t) {
        keys.as<uint32_t>()[t] = ~uint32_t(std::min<int64_t>(f.tile_begin[t + 1] - f.tile_begin[t], INT32_MAX));
        f.tile_order[t] = int32_t(t);
    }
    sort_pairs(keys.as<uint32_t>(), f.tile_order, f.tiles());
}

struct Piece {
    Buffer tiles;  // the tiles of its splats, behind each other
    int64_t count = 0;
};

template <typename T>
int64_t bin_any(const Kernels<T>& kernels, Frame<T>& f, const DepthKey<T>* keys,
                void (*allocate)(void*, Frame<T>&, int64_t), void* context) {
    const int64_t tiles = f.tiles();
    Buffer key_block(f.count * sizeof *keys), order_block(f.count * sizeof(int32_t));
    int32_t* order = order_block.as<int32_t>();
    int64_t visible;
    {
        Clock clock(Stage::sort);
        visible = depth_order(f, keys, key_block.as<DepthKey<T>>(), order);
    }
    Clock clock(Stage::tiles);

    // Counters are pieces x tiles: few pieces where there are many tiles.
    const int64_t most = std::max<int64_t>(1, (int64_t(1) << 22) / tiles);
    const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(most, (visible + 2047) / 2048));
    const auto piece_begin = [&](int64_t p) { return visible * p / pieces; };
    std::unique_ptr<Piece[]> piece(new Piece[pieces]);
    Buffer per_tile_block(pieces * tiles * sizeof(uint32_t));
    uint32_t* per_tile = per_tile_block.as<uint32_t>();
    parallel(pieces, [&](int64_t p) {
        std::memset(per_tile + p * tiles, 0, tiles * sizeof *per_tile);
        piece[p].tiles.grow((piece_begin(p + 1) - piece_begin(p)) * 8 * sizeof(int32_t));
        piece[p].count =
            kernels.find_tiles(f, order, piece_begin(p), piece_begin(p + 1), piece[p].tiles, per_tile + p * tiles);
    });

    int64_t total = 0;
    for (int64_t p = 0; p < pieces; ++p) total += piece[p].count;
    if (total >= UINT32_MAX) throw std::runtime_error("too many splats in too many tiles: over 4 billion entries");
    allocate(context, f, total);

    int64_t place = 0;
    for (int64_t t = 0; t < tiles; ++t) {
        f.tile_begin[t] = place;
        for (int64_t p = 0; p < pieces; ++p) {
            const uint32_t here = per_tile[p * tiles + t];
            per_tile[p * tiles + t] = uint32_t(place);
            place += here;
        }
    }
    f.tile_begin[tiles] = place;

    // Slots go by the splats' own order, so that the backward pass reads its records from one end to the other.
    uint32_t slot = 0;
    for (int64_t c = 0; c < f.chunks(); ++c) {
        for (int32_t i = 0; i < f.visible_count[c]; ++i) {
            SlotRange& range = f.slots[f.visible[c * kChunk + i]];
            range = {slot, slot + range.end};
            slot = range.end;
        }
    }
    parallel(pieces, [&](int64_t p) {
        uint32_t* next = per_tile + p * tiles;
        const int32_t* tile = piece[p].tiles.template as<int32_t>();
        for (int64_t r = piece_begin(p); r < piece_begin(p + 1); ++r) {
            const SlotRange slots = f.slots[order[r]];
            for (uint32_t s = slots.begin; s < slots.end; ++s) f.entries[next[*tile++]++] = {order[r], s};
        }
    });
    order_tiles_by_cost(f);
    return total;
}

}  // namespace

template <>
int64_t bin(const Kernels<float>& kernels, Frame<float>& frame, const uint32_t* keys,
            void (*allocate)(void*, Frame<float>&, int64_t), void* context) {
    return bin_any(kernels, frame, keys, allocate, context);
}
template <>
int64_t bin(const Kernels<double>& kernels, Frame<double>& frame, const uint64_t* keys,
            void (*allocate)(void*, Frame<double>&, int64_t), void* context) {
    return bin_any(kernels, frame, keys, allocate, context);
}

}  // namespace gs::cpu
