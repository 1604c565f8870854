/*
LayerNorm with the residual addition before it, forward and backward, and the form in which a norm and the matmul after it share one
tensor (MS-LN): the trainer's kernels, tested, and simpler ones beside them to learn from. Sections 2 and 3 of train_gpt2.cu have
them under "norm", "column sums" and "norm, shared with its matmul".

    make dev/cuda/layernorm && ./dev/cuda/layernorm [--bench]

Forward: x = inp + add, where inp is the residual stream, add is what a matmul made for it, and x is the stream from here on. Over
the C channels of a row: z = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps), out = gamma * z + beta.

Backward: with dz = dout * gamma, the gradient that comes through the norm is rstd * (dz - mean(dz) - z * mean(dz * z)). Add the one
that comes around the norm, and the sum is the gradient of x, hence of inp, hence of add: a sum passes its gradient on to both terms
as it is. The matmul that made add has a bias, and its gradient dbias is the sum of that over the rows. dgamma is the sum over the
rows of dout * z, and dbeta is that of dout.

MS_LN: out is z itself, and the matmul has gamma and beta folded into its weight and bias.

Backward makes the sums that somebody wants: all three, dbias alone, or none. Where gamma is folded into a weight that is trained,
dgamma and dbeta come from that weight's gradient; frozen weights have no gradient, and frozen norms want none.

rmsnorm.cu is this file once more with the norm of train_llama.cu, which knows neither mean nor beta: kRMSNorm is true there.

C is a multiple of 8, and forward needs a row in 48 KB of shared memory: 24576 channels in bf16, 12288 in fp32.
*/
#ifndef TESTING   // or rmsnorm.cu has included its trainer
#define TESTING
#include "../../train_gpt2.cu"
#endif

#include "common.cuh"

// ---- versions of the forward pass

// Version 1: one kernel per step, as the formulas are read. The sum, one element per thread; the mean, then the spread around it,
// one row per thread; the result, one element per thread. Bytes per element in bf16: 2 + 2 read and 2 written for the sum, 2 read
// for each of mean and spread, 2 read and 2 written for the result: 14, where 8 are needed. The kernels for mean and spread have
// 65536 threads for as many rows, a quarter of what a large GPU can hold. The 32 lanes of a warp stand in 32 rows: each load
// touches 32 lines to use 2 bytes of each, and caches have to hold those lines until the lanes have walked along them. And a row is
// added up one by one, with C roundings in a row.
__device__ inline float mean_of(const float* mean, size_t row) { return kRMSNorm ? 0.0f : mean[row]; }
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
__global__ void rstd_1_kernel(float* rstd, const floatX* x, const float* mean, float eps, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float square = 0;
    for (int c = 0; c < C; c++) {
        float away = (float)x[(size_t)row * C + c] - mean_of(mean, row);
        square += away * away;
    }
    rstd[row] = rsqrtf(square / C + eps);
}
__global__ void normalize_1_kernel(floatX* out, const floatX* x, const float* mean, const float* rstd, const floatX* gamma,
                                   const floatX* beta, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    int c = (int)(i % C);
    const float z = ((float)x[i] - mean_of(mean, row)) * rstd[row];
    out[i] = (floatX)((float)gamma[c] * z + (kRMSNorm ? 0.0f : (float)beta[c]));
}
void layernorm_forward_1(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* add,
                         const floatX* gamma, const floatX* beta, float eps, int rows, int C, cudaStream_t) {
    size_t n = (size_t)rows * C;
    add_1_kernel<<<ceil_div(n, 256), 256>>>(residual, inp, add, n);
    if (!kRMSNorm) mean_1_kernel<<<ceil_div(rows, 128), 128>>>(mean, residual, rows, C);
    rstd_1_kernel<<<ceil_div(rows, 128), 128>>>(rstd, residual, mean, eps, rows, C);
    normalize_1_kernel<<<ceil_div(n, 256), 256>>>(out, residual, mean, rstd, gamma, beta, n, C);
}

// Version 2, the trainer's add_norm_forward, gives a row to a warp. Neighbours read neighbours, and a warp's sum is five shuffles
// and no barrier. (A block per row would need a tree in shared memory for each of the two sums, 20 barriers in all, and at each of
// them 8 warps would wait for the slowest.) A lane takes 8 neighbours in one load of 16 bytes (in bf16), and what it will need
// again it leaves in shared memory, where no other lane looks. And it adds while it reads: it reads 2 + 2 bytes and writes x and
// out, 8 bytes in all. An addition of its own would move 6, more than the norm's own 4. What it normalises is the x that it stores,
// rounded to bf16, and not the sum that it had in fp32: who computes the norm once more, from the x that was kept, gets the same
// bits. residual may be inp, and then the stream lies in one tensor for all layers. Or it is null, where nobody needs x any more: 6
// bytes.

// ---- versions of the backward pass

