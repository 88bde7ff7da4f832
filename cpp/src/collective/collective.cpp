// The collectives as stages of chunks. A chunk is a range of every rank's part of a tensor, cut at whole groups.
#include "narrowgauge/collective.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <utility>

#include "collective/layout.hpp"
#include "collective/pipeline.hpp"
#include "collective/place.hpp"
#include "collective/wire.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using collective::check_options;
using collective::cut;
using collective::equal_parts;
using collective::Layout;
using collective::nearly_equal_parts;
using collective::Place;
using collective::Range;
using collective::unit_elements;
using collective::wire_bytes;

// --- tensors -------------------------------------------------------------------------------------------------------

// A tensor as the row of its elements.
struct Elements {
  std::byte* data = nullptr;
  DType dtype = DType::f32;
  int64_t n = 0;

  std::byte* at(int64_t index) const { return data + index * static_cast<int64_t>(dtype_bytes(dtype)); }
};

Elements elements_of(const TensorView& tensor, const char* name, const Place& place) {
  NG_CHECK(tensor.dtype == DType::f32 || tensor.dtype == DType::f16 || tensor.dtype == DType::bf16, InvalidArgument,
           name, " is ", dtype_name(tensor.dtype), "; expected float32, float16 or bfloat16");
  NG_CHECK(tensor.is_contiguous(), InvalidArgument, name, " is strided; expected dense elements");
  NG_CHECK(tensor.data != nullptr || tensor.numel() == 0, InvalidArgument, name, " is null; expected ", tensor.numel(),
           " elements");
  place.check(tensor.data, name, dtype_bytes(tensor.dtype));
  return {static_cast<std::byte*>(tensor.data), tensor.dtype, tensor.numel()};
}

// What error feedback keeps; null if there is none.
float* error_of(const TensorView* tensor, int64_t n, const Place& place) {
  if (tensor == nullptr) return nullptr;
  const Elements error = elements_of(*tensor, "error", place);
  NG_CHECK(error.dtype == DType::f32 && error.n == n, InvalidArgument, "error is ", tensor->shape_str(), ' ',
           dtype_name(error.dtype), "; expected ", n, " elements of float32, as many as the input has");
  return reinterpret_cast<float*>(error.data);
}

// --- stages --------------------------------------------------------------------------------------------------------

// The ranks, as the communicator knows them.
struct Ranks {
  std::shared_ptr<Transport> all;
  std::shared_ptr<Transport> node;    // null without nodes
  std::shared_ptr<Transport> across;  // likewise
  int node_size = 0;                  // 0: no nodes

  bool has_nodes() const { return node_size != 0; }
  int nodes() const { return all->size() / node_size; }
};

// Of a collective's roundings.
enum class Level : uint8_t { first, across, gather };

// Ranks and levels round apart.
uint64_t key(uint64_t seed, int rank, Level level) {
  return seed + 0x9e3779b97f4a7c15U * (static_cast<uint64_t>(rank) * 4 + static_cast<uint64_t>(level));
}

// What a stage computes, from what the one before has brought, and sends.
enum class Step : uint8_t {
  scatter,         // the input's chunks, to the ranks that have the parts
  scatter_inside,  // likewise within nodes: to every place those of the ranks that have it, in any node
  scatter_across,  // the node's sums, to the ranks of this place in other nodes
  finish_sum,      // sums of all, into out
  gather,          // this rank's chunk to all, or to those of its place in all nodes
  forward,         // what came from other nodes, within this one
  finish_gather,   // the chunks of all, into out
};

}  // namespace

struct Communicator::Setup {
  std::vector<Step> steps;
  Layout layout;
  Elements input{}, out{};
  CollectiveOptions options;
  std::optional<CanonicalView> codes{};  // in place of out
  SecondaryShard* secondary = nullptr;   // what forward() sends, if it comes first; else where that is kept
  float* error = nullptr;
  int divisor = 1;
  // Of the communicator.
  Ranks ranks{};
  std::string operation{};
  std::shared_ptr<Place> place{};
};

