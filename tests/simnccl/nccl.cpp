// The functions of NCCL: communicators, groups and what is checked in their calls.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <new>

#include "comm.hpp"

namespace ng::nccl {

#define NG_EXPORT(result, name, parameters) extern "C" __attribute__((visibility("default"))) result name parameters;
NG_NCCL_FUNCTIONS(NG_EXPORT)
#undef NG_EXPORT

namespace {

// What this thread has called since ncclGroupStart.
struct Group {
  int depth = 0;
  std::vector<Part> parts;
  Result error = Result::success;
};
thread_local Group group;

template <typename Body>
Result entry(Body&& body) noexcept {
  try {
    const std::lock_guard lock(state().mutex);
    return body();
  } catch (const Failure& failure) {
    return failure.result;
  } catch (const std::bad_alloc&) {
    return Result::system_error;
  } catch (...) {
    return Result::internal_error;
  }
}

CommOfNccl& known(Comm comm) {
  require(state().comms.contains(comm));
  return *comm;
}

// One that calls may be made on.
CommOfNccl& usable(Comm handle) {
  CommOfNccl& comm = known(handle);
  require(!comm.is_starting && !comm.is_ending && comm.called.empty() && comm.split == nullptr);
  require(comm.error == Result::success, comm.error);
  return comm;
}

bool is_blocking(const Config* config) {
  if (config == nullptr) return true;
  require(config->magic == 0xcafebeef && config->size >= offsetof(Config, blocking) + sizeof(int) &&
          config->version >= 21400);
  require(config->blocking == INT_MIN || config->blocking == 0 || config->blocking == 1);
  return config->blocking != 0;
}

// Waits, with the lock, as blocking communicators do.
template <typename Condition>
void wait(const Condition& condition) {
  std::unique_lock lock(state().mutex, std::adopt_lock);
  state().changed.wait(lock, condition);
  lock.release();
}

// A communicator of a clique.
Comm add(const std::shared_ptr<Clique>& clique, int rank, int device, bool blocking) {
  auto made = std::make_unique<CommOfNccl>();
  made->clique = clique;
  made->rank = rank;
  made->device = device;
  made->is_blocking = blocking;
  Comm comm = made.get();
  state().comms.emplace(comm, std::move(made));
  clique->comms[static_cast<size_t>(rank)] = comm;
  if (++clique->arrived == clique->size) {
    for (Comm each : clique->comms) each->is_starting = false;
  }
  state().changed.notify_all();
  return comm;
}

void remove(CommOfNccl& comm) {
  Clique& clique = *comm.clique;
  abandon(comm);
  clique.comms[static_cast<size_t>(comm.rank)] = nullptr;
  state().comms.erase(&comm);
  state().changed.notify_all();
}

// Memory of the communicator's device, all of it mapped.
void require_memory(const CommOfNccl& comm, const std::byte* data, size_t bytes) {
  const OnDevice driver(comm.device);
  const auto address = reinterpret_cast<cuda::DevicePtr>(data);
  int device = -1;
  cuda::MemoryType type{};
  for (const cuda::DevicePtr at : {address, address + bytes - 1}) {
    check(driver->cuPointerGetAttribute(&type, cuda::PointerAttribute::memory_type, at));
    check(driver->cuPointerGetAttribute(&device, cuda::PointerAttribute::device_ordinal, at));
    require(type == cuda::MemoryType::device && device == comm.device);
  }
}

// No part may write what another one reads or writes.
void require_apart(const std::vector<Part>& parts) {
  const auto overlap = [](const std::byte* a, size_t a_bytes, const std::byte* b, size_t b_bytes) {
    return a != nullptr && b != nullptr && a < b + b_bytes && b < a + a_bytes;
  };
  const auto written = [](const Part& part) {
    return part.bytes() * static_cast<size_t>(part.call == Call::all_gather ? part.comm->clique->size : 1);
  };
  for (const Part& a : parts) {
    for (const Part& b : parts) {
      const bool is_own =
          &a == &b && a.call == Call::all_gather && a.from == a.to + static_cast<size_t>(a.comm->rank) * a.bytes();
      require(is_own || !overlap(a.to, written(a), b.from, b.bytes()), Result::invalid_usage);
      require(&a == &b || !overlap(a.to, written(a), b.to, written(b)), Result::invalid_usage);
    }
  }
}

// Starts what a group has called, or lets communicators that do not block start it when they are asked how they are.
Result flush() {
  const std::vector<Part> parts = std::move(group.parts);
  const Result error = group.error;
  group = {};
  require(error == Result::success, error);
  Result result = Result::success;
  std::vector<Part> left = parts;
  while (!left.empty()) {
    CommOfNccl& comm = usable(left[0].comm);
    std::vector<Part> mine;
    for (const Part& part : left) {
      if (part.comm == &comm) mine.push_back(part);
    }
    std::erase_if(left, [&](const Part& part) { return part.comm == &comm; });
    for (const Part& part : mine) require(part.stream == mine[0].stream, Result::invalid_usage);
    require_apart(mine);
    if (comm.is_blocking) {
      launch(comm, std::move(mine));
    } else {
      comm.called = std::move(mine);
      result = Result::in_progress;
    }
  }
  return result;
}

Result call(Part part) {
  const Result result = entry([&] {
    CommOfNccl& comm = usable(part.comm);
    require(part.type >= 0 && part.type < 12);
    require(part.call == Call::all_gather || (part.peer >= 0 && part.peer < comm.clique->size));
    if (part.count == 0) return Result::success;
    const size_t ranks = part.call == Call::all_gather ? static_cast<size_t>(comm.clique->size) : 1;
    if (part.from != nullptr) require_memory(comm, part.from, part.bytes());
    if (part.to != nullptr) require_memory(comm, part.to, part.bytes() * ranks);
    require(part.call == Call::receive || part.from != nullptr);
    require(part.call == Call::send || part.to != nullptr);
    group.parts.push_back(part);
    return group.depth == 0 ? flush() : Result::success;
  });
  if (result != Result::success && result != Result::in_progress) {
    if (group.depth > 0)
      group.error = result;
    else
      group = {};
  }
  return result;
}

// SIMNCCL_LOSE=RANK:GROUP
void read_fault(Clique& clique) {
  const char* const text = std::getenv("SIMNCCL_LOSE");
  if (text == nullptr) return;
  char* end = nullptr;
  clique.lost_rank = static_cast<int>(std::strtol(text, &end, 10));
  clique.lost_at = *end == ':' ? std::strtol(end + 1, nullptr, 10) : 1;
}

// Makes the communicators of a split to which all ranks have come.
void finish(Clique& clique, Clique::Split& split, bool blocking) {
  split.parts.assign(static_cast<size_t>(clique.size), nullptr);
  std::map<int, std::vector<int>> by_color;
  for (int rank = 0; rank < clique.size; ++rank) {
    by_color[split.colors_and_keys[static_cast<size_t>(rank)].first].push_back(rank);
  }
  for (auto& [color, ranks] : by_color) {
    if (color < 0) continue;  // NCCL_SPLIT_NOCOLOR
    std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) {
      return split.colors_and_keys[static_cast<size_t>(a)].second <
             split.colors_and_keys[static_cast<size_t>(b)].second;
    });
    auto part = std::make_shared<Clique>();
    part->size = static_cast<int>(ranks.size());
    part->comms.resize(ranks.size());
    for (size_t i = 0; i < ranks.size(); ++i) {
      const Comm parent = clique.comms[static_cast<size_t>(ranks[i])];
      split.parts[static_cast<size_t>(ranks[i])] = add(part, static_cast<int>(i), parent->device, blocking);
    }
  }
}

