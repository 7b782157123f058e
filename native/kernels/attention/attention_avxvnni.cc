#include "attention.h"

#include "../../simd/avxvnni.h"
#include "../../simd/math.inc"
#include "../linear/tile.inc"
#include "../linear_float/tile.inc"

#include "attention.inc"

extern const nm::AttentionKernels kAttentionAvxvnni;
const nm::AttentionKernels kAttentionAvxvnni{run, run_float};
