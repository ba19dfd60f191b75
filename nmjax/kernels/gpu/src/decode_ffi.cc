// What XLA calls for products of few rows with packed 2:4 weights on NVIDIA's GPUs.
#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace nmjax {
namespace {

namespace ffi = xla::ffi;

ffi::Error refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("nmjax: decode: " + what);
}

std::optional<Numbers> numbers_of(ffi::DataType x, ffi::DataType values, ffi::DataType y) {
  if (x != y) return std::nullopt;
  if (x == ffi::BF16 && values == ffi::S8) return Numbers::kInt8;
  if (x != values) return std::nullopt;
  if (x == ffi::BF16) return Numbers::kBf16;
  if (x == ffi::F16) return Numbers::kF16;
  return std::nullopt;
}

// x (batch, inputs), y (batch, outputs).
ffi::Error run(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer values,
               ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> scales,
               ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y, bool relu,
               int64_t vector) {
  const auto in = x.dimensions(), out = y->dimensions();
  const auto numbers = numbers_of(x.element_type(), values.element_type(), y->element_type());
  if (in.size() != 2 || out.size() != 2 || in[0] != out[0]) return refuse("matrices expected");
  if (!numbers) return refuse("bfloat16 or float16 throughout expected, or values of int8");
  if (in[1] % 16 || out[1] % 16) return refuse("multiples of 16 inputs and outputs expected");
  if (vector != 0 && vector != 2 && vector != 4 && vector != 8) {
    return refuse("2, 4 or 8 outputs of a thread expected, or 0");
  }
  const auto size = [](const auto& buffer) { return static_cast<int64_t>(buffer.element_count()); };
  const int64_t scales_wanted = *numbers == Numbers::kInt8 ? out[1] : 0;
  if (size(values) != in[1] / 2 * out[1] || size(codes) != in[1] / 8 * out[1] ||
      size(scales) != scales_wanted || (size(bias) != 0 && size(bias) != out[1])) {
    return refuse("arrays of a packed weight do not fit each other");
  }
  if (in[0] == 0) return ffi::Error::Success();
  Decode work;
  work.x = static_cast<const uint16_t*>(x.untyped_data());
  work.values = values.untyped_data();
  work.codes = codes.typed_data();
  work.scales = size(scales) ? scales.typed_data() : nullptr;
  work.bias = size(bias) ? bias.typed_data() : nullptr;
  work.y = static_cast<uint16_t*>(y->untyped_data());
  work.batch = in[0];
  work.inputs = in[1];
  work.outputs = out[1];
  work.relu = relu;
  work.numbers = *numbers;
  work.vector = vector;
  const cudaError_t wrong = decode(work, stream);
  if (wrong == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("nmjax: decode: ") + cudaGetErrorString(wrong));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_decode, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()         // x
                                  .Arg<ffi::AnyBuffer>()         // values
                                  .Arg<ffi::Buffer<ffi::U8>>()   // codes
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scales; empty if none
                                  .Arg<ffi::Buffer<ffi::F32>>()  // bias; empty if none
                                  .Ret<ffi::AnyBuffer>()         // y
                                  .Attr<bool>("relu")
                                  .Attr<int64_t>("vector"),
                              {ffi::Traits::kCmdBufferCompatible});

extern "C" int nmjax_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

}  // namespace nmjax