// Version 1 does what the graph says, with one tensor per edge and one kernel per formula. The two means of a row, one row per
// thread: reads dout and x, 4 bytes. What comes through the norm, one element per thread: reads the same, writes a tensor, 6. The
// addition: reads this and the gradient that came around the norm, and writes one result for inp and an equal one for add, 8. Then
// the sums over rows, one column per thread: dgamma reads dout and x, dbeta dout, dbias what was written for add, 4 + 2 + 2. Total:
// 26 bytes. What came through the norm has been rounded to bf16 before it is added, for nobody's benefit. Columns are read in whole
// lines, but C of them are 24 warps at C = 768, on a GPU that can hold thousands, and each thread adds 65536 rows one by one.
__global__ void means_1_kernel(float* mean_dz, float* mean_dz_z, const floatX* dout, const floatX* x, const float* mean,
                               const float* rstd, const floatX* gamma, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0, sum_z = 0;
    for (int c = 0; c < C; c++) {
        size_t i = (size_t)row * C + c;
        float dz = (float)dout[i] * (float)gamma[c];
        if (!kRMSNorm) sum += dz;
        sum_z += dz * (((float)x[i] - mean_of(mean, row)) * rstd[row]);
    }
    mean_dz[row] = sum / C;   // RMSNorm: 0
    mean_dz_z[row] = sum_z / C;
}
__global__ void through_1_kernel(floatX* through, const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                                 const float* mean_dz, const float* mean_dz_z, const floatX* gamma, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t row = i / C;
    float dz = (float)dout[i] * (float)gamma[i % C], z = ((float)x[i] - mean_of(mean, row)) * rstd[row];
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
        sum += (float)dout[i] * (((float)x[i] - mean_of(mean, r)) * rstd[r]);
    }
    grad_store(dgamma, c, sum, accumulate);
}
// through (rows, C) and means (2, rows) are scratch
void layernorm_backward_1(floatX* dinp, floatX* dadd, Grad dbias, Grad dgamma, Grad dbeta, floatX* through, float* means,
                          const floatX* around, const floatX* dout, const floatX* x, const float* mean, const float* rstd,
                          const floatX* gamma, bool accumulate, int rows, int C) {
    size_t n = (size_t)rows * C;
    means_1_kernel<<<ceil_div(rows, 128), 128>>>(means, means + rows, dout, x, mean, rstd, gamma, rows, C);
    through_1_kernel<<<ceil_div(n, 256), 256>>>(through, dout, x, mean, rstd, means, means + rows, gamma, n, C);
    split_1_kernel<<<ceil_div(n, 256), 256>>>(dinp, dadd, around, through, n);
    dgamma_1_kernel<<<ceil_div(C, 128), 128>>>(dgamma, dout, x, mean, rstd, accumulate, rows, C);
    if (!kRMSNorm) bias_backward_1(dbeta, dout, accumulate, rows, C);
    bias_backward_1(dbias, dadd, accumulate, rows, C);
}

// Version 2, the trainer's add_norm_backward, has seen that the gradients around, for inp and for add are never needed at the same
// time with different values: they are one tensor, added to in place. And it makes both kinds of sums, along rows and along
// columns, of one reading. A block goes down a slice of the rows, 8 at a time: first one warp per row, for the sums along it; then,
// after the one barrier, one thread per 8 columns, down the same 8 rows, which lie in the cache by now (25 KB of dout and x at C =
// 768). A thread keeps its columns' sums in registers until the slice ends. 512 slices are a few blocks for each multiprocessor of
// a large GPU. A second kernel adds the slices in their order: 3 * 512 * C floats, which stay in the cache between the two. (Blocks
// could add to a column with atomics, in an order that nobody knows: no two runs would be the same.) 4 elements, 8 bytes.
//
// MS-LN: a norm and its matmul share one tensor. y = (gamma * z + beta) W^T + b. Forward folds gamma and beta into W and b, and
// keeps z and rstd alone. Backward gathers G = dy^T z where dW will be. Once a step the unfolding makes dgamma, dbeta and dW of G,
// W and db. The norm's backward has fewer sums to make then: what gamma and beta need is in G already, which the matmul of the
// weight's gradient had to compute anyway, and G and W have a twentieth of the activation's elements at 124M and B = 64. It moves
// as many bytes as the exact one, and reads z where that reads x: two tensors have become one. norm_fold and norm_unfold read their
// tensors once for all of their results: 4 bytes for an element of W, and 10 with G in fp32.

struct Norm {   // one of the trainer's two
    const char* name;
    bool shared, rms;   // MS_LN; RMSNorm
    decltype(&layernorm_forward_1) forward;
    decltype(&add_norm_backward<false, false>) backward;
};
template <bool MS_LN>
Norm norm_of(const char* name) { return {name, MS_LN, kRMSNorm, add_norm_forward<MS_LN>, add_norm_backward<MS_LN>}; }
const Norm norms[] = {norm_of<false>(kRMSNorm ? "RMSNorm" : "LayerNorm"),
                      norm_of<true>(kRMSNorm ? "RMSNorm, shared" : "LayerNorm, shared")};

// ---- the reference, in double precision

constexpr double EPSILON = 1e-3;   // larger than models have it, so that it is seen if it is missing or another

struct NormRow {
    double mean = 0, rstd, size = 0;   // size: the mean of |x|, which the mean's roundings are relative to
    Doubles z;
    NormRow(const double* x, int C, bool rms) : z(C) {
        double var = 0;
        for (int c = 0; c < C && !rms; c++) mean += x[c] / C, size += fabs(x[c]) / C;
        for (int c = 0; c < C; c++) var += (x[c] - mean) * (x[c] - mean) / C;
        rstd = 1 / sqrt(var + EPSILON);
        for (int c = 0; c < C; c++) z[c] = (x[c] - mean) * rstd;
    }
};

// What comes through the norm in backward, for a row; and the sum of the absolute values of all that it is made of.
struct NormRowGradient {
    Doubles dx, terms;
    NormRowGradient(const Doubles& dz, const Doubles& z, double rstd, bool rms) : dx(dz.size()), terms(dz.size()) {
        const size_t C = dz.size();
        double mean = 0, mean_z = 0, size = 0, size_z = 0;
        for (size_t c = 0; c < C; c++) {
            if (!rms) mean += dz[c] / C, size += fabs(dz[c]) / C;
            mean_z += dz[c] * z[c] / C, size_z += fabs(dz[c] * z[c]) / C;
        }
        for (size_t c = 0; c < C; c++) {
            dx[c] = rstd * (dz[c] - mean - z[c] * mean_z);
            terms[c] = rstd * (fabs(dz[c]) + size + fabs(z[c]) * size_z);
        }
    }
};

