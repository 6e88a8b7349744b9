// Products of a few rows with a weight matrix: y [M, N] = x [M, K] w^T, every weight read once for all rows.
//
// float32 and bfloat16 weights lie as torch stores them, [N, K]. int8 and int4 weights are packed (../linear.py) in panels
// of 16 rows: for every 4 columns 16 x 4 bytes (int8), or for every 8 columns 16 x 4 bytes whose low halves are the first
// 4 columns and whose high halves the next (int4); codes are unsigned around a zero of 128 or 8; one float16 scale per
// row and group of columns, [panel, group, 16]. x is rounded to int8 per row and group; sums are exact int32 inside a
// group, float32 across groups. Where the CPU multiplies bfloat16, x is rounded to it for bfloat16 weights.
//
// The order of every sum depends on K alone: neither on M nor on the number of threads. A token's result is the same
// bits whatever is computed beside it.
#pragma once
#include <type_traits>

#include "amx.h"
#include "team.h"
#include "vec.h"

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Weight {
  const char* data;
  const char* scale;
  int64_t rows, cols, kind, group;
  int64_t data_stride, scale_stride;  // bytes from one matrix to the next where several are stacked

  Weight at(int64_t i) const {
    Weight m = *this;
    m.data += i * data_stride;
    if (m.scale) m.scale += i * scale_stride;
    return m;
  }
  bool packed() const { return kind >= INT8; }
#if defined(__AVX512BF16__)
  bool rounds() const { return kind != FLOAT32; }  // whether it asks for another form of x than float32
#else
  bool rounds() const { return packed(); }
#endif
  int64_t zero() const { return kind == INT8 ? 128 : 8; }
};

// Rows of a product's left side: float32, and what the weight asks for.
struct Rows {
  float* x;        // [T, K]
  bf16* h;         // [T, K]
  int8_t* q;       // [T, K]
  float* scale;    // [T, K / 32]
  int32_t* total;  // [T, K / 32]: sum of q over a group
  int64_t width;   // K

  // The form of row t that w multiplies with.
  void prepare(int64_t t, const Weight& w) const {
    if (w.packed()) quantize(t, w.group);
    else if (w.rounds()) {
      int64_t k = 0;
      for (; k + W <= width; k += W) store(h + t * width + k, load(x + t * width + k));
      for (; k < width; k++) store1(h + t * width + k, x[t * width + k]);
    }
  }

  // Row t to int8 in groups: q = round(x / scale), scale = max|x| / 127.
  void quantize(int64_t t, int64_t group) const {
    for (int64_t g = 0; g * group < width; g++) {
      const float* p = x + t * width + g * group;
      int8_t* out = q + t * width + g * group;
      int64_t n = std::min(group, width - g * group);
      // As whole numbers magnitudes are ordered too, infinity and NaN above all others.
      uint32_t top = 0;
      for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, p + i, 4);
        top = std::max(top, u & 0x7fffffff);
      }
      float most;
      memcpy(&most, &top, 4);
      // Not a number makes the whole group so; what is too small to be divided by counts as zero.
      const bool finite = top < 0x7f800000;
      if (!finite || most < 1e-36f) {
        std::fill(out, out + n, 0);
        scale[t * (width / 32) + g] = finite ? 0.f : NAN;
        total[t * (width / 32) + g] = 0;
        continue;
      }
      float inverse = 127.f / most;
      int32_t sum = 0;
      for (int64_t i = 0; i < n; i++) {
        // Adding 1.5 x 2^23 rounds to the nearest integer, and is vectorised where lrintf is not.
        int32_t code = (int32_t)((p[i] * inverse + 12582912.f) - 12582912.f);
        out[i] = (int8_t)code;
        sum += code;
      }
      scale[t * (width / 32) + g] = most / 127.f;
      total[t * (width / 32) + g] = sum;
    }
  }
};

constexpr int PANEL = 16, STREAMS = 4, PACKED_TOKENS = 8;
// Tokens at once for so many weight rows at once: as many sums as there are registers (and one more, of 4 rows and 3
// tokens without AVX-512, which is faster all the same). Many tokens want the other shape there: 3 rows, 4 tokens.
constexpr int tile_tokens(int rows) { return W == 16 ? 6 : rows == STREAMS ? 3 : 4; }
constexpr int MANY_STREAMS = W == 16 ? STREAMS : STREAMS - 1;

// Weights come from memory. The hardware's prefetching ends at every page; this does not.
constexpr int64_t AHEAD = W == 16 ? 4096 : 512;
INLINE void fetch(const void* p, int64_t ahead = AHEAD) { __builtin_prefetch((const char*)p + ahead, 0, 3); }

