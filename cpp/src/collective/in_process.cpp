// Ranks as threads: a transfer is copied in where it starts and out where it is waited for, so one that is given up
// leaves its memory alone.
//
// All ranks start the same transfers, so the n-th of each is the same one: a Meeting, which lives until all have taken
// what is theirs. It is found by its number, under the one lock of the ranks' Room.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>

#include "narrowgauge/error.hpp"
#include "narrowgauge/transport.hpp"

namespace ng {
namespace {

using Clock = std::chrono::steady_clock;

// What a rank brought: for all, or for each.
struct Share {
  bool here = false;
  bool for_all = false;
  std::string operation;
  std::vector<std::byte> bytes;
  std::vector<int64_t> sent, received;  // bytes to and from each rank; of all_gather one entry, and none
};

struct Meeting {
  explicit Meeting(int size) : shares(static_cast<size_t>(size)) {}
  std::vector<Share> shares;
  int arrived = 0;
  std::string quarrel;  // why what was brought does not fit together
};

class Room {
 public:
  Room(int size, std::chrono::milliseconds timeout)
      : size_(size), timeout_(timeout), gone_(static_cast<size_t>(size), false) {}

  int size() const { return size_; }
  std::chrono::milliseconds timeout() const { return timeout_; }

  std::shared_ptr<Meeting> bring(int rank, int64_t number, Share share) {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<Meeting>& meeting = meetings_[number];
    if (meeting == nullptr) meeting = std::make_shared<Meeting>(size_);
    std::shared_ptr<Meeting> mine = meeting;
    share.here = true;
    mine->shares[static_cast<size_t>(rank)] = std::move(share);
    if (++mine->arrived == size_) {
      compare(*mine);
      meetings_.erase(number);  // those who take part have it
    }
    changed_.notify_all();
    return mine;
  }

  void await(const Meeting& meeting, int rank) {
    const std::string& operation = meeting.shares[static_cast<size_t>(rank)].operation;
    std::unique_lock lock(mutex_);
    const auto deadline = Clock::now() + timeout_;
    while (meeting.arrived < size_) {
      for (int other = 0; other < size_; ++other) {
        const bool is_missing = !meeting.shares[static_cast<size_t>(other)].here;
        NG_CHECK(!is_missing || !gone_[static_cast<size_t>(other)], TransportError, operation, ": rank ", other, " of ",
                 size_, " has gone");
      }
      const bool in_time = changed_.wait_until(lock, deadline) == std::cv_status::no_timeout;
      NG_CHECK(in_time || meeting.arrived == size_, Timeout, operation, ": ", missing(meeting), " did not come within ",
               timeout_.count(), " ms");
    }
    NG_CHECK(meeting.quarrel.empty(), TransportError, meeting.quarrel);
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    gone_[static_cast<size_t>(rank)] = true;
    changed_.notify_all();
  }

  // The room of those who called split for the `number`-th time with this color.
  std::shared_ptr<Room> part(int64_t number, int color, int size) {
    const std::lock_guard lock(mutex_);
    std::weak_ptr<Room>& known = parts_[{number, color}];
    std::shared_ptr<Room> room = known.lock();
    if (room == nullptr) known = room = std::make_shared<Room>(size, timeout_);
    return room;
  }

 private:
  static std::string missing(const Meeting& meeting) {
    std::string ranks;
    int count = 0;
    for (size_t i = 0; i < meeting.shares.size(); ++i) {
      if (!meeting.shares[i].here) ranks += concat(count++ == 0 ? "" : ", ", i);
    }
    return concat(count == 1 ? "rank " : "ranks ", ranks);
  }

  void compare(Meeting& meeting) const {
    for (size_t from = 0; from < meeting.shares.size(); ++from) {
      const Share& sender = meeting.shares[from];
      for (size_t to = 0; to < meeting.shares.size(); ++to) {
        const Share& receiver = meeting.shares[to];
        const int64_t sent = sender.sent[sender.for_all ? 0 : to];
        const int64_t expected = receiver.for_all ? receiver.sent[0] : receiver.received[from];
        if (sender.for_all == receiver.for_all && sent == expected) continue;
        meeting.quarrel = concat("rank ", from, " sends ", sent, " bytes in ", sender.operation, "; rank ", to,
                                 " expects ", expected, " in ", receiver.operation);
        return;
      }
    }
  }

