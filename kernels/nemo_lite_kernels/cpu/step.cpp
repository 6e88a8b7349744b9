// A whole step of a few tokens through a stack of layers: decoding, and verifying drafts.
//
// x = x + mixer(norm(x)) for every layer, in one parallel region. Activations are float32 throughout; weights are read
// as they are stored. States live in the caller's cache and are read and written there: keys and values in blocks, one
// convolution window and one float32 state a row. A tentative part leaves windows and states alone and keeps what
// `advance` needs to take in the first tokens of each row later. The equations are those of the model's own files.
//
// Shape letters: T tokens of all parts, B rows of a part, L tokens of a row, C channels, H heads, P head size, G groups,
// N state size, E experts, F inner size.
#include <utility>
#include <vector>

#include "linear.h"

struct Vector {
  const char* data;
  int64_t kind;

  float operator[](int64_t i) const { return kind == FLOAT32 ? ((const float*)data)[i] : load1((const bf16*)data + i); }
  vf at(int64_t i, int n) const {
    if (kind == FLOAT32) return n == W ? load((const float*)data + i) : load_part((const float*)data + i, n);
    return n == W ? load((const bf16*)data + i) : load_part((const bf16*)data + i, n);
  }
};

struct Layer {
  int64_t letter;
  float eps, gate_eps, dt_min, dt_max, scaling;
  int32_t normalise;
  Vector norm;
  int64_t heads, head_dim, groups, state, width;  // Mamba; attention: query heads, head size, key/value heads
  int64_t topk, route_groups, topk_groups, experts;
  Weight a, b, c, d;       // Mamba: in, out; attention: q, k, v, o; MoE: router, fc1, fc2, -; MLP: up, down
  Weight e, f, g, h;       // MoE: experts' up and down, shared up and down
  Vector conv, conv_bias, dt_bias, A_log, D, gate_norm, route_bias;
};

struct Part {
  int64_t rows, length, tentative, first, block_size, table_width;
  const int64_t *starts, *slots, *table;  // [rows], [rows], [rows, table_width]
  // By layer: windows [slots, w, C] or keys [blocks, block size, K, D]; states [slots, H, P, N] or values.
  char *const *a_in, *const *b_in, *const *a_out, *const *b_out;
  float* held;  // of a tentative part: by Mamba layer [T, C] before and [T, C] after the convolution, [T, H] of dt
};

enum Letter : int64_t { MAMBA = 'M', ATTENTION = '*', MOE = 'E', MLP = '-' };

namespace {

constexpr int64_t KEYS = 256;  // keys of one piece of attention: fixed, so that sums do not depend on the batch

// Where a step's activations lie. Buffers are reused by every layer.
struct Scratch {
  std::vector<float> floats;
  std::vector<int8_t> bytes;
  std::vector<bf16> halves;
  std::vector<int32_t> ints;
  float* next_float = nullptr;
  int8_t* next_byte = nullptr;
  bf16* next_half = nullptr;
  int32_t* next_int = nullptr;

  // Room for so many floats, bytes and as many halves, and integers; begins again at the front.
  void reserve(int64_t n_floats, int64_t n_bytes, int64_t n_ints) {
    grow(floats, n_floats), grow(bytes, n_bytes), grow(halves, n_bytes), grow(ints, n_ints);
    next_float = floats.data(), next_byte = bytes.data(), next_half = halves.data(), next_int = ints.data();
#if defined(__SANITIZE_ADDRESS__)  // what is read before it is written shows
    std::fill(floats.begin(), floats.end(), NAN);
    std::fill(halves.begin(), halves.end(), bf16{0x7fff});
    std::fill(bytes.begin(), bytes.end(), 77), std::fill(ints.begin(), ints.end(), -1);
#endif
  }
  template <typename T> static void grow(std::vector<T>& v, int64_t n) {
    if ((int64_t)v.size() < n) v.resize(n);
  }
  float* f(int64_t n) { return std::exchange(next_float, next_float + (n + 15) / 16 * 16); }
  Rows rows(int64_t T, int64_t width) {
    Rows r;
    r.width = width;
    r.x = f(T * width);
    r.scale = f(T * (width / 32));
    r.h = std::exchange(next_half, next_half + (T * width + 31) / 32 * 32);
    r.q = std::exchange(next_byte, next_byte + (T * width + 63) / 64 * 64);
    r.total = std::exchange(next_int, next_int + T * (width / 32));
    return r;
  }
};

inline int64_t channels(const Layer& l) { return l.heads * l.head_dim + 2 * l.groups * l.state; }

struct Step {
  const Layer* layers;
  int64_t n_layers, hidden, T, kind;  // kind of windows, keys and values
  float* x;                           // [T, hidden], in and out
  const Part* parts;
  int64_t n_parts;

