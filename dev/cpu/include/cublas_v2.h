// What cublasLt.h needs of cuBLAS: status codes, types, names.
#pragma once
#include "cuda_runtime.h"

#define SIMT_STATUSES(S)                                                     \
    S(CUBLAS_STATUS_SUCCESS, 0) S(CUBLAS_STATUS_NOT_INITIALIZED, 1)          \
    S(CUBLAS_STATUS_ALLOC_FAILED, 3) S(CUBLAS_STATUS_INVALID_VALUE, 7)       \
    S(CUBLAS_STATUS_ARCH_MISMATCH, 8) S(CUBLAS_STATUS_MAPPING_ERROR, 11)     \
    S(CUBLAS_STATUS_EXECUTION_FAILED, 13) S(CUBLAS_STATUS_INTERNAL_ERROR, 14) \
    S(CUBLAS_STATUS_NOT_SUPPORTED, 15) S(CUBLAS_STATUS_LICENSE_ERROR, 16)
#define SIMT_ENUM(name, value) name = value,
typedef enum { SIMT_STATUSES(SIMT_ENUM) } cublasStatus_t;
#undef SIMT_ENUM
#define SIMT_NAME(name, value) case name: return #name;
inline const char* cublasGetStatusName(cublasStatus_t s) { switch (s) { SIMT_STATUSES(SIMT_NAME) } return "unknown cuBLAS status"; }
#undef SIMT_NAME
inline const char* cublasGetStatusString(cublasStatus_t s) { return cublasGetStatusName(s); }

typedef enum {
    CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_32I = 10, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28, CUDA_R_8F_E5M2 = 29,
} cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;
typedef enum {
    CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69, CUBLAS_COMPUTE_32I = 72,
    CUBLAS_COMPUTE_32F_FAST_16F = 74, CUBLAS_COMPUTE_32F_FAST_16BF = 75, CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
} cublasComputeType_t;
typedef enum { CUBLAS_DEFAULT_MATH = 0, CUBLAS_PEDANTIC_MATH = 2, CUBLAS_TF32_TENSOR_OP_MATH = 3 } cublasMath_t;

typedef struct cublasContext { int unused; }* cublasHandle_t;
inline cublasStatus_t cublasCreate(cublasHandle_t* handle) { *handle = new cublasContext{}; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasDestroy(cublasHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
