// The CUDA runtime, for a machine without a GPU: the subset that the trainers and their tests use.
// cu2cpp.py includes this before the first line of a translated source, as nvcc includes the real one.
//
// Every call is synchronous: a stream does its work at once. What can be checked is checked as strictly as
// on a GPU or more so, since a mistake should show here and not first on the cluster.
#pragma once

// Before anything else, since they use __noinline__ and the like for themselves.
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#define __global__ __attribute__((unused))
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

#define CUDART_VERSION 13000
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

#include "simt/device.h"
#include "simt/launch.h"
#include "simt/memory.h"
#include "simt/ptx.h"

// ---- devices ---------------------------------------------------------------------------------------

namespace simt {
// Grids are sized by this in many programs, and with them the order of sums; so it is a constant, and not
// what the machine has.
constexpr int kMultiprocessors = 8;
constexpr int kThreadsPerMultiprocessor = 2048;
inline int device = 0;

// One pretended device for each process of an MPI job on this machine.
inline int device_count() {
    for (const char* name : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"})
        if (const char* value = getenv(name))
            if (atoi(value) > 0) return atoi(value);
    return 1;
}
}  // namespace simt

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalConstMem;
    int major, minor;
    int multiProcessorCount, integrated, concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, asyncEngineCount;
    int unifiedAddressing, memoryBusWidth, l2CacheSize, maxThreadsPerMultiProcessor;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, managedMemory, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int maxBlocksPerMultiProcessor;
    size_t reservedSharedMemPerBlock;
};

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
    cudaDevAttrMaxRegistersPerBlock = 12, cudaDevAttrClockRate = 13, cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36, cudaDevAttrGlobalMemoryBusWidth = 37, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMaxBlocksPerMultiprocessor = 106,
};

inline cudaError_t cudaGetDeviceCount(int* count) { *count = simt::device_count(); return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = simt::device; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= simt::device_count()) return simt::set_error(cudaErrorInvalidDevice);
    simt::device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device < 0 || device >= simt::device_count()) return simt::set_error(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    strcpy(p->name, "CPU backend");
    p->totalGlobalMem = simt::options.device_memory;
    p->sharedMemPerBlock = simt::kSharedDefault;
    p->sharedMemPerBlockOptin = simt::kSharedOptIn;
    p->sharedMemPerMultiprocessor = 100 * 1024;
    p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = 8, p->minor = 0;
    p->multiProcessorCount = simt::kMultiprocessors;
    p->maxThreadsPerMultiProcessor = simt::kThreadsPerMultiprocessor;
    p->maxBlocksPerMultiProcessor = 16;
    p->l2CacheSize = 1 << 20;
    p->memoryBusWidth = 64;
    p->pciBusID = simt::options.pci & 0xff;
    p->pciDomainID = simt::options.pci >> 8;
    p->unifiedAddressing = p->integrated = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrClockRate: *value = 1000000; break;           // kHz
    case cudaDevAttrMemoryClockRate: *value = 1000000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    default: return simt::set_error(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
    cudaDeviceProp p;
    if (cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
    snprintf(id, bytes, "%04x:%02x:00.0", p.pciDomainID, p.pciBusID);
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { simt::check_canaries("cudaDeviceSynchronize"); return cudaSuccess; }
inline cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }

// ---- memory ----------------------------------------------------------------------------------------

enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault,
};
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4 };

// Allocations remember the line that made them: the last two parameters, which nobody passes.
template <class T> cudaError_t cudaMalloc(T** p, size_t bytes, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, true, {file, line});
}
template <class T> cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, false, {file, line});
}
template <class T> cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned = 0, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, false, {file, line});
}
inline cudaError_t cudaFree(void* p, SIMT_SITE) { return simt::release(p, true, "cudaFree", {file, line}); }
inline cudaError_t cudaFreeHost(void* p, SIMT_SITE) { return simt::release(p, false, "cudaFreeHost", {file, line}); }
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = simt::options.device_memory;
    *free = std::min(*total - simt::memory().now, simt::address_space_left());
    return cudaSuccess;
}