// ---- tests

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

// Channels around what a lane, a warp, and a block of the backward kernel take (8, 256, 4096); rows around the 4 of a block of the
// forward kernel, around the 8 that a block of the backward kernel takes at a time, and slices of 16 and 17 rows; 18 and 512
// slices, which 2 and 32 warps add up. Then channels of which 4, 3, 2 rows and 1 just fit forward's block, and some that just do
// not.
struct Shape { int rows, C; };
bool is_large(const Shape& s) { return s.rows * s.C > 20000; }
std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (int C : {8, 24, 136, 256, 264, 1000})
        for (int rows : {1, 3, 8, 9, 65})
            if (!SANITIZED || rows == 3 || rows == 9) all.push_back({rows, C});
    for (Shape s : {Shape{301, 24}, {301, 264}, {8195, 8}, {17, 4096}, {17, 4104}})
        if (!SANITIZED || s.rows == 17) all.push_back(s);
    const int most = (int)(48 * 1024 / sizeof(floatX));
    for (int C : {most / 4, most / 4 + 8, most / 3 / 8 * 8 + 8, most / 2, most / 2 + 8, most}) all.push_back({5, C});
    if (kRMSNorm) all.erase(std::remove_if(all.begin(), all.end(), is_large), all.end());   // LayerNorm goes the same ways
    return all;
}
bool in_part(const Norm& h, const Shape& s) { return h.rms || is_large(s); }   // of the test: to save time
// Where n terms are added one by one, and not by lanes and slices, roundings may all go the same way.
double one_by_one(bool simple, int n) { return simple ? 1 + n / 32.0 : 1; }
constexpr double STORED = EPSX / ROUNDINGS;   // what storing on the way costs, as a multiple of close()'s terms

// Where x and out are put. The trainer calls it with x in inp, and with out in add.
enum Place { APART, IN_INP, IN_ADD, DROPPED };
struct Way { const char* name; Place x, out; bool twice; };
const Way ways[] = {{"x and out apart", APART, APART, false},          {"x dropped", DROPPED, APART, false},
                    {"x in inp", IN_INP, APART, false},                {"x in add", IN_ADD, APART, false},
                    {"out in add", APART, IN_ADD, false},              {"x in inp, out in add", IN_INP, IN_ADD, false},
                    {"x dropped, out in add", DROPPED, IN_ADD, false}, {"x = inp + inp, in inp", IN_INP, APART, true}};
enum { ALL_APART, X_DROPPED };

struct Forward {
    std::vector<floatX> x, out;      // x: empty if dropped
    std::vector<float> mean, rstd;   // mean: as it was, NaN, where it is not kept
    bool operator==(const Forward& f) const {
        return (x.empty() || f.x.empty() || same_bits(x, f.x)) && same_bits(out, f.out) && same_bits(mean, f.mean) &&
               same_bits(rstd, f.rstd);
    }
};
// only_read: where inp or add shares a tensor with nothing that is written, it has to be as before.
Forward forward(const Norm& h, const Problem& p, const Way& way, bool with_add, Property& only_read, bool simple = false) {
    Buffer<floatX> inp(p.inp), add(p.add), gamma(p.gamma), beta(p.beta), x(p.n), out(p.n);
    Buffer<float> mean(p.rows), rstd(p.rows);
    Buffer<floatX>* x_at = way.x == IN_INP ? &inp : way.x == IN_ADD ? &add : &x;
    Buffer<floatX>* out_at = way.out == IN_ADD ? &add : &out;
    (simple ? layernorm_forward_1 : h.forward)(
        way.x == DROPPED ? nullptr : x_at->p, out_at->p, mean.p, rstd.p, inp.p, !with_add ? nullptr : way.twice ? inp.p : add.p,
        h.shared ? nullptr : gamma.p, h.shared || h.rms ? nullptr : beta.p, (float)EPSILON, p.rows, p.C, 0);
    only_read.is(way.x == IN_INP || same_bits(inp.read(), p.inp), "inp has changed");
    only_read.is(way.x == IN_ADD || way.out == IN_ADD || same_bits(add.read(), p.add), "add has changed");
    return {way.x == DROPPED ? std::vector<floatX>() : x_at->read(), out_at->read(), mean.read(), rstd.read()};
}

