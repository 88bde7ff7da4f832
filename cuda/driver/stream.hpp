// The driver's handles of streams and events.
#pragma once

#include "core/shim/cuda.hpp"
#include "narrowgauge/stream.hpp"

namespace ng::cuda {

inline StreamHandle handle_of(const Stream& stream) noexcept { return reinterpret_cast<StreamHandle>(stream.handle()); }
inline EventHandle handle_of(const Event& event) noexcept { return reinterpret_cast<EventHandle>(event.handle()); }

}  // namespace ng::cuda
