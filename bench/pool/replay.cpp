// What does an allocator cost? Replays a trace of allocations natively and prints one line of JSON; bench/pool.py calls
// it once for each allocator and compares.
//
//     narrowgauge_pool_replay TRACE pool|malloc|aligned|torch:LIBC10 ITERATIONS THREADS touch|plain
//
// malloc asks for alignment to 64 bytes as torch does, aligned for 4096 as direct I/O needs; LD_PRELOAD decides whose
// malloc it is. torch is c10::alloc_cpu of the library named. With `touch` every page of a new block is written once.
//
// A trace is lines of text. `keep BYTES`: live from the start to the end. Then the iteration that is repeated:
// `+ SLOT BYTES` allocates, `- SLOT AGE` frees what this iteration (AGE 0) or the one before (AGE 1) put into the slot.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "narrowgauge/memory.hpp"

namespace {

using Clock = std::chrono::steady_clock;

struct Event {
  size_t slot;
  size_t bytes;  // 0: a free
  size_t age;
};

struct Trace {
  std::vector<size_t> kept;
  std::vector<Event> events;
  size_t slots = 0;
  size_t pairs = 0;
  size_t peak_live = 0;
};

Trace read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  Trace trace;
  std::string kind;
  while (file >> kind) {
    if (kind == "keep") {
      file >> trace.kept.emplace_back();
      continue;
    }
    Event event{};
    file >> event.slot >> (kind == "+" ? event.bytes : event.age);
    trace.slots = std::max(trace.slots, event.slot + 1);
    trace.pairs += event.bytes != 0 ? 1 : 0;
    trace.events.push_back(event);
  }
  return trace;
}

// The four ways to allocate, behind the same two indirect calls.
struct Allocator {
  void* (*allocate)(size_t bytes);
  void (*deallocate)(void* block, size_t bytes);
};

ng::HostPool& host_pool() {
  static ng::HostPool pool;
  return pool;
}

template <size_t alignment>
void* allocate_aligned(size_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, alignment, bytes) != 0) throw std::bad_alloc();
  return block;
}

void* (*torch_allocate)(size_t) = nullptr;
void (*torch_deallocate)(void*) = nullptr;

Allocator allocator_named(const std::string& name) {
  if (name == "pool") {
    host_pool();
    return {[](size_t bytes) { return host_pool().allocate(bytes); },
            [](void* block, size_t bytes) { host_pool().deallocate(block, bytes); }};
  }
  if (name == "malloc") return {&allocate_aligned<64>, [](void* block, size_t) { std::free(block); }};
  if (name == "aligned") return {&allocate_aligned<4096>, [](void* block, size_t) { std::free(block); }};
  if (name.starts_with("torch:")) {
    void* library = dlopen(name.c_str() + 6, RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(dlerror());
    torch_allocate = reinterpret_cast<void* (*)(size_t)>(dlsym(library, "_ZN3c109alloc_cpuEm"));
    torch_deallocate = reinterpret_cast<void (*)(void*)>(dlsym(library, "_ZN3c108free_cpuEPv"));
    if (torch_allocate == nullptr || torch_deallocate == nullptr) throw std::runtime_error("no c10::alloc_cpu");
    return {[](size_t bytes) { return torch_allocate(bytes); }, [](void* block, size_t) { torch_deallocate(block); }};
  }
  throw std::runtime_error("unknown allocator " + name);
}

// kB of a line of /proc/self/status.
size_t status_kilobytes(const char* key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key)) return std::strtoul(line.c_str() + std::strlen(key) + 1, nullptr, 10);
  }
  return 0;
}

void touch_pages(void* block, size_t bytes) {
  auto* data = static_cast<volatile char*>(block);
  for (size_t at = 0; at < bytes; at += 4096) data[at] = 1;
}

// One thread's blocks.
class Player {
 public:
  Player(const Trace& trace, Allocator allocator, bool touch)
      : trace_(trace), allocator_(allocator), touch_(touch), slots_(2 * trace.slots) {}

