// CUDA graphs: work that is recorded instead of done, and done again at every replay.
#pragma once

#include "device.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <optional>

namespace simulated {

struct Range {
  const char* low;
  const char* high;
  bool writes;
};

struct Node {
  size_t stream;  // of the graph
  std::string what;
  std::vector<Range> ranges;
  std::function<void(Stream&, uint64_t)> run;
  std::optional<size_t> records, waits;  // events of the graph
};

struct Graph {
  Graph() = default;
  ~Graph();
  void capture_begin(std::optional<std::pair<uint64_t, uint64_t>> pool, const std::string& mode);
  void capture_end();
  void replay();
  void reset();
  std::pair<uint64_t, uint64_t> pool() const;

  bool forbids_here() const;
  size_t stream_of(Stream& capturing);

  // What is captured runs once all the same, for the shapes of its results; what it overwrites is saved
  // before, and put back when the capture ends.
  void add(Stream& on, std::string what, std::vector<Range> ranges, std::function<void(Stream&, uint64_t)> run);
  void save(const std::vector<Range>& ranges);
  void record(Event& event, Stream& on);
  void wait(const Event& event, Stream& on);

  std::shared_ptr<Pool> memory;
  bool is_broken = false;
  uint64_t serial = 0;

 private:
  void abandon();
  void instantiate();
  std::vector<Node> nodes;
  int64_t driver_bytes = 0;
  std::vector<std::pair<char*, std::string>> saved;
  std::map<size_t, size_t> numbers;  // of branches, by number of the stream that is captured
  std::vector<Stream*> branches;
  size_t events = 0;
  Stream* origin = nullptr;
  std::thread::id thread;
  std::string mode;
  bool has_ended = false;  // well, if it was not made executable
  bool is_ready = false;
};

std::pair<uint64_t, uint64_t> new_pool();

}  // namespace simulated
