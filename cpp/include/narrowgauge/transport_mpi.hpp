// MpiTransport: collectives over MPI. Header only: the program that includes it compiles it with its own mpicxx, and
// the library knows no MPI.
//
//   MPI_Init_thread(...);
//   ng::Communicator communicator(std::make_shared<ng::MpiTransport>(MPI_COMM_WORLD), ranks_per_node);
//
// Between MPI_Init and MPI_Finalize; MPI calls are made by the thread that uses the transport (MPI_THREAD_FUNNELED will
// do if that is the main one). Transfers are nonblocking collectives on a duplicate of the communicator, which is freed
// with the transport: a collective call. MPI's errors that its handler returns are TransportErrors.
//
// MPI cannot be told to stop: a transfer that is given up leaves its memory to MPI for ever. That and a Timeout is what
// a rank that never comes costs.
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

  std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                       std::string_view operation) override {
    const int count = as_count(static_cast<int64_t>(sent.size()));
    auto transfer = std::make_unique<Started>(operation, *this, sent, received);
    check(MPI_Iallgather(sent.data(), count, MPI_BYTE, received.data(), count, MPI_BYTE, communicator_,
                         &transfer->flight->request),
          "MPI_Iallgather");
    return transfer;
  }

  std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                       const SharedBytes& received, std::span<const int64_t> received_bytes,
                                       std::string_view operation) override {
    Parts from(sent_bytes), to(received_bytes);
    auto transfer = std::make_unique<Started>(operation, *this, sent, received);
    Flight& flight = *transfer->flight;
    flight.from = std::move(from);
    flight.to = std::move(to);
    check(MPI_Ialltoallv(sent.data(), flight.from.counts.data(), flight.from.starts.data(), MPI_BYTE, received.data(),
                         flight.to.counts.data(), flight.to.starts.data(), MPI_BYTE, communicator_, &flight.request),
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

  // What MPI reads and writes until it is complete.
  struct Flight {
    MPI_Request request = MPI_REQUEST_NULL;
    Parts from, to;
    SharedBytes sent, received;
  };

  struct Started : Transfer {
    Started(std::string_view what, const MpiTransport& transport, const SharedBytes& sent, const SharedBytes& received)
        : flight(new Flight), operation(what), rank(transport.rank_), timeout(transport.timeout_) {
      flight->sent = sent;
      flight->received = received;
    }
    ~Started() override {
      if (flight->request != MPI_REQUEST_NULL) static_cast<void>(flight.release());
    }

    void wait() override {
      const auto deadline = std::chrono::steady_clock::now() + timeout;
      for (int done = 0; done == 0;) {
        check(MPI_Test(&flight->request, &done, MPI_STATUS_IGNORE), operation.c_str());
        if (done == 0 && std::chrono::steady_clock::now() > deadline) {
          throw Timeout(concat(operation, " on rank ", rank, ": not complete within ", timeout.count(), " ms"));
        }
        if (done == 0) std::this_thread::yield();
      }
    }

    std::unique_ptr<Flight> flight;
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
