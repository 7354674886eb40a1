// L1 and SSIM of two images, and their gradient. CUDA backend.
//
// SSIM needs local means under an 11x11 Gaussian window, which is a row window times a column window: of a, b, a^2, b^2
// and ab, or, which is one less, of s, d, s^2 and d^2 with s = a + b and d = a - b. A block blurs a piece of 32x70 pixels
// with its margin of 5 inside shared memory: rows first, then columns, every thread several neighboring values at a time,
// so that 14 inputs serve 4 outputs. The gradient is the same blur over three maps of partial derivatives, since the
// window is symmetric.
#include "device.h"

namespace gs::cuda {
namespace {

constexpr int kRadius = 5, kTaps = 2 * kRadius + 1;
constexpr int kThreads = 320, kWarps = kThreads / kWarp;
constexpr int kRun = 4, kColumnRun = 7;  // outputs of a thread: neighbors in a row, and in a column
constexpr int kWidth = kWarp, kHeight = kWarps * kColumnRun;                           // pixels of a block
constexpr int kHaloWidth = kWidth + 2 * kRadius, kHaloHeight = kHeight + 2 * kRadius;  // with margin
constexpr int kPitch = 45;                                          // odd: rows start in different banks
constexpr int kRowRuns = kHaloHeight * (kWidth / kRun) / kThreads;  // per thread
static_assert(kRowRuns * kThreads == kHaloHeight * (kWidth / kRun), "no thread may idle");
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
    const int columns = (width + kWidth - 1) / kWidth, rows = (height + kHeight - 1) / kHeight;
    const int block = int(blockIdx.x);
    return {block / (columns * rows), block % columns * kWidth, block / columns % rows * kHeight};
}

__device__ __forceinline__ float image_at(const Ssim& p, int64_t i) {
    return p.clamped ? fminf(fmaxf(p.a[i], 0.f), 1.f) : p.a[i];
}

__device__ __forceinline__ float target_at(const Ssim& p, int64_t i) {
    return p.b_bytes ? float(p.b_bytes[i]) * (1.f / 255.f) : p.b_float[i];
}

// Calls load(row, column, pixel, inside) for every pixel of the piece and its margin: a warp takes rows, a lane columns.
// `pixel` is the place in the plane.
template <typename Load>
__device__ __forceinline__ void for_halo(const Piece& piece, int height, int width, Load load) {
#pragma unroll
    for (int part = 0; part < (kHaloWidth + kWarp - 1) / kWarp; ++part) {
        const int c = part * kWarp + lane_id(), x = piece.left + c - kRadius;
        if (c >= kHaloWidth) break;
        const bool column_inside = x >= 0 && x < width;
#pragma unroll 4
        for (int r = threadIdx.x / kWarp; r < kHaloHeight; r += kWarps) {
            const int y = piece.top + r - kRadius;
            load(r, c, int64_t(y) * width + x, column_inside && y >= 0 && y < height);
        }
    }
}

// N + 10 values -> N blurred ones.
template <int N>
__device__ __forceinline__ void blur_run(const float (&in)[N + kTaps - 1], float (&out)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
        out[j] = 0.f;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) out[j] = fmaf(window(tap), in[j + tap], out[j]);
    }
}

// What shared memory holds: the inputs with margin, later the maps with blurred rows.
template <int Inputs, int Maps>
constexpr int kSharedFloats = kHaloHeight * (Inputs * kPitch > Maps * kWidth ? Inputs * kPitch : Maps * kWidth);

__device__ __forceinline__ int input_at(int input, int row, int column) {
    return (input * kHaloHeight + row) * kPitch + column;
}

