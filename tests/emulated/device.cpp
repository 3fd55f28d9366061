// A CUDA device whose memory is the host's and whose operators are the CPU's, for a torch that was built without CUDA.
//
// Tensors on it are tensors like any other: they have the dispatch keys of CUDA, a storage on "cuda:0" and an address.
// An operator is called again with the same memory under another name, tensors of the CPU; what it returns becomes the
// device's. Streams do what they are told at once, and keep clocks: two of them that use the same memory without an
// event between them, one to write, are told of (see Clocks).

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::StorageImpl;
using c10::Stream;

constexpr DeviceIndex kDevices = 8;
thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kDevices> current_stream{};

// --- the order of what streams do -----------------------------------------------------------------------------------

// Vector clocks. A stream counts what it is told; an event is the clock of the stream that it was recorded in, and a
// stream that waits for it learns that clock. Memory remembers who wrote and read it last, and when. Freed memory goes
// to what the stream that computes (0) makes next, so that freeing counts as its writing.
class Clocks {
 public:
  using Clock = std::unordered_map<int64_t, int64_t>;

  void touch(const void* memory, int64_t stream, bool writes, const std::string& what) {
    if (!memory) return;
    std::lock_guard<std::mutex> guard(lock_);
    auto& clock = clocks_[stream];
    learn(clock, host_);
    auto& use = uses_[memory];
    if (writes) {
      for (auto& [reader, by] : use.read) check(clock, stream, reader, by.first, by.second, what);
      use.read.clear();
    }
    if (use.written) check(clock, stream, use.writer, use.written, use.what, what);
    auto now = ++clock[stream];
    if (writes) {
      use.writer = stream, use.written = now, use.what = what;
    } else {
      use.read[stream] = {now, what};
    }
  }

  // Nothing is left of who used the memory: what is made there next is in order with its own stream.
  void free(const void* memory) {
    if (!memory || !any()) return;
    touch(memory, 0, true, "freeing it");
    std::lock_guard<std::mutex> guard(lock_);
    uses_.erase(memory);
  }

  int64_t record(int64_t stream) {
    std::lock_guard<std::mutex> guard(lock_);
    learn(clocks_[stream], host_);
    events_.push_back(clocks_[stream]);
    return static_cast<int64_t>(events_.size()) - 1;
  }

  void wait(int64_t stream, int64_t event) {
    std::lock_guard<std::mutex> guard(lock_);
    learn(clocks_[stream], events_.at(event));
  }

  // The host has waited: what any stream is told from now on comes after it.
  void synchronize(int64_t event) {
    std::lock_guard<std::mutex> guard(lock_);
    learn(host_, events_.at(event));
  }

  void synchronize_all() {
    std::lock_guard<std::mutex> guard(lock_);
    for (auto& [_, clock] : clocks_) learn(host_, clock);
  }

  // Whether there is a stream beside the one that computes, and what is done counts.
  bool any() {
    std::lock_guard<std::mutex> guard(lock_);
    return watched_ && !clocks_.empty();
  }

  void watch(bool watched) {
    std::lock_guard<std::mutex> guard(lock_);
    watched_ = watched;
  }

  std::vector<std::string> told() {
    std::lock_guard<std::mutex> guard(lock_);
    auto found = std::move(races_);
    races_.clear();
    return found;
  }

 private:
  struct Use {
    int64_t writer = 0, written = 0;
    std::string what;
    std::unordered_map<int64_t, std::pair<int64_t, std::string>> read;
  };

  static void learn(Clock& clock, const Clock& other) {
    for (auto& [stream, at] : other) clock[stream] = std::max(clock[stream], at);
  }

  void check(Clock& clock, int64_t stream, int64_t other, int64_t at, const std::string& before, const std::string& what) {
    if (other == stream || clock[other] >= at || races_.size() > 20) return;
    races_.push_back(what + " in stream " + std::to_string(stream) + " does not wait for " + before + " in stream " +
                     std::to_string(other) + ", of the same memory");
  }

  std::mutex lock_;
  bool watched_ = true;
  Clock host_;
  std::unordered_map<int64_t, Clock> clocks_;
  std::vector<Clock> events_;
  std::unordered_map<const void*, Use> uses_;
  std::vector<std::string> races_;
};
Clocks& clocks() {
  static auto* made = new Clocks();  // storages are freed when Python ends, too
  return *made;
}

// --- memory ---------------------------------------------------------------------------------------------------------

struct Statistics {
  std::atomic<int64_t> current{0}, peak{0};
};
std::array<Statistics, kDevices> statistics;

