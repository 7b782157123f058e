// Arguments of the kernels that turn tokens x features into features x lanes and back.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

// One column of 16 lanes: token l has `features` numbers at token[l], and lane l of row f is lanes[f * width + l].
struct ColumnArgs {
  const float* token[16];
  size_t features, width;
  float* lanes;
};

struct LeaveArgs {
  float* token[16];  // null: not wanted
  size_t features, width;
  const float* lanes;
};

struct EmbedTable {
  const void* rows;  // [.., features] float, or IEEE half
  bool half;
  uint32_t row[16];  // of each lane
};

struct EmbedArgs {
  const EmbedTable* tables;
  size_t count, features, width;
  float* lanes;
};

struct IoKernels {
  void (*enter)(const ColumnArgs&);  // lanes = tokens
  void (*leave)(const LeaveArgs&);   // tokens = lanes
  void (*embed)(const EmbedArgs&);   // lanes = sum over tables of their rows, in the order of the tables
};

}  // namespace nm
