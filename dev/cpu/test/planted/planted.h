// What the planted bugs share: `./NAME bug` has the bug, `./NAME` is its clean twin. The results are printed bit for bit, to be compared between thread orders.
#pragma once
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(cudaError_t e) {
    if (e == cudaSuccess) return;
    printf("%s\n", cudaGetErrorString(e));
    exit(1);
}

static bool asks_for_bug(int argc, char** argv) { return argc > 1 && !strcmp(argv[1], "bug"); }

// n floats on the device: 0.1, 0.2, 0.3, ...
static float* device_ramp(int n) {
    float *host = new float[n], *device;
    for (int i = 0; i < n; i++) host[i] = 0.1f * (float)(i + 1);
    check(cudaMalloc(&device, n * sizeof(float)));
    check(cudaMemcpy(device, host, n * sizeof(float), cudaMemcpyHostToDevice));
    delete[] host;
    return device;
}

static int print_and_free(float* out, int n, float* in) {
    float* host = new float[n];
    check(cudaGetLastError());
    check(cudaMemcpy(host, out, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i++) printf("%a\n", host[i]);
    delete[] host;
    check(cudaFree(out));
    check(cudaFree(in));
    return 0;
}
