// Squares of kLanes x kLanes floats and IEEE halves, in plain C++: the meaning of simd/transpose_<isa>.h.
#pragma once
#include "scalar.h"

namespace {

// x[i] lane j becomes x[j] lane i.
NM_INLINE void transpose(Vf (&x)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = x[i].v[j];
      x[i].v[j] = x[j].v[i], x[j].v[i] = t;
    }
}

// kLanes halves as floats.
NM_INLINE Vf hload(const uint16_t* p) {
  Vf r;
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t sign = static_cast<uint32_t>(p[l] & 0x8000) << 16, rest = p[l] & 0x7fff;
    uint32_t bits = (rest << 13) + ((127 - 15) << 23);
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest < 0x400) {
      const float tiny = static_cast<float>(rest) * (1.0f / 16777216);  // subnormal: rest * 2^-24
      __builtin_memcpy(&bits, &tiny, 4);
    }
    bits |= sign;
    __builtin_memcpy(&r.v[l], &bits, 4);
  }
  return r;
}

}  // namespace
