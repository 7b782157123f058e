#include "attention.h"

#include "../../simd/avx2.h"
#include "../../simd/falling_avx2.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionAvx2;
const nm::AttentionKernels kAttentionAvx2{run, run_float};
