// How tokens lie in a buffer: layouts and panels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nm {

constexpr size_t kPanelTokens = 64;

// By panel, w = panel_width; attention's products take keys and values as they are, in tiles of 4 x 4 bytes:
//   f32    [R][w] float                        u8      [ceil(R/4)][w][4 features] bytes
//   keys   [w/4][ceil(R/4)][4 tokens][4 features]       values  [ceil(R/4)][w/4][4 features][4 tokens]  signed bytes
enum class Layout { kF32, kU8, kKeys, kValues };
const char* layout_name(Layout layout);

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
inline size_t panels(size_t tokens) { return (tokens + kPanelTokens - 1) / kPanelTokens; }
// Lanes of panel p: 64, and for the last one what is left, rounded up to 16.
inline size_t panel_width(size_t tokens, size_t p) {
  const size_t left = tokens - p * kPanelTokens;
  return left >= kPanelTokens ? kPanelTokens : round_up(left, 16);
}
inline size_t lanes(size_t tokens) { return round_up(tokens, 16); }

struct Buffer {
  size_t rows;
  Layout layout;
  size_t stream;  // of the program's streams: its real tokens, sequence after sequence
  bool written = false;

  size_t row_bytes() const {  // bytes of one lane, all rows
    return layout == Layout::kF32 ? rows * 4 : round_up(rows, 4);
  }
};

}  // namespace nm
