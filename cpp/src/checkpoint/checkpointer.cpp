// A save: laid out and copied on the caller's thread, written and committed on one of its own.
//
// Several writers agree by three exchanges, in which each says what it has or why it has failed: (1) the name of the
// temporary directory, (2) the shards, all durable, (3) whether writer 0 has committed. A writer that fails goes
// through all exchanges that the others still enter, so that nobody waits for it; one that is gone makes `exchange`
// throw.
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "checkpoint/directory.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/shard.hpp"
#include "narrowgauge/checkpoint.hpp"

namespace ng {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::string shard_name(int writer, int writers) {
  char name[64];
  std::snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", writer, writers);
  return name;
}

}  // namespace

struct Checkpointer::Impl {
  std::string directory;
  CheckpointOptions options;
  std::shared_ptr<FileSystem> files;
  std::optional<DirectoryLock> lock;  // writer 0's
  pid_t process = getpid();
  bool closed = false;
  ShardMemory memory;
  Shard shard{memory};
  std::thread thread;

  mutable std::mutex mutex;
  std::condition_variable changed;
  // Under the mutex.
  bool running = false;
  bool released = true;
  std::exception_ptr error;
  CheckpointReport last;

  bool leads() const noexcept { return options.writer == 0; }

  void check_usable() const {
    NG_CHECK(getpid() == process, CheckpointError, "this Checkpointer on ", directory, " was opened by process ",
             process, ", not by this child of it: open one in the child");
    NG_CHECK(!closed, CheckpointError, "this Checkpointer on ", directory, " is closed");
  }

