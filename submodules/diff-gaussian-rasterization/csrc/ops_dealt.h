// The operators of ops_dealt.cpp that both backends have.
#pragma once
#include "common/pair_colors.h"
#include "ops.h"

namespace gs {

// Colors of Gaussians as cameras see them, for pairs of the two.
struct PairColorsCall {
    const Tensor& means;            // [N, 3]
    const Tensor& sh_dc;            // [N, 1, 3]
    const OptionalTensor& sh_rest;  // [N, K-1, 3]
    const Tensor& centers;          // [C, 3]
    const Tensor& pairs;            // [M] int64  camera * N + Gaussian
    int64_t sh_degree;
};
void check_pair_colors(const PairColorsCall& call, bool allow_double);

struct PairColorsBackwardCall {
    PairColorsCall forward;
    const Tensor& slots;   // [C, N] int32  number of the pair, -1 where there is none
    const Tensor& colors;  // [M, 3]  of the forward
    const Tensor& grad;    // [M, 3]
};
void check_pair_colors_backward(const PairColorsBackwardCall& call, bool allow_double);

template <auto Backend, bool kDoubles>
Tensor pair_colors_op(const Tensor& means, const Tensor& sh_dc, const OptionalTensor& sh_rest, const Tensor& centers,
                      const Tensor& pairs, int64_t sh_degree) {
    const PairColorsCall call = {means, sh_dc, sh_rest, centers, pairs, sh_degree};
    check_pair_colors(call, kDoubles);
    return Backend(call);
}

template <auto Backend, bool kDoubles>
std::tuple<Tensor, Tensor, Tensor> pair_colors_backward_op(const Tensor& means, const Tensor& sh_dc,
                                                           const OptionalTensor& sh_rest, const Tensor& centers,
                                                           const Tensor& pairs, int64_t sh_degree, const Tensor& slots,
                                                           const Tensor& colors, const Tensor& grad) {
    const PairColorsBackwardCall call = {{means, sh_dc, sh_rest, centers, pairs, sh_degree}, slots, colors, grad};
    check_pair_colors_backward(call, kDoubles);
    return Backend(call);
}

// The tensors as the formulas take them.
template <typename T, typename Data>
PairColors<T> pair_colors_of(const PairColorsCall& call, const Tensor& colors, Data data) {
    const int64_t rest = call.sh_rest ? call.sh_rest->size(1) : 0;
    return {call.means.size(0),
            call.pairs.size(0),
            call.centers.size(0),
            static_cast<const T*>(data(call.means)),
            static_cast<const T*>(data(call.sh_dc)),
            static_cast<const T*>(rest ? data(*call.sh_rest) : nullptr),
            rest,
            static_cast<const T*>(data(call.centers)),
            static_cast<const int64_t*>(data(call.pairs)),
            static_cast<T*>(data(colors))};
}

template <typename T, typename Data>
PairColorsBackward<T> pair_colors_backward_of(const PairColorsBackwardCall& call, const Tensor& g_means,
                                              const Tensor& g_dc, const Tensor& g_rest, Data data) {
    return {pair_colors_of<T>(call.forward, call.colors, data),
            static_cast<const int32_t*>(data(call.slots)),
            static_cast<const T*>(data(call.grad)),
            static_cast<T*>(data(g_means)),
            static_cast<T*>(data(g_dc)),
            static_cast<T*>(data(g_rest))};
}

}  // namespace gs
