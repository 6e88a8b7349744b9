// Number formats: NVFP4, MXFP8 and FP8 codes and what they stand for, in the order of operations of quant.py, whose
// reference this equals bit for bit. A row, or a tile of tokens, is widened to floats in the first-level cache; its
// blocks' magnitudes, scales and codes follow from there.
#include <cmath>
#include <type_traits>
#include <vector>
#include "team.h"
#include "vec.h"

namespace {

enum Scheme { NVFP4, MXFP8, FP8, FP8_BLOCK };
constexpr float LARGEST_FLOAT = 3.4028234663852886e38f;
constexpr uint32_t INFINITE = 0x7f800000, SIGN = 0x80000000;

template <int MANTISSA, int LEAST, int LARGEST, int BITS> struct Element {
  static constexpr int mantissa = MANTISSA, least = LEAST, bits = BITS;
  static constexpr float largest = LARGEST;
};
using E2M1 = Element<1, 0, 6, 4>;
using E4M3 = Element<3, -6, 448, 8>;
using E5M2 = Element<2, -14, 57344, 8>;

INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
INLINE vi ints(int32_t x) { return x - (vi){}; }

// The value and the code of v: to the nearest, ties to even; or up where the place between two neighbours exceeds
// (random + 1/2) / 2^16.
template <typename E, bool STOCHASTIC> INLINE vf round_to(vf v, vi random, vi& code) {
  vi sign = (vi)v & (int32_t)SIGN;
  vf size = vmin((vf)((vi)v & 0x7fffffff), set(E::largest));
  vi e = larger((vi)size >> 23, ints(127 + E::least));
  vf units = size * (vf)((254 + E::mantissa - e) << 23);
  vi n;
  if constexpr (STOCHASTIC) {
    n = __builtin_convertvector(units, vi);
    vf place = (units - __builtin_convertvector(n, vf)) * 65536.f;
    vf bar = __builtin_convertvector(random, vf) + 0.5f;
    n -= place > bar;
  } else {
    n = (vi)(units + 12582912.f) - 0x4b400000;
  }
  code = (((e - (127 + E::least)) << E::mantissa) + n) | (vi)((vu)sign >> (32 - E::bits));
  return (vf)((vi)(__builtin_convertvector(n, vf) * (vf)((e - E::mantissa) << 23)) | sign);
}

// ---- random numbers: Philox4x32-7 for W counters at a time

INLINE void philox(const uint64_t* counter, uint64_t seed, uint32_t out[4][W]) {
  uint32_t a[W], b[W], c[W] = {}, d[W] = {};
  for (int l = 0; l < W; l++) a[l] = (uint32_t)counter[l], b[l] = (uint32_t)(counter[l] >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 7; round++) {
    for (int l = 0; l < W; l++) {
      uint64_t p = (uint64_t)a[l] * 0xD2511F53u, q = (uint64_t)c[l] * 0xCD9E8D57u;
      uint32_t first = (uint32_t)(q >> 32) ^ b[l] ^ k0, third = (uint32_t)(p >> 32) ^ d[l] ^ k1;
      b[l] = (uint32_t)q, d[l] = (uint32_t)p, a[l] = first, c[l] = third;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  memcpy(out[0], a, sizeof a), memcpy(out[1], b, sizeof b), memcpy(out[2], c, sizeof c), memcpy(out[3], d, sizeof d);
}

// Random half words of elements [first, first + n) into `out`, which has room for W * 8 more; where element `first` is.
inline const uint16_t* half_words(int64_t first, int64_t n, uint64_t seed, uint16_t* out) {
  int64_t from = first / 8, to = (first + n + 7) / 8;
  uint32_t words[4][W];
  uint64_t counter[W];
  for (int64_t at = from; at < to; at += W) {
    for (int l = 0; l < W; l++) counter[l] = at + l;
    philox(counter, seed, words);
    uint32_t* to_words = (uint32_t*)(out + (at - from) * 8);
    for (int l = 0; l < W; l++)
      for (int w = 0; w < 4; w++) to_words[4 * l + w] = words[w][l];
  }
  return out + first % 8;
}

// ---- scales of W blocks: what elements are multiplied by, what codes are multiplied by, and the scale's own code

struct Tensor {
  float s6, inverse, step;  // NVFP4: S/6 and 1/S; FP8: S
  bool finite;
};

template <typename E> Tensor tensor_of(int scheme, float amax, bool finite, float& tensor_scale) {
  Tensor t = {0, 0, 1, finite};
  float largest = scheme == NVFP4 ? 448.f * 6.f : E::largest;
  if (amax > 0) t.step = std::fmin(largest / amax, LARGEST_FLOAT);
  if (!(t.step > 0)) t.step = 1;
  t.inverse = 1.f / t.step;
  t.s6 = t.step * (1.f / 6.f);
  tensor_scale = finite ? (scheme == NVFP4 ? amax / largest : t.inverse) : NAN;
  return t;
}

template <typename E, int SCHEME> INLINE vi scales_of(vf a, const Tensor& t, vf& factor, vf& scale) {
  vi code = {};
  if constexpr (SCHEME == NVFP4) {
    if (!t.finite) a = zero();
    scale = round_to<E4M3, false>(vmin(a * t.s6, set(448.f)), vi{}, code);
    factor = t.finite ? vmin(1.f / (scale * t.inverse), set(LARGEST_FLOAT)) : zero();
  } else if constexpr (SCHEME == MXFP8) {
    vi bits = (vi)vmax(a * (1.f / E::largest), set(5.877471754e-39f));
    code = bits <= 0x400000 ? ints(0) : larger((bits + 0x7fffff) >> 23, ints(1));
    scale = (vf)(code == 0 ? ints(0x400000) : code << 23);
    factor = (vf)((254 - code) << 23);
    code = (vi)a >= (int32_t)INFINITE ? ints(0xff) : code;
  } else if constexpr (SCHEME == FP8_BLOCK) {
    factor = a > 0.f ? vmin(E::largest / a, set(LARGEST_FLOAT)) : set(1.f);
    factor = (vf)((vi)factor & (int32_t)INFINITE);
    scale = 1.f / factor;
  } else {
    factor = set(t.finite ? t.step : 0.f), scale = set(1.f);
  }
  if constexpr (SCHEME == MXFP8 || SCHEME == FP8_BLOCK) {
    vi bad = (vi)a >= (int32_t)INFINITE;
    scale = bad ? set(NAN) : scale;
    factor = bad ? zero() : factor;
  }
  return code;
}

template <int SCHEME> INLINE void store_scale(void* at, int64_t i, float scale, int32_t code) {
  if constexpr (SCHEME == FP8_BLOCK)
    ((float*)at)[i] = scale;
  else
    ((uint8_t*)at)[i] = (uint8_t)code;
}

// 16 numbers times H: signs, then sums and differences. V: one of them, or W at a time.
template <typename V> INLINE void hadamard(V y[16]) {
  constexpr uint32_t minus = 0xD7E8;  // bit i: the sign of i
  for (int i = 0; i < 16; i++) y[i] = minus >> i & 1 ? -y[i] : y[i];
  for (int apart = 1; apart < 16; apart *= 2)
    for (int i = 0; i < 16; i++)
      if (!(i & apart)) {
        V a = y[i], b = y[i + apart];
        y[i] = a + b, y[i + apart] = a - b;
      }
  for (int i = 0; i < 16; i++) y[i] = y[i] * 0.25f;
}

// What the transform gives is rounded to the dtype of what it was given.
template <typename T, typename V> INLINE V rounded(V v) {
  if constexpr (std::is_same<T, float>::value)
    return v;
  else if constexpr (std::is_same<V, float>::value) {
    T one;
    store1(&one, v);
    return load1(&one);
  } else {
    T some[W];
    store(some, v);
    return load(some);
  }
}

INLINE vi magnitude(vf v) { return (vi)v & 0x7fffffff; }

INLINE int32_t largest_of(vi v) {
  int32_t best = v[0];
  for (int i = 1; i < W; i++) best = v[i] > best ? v[i] : best;
  return best;
}

struct Job {
  const void* x;
  const int64_t* offsets;  // [n+1] rows of x
  const float* given;      // [n] largest magnitudes to scale by, or null
  float *own, *tensor_scale;  // [n], where there is a tensor scale
  uint8_t* codes;
  void *scales, *values;
  int64_t rows, cols, stride, n, P, high, seed;
  bool hadamard, bf16_values;
};

// `store`, not `put`: that may take what is below the smallest normal number for zero.
INLINE void put_values(const Job& job, int64_t at, vf v, Whole) {
  if (job.bf16_values)
    store((bf16*)job.values + at, v);
  else
    store((float*)job.values + at, v);
}
INLINE void put_values(const Job& job, int64_t at, vf v, int n) {
  if (job.bf16_values)
    store_part((bf16*)job.values + at, v, n);
  else
    store_part((float*)job.values + at, v, n);
}

struct Task {
  int64_t segment, first, last, at;  // rows of x; at: the first padded column (tokens)
};

// The largest magnitudes of segments from those that each thread has seen, and what follows from them.
template <typename E>
void combine(const Job& job, int scheme, const std::vector<int32_t>& seen, std::vector<Tensor>& tensors, Team team) {
  team.barrier();
  int64_t first, last;
  team.share(job.n, 1, first, last);
  for (int64_t s = first; s < last; s++) {
    int32_t bits = 0;
    for (int i = 0; i < team.size; i++) bits = std::max(bits, seen[i * job.n + s]);
    memcpy(&job.own[s], &bits, 4);
    tensors[s] = tensor_of<E>(scheme, job.given ? job.given[s] : job.own[s], bits < (int32_t)INFINITE, job.tensor_scale[s]);
  }
  team.barrier();
}

// ---- the contraction along a row

template <typename T> void widen_row(const Job& job, int64_t row, float* out, int64_t room) {
  const T* x = (const T*)job.x + row * job.stride;
  lanes(job.cols, [&](int64_t c, auto part) { put(out + c, get(x + c, part), part); });
  std::fill(out + job.cols, out + room, 0.f);
  if (job.hadamard)
    for (int64_t c = 0; c < job.P; c += 16) {
      hadamard(out + c);
      for (int i = 0; i < 16; i++) out[c + i] = rounded<T>(out[c + i]);
    }
}

template <typename E, int SCHEME, int BLOCK, bool STOCHASTIC, typename T> void rows(const Job& job, int threads) {
  const int64_t P = job.P, blocks = (P + BLOCK - 1) / BLOCK, many = (blocks + W - 1) / W * W, room = blocks * BLOCK;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < job.n; s++)
    for (int64_t r = job.offsets[s]; r < job.offsets[s + 1]; r += job.high)
      tasks.push_back({s, r, std::min(r + job.high, job.offsets[s + 1]), 0});
  std::vector<int32_t> seen((size_t)threads * job.n);
  std::vector<Tensor> tensors(job.n);
  in_team(threads, [&](Team team) {
    std::vector<float> wide(job.high * room), factors(many), scales(many);
    std::vector<int32_t> most(many);
    std::vector<uint16_t> random(STOCHASTIC ? room + 16 + 8 * W : 0);
    int64_t first, last;
    team.share((int64_t)tasks.size(), 1, first, last);
    if (SCHEME == NVFP4 || SCHEME == FP8) {
      for (int64_t i = first; i < last; i++) {
        vi top = {};
        for (int64_t r = tasks[i].first; r < tasks[i].last; r++) {
          if (job.hadamard) {
            widen_row<T>(job, r, wide.data(), room);
            for (int64_t c = 0; c < room; c += W) top = larger(top, magnitude(load(&wide[c])));
          } else {
            const T* x = (const T*)job.x + r * job.stride;
            lanes(job.cols, [&](int64_t c, auto part) { top = larger(top, magnitude(get(x + c, part))); });
          }
        }
        int32_t& mine = seen[team.id * job.n + tasks[i].segment];
        mine = std::max(mine, largest_of(top));
      }
      combine<E>(job, SCHEME, seen, tensors, team);
    }
    for (int64_t i = first; i < last; i++) {
      const Task& task = tasks[i];
      const Tensor& tensor = tensors[task.segment];
      std::fill(most.begin(), most.end(), 0);
      for (int64_t r = task.first; r < task.last; r++) {
        float* row = &wide[(r - task.first) * room];
        widen_row<T>(job, r, row, room);
        if (SCHEME != FP8)
          for (int64_t b = 0; b < blocks; b++) {
            vi top = {};
            for (int c = 0; c < BLOCK; c += W) top = larger(top, magnitude(load(row + b * BLOCK + c)));
            most[b] = std::max(most[b], largest_of(top));
          }
      }
      for (int64_t b = 0; b < blocks; b += W) {
        vf a, factor, scale;
        memcpy(&a, &most[b], sizeof a);
        vi code = scales_of<E, SCHEME>(a, tensor, factor, scale);
        store(&factors[b], factor);
        store(&scales[b], scale);
        if (SCHEME != FP8 && job.scales)
          for (int64_t r = task.first; r < task.last; r++)
            for (int l = 0; l < W && b + l < blocks; l++)
              store_scale<SCHEME>(job.scales, r * blocks + b + l, scale[l], code[l]);
      }
      for (int64_t r = task.first; r < task.last; r++) {
        const float* row = &wide[(r - task.first) * room];
        const uint16_t* half = STOCHASTIC ? half_words(r * P, P, (uint64_t)job.seed, random.data()) : nullptr;
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t from = b * BLOCK;
          const int n = (int)std::min<int64_t>(BLOCK, P - from);
          const bool none = factors[b] == 0;  // not finite: codes are zero
          int32_t codes[BLOCK];
          for (int c = 0; c < BLOCK; c += W) {
            vi draw = {}, code;
            if constexpr (STOCHASTIC) {
              vh h;
              memcpy(&h, half + from + c, sizeof h);
              draw = __builtin_convertvector(h, vi);
            }
            vf v = none ? zero() : load(row + from + c) * factors[b];
            vf q = round_to<E, STOCHASTIC>(v, draw, code) * scales[b];
            memcpy(codes + c, &code, sizeof code);
            if (!job.values || c >= n) continue;
            if (c + W <= n)
              put_values(job, r * P + from + c, q, Whole{});
            else
              put_values(job, r * P + from + c, q, n - c);
          }
          if (!job.codes) continue;
          uint8_t* out = job.codes + (r * P + from) * E::bits / 8;
          if constexpr (E::bits == 4)
            for (int c = 0; c < BLOCK / 2; c++) out[c] = (uint8_t)(codes[2 * c] | codes[2 * c + 1] << 4);
          else
            for (int c = 0; c < n; c++) out[c] = (uint8_t)codes[c];
        }
      }
    }
  });
}

// ---- the contraction along the rows of x, its tokens: tiles of a block of tokens and COLUMNS columns, a column a lane

constexpr int COLUMNS = 32, ACROSS = COLUMNS / W;

template <typename T, int BLOCK>
INLINE void widen_tile(const Job& job, int64_t first, int64_t last, int64_t column, vf tile[BLOCK][ACROSS]) {
  const int64_t columns = std::min<int64_t>(COLUMNS, job.cols - column);
  for (int64_t t = 0; t < BLOCK; t++) {
    for (int a = 0; a < ACROSS; a++) tile[t][a] = zero();
    if (first + t >= last) continue;
    const T* x = (const T*)job.x + (first + t) * job.stride + column;
    lanes(columns, [&](int64_t c, auto part) { tile[t][c / W] = get(x + c, part); });
  }
  if (job.hadamard)
    for (int a = 0; a < ACROSS; a++)
      for (int64_t g = 0; g < BLOCK; g += 16) {
        vf y[16];
        for (int i = 0; i < 16; i++) y[i] = tile[g + i][a];
        hadamard(y);
        for (int i = 0; i < 16; i++) tile[g + i][a] = rounded<T>(y[i]);
      }
}

template <typename E, int SCHEME, int BLOCK, bool STOCHASTIC, typename T> void columns(const Job& job, int threads) {
  constexpr int GROUP = BLOCK >= 64 ? 1 : 64 / BLOCK;  // blocks of a task: what is written for a column lies together
  const int64_t P = job.P, blocks = P / BLOCK;
  std::vector<Task> tasks;
  int64_t at = 0;
  for (int64_t s = 0; s < job.n; s++)
    for (int64_t t = job.offsets[s]; t < job.offsets[s + 1]; t += BLOCK * GROUP) {
      int64_t end = std::min<int64_t>(t + BLOCK * GROUP, job.offsets[s + 1]);
      tasks.push_back({s, t, end, at});
      at += (end - t + BLOCK - 1) / BLOCK * BLOCK;
    }
  std::vector<int32_t> seen((size_t)threads * job.n);
  std::vector<Tensor> tensors(job.n);
  in_team(threads, [&](Team team) {
    vf tile[BLOCK][ACROSS];
    int64_t first, last;
    team.share((int64_t)tasks.size(), 1, first, last);
    if (SCHEME == NVFP4) {
      for (int64_t i = first; i < last; i++) {
        vi top = {};
        const Task& task = tasks[i];
        if (!job.hadamard)
          for (int64_t t = task.first; t < task.last; t++) {
            const T* x = (const T*)job.x + t * job.stride;
            lanes(job.cols, [&](int64_t c, auto part) { top = larger(top, magnitude(get(x + c, part))); });
          }
        else
          for (int64_t t = task.first; t < task.last; t += BLOCK)
            for (int64_t column = 0; column < job.cols; column += COLUMNS) {
              widen_tile<T, BLOCK>(job, t, task.last, column, tile);
              for (int r = 0; r < BLOCK; r++)
                for (int a = 0; a < ACROSS; a++) top = larger(top, magnitude(tile[r][a]));
            }
        int32_t& mine = seen[team.id * job.n + task.segment];
        mine = std::max(mine, largest_of(top));
      }
      combine<E>(job, SCHEME, seen, tensors, team);
    }
    for (int64_t i = first; i < last; i++) {
      const Task& task = tasks[i];
      const Tensor& tensor = tensors[task.segment];
      for (int64_t column = 0; column < job.cols; column += COLUMNS) {
        const int64_t n = std::min<int64_t>(COLUMNS, job.cols - column);
        int64_t place = task.at;  // among the padded tokens
        for (int64_t t = task.first; t < task.last; t += BLOCK, place += BLOCK) {
          widen_tile<T, BLOCK>(job, t, task.last, column, tile);
          for (int a = 0; a < ACROSS && a * W < n; a++) {
            const int64_t from = column + a * W;
            const int wide = (int)std::min<int64_t>(W, n - a * W);
            vi top = {};
            for (int r = 0; r < BLOCK; r++) top = larger(top, magnitude(tile[r][a]));
            vf factor, scale;
            vi scale_code = scales_of<E, SCHEME>((vf)top, tensor, factor, scale);
            if (job.scales)
              for (int l = 0; l < wide; l++)
                store_scale<SCHEME>(job.scales, (from + l) * blocks + place / BLOCK, scale[l], scale_code[l]);
            vi none = factor == 0.f;
            alignas(sizeof(vu)) uint32_t words[4][W], packed[BLOCK * E::bits / 32][W] = {};
            for (int r = 0; r < BLOCK; r++) {
              vi draw = {}, code;
              if constexpr (STOCHASTIC) {
                if (r % 8 == 0) {
                  uint64_t counter[W];
                  for (int l = 0; l < W; l++) counter[l] = (uint64_t)((from + l) * P + place + r) / 8;
                  philox(counter, (uint64_t)job.seed, words);
                }
                memcpy(&draw, words[r % 8 / 2], sizeof draw);
                draw = r % 2 ? (vi)((vu)draw >> 16) : draw & 0xffff;
              }
              vf v = none ? zero() : tile[r][a] * factor;
              vf q = round_to<E, STOCHASTIC>(v, draw, code) * scale;
              vu& into = (vu&)packed[r * E::bits / 32];
              into |= (vu)code << (r * E::bits % 32);
              if (!job.values) continue;
              if (wide == W)
                put_values(job, (place + r) * job.cols + from, q, Whole{});
              else
                put_values(job, (place + r) * job.cols + from, q, wide);
            }
            if (!job.codes) continue;
            for (int l = 0; l < wide; l++) {
              uint32_t line[BLOCK * E::bits / 32];
              for (int w = 0; w < BLOCK * E::bits / 32; w++) line[w] = packed[w][l];
              memcpy(job.codes + ((from + l) * P + place) * E::bits / 8, line, sizeof line);
            }
          }
        }
      }
    }
  });
}

template <typename E, int SCHEME, int BLOCK, typename T>
void quantize(const Job& job, bool transpose, bool stochastic, int threads) {
  threads = std::max(threads, 1);
  if (transpose) {
    if constexpr (SCHEME != FP8) {
      if (stochastic)
        columns<E, SCHEME, BLOCK, true, T>(job, threads);
      else
        columns<E, SCHEME, BLOCK, false, T>(job, threads);
    }
  } else if (stochastic) {
    rows<E, SCHEME, BLOCK, true, T>(job, threads);
  } else {
    rows<E, SCHEME, BLOCK, false, T>(job, threads);
  }
}

// ---- reading back

struct Table {
  float e4m3[256], e5m2[256], e8m0[256], pair[256][2];

