// The operating system as tests bend it: calls that fail on demand, child processes, a small disk.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>
#include <utility>

#include "narrowgauge/error.hpp"

namespace ng {

// Stands in for a call on this thread: returns the errno to fail with, or -1 to go on.
using Hook = std::function<int(int fd)>;
extern thread_local const Hook* fsync_hook;
extern thread_local const Hook* close_hook;

class ScopedHook {
 public:
  ScopedHook(const Hook*& slot, Hook hook) : slot_(slot), hook_(std::move(hook)) { slot_ = &hook_; }
  ~ScopedHook() { slot_ = nullptr; }
  ScopedHook(const ScopedHook&) = delete;
  ScopedHook& operator=(const ScopedHook&) = delete;

 private:
  const Hook*& slot_;
  Hook hook_;
};

// The errno of the SystemError that f throws, or 0.
template <typename F>
int errno_of(const F& f) {
  try {
    f();
  } catch (const SystemError& error) {
    return error.errno_value();
  }
  return 0;
}

// The message of the ng::Error that f throws, or "".
template <typename F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Runs f in a child process with one thread; its result must be 0..255.
template <typename F>
int run_in_child(const F& f) {
  const pid_t child = fork();
  if (child == 0) _exit(f());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Whether a child process may start threads: GCC's thread sanitizer takes them for its parent's.
#ifdef __SANITIZE_THREAD__
inline constexpr bool kChildrenHaveThreads = false;
#else
inline constexpr bool kChildrenHaveThreads = true;
#endif

// What a child returns where mount_small_disk fails.
inline constexpr int kCannotMount = 200;

// Mounts a tmpfs of `size` ("1m") over `path`, seen by this process alone and gone with it: for child processes.
bool mount_small_disk(const std::filesystem::path& path, const std::string& size);

// Makes a system call return this errno at once, or success where it is 0, in this thread and what it starts, as
// container runtimes do (seccomp): for child processes. Whether the system lets it.
bool answer(unsigned call, unsigned error);

}  // namespace ng
