// scores.h: what each splat does to the picture, by one walk front to back. Sums of every entry go into a record of its own:
//     0 weight alpha T     1 pixels     2 of these, those that more than half of the light reaches
//     3 (d(sum of C)/dalpha)^2     4 (dL/dalpha)^2     5 dL/dlog(opacity)     6 its square
// With P the picture so far, this splat included, and C the whole: dC/dalpha = T c - (C - P) / (1 - alpha).
#pragma once
#include "features.h"

namespace gs::cpu::GS_ISA {

// What a block's pixels carry from splat to splat.
struct ScoreBlock {
    Light light;
    F best;                      // the largest contribution so far
    I largest, median;           // positions in the tile's list
    F weight, picture, along;    // this pixel's: weight, sum of channels in the end, and its product with the gradient
    F red, green, blue;          // gradient
    F seen_picture, seen_along;  // so far
};

struct ScoreSums { F sum[kScores]; };

// `color` is null where nobody asks for moments.
GS_INLINE void score_visit(ScoreBlock& s, ScoreSums& sums, const Number* color, int32_t position, M taken, F uncapped,
                           F weight, F before, F behind) {
    F* const sum = sums.sum;
    const F one = F(1), zero = F(0), half = F(0.5);
    sum[0] = fma(weight, s.weight, sum[0]);
    sum[1] = sum[1] + select(taken, one, zero);
    sum[2] = sum[2] + select(taken & (before > half), one, zero);
    const M more = weight > s.best;
    s.best = select(more, weight, s.best);
    s.largest = select(more, &position, s.largest);
    s.median = select((before > half) & (behind <= half), &position, s.median);
    if (!color) return;
    const F all = F(color[0] + color[1] + color[2]);
    const F along = fma(F(color[0]), s.red, fma(F(color[1]), s.green, F(color[2]) * s.blue));
    s.seen_picture = fma(weight, all, s.seen_picture), s.seen_along = fma(weight, along, s.seen_along);
    const F inv = recip(one - min(uncapped, F(kAlphaMax)));
    const F of_picture = zero_unless(taken, fma(before, all, (s.seen_picture - s.picture) * inv));
    const F of_loss = zero_unless(taken, fma(before, along, (s.seen_along - s.along) * inv)), g = of_loss * uncapped;
    sum[3] = fma(of_picture, of_picture, sum[3]);
    sum[4] = fma(of_loss, of_loss, sum[4]);
    sum[5] = sum[5] + g;
    sum[6] = fma(g, g, sum[6]);
}

GS_INLINE void begin_score_block(const TilePlace& t, const Scores<Number>& a, int b, ScoreBlock& s) {
    const F zero = F(0);
    const int64_t plane = int64_t(t.width) * t.height;
    const auto pixels = [&](const Number* from) { return from ? load_block(from, t, b) : zero; };
    s.best = s.seen_picture = s.seen_along = zero;
    s.largest = s.median = I(-1);
    s.weight = a.weights ? load_block(a.weights, t, b) : F(1);
    s.picture = pixels(a.picture), s.along = pixels(a.along);
    s.red = pixels(a.gradient);
    s.green = pixels(a.gradient ? a.gradient + plane : nullptr);
    s.blue = pixels(a.gradient ? a.gradient + 2 * plane : nullptr);
}

// Positions in the tile's list become splats.
GS_INLINE void store_splats(const Frame<Number>& f, const TilePlace& t, int64_t begin, int b, I position,
                            int32_t* picture) {
    int32_t lane[kLanes];
    store(lane, position);
    for (int i = 0; i < kLanes; ++i) {
        const int x = t.x + pixel_x(b, i), y = t.y + pixel_y(b, i);
        if (x < t.width && y < t.height)
            picture[int64_t(y) * t.width + x] = lane[i] < 0 ? -1 : f.entries[begin + lane[i]].splat;
    }
}

static void scores_tile(const Frame<Number>& f, const Number* offset, const Scores<Number>& a, Number* records,
                        ScoreSums* sums_of, int64_t tile) {
    const TilePlace t = place(f, tile);
    const Targets target(t, offset);
    const int64_t begin = f.tile_begin[tile], end = f.tile_begin[tile + 1];
    Light light[kBlocks];
    ScoreBlock state[kBlocks];
    Batch batch;
    uint32_t alive = begin_blocks(t, light);
    for (int b = 0; b < kBlocks; ++b) begin_score_block(t, a, b, state[b]), state[b].light = light[b];
    for (int64_t base = begin; base < end; base += kBatch) {
        const int count = end - base < kBatch ? int(end - base) : kBatch;
        begin_batch(f, t, base, count, begin, batch);
        for (int j = 0; j < count; ++j)
            for (F& x : sums_of[j].sum) x = F(0);
        for (uint32_t todo = alive; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo);
            ScoreBlock& s = state[b];
            const auto visit = [&](int j, M taken, F uncapped, F weight, F before, F behind) {
                const Number* color = a.colors ? a.colors + 3 * int64_t(f.entries[base + j].splat) : nullptr;
                score_visit(s, sums_of[j], color, batch.position[j], taken, uncapped, weight, before, behind);
            };
            walk_block(s.light, batch.hits[b], batch, target.x[b], target.y[b], visit);
            if (!any(s.light.through >= F(kStopAt))) alive &= ~(1u << b);
        }
        for (int j = 0; j < count; ++j)
            store_some(records + int64_t(f.entries[base + j].slot) * kScores, sums<kScores>(sums_of[j].sum), kScores);
    }
    for (int b = 0; b < kBlocks; ++b) {
        store_splats(f, t, begin, b, state[b].largest, a.largest);
        store_splats(f, t, begin, b, state[b].median, a.median);
    }
}

// Rows of a.sums whose splats are visible.
static void scores(const Frame<Number>& f, const Number* offset, const Scores<Number>& a) {
    Buffer records(f.tile_begin[f.tiles()] * kScores * sizeof(Number));
    parallel(f.tiles(), [&](int64_t i) {
        Buffer sums_of(kBatch * sizeof(ScoreSums));
        scores_tile(f, offset, a, records.as<Number>(), sums_of.as<ScoreSums>(), f.tile_order[i]);
    });
    parallel(f.chunks(), [&](int64_t chunk) {
        for (int32_t i = 0; i < f.visible_count[chunk]; ++i) {
            const int32_t n = f.visible[chunk * kChunk + i];
            for (int64_t slot = f.slots[n].begin; slot < int64_t(f.slots[n].end); ++slot)
                for (int k = 0; k < kScores; ++k)
                    a.sums[int64_t(n) * kScores + k] += records.as<Number>()[slot * kScores + k];
        }
    });
}

}  // namespace gs::cpu::GS_ISA
