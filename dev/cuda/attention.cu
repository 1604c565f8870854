/*
Causal attention: the trainer's kernels, tested, and simpler ones beside them to learn from. The two sections on attention in
train_gpt2.cu explain the kernels.

    make dev/cuda/attention && ./dev/cuda/attention [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/attention.cu -lcublasLt -o attention

A query sees the keys up to its own place. Forward, for a query of a head of HS channels:
    s_j = q k_j / sqrt(HS)      p = softmax(s)      out = sum_j p_j v_j      lse = log(sum_j exp(s_j))
Backward, from dout:
    dp_j = dout v_j      delta = sum_j p_j dp_j = dout out      ds_j = p_j (dp_j - delta)      dq = sum_j ds_j k_j / sqrt(HS)
and, summed over the queries that see key j, dk_j = sum ds_j q / sqrt(HS) and dv_j = sum p_j dout. Backward also makes the
gradient of the bias of the matmul that made qkv: the column sums of dq, dk and dv.

A row of qkv has q of NH heads, then k and v of NKV heads, each of which serves NH / NKV query heads. HS is a multiple of 8, up
to 128; for 64 and 128 in bf16 the trainer uses tensor cores.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// version 1: the formulas, one kernel for each

// Scores, softmax and output are kernels of their own, so s and p go through memory: B x NH x T x T of them. In GPT-2 124M at B
// = 64 and T = 1024 that is 805 million elements a layer, 1.6 GB in bf16, where qkv has 0.3 GB. Backward wants p again, so the
// 1.6 GB are kept for each of the 12 layers, 19 GB: about as much again as the rest of a layer keeps. The causal half of them
// is written and read, written and read again: 3.2 GB of traffic for forward and 5.6 GB for backward, beside the 0.4 GB and 1.2
// GB that versions move which store none of it. All of this doubles with T for each token. What is stored is also rounded: a
// score of 20 to the nearest 1/8, which makes its exponential wrong by up to 6 %.
// The kernels waste more than that. Neighbouring threads have neighbouring keys, which lie a row of qkv (4.6 KB) apart, so a
// load of a warp touches 32 lines to use 2 bytes of each. A thread of the softmax owns a row of scores, with the same effect.
__device__ inline float dot_1(const floatX* a, const floatX* b, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c++) sum += (float)a[c] * (float)b[c];
    return sum;
}
// One thread for each (query, key): a block has 128 keys of one query of one head. What is masked is never touched.
__global__ void attention_1_scores_kernel(floatX* s, const floatX* qkv, AttShape shape) {
    int key = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y, b = blockIdx.z / shape.NH, h = blockIdx.z % shape.NH;
    if (key > query) return;
    const floatX* row0 = qkv + (size_t)b * shape.T * shape.stride();
    float dot =
        dot_1(row0 + query * shape.stride() + h * shape.HS, row0 + key * shape.stride() + shape.k_head(h) * shape.HS, shape.HS);
    s[((size_t)blockIdx.z * shape.T + query) * shape.T + key] = (floatX)(dot * shape.scale);
}
__global__ void attention_1_softmax_kernel(floatX* p, float* lse, int rows, int T) {   // in place of s
    int row = blockIdx.x * blockDim.x + threadIdx.x, query = row % T;
    if (row >= rows) return;
    p += (size_t)row * T;
    float max = -INFINITY, sum = 0;
    for (int j = 0; j <= query; j++) max = fmaxf(max, (float)p[j]);
    for (int j = 0; j <= query; j++) sum += expf((float)p[j] - max);
    for (int j = 0; j <= query; j++) p[j] = (floatX)(expf((float)p[j] - max) / sum);
    lse[row] = max + logf(sum);   // for the tests: backward has p
}
__global__ void attention_1_values_kernel(floatX* out, const floatX* p, const floatX* qkv, size_t n, AttShape shape) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // (b, query, h, c)
    if (i >= n) return;
    const int T = shape.T, NH = shape.NH, HS = shape.HS, c = i % HS, h = i / HS % NH, query = i / HS / NH % T,
              b = i / HS / NH / T;
    const floatX* v = qkv + (size_t)b * T * shape.stride() + shape.v_head(h) * HS + c;
    p += (((size_t)b * NH + h) * T + query) * T;
    float sum = 0;
    for (int j = 0; j <= query; j++) sum += (float)p[j] * (float)v[j * shape.stride()];
    out[i] = (floatX)sum;
}
void attention_forward_1(floatX* out,        // (B, T, NH*HS)
                         float* lse,         // (B, NH, T)
                         floatX* p,          // (B, NH, T, T), kept for backward
                         const floatX* qkv,   // (B, T, (NH + 2 NKV)*HS)
                         int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    const size_t n = (size_t)B * T * NH * HS;
    attention_1_scores_kernel<<<dim3(ceil_div(T, 128), T, B * NH), 128, 0, stream>>>(p, qkv, shape);
    attention_1_softmax_kernel<<<ceil_div(B * NH * T, 128), 128, 0, stream>>>(p, lse, B * NH * T, T);
    attention_1_values_kernel<<<ceil_div(n, 128), 128, 0, stream>>>(out, p, qkv, n, shape);
    cudaCheck(cudaGetLastError());
}

// Backward, likewise, with a second T x T tensor for dp and ds.
__global__ void attention_1_dp_kernel(floatX* dp, const floatX* dout, const floatX* qkv, AttShape shape) {
    int key = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y, b = blockIdx.z / shape.NH, h = blockIdx.z % shape.NH;
    if (key > query) return;
    const floatX *d = dout + (((size_t)b * shape.T + query) * shape.NH + h) * shape.HS,
                 *v = qkv + ((size_t)b * shape.T + key) * shape.stride() + shape.v_head(h) * shape.HS;
    dp[((size_t)blockIdx.z * shape.T + query) * shape.T + key] = (floatX)dot_1(d, v, shape.HS);
}
__global__ void attention_1_ds_kernel(floatX* ds, const floatX* p, int rows, int T) {   // in place of dp
    int row = blockIdx.x * blockDim.x + threadIdx.x, query = row % T;
    if (row >= rows) return;
    ds += (size_t)row * T;
    p += (size_t)row * T;
    float delta = 0;
    for (int j = 0; j <= query; j++) delta += (float)p[j] * (float)ds[j];
    for (int j = 0; j <= query; j++) ds[j] = (floatX)((float)p[j] * ((float)ds[j] - delta));
}
__global__ void attention_1_dq_kernel(floatX* dqkv, const floatX* ds, const floatX* qkv, size_t n, AttShape shape) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // (b, query, h, c)
    if (i >= n) return;
    const int T = shape.T, NH = shape.NH, HS = shape.HS, c = i % HS, h = i / HS % NH, query = i / HS / NH % T,
              b = i / HS / NH / T;
    const size_t row0 = (size_t)b * T * shape.stride();
    const floatX* k = qkv + row0 + shape.k_head(h) * HS + c;
    ds += (((size_t)b * NH + h) * T + query) * T;
    float sum = 0;
    for (int j = 0; j <= query; j++) sum += (float)ds[j] * (float)k[j * shape.stride()];
    dqkv[row0 + query * shape.stride() + h * HS + c] = (floatX)(sum * shape.scale);
}
__global__ void attention_1_dkv_kernel(floatX* dqkv, const floatX* p, const floatX* ds, const floatX* dout, const floatX* qkv,
                                       size_t n, AttShape shape) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // (b, key, head of k and v, c)
    if (i >= n) return;
    const int T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS, group = shape.group();
    const int c = i % HS, kv = i / HS % NKV, key = i / HS / NKV % T, b = i / HS / NKV / T;
    const size_t row0 = (size_t)b * T * shape.stride();
    float dk = 0, dv = 0;
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int t = key; t < T; t++) {
            size_t pair = (((size_t)b * NH + h) * T + t) * T + key;
            dk += (float)ds[pair] * (float)qkv[row0 + t * shape.stride() + h * HS + c];
            dv += (float)p[pair] * (float)dout[(((size_t)b * T + t) * NH + h) * HS + c];
        }
    floatX* row = dqkv + row0 + key * shape.stride() + c;
    row[(NH + kv) * HS] = (floatX)(dk * shape.scale);
    row[(NH + NKV + kv) * HS] = (floatX)dv;
}
void attention_backward_1(floatX* dqkv,        // (B, T, (NH + 2 NKV)*HS)
                          Grad dbias,          // ((NH + 2 NKV)*HS)
                          float* scratch,      // attention_scratch(B, T, NH, NKV, HS)
                          floatX* ds,          // (B, NH, T, T) scratch
                          const floatX* dout,  // (B, T, NH*HS)
                          const floatX* qkv,   // (B, T, (NH + 2 NKV)*HS)
                          const floatX* p,     // (B, NH, T, T)
                          bool accumulate, int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    const size_t n = (size_t)B * T * NH * HS, n_kv = (size_t)B * T * NKV * HS;
    attention_1_dp_kernel<<<dim3(ceil_div(T, 128), T, B * NH), 128, 0, stream>>>(ds, dout, qkv, shape);
    attention_1_ds_kernel<<<ceil_div(B * NH * T, 128), 128, 0, stream>>>(ds, p, B * NH * T, T);
    attention_1_dq_kernel<<<ceil_div(n, 128), 128, 0, stream>>>(dqkv, ds, qkv, n, shape);
    attention_1_dkv_kernel<<<ceil_div(n_kv, 128), 128, 0, stream>>>(dqkv, p, ds, dout, qkv, n_kv, shape);
    cudaCheck(cudaGetLastError());
    bias_backward(dbias, scratch, dqkv, accumulate, B * T, (NH + 2 * NKV) * HS, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// version 2: a query a thread, nothing stored

// A thread walks along the keys of its query with a running maximum and sum: when a larger score comes, what was summed so far
// shrinks by exp(old maximum - new maximum). That needs neither all scores at once nor a second pass, and leaves one number a
// row behind, lse, from which backward gets any p back as exp(s - lse). T x T is gone from memory: forward moves 8 bytes for an
// element of out, backward 24 and the 6 of the bias.
// What it wastes now is inside the GPU. q and the output are up to 128 floats a thread each, in loops whose length the compiler
// does not know, so they lie in local memory. A pair of a query and a key, 256 flops at HS = 64, reads q and reads and writes
// the output, 768 bytes of the L1 cache, and a multiprocessor moves 128 bytes of that in the time of 256 flops. Keys and values
// come 2 bytes at a time from global memory; all lanes of a warp want the same ones, which is one access for 32, but it is an
// access for each multiplication. Every pair takes two exponentials, and a warp runs as long as its last query.
//
// Version 3 is the trainer's plain one. HS / 32 threads share a row, so that q and the output are 32 floats each and stay in
// registers; 64 rows take tiles of 16 keys through shared memory, loaded once for all of them, 16 bytes at a time; the maximum
// moves once a tile: 17 exponentials for 16 pairs. What is left is multiplication in fp32, of which a load from shared memory
// feeds four.
//
// Version 4 is the trainer's for tensor cores, which multiply 16 x 16 by 16 x 8 in one instruction, some 15 times as fast as
// all fp32 units together. They take bf16, so p and ds are rounded before they are multiplied, by 2^-8 at most, and the errors
// average out in the sums. In return the layout of registers is the hardware's: train_gpt2.cu has the drawing. The gradient of
// the bias, for which the other versions read dqkv once more, is summed from results that are still in registers.
constexpr int HEAD_MAX = 128;
__global__ void attention_2_forward_kernel(floatX* out, float* lse, const floatX* qkv, int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, h, query)
    if (row >= rows) return;
    const int T = shape.T, NH = shape.NH, HS = shape.HS, query = row % T, h = row / T % NH, b = row / T / NH;
    const size_t stride = shape.stride();
    const floatX* row0 = qkv + (size_t)b * T * stride;
    float q[HEAD_MAX], o[HEAD_MAX], max = -INFINITY, sum = 0;
    for (int c = 0; c < HS; c++) q[c] = (float)row0[query * stride + h * HS + c], o[c] = 0;
    for (int j = 0; j <= query; j++) {
        const floatX *k = row0 + j * stride + shape.k_head(h) * HS, *v = row0 + j * stride + shape.v_head(h) * HS;
        float s = 0;
        for (int c = 0; c < HS; c++) s += q[c] * (float)k[c];
        s *= shape.scale;
        float larger = fmaxf(max, s), shrink = expf(max - larger), p = expf(s - larger);
        max = larger;
        sum = sum * shrink + p;
        for (int c = 0; c < HS; c++) o[c] = o[c] * shrink + p * (float)v[c];
    }
    for (int c = 0; c < HS; c++) out[(((size_t)b * T + query) * NH + h) * HS + c] = (floatX)(o[c] / sum);
    lse[row] = max + logf(sum);
}
void attention_forward_2(floatX* out, float* lse, const floatX* qkv, int B, int T, int NH, int NKV, int HS,
                         cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    attention_2_forward_kernel<<<ceil_div(B * NH * T, 128), 128, 0, stream>>>(out, lse, qkv, B * NH * T, shape);
    cudaCheck(cudaGetLastError());
}

// Backward has sums of two shapes: dq is one over the keys of a query, dk and dv are sums over the queries that see a key. With
// a thread a query the second would need atomics, whose order nobody knows. So there are two kernels, a query a thread and a
// key a thread, and both compute s and dp: 7 products of T x T x HS where 5 would do. The trainer's two versions do the same.
__global__ void attention_2_dq_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* qkv, const floatX* out,
                                      const float* lse, int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, h, query)
    if (row >= rows) return;
    const int T = shape.T, NH = shape.NH, HS = shape.HS, query = row % T, h = row / T % NH, b = row / T / NH;
    const size_t stride = shape.stride(), out_row = (((size_t)b * T + query) * NH + h) * HS;
    const floatX *row0 = qkv + (size_t)b * T * stride, *q = row0 + query * stride + h * HS;
    float d[HEAD_MAX], dq[HEAD_MAX], row_delta = 0;
    for (int c = 0; c < HS; c++) {
        d[c] = (float)dout[out_row + c], dq[c] = 0;
        row_delta += d[c] * (float)out[out_row + c];
    }
    for (int j = 0; j <= query; j++) {
        const floatX *k = row0 + j * stride + shape.k_head(h) * HS, *v = row0 + j * stride + shape.v_head(h) * HS;
        float s = 0, dp = 0;
        for (int c = 0; c < HS; c++) s += (float)q[c] * (float)k[c], dp += d[c] * (float)v[c];
        float ds = expf(s * shape.scale - lse[row]) * (dp - row_delta);
        for (int c = 0; c < HS; c++) dq[c] += ds * (float)k[c];
    }
    delta[row] = row_delta;
    for (int c = 0; c < HS; c++) dqkv[((size_t)b * T + query) * stride + h * HS + c] = (floatX)(dq[c] * shape.scale);
}
__global__ void attention_2_dkv_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse,
                                       const float* delta, int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, head of k and v, key)
    if (row >= rows) return;
    const int T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS, group = shape.group();
    const int key = row % T, kv = row / T % NKV, b = row / T / NKV;
    const size_t stride = shape.stride();
    const floatX* row0 = qkv + (size_t)b * T * stride;
    const floatX *k = row0 + key * stride + (NH + kv) * HS, *v = k + NKV * HS;
    float dk[HEAD_MAX], dv[HEAD_MAX];
    for (int c = 0; c < HS; c++) dk[c] = dv[c] = 0;
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int t = key; t < T; t++) {
            const floatX *q = row0 + t * stride + h * HS, *d = dout + (((size_t)b * T + t) * NH + h) * HS;
            const size_t stat = ((size_t)b * NH + h) * T + t;
            float s = 0, dp = 0;
            for (int c = 0; c < HS; c++) s += (float)q[c] * (float)k[c], dp += (float)d[c] * (float)v[c];
            float p = expf(s * shape.scale - lse[stat]), ds = p * (dp - delta[stat]);
            for (int c = 0; c < HS; c++) dk[c] += ds * (float)q[c], dv[c] += p * (float)d[c];
        }
    floatX* to = dqkv + ((size_t)b * T + key) * stride + (NH + kv) * HS;
    for (int c = 0; c < HS; c++) to[c] = (floatX)(dk[c] * shape.scale), to[NKV * HS + c] = (floatX)dv[c];
}
void attention_backward_2(floatX* dqkv, Grad dbias, float* delta, float* scratch, const floatX* dout, const floatX* qkv,
                          const floatX* out, const float* lse, bool accumulate, int B, int T, int NH, int NKV, int HS,
                          cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    attention_2_dq_kernel<<<ceil_div(B * NH * T, 128), 128, 0, stream>>>(dqkv, delta, dout, qkv, out, lse, B * NH * T, shape);
    attention_2_dkv_kernel<<<ceil_div(B * NKV * T, 128), 128, 0, stream>>>(dqkv, dout, qkv, lse, delta, B * NKV * T, shape);
    cudaCheck(cudaGetLastError());
    bias_backward(dbias, scratch, dqkv, accumulate, B * T, (NH + 2 * NKV) * HS, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// all versions, called alike

// TRAINER is what the trainer calls: version 4 where there is one, else version 3. THREE is version 3 for any size of head.
enum Way { ONE, TWO, THREE, TRAINER };   // versions
bool tensor_cores(Way way, int HS) { return way == TRAINER && !kFP32 && (HS == 64 || HS == 128); }

void attention_forward_3(floatX* out, float* lse, const floatX* qkv, int B, int T, int NH, int NKV, int HS,
                         cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    auto run = [&](auto forward) { forward(out, lse, qkv, B, shape, stream); };
    if (HS <= 32) run(attention_forward_launch<1>);
    else if (HS <= 64) run(attention_forward_launch<2>);
    else run(attention_forward_launch<4>);
}
void attention_backward_3(floatX* dqkv, Grad dbias, float* delta, float* scratch, const floatX* dout, const floatX* qkv,
                          const floatX* out, const float* lse, bool accumulate, int B, int T, int NH, int NKV, int HS,
                          cudaStream_t stream) {
    AttShape shape = att_shape(T, NH, NKV, HS);
    auto run = [&](auto backward) { backward(dqkv, dbias, delta, scratch, dout, qkv, out, lse, accumulate, B, shape, stream); };
    if (HS <= 32) run(attention_backward_launch<1>);
    else if (HS <= 64) run(attention_backward_launch<2>);
    else run(attention_backward_launch<4>);
}

struct Shape {
    int B, T, NH, NKV, HS;
    int group() const { return NH / NKV; }
    size_t stride() const { return (size_t)(NH + 2 * NKV) * HS; }
    size_t qkv() const { return B * T * stride(); }
    size_t out() const { return (size_t)B * T * NH * HS; }
    size_t rows() const { return (size_t)B * NH * T; }
    size_t scratch() const { return attention_scratch(B, T, NH, NKV, HS); }
    // where a head of row (b, t) begins, in out and in qkv, and its lse
    size_t out_at(int b, int t, int h) const { return (((size_t)b * T + t) * NH + h) * HS; }
    size_t q_at(int b, int t, int h) const { return ((size_t)b * T + t) * stride() + (size_t)h * HS; }
    size_t k_at(int b, int t, int kv) const { return q_at(b, t, NH + kv); }
    size_t v_at(int b, int t, int kv) const { return q_at(b, t, NH + NKV + kv); }
    size_t lse_at(int b, int t, int h) const { return ((size_t)b * NH + h) * T + t; }
};
void forward(Way way, floatX* out, float* lse, const floatX* qkv, const Shape& s) {   // all but ONE
    auto run = way == TWO ? attention_forward_2 : way == THREE ? attention_forward_3 : attention_forward;
    run(out, lse, qkv, s.B, s.T, s.NH, s.NKV, s.HS, 0);
}
void backward(Way way, floatX* dqkv, Grad dbias, float* delta, float* scratch, const floatX* dout, const floatX* qkv,
              const floatX* out, const float* lse, bool accumulate, const Shape& s) {
    auto run = way == TWO ? attention_backward_2 : way == THREE ? attention_backward_3 : attention_backward;
    run(dqkv, dbias, delta, scratch, dout, qkv, out, lse, accumulate, s.B, s.T, s.NH, s.NKV, s.HS, 0);
}

// RANDOM; BEST_KEY: each query has one key whose score is about 1e4 and more than 104 above all others, so that p is 1 and 0;
// EQUAL_KEYS: p is 1 / (number of keys)
enum Data { RANDOM, BEST_KEY, EQUAL_KEYS };
struct Problem {
    Shape shape;
    std::vector<floatX> qkv, dout;
    std::vector<float> before;   // the gradient of the bias that is added to
    std::vector<int> best;       // BEST_KEY: (B, T)

    Problem(uint64_t seed, Shape s, Data kind = RANDOM) : shape(s) {
        Random random(seed, ((((uint64_t)s.B * 2000 + s.T) * 200 + s.HS) * 100 + s.NH * 10 + s.NKV) * 3 + kind);
        qkv = random.normals(s.qkv());
        dout = random.normals(s.out());
        before = floats(random.normals(s.stride(), 0, 10));
        for (float& x : before) x = (float)(__nv_bfloat16)x;
        if (kind == RANDOM) return;
        // BEST_KEY: keys are codes of +-1 times a number, no two alike, and a query is the code of its key
        const float size = s.HS < 16 ? 64 : 32;
        std::vector<float> codes((size_t)s.T * s.HS);
        for (int t = 0; t < s.T; t++)
            for (int c = 0; c < s.HS; c++) codes[t * s.HS + c] = (c < 8 ? t >> c & 1 : random.bits() & 1) ? size : -size;
        for (int b = 0; b < s.B; b++)
            for (int t = 0; t < s.T; t++) {
                best.push_back((int)(random.bits() % (t + 1)));
                for (int kv = 0; kv < s.NKV; kv++)
                    for (int c = 0; c < s.HS; c++)
                        qkv[s.k_at(b, t, kv) + c] = kind == BEST_KEY ? (floatX)codes[t * s.HS + c] : qkv[s.k_at(b, 0, kv) + c];
                for (int h = 0; h < s.NH && kind == BEST_KEY; h++)
                    for (int c = 0; c < s.HS; c++) qkv[s.q_at(b, t, h) + c] = (floatX)codes[best.back() * s.HS + c];
            }
    }
};

struct Result {
    std::vector<floatX> out, dqkv;
    std::vector<float> lse, dbias;
};
bool same_bits(const Result& a, const Result& b) {
    return same_bits(a.out, b.out) && same_bits(a.dqkv, b.dqkv) && same_bits(a.lse, b.lse) && same_bits(a.dbias, b.dbias);
}
Result compute(const Problem& p, Way way, DType grad_type = F32, bool accumulate = false, bool bias = true) {
    const Shape& s = p.shape;
    Buffer<floatX> out(s.out()), dqkv(s.qkv()), qkv(p.qkv), dout(p.dout);
    Buffer<float> lse(s.rows()), delta(s.rows()), scratch(s.scratch());
    GradBuffer dbias(s.stride(), grad_type);
    if (accumulate) dbias.write(p.before);
    if (way == ONE) {
        Buffer<floatX> probabilities(s.rows() * s.T), ds(s.rows() * s.T);
        attention_forward_1(out.p, lse.p, probabilities.p, qkv.p, s.B, s.T, s.NH, s.NKV, s.HS, 0);
        attention_backward_1(dqkv.p, dbias.grad(), scratch.p, ds.p, dout.p, qkv.p, probabilities.p, accumulate, s.B, s.T, s.NH,
                             s.NKV, s.HS, 0);
        probabilities.read();
        ds.read();   // these two for their guards
    } else {
        forward(way, out.p, lse.p, qkv.p, s);
        backward(way, dqkv.p, bias ? dbias.grad() : Grad{}, delta.p, bias ? scratch.p : nullptr, dout.p, qkv.p, out.p, lse.p, accumulate, s);
        delta.read();
    }
    scratch.read();
    return {out.read(), dqkv.read(), lse.read(), dbias.read()};
}

// ---------------------------------------------------------------------------------------------------------------------
// the reference in double precision, and how far from it a version may be

// How a version computes, in roundings. What is not listed is the same for all of them.
struct Roundings {
    double dot;        // of a sum of HS products in a row
    double add;        // for each addition to a sum over keys or queries
    double tile;       // keys between two moves of the maximum
    double score, p, dp;   // what storing a score, a probability or a dp costs, relative
    double operand, ds;    // what p costs as an operand of p v and p dout, and ds as one of its products
    double exponent;   // what enters an exponential is a difference: roundings of its two sides
};
Roundings roundings(Way way, int HS) {
    // a tensor core cuts where an addition would round: two halves of a unit in the last place for each
    if (tensor_cores(way, HS)) return {2.0 * HS, 2, 32, 0, 0, 0, EPS16, EPS16, 2};
    // 32 channels are 8 sums of 4, three steps to add those, and up to two more over the threads of a row
    if (way == THREE || way == TRAINER) return {7.0 + (HS > 32) + (HS > 64), 1, 16, 0, 0, 0, 0, 0, 0};
    if (way == TWO) return {(double)HS, 1, 1, 0, 0, 0, 0, 0, 0};
    return {(double)HS, 1, 1e9, EPSX, EPSX, EPSX, 0, EPSX, 0};   // one maximum for all keys
}

struct Expected {
    Doubles out, lse, dqkv, dbias, out_bound, lse_bound, dqkv_bound, dbias_bound;
};
// sum a b and sum |a b|, over a multiple of 8 elements
inline void dots(const double* a, const double* b, int n, double* sum, double* size) {
    double x[8] = {}, y[8] = {};
    for (int c = 0; c < n; c += 8)
        for (int i = 0; i < 8; i++) {
            double product = a[c + i] * b[c + i];
            x[i] += product, y[i] += fabs(product);
        }
    *sum = ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
    *size = ((y[0] + y[4]) + (y[1] + y[5])) + ((y[2] + y[6]) + (y[3] + y[7]));
}
// a += factor x, bound += error |x|
inline void add_row(double* __restrict a, double* __restrict bound, const double* __restrict x, double factor, double error,
                    int n) {
    for (int c = 0; c < n; c++) a[c] += factor * x[c], bound[c] += error * fabs(x[c]);
}

// Bounds are sums over all that enters a result of its size times the roundings on its way, to the first order and 5 % more:
// - a score is off by the roundings of its dot product, relative to the sum of its absolute terms, and by two of its own: of
//   1 / sqrt(HS), and of multiplying by it;
// - an exponential is off by what its argument is off by, the rounding of the difference included, and by 2 units in the last
//   place
//   (4 roundings); a row's p by that, by the moves of the maximum, and by the same of the other keys, through their sum;
// - p of backward is exp(s - lse), and lse is off by what the p of its row are off by, weighted with p;
// - delta is off by what out is off by, which has been rounded to be stored.
// Where a number is below the smallest normal one there is nothing relative any more. A key whose score is -inf is not there.
// Queries [skip_from, skip_to) are left out: their dout is 0, so they give nothing to dk and dv.
Expected reference(const Problem& problem, Way way, int skip_from = 0, int skip_to = 0) {
    const Shape& z = problem.shape;
    const int T = z.T, HS = z.HS;
    const Roundings r = roundings(way, HS);
    const double scale = 1 / sqrt((double)HS), TINY = 1e-37, MORE = 1.05;
    Expected e = {Doubles(z.out(), 0), Doubles(z.rows()), Doubles(z.qkv(), 0), Doubles(z.stride(), 0),
                  Doubles(z.out(), 0), Doubles(z.rows()), Doubles(z.qkv(), 0), Doubles(z.stride(), 0)};
    const Doubles x = doubles(problem.qkv), d = doubles(problem.dout);
    Doubles s(T), s_off(T), p(T), p_off(T), dp(T), dp_off(T);   // of a row; by how much they are off, p relative
    for (int b = 0; b < z.B; b++)
        for (int h = 0; h < z.NH; h++)
            for (int i = 0; i < T; i++) {
                if (i >= skip_from && i < skip_to) continue;
                const int kv = h / z.group();
                const double *q = &x[z.q_at(b, i, h)], *di = &d[z.out_at(b, i, h)];
                double *out = &e.out[z.out_at(b, i, h)], *out_off = &e.out_bound[z.out_at(b, i, h)];
                double max = -INFINITY, min = INFINITY, sum = 0, shared = 0, delta = 0, delta_off = 0, size;
                for (int j = 0; j <= i; j++) {
                    dots(q, &x[z.k_at(b, j, kv)], HS, &s[j], &size);
                    s[j] *= scale;
                    if (s[j] == -INFINITY) continue;
                    s_off[j] = size * scale * r.dot * EPS32 + fabs(s[j]) * (2 * EPS32 + r.score);
                    max = std::max(max, s[j]), min = std::min(min, s[j]);
                }
                for (int j = 0; j <= i; j++) sum += p[j] = exp(s[j] - max);
                const double n = r.add * (i + 1) * EPS32, moves = EPS32 * (5 * (ceil((i + 1) / r.tile) - 1) + 2 * (max - min));
                for (int j = 0; j <= i; j++) {
                    p[j] /= sum;
                    p_off[j] =
                        p[j] > 0 ? s_off[j] + moves + EPS32 * (4 + max - s[j] + r.exponent * (fabs(s[j]) + fabs(max))) : 0;
                    shared += p[j] * p_off[j];
                }
                const double lse = max + log(sum);
                const double lse_off = MORE * (shared + n + EPS32 * (fabs(lse) + 2 * log(sum) + r.exponent * fabs(max)));
                e.lse[z.lse_at(b, i, h)] = lse, e.lse_bound[z.lse_at(b, i, h)] = lse_off;
                for (int j = 0; j <= i; j++) {
                    const double* v = &x[z.v_at(b, j, kv)];
                    const double off = p_off[j] + shared + n + r.p;
                    if (p[j] > 0) add_row(out, out_off, v, p[j], p[j] * (off + n + r.operand) + TINY, HS);
                    dots(di, v, HS, &dp[j], &size);
                    dp_off[j] = size * r.dot * EPS32 + fabs(dp[j]) * r.dp;
                    delta += p[j] * dp[j];
                    delta_off += p[j] * (dp_off[j] + fabs(dp[j]) * off);
                    p_off[j] = way == ONE ? off   // which keeps p
                                          : s_off[j] + lse_off +
                                                EPS32 * (4 + fabs(s[j] - lse) + r.exponent * (fabs(s[j]) + fabs(lse)));
                }
                for (int c = 0; c < HS; c++) out_off[c] = MORE * out_off[c] + fabs(out[c]) * (4 * EPS32 + EPSX) + TINY;
                if (way != ONE) {   // delta is made of out, not of p and dp
                    delta_off = 0;
                    for (int c = 0; c < HS; c++) delta_off += fabs(di[c]) * (out_off[c] + r.dot * EPS32 * fabs(out[c]));
                }
                double *dq = &e.dqkv[z.q_at(b, i, h)], *dq_off = &e.dqkv_bound[z.q_at(b, i, h)];
                for (int j = 0; j <= i; j++) {
                    if (p[j] == 0) continue;
                    const size_t k = z.k_at(b, j, kv), v = z.v_at(b, j, kv);
                    const double ds = p[j] * (dp[j] - delta), n_key = r.add * z.group() * (T - j) * EPS32;
                    const double ds_off = p[j] * (dp_off[j] + delta_off + 2 * EPS32 * (fabs(dp[j]) + fabs(delta))) +
                                          fabs(ds) * (p_off[j] + 2 * EPS32 + r.ds) + TINY;
                    add_row(dq, dq_off, &x[k], ds, ds_off + fabs(ds) * n, HS);
                    add_row(&e.dqkv[k], &e.dqkv_bound[k], q, ds, ds_off + fabs(ds) * n_key, HS);
                    add_row(&e.dqkv[v], &e.dqkv_bound[v], di, p[j], p[j] * (p_off[j] + r.operand + n_key) + TINY, HS);
                }
            }
    // Column sums: of what is stored, but tensor cores sum what is not rounded yet, 64 rows at a time.
    const bool rounded = !tensor_cores(way, HS);
    const double depth = rounded ? colsum_depth(z.B * T) : 8 + finish_depth(z.B * ceil_div(T, 64));
    for (size_t i = 0; i < z.qkv(); i++) {
        const size_t column = i % z.stride();
        const double factor = column < (size_t)(z.NH + z.NKV) * HS ? scale : 1;   // of dq and dk
        e.dqkv[i] *= factor;
        const double off = MORE * factor * e.dqkv_bound[i] + fabs(e.dqkv[i]) * 4 * EPS32 + TINY, store = fabs(e.dqkv[i]) * EPSX;
        e.dqkv_bound[i] = off + store;
        e.dbias[column] += e.dqkv[i];
        e.dbias_bound[column] += off + (rounded ? store : 0) + (fabs(e.dqkv[i]) + off) * depth * EPS32;
    }
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

// What is said of each version: one number at a time within its bound, and all of them by their distance.
struct Statements {
    const char* name;
    double bar;   // of the distance
    Property out, lse, dq, dk, dv, dbias, far;
    Statements(const char* name, double bar, const char* bound_text)
        : name(name), bar(bar), out("out"), lse("lse"), dq("dq"), dk("dk"), dv("dv"), dbias("the bias gradient"),
          far("relative distances of out, dq, dk, dv", bound_text) {}
    void report() {
        printf("%s\n", name);
        ::report({&out, &lse, &dq, &dk, &dv, &dbias});
        if (far.compared) ::report({&far});
    }
};
// Which of q, k and v (0, 1, 2) an element of qkv or of its gradient belongs to
int part_of(const Shape& s, size_t i) {
    int head = (int)(i % s.stride() / s.HS);
    return head < s.NH ? 0 : head < s.NH + s.NKV ? 1 : 2;
}
void compare(Statements& p, const Problem& problem, const Result& ours, const Expected& e, DType type, bool accumulate) {
    const Shape& s = problem.shape;
    for (size_t i = 0; i < s.out(); i++) p.out.within(i, (float)ours.out[i], e.out[i], e.out_bound[i]);
    for (size_t i = 0; i < s.rows(); i++) p.lse.within(i, ours.lse[i], e.lse[i], e.lse_bound[i]);
    Doubles parts[3], expected[3];
    for (size_t i = 0; i < s.qkv(); i++) {
        int part = part_of(s, i);
        (part == 0 ? p.dq : part == 1 ? p.dk : p.dv).within(i, (float)ours.dqkv[i], e.dqkv[i], e.dqkv_bound[i]);
        parts[part].push_back((float)ours.dqkv[i]), expected[part].push_back(e.dqkv[i]);
    }
    for (size_t c = 0; c < s.stride(); c++) {
        double before = accumulate ? problem.before[c] : 0, sum = before + e.dbias[c];
        p.dbias.within(
            c, ours.dbias[c], sum,
            e.dbias_bound[c] + 2 * EPS32 * (fabs(before) + fabs(sum)) + (type == BF16 ? fabs(sum) * EPS16 * 1.01 : 0));
    }
    if (!problem.best.empty()) return;   // dq and dk are sums of nothing but roundings
    p.far.within(0, distance(doubles(ours.out), e.out), 0, p.bar);
    for (int part : {0, 1, 2})
        if (s.T > 1 || part == 2)   // of a single key dq and dk are 0
            p.far.within(1 + part, distance(parts[part], expected[part]), 0, p.bar);
}
const char* describe(const Shape& s, Way way) {
    static char t[120];
    snprintf(t, sizeof t, "%s, B %d, T %d, %d heads on %d of %d channels",
             way == ONE     ? "version 1"
             : way == TWO   ? "version 2"
             : way == THREE ? "version 3"
                            : "the trainer's",
             s.B, s.T, s.NH, s.NKV, s.HS);
    return t;
}

// Bars of the relative distances. In bf16 a rounding is 2^-8 at most and 0.4 of that in the mean of squares. Version 1 rounds
// s, p, dp, ds and the result, versions 2 and 3 out (which delta is made of) and the result, version 4 also p and ds. In fp32
// it is all the additions.
const char* NAMES[] = {"version 1: T x T tensors", "version 2: a query a thread", "version 3: the trainer's plain one",
                       "version 4: the trainer's on tensor cores"};
struct AllStatements {
    Statements of[4] = {{NAMES[0], kFP32 ? 1e-6 : 2 * EPS16, kFP32 ? "1e-6" : "two roundings of bf16"},
                        {NAMES[1], kFP32 ? 1e-6 : EPS16, kFP32 ? "1e-6" : "a rounding of bf16"},
                        {NAMES[2], kFP32 ? 1e-6 : EPS16, kFP32 ? "1e-6" : "a rounding of bf16"},
                        {NAMES[3], 1.5 * EPS16, "one and a half roundings of bf16"}};
    Statements& operator()(Way way, int HS) { return tensor_cores(way, HS) ? of[3] : of[std::min((int)way, 2)]; }
    void report() {
        for (int v = 0; v < (kFP32 ? 3 : 4); v++) of[v].report();
    }
};

// With the sanitizers, which look at each access, a part of the cases is enough, and all would take long.
#if defined(SIMT_ASAN) && SIMT_ASAN
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif
const int HEAD_SIZES[] = {8, 24, 32, 40, 64, 72, 80, 96, 128};

void test_random(uint64_t seed, bool large) {
    AllStatements statements;
    Property again("the same bits in a second run"), no_bias("without a gradient of the bias: the same dqkv, scratch is not touched"),
        agree("tensor cores and plain arithmetic agree", "the sum of their distances");
    const int heads[][2] = {{1, 1}, {3, 3}, {4, 2}, {6, 2}, {8, 1}};
    int turn = 0;
    for (int HS : HEAD_SIZES)
        for (int T : {1, 31, 63, 64, 65, 128, 129, 257, 1000}) {
            const bool tc = tensor_cores(TRAINER, HS), all_sizes = HS == 24 || HS == 40 || HS == 64 || HS == 72 || HS == 128;
            if (!all_sizes && T != 1 && T != 31 && T != 65) continue;
            if (T == 257 && HS != 24 && HS != 64 && HS != 128) continue;
            if (T == 1000 && (!large || (HS != 64 && HS != 128))) continue;   // else see test_long
            if (SANITIZED && T != 1 && T != 31 && T != 65 && T * HS != 129 * 64) continue;
            turn++;
            Shape s = {1 + turn % 3, T, heads[turn % 5][0], heads[turn % 5][1], HS};
            auto work = [&] { return (double)s.B * s.NH * T * T * HS; };
            const double limit = tc ? 4e5 : 6e5;   // to save time
            if (work() > limit) s.B = 1;
            if (work() > limit) s.NH = turn % 2 ? 2 : 1, s.NKV = 1;
            if (work() > 2 * limit) s.NH = 1;
            Problem p(seed, s);
            Result trainer;
            for (Way way : {TRAINER, THREE, TWO, ONE}) {
                const bool few = T <= 65 && turn % 3 == 0 && !(SANITIZED && T > 31);
                // without tensor cores the trainer's is version 3
                if (way == THREE ? !tc || (T != 31 && T != 65) : way != TRAINER && !few) continue;
                const DType type = turn % 2 ? F32 : BF16;
                const bool accumulate = turn / 2 % 2;
                set_case("%s, %s gradient, %s", describe(s, way), dtype_name(type), accumulate ? "added to" : "written");
                Result ours = compute(p, way, type, accumulate);
                compare(statements(way, HS), p, ours, reference(p, way), type, accumulate);
                if (way == TRAINER) trainer = ours;
                if (way == TRAINER && T == (tc ? 65 : 31) && !SANITIZED)
                    again.is(same_bits(ours, compute(p, way, type, accumulate)), "other bits");
                if (way == TRAINER && T == 31) no_bias.is(same_bits(ours.dqkv, compute(p, way, type, accumulate, false).dqkv), "other bits");
                if (way == THREE) {
                    const double bar = statements(TRAINER, HS).bar + statements(THREE, HS).bar;
                    agree.within(0, distance(doubles(trainer.out), doubles(ours.out)), 0, bar);
                    if (T > 1) agree.within(1, distance(doubles(trainer.dqkv), doubles(ours.dqkv)), 0, bar);
                }
            }
        }
    statements.report();
    printf("all\n");
    if (!SANITIZED) report({&again});
    report({&no_bias});
    if (!kFP32) report({&agree});
}

// A product and a difference may become one operation, an FMA, that does not round the product: s - s is what rounding s lost
// then, and its exponential is not 1 but next to it. In fp32 that is still there when p v / p is stored.
void nearly_equal(Property& p, size_t i, double ours, double reference, double roundings) {
    if (ours == reference) p.equal(i, ours, reference);
    else p.within(i, ours, reference, fabs(reference) * roundings * EPS32 + (roundings > 0 ? 3e-45 : 0));
}

// Scores so large that p is 1 for one key and 0 for all others, and scores that are all equal.
void test_scores(uint64_t seed) {
    AllStatements statements;
    Property value("scores around 1e4: out is the value of the best key", kFP32 ? "4 roundings" : "every bit"),
        lse("and lse is its score, without tensor cores", "2 roundings");
    for (int HS : {8, 40, 64, 128})
        for (Data data : {BEST_KEY, EQUAL_KEYS})
            for (Way way : {TRAINER, THREE, TWO, ONE}) {
                const Shape s = {1, 37, 2, 1, HS};
                if (way == THREE && !tensor_cores(TRAINER, HS)) continue;
                set_case("%s, %s", data == BEST_KEY ? "one large score" : "equal scores", describe(s, way));
                Problem p(seed, s, data);
                Result ours = compute(p, way);
                if (data == EQUAL_KEYS || way != ONE)   // which rounds a score of 1e4 by up to 32
                    compare(statements(way, HS), p, ours, reference(p, way), F32, false);
                for (int t = 0; t < s.T && data == BEST_KEY; t++)
                    for (int h = 0; h < s.NH; h++) {
                        const size_t at = s.out_at(0, t, h), v = s.v_at(0, p.best[t], h / s.group());
                        float dot = 0;   // of integers: exact
                        for (int c = 0; c < HS; c++) {
                            nearly_equal(value, at + c, (float)ours.out[at + c], (float)p.qkv[v + c], kFP32 ? 4 : 0);
                            dot += (float)p.qkv[s.q_at(0, t, h) + c] * (float)p.qkv[s.k_at(0, p.best[t], h / s.group()) + c];
                        }
                        const float score = dot * (1.0f / sqrtf((float)HS));
                        if (!tensor_cores(way, HS))
                            nearly_equal(lse, at, ours.lse[s.lse_at(0, t, h)], way == ONE ? (float)(floatX)score : score, 2);
                    }
            }
    printf("one key with all of p, and all keys with the same\n");
    report({&value, &lse});
    statements.report();
}

// A single key has p = 1: the output is its value, the score gets no gradient, and the value gets that of the output. q and k
// are small integers, so that scores and dp are exact in any order of summation, and nothing is left to round.
void test_one_key(uint64_t seed) {
    const char* bits = kFP32 ? "some roundings" : "every bit";
    Property out("one key: out is v, of any size", bits), lse("lse is the score", "4 roundings"), zero("dq and dk are 0"),
        dv("dv is dout", bits), chosen("where there are no tensor cores the trainer takes version 3", "every bit");
    for (int HS : HEAD_SIZES)
        for (Way way : {TRAINER, THREE, TWO, ONE}) {
            const Shape s = {1, 1, 2, 2, HS};
            set_case("%s", describe(s, way));
            Problem p(seed, s);
            Random random(seed, HS);
            for (floatX& x : p.qkv) x = (floatX)(float)((int)(random.bits() % 9) - 4);
            for (floatX& x : p.dout) x = (floatX)(float)((int)(random.bits() % 9) - 4);
            Result ours = compute(p, way);
            if (way == THREE && !tensor_cores(TRAINER, HS)) chosen.is(same_bits(ours, compute(p, TRAINER)), "other bits");
            for (int b = 0; b < s.B; b++)
                for (int h = 0; h < s.NH; h++) {
                    const size_t q = s.q_at(b, 0, h), k = s.k_at(b, 0, h), v = s.v_at(b, 0, h), o = s.out_at(b, 0, h);
                    float dot = 0;
                    for (int c = 0; c < HS; c++) {
                        dot += (float)p.qkv[q + c] * (float)p.qkv[k + c];
                        zero.is((float)ours.dqkv[q + c] == 0 && (float)ours.dqkv[k + c] == 0, "not 0");
                    }
                    const float score = dot * (1.0f / sqrtf((float)HS));
                    lse.within(h, ours.lse[s.lse_at(b, 0, h)], way == ONE ? (float)(floatX)score : score,
                               EPS32 * (4 * fabs(score) + 2));
                    for (int c = 0; c < HS; c++) {
                        nearly_equal(out, o + c, (float)ours.out[o + c], (float)p.qkv[v + c], kFP32 ? 4 : 0);
                        nearly_equal(dv, v + c, (float)ours.dqkv[v + c], (float)p.dout[o + c], kFP32 ? 6 + 2 * fabs(score) : 0);
                    }
                }
            // the smallest and the largest numbers, infinities too
            const float odd[] = {1e-40f, -1e-40f, 9.2e-41f, 1.2e-38f, 3e38f, -3e38f, INFINITY, -INFINITY};
            for (int b = 0; b < s.B; b++)
                for (int h = 0; h < s.NH; h++)
                    for (int c = 0; c < HS; c++) p.qkv[s.v_at(b, 0, h) + c] = (floatX)odd[random.bits() % 8];
            ours = compute(p, way);
            for (size_t i = 0; i < s.out(); i++)   // B = T = 1, NH = NKV: out has the place of v
                nearly_equal(out, i, (float)ours.out[i], (float)p.qkv[s.v_at(0, 0, 0) + i], kFP32 ? 4 : 0);
        }
    printf("T = 1\n");
    report({&out, &lse, &zero, &dv, &chosen});
}

// Where a NaN goes. It must reach what depends on it: a query's NaN the keys up to it, a key's the queries from it on. A masked
// pair has p = 0, and 0 * NaN is NaN: so it may reach further, to what shares a tile with that. All this is in the same sequence,
// in the same head or in heads that share k and v. Everything else has the same bits as without the NaN: that is also what shows
// that no kernel reads beyond a head, a sequence or a tensor, into zeros times NaN.
enum Nan : char { NOT, MUST, MAY };
struct Reach {
    const Shape& s;
    std::vector<Nan> out, lse, dqkv;
    explicit Reach(const Shape& s) : s(s), out(s.out(), NOT), lse(s.rows(), NOT), dqkv(s.qkv(), NOT) {}
    void mark(std::vector<Nan>& v, size_t head, Nan nan, int c = -1) {   // a channel or all of them
        for (int i = 0; i < s.HS; i++)
            if (c < 0 || c == i) v[head + i] = nan;
    }
};
Reach reach_of_nan(const Shape& s, char what, int b, int head, int t, int c) {
    Reach r(s);
    if (what == 'q' || what == 'd') {
        const int kv = head / s.group();
        r.mark(r.dqkv, s.q_at(b, t, head), MUST);
        if (what == 'q') {
            r.mark(r.out, s.out_at(b, t, head), MUST);
            r.lse[s.lse_at(b, t, head)] = MUST;
        }
        for (int j = 0; j < s.T; j++) {
            r.mark(r.dqkv, s.k_at(b, j, kv), j <= t ? MUST : MAY);
            r.mark(r.dqkv, s.v_at(b, j, kv), j <= t ? MUST : MAY, what == 'd' ? c : -1);
        }
        return r;
    }
    for (int h = head * s.group(); h < (head + 1) * s.group(); h++)
        for (int i = 0; i < s.T; i++) {
            const bool sees = i >= t;
            r.mark(r.dqkv, s.q_at(b, i, h), sees ? MUST : MAY, what == 'k' && !sees ? c : -1);
            if (sees || what == 'v') r.mark(r.out, s.out_at(b, i, h), sees ? MUST : MAY, what == 'v' ? c : -1);
            if (sees && what == 'k') r.lse[s.lse_at(b, i, h)] = MUST;
        }
    for (int j = 0; j < s.T; j++) {   // the last query sees all keys
        r.mark(r.dqkv, s.k_at(b, j, head), MUST);
        if (what == 'k') r.mark(r.dqkv, s.v_at(b, j, head), MUST);
    }
    return r;
}
template <class T>
bool nan_reaches(const std::vector<T>& ours, const std::vector<T>& clean, const std::vector<Nan>& nan) {
    for (size_t i = 0; i < ours.size(); i++) {
        const bool is_nan = std::isnan((float)ours[i]), same = memcmp(&ours[i], &clean[i], sizeof(T)) == 0;
        if (nan[i] == MUST ? !is_nan : nan[i] == MAY ? !is_nan && !same : !same) return false;
    }
    return true;
}
void test_nan(uint64_t seed) {
    Property p("a NaN in q, k, v or dout goes where it must, and all else keeps its bits"),
        shared("and so in heads that share k and v");
    struct Case {
        Way way;
        Shape shape;
    };
    for (const Case& a : {Case{TRAINER, {2, 70, 2, 2, 24}},
                          {TRAINER, {2, 50, 2, 2, 40}},
                          {TRAINER, {1, 50, 2, 1, 72}},
                          {TRAINER, {2, 50, 2, 1, 64}},
                          {TRAINER, {1, 70, 1, 1, 128}},
                          {ONE, {2, 50, 4, 2, 8}},
                          {TWO, {2, 50, 4, 2, 8}}}) {
        const Shape& s = a.shape;
        const Problem clean(seed, s);
        set_case("%s", describe(s, a.way));
        const Result without = compute(clean, a.way);
        int turn = 0;
        for (char what : {'q', 'k', 'v', 'd'})
            for (int t : {0, 20, 35, s.T - 4, s.T - 1}) {
                turn++;
                if (SANITIZED && t > 0 && t < s.T - 1) continue;
                if (s.HS > 24 && turn % (s.HS == 128 ? 4 : 2) != (s.HS == 128 ? 2 : 0)) continue;   // to save time
                const int heads = what == 'q' || what == 'd' ? s.NH : s.NKV;
                const int b = t == 0 ? s.B - 1 : turn % s.B, head = t == 0 ? heads - 1 : turn % heads,
                          c = turn % 3 ? 0 : s.HS - 1;
                set_case("%s: NaN in %s, b %d, head %d, row %d, channel %d", describe(s, a.way),
                         what == 'd' ? "dout" : std::string(1, what).c_str(), b, head, t, c);
                Problem broken = clean;
                const size_t at = what == 'd'   ? s.out_at(b, t, head)
                                  : what == 'q' ? s.q_at(b, t, head)
                                  : what == 'k' ? s.k_at(b, t, head)
                                                : s.v_at(b, t, head);
                (what == 'd' ? broken.dout : broken.qkv)[at + c] = (floatX)NAN;
                const Result ours = compute(broken, a.way);
                const Reach r = reach_of_nan(s, what, b, head, t, c);
                std::vector<Nan> columns(s.stride(), NOT);
                for (size_t i = 0; i < s.qkv(); i++)
                    if (r.dqkv[i] == MUST || columns[i % s.stride()] == NOT) columns[i % s.stride()] = r.dqkv[i];
                Property& q = s.group() > 1 ? shared : p;
                q.is(nan_reaches(ours.out, without.out, r.out), "out: a NaN too many or too few, or other bits");
                q.is(nan_reaches(ours.lse, without.lse, r.lse), "lse: a NaN too many or too few, or other bits");
                q.is(nan_reaches(ours.dqkv, without.dqkv, r.dqkv), "dqkv: a NaN too many or too few, or other bits");
                q.is(nan_reaches(ours.dbias, without.dbias, columns),
                     "bias gradient: a NaN too many or too few, or other bits");
            }
    }
    printf("NaN\n");
    report({&p, &shared});
}

// Infinities. One in q is a NaN in q: whatever the signs of k, the largest score is no number, or all are -inf. One in v is one
// in out. One in k whose scores are all -inf is a key that is not there: p = 0, and its dk and dv are 0; only dq has 0 * inf =
// NaN in that channel.
void test_infinity(uint64_t seed) {
    Property k("an infinity in k that makes all scores -inf: a key that is not there"), q("an infinity in q: as a NaN"),
        v("an infinity in v is one in out");
    for (Way way : {TRAINER, TWO, ONE})
        for (int HS : {24, 40, 72, 64}) {
            if (way != TRAINER && HS > 40) continue;
            const Shape s = {1, 37, 2, 1, HS};
            const int at = 21, c = HS - 3;
            Problem p(seed, s);
            for (int t = 0; t < s.T; t++)
                for (int h = 0; h < s.NH; h++) p.qkv[s.q_at(0, t, h) + c] = (floatX)(0.5f + t % 2);   // all positive
            const Result without = compute(p, way);

            set_case("%s, -inf in k", describe(s, way));
            Problem broken = p;
            broken.qkv[s.k_at(0, at, 0) + c] = (floatX)-INFINITY;
            Result ours = compute(broken, way);
            Expected e = reference(broken, way);
            for (size_t i = 0; i < s.out(); i++) k.within(i, (float)ours.out[i], e.out[i], e.out_bound[i]);
            for (size_t i = 0; i < s.rows(); i++) k.within(i, ours.lse[i], e.lse[i], e.lse_bound[i]);
            for (size_t i = 0; i < s.qkv(); i++) {
                const int t = (int)(i / s.stride()), channel = (int)(i % HS), part = part_of(s, i);
                const bool nan = std::isnan((float)ours.dqkv[i]);
                if (part == 0 && channel == c && (t >= at || nan)) k.is(nan, "dq is a number in the infinity's channel");
                else if (part > 0 && t == at) k.is((float)ours.dqkv[i] == 0, "dk or dv of this key is not 0");
                else k.within(i, (float)ours.dqkv[i], e.dqkv[i], e.dqkv_bound[i]);
            }

            set_case("%s, inf in q", describe(s, way));
            broken = p;
            broken.qkv[s.q_at(0, at, 1) + c] = (floatX)INFINITY;
            ours = compute(broken, way);
            const Reach r = reach_of_nan(s, 'q', 0, 1, at, c);
            q.is(nan_reaches(ours.out, without.out, r.out) && nan_reaches(ours.lse, without.lse, r.lse) &&
                     nan_reaches(ours.dqkv, without.dqkv, r.dqkv),
                 "a NaN too many or too few, or other bits");

            set_case("%s, inf in v", describe(s, way));
            broken = p;
            broken.qkv[s.v_at(0, at, 0) + c] = (floatX)INFINITY;
            ours = compute(broken, way);
            for (size_t i = 0; i < s.out(); i++) {
                const int t = (int)(i / (s.NH * HS));
                const bool there = (int)(i % HS) == c, may = there && t < at && std::isnan((float)ours.out[i]);   // 0 * inf
                v.equal(i, (float)ours.out[i], may ? NAN : there && t >= at ? INFINITY : (float)without.out[i]);
            }
        }
    printf("infinities\n");
    report({&k, &q, &v});
}

// T = 1000, all of it with --large. On the CPU the first block of each kernel runs, the one with most to do: that of the last
// queries, which see all keys, or of the first keys, which all queries see. The queries between have a dout of 0, so that the
// reference can leave them out. What the blocks that do not run would have written is written for them: out and lse of the first
// queries; any lse will do for those between.
void test_long(uint64_t seed) {
    Property out("T = 1000: out and lse of the last queries"), dq("dq of the last queries"), dkv("dk and dv of the first keys");
    for (int HS : {64, 128}) {
        if (SANITIZED && HS > 64) continue;
        const Shape s = {1, 1000, 1, 1, HS};
        const int last = 960, first = 64;   // queries from `last` on, keys before `first`
        set_case("%s", describe(s, TRAINER));
        Problem p(seed, s);
        for (int i = 2 * first * HS; i < last * HS; i++) p.dout[i] = (floatX)0.0f;
        const Expected e = reference(p, TRAINER, 2 * first, last);
        Buffer<floatX> o(s.out()), dqkv(s.qkv()), qkv(p.qkv), dout(p.dout);
        Buffer<float> lse(s.rows()), delta(s.rows()), scratch(s.scratch());
        GradBuffer dbias(s.stride(), F32);
        launch_blocks(0, 0, [&] { forward(TRAINER, o.p, lse.p, qkv.p, s); });
        std::vector<floatX> got = o.read();
        std::vector<float> got_lse = lse.read(), got_delta(s.rows());
        for (size_t i = last * HS; i < s.out(); i++) out.within(i, (float)got[i], e.out[i], e.out_bound[i]);
        for (size_t i = last; i < s.rows(); i++) out.within(i, got_lse[i], e.lse[i], e.lse_bound[i]);
        for (int i = 0; i < last * HS; i++) {
            got[i] = (floatX)(float)e.out[i];
            got_delta[i / HS] += (float)got[i] * (float)p.dout[i];
            got_lse[i / HS] = i < 2 * first * HS ? (float)e.lse[i / HS] : 10;
        }
        o.write(got);
        lse.write(got_lse);
        delta.write(got_delta);
        launch_blocks(0, 0, [&] {
            backward(TRAINER, dqkv.p, dbias.grad(), delta.p, scratch.p, dout.p, qkv.p, o.p, lse.p, false, s);
        });
        std::vector<floatX> d = dqkv.read();
        for (size_t i = 0; i < s.qkv(); i++) {
            const int t = (int)(i / s.stride()), part = part_of(s, i);
            if (part == 0 ? t >= last : t < first) (part == 0 ? dq : dkv).within(i, (float)d[i], e.dqkv[i], e.dqkv_bound[i]);
        }
    }
    printf("long\n");
    report({&out, &dq, &dkv});
}

// Tensors of more than 2^31 elements: a great many short sequences, or rows of a great many heads. The last sequence, or the
// last head, is compared with one that is alone.
void test_far(uint64_t seed) {
    Property p("tensors beyond 2^31 elements", "every bit of the same problem in small ones");
    for (int HS : {128, 40})
        for (bool wide : {false, true}) {
            const int T = wide ? 80 : 5;   // of wide rows the last third lies beyond 2^31
            const int many = wide ? 37500000 / (3 * HS) : (int)(((size_t)1 << 31) / (T * HS)) + 1000;
            const Shape near = {1, T, 1, 1, HS}, s = {wide ? 1 : many, T, wide ? many : 1, wide ? many : 1, HS};
            const int b = s.B - 1, h = s.NH - 1;
            set_case("%s", describe(s, TRAINER));
            Problem problem(seed, near);
            const Result expected = compute(problem, TRAINER);
            FarBuffer<floatX> qkv(s.qkv()), dqkv(s.qkv()), out(s.out()), dout(s.out());
            FarBuffer<float> lse(s.rows()), delta(s.rows()), scratch(s.scratch()), dbias(s.stride());
            if (!qkv.p || !dqkv.p || !out.p || !dout.p || !lse.p || !delta.p || !scratch.p || !dbias.p) continue;
            auto head = [&](const std::vector<floatX>& v, size_t at) {
                return std::vector<floatX>(v.begin() + at, v.begin() + at + HS);
            };
            for (int t = 0; t < T; t++) {
                qkv.write(s.q_at(b, t, h), head(problem.qkv, near.q_at(0, t, 0)));
                qkv.write(s.k_at(b, t, h), head(problem.qkv, near.k_at(0, t, 0)));
                qkv.write(s.v_at(b, t, h), head(problem.qkv, near.v_at(0, t, 0)));
                dout.write(s.out_at(b, t, h), head(problem.dout, near.out_at(0, t, 0)));
            }
            const int heads = s.B * s.NH, row_blocks = ceil_div(T, 64);
            const int together = att_in_groups(att_shape(T, s.NH, s.NKV, HS), heads).together;
            std::vector<int64_t> of_last_head;
            for (int i = std::max(0, heads - together) * row_blocks; i < heads * row_blocks; i++)
                if (att_place(i, heads, row_blocks, together, true).head == heads - 1) of_last_head.push_back(i);
            p.is((int)of_last_head.size() == row_blocks, "the last head has more blocks or fewer");
            auto run = [&](auto&& launch) { run_blocks(of_last_head, launch); };
            run([&] { forward(TRAINER, out.p, lse.p, qkv.p, s); });
            for (int twice = 0; twice < 2; twice++)   // dk of the first rows needs delta of the last ones: now it is there
                run([&] {
                    backward(TRAINER, dqkv.p, {dbias.p, F32}, delta.p, scratch.p, dout.p, qkv.p, out.p, lse.p, false, s);
                });
            for (int t = 0; t < T; t++) {
                p.is(same_bits(out.read(s.out_at(b, t, h), HS), head(expected.out, near.out_at(0, t, 0))),
                     "out has other bits");
                p.is(lse.read(s.lse_at(b, t, h), 1)[0] == expected.lse[t], "lse has other bits");
                for (int part : {0, 1, 2})
                    p.is(same_bits(dqkv.read(s.q_at(b, t, part * s.NH + h), HS), head(expected.dqkv, near.q_at(0, t, part))),
                         "dqkv has other bits");
            }
        }
    printf("large\n");
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// the order of the trainer's blocks

// Rows of a block, and how many blocks there are, of the kernels on tensor cores
int block_rows(int HS) { return HS == 64 ? 64 * TC_M<64> : 64 * TC_M<128>; }
// (head of all sequences, first row) of a block of forward or dq, or of dkv
std::pair<int, int> place_of(const Shape& s, const AttShape& shape, bool dkv, int block) {
    const int heads = s.B * (dkv ? s.NKV : s.NH);
    AttPlace place = att_place(block, heads, ceil_div(s.T, block_rows(s.HS)), att_in_groups(shape, heads).together, !dkv);
    return {place.head, place.row_block * block_rows(s.HS)};
}

// --order B T NH NKV HS L2_BYTES: a line a block, for dev/bench/l2.py
int print_order(char** a) {
    const Shape s = {atoi(a[0]), atoi(a[1]), atoi(a[2]), atoi(a[3]), atoi(a[4])};
    AttShape shape = att_shape(s.T, s.NH, s.NKV, s.HS);
    shape.together = att_heads_together(s.T, s.HS, strtoull(a[5], nullptr, 10));
    for (const char* kernel : {"forward", "dq", "dkv"}) {
        const bool dkv = strcmp(kernel, "dkv") == 0;
        printf("%s: %d rows a block\n", kernel, block_rows(s.HS));
        const int blocks = s.B * (dkv ? s.NKV : s.NH) * ceil_div(s.T, block_rows(s.HS));
        for (int i = 0; i < blocks; i++) {
            auto [head, first] = place_of(s, shape, dkv, i);
            printf("%d %d\n", head, first);
        }
    }
    return 0;
}

// That the kernels keep to it: blocks run one at a time, and write the rows that it says. The CPU backend's cache is small, so
// that heads go by in groups of a few.
void test_order(uint64_t seed) {
    Property p("a block writes the rows that the order gives it");
    if (kFP32 || !on_cpu_backend()) return;   // a GPU runs whole grids
    for (int HS : {64, 128}) {
        if (SANITIZED && HS > 64) continue;
        const Shape s = {3, 200, 6, 3, HS};   // the last block of a head is not full
        const int rows = block_rows(HS), row_blocks = ceil_div(s.T, rows);
        const AttShape shape = att_shape(s.T, s.NH, s.NKV, HS);
        set_case("%s, %d heads together", describe(s, TRAINER), shape.together);
        p.is(shape.together < s.B * s.NKV, "all heads go by together: this test wants some of them to wait");
        const Problem problem(seed, s);
        Buffer<floatX> qkv(problem.qkv), dout(problem.dout), out(problem.dout);   // any will do
        Buffer<float> lse(std::vector<float>(s.rows(), 5.0f));
        for (int block = 0; block < s.B * s.NH * row_blocks; block += 1 + block % 5) {
            Buffer<float> written(s.rows()), delta(s.rows()), scratch(s.scratch());
            Buffer<floatX> dqkv(s.qkv()), o(s.out());
            GradBuffer dbias(s.stride(), F32);
            launch_blocks(block, block, [&] { forward(TRAINER, o.p, written.p, qkv.p, s); });
            launch_blocks(block, block, [&] {
                backward(TRAINER, dqkv.p, dbias.grad(), delta.p, scratch.p, dout.p, qkv.p, out.p, lse.p, false, s);
            });
            const std::vector<float> wrote = written.read();
            const std::vector<floatX> gradient = dqkv.read();
            const bool dkv_too = block < s.B * s.NKV * row_blocks;
            auto [head, first] = place_of(s, shape, false, block);
            auto [kv_head, kv_first] = dkv_too ? place_of(s, shape, true, block) : std::pair<int, int>(-1, 0);
            for (int b = 0; b < s.B; b++)
                for (int t = 0; t < s.T; t++)
                    for (int h = 0; h < s.NH; h++) {
                        const bool ours = b * s.NH + h == head && t >= first && t < first + rows;
                        p.is(std::isnan(wrote[s.lse_at(b, t, h)]) != ours, "forward: another block's row, or none of its own");
                        p.is(std::isnan((float)gradient[s.q_at(b, t, h)]) != ours, "dq: another block's row, or none of its own");
                        if (h >= s.NKV) continue;
                        const bool keys = b * s.NKV + h == kv_head && t >= kv_first && t < kv_first + rows;
                        p.is(std::isnan((float)gradient[s.v_at(b, t, h)]) != keys, "dkv: another block's row, or none of its own");
                    }
        }
    }
    printf("order\n");
    report({&p});
}

// Tiles in shared memory, which has 32 banks of 4 bytes. 8 lanes at a time give ldmatrix a row of 16 bytes each, or copy 16 bytes
// each: without conflicts if these lie in 8 different groups of 4 banks. Further rows change nothing: they are whole lines away.
template <int HS>
__global__ void tile_addresses_kernel(int* out) {
    const TileReader<HS> read;
    for (int i = 0; i < HS / 16; i++, out += 3 * 32) {
        const int place = i * 32 + threadIdx.x;   // of a copy, as tc_load_tile has it
        out[threadIdx.x] = read.at_8 ^ (2 * 32 * (i / 2));
        out[32 + threadIdx.x] = read.at_16 ^ (2 * 16 * i);
        out[64 + threadIdx.x] = tc_at<HS>(place / (HS / 8), place % (HS / 8) * 8);
    }
}
template <int HS>
void test_banks(Property& p) {
    Buffer<int> addresses(3 * 32 * HS / 16);
    tile_addresses_kernel<HS><<<1, 32>>>(addresses.p);
    cudaCheck(cudaGetLastError());
    const std::vector<int> at = addresses.read();
    for (size_t i = 0; i < at.size(); i += 8) {
        int groups = 0;
        for (int j = 0; j < 8; j++) groups |= 1 << at[i + j] / 16 % 8;
        p.is(groups == 0xff, "two of 8 lanes want the same banks");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int B, int T, int NH, int NKV, int HS) {
    const Shape all = {B, T, NH, NKV, HS};
    char title[200];
    snprintf(title, sizeof title, "%s: B %d, T %d, %d heads on %d of %d channels", model, B, T, NH, NKV, HS);
    // of an element of out: two products with half of T keys, two flops each; backward has five such products
    const double flops = 2.0 * T;
    BenchTable t(title, all.out(), BenchTable::FLOPS);
    const Shape s = t.timed ? all : Shape{1, 1, NH, NKV, HS};   // without a GPU nothing runs
    Buffer<floatX> qkv(s.qkv()), dqkv(s.qkv()), out(s.out()), dout(s.out());
    Buffer<float> lse(s.rows()), delta(s.rows()), scratch(s.scratch());
    GradBuffer dbias(s.stride(), F32);
    for (Buffer<floatX>* b : {&qkv, &dout}) b->fill();
    {
        Buffer<floatX> probabilities(s.rows() * s.T), ds(s.rows() * s.T);
        t.row("forward, version 1: T x T tensors", flops,
              [&] { attention_forward_1(out.p, lse.p, probabilities.p, qkv.p, B, T, NH, NKV, HS, 0); });
        t.row("backward, version 1", 2.5 * flops, [&] {
            attention_backward_1(dqkv.p, dbias.grad(), scratch.p, ds.p, dout.p, qkv.p, probabilities.p, false, B, T, NH, NKV,
                                 HS, 0);
        });
    }
    for (Way way : {TWO, THREE, TRAINER}) {
        if (way == TRAINER && !tensor_cores(way, HS)) continue;   // that was version 3
        const char* names[][2] = {{"forward, version 2: a query a thread", "backward, version 2"},
                                  {"forward, version 3: the trainer's plain one", "backward, version 3"},
                                  {"forward, version 4: the trainer's on tensor cores", "backward, version 4"}};
        t.row(names[way - TWO][0], flops, [&] { forward(way, out.p, lse.p, qkv.p, s); });
        t.row(names[way - TWO][1], 2.5 * flops,
              [&] { backward(way, dqkv.p, dbias.grad(), delta.p, scratch.p, dout.p, qkv.p, out.p, lse.p, false, s); });
    }
}

int main(int argc, char** argv) {
    if (argc == 8 && strcmp(argv[1], "--order") == 0) return print_order(argv + 2);
    Arguments o = parse_arguments(argc, argv, "attention: causal, flash attention by plain arithmetic and on tensor cores");
    if (o.bench) {
        bench_device();
        MatmulSession cublas;
        bench("GPT-2 124M", 64, 1024, 12, 12, 64);
        bench("GPT-2 1558M", 8, 1024, 25, 25, 64);
        bench("like Llama 3 8B", 4, 2048, 32, 8, 128);
        return 0;
    }
    auto refused = [](int NH, int NKV, int HS) {
        return [=] { attention_forward(nullptr, nullptr, nullptr, 1, 16, NH, NKV, HS, 0); };
    };
    auto refused_backward = [](int NH, int NKV, int HS) {
        return [=] {
            attention_backward(nullptr, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, false, 1, 16, NH, NKV, HS, 0);
        };
    };
    test_misuse(
        o,
        {{"12 channels", "a head has 12 channels: expected a multiple of 8, up to 128", refused(2, 2, 12)},
         {"136 channels", "a head has 136 channels: expected a multiple of 8, up to 128", refused(2, 2, 136)},
         {"0 channels", "a head has 0 channels: expected a multiple of 8, up to 128", refused(2, 2, 0)},
         {"6 heads on 4", "6 query heads, 4 key-value heads: expected a multiple", refused(6, 4, 64)},
         {"heads on none", "6 query heads, 0 key-value heads: expected a multiple", refused(6, 0, 64)},
         {"12 channels, backward", "a head has 12 channels: expected a multiple of 8, up to 128", refused_backward(2, 2, 12)},
         {"136 channels, backward", "a head has 136 channels: expected a multiple of 8, up to 128",
          refused_backward(2, 2, 136)},
         {"6 heads on 4, backward", "6 query heads, 4 key-value heads: expected a multiple", refused_backward(6, 4, 64)}});
    printf("attention, %s\n", dtype_name(FLOATX));
    test_random(o.seed, o.large || !on_cpu_backend());
    test_scores(o.seed);
    test_one_key(o.seed);
    test_nan(o.seed);
    test_infinity(o.seed);
    test_long(o.seed);
    test_far(o.seed);
    test_order(o.seed);
    if (kFP32) return finish(o);
    set_case("addresses");
    Property banks("tiles in shared memory: no bank conflicts");
    test_banks<64>(banks);
    test_banks<128>(banks);
    report({&banks});
    return finish(o);
}
