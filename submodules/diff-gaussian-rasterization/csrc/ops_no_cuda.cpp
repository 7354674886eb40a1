// Stands in for ops_cuda.cpp where the CUDA part was not built: says so, instead of the dispatcher's long error.
#include <torch/library.h>

namespace gs {
namespace {

void no_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op.schema().name(),
        ": this build of diff_gaussian_rasterization has no CUDA part, but a tensor is on cuda. "
        "Install the CUDA toolkit and reinstall with TILESPLAT_CUDA=1, or move the tensors to cpu.");
}

}  // namespace
}  // namespace gs

TORCH_LIBRARY_IMPL(tilesplat, CUDA, m) {
    for (const char* name : {"rasterize",      "rasterize_backward",
                             "mark_visible",   "ssim",
                             "ssim_backward",  "photometric_loss",
                             "adam_step",      "train_step",
                             "settle",         "knn_mean_dist2",
                             "project",        "project_backward",
                             "lists",          "blend",
                             "blend_backward", "scores",
                             "pair_colors",    "pair_colors_backward",
                             "dealt_project",  "dealt_lists",
                             "dealt_blend",    "dealt_step",
                             "near_rows",      "fetch_rows",
                             "store_rows"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&gs::no_cuda>());
    }
}
