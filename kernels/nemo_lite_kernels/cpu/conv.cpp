// The depthwise causal convolution with its SiLU, forward and backward. A block of 8 rows is walked vector by vector of
// channels: the tokens before, the weights and the gradients still to be completed stay in registers. Where a document
// starts the history is emptied, so that no token carries a mask. Rows are strided, results contiguous.
#include <algorithm>
#include <vector>
#include "team.h"
#include "vec.h"

namespace {

constexpr int MOST = 16;  // taps
constexpr int64_t BLOCK = 8;

struct Shape {
  int64_t B, L, C, taps;
  int64_t tile;  // channels of a unit of work

  // Enough units for the threads; the results do not depend on their size.
  Shape(int64_t B, int64_t L, int64_t C, int64_t taps, int threads) : B(B), L(L), C(C), taps(taps) {
    int64_t tiles = std::max<int64_t>(1, threads > 1 ? 2 * threads / B : 1);
    tile = std::max<int64_t>(W, ((C + tiles - 1) / tiles + W - 1) / W * W);
  }
  int64_t tiles() const { return (C + tile - 1) / tile; }
  int64_t units() const { return B * tiles(); }
};

// Where the tokens of one row are, and how many before each belong to its document (at most taps - 1).
template <typename T> struct Row {
  const T* x;
  int64_t stride;
  const float* window;  // [taps - 1, C], or null
  int64_t C;
  int taps;
  std::vector<int> depth;

  Row(const T* x, int64_t stride, const uint8_t* reset, const float* window, const Shape& s)
      : x(x), stride(stride), window(window), C(s.C), taps((int)s.taps), depth(s.L) {
    int before = taps - 1;
    for (int64_t t = 0; t < s.L; t++) {
      before = reset && reset[t] ? 0 : std::min(before + (t > 0), taps - 1);
      depth[t] = before;
    }
  }
  // What is `lag` before token t, if that is of the document of token t - 1.
  template <typename Part> vf before(int64_t t, int lag, int64_t c, Part part) const {
    if (t > 0 && lag - 1 > depth[t - 1]) return zero();
    if (t >= lag) return get(x + (t - lag) * stride + c, part);
    return window ? get(window + (t - lag + taps - 1) * C + c, part) : zero();
  }
};

template <int K, typename T>
void forward_unit(const Row<T>& row, const Shape& s, const float* weight, const float* bias, T* y, int64_t from,
                  int64_t width) {
  const int taps = K ? K : (int)s.taps;
  for (int64_t start = 0; start < s.L; start += BLOCK) {
    int64_t stop = std::min(start + BLOCK, s.L);
    lanes(width, [&](int64_t c0, auto part) {
      int64_t c = from + c0;
      vf w[K ? K : MOST], h[K ? K : MOST], b = get(bias + c, part);  // by lag
      for (int lag = 0; lag < taps; lag++) w[lag] = get(weight + (taps - 1 - lag) * s.C + c, part);
      for (int lag = 1; lag < taps; lag++) h[lag] = row.before(start, lag, c, part);
      for (int64_t t = start; t < stop; t++) {
        if (row.depth[t] == 0)
          for (int lag = 1; lag < taps; lag++) h[lag] = zero();
        h[0] = get(row.x + t * row.stride + c, part);
        vf u = b;
        for (int lag = 0; lag < taps; lag++) u += w[lag] * h[lag];
        put(y + t * s.C + c, u * logistic(u), part);
        for (int lag = taps - 1; lag > 0; lag--) h[lag] = h[lag - 1];
      }
    });
  }
}

// partial [taps + 1, C]: the gradients of the weight, by tap, and of the bias from this row. pending [taps, tile] holds
// for the last tokens what their gradient has so far.
template <int K, typename T>
void backward_unit(const Row<T>& row, const Shape& s, const float* weight, const float* bias, const T* dy, int64_t ldy,
                   T* dx, float* dwindow, float* partial, float* pending, int64_t from, int64_t width) {
  const int taps = K ? K : (int)s.taps;
  for (int tap = 0; tap <= taps; tap++) std::fill_n(partial + tap * s.C + from, width, 0.f);
  std::fill_n(pending, taps * s.tile, 0.f);
  auto give = [&](int64_t t, int64_t c, vf v, auto part) {
    if (t >= 0) put(dx + t * s.C + c, v, part);
    else if (dwindow) put(dwindow + (t + taps - 1) * s.C + c, v, part);
  };
  for (int64_t start = 0; start < s.L; start += BLOCK) {
    int64_t stop = std::min(start + BLOCK, s.L);
    lanes(width, [&](int64_t c0, auto part) {
      int64_t c = from + c0;
      constexpr int N = K ? K : MOST;
      vf w[N], h[N], dw[N], d[N + 1], b = get(bias + c, part), db = get(partial + taps * s.C + c, part);
      for (int lag = 0; lag < taps; lag++) {
        w[lag] = get(weight + (taps - 1 - lag) * s.C + c, part);
        dw[lag] = get(partial + (taps - 1 - lag) * s.C + c, part);
        h[lag] = lag ? row.before(start, lag, c, part) : zero();
        d[lag] = get(pending + lag * s.tile + c0, part);  // d[lag]: of token t - 1 - lag
      }
      for (int64_t t = start; t < stop; t++) {
        int depth = row.depth[t];
        if (depth == 0)
          for (int lag = 1; lag < taps; lag++) h[lag] = zero();
        h[0] = get(row.x + t * row.stride + c, part);
        vf u = b;
        for (int lag = 0; lag < taps; lag++) u += w[lag] * h[lag];
        vf open = logistic(u);
        vf du = get(dy + t * ldy + c, part) * open * (1.f + u * (1.f - open));
        db += du;
        for (int lag = taps - 1; lag > 0; lag--) d[lag] = d[lag - 1];  // d[lag]: of token t - lag
        d[0] = zero();
        for (int lag = 0; lag < taps; lag++) dw[lag] += du * h[lag];
        if (depth == taps - 1)
          for (int lag = 0; lag < taps; lag++) d[lag] += w[lag] * du;
        else
          for (int lag = 0; lag <= depth; lag++) d[lag] += w[lag] * du;
        give(t - taps + 1, c, d[taps - 1], part);
        for (int lag = taps - 1; lag > 0; lag--) h[lag] = h[lag - 1];
      }
      for (int lag = 0; lag < taps; lag++) {
        put(partial + (taps - 1 - lag) * s.C + c, dw[lag], part);
        put(pending + lag * s.tile + c0, d[lag], part);
      }
      put(partial + taps * s.C + c, db, part);
    });
  }
  for (int lag = 0; lag < taps - 1; lag++)
    lanes(width, [&](int64_t c, auto part) {
      give(s.L - 1 - lag, from + c, get(pending + lag * s.tile + c, part), part);
    });
}

// weight [taps, C]; reset [B, L] or null; window [B, taps - 1, C] or null.
template <typename T>
void conv_forward(const T* x, const float* weight, const float* bias, const uint8_t* reset, const float* window, T* y,
                  int64_t B, int64_t L, int64_t C, int64_t taps, int64_t row_stride, int64_t stride, int threads) {
  Shape s(B, L, C, taps, threads);
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(s.units(), 1, first, last);
    for (int64_t unit = first; unit < last; unit++) {
      int64_t b = unit / s.tiles(), from = unit % s.tiles() * s.tile;
      Row<T> row(x + b * row_stride, stride, reset ? reset + b * L : nullptr,
                 window ? window + b * (taps - 1) * C : nullptr, s);
      int64_t width = std::min(s.tile, C - from);
      if (taps == 4)
        forward_unit<4>(row, s, weight, bias, y + b * L * C, from, width);
      else
        forward_unit<0>(row, s, weight, bias, y + b * L * C, from, width);
    }
  });
}

