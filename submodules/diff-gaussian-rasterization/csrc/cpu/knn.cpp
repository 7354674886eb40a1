// knn.cpp: the three nearest neighbors of every point, exactly, with a k-d tree.
//
// The points are split at the median of the widest axis until few are left; those lie side by side. A query looks into the
// half that holds it first, and into the other only if the three best so far reach over the split.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/constants.h"
#include "memory.h"
#include "stages.h"
#include "threads.h"

namespace gs::cpu {
namespace {

constexpr int64_t kLeaf = 8;

template <typename T>
struct Point {
    T at[3];
    int32_t index;
};

template <typename T>
struct Nearest {
    T dist2[3] = {std::numeric_limits<T>::infinity(), std::numeric_limits<T>::infinity(),
                  std::numeric_limits<T>::infinity()};  // ascending

    void add(T d) {
        if (d >= dist2[2]) return;
        dist2[2] = d < dist2[1] ? dist2[1] : d;
        dist2[1] = d < dist2[0] ? dist2[0] : d < dist2[1] ? d : dist2[1];
        dist2[0] = d < dist2[0] ? d : dist2[0];
    }
};

template <typename T>
struct Split {
    T at;
    int axis;
};

template <typename T>
struct Tree {
    Point<T>* points;
    Split<T>* splits;  // by node; the children of node i are 2i + 1 and 2i + 2

    void split(int64_t node, int64_t begin, int64_t end) {
        T low[3], high[3];
        for (int a = 0; a < 3; ++a) low[a] = high[a] = points[begin].at[a];
        for (int64_t i = begin; i < end; ++i) {
            for (int a = 0; a < 3; ++a) {
                low[a] = std::min(low[a], points[i].at[a]), high[a] = std::max(high[a], points[i].at[a]);
            }
        }
        int axis = 0;
        for (int a = 1; a < 3; ++a)
            if (high[a] - low[a] > high[axis] - low[axis]) axis = a;
        const int64_t middle = begin + (end - begin) / 2;
        std::nth_element(points + begin, points + middle, points + end,
                         [axis](const Point<T>& p, const Point<T>& q) { return p.at[axis] < q.at[axis]; });
        splits[node] = {points[middle].at[axis], axis};
    }

    void build(int64_t node, int64_t begin, int64_t end) {
        if (end - begin <= kLeaf) return;
        split(node, begin, end);
        const int64_t middle = begin + (end - begin) / 2;
        build(2 * node + 1, begin, middle);
        build(2 * node + 2, middle, end);
    }

    void search(int64_t node, int64_t begin, int64_t end, int64_t self, Nearest<T>& best) const {
        const Point<T>& q = points[self];
        if (end - begin <= kLeaf) {
            for (int64_t i = begin; i < end; ++i) {
                if (i == self) continue;
                const T x = points[i].at[0] - q.at[0], y = points[i].at[1] - q.at[1], z = points[i].at[2] - q.at[2];
                best.add(x * x + y * y + z * z);
            }
            return;
        }
        const int64_t middle = begin + (end - begin) / 2;
        const T over = q.at[splits[node].axis] - splits[node].at;
        if (over < 0) {
            search(2 * node + 1, begin, middle, self, best);
            if (over * over < best.dist2[2]) search(2 * node + 2, middle, end, self, best);
        } else {
            search(2 * node + 2, middle, end, self, best);
            if (over * over < best.dist2[2]) search(2 * node + 1, begin, middle, self, best);
        }
    }
};

// The parts that a tree of `levels` levels leaves below it, to be built at the same time.
template <typename T>
void build_in_parallel(Tree<T>& tree, int64_t count) {
    struct Part { int64_t node, begin, end; };
    constexpr int kParts = 16;
    Part part[kParts] = {{0, 0, count}};
    for (int parts = 1; parts < kParts; parts *= 2) {
        parallel(parts, [&](int64_t i) {
            if (part[i].end - part[i].begin > kLeaf) tree.split(part[i].node, part[i].begin, part[i].end);
        });
        for (int i = parts - 1; i >= 0; --i) {
            const Part p = part[i];
            const bool leaf = p.end - p.begin <= kLeaf;
            const int64_t middle = leaf ? p.end : p.begin + (p.end - p.begin) / 2;
            part[2 * i] = {2 * p.node + 1, p.begin, middle};
            part[2 * i + 1] = {2 * p.node + 2, middle, p.end};
        }
    }
    parallel(kParts, [&](int64_t i) { tree.build(part[i].node, part[i].begin, part[i].end); });
}

template <typename T>
void knn(const T* points, int64_t count, T* mean_dist2) {
    Buffer point_block((count + 1) * sizeof(Point<T>));
    Tree<T> tree = {point_block.as<Point<T>>(), nullptr};
    int64_t finite = 0;
    for (int64_t i = 0; i < count; ++i) {
        const T* p = points + 3 * i;
        mean_dist2[i] = std::numeric_limits<T>::quiet_NaN();  // of a point that is nowhere
        if (std::isfinite(p[0]) && std::isfinite(p[1]) && std::isfinite(p[2]))
            tree.points[finite++] = {{p[0], p[1], p[2]}, int32_t(i)};
    }
    int64_t nodes = 64;
    while (nodes < 2 * finite) nodes *= 2;
    Buffer split_block(nodes * sizeof(Split<T>));
    tree.splits = split_block.as<Split<T>>();
    build_in_parallel(tree, finite);

    const int64_t others = std::min<int64_t>(3, finite - 1);
    constexpr int64_t kTask = 1024;
    parallel((finite + kTask - 1) / kTask, [&](int64_t task) {
        for (int64_t i = task * kTask; i < std::min(finite, (task + 1) * kTask); ++i) {
            Nearest<T> best;
            tree.search(0, 0, finite, i, best);
            T sum = 0;
            for (int64_t k = 0; k < others; ++k) sum += best.dist2[k];
            mean_dist2[tree.points[i].index] = others ? sum / T(others) : T(0);
        }
    });
}

template <typename T>
void visible(const T* means, int64_t count, const T* world_to_camera, T near_depth, bool* out) {
    const T* w = world_to_camera + 8;
    for (int64_t i = 0; i < count; ++i) {
        const T* m = means + 3 * i;
        out[i] = w[0] * m[0] + w[1] * m[1] + w[2] * m[2] + w[3] > near_depth;
    }
}

}  // namespace

void knn_mean_dist2(const float* points, int64_t count, float* out) { knn(points, count, out); }
void knn_mean_dist2(const double* points, int64_t count, double* out) { knn(points, count, out); }
void mark_visible(const float* means, int64_t n, const float* world_to_camera, float near_depth, bool* out) {
    visible(means, n, world_to_camera, near_depth, out);
}
void mark_visible(const double* means, int64_t n, const double* world_to_camera, double near_depth, bool* out) {
    visible(means, n, world_to_camera, near_depth, out);
}

}  // namespace gs::cpu
