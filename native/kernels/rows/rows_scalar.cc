#include "rows.h"

#include "../../simd/scalar.h"
#include "../../simd/words_scalar.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsScalar;
const nm::RowsKernels kRowsScalar{norm, quantize, affine, unary, binary};
