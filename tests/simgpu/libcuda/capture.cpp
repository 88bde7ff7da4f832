// The rules of stream capture, and the entry points of capture and graphs.
#include "capture.hpp"

#include <algorithm>
#include <queue>
#include <utility>

#include "entry.hpp"

namespace ng::cuda {
namespace {

// The captures that have not ended. pre: locked
std::vector<std::shared_ptr<Capture>>& captures() {
  static auto& instance = *new std::vector<std::shared_ptr<Capture>>;
  return instance;
}

// How the thread's calls meet captures that mind them.
[[gnu::tls_model("initial-exec")]] thread_local CaptureMode thread_mode = CaptureMode::global;

[[noreturn]] void invalidate(Capture& capture, Result result) {
  capture.invalidated = true;
  fail(result);
}

void require_valid(const Capture& capture) { require(!capture.invalidated, Result::stream_capture_invalidated); }

// The capture of a blocking stream, if the stream is the legacy one, which would wait for it.
Capture* captured_beside(const StreamOfDriver& stream) {
  if (stream.kind != StreamKind::legacy) return nullptr;
  for (const auto& other : scheduler().streams) {
    const bool ordered = other->context == stream.context && other->kind == StreamKind::blocking;
    if (ordered && other->capture != nullptr) return other->capture.get();
  }
  return nullptr;
}

// Ends the capture: its streams are ordinary again.
void end(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  std::erase(captures(), capture);
  for (const auto& stream : scheduler().streams) {
    if (stream->capture == capture) {
      stream->capture.reset();
      stream->captured_ends.clear();
    }
  }
}

// Whether every node comes before the ends, directly or through others.
bool joined(const std::vector<Node>& nodes, const std::vector<size_t>& ends) {
  std::vector<bool> reached(nodes.size(), false);
  for (const size_t i : ends) reached[i] = true;
  for (size_t i = nodes.size(); i-- > 0;) {  // a node follows earlier ones only
    if (!reached[i]) return false;
    for (const size_t before : nodes[i].after) reached[before] = true;
  }
  return true;
}

// An order of execution: at each step the first captured node that may run, or the last.
std::vector<size_t> order_of(const std::vector<Node>& nodes, bool last) {
  std::vector<size_t> waits(nodes.size());
  std::vector<std::vector<size_t>> followers(nodes.size());
  const auto later = [last](size_t a, size_t b) { return last ? a < b : a > b; };
  std::priority_queue<size_t, std::vector<size_t>, decltype(later)> ready(later);
  for (size_t i = 0; i < nodes.size(); ++i) {
    waits[i] = nodes[i].after.size();
    for (const size_t before : nodes[i].after) followers[before].push_back(i);
    if (waits[i] == 0) ready.push(i);
  }
  std::vector<size_t> order;
  while (!ready.empty()) {
    order.push_back(ready.top());
    ready.pop();
    for (const size_t follower : followers[order.back()]) {
      if (--waits[follower] == 0) ready.push(follower);
    }
  }
  return order;
}

}  // namespace

void capture_node(StreamOfDriver& stream, Work work) {
  Capture& capture = *stream.capture;
  require_valid(capture);
  capture.nodes.push_back({std::move(work), stream.captured_ends});
  stream.captured_ends = {capture.nodes.size() - 1};
}

bool capture_record(StreamOfDriver& stream, EventOfDriver& event) {
  if (stream.capture == nullptr) return false;
  require_valid(*stream.capture);
  event.capture = stream.capture;
  event.ends = stream.captured_ends;
  event.task.reset();
  return true;
}

bool capture_wait(StreamOfDriver& stream, const EventOfDriver& event) {
  if (event.capture == nullptr) {
    if (stream.capture == nullptr) return false;
    require_valid(*stream.capture);
    if (event.task == nullptr) return true;
    invalidate(*stream.capture, Result::stream_capture_isolation);
  }
  require(!event.capture->ended, Result::captured_event);
  require_valid(*event.capture);
  if (stream.kind == StreamKind::legacy) invalidate(*event.capture, kCaptureImplicit);
  if (stream.capture == nullptr) {
    stream.capture = event.capture;
  } else if (stream.capture != event.capture) {
    stream.capture->invalidated = true;
    invalidate(*event.capture, Result::stream_capture_merge);
  }
  for (const size_t node : event.ends) {
    auto& ends = stream.captured_ends;
    if (std::find(ends.begin(), ends.end(), node) == ends.end()) ends.push_back(node);
  }
  return true;
}

void forbid_wait(const StreamOfDriver& stream) {
  if (stream.capture != nullptr) invalidate(*stream.capture, Result::stream_capture_unsupported);
  forbid_implicit_dependency(stream);
}

void forbid_wait(const EventOfDriver& event) {
  if (event.capture != nullptr) invalidate(*event.capture, Result::captured_event);
}

void forbid_implicit_dependency(const StreamOfDriver& stream) {
  if (Capture* const capture = captured_beside(stream)) invalidate(*capture, kCaptureImplicit);
}

void forbid_while_capturing() {
  const std::lock_guard lock(scheduler().mutex);
  for (const auto& capture : captures()) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool minds = own ? capture->mode != CaptureMode::relaxed : capture->mode == CaptureMode::global;
    if (minds && (thread_mode == CaptureMode::global || (thread_mode == CaptureMode::thread_local_ && own))) {
      invalidate(*capture, Result::stream_capture_unsupported);
    }
  }
}

