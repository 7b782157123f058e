// Weights for kernels that add the products of two adjacent inputs in 16 bits (vpmaddubsw of AVX2 without VNNI). With
// inputs of 0 to 255 a pair of weights is exact where their signs differ, and where |a + b| <= 128, as 255 * 128 = 32640.
// What is beyond, a few pairs in a hundred, goes into a second block of the same inputs, so the sums are those of the
// weights, to the bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace nm {

// Both write to `values` what takes the place of the weights `from`; where all of them fit, they do nothing.

// What tiles [4][4] of a dense weight lack, as blocks of 2 rows x 4 inputs by group.
struct Rest {
  std::vector<int8_t> values;
  std::vector<uint16_t> columns;  // [blocks]
  std::vector<uint32_t> starts;   // [2 * tiles + 1], or none
};
Rest dense_pairs(const int8_t* from, size_t tiles, size_t groups, std::vector<int8_t>& values);

// Blocks of `size` weights at `each` columns, those that do not fit as two in a row; starts, per row, move with them.
void block_pairs(const int8_t* from, size_t size, size_t each, std::vector<int8_t>& values,
                 std::vector<uint16_t>& columns, std::vector<uint32_t>& starts);

}  // namespace nm
