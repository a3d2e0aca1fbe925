// What the CPU kernels share: builds for several instruction sets, bfloat16, choosing a template by dtype.
#pragma once
#include "torch_abi.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
// A function (or function template) so marked is compiled three times; the loader picks. Feature levels, since naming a
// CPU would match that very model alone. Only the marked function and what is inlined into it gains.
#define VJEPA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VJEPA_CLONES
#endif
#define VJEPA_INLINE inline __attribute__((always_inline))

namespace vjepa {

struct bf16 {  // the upper half of a float
  uint16_t bits;
};

VJEPA_INLINE float up(float x) { return x; }
VJEPA_INLINE float up(uint8_t x) { return x; }
VJEPA_INLINE float up(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// To the storage type, rounding to nearest even; a NaN stays one.
template <class T>
VJEPA_INLINE T down(float x);
template <>
VJEPA_INLINE float down<float>(float x) {
  return x;
}
template <>
VJEPA_INLINE bf16 down<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <class T>
struct type {
  using of = T;
};

// fn(type<float>{}) or fn(type<bf16>{}), after the tensor's dtype.
template <class F>
void by_dtype(const Tensor& x, const F& fn) {
  if (x.dtype() == aoti_torch_dtype_float32()) return fn(type<float>{});
  check(x.dtype() == aoti_torch_dtype_bfloat16(), "vjepa_fast: expected float32 or bfloat16");
  fn(type<bf16>{});
}

}  // namespace vjepa
