// What the kernels that read clips share: patchify.cpp and saliency.cpp. Clips [B,C,F,Y,X] are uint8, float32 or bfloat16 of
// any strides; nothing is copied. Token grid (T,H,W).
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "op.h"
#include "simd.h"

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

}  // namespace
