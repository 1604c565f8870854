// bfloat16: the upper half of a float. Conversions and operators are those of CUDA's cuda_bf16.h, with
// the same implicit conversions, so that what is ambiguous to nvcc is ambiguous here too.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16_raw { unsigned short x; };

namespace simt {
// Round to nearest, ties to even; every NaN becomes 0x7fff, as the hardware does. No branch: it vectorises.
inline unsigned short bf16_round(float f) {
    uint32_t u = bits<uint32_t>(f);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded;
}
inline unsigned short bf16_truncate(float f) {
    uint32_t u = bits<uint32_t>(f);
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : u >> 16;
}
inline float bf16_widen(unsigned short b) { return bits<float>((uint32_t)b << 16); }
}  // namespace simt

struct __nv_bfloat16 {
    unsigned short __x;

    __nv_bfloat16() = default;
    constexpr __nv_bfloat16(const __nv_bfloat16_raw& raw) : __x(raw.x) {}
    __nv_bfloat16(float f) : __x(simt::bf16_round(f)) {}
    // Straight to float would round twice. Rounding to odd in between (a double that is no float becomes the
    // neighbour with an odd last bit) leaves the second rounding as if it were the only one.
    __nv_bfloat16(double d) {
        float f = (float)d;
        uint32_t u = simt::bits<uint32_t>(f);
        if ((double)f != d && f == f && !(u & 1) && (u & 0x7fffffff) < 0x7f800000) u += fabs((double)f) < fabs(d) ? 1 : -1;
        __x = simt::bf16_round(simt::bits<float>(u));
    }
#define SIMT_INTEGER(T)                                     \
    __nv_bfloat16(T i) : __nv_bfloat16((double)i) {}        \
    operator T() const { return simt::saturate<T>(simt::bf16_widen(__x)); }
    SIMT_INTEGER(short) SIMT_INTEGER(unsigned short)
    SIMT_INTEGER(int) SIMT_INTEGER(unsigned int)
    SIMT_INTEGER(long) SIMT_INTEGER(unsigned long)
    SIMT_INTEGER(long long) SIMT_INTEGER(unsigned long long)
#undef SIMT_INTEGER
    operator bool() const { return (__x & 0x7fff) != 0; }
    operator float() const { return simt::bf16_widen(__x); }
    operator __nv_bfloat16_raw() const { return {__x}; }
};
typedef __nv_bfloat16 nv_bfloat16;

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef __nv_bfloat162 nv_bfloat162;

// ---- conversions -----------------------------------------------------------------------------------

inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rz(float f) { return __nv_bfloat16_raw{simt::bf16_truncate(f)}; }
inline float __bfloat162float(__nv_bfloat16 b) { return (float)b; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16_raw{u}; }

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {low, high}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {(float)b.x, (float)b.y}; }

// ---- arithmetic: in float, rounded once at the end -------------------------------------------------

#define SIMT_BF16_OPERATOR(OP)                                                                                           \
    inline __nv_bfloat16 operator OP(const __nv_bfloat16& a, const __nv_bfloat16& b) { return (float)a OP (float)b; }    \
    inline __nv_bfloat16& operator OP##=(__nv_bfloat16& a, const __nv_bfloat16& b) { return a = a OP b; }
SIMT_BF16_OPERATOR(+) SIMT_BF16_OPERATOR(-) SIMT_BF16_OPERATOR(*) SIMT_BF16_OPERATOR(/)
#undef SIMT_BF16_OPERATOR
inline __nv_bfloat16 operator-(const __nv_bfloat16& a) { return __nv_bfloat16_raw{(unsigned short)(a.__x ^ 0x8000)}; }

#define SIMT_BF16_COMPARE(OP) \
    inline bool operator OP(const __nv_bfloat16& a, const __nv_bfloat16& b) { return (float)a OP (float)b; }
SIMT_BF16_COMPARE(==) SIMT_BF16_COMPARE(!=) SIMT_BF16_COMPARE(<) SIMT_BF16_COMPARE(>) SIMT_BF16_COMPARE(<=) SIMT_BF16_COMPARE(>=)
#undef SIMT_BF16_COMPARE
