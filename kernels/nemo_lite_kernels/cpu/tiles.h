// Products of matrices in tiles of 16 rows by 64 bytes: AMX where the CPU has it, else vectors; sums are float.
//
//   C [M, N] = A [M, K] B [K, N]
//
// A is row-major in the type P that is multiplied, padded with zeros to whole tiles (16 rows, STEP<P> columns). B is
// packed: tile (n / 16, k / STEP) holds 16 columns, for P = bf16 with pairs of rows side by side, which is what both
// tdpbf16ps and vdpbf16ps read. P is bf16 for bfloat16 inputs where the CPU multiplies that, otherwise float.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "amx.h"
#include "vec.h"

#define INLINED inline __attribute__((always_inline))

namespace {

#if defined(__AVX512BF16__)
typedef bf16 narrow;
#else
typedef float narrow;
#endif

template <typename T> struct Multiplied { typedef float type; };
template <> struct Multiplied<bf16> { typedef narrow type; };
template <typename P> constexpr int STEP = 64 / sizeof(P);  // k of a tile
constexpr int TILE = 16;
constexpr int VECS = TILE / W;  // vectors that hold 16 floats

INLINE int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------- 16 floats at a time

struct Row {
  vf v[VECS];
};

template <typename T> INLINE Row load_row(const T* p, int n) {  // the first n, then zeros
  Row r;
  for (int i = 0; i < VECS; i++) {
    int left = n - i * W;
    r.v[i] = left >= W ? load(p + i * W) : left > 0 ? load_part(p + i * W, left) : zero();
  }
  return r;
}
INLINE void store_fast(float* p, vf v) { store(p, v); }
INLINE void store_fast(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, 32);
#else
  store(p, v);
#endif
}
template <typename T> INLINE void store_row(T* p, const Row& r, int n) {
  for (int i = 0; i < VECS; i++) {
    int left = n - i * W;
    if (left >= W)
      store_fast(p + i * W, r.v[i]);
    else if (left > 0)
      store_part(p + i * W, r.v[i], left);
  }
}
INLINE Row scaled(Row r, float by) {
  for (int i = 0; i < VECS; i++) r.v[i] *= by;
  return r;
}

#if defined(__AVX512BF16__)
INLINE void store16(bf16* p, Row r) {
  __m256bh h = _mm512_cvtneps_pbh((__m512)r.v[0]);
  memcpy(p, &h, 32);
}
// Two rows of B side by side.
INLINE void store_pair(bf16* p, Row even, Row odd) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even.v[0]));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd.v[0]));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif
INLINE void store16(float* p, Row r) {
  for (int i = 0; i < VECS; i++) store(p + i * W, r.v[i]);
}

// 16 x 16 words of 32 bits: rows `from` apart by `stride` words become the columns of `to`.
INLINE void transpose(uint32_t* to, int64_t to_stride, const uint32_t* from) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * 16);
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) memcpy(to + i * to_stride + j, from + j * 16 + i, 4);
#endif
}

// ------------------------------------------------------------------------------------------------------------ packing
// A source is a function (row, column, n) -> Row: 16 floats from there on, zero beyond n; row is one that it has.
// It has `at(row, column)`, to fetch ahead; where `RAW`, what lies there is what is multiplied.

#if defined(__AVX512BF16__)
template <typename Source> INLINE __m256i raw(const Source& source, int64_t row, int64_t column) {
  __m256i h;
  memcpy(&h, source.at(row, column), 32);
  return h;
}
template <typename Source> INLINE __m256i raw_part(const Source& source, int64_t row, int64_t column, int n) {
  bf16 part[TILE] = {};
  memcpy(part, source.at(row, column), n * sizeof(bf16));
  __m256i h;
  memcpy(&h, part, 32);
  return h;
}
#endif

// Rows of `source` as rows of A (or, for a word transpose, as columns of B).
template <typename P, typename Source> INLINE void row_tile(P* to, int64_t stride, Source source, int64_t row, int rows,
                                                            int64_t column, int64_t columns) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(P) == 2 && Source::RAW) {
    if (columns - column >= 2 * TILE) {
      for (int r = 0; r < rows; r++) memcpy(to + r * stride, source.at(row + r, column), 64);
    } else {
      for (int r = 0; r < rows; r++) {
        memset(to + r * stride, 0, 64);
        memcpy(to + r * stride, source.at(row + r, column), (columns - column) * sizeof(P));
      }
    }
    for (int r = rows; r < TILE; r++) memset(to + r * stride, 0, 64);
    return;
  }
