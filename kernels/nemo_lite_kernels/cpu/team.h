// Threads of torch's own OpenMP runtime: no second one is started. A kernel opens one parallel region; inside it every
// thread calls the same functions with its Team, which share work out by `share` and meet at `barrier`.
#pragma once
#include <algorithm>
#include <cstdint>

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

struct Team {
  int id, size;

  // This thread's part [first, last) of n items, in multiples of `multiple`.
  void share(int64_t n, int64_t multiple, int64_t& first, int64_t& last) const {
    int64_t blocks = (n + multiple - 1) / multiple;
    first = std::min(n, blocks * id / size * multiple);
    last = std::min(n, blocks * (id + 1) / size * multiple);
  }

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// work(team) on `threads` threads; on this one alone where that is 1, or where OpenMP is not compiled in.
template <typename Work> void in_team(int threads, Work work) {
  if (threads <= 1) {
    work(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  work(Team{omp_get_thread_num(), omp_get_num_threads()});
}
