#include "io.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/transpose_avx512vnni.h"
#include "io.inc"

extern const nm::IoKernels kIoAvx512vnni;
const nm::IoKernels kIoAvx512vnni{enter, leave, embed};
