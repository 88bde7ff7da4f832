// Which kernel linear gives to a product, and how the work is cut: what linear itself follows, asked without
// multiplying. Pure, but that the CPU's plan is for the instruction set in use; a plan for a GPU needs none.
//
// As in linear.hpp x is [rows, k] and the weights are [n, k]. Both throw InvalidArgument for sizes below 1.
#pragma once

#include <cstdint>
#include <string>

#include "narrowgauge/device.hpp"
#include "narrowgauge/dtype.hpp"
#include "narrowgauge/format.hpp"
#include "narrowgauge/linear.hpp"

namespace ng {

// On the CPU, for x of a type that decides whether tiles of AMX can hold it. Direct: the weights stream past one tile
// of x, or two, and are decoded beside the arithmetic. Else panels of weights are decoded into the cache, once for
// every pass of at most `pass_rows` rows of x, and multiplied by tiles of x_rows.
struct CpuLinearPlan {
  Isa isa = Isa::portable;  // of the kernels
  bool direct = false;
  int64_t x_rows = 0;         // of the first tile
  int64_t second_x_rows = 0;  // of the second; 0: there is none
  int64_t pass_rows = 0;
  int64_t passes = 0;     // over the weights in memory
  int64_t task_rows = 0;  // the fewest rows of the weights that a thread takes at a time
  int64_t tasks = 0;      // at most
};

CpuLinearPlan cpu_linear_plan(int64_t rows, const Format& format, int64_t n, int64_t k,
                              Activations activations = Activations::exact, DType x = DType::f32);

// On a GPU of so many multiprocessors. A block has a tile of rows of x and of the weights, and a range of columns.
struct CudaLinearPlan {
  std::string kernel;        // its name in the image
  int x_rows = 0;            // of a block
  int weight_rows = 0;       // of a block
  int threads = 0;           // of a block
  int stages = 0;            // of 64 columns that a team has in shared memory, all but one of them on their way
  int stage_bytes = 0;       // of a team
  int teams = 0;             // of a block
  int shared_bytes = 0;      // of a block
  int resident = 0;          // blocks that a multiprocessor has room for, by the bound that the compiler was given
  int splits = 0;            // ranges of columns; above 1 another kernel adds their sums
  int64_t blocks = 0;        // all ranges together
  int64_t block_stages = 0;  // of the team with the most
  int64_t workspace_bytes = 0;
};

// x is f16 or bf16. Throws InvalidArgument for another type.
CudaLinearPlan cuda_linear_plan(int64_t rows, const Format& format, int64_t n, int64_t k, DType x, int multiprocessors);

}  // namespace ng
