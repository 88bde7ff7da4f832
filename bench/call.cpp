// What does one call cost, before any work? ng::linear on the smallest matrix, and the executor's wake-up: the floor
// under every row of bench/overhead.py.
#include <benchmark/benchmark.h>

#include <array>

#include "narrowgauge/linear.hpp"

namespace {

void linear_16x16(benchmark::State& state) {
  std::array<float, 256> weights{};
  std::array<float, 16> x{};
  std::array<float, 16> y{};
  const auto packed = ng::pack(ng::QTensor::quantize(ng::TensorView(weights.data(), ng::DType::f32, {16, 16}),
                                                     ng::Format::parse("fp6_e2m3:g16")));
  const ng::TensorView input(x.data(), ng::DType::f32, {1, 16});
  const ng::TensorView output(y.data(), ng::DType::f32, {1, 16});
  for (auto _ : state) {
    ng::linear(input, packed.packed_view(), nullptr, nullptr, output, ng::default_executor());
    benchmark::DoNotOptimize(y.data());
  }
}
BENCHMARK(linear_16x16);

void parallel_for_all_threads(benchmark::State& state) {
  ng::Executor& executor = ng::default_executor();
  for (auto _ : state) {
    executor.parallel_for(executor.threads(), 1, [](int64_t, int64_t) {});
  }
}
BENCHMARK(parallel_for_all_threads);

}  // namespace
