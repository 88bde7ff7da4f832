// The executor's two forms: a pool of its own, and the threads of an OpenMP runtime already in the process.
//
// Both hand out chunks of the range from one atomic counter, so a thread that the system delays costs one chunk,
// not an equal share. Calls queue on a mutex.
#include "narrowgauge/executor.hpp"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

void pause_cpu() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// One parallel_for: shared by the threads that take part.
struct Job {
  Executor::Body body;
  const void* context;
  int64_t count;
  int64_t chunks;
  std::atomic<int64_t> next{0};

  Job(Executor::Body body_, const void* context_, int64_t count_, int64_t grain, int threads)
      : body(body_), context(context_), count(count_) {
    // About four chunks a thread even out the threads' speeds, and as many for each their work.
    chunks = std::min<int64_t>(count / grain, 4 * threads);
    if (chunks > threads) chunks -= chunks % threads;
  }

  void work() noexcept {
    for (;;) {
      const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) return;
      body(context, start(chunk), start(chunk + 1));
    }
  }

 private:
  // The first count % chunks chunks have one more.
  int64_t start(int64_t chunk) const noexcept { return count / chunks * chunk + std::min(chunk, count % chunks); }
};

// Workers spin this many pauses (some tens of microseconds) after their last job, then sleep.
constexpr int kSpins = 2000;

class Pool final : public Executor {
 public:
  explicit Pool(int threads) { start(threads); }
  ~Pool() override { stop(); }

  int threads() const override { return threads_.load(std::memory_order_relaxed); }

  void set_threads(int threads) override {
    const std::lock_guard lock(mutex_);
    if (threads == threads_.load(std::memory_order_relaxed)) return;
    stop();
    start(threads);
  }

  std::string name() const override { return "pool"; }

 private:
  // state_ = epoch << 16 | open << 15 | workers inside. A worker may enter a job only while it is open; the caller
  // closes it and waits for the workers inside, so a late worker never delays a short job.
  static constexpr uint32_t kOpen = 1u << 15;
  static constexpr uint32_t kInside = kOpen - 1;
  static constexpr uint32_t kEpoch = 1u << 16;

  void start(int threads) {
    NG_CHECK(threads >= 1 && threads < static_cast<int>(kInside), InvalidArgument, "an executor needs 1 to ",
             kInside - 1, " threads, got ", threads);
    stopping_.store(false);
    kept_off_ = -1;
    if (sched_getaffinity(0, sizeof cores_, &cores_) != 0) CPU_ZERO(&cores_);
    workers_.reserve(static_cast<size_t>(threads - 1));
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error& error) {
      stop();
      threads_.store(1, std::memory_order_relaxed);
      throw SystemError(error.code().value(), concat("cannot start ", threads, " threads: ", error.what()));
    }
    threads_.store(threads, std::memory_order_relaxed);
  }

  void stop() {
    stopping_.store(true);
    state_.fetch_add(kEpoch);
    state_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void run(int64_t count, int64_t grain, Body body, const void* context) override {
    if (count <= 0) return;
    if (count / grain < 2 || threads() == 1) {
      body(context, 0, count);
      return;
    }
    const std::lock_guard lock(mutex_);
    Job job(body, context, count, grain, threads());
    job_ = &job;
    const uint32_t epoch = (state_.load(std::memory_order_relaxed) & ~(kOpen | kInside)) + kEpoch;
    state_.store(epoch | kOpen);
    if (sleepers_.load() != 0) {
      keep_off(sched_getcpu());
      state_.notify_all();
    }
    job.work();
    state_.fetch_and(~kOpen, std::memory_order_relaxed);
    while ((state_.load(std::memory_order_acquire) & kInside) != 0) pause_cpu();
  }

  // Leaves the workers all of their cores but this one, the caller's. The kernel may wake a thread on the core of its
  // waker, though another is idle, and there it would wait until the caller has done all the work.
  void keep_off(int cpu) noexcept {
    if (cpu == kept_off_) return;
    kept_off_ = cpu;
    cpu_set_t cores = cores_;
    if (cpu < 0) return;
    CPU_CLR(static_cast<size_t>(cpu), &cores);
    if (CPU_COUNT(&cores) == 0) return;
    for (std::thread& worker : workers_) pthread_setaffinity_np(worker.native_handle(), sizeof cores, &cores);
  }

  void serve() noexcept {
    uint32_t last_epoch = 0;
    for (;;) {
      uint32_t state = await(last_epoch);
      if (stopping_.load()) return;
      last_epoch = state & ~(kOpen | kInside);
      while ((state & kOpen) != 0) {
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        job_->work();
        state_.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }

  // Returns once the epoch is another than the one given.
  uint32_t await(uint32_t last_epoch) noexcept {
    const auto changed = [last_epoch](uint32_t state) { return (state & ~(kOpen | kInside)) != last_epoch; };
    uint32_t state = state_.load();
    for (int i = 0; i < kSpins && !changed(state); ++i) {
      pause_cpu();
      state = state_.load();
    }
    if (changed(state)) return state;
    sleepers_.fetch_add(1);
    // sleepers_ is raised before the last look at state_, and run() sets state_ before it looks at sleepers_: one of
    // the two sees the other.
    for (state = state_.load(); !changed(state); state = state_.load()) state_.wait(state);
    sleepers_.fetch_sub(1);
    return state;
  }

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  std::atomic<int> threads_{1};
  std::atomic<uint32_t> state_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  cpu_set_t cores_{};   // guarded by mutex_: the workers', which they have from the thread that started them
  int kept_off_ = -1;   // guarded by mutex_; -1: no core
  Job* job_ = nullptr;  // valid while a job is open or a worker is inside
};

// --- OpenMP -------------------------------------------------------------------------------------------------

// The entry points that GNU's runtime exports and LLVM's and Intel's export for compatibility.
struct OpenMpRuntime {
  std::string library;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*max_threads)() = nullptr;                                          // omp_get_max_threads
  void (*set_num_threads)(int) = nullptr;                                  // omp_set_num_threads
};

// Name of a loaded OpenMP runtime, or "". Never loads one.
std::string find_openmp() {
  std::string found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const char* slash = std::strrchr(info->dlpi_name, '/');
        const char* file = slash == nullptr ? info->dlpi_name : slash + 1;
        for (const char* known : {"libgomp", "libomp.so", "libomp-", "libiomp5"}) {
          if (std::strncmp(file, known, std::strlen(known)) == 0) {
            *static_cast<std::string*>(out) = info->dlpi_name;
            return 1;
          }
        }
        return 0;
      },
      &found);
  return found;
}

