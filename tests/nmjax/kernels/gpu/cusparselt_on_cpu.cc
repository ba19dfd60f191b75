// What XLA calls for products by cuSPARSELt, as calls on the CPU, with fake_cusparselt.cc behind
// them: there is no stream, and setting up comes just before what it is for.
#include "cusparselt.cc"

namespace {

namespace ffi = xla::ffi;
using Bytes = ffi::Result<ffi::Buffer<ffi::U8>>;

ffi::Error compress(ffi::AnyBuffer w, Bytes compressed, Bytes workspace, bool transposed) {
  const auto wrong = nmjax::start(nullptr, 0, w, compressed, workspace, transposed);
  if (wrong.failure()) return wrong;
  return nmjax::compress(nullptr, 0, w, compressed, workspace, transposed);
}

ffi::Error matmul(ffi::AnyBuffer x, ffi::Buffer<ffi::U8> compressed, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, Bytes workspace, bool transposed,
                  std::string_view activation, ffi::Span<const int64_t> algorithm) {
  const auto wrong = nmjax::prepare(nullptr, 0, x, compressed, bias, y, workspace, transposed,
                                    activation, algorithm);
  if (wrong.failure()) return wrong;
  return nmjax::matmul(nullptr, 0, x, compressed, bias, y, workspace, transposed, activation,
                       algorithm);
}

ffi::Error search(ffi::AnyBuffer x, ffi::Buffer<ffi::U8> compressed, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, Bytes workspace, bool transposed,
                  std::string_view activation, ffi::Span<const int64_t> algorithm) {
  return nmjax::search(nullptr, 0, x, compressed, bias, y, workspace, transposed, activation,
                       algorithm);
}

auto bind_product() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::U8>>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::U8>>()
      .Attr<bool>("transposed")
      .Attr<std::string_view>("activation")
      .Attr<ffi::Span<const int64_t>>("algorithm");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(on_cpu_compress, compress,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(on_cpu_matmul, matmul, bind_product());
XLA_FFI_DEFINE_HANDLER_SYMBOL(on_cpu_search, search, bind_product());
