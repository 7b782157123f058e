// Vectors of 16 lanes in plain C++: the oracle. Every other simd/<isa>.h computes the same bits per lane.
//
// f* are float, i* are int32 (wrapping). fmin(a, b) is a < b ? a : b and fmax(a, b) is a > b ? a : b, so that a NaN
// in `a` gives b, as on x86. iround rounds half to even and wants a value that fits. dot adds four products of an
// unsigned byte of x with a signed byte of w to each lane. fmadd rounds once. store_bytes stores each lane's low byte.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__  // checks inside everything inlined everywhere take minutes to compile
#define NM_INLINE static inline
#else
#define NM_INLINE static inline __attribute__((always_inline))
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kAccs = 4;  // the least: one vector beside a tile of 4 outputs keeps the oracle small
struct Vf {
  float v[kLanes];
};
struct Vi {
  int32_t v[kLanes];
};
#define NM_EACH(expression)                 \
  for (int l = 0; l < kLanes; ++l) r.v[l] = (expression); \
  return r
#define NM_WRAP(a, op, b) static_cast<int32_t>(static_cast<uint32_t>(a) op static_cast<uint32_t>(b))

NM_INLINE Vf fset(float a) { Vf r; NM_EACH(a); }
NM_INLINE Vf fload(const float* p) { Vf r; NM_EACH(p[l]); }
NM_INLINE void fstore(float* p, Vf a) { __builtin_memcpy(p, a.v, sizeof a.v); }
NM_INLINE Vf fadd(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] + b.v[l]); }
NM_INLINE Vf fsub(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] - b.v[l]); }
NM_INLINE Vf fmul(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] * b.v[l]); }
NM_INLINE Vf fdiv(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] / b.v[l]); }
NM_INLINE Vf fsqrt(Vf a) { Vf r; NM_EACH(__builtin_sqrtf(a.v[l])); }
NM_INLINE Vf fmadd(Vf a, Vf b, Vf c) { Vf r; NM_EACH(__builtin_fmaf(a.v[l], b.v[l], c.v[l])); }
NM_INLINE Vf fmin(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
NM_INLINE Vf fmax(Vf a, Vf b) { Vf r; NM_EACH(a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }
NM_INLINE Vi iset(int32_t a) { Vi r; NM_EACH(a); }
NM_INLINE Vi iload(const void* p) { Vi r; __builtin_memcpy(r.v, p, sizeof r.v); return r; }
NM_INLINE void istore(void* p, Vi a) { __builtin_memcpy(p, a.v, sizeof a.v); }
NM_INLINE Vi iadd(Vi a, Vi b) { Vi r; NM_EACH(NM_WRAP(a.v[l], +, b.v[l])); }
NM_INLINE Vi isub(Vi a, Vi b) { Vi r; NM_EACH(NM_WRAP(a.v[l], -, b.v[l])); }
NM_INLINE Vi imax(Vi a, Vi b) { Vi r; NM_EACH(a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }
NM_INLINE Vi ior(Vi a, Vi b) { Vi r; NM_EACH(a.v[l] | b.v[l]); }
NM_INLINE Vi iand(Vi a, Vi b) { Vi r; NM_EACH(a.v[l] & b.v[l]); }
template <int kBits>
NM_INLINE Vi ishl(Vi a) { Vi r; NM_EACH(NM_WRAP(a.v[l], <<, kBits)); }
NM_INLINE Vi iramp() { Vi r; NM_EACH(l); }
NM_INLINE Vi iround(Vf a) {
  Vi r;
  // x86 gives INT32_MIN for what does not fit; callers clamp first, padding lanes may not
  NM_EACH(a.v[l] >= -2147483648.0f && a.v[l] < 2147483648.0f ? static_cast<int32_t>(__builtin_lrintf(a.v[l]))
                                                             : INT32_MIN);
}
NM_INLINE Vf tofloat(Vi a) { Vf r; NM_EACH(static_cast<float>(a.v[l])); }
NM_INLINE Vf fbits(Vi a) { Vf r; __builtin_memcpy(r.v, a.v, sizeof r.v); return r; }
NM_INLINE Vi ibits(Vf a) { Vi r; __builtin_memcpy(r.v, a.v, sizeof r.v); return r; }
NM_INLINE Vi where_ge(Vi a, Vi b, Vi yes, Vi no) { Vi r; NM_EACH(a.v[l] >= b.v[l] ? yes.v[l] : no.v[l]); }
NM_INLINE Vi dword(const void* p) {
  int32_t d;
  __builtin_memcpy(&d, p, 4);
  return iset(d);
}
NM_INLINE Vi dot(Vi acc, Vi x, Vi w) {
  for (int l = 0; l < kLanes; ++l) {
    int32_t sum = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      const int32_t u = static_cast<uint8_t>(static_cast<uint32_t>(x.v[l]) >> shift);
      const int32_t s = static_cast<int8_t>(static_cast<uint32_t>(w.v[l]) >> shift);
      sum += u * s;
    }
    acc.v[l] = NM_WRAP(acc.v[l], +, sum);
  }
  return acc;
}
// The same for weights, which kernels of kPaired have got as engine/pairs.h leaves them; and of x - kOffset, where that
// is not 0: sums start with kOffset times the weights' sum.
constexpr bool kPaired = false;
constexpr int kOffset = 0;
NM_INLINE Vi dot_weights(Vi acc, Vi x, Vi w) { return dot(acc, x, w); }
NM_INLINE void store_bytes(void* p, Vi a) {
  for (int l = 0; l < kLanes; ++l) static_cast<uint8_t*>(p)[l] = static_cast<uint8_t>(a.v[l]);
}
// imin is the signed minimum; ishr_each and ishl_each shift each lane, logically, by 0..31. iload4 fills the first four
// lanes and zeroes the rest. store_sum4 stores four sums, the i-th of the lanes l = i (mod 4).
NM_INLINE Vi imin(Vi a, Vi b) { Vi r; NM_EACH(a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
NM_INLINE Vi ishr_each(Vi a, Vi n) { Vi r; NM_EACH(NM_WRAP(a.v[l], >>, n.v[l])); }
NM_INLINE Vi ishl_each(Vi a, Vi n) { Vi r; NM_EACH(NM_WRAP(a.v[l], <<, n.v[l])); }
NM_INLINE Vi iload4(const void* p) {
  Vi r = iset(0);
  __builtin_memcpy(r.v, p, 16);
  return r;
}
NM_INLINE void store_sum4(int32_t* p, Vi a) {
  for (int i = 0; i < 4; ++i) {
    p[i] = 0;
    for (int l = i; l < kLanes; l += 4) p[i] = NM_WRAP(p[i], +, a.v[l]);
  }
}

}  // namespace
