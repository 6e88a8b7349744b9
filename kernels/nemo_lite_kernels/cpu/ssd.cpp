// The chunked Mamba-2 scan (arXiv 2405.21060, section 6) in float32, forward and backward.
//
// A unit of work is a row of the batch and some heads of one group: it goes through the chunks in order (backward: in
// reverse) with the states of its heads, and builds the scores C B^T once a chunk. All matrices of a chunk are packed
// into scratch, their rows and columns padded with zeros to whole vectors, so that no product has a remainder.
// With a = dt A, s its sums from the chunk's start, i and j tokens of one chunk, S the state at its start:
//
//   decay_ij = exp(s_i - s_j), j <= i      y_i = sum_j decay_ij (C_i . B_j) dt_j x_j + exp(s_i) S C_i + D x_i
//   S' = exp(s_last) S + sum_j exp(s_last - s_j) dt_j x_j B_j^T
//
// States are kept transposed, [N, P]: every product then reads its right operand along rows. Letters: l tokens of a
// chunk, n state, p head; an array's name ends in its dimensions' letters.
#include <algorithm>
#include <cmath>
#include <vector>
#include "team.h"
#include "vec.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

// ---- rows that are read or written next, brought nearer while something else is computed

struct Ahead {
  const void* first;
  int64_t stride, rows, bytes;  // stride in bytes

  // The part of the rows that falls to steps [i, i + count) of `steps`.
  INLINE_MEMBER void touch(int64_t i, int64_t count, int64_t steps) const {
    for (int64_t r = i * rows / steps; r < std::min((i + count) * rows / steps, rows); r++)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)first + r * stride + at, 0, 2);
  }
};

// ---- products of matrices: tiles of MR rows and up to NV vectors of columns, kept in registers

constexpr int MR = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int NV = 4;
#else
constexpr int NV = 2;
#endif

constexpr int64_t up(int64_t n) { return (n + W - 1) / W * W; }

template <int V> struct Tile {
  vf v[MR][V];
};

// tile += a b over k in [0, K): a [MR, K] with leading dimension lda, or [K, MR] where AT; b [K, V vectors].
template <bool AT, int V>
INLINE void multiply(Tile<V>& tile, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t K) {
  for (int64_t k = 0; k < K; k++) {
    vf right[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; c++) right[c] = load(b + k * ldb + c * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      vf left = set(AT ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 4
      for (int c = 0; c < V; c++) tile.v[m][c] += left * right[c];
    }
  }
}

template <int V> INLINE Tile<V> zeros() {
  Tile<V> tile;
  for (int m = 0; m < MR; m++)
    for (int c = 0; c < V; c++) tile.v[m][c] = zero();
  return tile;
}

template <int V> INLINE Tile<V> tile_at(const float* p, int64_t ld) {
  Tile<V> tile;
  for (int m = 0; m < MR; m++)
    for (int c = 0; c < V; c++) tile.v[m][c] = load(p + m * ld + c * W);
  return tile;
}

template <int V> INLINE void put_tile(float* p, int64_t ld, const Tile<V>& tile) {
  for (int m = 0; m < MR; m++)
    for (int c = 0; c < V; c++) store(p + m * ld + c * W, tile.v[m][c]);
}

template <int V> struct Vectors {
  static constexpr int value = V;
};

// each(vectors, j) for panels of columns that together are [0, width), width whole vectors.
template <typename Each> INLINE void panels(int64_t width, Each each) {
  int64_t j = 0;
  for (; j + NV * W <= width; j += NV * W) each(Vectors<NV>{}, j);
  if (NV == 4 && j + 3 * W <= width) {
    each(Vectors<3>{}, j);
  } else if (NV == 4 && j + 2 * W <= width) {
    each(Vectors<2>{}, j);
  } else if (j + W <= width) {
    each(Vectors<1>{}, j);
  }
}

// out [rows, width] += a^T b; rows a multiple of MR.
void add_product(const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int64_t rows,
                 int64_t width, int64_t K, Ahead ahead) {
  panels(width, [&](auto vectors, int64_t j) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t i = 0; i < rows; i += MR) {
      Tile<V> tile = tile_at<V>(out + i * ldo + j, ldo);
      multiply<true>(tile, a + i, lda, b + j, ldb, K);
      if (j == 0) ahead.touch(i, MR, rows);
      put_tile(out + i * ldo + j, ldo, tile);
    }
  });
}

// out [rows, rows] = a b where j <= i; what is above that is not to be read.
void lower_product(const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int64_t rows,
                   int64_t K) {
  for (int64_t i = 0; i < rows; i += MR)
    panels(up(i + MR), [&](auto vectors, int64_t j) {
      Tile<decltype(vectors)::value> tile = zeros<decltype(vectors)::value>();
      multiply<false>(tile, a + i * lda, lda, b + j, ldb, K);
      put_tile(out + i * ldo + j, ldo, tile);
    });
}

