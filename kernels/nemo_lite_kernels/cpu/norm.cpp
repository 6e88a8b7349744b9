// RMSNorm, the gated group RMSNorm and the squared ReLU, forward and backward. Rows are strided, results contiguous; a
// row stays in the first-level cache between its sums and its outputs. Nothing but the inputs is needed backward.
#include <cmath>
#include <vector>
#include "team.h"
#include "vec.h"

namespace {

template <typename T>
void rms_forward(const T* x, int64_t ldx, const float* weight, T* y, int64_t rows, int64_t width, float eps,
                 int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(rows, 1, first, last);
    for (int64_t row = first; row < last; row++) {
      const T* a = x + row * ldx;
      T* out = y + row * width;
      vf squares = zero();
      lanes(width, [&](int64_t c, auto part) {
        vf v = get(a + c, part);
        squares += v * v;
      });
      float scale = 1.f / std::sqrt(sum(squares) / width + eps);
      lanes(width, [&](int64_t c, auto part) { put(out + c, get(a + c, part) * scale * get(weight + c, part), part); });
    }
  });
}

// Columns [first, last) of the sum over `parts` rows of `partial`, in the order of the rows.
void reduce(const float* partial, int64_t parts, int64_t width, float* out, Team team) {
  int64_t first, last;
  team.share(width, W, first, last);
  lanes(last - first, [&](int64_t c, auto part) {
    vf total = zero();
    for (int64_t i = 0; i < parts; i++) total += get(partial + i * width + first + c, part);
    put(out + first + c, total, part);
  });
}

// The gradient of the weight is summed in `parts` parts of the rows, whatever the number of threads: the same result.
template <typename T>
void rms_backward(const T* x, int64_t ldx, const float* weight, const T* dy, int64_t ldy, T* dx, float* partial,
                  float* dweight, int64_t rows, int64_t width, int64_t parts, float eps, int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(parts, 1, first, last);
    for (int64_t i = first; i < last; i++) {
      float* dw = partial + i * width;
      std::fill(dw, dw + width, 0.f);
      for (int64_t row = rows * i / parts; row < rows * (i + 1) / parts; row++) {
        const T *a = x + row * ldx, *d = dy + row * ldy;
        T* out = dx + row * width;
        vf squares = zero(), along = zero();
        lanes(width, [&](int64_t c, auto part) {
          vf v = get(a + c, part);
          squares += v * v;
          along += v * get(weight + c, part) * get(d + c, part);
        });
        float scale = 1.f / std::sqrt(sum(squares) / width + eps);
        float back = scale * scale * scale * sum(along) / width;
        lanes(width, [&](int64_t c, auto part) {
          vf v = get(a + c, part), g = get(d + c, part) * scale;
          put(dw + c, get(dw + c, part) + g * v, part);
          put(out + c, g * get(weight + c, part) - v * back, part);
        });
      }
    }
    team.barrier();
    reduce(partial, parts, width, dweight, team);
  });
}

template <typename T>
void gated_forward(const T* x, int64_t ldx, const T* z, int64_t ldz, const float* weight, T* y, int64_t rows,
                   int64_t width, int64_t groups, float eps, int threads) {
  int64_t n = width / groups;
  in_team(threads, [&](Team team) {
    std::vector<float> h(n);
    int64_t first, last;
    team.share(rows * groups, 1, first, last);
    for (int64_t i = first; i < last; i++) {
      int64_t row = i / groups, from = i % groups * n;
      const T *a = x + row * ldx + from, *gate = z + row * ldz + from;
      const float* w = weight + from;
      T* out = y + row * width + from;
      vf squares = zero();
      lanes(n, [&](int64_t c, auto part) {
        vf g = get(gate + c, part);
        vf v = get(a + c, part) * g * logistic(g);
        squares += v * v;
        put(&h[c], v, part);
      });
      float scale = 1.f / std::sqrt(sum(squares) / n + eps);
      lanes(n, [&](int64_t c, auto part) { put(out + c, get(&h[c], part) * scale * get(w + c, part), part); });
    }
  });
}

