// The ops of this library, under torch.ops.vjepa_fast_cpp. Each kernel file adds its own by an `Op` at file scope.
#include "op.h"
#include "sources.h"  // written by setup.py

namespace vjepa {

std::vector<Op>& ops() {
  static std::vector<Op> all;
  return all;
}

namespace {

void register_ops() {
  TorchLibraryOpaque *def, *cpu;  // kept for the life of the process
  ok(aoti_torch_library_init_def("vjepa_fast_cpp", __FILE__, __LINE__, &def));
  ok(aoti_torch_library_init_impl("vjepa_fast_cpp", "CPU", __FILE__, __LINE__, &cpu));
  for (const Op& op : ops()) {
    ok(aoti_torch_library_def(def, op.schema));
    ok(torch_library_impl(cpu, op.name, op.run, kAbi));
  }
}

}  // namespace
}  // namespace vjepa

// The sources that this was built from, so that Python can tell an old library (setup.py: fingerprint).
extern "C" __attribute__((visibility("default"))) const char* vjepa_fast_sources() { return VJEPA_SOURCES; }

// Called once from Python; 0 means success. From a static initializer an error would end the process.
extern "C" __attribute__((visibility("default"))) int vjepa_fast_register() {
  try {
    vjepa::register_ops();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
