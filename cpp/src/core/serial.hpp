// The caller's thread as an executor: for what one thread does within a parallel_for, a part of a matrix at a time.
#pragma once

#include "narrowgauge/executor.hpp"

namespace ng {

class Serial final : public Executor {
 public:
  int threads() const override { return 1; }
  void set_threads(int) override {}
  std::string name() const override { return "serial"; }

 private:
  void run(int64_t count, int64_t, Body body, const void* context) override { body(context, 0, count); }
};

}  // namespace ng