class Communicator::Job final : public Pending::Work {
 public:
  explicit Job(Setup setup) : Work(setup.layout.chunks, static_cast<int>(setup.steps.size())), s_(std::move(setup)) {
    start();
  }

 private:
  std::unique_ptr<Transfer> step(int stage, int chunk) override {
    Message& now = message(stage, chunk);
    Message* const before = stage == 0 ? nullptr : &message(stage - 1, chunk);
    std::unique_ptr<Transfer> transfer;
    switch (s_.steps[static_cast<size_t>(stage)]) {
      case Step::scatter: transfer = scatter(chunk, now); break;
      case Step::scatter_inside: transfer = scatter_inside(chunk, now); break;
      case Step::scatter_across: transfer = scatter_across(chunk, *before, now); break;
      case Step::finish_sum: finish_sum(chunk, *before); break;
      case Step::gather: transfer = gather(chunk, before, now); break;
      case Step::forward: transfer = forward(chunk, before, now); break;
      case Step::finish_gather: finish_gather(chunk, *before); break;
    }
    if (before != nullptr) *before = {};
    return transfer;
  }

  int rank() const { return s_.ranks.all->rank(); }
  int size() const { return s_.ranks.all->size(); }
  Range mine(int chunk) const { return s_.layout.chunk(rank(), chunk); }

  // Of the input's elements; null without error feedback.
  float* error(const Range& range) const { return s_.error == nullptr ? nullptr : s_.error + range.first; }

  std::unique_ptr<Transfer> exchange(Transport& transport, Message& now) const {
    return transport.all_to_all(now.sent, now.sent_bytes, now.received, now.received_bytes, s_.operation);
  }
  std::unique_ptr<Transfer> gather(Transport& transport, Message& now) const {
    return transport.all_gather(now.sent, now.received, s_.operation);
  }

  std::unique_ptr<Transfer> scatter(int chunk, Message& now) {
    const Wire& wire = s_.options.wire;
    for (int peer = 0; peer < size(); ++peer) {
      now.sent_bytes.push_back(wire_bytes(wire, s_.input.dtype, s_.layout.chunk(peer, chunk).n));
      now.received_bytes.push_back(wire_bytes(wire, s_.input.dtype, mine(chunk).n));
    }
    now.reserve(s_.place->pool());
    std::byte* to = now.sent.data();
    for (int peer = 0; peer < size(); ++peer) {
      const Range range = s_.layout.chunk(peer, chunk);
      s_.place->encode(wire, s_.input.at(range.first), s_.input.dtype, range.n,
                       {key(s_.options.seed, rank(), Level::first), range.first}, error(range), to);
      to += now.sent_bytes[static_cast<size_t>(peer)];
    }
    return exchange(*s_.ranks.all, now);
  }

  // The rank of node `node` that has place `place` in it.
  int rank_at(int node, int place) const { return node * s_.ranks.node_size + place; }

  std::unique_ptr<Transfer> scatter_inside(int chunk, Message& now) {
    const Wire& wire = s_.options.inside;
    const int nodes = s_.ranks.nodes();
    const auto bytes = [&](int place) {
      int64_t sum = 0;
      for (int node = 0; node < nodes; ++node) {
        sum += wire_bytes(wire, s_.input.dtype, s_.layout.chunk(rank_at(node, place), chunk).n);
      }
      return sum;
    };
    for (int place = 0; place < s_.ranks.node_size; ++place) {
      now.sent_bytes.push_back(bytes(place));
      now.received_bytes.push_back(bytes(s_.ranks.node->rank()));
    }
    now.reserve(s_.place->pool());
    std::byte* to = now.sent.data();
    for (int place = 0; place < s_.ranks.node_size; ++place) {
      for (int node = 0; node < nodes; ++node) {
        const Range range = s_.layout.chunk(rank_at(node, place), chunk);
        s_.place->encode(wire, s_.input.at(range.first), s_.input.dtype, range.n,
                         {key(s_.options.seed, rank(), Level::first), range.first}, error(range), to);
        to += wire_bytes(wire, s_.input.dtype, range.n);
      }
    }
    return exchange(*s_.ranks.node, now);
  }

