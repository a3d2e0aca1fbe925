// Vectors of W floats, for kernels that are written once and built for several instruction sets by hand, because their
// tiles differ (registers to fill, rows that divide).
#pragma once
#include <utility>

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

// Numbers of a, then b, by their indices. (GCC has had __builtin_shufflevector since 12 only.)
template <int W, int... i>
VJEPA_INLINE typename Vector<W>::type shuffle(typename Vector<W>::type a, typename Vector<W>::type b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, typename Vector<W>::ints{i...});
#endif
}

// Numbers of two rows exchanged, S columns apart: those of a square's upper right and lower left.
template <int W, int S, int... i>
VJEPA_INLINE void exchange(typename Vector<W>::type& a, typename Vector<W>::type& b,
                           std::integer_sequence<int, i...>) {
  const auto low = shuffle<W, ((i & S) ? i - S + W : i)...>(a, b);
  b = shuffle<W, ((i & S) ? i + W : i + S)...>(a, b);
  a = low;
}

template <int W, int S>
VJEPA_INLINE void exchange_all(typename Vector<W>::type* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<W, S>(rows[i], rows[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (S > 1) exchange_all<W, S / 2>(rows);
}

// A block of W x W numbers, turned.
template <int W>
VJEPA_INLINE void transpose(const float* from, int64_t ld, float* to, int64_t ldt) {
  typename Vector<W>::type rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load<W>(from + i * ld);
  exchange_all<W, W / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store<W>(to + i * ldt, rows[i]);
}

// At least so many floats. It only grows: what a vector is shrunk by would be cleared when it is needed again.
inline float* room(std::vector<float>& space, int64_t size) {
  if (static_cast<int64_t>(space.size()) < size) space.resize(static_cast<size_t>(size));
  return space.data();
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
