// A value is broadcast through shared memory, round after round. With `bug` the barrier that keeps thread 0 from
// overwriting it before all have read it is missing: the race of a block reduction that is used in a loop.
#include "planted.h"

__global__ void broadcast_kernel(float* out, const float* in, int rounds, bool bug) {
    __shared__ float value;
    float sum = 0;
    for (int i = 0; i < rounds; i++) {
        if (threadIdx.x == 0) value = in[i];
        __syncthreads();
        sum += value * (float)(threadIdx.x + 1);
        if (!bug) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

int main(int argc, char** argv) {
    float *in = device_ramp(8), *out = device_ramp(128);
    broadcast_kernel<<<1, 128>>>(out, in, 8, asks_for_bug(argc, argv));
    return print_and_free(out, 128, in);
}
