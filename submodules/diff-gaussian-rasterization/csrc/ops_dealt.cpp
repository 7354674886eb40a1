// Steps of Gaussians that several processes hold: schemas. Only GPUs have them, see ops_dealt_cuda.cpp.
#include <torch/library.h>

#define MODEL                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float[] lrs, float beta1, float beta2, " \
    "float eps, int step, Tensor[] world_to_camera, Tensor[] K, int[] widths, int[] heights, int sh_degree, "      \
    "bool antialiasing, "

TORCH_LIBRARY_FRAGMENT(tilesplat, m) {
    // What each of C cameras sees of the N Gaussians here, which are the rows rank, rank + ranks, ... of all: records
    // [capacity, 16], one camera after the other, each in the order of rows; slots [C, N] int32, the number of a Gaussian's
    // record or -1; and totals [C, 4] int64, of which the second column is how many records a camera has. Should they be
    // more than `capacity`, the call has to be repeated. The moments are for rows that wait (see train_step, which has the
    // same first arguments): those that the cameras can show catch up.
    m.def("dealt_project" MODEL
          "int rank, int ranks, int capacity, Tensor(d!)? moved_at=None, Tensor? missed=None) "
          "-> (Tensor, Tensor, Tensor)");

    // The picture of records [M, 16] that have come from several processes, counts[i] of them from the i-th, against the
    // photo `target`: gradients of their splats [M, 12]. losses [2]: loss and L1 loss.
    m.def(
        "dealt_blend(Tensor records, int[] counts, Tensor background, Tensor target, Tensor? mask, float lambda_dssim, "
        "bool absolute, Tensor(a!) losses) -> Tensor");

    // Adam's step along the mean of the cameras' gradients [M, 12], which have come back for what dealt_project has left.
    m.def("dealt_step" MODEL
          "Tensor records, Tensor slots, Tensor grads, Tensor(d!)? grad_norm_sum, Tensor(e!)? visits, "
          "Tensor(f!)? abs_grad_norm_sum, Tensor(g!)? moved_at=None, Tensor(h!)? missed=None) -> ()");
}
