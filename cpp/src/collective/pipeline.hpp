// A collective's chunks on their way through its stages.
//
// A stage computes on a chunk that has arrived and starts its next transfer. All chunks go through a stage before any
// goes through the next, so that while one is computed on, others are on the wire; and every rank starts the same
// transfers in the same order.
#pragma once

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "narrowgauge/collective.hpp"
#include "narrowgauge/transport.hpp"

namespace ng {

// What a rank sends to and receives from the others in one transfer.
struct Message {
  std::vector<int64_t> sent_bytes, received_bytes;  // by rank
  SharedBytes sent, received;

  void reserve(const std::shared_ptr<Pool>& pool) {
    const auto total = [](const std::vector<int64_t>& bytes) {
      return static_cast<size_t>(std::accumulate(bytes.begin(), bytes.end(), int64_t{0}));
    };
    sent = SharedBytes(pool, total(sent_bytes));
    received = SharedBytes(pool, total(received_bytes));
  }
};

class Pending::Work {
 public:
  Work(int chunks, int stages)
      : stages_(stages), messages_(static_cast<size_t>(chunks * stages)), in_flight_(static_cast<size_t>(chunks)) {}
  virtual ~Work() = default;

  void start() { run(0); }
  void finish() {
    for (int stage = 1; stage < stages_; ++stage) run(stage);
  }

 protected:
  // Starts the transfer of a chunk, having computed what it sends; null if nothing is sent.
  virtual std::unique_ptr<Transfer> step(int stage, int chunk) = 0;

  Message& message(int stage, int chunk) { return messages_[static_cast<size_t>(chunk * stages_ + stage)]; }

 private:
  void run(int stage) {
    for (size_t chunk = 0; chunk < in_flight_.size(); ++chunk) {
      if (in_flight_[chunk] != nullptr) in_flight_[chunk]->wait();
      in_flight_[chunk] = step(stage, static_cast<int>(chunk));
    }
  }

  int stages_;
  std::vector<Message> messages_;
  std::vector<std::unique_ptr<Transfer>> in_flight_;
};

}  // namespace ng
