#include "io.h"

#include "../../simd/scalar.h"
#include "../../simd/transpose_scalar.h"
#include "io.inc"

extern const nm::IoKernels kIoScalar;
const nm::IoKernels kIoScalar{enter, leave, embed};
