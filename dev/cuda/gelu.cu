/*
GELU, its backward with the gradient of the bias before it, and the matmul that it may be a part of: exact, and keeping k = 1 to 4
bits of an element for backward (ReGELU2 for k = 2). The trainer's kernels, tested, and simpler ones beside them to learn from.
Sections 2 and 3 of train_gpt2.cu have them; section 2 explains the method that keeps bits.

    make dev/cuda/gelu && ./dev/cuda/gelu [--bench]

GPT-2's GELU is 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
Forward: out = GELU(inp + bias), and for each element of that sum a code of k bits, or none where k is 0.
Backward: d *= slope, and dbias (+)= the sums of what comes out over the rows. The slope is that of the code, or if k is 0 GELU'(x),
for which x has been kept, 2 bytes per element in bf16.
A thread owns 8 neighbouring elements of a row, so OC has to be a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"
#include "codes.cuh"

// ---- versions of the forward pass

// Version 1: the formula as it is printed, and one kernel per step. The first adds the bias (2 + 2 bytes in bf16), the last reads
// that again and writes GELU (2 + 2): 8 bytes per element, where 4 are enough; 1.6 GB instead of 0.8 for each of the 124M model's
// layers at B = 64, T = 1024. Between the two x is rounded to bf16 for nobody's benefit. The codes read the tensor a third time (2)
// and spend a byte (1) on what fits in 2 bits, because threads that own one element each cannot write into one byte without getting
// in each other's way: 11 bytes.
//
// And the formula is a trap. On the left tanh(u) is near -1, where fp32 numbers are 6e-8 apart, and 1 + tanh(u) is what is left of
// a subtraction: at x = -4 its error is a thousandth of it, and from -5.2 on nothing is left, while GELU is still -6e-8. The test
// prints how the relative error grows to 100%. A derivative made in this way has it too.
__global__ void add_bias_1_kernel(floatX* x, const floatX* inp, const floatX* bias, size_t n, int OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)inp[i] + (float)bias[i % OC]);
}
__device__ inline float gelu_1(float x) { return 0.5f * x * (1.0f + tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x))); }
__global__ void gelu_1_kernel(floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)gelu_1((float)x[i]);
}
template <int BITS> void act_forward_1(floatX* out, void* byte_codes, const floatX* inp, const floatX* bias, size_t rows, int OC) {
    size_t n = rows * OC;
    int blocks = ceil_div(n, 256);
    add_bias_1_kernel<<<blocks, 256>>>(out, inp, bias, n, OC);
    if constexpr (BITS > 0) codes_1_kernel<BITS><<<blocks, 256>>>((uint8_t*)byte_codes, out, gelu_steps<BITS>(), n, OC, OC);
    gelu_1_kernel<<<blocks, 256>>>(out, n);
}

// Version 2, the trainer's act_forward: one kernel, 4 bytes and k bits, all that there is to move. A thread takes a group of 8: a
// load and a store of 16 bytes, one division (i % OC) for all of them, and the codes meet in a register. With k = 0 the matmul
// before it adds the bias in its epilogue, and writes the x that is kept.
// 0.5 (1 + tanh(u)) is the sigmoid of 2u, 1 / (1 + exp(-2u)): the same function with one exponential and nothing that cancels. What
// u has lost by rounding the exponential multiplies by 2u, so that a result may be off by some dozens of roundings where |u| is
// large, and not by more, however small it is itself. (On the far left exp(-2u) is beyond fp32: then 1 / infinity is the 0 that it
// should be.) bf16 builds take the exponential and the reciprocal from the hardware, right to 22 bits, one instruction each.
template <int BITS> void act_forward_2(floatX* out, void* kept, const floatX* inp, const floatX* bias, size_t rows, int OC) {
    act_forward<BITS>(out, (ActKept<BITS>*)kept, inp, bias, rows, OC, 0);
}

// Version 3: the matmul's epilogue does all of it, if k is 0 (cuBLASLt's GELU_AUX_BIAS, --gelu-fusion 1; test_gpt2 tests it). It
// has x in registers, writes it for backward (2) and GELU(x) (2). Before, the matmul wrote x (2), and the kernel read it (2) and
// wrote GELU (2): 4 bytes instead of 6, and a launch less. In bf16 GELU is then taken of the sum in fp32, and not of the x that is
// kept, which has been rounded. Whether it is faster depends on how well NVIDIA's matmul with that epilogue suits the shape;
// --bench tells.

// ---- versions of the backward pass

// Version 1: the slope, one element per thread (read d and what was kept, write d: 4 bytes and k bits, or 6), then the bias: a
// thread owns a column and walks down all rows (2). 3072 columns are 96 warps for a GPU that can hold 8000: each has a few loads
// under way at a time, far too few to keep the memory busy.
template <int BITS> __device__ inline float slope_1(const void* kept, size_t i) {
    if constexpr (BITS == 0) return gelu_derivative((float)((const floatX*)kept)[i]);
    else return code_slope_1<BITS>((const uint8_t*)kept, gelu_steps<BITS>(), i);
}
template <int BITS> __global__ void slope_1_kernel(floatX* d, const void* kept, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) d[i] = (floatX)((float)d[i] * slope_1<BITS>(kept, i));
}
template <int BITS> void act_backward_1(floatX* d, Grad dbias, float*, const void* kept, bool accumulate, int rows, int OC) {
    size_t n = (size_t)rows * OC;
    slope_1_kernel<BITS><<<ceil_div(n, 256), 256>>>(d, kept, n);
    bias_backward_1(dbias, d, accumulate, rows, OC);
}

// Version 2, the trainer's act_backward: one pass, 2 bytes less. The thread that sums a column for the bias multiplies by the slope
// on its way, and adds up products that have not been rounded to bf16. And the pass is cut to pieces. A warp's lanes own 8
// neighbouring columns each, so that a load of the warp is 512 bytes in a row; a block's 8 warps take every eighth row of a slice,
// and there are 64 slices of the rows: 6144 warps at 124M. Their sums meet in shared memory, in the order of the warps, and 64 sums
// per column go to memory, where a second kernel adds them, in a fixed order too: 0.8 MB each way beside the 1.2 GB of d and x.
// About 150 additions follow one another instead of 65536.
template <int BITS>
void act_backward_2(floatX* d, Grad dbias, float* scratch, const void* kept, bool accumulate, int rows, int OC) {
    act_backward<BITS>(d, dbias, scratch, (const ActKept<BITS>*)kept, accumulate, rows, OC, 0);
}

// Version 3, if k is 0: cuBLASLt's DGELU epilogue (--gelu-fusion 2). The matmul that makes d reads x (2) and writes the product
// (2), and bias_backward reads that (2): 6 bytes, where matmul and version 2 together move 2 + 6.

// ---- all numbers of bits, called alike: the tests are written once for all of them

enum { ONE, TRAINERS };   // versions
struct Act : Codes {
    decltype(&act_forward_1<1>) forward[2];
    decltype(&act_backward_1<1>) backward[2];
    size_t kept_bytes(size_t n) const { return bits == 0 ? n * sizeof(floatX) : n / 8 * bits; }
};
template <int BITS> Act act_of() {
    Act act = {{BITS, {}, {}}, {act_forward_1<BITS>, act_forward_2<BITS>}, {act_backward_1<BITS>, act_backward_2<BITS>}};
    if constexpr (BITS > 0) (Codes&)act = codes_of<BITS>(gelu_steps<BITS>());
    return act;
}

// ---- the reference, in double precision; of codes: codes.cuh

struct Gelu { double value, slope, value_terms, slope_terms; };   // GELU(x), GELU'(x), and the terms of their tolerance
Gelu reference(double x) {
    const double scale = sqrt(2 / M_PI), cubic = 0.044715;
    double u = scale * (x + cubic * x * x * x), du = scale * (1 + 3 * cubic * x * x);
    double s = 1 / (1 + exp(-2 * u)), q = 1 / (1 + exp(2 * u));   // q is 1 - s, to the last bit
    double bent = std::isinf(du) ? 0 : 2 * x * s * q * du;         // s q is 0 long before
    // An exponential makes a relative error of the absolute one of u, and 1 - s cancels, until s is 1. Where exp(-2u) is beyond
    // fp32, s is 0 too soon.
    double steep = 1 + std::min(fabs(u), 100.0), cancels = q > 1e-9 ? fabs(2 * x * s * du) : 0, early = x < -9 ? 1e-29 : 0;
    return {x * s, s + bent, fabs(x * s) * steep + early, (s + cancels) * steep + early};
}

// ---- tests

__global__ void functions_kernel(float* value, float* slope, float* value_1, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    value[i] = gelu(x[i]);
    slope[i] = gelu_derivative(x[i]);
    value_1[i] = gelu_1(x[i]);
}

// What each of the 65536 values of bf16 becomes, in fp32. An infinity on the left is multiplied by 0, which gives NaN, as in
// PyTorch. So is 3 * 0.044715 x^2 in the slope, where it is infinite: beyond 5e19.
void test_functions() {
    Property derivative("the reference's slope: the difference quotient of its value", "of order h^2, and what cancels"),
        value("gelu, all bf16 values in fp32"), slope("gelu_derivative, all bf16 values in fp32"),
        cancels("version 1: the formula with tanh", "roundings of 1, not of what is left of it");
    for (double t = -12; t < 12; t += 0.0371) {
        const double h = 1e-5;
        set_case("x %g", t);
        derivative.within(0, (reference(t + h).value - reference(t - h).value) / (2 * h), reference(t).slope,
                          2 * h * h + 0x1p-52 * (1 + fabs(t)) / h);
    }
    const int N = 65536;
    std::vector<float> x(N);
    for (uint32_t bits = 0; bits < N; bits++) {
        uint32_t word = bits << 16;
        memcpy(&x[bits], &word, 4);
    }
    Buffer<float> inp(x), values(N), slopes(N), values_1(N);
    functions_kernel<<<N / 256, 256>>>(values.p, slopes.p, values_1.p, inp.p, N);
    const std::vector<float> y = values.read(), dy = slopes.read(), y1 = values_1.read();
    double worst = 0, worst_1 = 0;
    for (int i = 0; i < N; i++) {
        set_case("x %g", x[i]);
        Gelu r = reference(x[i]);
        if (std::isfinite(x[i])) value.close(i, y[i], r.value, r.value_terms, EPS32);
        else value.equal(i, y[i], x[i] > 0 ? INFINITY : NAN);
        if (std::isfinite(3 * GELU_CUBIC * x[i] * x[i])) slope.close(i, dy[i], r.slope, r.slope_terms, EPS32);
        else slope.equal(i, dy[i], NAN);
        if (!(fabsf(x[i]) <= 100)) continue;
        cancels.close(i, y1[i], r.value, 2 * fabs(x[i]), EPS32);
        if (x[i] > -8 && x[i] < -1e-3) {
            worst = std::max(worst, fabs(y[i] / r.value - 1));
            worst_1 = std::max(worst_1, fabs(y1[i] / r.value - 1));
        }
    }
    report({&derivative, &value, &slope, &cancels});
    printf("       the largest relative error for -8 < x < 0 is %.1e; with tanh it is %.0f\n", worst, worst_1);
}

// Tensors of one vector of 8 below, at and above a block of the forward kernel; rows of less than a warp's 256 columns, as many and
// more; slices of the rows from 1 to 64, with 1 to 8 warps adding them up. For 1, 3 and 4 bits the small ones are enough.
struct Shape { int rows, OC; };
std::vector<Shape> shapes(int bits) {
    std::vector<Shape> all;
    for (Shape s : {Shape{1, 8}, {3, 24}, {255, 8}, {256, 8}, {257, 8}, {31, 136}, {129, 136}, {64, 256}, {193, 264}, {37, 1000},
                    {5, 2048}, {1, 2056}, {1031, 40}, {2049, 24}, {4099, 8}})
        if (bits == 0 || bits == 2 || s.rows * s.OC < 10000) all.push_back(s);
    return all;
}

// Codes are compared with those of the sum inp + bias that fp32 makes: exactly.
void test_forward(const Act& h, uint64_t seed) {
    Property value("forward: GELU, NaN and infinities too; codes, every bit"),
        again("forward: the same bits in place, in a second run, with nothing kept"),
        one("forward, version 1", "of the rounded sum");
    const std::vector<float> special = h.special_values();
    for (auto [rows, OC] : shapes(h.bits))
        for (bool with_bias : {true, false}) {
            const size_t n = (size_t)rows * OC;
            set_case("%d bits, rows %d, OC %d, %s", h.bits, rows, OC, with_bias ? "bias" : "no bias");
            Random random(seed, h.bits * 1000000 + OC * 1000 + rows);
            std::vector<floatX> inp = random.normals(n, 0, 3);
            const std::vector<floatX> bias = random.normals(OC);
            for (size_t k = 0; k < special.size() && k < n; k++) inp[random.bits() % n] = (floatX)special[k];
            Buffer<floatX> x(inp), b(bias), out(n), dropped(n);
            Buffer<uint8_t> kept(n / 8 * h.bits), kept2(n / 8 * h.bits);
            const floatX* bias_p = with_bias ? b.p : nullptr;
            h.forward[TRAINERS](out.p, kept.p, x.p, bias_p, rows, OC);
            h.forward[TRAINERS](dropped.p, nullptr, x.p, bias_p, rows, OC);
            const std::vector<floatX> y = out.read();
            const std::vector<uint8_t> k = kept.read();
            again.is(same_bits(y, dropped.read()) && same_bits(x.read(), inp), "other bits");
            for (size_t i = 0; i < n; i++) {
                const float sum = with_bias ? (float)inp[i] + (float)bias[i % OC] : (float)inp[i];
                if (h.bits > 0) value.equal(i, h.read(k.data(), i), h.of(sum));
                Gelu r = reference(sum);
                if (!std::isfinite(sum)) value.equal(i, (float)y[i], sum > 0 ? INFINITY : NAN);
                else value.close(i, (float)y[i], r.value, r.value_terms);
            }
            if (with_bias) {
                Buffer<uint8_t> byte_codes(n);
                h.forward[ONE](out.p, byte_codes.p, x.p, b.p, rows, OC);
                const std::vector<floatX> y1 = out.read();
                const std::vector<uint8_t> k1 = byte_codes.read();
                for (size_t i = 0; i < n; i++) {
                    const float sum = (float)(floatX)((float)inp[i] + (float)bias[i % OC]);
                    if (h.bits > 0) one.equal(i, k1[i], h.of(sum));
                    if (fabsf(sum) <= 100) one.close(i, (float)y1[i], reference(sum).value, 2 * fabsf(sum));
                }
            }
            h.forward[TRAINERS](x.p, kept2.p, x.p, bias_p, rows, OC);
            again.is(same_bits(y, x.read()) && same_bits(k, kept2.read()), "other bits");
        }
    report({&value, &again, &one});
}

// Into gradients of both types, written and added to; the scratch memory is as small as it may be.
void test_backward(const Act& h, uint64_t seed) {
    Property versions[] = {"backward, version 1: d and bias gradient", "backward, the trainer's"},
             again("backward: the same bits in a second run; what was kept is as it was"),
             nan("backward: a NaN stays in its place, and reaches its column's bias");
    for (Shape shape : shapes(h.bits)) {
        const int rows = shape.rows, OC = shape.OC;   // no structured binding: lambdas capture them
        const size_t n = (size_t)rows * OC;
        Random random(seed, 2000000000 + h.bits * 1000000 + OC * 1000 + rows);
        const std::vector<floatX> d = random.normals(n), x = random.normals(n, 0, 2);
        const std::vector<float> before = random.grads(OC);
        std::vector<uint8_t> keep(h.kept_bytes(n));
        if (h.bits == 0) memcpy(keep.data(), x.data(), keep.size());
        else for (uint8_t& k : keep) k = (uint8_t)random.bits();
        Doubles products(n), terms(n), sum(OC, 0), all_terms(OC, 0);
        for (size_t i = 0; i < n; i++) {
            Gelu r = reference((float)x[i]);
            const double slope = h.bits ? h.slope[h.read(keep.data(), i)] : r.slope;
            products[i] = (float)d[i] * slope;
            terms[i] = fabs((float)d[i]) * (h.bits ? fabs(slope) : r.slope_terms);
            sum[i % OC] += products[i], all_terms[i % OC] += terms[i];
        }
        Buffer<float> scratch((size_t)colsum_slices(rows) * OC);
        Buffer<uint8_t> kept(keep);
        Buffer<floatX> ds(d);
        for (DType type : {F32, BF16})
            for (bool accumulate : {false, true}) {
                GradBuffer dbias(OC, type);
                std::vector<floatX> first_d;
                std::vector<float> first_bias;
                for (int version : {(int)TRAINERS, (int)TRAINERS, (int)ONE}) {
                    if (version != TRAINERS && type == BF16) continue;
                    set_case("%d bits, version %d, rows %d, OC %d, %s gradient, %s", h.bits, version + 1, rows, OC,
                             dtype_name(type), accumulate ? "added to" : "written");
                    ds.write(d);
                    dbias.write(accumulate ? before : std::vector<float>(OC, NAN));
                    h.backward[version](ds.p, dbias.grad(), scratch.p, kept.p, accumulate, rows, OC);
                    const std::vector<floatX> got = ds.read();
                    const std::vector<float> bias = dbias.read();
                    if (version == TRAINERS && !first_d.empty()) {
                        again.is(same_bits(got, first_d) && same_bits(bias, first_bias), "other bits");
                        continue;
                    }
                    Property& p = versions[version];
                    for (size_t i = 0; i < n; i++) {
                        if (h.bits) p.equal(i, (float)got[i], (float)(floatX)(float)products[i]);
                        else p.close(i, (float)got[i], products[i], terms[i]);
                    }
                    for (int c = 0; c < OC; c++) {
                        const double was = accumulate ? before[c] : 0;
                        const double rounded = version == ONE ? EPSX / ROUNDINGS : 0;   // before it is added up
                        p.close(c, bias[c], sum[c] + was, all_terms[c] * (1 + rounded) + fabs(was), store_of(type));
                    }
                    if (version == TRAINERS) first_d = got, first_bias = bias;
                }
                again.is(same_bits(kept.read(), keep), "what was kept was changed");
            }
        set_case("%d bits, rows %d, OC %d, a NaN", h.bits, rows, OC);
        const size_t at = random.bits() % n, at_x = h.bits ? at : random.bits() % n;
        GradBuffer dbias(OC, F32);
        auto run = [&] { h.backward[TRAINERS](ds.p, dbias.grad(), scratch.p, kept.p, false, rows, OC); };
        ds.write(d);
        run();
        const std::vector<floatX> clean_d = ds.read();
        const std::vector<float> clean_bias = dbias.read();
        std::vector<floatX> broken = d;
        broken[at] = (floatX)NAN;
        if (h.bits == 0) ((floatX*)keep.data())[at_x] = (floatX)NAN;
        ds.write(broken);
        kept.write(keep);
        run();
        check_reach(nan, ds.read(), clean_d, [&](size_t i) { return i == at || i == at_x; }, "d");
        check_reach(nan, dbias.read(), clean_bias, [&](size_t c) { return c == at % OC || c == at_x % OC; }, "dbias");
    }
    report({&versions[TRAINERS], &again, &nan, &versions[ONE]});
}

// Forward in place, groups of three blocks that have 256 rows: the first, those about 2^31 and 2^32, the last. Backward with a few
// rows so long that row * OC is beyond 2^31, its first and last columns. (matmul.cu has as many partial sums.)
void test_far(const Act& h, uint64_t seed) {
    Property forward("forward beyond 2^32 elements", "every bit"),
        backward("backward beyond 2^32 elements", "every bit");
    Random random(seed, 3 + h.bits);
    auto keep = [&](size_t n) {   // something to keep of n elements
        std::vector<uint8_t> v(h.kept_bytes(n));
        for (uint8_t& x : v) x = (uint8_t)random.bits();
        if (h.bits == 0) {
            const std::vector<floatX> x = random.normals(n, 0, 2);
            memcpy(v.data(), x.data(), v.size());
        }
        return v;
    };
    {
        const int OC = 24, ROWS = 256;
        const size_t groups = ((size_t)1 << 32) / (OC * ROWS) + 2, rows = groups * ROWS, n = rows * OC, seen = OC * ROWS;
        set_case("%d bits, %zu rows of %d", h.bits, rows, OC);
        Far<floatX> x(n, random.normals(seen, 0, 3), seen, 0);
        const size_t codes = std::max(seen / 8 * h.bits, (size_t)1);   // with 0 bits nothing is written
        Far<uint8_t> kept(groups * codes, codes, codes, 0);
        Buffer<floatX> bias(random.normals(OC));
        for (size_t group : {(size_t)0, ((size_t)1 << 31) / seen, ((size_t)1 << 32) / seen, groups - 1}) {
            x.at = group * seen, kept.at = group * codes;
            const int64_t block = group * 3;
            check_far(forward, {&x, &kept}, {block, block + 1, block + 2}, [&](bool far) {
                h.forward[TRAINERS](x.p(far), kept.p(far), x.p(far), bias.p, far ? rows : ROWS, OC);
            });
        }
    }
    auto columns = [&](int rows, size_t OC, size_t seen, size_t at, const std::vector<int64_t>& blocks) {
        set_case("%d bits, rows %d, OC %zu, columns from %zu", h.bits, rows, OC, at);
        Far<floatX> d(rows * OC, random.normals(rows * seen), seen, OC);
        Far<uint8_t> kept(h.kept_bytes(rows * OC), keep(rows * seen), h.kept_bytes(seen), h.kept_bytes(OC));
        Far<float> scratch(colsum_slices(rows) * OC, colsum_slices(rows) * seen, seen, OC), dbias(OC, seen, seen, 0);
        d.at = scratch.at = dbias.at = at, kept.at = h.kept_bytes(at);
        check_far(backward, {&d, &kept, &scratch, &dbias}, blocks, [&](bool far) {
            h.backward[TRAINERS](d.p(far), {dbias.p(far), F32}, scratch.p(far), kept.p(far), false, rows, far ? OC : seen);
        });
    };
    const int64_t OC = (1 << 30) + 64, across = ceil_div(OC, 32 * VEC), finish = ceil_div(OC, 32);
    columns(5, OC, 32, 0, {0});
    columns(5, OC, 64, OC - 64, {across - 1, finish - 2, finish - 1});
    report({&forward, &backward});
}

// ---- benchmark

void bench(const char* model, int rows, int C) {
    const double X = sizeof(floatX), codes = 2 / 8.0;
    const int OC = 4 * C;
    const size_t n = (size_t)rows * OC;
    BenchTable t(n, BenchTable::BYTES, "%s: rows %d, OC %d", model, rows, OC);
    const size_t m = t.here(n, OC);
    Buffer<floatX> x(m), y(m), bias(OC), inp(t.here((size_t)rows * C, C)), weight(t.here((size_t)OC * C, C));
    for (Buffer<floatX>* b : {&x, &y, &bias, &inp, &weight}) b->fill();
    Buffer<uint8_t> kept(m);   // enough for version 1's codes
    Buffer<float> scratch((size_t)COLSUM_SLICES * OC);
    GradBuffer dbias(OC, F32);
    kept.fill(0, 256);
    auto forward = [&](const char* name, double bytes, const Act& h, int version) {
        t.row(name, bytes, [&] { h.forward[version](y.p, kept.p, x.p, bias.p, rows, OC); });
    };
    auto backward = [&](const char* name, double bytes, const Act& h, int version) {
        t.row(name, bytes, [&] {
            h.backward[version](y.p, dbias.grad(), scratch.p, h.bits ? (void*)kept.p : x.p, false, rows, OC);
        });
    };
    const Act exact = act_of<0>(), two = act_of<2>();
    forward("forward, version 1: one kernel per step, with tanh", 4 * X, exact, ONE);
    forward("forward, version 2: the trainer's, one kernel, 8 elements per thread", 2 * X, exact, TRAINERS);
    forward("2 bits: forward, version 1 (keeps 8 bits)", 5 * X + 1, two, ONE);
    forward("2 bits: forward, version 2: the trainer's", 2 * X + codes, two, TRAINERS);
    backward("backward, version 1: the slope, then one thread per column", 4 * X, exact, ONE);
    backward("backward, version 2: the trainer's, one pass in slices", 3 * X, exact, TRAINERS);
    backward("2 bits: backward, version 1", 3 * X + codes, two, ONE);
    backward("2 bits: backward, version 2: the trainer's", 2 * X + codes, two, TRAINERS);

    BenchTable u(n, BenchTable::FLOPS, "%s: with the matmul, rows %d, C %d, OC %d", model, rows, C, OC);
    auto fused = [&](const char* name, int fusion, bool back) {
        matmul_state.gelu_fusion = fusion;
        u.row(name, 2.0 * C, [&] {
            if (back) {
                matmul_backward_input(y.p, inp.p, weight.p, rows, OC, C, 0, fusion >= 2 ? x.p : nullptr);
                act_backward<0>(y.p, dbias.grad(), scratch.p, x.p, false, rows, OC, 0);
            } else matmul_act_forward<0>(y.p, x.p, inp.p, weight.p, bias.p, rows, C, OC, 0);
        });
        matmul_state.gelu_fusion = 0;
    };
    fused("forward, version 2: --gelu-fusion 0", 0, false);
    fused("forward, version 3: --gelu-fusion 1", 1, false);
    fused("backward, version 2: --gelu-fusion 0 and 1", 0, true);
    fused("backward, version 3: --gelu-fusion 2", 2, true);
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "gelu: exact, or keeping 1 to 4 bits of an element; its bias gradient and matmul");
    if (o.bench) {
        MatmulSession cublas;
        return bench_models(bench);
    }
    test_misuse(o, {refuses_12("act_forward: OC", [] { act_forward<0>(nullptr, nullptr, nullptr, nullptr, 1, 12, 0); }),
                    refuses_12("act_backward: OC", [] { act_backward<2>(nullptr, {}, nullptr, nullptr, false, 1, 12, 0); })});
    printf("gelu, %s\n", dtype_name(FLOATX));
    test_functions();
    for (const Act& h : {act_of<0>(), act_of<1>(), act_of<2>(), act_of<3>(), act_of<4>()}) {
        printf("%d bits\n", h.bits);
        test_forward(h, o.seed);
        test_backward(h, o.seed);
        test_far(h, o.seed);
    }
    return finish(o);
}
