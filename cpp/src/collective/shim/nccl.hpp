// NCCL as this library uses it: our own declarations, and a table that is filled from libnccl.so.2 at run time. Layouts
// and values are those of NCCL 2.18 and later; a development test compares them with nccl.h where that is installed.
//
// The functions keep the library's symbol names, so that a call reads as its documentation does
// (docs.nvidia.com/deeplearning/nccl). What they mean to this library is cuda/driver/nccl.cpp's matter. The simulated
// libnccl.so.2 (tests/simnccl) implements exactly this list.
#pragma once

#include <climits>
#include <cstddef>
#include <string>

#include "core/shim/cuda.hpp"

namespace ng::nccl {

// --- types -------------------------------------------------------------------------------------------------------

enum class Result : int {
  success = 0,
  unhandled_cuda_error = 1,
  system_error = 2,
  internal_error = 3,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7,
};

enum class DataType : int { uint8 = 1 };

using Comm = struct CommOfNccl*;

struct UniqueId {
  char internal[128];
};

// Of 2.18: later ones have more members behind these, and take what is missing as not set.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 0;
  int cga_cluster_size = INT_MIN;  // not set, as those that follow
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

// --- the table -----------------------------------------------------------------------------------------------------

// F(result, name, parameters): every function of the library that is used.
#define NG_NCCL_FUNCTIONS(F)                                                                                           \
  F(Result, ncclGetVersion, (int* version))                                                                            \
  F(Result, ncclGetUniqueId, (UniqueId * id))                                                                          \
  F(const char*, ncclGetErrorString, (Result result))                                                                  \
  F(const char*, ncclGetLastError, (Comm comm))                                                                        \
  F(Result, ncclCommInitRankConfig, (Comm * comm, int size, UniqueId id, int rank, Config* config))                    \
  F(Result, ncclCommSplit, (Comm comm, int color, int key, Comm* part, Config* config))                                \
  F(Result, ncclCommFinalize, (Comm comm))                                                                             \
  F(Result, ncclCommDestroy, (Comm comm))                                                                              \
  F(Result, ncclCommAbort, (Comm comm))                                                                                \
  F(Result, ncclCommGetAsyncError, (Comm comm, Result * error))                                                        \
  F(Result, ncclCommCount, (Comm comm, int* count))                                                                    \
  F(Result, ncclCommCuDevice, (Comm comm, int* device))                                                                \
  F(Result, ncclCommUserRank, (Comm comm, int* rank))                                                                  \
  F(Result, ncclGroupStart, ())                                                                                        \
  F(Result, ncclGroupEnd, ())                                                                                          \
  F(Result, ncclSend, (const void* from, size_t count, DataType type, int peer, Comm comm, cuda::StreamHandle stream)) \
  F(Result, ncclRecv, (void* to, size_t count, DataType type, int peer, Comm comm, cuda::StreamHandle stream))         \
  F(Result, ncclAllGather,                                                                                             \
    (const void* from, void* to, size_t count, DataType type, Comm comm, cuda::StreamHandle stream))

struct Nccl {
#define NG_DECLARE(result, name, parameters) result(*name) parameters = nullptr;  // NOLINT(bugprone-macro-parentheses)
  NG_NCCL_FUNCTIONS(NG_DECLARE)
#undef NG_DECLARE
};

// The oldest NCCL that is used, which is the first with ncclCommSplit.
inline constexpr int kMinimumVersion = 21800;

// The table, filled on the first call; null if there is none, and then why_unavailable() says why. The copy that the
// process has loaded already is taken, such as torch's. Never throws; thread-safe. It stays loaded until the process
// ends.
const Nccl* library() noexcept;

// Why library() is null, in a sentence for users; empty if it is not.
const std::string& why_unavailable() noexcept;

}  // namespace ng::nccl
