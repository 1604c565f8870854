// What a kernel may call: barriers, warp collectives, atomics, and the intrinsics that are plain arithmetic.
#pragma once
#include <math.h>

#include <type_traits>

#include "block.h"

// ---- barriers --------------------------------------------------------------------------------------
// The last two parameters of these and of the warp collectives are the caller's source line, by default
// arguments; nobody passes them.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_barrier("__syncthreads", {file, line}); }
inline void __syncwarp(unsigned mask = simt::kAllLanes, SIMT_SITE) { simt::gather(mask, char(0), "__syncwarp", {file, line}); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- shuffles --------------------------------------------------------------------------------------

namespace simt {
template <class T> inline T read_lane(const Gathered<T>& g, int lane, const char* what, Site site) {
    if (__builtin_expect(!(g.participants >> lane & 1), 0))
        die_in_kernel("%s at %s:%d: lane %d reads lane %d, which has exited, does not exist or is not in the mask (those that "
                      "took part: 0x%08x)", what, site.file, site.line, g.lane, lane, g.participants);
    return g.slots[lane];
}
}  // namespace simt

// `lane` is this lane, `first` and `last` bound its group of `width` lanes; a source outside it means one's own value.
#define SIMT_SHUFFLE(NAME, PARAMETER, SOURCE)                                                            \
    template <class T> inline T NAME(unsigned mask, T value, PARAMETER, int width = 32, SIMT_SITE) {     \
        static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");                                \
        simt::Gathered<T> g = simt::gather(mask, value, #NAME, {file, line});                            \
        int lane = g.lane, first = lane & -width, last = first + width - 1;                              \
        (void)first, (void)last;                                                                         \
        return simt::read_lane(g, SOURCE, #NAME, {file, line});                                          \
    }
SIMT_SHUFFLE(__shfl_sync, int source, first + (source & (width - 1)))
SIMT_SHUFFLE(__shfl_xor_sync, int bits, (lane ^ bits) <= last ? lane ^ bits : lane)
SIMT_SHUFFLE(__shfl_up_sync, unsigned delta, lane - (int)delta >= first ? lane - (int)delta : lane)
SIMT_SHUFFLE(__shfl_down_sync, unsigned delta, lane + (int)delta <= last ? lane + (int)delta : lane)
#undef SIMT_SHUFFLE

// ---- votes -----------------------------------------------------------------------------------------

namespace simt {
struct Ballot { unsigned yes, all; };
inline Ballot vote(unsigned mask, int p, const char* what, Site site) {
    Gathered<int> g = gather(mask, p, what, site);
    Ballot b = {0, g.participants};
    for (uint32_t rest = b.all; rest; rest &= rest - 1)
        if (g.slots[__builtin_ctz(rest)]) b.yes |= rest & -rest;
    return b;
}
}  // namespace simt

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) { return simt::vote(mask, p, "__ballot_sync", {file, line}).yes; }
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return simt::vote(mask, p, "__any_sync", {file, line}).yes != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_SITE) {
    simt::Ballot b = simt::vote(mask, p, "__all_sync", {file, line});
    return b.yes == b.all;
}

// ---- memory ----------------------------------------------------------------------------------------

// Shared addresses are offsets into the block's arena here, so that they fit 32 bits as on a GPU.
inline size_t __cvta_generic_to_shared(const void* p) {
    const simt::Arena& arena = simt::worker->arena;
    if (!arena.contains(p)) simt::die_in_kernel("__cvta_generic_to_shared(%p): this is no shared memory of the block", p);
    return (const char*)p - arena.memory;
}

// ---- atomics ---------------------------------------------------------------------------------------
// Really atomic: other blocks run on other OS threads.

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
template <class T, class F> inline T simt_read_modify_write(T* p, F f) {
    T old, desired;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do desired = f(old);
    while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old;
}
inline float atomicAdd(float* p, float v) { return simt_read_modify_write(p, [=](float old) { return old + v; }); }
inline int atomicMax(int* p, int v) { return simt_read_modify_write(p, [=](int old) { return old > v ? old : v; }); }

// ---- arithmetic ------------------------------------------------------------------------------------

// CUDA's min and max of floats are fminf and fmaxf: of a NaN and a number, the number.
template <class A, class B> inline constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return (T)b != (T)b || (T)a < (T)b ? (T)a : (T)b;
    else return (T)a < (T)b ? (T)a : (T)b;
}
template <class A, class B> inline constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return (T)b != (T)b || (T)a > (T)b ? (T)a : (T)b;
    else return (T)a > (T)b ? (T)a : (T)b;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// Never contracted to a multiply-add, which is what they are there for.
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}
inline float __fadd_rn(float a, float b) {
    volatile float sum = a + b;
    return sum;
}
inline float __fdividef(float a, float b) { return a / b; }
// glibc declares functions of these names for itself, so they have to be macros
#define __expf(x) expf(x)
#define __logf(x) logf(x)

// Conversions saturate and take NaN to 0, where C++ leaves them undefined.
namespace simt {
template <class I> inline I saturate(double x) {
    if (x != x) return 0;
    constexpr double low = (double)std::numeric_limits<I>::min(), high = (double)std::numeric_limits<I>::max();
    return x <= low ? std::numeric_limits<I>::min() : x >= high ? std::numeric_limits<I>::max() : (I)x;
}
template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace simt
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

[[noreturn]] inline void __trap() { simt::die_in_kernel("__trap()"); }
