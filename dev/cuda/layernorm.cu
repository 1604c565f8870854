/*
LayerNorm with the residual addition before it, forward and backward, and the form in which a norm and the matmul after it share
one tensor (MS-LN): the trainer's kernels, tested, and simpler ones beside them to learn from. Sections 2 and 3 of train_gpt2.cu
have them under "norm", "column sums" and "norm, shared with its matmul".

    make dev/cuda/layernorm && ./dev/cuda/layernorm [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/layernorm.cu -lcublasLt -o layernorm

Forward: x = inp + add, where inp is the residual stream, add is what a matmul made for it, and x is the stream from here on.
Over the C channels of a row: z = (x - mean) * rstd, rstd = 1 / sqrt(variance + 1e-5), out = gamma * z + beta.

Backward: with dz = dout * gamma, the gradient that comes through the norm is rstd * (dz - mean(dz) - z * mean(dz * z)). Add the
one that comes around the norm, and the sum is the gradient of x, hence of inp, hence of add: a sum passes its gradient on to
both terms as it is. The matmul that made add has a bias, and its gradient dbias is the sum of that over the rows. dgamma is the
sum over the rows of dout * z, and dbeta is that of dout.

SHARED: out is z itself, and the matmul has gamma and beta folded into its weight and bias; part two of this file.

C is a multiple of 8, and forward needs a row in 48 KB of shared memory: 24576 channels in bf16, 12288 in fp32.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: one kernel per step, as the formulas are read. The sum, one element per thread; the mean, then the spread around
// it, one row per thread; the result, one element per thread. Bytes per element in bf16: 2 + 2 read and 2 written for the sum,
// 2 read for each of mean and spread, 2 read and 2 written for the result: 14, where 8 are needed. The kernels for mean and
// spread have 65536 threads for as many rows, a quarter of what a large GPU can hold. The 32 lanes of a warp stand in 32 rows:
// each load touches 32 lines to use 2 bytes of each, and caches have to hold those lines until the lanes have walked along
// them. And a row is added up one by one, with C roundings in a row.
__global__ void add_1_kernel(floatX* x, const floatX* inp, const floatX* add, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)inp[i] + (float)add[i]);
}
__global__ void mean_1_kernel(float* mean, const floatX* x, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0;
    for (int c = 0; c < C; c++) sum += (float)x[(size_t)row * C + c];
    mean[row] = sum / C;
}
__global__ void rstd_1_kernel(float* rstd, const floatX* x, const float* mean, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float square = 0;
    for (int c = 0; c < C; c++) {
        float away = (float)x[(size_t)row * C + c] - mean[row];
        square += away * away;
    }
    rstd[row] = rsqrtf(square / C + NORM_EPS);
}
__global__ void normalize_1_kernel(floatX* out, const floatX* x, const float* mean, const float* rstd, const floatX* gamma,
                                   const floatX* beta, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    int c = (int)(i % C);
    out[i] = (floatX)((float)gamma[c] * (((float)x[i] - mean[row]) * rstd[row]) + (float)beta[c]);
}
void layernorm_forward_1(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* add,
                         const floatX* gamma, const floatX* beta, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    add_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(residual, inp, add, n);
    mean_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(mean, residual, rows, C);
    rstd_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(rstd, residual, mean, rows, C);
    normalize_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, residual, mean, rstd, gamma, beta, n, C);
    cudaCheck(cudaGetLastError());
}

// Version 2 adds 8 elements per thread, 16 bytes per access, and has one kernel for the norm, one block per row. In that kernel
// neighbours read neighbours, and what is read three times is in the cache the second and the third time: 6 bytes for the sum
// and 4 for the norm. A sum over the block is a tree in shared memory, with half of the threads at the first step, one at the
// last, and a barrier after each step. That makes 20 barriers per row for its two sums, and at each of them 8 warps wait for
// the slowest: at C = 768 a thread has 3 elements to add and 20 times to wait. The addition is as good as an addition gets.
// What is wrong with it is that it is a kernel: its 6 bytes are more than the norm's own 4.
//
// Version 3, the trainer's layernorm_forward, gives a row to a warp. A warp's sum is five shuffles and no barrier. A lane takes
// 8 neighbours in one load of 16 bytes (in bf16), and what it will need again it leaves in shared memory, where no other lane
// looks. And it adds while it reads: it reads 2 + 2 bytes and writes x and out, 8 bytes in all. What it normalises is the x
// that it stores, rounded to bf16, and not the sum that it had in fp32: who computes the norm once more, from the x that was
// kept, gets the same bits. residual may be inp, and then the stream lies in one tensor for all layers. Or it is null, where
// nobody needs x any more: 6 bytes.
__global__ void add_2_kernel(floatX* x, const floatX* inp, const floatX* add, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats a = load(inp + i), b = load(add + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) a[k] += b[k];
    store(x + i, a);
}
__device__ float block_sum_2(float value, float (&shared)[256]) {   // the same bits in every thread
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    float sum = shared[0];
    __syncthreads();   // or the next sum would begin before everybody has read this one
    return sum;
}
__global__ void layernorm_forward_2_kernel(floatX* out, float* mean, float* rstd, const floatX* x, const floatX* gamma,
                                           const floatX* beta, int C) {
    __shared__ float shared[256];
    size_t base = (size_t)blockIdx.x * C;
    float sum = 0, square = 0;
    for (int c = threadIdx.x; c < C; c += 256) sum += (float)x[base + c];
    float mu = block_sum_2(sum, shared) / C;
    for (int c = threadIdx.x; c < C; c += 256) square += ((float)x[base + c] - mu) * ((float)x[base + c] - mu);
    float rs = rsqrtf(block_sum_2(square, shared) / C + NORM_EPS);
    for (int c = threadIdx.x; c < C; c += 256)
        out[base + c] = (floatX)((float)gamma[c] * (((float)x[base + c] - mu) * rs) + (float)beta[c]);
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = mu;
        rstd[blockIdx.x] = rs;
    }
}
void layernorm_forward_2(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* add,
                         const floatX* gamma, const floatX* beta, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    add_2_kernel<<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(residual, inp, add, n);
    layernorm_forward_2_kernel<<<rows, 256, 0, stream>>>(out, mean, rstd, residual, gamma, beta, C);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Version 1 does what the graph says, with one tensor per edge and one kernel per formula. The two means of a row, one row per
// thread: reads dout and x, 4 bytes. What comes through the norm, one element per thread: reads the same, writes a tensor, 6.
// The addition: reads this and the gradient that came around the norm, and writes one result for inp and an equal one for add,
// 8. Then the sums over rows, one column per thread: dgamma reads dout and x, dbeta dout, dbias what was written for add, 4 + 2
// + 2. Total: 26 bytes. What came through the norm has been rounded to bf16 before it is added, for nobody's benefit. Columns
// are read in whole lines, but C of them are 24 warps at C = 768, on a GPU that can hold thousands, and each thread adds 65536
// rows one by one.
__global__ void means_1_kernel(float* mean_dz, float* mean_dz_z, const floatX* dout, const floatX* x, const float* mean,
                               const float* rstd, const floatX* gamma, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0, sum_z = 0;
    for (int c = 0; c < C; c++) {
        size_t i = (size_t)row * C + c;
        float dz = (float)dout[i] * (float)gamma[c];
        sum += dz;
        sum_z += dz * (((float)x[i] - mean[row]) * rstd[row]);
    }
    mean_dz[row] = sum / C;
    mean_dz_z[row] = sum_z / C;
}
__global__ void through_1_kernel(floatX* through, const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                                 const float* mean_dz, const float* mean_dz_z, const floatX* gamma, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    float dz = (float)dout[i] * (float)gamma[i % C], z = ((float)x[i] - mean[row]) * rstd[row];
    through[i] = (floatX)(rstd[row] * (dz - mean_dz[row] - z * mean_dz_z[row]));
}
__global__ void split_1_kernel(floatX* dinp, floatX* dadd, const floatX* around, const floatX* through, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dinp[i] = dadd[i] = (floatX)((float)around[i] + (float)through[i]);
}
__global__ void dgamma_1_kernel(Grad dgamma, const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                                bool accumulate, int rows, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) {
        size_t i = (size_t)r * C + c;
        sum += (float)dout[i] * (((float)x[i] - mean[r]) * rstd[r]);
    }
    grad_store(dgamma, c, sum, accumulate);
}
__global__ void column_sum_1_kernel(Grad out, const floatX* inp, bool accumulate, int rows, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += (float)inp[(size_t)r * C + c];
    grad_store(out, c, sum, accumulate);
}
// through (rows, C) and means (2, rows) are scratch
void layernorm_backward_1(floatX* dinp, floatX* dadd, Grad dbias, Grad dgamma, Grad dbeta, floatX* through, float* means,
                          const floatX* around, const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                          const floatX* gamma, bool accumulate, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    means_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(means, means + rows, dout, x, mean, rstd, gamma, rows, C);
    through_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(through, dout, x, mean, rstd, means, means + rows, gamma, n, C);
    split_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dinp, dadd, around, through, n);
    dgamma_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dgamma, dout, x, mean, rstd, accumulate, rows, C);
    column_sum_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dbeta, dout, accumulate, rows, C);
    column_sum_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dbias, dadd, accumulate, rows, C);
    cudaCheck(cudaGetLastError());
}

// Version 2 has seen that the gradients around, for inp and for add are never needed at the same time with different values:
// they are one tensor, added to in place. It makes one pass for the sums along rows and one for those along columns. First one
// block per row, with the barriers of the forward pass; then the three column sums, with one block of 8 warps per 32 columns,
// whose warps take every eighth row. 4 elements and 3, 14 bytes, and two tensors less. 24 blocks of 8 warps at C = 768 are
// still fewer than there are multiprocessors, and a warp's load is 64 bytes, half a line. (More blocks could share a column and
// add to it with atomics, in an order that nobody knows: no two runs would be the same.) And dout and x come from memory twice,
// only because the two kinds of sums have different shapes.
//
// Version 3, the trainer's layernorm_backward, makes both kinds of one reading. A block goes down a slice of the rows, 8 at a
// time: first one warp per row, for the sums along it; then, after the one barrier, one thread per 8 columns, down the same 8
// rows, which lie in the cache by now (25 KB of dout and x at C = 768). A thread keeps its columns' sums in registers until the
// slice ends. 512 slices are a few blocks for each multiprocessor of a large GPU. A second kernel adds the slices in their
// order: 3 * 512 * C floats, which stay in the cache between the two. 4 elements, 8 bytes.
__global__ void layernorm_backward_2_rows_kernel(floatX* dresidual, const floatX* dout, const floatX* x, const float* mean,
                                                 const float* rstd, const floatX* gamma, bool accumulate, int C) {
    __shared__ float shared[256];
    size_t base = (size_t)blockIdx.x * C;
    float mu = mean[blockIdx.x], rs = rstd[blockIdx.x], sum = 0, sum_z = 0;
    for (int c = threadIdx.x; c < C; c += 256) {
        float dz = (float)dout[base + c] * (float)gamma[c];
        sum += dz;
        sum_z += dz * (((float)x[base + c] - mu) * rs);
    }
    sum = block_sum_2(sum, shared) / C;
    sum_z = block_sum_2(sum_z, shared) / C;
    for (int c = threadIdx.x; c < C; c += 256) {
        float dz = (float)dout[base + c] * (float)gamma[c], z = ((float)x[base + c] - mu) * rs;
        float dx = rs * (dz - sum - z * sum_z);
        dresidual[base + c] = (floatX)(accumulate ? (float)dresidual[base + c] + dx : dx);
    }
}
__global__ void layernorm_backward_2_columns_kernel(Grad dbias, Grad dgamma, Grad dbeta, const floatX* dresidual,
                                                    const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                                                    bool accumulate, int rows, int C) {
    __shared__ float shared[3][8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0, sum_d = 0, sum_d_z = 0;
    for (int r = warp; c < C && r < rows; r += 8) {
        size_t i = (size_t)r * C + c;
        float d = (float)dout[i];
        sum += (float)dresidual[i];
        sum_d += d;
        sum_d_z += d * (((float)x[i] - mean[r]) * rstd[r]);
    }
    shared[0][warp][lane] = sum;
    shared[1][warp][lane] = sum_d;
    shared[2][warp][lane] = sum_d_z;
    __syncthreads();
    if (warp >= 3 || c >= C) return;   // three warps finish, with one sum each
    float total = 0;
    for (int w = 0; w < 8; w++) total += shared[warp][w][lane];
    grad_store(warp == 0 ? dbias : warp == 1 ? dbeta : dgamma, c, total, accumulate);
}
void layernorm_backward_2(floatX* dresidual, Grad dbias, Grad dgamma, Grad dbeta, float*, const floatX* dout, const floatX* x,
                          const float* mean, const float* rstd, const floatX* gamma, bool accumulate_residual, bool accumulate,
                          int rows, int C, cudaStream_t stream) {
    layernorm_backward_2_rows_kernel<<<rows, 256, 0, stream>>>(dresidual, dout, x, mean, rstd, gamma, accumulate_residual, C);
    layernorm_backward_2_columns_kernel<<<ceil_div(C, 32), 256, 0, stream>>>(dbias, dgamma, dbeta, dresidual, dout, x, mean, rstd,
                                                                             accumulate, rows, C);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision

constexpr double EPSILON = 1e-5;   // GPT-2's, not taken from the trainer

struct NormRow {
    double mean = 0, rstd, size = 0;   // size: the mean of |x|, which the mean's roundings are relative to
    Doubles z;
    NormRow(const double* x, int C) : z(C) {
        double var = 0;
        for (int c = 0; c < C; c++) mean += x[c] / C, size += fabs(x[c]) / C;
        for (int c = 0; c < C; c++) var += (x[c] - mean) * (x[c] - mean) / C;
        rstd = 1 / sqrt(var + EPSILON);
        for (int c = 0; c < C; c++) z[c] = (x[c] - mean) * rstd;
    }
};

// What comes through the norm in backward, for a row; and the sum of the absolute values of all that it is made of.
struct NormRowGradient {
    Doubles dx, terms;
    NormRowGradient(const Doubles& dz, const Doubles& z, double rstd) : dx(dz.size()), terms(dz.size()) {
        const size_t C = dz.size();
        double mean = 0, mean_z = 0, size = 0, size_z = 0;
        for (size_t c = 0; c < C; c++) {
            mean += dz[c] / C, size += fabs(dz[c]) / C;
            mean_z += dz[c] * z[c] / C, size_z += fabs(dz[c] * z[c]) / C;
        }
        for (size_t c = 0; c < C; c++) {
            dx[c] = rstd * (dz[c] - mean - z[c] * mean_z);
            terms[c] = rstd * (fabs(dz[c]) + size + fabs(z[c]) * size_z);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// tests

enum RowKind { PLAIN, OFFSET, EQUAL, ROW_KINDS };
const char* const KIND_NAMES[] = {"around 2", "around 1e4", "equal values"};

struct Problem {
    int rows, C;
    size_t n;
    std::vector<floatX> inp, add, gamma, beta, dout, around;
    Problem(uint64_t seed, int rows, int C, RowKind kind) : rows(rows), C(C), n((size_t)rows * C) {
        Random random(seed, ((uint64_t)rows << 32) + C * 10 + kind);
        inp = random.normals(n, kind == OFFSET ? 1e4f : 2, kind == OFFSET && !kFP32 ? 200 : 1);
        add = random.normals(n);
        for (size_t i = 0; kind == EQUAL && i < n; i++) inp[i] = inp[i / C * C], add[i] = add[i / C * C];
        gamma = random.normals(C, 1, 0.5f);
        for (int c = 1; c < C; c += 5) gamma[c] = (floatX)0.0f;
        for (int c = 2; c < C; c += 7) gamma[c] = (floatX)-1.25f;
        beta = random.normals(C, 0.25f, 0.5f);
        dout = random.normals(n);
        around = random.normals(n);
    }
    std::vector<floatX> sum() const {
        std::vector<floatX> x(n);
        for (size_t i = 0; i < n; i++) x[i] = (floatX)((float)inp[i] + (float)add[i]);
        return x;
    }
};

// Channels around what a lane, a warp, and a block of the backward kernel take (8, 256, 4096); rows around the 4 of a block of
// the forward kernel, around the 8 that a block of the backward kernel takes at a time, and slices of 16 and 17 rows; 18 and
// 512 slices, which 2 and 32 warps add up. Then channels of which 4, 3, 2 rows and 1 just fit forward's block, and some that
// just do not.
struct Shape { int rows, C; };
std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (int C : {8, 24, 136, 256, 264, 1000})
        for (int rows : {1, 3, 8, 9, 65}) all.push_back({rows, C});
    for (Shape s : {Shape{301, 24}, {301, 264}, {8195, 8}, {17, 4096}, {17, 4104}}) all.push_back(s);
    const int most = (int)(48 * 1024 / sizeof(floatX));
    for (int C : {most / 4, most / 4 + 8, most / 3 / 8 * 8 + 8, most / 2, most / 2 + 8, most}) all.push_back({5, C});
    return all;
}
bool is_long(const Shape& s) { return s.rows * s.C > 20000; }   // there a part of the test is enough, to save time
bool leaves_out(const Shape& s, int version) { return version == 2 && s.rows > 65; }   // barriers take long on the CPU backend
// close() allows twice what storing costs; a gradient in bf16 that was cut, and not rounded, would be within that.
double store_of(DType type) { return type == F32 ? EPS32 : EPS16 / 2; }
// Where n terms are added one by one, and not by lanes and slices, roundings may all go the same way.
double one_by_one(int version, int n) { return version == 1 ? 1 + n / 32.0 : 1; }
constexpr double STORED = 2 * EPSX / (32 * EPS32);   // what storing on the way costs, as a multiple of close()'s terms

// Where x and out are put. The trainer calls it with x in inp, and with out in add.
enum Place { APART, IN_INP, IN_ADD, DROPPED };
struct Way { const char* name; Place x, out; bool twice; };
const Way ways[] = {{"x and out apart", APART, APART, false},          {"x dropped", DROPPED, APART, false},
                    {"x in inp", IN_INP, APART, false},                {"x in add", IN_ADD, APART, false},
                    {"out in add", APART, IN_ADD, false},              {"x in inp, out in add", IN_INP, IN_ADD, false},
                    {"x dropped, out in add", DROPPED, IN_ADD, false}, {"x = inp + inp, in inp", IN_INP, APART, true}};
enum { ALL_APART, X_DROPPED };
using Layer = decltype(layernorm_forward_1);

struct Forward {
    std::vector<floatX> x, out;      // x: empty if dropped
    std::vector<float> mean, rstd;   // mean: empty if SHARED
    bool operator==(const Forward& f) const {
        return (x.empty() || f.x.empty() || same_bits(x, f.x)) && same_bits(out, f.out) && same_bits(mean, f.mean) &&
               same_bits(rstd, f.rstd);
    }
};
// only_read: where inp or add shares a tensor with nothing that is written, it has to be as before.
template <bool SHARED>
Forward forward(const Problem& p, const Way& way, bool with_add, Property& only_read, Layer* layer = layernorm_forward<SHARED>) {
    Buffer<floatX> inp(p.inp), add(p.add), gamma(p.gamma), beta(p.beta), x(p.n), out(p.n);
    Buffer<float> mean(p.rows), rstd(p.rows);
    Buffer<floatX>* x_at = way.x == IN_INP ? &inp : way.x == IN_ADD ? &add : &x;
    Buffer<floatX>* out_at = way.out == IN_ADD ? &add : &out;
    layer(way.x == DROPPED ? nullptr : x_at->p, out_at->p, SHARED ? nullptr : mean.p, rstd.p, inp.p,
          !with_add ? nullptr : way.twice ? inp.p : add.p, SHARED ? nullptr : gamma.p, SHARED ? nullptr : beta.p, p.rows, p.C, 0);
    only_read.is(way.x == IN_INP || same_bits(inp.read(), p.inp), "inp has changed");
    only_read.is(way.x == IN_ADD || way.out == IN_ADD || same_bits(add.read(), p.add), "add has changed");
    return {way.x == DROPPED ? std::vector<floatX>() : x_at->read(), out_at->read(),
            SHARED ? std::vector<float>() : mean.read(), rstd.read()};
}

// x is exact. An error of the mean shifts all z alike, and adds its square to the variance.
template <bool SHARED>
void test_forward(uint64_t seed) {
    Property x_is("x = inp + add, or inp where there is no add", "every bit"),
        out[ROW_KINDS] = {{SHARED ? "z" : "out"}, {"the same of rows around 1e4", "in fp32 most of it is the mean's"},
                          {"the same of rows of equal values", "z is 0 but for the mean's roundings, times 316"}},
        stats("mean and rstd"), same("the same bits again, in place, with out in add, with x dropped"),
        once_more("the same bits where the norm is computed once more, from the x that was kept"),
        only_read("what is only read has not changed"), simple("versions 1 and 2: x, out, mean, rstd");
    for (Shape shape : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            const auto [rows, C] = shape;
            if (is_long(shape) && kind != PLAIN) continue;
            const Problem p(seed, rows, C, kind);
            for (bool with_add : {true, false}) {
                const std::vector<floatX> x = with_add ? p.sum() : p.inp;
                const Doubles wide = doubles(x);
                Forward first;
                for (int version : {3, 2, 1}) {   // 3: the trainer's
                    if (version < 3 && (SHARED || !with_add || leaves_out(shape, version))) continue;
                    const char* of = with_add ? "inp + add" : "inp";
                    set_case("C %d, rows %d, %s, %s, version %d", C, rows, KIND_NAMES[kind], of, version);
                    const Forward f = forward<SHARED>(p, ways[ALL_APART], with_add, only_read,
                                                      version == 1   ? layernorm_forward_1
                                                      : version == 2 ? layernorm_forward_2
                                                                     : layernorm_forward<SHARED>);
                    if (version == 3) first = f;
                    for (size_t i = 0; i < p.n; i++) (version < 3 ? simple : x_is).equal(i, (float)f.x[i], (float)x[i]);
                    const double deep = one_by_one(version, C);
                    for (int r = 0; r < rows; r++) {
                        const NormRow ref(&wide[(size_t)r * C], C);
                        const double shift = deep * ref.size * ref.rstd, square = 32 * EPS32 * shift * shift;
                        Property& s = version < 3 ? simple : stats;
                        if (!SHARED) s.close(r, f.mean[r], ref.mean, deep * ref.size, EPS32);
                        s.close(r, f.rstd[r], ref.rstd, ref.rstd * (deep + square), EPS32);
                        for (int c = 0; c < C; c++) {
                            const double g = SHARED ? 1 : (float)p.gamma[c], b = SHARED ? 0 : (float)p.beta[c];
                            (version < 3 ? simple : out[kind])
                                .close(c, (float)f.out[(size_t)r * C + c], g * ref.z[c] + b,
                                       fabs(g) * (shift + fabs(ref.z[c]) * deep) + fabs(b));
                        }
                    }
                }
                Problem kept = p;
                kept.inp = x;
                once_more.is(first == forward<SHARED>(kept, ways[X_DROPPED], false, only_read), "other bits");
                if (is_long(shape) && C < 4000) continue;
                for (const Way& way : ways) {
                    if (kind != PLAIN || (!with_add && (way.x == IN_ADD || way.out == IN_ADD || way.twice))) continue;
                    set_case("C %d, rows %d, %s, %s", C, rows, with_add ? "inp + add" : "inp", way.name);
                    Problem twice = p;
                    twice.add = p.inp;
                    same.is(forward<SHARED>(p, way, with_add, only_read) ==
                                (way.twice ? forward<SHARED>(twice, ways[ALL_APART], true, only_read) : first),
                            "other bits");
                }
            }
        }
    printf("forward, %s\n", SHARED ? "shared" : "exact");
    report({&x_is, &out[PLAIN], &out[OFFSET], &out[EQUAL], &stats, &same, &once_more, &only_read});
    if (!SHARED) report({&simple});
}

struct Kept {   // of forward, for backward
    std::vector<floatX> kept;   // x; SHARED: z
    std::vector<float> mean, rstd;
};
struct Backward {
    std::vector<floatX> dx;
    std::vector<float> sums[3];   // dbias, dbeta, dgamma; SHARED: the first alone
    bool operator==(const Backward& b) const {
        return same_bits(dx, b.dx) && std::equal(sums, sums + 3, b.sums, same_bits<float>);
    }
};
// version 3: the trainer's; 4: without dbias. around: whether the stream has a gradient there already, or NaN, and is written.
// before: what the sums are added to.
template <bool SHARED>
Backward backward(const Problem& p, const Kept& k, int version, bool around, DType type, const std::vector<float>* before,
                  Property& only_read) {
    const int rows = p.rows, C = p.C;
    const bool accumulate = before != nullptr;
    Buffer<floatX> dout(p.dout), kept(k.kept), gamma(p.gamma), dx(p.n);
    Buffer<float> mean(k.mean), rstd(k.rstd), scratch((size_t)(SHARED ? 1 : 3) * norm_slices(rows) * C);   // no more than is used
    GradBuffer dbias(C, type), dbeta(C, type), dgamma(C, type);
    if (accumulate) dbias.write(before[0]), dbeta.write(before[1]), dgamma.write(before[2]);
    if (around) dx.write(p.around);
    Backward b;
    if (version == 1) {
        Buffer<floatX> dinp(p.n), dadd(p.n), through(p.n);
        Buffer<float> means((size_t)2 * rows);
        layernorm_backward_1(dinp.p, dadd.p, dbias.grad(), dgamma.grad(), dbeta.grad(), through.p, means.p, dx.p, dout.p, kept.p,
                             mean.p, rstd.p, gamma.p, accumulate, rows, C, 0);
        b.dx = dinp.read();
        only_read.is(same_bits(b.dx, dadd.read()) && same_bits(dx.read(), p.around), "dadd is not dinp, or around has changed");
    } else {
        (version == 2 ? layernorm_backward_2 : layernorm_backward<SHARED>)(
            dx.p, version == 4 ? Grad{} : dbias.grad(), SHARED ? Grad{} : dgamma.grad(), SHARED ? Grad{} : dbeta.grad(), scratch.p,
            dout.p, kept.p, SHARED ? nullptr : mean.p, rstd.p, gamma.p, around, accumulate, rows, C, 0);
        b.dx = dx.read();
    }
    b.sums[0] = dbias.read();
    if (!SHARED) b.sums[1] = dbeta.read(), b.sums[2] = dgamma.read();
    only_read.is(same_bits(dout.read(), p.dout) && same_bits(kept.read(), k.kept), "dout or what was kept has changed");
    return b;
}

// All versions get the same mean and rstd, the reference's in fp32, and have to make of them what the formulas say.
template <bool SHARED>
void test_backward(uint64_t seed) {
    Property dx[ROW_KINDS] = {{"dx"}, {"dx of rows around 1e4"}, {"dx of rows of equal values"}},
        sums32(SHARED ? "dbias in fp32" : "dbias, dbeta and dgamma in fp32"), sums16("the same in bf16"),
        again("the same bits in a second run"), unwanted("the same bits of the rest where dbias is not wanted"),
        only_read("what is only read has not changed"), simple("versions 1 and 2: dx, dbias, dbeta, dgamma");
    for (Shape shape : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            const auto [rows, C] = shape;
            if (is_long(shape) && kind != PLAIN) continue;
            const Problem p(seed, rows, C, kind);
            Kept k = {p.sum(), {}, {}};
            std::vector<NormRowGradient> ref;
            std::vector<Doubles> z;
            for (int r = 0; r < rows; r++) {
                floatX* x = &k.kept[(size_t)r * C];
                const NormRow row(doubles(std::vector<floatX>(x, x + C)).data(), C);
                k.mean.push_back((float)row.mean), k.rstd.push_back((float)row.rstd);
                Doubles dz(C), zr(C);
                for (int c = 0; c < C; c++) {
                    if (SHARED) x[c] = (floatX)(((float)x[c] - k.mean[r]) * k.rstd[r]);
                    zr[c] = SHARED ? (float)x[c] : ((double)(float)x[c] - k.mean[r]) * k.rstd[r];
                    dz[c] = (double)(float)p.dout[(size_t)r * C + c] * (float)p.gamma[c];
                }
                ref.emplace_back(dz, zr, k.rstd[r]);
                z.push_back(zr);
            }
            std::vector<float> before[3];   // as bf16 can hold them
            Random random(seed, 5);
            for (auto& v : before)
                for (int c = 0; c < C; c++) v.push_back((float)(__nv_bfloat16)(10 * random.normal()));
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    const bool around = accumulate == (type == F32);   // both kinds of dx with both kinds of gradients
                    if (!around && (is_long(shape) || kind != PLAIN)) continue;
                    Backward first;
                    for (int version : {3, 0, 4, 2, 1}) {   // 3, 0 and 4 are the trainer's
                        const bool is_simple = version == 1 || version == 2;
                        if (is_simple && (SHARED || leaves_out(shape, version) || (version == 1 && !around))) continue;
                        set_case("C %d, rows %d, %s, %s gradients %s, dx %s, version %d", C, rows, KIND_NAMES[kind],
                                 dtype_name(type), accumulate ? "added to" : "written", around ? "added" : "written", version);
                        Backward b = backward<SHARED>(p, k, version, around, type, accumulate ? before : nullptr, only_read);
                        if (version == 3) first = b;
                        if (version == 0) again.is(b == first, "other bits");
                        if (version == 4) {
                            for (int c = 0; c < C; c++) unwanted.equal(c, b.sums[0][c], accumulate ? before[0][c] : NAN);
                            b.sums[0] = first.sums[0];
                            unwanted.is(b == first, "other bits");
                        }
                        if (version == 0 || version == 4) continue;
                        const double deep = one_by_one(version, C), deep_columns = one_by_one(version, rows);
                        Doubles sum[3] = {Doubles(C, 0), Doubles(C, 0), Doubles(C, 0)}, terms[3] = {sum[0], sum[0], sum[0]};
                        for (int r = 0; r < rows; r++)
                            for (int c = 0; c < C; c++) {
                                const size_t i = (size_t)r * C + c;
                                const double was = around ? (float)p.around[i] : 0, d = (float)p.dout[i];
                                const double expected = was + ref[r].dx[c], size = fabs(was) + ref[r].terms[c] * deep;
                                // version 1 stores what comes through the norm before it adds it
                                (is_simple ? simple : dx[kind])
                                    .close(i, (float)b.dx[i], expected, size + (version == 1) * STORED * fabs(ref[r].dx[c]));
                                sum[0][c] += expected, terms[0][c] += size;
                                sum[1][c] += d, terms[1][c] += fabs(d);
                                sum[2][c] += d * z[r][c], terms[2][c] += fabs(d * z[r][c]);
                            }
                        for (int i = 0; i < (SHARED ? 1 : 3); i++)
                            for (int c = 0; c < C; c++) {
                                const double was = accumulate ? before[i][c] : 0;
                                const double size = fabs(was) + terms[i][c] * (deep_columns + (is_simple && i == 0) * STORED);
                                (is_simple ? simple : type == F32 ? sums32 : sums16)
                                    .close(c, b.sums[i][c], sum[i][c] + was, size, store_of(type));
                            }
                    }
                }
        }
    printf("backward, %s\n", SHARED ? "shared" : "exact");
    report({&dx[PLAIN], &dx[OFFSET], &dx[EQUAL], &sums32, &sums16, &again, &unwanted, &only_read});
    if (!SHARED) report({&simple});
}

// Where a NaN or an infinity must go: nowhere, into its element, its row, its column, everything. For check_reach.
enum Where { NO, ONE, ROW, COLUMN, ALL };
auto reach(Where where, int row, int column, int columns) {
    return [=](size_t i) {
        const bool in_row = (int)i / columns == row, in_column = (int)i % columns == column;
        return where == ALL || (where == ROW ? in_row : where == COLUMN ? in_column : where == ONE && in_row && in_column);
    };
}
template <bool SHARED>
void test_special(uint64_t seed) {
    Property p("a NaN or an infinity in any input reaches what it is part of, and only that"),
        only_read("what is only read has not changed");
    const int rows = 131, C = 264, r = 66, c = 257;
    const size_t at = (size_t)r * C + c;
    Problem clean(seed, rows, C, PLAIN);
    clean.gamma[c] = (floatX)0.75f;
    struct Run { Forward f; Backward b; };
    auto run = [&](const Problem& q) {
        Run a = {forward<SHARED>(q, ways[ALL_APART], true, only_read), {}};
        a.b = backward<SHARED>(q, {SHARED ? a.f.out : a.f.x, a.f.mean, a.f.rstd}, 3, true, F32, nullptr, only_read);
        return a;
    };
    const Run before = run(clean);
    struct Case { const char* name; std::vector<floatX> Problem::*in; size_t at; Where x, out, stats, dx, dbias, dbeta, dgamma; };
    for (float odd : {NAN, -INFINITY})
        for (const Case& k : {Case{"inp", &Problem::inp, at, ONE, ROW, ONE, ROW, ALL, NO, ALL},
                              {"add", &Problem::add, at, ONE, ROW, ONE, ROW, ALL, NO, ALL},
                              {"gamma", &Problem::gamma, c, NO, SHARED ? NO : COLUMN, NO, ALL, ALL, NO, NO},
                              {"beta", &Problem::beta, c, NO, SHARED ? NO : COLUMN, NO, NO, NO, NO, NO},
                              {"dout", &Problem::dout, at, NO, NO, NO, ROW, ALL, ONE, ONE},
                              {"around", &Problem::around, at, NO, NO, NO, ONE, ONE, NO, NO}}) {
            set_case("%f in %s", odd, k.name);
            Problem q = clean;
            (q.*k.in)[k.at] = (floatX)odd;
            const Run a = run(q);
            check_reach(p, a.f.x, before.f.x, reach(k.x, r, c, C), "x");
            check_reach(p, a.f.out, before.f.out, reach(k.out, r, c, C), "out");
            check_reach(p, a.f.mean, before.f.mean, reach(k.stats, r, 0, 1), "mean");
            check_reach(p, a.f.rstd, before.f.rstd, reach(k.stats, r, 0, 1), "rstd");
            check_reach(p, a.b.dx, before.b.dx, reach(k.dx, r, c, C), "dx");
            const Where sums[] = {k.dbias, k.dbeta, k.dgamma};
            for (int i = 0; i < 3; i++) check_reach(p, a.b.sums[i], before.b.sums[i], reach(sums[i], 0, c, C), "a sum");
        }
    printf("special values, %s\n", SHARED ? "shared" : "exact");
    report({&p, &only_read});
}

// Index arithmetic beyond 2^31 elements, in place as the trainer calls it, in the first and the last block. The trainer's
// backward has 512 blocks at most, each with a long way to go; here it has one block per row, so that the partial sums are
// beyond 2^31 too.
template <bool SHARED>
void test_far(uint64_t seed) {
    constexpr int C = 520, rows = (1 << 22) + 5, NEAR = 4, threads = (C + 32 * VEC - 1) / (32 * VEC) * 32;
    constexpr size_t n = (size_t)rows * C;
    static_assert(n > (size_t)1 << 31, "");
    Property forth("forward in place, out in add, beyond 2^31 elements, first and last block", "every bit"),
        back("backward in place beyond 2^31 elements, first and last block", "every bit");
    set_case("%d rows of %d, %s", rows, C, SHARED ? "shared" : "exact");
    const Problem p(seed, NEAR, C, PLAIN);
    Buffer<floatX> gamma(p.gamma), beta(p.beta);
    Far<floatX> x(n, p.inp, C, C), y(n, p.add, C, C);   // forward: inp and x, add and out; backward: dresidual, dout and kept
    Far<float> mean(rows, std::vector<float>(NEAR, 0.25f), 1, 1), rstd(rows, std::vector<float>(NEAR, 0.75f), 1, 1);
    Far<float> partial((SHARED ? 1 : 3) * n, (size_t)(SHARED ? 1 : 3) * NEAR * C, C, C, SHARED ? 1 : 3, n);
    auto move = [&](int row, int seen) {
        x.at = y.at = partial.at = (size_t)row * C, mean.at = rstd.at = row;
        x.rows = y.rows = partial.rows = mean.rows = rstd.rows = seen;
    };
    for (int row : {0, (rows - 1) / NEAR * NEAR}) {   // 4 rows per block
        move(row, std::min(rows - row, NEAR));
        check_far(forth, {&x, &y, &mean, &rstd}, {row / NEAR}, [&](bool far) {
            layernorm_forward<SHARED>(x.p(far), y.p(far), mean.p(far), rstd.p(far), x.p(far), y.p(far), gamma.p, beta.p,
                                      far ? rows : NEAR, C, 0);
        });
    }
    for (int row : {0, rows - 1}) {
        move(row, 1);
        check_far(back, {&x, &y, &mean, &rstd, &partial}, {row}, [&](bool far) {
            const int blocks = far ? rows : NEAR;
            layernorm_backward_kernel<SHARED><<<blocks, threads>>>(x.p(far), partial.p(far), y.p(far), y.p(far), mean.p(far),
                                                                   rstd.p(far), gamma.p, true, blocks, C);
            cudaCheck(cudaGetLastError());
        });
    }
    report({&forth, &back});
}

// ---------------------------------------------------------------------------------------------------------------------
// part two: a norm and its matmul that share one tensor
//
// y = (gamma * z + beta) W^T + b. Forward folds gamma and beta into W and b, and keeps z and rstd alone. Backward gathers G =
// dy^T z where dW will be. Once a step the unfolding makes dgamma, dbeta and dW of G, W and db. The norm's backward has fewer
// sums to make then: what gamma and beta need is in G already, which the matmul of the weight's gradient had to compute anyway,
// and G and W have a twentieth of the activation's elements at 124M and B = 64. It moves as many bytes as the exact one, and
// reads z where that reads x: two tensors have become one.

// Version 1: one pass for each result. Folding reads W for W' = W * gamma, and again for b' = b + W beta, with one row per
// thread: the lanes of a warp are C elements apart from one another. That is 3 elements of the weight, where reading once and
// writing once is 2.
__global__ void fold_1_weight_kernel(floatX* folded, const floatX* weight, const floatX* gamma, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) folded[i] = (floatX)((float)weight[i] * (float)gamma[i % C]);
}
__global__ void fold_1_bias_kernel(floatX* folded_bias, const floatX* weight, const floatX* bias, const floatX* beta, int OC,
                                   int C) {
    int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= OC) return;
    float sum = 0;
    for (int c = 0; c < C; c++) sum += (float)weight[(size_t)o * C + c] * (float)beta[c];
    folded_bias[o] = (floatX)((float)bias[o] + sum);
}
void norm_fold_1(floatX* folded, floatX* folded_bias, const floatX* weight, const floatX* bias, const floatX* gamma,
                 const floatX* beta, int OC, int C, cudaStream_t stream) {
    size_t n = (size_t)OC * C;
    fold_1_weight_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(folded, weight, gamma, n, C);
    fold_1_bias_kernel<<<ceil_div(OC, 128), 128, 0, stream>>>(folded_bias, weight, bias, beta, OC, C);
    cudaCheck(cudaGetLastError());
}
// Unfolding reads G and W for dgamma, W for dbeta, and G again to write dW in its place; dgamma has to come first, or G is
// gone. With G in fp32: 4 + 2, 2, and 4 + 4 bytes. The trainer's norm_fold and norm_unfold read once for all of their results:
// 4 bytes and 10.
__global__ void unfold_1_columns_kernel(Grad dgamma, Grad dbeta, Grad dweight, Grad dbias, const floatX* weight, int OC, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int o = 0; o < OC; o++) sum += grad_load(dweight, (size_t)o * C + c) * (float)weight[(size_t)o * C + c];
    grad_store(dgamma, c, sum, false);
    sum = 0;
    for (int o = 0; o < OC; o++) sum += (float)weight[(size_t)o * C + c] * grad_load(dbias, o);
    grad_store(dbeta, c, sum, false);
}
__global__ void unfold_1_weight_kernel(Grad dweight, Grad dbias, const floatX* gamma, const floatX* beta, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    grad_store(dweight, i, grad_load(dweight, i) * (float)gamma[i % C] + grad_load(dbias, i / C) * (float)beta[i % C], false);
}
void norm_unfold_1(Grad dweight, Grad dgamma, Grad dbeta, Grad dbias, const floatX* weight, const floatX* gamma,
                   const floatX* beta, int OC, int C, cudaStream_t stream) {
    size_t n = (size_t)OC * C;
    unfold_1_columns_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dgamma, dbeta, dweight, dbias, weight, OC, C);
    unfold_1_weight_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dweight, dbias, gamma, beta, n, C);
    cudaCheck(cudaGetLastError());
}

// A norm and its matmul, over several micro-batches whose rows stand one after the other.
struct Linear : Problem {
    int OC;
    std::vector<floatX> weight, bias, dy;
    Linear(uint64_t seed, int rows, int C, int OC) : Problem(seed, rows, C, PLAIN), OC(OC) {
        Random random(seed, ((uint64_t)rows << 32) + C * 1000 + OC);
        weight = random.normals((size_t)OC * C, 0, 1 / sqrtf(C));
        bias = random.normals(OC);
        dy = random.normals((size_t)rows * OC);
    }
};

// Folding and unfolding by themselves. OC is a multiple of 8 in a model, because matmuls need it so; folding and unfolding do
// not care, and with other numbers the last block has warps without a row.
void test_fold(uint64_t seed) {
    Property weight("W'", "every bit"), bias("b'"), unfolded("unfolding: dW"), sums("unfolding: dgamma and dbeta"),
        again("unfolding: the same bits in a second run"), simple("version 1: W', b', dW, dgamma, dbeta");
    std::vector<Shape> shapes = {{1101, 24}};   // 17 slices, which two warps add up
    for (int C : {8, 24, 136, 264, 1000})
        for (int OC : {1, 7, 13, 40, 264}) shapes.push_back({OC, C});
    for (auto [OC, C] : shapes) {
        const Linear p(seed, 1, C, OC);
        const Doubles w = doubles(p.weight), gamma = doubles(p.gamma), beta = doubles(p.beta);
        Buffer<floatX> W(p.weight), b(p.bias), bgamma(p.gamma), bbeta(p.beta);
        for (int version : {2, 1}) {   // 2: the trainer's
            set_case("C %d, OC %d, folding, version %d", C, OC, version);
            Buffer<floatX> folded((size_t)OC * C), folded_bias(OC);
            (version == 1 ? norm_fold_1 : norm_fold)(folded.p, folded_bias.p, W.p, b.p, bgamma.p, bbeta.p, OC, C, 0);
            const std::vector<floatX> got = folded.read(), got_bias = folded_bias.read();
            for (int o = 0; o < OC; o++) {
                double sum = (float)p.bias[o], terms = fabs(sum);
                for (int c = 0; c < C; c++) {
                    const size_t i = (size_t)o * C + c;
                    const floatX product = (floatX)((float)p.weight[i] * (float)p.gamma[c]);
                    (version == 1 ? simple : weight).equal(i, (float)got[i], (float)product);
                    sum += w[i] * beta[c], terms += fabs(w[i] * beta[c]);
                }
                (version == 1 ? simple : bias).close(o, (float)got_bias[o], sum, terms);
            }
        }
        const size_t n = (size_t)OC * C;
        for (DType type : {F32, BF16}) {
            GradBuffer dW(n, type), dbias(OC, type);
            dW.write(floats(Random(seed, 77).normals(n)));
            dbias.write(floats(p.bias));
            const std::vector<float> G = dW.read(), db = dbias.read();
            Doubles sum(n + 2 * C, 0), terms = sum;   // of dW, dgamma and dbeta, one after the other
            for (size_t i = 0; i < n; i++) {
                const size_t c = i % C;
                auto add = [&](size_t to, double x) { sum[to] += x, terms[to] += fabs(x); };
                add(i, G[i] * gamma[c]);
                add(i, db[i / C] * beta[c]);
                add(n + c, G[i] * w[i]);
                add(n + C + c, db[i / C] * w[i]);
            }
            std::vector<float> first;
            for (int version : {2, 3, 1}) {   // 2 and 3 are the trainer's
                set_case("C %d, OC %d, %s, unfolding, version %d", C, OC, dtype_name(type), version);
                GradBuffer dgamma(C, type), dbeta(C, type);
                Buffer<float> scratch((size_t)2 * colsum_slices(OC) * C);   // no more than is used
                const Grad dg = dgamma.grad(), de = dbeta.grad();
                dW.write(G);
                if (version == 1) norm_unfold_1(dW.grad(), dg, de, dbias.grad(), W.p, bgamma.p, bbeta.p, OC, C, 0);
                else norm_unfold(dW.grad(), dg, de, scratch.p, dbias.grad(), W.p, bgamma.p, bbeta.p, OC, C, 0);
                std::vector<float> got = dW.read();
                for (const GradBuffer* b : {&dgamma, &dbeta})
                    for (float x : b->read()) got.push_back(x);
                if (version == 2) first = got;
                if (version == 3) again.is(same_bits(got, first), "other bits");
                for (size_t i = 0; i < got.size(); i++)
                    (version == 1 ? simple : i < n ? unfolded : sums).close(i, got[i], sum[i], terms[i], store_of(type));
            }
        }
    }
    printf("folding and unfolding\n");
    report({&weight, &bias, &unfolded, &sums, &again, &simple});
}

// The whole of it against LayerNorm and Linear as everybody writes them.
enum { Y, DX, DGAMMA, DBETA, DWEIGHT, DBIAS, RESULTS };
const char* const RESULT_NAMES[] = {"y", "dx", "dgamma", "dbeta", "dW", "db"};
using Results = std::vector<Doubles>;

Results reference(const Linear& p) {
    const int C = p.C, OC = p.OC;
    const Doubles gamma = doubles(p.gamma), beta = doubles(p.beta), W = doubles(p.weight), b = doubles(p.bias);
    const Doubles dy = doubles(p.dy), x = doubles(p.inp);
    Results ref = {Doubles(dy.size()), doubles(p.around), Doubles(C), Doubles(C), Doubles(W.size()), Doubles(OC)};
    for (int r = 0; r < p.rows; r++) {
        const NormRow norm(&x[(size_t)r * C], C);
        Doubles ln(C), dln(C), dz(C);
        for (int c = 0; c < C; c++) ln[c] = gamma[c] * norm.z[c] + beta[c];
        for (int o = 0; o < OC; o++) {
            const double d = dy[(size_t)r * OC + o];
            double sum = b[o];
            for (int c = 0; c < C; c++) {
                sum += W[(size_t)o * C + c] * ln[c];
                dln[c] += d * W[(size_t)o * C + c];
                ref[DWEIGHT][(size_t)o * C + c] += d * ln[c];
            }
            ref[Y][(size_t)r * OC + o] = sum;
            ref[DBIAS][o] += d;
        }
        for (int c = 0; c < C; c++) {
            ref[DGAMMA][c] += dln[c] * norm.z[c];
            ref[DBETA][c] += dln[c];
            dz[c] = dln[c] * gamma[c];
        }
        const NormRowGradient through(dz, norm.z, norm.rstd);
        for (int c = 0; c < C; c++) ref[DX][(size_t)r * C + c] += through.dx[c];
    }
    return ref;
}

// The trainer's layers, called in the trainer's order.
Results compute(const Linear& p, int micro_batches, DType type, bool unfold_each = false) {
    const int rows = p.rows / micro_batches, C = p.C, OC = p.OC;
    Buffer<floatX> gamma(p.gamma), beta(p.beta), weight(p.weight), bias(p.bias), folded(p.weight.size()), folded_bias(OC);
    Buffer<floatX> x(p.inp), z(p.n), y(p.dy.size()), dy(p.dy), dln(p.n), dx(p.around);
    Buffer<float> rstd(p.rows), scratch(std::max(colsum_scratch(C), (size_t)COLSUM_SLICES * OC));
    GradBuffer dweight(p.weight.size(), type), dbias(OC, type), dgamma(C, type), dbeta(C, type);
    for (int m = 0; m < micro_batches; m++) {
        const size_t at = (size_t)m * rows * C, at_y = (size_t)m * rows * OC;
        float* rs = rstd.p + m * rows;
        const Grad dW = dweight.grad(), db = dbias.grad();
        layernorm_forward<true>(nullptr, z.p + at, nullptr, rs, x.p + at, nullptr, nullptr, nullptr, rows, C, 0);
        norm_fold(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0);
        matmul_forward(y.p + at_y, z.p + at, folded.p, folded_bias.p, rows, C, OC, 0);
        bias_backward(db, scratch.p, dy.p + at_y, m > 0, rows, OC, 0);
        matmul_backward_weight(dW, dy.p + at_y, z.p + at, m > 0, rows, C, OC, 0);
        matmul_backward_input(dln.p + at, dy.p + at_y, weight.p, rows, C, OC, 0);
        layernorm_backward<true>(dx.p + at, {}, {}, {}, scratch.p, dln.p + at, z.p + at, nullptr, rs, gamma.p, true, false, rows,
                                 C, 0);
        if (m == micro_batches - 1 || unfold_each)
            norm_unfold(dW, dgamma.grad(), dbeta.grad(), scratch.p, db, weight.p, gamma.p, beta.p, OC, C, 0);
    }
    return {doubles(y.read()),     doubles(dx.read()),      doubles(dgamma.read()),
            doubles(dbeta.read()), doubles(dweight.read()), doubles(dbias.read())};
}

// In fp32 the sums of a thousand terms lose a few times 1e-7. In bf16 z, the folded weight, dz and what is stored are each
// rounded, by 2^-8 at most and a third of that on average, and gradients are sums of them with either sign.
constexpr double BAR = kFP32 ? 3e-6 : 2e-2;

// W, gamma and beta are constant within a step, so the sum of G may be unfolded once. To do so after each micro-batch is what a
// trainer does that forgets to wait for the last: G of the second is added to a dW that has been unfolded.
void test_shared(uint64_t seed) {
    Property p[RESULTS] = {{"y", "relative distance"}, {"dx", "the same"}, {"dgamma"}, {"dbeta"}, {"dW"}, {"db"}},
        wrong("unfolding after each of 3 micro-batches would be wrong: dW and dgamma are off by more than a tenth"),
        nan("a NaN or an infinity in any input reaches what it is part of, and only that");
    struct Shape { int rows, C, OC; };
    for (auto [rows, C, OC] : {Shape{1, 8, 8}, {7, 24, 40}, {7, 96, 264}, {65, 136, 40}, {65, 1000, 40}})
        for (int micro : {1, 3}) {   // gradients are fp32 when several micro-batches are added up, as in the trainer
            set_case("C %d, OC %d, rows %d, micro-batches %d", C, OC, rows, micro);
            const Linear q(seed, micro * rows, C, OC);
            const Results ours = compute(q, micro, micro > 1 ? F32 : FLOATX), ref = reference(q);
            for (int i = 0; i < RESULTS; i++) p[i].within(i, distance(ours[i], ref[i]), 0, BAR);
        }
    const int rows = 7, C = 96, OC = 40, r = 3, c = 5, o = 11;
    set_case("unfolding after each");
    const Linear three(seed, 3 * rows, C, OC), clean(seed, rows, C, OC);
    const Results each = compute(three, 3, F32, true), ref = reference(three), before = compute(clean, 1, F32);
    for (int i : {DWEIGHT, DGAMMA}) wrong.is(distance(each[i], ref[i]) > 0.1, "it is right");

    struct Case { const char* name; std::vector<floatX> Linear::*in; size_t at; Where where[RESULTS]; };   // as RESULT_NAMES
    for (float odd : {NAN, INFINITY})
        for (const Case& k : {Case{"x", &Linear::inp, r * C + c, {ROW, ROW, ALL, NO, ALL, NO}},
                              {"gamma", &Linear::gamma, c, {ALL, ALL, NO, NO, COLUMN, NO}},
                              {"beta", &Linear::beta, c, {ALL, NO, NO, NO, COLUMN, NO}},
                              {"W", &Linear::weight, o * C + c, {COLUMN, ALL, ONE, ONE, NO, NO}},
                              {"b", &Linear::bias, o, {COLUMN, NO, NO, NO, NO, NO}},
                              {"dy", &Linear::dy, r * OC + o, {NO, ROW, ALL, ALL, ROW, ONE}}}) {
            set_case("%f in %s", odd, k.name);
            Linear q = clean;
            (q.*k.in)[k.at] = (floatX)odd;
            const Results ours = compute(q, 1, F32);
            const int row[] = {r, r, 0, 0, o, 0}, column[] = {o, c, c, c, c, o}, columns[] = {OC, C, C, C, C, OC};
            for (int i = 0; i < RESULTS; i++)
                check_reach(nan, ours[i], before[i], reach(k.where[i], row[i], column[i], columns[i]), RESULT_NAMES[i]);
        }
    printf("a norm and its matmul, shared, against the standard formulas (at most %.0e)\n", BAR);
    report({&p[Y], &p[DX], &p[DGAMMA], &p[DBETA], &p[DWEIGHT], &p[DBIAS], &wrong, &nan});
}

// Index arithmetic where W has more than 2^31 elements, in the first and the last block. The trainer cuts W into 64 slices to
// unfold it; here it is the 65535 that a grid can have, so that a block has 64 or 65 rows to do.
void test_far_fold(uint64_t seed) {
    constexpr int C = 520, OC = (1 << 22) + 5, slices = 65535, NEAR = 65;
    constexpr size_t n = (size_t)OC * C;
    static_assert(n > (size_t)1 << 31, "");
    Property fold("folding beyond 2^31 elements, first and last block", "every bit"),
        unfold("unfolding beyond 2^31 elements, first and last slice", "every bit");
    set_case("OC %d, C %d", OC, C);
    const Linear p(seed, 1, C, NEAR);
    Buffer<floatX> gamma(p.gamma), beta(p.beta);
    Far<floatX> weight(n, p.weight, C, C), folded(n, (size_t)NEAR * C, C, C), bias(OC, p.bias, 1, 1), folded_bias(OC, NEAR, 1, 1);
    Far<float> dweight(n, floats(Random(seed, 31).normals((size_t)NEAR * C)), C, C), dbias(OC, floats(p.bias), 1, 1);
    Far<float> partial((size_t)2 * slices * C, (size_t)2 * C, C, C, 2, (size_t)slices * C);
    auto move = [&](int first, int rows) {
        weight.at = folded.at = dweight.at = (size_t)first * C, bias.at = folded_bias.at = dbias.at = first;
        weight.rows = folded.rows = dweight.rows = bias.rows = folded_bias.rows = dbias.rows = rows;
        return rows;
    };
    for (int block : {0, (OC - 1) / 8}) {
        const int rows = move(block * 8, std::min(OC - block * 8, 8));
        check_far(fold, {&weight, &folded, &bias, &folded_bias}, {block}, [&](bool far) {
            norm_fold(folded.p(far), folded_bias.p(far), weight.p(far), bias.p(far), gamma.p, beta.p, far ? OC : rows, C, 0);
        });
    }
    for (int slice : {0, slices - 1}) {
        const int first = (int)((size_t)OC * slice / slices), end = (int)((size_t)OC * (slice + 1) / slices);
        const int rows = move(first, end - first);
        partial.at = (size_t)slice * C;
        check_far(unfold, {&weight, &dweight, &dbias, &partial}, {3 * slice, 3 * slice + 1, 3 * slice + 2}, [&](bool far) {
            const int count = far ? slices : 1;
            const Grad G = {dweight.p(far), F32}, db = {dbias.p(far), F32};
            norm_unfold_kernel<<<dim3(3, count), 256>>>(G, partial.p(far), partial.p(far) + (size_t)count * C, db, weight.p(far),
                                                        gamma.p, beta.p, far ? OC : rows, C);
            cudaCheck(cudaGetLastError());
        });
    }
    report({&fold, &unfold});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int rows, int C) {
    const int OC = 4 * C;
    const double X = sizeof(floatX);
    BenchTable t((size_t)rows * C, BenchTable::BYTES, "GPT-2 %s: rows %d, C %d", model, rows, C);
    const size_t n = t.here(t.n, C), r = t.here(rows, 1), w = t.here((size_t)OC * C, C);
    Random random(1337, 1);
    Buffer<floatX> x(n), add(n), out(n), dout(n), dx(n), dadd(n), through(n), weight(w), folded(w), folded_bias(OC),
        gamma(random.normals(C, 1, 0.5f)), beta(random.normals(C)), bias(random.normals(OC));
    for (Buffer<floatX>* b : {&x, &add, &out, &dout, &dx, &weight}) b->fill();
    Buffer<float> mean(r), rstd(r), means(2 * r), scratch(std::max(colsum_scratch(C), (size_t)COLSUM_SLICES * OC));
    cudaCheck(cudaMemset(mean.p, 0, mean.bytes()));
    rstd.fill(0.5f, 1.5f);
    GradBuffer bias_grad(OC, F32), gamma_grad(C, F32), beta_grad(C, F32), weight_grad(w, F32);
    bias_grad.fill();
    weight_grad.fill();
    const Grad db = bias_grad.grad(), dg = gamma_grad.grad(), de = beta_grad.grad(), dW = weight_grad.grad();
    auto forward = [&](Layer* layer) {
        return [&, layer] { layer(dx.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); };
    };
    auto backward = [&](auto layer) {
        return [&, layer] { layer(dx.p, db, dg, de, scratch.p, dout.p, x.p, mean.p, rstd.p, gamma.p, true, false, rows, C, 0); };
    };
    t.row("forward, version 1: one kernel per step", 7 * X, forward(layernorm_forward_1));
    t.row("forward, version 2: one block per row", 5 * X, forward(layernorm_forward_2));
    t.row("forward, version 3: the trainer's, one warp per row", 4 * X, forward(layernorm_forward<false>));
    t.row("forward, version 3, shared: keeps z alone", 4 * X, forward(layernorm_forward<true>));
    t.row("backward, version 1: one kernel per formula", 13 * X, [&] {
        layernorm_backward_1(out.p, dadd.p, db, dg, de, through.p, means.p, dx.p, dout.p, x.p, mean.p, rstd.p, gamma.p, false,
                             rows, C, 0);
    });
    t.row("backward, version 2: one pass along rows, one along columns", 7 * X, backward(layernorm_backward_2));
    t.row("backward, version 3: the trainer's, one pass", 4 * X, backward(layernorm_backward<false>));
    t.row("backward, version 3, shared: the bias alone", 4 * X, backward(layernorm_backward<true>));

    BenchTable u((size_t)OC * C, BenchTable::BYTES, "GPT-2 %s: the matmul's weight, %d x %d, gradients in fp32", model, OC, C);
    auto fold = [&](auto layer) {
        return [&, layer] { layer(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0); };
    };
    u.row("fold, version 1 (once per micro-batch)", 3 * X, fold(norm_fold_1));
    u.row("fold, version 2: the trainer's", 2 * X, fold(norm_fold));
    u.row("unfold, version 1 (once per step)", 12 + 2 * X,
          [&] { norm_unfold_1(dW, dg, de, db, weight.p, gamma.p, beta.p, OC, C, 0); });
    u.row("unfold, version 2: the trainer's", 8 + X,
          [&] { norm_unfold(dW, dg, de, scratch.p, db, weight.p, gamma.p, beta.p, OC, C, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "layernorm: the residual addition and LayerNorm, exact or shared with its matmul");
    if (o.bench) return bench_models(bench);
    floatX* none = nullptr;
    auto forward = [=](int C) { layernorm_forward<false>(none, none, nullptr, nullptr, none, none, none, none, 1, C, 0); };
    auto backward = [=] {
        layernorm_backward<true>(none, {}, {}, {}, nullptr, none, none, nullptr, nullptr, none, false, false, 1, 12, 0);
    };
    test_misuse(o, {refuses_12("layernorm_forward: C", [=] { forward(12); }), refuses_12("layernorm_backward: C", backward),
                    refuses_12("norm_fold: C", [=] { norm_fold(none, none, none, none, none, none, 8, 12, 0); }),
                    refuses_12("norm_unfold: C", [=] { norm_unfold({}, {}, {}, nullptr, {}, none, none, none, 8, 12, 0); }),
                    {"a row beyond 48 KB", "because a row must fit 48 KB", [=] { forward(48 * 1024 / sizeof(floatX) + 8); }}});
    MatmulSession cublas;
    printf("layernorm, %s\n", dtype_name(FLOATX));
    test_forward<false>(o.seed);
    test_forward<true>(o.seed);
    test_backward<false>(o.seed);
    test_backward<true>(o.seed);
    test_special<false>(o.seed);
    test_special<true>(o.seed);
    test_far<false>(o.seed);
    test_far<true>(o.seed);
    test_fold(o.seed);
    test_shared(o.seed);
    test_far_fold(o.seed);
    return finish(o);
}
