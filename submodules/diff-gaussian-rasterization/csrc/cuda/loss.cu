// L1 and SSIM of two images, and their gradient. CUDA backend.
//
// SSIM needs five local means per pixel (a, b, a^2, b^2, ab), each under an 11x11 Gaussian window, which is a row window
// times a column window. A block blurs a 32x32 piece with its margin of 5 inside shared memory: rows first, then columns,
// every thread four neighboring values at a time, so that 14 inputs serve 4 outputs. The gradient is the same blur over
// three maps of partial derivatives, since the window is symmetric.
#include "device.h"

namespace gs::cuda {
namespace {

constexpr int kRadius = 5, kTaps = 2 * kRadius + 1;
constexpr int kSide = 32, kHalo = kSide + 2 * kRadius;  // pixels of a block, with margin
constexpr int kPitch = 45;                              // odd: rows of the margin start in different banks
constexpr int kThreads = 256;
constexpr int kRun = 4;                                 // outputs per thread and pass
constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;

__device__ __forceinline__ constexpr float window(int tap) {
    constexpr float kWindow[kTaps] = {0.0010283801f, 0.0075987581f, 0.0360007721f, 0.1093606895f,
                                      0.2130055377f, 0.2660117249f, 0.2130055377f, 0.1093606895f,
                                      0.0360007721f, 0.0075987581f, 0.0010283801f};  // sigma 1.5, sums to 1
    return kWindow[tap];
}

struct Piece {
    int plane, left, top;  // of the block's first pixel
};

__device__ __forceinline__ Piece own_piece(int height, int width) {
    const int columns = (width + kSide - 1) / kSide, rows = (height + kSide - 1) / kSide;
    const int block = int(blockIdx.x);
    return {block / (columns * rows), block % columns * kSide, block / columns % rows * kSide};
}

__device__ __forceinline__ float target_at(const Ssim& p, int64_t i) {
    return p.b_bytes ? float(p.b_bytes[i]) * (1.f / 255.f) : p.b_float[i];
}

// 14 values -> 4 blurred ones.
__device__ __forceinline__ void blur_run(const float (&in)[kRun + kTaps - 1], float (&out)[kRun]) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        out[j] = 0.f;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) out[j] = fmaf(window(tap), in[j + tap], out[j]);
    }
}

__device__ __forceinline__ float block_sum(float v, float* shared) {
    v = warp_sum(v);
    if (lane_id() == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    float total = 0.f;
    if (threadIdx.x == 0)
        for (int w = 0; w < kThreads / kWarp; ++w) total += shared[w];
    __syncthreads();
    return total;
}

__global__ void __launch_bounds__(kThreads) ssim_forward_kernel(Ssim p) {
    __shared__ float a[kHalo][kPitch], b[kHalo][kPitch];
    __shared__ alignas(16) float rows[5][kHalo][kSide];
    __shared__ float sums[kThreads / kWarp];
    const Piece piece = own_piece(p.height, p.width);
    const int64_t plane_size = int64_t(p.height) * p.width, plane = piece.plane * plane_size;

    for (int i = threadIdx.x; i < kHalo * kHalo; i += kThreads) {
        const int r = i / kHalo, c = i % kHalo;
        const int y = piece.top + r - kRadius, x = piece.left + c - kRadius;
        float va = 0.f, vb = 0.f;
        if (y >= 0 && y < p.height && x >= 0 && x < p.width) {
            const int64_t pixel = int64_t(y) * p.width + x;
            const float mask = p.mask ? p.mask[pixel] : 1.f;
            va = p.a[plane + pixel] * mask;
            vb = target_at(p, plane + pixel) * mask;
        }
        a[r][c] = va, b[r][c] = vb;
    }
    __syncthreads();

    for (int i = threadIdx.x; i < kHalo * (kSide / kRun); i += kThreads) {
        const int r = i / (kSide / kRun), c = i % (kSide / kRun) * kRun;
        float va[kRun + kTaps - 1], vb[kRun + kTaps - 1], product[kRun + kTaps - 1], out[kRun] = {};
        const auto write = [&](int map) {
            *reinterpret_cast<float4*>(&rows[map][r][c]) = make_float4(out[0], out[1], out[2], out[3]);
        };
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) va[k] = a[r][c + k], vb[k] = b[r][c + k];
        blur_run(va, out), write(0);
        blur_run(vb, out), write(1);
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) product[k] = va[k] * va[k];
        blur_run(product, out), write(2);
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) product[k] = vb[k] * vb[k];
        blur_run(product, out), write(3);
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) product[k] = va[k] * vb[k];
        blur_run(product, out), write(4);
    }
    __syncthreads();

    const int c = lane_id(), first_row = threadIdx.x / kWarp * kRun;
    float blurred[5][kRun];