  Rows normed, wide, latent, inner, shared;
  float *mixed, *weight, *scores, *attended;
  int32_t *all, *expert, *order, *begin;
  int64_t mamba_number;

  // ------------------------------------------------------------------------------------------------------------ pieces

  void norm(Team team, const Layer& l) const {
    const Vector& weight = l.norm;
    for (int64_t t = team.id; t < T; t += team.size) {
      const float* in = x + t * hidden;
      float* out = normed.x + t * hidden;
      vf squares = zero();
      int64_t i = 0;
      for (; i + W <= hidden; i += W) squares += load(in + i) * load(in + i);
      if (i < hidden) squares += load_part(in + i, (int)(hidden - i)) * load_part(in + i, (int)(hidden - i));
      float scale = 1.f / std::sqrt(sum(squares) / (float)hidden + l.eps);
      for (i = 0; i + W <= hidden; i += W) store(out + i, load(in + i) * scale * weight.at(i, W));
      if (i < hidden) {
        int n = (int)(hidden - i);
        store_part(out + i, load_part(in + i, n) * scale * weight.at(i, n), n);
      }
      // In every form that one of the layer's weights asks for.
      const Weight* readers[] = {&l.a, &l.b, &l.g, &l.e};
      const int count = l.letter != MOE ? 1 : l.b.rows ? 3 : 4;  // behind a latent the experts read that
      bool rounded = false, quantized = false;
      for (int i = 0; i < count; i++) {
        const Weight& w = *readers[i];
        bool& done = w.packed() ? quantized : rounded;
        if (w.rows && w.rounds() && !std::exchange(done, true)) normed.prepare(t, w);
      }
    }
    team.barrier();
  }

  // out[t, row] = w x: this thread's rows.
  void linear(Team team, const Weight& w, const Rows& in, float* out, int64_t ld) const {
    int64_t first, last;
    team.share(w.rows, PANEL, first, last);
    product(w, in, all, T, first, last, [&](int64_t t, int64_t row, const float* y, int n) {
      memcpy(out + t * ld + row, y, n * sizeof(float));
    });
  }

  void linear_squared_relu(Team team, const Weight& w, const Rows& in, float* out, int64_t ld) const {
    int64_t first, last;
    team.share(w.rows, PANEL, first, last);
    product(w, in, all, T, first, last, [&](int64_t t, int64_t row, const float* y, int n) {
      for (int i = 0; i < n; i++) {
        float u = y[i] > 0 ? y[i] : 0;
        out[t * ld + row + i] = u * u;
      }
    });
  }

  void add_linear(Team team, const Weight& w, const Rows& in) const {
    int64_t first, last;
    team.share(w.rows, PANEL, first, last);
    product(w, in, all, T, first, last, [&](int64_t t, int64_t row, const float* y, int n) {
      for (int i = 0; i < n; i++) x[t * hidden + row + i] += y[i];
    });
  }

  // Every thread's part of `in` is there; and in the form that w multiplies with.
  void ready(Team team, const Rows& in, const Weight& w) const {
    team.barrier();
    if (!w.rounds()) return;
    for (int64_t t = team.id; t < T; t += team.size) in.prepare(t, w);
    team.barrier();
  }

  // ------------------------------------------------------------------------------------------------------------- Mamba

