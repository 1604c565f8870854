// Tensor-core and asynchronous-copy instructions as device functions: the PTX for a GPU, the emulation of
// dev/cpu where there is none. Here each is checked against a plain product; from here they go into a trainer.
//
// -DMISSING_WAIT plants a bug: the copies are never waited for.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef __nv_bfloat16 bf16;

#define cudaCheck(call) cuda_check(call, __FILE__, __LINE__)
static void cuda_check(cudaError_t e, const char* file, int line) {
    if (e == cudaSuccess) return;
    printf("%s:%d: %s\n", file, line, cudaGetErrorString(e));
    exit(1);
}

// ---- the instructions ------------------------------------------------------------------------------

// d = a b + c for a 16 x 16, b 16 x 8, c and d 16 x 8; bf16 inputs, fp32 sums. A warp's registers hold the
// matrices like this, with g = lane / 4 and t = lane % 4, two bf16 to a register, the lower column (of b: the
// lower row) in the lower half:
//
//     a[0] = (row g,     cols 2t, 2t+1)    a[2] = (row g,     cols 2t+8, 2t+9)
//     a[1] = (row g + 8, cols 2t, 2t+1)    a[3] = (row g + 8, cols 2t+8, 2t+9)
//     b[0] = (rows 2t, 2t+1,     col g)    b[1] = (rows 2t+8, 2t+9, col g)
//     c[0], c[1] = (row g, cols 2t, 2t+1)  c[2], c[3] = (row g + 8, cols 2t, 2t+1)       and d likewise
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    simt::mma_m16n8k16_bf16(d, a, b, c);
#endif
}

// Load four 8 x 8 matrices of bf16 from shared memory. Lane 8i + j gives the address of row j of matrix i: 16
// bytes, aligned to 16. Register r[i] of every lane gets a pair of matrix i: (row lane / 4, cols 2 (lane % 4), +1).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
    simt::ldmatrix<4, false>(r, address);
#endif
}
// The same, each matrix transposed: r[i] = (rows 2 (lane % 4), +1, col lane / 4) of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
    simt::ldmatrix<4, true>(r, address);
#endif
}
// Two matrices, of which lanes 0 to 15 give the rows. The addresses of the other lanes are not used.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
    simt::ldmatrix<2, false>(r, address);
#endif
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
    simt::ldmatrix<2, true>(r, address);
#endif
}

// Start to copy 16 bytes from global to shared memory, or to write 16 zero bytes if not `valid` (then nothing is
// read). They are there after a cp_async_wait for their group by the same thread, and for others after a barrier.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    int source_bytes = valid ? 16 : 0;
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(global), "r"(source_bytes) : "memory");
#else
    simt::cp_async<16>(address, global, source_bytes);
#endif
}
// Close a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::cp_async_commit();
#endif
}
// Wait until at most N of this thread's groups are still under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#else
    simt::cp_async_wait(N);
#endif
}

// ---- one tile, its registers filled by hand as the comment above says ------------------------------

__device__ uint32_t pack(bf16 low, bf16 high) {
    return (uint32_t)__bfloat16_as_ushort(low) | (uint32_t)__bfloat16_as_ushort(high) << 16;
}

// a (16,16), b (16,8), c and d (16,8), all row-major
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
    mma_m16n8k16(fd, fa, fb, fc);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

// ---- ldmatrix: out (6, 32, 4) holds the registers of every lane for each variant --------------------

__global__ void ldmatrix_kernel(uint32_t* out, const uint16_t* matrices) {      // matrices (4, 8, 8)
    __shared__ alignas(16) uint16_t rows[4][8][8];
    int lane = threadIdx.x;
    for (int col = 0; col < 8; col++) rows[lane / 8][lane % 8][col] = matrices[lane * 8 + col];
    __syncwarp();
    uint32_t r4[4], r2[2];
    const void* mine = rows[lane / 8][lane % 8];
    ldmatrix_x4(r4, mine);
    for (int i = 0; i < 4; i++) out[(0 * 32 + lane) * 4 + i] = r4[i];
    ldmatrix_x4_trans(r4, mine);
    for (int i = 0; i < 4; i++) out[(1 * 32 + lane) * 4 + i] = r4[i];
    mine = rows[lane / 8 % 2][lane % 8];
    ldmatrix_x2(r2, mine);
    for (int i = 0; i < 2; i++) out[(2 * 32 + lane) * 4 + i] = r2[i];
    ldmatrix_x2_trans(r2, mine);
    for (int i = 0; i < 2; i++) out[(3 * 32 + lane) * 4 + i] = r2[i];
}

