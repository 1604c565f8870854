// What a kernel may call, against what CUDA's programming guide says it does.
#include "expect.h"

// ---- launches: forms of kernels, launches and shared memory ------------------------------------------

struct Shape { int rows, cols; };

template <class T, int N> __global__ void template_kernel(T* out, Shape shape, T scale) {
    __shared__ T tile[2][N + 1], last;        // a size that depends on the template
    extern __shared__ __align__(16) float extra[];
    tile[0][threadIdx.x] = (T)threadIdx.x;
    extra[threadIdx.x] = 1;
    if (threadIdx.x == 0) last = (T)shape.cols;
    __syncthreads();
    out[threadIdx.x] = tile[0][N - 1 - threadIdx.x] * scale + last + (T)extra[(threadIdx.x + 1) % N] + (T)(sizeof tile / sizeof(T) == 2 * (N + 1));
}
__global__ void index_kernel(unsigned* out) {
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1 + thread + 1000 * block);
}
__global__ void null_kernel(const float* p, int* out, int n) { *out = (p == NULL) + n; }
__constant__ float table[4] = {1, 2, 3, 4};
__global__ void table_kernel(float* out) { out[threadIdx.x] = table[threadIdx.x]; }

static int evaluated = 0;
static int evaluate() { return ++evaluated; }

static void launches() {
    float* f;
    cudaCheck(cudaMalloc(&f, 64 * sizeof(float)));
    template_kernel<float, 64><<<1, 64, 64 * sizeof(float)>>>(f, Shape{3, 5}, 2.0f);
    float host[64];
    to_host(host, f, 64);
    for (int i = 0; i < 64; i++) EXPECT(host[i] == (63 - i) * 2.0f + 5 + 1 + 1);
    auto pointer = template_kernel<float, 32>;             // by way of a function pointer, and a stream
    cudaStream_t stream;
    cudaCheck(cudaStreamCreate(&stream));
    pointer<<<dim3(1), dim3(32, 1),
              32 * sizeof(float), stream>>>(f, Shape{3, 7},
                                            1.0f);
    to_host(host, f, 32);
    for (int i = 0; i < 32; i++) EXPECT(host[i] == (31 - i) + 7 + 1 + 1);
    cudaCheck(cudaStreamDestroy(stream));

    unsigned *u, counts[12 * 120];
    cudaCheck(cudaMalloc(&u, sizeof counts));
    cudaCheck(cudaMemset(u, 0, sizeof counts));
    index_kernel<<<dim3(2, 3, 2), dim3(5, 8, 3)>>>(u);
    to_host(counts, u, 12 * 120);
    for (unsigned i = 0; i < 12 * 120; i++) EXPECT(counts[i] == 1 + i % 120 + 1000 * (i / 120));

    int* n = (int*)u;
    null_kernel<<<3, 32>>>(NULL, n, evaluate() * 10);      // arguments are evaluated once
    int result;
    to_host(&result, n, 1);
    EXPECT(result == 11 && evaluated == 1);

    table_kernel<<<1, 4>>>(f);
    to_host(host, f, 4);
    EXPECT(host[0] == 1 && host[3] == 4);
    cudaCheck(cudaFree(f));
    cudaCheck(cudaFree(u));
}

// ---- warp collectives --------------------------------------------------------------------------------

enum { UP, DOWN, XOR, INDEX, UP8, DOWN8, XOR8, INDEX8, BALLOT, ANY, ALL, HALF, DOUBLE, COLLECTIVES };

__global__ void collective_kernel(int* out) {
    int lane = threadIdx.x % 32, v = 100 + lane;
    const unsigned all = 0xffffffff;
    int r[COLLECTIVES];
    r[UP] = __shfl_up_sync(all, v, 3);
    r[DOWN] = __shfl_down_sync(all, v, 3);
    r[XOR] = __shfl_xor_sync(all, v, 5);
    r[INDEX] = __shfl_sync(all, v, lane * 7 + 40);
    r[UP8] = __shfl_up_sync(all, v, 3, 8);
    r[DOWN8] = __shfl_down_sync(all, v, 3, 8);
    r[XOR8] = __shfl_xor_sync(all, v, 5, 8);
    r[INDEX8] = __shfl_sync(all, v, lane + 1, 8);
    r[BALLOT] = (int)__ballot_sync(all, lane % 3 == 0);
    r[ANY] = __any_sync(all, lane == 31) * 2 + (__any_sync(all, 0) != 0);
    r[ALL] = __all_sync(all, 1) * 2 + (__all_sync(all, lane != 7) != 0);
    unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;     // two groups at once, each with its own mask
    r[HALF] = __shfl_xor_sync(half, v, 1) + (lane < 16 ? 0 : __shfl_sync(half, v, 20));
    r[DOUBLE] = (int)(__shfl_xor_sync(all, 1e15 + v, 1) - 1e15);
    for (int i = 0; i < COLLECTIVES; i++) out[i * blockDim.x + threadIdx.x] = r[i];
}

