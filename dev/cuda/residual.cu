/*
The residual addition, forward and backward, which the trainer leaves to the norm behind it: the trainer's kernels, tested, and
simpler ones beside them to learn from. Section 3 of train_gpt2.cu has them under "norm". What the norm itself computes is the
subject of layernorm.cu and, where it shares a tensor with its matmul, of mslayernorm.cu.

    make dev/cuda/residual && ./dev/cuda/residual [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/residual.cu -lcublasLt -o residual

Forward: x = inp + add, where inp is the residual stream, add what a matmul made for it, and x the stream from here on; and out
= norm(x). Backward: the gradient of the stream around the norm, plus what comes back through the norm. This is the gradient of
x, hence of inp, hence of add: a sum passes its gradient on to both as it is. The matmul that made add has a bias, whose
gradient is the sum of that over the rows. C is a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: a kernel for the sum, an element a thread, then the norm's. The sum is read 2 + 2 bytes and written 2, the norm
// reads it again and writes its output: 10 bytes an element in bf16. Per thread the first moves 6 bytes, by three instructions
// and as many to find out where.
__global__ void add_1_kernel(floatX* x, const floatX* inp, const floatX* add, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)inp[i] + (float)add[i]);
}
template <bool SHARED>
void residual_forward_1(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* add,
                        const floatX* gamma, const floatX* beta, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    add_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(residual, inp, add, n);
    cudaCheck(cudaGetLastError());
    layernorm_forward<SHARED>(nullptr, out, mean, rstd, residual, nullptr, gamma, beta, rows, C, stream);
}

// Version 2: 8 elements a thread, 16 bytes an access. That is as good as an addition gets, and still 10 bytes: what is wrong
// with it is that it is a kernel. Its 6 bytes are more than the norm's own 4.
// Version 3, the trainer's layernorm_forward, adds while it reads. The norm needs x in registers anyway: it reads 2 + 2 bytes
// and writes x and its output, 8 bytes in all. What it normalises is the x that it stores, rounded to bf16, and not the sum
// that it had in fp32. So all versions make the same bits, and whoever computes the norm once more, from the x that was kept,
// does too. residual may be inp: the stream then lies in one tensor for all layers. Or null, where nobody wants x any more: 6
// bytes.
__global__ void add_2_kernel(floatX* x, const floatX* inp, const floatX* add, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats a = load(inp + i), b = load(add + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) a[k] += b[k];
    store(x + i, a);
}
template <bool SHARED>
void residual_forward_2(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* add,
                        const floatX* gamma, const floatX* beta, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    add_2_kernel<<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(residual, inp, add, n);
    cudaCheck(cudaGetLastError());
    layernorm_forward<SHARED>(nullptr, out, mean, rstd, residual, nullptr, gamma, beta, rows, C, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Version 1 does what the graph says, a tensor for each of its edges, and a kernel for each of its nodes. The norm reads its
// output's gradient and what forward kept and writes what comes through it (6 bytes); a kernel adds the gradient that came
// around the norm, and writes one result for inp and an equal one for add (8); the bias sums the latter over the rows (2). 16
// bytes. And what came through the norm has been rounded to bf16 before it is added, for nobody's benefit.
__global__ void split_1_kernel(floatX* dinp, floatX* dadd, const floatX* around, const floatX* through, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dinp[i] = dadd[i] = (floatX)((float)around[i] + (float)through[i]);
}
template <bool SHARED>
void residual_backward_1(floatX* dinp,            // (rows, C)
                         floatX* dadd,            // (rows, C)
                         Grad dbias, Grad dgamma, Grad dbeta, float* scratch,
                         floatX* through,         // (rows, C) scratch
                         const floatX* around,    // (rows, C)
                         const floatX* dout, const floatX* kept, const float* mean, const float* rstd, const floatX* gamma,
                         bool accumulate, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    layernorm_backward<SHARED>(through, {}, dgamma, dbeta, scratch, dout, kept, mean, rstd, gamma, false, accumulate, rows, C,
                               stream);
    split_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dinp, dadd, around, through, n);
    cudaCheck(cudaGetLastError());
    bias_backward(dbias, scratch, dadd, accumulate, rows, C, stream);
}

// Version 2 has seen that the three gradients of the stream are never wanted at the same time with different values: around,
// dinp and dadd are one tensor, added to in place. 6 bytes for the norm, 6 for adding, 2 for the bias: 14, and two tensors
// less.
// Version 3, the trainer's layernorm_backward, adds in the norm's kernel, and sums for the bias what it has in its registers:
// it reads dout, what forward kept, and the gradient, and writes the gradient. 8 bytes, and no rounding on the way.
template <bool SHARED>
void residual_backward_2(floatX* dresidual, Grad dbias, Grad dgamma, Grad dbeta, float* scratch, floatX* through,
                         const floatX* dout, const floatX* kept, const float* mean, const float* rstd, const floatX* gamma,
                         bool accumulate, int rows, int C, cudaStream_t stream) {
    size_t n = (size_t)rows * C;
    layernorm_backward<SHARED>(through, {}, dgamma, dbeta, scratch, dout, kept, mean, rstd, gamma, false, accumulate, rows, C,
                               stream);
    add_2_kernel<<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(dresidual, dresidual, through, n);
    cudaCheck(cudaGetLastError());
    bias_backward(dbias, scratch, dresidual, accumulate, rows, C, stream);
}

// How many additions stand one behind the other in a sum along a row: a lane's, the first of them to 0, then 5 between lanes.
double row_depth(int C) { return VEC * ceil_div(C, 32 * VEC) - 1 + 5; }

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision

constexpr double EPSILON = 1e-5;   // GPT-2's, not taken from the trainer

struct NormRow {   // a row of the norm; size: the mean of |x|, by which the mean's roundings go
    double mean = 0, rstd, size = 0;
    NormRow(const floatX* x, int C) {
        double var = 0;
        for (int c = 0; c < C; c++) mean += (double)(float)x[c] / C, size += fabs((float)x[c]) / C;
        for (int c = 0; c < C; c++) var += ((float)x[c] - mean) * ((float)x[c] - mean) / C;
        rstd = 1 / sqrt(var + EPSILON);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// tests

struct Problem {
    int rows, C;
    size_t n;
    std::vector<floatX> inp, add, gamma, beta, dout, around;
    Problem(uint64_t seed, int rows, int C) : rows(rows), C(C), n((size_t)rows * C) {
        Random random(seed, ((uint64_t)rows << 32) + C);
        inp = random.normals(n, 2, 1);   // away from 0, so that the mean has something to round
        add = random.normals(n);
        gamma = random.normals(C, 1, 0.5f);
        for (int c = 1; c < C; c += 5) gamma[c] = (floatX)0.0f;
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

// What shares a tensor: x with inp or with add, out with add, or inp, add and x all three.
enum Way { APART, IN_INP, IN_ADD, DROPPED, OUT_IN_ADD, STREAM, DROPPED_OUT_IN_ADD, TWICE, WAYS };
const char* const WAY_NAMES[] = {"x apart",    "x in inp",             "x in add",            "x dropped",
                                 "out in add", "x in inp, out in add", "dropped, out in add", "x = inp + inp, in inp"};

struct Forward {
    std::vector<floatX> x, out;      // x: empty if dropped
    std::vector<float> mean, rstd;   // mean: empty if shared
    bool operator==(const Forward& f) const {
        return (x.empty() || f.x.empty() || same_bits(x, f.x)) && same_bits(out, f.out) &&
               (mean.empty() || same_bits(mean, f.mean)) && same_bits(rstd, f.rstd);
    }
};
// version 3: the trainer's. `others`: where inp or add shares a tensor with nothing that is written, it has to be as before.
template <bool SHARED>
Forward forward(const Problem& p, int version, Way way, bool with_add, Property& others) {
    const bool out_in_add = way == OUT_IN_ADD || way == STREAM || way == DROPPED_OUT_IN_ADD;
    const bool x_in_inp = way == IN_INP || way == STREAM || way == TWICE, dropped = way == DROPPED || way == DROPPED_OUT_IN_ADD;
    Buffer<floatX> inp(p.inp), add(p.add), gamma(p.gamma), beta(p.beta), x(p.n), out(p.n);
    Buffer<float> mean(p.rows), rstd(p.rows);
    floatX* add_p = !with_add ? nullptr : way == TWICE ? inp.p : add.p;
    floatX* x_p = x_in_inp ? inp.p : way == IN_ADD ? add.p : dropped ? nullptr : x.p;
    floatX* out_p = out_in_add ? add.p : out.p;
    (version == 1   ? residual_forward_1<SHARED>
     : version == 2 ? residual_forward_2<SHARED>
                    : layernorm_forward<SHARED>)(x_p, out_p, SHARED ? nullptr : mean.p, rstd.p, inp.p, add_p,
                                                 SHARED ? nullptr : gamma.p, SHARED ? nullptr : beta.p, p.rows, p.C, 0);
    Forward f;
    std::vector<floatX> inp_now = inp.read(), add_now = add.read();
    if (!dropped) f.x = x_in_inp ? inp_now : way == IN_ADD ? add_now : x.read();
    f.out = out_in_add ? add_now : out.read();
    if (!SHARED) f.mean = mean.read();
    f.rstd = rstd.read();
    if (!x_in_inp) others.is(same_bits(inp_now, p.inp), "inp has changed");
    if (way != IN_ADD && !out_in_add) others.is(same_bits(add_now, p.add), "add has changed");
    return f;
}

// Rows around the 4, and for many channels fewer, that a block takes; channels around a lane's 8, a warp's 256, and as many as
// fit.
struct Shape { int rows, C; };
std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (int C : {8, 24, 136, 248, 256, 264, 1000})
        for (int rows : {1, 3, 4, 5, 65}) all.push_back({rows, C});
    const int most = (int)(48 * 1024 / sizeof(floatX));
    for (int C : {most / 4 + 8, most / 2, most}) all.push_back({3, C});
    return all;
}

// x is a sum, rounded. The norm's roundings: the mean is off by one of the sum so far for each addition, and one of dividing,
// which shifts all z alike; a squared deviation has 3, its sum one for each addition, then come a division, the 1e-5, and half
// of all of them through the root, which itself may be off by 4; z has 2 more, and one of gamma.
template <bool SHARED>
void test_forward(uint64_t seed) {
    Property x_is("x = inp + add", "every bit"), x_copied("x = inp where there is no add", "every bit");
    Property out(SHARED ? "z" : "out", "the mean's and the spread's roundings, half a dozen of its own, one of storing");
    Property mean("mean", "a rounding for each addition in a row, and one"), rstd("rstd", "half of the square's");
    Property again("the same bits in a second run"), alias("the same bits in place, with out in add, with x dropped");
    Property once_more("the same bits where the norm is made once more, of the x that was kept");
    Property others("what is read alone has not changed"), two("version 2", "every bit of the trainer's"),
        one("version 1", "every bit of the trainer's");
    for (auto [rows, C] : shapes()) {
        const Problem p(seed, rows, C);
        for (bool with_add : {true, false}) {
            set_case("C %d, rows %d, %s", C, rows, with_add ? "inp + add" : "inp alone");
            const Forward f = forward<SHARED>(p, 3, APART, with_add, others);
            const std::vector<floatX> sum = with_add ? p.sum() : p.inp;
            for (size_t i = 0; i < p.n; i++) (with_add ? x_is : x_copied).equal(i, (float)f.x[i], (float)sum[i]);
            const double depth = row_depth(C);
            for (int r = 0; r < rows; r++) {
                const size_t base = (size_t)r * C;
                const NormRow ref(&sum[base], C);
                double off = ref.size * EPS32 * (depth + 1), shift = off * ref.rstd;
                double spread = EPS32 * ((depth + 5) / 2 + 4) + shift * shift / 2;
                if (!SHARED) mean.within(r, f.mean[r], ref.mean, off * 1.01);
                rstd.within(r, f.rstd[r], ref.rstd, ref.rstd * spread * 1.01);
                for (int c = 0; c < C; c++) {
                    double z = ((double)(float)sum[base + c] - ref.mean) * ref.rstd, g = SHARED ? 1 : (float)p.gamma[c];
                    double expected = g * z + (SHARED ? 0 : (float)p.beta[c]);
                    double error = fabs(g) * (shift + fabs(z) * (spread + 3 * EPS32)) + fabs(expected) * EPS32;
                    out.within(base + c, (float)f.out[base + c], expected, (error + (fabs(expected) + error) * EPSX) * 1.01);
                }
            }
            again.is(f == forward<SHARED>(p, 3, APART, with_add, others), "other bits");
            Problem kept = p;
            kept.inp = f.x;
            once_more.is(f == forward<SHARED>(kept, 3, DROPPED, false, others), "other bits");
            for (int w = IN_INP; w < WAYS; w++) {
                if (!with_add && w != IN_INP && w != DROPPED) continue;
                set_case("C %d, rows %d, %s, %s", C, rows, with_add ? "inp + add" : "inp alone", WAY_NAMES[w]);
                if (w == TWICE) {
                    Problem q = p;
                    q.add = p.inp;
                    const Forward twice = forward<SHARED>(p, 3, TWICE, true, others);
                    alias.is(twice == forward<SHARED>(q, 3, APART, true, others), "other bits");
                } else {
                    alias.is(f == forward<SHARED>(p, 3, (Way)w, with_add, others), "other bits");
                }
            }
            for (Way way : {APART, IN_INP}) {
                if (!with_add) continue;
                two.is(f == forward<SHARED>(p, 2, way, true, others), "other bits");
                one.is(f == forward<SHARED>(p, 1, way, true, others), "other bits");
            }
        }
    }
    printf("forward, %s\n", SHARED ? "shared" : "exact");
    report({&x_is, &x_copied, &out, &rstd});
    if (!SHARED) report({&mean});
    report({&again, &alias, &once_more, &others, &two, &one});
}

// What a row of backward has to be, and how far it may be off before it is stored.
struct RowGradient {
    Doubles through, error;
    // dz has 1 rounding, z 2 (none where it is what was kept) and dz z 4. A mean has as many as stand in its sum, and one of
    // dividing. The differences have one each, of what goes in, and the product with rstd has one.
    RowGradient(bool shared, const floatX* dout, const floatX* kept, double mean, double rstd, const floatX* gamma, int C)
        : through(C), error(C) {
        Doubles dz(C), z(C);
        double mean_dz = 0, mean_dz_z = 0, terms = 0, terms_z = 0;
        for (int c = 0; c < C; c++) {
            dz[c] = (double)(float)dout[c] * (float)gamma[c];
            z[c] = shared ? (float)kept[c] : ((float)kept[c] - mean) * rstd;
            mean_dz += dz[c] / C, terms += fabs(dz[c]) / C;
            mean_dz_z += dz[c] * z[c] / C, terms_z += fabs(dz[c] * z[c]) / C;
        }
        const double depth = row_depth(C);
        for (int c = 0; c < C; c++) {
            through[c] = rstd * (dz[c] - mean_dz - z[c] * mean_dz_z);
            error[c] = EPS32 * rstd *
                       (4 * fabs(dz[c]) + (depth + 2) * terms + 3 * fabs(mean_dz) +
                        fabs(z[c]) * ((depth + 5) * terms_z + 5 * fabs(mean_dz_z)));
        }
    }
};

// The norm's input and what it keeps of it, with the mean and rstd that backward is given: the reference's, in fp32.
struct Kept {
    std::vector<floatX> kept;
    std::vector<float> mean, rstd;
    Kept(bool shared, const Problem& p) : kept(p.sum()) {
        for (int r = 0; r < p.rows; r++) {
            const NormRow row(&kept[(size_t)r * p.C], p.C);
            mean.push_back((float)row.mean);
            rstd.push_back((float)row.rstd);
            for (int c = 0; shared && c < p.C; c++) {
                floatX& x = kept[(size_t)r * p.C + c];
                x = (floatX)(((float)x - mean[r]) * rstd[r]);
            }
        }
    }
};

struct Backward {
    std::vector<floatX> dx;
    std::vector<float> dbias, dgamma, dbeta;
};
// version 3: the trainer's. around: whether the stream has a gradient there already, or NaN and is written.
template <bool SHARED>
Backward backward(const Problem& p, const Kept& k, int version, bool around, DType type, const std::vector<float>* before,
                  Property& others) {
    const int rows = p.rows, C = p.C;
    Buffer<floatX> dout(p.dout), kept(k.kept), gamma(p.gamma), dx(p.n);
    Buffer<float> mean(k.mean), rstd(k.rstd), scratch((size_t)std::max(3 * norm_slices(rows), colsum_slices(rows)) * C);
    GradBuffer dbias(C, type), dgamma(C, type), dbeta(C, type);
    if (before != nullptr) dbias.write(before[0]), dgamma.write(before[1]), dbeta.write(before[2]);
    if (around) dx.write(p.around);
    const Grad dg = SHARED ? Grad{} : dgamma.grad(), db = SHARED ? Grad{} : dbeta.grad();
    const float* mean_p = SHARED ? nullptr : mean.p;
    const bool accumulate = before != nullptr;
    Backward b;
    if (version == 1) {
        Buffer<floatX> dinp(p.n), dadd(p.n), through(p.n);
        residual_backward_1<SHARED>(dinp.p, dadd.p, dbias.grad(), dg, db, scratch.p, through.p, dx.p, dout.p, kept.p, mean_p,
                                    rstd.p, gamma.p, accumulate, rows, C, 0);
        b.dx = dinp.read();
        others.is(same_bits(b.dx, dadd.read()), "dinp and dadd differ");
        others.is(same_bits(dx.read(), p.around), "the gradient around the norm has changed");
    } else if (version == 2) {
        Buffer<floatX> through(p.n);
        residual_backward_2<SHARED>(dx.p, dbias.grad(), dg, db, scratch.p, through.p, dout.p, kept.p, mean_p, rstd.p, gamma.p,
                                    accumulate, rows, C, 0);
        b.dx = dx.read();
    } else {
        layernorm_backward<SHARED>(dx.p, dbias.grad(), dg, db, scratch.p, dout.p, kept.p, mean_p, rstd.p, gamma.p, around,
                                   accumulate, rows, C, 0);
        b.dx = dx.read();
    }
    b.dbias = dbias.read();
    b.dgamma = dgamma.read();
    b.dbeta = dbeta.read();
    others.is(same_bits(dout.read(), p.dout) && same_bits(kept.read(), k.kept), "dout or what was kept has changed");
    return b;
}

template <bool SHARED>
void test_backward(uint64_t seed) {
    Property added("dx, added to what came around the norm", "the means' roundings, a dozen of its own, one of storing"),
        written("dx, written over NaN where nothing came around", "likewise, without the last addition"),
        bias32("dbias in fp32", "dx's before it is stored, and one for each addition in a row"),
        bias16("dbias in bf16", "and one of storing"), again("the same bits in a second run"),
        others("what is read alone has not changed; dgamma and dbeta have the same bits in all versions"),
        two("version 2: dx, dbias", "and one of storing what came through the norm"),
        one("version 1: dx, dbias", "dx: every bit of version 2");
    std::vector<Shape> all;
    for (int C : {8, 24, 136, 256, 264, 1000})
        for (int rows : {1, 7, 8, 9, 65}) all.push_back({rows, C});
    all.push_back({131, 24});
    all.push_back({3, 4104});   // more than a block's columns
    for (auto [rows, C] : all) {
        const Problem p(seed, rows, C);
        const Kept k(SHARED, p);
        std::vector<RowGradient> ref;
        for (int r = 0; r < rows; r++)
            ref.emplace_back(SHARED, &p.dout[(size_t)r * C], &k.kept[(size_t)r * C], k.mean[r], k.rstd[r], &p.gamma[0], C);
        Random random(seed, 5);
        std::vector<float> before[3];
        for (auto& v : before)
            for (int c = 0; c < C; c++) v.push_back((float)(__nv_bfloat16)(10 * random.normal()));
        for (DType type : {F32, BF16})
            for (bool accumulate : {false, true}) {
                Backward first;
                for (int version : {3, 0, 4, 2, 1}) {   // 3, 0 and 4 are the trainer's; 4: written
                    if (C > 1000 && (version < 3 || type == BF16)) continue;   // to save time
                    const bool around = version != 4;
                    set_case("C %d, rows %d, dbias in %s %s, version %d", C, rows, dtype_name(type),
                             accumulate ? "added to" : "written", version);
                    const Backward b = backward<SHARED>(p, k, version, around, type, accumulate ? before : nullptr, others);
                    if (version == 0) {
                        again.is(same_bits(b.dx, first.dx) && same_bits(b.dbias, first.dbias), "other bits");
                        continue;
                    }
                    if (version == 3) first = b;
                    others.is(same_bits(b.dgamma, first.dgamma) && same_bits(b.dbeta, first.dbeta),
                              "dgamma or dbeta have other bits");
                    if (version == 1) one.is(same_bits(b.dx, first.dx), "other bits");
                    Doubles sum(C, 0), size(C, 0), error(C, 0);
                    for (int r = 0; r < rows; r++)
                        for (int c = 0; c < C; c++) {
                            const size_t i = (size_t)r * C + c;
                            double through = ref[r].through[c], expected = through + (around ? (float)p.around[i] : 0);
                            double off = ref[r].error[c];
                            if (version < 3) off += (fabs(through) + off) * EPSX;   // stored, and then added
                            off += fabs(expected) * (around ? EPS32 : 0);
                            double stored = (off + (fabs(expected) + off) * (kFP32 ? 0 : EPSX)) * 1.01;
                            (version == 1 ? one : version == 2 ? two : around ? added : written)
                                .within(i, (float)b.dx[i], expected, stored);
                            sum[c] += expected, size[c] += fabs(expected);
                            error[c] += version < 3 ? stored : off;
                        }
                    if (version == 2) first.dx = b.dx;
                    for (int c = 0; c < C; c++) {
                        const double was = accumulate ? before[0][c] : 0, expected = sum[c] + was;
                        const double depth = (version < 3 ? colsum_depth(rows) : norm_colsum_depth(rows)) + 1;
                        double off = error[c] + (size[c] + fabs(was)) * EPS32 * depth;
                        off = (off + (type == BF16 ? (fabs(expected) + off) * EPS16 : 0)) * 1.01;
                        (version == 1 ? one : version == 2 ? two : type == F32 ? bias32 : bias16)
                            .within(c, b.dbias[c], expected, off);
                    }
                }
            }
    }
    printf("backward, %s\n", SHARED ? "shared" : "exact");
    report({&added, &written, &bias32, &bias16, &again, &others, &two, &one});
}

// Sums that could go wrong: of every number that bf16 has with something else (in fp32, of one number for each). Then NaN and
// infinities, also those that a sum makes: they spoil their row of the norm, which its neighbours must not notice.
template <bool SHARED>
void test_special_forward(uint64_t seed) {
    Property every("x of every bf16, NaN, infinities, zeros, denormals, overflow", "every bit, in every version"),
        p("a NaN or an infinity in inp or add, or a sum that overflows, spoils its row of the norm, and only that"),
        zero(SHARED ? "inp - inp: x = 0, z = 0, rstd = 316" : "inp - inp: x = 0, out = beta, rstd = 316");
    Property others("what is read alone has not changed");
    set_case("every bf16");
    Problem q(seed, 64, 1024);
    const float odd[] = {0.0f,     -0.0f,     1e-40f, -1e-40f, 1.175494351e-38f, 3.38953139e+38f, -3.38953139e+38f,
                         INFINITY, -INFINITY, NAN};
    Random random(seed, 6);
    for (size_t i = 0; i < q.n; i++) {
        uint32_t bits = (uint32_t)i << 16 | (kFP32 ? (uint32_t)random.bits() & 0xffff : 0);
        float x;
        memcpy(&x, &bits, 4);
        q.inp[i] = (floatX)x;
        q.add[i] = (floatX)(random.bits() % 2 ? odd[random.bits() % 10] : std::isfinite(x) ? x * random.normal() : 1.0f);
    }
    const std::vector<floatX> sum = q.sum();
    Buffer<floatX> inp(q.inp), add(q.add), gamma(q.gamma), beta(q.beta), out(q.n);
    Buffer<float> mean(q.rows), rstd(q.rows);
    for (auto layer : {layernorm_forward<SHARED>, residual_forward_2<SHARED>, residual_forward_1<SHARED>}) {
        Buffer<floatX> x(q.n);   // alone is looked at: which of many NaNs the norm makes of them is nobody's concern
        layer(x.p, out.p, mean.p, rstd.p, inp.p, add.p, gamma.p, beta.p, q.rows, q.C, 0);
        std::vector<floatX> got = x.read();
        for (size_t i = 0; i < q.n; i++) every.equal(i, (float)got[i], (float)sum[i]);
    }

    const int rows = 7, C = 264, r = 4, c = 257;
    const size_t at = (size_t)r * C + c;
    const Problem clean(seed, rows, C);
    const Forward before = forward<SHARED>(clean, 3, APART, true, others);
    struct Case { float inp, add; };
    for (Case k : {Case{NAN, 1}, {1, NAN}, {INFINITY, 1}, {1, -INFINITY}, {INFINITY, -INFINITY}, {3.3e38f, 3.3e38f}}) {
        set_case("inp %g, add %g", k.inp, k.add);
        Problem broken = clean;
        broken.inp[at] = (floatX)k.inp, broken.add[at] = (floatX)k.add;
        for (Way way : {APART, STREAM}) {
            const Forward f = forward<SHARED>(broken, 3, way, true, others);
            bool fine = true;
            for (size_t i = 0; i < clean.n; i++) {
                fine &= i == at ? !std::isfinite((float)f.x[i]) : memcmp(&f.x[i], &before.x[i], sizeof(floatX)) == 0;
                fine &= (int)i / C == r ? std::isnan((float)f.out[i]) : memcmp(&f.out[i], &before.out[i], sizeof(floatX)) == 0;
            }
            for (int i = 0; i < rows; i++) fine &= i == r ? !std::isfinite(f.rstd[i]) : f.rstd[i] == before.rstd[i];
            p.is(fine, "expected it in row 4 alone, and in one element of x");
        }
    }
    set_case("inp - inp");
    Problem opposite = clean;
    for (size_t i = 0; i < clean.n; i++) opposite.add[i] = (floatX)(-(float)clean.inp[i]);
    const Forward f = forward<SHARED>(opposite, 3, IN_ADD, true, others);
    for (size_t i = 0; i < clean.n; i++) {
        zero.equal(i, (float)f.x[i], 0);
        zero.equal(i, (float)f.out[i], SHARED ? 0 : (float)clean.beta[i % C]);
    }
    for (float rs : f.rstd) zero.within(0, rs, 1 / sqrt(EPSILON), 1 / sqrt(EPSILON) * EPS32 * 5);
    printf("special values, %s\n", SHARED ? "shared" : "exact");
    report({&every, &p, &zero, &others});
}

// The gradient that came around the norm: what is odd in it stays in its place, and where nothing comes through the norm it
// goes on as it is, be it large or denormal.
template <bool SHARED>
void test_special_backward(uint64_t seed) {
    Property p("a NaN or an infinity around the norm reaches its own element and its column's bias, and only these"),
        same("where dout is 0, what came around the norm is what goes on", "every bit");
    Property others("what is read alone has not changed");
    const int rows = 65, C = 264;
    const Problem clean(seed, rows, C);
    const Kept k(SHARED, clean);
    const Backward before = backward<SHARED>(clean, k, 3, true, F32, nullptr, others);
    Random random(seed, 8);
    for (float odd : {NAN, INFINITY, -INFINITY})
        for (int c : {0, 8, C - 1}) {
            set_case("%f in channel %d", odd, c);
            const size_t at = random.bits() % rows * C + c;
            Problem broken = clean;
            broken.around[at] = (floatX)odd;
            const Backward b = backward<SHARED>(broken, k, 3, true, F32, nullptr, others);
            for (size_t i = 0; i < clean.n; i++) p.equal(i, (float)b.dx[i], i == at ? odd : (float)before.dx[i]);
            for (int i = 0; i < C; i++) p.equal(i, b.dbias[i], i == c ? odd : before.dbias[i]);
            p.is(same_bits(b.dgamma, before.dgamma) && same_bits(b.dbeta, before.dbeta), "dgamma or dbeta has changed");
        }
    set_case("rows of zeros");
    Problem quiet = clean;
    const float odd[] = {1e-40f, -1e-40f, 1.175494351e-38f, 3.38953139e+38f, -3.38953139e+38f, 1e-20f, INFINITY, -INFINITY};
    for (size_t i = 0; i < clean.n; i++) {
        if (i / C % 2) continue;
        quiet.dout[i] = (floatX)0.0f;
        if (random.bits() % 4 == 0) quiet.around[i] = (floatX)odd[random.bits() % 8];
    }
    const Backward b = backward<SHARED>(quiet, k, 3, true, F32, nullptr, others);
    for (size_t i = 0; i < clean.n; i++)
        if (i / C % 2 == 0) same.equal(i, (float)b.dx[i], (float)quiet.around[i]);
        else same.is(same_bits(std::vector<floatX>{b.dx[i]}, {before.dx[i]}), "another row has changed");
    printf("special values in backward, %s\n", SHARED ? "shared" : "exact");
    report({&p, &same, &others});
}

// Index arithmetic beyond 2^31 elements, in place as the trainer calls it: the first and the last block have to make the bits
// that they make of the same rows in a small tensor. A launch of the trainer's backward has 512 blocks at most, each with a
// long way to go; here it has a row a block.
template <bool SHARED>
void test_far(uint64_t seed) {
    constexpr int C = 520, rows = (1 << 22) + 5, NEAR = 8;
    constexpr size_t n = (size_t)rows * C;
    static_assert(n > (size_t)1 << 31, "");
    Property forth("the stream in place, out in add, beyond 2^31 elements: first and last block", "every bit"),
        back("the stream's gradient in place beyond 2^31 elements: first and last block", "every bit");
    set_case("%d rows of %d, %s", rows, C, SHARED ? "shared" : "exact");
    Property others("");   // everything is in place
    const Problem p(seed, NEAR, C);
    const Kept k(SHARED, p);
    FarBuffer<floatX> x(n), y(n);   // inp and add, x and out; the stream's gradient, and both of dout and what was kept
    FarBuffer<float> mean(rows), rstd(rows), partial(SHARED ? n : 3 * n);
    if (!x.p || !y.p || !mean.p || !rstd.p || !partial.p) return;
    auto part = [](const auto& v, size_t count) { return std::decay_t<decltype(v)>(v.begin(), v.begin() + count); };
    Buffer<floatX> gamma(p.gamma), beta(p.beta), near_dx(p.around), near_y(k.kept);
    Buffer<float> near_mean(k.mean), near_rstd(k.rstd), near_partial((SHARED ? 1 : 3) * p.n);

    const Forward near = forward<SHARED>(p, 3, STREAM, true, others);
    const int a_block = norm_warps(C);
    for (int block : {0, ceil_div(rows, a_block) - 1}) {
        const int row = block * a_block, seen = std::min(rows - row, a_block);
        const size_t at = (size_t)row * C, count = (size_t)seen * C;
        x.write(at, part(p.inp, count));
        y.write(at, part(p.add, count));
        launch_blocks(block, block, [&] {
            layernorm_forward<SHARED>(x.p, y.p, SHARED ? nullptr : mean.p, rstd.p, x.p, y.p, gamma.p, beta.p, rows, C, 0);
        });
        forth.is(same_bits(x.read(at, count), part(near.x, count)), "x has other bits");
        forth.is(same_bits(y.read(at, count), part(near.out, count)), "out has other bits");
        if (!SHARED) forth.is(same_bits(mean.read(row, seen), part(near.mean, seen)), "mean has other bits");
        forth.is(same_bits(rstd.read(row, seen), part(near.rstd, seen)), "rstd has other bits");
    }
    auto launch_backward = [&](int blocks, floatX* dx, float* sums, const floatX* y, const float* mean, const float* rstd) {
        const int threads = ceil_div(C, 32 * VEC) * 32;
        layernorm_backward_kernel<SHARED><<<blocks, threads>>>(dx, sums, y, y, mean, rstd, gamma.p, true, blocks, C);
        cudaCheck(cudaGetLastError());
    };
    launch_backward(NEAR, near_dx.p, near_partial.p, near_y.p, near_mean.p, near_rstd.p);
    const std::vector<floatX> dx = near_dx.read();
    const std::vector<float> sums = near_partial.read();
    for (int row : {0, rows - 1}) {
        const size_t at = (size_t)row * C;
        y.write(at, part(k.kept, C));
        x.write(at, part(p.around, C));
        mean.write(row, part(k.mean, 1));
        rstd.write(row, part(k.rstd, 1));
        launch_blocks(row, row, [&] { launch_backward(rows, x.p, partial.p, y.p, mean.p, rstd.p); });
        back.is(same_bits(x.read(at, C), part(dx, C)), "dx has other bits");
        back.is(same_bits(partial.read(at, C), part(sums, C)), "a sum has other bits");
    }
    printf("far, %s\n", SHARED ? "shared" : "exact");
    report({&forth, &back});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int rows, int C) {
    const double X = sizeof(floatX);
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: rows %d, C %d", model, rows, C);
    BenchTable t(title, (size_t)rows * C);
    const int r = t.timed ? rows : 1;   // without a GPU nothing runs
    const size_t n = (size_t)r * C;
    Random random(1337, 1);
    Buffer<floatX> x(n), add(n), out(n), dout(n), dx(n), dadd(n), through(n), gamma(random.normals(C, 1, 0.5f)),
        beta(random.normals(C));
    for (Buffer<floatX>* b : {&x, &add, &out, &dout, &dx}) b->fill();
    Buffer<float> mean(r), rstd(r), scratch(colsum_scratch(C));
    cudaCheck(cudaMemset(mean.p, 0, mean.bytes()));
    rstd.fill(0.5f, 1.5f);
    GradBuffer dbias(C, F32), dgamma(C, F32), dbeta(C, F32);
    const Grad db = dbias.grad(), dg = dgamma.grad(), de = dbeta.grad();
    t.row("forward, version 1: adds an element a thread, then the norm", 5 * X,
          [&] { residual_forward_1<false>(dx.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, version 2: adds 8 elements a thread, then the norm", 5 * X,
          [&] { residual_forward_2<false>(dx.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, version 3: the trainer's, adds in the norm", 4 * X,
          [&] { layernorm_forward<false>(dx.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, version 3, shared", 4 * X,
          [&] { layernorm_forward<true>(dx.p, out.p, nullptr, rstd.p, x.p, add.p, nullptr, nullptr, rows, C, 0); });
    t.row("forward, version 3, where nobody wants x", 3 * X,
          [&] { layernorm_forward<false>(nullptr, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); });
    t.row("backward, version 1: a tensor an edge, a kernel a node", 8 * X, [&] {
        residual_backward_1<false>(out.p, dadd.p, db, dg, de, scratch.p, through.p, dx.p, dout.p, x.p, mean.p, rstd.p, gamma.p,
                                   false, rows, C, 0);
    });
    t.row("backward, version 2: one tensor, added to in place", 7 * X, [&] {
        residual_backward_2<false>(dx.p, db, dg, de, scratch.p, through.p, dout.p, x.p, mean.p, rstd.p, gamma.p, false, rows, C,
                                   0);
    });
    t.row("backward, version 3: the trainer's, adds in the norm", 4 * X, [&] {
        layernorm_backward<false>(dx.p, db, dg, de, scratch.p, dout.p, x.p, mean.p, rstd.p, gamma.p, true, false, rows, C, 0);
    });
    t.row("backward, version 3, shared", 4 * X, [&] {
        layernorm_backward<true>(dx.p, db, {}, {}, scratch.p, dout.p, x.p, nullptr, rstd.p, gamma.p, true, false, rows, C, 0);
    });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "residual: the addition before a norm, in the norm");
    if (o.bench) {
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 1600);
        return 0;
    }
    floatX* none = nullptr;
    test_misuse(o, {{"C of 12", "layernorm_forward: C is 12: expected a multiple of 8",
                     [=] { layernorm_forward<true>(none, none, nullptr, nullptr, none, none, none, none, 1, 12, 0); }},
                    {"C of 12, backward", "layernorm_backward: C is 12: expected a multiple of 8", [=] {
                         layernorm_backward<true>(none, {}, {}, {}, nullptr, none, none, nullptr, nullptr, none, true, false, 1,
                                                  12, 0);
                     }}});
    printf("residual, %s\n", dtype_name(FLOATX));
    test_forward<false>(o.seed);
    test_forward<true>(o.seed);
    test_special_forward<false>(o.seed);
    test_special_forward<true>(o.seed);
    test_backward<false>(o.seed);
    test_backward<true>(o.seed);
    test_special_backward<false>(o.seed);
    test_special_backward<true>(o.seed);
    test_far<false>(o.seed);
    test_far<true>(o.seed);
    return finish(o);
}
