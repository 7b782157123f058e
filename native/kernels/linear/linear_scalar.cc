#include "linear.h"

#include "../../simd/scalar.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear.inc"

extern const nm::LinearKernels kLinearScalar;
const nm::LinearKernels kLinearScalar{run};
