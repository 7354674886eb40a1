// plain.cpp: a training iteration as one writes it first: scalar, one thread, one splat or one pixel after the other.
//
// The baseline of cpu.py. The formulas are those of csrc/common; the algorithm is the published one: a splat is in all the
// tiles of its 3-sigma square, and every pixel looks at every splat of its tile until it is done.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/constants.h"
#include "common/covariance.h"
#include "common/projection.h"
#include "common/sh.h"
#include "common/tiles.h"

using namespace gs;

namespace {

constexpr int kDegree = 3, kCoefficients = 16;
constexpr int kColumns[6] = {3, 3, 45, 1, 3, 4};  // means, sh_dc, sh_rest, opacities, scales, quats

struct Splat {
    Vec2<float> mean;
    Sym2<float> conic;
    float opacity, depth, radius;
    Vec3<float> color;
};
struct SplatGrad {
    Vec2<float> mean;
    Sym2<float> conic;
    float opacity;
    Vec3<float> color;
};

// sigma = 1/2 d^T Q d, with d = pixel - mean and Q the inverse covariance; alpha = opacity exp(-sigma).
float falloff(Vec2<float> d, Sym2<float> q) { return 0.5f * (q.xx * d.x * d.x + q.yy * d.y * d.y) + q.xy * d.x * d.y; }

struct FalloffGrad {
    Vec2<float> d;
    Sym2<float> q;
};

FalloffGrad falloff_vjp(Vec2<float> d, Sym2<float> q, float g) {
    return {{g * (q.xx * d.x + q.xy * d.y), g * (q.xy * d.x + q.yy * d.y)},
            {g * 0.5f * d.x * d.x, g * d.x * d.y, g * 0.5f * d.y * d.y}};
}

struct Step {
    int64_t count;
    int width, height, tiles_x, tiles_y;
    Camera<float> camera;
    float* param[6];
    std::vector<Splat> splats;            // [N]
    std::vector<std::vector<int>> lists;  // of every tile, front to back
    std::vector<float> image, transmittance, grad_image;
    std::vector<int> looked_at;          // per pixel: how far into its list
    std::vector<SplatGrad> splat_grads;  // [N]
    std::vector<float> grad[6];
};

Vec3<float> at3(const float* p, int64_t i) { return {p[3 * i], p[3 * i + 1], p[3 * i + 2]}; }
Vec4<float> at4(const float* p, int64_t i) { return {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]}; }

struct Shape {
    Vec3<float> p, scale;
    Vec4<float> quat;
    float norm;
    Sym3<float> cov;
    Sym2<float> wide;
    float det;
};

Shape shape_of(const Step& s, int64_t i) {
    Shape o;
    const Vec3<float> log_scale = at3(s.param[4], i);
    const Vec4<float> quat = at4(s.param[5], i);
    o.p = to_camera(s.camera, at3(s.param[0], i));
    o.scale = {exp(log_scale.x), exp(log_scale.y), exp(log_scale.z)};
    o.norm = quat_norm(quat);
    o.quat = normalize_quat(quat);
    o.cov = covariance(o.quat, o.scale);
    o.wide = blurred(project_covariance(s.camera, o.p, o.cov));
    o.det = determinant(o.wide);
    return o;
}

const float* coefficient(const Step& s, int64_t i, int k) {
    return k == 0 ? s.param[1] + 3 * i : s.param[2] + 45 * i + 3 * (k - 1);
}

void project(Step& s) {
    for (int64_t i = 0; i < s.count; ++i) {
        Splat& out = s.splats[i];
        const Shape shape = shape_of(s, i);
        out.radius = 0;
        if (!(shape.p.z > float(kNearDepth)) || shape.det == 0) continue;
        out.radius = splat_radius(shape.wide);
        out.mean = project_mean(s.camera, shape.p);
        out.conic = inverse(shape.wide, shape.det);
        out.opacity = sigmoid(s.param[3][i]);
        out.depth = shape.p.z;
        const Vec3<float> v = sub(at3(s.param[0], i), s.camera.center);
        float basis[kCoefficients];
        sh_basis<kDegree>(normalize(v, inverse_length(v)), basis);
        Vec3<float> color = {0.5f, 0.5f, 0.5f};
        for (int k = 0; k < kCoefficients; ++k) color = add(color, mul(basis[k], at3(coefficient(s, i, k), 0)));
        out.color = {max(color.x, 0.f), max(color.y, 0.f), max(color.z, 0.f)};
    }
}

