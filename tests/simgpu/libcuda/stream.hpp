// Streams, events and the order of work.
//
// A call on a stream makes a task, which runs after the tasks that the CUDA rules put before it: the one before it in
// its stream, the one that an awaited event stands for, and for the legacy default stream and the blocking streams
// those of the other side. Each stream has a thread that runs its tasks in order. Normally a task runs as soon as it
// may. With SIMGPU_DELAY=adversarial it runs only once somebody waits for it, or for a task after it: what is not
// ordered comes as late as it can, so a missing wait shows as wrong data. Since a program may wait for a host function
// without the driver's knowledge, host functions are always waited for; so is what a query asked about, from then on.
//
// One lock guards all of this; work runs outside it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.hpp"

namespace ng::cuda {

// What a task does. Its failure becomes the error of the context. May run several times, in a graph.
struct Work {
  std::function<void()> run;   // empty: only a point in the order
  bool host_function = false;  // somebody may wait for it outside the driver
};

struct Task {
  ContextOfDriver* context;
  Work work;
  std::vector<std::shared_ptr<Task>> after;
  bool demanded = false;  // somebody waits
  bool done = false;
};
using Tasks = std::vector<std::shared_ptr<Task>>;

struct Capture;

enum class StreamKind { legacy, blocking, non_blocking };

struct StreamOfDriver {
  ContextOfDriver* context;
  StreamKind kind;
  unsigned long long id;  // of no stream before it
  std::deque<std::shared_ptr<Task>> queue;
  std::shared_ptr<Task> last;
  bool closed = false;
  std::shared_ptr<Capture> capture;   // while it is captured,
  std::vector<size_t> captured_ends;  // and the nodes that its next node follows
};

struct EventOfDriver {
  ContextOfDriver* context;
  std::shared_ptr<Task> task;        // what it was recorded after, or
  std::shared_ptr<Capture> capture;  // the capture that it was recorded in,
  std::vector<size_t> ends;          // after these nodes
};

struct Scheduler {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::shared_ptr<StreamOfDriver>> streams;  // closed ones too, while they have work
};
Scheduler& scheduler();

std::shared_ptr<StreamOfDriver> create_stream(ContextOfDriver& context, StreamKind kind);
void close_stream(StreamOfDriver& stream);
// The stream of a handle; null stands for the legacy stream of the context.
std::shared_ptr<StreamOfDriver> stream_of(StreamHandle handle, ContextOfDriver& context);

// Adds work to a stream, or to the capture that it is part of; returns null in the latter case.
std::shared_ptr<Task> enqueue(StreamOfDriver& stream, Work work, Tasks after = {});
void wait_for(const Tasks& tasks);
void synchronize(ContextOfDriver& context);

}  // namespace ng::cuda
