// CRC32C by the crc32 instruction of SSE4.2, which every CPU with AVX2 has.
//
// The instruction takes three cycles and can start every cycle, so three streams run side by side. The register of an
// earlier stream is moved past the later ones by one carry-less multiplication with a power of x (Gopal et al., "Fast
// CRC Computation for iSCSI Polynomial Using CRC32 Instruction", Intel 2011).
#include <immintrin.h>
#include <string.h>

#include "io/cpu/kernels.hpp"

namespace ng::checksum {
namespace {

// x^n mod the polynomial, reflected.
constexpr uint32_t power_of_x(size_t n) {
  uint32_t value = 0x80000000u;
  for (size_t i = 0; i < n; ++i) value = (value >> 1) ^ ((value & 1) != 0 ? kCastagnoli : 0);
  return value;
}

uint64_t load(const unsigned char* data) {
  uint64_t word;
  memcpy(&word, data, sizeof word);
  return word;
}

// The register after kBytes zero bytes. The product of two reflected 32-bit polynomials, read as a reflected 64-bit
// one, has a factor x too many, and the crc32 instruction multiplies by x^32.
template <size_t kBytes>
uint32_t past(uint32_t state) {
  constexpr uint32_t kFactor = power_of_x(8 * kBytes - 33);
  const __m128i product =
      _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(state)), _mm_cvtsi32_si128(static_cast<int>(kFactor)), 0);
  return static_cast<uint32_t>(_mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product))));
}

// Three streams of kStream bytes each, as often as they fit.
template <size_t kStream>
uint32_t three_streams(uint32_t state, const unsigned char*& data, size_t& bytes) {
  for (; bytes >= 3 * kStream; bytes -= 3 * kStream, data += 3 * kStream) {
    uint64_t a = state;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t i = 0; i < kStream; i += 8) {
      a = _mm_crc32_u64(a, load(data + i));
      b = _mm_crc32_u64(b, load(data + kStream + i));
      c = _mm_crc32_u64(c, load(data + 2 * kStream + i));
    }
    state = past<2 * kStream>(static_cast<uint32_t>(a)) ^ past<kStream>(static_cast<uint32_t>(b)) ^
            static_cast<uint32_t>(c);
  }
  return state;
}

uint32_t crc32c(uint32_t state, const unsigned char* data, size_t bytes) {
  state = three_streams<4096>(state, data, bytes);
  state = three_streams<256>(state, data, bytes);
  uint64_t wide = state;
  for (; bytes >= 8; bytes -= 8, data += 8) wide = _mm_crc32_u64(wide, load(data));
  state = static_cast<uint32_t>(wide);
  for (; bytes > 0; --bytes, ++data) state = _mm_crc32_u8(state, *data);
  return state;
}

}  // namespace

const Crc32cFn kAvx2Crc32c = crc32c;

}  // namespace ng::checksum
