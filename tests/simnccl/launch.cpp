// Groups on their way: finding counterparts, carrying bytes, and what does not fit together.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "comm.hpp"

namespace ng::nccl {
namespace {

std::string describe(const Part& part) {
  const char* const names[] = {"ncclSend", "ncclRecv", "ncclAllGather"};
  return std::string(names[static_cast<size_t>(part.call)]) + " of " + std::to_string(part.count) + " of type " +
         std::to_string(part.type) + " on rank " + std::to_string(part.comm->rank);
}

// Both stall, and have an error.
void disagree(const Part& a, const Part& b) {
  const std::string text = describe(a) + " does not fit " + describe(b);
  for (const Part& part : {a, b}) {
    quarrel(*part.comm, Result::invalid_usage, text);
    part.comm->stalled.push_back(part);
  }
}

void wait_at(void* context) {
  const std::unique_ptr<std::shared_ptr<Gate>> gate(static_cast<std::shared_ptr<Gate>*>(context));
  std::unique_lock lock(state().mutex);
  state().changed.wait(lock, [&] { return (*gate)->is_open(); });
}

using Gates = std::vector<std::shared_ptr<Gate>>;
void open(void* context) {
  const std::unique_ptr<Gates> gates(static_cast<Gates*>(context));
  const std::lock_guard lock(state().mutex);
  for (const auto& gate : *gates) --gate->closed_parts;
  state().changed.notify_all();
}

void abort_gates(void* context) {
  const std::unique_ptr<Gates> gates(static_cast<Gates*>(context));
  const std::lock_guard lock(state().mutex);
  for (const auto& gate : *gates) gate->is_aborted = true;
  state().changed.notify_all();
}

// Copies on a stream of the receiver's device, behind all the parts; then lets their streams go on. One stream for
// several would put parts in an order that they do not have.
struct Copy {
  const std::byte* from;
  std::byte* to;
  size_t bytes;
};
void carry(CommOfNccl& receiver, const std::vector<Part>& parts, const std::vector<Copy>& copies, Gates gates) {
  const OnDevice driver(receiver.device);
  cuda::StreamHandle courier = nullptr;
  check(driver->cuStreamCreate(&courier, cuda::kStreamNonBlocking));
  for (const Part& part : parts) check(driver->cuStreamWaitEvent(courier, part.ready.get(), 0));
  for (const Copy& copy : copies) {
    check(driver->cuMemcpyAsync(reinterpret_cast<cuda::DevicePtr>(copy.to),
                                reinterpret_cast<cuda::DevicePtr>(copy.from), copy.bytes, courier));
  }
  check(driver->cuLaunchHostFunc(courier, open, new Gates(std::move(gates))));
  check(driver->cuStreamDestroy_v2(courier));  // when it is done
}

void pair(const Part& sent, const Part& received) {
  if (sent.count != received.count || sent.type != received.type) return disagree(sent, received);
  carry(*received.comm, {sent, received}, {{sent.from, received.to, sent.bytes()}}, {sent.gate, received.gate});
}

void gather(const std::vector<Part>& parts) {
  for (const Part& part : parts) {
    if (part.count == parts[0].count && part.type == parts[0].type) continue;
    for (const Part& each : parts) each.comm->stalled.push_back(each);
    return disagree(parts[0], part);
  }
  for (const Part& receiver : parts) {
    std::vector<Copy> copies;
    for (const Part& sender : parts) {
      std::byte* const to = receiver.to + static_cast<size_t>(sender.comm->rank) * sender.bytes();
      if (to != sender.from) copies.push_back({sender.from, to, sender.bytes()});
    }
    // A rank goes on when it has all and all have its own: each of the size copies opens one part of every gate.
    Gates gates;
    for (const Part& part : parts) gates.push_back(part.gate);
    carry(*receiver.comm, parts, copies, std::move(gates));
  }
}

void meet(Part part) {
  Clique& clique = *part.comm->clique;
  if (part.call == Call::all_gather) {
    std::vector<Part>& parts = clique.gathers[part.comm->gathers];
    parts.push_back(std::move(part));
    if (static_cast<int>(parts.size()) < clique.size) return;
    const std::vector<Part> all = std::move(parts);
    clique.gathers.erase(all[0].comm->gathers);
    return gather(all);
  }
  const bool is_send = part.call == Call::send;
  const int rank = part.comm->rank;
  const auto pair_of_ranks = is_send ? std::pair(rank, part.peer) : std::pair(part.peer, rank);
  auto& others = (is_send ? clique.receives : clique.sends)[pair_of_ranks];
  if (others.empty()) {
    (is_send ? clique.sends : clique.receives)[pair_of_ranks].push_back(std::move(part));
    return;
  }
  const Part other = std::move(others.front());
  others.pop_front();
  is_send ? pair(part, other) : pair(other, part);
}

}  // namespace

size_t Part::bytes() const {
  constexpr size_t kSizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of ncclDataType_t
  return count * kSizes[type];
}

void quarrel(CommOfNccl& comm, Result result, const std::string& text) {
  if (comm.error != Result::success) return;
  std::fprintf(stderr, "simnccl: %s\n", text.c_str());
  comm.error = result;
  comm.text = text;
  state().changed.notify_all();
}

void launch(CommOfNccl& comm, std::vector<Part> parts) {
  Clique& clique = *comm.clique;
  if (parts.empty()) return;
  ++comm.groups;
  std::erase_if(comm.gates, [](const auto& gate) { return gate->is_open(); });
  auto gate = std::make_shared<Gate>();
  // An all-gather has a part for every rank's copies.
  for (const Part& part : parts) gate->closed_parts += part.call == Call::all_gather ? clique.size : 1;
  comm.gates.push_back(gate);
  const OnDevice driver(comm.device);
  cuda::EventHandle event = nullptr;
  check(driver->cuEventCreate(&event, cuda::kEventDisableTiming));
  const std::shared_ptr<cuda::EventOfDriver> ready(event,
                                                   [](cuda::EventHandle e) { cuda::driver()->cuEventDestroy_v2(e); });
  check(driver->cuEventRecord(event, parts[0].stream));
  check(driver->cuLaunchHostFunc(parts[0].stream, wait_at, new std::shared_ptr<Gate>(gate)));
  if (clique.lost_rank == comm.rank && clique.lost_at == comm.groups) {
    for (Comm other : clique.comms) {
      if (other != nullptr) quarrel(*other, Result::remote_error, "rank " + std::to_string(comm.rank) + " is lost");
    }
    comm.stalled.insert(comm.stalled.end(), parts.begin(), parts.end());
    return;
  }
  for (Part& part : parts) {
    part.gate = gate;
    part.ready = ready;
    meet(part);
    if (part.call == Call::all_gather) ++comm.gathers;
  }
}

void abandon(CommOfNccl& comm) {
  Clique& clique = *comm.clique;
  std::vector<Part> parts = std::move(comm.stalled);
  const auto take = [&](auto& from) {
    for (const Part& part : from) {
      if (part.comm == &comm) parts.push_back(part);
    }
    std::erase_if(from, [&](const Part& part) { return part.comm == &comm; });
  };
  for (auto* queues : {&clique.sends, &clique.receives}) {
    for (auto& [ranks, queue] : *queues) take(queue);
  }
  for (auto& [number, gathered] : clique.gathers) take(gathered);
  const OnDevice driver(comm.device);
  cuda::StreamHandle stream = nullptr;
  check(driver->cuStreamCreate(&stream, cuda::kStreamNonBlocking));
  for (const Part& part : parts) {
    if (part.to == nullptr) continue;
    const size_t ranks = part.call == Call::all_gather ? static_cast<size_t>(clique.size) : 1;
    check(driver->cuMemsetD8Async(reinterpret_cast<cuda::DevicePtr>(part.to), 0xff, part.bytes() * ranks, stream));
  }
  check(driver->cuLaunchHostFunc(stream, abort_gates, new Gates(comm.gates)));
  driver->cuStreamDestroy_v2(stream);
}

}  // namespace ng::nccl
