// The CUDA driver API as this library uses it: our own declarations, and a table that is filled from libcuda.so.1 at
// run time. Layouts and values are those of CUDA 12.0 and later; a development test compares them with the toolkit's
// cuda.h.
//
// The functions keep the driver's symbol names, version suffix included, so that a call reads as its documentation does
// (docs.nvidia.com/cuda/cuda-driver-api). Only they and their types are here: what they mean to this library is
// cuda/driver's matter. The simulated device's libcuda.so.1 implements exactly this list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ng::cuda {

// --- types -------------------------------------------------------------------------------------------------------

// Codes without a name here exist too: cuGetErrorName tells.
enum class Result : int {
  success = 0,
  invalid_value = 1,
  out_of_memory = 2,
  not_initialized = 3,
  deinitialized = 4,
  stub_library = 34,
  no_device = 100,
  invalid_device = 101,
  invalid_image = 200,
  invalid_context = 201,
  no_binary_for_gpu = 209,
  invalid_ptx = 218,
  unsupported_ptx_version = 222,
  invalid_handle = 400,
  not_found = 500,
  not_ready = 600,
  illegal_address = 700,
  launch_out_of_resources = 701,
  launch_timeout = 702,
  misaligned_address = 716,
  launch_failed = 719,
  not_permitted = 800,
  not_supported = 801,
  system_not_ready = 802,
  stream_capture_unsupported = 900,
  stream_capture_invalidated = 901,
  stream_capture_merge = 902,
  stream_capture_unmatched = 903,
  stream_capture_unjoined = 904,
  stream_capture_isolation = 905,
  captured_event = 907,
  unknown = 999,
};

using DevicePtr = uint64_t;  // an address on a device
using DeviceId = int;

// Handles are pointers to what only the driver knows.
using Context = struct ContextOfDriver*;
using StreamHandle = struct StreamOfDriver*;  // null: the default stream
using EventHandle = struct EventOfDriver*;
using Module = struct ModuleOfDriver*;
using Function = struct FunctionOfDriver*;
using Graph = struct GraphOfDriver*;
using GraphExec = struct GraphExecOfDriver*;
using MemoryHandle = uint64_t;  // physical memory, which cuMemMap gives an address

enum class DeviceAttribute : int {
  warp_size = 10,
  max_registers_per_block = 12,
  clock_rate_khz = 13,
  multiprocessor_count = 16,
  memory_clock_rate_khz = 36,
  memory_bus_width_bits = 37,
  l2_cache_bytes = 38,
  max_threads_per_multiprocessor = 39,
  unified_addressing = 41,
  compute_capability_major = 75,
  compute_capability_minor = 76,
  max_shared_bytes_per_multiprocessor = 81,
  max_shared_bytes_per_block_optin = 97,
  virtual_memory_management = 102,
};

enum class PointerAttribute : int {
  context = 1,
  memory_type = 2,
  device_ordinal = 9,
  range_begin = 11,
  range_bytes = 12
};
enum class MemoryType : unsigned { host = 1, device = 2, array = 3, unified = 4 };
enum class FunctionAttribute : int {
  max_threads_per_block = 0,
  shared_bytes = 1,
  const_bytes = 2,
  local_bytes = 3,
  registers = 4,
  ptx_version = 5,
  binary_version = 6,
  max_dynamic_shared_bytes = 8,
};
enum class JitOption : int { info_log = 3, info_log_bytes = 4, error_log = 5, error_log_bytes = 6 };
enum class CaptureMode : int { global = 0, thread_local_ = 1, relaxed = 2 };
enum class CaptureStatus : int { none = 0, active = 1, invalidated = 2 };

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostAllocPortable = 1;

