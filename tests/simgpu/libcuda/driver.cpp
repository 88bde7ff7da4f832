// Initialisation, devices, contexts and the names of errors.
#include "driver.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "capture.hpp"
#include "entry.hpp"
#include "stream.hpp"

namespace ng::cuda {
namespace {

std::atomic<bool> forked{false};
std::atomic<const std::vector<std::unique_ptr<ContextOfDriver>>*> devices{nullptr};
// Static storage, here and elsewhere: LeakSanitizer may crash at that of libraries loaded at run time.
[[gnu::tls_model("initial-exec")]] thread_local std::vector<ContextOfDriver*> context_stack;
std::mutex context_mutex;  // of retain and release

void make_devices() {
  auto made = std::make_unique<std::vector<std::unique_ptr<ContextOfDriver>>>();
  for (int i = 0; i < settings().devices; ++i) made->push_back(std::make_unique<ContextOfDriver>(i));
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  devices = made.release();
}

struct Description {
  Result result;
  const char* name;
  const char* text;
};
constexpr Description kDescriptions[] = {
    {Result::success, "CUDA_SUCCESS", "no error"},
    {Result::invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {Result::out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {Result::not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {Result::no_device, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {Result::invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {Result::invalid_image, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {Result::invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {Result::no_binary_for_gpu, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for the device"},
    {Result::invalid_ptx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {Result::unsupported_ptx_version, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain"},
    {Result::invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kIllegalState, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {Result::not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {Result::not_ready, "CUDA_ERROR_NOT_READY", "device not ready"},
    {Result::illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {Result::launch_out_of_resources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {Result::launch_timeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {Result::misaligned_address, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {Result::launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {Result::not_permitted, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {Result::not_supported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {Result::stream_capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {Result::stream_capture_invalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {Result::stream_capture_merge, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {Result::stream_capture_unmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {Result::stream_capture_unjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {Result::stream_capture_isolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {kCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {Result::captured_event, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {kCaptureWrongThread, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {Result::unknown, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

Result describe(Result result, const char* Description::* member, const char** out) {
  if (out == nullptr) return Result::invalid_value;
  for (const Description& description : kDescriptions) {
    if (description.result == result) {
      *out = description.*member;
      return Result::success;
    }
  }
  *out = nullptr;
  return Result::invalid_value;
}

}  // namespace

[[gnu::tls_model("initial-exec")]] thread_local bool in_host_function = false;

bool initialised() { return devices.load() != nullptr && !forked.load(); }

ContextOfDriver& device(int ordinal) {
  const auto& all = *devices.load();
  require(ordinal >= 0 && static_cast<size_t>(ordinal) < all.size(), Result::invalid_device);
  return *all[static_cast<size_t>(ordinal)];
}

ContextOfDriver& current_context() {
  require(!context_stack.empty() && context_stack.back() != nullptr, Result::invalid_context);
  ContextOfDriver& context = *context_stack.back();
  require(context.retained.load() > 0, Result::invalid_context);
  return context;
}

int inherited_file(int file) {
  const int high = file < 0 ? file : fcntl(file, F_DUPFD_CLOEXEC, 128);
  if (file >= 0) close(file);
  return high;
}

// --- entry points ------------------------------------------------------------------------------------------------

Result cuInit(unsigned flags) {
  if (forked.load()) return Result::not_initialized;
  if (flags != 0) return Result::invalid_value;
  if (settings().devices <= 0) return Result::no_device;
  static std::once_flag once;
  try {
    device_attribute(DeviceAttribute::warp_size);  // fails if SIMGPU_CC is unknown
    std::call_once(once, make_devices);
  } catch (const Failure& failure) {
    return failure.result;
  }
  return Result::success;
}

Result cuDriverGetVersion(int* version) {
  if (version == nullptr) return Result::invalid_value;
  *version = settings().driver_version;
  return Result::success;
}

Result cuGetErrorName(Result result, const char** name) { return describe(result, &Description::name, name); }
Result cuGetErrorString(Result result, const char** text) { return describe(result, &Description::text, text); }

Result cuDeviceGetCount(int* count) {
  return entry([&] { *count = settings().devices; });
}

Result cuDeviceGet(DeviceId* id, int ordinal) {
  return entry([&] { *id = device(ordinal).ordinal; });
}

Result cuDeviceGetName(char* name, int size, DeviceId id) {
  return entry([&] {
    device(id);
    require(size > 0);
    const std::string text = "simulated GPU sm_" + std::to_string(settings().compute_capability);
    name[text.copy(name, static_cast<size_t>(size) - 1)] = '\0';
  });
}

Result cuDeviceGetAttribute(int* value, DeviceAttribute attribute, DeviceId id) {
  return entry([&] {
    device(id);
    *value = device_attribute(attribute);
    require(*value >= 0);
  });
}

Result cuDeviceTotalMem_v2(size_t* bytes, DeviceId id) {
  return entry([&] {
    device(id);
    *bytes = settings().memory;
  });
}

Result cuDevicePrimaryCtxRetain(Context* context, DeviceId id) {
  return entry([&] {
    *context = &device(id);
    const std::lock_guard lock(context_mutex);
    if ((*context)->retained.load() == 0) (*context)->legacy = create_stream(**context, StreamKind::legacy);
    (*context)->retained.fetch_add(1);
  });
}

// The last release ends the context, its error included: the next retain makes a new one.
Result cuDevicePrimaryCtxRelease_v2(DeviceId id) {
  return entry([&] {
    ContextOfDriver& context = device(id);
    const std::lock_guard lock(context_mutex);
    require(context.retained.load() > 0, Result::invalid_context);
    if (context.retained.load() == 1) {
      synchronize(context);
      close_stream(*context.legacy);
      context.legacy.reset();
      context.error = Result::success;
    }
    context.retained.fetch_sub(1);
  });
}

Result cuCtxGetCurrent(Context* context) {
  return entry([&] { *context = context_stack.empty() ? nullptr : context_stack.back(); });
}

Result cuCtxPushCurrent_v2(Context context) {
  return entry([&] {
    require(context != nullptr && context->retained.load() > 0, Result::invalid_context);
    context_stack.push_back(context);
  });
}

Result cuCtxPopCurrent_v2(Context* context) {
  return entry([&] {
    require(!context_stack.empty(), Result::invalid_context);
    if (context != nullptr) *context = context_stack.back();
    context_stack.pop_back();
  });
}

Result cuCtxSynchronize() {
  return entry_in_context([](ContextOfDriver& context) {
    forbid_while_capturing(context);
    synchronize(context);
    context.check();
  });
}

}  // namespace ng::cuda
