// With `bug` the guard lets one thread too many write.
#include "planted.h"

__global__ void scale_kernel(float* out, const float* in, int n, bool bug) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (bug ? i <= n : i < n)
        out[i] = 2.0f;              // BUG
    if (i < n) out[i] *= in[i];
}

int main(int argc, char** argv) {
    float *in = device_ramp(100), *out = device_ramp(100);
    scale_kernel<<<2, 64>>>(out, in, 100, asks_for_bug(argc, argv));
    return print_and_free(out, 100, in);
}
