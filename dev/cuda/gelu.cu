/*
The exact GELU: its forward, its backward with the gradient of the bias before it, and the matmul that it may be a part of. The
trainer's kernels, tested, and simpler ones beside them to learn from. Sections 2 and 3 of train_gpt2.cu have them. (For a GELU
that keeps 2 bits of an element see regelu2.cu.)

    make dev/cuda/gelu && ./dev/cuda/gelu [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/gelu.cu -lcublasLt -o gelu

GPT-2's GELU is 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3). Forward: out = GELU(inp + bias).
Backward: d *= GELU'(x), and dbias (+)= the sums of what comes out over the rows. x has to be kept for that, 2 bytes an element.
A thread owns 8 neighbouring elements of a row, so OC has to be a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: the formula as it is printed, and a step a kernel. The first adds the bias (2 + 2 bytes in bf16), the second reads
// that again and writes GELU (2 + 2): 8 bytes an element, where 4 are enough; 1.6 GB instead of 0.8 for each of the 124M
// model's layers at B = 64, T = 1024. Between the two x is rounded to bf16 for nobody's benefit.
//
// And the formula is a trap. On the left tanh(u) is near -1, where fp32 numbers are 6e-8 apart, and 1 + tanh(u) is what is left
// of a subtraction: at x = -4 its error is a thousandth of it, and from -5.2 on nothing is left, while GELU is still -6e-8. The
// test prints how the relative error grows to 100%. A derivative made in this way has it too.
__global__ void add_bias_1_kernel(floatX* x, const floatX* inp, const floatX* bias, size_t n, int OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)inp[i] + (float)bias[i % OC]);
}
__device__ inline float gelu_1(float x) { return 0.5f * x * (1.0f + tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x))); }
__global__ void gelu_1_kernel(floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)gelu_1((float)x[i]);
}
void act_forward_1(floatX* out, const floatX* inp, const floatX* bias, size_t rows, int OC, cudaStream_t stream) {
    size_t n = rows * OC;
    add_bias_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, inp, bias, n, OC);
    gelu_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, n);
    cudaCheck(cudaGetLastError());
}

// Version 2: one kernel, 4 bytes. 0.5 (1 + tanh(u)) is the sigmoid of 2u, 1 / (1 + exp(-2u)): the same function with one
// exponential and nothing that cancels. What u has lost by rounding the exponential multiplies by 2u, so that a result may be
// off by some dozens of roundings where |u| is large, and not by more, however small it is itself. (On the far left exp(-2u) is
// beyond fp32: then 1 / infinity is the 0 that it should be.) bf16 builds take the exponential and the reciprocal from the
// hardware, right to 22 bits, an instruction each. A thread still takes one element: a load of 2 bytes where the hardware moves
// 16 at once, and a division (i % OC) for each.
__global__ void act_forward_2_kernel(floatX* out, const floatX* inp, const floatX* bias, size_t n, int OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (floatX)gelu((float)inp[i] + (float)bias[i % OC]);
}
void act_forward_2(floatX* out, const floatX* inp, const floatX* bias, size_t rows, int OC, cudaStream_t stream) {
    size_t n = rows * OC;
    act_forward_2_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, inp, bias, n, OC);
    cudaCheck(cudaGetLastError());
}

// Version 3, the trainer's act_forward<0>, gives a thread 8 neighbours: a load and a store of 16 bytes, one division for all of
// them, as many bytes. In the trainer the matmul before it adds the bias in its epilogue, and writes the x that is kept.
//
// Version 4: the matmul's epilogue does all of it (cuBLASLt's GELU_AUX_BIAS, --gelu-fusion 1). It has x in registers, writes it
// for backward (2) and GELU(x) (2). Before, the matmul wrote x (2), and the kernel read it (2) and wrote GELU (2): 4 bytes
// instead of 6, and a launch less. In bf16 GELU is then taken of the sum in fp32, and not of the x that is kept, which has been
// rounded. Whether it is faster depends on how well NVIDIA's matmul with that epilogue suits the shape; --bench tells.

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Version 1: GELU' an element a thread (read d and x, write d: 6 bytes), then the bias: a thread owns a column and walks down
// all rows (2). That is 8 bytes, and 3072 columns are 96 warps for a GPU that can hold 8000: each has a few loads under way at
// a time, far too few to keep the memory busy.
__global__ void slope_1_kernel(floatX* d, const floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) d[i] = (floatX)((float)d[i] * gelu_derivative((float)x[i]));
}
__global__ void bias_1_kernel(Grad dbias, const floatX* d, bool accumulate, int rows, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += (float)d[(size_t)r * OC + c];
    grad_store(dbias, c, sum, accumulate);
}
void act_backward_1(floatX* d, Grad dbias, float*, const floatX* x, bool accumulate, int rows, int OC, cudaStream_t stream) {
    size_t n = (size_t)rows * OC;
    slope_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(d, x, n);
    bias_1_kernel<<<ceil_div(OC, 128), 128, 0, stream>>>(dbias, d, accumulate, rows, OC);
    cudaCheck(cudaGetLastError());
}

// Version 2: one pass, 6 bytes: the thread that walks down a column for the bias multiplies by GELU' on its way, and adds up
// products that have not been rounded to bf16. The bytes are what they have to be. But now all of the work is done by 96 warps,
// exponentials and all, and a column's sum is one chain of 65536 additions, with as many roundings.
__global__ void act_backward_2_kernel(floatX* d, Grad dbias, const floatX* x, bool accumulate, int rows, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) {
        size_t i = (size_t)r * OC + c;
        float product = (float)d[i] * gelu_derivative((float)x[i]);
        sum += product;
        d[i] = (floatX)product;
    }
    grad_store(dbias, c, sum, accumulate);
}
void act_backward_2(floatX* d, Grad dbias, float*, const floatX* x, bool accumulate, int rows, int OC, cudaStream_t stream) {
    act_backward_2_kernel<<<ceil_div(OC, 128), 128, 0, stream>>>(d, dbias, x, accumulate, rows, OC);
    cudaCheck(cudaGetLastError());
}

// Version 3, the trainer's act_backward<0>: the same pass, cut to pieces. A warp's lanes own 8 neighbouring columns each, so
// that a load of the warp is 512 bytes in a row; a block's 8 warps take every eighth row of a slice, and there are 64 slices of
// the rows: 6144 warps at 124M. Their sums meet in shared memory, in the order of the warps, and 64 sums a column go to memory,
// where a second kernel adds them, in a fixed order too: 0.8 MB each way beside the 1.2 GB of d and x. About 150 additions
// stand one behind the other instead of 65536.
//
// Version 4: cuBLASLt's DGELU epilogue (--gelu-fusion 2): the matmul that makes d reads x (2) and writes the product (2), and
// bias_backward reads that (2): 6 bytes, where matmul and version 3 together move 2 + 6.

struct Version {
    const char* name;
    void (*forward)(floatX*, const floatX*, const floatX*, size_t, int, cudaStream_t);
    void (*backward)(floatX*, Grad, float*, const floatX*, bool, int, int, cudaStream_t);
};
const Version versions[] = {
    {"version 1", act_forward_1, act_backward_1},
    {"version 2", act_forward_2, act_backward_2},
    {"the trainer's",
     [](floatX* out, const floatX* inp, const floatX* bias, size_t rows, int OC, cudaStream_t stream) {
         act_forward<0>(out, nullptr, inp, bias, rows, OC, stream);
     },
     act_backward<0>}};
enum { ONE, TWO, TRAINER };

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision

struct Gelu {
    double value, slope;               // GELU(x) and GELU'(x)
    double value_error, slope_error;   // what fp32 may lose of them in the trainer's formulas, before they are stored
    double tanh_error;                 // and of the value in version 1's
};
Gelu reference(double x) {
    const double scale = sqrt(2 / M_PI), cubic = 0.044715;
    double u = scale * (x + cubic * x * x * x), du = scale * (1 + 3 * cubic * x * x);
    double s = 1 / (1 + exp(-2 * u)), q = 1 / (1 + exp(2 * u));   // q is 1 - s, to the last bit
    double bent = std::isinf(du) ? 0 : 2 * x * s * q * du;         // s q is 0 long before
    Gelu g = {x * s, s + bent, 0, 0, 0};
    // u: two constants, three products, a sum, a product, each worth twice as much in the exponent. The exponential may be off
    // by 4 roundings: 2 units in the last place of expf, or in bf16 builds 2^-22, to whose exponent another constant and a
    // product belong. What happens to it matters for s as far as s is not flat; after it come a sum, and a division or a
    // reciprocal that may be off by 2^-23.
    const double of_u = 2 * (kFP32 ? 7 : 9), after = kFP32 ? 2 : 3;
    double s_error = s * EPS32 * 1.001 * (q == 0 ? after : q * (of_u * fabs(u) + 4) + after);
    // Where exp(-2u) is beyond fp32, or s denormal, s is 0 too soon. Elsewhere x s may be denormal.
    double tiny = x < -9 ? 0x1p-126 * 1.1 : 0x1p-150;
    g.value_error = fabs(x) * s_error + EPS32 * fabs(g.value) + tiny * std::max(1.0, s > 0 ? fabs(x) : 0.0);
    // The slope's second term has 4 roundings of its own and 7 of du; the sum has one. s is off in both terms.
    double both = s_error == 0 ? 0 : s_error * fabs(1 + 2 * x * du * (q - s));
    g.slope_error = both + EPS32 * (11 * fabs(bent) + fabs(g.slope)) + (x < -9 ? 0x1p-126 * 1.1 * 300 : 0x1p-150);
    // tanhf may be off by 2 units in the last place; what it is told is off by 7 roundings; then a sum and two products
    g.tanh_error = 0.5 * fabs(x) * EPS32 * (4 + (q == 0 || s == 0 ? 0 : 4 * s * q * 7 * fabs(u)) + 2 * s) +
                   2 * EPS32 * fabs(g.value) + tiny;
    return g;
}
// Storing in floatX: half a unit in the last place, or half of the smallest step.
double stored(double value, double error) {
    return error + EPSX * (fabs(value) + error) + (kFP32 ? 0x1p-150 : 0x1p-134);
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

__global__ void functions_kernel(float* value, float* slope, float* value_1, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    value[i] = gelu(x[i]);
    slope[i] = gelu_derivative(x[i]);
    value_1[i] = gelu_1(x[i]);
}

// What each of the 65536 values of bf16 becomes. An infinity on the left is multiplied by 0, which gives NaN, as in PyTorch. So
// is 3 * 0.044715 x^2 in the slope, where it is infinite: beyond 5e19.
struct Everywhere {
    Property value, slope, odd;
    Everywhere(const char* value_name, const char* slope_name, const char* odd_name, const char* and_storing)
        : value(value_name, and_storing), slope(slope_name, and_storing), odd(odd_name, "every bit") {}
    void compare(size_t i, float x, float ours, float our_slope, bool in_floatX) {
        Gelu r = reference(x);
        if (!std::isfinite(x)) odd.equal(i, ours, x > 0 ? INFINITY : NAN);
        else if (fabsf(x) > 100) odd.is(ours == (x > 0 ? (in_floatX ? (float)(floatX)x : x) : 0), "not itself, or 0");
        else value.within(i, ours, r.value, in_floatX ? stored(r.value, r.value_error) : r.value_error);
        if (!(3 * 0.044715f * x * x < INFINITY)) odd.is(std::isnan(our_slope), "expected no slope");
        else if (fabsf(x) > 100) odd.is(our_slope == (x > 0), "expected a slope of 1, or 0");
        else slope.within(i, our_slope, r.slope, in_floatX ? stored(r.slope, r.slope_error) : r.slope_error);
    }
    void print() { report({&value, &slope, &odd}); }
};

void test_everywhere() {
    const int N = 65536;
    std::vector<float> x(N);
    std::vector<floatX> stored_x(N);
    for (uint32_t bits = 0; bits < N; bits++) {
        uint32_t word = bits << 16;
        memcpy(&x[bits], &word, 4);
        stored_x[bits] = (floatX)x[bits];
    }
    Property derivative("the reference's slope: the difference quotient of its value", "of order h^2, and what cancels"),
        cancels("version 1: the formula with tanh, all bf16 values", "roundings of 1, not of what is left of it");
    for (double t = -12; t < 12; t += 0.0371) {
        const double h = 1e-5;
        double quotient = (reference(t + h).value - reference(t - h).value) / (2 * h);
        set_case("x %g", t);
        derivative.within(0, quotient, reference(t).slope, 2 * h * h + 0x1p-52 * (1 + fabs(t)) / h);
    }

    Buffer<float> inp(x), value(N), slope(N), value_1(N);
    functions_kernel<<<N / 256, 256>>>(value.p, slope.p, value_1.p, inp.p, N);
    cudaCheck(cudaGetLastError());
    std::vector<float> y = value.read(), dy = slope.read(), y1 = value_1.read();
    Everywhere f("gelu, all bf16 values in fp32", "gelu_derivative, all bf16 values in fp32",
                 "their NaN, infinities and what is huge", "counted roundings of fp32, see reference()");
    double worst = 0, worst_1 = 0;
    float zero_1 = 0;   // the largest x below 0 at which version 1 has nothing left
    for (int i = 0; i < N; i++) {
        set_case("x %g", x[i]);
        f.compare(i, x[i], y[i], dy[i], false);
        if (!std::isfinite(x[i]) || fabsf(x[i]) > 100) continue;
        Gelu r = reference(x[i]);
        cancels.within(i, y1[i], r.value, r.tanh_error);
        if (x[i] < -1e-3 && x[i] > -8) {
            worst = std::max(worst, fabs(y[i] / r.value - 1));
            worst_1 = std::max(worst_1, fabs(y1[i] / r.value - 1));
            if (y1[i] == 0 && (zero_1 == 0 || x[i] > zero_1)) zero_1 = x[i];
        }
    }
    report({&derivative});
    f.print();
    report({&cancels});
    printf("       the largest relative error for -8 < x < 0 is %.1e; with tanh it is %.0f, from x = %.2f on\n", worst, worst_1,
           zero_1);

    // the same through the trainer's layers, with d = 1
    Everywhere layer("act_forward, all bf16 values", "act_backward, all bf16 values", "their NaN, infinities and what is huge",
                     "the same, and storing");
    for (int OC : {8, 1024}) {
        const int rows = N / OC;
        Buffer<floatX> in(stored_x), out(N), d(std::vector<floatX>(N, (floatX)1.0f));
        Buffer<float> scratch((size_t)colsum_slices(rows) * OC);
        GradBuffer dbias(OC, F32);
        act_forward<0>(out.p, nullptr, in.p, nullptr, rows, OC, 0);
        act_backward<0>(d.p, dbias.grad(), scratch.p, in.p, false, rows, OC, 0);
        std::vector<floatX> o = out.read(), g = d.read();
        for (int i = 0; i < N; i++) {
            set_case("x %g", x[i]);
            layer.compare(i, x[i], (float)o[i], (float)g[i], true);
        }
    }
    layer.print();
}

// Tensors of one vector of 8 below, at and above a block of the forward kernel; rows of less than a warp's 256 columns, as many
// and more; slices of the rows from 1 to 64, with 1 to 8 warps adding them up.
struct Shape { int rows, OC; };
const Shape shapes[] = {{1, 8},     {3, 24},   {255, 8},   {256, 8},  {257, 8},   {127, 136}, {128, 136}, {129, 136}, {64, 256},
                        {193, 264}, {37, 1000}, {5, 2048}, {1, 2056}, {1031, 40}, {2049, 24}, {4099, 8}};

// `n` elements between two margins, of which everything is NaN that nobody has written.
struct Between {
    size_t n, margin;
    Buffer<floatX> memory;
    floatX* p;
    Between(size_t n, size_t margin) : n(n), margin(margin), memory(n + 2 * margin), p(memory.p + margin) {}
    void write(const std::vector<floatX>& v) { cudaCheck(cudaMemcpy(p, v.data(), n * sizeof(floatX), cudaMemcpyHostToDevice)); }
    std::vector<floatX> read(Property& untouched) {
        std::vector<floatX> all = memory.read();
        for (size_t i = 0; i < 2 * margin * sizeof(floatX); i++) {
            size_t at = i < margin * sizeof(floatX) ? i : i + n * sizeof(floatX);
            untouched.is(((uint8_t*)all.data())[at] == 0xff, "something was written beside the tensor");
        }
        return std::vector<floatX>(all.begin() + margin, all.begin() + margin + n);
    }
};

void test_forward(uint64_t seed) {
    Property value("forward: GELU", "counted roundings of fp32, and storing"),
        again("forward: the same bits in place, in a second run, by act_recompute; and nothing beside the tensor"),
        two("forward, version 2", "the trainer's bits"), one("forward, version 1", "of the rounded sum, roundings of 1");
    for (auto [rows, OC] : shapes)
        for (bool with_bias : {true, false}) {
            const size_t n = (size_t)rows * OC, margin = with_bias ? 0 : OC;
            set_case("rows %d, OC %d, %s", rows, OC, with_bias ? "bias" : "no bias");
            Random random(seed, 1000000 + OC * 1000 + rows);
            std::vector<floatX> inp = random.normals(n, 0, 3), bias = random.normals(OC);
            Between x(n, margin), out(n, margin), once_more(n, margin);
            Buffer<floatX> b(bias);
            x.write(inp);
            const floatX* bias_p = with_bias ? b.p : nullptr;
            act_forward<0>(out.p, nullptr, x.p, bias_p, rows, OC, 0);
            act_forward<0>(once_more.p, x.p, x.p, bias_p, rows, OC, 0);   // what is kept is there already
            std::vector<floatX> y = out.read(again);
            again.is(same_bits(y, once_more.read(again)) && same_bits(x.read(again), inp), "other bits");
            for (size_t i = 0; i < n; i++) {
                Gelu r = reference(with_bias ? (float)inp[i] + (float)bias[i % OC] : (float)inp[i]);
                value.within(i, (float)y[i], r.value, stored(r.value, r.value_error));
            }
            if (!with_bias) {
                act_recompute<0>(once_more.p, x.p, rows, OC, 0);
                again.is(same_bits(y, once_more.read(again)), "other bits");
                continue;
            }
            versions[TWO].forward(once_more.p, x.p, b.p, rows, OC, 0);
            two.is(same_bits(y, once_more.read(again)), "other bits");
            versions[ONE].forward(once_more.p, x.p, b.p, rows, OC, 0);
            std::vector<floatX> y1 = once_more.read(again);
            for (size_t i = 0; i < n; i++) {
                Gelu r = reference((float)(floatX)((float)inp[i] + (float)bias[i % OC]));
                one.within(i, (float)y1[i], r.value, stored(r.value, r.tanh_error));
            }
            act_forward<0>(x.p, nullptr, x.p, bias_p, rows, OC, 0);
            again.is(same_bits(y, x.read(again)), "other bits");
        }
    report({&value, &again, &two, &one});
}

// Into gradients of both types, written and added to; the scratch memory is as small as it may be.
void test_backward(uint64_t seed) {
    Property product("backward: d * GELU'(x), in place", "counted roundings of fp32, and storing"),
        sum32("backward: bias gradient in fp32", "and one for each of the additions that stand in a row"),
        sum16("backward: bias gradient in bf16", "and storing"),
        again("backward: the same bits in a second run; x as it was, and nothing beside a tensor"),
        nan("backward: a NaN stays in its place, and reaches its column's bias"),
        two("backward, version 2: d and bias gradient", "a column's sum is one row of additions"),
        one("backward, version 1: d and bias gradient", "as many, of rounded terms");
    for (auto [rows, OC] : shapes) {
        const size_t n = (size_t)rows * OC;
        Random random(seed, 2000000 + OC * 1000 + rows);
        const std::vector<floatX> d = random.normals(n), x = random.normals(n, 0, 2);
        std::vector<float> before = floats(random.normals(OC, 0, 10));
        for (float& b : before) b = (float)(__nv_bfloat16)b;
        Doubles products(n), errors(n), sum(OC, 0), terms(OC, 0), sum_error(OC, 0);
        for (size_t i = 0; i < n; i++) {
            Gelu r = reference((float)x[i]);
            products[i] = (float)d[i] * r.slope;
            errors[i] = fabs((float)d[i]) * r.slope_error + EPS32 * fabs(products[i]) + 0x1p-150;
            sum[i % OC] += products[i];
            terms[i % OC] += fabs(products[i]);
            sum_error[i % OC] += errors[i];
        }
        Buffer<float> scratch((size_t)colsum_slices(rows) * OC);
        for (DType type : {F32, BF16})
            for (bool accumulate : {false, true}) {
                Between xs(n, accumulate ? OC : 0), ds(n, accumulate ? OC : 0);
                xs.write(x);
                GradBuffer dbias(OC, type);
                std::vector<floatX> first_d;
                std::vector<float> first_bias;
                for (int version : {TRAINER, TRAINER, TWO, ONE}) {
                    if (version != TRAINER && type == BF16) continue;
                    const Version& v = versions[version];
                    set_case("%s, rows %d, OC %d, %s gradient, %s", v.name, rows, OC, dtype_name(type),
                             accumulate ? "added to" : "written");
                    ds.write(d);
                    dbias.write(accumulate ? before : std::vector<float>(OC, NAN));
                    v.backward(ds.p, dbias.grad(), scratch.p, xs.p, accumulate, rows, OC, 0);
                    std::vector<floatX> got = ds.read(again);
                    std::vector<float> bias = dbias.read();
                    if (version == TRAINER && !first_d.empty()) {
                        again.is(same_bits(got, first_d) && same_bits(bias, first_bias), "other bits");
                        continue;
                    }
                    Property& p = version == TRAINER ? product : version == TWO ? two : one;
                    for (size_t i = 0; i < n; i++) p.within(i, (float)got[i], products[i], stored(products[i], errors[i]));
                    Property& s = version == TRAINER ? type == F32 ? sum32 : sum16 : p;
                    for (int c = 0; c < OC; c++) {
                        double expected = sum[c] + (accumulate ? before[c] : 0),
                               size = terms[c] + (accumulate ? fabs(before[c]) : 0),
                               depth = version == TRAINER ? colsum_depth(rows) : rows + 1;
                        double bound = sum_error[c] + size * EPS32 * depth + (version == ONE ? terms[c] * EPSX : 0);
                        if (type == BF16) bound += EPS16 * (fabs(expected) + bound);
                        s.within(c, bias[c], expected, bound);
                    }
                    if (version == TRAINER) first_d = got, first_bias = bias;
                }
                again.is(same_bits(xs.read(again), x), "x was changed");
            }
        if (n < 50) continue;
        size_t at_d = random.bits() % n, at_x = random.bits() % n;
        std::vector<floatX> broken_d = d, broken_x = x;
        broken_d[at_d] = broken_x[at_x] = (floatX)NAN;
        set_case("rows %d, OC %d, a NaN in d and one in x", rows, OC);
        Buffer<floatX> ds(broken_d), xs(broken_x);
        GradBuffer dbias(OC, F32);
        act_backward<0>(ds.p, dbias.grad(), scratch.p, xs.p, false, rows, OC, 0);
        std::vector<floatX> got = ds.read();
        std::vector<float> bias = dbias.read();
        for (size_t i = 0; i < n; i++)
            nan.is(std::isnan((float)got[i]) == (i == at_d || i == at_x), "a NaN appeared or was lost");
        for (int c = 0; c < OC; c++)
            nan.is(std::isnan(bias[c]) == ((size_t)c == at_d % OC || (size_t)c == at_x % OC),
                   "a NaN appeared in the bias or was lost");
    }
    report({&product, &sum32, &sum16, &again, &nan, &two, &one});
}

// ---- index arithmetic beyond 2^31

// The first block, those at 2^31 and 2^32, the last.
void test_forward_far(uint64_t seed) {
    const int OC = 1000;
    const size_t rows = ((size_t)1 << 32) / OC + 4, n = rows * OC, window = 256 * VEC;
    set_case("%zu rows of %d", rows, OC);
    FarBuffer<floatX> x(n);
    if (x.p == nullptr) return;
    Property p("forward beyond 2^32 elements, in place", "as above");
    Random random(seed, 3);
    std::vector<floatX> bias = random.normals(OC);
    Buffer<floatX> b(bias);
    const size_t starts[] = {0, (size_t)1 << 31, (size_t)1 << 32, n / window * window};
    std::vector<std::vector<floatX>> inp;
    for (size_t at : starts) {
        inp.push_back(random.normals(std::min(window, n - at), 0, 3));
        x.write(at, inp.back());
    }
    run_blocks({0, 1 << 20, 1 << 21, (int64_t)(n / window)}, [&] { act_forward<0>(x.p, nullptr, x.p, b.p, rows, OC, 0); });
    for (size_t w = 0; w < inp.size(); w++) {
        std::vector<floatX> y = x.read(starts[w], inp[w].size());
        for (size_t i = 0; i < y.size(); i++) {
            Gelu r = reference((float)inp[w][i] + (float)bias[(starts[w] + i) % OC]);
            p.within(starts[w] + i, (float)y[i], r.value, stored(r.value, r.value_error));
        }
    }
    report({&p});
}

// Two shapes of more than 2^32 elements: a few rows so long that row * OC is beyond 2^31, and so many slices of the rows that
// the partial sums are more than 2^31 too. 32 columns hold numbers: the first, and in the first shape the last 32 too.
void test_backward_far(uint64_t seed) {
    Property product("backward beyond 2^32 elements: d * GELU'(x)", "as above"),
        sums("backward beyond 2^32 elements, and 2^31 partial sums: bias gradient", "as above");
    const int SEEN = 32;
    for (Shape shape : {Shape{5, (1 << 30) + 64}, Shape{4096, (1 << 25) + 8}}) {
        const int rows = shape.rows, OC = shape.OC;
        const size_t n = (size_t)rows * OC;
        const int slices = colsum_slices(rows);
        set_case("rows %d, OC %d", rows, OC);
        FarBuffer<floatX> d(n), x(n);
        FarBuffer<float> scratch((size_t)slices * OC), dbias(OC);
        if (!d.p || !x.p || !scratch.p || !dbias.p) continue;
        std::vector<int> columns = {0};
        if (slices == 1) columns.push_back(OC - SEEN);
        Random random(seed, 4 + rows);
        std::vector<std::vector<floatX>> ds, xs;
        for (int r = 0; r < rows; r++)
            for (int c : columns) {
                ds.push_back(random.normals(SEEN));
                xs.push_back(random.normals(SEEN, 0, 2));
                d.write((size_t)r * OC + c, ds.back());
                x.write((size_t)r * OC + c, xs.back());
            }
        // The last block of the product's kernel; the last of the sum's, which comes after it and has a higher number; then
        // the first of every slice, and at the end number 0, which both kernels have.
        const int64_t across = ceil_div(OC, 32 * VEC);
        std::vector<int64_t> blocks;
        if (slices == 1) blocks = {across - 1, ceil_div(OC, 32) - 1};
        for (int s = slices - 1; s >= 0; s--) blocks.push_back(s * across);
        run_blocks(blocks, [&] { act_backward<0>(d.p, {dbias.p, F32}, scratch.p, x.p, false, rows, OC, 0); });
        for (size_t k = 0; k < columns.size(); k++) {
            Doubles sum(SEEN, 0), bound(SEEN, 0);
            for (int r = 0; r < rows; r++) {
                size_t at = (size_t)r * OC + columns[k], w = r * columns.size() + k;
                std::vector<floatX> got = d.read(at, SEEN);
                for (int c = 0; c < SEEN; c++) {
                    Gelu g = reference((float)xs[w][c]);
                    double expected = (float)ds[w][c] * g.slope;
                    double error = fabs((float)ds[w][c]) * g.slope_error + EPS32 * fabs(expected);
                    product.within(at + c, (float)got[c], expected, stored(expected, error));
                    sum[c] += expected;
                    bound[c] += error + fabs(expected) * EPS32 * colsum_depth(rows);
                }
            }
            std::vector<float> bias = dbias.read(columns[k], SEEN);
            for (int c = 0; c < SEEN; c++) sums.within(columns[k] + c, bias[c], sum[c], bound[c]);
        }
    }
    report({&product, &sums});
}

// ---- with the matmul

// The matmuls around GELU as the trainer calls them, with GELU in kernels of its own and in cuBLASLt's epilogues. In the mean
// square a rounding to bf16 costs EPSX / sqrt 3 at most: that of x or d between matmul and GELU, and that of what comes out. A
// column's sum of independent errors has the root of the sum of their squares as standard deviation. In fp32 it is the matmul's
// sums: no term goes through more than C roundings. How NVIDIA's epilogues compute GELU is not said; the hardware's tanh has an
// error of 2^-11.
void test_matmul(uint64_t seed) {
    Property kept("with the matmul, in 3 degrees of fusion: x", "roundings in the mean square"),
        out("with the matmul: GELU(x)", "the same"), back("with the matmul: gradient of x", "the same"),
        bias_back("with the matmul: bias gradient", "5 standard deviations of the same"),
        own("with the matmul, not fused: the bits of matmul and kernels one by one");
    struct { int rows, C, OC; } cases[] = {{33, 24, 40}, {128, 64, 136}, {257, 8, 264}, {65, 264, 8}};
    for (auto [rows, C, OC] : cases) {
        Random random(seed, 5000 + rows);
        const size_t RC = (size_t)rows * C, RO = (size_t)rows * OC;
        const std::vector<floatX> inp = random.normals(RC), weight = random.normals((size_t)OC * C, 0, 1.5f / sqrtf(C)),
                                  bias = random.normals(OC), next = random.normals((size_t)C * OC, 0, 1 / sqrtf(C)),
                                  dout = random.normals(RC), x = random.normals(RO, 0, 1.5f);
        const std::vector<float> before = floats(random.normals(OC));
        // references: forward is (rows, C) -> (rows, OC); backward takes dout (rows, C) through next (C, OC)
        Doubles x_ref(RO), out_ref(RO), d_ref(RO), dbias_ref(before.begin(), before.end()), squares(OC, 0);
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < OC; o++) {
                double sum = (float)bias[o], d = 0;
                for (int c = 0; c < C; c++) {
                    sum += (double)(float)inp[r * C + c] * (float)weight[o * C + c];
                    d += (double)(float)dout[r * C + c] * (float)next[c * OC + o];
                }
                x_ref[r * OC + o] = sum;
                out_ref[r * OC + o] = reference(sum).value;
                d_ref[r * OC + o] = d * reference((float)x[r * OC + o]).slope;
                dbias_ref[o] += d_ref[r * OC + o];
                squares[o] += d_ref[r * OC + o] * d_ref[r * OC + o];
            }
        Buffer<floatX> a(inp), w(weight), b(bias), w2(next), g(dout), xs(x);
        Buffer<float> scratch((size_t)colsum_slices(rows) * OC);
        const double storing = EPSX / sqrt(3.0), bar = sqrt(2.0) * storing + (kFP32 ? EPS32 * (C + 1) : 0);
        for (int fusion : {0, 1, 2}) {
            set_case("rows %d, C %d, OC %d, fusion %d", rows, C, OC, fusion);
            matmul_state.gelu_fusion = fusion;
            const double library = on_cpu_backend() || fusion == 0 ? 0 : 0x1p-11;
            Buffer<floatX> k(RO), y(RO), dx(RO);
            GradBuffer dbias(OC, F32);
            dbias.write(before);
            matmul_act_forward<0>(y.p, k.p, a.p, w.p, b.p, rows, C, OC, 0);
            matmul_act_backward<0>(dx.p, dbias.grad(), scratch.p, g.p, w2.p, xs.p, true, rows, OC, C, 0);
            std::vector<floatX> our_x = k.read(), our_y = y.read(), our_d = dx.read();
            std::vector<float> our_bias = dbias.read();
            kept.within(0, distance(doubles(our_x), x_ref), 0, storing + (kFP32 ? EPS32 * (C + 1) : 0));
            out.within(0, distance(doubles(our_y), out_ref), 0, bar + library);
            back.within(0, distance(doubles(our_d), d_ref), 0, bar + library);
            for (int o = 0; o < OC; o++)
                bias_back.within(o, our_bias[o], dbias_ref[o],
                                 5 * (bar + library) * sqrt(squares[o]) + EPS32 * colsum_depth(rows) * fabs(dbias_ref[o]));
            if (fusion > 0) continue;
            Buffer<floatX> k2(RO), y2(RO), dx2(RO);
            GradBuffer dbias2(OC, F32);
            dbias2.write(before);
            matmul_forward(k2.p, a.p, w.p, b.p, rows, C, OC, 0);
            act_forward<0>(y2.p, nullptr, k2.p, nullptr, rows, OC, 0);
            matmul_backward_input(dx2.p, g.p, w2.p, rows, OC, C, 0);
            act_backward<0>(dx2.p, dbias2.grad(), scratch.p, xs.p, true, rows, OC, 0);
            own.is(same_bits(our_x, k2.read()) && same_bits(our_y, y2.read()) && same_bits(our_d, dx2.read()) &&
                       same_bits(our_bias, dbias2.read()),
                   "other bits");
        }
    }
    matmul_state.gelu_fusion = 0;
    report({&kept, &out, &back, &bias_back, &own});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, int rows, int C) {
    const double X = sizeof(floatX);
    const int OC = 4 * C;
    const size_t n = (size_t)rows * OC;
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: rows %d, OC %d", model, rows, OC);
    BenchTable t(title, n);
    // without a GPU nothing runs, and the tensors have one row
    size_t m = t.timed ? n : OC, in = t.timed ? (size_t)rows * C : C, w = t.timed ? (size_t)OC * C : C;
    Buffer<floatX> x(m), y(m), bias(OC), inp(in), weight(w);
    for (Buffer<floatX>* b : {&x, &y, &bias, &inp, &weight}) b->fill();
    Buffer<float> scratch((size_t)COLSUM_SLICES * OC);
    GradBuffer dbias(OC, F32);
    auto forward = [&](int v) { versions[v].forward(y.p, x.p, bias.p, rows, OC, 0); };
    auto backward = [&](int v) { versions[v].backward(y.p, dbias.grad(), scratch.p, x.p, false, rows, OC, 0); };
    t.row("forward, version 1: a step a kernel, with tanh", 4 * X, [&] { forward(ONE); });
    t.row("forward, version 2: one kernel, an element a thread", 2 * X, [&] { forward(TWO); });
    t.row("forward, version 3: the trainer's, 8 elements a thread", 2 * X, [&] { forward(TRAINER); });
    t.row("backward, version 1: GELU', then a column a thread", 4 * X, [&] { backward(ONE); });
    t.row("backward, version 2: one pass, a column a thread", 3 * X, [&] { backward(TWO); });
    t.row("backward, version 3: the trainer's, one pass in slices", 3 * X, [&] { backward(TRAINER); });

    snprintf(title, sizeof title, "GPT-2 %s: with the matmul, rows %d, C %d, OC %d", model, rows, C, OC);
    BenchTable u(title, n, BenchTable::FLOPS);
    auto fused = [&](int fusion, bool back) {
        matmul_state.gelu_fusion = fusion;
        if (back) matmul_act_backward<0>(y.p, dbias.grad(), scratch.p, inp.p, weight.p, x.p, false, rows, OC, C, 0);
        else matmul_act_forward<0>(y.p, x.p, inp.p, weight.p, bias.p, rows, C, OC, 0);
    };
    u.row("forward, version 3: --gelu-fusion 0", 2.0 * C, [&] { fused(0, false); });
    u.row("forward, version 4: --gelu-fusion 1", 2.0 * C, [&] { fused(1, false); });
    u.row("backward, version 3: --gelu-fusion 0 and 1", 2.0 * C, [&] { fused(0, true); });
    u.row("backward, version 4: --gelu-fusion 2", 2.0 * C, [&] { fused(2, true); });
    matmul_state.gelu_fusion = 0;
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "gelu: the exact GELU, with its bias gradient and within its matmul");
    if (o.bench) {
        MatmulSession cublas;
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 1600);
        return 0;
    }
    test_misuse(o, {{"OC of 12", "act_forward: OC is 12: expected a multiple of 8",
                     [] { act_forward<0>(nullptr, nullptr, nullptr, nullptr, 1, 12, 0); }},
                    {"OC of 12, backward", "act_backward: OC is 12: expected a multiple of 8",
                     [] { act_backward<0>(nullptr, {}, nullptr, nullptr, false, 1, 12, 0); }},
                    {"OC of 12, recomputing", "act_forward: OC is 12: expected a multiple of 8",
                     [] { act_recompute<0>(nullptr, nullptr, 1, 12, 0); }},
                    {"recomputing from codes", "codes of 2 bits do not give an activation back",
                     [] { act_recompute<2>(nullptr, nullptr, 1, 8, 0); }}});
    MatmulSession cublas;
    printf("gelu, %s\n", dtype_name(FLOATX));
    test_everywhere();
    test_forward(o.seed);
    test_backward(o.seed);
    test_forward_far(o.seed);
    test_backward_far(o.seed);
    test_matmul(o.seed);
    return finish(o);
}
