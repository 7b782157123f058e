#include "rows.h"

#include "../../simd/neon.h"
#include "../../simd/words_neon.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsDotprod;
const nm::RowsKernels kRowsDotprod{norm, quantize, affine, unary, binary};
