// Products with 2:4 weights by cuSPARSELt. What it sets up for a device and a shape is kept.
//
// JAX's row-major arrays are column-major ones transposed, so y = x W is computed as
// y^T = W^T x^T with W^T as cuSPARSELt's structured operand: nothing is transposed in memory.
//
// What cuSPARSELt takes is from NVIDIA's documentation and samples (docs.nvidia.com/cuda/cusparselt,
// NVIDIA/CUDALibrarySamples), and from what version 0.10.0 answered on an L4, an L40S and an RTX PRO
// 6000, as recorded in pantheongpu/pantheonsim (nvidia/tests/data/lowprec, nvidia/src):
// - rows, columns and leading dimensions, all in elements, are multiples of 16 bytes, of 32 bytes in
//   the structured matrix;
// - one-byte operands both have to be contiguous along the sum: W as (outputs, inputs), x as it is;
// - C and D have one layout and type; scales of float8 operands are not needed, and are ignored.
#pragma once

#include <cusparseLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

namespace nmjax {

// A matrix W (rows, columns) as JAX stores it; y = x W, or y = x W^T if `transposed`.
struct Weight {
  int64_t rows = 0, columns = 0;
  bool transposed = false;
  cudaDataType type = CUDA_R_16BF;

  int64_t inputs() const { return transposed ? columns : rows; }
  int64_t outputs() const { return transposed ? rows : columns; }
  cusparseOperation_t op() const {
    return transposed ? CUSPARSE_OPERATION_TRANSPOSE : CUSPARSE_OPERATION_NON_TRANSPOSE;
  }
};

// One of cuSPARSELt's kernels; what a search finds. A negative config is cuSPARSELt's own first
// choice, a split_k below 2 none, mode 0 its own.
struct Algorithm {
  int config = -1, split_k = 1, split_k_mode = 0;
};

struct Found {
  Algorithm algorithm;
  size_t workspace = 0;  // Bytes that it needs.
};

enum class Activation { kNone, kRelu, kGelu };

struct Product {
  Weight weight;
  int64_t batch = 0;
  cudaDataType result_type = CUDA_R_16BF;
  Activation activation = Activation::kNone;
  const void* bias = nullptr;  // `outputs` numbers of `bias_type`.
  Algorithm algorithm;

  // One number for each row of D: of D's type, but float for int8 operands whatever D is (NVIDIA's
  // sample matmul_advanced).
  cudaDataType bias_type() const {
    return weight.type == CUDA_R_8I ? CUDA_R_32F : result_type;
  }
};

struct Room {
  void* data = nullptr;
  size_t bytes = 0;
};

// What went wrong, or empty.
using Complaint = std::string;

#define NMJAX_CHECK(call)                                                             \
  do {                                                                                \
    const cusparseStatus_t status = (call);                                           \
    if (status != CUSPARSE_STATUS_SUCCESS) {                                          \
      return Complaint(#call).substr(0, std::string(#call).find('(')) + ": " +        \
             cusparseLtGetErrorString(status);                                        \
    }                                                                                 \
  } while (false)

inline Complaint too_small(const char* what, size_t wanted, const Room& room) {
  if (wanted <= room.bytes) return {};
  return "cuSPARSELt wants " + std::to_string(wanted) + " bytes " + what + ", there are " +
         std::to_string(room.bytes) + ": raise the bound in nmjax/kernels/gpu/cusparselt_limits.py";
}

inline Complaint describe(const cusparseLtHandle_t& handle, const Weight& weight,
                          cusparseLtMatDescriptor_t* matrix) {
  NMJAX_CHECK(cusparseLtStructuredDescriptorInit(
      &handle, matrix, weight.columns, weight.rows, weight.columns, 16, weight.type,
      CUSPARSE_ORDER_COL, CUSPARSELT_SPARSITY_50_PERCENT));
  return {};
}

// The descriptors of one product. cuSPARSELt keeps pointers to them: a plan does not move.
class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (planned_) cusparseLtMatmulPlanDestroy(&plan);
    if (selected_) cusparseLtMatmulAlgSelectionDestroy(&selection);
    for (int i = 0; i < described_; ++i) cusparseLtMatDescriptorDestroy(matrices_[i]);
  }

