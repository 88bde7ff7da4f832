// Decoding of narrow codes into the A operands of mma.m16n8k16, in registers.
//
// A decoder turns the words of a lane (quantize/lane_order.hpp) into the four registers of a slice. Values are exact,
// up to a power of two that the host folds into scales and results:
//
//   fp, f16    The magnitude's bits stand where an fp16 number has exponent and mantissa, so they are value *
//              2^(bias - 15), without a multiplication. The smallest values are fp16 subnormals, which Tensor Cores
//              multiply exactly. Products with fp16 numbers are at least 2^-48, and sums of them below 2^63: nothing
//              under- or overflows in fp32. Elements of more than 5 exponent bits do not fit, nor those of 5 whose
//              largest exponent is not special, since it is fp16's Inf: their activations are split into bf16 numbers.
//   fp, bf16   likewise value * 2^(bias - 127), which products would push below fp32's range: one multiplication by a
//              power of two a pair, exact, makes it the value.
//   int, f16   The code's bits are an fp16 subnormal, code * 2^-24, and so is the difference from the zero point.
//   int, bf16  The code's bits are code * 2^-133; one fma a pair makes them (code - zero) * 2^-6, exact.
//   codebook   Bytes are looked up, four at a time; the entries are sums of two fp16 or three bf16 numbers.
//
// An fp code's sign stands right above its magnitude: a multiplication of the sign bit alone by 2^d - 1 (an integer,
// the same for all), added to the code, moves it to bit 15.
#pragma once

#include <utility>

#include "kernels/fpx_args.hpp"
#include "kernels/ptx.cuh"
#include "quantize/lane_order.hpp"

namespace ng::cuda {

// --- activations ---------------------------------------------------------------------------------------------------

struct F16 {
  static constexpr bool kBf16 = false;
  static constexpr int kTerms = 1;  // of an element of x
};
struct Bf16 {
  static constexpr bool kBf16 = true;
  static constexpr int kTerms = 1;
};
// fp16 numbers as sums of two bf16 numbers: 11 bits in 8 + 3.
struct F16Wide {
  static constexpr bool kBf16 = true;
  static constexpr int kTerms = 2;
};

template <typename X>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (X::kBf16) {
    ptx::mma_bf16(c, a, b);
  } else {
    ptx::mma_f16(c, a, b);
  }
}

// An fp16 pair as sum of two bf16 pairs.
__device__ __forceinline__ void split_f16(uint32_t pair, uint32_t& high, uint32_t& low) {
  const float first = ptx::from_f16(pair);
  const float second = ptx::from_f16(pair >> 16);
  high = ptx::to_bf16x2(first, second);
  low = ptx::to_bf16x2(first - ptx::from_bf16(high), second - __uint_as_float(high & 0xffff0000u));
}

// --- decoders ------------------------------------------------------------------------------------------------------

template <int kBits, int kPair>
inline constexpr lane_order::Pieces kPieces = lane_order::pieces_of(kBits, kPair);

template <int kBits, int kPair, int kIndex, int kExtra>
__device__ __forceinline__ uint32_t rotated_piece(const uint32_t (&words)[kBits]) {
  constexpr lane_order::Piece kPiece = kPieces<kBits, kPair>.piece[kIndex];
  return ptx::rotate_right<kPiece.source - kPiece.target + kExtra>(words[kPiece.word]);
}
template <int kBits, int kPair, int kIndex, typename Masks>
__device__ __forceinline__ uint32_t piece_mask(const Masks& masks) {
  constexpr lane_order::Pieces kAll = kPieces<kBits, kPair>;
  if constexpr (kAll.count == 1) {
    return masks.whole();
  } else {
    return masks.template piece<kIndex, kAll.piece[kIndex].target, kAll.piece[kIndex].bits>();
  }
}

// The codes of pair kPair, each in its half, after a rotation by kExtra more than the packer's.
template <int kBits, int kPair, int kExtra, typename Masks>
__device__ __forceinline__ uint32_t gather(const uint32_t (&words)[kBits], const Masks& masks) {
  uint32_t codes = 0;
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    ((codes |= rotated_piece<kBits, kPair, kIndex, kExtra>(words) & piece_mask<kBits, kPair, kIndex>(masks)), ...);
  }(std::make_integer_sequence<int, kPieces<kBits, kPair>.count>());
  return codes;
}

template <typename X, int kWidth>
struct DecodeFp {
  static constexpr int kBits = kWidth;
  static constexpr int kTerms = 1;
  static constexpr bool kZeros = false;

  struct Masks {
    const FpxArgs& args;
    __device__ uint32_t whole() const { return args.whole; }
    template <int kIndex, int kTarget, int kCount>
    __device__ uint32_t piece() const {
      return args.mask[kIndex];
    }
  };

