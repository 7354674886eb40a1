// pair_colors.h: what cameras see of spherical harmonics, pair by pair of a camera and a Gaussian that it sees; and back,
// Gaussian by Gaussian, over all cameras. The same for both backends.
#pragma once
#include "args.h"
#include "sh.h"

namespace gs {

template <typename T>
struct PairColors {
    int64_t count;     // N Gaussians
    int64_t pairs;     // M
    int64_t cameras;   // C
    const T* means;    // [N, 3]
    const T* sh_dc;    // [N, 3]
    const T* sh_rest;  // [N, rest_count, 3]
    int64_t rest_count;
    const T* centers;     // [C, 3]
    const int64_t* pair;  // [M]  camera * N + Gaussian
    T* colors;            // [M, 3]
};

template <typename T>
struct PairColorsBackward {
    PairColors<T> forward;  // its colors are read
    const int32_t* slots;   // [C, N]  number of the pair, -1 where there is none
    const T* grad;          // [M, 3]
    T* means;               // [N, 3]
    T* sh_dc;               // [N, 3]
    T* sh_rest;             // [N, rest_count, 3]
};

template <typename T>
struct LineOfSight {
    Vec3<T> d;  // unit vector from the camera
    T inv_length;
};

template <typename T>
GS_HD LineOfSight<T> line_of_sight(const PairColors<T>& p, int64_t row, int64_t camera) {
    const T *m = p.means + 3 * row, *c = p.centers + 3 * camera;
    const Vec3<T> v = {m[0] - c[0], m[1] - c[1], m[2] - c[2]};
    const T inv_length = inverse_length(v);
    return {normalize(v, inv_length), inv_length};
}

// Coefficient k of a Gaussian, for each channel.
template <typename T>
GS_HD const T* coefficient(const PairColors<T>& p, int64_t row, int k) {
    return k == 0 ? p.sh_dc + 3 * row : p.sh_rest + 3 * (row * p.rest_count + k - 1);
}

template <int Degree, typename T>
GS_HD void pair_color(const PairColors<T>& p, int64_t i) {
    const int64_t camera = p.pair[i] / p.count, row = p.pair[i] - camera * p.count;
    T basis[16], sum[3] = {T(0.5), T(0.5), T(0.5)};
    sh_basis<Degree>(line_of_sight(p, row, camera).d, basis);
    GS_UNROLL
    for (int k = 0; k < sh_count(Degree); ++k) {
        const T* c = coefficient(p, row, k);
        for (int channel = 0; channel < 3; ++channel) sum[channel] += basis[k] * c[channel];
    }
    for (int channel = 0; channel < 3; ++channel) p.colors[3 * i + channel] = max(sum[channel], T(0));
}

// Adds what one camera's pair has to say. `sh` [16][3], of the row.
template <int Degree, typename T>
GS_HD Vec3<T> pair_color_vjp(const PairColorsBackward<T>& p, int64_t row, int64_t camera, int64_t pair, T (*sh)[3]) {
    const PairColors<T>& f = p.forward;
    const LineOfSight<T> sight = line_of_sight(f, row, camera);
    T basis[16], weight[16], g[3];
    sh_basis<Degree>(sight.d, basis);
    for (int channel = 0; channel < 3; ++channel)
        g[channel] = f.colors[3 * pair + channel] > T(0) ? p.grad[3 * pair + channel] : T(0);
    GS_UNROLL
    for (int k = 0; k < sh_count(Degree); ++k) {
        const T* c = coefficient(f, row, k);
        weight[k] = g[0] * c[0] + g[1] * c[1] + g[2] * c[2];
        for (int channel = 0; channel < 3; ++channel) sh[k][channel] += basis[k] * g[channel];
    }
    return normalize_vjp(sight.d, sight.inv_length, sh_basis_vjp<Degree>(sight.d, weight));
}

template <int Degree, typename T>
GS_HD void row_colors_vjp(const PairColorsBackward<T>& p, int64_t row) {
    T sh[16][3] = {};
    Vec3<T> mean = {T(0), T(0), T(0)};
    for (int64_t camera = 0; camera < p.forward.cameras; ++camera) {
        const int32_t pair = p.slots[camera * p.forward.count + row];
        if (pair >= 0) mean = add(mean, pair_color_vjp<Degree>(p, row, camera, pair, sh));
    }
    p.means[3 * row] = mean.x, p.means[3 * row + 1] = mean.y, p.means[3 * row + 2] = mean.z;
    for (int channel = 0; channel < 3; ++channel) p.sh_dc[3 * row + channel] = sh[0][channel];
    T* rest = p.sh_rest + 3 * row * p.forward.rest_count;
    GS_UNROLL
    for (int k = 1; k < sh_count(Degree); ++k)
        for (int channel = 0; channel < 3; ++channel) rest[3 * (k - 1) + channel] = sh[k][channel];
    for (int64_t n = 3 * (sh_count(Degree) - 1); n < 3 * p.forward.rest_count; ++n) rest[n] = T(0);
}

namespace cuda {
void pair_colors(const PairColors<float>& p, int degree, void* stream);
void pair_colors_backward(const PairColorsBackward<float>& p, int degree, void* stream);
}  // namespace cuda

}  // namespace gs
