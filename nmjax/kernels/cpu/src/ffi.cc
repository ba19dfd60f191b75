// What XLA calls: decodes and checks arguments, and picks the kernels for this machine.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "drivers.h"
#include "panel_plan.h"
#include "xla/ffi/api/ffi.h"

namespace nmjax {
namespace {

namespace ffi = xla::ffi;

const Kernels* pick_kernels() {
  const Kernels* best = portable_kernels();
#ifdef NMJAX_X86
  __builtin_cpu_init();
  const char* wanted = std::getenv("NMJAX_KERNELS_ISA");
  const auto take = [&](const Kernels* kernels, bool runs) {
    if (runs && std::strcmp(best->name, wanted ? wanted : "") != 0) best = kernels;
  };
  take(avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  take(avx512_kernels(), avx512);
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  take(avx512_vnni_kernels(), vnni);
  take(avx512_bf16_kernels(), vnni && __builtin_cpu_supports("avx512bf16"));
#endif
  return best;
}

const Kernels& kernels() {
  static const Kernels* const picked = pick_kernels();
  return *picked;
}

std::optional<Type> type_of(const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::F32) return Type::kF32;
  if (buffer.element_type() == ffi::BF16) return Type::kBF16;
  return std::nullopt;
}

ffi::Error as_error(Outcome outcome) {
  switch (outcome) {
    case Outcome::kGood:
      return ffi::Error::Success();
    case Outcome::kIndexOutOfRange:
      return ffi::Error::InvalidArgument("nmjax: a packed weight has an index out of range");
    case Outcome::kOutOfMemory:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "nmjax: no memory for scratch space");
    case Outcome::kTooLarge:
      return ffi::Error::InvalidArgument("nmjax: an image is too large for 32-bit offsets");
  }
  return ffi::Error::Internal("nmjax: unknown outcome");
}

ffi::Error refuse(const char* what) {
  return ffi::Error::InvalidArgument(std::string("nmjax: ") + what);
}

// How large a window may be that comes from outside, so that nothing computed from it overflows.
constexpr int64_t kLargest = int64_t{1} << 24;

// Pixels of a dilated window that the image and the output do not have; panels hold these too.
constexpr double kMostGaps = 64;

// Why a window cannot be used, or null.
const char* misfit(ffi::Span<const int64_t> window, const int64_t (&input)[2],
                   const int64_t (&output)[2]) {
  double area = 1, reached = 1, pixels[2] = {1, 1};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t taps = window[axis], stride = window[2 + axis], before = window[4 + axis],
                  dilation = window[6 + axis];
    if (taps < 1 || stride < 1 || dilation < 1 || before < 0) {
      return "taps, strides and dilation start at 1, and padding at 0";
    }
    if (std::max({taps, stride, dilation, before}) > kLargest) return "the window is too large";
    reached *= taps;
    area *= output[axis] + static_cast<double>((taps - 1) * dilation / stride);
    pixels[0] *= input[axis];
    pixels[1] *= output[axis];
  }
  if (reached > kLargest) return "the window is too large";
  const bool fits = area <= kMostGaps * (pixels[0] + pixels[1] + 4096);
  return fits ? nullptr : "the dilated window is far larger than the image";
}

bool is_bias(const ffi::AnyBuffer& bias, int64_t outputs) {
  const int64_t count = bias.element_count();
  return count == 0 || (bias.element_type() == ffi::F32 && count == outputs);
}

// Whether whole == count * n * taps. Forged factors may overflow.
bool is_product(int64_t whole, int64_t count, int64_t n, int64_t taps) {
  if (count == 0) return whole == 0;
  int64_t block, product;
  return !__builtin_mul_overflow(n, taps, &block) &&
         !__builtin_mul_overflow(count, block, &product) && product == whole;
}

// Bytes of an index, or 0 if these are not unsigned integers.
int32_t index_bytes(ffi::DataType type) {
  if (type == ffi::U8) return 1;
  if (type == ffi::U16) return 2;
  return type == ffi::U32 ? 4 : 0;
}

// Reads where the blocks are; null, or why the arrays cannot be those of a packed weight.
const char* read_blocks(const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices,
                        const ffi::AnyBuffer& row_pointers, const ffi::AnyBuffer& bias,
                        int64_t outputs, Blocks& weight) {
  if (!index_bytes(indices.element_type())) return "unsigned indices expected";
  if (row_pointers.element_type() != ffi::S32) return "row pointers of int32 expected";
  weight.indices = indices.untyped_data();
  weight.index_bytes = index_bytes(indices.element_type());
  const bool uniform = row_pointers.element_count() == 0;
  const int64_t count = indices.element_count();
  weight.row_pointers = uniform ? nullptr : row_pointers.typed_data<int32_t>();
  weight.kept = uniform ? count / std::max<int64_t>(weight.rows, 1) : count;
  if (weight.rows * weight.n != outputs || (uniform && weight.rows * weight.kept != count) ||
      !is_product(values.element_count(), count, weight.n, weight.taps) ||
      !is_bias(bias, outputs)) {
    return "arrays of a packed weight do not fit each other";
  }
  if (uniform) return nullptr;
  if (static_cast<int64_t>(row_pointers.element_count()) != weight.rows + 1 ||
      weight.row_pointers[0] != 0 || weight.row_pointers[weight.rows] != count) {
    return "row pointers do not span the blocks";
  }
  for (int64_t row = 0; row < weight.rows; ++row) {
    if (weight.end(row) < weight.begin(row)) return "row pointers descend";
  }
  return nullptr;
}

