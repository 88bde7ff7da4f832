// Stream capture and graphs.
//
// A capture collects the work of its streams as nodes with their order. An event recorded in a captured stream stands
// for nodes; a stream that waits for it joins the capture. A graph runs as one task, node by node: in the order of
// capture, or with SIMGPU_DELAY=adversarial the node that was captured last among those that may run, so that only
// the captured order, not that of the program, protects data.
//
// The functions that take a stream or an event expect the scheduler's lock to be held.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "stream.hpp"

namespace ng::cuda {

struct Node {
  Work work;
  std::vector<size_t> after;
};

struct Capture {
  const StreamOfDriver* origin;
  ContextOfDriver* context;
  CaptureMode mode;
  std::thread::id thread;
  std::vector<Node> nodes;
  bool invalidated = false;
  bool ended = false;
};

struct GraphOfDriver {
  std::vector<Node> nodes;
};

struct GraphExecOfDriver {
  std::vector<Work> works;  // in the order of execution
  bool host_function = false;
  std::shared_ptr<Task> last;  // launches of one executable run one after another
};

// Adds a node to the capture of a stream.
void capture_node(StreamOfDriver& stream, Work work);
// Whether the recording was captured, or the waiting; false: it is to be done as usual.
bool capture_record(StreamOfDriver& stream, EventOfDriver& event);
bool capture_wait(StreamOfDriver& stream, const EventOfDriver& event);

// What may not be done while capturing fails here, and invalidates the capture:
void forbid_wait(const StreamOfDriver& stream);                 // waiting for a captured stream,
void forbid_wait(const EventOfDriver& event);                   // or for an event in it;
void forbid_implicit_dependency(const StreamOfDriver& stream);  // the legacy stream, beside captured blocking ones;
void forbid_while_capturing();                                  // calls that may synchronise, by both modes;
void forbid_while_capturing(const ContextOfDriver& context);    // waiting for everything. Both take the lock.

}  // namespace ng::cuda
