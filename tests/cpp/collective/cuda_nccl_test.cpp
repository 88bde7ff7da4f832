// Collectives on GPUs over NCCL, each rank a thread with a GPU of its own, beside the same on the host over the
// in-process transport: the same bits. Without NCCL and GPUs it is the simulated ones that this runs on.
#include "narrowgauge/transport_nccl.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <barrier>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "collective/shim/nccl.hpp"
#include "driver/context.hpp"
#include "narrowgauge/collective.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "ranks.hpp"

namespace ng {
namespace {

using test::expect_part;
using test::run_ranks;
using Bytes = std::vector<std::byte>;
using std::chrono::milliseconds;

constexpr int kMostRanks = 4;

class CudaNccl : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!why_no_cuda().empty()) GTEST_SKIP() << why_no_cuda();
    if (!why_no_nccl().empty()) GTEST_SKIP() << why_no_nccl();
    if (cuda_architectures().empty()) GTEST_SKIP() << "this build has no kernels";
    if (cuda_device_count() < kMostRanks) GTEST_SKIP() << "there are fewer than " << kMostRanks << " GPUs";
  }

  // What each rank threw, or "".
  template <typename Body>
  static std::vector<std::string> errors_of_gpus(int size, const Body& body,
                                                 milliseconds timeout = std::chrono::minutes(2)) {
    const NcclId id = nccl_unique_id();
    std::vector<std::string> errors(static_cast<size_t>(size));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          body(NcclTransport::create(id, rank, size, rank, timeout));
        } catch (const std::exception& error) {
          errors[static_cast<size_t>(rank)] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    return errors;
  }
  template <typename Body>
  static void run_gpus(int size, const Body& body) {
    for (const std::string& error : errors_of_gpus(size, body)) EXPECT_EQ(error, "");
  }
};

// Memory of a stream's GPU with a copy of bytes.
class OnGpu {
 public:
  OnGpu(const Bytes& from, const Stream& stream)
      : stream_(stream),
        tensor_(Tensor::empty(std::make_shared<StreamPool>(default_device_pool(stream.device()), stream),
                              std::array{static_cast<int64_t>(from.size())}, DType::u8)) {
    copy(tensor_->data, from.data(), from.size(), stream);
  }
  std::byte* data() const { return static_cast<std::byte*>(tensor_->data); }
  Bytes download() const {
    Bytes to(static_cast<size_t>(tensor_->bytes()));
    copy(to.data(), tensor_->data, to.size(), stream_);
    stream_.synchronize();
    return to;
  }

 private:
  Stream stream_;
  Tensor tensor_;
};

Bytes values(int rank, int64_t n, DType dtype) {
  std::mt19937 random(static_cast<unsigned>(rank) + 1);
  std::normal_distribution<float> distribution;
  Bytes bytes(static_cast<size_t>(n) * dtype_bytes(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const float value = distribution(random);
    std::byte* const to = bytes.data() + static_cast<size_t>(i) * dtype_bytes(dtype);
    if (dtype == DType::f32) std::memcpy(to, &value, 4);
    const f16 half = to_f16(value);
    const bf16 brief = to_bf16(value);
    if (dtype == DType::f16) std::memcpy(to, &half, 2);
    if (dtype == DType::bf16) std::memcpy(to, &brief, 2);
  }
  return bytes;
}

std::vector<float> floats(const Bytes& bytes, DType dtype) {
  std::vector<float> all(bytes.size() / dtype_bytes(dtype));
  for (size_t i = 0; i < all.size(); ++i) {
    const std::byte* const from = bytes.data() + i * dtype_bytes(dtype);
    f16 half;
    bf16 brief;
    std::memcpy(&half, from, 2);
    std::memcpy(&brief, from, 2);
    if (dtype == DType::f32) std::memcpy(&all[i], from, 4);
    if (dtype == DType::f16) all[i] = to_float(half);
    if (dtype == DType::bf16) all[i] = to_float(brief);
  }
  return all;
}

// Bit for bit, but for which NaN a NaN is.
void expect_same(const Bytes& got, const Bytes& expected, DType dtype) {
  ASSERT_EQ(got.size(), expected.size());
  const std::vector<float> a = floats(got, dtype), b = floats(expected, dtype);
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_TRUE((std::isnan(a[i]) && std::isnan(b[i])) || (a[i] == b[i] && std::signbit(a[i]) == std::signbit(b[i])))
        << "element " << i << ": " << a[i] << ", expected " << b[i];
  }
}

