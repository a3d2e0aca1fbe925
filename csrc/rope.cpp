// rope3d on the CPU: tokens in parallel, each token's cosines and sines read once for the queries and keys of all heads.
#include "op.h"
#include "simd.h"

#include <algorithm>

namespace {

struct Shape {
  int64_t period, heads, d, R;  // rows of the table, heads, channels of a head, rotated channels
};

// The rotated channels of a token's queries and keys; `from` and `to` are the same or apart.
template <bool transpose>
VJEPA_INLINE void turn(const float* from, float* to, const float* cos, const float* sin, const Shape& s) {
  for (int64_t h = 0; h < 2 * s.heads; ++h, from += s.d, to += s.d) {
#pragma GCC ivdep
    for (int64_t c = 0; c < s.R; c += 2) {
      const float a = from[c], b = from[c + 1];
      to[c] = a * cos[c] + b * (transpose ? sin[c + 1] : -sin[c]);
      to[c + 1] = b * cos[c + 1] + a * (transpose ? -sin[c] : sin[c + 1]);
    }
  }
}

// Tokens [begin, end).
template <bool transpose>
VJEPA_CLONES void tokens(const float* x, const float* table, float* out, int64_t begin, int64_t end, Shape s) {
  const int64_t E = s.heads * s.d;
  for (int64_t n = begin; n < end; ++n) {
    const float* cos = table + n % s.period * 2 * s.R;
    const float* from = x + n * 3 * E;
    float* to = out + n * 3 * E;
    turn<transpose>(from, to, cos, cos + s.R, s);
    if (to == from) continue;
    for (int64_t c = 0; c < 2 * E; c += s.d) std::copy(from + c + s.R, from + c + s.d, to + c + s.R);
    std::copy(from + 2 * E, from + 3 * E, to + 2 * E);
  }
}

// bfloat16 by way of a row of floats: two long conversions and the loop above, where pairs of 16-bit values would leave
// short loops with tails (R = 60 of 64 is common) that cost twice as much.
template <bool transpose>
VJEPA_CLONES void tokens(const vjepa::bf16* x, const float* table, vjepa::bf16* out, int64_t begin, int64_t end,
                         Shape s) {
  const int64_t E = s.heads * s.d;
  std::vector<float> row(2 * E);
  for (int64_t n = begin; n < end; ++n) {
    const float* cos = table + n % s.period * 2 * s.R;
    const vjepa::bf16* from = x + n * 3 * E;
    vjepa::bf16* to = out + n * 3 * E;
    float* r = row.data();
    for (int64_t c = 0; c < 2 * E; ++c) r[c] = vjepa::up(from[c]);
    turn<transpose>(r, r, cos, cos + s.R, s);
#pragma GCC ivdep
    for (int64_t c = 0; c < 2 * E; ++c) to[c] = vjepa::down<vjepa::bf16>(r[c]);
    if (to != from) std::copy(from + 2 * E, from + 3 * E, to + 2 * E);
  }
}

// qkv [B,K,3*heads*d], float32 table [K,2,R] or [B,K,2,R] -> out, which may be qkv itself
void rope3d(const vjepa::Tensor& qkv, const vjepa::Tensor& table, int64_t heads, bool transpose,
            const vjepa::Tensor& out) {
  const vjepa::Tensor x = qkv.contiguous(), angles = table.contiguous();
  vjepa::check(x.dim() == 3 && heads > 0 && x.size(2) % (3 * heads) == 0, "rope3d: qkv must be [B,K,3*E]");
  const int64_t B = x.size(0), K = x.size(1), E3 = x.size(2), dims = angles.dim();
  vjepa::check(out.dtype() == x.dtype() && out.dim() == 3 && out.size(0) == B && out.size(1) == K && out.size(2) == E3,
               "rope3d: out must have the dtype and shape of qkv");
  vjepa::check(out.contiguous().data<void>() == out.data<void>(), "rope3d: out must be contiguous");
  vjepa::check(angles.dtype() == aoti_torch_dtype_float32() && (dims == 3 || (dims == 4 && angles.size(0) == B)) &&
                   angles.size(dims - 3) == K && angles.size(dims - 2) == 2,
               "rope3d: table must be float32 [K,2,R] or [B,K,2,R]");
  const Shape s{dims == 3 ? K : B * K, heads, E3 / (3 * heads), angles.size(dims - 1)};
  vjepa::check(s.R % 2 == 0 && s.R <= s.d, "rope3d: R must be even and at most the channels of a head");
  vjepa::by_dtype(x, [&](auto type) {
    using S = typename decltype(type)::of;
    const S* from = x.data<S>();
    const float* t = angles.data<float>();
    S* to = out.mutable_data<S>();
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, E3));
    vjepa::parallel_for(0, B * K, grain, [&](int64_t begin, int64_t end) {
      transpose ? tokens<true>(from, t, to, begin, end, s) : tokens<false>(from, t, to, begin, end, s);
    });
  });
}

const vjepa::Add<&rope3d> added(
    "rope3d", "rope3d(Tensor qkv, Tensor table, int num_heads, bool transpose, Tensor(a!) out) -> ()");

}  // namespace
