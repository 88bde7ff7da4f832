// quantize, dequantize, pack, unpack: between floats, canonical codes and the packed layout of the CPU.
//
// Canonical layout (memory, wire, disk; the same on every machine). Row-major, for `rows` x `cols` elements:
//   codes    u8 [rows, row_bytes]   codes densely packed, little-endian bit order, each row starting on a byte:
//
//              byte 0              byte 1              byte 2          6-bit codes a b c d, bit 0 first
//              a0 a1 a2 a3 a4 a5 b0 b1 | b2 b3 b4 b5 c0 c1 c2 c3 | c4 c5 d0 d1 d2 d3 d4 d5
//
//   scales   [rows, groups] in the Format's scale type
//   zeros    u8 [rows, groups]      uintN only
//   global   f32 [1]                e4m3 scales only; the effective scale is fp32(scale * global)
//
// Packed layout (this process, this kind of device): one opaque block of packed_bytes(); see quantize/layout.hpp.
//
// All functions are thread-safe on distinct outputs, allocate nothing that outlives the call, and throw
// InvalidArgument for anything that does not fit.
//
// Those that take a Stream instead of an Executor work on its device: all pointers are memory of that device, aligned
// to their elements. They give their work to the stream and return; nothing is allocated, nothing waits, and all of it
// may be captured into a CUDA graph once a function of this header has run on the device before. Results equal the
// CPU's bit for bit, but for which NaN a NaN is. They throw CudaError if the device cannot be used.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "narrowgauge/executor.hpp"
#include "narrowgauge/format.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

class Stream;

// A borrowed canonical matrix. All arrays dense. scales in the Format's scale type.
struct CanonicalView {
  Format format;
  int64_t rows = 0;
  int64_t cols = 0;
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  uint8_t* zeros = nullptr;       // null unless the element has a zero point
  float* global_scale = nullptr;  // null unless the Format has one
};

// Bytes of each array of a canonical matrix (0 for an absent one).
struct CanonicalBytes {
  int64_t codes = 0;
  int64_t scales = 0;
  int64_t zeros = 0;
  int64_t global_scale = 0;
  int64_t total() const noexcept { return codes + scales + zeros + global_scale; }
};
// Throws InvalidArgument if rows or cols is negative or the sizes overflow.
CanonicalBytes canonical_bytes(const Format& format, int64_t rows, int64_t cols);

enum class ScaleSearch : uint8_t {
  absmax,  // scale = amax / element_max
  mse,     // of 20 multiples of absmax from 1/2 to 5/4, 1 among them, the one with the least squared error per group:
           // 32 36 40 44 46 48 50 52 54 56 58 60 62 64 66 68 70 72 76 80 / 64; 1 wins ties. uintN: of hi - lo
};
enum class NanPolicy : uint8_t {
  error,     // NaN or Inf in the input throws InvalidArgument naming the first index
  saturate,  // Inf becomes the largest finite float of its sign, NaN zero
  keep,  // a group with NaN or Inf gets the scale NaN and codes 0, so that all of its values are NaN; for the global
         // scale its elements that are not finite count as 0
};

struct QuantizeOptions {
  ScaleSearch search = ScaleSearch::absmax;
  NanPolicy nan = NanPolicy::error;
  bool full_range = false;  // intN down to -2^(N-1); for importers
  bool e8m0_ceil = false;   // e8m0 scales: ceil instead of OCP's floor, so that nothing saturates
  // Stochastic rounding (Philox-4x32-10): element i of the row-major matrix uses word i & 3 of counter i >> 2 under
  // key = seed, and is rounded away from zero (uintN: up) if word * 2^-32 < fraction. The same on every machine.
  bool stochastic = false;
  uint64_t seed = 0;
  int64_t first_index = 0;  // that of the matrix's first element, where the matrix is a part of something
};

// scale = amax / element_max (uintN: (hi - lo) / element_max with lo = min(0, smallest), hi = max(0, largest), and
// zero = rne(-lo / scale)), rounded once to its type; codes are the nearest to w / scale, a fp32 division by the stored
// scale. A tie goes to the even code; where there are no mantissa bits, to the larger magnitude (IEEE 754, 4.3.1).
// e8m0: 2^(floor(log2 amax) - floor(log2 element_max)), OCP's rule. e4m3: global = amax of the matrix / (element_max *
// 448), and the scales are of amax / (element_max * global). amax = 0, or a scale of 0: scale 0 (e8m0: 2^-127) and
// codes 0.
//
// weights [.., cols] in f32, f16 or bf16, leading axes flattened to rows; rows dense.
// pre: out has the matrix's rows and cols and arrays of canonical_bytes().
void quantize(const TensorView& weights, const CanonicalView& out, const QuantizeOptions& options, Executor& executor);
// On a device NaN and Inf are found when the kernel runs: under NanPolicy::error a synchronize() of the device then
// throws the InvalidArgument, and what was written is undefined. Of several matrices since the last one it names one.
// No ScaleSearch::mse.
void quantize(const TensorView& weights, const CanonicalView& out, const QuantizeOptions& options,
              const Stream& stream);

