// kernels_double.cpp: the same kernels in double, in plain loops: they exist so that gradcheck means something.
#define GS_ISA in_double
#define GS_WIDTH 1
#define GS_NUMBER double
#include "kernels.h"
