// A CUDA device that is not there: its memory, streams, events and what they have done.
//
// Every kernel runs at once, on the CPU, in the device's own memory. What is simulated is order: each
// stream has a vector clock (Lamport 1978, Fidge 1988), as has the host, and each piece of memory knows
// who has read and written it. Two accesses that nothing orders are a race, whatever the delays of a run.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <thread>
#include <vector>

namespace simulated {

using Clock = std::vector<uint64_t>;  // by number of stream
void join(Clock& mine, const Clock& other);
bool covers(const Clock& clock, size_t stream, uint64_t tick);

struct Graph;

// An ordered queue of work. The branches of a graph are streams of device -1.
struct Stream {
  size_t number;
  int device;
  int64_t id;
  Clock clock;
  double busy_until = 0;  // seconds of now()
  Graph* capture = nullptr;
};

struct Event {
  Clock clock;
  double time = 0;
  Graph* capture = nullptr;  // recorded within this capture
  size_t slot = 0;           // of it
  uint64_t serial = 0;       // of the capture
};

struct Access {
  const char* low;
  const char* high;  // exclusive
  size_t stream;
  uint64_t tick;
  bool writes;
  std::string what;
};

// Memory of captured graphs: what a capture has freed goes to later captures of the same pool only.
struct Pool {
  std::pair<uint64_t, uint64_t> id;
  int graphs = 0;
};

struct Block {
  char* base;
  size_t size;
  int device;
  size_t stream;  // allocated for
  std::shared_ptr<Pool> pool;
  bool is_live = true;
  bool is_recorded = false;  // Tensor.record_stream
  std::list<Access> history;
};

using Kind = std::tuple<size_t, int, size_t, const Pool*>;  // size, device, stream, pool

// A copy between the device and pinned memory that the host has not waited for.
struct HostCopy {
  size_t stream;
  uint64_t tick;
  char* host;
  bool to_host;
  std::vector<char> bytes;  // what was there when it was read; what will be there
};

struct Memory {
  int64_t total, allocated = 0, reserved = 0, peak = 0, peak_reserved = 0, allocations = 0;
  int64_t driver = 0;  // of executable graphs, which no allocator counts
  int64_t free() const { return total - reserved - driver; }
};

struct Device {
  Device();
  std::recursive_mutex mutex;
  std::vector<Memory> memories;
  std::vector<std::unique_ptr<Stream>> streams;  // by number
  std::map<std::pair<int, int64_t>, size_t> numbers;
  std::map<const char*, std::unique_ptr<Block>> blocks;  // by address
  std::map<Kind, std::vector<Block*>> idle;
  std::map<const char*, size_t> pinned;
  std::vector<HostCopy> host_copies;
  std::map<std::tuple<size_t, int, int64_t>, c10::DataPtr> workspaces;  // of cuBLAS: handle, device, stream
  std::vector<Graph*> captures;
  Clock host;
  std::vector<std::string> races;
  int64_t next_stream = 0;
  std::vector<Stream*> idle_branches;  // of graphs that are no more
  int64_t fail_allocation_in = -1;  // of memory; 0 is the next
};

Device& device();
double now();

// Nobody waits for the device with Python's lock in hand, since who has the device may wait for that.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
};

Stream& stream(int device, int64_t id);
Stream& add_stream(int device, int64_t id);
Stream& current_stream(int device);
int64_t exchange_stream(int device, int64_t id);
int current_device();
int exchange_device(int device);

void forget_ended_capture();

// Something begins on a stream: what the host has done before comes first. Returns its tick.
uint64_t begin(Stream& stream);
void end(Stream& stream, double seconds);
void wait_for(Stream& stream);  // the host waits
void wait_for(const Clock& clock, double time);
void forbid_in_capture(bool of_whole_device = false);

c10::DataPtr allocate(size_t bytes, int device);
void empty_cache();
void take_driver_memory(int device, int64_t bytes);
std::pair<const char*, const char*> workspace(Stream& stream);  // of cuBLAS, for this thread
void clear_workspaces(const Stream* only = nullptr);
bool is_pinned(const void* address, size_t bytes = 1);
void note(Stream& stream, uint64_t tick, const void* low, const void* high, bool writes, const std::string& what,
          const Pool* pool);
void report(const std::string& race);
std::pair<const char*, const char*> extent(const at::Tensor& tensor);
void copy_from_host(Stream& stream, uint64_t tick, const at::Tensor& source);
void copy_to_host(Stream& stream, uint64_t tick, const at::Tensor& target);
void settle_host_copies();
void forget_host_copies(const char* low, size_t size);

}  // namespace simulated