// partial [B, taps + 1, C]
template <typename T>
void conv_backward(const T* x, const float* weight, const float* bias, const uint8_t* reset, const float* window,
                   const T* dy, T* dx, float* dwindow, float* partial, int64_t B, int64_t L, int64_t C, int64_t taps,
                   int64_t row_stride, int64_t stride, int64_t dy_row_stride, int64_t dy_stride, int threads) {
  Shape s(B, L, C, taps, threads);
  in_team(threads, [&](Team team) {
    std::vector<float> pending(taps * s.tile);
    int64_t first, last;
    team.share(s.units(), 1, first, last);
    for (int64_t unit = first; unit < last; unit++) {
      int64_t b = unit / s.tiles(), from = unit % s.tiles() * s.tile;
      Row<T> row(x + b * row_stride, stride, reset ? reset + b * L : nullptr,
                 window ? window + b * (taps - 1) * C : nullptr, s);
      int64_t width = std::min(s.tile, C - from);
      (taps == 4 ? backward_unit<4, T> : backward_unit<0, T>)(
          row, s, weight, bias, dy + b * dy_row_stride, dy_stride, dx + b * L * C,
          dwindow ? dwindow + b * (taps - 1) * C : nullptr, partial + b * (taps + 1) * C, pending.data(), from, width);
    }
  });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
  extern "C" void conv_forward_##SUFFIX(const T* x, const float* weight, const float* bias, const uint8_t* reset,      \
                                        const float* window, T* y, int64_t B, int64_t L, int64_t C, int64_t taps,      \
                                        int64_t row_stride, int64_t stride, int64_t threads) {                         \
    conv_forward(x, weight, bias, reset, window, y, B, L, C, taps, row_stride, stride, (int)threads);                  \
  }                                                                                                                    \
  extern "C" void conv_backward_##SUFFIX(const T* x, const float* weight, const float* bias, const uint8_t* reset,     \
                                         const float* window, const T* dy, T* dx, float* dwindow, float* partial,      \
                                         int64_t B, int64_t L, int64_t C, int64_t taps, int64_t row_stride,            \
                                         int64_t stride, int64_t dy_row_stride, int64_t dy_stride, int64_t threads) {  \
    conv_backward(x, weight, bias, reset, window, dy, dx, dwindow, partial, B, L, C, taps, row_stride, stride,         \
                  dy_row_stride, dy_stride, (int)threads);                                                             \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
