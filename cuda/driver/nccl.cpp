// Transfers over NCCL: groups of calls on a stream of their own, and the thread that finds out how they end.
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include <unistd.h>

#include "collective/shim/nccl.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/transport_nccl.hpp"

namespace ng {
namespace {

using cuda::ContextScope;
using nccl::Comm;
using nccl::Nccl;
using nccl::Result;
using Clock = std::chrono::steady_clock;

constexpr auto kPoll = std::chrono::microseconds(100);
// The longest that a communicator's end is waited for when nothing is in flight.
constexpr auto kFarewell = std::chrono::seconds(10);

const Nccl& require_nccl() {
  const Nccl* const table = nccl::library();
  NG_CHECK(table != nullptr, TransportError, nccl::why_unavailable());
  return *table;
}

// --- failures ------------------------------------------------------------------------------------------------------

// Why transfers of a communicator came to nothing.
struct Failure {
  bool is_timeout;
  std::string message;
  int device;
  bool is_known = false;  // has been thrown

  [[noreturn]] void raise() {
    is_known = true;
    if (is_timeout) throw Timeout(message);
    throw TransportError(message);
  }
};

// Those that no call has thrown yet, for synchronize() of a stream.
class FailureCheck final : public cuda::DeviceCheck {
 public:
  // Under the lock of all failures.
  template <typename F>
  auto with(const F& f) {
    const std::lock_guard lock(mutex_);
    return f();
  }
  void add(std::shared_ptr<Failure> failure) {
    with([&] { failures_.push_back(std::move(failure)); });
  }
  void operator()(int device) override {
    with([&] {
      std::erase_if(failures_, [](const auto& failure) { return failure->is_known; });
      for (const auto& failure : failures_) {
        if (failure->device == device) failure->raise();
      }
    });
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Failure>> failures_;
};

FailureCheck& failure_check() {
  static auto* check = [] {
    auto* made = new FailureCheck;  // never destroyed: streams may be waited for at exit
    cuda::register_check(*made);
    return made;
  }();
  return *check;
}

// A transfer that NCCL has been given.
struct Flight {
  std::string operation;
  Clock::time_point deadline;
  Event done;
};

}  // namespace

// --- Clique --------------------------------------------------------------------------------------------------------

// A communicator, and what is in flight on it. NCCL is called under the lock, by the thread that uses the transport and
// by the one that watches.
class NcclTransport::Clique {
 public:
  // Owned: the communicator is our own, and not blocking.
  Clique(Comm comm, bool owned, int rank, int size, const Stream& stream, std::chrono::milliseconds timeout)
      : nccl_(require_nccl()),
        comm_(comm),
        owned_(owned),
        rank_(rank),
        size_(size),
        stream_(stream),
        timeout_(timeout),
        watch_([this] { watch(); }) {}
  Clique(const Clique&) = delete;
  Clique& operator=(const Clique&) = delete;

  ~Clique() {
    if (getpid() != process_) {  // forked: neither the thread nor the driver is here
      watch_.detach();
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
      changed_.notify_all();
    }
    watch_.join();
    if (owned_ && comm_ != nullptr) {
      cuda::where_possible(stream_.device(), [&](const ContextScope&) { destroy(); });
    }
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  const Stream& stream() const { return stream_; }

  // Throws if transfers have failed.
  void check() {
    const std::lock_guard lock(mutex_);
    check_locked();
  }

  // Gives NCCL what `calls` calls, as one group, behind what the stream has been given. It returns the first result
  // that is not success.
  template <typename Calls>
  std::shared_ptr<Flight> start(std::string_view operation, const Stream& stream, const Calls& calls) {
    const std::lock_guard lock(mutex_);
    check_locked();
    const ContextScope context(stream_.device());
    Event before(stream_.device());
    before.record(stream);
    stream_.wait(before);
    Result result = nccl_.ncclGroupStart();
    if (result == Result::success) {
      result = calls(nccl_, comm_, cuda::handle_of(stream_));
      const Result end = nccl_.ncclGroupEnd();
      if (result == Result::success) result = end;
    }
    settle(comm_, result, operation);
    auto flight =
        std::make_shared<Flight>(Flight{std::string(operation), Clock::now() + timeout_, Event(stream_.device())});
    flight->done.record(stream_);
    flights_.push_back(flight);
    changed_.notify_all();
    return flight;
  }

  // Waits until nothing is in flight.
  void synchronize() {
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        check_locked();
        look();
        if (flights_.empty()) return check_locked();
      }
      std::this_thread::sleep_for(kPoll);
    }
  }

