#include "attention.h"

#include "../../simd/neon.h"
#include "../../simd/falling_neon.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionI8mm;
const nm::AttentionKernels kAttentionI8mm{run, run_float};
