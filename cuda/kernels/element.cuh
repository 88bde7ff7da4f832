// Elements and scales in registers: the arithmetic of quantize/cpu/codec.inl and quantize/stochastic.cpp, a lane's 32
// elements at a time. Every operation rounds by itself (the file is compiled with -fmad=false), so codes, scales and
// values equal the CPU's bit for bit. What kind of element it is decides once for the 32, and for all lanes alike.
#pragma once

#include "kernels/tile.cuh"

namespace ng::cuda {

using codec::Element;
using codec::Kind;
using codec::Scale;

constexpr int32_t kInfinity = 0x7f800000;
constexpr float kLargest = 0x1.fffffep127f;
constexpr float kToInteger = 12582912.0f;     // 1.5 * 2^23: the sum's low bits are x rounded to nearest even
constexpr int32_t kIntegerZero = 0x4b400000;  // its bits

// max.NaN: NaN if either is.
__device__ inline float max_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

__device__ inline bool is_finite(float x) { return fabsf(x) <= kLargest; }

// --- scales --------------------------------------------------------------------------------------------------------

// A group's scale as elements are divided by it: 1 / value is inverse + inverse_low to about 48 bits.
struct Divisor {
  float value;
  float inverse;
  float inverse_low;
  bool empty;  // all codes are 0
  bool fast;   // divide() may use the inverse
};

struct Stored {
  Divisor divisor;
  uint32_t bits;  // of the scale as it is stored
};

// The scale of a group whose elements span `range`; NaN for an infinite range, with codes 0.
__device__ inline Stored make_scale(double range, const ScaleCoding& coding, float global) {
  const bool infinite = isinf(range);
  range = infinite ? 0.0 : range;
  const double divisor = coding.divisor * static_cast<double>(global);
  const double quotient = range / (divisor == 0 ? 1.0 : divisor);
  int64_t code;
  double value;
  if (coding.type == Scale::e8m0) {
    const int64_t bits = __double_as_longlong(quotient);
    const bool up = coding.ceil && (bits & ((int64_t{1} << 52) - 1)) != 0;
    code = min(max((bits >> 52) - (1023 - 127) + (up ? 1 : 0), int64_t{0}), int64_t{254});
    value = __longlong_as_double((code + (1023 - 127)) << 52);
  } else {
    const double t = quotient < coding.most ? quotient : coding.most;
    const int64_t power = max(int64_t{__double_as_longlong(t)} & (int64_t{2047} << 52), coding.least);
    const int64_t c = power + ((int64_t{coding.shift} << 52) + (int64_t{1} << 51));
    const double sum = t + __longlong_as_double(c);
    code = __double_as_longlong(sum) - c + ((power - coding.least) >> coding.shift);
    value = sum - __longlong_as_double(c);
  }
  Stored out;
  const float s = static_cast<float>(value * static_cast<double>(global));
  out.bits = infinite ? coding.nan : s == 0 ? 0 : static_cast<uint32_t>(code);
  out.divisor.empty = s == 0 || range == 0;
  out.divisor.value = out.divisor.empty ? 1.0f : s;
  // The remainder of 1 / s is exact, and its quotient by s good to 2^-22 of it.
  const float y = __frcp_rn(out.divisor.value);
  out.divisor.inverse = y;
  out.divisor.inverse_low = __fmul_rn(__fmaf_rn(-out.divisor.value, y, 1.0f), y);
  out.divisor.fast = out.divisor.value >= 0x1p-36f && out.divisor.value <= 0x1p60f;
  return out;
}

__device__ inline int zero_point(float low, const Stored& scale, const Element& element) {
  if (scale.divisor.empty) return 0;
  return __float2int_rn(fminf(__fdiv_rn(-low, scale.divisor.value), static_cast<float>(element.high)));
}

__device__ inline void store_scale(void* scales, int64_t at, Scale type, uint32_t bits) {
  switch (type) {
    case Scale::fp32: static_cast<uint32_t*>(scales)[at] = bits; return;
    case Scale::fp16:
    case Scale::bf16: static_cast<uint16_t*>(scales)[at] = static_cast<uint16_t>(bits); return;
    case Scale::e8m0:
    case Scale::e4m3: static_cast<uint8_t*>(scales)[at] = static_cast<uint8_t>(bits); return;
  }
}

__device__ inline float load_scale(const void* scales, int64_t at, Scale type) {
  switch (type) {
    case Scale::fp32: return static_cast<const float*>(scales)[at];
    case Scale::fp16: {
      float low, high;
      widen_halves(static_cast<const uint16_t*>(scales)[at], low, high);
      return low;
    }
    case Scale::bf16: return __uint_as_float(uint32_t{static_cast<const uint16_t*>(scales)[at]} << 16);
    case Scale::e8m0: {
      const uint32_t bits = static_cast<const uint8_t*>(scales)[at];
      return __uint_as_float(bits == 0 ? 0x400000u : bits == 255 ? 0x7fc00000u : bits << 23);
    }
    case Scale::e4m3: break;
  }
  const uint32_t bits = static_cast<const uint8_t*>(scales)[at];
  if ((bits & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000u);
  const float magnitude = __uint_as_float((bits & 0x7f) << 20) * 0x1p120f;
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

// --- to codes ------------------------------------------------------------------------------------------------------

// x / divisor rounded once; see divide() of codec.inl for why. pre: the divisor is fast.
template <bool kFewBits>
__device__ inline float divide(float x, const Divisor& d) {
  float q = __fmaf_rn(x, d.inverse, __fmul_rn(x, d.inverse_low));
  if constexpr (!kFewBits) q = __fmaf_rn(__fmaf_rn(-d.value, q, x), d.inverse, q);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(x) & 0x80000000u));  // -0 has become 0
}

template <bool kFewBits>
__device__ inline void divide_all(float (&x)[kLaneElements], const Divisor (&unit)[2]) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) x[i] = divide<kFewBits>(x[i], unit[i / kUnit]);
}

