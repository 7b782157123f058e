// Weights for kernels that add the products of two adjacent inputs in 16 bits (vpmaddubsw of AVX2 without VNNI). With
// inputs of 0 to 255 a pair of weights is exact where their signs differ, and where |a + b| <= 128, as 255 * 128 = 32640.
// What is beyond, a few pairs in a hundred, goes into a second block of the same inputs, so the sums are those of the
// weights, to the bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace nm {

// Whether a block of `count` weights, a multiple of 2, is exact as it is.
bool fits_pairs(const int8_t* w, size_t count);

// Splits a block: w = kept + rest, both of which fit.
void split_pairs(const int8_t* w, int8_t* kept, int8_t* rest, size_t count);

// The tiles [4][4] of a dense weight as they are kept, and the rest as blocks of 2 rows x 4 inputs by group.
struct DensePairs {
  std::vector<int8_t> values, rest;  // empty: the weight fits as it is
  std::vector<uint16_t> columns;     // [blocks of rest]
  std::vector<uint32_t> starts;      // [2 * tiles + 1]
};
DensePairs dense_pairs(const int8_t* values, size_t tiles, size_t groups);

// Blocks of `size` weights at `each` columns, those that do not fit as two in a row; starts, per row, move with them.
// False, and nothing is done: all fit.
bool block_pairs(const int8_t* from, size_t size, size_t each, std::vector<int8_t>& values,
                 std::vector<uint16_t>& columns, std::vector<uint32_t>& starts);

}  // namespace nm
