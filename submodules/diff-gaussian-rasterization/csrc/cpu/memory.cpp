// memory.cpp: see memory.h.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

namespace gs::cpu {
namespace {

constexpr size_t kAlign = 64, kHugePage = size_t(2) << 20;

#if defined(_WIN32)
void* allocate(size_t align, size_t bytes) { return _aligned_malloc(bytes, align); }
void deallocate(void* memory) { _aligned_free(memory); }
#else
void* allocate(size_t align, size_t bytes) { return std::aligned_alloc(align, bytes); }
void deallocate(void* memory) { std::free(memory); }
#endif

// Lies before every block.
struct alignas(kAlign) Header { size_t size; };

struct Pool {
    std::mutex mutex;
    std::vector<Header*> idle;  // oldest first
    size_t bytes = 0;
};

Pool& pool() {  // never destroyed: tensors may outlive everything else at exit
    static Pool* p = new Pool;
    return *p;
}

// Sizes are rounded up by at most an eighth, so that a slightly different view finds its block again.
size_t size_class(size_t bytes) {
    size_t step = kAlign;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

Header* take_idle(size_t size) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.idle.size();
    for (size_t i = 0; i < p.idle.size(); ++i) {
        const size_t have = p.idle[i]->size;
        if (have >= size && have <= size + size / 2 && (best == p.idle.size() || have < p.idle[best]->size)) best = i;
    }
    if (best == p.idle.size()) return nullptr;
    Header* h = p.idle[best];
    p.idle.erase(p.idle.begin() + best);
    p.bytes -= h->size;
    return h;
}

}  // namespace

void* acquire(size_t bytes) {
    const size_t size = size_class(bytes < 1 ? 1 : bytes);
    Header* h = take_idle(size);
    if (!h) {
        const size_t total = sizeof(Header) + size, align = total >= kHugePage ? kHugePage : kAlign;
        h = static_cast<Header*>(allocate(align, (total + align - 1) / align * align));
        if (!h) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (align == kHugePage) madvise(h, total, MADV_HUGEPAGE);
#endif
        h->size = size;
    }
    return h + 1;
}

void release(void* block) {
    if (!block) return;
    Header* h = static_cast<Header*>(block) - 1;
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    p.idle.push_back(h);
    p.bytes += h->size;
    while (p.bytes > kKeep) {
        p.bytes -= p.idle.front()->size;
        deallocate(p.idle.front());
        p.idle.erase(p.idle.begin());
    }
}

void Buffer::grow(size_t bytes) {
    if (bytes <= capacity) return;
    const size_t larger = bytes > 2 * capacity ? bytes : 2 * capacity;
    void* block = acquire(larger);
    if (data) std::memcpy(block, data, capacity);
    release(data);
    data = block;
    capacity = larger;
}

}  // namespace gs::cpu
