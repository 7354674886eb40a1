// kernels.isa.cpp: the float kernels, compiled once for every instruction set (setup.py defines TILESPLAT_ISA).
#define GS_NAME_scalar 1
#define GS_NAME_sse 4
#define GS_NAME_neon 4
#define GS_NAME_avx2 8
#define GS_NAME_avx512 16
#define GS_JOIN(a, b) a##b
#define GS_WIDTH_OF(isa) GS_JOIN(GS_NAME_, isa)

#define GS_ISA TILESPLAT_ISA
#define GS_WIDTH GS_WIDTH_OF(TILESPLAT_ISA)
#define GS_NUMBER float
#include "kernels.h"
