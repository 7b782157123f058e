// Arguments of the int8 linear kernel. Layouts: ARCHITECTURE.md, "native".
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

enum class Store { kFloat, kPacked, kRows };  // f32 [N][w]; bytes [N/4][w][4]; bytes [N][w]

// One panel of w tokens (w a multiple of 16, at most 64) and the strips [first, last) of 16 outputs.
struct LinearArgs {
  const uint8_t* x;        // [groups][w][4]
  size_t width;            // w
  size_t groups;           // ceil(K/4)
  size_t outputs;          // N
  size_t first, last;      // strips
  // Dense when rows == 0: values is int8 [ceil(N/4)][groups][4][4]. Else blocks of rows x 4 inputs:
  // values int8 [blocks][rows][4], columns [blocks] the group of each, starts [ceil(N/rows)+1].
  size_t rows;
  const int8_t* values;
  const uint16_t* columns;
  const uint32_t* starts;
  const int32_t* init;     // [16-padded N]  -zero_point * sum of the row's weights
  const float* scale;      // [16-padded N]  x_scale * w_scale
  const float* bias;       // [16-padded N]
  int activation;          // Activation of simd/math.inc
  const float* residual;   // f32 [N][w] of this panel, or null
  void* y;                 // this panel
  Store store;
  float y_inverse;         // 1 / y_scale
  int32_t y_zero, y_low, y_high;
};

struct LinearKernels {
  void (*run)(const LinearArgs&);
};

}  // namespace nm
