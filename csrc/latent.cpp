// The latent losses on the CPU: rows of the TOKEN, PAIR and COLUMN skeletons and their gradients (vjepa_fast/ops/latent.py
// says what they compute). Tokens in parallel; a token's channels go level by level through buffers that stay in the L1
// cache, so every feature is read from memory once. The functions are listed below under the numbers that the
// RowFunctions of the objectives carry in `cpp`.
//
// B batch, K tokens of a mask, N grid tokens, D = levels * E channels, P columns, T time steps, R calls.
#include <algorithm>
#include <cmath>
#include <vector>

#include "op.h"
#include "simd.h"

namespace {

using vjepa::bf16;
using vjepa::Tensor;

constexpr float kEps = 1e-5f;  // of the normalisation per level
constexpr int64_t kGrain = 8;  // tokens per task

VJEPA_INLINE float sign(float d) { return static_cast<float>(d > 0.f) - static_cast<float>(d < 0.f); }

// -- one level of a row in float32 -------------------------------------------------------------------------------------
VJEPA_CLONES void widen(const bf16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = vjepa::up(from[i]);
}

VJEPA_CLONES void narrow(const float* from, bf16* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = vjepa::down<bf16>(from[i]);
}

VJEPA_CLONES void normalise(const float* from, float* to, int64_t n) {
  float sum = 0.f, square = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += from[i];
  const float mean = sum / static_cast<float>(n);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += (from[i] - mean) * (from[i] - mean);
  const float scale = 1.f / std::sqrt(square / static_cast<float>(n) + kEps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = (from[i] - mean) * scale;
}

// Rows [*, D] of float or bf16 as float32, a level at a time.
class Rows {
 public:
  Rows(const Tensor& x, int64_t levels, bool norm)
      : floats_(x.dtype() == aoti_torch_dtype_float32()), norm_(norm), d_(x.size(x.dim() - 1)), e_(d_ / levels),
        f32_(floats_ ? x.data<float>() : nullptr), b16_(floats_ ? nullptr : x.data<bf16>()) {
    vjepa::check(floats_ || x.dtype() == aoti_torch_dtype_bfloat16(), "latent loss: float32 or bfloat16 expected");
  }

  // Level `l` of row `r`; `buffer` [E] may or may not be used.
  const float* get(int64_t r, int64_t l, float* buffer) const {
    const int64_t at = r * d_ + l * e_;
    const float* from = f32_ + at;
    if (!floats_) {
      widen(b16_ + at, buffer, e_);
      from = buffer;
    }
    if (!norm_) return from;
    normalise(from, buffer, e_);
    return buffer;
  }

 private:
  bool floats_, norm_;
  int64_t d_, e_;
  const float* f32_;
  const bf16* b16_;
};

// Where gradients go: float32 rows are written in place, bf16 ones through a buffer.
class Gradient {
 public:
  Gradient(const Tensor& x, int64_t levels)
      : floats_(x.dtype() == aoti_torch_dtype_float32()), d_(x.size(x.dim() - 1)), e_(d_ / levels),
        f32_(floats_ ? x.mutable_data<float>() : nullptr), b16_(floats_ ? nullptr : x.mutable_data<bf16>()) {
    vjepa::check(floats_ || x.dtype() == aoti_torch_dtype_bfloat16(), "latent loss: float32 or bfloat16 expected");
  }

  float* begin(int64_t r, int64_t l, float* buffer) const { return floats_ ? f32_ + r * d_ + l * e_ : buffer; }
  void end(int64_t r, int64_t l, const float* buffer) const {
    if (!floats_) narrow(buffer, b16_ + r * d_ + l * e_, e_);
  }

 private:
  bool floats_;
  int64_t d_, e_;
  float* f32_;
  bf16* b16_;
};

VJEPA_CLONES void subtract(const float* a, const float* b, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

// -- TOKEN: functions of (x, y) ----------------------------------------------------------------------------------------
enum TokenFunction { kL1, kSquare, kPower };

VJEPA_CLONES float l1_sum(const float* x, const float* y, int64_t n) {
  float s = 0.f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += std::fabs(x[i] - y[i]);
  return s;
}

VJEPA_CLONES float l1_sum_sign(const float* x, const float* y, int8_t* slope, int64_t n) {
  float s = 0.f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - y[i];
    s += std::fabs(d);
    slope[i] = static_cast<int8_t>((d > 0.f) - (d < 0.f));
  }
  return s;
}

VJEPA_CLONES float square_sum(const float* x, const float* y, int64_t n) {
  float s = 0.f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += (x[i] - y[i]) * (x[i] - y[i]);
  return 0.5f * s;
}

float power_sum(const float* x, const float* y, float p, int64_t n) {
  float s = 0.f;
  for (int64_t i = 0; i < n; ++i) s += std::pow(std::fabs(x[i] - y[i]), p);
  return s / p;
}

VJEPA_CLONES void square_slope(const float* x, const float* y, float g, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = g * (x[i] - y[i]);
}

void power_slope(const float* x, const float* y, float p, float g, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - y[i];
    out[i] = g * sign(d) * std::pow(std::fabs(d), p - 1.f);
  }
}

VJEPA_CLONES void scale_signs(const int8_t* s, float g, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = g * static_cast<float>(s[i]);
}

// The target of a token: its own row of h (0), the row one time step later (1), or the difference (2).
struct Target {
  const Rows& h;
  int64_t kind, places;

