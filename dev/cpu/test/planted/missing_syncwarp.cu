// Lanes of a warp exchange values through shared memory. With -DBUG they rely on running in lock step, which
// no GPU since Volta promises, instead of saying __syncwarp.
#include "planted.h"

__global__ void rotate_kernel(float* out, const float* in) {
    __shared__ float values[32];
    int lane = threadIdx.x;
    values[lane] = in[lane];
#ifndef BUG
    __syncwarp();
#endif
    out[lane] = values[(lane + 1) % 32];
}

int main() {
    float *in = device_ramp(32), *out = device_ramp(32);
    rotate_kernel<<<1, 32>>>(out, in);
    return print_and_free(out, 32, in);
}
