// Collectives with narrow numbers on the wire: all_gather, reduce_scatter, all_reduce, all_to_all.
//
// What a rank sends is quantised as it leaves, in a Format; sums are made of the decoded values in fp32, in the order
// of the ranks, and rounded to the type of the result once. So results are the same bits every time, on every rank that
// gets them, for any number of chunks and threads. A group with a NaN or an infinity arrives as NaN.
//
// With nodes (Communicator's `node_size`) a collective has two levels (qgZ; Wang et al. 2023, ZeRO++, section 3.3):
// reduce_scatter adds up within nodes first, so that between nodes goes 1/node_size of the bytes; all_gather goes
// between nodes first. Each level has a Wire of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>

#include "narrowgauge/executor.hpp"
#include "narrowgauge/format.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"
#include "narrowgauge/tensor.hpp"
#include "narrowgauge/transport.hpp"

namespace ng {

namespace collective {
class Place;
}

// How elements travel.
struct Wire {
  // With groups, and without a global scale, since elements are cut into chunks; nullopt: as they are, exactly.
  std::optional<Format> format{};
  // Each block of 64 elements is multiplied by a Hadamard matrix before it is quantised, and after it is decoded, which
  // spreads outliers over the block (a shorter last block by smaller matrices).
  bool hadamard = false;
  // Stochastic rounding: unbiased. Options' seed and the rank are the key, so that ranks round apart.
  bool stochastic = false;

  std::string str() const;
  friend bool operator==(const Wire&, const Wire&) = default;
};

// Fewer bytes of elements than this take longer to code, and as many messages, as they save on the wire.
inline constexpr int64_t kExactBelow = 1 << 20;

struct CollectiveOptions {
  Wire wire{};                           // between all ranks; with nodes, between those
  Wire inside{};                         // with nodes, within one
  int chunks = 8;                        // at most; on the wire while others are coded. 1: no overlap
  std::optional<int64_t> chunk_bytes{};  // of all ranks' elements, at least; nullopt: default_chunk_bytes()
  uint64_t seed = 0;                     // of stochastic rounding; a new one for every call
  // Tensors of fewer bytes travel as they are, whatever the wires say: see plan_collective(). 0: none do.
  int64_t exact_below = kExactBelow;
  // Where the transport carries memory of a GPU: what orders the collective's work there.
  std::optional<Stream> stream{};
};

enum class Reduction : uint8_t { sum, mean };

enum class CollectiveKind : uint8_t { all_gather, reduce_scatter, all_reduce };

// Messages have a price of their own (docs/collectives.md), and an all-to-all in one piece leaves links idle.
constexpr int64_t default_chunk_bytes(CollectiveKind kind) {
  return kind == CollectiveKind::reduce_scatter ? 2 << 20 : 4 << 20;
}

// How a collective is done.
struct CollectivePlan {
  CollectiveKind kind;
  int64_t numel = 0;
  DType dtype = DType::f32;
  int ranks = 1;
  Wire wire{};         // what the options say, or exact
  Wire inside{};       // likewise; where there is no such level, the same
  std::string reason;  // why so
  int chunks = 1;
  int64_t sent_bytes = 0;   // by rank 0 to all others; those of other ranks differ by the padding of their parts
  int64_t sent_across = 0;  // of these, to other nodes; 0 without nodes

  std::string str() const;  // a line for people
};

// numel: of the whole tensor: what all_gather gives, what the others take. A function of its arguments alone, so all
// ranks decide alike. Elements travel as they are, and results are exact, but for the rounding of sums, if
//   the options' wires say so; or
//   the tensor has fewer than options.exact_below bytes; or
//   there is one rank, unless exact_below is 0,
// and else in the Formats of the wires. (all_to_all, and all_gather of codes, always do as the wire says: the ranks of
// one have different numbers of elements, and the other's result is in a Format.) Throws InvalidArgument.
CollectivePlan plan_collective(CollectiveKind kind, int64_t numel, DType dtype, int ranks, int node_size,
                               const CollectiveOptions& options);

// A collective that was started; its tensors must stay until wait() has returned. Move-only. Ranks wait for those they
// have started in the same order.
class Pending {
 public:
  class Work;
  explicit Pending(std::unique_ptr<Work> work);
  Pending(Pending&&) noexcept;
  Pending& operator=(Pending&&) noexcept;
  ~Pending();  // gives up what was not waited for

  // Decodes what arrives; returns when the result is complete, on a GPU when all of that has been given to the stream.
  // Throws TransportError, Timeout. Later calls do nothing.
  void wait();

 private:
  std::unique_ptr<Work> work_;
};

// This rank's part of a tensor that was gathered, kept as it travelled, so that a node's ranks can have all of it again
// without the other nodes (hpZ; Wang et al. 2023, ZeRO++, section 3.2): numel / node_size elements in the wire's
// Format. Move-only, moved from only to be destroyed or assigned to; used by one thread at a time.
class SecondaryShard {
 public:
  // Memory comes from `pool`, of the kind that the transport carries; null: a HostPool of its own.
  explicit SecondaryShard(std::shared_ptr<Pool> pool = nullptr);
  SecondaryShard(SecondaryShard&&) noexcept = default;
  SecondaryShard& operator=(SecondaryShard&&) noexcept = default;