  const float* get(int64_t row, int64_t l, float* a, float* b, int64_t e) const {
    if (kind == 0) return h.get(row, l, a);
    const float* next = h.get(row + places, l, a);
    if (kind == 1) return next;
    subtract(next, h.get(row, l, b), a, e);
    return a;
  }
};

void check_targets(const Tensor& h, const Tensor& idx, const Tensor& after, int64_t kind, int64_t places) {
  const int64_t n = h.size(1), count = idx.size(0) * idx.size(1), last = kind == 0 ? n : n - places;
  const int64_t* i = idx.data<int64_t>();
  const int64_t* a = after.size(0) ? after.data<int64_t>() : nullptr;
  for (int64_t r = 0; r < count; ++r)
    vjepa::check((a && a[r] < 0) || (i[r] >= 0 && i[r] < last), "latent loss: a token index lies outside the grid");
}

void token_forward(const Tensor& z, const Tensor& h, const Tensor& idx, const Tensor& after, const Tensor& rows,
                   const Tensor& slopes, int64_t fn, double p, int64_t target, int64_t places, int64_t levels,
                   bool norm) {
  check_targets(h, idx, after, target, places);
  const int64_t K = idx.size(1), N = h.size(1), D = z.size(2), E = D / levels;
  const Rows x(z, levels, false), y(h, levels, norm);
  const int64_t* i = idx.data<int64_t>();
  const int64_t* a = after.size(0) ? after.data<int64_t>() : nullptr;
  int8_t* s = slopes.size(0) ? slopes.mutable_data<int8_t>() : nullptr;
  float* out = rows.mutable_data<float>();
  const Target target_of{y, target, places};
  vjepa::parallel_for(0, idx.size(0) * K, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> b0(E), b1(E), b2(E);
    for (int64_t r = begin; r < end; ++r) {
      if (a && a[r] < 0) {
        out[r] = 0.f;
        if (s) std::fill_n(s + r * D, D, int8_t{0});
        continue;
      }
      double sum = 0;
      for (int64_t l = 0; l < levels; ++l) {
        const float* u = x.get(r, l, b0.data());
        const float* v = target_of.get(r / K * N + i[r], l, b1.data(), b2.data(), E);
        if (fn == kL1)
          sum += s ? l1_sum_sign(u, v, s + r * D + l * E, E) : l1_sum(u, v, E);
        else
          sum += fn == kSquare ? square_sum(u, v, E) : power_sum(u, v, static_cast<float>(p), E);
      }
      out[r] = static_cast<float>(sum / static_cast<double>(D));
    }
  });
}