static void collectives() {
    const int n = 96;
    int *out, r[COLLECTIVES][n];
    cudaCheck(cudaMalloc(&out, sizeof r));
    collective_kernel<<<1, n>>>(out);
    to_host(&r[0][0], out, COLLECTIVES * n);
    for (int t = 0; t < n; t++) {
        int l = t % 32, own = 100 + l;
        EXPECT(r[UP][t] == (l >= 3 ? own - 3 : own));
        EXPECT(r[DOWN][t] == (l + 3 < 32 ? own + 3 : own));
        EXPECT(r[XOR][t] == 100 + (l ^ 5));
        EXPECT(r[INDEX][t] == 100 + (l * 7 + 40) % 32);
        EXPECT(r[UP8][t] == (l % 8 >= 3 ? own - 3 : own));
        EXPECT(r[DOWN8][t] == (l % 8 + 3 < 8 ? own + 3 : own));
        EXPECT(r[XOR8][t] == 100 + (l ^ 5));
        EXPECT(r[INDEX8][t] == 100 + l / 8 * 8 + (l + 1) % 8);
        EXPECT(r[BALLOT][t] == 0x49249249);
        EXPECT(r[ANY][t] == 2 && r[ALL][t] == 2);
        EXPECT(r[HALF][t] == 100 + (l ^ 1) + (l < 16 ? 0 : 120));
        EXPECT(r[DOUBLE][t] == 100 + (l ^ 1));
    }
    cudaCheck(cudaFree(out));
}

// ---- barriers with threads that have gone ------------------------------------------------------------

__global__ void leavers_kernel(int* out) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    if (threadIdx.x >= 70) return;                         // exited threads count as arrived
    atomicAdd(&sum, 1);
    __syncthreads();
    // the last warp has 6 lanes left: a full mask means those
    out[threadIdx.x] = sum + 1000 * __popc(__ballot_sync(0xffffffff, 1)) + 100000 * __all_sync(0xffffffff, 1);
}

static void leavers() {
    int *out, host[70];
    cudaCheck(cudaMalloc(&out, sizeof host));
    leavers_kernel<<<2, 128>>>(out);
    to_host(host, out, 70);
    for (int t = 0; t < 70; t++) EXPECT(host[t] == 100070 + 1000 * (t < 64 ? 32 : 6));
    cudaCheck(cudaFree(out));
}

// ---- atomics and arithmetic --------------------------------------------------------------------------

__global__ void atomic_kernel(int* i, unsigned* u, unsigned long long* l, float* f) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&i[0], 1);
    atomicMax(&i[1], t);
    atomicMin(&i[2], -t);
    atomicCAS(&i[3], 0, 7);
    atomicExch(&i[4], 9);
    atomicAdd(&u[0], 2u);
    atomicAdd(l, 1ull << 33);
    atomicAdd(f, 1.0f);
}
__global__ void arithmetic_kernel(float* f, int* i) {
    float nan = __int_as_float(0x7fffffff), zero = (float)threadIdx.x;
    f[0] = max(nan, 2.0f);                                 // as fmaxf: the one that is a number
    f[1] = min(3.0f, nan);
    f[2] = rsqrtf(4.0f + zero);
    f[3] = __fdividef(1.0f, 4.0f + zero);
    f[4] = fmaf(1.0f + 0x1p-12f + zero, 1.0f + 0x1p-12f, -1.0f);
    f[5] = __expf(1.0f) + exp2f(3.0f) + __logf(1.0f);
    i[0] = __float2int_rn(2.5f) * 1000 + __float2int_rn(3.5f) * 100 + __float2int_rz(-2.9f);
    i[1] = __float2int_rz(1e20f);
    i[2] = __float2int_rz(nan);
    i[3] = __popc(0xf0f0u) * 1000 + __ffs(0x100) * 10 + __clz(1) - __clz(0);
    i[4] = (int)__umulhi(0x80000000u, 6u);
    i[5] = max(-1, 1) + (int)min(7u, 9u) + (int)max((size_t)3, (size_t)2);
    i[6] = isfinite(f[0]) && !isfinite(nan) && isnan(nan) ? 1 : 0;
    i[7] = __float_as_int(1.0f);
}

static void arithmetic() {
    int zeros[8] = {0}, *i = to_device(zeros, 8), hi[8];
    unsigned uz = 0, *u = to_device(&uz, 1), hu;
    unsigned long long lz = 0, *l = to_device(&lz, 1), hl;
    float fz[6] = {0}, *f = to_device(fz, 6), hf[6];
    atomic_kernel<<<10, 100>>>(i, u, l, f);
    to_host(hi, i, 5);
    to_host(&hu, u, 1);
    to_host(&hl, l, 1);
    to_host(hf, f, 1);
    EXPECT(hi[0] == 1000 && hi[1] == 999 && hi[2] == -999 && hi[3] == 7 && hi[4] == 9);
    EXPECT(hu == 2000 && hl == 1000ull << 33 && hf[0] == 1000.0f);
    arithmetic_kernel<<<1, 1>>>(f, i);
    to_host(hi, i, 8);
    to_host(hf, f, 6);
    EXPECT(hf[0] == 2 && hf[1] == 3 && hf[2] == 0.5f && hf[3] == 0.25f && hf[4] == 0x1p-11f + 0x1p-24f);
    EXPECT(fabs(hf[5] - (M_E + 8)) < 1e-4);
    EXPECT(hi[0] == 2000 + 400 - 2 && hi[1] == 2147483647 && hi[2] == 0 && hi[3] == 8000 + 90 + 31 - 32 && hi[4] == 3);
    EXPECT(hi[5] == 1 + 7 + 3 && hi[6] == 1 && hi[7] == 0x3f800000);
    cudaCheck(cudaFree(i));
    cudaCheck(cudaFree(u));
    cudaCheck(cudaFree(l));
    cudaCheck(cudaFree(f));
}

int main() {
    launches();
    collectives();
    leavers();
    arithmetic();
    return finish();
}
