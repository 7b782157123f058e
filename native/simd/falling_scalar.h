// The softmax's curve on words, in plain C++: the meaning of simd/falling_<isa>.h.
#pragma once
#include "falling.h"
#include "words_scalar.h"

namespace {

// A curve as the ISA looks it up, filled by `load`.
using FallingVectors = Falling;
NM_INLINE void load(FallingVectors& to, const Falling& from) { to = from; }
// falling_high of the first 6 bits of each word times falling_low of the next, by whatever way is short on the ISA.
NM_INLINE Vi hfall(const FallingVectors& f, Vi d) {
  Vi r;
  uint16_t x[2 * kLanes];
  __builtin_memcpy(x, d.v, sizeof x);
  for (uint16_t& w : x) w = static_cast<uint16_t>(falling_high(f, w >> 10) * falling_low(f, w >> 4 & 63) >> 16);
  __builtin_memcpy(r.v, x, sizeof x);
  return r;
}

}  // namespace
