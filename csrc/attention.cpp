// Attention of packed queries, keys and values on the CPU, with the rotary positions applied as they are read
// (vjepa_fast/ops/attention.py). One task per sample, head and segment: its q, k and v are packed into buffers that
// stay in the cache, blocks of query rows go through softmax, and only the output, or the gradient, goes back to memory.
// The backward pass makes the probabilities again from the row sums that the forward left.
//
// B batch, K tokens, H heads, d channels of a head, E = H*d; L tokens of a segment. Buffers are padded to whole tiles of
// the product, with zeros, so that it has no edges.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "exp.h"
#include "op.h"
#include "vector.h"

namespace {

using vjepa::load;
using vjepa::store;
using vjepa::Tensor;
using vjepa::Vector;

constexpr int64_t kRows = 64;  // query rows of a block
constexpr int64_t kPad = 32;   // columns of a tile, of every instruction set

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Neighbouring channels exchanged.
template <int W, int... i>
VJEPA_INLINE typename Vector<W>::type swapped(typename Vector<W>::type v, std::integer_sequence<int, i...>) {
  return vjepa::shuffle<W, (i ^ 1)...>(v, v);
}
template <int W>
VJEPA_INLINE typename Vector<W>::type swapped(typename Vector<W>::type v) {
  return swapped<W>(v, std::make_integer_sequence<int, W>{});
}

// C [M,N] (= or +=) A [M,K] B [K,N]; A at a[m*row + k*col], M a multiple of MR, N of kPad. W floats to a vector, C tiles of
// MR rows and two vectors.
template <int W, int MR, bool add>
VJEPA_INLINE void multiply(const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
                           int64_t ldc, int64_t M, int64_t N, int64_t K) {
  using V = typename Vector<W>::type;
  for (int64_t n = 0; n < N; n += 2 * W)
    for (int64_t m = 0; m < M; m += MR) {
      V left[MR], right[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const float* at = c + (m + i) * ldc + n;
        left[i] = add ? load<W>(at) : V{};
        right[i] = add ? load<W>(at + W) : V{};
      }
      const float *u = a + m * row, *v = b + n;
      for (int64_t k = 0; k < K; ++k, u += col, v += ldb) {
        const V l = load<W>(v), r = load<W>(v + W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const float x = u[i * row];
          left[i] += x * l;
          right[i] += x * r;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        float* at = c + (m + i) * ldc + n;
        store<W>(at, left[i]);
        store<W>(at + W, right[i]);
      }
    }
}

struct Problem {
  int64_t K, H, d, period;     // of the table: K, or B*K where samples hold different tokens; 1 without positions
  const float *qkv, *out, *dout;
  const float* table;          // [period,2,d]: cosines, then sines with the sign of the rotation
  float *to, *lse, *dqkv;  // output, [B,H,K], gradient

  int64_t E() const { return H * d; }
};

struct Task {
  int64_t b, h, begin, L;
};

// out[c] = scale (x[c] cos[c] + x[c^1] sin[c]) for the channels of a head, sin being signed; ``back``: the transpose.
template <int W, bool back>
VJEPA_INLINE void turn(const float* x, const float* cos, const float* sin, float scale, float* out, int64_t d) {
  using V = typename Vector<W>::type;
  int64_t c = 0;
  for (; c + W <= d; c += W) {
    const V u = load<W>(x + c), s = load<W>(sin + c);
    store<W>(out + c, scale * (u * load<W>(cos + c) + swapped<W>(u) * (back ? swapped<W>(s) : s)));
  }
  for (; c < d; ++c) {
    const int64_t other = std::min(c ^ 1, d - 1);  // the last of an odd number has none
    out[c] = scale * (x[c] * cos[c] + x[other] * sin[back ? other : c]);
  }
}

// Row n of q (part 0) or k (1) of a head, turned by its position (ops/rope.py) and scaled.
template <int W>
VJEPA_INLINE void turned(const Problem& p, const Task& t, int64_t n, int64_t part, float scale, float* out) {
  const int64_t token = t.b * p.K + t.begin + n;
  const float* angles = p.table + token % p.period * 2 * p.d;
  turn<W, false>(p.qkv + (token * 3 + part) * p.E() + t.h * p.d, angles, angles + p.d, scale, out, p.d);
}

// The transpose of that map, for the gradient g of a turned row.
template <int W>
VJEPA_INLINE void turned_back(const Problem& p, const Task& t, int64_t n, int64_t part, float scale, const float* g) {
  const int64_t token = t.b * p.K + t.begin + n;
  const float* angles = p.table + token % p.period * 2 * p.d;
  turn<W, true>(g, angles, angles + p.d, scale, p.dqkv + (token * 3 + part) * p.E() + t.h * p.d, p.d);
}

template <int W>
VJEPA_INLINE void transpose(const float* x, int64_t rows, int64_t width, int64_t ldx, float* out, int64_t ld) {
  for (int64_t c = 0; c < width; c += W)
    for (int64_t r = 0; r < rows; r += W) {
      if (c + W <= width && r + W <= rows) {
        vjepa::transpose<W>(x + r * ldx + c, ldx, out + c * ld + r, ld);
        continue;
      }
      for (int64_t i = c; i < std::min(width, c + W); ++i)
        for (int64_t j = r; j < std::min(rows, r + W); ++j) out[i * ld + j] = x[j * ldx + i];
    }
}

// Buffers of a thread, grown as needed.
struct Space {
  std::vector<float> all;
  float* at = nullptr;

  void begin(int64_t size) {
    if (static_cast<int64_t>(all.size()) < size) all.assign(static_cast<size_t>(size), 0.f);
    at = all.data();
  }
  float* take(int64_t size, bool zero) {
    float* p = at;
    at += size;
    if (zero) std::fill_n(p, size, 0.f);
    return p;
  }
};

// 2^x for x <= 0: exp.h, W numbers at a time.
template <int W>
VJEPA_INLINE typename Vector<W>::type exp2_of(typename Vector<W>::type x) {
  using V = typename Vector<W>::type;
  using I = typename Vector<W>::ints;
  x = x < -125.f ? V{} - 125.f : x;  // so that a NaN stays one
  const V shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
  const V p = 1.f + r * (0.693147182f + r * (0.240226462f + r * (0.0555032869f + r * (0.00961842445f +
              r * (0.00133998913f + r * 0.000154034715f)))));
  return p * (V)(((I)shifted << 23) + (127 << 23));  // casts of bits
}

// x [Lp], the first L of them scores -> powers of 2 of their distances to the largest, and 0 behind
template <int W>
VJEPA_INLINE void softmax(float* x, int64_t L, int64_t Lp, float& peak, float& sum) {
  using V = typename Vector<W>::type;
  std::fill(x + L, x + Lp, -std::numeric_limits<float>::infinity());
  V a = load<W>(x), b = load<W>(x + W);
  for (int64_t n = 2 * W; n < Lp; n += 2 * W) {
    const V l = load<W>(x + n), r = load<W>(x + n + W);
    a = l > a ? l : a;
    b = r > b ? r : b;
  }
  a = a > b ? a : b;
  peak = a[0];
  for (int i = 1; i < W; ++i) peak = std::max(peak, a[i]);
  a = b = V{};
  for (int64_t n = 0; n < Lp; n += 2 * W) {
    const V l = exp2_of<W>(load<W>(x + n) - peak);
    const V r = exp2_of<W>(load<W>(x + n + W) - peak);
    store<W>(x + n, l);
    store<W>(x + n + W, r);
    a += l;
    b += r;
  }
  a += b;
  sum = 0.f;
  for (int i = 0; i < W; ++i) sum += a[i];
}

template <int W, int MR>
VJEPA_INLINE void forward_task(const Problem& p, const Task& t, Space& space) {
  const int64_t L = t.L, Lp = padded(L), d = p.d, dp = padded(d), E = p.E();
  space.begin(3 * Lp * dp + kRows * (Lp + dp));
  float *q = space.take(Lp * dp, true), *kT = space.take(dp * Lp, true), *v = space.take(Lp * dp, true);
  float *s = space.take(kRows * Lp, false), *o = space.take(kRows * dp, false);
  const float scale = vjepa::kLog2E / std::sqrt(static_cast<float>(d));  // scores are powers of 2
  for (int64_t n = 0; n < L; ++n) {
    turned<W>(p, t, n, 1, 1.f, q + n * dp);
    const float* from = p.qkv + ((t.b * p.K + t.begin + n) * 3 + 2) * E + t.h * d;
    std::copy(from, from + d, v + n * dp);
  }
  transpose<W>(q, L, dp, dp, kT, Lp);
  for (int64_t n = 0; n < L; ++n) turned<W>(p, t, n, 0, scale, q + n * dp);
  for (int64_t first = 0; first < L; first += kRows) {
    const int64_t rows = std::min(kRows, L - first), M = (rows + MR - 1) / MR * MR;
    multiply<W, MR, false>(q + first * dp, dp, 1, kT, Lp, s, Lp, M, Lp, d);
    float inverse[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      float peak, sum;
      softmax<W>(s + r * Lp, L, Lp, peak, sum);
      inverse[r] = 1.f / sum;
      p.lse[(t.b * p.H + t.h) * p.K + t.begin + first + r] = peak + std::log2(sum);
    }
    multiply<W, MR, false>(s, Lp, 1, v, dp, o, dp, M, dp, L);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = p.to + (t.b * p.K + t.begin + first + r) * E + t.h * d;
      for (int64_t c = 0; c < d; ++c) to[c] = o[r * dp + c] * inverse[r];
    }
  }
}

template <int W, int MR>
VJEPA_INLINE void backward_task(const Problem& p, const Task& t, Space& space) {
  using V = typename Vector<W>::type;
  const int64_t L = t.L, Lp = padded(L), d = p.d, dp = padded(d), E = p.E();
  space.begin(7 * Lp * dp + kRows * (2 * Lp + dp));
  float *q = space.take(Lp * dp, true), *k = space.take(Lp * dp, true), *kT = space.take(dp * Lp, true);
  float *vT = space.take(dp * Lp, true), *g = space.take(Lp * dp, true);
  float *dk = space.take(Lp * dp, true), *dv = space.take(Lp * dp, true);
  float *s = space.take(kRows * Lp, false), *ds = space.take(kRows * Lp, false), *dq = space.take(kRows * dp, false);
  const float scale = 1.f / std::sqrt(static_cast<float>(d));
  for (int64_t n = 0; n < L; ++n) {
    const float* from = p.qkv + ((t.b * p.K + t.begin + n) * 3 + 2) * E + t.h * d;
    std::copy(from, from + d, q + n * dp);
  }
  transpose<W>(q, L, dp, dp, vT, Lp);
  for (int64_t n = 0; n < L; ++n) {
    turned<W>(p, t, n, 0, scale * vjepa::kLog2E, q + n * dp);
    turned<W>(p, t, n, 1, 1.f, k + n * dp);
    const float* from = p.dout + (t.b * p.K + t.begin + n) * E + t.h * d;
    std::copy(from, from + d, g + n * dp);
  }
  transpose<W>(k, L, dp, dp, kT, Lp);
  for (int64_t first = 0; first < L; first += kRows) {
    const int64_t rows = std::min(kRows, L - first), M = (rows + MR - 1) / MR * MR;
    multiply<W, MR, false>(q + first * dp, dp, 1, kT, Lp, s, Lp, M, Lp, d);
    multiply<W, MR, false>(g + first * dp, dp, 1, vT, Lp, ds, Lp, M, Lp, d);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = t.b * p.K + t.begin + first + r;
      const float *out = p.out + token * E + t.h * d, *dout = g + (first + r) * dp;
      const float lse = p.lse[(t.b * p.H + t.h) * p.K + t.begin + first + r];
      float delta = 0.f, *x = s + r * Lp, *dx = ds + r * Lp;
#pragma omp simd reduction(+ : delta)
      for (int64_t c = 0; c < d; ++c) delta += out[c] * dout[c];
      // beyond L the scores are 0, and what comes of them is never read
      for (int64_t n = 0; n < Lp; n += W) {
        V &u = *reinterpret_cast<V*>(x + n), &du = *reinterpret_cast<V*>(dx + n);
        V score = u - lse;
        score = score > 0.f ? V{} : score;
        u = exp2_of<W>(score);
        du = u * (du - delta);
      }
    }
    multiply<W, MR, false>(ds, Lp, 1, k, dp, dq, dp, M, dp, L);
    for (int64_t r = 0; r < rows; ++r) turned_back<W>(p, t, first + r, 0, scale, dq + r * dp);
    // the padding of s and ds beyond L reaches rows of dk and dv that nobody reads
    multiply<W, MR, true>(ds, 1, Lp, q + first * dp, dp, dk, dp, Lp, dp, rows);
    multiply<W, MR, true>(s, 1, Lp, g + first * dp, dp, dv, dp, Lp, dp, rows);
  }
  for (int64_t n = 0; n < L; ++n) {
    turned_back<W>(p, t, n, 1, 1.f / vjepa::kLog2E, dk + n * dp);
    std::copy(dv + n * dp, dv + n * dp + d, p.dqkv + ((t.b * p.K + t.begin + n) * 3 + 2) * E + t.h * d);
  }
}

