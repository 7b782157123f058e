// simd/words_scalar.h for 16 lanes.
#pragma once
#include "avx512vnni.h"

namespace {

NM_INLINE Vi hset(int a) { return _mm512_set1_epi16(static_cast<int16_t>(a)); }
NM_INLINE Vi hadd(Vi a, Vi b) { return _mm512_add_epi16(a, b); }
NM_INLINE Vi hadds(Vi a, Vi b) { return _mm512_adds_epi16(a, b); }
NM_INLINE Vi hmax(Vi a, Vi b) { return _mm512_max_epi16(a, b); }
NM_INLINE Vi hmin(Vi a, Vi b) { return _mm512_min_epu16(a, b); }
NM_INLINE Vi habs(Vi a) { return _mm512_abs_epi16(a); }
NM_INLINE Vi hmul_round(Vi a, Vi b) { return _mm512_mulhrs_epi16(a, b); }
NM_INLINE Vi hmulhi_unsigned(Vi a, Vi b) { return _mm512_mulhi_epu16(a, b); }
NM_INLINE Vi hshl(Vi a, int bits) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits)); }
template <int kBits>
NM_INLINE Vi hshr(Vi a) { return _mm512_srli_epi16(a, kBits); }
NM_INLINE Vi hsra(Vi a, int bits) { return _mm512_sra_epi16(a, _mm_cvtsi32_si128(bits)); }
NM_INLINE Vi hpack(Vi a, Vi b) { return _mm512_packs_epi32(a, b); }
NM_INLINE Vi hpack_unsigned(Vi a, Vi b) { return _mm512_packus_epi32(a, b); }
NM_INLINE Vi bpack(Vi a, Vi b) { return _mm512_packs_epi16(a, b); }
NM_INLINE Vi bpack_unsigned(Vi a, Vi b) { return _mm512_packus_epi16(a, b); }
NM_INLINE Vi hsum(Vi ab) {
  const Vi zero = _mm512_setzero_si512();
  return iadd(_mm512_unpacklo_epi16(ab, zero), _mm512_unpackhi_epi16(ab, zero));
}
NM_INLINE Vi transpose_bytes(Vi a) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(turn));
}
NM_INLINE void store_blocks(uint8_t* p, size_t stride, Vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + stride), _mm512_extracti32x4_epi32(a, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * stride), _mm512_extracti32x4_epi32(a, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * stride), _mm512_extracti32x4_epi32(a, 3));
}
struct Words64 {
  Vi low, high;
};
NM_INLINE Words64 wtable(const int16_t* words, const uint32_t*) { return {iload(words), iload(words + 32)}; }
NM_INLINE void wlookup(const Words64& first, const Words64& second, Vi index, Vi& a, Vi& b) {
  a = _mm512_permutex2var_epi16(first.low, index, first.high);
  b = _mm512_permutex2var_epi16(second.low, index, second.high);
}
template <int kVecs>
NM_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, Vi (&x)[kVecs]) {
  if (kVecs == 4) {
    const Vi ra = iload(a), rb = iload(b), rc = iload(c), rd = iload(d);
    const Vi low_ab = _mm512_unpacklo_epi8(ra, rb), high_ab = _mm512_unpackhi_epi8(ra, rb);
    const Vi low_cd = _mm512_unpacklo_epi8(rc, rd), high_cd = _mm512_unpackhi_epi8(rc, rd);
    x[0] = _mm512_unpacklo_epi16(low_ab, low_cd), x[kVecs > 1 ? 1 : 0] = _mm512_unpackhi_epi16(low_ab, low_cd);
    x[kVecs > 2 ? 2 : 0] = _mm512_unpacklo_epi16(high_ab, high_cd);
    x[kVecs > 3 ? 3 : 0] = _mm512_unpackhi_epi16(high_ab, high_cd);
    return;
  }
  const auto widen = [](const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  for (int v = 0; v < kVecs; ++v, a += 16, b += 16, c += 16, d += 16)
    x[v] = ior(ior(widen(a), ishl<8>(widen(b))), ior(ishl<16>(widen(c)), ishl<24>(widen(d))));
}

// Of 64 tokens, block L of a row holds tokens 4L.. of each vector of 16: the order in which unpacking undoes it.
NM_INLINE void spread(const uint8_t* x, size_t width, uint8_t* rows) {
  if (width == 64) {
    const Vi a = transpose_bytes(iload(x)), b = transpose_bytes(iload(x + 64));
    const Vi c = transpose_bytes(iload(x + 128)), d = transpose_bytes(iload(x + 192));
    const Vi low_ab = _mm512_unpacklo_epi32(a, b), high_ab = _mm512_unpackhi_epi32(a, b);
    const Vi low_cd = _mm512_unpacklo_epi32(c, d), high_cd = _mm512_unpackhi_epi32(c, d);
    istore(rows, _mm512_unpacklo_epi64(low_ab, low_cd)), istore(rows + 64, _mm512_unpackhi_epi64(low_ab, low_cd));
    istore(rows + 128, _mm512_unpacklo_epi64(high_ab, high_cd));
    istore(rows + 192, _mm512_unpackhi_epi64(high_ab, high_cd));
    return;
  }
  const Vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (size_t t = 0; t < width; t += 16)
    store_blocks(rows + t, 64, _mm512_permutexvar_epi32(order, transpose_bytes(iload(x + t * 4))));
}

}  // namespace
