// What cublasLt.h needs of cuBLAS: status codes, types, names.
#pragma once
#include "cuda_runtime.h"

#define SIMT_STATUSES(S)                                      \
    S(CUBLAS_STATUS_SUCCESS, 0)                               \
    S(CUBLAS_STATUS_INVALID_VALUE, 7)                         \
    S(CUBLAS_STATUS_EXECUTION_FAILED, 13)                     \
    S(CUBLAS_STATUS_NOT_SUPPORTED, 15)
#define SIMT_ENUM(name, value) name = value,
typedef enum { SIMT_STATUSES(SIMT_ENUM) } cublasStatus_t;
#undef SIMT_ENUM
#define SIMT_NAME(name, value) case name: return #name;
inline const char* cublasGetStatusName(cublasStatus_t s) { switch (s) { SIMT_STATUSES(SIMT_NAME) } return "unknown cuBLAS status"; }
#undef SIMT_NAME

typedef enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 } cublasComputeType_t;      // both are fp32 here
