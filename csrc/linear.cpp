// Linear layers and the feed-forward of a transformer block in float32 on the CPU (vjepa_fast/ops/linear.py).
// A weight is packed once per call into panels as wide as a tile; the rows of the input are read where they lie. In the
// feed-forward some rows at a time go through both layers, so that their hidden layer stays in the cache.
//
// n rows, I inputs, O outputs, F hidden. Threads share the rows. Every number is a sum over the inputs in their order,
// so the result does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "gelu.h"
#include "op.h"
#include "outer.h"
#include "vector.h"

namespace {

using vjepa::load;
using vjepa::store;
using vjepa::Tensor;

constexpr int64_t kRows = 96;  // that go through both layers of a feed-forward together, or through one panel
constexpr int64_t kUnit = 24;  // rows that threads are given at least; a multiple of the rows of every tile

// C = A B + bias (+ other): A [.,K] in rows of K, B packed, C and other in rows of N.
struct Product {
  int64_t K = 0, N = 0;
  const float *packed = nullptr, *bias = nullptr, *other = nullptr;
};

template <int W, int MR>
VJEPA_INLINE void tile(const Product& p, const float* a, int64_t panel, const float* other, float* c) {
  using V = typename vjepa::Vector<W>::type;
  constexpr int64_t NR = 2 * W;
  const int64_t from = panel * NR, width = std::min(NR, p.N - from);
  const float* b = p.packed + from * p.K;
  V left[MR], right[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) left[i] = load<W>(p.bias + from), right[i] = load<W>(p.bias + from + W);
  for (int64_t k = 0; k < p.K; ++k, b += NR) {
    const V l = load<W>(b), r = load<W>(b + W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      left[i] += a[i * p.K + k] * l;
      right[i] += a[i * p.K + k] * r;
    }
  }
  if (width == NR) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const int64_t at = i * p.N + from;
      if (other) left[i] += load<W>(other + at), right[i] += load<W>(other + at + W);
      store<W>(c + at, left[i]);
      store<W>(c + at + W, right[i]);
    }
    return;
  }
  float row[NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    store<W>(row, left[i]);
    store<W>(row + W, right[i]);
    for (int64_t j = 0, at = i * p.N + from; j < width; ++j) c[at + j] = row[j] + (other ? other[at + j] : 0.f);
  }
}

template <int W, int MR>
VJEPA_INLINE void multiply(const Product& p, const float* a, const float* other, float* c, int64_t rows) {
  for (int64_t panel = 0; panel * 2 * W < p.N; ++panel) {
    int64_t m = 0;
    for (; m + MR <= rows; m += MR) tile<W, MR>(p, a + m * p.K, panel, other ? other + m * p.N : nullptr, c + m * p.N);
    for (; m < rows; ++m) tile<W, 1>(p, a + m * p.K, panel, other ? other + m * p.N : nullptr, c + m * p.N);
  }
}

// What one call computes; pointers that are null are left out.
struct Call {
  int64_t n = 0;
  Product first, second;  // of the feed-forward; a linear layer has the first alone
  const float *x = nullptr, *other = nullptr, *hidden_in = nullptr;
  float *hidden = nullptr, *out = nullptr, *grad = nullptr, *act = nullptr;
};

// out = x W + b (+ other)
template <int W, int MR>
VJEPA_INLINE void linear_rows(const Call& c, int64_t begin, int64_t end) {
  const auto [K, N] = std::pair(c.first.K, c.first.N);
  for (int64_t m = begin; m < end; m += kRows)
    multiply<W, MR>(c.first, c.x + m * K, c.other ? c.other + m * N : nullptr, c.out + m * N, std::min(kRows, end - m));
}

