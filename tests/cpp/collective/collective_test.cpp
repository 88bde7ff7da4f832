// Collectives against what they say they are: values quantised whole, added in fp32 in the order of the ranks.
#include "narrowgauge/collective.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "collective/wire.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "ranks.hpp"

namespace ng {
namespace {

using test::errors_of_ranks;
using test::expect_part;
using test::run_ranks;

Wire wire(const char* format) { return {.format = Format::parse(format)}; }

std::vector<float> values(int rank, int64_t n) {
  std::mt19937 random(static_cast<unsigned>(rank) + 1);
  std::normal_distribution<float> distribution;
  std::vector<float> all(static_cast<size_t>(n));
  for (float& value : all) value = distribution(random);
  return all;
}

TensorView view(std::vector<float>& data) { return {data.data(), DType::f32, {static_cast<int64_t>(data.size())}}; }

// As they arrive, without Hadamard.
std::vector<float> rounded(const std::vector<float>& from, const Wire& how) {
  if (!how.format || from.empty()) return from;
  std::vector<float> copy = from, out(from.size());
  const auto n = static_cast<int64_t>(from.size());
  const QTensor matrix = QTensor::quantize({copy.data(), DType::f32, {1, n}}, *how.format);
  dequantize(matrix.canonical_view(), {out.data(), DType::f32, {1, n}}, default_executor());
  return out;
}

std::vector<float> part(const std::vector<float>& from, int64_t first, int64_t n) {
  return {from.begin() + first, from.begin() + first + n};
}

std::vector<float> sum_of(const std::vector<std::vector<float>>& peers) {
  std::vector<float> sum = peers[0];
  for (size_t i = 1; i < peers.size(); ++i) {
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += peers[i][j];
  }
  return sum;
}

const char* const kFormats[] = {"int8:g64:bf16", "int4:g128:fp16", "fp6_e2m3:g32:e8m0", "uint4:g48:fp16",
                                "nf4:g64:fp32"};

TEST(Collective, AllGatherBringsWhatWasQuantised) {
  for (const int size : {1, 2, 3, 7}) {
    for (const char* format : kFormats) {
      for (const int64_t n : {0, 1, 63, 1000, 5000}) {
        SCOPED_TRACE(concat(size, ' ', format, ' ', n));
        std::vector<float> expected;
        for (int rank = 0; rank < size; ++rank) {
          const std::vector<float> arrived = rounded(values(rank, n), wire(format));
          expected.insert(expected.end(), arrived.begin(), arrived.end());
        }
        run_ranks(size, [&](std::shared_ptr<Transport>& transport) {
          Communicator communicator(transport);
          std::vector<float> mine = values(transport->rank(), n), out(static_cast<size_t>(n * size));
          communicator.all_gather(view(mine), view(out), {.wire = wire(format), .chunk_bytes = 1000, .exact_below = 0})
              .wait();
          EXPECT_EQ(out, expected);
        });
      }
    }
  }
}

TEST(Collective, ReduceScatterAddsInTheOrderOfRanks) {
  for (const int size : {1, 2, 3, 8}) {
    for (const char* format : kFormats) {
      for (const int64_t n : {0, 1, 63, 1000, 3000}) {
        SCOPED_TRACE(concat(size, ' ', format, ' ', n));
        run_ranks(size, [&](std::shared_ptr<Transport>& transport) {
          const int rank = transport->rank();
          Communicator communicator(transport);
          std::vector<float> input = values(rank, n * size), out(static_cast<size_t>(n));
          std::vector<std::vector<float>> peers;
          for (int peer = 0; peer < size; ++peer) {
            peers.push_back(rounded(part(values(peer, n * size), rank * n, n), wire(format)));
          }
          std::vector<float> expected = sum_of(peers);
          communicator
              .reduce_scatter(view(input), view(out), Reduction::sum,
                              {.wire = wire(format), .chunk_bytes = 999, .exact_below = 0})
              .wait();
          EXPECT_EQ(out, expected);
          for (float& value : expected) value /= static_cast<float>(size);
          communicator
              .reduce_scatter(view(input), view(out), Reduction::mean,
                              {.wire = wire(format), .chunk_bytes = 999, .exact_below = 0})
              .wait();
          EXPECT_EQ(out, expected);
        });
      }
    }
  }
}

// All ranks have the same bits, within what two roundings of the Format allow.
TEST(Collective, AllReduceGivesAllRanksTheSame) {
  for (const int node_size : {0, 2}) {
    for (const int size : {1, 2, 4, 6, 9}) {
      if (node_size != 0 && size % node_size != 0) continue;
      for (const int64_t n : {0, 1, 100, 5001}) {
        SCOPED_TRACE(concat(node_size, ' ', size, ' ', n));
        std::vector<std::vector<float>> inputs, results(static_cast<size_t>(size));
        for (int rank = 0; rank < size; ++rank) inputs.push_back(values(rank, n));
        const std::vector<float> exact = sum_of(inputs);
        run_ranks(size, [&](std::shared_ptr<Transport>& transport) {
          Communicator communicator(transport, node_size);
          std::vector<float> data = inputs[static_cast<size_t>(transport->rank())];
          const CollectiveOptions options{
              .wire = wire("int8:g64:bf16"), .inside = wire("int8:g64:bf16"), .chunk_bytes = 2000, .exact_below = 0};
          communicator.all_reduce(view(data), view(data), Reduction::sum, options).wait();
          results[static_cast<size_t>(transport->rank())] = data;
        });
        for (const std::vector<float>& result : results) {
          EXPECT_EQ(result, results[0]);
          for (size_t i = 0; i < exact.size(); ++i) ASSERT_NEAR(result[i], exact[i], 0.04f * static_cast<float>(size));
        }
      }
    }
  }
}

TEST(Collective, ExactWiresAreExact) {
  for (const int node_size : {0, 3}) {
    run_ranks(6, [&](std::shared_ptr<Transport>& transport) {
      Communicator communicator(transport, node_size);
      const int rank = transport->rank();
      // Sums of small integers, in any order.
      const auto whole = [](int of, size_t i) { return static_cast<float>((static_cast<int>(i) * 7 + of * 13) % 101); };
      std::vector<float> input(600), out(100), all(600), gathered(3600);
      for (size_t i = 0; i < input.size(); ++i) input[i] = whole(rank, i);
      communicator.reduce_scatter(view(input), view(out), Reduction::sum, {}).wait();
      communicator.all_reduce(view(input), view(all), Reduction::sum, {}).wait();
      communicator.all_gather(view(input), view(gathered), {}).wait();
      for (size_t i = 0; i < all.size(); ++i) {
        float sum = 0;
        for (int peer = 0; peer < 6; ++peer) sum += whole(peer, i);
        ASSERT_EQ(all[i], sum);
        if (i / 100 == static_cast<size_t>(rank)) {
          ASSERT_EQ(out[i % 100], sum);
        }
        for (int peer = 0; peer < 6; ++peer) {
          ASSERT_EQ(gathered[static_cast<size_t>(peer) * 600 + i], whole(peer, i));
        }
      }
    });
  }
}

// qgZ: within nodes by one Format, between them by another; each rank's part is rounded once in each.
TEST(Collective, NodesAddUpFirst) {
  constexpr int kSize = 6, kNode = 3;
  constexpr int64_t kLength = 1000;
  const CollectiveOptions options{
      .wire = wire("int4:g64:fp16"), .inside = wire("int8:g64:bf16"), .chunk_bytes = 1000, .exact_below = 0};
  run_ranks(kSize, [&](std::shared_ptr<Transport>& transport) {
    const int rank = transport->rank();
    Communicator communicator(transport, kNode);
    std::vector<float> input = values(rank, kLength * kSize), out(kLength);
    std::vector<std::vector<float>> nodes;
    for (int node = 0; node < kSize / kNode; ++node) {
      std::vector<std::vector<float>> peers;
      for (int place = 0; place < kNode; ++place) {
        const std::vector<float> theirs = values(node * kNode + place, kLength * kSize);
        peers.push_back(rounded(part(theirs, rank * kLength, kLength), options.inside));
      }
      nodes.push_back(rounded(sum_of(peers), options.wire));
    }
    std::vector<float> expected = sum_of(nodes);
    for (float& value : expected) value /= kSize;
    communicator.reduce_scatter(view(input), view(out), Reduction::mean, options).wait();
    EXPECT_EQ(out, expected);

    std::vector<float> shard = values(rank, kLength), all(kLength * kSize), gathered;
    for (int peer = 0; peer < kSize; ++peer) {
      const std::vector<float> theirs = rounded(values(peer, kLength), options.wire);
      gathered.insert(gathered.end(), theirs.begin(), theirs.end());
    }
    communicator.all_gather(view(shard), view(all), options).wait();
    EXPECT_EQ(all, gathered);
  });
}

TEST(Collective, AllToAllWithPartsOfAnyLength) {
  constexpr int kSize = 3;
  const auto length = [](int from, int to) { return int64_t{from} * 100 + to * 77; };
  run_ranks(kSize, [&](std::shared_ptr<Transport>& transport) {
    const int rank = transport->rank();
    Communicator communicator(transport);
    std::vector<int64_t> sent, received;
    std::vector<float> input, expected;
    const Wire how = wire("int8:g64:bf16");
    for (int peer = 0; peer < kSize; ++peer) {
      sent.push_back(length(rank, peer)), received.push_back(length(peer, rank));
      const std::vector<float> to = values(rank * 10 + peer, sent.back());
      const std::vector<float> from = rounded(values(peer * 10 + rank, received.back()), how);
      input.insert(input.end(), to.begin(), to.end());
      expected.insert(expected.end(), from.begin(), from.end());
    }
    std::vector<float> out(expected.size());
    communicator.all_to_all(view(input), sent, view(out), received, {.wire = how, .chunks = 3}).wait();
    EXPECT_EQ(out, expected);
  });
}

// The arrays that quantize gives for all rows at once.
TEST(Collective, ShardsAreGatheredAsTheyTravelled) {
  for (const char* format : {"int8:g64:bf16", "uint4:g48:fp16", "fp6_e2m3:g32:e8m0"}) {
    for (const int node_size : {0, 2}) {
      SCOPED_TRACE(concat(format, ' ', node_size));
      constexpr int64_t kRows = 5, kCols = 576;
      std::vector<float> all;
      for (int rank = 0; rank < 4; ++rank) {
        const std::vector<float> theirs = values(rank, kRows * kCols);
        all.insert(all.end(), theirs.begin(), theirs.end());
      }
      const QTensor expected = QTensor::quantize({all.data(), DType::f32, {4 * kRows, kCols}}, Format::parse(format));
      const CanonicalView want = expected.canonical_view();
      run_ranks(4, [&](std::shared_ptr<Transport>& transport) {
        Communicator communicator(transport, node_size);
        std::vector<float> shard = values(transport->rank(), kRows * kCols);
        const CanonicalBytes bytes = canonical_bytes(want.format, want.rows, want.cols);
        std::vector<uint8_t> codes(static_cast<size_t>(bytes.codes)), scales(static_cast<size_t>(bytes.scales)),
            zeros(static_cast<size_t>(bytes.zeros));
        const CanonicalView out{want.format, want.rows, want.cols, codes.data(), scales.data(), zeros.data()};
        const TensorView from(shard.data(), DType::f32, {kRows, kCols});
        communicator.all_gather(from, out, {.wire = wire(format), .chunk_bytes = 3000, .exact_below = 0}).wait();
        EXPECT_EQ(std::memcmp(codes.data(), want.codes, codes.size()), 0);
        EXPECT_EQ(std::memcmp(scales.data(), want.scales, scales.size()), 0);
        EXPECT_TRUE(zeros.empty() || std::memcmp(zeros.data(), want.zeros, zeros.size()) == 0);
      });
    }
  }
}

// Neither how many chunks there are nor Hadamard and stochastic rounding make results depend on anything else.
TEST(Collective, ResultsDoNotDependOnChunks) {
  for (const bool stochastic : {false, true}) {
    std::vector<std::vector<float>> results;
    for (const auto& [chunks, bytes] : {std::pair{1, 1}, {3, 1}, {8, 1}, {8, 100000}}) {
      run_ranks(3, [&, chunks = chunks, bytes = bytes](std::shared_ptr<Transport>& transport) {
        Communicator communicator(transport);
        std::vector<float> data = values(transport->rank(), 4321), out(4321);
        const Wire how{.format = Format::parse("int4:g48:fp16"), .hadamard = true, .stochastic = stochastic};
        communicator
            .all_reduce(view(data), view(out), Reduction::mean,
                        {.wire = how, .chunks = chunks, .chunk_bytes = bytes, .seed = 11, .exact_below = 0})
            .wait();
        if (transport->rank() == 0) results.push_back(out);
      });
    }
    for (const std::vector<float>& result : results) EXPECT_EQ(result, results[0]);
  }
}

double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(expected[i]), 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(error / size);
}

TEST(Collective, HadamardSpreadsOutliers) {
  std::vector<double> errors;
  for (const bool hadamard : {false, true}) {
    run_ranks(2, [&](std::shared_ptr<Transport>& transport) {
      Communicator communicator(transport);
      std::vector<float> data = values(transport->rank(), 6421), out(2 * 6421);
      for (size_t i = 0; i < data.size(); i += 100) data[i] *= 30;
      const Wire how{.format = Format::parse("int4:g128:fp16"), .hadamard = hadamard};
      communicator.all_gather(view(data), view(out), {.wire = how, .exact_below = 0}).wait();
      if (transport->rank() == 0) errors.push_back(relative_error(part(out, 0, 6421), data));
    });
  }
  EXPECT_LT(errors[1], 0.75 * errors[0]);
}

// Unbiased: the mean over many seeds comes nearer than one rounding does.
TEST(Collective, StochasticRoundingIsUnbiased) {
  constexpr int kSeeds = 200;
  run_ranks(2, [&](std::shared_ptr<Transport>& transport) {
    Communicator communicator(transport);
    std::vector<float> data = values(3, 256), out(512), mean(256);
    Wire how = wire("int4:g64:fp16");
    communicator.all_gather(view(data), view(out), {.wire = how, .exact_below = 0}).wait();
    const double once = relative_error(part(out, 0, 256), data);
    how.stochastic = true;
    bool ranks_differ = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      communicator.all_gather(view(data), view(out), {.wire = how, .seed = seed, .exact_below = 0}).wait();
      ranks_differ |= part(out, 0, 256) != part(out, 256, 256);
      for (size_t i = 0; i < mean.size(); ++i) mean[i] += out[i] / kSeeds;
    }
    EXPECT_TRUE(ranks_differ);
    EXPECT_LT(relative_error(mean, data), 0.25 * once);
  });
}

