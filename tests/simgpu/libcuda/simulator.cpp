// Simulator processes: starting, talking, noticing their end.
#include "simulator.hpp"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "driver.hpp"
#include "settings.hpp"

extern char** environ;

namespace ng::cuda {
namespace {

constexpr uint32_t kLoad = 1;
constexpr uint32_t kLaunch = 2;
// The numbers that a process has files by: the socket, the pinned host memory, the first device's memory.
constexpr int kSocket = 3;
constexpr int kPinned = 4;
constexpr int kFirstMemory = 5;

class Process {
 public:
  Process() { start(); }
  ~Process() {
    close(socket_);  // which ends it
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  Reply call(uint32_t kind, const std::string& body) {
    std::string message;
    append(message, kind);
    append(message, static_cast<uint32_t>(body.size()));
    send_all(message);
    send_all(body);
    struct {
      int32_t result;
      uint32_t bytes;
    } header;
    receive_all(&header, sizeof header);
    Reply reply{static_cast<Result>(header.result), std::string(header.bytes, '\0')};
    receive_all(reply.text.data(), reply.text.size());
    return reply;
  }

  Reply load(const ModuleText& module) {
    std::string body;
    append(body, module.id);
    Reply reply = call(kLoad, body + module.ptx);
    if (reply.result == Result::success) loaded_.insert(module.id);
    return reply;
  }

  bool has(const ModuleText& module) const { return loaded_.contains(module.id); }

 private:
  void start() {
    int sockets[2];
    require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0, Result::launch_failed);
    socket_ = inherited_file(sockets[0]);
    const int other = inherited_file(sockets[1]);
    std::vector<std::string> words = {settings().python, SIMGPU_SERVER, std::to_string(kWindowBytes),
                                      std::to_string(pinned_memory().base())};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, other, kSocket);
    posix_spawn_file_actions_adddup2(&actions, pinned_memory().file(), kPinned);
    for (int i = 0; i < settings().devices; ++i) {
      posix_spawn_file_actions_adddup2(&actions, device(i).memory.file(), kFirstMemory + i);
      words.push_back(std::to_string(device(i).memory.base()));
    }
    if (!settings().report.empty()) {
      posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, settings().report.c_str(),
                                       O_WRONLY | O_CREAT | O_APPEND, 0644);
    }
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    const int error = posix_spawnp(&pid_, words[0].c_str(), &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(other);
    if (error != 0) {
      close(socket_);
      report("cannot start the simulator process " + words[0] + ": " + std::strerror(error));
      fail(Result::launch_failed);
    }
  }

  void send_all(const std::string& data) {
    for (size_t sent = 0; sent < data.size();) {
      const ssize_t n = send(socket_, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) died();
      sent += static_cast<size_t>(n);
    }
  }

  void receive_all(void* data, size_t bytes) {
    for (size_t received = 0; received < bytes;) {
      const ssize_t n = recv(socket_, static_cast<char*>(data) + received, bytes - received, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) died();
      received += static_cast<size_t>(n);
    }
  }

  [[noreturn]] void died() {
    int status = 0;
    std::string how;
    shutdown(socket_, SHUT_RDWR);  // if it has not ended, it does now
    if (waitpid(pid_, &status, 0) == pid_) {
      how = WIFSIGNALED(status) ? " by signal " + std::to_string(WTERMSIG(status))
                                : " with status " + std::to_string(WEXITSTATUS(status));
    }
    report("simulator process " + std::to_string(pid_) + " ended" + how);
    pid_ = -1;
    fail(Result::launch_failed);
  }

  pid_t pid_ = -1;
  int socket_ = -1;
  std::unordered_set<uint64_t> loaded_;
};

class Pool {
 public:
  // Runs body(process) in a process that is idle, or started for it. One that fails to answer is dropped.
  template <typename Body>
  auto with_process(const ModuleText& module, Body&& body) {
    std::unique_ptr<Process> process = take(module);
    try {
      auto out = body(*process);
      give(std::move(process));
      return out;
    } catch (...) {
      process.reset();
      give(nullptr);
      throw;
    }
  }

 private:
  std::unique_ptr<Process> take(const ModuleText& module) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !idle_.empty() || count_ < std::max(1, settings().processes); });
      if (!idle_.empty()) {
        auto found =
            std::find_if(idle_.begin(), idle_.end(), [&module](const auto& process) { return process->has(module); });
        if (found == idle_.end()) found = std::prev(idle_.end());
        std::unique_ptr<Process> process = std::move(*found);
        idle_.erase(found);
        return process;
      }
      ++count_;
    }
    try {
      return std::make_unique<Process>();
    } catch (...) {
      give(nullptr);
      throw;
    }
  }

  // Null: the process is no more.
  void give(std::unique_ptr<Process> process) {
    {
      const std::lock_guard lock(mutex_);
      if (process == nullptr) {
        --count_;
      } else {
        idle_.push_back(std::move(process));
      }
    }
    changed_.notify_one();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Process>> idle_;
  int count_ = 0;
};

Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

Reply load_module(const ModuleText& module) {
  return pool().with_process(module, [&](Process& process) { return process.load(module); });
}

Result launch_kernel(const ModuleText& module, const std::string& body) {
  return pool().with_process(module, [&](Process& process) {
    if (!process.has(module)) {
      const Reply loaded = process.load(module);
      if (loaded.result != Result::success) return loaded.result;
    }
    return process.call(kLaunch, body).result;
  });
}

}  // namespace ng::cuda
