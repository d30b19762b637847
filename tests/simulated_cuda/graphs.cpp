#include "graphs.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace simulated {

static std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<Pool>>& pools() {
  static auto* all = new std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<Pool>>();
  return *all;
}

std::pair<uint64_t, uint64_t> new_pool() {
  static uint64_t last = 0;
  Lock lock;
  return {0, ++last};
}

static std::shared_ptr<Pool> find_pool(std::pair<uint64_t, uint64_t> id) {
  auto pool = pools()[id].lock();
  if (!pool) {
    pool = std::make_shared<Pool>(Pool{id});
    pools()[id] = pool;
  }
  return pool;
}

Graph::~Graph() {
  Lock lock;
  abandon();
  reset();
}

// A graph that goes in the midst of a capture of the same thread ends it, but for the newest torch.
void Graph::reset() {
  Lock lock;
  if (is_ready)
    for (auto* graph : device().captures) graph->is_broken = graph->is_broken || graph->forbids_here();
  if (has_ended) clear_workspaces(origin);  // as torch does, though others may have been captured there
  if (driver_bytes) device().memories[origin->device].driver -= driver_bytes;
  driver_bytes = 0;
  nodes.clear();
  numbers.clear();
  device().idle_branches.insert(device().idle_branches.end(), branches.begin(), branches.end());
  branches.clear();
  if (memory) memory->graphs -= 1;
  memory = nullptr;
  has_ended = is_ready = false;
}

void Graph::save(const std::vector<Range>& ranges) {
  for (auto& range : ranges)
    if (range.writes) saved.emplace_back(const_cast<char*>(range.low), std::string(range.low, range.high));
}

void Graph::abandon() {
  for (auto change = saved.rbegin(); change != saved.rend(); ++change)
    std::memcpy(change->first, change->second.data(), change->second.size());
  saved.clear();
  for (auto& stream : device().streams)
    if (stream->capture == this) stream->capture = nullptr;
  auto& captures = device().captures;
  captures.erase(std::remove(captures.begin(), captures.end(), this), captures.end());
}

bool Graph::forbids_here() const {
  return mode == "global" || (mode == "thread_local" && thread == std::this_thread::get_id());
}

// What the capture that ended last has computed, as long as nothing else happens: a graph that follows it at
// once in the same pool reads that, and has to run on something for the shapes of its results.
struct Ended {
  Stream* origin = nullptr;
  std::shared_ptr<Pool> memory;
  std::vector<std::pair<char*, std::string>> contents;
};

static Ended& ended() {
  static auto* last = new Ended();
  return *last;
}

void forget_ended_capture() { ended() = Ended(); }

void Graph::capture_begin(std::optional<std::pair<uint64_t, uint64_t>> pool, const std::string& error_mode) {
  static uint64_t last = 0;
  Lock lock;
  auto& stream = current_stream(current_device());
  TORCH_CHECK(stream.id, "CUDA graphs must be captured on a non-default stream.");
  TORCH_CHECK(!is_ready && !stream.capture, "This CUDAGraph instance already owns a captured graph.");
  reset();  // what a capture that failed has left
  memory = find_pool(pool.value_or(new_pool()));
  memory->graphs += 1;
  mode = error_mode;
  thread = std::this_thread::get_id();
  origin = &stream;
  serial = ++last;
  is_broken = false;
  stream.capture = this;
  device().captures.push_back(this);
  stream_of(stream);
  auto before = std::move(ended());
  forget_ended_capture();
  if (before.origin != origin || before.memory != memory) return;
  for (auto& [address, content] : before.contents) {
    saved.emplace_back(address, std::string(address, content.size()));
    std::memcpy(address, content.data(), content.size());
  }
}

void Graph::capture_end() {
  Lock lock;
  auto& stream = current_stream(current_device());
  TORCH_CHECK(stream.capture == this && &stream == origin, "Capture must end on the same stream it began on.");
  bool is_joined = true;
  for (auto& other : device().streams)
    if (other->capture == this && other->number < other->clock.size())
      is_joined = is_joined && covers(origin->clock, other->number, other->clock[other->number]);
  Ended computed{origin, memory, {}};
  for (auto& [address, content] : saved) computed.contents.emplace_back(address, std::string(address, content.size()));
  abandon();
  ended() = std::move(computed);
  TORCH_CHECK(!is_broken, "CUDA error: operation failed due to a previous error during capture");
  TORCH_CHECK(is_joined, "CUDA error: capturing stream has unjoined work");
  has_ended = true;
  instantiate();
  is_ready = true;
}

static constexpr int64_t NODE_BYTES = 10 << 10;  // 64 KiB before CUDA 12.4

void Graph::instantiate() {
  auto size = NODE_BYTES * std::count_if(nodes.begin(), nodes.end(), [](auto& node) { return bool(node.run); });
  take_driver_memory(origin->device, size);
  driver_bytes = size;
}

std::pair<uint64_t, uint64_t> Graph::pool() const {
  TORCH_CHECK(has_ended, "Called CUDAGraph::pool() without a preceding successful capture.");
  return memory->id;
}

size_t Graph::stream_of(Stream& capturing) {
  auto found = numbers.find(capturing.number);
  if (found != numbers.end()) return found->second;
  auto& idle = device().idle_branches;
  branches.push_back(idle.empty() ? &add_stream(-1, 0) : idle.back());
  if (!idle.empty()) idle.pop_back();
  return numbers[capturing.number] = branches.size() - 1;
}

void Graph::add(Stream& on, std::string what, std::vector<Range> ranges, std::function<void(Stream&, uint64_t)> run) {
  TORCH_CHECK(!is_broken, "CUDA error: operation failed due to a previous error during capture");
  begin(on);
  nodes.push_back({stream_of(on), std::move(what), std::move(ranges), std::move(run), {}, {}});
}

void Graph::record(Event& event, Stream& on) {
  event.capture = this;
  event.serial = serial;
  event.slot = events++;
  begin(on);
  event.clock = on.clock;
  Node node{stream_of(on), "record", {}, {}, event.slot, {}};
  nodes.push_back(std::move(node));
}

void Graph::wait(const Event& event, Stream& on) {
  on.capture = this;
  join(on.clock, event.clock);
  Node node{stream_of(on), "wait", {}, {}, {}, event.slot};
  nodes.push_back(std::move(node));
}

void Graph::replay() {
  Lock lock;
  TORCH_CHECK(is_ready, "Called CUDAGraph::replay without a preceding successful capture.");
  auto& launched = current_stream(origin->device);  // whatever the current device is
  TORCH_CHECK(!launched.capture, "a graph inside of a graph is not simulated");
  begin(launched);
  for (auto* branch : branches) {
    join(branch->clock, launched.clock);
    branch->busy_until = launched.busy_until;
  }
  std::vector<Event> reached(events);
  for (auto& node : nodes) {
    auto& on = *branches[node.stream];
    if (node.records) {
      begin(on);
      reached[*node.records].clock = on.clock;
      reached[*node.records].time = on.busy_until;
    } else if (node.waits) {
      join(on.clock, reached[*node.waits].clock);
      on.busy_until = std::max(on.busy_until, reached[*node.waits].time);
    } else {
      auto tick = begin(on);
      auto began = now();
      for (auto& range : node.ranges)
        note(on, tick, range.low, range.high, range.writes, "(captured) " + node.what, memory.get());
      node.run(on, tick);
      end(on, now() - began);
    }
  }
  for (auto* branch : branches) {
    join(launched.clock, branch->clock);
    launched.busy_until = std::max(launched.busy_until, branch->busy_until);
  }
}

}  // namespace simulated
