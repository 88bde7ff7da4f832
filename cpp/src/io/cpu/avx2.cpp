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

constexpr size_t kPastCaches = size_t{128} << 10;  // shorter copies are likely to be read again soon

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

// 64 bytes to a place that is aligned to 32, past the caches.
void stream(const unsigned char* data, unsigned char* out) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out + 32), high);
}

// Three streams of kStream bytes each, as often as they fit; with kCopy also copied to `out`, which is aligned to 32.
// Prefetchers stop at the end of a page, so the next streams are asked for while these are read.
template <size_t kStream, bool kCopy>
uint32_t three_streams(uint32_t state, const unsigned char*& data, size_t& bytes, unsigned char*& out) {
  constexpr size_t kStep = 64;
  for (; bytes >= 3 * kStream; bytes -= 3 * kStream, data += 3 * kStream) {
    uint64_t a = state;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t i = 0; i < kStream; i += kStep) {
      const unsigned char* at[] = {data + i, data + kStream + i, data + 2 * kStream + i};
      for (size_t k = 0; k < 3; ++k) {
        _mm_prefetch(reinterpret_cast<const char*>(at[k] + 3 * kStream), _MM_HINT_T0);
        if (kCopy) stream(at[k], out + k * kStream + i);
      }
      for (size_t j = 0; j < kStep; j += 8) {
        a = _mm_crc32_u64(a, load(at[0] + j));
        b = _mm_crc32_u64(b, load(at[1] + j));
        c = _mm_crc32_u64(c, load(at[2] + j));
      }
    }
    if (kCopy) out += 3 * kStream;
    state = past<2 * kStream>(static_cast<uint32_t>(a)) ^ past<kStream>(static_cast<uint32_t>(b)) ^
            static_cast<uint32_t>(c);
  }
  return state;
}

uint32_t sum(uint32_t state, const unsigned char* data, size_t bytes) {
  unsigned char* nowhere = nullptr;
  state = three_streams<4096, false>(state, data, bytes, nowhere);
  state = three_streams<256, false>(state, data, bytes, nowhere);
  uint64_t wide = state;
  for (; bytes >= 8; bytes -= 8, data += 8) wide = _mm_crc32_u64(wide, load(data));
  state = static_cast<uint32_t>(wide);
  for (; bytes > 0; --bytes, ++data) state = _mm_crc32_u8(state, *data);
  return state;
}

uint32_t copy(uint32_t state, const unsigned char* data, size_t bytes, unsigned char* out) {
  if (reinterpret_cast<uintptr_t>(out) % 32 == 0 && bytes >= kPastCaches) {
    state = three_streams<4096, true>(state, data, bytes, out);
    _mm_sfence();
  }
  memcpy(out, data, bytes);
  return sum(state, data, bytes);
}

}  // namespace

const Kernels kAvx2 = {sum, copy};

}  // namespace ng::checksum
