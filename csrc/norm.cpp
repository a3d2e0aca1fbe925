// target_norm on the CPU, forward and backward: rows of E channels in parallel, each read from memory once; the further
// passes over a row find it in the cache.
#include "op.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

using vjepa::down;
using vjepa::up;

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

int64_t numel(const vjepa::Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i < x.dim(); ++i) n *= x.size(i);
  return n;
}

// Each run of E = D / levels channels of h [...,D] is a row. grad null: h normalised; else the gradient of h.
void run(const vjepa::Tensor& h, const vjepa::Tensor* grad, int64_t levels, double eps, const vjepa::Tensor& out) {
  const vjepa::Tensor x = h.contiguous(), g = grad ? grad->contiguous() : x;
  const int64_t n = numel(x), D = x.dim() ? x.size(x.dim() - 1) : 0;
  vjepa::check(levels > 0 && D > 0 && D % levels == 0, "target_norm: D must be a multiple of levels");
  for (const vjepa::Tensor* t : {&g, &out})
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

void target_norm(const vjepa::Tensor& h, int64_t levels, double eps, const vjepa::Tensor& out) {
  run(h, nullptr, levels, eps, out);
}

void target_norm_backward(const vjepa::Tensor& h, const vjepa::Tensor& grad, int64_t levels, double eps,
                          const vjepa::Tensor& out) {
  run(h, &grad, levels, eps, out);
}

const vjepa::Add<&target_norm> added("target_norm",
                                     "target_norm(Tensor h, int levels, float eps, Tensor(a!) out) -> ()");
const vjepa::Add<&target_norm_backward> added_backward(
    "target_norm_backward",
    "target_norm_backward(Tensor h, Tensor grad, int levels, float eps, Tensor(a!) out) -> ()");

}  // namespace
