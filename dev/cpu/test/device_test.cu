// What a kernel may call, against what CUDA's programming guide says it does.
#include "expect.h"

// The line of a kernel that found something wrong, or 0
#define CHECK(condition) do { if (!(condition)) atomicMax(wrong, __LINE__); } while (0)

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
    float* f = device_array<float>(64);
    template_kernel<float, 64><<<1, 64, 64 * sizeof(float)>>>(f, Shape{3, 5}, 2.0f);
    float host[64];
    to_host(host, f, 64);
    for (int i = 0; i < 64; i++) EXPECT(host[i] == (63 - i) * 2.0f + 5 + 1 + 1);
    auto pointer = template_kernel<float, 32>;             // by way of a function pointer, and a stream
    cudaStream_t stream;
    cudaCheck(cudaStreamCreate(&stream));
    pointer<<<dim3(1), dim3(32, 1),
              32 * sizeof(float), stream>>>(f, Shape{3, 7}, 1.0f);
    to_host(host, f, 32);
    for (int i = 0; i < 32; i++) EXPECT(host[i] == (31 - i) + 7 + 1 + 1);
    cudaCheck(cudaStreamDestroy(stream));

    unsigned counts[12 * 120] = {0}, *u = to_device(counts, 12 * 120);
    index_kernel<<<dim3(2, 3, 2), dim3(5, 8, 3)>>>(u);
    to_host(counts, u, 12 * 120);
    for (unsigned i = 0; i < 12 * 120; i++) EXPECT(counts[i] == 1 + i % 120 + 1000 * (i / 120));

    int* n = (int*)u;
    null_kernel<<<3, 32>>>(nullptr, n, evaluate() * 10);      // arguments are evaluated once
    int result;
    to_host(&result, n, 1);
    EXPECT(result == 11 && evaluated == 1);

    table_kernel<<<1, 4>>>(f);
    to_host(host, f, 4);
    EXPECT(host[0] == 1 && host[3] == 4);
}

// ---- warp collectives --------------------------------------------------------------------------------

__global__ void collective_kernel(int* wrong) {
    const unsigned all = 0xffffffff;
    int l = threadIdx.x % 32, v = 100 + l;
    CHECK(__shfl_up_sync(all, v, 3) == (l >= 3 ? v - 3 : v));
    CHECK(__shfl_down_sync(all, v, 3) == (l + 3 < 32 ? v + 3 : v));
    CHECK(__shfl_xor_sync(all, v, 5) == 100 + (l ^ 5));
    CHECK(__shfl_sync(all, v, l * 7 + 40) == 100 + (l * 7 + 40) % 32);
    CHECK(__shfl_up_sync(all, v, 3, 8) == (l % 8 >= 3 ? v - 3 : v));
    CHECK(__shfl_down_sync(all, v, 3, 8) == (l % 8 + 3 < 8 ? v + 3 : v));
    CHECK(__shfl_xor_sync(all, v, 5, 8) == 100 + (l ^ 5));
    CHECK(__shfl_sync(all, v, l + 1, 8) == 100 + l / 8 * 8 + (l + 1) % 8);
    CHECK(__ballot_sync(all, l % 3 == 0) == 0x49249249);
    CHECK(__any_sync(all, l == 31) && !__any_sync(all, 0));
    CHECK(__all_sync(all, 1) && !__all_sync(all, l != 7));
    unsigned half = l < 16 ? 0xffffu : 0xffff0000u;        // two groups at once, each with its own mask
    CHECK(__shfl_xor_sync(half, v, 1) == 100 + (l ^ 1));
    if (l >= 16) CHECK(__shfl_sync(half, v, 20) == 120);
    CHECK(__shfl_xor_sync(all, 1e15 + v, 1) == 1e15 + (100 + (l ^ 1)));
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
    int host[70], *out = device_array<int>(70);
    leavers_kernel<<<2, 128>>>(out);
    to_host(host, out, 70);
    for (int t = 0; t < 70; t++) EXPECT(host[t] == 100070 + 1000 * (t < 64 ? 32 : 6));
}

// ---- atomics and arithmetic --------------------------------------------------------------------------

__global__ void atomic_kernel(int* i, float* f) {
    atomicAdd(&i[0], 1);
    atomicMax(&i[1], (int)(blockIdx.x * blockDim.x + threadIdx.x));
    atomicAdd(f, 1.0f);
}
__global__ void arithmetic_kernel(int* wrong) {
    float nan = __int_as_float(0x7fffffff), zero = (float)threadIdx.x;       // which the compiler does not know
    CHECK(max(nan, 2.0f + zero) == 2 && min(3.0f + zero, nan) == 3);         // as fmaxf: the one that is a number
    CHECK(rsqrtf(4.0f + zero) == 0.5f && __fdividef(1.0f, 4.0f + zero) == 0.25f);
    CHECK(fmaf(1.0f + 0x1p-12f + zero, 1.0f + 0x1p-12f, -1.0f) == 0x1p-11f + 0x1p-24f);
    CHECK(fabsf(__expf(1.0f + zero) + exp2f(3.0f) + __logf(1.0f) - 10.71828f) < 1e-4f);
    CHECK(max(-1, 1) == 1 && min(7u, 9u) == 7 && max((size_t)3, (size_t)2) == 3);
    CHECK(isfinite(2.0f + zero) && !isfinite(nan) && isnan(nan) && __float_as_int(1.0f) == 0x3f800000);
}

static void atomics() {
    int hi[2] = {0}, *i = to_device(hi, 2);
    float hf = 0, *f = to_device(&hf, 1);
    atomic_kernel<<<10, 100>>>(i, f);
    to_host(hi, i, 2);
    to_host(&hf, f, 1);
    EXPECT(hi[0] == 1000 && hi[1] == 999 && hf == 1000.0f);
}

int main() {
    int line = 0, *wrong = to_device(&line, 1);
    launches();
    collective_kernel<<<1, 96>>>(wrong);
    arithmetic_kernel<<<1, 1>>>(wrong);
    to_host(&line, wrong, 1);
    if (line) printf("%s:%d: wrong\n", __FILE__, line);
    EXPECT(line == 0);
    leavers();
    atomics();
    return finish();
}