// By the instruction, whatever the divisor; in a loop, since it is long, and rare, and needs many registers. The
// elements go through shared memory, of which a tile of floats is needed, and which others may then not yet write to.
__device__ inline void divide_slowly(float (&x)[kLaneElements], const Divisor (&unit)[2], uint4* staged, int lane) {
  write_floats<Source::f32>(x, staged, lane);  // read by the same lane only
#pragma unroll 1
  for (int i = 0; i < kQuads; ++i) {
    const float divisor = i < kQuads / 2 ? unit[0].value : unit[1].value;
    const auto quotient = [&](uint32_t bits) { return __float_as_uint(__fdiv_rn(__uint_as_float(bits), divisor)); };
    uint4& four = staged[float_place(lane * kQuads + i)];
    four = {quotient(four.x), quotient(four.y), quotient(four.z), quotient(four.w)};
  }
  read_floats<Source::f32>(staged, lane, x);
}

// 2^bits, which the compiler does not see through: it would undo what is multiplied and added in one instruction.
__device__ inline uint32_t power(int bits) {
  uint32_t out;
  asm("shl.b32 %0, 1, %1;" : "=r"(out) : "r"(bits));
  return out;
}

// Calls f(i, q) for the lane's quotients and joins what it returns to quads. What it returns may be more than the code
// by `excess`, the same for all.
template <typename F>
__device__ inline void join(const float (&q)[kLaneElements], int bits, uint32_t excess, uint32_t (&quad)[kQuads],
                            const F& code) {
  const uint32_t next = power(bits);
  const uint32_t all = excess * (1 + next * (1 + next * (1 + next)));
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    quad[j] = code(4 * j + 3, q[4 * j + 3]);
#pragma unroll
    for (int k = 2; k >= 0; --k) quad[j] = quad[j] * next + code(4 * j + k, q[4 * j + k]);
    quad[j] -= all;
  }
}