  template <typename S> void convolve(Team team, const Layer& l, const Part& part, int64_t t0, int index) const {
    const int64_t C = channels(l), w = l.width - 1, total = wide.width, inner_size = l.heads * l.head_dim;
    int64_t first, last;
    team.share(C, 16, first, last);
    std::vector<vf> taps(l.width);
    lanes(last - first, [&](int64_t offset, auto lane) {
      const int64_t c = first + offset;
      for (int64_t k = 0; k <= w; k++)
        for (int64_t i = 0; i < std::min<int64_t>(W, last - c); i++) taps[k][i] = l.conv[(c + i) * l.width + k];
      const vf bias = l.conv_bias.at(c, (int)std::min<int64_t>(W, last - c));
      for (int64_t b = 0; b < part.rows; b++) {
        const S* window = (const S*)part.a_in[index] + part.slots[b] * w * C + c;
        float* row = wide.x + (t0 + b * part.length) * total + inner_size + c;  // x, B, C of the row's first token
        float* out = mixed + (t0 + b * part.length) * C + c;
        for (int64_t j = 0; j < part.length; j++) {
          if (sizeof(S) < 4) {  // as the window will keep it, so that verifying sees what decoding would
            bf16 narrow[W];
            put(narrow, get(row + j * total, lane), lane);
            put(row + j * total, get(narrow, lane), lane);
          }
          vf y = bias;
          for (int64_t k = 0; k <= w; k++) {
            const int64_t at = j + k - w;
            y += taps[k] * (at < 0 ? get(window + (at + w) * C, lane) : get(row + at * total, lane));
          }
          put(out + j * C, silu(y), lane);
        }
      }
    });
    for (int64_t b = 0; b < part.rows; b++) {
      const S* window = (const S*)part.a_in[index] + part.slots[b] * w * C;
      S* after = (S*)part.a_out[index] + part.slots[b] * w * C;
      const float* row = wide.x + (t0 + b * part.length) * total + inner_size;
      const float* out = mixed + (t0 + b * part.length) * C;
      if (part.tentative) {
        float* kept = part.held + mamba_number * (part.rows * part.length) * (2 * C + l.heads) + b * part.length * C;
        for (int64_t j = 0; j < part.length; j++) {
          memcpy(kept + j * C + first, row + j * total + first, (last - first) * 4);
          memcpy(kept + (part.rows * part.length + j) * C + first, out + j * C + first, (last - first) * 4);
        }
      } else {
        shift_window(window, after, row, total, part.length, w, C, first, last);
      }
    }
  }

  // after = the last w of (window, `count` rows of x); they may be the same memory.
  template <typename S>
  static void shift_window(const S* window, S* after, const float* x, int64_t ldx, int64_t count, int64_t w, int64_t C,
                           int64_t first, int64_t last) {
    for (int64_t k = 0; k < w; k++) {
      int64_t at = k + count - w;
      for (int64_t c = first; c < last; c++) {
        if (at < 0) after[k * C + c] = window[(at + w) * C + c];
        else store1(after + k * C + c, x[at * ldx + c]);
      }
    }
  }

  static float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

  void scan(Team team, const Layer& l, const Part& part, int64_t t0, int index) const {
    const int64_t C = channels(l), P = l.head_dim, N = l.state, inner_size = l.heads * P, total = wide.width;
    const int64_t L = part.length, T_part = part.rows * L;
    int64_t first, last;
    team.share(part.rows * l.heads, 1, first, last);
    std::vector<float> dt(L), decay(L), row(N);
    for (int64_t unit = first; unit < last; unit++) {
      int64_t b = unit / l.heads, h = unit % l.heads, g = h / (l.heads / l.groups), t = t0 + b * L;
      float A = -std::exp(l.A_log[h]), skip = l.D[h];
      for (int64_t j = 0; j < L; j++) {
        float raw = wide.x[(t + j) * total + total - l.heads + h] + l.dt_bias[h];
        dt[j] = std::min(std::max(softplus(raw), l.dt_min), l.dt_max);
        decay[j] = std::exp(dt[j] * A);
        if (part.tentative)
          part.held[mamba_number * T_part * (2 * C + l.heads) + 2 * T_part * C + (b * L + j) * l.heads + h] = dt[j];
      }
      int64_t at = (part.slots[b] * l.heads + h) * P * N;
      const float* state = (const float*)part.b_in[index] + at;
      float* after = part.tentative ? nullptr : (float*)part.b_out[index] + at;
      const float* xbc = mixed + t * C;
      float* y = attended + t * inner_size + h * P;
      update(state, after, xbc + h * P, xbc + inner_size + g * N, xbc + inner_size + (l.groups + g) * N, dt.data(),
             decay.data(), y, skip, L, P, N, C, inner_size, row.data());
    }
  }

  // h = decay h + dt x B^T;  y = h C + D x: L tokens of one head. `after` may be `state`, or null (outputs only); without
  // y, states only. Never inlined: compiled once, it rounds alike when tokens are decoded and when they are taken in.
  __attribute__((noinline)) static void update(const float* state, float* after, const float* x, const float* b, const float* c, const float* dt,
                     const float* decay, float* y, float skip, int64_t L, int64_t P, int64_t N, int64_t ld, int64_t ldy,
                     float* row) {
    for (int64_t p = 0; p < P; p++) {
      memcpy(row, state + p * N, N * 4);
      for (int64_t j = 0; j < L; j++) {
        const float *bj = b + j * ld, *cj = c + j * ld;
        float xdt = x[j * ld + p] * dt[j];
        vf total = zero();
        int64_t n = 0;
        for (; n + W <= N; n += W) {
          vf h = load(row + n) * decay[j] + load(bj + n) * xdt;
          store(row + n, h);
          total += h * load(cj + n);
        }
        float tail = 0;
        for (; n < N; n++) {
          row[n] = row[n] * decay[j] + bj[n] * xdt;
          tail += row[n] * cj[n];
        }
        if (y) y[j * ldy + p] = sum(total) + tail + skip * x[j * ld + p];
      }
      if (after) memcpy(after + p * N, row, N * 4);
    }
  }

