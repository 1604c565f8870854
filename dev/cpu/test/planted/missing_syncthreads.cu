// A value is broadcast through shared memory, round after round. With -DBUG the barrier that keeps thread 0 from
// overwriting it before all have read it is missing: the race of a block reduction that is used in a loop.
#include "planted.h"

__global__ void broadcast_kernel(float* out, const float* in, int rounds) {
    __shared__ float value;
    float sum = 0;
    for (int i = 0; i < rounds; i++) {
        if (threadIdx.x == 0) value = in[i];
        __syncthreads();
        sum += value * (float)(threadIdx.x + 1);
#ifndef BUG
        __syncthreads();
#endif
    }
    out[threadIdx.x] = sum;
}

int main() {
    float *in = device_ramp(8), *out = device_ramp(128);
    broadcast_kernel<<<1, 128>>>(out, in, 8);
    return print_and_free(out, 128, in);
}
