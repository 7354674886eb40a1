// args.h: what the stages of both backends take and return, as plain pointers. N Gaussians, all arrays row-major.
#pragma once
#include <cstdint>

#include "lens.h"

namespace gs {

template <typename T>
struct Gaussians {
    int64_t count;       // N
    const T* means;      // [N, 3]
    const T* quats;      // [N, 4] w x y z        } null where cov3d is given
    const T* scales;     // [N, 3]                }
    const T* cov3d;      // [N, 6] xx xy xz yy yz zz, or null
    const T* opacities;  // [N]
    const T* sh_dc;      // [N, 1, 3]             } null where colors is given
    const T* sh_rest;    // [N, rest_count, 3]    }
    const T* colors;     // [N, 3], or null
    int rest_count;      // coefficients per channel stored in sh_rest: 0, 3, 8 or 15
    int sh_degree;       // the degree to evaluate; (degree + 1)^2 - 1 <= rest_count
    T scale_modifier;    // multiplies every scale
    bool antialiasing;   // opacity shrinks as the blur widens a splat
    bool raw;            // scales are logarithms, opacities logits, quaternions of any length
};

template <typename T>
struct View {
    const T* world_to_camera;  // [4, 4]
    const T* intrinsics;       // [3, 3], pixels, centers of pixels at .5
    const T* camera_center;    // [3], or null: derived from world_to_camera
    const T* background;       // [3]
    int width, height;
    T near_depth;  // splats this close to the camera plane, or behind it, are skipped
};

template <typename T>
struct Image {
    T* color;        // [3, H, W], background blended in
    T* alpha;        // [1, H, W], 1 - final transmittance
    T* inv_depth;    // [1, H, W], sum of 1/z alpha T
    int32_t* radii;  // [N], pixels; 0: not in this view
};

// Gradients with respect to an Image; null where there is none.
template <typename T>
struct ImageGrads {
    const T* color;
    const T* alpha;
    const T* inv_depth;
};

// Gradients with respect to Gaussians and View, and what density control collects. Null: not wanted.
template <typename T>
struct GaussianGrads {
    T* means;
    T* quats;
    T* scales;
    T* cov3d;
    T* opacities;
    T* sh_dc;
    T* sh_rest;
    T* colors;
    T* world_to_camera;    // [4, 4]
    T* background;         // [3]
    T* means2d;            // [N, 3], per NDC unit (pixel gradient times half the image size); the third is 0
    T* grad_norm_sum;      // [N] += |means2d gradient| where radius > 0
    T* visits;             // [N] += 1 where radius > 0
    T* abs_grad_norm_sum;  // [N] += norm of the per-pixel absolute gradients, summed
};

// ---- the stages one by one -----------------------------------------------------------------------------------------

// What `project` does differently from the rasterizer.
template <typename T>
struct Optics {
    Lens<T> lens;
    T blur;  // px^2 added to the projected covariance
    Compensation compensation;
};

// Gaussians on the screen. Rows with radius 0 are not drawn.
template <typename T>
struct OnScreen {
    T* means2d;      // [N, 2] pixels
    T* conics;       // [N, 3] inverse of the blurred covariance, xx xy yy
    T* opacities;    // [N]    activated, compensated
    T* depths;       // [N]
    int32_t* radii;  // [N]
};

// Gradients with respect to it. Read: null where there is none. Written: added to, `absolute` where not null.
template <typename T>
struct OnScreenGrads {
    T* means2d;
    T* conics;
    T* opacities;
    T* depths;
    T* absolute;  // [N, 2] sum over pixels of |gradient of means2d|
};

}  // namespace gs
