// Vectors of 4 lanes for Arm with dot products (Armv8.2 dotprod), and for i8mm, which differs in `dot` only. Meanings:
// simd/scalar.h.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#define NM_INLINE static inline __attribute__((always_inline))

namespace {

using Vf = float32x4_t;
using Vi = int32x4_t;
constexpr int kLanes = 4;
constexpr int kAccs = 16;

NM_INLINE Vf fset(float a) { return vdupq_n_f32(a); }
NM_INLINE Vf fload(const float* p) { return vld1q_f32(p); }
NM_INLINE void fstore(float* p, Vf a) { vst1q_f32(p, a); }
NM_INLINE Vf fadd(Vf a, Vf b) { return vaddq_f32(a, b); }
NM_INLINE Vf fsub(Vf a, Vf b) { return vsubq_f32(a, b); }
NM_INLINE Vf fmul(Vf a, Vf b) { return vmulq_f32(a, b); }
NM_INLINE Vf fdiv(Vf a, Vf b) { return vdivq_f32(a, b); }
NM_INLINE Vf fsqrt(Vf a) { return vsqrtq_f32(a); }
NM_INLINE Vf fmadd(Vf a, Vf b, Vf c) { return vfmaq_f32(c, a, b); }
NM_INLINE Vf fmin(Vf a, Vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }  // vminq gives NaN for NaN
NM_INLINE Vf fmax(Vf a, Vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
NM_INLINE Vi iset(int32_t a) { return vdupq_n_s32(a); }
NM_INLINE Vi iload(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
NM_INLINE void istore(void* p, Vi a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
NM_INLINE Vi iadd(Vi a, Vi b) { return vaddq_s32(a, b); }
NM_INLINE Vi isub(Vi a, Vi b) { return vsubq_s32(a, b); }
NM_INLINE Vi imax(Vi a, Vi b) { return vmaxq_s32(a, b); }
NM_INLINE Vi imin(Vi a, Vi b) { return vminq_s32(a, b); }
NM_INLINE Vi ior(Vi a, Vi b) { return vorrq_s32(a, b); }
NM_INLINE Vi iand(Vi a, Vi b) { return vandq_s32(a, b); }
template <int kBits>
NM_INLINE Vi ishl(Vi a) { return vshlq_n_s32(a, kBits); }
NM_INLINE Vi iramp() {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vld1q_s32(lanes);
}
NM_INLINE Vi iround(Vf a) {  // what does not fit is INT32_MIN, as on x86, where vcvtnq saturates
  const uint32x4_t fits = vandq_u32(vcgeq_f32(a, fset(-2147483648.0f)), vcltq_f32(a, fset(2147483648.0f)));
  return vbslq_s32(fits, vcvtnq_s32_f32(a), iset(INT32_MIN));
}
NM_INLINE Vf tofloat(Vi a) { return vcvtq_f32_s32(a); }
NM_INLINE Vf fbits(Vi a) { return vreinterpretq_f32_s32(a); }
NM_INLINE Vi ibits(Vf a) { return vreinterpretq_s32_f32(a); }
NM_INLINE Vi where_ge(Vi a, Vi b, Vi yes, Vi no) { return vbslq_s32(vcgeq_s32(a, b), yes, no); }
NM_INLINE Vi dword(const void* p) {
  int32_t d;
  __builtin_memcpy(&d, p, 4);
  return iset(d);
}
constexpr bool kPaired = false;
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int kOffset = 0;
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) { return vusdotq_s32(acc, vreinterpretq_u8_s32(x), vreinterpretq_s8_s32(w)); }
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) { return dot(acc, x, w); }
#else
// Both sides of vdotq are signed: x - 128 takes the place of x, and sums start with 128 times the weights'.
constexpr int kOffset = 128;
NM_INLINE int8x16_t less_128(Vi x) { return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(0x80))); }
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) { return vdotq_s32(acc, less_128(x), vreinterpretq_s8_s32(w)); }
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) {
  const int8x16_t s = vreinterpretq_s8_s32(w), half = vdupq_n_s8(64);
  const Vi more = vdotq_s32(vdotq_s32(iset(0), s, half), s, half);  // the same for all x beside a w
  return dot_weights(iadd(acc, more), x, w);
}
#endif
// The low byte of each lane.
NM_INLINE void store_bytes(void* p, Vi a) {
  const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(a));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  __builtin_memcpy(p, &bytes, 4);
}
NM_INLINE Vi ishr_each(Vi a, Vi n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vnegq_s32(n))); }
NM_INLINE Vi ishl_each(Vi a, Vi n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), n)); }
NM_INLINE Vi iload4(const void* p) { return iload(p); }
NM_INLINE void store_sum4(int32_t* p, Vi a) { vst1q_s32(p, a); }

}  // namespace
