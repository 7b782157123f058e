#include "linear.h"

#include "../../simd/avxvnni.h"
#include "../../simd/words_avx2.h"
#include "../../simd/math.inc"
#include "linear.inc"

extern const nm::LinearKernels kLinearAvxvnni;
const nm::LinearKernels kLinearAvxvnni{run, kPaired, kOffset};
