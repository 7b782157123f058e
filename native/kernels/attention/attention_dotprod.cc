#include "attention.h"

#include "../../simd/neon.h"
#include "../../simd/falling_neon.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionDotprod;
const nm::AttentionKernels kAttentionDotprod{run, run_float};
