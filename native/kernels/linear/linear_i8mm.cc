#include "linear.h"

#include "../../simd/neon.h"
#include "../../simd/words_neon.h"
#include "../../simd/math.inc"
#include "linear.inc"

extern const nm::LinearKernels kLinearI8mm;
const nm::LinearKernels kLinearI8mm{run, kPaired, kOffset};