// The mean over many steps comes near, with the same gradient at each and no randomness; NaN does not stay.
TEST(Collective, ErrorFeedbackLosesNothingOverSteps) {
  constexpr int kSteps = 50;
  for (const bool hadamard : {false, true}) {
    for (const int node_size : {0, 2}) {
      run_ranks(4, [&](std::shared_ptr<Transport>& transport) {
        Communicator communicator(transport, node_size);
        std::vector<float> data = values(transport->rank(), 4 * 300), out(300), mean(300), error(data.size());
        const TensorView kept = view(error);
        const Wire narrow{.format = Format::parse("int4:g64:bf16"), .hadamard = hadamard};
        // Between nodes exactly, since the error is of the first rounding.
        const CollectiveOptions options{
            .wire = node_size == 0 ? narrow : Wire{}, .inside = narrow, .chunk_bytes = 500, .exact_below = 0};
        std::vector<float> exact(300);
        communicator.reduce_scatter(view(data), view(exact), Reduction::mean, {}).wait();
        double once = 0;
        for (int step = 0; step < kSteps; ++step) {
          communicator.reduce_scatter(view(data), view(out), Reduction::mean, options, &kept).wait();
          if (step == 0) once = relative_error(out, exact);
          for (size_t i = 0; i < mean.size(); ++i) mean[i] += out[i] / kSteps;
        }
        EXPECT_LT(relative_error(mean, exact), 0.05 * once);
        data[7] = std::numeric_limits<float>::quiet_NaN();
        communicator.reduce_scatter(view(data), view(out), Reduction::mean, options, &kept).wait();
        for (const float value : error) ASSERT_TRUE(std::isfinite(value));
      });
    }
  }
}

