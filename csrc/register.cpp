// The ops of this library, under torch.ops.vjepa_fast_cpp.
#include "mask_distance.h"

namespace {

void register_ops() {
  TorchLibraryOpaque *def, *cpu;  // kept for the life of the process
  vjepa::ok(aoti_torch_library_init_def("vjepa_fast_cpp", __FILE__, __LINE__, &def));
  vjepa::ok(aoti_torch_library_def(
      def, "mask_distance(Tensor masks_enc, Tensor masks_pred, int T, int H, int W, int divisor) -> Tensor"));
  vjepa::ok(aoti_torch_library_init_impl("vjepa_fast_cpp", "CPU", __FILE__, __LINE__, &cpu));
  vjepa::ok(torch_library_impl(cpu, "mask_distance", vjepa::Boxed<&mask_distance>::run, vjepa::kAbi));
}

}  // namespace

// Called once from Python; 0 means success. From a static initializer an error would end the process.
extern "C" __attribute__((visibility("default"))) int vjepa_fast_register() {
  try {
    register_ops();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
