// Names, the lock, retention.
#include "checkpoint/directory.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <mutex>
#include <set>

#include "io/json.hpp"
#include "narrowgauge/checkpoint.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr std::string_view kPrefix = "step-";
constexpr std::string_view kTemporary = ".tmp-";
constexpr size_t kDigits = 8;

// Every lock of this process, for the child of a fork to close.
std::mutex locks_mutex;
std::set<FileDescriptor*>& locks() {
  static auto* all = new std::set<FileDescriptor*>;  // never destroyed: locks may outlive static destruction
  return *all;
}

void install_fork_handlers() {
  static const int kInstalled = pthread_atfork([] { locks_mutex.lock(); }, [] { locks_mutex.unlock(); },
                                               [] {
                                                 for (FileDescriptor* file : locks()) file->close();
                                                 locks_mutex.unlock();
                                               });
  static_cast<void>(kInstalled);
}

std::string parent_of(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  const size_t slash = end == std::string::npos ? 0 : path.rfind('/', end);
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Whoever made a directory may not have made its name durable. One that may not be read cannot be synced: then its
// maker has to have done it.
void sync_parent_of_existing(FileSystem& files, const std::string& parent) {
  try {
    files.sync_directory(parent);
  } catch (const SystemError& error) {
    if (error.errno_value() != EACCES) throw;
  }
}

}  // namespace

std::optional<int64_t> parse_step(std::string_view name) noexcept {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view digits = name.substr(kPrefix.size());
  int64_t step = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  if (error != std::errc() || end != digits.data() + digits.size() || step < 0 || digits.size() < kDigits) {
    return std::nullopt;
  }
  // One name for one step: no more zeros than the width asks for.
  if (digits.size() > kDigits && digits[0] == '0') return std::nullopt;
  return step;
}

std::string temporary_name(std::string_view name) {
  uint64_t number = 0;
  ssize_t got = 0;
  do {
    got = getrandom(&number, sizeof number, 0);
  } while (got < 0 && errno == EINTR);
  if (got != sizeof number) throw_system_error(errno, "read random bytes for", "a temporary name");
  std::string out = concat(name, kTemporary);
  for (int shift = 60; shift >= 0; shift -= 4) out += "0123456789abcdef"[number >> shift & 15];
  return out;
}

std::vector<int64_t> list_steps(FileSystem& files, const std::string& directory) {
  std::vector<int64_t> steps;
  for (const std::string& name : files.list(directory)) {
    if (const auto step = parse_step(name)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

void make_directories(FileSystem& files, const std::string& path) {
  const std::string parent = parent_of(path);
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      files.make_directory(path);
      files.sync_directory(parent);
      return;
    } catch (const SystemError& error) {
      if (error.errno_value() == EEXIST) {
        files.list(path);  // throws unless it is a directory
        sync_parent_of_existing(files, parent);
        return;
      }
      if (error.errno_value() != ENOENT || attempt != 0 || parent == path) throw;
      make_directories(files, parent);
    }
  }
}

void remove_directory(FileSystem& files, const std::string& path) {
  for (const std::string& name : files.list(path)) files.remove(concat(path, "/", name));
  files.remove(path);
}

void remove_leftovers(FileSystem& files, const std::string& directory) {
  bool synced = false;
  for (const std::string& name : files.list(directory)) {
    const size_t at = name.find(kTemporary);
    if (at == std::string::npos || !parse_step(name.substr(0, at))) continue;
    // A sync that failed may have left a rename that a crash would undo: the leftover would be a step again.
    if (!synced) files.sync_directory(directory);
    synced = true;
    remove_directory(files, concat(directory, "/", name));
  }
}

std::vector<int64_t> steps_to_remove(const std::vector<int64_t>& steps, int64_t keep, int64_t keep_every) {
  std::vector<int64_t> out;
  if (keep <= 0) return out;
  for (size_t i = 0; i + static_cast<size_t>(std::min<int64_t>(keep, INT32_MAX)) < steps.size(); ++i) {
    if (keep_every <= 0 || steps[i] % keep_every != 0) out.push_back(steps[i]);
  }
  return out;
}

void remove_step(FileSystem& files, const std::string& directory, int64_t step) {
  const std::string name = checkpoint_name(step);
  const std::string temporary = directory + "/" + temporary_name(name);
  files.rename(directory + "/" + name, temporary);
  files.sync_directory(directory);
  remove_directory(files, temporary);
}

DirectoryLock::DirectoryLock(const std::string& directory) {
  install_fork_handlers();
  const std::string path = directory + "/.lock";
  file_ = FileDescriptor(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666));
  if (file_.get() < 0) throw_system_error(errno, "open", path);
  while (flock(file_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) throw_system_error(errno, "lock", path);
    throw CheckpointError(concat("another Checkpointer saves into ", directory,
                                 ", in this process or another: close it, or use a directory of your own"));
  }
  const std::lock_guard guard(locks_mutex);
  locks().insert(&file_);
}

DirectoryLock::~DirectoryLock() {
  const std::lock_guard guard(locks_mutex);
  locks().erase(&file_);
  file_.close();
}

std::string checkpoint_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return concat(kPrefix, std::string(digits.size() < kDigits ? kDigits - digits.size() : 0, '0'), digits);
}

std::vector<int64_t> checkpoint_steps(const std::string& directory) {
  return list_steps(*native_file_system(), directory);
}

std::vector<int64_t> prune_checkpoints(const std::string& directory, int64_t keep, int64_t keep_every, bool dry_run) {
  NG_CHECK(keep >= 1 && keep_every >= 0, InvalidArgument, "keep is ", keep, " and keep_every ", keep_every,
           ", expected at least 1 and at least 0");
  const std::unique_ptr<FileSystem> files = native_file_system();
  if (dry_run) return steps_to_remove(list_steps(*files, directory), keep, keep_every);
  const DirectoryLock lock(directory);
  remove_leftovers(*files, directory);
  const std::vector<int64_t> steps = steps_to_remove(list_steps(*files, directory), keep, keep_every);
  for (const int64_t step : steps) remove_step(*files, directory, step);
  return steps;
}

}  // namespace ng
