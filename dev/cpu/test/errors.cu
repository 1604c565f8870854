// One mistake per run, each of which has to end the program with a report that names it: ./errors NAME.
// The line that the report must name carries the comment "at NAME".
#include <assert.h>

#include "expect.h"

struct Params { int which; float* p; };

__device__ void wait_here() {
    __syncthreads();                                                    // at deadlock
}

__global__ void wrong_kernel(Params params) {
    __shared__ float tile[32];
    int t = threadIdx.x;
    float v = (float)t;
    switch (params.which) {
    case 0:
        if (t < 32) wait_here();
        else v = __shfl_sync(0xffffffff, v, t == 40 ? 0 : 1) + __ballot_sync(0x1ff, 1);     // at own_mask
        break;
    case 1:
        if (t < 8) return;
        v = __shfl_sync(0xffffffff, v, 0);                              // at exited_lane
        break;
    case 2:
        if (t % 2) v = __shfl_xor_sync(0xffffffff, v, 1);
        else v = __shfl_down_sync(0xffffffff, v, 1);                    // at different_collectives
        break;
    case 3:
        tile[t == 0 ? params.which + 29 : t % 32] = v;                  // one past the end
        __syncthreads();
        v = tile[0];
        break;
    case 4:
        if (t == 5) __trap();
        break;
    case 5:
        if (t < 32) { if (t != 3) __syncwarp(); else wait_here(); }
        else wait_here();
        break;
    case 6:
        if (t < 16) v = __shfl_sync(0xffff, v, 20);                     // at outside_mask
        break;
    case 7:
        assert(t < 60);
        break;
    }
    params.p[t] = v;
}

__global__ void big_kernel(float* out) {
    __shared__ float tile[11 * 1024];
    extern __shared__ float more[];
    tile[threadIdx.x] = more[threadIdx.x] = 1;                          // 44 KB and 8 KB: more than 48
    out[threadIdx.x] = tile[threadIdx.x];
}

__device__ float sum_deeply(int n) {
    volatile float local[1024];
    local[n % 1024] = (float)n;
    return n == 0 ? 0.0f : local[n % 1024] + sum_deeply(n - 1);
}
__global__ void deep_kernel(float* out, int n) { out[threadIdx.x] = sum_deeply(n); }
__global__ void null_kernel(float* p) { p[threadIdx.x] = 1; }
__global__ void before_kernel(float* p) { p[-1] = (float)threadIdx.x; }

int main(int argc, char** argv) {
    const char* names[] = {"own_mask", "exited_lane", "different_collectives", "shared_overflow", "trap", "deadlock", "outside_mask",
                           "assert"};
    auto is = [&](const char* name) { return argc > 1 && !strcmp(argv[1], name); };
    float zeros[64] = {0}, *p = to_device(zeros, 64);
    for (int i = 0; i < 8; i++)
        if (is(names[i])) wrong_kernel<<<1, 64>>>(Params{i, p});
    if (is("shared_total")) big_kernel<<<1, 32, 8192>>>(p);
    if (is("before_start")) before_kernel<<<1, 32>>>(p);
    if (is("null_pointer")) null_kernel<<<1, 32>>>(nullptr);
    if (is("stack_overflow")) deep_kernel<<<1, 32>>>(p, 1000);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaDeviceSynchronize());
    printf("nothing reported\n");
    return 0;
}