enum class Kind { all_gather, reduce_scatter, all_reduce, all_to_all };

struct Case {
  const char* name;
  Kind kind;
  int size;
  int node_size;
  DType dtype, out_dtype;
  CollectiveOptions options;
  int64_t n;  // of a rank's part
  bool has_error = false;
  Reduction reduction = Reduction::sum;
};

void PrintTo(const Case& each, std::ostream* out) { *out << each.name; }

Wire wire(const char* format, bool hadamard = false, bool stochastic = false) {
  return {Format::parse(format), hadamard, stochastic};
}

struct Numels {
  int64_t input, out;
  std::vector<int64_t> sent, received;
};

Numels numels(const Case& each, int rank) {
  const int64_t size = each.size;
  switch (each.kind) {
    case Kind::all_gather: return {each.n, each.n * size, {}, {}};
    case Kind::reduce_scatter: return {each.n * size, each.n, {}, {}};
    case Kind::all_reduce: return {each.n, each.n, {}, {}};
    case Kind::all_to_all: break;
  }
  Numels all{0, 0, {}, {}};
  for (int peer = 0; peer < each.size; ++peer) {
    all.sent.push_back(each.n * rank + 7 * peer), all.received.push_back(each.n * peer + 7 * rank);
    all.input += all.sent.back(), all.out += all.received.back();
  }
  return all;
}

// Starts it on memory of either kind.
Pending start(const Case& each, Communicator& communicator, std::byte* input, std::byte* out, std::byte* error,
              CollectiveOptions options) {
  options.exact_below = 0;
  const Numels n = numels(each, communicator.rank());
  const TensorView from(input, each.dtype, {n.input}), to(out, each.out_dtype, {n.out});
  const TensorView kept(error, DType::f32, {n.input});
  const TensorView* const feedback = each.has_error ? &kept : nullptr;
  switch (each.kind) {
    case Kind::all_gather: return communicator.all_gather(from, to, options);
    case Kind::reduce_scatter: return communicator.reduce_scatter(from, to, each.reduction, options, feedback);
    case Kind::all_reduce: return communicator.all_reduce(from, to, each.reduction, options, feedback);
    case Kind::all_to_all: break;
  }
  return communicator.all_to_all(from, n.sent, to, n.received, options);
}

class CudaNcclCase : public CudaNccl, public ::testing::WithParamInterface<Case> {};

