// motion_saliency on the CPU (vjepa_fast/ops/saliency.py).
#include "clips.h"

namespace {

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

const vjepa::Add<&motion_saliency> saliency_added(
    "motion_saliency",
    "motion_saliency(Tensor clip, Tensor weight, bool area, bool published, float floor, Tensor(a!) out) -> ()");

}  // namespace
