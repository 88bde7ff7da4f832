// The heuristic: the smallest tile that has all rows of x, and the number of ranges with the least estimated time.
//
// Time is counted in stages that a block works on, on the multiprocessor that has the most blocks: those that are there
// at once share its issue slots, so that they take as long as one after the other, each with its stages and what it
// costs besides. Ranges shorten the stages of a block, even out what multiprocessors have, and add the traffic of their
// sums, which is told in stages too: by the bytes of weights that the device reads in the time of one.
#include "kernels/fpx_plan.hpp"

#include <algorithm>
#include <numeric>

namespace ng::cuda {
namespace {

constexpr int kMostSplits = 16;
constexpr int64_t kBlockStages = 2;   // to fill the pipeline and to store results, mostly behind other blocks
constexpr int64_t kReduceStages = 4;  // to launch the second kernel
constexpr int64_t kLeastStages = 4;   // of a team, in a range

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t fpx_quantum(const Format& format) {
  if (format.group == 0) return 1;
  return std::lcm(int64_t{kStageSlices}, int64_t{format.group} / kSliceCols) / kStageSlices;
}

FpxOperand fpx_operand(const Element& e, bool is_bf16) {
  if (is_bf16) return FpxOperand::bf16;
  // The largest exponent of fp8_e5m2 is special, so that its values are not beyond fp16's.
  const bool is_wide = e.kind == ElementKind::fp && (e.exponent_bits > 5 || (e.exponent_bits == 5 && e.bits != 8));
  return is_wide ? FpxOperand::f16_wide : FpxOperand::f16;
}

int fpx_terms(const Element& element, FpxOperand operand) {
  if (element.kind != ElementKind::nf4) return 1;
  return operand == FpxOperand::f16 ? 2 : 3;
}

bool fpx_has_tile(const Element& element, FpxOperand operand, int tile) {
  const int rows = kTiles[tile].x_rows;
  if (operand == FpxOperand::f16_wide) return rows != 16 && rows != 128;  // seldom used
  return rows != 32 || fpx_terms(element, operand) < 3;                   // three terms do not fit in registers
}

FpxPlan fpx_plan(int64_t m, int64_t n, int64_t k, const Format& format, FpxOperand operand, int multiprocessors) {
  FpxPlan plan;
  for (int tile = 1; tile < kTileCount && m > kTiles[plan.tile].x_rows; ++tile) {
    if (fpx_has_tile(format.element, operand, tile)) plan.tile = tile;
  }
  const FpxTile& tile = kTiles[plan.tile];
  const int64_t blocks = ceil_div(n, tile.weight_rows()) * ceil_div(m, tile.x_rows);
  const int64_t quantum = fpx_quantum(format), quanta = ceil_div(ceil_div(k, kStageCols), quantum);
  const int64_t stage_bytes = int64_t{tile.weight_rows()} * kStageCols * format.element.bits / 8;
  int64_t best = 0;
  for (int splits = 1; splits <= kMostSplits; ++splits) {
    const int64_t stages = ceil_div(quanta, splits * tile.teams) * quantum;
    if (splits > 1 && stages < kLeastStages) break;
    int64_t time = ceil_div(blocks * splits, multiprocessors) * (stages + kBlockStages);
    if (splits > 1) {
      const int64_t sums = 2 * splits * m * n * static_cast<int64_t>(sizeof(float));  // written and read
      time += kReduceStages + ceil_div(sums, multiprocessors * tile.teams * stage_bytes);
    }
    if (splits > 1 && time >= best) continue;
    best = time;
    plan.splits = splits;
  }
  return plan;
}

}  // namespace ng::cuda
