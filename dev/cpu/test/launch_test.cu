// Launch errors, memory and its accounting, copies, events: what the runtime must refuse, and with which code.
#include "expect.h"

__global__ void nothing_kernel(float* p) { if (p && threadIdx.x == 2000) *p = 1; }
template <class T> __global__ void dynamic_kernel(T* out) {
    extern __shared__ char bytes[];
    bytes[threadIdx.x] = 1;
    __syncthreads();
    if (out) out[threadIdx.x] = bytes[threadIdx.x];
}

__global__ void mark_kernel(unsigned char* ran, unsigned* last) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (block < 24) ran[block]++;
    *last = block;
}

// the error that is pending, which this clears
static cudaError_t pending() {
    EXPECT(cudaPeekAtLastError() == cudaPeekAtLastError());
    return cudaGetLastError();
}

int main(int argc, char** argv) {
    bool accounting = argc > 1 && !strcmp(argv[1], "accounting");      // with SIMT_MEMORY=1M: CPU backend alone
    float *p = NULL, *q = NULL, host[4] = {1, 2, 3, 4};

    const struct { dim3 grid, block; bool good; } launches[] = {
        {1, 1025, false}, {0, 32, false}, {1, 0, false}, {dim3(1, 65536), 32, false}, {1, dim3(1, 1, 65), false},
        {dim3(1, 65535), 1024, true}};
    for (auto& l : launches) {
        nothing_kernel<<<l.grid, l.block>>>(p);
        EXPECT(pending() == (l.good ? cudaSuccess : cudaErrorInvalidConfiguration) && pending() == cudaSuccess);
    }

#ifndef __CUDACC__
    // a few blocks of a grid: x counts fastest
    unsigned char marks[24] = {0}, *ran = to_device(marks, 24);
    unsigned block = 0, *last = to_device(&block, 1);
    simt::run_only_blocks(5, 13);
    mark_kernel<<<dim3(4, 3, 2), 1>>>(ran, last);
    to_host(marks, ran, 24);
    for (int i = 0; i < 24; i++) EXPECT(marks[i] == (i >= 5 && i <= 13));
    simt::run_only_blocks(2147483646, INT64_MAX);
    mark_kernel<<<2147483647, 1>>>(ran, last);
    to_host(&block, last, 1);
    EXPECT(block == 2147483646);
    simt::run_only_blocks(24, 30);   // there are none
    mark_kernel<<<dim3(4, 3, 2), 1>>>(ran, last);
    simt::run_all_blocks();
    mark_kernel<<<dim3(4, 3, 2), 1>>>(ran, last);
    to_host(marks, ran, 24);
    for (int i = 0; i < 24; i++) EXPECT(marks[i] == 1 + (i >= 5 && i <= 13));
    cudaCheck(cudaFree(ran));
    cudaCheck(cudaFree(last));
#endif

    // dynamic shared memory: 48 KB, more with the attribute, and that per kernel
    int *no_ints = NULL, most = 0;
    auto dynamic = [&](size_t bytes) { dynamic_kernel<float><<<1, 32, bytes>>>(p); return pending(); };
    EXPECT(dynamic(48 * 1024) == cudaSuccess && dynamic(48 * 1024 + 1) == cudaErrorInvalidValue);
    cudaCheck(cudaFuncSetAttribute(dynamic_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, 80 * 1024));
    EXPECT(dynamic(80 * 1024) == cudaSuccess && dynamic(80 * 1024 + 1) == cudaErrorInvalidValue);
    dynamic_kernel<int><<<1, 32, 80 * 1024>>>(no_ints);
    EXPECT(pending() == cudaErrorInvalidValue);
    cudaCheck(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    EXPECT(cudaFuncSetAttribute(dynamic_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1) == cudaErrorInvalidValue);
    EXPECT(pending() == cudaErrorInvalidValue);

    // memory
    cudaCheck(cudaMalloc(&p, 4 * sizeof(float)));
    cudaCheck(cudaMalloc((void**)&q, 4 * sizeof(float)));
    EXPECT((uintptr_t)p % 256 == 0 && (uintptr_t)q % 256 == 0);
    cudaCheck(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpyAsync(q, p, sizeof host, cudaMemcpyDeviceToDevice, 0));
    cudaCheck(cudaMemset(p, 0, sizeof(float)));
    float back[4] = {0};
    cudaCheck(cudaMemcpy(back, q, sizeof back, cudaMemcpyDeviceToHost));
    EXPECT(back[0] == 1 && back[3] == 4);
    float* pinned;
    cudaCheck(cudaMallocHost(&pinned, sizeof host));
    cudaCheck(cudaMemcpy(pinned, p, sizeof host, cudaMemcpyDefault));
    EXPECT(pinned[0] == 0 || pinned[0] != pinned[0]);
    cudaCheck(cudaFreeHost(pinned));
    EXPECT(cudaFree(host) == cudaErrorInvalidValue && pending() == cudaErrorInvalidValue);
    cudaCheck(cudaFree(NULL));
    int device;
    EXPECT(cudaSetDevice(1000) == cudaErrorInvalidDevice && pending() == cudaErrorInvalidDevice);
    EXPECT(cudaGetDevice(&device) == cudaSuccess && device == 0);
#ifndef __CUDACC__
    // what a GPU would not survive, or not notice
    EXPECT(cudaMemcpy(p, host, sizeof host + 1, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    EXPECT(cudaMemcpy(host, back, sizeof host, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    EXPECT(cudaMemcpy(p, q, sizeof host, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    EXPECT(cudaMemset(host, 0, sizeof host) == cudaErrorInvalidValue);
    EXPECT(cudaFree(p + 1) == cudaErrorInvalidValue);
    cudaCheck(cudaFree(q));
    EXPECT(cudaFree(q) == cudaErrorInvalidValue);
    cudaGetLastError();
#endif
    if (accounting) {
        size_t available, total;
        cudaCheck(cudaMemGetInfo(&available, &total));
        EXPECT(total == 1 << 20 && available == total - sizeof host);
        EXPECT(cudaMalloc(&q, available + 1) == cudaErrorMemoryAllocation && q == NULL && pending() == cudaErrorMemoryAllocation);
        cudaCheck(cudaMalloc(&q, available));
        cudaCheck(cudaFree(q));
    }

    // events, texts, properties
    cudaEvent_t a, b;
    float ms = -1;
    for (cudaEvent_t* e : {&a, &b}) cudaCheck(cudaEventCreate(e));
    cudaCheck(cudaEventRecord(a));
    nothing_kernel<<<100, 256>>>(p);
    cudaCheck(cudaEventRecord(b));
    cudaCheck(cudaEventSynchronize(b));
    cudaCheck(cudaEventElapsedTime(&ms, a, b));
    EXPECT(ms >= 0 && ms < 1e4);
    EXPECT(!strcmp(cudaGetErrorName(cudaErrorInvalidConfiguration), "cudaErrorInvalidConfiguration"));
    EXPECT(!strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory"));
    cudaDeviceProp properties;
    cudaCheck(cudaGetDeviceProperties(&properties, 0));
    EXPECT(properties.warpSize == 32 && properties.multiProcessorCount > 0 && properties.totalGlobalMem > 0);
    for (cudaEvent_t e : {a, b}) cudaCheck(cudaEventDestroy(e));
    cudaCheck(cudaFree(p));
    return finish();
}
