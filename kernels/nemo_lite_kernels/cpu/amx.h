// Intel's AMX: tiles of 16 rows by 64 bytes, and the product of two of them. Asked for at run time, beside AVX-512.
#pragma once
#include <cstdint>

#if defined(__AVX512BF16__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define TILES_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if TILES_AMX
inline bool amx_wanted = true;

// Whether AMX is there and the system lets this process use it; asked once.
inline bool amx() {
  static const bool found = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, the tiles' data
  }();
  return found && amx_wanted;
}

// Eight tiles of 16 rows by 64 bytes, for as long as this lives.
struct Tiles {
  bool on = amx();
  Tiles() {
    if (!on) return;
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (on) asm volatile("tilerelease" ::);
  }
};

#define TILE_LOAD(t, p, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, p, stride) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#else
struct Tiles {
  bool on = false;
};
#endif
