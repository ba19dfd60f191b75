// Whole operations, cut into tasks for the threads.
#pragma once

#include "grid.h"
#include "parallel.h"
#include "tasks.h"

namespace nmjax {

// Few enough pixels to multiply outputs by outputs, without a panel.
constexpr int64_t kFewPixels = 8;

Outcome multiply_blocks(const Kernels& kernels, const Blocks& blocks, const Finish& finish, Tensor x,
                        const Grid& grid, int64_t threads, const ParallelFor& parallel);

// x (batch, inputs) of int8, and a scale for each of its rows.
Outcome multiply_integers(const Kernels& kernels, const Blocks& blocks, const Finish& finish,
                          const int8_t* x, const float* row_scales, int64_t batch, int64_t threads,
                          const ParallelFor& parallel);

Outcome multiply_groups(const Kernels& kernels, const Groups& groups, const Finish& finish, Tensor x,
                        int64_t batch, int64_t threads, const ParallelFor& parallel);

}  // namespace nmjax
