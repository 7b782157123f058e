#include "rows.h"

#include "../../simd/neon.h"
#include "../../simd/words_neon.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsI8mm;
const nm::RowsKernels kRowsI8mm{norm, quantize, affine, unary, binary};
