#include "linear_float.h"

#include "../../simd/scalar.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear_float.inc"

extern const nm::LinearFloatKernels kLinearFloatScalar;
const nm::LinearFloatKernels kLinearFloatScalar{run};
