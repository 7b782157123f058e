// simd/falling_scalar.h for 16 lanes.
#pragma once
#include "falling.h"
#include "words_avx512vnni.h"

namespace {

struct FallingVectors {  // tables of 64 words
  Vi high[2], low[2];
};
NM_INLINE void load(FallingVectors& to, const Falling& f) {
  uint16_t high[64], low[64];
  for (uint32_t i = 0; i < 64; ++i) {
    high[i] = static_cast<uint16_t>(falling_high(f, i));
    low[i] = static_cast<uint16_t>(falling_low(f, i));
  }
  to = {{iload(high), iload(high + 32)}, {iload(low), iload(low + 32)}};
}
NM_INLINE Vi hfall(const FallingVectors& f, Vi d) {  // a lookup takes the lowest 6 bits of its index
  return hmulhi_unsigned(_mm512_permutex2var_epi16(f.high[0], hshr<10>(d), f.high[1]),
                _mm512_permutex2var_epi16(f.low[0], hshr<4>(d), f.low[1]));
}

}  // namespace
