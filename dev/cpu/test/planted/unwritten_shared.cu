// Each thread averages its value with its neighbour's. With -DBUG nobody writes the last neighbour.
#include "planted.h"

__global__ void average_kernel(float* out, const float* in) {
    __shared__ float tile[64 + 1];
    tile[threadIdx.x] = in[threadIdx.x];
#ifndef BUG
    if (threadIdx.x == 0) tile[64] = 0;
#endif
    __syncthreads();
    out[threadIdx.x] = 0.5f * (tile[threadIdx.x] + tile[threadIdx.x + 1]);
}

int main() {
    float *in = device_ramp(64), *out = device_ramp(64);
    average_kernel<<<1, 64>>>(out, in);
    return print_and_free(out, 64, in);
}
