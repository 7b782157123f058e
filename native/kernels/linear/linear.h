// Arguments of the int8 linear kernel. Layouts: engine/shape.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "table.h"

namespace nm {

enum class Store { kFloat, kPacked, kKeys, kValues };
enum class Form { kDense, kBlocks, kGather };

// What becomes of the sums, cheapest first. In the first three, scale and bias give the named unit; see linear.inc.
enum class Epilogue {
  kBytes,    // steps of y: round, pack
  kTable,    // table->unit of a step: activation by table, round, pack
  kFloat,    // 1: activation, residual, f32
  kGeneral,  // 1: activation, residual, clamp, round, pack; for what the others leave over
  kSums,     // nothing is stored, for measuring the products alone
};

// One panel of w tokens (w a multiple of 16, at most 64) and the strips [first, last) of 16 outputs.
struct LinearArgs {
  const uint8_t* x;        // [groups][w][4]
  size_t width;            // w
  size_t groups;           // ceil(K/4)
  size_t outputs;          // N
  size_t first, last;      // strips
  Form form;
  size_t rows;             // of a block
  // kDense:  values int8 [ceil(N/4)][groups][4][4]
  // kBlocks: blocks of rows x 4 adjacent inputs: values int8 [blocks][rows][4], columns [blocks] the group of each,
  //          starts [ceil(N/rows)+1]
  // kGather: blocks of rows x 4 inputs from anywhere: columns [blocks][4] the inputs of each
  const int8_t* values;
  const uint16_t* columns;
  const uint32_t* starts;
  // kDense, of paired kernels: what values lack as blocks of 2 rows x 4 inputs, laid out as in kBlocks; or null
  const int8_t* rest_values;
  const uint16_t* rest_columns;
  const uint32_t* rest_starts;
  const int32_t* init;     // [16-padded N]  (LinearKernels::offset - zero_point) * sum of the row's weights
  const float* scale;      // [16-padded N]
  const float* bias;       // [16-padded N]
  Epilogue epilogue;
  Store store;
  const ActivationTable* table;
  int activation;          // Activation of simd/activation.h, of kFloat and kGeneral; kRelu of kBytes
  const float* residual;   // f32 [N][w] of this panel, or null
  void* y;                 // this panel
  float y_inverse;         // 1 / y_scale
  int32_t y_zero, y_low, y_high;
  uint8_t* scratch;        // linear_scratch bytes, 64-byte aligned, this thread's own
};

struct LinearKernels {
  void (*run)(const LinearArgs&);
  bool paired;  // takes weights as engine/pairs.h leaves them
  int offset;   // is taken from each input: init holds as much of the weights' sum more
};

// Bytes of scratch: the panel with an input per row for kGather, or in halves of 32 tokens for single rows.
static inline size_t linear_scratch(Form form, size_t rows, size_t groups) {
  return form == Form::kGather || (form == Form::kBlocks && rows == 1) ? groups * 4 * 64 : 0;
}

}  // namespace nm