// ---- packing

// A 4 x 4 transposition in every group of four lanes.
INLINE void transpose4(vf& a, vf& b, vf& c, vf& d) {
#if defined(__AVX512F__)
  __m512 t0 = _mm512_unpacklo_ps((__m512)a, (__m512)b), t1 = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  __m512 t2 = _mm512_unpacklo_ps((__m512)c, (__m512)d), t3 = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  a = (vf)_mm512_shuffle_ps(t0, t2, 0x44), b = (vf)_mm512_shuffle_ps(t0, t2, 0xee);
  c = (vf)_mm512_shuffle_ps(t1, t3, 0x44), d = (vf)_mm512_shuffle_ps(t1, t3, 0xee);
#elif defined(__AVX2__)
  __m256 t0 = _mm256_unpacklo_ps((__m256)a, (__m256)b), t1 = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  __m256 t2 = _mm256_unpacklo_ps((__m256)c, (__m256)d), t3 = _mm256_unpackhi_ps((__m256)c, (__m256)d);
  a = (vf)_mm256_shuffle_ps(t0, t2, 0x44), b = (vf)_mm256_shuffle_ps(t0, t2, 0xee);
  c = (vf)_mm256_shuffle_ps(t1, t3, 0x44), d = (vf)_mm256_shuffle_ps(t1, t3, 0xee);
#else
  vf t0 = {a[0], b[0], c[0], d[0]}, t1 = {a[1], b[1], c[1], d[1]};
  vf t2 = {a[2], b[2], c[2], d[2]}, t3 = {a[3], b[3], c[3], d[3]};
  a = t0, b = t1, c = t2, d = t3;
#endif
}

// Four floats of each of the rows r, r + 4, .. side by side.
INLINE vf quarters(const float* p, int64_t ld) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * ld), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * ld), 2);
  return (vf)_mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * ld), 3);
#elif defined(__AVX2__)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
#else
  return load(p);
#endif
}

// to [cols, rows] = the transpose of from [rows, cols]; both whole vectors.
void transpose(const float* from, int64_t ldf, float* to, int64_t ldt, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += 4) {
      const float* p = from + r * ldf + c;
      vf v[4] = {quarters(p, ldf), quarters(p + ldf, ldf), quarters(p + 2 * ldf, ldf), quarters(p + 3 * ldf, ldf)};
      transpose4(v[0], v[1], v[2], v[3]);
      for (int k = 0; k < 4; k++) store(to + (c + k) * ldt + r, v[k]);
    }
}

// to [all_rows, up(width)] = from [rows, width], zeros around it.
template <typename T>
void pack(const T* from, int64_t ldf, float* to, int64_t rows, int64_t all_rows, int64_t width) {
  int64_t ld = up(width);
  for (int64_t r = 0; r < rows; r++)
    lanes(width, [&](int64_t c, auto part) { store(to + r * ld + c, get(from + r * ldf + c, part)); });
  std::fill(to + rows * ld, to + all_rows * ld, 0.f);
}

template <typename T>
void unpack(const float* from, int64_t ldf, T* to, int64_t ldt, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++)
    lanes(width, [&](int64_t c, auto part) { put(to + r * ldt + c, load(from + r * ldf + c), part); });
}

// Memory of this thread that outlives the call, so that the pages are there the next time.
struct Scratch {
  float* next;

  explicit Scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if ((int64_t)memory.size() < floats + 16) {
      memory.clear();
      memory.resize(floats + 16);
    }
    next = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
  }
  float* take(int64_t floats) {
    float* taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
  }
};

// ---- the call

struct Sizes {
  int64_t B, L, H, P, G, N, chunk;
  int64_t heads;  // of a unit

  int64_t nn() const { return up(N); }
  int64_t pp() const { return up(P); }
  int64_t chunks() const { return (L + chunk - 1) / chunk; }
  int64_t blocks() const { return (H / G + heads - 1) / heads; }  // units of one group
  int64_t units() const { return B * G * blocks(); }
};

struct Unit {
  int64_t b, g, block, first, last;  // heads [first, last)

  Unit(int64_t index, const Sizes& s) {
    block = index % s.blocks();
    g = index / s.blocks() % s.G;
    b = index / s.blocks() / s.G;
    first = g * (s.H / s.G) + block * s.heads;
    last = std::min(first + s.heads, (g + 1) * (s.H / s.G));
  }
};