#pragma unroll
    for (int map = 0; map < 5; ++map) {
        float in[kRun + kTaps - 1];
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) in[k] = rows[map][first_row + k][c];
        blur_run(in, blurred[map]);
    }

    float ssim_sum = 0.f, l1_sum = 0.f;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const int y = piece.top + first_row + j, x = piece.left + c;
        if (y >= p.height || x >= p.width) continue;
        l1_sum += fabsf(a[first_row + j + kRadius][c + kRadius] - b[first_row + j + kRadius][c + kRadius]);

        const float mean_a = blurred[0][j], mean_b = blurred[1][j];
        const float var_a = blurred[2][j] - mean_a * mean_a, var_b = blurred[3][j] - mean_b * mean_b;
        const float cov = blurred[4][j] - mean_a * mean_b;
        const float n1 = 2.f * mean_a * mean_b + kC1, n2 = 2.f * cov + kC2;
        const float d1 = mean_a * mean_a + mean_b * mean_b + kC1, d2 = var_a + var_b + kC2;
        const float inv = 1.f / (d1 * d2), value = n1 * n2 * inv;
        const bool counts = y >= p.crop && y < p.height - p.crop && x >= p.crop && x < p.width - p.crop;
        if (counts) ssim_sum += value;
        if (p.maps) {  // derivatives for the local means of a, a^2 and ab
            const float g_var = -value / d2, g_cov = 2.f * n1 * inv;
            const float g_mean = 2.f * mean_b * n2 * inv - 2.f * mean_a * value / d1 - 2.f * mean_a * g_var - mean_b * g_cov;
            const int64_t at = plane + int64_t(y) * p.width + x, step = p.planes * plane_size;
            p.maps[at] = counts ? g_mean : 0.f;
            p.maps[at + step] = counts ? g_var : 0.f;
            p.maps[at + 2 * step] = counts ? g_cov : 0.f;
        }
    }
    const float ssim_total = block_sum(ssim_sum, sums), l1_total = block_sum(l1_sum, sums);
    if (threadIdx.x == 0) {
        p.partial_ssim[blockIdx.x] = ssim_total;
        if (p.partial_l1) p.partial_l1[blockIdx.x] = l1_total;
    }
}

