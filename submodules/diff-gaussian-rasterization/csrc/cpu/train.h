// train.h: the end of a training step. A chunk's gradients are computed into a scratch block that stays in the cache, and Adam
// moves the chunk's parameters from there. Same results, bit for bit, as project_backward and adam one after the other.
#pragma once
#include <memory>

#include "adam.h"
#include "project_backward.h"

namespace gs::cpu::GS_ISA {

static void project_backward_and_step(const Gaussians<Number>& g, const View<Number>& v, const Frame<Number>& f,
                                      const Number* records, const Trained<Number>& t, const Statistics& statistics) {
    const Camera<F> camera = broadcast_camera(v);
    const int64_t columns[kTrained] = {3, 3, 3 * int64_t(g.rest_count), 1, 3, 4};
    int64_t per_splat = 0;
    for (const int64_t c : columns) per_splat += c;
    const size_t block_bytes = kChunk * per_splat * sizeof(Number);
    {  // Tasks find their blocks in the pool: none may run out of memory when others have moved their rows.
        const int64_t tasks = f.chunks() < thread_count() ? f.chunks() : thread_count();
        const std::unique_ptr<Buffer[]> blocks(new Buffer[tasks]);
        for (int64_t i = 0; i < tasks; ++i) blocks[i].grow(block_bytes);
    }
    parallel(f.chunks(), [&](int64_t chunk) {
        const int64_t first = chunk * kChunk, rows = g.count - first < kChunk ? g.count - first : kChunk;
        const Buffer block(block_bytes);
        Number* grad[kTrained];
        Number* next = block.as<Number>();
        for (int i = 0; i < kTrained; ++i) grad[i] = next, next += kChunk * columns[i];
        GaussianGrads<Number> out = {};
        out.means = grad[0], out.sh_dc = grad[1], out.sh_rest = grad[2];
        out.opacities = grad[3], out.scales = grad[4], out.quats = grad[5];
        project_backward_chunk(g, v, camera, f, records, false, chunk, out, statistics, nullptr);
        for (int i = 0; i < kTrained; ++i) {
            const int64_t at = first * columns[i];
            adam(t.param[i] + at, grad[i], t.avg[i] + at, t.avg_sq[i] + at, rows * columns[i], t.rates[i]);
        }
    });
}

}  // namespace gs::cpu::GS_ISA