TEST(Collective, NanAndInfinityArriveAsNan) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
  for (const float value : bad) {
    for (const char* format : kFormats) {
      for (const bool hadamard : {false, true}) {
        SCOPED_TRACE(concat(format, ' ', value, ' ', hadamard));
        run_ranks(2, [&](std::shared_ptr<Transport>& transport) {
          Communicator communicator(transport);
          std::vector<float> data = values(transport->rank(), 500), out(500);
          if (transport->rank() == 1) data[200] = value;
          const Wire how{.format = Format::parse(format), .hadamard = hadamard};
          communicator.all_reduce(view(data), view(out), Reduction::sum, {.wire = how, .exact_below = 0}).wait();
          EXPECT_TRUE(std::isnan(out[200]));
          EXPECT_TRUE(std::isfinite(out[0]));
          EXPECT_TRUE(std::isfinite(out[499]));
        });
      }
    }
  }
}

TEST(Collective, HalvesGoInAndComeOut) {
  run_ranks(3, [](std::shared_ptr<Transport>& transport) {
    Communicator communicator(transport);
    std::vector<bf16> input(300), out(100);
    for (size_t i = 0; i < input.size(); ++i) input[i] = to_bf16(static_cast<float>(i % 17) - 8);
    const TensorView from(input.data(), DType::bf16, {3, 100}), to(out.data(), DType::bf16, {100});
    communicator.reduce_scatter(from, to, Reduction::mean, {.wire = wire("int8:g16:bf16"), .exact_below = 0}).wait();
    for (size_t i = 0; i < out.size(); ++i) {
      const float exact = to_float(input[static_cast<size_t>(transport->rank()) * 100 + i]);
      EXPECT_NEAR(to_float(out[i]), exact, 0.06f);
    }
    std::vector<f16> wide(300);
    communicator.all_gather(to, {wide.data(), DType::f16, {300}}, {}).wait();
    const size_t mine = static_cast<size_t>(transport->rank()) * 100;
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(to_float(wide[mine + i]), to_float(out[i]));
  });
}