// A task for each instruction set. (target_clones would give one source for all, but tiles differ: MR rows must divide
// kPad, and their vectors must fit the registers.)
using Run = void (*)(const Problem&, const Task&, Space&);
#ifdef VJEPA_LEVELS
VJEPA_512 void forward_512(const Problem& p, const Task& t, Space& s) { forward_task<16, 8>(p, t, s); }
VJEPA_512 void backward_512(const Problem& p, const Task& t, Space& s) { backward_task<16, 8>(p, t, s); }
VJEPA_256 void forward_256(const Problem& p, const Task& t, Space& s) { forward_task<8, 4>(p, t, s); }
VJEPA_256 void backward_256(const Problem& p, const Task& t, Space& s) { backward_task<8, 4>(p, t, s); }
#else
constexpr Run forward_512 = nullptr, forward_256 = nullptr, backward_512 = nullptr, backward_256 = nullptr;
#endif
void forward_128(const Problem& p, const Task& t, Space& s) { forward_task<4, 4>(p, t, s); }
void backward_128(const Problem& p, const Task& t, Space& s) { backward_task<4, 4>(p, t, s); }

// The table of ops/rope.py, [K,2,R] or [B,K,2,R], for all d channels: those that are not turned have angle 0.
void problem(Problem& p, const Tensor& qkv, const Tensor& table, int64_t heads, std::vector<float>& angles) {
  vjepa::check(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0 &&
                   qkv.is_float({qkv.size(0), qkv.size(1), qkv.size(2)}),
               "attention: qkv must be contiguous float32 [B,K,3*E]");
  const int64_t B = qkv.size(0), K = qkv.size(1), d = qkv.size(2) / (3 * heads), dims = table.dim();
  p.K = K, p.H = heads, p.d = d, p.period = 1;
  p.qkv = qkv.data<float>();
  int64_t R = 0;
  if (dims > 1) {
    R = table.size(dims - 1), p.period = dims == 3 ? K : B * K;
    vjepa::check((dims == 3 ? table.is_float({K, 2, R}) : table.is_float({B, K, 2, R})) && R % 2 == 0 && R <= d &&
                     d % 2 == 0,
                 "attention: table must be contiguous float32 [K,2,R] or [B,K,2,R], with even R and heads");
  }
  angles.assign(static_cast<size_t>(p.period * 2 * d), 0.f);
  float* to = angles.data();
  const float* from = table.data<float>();
  vjepa::parallel_for(0, p.period, 256, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = 0; c < d; ++c) {
        const bool rotated = c < R;
        to[n * 2 * d + c] = rotated ? from[n * 2 * R + c] : 1.f;
        to[(n * 2 + 1) * d + c] = !rotated ? 0.f : c % 2 ? from[(n * 2 + 1) * R + c] : -from[(n * 2 + 1) * R + c];
      }
  });
  p.table = to;
}

