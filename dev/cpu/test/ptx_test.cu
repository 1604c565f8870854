// The emulated tensor-core and asynchronous-copy instructions (simt/ptx.h), each against what PTX's manual says.
// `./ptx_test bug` never waits for its copies.
#include <cuda_bf16.h>

#include "expect.h"

typedef __nv_bfloat16 bf16;

__device__ uint32_t pack(bf16 low, bf16 high) { return (uint32_t)__bfloat16_as_ushort(low) | (uint32_t)__bfloat16_as_ushort(high) << 16; }

// d = a b + c, with a (16,16), b (16,8), c and d (16,8), all row-major; registers filled by hand
__global__ void mma_kernel(float* d, const bf16* a, const bf16* b, const float* c) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fc[4], fd[4];
    for (int i = 0; i < 4; i++) {
        int row = g + i % 2 * 8, col = 2 * t + i / 2 * 8;
        fa[i] = pack(a[row * 16 + col], a[row * 16 + col + 1]);
        fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    for (int i = 0; i < 2; i++) fb[i] = pack(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    simt::mma_m16n8k16_bf16(fd, fa, fb, fc);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

static void mma() {
    bf16 a[256], b[128];
    float c[128], d[128];
    for (bf16& x : a) x = uniform();
    for (bf16& x : b) x = uniform();
    for (float& x : c) x = uniform();
    bf16 *da = to_device(a, 256), *db = to_device(b, 128);
    float *dc = to_device(c, 128), *dd = device_array<float>(128);
    mma_kernel<<<1, 32>>>(dd, da, db, dc);
    to_host(d, dd, 128);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = c[i * 8 + j], size = fabs(sum);
            for (int k = 0; k < 16; k++) {
                double product = (double)(float)a[i * 16 + k] * (double)(float)b[k * 8 + j];
                sum += product, size += fabs(product);
            }
            EXPECT(fabs(d[i * 8 + j] - sum) <= 1e-6 * size);
        }
}

// out (32, N): the registers of every lane; matrices (N, 8, 8)
template <int N, bool TRANSPOSED> __global__ void ldmatrix_kernel(uint32_t* out, const uint16_t* matrices) {
    __shared__ alignas(16) uint16_t rows[N][8][8];
    int lane = threadIdx.x, matrix = lane / 8 % N;         // with N = 2 the upper half's addresses are not used
    for (int col = 0; col < 8; col++) rows[matrix][lane % 8][col] = matrices[matrix * 64 + lane % 8 * 8 + col];
    __syncwarp();
    uint32_t r[N];
    simt::ldmatrix<N, TRANSPOSED>(r, (uint32_t)__cvta_generic_to_shared(rows[matrix][lane % 8]));
    for (int i = 0; i < N; i++) out[lane * N + i] = r[i];
}

template <int N, bool TRANSPOSED> static void ldmatrix() {
    uint16_t matrices[N * 64];
    uint32_t got[32 * N], *out = device_array<uint32_t>(32 * N);
    for (int i = 0; i < N * 64; i++) matrices[i] = (uint16_t)(1000 + 7 * i);
    ldmatrix_kernel<N, TRANSPOSED><<<1, 32>>>(out, to_device(matrices, N * 64));
    to_host(got, out, 32 * N);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < N; i++) {
            int g = lane / 4, t = lane % 4 * 2;
            auto m = [&](int row, int col) { return (uint32_t)matrices[i * 64 + row * 8 + col]; };
            EXPECT(got[lane * N + i] == (TRANSPOSED ? m(t, g) | m(t + 1, g) << 16 : m(g, t) | m(g, t + 1) << 16));
        }
}

// A block copies n floats by way of two buffers: while it writes one out, by the lane that did not fetch it, the next is under
// way. What lies past n arrives as zero, and nothing is read there.
__global__ void copy_kernel(float* out, const float* in, int n, int rounds, int bug) {
    __shared__ alignas(16) float buffer[2][32][4];
    int lane = threadIdx.x;
    auto fetch = [&](int round) {
        int first = (round * 32 + lane) * 4, valid = first >= n ? 0 : n - first < 4 ? n - first : 4;
        uint32_t to = (uint32_t)__cvta_generic_to_shared(buffer[round % 2][lane]);
        if (round < rounds) simt::cp_async<16>(to, in + (valid ? first : 0), valid * 4);
        simt::cp_async_commit();                           // an empty group, in the last round
    };
    fetch(0);
    for (int round = 0; round < rounds; round++) {
        fetch(round + 1);
        if (bug == 0) simt::cp_async_wait(1);
        __syncthreads();
        for (int i = 0; i < 4; i++) out[(round * 32 + lane) * 4 + i] = buffer[round % 2][31 - lane][i];
        __syncthreads();
    }
    if (bug == 1) simt::cp_async_wait(0);   // too late; with 2 never
}

static void copies(int bug) {
    const int n = 3 * 128 - 50, rounds = 3;
    float in[n], got[rounds * 128], *out = device_array<float>(rounds * 128);
    for (int i = 0; i < n; i++) in[i] = (float)(i + 1);
    copy_kernel<<<1, 32>>>(out, to_device(in, n), n, rounds, bug);
    to_host(got, out, rounds * 128);
    for (int i = 0; i < rounds * 128; i++) {
        int at = i / 128 * 128 + (31 - i % 128 / 4) * 4 + i % 4;
        EXPECT(got[i] == (at < n ? in[at] : 0));
    }
}

int main(int argc, char**) {
    mma();
    ldmatrix<4, false>();
    ldmatrix<4, true>();
    ldmatrix<2, false>();
    ldmatrix<2, true>();
    copies(argc - 1);
    return finish();
}