  template <typename E> static float decode(int code) {
    constexpr int m = E::mantissa;
    int magnitude = code & ((1 << (E::bits - 1)) - 1), e = std::max(magnitude >> m, 1);
    float units = (float)(magnitude - ((e - 1) << m));
    float v = std::ldexp(units, e - 1 + E::least - m);
    return code >> (E::bits - 1) ? -v : v;
  }

  Table() {
    for (int i = 0; i < 256; i++) {
      e4m3[i] = (i & 127) == 127 ? NAN : decode<E4M3>(i);
      e5m2[i] = (i & 127) > 124 ? NAN : (i & 127) == 124 ? (i > 127 ? -INFINITY : INFINITY) : decode<E5M2>(i);
      e8m0[i] = i == 255 ? NAN : std::ldexp(1.f, i - 127);
      pair[i][0] = decode<E2M1>(i & 15), pair[i][1] = decode<E2M1>(i >> 4);
    }
  }
};

template <typename T>
void read_back(const uint8_t* codes, const void* scales, T* out, int64_t rows, int64_t P, int64_t width, int64_t scheme,
               bool e5m2, int threads) {
  static const Table table;
  const int64_t blocks = (P + width - 1) / width;
  in_team(threads, [&](Team team) {
    std::vector<float> row(P);
    int64_t first, last;
    team.share(rows, 1, first, last);
    for (int64_t r = first; r < last; r++) {
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t from = b * width, to = std::min(P, from + width);
        float s = 1;
        if (scheme == NVFP4) s = table.e4m3[((const uint8_t*)scales)[r * blocks + b]];
        if (scheme == MXFP8) s = table.e8m0[((const uint8_t*)scales)[r * blocks + b]];
        if (scheme == FP8_BLOCK) s = ((const float*)scales)[r * blocks + b];
        if (scheme == NVFP4) {
          const uint8_t* c = codes + (r * P + from) / 2;
          for (int64_t i = 0; i < (to - from) / 2; i++) {
            row[from + 2 * i] = table.pair[c[i]][0] * s;
            row[from + 2 * i + 1] = table.pair[c[i]][1] * s;
          }
        } else {
          const float* value = e5m2 ? table.e5m2 : table.e4m3;
          for (int64_t i = from; i < to; i++) row[i] = value[codes[r * P + i]] * s;
        }
      }
      for (int64_t c = 0; c + W <= P; c += W) store(out + r * P + c, load(&row[c]));
      if (int rest = P % W) store_part(out + r * P + P - rest, load_part(&row[P - rest], rest), rest);
    }
  });
}

}  // namespace

