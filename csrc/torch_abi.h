// What the CPU kernels need of libtorch's stable C ABI (torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h, torch 2.11 on), declared here so that the build needs no torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_numel(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque*, bool*);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque*, AtenTensorOpaque**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 AtenTensorOpaque**);
int32_t aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryOpaque**);
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**);
int32_t aoti_torch_library_def(TorchLibraryOpaque*, const char*);
int32_t torch_library_impl(TorchLibraryOpaque*, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
int32_t torch_call_dispatcher(const char*, const char*, uint64_t*, uint64_t);
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque*, void**);
int32_t torch_get_const_data_ptr(AtenTensorOpaque*, const void**);
int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
}

namespace vjepa {

constexpr uint64_t kAbi = (2ull << 56) | (11ull << 48);  // the ABI of torch 2.11

template <class... A>
void check(bool fine, const A&... parts) {
  if (fine) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void ok(int32_t code) { check(code == 0, "vjepa_fast: a libtorch call failed"); }

class Tensor {  // owns its handle
 public:
  explicit Tensor(AtenTensorOpaque* handle)
      : handle_(handle, [](AtenTensorOpaque* h) { aoti_torch_delete_tensor_object(h); }) {}

  AtenTensorOpaque* get() const { return handle_.get(); }

  int64_t dim() const {
    int64_t v;
    ok(aoti_torch_get_dim(get(), &v));
    return v;
  }
  int64_t size(int64_t i) const {
    int64_t* p;
    ok(aoti_torch_get_sizes(get(), &p));
    return p[i];
  }
  int64_t stride(int64_t i) const {
    int64_t* p;
    ok(aoti_torch_get_strides(get(), &p));
    return p[i];
  }
  int32_t dtype() const {
    int32_t v;
    ok(aoti_torch_get_dtype(get(), &v));
    return v;
  }
  bool is_contiguous() const {
    bool v;
    ok(aoti_torch_is_contiguous(get(), &v));
    return v;
  }
  // Whether a kernel may read it as a plain array of these sizes.
  bool is_float(std::initializer_list<int64_t> sizes) const {
    if (dtype() != aoti_torch_dtype_float32() || dim() != static_cast<int64_t>(sizes.size())) return false;
    int64_t* p;
    ok(aoti_torch_get_sizes(get(), &p));
    return std::equal(sizes.begin(), sizes.end(), p) && is_contiguous();
  }
  template <class T>
  const T* data() const {
    const void* p;
    ok(torch_get_const_data_ptr(get(), &p));
    return static_cast<const T*>(p);
  }
  template <class T>
  T* mutable_data() const {
    void* p;
    ok(torch_get_mutable_data_ptr(get(), &p));
    return static_cast<T*>(p);
  }
  Tensor contiguous() const {
    AtenTensorOpaque* copy;
    ok(aoti_torch_new_tensor_handle(get(), &copy));
    if (is_contiguous()) return Tensor(copy);
    uint64_t stack[2] = {reinterpret_cast<uint64_t>(copy), 0};  // 0: contiguous memory format
    ok(torch_call_dispatcher("aten::contiguous", "", stack, kAbi));
    return Tensor(reinterpret_cast<AtenTensorOpaque*>(stack[0]));
  }

 private:
  std::shared_ptr<AtenTensorOpaque> handle_;
};

inline Tensor empty_cpu(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorOpaque* handle;
  ok(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                              aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// fn(begin, end) over pieces of [begin, end) on torch's threads. fn must not throw.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& fn) {
  ok(torch_parallel_for(
      begin, end, grain, [](int64_t b, int64_t e, void* f) { (*static_cast<const F*>(f))(b, e); },
      const_cast<F*>(&fn)));
}

// The dispatcher passes arguments and the result on a stack of 64-bit values.
template <class T>
struct Slot {
  static T read(uint64_t v) {
    T out;
    std::memcpy(&out, &v, sizeof out);
    return out;
  }
};
template <>
struct Slot<Tensor> {
  static Tensor read(uint64_t v) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(v)); }
  static uint64_t write(const Tensor& t) {
    AtenTensorOpaque* handle;
    ok(aoti_torch_new_tensor_handle(t.get(), &handle));
    return reinterpret_cast<uint64_t>(handle);
  }
};

template <class T>
using bare = std::remove_cv_t<std::remove_reference_t<T>>;

template <auto F>
struct Boxed;
template <class R, class... A, R (*F)(A...)>
struct Boxed<F> {
  template <size_t... I>
  static R call(uint64_t* stack, std::index_sequence<I...>) {
    std::tuple<bare<A>...> args{Slot<bare<A>>::read(stack[I])...};
    return std::apply(F, args);
  }
  static void run(uint64_t* stack, uint64_t, uint64_t) {
    if constexpr (std::is_void_v<R>)
      call(stack, std::index_sequence_for<A...>{});
    else
      stack[0] = Slot<bare<R>>::write(call(stack, std::index_sequence_for<A...>{}));
  }
};

}  // namespace vjepa
