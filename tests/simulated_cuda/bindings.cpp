// How torch, and Python, come to the device.

#include "generators.h"
#include "graphs.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>
#include <cstring>

namespace simulated {

using c10::DeviceIndex;
using c10::DeviceType;

// --- Streams and events of torch

static constexpr int64_t STREAMS = 32;  // of a priority: torch hands them out in turn, again and again

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device next) const override {
    return {DeviceType::CUDA, DeviceIndex(exchange_device(next.index()))};
  }
  c10::Device getDevice() const override { return {DeviceType::CUDA, DeviceIndex(current_device())}; }
  void setDevice(c10::Device next) const override { exchange_device(next.index()); }
  void uncheckedSetDevice(c10::Device next) const noexcept override { exchange_device(next.index()); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(device().memories.size()); }

  static c10::Device named(c10::Device on) {
    return {DeviceType::CUDA, DeviceIndex(on.has_index() ? on.index() : current_device())};
  }
  static c10::Stream known(c10::Device on, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, named(on), id); }
  static Stream& ours(const c10::Stream& stream) { return simulated::stream(stream.device_index(), stream.id()); }

  c10::Stream getStream(c10::Device on) const override { return known(on, current_stream(named(on).index()).id); }
  c10::Stream getDefaultStream(c10::Device on) const override { return known(on, 0); }
  c10::Stream getNewStream(c10::Device on, int priority) const override {
    Lock lock;
    return known(on, 1 + (priority < 0 ? STREAMS : 0) + device().next_stream++ % STREAMS);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return getNewStream(on, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return known(next.device(), exchange_stream(next.device_index(), next.id()));
  }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock;
    forbid_in_capture();
    return ours(stream).busy_until <= now();
  }
  void synchronizeStream(const c10::Stream& stream) const override { wait_for(ours(stream)); }
  bool isStreamCapturing(const c10::Stream& stream) const { return ours(stream).capture; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream&) const override {
    Lock lock;
    if (auto* block = static_cast<Block*>(data.get_context())) block->is_recorded = true;
  }
  void synchronizeDevice(DeviceIndex on) const override {
    Clock clock;
    double time = 0;
    {
      Lock lock;
      forbid_in_capture(true);
      for (auto& stream : device().streams)
        if (stream->device == on) {
          join(clock, stream->clock);
          time = std::max(time, stream->busy_until);
        }
    }
    wait_for(clock, time);
  }

  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& on, const DeviceIndex, const c10::EventFlag) const override {
    Lock lock;
    auto& stream = ours(on);
    if (!*event) *event = new Event();
    auto& made = *static_cast<Event*>(*event);
    if (stream.capture) {
      stream.capture->record(made, stream);
      return;
    }
    begin(stream);
    made = Event{stream.clock, std::max(stream.busy_until, now())};
  }
  void block(void* event, const c10::Stream& on) const override {
    Lock lock;
    auto& stream = ours(on);
    auto& reached = *static_cast<Event*>(event);
    if (reached.capture) {
      TORCH_CHECK(is_open(reached), "CUDA error: an event of a capture that has ended");
      TORCH_CHECK(!stream.capture || stream.capture == reached.capture, "CUDA error: two captures would be merged");
      reached.capture->wait(reached, stream);
      return;
    }
    if (stream.capture) {
      stream.capture->is_broken = true;
      TORCH_CHECK(false, "CUDA error: dependency created on uncaptured work in another stream");
    }
    join(stream.clock, reached.clock);
    stream.busy_until = std::max(stream.busy_until, reached.time);
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    Lock lock;
    forbid_in_capture();
    auto& reached = *static_cast<Event*>(event);
    TORCH_CHECK(!reached.capture, "CUDA error: operation not permitted on an event last recorded in a capturing stream");
    if (reached.time > now()) return false;
    wait_for(reached.clock, 0);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    Event reached;
    {
      Lock lock;
      forbid_in_capture();
      reached = *static_cast<Event*>(event);
    }
    TORCH_CHECK(!reached.capture, "CUDA error: operation not permitted on an event last recorded in a capturing stream");
    wait_for(reached.clock, reached.time);
  }

 private:
  static bool is_open(const Event& event) {
    for (auto* graph : device().captures)
      if (graph == event.capture) return graph->serial == event.serial;
    return false;
  }
};

// --- Memory of torch

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return simulated::allocate(bytes, current_device()); }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

static void free_pinned(void* memory) {
  {
    Lock lock;
    auto found = device().pinned.find(static_cast<char*>(memory));
    forget_host_copies(found->first, found->second);
    device().pinned.erase(found);
  }
  std::free(memory);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    Lock lock;
    forbid_in_capture();
    device().pinned[static_cast<char*>(memory)] = std::max<size_t>(bytes, 1);
    return {memory, memory, &free_pinned, c10::Device(DeviceType::CPU)};
  }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return int(device().memories.size()); }
  DeviceIndex deviceCount() const override { return DeviceIndex(device().memories.size()); }
  DeviceIndex current_device() const override { return DeviceIndex(simulated::current_device()); }
  DeviceIndex getCurrentDevice() const override { return DeviceIndex(simulated::current_device()); }
  void setCurrentDevice(DeviceIndex next) const override { exchange_device(next); }
  DeviceIndex exchangeDevice(DeviceIndex next) const override { return DeviceIndex(exchange_device(next)); }
  DeviceIndex maybeExchangeDevice(DeviceIndex next) const override { return DeviceIndex(exchange_device(next)); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator made;
    return &made;
  }
  const at::Generator& getDefaultGenerator(DeviceIndex on) const override { return default_generator(on); }
  at::Generator getNewGenerator(DeviceIndex on) const override {
    return new_generator(on < 0 ? simulated::current_device() : on);
  }
};

