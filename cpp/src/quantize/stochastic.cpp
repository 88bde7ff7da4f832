#include "quantize/stochastic.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "quantize/philox.hpp"

namespace ng {
namespace {

using codec::Element;
using codec::Kind;

// The code below |q| and the fraction of the way to the next one. All results are exact in double.
struct Place {
  int code;
  double fraction;
};

Place place_fp(float q, const Element& e) {
  const float t = std::min(std::fabs(q), std::bit_cast<float>(e.fp.max_bits));
  const int32_t exponent = std::max(std::bit_cast<int32_t>(t) & 0x7f800000, e.fp.min_exponent);
  const double steps = std::ldexp(static_cast<double>(t), 127 + e.fp.mantissa_bits - (exponent >> 23));
  const double below = std::floor(steps);
  const int code = static_cast<int>(below) + ((exponent - e.fp.min_exponent) >> (23 - e.fp.mantissa_bits));
  return {code, steps - below};
}

int code_of(float q, double random, int zero, const Element& e) {
  switch (e.kind) {
    case Kind::fp: {
      const Place place = place_fp(q, e);
      const int sign = std::signbit(q) ? 1 << (e.bits - 1) : 0;
      return sign | (place.code + (random < place.fraction ? 1 : 0));
    }
    case Kind::signed_int: {
      const double magnitude = std::min(std::fabs(static_cast<double>(q)), 512.0);
      const double below = std::floor(magnitude);
      const int rounded = static_cast<int>(below) + (random < magnitude - below ? 1 : 0);
      return std::clamp(q < 0 ? -rounded : rounded, e.low, e.high) & ((1 << e.bits) - 1);
    }
    case Kind::unsigned_int: {
      const double clipped = std::clamp(static_cast<double>(q), -512.0, 512.0);
      const double below = std::floor(clipped);
      const int rounded = static_cast<int>(below) + (random < clipped - below ? 1 : 0);
      return std::clamp(rounded + zero, 0, e.high);
    }
    case Kind::nf4: break;
  }
  // The neighbour towards zero is the last value that |q| reaches; values[7] is zero.
  const int step = q < 0 ? -1 : 1;
  int code = 7;
  while (code + step >= 0 && code + step < 16 && std::fabs(e.values[code + step]) <= std::fabs(q)) code += step;
  if (code == 0 || code == 15) return code;
  const double near = e.values[code], far = e.values[code + step];
  return random < (q - near) / (far - near) ? code + step : code;
}

}  // namespace

void encode_stochastic(const float* x, int64_t n, int64_t index, uint64_t seed, const Element& element,
                       const codec::Spread& scales, uint8_t* codes) {
  std::array<uint32_t, 4> words{};
  for (int64_t i = 0; i < n; ++i) {
    const auto place = static_cast<uint64_t>(index + i);
    if (i == 0 || (place & 3) == 0) words = philox(place >> 2, seed);
    const double random = words[place & 3] * 0x1p-32;
    const int64_t at = i >> scales.shift;
    const float s = scales.scale[at];
    const float q = s == 0 ? 0.0f : x[i] / s;
    codes[i] =
        static_cast<uint8_t>(code_of(q, random, element.kind == Kind::unsigned_int ? scales.zero[at] : 0, element));
  }
}

}  // namespace ng