void make_lists(Step& s) {
    std::vector<int> order(s.count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return s.splats[a].depth < s.splats[b].depth; });
    s.lists.assign(s.tiles_x * s.tiles_y, {});
    for (const int i : order) {
        if (s.splats[i].radius == 0) continue;
        const TileRect r = tile_rect(s.splats[i].mean, s.splats[i].radius, s.tiles_x, s.tiles_y);
        for (int y = r.y0; y < r.y1; ++y)
            for (int x = r.x0; x < r.x1; ++x) s.lists[y * s.tiles_x + x].push_back(i);
    }
}

// Every pixel with the list of its tile.
template <typename Body>
void for_each_pixel(const Step& s, Body body) {
    for (int tile = 0; tile < s.tiles_x * s.tiles_y; ++tile) {
        const int x0 = tile % s.tiles_x * kTileSize, y0 = tile / s.tiles_x * kTileSize;
        for (int y = y0; y < std::min(y0 + kTileSize, s.height); ++y)
            for (int x = x0; x < std::min(x0 + kTileSize, s.width); ++x)
                body(int64_t(y) * s.width + x, Vec2<float>{x + 0.5f, y + 0.5f}, s.lists[tile]);
    }
}

void blend(Step& s, Vec3<float> background) {
    const int64_t pixels = int64_t(s.width) * s.height;
    for_each_pixel(s, [&](int64_t pixel, Vec2<float> at, const std::vector<int>& list) {
        float T = 1;
        Vec3<float> color = {0, 0, 0};
        int k = 0;
        for (; k < int(list.size()); ++k) {
            const Splat& splat = s.splats[list[k]];
            const float sigma = falloff(Vec2<float>{at.x - splat.mean.x, at.y - splat.mean.y}, splat.conic);
            const float alpha = min(float(kAlphaMax), splat.opacity * std::exp(-sigma));
            if (sigma < 0 || alpha < float(kAlphaMin)) continue;
            if (T * (1 - alpha) < float(kStopAt)) break;
            color = add(color, mul(alpha * T, splat.color));
            T *= 1 - alpha;
        }
        color = add(color, mul(T, background));
        s.image[pixel] = color.x, s.image[pixels + pixel] = color.y, s.image[2 * pixels + pixel] = color.z;
        s.transmittance[pixel] = T;
        s.looked_at[pixel] = k;
    });
}

void blend_backward(Step& s, Vec3<float> background) {
    const int64_t pixels = int64_t(s.width) * s.height;
    s.splat_grads.assign(s.count, {});
    for_each_pixel(s, [&](int64_t pixel, Vec2<float> at, const std::vector<int>& list) {
        const Vec3<float> g = {s.grad_image[pixel], s.grad_image[pixels + pixel], s.grad_image[2 * pixels + pixel]};
        float T = s.transmittance[pixel], behind = T * dot(background, g);
        for (int k = s.looked_at[pixel] - 1; k >= 0; --k) {
            const Splat& splat = s.splats[list[k]];
            const Vec2<float> d = {at.x - splat.mean.x, at.y - splat.mean.y};
            const float sigma = falloff(d, splat.conic), fade = std::exp(-sigma);
            const float alpha = min(float(kAlphaMax), splat.opacity * fade);
            if (sigma < 0 || alpha < float(kAlphaMin)) continue;
            SplatGrad& out = s.splat_grads[list[k]];
            T /= 1 - alpha;
            const float along = dot(splat.color, g), g_alpha = T * along - behind / (1 - alpha);
            behind += alpha * T * along;
            out.color = add(out.color, mul(alpha * T, g));
            out.opacity += g_alpha * fade;
            const FalloffGrad f = falloff_vjp(d, splat.conic, -g_alpha * splat.opacity * fade);
            out.mean = {out.mean.x - f.d.x, out.mean.y - f.d.y};
            out.conic = {out.conic.xx + f.q.xx, out.conic.xy + f.q.xy, out.conic.yy + f.q.yy};
        }
    });
}

