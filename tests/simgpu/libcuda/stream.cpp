// The threads of streams, and the entry points of streams and events.
#include "stream.hpp"

#include <algorithm>
#include <atomic>
#include <thread>

#include "capture.hpp"
#include "entry.hpp"

namespace ng::cuda {
namespace {

void run(Task& task) {
  ContextOfDriver& context = *task.context;
  if (task.work.run != nullptr && context.error.load() == Result::success) {
    try {
      task.work.run();
    } catch (const Failure& failure) {
      context.set_error(failure.result);
    } catch (...) {
      context.set_error(Result::unknown);
    }
  }
  task.work = {};  // and what it owns
}

bool ready(const StreamOfDriver& stream) {
  if (stream.queue.empty() || !stream.queue.front()->demanded) return false;
  const Tasks& after = stream.queue.front()->after;
  return std::all_of(after.begin(), after.end(), [](const auto& task) { return task->done; });
}

// The thread of a stream.
void serve(std::shared_ptr<StreamOfDriver> stream) {
  Scheduler& all = scheduler();
  std::unique_lock lock(all.mutex);
  for (;;) {
    all.changed.wait(lock, [&] { return ready(*stream) || (stream->closed && stream->queue.empty()); });
    if (stream->queue.empty()) break;
    const std::shared_ptr<Task> task = std::move(stream->queue.front());
    stream->queue.pop_front();
    lock.unlock();
    run(*task);
    lock.lock();
    task->after.clear();
    task->done = true;
    all.changed.notify_all();
  }
  std::erase(all.streams, stream);
}

void add_unfinished(Tasks& tasks, const std::shared_ptr<Task>& task) {
  if (task != nullptr && !task->done) tasks.push_back(task);
}

// The unfinished tasks that a new one in the stream follows. pre: locked
Tasks ends_of(const StreamOfDriver& stream) {
  Tasks ends;
  add_unfinished(ends, stream.last);
  if (stream.kind == StreamKind::non_blocking) return ends;
  const StreamKind other = stream.kind == StreamKind::legacy ? StreamKind::blocking : StreamKind::legacy;
  for (const auto& candidate : scheduler().streams) {
    if (candidate->context == stream.context && candidate->kind == other) add_unfinished(ends, candidate->last);
  }
  return ends;
}

// pre: locked
void demand(const Tasks& tasks) {
  Tasks open = tasks;
  while (!open.empty()) {
    const std::shared_ptr<Task> task = std::move(open.back());
    open.pop_back();
    if (task->demanded) continue;
    task->demanded = true;
    open.insert(open.end(), task->after.begin(), task->after.end());
  }
  scheduler().changed.notify_all();
}

bool all_done(const Tasks& tasks) {
  return std::all_of(tasks.begin(), tasks.end(), [](const auto& task) { return task->done; });
}

// Fails with not_ready unless the tasks are done. pre: locked
void query(const Tasks& tasks) {
  if (all_done(tasks)) return;
  demand(tasks);
  fail(Result::not_ready);
}

}  // namespace

Scheduler& scheduler() {
  static Scheduler& instance = *new Scheduler;
  return instance;
}

std::shared_ptr<StreamOfDriver> create_stream(ContextOfDriver& context, StreamKind kind) {
  static std::atomic<unsigned long long> streams{0};
  auto stream = std::make_shared<StreamOfDriver>();
  stream->context = &context;
  stream->kind = kind;
  stream->id = ++streams;
  {
    const std::lock_guard lock(scheduler().mutex);
    scheduler().streams.push_back(stream);
  }
  std::thread(serve, stream).detach();
  return stream;
}

void close_stream(StreamOfDriver& stream) {
  const std::lock_guard lock(scheduler().mutex);
  stream.closed = true;
  scheduler().changed.notify_all();
}

std::shared_ptr<StreamOfDriver> stream_of(StreamHandle handle, ContextOfDriver& context) {
  return handle == nullptr ? context.legacy : registry<StreamOfDriver>().find(handle);
}

std::shared_ptr<Task> enqueue(StreamOfDriver& stream, Work work, Tasks after) {
  const std::lock_guard lock(scheduler().mutex);
  if (stream.capture != nullptr) {
    capture_node(stream, std::move(work));
    return nullptr;
  }
  forbid_implicit_dependency(stream);
  auto task = std::make_shared<Task>();
  task->context = stream.context;
  const bool host_function = work.host_function;
  task->work = std::move(work);
  task->after = ends_of(stream);
  for (const auto& other : after) add_unfinished(task->after, other);
  stream.queue.push_back(task);
  stream.last = task;
  if (host_function || !settings().adversarial) demand({task});
  return task;
}

void wait_for(const Tasks& tasks) {
  std::unique_lock lock(scheduler().mutex);
  demand(tasks);
  scheduler().changed.wait(lock, [&] { return all_done(tasks); });
}

void synchronize(ContextOfDriver& context) {
  Tasks tasks;
  {
    const std::lock_guard lock(scheduler().mutex);
    for (const auto& stream : scheduler().streams) {
      if (stream->context == &context) add_unfinished(tasks, stream->last);
    }
  }
  wait_for(tasks);
}

// --- entry points ------------------------------------------------------------------------------------------------

Result cuStreamCreate(StreamHandle* handle, unsigned flags) {
  return entry_in_context([&](ContextOfDriver& context) {
    require(flags == 0 || flags == kStreamNonBlocking);
    const StreamKind kind = flags == 0 ? StreamKind::blocking : StreamKind::non_blocking;
    *handle = registry<StreamOfDriver>().add(create_stream(context, kind));
  });
}

// Returns at once; what the stream still has to do is done.
Result cuStreamDestroy_v2(StreamHandle handle) {
  return entry([&] { close_stream(*registry<StreamOfDriver>().remove(handle)); });
}

Result cuStreamSynchronize(StreamHandle handle) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto stream = stream_of(handle, context);
    Tasks tasks;
    {
      const std::lock_guard lock(scheduler().mutex);
      forbid_wait(*stream);
      tasks = ends_of(*stream);
    }
    wait_for(tasks);
    stream->context->check();
  });
}