  Complaint make(const cusparseLtHandle_t& handle, const Product& product) {
    const Weight& w = product.weight;
    if (Complaint wrong = describe(handle, w, &structured_); !wrong.empty()) return wrong;
    ++described_;
    NMJAX_CHECK(cusparseLtDenseDescriptorInit(&handle, &x_, w.inputs(), product.batch, w.inputs(),
                                              16, w.type, CUSPARSE_ORDER_COL));
    ++described_;
    NMJAX_CHECK(cusparseLtDenseDescriptorInit(&handle, &y_, w.outputs(), product.batch,
                                              w.outputs(), 16, product.result_type,
                                              CUSPARSE_ORDER_COL));
    ++described_;
    const auto sums = w.type == CUDA_R_8I ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F;
    NMJAX_CHECK(cusparseLtMatmulDescriptorInit(&handle, &matmul_, w.op(),
                                               CUSPARSE_OPERATION_NON_TRANSPOSE, &structured_, &x_,
                                               &y_, &y_, sums));
    if (product.activation != Activation::kNone) {
      const int yes = 1;
      NMJAX_CHECK(cusparseLtMatmulDescSetAttribute(&handle, &matmul_,
                                                   product.activation == Activation::kRelu
                                                       ? CUSPARSELT_MATMUL_ACTIVATION_RELU
                                                       : CUSPARSELT_MATMUL_ACTIVATION_GELU,
                                                   &yes, sizeof(yes)));
    }
    if (product.bias != nullptr) {
      NMJAX_CHECK(cusparseLtMatmulDescSetAttribute(&handle, &matmul_,
                                                   CUSPARSELT_MATMUL_BIAS_POINTER, &product.bias,
                                                   sizeof(product.bias)));
    }
    NMJAX_CHECK(cusparseLtMatmulAlgSelectionInit(&handle, &selection, &matmul_,
                                                 CUSPARSELT_MATMUL_ALG_DEFAULT));
    selected_ = true;
    if (Complaint wrong = select(handle, product.algorithm); !wrong.empty()) return wrong;
    NMJAX_CHECK(cusparseLtMatmulPlanInit(&handle, &plan, &matmul_, &selection));
    planned_ = true;
    NMJAX_CHECK(cusparseLtMatmulGetWorkspace(&handle, &plan, &workspace));
    return {};
  }

  cusparseLtMatmulPlan_t plan;
  cusparseLtMatmulAlgSelection_t selection;
  size_t workspace = 0;

 private:
  Complaint select(const cusparseLtHandle_t& handle, const Algorithm& algorithm) {
    if (algorithm.config < 0) return {};
    NMJAX_CHECK(cusparseLtMatmulAlgSetAttribute(&handle, &selection,
                                                CUSPARSELT_MATMUL_ALG_CONFIG_ID,
                                                &algorithm.config, sizeof(algorithm.config)));
    const bool is_split = algorithm.split_k > 1;  // Where nothing was set, it is -1.
    if (is_split) {
      NMJAX_CHECK(cusparseLtMatmulAlgSetAttribute(&handle, &selection, CUSPARSELT_MATMUL_SPLIT_K,
                                                  &algorithm.split_k, sizeof(algorithm.split_k)));
    }
    const auto mode = static_cast<cusparseLtSplitKMode_t>(algorithm.split_k_mode);
    // The modes with greater numbers are of how work is spread, with or without a split.
    if (mode == CUSPARSELT_INVALID_MODE ||
        (!is_split && mode <= CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS)) {
      return {};
    }
    NMJAX_CHECK(cusparseLtMatmulAlgSetAttribute(
        &handle, &selection, CUSPARSELT_MATMUL_SPLIT_K_MODE, &mode, sizeof(mode)));
    return {};
  }

  cusparseLtMatDescriptor_t structured_, x_, y_;
  cusparseLtMatDescriptor_t* const matrices_[3] = {&structured_, &x_, &y_};
  cusparseLtMatmulDescriptor_t matmul_;
  int described_ = 0;
  bool selected_ = false, planned_ = false;
};

// cuSPARSELt on one device, which is the calling thread's current one. Calls take turns: they only
// queue work, and cuSPARSELt does not promise more.
class Device {
 public:
  // Writes the compressed form of a dense array that is 2:4 along its inputs.
  Complaint compress(const Weight& weight, const void* dense, const Room& compressed,
                     const Room& workspace, cudaStream_t stream) {
    const std::lock_guard<std::mutex> turn(mutex_);
    if (Complaint wrong = start(); !wrong.empty()) return wrong;
    cusparseLtMatDescriptor_t matrix;
    if (Complaint wrong = describe(handle_, weight, &matrix); !wrong.empty()) return wrong;
    const std::unique_ptr<cusparseLtMatDescriptor_t, decltype(&cusparseLtMatDescriptorDestroy)>
        owner(&matrix, &cusparseLtMatDescriptorDestroy);
    size_t bytes = 0, scratch = 0;
    NMJAX_CHECK(cusparseLtSpMMACompressedSize2(&handle_, &matrix, &bytes, &scratch));
    Complaint small = too_small("for a compressed weight", bytes, compressed);
    if (small.empty()) small = too_small("of workspace to compress", scratch, workspace);
    if (!small.empty()) return small;
    NMJAX_CHECK(cusparseLtSpMMACompress2(&handle_, &matrix, /*isSparseA=*/1, weight.op(), dense,
                                         compressed.data, workspace.data, stream));
    return {};
  }

  // While CUDA records a graph nothing may be set up. So compressing finds cuSPARSELt started ...
  Complaint prepare() {
    const std::lock_guard<std::mutex> turn(mutex_);
    return start();
  }

