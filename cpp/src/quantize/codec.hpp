// The table of codec kernels, one per instruction set, and the constants that they share.
//
// A kernel works on one run: up to kRun consecutive elements of a row that start at a multiple of 16, with scales
// spread to one for every 16 or 64 elements. Kernels check nothing, allocate nothing and never throw; quantize.cpp cuts
// matrices into runs. This header is read by instruction-set files, so it includes C headers only and defines no
// functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ng::codec {

// Elements of a run, and of the scratch arrays that hold one: every group (at most 1024) and every whole number of
// groups and of blocks of 64 codes (at most 4032) fits.
inline constexpr int64_t kRun = 4096;
inline constexpr int64_t kBlock = 64;   // codes that are packed together
inline constexpr int64_t kSpread = 16;  // elements that share an entry of a spread array

enum class Source : uint8_t { f32, f16, bf16 };
enum class Kind : uint8_t { fp, signed_int, unsigned_int, nf4 };
enum class Scale : uint8_t { fp32, fp16, bf16, e8m0, e4m3 };

// A floating type of up to 16 bits as the shifts, masks and limits that convert it.
struct Floating {
  int32_t bits;
  int32_t mantissa_bits;
  int32_t max_bits;      // float bits of the magnitude that codes saturate at
  int32_t min_exponent;  // float bits of the smallest normal
  int32_t rebias;        // added to the exponent field, it becomes a float's
  int32_t special;       // magnitudes from here on are Inf or NaN; beyond all codes if there are none
};

// How codes of one element type are made and read.
struct Element {
  Kind kind;
  int32_t bits;
  int32_t low;  // smallest and largest code value of integers
  int32_t high;
  Floating fp;
  float values[16];      // nf4: the codebook
  float thresholds[16];  // nf4: the smallest float that goes to code i + 1
};

// How scales are made from ranges (amax, or hi - lo): rounded to nearest even from range / divisor, once.
struct ScaleRule {
  Scale type;
  bool ceil;       // e8m0: the smallest power of two not below range / divisor, else OCP's floor
  double divisor;  // largest code value; e4m3: times the global scale. e8m0 floor: its power of two
  float global;    // e4m3: multiplies the stored scale; 1 otherwise
  uint32_t nan;    // bits of a scale that is NaN
};

// A scale and its reciprocal as the sum of two floats, in arrays. Scales of few significant bits divide faster.
struct ScaleArrays {
  float* scale;
  float* inverse;      // RN(1 / scale), or 0 where all codes are 0
  float* inverse_low;  // RN(1 / scale - inverse)
};

// How the quotients of elements and scales are found; all round x / scale once.
enum class Division : uint8_t {
  plain,      // by the instruction
  corrected,  // by the reciprocal: all scales are within the limits that Table::scales checks
  few_bits,   // likewise, and they have at most 16 significant bits
};

// The scales of a run, with zero points, one entry for every 2^shift elements: 16 or 64. Blocks of 64 elements are read
// whole, so there are entries (of any value) for them.
struct Spread {
  int shift;
  const float* scale;
  const float* inverse;      // decode does not read it
  const float* inverse_low;  // nor this
  const int32_t* zero;       // uintN only
  Division division;
};

struct Table {
  // out[g] = largest magnitude of group g of `run`: n elements, groups of `group` (the last may be shorter). Returns
  // the largest of all; NaN counts as larger than infinity.
  float (*absmax)(const void* run, Source type, int64_t n, int64_t group, float* out);
  // low[g] = min(0, smallest), high[g] = max(0, largest). pre: all finite.
  void (*range)(const float* run, int64_t n, int64_t group, float* low, float* high);

  // The scales of `ranges`, which are not negative. stored: their bits, packed in their width, 0 if the scale's value
  // is 0; out.scale: their values, times the global scale. An infinite range is stored as NaN, and its value is 0.
  // Returns whether they are within the limits of division by the reciprocal.
  bool (*scales)(const double* ranges, int64_t count, const ScaleRule& rule, void* stored, const ScaleArrays& out);
  // out[i] = the value of stored scale i, times `global`. NaN becomes the quiet one without payload.
  void (*scale_values)(const void* stored, Scale type, int64_t count, float global, float* out);
  // out[i * step + j] = from[i] for j < step. Writes up to 16 entries more.
  void (*spread)(const float* from, int64_t count, int64_t step, float* out);

  // codes[i] = code of run[i] against its scale, one a byte, for i below n rounded up to 64.
  // Reads n elements. Requests the cache lines of `next` onwards, as many bytes as it reads, if not null.
  void (*encode)(const void* run, Source type, int64_t n, const Element& element, const Spread& scales, uint8_t* codes,
                 const void* next);
  // out[i] = value of codes[i] times its scale. Writes n elements.
  void (*decode)(const uint8_t* codes, int64_t n, const Element& element, const Spread& scales, Source type, void* out);
  // Squared error of encoding and decoding the run with each of `count` scales (and zeros). The sum's order is fixed.
  void (*errors)(const float* run, int64_t n, const Element& element, int64_t count, const float* scale,
                 const int32_t* zero, double* out);

  // n codes, one a byte, to and from the dense bit stream. pack reads whole blocks of 64 codes, the padding zero, and
  // writes ceil(n * bits / 8) bytes; unpack reads those and writes whole blocks.
  void (*pack)(const uint8_t* codes, int64_t n, int bits, uint8_t* out);
  void (*unpack)(const uint8_t* packed, int64_t n, int bits, uint8_t* codes);

  // to[i] = from[i], of any type, as a float; to[i] += from[i]; to[i] = from[i] / divisor, rounded to the type.
  void (*widen)(const void* from, Source type, int64_t n, float* to);
  void (*add)(const float* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, float divisor, Source type, void* to);
  // Blocks of 64 floats, each multiplied by a Hadamard matrix, in place: x = H x / 8. Neighbours are added and
  // subtracted first, then those 2, 4, 8, 16 and 32 apart, and the result is multiplied by 1/8.
  void (*hadamard)(float* x, int64_t blocks);
};

extern const Table kPortable;
extern const Table kAvx2;
extern const Table kAvx512;

// The one of the instruction set in use.
const Table& table();

}  // namespace ng::codec
