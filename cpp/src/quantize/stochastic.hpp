// Stochastic rounding: one scalar encoder for all instruction sets, since random numbers cost more than it does.
#pragma once

#include <cstdint>

#include "quantize/codec.hpp"

namespace ng {

// codes[i] = code of x[i] against its scale for n elements, of which the first is element
// `index` of the matrix. x / scale is a fp32 division; its fraction is taken between the neighbouring code values.
void encode_stochastic(const float* x, int64_t n, int64_t index, uint64_t seed, const codec::Element& element,
                       const codec::Spread& scales, uint8_t* codes);

}  // namespace ng
