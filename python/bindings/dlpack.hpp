// DLPack 1.x as this module uses it: our own declarations of the binary interface that frameworks share
// (github.com/dmlc/dlpack, dlpack.h). Only layouts; a struct is never changed within major version 1, minor
// versions add type and device codes.
//
// A framework hands over its C exchange table as the attribute `__dlpack_c_exchange_api__` of its tensor type: a
// capsule named "dlpack_exchange_api" that holds an ExchangeApi, alive as long as the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ng::dlpack {

inline constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Shape and strides count elements. `strides` may be null before version 1.2: row-major then.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// What producers before version 1 hand over, in a capsule named "dltensor".
struct LegacyManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(LegacyManagedTensor* self);
};

enum Flag : uint64_t { kReadOnly = 1, kIsCopied = 2 };

// In a capsule named "dltensor_versioned".
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

// Every function returns 0, or -1 with a Python error set (allocate: with `set_error` called). The GIL must be held.
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** out_object);
  // Fills a view that lives as long as the object and its storage; null where a framework does not offer it.
  int (*view_from_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

static_assert(sizeof(Tensor) == 48 && sizeof(LegacyManagedTensor) == 64 && sizeof(ManagedTensor) == 80 &&
              sizeof(ExchangeApi) == 56);

}  // namespace ng::dlpack
