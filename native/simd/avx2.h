// Vectors of 8 lanes for AVX2 with FMA, and for AVX-VNNI, which differs in `dot` only. Meanings: simd/scalar.h.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define NM_INLINE static inline __attribute__((always_inline))

namespace {

using Vf = __m256;
using Vi = __m256i;
constexpr int kLanes = 8;
constexpr int kAccs = 8;

NM_INLINE Vf fset(float a) { return _mm256_set1_ps(a); }
NM_INLINE Vf fload(const float* p) { return _mm256_loadu_ps(p); }
NM_INLINE void fstore(float* p, Vf a) { _mm256_storeu_ps(p, a); }
NM_INLINE Vf fadd(Vf a, Vf b) { return _mm256_add_ps(a, b); }
NM_INLINE Vf fsub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
NM_INLINE Vf fmul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
NM_INLINE Vf fdiv(Vf a, Vf b) { return _mm256_div_ps(a, b); }
NM_INLINE Vf fsqrt(Vf a) { return _mm256_sqrt_ps(a); }
NM_INLINE Vf fmadd(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
NM_INLINE Vf fmin(Vf a, Vf b) { return _mm256_min_ps(a, b); }
NM_INLINE Vf fmax(Vf a, Vf b) { return _mm256_max_ps(a, b); }
NM_INLINE Vi iset(int32_t a) { return _mm256_set1_epi32(a); }
NM_INLINE Vi iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
NM_INLINE void istore(void* p, Vi a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
NM_INLINE Vi iadd(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
NM_INLINE Vi isub(Vi a, Vi b) { return _mm256_sub_epi32(a, b); }
NM_INLINE Vi imax(Vi a, Vi b) { return _mm256_max_epi32(a, b); }
NM_INLINE Vi ior(Vi a, Vi b) { return _mm256_or_si256(a, b); }
NM_INLINE Vi iand(Vi a, Vi b) { return _mm256_and_si256(a, b); }
template <int kBits>
NM_INLINE Vi ishl(Vi a) { return _mm256_slli_epi32(a, kBits); }
NM_INLINE Vi iramp() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
NM_INLINE Vi iround(Vf a) { return _mm256_cvtps_epi32(a); }
NM_INLINE Vf tofloat(Vi a) { return _mm256_cvtepi32_ps(a); }
NM_INLINE Vf fbits(Vi a) { return _mm256_castsi256_ps(a); }
NM_INLINE Vi ibits(Vf a) { return _mm256_castps_si256(a); }
NM_INLINE Vi where_ge(Vi a, Vi b, Vi yes, Vi no) { return _mm256_blendv_epi8(yes, no, _mm256_cmpgt_epi32(b, a)); }
NM_INLINE Vi dword(const void* p) {
  int32_t d;
  __builtin_memcpy(&d, p, 4);
  return _mm256_set1_epi32(d);
}
constexpr int kOffset = 0;
#ifdef __AVXVNNI__
constexpr bool kPaired = false;
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) { return dot(acc, x, w); }
#else
constexpr bool kPaired = true;
// Even and odd bytes as 16-bit pairs: exact, where maddubs would saturate at 255 * 127 * 2.
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) {
  const Vi x_even = _mm256_and_si256(x, _mm256_set1_epi16(0xff)), x_odd = _mm256_srli_epi16(x, 8);
  const Vi w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), w_odd = _mm256_srai_epi16(w, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x_even, w_even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(x_odd, w_odd));
}
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}
#endif
// The low byte of each lane.
NM_INLINE void store_bytes(void* p, Vi a) {
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i b = _mm256_shuffle_epi8(a, pick);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), both);
}
NM_INLINE Vi imin(Vi a, Vi b) { return _mm256_min_epi32(a, b); }
NM_INLINE Vi ishr_each(Vi a, Vi n) { return _mm256_srlv_epi32(a, n); }
NM_INLINE Vi ishl_each(Vi a, Vi n) { return _mm256_sllv_epi32(a, n); }
NM_INLINE Vi iload4(const void* p) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
NM_INLINE void store_sum4(int32_t* p, Vi a) {
  const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), sum);
}

}  // namespace
