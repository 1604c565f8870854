// Device memory: cudaMalloc counts bytes exactly as asked for, guards every allocation and knows where
// it was made; copies check that the addresses they are given are what the caller says they are.
#pragma once
#include <map>
#include <mutex>

#include "errors.h"
#include "shared.h"
#include "streams.h"

namespace simt {

inline const char* last_kernel = "none";      // that ran; named in the report of a broken canary

struct Allocation {
    size_t bytes;
    Site site;                                // of the cudaMalloc
    bool device;                              // with canaries around it; or pinned host memory
};

// Around each block of device memory lies a canary. With ASan it does not: there the block is exactly as
// large as asked for, and ASan's own red zones guard it, to the byte and at the instruction.
constexpr size_t kGuard = SIMT_ASAN ? 0 : kCanaryBytes;
constexpr size_t kAlignment = 256;            // cudaMalloc's

struct Memory {
    std::map<char*, Allocation> blocks;
    size_t now = 0, peak = 0;                 // device bytes
    size_t pinned_now = 0, pinned_peak = 0;   // of the host
    std::mutex mutex;

    // The allocation that p points into (or to the end of), or blocks.end()
    std::map<char*, Allocation>::iterator find(const void* p) {
        auto i = blocks.upper_bound((char*)p);
        if (i == blocks.begin()) return blocks.end();
        --i;
        return (char*)p <= i->first + i->second.bytes ? i : blocks.end();
    }
};

inline void at_exit();
inline Memory& memory() {
    static Memory* m = (atexit(at_exit), new Memory);
    return *m;
}

inline void check_canary(const char* p, const Allocation& a, const char* found_by) {
    if (!kGuard || !a.device) return;
    size_t after = broken_canary(p + a.bytes, kGuard);
    if (after < kGuard)
        die("write past the end of device memory: the %zu bytes from cudaMalloc at %s:%d were overrun, byte %zu was written\n"
            "  found by %s; the last kernel launched is %s (SAN=1 names the line that wrote)",
            a.bytes, a.site.file, a.site.line, a.bytes + after, found_by, last_kernel);
    size_t before = kGuard;
    while (before > 0 && p[-(ptrdiff_t)before] == (char)(kCanary >> ((kGuard - before) & 3) * 8)) before--;
    if (before > 0)
        die("write before the start of device memory: the %zu bytes from cudaMalloc at %s:%d, byte -%zu was written\n"
            "  found by %s; the last kernel launched is %s (SAN=1 names the line that wrote)",
            a.bytes, a.site.file, a.site.line, before, found_by, last_kernel);
}
inline void check_canaries(const char* found_by) {
    for (auto& [p, a] : memory().blocks) check_canary(p, a, found_by);
}
inline void at_exit() {
    finish_streams();
    check_canaries("the end of the program");
    if (options.report)
        fprintf(stderr, "simt: peak %zu bytes, now %zu bytes; of the host, pinned: peak %zu, now %zu\n", memory().peak, memory().now,
                memory().pinned_peak, memory().pinned_now);
}
// A program that never allocates still gets its report line.
inline const bool memory_is_reported = (memory(), true);

inline cudaError_t allocate(void** result, size_t bytes, bool device, Site site) {
    Memory& m = memory();
    std::lock_guard<std::mutex> lock(m.mutex);
    if (!result) return set_error(cudaErrorInvalidValue);
    *result = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (device && (bytes > options.device_memory || m.now > options.device_memory - bytes))
        return set_error(cudaErrorMemoryAllocation);
    size_t guard = device ? kGuard : 0;
    void* raw;
    if (posix_memalign(&raw, kAlignment, bytes + 2 * guard)) return set_error(cudaErrorMemoryAllocation);
    char* p = (char*)raw + guard;
    if (device) {
        if (options.poison) memset(p, 0xff, bytes);
        if (guard) fill_canary(p - guard, guard), fill_canary(p + bytes, guard);
    } else if (options.poison && streams_queue()) memset(p, 0xff, bytes);      // a host that reads before the copy shows
    size_t &now = device ? m.now : m.pinned_now, &peak = device ? m.peak : m.pinned_peak;
    now += bytes;
    if (now > peak) peak = now;
    m.blocks[p] = {bytes, site, device};
    *result = p;
    return cudaSuccess;
}

inline cudaError_t release(void* p, bool device, const char* function, Site site) {
    Memory& m = memory();
    std::lock_guard<std::mutex> lock(m.mutex);
    if (!p) return cudaSuccess;
    auto i = m.blocks.find((char*)p);
    if (i == m.blocks.end() || i->second.device != device) {
        fprintf(stderr, "simt: %s(%p) at %s:%d: this was not allocated, or is freed already (%s)\n", function, p, site.file,
                site.line, cudaGetErrorName(cudaErrorInvalidValue));
        return set_error(cudaErrorInvalidValue);
    }
    check_canary(i->first, i->second, function);
    (device ? m.now : m.pinned_now) -= i->second.bytes;
    m.blocks.erase(i);
    free((char*)p - (device ? kGuard : 0));
    return cudaSuccess;
}

// Host memory that the device reads and writes by itself. Other host memory is staged.
inline bool is_pinned(const void* p) {
    auto i = memory().find(p);
    return i != memory().blocks.end() && !i->second.device && (char*)p < i->first + i->second.bytes;
}

// Is [p, p + bytes) within one allocation? `device` says whether it must be.
inline bool range_is_good(const void* p, size_t bytes, bool device, const char* function, const char* which, Site site) {
    auto i = memory().find(p);
    if (i == memory().blocks.end()) {
        if (!device) return true;             // ordinary host memory
        fprintf(stderr, "simt: %s at %s:%d: the %s, %p, is not device memory\n", function, site.file, site.line, which, p);
        return false;
    }
    if (!device && i->second.device && (char*)p < i->first + i->second.bytes) {
        fprintf(stderr, "simt: %s at %s:%d: the %s is device memory, where the copy kind says host\n", function, site.file, site.line, which);
        return false;
    }
    if (i->second.device == device && (char*)p + bytes > i->first + i->second.bytes) {
        fprintf(stderr, "simt: %s at %s:%d: %zu bytes at the %s run past its allocation (%zu bytes from %s:%d, of which %zu "
                "remain)\n", function, site.file, site.line, bytes, which, i->second.bytes, i->second.site.file, i->second.site.line,
                (size_t)(i->first + i->second.bytes - (char*)p));
        return false;
    }
    return true;
}

}  // namespace simt
