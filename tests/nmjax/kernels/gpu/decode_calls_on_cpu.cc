// What XLA calls for products of few rows, as a call on the CPU: there is no stream, and the kernel
// runs as decode_on_cpu.cc runs it.
#include "decode_on_cpu.cc"

#include "decode_ffi.cc"

namespace nmjax {

// As the real one picks a variant, among those that decode_on_cpu knows.
cudaError_t decode(const Decode& work, cudaStream_t) {
  const int64_t outputs = work.vector ? work.vector : work.outputs % 64 ? 2 : 8;
  const int tiles = work.batch <= 8 ? 1 : work.batch <= 16 ? 2 : work.batch <= 32 ? 4 : 8;
  const bool ran = decode_on_cpu(static_cast<int>(work.numbers), static_cast<int>(outputs), tiles,
                                 work.x, work.values, work.codes, work.scales, work.bias, work.y,
                                 work.batch, work.inputs, work.outputs, work.relu);
  return ran ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace nmjax

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error call(ffi::AnyBuffer x, ffi::AnyBuffer values, ffi::Buffer<ffi::U8> codes, Floats scales,
                Floats bias, ffi::Result<ffi::AnyBuffer> y, bool relu, int64_t vector) {
  return nmjax::run(nullptr, x, values, codes, scales, bias, y, relu, vector);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(on_cpu_decode, call,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("relu")
                                  .Attr<int64_t>("vector"));
