#include "device.h"

#include "graphs.h"

#include <Python.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace simulated {

void join(Clock& mine, const Clock& other) {
  if (mine.size() < other.size()) mine.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

bool covers(const Clock& clock, size_t stream, uint64_t tick) {
  return stream < clock.size() && clock[stream] >= tick;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Device::Device() {
  const char* count = std::getenv("SIMULATED_CUDA_DEVICES");
  const char* bytes = std::getenv("SIMULATED_CUDA_BYTES");
  memories.assign(count ? std::atoi(count) : 2, Memory{bytes ? std::atoll(bytes) : int64_t(2) << 30});
}

// Never destroyed: tensors outlive the modules that made them.
Device& device() {
  static auto* made = new Device();
  return *made;
}

Lock::Lock() {
  auto& mutex = device().mutex;
  if (mutex.try_lock()) return;
  if (!Py_IsInitialized() || !PyGILState_Check()) {
    mutex.lock();
    return;
  }
  auto* state = PyEval_SaveThread();
  mutex.lock();
  PyEval_RestoreThread(state);
}

Lock::~Lock() { device().mutex.unlock(); }

// --- Streams

Stream& add_stream(int on, int64_t id) {
  auto& all = device().streams;
  all.push_back(std::make_unique<Stream>(Stream{all.size(), on, id, {}}));
  return *all.back();
}

Stream& stream(int on, int64_t id) {
  Lock lock;
  auto found = device().numbers.find({on, id});
  if (found != device().numbers.end()) return *device().streams[found->second];
  auto& made = add_stream(on, id);
  device().numbers[{on, id}] = made.number;
  return made;
}

thread_local int current = 0;
thread_local std::map<int, int64_t> current_streams;

int current_device() { return current; }

int exchange_device(int next) {
  TORCH_CHECK(next < int(device().memories.size()), "CUDA error: invalid device ordinal");
  int before = current;
  if (next >= 0) current = next;
  return before;
}

Stream& current_stream(int on) { return stream(on, current_streams[on]); }

int64_t exchange_stream(int on, int64_t id) { return std::exchange(current_streams[on], id); }

uint64_t begin(Stream& on) {
  if (!on.capture) forget_ended_capture();
  join(on.clock, device().host);
  if (on.clock.size() <= on.number) on.clock.resize(on.number + 1, 0);
  return ++on.clock[on.number];
}

void end(Stream& on, double seconds) { on.busy_until = std::max(on.busy_until, now() - seconds) + seconds; }

void wait_for(const Clock& clock, double time) {
  double left = time - now();
  if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
  Lock lock;
  join(device().host, clock);
  settle_host_copies();
}

void wait_for(Stream& on) {
  Clock clock;
  double time;
  {
    Lock lock;
    forbid_in_capture();
    TORCH_CHECK(!on.capture, "CUDA error: operation not permitted when stream is capturing");
    clock = on.clock;
    time = on.busy_until;
  }
  wait_for(clock, time);
}

void forbid_in_capture(bool of_whole_device) {
  for (auto* graph : device().captures) {
    if (!of_whole_device && !graph->forbids_here()) continue;
    graph->is_broken = true;
    TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing");
  }
}

// --- Memory

static constexpr size_t GRAIN = 512;

static Kind kind_of(const Block& block) { return {block.size, block.device, block.stream, block.pool.get()}; }

static void release(Block& block) {
  forget_ended_capture();
  device().memories[block.device].reserved -= int64_t(block.size);
  std::free(block.base);
  device().blocks.erase(block.base);
}

// While anything is captured torch gives nothing back, whoever asks.
void empty_cache() {
  Lock lock;
  TORCH_CHECK(device().captures.empty(), "captures_underway.empty() INTERNAL ASSERT FAILED");
  auto& idle = device().idle;
  for (auto of_kind = idle.begin(); of_kind != idle.end();) {
    auto& blocks = of_kind->second;
    bool is_kept = !blocks.empty() && blocks[0]->pool && blocks[0]->pool->graphs;
    if (!is_kept)
      for (auto* block : blocks) release(*block);
    of_kind = is_kept ? std::next(of_kind) : idle.erase(of_kind);
  }
}

static void free_block(void* context) {
  Lock lock;
  auto& block = *static_cast<Block*>(context);
  device().memories[block.device].allocated -= int64_t(block.size);
  block.is_live = false;
  if (block.is_recorded)
    release(block);  // the allocator waits for the other streams before it gives it away
  else
    device().idle[kind_of(block)].push_back(&block);
}

static Block* idle_block(const Kind& kind) {
  auto found = device().idle.find(kind);
  if (found == device().idle.end() || found->second.empty()) return nullptr;
  auto* block = found->second.back();
  found->second.pop_back();
  return block;
}

c10::DataPtr allocate(size_t bytes, int on) {
  Lock lock;
  c10::Device where(c10::DeviceType::CUDA, c10::DeviceIndex(on));
  if (!bytes) return {nullptr, where};
  size_t size = (bytes + GRAIN - 1) / GRAIN * GRAIN;
  auto& stream = current_stream(on);
  auto pool = stream.capture ? stream.capture->memory : nullptr;
  auto& memory = device().memories[on];
  Block* block = idle_block({size, on, stream.number, pool.get()});
  bool is_refused = device().fail_allocation_in >= 0 && device().fail_allocation_in-- == 0;
  if (is_refused || !block) {
    if (device().captures.empty() && int64_t(size) > memory.free()) empty_cache();  // as torch does
    if (is_refused || int64_t(size) > memory.free())
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes. GPU ", on,
                       " has a total capacity of ", memory.total, " bytes, ", memory.reserved, " reserved");
    auto* base = static_cast<char*>(std::aligned_alloc(GRAIN, size));
    auto made = std::make_unique<Block>(Block{base, size, on, stream.number, pool});
    block = made.get();
    device().blocks[base] = std::move(made);
    memory.reserved += int64_t(size);
    memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
  }
  std::memset(block->base, 0xff, size);  // not a number in every float type
  block->is_live = true;
  memory.allocated += int64_t(size);
  memory.allocations += 1;
  memory.peak = std::max(memory.peak, memory.allocated);
  return {block->base, block, &free_block, where};
}

void take_driver_memory(int on, int64_t bytes) {
  auto& memory = device().memories[on];
  TORCH_CHECK(bytes <= memory.free(), "CUDA error: out of memory");
  memory.driver += bytes;
}

// --- cuBLAS

static std::vector<size_t>& idle_handles() {
  static auto* all = new std::vector<size_t>();
  return *all;
}

// Each thread that lives has one of its own; the next thread gets that of one that has ended.
struct Handle {
  size_t number;
  Handle() {
    static size_t made = 0;
    Lock lock;
    auto& idle = idle_handles();
    number = idle.empty() ? made++ : idle.back();
    if (!idle.empty()) idle.pop_back();
  }
  ~Handle() {
    std::lock_guard<std::recursive_mutex> lock(device().mutex);
    idle_handles().push_back(number);
  }
};

static constexpr size_t WORKSPACE_BYTES = 16 << 10;  // 8 to 32 MiB of a real one

// Made at the first matrix product of a handle on a stream, and kept until somebody clears them.
std::pair<const char*, const char*> workspace(Stream& stream) {
  thread_local Handle handle;
  auto& held = device().workspaces[{handle.number, stream.device, stream.id}];
  if (!held) held = allocate(WORKSPACE_BYTES, stream.device);
  auto* low = static_cast<const char*>(held.get());
  return {low, low + WORKSPACE_BYTES};
}

void clear_workspaces(const Stream* only) {
  Lock lock;
  std::erase_if(device().workspaces, [&](const auto& entry) {
    auto& [handle, on, id] = entry.first;
    return !only || (on == only->device && id == only->id);
  });
}

static Block* find_block(const char* address) {
  auto& blocks = device().blocks;
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  auto* block = std::prev(after)->second.get();
  return address < block->base + block->size ? block : nullptr;
}

std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  if (!tensor.numel()) return {nullptr, nullptr};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  auto* low = static_cast<const char*>(tensor.const_data_ptr());
  return {low, low + (last + 1) * int64_t(tensor.element_size())};
}

