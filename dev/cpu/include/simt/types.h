// CUDA's vector types and built-in variables.
#pragma once

#define SIMT_VECTORS(T, base)                                                       \
    struct alignas(8) base##2 { T x, y; };                                          \
    struct base##3 { T x, y, z; };                                                  \
    struct alignas(16) base##4 { T x, y, z, w; };                                   \
    inline base##2 make_##base##2(T x, T y) { return {x, y}; }                      \
    inline base##3 make_##base##3(T x, T y, T z) { return {x, y, z}; }              \
    inline base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned int, uint)
SIMT_VECTORS(float, float)
#undef SIMT_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

// Variables, not macros: host code has names of its own like gridDim. thread_local would check for initialisation at every use.
inline __thread uint3 threadIdx, blockIdx;
inline __thread dim3 blockDim{1, 1, 1}, gridDim{1, 1, 1};
inline constexpr int warpSize = 32;
