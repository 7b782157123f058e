#include "linear_float.h"

#include "../../simd/avxvnni.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear_float.inc"

extern const nm::LinearFloatKernels kLinearFloatAvxvnni;
const nm::LinearFloatKernels kLinearFloatAvxvnni{run};