// ---- a product with everything: cp.async into two buffers, ldmatrix, mma ----------------------------
// c (M,N) = a (M,K) b, with b (K,N), or (N,K) if transposed; 64 x 64 of c to a block of 4 warps, 32 x 32 to a warp.
// N and K are multiples of 64 and 32; M is any number (rows past it are read as zero).

constexpr int kTileM = 64, kTileN = 64, kTileK = 32, kPad = 8;     // rows padded by 16 bytes: fewer bank conflicts

template <bool TRANSPOSED>
__global__ void __launch_bounds__(128) product_kernel(float* c, const bf16* a, const bf16* b, int M, int N, int K) {
    constexpr int kRowsB = TRANSPOSED ? kTileN : kTileK, kColsB = TRANSPOSED ? kTileK : kTileN;
    __shared__ alignas(16) bf16 sa[2][kTileM][kTileK + kPad];
    __shared__ alignas(16) bf16 sb[2][kRowsB][kColsB + kPad];
    int m0 = blockIdx.y * kTileM, n0 = blockIdx.x * kTileN;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp / 2 * 32, col0 = warp % 2 * 32;

    auto fetch = [&](int buffer, int k0) {
        for (int i = threadIdx.x; i < kTileM * kTileK / 8; i += blockDim.x) {
            int row = i / (kTileK / 8), col = i % (kTileK / 8) * 8;
            bool valid = m0 + row < M;
            cp_async_16(&sa[buffer][row][col], a + (valid ? (size_t)(m0 + row) * K + k0 + col : 0), valid);
        }
        for (int i = threadIdx.x; i < kRowsB * kColsB / 8; i += blockDim.x) {
            int row = i / (kColsB / 8), col = i % (kColsB / 8) * 8;
            cp_async_16(&sb[buffer][row][col], TRANSPOSED ? b + (size_t)(n0 + row) * K + k0 + col : b + (size_t)(k0 + row) * N + n0 + col);
        }
        cp_async_commit();
    };

    float acc[2][4][4] = {};           // [16 rows][8 columns][registers]
    fetch(0, 0);
    for (int k0 = 0, buffer = 0; k0 < K; k0 += kTileK, buffer ^= 1) {
        if (k0 + kTileK < K) fetch(buffer ^ 1, k0 + kTileK);
        else cp_async_commit();        // an empty group, so that the wait below counts the same in the last round
#ifndef MISSING_WAIT
        cp_async_wait<1>();
#endif
        __syncthreads();
        for (int k = 0; k < kTileK; k += 16) {
            uint32_t fa[2][4], fb[2][4];
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(fa[i], &sa[buffer][row0 + 16 * i + lane % 16][k + lane / 16 * 8]);
                // two fragments of b at a time: columns 16 i to 16 i + 15
                if (TRANSPOSED) ldmatrix_x4(fb[i], &sb[buffer][col0 + 16 * i + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
                else ldmatrix_x4_trans(fb[i], &sb[buffer][k + lane % 16][col0 + 16 * i + lane / 16 * 8]);
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) {
                    uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16(acc[i][j], fa[i], pair, acc[i][j]);
                }
        }
        __syncthreads();               // all have read this buffer before it is filled again
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < 4; r++) {
                int row = m0 + row0 + 16 * i + lane / 4 + r / 2 * 8, col = n0 + col0 + 8 * j + lane % 4 * 2 + r % 2;
                if (row < M) c[(size_t)row * N + col] = acc[i][j][r];
            }
}

// ---- checks ----------------------------------------------------------------------------------------

static uint32_t random_state = 1;
static float uniform() {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / (1 << 23) - 1.0f;
}
template <class T> static T* random_device(T* host, int n) {
    for (int i = 0; i < n; i++) host[i] = (T)uniform();
    T* device;
    cudaCheck(cudaMalloc(&device, n * sizeof(T)));
    cudaCheck(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return device;
}

// c - a b, largest difference relative to the sum of magnitudes
static double error(const float* c, const bf16* a, const bf16* b, const float* start, int M, int N, int K, bool transposed) {
    double worst = 0;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = start ? start[i * N + j] : 0, size = fabs(sum);
            for (int k = 0; k < K; k++) {
                double product = (double)(float)a[i * K + k] * (double)(float)b[transposed ? j * K + k : k * N + j];
                sum += product;
                size += fabs(product);
            }
            double e = fabs(c[i * N + j] - sum) / size;
            if (!(e <= worst)) worst = e;        // a NaN too
        }
    return worst;
}

int failures = 0;
static void report(const char* what, double error, double limit) {
    bool good = error <= limit;
    printf("%-44s %9.2e %s\n", what, error, good ? "ok" : "WRONG");
    failures += !good;
}

template <bool TRANSPOSED> static void check_product(const char* what, int M, int N, int K) {
    bf16 *a = new bf16[M * K], *b = new bf16[K * N];
    float* c = new float[M * N];
    bf16 *da = random_device(a, M * K), *db = random_device(b, K * N);
    float* dc = random_device(c, M * N);
    product_kernel<TRANSPOSED><<<dim3(N / kTileN, (M + kTileM - 1) / kTileM), 128>>>(dc, da, db, M, N, K);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpy(c, dc, M * N * sizeof(float), cudaMemcpyDeviceToHost));
    report(what, error(c, a, b, NULL, M, N, K, TRANSPOSED), 1e-6);
    cudaCheck(cudaFree(da));
    cudaCheck(cudaFree(db));
    cudaCheck(cudaFree(dc));
    delete[] a, delete[] b, delete[] c;
}