#if defined(__AVX2__)
// The sums of four vectors, side by side: in the same order wherever a vector stands.
INLINE __m128 sums4(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512 all = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
#else
  __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)a, (__m256)b) + _mm256_unpackhi_ps((__m256)a, (__m256)b));
  __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)c, (__m256)d) + _mm256_unpackhi_ps((__m256)c, (__m256)d));
  __m256 half = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
#endif
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
#endif

template <int N> using Int = std::integral_constant<int, N>;

// out[i] = the sum of v[i]: in the same order whatever N is.
template <int N> INLINE void sums(const vf* v, float* out) {
  int i = 0;
#if defined(__AVX2__)
#pragma GCC unroll 16
  for (; i + 4 <= N; i += 4) _mm_storeu_ps(out + i, sums4(v[i], v[i + 1], v[i + 2], v[i + 3]));
#pragma GCC unroll 4
  for (; i < N; i++) out[i] = _mm_cvtss_f32(sums4(v[i], v[i], v[i], v[i]));
#else
  for (; i < N; i++) out[i] = sum(v[i]);
#endif
}

// R rows of the weight times M rows of x, over K; meanwhile what lies ahead[r] bytes behind a row is fetched.
template <int R, int M, typename T>
INLINE void block(const float* const* x, const T* const* w, int64_t K, const int64_t* ahead, float (*out)[R]) {
  constexpr int LINE = std::max<int>(W, 64 / sizeof(T));
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  int64_t k = 0;
  for (; k + LINE <= K; k += LINE) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) fetch(w[r] + k, ahead[r]);
#pragma GCC unroll 16
    for (int j = 0; j < LINE; j += W) {
      vf v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) v[r] = load(w[r] + k + j);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        vf a = load(x[m] + k + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[m][r] = fma(a, v[r], acc[m][r]);
      }
    }
  }
  for (; k < K; k += W) {
    int n = (int)std::min<int64_t>(W, K - k);
    for (int m = 0; m < M; m++) {
      vf a = load_part(x[m] + k, n);
      for (int r = 0; r < R; r++) acc[m][r] = fma(a, load_part(w[r] + k, n), acc[m][r]);
    }
  }
  sums<M * R>(&acc[0][0], &out[0][0]);  // all of both, row after row
}