// The result of a split that has come to its end, where it is expected.
void deliver(CommOfNccl& comm) {
  if (comm.split == nullptr || comm.split->parts.empty()) return;
  *comm.split_to = comm.split->parts[static_cast<size_t>(comm.rank)];
  comm.split.reset();
}

bool is_busy(const CommOfNccl& comm) {
  return std::any_of(comm.gates.begin(), comm.gates.end(), [](const auto& gate) { return !gate->is_open(); });
}

}  // namespace

State& state() {
  static State& instance = *new State;
  return instance;
}

void check(cuda::Result result) { require(result == cuda::Result::success, Result::unhandled_cuda_error); }

namespace {
std::vector<cuda::Context>& contexts() {
  static auto& made = *new std::vector<cuda::Context>([] {
    std::vector<cuda::Context> all;
    const cuda::Driver* const driver = cuda::driver();
    int count = 0;
    if (driver != nullptr) driver->cuDeviceGetCount(&count);
    all.resize(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) driver->cuDevicePrimaryCtxRetain(&all[static_cast<size_t>(i)], i);
    return all;
  }());
  return made;
}
}  // namespace

OnDevice::OnDevice(int device) : driver_(cuda::driver()) {
  require(driver_ != nullptr && device < static_cast<int>(contexts().size()), Result::unhandled_cuda_error);
  check(driver_->cuCtxPushCurrent_v2(contexts()[static_cast<size_t>(device)]));
}
OnDevice::~OnDevice() { driver_->cuCtxPopCurrent_v2(nullptr); }

