/*
Causal attention: the trainer's kernels, tested, and simpler ones beside them to learn from. The two sections on attention in
train_gpt2.cu explain the kernels.

    make dev/cuda/attention && ./dev/cuda/attention [--bench]

A query sees the keys up to its own place. Forward, for a query of a head of HS channels:
    s_j = q k_j / sqrt(HS)      p = softmax(s)      out = sum_j p_j v_j      lse = log(sum_j exp(s_j))
Backward, from dout:
    dp_j = dout v_j      delta = sum_j p_j dp_j = dout out      ds_j = p_j (dp_j - delta)      dq = sum_j ds_j k_j / sqrt(HS)
and, summed over the queries that see key j, dk_j = sum ds_j q / sqrt(HS) and dv_j = sum p_j dout. Backward also makes the gradient
of the bias of the matmul that made qkv: the column sums of dq, dk and dv.

A row of qkv has q of NH heads, then k and v of NKV heads, each of which serves NH / NKV query heads. HS is a multiple of 8, up to
128; for 64 and 128 in bf16 the trainer uses tensor cores.

A row of T tokens may hold several documents, one after the other. Then a query sees the keys of its own document alone, from its
beginning on, which each token is told: a second border of the triangle of pairs, and tiles that lie beyond it are never loaded.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

struct Shape {
    int B, T, NH, NKV, HS;
    int group() const { return NH / NKV; }
    size_t stride() const { return (size_t)(NH + 2 * NKV) * HS; }   // of a row of qkv
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
    AttShape device() const { return att_shape(T, NH, NKV, HS); }
};
// What all versions take.
struct Tensors {
    floatX *out, *dqkv;           // (B, T, NH*HS) and (B, T, (NH + 2 NKV)*HS)
    const floatX *qkv, *dout;     // the same
    float *lse, *delta;           // (B, NH, T); delta: scratch
    float* scratch;               // attention_scratch(B, T, NH, NKV, HS)
    Grad dbias;                   // ((NH + 2 NKV)*HS)
    floatX* p;                    // (B, NH, T, T), of version 1
    const int* document;          // (B, T) where each token's document begins; null: all at 0. Versions 1 and 2 do without
    floatX* dkv;                  // (B, T, 2 NKV*HS): the trainer's backward in place: dout goes over out, and dqkv is qkv; null: not so
};

// ---- version 1: the formulas, one kernel for each

// Scores, softmax and output are kernels of their own, so s and p go through memory: B x NH x T x T of them. In GPT-2 124M at B =
// 64 and T = 1024 that is 805 million elements per layer, 1.6 GB in bf16, where qkv has 0.3 GB. Backward wants p again, so the 1.6
// GB are kept for each of the 12 layers, 19 GB: about as much again as the rest of a layer keeps. The causal half of them is
// written and read, written and read again: 3.2 GB of traffic for forward, beside the 0.4 GB that versions move which store none of
// it. Backward would take a second such tensor, for dp and ds, and 5.6 GB of traffic instead of 1.2; its formulas are not repeated
// here. All of this doubles with T for each token. What is stored is also rounded: a score of 20 to the nearest 1/8, which makes
// its exponential wrong by up to 6 %. The kernels waste more than that. Neighbouring threads have neighbouring keys, which lie a
// row of qkv (4.6 KB) apart, so a load of a warp touches 32 lines to use 2 bytes of each. A thread of the softmax owns a row of
// scores, with the same effect.

// One thread for each (query, key): a block has 128 keys of one query of one head. What is masked is never touched.
__global__ void attention_1_scores_kernel(floatX* scores, const floatX* qkv, AttShape s) {
    int key = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y, b = blockIdx.z / s.NH, h = blockIdx.z % s.NH;
    if (key > query) return;
    const floatX *q = qkv + s.qkv_at(b, query, h), *k = qkv + s.qkv_at(b, key, s.k_head(h));
    float sum = 0;
    for (int c = 0; c < s.HS; c++) sum += (float)q[c] * (float)k[c];
    scores[s.lse_at(b, h, query) * s.T + key] = (floatX)(sum * s.scale);
}
__global__ void attention_1_softmax_kernel(floatX* p, float* lse, int rows, int T) {   // in place of the scores
    int row = blockIdx.x * blockDim.x + threadIdx.x, query = row % T;
    if (row >= rows) return;
    p += (size_t)row * T;
    float max = -INFINITY, sum = 0;
    for (int j = 0; j <= query; j++) max = fmaxf(max, (float)p[j]);
    for (int j = 0; j <= query; j++) sum += expf((float)p[j] - max);
    for (int j = 0; j <= query; j++) p[j] = (floatX)(expf((float)p[j] - max) / sum);
    lse[row] = max + logf(sum);
}
__global__ void attention_1_values_kernel(floatX* out, const floatX* p, const floatX* qkv, size_t n, AttShape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // (b, query, h, c)
    if (i >= n) return;
    const int c = i % s.HS, h = i / s.HS % s.NH, query = i / s.HS / s.NH % s.T, b = i / s.HS / s.NH / s.T;
    const floatX* v = qkv + s.qkv_at(b, 0, s.v_head(h)) + c;
    p += s.lse_at(b, h, query) * s.T;
    float sum = 0;
    for (int j = 0; j <= query; j++) sum += (float)p[j] * (float)v[j * s.stride()];
    out[i] = (floatX)sum;
}
void attention_forward_1(const Tensors& x, const Shape& s) {
    attention_1_scores_kernel<<<dim3(ceil_div(s.T, 128), s.T, s.B * s.NH), 128>>>(x.p, x.qkv, s.device());
    attention_1_softmax_kernel<<<ceil_div(s.rows(), 128), 128>>>(x.p, x.lse, s.rows(), s.T);
    attention_1_values_kernel<<<ceil_div(s.out(), 128), 128>>>(x.out, x.p, x.qkv, s.out(), s.device());
}

// ---- version 2: one thread per query, nothing stored

// A thread walks along the keys of its query with a running maximum and sum: when a larger score comes, what was summed so far
// shrinks by exp(old maximum - new maximum). That needs neither all scores at once nor a second pass, and leaves one number per
// row, lse, from which backward gets any p back as exp(s - lse). T x T is gone from memory: forward moves 8 bytes for an element of
// out, backward 24 and the 6 of the bias.
// What it wastes now is inside the GPU. The output is up to 128 floats per thread, in loops whose length the compiler does not
// know, so it lies in local memory. A pair of a query and a key, 256 flops at HS = 64, reads q and reads and writes the output, 768
// bytes of the L1 cache, and a multiprocessor moves 128 bytes of that in the time of 256 flops. Keys and values come 2 bytes at a
// time from global memory; all lanes of a warp want the same ones, which is one access for 32, but it is an access for each
// multiplication. Every pair takes two exponentials, and a warp runs as long as its last query.
//
// Version 3 is the trainer's plain one. HS / 32 threads share a row, so that q and the output are 32 floats each and stay in
// registers; 64 rows take tiles of 16 keys through shared memory, loaded once for all of them, 16 bytes at a time; the maximum
// moves once a tile: 17 exponentials for 16 pairs. What is left is multiplication in fp32, of which a load from shared memory feeds
// four.
//
// Version 4 is the trainer's for tensor cores, which multiply 16 x 16 by 16 x 8 in one instruction, some 15 times as fast as all
// fp32 units together. They take bf16, so p and ds are rounded before they are multiplied, by 2^-8 at most, and the errors average
// out in the sums. In return the layout of registers is the hardware's: train_gpt2.cu has the drawing. The gradient of the bias,
// for which the other versions read dqkv once more, is summed from results that are still in registers.
constexpr int HEAD_MAX = 128;
__global__ void attention_2_forward_kernel(floatX* out, float* lse, const floatX* qkv, int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, h, query)
    if (row >= rows) return;
    const int HS = shape.HS, query = row % shape.T, h = row / shape.T % shape.NH, b = row / shape.T / shape.NH;
    const floatX* q = qkv + shape.qkv_at(b, query, h);
    float o[HEAD_MAX], max = -INFINITY, sum = 0;
    for (int c = 0; c < HS; c++) o[c] = 0;
    for (int j = 0; j <= query; j++) {
        const floatX *k = qkv + shape.qkv_at(b, j, shape.k_head(h)), *v = qkv + shape.qkv_at(b, j, shape.v_head(h));
        float s = 0;
        for (int c = 0; c < HS; c++) s += (float)q[c] * (float)k[c];
        s *= shape.scale;
        float larger = fmaxf(max, s), shrink = expf(max - larger), p = expf(s - larger);
        max = larger;
        sum = sum * shrink + p;
        for (int c = 0; c < HS; c++) o[c] = o[c] * shrink + p * (float)v[c];
    }
    for (int c = 0; c < HS; c++) out[shape.out_at(b, query, h) + c] = (floatX)(o[c] / sum);
    lse[row] = max + logf(sum);
}
void attention_forward_2(const Tensors& x, const Shape& s) {
    attention_2_forward_kernel<<<ceil_div(s.rows(), 128), 128>>>(x.out, x.lse, x.qkv, s.rows(), s.device());
}

// Backward has sums of two shapes: dq is one over the keys of a query, dk and dv are sums over the queries that see a key. With one
// thread per query the second would need atomics, whose order nobody knows. So there are two kernels, one thread per query and a
// key a thread, and both compute s and dp: 7 products of T x T x HS where 5 would do. The trainer's two versions do the same.
__global__ void attention_2_dq_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* qkv, const floatX* out,
                                      const float* lse, int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, h, query)
    if (row >= rows) return;
    const int HS = shape.HS, query = row % shape.T, h = row / shape.T % shape.NH, b = row / shape.T / shape.NH;
    const floatX *q = qkv + shape.qkv_at(b, query, h), *d = dout + shape.out_at(b, query, h), *o = out + shape.out_at(b, query, h);
    float dq[HEAD_MAX], row_delta = 0;
    for (int c = 0; c < HS; c++) dq[c] = 0, row_delta += (float)d[c] * (float)o[c];
    for (int j = 0; j <= query; j++) {
        const floatX *k = qkv + shape.qkv_at(b, j, shape.k_head(h)), *v = qkv + shape.qkv_at(b, j, shape.v_head(h));
        float s = 0, dp = 0;
        for (int c = 0; c < HS; c++) s += (float)q[c] * (float)k[c], dp += (float)d[c] * (float)v[c];
        float ds = expf(s * shape.scale - lse[row]) * (dp - row_delta);
        for (int c = 0; c < HS; c++) dq[c] += ds * (float)k[c];
    }
    delta[row] = row_delta;
    for (int c = 0; c < HS; c++) dqkv[shape.qkv_at(b, query, h) + c] = (floatX)(dq[c] * shape.scale);
}
__global__ void attention_2_dkv_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse, const float* delta,
                                       int rows, AttShape shape) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;   // (b, head of k and v, key)
    if (row >= rows) return;
    const int T = shape.T, NKV = shape.NKV, HS = shape.HS, key = row % T, kv = row / T % NKV, b = row / T / NKV;
    const size_t to_k = shape.qkv_at(b, key, shape.NH + kv), to_v = to_k + NKV * HS;
    float dk[HEAD_MAX], dv[HEAD_MAX];
    for (int c = 0; c < HS; c++) dk[c] = dv[c] = 0;
    for (int h = kv * shape.group(); h < (kv + 1) * shape.group(); h++)
        for (int t = key; t < T; t++) {
            const floatX *q = qkv + shape.qkv_at(b, t, h), *d = dout + shape.out_at(b, t, h);
            float s = 0, dp = 0;
            for (int c = 0; c < HS; c++) s += (float)q[c] * (float)qkv[to_k + c], dp += (float)d[c] * (float)qkv[to_v + c];
            float p = expf(s * shape.scale - lse[shape.lse_at(b, h, t)]), ds = p * (dp - delta[shape.lse_at(b, h, t)]);
            for (int c = 0; c < HS; c++) dk[c] += ds * (float)q[c], dv[c] += p * (float)d[c];
        }
    for (int c = 0; c < HS; c++) dqkv[to_k + c] = (floatX)(dk[c] * shape.scale), dqkv[to_v + c] = (floatX)dv[c];
}
void attention_backward_2(const Tensors& x, bool accumulate, const Shape& s) {
    const int rows = s.rows(), kv_rows = s.B * s.NKV * s.T;
    attention_2_dq_kernel<<<ceil_div(rows, 128), 128>>>(x.dqkv, x.delta, x.dout, x.qkv, x.out, x.lse, rows, s.device());
    attention_2_dkv_kernel<<<ceil_div(kv_rows, 128), 128>>>(x.dqkv, x.dout, x.qkv, x.lse, x.delta, kv_rows, s.device());
    bias_backward(x.dbias, x.scratch, x.dqkv, accumulate, s.B * s.T, s.stride(), 0);
}

// ---- all versions, called alike

// TRAINER is what the trainer calls: version 4 where there is one, else version 3. THREE is version 3 for any size of head.
enum Way { ONE, TWO, THREE, TRAINER };   // versions; ONE has no backward
bool tensor_cores(Way way, int HS) { return way == TRAINER && !kFP32 && (HS == 64 || HS == 128); }

void forward(Way way, const Tensors& x, const Shape& s) {
    if (way == ONE) return attention_forward_1(x, s);
    if (way == TWO) return attention_forward_2(x, s);
    if (way == TRAINER) return attention_forward(x.out, x.lse, x.qkv, x.document, s.B, s.T, s.NH, s.NKV, s.HS, 0);
    auto run = s.HS <= 32 ? attention_forward_launch<1> : s.HS <= 64 ? attention_forward_launch<2> : attention_forward_launch<4>;
    run(x.out, x.lse, x.qkv, s.B, s.device(), {x.document}, 0);
}
void backward(Way way, const Tensors& x, bool accumulate, const Shape& s) {
    if (way == TWO) return attention_backward_2(x, accumulate, s);
    if (way == TRAINER && x.dkv) {   // rows in two parts, as chunks of rows come
        const int rows = s.B * s.T, columns = s.NH * s.HS, half = (rows + 1) / 2;
        for (int first = 0; first < rows; first += half)
            attention_delta(x.out + (size_t)first * columns, x.delta, x.dout + (size_t)first * columns, first, std::min(half, rows - first), s.T, s.NH, s.HS, 0);
    }
    if (way == TRAINER)
        return attention_backward(x.dqkv, x.dkv, x.dbias, x.delta, x.scratch, x.dkv ? x.out : x.dout, x.qkv, x.dkv ? nullptr : x.out, x.lse,
                                  x.document, accumulate, s.B, s.T, s.NH, s.NKV, s.HS, 0);
    auto run = s.HS <= 32 ? attention_backward_launch<1> : s.HS <= 64 ? attention_backward_launch<2> : attention_backward_launch<4>;
    run({x.dqkv, x.dqkv + s.NH * s.HS, (int)s.stride()}, nullptr, x.delta, x.dout, x.qkv, x.out, x.lse, s.B, s.device(), {x.document}, 0);
    bias_backward(x.dbias, x.scratch, x.dqkv, accumulate, s.B * s.T, (int)s.stride(), 0);
}
struct Buffers {
    Buffer<floatX> qkv, dout, out, dqkv, dkv, p;
    Buffer<float> lse, delta, scratch;
    GradBuffer dbias;
    Buffers(const Shape& s, bool version_1, DType grad_type = F32)
        : qkv(s.qkv()), dout(s.out()), out(s.out()), dqkv(s.qkv()), dkv((size_t)s.B * s.T * 2 * s.NKV * s.HS), p(version_1 ? s.rows() * s.T : 1), lse(s.rows()),
          delta(s.rows()), scratch(s.scratch()), dbias(s.stride(), grad_type) {}
    Tensors tensors() const { return {out.p, dqkv.p, qkv.p, dout.p, lse.p, delta.p, scratch.p, dbias.grad(), p.p, nullptr, nullptr}; }
};

// Random numbers; or, with best keys: each query has one key whose score is about 1e4 and more than 104 above all others, so that p
// is 1 and 0.
struct Problem {
    Shape shape;
    std::vector<floatX> qkv, dout;
    std::vector<float> before;   // the gradient of the bias that is added to
    std::vector<int> best;       // (B, T)
    std::vector<int> document;   // (B, T); empty: none
    int first_key(int b, int t) const { return document.empty() ? 0 : document[b * shape.T + t]; }

    Problem(uint64_t seed, Shape s, bool best_keys = false) : shape(s) {
        Random random(seed, ((((uint64_t)s.B * 2000 + s.T) * 200 + s.HS) * 100 + s.NH * 10 + s.NKV) * 2 + best_keys);
        qkv = random.normals(s.qkv());
        dout = random.normals(s.out());
        before = random.grads(s.stride());
        if (!best_keys) return;
        // keys are codes of +-1 times a number, no two alike, and a query is the code of its key
        const float size = s.HS < 16 ? 64 : 32;
        std::vector<float> codes((size_t)s.T * s.HS);
        for (int t = 0; t < s.T; t++)
            for (int c = 0; c < s.HS; c++) codes[t * s.HS + c] = (c < 8 ? t >> c & 1 : random.bits() & 1) ? size : -size;
        for (int b = 0; b < s.B; b++)
            for (int t = 0; t < s.T; t++) {
                best.push_back((int)(random.bits() % (t + 1)));
                for (int c = 0; c < s.HS; c++) {
                    for (int kv = 0; kv < s.NKV; kv++) qkv[s.k_at(b, t, kv) + c] = (floatX)codes[t * s.HS + c];
                    for (int h = 0; h < s.NH; h++) qkv[s.q_at(b, t, h) + c] = (floatX)codes[best.back() * s.HS + c];
                }
            }
    }
};

struct Result {
    std::vector<floatX> out, dqkv;
    std::vector<float> lse, dbias;
};
Result compute(const Problem& p, Way way, DType grad_type = F32, bool accumulate = false, bool bias = true, bool in_place = false) {
    Buffers b(p.shape, way == ONE, grad_type);
    b.qkv.write(p.qkv);
    b.dout.write(p.dout);
    if (accumulate) b.dbias.write(p.before);
    Buffer<int> document(p.document);
    Tensors x = b.tensors();
    if (!p.document.empty()) x.document = document.p;
    forward(way, x, p.shape);
    if (!bias) x.dbias = {}, x.scratch = nullptr;
    const std::vector<floatX> out = b.out.read();
    if (in_place) x.dqkv = b.qkv.p, x.dkv = b.dkv.p;
    if (way != ONE) backward(way, x, accumulate, p.shape);
    b.p.read(), b.scratch.read(), b.delta.read(), b.dkv.read(), b.out.read();   // for their guards
    return {out, (in_place ? b.qkv : b.dqkv).read(), b.lse.read(), b.dbias.read()};
}

// ---- the reference in double precision

struct Expected { Doubles out, lse, dqkv, dbias, out_terms, lse_terms, dqkv_terms, dbias_terms; };   // terms: of tolerance()

// sum a b and sum |a b|
inline void dots(const double* a, const double* b, int n, double* sum, double* size) {
    *sum = *size = 0;
    for (int c = 0; c < n; c++) *sum += a[c] * b[c], *size += fabs(a[c] * b[c]);
}
// a += factor x, terms += weight |x|
inline void add_row(double* __restrict a, double* __restrict terms, const double* __restrict x, double factor, double weight,
                    int n) {
    for (int c = 0; c < n; c++) a[c] += factor * x[c], terms[c] += weight * fabs(x[c]);
}

// A term counts once for its own rounding. A p counts as often as its score has terms, because an exponential makes a relative
// error of an absolute one, and as often as all scores of its row have in the mean, because it is divided by their sum. And what is
// rounded to bf16 on the way counts as LOW. Tensor cores take p and ds so; version 1 stores scores and p.
Expected reference(const Problem& problem, Way way) {
    const Shape& z = problem.shape;
    const int T = z.T, HS = z.HS;
    constexpr double LOW = EPS16 / ROUNDINGS;
    const bool stored = way == ONE && !kFP32, tc = tensor_cores(way, HS);
    const double scale = 1 / sqrt((double)HS), of_stored = stored ? LOW : 1, of_operand = stored || tc ? LOW : 1;
    Expected e = {Doubles(z.out()), Doubles(z.rows()), Doubles(z.qkv()), Doubles(z.stride()),
                  Doubles(z.out()), Doubles(z.rows()), Doubles(z.qkv()), Doubles(z.stride())};
    const Doubles x = doubles(problem.qkv), d = doubles(problem.dout);
    Doubles s(T), s_size(T), p(T);
    for (int b = 0; b < z.B; b++)
        for (int h = 0; h < z.NH; h++)
            for (int i = 0; i < T; i++) {
                const int kv = h / z.group(), first = problem.first_key(b, i);
                const double *q = &x[z.q_at(b, i, h)], *di = &d[z.out_at(b, i, h)];
                double *out = &e.out[z.out_at(b, i, h)], *out_terms = &e.out_terms[z.out_at(b, i, h)];
                double max = -INFINITY, sum = 0, mean_size = 0, delta = 0, delta_terms = 0;
                for (int j = first; j <= i; j++) {
                    dots(q, &x[z.k_at(b, j, kv)], HS, &s[j], &s_size[j]);
                    s[j] *= scale, s_size[j] *= scale;
                    max = std::max(max, s[j]);
                }
                for (int j = first; j <= i; j++) sum += p[j] = exp(s[j] - max);
                for (int j = first; j <= i; j++)
                    if ((p[j] /= sum) > 0) mean_size += p[j] * s_size[j];
                auto weight = [&](int j) { return (1 + s_size[j] + mean_size) * of_stored + of_operand; };   // of p[j]
                e.lse[z.lse_at(b, i, h)] = max + log(sum);
                e.lse_terms[z.lse_at(b, i, h)] = 1 + fabs(max + log(sum)) + mean_size * of_stored;
                for (int j = first; j <= i; j++)
                    if (p[j] > 0) add_row(out, out_terms, &x[z.v_at(b, j, kv)], p[j], p[j] * weight(j), HS);
                if (way == ONE) continue;
                for (int c = 0; c < HS; c++) {
                    delta += di[c] * out[c];
                    delta_terms += fabs(di[c]) * (tolerance(out[c], out_terms[c]) / ROUNDINGS + fabs(out[c]));
                }
                double *dq = &e.dqkv[z.q_at(b, i, h)], *dq_terms = &e.dqkv_terms[z.q_at(b, i, h)];
                for (int j = first; j <= i; j++) {
                    if (p[j] == 0) continue;   // a score of -inf: a key that is not there
                    const size_t k = z.k_at(b, j, kv), v = z.v_at(b, j, kv);
                    double dp, dp_size;
                    dots(di, &x[v], HS, &dp, &dp_size);
                    const double ds = p[j] * (dp - delta),
                                 ds_weight = p[j] * (dp_size + delta_terms) + fabs(ds) * weight(j);
                    add_row(dq, dq_terms, &x[k], ds * scale, ds_weight * scale, HS);
                    add_row(&e.dqkv[k], &e.dqkv_terms[k], q, ds * scale, ds_weight * scale, HS);
                    add_row(&e.dqkv[v], &e.dqkv_terms[v], di, p[j], p[j] * weight(j), HS);
                }
            }
    for (size_t i = 0; i < z.qkv(); i++) {   // tensor cores sum what is not rounded yet
        e.dbias[i % z.stride()] += e.dqkv[i];
        e.dbias_terms[i % z.stride()] += e.dqkv_terms[i] + fabs(e.dqkv[i]) * (tc || kFP32 ? 1 : LOW);
    }
    return e;
}

// ---- tests

const char* const NAMES[] = {"version 1: T x T tensors", "version 2: one thread per query", "version 3: the trainer's plain one",
                             "version 4: the trainer's on tensor cores"};
// The trainer's is version 3 where it has no tensor cores.
int number_of(Way way, int HS) { return tensor_cores(way, HS) ? 3 : std::min((int)way, 2); }
const char* describe(const Shape& s, Way way) {
    static char t[120];
    snprintf(t, sizeof t, "version %d, B %d, T %d, %d heads on %d of %d channels", number_of(way, s.HS) + 1, s.B, s.T, s.NH, s.NKV,
             s.HS);
    return t;
}

struct Statements {   // of each version
    Property of[4][3] = {{NAMES[0]}, {NAMES[1], "dq, dk, dv", "bias gradient"}, {NAMES[2], "dq, dk, dv", "bias gradient"},
                         {NAMES[3], "dq, dk, dv", "bias gradient"}};   // the first: of out and lse
    void compare(const Problem& problem, Way way, const Result& ours, DType type, bool accumulate) {
        const Shape& s = problem.shape;
        const Expected e = reference(problem, way);
        auto& [out, dqkv, dbias] = of[number_of(way, s.HS)];
        for (size_t i = 0; i < s.out(); i++) out.close(i, (float)ours.out[i], e.out[i], e.out_terms[i]);
        for (size_t i = 0; i < s.rows(); i++) out.close(i, ours.lse[i], e.lse[i], e.lse_terms[i], EPS32);
        if (way == ONE) return;
        for (size_t i = 0; i < s.qkv(); i++) dqkv.close(i, (float)ours.dqkv[i], e.dqkv[i], e.dqkv_terms[i]);
        for (size_t c = 0; c < s.stride(); c++) {
            const double before = accumulate ? problem.before[c] : 0;
            dbias.close(c, ours.dbias[c], before + e.dbias[c], e.dbias_terms[c] + fabs(before), store_of(type));
        }
    }
    void print(const char* title = nullptr) {
        if (title) printf("%s\n", title);
        for (auto& [out, dqkv, dbias] : of)
            if (dqkv.compared) report({&out, &dqkv, &dbias});
            else if (out.compared) report({&out});
    }
};

void test_random(uint64_t seed, bool large) {
    Statements statements, in_place;
    Property again("the same bits in a second run"), no_bias("without a gradient of the bias: the same dqkv, and no scratch");
    std::vector<Shape> shapes;
    for (int HS : {8, 24, 32, 40, 64, 72, 80, 96, 128}) {
        shapes.insert(shapes.end(), {{3, 1, 6, 2, HS}, {HS > 64 ? 1 : 2, 31, 4, HS > 64 ? 1 : 2, HS}, {1, 65, 2, 1, HS}});
        for (int T : {63, 64, 128, 129})
            if (HS == 24 || HS == 40 || HS == 64 || HS == 72 || HS == 128) shapes.push_back({1, T, T == 64 ? 2 : 1, 1, HS});
        if (HS == 24 || HS == 64 || HS == 128) shapes.push_back({1, 257, 1, 1, HS});
        if (large && HS >= 64 && HS % 64 == 0) shapes.push_back({1, 1000, 1, 1, HS});
    }
    int turn = 0;
    for (const Shape& s : shapes) {
        const bool tc = tensor_cores(TRAINER, s.HS);
        if (SANITIZED && s.T != 1 && s.T != 31 && s.T != 65 && s.T * s.HS != 129 * 64) continue;
        turn++;
        const Problem p(seed, s);
        for (Way way : {TRAINER, THREE, TWO, ONE}) {
            // without tensor cores the trainer's is version 3
            if (way == THREE ? !tc || (s.T != 31 && s.T != 65) : way != TRAINER && s.T > (SANITIZED ? 31 : 65)) continue;
            const DType type = turn % 2 ? F32 : BF16;
            const bool accumulate = turn / 2 % 2;
            set_case("%s, %s gradient, %s", describe(s, way), dtype_name(type), accumulate ? "added to" : "written");
            const Result ours = compute(p, way, type, accumulate);
            statements.compare(p, way, ours, type, accumulate);
            if (way == TRAINER) {
                set_case("in place, %s, %s gradient, %s", describe(s, way), dtype_name(type), accumulate ? "added to" : "written");
                in_place.compare(p, way, compute(p, way, type, accumulate, true, true), type, accumulate);
            }
            if (way == TRAINER && s.T == 31)
                no_bias.is(same_bits(ours.dqkv, compute(p, way, type, accumulate, false).dqkv), "other bits");
            if (way == TRAINER && s.T == (tc ? 65 : 31) && !SANITIZED) {
                const Result b = compute(p, way, type, accumulate);
                again.is(same_bits(ours.out, b.out) && same_bits(ours.dqkv, b.dqkv) && same_bits(ours.lse, b.lse) &&
                             same_bits(ours.dbias, b.dbias),
                         "other bits");
            }
        }
    }
    statements.print();
    in_place.print("in place: dout over out, dq, dk and dv over q, k and v");
    if (!SANITIZED) report({&again});
    report({&no_bias});
}

// Rows of documents. A document's tokens have in fp32, and in bf16 by plain arithmetic, the bits that they have alone, wherever in
// the row it begins and whatever stands beside it: sums go key by key. On tensor cores they go by tiles of 64, so that is so where
// it begins with one.
void test_documents(uint64_t seed) {
    Statements statements;
    Property alone("a document has the bits that it has alone (tensor cores: if it begins at a multiple of 64)"),
        whole("rows of one document each have the bits that they have without");
    const std::vector<int> several = {64, 1, 1, 62, 32, 3, 60, 64, 33}, single(40, 1), one = {70};   // lengths
    for (int HS : {24, 64, 128})
        for (Way way : {TRAINER, THREE})
            for (const std::vector<int>& lengths : {several, single, one}) {
                const int T = lengths == several ? 160 : lengths == single ? 40 : 70;
                const Shape s = {lengths == several ? 2 : 1, T, 2, 1, HS};
                const bool tc = tensor_cores(way, HS);
                if (way == THREE && (!tensor_cores(TRAINER, HS) || lengths != several)) continue;
                if (SANITIZED && (HS != 64 || lengths == single)) continue;
                set_case("%s, %zu documents", describe(s, way), lengths.size());
                Problem p(seed, s);
                std::vector<int> begin;   // of each, in (B, T)
                for (int length : lengths) {
                    begin.push_back((int)p.document.size());
                    p.document.insert(p.document.end(), length, begin.back() % T);
                }
                const Result ours = compute(p, way, F32, true);
                statements.compare(p, way, ours, F32, true);
                if (way == TRAINER) statements.compare(p, way, compute(p, way, F32, true, true, true), F32, true);
                for (size_t i = 0; i < lengths.size(); i += 1 + i / 4) {
                    if (tc && begin[i] % T % 64 != 0) continue;
                    const int first = begin[i], length = lengths[i], b = first / T, t = first % T;
                    Problem part(seed, {1, length, s.NH, s.NKV, HS});
                    auto rows = [&](const std::vector<floatX>& v, size_t columns) {
                        return std::vector<floatX>(v.begin() + first * columns, v.begin() + (first + length) * columns);
                    };
                    part.qkv = rows(p.qkv, s.stride()), part.dout = rows(p.dout, s.NH * HS);
                    const Result r = compute(part, way);
                    std::vector<float> lse;
                    for (int h = 0; h < s.NH; h++) lse.insert(lse.end(), &ours.lse[s.lse_at(b, t, h)], &ours.lse[s.lse_at(b, t, h)] + length);
                    alone.is(same_bits(r.out, rows(ours.out, s.NH * HS)) && same_bits(r.lse, lse), "out and lse of document " + std::to_string(i));
                    alone.is(same_bits(r.dqkv, rows(ours.dqkv, s.stride())), "dq, dk, dv of document " + std::to_string(i));
                }
                if (lengths != one) continue;
                p.document.clear();
                const Result r = compute(p, way, F32, true);
                whole.is(same_bits(r.out, ours.out) && same_bits(r.lse, ours.lse) && same_bits(r.dqkv, ours.dqkv) &&
                             same_bits(r.dbias, ours.dbias), "other bits");
            }
    statements.print("documents");
    report({&alone, &whole});
}

// Scores so large that p is 1 for one key and 0 for all others.
void test_scores(uint64_t seed) {
    Property value("scores around 1e4: out is the value of the best key, and lse is its score");
    for (int HS : {8, 40, 64, 128})
        for (Way way : {TRAINER, THREE, TWO, ONE}) {
            const Shape s = {1, 37, 2, 1, HS};
            if (way == THREE && !tensor_cores(TRAINER, HS)) continue;
            set_case("one large score, %s", describe(s, way));
            const Problem p(seed, s, true);
            const Result ours = compute(p, way);
            for (int t = 0; t < s.T; t++)
                for (int h = 0; h < s.NH; h++) {
                    const size_t at = s.out_at(0, t, h), v = s.v_at(0, p.best[t], 0);
                    double score = 0;
                    for (int c = 0; c < HS; c++) {
                        value.close(at + c, (float)ours.out[at + c], (float)p.qkv[v + c], fabs((float)p.qkv[v + c]));
                        score += (float)p.qkv[s.q_at(0, t, h) + c] * (float)p.qkv[s.k_at(0, p.best[t], 0) + c] / sqrt(HS);
                    }
                    value.close(at, ours.lse[s.lse_at(0, t, h)], score, score, way == ONE ? EPSX : EPS32);   // which stores s
                }
        }
    report({&value});
}

// Where a NaN goes. It must reach what depends on it: a query's NaN the keys up to it, a key's the queries from it on. A masked
// pair has p = 0, and 0 * NaN is NaN: so in gradients it may reach further. All this is in the same sequence and the same group of
// heads. Everything else has the same bits as without the NaN: that is also what shows that no kernel reads beyond a head, a
// sequence or a tensor, into zeros times NaN.
void test_nan(uint64_t seed) {
    Property p("a NaN in q, k, v or dout goes where it must, and all else keeps its bits");
    struct Case { Way way; Shape shape; };
    for (const Case& a : {Case{TRAINER, {2, 70, 2, 2, 24}}, {TRAINER, {2, 50, 2, 2, 40}}, {TRAINER, {1, 50, 2, 1, 72}},
                          {TRAINER, {2, 50, 2, 1, 64}}, {TRAINER, {1, 70, 1, 1, 128}}, {TWO, {2, 50, 4, 2, 8}}}) {
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
                const bool query = what == 'q' || what == 'd';
                const int heads = query ? s.NH : s.NKV, b = t == 0 ? s.B - 1 : turn % s.B,
                          head = t == 0 ? heads - 1 : turn % heads, c = turn % 3 ? 0 : s.HS - 1;
                set_case("%s: NaN in %s, b %d, head %d, row %d, channel %d", describe(s, a.way),
                         what == 'd' ? "dout" : std::string(1, what).c_str(), b, head, t, c);
                Problem broken = clean;
                const size_t at = what == 'd' ? s.out_at(b, t, head) : what == 'q' ? s.q_at(b, t, head)
                                  : what == 'k' ? s.k_at(b, t, head) : s.v_at(b, t, head);
                (what == 'd' ? broken.dout : broken.qkv)[at + c] = (floatX)NAN;
                const Result ours = compute(broken, a.way);
                // of row `row` of out, lse, dQ, dK or dV, in the NaN's channel or in another
                auto reach = [&](char of, int b2, int row, int h, bool in_channel) {
                    const bool keys = of == 'K' || of == 'V';
                    if (b2 != b || (keys ? h : h / s.group()) != (query ? head / s.group() : head)) return NOT;
                    if (of == 'V' && (what == 'v' || (what == 'd' && !in_channel))) return NOT;
                    if (keys) return !query || row <= t ? MUST : MAY;   // the last query sees all keys
                    if (query) return h == head && row == t && (what == 'q' || of == 'Q') ? MUST : NOT;
                    if (what == 'v' && (of == 'l' || (of == 'o' && !in_channel))) return NOT;
                    return row >= t ? MUST : what == 'v' || of == 'Q' ? MAY : NOT;
                };
                auto out = [&](size_t i) {
                    return reach('o', i / s.HS / s.NH / s.T, i / s.HS / s.NH % s.T, i / s.HS % s.NH, (int)i % s.HS == c);
                };
                auto lse = [&](size_t i) { return reach('l', i / s.T / s.NH, i % s.T, i / s.T % s.NH, false); };
                auto dqkv = [&](size_t i) {
                    const int h = i / s.HS % (s.NH + 2 * s.NKV), k = h - s.NH, v = k - s.NKV;
                    const char of = k < 0 ? 'Q' : v < 0 ? 'K' : 'V';
                    return reach(of, i / s.stride() / s.T, i / s.stride() % s.T, k < 0 ? h : v < 0 ? k : v, (int)i % s.HS == c);
                };
                std::vector<Reach> columns(s.stride(), NOT);
                for (size_t i = 0; i < s.qkv(); i++) {
                    Reach &column = columns[i % s.stride()], r = dqkv(i);
                    if (r == MUST || column == NOT) column = r;
                }
                check_reach(p, ours.out, without.out, out, "out");
                check_reach(p, ours.lse, without.lse, lse, "lse");
                check_reach(p, ours.dqkv, without.dqkv, dqkv, "dqkv");
                check_reach(p, ours.dbias, without.dbias, [&](size_t i) { return columns[i]; }, "bias gradient");
            }
    }
    report({&p});
}

// A great many short sequences, or rows of a great many heads: the last sequence, or the last head.
void test_far(uint64_t seed) {
    Property p("tensors beyond 2^31 elements", "every bit of the same problem in small ones");
    for (int HS : {128, 40})
        for (bool wide : {false, true}) {
            const int T = wide ? 80 : 5;   // of wide rows the last third lies beyond 2^31
            const int many = wide ? 37500000 / (3 * HS) : (int)(((size_t)1 << 31) / (T * HS)) + 1000;
            const Shape near = {1, T, 1, 1, HS}, s = {wide ? 1 : many, T, wide ? many : 1, wide ? many : 1, HS};
            const int b = s.B - 1, h = s.NH - 1;
            set_case("%s", describe(s, TRAINER));
            const Problem problem(seed, near);
            const size_t head = (size_t)s.NH * HS;   // of out: from row to row; of qkv: from q to k and v
            Far<floatX> qkv(s.qkv(), problem.qkv, HS, head, T, s.stride()), dqkv(s.qkv(), near.qkv(), HS, head, T, s.stride()),
                out(s.out(), near.out(), HS, head), dout(s.out(), problem.dout, HS, head);
            Far<float> lse(s.rows(), T, T, 0), delta(s.rows(), T, T, 0);
            FarBuffer<float> scratch(s.scratch()), dbias(s.stride());
            Buffer<float> near_scratch(near.scratch()), near_dbias(near.stride());
            if (!scratch.p || !dbias.p) continue;
            qkv.at = dqkv.at = s.q_at(b, 0, h), out.at = dout.at = s.out_at(b, 0, h), lse.at = delta.at = s.lse_at(b, 0, h);
            const int heads = s.B * s.NH, row_blocks = ceil_div(T, 64);
            const int together = att_in_groups(s.device(), heads).together;
            std::vector<int64_t> blocks;   // of the last head
            for (int i = std::max(0, heads - together) * row_blocks; i < heads * row_blocks; i++)
                if (att_place(i, heads, row_blocks, together, true).head == heads - 1) blocks.push_back(i);
            p.is((int)blocks.size() == row_blocks, "the last head has more blocks or fewer");
            auto tensors = [&](bool far) -> Tensors {
                return {out.p(far), dqkv.p(far), qkv.p(far), dout.p(far), lse.p(far), delta.p(far),
                        far ? scratch.p : near_scratch.p, {far ? dbias.p : near_dbias.p, F32}, nullptr, nullptr, nullptr};
            };
            auto run = [&](bool back) {
                return [&, back](bool far) {
                    if (back) backward(TRAINER, tensors(far), false, far ? s : near);
                    else forward(TRAINER, tensors(far), far ? s : near);
                };
            };
            if (!check_far(p, {&qkv, &out, &lse}, blocks, run(false))) continue;
            out.values = out.near.read(), lse.values = lse.near.read();
            run(true)(false);   // dk of the first rows needs delta of the last ones, whose blocks run later
            delta.values = delta.near.read();
            check_far(p, {&qkv, &dout, &out, &lse, &delta, &dqkv}, blocks, run(true));
        }
    report({&p});
}

// The end of a sequence of 2^24 tokens, the longest there is, and backward with dk and dv apart. All tokens are in documents of 48: a
// query that sees all keys would take an hour here.
void test_long(uint64_t seed) {
    Property p("the last rows of a sequence of 2^24 tokens", "every bit of the same rows alone");
    constexpr int T = 1 << 24, N = 128, DOCUMENT = 48;
    const Shape near = {1, N, 2, 1, 128}, s = {1, T, near.NH, near.NKV, near.HS};
    set_case("%s", describe(s, TRAINER));
    const Problem problem(seed, near);
    const size_t columns = s.NH * s.HS, keys = 2 * s.NKV * s.HS;
    Far<floatX> qkv(s.qkv(), problem.qkv, s.stride(), s.stride()), dqkv(s.qkv(), near.qkv(), s.stride(), s.stride()),
        out(s.out(), near.out(), columns, columns), dkv(T * keys, N * keys, keys, keys);
    Far<float> lse(s.rows(), near.rows(), N, T), delta(s.rows(), near.rows(), N, T);
    FarBuffer<int> far_document(T);
    std::vector<int> document(T);
    for (int t = 0; t < T; t++) document[t] = std::max(0, t - (t + DOCUMENT - (T - N) % DOCUMENT) % DOCUMENT);
    if (!far_document.p) return report({&p});
    far_document.write(0, document);
    Buffer<int> near_document(N);
    for (int t = 0; t < N; t++) document[t] = t - t % DOCUMENT;
    near_document.write({document.begin(), document.begin() + N});
    qkv.at = dqkv.at = (T - N) * s.stride(), out.at = (T - N) * columns, dkv.at = (T - N) * keys, lse.at = delta.at = T - N;
    const int rows = 64, row_blocks = T / rows;
    std::vector<int64_t> blocks;   // of these rows, in kernels by queries and by keys
    for (bool queries : {true, false})
        for (int i = 0, heads = queries ? s.NH : s.NKV; i < heads * row_blocks; i++)
            if (att_place(i, heads, row_blocks, att_in_groups(s.device(), heads).together, queries).row_block >= row_blocks - N / rows)
                blocks.push_back(i);
    p.is((int)blocks.size() == (s.NH + s.NKV) * N / rows, "the last rows have more blocks or fewer");
    auto of = [&](bool far) -> AttDocuments { return {far ? far_document.p : near_document.p}; };
    const bool there = check_far(p, {&qkv, &out, &lse}, blocks, [&](bool far) {
        attention_forward(out.p(far), lse.p(far), qkv.p(far), of(far).first, 1, far ? T : N, s.NH, s.NKV, s.HS, 0);
    });
    if (!there) return report({&p});
    out.values = out.near.read(), lse.values = lse.near.read();
    Buffer<floatX> dout(problem.dout);
    std::vector<int64_t> all(N * s.NH * s.HS / (256 * VEC));
    std::iota(all.begin(), all.end(), 0);
    check_far(p, {&out, &delta}, all, [&](bool far) {   // of a chunk
        attention_delta(out.p(far) + (far ? out.at : 0), delta.p(far), dout.p, far ? T - N : 0, N, far ? T : N, s.NH, s.HS, 0);
    });
    out.values = out.near.read(), delta.values = delta.near.read();
    auto run = attention_backward_launch<4>;
    if constexpr (!kFP32) run = attention_backward_tc<128, true>;
    check_far(p, {&qkv, &out, &lse, &delta, &dqkv, &dkv}, blocks, [&](bool far) {
        run({dqkv.p(far), dkv.p(far), (int)keys}, nullptr, delta.p(far), out.p(far), qkv.p(far), nullptr, lse.p(far), 1,
            (far ? s : near).device(), of(far), 0);
    });
    report({&p});
}

// ---- the order of the trainer's blocks

// Rows of a block, and how many blocks there are, of the kernels on tensor cores
int block_rows(int HS) { return HS == 64 ? 64 * TC_M<64> : 64 * TC_M<128>; }
// (head of all sequences, first row) of a block of forward or dq, or of dkv
std::pair<int, int> place_of(const Shape& s, const AttShape& shape, bool dkv, int block) {
    const int heads = s.B * (dkv ? s.NKV : s.NH);
    AttPlace place = att_place(block, heads, ceil_div(s.T, block_rows(s.HS)), att_in_groups(shape, heads).together, !dkv);
    return {place.head, place.row_block * block_rows(s.HS)};
}

// --order B T NH NKV HS L2_BYTES: one line per block, for dev/bench/l2.py
int print_order(char** a) {
    const Shape s = {atoi(a[0]), atoi(a[1]), atoi(a[2]), atoi(a[3]), atoi(a[4])};
    AttShape shape = s.device();
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

// That the kernels keep to it: blocks run one at a time, and write the rows that it says. The CPU backend's cache is small, so that
// heads go by in groups of a few.
void test_order(uint64_t seed) {
    Property p("a block writes the rows that the order gives it");
    if (kFP32 || !on_cpu_backend()) return;   // a GPU runs whole grids
    for (int HS : {64, 128}) {
        if (SANITIZED && HS > 64) continue;
        const Shape s = {3, 200, 6, 3, HS};   // the last block of a head is not full
        const int rows = block_rows(HS), row_blocks = ceil_div(s.T, rows);
        const AttShape shape = s.device();
        set_case("%s, %d heads together", describe(s, TRAINER), shape.together);
        p.is(shape.together < s.B * s.NKV, "all heads go by together: this test wants some of them to wait");
        const Problem problem(seed, s);
        for (int block = 0; block < s.B * s.NH * row_blocks; block += 1 + block % 5) {
            Buffers x(s, false);
            x.qkv.write(problem.qkv), x.dout.write(problem.dout);
            run_blocks({block}, [&] { forward(TRAINER, x.tensors(), s); });
            const std::vector<float> wrote = x.lse.read();
            x.out.write(problem.dout), x.lse.write(std::vector<float>(s.rows(), 5.0f));   // any will do
            run_blocks({block}, [&] { backward(TRAINER, x.tensors(), false, s); });
            const std::vector<floatX> gradient = x.dqkv.read();
            const auto place = place_of(s, shape, false, block);
            const auto keys = block < s.B * s.NKV * row_blocks ? place_of(s, shape, true, block) : std::make_pair(-1, 0);
            auto check = [&](const char* kernel, double x, std::pair<int, int> place, int head, int t) {
                const bool own = head == place.first && t >= place.second && t < place.second + rows;
                p.is(std::isnan(x) != own, std::string(kernel) + ": another block's row, or none of its own");
            };
            for (int b = 0; b < s.B; b++)
                for (int t = 0; t < s.T; t++)
                    for (int h = 0; h < s.NH; h++) {
                        check("forward", wrote[s.lse_at(b, t, h)], place, b * s.NH + h, t);
                        check("dq", (float)gradient[s.q_at(b, t, h)], place, b * s.NH + h, t);
                        if (h < s.NKV) check("dkv", (float)gradient[s.v_at(b, t, h)], keys, b * s.NKV + h, t);
                    }
        }
    }
    report({&p});
}

// Tiles in shared memory, which has 32 banks of 4 bytes. 8 lanes at a time give ldmatrix a row of 16 bytes each, or copy 16 bytes
// each: without conflicts if these lie in 8 different groups of 4 banks. Further rows change nothing: they are whole lines away.
template <int HS> __global__ void tile_addresses_kernel(int* out) {
    const TileReader<HS> read;
    for (int i = 0; i < HS / 16; i++, out += 3 * 32) {
        const int place = i * 32 + threadIdx.x;   // of a copy, as tc_load_tile has it
        out[threadIdx.x] = read.at_8 ^ (2 * 32 * (i / 2));
        out[32 + threadIdx.x] = read.at_16 ^ (2 * 16 * i);
        out[64 + threadIdx.x] = tc_at<HS>(place / (HS / 8), place % (HS / 8) * 8);
    }
}
template <int HS> void test_banks() {
    Property p("tiles in shared memory: no bank conflicts");
    set_case("addresses");
    Buffer<int> addresses(3 * 32 * HS / 16);
    tile_addresses_kernel<HS><<<1, 32>>>(addresses.p);
    const std::vector<int> at = addresses.read();
    for (size_t i = 0; i < at.size(); i += 8) {
        int groups = 0;
        for (int j = 0; j < 8; j++) groups |= 1 << at[i + j] / 16 % 8;
        p.is(groups == 0xff, "two of 8 lanes want the same banks");
    }
    report({&p});
}

// ---- benchmark

void bench(const char* model, const Shape& all) {
    // of an element of out: two products with half of T keys, two flops each; backward has five such products
    const double flops = 2.0 * all.T;
    BenchTable t(all.out(), BenchTable::FLOPS, "%s: B %d, T %d, %d heads on %d of %d channels", model, all.B, all.T, all.NH,
                 all.NKV, all.HS);
    const Shape s = t.timed ? all : Shape{1, 1, all.NH, all.NKV, all.HS};   // without a GPU nothing runs
    for (Way way : {ONE, TWO, THREE, TRAINER}) {
        if (way == TRAINER && !tensor_cores(way, s.HS)) continue;   // that was version 3
        Buffers b(s, way == ONE);
        for (Buffer<floatX>* x : {&b.qkv, &b.dout}) x->fill();
        const Tensors x = b.tensors();
        t.row(std::string("forward, ") + NAMES[way], flops, [&] { forward(way, x, s); });
        if (way != ONE) t.row(std::string("backward, ") + NAMES[way], 2.5 * flops, [&] { backward(way, x, false, s); });
    }
}

int main(int argc, char** argv) {
    if (argc == 8 && strcmp(argv[1], "--order") == 0) return print_order(argv + 2);
    Arguments o = parse_arguments(argc, argv, "attention: causal, flash attention by plain arithmetic and on tensor cores");
    if (o.bench) {
        bench_device();
        MatmulSession cublas;
        bench("GPT-2 124M", {64, 1024, 12, 12, 64});
        bench("GPT-2 1558M", {8, 1024, 25, 25, 64});
        bench("like Llama 3 8B", {4, 2048, 32, 8, 128});
        return 0;
    }
    std::vector<Misuse> refused;
    struct Case { int NH, NKV, HS; };
    for (Case c : {Case{2, 2, 12}, {2, 2, 136}, {2, 2, 0}, {6, 4, 64}, {6, 0, 64}})
        for (bool back : {false, true}) {
            const std::string name = std::to_string(c.NH) + " on " + std::to_string(c.NKV) + " of " + std::to_string(c.HS);
            refused.push_back({(back ? "backward, " : "forward, ") + name,
                               c.HS == 64 ? "6 query heads, " + std::to_string(c.NKV) + " key-value heads: expected a multiple"
                                          : "has " + std::to_string(c.HS) + " channels: expected a multiple of 8, up to 128",
                               [=] {
                                   const Shape s = {1, 16, c.NH, c.NKV, c.HS};
                                   back ? backward(TRAINER, {}, false, s) : forward(TRAINER, {}, s);
                               }});
        }
    test_misuse(o, refused);
    printf("attention, %s\n", dtype_name(FLOATX));
    test_random(o.seed, o.large || !on_cpu_backend());
    test_documents(o.seed);
    test_scores(o.seed);
    test_nan(o.seed);
    test_far(o.seed);
    test_long(o.seed);
    test_order(o.seed);
    if (!kFP32) test_banks<64>(), test_banks<128>();
    return finish(o);
}
