// CUDA's error codes, with their names and texts.
#pragma once
#include <stddef.h>

#define SIMT_ERRORS(E)                                                                        \
    E(cudaSuccess, 0, "no error")                                                             \
    E(cudaErrorInvalidValue, 1, "invalid argument")                                           \
    E(cudaErrorMemoryAllocation, 2, "out of memory")                                          \
    E(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                     \
    E(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")               \
    E(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                  \
    E(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                         \
    E(cudaErrorNotReady, 600, "device not ready")

#define SIMT_ENUM(name, value, text) name = value,
enum cudaError { SIMT_ERRORS(SIMT_ENUM) };
#undef SIMT_ENUM
typedef enum cudaError cudaError_t;
typedef struct CUstream_st* cudaStream_t;

#define SIMT_TEXT(name, value, text) case name: return text;
inline const char* cudaGetErrorString(cudaError_t e) { switch (e) { SIMT_ERRORS(SIMT_TEXT) } return "unrecognized error code"; }
#undef SIMT_TEXT
#define SIMT_NAME(name, value, text) case name: return #name;
inline const char* cudaGetErrorName(cudaError_t e) { switch (e) { SIMT_ERRORS(SIMT_NAME) } return "unrecognized error code"; }
#undef SIMT_NAME

namespace simt {
// Each call that fails leaves its code for cudaGetLastError, as the real ones do.
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t set_error(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}
}  // namespace simt

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() {
    cudaError_t e = simt::last_error;
    simt::last_error = cudaSuccess;
    return e;
}
