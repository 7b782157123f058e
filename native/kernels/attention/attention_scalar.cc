#include "attention.h"

#include "../../simd/scalar.h"
#include "../../simd/math.inc"
#include "../linear/tile.inc"
#include "../linear_float/tile.inc"

#include "attention.inc"

extern const nm::AttentionKernels kAttentionScalar;
const nm::AttentionKernels kAttentionScalar{run, run_float};
