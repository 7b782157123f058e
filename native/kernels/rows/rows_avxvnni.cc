#include "rows.h"

#include "../../simd/avxvnni.h"
#include "../../simd/words_avx2.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsAvxvnni;
const nm::RowsKernels kRowsAvxvnni{norm, quantize, affine, unary, binary};
