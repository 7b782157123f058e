#include "attention.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/math.inc"
#include "../linear/tile.inc"
#include "../linear_float/tile.inc"

#include "attention.inc"

extern const nm::AttentionKernels kAttentionAvx512vnni;
const nm::AttentionKernels kAttentionAvx512vnni{run, run_float};
