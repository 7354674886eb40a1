// features.h: any number of channels, blended by the very rule of blend.h, and back.
//
// A visit is one splat in one 4x4 block. The walk over a block's splats finds the weight of each visit; then the channels
// are added up a few at a time, which is most of the work and runs in registers. Backward, a visit needs the product of the
// splat's features with the gradient of every pixel, and each splat the sums of gradients times weights over its visits:
// a record per entry, as in blend_backward.h:
//     0..5   as there       6, 7   sums of |dL/dmean| per pixel, if wanted       8..   dL/dfeatures
// The derivative is linear in the channels, so many of them are taken in turns, which keeps the records small.
#pragma once
#include "blend_backward.h"
#include "project_backward.h"

namespace gs::cpu::GS_ISA {

constexpr int kAtOnce = GS_WIDTH == 16 ? 16 : 4;  // channels whose sums stay in registers
constexpr int kTurn = 40;                         // channels of one turn of the backward
constexpr int kMoments = 8;                       // numbers of a record before the features

// Where the pixels of a tile look.
struct Targets {
    F x[kBlocks], y[kBlocks];
    GS_MEMBER Targets(const TilePlace& t, const Number* offset) {
        const PixelCenters centers(t);
        for (int b = 0; b < kBlocks; ++b) {
            x[b] = centers.x[b & 3], y[b] = centers.y[b >> 2];
            if (!offset) continue;
            x[b] = x[b] + load_block(offset, t, b);
            y[b] = y[b] + load_block(offset + int64_t(t.width) * t.height, t, b);
        }
    }
};

// The light of a block's pixels: as in BlockState.
struct Light { F through, T; };

// Calls visit(j, taken, uncapped alpha, weight, T before, T behind) for each listed splat that a pixel of the block takes.
template <typename Visit>
GS_INLINE void walk_block(Light& light, uint64_t list, const Batch& batch, F px, F py, Visit visit) {
    Light s = light;
    while (list) {
        const int j = __builtin_ctzll(list);
        list &= list - 1;
        const Splat<Number>& splat = batch.splat[j];
        const F q = log2_alpha(splat, px - F(splat.x), py - F(splat.y));
        const M lit = q >= F(kLog2AlphaMin);
        const F uncapped = zero_unless(lit, ex2_near(q)), alpha = min(uncapped, F(kAlphaMax));
        const F weight = alpha * s.through;
        s.through = fma(-alpha, s.through, s.through);
        const M open = s.through >= F(kStopAt), taken = lit & open;
        const F before = s.T;
        s.T = select(open, s.through, s.T);
        if (any(taken)) visit(j, taken, uncapped, zero_unless(open, weight), before, s.T);
        if (!any(open)) break;
    }
    light = s;
}

// sum[i] += weight[k] rows[k][i], for Count channels.
template <int Count>
GS_INLINE void add_channels(F* sum, const F* weight, const Number* const* rows, int visits, int channel) {
    F s[Count];
    for (int i = 0; i < Count; ++i) s[i] = sum[channel + i];
    for (int k = 0; k < visits; ++k) {
        const F w = weight[k];
        const Number* row = rows[k] + channel;
        for (int i = 0; i < Count; ++i) s[i] = fma(w, F(row[i]), s[i]);
    }
    for (int i = 0; i < Count; ++i) sum[channel + i] = s[i];
}

GS_INLINE void add_visits(F* sum, const F* weight, const Number* const* rows, int visits, int channels) {
    int c = 0;
    for (; c + kAtOnce <= channels; c += kAtOnce) add_channels<kAtOnce>(sum, weight, rows, visits, c);
    for (; c + 4 <= channels; c += 4) add_channels<4>(sum, weight, rows, visits, c);
    for (; c < channels; ++c) add_channels<1>(sum, weight, rows, visits, c);
}

// The visits of one block in one batch, which leave what the backward wants to know.
GS_INLINE int weigh_block(Light& light, I& last, Batch& batch, int b, F px, F py, const Features<Number>& a,
                          const Entry* entries, F* weight, const Number** rows) {
    int visits = 0;
    walk_block(light, batch.hits[b], batch, px, py, [&](int j, M taken, F, F w, F, F) {
        weight[visits] = w;
        rows[visits++] = a.values + int64_t(entries[j].splat) * a.channels;
        last = select(taken, &batch.position[j], last);
        batch.touched[j] |= uint16_t(1u << b);
    });
    return visits;
}

// What a tile's blocks begin with; returns those with a pixel in the image.
GS_INLINE uint32_t begin_blocks(const TilePlace& t, Light* light) {
    uint32_t alive = 0;
    for (int b = 0; b < kBlocks; ++b) {
        const M inside = t.inside(b);
        light[b] = {select(inside, F(1), F(0)), F(1)};
        alive |= uint32_t(any(inside)) << b;
    }
    return alive;
}

GS_INLINE void begin_batch(const Frame<Number>& f, const TilePlace& t, int64_t base, int count, int64_t begin,
                           Batch& batch) {
    stage(f, t, base, count, batch, f.margin);
    for (int e = 0; e <= kBatch; ++e) batch.position[e] = int32_t(base - begin) + e;
}

// `sums` [16 blocks, channels] is room to work in.
static void blend_features_tile(const Frame<Number>& f, const Features<Number>& a, Number* image, Number* left, F* sums,
                                int64_t tile) {
    const TilePlace t = place(f, tile);
    const Targets target(t, a.offset);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1], plane = int64_t(f.width) * f.height;
    Light light[kBlocks];
    I last[kBlocks];
    Batch batch;
    uint32_t alive = begin_blocks(t, light);
    for (I& x : last) x = I(-1);
    for (int i = 0; i < kBlocks * a.channels; ++i) sums[i] = F(0);

