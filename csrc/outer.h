// The gradient of a linear layer in its weight and bias: dW += G^T X, db += the column sums of G, in float32 on the CPU
// (vjepa_fast/ops/linear.py). The sums run over the rows, of which there are many, and neither operand lies as a matrix
// product wants it; a panel of X and a strip of G are therefore packed as they are read, 256 rows at a time, so that
// the product itself runs from the cache.
//
// n rows, O outputs, I inputs. Threads share the outputs or the inputs, never the rows: the result does not depend on their
// number.
#pragma once
#include <algorithm>
#include <vector>

#include "vector.h"

namespace vjepa {
namespace outer {

constexpr int64_t kRows = 256;           // rows that are packed at a time ...
constexpr int64_t kPacked = 128 * 1024;  // ... or fewer: floats that a thread's panels of X may take

struct Problem {
  int64_t n, O, I;
  const float *g, *x;
  float *dw, *db;
};

// Asks for a block of memory, rows of so many floats, in so many parts.
struct Ahead {
  const float* at;
  int64_t stride, width, rows, step, column = 0;

  VJEPA_INLINE Ahead(const float* from, int64_t stride_, int64_t width_, int64_t rows_, int64_t parts)
      : at(from), stride(stride_), width(width_), rows(rows_), step((rows * ((width + 15) / 16) + parts - 1) / parts) {}
  VJEPA_INLINE void ask() {
    for (int64_t i = 0; i < step && rows > 0; ++i) {
      __builtin_prefetch(at + column, 0, 2);
      if ((column += 16) >= width) column = 0, at += stride, --rows;
    }
  }
};

struct Part {
  int64_t begin, end, left, right;  // outputs, inputs
};

// Tiles of MR outputs and two vectors of inputs.
template <int W, int MR>
VJEPA_INLINE void part(const Problem& p, const Part& own, std::vector<float>& space) {
  using V = typename Vector<W>::type;
  constexpr int64_t NR = 2 * W;
  const int64_t begin = own.begin, end = own.end, panels = std::max<int64_t>(1, (own.right - own.left + NR - 1) / NR);
  const int64_t block = std::max<int64_t>(16, std::min(kRows, kPacked / (panels * NR)));
  float *packed = room(space, block * (panels * NR + MR)), *strip = packed + block * panels * NR;
  for (int64_t first = 0; first < p.n; first += block) {
    const int64_t K = std::min(block, p.n - first);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t from = own.left + panel * NR, width = std::min(NR, own.right - from);
      float* to = packed + panel * K * NR;
      for (int64_t k = 0; k < K; ++k, to += NR) {
        const float* x = p.x + (first + k) * p.I + from;
        if (width == NR) {
          store<W>(to, load<W>(x));
          store<W>(to + W, load<W>(x + W));
        } else {
          std::copy(x, x + width, to);
          std::fill(to + width, to + NR, 0.f);
        }
      }
    }
    // What the next rows need is asked for between the tiles, so that packing does not wait for memory.
    const int64_t next = first + block, tiles = (end - begin + MR - 1) / MR * panels;
    const int64_t rows = next < p.n ? std::min(block, p.n - next) : 0;
    Ahead x_ahead(p.x + next * p.I + own.left, p.I, own.right - own.left, rows, tiles);
    Ahead g_ahead(p.g + next * p.O + begin, p.O, end - begin, rows, tiles);
    for (int64_t m = begin; m < end; m += MR) {
      const int64_t height = std::min<int64_t>(MR, end - m);
      float sums[MR] = {};
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < MR; ++i) {
          const float g = i < height ? p.g[(first + k) * p.O + m + i] : 0.f;
          strip[k * MR + i] = g;
          sums[i] += g;
        }
      for (int64_t i = 0; i < height && own.left == 0; ++i) p.db[m + i] += sums[i];
      for (int64_t panel = 0; panel < panels; ++panel) {
        x_ahead.ask();
        g_ahead.ask();
        V left[MR], right[MR];
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) left[i] = right[i] = V{};
        const int64_t from = own.left + panel * NR, width = std::min(NR, own.right - from);
        float* at = p.dw + m * p.I + from;
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(at + i * p.I + j, 1, 2);
        const float *u = strip, *v = packed + panel * K * NR;
        for (int64_t k = 0; k < K; ++k, u += MR, v += NR) {
          const V l = load<W>(v), r = load<W>(v + W);
#pragma GCC unroll 8
          for (int i = 0; i < MR; ++i) {
            left[i] += u[i] * l;
            right[i] += u[i] * r;
          }
        }
        if (height == MR && width == NR) {
#pragma GCC unroll 8
          for (int i = 0; i < MR; ++i) {
            store<W>(at + i * p.I, load<W>(at + i * p.I) + left[i]);
            store<W>(at + i * p.I + W, load<W>(at + i * p.I + W) + right[i]);
          }
        } else {
          float tile[MR * NR];
#pragma GCC unroll 8
          for (int i = 0; i < MR; ++i) {
            store<W>(tile + i * NR, left[i]);
            store<W>(tile + i * NR + W, right[i]);
          }
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j) at[i * p.I + j] += tile[i * NR + j];
        }
      }
    }
  }
}

using Run = void (*)(const Problem&, const Part&, std::vector<float>&);
#ifdef VJEPA_LEVELS
VJEPA_512 inline void part_512(const Problem& p, const Part& own, std::vector<float>& s) { part<16, 8>(p, own, s); }
VJEPA_256 inline void part_256(const Problem& p, const Part& own, std::vector<float>& s) { part<8, 4>(p, own, s); }
#else
constexpr Run part_512 = nullptr, part_256 = nullptr;
#endif
inline void part_128(const Problem& p, const Part& own, std::vector<float>& s) { part<4, 4>(p, own, s); }

}  // namespace outer

// g [n,O], x [n,I], contiguous -> dw [O,I] += g^T x, db [O] += sums of the columns of g. Runs on all threads.
inline void add_outer(const float* g, const float* x, int64_t n, int64_t O, int64_t I, float* dw, float* db) {
  using namespace outer;
  static const Run run = by_level<Run>(part_512, part_256, part_128);
  const Problem p{n, O, I, g, x, dw, db};
  // Each thread packs what it needs itself: of the longer side its share, of the other all. Shared columns of X go in runs
  // that leave room for all kRows rows: how many are added up in one go must not depend on the share.
  constexpr int64_t kStep = 32, kRun = kPacked / kRows;  // multiples of every tile
  const bool by_output = O >= I;
  const int64_t size = by_output ? O : I;
  parallel_for(0, (size + kStep - 1) / kStep, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> space;
    const int64_t from = begin * kStep, to = std::min(size, end * kStep);
    if (by_output) run(p, {from, to, 0, I}, space);
    else if (O)
      for (int64_t at = from; at < to; at += kRun) run(p, {0, O, at, std::min(to, at + kRun)}, space);
  });
}

}  // namespace vjepa
