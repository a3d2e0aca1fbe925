// The ops that read pixels: tubelet_patchify, patch_mean, motion_saliency. Clips [B,C,F,Y,X] are uint8, float32 or
// bfloat16 of any strides; nothing is copied. Token grid (T,H,W).
#include "op.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

using vjepa::Tensor;

struct Clip {
  int64_t size[5], step[5];
  explicit Clip(const Tensor& x) {
    vjepa::check(x.dim() == 5, "vjepa_fast: a clip must be [B,C,F,Y,X]");
    for (int i = 0; i < 5; ++i) size[i] = x.size(i), step[i] = x.stride(i);
  }
};

// fn(type<In>{}) after the clip's dtype.
template <class F>
void by_pixel(const Tensor& clip, const F& fn) {
  if (clip.dtype() == aoti_torch_dtype_uint8()) return fn(vjepa::type<uint8_t>{});
  vjepa::by_dtype(clip, fn);
}

// One float per channel.
const float* channels(const Tensor& table, const Clip& clip) {
  vjepa::check(table.dtype() == aoti_torch_dtype_float32() && table.dim() == 1 && table.size(0) == clip.size[1] &&
                   (table.size(0) < 2 || table.stride(0) == 1),
               "vjepa_fast: expected one float32 per channel");
  return table.data<float>();
}

void check_out(const Tensor& out, const std::vector<int64_t>& size) {
  bool fits = out.dtype() == aoti_torch_dtype_float32() && out.dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = out.size(i) == size[i];
  vjepa::check(fits, "vjepa_fast: the output must be float32 of the token grid's shape");
}

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

// Cell i of `out` that an axis of `size` is divided into; cells overlap where out does not divide size.
struct Cell {
  int64_t begin, end;
  Cell(int64_t i, int64_t size, int64_t out) : begin(i * size / out), end(((i + 1) * size + out - 1) / out) {}
  int64_t count() const { return end - begin; }
};

// Sums in a column of a cell: at most 255 times its rows.
template <class In>
using Sum = std::conditional_t<std::is_same_v<In, uint8_t>, int32_t, float>;

VJEPA_INLINE int32_t distance(uint8_t a, uint8_t b) { return std::max(a, b) - std::min(a, b); }
template <class In>
VJEPA_INLINE float distance(In a, In b) {
  return std::fabs(vjepa::up(a) - vjepa::up(b));
}

// The columns' sums over the rows of one band of cells: of pixels, or of the change since the frame before, of which
// the first frame has that of the second.
template <class In, bool kChange, int64_t kStep>
VJEPA_CLONES void column_sums(const In* from, Sum<In>* sums, const Clip& clip, Cell t, Cell y) {
  const int64_t X = clip.size[4], dx = kStep ? kStep : clip.step[4];
  std::fill(sums, sums + X, Sum<In>(0));
  for (int64_t f = t.begin; f < t.end; ++f) {
    for (int64_t i = y.begin; i < y.end; ++i) {
      const In* row = from + (kChange && f == 0 ? 1 : f) * clip.step[2] + i * clip.step[3];
      const In* before = row - clip.step[2];
#pragma GCC ivdep
      for (int64_t x = 0; x < X; ++x) {
        if constexpr (kChange)
          sums[x] += distance(row[x * dx], before[x * dx]);
        else
          sums[x] += Sum<In>(vjepa::up(row[x * dx]));
      }
    }
  }
}

template <class S>
VJEPA_CLONES float total(const S* sums, int64_t n) {
  float s = 0.f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += float(sums[i]);
  return s;
}

