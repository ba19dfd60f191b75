// cuSPARSELt for CPUs, as far as nmjax calls it: by definition, one element after the other, from
// what the descriptors say. What it refuses and how much memory it wants is as recorded of version
// 0.10.0, see cusparselt_plans.h; its compressed form is its own. And calls of nmjax's plans for
// ctypes.
#include "cusparselt_plans.h"

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Matrix {
  int64_t rows, cols, ld;
  cudaDataType type;
  cusparseOrder_t order;
  bool structured;
  int64_t at(int64_t i, int64_t j) const {
    return order == CUSPARSE_ORDER_COL ? i + j * ld : i * ld + j;
  }
};
struct Matmul {
  cusparseOperation_t op_a, op_b;
  const Matrix *a, *b, *d;
  int relu, gelu;
  const void* bias;
};
struct Selection {
  int config, split_k, mode;
};
struct Plan {
  const Matmul* matmul;
  Selection* selection;
};

int counts[4];  // Handles, plans made, plans destroyed, matrices alive.

template <typename T, typename Opaque>
T& as(const Opaque* opaque) {
  static_assert(sizeof(T) <= sizeof(Opaque));
  return *reinterpret_cast<T*>(const_cast<Opaque*>(opaque));
}

size_t width(cudaDataType type) {
  if (type == CUDA_R_8I || type == CUDA_R_8F_E4M3) return 1;
  return type == CUDA_R_32F || type == CUDA_R_32I ? 4 : 2;
}

double from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 128 ? -size : size;
}