__device__ inline void nearest_codes(const float (&q)[kLaneElements], const int (&zero)[2], const Element& e,
                                     uint32_t (&quad)[kQuads]) {
  switch (e.kind) {
    case Kind::fp: {
      // As floating_code() of codec.inl: adding C = 1.5 * 2^(e + 23 - Y) leaves |q| in units of the code's last place
      // in the sum's low bits, where e is the exponent of |q| or the smallest one. C comes as a product of 2^e.
      const int below = 23 - e.fp.mantissa_bits;
      const float unit = __int_as_float((below + 127) << 23 | 0x400000);
      const float most = __int_as_float(e.fp.max_bits);
      const uint32_t excess =
          (static_cast<uint32_t>(below) << 23) + 0x400000 + (static_cast<uint32_t>(e.fp.min_exponent) >> below);
      const uint32_t negative = power(e.bits - 1);
      return join(q, e.bits, excess, quad, [&](int, float x) {
        const float t = fminf(fabsf(x), most);
        const uint32_t exponent = max(__float_as_int(t) & kInfinity, e.fp.min_exponent);
        const float sum = __fmaf_rn(__uint_as_float(exponent), unit, t);
        const uint32_t code = __float_as_uint(sum) - exponent + (exponent >> below);
        return (__float_as_uint(x) >> 31) * negative + code;
      });
    }
    case Kind::signed_int: {
      // Codes from 0, then two's complement.
      const uint32_t negative = 1u << (e.bits - 1), next = 1u << e.bits;
      join(q, e.bits, static_cast<uint32_t>(kIntegerZero) - negative, quad, [&](int, float x) {
        const int sum = __float_as_int(__fadd_rn(x, kToInteger));
        return static_cast<uint32_t>(min(max(sum, kIntegerZero + e.low), kIntegerZero + e.high));
      });
#pragma unroll
      for (uint32_t& four : quad) four ^= negative * (1 + next * (1 + next * (1 + next)));
      return;
    }
    case Kind::unsigned_int:
      return join(q, e.bits, 0, quad, [&](int i, float x) {
        const int sum = __float_as_int(__fadd_rn(x, kToInteger));
        const int near = min(max(sum, kIntegerZero - 512), kIntegerZero + 512) - kIntegerZero;
        return static_cast<uint32_t>(min(max(near + zero[i / kUnit], 0), e.high));
      });
    case Kind::nf4: break;
  }
  join(q, e.bits, 0, quad, [&](int, float x) {
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) code += x >= e.thresholds[i] ? 1 : 0;
    return code;
  });
}

// --- stochastic rounding -------------------------------------------------------------------------------------------

// Philox-4x32-10; see philox.hpp.
__device__ inline uint4 philox(uint64_t counter, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
    const uint32_t high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {c0, c1, c2, c3};
}

// Whether a number that is uniform in [0, 1), word * 2^-32, is less than `fraction`. pre: 0 <= fraction < 1.
__device__ inline uint32_t below_fraction(uint32_t word, float fraction) {
  return word < __float2uint_ru(fraction * 0x1p32f) ? 1 : 0;  // exact: a product by a power of two, rounded up
}

// Entry i of the element's codebook, which lies in the lanes of the warp.
struct Codebook {
  float mine = 0;
  __device__ Codebook(const Element& e, int lane) {
#pragma unroll
    for (int i = 0; i < 16; ++i) mine = (lane & 15) == i ? e.values[i] : mine;
  }
  __device__ float operator[](uint32_t i) const { return __shfl_sync(0xffffffffu, mine, i & 15); }
};

__device__ inline uint32_t stochastic_code(float q, uint32_t word, int zero, const Element& e,
                                           const Codebook& codebook) {
  switch (e.kind) {
    case Kind::fp: {
      const float t = fminf(fabsf(q), __int_as_float(e.fp.max_bits));
      const int exponent = max(__float_as_int(t) & kInfinity, e.fp.min_exponent);
      // t in units of the code's last place: exact, since the smallest unit is not below 2^-62.
      const float steps = t * __int_as_float((254 + e.fp.mantissa_bits - (exponent >> 23)) << 23);
      const float below = floorf(steps);
      const uint32_t code = __float2int_rz(below) + ((exponent - e.fp.min_exponent) >> (23 - e.fp.mantissa_bits));
      const uint32_t sign = (__float_as_uint(q) >> 31) << (e.bits - 1);
      return sign | (code + below_fraction(word, steps - below));
    }
    case Kind::signed_int: {
      const float magnitude = fminf(fabsf(q), 512.0f);
      const float below = floorf(magnitude);
      const int rounded = __float2int_rz(below) + below_fraction(word, magnitude - below);
      return min(max(q < 0 ? -rounded : rounded, e.low), e.high) & ((1 << e.bits) - 1);
    }
    case Kind::unsigned_int: {
      // In double precision, as on the CPU: fractions just below 1 are rounded.
      const double clipped = fmin(fmax(static_cast<double>(q), -512.0), 512.0);
      const double below = floor(clipped);
      const int rounded = __double2int_rz(below) + (word * 0x1p-32 < clipped - below ? 1 : 0);
      return min(max(rounded + zero, 0), e.high);
    }
    case Kind::nf4: break;
  }
  // The neighbour towards zero is the last value that |q| reaches; values[7] is zero.
  const bool negative = q < 0;
  uint32_t code = 7;
#pragma unroll
  for (int i = 0; i < 7; ++i) code -= negative && e.values[i] >= q ? 1 : 0;
#pragma unroll
  for (int i = 8; i < 16; ++i) code += !negative && e.values[i] <= q ? 1 : 0;
  const float near = codebook[code], far = codebook[negative ? code - 1 : code + 1];
  if (code == 0 || code == 15) return code;
  const double fraction = (static_cast<double>(q) - near) / (static_cast<double>(far) - near);
  if (word * 0x1p-32 < fraction) code += negative ? -1 : 1;
  return code;
}

