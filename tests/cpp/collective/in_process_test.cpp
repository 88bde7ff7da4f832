#include <gtest/gtest.h>

#include <numeric>

#include "narrowgauge/error.hpp"
#include "ranks.hpp"

namespace ng {
namespace {

using std::chrono::milliseconds;
using test::errors_of_ranks;
using test::expect_part;
using test::run_ranks;

std::vector<std::byte> pattern(int from, int to, int64_t bytes) {
  std::vector<std::byte> all(static_cast<size_t>(bytes));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::byte>(from * 31 + to * 7 + static_cast<int>(i));
  return all;
}

// Bytes of the test's own.
SharedBytes shared(std::span<std::byte> bytes) {
  return {std::shared_ptr<std::byte>(std::shared_ptr<void>(), bytes.data()), bytes.size()};
}

TEST(InProcessTransport, GathersInTheOrderOfRanks) {
  for (const int size : {1, 2, 5}) {
    run_ranks(size, [&](std::shared_ptr<Transport>& transport) {
      EXPECT_EQ(transport->size(), size);
      std::vector<std::byte> mine = pattern(transport->rank(), 0, 100);
      std::vector<std::byte> all(static_cast<size_t>(100 * size));
      transport->all_gather(shared(mine), shared(all), "gather")->wait();
      for (int rank = 0; rank < size; ++rank) {
        const std::vector<std::byte> part(all.begin() + 100 * rank, all.begin() + 100 * (rank + 1));
        EXPECT_EQ(part, pattern(rank, 0, 100));
      }
    });
  }
}

// Also several transfers at a time, waited for in any order.
TEST(InProcessTransport, ExchangesPartsOfAnyLength) {
  constexpr int kSize = 3, kTransfers = 4;
  const auto length = [](int from, int to, int number) { return int64_t{from} * 5 + to * 3 + number; };
  run_ranks(kSize, [&](std::shared_ptr<Transport>& transport) {
    const int rank = transport->rank();
    std::vector<std::vector<std::byte>> received(kTransfers);
    std::vector<std::unique_ptr<Transfer>> transfers;
    for (int number = 0; number < kTransfers; ++number) {
      std::vector<std::byte> sent;
      std::vector<int64_t> sent_bytes, received_bytes;
      for (int peer = 0; peer < kSize; ++peer) {
        const std::vector<std::byte> part = pattern(rank, peer, length(rank, peer, number));
        sent.insert(sent.end(), part.begin(), part.end());
        sent_bytes.push_back(length(rank, peer, number));
        received_bytes.push_back(length(peer, rank, number));
      }
      auto& to = received[static_cast<size_t>(number)];
      to.resize(static_cast<size_t>(std::accumulate(received_bytes.begin(), received_bytes.end(), int64_t{0})));
      transfers.push_back(transport->all_to_all(shared(sent), sent_bytes, shared(to), received_bytes, "exchange"));
    }
    for (int number = kTransfers - 1; number >= 0; --number) {
      transfers[static_cast<size_t>(number)]->wait();
      std::vector<std::byte> expected;
      for (int peer = 0; peer < kSize; ++peer) {
        const std::vector<std::byte> part = pattern(peer, rank, length(peer, rank, number));
        expected.insert(expected.end(), part.begin(), part.end());
      }
      EXPECT_EQ(received[static_cast<size_t>(number)], expected);
    }
  });
}

TEST(InProcessTransport, SplitsByColor) {
  run_ranks(6, [&](std::shared_ptr<Transport>& transport) {
    const std::shared_ptr<Transport> rows = transport->split(transport->rank() / 3);
    const std::shared_ptr<Transport> columns = transport->split(transport->rank() % 3);
    EXPECT_EQ(rows->size(), 3);
    EXPECT_EQ(rows->rank(), transport->rank() % 3);
    EXPECT_EQ(columns->size(), 2);
    EXPECT_EQ(columns->rank(), transport->rank() / 3);
    auto mine = static_cast<std::byte>(transport->rank());
    std::byte all[2];
    columns->all_gather(shared({&mine, 1}), shared(all), "columns")->wait();
    EXPECT_EQ(static_cast<int>(all[1]) - static_cast<int>(all[0]), 3);
  });
}

TEST(InProcessTransport, ARankThatDoesNotComeIsNamed) {
  const std::vector<std::string> errors = errors_of_ranks(
      3,
      [](std::shared_ptr<Transport>& transport) {
        if (transport->rank() == 1) {
          std::this_thread::sleep_for(milliseconds(600));
          return;
        }
        std::byte all[3], mine{};
        transport->all_gather(shared({&mine, 1}), shared(all), "step 7")->wait();
      },
      milliseconds(50));
  expect_part(errors[0], "step 7: rank 1 did not come within 50 ms");
  expect_part(errors[2], "step 7: rank 1 did not come within 50 ms");
}

TEST(InProcessTransport, ARankThatHasGoneIsNamedAtOnce) {
  const std::vector<std::string> errors = errors_of_ranks(3, [](std::shared_ptr<Transport>& transport) {
    if (transport->rank() == 2) return;
    std::byte all[3], mine{};
    transport->all_gather(shared({&mine, 1}), shared(all), "step 7")->wait();
  });
  expect_part(errors[0], "step 7: rank 2 of 3 has gone");
  expect_part(errors[1], "step 7: rank 2 of 3 has gone");
}

TEST(InProcessTransport, TransfersThatDoNotFitTogetherAreRefused) {
  const std::vector<std::string> errors = errors_of_ranks(2, [](std::shared_ptr<Transport>& transport) {
    std::byte all[8], mine[4]{};
    const bool first = transport->rank() == 0;
    transport->all_gather(shared({mine, first ? size_t{4} : size_t{3}}), shared(all), first ? "four" : "three")->wait();
  });
  for (const std::string& error : errors) {
    expect_part(error, "sends 4 bytes in four; rank 1 expects 3 in three");
  }
}

TEST(InProcessTransport, NoRanksAreRefused) { EXPECT_THROW(in_process_transports(0), InvalidArgument); }

}  // namespace
}  // namespace ng
