// machine.cpp: the CPU part alone, without torch, on whatever machine it is compiled for. Every instruction set that is built
// in renders a scene, and back, by way of all kernels, and is held against the kernels in double.
//
// test_machines.py compiles it with ../../submodules/diff-gaussian-rasterization/csrc/cpu and runs it, emulated where need be.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/stages.h"
#include "cpu/threads.h"

namespace gs::cpu {

int thread_count() { return 1; }

void run_tasks(int64_t count, void (*body)(void*, int64_t), void* context) {
    for (int64_t task = 0; task < count; ++task) body(context, task);
}

}  // namespace gs::cpu

using namespace gs;
using cpu::Frame;
using cpu::Kernels;

namespace {

constexpr int kCount = 600, kWidth = 75, kHeight = 53, kChannels = 5, kRest = 15;
constexpr int64_t kPixels = int64_t(kWidth) * kHeight;

// The same numbers everywhere, in [low, high). From this seed on, no splat fades so near a threshold in any pixel that
// rounding, which differs from compiler to compiler, decides whether it is seen there.
struct Random {
    uint64_t state = 7;
    double operator()(double low, double high) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return low + (high - low) * double(state >> 11) / double(uint64_t(1) << 53);
    }
};

// As float holds them, so that float and double begin with the same numbers.
template <typename T>
std::vector<T> numbers(Random& random, int64_t count, double low, double high) {
    std::vector<T> out(count);
    for (T& x : out) x = T(float(random(low, high)));
    return out;
}

struct Named {
    std::string name;
    std::vector<double> values;
};

template <typename T>
Named named(const char* name, const std::vector<T>& values) {
    return {name, {values.begin(), values.end()}};
}

template <typename T>
struct Scene {
    Random random;
    std::vector<T> means, quats, scales, opacities, sh_dc, sh_rest;
    std::vector<T> pose = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 4, 0, 0, 0, 1};
    std::vector<T> intrinsics = {60, 0, T(0.5 * kWidth), 0, 60, T(0.5 * kHeight), 0, 0, 1};
    std::vector<T> background = {T(0.25), T(0.5), T(0.75)};

    Scene() {
        means = numbers<T>(random, 3 * kCount, -2, 2), quats = numbers<T>(random, 4 * kCount, -1, 1);
        scales = numbers<T>(random, 3 * kCount, -4, -1), opacities = numbers<T>(random, kCount, -3, 3);
        sh_dc = numbers<T>(random, 3 * kCount, -1, 1), sh_rest = numbers<T>(random, 3 * kRest * kCount, -0.2, 0.2);
    }

    Gaussians<T> gaussians() const {
        Gaussians<T> g = {};
        g.count = kCount, g.means = means.data(), g.quats = quats.data(), g.scales = scales.data();
        g.opacities = opacities.data(), g.sh_dc = sh_dc.data(), g.sh_rest = sh_rest.data();
        g.rest_count = kRest, g.sh_degree = 3, g.scale_modifier = 1, g.antialiasing = true, g.raw = true;
        return g;
    }
    View<T> view() const {
        return {pose.data(), intrinsics.data(), nullptr, background.data(), kWidth, kHeight, T(0.2)};
    }
};

// A frame and its memory.
template <typename T>
struct Memory {
    Frame<T> frame = {};
    cpu::Buffer splats{kCount * sizeof(cpu::Splat<T>)}, entries, touched;
    std::vector<int32_t> visible = std::vector<int32_t>(kCount), visible_count, tile_order, last;
    std::vector<cpu::SlotRange> slots = std::vector<cpu::SlotRange>(kCount);
    std::vector<int64_t> tile_begin;
    std::vector<T> transmittance;
    std::vector<cpu::DepthKey<T>> keys = std::vector<cpu::DepthKey<T>>(kCount);
    int64_t entry_count = 0;

    Memory() {
        Frame<T>& f = frame;
        f.count = kCount, f.width = kWidth, f.height = kHeight;
        f.tiles_x = (kWidth + 15) / 16, f.tiles_y = (kHeight + 15) / 16;
        visible_count.resize(f.chunks()), tile_order.resize(f.tiles()), tile_begin.resize(f.tiles() + 1);
        transmittance.resize(256 * f.tiles()), last.resize(256 * f.tiles());
        f.splats = splats.template as<cpu::Splat<T>>(), f.visible = visible.data();
        f.visible_count = visible_count.data(), f.slots = slots.data(), f.tile_begin = tile_begin.data();
        f.tile_order = tile_order.data(), f.transmittance = transmittance.data(), f.last = last.data();
    }

