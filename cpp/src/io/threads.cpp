// The engine that works everywhere: pread and pwrite on a few threads of the file's own.
//
// Threads start as transfers come and end with the file.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "io/direct_file.hpp"
#include "io/thread.hpp"

namespace ng {
namespace {

// More only queue inside the kernel.
constexpr size_t kMaxThreads = 16;

class ThreadsFile final : public EngineFile {
 public:
  ThreadsFile(OpenedFile&& file, int queue_depth, Interference&& interference)
      : EngineFile("threads", std::move(file), queue_depth, std::move(interference)),
        max_threads_(std::min(static_cast<size_t>(queue_depth), kMaxThreads)),
        crew_(std::make_unique<Crew>()) {}

  ~ThreadsFile() override {
    // In a child the threads do not exist, and a mutex may be locked for ever: all that can be done is to leave it.
    if (!is_owner()) {
      [[maybe_unused]] const Crew* abandoned = crew_.release();
      return;
    }
    drain();
    {
      const std::lock_guard lock(crew_->mutex);
      crew_->stopping = true;
    }
    crew_->work.notify_all();
    for (std::thread& thread : crew_->threads) thread.join();
  }

 private:
  struct Crew {
    std::mutex mutex;
    std::condition_variable work;
    std::condition_variable finish;
    std::deque<Transfer*> waiting;
    std::deque<Transfer*> finished;
    std::vector<std::thread> threads;
    size_t idle = 0;
    bool stopping = false;
  };

  void start(Transfer& transfer) override {
    {
      const std::lock_guard lock(crew_->mutex);
      crew_->waiting.push_back(&transfer);
      if (crew_->idle < crew_->waiting.size() && crew_->threads.size() < max_threads_) add_thread();
      if (crew_->threads.empty()) {  // none to be had: here and now, then
        crew_->waiting.pop_back();
        transfer_now(transfer);
        crew_->finished.push_back(&transfer);
        return;
      }
    }
    crew_->work.notify_one();
  }

  Transfer& reap() override {
    std::unique_lock lock(crew_->mutex);
    crew_->finish.wait(lock, [&] { return !crew_->finished.empty(); });
    Transfer& transfer = *crew_->finished.front();
    crew_->finished.pop_front();
    return transfer;
  }

  void add_thread() {
    try {
      crew_->threads.push_back(start_thread([this] { serve(); }));
    } catch (const std::system_error&) {
      max_threads_ = crew_->threads.size();  // no more to be had: those that there are do the work
    }
  }

  void serve() {
    std::unique_lock lock(crew_->mutex);
    while (true) {
      ++crew_->idle;
      crew_->work.wait(lock, [&] { return crew_->stopping || !crew_->waiting.empty(); });
      --crew_->idle;
      if (crew_->waiting.empty()) return;
      Transfer& transfer = *crew_->waiting.front();
      crew_->waiting.pop_front();
      lock.unlock();
      transfer_now(transfer);
      lock.lock();
      crew_->finished.push_back(&transfer);
      crew_->finish.notify_one();
    }
  }

  size_t max_threads_;
  std::unique_ptr<Crew> crew_;
};

}  // namespace

std::unique_ptr<DirectFile> open_threads(OpenedFile&& file, int queue_depth, Interference&& interference) {
  return std::make_unique<ThreadsFile>(std::move(file), queue_depth, std::move(interference));
}

}  // namespace ng