  std::shared_ptr<Clique> split(int color) {
    const std::lock_guard lock(mutex_);
    check_locked();
    const ContextScope context(stream_.device());
    nccl::Config config;
    Comm part = nullptr;
    // Only when the parent has settled is the part there. Both use one stream, since NCCL may deadlock where kernels of
    // several communicators run at once.
    settle(comm_, nccl_.ncclCommSplit(comm_, color, rank_, &part, &config), "split");
    return join(nccl_, part, Result::in_progress, stream_, timeout_, "split");
  }

  // A communicator of our own, of which NCCL has returned `result`, when all ranks have come.
  static std::shared_ptr<Clique> join(const Nccl& table, Comm comm, Result result, const Stream& stream,
                                      std::chrono::milliseconds timeout, const std::string& operation) {
    result = await(table, comm, result, timeout);
    int rank = 0, size = 0;
    if (result == Result::success) result = table.ncclCommUserRank(comm, &rank);
    if (result == Result::success) result = table.ncclCommCount(comm, &size);
    if (result == Result::success) return std::make_shared<Clique>(comm, true, rank, size, stream, timeout);
    const std::string reason = text(table, comm, result);
    if (comm != nullptr) table.ncclCommAbort(comm);
    if (result == Result::in_progress) {
      throw Timeout(concat(operation, ": the other ranks did not come within ", timeout.count(), " ms"));
    }
    throw TransportError(concat(operation, ": ", reason));
  }

 private:
  static std::string text(const Nccl& table, Comm comm, Result result) {
    const char* const detail = comm == nullptr ? nullptr : table.ncclGetLastError(comm);
    return concat("NCCL says ", table.ncclGetErrorString(result), detail == nullptr || *detail == '\0' ? "" : ", ",
                  detail == nullptr ? "" : detail);
  }

  // Where a call that is going on leads within the timeout; in_progress if nowhere.
  static Result await(const Nccl& table, Comm comm, Result result, std::chrono::milliseconds timeout) {
    const auto deadline = Clock::now() + timeout;
    while (result == Result::in_progress && Clock::now() < deadline) {
      std::this_thread::sleep_for(kPoll);
      if (const Result asked = table.ncclCommGetAsyncError(comm, &result); asked != Result::success) return asked;
    }
    return result;
  }

  // pre: locked, as all below.
  void settle(Comm comm, Result result, std::string_view operation) {
    result = await(nccl_, comm, result, timeout_);
    if (result == Result::success) return;
    if (result == Result::in_progress) {
      fail(true, concat(operation, " on rank ", rank_, ": not started within ", timeout_.count(), " ms"));
    } else {
      fail(false, concat(operation, " on rank ", rank_, ": ", text(nccl_, comm, result)));
    }
    check_locked();
  }

  void check_locked() {
    if (failure_ != nullptr) failure_check().with([&] { failure_->raise(); });
  }

  void fail(bool is_timeout, std::string message) {
    failure_ = std::make_shared<Failure>(Failure{is_timeout, std::move(message), stream_.device()});
    failure_check().add(failure_);
    if (owned_ && comm_ != nullptr) {
      cuda::where_possible(stream_.device(), [&](const ContextScope&) { nccl_.ncclCommAbort(comm_); });
      comm_ = nullptr;
    }
    flights_.clear();
    changed_.notify_all();
  }