  std::unique_ptr<Transfer> scatter_across(int chunk, const Message& before, Message& now) {
    const int nodes = s_.ranks.nodes(), place = s_.ranks.node->rank();
    const Wire& wire = s_.options.wire;
    for (int node = 0; node < nodes; ++node) {
      now.sent_bytes.push_back(wire_bytes(wire, DType::f32, s_.layout.chunk(rank_at(node, place), chunk).n));
      now.received_bytes.push_back(wire_bytes(wire, DType::f32, mine(chunk).n));
    }
    now.reserve(s_.place->pool());
    std::byte* to = now.sent.data();
    int64_t skipped = 0;  // of each peer's bytes
    for (int node = 0; node < nodes; ++node) {
      const Range range = s_.layout.chunk(rank_at(node, place), chunk);
      const std::vector<const std::byte*> units = units_of(before, before.received_bytes[0], skipped);
      std::byte* const sum = scratch(range.n);
      s_.place->decode_sum(s_.options.inside, units, s_.input.dtype, range.n, 1, sum, DType::f32);
      s_.place->encode(wire, sum, DType::f32, range.n, {key(s_.options.seed, rank(), Level::across), range.first},
                       nullptr, to);
      skipped += wire_bytes(s_.options.inside, s_.input.dtype, range.n);
      to += now.sent_bytes[static_cast<size_t>(node)];
    }
    return exchange(*s_.ranks.across, now);
  }

  // Where the unit `skipped` bytes into what each rank sent begins; `each` bytes came from each.
  static std::vector<const std::byte*> units_of(const Message& message, int64_t each, int64_t skipped) {
    std::vector<const std::byte*> units(message.received_bytes.size());
    for (size_t peer = 0; peer < units.size(); ++peer) {
      units[peer] = message.received.data() + static_cast<int64_t>(peer) * each + skipped;
    }
    return units;
  }

  // The sum of what all ranks have sent for this rank's part.
  void sum(int chunk, const Message& before, void* to, DType dtype) const {
    const DType sent = s_.ranks.has_nodes() ? DType::f32 : s_.input.dtype;
    s_.place->decode_sum(s_.options.wire, units_of(before, before.received_bytes[0], 0), sent, mine(chunk).n,
                         s_.divisor, to, dtype);
  }

  void finish_sum(int chunk, const Message& before) const {
    const int64_t first = mine(chunk).first - s_.layout.parts[static_cast<size_t>(rank())].first;
    sum(chunk, before, s_.out.at(first), s_.out.dtype);
  }

  // The type of what gather encodes: sums are rounded to out's only if that is how they travel.
  DType gathered_type() const {
    if (s_.steps[0] == Step::gather || s_.steps[0] == Step::forward) return s_.input.dtype;
    return s_.options.wire.format ? DType::f32 : s_.out.dtype;
  }
  int64_t gathered_bytes(int chunk) const {
    return wire_bytes(s_.options.wire, gathered_type(), s_.layout.longest(chunk));
  }

