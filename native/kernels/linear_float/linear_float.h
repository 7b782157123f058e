// Arguments of the float linear kernel.
#pragma once
#include <cstddef>

namespace nm {

// One panel of w tokens and the tiles [first, last) of 4 outputs.
struct LinearFloatArgs {
  const float* x;         // [K][w]
  size_t width, inputs, outputs;
  size_t first, last;     // tiles
  const float* weight;    // [ceil(N/4)][K][4]
  const float* bias;      // [4-padded N]
  int activation;
  const float* residual;  // [N][w] or null
  float* y;               // [N][w]
};

struct LinearFloatKernels {
  void (*run)(const LinearFloatArgs&);
};

}  // namespace nm
