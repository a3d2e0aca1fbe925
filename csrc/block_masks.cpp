// sample_block_masks on the CPU, samples in parallel. The draws (Philox words and what they decide) are those of
// vjepa_fast/ops/block_masks.py; the distribution of guided origins is computed in double, as there.
#include "op.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace {

// A row of `specs`, as ops/block_masks.py writes it.
struct Spec {
  int64_t blocks, t, h, w, time_limit, max_keep, full, pred_full, inverse, guided;
  double strength, rate;
  int64_t seed, step, first_sample, key, redraws;
};
constexpr int64_t kColumns = sizeof(Spec) / 8;

enum Kind : uint32_t { kOrigin = 1, kTruncate = 2 };
enum Truncate : int64_t { kBatch, kRandom, kNone };
using Words = std::array<uint32_t, 4>;

Words philox(const Spec& s, int64_t sample, uint32_t kind, uint32_t low) {
  const uint64_t g = static_cast<uint64_t>(s.first_sample + sample), seed = static_cast<uint64_t>(s.seed);
  const uint32_t stream = kind << 28 | static_cast<uint32_t>(s.key) << 20 | low;
  Words c = {uint32_t(g), uint32_t(g >> 32), uint32_t(s.step), stream};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

struct Grid {
  int64_t T, H, W;
  int64_t tokens() const { return T * H * W; }
  int64_t table() const { return (T + 1) * (H + 1) * (W + 1); }
};

// Summed-area table with a border of zeros in front: table[t][h][w] = sum over map[:t, :h, :w].
void summed_area(const float* map, const Grid& g, double* table) {
  const int64_t row = g.W + 1, plane = (g.H + 1) * row;
  std::fill(table, table + g.table(), 0.0);
  for (int64_t t = 0; t < g.T; ++t)
    for (int64_t h = 0; h < g.H; ++h) {
      double* to = table + (t + 1) * plane + (h + 1) * row + 1;
      const float* from = map + (t * g.H + h) * g.W;
      double sum = 0;
      for (int64_t w = 0; w < g.W; ++w) to[w] = (sum += from[w]) + to[w - row];
    }
  for (int64_t i = plane; i < g.table(); ++i) table[i] += table[i - plane];
}

// Cumulative probability of the origins of a block (ops.origin_probabilities); returns their number.
int64_t origin_cdf(const double* table, const Grid& g, const Spec& s, double* cdf) {
  const int64_t row = g.W + 1, plane = (g.H + 1) * row, down = s.h * row, on = s.t * plane;
  const double volume = static_cast<double>(s.t * s.h * s.w);
  double best = 0, total = 0, sum = 0;
  int64_t n = 0;
  for (int64_t t = 0; t + s.t <= g.T; ++t)
    for (int64_t h = 0; h + s.h <= g.H; ++h)
      for (int64_t w = 0; w + s.w <= g.W; ++w) {
        const double *a = table + t * plane + h * row + w, *b = a + s.w;
        const double box = (b[on + down] - b[down] - b[on] + b[0]) - (a[on + down] - a[down] - a[on] + a[0]);
        cdf[n] = std::max(box / volume, 1e-6);
        best = std::max(best, cdf[n++]);
      }
  for (int64_t i = 0; i < n; ++i) {
    const double x = cdf[i] / best;
    total += cdf[i] = s.strength == 2 ? x * x : std::pow(x, s.strength);
  }
  for (int64_t i = 0; i < n; ++i) cdf[i] = sum += (1 - s.rate) * (cdf[i] / total) + s.rate / double(n);
  return n;
}

// context [N]: 1 where a token is neither in a block nor later than context may be. Returns how many are 1.
int64_t draw(const Spec& s, const Grid& g, int64_t sample, int64_t attempt, const double* cdf, int64_t origins,
             uint8_t* context) {
  const int64_t tops = g.H - s.h + 1, lefts = g.W - s.w + 1, places = g.H * g.W;
  std::fill(context, context + s.time_limit * places, uint8_t(1));
  std::fill(context + s.time_limit * places, context + g.tokens(), uint8_t(0));
  for (int64_t block = 0; block < s.blocks; ++block) {
    const Words r = philox(s, sample, kOrigin, static_cast<uint32_t>(attempt << 14 | block));
    const auto below = [](uint32_t word, int64_t count) { return int64_t(word * uint64_t(count) >> 32); };
    int64_t start = below(r[0], g.T - s.t + 1), top = below(r[1], tops), left = below(r[2], lefts);
    if (s.guided) {
      const double u = double(r[3] >> 8) / double(1 << 24);
      const int64_t o = std::min<int64_t>(std::upper_bound(cdf, cdf + origins, u) - cdf, origins - 1);
      start = o / (tops * lefts), top = o / lefts % tops, left = o % lefts;
    }
    for (int64_t t = start; t < std::min(start + s.t, s.time_limit); ++t)
      for (int64_t h = top; h < top + s.h; ++h)
        std::memset(context + (t * g.H + h) * g.W + left, 0, static_cast<size_t>(s.w));
  }
  int64_t count = 0;
  for (int64_t n = 0; n < g.tokens(); ++n) count += context[n];
  return count;
}

// Ascending tokens with mask[n] == value to `out`: the `limit` first ones, or, given keys, those of lowest key.
void take(const uint8_t* mask, uint8_t value, const Grid& g, int64_t limit, const std::vector<uint64_t>& keys,
          int64_t* out) {
  if (keys.empty()) {
    for (int64_t n = 0, k = 0; k < limit; ++n) {  // a store and no branch per token
      out[k] = n;
      k += mask[n] == value;
    }
    return;
  }
  std::vector<uint64_t> own;
  own.reserve(keys.size());
  for (int64_t n = 0; n < g.tokens(); ++n)
    if (mask[n] == value) own.push_back(keys[n]);
  std::nth_element(own.begin(), own.begin() + limit - 1, own.end());
  const uint64_t last = own[limit - 1];
  for (int64_t n = 0, k = 0; k < limit; ++n) {
    out[k] = n;
    k += (mask[n] == value) & (keys[n] <= last);
  }
}

void complement(const int64_t* tokens, int64_t count, const Grid& g, int64_t* out) {
  for (int64_t n = 0, k = 0; n < g.tokens(); ++n) {
    if (k < count && tokens[k] == n)
      ++k;
    else
      *out++ = n;
  }
}

// A random number per token, made distinct by the token in its low bits.
std::vector<uint64_t> token_keys(const Spec& s, int64_t sample, int64_t N) {
  std::vector<uint64_t> keys(N);
  for (int64_t n = 0; n < N; n += 4) {
    const Words r = philox(s, sample, kTruncate, static_cast<uint32_t>(n / 4));
    for (int64_t i = 0; i < std::min<int64_t>(4, N - n); ++i) keys[n + i] = uint64_t(r[i]) << 22 | uint64_t(n + i);
  }
  return keys;
}

// saliency float32 [B,T,H,W] or empty; specs int64 [S,kColumns]. enc, pred int64 [S,B,N], enc_len, pred_len int64
// [S,B]; where no context is left after the redraws both lengths of the sample (of all, if truncated) are 0.
void block_masks(const vjepa::Tensor& saliency, const vjepa::Tensor& specs, int64_t T, int64_t H, int64_t W,
                 int64_t truncate, const vjepa::Tensor& enc, const vjepa::Tensor& pred, const vjepa::Tensor& enc_len,
                 const vjepa::Tensor& pred_len) {
  const Grid g{T, H, W};
  const int64_t S = enc.size(0), B = enc.size(1), N = g.tokens();
  vjepa::check(enc.dim() == 3 && enc.size(2) == N && truncate >= kBatch && truncate <= kNone,
               "block_masks: enc must be [S,B,N]");
  vjepa::check(specs.dim() == 2 && specs.size(0) == S && specs.size(1) == kColumns &&
                   specs.dtype() == aoti_torch_dtype_int64(),
               "block_masks: specs must be int64 [S,", kColumns, "]");
  std::vector<Spec> spec(S);
  std::memcpy(spec.data(), specs.contiguous().data<int64_t>(), sizeof(Spec) * S);
  for (const Spec& s : spec)
    vjepa::check(s.t > 0 && s.t <= T && s.h > 0 && s.h <= H && s.w > 0 && s.w <= W && s.time_limit <= T,
                 "block_masks: a block is larger than the grid");
  const bool guided = std::any_of(spec.begin(), spec.end(), [](const Spec& s) { return s.guided; });
  const vjepa::Tensor map = saliency.contiguous();
  vjepa::check(!guided || (map.dim() == 4 && map.dtype() == aoti_torch_dtype_float32() && map.size(0) == B &&
                           map.size(1) * map.size(2) * map.size(3) == N),
               "block_masks: saliency must be float32 [B,T,H,W]");
  const float* maps = map.data<float>();
  std::vector<uint8_t> context(S * B * N);
  std::vector<int64_t> count(S * B);
  vjepa::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> table(guided ? g.table() : 0), cdf(guided ? N : 0);
    for (int64_t b = begin; b < end; ++b) {
      if (guided) summed_area(maps + b * N, g, table.data());
      for (int64_t s = 0; s < S; ++s) {
        const int64_t origins = spec[s].guided ? origin_cdf(table.data(), g, spec[s], cdf.data()) : 0;
        int64_t& left = count[s * B + b];
        for (int64_t attempt = 0; left == 0 && attempt <= spec[s].redraws; ++attempt)
          left = draw(spec[s], g, b, attempt, cdf.data(), origins, context.data() + (s * B + b) * N);
      }
    }
  });
  int64_t *e = enc.mutable_data<int64_t>(), *p = pred.mutable_data<int64_t>();
  int64_t *e_len = enc_len.mutable_data<int64_t>(), *p_len = pred_len.mutable_data<int64_t>();
  vjepa::parallel_for(0, S * B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Spec& s = spec[i / B];
      const auto row = count.begin() + i / B * B;
      const auto [least, most] = truncate == kNone ? std::pair(count.begin() + i, count.begin() + i)
                                                   : std::minmax_element(row, row + B);
      int64_t keep_enc = std::min(*least, s.max_keep), keep_pred = N - *most;
      int64_t *out_enc = e + i * N, *out_pred = p + i * N;
      if (s.inverse) std::swap(out_enc, out_pred);
      if (*least == 0) {
        keep_enc = keep_pred = 0;
      } else {
        const uint8_t* mask = context.data() + i * N;
        const auto keys = truncate == kRandom ? token_keys(s, i % B, N) : std::vector<uint64_t>();
        if (!s.pred_full) take(mask, 1, g, keep_enc, keys, out_enc);
        if (!s.full) take(mask, 0, g, keep_pred, keys, out_pred);
        if (s.full) {
          complement(out_enc, keep_enc, g, out_pred);
          keep_pred = N - keep_enc;
        } else if (s.pred_full) {
          complement(out_pred, keep_pred, g, out_enc);
          keep_enc = N - keep_pred;
        }
      }
      std::fill(out_enc + keep_enc, out_enc + N, int64_t(0));
      std::fill(out_pred + keep_pred, out_pred + N, int64_t(0));
      e_len[i] = s.inverse ? keep_pred : keep_enc;
      p_len[i] = s.inverse ? keep_enc : keep_pred;
    }
  });
}

const vjepa::Add<&block_masks> added(
    "block_masks",
    "block_masks(Tensor saliency, Tensor specs, int T, int H, int W, int truncate, Tensor(a!) enc, Tensor(b!) pred, "
    "Tensor(c!) enc_len, Tensor(d!) pred_len) -> ()");

}  // namespace