  std::unique_ptr<Transfer> gather(int chunk, const Message* before, Message& now) {
    Transport& transport = s_.ranks.has_nodes() ? *s_.ranks.across : *s_.ranks.all;
    const DType dtype = gathered_type();
    const Range range = mine(chunk);
    now.sent_bytes = {gathered_bytes(chunk)};
    now.received_bytes = {gathered_bytes(chunk) * transport.size()};
    now.reserve(s_.place->pool());
    const int64_t used = wire_bytes(s_.options.wire, dtype, range.n);
    s_.place->clear(now.sent.data() + used, now.sent.size() - static_cast<size_t>(used));
    const std::byte* from = nullptr;
    if (before == nullptr) {
      from = s_.input.at(range.first - s_.layout.parts[static_cast<size_t>(rank())].first);
    } else {
      std::byte* const all = scratch(range.n);
      sum(chunk, *before, all, dtype);
      from = all;
    }
    s_.place->encode(s_.options.wire, from, dtype, range.n, {key(s_.options.seed, rank(), Level::gather), range.first},
                     nullptr, now.sent.data());
    return gather(transport, now);
  }

  // What this rank has of a chunk of all nodes, within this one.
  std::unique_ptr<Transfer> forward(int chunk, Message* before, Message& now) const {
    const size_t bytes = static_cast<size_t>(gathered_bytes(chunk)) * static_cast<size_t>(s_.ranks.nodes());
    SharedBytes kept;
    if (s_.secondary != nullptr) kept = s_.secondary->bytes_.part(kept_before(chunk), bytes);
    if (before != nullptr) {
      now.sent = std::move(before->received);
      if (s_.secondary != nullptr) s_.place->copy(kept.data(), now.sent.data(), bytes);
    } else {
      now.sent = std::move(kept);
    }
    now.received = SharedBytes(s_.place->pool(), bytes * static_cast<size_t>(s_.ranks.node->size()));
    return gather(*s_.ranks.node, now);
  }

  // Bytes of a secondary shard that earlier chunks take.
  size_t kept_before(int chunk) const {
    int64_t bytes = 0;
    for (int earlier = 0; earlier < chunk; ++earlier) bytes += gathered_bytes(earlier) * s_.ranks.nodes();
    return static_cast<size_t>(bytes);
  }

  void finish_gather(int chunk, const Message& before) const {
    for (int peer = 0; peer < size(); ++peer) {
      // With nodes they have come by place, then by node.
      const int node_size = s_.ranks.node_size;
      const int at = s_.ranks.has_nodes() ? peer % node_size * s_.ranks.nodes() + peer / node_size : peer;
      const Range range = s_.layout.chunk(peer, chunk);
      const std::byte* unit = before.received.data() + at * gathered_bytes(chunk);
      if (s_.codes) {
        s_.place->copy_codes(unit, range.n, range.first, *s_.codes);
      } else {
        s_.place->decode(s_.options.wire, unit, gathered_type(), range.n, s_.out.at(range.first), s_.out.dtype);
      }
    }
    if (s_.secondary != nullptr && chunk == s_.layout.chunks - 1) s_.secondary->is_filled_ = true;
  }

  // Room for n floats, until the next call.
  std::byte* scratch(int64_t n) {
    const auto bytes = static_cast<size_t>(n) * sizeof(float);
    if (scratch_.size() < bytes) scratch_ = SharedBytes(s_.place->pool(), bytes);
    return scratch_.data();
  }

  const Setup s_;
  SharedBytes scratch_;
};

namespace {

// all_to_all: a part for every rank, in one level.
class Exchange final : public Pending::Work {
 public:
  struct Setup {
    std::shared_ptr<Transport> transport;
    std::vector<Range> sent, received;
    int64_t unit;
    int chunks;
    Elements input, out;
    CollectiveOptions options;
    std::string operation;
    std::shared_ptr<Place> place;
  };

  explicit Exchange(Setup setup) : Work(setup.chunks, 2), s_(std::move(setup)) { start(); }