int OnDevice::current() {
  require(cuda::driver() != nullptr, Result::unhandled_cuda_error);
  cuda::Context context = nullptr;
  check(cuda::driver()->cuCtxGetCurrent(&context));
  const auto found = std::find(contexts().begin(), contexts().end(), context);
  require(context != nullptr && found != contexts().end(), Result::unhandled_cuda_error);
  return static_cast<int>(found - contexts().begin());
}

// --- the library ---------------------------------------------------------------------------------------------------

Result ncclGetVersion(int* version) {
  *version = kMinimumVersion;
  return Result::success;
}

Result ncclGetUniqueId(UniqueId* id) {
  static std::atomic<unsigned> made{0};
  *id = {};
  std::snprintf(id->internal, sizeof id->internal, "simnccl %u", ++made);
  return Result::success;
}

const char* ncclGetErrorString(Result result) {
  constexpr const char* kTexts[] = {"no error",
                                    "unhandled cuda error",
                                    "unhandled system error",
                                    "internal error",
                                    "invalid argument",
                                    "invalid usage",
                                    "remote process exited or there was a network error",
                                    "NCCL operation in progress"};
  const auto index = static_cast<size_t>(result);
  return index < std::size(kTexts) ? kTexts[index] : "unknown result code";
}

const char* ncclGetLastError(Comm comm) {
  const std::lock_guard lock(state().mutex);
  return state().comms.contains(comm) ? comm->text.c_str() : "";
}

Result ncclCommInitRankConfig(Comm* comm, int size, UniqueId id, int rank, Config* config) {
  return entry([&] {
    require(comm != nullptr && size >= 1 && rank >= 0 && rank < size);
    const bool blocking = is_blocking(config);
    const int device = OnDevice::current();
    std::shared_ptr<Clique>& clique = state().cliques[std::string(id.internal, sizeof id.internal)];
    if (clique == nullptr) {
      clique = std::make_shared<Clique>();
      clique->size = size;
      clique->comms.resize(static_cast<size_t>(size));
      read_fault(*clique);
    }
    require(clique->size == size && clique->comms[static_cast<size_t>(rank)] == nullptr && clique->arrived < size);
    for (Comm other : clique->comms) require(other == nullptr || other->device != device, Result::invalid_usage);
    *comm = add(clique, rank, device, blocking);
    if (!blocking) return Result::in_progress;
    wait([&] { return !(*comm)->is_starting; });
    return Result::success;
  });
}

