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

constexpr int TILE_ROWS = W == 16 ? 4 : 2;  // weight rows at once
constexpr int TILE_TOKENS = 6, PACKED_TOKENS = 8;  // and as many tokens as there are registers for sums
constexpr int PANEL = 16;

// Weights come from memory in one long stream. The hardware's prefetching ends at every page; this does not.
constexpr int64_t AHEAD = 4096;
INLINE void fetch(const void* p, int64_t ahead = AHEAD) { __builtin_prefetch((const char*)p + ahead, 0, 3); }

#if defined(__AVX512F__)
// The sums of four vectors, side by side.
INLINE __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// out[r] = the sum of v[r]: in the same order whatever R is.
template <int R> INLINE void sums(const vf* v, float* out) {
#if defined(__AVX512F__)
  if (R == 4) _mm_storeu_ps(out, sums4((__m512)v[0], (__m512)v[1], (__m512)v[2], (__m512)v[3]));
  else
    for (int r = 0; r < R; r++) out[r] = _mm_cvtss_f32(sums4((__m512)v[r], (__m512)v[r], (__m512)v[r], (__m512)v[r]));
#else
  for (int r = 0; r < R; r++) out[r] = sum(v[r]);
#endif
}

// R rows of the weight times M rows of x, over K.
template <int R, int M, typename T>
INLINE void block(const float* const* x, const T* w, int64_t ldw, int64_t K, float (*out)[R], int64_t ahead = AHEAD) {
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    vf v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      v[r] = load(w + r * ldw + k);
      fetch(w + r * ldw + k, ahead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vf a = load(x[m] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[m][r] += a * v[r];
    }
  }
  if (k < K) {
    int n = (int)(K - k);
    for (int m = 0; m < M; m++) {
      vf a = load_part(x[m] + k, n);
      for (int r = 0; r < R; r++) acc[m][r] += a * load_part(w + r * ldw + k, n);
    }
  }
  for (int m = 0; m < M; m++) sums<R>(acc[m], out[m]);
}

#if defined(__AVX512BF16__)
INLINE __m512bh load32(const bf16* p, int64_t n) {
  return (__m512bh)(n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

template <int R, int M>
INLINE void block(const bf16* const* x, const bf16* w, int64_t ldw, int64_t K, float (*out)[R], int64_t ahead = AHEAD) {
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  for (int64_t k = 0; k < K; k += 32) {
    __m512bh v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) v[r] = load32(w + r * ldw + k, K - k);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      __m512bh a = load32(x[m] + k, K - k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[m][r] = (vf)_mm512_dpbf16_ps((__m512)acc[m][r], a, v[r]);
    }
  }
  for (int m = 0; m < M; m++) sums<R>(acc[m], out[m]);
}
#endif

// out(m, row, values, n): n outputs from `row` on of the m-th of the given rows.
template <typename X, typename T, int M, typename Out>
INLINE void dense_tile(const X* const* x, const T* w, int64_t K, int64_t first, int64_t last, int64_t ahead, Out out) {
  int64_t row = first;
  for (; row + TILE_ROWS <= last; row += TILE_ROWS) {
    float y[M][TILE_ROWS];
    block<TILE_ROWS, M>(x, w + row * K, K, K, y, ahead);
    for (int m = 0; m < M; m++) out(m, row, y[m], TILE_ROWS);
  }
  for (; row < last; row++) {
    float y[M][1];
    block<1, M>(x, w + row * K, K, K, y, ahead);
    for (int m = 0; m < M; m++) out(m, row, y[m], 1);
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

template <int M, typename Out>
INLINE void tile(const Weight& w, const Rows& in, const int32_t* token, int64_t first, int64_t last, int64_t ahead, Out out) {
#if defined(__AVX512BF16__)
  if (w.kind == BFLOAT16) {
    const bf16* x[M];
    for (int m = 0; m < M; m++) x[m] = in.h + token[m] * in.width;
    dense_tile<bf16, bf16, M>(x, (const bf16*)w.data, w.cols, first, last, ahead, out);
    return;
  }
#endif
  if (!w.packed()) {
    const float* x[M];
    for (int m = 0; m < M; m++) x[m] = in.x + token[m] * in.width;
    if (w.kind == FLOAT32) dense_tile<float, float, M>(x, (const float*)w.data, w.cols, first, last, ahead, out);
    else dense_tile<float, bf16, M>(x, (const bf16*)w.data, w.cols, first, last, ahead, out);
    return;
  }
  const int8_t* q[M];
  const float* scale[M];
  const int32_t* total[M];
  for (int m = 0; m < M; m++) {
    q[m] = in.q + token[m] * in.width;
    scale[m] = in.scale + token[m] * (in.width / 32);
    total[m] = in.total + token[m] * (in.width / 32);
  }
  for (int64_t row = first; row < last; row += PANEL) {
    float y[M][PANEL];
    if (w.kind == INT8) panel_tile<M, false>(w, row / PANEL, q, scale, total, y);
    else panel_tile<M, true>(w, row / PANEL, q, scale, total, y);
    int n = (int)std::min<int64_t>(PANEL, last - row);
    for (int m = 0; m < M; m++) out(m, row, y[m], n);
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
  const int64_t most = w.packed() ? PACKED_TOKENS : TILE_TOKENS;
  // A stripe of weight rows stays in the first-level cache while all tokens pass.
  const int64_t stripe = count > most ? 16 : last - first;
  // In the meantime the next one is fetched.
  const int64_t ahead = count > most ? 16 * w.cols * (w.kind == FLOAT32 ? 4 : 2) : AHEAD;
  for (int64_t row = first; row < last; row += stripe) {
    int64_t end = std::min(last, row + stripe);
    for (int64_t i = 0; i < count;) {
      const int64_t left = count - i, tiles = (left + most - 1) / most;
      int64_t m = (left + tiles - 1) / tiles;
      auto shifted = [&](int at, int64_t r, const float* y, int n) { out(i + at, r, y, n); };
      switch (m) {
        case 1: tile<1>(w, in, token + i, row, end, ahead, shifted); break;
        case 2: tile<2>(w, in, token + i, row, end, ahead, shifted); break;
        case 3: tile<3>(w, in, token + i, row, end, ahead, shifted); break;
        case 4: tile<4>(w, in, token + i, row, end, ahead, shifted); break;
        case 5: tile<5>(w, in, token + i, row, end, ahead, shifted); break;
        case 6: tile<6>(w, in, token + i, row, end, ahead, shifted); break;
        case 7: tile<7>(w, in, token + i, row, end, ahead, shifted); break;
        default: tile<8>(w, in, token + i, row, end, ahead, shifted); break;
      }
      i += m;
    }
  }
}
