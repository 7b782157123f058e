#include "rows.h"

#include "../../simd/avx2.h"
#include "../../simd/words_avx2.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsAvx2;
const nm::RowsKernels kRowsAvx2{norm, quantize, affine, unary, binary};