  __device__ explicit DecodeFp(const FpxArgs& args) : args_(args) {}

  template <int kPair>
  __device__ __forceinline__ void pair(const uint32_t (&words)[kBits], uint32_t, uint32_t (&out)[kTerms]) const {
    // The packer leaves the last bit of the magnitude where fp16 has it; a bf16 number has it three bits lower.
    const uint32_t code = gather<kBits, kPair, X::kBf16 ? 3 : 0>(words, Masks{args_});
    out[0] = (code & args_.sign) * args_.sign_factor + code;
    if constexpr (X::kBf16) out[0] = ptx::fma_bf16x2(out[0], args_.multiplier, 0x80008000u);
  }

 private:
  const FpxArgs& args_;
};

// Codes as unsigned numbers: those of intN with the sign bit flipped, so that they are the value plus 2^(N-1).
template <typename X, int kWidth>
struct DecodeInt {
  static constexpr int kBits = kWidth;
  static constexpr int kTerms = 1;
  static constexpr bool kZeros = true;

  struct Masks {
    __device__ uint32_t whole() const { return ((1u << kBits) - 1u) * 0x10001u; }
    template <int kIndex, int kTarget, int kCount>
    __device__ uint32_t piece() const {
      return (((1u << kCount) - 1u) << kTarget) * 0x10001u;
    }
  };

  __device__ explicit DecodeInt(const FpxArgs&) {}

  // What a zero point adds to the decoded codes of its group.
  __device__ static uint32_t addend(uint32_t zero) {
    const uint32_t negative = zero * 0x10001u | 0x80008000u;
    if constexpr (X::kBf16) return ptx::fma_bf16x2(negative, kScale, 0x80008000u);
    return negative;
  }
  __device__ static uint32_t default_addend() { return addend(1u << (kBits - 1)); }

  template <int kPair>
  __device__ __forceinline__ void pair(const uint32_t (&words)[kBits], uint32_t zero, uint32_t (&out)[kTerms]) const {
    const uint32_t code = gather<kBits, kPair, 0>(words, Masks{});
    if constexpr (X::kBf16) {
      out[0] = ptx::fma_bf16x2(code, kScale, zero);
    } else {
      out[0] = ptx::add_f16x2(code, zero);
    }
  }

 private:
  static constexpr uint32_t kScale = 0x7f007f00u;  // two bf16 of 2^127
};

template <typename X>
struct DecodeCodebook {
  static constexpr int kBits = 4;
  static constexpr int kTerms = X::kBf16 ? 3 : 2;
  static constexpr bool kZeros = false;

  __device__ explicit DecodeCodebook(const FpxArgs& args) : args_(args) {}

  template <int kSlice>
  __device__ __forceinline__ void slice(const uint32_t (&words)[kBits], uint32_t (&out)[kTerms][4]) const {
    const uint32_t low = words[kSlice] & 0x77777777u;
    const uint32_t upper = (words[kSlice] >> 3) & 0x11111111u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the word: operands 0 and 1, 2 and 3
      const uint32_t index = low >> (16 * half);
      // Bytes of ones where the entry is one of the last eight.
      const uint32_t last = ptx::select_bytes(0x0000ff00u, 0, upper >> (16 * half));
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const uint32_t (&table)[8] = args_.table[term];
        const uint32_t lows = (ptx::select_bytes(table[0], table[1], index) & ~last) |
                              (ptx::select_bytes(table[2], table[3], index) & last);
        const uint32_t highs = (ptx::select_bytes(table[4], table[5], index) & ~last) |
                               (ptx::select_bytes(table[6], table[7], index) & last);
        out[term][2 * half] = ptx::select_bytes(lows, highs, 0x5140u);
        out[term][2 * half + 1] = ptx::select_bytes(lows, highs, 0x7362u);
      }
    }
  }

 private:
  const FpxArgs& args_;
};

// The A operands of slice kSlice. zero: what is added for the lane's upper and lower row.
template <int kSlice, typename Decoder>
__device__ __forceinline__ void decode(const Decoder& decoder, const uint32_t (&words)[Decoder::kBits],
                                       const uint32_t (&zero)[2], uint32_t (&out)[Decoder::kTerms][4]) {
  if constexpr (requires { decoder.template slice<kSlice>(words, out); }) {
    decoder.template slice<kSlice>(words, out);
  } else {
    uint32_t pair[1];
    [&]<int... kOperand>(std::integer_sequence<int, kOperand...>) {
      ((decoder.template pair<4 * kSlice + kOperand>(words, zero[kOperand % 2], pair), out[0][kOperand] = pair[0]),
       ...);
    }(std::make_integer_sequence<int, 4>());
  }
}

}  // namespace ng::cuda