  // Whether the first in flight is done, late, or has gone wrong.
  void look() {
    if (flights_.empty()) return;
    try {
      const ContextScope context(stream_.device());
      const cuda::CaptureExemption exemption(context.driver());
      while (!flights_.empty() && flights_.front()->done.is_done()) flights_.pop_front();
      if (flights_.empty()) return;
      const Flight& first = *flights_.front();
      Result error = Result::success;
      const Result asked = nccl_.ncclCommGetAsyncError(comm_, &error);
      if (asked != Result::success) error = asked;
      if (error != Result::success && error != Result::in_progress) {
        fail(false, concat(first.operation, " on rank ", rank_, ": ", text(nccl_, comm_, error)));
      } else if (Clock::now() > first.deadline) {
        fail(true, concat(first.operation, " on rank ", rank_, " of ", size_, ": not complete within ",
                          timeout_.count(), " ms"));
      }
    } catch (const Error& error) {  // the device is no more
      fail(false, concat(flights_.front()->operation, " on rank ", rank_, ": ", error.what()));
    }
  }

  void watch() {
    const auto pause = std::clamp<std::chrono::milliseconds>(timeout_ / 8, std::chrono::milliseconds(1),
                                                             std::chrono::milliseconds(50));
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return closing_ || !flights_.empty(); });
      if (flights_.empty()) return;
      if (!closing_) changed_.wait_for(lock, pause, [&] { return closing_; });
      look();
      if (!closing_) continue;
      lock.unlock();
      std::this_thread::sleep_for(kPoll);
      lock.lock();
    }
  }

  void destroy() {
    const Result result = await(nccl_, comm_, nccl_.ncclCommFinalize(comm_), kFarewell);
    if (result == Result::success) {
      nccl_.ncclCommDestroy(comm_);
    } else {
      nccl_.ncclCommAbort(comm_);
    }
  }

  const Nccl& nccl_;
  Comm comm_;  // null once it is aborted
  const bool owned_;
  const int rank_;
  const int size_;
  const Stream stream_;
  const std::chrono::milliseconds timeout_;
  const pid_t process_ = getpid();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Flight>> flights_;
  std::shared_ptr<Failure> failure_;
  bool closing_ = false;
  std::thread watch_;  // last: it uses the others
};

namespace {

class NcclTransfer final : public Transfer {
 public:
  NcclTransfer(std::shared_ptr<NcclTransport::Clique> clique, std::shared_ptr<Flight> flight, const Stream& stream)
      : clique_(std::move(clique)), flight_(std::move(flight)), stream_(stream) {}
  // What the stream is given next may write where NCCL still reads and writes.
  ~NcclTransfer() override {
    if (!is_awaited_) cuda::where_possible(stream_.device(), [&](const ContextScope&) { stream_.wait(flight_->done); });
  }

  void wait() override {
    clique_->check();
    stream_.wait(flight_->done);
    is_awaited_ = true;
  }

 private:
  std::shared_ptr<NcclTransport::Clique> clique_;
  std::shared_ptr<Flight> flight_;
  const Stream stream_;
  bool is_awaited_ = false;
};

void check_timeout(std::chrono::milliseconds timeout) {
  NG_CHECK(timeout.count() > 0, InvalidArgument, "a timeout of ", timeout.count(), " ms; expected more than 0");
}

}  // namespace

// --- NcclTransport -------------------------------------------------------------------------------------------------

std::string why_no_nccl() { return nccl::why_unavailable(); }

int nccl_version() {
  int version = 0;
  require_nccl().ncclGetVersion(&version);
  return version;
}

NcclId nccl_unique_id() {
  nccl::UniqueId id{};
  const Nccl& table = require_nccl();
  const Result result = table.ncclGetUniqueId(&id);
  NG_CHECK(result == Result::success, TransportError, "ncclGetUniqueId: NCCL says ", table.ncclGetErrorString(result));
  return std::bit_cast<NcclId>(id);
}

std::shared_ptr<NcclTransport> NcclTransport::create(const NcclId& id, int rank, int size, int device,
                                                     std::chrono::milliseconds timeout) {
  NG_CHECK(size >= 1 && rank >= 0 && rank < size, InvalidArgument, "rank ", rank, " of ", size,
           "; expected at least one rank, and one of them");
  check_timeout(timeout);
  const Nccl& table = require_nccl();
  const ContextScope context(device);
  nccl::Config config;
  Comm comm = nullptr;
  const Result result = table.ncclCommInitRankConfig(&comm, size, std::bit_cast<nccl::UniqueId>(id), rank, &config);
  auto clique = Clique::join(table, comm, result, Stream::create(device), timeout,
                             concat("NCCL's start on rank ", rank, " of ", size));
  const Stream stream = clique->stream();
  return std::make_shared<NcclTransport>(std::move(clique), stream);
}

