// Arguments of the fused attention kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

constexpr size_t kQueryTile = 64, kKeyBlock = 128;

// All buffers hold `rows` = heads * depth features of `tokens` packed tokens, in panels of 64.
// A task is (sequence, head, tile of 64 queries), in that order, the last running fastest.
struct AttentionArgs {
  const void* q;          // int8: u8 packed [rows/4][w][4];  float: [rows][w]
  const void* k;          // int8: s8 packed;                 float: [rows][w]
  const void* v;          // int8: s8 rows [rows][w];         float: [rows][w]
  void* y;                // u8 packed or f32
  bool y_bytes;
  size_t tokens, rows, heads, depth;
  const uint32_t* starts;  // [sequences + 1] first token of each sequence
  size_t sequences;
  size_t first, last;      // tasks
  bool causal;
  float scale;             // of the integer score (q_scale * k_scale * 1/sqrt(d)), or of the float one
  int32_t q_zero;
  float v_scale;
  float y_inverse;
  int32_t y_zero;
  uint8_t* scratch;        // scratch_bytes(depth), 64-byte aligned, this thread's own
};

struct AttentionKernels {
  void (*run)(const AttentionArgs&);
  void (*run_float)(const AttentionArgs&);
};

// Bytes of scratch a thread needs; the float kernel's need covers the int8 one's.
//   scores, probabilities: [128][64]; keys, values: [128][depth]; query, output, product: [depth][64]; 3 rows of 64
static inline size_t attention_scratch(size_t depth) {
  return 4 * (2 * kKeyBlock * kQueryTile + 2 * kKeyBlock * depth + 3 * depth * kQueryTile + kKeyBlock +
              3 * kQueryTile + depth);
}

}  // namespace nm
