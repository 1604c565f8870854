/*
A LayerNorm and the matmul behind it that keep one tensor between them (MS-LayerNorm, exact for the standard parametrisation):
the trainer's kernels, tested, and simpler ones beside them to learn from. Sections 2 and 3 of train_gpt2.cu explain the method
("norm, shared with its matmul").

    make dev/cuda/mslayernorm && ./dev/cuda/mslayernorm [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/mslayernorm.cu -lcublasLt -o mslayernorm

y = (gamma * z + beta) W^T + b, z = (x - mean) * rstd. Forward folds gamma and beta into W and b and keeps z and rstd; backward
gathers G = dy^T z where dW will be; once a step the unfolding makes dgamma, dbeta and dW of G, W and db. The tests compare all
of that with the standard formulas in double precision, beside the trainer's exact LayerNorm. C and OC are multiples of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass of the norm

// Version 1: a row a thread for dx, then a column a thread for dgamma and dbeta. The first kernel's 32 lanes stand in 32
// different rows, so a warp's load touches 32 lines to use 2 bytes of each, and all lines of 32 rows (96 KB of dout and x at C
// = 768) have to stay cached until the lanes have walked along them; twice, because the sums come before the result. The second
// reads dout and x again, in whole lines, but with C threads in all: a few warps on a GPU that can hold thousands, each adding
// 65536 rows one by one. Elements moved: dout, x, dresidual in and out, and dout, x again: 6, or 12 bytes in bf16.
__global__ void layernorm_backward_1_rows_kernel(floatX* dresidual, const floatX* dout, const floatX* x, const float* mean,
                                                 const float* rstd, const floatX* gamma, int rows, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    size_t base = (size_t)row * C;
    float sum = 0, sum_z = 0;
    for (int c = 0; c < C; c++) {
        float dz = (float)dout[base + c] * (float)gamma[c];
        sum += dz;
        sum_z += dz * ((float)x[base + c] - mean[row]) * rstd[row];
    }
    for (int c = 0; c < C; c++) {
        float dz = (float)dout[base + c] * (float)gamma[c], z = ((float)x[base + c] - mean[row]) * rstd[row];
        dresidual[base + c] = (floatX)((float)dresidual[base + c] + rstd[row] * (dz - sum / C - z * sum_z / C));
    }
}
__global__ void layernorm_backward_1_columns_kernel(Grad dgamma, Grad dbeta, const floatX* dout, const floatX* x,
                                                    const float* mean, const float* rstd, bool accumulate, int rows, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0, sum_z = 0;
    for (int r = 0; r < rows; r++) {
        float d = (float)dout[(size_t)r * C + c];
        sum += d;
        sum_z += d * ((float)x[(size_t)r * C + c] - mean[r]) * rstd[r];
    }
    grad_store(dbeta, c, sum, accumulate);
    grad_store(dgamma, c, sum_z, accumulate);
}
void layernorm_backward_1(floatX* dresidual, Grad dgamma, Grad dbeta, const floatX* dout, const floatX* x, const float* mean,
                          const float* rstd, const floatX* gamma, bool accumulate, int rows, int C, cudaStream_t stream) {
    layernorm_backward_1_rows_kernel<<<ceil_div(rows, 128), 128, 0, stream>>>(dresidual, dout, x, mean, rstd, gamma, rows, C);
    layernorm_backward_1_columns_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dgamma, dbeta, dout, x, mean, rstd, accumulate,
                                                                              rows, C);
    cudaCheck(cudaGetLastError());
}

// Version 2 is the trainer's exact layernorm_backward: a block takes 8 rows at a time, first a warp a row for the sums along
// it, then a thread 8 columns, down the same rows while they are in the cache. So dout and x come from memory once: 4 elements.
//
// Version 3, the same kernel with SHARED, has fewer sums to make: what gamma and beta want is in G already, which the weight's
// gradient matmul had to compute anyway, and once a step the unfolding reads G and W, which have a twentieth of the
// activation's elements at 124M and B = 64. It moves as much as version 2, and reads z where that reads x: the norm has kept
// one tensor, not two.

// ---------------------------------------------------------------------------------------------------------------------
// versions of folding and unfolding

// Version 1: a pass for each result. Folding reads W for W' = W * gamma, and again for b' = b + W beta, a row a thread: the
// lanes of a warp are C elements apart from one another. 3 elements of the weight, where reading once and writing once is 2.
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
// gone. With G in fp32: 4 + 2, 2, and 4 + 4 bytes. The trainer's norm_fold and norm_unfold make their results of one reading: 4
// bytes and 10.
__global__ void unfold_1_columns_kernel(Grad dgamma, Grad dbeta, Grad dweight, Grad dbias, const floatX* weight, int OC,
                                        int C) {
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
    if (i < n)
        grad_store(dweight, i, grad_load(dweight, i) * (float)gamma[i % C] + grad_load(dbias, i / C) * (float)beta[i % C],
                   false);
}
void norm_unfold_1(Grad dweight, Grad dgamma, Grad dbeta, Grad dbias, const floatX* weight, const floatX* gamma,
                   const floatX* beta, int OC, int C, cudaStream_t stream) {
    size_t n = (size_t)OC * C;
    unfold_1_columns_kernel<<<ceil_div(C, 128), 128, 0, stream>>>(dgamma, dbeta, dweight, dbias, weight, OC, C);
    unfold_1_weight_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dweight, dbias, gamma, beta, n, C);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// the reference: LayerNorm and Linear, in double precision

constexpr double EPSILON = 1e-5;   // GPT-2's, not taken from the trainer

struct Problem {
    int micro, rows, C, OC;   // micro-batches; each has `rows` rows
    std::vector<floatX> gamma, beta, weight, bias;
    std::vector<std::vector<floatX>> x, dy, dresidual;   // one a micro-batch

    Problem(uint64_t seed, int micro, int rows, int C, int OC) : micro(micro), rows(rows), C(C), OC(OC) {
        Random random(seed, ((uint64_t)micro << 40) + ((uint64_t)rows << 24) + C * 1000 + OC);
        gamma = random.normals(C, 1, 0.5f);
        for (int c = 0; c < C; c++) {
            if (c % 5 == 1) gamma[c] = (floatX)0.0f;
            if (c % 7 == 2) gamma[c] = (floatX)-1.25f;
        }
        beta = random.normals(C, 0.25f, 0.5f);
        weight = random.normals((size_t)OC * C, 0, 1 / sqrtf(C));
        bias = random.normals(OC);
        for (int m = 0; m < micro; m++) {
            x.push_back(random.normals((size_t)rows * C, 0.5f, 2));
            dy.push_back(random.normals((size_t)rows * OC));
            dresidual.push_back(random.normals((size_t)rows * C));
        }
    }
};

struct Result {   // what the trainer computes, or the reference
    std::vector<Doubles> y, dx;   // one a micro-batch
    Doubles dgamma, dbeta, dweight, dbias;
};

Result reference(const Problem& p) {
    const int C = p.C, OC = p.OC;
    Doubles gamma = doubles(p.gamma), beta = doubles(p.beta), W = doubles(p.weight), b = doubles(p.bias);
    Result ref = {{}, {}, Doubles(C, 0), Doubles(C, 0), Doubles((size_t)OC * C, 0), Doubles(OC, 0)};
    Doubles z(C), ln(C), dln(C);
    for (int m = 0; m < p.micro; m++) {
        Doubles x = doubles(p.x[m]), dy = doubles(p.dy[m]), y((size_t)p.rows * OC), dx = doubles(p.dresidual[m]);
        for (int r = 0; r < p.rows; r++) {
            const double *xr = &x[(size_t)r * C], *dyr = &dy[(size_t)r * OC];
            double mean = 0, var = 0;
            for (int c = 0; c < C; c++) mean += xr[c] / C;
            for (int c = 0; c < C; c++) var += (xr[c] - mean) * (xr[c] - mean) / C;
            double rstd = 1 / sqrt(var + EPSILON);
            for (int c = 0; c < C; c++) {
                z[c] = (xr[c] - mean) * rstd;
                ln[c] = gamma[c] * z[c] + beta[c];
                dln[c] = 0;
            }
            for (int o = 0; o < OC; o++) {
                const double* w = &W[(size_t)o * C];
                double* dw = &ref.dweight[(size_t)o * C];
                double sum = b[o];
                for (int c = 0; c < C; c++) sum += w[c] * ln[c];
                y[(size_t)r * OC + o] = sum;
                ref.dbias[o] += dyr[o];
                for (int c = 0; c < C; c++) {
                    dln[c] += dyr[o] * w[c];
                    dw[c] += dyr[o] * ln[c];
                }
            }
            double mean_dz = 0, mean_dz_z = 0;
            for (int c = 0; c < C; c++) {
                ref.dgamma[c] += dln[c] * z[c];
                ref.dbeta[c] += dln[c];
                mean_dz += dln[c] * gamma[c] / C;
                mean_dz_z += dln[c] * gamma[c] * z[c] / C;
            }
            for (int c = 0; c < C; c++) dx[(size_t)r * C + c] += rstd * (dln[c] * gamma[c] - mean_dz - z[c] * mean_dz_z);
        }
        ref.y.push_back(y);
        ref.dx.push_back(dx);
    }
    return ref;
}

// ---------------------------------------------------------------------------------------------------------------------
// the trainer's layers, called in the trainer's order

enum Way { SHARED, EXACT, VERSION_1, UNFOLD_EACH };   // UNFOLD_EACH: wrongly, after every micro-batch

Result compute(const Problem& p, Way way, DType grad_type) {
    const int rows = p.rows, C = p.C, OC = p.OC;
    const size_t RC = (size_t)rows * C, RO = (size_t)rows * OC;
    Buffer<floatX> gamma(p.gamma), beta(p.beta), weight(p.weight), bias(p.bias), folded((size_t)OC * C), folded_bias(OC);
    Buffer<floatX> x(RC), kept(RC), y(RO), dy(RO), dln(RC), dx(RC);
    Buffer<float> mean(rows), rstd(rows), scratch(std::max(colsum_scratch(C), (size_t)COLSUM_SLICES * OC));
    GradBuffer dweight((size_t)OC * C, grad_type), dbias(OC, grad_type), dgamma(C, grad_type), dbeta(C, grad_type);
    const bool shared = way == SHARED || way == UNFOLD_EACH;
    Result result;
    for (int m = 0; m < p.micro; m++) {
        const bool add = m > 0;
        x.write(p.x[m]);
        dy.write(p.dy[m]);
        dx.write(p.dresidual[m]);
        if (shared) {
            layernorm_forward<true>(nullptr, kept.p, nullptr, rstd.p, x.p, nullptr, nullptr, nullptr, rows, C, 0);
            norm_fold(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0);
            matmul_forward(y.p, kept.p, folded.p, folded_bias.p, rows, C, OC, 0);
        } else {
            layernorm_forward<false>(nullptr, kept.p, mean.p, rstd.p, x.p, nullptr, gamma.p, beta.p, rows, C, 0);
            matmul_forward(y.p, kept.p, weight.p, bias.p, rows, C, OC, 0);
        }
        bias_backward(dbias.grad(), scratch.p, dy.p, add, rows, OC, 0);
        matmul_backward_weight(dweight.grad(), dy.p, kept.p, add, rows, C, OC, 0);
        matmul_backward_input(dln.p, dy.p, weight.p, rows, C, OC, 0);
        if (shared) {
            layernorm_backward<true>(dx.p, {}, {}, {}, scratch.p, dln.p, kept.p, nullptr, rstd.p, gamma.p, true, add, rows, C,
                                     0);
            if (m == p.micro - 1 || way == UNFOLD_EACH)
                norm_unfold(dweight.grad(), dgamma.grad(), dbeta.grad(), scratch.p, dbias.grad(), weight.p, gamma.p, beta.p, OC,
                            C, 0);
        } else if (way == EXACT) {
            layernorm_backward<false>(dx.p, {}, dgamma.grad(), dbeta.grad(), scratch.p, dln.p, x.p, mean.p, rstd.p, gamma.p,
                                      true, add, rows, C, 0);
        } else {
            layernorm_backward_1(dx.p, dgamma.grad(), dbeta.grad(), dln.p, x.p, mean.p, rstd.p, gamma.p, add, rows, C, 0);
        }
        result.y.push_back(doubles(y.read()));
        result.dx.push_back(doubles(dx.read()));
    }
    auto wide = [](const std::vector<float>& v) { return Doubles(v.begin(), v.end()); };
    result.dgamma = wide(dgamma.read());
    result.dbeta = wide(dbeta.read());
    result.dweight = wide(dweight.read());
    result.dbias = wide(dbias.read());
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

// In fp32 the sums of a thousand terms lose a few times 1e-7. In bf16 z, the folded weight, dz and what is stored are each
// rounded, by 2^-8 at most and a third of that on average, and gradients are sums of them with either sign.
constexpr double BAR = kFP32 ? 3e-6 : 2e-2;

struct Layers {   // how far each tensor may be from the reference
    Property y, dx, dgamma, dbeta, dweight, dbias;
    void compare(const Result& ours, const Result& ref, double bar) {
        for (size_t m = 0; m < ref.y.size(); m++) {
            y.within(m, distance(ours.y[m], ref.y[m]), 0, bar);
            dx.within(m, distance(ours.dx[m], ref.dx[m]), 0, bar);
        }
        dgamma.within(0, distance(ours.dgamma, ref.dgamma), 0, bar);
        dbeta.within(0, distance(ours.dbeta, ref.dbeta), 0, bar);
        dweight.within(0, distance(ours.dweight, ref.dweight), 0, bar);
        dbias.within(0, distance(ours.dbias, ref.dbias), 0, bar);
    }
    void print() { report({&y, &dx, &dgamma, &dbeta, &dweight, &dbias}); }
};

void test_gradients(uint64_t seed) {
    Layers shared = {{"shared: y"}, {"shared: dx"}, {"shared: dgamma"}, {"shared: dbeta"}, {"shared: dW"}, {"shared: db"}};
    Layers exact = {{"exact: y"}, {"exact: dx"}, {"exact: dgamma"}, {"exact: dbeta"}, {"exact: dW"}, {"exact: db"}};
    Layers one = {{"version 1: y"},     {"version 1: dx"}, {"version 1: dgamma"},
                  {"version 1: dbeta"}, {"version 1: dW"}, {"version 1: db"}};
    Property again("shared: the same bits in a second run");
    for (int C : {8, 24, 96, 136, 1000})
        for (int OC : {8, 40, 264})
            for (int rows : {1, 7, 65})
                for (int micro : {1, 3}) {   // gradients are fp32 when several micro-batches are added up, as in the trainer
                    set_case("C %d, OC %d, rows %d, micro-batches %d", C, OC, rows, micro);
                    Problem p(seed, micro, rows, C, OC);
                    Result ref = reference(p);
                    DType type = micro > 1 ? F32 : FLOATX;
                    Result ours = compute(p, SHARED, type);
                    shared.compare(ours, ref, BAR);
                    if (C == 1000 && OC > 8) continue;   // the rest is to compare with, and to learn from
                    exact.compare(compute(p, EXACT, type), ref, BAR);
                    one.compare(compute(p, VERSION_1, type), ref, BAR);
                    Result second = compute(p, SHARED, type);
                    again.is(same_bits(ours.dx[0], second.dx[0]) && same_bits(ours.y[0], second.y[0]) &&
                                 same_bits(ours.dweight, second.dweight) && same_bits(ours.dgamma, second.dgamma) &&
                                 same_bits(ours.dbeta, second.dbeta),
                             "other bits");
                }
    printf("gradients of LayerNorm and Linear (relative distance to double precision, at most %.0e)\n", BAR);
    shared.print();
    report({&again});
    exact.print();
    one.print();
}

// W, gamma and beta are constant within a step, so the sum of G may be unfolded once. To do so after each micro-batch is what a
// trainer does that forgets to wait for the last: G of the second is added to a dW that has been unfolded.
void test_unfold_once(uint64_t seed) {
    Property right("unfolding once, after 3 micro-batches: dW, dgamma, dbeta"),
        wrong("unfolding after each would be wrong: dW and dgamma are off by more than a tenth");
    set_case("C 96, OC 40, rows 7, 3 micro-batches");
    Problem p(seed, 3, 7, 96, 40);
    Result ref = reference(p), once = compute(p, SHARED, F32), each = compute(p, UNFOLD_EACH, F32);
    right.within(0, distance(once.dweight, ref.dweight), 0, BAR);
    right.within(1, distance(once.dgamma, ref.dgamma), 0, BAR);
    right.within(2, distance(once.dbeta, ref.dbeta), 0, BAR);
    double dweight = distance(each.dweight, ref.dweight), dgamma = distance(each.dgamma, ref.dgamma);
    wrong.is(dweight > 0.1, "dW is right");
    wrong.is(dgamma > 0.1, "dgamma is right");
    printf("micro-batches\n");
    report({&right, &wrong});
    printf("       unfolded after each: dW is off by %.2f, dgamma by %.2f\n", dweight, dgamma);
    Problem q(seed, 1, 7, 96, 40);   // nothing to get wrong
    Property same("with one micro-batch both are the same bits");
    same.is(same_bits(compute(q, SHARED, F32).dweight, compute(q, UNFOLD_EACH, F32).dweight), "other bits");
    report({&same});
}

// W' is a product, rounded once: the same bits. b' is a sum along a row: a lane's part, then 5 additions between lanes, one of
// b. OC is a multiple of 8 in a model, because matmuls want it so; folding and unfolding do not care, and with other numbers
// the last block has warps without a row.
double row_depth(int C) { return 8 * ceil_div(C, 256) + 5 + 1; }
void test_fold(uint64_t seed) {
    Property weight("W'", "every bit"), bias("b'", "a rounding for each of the additions that stand in a row"),
        one("version 1: W' and b'"), unfolded("unfolding: dW", "three roundings, and one of storing"),
        sums("unfolding: dgamma and dbeta", "a rounding for each addition, 2 for a term, one of storing"),
        unfolded_1("unfolding, version 1: dW", "likewise"), sums_1("unfolding, version 1: dgamma and dbeta", "likewise"),
        again("unfolding: the same bits in a second run");
    struct Shape { int C, OC; };
    std::vector<Shape> shapes;
    for (int C : {8, 24, 96, 136, 264, 1000})
        for (int OC : {1, 7, 13, 40, 264}) shapes.push_back({C, OC});
    shapes.push_back({24, 1101});   // 17 slices, which two warps add up
    for (Shape shape : shapes) {
        const auto [C, OC] = shape;
        set_case("C %d, OC %d", C, OC);
        Problem p(seed, 1, 1, C, OC);
        Buffer<floatX> W(p.weight), b(p.bias), gamma(p.gamma), beta(p.beta), folded((size_t)OC * C), folded_bias(OC),
            folded1((size_t)OC * C), folded_bias1(OC);
        norm_fold(folded.p, folded_bias.p, W.p, b.p, gamma.p, beta.p, OC, C, 0);
        norm_fold_1(folded1.p, folded_bias1.p, W.p, b.p, gamma.p, beta.p, OC, C, 0);
        std::vector<floatX> w = folded.read(), w1 = folded1.read(), fb = folded_bias.read(), fb1 = folded_bias1.read();
        one.is(same_bits(w, w1), "W' has other bits");
        for (int o = 0; o < OC; o++) {
            double sum = (float)p.bias[o], terms = fabs(sum);
            for (int c = 0; c < C; c++) {
                size_t i = (size_t)o * C + c;
                weight.equal(i, (float)w[i], (float)(floatX)((float)p.weight[i] * (float)p.gamma[c]));
                double term = (double)(float)p.weight[i] * (float)p.beta[c];
                sum += term;
                terms += fabs(term);
            }
            double storing = fabs(sum) * EPSX * 1.01;
            bias.within(o, (float)fb[o], sum, terms * EPS32 * (row_depth(C) + 1) + storing);
            one.within(o, (float)fb1[o], sum, terms * EPS32 * (C + 2) + storing);
        }
        for (DType type : {F32, BF16}) {
            Random random(seed, 77);
            GradBuffer dW((size_t)OC * C, type), dbias(OC, type);
            dW.write(floats(random.normals((size_t)OC * C)));
            dbias.write(floats(random.normals(OC)));
            const std::vector<float> G = dW.read(), db = dbias.read();
            std::vector<float> first;
            for (int version : {2, 3, 1}) {   // 2 and 3 are the trainer's
                set_case("C %d, OC %d, %s, unfolding, version %d", C, OC, dtype_name(type), version);
                GradBuffer dgamma(C, type), dbeta(C, type);
                Buffer<float> scratch((size_t)2 * colsum_slices(OC) * C);   // no more than is used
                dW.write(G);
                if (version == 1)
                    norm_unfold_1(dW.grad(), dgamma.grad(), dbeta.grad(), dbias.grad(), W.p, gamma.p, beta.p, OC, C, 0);
                else
                    norm_unfold(dW.grad(), dgamma.grad(), dbeta.grad(), scratch.p, dbias.grad(), W.p, gamma.p, beta.p, OC, C,
                                0);
                const std::vector<float> got = dW.read(), got_gamma = dgamma.read(), got_beta = dbeta.read();
                std::vector<float> all = got;
                all.insert(all.end(), got_gamma.begin(), got_gamma.end());
                all.insert(all.end(), got_beta.begin(), got_beta.end());
                if (version == 3) again.is(same_bits(all, first), "other bits");
                first = all;
                const double store = type == BF16 ? EPS16 : 0, depth = version == 1 ? OC : colsum_depth(OC);
                for (int c = 0; c < C; c++) {
                    double sg = 0, tg = 0, sb = 0, tb = 0;
                    for (int o = 0; o < OC; o++) {
                        size_t i = (size_t)o * C + c;
                        double v = (float)p.weight[i], x = G[i] * (double)(float)p.gamma[c],
                               y = db[o] * (double)(float)p.beta[c];
                        double error = 3 * EPS32 * (fabs(x) + fabs(y));
                        (version == 1 ? unfolded_1 : unfolded)
                            .within(i, got[i], x + y, (error + (fabs(x + y) + error) * store) * 1.01);
                        sg += G[i] * v, tg += fabs(G[i] * v);
                        sb += db[o] * v, tb += fabs(db[o] * v);
                    }
                    tg *= EPS32 * (depth + 2), tb *= EPS32 * (depth + 2);
                    Property& s = version == 1 ? sums_1 : sums;
                    s.within(c, got_gamma[c], sg, (tg + (fabs(sg) + tg) * store) * 1.01);
                    s.within(c, got_beta[c], sb, (tb + (fabs(sb) + tb) * store) * 1.01);
                }
            }
        }
    }
    printf("folding and unfolding\n");
    report({&weight, &bias, &one, &unfolded, &sums, &again, &unfolded_1, &sums_1});
}

// The norm's backward as it is given z: dx element by element, and the bias of the matmul before it.
void test_shared_backward(uint64_t seed) {
    Property dx("dx, given z", "the two means' roundings, half a dozen of its own, one of storing"),
        bias32("dbias in fp32", "what dx has before it is stored, and a rounding for each addition"),
        bias16("dbias in bf16", "and one of storing"), again("the same bits in a second run, and where dbias is not wanted");
    for (int C : {8, 24, 136, 264, 1000})
        for (int rows : {1, 8, 9, 65, 301}) {
            const size_t n = (size_t)rows * C;
            Random random(seed, 5000000 + C * 1000 + rows);
            const std::vector<floatX> d = random.normals(n), z = random.normals(n), gamma = random.normals(C, 1, 0.5f),
                                      around = random.normals(n);
            std::vector<float> rstd(rows), before(C);
            for (float& r : rstd) r = 0.1f + 3 * random.uniform();
            for (float& b : before) b = (float)(__nv_bfloat16)(10 * random.normal());
            Buffer<floatX> bd(d), bz(z), bgamma(gamma);
            Buffer<float> brstd(rstd);
            for (DType type : {F32, BF16})
                for (bool add : {false, true}) {
                    set_case("C %d, rows %d, %s, %s", C, rows, dtype_name(type), add ? "added" : "written");
                    GradBuffer dbias(C, type), dbias2(C, type);
                    Buffer<floatX> out(n), out2(n), out3(n);
                    Buffer<float> scratch((size_t)norm_slices(rows) * C);   // no more than is used
                    if (add) dbias.write(before), dbias2.write(before);
                    for (Buffer<floatX>* b : {&out, &out2, &out3})
                        if (add) b->write(around);
                    auto run = [&](floatX* dresidual, Grad bias) {
                        layernorm_backward<true>(dresidual, bias, {}, {}, scratch.p, bd.p, bz.p, nullptr, brstd.p, bgamma.p,
                                                 add, add, rows, C, 0);
                    };
                    run(out.p, dbias.grad());
                    run(out2.p, dbias2.grad());
                    run(out3.p, {});
                    const std::vector<floatX> got = out.read();
                    const std::vector<float> sum = dbias.read();
                    again.is(same_bits(got, out2.read()) && same_bits(got, out3.read()) && same_bits(sum, dbias2.read()),
                             "other bits");
                    Doubles total(C, 0), size(C, 0), error_total(C, 0);
                    for (int r = 0; r < rows; r++) {
                        double mean = 0, mean_z = 0, terms = 0, terms_z = 0;
                        auto dz = [&](int c) { return (double)(float)d[(size_t)r * C + c] * (float)gamma[c]; };
                        for (int c = 0; c < C; c++) {
                            double zc = (float)z[(size_t)r * C + c];
                            mean += dz(c) / C, terms += fabs(dz(c)) / C;
                            mean_z += dz(c) * zc / C, terms_z += fabs(dz(c) * zc) / C;
                        }
                        for (int c = 0; c < C; c++) {
                            size_t i = (size_t)r * C + c;
                            double zc = (float)z[i], was = add ? (double)(float)around[i] : 0;
                            double expected = was + rstd[r] * (dz(c) - mean - zc * mean_z);
                            // as many as stand in a row's sum, one of dz, one of dz z, one of dividing; then a difference, a
                            // product, a difference, the product with rstd, and adding
                            double error = EPS32 * (rstd[r] * (4 * fabs(dz(c)) + terms * (row_depth(C) + 2) + 3 * fabs(mean) +
                                                               fabs(zc) * (terms_z * (row_depth(C) + 3) + 3 * fabs(mean_z))) +
                                                    fabs(expected));
                            dx.within(i, (float)got[i], expected, (error + (fabs(expected) + error) * EPSX) * 1.01);
                            total[c] += expected, size[c] += fabs(expected), error_total[c] += error;
                        }
                    }
                    for (int c = 0; c < C; c++) {
                        double was = add ? before[c] : 0, expected = total[c] + was;
                        double error = error_total[c] + (size[c] + fabs(was)) * EPS32 * (norm_colsum_depth(rows) + 1);
                        double storing = type == BF16 ? (fabs(expected) + error) * EPS16 : 0;
                        (type == F32 ? bias32 : bias16).within(c, sum[c], expected, (error + storing) * 1.01);
                    }
                }
        }
    printf("the norm's backward, shared\n");
    report({&dx, &bias32, &bias16, &again});
}

// Index arithmetic where W has more than 2^31 elements: the first and the last block of folding and of unfolding make the bits
// that they make of the same rows in a small W. The trainer cuts W into 64 slices to unfold it; here it is the 65535 that a
// grid can have, so that a block has 64 rows to do.
void test_far(uint64_t seed) {
    constexpr int C = 520, OC = (1 << 22) + 5, slices = 65535;
    constexpr size_t n = (size_t)OC * C;
    static_assert(n > (size_t)1 << 31, "");
    Property fold("folding beyond 2^31 elements, first and last block", "every bit"),
        unfold("unfolding beyond 2^31 elements, first and last block", "every bit");
    set_case("OC %d, C %d", OC, C);
    FarBuffer<floatX> weight(n), folded(n), bias(OC), folded_bias(OC);
    FarBuffer<float> dweight(n), dbias(OC), partial((size_t)2 * slices * C);
    if (!weight.p || !folded.p || !bias.p || !folded_bias.p || !dweight.p || !dbias.p || !partial.p) return;
    Random random(seed, 31);
    Buffer<floatX> gamma(random.normals(C, 1, 0.5f)), beta(random.normals(C));
    for (bool last : {false, true}) {
        const int row = last ? (OC - 1) / 8 * 8 : 0, count = last ? OC - row : 8;
        const size_t at = (size_t)row * C;
        const std::vector<floatX> w = random.normals((size_t)count * C), b = random.normals(count);
        Buffer<floatX> near_weight(w), near_bias(b), near_folded(w.size()), near_folded_bias(count);
        norm_fold(near_folded.p, near_folded_bias.p, near_weight.p, near_bias.p, gamma.p, beta.p, count, C, 0);
        weight.write(at, w);
        bias.write(row, b);
        launch_blocks(row / 8, row / 8,
                      [&] { norm_fold(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0); });
        fold.is(same_bits(folded.read(at, w.size()), near_folded.read()), "W' has other bits");
        fold.is(same_bits(folded_bias.read(row, count), near_folded_bias.read()), "b' has other bits");
    }
    const dim3 grid(ceil_div(C, 32 * VEC), slices);
    for (bool last : {false, true}) {   // the first 256 columns of the first slice, the last 8 of the last
        const int first = last ? (int)((size_t)OC * (slices - 1) / slices) : 0, end = last ? OC : (int)((size_t)OC / slices);
        const int rows = end - first, column = last ? C / 256 * 256 : 0, columns = std::min(C - column, 256);
        const size_t at = (size_t)first * C, slice = last ? slices - 1 : 0;
        const std::vector<floatX> w = random.normals((size_t)rows * C);
        const std::vector<float> G = floats(random.normals((size_t)rows * C)), db = floats(random.normals(rows));
        Buffer<floatX> near_weight(w);
        Buffer<float> near_dweight(G), near_dbias(db), near_partial((size_t)2 * C);
        const Grad near_G = {near_dweight.p, F32}, near_db = {near_dbias.p, F32}, far_G = {dweight.p, F32},
                   far_db = {dbias.p, F32};
        norm_unfold_kernel<<<dim3(grid.x, 1), 256>>>(near_G, near_partial.p, near_partial.p + C, near_db, near_weight.p,
                                                     gamma.p, beta.p, rows, C);
        cudaCheck(cudaGetLastError());
        weight.write(at, w);
        dweight.write(at, G);
        dbias.write(first, db);
        const int64_t block = last ? (int64_t)grid.x * slices - 1 : 0;
        launch_blocks(block, block, [&] {
            norm_unfold_kernel<<<grid, 256>>>(far_G, partial.p, partial.p + (size_t)slices * C, far_db, weight.p, gamma.p,
                                              beta.p, OC, C);
            cudaCheck(cudaGetLastError());
        });
        const std::vector<float> dW = near_dweight.read(), sums = near_partial.read();
        for (int r = 0; r < rows; r++) {
            const float* expected = &dW[(size_t)r * C + column];
            unfold.is(
                same_bits(dweight.read(at + (size_t)r * C + column, columns), std::vector<float>(expected, expected + columns)),
                "dW has other bits");
        }
        for (size_t i : {0, 1}) {
            const float* expected = &sums[i * C + column];
            unfold.is(same_bits(partial.read((i * slices + slice) * C + column, columns),
                                std::vector<float>(expected, expected + columns)),
                      "a partial sum has other bits");
        }
    }
    printf("far\n");
    report({&fold, &unfold});
}

// z and rstd element by element, also where a row is far from zero or has no spread. The mean is a sum in fp32: it is off by as
// many roundings of |x| as additions stand in a row, and z by that times rstd. With x around 1e4 and a spread of 1 that is 1e-3
// or two: fp32 cannot hold such an x to better than 5e-4 itself.
void test_norm(uint64_t seed) {
    Property z_fine("z", "the mean's and the spread's roundings"), r_fine("rstd", "the same"),
        residual("residual = inp + add", "every bit"), far("z of rows around 1e4", "the mean's roundings times rstd: 1e-3"),
        flat("z of rows of equal values", "the same: 0 but for the mean's roundings"),
        alias("the same bits with the residual in place"), dx_fine("dx", "relative distance"),
        dx_far("dx of rows around 1e4", "and three times the shift of z"), dx_flat("dx of rows of equal values", "likewise");
    for (int C : {8, 24, 96, 136, 1000})
        for (int rows : {1, 7, 65})
            for (int kind : {0, 1, 2}) {   // around 0.5, around 1e4, equal values
                set_case("C %d, rows %d, %s", C, rows, kind == 0 ? "around 0.5" : kind == 1 ? "around 1e4" : "equal values");
                Random random(seed, 1000 * C + 10 * rows + kind);
                size_t n = (size_t)rows * C;
                std::vector<floatX> inp = random.normals(n, kind == 1 ? 1e4f : 0.5f, kind == 1 && !kFP32 ? 200 : 1),
                                    add = random.normals(n);
                if (kind == 2)
                    for (size_t i = 0; i < n; i++) inp[i] = inp[i / C * C], add[i] = add[i / C * C];
                Buffer<floatX> a(inp), b(add), res(n), z(n), z2(n);
                Buffer<float> rstd(rows), rstd2(rows);
                layernorm_forward<true>(res.p, z.p, nullptr, rstd.p, a.p, b.p, nullptr, nullptr, rows, C, 0);
                layernorm_forward<true>(a.p, z2.p, nullptr, rstd2.p, a.p, b.p, nullptr, nullptr, rows, C, 0);
                std::vector<floatX> x = res.read(), got = z.read();
                std::vector<float> rs = rstd.read();
                alias.is(same_bits(x, a.read()) && same_bits(got, z2.read()) && same_bits(rs, rstd2.read()), "other bits");
                std::vector<floatX> dz = random.normals(n);
                Buffer<floatX> d(dz), dx(n);
                Buffer<floatX> ones(std::vector<floatX>(C, (floatX)1.0f));
                Buffer<float> scratch(colsum_scratch(C));
                layernorm_backward<true>(dx.p, {}, {}, {}, scratch.p, d.p, z.p, nullptr, rstd.p, ones.p, false, false, rows, C,
                                         0);
                Doubles ours = doubles(dx.read()), ref(n);
                double worst_shift = 0;
                for (int r = 0; r < rows; r++) {
                    size_t base = (size_t)r * C;
                    double mean = 0, size = 0, var = 0, mean_dz = 0, mean_dz_z = 0;
                    for (int c = 0; c < C; c++) {
                        residual.equal(base + c, (float)x[base + c],
                                       (float)(floatX)((float)inp[base + c] + (float)add[base + c]));
                        mean += (double)(float)x[base + c] / C;
                        size += fabs((double)(float)x[base + c]) / C;
                    }
                    for (int c = 0; c < C; c++) var += ((float)x[base + c] - mean) * ((float)x[base + c] - mean) / C;
                    double reference = 1 / sqrt(var + EPSILON);
                    double shift = size * EPS32 * (row_depth(C) + 1) * reference;        // of z, by the mean's error
                    double spread = EPS32 * (row_depth(C) + 4) / 2 + shift * shift;      // of rstd, relative
                    worst_shift = std::max(worst_shift, shift);
                    r_fine.within(r, rs[r], reference, reference * spread * 1.01);
                    for (int c = 0; c < C; c++) {
                        double zr = ((float)x[base + c] - mean) * reference;
                        Property& p = kind == 0 ? z_fine : kind == 1 ? far : flat;
                        p.within(base + c, (float)got[base + c], zr,
                                 (shift + fabs(zr) * (spread + 3 * EPS32)) * 1.01 + (fabs(zr) + shift) * EPSX * 1.01);
                        mean_dz += (float)dz[base + c] / (double)C;
                        mean_dz_z += (float)dz[base + c] * zr / C;
                    }
                    for (int c = 0; c < C; c++)
                        ref[base + c] =
                            reference * ((float)dz[base + c] - mean_dz - ((float)x[base + c] - mean) * reference * mean_dz_z);
                }
                // dz - z mean(dz z): a shift of all z is seen twice in the result, and the rest is BAR
                (kind == 0 ? dx_fine : kind == 1 ? dx_far : dx_flat).within(0, distance(ours, ref), 0, BAR + 3 * worst_shift);
            }
    printf("the norm\n");
    report({&residual, &z_fine, &r_fine, &dx_fine, &far, &dx_far, &flat, &dx_flat, &alias});
}

// What is no number must reach the gradients and the loss.
void test_nan(uint64_t seed) {
    Property p("a NaN in x, gamma, beta, W or dy reaches what it is part of, and only that");
    const int C = 96, OC = 40, rows = 7;
    auto nans = [](const Doubles& v, size_t from, size_t count, size_t step = 1) {
        size_t n = 0;
        for (size_t k = 0; k < count; k++) n += std::isnan(v[from + k * step]);
        return n;
    };
    for (const char* where : {"x", "gamma", "beta", "W", "dy"}) {
        set_case("a NaN in %s", where);
        Problem q(seed, 1, rows, C, OC);
        const int r = 3, c = 5, o = 11;
        std::string w = where;
        (w == "x"       ? q.x[0][r * C + c]
         : w == "gamma" ? q.gamma[c]
         : w == "beta"  ? q.beta[c]
         : w == "W"     ? q.weight[o * C + c]
                        : q.dy[0][r * OC + o]) = (floatX)NAN;
        Result a = compute(q, SHARED, F32);
        const size_t y_all = nans(a.y[0], 0, rows * OC), dx_all = nans(a.dx[0], 0, rows * C),
                     dW_all = nans(a.dweight, 0, OC * C);
        if (w == "x") {   // its row, and through the sum over rows all weight gradients
            p.is(nans(a.y[0], r * OC, OC) == OC && y_all == OC, "y: expected row 3 alone");
            p.is(nans(a.dx[0], r * C, C) == C && dx_all == C, "dx: expected row 3 alone");
            p.is(dW_all == (size_t)OC * C && nans(a.dgamma, 0, C) == C, "dW, dgamma: expected all of them");
            p.is(nans(a.dbias, 0, OC) == 0, "db: expected none");
        } else if (w == "gamma") {   // its column of W'
            p.is(y_all == (size_t)rows * OC && dx_all == (size_t)rows * C, "y, dx: expected all of them");
            p.is(nans(a.dweight, c, OC, C) == OC && dW_all == OC, "dW: expected column 5 alone");
        } else if (w == "beta") {   // b', and dW = G gamma + db beta^T
            p.is(y_all == (size_t)rows * OC && dx_all == 0, "y: expected all, dx: none");
            p.is(nans(a.dweight, c, OC, C) == OC && dW_all == OC, "dW: expected column 5 alone");
        } else if (w == "W") {
            p.is(y_all == rows && nans(a.y[0], o, rows, OC) == rows, "y: expected column 11 alone");
            p.is(dx_all == (size_t)rows * C, "dx: expected all");
            p.is(std::isnan(a.dgamma[c]) && std::isnan(a.dbeta[c]) && nans(a.dgamma, 0, C) == 1 && nans(a.dbeta, 0, C) == 1,
                 "dgamma, dbeta: expected channel 5 alone");
            p.is(dW_all == 0, "dW: expected none");
        } else {
            p.is(nans(a.dx[0], r * C, C) == C && dx_all == C, "dx: expected row 3 alone");
            p.is(std::isnan(a.dbias[o]) && nans(a.dbias, 0, OC) == 1, "db: expected output 11 alone");
            p.is(nans(a.dweight, o * C, C) == C && dW_all == C, "dW: expected row 11 alone");
            p.is(nans(a.dgamma, 0, C) == C && nans(a.dbeta, 0, C) == C, "dgamma, dbeta: expected all");
        }
    }
    printf("NaN\n");
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int rows, int C, int OC) {
    const double X = sizeof(floatX);
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: the norm, rows %d, C %d", model, rows, C);
    BenchTable t(title, (size_t)rows * C);
    size_t m = t.timed ? t.n : C, w = t.timed ? (size_t)OC * C : C;   // without a GPU nothing runs
    Random random(1337, 1);
    Buffer<floatX> x(m), add(m), out(m), dout(m), dresidual(m), gamma(random.normals(C, 1, 0.5f)), beta(random.normals(C)),
        weight(w), folded(w), bias(random.normals(OC)), folded_bias(OC);
    for (Buffer<floatX>* b : {&x, &add, &out, &dout, &dresidual, &weight}) b->fill();
    Buffer<float> mean(t.timed ? rows : 1), rstd(t.timed ? rows : 1),
        scratch(std::max(colsum_scratch(C), (size_t)COLSUM_SLICES * OC));
    cudaCheck(cudaMemset(mean.p, 0, mean.bytes()));
    rstd.fill(0.5f, 1.5f);
    GradBuffer dgamma(C, F32), dbeta(C, F32), dbias(OC, F32), dweight(w, F32);
    dweight.fill();
    dbias.fill();
    t.row("forward, exact: adds the residual, keeps x and y", 4 * X,
          [&] { layernorm_forward<false>(x.p, out.p, mean.p, rstd.p, x.p, add.p, gamma.p, beta.p, rows, C, 0); });
    t.row("forward, shared: adds the residual, keeps z alone", 4 * X,
          [&] { layernorm_forward<true>(x.p, out.p, nullptr, rstd.p, x.p, add.p, nullptr, nullptr, rows, C, 0); });
    t.row("backward, version 1: a row a thread, then a column a thread", 6 * X, [&] {
        layernorm_backward_1(dresidual.p, dgamma.grad(), dbeta.grad(), dout.p, x.p, mean.p, rstd.p, gamma.p, false, rows, C, 0);
    });
    t.row("backward, version 2: the trainer's exact one", 4 * X, [&] {
        layernorm_backward<false>(dresidual.p, {}, dgamma.grad(), dbeta.grad(), scratch.p, dout.p, x.p, mean.p, rstd.p, gamma.p,
                                  true, false, rows, C, 0);
    });
    t.row("backward, version 3: the trainer's shared one", 4 * X, [&] {
        layernorm_backward<true>(dresidual.p, {}, {}, {}, scratch.p, dout.p, out.p, nullptr, rstd.p, gamma.p, true, false, rows,
                                 C, 0);
    });

    snprintf(title, sizeof title, "GPT-2 %s: the matmul's weight, OC %d, C %d, gradients in fp32", model, OC, C);
    BenchTable u(title, (size_t)OC * C);
    u.row("fold, version 1 (once a micro-batch)", 3 * X,
          [&] { norm_fold_1(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0); });
    u.row("fold, version 2: the trainer's", 2 * X,
          [&] { norm_fold(folded.p, folded_bias.p, weight.p, bias.p, gamma.p, beta.p, OC, C, 0); });
    u.row("unfold, version 1 (once a step)", 12 + 2 * X, [&] {
        norm_unfold_1(dweight.grad(), dgamma.grad(), dbeta.grad(), dbias.grad(), weight.p, gamma.p, beta.p, OC, C, 0);
    });
    u.row("unfold, version 2: the trainer's", 8 + X, [&] {
        norm_unfold(dweight.grad(), dgamma.grad(), dbeta.grad(), scratch.p, dbias.grad(), weight.p, gamma.p, beta.p, OC, C, 0);
    });
}

int main(int argc, char** argv) {
    Arguments o =
        parse_arguments(argc, argv, "mslayernorm: a LayerNorm and the matmul behind it that keep one tensor between them");
    if (o.bench) {
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 768, 4 * 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 1600, 4 * 1600);
        return 0;
    }
    test_misuse(
        o, {{"C of 12", "norm_fold: C is 12: expected a multiple of 8",
             [] { norm_fold(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 8, 12, 0); }},
            {"C of 12, unfolding", "norm_unfold: C is 12: expected a multiple of 8",
             [] { norm_unfold({}, {}, {}, nullptr, {}, nullptr, nullptr, nullptr, 8, 12, 0); }},
            {"C of 12, the norm", "layernorm_forward: C is 12: expected a multiple of 8",
             [] { layernorm_forward<true>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 12, 0); }},
            {"C of 12, backward", "layernorm_backward: C is 12: expected a multiple of 8", [] {
                 layernorm_backward<true>(nullptr, {}, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, false,
                                          false, 1, 12, 0);
             }}});
    MatmulSession cublas;
    printf("mslayernorm, %s\n", dtype_name(FLOATX));
    test_norm(o.seed);
    test_fold(o.seed);
    test_gradients(o.seed);
    test_shared_backward(o.seed);
    test_unfold_once(o.seed);
    test_nan(o.seed);
    test_far(o.seed);
    return finish(o);
}
