#include "attention.h"

#include "../../simd/scalar.h"
#include "../../simd/falling_scalar.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionScalar;
const nm::AttentionKernels kAttentionScalar{run, run_float};
