// Lanes of a warp exchange values through shared memory. With `bug` they rely on running in lock step, which
// no GPU since Volta promises, instead of saying __syncwarp.
#include "planted.h"

__global__ void rotate_kernel(float* out, const float* in, bool bug) {
    __shared__ float values[32];
    int lane = threadIdx.x;
    values[lane] = in[lane];
    if (!bug) __syncwarp();
    out[lane] = values[(lane + 1) % 32];
}

int main(int argc, char** argv) {
    float *in = device_ramp(32), *out = device_ramp(32);
    rotate_kernel<<<1, 32>>>(out, in, asks_for_bug(argc, argv));
    return print_and_free(out, 32, in);
}
