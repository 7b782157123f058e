#include "linear.h"

#include "../../simd/scalar.h"
#include "../../simd/words_scalar.h"
#include "../../simd/math.inc"
#include "linear.inc"

extern const nm::LinearKernels kLinearScalar;
const nm::LinearKernels kLinearScalar{run, kPaired, kOffset};