// x (images, height, width, inputs), y (images, height, width, outputs).
ffi::Error any_blocks(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                      std::optional<Type> value_type, ffi::AnyBuffer indices,
                      ffi::AnyBuffer row_pointers, ffi::AnyBuffer bias, const float* scales,
                      ffi::Result<ffi::AnyBuffer> y, int64_t n, bool relu,
                      ffi::Span<const int64_t> window) {
  const auto in = x.dimensions(), out = y->dimensions();
  if (in.size() != 4 || out.size() != 4 || window.size() != 8) return refuse("four axes expected");
  const auto x_type = type_of(x), y_type = type_of(*y);
  if (!x_type || !value_type || !y_type) return refuse("float32 or bfloat16 expected");
  if (n < 1 || n > kLargest) return refuse("blocks of at least one output expected");
  if (out[0] != in[0]) return refuse("as many images out as in expected");
  if (const char* reason = misfit(window, {in[1], in[2]}, {out[1], out[2]})) return refuse(reason);
  const Window moves{{window[0], window[1]}, {window[2], window[3]}, {window[4], window[5]},
                     {window[6], window[7]}};
  Blocks weight;
  weight.values = {values.untyped_data(), *value_type};
  weight.n = n;
  weight.taps = moves.taps[0] * moves.taps[1];
  weight.inputs = in[3];
  weight.rows = out[3] / n;
  if (const char* reason = read_blocks(values, indices, row_pointers, bias, out[3], weight)) {
    return refuse(reason);
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const Finish finish{bias.element_count() ? bias.typed_data<float>() : nullptr, relu,
                      {y->untyped_data(), *y_type}, scales};
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const ParallelFor parallel = [&](int64_t tasks, const Task& task) {
    return parallel_for(pool, threads, tasks, task);
  };
  const auto work = [&](int64_t) {
    const Grid grid = make_grid(in[0], {in[1], in[2]}, {out[1], out[2]}, in[3], out[3], moves);
    return multiply_blocks(kernels(), weight, finish, {x.untyped_data(), *x_type}, grid, threads,
                           parallel);
  };
  return as_error(run(work, 0));
}

ffi::Error blocks(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                  ffi::AnyBuffer indices, ffi::AnyBuffer row_pointers, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, int64_t n, bool relu,
                  ffi::Span<const int64_t> window) {
  return any_blocks(pool, x, values, type_of(values), indices, row_pointers, bias, nullptr, y, n,
                    relu, window);
}

// Values of int8, and a scale for each output.
ffi::Error blocks_int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                       ffi::AnyBuffer indices, ffi::AnyBuffer row_pointers, ffi::AnyBuffer bias,
                       ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> y, int64_t n,
                       bool relu, ffi::Span<const int64_t> window) {
  const auto out = y->dimensions();
  if (values.element_type() != ffi::S8) return refuse("values of int8 expected");
  if (out.size() != 4 || static_cast<int64_t>(scales.element_count()) != out[3]) {
    return refuse("a scale for each output expected");
  }
  return any_blocks(pool, x, values, Type::kI8, indices, row_pointers, bias, scales.typed_data(), y,
                    n, relu, window);
}

