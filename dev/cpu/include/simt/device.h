// What a kernel may call: barriers, warp collectives, atomics, and the intrinsics that are plain arithmetic.
#pragma once
#include <math.h>

#include <type_traits>

#include "block.h"

// ---- barriers --------------------------------------------------------------------------------------
// The last two parameters of these and of the warp collectives are the caller's source line, by default
// arguments; nobody passes them.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_barrier("__syncthreads", false, {file, line}); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_count", p != 0, {file, line}).yes; }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_or", p != 0, {file, line}).yes != 0; }
inline int __syncthreads_and(int p, SIMT_SITE) {
    simt::Votes v = simt::block_barrier("__syncthreads_and", p != 0, {file, line});
    return v.yes == v.all;
}
inline void __syncwarp(unsigned mask = simt::kAllLanes, SIMT_SITE) { simt::gather(mask, char(0), "__syncwarp", {file, line}); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- shuffles --------------------------------------------------------------------------------------

namespace simt {
template <class T>
inline T read_lane(const Gathered<T>& g, int lane, const char* what, Site site) {
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

// ---- votes and reductions --------------------------------------------------------------------------
// Computed once, by the lane that completes the collective, into the slot of the first participant.

namespace simt {
template <class T, class Op> inline T reduce_lanes(unsigned mask, T value, const char* what, Site site) {
    Gathered<T> g = gather(mask, value, what, site, [](void* slots, uint32_t participants) {
        T* s = (T*)slots;
        int first = __builtin_ctz(participants);
        T result = Op::start(s[first], first);
        for (uint32_t rest = participants & (participants - 1); rest; rest &= rest - 1)
            result = Op::add(result, s[__builtin_ctz(rest)], __builtin_ctz(rest));
        s[first] = result;
    });
    return g.slots[__builtin_ctz(g.participants)];
}
struct Ballot {
    static unsigned start(unsigned v, int lane) { return v << lane; }
    static unsigned add(unsigned a, unsigned v, int lane) { return a | v << lane; }
};
#define SIMT_OP(NAME, EXPRESSION)                                                        \
    struct NAME {                                                                        \
        template <class T> static T start(T v, int) { return v; }                        \
        template <class T> static T add(T a, T b, int) { return EXPRESSION; }            \
    };
SIMT_OP(Add, a + b)
SIMT_OP(Min, a < b ? a : b)
SIMT_OP(Max, a > b ? a : b)
SIMT_OP(And, a & b)
SIMT_OP(Or, a | b)
SIMT_OP(Xor, a ^ b)
#undef SIMT_OP
}  // namespace simt

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) {
    return simt::reduce_lanes<unsigned, simt::Ballot>(mask, p != 0, "__ballot_sync", {file, line});
}
inline int __any_sync(unsigned mask, int p, SIMT_SITE) {
    return simt::reduce_lanes<int, simt::Or>(mask, p != 0, "__any_sync", {file, line});
}
inline int __all_sync(unsigned mask, int p, SIMT_SITE) {
    return simt::reduce_lanes<int, simt::And>(mask, p != 0, "__all_sync", {file, line});
}
#define SIMT_REDUCE(T, NAME, OP) \
    inline T NAME(unsigned mask, T value, SIMT_SITE) { return simt::reduce_lanes<T, simt::OP>(mask, value, #NAME, {file, line}); }
SIMT_REDUCE(unsigned, __reduce_add_sync, Add)
SIMT_REDUCE(unsigned, __reduce_min_sync, Min)
SIMT_REDUCE(unsigned, __reduce_max_sync, Max)
SIMT_REDUCE(int, __reduce_min_sync, Min)
SIMT_REDUCE(int, __reduce_max_sync, Max)
SIMT_REDUCE(unsigned, __reduce_and_sync, And)
SIMT_REDUCE(unsigned, __reduce_or_sync, Or)
SIMT_REDUCE(unsigned, __reduce_xor_sync, Xor)
#undef SIMT_REDUCE
inline int __reduce_add_sync(unsigned mask, int value, SIMT_SITE) {       // wraps around
    return (int)__reduce_add_sync(mask, (unsigned)value, file, line);
}

// ---- memory ----------------------------------------------------------------------------------------

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldlu(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { return *p; }
template <class T> inline void __stwb(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stwt(T* p, T v) { *p = v; }

// Shared addresses are offsets into the block's arena here, so that they fit 32 bits as on a GPU.
inline size_t __cvta_generic_to_shared(const void* p) {
    const simt::Arena& arena = simt::worker->arena;
    if (!arena.contains(p)) simt::die_in_kernel("__cvta_generic_to_shared(%p): this is no shared memory of the block", p);
    return (const char*)p - arena.memory;
}

// ---- atomics ---------------------------------------------------------------------------------------
// Really atomic: other blocks run on other OS threads.

namespace simt {
template <class T, class F> inline T read_modify_write(T* p, F f) {
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    static_assert(sizeof(Word) == sizeof(T));
    Word old = __atomic_load_n((Word*)p, __ATOMIC_RELAXED), desired;
    T before;
    do {
        memcpy(&before, &old, sizeof before);
        T after = f(before);
        memcpy(&desired, &after, sizeof after);
    } while (!__atomic_compare_exchange_n((Word*)p, &old, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return before;
}
}  // namespace simt

#define SIMT_ATOMIC(T, NAME, EXPRESSION) \
    inline T NAME(T* p, T v) { return simt::read_modify_write(p, [=](T old) -> T { return EXPRESSION; }); }
#define SIMT_ATOMICS(T)                             \
    SIMT_ATOMIC(T, atomicMin, old < v ? old : v)    \
    SIMT_ATOMIC(T, atomicMax, old > v ? old : v)    \
    SIMT_ATOMIC(T, atomicAnd, old & v)              \
    SIMT_ATOMIC(T, atomicOr, old | v)               \
    SIMT_ATOMIC(T, atomicXor, old ^ v)              \
    SIMT_ATOMIC(T, atomicExch, ((void)old, v))      \
    inline T atomicCAS(T* p, T expected, T v) {     \
        return simt::read_modify_write(p, [=](T old) { return old == expected ? v : old; }); \
    }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS
SIMT_ATOMIC(int, atomicAdd, (int)((unsigned)old + (unsigned)v))
SIMT_ATOMIC(unsigned, atomicAdd, old + v)
SIMT_ATOMIC(unsigned long long, atomicAdd, old + v)
SIMT_ATOMIC(float, atomicAdd, old + v)
SIMT_ATOMIC(double, atomicAdd, old + v)
SIMT_ATOMIC(float, atomicExch, ((void)old, v))
SIMT_ATOMIC(int, atomicSub, (int)((unsigned)old - (unsigned)v))
SIMT_ATOMIC(unsigned, atomicSub, old - v)
SIMT_ATOMIC(unsigned, atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(unsigned, atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC

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
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }      // NaN gives 0, as in hardware
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
// glibc declares functions of these names for itself, so they have to be macros
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

// These promise one rounding each: the compiler must not fuse a product and a sum of them.
namespace simt {
inline float rounded(float x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#else
    asm("" : "+w"(x));
#endif
    return x;
}
}  // namespace simt
inline float __fmul_rn(float a, float b) { return simt::rounded(a * b); }
inline float __fadd_rn(float a, float b) { return simt::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return simt::rounded(a - b); }
inline float __fdiv_rn(float a, float b) { return a / b; }

// Conversions saturate and take NaN to 0, where C++ leaves them undefined.
namespace simt {
template <class I> inline I saturate(double x) {
    if (x != x) return 0;
    constexpr double low = (double)std::numeric_limits<I>::min(), high = (double)std::numeric_limits<I>::max();
    return x <= low ? std::numeric_limits<I>::min() : x >= high ? std::numeric_limits<I>::max() : (I)x;
}
}  // namespace simt
inline int __float2int_rn(float x) { return simt::saturate<int>(rintf(x)); }
inline int __float2int_rz(float x) { return simt::saturate<int>(truncf(x)); }
inline int __float2int_rd(float x) { return simt::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return simt::saturate<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return simt::saturate<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return simt::saturate<unsigned>(truncf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }

namespace simt {
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
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) { return ((uint64_t)high << 32 | low) << (n & 31) >> 32; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) { return ((uint64_t)high << 32 | low) >> (n & 31); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 0xf, byte = both >> 8 * (s & 7) & 0xff;
        result |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline int __mulhi(int a, int b) { return (int64_t)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }

inline long long clock64() { return (long long)(simt::seconds() * 1e9); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { simt::die_in_kernel("__trap()"); }
