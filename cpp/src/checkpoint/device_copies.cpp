// Copies from GPUs.
#include "checkpoint/device_copies.hpp"

#include <algorithm>

#include "narrowgauge/error.hpp"

namespace ng {

Stream& DeviceCopies::own(int gpu) {
  const auto known = own_.find(gpu);
  return known != own_.end() ? known->second : own_.emplace(gpu, Stream::create(gpu)).first->second;
}

void DeviceCopies::follow(int gpu, CUstream_st* stream) {
  const std::pair caller(gpu, stream);
  if (std::find(followed_.begin(), followed_.end(), caller) != followed_.end()) return;
  Event before(gpu);
  before.record(Stream(gpu, stream));
  own(gpu).wait(before);
  followed_.push_back(caller);
}

void DeviceCopies::lead() {
  for (const auto& [gpu, stream] : followed_) {
    Event after(gpu);
    after.record(own(gpu));
    Stream(gpu, stream).wait(after);
  }
  followed_.clear();
}

void DeviceCopies::copy(std::byte* to, const std::byte* from, size_t bytes, int gpu) {
  ng::copy(to, from, bytes, own(gpu));
}

std::vector<Event> DeviceCopies::mark() {
  std::vector<Event> points;
  for (const auto& [gpu, stream] : own_) {
    points.emplace_back(gpu);
    points.back().record(stream);
  }
  return points;
}

void DeviceCopies::drain() noexcept {
  try {
    for (const Event& point : mark()) point.synchronize();
  } catch (const Error&) {
    return;  // the device is lost, and with it what was under way; or this is a forked child, whose parent has it
  }
}

}  // namespace ng
