// N:M matmul: a few rows at a time for decoding, panels of many rows otherwise.
#include "drivers.h"
#include "panel_plan.h"

namespace nmjax {
namespace {

constexpr int64_t kRowsAtOnce = 8;
constexpr int64_t kStrip = 4096;    // outputs whose sums stay in the first-level cache
constexpr int64_t kFeatures = 64;   // whose pixels stay there

Outcome multiply_few_rows(const Kernels& kernels, const Groups& groups, const Finish& finish,
                          Tensor x, int64_t batch, int64_t threads, const ParallelFor& parallel) {
  const int64_t inputs = groups.groups * groups.m;
  const float* rows = static_cast<const float*>(x.data);
  if (x.type != Type::kF32) {
    thread_local Scratch memory;
    float* widened = memory.get<float>(batch * inputs);
    for (int64_t i = 0; i < batch * inputs; ++i) widened[i] = number_at(x, i);
    rows = widened;
  }
  const int64_t share = ceil_div(groups.outputs, threads == 1 ? 1 : 2 * threads);
  const int64_t strip = std::min(kStrip, ceil_div(share, 16) * 16);
  return parallel(ceil_div(groups.outputs, strip), [&](int64_t i) {
    thread_local Scratch sums, tables;
    const int64_t begin = i * strip, end = std::min(begin + strip, groups.outputs);
    kernels.groups_times_vectors({&groups, &finish, rows, batch, begin, end,
                                  sums.get<float>(kRowsAtOnce * (end - begin)),
                                  tables.get<float>(kRowsAtOnce * 8 * 16)});
    return Outcome::kGood;
  });
}

Outcome multiply_outputs(const Kernels& kernels, const Groups& groups, const Finish& finish,
                         const Panels& panels, int64_t groups_at_once, int64_t begin,
                         int64_t end) {
  thread_local Scratch sums, offsets, weights, transposed;
  GroupPanelTask task;
  task.groups = &groups;
  task.finish = &finish;
  task.panels = &panels;
  task.begin = begin;
  task.end = end;
  task.groups_at_once = groups_at_once;
  task.sums_stride = odd_lines(panels.count + panels.outputs);
  task.sums = sums.get<float>((end - begin) * task.sums_stride);
  const int64_t places = (end - begin) * groups_at_once * groups.n;
  task.offsets = offsets.get<int32_t>(places);
  task.weights = weights.get<float>(places);
  task.transposed = transposed.get<float>(kernels.lanes * (end - begin + 2 * kernels.lanes));
  kernels.groups_times_panels(task);
  return Outcome::kGood;
}

}  // namespace

Outcome multiply_groups(const Kernels& kernels, const Groups& groups, const Finish& finish,
                        Tensor x, int64_t batch, int64_t threads, const ParallelFor& all_threads) {
  const int64_t inputs = groups.groups * groups.m;
  threads = useful_threads(groups.groups * groups.n * groups.outputs * batch, threads);
  const ParallelFor& parallel = threads == 1 ? kOneByOne : all_threads;
  if (batch <= 2 * kRowsAtOnce) {
    return multiply_few_rows(kernels, groups, finish, x, batch, threads, parallel);
  }
  const Grid grid = make_grid(1, {1, batch}, {1, batch}, inputs, groups.outputs,
                              {{1, 1}, {1, 1}, {0, 0}, {1, 1}});
  // Where few are kept, sums would be read and written for few products: of fewer pixels, twice as
  // many features fit into the cache.
  const int64_t times = groups.m >= 8 * groups.n ? 2 : 1;
  int64_t tile = kernels.lanes;
  while (tile < kernels.group_tile / times && tile < batch) tile *= 2;
  const PanelPlan plan(grid, inputs, Type::kF32, tile);
  if (plan.stride * inputs > INT32_MAX) return Outcome::kTooLarge;
  const int64_t groups_at_once = ceil_div(times * kFeatures, 8 * groups.m) * 8;
  int64_t outputs = std::min<int64_t>(256, groups.outputs);
  while (threads > 1 && outputs > 32 && ceil_div(groups.outputs, outputs) < 4 * threads) {
    outputs = ceil_div(outputs / 2, 16) * 16;
  }
  return for_each_part(kernels, plan, grid, x, finish, ceil_div(groups.outputs, outputs), threads,
                       parallel, [&](const Panels& panels, const Finish& here, int64_t part) {
    return multiply_outputs(kernels, groups, here, panels, groups_at_once, part * outputs,
                            std::min((part + 1) * outputs, groups.outputs));
  });
}

}  // namespace nmjax