extern "C" {

#define QUANT(suffix, T)                                                                                              \
  void quantize_##suffix(const T* x, const int64_t* offsets, const float* given, float* own, float* tensor_scale,      \
                         uint8_t* codes, void* scales, void* values, int64_t rows, int64_t cols, int64_t stride,       \
                         int64_t n, int64_t P, int64_t high, int64_t seed, int64_t scheme, int64_t e5m2,               \
                         int64_t transpose, int64_t stochastic, int64_t hadamard, int64_t bf16_values,                 \
                         int64_t threads) {                                                                            \
    Job job = {x, offsets, given, own, tensor_scale, codes, scales, values, rows, cols, stride, n, P, high, seed,      \
               hadamard != 0, bf16_values != 0};                                                                       \
    if (scheme == NVFP4) quantize<E2M1, NVFP4, 16, T>(job, transpose, stochastic, (int)threads);                       \
    if (scheme == FP8_BLOCK) quantize<E4M3, FP8_BLOCK, 128, T>(job, transpose, stochastic, (int)threads);              \
    if (scheme == MXFP8 && !e5m2) quantize<E4M3, MXFP8, 32, T>(job, transpose, stochastic, (int)threads);              \
    if (scheme == MXFP8 && e5m2) quantize<E5M2, MXFP8, 32, T>(job, transpose, stochastic, (int)threads);               \
    if (scheme == FP8 && !e5m2) quantize<E4M3, FP8, 64, T>(job, transpose, stochastic, (int)threads);                  \
    if (scheme == FP8 && e5m2) quantize<E5M2, FP8, 64, T>(job, transpose, stochastic, (int)threads);                   \
  }                                                                                                                    \
  void quantized_values_##suffix(const uint8_t* codes, const void* scales, T* out, int64_t rows, int64_t P,            \
                                 int64_t width, int64_t scheme, int64_t e5m2, int64_t threads) {                       \
    read_back(codes, scales, out, rows, P, width, scheme, e5m2 != 0, (int)threads);                                    \
  }

QUANT(f32, float)
QUANT(bf16, bf16)

}  // extern "C"