// x is exact. An error of the mean shifts all z alike, and adds its square to the variance.
void test_forward(const Norm& h, uint64_t seed) {
    Property x_is("x = inp + add, or inp where there is no add", "every bit"),
        out[ROW_KINDS] = {{h.shared ? "z" : "out"}, {"the same of rows around 1e4", "in fp32 most of it is the mean's"},
                          {"the same of rows of equal values", "z is 0 but for the mean's roundings, times 316"}},
        stats("mean and rstd"), same("the same bits again, in place, with out in add, with x dropped"),
        once_more("the same bits where the norm is computed once more, from the x that was kept"),
        only_read("what is only read has not changed"), simple("version 1: x, out and statistics");
    const bool has_mean = !h.shared && !h.rms;
    for (auto [rows, C] : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            if (kind != PLAIN && in_part(h, {rows, C})) continue;
            const Problem p(seed, rows, C, kind);
            for (bool with_add : {true, false}) {
                const std::vector<floatX> x = with_add ? p.sum() : p.inp;
                const Doubles wide = doubles(x);
                Forward first;
                for (bool one : {false, true}) {   // version 1
                    if (one && (h.shared || !with_add)) continue;
                    set_case("C %d, rows %d, %s, %s%s", C, rows, KIND_NAMES[kind], with_add ? "inp + add" : "inp",
                             one ? ", version 1" : "");
                    const Forward f = forward(h, p, ways[ALL_APART], with_add, only_read, one);
                    if (!one) first = f;
                    for (size_t i = 0; i < p.n; i++) (one ? simple : x_is).equal(i, (float)f.x[i], (float)x[i]);
                    const double deep = one_by_one(one, C);
                    for (int r = 0; r < rows; r++) {
                        const NormRow ref(&wide[(size_t)r * C], C, h.rms);
                        const double shift = deep * ref.size * ref.rstd, square = ROUNDINGS * shift * shift;
                        Property& s = one ? simple : stats;
                        if (has_mean) s.close(r, f.mean[r], ref.mean, deep * ref.size, EPS32);
                        else s.equal(r, f.mean[r], NAN);
                        s.close(r, f.rstd[r], ref.rstd, ref.rstd * (deep + square), EPS32);
                        for (int c = 0; c < C; c++) {
                            const double g = h.shared ? 1 : (float)p.gamma[c], b = has_mean ? (float)p.beta[c] : 0;
                            const double terms = fabs(g) * (shift + fabs(ref.z[c]) * deep) + fabs(b);
                            (one ? simple : out[kind]).close(c, (float)f.out[(size_t)r * C + c], g * ref.z[c] + b, terms);
                        }
                    }
                }
                Problem kept = p;
                kept.inp = x;
                once_more.is(first == forward(h, kept, ways[X_DROPPED], false, only_read), "other bits");
                if (kind != PLAIN || (in_part(h, {rows, C}) && C < 4000)) continue;
                for (const Way& way : ways) {
                    if (!with_add && (way.x == IN_ADD || way.out == IN_ADD || way.twice)) continue;
                    set_case("C %d, rows %d, %s, %s", C, rows, with_add ? "inp + add" : "inp", way.name);
                    Problem twice = p;
                    twice.add = p.inp;
                    same.is(forward(h, p, way, with_add, only_read) ==
                                (way.twice ? forward(h, twice, ways[ALL_APART], true, only_read) : first), "other bits");
                }
            }
        }
    printf("%s: forward\n", h.name);
    report({&x_is, &out[PLAIN], &stats, &same, &once_more, &only_read});
    if (!h.rms) report({&out[OFFSET], &out[EQUAL]});
    if (!h.shared) report({&simple});
}

struct Kept {   // of forward, for backward
    std::vector<floatX> kept;   // x; shared: z
    std::vector<float> mean, rstd;
};
struct Backward {
    std::vector<floatX> dx;
    std::vector<float> sums[3];   // dbias, dbeta, dgamma; RMSNorm: no dbeta
    bool operator==(const Backward& b) const {
        return same_bits(dx, b.dx) && std::equal(sums, sums + 3, b.sums, same_bits<float>);
    }
};
// The trainer's, in a second run, and where some of the sums are not wanted.
enum Version { ONE = 1, TRAINERS, AGAIN, NO_BIAS, BIAS_ALONE, NO_SUM };
bool has_sum(const Norm& h, int i) { return i != 1 || !h.rms; }
bool wants(Version v, int i) { return v == NO_BIAS ? i > 0 : v == BIAS_ALONE ? i == 0 : v != NO_SUM; }
// around: whether the stream has a gradient there already, or NaN, and is written. before: what the sums are added to.
Backward backward(const Norm& h, const Problem& p, const Kept& k, Version version, bool around, DType type,
                  const std::vector<float>* before, Property& only_read) {
    const int rows = p.rows, C = p.C, sums = version == NO_SUM ? 0 : version == BIAS_ALONE ? 1 : h.rms ? 2 : 3;
    const bool accumulate = before != nullptr;
    Buffer<floatX> dout(p.dout), kept(k.kept), gamma(p.gamma), dx(p.n);
    Buffer<float> mean(k.mean), rstd(k.rstd), scratch((size_t)sums * norm_slices(rows) * C);   // no more than is used
    GradBuffer dbias(C, type), dbeta(C, type), dgamma(C, type);
    if (accumulate) dbias.write(before[0]), dbeta.write(before[1]), dgamma.write(before[2]);
    if (around) dx.write(p.around);
    Backward b;
    if (version == ONE) {
        Buffer<floatX> dinp(p.n), dadd(p.n), through(p.n);
        Buffer<float> means((size_t)2 * rows);
        layernorm_backward_1(dinp.p, dadd.p, dbias.grad(), dgamma.grad(), dbeta.grad(), through.p, means.p, dx.p, dout.p,
                             kept.p, mean.p, rstd.p, gamma.p, accumulate, rows, C);
        b.dx = dinp.read();
        only_read.is(same_bits(b.dx, dadd.read()) && same_bits(dx.read(), p.around), "dadd is not dinp, or around has changed");
    } else {
        auto grad = [&](int i, const GradBuffer& g) { return has_sum(h, i) && wants(version, i) ? g.grad() : Grad{}; };
        h.backward(dx.p, grad(0, dbias), grad(2, dgamma), grad(1, dbeta), sums ? scratch.p : nullptr, dout.p, kept.p,
                   h.shared || h.rms ? nullptr : mean.p, rstd.p, gamma.p, around, accumulate, rows, C, 0);
        b.dx = dx.read();
    }
    b.sums[0] = dbias.read();
    if (has_sum(h, 1)) b.sums[1] = dbeta.read();
    b.sums[2] = dgamma.read();
    only_read.is(same_bits(dout.read(), p.dout) && same_bits(kept.read(), k.kept), "dout or what was kept has changed");
    return b;
}

