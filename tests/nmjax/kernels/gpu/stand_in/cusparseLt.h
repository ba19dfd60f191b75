// As much of cuSPARSELt's interface as nmjax uses, so that its calls compile, and run against
// fake_cusparselt.cc, where NVIDIA's headers are not. Numbers and sizes are those of 0.8 to 0.10.
#pragma once

#include <cstddef>
#include <cstdint>

#define CUSPARSELT_VERSION 1000

typedef struct CUstream_st* cudaStream_t;

enum cudaDataType {
  CUDA_R_32F = 0,
  CUDA_R_16F = 2,
  CUDA_R_8I = 3,
  CUDA_R_32I = 10,
  CUDA_R_16BF = 14,
  CUDA_R_8F_E4M3 = 28,
};
enum cusparseStatus_t {
  CUSPARSE_STATUS_SUCCESS = 0,
  CUSPARSE_STATUS_INVALID_VALUE = 3,
  CUSPARSE_STATUS_NOT_SUPPORTED = 10,
};
enum cusparseOperation_t {
  CUSPARSE_OPERATION_NON_TRANSPOSE = 0,
  CUSPARSE_OPERATION_TRANSPOSE = 1,
};
enum cusparseOrder_t { CUSPARSE_ORDER_COL = 1, CUSPARSE_ORDER_ROW = 2 };
enum cusparseComputeType { CUSPARSE_COMPUTE_32I, CUSPARSE_COMPUTE_16F, CUSPARSE_COMPUTE_32F };
enum cusparseLtSparsity_t { CUSPARSELT_SPARSITY_50_PERCENT };
enum cusparseLtMatmulAlg_t { CUSPARSELT_MATMUL_ALG_DEFAULT };
enum cusparseLtMatmulDescAttribute_t {
  CUSPARSELT_MATMUL_ACTIVATION_RELU = 0,
  CUSPARSELT_MATMUL_ACTIVATION_GELU = 3,
  CUSPARSELT_MATMUL_BIAS_POINTER = 8,
};
enum cusparseLtMatmulAlgAttribute_t {
  CUSPARSELT_MATMUL_ALG_CONFIG_ID = 0,
  CUSPARSELT_MATMUL_SPLIT_K = 3,
  CUSPARSELT_MATMUL_SPLIT_K_MODE = 4,
};
enum cusparseLtSplitKMode_t {
  CUSPARSELT_INVALID_MODE = 0,
  CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS = 2,
};

struct alignas(16) cusparseLtHandle_t {
  uint8_t data[512];
};
struct alignas(16) cusparseLtMatDescriptor_t {
  uint8_t data[512];
};
struct alignas(16) cusparseLtMatmulDescriptor_t {
  uint8_t data[512];
};
struct alignas(16) cusparseLtMatmulAlgSelection_t {
  uint8_t data[512];
};
struct alignas(16) cusparseLtMatmulPlan_t {
  uint8_t data[512];
};

using Handle = const cusparseLtHandle_t*;
using Matrix_t = cusparseLtMatDescriptor_t;
using Matmul_t = cusparseLtMatmulDescriptor_t;
using Selection_t = cusparseLtMatmulAlgSelection_t;
using Plan_t = cusparseLtMatmulPlan_t;

extern "C" {

const char* cusparseLtGetErrorString(cusparseStatus_t);
cusparseStatus_t cusparseLtInit(cusparseLtHandle_t*);
cusparseStatus_t cusparseLtDenseDescriptorInit(Handle, Matrix_t*, int64_t rows, int64_t cols,
                                               int64_t ld, uint32_t alignment, cudaDataType,
                                               cusparseOrder_t);
cusparseStatus_t cusparseLtStructuredDescriptorInit(Handle, Matrix_t*, int64_t rows, int64_t cols,
                                                    int64_t ld, uint32_t alignment, cudaDataType,
                                                    cusparseOrder_t, cusparseLtSparsity_t);
cusparseStatus_t cusparseLtMatDescriptorDestroy(const Matrix_t*);
cusparseStatus_t cusparseLtMatmulDescriptorInit(Handle, Matmul_t*, cusparseOperation_t op_a,
                                                cusparseOperation_t op_b, const Matrix_t* a,
                                                const Matrix_t* b, const Matrix_t* c,
                                                const Matrix_t* d, cusparseComputeType);
cusparseStatus_t cusparseLtMatmulDescSetAttribute(Handle, Matmul_t*,
                                                  cusparseLtMatmulDescAttribute_t,
                                                  const void* data, size_t bytes);
cusparseStatus_t cusparseLtMatmulAlgSelectionInit(Handle, Selection_t*, const Matmul_t*,
                                                  cusparseLtMatmulAlg_t);
cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(const Selection_t*);
cusparseStatus_t cusparseLtMatmulAlgSetAttribute(Handle, Selection_t*,
                                                 cusparseLtMatmulAlgAttribute_t, const void* data,
                                                 size_t bytes);
cusparseStatus_t cusparseLtMatmulAlgGetAttribute(Handle, const Selection_t*,
                                                 cusparseLtMatmulAlgAttribute_t, void* data,
                                                 size_t bytes);
cusparseStatus_t cusparseLtMatmulPlanInit(Handle, Plan_t*, const Matmul_t*, const Selection_t*);
cusparseStatus_t cusparseLtMatmulPlanDestroy(const Plan_t*);
cusparseStatus_t cusparseLtMatmulGetWorkspace(Handle, const Plan_t*, size_t* bytes);
cusparseStatus_t cusparseLtSpMMACompressedSize2(Handle, const Matrix_t*, size_t* bytes,
                                                size_t* scratch);
cusparseStatus_t cusparseLtSpMMACompress2(Handle, const Matrix_t*, int is_a, cusparseOperation_t,
                                          const void* dense, void* compressed, void* scratch,
                                          cudaStream_t);
cusparseStatus_t cusparseLtMatmul(Handle, const Plan_t*, const void* alpha, const void* a,
                                  const void* b, const void* beta, const void* c, void* d,
                                  void* workspace, cudaStream_t*, int32_t streams);
cusparseStatus_t cusparseLtMatmulSearch(Handle, Plan_t*, const void* alpha, const void* a,
                                        const void* b, const void* beta, const void* c, void* d,
                                        void* workspace, cudaStream_t*, int32_t streams);

}  // extern "C"