#if defined(__AVX512BF16__)
INLINE __m512bh load32(const bf16* p, int64_t n) {
  return (__m512bh)(n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

template <int R, int M>
INLINE void block(const bf16* const* x, const bf16* const* w, int64_t K, const int64_t* ahead, float (*out)[R]) {
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  for (int64_t k = 0; k < K; k += 32) {
    __m512bh v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      fetch(w[r] + k, ahead[r]);
      v[r] = load32(w[r] + k, K - k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      __m512bh a = load32(x[m] + k, K - k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[m][r] = (vf)_mm512_dpbf16_ps((__m512)acc[m][r], a, v[r]);
    }
  }
  sums<M * R>(&acc[0][0], &out[0][0]);  // all of both, row after row
}
#endif

// y[j][s * PANEL + i] = row `s * apart + i` of w times the token[j]-th row of x, for s < R, i < n <= PANEL.
// The R rows that are read at once lie apart: on one page they would stand in the way of the hardware's prefetching.
template <int R, typename X, typename T>
static __attribute__((noinline)) void strip(const X* x, int64_t width, const int32_t* token, int64_t count, const T* w,
                                            int64_t K, int64_t apart, int n, float (*y)[STREAMS * PANEL]) {
  constexpr int MOST = tile_tokens(R);
  const int64_t tiles = (count + MOST - 1) / MOST;
  for (int i = 0; i < n; i++) {
    const T* rows[R];
    for (int r = 0; r < R; r++) rows[r] = w + (r * apart + i) * K;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; t++) {
      // With several tiles the rows are near from the second on: each fetches its part of the next rows.
      int64_t ahead[R];
      for (int r = 0; r < R; r++) ahead[r] = tiles == 1 ? AHEAD : r % tiles == t ? K * (int64_t)sizeof(T) : 0;
      const int m = (int)((count - first + tiles - t - 1) / (tiles - t));
      const X* xs[MOST];
      for (int j = 0; j < m; j++) xs[j] = x + token[first + j] * width;
      auto tile = [&](auto tokens) {
        constexpr int M = decltype(tokens)::value;
        float part[M][R];
        block<R, M>(xs, rows, K, ahead, part);
        for (int j = 0; j < M; j++)
          for (int r = 0; r < R; r++) y[first + j][r * PANEL + i] = part[j][r];
      };
      switch (m) {
        case 1: tile(Int<1>{}); break;
        case 2: tile(Int<2>{}); break;
        case 3: tile(Int<3>{}); break;
        case 4: tile(Int<std::min(4, MOST)>{}); break;
        case 5: tile(Int<std::min(5, MOST)>{}); break;
        default: tile(Int<MOST>{}); break;
      }
      first += m;
    }
  }
}

#if defined(__AVX512VNNI__)
template <int M, bool FOUR>
INLINE void panel_tile(const Weight& w, int64_t panel, const int8_t* const* q, const float* const* scale,
                       const int32_t* const* total, float (*out)[PANEL]) {
  int64_t groups = (w.cols + w.group - 1) / w.group;
  const char* codes = w.data + panel * w.cols * PANEL / (FOUR ? 2 : 1);
  const char* scales = w.scale + panel * groups * PANEL * 2;
  __m512 acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; g++) {
    int64_t from = g * w.group, to = std::min(w.cols, from + w.group);
    __m512i part[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) part[m] = _mm512_set1_epi32((int32_t)(-w.zero() * total[m][g]));
    for (int64_t k = from; k < to; k += FOUR ? 8 : 4) {
      __m512i c = _mm512_loadu_si512(codes);
      fetch(codes);
      codes += 64;
      if (FOUR) {
        __m512i a = _mm512_and_si512(c, low), b = _mm512_and_si512(_mm512_srli_epi16(c, 4), low);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          int32_t x0, x1;
          memcpy(&x0, q[m] + k, 4), memcpy(&x1, q[m] + k + 4, 4);
          part[m] = _mm512_dpbusd_epi32(part[m], a, _mm512_set1_epi32(x0));
          part[m] = _mm512_dpbusd_epi32(part[m], b, _mm512_set1_epi32(x1));
        }
      } else {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          int32_t x0;
          memcpy(&x0, q[m] + k, 4);
          part[m] = _mm512_dpbusd_epi32(part[m], c, _mm512_set1_epi32(x0));
        }
      }
    }
    __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + g * PANEL * 2)));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m]), _mm512_mul_ps(s, _mm512_set1_ps(scale[m][g])), acc[m]);
  }
  for (int m = 0; m < M; m++) _mm512_storeu_ps(out[m], acc[m]);
}
#elif defined(__AVX2__)
// Pairs of products are added in 16 bits. An int8 pair fits when the code's sign is put on x: 2 x 128 x 127. Of int4
// pairs, 2 x 15 x 127, eight fit: 32 columns.
template <int M, bool FOUR>
INLINE void panel_tile(const Weight& w, int64_t panel, const int8_t* const* q, const float* const* scale,
                       const int32_t* const* total, float (*out)[PANEL]) {
  const int64_t groups = (w.cols + w.group - 1) / w.group, step = FOUR ? 8 : 4;
  const char* codes = w.data + panel * w.cols * PANEL / (FOUR ? 2 : 1);
  const char* scales = w.scale + panel * groups * PANEL * 2;
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), high = _mm256_set1_epi8(-128);
  __m256 acc[M][2];
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
  auto four = [](const int8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  };
  for (int64_t g = 0; g < groups; g++) {
    const int64_t from = g * w.group, to = std::min(w.cols, from + w.group);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {  // 8 rows
      __m256i part[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) part[m] = FOUR ? _mm256_set1_epi32((int32_t)(-8 * total[m][g])) : _mm256_setzero_si256();
      const char* c = codes + half * 32;
      for (int64_t k32 = from; k32 < to; k32 += 32) {
        __m256i pairs[M];
        if (FOUR)
          for (int m = 0; m < M; m++) pairs[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int64_t k = k32; k < k32 + 32; k += step, c += 64) {
          const __m256i code = _mm256_loadu_si256((const __m256i*)c);
          if (!half) fetch(c);
          if (FOUR) {
            const __m256i a = _mm256_and_si256(code, low), b = _mm256_and_si256(_mm256_srli_epi16(code, 4), low);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
              pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(a, four(q[m] + k)));
              pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(b, four(q[m] + k + 4)));
            }
          } else {
            const __m256i sign = _mm256_xor_si256(code, high), size = _mm256_abs_epi8(sign);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
              const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(q[m] + k), sign));
              part[m] = _mm256_add_epi32(part[m], _mm256_madd_epi16(two, ones));
            }
          }
        }
        if (FOUR)
          for (int m = 0; m < M; m++) part[m] = _mm256_add_epi32(part[m], _mm256_madd_epi16(pairs[m], ones));
      }
      const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + g * PANEL * 2 + half * 16)));
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        acc[m][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[m]), _mm256_mul_ps(s, _mm256_set1_ps(scale[m][g])), acc[m][half]);
    }
    codes += (to - from) * PANEL / (FOUR ? 2 : 1);
  }
  for (int m = 0; m < M; m++) _mm256_storeu_ps(out[m], acc[m][0]), _mm256_storeu_ps(out[m] + 8, acc[m][1]);
}
#else
INLINE float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = h & 0x7fff, u;
  if (bits >= 0x7c00) u = sign | 0x7f800000 | bits << 13;  // infinity and NaN
  else if (bits >= 0x0400) u = sign | ((bits + 0x1c000) << 13);
  else {  // subnormal: exact as bits x 2^-24
    float f = bits * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

template <int M, bool FOUR>
INLINE void panel_tile(const Weight& w, int64_t panel, const int8_t* const* q, const float* const* scale,
                       const int32_t* const* total, float (*out)[PANEL]) {
  int64_t groups = (w.cols + w.group - 1) / w.group;
  const uint8_t* codes = (const uint8_t*)w.data + panel * w.cols * PANEL / (FOUR ? 2 : 1);
  const char* scales = w.scale + panel * groups * PANEL * 2;
  for (int m = 0; m < M; m++)
    for (int r = 0; r < PANEL; r++) out[m][r] = 0;
  for (int64_t g = 0; g < groups; g++) {
    int64_t from = g * w.group, to = std::min(w.cols, from + w.group);
    float s[PANEL];
    for (int r = 0; r < PANEL; r++) {
      uint16_t h;
      memcpy(&h, scales + (g * PANEL + r) * 2, 2);
      s[r] = from_half(h);
    }
    for (int m = 0; m < M; m++) {
      int32_t part[PANEL];
      for (int r = 0; r < PANEL; r++) part[r] = (int32_t)(-w.zero() * total[m][g]);
      const uint8_t* c = codes;
      for (int64_t k = from; k < to; k += 4) {
        const int8_t* x = q[m] + k;
        int shift = FOUR ? (int)(k & 4) : 0, mask = FOUR ? 15 : 255;
        for (int r = 0; r < PANEL; r++)
          for (int j = 0; j < 4; j++) part[r] += (int32_t)((c[4 * r + j] >> shift) & mask) * x[j];
        if (!FOUR || shift) c += 64;
      }
      for (int r = 0; r < PANEL; r++) out[m][r] += (float)part[r] * (s[r] * scale[m][g]);
    }
    codes += (to - from) * PANEL / (FOUR ? 2 : 1);
  }
}
#endif

template <int M>
INLINE void packed_tile(const Weight& w, const Rows& in, const int32_t* token, int64_t panel, float (*y)[PANEL]) {
  const int8_t* q[M];
  const float* scale[M];
  const int32_t* total[M];
  for (int m = 0; m < M; m++) {
    q[m] = in.q + token[m] * in.width;
    scale[m] = in.scale + token[m] * (in.width / 32);
    total[m] = in.total + token[m] * (in.width / 32);
  }
  if (w.kind == INT8) panel_tile<M, false>(w, panel, q, scale, total, y);
  else panel_tile<M, true>(w, panel, q, scale, total, y);
}

// A panel of packed weight rows times `count` <= PACKED_TOKENS rows of `in`.
[[maybe_unused]] static __attribute__((noinline)) void packed_panel(const Weight& w, const Rows& in,
                                                                    const int32_t* token, int count, int64_t panel,
                                                                    float (*y)[PANEL]) {
  switch (count) {
    case 1: return packed_tile<1>(w, in, token, panel, y);
    case 2: return packed_tile<2>(w, in, token, panel, y);
    case 3: return packed_tile<3>(w, in, token, panel, y);
    case 4: return packed_tile<4>(w, in, token, panel, y);
    case 5: return packed_tile<5>(w, in, token, panel, y);
    case 6: return packed_tile<6>(w, in, token, panel, y);
    case 7: return packed_tile<7>(w, in, token, panel, y);
    default: return packed_tile<8>(w, in, token, panel, y);
  }
}

template <typename X, typename T, typename Out>
INLINE void dense_product(const Weight& w, const X* x, int64_t width, const int32_t* token, int64_t count, int64_t first,
                          int64_t last, Out out) {
  constexpr int64_t MOST = 32;  // tokens at once
  float y[MOST][STREAMS * PANEL];
  const T* rows = (const T*)w.data;
  for (int64_t begin = 0; begin < count; begin += MOST) {
    const int64_t m = std::min(MOST, count - begin);
    int64_t row = first;
    auto strips = [&](auto streams) {
      constexpr int R = decltype(streams)::value;
      const int64_t apart = (last - row) / R;
      for (int64_t i = row; i < row + apart; i += PANEL) {
        const int n = (int)std::min<int64_t>(PANEL, row + apart - i);
        strip<R>(x, width, token + begin, m, rows + i * w.cols, w.cols, apart, n, y);
        for (int64_t j = 0; j < m; j++)
          for (int s = 0; s < R; s++) out(begin + j, i + s * apart, y[j] + s * PANEL, n);
      }
      row += R * apart;
    };
    if (m > tile_tokens(STREAMS)) strips(Int<MANY_STREAMS>{});
    else strips(Int<STREAMS>{});
    strips(Int<1>{});
  }
}

#if TILES_AMX
constexpr int64_t LONGEST = 8192;  // inputs of a row that the packed tokens below have room for

// 32 weight rows at once against up to 16 tokens: the weight is the left side, as it lies in memory; the tokens are
// packed in pairs of inputs, [K / 2][16][2]. One token costs what 16 do, and that is less than reading the weight.
template <typename Out>
static void amx_product(const Weight& w, const Rows& in, const int32_t* token, int64_t count, int64_t first, int64_t last,
                        Out out) {
  alignas(64) static thread_local int32_t packed[LONGEST / 2 * 16];
  alignas(64) float c[2][16 * 16];
  const bf16* rows = (const bf16*)w.data;
  const int64_t K = w.cols, KT = K / 32;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t m = std::min<int64_t>(16, count - i);
    for (int64_t j = 0; j < 16; j++) {
      const char* pairs = (const char*)(in.h + token[i + std::min(j, m - 1)] * in.width);
      if (j < m)
        for (int64_t k = 0; k < K / 2; k++) memcpy(packed + k * 16 + j, pairs + 4 * k, 4);
    }
    for (int64_t row = first; row < last; row += 32) {
      const bool two = row + 16 < last;
      const bf16 *a = rows + row * K, *b = a + 16 * K;
      TILE_ZERO(0);
      TILE_ZERO(1);
      for (int64_t k = 0; k < KT; k++) {
        for (int r = 0; r < 16 << two; r++) fetch(a + r * K + k * 32);
        TILE_LOAD(2, packed + k * 256, 64);
        TILE_LOAD(4, a + k * 32, K * 2);
        TILE_DOT(0, 4, 2);
        if (two) {
          TILE_LOAD(5, b + k * 32, K * 2);
          TILE_DOT(1, 5, 2);
        }
      }
      TILE_STORE(0, c[0], 64);
      TILE_STORE(1, c[1], 64);
      for (int64_t half = 0; half <= two; half++)
        for (int64_t j = 0; j < m; j++) {
          float y[16];
          for (int r = 0; r < 16; r++) y[r] = c[half][r * 16 + j];
          out(i + j, row + half * 16, y, 16);
        }
    }
  }
}
#endif