template <typename T>
void gated_backward(const T* x, int64_t ldx, const T* z, int64_t ldz, const float* weight, const T* dy, int64_t ldy,
                    T* dx, T* dz, float* partial, float* dweight, int64_t rows, int64_t width, int64_t groups,
                    int64_t parts, float eps, int threads) {
  int64_t n = width / groups;
  in_team(threads, [&](Team team) {
    std::vector<float> kept(n);
    int64_t first, last;
    team.share(parts, 1, first, last);
    for (int64_t i = first; i < last; i++) {
      std::fill(partial + i * width, partial + (i + 1) * width, 0.f);
      for (int64_t row = rows * i / parts; row < rows * (i + 1) / parts; row++)
        for (int64_t from = 0; from < width; from += n) {
          const T *a = x + row * ldx + from, *gate = z + row * ldz + from, *d = dy + row * ldy + from;
          T *out = dx + row * width + from, *out_gate = dz + row * width + from;
          const float* w = weight + from;
          float* dw = partial + i * width + from;
          vf squares = zero(), along = zero();
          lanes(n, [&](int64_t c, auto part) {
            vf g = get(gate + c, part), open = logistic(g);
            vf h = get(a + c, part) * g * open;
            squares += h * h;
            along += h * get(w + c, part) * get(d + c, part);
            put(&kept[c], open, part);
          });
          float scale = 1.f / std::sqrt(sum(squares) / n + eps);
          float back = scale * scale * scale * sum(along) / n;
          lanes(n, [&](int64_t c, auto part) {
            vf g = get(gate + c, part), open = get(&kept[c], part), v = get(a + c, part);
            vf silu_g = g * open, h = v * silu_g, e = get(d + c, part) * scale;
            put(dw + c, get(dw + c, part) + e * h, part);
            vf dh = e * get(w + c, part) - h * back;
            put(out + c, dh * silu_g, part);
            put(out_gate + c, dh * v * (open + silu_g * (1.f - open)), part);
          });
        }
    }
    team.barrier();
    reduce(partial, parts, width, dweight, team);
  });
}

// y = relu(h)^2
template <typename T> void relu2_forward(const T* h, T* y, int64_t n, int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(n, 1024, first, last);
    lanes(last - first, [&](int64_t c, auto part) {
      vf v = get(h + first + c, part);
      vf u = v < 0.f ? zero() : v;  // NaN stays
      put(y + first + c, u * u, part);
    });
  });
}

// dh = 2 relu(h) dy, where relu(h) is the root of y: only the output has to be kept.
template <typename T> void relu2_backward(const T* y, const T* dy, T* dh, int64_t n, int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(n, 1024, first, last);
    lanes(last - first, [&](int64_t c, auto part) {
      put(dh + first + c, 2.f * root(get(y + first + c, part)) * get(dy + first + c, part), part);
    });
  });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
  extern "C" void rms_forward_##SUFFIX(const T* x, int64_t ldx, const float* weight, T* y, int64_t rows,              \
                                       int64_t width, float eps, int64_t threads) {                                    \
    rms_forward(x, ldx, weight, y, rows, width, eps, (int)threads);                                                    \
  }                                                                                                                    \
  extern "C" void rms_backward_##SUFFIX(const T* x, int64_t ldx, const float* weight, const T* dy, int64_t ldy, T* dx, \
                                        float* partial, float* dweight, int64_t rows, int64_t width, int64_t parts,    \
                                        float eps, int64_t threads) {                                                  \
    rms_backward(x, ldx, weight, dy, ldy, dx, partial, dweight, rows, width, parts, eps, (int)threads);                \
  }                                                                                                                    \
  extern "C" void gated_forward_##SUFFIX(const T* x, int64_t ldx, const T* z, int64_t ldz, const float* weight, T* y,  \
                                         int64_t rows, int64_t width, int64_t groups, float eps, int64_t threads) {    \
    gated_forward(x, ldx, z, ldz, weight, y, rows, width, groups, eps, (int)threads);                                  \
  }                                                                                                                    \
  extern "C" void gated_backward_##SUFFIX(const T* x, int64_t ldx, const T* z, int64_t ldz, const float* weight,       \
                                          const T* dy, int64_t ldy, T* dx, T* dz, float* partial, float* dweight,      \
                                          int64_t rows, int64_t width, int64_t groups, int64_t parts, float eps,       \
                                          int64_t threads) {                                                           \
    gated_backward(x, ldx, z, ldz, weight, dy, ldy, dx, dz, partial, dweight, rows, width, groups, parts, eps,         \
                   (int)threads);                                                                                      \
  }                                                                                                                    \
  extern "C" void relu2_forward_##SUFFIX(const T* h, T* y, int64_t n, int64_t threads) {                               \
    relu2_forward(h, y, n, (int)threads);                                                                              \
  }                                                                                                                    \
  extern "C" void relu2_backward_##SUFFIX(const T* y, const T* dy, T* dh, int64_t n, int64_t threads) {                \
    relu2_backward(y, dy, dh, n, (int)threads);                                                                        \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
