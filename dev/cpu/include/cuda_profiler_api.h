// Nothing to switch on or off here: SIMT_PROFILE=1 profiles the whole run.
#pragma once
#include "cuda_runtime.h"
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