  void gate(Team team, const Layer& l, const Rows& out) const {
    const int64_t inner_size = l.heads * l.head_dim, size = inner_size / l.groups, total = wide.width;
    int64_t first, last;
    team.share(T * l.groups, 1, first, last);
    for (int64_t unit = first; unit < last; unit++) {
      int64_t t = unit / l.groups, at = unit % l.groups * size;
      const float *y = attended + t * inner_size + at, *z = wide.x + t * total + at;
      float* o = out.x + t * inner_size + at;
      vf squares = zero();
      int64_t i = 0;
      for (; i + W <= size; i += W) {
        vf v = load(y + i) * silu(load(z + i));
        store(o + i, v);
        squares += v * v;
      }
      if (i < size) {
        int n = (int)(size - i);
        vf v = load_part(y + i, n) * silu(load_part(z + i, n));
        store_part(o + i, v, n);
        squares += v * v;
      }
      float scale = 1.f / std::sqrt(sum(squares) / (float)size + l.gate_eps);
      for (i = 0; i + W <= size; i += W) store(o + i, load(o + i) * scale * l.gate_norm.at(at + i, W));
      if (i < size) {
        int n = (int)(size - i);
        store_part(o + i, load_part(o + i, n) * scale * l.gate_norm.at(at + i, n), n);
      }
    }
  }

  void mamba(Team team, const Layer& l, int index) const {
    linear(team, l.a, normed, wide.x, wide.width);
    team.barrier();
    int64_t t0 = 0;
    for (int64_t p = 0; p < n_parts; t0 += parts[p].rows * parts[p].length, p++) {
      if (kind == FLOAT32) convolve<float>(team, l, parts[p], t0, index);
      else convolve<bf16>(team, l, parts[p], t0, index);
    }
    team.barrier();
    t0 = 0;
    for (int64_t p = 0; p < n_parts; t0 += parts[p].rows * parts[p].length, p++) scan(team, l, parts[p], t0, index);
    team.barrier();
    Rows in = inner;
    in.width = l.heads * l.head_dim;
    gate(team, l, in);
    ready(team, in, l.b);
    add_linear(team, l.b, in);
  }

  // --------------------------------------------------------------------------------------------------------- attention

  // Outputs n of a key or value projection at token t into the cache.
  template <typename S>
  void cache(const Layer& l, char* const* into(const Part&), int index, int64_t t, int64_t row, const float* y, int n) const {
    int64_t t0 = 0, p = 0;
    while (t >= t0 + parts[p].rows * parts[p].length) t0 += parts[p].rows * parts[p].length, p++;
    const Part& part = parts[p];
    int64_t b = (t - t0) / part.length, place = part.first + part.starts[b] + (t - t0) % part.length;
    int64_t block = part.table[b * part.table_width + place / part.block_size];
    S* out = (S*)into(part)[index] + (block * part.block_size + place % part.block_size) * l.groups * l.head_dim + row;
    for (int i = 0; i < n; i++) store1(out + i, y[i]);
  }

  void project_keys(Team team, const Layer& l, const Weight& w, char* const* into(const Part&), int index) const {
    int64_t first, last;
    team.share(w.rows, PANEL, first, last);
    product(w, normed, all, T, first, last, [&](int64_t t, int64_t row, const float* y, int n) {
      if (kind == FLOAT32) cache<float>(l, into, index, t, row, y, n);
      else cache<bf16>(l, into, index, t, row, y, n);
    });
  }