// Both versions get the same mean and rstd, the reference's in fp32, and have to make of them what the formulas say.
void test_backward(const Norm& h, uint64_t seed) {
    Property dx[ROW_KINDS] = {{"dx"}, {"dx of rows around 1e4"}, {"dx of rows of equal values"}},
        sums32("dbias, dbeta and dgamma in fp32"), sums16("the same in bf16"), again("the same bits in a second run"),
        unwanted("the same bits of the rest where some of these are not wanted"),
        only_read("what is only read has not changed"), simple("version 1: dx and the sums");
    for (Shape shape : shapes())
        for (RowKind kind : {PLAIN, OFFSET, EQUAL}) {
            const auto [rows, C] = shape;
            if (kind != PLAIN && in_part(h, shape)) continue;
            const Problem p(seed, rows, C, kind);
            Kept k = {p.sum(), {}, {}};
            std::vector<NormRowGradient> ref;
            std::vector<Doubles> z;
            for (int r = 0; r < rows; r++) {
                floatX* x = &k.kept[(size_t)r * C];
                const NormRow row(doubles(std::vector<floatX>(x, x + C)).data(), C, h.rms);
                k.mean.push_back((float)row.mean), k.rstd.push_back((float)row.rstd);
                Doubles dz(C), zr(C);
                for (int c = 0; c < C; c++) {
                    if (h.shared) x[c] = (floatX)(((float)x[c] - k.mean[r]) * k.rstd[r]);
                    zr[c] = h.shared ? (float)x[c] : ((double)(float)x[c] - k.mean[r]) * k.rstd[r];
                    dz[c] = (double)(float)p.dout[(size_t)r * C + c] * (float)p.gamma[c];
                }
                ref.emplace_back(dz, zr, k.rstd[r], h.rms);
                z.push_back(zr);
            }
            Random random(seed, 5);
            const std::vector<float> before[3] = {random.grads(C), random.grads(C), random.grads(C)};
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    const bool around = accumulate == (type == F32);   // both kinds of dx with both kinds of gradients
                    if (!around && (kind != PLAIN || in_part(h, shape))) continue;
                    Backward first;
                    for (Version version : {TRAINERS, AGAIN, NO_BIAS, BIAS_ALONE, NO_SUM, ONE}) {
                        const bool one = version == ONE;
                        if ((one && (h.shared || !around)) || version == (type == F32 ? NO_SUM : BIAS_ALONE)) continue;
                        set_case("C %d, rows %d, %s, %s gradients %s, dx %s, version %d", C, rows, KIND_NAMES[kind],
                                 dtype_name(type), accumulate ? "added to" : "written", around ? "added" : "written", version);
                        Backward b = backward(h, p, k, version, around, type, accumulate ? before : nullptr, only_read);
                        if (version == TRAINERS) first = b;
                        if (version == AGAIN) again.is(b == first, "other bits");
                        for (int i = 0; i < 3; i++) {
                            if (!has_sum(h, i) || wants(version, i)) continue;
                            for (int c = 0; c < C; c++) unwanted.equal(c, b.sums[i][c], accumulate ? before[i][c] : NAN);
                            b.sums[i] = first.sums[i];
                        }
                        if (version > AGAIN) unwanted.is(b == first, "other bits");
                        if (version >= AGAIN) continue;
                        const double deep = one_by_one(one, C), deep_columns = one_by_one(one, rows);
                        Doubles sum[3] = {Doubles(C, 0), Doubles(C, 0), Doubles(C, 0)}, terms[3] = {sum[0], sum[0], sum[0]};
                        for (int r = 0; r < rows; r++)
                            for (int c = 0; c < C; c++) {
                                const size_t i = (size_t)r * C + c;
                                const double was = around ? (float)p.around[i] : 0, d = (float)p.dout[i];
                                const double expected = was + ref[r].dx[c], size = fabs(was) + ref[r].terms[c] * deep;
                                // version 1 stores what comes through the norm before it adds it
                                const double stored = one ? STORED * fabs(ref[r].dx[c]) : 0;
                                (one ? simple : dx[kind]).close(i, (float)b.dx[i], expected, size + stored);
                                sum[0][c] += expected, terms[0][c] += size + stored + (one ? STORED * fabs(expected) : 0);
                                sum[1][c] += d, terms[1][c] += fabs(d);
                                sum[2][c] += d * z[r][c], terms[2][c] += fabs(d * z[r][c]);
                            }
                        for (int i = 0; i < 3; i++)
                            for (int c = 0; has_sum(h, i) && c < C; c++) {
                                const double was = accumulate ? before[i][c] : 0, size = fabs(was) + terms[i][c] * deep_columns;
                                Property& sums = one ? simple : type == F32 ? sums32 : sums16;
                                sums.close(c, b.sums[i][c], sum[i][c] + was, size, store_of(type));
                            }
                    }
                }
        }
    printf("%s: backward\n", h.name);
    report({&dx[PLAIN], &sums32, &sums16, &again, &unwanted, &only_read});
    if (!h.rms) report({&dx[OFFSET], &dx[EQUAL]});
    if (!h.shared) report({&simple});
}

