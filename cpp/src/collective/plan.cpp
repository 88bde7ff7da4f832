// What a collective does with a tensor, decided before any rank is asked.
#include "collective/layout.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using collective::Layout;
using collective::wire_bytes;

const char* name_of(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::all_gather: return "all_gather";
    case CollectiveKind::reduce_scatter: return "reduce_scatter";
    case CollectiveKind::all_reduce: return "all_reduce";
  }
  return "";
}

// What rank 0 sends: to ranks of its node (or to all, without nodes), and to other nodes.
struct Sent {
  int64_t near = 0;
  int64_t across = 0;
};

Sent scattered(const CollectivePlan& plan, const Layout& layout, int node_size) {
  Sent sent;
  for (int chunk = 0; chunk < layout.chunks; ++chunk) {
    for (int peer = 0; peer < plan.ranks; ++peer) {
      const int64_t n = layout.chunk(peer, chunk).n;
      if (node_size == 0) {
        sent.near += peer == 0 ? 0 : wire_bytes(plan.wire, plan.dtype, n);
      } else {  // parts of a place of any node go to that place of this one, and sums of place 0 to their nodes
        const bool is_mine = peer % node_size == 0;
        sent.near += is_mine ? 0 : wire_bytes(plan.inside, plan.dtype, n);
        sent.across += is_mine && peer != 0 ? wire_bytes(plan.wire, DType::f32, n) : 0;
      }
    }
  }
  return sent;
}

Sent gathered(const CollectivePlan& plan, const Layout& layout, int node_size) {
  Sent sent;
  const bool is_sum = plan.kind == CollectiveKind::all_reduce && plan.wire.format.has_value();
  for (int chunk = 0; chunk < layout.chunks; ++chunk) {
    const int64_t bytes = wire_bytes(plan.wire, is_sum ? DType::f32 : plan.dtype, layout.longest(chunk));
    if (node_size == 0) {
      sent.near += bytes * (plan.ranks - 1);
    } else {
      const int nodes = plan.ranks / node_size;
      sent.across += bytes * (nodes - 1);
      sent.near += bytes * nodes * (node_size - 1);
    }
  }
  return sent;
}

}  // namespace

void collective::check_options(const CollectiveOptions& options) {
  check_wire(options.wire);
  check_wire(options.inside);
  NG_CHECK(options.chunks >= 1, InvalidArgument, options.chunks, " chunks; expected at least 1");
  if (options.chunk_bytes) {
    NG_CHECK(*options.chunk_bytes >= 1, InvalidArgument, "chunks of ", *options.chunk_bytes,
             " bytes; expected at least 1");
  }
  NG_CHECK(options.exact_below >= 0, InvalidArgument, "exact_below is ", options.exact_below,
           "; expected bytes, or 0 for never");
}

std::string CollectivePlan::str() const {
  std::string bytes = concat(sent_bytes, " bytes");
  if (sent_across != 0) bytes += concat(", ", sent_across, " of them to other nodes");
  const std::string level = inside == wire ? "" : concat(" between nodes, ", inside.str(), " inside");
  return concat(name_of(kind), " of ", numel, ' ', dtype_name(dtype), " on ", ranks, " ranks: ", wire.str(), level,
                ", since ", reason, "; in ", chunks, chunks == 1 ? " chunk" : " chunks", ", a rank sends ", bytes);
}

CollectivePlan plan_collective(CollectiveKind kind, int64_t numel, DType dtype, int ranks, int node_size,
                               const CollectiveOptions& options) {
  collective::check_options(options);
  NG_CHECK(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, InvalidArgument, "a plan for ",
           dtype_name(dtype), "; expected float32, float16 or bfloat16");
  constexpr int64_t kMost = int64_t{1} << 48;  // of which bytes can still be counted
  NG_CHECK(ranks >= 1 && numel >= 0 && numel <= kMost, InvalidArgument, "a plan for ", numel, " elements of ", ranks,
           " ranks; expected 0 to ", kMost, " of at least 1");
  NG_CHECK(node_size >= 0 && (node_size == 0 || ranks % node_size == 0), InvalidArgument, "nodes of ", node_size,
           " ranks; expected a divisor of the ", ranks, " that there are, or 0");
  NG_CHECK(kind == CollectiveKind::all_reduce || numel % ranks == 0, InvalidArgument, name_of(kind), " of ", numel,
           " elements; expected a multiple of the ", ranks, " ranks");
  if (node_size <= 1 || node_size == ranks) node_size = 0;
  const bool has_inside = node_size != 0 && kind != CollectiveKind::all_gather;
  CollectivePlan plan{.kind = kind, .numel = numel, .dtype = dtype, .ranks = ranks, .reason = {}};
  const int64_t bytes = numel * static_cast<int64_t>(dtype_bytes(dtype));
  if (!options.wire.format && !(has_inside && options.inside.format)) {
    plan.reason = "that was asked for";
  } else if (ranks == 1 && options.exact_below != 0) {
    plan.reason = "there is one rank";
  } else if (bytes < options.exact_below) {
    plan.reason = concat(bytes, " bytes are fewer than ", options.exact_below, " (exact_below)");
  } else {
    plan.wire = options.wire;
    plan.inside = has_inside ? options.inside : options.wire;
    plan.reason = concat(bytes, " bytes are not fewer than ", options.exact_below, " (exact_below)");
  }
  CollectiveOptions used = options;
  used.wire = plan.wire, used.inside = plan.inside;
  const Layout layout = kind == CollectiveKind::all_reduce
                            ? collective::nearly_equal_parts(numel, ranks, dtype, used)
                            : collective::equal_parts(kind, numel / ranks, ranks, dtype, used);
  plan.chunks = layout.chunks;
  for (const bool gathers : {false, true}) {
    if (kind == (gathers ? CollectiveKind::reduce_scatter : CollectiveKind::all_gather)) continue;
    const Sent sent = gathers ? gathered(plan, layout, node_size) : scattered(plan, layout, node_size);
    plan.sent_bytes += sent.near + sent.across;
    plan.sent_across += sent.across;
  }
  return plan;
}

}  // namespace ng
