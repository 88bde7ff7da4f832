// The stream over a file tier: which buffer holds which chunk of the plan, and what starts when.
//
// Chunks are read in the order of the plan as buffers become free; the tier's thread starts the next read itself when a
// write-back is over, so that no thread of the program has to wait between the two.
#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "io/file_tier.hpp"
#include "narrowgauge/error.hpp"

namespace ng {

struct OffloadStream::Impl {
  enum class State : uint8_t { free, reading, ready, held, writing };
  struct Staging {
    std::byte* memory;
    State state = State::free;
    size_t index = 0;  // in the plan
    std::span<std::byte> bytes = {};
    std::exception_ptr error = nullptr;  // of the read
  };

  Impl(FileTier& tier_, Pool& pool_, std::vector<uint64_t> plan_, const Options& options)
      : tier(*tier_.impl_), pool(pool_), plan(std::move(plan_)), write_back(options.write_back) {
    NG_CHECK(options.buffers >= 1, InvalidArgument, "an offload stream needs at least 1 buffer, got ", options.buffers);
    for (const uint64_t key : plan) {
      const std::optional<size_t> size = tier.size(key);
      NG_CHECK(size.has_value(), InvalidArgument, "the plan has key ", key, ", which has no buffer in the file tier");
      capacity = std::max(capacity, *size);
    }
    buffers.reserve(static_cast<size_t>(options.buffers));
    try {
      for (int i = 0; i < options.buffers; ++i) {
        buffers.push_back({static_cast<std::byte*>(pool.allocate(std::max<size_t>(capacity, 1)))});
      }
    } catch (...) {
      give_back();
      throw;
    }
    const std::lock_guard lock(mutex);
    start_reads();
  }

  ~Impl() {
    {
      std::unique_lock lock(mutex);
      next_read = plan.size();
      changed.wait(lock, [&] { return !any(State::reading) && !any(State::writing); });
    }
    give_back();
  }

  void give_back() noexcept {
    for (const Staging& buffer : buffers) pool.deallocate(buffer.memory, std::max<size_t>(capacity, 1));
  }

  bool any(State state) const {
    return std::any_of(buffers.begin(), buffers.end(), [&](const Staging& each) { return each.state == state; });
  }

  // pre: the mutex is held, here and below.
  void start_reads() {
    for (size_t i = 0; i < buffers.size() && next_read < plan.size(); ++i) {
      if (buffers[i].state != State::free) continue;
      const uint64_t key = plan[next_read];
      if (write_back && unwritten.contains(key)) return;  // its last use is not over
      start_read(i, key);
    }
  }

  void start_read(size_t i, uint64_t key) {
    Staging& buffer = buffers[i];
    buffer.index = next_read++;
    buffer.state = State::reading;
    if (write_back) unwritten.insert(key);
    try {
      const std::optional<size_t> size = tier.size(key);
      NG_CHECK(size && *size <= capacity, InvalidArgument, "the buffer under key ", key,
               " was dropped or replaced by a longer one while a stream reads it");
      buffer.bytes = {buffer.memory, *size};
      tier.get(key, buffer.bytes, [this, i](std::exception_ptr error) {
        const std::lock_guard lock(mutex);
        arrive(i, std::move(error));
      });
    } catch (...) {
      arrive(i, std::current_exception());
    }
  }

  void arrive(size_t i, std::exception_ptr error) {
    buffers[i].error = std::move(error);
    buffers[i].state = State::ready;
    changed.notify_all();
  }

  std::optional<Chunk> next(OffloadStream& stream) {
    std::unique_lock lock(mutex);
    throw_write_error();
    if (next_use == plan.size()) return std::nullopt;
    size_t i = 0;
    const auto is_ready = [&] {
      for (i = 0; i < buffers.size(); ++i) {
        if (buffers[i].state == State::ready && buffers[i].index == next_use) return true;
      }
      return false;
    };
    // Held are all, or the one that has to be written before it can be read again.
    const auto is_stuck = [&] {
      return next_read == next_use && !any(State::reading) && !any(State::writing) && any(State::held);
    };
    changed.wait(lock, [&] { return is_ready() || is_stuck(); });
    NG_CHECK(i < buffers.size(), InvalidArgument, "the chunks that are held leave no buffer for the next one, of key ",
             plan[next_use], ": give one up first");
    ++next_use;
    Staging& buffer = buffers[i];
    const uint64_t key = plan[buffer.index];
    if (const std::exception_ptr error = std::exchange(buffer.error, nullptr)) {
      free(i);
      std::rethrow_exception(error);
    }
    buffer.state = State::held;
    return Chunk(&stream, i, key, buffer.bytes);
  }

  void give_up(size_t i) {
    std::unique_lock lock(mutex);
    if (!write_back) {
      free(i);
      return;
    }
    const uint64_t key = plan[buffers[i].index];
    buffers[i].state = State::writing;
    lock.unlock();  // a put may wait for space that the tier's thread gives back
    std::exception_ptr refusal;
    try {
      tier.put(key, buffers[i].bytes, [this, i](std::exception_ptr error) {
        const std::lock_guard inner(mutex);
        written(i, std::move(error));
      });
    } catch (...) {
      refusal = std::current_exception();
    }
    lock.lock();
    // What is put is what later gets read, in the order of the calls.
    unwritten.erase(key);
    if (refusal) {
      written(i, std::move(refusal));
    } else {
      start_reads();
    }
  }

  void written(size_t i, std::exception_ptr error) {
    if (error && !write_error) write_error = std::move(error);
    free(i);
  }

  void free(size_t i) {
    if (buffers[i].state != State::writing) unwritten.erase(plan[buffers[i].index]);
    buffers[i].state = State::free;
    start_reads();
    changed.notify_all();
  }

  void throw_write_error() {
    if (write_error) std::rethrow_exception(std::exchange(write_error, nullptr));
  }

  void finish() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !any(State::writing); });
    throw_write_error();
  }

  FileTier::Impl& tier;
  Pool& pool;
  const std::vector<uint64_t> plan;
  const bool write_back;
  size_t capacity = 0;

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Staging> buffers;
  size_t next_read = 0;
  size_t next_use = 0;
  std::unordered_set<uint64_t> unwritten;  // with write_back: keys whose chunk is being read or used
  std::exception_ptr write_error;
};

OffloadStream::OffloadStream(FileTier& tier, Pool& pool, std::vector<uint64_t> plan, const Options& options)
    : impl_(std::make_unique<Impl>(tier, pool, std::move(plan), options)) {}

OffloadStream::~OffloadStream() = default;

std::optional<OffloadStream::Chunk> OffloadStream::next() { return impl_->next(*this); }

void OffloadStream::finish() { impl_->finish(); }

OffloadStream::Chunk::~Chunk() {
  if (stream_ != nullptr) stream_->impl_->give_up(buffer_);
}

}  // namespace ng
