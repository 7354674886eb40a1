// Mean squared distance of every point to its three nearest others, exactly. CUDA backend.
//
// Points are sorted along a Morton curve, so that neighbors in space are mostly neighbors in memory. Three neighbors on
// the curve bound the answer; then a point visits the boxes of 128 consecutive points, and the groups of 64 boxes, that
// come closer than what it has found.
#include "device.h"
#include "stages.h"

namespace gs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBoxPoints = 128, kGroupBoxes = 64;

struct Bounds { float3 low, high; };

struct Layout {
    uint32_t *bounds, *keys, *keys_sorted, *ids, *ids_sorted;
    float4* points;  // sorted; w is unused
    Bounds *boxes, *groups;
    void* sort;
    size_t sort_bytes, total;

    Layout(int64_t count, void* workspace) {
        char* base = static_cast<char*>(workspace);
        size_t at = 0;
        const auto take = [&](size_t bytes) {
            char* p = base + at;
            at += (bytes + 255) / 256 * 256;
            return p;
        };
        const int64_t box_count = (count + kBoxPoints - 1) / kBoxPoints;
        bounds = reinterpret_cast<uint32_t*>(take(6 * 4));
        for (uint32_t** p : {&keys, &keys_sorted, &ids, &ids_sorted}) *p = reinterpret_cast<uint32_t*>(take(count * 4));
        points = reinterpret_cast<float4*>(take(count * sizeof(float4)));
        boxes = reinterpret_cast<Bounds*>(take(box_count * sizeof(Bounds)));
        groups = reinterpret_cast<Bounds*>(take((box_count + kGroupBoxes - 1) / kGroupBoxes * sizeof(Bounds)));
        sort_bytes = key_sort_workspace(count);
        sort = take(sort_bytes);
        total = at;
    }
};

// Floats as unsigned numbers of the same order, for atomicMin and atomicMax.
__device__ __forceinline__ uint32_t ordered(float f) {
    const uint32_t u = __float_as_uint(f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t u) {
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

__global__ void reset_bounds_kernel(uint32_t* bounds) {
    if (threadIdx.x < 6) bounds[threadIdx.x] = threadIdx.x < 3 ? UINT32_MAX : 0u;
}

__global__ void __launch_bounds__(kThreads) bounds_kernel(int64_t count, const float* points, uint32_t* bounds) {
    __shared__ uint32_t shared[6];
    if (threadIdx.x < 6) shared[threadIdx.x] = threadIdx.x < 3 ? UINT32_MAX : 0u;
    __syncthreads();
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
        for (int c = 0; c < 3; ++c) {
            const float v = points[3 * i + c];
            if (!isfinite(v)) continue;
            atomicMin(shared + c, ordered(v));
            atomicMax(shared + 3 + c, ordered(v));
        }
    }
    __syncthreads();
    if (threadIdx.x < 3)
        atomicMin(bounds + threadIdx.x, shared[threadIdx.x]);
    else if (threadIdx.x < 6)
        atomicMax(bounds + threadIdx.x, shared[threadIdx.x]);
}

// 10 bits, two zeros between each and the next.
__device__ __forceinline__ uint32_t spread(uint32_t v) {
    v = (v | v << 16) & 0x030000ffu;
    v = (v | v << 8) & 0x0300f00fu;
    v = (v | v << 4) & 0x030c30c3u;
    return (v | v << 2) & 0x09249249u;
}

__global__ void __launch_bounds__(kThreads)
    morton_kernel(int64_t count, const float* points, const uint32_t* bounds, uint32_t* keys, uint32_t* ids) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    uint32_t key = 0;
    for (int c = 0; c < 3; ++c) {
        const float low = from_ordered(bounds[c]), extent = from_ordered(bounds[3 + c]) - low;
        const float place = extent > 0.f ? (points[3 * i + c] - low) / extent : 0.f;
        key |= spread(uint32_t(fminf(fmaxf(place, 0.f), 1.f) * 1023.f)) << c;
    }
    keys[i] = key;
    ids[i] = uint32_t(i);
}

__device__ __forceinline__ Bounds join(Bounds a, Bounds b) {
    return {{fminf(a.low.x, b.low.x), fminf(a.low.y, b.low.y), fminf(a.low.z, b.low.z)},
            {fmaxf(a.high.x, b.high.x), fmaxf(a.high.y, b.high.y), fmaxf(a.high.z, b.high.z)}};
}

constexpr float kInf = INFINITY;
__device__ __forceinline__ Bounds nothing() { return {{kInf, kInf, kInf}, {-kInf, -kInf, -kInf}}; }

