// simd/transpose_scalar.h for 4 lanes.
#pragma once
#include "neon.h"

namespace {

NM_INLINE void transpose(Vf (&x)[kLanes]) {
  const float32x4_t a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]);
  const float32x4_t c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
  const auto pairs = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
  x[0] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(a), pairs(c)));
  x[1] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(b), pairs(d)));
  x[2] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(a), pairs(c)));
  x[3] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(b), pairs(d)));
}

NM_INLINE Vf hload(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

}  // namespace
