/*
LayerNorm, forward and backward, with the column sums that gamma, beta and a bias want: the trainer's exact kernels, tested,
and simpler ones beside them to learn from. Section 3 of train_gpt2.cu has them under "norm" and "column sums"; the form that
shares a tensor with its matmul is in mslayernorm.cu.

    make dev/cuda/layernorm && ./dev/cuda/layernorm [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/layernorm.cu -lcublasLt -o layernorm

Over the C channels of a row: z = (x - mean) * rstd, rstd = 1 / sqrt(variance + 1e-5), y = gamma * z + beta. Backward, with dz =
dy * gamma: dx = rstd * (dz - mean(dz) - z * mean(dz * z)), dgamma = the sum over rows of dy * z, dbeta = that of dy. dx is
added to the gradient of the residual stream, in place; what comes out is also the gradient of what a matmul has added to the
stream, so its sum over rows is the gradient of that matmul's bias, and is wanted here too. C is a multiple of 8, and forward
wants a row in 48 KB of shared memory: 24576 channels in bf16, 12288 in fp32.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: a step a kernel, as the formula is read. The mean, then the spread around it, each a row a thread, then the
// result, an element a thread. x is read three times and y written once: 8 bytes an element in bf16, where 4 have to be. The
// first two kernels make 65536 threads for as many rows, a quarter of what a large GPU can hold, and the 32 lanes of a warp
// stand in 32 rows: each load touches 32 lines to use 2 bytes of each, and caches have to hold those lines until the lanes have
// walked along them. And a row is added up one by one, C roundings in a row.
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
__global__ void normalize_1_kernel(floatX* y, const floatX* x, const float* mean, const float* rstd, const floatX* gamma,
                                   const floatX* beta, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    int c = (int)(i % C);
    y[i] = (floatX)((float)gamma[c] * (((float)x[i] - mean[row]) * rstd[row]) + (float)beta[c]);
}
void layernorm_forward_1(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* gamma, const floatX* beta,
                         int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    mean_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(mean, x, rows, C);
    rstd_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(rstd, x, mean, rows, C);
    normalize_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(y, x, mean, rstd, gamma, beta, n, C);
    cudaCheck(cudaGetLastError());
}

// Version 2: one kernel, a row a block. Neighbours read neighbours, and what is read three times is in the cache the second and
// the third time: 4 bytes. A sum over the block is a tree in shared memory, half of the threads at the first step, one at the
// last, and a barrier after each: 20 barriers a row for its two sums, at each of which 8 warps wait for the slowest. At C = 768
// a thread has 3 elements to add and 20 times to wait. Loads are of 2 bytes, where the hardware moves 16 in one.
//
// Version 3, the trainer's layernorm_forward, gives the row to a warp. A warp's sum is five shuffles and no barrier; a lane
// takes 8 neighbours in one load of 16 bytes (in bf16), and what it will want again it leaves in shared memory, where nobody
// else looks.
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
__global__ void layernorm_forward_2_kernel(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* gamma,
                                           const floatX* beta, int C) {
    __shared__ float shared[256];
    size_t base = (size_t)blockIdx.x * C;
    float sum = 0, square = 0;
    for (int c = threadIdx.x; c < C; c += 256) sum += (float)x[base + c];
    float mu = block_sum_2(sum, shared) / C;
    for (int c = threadIdx.x; c < C; c += 256) square += ((float)x[base + c] - mu) * ((float)x[base + c] - mu);
    float rs = rsqrtf(block_sum_2(square, shared) / C + NORM_EPS);
    for (int c = threadIdx.x; c < C; c += 256)
        y[base + c] = (floatX)((float)gamma[c] * (((float)x[base + c] - mu) * rs) + (float)beta[c]);
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = mu;
        rstd[blockIdx.x] = rs;
    }
}
void layernorm_forward_2(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* gamma, const floatX* beta,
                         int rows, int C, cudaStream_t stream) {
    layernorm_forward_2_kernel<<<rows, 256, 0, stream>>>(y, mean, rstd, x, gamma, beta, C);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Version 1: again a formula a kernel. The two means of a row, a row a thread: reads dy and x. dx, an element a thread: reads
// dy, x and the gradient of the stream, and writes that. dgamma, a column a thread: reads dy and x. dbeta and dbias likewise:
// dy; what came out. 10 elements moved, 20 bytes. Columns are read in whole lines, but C of them are 24 warps at C = 768, on a
// GPU that can hold thousands, and each adds 65536 rows one by one.
__global__ void means_1_kernel(float* mean_dz, float* mean_dz_z, const floatX* dy, const floatX* x, const float* mean,
                               const float* rstd, const floatX* gamma, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0, sum_z = 0;
    for (int c = 0; c < C; c++) {
        size_t i = (size_t)row * C + c;
        float dz = (float)dy[i] * (float)gamma[c];
        sum += dz;
        sum_z += dz * (((float)x[i] - mean[row]) * rstd[row]);
    }
    mean_dz[row] = sum / C;
    mean_dz_z[row] = sum_z / C;
}
__global__ void dx_1_kernel(floatX* dresidual, const floatX* dy, const floatX* x, const float* mean, const float* rstd,
                            const float* mean_dz, const float* mean_dz_z, const floatX* gamma, bool accumulate, size_t n,
                            int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    float dz = (float)dy[i] * (float)gamma[i % C], z = ((float)x[i] - mean[row]) * rstd[row];
    float dx = rstd[row] * (dz - mean_dz[row] - z * mean_dz_z[row]);
    dresidual[i] = (floatX)(accumulate ? (float)dresidual[i] + dx : dx);
}
__global__ void dgamma_1_kernel(Grad dgamma, const floatX* dy, const floatX* x, const float* mean, const float* rstd,
                                bool accumulate, int rows, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) {
        size_t i = (size_t)r * C + c;
        sum += (float)dy[i] * (((float)x[i] - mean[r]) * rstd[r]);
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
void layernorm_backward_1(floatX* dresidual, Grad dbias, Grad dgamma, Grad dbeta,
                          float* scratch,   // (2, rows)
                          const floatX* dy, const floatX* x, const float* mean, const float* rstd, const floatX* gamma,
                          bool accumulate_residual, bool accumulate, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    float *mean_dz = scratch, *mean_dz_z = scratch + rows;
    means_1_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(mean_dz, mean_dz_z, dy, x, mean, rstd, gamma, rows, C);
    dx_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dresidual, dy, x, mean, rstd, mean_dz, mean_dz_z, gamma,
                                                      accumulate_residual, n, C);
    dgamma_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dgamma, dy, x, mean, rstd, accumulate, rows, C);
    column_sum_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dbeta, dy, accumulate, rows, C);
    column_sum_1_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dbias, dresidual, accumulate, rows, C);
    cudaCheck(cudaGetLastError());
}

// Version 2: a pass for the sums along rows and a pass for those along columns. A row a block for dx, with the barriers of the
// forward pass; then the three column sums, by blocks of 8 warps for 32 columns each, whose warps take every eighth row. 4
// elements and 3, 14 bytes. 24 blocks of 8 warps at C = 768 are still fewer than there are multiprocessors, and a warp's load
// is 64 bytes, half a line. (More blocks could share a column and add to it with atomics, in an order that nobody knows: no two
// runs would be the same.) And dy and x come from memory twice, for no better reason than that the two kinds of sums have
// different shapes.
//
// Version 3, the trainer's layernorm_backward, makes both of one reading. A block goes down a slice of the rows, 8 at a time:
// first a warp a row, for the sums along it; then, behind the one barrier, a thread 8 columns, down the same 8 rows, which lie
// in the cache by now (25 KB of dy and x at C = 768). A thread keeps its columns' sums in registers until the slice ends. 512
// slices are a few blocks for each multiprocessor of a large GPU, and a second kernel adds the slices in their order: 3 * 512 *
// C floats, which stay in the cache between the two. 4 elements, 8 bytes.
__global__ void layernorm_backward_2_rows_kernel(floatX* dresidual, const floatX* dy, const floatX* x, const float* mean,
                                                 const float* rstd, const floatX* gamma, bool accumulate, int C) {
    __shared__ float shared[256];
    size_t base = (size_t)blockIdx.x * C;
    float mu = mean[blockIdx.x], rs = rstd[blockIdx.x], sum = 0, sum_z = 0;
    for (int c = threadIdx.x; c < C; c += 256) {
        float dz = (float)dy[base + c] * (float)gamma[c];
        sum += dz;
        sum_z += dz * (((float)x[base + c] - mu) * rs);
    }
    sum = block_sum_2(sum, shared) / C;
    sum_z = block_sum_2(sum_z, shared) / C;
    for (int c = threadIdx.x; c < C; c += 256) {
        float dz = (float)dy[base + c] * (float)gamma[c], z = ((float)x[base + c] - mu) * rs, dx = rs * (dz - sum - z * sum_z);
        dresidual[base + c] = (floatX)(accumulate ? (float)dresidual[base + c] + dx : dx);
    }
}
__global__ void layernorm_backward_2_columns_kernel(Grad dbias, Grad dgamma, Grad dbeta, const floatX* dresidual,
                                                    const floatX* dy, const floatX* x, const float* mean, const float* rstd,
                                                    bool accumulate, int rows, int C) {
    __shared__ float shared[3][8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0, sum_d = 0, sum_d_z = 0;
    for (int r = warp; c < C && r < rows; r += 8) {
        size_t i = (size_t)r * C + c;
        float d = (float)dy[i];
        sum += (float)dresidual[i];
        sum_d += d;
        sum_d_z += d * (((float)x[i] - mean[r]) * rstd[r]);
    }
    shared[0][warp][lane] = sum;
    shared[1][warp][lane] = sum_d;
    shared[2][warp][lane] = sum_d_z;
    __syncthreads();
    if (warp >= 3 || c >= C) return;   // three warps finish, a sum each
    float total = 0;
    for (int w = 0; w < 8; w++) total += shared[warp][w][lane];
    grad_store(warp == 0 ? dbias : warp == 1 ? dbeta : dgamma, c, total, accumulate);
}
void layernorm_backward_2(floatX* dresidual, Grad dbias, Grad dgamma, Grad dbeta, const floatX* dy, const floatX* x,
                          const float* mean, const float* rstd, const floatX* gamma, bool accumulate_residual, bool accumulate,
                          int rows, int C, cudaStream_t stream) {
    layernorm_backward_2_rows_kernel<<<rows, 256, 0, stream>>>(dresidual, dy, x, mean, rstd, gamma, accumulate_residual, C);
    layernorm_backward_2_columns_kernel<<<ceil_div(C, 32), 256, 0, stream>>>(dbias, dgamma, dbeta, dresidual, dy, x, mean, rstd,
                                                                             accumulate, rows, C);
    cudaCheck(cudaGetLastError());
}

// How many additions stand one behind the other in a sum along a row, and in one over all rows.
double row_depth(int version, int C) {
    return version == 1 ? C : version == 2 ? ceil_div(C, 256) + 8 : VEC * ceil_div(C, 32 * VEC) + 5;
}
double column_depth(int version, int rows) {
    return version == 1 ? rows + 1 : version == 2 ? ceil_div(rows, 8) + 9 : norm_colsum_depth(rows);
}

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision

constexpr double EPSILON = 1e-5;   // GPT-2's, not taken from the trainer

struct Norm {
    Doubles mean, rstd, size, y;   // size: the mean of |x|, by which the mean's roundings go
    Norm(const Doubles& x, const Doubles& gamma, const Doubles& beta, int rows, int C)
        : mean(rows, 0), rstd(rows, 0), size(rows, 0), y(x.size()) {
        for (int r = 0; r < rows; r++) {
            const double* row = &x[(size_t)r * C];
            double var = 0;
            for (int c = 0; c < C; c++) mean[r] += row[c] / C, size[r] += fabs(row[c]) / C;
            for (int c = 0; c < C; c++) var += (row[c] - mean[r]) * (row[c] - mean[r]) / C;
            rstd[r] = 1 / sqrt(var + EPSILON);
            for (int c = 0; c < C; c++) y[(size_t)r * C + c] = gamma[c] * (row[c] - mean[r]) * rstd[r] + beta[c];
        }
    }
};

// Backward, from the mean and rstd that it is given. Beside each sum stands that of the absolute values of its terms.
struct NormGradient {
    Doubles dx, dgamma, dbeta, terms_gamma, terms_beta, mean_dz, mean_dz_z, terms, terms_z;
    NormGradient(const Doubles& dy, const Doubles& x, const Doubles& gamma, const Doubles& mean, const Doubles& rstd, int rows,
                 int C)
        : dx(x.size()), dgamma(C, 0), dbeta(C, 0), terms_gamma(C, 0), terms_beta(C, 0), mean_dz(rows, 0), mean_dz_z(rows, 0),
          terms(rows, 0), terms_z(rows, 0) {
        for (int r = 0; r < rows; r++) {
            auto z = [&](int c) { return (x[(size_t)r * C + c] - mean[r]) * rstd[r]; };
            const double* d = &dy[(size_t)r * C];
            for (int c = 0; c < C; c++) {
                double dz = d[c] * gamma[c];
                mean_dz[r] += dz / C, terms[r] += fabs(dz) / C;
                mean_dz_z[r] += dz * z(c) / C, terms_z[r] += fabs(dz * z(c)) / C;
                dgamma[c] += d[c] * z(c), terms_gamma[c] += fabs(d[c] * z(c));
                dbeta[c] += d[c], terms_beta[c] += fabs(d[c]);
            }
            for (int c = 0; c < C; c++) dx[(size_t)r * C + c] = rstd[r] * (d[c] * gamma[c] - mean_dz[r] - z(c) * mean_dz_z[r]);
        }
    }
};

// The formulas of backward are the derivatives of forward's: by central differences of sum(dy * y).
void test_reference(uint64_t seed) {
    Property p("the reference's gradients are forward's differences", "h^2, and 1e-16 / h");
    set_case("C 24, rows 3");
    const int rows = 3, C = 24;
    Random random(seed, 1);
    auto make = [&](size_t n, float mean) { return doubles(random.normals(n, mean)); };
    Doubles x = make(rows * C, 0.5f), gamma = make(C, 1), beta = make(C, 0), dy = make(rows * C, 0);
    Norm norm(x, gamma, beta, rows, C);
    NormGradient g(dy, x, gamma, norm.mean, norm.rstd, rows, C);
    auto slope = [&](double& at) {
        const double h = 1e-5, here = at;
        double sum[2] = {};
        for (int side : {0, 1}) {
            at = here + (side ? h : -h);
            Norm moved(x, gamma, beta, rows, C);
            for (size_t i = 0; i < dy.size(); i++) sum[side] += dy[i] * moved.y[i];
        }
        at = here;
        return (sum[1] - sum[0]) / (2 * h);
    };
    for (int i = 0; i < rows * C; i++) p.within(i, slope(x[i]), g.dx[i], 2e-9);
    for (int c = 0; c < C; c++) p.within(c, slope(gamma[c]), g.dgamma[c], 2e-9);
    for (int c = 0; c < C; c++) p.within(c, slope(beta[c]), g.dbeta[c], 2e-9);
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

enum RowKind { PLAIN, OFFSET, EQUAL, ROW_KINDS };   // rows around 0.5; around 1e4; of equal values
const char* const KIND_NAMES[] = {"around 0.5", "around 1e4", "equal values"};

struct Problem {
    int rows, C;
    std::vector<floatX> x, gamma, beta, dy, dresidual;
    Problem(uint64_t seed, int rows, int C, RowKind kind) : rows(rows), C(C) {
        Random random(seed, ((uint64_t)rows << 32) + C * 10 + kind);
        const size_t n = (size_t)rows * C;
        x = random.normals(n, kind == OFFSET ? 1e4f : 0.5f, kind == OFFSET && !kFP32 ? 200 : 1);
        if (kind == EQUAL)
            for (size_t i = 0; i < n; i++) x[i] = x[i / C * C];
        gamma = random.normals(C, 1, 0.5f);
        for (int c = 0; c < C; c++) {
            if (c % 5 == 1) gamma[c] = (floatX)0.0f;
            if (c % 7 == 2) gamma[c] = (floatX)-1.25f;
        }
        beta = random.normals(C, 0.25f, 0.5f);
        dy = random.normals(n);
        dresidual = random.normals(n);
    }
};

// Channels around what a lane, a warp, and a block of the backward kernel take (8, 256, 4096); rows around the 8 that such a
// block takes at a time, and slices of 16 and 17 rows; 18 and 512 slices, which 2 and 32 warps add up. Then channels of which
// 4, 3, 2 rows and 1 just fit forward's block, and some that just do not.
struct Shape { int rows, C; };
std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (int C : {8, 24, 136, 256, 264, 1000})
        for (int rows : {1, 8, 9, 65}) all.push_back({rows, C});
    for (Shape s : {Shape{301, 24}, {301, 264}, {8195, 8}, {17, 4096}, {17, 4104}}) all.push_back(s);
    const int most = (int)(48 * 1024 / sizeof(floatX));
    for (int C : {most / 4, most / 4 + 8, most / 3 / 8 * 8 + 8, most / 2, most / 2 + 8, most}) all.push_back({5, C});
    return all;
}
bool is_long(const Shape& s) { return s.rows * s.C > 20000; }   // there one kind of rows is enough, to save time

void test_forward(uint64_t seed) {
    Property y[ROW_KINDS] = {
        {"y", "the mean's and the spread's roundings, two of y's own, one of storing"},
        {"y of rows around 1e4", "in fp32 most of it the mean's"},
        {"y of rows of equal values", kFP32 ? "the mean's, times rstd: 316" : "sums are exact: beta, every bit"}};
    Property mean("mean", "a rounding for each addition in a row, and one"), rstd("rstd", "half of the square's");
    Property again("the same bits in a second run"), fused("the same bits where x is a sum that is made on the way");
    Property two("version 2: y, mean, rstd", "likewise"), one("version 1: y, mean, rstd", "likewise");
    for (Shape s : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            if (is_long(s) && kind != PLAIN) continue;
            const auto [rows, C] = s;
            const Problem p(seed, rows, C, kind);
            const size_t n = p.x.size();
            const Norm ref(doubles(p.x), doubles(p.gamma), doubles(p.beta), rows, C);
            Buffer<floatX> x(p.x), gamma(p.gamma), beta(p.beta);
            std::vector<floatX> first_y;
            std::vector<float> first_mean, first_rstd;
            for (int version : {3, 4, 2, 1}) {   // 3 and 4 are the trainer's
                if (version == 2 && rows > 65) continue;   // barriers take long on the CPU backend
                set_case("C %d, rows %d, %s, version %d", C, rows, KIND_NAMES[kind], version);
                Buffer<floatX> out(n);
                Buffer<float> mu(rows), rs(rows);
                if (version == 1) layernorm_forward_1(out.p, mu.p, rs.p, x.p, gamma.p, beta.p, rows, C, 0);
                else if (version == 2) layernorm_forward_2(out.p, mu.p, rs.p, x.p, gamma.p, beta.p, rows, C, 0);
                else layernorm_forward<false>(nullptr, out.p, mu.p, rs.p, x.p, nullptr, gamma.p, beta.p, rows, C, 0);
                std::vector<floatX> got = out.read();
                std::vector<float> m = mu.read(), q = rs.read();
                if (version == 4) {
                    again.is(same_bits(got, first_y) && same_bits(m, first_mean) && same_bits(q, first_rstd), "other bits");
                    continue;
                }
                if (version == 3) first_y = got, first_mean = m, first_rstd = q;
                const double depth = row_depth(version, C);
                for (int r = 0; r < rows; r++) {
                    // The mean is off by a rounding of the sum so far for each addition, and one of dividing. That shifts all z
                    // alike, and adds its square to the variance. A squared deviation has 3 roundings, its sum one for each
                    // addition; dividing and adding 1e-5 make 2; the root halves them all, and rsqrtf itself may take 4.
                    double off = ref.size[r] * EPS32 * (depth + 1), shift = off * ref.rstd[r];
                    double spread = EPS32 * ((depth + 5) / 2 + 4) + shift * shift / 2;
                    (version == 3 ? mean : version == 2 ? two : one).within(r, m[r], ref.mean[r], off * 1.01);
                    (version == 3 ? rstd : version == 2 ? two : one).within(r, q[r], ref.rstd[r], ref.rstd[r] * spread * 1.01);
                    for (int c = 0; c < C; c++) {
                        size_t i = (size_t)r * C + c;
                        Property& values = version == 3 ? y[kind] : version == 2 ? two : one;
                        if (kind == EQUAL && !kFP32) {   // 8 bits times C fit the 24 of fp32
                            values.equal(i, (float)got[i], (float)p.beta[c]);
                            continue;
                        }
                        double z = ((double)(float)p.x[i] - ref.mean[r]) * ref.rstd[r], g = fabs((double)(float)p.gamma[c]);
                        double error = g * (shift + fabs(z) * (spread + 3 * EPS32)) + fabs(ref.y[i]) * EPS32;
                        values.within(i, (float)got[i], ref.y[i], (error + (fabs(ref.y[i]) + error) * EPSX) * 1.01);
                    }
                }
            }
            if (kind != PLAIN || is_long(s)) continue;
            // as the trainer calls it: x = inp + add, kept in inp's place
            set_case("C %d, rows %d, x = inp + add", C, rows);
            std::vector<floatX> sum(n);
            for (size_t i = 0; i < n; i++) sum[i] = (floatX)((float)p.x[i] + (float)p.dresidual[i]);
            Buffer<floatX> inp(p.x), add(p.dresidual), rounded(sum), out(n), expected(n);
            Buffer<float> mu(rows), rs(rows), mu2(rows), rs2(rows);
            layernorm_forward<false>(inp.p, out.p, mu.p, rs.p, inp.p, add.p, gamma.p, beta.p, rows, C, 0);
            layernorm_forward<false>(nullptr, expected.p, mu2.p, rs2.p, rounded.p, nullptr, gamma.p, beta.p, rows, C, 0);
            fused.is(same_bits(inp.read(), sum) && same_bits(out.read(), expected.read()) && same_bits(mu.read(), mu2.read()) &&
                         same_bits(rs.read(), rs2.read()),
                     "other bits");
        }
    printf("forward\n");
    report({&y[PLAIN], &y[OFFSET], &y[EQUAL], &mean, &rstd, &again, &fused, &two, &one});
}

// Each version is given the same mean and rstd, the reference's in fp32, and has to make of them what the formulas say.
void test_backward(uint64_t seed) {
    Property dx[ROW_KINDS] = {{"dx", "the two means' roundings, half a dozen of its own, one of storing"},
                              {"dx of rows around 1e4", "likewise"},
                              {"dx of rows of equal values", "likewise: z is 0 but for its roundings"}};
    Property sums32("dgamma and dbeta in fp32", "a rounding for each addition in a row, 4 for a term"),
        sums16("dgamma and dbeta in bf16", "and one of storing"),
        bias32("dbias in fp32", "likewise, and what dx has before it is stored"), bias16("dbias in bf16", "and one of storing"),
        again("the same bits in a second run"), unwanted("the same bits of the rest where dbias is not wanted"),
        two("version 2: dx, dbias, dgamma, dbeta", "likewise; dbias of what is stored"),
        one("version 1: dx, dbias, dgamma, dbeta", "likewise");
    for (Shape s : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            if (is_long(s) && kind != PLAIN) continue;
            const auto [rows, C] = s;
            const Problem p(seed, rows, C, kind);
            const size_t n = p.x.size();
            const Doubles x = doubles(p.x), dy = doubles(p.dy), gamma = doubles(p.gamma);
            const Norm norm(x, gamma, doubles(p.beta), rows, C);
            const std::vector<float> mean(norm.mean.begin(), norm.mean.end()), rstd(norm.rstd.begin(), norm.rstd.end());
            const NormGradient ref(dy, x, gamma, doubles(mean), doubles(rstd), rows, C);
            std::vector<float> before[3];   // dbias, dbeta, dgamma, as bf16 can hold them
            for (int i = 0; i < 3; i++) {
                before[i].resize(C);
                Random random(seed, 11 + i);
                for (float& v : before[i]) v = (float)(__nv_bfloat16)(10 * random.normal());
            }
            Buffer<floatX> bx(p.x), bdy(p.dy), bgamma(p.gamma);
            Buffer<float> bmean(mean), brstd(rstd), scratch_1(2 * rows);
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    if ((is_long(s) || kind != PLAIN) && accumulate != (type == F32)) continue;
                    const bool around = accumulate == (type == F32);   // both kinds of dx with both kinds of gradients
                    std::vector<floatX> first_dx;
                    std::vector<float> first_sums;
                    for (int version : {3, 4, 5, 2, 1}) {   // 3 to 5 are the trainer's; 5: without dbias
                        if (version == 2 && (rows > 65 || type == BF16)) continue;   // barriers take long on the CPU backend
                        if (version == 5 && is_long(s)) continue;
                        set_case("C %d, rows %d, %s, %s gradients %s, dx %s, version %d", C, rows, KIND_NAMES[kind],
                                 dtype_name(type), accumulate ? "added to" : "written", around ? "added" : "written", version);
                        Buffer<floatX> bdx(n);   // NaN where dx is written and not added
                        Buffer<float> scratch((size_t)3 * norm_slices(rows) * C);   // no more than is used
                        GradBuffer sum0(C, type), sum1(C, type), sum2(C, type);
                        Grad dbias = version == 5 ? Grad{nullptr, type} : sum0.grad(), dbeta = sum1.grad(),
                             dgamma = sum2.grad();
                        if (around) bdx.write(p.dresidual);
                        if (accumulate) sum0.write(before[0]), sum1.write(before[1]), sum2.write(before[2]);
                        if (version == 1)
                            layernorm_backward_1(bdx.p, dbias, dgamma, dbeta, scratch_1.p, bdy.p, bx.p, bmean.p, brstd.p,
                                                 bgamma.p, around, accumulate, rows, C, 0);
                        else if (version == 2)
                            layernorm_backward_2(bdx.p, dbias, dgamma, dbeta, bdy.p, bx.p, bmean.p, brstd.p, bgamma.p, around,
                                                 accumulate, rows, C, 0);
                        else
                            layernorm_backward<false>(bdx.p, dbias, dgamma, dbeta, scratch.p, bdy.p, bx.p, bmean.p, brstd.p,
                                                      bgamma.p, around, accumulate, rows, C, 0);
                        const std::vector<floatX> got = bdx.read();
                        const std::vector<float> sums[3] = {sum0.read(), sum1.read(), sum2.read()};
                        if (version >= 4) {
                            std::vector<float> rest = sums[1];
                            rest.insert(rest.end(), sums[2].begin(), sums[2].end());
                            if (version == 4) rest.insert(rest.end(), sums[0].begin(), sums[0].end());
                            (version == 4 ? again : unwanted)
                                .is(same_bits(got, first_dx) && memcmp(rest.data(), first_sums.data(), rest.size() * 4) == 0,
                                    "other bits");
                            for (int c = 0; version == 5 && c < C; c++)
                                unwanted.equal(c, sums[0][c], accumulate ? before[0][c] : NAN);
                            continue;
                        }
                        if (version == 3) {
                            first_dx = got, first_sums = sums[1];
                            for (int i : {2, 0}) first_sums.insert(first_sums.end(), sums[i].begin(), sums[i].end());
                        }
                        // dz has 1 rounding, z 2 and dz z 4. A mean has as many as stand in its sum, and one of dividing. The
                        // differences have one each, of what goes in; the product with rstd, adding and storing one each.
                        const double depth = row_depth(version, C);
                        Doubles sum_dx(C, 0), size_dx(C, 0), error_dx(C, 0);
                        for (int r = 0; r < rows; r++) {
                            double off = ref.terms[r] * (depth + 2), off_z = ref.terms_z[r] * (depth + 5);
                            for (int c = 0; c < C; c++) {
                                size_t i = (size_t)r * C + c;
                                double dz = fabs(dy[i] * gamma[c]), z = fabs((x[i] - mean[r]) * (double)rstd[r]);
                                double expected = ref.dx[i] + (around ? (double)(float)p.dresidual[i] : 0);
                                double error = EPS32 * (rstd[r] * (dz * 4 + off + fabs(ref.mean_dz[r]) * 3 +
                                                                   z * (off_z + 5 * fabs(ref.mean_dz_z[r]))) +
                                                        fabs(expected));
                                double stored = (error + (fabs(expected) + error) * EPSX) * 1.01;
                                (version == 3 ? dx[kind] : version == 2 ? two : one).within(i, (float)got[i], expected, stored);
                                sum_dx[c] += expected;
                                size_dx[c] += fabs(expected);
                                error_dx[c] += version == 3 ? error : stored;
                            }
                        }
                        for (int i = 0; i < 3; i++) {
                            Property& columns = version == 2   ? two
                                                : version == 1 ? one
                                                : type == F32  ? (i == 0 ? bias32 : sums32)
                                                               : (i == 0 ? bias16 : sums16);
                            for (int c = 0; c < C; c++) {
                                double was = accumulate ? before[i][c] : 0;
                                double expected = (i == 0 ? sum_dx : i == 1 ? ref.dbeta : ref.dgamma)[c] + was;
                                double size = (i == 0 ? size_dx : i == 1 ? ref.terms_beta : ref.terms_gamma)[c] + fabs(was);
                                double error = size * EPS32 * (column_depth(version, rows) + (i == 2 ? 4 : 1)) +
                                               (i == 0 ? error_dx[c] : 0);
                                double storing = type == BF16 ? (fabs(expected) + error) * EPS16 : 0;
                                columns.within(c, sums[i][c], expected, (error + storing) * 1.01);
                            }
                        }
                    }
                }
        }
    printf("backward\n");
    report({&dx[PLAIN], &dx[OFFSET], &dx[EQUAL], &sums32, &sums16, &bias32, &bias16, &again, &unwanted, &two, &one});
}

// Layers of a single shape, from x to the gradients, for what follows.
struct Run {
    std::vector<floatX> y, dx;
    std::vector<float> mean, rstd, dbias, dgamma, dbeta;
    explicit Run(const Problem& p) {
        const int rows = p.rows, C = p.C;
        Buffer<floatX> x(p.x), gamma(p.gamma), beta(p.beta), dy(p.dy), out(p.x.size()), dresidual(p.dresidual);
        Buffer<float> mu(rows), rs(rows), scratch((size_t)3 * norm_slices(rows) * C);
        GradBuffer sum(C, F32), dg(C, F32), db(C, F32);
        layernorm_forward<false>(nullptr, out.p, mu.p, rs.p, x.p, nullptr, gamma.p, beta.p, rows, C, 0);
        layernorm_backward<false>(dresidual.p, sum.grad(), dg.grad(), db.grad(), scratch.p, dy.p, x.p, mu.p, rs.p, gamma.p,
                                  true, false, rows, C, 0);
        y = out.read(), dx = dresidual.read(), mean = mu.read(), rstd = rs.read();
        dbias = sum.read(), dgamma = dg.read(), dbeta = db.read();
    }
};

// What is no number goes where it must, and everything else keeps its bits.
void test_special(uint64_t seed) {
    Property p("a NaN or an infinity in x, gamma, beta, dy or dresidual reaches what it is part of, and only that"),
        wide("a row whose spread is beyond fp32: rstd 0, y = beta"), tiny("a row of denormals: rstd 316, y = beta");
    const int rows = 131, C = 264, r = 66, c = 257;
    Problem clean(seed, rows, C, PLAIN);
    clean.gamma[c] = (floatX)0.75f;
    const Run before(clean);
    enum { NOTHING, ONE, ROW, COLUMN, ALL };
    auto check = [&](const auto& got, const auto& was, int where, int at_row, int at_column, int columns, const char* name) {
        bool fine = true;
        for (size_t i = 0; i < got.size(); i++) {
            bool in_row = (int)i / columns == at_row, in_column = (int)i % columns == at_column;
            bool hit = where == ALL || (where == ROW && in_row) || (where == COLUMN && in_column) ||
                       (where == ONE && in_row && in_column);
            fine &= hit ? !std::isfinite((float)got[i]) : memcmp(&got[i], &was[i], sizeof got[i]) == 0;
        }
        p.is(fine, name);
    };
    struct Case { const char* where; int y, row, dx, dbias, dgamma, dbeta; };
    for (float odd : {NAN, INFINITY, -INFINITY})
        for (const Case& k :
             {Case{"x", ROW, ONE, ROW, ALL, ALL, NOTHING}, Case{"gamma", COLUMN, NOTHING, ALL, ALL, NOTHING, NOTHING},
              Case{"beta", COLUMN, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING},
              Case{"dy", NOTHING, NOTHING, ROW, ALL, ONE, ONE},
              Case{"dresidual", NOTHING, NOTHING, ONE, ONE, NOTHING, NOTHING}}) {
            set_case("%f in %s", odd, k.where);
            Problem q = clean;
            std::string w = k.where;
            (w == "x"       ? q.x[r * C + c]
             : w == "gamma" ? q.gamma[c]
             : w == "beta"  ? q.beta[c]
             : w == "dy"    ? q.dy[r * C + c]
                            : q.dresidual[r * C + c]) = (floatX)odd;
            Run run(q);
            check(run.y, before.y, k.y, r, c, C, "y: expected it elsewhere");
            check(run.mean, before.mean, k.row, r, 0, 1, "mean: expected it elsewhere");
            check(run.rstd, before.rstd, k.row, r, 0, 1, "rstd: expected it elsewhere");
            check(run.dx, before.dx, k.dx, r, c, C, "dx: expected it elsewhere");
            check(run.dbias, before.dbias, k.dbias, 0, c, C, "dbias: expected it elsewhere");
            check(run.dgamma, before.dgamma, k.dgamma, 0, c, C, "dgamma: expected it elsewhere");
            check(run.dbeta, before.dbeta, k.dbeta, 0, c, C, "dbeta: expected it elsewhere");
        }
    Problem q = clean;
    for (int k = 0; k < C; k++) {
        q.x[r * C + k] = (floatX)(k % 2 ? 1e25f : -1e25f);
        q.x[k] = (floatX)(k % 3 * 1e-39f);
    }
    set_case("squares beyond fp32, and denormals");
    const Run run(q);
    wide.is(run.rstd[r] == 0 && std::isfinite(run.mean[r]), "rstd is not 0, or the mean not finite");
    tiny.within(0, run.rstd[0], 1 / sqrt(EPSILON), 1 / sqrt(EPSILON) * EPS32 * 6);
    for (int k = 0; k < C; k++) {
        wide.equal(k, (float)run.y[r * C + k], (float)q.beta[k]);
        wide.is((float)run.dx[r * C + k] == (float)q.dresidual[r * C + k], "dx is not 0");
        tiny.equal(k, (float)run.y[k], (float)q.beta[k]);
    }
    for (int i = 0; i < rows * C; i++)
        if (i / C != 0 && i / C != r) p.is((float)run.y[i] == (float)before.y[i], "y of another row has changed");
    printf("special values\n");
    report({&p, &wide, &tiny});
}

// Index arithmetic beyond 2^31 elements: the first and the last block of each kernel have to make the bits that they make of
// the same rows in a small tensor. A launch of the trainer's backward has 512 blocks at most, each with a long way to go; here
// it has a row a block, so that the partial sums are beyond 2^31 as well.
void test_far(uint64_t seed) {
    constexpr int C = 520, rows = (1 << 22) + 5, NEAR = 8;
    constexpr size_t n = (size_t)rows * C;
    static_assert(n > (size_t)1 << 31, "");
    Property forward("forward beyond 2^31 elements, first and last block", "every bit"),
        backward("backward and its partial sums beyond 2^31 elements, first and last block", "every bit");
    set_case("%d rows of %d", rows, C);
    const Problem p(seed, NEAR, C, PLAIN);
    FarBuffer<floatX> x(n), out(n);   // x takes the part of dy too, and the output that of dresidual
    FarBuffer<float> mean(rows), rstd(rows), partial(3 * n);
    if (!x.p || !out.p || !mean.p || !rstd.p || !partial.p) return;
    auto part = [](const auto& v, size_t count) { return std::decay_t<decltype(v)>(v.begin(), v.begin() + count); };

    Buffer<floatX> near_x(p.x), gamma(p.gamma), beta(p.beta), near_out(p.x.size()), near_dx(p.dresidual);
    Buffer<float> near_mean(NEAR), near_rstd(NEAR), near_partial(3 * p.x.size());
    layernorm_forward<false>(nullptr, near_out.p, near_mean.p, near_rstd.p, near_x.p, nullptr, gamma.p, beta.p, NEAR, C, 0);
    const int threads = ceil_div(C, 32 * VEC) * 32;
    auto launch_backward = [&](int blocks, floatX* dx, float* sums, const floatX* x, const float* mean, const float* rstd) {
        layernorm_backward_kernel<false><<<blocks, threads>>>(dx, sums, x, x, mean, rstd, gamma.p, true, blocks, C);
        cudaCheck(cudaGetLastError());
    };
    launch_backward(NEAR, near_dx.p, near_partial.p, near_x.p, near_mean.p, near_rstd.p);
    const std::vector<floatX> y = near_out.read(), dx = near_dx.read();
    const std::vector<float> m = near_mean.read(), q = near_rstd.read(), sums = near_partial.read();

    const int a_block = norm_warps(C);
    for (int block : {0, ceil_div(rows, a_block) - 1}) {
        const int row = block * a_block, seen = std::min(rows - row, a_block);
        const size_t at = (size_t)row * C, count = (size_t)seen * C;
        x.write(at, part(p.x, count));
        launch_blocks(block, block, [&] {
            layernorm_forward<false>(nullptr, out.p, mean.p, rstd.p, x.p, nullptr, gamma.p, beta.p, rows, C, 0);
        });
        forward.is(same_bits(out.read(at, count), part(y, count)), "y has other bits");
        forward.is(same_bits(mean.read(row, seen), part(m, seen)), "mean has other bits");
        forward.is(same_bits(rstd.read(row, seen), part(q, seen)), "rstd has other bits");
    }
    for (int row : {0, rows - 1}) {
        const size_t at = (size_t)row * C;
        x.write(at, part(p.x, C));
        out.write(at, part(p.dresidual, C));
        mean.write(row, part(m, 1));
        rstd.write(row, part(q, 1));
        launch_blocks(row, row, [&] { launch_backward(rows, out.p, partial.p, x.p, mean.p, rstd.p); });
        backward.is(same_bits(out.read(at, C), part(dx, C)), "dx has other bits");
        for (int i = 0; i < 3; i++) {
            const float* near_sum = &sums[(size_t)i * NEAR * C];
            backward.is(same_bits(partial.read(i * n + at, C), std::vector<float>(near_sum, near_sum + C)),
                        "a sum has other bits");
        }
    }
    printf("far\n");
    report({&forward, &backward});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int rows, int C) {
    const double X = sizeof(floatX);
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: rows %d, C %d", model, rows, C);
    BenchTable t(title, (size_t)rows * C);
    const int r = t.timed ? rows : 1;   // without a GPU nothing runs
    Random random(1337, 1);
    Buffer<floatX> x((size_t)r * C), y((size_t)r * C), dy((size_t)r * C), dx((size_t)r * C), gamma(random.normals(C, 1, 0.5f)),
        beta(random.normals(C));
    for (Buffer<floatX>* b : {&x, &dy, &dx}) b->fill();
    Buffer<float> mean(r), rstd(r), scratch(colsum_scratch(C)), scratch_1((size_t)2 * r);
    cudaCheck(cudaMemset(mean.p, 0, mean.bytes()));
    rstd.fill(0.5f, 1.5f);
    GradBuffer dbias(C, F32), dgamma(C, F32), dbeta(C, F32);
    t.row("forward, version 1: a step a kernel", 4 * X,
          [&] { layernorm_forward_1(y.p, mean.p, rstd.p, x.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, version 2: a row a block", 2 * X,
          [&] { layernorm_forward_2(y.p, mean.p, rstd.p, x.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, version 3: the trainer's, a row a warp", 2 * X,
          [&] { layernorm_forward<false>(nullptr, y.p, mean.p, rstd.p, x.p, nullptr, gamma.p, beta.p, rows, C, 0); });
    t.row("backward, version 1: a formula a kernel", 10 * X, [&] {
        layernorm_backward_1(dx.p, dbias.grad(), dgamma.grad(), dbeta.grad(), scratch_1.p, dy.p, x.p, mean.p, rstd.p, gamma.p,
                             true, false, rows, C, 0);
    });
    t.row("backward, version 2: a pass along rows, one along columns", 7 * X, [&] {
        layernorm_backward_2(dx.p, dbias.grad(), dgamma.grad(), dbeta.grad(), dy.p, x.p, mean.p, rstd.p, gamma.p, true, false,
                             rows, C, 0);
    });
    t.row("backward, version 3: the trainer's, one pass", 4 * X, [&] {
        layernorm_backward<false>(dx.p, dbias.grad(), dgamma.grad(), dbeta.grad(), scratch.p, dy.p, x.p, mean.p, rstd.p,
                                  gamma.p, true, false, rows, C, 0);
    });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "layernorm: LayerNorm, forward and backward");
    if (o.bench) {
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 1600);
        return 0;
    }
    test_misuse(
        o,
        {{"C of 12", "layernorm_forward: C is 12: expected a multiple of 8",
          [] { layernorm_forward<false>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 12, 0); }},
         {"C of 12, backward", "layernorm_backward: C is 12: expected a multiple of 8",
          [] {
              layernorm_backward<false>(nullptr, {}, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, false, false,
                                        1, 12, 0);
          }},
         {"a row beyond 48 KB", "because a row must fit 48 KB", [] {
              layernorm_forward<false>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1,
                                       48 * 1024 / sizeof(floatX) + 8, 0);
          }}});
    printf("layernorm, %s\n", dtype_name(FLOATX));
    test_reference(o.seed);
    test_forward(o.seed);
    test_backward(o.seed);
    test_special(o.seed);
    test_far(o.seed);
    return finish(o);
}