void project_backward(Step& s, float* grad_norm_sum, float* visits) {
    for (int64_t i = 0; i < s.count; ++i) {
        const Splat& splat = s.splats[i];
        if (splat.radius == 0) {
            for (int t = 0; t < 6; ++t) std::fill_n(&s.grad[t][i * kColumns[t]], kColumns[t], 0.f);
            continue;
        }
        const SplatGrad& g = s.splat_grads[i];
        const Shape shape = shape_of(s, i);
        const Sym2<float> g_cov = inverse_vjp(shape.wide, shape.det, splat.conic, g.conic);
        const ProjectCovarianceGrad<float> back = project_covariance_vjp(s.camera, shape.p, shape.cov, g_cov);
        Vec3<float> g_mean =
            matvec_transposed(s.camera.rotation, add(back.p, project_mean_vjp(s.camera, shape.p, g.mean)));

        const Vec3<float> v = sub(at3(s.param[0], i), s.camera.center);
        const float inv_length = inverse_length(v);
        const Vec3<float> direction = normalize(v, inv_length);
        const Vec3<float> color = {splat.color.x > 0 ? g.color.x : 0, splat.color.y > 0 ? g.color.y : 0,
                                   splat.color.z > 0 ? g.color.z : 0};
        float basis[kCoefficients], weight[kCoefficients];
        sh_basis<kDegree>(direction, basis);
        for (int k = 0; k < kCoefficients; ++k) {
            weight[k] = dot(color, at3(coefficient(s, i, k), 0));
            float* out = k == 0 ? &s.grad[1][3 * i] : &s.grad[2][45 * i + 3 * (k - 1)];
            out[0] = basis[k] * color.x, out[1] = basis[k] * color.y, out[2] = basis[k] * color.z;
        }
        g_mean = add(g_mean, normalize_vjp(direction, inv_length, sh_basis_vjp<kDegree>(direction, weight)));

        const CovarianceGrad<float> c = covariance_vjp(shape.quat, shape.scale, back.cov);
        const Vec4<float> g_quat = normalize_quat_vjp(shape.quat, shape.norm, c.q);
        const float means[3] = {g_mean.x, g_mean.y, g_mean.z};
        const float scales[3] = {c.s.x * shape.scale.x, c.s.y * shape.scale.y, c.s.z * shape.scale.z};
        const float quats[4] = {g_quat.x, g_quat.y, g_quat.z, g_quat.w};
        std::copy_n(means, 3, &s.grad[0][3 * i]);
        s.grad[3][i] = g.opacity * splat.opacity * (1 - splat.opacity);
        std::copy_n(scales, 3, &s.grad[4][3 * i]);
        std::copy_n(quats, 4, &s.grad[5][4 * i]);
        grad_norm_sum[i] += std::hypot(0.5f * s.width * g.mean.x, 0.5f * s.height * g.mean.y);
        visits[i] += 1;
    }
}

using Plane = std::vector<float>;

Plane blur(const Plane& in, int width, int height, const float* tap) {
    Plane along_x(in.size()), out(in.size());
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x) {
            float sum = 0;
            for (int k = std::max(-5, -x); k <= std::min(5, width - 1 - x); ++k)
                sum += tap[5 + k] * in[y * width + x + k];
            along_x[y * width + x] = sum;
        }
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x) {
            float sum = 0;
            for (int k = std::max(-5, -y); k <= std::min(5, height - 1 - y); ++k)
                sum += tap[5 + k] * along_x[(y + k) * width + x];
            out[y * width + x] = sum;
        }
    return out;
}

