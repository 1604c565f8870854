// The CUDA runtime, for a machine without a GPU: the subset that the trainers and their tests use.
// cu2cpp.py includes this before the first line of a translated source, as nvcc includes the real one.
//
// A stream does its work at once, or later if SIMT_STREAMS says so (simt/streams.h). What can be checked is checked as strictly
// as on a GPU or more so, since a mistake should show here and not first on the cluster.
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
#define __grid_constant__
#define __launch_bounds__(...)
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
// Grids are sized by this in many programs, and with them the order of sums; so it is a constant, and not what the machine has.
constexpr int kMultiprocessors = 8;
inline int device = 0;

// One pretended device for each process of an MPI job on this machine.
inline int device_count() {
    for (const char* name : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"})
        if (const char* value = getenv(name); value && atoi(value) > 0) return atoi(value);
    return 1;
}
}  // namespace simt

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int warpSize, maxThreadsPerBlock, major, minor, multiProcessorCount, l2CacheSize, pciBusID, pciDomainID;
};
enum cudaDeviceAttr {
    cudaDevAttrClockRate = 13, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
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
    *p = {};
    strcpy(p->name, "CPU backend");
    p->totalGlobalMem = simt::options.device_memory;
    p->sharedMemPerBlock = simt::kSharedDefault;
    p->sharedMemPerBlockOptin = simt::kSharedOptIn;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->major = 8, p->minor = 0;
    p->multiProcessorCount = simt::kMultiprocessors;
    p->l2CacheSize = 1 << 20;
    p->pciBusID = simt::options.pci & 0xff, p->pciDomainID = simt::options.pci >> 8;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
    switch (attribute) {
    case cudaDevAttrClockRate: *value = 1000000; break;           // kHz
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
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
inline cudaError_t cudaDeviceSynchronize() {
    simt::synchronize_device();
    simt::check_canaries("cudaDeviceSynchronize");
    return cudaSuccess;
}

// ---- memory ----------------------------------------------------------------------------------------

enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault,
};

// Allocations remember the line that made them: the last two parameters, which nobody passes.
template <class T> cudaError_t cudaMalloc(T** p, size_t bytes, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, true, {file, line});
}
template <class T> cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, false, {file, line});
}
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4 };
template <class T> cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned, SIMT_SITE) {
    return simt::allocate((void**)p, bytes, false, {file, line});
}
inline cudaError_t cudaFree(void* p, SIMT_SITE) {
    if (p) simt::synchronize_device();
    return simt::release(p, true, "cudaFree", {file, line});
}
inline cudaError_t cudaFreeHost(void* p, SIMT_SITE) {
    if (p) simt::synchronize_device();
    return simt::release(p, false, "cudaFreeHost", {file, line});
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = simt::options.device_memory;
    *free = std::min(*total - simt::memory().now, simt::address_space_left());
    return cudaSuccess;
}

namespace simt {
// When the host goes on is what CUDA's "API synchronization behavior" says.
inline cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, bool async, cudaStream_t stream,
                        const char* function, Site site) {
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return set_error(cudaErrorInvalidMemcpyDirection);
    if (bytes == 0) return cudaSuccess;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) {
        auto device = [](const void* p) { auto i = memory().find(p); return i != memory().blocks.end() && i->second.device; };
        to_device = device(to), from_device = device(from);
    }
    if (!range_is_good(to, bytes, to_device, function, "destination", site) ||
        !range_is_good(from, bytes, from_device, function, "source", site))
        return set_error(cudaErrorInvalidValue);
    auto move = [=] { memmove(to, from, bytes); };
    if (!streams_queue()) { move(); return cudaSuccess; }
    const bool upload = to_device && !from_device, stage = upload && !is_pinned(from);
    if (stage && !async) synchronize_stream(stream, function, site);
    // What is staged is taken here, and may change after the call. What is pinned is read when the copy runs.
    auto o = stage ? enqueue(stream, function, site, [to, staged = std::vector<char>((const char*)from, (const char*)from + bytes)] {
                         memcpy(to, staged.data(), staged.size());
                     })
                   : enqueue(stream, function, site, move);
    if (!o) return cudaErrorInvalidResourceHandle;
    if (to_device ? upload && !stage && !async : !async || !from_device || !is_pinned(to)) synchronize(o);
    return cudaSuccess;
}
inline cudaError_t fill(void* p, int value, size_t bytes, cudaStream_t stream, const char* function, Site site) {
    if (bytes == 0) return cudaSuccess;
    if (!range_is_good(p, bytes, true, function, "destination", site)) return set_error(cudaErrorInvalidValue);
    return submit(stream, function, site, [=] { memset(p, value, bytes); });
}
}  // namespace simt

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, SIMT_SITE) {
    return simt::copy(to, from, bytes, kind, false, nullptr, "cudaMemcpy", {file, line});
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr, SIMT_SITE) {
    return simt::copy(to, from, bytes, kind, true, stream, "cudaMemcpyAsync", {file, line});
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes, size_t rows,
                                     cudaMemcpyKind kind, cudaStream_t stream = nullptr, SIMT_SITE) {
    cudaError_t status = cudaSuccess;
    for (size_t i = 0; i < rows && status == cudaSuccess; i++)
        status = simt::copy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, bytes, kind, true, stream, "cudaMemcpy2DAsync",
                            {file, line});
    return status;
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes, SIMT_SITE) {
    return simt::fill(p, value, bytes, nullptr, "cudaMemset", {file, line});
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr, SIMT_SITE) {
    return simt::fill(p, value, bytes, stream, "cudaMemsetAsync", {file, line});
}