Result ncclCommSplit(Comm handle, int color, int key, Comm* part, Config* config) {
  return entry([&] {
    CommOfNccl& comm = usable(handle);
    const bool blocking = is_blocking(config);
    Clique& clique = *comm.clique;
    const int64_t number = comm.splits++;
    std::shared_ptr<Clique::Split>& entry = clique.splits[number];
    if (entry == nullptr) entry = std::make_shared<Clique::Split>();
    const std::shared_ptr<Clique::Split> split = entry;
    split->colors_and_keys.resize(static_cast<size_t>(clique.size));
    split->colors_and_keys[static_cast<size_t>(comm.rank)] = {color, key};
    comm.split = split;
    comm.split_to = part;
    if (++split->arrived == clique.size) {
      clique.splits.erase(number);
      finish(clique, *split, blocking);
    }
    if (!comm.is_blocking) return Result::in_progress;
    wait([&] { return !split->parts.empty(); });
    deliver(comm);
    return Result::success;
  });
}

Result ncclCommFinalize(Comm handle) {
  return entry([&] {
    CommOfNccl& comm = usable(handle);
    comm.is_ending = true;
    if (!comm.is_blocking) return Result::in_progress;
    wait([&] { return !is_busy(comm); });
    return Result::success;
  });
}

Result ncclCommDestroy(Comm handle) {
  return entry([&] {
    CommOfNccl& comm = known(handle);
    wait([&] { return !is_busy(comm); });
    remove(comm);
    return Result::success;
  });
}

Result ncclCommAbort(Comm handle) {
  return entry([&] {
    remove(known(handle));
    return Result::success;
  });
}

// Asking is what makes communicators that do not block go on, so that a caller who does not ask gets nowhere.
Result ncclCommGetAsyncError(Comm handle, Result* error) {
  return entry([&] {
    CommOfNccl& comm = known(handle);
    *error = comm.error;
    if (comm.error != Result::success) return Result::success;
    if (!comm.called.empty()) {
      *error = Result::in_progress;
      launch(comm, std::move(comm.called));
      comm.called.clear();
    } else if (comm.split != nullptr) {
      *error = Result::in_progress;
      deliver(comm);
    } else if (comm.is_starting || (comm.is_ending && is_busy(comm))) {
      *error = Result::in_progress;
    }
    return Result::success;
  });
}

Result ncclCommCount(Comm comm, int* count) {
  return entry([&] {
    *count = known(comm).clique->size;
    return Result::success;
  });
}

Result ncclCommCuDevice(Comm comm, int* device) {
  return entry([&] {
    *device = known(comm).device;
    return Result::success;
  });
}

Result ncclCommUserRank(Comm comm, int* rank) {
  return entry([&] {
    *rank = known(comm).rank;
    return Result::success;
  });
}

Result ncclGroupStart() {
  ++group.depth;
  return Result::success;
}

Result ncclGroupEnd() {
  if (group.depth == 0) return Result::invalid_usage;
  if (--group.depth > 0) return Result::success;
  return entry([] { return flush(); });
}

Result ncclSend(const void* from, size_t count, DataType type, int peer, Comm comm, cuda::StreamHandle stream) {
  return call(
      {Call::send, static_cast<const std::byte*>(from), nullptr, count, static_cast<int>(type), peer, comm, stream});
}

Result ncclRecv(void* to, size_t count, DataType type, int peer, Comm comm, cuda::StreamHandle stream) {
  return call({Call::receive, nullptr, static_cast<std::byte*>(to), count, static_cast<int>(type), peer, comm, stream});
}

Result ncclAllGather(const void* from, void* to, size_t count, DataType type, Comm comm, cuda::StreamHandle stream) {
  return call({Call::all_gather, static_cast<const std::byte*>(from), static_cast<std::byte*>(to), count,
               static_cast<int>(type), -1, comm, stream});
}

}  // namespace ng::nccl
