#include "attention.h"

#include "../../simd/avxvnni.h"
#include "../../simd/falling_avx2.h"
#include "../../simd/math.inc"

#include "attention.inc"
#include "attention_int8.inc"
#include "attention_float.inc"

extern const nm::AttentionKernels kAttentionAvxvnni;
const nm::AttentionKernels kAttentionAvxvnni{run, run_float};
