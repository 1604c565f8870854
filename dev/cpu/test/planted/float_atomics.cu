// With `bug` a sum by float atomics, whose rounding depends on the order of the threads. The terms read the same
// from both ends, so that forward and reverse order agree by chance, and only a random order can tell.
#include "planted.h"

__global__ void sum_kernel(float* out, bool bug) {
    int t = threadIdx.x, from_end = t < 16 ? t : 31 - t;
    float term = (from_end % 2 ? 4096.7f : 0.013f) * (float)(from_end + 1);
    if (bug) {
        atomicAdd(out, term);
    } else {
        for (int o = 16; o > 0; o /= 2) term += __shfl_xor_sync(0xffffffff, term, o);
        if (t == 0) out[0] += term;
    }
}

int main(int argc, char** argv) {
    float* out = device_ramp(1);
    sum_kernel<<<1, 32>>>(out, asks_for_bug(argc, argv));
    return print_and_free(out, 1, NULL);
}