// Neither is permitted while this thread captures, and either ends the capture.
static bool ends_capture() {
  bool ends = false;
  for (auto* graph : device().captures)
    if (graph->forbids_here()) ends = graph->is_broken = true;
  return ends;
}

static int register_pinned(uintptr_t address, size_t size) {
  Lock lock;
  if (ends_capture()) return 900;
  auto* low = reinterpret_cast<char*>(address);
  if (is_pinned(low)) return 712;
  device().pinned[low] = size;
  return 0;
}

static int unregister_pinned(uintptr_t address) {
  Lock lock;
  if (ends_capture()) return 900;
  auto found = device().pinned.find(reinterpret_cast<char*>(address));
  if (found == device().pinned.end()) return 713;
  for (auto& copy : device().host_copies)
    if (copy.host >= found->first && copy.host < found->first + found->second)
      report("memory is unpinned while a copy on stream " + std::to_string(copy.stream) + " may use it");
  forget_host_copies(found->first, found->second);
  device().pinned.erase(found);
  return 0;
}

static double elapsed_ms(uintptr_t first, uintptr_t second) {
  return (reinterpret_cast<Event*>(second)->time - reinterpret_cast<Event*>(first)->time) * 1000;
}

static void sleep(int64_t cycles) {
  Lock lock;
  auto& stream = current_stream(current_device());
  double seconds = double(cycles) / 2e9;
  if (stream.capture) {
    stream.capture->add(stream, "sleep", {}, [seconds](Stream& on, uint64_t) { end(on, seconds); });
    return;
  }
  begin(stream);
  end(stream, seconds);
}

static std::map<std::string, int64_t> memory_stats(int on) {
  Lock lock;
  auto& memory = device().memories.at(size_t(on));
  return {{"allocated", memory.allocated},
          {"reserved", memory.reserved},
          {"peak", memory.peak},
          {"peak_reserved", memory.peak_reserved},
          {"total", memory.total},
          {"driver", memory.driver},
          {"allocations", memory.allocations}};
}

// torch asks its registry of hooks once, while it is imported, and keeps what it has got: an object without
// members of its own, which becomes one of our class here.
static void become_hooks() {
  static Hooks ours{at::CUDAHooksArgs()};
  auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  std::memcpy(static_cast<void*>(&theirs), static_cast<void*>(&ours), sizeof(Hooks));
}

}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace simulated;
  static Guard guard;
  static DeviceAllocator allocator;
  c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  c10::SetAllocator(DeviceType::CUDA, &allocator, 1);
  simulated::become_hooks();
  at::globalContext().lazyInitDevice(DeviceType::CUDA);
  auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("device_count", [] { return device().memories.size(); });
  module.def("current_device", &current_device);
  module.def("exchange_device", &exchange_device);
  module.def("current_stream", [](int on) { return current_stream(on).id; }, no_gil);
  module.def("set_stream", [](int on, int64_t id) { exchange_stream(on, id); });
  module.def("is_capturing", [] { return current_stream(current_device()).capture != nullptr; }, no_gil);
  module.def("synchronize", [](int on) { guard.synchronizeDevice(DeviceIndex(on)); }, no_gil);
  module.def("sleep", &simulated::sleep, no_gil);
  module.def("elapsed_ms", &elapsed_ms);
  module.def("empty_cache", &empty_cache, no_gil);
  module.def("clear_workspaces", [] { clear_workspaces(); }, no_gil);
  module.def("memory_stats", &memory_stats, no_gil);
  module.def("set_total", [](int on, int64_t bytes) { device().memories.at(size_t(on)).total = bytes; });
  module.def("reset_peak", [](int on) {
    auto& memory = device().memories.at(size_t(on));
    memory.peak = memory.allocated;
    memory.peak_reserved = memory.reserved;
  });
  module.def("register_pinned", &register_pinned, no_gil);
  module.def("unregister_pinned", &unregister_pinned, no_gil);
  module.def("fail_allocation_in", [](int64_t count) { return std::exchange(device().fail_allocation_in, count); });
  module.def("default_generator", [](int on) { return default_generator(on); });
  module.def("new_pool", &new_pool, no_gil);
  module.def("take_races", [] {
    Lock lock;
    return std::exchange(device().races, {});
  }, no_gil);
  py::class_<Graph>(module, "Graph")
      .def(py::init<>())
      .def("capture_begin",
           [](Graph& graph, std::optional<std::pair<uint64_t, uint64_t>> pool, const std::string& mode, bool) {
             graph.capture_begin(pool, mode);
           },
           py::arg("pool") = py::none(), py::arg("capture_error_mode") = "global",
           py::arg("check_input_liveness") = false, no_gil)
      .def("capture_end", &Graph::capture_end, no_gil)
      .def("replay", &Graph::replay, no_gil)
      .def("reset", &Graph::reset, no_gil)
      .def("pool", &Graph::pool, no_gil);
}