void token_sign(const Tensor& grad, const Tensor& slopes, const Tensor& dz) {
  const int64_t M = slopes.size(0) * slopes.size(1), D = slopes.size(2);
  const float* g = grad.data<float>();
  const int8_t* s = slopes.data<int8_t>();
  const Gradient to(dz, 1);
  vjepa::parallel_for(0, M, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(D);
    for (int64_t r = begin; r < end; ++r) {
      scale_signs(s + r * D, g[r] / static_cast<float>(D), to.begin(r, 0, buffer.data()), D);
      to.end(r, 0, buffer.data());
    }
  });
}

void token_backward(const Tensor& grad, const Tensor& z, const Tensor& h, const Tensor& idx, const Tensor& after,
                    const Tensor& dz, int64_t fn, double p, int64_t target, int64_t places, int64_t levels,
                    bool norm) {
  check_targets(h, idx, after, target, places);
  vjepa::check(fn == kSquare || fn == kPower, "latent loss: the function keeps its slopes");
  const int64_t K = idx.size(1), N = h.size(1), D = z.size(2), E = D / levels;
  const Rows x(z, levels, false), y(h, levels, norm);
  const Gradient to(dz, levels);
  const float* g = grad.data<float>();
  const int64_t* i = idx.data<int64_t>();
  const int64_t* a = after.size(0) ? after.data<int64_t>() : nullptr;
  const Target target_of{y, target, places};
  vjepa::parallel_for(0, idx.size(0) * K, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> b0(E), b1(E), b2(E), b3(E);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t l = 0; l < levels; ++l) {
        float* o = to.begin(r, l, b3.data());
        if (a && a[r] < 0) {
          std::fill_n(o, E, 0.f);
        } else {
          const float* u = x.get(r, l, b0.data());
          const float* v = target_of.get(r / K * N + i[r], l, b1.data(), b2.data(), E);
          const float scale = g[r] / static_cast<float>(D);
          if (fn == kSquare)
            square_slope(u, v, scale, o, E);
          else
            power_slope(u, v, static_cast<float>(p), scale, o, E);
        }
        to.end(r, l, b3.data());
      }
  });
}

// -- PAIR: functions of (z0, z1, h0, h1) -------------------------------------------------------------------------------
enum PairFunction { kStep, kDelta, kHuber, kZZ, kZH, kZHLater, kHH, kHHLater, kSpeed, kPairFunctions };
constexpr float kHuberDelta = 0.1f;

struct Pair {  // one level of the four rows; those that a function does not read may be null
  const float *z0, *z1, *h0, *h1;
};

bool reads_z(int64_t fn) { return fn <= kZHLater; }
bool reads_h(int64_t fn) { return fn == kDelta || fn >= kZH; }

// sum over [lo, hi) of f(i)
#define VJEPA_SUM(expression)              \
  {                                        \
    float s = 0.f;                         \
    _Pragma("omp simd reduction(+ : s)")   \
    for (int64_t i = lo; i < hi; ++i) s += (expression); \
    return s;                              \
  }

VJEPA_INLINE float huber(float d) {
  const float size = std::fabs(d);
  return size <= kHuberDelta ? 0.5f * d * d : kHuberDelta * (size - 0.5f * kHuberDelta);
}

VJEPA_CLONES float pair_sum(int64_t fn, const Pair& x, int64_t lo, int64_t hi) {
  const float *z0 = x.z0, *z1 = x.z1, *h0 = x.h0, *h1 = x.h1;
  switch (fn) {
    case kStep: VJEPA_SUM(std::fabs(z1[i] - z0[i]))
    case kDelta: VJEPA_SUM(std::fabs((z1[i] - z0[i]) - (h1[i] - h0[i])))
    case kHuber: VJEPA_SUM(huber(z1[i] - z0[i]))
    case kZZ: VJEPA_SUM(z0[i] * z0[i])
    case kZH: VJEPA_SUM(z0[i] * h0[i])
    case kZHLater: VJEPA_SUM(z0[i] * h1[i])
    case kHH: VJEPA_SUM(h0[i] * h0[i])
    case kHHLater: VJEPA_SUM(h1[i] * h1[i])
    default: VJEPA_SUM((h1[i] - h0[i]) * (h1[i] - h0[i]))
  }
}
#undef VJEPA_SUM

