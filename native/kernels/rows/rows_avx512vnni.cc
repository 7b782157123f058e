#include "rows.h"

#include "../../simd/avx512vnni.h"
#include "../../simd/words_avx512vnni.h"
#include "../../simd/math.inc"

#include "rows.inc"

extern const nm::RowsKernels kRowsAvx512vnni;
const nm::RowsKernels kRowsAvx512vnni{norm, quantize, affine, unary, binary};
