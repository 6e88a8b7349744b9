// Routed experts: y_t = sum_k weight_tk down_e(relu(up_e x_t)^2), e = expert_tk, forward and backward, and the router's
// choice. Copies of tokens are sorted by expert; a task is one expert, or a slice of its F where few experts are hit:
// every weight is read once and cast while it is packed. L: what experts read and write, F: inside, S: copies.
#include <atomic>
#include <cmath>
#include <limits>

#include "team.h"
#include "tiles.h"

namespace {

constexpr int64_t ROWS = 256;  // of an expert at a time: their activations stay in the second-level cache

// Row r is row index[r] of p.
template <typename T> struct Gathered {
  static constexpr bool RAW = sizeof(T) == 2, FETCH = false;
  const T* p;
  int64_t stride;
  const int32_t* index;
  INLINED const T* at(int64_t row, int64_t column) const { return p + index[row] * stride + column; }
  INLINED Row operator()(int64_t row, int64_t column, int n) const { return load_row(at(row, column), n); }
};

// The same, times scale[r].
template <typename T> struct Weighted {
  static constexpr bool RAW = false, FETCH = false;
  Gathered<T> source;
  const float* scale;
  INLINED Row operator()(int64_t row, int64_t column, int n) const { return scaled(source(row, column, n),
      scale[row]); }
};

// relu(up x) lies in panels of 32 columns, [F / 32, S, 32], so that a block of a product finds it in one piece.
constexpr int64_t PANEL = 32;

template <typename T> struct Squared {
  static constexpr bool RAW = false, FETCH = false;
  const T* p;
  int64_t panel;  // from one to the next
  INLINED Row operator()(int64_t row, int64_t column, int) const {
    Row r = load_row(p + column / PANEL * panel + row * PANEL + column % PANEL, TILE);
    for (int i = 0; i < VECS; i++) r.v[i] *= r.v[i];
    return r;
  }
};

struct Sizes {
  int64_t T, k, E, L, F, S, parts;
  // A part's columns of F: whole tiles.
  void slice(int64_t part, int64_t& first, int64_t& last) const {
    int64_t tiles = (F + 31) / 32;
    first = std::min(F, tiles * part / parts * 32);
    last = std::min(F, tiles * (part + 1) / parts * 32);
  }
};

template <typename P> int64_t packed(int64_t K, int64_t N) { return up_to(K, STEP<P>) * up_to(N, TILE); }
template <typename P> int64_t leading(int64_t K) { return up_to(K,
    STEP<P>) + STEP<P>; }  // rows start in different sets

// Copies of an expert up to which its weights are not worth packing.
template <typename P> constexpr int64_t FEW = sizeof(P) == 2 ? 8 : 16;

// out [M, N] = x [M, K] w [N, K]^T, M <= 4: w is read once, as it lies.
template <int M, typename V>
void dots(float* out, int64_t ldo, const float* x, int64_t ldx, const V* w, int64_t ldw, int64_t N, int64_t K) {
  const int64_t whole = K / W * W;
  const int rest = (int)(K - whole);
  for (int64_t n = 0; n < N; n += 4) {
    const V* rows[4];
    for (int i = 0; i < 4; i++) rows[i] = w + std::min(n + i, N - 1) * ldw;
    vf sums[4][M] = {};
    for (int64_t k = 0; k < whole; k += W)
      for (int i = 0; i < 4; i++) {
        vf row = load(rows[i] + k);
        for (int m = 0; m < M; m++) sums[i][m] += row * load(x + m * ldx + k);
      }
    if (rest)
      for (int i = 0; i < 4; i++) {
        vf row = load_part(rows[i] + whole, rest);
        for (int m = 0; m < M; m++) sums[i][m] += row * load_part(x + m * ldx + whole, rest);
      }
    for (int i = 0; i < 4 && n + i < N; i++)
      for (int m = 0; m < M; m++) out[m * ldo + n + i] = sum(sums[i][m]);
  }
}
template <typename V>
void few_dots(int64_t M, float* out, int64_t ldo, const float* x, int64_t ldx, const V* w, int64_t ldw,
    int64_t N, int64_t K) {
  for (; M > 4; M -= 4, out += 4 * ldo, x += 4 * ldx) dots<4>(out, ldo, x, ldx, w, ldw, N, K);
  if (M == 4) dots<4>(out, ldo, x, ldx, w, ldw, N, K);
  if (M == 3) dots<3>(out, ldo, x, ldx, w, ldw, N, K);
  if (M == 2) dots<2>(out, ldo, x, ldx, w, ldw, N, K);
  if (M == 1) dots<1>(out, ldo, x, ldx, w, ldw, N, K);
}

template <typename T, typename V>
void forward(const T* x, const float* weight, const V* up, const V* down, const int32_t* token, const int32_t* place,
             const int64_t* offsets, T* u, float* y_S, T* y, Sizes z, int threads) {
  typedef typename Multiplied<T>::type P;
  const int64_t L = z.L, F = z.F, ldx = leading<P>(L), widest = up_to((F + z.parts - 1) / z.parts, 32) + 32;
  std::atomic<int64_t> next{0};
  in_team(threads, [&](Team team) {
    {
      Tiles tiles;
      Scratch scratch(sizeof(P) * (packed<P>(L, widest) + packed<P>(widest,
          L) + ROWS * (ldx + leading<P>(widest))) + 1024);
      P* up_b = scratch.template take<P>(packed<P>(L, widest));
      P* down_b = scratch.template take<P>(packed<P>(widest, L));
      P* x_a = scratch.template take<P>(ROWS * ldx);
      P* h_a = scratch.template take<P>(ROWS * leading<P>(widest));
      for (int64_t task; (task = next++) < z.E * z.parts;) {
        const int64_t e = task / z.parts, part = task % z.parts, s0 = offsets[e], s1 = offsets[e + 1];
        int64_t f0, f1;
        z.slice(part, f0, f1);
        const int64_t N = f1 - f0, ldh = leading<P>(N);
        if (s0 == s1) continue;
        float* y_e = y_S + part * z.S * L;
        if (!u && s1 - s0 <= FEW<P>) {
          float *xs = (float*)x_a, *hs = (float*)h_a;
          for (int64_t s = s0; s < s1; s++)
            for (int64_t l = 0; l < L; l += TILE) {
              const int n = (int)std::min<int64_t>(TILE, L - l);
              store_row(xs + (s - s0) * L + l, load_row(x + token[s] * L + l, n), n);
            }
          few_dots(s1 - s0, hs, N, xs, L, up + (e * F + f0) * L, L, N, L);
          for (int64_t i = 0; i < (s1 - s0) * N; i++) hs[i] = hs[i] < 0 ? 0 : hs[i] * hs[i];
          few_dots(s1 - s0, y_e + s0 * L, L, hs, N, down + e * F * L + f0, F, L, N);
          continue;
        }
        pack_b_turned<P>(up_b, Matrix<V, true>{up + (e * F + f0) * L, L}, L, N, 0, (N + 15) / 16);
        pack_b_turned<P>(down_b, Matrix<V, true>{down + e * F * L + f0, F}, N, L, 0, (L + 15) / 16);
        for (int64_t s = s0; s < s1; s += ROWS) {
          const int64_t rows = std::min(ROWS, s1 - s), MT = (rows + 15) / 16;
          pack_a<P>(x_a, ldx, Gathered<T>{x, L, token + s}, rows, L, 0, MT);
          // What a last odd tile of N leaves of the last step of K.
          if (up_to(N, STEP<P>) > up_to(N, TILE))
            for (int64_t r = 0; r < MT * TILE; r++) memset(h_a + r * ldh + up_to(N, TILE), 0, TILE * sizeof(P));
          product(tiles, x_a, ldx, up_b, rows, N, L, 0, (N + 15) / 16,
                  [&](int64_t m, int64_t n, int m_rows, int columns, const float* c) {
                    for (int r = 0; r < up_to(m_rows, TILE); r++)
                      for (int i = 0; i < columns; i += TILE) {
                        Row h = load_row(c + r * 32 + i, TILE);
                        for (int j = 0; j < VECS; j++) h.v[j] = h.v[j] < 0.f ? zero() : h.v[j];
                        if (u && r < m_rows) {
                          T* kept = u + ((f0 + n) / PANEL * z.S + s + m + r) * PANEL + i;
                          store_row(kept, h, TILE);
                          h = load_row(kept, TILE);
                        }
                        for (int j = 0; j < VECS; j++) h.v[j] *= h.v[j];
                        store16(h_a + (m + r) * ldh + n + i, h);
                      }
                  });
          product_into<false>(tiles, y_e + s * L, L, false, h_a, ldh, down_b, rows, L, N, 0, (L + 15) / 16);
        }
      }
    }
    team.barrier();
    int64_t first, last;
    team.share(z.T, 1, first, last);
    for (int64_t t = first; t < last; t++)
      for (int64_t l = 0; l < L; l += TILE) {
        const int n = (int)std::min<int64_t>(TILE, L - l);
        Row sum{};
        for (int64_t j = t * z.k; j < (t + 1) * z.k; j++)
          if (place[j] >= 0)
            for (int64_t part = 0; part < z.parts; part++) {
              Row r = load_row(y_S + (part * z.S + place[j]) * L + l, n);
              for (int i = 0; i < VECS; i++) sum.v[i] += r.v[i] * weight[j];
            }
        store_row(y + t * L + l, sum, n);
      }
  });
}

// dweight_S [parts, S] and dx_S [parts, S, L] are scratch.
template <typename T, typename V>
void backward(const T* dy, const T* x, const float* weight, const V* up, const V* down, const int32_t* token,
              const int32_t* copy, const int32_t* place, const int64_t* offsets, const T* u, float* dweight_S,
                  float* dx_S,
              T* dx, float* dweight, V* dup, V* ddown, Sizes z, int threads) {
  typedef typename Multiplied<T>::type P;
  const int64_t L = z.L, F = z.F, widest = up_to((F + z.parts - 1) / z.parts, 32) + 32;
  const int64_t ldl = leading<P>(L), ldf = leading<P>(widest), lds = leading<P>(ROWS), Lp = up_to(L, 32);
  const bool sums = sizeof(V) != 4;  // gradients that are not float are summed apart
  std::atomic<int64_t> next{0};
  in_team(threads, [&](Team team) {
    {
      Tiles tiles;
      Scratch scratch(sizeof(P) * (2 * packed<P>(Lp, widest) + ROWS * (ldl + ldf + Lp + widest) + (Lp + widest) * lds) +
                      (sums ? 8 * L * widest : 0) + 4 * ROWS * (1 + W) + 4096);
      P* up_b = scratch.template take<P>(packed<P>(widest, Lp));
      P* down_b = scratch.template take<P>(packed<P>(Lp, widest));
      P* dy_a = scratch.template take<P>(ROWS * ldl);       // rows: copies
      P* dh_a = scratch.template take<P>(ROWS * ldf);       // the gradient of up x
      P* x_b = scratch.template take<P>(ROWS * Lp);
      P* h_b = scratch.template take<P>(ROWS * widest);     // relu(up x)^2
      P* dy_turned = scratch.template take<P>(Lp * lds);    // weight dy, rows: L
      P* dh_turned = scratch.template take<P>(widest * lds);
      float* w = scratch.template take<float>(ROWS);
      float* dw = scratch.template take<float>(ROWS * W);
      float* dup_sum = sums ? scratch.template take<float>(L * widest) : nullptr;
      float* ddown_sum = sums ? scratch.template take<float>(L * widest) : nullptr;
      for (int64_t task; (task = next++) < z.E * z.parts;) {
        const int64_t e = task / z.parts, part = task % z.parts, s0 = offsets[e], s1 = offsets[e + 1];
        int64_t f0, f1;
        z.slice(part, f0, f1);
        const int64_t N = f1 - f0, NT = (N + 15) / 16, LT = (L + 15) / 16, ldh = leading<P>(N);
        V *dup_e = dup + (e * F + f0) * L, *ddown_e = ddown + e * F * L + f0;
        if (s0 == s1) {
          memset((void*)dup_e, 0, N * L * sizeof(V));
          for (int64_t l = 0; l < L; l++) memset((void*)(ddown_e + l * F), 0, N * sizeof(V));
          continue;
        }
        pack_b<P>(down_b, Matrix<V, true>{down + e * F * L + f0, F}, L, N, 0, NT);
        pack_b<P>(up_b, Matrix<V, true>{up + (e * F + f0) * L, L}, N, L, 0, LT);
        for (int64_t s = s0; s < s1; s += ROWS) {
          const int64_t rows = std::min(ROWS, s1 - s), MT = (rows + 15) / 16;
          for (int64_t r = 0; r < rows; r++) {
            w[r] = weight[copy[s + r]];
            store(dw + r * W, zero());
          }
          pack_a<P>(dy_a, ldl, Gathered<T>{dy, L, token + s}, rows, L, 0, MT);
          if (up_to(N, STEP<P>) > up_to(N, TILE))
            for (int64_t r = 0; r < MT * TILE; r++) memset(dh_a + r * ldh + up_to(N, TILE), 0, TILE * sizeof(P));
          product(tiles, dy_a, ldl, down_b, rows, N, L, 0, NT,
                  [&](int64_t m, int64_t n, int m_rows, int columns, const float* c) {
                    for (int r = 0; r < m_rows; r++) {
                      const T* kept = u + ((f0 + n) / PANEL * z.S + s + m + r) * PANEL;
                      vf dot = load(dw + (m + r) * W);
                      for (int i = 0; i < columns; i += TILE) {
                        Row g = load_row(c + r * 32 + i, TILE), h = load_row(kept + i, TILE);
                        for (int j = 0; j < VECS; j++) {
                          vf gu = g.v[j] * h.v[j];
                          dot += gu * h.v[j];
                          g.v[j] = gu * (2 * w[m + r]);
                        }
                        store16(dh_a + (m + r) * ldh + n + i, g);
                      }
                      store(dw + (m + r) * W, dot);
                    }
                    for (int r = m_rows; r < up_to(m_rows, TILE); r++)
                      for (int i = 0; i < columns; i += TILE) store16(dh_a + (m + r) * ldh + n + i, Row{});
                  });
          for (int64_t r = 0; r < rows; r++) dweight_S[part * z.S + s + r] = sum(load(dw + r * W));
          product_into<false>(tiles, dx_S + (part * z.S + s) * L, L, false, dh_a, ldh, up_b, rows, L, N, 0, LT);
          pack_a_turned<P>(dh_turned, lds, Matrix<P>{dh_a, ldh}, N, rows, 0, NT);
          pack_a_turned<P>(dy_turned, lds, Weighted<T>{{dy, L, token + s}, w}, L, rows, 0, LT);
          pack_b<P>(h_b, Squared<T>{u + (f0 / PANEL * z.S + s) * PANEL, z.S * PANEL}, rows, N, 0, NT);
          pack_b<P>(x_b, Gathered<T>{x, L, token + s}, rows, L, 0, LT);
          const bool more = s > s0;
          if constexpr (sizeof(V) == 4) {
            product_into<true>(tiles, dup_e, L, more, dh_turned, lds, x_b, N, L, rows, 0, LT);
            product_into<true>(tiles, ddown_e, F, more, dy_turned, lds, h_b, L, N, rows, 0, NT);
          } else {
            product_into<false>(tiles, dup_sum, L, more, dh_turned, lds, x_b, N, L, rows, 0, LT);
            product_into<false>(tiles, ddown_sum, N, more, dy_turned, lds, h_b, L, N, rows, 0, NT);
          }
        }
        if (sums) {
          for (int64_t f = 0; f < N; f++)
            for (int64_t l = 0; l < L; l += TILE)
              store_row(dup_e + f * L + l, load_row(dup_sum + f * L + l, (int)std::min<int64_t>(TILE, L - l)),
                        (int)std::min<int64_t>(TILE, L - l));
          for (int64_t l = 0; l < L; l++)
            for (int64_t f = 0; f < N; f += TILE)
              store_row(ddown_e + l * F + f, load_row(ddown_sum + l * N + f, (int)std::min<int64_t>(TILE, N - f)),
                        (int)std::min<int64_t>(TILE, N - f));
        }
      }
    }
    team.barrier();
    int64_t first, last;
    team.share(z.T, 1, first, last);
    for (int64_t j = first * z.k; j < last * z.k; j++) {
      dweight[j] = 0;
      for (int64_t part = 0; place[j] >= 0 && part < z.parts; part++) dweight[j] += dweight_S[part * z.S + place[j]];
    }
    for (int64_t t = first; t < last; t++)
      for (int64_t l = 0; l < L; l += TILE) {
        const int n = (int)std::min<int64_t>(TILE, L - l);
        Row sum{};
        for (int64_t j = t * z.k; j < (t + 1) * z.k; j++)
          if (place[j] >= 0)
            for (int64_t part = 0; part < z.parts; part++) {
              Row r = load_row(dx_S + (part * z.S + place[j]) * L + l, n);
              for (int i = 0; i < VECS; i++) sum.v[i] += r.v[i];
            }
        store_row(dx + t * L + l, sum, n);
      }
  });
}

// ------------------------------------------------------------------------------------------------------------- router

constexpr int64_t CHUNK = 64;  // tokens whose statistics are summed at a time

// The k largest of v, which is overwritten; where no finite one is left, the first that were not taken.
void largest(float* v, int64_t E, int64_t k, int64_t* chosen) {
  for (int64_t j = 0; j < k; j++) {
    vf tops = set(-INFINITY);
    for (int64_t e = 0; e < E; e += W) tops = vmax(load(v + e), tops);
#if defined(__AVX512F__)
    const float top = _mm512_reduce_max_ps((__m512)tops);
#else
    const float top = max_of(tops);
#endif
    int64_t e = 0;
    if (top > -INFINITY) {
#if defined(__AVX512F__)
      uint32_t at;
      while (!(at = _mm512_cmpeq_ps_mask((__m512)load(v + e), _mm512_set1_ps(top)))) e += W;
      e += __builtin_ctz(at);
#else
      while (v[e] != top) e++;
#endif
    } else
      while (std::find(chosen, chosen + j, e) != chosen + j) e++;
    chosen[j] = e;
    v[e] = -INFINITY;
  }
}

// Leaves the groups with the largest sums of their two largest.
void keep_groups(float* v, int64_t E, int64_t groups, int64_t kept, float* sums, int64_t* chosen) {
  const int64_t size = E / groups;
  for (int64_t g = 0; g < up_to(groups, W); g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; g < groups && e < (g + 1) * size; e++) {
      second = std::max(second, std::min(first, v[e]));
      first = std::max(first, v[e]);
    }
    sums[g] = first + second;
  }
  largest(sums, up_to(groups, W), kept, chosen);
  for (int64_t g = 0; g < groups; g++)
    if (std::find(chosen, chosen + kept, g) == chosen + kept)
      for (int64_t e = g * size; e < (g + 1) * size; e++) v[e] = -INFINITY;
}

}  // namespace