// The join of all threads' bounds, in thread 0.
template <int Threads>
__device__ __forceinline__ Bounds block_join(Bounds own) {
    __shared__ Bounds shared[Threads];
    shared[threadIdx.x] = own;
    __syncthreads();
    for (int half = Threads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = join(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    return shared[0];
}

__global__ void __launch_bounds__(kBoxPoints)
    boxes_kernel(int64_t count, const float* points, const uint32_t* order, float4* sorted, Bounds* boxes) {
    const int64_t i = int64_t(blockIdx.x) * kBoxPoints + threadIdx.x;
    Bounds own = nothing();
    if (i < count) {
        const float* p = points + 3 * int64_t(order[i]);
        sorted[i] = {p[0], p[1], p[2], 0.f};
        own = {{p[0], p[1], p[2]}, {p[0], p[1], p[2]}};
    }
    const Bounds all = block_join<kBoxPoints>(own);
    if (threadIdx.x == 0) boxes[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kGroupBoxes) groups_kernel(int64_t box_count, const Bounds* boxes, Bounds* groups) {
    const int64_t i = int64_t(blockIdx.x) * kGroupBoxes + threadIdx.x;
    const Bounds all = block_join<kGroupBoxes>(i < box_count ? boxes[i] : nothing());
    if (threadIdx.x == 0) groups[blockIdx.x] = all;
}

__device__ __forceinline__ float dist2_to(const Bounds& b, float4 p) {
    const float x = fmaxf(fmaxf(b.low.x - p.x, p.x - b.high.x), 0.f);
    const float y = fmaxf(fmaxf(b.low.y - p.y, p.y - b.high.y), 0.f);
    const float z = fmaxf(fmaxf(b.low.z - p.z, p.z - b.high.z), 0.f);
    return x * x + y * y + z * z;
}

struct Nearest {
    float first = kInf, second = kInf, third = kInf;

    __device__ __forceinline__ void add(float4 p, float4 q) {
        const float x = p.x - q.x, y = p.y - q.y, z = p.z - q.z, d = x * x + y * y + z * z;
        if (d >= third) return;
        third = fmaxf(second, fminf(d, third));
        const float smaller = fminf(d, second);
        second = fmaxf(first, smaller);
        first = fminf(first, smaller);
    }
};

__global__ void __launch_bounds__(kThreads)
    search_kernel(int64_t count, const float4* points, const uint32_t* order, const Bounds* boxes, const Bounds* groups,
                  float* mean_dist2) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    const float4 p = points[i];
    Nearest guess, found;
    for (int64_t j = ::max(i - 3, int64_t(0)); j < ::min(i + 4, count); ++j)
        if (j != i) guess.add(p, points[j]);

    const int64_t box_count = (count + kBoxPoints - 1) / kBoxPoints;
    for (int64_t group = 0; group * kGroupBoxes < box_count; ++group) {
        if (dist2_to(groups[group], p) > fminf(guess.third, found.third)) continue;
        const int64_t last_box = ::min((group + 1) * kGroupBoxes, box_count);
        for (int64_t box = group * kGroupBoxes; box < last_box; ++box) {
            if (dist2_to(boxes[box], p) > fminf(guess.third, found.third)) continue;
            const int64_t end = ::min((box + 1) * kBoxPoints, count);
            for (int64_t j = box * kBoxPoints; j < end; ++j)
                if (j != i) found.add(p, points[j]);
        }
    }
    const int others = int(::min(count - 1, int64_t(3)));
    const float sum =
        (others > 0 ? found.first : 0.f) + (others > 1 ? found.second : 0.f) + (others > 2 ? found.third : 0.f);
    mean_dist2[order[i]] = others > 0 ? sum / float(others) : 0.f;
}

}  // namespace

size_t knn_workspace(int64_t count) { return Layout(count, nullptr).total; }

void knn_mean_dist2(int64_t count, const float* points, float* mean_dist2, void* workspace, size_t workspace_bytes,
                    Stream stream) {
    if (count == 0) return;
    Layout w(count, workspace);
    if (w.total > workspace_bytes) throw std::runtime_error("knn_mean_dist2: the workspace is too small");
    const cudaStream_t s = native(stream);
    const unsigned blocks = blocks_for(count, kThreads);
    const int64_t box_count = blocks_for(count, kBoxPoints);
    reset_bounds_kernel<<<1, kWarp, 0, s>>>(w.bounds);
    bounds_kernel<<<std::min(blocks, 264u), kThreads, 0, s>>>(count, points, w.bounds);
    morton_kernel<<<blocks, kThreads, 0, s>>>(count, points, w.bounds, w.keys, w.ids);
    sort_by_key(count, w.keys, w.keys_sorted, w.ids, w.ids_sorted, w.sort, w.sort_bytes, stream);
    boxes_kernel<<<unsigned(box_count), kBoxPoints, 0, s>>>(count, points, w.ids_sorted, w.points, w.boxes);
    groups_kernel<<<blocks_for(box_count, kGroupBoxes), kGroupBoxes, 0, s>>>(box_count, w.boxes, w.groups);
    search_kernel<<<blocks, kThreads, 0, s>>>(count, w.points, w.ids_sorted, w.boxes, w.groups, mean_dist2);
    check_launch("knn_mean_dist2");
}

}  // namespace gs::cuda
