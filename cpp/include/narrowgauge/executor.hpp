// The executor: the threads on which CPU kernels run.
//
// There is one per process. It either owns a pool (workers spin for a short while after each call, then sleep)
// or lends itself the threads of an OpenMP runtime that is already in the process, such as torch's, so that the
// two never compete for a core. Calls from several threads queue. After fork the child gets a pool of its own.
// Workers of a pool of its own, which have the cores of the thread that started them, are kept off that of the caller
// that wakes them, where there is another; no other thread's affinity is set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace ng {

class Executor {
 public:
  // A body works on [begin, end). It must not throw and must not call parallel_for on the same executor.
  using Body = void (*)(const void* context, int64_t begin, int64_t end);

  virtual ~Executor() = default;

  // Threads that take part in a call, the caller included.
  virtual int threads() const = 0;

  // Takes effect with the next call. Throws InvalidArgument unless threads >= 1, SystemError if the system gives none.
  virtual void set_threads(int threads) = 0;

  // Splits [0, count) into chunks of at least `grain` whose sizes differ by one at most, runs them on all threads and
  // returns when all are done; it is one chunk, in the caller's thread, where two would be smaller. The body's writes
  // are visible to the caller.
  template <typename F>
  void parallel_for(int64_t count, int64_t grain, const F& f) {
    run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
  }

  // "pool" or "openmp (<library>)".
  virtual std::string name() const = 0;

 private:
  virtual void run(int64_t count, int64_t grain, Body body, const void* context) = 0;
};

// A pool of its own; `threads` counts the caller. Throws InvalidArgument, or SystemError if the system gives no
// threads.
std::unique_ptr<Executor> make_pool(int threads);

// The process's executor. Starts as a pool of one thread per usable core.
Executor& default_executor();

// Makes the default executor run on the OpenMP runtime that is loaded in this process (libgomp, libomp or
// libiomp5; torch brings one) with that runtime's thread count. Returns an empty string, or the reason why not.
// Thread-safe; calls that are running finish on the threads that they have.
std::string adopt_openmp();

}  // namespace ng
