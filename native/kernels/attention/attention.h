// Arguments of the fused attention kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

// A call computes one panel of 64 query tokens for some heads. Buffers hold `rows` = heads * depth features of packed
// tokens, panel after panel: queries and results those of `tokens`, keys and values those of `key_tokens`, which may be
// tokens of another kind of the same sequences. w is a panel's width: 64, for the last panel what is left, rounded up
// to 16.
//   int8:  q, y  [rows/4][w][4 features]               u8
//          k     [w/4][rows/4][4 tokens][4 features]   s8
//          v     [rows/4][w/4][4 features][4 tokens]   s8
//   float: q, k, v [rows][w];  y also in int8 attention when y_bytes is false
// Keys and values beside a sequence, in lanes past `key_tokens` included, may be any bytes; they do not count. Queries
// that see no key are left as they lie, or get anything.
struct AttentionArgs {
  const void* q;  // this panel
  void* y;        // this panel; lanes past `tokens` get anything finite
  const void* k;  // all panels
  const void* v;
  bool y_bytes;
  size_t tokens, key_tokens, rows, heads, depth, panel;
  const uint32_t* starts;      // [sequences + 1] first query of each sequence, the last one `tokens`; may be empty
  const uint32_t* key_starts;  // [sequences + 1] likewise of the keys
  size_t sequences;
  size_t first, last;  // heads
  bool causal;
  const int32_t* seen;  // [64] of a causal panel: the last key that each query sees, the last query's in the lanes past
                        // `tokens`; null: its own, where queries and keys are the same tokens
  float scale;  // of the integer score (q_scale * k_scale / sqrt(depth)), or of the float one
  int32_t q_zero;
  float v_scale;
  float y_inverse;
  int32_t y_zero;
  uint8_t* scratch;  // attention_scratch(depth) bytes, 64-byte aligned, this thread's own
};

struct AttentionKernels {
  void (*run)(const AttentionArgs&);
  void (*run_float)(const AttentionArgs&);
};

constexpr size_t kKeyBlock = 512;      // keys of an int8 block: the scores of 64 queries take 128 KiB, an L2's share
constexpr size_t kFloatKeyBlock = 64;  // a panel

// Bytes of scratch a thread needs; the int8 kernel's need covers the float one's.
//   scores i32 [keys][64], probabilities u8 [keys][64], output f32 [depth][64], rows of 64, a sum for each key
static inline size_t attention_scratch(size_t depth) {
  return 5 * 64 * kKeyBlock + 4 * 64 * (depth + 16) + 4 * kKeyBlock;
}

}  // namespace nm