TEST(Collective, RanksThatDisagreeAreToldWhat) {
  const std::vector<std::string> errors = errors_of_ranks(2, [](std::shared_ptr<Transport>& transport) {
    Communicator communicator(transport);
    std::vector<float> data(transport->rank() == 0 ? 100 : 101), out(data.size());
    communicator.all_reduce(view(data), view(out), Reduction::sum, {.wire = wire("int8:g64:bf16")}).wait();
  });
  for (const std::string& error : errors) {
    expect_part(error, "all_reduce of sums of 100 float32");
    expect_part(error, "all_reduce of sums of 101 float32");
  }
}

TEST(Collective, ARankThatDiesIsNamed) {
  const std::vector<std::string> errors = errors_of_ranks(3, [](std::shared_ptr<Transport>& transport) {
    Communicator communicator(transport);
    std::vector<float> data(1000), out(1000);
    communicator.all_reduce(view(data), view(out), Reduction::sum, {.wire = wire("int8:g64:bf16")}).wait();
    if (transport->rank() == 1) return;
    communicator.all_reduce(view(data), view(out), Reduction::sum, {.wire = wire("int8:g64:bf16")}).wait();
  });
  EXPECT_EQ(errors[1], "");
  expect_part(errors[0], "rank 1");
  expect_part(errors[2], "rank 1");
}