  // One piece of at most KEYS keys, for the queries of one row and key/value head: out [queries, 2 + D] = the maximum
  // score, the sum of exponentials, and the sum of values.
  template <typename S>
  void attend(const Layer& l, const Part& part, int64_t t, int64_t b, int64_t head, int64_t piece, int index, float* out,
              float* s) const {
    const int64_t D = l.head_dim, K = l.groups, r = l.heads / K, L = part.length, size = part.block_size;
    const int64_t from = part.first + piece * KEYS, to = std::min(from + KEYS, part.first + part.starts[b] + L);
    const float scale = 1.f / std::sqrt((float)D);
    for (int64_t key = from; key < to;) {
      int64_t block_at = part.table[b * part.table_width + key / size];
      int64_t n = std::min(to, (key / size + 1) * size) - key;
      const S* k = (const S*)part.a_out[index] + ((block_at * size + key % size) * K + head) * D;
      constexpr int R = MANY_STREAMS, M = tile_tokens(R);
      int64_t ahead[R];
      std::fill(ahead, ahead + R, R * K * D * (int64_t)sizeof(S));
      for (int64_t i = 0; i < L * r; i += M) {
        const float* q[M];
        int m = (int)std::min<int64_t>(M, L * r - i);
        for (int j = 0; j < M; j++) {
          int64_t query = i + std::min(j, m - 1);
          q[j] = wide.x + (t + query / r) * wide.width + (head * r + query % r) * D;
        }
        for (int64_t c = 0; c < n; c += R) {
          float y[M][R];
          const S* rows[R];
          for (int64_t one = 0; one < R; one++) rows[one] = k + std::min(c + one, n - 1) * K * D;
          block<R, M>(q, rows, D, ahead, y);
          for (int j = 0; j < m; j++)
            for (int64_t one = 0; one < std::min<int64_t>(R, n - c); one++)
              s[(i + j) * KEYS + key - from + c + one] = y[j][one] * scale;
        }
      }
      key += n;
    }
    for (int64_t i = 0; i < L * r; i++) {
      float *o = out + i * (2 + D), *e = s + i * KEYS;
      int64_t visible = std::min(to, part.first + part.starts[b] + i / r + 1) - from;
      float most = -INFINITY;
      for (int64_t c = 0; c < visible; c++) most = std::max(most, e[c]);
      vf total = zero();
      lanes(std::max<int64_t>(visible, 0), [&](int64_t c, auto lane) {
        vf weight = vexp(get(e + c, lane) - most);
        put(e + c, weight, lane);
        total += get(e + c, lane);
      });
      for (int64_t c = std::max<int64_t>(visible, 0); c < to - from; c++) e[c] = 0;
      o[0] = most, o[1] = sum(total);
      std::fill(o + 2, o + 2 + D, 0.f);
    }
    for (int64_t key = from; key < to;) {
      int64_t block_at = part.table[b * part.table_width + key / size];
      int64_t n = std::min(to, (key / size + 1) * size) - key;
      const S* v = (const S*)part.b_out[index] + ((block_at * size + key % size) * K + head) * D;
      for (int64_t i = 0; i < L * r; i++) {
        float *o = out + i * (2 + D) + 2, *e = s + i * KEYS + key - from;
        lanes(D, [&](int64_t d, auto lane) {
          vf y = get(o + d, lane);
          for (int64_t c = 0; c < n; c++) y += get(v + c * K * D + d, lane) * e[c];
          put(o + d, y, lane);
        });
      }
      key += n;
    }
  }

  void attention(Team team, const Layer& l, int index) const {
    const int64_t D = l.head_dim, K = l.groups, r = l.heads / K;
    linear(team, l.a, normed, wide.x, wide.width);
    project_keys(team, l, l.b, [](const Part& p) { return p.a_out; }, index);
    project_keys(team, l, l.c, [](const Part& p) { return p.b_out; }, index);
    team.barrier();
    // Pieces of all rows and heads are counted through and shared out; then each query's pieces are put together.
    int64_t t = 0, unit = 0;
    float* out = scores;
    std::vector<float> s;
    for (int64_t p = 0; p < n_parts; p++)
      for (int64_t b = 0; b < parts[p].rows; b++, t += parts[p].length) {
        int64_t pieces = (parts[p].starts[b] + parts[p].length + KEYS - 1) / KEYS, queries = parts[p].length * r;
        s.resize(std::max<size_t>(s.size(), queries * KEYS));
        for (int64_t head = 0; head < K; head++)
          for (int64_t piece = 0; piece < pieces; piece++, unit++, out += queries * (2 + D)) {
            if (unit % team.size != team.id) continue;
            if (kind == FLOAT32) attend<float>(l, parts[p], t, b, head, piece, index, out, s.data());
            else attend<bf16>(l, parts[p], t, b, head, piece, index, out, s.data());
          }
      }
    team.barrier();
    Rows in = inner;
    in.width = l.heads * D;
    out = scores, t = 0, unit = 0;
    for (int64_t p = 0; p < n_parts; p++)
      for (int64_t b = 0; b < parts[p].rows; b++, t += parts[p].length) {
        int64_t pieces = (parts[p].starts[b] + parts[p].length + KEYS - 1) / KEYS, queries = parts[p].length * r;
        for (int64_t head = 0; head < K; head++, out += pieces * queries * (2 + D))
          for (int64_t i = 0; i < queries; i++, unit++) {
            if (unit % team.size != team.id) continue;
            float* y = in.x + (t + i / r) * in.width + (head * r + i % r) * D;
            float most = -INFINITY, total = 0;
            for (int64_t piece = 0; piece < pieces; piece++) most = std::max(most, out[(piece * queries + i) * (2 + D)]);
            std::fill(y, y + D, 0.f);
            for (int64_t piece = 0; piece < pieces; piece++) {
              const float* o = out + (piece * queries + i) * (2 + D);
              float share = std::exp(o[0] - most);
              total += share * o[1];
              for (int64_t d = 0; d < D; d++) y[d] += share * o[2 + d];
            }
            for (int64_t d = 0; d < D; d++) y[d] /= total;
          }
      }
    ready(team, in, l.d);
    add_linear(team, l.d, in);
  }

