#include "attention.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/falling_avx512vnni.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionAvx512vnni;
const nm::AttentionKernels kAttentionAvx512vnni{run, run_float};