// out = gelu(x W1 + b1) W2 + b2 + other; hidden = x W1 + b1 where it is wanted
template <int W, int MR>
VJEPA_INLINE void forward_rows(const Call& c, int64_t begin, int64_t end, std::vector<float>& space) {
  const int64_t E = c.first.K, F = c.first.N;
  float* act = vjepa::room(space, kRows * F);
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    float* hidden = c.hidden ? c.hidden + m * F : act;
    multiply<W, MR>(c.first, c.x + m * E, nullptr, hidden, rows);
    vjepa::gelu(hidden, act, rows * F);
    multiply<W, MR>(c.second, act, c.other + m * E, c.out + m * E, rows);
  }
}

// From x, the gradient of the output: grad = that of the hidden layer, act = gelu(hidden_in) again, out = that of the input
template <int W, int MR>
VJEPA_INLINE void backward_rows(const Call& c, int64_t begin, int64_t end) {
  const int64_t E = c.first.K, F = c.first.N;
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    multiply<W, MR>(c.first, c.x + m * E, nullptr, c.grad + m * F, rows);
    vjepa::gelu_backward(c.hidden_in + m * F, c.grad + m * F, c.act + m * F, rows * F);
    multiply<W, MR>(c.second, c.grad + m * F, nullptr, c.out + m * E, rows);
  }
}

// Panels [begin, end) of a weight: B = w^T for w [N,K] (turned), B = w for w [K,N]; zeros behind the last column.
template <int W>
VJEPA_INLINE void pack(const float* w, bool turned, int64_t K, int64_t N, int64_t begin, int64_t end, float* to) {
  constexpr int64_t NR = 2 * W;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t from = panel * NR, width = std::min(NR, N - from);
    float* at = to + from * K;
    if (!turned) {
      for (int64_t k = 0; k < K; ++k, at += NR) {
        std::copy_n(w + k * N + from, width, at);
        std::fill(at + width, at + NR, 0.f);
      }
      continue;
    }
    // W numbers of W rows at a time, exchanged in registers
    for (int64_t k = 0; k < K; k += W)
      for (int64_t j = 0; j < NR; j += W) {
        const int64_t length = std::min<int64_t>(W, K - k), rows = std::clamp<int64_t>(width - j, 0, W);
        const float* row = w + (from + j) * K + k;
        float* block = at + k * NR + j;
        if (length == W && rows == W) {
          vjepa::transpose<W>(row, K, block, NR);
          continue;
        }
        for (int64_t i = 0; i < length; ++i)
          for (int64_t r = 0; r < W; ++r) block[i * NR + r] = r < rows ? row[r * K + i] : 0.f;
      }
  }
}

enum class What { linear, forward, backward };
using Run = void (*)(const Call&, What, int64_t, int64_t, std::vector<float>&);
using Pack = void (*)(const float*, bool, int64_t, int64_t, int64_t, int64_t, float*);

template <int W, int MR>
VJEPA_INLINE void run(const Call& c, What what, int64_t begin, int64_t end, std::vector<float>& space) {
  if (what == What::linear) return linear_rows<W, MR>(c, begin, end);
  if (what == What::forward) return forward_rows<W, MR>(c, begin, end, space);
  backward_rows<W, MR>(c, begin, end);
}

struct Level {
  Run run;
  Pack pack;
  int64_t panel;  // columns
};

#ifdef VJEPA_LEVELS
VJEPA_512 void run_512(const Call& c, What w, int64_t b, int64_t e, std::vector<float>& s) { run<16, 8>(c, w, b, e, s); }
VJEPA_256 void run_256(const Call& c, What w, int64_t b, int64_t e, std::vector<float>& s) { run<8, 6>(c, w, b, e, s); }
VJEPA_512 void pack_512(const float* w, bool t, int64_t K, int64_t N, int64_t b, int64_t e, float* to) {
  pack<16>(w, t, K, N, b, e, to);
}
VJEPA_256 void pack_256(const float* w, bool t, int64_t K, int64_t N, int64_t b, int64_t e, float* to) {
  pack<8>(w, t, K, N, b, e, to);
}
#else
constexpr Run run_512 = nullptr, run_256 = nullptr;
constexpr Pack pack_512 = nullptr, pack_256 = nullptr;
#endif
void run_128(const Call& c, What w, int64_t b, int64_t e, std::vector<float>& s) { run<4, 4>(c, w, b, e, s); }
void pack_128(const float* w, bool t, int64_t K, int64_t N, int64_t b, int64_t e, float* to) {
  pack<4>(w, t, K, N, b, e, to);
}