Result cuStreamQuery(StreamHandle handle) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto stream = stream_of(handle, context);
    const std::lock_guard lock(scheduler().mutex);
    forbid_wait(*stream);
    query(ends_of(*stream));
    stream->context->check();
  });
}

Result cuStreamGetId(StreamHandle handle, unsigned long long* id) {
  return entry_in_context([&](ContextOfDriver& context) { *id = stream_of(handle, context)->id; });
}

Result cuStreamWaitEvent(StreamHandle handle, EventHandle event_handle, unsigned flags) {
  return entry_in_context([&](ContextOfDriver& context) {
    require(flags == 0);
    const auto stream = stream_of(handle, context);
    const auto event = registry<EventOfDriver>().find(event_handle);
    std::shared_ptr<Task> task;
    {
      const std::lock_guard lock(scheduler().mutex);
      if (capture_wait(*stream, *event)) return;
      task = event->task;
    }
    if (task != nullptr) enqueue(*stream, {}, {task});
  });
}

Result cuEventCreate(EventHandle* handle, unsigned flags) {
  return entry_in_context([&](ContextOfDriver& context) {
    require((flags & ~7u) == 0);
    auto event = std::make_shared<EventOfDriver>();
    event->context = &context;
    *handle = registry<EventOfDriver>().add(std::move(event));
  });
}

Result cuEventDestroy_v2(EventHandle handle) {
  return entry([&] { registry<EventOfDriver>().remove(handle); });
}

Result cuEventRecord(EventHandle handle, StreamHandle stream_handle) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto event = registry<EventOfDriver>().find(handle);
    const auto stream = stream_of(stream_handle, context);
    require(event->context == stream->context, Result::invalid_handle);
    {
      const std::lock_guard lock(scheduler().mutex);
      if (capture_record(*stream, *event)) return;
    }
    const auto task = enqueue(*stream, {});
    const std::lock_guard lock(scheduler().mutex);
    event->task = task;
    event->capture.reset();
  });
}

Result cuEventSynchronize(EventHandle handle) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto event = registry<EventOfDriver>().find(handle);
    Tasks tasks;
    {
      const std::lock_guard lock(scheduler().mutex);
      forbid_wait(*event);
      add_unfinished(tasks, event->task);
    }
    wait_for(tasks);
    event->context->check();
  });
}

Result cuEventQuery(EventHandle handle) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto event = registry<EventOfDriver>().find(handle);
    forbid_while_capturing();
    const std::lock_guard lock(scheduler().mutex);
    forbid_wait(*event);
    Tasks tasks;
    add_unfinished(tasks, event->task);
    query(tasks);
    event->context->check();
  });
}

Result cuLaunchHostFunc(StreamHandle handle, void (*function)(void*), void* argument) {
  return entry_in_context([&](ContextOfDriver& context) {
    require(function != nullptr);
    const auto run_function = [function, argument] {
      in_host_function = true;
      function(argument);
      in_host_function = false;
    };
    enqueue(*stream_of(handle, context), {run_function, true});
  });
}

}  // namespace ng::cuda
