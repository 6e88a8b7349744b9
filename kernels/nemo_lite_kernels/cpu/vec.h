// Vectors of floats that one source compiles to AVX-512, AVX2 or plain code with (GCC's and Clang's vector extensions).
// A function here is inline and small; W lanes a vector. Widening loads exist for float and bfloat16 (bf16).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

INLINE vf set(float x) { return x - (vf){}; }
INLINE vf zero() { return (vf){}; }

INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
INLINE void store(bf16* p, vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vi nan = v != v;
  vu picked = (rounded & ~(vu)nan) | (quiet & (vu)nan);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)picked));
#else
  vh h = __builtin_convertvector(picked, vh);
  memcpy(p, &h, sizeof h);
#endif
}

// a b + c, rounded once where the CPU has that: said, because compilers fuse some loops and others not.
INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE float load1(const float* p) { return *p; }
INLINE float load1(const bf16* p) {
  uint32_t u = (uint32_t)p->bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = x != x ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// The first n < W elements; the other lanes are zero and are not touched in memory.
template <typename T> INLINE vf load_part(const T* p, int n) {
  T part[W] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T> INLINE void store_part(T* p, vf v, int n) {
  T part[W];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
#endif
}

INLINE float max_of(vf v) {
  float best = v[0];
  for (int i = 1; i < W; i++) best = v[i] > best ? v[i] : best;
  return best;
}

INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE vf relu(vf a) { return vmax(a, zero()); }

// exp to 2 ulp: 2^n times a polynomial on +-ln2/2; 0 below -87.3, infinity above 88.7, NaN stays NaN.
INLINE vf vexp(vf x) {
  vf bounded = vmin(vmax(x, set(-87.3f)), set(88.7f));
  vf t = bounded * 1.44269504f + 12582912.f;  // the integer nearest to x / ln2, in the low bits
  vi n = (vi)t - 0x4b400000;
  vf m = t - 12582912.f;
  vf r = bounded - m * 0.693359375f + m * 2.12194440e-4f;
  vf p = set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // 2^n in two steps, so that n = 128 does not overflow the exponent before the product does.
  vi half = n >> 1;
  vf y = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
  y = x < -87.3f ? zero() : y;
  y = x > 88.7f ? set(INFINITY) : y;
  return x != x ? x : y;
}

INLINE vf sigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }
INLINE vf silu(vf x) { return x / (1.f + vexp(-x)); }

INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}

INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = std::sqrt(x[i]);
  return y;
#endif
}

// 1 / (1 + exp(-x)) with |x| held to 87, so that nothing overflows: 2 ulp where |x| < 87. Of NaN it is any number: what is
// multiplied by it is NaN itself.
INLINE vf logistic(vf x) {
  vf b = x < -87.f ? set(-87.f) : x;
  b = b > 87.f ? set(87.f) : b;
  vf t = b * -1.44269504f + 12582912.f;
  vf m = t - 12582912.f;
  vf r = m * 2.12194440e-4f - b - m * 0.693359375f;
  vf p = set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return reciprocal(1.f + (vf)((vi)p + ((vi)t << 23)));
}

// f(c, part) for the vectors of n elements: part is Whole, or the number of elements in the last, shorter one.
struct Whole {};
template <typename T> INLINE vf get(const T* p, Whole) { return load(p); }
template <typename T> INLINE vf get(const T* p, int n) { return load_part(p, n); }
template <typename T> INLINE void put(T* p, vf v, Whole) { store(p, v); }
template <typename T> INLINE void put(T* p, vf v, int n) { store_part(p, v, n); }
#if defined(__AVX512BF16__)
// One instruction, which takes what is below the smallest normal number for zero.
INLINE void put(bf16* p, vf v, Whole) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#endif
template <typename Each> INLINE void lanes(int64_t n, Each each) {
  int64_t c = 0;
  for (; c + W <= n; c += W) each(c, Whole{});
  if (c < n) each(c, (int)(n - c));
}