  // ... and multiplying finds a plan: cuSPARSELt does not promise that planning allocates nothing.
  Complaint prepare(const Product& product) {
    const std::lock_guard<std::mutex> turn(mutex_);
    Plan* plan = nullptr;
    return planned(product, &plan);
  }

  Complaint multiply(const Product& product, const void* x, const void* compressed, void* y,
                     const Room& workspace, cudaStream_t stream) {
    const std::lock_guard<std::mutex> turn(mutex_);
    Plan* plan = nullptr;
    if (Complaint wrong = planned(product, &plan); !wrong.empty()) return wrong;
    Complaint small = too_small("of workspace to multiply", plan->workspace, workspace);
    if (!small.empty()) return small;
    NMJAX_CHECK(cusparseLtMatmul(&handle_, &plan->plan, &one_, compressed, x, &zero_, y, y,
                                 workspace.data, &stream, 1));
    return {};
  }

  // Runs every kernel that cuSPARSELt has for the product and says which was fastest.
  Complaint search(const Product& product, const void* x, const void* compressed, void* y,
                   const Room& workspace, cudaStream_t stream, Found* found) {
    const std::lock_guard<std::mutex> turn(mutex_);
    if (Complaint wrong = start(); !wrong.empty()) return wrong;
    Plan plan;  // Of its own: the search changes it.
    if (Complaint wrong = plan.make(handle_, product); !wrong.empty()) return wrong;
    Complaint small = too_small("of workspace to search", plan.workspace, workspace);
    if (!small.empty()) return small;
    NMJAX_CHECK(cusparseLtMatmulSearch(&handle_, &plan.plan, &one_, compressed, x, &zero_, y, y,
                                       workspace.data, &stream, 1));
    Algorithm fastest;
    cusparseLtSplitKMode_t mode = CUSPARSELT_INVALID_MODE;
    NMJAX_CHECK(cusparseLtMatmulAlgGetAttribute(&handle_, &plan.selection,
                                                CUSPARSELT_MATMUL_ALG_CONFIG_ID, &fastest.config,
                                                sizeof(fastest.config)));
    NMJAX_CHECK(cusparseLtMatmulAlgGetAttribute(&handle_, &plan.selection,
                                                CUSPARSELT_MATMUL_SPLIT_K, &fastest.split_k,
                                                sizeof(fastest.split_k)));
    NMJAX_CHECK(cusparseLtMatmulAlgGetAttribute(&handle_, &plan.selection,
                                                CUSPARSELT_MATMUL_SPLIT_K_MODE, &mode,
                                                sizeof(mode)));
    fastest.split_k_mode = static_cast<int>(mode);
    return repeatable(product, fastest, found);
  }

 private:
  // The bias's address is in a plan, so it is in the key: a parameter's does not change, and where
  // XLA gives addresses in turns there are few.
  using Key = std::tuple<int64_t, int64_t, bool, int, int64_t, int, Activation, const void*, int,
                         int, int>;
  static constexpr size_t kMostPlans = 4096;

  // As much of a search result as a plan can be asked for, and the workspace that this needs,
  // which may be more than was searched with.
  Complaint repeatable(const Product& product, const Algorithm& fastest, Found* found) {
    Complaint wrong;
    for (const Algorithm& algorithm :
         {fastest, Algorithm{fastest.config, fastest.split_k, 0}, Algorithm{fastest.config, 1, 0}}) {
      Product tuned = product;
      tuned.algorithm = algorithm;
      Plan plan;
      wrong = plan.make(handle_, tuned);
      if (!wrong.empty()) continue;
      *found = {algorithm, plan.workspace};
      return {};
    }
    return wrong;
  }

  Complaint start() {
    if (started_) return {};
    NMJAX_CHECK(cusparseLtInit(&handle_));
    started_ = true;
    return {};
  }

  Complaint planned(const Product& product, Plan** plan) {
    if (Complaint wrong = start(); !wrong.empty()) return wrong;
    const Weight& w = product.weight;
    const Algorithm& a = product.algorithm;
    const Key key(w.rows, w.columns, w.transposed, w.type, product.batch, product.result_type,
                  product.activation, product.bias, a.config, a.split_k, a.split_k_mode);
    if (const auto kept = plans_.find(key); kept != plans_.end()) {
      *plan = kept->second.get();
      return {};
    }
    auto made = std::make_unique<Plan>();
    if (Complaint wrong = made->make(handle_, product); !wrong.empty()) return wrong;
    if (plans_.size() >= kMostPlans) plans_.clear();
    *plan = (plans_[key] = std::move(made)).get();
    return {};
  }

  std::mutex mutex_;
  bool started_ = false;
  cusparseLtHandle_t handle_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  const float one_ = 1, zero_ = 0;
};

// The device of this number. Never destroyed: at exit the driver may be gone before us.
inline Device& device(int ordinal) {
  static std::mutex& mutex = *new std::mutex;
  static auto& devices = *new std::map<int, Device>;
  const std::lock_guard<std::mutex> turn(mutex);
  return devices[ordinal];
}

#undef NMJAX_CHECK

}  // namespace nmjax
