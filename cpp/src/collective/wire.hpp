// Elements as bytes on the wire, and back.
//
// A unit is what one rank sends another of one chunk: elements in one message, scales first.
//
//   [scales][zero points][codes]      each dense, as in a canonical matrix of one row; padded to 16 bytes in all
//   [elements]                        where they travel as they are; likewise
//
// Units are quantised by quantize.hpp, in bands that stay in the cache where more is done than that.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "narrowgauge/collective.hpp"

namespace ng::collective {

// Throws InvalidArgument unless the wire's Format can be cut into chunks.
void check_wire(const Wire& wire);

// Elements from which chunks and ranks' parts are made, so that results do not depend on how many there are.
int64_t unit_elements(const Wire& wire);

int64_t wire_bytes(const Wire& wire, DType dtype, int64_t n);
// Without the padding at its end.
int64_t unit_bytes(const Wire& wire, DType dtype, int64_t n);
// Elements [first, first + n) of a unit of unit_n, of which `first` starts a group.
CanonicalView unit_part(const Format& format, const std::byte* unit, int64_t unit_n, int64_t first, int64_t n);
// Elements as the matrix of one row that quantize.hpp takes.
TensorView unit_row(const void* data, DType dtype, int64_t n);

// Stochastic rounding of elements of which the first is number `first` for this key.
struct Randomness {
  uint64_t seed = 0;
  int64_t first = 0;
};

// from: n elements. to: wire_bytes(). error: null, or for every element what earlier roundings have left, which is
// added first, and becomes what this one leaves: 0 where that is not finite.
void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error, std::byte* to,
            Executor& executor);

// The dtype is that of encode, where elements travel as they are.
void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to, DType to_dtype,
            Executor& executor);

// What copy_codes() copies.
struct CodesPart {
  std::byte* to;
  const std::byte* from;
  size_t bytes;
};
std::array<CodesPart, 3> codes_parts(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to);

// Copies what was encoded, n elements from element `first` of a matrix without padding on, into its arrays.
void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to);

// to = the sum over units of their elements, added in fp32 in their order, divided by `divisor` and rounded once.
void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor, void* to,
                DType to_dtype, Executor& executor);

}  // namespace ng::collective