const Level& level() {
  static const Level found =
      vjepa::by_level<Level>({run_512, pack_512, 32}, {run_256, pack_256, 16}, {run_128, pack_128, 8});
  return found;
}

// The operands of a call, checked; packed weights live in ``space``.
const float* matrix(const Tensor& t, int64_t rows, int64_t columns) {
  vjepa::check(t.is_float({rows, columns}), "linear: contiguous float32 [", rows, ",", columns, "] expected");
  return t.data<float>();
}

float* output(const Tensor& t, int64_t rows, int64_t columns) {
  matrix(t, rows, columns);
  return t.mutable_data<float>();
}

Product product(const Tensor& w, bool turned, const Tensor* bias, std::vector<float>& space) {
  vjepa::check(w.dim() == 2, "linear: weight must be [O,I]");
  const float* from = matrix(w, w.size(0), w.size(1));
  Product p;
  p.K = w.size(turned ? 1 : 0), p.N = w.size(turned ? 0 : 1);
  const int64_t columns = level().panel, panels = (p.N + columns - 1) / columns, K = p.K, N = p.N;
  float *to = vjepa::room(space, (K + 1) * panels * columns), *added = to + K * panels * columns;
  vjepa::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    level().pack(from, turned, K, N, begin, end, to);
  });
  std::fill_n(added, panels * columns, 0.f);
  if (bias) {
    vjepa::check(bias->is_float({N}), "linear: bias must be contiguous float32 [", N, "]");
    std::copy_n(bias->data<float>(), N, added);
  }
  p.packed = to, p.bias = added;
  return p;
}

void compute(const Call& c, What what) {
  vjepa::parallel_for(0, (c.n + kUnit - 1) / kUnit, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> space;
    level().run(c, what, begin * kUnit, std::min(c.n, end * kUnit), space);
  });
}

thread_local std::vector<float> space_1, space_2, space_3;  // packed weights; a portion of the hidden layer

// All contiguous. x [n,I], w [O,I], b [O], other [n,O] (or [0,0]: none) -> out [n,O] = x w^T + b + other
void linear(const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& other, const Tensor& out) {
  Call c;
  c.first = product(w, true, &b, space_1);
  c.n = x.size(0), c.x = matrix(x, c.n, c.first.K), c.out = output(out, c.n, c.first.N);
  if (other.size(0)) c.other = matrix(other, c.n, c.first.N);
  compute(c, What::linear);
}

// g [n,O], w [O,I] -> out [n,I] = g w
void linear_backward(const Tensor& g, const Tensor& w, const Tensor& out) {
  Call c;
  c.first = product(w, false, nullptr, space_1);
  c.n = g.size(0), c.x = matrix(g, c.n, c.first.K), c.out = output(out, c.n, c.first.N);
  compute(c, What::linear);
}

// x, other [n,E], w1 [F,E], w2 [E,F] -> out [n,E] = gelu(x w1^T + b1) w2^T + b2 + other; hidden [n,F] (or [0,0]: not kept)
void feed_forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                  const Tensor& other, const Tensor& hidden, const Tensor& out) {
  Call c;
  c.first = product(w1, true, &b1, space_1);
  c.second = product(w2, true, &b2, space_2);
  const int64_t E = c.first.K, F = c.first.N;
  c.n = x.size(0);
  vjepa::check(c.second.K == F && c.second.N == E, "linear: w1 [F,E] and w2 [E,F] expected");
  c.x = matrix(x, c.n, E), c.other = matrix(other, c.n, E), c.out = output(out, c.n, E);
  if (hidden.size(0)) c.hidden = output(hidden, c.n, F);
  compute(c, What::forward);
}