 private:
  std::unique_ptr<Transfer> step(int stage, int chunk) override {
    const Wire& wire = s_.options.wire;
    Message& sent = message(0, chunk);
    if (stage == 0) {
      for (const Range& part : s_.sent) sent.sent_bytes.push_back(wire_bytes(wire, s_.input.dtype, at(part, chunk).n));
      for (const Range& part : s_.received) {
        sent.received_bytes.push_back(wire_bytes(wire, s_.input.dtype, at(part, chunk).n));
      }
      sent.reserve(s_.place->pool());
      std::byte* to = sent.sent.data();
      for (const Range& part : s_.sent) {
        const Range range = at(part, chunk);
        s_.place->encode(wire, s_.input.at(range.first), s_.input.dtype, range.n,
                         {key(s_.options.seed, s_.transport->rank(), Level::first), range.first}, nullptr, to);
        to += wire_bytes(wire, s_.input.dtype, range.n);
      }
      return s_.transport->all_to_all(sent.sent, sent.sent_bytes, sent.received, sent.received_bytes, s_.operation);
    }
    const std::byte* from = sent.received.data();
    for (const Range& part : s_.received) {
      const Range range = at(part, chunk);
      s_.place->decode(wire, from, s_.input.dtype, range.n, s_.out.at(range.first), s_.out.dtype);
      from += wire_bytes(wire, s_.input.dtype, range.n);
    }
    return nullptr;
  }

  Range at(const Range& part, int chunk) const {
    const Range range = cut(part.n, s_.unit, chunk, s_.chunks);
    return {part.first + range.first, range.n};
  }

  const Setup s_;
};

// What all ranks must agree on.
std::string describe(const char* name, const Elements& input, const Elements& out, const CollectiveOptions& options,
                     int chunks, int node_size) {
  std::string nodes;
  if (node_size != 0) nodes = concat(", ", options.inside.str(), " in nodes of ", node_size);
  return concat(name, " of ", input.n, ' ', dtype_name(input.dtype), " to ", out.n, ' ', dtype_name(out.dtype), " in ",
                options.wire.str(), nodes, ", ", chunks, chunks == 1 ? " chunk" : " chunks");
}

std::vector<Step> scatter_steps(int node_size) {
  if (node_size == 0) return {Step::scatter};
  return {Step::scatter_inside, Step::scatter_across};
}

std::vector<Step> gather_steps(int node_size) {
  if (node_size == 0) return {Step::gather, Step::finish_gather};
  return {Step::gather, Step::forward, Step::finish_gather};
}

}  // namespace

std::string Wire::str() const {
  if (!format) return "exact";
  return concat(format->str(), hadamard ? "+hadamard" : "", stochastic ? "+stochastic" : "");
}

// --- Pending -------------------------------------------------------------------------------------------------------

Pending::Pending(std::unique_ptr<Work> work) : work_(std::move(work)) {}
Pending::Pending(Pending&&) noexcept = default;
Pending& Pending::operator=(Pending&&) noexcept = default;
Pending::~Pending() = default;

void Pending::wait() {
  if (work_ == nullptr) return;
  const std::unique_ptr<Work> work = std::move(work_);
  work->finish();
}

// --- SecondaryShard ------------------------------------------------------------------------------------------------

SecondaryShard::SecondaryShard(std::shared_ptr<Pool> pool) : pool_(std::move(pool)) {
  if (pool_ == nullptr) pool_ = std::make_shared<HostPool>();
}

// --- Communicator --------------------------------------------------------------------------------------------------

Communicator::Communicator(std::shared_ptr<Transport> transport, int node_size, Executor& executor,
                           std::shared_ptr<Pool> pool)
    : transport_(std::move(transport)), node_size_(node_size), executor_(&executor), pool_(std::move(pool)) {
  NG_CHECK(transport_ != nullptr, InvalidArgument, "the transport is null");
  NG_CHECK(node_size >= 0 && (node_size == 0 || size() % node_size == 0), InvalidArgument, "nodes of ", node_size,
           " ranks; expected a divisor of the ", size(), " that there are, or 0");
  if (pool_ == nullptr) pool_ = std::make_shared<HostPool>();
  NG_CHECK(pool_->device().is_cpu(), InvalidArgument, "the pool is of ", pool_->device().str(),
           "; expected host memory");
  if (node_size <= 1 || node_size == size()) node_size_ = 0;  // one level is all there is
  if (node_size_ == 0) return;
  node_ = transport_->split(rank() / node_size_);
  across_ = transport_->split(rank() % node_size_);
}

