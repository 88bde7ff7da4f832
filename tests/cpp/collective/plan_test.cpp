// Plans against what ranks do: the bytes that pass a transport, and which results are exact.
#include <gtest/gtest.h>

#include <numeric>

#include "narrowgauge/collective.hpp"
#include "narrowgauge/error.hpp"
#include "ranks.hpp"

namespace ng {
namespace {

using test::expect_part;
using test::run_ranks;

Wire wire(const char* format) { return {.format = Format::parse(format)}; }

// Counts what a rank sends to others.
class CountingTransport final : public Transport {
 public:
  CountingTransport(std::shared_ptr<Transport> below, int64_t* sent) : below_(std::move(below)), sent_(sent) {}

  int rank() const override { return below_->rank(); }
  int size() const override { return below_->size(); }
  std::string name() const override { return below_->name(); }

  std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                       std::string_view operation) override {
    *sent_ += static_cast<int64_t>(sent.size()) * (size() - 1);
    return below_->all_gather(sent, received, operation);
  }
  std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                       const SharedBytes& received, std::span<const int64_t> received_bytes,
                                       std::string_view operation) override {
    *sent_ +=
        std::accumulate(sent_bytes.begin(), sent_bytes.end(), int64_t{0}) - sent_bytes[static_cast<size_t>(rank())];
    return below_->all_to_all(sent, sent_bytes, received, received_bytes, operation);
  }
  // The first split of a communicator is by node, the second by place: what its transports send is counted there.
  std::shared_ptr<Transport> split(int color) override {
    return std::make_shared<CountingTransport>(below_->split(color), splits_++ == 0 ? sent_ : sent_ + 1);
  }

 private:
  std::shared_ptr<Transport> below_;
  int64_t* sent_;
  int splits_ = 0;
};

struct Case {
  CollectiveKind kind;
  int ranks, node_size;
  int64_t numel;
  DType dtype;
};

void call(Communicator& communicator, const Case& c, const CollectiveOptions& options,
          SecondaryShard* secondary = nullptr) {
  const auto bytes = static_cast<size_t>(c.numel) * dtype_bytes(c.dtype);
  std::vector<std::byte> whole(bytes), out(bytes);
  const int64_t part = c.numel / c.ranks;
  const TensorView all(whole.data(), c.dtype, {c.numel}), same(out.data(), c.dtype, {c.numel});
  const TensorView piece(out.data(), c.dtype, {part});
  switch (c.kind) {
    case CollectiveKind::all_gather: return communicator.all_gather(piece, all, options, secondary).wait();
    case CollectiveKind::reduce_scatter: return communicator.reduce_scatter(all, piece, Reduction::sum, options).wait();
    case CollectiveKind::all_reduce: return communicator.all_reduce(all, same, Reduction::sum, options).wait();
  }
}

TEST(Plan, CountsTheBytesThatAreSent) {
  for (const CollectiveKind kind :
       {CollectiveKind::all_gather, CollectiveKind::reduce_scatter, CollectiveKind::all_reduce}) {
    for (const auto& [ranks, node_size] : {std::pair{1, 0}, {3, 0}, {4, 2}, {6, 3}}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        for (const int64_t below : {0, 1 << 20}) {
          const Case c{kind, ranks, node_size, 6000, dtype};
          const CollectiveOptions options{.wire = wire("int4:g64:fp16"),
                                          .inside = wire("int8:g64:bf16"),
                                          .chunk_bytes = 3000,
                                          .exact_below = below};
          run_ranks(ranks, [&, node_size = node_size](std::shared_ptr<Transport>& transport) {
            int64_t sent[2] = {};  // near, across
            Communicator communicator(std::make_shared<CountingTransport>(transport, sent), node_size);
            call(communicator, c, options);  // the first compares descriptions
            sent[0] = sent[1] = 0;
            call(communicator, c, options);
            if (transport->rank() != 0) return;
            const CollectivePlan plan = communicator.plan(kind, c.numel, dtype, options);
            EXPECT_EQ(plan.sent_bytes, sent[0] + sent[1]) << plan.str();
            EXPECT_EQ(plan.sent_across, sent[1]) << plan.str();
          });
        }
      }
    }
  }
}

TEST(Plan, IsExactWhereThatIsCheaper) {
  const CollectiveOptions options{.wire = wire("int8:g64:bf16")};
  const auto plan = [&](int64_t numel, DType dtype, int ranks, const CollectiveOptions& how) {
    return plan_collective(CollectiveKind::all_reduce, numel, dtype, ranks, 0, how);
  };
  const int64_t floats = kExactBelow / 4;
  EXPECT_FALSE(plan(floats - 1, DType::f32, 2, options).wire.format);
  EXPECT_EQ(plan(floats, DType::f32, 2, options).wire, options.wire);
  EXPECT_FALSE(plan(floats, DType::bf16, 2, options).wire.format);
  EXPECT_FALSE(plan(floats, DType::f32, 1, options).wire.format);
  EXPECT_TRUE(plan(1, DType::f32, 2, {.wire = options.wire, .exact_below = 0}).wire.format);
  EXPECT_FALSE(plan(2 * floats, DType::f32, 2, {}).wire.format);
  expect_part(plan(100, DType::f32, 3, options).str(),
              "all_reduce of 100 float32 on 3 ranks: exact, since 400 bytes are fewer than 1048576 (exact_below)");
  expect_part(plan(floats, DType::f32, 3, options).str(), "3 ranks: int8:g64:bf16, since 1048576 bytes are not fewer");
  EXPECT_THROW(plan(-1, DType::f32, 2, options), InvalidArgument);
  EXPECT_THROW(plan(1, DType::i32, 2, options), InvalidArgument);
  EXPECT_THROW(plan(1, DType::f32, 2, {.exact_below = -1}), InvalidArgument);
  EXPECT_THROW(plan_collective(CollectiveKind::all_gather, 7, DType::f32, 2, 0, options), InvalidArgument);
}