// Rows x (batch, inputs) of int8 with a scale for each, y (batch, outputs).
ffi::Error integers(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> row_scales,
                    ffi::AnyBuffer values, ffi::AnyBuffer indices, ffi::AnyBuffer row_pointers,
                    ffi::AnyBuffer bias, ffi::Buffer<ffi::F32> scales,
                    ffi::Result<ffi::AnyBuffer> y, int64_t n, bool relu) {
  const auto in = x.dimensions(), out = y->dimensions();
  if (in.size() != 2 || out.size() != 2) return refuse("matrices expected");
  if (x.element_type() != ffi::S8 || values.element_type() != ffi::S8) {
    return refuse("inputs and values of int8 expected");
  }
  const auto y_type = type_of(*y);
  if (!y_type) return refuse("float32 or bfloat16 expected");
  if (n < 1 || n > kLargest) return refuse("blocks of at least one output expected");
  if (out[0] != in[0] || static_cast<int64_t>(row_scales.element_count()) != in[0] ||
      static_cast<int64_t>(scales.element_count()) != out[1]) {
    return refuse("a scale for each row and for each output expected");
  }
  // Beyond that a sum may not fit into 32 bits.
  if (in[1] > int64_t{1} << 17) return refuse("too many inputs for sums of 32 bits");
  Blocks weight;
  weight.values = {values.untyped_data(), Type::kI8};
  weight.n = n;
  weight.taps = 1;
  weight.inputs = in[1];
  weight.rows = out[1] / n;
  if (const char* reason = read_blocks(values, indices, row_pointers, bias, out[1], weight)) {
    return refuse(reason);
  }
  // Forged rows may have more blocks than there are inputs.
  for (int64_t row = 0; row < weight.rows; ++row) {
    if (weight.end(row) - weight.begin(row) > in[1]) return refuse("a row has too many blocks");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const Finish finish{bias.element_count() ? bias.typed_data<float>() : nullptr, relu,
                      {y->untyped_data(), *y_type}, scales.typed_data()};
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const ParallelFor parallel = [&](int64_t tasks, const Task& task) {
    return parallel_for(pool, threads, tasks, task);
  };
  const auto work = [&](int64_t) {
    return multiply_integers(kernels(), weight, finish, x.typed_data<int8_t>(),
                             row_scales.typed_data(), in[0], threads, parallel);
  };
  return as_error(run(work, 0));
}

// x (batch, inputs), y (batch, outputs).
ffi::Error groups(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                  int64_t m, bool relu) {
  const auto in = x.dimensions(), out = y->dimensions(), kept = values.dimensions();
  if (in.size() != 2 || out.size() != 2 || kept.size() != 3) return refuse("matrices expected");
  const auto x_type = type_of(x), value_type = type_of(values), y_type = type_of(*y);
  if (!x_type || !value_type || !y_type) return refuse("float32 or bfloat16 expected");
  Groups weight;
  weight.values = {values.untyped_data(), *value_type};
  weight.codes = codes.typed_data();
  weight.groups = kept[0];
  weight.n = kept[1];
  weight.m = m;
  weight.outputs = kept[2];
  if (m < 2 || m > 32 || weight.n < 1 || weight.n >= m || weight.outputs % 16 != 0) {
    return refuse("groups of 2 to 32 and a multiple of 16 outputs expected");
  }
  int64_t bits = 0;
  while (int64_t{1} << bits < m) ++bits;
  const bool bitmask = m < weight.n * bits;
  weight.width = bitmask ? 0 : bits;
  const int64_t bytes = ceil_div(weight.groups * (bitmask ? m : weight.n * bits), 8);
  if (in[1] != weight.groups * m || out[0] != in[0] || out[1] != weight.outputs ||
      static_cast<int64_t>(codes.element_count()) != bytes * weight.outputs ||
      !is_bias(bias, out[1])) {
    return refuse("arrays of a packed weight do not fit each other");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const Finish finish{bias.element_count() ? bias.typed_data<float>() : nullptr, relu,
                      {y->untyped_data(), *y_type}, nullptr};
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const ParallelFor parallel = [&](int64_t tasks, const Task& task) {
    return parallel_for(pool, threads, tasks, task);
  };
  const auto work = [&](int64_t) {
    return multiply_groups(kernels(), weight, finish, {x.untyped_data(), *x_type}, in[0], threads,
                           parallel);
  };
  return as_error(run(work, 0));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_groups, groups,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // x
                                  .Arg<ffi::AnyBuffer>()         // values
                                  .Arg<ffi::Buffer<ffi::U8>>()   // codes
                                  .Arg<ffi::AnyBuffer>()         // bias, float32; empty if none
                                  .Ret<ffi::AnyBuffer>()         // y
                                  .Attr<int64_t>("m")
                                  .Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_blocks, blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // values
                                  .Arg<ffi::AnyBuffer>()  // indices
                                  .Arg<ffi::AnyBuffer>()  // row pointers; empty if uniform
                                  .Arg<ffi::AnyBuffer>()  // bias, float32; empty if none
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Attr<int64_t>("n")
                                  .Attr<bool>("relu")
                                  .Attr<ffi::Span<const int64_t>>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_blocks_int8, blocks_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // x
                                  .Arg<ffi::AnyBuffer>()         // values, int8
                                  .Arg<ffi::AnyBuffer>()         // indices
                                  .Arg<ffi::AnyBuffer>()         // row pointers; empty if uniform
                                  .Arg<ffi::AnyBuffer>()         // bias, float32; empty if none
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scales
                                  .Ret<ffi::AnyBuffer>()         // y
                                  .Attr<int64_t>("n")
                                  .Attr<bool>("relu")
                                  .Attr<ffi::Span<const int64_t>>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_integers, integers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // x, int8
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scales of the rows
                                  .Arg<ffi::AnyBuffer>()         // values, int8
                                  .Arg<ffi::AnyBuffer>()         // indices
                                  .Arg<ffi::AnyBuffer>()         // row pointers; empty if uniform
                                  .Arg<ffi::AnyBuffer>()         // bias, float32; empty if none
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scales of the outputs
                                  .Ret<ffi::AnyBuffer>()         // y
                                  .Attr<int64_t>("n")
                                  .Attr<bool>("relu"));

extern "C" const char* nmjax_instruction_set() { return kernels().name; }
extern "C" int nmjax_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

}  // namespace nmjax