// Where a NaN or an infinity must go: nowhere, into its element, its row, its column, everything. For check_reach.
enum Where { NO, ONE_ITEM, ROW, COLUMN, ALL };
auto reach(Where where, int row, int column, int columns) {
    return [=](size_t i) {
        const bool in_row = (int)i / columns == row, in_column = (int)i % columns == column;
        return where == ALL || (where == ROW ? in_row : where == COLUMN ? in_column : where == ONE_ITEM && in_row && in_column);
    };
}
void test_special(const Norm& h, uint64_t seed) {
    Property p("a NaN or an infinity in any input reaches what it is part of, and only that"),
        only_read("what is only read has not changed");
    const int rows = 131, C = 264, r = 66, c = 257;
    const size_t at = (size_t)r * C + c;
    Problem clean(seed, rows, C, PLAIN);
    clean.gamma[c] = (floatX)0.75f;
    auto run = [&](const Problem& q) {
        const Forward f = forward(h, q, ways[ALL_APART], true, only_read);
        return std::make_pair(f, backward(h, q, {h.shared ? f.out : f.x, f.mean, f.rstd}, TRAINERS, true, F32, nullptr, only_read));
    };
    const auto before = run(clean);
    const Where column = h.shared ? NO : COLUMN, beta = h.rms ? NO : column;   // RMSNorm has none
    struct Case { const char* name; std::vector<floatX> Problem::*in; size_t at; Where x, out, stats, dx, sums[3]; };
    // RMSNorm makes zeros of what stands beside an infinity: other bits, and no NaN
    for (float odd : h.rms ? std::vector<float>{NAN} : std::vector<float>{NAN, -INFINITY})
        for (const Case& k : {Case{"inp", &Problem::inp, at, ONE_ITEM, ROW, ONE_ITEM, ROW, {ALL, NO, ALL}},
                              {"add", &Problem::add, at, ONE_ITEM, ROW, ONE_ITEM, ROW, {ALL, NO, ALL}},
                              {"gamma", &Problem::gamma, c, NO, column, NO, ALL, {ALL, NO, NO}},
                              {"beta", &Problem::beta, c, NO, beta, NO, NO, {NO, NO, NO}},
                              {"dout", &Problem::dout, at, NO, NO, NO, ROW, {ALL, ONE_ITEM, ONE_ITEM}},
                              {"around", &Problem::around, at, NO, NO, NO, ONE_ITEM, {ONE_ITEM, NO, NO}}}) {
            set_case("%f in %s", odd, k.name);
            Problem q = clean;
            (q.*k.in)[k.at] = (floatX)odd;
            const auto [f, b] = run(q);
            check_reach(p, f.x, before.first.x, reach(k.x, r, c, C), "x");
            check_reach(p, f.out, before.first.out, reach(k.out, r, c, C), "out");
            if (!h.shared && !h.rms) check_reach(p, f.mean, before.first.mean, reach(k.stats, r, 0, 1), "mean");
            check_reach(p, f.rstd, before.first.rstd, reach(k.stats, r, 0, 1), "rstd");
            check_reach(p, b.dx, before.second.dx, reach(k.dx, r, c, C), "dx");
            for (int i = 0; i < 3; i++) check_reach(p, b.sums[i], before.second.sums[i], reach(k.sums[i], 0, c, C), "a sum");
        }
    printf("%s: special values\n", h.name);
    report({&p, &only_read});
}

// Index arithmetic beyond 2^31 elements, in place as the trainer calls it, in the first and the last block. The trainer's backward
// has 512 blocks at most, each with a long way to go; here it has one block per row, so that the partial sums are beyond 2^31 too.
template <bool MS_LN> void test_far(uint64_t seed) {
    constexpr int C = 520, rows = (1 << 22) + 5, NEAR = 4, threads = (C + 32 * VEC - 1) / (32 * VEC) * 32;
    constexpr size_t n = (size_t)rows * C, sums = kRMSNorm ? 2 : 3;
    static_assert(n > (size_t)1 << 31, "");
    Property forth("forward in place, out in add, beyond 2^31 elements, first and last block", "every bit"),
        back("backward in place beyond 2^31 elements, first and last block", "every bit");
    set_case("%d rows of %d, %s", rows, C, MS_LN ? "shared" : "exact");
    const Problem p(seed, NEAR, C, PLAIN);
    Buffer<floatX> gamma(p.gamma), beta(p.beta);
    Far<floatX> x(n, p.inp, C, C), y(n, p.add, C, C);   // forward: inp and x, add and out; backward: dresidual, dout and kept
    Far<float> mean(rows, std::vector<float>(NEAR, 0.25f), 1, 1), rstd(rows, std::vector<float>(NEAR, 0.75f), 1, 1);
    Far<float> partial(sums * n, sums * NEAR * C, C, C, sums, n);
    auto move = [&](int row, int seen) {
        x.at = y.at = partial.at = (size_t)row * C, mean.at = rstd.at = row;
        x.rows = y.rows = partial.rows = mean.rows = rstd.rows = seen;
    };
    for (int row : {0, (rows - 1) / NEAR * NEAR}) {   // 4 rows per block
        move(row, std::min(rows - row, NEAR));
        check_far(forth, {&x, &y, &mean, &rstd}, {row / NEAR}, [&](bool far) {
            add_norm_forward<MS_LN>(x.p(far), y.p(far), mean.p(far), rstd.p(far), x.p(far), y.p(far), gamma.p, beta.p,
                                    (float)EPSILON, far ? rows : NEAR, C, 0);
        });
    }
    for (int row : {0, rows - 1}) {
        move(row, 1);
        check_far(back, {&x, &y, &mean, &rstd, &partial}, {row}, [&](bool far) {
            const int blocks = far ? rows : NEAR;
            add_norm_backward_kernel<MS_LN, kRMSNorm, ALL_SUMS><<<blocks, threads>>>(
                x.p(far), partial.p(far), y.p(far), y.p(far), mean.p(far), rstd.p(far), gamma.p, true, blocks, C);
        });
    }
    report({&forth, &back});
}

// ---- tests of folding and unfolding

