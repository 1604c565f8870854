// Six bugs, each with a clean twin: `./planted NAME bug` has the bug, `./planted NAME` has not. The results are printed bit for
// bit, to be compared between thread orders.
#include "expect.h"

// A value is broadcast through shared memory, round after round. With `bug` the barrier that keeps thread 0 from overwriting it
// before all have read it is missing: the race of a block reduction that is used in a loop.
__global__ void broadcast_kernel(float* out, const float* in, bool bug) {
    __shared__ float value;
    float sum = 0;
    for (int i = 0; i < 8; i++) {
        if (threadIdx.x == 0) value = in[i];
        __syncthreads();
        sum += value * (float)(threadIdx.x + 1);
        if (!bug) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

// Lanes exchange values through shared memory. With `bug` they rely on running in lock step, which no GPU since Volta promises.
__global__ void rotate_kernel(float* out, const float* in, bool bug) {
    __shared__ float values[32];
    int lane = threadIdx.x;
    values[lane] = in[lane];
    if (!bug) __syncwarp();
    out[lane] = values[(lane + 1) % 32];
}

// With `bug` the guard lets one thread too many write.
__global__ void scale_kernel(float* out, const float* in, int n, bool bug) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (bug ? i <= n : i < n)
        out[i] = 2.0f;              // at past_the_end
    if (i < n) out[i] *= in[i];
}

// Each thread averages its value with its neighbour's. With `bug` nobody writes the last neighbour.
__global__ void average_kernel(float* out, const float* in, bool bug) {
    __shared__ float tile[64 + 1];
    tile[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x == 0 && !bug) tile[64] = 0;
    __syncthreads();
    out[threadIdx.x] = 0.5f * (tile[threadIdx.x] + tile[threadIdx.x + 1]);
}

// With `bug` half of the block waits at one barrier and half at another.
__global__ void exchange_kernel(float* out, const float* in, bool bug) {
    __shared__ float tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    if (bug && threadIdx.x < 32)
        __syncthreads();            // at one_barrier
    else
        __syncthreads();            // at the_other
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

// With `bug` a sum by float atomics, whose rounding depends on the order of the threads. The terms read the same from both ends,
// so that forward and reverse order agree by chance, and only a random order can tell.
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
    const int N = 100;
    float host[N];
    for (int i = 0; i < N; i++) host[i] = 0.1f * (float)(i + 1);
    float *in = to_device(host, N), *out = to_device(host, N);
    auto is = [&](const char* name) { return argc > 1 && !strcmp(argv[1], name); };
    bool bug = argc > 2;
    if (is("missing_syncthreads")) broadcast_kernel<<<1, N>>>(out, in, bug);
    if (is("missing_syncwarp")) rotate_kernel<<<1, 32>>>(out, in, bug);
    if (is("past_the_end")) scale_kernel<<<2, 64>>>(out, in, N, bug);
    if (is("unwritten_shared")) average_kernel<<<1, 64>>>(out, in, bug);
    if (is("divergent_barrier")) exchange_kernel<<<1, 64>>>(out, in, bug);
    if (is("float_atomics")) sum_kernel<<<1, 32>>>(out, bug);
    to_host(host, out, N);
    for (int i = 0; i < N; i++) printf("%a\n", host[i]);
    return 0;
}