#endif
  for (int r = 0; r < TILE; r++)
    for (int i = 0; i < STEP<P>; i += TILE) {
      int n = (int)std::min<int64_t>(TILE, columns - column - i);
      store16(to + r * stride + i, r < rows && n > 0 ? source(row + r, column + i, n) : Row{});
    }
}

// STEP rows of `source`, 16 columns: a tile of B.
template <typename P, typename Source> INLINE void column_tile(P* to, Source source, int64_t row, int64_t rows,
                                                               int64_t column, int64_t columns) {
  int n = (int)std::min<int64_t>(TILE, columns - column);
  auto get = [&](int64_t r) { return r < rows ? source(r, column, n) : Row{}; };
#if defined(__AVX512BF16__)
  if constexpr (sizeof(P) == 2 && Source::RAW) {
    for (int r = 0; r < TILE; r++) {
      auto half = [&](int64_t at) {
        if (at >= rows) return _mm256_setzero_si256();
        return n == TILE ? raw(source, at, column) : raw_part(source, at, column, n);
      };
      __m512i even = _mm512_cvtepu16_epi32(half(row + 2 * r)), odd = _mm512_cvtepu16_epi32(half(row + 2 * r + 1));
      _mm512_storeu_si512(to + r * 2 * TILE, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
    return;
  } else if constexpr (sizeof(P) == 2) {
    for (int r = 0; r < TILE; r++) store_pair(to + r * 2 * TILE, get(row + 2 * r), get(row + 2 * r + 1));
    return;
  } else
#endif
    for (int r = 0; r < TILE; r++) store16(to + r * TILE, get(row + r));
}

// Brings what the next tiles want into the second-level cache, where a source says that this pays.
template <typename Source> INLINE void fetch(const Source& source, int64_t row, int64_t column) {
  if constexpr (Source::FETCH) {
    const uintptr_t first = (uintptr_t)source.at(0, column);
    __builtin_prefetch((const void*)(first + row * source.stride * sizeof(*source.p)), 0, 2);
  }
}

// The packing below is shared out by ranges of 16 rows or columns, [first, last) in units of TILE.

// A [M, K], row-major: row m is row m of the source.
template <typename P, typename Source>
INLINE void pack_a(P* a, int64_t lda, Source source, int64_t M, int64_t K, int64_t first, int64_t last) {
  for (int64_t m = first * TILE; m < last * TILE; m += TILE)
    for (int64_t k = 0; k < K; k += STEP<P>)
      row_tile(a + m * lda + k, lda, source, m, (int)std::min<int64_t>(TILE, M - m), k, K);
}

// A [M, K] where row m is column m of the source.
template <typename P, typename Source>
INLINE void pack_a_turned(P* a, int64_t lda, Source source, int64_t M, int64_t K, int64_t first, int64_t last) {
  alignas(64) P tile[TILE * STEP<P>];
  for (int64_t k = 0; k < K; k += STEP<P>)
    for (int64_t m = first * TILE; m < last * TILE; m += TILE) {
      column_tile(tile, source, k, K, m, M);
      transpose((uint32_t*)(a + m * lda + k), lda * (int64_t)sizeof(P) / 4, (const uint32_t*)tile);
    }
}

// B [K, N]: row k is row k of the source.
template <typename P, typename Source>
INLINE void pack_b(P* b, Source source, int64_t K, int64_t N, int64_t first, int64_t last) {
  int64_t KT = (K + STEP<P> - 1) / STEP<P>;
  for (int64_t k = 0; k < KT; k++)
    for (int64_t n = first; n < last; n++) {
      for (int r = 0; r < STEP<P>; r++) fetch(source, (k + 1) * STEP<P> + r, n * TILE);
      column_tile(b + (n * KT + k) * TILE * STEP<P>, source, k * STEP<P>, K, n * TILE, N);
    }
}

// B [K, N]: column n is row n of the source.
template <typename P, typename Source>
INLINE void pack_b_turned(P* b, Source source, int64_t K, int64_t N, int64_t first, int64_t last) {
  int64_t KT = (K + STEP<P> - 1) / STEP<P>;
  alignas(64) P tile[TILE * STEP<P>];
  for (int64_t n = first; n < last; n++)
    for (int64_t k = 0; k < KT; k++) {
      for (int r = 0; r < TILE; r++)
        for (int i = 0; i < STEP<P>; i += TILE) fetch(source, (n + 1) * TILE + r, k * STEP<P> + i);
      row_tile(tile, STEP<P>, source, n * TILE, (int)std::min<int64_t>(TILE, N - n * TILE), k * STEP<P>, K);
      transpose((uint32_t*)(b + (n * KT + k) * TILE * STEP<P>), TILE, (const uint32_t*)tile);
    }
}

template <typename T, bool FAR = false> struct Matrix {  // a source: row-major; FAR: in memory, not in a cache
  static constexpr bool RAW = sizeof(T) == 2, FETCH = FAR;
  const T* p;
  int64_t stride;
  INLINED const T* at(int64_t row, int64_t column) const { return p + row * stride + column; }
  INLINED Row operator()(int64_t row, int64_t column, int n) const { return load_row(at(row, column), n); }
};

// ------------------------------------------------------------------------------------------------------------ products

#if TILES_AMX
template <bool M2, bool N2>
INLINE void block_amx(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b, int64_t KT) {
  const bf16 *a1 = a + TILE * lda, *b1 = b + KT * 512;
  const int64_t a_bytes = lda * 2;
  TILE_ZERO(0);
  if (N2) TILE_ZERO(1);
  if (M2) TILE_ZERO(2);
  if (M2 && N2) TILE_ZERO(3);
  for (int64_t k = 0; k < KT; k++) {
    TILE_LOAD(4, a + k * 32, a_bytes);
    TILE_LOAD(6, b + k * 512, 64);
    TILE_DOT(0, 4, 6);
    if (N2) {
      TILE_LOAD(7, b1 + k * 512, 64);
      TILE_DOT(1, 4, 7);
    }
    if (M2) {
      TILE_LOAD(5, a1 + k * 32, a_bytes);
      TILE_DOT(2, 5, 6);
      if (N2) TILE_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, c, ldc * 4);
  if (N2) TILE_STORE(1, c + TILE, ldc * 4);
  if (M2) TILE_STORE(2, c + TILE * ldc, ldc * 4);
  if (M2 && N2) TILE_STORE(3, c + TILE * ldc + TILE, ldc * 4);
}
#endif

// R rows by NT tiles of C, by vectors.
template <int R, int NT> INLINE void strip(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
    int64_t KT) {
  vf sums[R][NT * VECS] = {};
  for (int64_t k = 0; k < KT * TILE; k++) {
    vf col[NT * VECS];
    for (int t = 0; t < NT; t++)
      for (int i = 0; i < VECS; i++) col[t * VECS + i] = load(b + (t * KT * TILE + k) * TILE + i * W);
    for (int r = 0; r < R; r++) {
      vf x = set(a[r * lda + k]);
      for (int i = 0; i < NT * VECS; i++) sums[r][i] += x * col[i];
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < NT * VECS; i++) store(c + r * ldc + i * W, sums[r][i]);
}
#if defined(__AVX512BF16__)
template <int R, int NT> INLINE void strip(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b,
    int64_t KT) {
  __m512 sums[R][NT];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < NT; t++) sums[r][t] = _mm512_setzero_ps();
  for (int64_t k = 0; k < KT * TILE; k++) {
    __m512bh col[NT];
    for (int t = 0; t < NT; t++) memcpy(&col[t], b + (t * KT * TILE + k) * 2 * TILE, 64);
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, a + r * lda + 2 * k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int t = 0; t < NT; t++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], x, col[t]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < NT; t++) _mm512_storeu_ps(c + r * ldc + t * TILE, sums[r][t]);
}
#endif

// Up to 32 x 32 of C: `m` of its tiles down, `n` across.
template <typename P>
static inline void block(bool tiles, float* c, int64_t ldc, const P* a, int64_t lda, const P* b, int64_t KT,
    int m, int n) {
#if TILES_AMX
  if constexpr (sizeof(P) == 2)
    if (tiles) {
      if (m == 2 && n == 2) return block_amx<true, true>(c, ldc, a, lda, b, KT);
      if (m == 2) return block_amx<true, false>(c, ldc, a, lda, b, KT);
      if (n == 2) return block_amx<false, true>(c, ldc, a, lda, b, KT);
      return block_amx<false, false>(c, ldc, a, lda, b, KT);
    }
#endif
  constexpr int R = W == 16 ? 8 : 4, NT = W == 16 ? 2 : 1;
  const int64_t tile = KT * TILE * STEP<P>;
  for (int t = 0; t < n; t += NT)
    for (int r = 0; r < m * TILE; r += R) {
      if (NT == 2 && n - t == 1)
        strip<R, 1>(c + r * ldc + t * TILE, ldc, a + r * lda, lda, b + t * tile, KT);
      else
        strip<R, NT>(c + r * ldc + t * TILE, ldc, a + r * lda, lda, b + t * tile, KT);
    }
}

// done(m, n, rows, columns, c): c [32][32] is what A B has from row m and column n on, rows x columns of it inside C.
// Column tiles [first, last) of C.
template <typename P, typename Done>
INLINE void product(const Tiles& tiles, const P* a, int64_t lda, const P* b, int64_t M, int64_t N, int64_t K,
    int64_t first,
                    int64_t last, Done done) {
  alignas(64) float c[32 * 32];
  const int64_t MT = (M + TILE - 1) / TILE, KT = (K + STEP<P> - 1) / STEP<P>;
  for (int64_t n = first; n < last; n += 2)
    for (int64_t m = 0; m < MT; m += 2) {
      block(tiles.on, c, 32, a + m * TILE * lda, lda, b + n * KT * TILE * STEP<P>, KT,
          (int)std::min<int64_t>(2, MT - m),
            (int)std::min<int64_t>(2, last - n));
      done(m * TILE, n * TILE, (int)std::min<int64_t>(32, M - m * TILE),
           (int)std::min(std::min<int64_t>(32, (last - n) * TILE), N - n * TILE), c);
    }
}

// C into memory, in G; added to what is there where `add`.
template <bool STREAM, typename P, typename G>
INLINE void product_into(const Tiles& tiles, G* to, int64_t ldc, bool add, const P* a, int64_t lda, const P* b,
                         int64_t M, int64_t N, int64_t K, int64_t first, int64_t last) {
  alignas(64) float c[32 * 32];
  const int64_t MT = (M + TILE - 1) / TILE, KT = (K + STEP<P> - 1) / STEP<P>;
  for (int64_t n = first; n < last; n += 2)
    for (int64_t m = 0; m < MT; m += 2) {
      const P *pa = a + m * TILE * lda, *pb = b + n * KT * TILE * STEP<P>;
      int mt = (int)std::min<int64_t>(2, MT - m), nt = (int)std::min<int64_t>(2, last - n);
      int rows = (int)std::min<int64_t>(32, M - m * TILE);
      int columns = (int)std::min<int64_t>(nt * TILE, N - n * TILE);
      G* corner = to + m * TILE * ldc + n * TILE;
      if constexpr (sizeof(G) == 4)
        if (!add && rows == mt * TILE && columns == nt * TILE) {
#if defined(__AVX512F__)
          if (STREAM && ((uintptr_t)corner | (ldc * 4)) % 64 == 0) {  // past the caches: it is read again much later
            block(tiles.on, c, 32, pa, lda, pb, KT, mt, nt);
            for (int r = 0; r < rows; r++)
              for (int i = 0; i < columns; i += TILE)
                _mm512_stream_ps((float*)corner + r * ldc + i, _mm512_load_ps(c + r * 32 + i));
            continue;
          }
#endif
          block(tiles.on, (float*)corner, ldc, pa, lda, pb, KT, mt, nt);
          continue;
        }
      block(tiles.on, c, 32, pa, lda, pb, KT, mt, nt);
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < columns; i += TILE) {
          Row row = load_row(c + r * 32 + i, TILE);
          G* at = corner + r * ldc + i;
          if (add) {
            Row old = load_row(at, columns - i);
            for (int j = 0; j < VECS; j++) row.v[j] += old.v[j];
          }
          store_row(at, row, columns - i);
        }
    }
#if defined(__AVX512F__)
  if (STREAM) _mm_sfence();
#endif
}

// Memory of a thread that its next call finds again, in pieces of whole cache lines.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    static thread_local Owner owner;
    if (owner.size < bytes) {
      std::free(owner.p);
      owner.size = 0;
      owner.p = std::aligned_alloc(64, up_to(bytes, 64));
      if (!owner.p) std::abort();
      owner.size = bytes;
    }
    next = (char*)owner.p;
  }
  template <typename P> P* take(int64_t n) {
    P* piece = (P*)next;
    next += up_to(n * (int64_t)sizeof(P), 64);
    return piece;
  }

 private:
  struct Owner {
    void* p = nullptr;
    size_t size = 0;
    ~Owner() { std::free(p); }
  };
  char* next;
};

}  // namespace
