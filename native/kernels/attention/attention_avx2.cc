#include "attention.h"

#include "../../simd/avx2.h"
#include "../../simd/math.inc"
#include "../linear/tile.inc"
#include "../linear_float/tile.inc"

#include "attention.inc"

extern const nm::AttentionKernels kAttentionAvx2;
const nm::AttentionKernels kAttentionAvx2{run, run_float};
