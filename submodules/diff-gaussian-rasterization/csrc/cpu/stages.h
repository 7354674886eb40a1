// stages.h: the CPU backend as a list of stages. This is its table of contents.
//
//     project        every splat to the screen: radius, packed record, color                        (project.h)
//     depth_order    the visible ones, front to back                                                   (sort.cpp)
//     find_tiles     the tiles each splat reaches                                                         (bin.h)
//     bin            the splats of each tile, in depth order                                          (order.cpp)
//     blend          image, transmittance, and which 4x4 block each (tile, splat) entry touched        (blend.h)
//     blend_backward one gradient record per entry, nothing shared between tiles              (blend_backward.h)
//     project_backward  sums the records of a splat, and back to its parameters             (project_backward.h)
//     stage_project, pack, blend_features, scores: the stages for callers who take them one by one
//     photometric, ssim, adam                                                                 (loss.h, adam.h)
//     project_backward_and_step  both at once, for the fused training step                           (train.h)
//
// Stages take plain pointers and never allocate what outlives them. Each exists once per instruction set
// (Kernels<float>) and once in double (Kernels<double>); kernels<T>() picks.
// Work is cut into pieces that do not depend on the number of threads, and sums are taken in a fixed order:
// results are the same, bit for bit, however many threads there are.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/args.h"

namespace gs::cpu {

constexpr int kChunk = 1024;  // splats handled by one task

// A drawn splat: in float, one cache line. log2(alpha) = bias + a dx^2 + b dx dy + c dy^2.
template <typename T>
struct alignas(16) Splat {
    T x, y;     // mean, in pixels
    T a, b, c;  // -log2(e) times (Q.xx / 2, Q.xy, Q.yy / 2)
    T bias;     // log2 of the opacity; -infinity where the splat can show nowhere
    T red, green, blue;
    T inv_z;
    T radius;  // pixels
    T unused[5];
};

struct Entry {  // one splat in one tile
    int32_t splat;
    uint32_t slot;  // of its gradient record; those of one splat lie side by side, in the order of the splats
};

struct SlotRange { uint32_t begin, end; };

// What the forward pass finds out about one view, and the backward pass wants to know again.
template <typename T>
struct Frame {
    int64_t count;  // N
    int width, height, tiles_x, tiles_y;
    Splat<T>* splats;        // [N]          rows of visible splats only
    int32_t* visible;        // [N]          chunk by chunk: the visible ones of splats [kChunk i, kChunk (i + 1)) ...
    int32_t* visible_count;  // [chunks]     ... and how many they are
    SlotRange* slots;        // [N]          rows of visible splats only
    int64_t* tile_begin;     // [tiles + 1]  into `entries`
    int32_t* tile_order;     // [tiles]      longest list first: the order in which threads take them
    Entry* entries;          // [K]          front to back within each tile
    uint16_t* touched;       // [K]          bit b: the entry added light to block b of its tile
    T* transmittance;        // [tiles, 256] block by block, 16 pixels each
    int32_t* last;           // [tiles, 256] the last entry that added light to the pixel, 0 the tile's first; -1 none

    T margin = 0;  // pixels look at points this far from their centers, at most