    for (int64_t base = begin; base < end; base += kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        if (!alive) {
            std::memset(f.touched + base, 0, (end - base) * sizeof *f.touched);
            break;
        }
        begin_batch(f, t, base, count, begin, batch);
        for (uint32_t todo = alive; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo);
            F weight[kBatch];
            const Number* rows[kBatch];
            const int visits =
                weigh_block(light[b], last[b], batch, b, target.x[b], target.y[b], a, f.entries + base, weight, rows);
            add_visits(sums + b * a.channels, weight, rows, visits, a.channels);
            if (!any(light[b].through >= F(kStopAt))) alive &= ~(1u << b);
        }
        std::memcpy(f.touched + base, batch.touched, count * sizeof *f.touched);
    }
    for (int b = 0; b < kBlocks; ++b) {
        const int64_t at = tile * kBlocks * kLanes + b * kLanes;
        store(f.transmittance + at, light[b].T);
        store(f.last + at, last[b]);
        store_block(left, t, b, light[b].T);
        for (int c = 0; c < a.channels; ++c) store_block(image + c * plane, t, b, sums[b * a.channels + c]);
    }
}

// Three channels, as colors: by the kernels of blend.h.
static void blend_three(const Frame<Number>& f, const Features<Number>& a, Number* image, Number* left) {
    const Number background[3] = {0, 0, 0};
    parallel(f.chunks(), [&](int64_t chunk) {
        for (int32_t i = 0; i < f.visible_count[chunk]; ++i) {
            const int64_t n = f.visible[chunk * kChunk + i];
            std::memcpy(&f.splats[n].red, a.values + 3 * n, 3 * sizeof(Number));
        }
    });
    blend(f, background, {image, nullptr, nullptr, nullptr});
    parallel(f.tiles(), [&](int64_t tile) {
        for (int b = 0; b < kBlocks; ++b)
            store_block(left, place(f, tile), b, load(f.transmittance + (tile * kBlocks + b) * kLanes));
    });
}

