// Shared memory: one arena per OS thread, in use by the block which that thread is running.
//
// Every array is followed by a red zone, and fresh memory is filled with NaN, so that a kernel that
// reads what nobody wrote computes NaN. With ASan the red zones are poisoned and an access stops the
// program at its source line; without, they are compared at the end of the block, which finds writes.
#pragma once
#include <sys/mman.h>

#include "options.h"

namespace simt {

// Both halves, and both together, are a NaN: reading past an array shows too. No kernel writes this
// value by accident (0xffffffff, which would also be NaN, is -1, a common thing to write).
constexpr uint32_t kCanary = 0xffc5ffc5u;

constexpr size_t kCanaryBytes = 256;
struct CanaryPattern {
    uint32_t words[kCanaryBytes / 4];
    CanaryPattern() { for (uint32_t& w : words) w = kCanary; }
};
inline const CanaryPattern canary_pattern;

inline void fill_canary(char* p, size_t bytes) { memcpy(p, &canary_pattern, bytes); }
inline size_t broken_canary(const char* p, size_t bytes) {   // the first changed byte, or `bytes`
    if (!memcmp(p, &canary_pattern, bytes)) return bytes;
    size_t i = 0;
    while (p[i] == ((const char*)&canary_pattern)[i]) i++;
    return i;
}

struct Arena {
    static constexpr size_t kBytes = 512 * 1024, kRedZone = 64;
    static constexpr int kMaxArrays = 128;
    struct Array { const char *name, *file; int line; size_t begin, bytes; };

    char* memory = nullptr;
    size_t used = 0;              // with red zones and alignment
    size_t total = 0;             // bytes asked for: what counts against the limit
    int count = 0;
    Array arrays[kMaxArrays];

    // nullptr if it does not fit
    char* allocate(const char* name, const char* file, int line, size_t bytes, size_t alignment) {
        if (!memory) {
            memory = (char*)mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) out_of_host_memory("cannot map %zu KiB for shared memory", kBytes >> 10);
            ASAN_POISON_MEMORY_REGION(memory, kBytes);
        }
        size_t begin = (used + alignment - 1) / alignment * alignment;
        if (count == kMaxArrays || begin + bytes + kRedZone > kBytes) return nullptr;
        ASAN_UNPOISON_MEMORY_REGION(memory + begin, bytes);
        if (options.poison) memset(memory + begin, 0xff, bytes);
        if (!SIMT_ASAN) fill_canary(memory + begin + bytes, kRedZone);
        arrays[count++] = {name, file, line, begin, bytes};
        used = begin + bytes + kRedZone;
        total += bytes;
        return memory + begin;
    }
    // The array whose red zone was written to, or nullptr; *where is how far past its end.
    const Array* overflow(size_t* where) const {
        for (int i = 0; i < count && !SIMT_ASAN; i++) {
            *where = broken_canary(memory + arrays[i].begin + arrays[i].bytes, kRedZone);
            if (*where < kRedZone) return &arrays[i];
        }
        return nullptr;
    }
    void clear() {
        if (used) ASAN_POISON_MEMORY_REGION(memory, used);
        used = total = count = 0;
    }
    bool contains(const void* p) const { return (const char*)p >= memory && (const char*)p < memory + used; }
};

}  // namespace simt
