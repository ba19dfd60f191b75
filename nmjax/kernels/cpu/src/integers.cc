// Rows of int8 times 1xN blocks of int8: a few rows at a time, or panels of many.
#include "drivers.h"
#include "panel_plan.h"

namespace nmjax {
namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kBatch = 256;     // rows that share the reading of a weight
constexpr int64_t kOutputs = 256;   // outputs that are written in one run

int64_t longest_row(const Blocks& blocks) {
  int64_t longest = 0;
  for (int64_t row = 0; row < blocks.rows; ++row) {
    longest = std::max(longest, blocks.end(row) - blocks.begin(row));
  }
  return longest;
}

Outcome multiply_few(const Kernels& kernels, IntegerTask task, int64_t longest, int64_t threads,
                     const ParallelFor& parallel) {
  const Blocks& blocks = *task.blocks;
  const int64_t parts = threads == 1 ? 1 : std::min(blocks.rows, 8 * threads);
  return parallel(parts, [&, task](int64_t i) {
    thread_local Scratch indices;
    IntegerTask part = task;
    part.row_begin = i * blocks.rows / parts;
    part.row_end = (i + 1) * blocks.rows / parts;
    part.indices = indices.get<uint32_t>(longest);
    return kernels.integers_times_vectors(part) ? Outcome::kGood : Outcome::kIndexOutOfRange;
  });
}

Outcome multiply_batch(const Kernels& kernels, IntegerTask task, int64_t longest) {
  thread_local Scratch sums, indices, quads, excess, tile, woven, transposed;
  const int64_t n = task.blocks->n, outputs = (task.row_end - task.row_begin) * n;
  task.sums_stride = odd_lines(task.pixels + kernels.integer_rows);
  task.sums = sums.get<float>(outputs * task.sums_stride);
  task.indices = indices.get<uint32_t>(longest);
  task.quads = quads.get<int32_t>((longest + 4) * n / 4 + n);
  task.excess = excess.get<int32_t>(n);
  task.tile = tile.get<int32_t>(n * kernels.integer_rows);
  task.woven = woven.get<char>(kernels.integer_scratch);
  task.transposed = transposed.get<float>(kernels.lanes * (outputs + 2 * kernels.lanes));
  return kernels.integers_times_panels(task) ? Outcome::kGood : Outcome::kIndexOutOfRange;
}

}  // namespace

Outcome multiply_integers(const Kernels& kernels, const Blocks& blocks, const Finish& finish,
                          const int8_t* x, const float* row_scales, int64_t batch, int64_t threads,
                          const ParallelFor& all_threads) {
  const int64_t longest = longest_row(blocks), n = blocks.n, inputs = blocks.inputs;
  threads = useful_threads(blocks.end(blocks.rows - 1) * n * batch / 4, threads);
  const ParallelFor& parallel = threads == 1 ? kOneByOne : all_threads;
  IntegerTask task{};
  task.blocks = &blocks;
  task.finish = &finish;
  task.x = x;
  task.row_scales = row_scales;
  task.pixels = batch;
  if (batch <= kFewRows && n >= 4 && n <= 64 && (n & (n - 1)) == 0) {
    return multiply_few(kernels, task, longest, threads, parallel);
  }
  const int64_t rows = kernels.integer_rows, tiles = ceil_div(batch, rows);
  thread_local Scratch packed, scales, places;
  uint8_t* panels = packed.get<uint8_t>(tiles * rows * inputs);
  float* padded = scales.get<float>(tiles * rows);
  int64_t* destinations = places.get<int64_t>(batch);
  for (int64_t p = 0; p < tiles * rows; ++p) padded[p] = p < batch ? row_scales[p] : 0.0f;
  for (int64_t p = 0; p < batch; ++p) destinations[p] = p * blocks.rows * n;
  const Outcome outcome = parallel(tiles, [&](int64_t i) {
    kernels.pack_integers(x, inputs, i * rows, std::min((i + 1) * rows, batch),
                          panels + i * rows * inputs);
    return Outcome::kGood;
  });
  if (outcome != Outcome::kGood) return outcome;
  int64_t at_once = std::clamp<int64_t>(kOutputs / n, 1, blocks.rows);
  while (threads > 1 && at_once * n > 32 && ceil_div(blocks.rows, at_once) < 4 * threads) {
    at_once = ceil_div(at_once, 2);
  }
  const int64_t parts = ceil_div(blocks.rows, at_once);
  return parallel(ceil_div(batch, kBatch) * parts, [&](int64_t i) {
    const int64_t first = i / parts * kBatch, part = i % parts;
    IntegerTask here = task;
    here.panels = panels + first * inputs;
    here.row_scales = padded + first;
    here.destinations = destinations + first;
    here.pixels = std::min(kBatch, batch - first);
    here.row_begin = part * at_once;
    here.row_end = std::min((part + 1) * at_once, blocks.rows);
    return multiply_batch(kernels, here, longest);
  });
}

}  // namespace nmjax
