// kernels.h: everything that is compiled per instruction set, and the table through which it is called.
#pragma once
#include "adam.h"
#include "blend_backward.h"
#include "features.h"
#include "loss.h"
#include "project_backward.h"
#include "scores.h"
#include "stage_project.h"
#include "train.h"

#define GS_TEXT_(x) #x
#define GS_TEXT(x) GS_TEXT_(x)

namespace gs::cpu::GS_ISA {

extern const Kernels<Number> table;
const Kernels<Number> table = {GS_TEXT(GS_ISA),
                               project,
                               find_tiles,
                               blend,
                               blend_backward,
                               project_backward,
                               project_backward_and_step,
                               stage_project,
                               stage_project_backward,
                               pack,
                               pack_again,
                               blend_features,
                               blend_features_backward,
                               scores,
                               ssim,
                               photometric,
                               adam};

}  // namespace gs::cpu::GS_ISA