// x, grad [n,E], of the input and of the output, hidden [n,F] -> dx [n,E] without that of ``other``; dw1 [F,E], db1 [F],
// dw2 [E,F], db2 [E] are added to. ``portion`` rows at a time: the gradient of the hidden layer is never there for all.
void feed_forward_backward(const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& w1, const Tensor& w2,
                           int64_t portion, const Tensor& dx, const Tensor& dw1, const Tensor& db1, const Tensor& dw2,
                           const Tensor& db2) {
  Call c;
  c.first = product(w2, false, nullptr, space_1);
  c.second = product(w1, false, nullptr, space_2);
  const int64_t E = c.first.K, F = c.first.N, n = grad.size(0);
  vjepa::check(c.second.K == F && c.second.N == E && portion > 0, "linear: w1 [F,E] and w2 [E,F] expected");
  const float *g = matrix(grad, n, E), *from = matrix(x, n, E), *h = matrix(hidden, n, F);
  float *to = output(dx, n, E), *to_w1 = output(dw1, F, E), *to_w2 = output(dw2, E, F);
  vjepa::check(db1.is_float({F}) && db2.is_float({E}), "linear: contiguous float32 db1 [F] and db2 [E] expected");
  portion = std::min(portion, n);
  c.grad = vjepa::room(space_3, 2 * portion * F), c.act = c.grad + portion * F;
  for (int64_t first = 0; first < n; first += portion) {
    c.n = std::min(portion, n - first);
    c.x = g + first * E, c.hidden_in = h + first * F, c.out = to + first * E;
    compute(c, What::backward);
    vjepa::add_outer(c.x, c.act, c.n, E, F, to_w2, db2.mutable_data<float>());
    vjepa::add_outer(c.grad, from + first * E, c.n, F, E, to_w1, db1.mutable_data<float>());
  }
}

// g [n,O], x [n,I], contiguous -> dw [O,I] += g^T x, db [O] += sums of the columns of g
void add_outer(const Tensor& g, const Tensor& x, const Tensor& dw, const Tensor& db) {
  vjepa::check(g.dim() == 2 && x.dim() == 2, "add_outer: g [n,O] and x [n,I] expected");
  const int64_t n = g.size(0), O = g.size(1), I = x.size(1);
  vjepa::check(g.is_float({n, O}) && x.is_float({n, I}) && dw.is_float({O, I}) && db.is_float({O}),
               "add_outer: contiguous float32 g [n,O], x [n,I], dw [O,I], db [O] expected");
  vjepa::add_outer(g.data<float>(), x.data<float>(), n, O, I, dw.mutable_data<float>(), db.mutable_data<float>());
}

const vjepa::Add<&linear> add_linear("linear",
                                     "linear(Tensor x, Tensor w, Tensor b, Tensor other, Tensor(a!) out) -> ()");
const vjepa::Add<&linear_backward> add_linear_backward("linear_backward",
                                                       "linear_backward(Tensor g, Tensor w, Tensor(a!) out) -> ()");
const vjepa::Add<&feed_forward> add_feed_forward(
    "feed_forward", "feed_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor other, Tensor(a!) hidden, "
                    "Tensor(b!) out) -> ()");
const vjepa::Add<&feed_forward_backward> add_feed_forward_backward(
    "feed_forward_backward", "feed_forward_backward(Tensor grad, Tensor x, Tensor hidden, Tensor w1, Tensor w2, int portion, "
                             "Tensor(a!) dx, Tensor(b!) dw1, Tensor(c!) db1, Tensor(d!) dw2, Tensor(e!) db2) -> ()");
const vjepa::Add<&add_outer> add_add_outer("add_outer", "add_outer(Tensor g, Tensor x, Tensor(a!) dw, Tensor(b!) db) -> ()");

}  // namespace