// ---- streams and events ----------------------------------------------------------------------------

typedef CUevent_st* cudaEvent_t;
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2, cudaEventInterprocess = 4 };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags, SIMT_SITE) {
    if (flags > cudaStreamNonBlocking) return simt::set_error(cudaErrorInvalidValue);
    *s = new CUstream_st;
    (*s)->site = {file, line}, (*s)->blocking = flags != cudaStreamNonBlocking;
    if (simt::streams_queue()) {
        std::lock_guard<std::recursive_mutex> lock(simt::streams().mutex);
        (*s)->number = ++simt::streams().created;
        simt::streams().all.push_back(*s);
    }
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* s, SIMT_SITE) { return cudaStreamCreateWithFlags(s, cudaStreamDefault, file, line); }
// Returns at once; the stream goes when its work is done.
inline cudaError_t cudaStreamDestroy(cudaStream_t s, SIMT_SITE) {
    if (!simt::streams_queue()) { delete s; return cudaSuccess; }
    std::lock_guard<std::recursive_mutex> lock(simt::streams().mutex);
    if (!s || !simt::streams().find(s)) return simt::no_such_stream("cudaStreamDestroy", {file, line});
    s->destroyed = true;
    if (s->queue.empty()) simt::streams().remove(s);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s, SIMT_SITE) {
    if (cudaError_t e = simt::synchronize_stream(s, "cudaStreamSynchronize", {file, line})) return e;
    simt::check_canaries("cudaStreamSynchronize");
    return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream, SIMT_SITE) {
    if (!simt::streams_queue()) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> lock(simt::streams().mutex);
    cudaStream_t s = simt::streams().find(stream);
    return s ? simt::are_done(simt::last_of_stream(s)) : simt::no_such_stream("cudaStreamQuery", {file, line});
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
    if (flags > 7) return simt::set_error(cudaErrorInvalidValue);
    *e = new CUevent_st;
    (*e)->timed = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream = nullptr, SIMT_SITE) {
    if (simt::streams_queue()) {
        auto record = simt::enqueue(stream, "cudaEventRecord", {file, line}, nullptr);
        if (!record) return cudaErrorInvalidResourceHandle;
        e->record = record;
        return cudaSuccess;
    }
    if (!e->record) e->record = std::make_shared<simt::Operation>();
    e->record->done = true;
    e->record->time = simt::seconds();
    return cudaSuccess;
}
// For the record that is the last one now: one that comes later changes nothing.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned = 0, SIMT_SITE) {
    if (!simt::streams_queue()) return cudaSuccess;
    return simt::enqueue(stream, "cudaStreamWaitEvent", {file, line}, nullptr, e->record) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { simt::synchronize(e->record); return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (!simt::streams_queue() || !e->record) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> lock(simt::streams().mutex);
    return simt::are_done({e->record});
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->timed || !to->timed || !from->record || !to->record) return simt::set_error(cudaErrorInvalidResourceHandle);
    if (!from->record->done || !to->record->done) return simt::set_error(cudaErrorNotReady);
    *ms = (float)((to->record->time - from->record->time) * 1e3);
    return cudaSuccess;
}

// ---- functions -------------------------------------------------------------------------------------

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class F> cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > simt::kSharedOptIn)
        return simt::set_error(cudaErrorInvalidValue);
    simt::dynamic_shared_limit[(const void*)function] = value;
    return cudaSuccess;
}