  // --------------------------------------------------------------------------------------------------------------- MoE

  // The chosen experts and weights of token t, from its logits in `scores`.
  void route(const Layer& l, int64_t t) const {
    const int64_t E = l.experts, k = l.topk, per = E / l.route_groups;
    float *s = scores + t * E, *w = weight + t * k;
    int32_t* chosen = expert + t * k;
    std::vector<float> biased(E);
    for (int64_t e = 0; e < E; e++) {
      s[e] = 1.f / (1.f + std::exp(-s[e]));
      biased[e] = s[e] + l.route_bias[e];
    }
    if (l.route_groups > 1) {
      std::vector<float> best(l.route_groups);
      for (int64_t g = 0; g < l.route_groups; g++) {
        float a = -INFINITY, b = -INFINITY;
        for (int64_t e = g * per; e < (g + 1) * per; e++) {
          if (biased[e] > a) b = a, a = biased[e];
          else b = std::max(b, biased[e]);
        }
        best[g] = a + b;
      }
      std::vector<char> keep(l.route_groups, 0);
      for (int64_t i = 0; i < l.topk_groups; i++) {
        int64_t g = std::max_element(best.begin(), best.end()) - best.begin();
        keep[g] = 1, best[g] = -INFINITY;
      }
      for (int64_t e = 0; e < E; e++)
        if (!keep[e / per]) biased[e] = -INFINITY;
    }
    float total = 0;
    for (int64_t i = 0; i < k; i++) {
      int64_t e = std::max_element(biased.begin(), biased.end()) - biased.begin();
      biased[e] = -INFINITY;
      chosen[i] = (int32_t)e, w[i] = s[e];
      total += s[e];
    }
    float scale = l.scaling / (l.normalise ? total + 1e-20f : 1.f);
    for (int64_t i = 0; i < k; i++) w[i] *= scale;
  }

  // Copies of tokens sorted by expert: order [T k] holds token * k + slot, begin [E + 1] where an expert's start.
  void sort(const Layer& l) const {
    std::fill(begin, begin + l.experts + 1, 0);
    for (int64_t i = 0; i < T * l.topk; i++) begin[expert[i] + 1]++;
    for (int64_t e = 0; e < l.experts; e++) begin[e + 1] += begin[e];
    std::vector<int32_t> at(begin, begin + l.experts);
    for (int64_t i = 0; i < T * l.topk; i++) order[at[expert[i]]++] = (int32_t)i;
  }