std::shared_ptr<Place> Communicator::place_of(const CollectiveOptions& options) const {
  const Device device = transport_->device();
  if (!options.stream) {
    NG_CHECK(device.is_cpu(), InvalidArgument, "the transport, ", transport_->name(), ", carries memory of ",
             device.str(), "; expected tensors on it, and options with a stream of it");
    return collective::host_place(*executor_, pool_);
  }
  const int stream_device = options.stream->device();
  NG_CHECK(!device.is_cpu(), InvalidArgument, "the stream is of cuda:", stream_device, ", but the transport, ",
           transport_->name(), ", carries host memory");
  NG_CHECK(device.gpu == stream_device, InvalidArgument, "the stream is of cuda:", stream_device,
           ", but the transport, ", transport_->name(), ", carries memory of ", device.str());
  return collective::device_place(*options.stream);
}

std::shared_ptr<Transport> Communicator::ordered(const std::shared_ptr<Transport>& transport,
                                                 const CollectiveOptions& options) {
  return transport == nullptr || !options.stream ? transport : transport->on(*options.stream);
}

void Communicator::agree(const std::string& description, Transport& transport, const Place& place) {
  if (agreed_.contains(description)) return;
  constexpr size_t kRecord = 256;
  std::array<char, kRecord> mine{};
  description.copy(mine.data(), kRecord - 1);
  std::vector<char> all(kRecord * static_cast<size_t>(size()));
  const SharedBytes sent(place.pool(), mine.size()), received(place.pool(), all.size());
  place.upload(sent.data(), std::as_bytes(std::span(mine)));
  transport.all_gather(sent, received, description)->wait();
  transport.synchronize();
  place.download(std::as_writable_bytes(std::span(all)), received.data());
  for (int other = 0; other < size(); ++other) {
    const char* theirs = all.data() + kRecord * static_cast<size_t>(other);
    NG_CHECK(std::equal(mine.begin(), mine.end(), theirs), TransportError, "rank ", rank(), " calls ", mine.data(),
             "; rank ", other, " calls ", std::string(theirs, strnlen(theirs, kRecord)));
  }
  agreed_.insert(description);
}

Pending Communicator::start(const char* name, Setup setup) {
  setup.ranks = {ordered(transport_, setup.options), ordered(node_, setup.options), ordered(across_, setup.options),
                 node_size_};
  setup.operation = describe(name, setup.input, setup.out, setup.options, setup.layout.chunks, node_size_);
  agree(setup.operation, *setup.ranks.all, *setup.place);
  return Pending(std::make_unique<Job>(std::move(setup)));
}

CollectivePlan Communicator::plan(CollectiveKind kind, int64_t numel, DType dtype,
                                  const CollectiveOptions& options) const {
  return plan_collective(kind, numel, dtype, size(), node_size_, options);
}

// The options with the plan's wires.
CollectiveOptions Communicator::planned(CollectiveKind kind, int64_t numel, DType dtype,
                                        const CollectiveOptions& options) const {
  const CollectivePlan chosen = plan(kind, numel, dtype, options);
  CollectiveOptions result = options;
  result.wire = chosen.wire, result.inside = chosen.inside;
  return result;
}

