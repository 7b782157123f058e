// What makes up a falling curve; simd/falling_<isa>.h follow it.
#pragma once
#include <cstdint>

namespace {

// f(d) of the upper 12 bits of a word d: high[i >> 4] * middle[i & 15] of the first 6 bits, i, times a parabola of the
// rest. All are fractions of 65536.
struct Falling {
  uint16_t high[4], middle[16], slope, bend;
};

inline uint32_t falling_high(const Falling& f, uint32_t i) { return uint32_t{f.high[i >> 4]} * f.middle[i & 15] >> 16; }
inline uint32_t falling_low(const Falling& f, uint32_t i) {
  return 65535 - ((i << 10) * (f.slope - ((i << 10) * f.bend >> 16)) >> 16);
}

}  // namespace
