// A tile on its way between global memory, where it is read and written in 16 bytes a lane, and registers, where each
// lane has 32 consecutive elements and as many words of codes as a code has bits. Between the two it is staged in the
// warp's own part of shared memory, without bank conflicts. Rows that are not aligned go element by element.
#pragma once

#include "kernels/quantize_args.hpp"

namespace ng::cuda {

using codec::Source;

constexpr int kLanes = 32;
constexpr int kLaneElements = kTile / kLanes;

template <Source kType>
constexpr int kSize = kType == Source::f32 ? 4 : 2;
// Elements in 16 bytes, and pieces of 16 bytes of a tile, which are the warp's shared memory.
template <Source kType>
constexpr int kPiece = 16 / kSize<kType>;
template <Source kType>
constexpr int kPieces = kTile / kPiece<kType>;
template <Source kType>
constexpr int kLanePieces = kPieces<kType> / kLanes;

// An element as it is moved.
template <Source kType>
struct Moved {
  using Type = uint16_t;
};
template <>
struct Moved<Source::f32> {
  using Type = uint32_t;
};

// Where piece i of a tile of floats is staged: neighbours, and those that neighbouring lanes own, lie in all banks.
__device__ inline int float_place(int i) { return i ^ ((i >> 3) & 7); }
// And where piece i of its codes is. Of codes but those of 8 bits, the words of a lane spread by themselves.
__device__ inline int code_place(int i, int bits) { return bits == 8 ? i ^ ((i >> 3) & 1) : i; }
__device__ inline int code_byte(int i, int bits) { return code_place(i >> 4, bits) * 16 + (i & 15); }
__device__ inline int code_word(int i, int bits) { return code_place(i >> 2, bits) * 4 + (i & 3); }

template <typename T>
__device__ inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(T) == 0;
}

// --- floats --------------------------------------------------------------------------------------------------------

// Elements [0, n) of the tile at `from`, and zeros.
template <Source kType>
__device__ void stage_floats(const void* from, int n, uint4* staged, int lane) {
  using Type = typename Moved<kType>::Type;
  const auto* elements = static_cast<const Type*>(from);
  auto* to = reinterpret_cast<Type*>(staged);
  const auto place = [](int i) { return float_place(i / kPiece<kType>) * kPiece<kType> + i % kPiece<kType>; };
  int first = 0;  // that is not yet there
  if (aligned<uint4>(from)) {
    const int full = n / kPiece<kType>;
    const auto* pieces = static_cast<const uint4*>(from);
    uint4 piece[kLanePieces<kType>];
#pragma unroll
    for (int i = 0; i < kLanePieces<kType>; ++i) {
      const int at = i * kLanes + lane;
      piece[i] = at < full ? pieces[at] : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLanePieces<kType>; ++i) staged[float_place(i * kLanes + lane)] = piece[i];
    first = full * kPiece<kType>;
  } else if (n < kTile) {
#pragma unroll
    for (int i = 0; i < kLanePieces<kType>; ++i) staged[i * kLanes + lane] = uint4{};
  }
  if (first < n) {
    __syncwarp();
    for (int i = first + lane; i < n; i += kLanes) to[place(i)] = elements[i];
  }
  __syncwarp();
}

template <Source kType>
__device__ void unstage_floats(const uint4* staged, void* to, int n, int lane) {
  using Type = typename Moved<kType>::Type;
  auto* elements = static_cast<Type*>(to);
  const auto* from = reinterpret_cast<const Type*>(staged);
  const auto place = [](int i) { return float_place(i / kPiece<kType>) * kPiece<kType> + i % kPiece<kType>; };
  int first = 0;
  __syncwarp();
  if (aligned<uint4>(to)) {
    const int full = n / kPiece<kType>;
    auto* pieces = static_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < kLanePieces<kType>; ++i) {
      const int at = i * kLanes + lane;
      if (at < full) pieces[at] = staged[float_place(at)];
    }
    first = full * kPiece<kType>;
  }
  for (int i = first + lane; i < n; i += kLanes) elements[i] = from[place(i)];
}

__device__ inline void widen_halves(uint32_t pair, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

template <Source kType>
__device__ inline uint32_t narrow_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kType == Source::bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// The lane's elements.
template <Source kType>
__device__ void read_floats(const uint4* staged, int lane, float (&x)[kLaneElements]) {
#pragma unroll
  for (int i = 0; i < kLanePieces<kType>; ++i) {
    const uint4 piece = staged[float_place(lane * kLanePieces<kType> + i)];
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = i * kPiece<kType> + w * 4 / kSize<kType>;
      if constexpr (kType == Source::f32) {
        x[at] = __uint_as_float(words[w]);
      } else if constexpr (kType == Source::bf16) {
        x[at] = __uint_as_float(words[w] << 16);
        x[at + 1] = __uint_as_float(words[w] & 0xffff0000u);
      } else {
        widen_halves(words[w], x[at], x[at + 1]);
      }
    }
  }
}

template <Source kType>
__device__ void write_floats(const float (&x)[kLaneElements], uint4* staged, int lane) {
#pragma unroll
  for (int i = 0; i < kLanePieces<kType>; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = i * kPiece<kType> + w * 4 / kSize<kType>;
      if constexpr (kType == Source::f32) {
        words[w] = __float_as_uint(x[at]);
      } else {
        words[w] = narrow_pair<kType>(x[at], x[at + 1]);
      }
    }
    staged[float_place(lane * kLanePieces<kType> + i)] = {words[0], words[1], words[2], words[3]};
  }
}

