// Steps of Gaussians that several processes hold: schemas. Only GPUs have them, see ops_dealt_cuda.cpp.
#include <torch/library.h>

#define MODEL                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float[] lrs, float beta1, float beta2, " \
    "float eps, int step, Tensor[] world_to_camera, Tensor[] K, int[] widths, int[] heights, int sh_degree, "      \
    "bool antialiasing, "

TORCH_LIBRARY_FRAGMENT(tilesplat, m) {
    // What each of C cameras sees of the N Gaussians here, which are the rows rank, rank + ranks, ... of all: records
    // [capacity, 16], one camera after the other, each in the order of rows; slots [C, N] int32, eight times the number of a
    // Gaussian's record plus a bit for each channel that is not dark, or -1; and totals [C, 4] int64, of which the second
    // column is how many records a camera has. Should they be more than `capacity`, the call has to be repeated. The moments
    // are for rows that wait (see train_step, which has the same first arguments): those that the cameras can show catch up.
    m.def("dealt_project" MODEL
          "int rank, int ranks, int capacity, Tensor(d!)? moved_at=None, Tensor? missed=None) "
          "-> (Tensor, Tensor, Tensor)");

    // Of records that have come from several processes, counts[i] of them from the i-th: splats [M, 12] and the lists of
    // their tiles, which are ids [entries], ranges [tiles, 2] and totals [4]. The memory of the records is given up.
    m.def("dealt_lists(Tensor(a!) records, int[] counts, int width, int height) -> (Tensor, Tensor, Tensor, Tensor)");

    // Their picture against the photo `target`: gradients of the splats [M, 12]. losses [2]: loss and L1 loss.
    m.def(
        "dealt_blend(Tensor splats, Tensor ids, Tensor ranges, Tensor(a!) totals, Tensor background, Tensor target, "
        "Tensor? mask, float lambda_dssim, bool absolute, Tensor(b!) losses) -> Tensor");

    // Adam's step along the mean of the cameras' gradients [M, 12], which have come back for what dealt_project has left,
    // and along those of the pulls times the sums of opacities and of scales.
    m.def("dealt_step" MODEL
          "Tensor slots, Tensor grads, float opacity_pull, float scale_pull, Tensor(d!)? grad_norm_sum, Tensor(e!)? "
          "visits, "
          "Tensor(f!)? abs_grad_norm_sum, Tensor(g!)? moved_at=None, Tensor(h!)? missed=None) -> ()");
}
