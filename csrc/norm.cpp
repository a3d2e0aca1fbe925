// Normalisations on the CPU (vjepa_fast/ops/norm.py): target_norm, forward and backward, and LayerNorm with affine, again
// and backward, for a transformer block. Rows of channels in parallel, each read from memory once; the further passes over
// a row find it in the cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "op.h"
#include "simd.h"

namespace {

using vjepa::down;
using vjepa::Tensor;
using vjepa::up;

// -- target_norm -------------------------------------------------------------------------------------------------------
struct Moments {
  float mean, rstd;
};

// The sum of the deviations corrects the first mean, and with it the variance, for what rounding left.
template <class S>
VJEPA_INLINE Moments moments(const S* x, int64_t E, float eps) {
  float sum = 0.f, rest = 0.f, squares = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < E; ++i) sum += up(x[i]);
  const float first = sum / float(E);
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t i = 0; i < E; ++i) {
    const float c = up(x[i]) - first;
    rest += c;
    squares += c * c;
  }
  const float shift = rest / float(E);
  return {first + shift, 1.f / std::sqrt(squares / float(E) - shift * shift + eps)};
}

template <class S>
VJEPA_CLONES void forward(const S* x, S* out, int64_t rows, int64_t E, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += E, out += E) {
    const Moments m = moments(x, E, eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < E; ++i) out[i] = down<S>((up(x[i]) - m.mean) * m.rstd);
  }
}

template <class S>
VJEPA_CLONES void backward(const S* x, const S* grad, S* out, int64_t rows, int64_t E, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += E, grad += E, out += E) {
    const Moments m = moments(x, E, eps);
    float sum = 0.f, dot = 0.f;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < E; ++i) {
      sum += up(grad[i]);
      dot += up(grad[i]) * ((up(x[i]) - m.mean) * m.rstd);
    }
    sum /= float(E);
    dot /= float(E);
#pragma GCC ivdep
    for (int64_t i = 0; i < E; ++i)
      out[i] = down<S>(m.rstd * (up(grad[i]) - sum - (up(x[i]) - m.mean) * m.rstd * dot));
  }
}

int64_t numel(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i < x.dim(); ++i) n *= x.size(i);
  return n;
}

// Each run of E = D / levels channels of h [...,D] is a row. grad null: h normalised; else the gradient of h.
void run(const Tensor& h, const Tensor* grad, int64_t levels, double eps, const Tensor& out) {
  const Tensor x = h.contiguous(), g = grad ? grad->contiguous() : x;
  const int64_t n = numel(x), D = x.dim() ? x.size(x.dim() - 1) : 0;
  vjepa::check(levels > 0 && D > 0 && D % levels == 0, "target_norm: D must be a multiple of levels");
  for (const Tensor* t : {&g, &out})
    vjepa::check(t->dtype() == x.dtype() && numel(*t) == n, "target_norm: gradient and result must be like h");
  vjepa::check(out.contiguous().data<void>() == out.data<void>(), "target_norm: out must be contiguous");
  const int64_t E = D / levels;
  vjepa::by_dtype(x, [&](auto type) {
    using S = typename decltype(type)::of;
    const S *from = x.data<S>(), *upstream = g.data<S>();
    S* to = out.mutable_data<S>();
    vjepa::parallel_for(0, n / E, std::max<int64_t>(1, 16384 / E), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * E, rows = end - begin;
      if (grad)
        backward(from + at, upstream + at, to + at, rows, E, float(eps));
      else
        forward(from + at, to + at, rows, E, float(eps));
    });
  });
}

void target_norm(const Tensor& h, int64_t levels, double eps, const Tensor& out) {
  run(h, nullptr, levels, eps, out);
}

void target_norm_backward(const Tensor& h, const Tensor& grad, int64_t levels, double eps, const Tensor& out) {
  run(h, &grad, levels, eps, out);
}

// -- LayerNorm with affine: rows in chunks of a fixed size, so that sums over rows do not depend on the number of threads --
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

const vjepa::Add<&target_norm> added("target_norm",
                                     "target_norm(Tensor h, int levels, float eps, Tensor(a!) out) -> ()");
const vjepa::Add<&target_norm_backward> added_backward(
    "target_norm_backward",
    "target_norm_backward(Tensor h, Tensor grad, int levels, float eps, Tensor(a!) out) -> ()");
const vjepa::Add<&norm_again> add_norm_again(
    "norm_again", "norm_again(Tensor x, Tensor mean, Tensor rstd, Tensor w, Tensor b, Tensor(a!) out) -> ()");
const vjepa::Add<&norm_backward> add_norm_backward(
    "norm_backward", "norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor w, Tensor(a!) dx, "
                     "Tensor(b!) dw, Tensor(c!) db) -> ()");

}  // namespace