template <typename T> struct View {  // [B, L, heads or groups, ...], the last dimension contiguous
  T* p;
  int64_t row, token, head;
  T* at(int64_t b, int64_t t, int64_t h) const { return p + b * row + t * token + h * head; }
  Ahead ahead(int64_t b, int64_t t, int64_t h, int64_t rows, int64_t width) const {
    return {at(b, t, h), token * (int64_t)sizeof(T), rows, width * (int64_t)sizeof(T)};
  }
};

template <typename T> View<T> whole_view(T* p, int64_t L, int64_t heads, int64_t width) {
  return {p, L * heads * width, heads * width, width};
}

template <typename T> struct Inputs {
  View<const T> x, B, C;
  View<const float> dt;
  const float *A, *D;
  const uint8_t* reset;
  const float* state;
};

INLINE vi lane_numbers() {
  vi lane;
  for (int k = 0; k < W; k++) lane[k] = k;
  return lane;
}

// What the tokens of one chunk and head see of each other: arrays of up(chunk).
struct Decays {
  float *dt, *sum, *from_start, *to_end, *inside, *step;
  double* exact;
  float whole;
  int64_t tokens;
  const int* start;  // the first token of the chunk that token i sees

  Decays(Scratch& scratch, int64_t l) {
    dt = scratch.take(up(l)), sum = scratch.take(up(l)), from_start = scratch.take(up(l));
    to_end = scratch.take(up(l)), inside = scratch.take(up(l));
    step = scratch.take(up(l));
    exact = (double*)scratch.take(2 * up(l));
  }
  static int64_t floats(int64_t l) { return 8 * (up(l) + 16); }

  // `cut`: the first token starts a document, and none sees the state.
  void fill(const float* dts, int64_t stride, float A, int64_t n, const int* starts, bool cut) {
    tokens = n, start = starts;
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
      dt[i] = dts[i * stride];
      total += (double)dt[i] * A;
      exact[i] = total;
    }
    for (int64_t i = n; i < up(n); i++) dt[i] = 0, exact[i] = total;
    // sum: within a block of W tokens, relative to the block's first: differences inside it are exact.
    for (int64_t i = 0; i < up(n); i++) {
      sum[i] = (float)(exact[i] - exact[i / W * W]);
      from_start[i] = (float)exact[i];
      to_end[i] = (float)(total - exact[i]);
    }
    for (int64_t i = 0; i < up(n); i += W) {
      store(inside + i, vexp(load(sum + i)));
      store(from_start + i, vexp(load(from_start + i)));
      store(to_end + i, vexp(load(to_end + i)));
      step[i / W] = i ? std::exp((float)(exact[i] - exact[i - W])) : 1.f;
    }
    whole = from_start[n - 1];
    for (int64_t i = 0; i < n; i++)
      if (starts[i] > 0 || cut) from_start[i] = 0;
    for (int64_t i = 0; i < starts[n - 1]; i++) to_end[i] = 0;
    for (int64_t i = n; i < up(n); i++) to_end[i] = from_start[i] = 0;
    if (starts[n - 1] > 0 || cut) whole = 0;
  }

  // each(i, j, decay of the W tokens from j to token i) for all i and j that token i can see some of; 0 for the others.
  // Between blocks the decay is a product of two that are at most 1:
  // from j to the first token of i's block, and from there to i.
  template <typename Each> void between(float* to_block, Each each) const {
    for (int64_t block = 0; block < tokens; block += W) {
      int64_t stop = std::min(block + W, tokens);
      if (block) {
        for (int64_t j = 0; j < block - W; j += W) store(to_block + j, load(to_block + j) * step[block / W]);
        vf last;
        for (int k = 0; k < W; k++) last[k] = (float)(exact[block] - exact[block - W + k]);
        store(to_block + block - W, vexp(last));
      }
      vi lane = lane_numbers();
      vf own = load(sum + block);
      for (int64_t i = block; i < stop; i++) {
        int from = start[i];
        vf inner = set(inside[i]);
        for (int64_t j = 0; j < block; j += W) {
          vf decay = load(to_block + j) * inner;
          if (j < from) decay = lane + (int)j < from ? zero() : decay;
          each(i, j, decay);
        }
        vi seen = (lane + (int)block <= (int)i) & (lane + (int)block >= from);
        vf decay = vexp(sum[i] - own);
        each(i, block, seen ? decay : zero());
      }
    }
  }
};

// For every token of a chunk the first one it sees; whether the state is cut off from the chunk's first token.
bool find_starts(const uint8_t* reset, int64_t n, int* starts) {
  int from = 0;
  for (int64_t i = 0; i < n; i++) {
    if (reset && reset[i]) from = (int)i;
    starts[i] = from;
  }
  return reset && reset[0];
}

// ---- forward

