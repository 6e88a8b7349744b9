// The gradient of a linear's weight in bfloat16 with AMX: dW [N, K] = dy^T x, both turned round while they are packed;
// in float for float32 master weights. x [M, K], dy [M, N].
#include "team.h"
#include "tiles.h"

#if TILES_AMX
namespace {

constexpr int64_t NEAR = 1 << 19;  // bytes of packed columns of dy that stay in the second-level cache

template <typename V>
void backward_w(const bf16* dy, const bf16* x, V* dw, bf16* space, int64_t M, int64_t N, int64_t K, bool add,
    int threads) {
  const int64_t lda = up_to(M, 32) + 32, group = std::max<int64_t>(2, NEAR / (TILE * lda * 2) / 2 * 2) * TILE;
  in_team(threads, [&](Team team) {
    int64_t first, last;
    team.share((K + TILE - 1) / TILE, 1, first, last);
    pack_b<bf16>(space, Matrix<bf16, true>{x, K}, M, K, first, last);
    team.barrier();
    Tiles tiles;
    Scratch scratch(group * lda * sizeof(bf16));
    bf16* a = scratch.take<bf16>(group * lda);
    team.share(N, 2 * TILE, first, last);
    for (int64_t n = first; n < last; n += group) {
      const int64_t rows = std::min(last - n, group);
      pack_a_turned<bf16>(a, lda, Matrix<bf16, true>{dy + n, N}, rows, M, 0, (rows + TILE - 1) / TILE);
      product_into<true>(tiles, dw + n * K, K, add, a, lda, space, rows, K, M, 0, (K + TILE - 1) / TILE);
    }
  });
}

}  // namespace
#endif

extern "C" {

// Whether the function below can be called, into *out.
void dense_available(int64_t* out, int64_t) {
#if TILES_AMX
  *out = amx();
#else
  *out = 0;
#endif
}

// `space` holds x packed: M to a multiple of 32 times K to one of 16. Added to dw where `add`.
#if TILES_AMX
#define DENSE(suffix, V) \
  void dense_backward_w_##suffix(const bf16* dy, const bf16* x, V* dw, bf16* space, int64_t M, int64_t N, int64_t K, \
                                 int64_t add, int64_t threads) { \
    backward_w(dy, x, dw, space, M, N, K, add, (int)threads); \
  }
#else
#define DENSE(suffix, V) \
  void dense_backward_w_##suffix(const bf16*, const bf16*, V*, bf16*, int64_t, int64_t, int64_t, int64_t, int64_t) {}
#endif

DENSE(f32, float)
DENSE(bf16, bf16)

}  // extern "C"
