// Arguments of the row kernels: normalise, quantize and elementwise steps.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

enum Binary { kAdd, kSub, kMul };

// Lanes [0, lanes) of one panel, lanes a multiple of 16; pointers start at the first of them, rows are `width` apart.
struct PanelArgs {
  const float* x;      // [R][width]
  size_t rows, width, lanes;
  float* y;            // [R][width] or null; may be x
  uint8_t* q;          // [ceil(R/4)][width][4] or null
  float inverse;       // 1 / q's scale
  int32_t zero;        // q's zero point
  const float* gamma;  // [R] or null: factor
  const float* beta;   // [R] or null: summand
  const float* q_mul;  // [R] factor and
  const float* q_add;  // [R] summand that give q in steps, of norm only
  float eps;
  bool rms;            // no mean
};

struct FlatArgs {
  const float* a;
  const float* b;
  float* y;
  size_t count;  // a multiple of 16
  int op;        // Activation, or Binary
};

struct RowsKernels {
  void (*norm)(const PanelArgs&);      // z = (x - mean) / sqrt(var + eps), y = z * gamma + beta, q = z * q_mul + q_add
  void (*quantize)(const PanelArgs&);  // q = x
  void (*affine)(const PanelArgs&);    // y = x * gamma + beta
  void (*unary)(const FlatArgs&);      // y = op(a)
  void (*binary)(const FlatArgs&);     // y = a op b
};

}  // namespace nm
