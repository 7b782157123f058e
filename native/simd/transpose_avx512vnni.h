// simd/transpose_scalar.h for 16 lanes.
#pragma once
#include "avx512vnni.h"

namespace {

NM_INLINE void transpose(Vf (&x)[kLanes]) {
  Vf y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // block b of x[i + j]: feature 4b + j of tokens i..i+3
    x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm512_shuffle_f32x4(x[j], x[j + 4], 0x44);          // blocks 0, 1 of tokens 0..3, then 4..7
    y[j + 4] = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x44);
    y[j + 8] = _mm512_shuffle_f32x4(x[j], x[j + 4], 0xee);      // blocks 2, 3
    y[j + 12] = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[j + 4], 0x88);
    x[j + 4] = _mm512_shuffle_f32x4(y[j], y[j + 4], 0xdd);
    x[j + 8] = _mm512_shuffle_f32x4(y[j + 8], y[j + 12], 0x88);
    x[j + 12] = _mm512_shuffle_f32x4(y[j + 8], y[j + 12], 0xdd);
  }
}

NM_INLINE Vf hload(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

}  // namespace