extern "C" {

// scores = sigmoid(logits) [T, E]; expert, weight [T, k]. Statistics where `hits` is there, for chunks of up to 64
// tokens of a row of `length`, over tokens with count (all where it is null): `counts` [chunks, E] how often an expert
// was chosen, `hits` how often its share p of the scores is among the k largest, `shares` the sum of p.
void route_forward(const float* logits, const float* bias, const float* count, float* scores, int64_t* expert,
                   float* weight, float* counts, float* hits, float* shares, int64_t T, int64_t E, int64_t k,
                       float scaling,
                   int64_t normalise, int64_t groups, int64_t kept, int64_t length, int64_t threads) {
  const int64_t per_row = length ? (length + CHUNK - 1) / CHUNK : 0, rows = length ? T / length : 0;
  in_team((int)threads, [&](Team team) {
    const int64_t room = up_to(E, W);
    Scratch scratch(2 * (room + W) * sizeof(float) + 2 * (E + k + W) * sizeof(int64_t) + 512);
    float* v = scratch.take<float>(room);
    float* sums = scratch.take<float>(room + W);
    int64_t* chosen = scratch.take<int64_t>(E + k + W);
    auto token = [&](int64_t t, int64_t chunk) {
      float total = 0, *s = scores + t * E;
      for (int64_t e = 0; e < E; e += W) {
        const int n = (int)std::min<int64_t>(W, E - e);
        vf x = n == W ? load(logits + t * E + e) : load_part(logits + t * E + e, n), score = sigmoid(x);
        vf b = n == W ? load(bias + e) : load_part(bias + e, n);
        if (n == W) {
          store(s + e, score);
          store(v + e, score + b);
          total += sum(score);
        } else {
          store_part(s + e, score, n);
          for (int i = 0; i < W; i++) {
            v[e + i] = i < n ? score[i] + b[i] : -INFINITY;
            if (i < n) total += score[i];
          }
        }
      }
      if (groups > 1) keep_groups(v, E, groups, kept, sums, chosen);
      int64_t* mine = expert + t * k;
      largest(v, room, k, mine);
      float norm = 0;
      for (int64_t j = 0; j < k; j++) norm += s[mine[j]];
      norm = normalise ? scaling / (norm + 1e-20f) : scaling;
      for (int64_t j = 0; j < k; j++) weight[t * k + j] = s[mine[j]] * norm;
      const float c = count ? count[t] : 1.f;
      if (chunk < 0 || c == 0) return;
      const float part = c / total;
      for (int64_t e = 0; e < E; e++) {
        shares[chunk * E + e] += s[e] * part;
        v[e] = s[e];
      }
      for (int64_t e = E; e < room; e++) v[e] = -INFINITY;
      largest(v, room, k, chosen);
      for (int64_t j = 0; j < k; j++) {
        counts[chunk * E + mine[j]] += c;
        hits[chunk * E + chosen[j]] += c;
      }
    };
    int64_t first, last;
    if (!hits) {
      team.share(T, 1, first, last);
      for (int64_t t = first; t < last; t++) token(t, -1);
      return;
    }
    team.share(rows * per_row, 1, first, last);
    for (int64_t chunk = first; chunk < last; chunk++) {
      for (float* of : {counts, hits, shares}) memset(of + chunk * E, 0, E * sizeof(float));
      const int64_t row = chunk / per_row, from = chunk % per_row * CHUNK;
      for (int64_t l = from; l < std::min(length, from + CHUNK); l++) token(row * length + l, chunk);
    }
  });
}

// The gradient of logits from dweight [T, k], and from the gradient of every share p, dshares [rows, E] (may be null).
void route_backward(const float* scores, const int64_t* expert, const float* dweight, const float* dshares,
                    const float* count, float* dlogits, int64_t T, int64_t E, int64_t k, float scaling,
                        int64_t normalise,
                    int64_t length, int64_t threads) {
  in_team((int)threads, [&](Team team) {
    int64_t first, last;
    team.share(T, 1, first, last);
    for (int64_t t = first; t < last; t++) {
      const float* s = scores + t * E;
      float* d = dlogits + t * E;
      float total = 0, inner = 0;
      const float c = count ? count[t] : 1.f;
      if (dshares && c != 0) {
        const float* g = dshares + t / length * E;
        for (int64_t e = 0; e < E; e++) {
          total += s[e];
          inner += s[e] * g[e];
        }
        for (int64_t e = 0; e < E; e++) d[e] = (g[e] - inner / total) * (c / total);
      } else {
        for (int64_t e = 0; e < E; e++) d[e] = 0;
      }
      const int64_t* mine = expert + t * k;
      const float* dw = dweight + t * k;
      float norm = 0, dot = 0;
      for (int64_t j = 0; j < k; j++) {
        norm += s[mine[j]];
        dot += dw[j] * s[mine[j]];
      }
      norm += 1e-20f;
      for (int64_t j = 0; j < k; j++) d[mine[j]] += normalise ? scaling * (dw[j] - dot / norm) / norm : scaling * dw[j];
      for (int64_t e = 0; e < E; e++) d[e] *= s[e] * (1 - s[e]);
    }
  });
}

// Copies by expert, in their order: `copy` [S] their flat index, `token` [S], `place` [T k] where a copy went (-1: it
// is not computed), `offsets` [E + 1], and after these into how many parts an expert's work is best cut.
void experts_sort(const int64_t* expert, int32_t* copy, int32_t* token, int32_t* place, int64_t* offsets,
    int64_t copies,
                  int64_t k, int64_t E, int64_t threads) {
  memset(offsets, 0, (E + 2) * sizeof(int64_t));
  for (int64_t j = 0; j < copies; j++)
    if (expert[j] >= 0) offsets[expert[j] + 1]++;
  int64_t most = 0;
  for (int64_t e = 1; e <= E; e++) {
    most = std::max(most, offsets[e]);
    offsets[e] += offsets[e - 1];
  }
  for (int64_t j = 0; j < copies; j++) {
    place[j] = -1;
    if (expert[j] < 0) continue;
    int64_t s = offsets[expert[j]]++;
    place[j] = (int32_t)s;
    copy[s] = (int32_t)j;
    token[s] = (int32_t)(j / k);
  }
  const int64_t S = offsets[E - 1 < 0 ? 0 : E - 1];
  for (int64_t e = E; e > 0; e--) offsets[e] = offsets[e - 1];  // each was moved on to the next one's start
  if (E) offsets[0] = 0;
  offsets[E + 1] = most * threads > S ? threads : 1;
}

#define EXPERTS(suffix, T, V) \
  void experts_forward_##suffix(const T* x, const float* weight, const V* up, const V* down, const int32_t* token, \
                                const int32_t* place, const int64_t* offsets, T* u, float* y_S, T* y, int64_t tokens, \
                                int64_t k, int64_t E, int64_t L, int64_t F, int64_t S, int64_t parts, \
                                    int64_t threads) { \
    forward<T, V>(x, weight, up, down, token, place, offsets, u, y_S, y, Sizes{tokens, k, E, L, F, S, parts}, \
                  (int)threads); \
  } \
  void experts_backward_##suffix(const T* dy, const T* x, const float* weight, const V* up, const V* down, \
                                 const int32_t* token, const int32_t* copy, const int32_t* place, \
                                     const int64_t* offsets, \
                                 const T* u, float* dweight_S, float* dx_S, T* dx, float* dweight, V* dup, V* ddown, \
                                 int64_t tokens, int64_t k, int64_t E, int64_t L, int64_t F, int64_t S, int64_t parts, \
                                 int64_t threads) { \
    backward<T, V>(dy, x, weight, up, down, token, copy, place, offsets, u, dweight_S, dx_S, dx, dweight, dup, ddown, \
                   Sizes{tokens, k, E, L, F, S, parts}, (int)threads); \
  }

EXPERTS(f32, float, float)
EXPERTS(bf16, bf16, bf16)
EXPERTS(master_bf16, bf16, float)

// For tests: whether AMX may be used; returns whether it was there to use.
void tiles_use_amx(int64_t wanted, int64_t) {
#if TILES_AMX
  amx_wanted = wanted;
#endif
}

}  // extern "C"