// y [tokens, P] = mixed [tokens, tokens] x + from_start (C S) + D x
template <typename T>
void outputs(const float* mixed_ll, int64_t ld, const float* x_lp, const float* C_ln, const float* S_np,
             const float* from_start, float D, T* y, int64_t ldy, int64_t tokens, Ahead ahead, const Sizes& s) {
  int64_t nn = s.nn(), pp = s.pp();
  panels(pp, [&](auto vectors, int64_t j) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t i = 0; i < tokens; i += MR) {
      Tile<V> tile = zeros<V>();
      multiply<false>(tile, C_ln + i * nn, nn, S_np + j, pp, s.N);
      if (j == 0) ahead.touch(i, MR, tokens);
      for (int m = 0; m < MR; m++)
        for (int c = 0; c < V; c++) tile.v[m][c] *= from_start[i + m];
      multiply<false>(tile, mixed_ll + i * ld, ld, x_lp + j, pp, std::min(i + MR, tokens));
      for (int64_t m = 0; m < std::min<int64_t>(MR, tokens - i); m++)
        for (int c = 0; c < V; c++) {
          int64_t at = j + c * W;
          vf v = tile.v[m][c] + D * load(x_lp + (i + m) * pp + at);
          T* to = y + (i + m) * ldy + at;
          if (at + W <= s.P) store(to, v);
          else store_part(to, v, (int)(s.P - at));
        }
    }
  });
}

// to = whole S + B^T (weight x): the state after the chunk; `to` may be S.
void advance(const float* S_np, float whole, const float* B_ln, const float* weighted_lp, float* to_np, int64_t tokens,
             Ahead ahead, const Sizes& s) {
  int64_t nn = s.nn(), pp = s.pp();
  panels(pp, [&](auto vectors, int64_t j) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t i = 0; i < nn; i += MR) {
      Tile<V> tile = tile_at<V>(S_np + i * pp + j, pp);
      for (int m = 0; m < MR; m++)
        for (int c = 0; c < V; c++) tile.v[m][c] *= whole;
      multiply<true>(tile, B_ln + i, nn, weighted_lp + j, pp, tokens);
      if (j == 0) ahead.touch(i, MR, nn);
      put_tile(to_np + i * pp + j, pp, tile);
    }
  });
}

void scale_rows(const float* from, const float* scale, const float* scale2, float* to, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    float f = scale2 ? scale[r] * scale2[r] : scale[r];
    for (int64_t c = 0; c < width; c += W) store(to + r * width + c, load(from + r * width + c) * f);
  }
}

void state_in(const float* state_pn, float* S_np, float* packed_pn, const Sizes& s) {
  if (!state_pn) {
    std::fill(S_np, S_np + s.nn() * s.pp(), 0.f);
    return;
  }
  pack(state_pn, s.N, packed_pn, s.P, s.pp(), s.N);
  transpose(packed_pn, s.nn(), S_np, s.pp(), s.pp(), s.nn());
}

void state_out(const float* S_np, float* state_pn, float* packed_pn, const Sizes& s) {
  transpose(S_np, s.pp(), packed_pn, s.nn(), s.nn(), s.pp());
  unpack(packed_pn, s.nn(), state_pn, s.N, s.P, s.N);
}