Pending Communicator::all_gather(const TensorView& shard_tensor, const TensorView& out_tensor,
                                 const CollectiveOptions& asked, SecondaryShard* secondary) {
  const std::shared_ptr<Place> place = place_of(asked);
  const Elements shard = elements_of(shard_tensor, "shard", *place), out = elements_of(out_tensor, "out", *place);
  NG_CHECK(out.n == shard.n * size(), InvalidArgument, "out has ", out.n, " elements; expected ", size(), " x ",
           shard.n);
  const CollectiveOptions options = planned(CollectiveKind::all_gather, out.n, shard.dtype, asked);
  Setup setup{.steps = gather_steps(node_size_),
              .layout = equal_parts(CollectiveKind::all_gather, shard.n, size(), shard.dtype, options),
              .input = shard,
              .out = out,
              .options = options,
              .secondary = secondary,
              .place = place};
  if (secondary == nullptr) return start("all_gather", std::move(setup));

  NG_CHECK(node_size_ != 0, InvalidArgument,
           "a secondary shard with ranks of one level; expected a node_size above 1 and below ", size());
  NG_CHECK(secondary->pool_->device() == transport_->device(), InvalidArgument, "the secondary shard's pool is of ",
           secondary->pool_->device().str(), "; expected memory of ", transport_->device().str());
  const std::string content = describe("all_gather", shard, out, options, setup.layout.chunks, node_size_);
  if (secondary->is_filled_) {
    NG_CHECK(secondary->content_ == content, InvalidArgument, "the secondary shard is that of ", secondary->content_,
             "; expected that of ", content);
    setup.steps.erase(setup.steps.begin());
    return start("all_gather within nodes", std::move(setup));
  }
  int64_t bytes = 0;
  for (int chunk = 0; chunk < setup.layout.chunks; ++chunk) {
    bytes += wire_bytes(options.wire, shard.dtype, setup.layout.longest(chunk)) * (size() / node_size_);
  }
  if (secondary->bytes_.size() != static_cast<size_t>(bytes)) {
    secondary->bytes_ = {};
    secondary->bytes_ = SharedBytes(secondary->pool_, static_cast<size_t>(bytes));
  }
  secondary->content_ = content;
  return start("all_gather", std::move(setup));
}

Pending Communicator::all_gather(const TensorView& shard_tensor, const CanonicalView& out,
                                 const CollectiveOptions& options) {
  check_options(options);
  const std::shared_ptr<Place> place = place_of(options);
  const Elements shard = elements_of(shard_tensor, "shard", *place);
  const Format& format = out.format;
  NG_CHECK(options.wire.format == format && !options.wire.hadamard, InvalidArgument, "out is in ", format.str(),
           ", the wire ", options.wire.str(), "; expected the same, without hadamard");
  const int64_t cols = shard_tensor.ndim == 0 ? 1 : shard_tensor.shape[static_cast<size_t>(shard_tensor.ndim - 1)];
  NG_CHECK(cols % format.group == 0 && cols * format.element.bits % 8 == 0, InvalidArgument, "shard has rows of ", cols,
           " elements; expected whole groups and bytes of ", format.str());
  NG_CHECK(out.cols == cols && out.rows * cols == shard.n * size(), InvalidArgument, "out is [", out.rows, ", ",
           out.cols, "]; expected ", size(), " times shard ", shard_tensor.shape_str());
  NG_CHECK(out.rows * cols == 0 || (out.codes != nullptr && out.scales != nullptr &&
                                    (out.zeros != nullptr || !format.element.has_zero_point())),
           InvalidArgument, "an array of out is null");
  place->check(out.codes, "codes", 1);
  place->check(out.scales, "scales", scale_bytes(format.scale));
  place->check(out.zeros, "zeros", 1);
  return start("all_gather of codes",
               {.steps = gather_steps(node_size_),
                .layout = equal_parts(CollectiveKind::all_gather, shard.n, size(), shard.dtype, options),
                .input = shard,
                .out = {nullptr, shard.dtype, shard.n * size()},
                .options = options,
                .codes = out,
                .place = place});
}

