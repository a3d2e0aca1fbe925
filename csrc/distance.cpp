// mask_distance on the CPU: an exact Euclidean distance transform of each sample's token grid, samples in parallel.
// Squared distances separate over the axes, so three passes of row minima replace the search over token pairs:
// N * (T + H + W) operations per sample instead of Ke * Kp. They are integers far below 2^24, thus exact in float.
#include "op.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr float kFar = 1e12f;

// to[i] = min(to[i], from[i] + add)
VJEPA_CLONES void lower(float* to, const float* from, float add, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = std::min(to[i], from[i] + add);
}

// One axis: in and out hold `size` slices of `width` values; out[i] = min over j of in[j] + (i - j)^2.
void axis_pass(const float* in, float* out, int64_t size, int64_t width) {
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) lower(out + i * width, in + j * width, float((i - j) * (i - j)), width);
}

void transform(std::vector<float>& d, std::vector<float>& tmp, int64_t T, int64_t H, int64_t W) {
  // along w: predicted tokens are rare or dense, a two-sided scan is good for both
  for (int64_t row = 0; row < T * H; ++row) {
    float* r = d.data() + row * W;
    int64_t last = -1;
    for (int64_t w = 0; w < W; ++w) {
      if (r[w] == 0.f) last = w;
      tmp[row * W + w] = last < 0 ? kFar : float((w - last) * (w - last));
    }
    last = -1;
    for (int64_t w = W; w-- > 0;) {
      if (r[w] == 0.f) last = w;
      if (last >= 0) tmp[row * W + w] = std::min(tmp[row * W + w], float((w - last) * (w - last)));
    }
  }
  std::fill(d.begin(), d.end(), kFar);
  for (int64_t t = 0; t < T; ++t) axis_pass(tmp.data() + t * H * W, d.data() + t * H * W, H, W);
  std::fill(tmp.begin(), tmp.end(), kFar);
  axis_pass(d.data(), tmp.data(), T, H * W);
}

// int64 [B,Ke], int64 [B,Kp], grid (T,H,W) -> float32 [B,Ke]: sqrt(Euclidean distance to the nearest of masks_pred /
// divisor)
vjepa::Tensor mask_distance(const vjepa::Tensor& masks_enc, const vjepa::Tensor& masks_pred, int64_t T, int64_t H,
                            int64_t W, int64_t divisor) {
  const vjepa::Tensor enc = masks_enc.contiguous(), pred = masks_pred.contiguous();
  for (const vjepa::Tensor* m : {&enc, &pred})
    vjepa::check(m->dim() == 2 && m->dtype() == aoti_torch_dtype_int64() && m->size(0) == enc.size(0),
                 "mask_distance: masks must be int64 [B,K]");
  const int64_t B = enc.size(0), Ke = enc.size(1), Kp = pred.size(1), N = T * H * W;
  vjepa::Tensor out = vjepa::empty_cpu({B, Ke}, aoti_torch_dtype_float32());
  const int64_t *e = enc.data<int64_t>(), *p = pred.data<int64_t>();
  const auto outside = [N](int64_t n) { return n < 0 || n >= N; };
  vjepa::check(std::none_of(e, e + B * Ke, outside) && std::none_of(p, p + B * Kp, outside),
               "mask_distance: a token index lies outside the grid");
  float* o = out.mutable_data<float>();
  vjepa::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> d(N), tmp(N);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(d.begin(), d.end(), kFar);
      for (int64_t k = 0; k < Kp; ++k) d[p[b * Kp + k]] = 0.f;
      transform(d, tmp, T, H, W);
      for (int64_t k = 0; k < Ke; ++k) o[b * Ke + k] = std::sqrt(std::sqrt(tmp[e[b * Ke + k]]) / float(divisor));
    }
  });
  return out;
}

const vjepa::Add<&mask_distance> added(
    "mask_distance", "mask_distance(Tensor masks_enc, Tensor masks_pred, int T, int H, int W, int divisor) -> Tensor");

}  // namespace
