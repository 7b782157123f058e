#include "linear.h"

#include "../../simd/avxvnni.h"
#include "../../simd/math.inc"
#include "tile.inc"

#include "linear.inc"

extern const nm::LinearKernels kLinearAvxvnni;
const nm::LinearKernels kLinearAvxvnni{run};
