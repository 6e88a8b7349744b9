// Packed weights back to the numbers they stand for: for products of many rows, which are matrix libraries' work.
#include "linear.h"

namespace {

INLINE float half(const char* p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return from_half(h);
#endif
}

// Rows panel * 16 .. + 16 of w, each [K], in T.
template <typename T> void unpack_panel(const Weight& w, int64_t panel, T* out) {
  const bool four = w.kind == INT4;
  const int64_t K = w.cols, groups = (K + w.group - 1) / w.group, rows = std::min<int64_t>(PANEL, w.rows - panel * PANEL);
  const uint8_t* codes = (const uint8_t*)w.data + panel * K * PANEL / (four ? 2 : 1);
  const char* scales = w.scale + panel * groups * PANEL * 2;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < groups; g++) {
      float scale = half(scales + (g * PANEL + r) * 2);
      for (int64_t k = g * w.group; k < std::min(K, (g + 1) * w.group); k += 4) {
        const uint8_t* c = codes + (four ? k / 8 : k / 4) * 64 + 4 * r;
        const int shift = four ? (int)(k & 4) : 0, mask = four ? 15 : 255, zero = (int)w.zero();
        for (int j = 0; j < 4; j++) store1(out + r * K + k + j, (float)(((c[j] >> shift) & mask) - zero) * scale);
      }
    }
}

}  // namespace

// `count` stacked matrices w to out [count, N, K], float32 or bfloat16 (0, 1).
extern "C" void unpack(const Weight* w, int64_t count, void* out, int64_t kind, int64_t threads) {
  in_team((int)threads, [&](Team team) {
    const int64_t panels = (w->rows + PANEL - 1) / PANEL;
    int64_t first, last;
    team.share(count * panels, 1, first, last);
    for (int64_t i = first; i < last; i++) {
      const Weight one = w->at(i / panels);
      const int64_t panel = i % panels, at = (i / panels * w->rows + panel * PANEL) * w->cols;
      if (kind == FLOAT32) unpack_panel(one, panel, (float*)out + at);
      else unpack_panel(one, panel, (bf16*)out + at);
    }
  });
}