struct FoldInput {   // the matmul after a shared norm
    int OC, C;
    std::vector<floatX> W, b, gamma, beta;
    std::vector<float> G, db;   // as gradients of either type can hold them
    FoldInput(uint64_t seed, int OC, int C) : OC(OC), C(C) {
        Random random(seed, ((uint64_t)OC << 32) + C);
        W = random.normals((size_t)OC * C, 0, 1 / sqrtf(C)), b = random.normals(OC);
        gamma = random.normals(C, 1, 0.5f), beta = random.normals(C, 0.25f, 0.5f);
        G = random.grads((size_t)OC * C, 1), db = random.grads(OC, 1);
    }
};
struct Folded {
    std::vector<floatX> W, b;
    std::vector<float> dW, dgamma, dbeta;
    bool operator==(const Folded& f) const {
        return same_bits(W, f.W) && same_bits(b, f.b) && same_bits(dW, f.dW) && same_bits(dgamma, f.dgamma) &&
               same_bits(dbeta, f.dbeta);
    }
};
enum Has { BETA_AND_B, NEITHER, BETA };   // NEITHER: b' and dbeta stay NaN; BETA: an adapter, which has no b of its own
Folded fold(const FoldInput& p, DType type, Has has = BETA_AND_B) {
    Buffer<floatX> W(p.W), b(p.b), gamma(p.gamma), beta(p.beta), folded(p.W.size()), folded_b(p.OC);
    GradBuffer dW(p.W.size(), type), db(p.OC, type), dgamma(p.C, type), dbeta(p.C, type);
    Buffer<float> scratch((size_t)2 * colsum_slices(p.OC) * p.C);   // no more than is used
    dW.write(p.G), db.write(p.db);
    if (has == NEITHER) {
        norm_fold(folded.p, nullptr, PlainWeight{W.p}, nullptr, gamma.p, nullptr, p.OC, p.C, 0);
        norm_unfold(dW.grad(), dgamma.grad(), {}, scratch.p, {}, W.p, gamma.p, nullptr, p.OC, p.C, 0);
    } else {
        norm_fold(folded.p, folded_b.p, PlainWeight{W.p}, has == BETA ? nullptr : b.p, gamma.p, beta.p, p.OC, p.C, 0);
        norm_unfold(dW.grad(), dgamma.grad(), dbeta.grad(), scratch.p, db.grad(), W.p, gamma.p, beta.p, p.OC, p.C, 0);
    }
    return {folded.read(), folded_b.read(), dW.read(), dgamma.read(), dbeta.read()};
}

// OC is a multiple of 8 in a model, because matmuls need it so; folding and unfolding do not care, and with other numbers the last
// block has warps without a row.
void test_fold(uint64_t seed) {
    Property weight("W'", "every bit"), bias("b'"), unfolded("unfolding: dW"), sums("unfolding: dgamma and dbeta"),
        again("the same bits in a second run"), unwritten("without beta and b, there is no b' and no dbeta"),
        nan("a NaN or an infinity in any input reaches what it is part of, and only that");
    std::vector<Shape> shapes = {{1101, 24}};   // 17 slices, which two warps add up
    for (int C : {8, 24, 136, 264, 1000})
        for (int OC : {1, 7, 13, 40, 264})
            if (!SANITIZED || OC < 40) shapes.push_back({OC, C});
    for (auto [OC, C] : shapes)
        for (DType type : {F32, BF16})
            for (Has has : {BETA_AND_B, NEITHER, BETA}) {
                const char* const names[] = {"beta and b", "neither beta nor b", "beta"};
                const bool rms = has == NEITHER;
                set_case("C %d, OC %d, %s gradients, %s", C, OC, dtype_name(type), names[has]);
                const FoldInput p(seed, OC, C);
                const Folded f = fold(p, type, has);
                again.is(f == fold(p, type, has), "other bits");
                Doubles gamma(C, 0), gamma_terms(C, 0), beta(C, 0), beta_terms(C, 0);
                for (int o = 0; o < OC; o++) {
                    double sum = has == BETA ? 0 : (float)p.b[o], terms = fabs(sum);
                    for (int c = 0; c < C; c++) {
                        const size_t i = (size_t)o * C + c;
                        const double w = (float)p.W[i], g = (float)p.gamma[c], be = rms ? 0 : (float)p.beta[c], db = p.db[o];
                        weight.equal(i, (float)f.W[i], (float)(floatX)((float)p.W[i] * (float)p.gamma[c]));
                        unfolded.close(i, f.dW[i], p.G[i] * g + db * be, fabs(p.G[i] * g) + fabs(db * be), store_of(type));
                        sum += w * be, terms += fabs(w * be);
                        gamma[c] += p.G[i] * w, gamma_terms[c] += fabs(p.G[i] * w);
                        beta[c] += db * w, beta_terms[c] += fabs(db * w);
                    }
                    if (rms) unwritten.equal(o, (float)f.b[o], NAN);
                    else bias.close(o, (float)f.b[o], sum, terms);
                }
                for (int c = 0; c < C; c++) {
                    sums.close(c, f.dgamma[c], gamma[c], gamma_terms[c], store_of(type));
                    if (rms) unwritten.equal(c, f.dbeta[c], NAN);
                    else sums.close(c, f.dbeta[c], beta[c], beta_terms[c], store_of(type));
                }
            }

    const int OC = 40, C = 96, o = 11, c = 5;
    const FoldInput clean(seed, OC, C);
    const Folded before = fold(clean, F32);
    auto with = [&](const char* name, auto in, size_t at, Where W, Where b, Where dW, Where dgamma, Where dbeta) {
        for (float odd : {NAN, INFINITY}) {
            set_case("%f in %s", odd, name);
            FoldInput p = clean;
            (p.*in)[at] = odd;
            const Folded f = fold(p, F32);
            check_reach(nan, f.W, before.W, reach(W, o, c, C), "W'");
            check_reach(nan, f.b, before.b, reach(b, 0, o, OC), "b'");
            check_reach(nan, f.dW, before.dW, reach(dW, o, c, C), "dW");
            check_reach(nan, f.dgamma, before.dgamma, reach(dgamma, 0, c, C), "dgamma");
            check_reach(nan, f.dbeta, before.dbeta, reach(dbeta, 0, c, C), "dbeta");
        }
    };
    with("W", &FoldInput::W, o * C + c, ONE_ITEM, ONE_ITEM, NO, ONE_ITEM, ONE_ITEM);
    with("b", &FoldInput::b, o, NO, ONE_ITEM, NO, NO, NO);
    with("gamma", &FoldInput::gamma, c, COLUMN, NO, COLUMN, NO, NO);
    with("beta", &FoldInput::beta, c, NO, ALL, COLUMN, NO, NO);
    with("G", &FoldInput::G, o * C + c, NO, NO, ONE_ITEM, ONE_ITEM, NO);
    with("db", &FoldInput::db, o, NO, NO, ROW, NO, ALL);
    printf("folding and unfolding\n");
    report({&weight, &bias, &unfolded, &sums, &again, &unwritten, &nan});
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
    const FoldInput p(seed, NEAR, C);
    Buffer<floatX> gamma(p.gamma), beta(p.beta);
    Far<floatX> weight(n, p.W, C, C), folded(n, (size_t)NEAR * C, C, C), bias(OC, p.b, 1, 1), folded_bias(OC, NEAR, 1, 1);
    Far<float> dweight(n, p.G, C, C), dbias(OC, p.db, 1, 1);
    Far<float> partial((size_t)2 * slices * C, (size_t)2 * C, C, C, 2, (size_t)slices * C);
    auto move = [&](int first, int rows) {
        weight.at = folded.at = dweight.at = (size_t)first * C, bias.at = folded_bias.at = dbias.at = first;
        weight.rows = folded.rows = dweight.rows = bias.rows = folded_bias.rows = dbias.rows = rows;
        return rows;
    };
    for (int block : {0, (OC - 1) / 8}) {
        const int rows = move(block * 8, std::min(OC - block * 8, 8));
        check_far(fold, {&weight, &folded, &bias, &folded_bias}, {block}, [&](bool far) {
            norm_fold(folded.p(far), folded_bias.p(far), PlainWeight{weight.p(far)}, bias.p(far), gamma.p, beta.p, far ? OC : rows, C,
                      0);
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
        });
    }
    report({&fold, &unfold});
}

