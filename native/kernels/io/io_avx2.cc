#include "io.h"

#include "../../simd/avx2.h"
#include "../../simd/transpose_avx2.h"
#include "io.inc"

extern const nm::IoKernels kIoAvx2;
const nm::IoKernels kIoAvx2{enter, leave, embed};
