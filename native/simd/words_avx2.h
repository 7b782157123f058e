// simd/words_scalar.h for 8 lanes.
#pragma once
#include "avx2.h"

namespace {

NM_INLINE Vi hset(int a) { return _mm256_set1_epi16(static_cast<int16_t>(a)); }
NM_INLINE Vi hadd(Vi a, Vi b) { return _mm256_add_epi16(a, b); }
NM_INLINE Vi hadds(Vi a, Vi b) { return _mm256_adds_epi16(a, b); }
NM_INLINE Vi hmax(Vi a, Vi b) { return _mm256_max_epi16(a, b); }
NM_INLINE Vi hmin(Vi a, Vi b) { return _mm256_min_epu16(a, b); }
NM_INLINE Vi habs(Vi a) { return _mm256_abs_epi16(a); }
NM_INLINE Vi hmul_round(Vi a, Vi b) { return _mm256_mulhrs_epi16(a, b); }
NM_INLINE Vi hmulhi_unsigned(Vi a, Vi b) { return _mm256_mulhi_epu16(a, b); }
NM_INLINE Vi hshl(Vi a, int bits) { return _mm256_sll_epi16(a, _mm_cvtsi32_si128(bits)); }
template <int kBits>
NM_INLINE Vi hshr(Vi a) { return _mm256_srli_epi16(a, kBits); }
NM_INLINE Vi hsra(Vi a, int bits) { return _mm256_sra_epi16(a, _mm_cvtsi32_si128(bits)); }
NM_INLINE Vi hpack(Vi a, Vi b) { return _mm256_packs_epi32(a, b); }
NM_INLINE Vi hpack_unsigned(Vi a, Vi b) { return _mm256_packus_epi32(a, b); }
NM_INLINE Vi bpack(Vi a, Vi b) { return _mm256_packs_epi16(a, b); }
NM_INLINE Vi bpack_unsigned(Vi a, Vi b) { return _mm256_packus_epi16(a, b); }
NM_INLINE Vi hsum(Vi ab) {
  const Vi zero = _mm256_setzero_si256();
  return iadd(_mm256_unpacklo_epi16(ab, zero), _mm256_unpackhi_epi16(ab, zero));
}
NM_INLINE Vi transpose_bytes(Vi a) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(turn));
}
NM_INLINE void store_blocks(uint8_t* p, size_t stride, Vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + stride), _mm256_extracti128_si256(a, 1));
}
struct Words64 {
  const int* pairs;
};
NM_INLINE Words64 wtable(const int16_t*, const uint32_t* pairs) { return {reinterpret_cast<const int*>(pairs)}; }
// table[index]. Not by the intrinsic, so that the index never lies in register 4: QEMU 7.2 takes that for "no index" and
// reads table[0] for every lane.
NM_INLINE Vi gather64(const int* table, Vi index) {
  Vi found = _mm256_setzero_si256(), lanes = _mm256_set1_epi32(-1);
  __asm__("vpgatherdd %[lanes], (%[table], %[index], 4), %[found]"
          : [found] "+&x"(found), [lanes] "+&x"(lanes)
          : [table] "r"(table), [index] "x"(index), "m"(*reinterpret_cast<const int(*)[64]>(table))
          : "xmm4");
  return found;
}
NM_INLINE void wlookup(const Words64& first, const Words64&, Vi index, Vi& a, Vi& b) {
  const Vi even = gather64(first.pairs, _mm256_and_si256(index, _mm256_set1_epi32(0xffff)));
  const Vi odd = gather64(first.pairs, _mm256_srli_epi32(index, 16));
  a = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
  b = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}
template <int kVecs>
NM_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, Vi (&x)[kVecs]) {
  const auto widen = [](const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  };
  for (int v = 0; v < kVecs; ++v, a += 8, b += 8, c += 8, d += 8)
    x[v] = ior(ior(widen(a), ishl<8>(widen(b))), ior(ishl<16>(widen(c)), ishl<24>(widen(d))));
}

NM_INLINE void spread(const uint8_t* x, size_t width, uint8_t* rows) {
  const Vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (size_t t = 0; t < width; t += 8) {
    const Vi v = _mm256_permutevar8x32_epi32(transpose_bytes(iload(x + t * 4)), order);
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows + t), low);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows + 64 + t), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows + 128 + t), high);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows + 192 + t), _mm_unpackhi_epi64(high, high));
  }
}

}  // namespace
