// The codec in portable vectors of four floats, the size that every 64-bit machine has.
#include "quantize/codec.hpp"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are a little-endian bit stream and are packed as little-endian words"
#endif

namespace ng::codec {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));

constexpr bool kFused = false;
inline F fused(F a, F b, F c) { return a * b + c; }

inline I shift_left(I x, int32_t n) { return x << n; }
inline I shift_right(I x, int32_t n) { return x >> n; }

// Sixteen elements share a scale.
inline F pair_of(float a, float) { return a - F{}; }
inline I pair_of(int32_t a, int32_t) { return a - I{}; }

template <typename V>
inline int32_t largest(V x) {
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));

// Every other byte of both, which packs 32-bit lanes to 16 and those to 8 bits.
inline Bytes even(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

inline void narrow_codes(uint8_t* codes, const I* from) {
  for (int i = 0; i < 4; ++i, from += 4) {
    const Bytes packed = even(even((Bytes)from[0], (Bytes)from[1]), even((Bytes)from[2], (Bytes)from[3]));
    __builtin_memcpy(codes + 16 * i, &packed, 16);
  }
}

inline void widen_codes(const uint8_t* codes, I* to) {
  const Bytes zero = {};
  for (int i = 0; i < 4; ++i, to += 4) {
    Bytes x;
    __builtin_memcpy(&x, codes + 16 * i, 16);
    const auto low = (Halves)__builtin_shufflevector(x, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const auto high =
        (Halves)__builtin_shufflevector(x, zero, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    to[0] = (I)__builtin_shufflevector(low, (Halves)zero, 0, 8, 1, 9, 2, 10, 3, 11);
    to[1] = (I)__builtin_shufflevector(low, (Halves)zero, 4, 12, 5, 13, 6, 14, 7, 15);
    to[2] = (I)__builtin_shufflevector(high, (Halves)zero, 0, 8, 1, 9, 2, 10, 3, 11);
    to[3] = (I)__builtin_shufflevector(high, (Halves)zero, 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

inline void widen_halves(const uint8_t* from, U* to) {
  for (int i = 0; i < 2; ++i, from += 16, to += 2) {
    Halves x;
    __builtin_memcpy(&x, from, 16);
    to[0] = (U)__builtin_shufflevector(x, Halves{}, 0, 8, 1, 9, 2, 10, 3, 11);
    to[1] = (U)__builtin_shufflevector(x, Halves{}, 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

inline void narrow_halves(uint8_t* to, const U* from) {
  for (int i = 0; i < 2; ++i, from += 2) {
    const Halves packed = __builtin_shufflevector((Halves)from[0], (Halves)from[1], 0, 2, 4, 6, 8, 10, 12, 14);
    __builtin_memcpy(to + 16 * i, &packed, 16);
  }
}

// Eight codes a word: neighbours are joined in three steps, to 2, 4 and 8 codes of N bits.
template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    __builtin_memcpy(&x, codes + 8 * i, 8);
    x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - kBits);
    x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * kBits);
    x = (x & 0x00000000ffffffff) | (x & 0xffffffff00000000) >> (32 - 4 * kBits);
    __builtin_memcpy(out + kBits * i, &x, kBits);
  }
}

template <int kBits>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
  constexpr uint64_t kOne = ~uint64_t{0};
  constexpr uint64_t kFour = kOne >> (64 - 4 * kBits);
  constexpr uint64_t kTwo = (kOne >> (64 - 2 * kBits)) * 0x0000000100000001;
  constexpr uint64_t kEach = (kOne >> (64 - kBits)) * 0x0001000100010001;
  for (int i = 0; i < 8; ++i) {
    uint64_t x = 0;
    __builtin_memcpy(&x, packed + kBits * i, kBits);
    x = (x & kFour) | (x & ~kFour) << (32 - 4 * kBits);
    x = (x & kTwo) | ((x & (kTwo << 2 * kBits)) << (16 - 2 * kBits));
    x = (x & kEach) | ((x & (kEach << kBits)) << (8 - kBits));
    __builtin_memcpy(codes + 8 * i, &x, 8);
  }
}

template <int kDistance>
inline F exchanged(F x) {
  return __builtin_shufflevector(x, x, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance);
}

constexpr bool kLookup = false;
struct Lookup;

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kPortable = {absmax, range, scales, scale_values, spread, encode, decode,
                         errors, pack,  unpack, widen,        add,    narrow, hadamard};

}  // namespace ng::codec
