// With -DBUG the guard lets one thread too many write.
#include "planted.h"

__global__ void scale_kernel(float* out, const float* in, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef BUG
    if (i <= n) out[i] = 2.0f;      // BUG
#else
    if (i < n) out[i] = 2.0f * in[i];
#endif
}

int main() {
    float *in = device_ramp(100), *out = device_ramp(100);
    scale_kernel<<<2, 64>>>(out, in, 100);
    return print_and_free(out, 100, in);
}