// kept [B, chunks, H, nn, pp]: the states at the chunks' starts, or null.
template <typename T>
void forward_unit(const Unit& u, const Sizes& s, const Inputs<T>& in, View<T> y, float* kept, float* final) {
  int64_t l = up(std::min(s.chunk, s.L)), nn = s.nn(), pp = s.pp(), square = nn * pp, heads = u.last - u.first;
  Scratch scratch(3 * l * nn + 2 * l * l + 2 * l * pp + (heads + 1) * square + 3 * l + Decays::floats(l) + 1024);
  float *B_ln = scratch.take(l * nn), *C_ln = scratch.take(l * nn), *B_nl = scratch.take(l * nn);
  float *scores_ll = scratch.take(l * l), *mixed_ll = scratch.take(l * l);
  float *x_lp = scratch.take(l * pp), *weighted_lp = scratch.take(l * pp), *to_block = scratch.take(l);
  float *S_hnp = scratch.take(heads * square), *spare = scratch.take(square);
  int* starts = (int*)scratch.take(l);
  Decays decays(scratch, l);

  auto kept_at = [&](int64_t c, int64_t h) { return kept + ((u.b * s.chunks() + c) * s.H + h) * square; };
  for (int64_t h = u.first; h < u.last; h++)
    state_in(in.state ? in.state + (u.b * s.H + h) * s.P * s.N : nullptr,
             kept ? kept_at(0, h) : S_hnp + (h - u.first) * square, spare, s);
  for (int64_t c = 0; c < s.chunks(); c++) {
    int64_t t = c * s.chunk, n = std::min(s.chunk, s.L - t), rows = up(n);
    pack(in.B.at(u.b, t, u.g), in.B.token, B_ln, n, rows, s.N);
    pack(in.C.at(u.b, t, u.g), in.C.token, C_ln, n, rows, s.N);
    transpose(B_ln, nn, B_nl, l, rows, nn);
    lower_product(C_ln, nn, B_nl, l, scores_ll, l, rows, s.N);
    bool cut = find_starts(in.reset ? in.reset + u.b * s.L + t : nullptr, n, starts);
    int64_t following = std::min(t + s.chunk, s.L);
    for (int64_t h = u.first; h < u.last; h++) {
      in.B.ahead(u.b, following, u.g, std::min(n, s.L - following), s.N).touch(h - u.first, 1, heads);
      in.C.ahead(u.b, following, u.g, std::min(n, s.L - following), s.N).touch(h - u.first, 1, heads);
      decays.fill(in.dt.at(u.b, t, h), in.dt.token, in.A[h], n, starts, cut);
      decays.between(to_block, [&](int64_t i, int64_t j, vf decay) {
        store(mixed_ll + i * l + j, load(scores_ll + i * l + j) * load(decays.dt + j) * decay);
      });
      for (int64_t i = n; i < rows; i++) std::fill(mixed_ll + i * l, mixed_ll + i * l + rows, 0.f);
      pack(in.x.at(u.b, t, h), in.x.token, x_lp, n, rows, s.P);
      float* S_np = kept ? kept_at(c, h) : S_hnp + (h - u.first) * square;
      float* next_np = S_np;
      if (kept) next_np = c + 1 < s.chunks() ? kept_at(c + 1, h) : S_hnp + (h - u.first) * square;
      bool more = h + 1 < u.last;
      int64_t next_t = more ? t : following, next_h = more ? h + 1 : u.first, next_n = std::min(n, s.L - next_t);
      outputs(mixed_ll, l, x_lp, C_ln, S_np, decays.from_start, in.D[h], y.at(u.b, t, h), y.token, n,
              in.x.ahead(u.b, next_t, next_h, next_n, s.P), s);
      scale_rows(x_lp, decays.to_end, decays.dt, weighted_lp, rows, pp);
      advance(S_np, decays.whole, B_ln, weighted_lp, next_np, n, y.ahead(u.b, next_t, next_h, next_n, s.P), s);
    }
  }
  for (int64_t h = u.first; h < u.last; h++)
    state_out(S_hnp + (h - u.first) * square, final + (u.b * s.H + h) * s.P * s.N, spare, s);
}

template <typename T>
void forward(Sizes s, const Inputs<T>& in, T* y, float* kept, float* final, int threads) {
  // A group's heads are split only to occupy the threads: every part builds the scores again. Results do not change.
  int64_t split = threads > 1 ? (2 * threads + s.B * s.G - 1) / (s.B * s.G) : 1;
  s.heads = std::max<int64_t>(1, s.H / s.G / split);
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(s.units(), 1, first, last);
    for (int64_t i = first; i < last; i++) forward_unit(Unit(i, s), s, in, whole_view(y, s.L, s.H, s.P), kept, final);
  });
}

// ---- backward

template <typename T> struct Gradients {
  T* dx;                          // [B, L, H, P]
  float *ddt, *dA, *dD, *dstate;  // [B, L, H], [B, H], [B, H], [B, H, P, N] or null
  float *dB, *dC;                 // [blocks, B, L, G, N]: a part from every unit of a group
};

// dx = dt (to_end (B dS) + mixed^T dy) + D dy
template <typename T>
void input_gradients(const float* mixed_ll, int64_t ld, const float* dy_lp, const float* B_ln, const float* dS_np,
                     const Decays& decays, float D, T* dx, int64_t ldx, int64_t tokens, Ahead ahead, const Sizes& s) {
  int64_t nn = s.nn(), pp = s.pp();
  panels(pp, [&](auto vectors, int64_t c0) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t j = 0; j < tokens; j += MR) {
      Tile<V> tile = zeros<V>();
      multiply<false>(tile, B_ln + j * nn, nn, dS_np + c0, pp, s.N);
      if (c0 == 0) ahead.touch(j, MR, tokens);
      for (int m = 0; m < MR; m++)
        for (int c = 0; c < V; c++) tile.v[m][c] *= decays.to_end[j + m];
      multiply<true>(tile, mixed_ll + j * ld + j, ld, dy_lp + j * pp + c0, pp, tokens - j);
      for (int64_t m = 0; m < std::min<int64_t>(MR, tokens - j); m++)
        for (int c = 0; c < V; c++) {
          int64_t at = c0 + c * W;
          vf v = tile.v[m][c] * decays.dt[j + m] + D * load(dy_lp + (j + m) * pp + at);
          T* to = dx + (j + m) * ldx + at;
          if (at + W <= s.P) store(to, v);
          else store_part(to, v, (int)(s.P - at));
        }
    }
  });
}