    void bin(const Kernels<T>& kernels) {
        const auto allocate = [](void* context, Frame<T>& f, int64_t count) {
            Memory& m = *static_cast<Memory*>(context);
            m.entry_count = count;
            m.entries.grow(count * sizeof(cpu::Entry)), m.touched.grow(count * sizeof(uint16_t));
            f.entries = m.entries.template as<cpu::Entry>(), f.touched = m.touched.template as<uint16_t>();
        };
        cpu::bin<T>(kernels, frame, keys.data(), allocate, this);
    }
};

// One call for the picture of colors, and back.
template <typename T>
void picture(const Kernels<T>& k, Scene<T>& s, std::vector<Named>& out) {
    Memory<T> m;
    std::vector<int32_t> radii(kCount);
    std::vector<T> color(3 * kPixels), alpha(kPixels), inv_depth(kPixels);
    k.project(s.gaussians(), s.view(), m.frame, radii.data(), m.keys.data());
    m.bin(k);
    k.blend(m.frame, s.background.data(), {color.data(), alpha.data(), inv_depth.data(), radii.data()});

    const std::vector<T> g_color = numbers<T>(s.random, 3 * kPixels, -1, 1),
                         g_alpha = numbers<T>(s.random, kPixels, -1, 1),
                         g_inv_depth = numbers<T>(s.random, kPixels, -1, 1);
    cpu::Buffer records(m.entry_count * cpu::kRecord * sizeof(T));
    std::vector<T> means(3 * kCount), quats(4 * kCount), scales(3 * kCount), opacities(kCount), sh_dc(3 * kCount),
        sh_rest(3 * kRest * kCount), pose(16), background(3), means2d(3 * kCount);
    std::vector<float> norms(kCount), visits(kCount), absolute(kCount);
    GaussianGrads<T> grads = {};
    grads.means = means.data(), grads.quats = quats.data(), grads.scales = scales.data();
    grads.opacities = opacities.data(), grads.sh_dc = sh_dc.data(), grads.sh_rest = sh_rest.data();
    grads.world_to_camera = pose.data(), grads.means2d = means2d.data();
    k.blend_backward(m.frame, s.background.data(), {g_color.data(), g_alpha.data(), g_inv_depth.data()}, true,
                     records.template as<T>(), background.data());
    k.project_backward(s.gaussians(), s.view(), m.frame, records.template as<T>(), true, grads,
                       {norms.data(), visits.data(), absolute.data()});
    for (const Named& n :
         {named("radii", radii), named("image", color), named("alpha", alpha), named("inverse depth", inv_depth),
          named("gradient of means", means), named("gradient of quats", quats), named("gradient of scales", scales),
          named("gradient of opacities", opacities), named("gradient of sh_dc", sh_dc),
          named("gradient of sh_rest", sh_rest), named("gradient of the pose", pose),
          named("gradient of the background", background), named("gradient norms", norms),
          named("absolute gradients", absolute)})
        out.push_back(n);
}