// Blurs `Maps` maps, of which derive(map, values of the inputs at a pixel) gives the pixels. A thread ends up with
// kColumnRun pixels below each other: column lane_id(), rows from kColumnRun times its warp. All threads must call.
template <int Inputs, int Maps, typename Derive>
__device__ __forceinline__ void blur(float* shared, Derive derive, float (&out)[Maps][kColumnRun]) {
    float rows[kRowRuns][Maps][kRun];
    __syncthreads();
#pragma unroll
    for (int run = 0; run < kRowRuns; ++run) {
        const int i = threadIdx.x + run * kThreads, r = i / (kWidth / kRun), c = i % (kWidth / kRun) * kRun;
        float in[Inputs][kRun + kTaps - 1], values[kRun + kTaps - 1];
#pragma unroll
        for (int input = 0; input < Inputs; ++input)
#pragma unroll
            for (int k = 0; k < kRun + kTaps - 1; ++k) in[input][k] = shared[input_at(input, r, c + k)];
#pragma unroll
        for (int map = 0; map < Maps; ++map) {
#pragma unroll
            for (int k = 0; k < kRun + kTaps - 1; ++k) values[k] = derive(map, in, k);
            blur_run(values, rows[run][map]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int run = 0; run < kRowRuns; ++run) {
        const int i = threadIdx.x + run * kThreads;
#pragma unroll
        for (int map = 0; map < Maps; ++map)
            *reinterpret_cast<float4*>(shared + map * kHaloHeight * kWidth + i * kRun) =
                make_float4(rows[run][map][0], rows[run][map][1], rows[run][map][2], rows[run][map][3]);
    }
    __syncthreads();
#pragma unroll
    for (int map = 0; map < Maps; ++map) {
        float in[kColumnRun + kTaps - 1];
#pragma unroll
        for (int k = 0; k < kColumnRun + kTaps - 1; ++k)
            in[k] = shared[(map * kHaloHeight + threadIdx.x / kWarp * kColumnRun + k) * kWidth + lane_id()];
        blur_run(in, out[map]);
    }
}

__device__ __forceinline__ float block_sum(float v, float* shared) {
    v = warp_sum(v);
    if (lane_id() == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    float total = 0.f;
    if (threadIdx.x == 0)
        for (int w = 0; w < kWarps; ++w) total += shared[w];
    __syncthreads();
    return total;
}

__global__ void __launch_bounds__(kThreads, 3) ssim_forward_kernel(Ssim p) {
    __shared__ alignas(16) float shared[kSharedFloats<2, 4>];
    __shared__ float sums[kWarps];
    const Piece piece = own_piece(p.height, p.width);
    const int64_t plane_size = int64_t(p.height) * p.width, plane = piece.plane * plane_size;

    float ssim_sum = 0.f, l1_sum = 0.f;
    for_halo(piece, p.height, p.width, [&](int r, int c, int64_t pixel, bool inside) {
        float a = 0.f, b = 0.f;
        if (inside) {
            const float mask = p.mask ? p.mask[pixel] : 1.f;
            a = image_at(p, plane + pixel) * mask;
            b = target_at(p, plane + pixel) * mask;
        }
        shared[input_at(0, r, c)] = a + b;
        shared[input_at(1, r, c)] = a - b;
        const bool own = r >= kRadius && r < kRadius + kHeight && c >= kRadius && c < kRadius + kWidth;
        if (own) l1_sum += fabsf(a - b);
    });

    float blurred[4][kColumnRun];
    blur<2, 4>(
        shared, [](int map, const auto& in, int k) { return map < 2 ? in[map][k] : in[map - 2][k] * in[map - 2][k]; },
        blurred);

    const int x = piece.left + lane_id(), first_row = piece.top + threadIdx.x / kWarp * kColumnRun;
#pragma unroll
    for (int j = 0; j < kColumnRun; ++j) {
        const int y = first_row + j;
        if (y >= p.height || x >= p.width) continue;
        // Means of s and d, then half their variances: var a + var b is the sum of those, 2 cov(a, b) the difference.
        const float s = blurred[0][j], d = blurred[1][j];
        const float var_s = 0.5f * (blurred[2][j] - s * s), var_d = 0.5f * (blurred[3][j] - d * d);
        const float mean_a = 0.5f * (s + d), mean_b = 0.5f * (s - d);
        const float n1 = 2.f * mean_a * mean_b + kC1, n2 = var_s - var_d + kC2;
        const float d1 = mean_a * mean_a + mean_b * mean_b + kC1, d2 = var_s + var_d + kC2;
        const float inv = 1.f / (d1 * d2), value = n1 * n2 * inv;
        const bool counts = y >= p.crop && y < p.height - p.crop && x >= p.crop && x < p.width - p.crop;
        if (counts) ssim_sum += value;
        if (p.maps) {  // derivatives for the local means of a, a^2 and ab
            const float g_var = -value * d1 * inv, g_cov = 2.f * n1 * inv;
            const float g_mean =
                2.f * mean_b * n2 * inv - 2.f * mean_a * value * d2 * inv - 2.f * mean_a * g_var - mean_b * g_cov;
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

__global__ void __launch_bounds__(kThreads, 3) ssim_backward_kernel(SsimBackward args) {
    const Ssim& p = args.forward;
    __shared__ alignas(16) float shared[kSharedFloats<3, 3>];
    const Piece piece = own_piece(p.height, p.width);
    const int64_t plane_size = int64_t(p.height) * p.width, plane = piece.plane * plane_size;
    const int64_t step = p.planes * plane_size;

    for_halo(piece, p.height, p.width, [&](int r, int c, int64_t pixel, bool inside) {
#pragma unroll
        for (int map = 0; map < 3; ++map)
            shared[input_at(map, r, c)] = inside ? p.maps[plane + pixel + map * step] : 0.f;
    });
    float blurred[3][kColumnRun];
    blur<3, 3>(shared, [](int map, const auto& in, int k) { return in[map][k]; }, blurred);

    const float upstream = args.upstream ? *args.upstream : 1.f, inv_count = float(1.0 / args.count);
    const int x = piece.left + lane_id(), first_row = piece.top + threadIdx.x / kWarp * kColumnRun;
#pragma unroll
    for (int j = 0; j < kColumnRun; ++j) {
        const int y = first_row + j;
        if (y >= p.height || x >= p.width) continue;
        const int64_t pixel = int64_t(y) * p.width + x;
        const float mask = p.mask ? p.mask[pixel] : 1.f, image = image_at(p, plane + pixel);
        const float a = image * mask, b = target_at(p, plane + pixel) * mask;
        const float through = image == p.a[plane + pixel] ? mask : 0.f;  // nothing passes what was clamped
        const float g_ssim = blurred[0][j] + 2.f * a * blurred[1][j] + b * blurred[2][j];
        const float sign = a > b ? 1.f : a < b ? -1.f : 0.f;
        args.g_a[plane + pixel] = through * upstream * inv_count * (args.ssim_weight * g_ssim + args.l1_weight * sign);
    }
}

constexpr int kSumThreads = 256;

// The mean of block sums, summed in double so that the size of the image does not show. One block.
__device__ double mean_of(const float* partial, int64_t blocks, double count) {
    __shared__ double shared[kSumThreads];
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < blocks; i += kSumThreads) sum += partial[i];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    const double mean = shared[0] / count;
    __syncthreads();
    return mean;
}

__global__ void __launch_bounds__(kSumThreads)
    ssim_value_kernel(const float* partial, int64_t blocks, double count, float* value) {
    const double mean = mean_of(partial, blocks, count);
    if (threadIdx.x == 0) *value = float(mean);
}

__global__ void __launch_bounds__(kSumThreads)
    photometric_value_kernel(const float* partial_ssim, const float* partial_l1, int64_t blocks, double count,
                             float lambda, float* loss, float* l1) {
    const double ssim = mean_of(partial_ssim, blocks, count), mean_l1 = mean_of(partial_l1, blocks, count);
    if (threadIdx.x == 0) {
        *loss = float((1.0 - lambda) * mean_l1 + lambda * (1.0 - ssim));
        *l1 = float(mean_l1);
    }
}

}  // namespace

int64_t ssim_blocks(int planes, int height, int width) {
    return int64_t(planes) * ((height + kHeight - 1) / kHeight) * ((width + kWidth - 1) / kWidth);
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
    ssim_value_kernel<<<1, kSumThreads, 0, native(stream)>>>(partial, blocks, count, value);
    check_launch("ssim_value_kernel");
}

void photometric_value(const float* partial_ssim, const float* partial_l1, int64_t blocks, double count, float lambda,
                       float* loss, float* l1, Stream stream) {
    photometric_value_kernel<<<1, kSumThreads, 0, native(stream)>>>(partial_ssim, partial_l1, blocks, count, lambda,
                                                                    loss, l1);
    check_launch("photometric_value_kernel");
}

}  // namespace gs::cuda
