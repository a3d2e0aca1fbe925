// AdamW and the moving average behind it on the CPU, in one pass: chunks of all tensors in parallel, each number read and
// written once; and the norm of the gradients. Results do not depend on the number of threads.
#include "op.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

using vjepa::bf16;

constexpr int64_t kChunk = 16384;  // numbers; 0.5 MB of traffic

struct Row {  // of the table that Python hands over: addresses of a parameter and what goes with it
  float* p;
  const float* g;
  float *m, *v;
  float* target;  // null: none
  bf16* low;      // null: none
  int64_t n;
};
static_assert(sizeof(Row) == 7 * sizeof(int64_t), "the table is int64 [rows,7]");

struct Rule {
  float keep, gain1, beta2, gain2, pace, root, eps, follow, scale;
};

// target <- lerp(target, p, follow), exact at both ends: where they are equal, and where follow is 1.
VJEPA_INLINE float towards(float target, float p, float follow) {
  return follow < 0.5f ? target + follow * (p - target) : p - (1.f - follow) * (p - target);
}

template <bool with_target, bool with_low>
VJEPA_CLONES void update(Row row, int64_t begin, int64_t end, Rule r) {
  float *p = row.p, *m = row.m, *v = row.v, *target = row.target;
  const float* g = row.g;
  bf16* low = row.low;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float d = g[i] * r.scale;
    const float first = m[i] + r.gain1 * (d - m[i]);
    const float second = r.beta2 * v[i] + r.gain2 * d * d;
    const float now = p[i] * r.keep - r.pace * first / (std::sqrt(second) * r.root + r.eps);
    m[i] = first;
    v[i] = second;
    p[i] = now;
    if constexpr (with_target) {
      const float t = towards(target[i], now, r.follow);
      target[i] = t;
      if constexpr (with_low) low[i] = vjepa::down<bf16>(t);
    }
  }
}

// fn(tensor, begin, end, number of the chunk) for every chunk of tensors of so many numbers, in parallel
template <class Sizes, class F>
void by_chunks(int64_t tensors, const Sizes& size, const F& fn) {
  std::vector<std::pair<int64_t, int64_t>> chunks;  // tensor, first number
  for (int64_t k = 0; k < tensors; ++k)
    for (int64_t at = 0; at < size(k); at += kChunk) chunks.emplace_back(k, at);
  vjepa::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const auto [k, at] = chunks[static_cast<size_t>(c)];
      fn(k, at, std::min(size(k), at + kChunk), c);
    }
  });
}

const int64_t* table_of(const vjepa::Tensor& rows, int64_t columns) {
  bool dense;
  vjepa::ok(aoti_torch_is_contiguous(rows.get(), &dense));
  vjepa::check(dense && rows.dtype() == aoti_torch_dtype_int64() && rows.dim() == 2 && rows.size(1) == columns,
               "rows must be contiguous int64 [n,", columns, "]");
  return rows.data<int64_t>();
}

// rows [n,7] as Row; scale: one float, or empty for 1. bias1, bias2: 1 - beta ** step.
void adamw_ema(const vjepa::Tensor& rows, double lr, double beta1, double beta2, double eps, double weight_decay,
               double bias1, double bias2, double follow, const vjepa::Tensor& scale) {
  const Row* row = reinterpret_cast<const Row*>(table_of(rows, 7));
  int64_t given;
  vjepa::ok(aoti_torch_get_numel(scale.get(), &given));
  vjepa::check(given <= 1 && scale.dtype() == aoti_torch_dtype_float32(), "adamw_ema: scale must be one float32");
  const Rule rule{float(1. - lr * weight_decay), float(1. - beta1), float(beta2), float(1. - beta2), float(lr / bias1),
                  float(1. / std::sqrt(bias2)), float(eps), float(follow), given ? scale.data<float>()[0] : 1.f};
  by_chunks(rows.size(0), [&](int64_t k) { return row[k].n; }, [&](int64_t k, int64_t begin, int64_t end, int64_t) {
    if (row[k].low)
      update<true, true>(row[k], begin, end, rule);
    else if (row[k].target)
      update<true, false>(row[k], begin, end, rule);
    else
      update<false, false>(row[k], begin, end, rule);
  });
}

VJEPA_CLONES double sum_of_squares(const float* x, int64_t n) {
  double sum = 0.;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * double(x[i]);
  return sum;
}

// rows [n,2]: addresses of float32 tensors and their numbers of elements -> out[0], the norm over all of them
void total_norm(const vjepa::Tensor& rows, const vjepa::Tensor& out) {
  const int64_t* row = table_of(rows, 2);
  vjepa::check(out.dtype() == aoti_torch_dtype_float32(), "total_norm: out must be float32");
  const auto size = [&](int64_t k) { return row[2 * k + 1]; };
  int64_t chunks = 0;
  for (int64_t k = 0; k < rows.size(0); ++k) chunks += (size(k) + kChunk - 1) / kChunk;
  std::vector<double> parts(static_cast<size_t>(chunks));
  by_chunks(rows.size(0), size, [&](int64_t k, int64_t begin, int64_t end, int64_t c) {
    parts[static_cast<size_t>(c)] = sum_of_squares(reinterpret_cast<const float*>(row[2 * k]) + begin, end - begin);
  });
  double sum = 0.;
  for (double part : parts) sum += part;
  out.mutable_data<float>()[0] = float(std::sqrt(sum));
}

const vjepa::Add<&adamw_ema> added(
    "adamw_ema", "adamw_ema(Tensor rows, float lr, float beta1, float beta2, float eps, float weight_decay, "
                 "float bias1, float bias2, float follow, Tensor scale) -> ()");
const vjepa::Add<&total_norm> added_norm("total_norm", "total_norm(Tensor rows, Tensor(a!) out) -> ()");

}  // namespace
