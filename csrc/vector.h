// Vectors of W floats, for kernels that are written once and built for several instruction sets by hand, because their
// tiles differ (registers to fill, rows that divide).
#pragma once
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VJEPA_LEVELS 1
#define VJEPA_512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define VJEPA_256 __attribute__((target("arch=x86-64-v3")))
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: everything is inlined
#pragma GCC diagnostic ignored "-Wattributes"

namespace vjepa {

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(4 * W), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
VJEPA_INLINE typename Vector<W>::type load(const float* from) {
  return *reinterpret_cast<const typename Vector<W>::type*>(from);
}

template <int W>
VJEPA_INLINE void store(float* to, typename Vector<W>::type v) {
  *reinterpret_cast<typename Vector<W>::type*>(to) = v;
}

// The first choice that this machine can run.
template <class F>
F by_level([[maybe_unused]] F for_512, [[maybe_unused]] F for_256, F otherwise) {
#ifdef VJEPA_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return for_512;
  if (__builtin_cpu_supports("x86-64-v3")) return for_256;
#endif
  return otherwise;
}

}  // namespace vjepa
