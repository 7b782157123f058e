#include "io.h"

#include "../../simd/avxvnni.h"
#include "../../simd/transpose_avx2.h"
#include "io.inc"

extern const nm::IoKernels kIoAvxvnni;
const nm::IoKernels kIoAvxvnni{enter, leave, embed};
