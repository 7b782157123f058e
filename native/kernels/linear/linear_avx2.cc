#include "linear.h"

#include "../../simd/avx2.h"
#include "../../simd/words_avx2.h"
#include "../../simd/math.inc"
#include "linear.inc"

extern const nm::LinearKernels kLinearAvx2;
const nm::LinearKernels kLinearAvx2{run, kPaired, kOffset};