__global__ void __launch_bounds__(kThreads) ssim_backward_kernel(SsimBackward args) {
    const Ssim& p = args.forward;
    __shared__ float maps[3][kHalo][kPitch];
    __shared__ alignas(16) float rows[3][kHalo][kSide];
    const Piece piece = own_piece(p.height, p.width);
    const int64_t plane_size = int64_t(p.height) * p.width, plane = piece.plane * plane_size;

    for (int i = threadIdx.x; i < kHalo * kHalo; i += kThreads) {
        const int r = i / kHalo, c = i % kHalo;
        const int y = piece.top + r - kRadius, x = piece.left + c - kRadius;
        const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
        const int64_t at = plane + int64_t(y) * p.width + x, step = p.planes * plane_size;
#pragma unroll
        for (int map = 0; map < 3; ++map) maps[map][r][c] = inside ? p.maps[at + map * step] : 0.f;
    }
    __syncthreads();

    for (int i = threadIdx.x; i < kHalo * (kSide / kRun); i += kThreads) {
        const int r = i / (kSide / kRun), c = i % (kSide / kRun) * kRun;
#pragma unroll
        for (int map = 0; map < 3; ++map) {
            float in[kRun + kTaps - 1], out[kRun];
#pragma unroll
            for (int k = 0; k < kRun + kTaps - 1; ++k) in[k] = maps[map][r][c + k];
            blur_run(in, out);
            *reinterpret_cast<float4*>(&rows[map][r][c]) = make_float4(out[0], out[1], out[2], out[3]);
        }
    }
    __syncthreads();

    const int c = lane_id(), first_row = threadIdx.x / kWarp * kRun;
    float blurred[3][kRun];
#pragma unroll
    for (int map = 0; map < 3; ++map) {
        float in[kRun + kTaps - 1];
#pragma unroll
        for (int k = 0; k < kRun + kTaps - 1; ++k) in[k] = rows[map][first_row + k][c];
        blur_run(in, blurred[map]);
    }

    const float upstream = args.upstream ? *args.upstream : 1.f, inv_count = float(1.0 / args.count);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const int y = piece.top + first_row + j, x = piece.left + c;
        if (y >= p.height || x >= p.width) continue;
        const int64_t pixel = int64_t(y) * p.width + x;
        const float mask = p.mask ? p.mask[pixel] : 1.f;
        const float a = p.a[plane + pixel] * mask, b = target_at(p, plane + pixel) * mask;
        const float g_ssim = blurred[0][j] + 2.f * a * blurred[1][j] + b * blurred[2][j];
        const float sign = a > b ? 1.f : a < b ? -1.f : 0.f;
        args.g_a[plane + pixel] = mask * upstream * inv_count * (args.ssim_weight * g_ssim + args.l1_weight * sign);
    }
}

// The mean of block sums, summed in double so that the size of the image does not show. One block.
__device__ double mean_of(const float* partial, int64_t blocks, double count) {
    __shared__ double shared[kThreads];
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partial[i];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    const double mean = shared[0] / count;
    __syncthreads();
    return mean;
}

__global__ void __launch_bounds__(kThreads) ssim_value_kernel(const float* partial, int64_t blocks, double count,
                                                              float* value) {
    const double mean = mean_of(partial, blocks, count);
    if (threadIdx.x == 0) *value = float(mean);
}

__global__ void __launch_bounds__(kThreads) photometric_value_kernel(const float* partial_ssim, const float* partial_l1,
                                                                     int64_t blocks, double count, float lambda,
                                                                     float* loss, float* l1) {
    const double ssim = mean_of(partial_ssim, blocks, count), mean_l1 = mean_of(partial_l1, blocks, count);
    if (threadIdx.x == 0) {
        *loss = float((1.0 - lambda) * mean_l1 + lambda * (1.0 - ssim));
        *l1 = float(mean_l1);
    }
}

}  // namespace

int64_t ssim_blocks(int planes, int height, int width) {
    return int64_t(planes) * ((height + kSide - 1) / kSide) * ((width + kSide - 1) / kSide);
}

void ssim_forward(const Ssim& args, Stream stream) {
    const unsigned blocks = blocks_for(ssim_blocks(args.planes, args.height, args.width), 1);
    ssim_forward_kernel<<<blocks, kThreads, 0, native(stream)>>>(args);
    check_launch("ssim_forward_kernel");
}

void ssim_backward(const SsimBackward& args, Stream stream) {
    const unsigned blocks = blocks_for(ssim_blocks(args.forward.planes, args.forward.height, args.forward.width), 1);
    ssim_backward_kernel<<<blocks, kThreads, 0, native(stream)>>>(args);
    check_launch("ssim_backward_kernel");
}

void ssim_value(const float* partial, int64_t blocks, double count, float* value, Stream stream) {
    ssim_value_kernel<<<1, kThreads, 0, native(stream)>>>(partial, blocks, count, value);
    check_launch("ssim_value_kernel");
}

void photometric_value(const float* partial_ssim, const float* partial_l1, int64_t blocks, double count, float lambda,
                       float* loss, float* l1, Stream stream) {
    photometric_value_kernel<<<1, kThreads, 0, native(stream)>>>(partial_ssim, partial_l1, blocks, count, lambda, loss,
                                                                 l1);
    check_launch("photometric_value_kernel");
}

}  // namespace gs::cuda