    int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
    int64_t tiles() const { return int64_t(tiles_x) * tiles_y; }
};

// float32 whatever T is. Null: not wanted.
struct Statistics {
    float* grad_norm_sum;
    float* visits;
    float* abs_grad_norm_sum;
};

constexpr int kRecord = 16;  // numbers per gradient record: see blend_backward.h

// Memory that grows and is kept for the next time; see memory.h.
struct Buffer;

// Any number of channels in place of color: see features.h.
template <typename T>
struct Features {
    const T* values;  // [N, channels]
    int channels;
    const T* offset;  // [2, H, W] from a pixel's center to the point it looks at; or null
};

template <typename T>
struct FeatureGrads {
    const T *image, *left;  // [channels, H, W], [H, W]: read; null where there is none
    T* values;              // [N, channels]: written
    OnScreenGrads<T> screen;
};

// See scores.h.
constexpr int kScores = 8;
template <typename T>
struct Scores {
    const T* weights;           // [H, W] or null: 1
    const T* colors;            // [N, 3], or null: no moments
    const T* gradient;          // [3, H, W] or null
    const T *picture, *along;   // [H, W] sum of all channels; product of picture and gradient
    T* sums;                    // [N, kScores]
    int32_t *largest, *median;  // [H, W]
};

template <typename T>
using DepthKey = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
struct Photometric {
    const T* image;               // [3, H, W]
    const T* target;              // [3, H, W], or null
    const uint8_t* target_bytes;  // [3, H, W], 0..255, or null
    const T* mask;                // [H, W], or null
    int width, height;
    double lambda;
    T* grad;          // [3, H, W]
    double loss, l1;  // results
};

template <typename T>
struct Ssim {
    const T* a;  // [planes, H, W]
    const T* b;
    int64_t planes;
    int width, height;
    bool valid;   // leave out windows that reach over the border
    T* grad;      // [planes, H, W]: the gradient of `mean` for a; or null
    double mean;  // result
};

struct AdamRates {
    double lr, beta1, beta2, eps;
    double correction1, correction2;  // 1 - beta^step; 1: no bias correction
};

// What a training step moves: means, sh_dc, sh_rest, opacities, scales, quats, as in Gaussians.
constexpr int kTrained = 6;
template <typename T>
struct Trained {
    T* param[kTrained];
    T* avg[kTrained];
    T* avg_sq[kTrained];
    AdamRates rates[kTrained];
};

template <typename T>
struct Kernels {
    const char* name;
    void (*project)(const Gaussians<T>&, const View<T>&, const Frame<T>&, int32_t* radii, DepthKey<T>* keys);
    // Writes the tiles of order[begin .. end) behind each other, growing the buffer; returns how many there are.
    int64_t (*find_tiles)(const Frame<T>&, const int32_t* order, int64_t begin, int64_t end, Buffer& tiles,
                          uint32_t* per_tile);
    void (*blend)(const Frame<T>&, const T* background, const Image<T>&);
    void (*blend_backward)(const Frame<T>&, const T* background, const ImageGrads<T>&, bool absolute, T* records,
                           T* grad_background);
    void (*project_backward)(const Gaussians<T>&, const View<T>&, const Frame<T>&, const T* records, bool inv_depth,
                             const GaussianGrads<T>&, const Statistics&);
    // project_backward and adam, chunk by chunk: gradients never leave the cache.
    void (*project_backward_and_step)(const Gaussians<T>&, const View<T>&, const Frame<T>&, const T* records,
                                      const Trained<T>&, const Statistics&);
    // The same stages one by one: stage_project.h, features.h, scores.h.
    void (*stage_project)(const Gaussians<T>&, const View<T>&, const Optics<T>&, const OnScreen<T>&);
    void (*stage_project_backward)(const Gaussians<T>&, const View<T>&, const Optics<T>&, const int32_t* radii,
                                   const OnScreenGrads<T>&, const GaussianGrads<T>&);
    void (*pack)(const OnScreen<T>&, const Frame<T>&, DepthKey<T>* keys);
    void (*pack_again)(const OnScreen<T>&, const Frame<T>&);
    void (*blend_features)(const Frame<T>&, const Features<T>&, T* image, T* left);
    void (*blend_features_backward)(const Frame<T>&, const Features<T>&, const OnScreen<T>&, const FeatureGrads<T>&);
    void (*scores)(const Frame<T>&, const T* offset, const Scores<T>&);
    void (*ssim)(Ssim<T>&);
    void (*photometric)(Photometric<T>&);
    // One step for `count` numbers in a row.
    void (*adam)(T* param, const T* grad, T* avg, T* avg_sq, int64_t count, const AdamRates&);
};

// dispatch.cpp: the best this machine has, or what TILESPLAT_ISA or set_isa() ask for.
template <typename T> const Kernels<T>& kernels();
std::vector<std::string> available_isas();  // best first
bool set_isa(const std::string& name);      // "": the best. False if it is not available

// order.cpp: binning, from what project() left to the lists of every tile. Returns K, and hands out the memory for
// entries and touched through `allocate`.
template <typename T>
int64_t bin(const Kernels<T>& kernels, Frame<T>& frame, const DepthKey<T>* keys,
            void (*allocate)(void* context, Frame<T>& frame, int64_t entries), void* context);

// sort.cpp: keys and values together, stable, ascending.
void sort_pairs(uint32_t* keys, int32_t* values, int64_t count);
void sort_pairs(uint64_t* keys, int32_t* values, int64_t count);

// knn.cpp
void knn_mean_dist2(const float* points, int64_t count, float* mean_dist2);
void knn_mean_dist2(const double* points, int64_t count, double* mean_dist2);
void mark_visible(const float* means, int64_t count, const float* world_to_camera, float near_depth, bool* visible);
void mark_visible(const double* means, int64_t count, const double* world_to_camera, double near_depth, bool* visible);

}  // namespace gs::cpu
