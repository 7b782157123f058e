#include "linear_float.h"

#include "../../simd/neon.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear_float.inc"

extern const nm::LinearFloatKernels kLinearFloatI8mm;
const nm::LinearFloatKernels kLinearFloatI8mm{run};
