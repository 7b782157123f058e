// How tokens lie in a buffer: layouts, panels, and the packed tokens of one run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace nm {

constexpr size_t kPanelTokens = 64;

// f32: [panel][R][w] float; u8, s8: [panel][ceil(R/4)][w][4] bytes; s8rows: [panel][R][w] bytes. w: panel_width.
enum class Layout { kF32, kU8, kS8, kS8Rows };
// tokens: all real tokens, sequence after sequence; first: one per sequence; tokens1: tokens behind a class token.
enum class Geometry { kTokens, kFirst, kTokens1 };
constexpr int kGeometries = 3;

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
  Geometry geometry;
  bool written = false;

  size_t row_bytes() const {  // bytes of one lane, all rows
    return layout == Layout::kF32 ? rows * 4 : layout == Layout::kS8Rows ? rows : round_up(rows, 4);
  }
};

// The real tokens of a run in one geometry.
struct Tokens {
  size_t count = 0;
  std::vector<uint32_t> starts;    // [B + 1]
  std::vector<uint32_t> sequence;  // [count]
  std::vector<uint32_t> position;  // [count] position in the padded sequence
};

}  // namespace nm
