// Which tile and how many ranges of columns a product gets: a pure function of its shape and the device.
#pragma once

#include <cstdint>

#include "kernels/fpx_args.hpp"
#include "narrowgauge/format.hpp"

namespace ng::cuda {

// Activations as kernels multiply them: fp16 numbers with elements that fp16 cannot hold are sums of two bf16 numbers.
enum class FpxOperand : uint8_t { f16, bf16, f16_wide };

// Of x in 16 bits.
FpxOperand fpx_operand(const Element& element, bool is_bf16);

// Numbers that a decoded weight is the sum of (kTerms of fpx_decode.cuh).
int fpx_terms(const Element& element, FpxOperand operand);

// Whether there is a kernel (fpx_instances.cuh).
bool fpx_has_tile(const Element& element, FpxOperand operand, int tile);

struct FpxPlan {
  int tile = 0;    // of kTiles
  int splits = 1;  // ranges of columns, the sums of which are added by another kernel
};

// The fewest stages from which ranges of columns can be made: one starts where a group does.
int64_t fpx_quantum(const Format& format);

// For x [m, k] and weights [n, k], all positive, on a device of so many multiprocessors.
FpxPlan fpx_plan(int64_t m, int64_t n, int64_t k, const Format& format, FpxOperand operand, int multiprocessors);

}  // namespace ng::cuda
