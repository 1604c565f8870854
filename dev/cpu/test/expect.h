// What the test programs share: EXPECT counts and prints what fails, cudaCheck ends the program.
#pragma once
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0, checks = 0;
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        checks++;                                                                                  \
        if (!(condition) && ++failures < 20) printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    } while (0)

#define cudaCheck(call) cuda_check(call, __FILE__, __LINE__)
static inline void cuda_check(cudaError_t e, const char* file, int line) {
    if (e == cudaSuccess) return;
    printf("%s:%d: %s\n", file, line, cudaGetErrorString(e));
    exit(1);
}

static inline int finish() {
    cudaCheck(cudaDeviceSynchronize());
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}

template <class T> static T* device_array(size_t n) {
    T* device;
    cudaCheck(cudaMalloc(&device, n * sizeof(T)));
    return device;
}
template <class T> static T* to_device(const T* host, size_t n) {
    T* device = device_array<T>(n);
    cudaCheck(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return device;
}
template <class T> static void to_host(T* host, const T* device, size_t n) {
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpy(host, device, n * sizeof(T), cudaMemcpyDeviceToHost));
}

// -1 to 1, the same numbers in every run
static inline float uniform() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1.0f;
}