#define VJEPA_ADD(expression)                                    \
  {                                                              \
    _Pragma("omp simd") for (int64_t i = lo; i < hi; ++i) out[i] += g * (expression); \
    return;                                                      \
  }

// out += g d/dz0 and out += g d/dz1
VJEPA_CLONES void pair_slope_0(int64_t fn, const Pair& x, float g, float* out, int64_t lo, int64_t hi) {
  const float *z0 = x.z0, *z1 = x.z1, *h0 = x.h0, *h1 = x.h1;
  switch (fn) {
    case kStep: VJEPA_ADD(sign(z0[i] - z1[i]))
    case kDelta: VJEPA_ADD(-sign((z1[i] - z0[i]) - (h1[i] - h0[i])))
    case kHuber: VJEPA_ADD(std::max(-kHuberDelta, std::min(kHuberDelta, z0[i] - z1[i])))
    case kZZ: VJEPA_ADD(2.f * z0[i])
    case kZH: VJEPA_ADD(h0[i])
    case kZHLater: VJEPA_ADD(h1[i])
    default: return;
  }
}

VJEPA_CLONES void pair_slope_1(int64_t fn, const Pair& x, float g, float* out, int64_t lo, int64_t hi) {
  const float *z0 = x.z0, *z1 = x.z1, *h0 = x.h0, *h1 = x.h1;
  switch (fn) {
    case kStep: VJEPA_ADD(sign(z1[i] - z0[i]))
    case kDelta: VJEPA_ADD(sign((z1[i] - z0[i]) - (h1[i] - h0[i])))
    case kHuber: VJEPA_ADD(std::max(-kHuberDelta, std::min(kHuberDelta, z1[i] - z0[i])))
    default: return;
  }
}
#undef VJEPA_ADD

struct Call {  // a function, its window of channels and their number
  int64_t fn, low, high, period;
  float count;

  // The window in level l: channels [lo, hi) of its E.
  std::pair<int64_t, int64_t> in_level(int64_t l, int64_t e) const {
    if (period == e) return {low, high};
    const auto clip = [&](int64_t c) { return std::max<int64_t>(0, std::min(e, c - l * e)); };
    return {clip(low), clip(high)};
  }
};

std::vector<Call> read_calls(const Tensor& table, int64_t d, int64_t e) {  // int64 [R,4]: fn, low, high, period
  std::vector<Call> calls;
  const int64_t* t = table.data<int64_t>();
  for (int64_t r = 0; r < table.size(0); ++r, t += 4) {
    vjepa::check(t[0] >= 0 && t[0] < kPairFunctions, "latent loss: unknown pair function");
    vjepa::check((t[3] == d || t[3] == e) && 0 <= t[1] && t[1] < t[2] && t[2] <= t[3], "latent loss: bad window");
    calls.push_back({t[0], t[1], t[2], t[3], static_cast<float>((t[2] - t[1]) * (d / t[3]))});
  }
  return calls;
}

struct PairInputs {
  Rows z, h;
  int64_t K, N, D, E, M, places;
  const int64_t *idx, *after, *before;
  std::vector<Call> calls;
  bool any_z, any_h;