void count(DeviceIndex device, int64_t nbytes) {
  auto& of = statistics[device];
  auto now = of.current.fetch_add(nbytes) + nbytes;
  auto peak = of.peak.load();
  while (now > peak && !of.peak.compare_exchange_weak(peak, now)) {
  }
}

// What a storage of the device holds: memory of the host.
struct Held {
  c10::DataPtr data;
  DeviceIndex device;
  int64_t nbytes;
};

void release(void* context) {
  auto* held = static_cast<Held*>(context);
  clocks().free(held->data.get());
  count(held->device, -held->nbytes);
  delete held;
}

c10::DataPtr on_device(c10::DataPtr data, DeviceIndex device, int64_t nbytes) {
  void* address = data.get();
  count(device, nbytes);
  return {address, new Held{std::move(data), device, nbytes}, &release, Device(c10::kCUDA, device)};
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    return on_device(c10::GetCPUAllocator()->allocate(nbytes), current_device, nbytes);
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
};
DeviceMemory device_memory;

std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned;

struct PinnedMemory final : c10::Allocator {
  static void release(void* address) {
    {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned.erase(reinterpret_cast<uintptr_t>(address));
    }
    std::free(address);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    void* address = nbytes ? std::aligned_alloc(64, (nbytes + 63) / 64 * 64) : nullptr;
    std::lock_guard<std::mutex> guard(pinned_lock);
    if (address) pinned[reinterpret_cast<uintptr_t>(address)] = nbytes;
    return {address, address, &PinnedMemory::release, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedMemory::release; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto next = pinned.upper_bound(address);
  if (next == pinned.begin()) return false;
  --next;
  return address < next->first + next->second;
}

// --- what torch asks of a device ------------------------------------------------------------------------------------

DeviceIndex index_of(Device device) { return device.has_index() ? device.index() : current_device; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(c10::kCUDA, current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = index_of(device); }
  Stream getStream(Device device) const override {
    auto index = index_of(device);
    return Stream(Stream::UNSAFE, Device(c10::kCUDA, index), current_stream[index]);
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::UNSAFE, Device(c10::kCUDA, index_of(device)), 0);
  }
  Stream exchangeStream(Stream stream) const override {
    auto& now = current_stream[stream.device_index()];
    auto before = Stream(Stream::UNSAFE, stream.device(), now);
    now = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  // Events of torch's own, as between the threads of a backward: streams are in order there.
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { clocks().synchronize_all(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {  // torch looks for a class of this name, there

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex device) const override { ::current_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(::current_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return Device(c10::kCUDA, ::current_device); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// --- operators ------------------------------------------------------------------------------------------------------

// The values of one call as the CPU sees them.
class Call {
 public:
  c10::Storage to_cpu(const c10::Storage& storage) {
    auto* given = storage.unsafeGetStorageImpl();
    auto found = there_.find(given);
    if (found == there_.end()) {
      auto seen = c10::make_intrusive<StorageImpl>(
          StorageImpl::use_byte_size_t(), storage.sym_nbytes(),
          c10::DataPtr(storage.mutable_data(), Device(c10::kCPU)), c10::GetCPUAllocator(), true);
      back_.emplace(seen.get(), storage);
      found = there_.emplace(given, c10::Storage(seen)).first;
    }
    return found->second;
  }

  at::Tensor to_cpu(const at::Tensor& value) {
    if (!value.defined()) return value;
    if (!value.is_cuda()) {
      if (value.has_storage()) host_.insert(value.storage().unsafeGetStorageImpl());
      mixed_ = mixed_ || value.dim() > 0;
      return value;
    }
    TORCH_CHECK(value.layout() == c10::kStrided, "the emulated device has strided tensors alone");
    device_ = value.device();
    auto* impl = value.unsafeGetTensorImpl();
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        to_cpu(value.storage()), c10::DispatchKeySet(DispatchKey::CPU), value.dtype());
    auto* made = alias.unsafeGetTensorImpl();
    made->set_storage_offset(impl->storage_offset());
    made->set_sizes_and_strides(impl->sizes(), impl->strides());
    if (value.is_conj()) alias._set_conj(true);
    if (value.is_neg()) alias._set_neg(true);
    if (impl->is_wrapped_number()) made->set_wrapped_number(true);
    given_.emplace_back(alias, value);
    return alias;
  }

  c10::Storage to_device(const c10::Storage& storage, Device device) {
    auto found = back_.find(storage.unsafeGetStorageImpl());
    if (found == back_.end()) {
      auto nbytes = storage.nbytes();
      auto data = storage.set_data_ptr(c10::DataPtr(nullptr, Device(c10::kCPU)));
      auto made = c10::make_intrusive<StorageImpl>(
          StorageImpl::use_byte_size_t(), nbytes, on_device(std::move(data), device.index(), nbytes),
          &device_memory, true);
      found = back_.emplace(storage.unsafeGetStorageImpl(), c10::Storage(made)).first;
      kept_.push_back(storage);
    }
    return found->second;
  }

  at::Tensor to_device(const at::Tensor& result, Device device) {
    if (!result.defined() || !result.is_cpu()) return result;
    for (auto& [alias, value] : given_)
      if (alias.is_same(result)) return value;
    if (host_.count(result.storage().unsafeGetStorageImpl())) return result;
    auto value = at::detail::make_tensor<c10::TensorImpl>(
        to_device(result.storage(), device), c10::DispatchKeySet(DispatchKey::CUDA), result.dtype());
    auto* made = value.unsafeGetTensorImpl();
    made->set_storage_offset(result.storage_offset());
    made->set_sizes_and_strides(result.sizes(), result.strides());
    if (result.is_conj()) value._set_conj(true);
    if (result.is_neg()) value._set_neg(true);
    return value;
  }

  // What an operator did to the shapes and the memory of what it was given.
  void settle() {
    for (auto& [alias, value] : given_) {
      auto* impl = value.unsafeGetTensorImpl();
      auto storage = to_device(alias.storage(), value.device());
      if (!value.storage().is_alias_of(storage)) impl->set_storage_keep_dtype(storage);
      if (alias.sizes() != value.sizes() || alias.strides() != value.strides() ||
          alias.storage_offset() != value.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides());
        impl->set_storage_offset(alias.storage_offset());
      }
    }
    for (auto& [theirs, ours] : there_) {
      if (ours.data() == theirs->data() && ours.nbytes() == theirs->nbytes()) continue;
      auto nbytes = ours.nbytes();
      if (ours.data() != theirs->data()) {
        auto data = ours.set_data_ptr(c10::DataPtr(nullptr, Device(c10::kCPU)));
        theirs->set_data_ptr(on_device(std::move(data), theirs->device().index(), nbytes));
      }
      theirs->set_nbytes(nbytes);
    }
  }

  std::optional<Device> device() const { return device_; }
  bool mixes_devices() const { return mixed_ && device_.has_value(); }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> given_;  // as the CPU sees them, and themselves
  std::unordered_map<StorageImpl*, c10::Storage> there_, back_;
  std::vector<c10::Storage> kept_;
  std::unordered_set<StorageImpl*> host_;
  std::optional<Device> device_;
  bool mixed_ = false;
};

bool may_mix_devices(const std::string& name) {
  return name == "aten::copy_" || name == "aten::_to_copy" || name == "aten::_copy_from" || name == "aten::set_" ||
      name == "aten::index" || name == "aten::_index_put_impl_" || name == "aten::index_put_";
}

// Kernels of a GPU widen and narrow a softmax as they compute it; the CPU's do not. The type of the result, and what it
// is to be written to, where they differ from what the CPU makes.
std::pair<std::optional<c10::ScalarType>, at::Tensor> softmax_in_one_type(
    const std::string& name, c10::IValue* arguments, size_t count) {
  if (name == "aten::_softmax" || name == "aten::_log_softmax") {
    if (arguments[2].toBool()) {
      arguments[0] = arguments[0].toTensor().to(c10::kFloat);
      arguments[2] = false;
    }
  }
  if (name == "aten::_softmax_backward_data" || name == "aten::_log_softmax_backward_data") {
    auto has = arguments[0].toTensor().scalar_type(), wanted = arguments[3].toScalarType();
    arguments[3] = has;
    if (wanted != has) {
      auto out = count > 4 ? arguments[4].toTensor() : at::Tensor();
      if (count > 4) arguments[4] = at::empty(out.sizes(), arguments[0].toTensor().options());
      return {wanted, out};
    }
  }
  return {};
}

void touch(const at::Tensor& value, bool writes, const std::string& what) {
  if (!value.defined() || !value.has_storage()) return;
  auto* data = value.storage().data();
  if (value.is_cuda() || is_pinned(data)) clocks().touch(data, current_stream[current_device], writes, what);
}

// A tensor, or a list of them, with each replaced; anything else as it is.
template <typename Function>
c10::IValue each(const c10::IValue& value, Function replaced) {
  if (value.isTensor()) return replaced(value.toTensor());
  if (!value.isTensorList()) return value;
  c10::List<at::Tensor> list;
  for (const auto& one : value.toTensorVector()) list.push_back(replaced(one));
  return list;
}

void call_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto count_in = schema.arguments().size();
  auto* arguments = stack->data() + (stack->size() - count_in);
  Call call;
  std::optional<Device> asked;
  const bool watched = clocks().any();
  const bool view = !schema.arguments().empty() && schema.arguments()[0].alias_info() &&
      !schema.arguments()[0].alias_info()->isWrite();
  for (size_t i = 0; i < count_in; i++) {
    auto& value = arguments[i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool writes = alias && alias->isWrite();
    auto see = [&](const at::Tensor& one) {
      if (watched && !view) touch(one, writes, name);
      return call.to_cpu(one);
    };
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& one : value.toOptionalTensorList()) {
        std::optional<at::Tensor> held = one;
        list.push_back(held.has_value() ? std::optional<at::Tensor>(see(*held)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice()) {
      asked = value.toDevice();
      value = Device(c10::kCPU);
    } else if (value.isStorage() && value.toStorage().device_type() == c10::kCUDA) {
      value = call.to_cpu(value.toStorage());
    } else {
      value = each(value, see);
    }
  }
  TORCH_CHECK(
      !call.mixes_devices() || may_mix_devices(name),
      "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu! (", name, ")");
  auto target = asked.value_or(call.device().value_or(Device(c10::kCUDA, current_device)));
  if (target.is_cuda()) target = Device(c10::kCUDA, index_of(target));
  auto [narrowed, out] = softmax_in_one_type(name, arguments, count_in);
  const bool host_waits = name == "aten::_local_scalar_dense" ||
      (name == "aten::copy_" && !arguments[2].toBool() && !arguments[0].toTensor().is_same(arguments[1].toTensor()));
  {
    thread_local int depth = 0;
    struct Deeper {
      Deeper() { depth++; }
      ~Deeper() { depth--; }
    } deeper;
    TORCH_CHECK(depth < 20, "the CPU has no kernel for ", name, ".", schema.overload_name());
    c10::impl::ExcludeDispatchKeyGuard below(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset | c10::python_ks |
        c10::DispatchKeySet({DispatchKey::PythonTLSSnapshot, DispatchKey::PreDispatch, DispatchKey::Functionalize}));
    op.callBoxed(stack);
  }
  if (narrowed.has_value()) {
    auto made = stack->back().toTensor().to(*narrowed);
    stack->back() = out.defined() ? out.copy_(made) : made;
  }
  call.settle();
  if (watched && host_waits) clocks().synchronize(clocks().record(current_stream[current_device]));
  if (!target.is_cuda()) return;
  auto back = [&](const at::Tensor& one) {
    auto made = call.to_device(one, target);
    if (watched && !view) touch(made, true, name);
    return made;
  };
  for (auto at = stack->size() - schema.returns().size(); at < stack->size(); at++) {
    (*stack)[at] = each((*stack)[at], back);
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Composed for every device alike of a part that a real device alone has.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&call_on_cpu>());
}

// --- what emulated.gpu asks -----------------------------------------------------------------------------------------

// The memory of a value as the CPU sees it, for ``what``; it must not outlive the value.
at::Tensor seen_by(const at::Tensor& value, bool writes, std::string what) {
  if (clocks().any()) touch(value, writes, what);
  return Call().to_cpu(value);
}

TORCH_LIBRARY(emulated_gpu, m) {
  c10::SetAllocator(c10::kCUDA, &device_memory, 1);
  m.def("device_count", [](int64_t) { return static_cast<int64_t>(kDevices); });
  m.def("current_device", [](int64_t) { return static_cast<int64_t>(current_device); });
  m.def("set_device", [](int64_t device) { Guard().setDevice(Device(c10::kCUDA, device)); });
  m.def("current_stream", [](int64_t device) { return static_cast<int64_t>(current_stream[device]); });
  m.def("set_stream", [](int64_t device, int64_t stream) { current_stream[device] = stream; });
  m.def("allocated", [](int64_t device) { return statistics[device].current.load(); });
  m.def("peak", [](int64_t device) { return statistics[device].peak.load(); });
  m.def("reset_peak", [](int64_t device) { statistics[device].peak = statistics[device].current.load(); });
  m.def("record", [](int64_t stream) { return clocks().record(stream); });
  m.def("wait", [](int64_t stream, int64_t event) { clocks().wait(stream, event); });
  m.def("synchronize", [](int64_t event) { clocks().synchronize(event); });
  m.def("synchronize_all", [](int64_t) { clocks().synchronize_all(); });
  m.def("watch", [](bool watched) { clocks().watch(watched); });
  m.def("races", [](int64_t) { return clocks().told(); });
  m.def("seen_by", &seen_by);
}

}  // namespace