// sum_nl += t weight and dots_l += sum_n t other_nl, where t = (left_np right_pl) scale, and all of it is by column.
void project(const float* left_np, const float* right_pl, int64_t ld, const float* scale, const float* weight,
             const float* other_nl, float* sum_nl, float* dots, int64_t width, Ahead ahead, const Sizes& s) {
  int64_t nn = s.nn(), pp = s.pp();
  panels(width, [&](auto vectors, int64_t j) {
    constexpr int V = decltype(vectors)::value;
    vf dot[V], by[V], w[V];
    for (int c = 0; c < V; c++) {
      dot[c] = zero(), by[c] = load(scale + j + c * W);
      w[c] = weight ? load(weight + j + c * W) : set(1.f);
    }
    for (int64_t i = 0; i < nn; i += MR) {
      Tile<V> tile = zeros<V>();
      multiply<false>(tile, left_np + i * pp, pp, right_pl + j, ld, s.P);
      if (j == 0) ahead.touch(i, MR, nn);
      for (int m = 0; m < MR; m++)
        for (int c = 0; c < V; c++) {
          int64_t at = (i + m) * ld + j + c * W;
          vf t = tile.v[m][c] * by[c];
          dot[c] += t * load(other_nl + at);
          store(sum_nl + at, load(sum_nl + at) + t * w[c]);
        }
    }
    for (int c = 0; c < V; c++) store(dots + j + c * W, dot[c]);
  });
}

