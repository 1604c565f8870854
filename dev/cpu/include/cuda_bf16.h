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
    SIMT_INTEGER(short)
    SIMT_INTEGER(unsigned short)
    SIMT_INTEGER(int)
    SIMT_INTEGER(unsigned int)
    SIMT_INTEGER(long)
    SIMT_INTEGER(unsigned long)
    SIMT_INTEGER(long long)
    SIMT_INTEGER(unsigned long long)
#undef SIMT_INTEGER
    operator signed char() const { return simt::saturate<signed char>(simt::bf16_widen(__x)); }
    operator unsigned char() const { return simt::saturate<unsigned char>(simt::bf16_widen(__x)); }
    operator char() const { return simt::saturate<char>(simt::bf16_widen(__x)); }
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
inline __nv_bfloat16 __double2bfloat16(double d) { return d; }
inline __nv_bfloat16 __int2bfloat16_rn(int i) { return i; }
inline float __bfloat162float(__nv_bfloat16 b) { return (float)b; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
inline short __bfloat16_as_short(__nv_bfloat16 b) { return (short)b.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16_raw{u}; }
inline __nv_bfloat16 __short_as_bfloat16(short s) { return __nv_bfloat16_raw{(unsigned short)s}; }

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 b) { return {b, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {f, f}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {low, high}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {(float)b.x, (float)b.y}; }
inline float __low2float(__nv_bfloat162 b) { return (float)b.x; }
inline float __high2float(__nv_bfloat162 b) { return (float)b.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }

// ---- arithmetic: in float, rounded once at the end -------------------------------------------------

#define SIMT_BF16_OPERATOR(OP, NAME)                                                                                        \
    inline __nv_bfloat16 operator OP(const __nv_bfloat16& a, const __nv_bfloat16& b) { return (float)a OP (float)b; }       \
    inline __nv_bfloat16& operator OP##=(__nv_bfloat16& a, const __nv_bfloat16& b) { return a = a OP b; }                   \
    inline __nv_bfloat162 operator OP(const __nv_bfloat162& a, const __nv_bfloat162& b) { return {a.x OP b.x, a.y OP b.y}; } \
    inline __nv_bfloat162& operator OP##=(__nv_bfloat162& a, const __nv_bfloat162& b) { return a = a OP b; }                \
    inline __nv_bfloat16 NAME(__nv_bfloat16 a, __nv_bfloat16 b) { return a OP b; }                                          \
    inline __nv_bfloat162 NAME##2(__nv_bfloat162 a, __nv_bfloat162 b) { return a OP b; }
SIMT_BF16_OPERATOR(+, __hadd)
SIMT_BF16_OPERATOR(-, __hsub)
SIMT_BF16_OPERATOR(*, __hmul)
#undef SIMT_BF16_OPERATOR
inline __nv_bfloat16 operator/(const __nv_bfloat16& a, const __nv_bfloat16& b) { return (float)a / (float)b; }
inline __nv_bfloat16& operator/=(__nv_bfloat16& a, const __nv_bfloat16& b) { return a = a / b; }
inline __nv_bfloat16 __hdiv(__nv_bfloat16 a, __nv_bfloat16 b) { return a / b; }
inline __nv_bfloat16 operator+(const __nv_bfloat16& a) { return a; }
inline __nv_bfloat16 operator-(const __nv_bfloat16& a) { return __nv_bfloat16_raw{(unsigned short)(a.__x ^ 0x8000)}; }
inline __nv_bfloat16 __hneg(__nv_bfloat16 a) { return -a; }
inline __nv_bfloat16 __habs(__nv_bfloat16 a) { return __nv_bfloat16_raw{(unsigned short)(a.__x & 0x7fff)}; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return fmaf((float)a, (float)b, (float)c); }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return max((float)a, (float)b); }
inline __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return min((float)a, (float)b); }
inline bool __hisnan(__nv_bfloat16 a) { return (a.__x & 0x7fff) > 0x7f80; }

#define SIMT_BF16_COMPARE(OP, NAME)                                                                                  \
    inline bool operator OP(const __nv_bfloat16& a, const __nv_bfloat16& b) { return (float)a OP (float)b; }         \
    inline bool NAME(__nv_bfloat16 a, __nv_bfloat16 b) { return a OP b; }
SIMT_BF16_COMPARE(==, __heq)
SIMT_BF16_COMPARE(!=, __hne)
SIMT_BF16_COMPARE(<, __hlt)
SIMT_BF16_COMPARE(>, __hgt)
SIMT_BF16_COMPARE(<=, __hle)
SIMT_BF16_COMPARE(>=, __hge)
#undef SIMT_BF16_COMPARE

inline __nv_bfloat16 atomicAdd(__nv_bfloat16* p, __nv_bfloat16 v) {
    return simt::read_modify_write(p, [=](__nv_bfloat16 old) { return old + v; });
}
inline __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 v) {
    return simt::read_modify_write(p, [=](__nv_bfloat162 old) { return old + v; });
}
