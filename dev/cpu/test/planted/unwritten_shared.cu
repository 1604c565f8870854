// Each thread averages its value with its neighbour's. With `bug` nobody writes the last neighbour.
#include "planted.h"

__global__ void average_kernel(float* out, const float* in, bool bug) {
    __shared__ float tile[64 + 1];
    tile[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x == 0 && !bug) tile[64] = 0;
    __syncthreads();
    out[threadIdx.x] = 0.5f * (tile[threadIdx.x] + tile[threadIdx.x + 1]);
}

int main(int argc, char** argv) {
    float *in = device_ramp(64), *out = device_ramp(64);
    average_kernel<<<1, 64>>>(out, in, asks_for_bug(argc, argv));
    return print_and_free(out, 64, in);
}