// --- Order

void report(const std::string& race) {
  if (device().races.size() < 20) device().races.push_back(race);
}

static bool overlap(const Access& access, const char* low, const char* high) {
  return access.low < high && low < access.high;
}

void note(Stream& by, uint64_t tick, const void* from, const void* to, bool writes, const std::string& what,
          const Pool* pool) {
  auto* low = static_cast<const char*>(from);
  auto* high = static_cast<const char*>(to);
  if (low == high) return;
  auto* block = find_block(low);
  if (!block) {
    report(what + " uses memory that was given back to the device");
    return;
  }
  if (!block->is_live && (!block->pool || block->pool.get() != pool)) report(what + " uses memory that was freed");
  auto& history = block->history;
  for (auto access = history.begin(); access != history.end();) {
    bool before = covers(by.clock, access->stream, access->tick);
    if ((writes || access->writes) && !before && overlap(*access, low, high))
      report(what + " on stream " + std::to_string(by.number) + (writes ? " writes" : " reads") + " what " +
             access->what + " on stream " + std::to_string(access->stream) + (access->writes ? " writes" : " reads"));
    bool is_old = covers(device().host, access->stream, access->tick);
    bool is_replaced = before && (writes || !access->writes) && access->stream == by.number &&
                       low <= access->low && access->high <= high;
    access = is_old || is_replaced ? history.erase(access) : std::next(access);
  }
  history.push_back({low, high, by.number, tick, writes, what});
}

