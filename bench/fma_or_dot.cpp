// Should bf16 activations go through the bf16 dot product, or be widened and go through fma? Decoding of 6-bit units
// as in linear/cpu/avx512.cpp, followed by either, on weights that stay in the second-level cache. On the machine
// measured (Intel Xeon with AMX), where the dot product issues every second cycle, it is 2 to 8 % faster at one row,
// 1.2x slower at four and 1.4x slower at eight, so the kernels have one arithmetic; a CPU on which it wins by much is a
// reason for a second.
//
//   narrowgauge_bench --benchmark_filter='fma|dot'      time is per unit of 16 x 16 weights
#if defined(__x86_64__)
#include <benchmark/benchmark.h>
// GCC 12's header initialises its undefined vectors with themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <vector>

#include "narrowgauge/device.hpp"

#define NG_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma")))
#define NG_INLINE __attribute__((always_inline)) inline

namespace {

constexpr int kUnits = 4096;
constexpr int kUnitBytes = 192;

struct Tables {
  __m512i low, high;
};

// Two registers of 16 rows x (column, column + 1) as bf16.
template <int Q>
NG_TARGET NG_INLINE void decode(const uint8_t* unit, const Tables& t, __m512i (&pairs)[2]) {
  __m512i codes = _mm512_loadu_si512(unit + Q / 2 * 64);
  if constexpr (Q % 2 == 1) codes = _mm512_srli_epi16(codes, 4);
  __m512i top = _mm512_loadu_si512(unit + 128);
  if constexpr (Q < 2) top = _mm512_slli_epi16(top, 4 - 2 * Q);
  if constexpr (Q == 3) top = _mm512_srli_epi16(top, 2);
  codes = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), codes, top, 0xca);
  const __m512i low = _mm512_permutexvar_epi8(codes, t.low);
  const __m512i high = _mm512_permutexvar_epi8(codes, t.high);
  pairs[0] = _mm512_unpacklo_epi8(low, high);
  pairs[1] = _mm512_unpackhi_epi8(low, high);
}

template <int kRows, int kSums, bool kDot, int Q>
NG_TARGET NG_INLINE void quarter(const uint8_t* unit, const Tables& t, const uint32_t* x,
                                 __m512 (&sums)[kRows][kSums]) {
  __m512i pairs[2];
  decode<Q>(unit, t, pairs);
  for (int p = 0; p < 2; ++p) {
    if constexpr (kDot) {
      for (int m = 0; m < kRows; ++m) {
        __m512& sum = sums[m][(2 * Q + p) % kSums];
        const __m512i both = _mm512_set1_epi32(static_cast<int>(x[(2 * Q + p) * kRows + m]));
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs[p]), reinterpret_cast<__m512bh>(both));
      }
    } else {
      const __m512i upper = _mm512_and_si512(pairs[p], _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      const __m512 columns[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs[p], 16)), _mm512_castsi512_ps(upper)};
      for (int j = 0; j < 2; ++j) {
        for (int m = 0; m < kRows; ++m) {
          __m512& sum = sums[m][(2 * p + j) % kSums];
          const auto* row = reinterpret_cast<const float*>(x) + (4 * Q + 2 * p + j) * kRows + m;
          sum = _mm512_fmadd_ps(columns[j], _mm512_set1_ps(*row), sum);
        }
      }
    }
  }
}

template <int kRows, int kSums, bool kDot>
NG_TARGET void multiply(const uint8_t* units, const uint32_t* x, float* y) {
  const Tables tables = {_mm512_set1_epi8(0x40), _mm512_set1_epi8(0x3f)};
  __m512 totals[kRows];
  for (__m512& total : totals) total = _mm512_setzero_ps();
  for (int i = 0; i < kUnits; ++i, units += kUnitBytes) {
    __m512 sums[kRows][kSums];
    for (auto& row : sums) {
      for (__m512& sum : row) sum = _mm512_setzero_ps();
    }
    const uint32_t* x_unit = x + i % 64 * (kDot ? 8 : 16) * kRows;
    quarter<kRows, kSums, kDot, 0>(units, tables, x_unit, sums);
    quarter<kRows, kSums, kDot, 1>(units, tables, x_unit, sums);
    quarter<kRows, kSums, kDot, 2>(units, tables, x_unit, sums);
    quarter<kRows, kSums, kDot, 3>(units, tables, x_unit, sums);
    for (int m = 0; m < kRows; ++m) {
      for (int s = 0; s < kSums; ++s) totals[m] = _mm512_add_ps(totals[m], sums[m][s]);
    }
  }
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(y + 16 * m, totals[m]);
}

template <int kRows, int kSums, bool kDot>
void run(benchmark::State& state) {
  if (ng::isa_supported() < ng::Isa::avx512) {
    state.SkipWithError("needs avx512");
    return;
  }
  const std::vector<uint8_t> units(kUnits * kUnitBytes, 0x5a);
  const std::vector<uint32_t> x(64 * 16 * kRows, 0x3c233c23u);
  std::vector<float> y(16 * kRows);
  for (auto _ : state) {
    multiply<kRows, kSums, kDot>(units.data(), x.data(), y.data());
    benchmark::DoNotOptimize(y.data());
  }
  state.counters["per_unit"] =
      benchmark::Counter(kUnits, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

BENCHMARK(run<1, 4, false>)->Name("fma/rows:1");
BENCHMARK(run<1, 4, true>)->Name("dot/rows:1");
BENCHMARK(run<4, 1, false>)->Name("fma/rows:4");
BENCHMARK(run<4, 2, true>)->Name("dot/rows:4");
BENCHMARK(run<8, 1, false>)->Name("fma/rows:8");
BENCHMARK(run<8, 1, true>)->Name("dot/rows:8");

}  // namespace
#endif
