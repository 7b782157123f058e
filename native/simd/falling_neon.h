// simd/falling_scalar.h for 4 lanes.
#pragma once
#include "falling.h"
#include "words_neon.h"

namespace {

struct FallingVectors {
  uint8x16_t high[2], middle[2];  // tables of 16 low bytes and of 16 high bytes
  Vi slope, bend;
};
NM_INLINE void load(FallingVectors& to, const Falling& f) {
  uint8_t bytes[4][16] = {};
  for (int i = 0; i < 16; ++i) {
    bytes[0][i] = static_cast<uint8_t>(f.high[i & 3]), bytes[1][i] = static_cast<uint8_t>(f.high[i & 3] >> 8);
    bytes[2][i] = static_cast<uint8_t>(f.middle[i]), bytes[3][i] = static_cast<uint8_t>(f.middle[i] >> 8);
  }
  for (int i = 0; i < 2; ++i) to.high[i] = vld1q_u8(bytes[i]), to.middle[i] = vld1q_u8(bytes[2 + i]);
  to.slope = hset(f.slope), to.bend = hset(f.bend);
}
// The word that tables of bytes have at the lowest 4 bits of each word of i; an index of 255 gives zero.
NM_INLINE Vi hlookup16(const uint8x16_t* bytes, Vi i) {
  const uint16x8_t at = vandq_u16(hu(i), vdupq_n_u16(15));
  const uint8x16_t low = vreinterpretq_u8_u16(vorrq_u16(at, vdupq_n_u16(0xff00)));
  const uint8x16_t high = vreinterpretq_u8_u16(vorrq_u16(vshlq_n_u16(at, 8), vdupq_n_u16(0x00ff)));
  return vreinterpretq_s32_u8(vorrq_u8(vqtbl1q_u8(bytes[0], low), vqtbl1q_u8(bytes[1], high)));
}
NM_INLINE Vi hfall(const FallingVectors& f, Vi d) {
  const Vi high = hmulhi_unsigned(hlookup16(f.high, hshr<14>(d)), hlookup16(f.middle, hshr<10>(d)));
  const Vi rest = iand(hshl(d, 6), hset(0xfc00));
  const Vi slope = of(vsubq_u16(hu(f.slope), hu(hmulhi_unsigned(rest, f.bend))));
  return hmulhi_unsigned(high, of(vsubq_u16(vdupq_n_u16(65535), hu(hmulhi_unsigned(rest, slope)))));
}

}  // namespace
