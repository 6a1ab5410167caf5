// An accelerator that is not there: tensors of device type "simulated" have memory of their own kind, ops refuse to mix
// them with the CPU's, and what is computed is what the CPU computes. It stands for a GPU in tests of where values lie,
// and of who copies them; not of speed, and not of asynchrony. Torch calls such a device PrivateUse1:
// https://docs.pytorch.org/docs/stable/accelerator/index.html
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kCount = 2;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { current = device.index() < 0 ? 0 : device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t n) override {
    auto memory = c10::GetCPUAllocator()->allocate(n);
    auto* data = memory.get();
    auto* context = memory.release_context();
    return {data, context, c10::GetCPUAllocator()->raw_deleter(), {kType, current}};
  }
  at::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kCount; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    std::swap(current, device);
    return device;
  }
};
Hooks hooks;
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

bool is_ours(const at::Tensor& t) { return t.defined() && t.device().type() == kType; }

// The same memory as the CPU sees it; an op that resizes it gets memory of its own.
at::Tensor as_cpu(const at::Tensor& t) {
  auto data = c10::DataPtr(t.storage().mutable_data(), c10::Device(at::kCPU));
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  auto made = at::empty({0}, t.options().device(at::kCPU).requires_grad(false));
  return made.set_(storage, t.storage_offset(), t.sizes(), t.strides());
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype, c10::Device device) {
  c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

at::Tensor moved(const at::Tensor& from, c10::Device device) {
  auto dense = from.is_non_overlapping_and_dense() ? from : from.contiguous();
  auto made = empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), device);
  if (dense.numel()) std::memcpy(made.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  return made;
}

struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;  // ours, and as the CPU sees it
  c10::Device device{kType, current};

  at::Tensor in(const at::Tensor& t) {
    if (!is_ours(t)) {
      TORCH_CHECK(!t.defined() || t.dim() == 0, "expected all tensors on ", device, ", and one is on ", t.device());
      return t;
    }
    TORCH_CHECK(seen.empty() || t.device() == device || t.dim() == 0, "tensors on ", device, " and on ", t.device());
    if (seen.empty()) device = t.device();
    for (auto& pair : seen)
      if (pair.first.is_same(t)) return pair.second;
    seen.emplace_back(t, as_cpu(t));
    return seen.back().second;
  }

  at::Tensor out(const at::Tensor& t) {
    if (!t.defined()) return t;
    for (auto& pair : seen)
      if (pair.second.is_same(t)) return pair.first;
    return moved(t, device);
  }

  void resized() {
    for (auto& [own, cpu] : seen) {
      if (own.sizes() == cpu.sizes() && own.storage().data() == cpu.storage().data()) continue;
      auto* impl = own.unsafeGetTensorImpl();
      if (own.storage().data() != cpu.storage().data()) {
        const auto n = cpu.storage().nbytes();
        auto memory = allocator.allocate(n);
        std::memcpy(memory.get(), cpu.storage().data(), n);
        own.storage().set_data_ptr_noswap(std::move(memory));
        own.storage().set_nbytes(n);
      }
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call;
  const auto n = op.schema().arguments().size();
  for (size_t i = stack->size() - n; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.in(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = call.in(t);
      value = c10::List<at::Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<at::Tensor>(call.in(*t)) : t);
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == kType) call.device = value.toDevice();
      value = c10::Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.resized();
  const auto n_out = op.schema().returns().size();
  for (size_t i = stack->size() - n_out; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.out(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = call.out(t);
      value = c10::List<at::Tensor>(list);
    }
  }
}

c10::Device device_of(std::optional<c10::Device> device) {
  return device && device->has_index() ? *device : c10::Device(kType, current);
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_of(device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  return empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), c10::dtype_or_default(dtype),
                       device_of(device));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  auto target = is_ours(to) ? as_cpu(to) : to;
  target.copy_(is_ours(from) ? as_cpu(from) : from);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t n = c10::multiply_integers(sizes) * self.itemsize();
  if (self.storage().nbytes() < n) {
    auto memory = allocator.allocate(n);
    if (self.storage().nbytes()) std::memcpy(memory.get(), self.const_data_ptr(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(memory));
    self.storage().set_nbytes(n);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

// Bytes of memory that somebody else mapped, as a tensor on the device.
at::Tensor over(int64_t address, int64_t n_bytes, c10::Device device) {
  return at::from_blob(reinterpret_cast<void*>(address), {n_bytes}, {1}, [](void*) {},
                       at::TensorOptions().dtype(at::kByte).device(device), device);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  // As with CUDA, the data of a CPU's tensor may come to lie here, and the other way round.
  m.impl("_has_compatible_shallow_copy_type", [](const at::Tensor&, const at::Tensor&) { return true; });
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY(stagecut_simulated, m) { m.def("over(int address, int n_bytes, Device device) -> Tensor", &over); }

}  // namespace