namespace simt {
inline cudaError_t copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                        cudaMemcpyKind kind, const char* function, Site site) {
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return set_error(cudaErrorInvalidMemcpyDirection);
    if (width == 0 || height == 0) return cudaSuccess;
    if (height > 1 && (to_pitch < width || from_pitch < width)) return set_error(cudaErrorInvalidPitchValue);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) {
        auto device = [](const void* p) { auto i = memory().find(p); return i != memory().blocks.end() && i->second.device; };
        to_device = device(to), from_device = device(from);
    }
    if (!range_is_good(to, (height - 1) * to_pitch + width, to_device, function, "destination", site) ||
        !range_is_good(from, (height - 1) * from_pitch + width, from_device, function, "source", site))
        return set_error(cudaErrorInvalidValue);
    for (size_t row = 0; row < height; row++)
        memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    return cudaSuccess;
}
inline cudaError_t fill(void* p, int value, size_t bytes, const char* function, Site site) {
    if (bytes == 0) return cudaSuccess;
    if (!range_is_good(p, bytes, true, function, "destination", site)) return set_error(cudaErrorInvalidValue);
    memset(p, value, bytes);
    return cudaSuccess;
}
}  // namespace simt

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, SIMT_SITE) {
    return simt::copy(to, bytes, from, bytes, bytes, 1, kind, "cudaMemcpy", {file, line});
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr, SIMT_SITE) {
    return simt::copy(to, bytes, from, bytes, bytes, 1, kind, "cudaMemcpyAsync", {file, line});
}
inline cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                                cudaMemcpyKind kind, SIMT_SITE) {
    return simt::copy(to, to_pitch, from, from_pitch, width, height, kind, "cudaMemcpy2D", {file, line});
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind kind, cudaStream_t = nullptr, SIMT_SITE) {
    return simt::copy(to, to_pitch, from, from_pitch, width, height, kind, "cudaMemcpy2DAsync", {file, line});
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes, SIMT_SITE) {
    return simt::fill(p, value, bytes, "cudaMemset", {file, line});
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr, SIMT_SITE) {
    return simt::fill(p, value, bytes, "cudaMemsetAsync", {file, line});
}

// A __device__ or __constant__ variable is an ordinary one here; its address becomes device memory to the
// checks above when it is asked for.
template <class T> cudaError_t cudaGetSymbolAddress(void** p, const T& symbol, SIMT_SITE) {
    *p = (void*)&symbol;
    simt::memory().blocks.insert({(char*)&symbol, {sizeof(T), {file, line}, true, false}});
    return cudaSuccess;
}
template <class T> cudaError_t cudaMemcpyToSymbol(const T& symbol, const void* from, size_t bytes, size_t offset = 0,
                                                  cudaMemcpyKind kind = cudaMemcpyHostToDevice, SIMT_SITE) {
    void* p;
    cudaGetSymbolAddress(&p, symbol, file, line);
    return simt::copy((char*)p + offset, bytes, from, bytes, bytes, 1, kind, "cudaMemcpyToSymbol", {file, line});
}
template <class T> cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes, size_t offset = 0,
                                                    cudaMemcpyKind kind = cudaMemcpyDeviceToHost, SIMT_SITE) {
    void* p;
    cudaGetSymbolAddress(&p, symbol, file, line);
    return simt::copy(to, bytes, (char*)p + offset, bytes, bytes, 1, kind, "cudaMemcpyFromSymbol", {file, line});
}

// ---- streams and events ----------------------------------------------------------------------------

struct CUstream_st { unsigned flags; };
struct CUevent_st { double time = -1; };        // when it was recorded; -1: not yet
typedef CUevent_st* cudaEvent_t;
typedef void (*cudaHostFn_t)(void*);
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { *s = new CUstream_st{flags}; return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { delete s; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { simt::check_canaries("cudaStreamSynchronize"); return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { function(data); return cudaSuccess; }

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = new CUevent_st; return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t* e, unsigned flags = 0) { return cudaEventCreateWithFlags(e, flags); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) { e->time = simt::seconds(); return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    if (from->time < 0 || to->time < 0) return simt::set_error(cudaErrorInvalidResourceHandle);
    *ms = (float)((to->time - from->time) * 1e3);
    return cudaSuccess;
}

// ---- functions -------------------------------------------------------------------------------------

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

template <class F> cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value > simt::kSharedOptIn) return simt::set_error(cudaErrorInvalidValue);
        simt::dynamic_shared_limit[(const void*)function] = value;
    }
    return cudaSuccess;
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F* function) {
    *a = {};
    a->maxThreadsPerBlock = 1024;
    a->binaryVersion = a->ptxVersion = 80;
    a->maxDynamicSharedSizeBytes = (int)simt::largest_dynamic_shared((const void*)function);
    return cudaSuccess;
}
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, size_t dynamic_shared) {
    if (threads < 1 || threads > 1024) return simt::set_error(cudaErrorInvalidValue);
    size_t by_shared = dynamic_shared ? 100 * 1024 / (dynamic_shared + 1024) : 16;
    *blocks = (int)std::min({(size_t)(simt::kThreadsPerMultiprocessor / threads), (size_t)16, by_shared});
    return cudaSuccess;
}