// out [.., cols], f32, f16 or bf16. The product value * scale is rounded once to fp32, then to the output's type.
void dequantize(const CanonicalView& matrix, const TensorView& out, Executor& executor);
void dequantize(const CanonicalView& matrix, const TensorView& out, const Stream& stream);

// out = the sum of the peers' values, as dequantize gives them in f32, added in f32 in the order of the peers; rounded
// to the output's type at the end. All have the same Format and shape. On a device at most 64.
void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, Executor& executor);
void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, const Stream& stream);

// --- packed -------------------------------------------------------------------------------------------------

// A borrowed packed matrix.
struct PackedView {
  Format format;
  int64_t rows = 0;
  int64_t cols = 0;
  const uint8_t* data = nullptr;  // packed_bytes(), aligned to 64
};

// Size of the packed block. Rows are padded to 16 and columns to 16; each section is padded to 64 bytes.
int64_t packed_bytes(const Format& format, int64_t rows, int64_t cols);

// `packed` has packed_bytes() bytes, aligned to 64. unpack(pack(x)) == x, bit for bit, padding bits of codes zero.
void pack(const CanonicalView& matrix, uint8_t* packed, Executor& executor);
void unpack(const PackedView& packed, const CanonicalView& out, Executor& executor);

// The packed layout of GPUs (quantize/cuda_layout.hpp), made and read in host memory, from where the block is copied to
// a device as it is, or on the device. It is aligned to 128 bytes there; a PackedView of it has that address.
int64_t cuda_packed_bytes(const Format& format, int64_t rows, int64_t cols);
// unpack_cuda(pack_cuda(x)) == x, bit for bit; every byte of the block is determined by x.
void pack_cuda(const CanonicalView& matrix, uint8_t* packed, Executor& executor);
void pack_cuda(const CanonicalView& matrix, uint8_t* packed, const Stream& stream);
void unpack_cuda(const PackedView& packed, const CanonicalView& out, Executor& executor);
void unpack_cuda(const PackedView& packed, const CanonicalView& out, const Stream& stream);

// out[i, :] = dequantized row indices[i]; out [count, cols] in f32, f16 or bf16. Throws InvalidArgument naming the
// first index outside [0, rows).
void gather_rows(const PackedView& packed, const int64_t* indices, int64_t count, const TensorView& out,
                 Executor& executor);

// A matrix in a Format that owns its weights once: canonical or packed. Move-only.
class QTensor {
 public:
  // Quantizes; shape is that of `weights`.
  static QTensor quantize(const TensorView& weights, const Format& format, const QuantizeOptions& options = {},
                          Executor& executor = default_executor());
  // Takes canonical arrays by copy, for importers and readers.
  static QTensor copy_of(const CanonicalView& matrix, std::vector<int64_t> shape);

  const Format& format() const noexcept { return format_; }
  const std::vector<int64_t>& shape() const noexcept { return shape_; }  // the last entry is cols
  int64_t rows() const noexcept { return rows_; }
  int64_t cols() const noexcept { return cols_; }
  bool packed() const noexcept { return packed_; }
  // Bytes that the canonical arrays take, whichever form the matrix is in.
  int64_t nbytes() const;

  // Throw InvalidArgument in the other form.
  CanonicalView canonical_view() const;
  PackedView packed_view() const;

 private:
  QTensor() = default;
  friend QTensor pack(QTensor&& tensor, Executor& executor);
  friend QTensor unpack(QTensor&& tensor, Executor& executor);

  Format format_;
  std::vector<int64_t> shape_;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  bool packed_ = false;
  Buffer storage_;  // canonical: codes, scales, zeros, global, each section padded to 64; packed: the block
};

// Change the form. A matrix that is already in it is returned as it is.
QTensor pack(QTensor&& tensor, Executor& executor = default_executor());
QTensor unpack(QTensor&& tensor, Executor& executor = default_executor());

// Writes a safetensors file with the canonical arrays, `<name>.codes` and so on, and the format and shape in its
// metadata, atomically: what Python's QTensor.save writes. Throws SystemError, InvalidArgument.
void save(const QTensor& tensor, const std::string& path, const std::string& name = "weight");

// The matrix called `name` (empty: the only one) of a file that save, or Python's save and save_model, wrote;
// canonical. Throws SystemError, FileCorrupt, InvalidArgument.
QTensor load(const std::string& path, const std::string& name = {});

}  // namespace ng
