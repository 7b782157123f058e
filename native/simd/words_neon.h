// simd/words_scalar.h for 4 lanes: a vector is one block.
#pragma once
#include "neon.h"

namespace {

NM_INLINE int16x8_t hs(Vi a) { return vreinterpretq_s16_s32(a); }
NM_INLINE uint16x8_t hu(Vi a) { return vreinterpretq_u16_s32(a); }
NM_INLINE Vi of(int16x8_t a) { return vreinterpretq_s32_s16(a); }
NM_INLINE Vi of(uint16x8_t a) { return vreinterpretq_s32_u16(a); }

NM_INLINE Vi hset(int a) { return of(vdupq_n_s16(static_cast<int16_t>(a))); }
NM_INLINE Vi hadd(Vi a, Vi b) { return of(vaddq_s16(hs(a), hs(b))); }
NM_INLINE Vi hadds(Vi a, Vi b) { return of(vqaddq_s16(hs(a), hs(b))); }
NM_INLINE Vi hmax(Vi a, Vi b) { return of(vmaxq_s16(hs(a), hs(b))); }
NM_INLINE Vi hmin(Vi a, Vi b) { return of(vminq_u16(hu(a), hu(b))); }
NM_INLINE Vi habs(Vi a) { return of(vabsq_s16(hs(a))); }
// Not vqrdmulhq, which saturates -1 * -1 where others wrap.
NM_INLINE Vi hmul_round(Vi a, Vi b) {
  const int16x4_t low = vrshrn_n_s32(vmull_s16(vget_low_s16(hs(a)), vget_low_s16(hs(b))), 15);
  return of(vrshrn_high_n_s32(low, vmull_high_s16(hs(a), hs(b)), 15));
}
NM_INLINE Vi hmulhi_unsigned(Vi a, Vi b) {
  const uint16x4_t low = vshrn_n_u32(vmull_u16(vget_low_u16(hu(a)), vget_low_u16(hu(b))), 16);
  return of(vshrn_high_n_u32(low, vmull_high_u16(hu(a), hu(b)), 16));
}
NM_INLINE Vi hshl(Vi a, int bits) { return of(vshlq_u16(hu(a), vdupq_n_s16(static_cast<int16_t>(bits)))); }
template <int kBits>
NM_INLINE Vi hshr(Vi a) { return of(vshrq_n_u16(hu(a), kBits)); }
NM_INLINE Vi hsra(Vi a, int bits) { return of(vshlq_s16(hs(a), vdupq_n_s16(static_cast<int16_t>(-bits)))); }
NM_INLINE Vi hpack(Vi a, Vi b) { return of(vqmovn_high_s32(vqmovn_s32(a), b)); }
NM_INLINE Vi hpack_unsigned(Vi a, Vi b) { return of(vqmovun_high_s32(vqmovun_s32(a), b)); }
NM_INLINE Vi bpack(Vi a, Vi b) { return vreinterpretq_s32_s8(vqmovn_high_s16(vqmovn_s16(hs(a)), hs(b))); }
NM_INLINE Vi bpack_unsigned(Vi a, Vi b) { return vreinterpretq_s32_u8(vqmovun_high_s16(vqmovun_s16(hs(a)), hs(b))); }
NM_INLINE Vi hsum(Vi ab) { return vreinterpretq_s32_u32(vaddl_u16(vget_low_u16(hu(ab)), vget_high_u16(hu(ab)))); }
NM_INLINE Vi transpose_bytes(Vi a) {
  const uint8_t turn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a), vld1q_u8(turn)));
}
NM_INLINE void store_blocks(uint8_t* p, size_t, Vi a) { istore(p, a); }
struct Words64 {
  uint8x16x4_t low, high;  // bytes of the 64 words
};
NM_INLINE Words64 wtable(const int16_t* words, const uint32_t*) {
  Words64 table;
  for (int i = 0; i < 4; ++i) {
    const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(words + i * 16));
    table.low.val[i] = bytes.val[0], table.high.val[i] = bytes.val[1];
  }
  return table;
}
NM_INLINE Vi wlookup1(const Words64& table, uint8x8_t index) {
  const uint8x8_t low = vqtbl4_u8(table.low, index), high = vqtbl4_u8(table.high, index);
  return vreinterpretq_s32_u8(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
}
NM_INLINE void wlookup(const Words64& first, const Words64& second, Vi index, Vi& a, Vi& b) {
  const uint8x8_t narrow = vmovn_u16(hu(index));
  a = wlookup1(first, narrow), b = wlookup1(second, narrow);
}
template <int kVecs>
NM_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, Vi (&x)[kVecs]) {
  const auto four = [](const uint8_t* p, const uint8_t* q) {  // of each, in turn
    uint32_t m, n;
    __builtin_memcpy(&m, p, 4), __builtin_memcpy(&n, q, 4);
    return vreinterpret_u16_u8(vzip1_u8(vcreate_u8(m), vcreate_u8(n)));
  };
  if constexpr (kVecs == 4) {
    const uint8x16_t p = vld1q_u8(a), q = vld1q_u8(b), r = vld1q_u8(c), s = vld1q_u8(d);
    const uint16x8_t ab = vreinterpretq_u16_u8(vzip1q_u8(p, q)), more_ab = vreinterpretq_u16_u8(vzip2q_u8(p, q));
    const uint16x8_t cd = vreinterpretq_u16_u8(vzip1q_u8(r, s)), more_cd = vreinterpretq_u16_u8(vzip2q_u8(r, s));
    x[0] = of(vzip1q_u16(ab, cd)), x[1] = of(vzip2q_u16(ab, cd));
    x[2] = of(vzip1q_u16(more_ab, more_cd)), x[3] = of(vzip2q_u16(more_ab, more_cd));
  } else {
    for (int v = 0; v < kVecs; ++v, a += 4, b += 4, c += 4, d += 4) {
      const uint16x4_t ab = four(a, b), cd = four(c, d);
      x[v] = of(vcombine_u16(vzip1_u16(ab, cd), vzip2_u16(ab, cd)));
    }
  }
}

NM_INLINE void spread(const uint8_t* x, size_t width, uint8_t* rows) {
  for (size_t t = 0; t < width; t += 16) {
    const uint8x16x4_t bytes = vld4q_u8(x + t * 4);
    for (int k = 0; k < 4; ++k) vst1q_u8(rows + k * 64 + t, bytes.val[k]);
  }
}

}  // namespace