// With error feedback twice, so that there is something to feed back, and without an agreement before it.
TEST_P(CudaNcclCase, EqualsTheHosts) {
  const Case& each = GetParam();
  const auto ranks = static_cast<size_t>(each.size);
  const size_t times = each.has_error ? 2 : 1;
  std::vector<Bytes> expected(2 * ranks), expected_errors(ranks), got(2 * ranks), errors(ranks);
  const auto room = [](int64_t n, DType dtype) { return Bytes(static_cast<size_t>(n) * dtype_bytes(dtype)); };

  run_ranks(each.size, [&](std::shared_ptr<Transport>& transport) {
    const auto rank = static_cast<size_t>(transport->rank());
    Communicator communicator(transport, each.node_size);
    const Numels n = numels(each, transport->rank());
    Bytes input = values(transport->rank(), n.input, each.dtype), out = room(n.out, each.out_dtype);
    Bytes error = room(each.has_error ? n.input : 0, DType::f32);
    for (size_t time = 0; time < times; ++time) {
      start(each, communicator, input.data(), out.data(), error.data(), each.options).wait();
      expected[2 * rank + time] = out;
    }
    expected_errors[rank] = error;
  });
  run_gpus(each.size, [&](const std::shared_ptr<NcclTransport>& transport) {
    const auto rank = static_cast<size_t>(transport->rank());
    const Stream stream = Stream::create(transport->device().gpu);
    Communicator communicator(transport, each.node_size);
    const Numels n = numels(each, transport->rank());
    const OnGpu input(values(transport->rank(), n.input, each.dtype), stream);
    const OnGpu out(room(n.out, each.out_dtype), stream);
    const OnGpu error(room(each.has_error ? n.input : 0, DType::f32), stream);
    CollectiveOptions options = each.options;
    options.stream = stream;
    for (size_t time = 0; time < times; ++time) {
      start(each, communicator, input.data(), out.data(), error.data(), options).wait();
      got[2 * rank + time] = out.download();
    }
    errors[rank] = error.download();
  });
  for (size_t i = 0; i < got.size(); ++i) {
    SCOPED_TRACE(concat("rank ", i / 2, ", time ", i % 2));
    expect_same(got[i], expected[i], each.out_dtype);
    expect_same(errors[i / 2], expected_errors[i / 2], DType::f32);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CudaNcclCase,
    ::testing::Values(
        Case{"OneRank", Kind::all_reduce, 1, 0, DType::f32, DType::f32, {.wire = wire("int8:g64:bf16")}, 300},
        Case{"MeanInChunks",
             Kind::all_reduce,
             2,
             0,
             DType::f32,
             DType::f32,
             {.wire = wire("int8:g64:bf16"), .chunks = 2, .chunk_bytes = 500},
             700,
             false,
             Reduction::mean},
        Case{"AllOptions",
             Kind::reduce_scatter,
             2,
             0,
             DType::bf16,
             DType::f32,
             {.wire = wire("int4:g64:fp16", true, true), .chunks = 1, .seed = 7},
             165,
             true,
             Reduction::mean},
        Case{"ExactSums", Kind::reduce_scatter, 3, 0, DType::f16, DType::bf16, {}, 131, true, Reduction::mean},
        Case{"Nodes",
             Kind::all_reduce,
             4,
             2,
             DType::f32,
             DType::f16,
             {.wire = wire("int4:g64:bf16", true), .inside = wire("int8:g32:fp16")},
             300,
             false,
             Reduction::mean},
        Case{"NodesGather",
             Kind::all_gather,
             4,
             2,
             DType::f16,
             DType::f16,
             {.wire = wire("uint4:g48:fp16"), .inside = wire("int8:g64:bf16")},
             200},
        Case{"ExactGather", Kind::all_gather, 3, 0, DType::bf16, DType::f32, {}, 70},
        Case{"Parts",
             Kind::all_to_all,
             3,
             0,
             DType::bf16,
             DType::bf16,
             {.wire = wire("fp6_e2m3:g32:e8m0"), .chunks = 2},
             90}),
    ::testing::PrintToStringParamName());

std::vector<float> host_values(int rank, int64_t n) { return floats(values(rank, n, DType::f32), DType::f32); }

// Against sums in double precision; a NaN arrives as one on all ranks, and nowhere else.
TEST_F(CudaNccl, SumsAreNearAndNanArrives) {
  constexpr int64_t kLength = 640;
  run_gpus(2, [&](const std::shared_ptr<NcclTransport>& transport) {
    const Stream stream = Stream::create(transport->device().gpu);
    Communicator communicator(transport);
    Bytes mine = values(transport->rank(), kLength, DType::f32);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (transport->rank() == 1) std::memcpy(mine.data() + 200 * sizeof nan, &nan, sizeof nan);
    const OnGpu data(mine, stream);
    const TensorView view(data.data(), DType::f32, {kLength});
    communicator
        .all_reduce(view, view, Reduction::sum, {.wire = wire("int8:g64:bf16"), .exact_below = 0, .stream = stream})
        .wait();
    const std::vector<float> got = floats(data.download(), DType::f32);
    const std::vector<float> a = host_values(0, kLength), b = host_values(1, kLength);
    for (size_t i = 0; i < got.size(); ++i) {
      if (i / 64 == 200 / 64) {
        EXPECT_TRUE(std::isnan(got[i])) << i;
      } else {
        EXPECT_NEAR(got[i], static_cast<double>(a[i]) + static_cast<double>(b[i]), 0.06) << i;
      }
    }
  });
}

TEST_F(CudaNccl, ShardsAreGatheredAsTheyTravelled) {
  constexpr int64_t kRows = 3, kCols = 144;
  const Format format = Format::parse("uint4:g48:fp16");
  std::vector<float> all = host_values(0, kRows * kCols);
  const std::vector<float> second = host_values(1, kRows * kCols);
  all.insert(all.end(), second.begin(), second.end());
  const QTensor expected = QTensor::quantize({all.data(), DType::f32, {2 * kRows, kCols}}, format);
  const CanonicalView want = expected.canonical_view();
  const CanonicalBytes bytes = canonical_bytes(format, 2 * kRows, kCols);
  run_gpus(2, [&](const std::shared_ptr<NcclTransport>& transport) {
    const Stream stream = Stream::create(transport->device().gpu);
    Communicator communicator(transport);
    const OnGpu shard(values(transport->rank(), kRows * kCols, DType::f32), stream);
    const OnGpu codes(Bytes(static_cast<size_t>(bytes.codes)), stream),
        scales(Bytes(static_cast<size_t>(bytes.scales)), stream),
        zeros(Bytes(static_cast<size_t>(bytes.zeros)), stream);
    const CanonicalView out{format,        2 * kRows,
                            kCols,         reinterpret_cast<uint8_t*>(codes.data()),
                            scales.data(), reinterpret_cast<uint8_t*>(zeros.data())};
    communicator
        .all_gather({shard.data(), DType::f32, {kRows, kCols}}, out, {.wire = {.format = format}, .stream = stream})
        .wait();
    EXPECT_EQ(std::memcmp(codes.download().data(), want.codes, static_cast<size_t>(bytes.codes)), 0);
    EXPECT_EQ(std::memcmp(scales.download().data(), want.scales, static_cast<size_t>(bytes.scales)), 0);
    EXPECT_EQ(std::memcmp(zeros.download().data(), want.zeros, static_cast<size_t>(bytes.zeros)), 0);
  });
}

// What it holds is gathered, whatever the shard has become.
TEST_F(CudaNccl, SecondaryShardsKeepWhatTravelled) {
  constexpr int64_t kLength = 100;
  run_gpus(4, [&](const std::shared_ptr<NcclTransport>& transport) {
    const Stream stream = Stream::create(transport->device().gpu);
    Communicator communicator(transport, 2);
    SecondaryShard secondary(std::make_shared<StreamPool>(default_device_pool(stream.device()), stream));
    const OnGpu shard(values(transport->rank(), kLength, DType::f32), stream);
    const OnGpu out(Bytes(4 * 4 * kLength), stream);
    const TensorView from(shard.data(), DType::f32, {kLength}), to(out.data(), DType::f32, {4 * kLength});
    communicator.all_gather(from, to, {.stream = stream}, &secondary).wait();
    EXPECT_TRUE(secondary.is_filled());
    const Bytes first = out.download();
    for (int rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(std::memcmp(first.data() + rank * 4 * kLength, values(rank, kLength, DType::f32).data(), 4 * kLength),
                0);
    }
    const Bytes nothing(4 * kLength);
    copy(shard.data(), nothing.data(), nothing.size(), stream);
    communicator.all_gather(from, to, {.stream = stream}, &secondary).wait();
    EXPECT_EQ(out.download(), first);
    SecondaryShard on_host;
    EXPECT_THROW(communicator.all_gather(from, to, {.stream = stream}, &on_host), InvalidArgument);
  });
}

// A communicator on a GPU and a tensor of 100 elements there.
struct Setting {
  explicit Setting(const std::shared_ptr<Transport>& transport, int64_t n = 100)
      : stream(Stream::create(transport->device().gpu)),
        communicator(transport),
        input(Bytes(static_cast<size_t>(4 * n)), stream),
        out(Bytes(static_cast<size_t>(4 * n * transport->size())), stream),
        from(input.data(), DType::f32, {n}),
        to(out.data(), DType::f32, {n * transport->size()}) {}
  // Without kernels, which take their time on a simulated GPU.
  Pending gather() { return communicator.all_gather(from, to, {.stream = stream}); }

  Stream stream;
  Communicator communicator;
  OnGpu input, out;
  TensorView from, to;
};

// A GPU's memory that the test keeps.
SharedBytes shared(const OnGpu& memory, int64_t bytes) {
  return {std::shared_ptr<std::byte>(std::shared_ptr<void>(), memory.data()), static_cast<size_t>(bytes)};
}

TEST_F(CudaNccl, RanksThatDisagreeAreToldWhat) {
  const std::vector<std::string> errors = errors_of_gpus(2, [](const std::shared_ptr<NcclTransport>& transport) {
    Setting setting(transport, transport->rank() == 0 ? 100 : 101);
    setting.gather().wait();
  });
  for (const std::string& error : errors) {
    expect_part(error, "all_gather of 100 float32");
    expect_part(error, "all_gather of 101 float32");
  }
}

// The stream comes to its end, and says why; so does every later call.
TEST_F(CudaNccl, ARankThatDoesNotComeIsATimeout) {
  std::barrier ended(2);
  const std::vector<std::string> errors = errors_of_gpus(
      2,
      [&](const std::shared_ptr<NcclTransport>& transport) {
        Setting setting(transport);
        setting.gather().wait();
        setting.stream.synchronize();
        if (transport->rank() == 0) {
          Pending pending = setting.gather();
          pending.wait();
          try {
            setting.stream.synchronize();
            ADD_FAILURE() << "no error";
          } catch (const Timeout& error) {
            expect_part(error.what(), "all_gather of 100 float32");
            expect_part(error.what(), "on rank 0 of 2: not complete within 1500 ms");
          }
          EXPECT_NO_THROW(setting.stream.synchronize());  // it has been said
          EXPECT_THROW(setting.gather(), Timeout);
        }
        ended.arrive_and_wait();
      },
      milliseconds(1500));
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST_F(CudaNccl, ARankThatIsLostIsAnErrorOnAll) {
  setenv("SIMNCCL_LOSE", "1:3", 1);
  const std::vector<std::string> errors = errors_of_gpus(3, [](const std::shared_ptr<NcclTransport>& transport) {
    Setting setting(transport);
    for (int i = 0; i < 5; ++i) {
      setting.gather().wait();
      setting.stream.synchronize();
    }
  });
  unsetenv("SIMNCCL_LOSE");
  for (const std::string& error : errors) {
    expect_part(error, "all_gather of 100 float32");
    expect_part(error, "rank 1 is lost");
  }
}

TEST_F(CudaNccl, PartsThatDoNotFitNeverArrive) {
  const std::vector<std::string> errors = errors_of_gpus(2, [](const std::shared_ptr<NcclTransport>& transport) {
    Setting setting(transport);
    const int64_t bytes = transport->rank() == 0 ? 64 : 100;
    const int64_t counts[] = {bytes, bytes};
    const std::shared_ptr<Transport> ordered = transport->on(setting.stream);
    ordered
        ->all_to_all(shared(setting.input, 2 * counts[0]), counts, shared(setting.out, 2 * counts[0]), counts,
                     "exchange")
        ->wait();
    setting.stream.synchronize();
  });
  for (const std::string& error : errors) expect_part(error, "exchange on rank");
}

// Started by one rank only; and one whose ranks give different sizes.
TEST_F(CudaNccl, ACommunicatorThatDoesNotComeAboutIsATimeout) {
  try {
    NcclTransport::create(nccl_unique_id(), 0, 2, 0, milliseconds(200));
    FAIL() << "no error";
  } catch (const Timeout& error) {
    expect_part(error.what(), "rank 0 of 2");
  }
  EXPECT_THROW(NcclTransport::create(nccl_unique_id(), 2, 2, 0), InvalidArgument);
  EXPECT_THROW(NcclTransport::create(nccl_unique_id(), 0, 1, 99), InvalidArgument);
  EXPECT_THROW(NcclTransport::create(nccl_unique_id(), 0, 1, 0, milliseconds(0)), InvalidArgument);
}

// The caller's, which blocks; it is neither aborted nor destroyed, whatever happens.
TEST_F(CudaNccl, CommunicatorsOfTheCallersAreUsedAndLeft) {
  const nccl::Nccl& table = *nccl::library();
  nccl::UniqueId id{};
  ASSERT_EQ(table.ncclGetUniqueId(&id), nccl::Result::success);
  std::vector<std::thread> threads;
  std::barrier ended(2);
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const cuda::ContextScope context(rank);
      nccl::Comm comm = nullptr;
      ASSERT_EQ(table.ncclCommInitRankConfig(&comm, 2, id, rank, nullptr), nccl::Result::success);
      const Stream stream = Stream::create(rank);
      {
        EXPECT_THROW(NcclTransport::adopt(comm, Stream::create(1 - rank)), InvalidArgument);
        const auto transport = NcclTransport::adopt(comm, stream, milliseconds(1500));
        EXPECT_EQ(transport->rank(), rank);
        EXPECT_EQ(transport->size(), 2);
        Setting setting(transport);
        setting.gather().wait();
        setting.stream.synchronize();
        ended.arrive_and_wait();
        if (rank == 0) {
          setting.gather().wait();
          EXPECT_THROW(transport->synchronize(), Timeout);
          nccl::Result error{};
          EXPECT_EQ(table.ncclCommGetAsyncError(comm, &error), nccl::Result::success);
          EXPECT_EQ(error, nccl::Result::success);
          EXPECT_EQ(table.ncclCommAbort(comm), nccl::Result::success);
        }
        ended.arrive_and_wait();
      }
      if (rank == 1) {
        EXPECT_EQ(table.ncclCommDestroy(comm), nccl::Result::success);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(CudaNccl, RefusesWhatLiesElsewhere) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  run_gpus(2, [&](const std::shared_ptr<NcclTransport>& transport) {
    Setting setting(transport);
    Communicator& communicator = setting.communicator;
    std::vector<float> host(100);
    const TensorView on_host(host.data(), DType::f32, {100});
    expect_part(message([&] { communicator.all_gather(on_host, setting.to, {.stream = setting.stream}); }),
                "shard lies in host memory");
    expect_part(message([&] { communicator.all_gather(setting.from, setting.to, {}); }), "options with a stream of it");
    const int other = 1 - transport->rank();
    expect_part(message([&] { communicator.all_gather(setting.from, setting.to, {.stream = Stream::create(other)}); }),
                concat("the stream is of cuda:", other).c_str());
    const std::shared_ptr<Transport> in_process = in_process_transports(1)[0];
    expect_part(message([&] { in_process->on(setting.stream); }), "carries host memory");
    expect_part(message([&] { Communicator(in_process).all_gather(on_host, on_host, {.stream = setting.stream}); }),
                "carries host memory");
  });
}

}  // namespace
}  // namespace ng
