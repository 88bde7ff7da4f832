// Runs something as every rank of a process, each in a thread of its own.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "narrowgauge/transport.hpp"

namespace ng::test {

// What each rank threw, or "".
inline std::vector<std::string> errors_of_ranks(int size, const std::function<void(std::shared_ptr<Transport>&)>& body,
                                                std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
  std::vector<std::shared_ptr<Transport>> transports = in_process_transports(size, timeout);
  std::vector<std::string> errors(transports.size());
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < transports.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(transports[rank]);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
      transports[rank].reset();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

inline void run_ranks(int size, const std::function<void(std::shared_ptr<Transport>&)>& body) {
  for (const std::string& error : errors_of_ranks(size, body)) EXPECT_EQ(error, "");
}

inline void expect_part(const std::string& error, const char* part) {
  EXPECT_NE(error.find(part), std::string::npos) << error;
}

}  // namespace ng::test
