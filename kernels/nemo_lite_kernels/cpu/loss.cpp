// Cross-entropy over rows of logits: the negative log-likelihood, and the gradient in place of the logits.
#include <cmath>

#include "team.h"
#include "tiles.h"

namespace {

// nll_t = log sum_v exp(x_tv) - x_t,label; x_tv becomes weight_t (softmax_tv - [v = label]) where `training`.
template <typename T>
void cross_entropy(T* x, const int64_t* labels, const float* weights, float* nll, int64_t rows, int64_t V,
    bool training,
                   int threads) {
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share(rows, 1, first, last);
    Scratch scratch(V * sizeof(float));
    float* exps = scratch.take<float>(V);
    const int64_t whole = V / W * W;
    const int rest = (int)(V - whole);
    for (int64_t t = first; t < last; t++) {
      T* row = x + t * V;
      vf tops[4] = {set(-INFINITY), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
      int64_t v = 0;
      for (; v + 4 * W <= whole; v += 4 * W)
        for (int i = 0; i < 4; i++) tops[i] = vmax(load(row + v + i * W), tops[i]);
      for (; v < whole; v += W) tops[0] = vmax(load(row + v), tops[0]);
      float top = max_of(vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3])));
      for (v = whole; v < V; v++) top = std::max(top, load1(row + v));
      if (top == -INFINITY) top = 0;
      vf sums = zero();
      for (v = 0; v < whole; v += W) {
        vf e = vexp(load(row + v) - top);
        store(exps + v, e);
        sums += e;
      }
      float total = sum(sums);
      if (rest) {
        vf e = vexp(load_part(row + whole, rest) - top);
        store_part(exps + whole, e, rest);
        for (int i = 0; i < rest; i++) total += e[i];
      }
      nll[t] = std::log(total) + (top - load1(row + labels[t]));
      if (!training) continue;
      const float scale = weights[t] / total;
      for (v = 0; v < whole; v += W) store_fast(row + v, load(exps + v) * scale);
      if (rest) store_part(row + whole, load_part(exps + whole, rest) * scale, rest);
      store1(row + labels[t], exps[labels[t]] * scale - weights[t]);
    }
  });
}

}  // namespace

extern "C" {

#define LOSS(suffix, T)                                                                                             \
  void cross_entropy_##suffix(T* x, const int64_t* labels, const float* weights, float* nll, int64_t rows, int64_t V, \
                              int64_t training, int64_t threads) {                                                  \
    cross_entropy(x, labels, weights, nll, rows, V, training, (int)threads);                                        \
  }

LOSS(f32, float)
LOSS(bf16, bf16)

}  // extern "C"
