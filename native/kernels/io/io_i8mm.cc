#include "io.h"

#include "../../simd/neon.h"
#include "../../simd/transpose_neon.h"
#include "io.inc"

extern const nm::IoKernels kIoI8mm;
const nm::IoKernels kIoI8mm{enter, leave, embed};
