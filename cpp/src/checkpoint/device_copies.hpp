// Copies from GPUs into host memory, on one stream of our own for each GPU, in the order that they are given.
//
// They overlap with the host only where that memory is pinned. Not thread-safe.
#pragma once

#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include "narrowgauge/stream.hpp"

namespace ng {

class DeviceCopies {
 public:
  DeviceCopies() = default;
  ~DeviceCopies() { drain(); }
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  // Copies from cuda:`gpu` that are given from now on come after the work that the caller's stream has been given.
  void follow(int gpu, CUstream_st* stream);
  // The streams that were followed go on only after the copies given so far; they are forgotten.
  void lead();
  void forget() noexcept { followed_.clear(); }

  // Both stay until it is done.
  void copy(std::byte* to, const std::byte* from, size_t bytes, int gpu);
  // Points behind all copies given so far: to be synchronised with.
  std::vector<Event> mark();
  // Waits until none is under way, whatever became of them.
  void drain() noexcept;

 private:
  Stream& own(int gpu);

  std::map<int, Stream> own_;
  std::vector<std::pair<int, CUstream_st*>> followed_;
};

}  // namespace ng