// --- Pinned memory

bool is_pinned(const void* address, size_t bytes) {
  Lock lock;
  auto* low = static_cast<const char*>(address);
  auto after = device().pinned.upper_bound(low);
  if (after == device().pinned.begin()) return false;
  auto [base, size] = *std::prev(after);
  return low + bytes <= base + size;
}

void copy_from_host(Stream& by, uint64_t tick, const at::Tensor& source) {
  auto [low, high] = extent(source);
  device().host_copies.push_back({by.number, tick, const_cast<char*>(low), false, std::vector<char>(low, high)});
}

// The bytes arrive when the host waits for them, and not before.
void copy_to_host(Stream& by, uint64_t tick, const at::Tensor& target) {
  auto [low, high] = extent(target);
  device().host_copies.push_back({by.number, tick, const_cast<char*>(low), true, std::vector<char>(low, high)});
  std::memset(const_cast<char*>(low), 0xff, size_t(high - low));
}

static void settle(const HostCopy& copy) {
  if (copy.to_host)
    std::memcpy(copy.host, copy.bytes.data(), copy.bytes.size());
  else if (std::memcmp(copy.host, copy.bytes.data(), copy.bytes.size()))
    report("the host overwrites pinned memory that a copy on stream " + std::to_string(copy.stream) + " reads");
}

void settle_host_copies() {
  auto& copies = device().host_copies;
  std::vector<HostCopy> later;
  for (auto& copy : copies) {
    if (covers(device().host, copy.stream, copy.tick))
      settle(copy);
    else
      later.push_back(std::move(copy));
  }
  copies = std::move(later);
}

void forget_host_copies(const char* low, size_t size) {
  auto& copies = device().host_copies;
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [&](const HostCopy& copy) {
                                if (copy.host < low || copy.host >= low + size) return false;
                                settle(copy);
                                return true;
                              }),
               copies.end());
}

}  // namespace simulated