// lengths int64 [S]: tokens of each segment, adding up to K
void run(const Problem& p, int64_t B, const Tensor& lengths, Run task) {
  std::vector<Task> tasks;
  const int64_t* n = lengths.data<int64_t>();
  int64_t begin = 0;
  for (int64_t i = 0; i < lengths.size(0); begin += n[i++]) {
    vjepa::check(n[i] >= 0, "attention: a negative length");
    for (int64_t b = 0; n[i] && b < B; ++b)
      for (int64_t h = 0; h < p.H; ++h) tasks.push_back({b, h, begin, n[i]});
  }
  vjepa::check(begin == p.K, "attention: lengths must add up to the tokens");
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.L > y.L; });
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next{0};  // every thread takes the longest that is left: segments differ in length
  vjepa::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    thread_local Space space;
    for (int64_t i; (i = next++) < count;) task(p, tasks[static_cast<size_t>(i)], space);
  });
}

// All tensors contiguous. -> out [B,K,E], lse [B,H,K]
void attention(const Tensor& qkv, const Tensor& table, const Tensor& lengths, int64_t heads, const Tensor& out,
               const Tensor& lse) {
  static const Run task = vjepa::by_level<Run>(forward_512, forward_256, forward_128);
  std::vector<float> angles;
  Problem p{};
  problem(p, qkv, table, heads, angles);
  const int64_t B = qkv.size(0);
  vjepa::check(out.is_float({B, p.K, p.E()}) && lse.is_float({B, heads, p.K}),
               "attention: contiguous out [B,K,E], lse [B,H,K] expected");
  p.to = out.mutable_data<float>();
  p.lse = lse.mutable_data<float>();
  run(p, B, lengths, task);
}

void attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& table, const Tensor& lengths,
                        int64_t heads, const Tensor& out, const Tensor& lse, const Tensor& dqkv) {
  static const Run task = vjepa::by_level<Run>(backward_512, backward_256, backward_128);
  std::vector<float> angles;
  Problem p{};
  problem(p, qkv, table, heads, angles);
  const int64_t B = qkv.size(0);
  vjepa::check(out.is_float({B, p.K, p.E()}) && dout.is_float({B, p.K, p.E()}) && lse.is_float({B, heads, p.K}) &&
                   dqkv.is_float({B, p.K, 3 * p.E()}), "attention_backward: shapes differ, or not contiguous");
  p.out = out.data<float>();
  p.dout = dout.data<float>();
  p.lse = const_cast<float*>(lse.data<float>());
  p.dqkv = dqkv.mutable_data<float>();
  run(p, B, lengths, task);
}

const vjepa::Add<&attention> add_attention(
    "attention", "attention(Tensor qkv, Tensor table, Tensor lengths, int heads, Tensor(a!) out, Tensor(b!) lse) -> ()");
const vjepa::Add<&attention_backward> add_attention_backward(
    "attention_backward", "attention_backward(Tensor dout, Tensor qkv, Tensor table, Tensor lengths, int heads, "
                          "Tensor out, Tensor lse, Tensor(a!) dqkv) -> ()");

}  // namespace