std::shared_ptr<NcclTransport> NcclTransport::adopt(void* communicator, const Stream& stream,
                                                    std::chrono::milliseconds timeout) {
  NG_CHECK(communicator != nullptr, InvalidArgument, "the ncclComm_t is null");
  check_timeout(timeout);
  const Nccl& table = require_nccl();
  const ContextScope context(stream.device());
  auto* const comm = static_cast<Comm>(communicator);
  int rank = 0, size = 0, device = 0;
  Result result = table.ncclCommUserRank(comm, &rank);
  if (result == Result::success) result = table.ncclCommCount(comm, &size);
  if (result == Result::success) result = table.ncclCommCuDevice(comm, &device);
  NG_CHECK(result == Result::success, InvalidArgument, "the ncclComm_t is not good: NCCL says ",
           table.ncclGetErrorString(result));
  NG_CHECK(device == stream.device(), InvalidArgument, "the stream is of cuda:", stream.device(),
           "; expected one of cuda:", device, ", of which the ncclComm_t is");
  return std::make_shared<NcclTransport>(std::make_shared<Clique>(comm, false, rank, size, stream, timeout), stream);
}

NcclTransport::NcclTransport(std::shared_ptr<Clique> clique, const Stream& stream)
    : clique_(std::move(clique)), stream_(stream) {}
NcclTransport::~NcclTransport() = default;

int NcclTransport::rank() const { return clique_->rank(); }
int NcclTransport::size() const { return clique_->size(); }
Device NcclTransport::device() const { return {stream_.device()}; }
void NcclTransport::synchronize() { clique_->synchronize(); }

std::shared_ptr<Transport> NcclTransport::on(const Stream& stream) {
  NG_CHECK(stream.device() == stream_.device(), InvalidArgument, "the stream is of cuda:", stream.device(),
           "; expected one of cuda:", stream_.device(), ", of which NCCL carries memory");
  return std::make_shared<NcclTransport>(clique_, stream);
}

std::unique_ptr<Transfer> NcclTransport::all_gather(const SharedBytes& sent, const SharedBytes& received,
                                                    std::string_view operation) {
  auto flight = clique_->start(operation, stream_, [&](const Nccl& table, Comm comm, cuda::StreamHandle stream) {
    if (sent.size() == 0) return Result::success;
    return table.ncclAllGather(sent.data(), received.data(), sent.size(), nccl::DataType::uint8, comm, stream);
  });
  return std::make_unique<NcclTransfer>(clique_, std::move(flight), stream_);
}

std::unique_ptr<Transfer> NcclTransport::all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                                    const SharedBytes& received,
                                                    std::span<const int64_t> received_bytes,
                                                    std::string_view operation) {
  auto flight = clique_->start(operation, stream_, [&](const Nccl& table, Comm comm, cuda::StreamHandle stream) {
    const std::byte* from = sent.data();
    std::byte* to = received.data();
    for (int peer = 0; peer < clique_->size(); ++peer) {
      const auto out = static_cast<size_t>(sent_bytes[static_cast<size_t>(peer)]);
      const auto in = static_cast<size_t>(received_bytes[static_cast<size_t>(peer)]);
      auto result = Result::success;
      if (out != 0) result = table.ncclSend(from, out, nccl::DataType::uint8, peer, comm, stream);
      if (result == Result::success && in != 0) {
        result = table.ncclRecv(to, in, nccl::DataType::uint8, peer, comm, stream);
      }
      if (result != Result::success) return result;
      from += out;
      to += in;
    }
    return Result::success;
  });
  return std::make_unique<NcclTransfer>(clique_, std::move(flight), stream_);
}

std::shared_ptr<Transport> NcclTransport::split(int color) {
  auto part = clique_->split(color);
  const Stream stream = part->stream();
  return std::make_shared<NcclTransport>(std::move(part), stream);
}

}  // namespace ng