  PairInputs(const Tensor& z_, const Tensor& h_, const Tensor& idx_, const Tensor& after_, const Tensor* before_,
             const Tensor& table, int64_t places_, int64_t levels, bool norm)
      : z(z_, levels, false), h(h_, levels, norm), K(idx_.size(1)), N(h_.size(1)), D(z_.size(2)), E(D / levels),
        M(idx_.size(0) * K), places(places_), idx(idx_.data<int64_t>()), after(after_.data<int64_t>()),
        before(before_ ? before_->data<int64_t>() : nullptr), calls(read_calls(table, D, E)), any_z(false),
        any_h(false) {
    for (const Call& c : calls) any_z |= reads_z(c.fn), any_h |= reads_h(c.fn);
    for (int64_t r = 0; r < M; ++r) {
      const int64_t n = idx[r], later = after[r], earlier = before ? before[r] : -1;
      vjepa::check(later < K && earlier < K, "latent loss: a row of z lies outside the mask");
      vjepa::check(n >= 0 && n < N && (later < 0 || n + places < N) && (earlier < 0 || n >= places),
                   "latent loss: a token index lies outside the grid");
    }
  }

  // Level l of the pair that token r starts; b [4 * E] may be used as buffers.
  Pair start(int64_t r, int64_t l, float* b) const {
    const int64_t sample = r / K, token = sample * N + idx[r];
    Pair x{nullptr, nullptr, nullptr, nullptr};
    if (any_z) x.z0 = z.get(r, l, b), x.z1 = z.get(sample * K + after[r], l, b + E);
    if (any_h) x.h0 = h.get(token, l, b + 2 * E), x.h1 = h.get(token + places, l, b + 3 * E);
    return x;
  }
  // The pair that token r ends.
  Pair finish(int64_t r, int64_t l, float* b) const {
    const int64_t sample = r / K, token = sample * N + idx[r];
    Pair x{nullptr, nullptr, nullptr, nullptr};
    if (any_z) x.z0 = z.get(sample * K + before[r], l, b), x.z1 = z.get(r, l, b + E);
    if (any_h) x.h0 = h.get(token - places, l, b + 2 * E), x.h1 = h.get(token, l, b + 3 * E);
    return x;
  }
};

void pair_forward(const Tensor& z, const Tensor& h, const Tensor& idx, const Tensor& after, const Tensor& table,
                  const Tensor& rows, int64_t places, int64_t levels, bool norm) {
  const PairInputs x(z, h, idx, after, nullptr, table, places, levels, norm);
  const int64_t R = static_cast<int64_t>(x.calls.size());
  float* out = rows.mutable_data<float>();
  vjepa::parallel_for(0, x.M, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(4 * x.E);
    std::vector<double> sums(R);
    for (int64_t r = begin; r < end; ++r) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t l = 0; l < levels && x.after[r] >= 0; ++l) {
        const Pair pair = x.start(r, l, buffers.data());
        for (int64_t f = 0; f < R; ++f) {
          const auto [lo, hi] = x.calls[f].in_level(l, x.E);
          if (lo < hi) sums[f] += pair_sum(x.calls[f].fn, pair, lo, hi);
        }
      }
      for (int64_t f = 0; f < R; ++f) out[f * x.M + r] = static_cast<float>(sums[f] / x.calls[f].count);
    }
  });
}

void pair_backward(const Tensor& grad, const Tensor& z, const Tensor& h, const Tensor& idx, const Tensor& after,
                   const Tensor& before, const Tensor& table, const Tensor& dz, int64_t places, int64_t levels,
                   bool norm) {
  const PairInputs x(z, h, idx, after, &before, table, places, levels, norm);
  const int64_t R = static_cast<int64_t>(x.calls.size());
  const float* g = grad.data<float>();
  const Gradient to(dz, levels);
  vjepa::parallel_for(0, x.M, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(5 * x.E);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t l = 0; l < levels; ++l) {
        float* out = to.begin(r, l, buffers.data() + 4 * x.E);
        std::fill_n(out, x.E, 0.f);
        if (x.after[r] >= 0) {
          const Pair pair = x.start(r, l, buffers.data());
          for (int64_t f = 0; f < R; ++f) {
            const auto [lo, hi] = x.calls[f].in_level(l, x.E);
            if (lo < hi) pair_slope_0(x.calls[f].fn, pair, g[f * x.M + r] / x.calls[f].count, out, lo, hi);
          }
        }
        if (x.before[r] >= 0) {
          const int64_t first = r / x.K * x.K + x.before[r];
          const Pair pair = x.finish(r, l, buffers.data());
          for (int64_t f = 0; f < R; ++f) {
            const auto [lo, hi] = x.calls[f].in_level(l, x.E);
            if (lo < hi) pair_slope_1(x.calls[f].fn, pair, g[f * x.M + first] / x.calls[f].count, out, lo, hi);
          }
        }
        to.end(r, l, out);
      }
  });
}