TEST(Plan, ResultsOfSmallTensorsAreExact) {
  run_ranks(3, [](std::shared_ptr<Transport>& transport) {
    Communicator communicator(transport);
    std::vector<float> data(1000), out(1000);
    for (size_t i = 0; i < data.size(); ++i) data[i] = 1e-3f * static_cast<float>(i * i) + 1;
    communicator
        .all_reduce({data.data(), DType::f32, {1000}}, {out.data(), DType::f32, {1000}}, Reduction::sum,
                    {.wire = wire("int4:g64:bf16")})
        .wait();
    for (size_t i = 0; i < data.size(); ++i) ASSERT_EQ(out[i], data[i] + data[i] + data[i]);
  });
}

// --- hpZ -----------------------------------------------------------------------------------------------------------

TEST(SecondaryShard, IsGatheredWithinTheNode) {
  constexpr int kRanks = 6, kNode = 2;
  constexpr int64_t kShard = 1000;
  for (const bool narrow : {true, false}) {
    run_ranks(kRanks, [&](std::shared_ptr<Transport>& transport) {
      int64_t sent[2] = {};
      Communicator communicator(std::make_shared<CountingTransport>(transport, sent), kNode);
      const CollectiveOptions options{
          .wire = narrow ? wire("int8:g64:bf16") : Wire{}, .chunk_bytes = 5000, .exact_below = 0};
      auto pool = std::make_shared<StatisticsPool>(std::make_shared<HostPool>());
      SecondaryShard secondary(pool);
      std::vector<float> shard(kShard), all(kShard * kRanks), again(all.size());
      for (size_t i = 0; i < shard.size(); ++i) shard[i] = static_cast<float>(i % 97) + 0.3f;
      const auto gather = [&](std::vector<float>& out) {
        sent[0] = sent[1] = 0;
        communicator
            .all_gather({shard.data(), DType::f32, {kShard}}, {out.data(), DType::f32, {kShard * kRanks}}, options,
                        &secondary)
            .wait();
      };
      EXPECT_EQ(secondary.nbytes(), 0);
      gather(all);
      EXPECT_TRUE(secondary.is_filled());
      EXPECT_GT(sent[1], 0);
      const int64_t elements = kShard * kRanks / kNode;
      const int64_t least = narrow ? elements + elements / 64 * 2 : elements * 4;
      EXPECT_GE(secondary.nbytes(), least);
      EXPECT_LE(secondary.nbytes(), least + 3 * 8 * 200);  // padding of 3 nodes' 8 chunks
      EXPECT_EQ(pool->statistics().blocks, 1u);

      shard.assign(shard.size(), 7.0f);  // is not looked at
      gather(again);
      gather(again);
      EXPECT_EQ(again, all);
      EXPECT_EQ(sent[1], 0);

      secondary.invalidate();
      gather(again);
      EXPECT_GT(sent[1], 0);
      EXPECT_EQ(again, std::vector<float>(all.size(), again[0]));
      EXPECT_NEAR(again[0], 7.0f, 0.05f);
      EXPECT_EQ(pool->statistics().blocks, 1u);
      SecondaryShard moved = std::move(secondary);
      EXPECT_TRUE(moved.is_filled());
    });
  }
}

TEST(SecondaryShard, RefusesWhatDoesNotFit) {
  run_ranks(4, [](std::shared_ptr<Transport>& transport) {
    const Case c{CollectiveKind::all_gather, 4, 2, 4000, DType::f32};
    const CollectiveOptions options{.wire = wire("int8:g64:bf16"), .exact_below = 0};
    Communicator flat(transport), nodes(transport, 2);
    SecondaryShard secondary;
    EXPECT_THROW(call(flat, c, options, &secondary), InvalidArgument);
    call(nodes, c, options, &secondary);
    CollectiveOptions other = options;
    other.wire = wire("int4:g64:bf16");
    EXPECT_THROW(call(nodes, c, other, &secondary), InvalidArgument);
    EXPECT_THROW(call(nodes, {c.kind, 4, 2, 8000, DType::f32}, options, &secondary), InvalidArgument);
    SecondaryShard limited(std::make_shared<LimitPool>(std::make_shared<HostPool>(), 4096));
    EXPECT_THROW(call(nodes, {c.kind, 4, 2, 40000, DType::f32}, options, &limited), OutOfMemory);
    EXPECT_FALSE(limited.is_filled());
  });
}

}  // namespace
}  // namespace ng