// ---- benchmark

void bench(const char* model, int rows, int C) {
    const int OC = 4 * C;
    const double X = sizeof(floatX);
    BenchTable t((size_t)rows * C, BenchTable::BYTES, "%s: rows %d, C %d", model, rows, C);
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
    auto forward = [&](auto layer) {
        return [&, layer] { layer(dx.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, (float)EPSILON, rows, C, 0); };
    };
    auto backward = [&](auto layer, Grad dg, Grad de) {
        return [=, &dx, &scratch, &dout, &x, &mean, &rstd, &gamma] {
            layer(dx.p, db, dg, de, scratch.p, dout.p, x.p, mean.p, rstd.p, gamma.p, true, false, rows, C, 0);
        };
    };
    const double less = kRMSNorm ? X : 0;   // version 1 does not read x for a mean, nor dout for dbeta
    t.row("forward, version 1: one kernel per step", 7 * X - less, forward(layernorm_forward_1));
    t.row("forward, version 2: the trainer's, one warp per row", 4 * X, forward(add_norm_forward<false>));
    t.row("forward, version 2, shared: keeps z alone", 4 * X, forward(add_norm_forward<true>));
    t.row("backward, version 1: one kernel per formula", 13 * X - less, [&] {
        layernorm_backward_1(out.p, dadd.p, db, dg, de, through.p, means.p, dx.p, dout.p, x.p, mean.p, rstd.p, gamma.p, false,
                             rows, C);
    });
    t.row("backward, version 2: the trainer's, one pass", 4 * X, backward(add_norm_backward<false>, dg, de));
    t.row("backward, version 2, shared: the bias alone", 4 * X, backward(add_norm_backward<true>, {}, {}));

    BenchTable u((size_t)OC * C, BenchTable::BYTES, "%s: the matmul's weight, %d x %d, gradients in fp32", model, OC, C);
    u.row("fold, the trainer's (once per micro-batch)", 2 * X,
          [&] { norm_fold(folded.p, folded_bias.p, PlainWeight{weight.p}, bias.p, gamma.p, beta.p, OC, C, 0); });
    u.row("unfold, the trainer's (once per step)", 8 + X,
          [&] { norm_unfold(dW, dg, de, scratch.p, db, weight.p, gamma.p, beta.p, OC, C, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "the residual addition and a norm, exact or shared with its matmul");
    if (o.bench) return bench_models(bench);
    floatX* none = nullptr;
    auto forward = [=](int C) { add_norm_forward<false>(none, none, nullptr, nullptr, none, none, none, none, (float)EPSILON, 1, C, 0); };
    auto backward = [=] {
        add_norm_backward<true>(none, {}, {}, {}, nullptr, none, none, nullptr, nullptr, none, false, false, 1, 12, 0);
    };
    test_misuse(o, {refuses_12("add_norm_forward: C", [=] { forward(12); }), refuses_12("add_norm_backward: C", backward),
                    refuses_12("norm_fold: C", [=] { norm_fold(none, none, PlainWeight{none}, none, none, none, 8, 12, 0); }),
                    refuses_12("norm_unfold: C", [=] { norm_unfold({}, {}, {}, nullptr, {}, none, none, none, 8, 12, 0); }),
                    {"a row beyond 48 KB", "because a row must fit 48 KB", [=] { forward(48 * 1024 / sizeof(floatX) + 8); }}});
    printf("%s, %s\n", norms[0].name, dtype_name(FLOATX));
    for (const Norm& h : norms) {
        test_forward(h, o.seed);
        test_backward(h, o.seed);
        test_special(h, o.seed);
    }
    test_far<false>(o.seed);
    test_far<true>(o.seed);
    if (!kRMSNorm) {   // the same kernels, with beta or without
        test_fold(o.seed);
        test_far_fold(o.seed);
    }
    return finish(o);
}