// cuMemCreate, cuMemSetAccess and cuMemGetAllocationGranularity.
struct MemoryLocation {
  int type;  // 1: a device
  int id;
};
struct AllocationProperties {
  int type;                    // 1: pinned
  int requested_handle_types;  // 0: none
  MemoryLocation location;
  void* win32_handle_metadata;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
struct AccessDescriptor {
  MemoryLocation location;
  int flags;  // 3: read and write
};
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kGranularityRecommended = 1;

// --- the table -----------------------------------------------------------------------------------------------------

// F(name, parameters): every function of the driver that is used.
#define NG_CUDA_FUNCTIONS(F)                                                                                        \
  F(cuInit, (unsigned flags))                                                                                       \
  F(cuDriverGetVersion, (int* version))                                                                             \
  F(cuGetErrorName, (Result result, const char** name))                                                             \
  F(cuGetErrorString, (Result result, const char** text))                                                           \
  F(cuDeviceGetCount, (int* count))                                                                                 \
  F(cuDeviceGet, (DeviceId * device, int ordinal))                                                                  \
  F(cuDeviceGetName, (char* name, int size, DeviceId device))                                                       \
  F(cuDeviceGetAttribute, (int* value, DeviceAttribute attribute, DeviceId device))                                 \
  F(cuDeviceTotalMem_v2, (size_t* bytes, DeviceId device))                                                          \
  F(cuDevicePrimaryCtxRetain, (Context * context, DeviceId device))                                                 \
  F(cuDevicePrimaryCtxRelease_v2, (DeviceId device))                                                                \
  F(cuCtxGetCurrent, (Context * context))                                                                           \
  F(cuCtxPushCurrent_v2, (Context context))                                                                         \
  F(cuCtxPopCurrent_v2, (Context * context))                                                                        \
  F(cuCtxSynchronize, ())                                                                                           \
  F(cuMemGetInfo_v2, (size_t* free, size_t* total))                                                                 \
  F(cuMemHostAlloc, (void** pointer, size_t bytes, unsigned flags))                                                 \
  F(cuMemFreeHost, (void* pointer))                                                                                 \
  F(cuMemcpyAsync, (DevicePtr to, DevicePtr from, size_t bytes, StreamHandle stream))                               \
  F(cuMemcpyHtoDAsync_v2, (DevicePtr to, const void* from, size_t bytes, StreamHandle stream))                      \
  F(cuMemcpyDtoHAsync_v2, (void* to, DevicePtr from, size_t bytes, StreamHandle stream))                            \
  F(cuMemsetD8Async, (DevicePtr to, unsigned char value, size_t count, StreamHandle stream))                        \
  F(cuPointerGetAttribute, (void* value, PointerAttribute attribute, DevicePtr pointer))                            \
  F(cuMemAddressReserve, (DevicePtr * pointer, size_t bytes, size_t alignment, DevicePtr hint, unsigned long long)) \
  F(cuMemAddressFree, (DevicePtr pointer, size_t bytes))                                                            \
  F(cuMemCreate, (MemoryHandle * handle, size_t bytes, const AllocationProperties* properties, unsigned long long)) \
  F(cuMemRelease, (MemoryHandle handle))                                                                            \
  F(cuMemMap, (DevicePtr pointer, size_t bytes, size_t offset, MemoryHandle handle, unsigned long long flags))      \
  F(cuMemUnmap, (DevicePtr pointer, size_t bytes))                                                                  \
  F(cuMemSetAccess, (DevicePtr pointer, size_t bytes, const AccessDescriptor* descriptors, size_t count))           \
  F(cuMemGetAllocationGranularity, (size_t* bytes, const AllocationProperties* properties, int option))             \
  F(cuStreamCreate, (StreamHandle * stream, unsigned flags))                                                        \
  F(cuStreamDestroy_v2, (StreamHandle stream))                                                                      \
  F(cuStreamSynchronize, (StreamHandle stream))                                                                     \
  F(cuStreamQuery, (StreamHandle stream))                                                                           \
  F(cuStreamGetId, (StreamHandle stream, unsigned long long* id))                                                   \
  F(cuStreamWaitEvent, (StreamHandle stream, EventHandle event, unsigned flags))                                    \
  F(cuStreamIsCapturing, (StreamHandle stream, CaptureStatus * status))                                             \
  F(cuStreamBeginCapture_v2, (StreamHandle stream, CaptureMode mode))                                               \
  F(cuStreamEndCapture, (StreamHandle stream, Graph * graph))                                                       \
  F(cuThreadExchangeStreamCaptureMode, (CaptureMode * mode))                                                        \
  F(cuEventCreate, (EventHandle * event, unsigned flags))                                                           \
  F(cuEventDestroy_v2, (EventHandle event))                                                                         \
  F(cuEventRecord, (EventHandle event, StreamHandle stream))                                                        \
  F(cuEventSynchronize, (EventHandle event))                                                                        \
  F(cuEventQuery, (EventHandle event))                                                                              \
  F(cuModuleLoadDataEx, (Module * module, const void* image, unsigned count, JitOption* options, void** values))    \
  F(cuModuleUnload, (Module module))                                                                                \
  F(cuModuleGetFunction, (Function * function, Module module, const char* name))                                    \
  F(cuModuleGetGlobal_v2, (DevicePtr * pointer, size_t* bytes, Module module, const char* name))                    \
  F(cuFuncGetAttribute, (int* value, FunctionAttribute attribute, Function function))                               \
  F(cuFuncSetAttribute, (Function function, FunctionAttribute attribute, int value))                                \
  F(cuLaunchKernel,                                                                                                 \
    (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,      \
     unsigned block_z, unsigned shared_bytes, StreamHandle stream, void** parameters, void** extra))                \
  F(cuLaunchHostFunc, (StreamHandle stream, void (*function)(void*), void* context))                                \
  F(cuGraphInstantiateWithFlags, (GraphExec * executable, Graph graph, unsigned long long flags))                   \
  F(cuGraphLaunch, (GraphExec executable, StreamHandle stream))                                                     \
  F(cuGraphExecDestroy, (GraphExec executable))                                                                     \
  F(cuGraphDestroy, (Graph graph))

struct Driver {
#define NG_DECLARE(name, parameters) Result(*name) parameters = nullptr;  // NOLINT(bugprone-macro-parentheses)
  NG_CUDA_FUNCTIONS(NG_DECLARE)
#undef NG_DECLARE
};

// The oldest driver that is used: CUDA 12.0.
inline constexpr int kMinimumDriverVersion = 12000;

// The table, filled and initialised on the first call; null if there is none, and then `why_unavailable()` says why.
// Never throws; thread-safe. The library stays loaded until the process ends.
const Driver* driver() noexcept;

// Why driver() is null, in a sentence for users; empty if it is not.
const std::string& why_unavailable() noexcept;

// The process that filled the table: the driver does not work in children forked from it.
int driver_process() noexcept;

}  // namespace ng::cuda
