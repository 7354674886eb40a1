// sort.cpp: a stable radix sort of (key, value) pairs, least significant digit first.
//
// Depths are positive, so their bits as an unsigned integer sort like the numbers. Only the digits in which keys differ are
// sorted. Each pass is counted and scattered piece by piece in parallel; pieces keep their order, so the result does
// not depend on how many there are.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu {
namespace {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

template <typename Key>
struct Pair {
    Key key;
    int32_t value;
};

// One pass: from -> to, by the digit at `shift`. counts: [pieces, kDigits]
template <typename Key>
void sort_digit(const Pair<Key>* from, Pair<Key>* to, int64_t count, int shift, Key least, int64_t pieces,
                uint32_t* counts) {
    const auto piece_begin = [&](int64_t piece) { return count * piece / pieces; };
    const auto digit = [&](Key key) { return int((key - least) >> shift) & (kDigits - 1); };
    parallel(pieces, [&](int64_t piece) {
        uint32_t* c = counts + piece * kDigits;
        std::memset(c, 0, kDigits * sizeof *c);
        for (int64_t i = piece_begin(piece); i < piece_begin(piece + 1); ++i) ++c[digit(from[i].key)];
    });
    uint32_t place = 0;
    for (int d = 0; d < kDigits; ++d) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const uint32_t here = counts[piece * kDigits + d];
            counts[piece * kDigits + d] = place;
            place += here;
        }
    }
    parallel(pieces, [&](int64_t piece) {
        uint32_t* c = counts + piece * kDigits;
        for (int64_t i = piece_begin(piece); i < piece_begin(piece + 1); ++i) to[c[digit(from[i].key)]++] = from[i];
    });
}

template <typename Key>
void sort_any(Key* keys, int32_t* values, int64_t count) {
    if (count < 2) return;
    const int64_t pieces = std::min<int64_t>(thread_count(), 1 + count / 16384);
    Buffer first(count * sizeof(Pair<Key>)), second(count * sizeof(Pair<Key>));
    Buffer counts(pieces * kDigits * sizeof(uint32_t));
    Pair<Key>*from = first.as<Pair<Key>>(), *to = second.as<Pair<Key>>();
    Key least = keys[0], most = keys[0];
    for (int64_t i = 0; i < count; ++i) {
        from[i] = {keys[i], values[i]};
        least = std::min(least, keys[i]), most = std::max(most, keys[i]);
    }
    for (int shift = 0; shift < int(8 * sizeof(Key)) && (most - least) >> shift; shift += kDigitBits) {
        sort_digit(from, to, count, shift, least, pieces, counts.as<uint32_t>());
        std::swap(from, to);
    }
    for (int64_t i = 0; i < count; ++i) keys[i] = from[i].key, values[i] = from[i].value;
}

}  // namespace

void sort_pairs(uint32_t* keys, int32_t* values, int64_t count) { sort_any(keys, values, count); }
void sort_pairs(uint64_t* keys, int32_t* values, int64_t count) { sort_any(keys, values, count); }

}  // namespace gs::cpu