TEST(Collective, RefusesWhatDoesNotFit) {
  run_ranks(2, [](std::shared_ptr<Transport>& transport) {
    EXPECT_THROW(Communicator(transport, 3), InvalidArgument);
    Communicator communicator(transport);
    std::vector<float> data(100), out(100);
    const CollectiveOptions options{.wire = wire("int8:g64:bf16")};
    EXPECT_THROW(communicator.all_gather(view(data), view(out), options), InvalidArgument);
    EXPECT_THROW(communicator.reduce_scatter(view(data), view(out), Reduction::sum, options), InvalidArgument);
    const auto reduce = [&](const Wire& how) {
      communicator.all_reduce(view(data), view(out), Reduction::sum, {.wire = how});
    };
    EXPECT_THROW(reduce(wire("int8:row:fp32")), InvalidArgument);
    EXPECT_THROW(reduce(wire("nvfp4")), InvalidArgument);
    EXPECT_THROW(reduce({.hadamard = true}), InvalidArgument);
    const TensorView integers(data.data(), DType::i32, {100});
    EXPECT_THROW(communicator.all_reduce(integers, view(out), Reduction::sum, options), InvalidArgument);
    CanonicalView codes{.format = Format::parse("int8:g64:bf16"), .rows = 200, .cols = 1};
    EXPECT_THROW(communicator.all_gather(view(data), codes, options), InvalidArgument);
    codes.format = Format::parse("int4:g64:bf16");
    EXPECT_THROW(communicator.all_gather(view(data), codes, options), InvalidArgument);
    const TensorView half(out.data(), DType::f16, {100});
    std::vector<float> part(50);
    EXPECT_THROW(communicator.reduce_scatter(view(data), view(part), Reduction::sum, options, &half), InvalidArgument);
    const TensorView few(out.data(), DType::f32, {99});
    EXPECT_THROW(communicator.all_reduce(view(data), view(data), Reduction::sum, options, &few), InvalidArgument);
    const std::vector<int64_t> parts{50, 51};
    EXPECT_THROW(communicator.all_to_all(view(data), parts, view(out), parts, options), InvalidArgument);
  });
}

TEST(Wire, BytesAreThoseOfTheFormat) {
  EXPECT_EQ(collective::wire_bytes(wire("int8:g64:bf16"), DType::f32, 6400), 6400 + 200 + 8);
  EXPECT_EQ(collective::wire_bytes(wire("int4:g64:bf16"), DType::bf16, 6400), 3200 + 200 + 8);
  EXPECT_EQ(collective::wire_bytes({}, DType::bf16, 100), 208);
  EXPECT_EQ(collective::wire_bytes(wire("int8:g64:bf16"), DType::f32, 0), 0);
}

}  // namespace
}  // namespace ng
