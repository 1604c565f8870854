// Options from the environment, and how the backend reports an error.
//
// Options are environment variables and not compile flags, so that one binary can be run in every
// thread order: what is checked is the very program that was built.
#pragma once
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// Fibers outlive the program on purpose, and a trainer that ends need not free: leaks are no error.
extern "C" inline __attribute__((used)) const char* __asan_default_options() { return "detect_leaks=0"; }
#else
#define SIMT_ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace simt {

struct Site { const char* file; int line; };     // a place in the source
inline bool same_place(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

// The order in which the threads of a block (and the blocks of a grid) run between barriers.
enum Order {
    kForward,   // lowest thread first
    kReverse,   // highest thread first
    kPriority,  // random priorities for warps and lanes, and the highest that can run always runs. This finds
                // more missing barriers than a fresh random choice at every switch would, because a thread
                // that is favoured, or starved, stays so over many barriers.
};

// When a stream does what it is given.
enum StreamMode {
    kEager,     // at once
    kLate,      // when somebody waits for it
    kRandom,    // now or later, whichever stream's turn it is
};

struct Options {
    Order order = kForward;       // SIMT_ORDER=forward|reverse|priority
    uint64_t seed = 1;            // SIMT_SEED=n, for priority
    StreamMode streams = kEager;  // SIMT_STREAMS=eager|late|random:SEED
    uint64_t streams_seed = 0;
    bool poison = true;           // SIMT_POISON=0|1: fill fresh device and shared memory with NaN
    bool profile = false;         // SIMT_PROFILE=1: a table of kernels at exit
    bool report = false;          // SIMT_REPORT=1: one line with the memory peak at exit
    size_t device_memory = 0;     // SIMT_MEMORY=bytes, K, M or G: how much the pretended device has (what we may have)
    uint64_t pci = 0;             // SIMT_PCI=n: the device's bus address; processes with one n share a device
    bool gelu = true;             // SIMT_GELU=0|1: has cuBLASLt epilogues with GELU?
    float gelu_error = 0;         // SIMT_GELU_ERROR=n: they are off by so many millionths
};

[[noreturn]] inline void bad_option(const char* name, const char* value, const char* allowed) {
    fprintf(stderr, "simt error: %s=%s: must be %s\n", name, value, allowed);
    exit(2);
}

// The host's memory, not the pretended device's, is at an end: status 1, from whichever OS thread notices.
inline size_t address_space_limit() {
    rlimit limit;
    return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY ? limit.rlim_cur : SIZE_MAX;
}
inline size_t address_space_left() {
    size_t limit = address_space_limit(), pages = 0;
    FILE* f = limit < SIZE_MAX ? fopen("/proc/self/statm", "r") : nullptr;
    if (f && fscanf(f, "%zu", &pages) != 1) pages = 0;
    if (f) fclose(f);
    size_t used = pages * sysconf(_SC_PAGESIZE);
    return limit > used ? limit - used : 0;
}
[[noreturn]] inline __attribute__((format(printf, 1, 2))) void out_of_host_memory(const char* format, ...) {
    int error = errno;
    fflush(stdout);
    va_list args;
    va_start(args, format);
    fputs("simt error: out of host memory: ", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    if (error) fprintf(stderr, " (%s)", strerror(error));
    if (address_space_limit() < SIZE_MAX)
        fprintf(stderr, "; the limit on this process is %zu MiB (ulimit -v %zu): raise it, or take fewer threads (OMP_NUM_THREADS=1)\n",
                address_space_limit() >> 20, address_space_limit() >> 10);
    else
        fputs("; free some, or take fewer threads (OMP_NUM_THREADS=1)\n", stderr);
    _exit(1);
}
inline const bool new_is_checked = (std::set_new_handler([] { out_of_host_memory("an allocation failed"); }), true);

// The number that begins at `digits`, in the value of an option or all of it
inline uint64_t whole_number(const char* name, const char* value, const char* digits, uint64_t most, const char* allowed, bool suffix = false) {
    char* end;
    errno = 0;
    unsigned long long n = strtoull(digits, &end, 10);
    int shift = suffix && *end ? *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0 : 0;
    if (shift) end++;
    if (*digits < '0' || *digits > '9' || *end || errno || n > most >> shift) bad_option(name, value, allowed);
    return (uint64_t)n << shift;
}
inline uint64_t number_option(const char* name, uint64_t otherwise, uint64_t most, const char* allowed, bool suffix = false) {
    const char* value = getenv(name);
    return value ? whole_number(name, value, value, most, allowed, suffix) : otherwise;
}

inline Options read_options() {
    Options o;
    if (const char* order = getenv("SIMT_ORDER")) {
        if (!strcmp(order, "forward")) o.order = kForward;
        else if (!strcmp(order, "reverse")) o.order = kReverse;
        else if (!strcmp(order, "priority")) o.order = kPriority;
        else bad_option("SIMT_ORDER", order, "forward, reverse or priority");
    }
    o.seed = number_option("SIMT_SEED", 1, UINT64_MAX, "a whole number");
    if (const char* streams = getenv("SIMT_STREAMS")) {
        const char* allowed = "eager, late or random:SEED, where SEED is a whole number";
        if (!strcmp(streams, "late")) o.streams = kLate;
        else if (!strncmp(streams, "random:", 7)) {
            o.streams = kRandom;
            o.streams_seed = whole_number("SIMT_STREAMS", streams, streams + 7, UINT64_MAX, allowed);
        } else if (strcmp(streams, "eager")) bad_option("SIMT_STREAMS", streams, allowed);
    }
    o.poison = number_option("SIMT_POISON", 1, 1, "0 or 1");
    o.profile = number_option("SIMT_PROFILE", 0, 1, "0 or 1");
    o.report = number_option("SIMT_REPORT", 0, 1, "0 or 1");
    rlimit stack;
    if (getrlimit(RLIMIT_STACK, &stack) == 0 && stack.rlim_cur < 64 << 10) {
        fprintf(stderr, "simt error: the limit on a stack is %zu KiB (ulimit -s); expected 64 or more\n", (size_t)stack.rlim_cur >> 10);
        exit(1);
    }
    uint64_t physical = (uint64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE), limit = address_space_limit();
    o.device_memory = number_option("SIMT_MEMORY", physical < limit ? physical : limit, INT64_MAX,
                                    "a number of bytes, or a number followed by K, M or G", true);
    o.pci = number_option("SIMT_PCI", getpid(), UINT32_MAX, "a whole number");
    o.gelu = number_option("SIMT_GELU", 1, 1, "0 or 1");
    o.gelu_error = 1e-6f * number_option("SIMT_GELU_ERROR", 0, 1000000, "a whole number up to 1000000");
    return o;
}
inline const Options options = read_options();

// An error that a program cannot go on after. What the program printed so far comes out first.
[[noreturn]] inline __attribute__((format(printf, 1, 2))) void die(const char* format, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, format);
    fputs("simt error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    signal(SIGABRT, SIG_DFL);        // this is the report: none about the abort
    abort();
}

inline double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// splitmix64: the random numbers of the priority order depend on seed, launch and block alone,
// so a run can be repeated on any number of OS threads.
inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

}  // namespace simt
