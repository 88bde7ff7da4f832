// A C++ program that uses the installed library: quantize, pack, multiply, and compare with plain arithmetic.
// Prints the largest error; exits with 1 if it is not small or if bad input is accepted. With a path it also writes a
// file there by direct I/O and prints the engine.
#include <cmath>
#include <cstdio>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/linear.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/quantize.hpp"

namespace {

void write_directly(const char* path) {
  ng::Buffer block(size_t{4} << 20);  // aligned to a huge page
  for (size_t i = 0; i < block.size(); ++i) block.data()[i] = static_cast<std::byte>(i % 251);
  const auto file = ng::open_direct(path, ng::OpenMode::create);
  file->register_memory({block.data(), block.size()});
  file->write({block.data(), block.size()}, 0, 1);
  file->wait();
  file->sync();
  std::printf("C++: %s, %lld bytes by %s\n", path, static_cast<long long>(file->size()), file->engine().c_str());
  file->close();
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int64_t n = 48;
  constexpr int64_t k = 200;
  std::vector<float> weights(n * k);
  std::vector<float> x(k);
  std::vector<float> y(n);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i));
  const ng::TensorView weights_view(weights.data(), ng::DType::f32, {n, k});
  const ng::TensorView x_view(x.data(), ng::DType::f32, {1, k});
  const ng::TensorView y_view(y.data(), ng::DType::f32, {1, n});

  ng::QTensor q = ng::QTensor::quantize(weights_view, ng::Format::parse("fp6"));
  std::vector<float> decoded(n * k);
  ng::dequantize(q.canonical_view(), ng::TensorView(decoded.data(), ng::DType::f32, {n, k}), ng::default_executor());

  q = ng::pack(std::move(q));
  ng::linear(x_view, q.packed_view(), nullptr, nullptr, y_view, ng::default_executor());

  double worst = 0;
  for (size_t row = 0; row < n; ++row) {
    double expected = 0;
    for (size_t i = 0; i < k; ++i) expected += double{x[i]} * double{decoded[row * k + i]};
    worst = std::max(worst, std::abs(expected - double{y[row]}));
  }
  std::printf("C++: %s, %s, %lld bytes, largest error %.2g\n", std::string(ng::isa_name(ng::isa())).c_str(),
              q.format().str().c_str(), static_cast<long long>(q.nbytes()), worst);
  if (!(worst < 1e-4)) return 1;
  if (argc == 2) write_directly(argv[1]);

  try {
    ng::linear(ng::TensorView(x.data(), ng::DType::f32, {1, k - 1}), q.packed_view(), nullptr, nullptr, y_view,
               ng::default_executor());
  } catch (const ng::InvalidArgument& error) {
    std::printf("C++: refused as it should be: %s\n", error.what());
    return 0;
  }
  std::printf("C++: a row of %lld elements was accepted\n", static_cast<long long>(k - 1));
  return 1;
}