// The sum of a b, both n floats, n whole vectors; a *= scale.
float dot_and_scale(float* a, const float* b, float scale, int64_t n) {
  vf total[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += 4 * W)
    for (int k = 0; k < 4; k++) {
      if (i + k * W >= n) break;
      vf v = load(a + i + k * W);
      total[k] += v * load(b + i + k * W);
      store(a + i + k * W, v * scale);
    }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

float dot(const float* a, const float* b, int64_t n) {
  vf total[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += W) total[i / W % 4] += load(a + i) * load(b + i);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <typename T>
void backward_unit(const Unit& u, const Sizes& s, const Inputs<T>& in, const float* kept, View<const T> dy,
                   const float* dfinal, const Gradients<T>& out) {
  int64_t l = up(std::min(s.chunk, s.L)), nn = s.nn(), pp = s.pp(), square = nn * pp, heads = u.last - u.first;
  Scratch scratch(6 * l * nn + 4 * l * l + 5 * l * pp + (heads + 1) * square + 8 * l + Decays::floats(l) + 1024);
  float *B_ln = scratch.take(l * nn), *C_ln = scratch.take(l * nn), *B_nl = scratch.take(l * nn);
  float *C_nl = scratch.take(l * nn), *dB_nl = scratch.take(l * nn), *dC_nl = scratch.take(l * nn);
  float *scores_ll = scratch.take(l * l), *dscores_ll = scratch.take(l * l), *mixed_ll = scratch.take(l * l);
  float *dmixed_ll = scratch.take(l * l);
  float *x_lp = scratch.take(l * pp), *dy_lp = scratch.take(l * pp), *weighted_lp = scratch.take(l * pp);
  float *x_pl = scratch.take(l * pp), *dy_pl = scratch.take(l * pp);
  float *dS_hnp = scratch.take(heads * square), *spare = scratch.take(square);
  float *to_block = scratch.take(l), *rows_of = scratch.take(l), *columns_of = scratch.take(l);
  float *dots_B = scratch.take(l), *dots_C = scratch.take(l);
  int* starts = (int*)scratch.take(l);
  Decays decays(scratch, l);

  auto kept_at = [&](int64_t c, int64_t h) { return kept + ((u.b * s.chunks() + c) * s.H + h) * square; };
  View<T> dx = whole_view(out.dx, s.L, s.H, s.P);
  View<float> sums[2] = {whole_view(out.dB + u.block * s.B * s.L * s.G * s.N, s.L, s.G, s.N),
                         whole_view(out.dC + u.block * s.B * s.L * s.G * s.N, s.L, s.G, s.N)};
  for (int64_t h = u.first; h < u.last; h++) {
    int64_t at = (u.b * s.H + h) * s.P * s.N;
    state_in(dfinal ? dfinal + at : nullptr, dS_hnp + (h - u.first) * square, spare, s);
    out.dA[u.b * s.H + h] = out.dD[u.b * s.H + h] = 0;
  }
  for (int64_t c = s.chunks() - 1; c >= 0; c--) {
    int64_t t = c * s.chunk, n = std::min(s.chunk, s.L - t), rows = up(n);
    pack(in.B.at(u.b, t, u.g), in.B.token, B_ln, n, rows, s.N);
    pack(in.C.at(u.b, t, u.g), in.C.token, C_ln, n, rows, s.N);
    transpose(B_ln, nn, B_nl, l, rows, nn);
    transpose(C_ln, nn, C_nl, l, rows, nn);
    lower_product(C_ln, nn, B_nl, l, scores_ll, l, rows, s.N);
    std::fill(dscores_ll, dscores_ll + l * l, 0.f);
    std::fill(dB_nl, dB_nl + nn * l, 0.f);
    std::fill(dC_nl, dC_nl + nn * l, 0.f);
    const uint8_t* reset = in.reset ? in.reset + u.b * s.L + t : nullptr;
    bool cut = find_starts(reset, n, starts);
    for (int64_t h = u.first; h < u.last; h++) {
      const float* S_np = kept_at(c, h);
      float* dS_np = dS_hnp + (h - u.first) * square;
      int64_t before = std::max<int64_t>(t - s.chunk, 0), part = h - u.first;
      in.B.ahead(u.b, before, u.g, n, s.N).touch(part, 1, heads);
      in.C.ahead(u.b, before, u.g, n, s.N).touch(part, 1, heads);
      for (const View<float>& to : sums) to.ahead(u.b, t, u.g, n, s.N).touch(part, 1, heads);
      decays.fill(in.dt.at(u.b, t, h), in.dt.token, in.A[h], n, starts, cut);
      pack(in.x.at(u.b, t, h), in.x.token, x_lp, n, rows, s.P);
      pack(dy.at(u.b, t, h), dy.token, dy_lp, n, rows, s.P);
      transpose(x_lp, pp, x_pl, l, rows, pp);
      transpose(dy_lp, pp, dy_pl, l, rows, pp);
      out.dD[u.b * s.H + h] += dot(x_lp, dy_lp, rows * pp);

      // Inside the chunk: to the scores, and to the logarithms of the decays, by row and by column.
      lower_product(dy_lp, pp, x_pl, l, dmixed_ll, l, rows, s.P);
      std::fill(rows_of, rows_of + rows, 0.f);
      std::fill(columns_of, columns_of + rows, 0.f);
      vf row = zero();
      vi lane = lane_numbers();
      decays.between(to_block, [&](int64_t i, int64_t j, vf decay) {
        int64_t at = i * l + j;
        vf dt = load(decays.dt + j), dmixed = load(dmixed_ll + at), mixed = load(scores_ll + at) * decay;
        store(mixed_ll + at, mixed);
        store(dscores_ll + at, load(dscores_ll + at) + dmixed * decay * dt);
        vf both = dmixed * mixed;
        if (j + W > i) both = lane == (int)(i - j) ? zero() : both;  // its decay is 1 whatever the logarithms are
        store(columns_of + j, load(columns_of + j) + both);
        row += both * dt;
        if (j + W > i) rows_of[i] = sum(row), row = zero();
      });
      // Through what the chunk adds to the state, dS, and through the state it starts from; meanwhile what the next
      // head reads comes nearer.
      bool more = h + 1 < u.last;
      int64_t next_h = more ? h + 1 : u.first, next_c = more ? c : std::max<int64_t>(c - 1, 0);
      int64_t next_t = next_c * s.chunk;
      project(dS_np, x_pl, l, decays.to_end, decays.dt, B_nl, dB_nl, dots_B, rows,
              {kept_at(next_c, next_h), pp * 4, nn, pp * 4}, s);
      project(S_np, dy_pl, l, decays.from_start, nullptr, C_nl, dC_nl, dots_C, rows,
              in.x.ahead(u.b, next_t, next_h, n, s.P), s);
      input_gradients(mixed_ll, l, dy_lp, B_ln, dS_np, decays, in.D[h], dx.at(u.b, t, h), dx.token, n,
                      dy.ahead(u.b, next_t, next_h, n, s.P), s);
      double whole = decays.whole * dot_and_scale(dS_np, S_np, decays.whole, square);
      scale_rows(dy_lp, decays.from_start, nullptr, weighted_lp, rows, pp);
      add_product(C_ln, nn, weighted_lp, pp, dS_np, pp, nn, pp, n, dx.ahead(u.b, next_t, next_h, n, s.P));

      // Of the logarithm of token i's own decay: it is passed by all that goes from a token before i, or the state, to
      // i, a token after it, or the next state.
      double to_next = 0, from_state = whole, inside = 0, dA = 0;
      for (int64_t i = 0; i < n; i++) to_next += (double)decays.dt[i] * dots_B[i];
      for (int64_t i = n - 1; i >= 0; i--) {
        double dt = decays.dt[i];
        to_next -= dt * dots_B[i];
        from_state += dots_C[i];
        inside += rows_of[i] - dt * columns_of[i];
        if (reset && reset[i]) inside = 0;  // nothing of a document passes its start
        double end = to_next + from_state + inside;
        double straight = columns_of[i] + dots_B[i] + dmixed_ll[i * l + i] * scores_ll[i * l + i];
        out.ddt[(u.b * s.L + t + i) * s.H + h] = (float)(straight + end * in.A[h]);
        dA += end * dt;
      }
      out.dA[u.b * s.H + h] += (float)dA;
    }
    // The heads' scores together, and what came by way of the states.
    float* sum_nl[2] = {dB_nl, dC_nl};
    for (int which = 0; which < 2; which++) {
      float* total_ln = which ? C_nl : B_nl;  // free now, and of the right size
      transpose(sum_nl[which], l, total_ln, nn, nn, rows);
      panels(nn, [&](auto vectors, int64_t j) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t i = 0; i < n; i += MR) {
          Tile<V> tile = tile_at<V>(total_ln + i * nn + j, nn);
          if (which) multiply<false>(tile, dscores_ll + i * l, l, B_ln + j, nn, std::min(i + MR, n));
          else multiply<true>(tile, dscores_ll + i * l + i, l, C_ln + i * nn + j, nn, n - i);
          put_tile(total_ln + i * nn + j, nn, tile);
        }
      });
      unpack(total_ln, nn, sums[which].at(u.b, t, u.g), sums[which].token, n, s.N);
    }
  }
  if (out.dstate)
    for (int64_t h = u.first; h < u.last; h++)
      state_out(dS_hnp + (h - u.first) * square, out.dstate + (u.b * s.H + h) * s.P * s.N, spare, s);
}