// (1 - lambda) L1 + lambda (1 - SSIM), and its gradient.
float loss(Step& s, const uint8_t* target, float lambda) {
    const int64_t pixels = int64_t(s.width) * s.height;
    const float c1 = 0.01f * 0.01f, c2 = 0.03f * 0.03f, share = 1.f / (3 * pixels);
    float tap[11], total = 0;
    for (int k = 0; k < 11; ++k) total += tap[k] = std::exp(-(k - 5) * (k - 5) / 4.5f);
    for (float& t : tap) t /= total;
    double l1 = 0, ssim = 0;
    for (int channel = 0; channel < 3; ++channel) {
        const float* image = s.image.data() + channel * pixels;
        Plane a(pixels), b(pixels), squares(pixels), product(pixels), d_mean(pixels), d_squares(pixels),
            d_product(pixels);
        for (int64_t i = 0; i < pixels; ++i) {
            a[i] = clamp(image[i], 0.f, 1.f), b[i] = target[channel * pixels + i] / 255.f;
            squares[i] = a[i] * a[i] + b[i] * b[i], product[i] = a[i] * b[i];
        }
        const auto blurred_plane = [&](const Plane& p) { return blur(p, s.width, s.height, tap); };
        const Plane ma = blurred_plane(a), mb = blurred_plane(b), ms = blurred_plane(squares),
                    mp = blurred_plane(product);
        for (int64_t i = 0; i < pixels; ++i) {
            const float ab = ma[i] * mb[i], aabb = ma[i] * ma[i] + mb[i] * mb[i];
            const float n1 = 2 * ab + c1, n2 = 2 * (mp[i] - ab) + c2, m1 = aabb + c1, m2 = ms[i] - aabb + c2;
            const float inv = 1 / (m1 * m2), S = n1 * n2 * inv;
            ssim += S;
            d_mean[i] = 2 * (mb[i] * (n2 - n1) * inv - S * ma[i] * (1 / m1 - 1 / m2));
            d_squares[i] = -S / m2, d_product[i] = 2 * n1 * inv;
        }
        const Plane gm = blurred_plane(d_mean), gq = blurred_plane(d_squares), gp = blurred_plane(d_product);
        for (int64_t i = 0; i < pixels; ++i) {
            const float d = a[i] - b[i];
            l1 += std::abs(d);
            const float g = (1 - lambda) * (d > 0   ? 1
                                            : d < 0 ? -1
                                                    : 0) -
                            lambda * (gm[i] + 2 * a[i] * gq[i] + b[i] * gp[i]);
            s.grad_image[channel * pixels + i] = a[i] == image[i] ? share * g : 0;
        }
    }
    return float((1 - lambda) * l1 * share + lambda * (1 - ssim * share));
}

void adam(float* param, const float* grad, float* avg, float* avg_sq, int64_t count, float lr, float eps, int step) {
    const float beta1 = 0.9f, beta2 = 0.999f;
    const float correction1 = 1 - std::pow(beta1, step), correction2 = std::sqrt(1 - std::pow(beta2, step));
    for (int64_t i = 0; i < count; ++i) {
        avg[i] = beta1 * avg[i] + (1 - beta1) * grad[i];
        avg_sq[i] = beta2 * avg_sq[i] + (1 - beta2) * grad[i] * grad[i];
        param[i] -= lr * avg[i] / correction1 / (std::sqrt(avg_sq[i]) / correction2 + eps);
    }
}

}  // namespace

// One step over raw parameters, as train_step has it. Without a target only the image [3, H, W] is made.
extern "C" float plain_step(int64_t count, int width, int height, float* const* param, float* const* avg,
                            float* const* avg_sq, const float* lrs, int step, const float* world_to_camera,
                            const float* K, const float* background, const uint8_t* target, float* grad_norm_sum,
                            float* visits, float* image) {
    static Step s;  // its vectors keep their memory from step to step
    const int64_t pixels = int64_t(width) * height;
    s.count = count, s.width = width, s.height = height;
    s.tiles_x = (width + kTileSize - 1) / kTileSize, s.tiles_y = (height + kTileSize - 1) / kTileSize;
    s.camera = make_camera(world_to_camera, K, static_cast<const float*>(nullptr), width, height);
    std::copy_n(param, 6, s.param);
    s.splats.resize(count);
    s.image.resize(3 * pixels), s.grad_image.resize(3 * pixels), s.transmittance.resize(pixels),
        s.looked_at.resize(pixels);
    for (int t = 0; t < 6; ++t) s.grad[t].resize(count * kColumns[t]);

    project(s);
    make_lists(s);
    blend(s, at3(background, 0));
    std::copy(s.image.begin(), s.image.end(), image);
    if (!target) return 0;
    const float value = loss(s, target, 0.2f);
    blend_backward(s, at3(background, 0));
    project_backward(s, grad_norm_sum, visits);
    for (int t = 0; t < 6; ++t)
        adam(param[t], s.grad[t].data(), avg[t], avg_sq[t], count * kColumns[t], lrs[t], 1e-15f, step);
    return value;
}
