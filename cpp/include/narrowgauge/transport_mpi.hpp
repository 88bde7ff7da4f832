// MpiTransport: collectives over MPI. Header only: the program that includes it compiles it with its own mpicxx, and
// the library knows no MPI.
//
//   MPI_Init_thread(...);
//   ng::Communicator communicator(std::make_shared<ng::MpiTransport>(MPI_COMM_WORLD), ranks_per_node);
//
// Between MPI_Init and MPI_Finalize; MPI calls are made by the thread that uses the transport (MPI_THREAD_FUNNELED will
// do if that is the main one). Transfers are nonblocking collectives on a duplicate of the communicator, which is freed
// with the transport: a collective call. MPI's errors that its handler returns are TransportErrors.
#pragma once

#include <mpi.h>

#include <chrono>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/transport.hpp"

namespace ng {

class MpiTransport : public Transport {
 public:
  // A duplicate of `communicator`: a collective call. timeout: of each wait; MPI does not say which rank is late.
  explicit MpiTransport(MPI_Comm communicator, std::chrono::milliseconds timeout = std::chrono::minutes(5))
      : timeout_(timeout) {
    check(MPI_Comm_dup(communicator, &communicator_), "MPI_Comm_dup");
    check(MPI_Comm_set_errhandler(communicator_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(communicator_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(communicator_, &size_), "MPI_Comm_size");
  }
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;
  ~MpiTransport() override { MPI_Comm_free(&communicator_); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "MPI"; }

  std::unique_ptr<Transfer> all_gather(std::span<const std::byte> sent, std::byte* received,
                                       std::string_view operation) override {
    auto transfer = std::make_unique<Started>(operation, rank_, timeout_);
    const int count = as_count(static_cast<int64_t>(sent.size()));
    check(MPI_Iallgather(sent.data(), count, MPI_BYTE, received, count, MPI_BYTE, communicator_, &transfer->request),
          "MPI_Iallgather");
    return transfer;
  }

  std::unique_ptr<Transfer> all_to_all(const std::byte* sent, std::span<const int64_t> sent_bytes, std::byte* received,
                                       std::span<const int64_t> received_bytes, std::string_view operation) override {
    auto transfer = std::make_unique<Started>(operation, rank_, timeout_);
    transfer->sent = Parts(sent_bytes);
    transfer->received = Parts(received_bytes);
    const Parts &from = transfer->sent, &to = transfer->received;
    check(MPI_Ialltoallv(sent, from.counts.data(), from.starts.data(), MPI_BYTE, received, to.counts.data(),
                         to.starts.data(), MPI_BYTE, communicator_, &transfer->request),
          "MPI_Ialltoallv");
    return transfer;
  }

  std::shared_ptr<Transport> split(int color) override {
    MPI_Comm part = MPI_COMM_NULL;
    check(MPI_Comm_split(communicator_, color, rank_, &part), "MPI_Comm_split");
    auto transport = std::make_shared<MpiTransport>(part, timeout_);
    MPI_Comm_free(&part);
    return transport;
  }

 private:
  static void check(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw TransportError(concat(call, ": ", std::string_view(text, static_cast<size_t>(length))));
  }

  // MPI's counts are ints.
  static int as_count(int64_t bytes) {
    if (bytes > std::numeric_limits<int>::max()) {
      throw TransportError(concat("a message of ", bytes, " bytes; MPI takes at most ", std::numeric_limits<int>::max(),
                                  ": use more chunks"));
    }
    return static_cast<int>(bytes);
  }

  // Read by MPI until the transfer is complete.
  struct Parts {
    Parts() = default;
    explicit Parts(std::span<const int64_t> bytes) {
      int64_t start = 0;
      for (const int64_t each : bytes) {
        counts.push_back(as_count(each));
        starts.push_back(as_count(start));
        start += each;
      }
    }
    std::vector<int> counts, starts;
  };

  struct Started : Transfer {
    Started(std::string_view what, int of_rank, std::chrono::milliseconds most)
        : operation(what), rank(of_rank), timeout(most) {}
    // MPI goes on writing until it is complete, and cannot be told to stop.
    ~Started() override {
      if (request != MPI_REQUEST_NULL) MPI_Wait(&request, MPI_STATUS_IGNORE);
    }

    void wait() override {
      const auto deadline = std::chrono::steady_clock::now() + timeout;
      for (int tries = 0;; ++tries) {
        int done = 0;
        check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), operation.c_str());
        if (done != 0) return;
        if (std::chrono::steady_clock::now() > deadline) {
          throw Timeout(concat(operation, " on rank ", rank, ": not complete within ", timeout.count(), " ms"));
        }
        if (tries > 1000) std::this_thread::yield();
      }
    }

    MPI_Request request = MPI_REQUEST_NULL;
    Parts sent, received;
    std::string operation;
    int rank;
    std::chrono::milliseconds timeout;
  };

  MPI_Comm communicator_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 0;
  std::chrono::milliseconds timeout_;
};

}  // namespace ng