  void keep() {
    for (const size_t bytes : trace_.kept) kept_.push_back(take(bytes));
  }

  void iterate() {
    parity_ ^= 1;
    for (const Event& event : trace_.events) {
      if (event.bytes != 0) {
        slots_[2 * event.slot + parity_] = take(event.bytes);
      } else {
        Block& block = slots_[2 * event.slot + (parity_ ^ event.age)];
        if (block.data != nullptr) give(block);  // the first iteration has none before it
      }
    }
  }

  // pre: not timed.
  size_t peak_live() const { return peak_; }

  void count_peak() {
    size_t live = 0;
    for (const size_t bytes : trace_.kept) live += bytes;
    std::vector<size_t> sizes(2 * trace_.slots);
    size_t parity = 0;
    for (int iteration = 0; iteration < 2; ++iteration) {
      parity ^= 1;
      for (const Event& event : trace_.events) {
        size_t& size = sizes[2 * event.slot + (parity ^ (event.bytes != 0 ? 0 : event.age))];
        live += event.bytes;
        if (event.bytes == 0) live -= size;
        size = event.bytes;
        peak_ = std::max(peak_, live);
      }
    }
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  Block take(size_t bytes) {
    const Block block{allocator_.allocate(bytes), bytes};
    if (touch_) touch_pages(block.data, bytes);
    return block;
  }

  void give(Block& block) {
    allocator_.deallocate(block.data, block.bytes);
    block = {};
  }

  const Trace& trace_;
  const Allocator allocator_;
  const bool touch_;
  std::vector<Block> slots_;
  std::vector<Block> kept_;
  size_t parity_ = 0;
  size_t peak_ = 0;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 6) throw std::runtime_error("expected TRACE ALLOCATOR ITERATIONS THREADS touch|plain");
  const Trace trace = read_trace(argv[1]);
  const Allocator allocator = allocator_named(argv[2]);
  const int iterations = std::atoi(argv[3]);
  const int threads = std::atoi(argv[4]);
  const bool touch = std::strcmp(argv[5], "touch") == 0;

  std::vector<std::unique_ptr<Player>> players;
  for (int i = 0; i < threads; ++i) players.push_back(std::make_unique<Player>(trace, allocator, touch));
  players[0]->count_peak();
  const size_t before = status_kilobytes("VmRSS");
  std::vector<double> nanoseconds;
  nanoseconds.reserve(static_cast<size_t>(iterations));
  std::barrier gate(threads);
  const auto play = [&](int index) {
    for (int iteration = 0; iteration < iterations; ++iteration) {
      gate.arrive_and_wait();
      const auto start = Clock::now();
      if (iteration == 0) players[static_cast<size_t>(index)]->keep();
      players[static_cast<size_t>(index)]->iterate();
      gate.arrive_and_wait();
      if (index == 0) nanoseconds.push_back(std::chrono::duration<double, std::nano>(Clock::now() - start).count());
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(play, i);
  play(0);
  for (std::thread& other : others) other.join();

  const double cold = nanoseconds[0];
  nanoseconds.erase(nanoseconds.begin());
  std::sort(nanoseconds.begin(), nanoseconds.end());
  const double steady = nanoseconds.empty() ? 0 : nanoseconds[nanoseconds.size() / 2];
  const size_t resident = status_kilobytes("VmHWM") - before;
  std::printf("{\"pairs\": %zu, \"cold_ns\": %.0f, \"steady_ns\": %.0f, \"resident\": %zu, \"peak_live\": %zu}\n",
              trace.pairs, cold, steady, resident << 10, players[0]->peak_live() * static_cast<size_t>(threads));
  std::fflush(stdout);
  _exit(0);  // what is live belongs to the allocator under test
} catch (const std::exception& error) {
  std::cerr << "narrowgauge_pool_replay: " << error.what() << "\n";
  return 1;
}