  void moe(Team team, const Layer& l, int index) const {
    const int64_t k = l.topk, E = l.experts, L = l.e.cols, F = l.e.rows;
    const bool has_latent = l.b.rows > 0, has_shared = l.g.rows > 0;
    Rows in = has_latent ? latent : normed, h = wide, y = inner, s = shared;
    in.width = L, h.width = F, y.width = L, s.width = l.g.rows;
    linear(team, l.a, normed, scores, E);
    if (has_latent) linear(team, l.b, normed, in.x, L);
    if (has_shared) linear_squared_relu(team, l.g, normed, s.x, s.width);
    team.barrier();
    for (int64_t t = team.id; t < T; t += team.size) {
      route(l, t);
      if (has_latent) in.prepare(t, l.e);
      if (has_shared) s.prepare(t, l.h);
    }
    team.barrier();
    if (team.id == 0) sort(l);
    team.barrier();
    // Every expert's rows are shared out, not the experts: both threads read all of them, each half.
    int64_t first, last;
    team.share(F, PANEL, first, last);
    std::vector<int32_t> tokens(T * k);
    for (int64_t i = 0; i < T * k; i++) tokens[i] = (int32_t)(order[i] / k);
    for (int64_t e = 0; e < E; e++) {
      int32_t from = begin[e], n = begin[e + 1] - from;
      if (!n) continue;
      product(l.e.at(e), in, tokens.data() + from, n, first, last, [&](int64_t i, int64_t row, const float* v, int count) {
        for (int c = 0; c < count; c++) {
          float u = v[c] > 0 ? v[c] : 0;
          h.x[(from + i) * F + row + c] = u * u;
        }
      });
    }
    team.barrier();
    if (l.f.rounds()) {
      for (int64_t i = team.id; i < T * k; i += team.size) h.prepare(i, l.f);
      team.barrier();
    }
    team.share(L, PANEL, first, last);
    for (int64_t t = 0; t < T; t++) std::fill(y.x + t * L + first, y.x + t * L + last, 0.f);
    for (int64_t e = 0; e < E; e++) {
      int32_t from = begin[e], n = begin[e + 1] - from;
      if (!n) continue;
      product(l.f.at(e), h, all + from, n, first, last, [&](int64_t i, int64_t row, const float* v, int count) {
        float* out = y.x + tokens[from + i] * L + row;
        float w = weight[order[from + i]];
        for (int c = 0; c < count; c++) out[c] += w * v[c];
      });
    }
    if (has_latent) {
      ready(team, y, l.c);
      add_linear(team, l.c, y);
    } else {
      for (int64_t t = 0; t < T; t++)
        for (int64_t i = first; i < last; i++) x[t * hidden + i] += y.x[t * L + i];
      team.barrier();
    }
    if (has_shared) {
      if (!has_latent) team.barrier();
      add_linear(team, l.h, s);
    }
  }

  void mlp(Team team, const Layer& l) const {
    Rows in = wide;
    in.width = l.a.rows;
    linear_squared_relu(team, l.a, normed, in.x, in.width);
    ready(team, in, l.b);
    add_linear(team, l.b, in);
  }

  void run(Team team) {
    Tiles tiles;
    int64_t number = 0;
    for (int64_t i = 0; i < n_layers; i++) {
      const Layer& l = layers[i];
      norm(team, l);
      if (l.letter == MAMBA) {
        Step own = *this;  // the number is each thread's own
        own.mamba_number = number++;
        own.wide.width = l.a.rows;
        own.mamba(team, l, (int)i);
      } else if (l.letter == ATTENTION) {
        Step own = *this;
        own.wide.width = l.a.rows;
        own.attention(team, l, (int)i);
      } else if (l.letter == MOE) moe(team, l, (int)i);
      else mlp(team, l);
      team.barrier();
    }
  }
};

}  // namespace

// Through `layers`; x [T, hidden] in place. kind: 0 where the cache is float32, 1 bfloat16.
extern "C" void step(const Layer* layers, int64_t n_layers, int64_t hidden, int64_t kind, float* x, int64_t T,
                     const Part* parts, int64_t n_parts, int64_t threads) {
  thread_local Scratch scratch;
  int64_t wide = 1, latent = 1, inner = 1, shared = 1, scores = 1, mixed = 1, attended = 1, k = 1, E = 0, copies = 1;
  for (int64_t i = 0; i < n_layers; i++) {
    const Layer& l = layers[i];
    if (l.letter == MAMBA) {
      wide = std::max(wide, l.a.rows), mixed = std::max(mixed, channels(l));
      attended = std::max(attended, l.heads * l.head_dim), inner = std::max(inner, l.heads * l.head_dim);
    } else if (l.letter == ATTENTION) {
      wide = std::max(wide, l.a.rows), inner = std::max(inner, l.a.rows);
      int64_t most = 0;
      for (int64_t p = 0; p < n_parts; p++)
        for (int64_t b = 0; b < parts[p].rows; b++)
          most += (parts[p].starts[b] + parts[p].length + KEYS - 1) / KEYS * parts[p].length * l.heads * (2 + l.head_dim);
      scores = std::max(scores, most);
    } else if (l.letter == MOE) {
      k = std::max(k, l.topk), E = std::max(E, l.experts), copies = std::max(copies, l.topk);
      wide = std::max(wide, l.topk * l.e.rows), latent = std::max(latent, l.e.cols), inner = std::max(inner, l.e.cols);
      shared = std::max(shared, l.g.rows), scores = std::max(scores, T * l.experts);
    } else wide = std::max(wide, l.a.rows);
  }
  auto up = [](int64_t n) { return (n + 31) / 32 * 32; };
  wide = up(wide), latent = up(latent), inner = up(inner), shared = up(shared);
  int64_t all = wide + latent + inner + shared + up(hidden);
  scratch.reserve(T * (all + all / 32 + mixed + attended + k) + scores + 16 * 16, T * all + 64 * 8,
                  T * (all / 32 + 3 * k) + E + 64);

  Step s{layers, n_layers, hidden, T, kind, x, parts, n_parts, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, 0};
  s.normed = scratch.rows(T, up(hidden));
  s.normed.width = hidden;
  s.wide = scratch.rows(T, wide), s.latent = scratch.rows(T, latent);
  s.inner = scratch.rows(T, inner), s.shared = scratch.rows(T, shared);
  s.mixed = scratch.f(T * mixed), s.attended = scratch.f(T * attended);
  s.weight = scratch.f(T * k), s.scores = scratch.f(scores);
  auto ints = [&](int64_t n) { return std::exchange(scratch.next_int, scratch.next_int + n); };
  s.all = ints(T * k), s.expert = ints(T * k), s.order = ints(T * k), s.begin = ints(E + 1);
  for (int64_t i = 0; i < T * k; i++) s.all[i] = (int32_t)i;
  in_team((int)threads, [&](Team team) {
    Step own = s;
    own.run(team);
  });
}

