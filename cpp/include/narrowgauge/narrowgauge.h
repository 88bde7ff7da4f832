/* The C interface: narrow matrices behind opaque handles, for other languages and engines; on a GPU plain addresses.
 *
 * It offers what quantize.hpp and linear.hpp do, in the same words. It is part of the static library; C programs
 * link the C++ runtime too (CMake and pkg-config see to it).
 *
 * Errors: every function that can fail returns a status, or null where it returns a pointer; ng_last_error() then
 * says what was wrong. Outputs are written on success only. Nothing is thrown.
 * Ownership: the caller owns arrays, which are only borrowed during a call, and handles, which ng_qtensor_free()
 * ends. Strings that are returned belong to the library or to the handle.
 * Threads: any function may be called from any thread. A handle may be read by several threads at once;
 * ng_pack(), ng_unpack() and ng_qtensor_free() want it for themselves.
 */
#ifndef NARROWGAUGE_NARROWGAUGE_H
#define NARROWGAUGE_NARROWGAUGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ng_status {
  NG_OK = 0,
  NG_INVALID_ARGUMENT = 1, /* wrong shape, dtype, value or name */
  NG_OUT_OF_MEMORY = 2,
  NG_SYSTEM_ERROR = 3, /* the operating system refused */
  NG_FILE_CORRUPT = 4, /* a file is not what it claims to be */
  NG_INTERNAL = 5,     /* anything else: please report it */
  NG_CUDA_ERROR = 6    /* there is no GPU, or the driver or a kernel failed */
} ng_status;

typedef enum ng_dtype { NG_F32 = 0, NG_F16 = 1, NG_BF16 = 2 } ng_dtype;

/* A borrowed array in host memory. Shape and strides count elements; null strides mean dense row-major. */
typedef struct ng_tensor {
  void* data;
  int32_t dtype; /* ng_dtype */
  int32_t ndim;  /* 1 .. 8 */
  const int64_t* shape;
  const int64_t* strides;
} ng_tensor;

/* A matrix in a narrow format that owns its weights once: canonical, or packed for this CPU. */
typedef struct ng_qtensor ng_qtensor;

/* What becomes of NaN and Inf in the input (NanPolicy of quantize.hpp). */
typedef enum ng_nan_policy { NG_NAN_ERROR = 0, NG_NAN_SATURATE = 1, NG_NAN_KEEP = 2 } ng_nan_policy;

/* Zero-initialised, these are the defaults. Each is documented in quantize.hpp (QuantizeOptions). */
typedef struct ng_quantize_options {
  int32_t search_mse; /* scale: least squared error over a small grid, instead of amax / largest code value */
  ng_nan_policy nan;
  int32_t full_range;
  int32_t e8m0_ceil;
  int32_t stochastic;
  uint64_t seed;
} ng_quantize_options;

/* "major.minor.patch". */
const char* ng_version(void);

/* The instruction set in use: "portable", "avx2", "avx512" or "amx". Null if NARROWGAUGE_ISA is wrong. */
const char* ng_isa(void);

/* What was wrong in the calling thread's last call that failed; "" if none has. Valid until its next failure. */
const char* ng_last_error(void);

/* Threads that run a call, the caller included. Applies to the whole process. */
int32_t ng_threads(void);
ng_status ng_set_threads(int32_t threads);

/* weights [.., cols]; format as in format.hpp, such as "fp6_e2m3:g128:fp16" or "fp6"; options may be null. */
ng_status ng_quantize(const ng_tensor* weights, const char* format, const ng_quantize_options* options,
                      ng_qtensor** out);

/* Takes canonical arrays by copy; their layout is in quantize.hpp. zeros and global_scale are null unless the format
 * has them. */
ng_status ng_qtensor_copy_of(const char* format, int32_t ndim, const int64_t* shape, const uint8_t* codes,
                             const void* scales, const uint8_t* zeros, const float* global_scale, ng_qtensor** out);

/* Null is allowed. */
void ng_qtensor_free(ng_qtensor* tensor);

/* Change the form in place; nothing happens if the matrix is in it already. On failure it stays as it was. */
ng_status ng_pack(ng_qtensor* tensor);
ng_status ng_unpack(ng_qtensor* tensor);
int32_t ng_qtensor_is_packed(const ng_qtensor* tensor);

/* The full format string; the shape (ng_qtensor_ndim entries); bytes of the canonical arrays. pre: not null. */
const char* ng_qtensor_format(const ng_qtensor* tensor);
int32_t ng_qtensor_ndim(const ng_qtensor* tensor);
const int64_t* ng_qtensor_shape(const ng_qtensor* tensor);
int64_t ng_qtensor_nbytes(const ng_qtensor* tensor);

