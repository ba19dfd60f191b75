// What XLA calls on NVIDIA's GPUs for products by cuSPARSELt.
//
// Workspace and compressed weights are results, not scratch memory: a CUDA graph is replayed after
// the handler has returned, when scratch memory is somebody else's.
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "cusparselt_plans.h"
#include "xla/ffi/api/ffi.h"

namespace nmjax {
namespace {

namespace ffi = xla::ffi;

std::optional<cudaDataType> type_of(ffi::DataType type) {
  switch (type) {
    case ffi::BF16:
      return CUDA_R_16BF;
    case ffi::F16:
      return CUDA_R_16F;
    case ffi::F32:
      return CUDA_R_32F;
    case ffi::S8:
      return CUDA_R_8I;
    case ffi::S32:
      return CUDA_R_32I;
    case ffi::F8E4M3FN:
      return CUDA_R_8F_E4M3;
    default:
      return std::nullopt;
  }
}

ffi::Error as_error(const Complaint& wrong) {
  if (wrong.empty()) return ffi::Error::Success();
  return ffi::Error::Internal("nmjax: cuSPARSELt: " + wrong);
}

ffi::Error refuse(const char* what) {
  return ffi::Error::InvalidArgument(std::string("nmjax: cuSPARSELt: ") + what);
}

Room room(ffi::Result<ffi::Buffer<ffi::U8>>& buffer) {
  return {buffer->untyped_data(), buffer->size_bytes()};
}

// Before anything runs or is recorded: cuSPARSELt's own memory is not allocated in a CUDA graph.
ffi::Error start(cudaStream_t, int32_t ordinal, ffi::AnyBuffer, ffi::Result<ffi::Buffer<ffi::U8>>,
                 ffi::Result<ffi::Buffer<ffi::U8>>, bool) {
  return as_error(device(ordinal).prepare());
}

// w (rows, columns) -> compressed.
ffi::Error compress(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer w,
                    ffi::Result<ffi::Buffer<ffi::U8>> compressed,
                    ffi::Result<ffi::Buffer<ffi::U8>> workspace, bool transposed) {
  const auto type = type_of(w.element_type());
  const auto shape = w.dimensions();
  if (!type || shape.size() != 2) return refuse("a matrix of a known dtype expected");
  return as_error(device(ordinal).compress({shape[0], shape[1], transposed, *type},
                                           w.untyped_data(), room(compressed), room(workspace),
                                           stream));
}

// The product of x (batch, inputs) with a compressed weight into y (batch, outputs).
std::optional<Product> product_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& bias,
                                  const ffi::AnyBuffer& y, bool transposed,
                                  std::string_view activation,
                                  ffi::Span<const int64_t> algorithm) {
  const auto in = x.dimensions(), out = y.dimensions();
  const auto type = type_of(x.element_type()), result_type = type_of(y.element_type());
  if (in.size() != 2 || out.size() != 2 || in[0] != out[0] || !type || !result_type ||
      algorithm.size() != 3) {
    return std::nullopt;
  }
  Product product;
  product.weight = {transposed ? out[1] : in[1], transposed ? in[1] : out[1], transposed, *type};
  product.batch = in[0];
  product.result_type = *result_type;
  if (activation == "relu") product.activation = Activation::kRelu;
  if (activation == "gelu") product.activation = Activation::kGelu;
  product.algorithm = {static_cast<int>(algorithm[0]), static_cast<int>(algorithm[1]),
                       static_cast<int>(algorithm[2])};
  if (bias.element_count() == 0) return product;
  if (type_of(bias.element_type()) != product.bias_type() ||
      static_cast<int64_t>(bias.element_count()) != out[1]) {
    return std::nullopt;
  }
  product.bias = bias.untyped_data();
  return product;
}

// Before anything runs or is recorded; the buffers have no contents yet, but their addresses.
ffi::Error prepare(cudaStream_t, int32_t ordinal, ffi::AnyBuffer x, ffi::Buffer<ffi::U8>,
                   ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Result<ffi::Buffer<ffi::U8>>, bool transposed,
                   std::string_view activation, ffi::Span<const int64_t> algorithm) {
  const auto product = product_of(x, bias, *y, transposed, activation, algorithm);
  if (!product) return refuse("x, bias and y do not fit each other");
  if (y->element_count() == 0) return ffi::Error::Success();
  return as_error(device(ordinal).prepare(*product));
}

ffi::Error matmul(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer x,
                  ffi::Buffer<ffi::U8> compressed, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::Buffer<ffi::U8>> workspace,
                  bool transposed, std::string_view activation,
                  ffi::Span<const int64_t> algorithm) {
  const auto product = product_of(x, bias, *y, transposed, activation, algorithm);
  if (!product) return refuse("x, bias and y do not fit each other");
  if (y->element_count() == 0) return ffi::Error::Success();
  return as_error(device(ordinal).multiply(*product, x.untyped_data(), compressed.untyped_data(),
                                           y->untyped_data(), room(workspace), stream));
}

std::mutex found_mutex;
Found found;

// As matmul; `nmjax_cusparselt_found` then says which kernel was fastest.
ffi::Error search(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer x,
                  ffi::Buffer<ffi::U8> compressed, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::Buffer<ffi::U8>> workspace,
                  bool transposed, std::string_view activation,
                  ffi::Span<const int64_t> algorithm) {
  const auto product = product_of(x, bias, *y, transposed, activation, algorithm);
  if (!product) return refuse("x, bias and y do not fit each other");
  Found fastest;
  const Complaint wrong =
      device(ordinal).search(*product, x.untyped_data(), compressed.untyped_data(),
                             y->untyped_data(), room(workspace), stream, &fastest);
  const std::lock_guard<std::mutex> turn(found_mutex);
  found = fastest;
  return as_error(wrong);
}

template <ffi::ExecutionStage kStage>
auto bind_compression() {
  return ffi::Ffi::Bind<kStage>()
      .template Ctx<ffi::PlatformStream<cudaStream_t>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()        // w (rows, columns)
      .template Ret<ffi::Buffer<ffi::U8>>()  // compressed
      .template Ret<ffi::Buffer<ffi::U8>>()  // workspace
      .template Attr<bool>("transposed");
}

template <ffi::ExecutionStage kStage>
auto bind_product() {
  return ffi::Ffi::Bind<kStage>()
      .template Ctx<ffi::PlatformStream<cudaStream_t>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()        // x (batch, inputs)
      .template Arg<ffi::Buffer<ffi::U8>>()  // compressed weight
      .template Arg<ffi::AnyBuffer>()        // bias, see `Product::bias_type`; empty if none
      .template Ret<ffi::AnyBuffer>()        // y (batch, outputs)
      .template Ret<ffi::Buffer<ffi::U8>>()  // workspace
      .template Attr<bool>("transposed")
      .template Attr<std::string_view>("activation")  // "none", "relu" or "gelu"
      .template Attr<ffi::Span<const int64_t>>("algorithm");
}

constexpr auto kInitialize = ffi::ExecutionStage::kInitialize;
constexpr auto kExecute = ffi::ExecutionStage::kExecute;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_cusparselt_start, start, bind_compression<kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_cusparselt_compress, compress, bind_compression<kExecute>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_cusparselt_prepare, prepare, bind_product<kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_cusparselt_matmul, matmul, bind_product<kExecute>(),
                              {ffi::Traits::kCmdBufferCompatible});

// It synchronizes with the device, so no CUDA graph takes it.
XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_cusparselt_search, search, bind_product<kExecute>());

// What the last search of this process found: config, split_k, split_k_mode, bytes of workspace.
extern "C" void nmjax_cusparselt_found(int64_t* four) {
  const std::lock_guard<std::mutex> turn(found_mutex);
  four[0] = found.algorithm.config;
  four[1] = found.algorithm.split_k;
  four[2] = found.algorithm.split_k_mode;
  four[3] = static_cast<int64_t>(found.workspace);
}

extern "C" int nmjax_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

}  // namespace nmjax
