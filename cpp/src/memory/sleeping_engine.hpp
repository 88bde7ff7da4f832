// SleepingEngine: a PoolEngine whose pool can give all physical memory back and keep its addresses.
#pragma once

#include <memory>
#include <vector>

#include "memory/pool_engine.hpp"

namespace ng {

class SleepingEngine : public PoolEngine {
 public:
  // As HostPool's; without a sink the contents are lost.
  void sleep(std::shared_ptr<PageSink> sink);
  void wake();
  bool is_asleep() const;

 protected:
  using PoolEngine::PoolEngine;

  // Frees what callers have given back and may still be in use. May throw: the pool then stays awake. Called under all
  // locks.
  virtual void settle() {}
  // Hand the contents of extents to the sink, and fetch them.
  virtual void put(PageSink& sink, const std::vector<Extent>& extents) = 0;
  virtual void get(PageSink& sink, const std::vector<Extent>& extents) = 0;
  // Gives the memory of an arena back, which keeps its addresses. Returns 0 or errno.
  virtual int discard(Extent arena) noexcept = 0;
  // Undoes it. May throw: all is then as before.
  virtual void restore(Extent arena) = 0;

 private:
  void set_state(State state);
  std::vector<Extent> arenas() const;

  // Of the sleep in progress: whoever moved the state to falling_asleep or waking owns them.
  std::shared_ptr<PageSink> sink_;
  std::vector<Extent> kept_;
};

}  // namespace ng