int main() {
    {
        bf16 a[256], b[128];
        float c[128], d[128];
        bf16 *da = random_device(a, 256), *db = random_device(b, 128);
        float *dc = random_device(c, 128), *dd = random_device(d, 128);
        mma_kernel<<<1, 32>>>(dd, da, db, dc);
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaMemcpy(d, dd, sizeof d, cudaMemcpyDeviceToHost));
        report("mma.m16n8k16, registers filled by hand", error(d, a, b, c, 16, 8, 16, false), 1e-6);
        cudaCheck(cudaFree(da));
        cudaCheck(cudaFree(db));
        cudaCheck(cudaFree(dc));
        cudaCheck(cudaFree(dd));
    }
    {
        uint16_t matrices[256], *device;
        uint32_t got[4][32][4], *out;
        for (int i = 0; i < 256; i++) matrices[i] = (uint16_t)(1000 + 7 * i);
        cudaCheck(cudaMalloc(&device, sizeof matrices));
        cudaCheck(cudaMalloc(&out, sizeof got));
        cudaCheck(cudaMemcpy(device, matrices, sizeof matrices, cudaMemcpyHostToDevice));
        ldmatrix_kernel<<<1, 32>>>(out, device);
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
        const char* names[] = {"ldmatrix.x4", "ldmatrix.x4.trans", "ldmatrix.x2", "ldmatrix.x2.trans"};
        for (int v = 0; v < 4; v++) {
            int wrong = 0;
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < (v < 2 ? 4 : 2); i++) {
                    int g = lane / 4, t = lane % 4 * 2;
                    const uint16_t* m = matrices + i * 64;
                    uint32_t expected = v % 2 ? m[t * 8 + g] | (uint32_t)m[(t + 1) * 8 + g] << 16 : m[g * 8 + t] | (uint32_t)m[g * 8 + t + 1] << 16;
                    wrong += got[v][lane][i] != expected;
                }
            report(names[v], wrong, 0);
        }
        cudaCheck(cudaFree(device));
        cudaCheck(cudaFree(out));
    }
    check_product<false>("cp.async + ldmatrix + mma, b (K,N)", 64, 64, 32);
    check_product<false>("cp.async + ldmatrix + mma, b (K,N), ragged M", 100, 128, 160);
    check_product<true>("cp.async + ldmatrix + mma, b (N,K), ragged M", 100, 128, 160);
    cudaCheck(cudaDeviceSynchronize());
    return failures != 0;
}
