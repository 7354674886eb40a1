// records.h: sums in a fixed order. Whoever walks a tile leaves a record of every entry, and here those of a splat are added
// up one after the other.
#pragma once
#include "device.h"

namespace gs::cuda {

constexpr int kRecordThreads = 256;

// One thread per number of a splat: `per_entry` records of `size` numbers each.
template <typename Store>
__global__ void __launch_bounds__(kRecordThreads)
    add_records_kernel(Ordered o, const Totals* totals, int per_entry, int size, Store store) {
    const int64_t thread = int64_t(blockIdx.x) * kRecordThreads + threadIdx.x;
    const uint64_t rank = uint64_t(thread / size), visible = totals->visible;
    if (rank >= visible) return;
    const int slot = int(thread % size);
    const uint32_t end = rank + 1 < visible ? o.offsets[rank + 1] : uint32_t(totals->entries);
    double sum = 0.0;
    for (int64_t record = int64_t(o.offsets[rank]) * per_entry; record < int64_t(end) * per_entry; ++record)
        sum += o.records[record * size + slot];
    store(int64_t(o.depth_order[rank]), slot, float(sum));
}

// `store(id, slot, sum)` is called on the device.
template <typename Store>
void add_records(const Ordered& ordered, const Totals* totals, int per_entry, int size, Store store, Stream stream) {
    if (ordered.count == 0) return;
    add_records_kernel<<<blocks_for(ordered.count * size, kRecordThreads), kRecordThreads, 0, native(stream)>>>(
        ordered, totals, per_entry, size, store);
    check_launch("add_records_kernel");
}

}  // namespace gs::cuda
