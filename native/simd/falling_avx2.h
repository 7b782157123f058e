// simd/falling_scalar.h for 8 lanes.
#pragma once
#include "falling.h"
#include "words_avx2.h"

namespace {

struct FallingVectors {
  Vi high[2], middle[2], slope, bend;  // high and middle: tables of 16 low bytes and of 16 high bytes
};
NM_INLINE void load(FallingVectors& to, const Falling& f) {
  uint8_t bytes[4][16] = {};
  for (int i = 0; i < 16; ++i) {
    bytes[0][i] = static_cast<uint8_t>(f.high[i & 3]), bytes[1][i] = static_cast<uint8_t>(f.high[i & 3] >> 8);
    bytes[2][i] = static_cast<uint8_t>(f.middle[i]), bytes[3][i] = static_cast<uint8_t>(f.middle[i] >> 8);
  }
  const auto table = [&](int i) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[i])));
  };
  to = {{table(0), table(1)}, {table(2), table(3)}, hset(f.slope), hset(f.bend)};
}
// The word that tables of bytes have at the lowest 4 bits of each word of i, which is below 128; an index with its top
// bit set gives zero.
NM_INLINE Vi hlookup16(const Vi* bytes, Vi i) {
  const Vi low = _mm256_shuffle_epi8(bytes[0], _mm256_or_si256(i, hset(0x8000)));
  return _mm256_or_si256(low, _mm256_shuffle_epi8(bytes[1], _mm256_or_si256(_mm256_slli_epi16(i, 8), hset(0x80))));
}
NM_INLINE Vi hfall(const FallingVectors& f, Vi d) {
  const Vi high = hmulhi_unsigned(hlookup16(f.high, hshr<14>(d)), hlookup16(f.middle, hshr<10>(d)));
  const Vi rest = _mm256_and_si256(_mm256_slli_epi16(d, 6), hset(0xfc00));
  const Vi slope = _mm256_sub_epi16(f.slope, hmulhi_unsigned(rest, f.bend));
  return hmulhi_unsigned(high, _mm256_sub_epi16(hset(65535), hmulhi_unsigned(rest, slope)));
}

}  // namespace