// Take in the first counts[b] >= 0 tokens of each row of a tentative part: windows and states of all Mamba layers.
extern "C" void advance(const Layer* layers, int64_t n_layers, int64_t kind, const Part* part, const int64_t* counts,
                        int64_t threads) {
  in_team((int)threads, [&](Team team) {
    const int64_t L = part->length, T = part->rows * L;
    const float* held = part->held;
    for (int64_t i = 0; i < n_layers; i++) {
      const Layer& l = layers[i];
      if (l.letter != MAMBA) continue;
      const int64_t C = channels(l), w = l.width - 1, P = l.head_dim, N = l.state, inner = l.heads * P;
      int64_t first, last;
      team.share(C, 16, first, last);
      for (int64_t b = 0; b < part->rows; b++) {
        int64_t at = part->slots[b] * w * C;
        const float* x = held + b * L * C;
        if (kind == FLOAT32)
          Step::shift_window((const float*)part->a_in[i] + at, (float*)part->a_out[i] + at, x, C, counts[b], w, C, first, last);
        else
          Step::shift_window((const bf16*)part->a_in[i] + at, (bf16*)part->a_out[i] + at, x, C, counts[b], w, C, first, last);
      }
      team.share(part->rows * l.heads, 1, first, last);
      std::vector<float> row(N), dt(L), decay(L);
      for (int64_t unit = first; unit < last; unit++) {
        int64_t b = unit / l.heads, h = unit % l.heads, g = h / (l.heads / l.groups);
        float A = -std::exp(l.A_log[h]);
        for (int64_t j = 0; j < L; j++) {
          dt[j] = held[2 * T * C + (b * L + j) * l.heads + h];
          decay[j] = std::exp(dt[j] * A);
        }
        int64_t at = (part->slots[b] * l.heads + h) * P * N;
        const float* xbc = held + T * C + b * L * C;
        Step::update((const float*)part->b_in[i] + at, (float*)part->b_out[i] + at, xbc + h * P, xbc + inner + g * N, xbc,
                     dt.data(), decay.data(), nullptr, 0, counts[b], P, N, C, 0, row.data());
      }
      held += T * (2 * C + l.heads);
    }
  });
}

// y [M, N] = x [M, K] w^T with x and y float32 or bfloat16 (0, 1).
extern "C" void few_rows(const Weight* w, const void* x, int64_t x_kind, void* y, int64_t y_kind, int64_t M,
                         int64_t threads) {
  thread_local Scratch scratch;
  int64_t K = w->cols;
  scratch.reserve(M * (K + K / 32 + 1) + 64, M * K + 64, M * (K / 32 + 2) + 64);
  Rows in = scratch.rows(M, K);
  int32_t* all = scratch.next_int;
  for (int64_t m = 0; m < M; m++) all[m] = (int32_t)m;
  if (x_kind == FLOAT32) in.x = (float*)x;
  else
    for (int64_t i = 0; i < M * K; i++) in.x[i] = load1((const bf16*)x + i);
  for (int64_t m = 0; m < M; m++) in.prepare(m, *w);
  in_team(M * K * w->rows < 1 << 15 ? 1 : (int)threads, [&](Team team) {
    Tiles tiles;
    int64_t first, last;
    team.share(w->rows, PANEL, first, last);
    product(*w, in, all, M, first, last, [&](int64_t m, int64_t row, const float* v, int n) {
      if (y_kind == FLOAT32) memcpy((float*)y + m * w->rows + row, v, n * 4);
      else
        for (int i = 0; i < n; i++) store1((bf16*)y + m * w->rows + row + i, v[i]);
    });
  });
}