// The stages one by one, behind a fisheye, with points beside the pixels' centers; and scores.
template <typename T>
void stages(const Kernels<T>& k, Scene<T>& s, std::vector<Named>& out) {
    Memory<T> m;
    m.frame.margin = T(0.5);
    const Optics<T> optics = {{LensKind::fisheye, T(0.1), T(-0.05), 0, 0}, T(0.1), Compensation::mip};
    std::vector<T> means2d(2 * kCount), conics(3 * kCount), opacities(kCount), depths(kCount);
    std::vector<int32_t> radii(kCount);
    const OnScreen<T> screen = {means2d.data(), conics.data(), opacities.data(), depths.data(), radii.data()};
    k.stage_project(s.gaussians(), s.view(), optics, screen);
    k.pack(screen, m.frame, m.keys.data());
    m.bin(k);
    k.pack_again(screen, m.frame);

    const std::vector<T> features = numbers<T>(s.random, kChannels * kCount, 0, 1),
                         offset = numbers<T>(s.random, 2 * kPixels, -0.5, 0.5),
                         g_image = numbers<T>(s.random, kChannels * kPixels, -1, 1),
                         g_left = numbers<T>(s.random, kPixels, -1, 1);
    const cpu::Features<T> look = {features.data(), kChannels, offset.data()};
    std::vector<T> image(kChannels * kPixels), left(kPixels), g_features(kChannels * kCount), g_means2d(2 * kCount),
        g_conics(3 * kCount), g_opacities(kCount), g_absolute(2 * kCount);
    k.blend_features(m.frame, look, image.data(), left.data());
    const OnScreenGrads<T> grads = {g_means2d.data(), g_conics.data(), g_opacities.data(), nullptr, g_absolute.data()};
    k.blend_features_backward(m.frame, look, screen, {g_image.data(), g_left.data(), g_features.data(), grads});
    std::vector<T> means(3 * kCount), quats(4 * kCount), scales(3 * kCount), alphas(kCount), pose(16);
    GaussianGrads<T> back = {};
    back.means = means.data(), back.quats = quats.data(), back.scales = scales.data();
    back.opacities = alphas.data(), back.world_to_camera = pose.data();
    k.stage_project_backward(s.gaussians(), s.view(), optics, radii.data(), grads, back);

    std::vector<T> sums(cpu::kScores * kCount);
    std::vector<int32_t> largest(kPixels), median(kPixels);
    k.scores(m.frame, offset.data(),
             {g_left.data(), nullptr, nullptr, nullptr, nullptr, sums.data(), largest.data(), median.data()});
    for (const Named& n :
         {named("means on the screen", means2d), named("features", image), named("light that passes", left),
          named("gradient of features", g_features), named("gradient of conics", g_conics),
          named("absolute gradients of features", g_absolute), named("gradient of means behind a fisheye", means),
          named("gradient of quats behind a fisheye", quats), named("gradient of its pose", pose),
          named("scores", sums)})
        out.push_back(n);
}

// Losses and the step.
template <typename T>
void training(const Kernels<T>& k, Scene<T>& s, std::vector<Named>& out) {
    const std::vector<T> a = numbers<T>(s.random, 3 * kPixels, -0.1, 1.1), b = numbers<T>(s.random, 3 * kPixels, 0, 1);
    std::vector<T> g_ssim(3 * kPixels), g_loss(3 * kPixels);
    cpu::Ssim<T> ssim = {a.data(), b.data(), 3, kWidth, kHeight, true, g_ssim.data(), 0};
    k.ssim(ssim);
    cpu::Photometric<T> loss = {a.data(), b.data(), nullptr, nullptr, kWidth, kHeight, 0.2, g_loss.data(), 0, 0};
    k.photometric(loss);
    std::vector<T> param = s.means, avg(3 * kCount), avg_sq(3 * kCount);
    for (int step = 1; step <= 3; ++step)
        k.adam(param.data(), a.data(), avg.data(), avg_sq.data(), 3 * kCount,
               {0.01, 0.9, 0.999, 1e-15, 1 - std::pow(0.9, step), 1 - std::pow(0.999, step)});
    for (const Named& n :
         {named("losses", std::vector<double>{ssim.mean, loss.loss, loss.l1}), named("gradient of SSIM", g_ssim),
          named("gradient of the loss", g_loss), named("steps of Adam", param)})
        out.push_back(n);
}

template <typename T>
std::vector<Named> everything() {
    const Kernels<T>& kernels = cpu::kernels<T>();
    Scene<T> scene;
    std::vector<Named> out;
    picture(kernels, scene, out), stages(kernels, scene, out), training(kernels, scene, out);
    return out;
}

double relative_error(const std::vector<double>& values, const std::vector<double>& truth) {
    double error = 0, size = 0;
    for (size_t i = 0; i < truth.size(); ++i)
        error += (values[i] - truth[i]) * (values[i] - truth[i]), size += truth[i] * truth[i];
    return std::sqrt(error / size);  // NaN where something is not finite, or nothing is there
}

}  // namespace

int main() {
    constexpr double kTolerance = 1e-4;
    const std::vector<Named> truth = everything<double>();
    bool good = true;
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        const std::vector<Named> found = everything<float>();
        double worst = 0;
        for (size_t i = 0; i < truth.size(); ++i) {
            const double error = relative_error(found[i].values, truth[i].values);
            worst = error > worst ? error : worst;
            if (error <= kTolerance) continue;
            std::printf("%s: %s is off by %.2e\n", isa.c_str(), truth[i].name.c_str(), error);
            good = false;
        }
        std::printf("%s: %zu results, largest error %.1e of %.0e\n", isa.c_str(), truth.size(), worst, kTolerance);
    }
    std::printf(good ? "all is well\n" : "FAILED\n");
    return good ? 0 : 1;
}