double read(const void* data, int64_t at, cudaDataType type) {
  if (type == CUDA_R_8I) return static_cast<const int8_t*>(data)[at];
  if (type == CUDA_R_8F_E4M3) return from_e4m3(static_cast<const uint8_t*>(data)[at]);
  if (type == CUDA_R_32I) return static_cast<const int32_t*>(data)[at];
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[at];
  if (type == CUDA_R_16F) return static_cast<double>(static_cast<const _Float16*>(data)[at]);
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void write(void* data, int64_t at, cudaDataType type, double value) {
  if (type == CUDA_R_8I) {
    const double near = std::nearbyint(value);
    static_cast<int8_t*>(data)[at] = static_cast<int8_t>(near < -128 ? -128 : std::fmin(near, 127));
  }
  if (type == CUDA_R_32I) static_cast<int32_t*>(data)[at] = static_cast<int32_t>(value);
  if (type == CUDA_R_32F) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (type == CUDA_R_16F) static_cast<_Float16*>(data)[at] = static_cast<_Float16>(value);
  if (type != CUDA_R_16BF) return;
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(bits >> 16);
}

// Where op(m)(i, j) is, and what.
int64_t place(const Matrix& m, cusparseOperation_t op, int64_t i, int64_t j) {
  return op == CUSPARSE_OPERATION_TRANSPOSE ? m.at(j, i) : m.at(i, j);
}
double element(const Matrix& m, cusparseOperation_t op, const void* data, int64_t i, int64_t j) {
  return read(data, place(m, op, i, j), m.type);
}

int64_t kept_bytes(const Matrix& m) { return m.rows * m.cols / 2 * width(m.type); }

int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

int64_t code_bytes(const Matrix& m) {
  const int64_t lines = m.order == CUSPARSE_ORDER_COL ? m.cols : m.rows;
  const int64_t length = m.order == CUSPARSE_ORDER_COL ? m.rows : m.cols;
  if (width(m.type) == 1) return up(lines, 64) * up(length, 128) / 4;
  const int64_t one = up(lines, 32) * up(length, 64), other = up(lines, 64) * up(length, 32);
  return (one > other ? one : other) / 8;
}

int64_t scratch_bytes(const Matrix& m) { return code_bytes(m) / (width(m.type) == 1 ? 2 : 1); }

// Whether op(m) runs along the sum from one number to the next; of B the sum is over rows.
bool is_contiguous(const Matrix& m, cusparseOperation_t op, bool is_a) {
  const bool along_columns = is_a == (op == CUSPARSE_OPERATION_NON_TRANSPOSE);
  return along_columns == (m.order == CUSPARSE_ORDER_ROW);
}

bool has_result(cudaDataType type, cudaDataType result) {
  if (type == CUDA_R_8I) return result != CUDA_R_32F && result != CUDA_R_8F_E4M3;
  if (type == CUDA_R_8F_E4M3) return result != CUDA_R_8I && width(result) > 1 && result != CUDA_R_32I;
  return type == result;
}

cusparseStatus_t describe(cusparseLtMatDescriptor_t* m, const Matrix& matrix, uint32_t alignment) {
  const int64_t step = (matrix.structured ? 32 : 16) / width(matrix.type);
  if (alignment != 16 || matrix.rows % step || matrix.cols % step || matrix.ld % step) {
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  }
  if (matrix.ld < (matrix.order == CUSPARSE_ORDER_COL ? matrix.rows : matrix.cols)) {
    return CUSPARSE_STATUS_INVALID_VALUE;
  }
  as<Matrix>(m) = matrix;
  ++counts[3];
  return CUSPARSE_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

const char* cusparseLtGetErrorString(cusparseStatus_t status) {
  return status == CUSPARSE_STATUS_NOT_SUPPORTED ? "not supported" : "invalid value";
}
cusparseStatus_t cusparseLtInit(cusparseLtHandle_t*) {
  ++counts[0];
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t*,
                                               cusparseLtMatDescriptor_t* m, int64_t rows,
                                               int64_t cols, int64_t ld, uint32_t alignment,
                                               cudaDataType type, cusparseOrder_t order) {
  return describe(m, {rows, cols, ld, type, order, false}, alignment);
}
cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t*,
                                                    cusparseLtMatDescriptor_t* m, int64_t rows,
                                                    int64_t cols, int64_t ld, uint32_t alignment,
                                                    cudaDataType type, cusparseOrder_t order,
                                                    cusparseLtSparsity_t) {
  return describe(m, {rows, cols, ld, type, order, true}, alignment);
}
cusparseStatus_t cusparseLtMatDescriptorDestroy(const cusparseLtMatDescriptor_t*) {
  --counts[3];
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulDescriptorInit(
    const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* matmul, cusparseOperation_t op_a,
    cusparseOperation_t op_b, const cusparseLtMatDescriptor_t* a,
    const cusparseLtMatDescriptor_t* b, const cusparseLtMatDescriptor_t* c,
    const cusparseLtMatDescriptor_t* d, cusparseComputeType sums) {
  const Matrix &left = as<Matrix>(a), &right = as<Matrix>(b), &out = as<Matrix>(d);
  if (c != d || !left.structured || left.type != right.type || !has_result(left.type, out.type)) {
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  }
  if (width(left.type) == 1 &&
      !(is_contiguous(left, op_a, true) && is_contiguous(right, op_b, false))) {
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  }
  if (sums != (left.type == CUDA_R_8I ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F)) {
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  }
  as<Matmul>(matmul) = {op_a, op_b, &left, &right, &out, 0, 0, nullptr};
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulDescSetAttribute(const cusparseLtHandle_t*,
                                                  cusparseLtMatmulDescriptor_t* matmul,
                                                  cusparseLtMatmulDescAttribute_t what,
                                                  const void* data, size_t bytes) {
  auto& m = as<Matmul>(matmul);
  if (what == CUSPARSELT_MATMUL_BIAS_POINTER) std::memcpy(&m.bias, data, bytes);
  if (what == CUSPARSELT_MATMUL_ACTIVATION_RELU) std::memcpy(&m.relu, data, bytes);
  if (what == CUSPARSELT_MATMUL_ACTIVATION_GELU) {
    if (!(m.a->type == CUDA_R_8I && m.d->type == CUDA_R_8I) &&
        !(m.a->type == CUDA_R_8F_E4M3 && m.d->type == CUDA_R_16BF)) {
      return CUSPARSE_STATUS_INVALID_VALUE;
    }
    std::memcpy(&m.gelu, data, bytes);
  }
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t*,
                                                  cusparseLtMatmulAlgSelection_t* selection,
                                                  const cusparseLtMatmulDescriptor_t*,
                                                  cusparseLtMatmulAlg_t) {
  as<Selection>(selection) = {0, -1, 0};  // As its log shows.
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(const cusparseLtMatmulAlgSelection_t*) {
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSetAttribute(const cusparseLtHandle_t*,
                                                 cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t what,
                                                 const void* data, size_t bytes) {
  auto& s = as<Selection>(selection);
  if (what == CUSPARSELT_MATMUL_ALG_CONFIG_ID) std::memcpy(&s.config, data, bytes);
  if (what == CUSPARSELT_MATMUL_SPLIT_K) std::memcpy(&s.split_k, data, bytes);
  if (what == CUSPARSELT_MATMUL_SPLIT_K_MODE) std::memcpy(&s.mode, data, bytes);
  const bool is_mode = what == CUSPARSELT_MATMUL_SPLIT_K_MODE;
  const bool is_wrong = what == CUSPARSELT_MATMUL_SPLIT_K ? s.split_k < 1 : is_mode && s.mode > 4;
  return s.config > 9 || is_wrong ? CUSPARSE_STATUS_INVALID_VALUE : CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgGetAttribute(const cusparseLtHandle_t*,
                                                 const cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t what, void* data,
                                                 size_t bytes) {
  const auto& s = as<Selection>(selection);
  if (what == CUSPARSELT_MATMUL_ALG_CONFIG_ID) std::memcpy(data, &s.config, bytes);
  if (what == CUSPARSELT_MATMUL_SPLIT_K) std::memcpy(data, &s.split_k, bytes);
  if (what == CUSPARSELT_MATMUL_SPLIT_K_MODE) std::memcpy(data, &s.mode, bytes);
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t*, cusparseLtMatmulPlan_t* plan,
                                          const cusparseLtMatmulDescriptor_t* matmul,
                                          const cusparseLtMatmulAlgSelection_t* selection) {
  as<Plan>(plan) = {&as<Matmul>(matmul), &as<Selection>(selection)};
  ++counts[1];
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulPlanDestroy(const cusparseLtMatmulPlan_t*) {
  ++counts[2];
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t*,
                                              const cusparseLtMatmulPlan_t* plan, size_t* bytes) {
  const auto& p = as<Plan>(plan);
  *bytes = scratch_bytes(*p.matmul->a) * (p.selection->split_k < 1 ? 1 : p.selection->split_k);
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtSpMMACompressedSize2(const cusparseLtHandle_t*,
                                                const cusparseLtMatDescriptor_t* m, size_t* bytes,
                                                size_t* scratch) {
  const auto& a = as<Matrix>(m);
  *bytes = kept_bytes(a) + code_bytes(a);
  *scratch = scratch_bytes(a);
  return CUSPARSE_STATUS_SUCCESS;
}
// The kept values one after the other, then where each was in its group.
cusparseStatus_t cusparseLtSpMMACompress2(const cusparseLtHandle_t*,
                                          const cusparseLtMatDescriptor_t* m, int is_a,
                                          cusparseOperation_t op, const void* dense, void* out,
                                          void*, cudaStream_t) {
  const auto& a = as<Matrix>(m);
  const bool flip = op == CUSPARSE_OPERATION_TRANSPOSE;
  const int64_t rows = flip ? a.cols : a.rows, inner = flip ? a.rows : a.cols;
  auto* where = static_cast<uint8_t*>(out) + kept_bytes(a);
  std::memset(where, 0, rows * inner / 8);
  int64_t to = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < inner; k += 4) {
      int64_t used = 0;
      for (int j = 0; j < 4; ++j) {
        const double value = element(a, op, dense, i, k + j);
        if (value == 0 && 4 - j > 2 - used) continue;
        if (used == 2) {
          if (value == 0) continue;
          return CUSPARSE_STATUS_INVALID_VALUE;
        }
        const size_t bytes = width(a.type);
        std::memcpy(static_cast<char*>(out) + (to + used) * bytes,
                    static_cast<const char*>(dense) + place(a, op, i, k + j) * bytes, bytes);
        where[(to + used) / 4] |= j << 2 * ((to + used) % 4);
        ++used;
      }
      to += 2;
    }
  }
  return is_a ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_NOT_SUPPORTED;
}
cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t*, const cusparseLtMatmulPlan_t* plan,
                                  const void* alpha, const void* compressed, const void* b,
                                  const void* beta, const void*, void* out, void*, cudaStream_t*,
                                  int32_t streams) {
  const Matmul& m = *as<Plan>(plan).matmul;
  const bool flip = m.op_a == CUSPARSE_OPERATION_TRANSPOSE;
  const int64_t inner = flip ? m.a->rows : m.a->cols;
  const auto* where = static_cast<const uint8_t*>(compressed) + kept_bytes(*m.a);
  if (streams != 1 || *static_cast<const float*>(alpha) != 1 ||
      *static_cast<const float*>(beta) != 0) {
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  }
  for (int64_t i = 0; i < m.d->rows; ++i) {
    for (int64_t j = 0; j < m.d->cols; ++j) {
      double sum =
          m.bias ? read(m.bias, i, m.a->type == CUDA_R_8I ? CUDA_R_32F : m.d->type) : 0;
      for (int64_t slot = 0; slot < inner / 2; ++slot) {
        const int64_t at = i * inner / 2 + slot;
        const int64_t k = slot / 2 * 4 + (where[at / 4] >> 2 * (at % 4) & 3);
        sum += read(compressed, at, m.a->type) * element(*m.b, m.op_b, b, k, j);
      }
      if (m.relu && sum < 0) sum = 0;
      if (m.gelu) {
        sum *= (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum))) / 2;
      }
      write(out, m.d->at(i, j), m.d->type, sum);
    }
  }
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulSearch(const cusparseLtHandle_t* handle,
                                        cusparseLtMatmulPlan_t* plan, const void* alpha,
                                        const void* a, const void* b, const void* beta,
                                        const void* c, void* d, void* workspace,
                                        cudaStream_t* streams, int32_t count) {
  // One thing to be found for each batch.
  const Selection found[] = {{7, 2, CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS}, {6, -1, 1}, {5, -1, 4},
                             {4, 3, 6}, {3, -1, 6}};
  *as<Plan>(plan).selection = found[as<Plan>(plan).matmul->d->cols / 8 - 1];
  return cusparseLtMatmul(handle, plan, alpha, a, b, beta, c, d, workspace, streams, count);
}

// What the tests call: a device of the given number; "" or what went wrong.
static std::string said;

const char* test_compress(int ordinal, int64_t rows, int64_t columns, int transposed, int type,
                          const void* dense, void* compressed, int64_t bytes, int64_t workspace) {
  said = nmjax::device(ordinal).compress(
      {rows, columns, transposed != 0, static_cast<cudaDataType>(type)}, dense,
      {compressed, static_cast<size_t>(bytes)}, {nullptr, static_cast<size_t>(workspace)}, nullptr);
  return said.c_str();
}

const char* test_start(int ordinal) {
  said = nmjax::device(ordinal).prepare();
  return said.c_str();
}

const char* test_multiply(int ordinal, int64_t rows, int64_t columns, int transposed, int type,
                          int64_t batch, int result_type, int activation, const void* bias,
                          const int* algorithm, const void* x, const void* compressed, void* y,
                          int64_t workspace, int threads, int prepared) {
  nmjax::Product product;
  product.weight = {rows, columns, transposed != 0, static_cast<cudaDataType>(type)};
  product.batch = batch;
  product.result_type = static_cast<cudaDataType>(result_type);
  product.activation = static_cast<nmjax::Activation>(activation);
  product.bias = bias;
  product.algorithm = {algorithm[0], algorithm[1], algorithm[2]};
  if (prepared) {
    said = nmjax::device(ordinal).prepare(product);
    if (prepared == 2 || !said.empty()) return said.c_str();
  }
  std::vector<std::string> all(threads);
  std::vector<std::thread> running;
  for (auto& one : all) {
    running.emplace_back([&] {
      one = nmjax::device(ordinal).multiply(product, x, compressed, y,
                                            {nullptr, static_cast<size_t>(workspace)}, nullptr);
    });
  }
  for (auto& thread : running) thread.join();
  said = all[0];
  return said.c_str();
}

const char* test_search(int ordinal, int64_t rows, int64_t columns, int type, int64_t batch,
                        const void* x, const void* compressed, void* y, int64_t* four) {
  nmjax::Product product;
  product.weight = {rows, columns, false, static_cast<cudaDataType>(type)};
  product.batch = batch;
  product.result_type = product.weight.type;
  nmjax::Found found;
  said = nmjax::device(ordinal).search(product, x, compressed, y, {nullptr, 4096}, nullptr, &found);
  four[0] = found.algorithm.config;
  four[1] = found.algorithm.split_k;
  four[2] = found.algorithm.split_k_mode;
  four[3] = static_cast<int64_t>(found.workspace);
  return said.c_str();
}

void test_counts(int* four) { std::memcpy(four, counts, sizeof(counts)); }

}  // extern "C"
