// With `bug` half of the block waits at one barrier and half at another.
#include "planted.h"

__global__ void exchange_kernel(float* out, const float* in, bool bug) {
    __shared__ float tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    if (!bug) {
        __syncthreads();
        out[threadIdx.x] = tile[threadIdx.x ^ 32];
    } else if (threadIdx.x < 32) {
        __syncthreads();            // BUG
        out[threadIdx.x] = tile[threadIdx.x + 32];
    } else {
        __syncthreads();            // BUG
        out[threadIdx.x] = tile[threadIdx.x - 32];
    }
}

int main(int argc, char** argv) {
    float *in = device_ramp(64), *out = device_ramp(64);
    exchange_kernel<<<1, 64>>>(out, in, asks_for_bug(argc, argv));
    return print_and_free(out, 64, in);
}
