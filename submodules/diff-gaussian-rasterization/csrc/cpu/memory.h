// memory.h: large blocks that are given back and handed out again, iteration after iteration.
//
// Fresh memory costs a page fault per 4 KB, more than many a stage takes to fill it. So freed blocks are kept for the next
// time, up to kKeep bytes in all. Blocks are aligned to a cache line and hold anything.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gs::cpu {

constexpr size_t kKeep = size_t(512) << 20;

void* acquire(size_t bytes);
void release(void* block);

// A block that grows; freed at the end of its scope.
struct Buffer {
    void* data = nullptr;
    size_t capacity = 0;

    Buffer() = default;
    explicit Buffer(size_t bytes) : data(acquire(bytes)), capacity(bytes) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(data); }

    void grow(size_t bytes);  // at least to `bytes`, keeping what it holds
    template <typename T> T* as() const { return static_cast<T*>(data); }
};

}  // namespace gs::cpu