template <typename T>
void backward(Sizes s, const Inputs<T>& in, const float* kept, View<const T> dy, const float* dfinal,
              const Gradients<T>& out, T* dB, T* dC, int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(s.units(), 1, first, last);
    for (int64_t i = first; i < last; i++) backward_unit(Unit(i, s), s, in, kept, dy, dfinal, out);
    team.barrier();
    int64_t n = s.B * s.L * s.G * s.N;
    team.share(n, 256, first, last);
    for (int which = 0; which < 2; which++) {
      const float* parts = which ? out.dC : out.dB;
      T* to = which ? dC : dB;
      if ((const void*)parts == (const void*)to) continue;
      lanes(last - first, [&](int64_t i, auto part) {
        vf total = get(parts + first + i, part);
        for (int64_t block = 1; block < s.blocks(); block++) total += get(parts + block * n + first + i, part);
        put(to + first + i, total, part);
      });
    }
  });
}

}  // namespace

// Strides are of the row, token and head (or group), three each for x, dt, B and C.
#define EXPORT(T, SUFFIX)                                                                                              \
  extern "C" void ssd_forward_##SUFFIX(const T* x, const float* dt, const float* A, const T* B, const T* C,            \
                                       const float* D, const uint8_t* reset, const float* state, T* y, float* kept,    \
                                       float* final, const int64_t* strides, int64_t batch, int64_t L, int64_t H,      \
                                       int64_t P, int64_t G, int64_t N, int64_t chunk, int64_t threads) {              \
    const int64_t* s = strides;                                                                                        \
    Inputs<T> in{{x, s[0], s[1], s[2]}, {B, s[6], s[7], s[8]}, {C, s[9], s[10], s[11]}, {dt, s[3], s[4], s[5]},        \
                 A, D, reset, state};                                                                                  \
    forward<T>({batch, L, H, P, G, N, chunk, 0}, in, y, kept, final, (int)threads);                                    \
  }                                                                                                                    \
  extern "C" void ssd_backward_##SUFFIX(const T* x, const float* dt, const float* A, const T* B, const T* C,           \
                                        const float* D, const uint8_t* reset, const float* kept, const T* dy,          \
                                        const float* dfinal, T* dx, float* ddt, float* dA, T* dB, T* dC, float* dD,    \
                                        float* dstate, float* parts_B, float* parts_C, const int64_t* strides,         \
                                        int64_t batch, int64_t L, int64_t H, int64_t P, int64_t G, int64_t N,          \
                                        int64_t chunk, int64_t heads, int64_t threads) {                               \
    const int64_t* s = strides;                                                                                        \
    Inputs<T> in{{x, s[0], s[1], s[2]}, {B, s[6], s[7], s[8]}, {C, s[9], s[10], s[11]}, {dt, s[3], s[4], s[5]},        \
                 A, D, reset, nullptr};                                                                                \
    backward<T>({batch, L, H, P, G, N, chunk, heads}, in, kept, {dy, s[12], s[13], s[14]}, dfinal,                     \
                {dx, ddt, dA, dD, dstate, parts_B, parts_C}, dB, dC, (int)threads);                                    \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
