// tubelet_patchify and patch_mean on the CPU (vjepa_fast/ops/patchify.py).
#include "clips.h"

namespace {

// x * scale - shift, rounded after the product as in torch, thus the same bits. scale > 0, so the maximum changes nothing;
// it keeps compilers from fusing product and difference.
VJEPA_INLINE float normalized(uint8_t x, float scale, float shift) { return std::max(float(x) * scale, 0.f) - shift; }
template <class In>
VJEPA_INLINE float normalized(In x, float, float) {
  return vjepa::up(x);
}

// One tubelet, in the order channel, frame, row, column. kPatch and kStep are patch and the step between columns where
// they are known, else 0.
template <class In, class Out, int64_t kPatch, int64_t kStep>
VJEPA_CLONES void tubelet_row(const In* from, Out* out, const int64_t* step, int64_t C, int64_t tubelet, int64_t patch,
                              const float* scale, const float* shift) {
  const int64_t n = kPatch ? kPatch : patch, dx = kStep ? kStep : step[4];
  for (int64_t c = 0; c < C; ++c) {
    const float a = scale[c], b = shift[c];
    for (int64_t f = 0; f < tubelet; ++f) {
      for (int64_t y = 0; y < n; ++y, out += n) {
        const In* row = from + c * step[1] + f * step[2] + y * step[3];
#pragma GCC ivdep
        for (int64_t x = 0; x < n; ++x) out[x] = vjepa::down<Out>(normalized(row[x * dx], a, b));
      }
    }
  }
}

// idx int64 [B,K], or [1,K] of b*N + n, or of one dimension for all tokens; scale, shift float32 [C], used for uint8;
// out [B,K,P] or [1,K,P].
void tubelet_patchify(const Tensor& x, const Tensor& idx, int64_t tubelet, int64_t patch, const Tensor& scale,
                      const Tensor& shift, const Tensor& out) {
  const Clip clip(x);
  const int64_t B = clip.size[0], C = clip.size[1], H = clip.size[3] / patch, W = clip.size[4] / patch;
  const int64_t N = clip.size[2] / tubelet * H * W, P = C * tubelet * patch * patch, K = out.size(1);
  const bool all = idx.dim() != 2;
  const Tensor kept = idx.contiguous();
  const int64_t R = all ? B : kept.size(0);  // rows of idx
  vjepa::check((R == B || R == 1) && out.dim() == 3 && out.size(0) == R && out.size(2) == P,
               "tubelet_patchify: out must be [B,K,P]");
  vjepa::check(kept.dtype() == aoti_torch_dtype_int64() && (all ? K == N : kept.size(1) == K),
               "tubelet_patchify: idx must be int64 [B,K]");
  const int64_t* index = kept.data<int64_t>();
  const int64_t limit = R == B ? N : B * N;
  vjepa::check(all || std::all_of(index, index + R * K, [limit](int64_t n) { return n >= 0 && n < limit; }),
               "tubelet_patchify: a token index lies outside the grid");
  const float *a = channels(scale, clip), *b = channels(shift, clip);
  by_pixel(x, [&](auto in) {
    vjepa::by_dtype(out, [&](auto to) {
      using In = typename decltype(in)::of;
      using Out = typename decltype(to)::of;
      const auto copy = clip.step[4] != 1 ? tubelet_row<In, Out, 0, 0>
                        : patch == 16     ? tubelet_row<In, Out, 16, 1>
                                          : tubelet_row<In, Out, 0, 1>;
      const In* from = x.data<In>();
      Out* rows = out.mutable_data<Out>();
      vjepa::parallel_for(0, R * K, 32, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t m = all ? row % K : index[row], n = m % N;
          const int64_t at[3] = {n / (H * W) * tubelet, n / W % H * patch, n % W * patch};
          const In* corner = from + (row / K + m / N) * clip.step[0];
          for (int i = 0; i < 3; ++i) corner += at[i] * clip.step[i + 2];
          copy(corner, rows + row * P, clip.step, C, tubelet, patch, a, b);
        }
      });
    });
  });
}

// scale, shift float32 [C], used for uint8; out float32 [B,T,H,W,C].
void patch_mean(const Tensor& x, int64_t tubelet, int64_t patch, const Tensor& scale, const Tensor& shift,
                const Tensor& out) {
  const Clip clip(x);
  const int64_t C = clip.size[1], T = clip.size[2] / tubelet, H = clip.size[3] / patch, W = clip.size[4] / patch;
  check_out(out, {clip.size[0], T, H, W, C});
  const float *a = channels(scale, clip), *b = channels(shift, clip);
  const bool affine = x.dtype() == aoti_torch_dtype_uint8();
  float* o = out.mutable_data<float>();
  pool<false>(x, clip, T, H, W, [=](int64_t cell, int64_t c, float mean) {
    o[cell * C + c] = affine ? mean * a[c] - b[c] : mean;
  });
}

const vjepa::Add<&tubelet_patchify> patchify_added(
    "tubelet_patchify",
    "tubelet_patchify(Tensor clip, Tensor idx, int tubelet, int patch, Tensor scale, Tensor shift, Tensor(a!) out)"
    " -> ()");
const vjepa::Add<&patch_mean> mean_added(
    "patch_mean",
    "patch_mean(Tensor clip, int tubelet, int patch, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");

}  // namespace