void forbid_while_capturing(const ContextOfDriver& context) {
  const std::lock_guard lock(scheduler().mutex);
  for (const auto& capture : captures()) {
    if (capture->context == &context) invalidate(*capture, Result::stream_capture_unsupported);
  }
}

// --- entry points ------------------------------------------------------------------------------------------------

Result cuStreamIsCapturing(StreamHandle handle, CaptureStatus* status) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto stream = stream_of(handle, context);
    const std::lock_guard lock(scheduler().mutex);
    require(captured_beside(*stream) == nullptr, kCaptureImplicit);  // a question: it invalidates nothing
    *status = stream->capture == nullptr     ? CaptureStatus::none
              : stream->capture->invalidated ? CaptureStatus::invalidated
                                             : CaptureStatus::active;
  });
}

Result cuStreamBeginCapture_v2(StreamHandle handle, CaptureMode mode) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto stream = stream_of(handle, context);
    require(stream->kind != StreamKind::legacy, Result::stream_capture_unsupported);
    const std::lock_guard lock(scheduler().mutex);
    require(stream->capture == nullptr, kIllegalState);
    auto capture = std::make_shared<Capture>();
    capture->origin = stream.get();
    capture->context = stream->context;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    captures().push_back(capture);
    stream->capture = std::move(capture);
  });
}

Result cuStreamEndCapture(StreamHandle handle, Graph* graph) {
  return entry_in_context([&](ContextOfDriver& context) {
    *graph = nullptr;
    const auto stream = stream_of(handle, context);
    auto captured = std::make_shared<GraphOfDriver>();
    {
      const std::lock_guard lock(scheduler().mutex);
      const std::shared_ptr<Capture> capture = stream->capture;
      require(capture != nullptr, kIllegalState);
      require(capture->origin == stream.get(), Result::stream_capture_unmatched);
      require(capture->mode == CaptureMode::relaxed || capture->thread == std::this_thread::get_id(),
              kCaptureWrongThread);
      const std::vector<size_t> ends = stream->captured_ends;
      end(capture);
      require_valid(*capture);
      require(joined(capture->nodes, ends), Result::stream_capture_unjoined);
      captured->nodes = std::move(capture->nodes);
    }
    *graph = registry<GraphOfDriver>().add(std::move(captured));
  });
}

Result cuThreadExchangeStreamCaptureMode(CaptureMode* mode) {
  return entry([&] {
    require(*mode >= CaptureMode::global && *mode <= CaptureMode::relaxed);
    std::swap(*mode, thread_mode);
  });
}

Result cuGraphInstantiateWithFlags(GraphExec* executable, Graph handle, unsigned long long flags) {
  return entry_in_context([&](ContextOfDriver&) {
    require(flags == 0, Result::not_supported);
    const auto graph = registry<GraphOfDriver>().find(handle, Result::invalid_value);
    auto made = std::make_shared<GraphExecOfDriver>();
    for (const size_t i : order_of(graph->nodes, settings().adversarial)) {
      made->works.push_back(graph->nodes[i].work);
      made->host_function = made->host_function || graph->nodes[i].work.host_function;
    }
    *executable = registry<GraphExecOfDriver>().add(std::move(made));
  });
}

Result cuGraphLaunch(GraphExec handle, StreamHandle stream) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto executable = registry<GraphExecOfDriver>().find(handle, Result::invalid_value);
    const auto run = [executable] {
      for (const Work& work : executable->works) work.run();
    };
    Tasks after;
    {
      const std::lock_guard lock(scheduler().mutex);
      if (executable->last != nullptr) after.push_back(executable->last);
    }
    const auto task = enqueue(*stream_of(stream, context), {run, executable->host_function}, after);
    const std::lock_guard lock(scheduler().mutex);
    if (task != nullptr) executable->last = task;
  });
}

Result cuGraphExecDestroy(GraphExec handle) {
  return entry([&] { registry<GraphExecOfDriver>().remove(handle, Result::invalid_value); });
}

Result cuGraphDestroy(Graph handle) {
  return entry([&] { registry<GraphOfDriver>().remove(handle, Result::invalid_value); });
}

}  // namespace ng::cuda
