// The worked example of dev/cpu/README.md. `./differences race` lacks a barrier, `./differences overrun` reads past the end of
// shared memory, `./differences` is right.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

// out[i] = in[i + 1] - in[i] within each tile of 64, and 0 for the last of a tile
__global__ void differences_kernel(int* out, const int* in, int n, bool race, bool overrun) {
    __shared__ int tile[64];
    int t = threadIdx.x;
    for (int first = 0; first < n; first += 64) {
        tile[t] = in[first + t];
        __syncthreads();
        bool last = t == 63 && !overrun;
        out[first + t] = last ? 0 : tile[t + 1] - tile[t];
        if (!race) __syncthreads();
    }
}

int main(int argc, char** argv) {
    const int N = 256;
    bool race = argc > 1 && !strcmp(argv[1], "race"), overrun = argc > 1 && !strcmp(argv[1], "overrun");
    int host[N], *in, *out, wrong = 0;
    for (int i = 0; i < N; i++) host[i] = i * i;
    cudaMalloc(&in, sizeof host);
    cudaMalloc(&out, sizeof host);
    cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice);
    differences_kernel<<<1, 64>>>(out, in, N, race, overrun);
    cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
    for (int i = 0; i < N; i++) {
        int expected = i % 64 == 63 ? 0 : 2 * i + 1;
        if (host[i] != expected && wrong++ == 0) printf("out[%d] is %d, expected %d\n", i, host[i], expected);
    }
    printf("%d of %d are wrong\n", wrong, N);
    cudaFree(in);
    cudaFree(out);
    return wrong > 0;
}
