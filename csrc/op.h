// How a kernel file offers its op:
//
//   void fill(const vjepa::Tensor& x, double value);  // Tensor, int64_t, double, bool; returns a Tensor or nothing
//   static const vjepa::Add<&fill> added("fill", "fill(Tensor(a!) x, float value) -> ()");
//
// It is then torch.ops.vjepa_fast_cpp.fill. Nothing happens at load time but that a list grows; Python registers.
#pragma once
#include "torch_abi.h"

namespace vjepa {

struct Op {
  const char *name, *schema;
  void (*run)(uint64_t*, uint64_t, uint64_t);
};

std::vector<Op>& ops();

template <auto F>
struct Add {
  Add(const char* name, const char* schema) { ops().push_back({name, schema, Boxed<F>::run}); }
};

}  // namespace vjepa
