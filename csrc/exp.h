// An exponential that a compiler can vectorise.
#pragma once
#include <algorithm>

#include "simd.h"

namespace vjepa {

// 2^x for x <= 0, relative error under 2e-7 down to -125, constant below: 2^n times a polynomial of the rest.
VJEPA_INLINE float exp2_negative(float x) {
  x = std::max(x, -125.f);
  const float shifted = x + 12582912.f;  // 1.5 * 2^23: rounds x to an integer, which lies in the low bits
  const float r = x - (shifted - 12582912.f);
  const float p = 1.f + r * (0.693147182f + r * (0.240226462f + r * (0.0555032869f + r * (0.00961842445f +
                  r * (0.00133998913f + r * 0.000154034715f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // the exponent of 2^n; what lies above the low bits is shifted out
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

constexpr float kLog2E = 1.44269504f;

// e^x for x <= 0; the product costs an error of 6e-8 times x.
VJEPA_INLINE float exp_negative(float x) { return exp2_negative(x * kLog2E); }

}  // namespace vjepa