// As nearest_codes; `index` is the lane's first element in the matrix. A loop over quads, since four kinds of code
// unrolled would be longer than all else: the quotients go through shared memory, as those of divide_slowly.
__device__ inline void stochastic_codes(const float (&q)[kLaneElements], const int (&zero)[2], const Element& e,
                                        int64_t index, uint64_t seed, uint4* staged, int lane,
                                        uint32_t (&quad)[kQuads]) {
  const Codebook codebook(e, lane);
  write_floats<Source::f32>(q, staged, lane);  // read by the same lane only
  // The same for all lanes, which are 32 elements apart: how far the elements are from the words' counters.
  const int shift = static_cast<int>(index & 3);
  const uint64_t counter = static_cast<uint64_t>(index) >> 2;
  uint4 now = philox(counter, seed);
#pragma unroll 1
  for (int j = 0; j < kQuads; ++j) {
    const uint4 next = shift == 0 && j == kQuads - 1 ? now : philox(counter + j + 1, seed);
    uint4 words = now;
    if (shift == 1) words = {now.y, now.z, now.w, next.x};
    if (shift == 2) words = {now.z, now.w, next.x, next.y};
    if (shift == 3) words = {now.w, next.x, next.y, next.z};
    now = next;
    const uint4 four = staged[float_place(lane * kQuads + j)];
    const int zero_point = j < kQuads / 2 ? zero[0] : zero[1];
    const auto code = [&](uint32_t bits, uint32_t word) {
      return stochastic_code(__uint_as_float(bits), word, zero_point, e, codebook);
    };
    uint32_t codes = code(four.w, words.w);
    codes = (codes << e.bits) + code(four.z, words.z);
    codes = (codes << e.bits) + code(four.y, words.y);
    codes = (codes << e.bits) + code(four.x, words.x);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quad[i] = i == j ? codes : quad[i];
  }
}

// --- to values -----------------------------------------------------------------------------------------------------

// Calls f(i, value) for the lane's codes, before their scales.
template <typename F>
__device__ inline void values_of(const uint32_t (&quad)[kQuads], const int (&zero)[2], const Element& e, int lane,
                                 const F& f) {
  const uint32_t mask = (1u << e.bits) - 1;
  const auto each = [&](const auto& value) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) f(i, value(i, quad[i / 4], i % 4));
  };
  // The code's highest bit in a word's, and whatever is below it.
  const auto raised = [&](uint32_t word, int k) { return static_cast<int32_t>(word << (32 - (k + 1) * e.bits)); };
  switch (e.kind) {
    case Kind::fp: {
      // Sign, exponent and mantissa in a float's place, then the difference of the biases: exact for subnormals.
      const int exponent_bits = e.bits - 1 - e.fp.mantissa_bits;
      const int32_t field = ((1 << (e.bits - 1)) - 1) << (23 - e.fp.mantissa_bits);
      const float rebias = __int_as_float(e.fp.rebias + (127 << 23));
      const auto place = [&](uint32_t word, int k) {
        return (raised(word, k) >> (8 - exponent_bits)) & (static_cast<int32_t>(0x80000000u) | field);
      };
      if (e.fp.special > 255) {
        return each([&](int, uint32_t word, int k) { return __int_as_float(place(word, k)) * rebias; });
      }
      const int32_t special = e.fp.special << (23 - e.fp.mantissa_bits);
      return each([&](int, uint32_t word, int k) {
        const int32_t bits = place(word, k);
        return (bits & 0x7fffffff) >= special ? __int_as_float(bits | kInfinity) : __int_as_float(bits) * rebias;
      });
    }
    case Kind::signed_int:
      return each([&](int, uint32_t word, int k) {
        return __int_as_float(kIntegerZero + (raised(word, k) >> (32 - e.bits))) - kToInteger;
      });
    case Kind::unsigned_int: {
      const float least[2] = {8388608.0f + zero[0], 8388608.0f + zero[1]};
      return each([&](int i, uint32_t word, int k) {
        return __uint_as_float(0x4b000000u | ((word >> (k * e.bits)) & mask)) - least[i / kUnit];
      });
    }
    case Kind::nf4: break;
  }
  const Codebook codebook(e, lane);
  each([&](int, uint32_t word, int k) { return codebook[word >> (4 * k)]; });
}

}  // namespace ng::cuda
