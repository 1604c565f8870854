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
__constant__ float table[4];
__device__ int counter;
__global__ void symbol_kernel(float* out) { out[threadIdx.x] = table[threadIdx.x]; atomicAdd(&counter, 1); }

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

    float values[4] = {1, 2, 3, 4};
    int zero = 0;
    cudaCheck(cudaMemcpyToSymbol(table, values, sizeof values));
    cudaCheck(cudaMemcpyToSymbol(counter, &zero, sizeof zero));
    symbol_kernel<<<2, 4>>>(f);
    to_host(host, f, 4);
    cudaCheck(cudaMemcpyFromSymbol(&result, counter, sizeof result));
    EXPECT(host[3] == 4 && result == 8);
    cudaCheck(cudaFree(f));
    cudaCheck(cudaFree(u));
}

// ---- warp collectives --------------------------------------------------------------------------------

enum { UP, DOWN, XOR, INDEX, UP8, DOWN8, XOR8, INDEX8, BALLOT, ANY, ALL, ADD, MIN, MAX, OR, HALF, DOUBLE, COLLECTIVES };

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
    r[ADD] = __reduce_add_sync(all, lane - 10);
    r[MIN] = __reduce_min_sync(all, lane - 10);
    r[MAX] = (int)__reduce_max_sync(all, (unsigned)lane);
    r[OR] = (int)__reduce_or_sync(all, 1u << lane / 2);
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
        EXPECT(r[ADD][t] == 31 * 16 - 320 && r[MIN][t] == -10 && r[MAX][t] == 31 && r[OR][t] == 0xffff);
        EXPECT(r[HALF][t] == 100 + (l ^ 1) + (l < 16 ? 0 : 120));
        EXPECT(r[DOUBLE][t] == 100 + (l ^ 1));
    }
    cudaCheck(cudaFree(out));
}

// ---- barriers with threads that have gone ------------------------------------------------------------

__global__ void vote_kernel(int* out) {
    if (threadIdx.x >= 70) return;                         // exited threads count as arrived
    int count = __syncthreads_count(threadIdx.x % 2 == 0);
    int any = __syncthreads_or(threadIdx.x == 69), all = __syncthreads_and(threadIdx.x < 70);
    int none = __syncthreads_or(0), not_all = __syncthreads_and(threadIdx.x != 3);
    // the last warp has 6 lanes left: a full mask means those
    unsigned here = __ballot_sync(0xffffffff, 1);
    out[threadIdx.x] = count + 1000 * (any != 0) + 2000 * (all != 0) + 4000 * (none != 0) + 8000 * (not_all != 0) + 100000 * __popc(here);
}

static void votes() {
    int *out, host[70];
    cudaCheck(cudaMalloc(&out, sizeof host));
    vote_kernel<<<2, 128>>>(out);
    to_host(host, out, 70);
    for (int t = 0; t < 70; t++) EXPECT(host[t] == 35 + 1000 + 2000 + 100000 * (t < 64 ? 32 : 6));
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
    atomicInc(&u[1], 99u);
    atomicOr(&u[2], 1u << t % 32);
    atomicAdd(l, 1ull << 33);
    atomicAdd(f, 1.0f);
}
__global__ void arithmetic_kernel(float* f, int* i) {
    float nan = __int_as_float(0x7fffffff), zero = (float)threadIdx.x;
    f[0] = max(nan, 2.0f);                                 // as fmaxf: the one that is a number
    f[1] = min(3.0f, nan);
    f[2] = rsqrtf(4.0f + zero);
    f[3] = __saturatef(1.5f + zero) + __saturatef(nan) + __saturatef(-1.0f);
    f[4] = __fdividef(1.0f, 4.0f + zero);
    f[5] = __fadd_rn(__fmul_rn(1.0f + 0x1p-12f + zero, 1.0f + 0x1p-12f), -1.0f);       // not fused
    f[6] = fmaf(1.0f + 0x1p-12f + zero, 1.0f + 0x1p-12f, -1.0f);
    f[7] = __expf(1.0f) + exp2f(3.0f) + __logf(1.0f);
    i[0] = __float2int_rn(2.5f) * 1000 + __float2int_rn(3.5f) * 100 + __float2int_rz(-2.9f);
    i[1] = __float2int_rz(1e20f);
    i[2] = __float2int_rz(nan);
    i[3] = __popc(0xf0f0u) * 1000 + __ffs(0x100) * 10 + __clz(1) - __clz(0);
    i[4] = (int)__brev(1u);
    i[5] = (int)__umulhi(0x80000000u, 6u);
    i[6] = (int)__funnelshift_l(0x80000000u, 1u, 1);
    i[7] = (int)__funnelshift_r(0x80000000u, 1u, 1);
    i[8] = (int)__byte_perm(0x33221100u, 0x77665544u, 0x7520u);
    i[9] = max(-1, 1) + (int)min(7u, 9u) + (int)max((size_t)3, (size_t)2);
    i[10] = isfinite(f[0]) && !isfinite(nan) && isnan(nan) ? 1 : 0;
    i[11] = __float_as_int(1.0f);
}

static void arithmetic() {
    int zeros[16] = {0}, *i = to_device(zeros, 16), hi[16];
    unsigned uz[4] = {0}, *u = to_device(uz, 4), hu[4];
    unsigned long long lz = 0, *l = to_device(&lz, 1), hl;
    float fz[8] = {0}, *f = to_device(fz, 8), hf[8];
    atomic_kernel<<<10, 100>>>(i, u, l, f);
    to_host(hi, i, 5);
    to_host(hu, u, 3);
    to_host(&hl, l, 1);
    to_host(hf, f, 1);
    EXPECT(hi[0] == 1000 && hi[1] == 999 && hi[2] == -999 && hi[3] == 7 && hi[4] == 9);
    EXPECT(hu[0] == 2000 && hu[1] == 0 && hu[2] == 0xffffffffu && hl == 1000ull << 33 && hf[0] == 1000.0f);
    arithmetic_kernel<<<1, 1>>>(f, i);
    to_host(hi, i, 12);
    to_host(hf, f, 8);
    EXPECT(hf[0] == 2 && hf[1] == 3 && hf[2] == 0.5f && hf[3] == 1 && hf[4] == 0.25f);
    EXPECT(hf[5] == 0x1p-11f && hf[6] == 0x1p-11f + 0x1p-24f);
    EXPECT(fabs(hf[7] - (M_E + 8)) < 1e-4);
    EXPECT(hi[0] == 2000 + 400 - 2 && hi[1] == 2147483647 && hi[2] == 0);
    EXPECT(hi[3] == 8000 + 90 + 31 - 32 && hi[4] == (int)0x80000000 && hi[5] == 3 && hi[6] == 3 && hi[7] == (int)0xc0000000);
    EXPECT(hi[8] == 0x77552200 && hi[9] == 1 + 7 + 3 && hi[10] == 1 && hi[11] == 0x3f800000);
    cudaCheck(cudaFree(i));
    cudaCheck(cudaFree(u));
    cudaCheck(cudaFree(l));
    cudaCheck(cudaFree(f));
}

int main() {
    launches();
    collectives();
    votes();
    arithmetic();
    return finish();
}