  bool is_filled() const noexcept { return is_filled_; }
  // Bytes held, filled or not.
  int64_t nbytes() const noexcept { return static_cast<int64_t>(bytes_.size()); }
  // The tensor has changed: the next all_gather fills it again, in the same memory. All ranks call it.
  void invalidate() noexcept { is_filled_ = false; }

 private:
  friend class Communicator;

  std::shared_ptr<Pool> pool_;
  SharedBytes bytes_;
  bool is_filled_ = false;
  std::string content_;
};

// The ranks that take part, and their nodes. Tensors are f32, f16 or bf16, dense, of any shape, in memory of the kind
// that the transport carries; results do not overlap inputs unless said. Used by one thread at a time. All ranks call
// the same collectives in the same order; the first call of a kind compares its description with the others': if they
// differ, all throw TransportError with both.
//
// On a GPU (transport_nccl.hpp) the results are the host's, bit for bit, but for which NaN a NaN is. Work is given to
// options.stream, in memory of default_device_pool(), and nothing waits for the GPU but the first call of a kind; the
// stream must not be captured. At most 64 ranks add up in one level. What ends badly there is thrown by the next call,
// and by Stream::synchronize() of the device.
class Communicator {
 public:
  // node_size: ranks [0, node_size) are the first node, and so on; 0: no nodes. Throws InvalidArgument unless it
  // divides the size. pool: host memory for what is on the wire, at most about twice what a collective sends and
  // receives; null: a HostPool of its own, which keeps what it has had.
  explicit Communicator(std::shared_ptr<Transport> transport, int node_size = 0,
                        Executor& executor = default_executor(), std::shared_ptr<Pool> pool = nullptr);

  int rank() const noexcept { return transport_->rank(); }
  int size() const noexcept { return transport_->size(); }
  int node_size() const noexcept { return node_size_; }
  const Transport& transport() const noexcept { return *transport_; }

  // What these ranks do with a tensor: see plan_collective.
  CollectivePlan plan(CollectiveKind kind, int64_t numel, DType dtype, const CollectiveOptions& options) const;

  // out: the shards of all ranks, in their order; numel = size x that of `shard`, which may be its own part of `out`.
  // All ranks decode the same bytes, a rank its own too.
  //
  // secondary: null, or, with nodes, what keeps this tensor: if it is filled, what it holds is gathered within the node
  // and `shard` is not read; else all is gathered and it is filled once wait() has returned. It must be filled on all
  // ranks or on none, and stay until wait() has returned. Throws InvalidArgument if it holds another kind of tensor.
  Pending all_gather(const TensorView& shard, const TensorView& out, const CollectiveOptions& options,
                     SecondaryShard* secondary = nullptr);

  // out: the shards' rows, in the order of the ranks, as they travelled: a matrix [size x rows, cols] in the wire's
  // Format, of which the arrays are as in quantize.hpp. shard: [.., cols]. Throws InvalidArgument unless rows are whole
  // groups and bytes, and for a wire with Hadamard.
  Pending all_gather(const TensorView& shard, const CanonicalView& out, const CollectiveOptions& options);

  // out: of the inputs' parts [rank], the sum or mean. input: size x numel of `out`.
  //
  // error: null, or f32 with the input's numel, this rank's own (error feedback; Seide et al. 2014): what rounding has
  // left of earlier inputs is added to this one, and what is left of that is kept, so that over steps nothing is lost.
  // It is of the first rounding; starts as 0, and elements that are not finite become 0.
  Pending reduce_scatter(const TensorView& input, const TensorView& out, Reduction reduction,
                         const CollectiveOptions& options, const TensorView* error = nullptr);

  // out: the sum or mean of the inputs, quantised once more on its way to all ranks; may be `input` itself. error: as
  // above.
  Pending all_reduce(const TensorView& input, const TensorView& out, Reduction reduction,
                     const CollectiveOptions& options, const TensorView* error = nullptr);

  // input: input_numels[0] elements for rank 0, then those for rank 1, and so on; out likewise. Never in two levels,
  // and always in options.chunks, since ranks have different numbers of elements.
  Pending all_to_all(const TensorView& input, std::span<const int64_t> input_numels, const TensorView& out,
                     std::span<const int64_t> out_numels, const CollectiveOptions& options);

 private:
  struct Setup;
  class Job;
  Pending start(const char* name, Setup setup);
  void agree(const std::string& description, Transport& transport, const collective::Place& place);
  CollectiveOptions planned(CollectiveKind kind, int64_t numel, DType dtype, const CollectiveOptions& options) const;
  std::shared_ptr<collective::Place> place_of(const CollectiveOptions& options) const;
  static std::shared_ptr<Transport> ordered(const std::shared_ptr<Transport>& transport,
                                            const CollectiveOptions& options);

  std::shared_ptr<Transport> transport_;
  std::shared_ptr<Transport> node_;    // the ranks of this node; null without nodes
  std::shared_ptr<Transport> across_;  // those of other nodes that have this one's place
  int node_size_;
  Executor* executor_;
  std::shared_ptr<Pool> pool_;
  std::set<std::string> agreed_;
};

}  // namespace ng