  const int size_;
  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, std::shared_ptr<Meeting>> meetings_;  // to which some have yet to come
  std::map<std::pair<int64_t, int>, std::weak_ptr<Room>> parts_;
  std::vector<bool> gone_;
};

class InProcessTransfer : public Transfer {
 public:
  InProcessTransfer(std::shared_ptr<Room> room, std::shared_ptr<Meeting> meeting, int rank, std::byte* received)
      : room_(std::move(room)), meeting_(std::move(meeting)), rank_(rank), received_(received) {}

  void wait() override {
    room_->await(*meeting_, rank_);
    std::byte* to = received_;
    for (const Share& share : meeting_->shares) {
      const size_t place = share.for_all ? 0 : static_cast<size_t>(rank_);
      const int64_t before =
          std::accumulate(share.sent.begin(), share.sent.begin() + static_cast<int64_t>(place), int64_t{0});
      const auto bytes = static_cast<size_t>(share.sent[place]);
      if (bytes != 0) std::memcpy(to, share.bytes.data() + before, bytes);
      to += bytes;
    }
  }

 private:
  std::shared_ptr<Room> room_;
  std::shared_ptr<Meeting> meeting_;
  int rank_;
  std::byte* received_;
};

class InProcessTransport : public Transport {
 public:
  InProcessTransport(std::shared_ptr<Room> room, int rank) : room_(std::move(room)), rank_(rank) {}
  ~InProcessTransport() override { room_->leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return room_->size(); }
  std::string name() const override { return "in process"; }

  std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                       std::string_view operation) override {
    return gather({sent.data(), sent.size()}, received.data(), operation);
  }

  std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                       const SharedBytes& received, std::span<const int64_t> received_bytes,
                                       std::string_view operation) override {
    return start({.for_all = false,
                  .operation = std::string(operation),
                  .bytes = {sent.data(), sent.data() + sent.size()},
                  .sent = {sent_bytes.begin(), sent_bytes.end()},
                  .received = {received_bytes.begin(), received_bytes.end()}},
                 received.data());
  }

  std::shared_ptr<Transport> split(int color) override {
    std::vector<int> colors(static_cast<size_t>(size()));
    gather(std::as_bytes(std::span(&color, 1)), reinterpret_cast<std::byte*>(colors.data()), "split")->wait();
    const auto of_color = [&](auto end) { return static_cast<int>(std::count(colors.begin(), end, color)); };
    auto room = room_->part(next_, color, of_color(colors.end()));
    return std::make_shared<InProcessTransport>(std::move(room), of_color(colors.begin() + rank_));
  }

 private:
  std::unique_ptr<Transfer> gather(std::span<const std::byte> sent, std::byte* received, std::string_view operation) {
    return start({.for_all = true,
                  .operation = std::string(operation),
                  .bytes = {sent.begin(), sent.end()},
                  .sent = {static_cast<int64_t>(sent.size())},
                  .received = {}},
                 received);
  }
  std::unique_ptr<Transfer> start(Share share, std::byte* received) {
    return std::make_unique<InProcessTransfer>(room_, room_->bring(rank_, next_++, std::move(share)), rank_, received);
  }

  std::shared_ptr<Room> room_;
  int rank_;
  int64_t next_ = 0;
};

}  // namespace

std::vector<std::shared_ptr<Transport>> in_process_transports(int size, std::chrono::milliseconds timeout) {
  NG_CHECK(size >= 1, InvalidArgument, "in_process_transports of ", size, " ranks; expected at least 1");
  const auto room = std::make_shared<Room>(size, timeout);
  std::vector<std::shared_ptr<Transport>> transports;
  transports.reserve(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank) transports.push_back(std::make_shared<InProcessTransport>(room, rank));
  return transports;
}

}  // namespace ng
