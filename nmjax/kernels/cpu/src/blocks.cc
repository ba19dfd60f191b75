// 1xN matmul and convolution: panels are packed, then rows of blocks times panels are tasks.
#include "drivers.h"
#include "panel_plan.h"

namespace nmjax {
namespace {

int64_t longest_row(const Blocks& blocks) {
  if (!blocks.row_pointers) return blocks.kept;
  int64_t longest = 0;
  for (int64_t row = 0; row < blocks.rows; ++row) {
    longest = std::max(longest, blocks.end(row) - blocks.begin(row));
  }
  return longest;
}

Outcome multiply_few_pixels(const Kernels& kernels, const Blocks& blocks, const Finish& finish,
                            Tensor x, const Grid& grid, int64_t threads,
                            const ParallelFor& parallel) {
  const int64_t batch = grid.outputs;
  const float* features = static_cast<const float*>(x.data) + std::max<int64_t>(grid.sources[0], 0);
  if (batch > 1 || x.type != Type::kF32 || grid.sources[0] < 0) {
    thread_local Scratch by_feature;
    float* packed = by_feature.get<float>(batch * blocks.inputs);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t k = 0; k < blocks.inputs; ++k) {
        packed[k * batch + b] = grid.sources[b] < 0 ? 0.0f : number_at(x, grid.sources[b] + k);
      }
    }
    features = packed;
  }
  const int64_t tasks = threads == 1 ? 1 : std::min(blocks.rows, 8 * threads);
  return parallel(tasks, [&](int64_t i) {
    const bool good = kernels.blocks_times_vectors({&blocks, &finish, features, batch,
                                                    i * blocks.rows / tasks,
                                                    (i + 1) * blocks.rows / tasks});
    return good ? Outcome::kGood : Outcome::kIndexOutOfRange;
  });
}

Outcome multiply_rows(const Kernels& kernels, const Blocks& blocks, const Finish& finish,
                      const Panels& panels, int64_t longest,
                      int64_t row_begin, int64_t row_end) {
  thread_local Scratch sums, offsets, weights, transposed;
  const int64_t outputs = (row_end - row_begin) * blocks.n;
  PanelTask task;
  task.blocks = &blocks;
  task.finish = &finish;
  task.panels = &panels;
  task.row_begin = row_begin;
  task.row_end = row_end;
  task.sums_stride = odd_lines(panels.count + kernels.tile);
  task.sums = sums.get<float>(outputs * task.sums_stride);
  task.offsets = offsets.get<int32_t>(longest + kRoomAhead);
  task.weights = weights.get<float>(
      blocks.values.type == Type::kF32 ? 0 : (longest + 1) * blocks.n * blocks.taps);
  task.transposed = transposed.get<float>(kernels.lanes * (outputs + 2 * kernels.lanes));
  return kernels.blocks_times_panels(task) ? Outcome::kGood : Outcome::kIndexOutOfRange;
}

}  // namespace

Outcome multiply_blocks(const Kernels& kernels, const Blocks& blocks, const Finish& finish,
                        Tensor x, const Grid& grid, int64_t threads, const ParallelFor& all_threads) {
  const int64_t longest = longest_row(blocks), n = blocks.n;
  threads = useful_threads(blocks.end(blocks.rows - 1) * n * blocks.taps * grid.outputs *
                               grid.images, threads);
  const ParallelFor& parallel = threads == 1 ? kOneByOne : all_threads;
  if (blocks.taps == 1 && grid.outputs <= kFewPixels && n >= 4 && n <= 64 && (n & (n - 1)) == 0) {
    return multiply_few_pixels(kernels, blocks, finish, x, grid, threads, parallel);
  }
  const bool narrow = kernels.multiplies_bf16 && x.type == Type::kBF16 &&
                      blocks.values.type == Type::kBF16;
  const PanelPlan plan(grid, blocks.inputs, narrow ? Type::kBF16 : Type::kF32, kernels.tile);
  if (plan.stride * blocks.inputs > INT32_MAX) return Outcome::kTooLarge;

  // Enough tasks for all threads, of enough outputs to write them in long runs.
  int64_t rows = std::clamp<int64_t>(256 / n, 1, blocks.rows);
  while (threads > 1 && rows > 1 && rows * n > 32 && ceil_div(blocks.rows, rows) < 4 * threads) {
    rows = ceil_div(rows, 2);
  }
  return for_each_part(kernels, plan, grid, x, finish, ceil_div(blocks.rows, rows), threads,
                       parallel, [&](const Panels& panels, const Finish& here, int64_t part) {
    return multiply_rows(kernels, blocks, here, panels, longest, part * rows,
                         std::min((part + 1) * rows, blocks.rows));
  });
}

}  // namespace nmjax