// store(cell of out [B,T,H,W], channel, mean) for every cell and channel, a band of cells at a time.
template <bool kChange, class F>
void pool(const Tensor& x, const Clip& clip, int64_t T, int64_t H, int64_t W, const F& store) {
  by_pixel(x, [&](auto in) {
    using In = typename decltype(in)::of;
    const In* from = x.data<In>();
    const auto sum = clip.step[4] == 1 ? column_sums<In, kChange, 1> : column_sums<In, kChange, 0>;
    vjepa::parallel_for(0, clip.size[0] * T * H, 4, [&](int64_t begin, int64_t end) {
      std::vector<Sum<In>> sums(clip.size[4]);
      for (int64_t band = begin; band < end; ++band) {
        const Cell t(band / H % T, clip.size[2], T), y(band % H, clip.size[3], H);
        for (int64_t c = 0; c < clip.size[1]; ++c) {
          sum(from + band / (T * H) * clip.step[0] + c * clip.step[1], sums.data(), clip, t, y);
          for (int64_t w = 0; w < W; ++w) {
            const Cell cell(w, clip.size[4], W);
            const float s = total(sums.data() + cell.begin, cell.count());
            store(band * W + w, c, s / float(t.count() * y.count() * cell.count()));
          }
        }
      }
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

// The two positions that an output position lies between (half-pixel centres), and the weight of each.
struct Taps {
  int64_t at[2];
  float weight[2];
};

std::vector<Taps> taps(int64_t size, int64_t out) {
  std::vector<Taps> all(out);
  const float scale = float(double(size) / double(out));
  for (int64_t i = 0; i < out; ++i) {
    const float source = std::max((float(i) + 0.5f) * scale - 0.5f, 0.f);
    const int64_t low = std::min(int64_t(source), size - 1);
    const float fraction = source - float(low);
    all[i] = {{low, std::min(low + 1, size - 1)}, {1.f - fraction, fraction}};
  }
  return all;
}

// Pixels far apart, so that only prefetching, of the row `ahead`, keeps more than a few reads under way.
template <class In>
void pick(const In* row, const int64_t* columns, float* to, int64_t W, int64_t ahead) {
  for (int64_t w = 0; w < W; ++w) {
    __builtin_prefetch(row + ahead + columns[w]);
    to[w] = vjepa::up(row[columns[w]]);
    to[W + w] = vjepa::up(row[columns[W + w]]);
  }
}

VJEPA_CLONES void add_change(float* sum, const float* now, const float* before, float scale, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) sum[i] += scale * std::fabs(now[i] - before[i]);
}

// Trilinear samples of the change. For each row of samples the pixels that they lie between are picked, each once, into
// [F,2,2W] (frame; upper, lower; left ones, then right ones), so that the rest runs over consecutive numbers.
template <class In>
void sample(const In* from, const Clip& clip, const float* weight, int64_t T, int64_t H, int64_t W, float* out) {
  const int64_t C = clip.size[1], F = clip.size[2], frame = 4 * W;
  const auto ts = taps(F, T), ys = taps(clip.size[3], H), xs = taps(clip.size[4], W);
  std::vector<bool> needed(F);
  for (const Taps& t : ts)
    for (const int64_t f : t.at) needed[std::max<int64_t>(f, 1)] = needed[std::max<int64_t>(f - 1, 0)] = true;
  std::vector<int64_t> columns(2 * W);
  for (int64_t w = 0; w < 2 * W; ++w) columns[w] = xs[w % W].at[w / W] * clip.step[4];
  vjepa::parallel_for(0, clip.size[0] * H, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> pixels(F * frame), change(F * frame);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / H, h = row % H;
      std::fill(change.begin(), change.end(), 0.f);
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t f = 0; f < F; ++f)
          for (int64_t j = 0; needed[f] && j < 2; ++j)
            pick(from + b * clip.step[0] + c * clip.step[1] + f * clip.step[2] + ys[h].at[j] * clip.step[3],
                 columns.data(), pixels.data() + f * frame + j * 2 * W, W, 2 * clip.step[2]);
        add_change(change.data() + frame, pixels.data() + frame, pixels.data(), weight[c], (F - 1) * frame);
      }
      for (int64_t t = 0; t < T; ++t) {
        float* o = out + ((b * T + t) * H + h) * W;
        std::fill(o, o + W, 0.f);
        for (int corner = 0; corner < 4; ++corner) {
          const int i = corner / 2, j = corner % 2;
          const float scale = ts[t].weight[i] * ys[h].weight[j];
          const float* left = change.data() + std::max<int64_t>(ts[t].at[i], 1) * frame + j * 2 * W;
          for (int64_t w = 0; w < W; ++w) o[w] += scale * (xs[w].weight[0] * left[w] + xs[w].weight[1] * left[W + w]);
        }
      }
    }
  });
}

// weight float32 [C]: of each channel's change; floor: the least that is divided by; out float32 [B,T,H,W].
void motion_saliency(const Tensor& x, const Tensor& weight, bool area, bool published, double floor,
                     const Tensor& out) {
  const Clip clip(x);
  const int64_t B = clip.size[0], T = out.size(1), H = out.size(2), W = out.size(3), HW = H * W;
  check_out(out, {B, T, H, W});
  vjepa::check(clip.size[2] > 1, "motion_saliency: a single frame does not change");
  vjepa::check(!published || B == 1 || B == T, "motion_saliency: published needs B in {1, T}");
  const float* scale = channels(weight, clip);
  float* o = out.mutable_data<float>();
  if (area)
    pool<true>(x, clip, T, H, W, [=](int64_t cell, int64_t c, float mean) {
      o[cell] = (c ? o[cell] : 0.f) + mean * scale[c];
    });
  else
    by_pixel(x, [&](auto in) {
      using In = typename decltype(in)::of;
      sample(x.data<In>(), clip, scale, T, H, W, o);
    });
  std::vector<float> peak(B);
  for (int64_t b = 0; b < B; ++b)
    peak[b] = std::max(*std::max_element(o + b * T * HW, o + (b + 1) * T * HW), float(floor));
  for (int64_t slice = 0; slice < B * T; ++slice) {
    const float by = peak[published && B > 1 ? slice % T : slice / T];
    for (int64_t i = 0; i < HW; ++i) o[slice * HW + i] /= by;
  }
}

const vjepa::Add<&tubelet_patchify> patchify_added(
    "tubelet_patchify",
    "tubelet_patchify(Tensor clip, Tensor idx, int tubelet, int patch, Tensor scale, Tensor shift, Tensor(a!) out)"
    " -> ()");
const vjepa::Add<&patch_mean> mean_added(
    "patch_mean",
    "patch_mean(Tensor clip, int tubelet, int patch, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
const vjepa::Add<&motion_saliency> saliency_added(
    "motion_saliency",
    "motion_saliency(Tensor clip, Tensor weight, bool area, bool published, float floor, Tensor(a!) out) -> ()");

}  // namespace
