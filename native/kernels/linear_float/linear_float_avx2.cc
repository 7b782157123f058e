#include "linear_float.h"

#include "../../simd/avx2.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear_float.inc"

extern const nm::LinearFloatKernels kLinearFloatAvx2;
const nm::LinearFloatKernels kLinearFloatAvx2{run};