// --- codes ---------------------------------------------------------------------------------------------------------

// A lane's 32 codes: quad[j] has codes 4 j to 4 j + 3 in its lowest 4 kBits bits. In the stream they follow each other
// without gaps.
constexpr int kQuads = kLaneElements / 4;

template <int kBits>
__device__ void write_stream(const uint32_t (&quad)[kQuads], uint4* staged, int lane) {
  uint32_t word[kBits] = {};
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    constexpr int kQuad = 4 * kBits;
    const int at = j * kQuad / 32, shift = j * kQuad % 32;
    word[at] |= quad[j] << shift;
    if (shift + kQuad > 32) word[at + 1] = quad[j] >> (32 - shift);
  }
  auto* words = reinterpret_cast<uint32_t*>(staged);
  if constexpr (kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 4) {
      staged[code_place((lane * kBits + i) / 4, kBits)] = {word[i], word[i + 1], word[i + 2], word[i + 3]};
    }
  } else if constexpr (kBits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 2) {
      *reinterpret_cast<uint2*>(words + lane * kBits + i) = {word[i], word[i + 1]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[lane * kBits + i] = word[i];
  }
}

template <int kBits>
__device__ void read_stream(const uint4* staged, int lane, uint32_t (&quad)[kQuads]) {
  uint32_t word[kBits];
  const auto* words = reinterpret_cast<const uint32_t*>(staged);
  if constexpr (kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 4) {
      const uint4 piece = staged[code_place((lane * kBits + i) / 4, kBits)];
      word[i] = piece.x;
      word[i + 1] = piece.y;
      word[i + 2] = piece.z;
      word[i + 3] = piece.w;
    }
  } else if constexpr (kBits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 2) {
      const uint2 piece = *reinterpret_cast<const uint2*>(words + lane * kBits + i);
      word[i] = piece.x;
      word[i + 1] = piece.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) word[i] = words[lane * kBits + i];
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    constexpr int kQuad = 4 * kBits;
    const int at = j * kQuad / 32, shift = j * kQuad % 32;
    quad[j] = word[at] >> shift;
    if (shift + kQuad > 32) quad[j] = __funnelshift_r(word[at], word[at + 1], shift);
  }
}

__device__ inline void write_stream(int bits, const uint32_t (&quad)[kQuads], uint4* staged, int lane) {
  switch (bits) {
    case 2: return write_stream<2>(quad, staged, lane);
    case 3: return write_stream<3>(quad, staged, lane);
    case 4: return write_stream<4>(quad, staged, lane);
    case 5: return write_stream<5>(quad, staged, lane);
    case 6: return write_stream<6>(quad, staged, lane);
    case 7: return write_stream<7>(quad, staged, lane);
    default: return write_stream<8>(quad, staged, lane);
  }
}

// The bits above a quad are those of the next codes.
__device__ inline void read_stream(int bits, const uint4* staged, int lane, uint32_t (&quad)[kQuads]) {
  switch (bits) {
    case 2: return read_stream<2>(staged, lane, quad);
    case 3: return read_stream<3>(staged, lane, quad);
    case 4: return read_stream<4>(staged, lane, quad);
    case 5: return read_stream<5>(staged, lane, quad);
    case 6: return read_stream<6>(staged, lane, quad);
    case 7: return read_stream<7>(staged, lane, quad);
    default: return read_stream<8>(staged, lane, quad);
  }
}

// The code bytes of n elements, and zeros.
__device__ inline void stage_codes(const uint8_t* from, int n, int bits, uint4* staged, int lane) {
  const int bytes = (n * bits + 7) / 8, pieces = kTile / 128 * bits;
  int first = 0;
  if (n < kTile) {
    for (int i = lane; i < pieces; i += kLanes) staged[i] = uint4{};
    __syncwarp();
  }
  if (aligned<uint4>(from)) {
    const auto* full = reinterpret_cast<const uint4*>(from);
    for (int i = lane; i < bytes / 16; i += kLanes) staged[code_place(i, bits)] = full[i];
    first = bytes / 16 * 16;
  } else if (aligned<uint32_t>(from)) {
    const auto* full = reinterpret_cast<const uint32_t*>(from);
    auto* words = reinterpret_cast<uint32_t*>(staged);
    for (int i = lane; i < bytes / 4; i += kLanes) words[code_word(i, bits)] = full[i];
    first = bytes / 4 * 4;
  }
  auto* to = reinterpret_cast<uint8_t*>(staged);
  for (int i = first + lane; i < bytes; i += kLanes) to[code_byte(i, bits)] = from[i];
  __syncwarp();
}

__device__ inline void unstage_codes(const uint4* staged, int n, int bits, uint8_t* to, int lane) {
  const int bytes = (n * bits + 7) / 8;
  int first = 0;
  __syncwarp();
  if (aligned<uint4>(to)) {
    auto* full = reinterpret_cast<uint4*>(to);
    for (int i = lane; i < bytes / 16; i += kLanes) full[i] = staged[code_place(i, bits)];
    first = bytes / 16 * 16;
  } else if (aligned<uint32_t>(to)) {
    auto* full = reinterpret_cast<uint32_t*>(to);
    const auto* words = reinterpret_cast<const uint32_t*>(staged);
    for (int i = lane; i < bytes / 4; i += kLanes) full[i] = words[code_word(i, bits)];
    first = bytes / 4 * 4;
  }
  const auto* from = reinterpret_cast<const uint8_t*>(staged);
  for (int i = first + lane; i < bytes; i += kLanes) to[i] = from[code_byte(i, bits)];
}

}  // namespace ng::cuda
