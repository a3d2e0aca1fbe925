// The exact GELU and its slope.
#pragma once
#include <cmath>

#include "exp.h"

namespace vjepa {

struct Normal {
  float cdf, density;  // of the standard normal distribution at x
};

// The lower tail by Abramowitz and Stegun 7.1.26 (absolute error 1e-7, falling with the density), the upper by symmetry.
VJEPA_INLINE Normal normal(float x) {
  const float size = std::fabs(x), e = exp_negative(-0.5f * x * x);
  const float k = 1.f / (1.f + 0.231641888f * size);  // 0.3275911 / sqrt(2)
  const float tail = 0.5f * e * k * (0.254829592f + k * (-0.284496736f + k * (1.421413741f + k * (-1.453152027f +
                     k * 1.061405429f))));
  return {x > 0.f ? 1.f - tail : tail, 0.398942280f * e};
}

// a = gelu(h); they may be one
VJEPA_INLINE void gelu(const float* h, float* a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = h[i] * normal(h[i]).cdf;
}

// a = gelu(h); g *= gelu'(h)
VJEPA_INLINE void gelu_backward(const float* h, float* g, float* a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Normal p = normal(h[i]);
    a[i] = h[i] * p.cdf;
    g[i] *= p.cdf + h[i] * p.density;
  }
}

}  // namespace vjepa