// -- COLUMN: functions of all time steps of a place --------------------------------------------------------------------
// The one function: sum over f of the modulus of the f-th line, constants [2F,T] being the weighted cosines and sines.
// gap [T,E] -> sum over channels of the value; with `slope` [T,E] also g times its derivative.
VJEPA_CLONES float spectrum(const float* gap, const float* constants, int64_t F, int64_t T, int64_t E, float* real,
                            float* imaginary, float g, float* slope) {
  float s = 0.f;
  if (slope) std::fill_n(slope, T * E, 0.f);
  for (int64_t f = 0; f < F; ++f) {
    const float *cosine = constants + f * T, *sine = constants + (F + f) * T;
    std::fill_n(real, E, 0.f);
    std::fill_n(imaginary, E, 0.f);
    for (int64_t t = 0; t < T; ++t) {
      const float *x = gap + t * E, c = cosine[t], d = sine[t];
#pragma omp simd
      for (int64_t i = 0; i < E; ++i) {
        real[i] += c * x[i];
        imaginary[i] += d * x[i];
      }
    }
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < E; ++i) {
      const float modulus = std::sqrt(real[i] * real[i] + imaginary[i] * imaginary[i]);
      const float inverse = modulus > 0.f ? g / modulus : 0.f;
      s += modulus;
      real[i] *= inverse;
      imaginary[i] *= inverse;
    }
    for (int64_t t = 0; slope && t < T; ++t) {
      float* out = slope + t * E;
      const float c = cosine[t], d = sine[t];
#pragma omp simd
      for (int64_t i = 0; i < E; ++i) out[i] += c * real[i] + d * imaginary[i];
    }
  }
  return s;
}

struct Columns {
  Rows z, h;
  int64_t B, P, T, K, N, D, E, F;
  const int64_t *slots, *tokens;
  const float* constants;

  Columns(const Tensor& z_, const Tensor& h_, const Tensor& slots_, const Tensor& tokens_, const Tensor& constants_,
          int64_t fn, int64_t levels, bool norm)
      : z(z_, levels, false), h(h_, levels, norm), B(slots_.size(0)), P(slots_.size(1)), T(slots_.size(2)),
        K(z_.size(1)), N(h_.size(1)), D(z_.size(2)), E(D / levels), F(constants_.size(0) / 2),
        slots(slots_.data<int64_t>()), tokens(tokens_.data<int64_t>()), constants(constants_.data<float>()) {
    vjepa::check(fn == 0, "latent loss: unknown column function");
    for (int64_t r = 0; r < B * P; ++r)
      for (int64_t n = r * T; n < (r + 1) * T && slots[r * T] >= 0; ++n)
        vjepa::check(slots[n] >= 0 && slots[n] < K && tokens[n] >= 0 && tokens[n] < N,
                     "latent loss: an index of a column lies outside");
  }

  // Level l of z - h of column r into gap [T,E].
  void gap(int64_t r, int64_t l, float* out, float* a, float* b) const {
    for (int64_t t = 0; t < T; ++t)
      subtract(z.get(r / P * K + slots[r * T + t], l, a), h.get(r / P * N + tokens[r * T + t], l, b), out + t * E, E);
  }
};

