#include "pairs.h"

#include <algorithm>
#include <cstdlib>

namespace nm {
namespace {

// By how much a pair is beyond: 255 times the sum of the weights of one sign must fit.
int beyond(int a, int b) {
  constexpr int kMost = 128;
  return std::max({std::max(a, 0) + std::max(b, 0) - kMost, -std::min(a, 0) - std::min(b, 0) - kMost, 0});
}

// Whether a block of `count` weights, a multiple of 2, is exact as it is.
bool fits_pairs(const int8_t* w, size_t count) {
  int most = 0;
  for (size_t i = 0; i < count; i += 2) most = std::max(most, beyond(w[i], w[i + 1]));
  return most == 0;
}

// Splits a block: w = kept + rest, both of which fit.
void split_pairs(const int8_t* w, int8_t* kept, int8_t* rest, size_t count) {
  for (size_t i = 0; i < count; i += 2) {
    const int much = beyond(w[i], w[i + 1]);
    const size_t large = std::abs(w[i]) >= std::abs(w[i + 1]) ? i : i + 1;  // has half of the sum, at least `much`
    kept[i] = w[i], kept[i + 1] = w[i + 1], rest[i] = rest[i + 1] = 0;
    rest[large] = static_cast<int8_t>(w[large] < 0 ? -much : much);
    kept[large] = static_cast<int8_t>(w[large] - rest[large]);
  }
}

}  // namespace

Rest dense_pairs(const int8_t* from, size_t tiles, size_t groups, std::vector<int8_t>& values) {
  Rest found;
  const size_t size = tiles * groups * 16;
  if (fits_pairs(from, size)) return found;
  values.assign(from, from + size);
  found.starts.push_back(0);
  for (size_t t = 0; t < tiles; ++t)
    for (size_t half = 0; half < 16; half += 8) {
      for (size_t g = 0; g < groups; ++g) {
        const size_t at = (t * groups + g) * 16 + half;
        if (fits_pairs(from + at, 8)) continue;
        int8_t rest[8];
        split_pairs(from + at, &values[at], rest, 8);
        found.values.insert(found.values.end(), rest, rest + 8);
        found.columns.push_back(static_cast<uint16_t>(g));
      }
      found.starts.push_back(static_cast<uint32_t>(found.columns.size()));
    }
  return found;
}

void block_pairs(const int8_t* from, size_t size, size_t each, std::vector<int8_t>& values,
                 std::vector<uint16_t>& columns, std::vector<uint32_t>& starts) {
  const size_t blocks = starts.back();
  size_t more = 0;
  for (size_t b = 0; b < blocks; ++b) more += !fits_pairs(from + b * size, size);
  if (more == 0) return;
  std::vector<uint16_t> old_columns((blocks + more) * each);
  old_columns.swap(columns);
  values.resize((blocks + more) * size);
  size_t to = 0, b = 0;
  for (size_t row = 0; row + 1 < starts.size(); ++row) {
    const size_t end = starts[row + 1];
    for (; b < end; ++b, ++to) {
      const int8_t* w = from + b * size;
      const bool fits = fits_pairs(w, size);
      for (size_t copy = 0; copy < (fits ? 1u : 2u); ++copy)
        std::copy_n(&old_columns[b * each], each, &columns[(to + copy) * each]);
      if (fits) std::copy_n(w, size, &values[to * size]);
      else split_pairs(w, &values[to * size], &values[(to + 1) * size], size), ++to;
    }
    starts[row + 1] = static_cast<uint32_t>(to);
  }
}

}  // namespace nm
