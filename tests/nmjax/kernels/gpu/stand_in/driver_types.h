// As much of CUDA's declarations as our calls for few rows use, where the toolkit is not.
#pragma once

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