static void blend_features(const Frame<Number>& f, const Features<Number>& a, Number* image, Number* left) {
    if (a.channels == 3 && !a.offset) return blend_three(f, a, image, left);
    parallel(f.tiles(), [&](int64_t i) {
        Buffer sums(kBlocks * a.channels * sizeof(F));
        blend_features_tile(f, a, image, left, sums.as<F>(), f.tile_order[i]);
    });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Channels [first, first + count) of the features, and their gradient in one tile.
struct Turn {
    const Number* values;  // of the first Gaussian, at `first`
    int stride, first, count;
    int pitch;  // vectors per block: count, rounded up to eights
    F* grad;    // [16 blocks, pitch], zeros behind the count

    GS_MEMBER int record() const { return (kMoments + count + kLanes - 1) / kLanes * kLanes; }
    GS_MEMBER const Number* row(int32_t splat) const { return values + int64_t(splat) * stride; }
};

GS_INLINE F dot_channels(const Number* row, const F* grad, int count) {
    F s[4] = {F(0), F(0), F(0), F(0)};
    int c = 0;
    for (; c + 4 <= count; c += 4)
        for (int i = 0; i < 4; ++i) s[i] = fma(F(row[c + i]), grad[c + i], s[i]);
    for (; c < count; ++c) s[0] = fma(F(row[c]), grad[c], s[0]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

// Of one splat over its visits: the moments of g.
template <bool kAbsolute>
GS_INLINE F sum_moments(const Splat<Number>& splat, uint32_t blocks, const Visit* v, const Targets& target) {
    F total[kMoments];
    for (F& t : total) t = F(0);
    for (; blocks; blocks &= blocks - 1, ++v) {
        const int b = __builtin_ctz(blocks);
        const F dx = target.x[b] - F(splat.x), dy = target.y[b] - F(splat.y), gx = v->g * dx, gy = v->g * dy;
        total[0] = total[0] + v->g;
        total[1] = total[1] + gx;
        total[2] = total[2] + gy;
        total[3] = fma(gx, dx, total[3]);
        total[4] = fma(gx, dy, total[4]);
        total[5] = fma(gy, dy, total[5]);
        if (kAbsolute) {
            total[6] = total[6] + abs(fma(F(2 * splat.a), gx, F(splat.b) * gy));
            total[7] = total[7] + abs(fma(F(2 * splat.c), gy, F(splat.b) * gx));
        }
    }
    return sums<kMoments>(total);
}

// Eight channels from `channel` on of the features' gradient.
GS_INLINE F sum_channels(uint32_t blocks, const Visit* v, const Turn& turn, int channel) {
    F total[8];
    for (F& t : total) t = F(0);
    for (; blocks; blocks &= blocks - 1, ++v) {
        const F* grad = turn.grad + __builtin_ctz(blocks) * turn.pitch + channel;
        for (int i = 0; i < 8; ++i) total[i] = fma(v->weight, grad[i], total[i]);
    }
    return sums<8>(total);
}

GS_INLINE void write_record(const BackwardBatch& batch, int j, const Turn& turn, const Targets& target, bool absolute,
                            Number* record) {
    const uint32_t blocks = batch.touched[j];
    const Visit* v = batch.visit + batch.first_visit[j];
    store_some(record,
               absolute ? sum_moments<true>(batch.splat[j], blocks, v, target)
                        : sum_moments<false>(batch.splat[j], blocks, v, target),
               kMoments);
    for (int c = 0; c < turn.pitch; c += 8) store_some(record + kMoments + c, sum_channels(blocks, v, turn, c), 8);
    for (int c = kMoments + turn.pitch; c < turn.record(); ++c) record[c] = 0;
}

static void features_backward_tile(const Frame<Number>& f, const Number* offset, const FeatureGrads<Number>& grads,
                                   const Turn& turn, Number* records, int64_t tile) {
    const TilePlace t = place(f, tile);
    const Targets target(t, offset);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1], plane = int64_t(f.width) * f.height;
    Behind state[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
        const int64_t at = tile * kBlocks * kLanes + b * kLanes;
        // The light that passes is a channel of its own, which is one behind all splats; it belongs to the first turn.
        const bool light = grads.left && turn.first == 0;
        state[b] = {load(f.transmittance + at), light ? load_block(grads.left, t, b) : F(0), load(f.last + at)};
        for (int c = 0; c < turn.pitch; ++c)
            turn.grad[b * turn.pitch + c] =
                c < turn.count && grads.image ? load_block(grads.image + (turn.first + c) * plane, t, b) : F(0);
    }
    BackwardBatch batch;
    for (int64_t base = begin + (end - begin - 1) / kBatch * kBatch; base >= begin && begin < end; base -= kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        begin_backward_batch(f, base, count, begin, batch);
        for (int b = 0; b < kBlocks; ++b) {
            const uint64_t list = column_of_bits(batch.touched, b);
            if (!list) continue;
            revisit_block(state[b], list, batch, b, target.x[b], target.y[b], [&](int j) {
                return dot_channels(turn.row(f.entries[base + j].splat), turn.grad + b * turn.pitch, turn.count);
            });
        }
        for (int j = 0; j < count; ++j)
            write_record(batch, j, turn, target, grads.screen.absolute != nullptr,
                         records + int64_t(f.entries[base + j].slot) * turn.record());
    }
}

// From the sum of a splat's records to the gradients of what blending was given.
GS_INLINE void add_screen_grads(const OnScreen<Number>& s, int32_t n, const Number* sum,
                                const OnScreenGrads<Number>& out) {
    const Number xx = s.conics[3 * n], xy = s.conics[3 * n + 1], yy = s.conics[3 * n + 2];
    out.means2d[2 * n] += xx * sum[1] + xy * sum[2];
    out.means2d[2 * n + 1] += xy * sum[1] + yy * sum[2];
    out.conics[3 * n] -= Number(0.5) * sum[3];
    out.conics[3 * n + 1] -= sum[4];
    out.conics[3 * n + 2] -= Number(0.5) * sum[5];
    if (s.opacities[n] > 0) out.opacities[n] += sum[0] / s.opacities[n];
    if (out.absolute) out.absolute[2 * n] += Number(kLn2) * sum[6], out.absolute[2 * n + 1] += Number(kLn2) * sum[7];
}

static void add_feature_records(const Frame<Number>& f, const OnScreen<Number>& s, const Turn& turn,
                                const Number* records, int64_t chunk, const FeatureGrads<Number>& out) {
    const int size = turn.record();
    F sum[(kMoments + kTurn + kLanes - 1) / kLanes];
    Number numbers[kMoments + kTurn + kLanes];
    for (int32_t i = 0; i < f.visible_count[chunk]; ++i) {
        const int32_t n = f.visible[chunk * kChunk + i];
        const SlotRange slots = f.slots[n];
        for (int k = 0; k < size / kLanes; ++k) sum[k] = F(0);
        for (int64_t slot = slots.begin; slot < int64_t(slots.end); ++slot)
            for (int k = 0; k < size / kLanes; ++k) sum[k] = sum[k] + load(records + slot * size + k * kLanes);
        for (int k = 0; k < size / kLanes; ++k) store(numbers + k * kLanes, sum[k]);
        add_screen_grads(s, n, numbers, out.screen);
        std::memcpy(out.values + int64_t(n) * turn.stride + turn.first, numbers + kMoments,
                    turn.count * sizeof(Number));
    }
}

// From the records of blend_backward.h.
static void add_three_records(const Frame<Number>& f, const OnScreen<Number>& s, const Number* records, int64_t chunk,
                              const FeatureGrads<Number>& out) {
    for (int32_t i = 0; i < f.visible_count[chunk]; ++i) {
        const int32_t n = f.visible[chunk * kChunk + i];
        Number sum[kLanes];
        store(sum, sum_records(records, f.slots[n]));
        std::memcpy(out.values + 3 * int64_t(n), sum + 6, 3 * sizeof(Number));
        sum[6] = sum[10], sum[7] = sum[11];
        add_screen_grads(s, n, sum, out.screen);
    }
}

// What color's backward calls the gradient of alpha is minus that of the light that passes.
static void blend_three_backward(const Frame<Number>& f, const OnScreen<Number>& s, const FeatureGrads<Number>& out) {
    const Number background[3] = {0, 0, 0};
    const int64_t plane = int64_t(f.width) * f.height;
    Buffer records(f.tile_begin[f.tiles()] * kRecord * sizeof(Number)), alpha(plane * sizeof(Number)), zeros;
    for (int64_t i = 0; out.left && i < plane; ++i) alpha.as<Number>()[i] = -out.left[i];
    if (!out.image) {
        zeros.grow(3 * plane * sizeof(Number));
        std::memset(zeros.data, 0, 3 * plane * sizeof(Number));
    }
    blend_backward(f, background,
                   {out.image ? out.image : zeros.as<Number>(), out.left ? alpha.as<Number>() : nullptr, nullptr},
                   out.screen.absolute != nullptr, records.as<Number>(), nullptr);
    parallel(f.chunks(), [&](int64_t chunk) { add_three_records(f, s, records.as<Number>(), chunk, out); });
}

// Adds to out.screen and sets the rows of out.values whose splats are visible.
static void blend_features_backward(const Frame<Number>& f, const Features<Number>& a, const OnScreen<Number>& s,
                                    const FeatureGrads<Number>& out) {
    if (a.channels == 3 && !a.offset) return blend_three_backward(f, s, out);
    Turn turn = {a.values, a.channels, 0, 0, 0, nullptr};
    const int64_t entries = f.tile_begin[f.tiles()];
    for (; turn.first < a.channels; turn.first += kTurn) {
        turn.values = a.values + turn.first;
        turn.count = a.channels - turn.first < kTurn ? a.channels - turn.first : kTurn;
        turn.pitch = (turn.count + 7) / 8 * 8;
        Buffer records(entries * turn.record() * sizeof(Number));
        parallel(f.tiles(), [&](int64_t i) {
            Buffer grad(kBlocks * turn.pitch * sizeof(F));
            Turn own = turn;
            own.grad = grad.as<F>();
            features_backward_tile(f, a.offset, out, own, records.as<Number>(), f.tile_order[i]);
        });
        parallel(f.chunks(), [&](int64_t chunk) { add_feature_records(f, s, turn, records.as<Number>(), chunk, out); });
    }
}

}  // namespace gs::cpu::GS_ISA