  // Ends the thread of a save that is over, and throws what it failed with, once.
  void finish() {
    if (thread.joinable()) thread.join();
    const std::lock_guard guard(mutex);
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  // --- the background thread --------------------------------------------------------------------------------

  // Everybody's message. A message that begins with '-' is a failure: throws it, unless it is this writer's own, which
  // is thrown as it was.
  std::vector<std::string> exchange(const std::string& message, const std::exception_ptr& own) const {
    std::vector<std::string> all{message};
    if (options.writers > 1) all = options.exchange(message);
    if (own) std::rethrow_exception(own);
    NG_CHECK(all.size() == static_cast<size_t>(options.writers), CheckpointError, "the exchange gave ", all.size(),
             " messages, expected ", options.writers);
    for (size_t writer = 0; writer < all.size(); ++writer) {
      NG_CHECK(!all[writer].empty(), CheckpointError, "writer ", writer, " sent an empty message");
      NG_CHECK(all[writer][0] == '+', CheckpointError, "writer ", writer, " failed: ", all[writer].substr(1));
      all[writer].erase(0, 1);
    }
    return all;
  }

  // What f returns, said to all; if it throws, the reason is.
  template <typename F>
  std::vector<std::string> agree(const F& f) const {
    std::string message;
    std::exception_ptr own;
    try {
      message = concat("+", f());
    } catch (const std::exception& reason) {
      message = concat("-", reason.what());
      own = std::current_exception();
    }
    return exchange(message, own);
  }

  void release() {
    const std::lock_guard guard(mutex);
    released = true;
    changed.notify_all();
  }

  void save(int64_t step, const SaveOptions& save_options, CheckpointReport& report) {
    const std::string name = checkpoint_name(step);
    report.path = directory + "/" + name;
    std::string temporary;  // writer 0's, while it is there
    try {
      const std::string work = concat(directory, "/", agree([&]() -> std::string {
                                        if (!leads()) return {};
                                        NG_CHECK(save_options.overwrite || !exists(step), CheckpointError, "step ",
                                                 step, " exists in ", directory, "; overwrite=true replaces it");
                                        const std::string unique = temporary_name(name);
                                        files->make_directory(directory + "/" + unique);
                                        temporary = directory + "/" + unique;
                                        return unique;
                                      })[0]);

      const std::vector<std::string> reports = agree([&] {
        const auto on_released = [&] {
          const std::string reason = save_options.check ? save_options.check() : std::string();
          NG_CHECK(reason.empty(), CheckpointError, "step ", step, " is not committed: ", reason);
          release();
        };
        shard.write(*files, work, shard_name(options.writer, options.writers), on_released, options.progress);
        return manifest_text(shard.report());
      });
      agree([&] {
        if (leads()) {
          Manifest manifest = collect(reports, step);
          manifest.state = save_options.state;
          check_manifest(manifest, name);
          write_durable(*files, work + "/" + kManifestName, manifest_text(manifest));
          files->sync_directory(work);
          commit(work, report.path, step, temporary);
        }
        return std::string();
      });
    } catch (...) {
      if (!temporary.empty()) discard(temporary);
      throw;
    }
  }

  bool exists(int64_t step) const {
    const std::vector<int64_t> steps = list_steps(*files, directory);
    return std::binary_search(steps.begin(), steps.end(), step);
  }

  static Manifest collect(const std::vector<std::string>& reports, int64_t step) {
    Manifest manifest;
    for (size_t writer = 0; writer < reports.size(); ++writer) {
      Manifest part = parse_manifest(reports[writer], concat("writer ", writer));
      NG_CHECK(part.step == step, CheckpointError, "writer ", writer, " saves step ", part.step, ", writer 0 step ",
               step);
      if (writer == 0) {
        manifest = std::move(part);
      } else {
        merge_manifest(manifest, std::move(part));
      }
    }
    return manifest;
  }

  // Clears `temporary` once `work` is no longer the new checkpoint's name: what has it then may be the old one, which a
  // crash brings back unless the directory was synced.
  void commit(const std::string& work, const std::string& path, int64_t step, std::string& temporary) const {
    const bool replaces = exists(step);
    if (replaces) {
      files->exchange(work, path);
    } else {
      files->rename(work, path);
    }
    temporary.clear();
    files->sync_directory(directory);
    if (replaces) remove_directory(*files, work);  // the old one
  }

  // Best effort: what cannot be removed now is removed when the directory is opened next.
  void discard(const std::string& temporary) const noexcept {
    try {
      remove_directory(*files, temporary);
    } catch (const std::exception&) {
      return;
    }
  }

  void run(int64_t step, const SaveOptions& save_options, CheckpointReport report, Clock::time_point start) {
    std::exception_ptr failure;
    try {
      save(step, save_options, report);
      report.bytes = shard.bytes();
      report.borrowed_bytes = shard.borrowed_bytes();
      report.engine = shard.engine();
      report.seconds = seconds_since(start);
      report.cpu_seconds = thread_cpu_seconds();
      {
        const std::lock_guard guard(mutex);
        last = report;
      }
      if (leads()) {
        for (const int64_t old : steps_to_remove(list_steps(*files, directory), options.keep, options.keep_every)) {
          if (old != step) remove_step(*files, directory, old);
        }
      }
    } catch (...) {
      failure = std::current_exception();
    }
    const std::lock_guard guard(mutex);
    error = failure;
    running = false;
    released = true;
    changed.notify_all();
  }
};

Checkpointer::Checkpointer(const std::string& directory, CheckpointOptions options) : impl_(std::make_unique<Impl>()) {
  NG_CHECK(!directory.empty() && directory.find('\0') == std::string::npos, InvalidArgument,
           "the directory's name is empty or has a NUL byte");
  NG_CHECK(options.keep >= 0 && options.keep_every >= 0, InvalidArgument, "keep is ", options.keep, " and keep_every ",
           options.keep_every, ", expected neither to be negative");
  NG_CHECK(options.writers >= 1 && options.writer >= 0 && options.writer < options.writers, InvalidArgument, "writer ",
           options.writer, " of ", options.writers, " writers");
  NG_CHECK(options.writers == 1 || options.exchange, InvalidArgument, options.writers,
           " writers need a way to exchange messages");
  impl_->directory = directory;
  impl_->options = std::move(options);
  const bool native = impl_->options.file_system == nullptr;
  impl_->files = native ? std::shared_ptr<FileSystem>(native_file_system()) : impl_->options.file_system;
  if (!impl_->leads()) return;
  make_directories(*impl_->files, directory);
  if (native) impl_->lock.emplace(directory);
  remove_leftovers(*impl_->files, directory);
}

Checkpointer::~Checkpointer() {
  if (getpid() != impl_->process) {  // the thread and what it holds are the parent's
    if (impl_->thread.joinable()) impl_->thread.detach();
    return;
  }
  try {
    if (!impl_->closed) close();
  } catch (const std::exception&) {
    return;  // documented: close() reports, the destructor cannot
  }
}

void Checkpointer::save(int64_t step, std::span<const CheckpointPart> parts, SaveOptions options) {
  const Clock::time_point start = Clock::now();
  wait();
  NG_CHECK(step >= 0, InvalidArgument, "step is ", step, ", expected at least 0");
  NG_CHECK(!impl_->leads() || options.overwrite || !impl_->exists(step), CheckpointError, "step ", step, " exists in ",
           impl_->directory, "; overwrite=true replaces it");
  impl_->shard.lay_out(parts, step);
  impl_->shard.snapshot();
  CheckpointReport report;
  report.step = step;
  report.blocked_seconds = seconds_since(start);
  const std::lock_guard guard(impl_->mutex);
  try {
    impl_->thread = std::thread([impl = impl_.get(), options = std::move(options), report, step, start] {
      impl->run(step, options, report, start);
    });
  } catch (const std::system_error& error) {
    throw SystemError(error.code().value(), concat("cannot start a thread to save step ", step, ": ", error.what()));
  }
  impl_->running = true;
  impl_->released = false;
}

bool Checkpointer::busy() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->running;
}

bool Checkpointer::wait_for(double seconds) {
  impl_->check_usable();
  {
    std::unique_lock lock(impl_->mutex);
    if (!impl_->changed.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return !impl_->running; })) {
      return false;
    }
  }
  impl_->finish();
  return true;
}

void Checkpointer::wait() {
  while (!wait_for(3600)) {
  }
}

bool Checkpointer::wait_released_for(double seconds) {
  impl_->check_usable();
  {
    std::unique_lock lock(impl_->mutex);
    if (!impl_->changed.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return impl_->released; })) {
      return false;
    }
    if (impl_->running) return true;
  }
  impl_->finish();
  return true;
}

CheckpointReport Checkpointer::last() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->last;
}

void Checkpointer::close() {
  if (impl_->closed) return;
  impl_->check_usable();
  std::exception_ptr failure;
  try {
    wait();
  } catch (...) {
    failure = std::current_exception();
  }
  impl_->closed = true;
  impl_->lock.reset();
  impl_->memory.clear();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace ng
