// 16-bit words and bytes for the epilogues of linear, in plain C++: the meaning of simd/words_<isa>.h.
#pragma once
#include "scalar.h"

namespace {

// A vector is also 128-bit blocks of 8 words or 16 bytes; packing stays inside them, as on x86: hpack gives [4 of a]
// [4 of b] in each block, saturated to int16 (hpack_unsigned: to 0..65535), bpack [8 of a][8 of b] saturated to int8 (bpack_unsigned: to 0..255).
// hadds saturates, hadd wraps; hmul_round is the product over 2^15, rounded; hmin and hmulhi_unsigned, the high half of
// the product, take words as unsigned. transpose_bytes turns [4][4] bytes of each block to [4][4] the other way.
#define NM_WORDS(expression)                                                       \
  Vi r;                                                                            \
  int16_t x[2 * kLanes], y[2 * kLanes];                                            \
  __builtin_memcpy(x, a.v, sizeof x), __builtin_memcpy(y, b.v, sizeof y);          \
  for (int l = 0; l < 2 * kLanes; ++l) x[l] = static_cast<int16_t>(expression);    \
  __builtin_memcpy(r.v, x, sizeof x);                                              \
  return r
NM_INLINE int32_t clamp(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }
NM_INLINE Vi hset(int a) { return iset(static_cast<int32_t>(static_cast<uint16_t>(a) * 0x10001u)); }
NM_INLINE Vi hadd(Vi a, Vi b) { NM_WORDS(x[l] + y[l]); }
NM_INLINE Vi hadds(Vi a, Vi b) { NM_WORDS(clamp(x[l] + y[l], -32768, 32767)); }
NM_INLINE Vi hmax(Vi a, Vi b) { NM_WORDS(x[l] > y[l] ? x[l] : y[l]); }
NM_INLINE Vi hmin(Vi a, Vi b) { NM_WORDS(static_cast<uint16_t>(x[l]) < static_cast<uint16_t>(y[l]) ? x[l] : y[l]); }
NM_INLINE Vi habs(Vi a) { const Vi b = a; NM_WORDS(y[l] < 0 ? -y[l] : y[l]); }
NM_INLINE Vi hmul_round(Vi a, Vi b) { NM_WORDS((x[l] * y[l] + 0x4000) >> 15); }
NM_INLINE Vi hmulhi_unsigned(Vi a, Vi b) {
  NM_WORDS((static_cast<uint32_t>(static_cast<uint16_t>(x[l])) * static_cast<uint16_t>(y[l])) >> 16);
}
NM_INLINE Vi hshl(Vi a, int bits) { const Vi b = a; NM_WORDS(static_cast<uint16_t>(y[l]) << bits); }
template <int kBits>
NM_INLINE Vi hshr(Vi a) { const Vi b = a; NM_WORDS(static_cast<uint16_t>(y[l]) >> kBits); }
NM_INLINE Vi hsra(Vi a, int bits) { const Vi b = a; NM_WORDS(y[l] >> bits); }
template <int kLow, int kHigh>
NM_INLINE Vi hpack_to(Vi a, Vi b) {
  Vi r;
  uint16_t out[2 * kLanes];
  for (int l = 0; l < kLanes; ++l) {
    out[l / 4 * 8 + l % 4] = static_cast<uint16_t>(clamp(a.v[l], kLow, kHigh));
    out[l / 4 * 8 + 4 + l % 4] = static_cast<uint16_t>(clamp(b.v[l], kLow, kHigh));
  }
  __builtin_memcpy(r.v, out, sizeof out);
  return r;
}
NM_INLINE Vi hpack(Vi a, Vi b) { return hpack_to<-32768, 32767>(a, b); }
NM_INLINE Vi hpack_unsigned(Vi a, Vi b) { return hpack_to<0, 65535>(a, b); }
// Lane l of a plus lane l of b, of the words that hpack_unsigned gave.
NM_INLINE Vi hsum(Vi ab) {
  Vi r;
  uint16_t x[2 * kLanes];
  __builtin_memcpy(x, ab.v, sizeof x);
  for (int l = 0; l < kLanes; ++l) r.v[l] = x[l / 4 * 8 + l % 4] + x[l / 4 * 8 + 4 + l % 4];
  return r;
}
template <int kLow, int kHigh>
NM_INLINE Vi bpack_to(Vi a, Vi b) {
  Vi r;
  int16_t x[2 * kLanes], y[2 * kLanes];
  uint8_t out[4 * kLanes];
  __builtin_memcpy(x, a.v, sizeof x), __builtin_memcpy(y, b.v, sizeof y);
  for (int l = 0; l < 2 * kLanes; ++l) {
    out[l / 8 * 16 + l % 8] = static_cast<uint8_t>(clamp(x[l], kLow, kHigh));
    out[l / 8 * 16 + 8 + l % 8] = static_cast<uint8_t>(clamp(y[l], kLow, kHigh));
  }
  __builtin_memcpy(r.v, out, sizeof out);
  return r;
}
NM_INLINE Vi bpack(Vi a, Vi b) { return bpack_to<-128, 127>(a, b); }
NM_INLINE Vi bpack_unsigned(Vi a, Vi b) { return bpack_to<0, 255>(a, b); }
NM_INLINE Vi transpose_bytes(Vi a) {
  Vi r;
  uint8_t in[4 * kLanes], out[4 * kLanes];
  __builtin_memcpy(in, a.v, sizeof in);
  for (int l = 0; l < 4 * kLanes; ++l) out[l] = in[l / 16 * 16 + l % 4 * 4 + l % 16 / 4];
  __builtin_memcpy(r.v, out, sizeof out);
  return r;
}
// Each block to a place of its own, `stride` bytes apart.
NM_INLINE void store_blocks(uint8_t* p, size_t stride, Vi a) {
  for (int l = 0; l < kLanes; l += 4) __builtin_memcpy(p + static_cast<size_t>(l) / 4 * stride, a.v + l, 16);
}
// Two tables of 64 words with one index below 64 per word. `words` is one table, `pairs` both: first | second << 16.
struct Words64 {
  const int16_t* words;
};
NM_INLINE Words64 wtable(const int16_t* words, const uint32_t*) { return {words}; }
NM_INLINE void wlookup(const Words64& first, const Words64& second, Vi index, Vi& a, Vi& b) {
  uint16_t at[2 * kLanes];
  int16_t x[2 * kLanes], y[2 * kLanes];
  __builtin_memcpy(at, index.v, sizeof at);
  for (int l = 0; l < 2 * kLanes; ++l) x[l] = first.words[at[l]], y[l] = second.words[at[l]];
  __builtin_memcpy(a.v, x, sizeof x), __builtin_memcpy(b.v, y, sizeof y);
}
// x[v] lane l is the bytes of token v * kLanes + l in four rows, as `spread` laid them.
template <int kVecs>
NM_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, Vi (&x)[kVecs]) {
  for (int v = 0; v < kVecs; ++v)
    for (int l = 0; l < kLanes; ++l) {
      const int t = v * kLanes + l;
      const uint32_t word = static_cast<uint32_t>(a[t]) | static_cast<uint32_t>(b[t]) << 8 |
                            static_cast<uint32_t>(c[t]) << 16 | static_cast<uint32_t>(d[t]) << 24;
      x[v].v[l] = static_cast<int32_t>(word);
    }
}

// Tokens x 4 inputs, [width][4] bytes, to 4 rows 64 bytes apart in the order that `interleave` reads.
NM_INLINE void spread(const uint8_t* x, size_t width, uint8_t* rows) {
  for (size_t t = 0; t < width; ++t)
    for (size_t k = 0; k < 4; ++k) rows[k * 64 + t] = x[t * 4 + k];
}

}  // namespace
