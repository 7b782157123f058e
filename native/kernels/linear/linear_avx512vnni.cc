#include "linear.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear.inc"

extern const nm::LinearKernels kLinearAvx512vnni;
const nm::LinearKernels kLinearAvx512vnni{run};
