// csrc/outer.cpp for other kernels.
#pragma once
#include <cstdint>

namespace vjepa {

// g [n,O], x [n,I], contiguous -> dw [O,I] += g^T x, db [O] += sums of the columns of g. Runs on all threads.
void add_outer(const float* g, const float* x, int64_t n, int64_t O, int64_t I, float* dw, float* db);

}  // namespace vjepa
