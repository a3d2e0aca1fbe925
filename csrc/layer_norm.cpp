// LayerNorm with affine, again and backward, for a transformer block (vjepa_fast/layers/fused_block.py). Rows in parallel
// in chunks of a fixed size, so that sums over rows do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "op.h"
#include "simd.h"

namespace {

using vjepa::Tensor;

constexpr int64_t kChunk = 32;  // rows

int64_t rows_of(const Tensor& x, int64_t width) {
  int64_t n;
  vjepa::ok(aoti_torch_get_numel(x.get(), &n));
  vjepa::check(x.dtype() == aoti_torch_dtype_float32() && x.size(x.dim() - 1) == width && x.is_contiguous(),
               "norm: contiguous float32 [...,", width, "] expected");
  return n / width;
}

// fn(chunk, begin, end) for every chunk of rows
template <class F>
void by_chunks(int64_t rows, const F& fn) {
  vjepa::parallel_for(0, (rows + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) fn(c, c * kChunk, std::min(rows, (c + 1) * kChunk));
  });
}

void add_up(const std::vector<float>& parts, int64_t width, float* out) {
  std::fill_n(out, width, 0.f);
  for (size_t at = 0; at < parts.size(); at += static_cast<size_t>(width))
    for (int64_t i = 0; i < width; ++i) out[i] += parts[at + static_cast<size_t>(i)];
}

// -- LayerNorm ---------------------------------------------------------------------------------------------------------
VJEPA_CLONES void standardise(const float* x, const float* w, const float* b, float mean, float rstd, float* out,
                              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * rstd * w[i] + b[i];
}

// dx += d/dx of LayerNorm; dw, db += theirs
VJEPA_CLONES void norm_row_backward(const float* g, const float* x, const float* w, float mean, float rstd, float* dx,
                                    float* dw, float* db, int64_t n) {
  float sum = 0.f, dot = 0.f;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * rstd, gw = g[i] * w[i];
    sum += gw;
    dot += gw * y;
    dw[i] += g[i] * y;
    db[i] += g[i];
  }
  sum /= static_cast<float>(n);
  dot /= static_cast<float>(n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] += rstd * (g[i] * w[i] - sum - (x[i] - mean) * rstd * dot);
}

// x [rows,E], mean and rstd [rows], w and b [E] -> out [rows,E], from statistics that are known
void norm_again(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& w, const Tensor& b,
                const Tensor& out) {
  const int64_t E = x.size(x.dim() - 1), rows = rows_of(x, E);
  vjepa::check(rows_of(out, E) == rows && rows_of(w, E) == 1 && rows_of(b, E) == 1, "norm_again: shapes differ");
  const float *from = x.data<float>(), *m = mean.data<float>(), *s = rstd.data<float>();
  const float *weight = w.data<float>(), *bias = b.data<float>();
  float* to = out.mutable_data<float>();
  by_chunks(rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) standardise(from + r * E, weight, bias, m[r], s[r], to + r * E, E);
  });
}

// grad [rows,E] of the output -> dx [rows,E] += , dw and db [E] =
void norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& w,
                   const Tensor& dx, const Tensor& dw, const Tensor& db) {
  const int64_t E = x.size(x.dim() - 1), rows = rows_of(x, E);
  vjepa::check(rows_of(grad, E) == rows && rows_of(dx, E) == rows && rows_of(w, E) == 1 && rows_of(dw, E) == 1 &&
                   rows_of(db, E) == 1, "norm_backward: shapes differ");
  const float *g = grad.data<float>(), *from = x.data<float>(), *m = mean.data<float>(), *s = rstd.data<float>();
  const float* weight = w.data<float>();
  float* to = dx.mutable_data<float>();
  const size_t size = static_cast<size_t>((rows + kChunk - 1) / kChunk * E);
  std::vector<float> w_parts(size, 0.f), b_parts(size, 0.f);
  by_chunks(rows, [&](int64_t c, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      norm_row_backward(g + r * E, from + r * E, weight, m[r], s[r], to + r * E, w_parts.data() + c * E,
                        b_parts.data() + c * E, E);
  });
  add_up(w_parts, E, dw.mutable_data<float>());
  add_up(b_parts, E, db.mutable_data<float>());
}

const vjepa::Add<&norm_again> add_norm_again(
    "norm_again", "norm_again(Tensor x, Tensor mean, Tensor rstd, Tensor w, Tensor b, Tensor(a!) out) -> ()");
const vjepa::Add<&norm_backward> add_norm_backward(
    "norm_backward", "norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor w, Tensor(a!) dx, "
                     "Tensor(b!) dw, Tensor(c!) db) -> ()");

}  // namespace