Pending Communicator::reduce_scatter(const TensorView& input_tensor, const TensorView& out_tensor, Reduction reduction,
                                     const CollectiveOptions& asked, const TensorView* error) {
  const std::shared_ptr<Place> place = place_of(asked);
  const Elements input = elements_of(input_tensor, "input", *place), out = elements_of(out_tensor, "out", *place);
  NG_CHECK(input.n == out.n * size(), InvalidArgument, "input has ", input.n, " elements; expected ", size(), " x ",
           out.n);
  const CollectiveOptions options = planned(CollectiveKind::reduce_scatter, input.n, input.dtype, asked);
  const bool is_mean = reduction == Reduction::mean;
  std::vector<Step> steps = scatter_steps(node_size_);
  steps.push_back(Step::finish_sum);
  return start(is_mean ? "reduce_scatter of means" : "reduce_scatter of sums",
               {.steps = std::move(steps),
                .layout = equal_parts(CollectiveKind::reduce_scatter, out.n, size(), input.dtype, options),
                .input = input,
                .out = out,
                .options = options,
                .error = error_of(error, input.n, *place),
                .divisor = is_mean ? size() : 1,
                .place = place});
}

Pending Communicator::all_reduce(const TensorView& input_tensor, const TensorView& out_tensor, Reduction reduction,
                                 const CollectiveOptions& asked, const TensorView* error) {
  const std::shared_ptr<Place> place = place_of(asked);
  const Elements input = elements_of(input_tensor, "input", *place), out = elements_of(out_tensor, "out", *place);
  NG_CHECK(input.n == out.n, InvalidArgument, "out has ", out.n, " elements; expected ", input.n);
  const CollectiveOptions options = planned(CollectiveKind::all_reduce, input.n, input.dtype, asked);
  const bool is_mean = reduction == Reduction::mean;
  std::vector<Step> steps = scatter_steps(node_size_);
  for (const Step step : gather_steps(node_size_)) steps.push_back(step);
  return start(is_mean ? "all_reduce of means" : "all_reduce of sums",
               {.steps = std::move(steps),
                .layout = nearly_equal_parts(input.n, size(), input.dtype, options),
                .input = input,
                .out = out,
                .options = options,
                .error = error_of(error, input.n, *place),
                .divisor = is_mean ? size() : 1,
                .place = place});
}

Pending Communicator::all_to_all(const TensorView& input_tensor, std::span<const int64_t> input_numels,
                                 const TensorView& out_tensor, std::span<const int64_t> out_numels,
                                 const CollectiveOptions& options) {
  check_options(options);
  const std::shared_ptr<Place> place = place_of(options);
  const Elements input = elements_of(input_tensor, "input", *place), out = elements_of(out_tensor, "out", *place);
  const auto parts_of = [&](std::span<const int64_t> numels, int64_t n, const char* name) {
    NG_CHECK(static_cast<int>(numels.size()) == size(), InvalidArgument, name, " has ", numels.size(),
             " parts; expected one for each of ", size(), " ranks");
    std::vector<Range> parts;
    int64_t first = 0;
    for (const int64_t numel : numels) {
      NG_CHECK(numel >= 0 && numel <= n - first, InvalidArgument, name, " has a part of ", numel,
               " elements; expected from 0 to the ", n - first, " that are left of ", n);
      parts.push_back({first, numel});
      first += numel;
    }
    NG_CHECK(first == n, InvalidArgument, name, " has parts of ", first, " elements; expected ", n);
    return parts;
  };
  Exchange::Setup setup{.transport = ordered(transport_, options),
                        .sent = parts_of(input_numels, input.n, "input"),
                        .received = parts_of(out_numels, out.n, "out"),
                        .unit = unit_elements(options.wire),
                        .chunks = options.chunks,
                        .input = input,
                        .out = out,
                        .options = options,
                        .operation = {},
                        .place = place};
  // Ranks have different numbers of elements, so that all of it is cut into the same number of chunks.
  setup.operation =
      concat("all_to_all of ", dtype_name(input.dtype), " in ", options.wire.str(), ", ", options.chunks, " chunks");
  agree(setup.operation, *setup.transport, *place);
  return Pending(std::make_unique<Exchange>(std::move(setup)));
}

}  // namespace ng
