// Communicators of the simulated NCCL: ranks are threads of one process, each with a GPU of its own.
//
// A group of calls on a stream becomes an event, behind which its buffers are ready, and a host function that keeps the
// stream until all of the group's parts are carried. A part is carried once its counterpart has been called too: by a
// copy on a stream of the receiver's device, behind the events of both. So bytes move in the order of streams, and a
// part without a counterpart keeps its stream for ever, as NCCL's kernels do.
//
// One lock guards everything. The driver is called under it; host functions take it, and call no driver.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "collective/shim/nccl.hpp"

namespace ng::nccl {

// Keeps a stream until its parts are carried, or the communicator is aborted.
struct Gate {
  int closed_parts = 0;
  bool is_aborted = false;
  bool is_open() const { return closed_parts == 0 || is_aborted; }
};

enum class Call { send, receive, all_gather };

// A call of a group.
struct Part {
  Call call;
  const std::byte* from;
  std::byte* to;
  size_t count;
  int type;
  int peer;  // of send and receive
  Comm comm;
  cuda::StreamHandle stream;
  std::shared_ptr<Gate> gate{};
  std::shared_ptr<cuda::EventOfDriver> ready{};

  size_t bytes() const;
};

// The ranks of a communicator.
struct Clique {
  int size = 0;
  std::vector<Comm> comms;  // by rank; null: has not come, or is no more
  int arrived = 0;
  std::map<std::pair<int, int>, std::deque<Part>> sends, receives;  // without a counterpart, by sender and receiver
  std::map<int64_t, std::vector<Part>> gathers;                     // in which not all take part yet, by number
  struct Split {
    std::vector<std::pair<int, int>> colors_and_keys;  // by rank
    int arrived = 0;
    std::vector<Comm> parts;
  };
  std::map<int64_t, std::shared_ptr<Split>> splits;
  int lost_rank = -1;   // is lost
  int64_t lost_at = 0;  // when it calls this group
};

}  // namespace ng::nccl

struct ng::nccl::CommOfNccl {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  int device = 0;
  bool is_blocking = true;
  Result error = Result::success;  // that was found in the background
  std::string text;                // about it
  bool is_starting = true;         // until all ranks have come
  bool is_ending = false;          // ncclCommFinalize
  std::vector<Part> called;        // of a group that has not been started
  std::vector<Part> stalled;       // to which nothing fits
  std::vector<std::shared_ptr<Gate>> gates;
  int64_t groups = 0, gathers = 0, splits = 0;
  std::shared_ptr<Clique::Split> split;  // that is going on,
  Comm* split_to = nullptr;              // and where its communicator is expected
};

namespace ng::nccl {

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, std::shared_ptr<Clique>> cliques;  // by unique id
  std::map<Comm, std::unique_ptr<CommOfNccl>> comms;
};
State& state();

// How functions of this library fail: entry points return the result.
struct Failure {
  Result result;
};
[[noreturn]] inline void fail(Result result) { throw Failure{result}; }
inline void require(bool condition, Result otherwise = Result::invalid_argument) {
  if (!condition) fail(otherwise);
}

// Says on the standard error output what was found, and makes it the error of a communicator.
void quarrel(CommOfNccl& comm, Result result, const std::string& text);

// Gives the parts to their streams and their counterparts. pre: locked
void launch(CommOfNccl& comm, std::vector<Part> parts);
// Lets the streams of a communicator's parts go on; what these should have received is 0xff then. pre: locked
void abandon(CommOfNccl& comm);

// The driver, with a device current.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  const cuda::Driver* operator->() const { return driver_; }

  // The device that is current; fails if there is none.
  static int current();

 private:
  const cuda::Driver* driver_;
};

void check(cuda::Result result);

}  // namespace ng::nccl
