// Vectors of 16 lanes for AVX512 with VNNI. Every simd/<isa>.h offers the same names; simd/scalar.h says what they mean.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define NM_INLINE static inline __attribute__((always_inline))

namespace {

using Vf = __m512;
using Vi = __m512i;
constexpr int kLanes = 16;
constexpr int kAccs = 16;  // accumulators a tile may keep in registers

NM_INLINE Vf fset(float a) { return _mm512_set1_ps(a); }
NM_INLINE Vf fload(const float* p) { return _mm512_loadu_ps(p); }
NM_INLINE void fstore(float* p, Vf a) { _mm512_storeu_ps(p, a); }
NM_INLINE Vf fadd(Vf a, Vf b) { return _mm512_add_ps(a, b); }
NM_INLINE Vf fsub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
NM_INLINE Vf fmul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
NM_INLINE Vf fdiv(Vf a, Vf b) { return _mm512_div_ps(a, b); }
NM_INLINE Vf fsqrt(Vf a) { return _mm512_sqrt_ps(a); }
NM_INLINE Vf fmadd(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
NM_INLINE Vf fmin(Vf a, Vf b) { return _mm512_min_ps(a, b); }
NM_INLINE Vf fmax(Vf a, Vf b) { return _mm512_max_ps(a, b); }
NM_INLINE Vi iset(int32_t a) { return _mm512_set1_epi32(a); }
NM_INLINE Vi iload(const void* p) { return _mm512_loadu_si512(p); }
NM_INLINE void istore(void* p, Vi a) { _mm512_storeu_si512(p, a); }
NM_INLINE Vi iadd(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
NM_INLINE Vi isub(Vi a, Vi b) { return _mm512_sub_epi32(a, b); }
NM_INLINE Vi imax(Vi a, Vi b) { return _mm512_max_epi32(a, b); }
NM_INLINE Vi ior(Vi a, Vi b) { return _mm512_or_si512(a, b); }
NM_INLINE Vi iand(Vi a, Vi b) { return _mm512_and_si512(a, b); }
template <int kBits>
NM_INLINE Vi ishl(Vi a) { return _mm512_slli_epi32(a, kBits); }
NM_INLINE Vi iramp() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
NM_INLINE Vi iround(Vf a) { return _mm512_cvtps_epi32(a); }
NM_INLINE Vf tofloat(Vi a) { return _mm512_cvtepi32_ps(a); }
NM_INLINE Vf fbits(Vi a) { return _mm512_castsi512_ps(a); }
NM_INLINE Vi ibits(Vf a) { return _mm512_castps_si512(a); }
NM_INLINE Vi where_ge(Vi a, Vi b, Vi yes, Vi no) {
  return _mm512_mask_blend_epi32(_mm512_cmpge_epi32_mask(a, b), no, yes);
}
NM_INLINE Vi dword(const void* p) {
  int32_t d;
  __builtin_memcpy(&d, p, 4);
  return _mm512_set1_epi32(d);
}
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) { return _mm512_dpbusd_epi32(acc, x, w); }
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) { return dot(acc, x, w); }
constexpr bool kPaired = false;
constexpr int kOffset = 0;
NM_INLINE void store_bytes(void* p, Vi a) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
NM_INLINE Vi imin(Vi a, Vi b) { return _mm512_min_epi32(a, b); }
NM_INLINE Vi ishr_each(Vi a, Vi n) { return _mm512_srlv_epi32(a, n); }
NM_INLINE Vi ishl_each(Vi a, Vi n) { return _mm512_sllv_epi32(a, n); }
NM_INLINE Vi iload4(const void* p) {
  return _mm512_zextsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
NM_INLINE void store_sum4(int32_t* p, Vi a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), sum);
}

}  // namespace