/* A safetensors file that holds the matrix under `name` (null: "weight"), written atomically; the Python package reads
 * and writes the same. ng_load gives the matrix called `name` (null: the only one), canonical. */
ng_status ng_save(const ng_qtensor* tensor, const char* path, const char* name);
ng_status ng_load(const char* path, const char* name, ng_qtensor** out);

/* out [.., cols], of the matrix's rows and cols, in either form. */
ng_status ng_dequantize(const ng_qtensor* tensor, const ng_tensor* out);

/* y = x @ w.T + bias + residual: x [.., K], packed weights [N, K], bias null or [N], residual null or [.., N], y of
 * [.., N]. x and y must not overlap; residual is y itself or no part of it. */
ng_status ng_linear(const ng_tensor* x, const ng_qtensor* weights, const ng_tensor* bias, const ng_tensor* residual,
                    const ng_tensor* y);

/* What the arithmetic makes of x (linear.hpp): every row exactly as given, or rounded to integers times a step of its
 * own, for formats whose elements are integers times a power of two. */
typedef enum ng_activations { NG_EXACT = 0, NG_INT16 = 1, NG_INT8 = 2 } ng_activations;

/* ng_linear with rounded activations; `activations` is an ng_activations. */
ng_status ng_linear_rounded(const ng_tensor* x, const ng_qtensor* weights, const ng_tensor* bias,
                            const ng_tensor* residual, const ng_tensor* y, int32_t activations);

/* --- on a GPU ----------------------------------------------------------------------------------------------------
 *
 * Pointers in these are addresses of cuda:`device`, unless the host is named, and work goes to `stream`, a CUstream or
 * cudaStream_t of that device (null: the default one), in whose order it runs; ng_cuda_synchronize() alone waits. They
 * may be captured into a CUDA graph. Memory is the caller's; nothing is allocated.
 */

/* Why no GPU can be used; "" if one can. */
const char* ng_why_no_cuda(void);

/* The arrays of a canonical matrix, as quantize.hpp lays them out. zeros and global_scale are null unless the format
 * has them. */
typedef struct ng_canonical {
  int64_t rows, cols;
  uint8_t* codes;
  void* scales;
  uint8_t* zeros;
  float* global_scale;
} ng_canonical;

/* Bytes of codes, scales, zeros and global_scale, 0 for one that the format has not. */
ng_status ng_canonical_bytes(const char* format, int64_t rows, int64_t cols, int64_t bytes[4]);

/* As ng_quantize and ng_dequantize. search_mse is for the CPU only; NaN and Inf in the weights are reported by the next
 * ng_cuda_synchronize() of the device, as NG_INVALID_ARGUMENT. */
ng_status ng_cuda_quantize(const ng_tensor* weights, const char* format, const ng_quantize_options* options,
                           const ng_canonical* out, int32_t device, void* stream);
ng_status ng_cuda_dequantize(const char* format, const ng_canonical* matrix, const ng_tensor* out, int32_t device,
                             void* stream);

/* The layout that linear reads on a GPU: an opaque block of ng_cuda_packed_bytes(), made in host memory. The caller
 * copies it to the device, aligned to 128 bytes there. The matrix must be canonical. */
ng_status ng_cuda_packed_bytes(const char* format, int64_t rows, int64_t cols, int64_t* bytes);
ng_status ng_cuda_pack(const ng_qtensor* tensor, uint8_t* packed);

/* Such a block on a device, of a matrix of rows x cols. */
typedef struct ng_cuda_packed {
  int64_t rows, cols;
  const uint8_t* data;
} ng_cuda_packed;

/* As ng_linear, by Tensor Cores: x is f16 or bf16. workspace has the bytes that ng_cuda_linear_workspace_bytes() gives
 * for `rows` rows of x, null where that is 0; its contents do not matter, and calls on one stream may share it. The
 * first call with a format loads its kernels, which a capture would refuse. */
ng_status ng_cuda_linear_workspace_bytes(int64_t rows, const char* format, int64_t n, int64_t k, int32_t device,
                                         int64_t* bytes);
ng_status ng_cuda_linear(const ng_tensor* x, const char* format, const ng_cuda_packed* weights, const ng_tensor* bias,
                         const ng_tensor* residual, const ng_tensor* y, void* workspace, int32_t device, void* stream);

/* Waits for the stream and says what went wrong on the device. */
ng_status ng_cuda_synchronize(int32_t device, void* stream);

#ifdef __cplusplus
}
#endif

#endif
