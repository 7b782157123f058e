#include "io.h"

#include "../../simd/neon.h"
#include "../../simd/transpose_neon.h"
#include "io.inc"

extern const nm::IoKernels kIoDotprod;
const nm::IoKernels kIoDotprod{enter, leave, embed};
