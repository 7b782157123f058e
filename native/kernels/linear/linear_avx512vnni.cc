#include "linear.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/words_avx512vnni.h"
#include "../../simd/math.inc"
#include "linear.inc"

extern const nm::LinearKernels kLinearAvx512vnni;
const nm::LinearKernels kLinearAvx512vnni{run, kPaired, kOffset};