template <typename F>
void load_symbol(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
}

class OpenMp final : public Executor {
 public:
  explicit OpenMp(OpenMpRuntime runtime) : runtime_(std::move(runtime)) {}

  int threads() const override { return runtime_.max_threads(); }

  void set_threads(int threads) override {
    NG_CHECK(threads >= 1, InvalidArgument, "an executor needs at least 1 thread, got ", threads);
    runtime_.set_num_threads(threads);
  }

  std::string name() const override {
    const size_t slash = runtime_.library.rfind('/');
    return "openmp (" + runtime_.library.substr(slash == std::string::npos ? 0 : slash + 1) + ")";
  }

 private:
  void run(int64_t count, int64_t grain, Body body, const void* context) override {
    if (count <= 0) return;
    const int threads = runtime_.max_threads();
    if (count / grain < 2 || threads == 1) {
      body(context, 0, count);
      return;
    }
    const std::lock_guard lock(mutex_);
    Job job(body, context, count, grain, threads);
    runtime_.parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
  }

  OpenMpRuntime runtime_;
  std::mutex mutex_;
};

// --- the process's executor ---------------------------------------------------------------------------------

int usable_cores() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Forwards to the form in use. A form that was replaced is never destroyed, since calls may still run on it, and
// after fork its threads do not exist.
class Current final : public Executor {
 public:
  Current() {
    pthread_atfork(nullptr, nullptr, [] {
      Current& self = instance();
      self.forked_.store(true);
      self.form_.store(nullptr);
    });
  }

  static Current& instance() {
    static Current* current = new Current;  // never destroyed: workers may outlive static destruction
    return *current;
  }

  int threads() const override { return form().threads(); }
  void set_threads(int threads) override { form().set_threads(threads); }
  std::string name() const override { return form().name(); }

  std::string adopt_openmp() {
    if (forked_.load()) return "this process was forked; OpenMP runtimes do not survive fork";
    OpenMpRuntime runtime;
    runtime.library = find_openmp();
    if (runtime.library.empty()) return "no OpenMP runtime is loaded in this process";
    // NOLOAD: only a handle on what is there. Never closed: the runtime must outlive us.
    void* library = dlopen(runtime.library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return "cannot get a handle on " + runtime.library;
    load_symbol(library, "GOMP_parallel", runtime.parallel);
    load_symbol(library, "omp_get_max_threads", runtime.max_threads);
    load_symbol(library, "omp_set_num_threads", runtime.set_num_threads);
    if (runtime.parallel == nullptr || runtime.max_threads == nullptr || runtime.set_num_threads == nullptr) {
      return runtime.library + " lacks GOMP_parallel";
    }
    const std::lock_guard lock(change_);
    const Executor* now = form_.load();
    if (now == nullptr || now->name() == "pool") form_.store(new OpenMp(std::move(runtime)));
    return {};
  }

 private:
  Executor& form() const {
    Executor* now = form_.load(std::memory_order_acquire);
    if (now != nullptr) [[likely]]
      return *now;
    auto* fresh = new Pool(usable_cores());
    if (form_.compare_exchange_strong(now, fresh)) return *fresh;
    delete fresh;
    return *now;
  }

  void run(int64_t count, int64_t grain, Body body, const void* context) override {
    // Forwarding through the template keeps run() private in every form.
    form().parallel_for(count, grain, [body, context](int64_t begin, int64_t end) { body(context, begin, end); });
  }

  mutable std::atomic<Executor*> form_{nullptr};
  std::atomic<bool> forked_{false};
  std::mutex change_;
};

}  // namespace

std::unique_ptr<Executor> make_pool(int threads) { return std::make_unique<Pool>(threads); }
Executor& default_executor() { return Current::instance(); }
std::string adopt_openmp() { return Current::instance().adopt_openmp(); }

}  // namespace ng
