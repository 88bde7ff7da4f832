// Sleep and wake; see sleeping_engine.hpp.
#include "memory/sleeping_engine.hpp"

#include <system_error>

namespace ng {

void SleepingEngine::sleep(std::shared_ptr<PageSink> sink) {
  std::vector<Extent> kept;
  {
    // With grow_ no arena is on its way; after this none can come before wake().
    const std::lock_guard growing(grow_);
    const AllLocks locks(*this);
    require(State::awake, "sleep");
    empty_caches();
    settle();
    if (sink) kept = extents(true);
    state_ = State::falling_asleep;
  }
  try {
    if (sink) put(*sink, kept);
  } catch (...) {
    set_state(State::awake);
    throw;
  }
  sink_ = std::move(sink);
  kept_ = std::move(kept);
  int error = 0;
  for (const Extent arena : arenas()) {
    if (const int result = discard(arena); result != 0) error = result;
  }
  set_state(State::asleep);
  if (error != 0) {
    throw SystemError(error,
                      concat("the system keeps pages of a sleeping pool: ", std::generic_category().message(error)));
  }
}

void SleepingEngine::wake() {
  {
    const AllLocks locks(*this);
    require(State::asleep, "wake");
    state_ = State::waking;
  }
  std::vector<Extent> restored;
  try {
    for (const Extent arena : arenas()) {
      restore(arena);
      restored.push_back(arena);
    }
    if (sink_) get(*sink_, kept_);
  } catch (...) {
    for (const Extent arena : restored) discard(arena);
    set_state(State::asleep);
    throw;
  }
  kept_.clear();
  sink_.reset();
  set_state(State::awake);
}

bool SleepingEngine::is_asleep() const {
  const std::lock_guard lock(mutex_);
  return state_ != State::awake;
}

void SleepingEngine::set_state(State state) {
  const AllLocks locks(*this);
  state_ = state;
}

std::vector<PoolEngine::Extent> SleepingEngine::arenas() const {
  const std::lock_guard lock(mutex_);
  return extents(false);
}

}  // namespace ng