void column_forward(const Tensor& z, const Tensor& h, const Tensor& slots, const Tensor& tokens,
                    const Tensor& constants, const Tensor& rows, int64_t fn, int64_t levels, bool norm) {
  const Columns x(z, h, slots, tokens, constants, fn, levels, norm);
  float* out = rows.mutable_data<float>();
  vjepa::parallel_for(0, x.B * x.P, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> gap(x.T * x.E), a(x.E), b(x.E);
    for (int64_t r = begin; r < end; ++r) {
      double sum = 0;
      for (int64_t l = 0; l < levels && x.slots[r * x.T] >= 0; ++l) {
        x.gap(r, l, gap.data(), a.data(), b.data());
        sum += spectrum(gap.data(), x.constants, x.F, x.T, x.E, a.data(), b.data(), 0.f, nullptr);
      }
      out[r] = static_cast<float>(sum / static_cast<double>(x.D));
    }
  });
}

// dz must be 0 before.
void column_backward(const Tensor& grad, const Tensor& z, const Tensor& h, const Tensor& slots, const Tensor& tokens,
                     const Tensor& constants, const Tensor& dz, int64_t fn, int64_t levels, bool norm) {
  const Columns x(z, h, slots, tokens, constants, fn, levels, norm);
  const float* g = grad.data<float>();
  const Gradient to(dz, levels);
  vjepa::parallel_for(0, x.B * x.P, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> gap(x.T * x.E), slope(x.T * x.E), a(x.E), b(x.E), row(x.E);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t l = 0; l < levels && x.slots[r * x.T] >= 0; ++l) {
        x.gap(r, l, gap.data(), a.data(), b.data());
        spectrum(gap.data(), x.constants, x.F, x.T, x.E, a.data(), b.data(), g[r] / static_cast<float>(x.D),
                 slope.data());
        for (int64_t t = 0; t < x.T; ++t) {
          const int64_t slot = r / x.P * x.K + x.slots[r * x.T + t];
          std::copy_n(slope.data() + t * x.E, x.E, to.begin(slot, l, row.data()));
          to.end(slot, l, row.data());
        }
      }
  });
}

const vjepa::Add<&token_forward> add_token(
    "latent_token", "latent_token(Tensor z, Tensor h, Tensor idx, Tensor after, Tensor(a!) rows, Tensor(b!) slopes, "
                    "int fn, float p, int target, int places, int levels, bool norm) -> ()");
const vjepa::Add<&token_sign> add_token_sign("latent_token_sign",
                                             "latent_token_sign(Tensor grad, Tensor slopes, Tensor(a!) dz) -> ()");
const vjepa::Add<&token_backward> add_token_backward(
    "latent_token_backward", "latent_token_backward(Tensor grad, Tensor z, Tensor h, Tensor idx, Tensor after, "
                             "Tensor(a!) dz, int fn, float p, int target, int places, int levels, bool norm) -> ()");
const vjepa::Add<&pair_forward> add_pair(
    "latent_pair", "latent_pair(Tensor z, Tensor h, Tensor idx, Tensor after, Tensor calls, Tensor(a!) rows, "
                   "int places, int levels, bool norm) -> ()");
const vjepa::Add<&pair_backward> add_pair_backward(
    "latent_pair_backward", "latent_pair_backward(Tensor grad, Tensor z, Tensor h, Tensor idx, Tensor after, "
                            "Tensor before, Tensor calls, Tensor(a!) dz, int places, int levels, bool norm) -> ()");
const vjepa::Add<&column_forward> add_column(
    "latent_column", "latent_column(Tensor z, Tensor h, Tensor slots, Tensor tokens, Tensor constants, "
                     "Tensor(a!) rows, int fn, int levels, bool norm) -> ()");
const vjepa::Add<&column_backward> add_column_backward(
    "latent_column_backward", "latent_column_backward(Tensor grad, Tensor z, Tensor h, Tensor slots, Tensor tokens, "
                              "Tensor constants, Tensor(a!) dz, int fn, int levels, bool norm) -> ()");

}  // namespace
