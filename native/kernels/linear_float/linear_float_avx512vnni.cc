#include "linear_float.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear_float.inc"

extern const nm::LinearFloatKernels kLinearFloatAvx512vnni;
const nm::LinearFloatKernels kLinearFloatAvx512vnni{run};