// Weight rows first..last (for packed weights from a multiple of 16 on) times `count` rows of `in`, those that `token`
// names: out(i, row, values, n) for the i-th of them.
template <typename Out>
INLINE void product(const Weight& w, const Rows& in, const int32_t* token, int64_t count, int64_t first, int64_t last,
                    Out out) {
#if TILES_AMX
  // Whole tiles only; the same for every number of tokens, since a sum's order is another.
  if (w.kind == BFLOAT16 && w.cols % 32 == 0 && w.rows % 16 == 0 && w.cols <= LONGEST && amx())
    return amx_product(w, in, token, count, first, last, out);
#endif
#if defined(__AVX512BF16__)
  if (w.kind == BFLOAT16) return dense_product<bf16, bf16>(w, in.h, in.width, token, count, first, last, out);
#endif
  if (w.kind == FLOAT32) return dense_product<float, float>(w, in.x, in.width, token, count, first, last, out);
  if (w.kind == BFLOAT16) return dense_product<float, bf16>(w, in.x, in.width, token, count, first, last, out);
  float y[PACKED_TOKENS][PANEL];
  for (int64_t row = first; row < last; row += PANEL) {
    const int n = (int)std::min<int64_t>(PANEL, last - row);
    for (int64_t i = 0, left = (count + PACKED_TOKENS - 1) / PACKED_TOKENS; left; left--) {
      const int m = (int)((count - i + left - 1) / left);
      packed_panel(w, in, token + i, m, row / PANEL, y);
      for (int j = 0; j < m; j++) out(i + j, row, y[j], n);
      i += m;
    }
  }
}
