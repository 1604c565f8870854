/*
GELU whose backward remembers k bits of an element (ReGELU2 for k = 2): the trainer's kernels, tested, and simpler ones
beside them to learn from. Section 2 of train_gpt2.cu explains the method.

    make dev/cuda/regelu2 && ./dev/cuda/regelu2 [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/regelu2.cu -lcublasLt -o regelu2

Forward: out = GELU(inp + bias), and a code of k bits for each element. Backward: d *= slope of the code, and the gradient of
the bias, which is the sum of what comes out over the rows. A thread of the trainer's kernels owns 8 neighbouring elements of a
row, so OC has to be a multiple of 8; the trainer refuses a model where it is not (a head's size must be a multiple of 8).
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: a step a kernel, an element a thread. Adding the bias reads and writes the tensor (2 + 2 bytes in bf16), GELU
// reads and writes it again (2 + 2), and the codes read it a third time (2) and spend a byte on what fits in 2 bits, because
// threads that own one element each cannot write into one byte without getting in each other's way: 11 bytes an element, where
// the matmul's output has to be read once and GELU's written once, 4 bytes. Between the first two kernels x is rounded to bf16
// for nobody's benefit. Version 2 does all three while x is in a register.
__global__ void add_bias_1_kernel(floatX* x, const floatX* bias, size_t n, int OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)x[i] + (float)bias[i % OC]);
}
template <int BITS>
__global__ void codes_1_kernel(uint8_t* byte_codes, const floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    constexpr Steps<BITS> h = gelu_steps<BITS>();
    int code = 0;
#pragma unroll
    for (int j = 0; j < (1 << BITS) - 1; j++) code += !((float)x[i] <= h.threshold[j]);
    byte_codes[i] = (uint8_t)code;
}
__global__ void gelu_1_kernel(floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = (floatX)gelu((float)x[i]);
}
template <int BITS>
void act_forward_1(floatX* x,            // (rows, OC) in place
                   uint8_t* byte_codes,  // (rows, OC) a byte each
                   const floatX* bias,   // (OC)
                   size_t rows, int OC, cudaStream_t stream) {
    size_t n = rows * OC;
    int blocks = ceil_div(n, 256);
    add_bias_1_kernel<<<blocks, 256, 0, stream>>>(x, bias, n, OC);
    codes_1_kernel<BITS><<<blocks, 256, 0, stream>>>(byte_codes, x, n);
    gelu_1_kernel<<<blocks, 256, 0, stream>>>(x, n);
    cudaCheck(cudaGetLastError());
}

// Version 2: one kernel, still an element a thread: 4 bytes and k bits, all that there is to move. Neighbours put their codes
// together with three shuffles, after which each of 8 lanes holds the group's k bytes, and k of them write one. What it wastes
// is no longer memory but instructions: a load and a store of 2 bytes where the hardware moves 16 in one, a division (i % OC)
// and three shuffles an element. Version 3, the trainer's act_forward, gives a thread the whole group of 8: one load, one
// store, one division, and the codes meet in a register.
template <int BITS>
__global__ void act_forward_2_kernel(floatX* out, uint8_t* kept, const floatX* inp, const floatX* bias, size_t n, int OC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    bool there = i < n;   // who is not there takes part in the shuffles all the same
    float x = there ? (float)inp[i] + (float)bias[i % OC] : 0.0f;
    constexpr Steps<BITS> h = gelu_steps<BITS>();
    uint32_t codes = 0;
#pragma unroll
    for (int j = 0; j < (1 << BITS) - 1; j++) codes += !(x <= h.threshold[j]);
    int place = threadIdx.x % 8;
    codes <<= BITS * place;
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) codes |= __shfl_xor_sync(ALL_LANES, codes, o);
    if (!there) return;
    if (place < BITS) kept[i / 8 * BITS + place] = (uint8_t)(codes >> (8 * place));
    out[i] = (floatX)gelu(x);
}
template <int BITS>
void act_forward_2(floatX* out, uint8_t* kept, const floatX* inp, const floatX* bias, size_t rows, int OC,
                   cudaStream_t stream) {
    act_forward_2_kernel<BITS><<<ceil_div(rows * OC, 256), 256, 0, stream>>>(out, kept, inp, bias, rows * OC, OC);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Version 1: an element a thread reads its code, bit by bit, and looks its slope up in a table. The table is indexed by a
// variable, which registers cannot be: it lies in memory, local or constant. Then a second kernel reads the whole tensor once
// more for the bias: a thread owns a column and walks down all rows. 3072 columns are 96 warps for a GPU that can hold 8000,
// and each waits for a few loads at a time. 6 bytes and k bits.
template <int BITS>
__global__ void slope_1_kernel(floatX* d, const uint8_t* kept, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const Steps<BITS> h = gelu_steps<BITS>();
    int code = 0;
    for (int b = 0; b < BITS; b++) {
        int bit = BITS * (int)(i % 8) + b;
        code |= (kept[i / 8 * BITS + bit / 8] >> (bit % 8) & 1) << b;
    }
    d[i] = (floatX)((float)d[i] * h.slope[code]);
}
__global__ void bias_1_kernel(Grad dbias, const floatX* d, bool accumulate, int rows, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += (float)d[(size_t)r * OC + c];
    grad_store(dbias, c, sum, accumulate);
}
template <int BITS>
void act_backward_1(floatX* d, Grad dbias, const uint8_t* kept, bool accumulate, int rows, int OC, cudaStream_t stream) {
    size_t n = (size_t)rows * OC;
    slope_1_kernel<BITS><<<ceil_div(n, 256), 256, 0, stream>>>(d, kept, n);
    bias_1_kernel<<<ceil_div(OC, 128), 128, 0, stream>>>(dbias, d, accumulate, rows, OC);
    cudaCheck(cudaGetLastError());
}

// Version 2: the same first pass; the second is the trainer's bias_backward, which cuts the rows into 64 slices and gives each
// to 8 warps, so that the whole GPU has something to load. As many bytes as version 1, near the speed of memory. Version 3, the
// trainer's act_backward, walks as bias_backward does, multiplies by the slope on its way and writes the product back: the
// second pass is gone, and with it 2 bytes. (It also sums products that have not been rounded to bf16 yet.)
template <int BITS>
void act_backward_2(floatX* d, Grad dbias, float* scratch, const uint8_t* kept, bool accumulate, int rows, int OC,
                    cudaStream_t stream) {
    size_t n = (size_t)rows * OC;
    slope_1_kernel<BITS><<<ceil_div(n, 256), 256, 0, stream>>>(d, kept, n);
    cudaCheck(cudaGetLastError());
    bias_backward(dbias, scratch, d, accumulate, rows, OC, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// what there is for each number of bits: the tests below are written once for all of them

// The trainer's save_act and load_act by themselves, in fp32, for elements `first` and up of a tensor that is not there: its
// base is moved back so that they come to lie in a small buffer.
template <int BITS>
__global__ void save_act_kernel(ActKept<BITS>* kept, const float* x, size_t first, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f;
    for (int k = 0; k < VEC; k++) f[k] = x[i + k];
    save_act<BITS>(kept, first + i, f);
}
template <int BITS>
__global__ void load_act_kernel(float* slope, const ActKept<BITS>* kept, size_t first, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f = load_act<BITS>(kept, first + i);
    for (int k = 0; k < VEC; k++) slope[i + k] = f[k];
}
template <int BITS>
void save_act_far(uint8_t* kept, const float* x, size_t first, size_t n) {
    uint8_t* base = (uint8_t*)((uintptr_t)kept - first / 8 * BITS);
    save_act_kernel<BITS><<<ceil_div(n, 64 * VEC), 64>>>(base, x, first, n);
    cudaCheck(cudaGetLastError());
}
template <int BITS>
void load_act_far(float* slope, const uint8_t* kept, size_t first, size_t n) {
    const uint8_t* base = (const uint8_t*)((uintptr_t)kept - first / 8 * BITS);
    load_act_kernel<BITS><<<ceil_div(n, 64 * VEC), 64>>>(slope, base, first, n);
    cudaCheck(cudaGetLastError());
}
// A single block of the backward kernel: the first 256 columns.
template <int BITS>
void act_backward_block(floatX* d, float* partial, const uint8_t* kept, int rows, int columns) {
    act_backward_kernel<BITS><<<dim3(1, 1), 256>>>(d, partial, kept, rows, columns);
    cudaCheck(cudaGetLastError());
}

struct Codes {
    int bits;
    std::vector<float> threshold, slope;
    decltype(&act_forward<1>) forward;   // the trainer's
    decltype(&act_backward<1>) backward;
    decltype(&act_forward_1<1>) forward_1;
    decltype(&act_forward_2<1>) forward_2;
    decltype(&act_backward_1<1>) backward_1;
    decltype(&act_backward_2<1>) backward_2;
    decltype(&save_act_far<1>) save_far;
    decltype(&load_act_far<1>) load_far;
    decltype(&act_backward_block<1>) backward_block;
};
template <int BITS>
Codes codes_of() {
    constexpr Steps<BITS> h = gelu_steps<BITS>();
    return {BITS,
            std::vector<float>(std::begin(h.threshold), std::end(h.threshold)),
            std::vector<float>(std::begin(h.slope), std::end(h.slope)),
            act_forward<BITS>,
            act_backward<BITS>,
            act_forward_1<BITS>,
            act_forward_2<BITS>,
            act_backward_1<BITS>,
            act_backward_2<BITS>,
            save_act_far<BITS>,
            load_act_far<BITS>,
            act_backward_block<BITS>};
}

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision and one bit at a time

// 0.5 x (1 + tanh(u)), written so that even double precision does not cancel at the left end
double gelu_reference(double x) { return x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// The trainer computes x / (1 + exp(-2u)). Each of half a dozen roundings on the way to u is worth |2u| of them once it has
// been through the exponential, which is less the flatter the sigmoid; a handful come after, and as many again where bf16 builds
// use the hardware's approximations. Below the smallest normal number there is nothing relative any more.
double gelu_bound(double x) {
    double u = fabs(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)), flat = x > 0 ? 2 / (1 + exp(2 * u)) : 1;
    return fabs(gelu_reference(x)) * (EPS32 * (6 + 6 * !kFP32 + 12 * u * flat) + EPSX) + 1e-37;
}

// The number of thresholds below x. A NaN has the highest code.
int code_reference(const Codes& h, float x) {
    if (std::isnan(x)) return (1 << h.bits) - 1;
    int code = 0;
    for (float c : h.threshold) code += x > c;
    return code;
}

// Element i has bits k*(i%8) and up of the k bytes of its group of 8, the lowest first.
int read_code(const uint8_t* kept, int bits, size_t i) {
    int code = 0;
    for (int b = 0; b < bits; b++) {
        size_t bit = bits * (i % 8) + b;
        code |= (kept[i / 8 * bits + bit / 8] >> (bit % 8) & 1) << b;
    }
    return code;
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

void test_constants(const Codes& h) {
    const int N = (1 << h.bits) - 1;
    Property p("constants: ascending, from slope 0 to 1, sum a = 1, sum a c = 0");
    set_case("%d bits", h.bits);
    double moment = 0, rounding = 0;
    for (int j = 0; j < N; j++) {
        double a = (double)h.slope[j + 1] - h.slope[j];
        if (j) p.is(h.threshold[j] > h.threshold[j - 1], "a threshold is not above the one before it");
        moment += a * h.threshold[j];
        rounding += (2 + fabs(a)) * EPS32 * fabs(h.threshold[j]);   // of both slopes and of the threshold
    }
    p.is(h.slope[0] == 0 && h.slope[N] == 1, "the first slope is not 0, or the last not 1");
    p.is(fabs(moment) <= rounding, "sum a c is not 0 within the rounding of the constants");
    if (h.bits == 2) {   // the paper's, as published
        const double c[] = {-3.1858810036855245, -0.001178821281161997, 3.190832613414926},
                     s[] = {0, -0.04922261145617846, 1.0487405950855512, 1};
        for (int j = 0; j < 3; j++)
            p.is(h.threshold[j] == (float)c[j], "a threshold is not the float nearest to the published one");
        for (int j = 0; j < 4; j++) p.is(h.slope[j] == (float)s[j], "a slope is not the float nearest to the published one");
    }
    // the objective that the constants minimise, by the midpoint rule; beyond 12 both functions are 0 or x
    double objective = 0;
    const int STEPS = 48000;
    for (int i = 0; i < STEPS; i++) {
        double x = -12 + 24 * (i + 0.5) / STEPS, ramps = 0;
        for (int j = 0; j < N; j++) ramps += ((double)h.slope[j + 1] - h.slope[j]) * std::max(x - h.threshold[j], 0.0);
        objective += (gelu_reference(x) - ramps) * (gelu_reference(x) - ramps) * 24 / STEPS;
    }
    report({&p});
    printf("       the integral of (h - h~)^2 is %.7f\n", objective);
}

// Values where something could go wrong.
std::vector<float> special_values(const Codes& h) {
    std::vector<float> v;
    for (float c : h.threshold) {
        float below = nextafterf(c, -INFINITY), above = nextafterf(c, INFINITY);
        for (float x : {nextafterf(below, -INFINITY), below, c, above, nextafterf(above, INFINITY)}) v.push_back(x);
    }
    for (float x : {0.0f, 1.401298464e-45f, 1e-40f, 1.175494210e-38f, 1.175494351e-38f, 1e-20f, 1e-3f, 1.0f, 9.0f, 12.0f, 1e4f,
                    1e20f, 3.402823466e38f, INFINITY, NAN}) {
        v.push_back(x);
        v.push_back(-x);
    }
    while (v.size() % 8) v.push_back((float)v.size());
    return v;
}

void test_codes(const Codes& h, uint64_t seed) {
    std::vector<float> values = special_values(h);
    Random random(seed, 100 + h.bits);
    for (int k = 0; k < 2000; k++) values.push_back(3 * random.normal());
    for (size_t k = 0; k < values.size(); k++)
        std::swap(values[k], values[random.bits() % (k + 1)]);   // every value in any place of a group
    size_t n = values.size();
    Buffer<float> x(values), slope(n);
    Property codes("codes at, beside and between thresholds, beyond 2^31 elements too", "every bit"),
        slopes("slopes of these codes", "every bit");
    for (size_t first : {(size_t)0, ((size_t)1 << 31) - 1024, (size_t)1 << 31, ((size_t)1 << 32) - 8, ((size_t)1 << 34) + 8,
                         ((size_t)1 << 40) + 24}) {
        set_case("%d bits, elements from %zu", h.bits, first);
        Buffer<uint8_t> kept(n / 8 * h.bits);
        h.save_far(kept.p, x.p, first, n);
        h.load_far(slope.p, kept.p, first, n);
        std::vector<uint8_t> k = kept.read();
        std::vector<float> s = slope.read();
        for (size_t i = 0; i < n; i++) {
            int code = code_reference(h, values[i]);
            codes.equal(i, read_code(k.data(), h.bits, i), code);
            slopes.equal(i, s[i], h.slope[code]);
        }
    }
    report({&codes, &slopes});
}

// Rows and columns that are no multiple of anything but 8. The largest are for 2 bits alone, to save time.
struct Shape { int rows, OC; };
std::vector<Shape> shapes(int bits) {
    std::vector<Shape> all;
    for (int OC : {8, 24, 136, 264, 1000})
        for (int rows : {1, 3, 31, 257, 1031})
            if (bits == 2 || rows * OC < 70000) all.push_back({rows, OC});
    return all;
}

// Forward over a tensor, in every version. Codes are compared with those of the sum inp + bias that fp32 makes: exactly.
void test_forward(const Codes& h, uint64_t seed) {
    Property value("forward: tanh-GELU", "6 + 24 u sigmoid(-2u) roundings of fp32 and one of storing; of x <= 0: 6 + 12 u"),
        codes("forward: codes", "every bit"), odd("forward: NaN and infinities go through"),
        again("forward: the same bits in a second run, out of place, and with nothing kept"),
        two("forward, version 2: out and codes", "the trainer's bits"), one("forward, version 1: codes", "every bit"),
        one_value("forward, version 1: tanh-GELU", "of the rounded sum");
    std::vector<float> special = special_values(h);
    for (auto [rows, OC] : shapes(h.bits))
        for (bool with_bias : {true, false}) {
            set_case("%d bits, rows %d, OC %d, %s", h.bits, rows, OC, with_bias ? "bias" : "no bias");
            size_t n = (size_t)rows * OC;
            Random random(seed, h.bits * 1000000 + OC * 1000 + rows);
            std::vector<floatX> inp = random.normals(n, 0, 3), bias = random.normals(OC);
            for (size_t k = 0; k < special.size() && k < n; k++) inp[random.bits() % n] = (floatX)special[k];
            Buffer<floatX> x(inp), b(bias), out(n), dropped(n);
            Buffer<uint8_t> kept(n / 8 * h.bits), kept2(n / 8 * h.bits);
            const floatX* bias_p = with_bias ? b.p : nullptr;
            h.forward(out.p, kept2.p, x.p, bias_p, rows, OC, 0);
            h.forward(dropped.p, nullptr, x.p, bias_p, rows, OC, 0);
            h.forward(x.p, kept.p, x.p, bias_p, rows, OC, 0);
            std::vector<floatX> y = x.read();
            std::vector<uint8_t> k = kept.read();
            again.is(same_bits(y, out.read()) && same_bits(y, dropped.read()) && same_bits(k, kept2.read()), "other bits");
            for (size_t i = 0; i < n; i++) {
                float sum = with_bias ? (float)inp[i] + (float)bias[i % OC] : (float)inp[i], ours = (float)y[i];
                codes.equal(i, read_code(k.data(), h.bits, i), code_reference(h, sum));
                // -inf * 0 is no number: so it is in PyTorch's tanh form
                if (!std::isfinite(sum)) odd.equal(i, ours, sum > 0 ? INFINITY : NAN);
                else if (fabsf(sum) > 100)
                    odd.is(sum > 0 ? ours == (float)(floatX)sum : ours == 0, "a large number is not itself, or 0");
                else value.within(i, ours, gelu_reference(sum), gelu_bound(sum));
            }
            if (!with_bias) continue;
            x.write(inp);
            h.forward_2(out.p, kept2.p, x.p, b.p, rows, OC, 0);
            two.is(same_bits(y, out.read()) && same_bits(k, kept2.read()), "other bits");
            Buffer<uint8_t> byte_codes(n);
            h.forward_1(x.p, byte_codes.p, b.p, rows, OC, 0);
            y = x.read();
            k = byte_codes.read();
            for (size_t i = 0; i < n; i++) {
                float sum = (float)(floatX)((float)inp[i] + (float)bias[i % OC]);
                one.equal(i, k[i], code_reference(h, sum));
                if (fabsf(sum) <= 100) one_value.within(i, (float)y[i], gelu_reference(sum), gelu_bound(sum));
            }
        }
    report({&value, &codes, &odd, &again, &two, &one, &one_value});
}

// Backward over a tensor with random codes, in every version, into gradients of both types, written and added to.
void test_backward(const Codes& h, uint64_t seed) {
    Property slope("backward: d * slope, in place", "every bit"), again("backward: the same bits in a second run"),
        fused32("backward: bias gradient in fp32", "a rounding for each of the additions that stand in a row"),
        fused16("backward: bias gradient in bf16", "and one of storing"),
        two("backward, version 2: d and bias gradient", "every bit of d"),
        one("backward, version 1: d and bias gradient", "every bit of d"),
        nan("backward: a NaN stays in its place, and reaches its column's bias");
    for (auto [rows, OC] : shapes(h.bits)) {
        size_t n = (size_t)rows * OC;
        Random random(seed, 2000000000 + h.bits * 1000000 + OC * 1000 + rows);
        std::vector<floatX> d = random.normals(n), expected(n);
        std::vector<float> before = floats(random.normals(OC, 0, 10));
        for (float& x : before) x = (float)(__nv_bfloat16)x;
        std::vector<uint8_t> kept(n / 8 * h.bits);
        for (uint8_t& k : kept) k = (uint8_t)random.bits();
        std::vector<double> sum(OC, 0), terms(OC, 0);
        for (size_t i = 0; i < n; i++) {
            float s = h.slope[read_code(kept.data(), h.bits, i)];
            expected[i] = (floatX)((float)d[i] * s);
            sum[i % OC] += (double)(float)d[i] * s;
            terms[i % OC] += fabs((double)(float)d[i] * s);
        }
        Buffer<uint8_t> k(kept);
        Buffer<floatX> x(n);
        Buffer<float> scratch(COLSUM_SLICES * OC);
        for (DType type : {F32, BF16})
            for (bool accumulate : {false, true}) {
                set_case("%d bits, rows %d, OC %d, %s gradient, %s", h.bits, rows, OC, dtype_name(type),
                         accumulate ? "added to" : "written");
                GradBuffer dbias(OC, type);
                std::vector<float> db[4];
                for (int version : {0, 1, 2, 3}) {   // 3 and 0 are the trainer's
                    if ((version == 1 || version == 2) && type == BF16 && n > 70000) continue;
                    x.write(d);
                    dbias.write(accumulate ? before : std::vector<float>(OC, NAN));
                    if (version == 1) h.backward_1(x.p, dbias.grad(), k.p, accumulate, rows, OC, 0);
                    else if (version == 2) h.backward_2(x.p, dbias.grad(), scratch.p, k.p, accumulate, rows, OC, 0);
                    else h.backward(x.p, dbias.grad(), scratch.p, k.p, accumulate, rows, OC, 0);
                    std::vector<floatX> got = x.read();
                    db[version] = dbias.read();
                    Property& p = version == 1 ? one : version == 2 ? two : slope;
                    if (version == 3)
                        for (size_t i = 0; i < n; i++) p.equal(i, (float)got[i], (float)expected[i]);
                    else p.is(same_bits(got, expected), "d has other bits");
                    Property& sums = version == 1 ? one : version == 2 ? two : type == F32 ? fused32 : fused16;
                    for (int c = 0; c < OC; c++) {
                        double reference = sum[c] + (accumulate ? before[c] : 0),
                               size = terms[c] + (accumulate ? fabs(before[c]) : 0);
                        double depth = version == 1 ? rows + 1 : colsum_depth(rows),
                               rounded = version == 1 || version == 2 ? EPSX : 0;
                        double bound =
                            size * (EPS32 * (depth + 1) + rounded) + fabs(reference) * (type == BF16 ? EPS16 * 1.01 : 0);
                        sums.within(c, db[version][c], reference, bound);
                    }
                }
                again.is(same_bits(db[0], db[3]), "other bits");
            }
        // a NaN
        set_case("%d bits, rows %d, OC %d, a NaN", h.bits, rows, OC);
        size_t where = random.bits() % n;
        std::vector<floatX> broken = d;
        broken[where] = (floatX)NAN;
        x.write(broken);
        GradBuffer dbias(OC, F32);
        h.backward(x.p, dbias.grad(), scratch.p, k.p, false, rows, OC, 0);
        std::vector<floatX> got = x.read();
        std::vector<float> db = dbias.read();
        for (size_t i = 0; i < n; i++) nan.is(std::isnan((float)got[i]) == (i == where), "a NaN appeared or was lost");
        for (int c = 0; c < OC; c++)
            nan.is(std::isnan(db[c]) == ((size_t)c == where % OC), "a NaN appeared in the bias or was lost");
    }
    report({&slope, &fused32, &fused16, &again, &nan, &two, &one});
}

// The backward kernel's own index, row * columns + column, beyond 2^31 and 2^32: five rows of more than 2^30 columns. A single
// block is launched, which touches the first 256 columns of each row. On the CPU the tensor is address space that nobody has
// filled.
void test_backward_far(const Codes& h) {
    constexpr int COLUMNS = (1 << 30) + 64, ROWS = 5, SEEN = 256;
    const size_t n = (size_t)ROWS * COLUMNS, d_bytes = n * sizeof(floatX), kept_bytes = n / 8 * h.bits;
    set_case("%d bits, 5 rows of 2^30 + 64", h.bits);
    uint8_t* memory = nullptr;
    if (on_cpu_backend()) {
        void* p =
            mmap(nullptr, d_bytes + kept_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p != MAP_FAILED) memory = (uint8_t*)p;
    } else if (free_memory() > d_bytes + kept_bytes + ((size_t)1 << 30)) {
        cudaCheck(cudaMalloc((void**)&memory, d_bytes + kept_bytes));
    }
    if (memory == nullptr) {
        printf("  skipped: backward beyond 2^31 elements wants %.1f GB of addresses\n", (d_bytes + kept_bytes) / 1e9);
        return;
    }
    auto put = [&](void* to, const void* from, size_t bytes) {
        if (on_cpu_backend()) memcpy(to, from, bytes);
        else cudaCheck(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    };
    Property p("backward beyond 2^31 elements: d * slope", "every bit");
    floatX* d = (floatX*)memory;
    uint8_t* kept = memory + d_bytes;
    Random random(1337, 7);
    std::vector<std::vector<floatX>> values;
    std::vector<std::vector<uint8_t>> codes;
    for (int r = 0; r < ROWS; r++) {
        values.push_back(random.normals(SEEN));
        codes.emplace_back(SEEN / 8 * h.bits);
        for (uint8_t& k : codes.back()) k = (uint8_t)random.bits();
        put(d + (size_t)r * COLUMNS, values[r].data(), SEEN * sizeof(floatX));
        put(kept + (size_t)r * COLUMNS / 8 * h.bits, codes[r].data(), codes[r].size());
    }
    Buffer<float> partial(SEEN);
    h.backward_block(d, partial.p, kept, ROWS, COLUMNS);
    cudaCheck(cudaDeviceSynchronize());
    for (int r = 0; r < ROWS; r++) {
        std::vector<floatX> got(SEEN);
        put(got.data(), d + (size_t)r * COLUMNS, SEEN * sizeof(floatX));
        digest(got.data(), SEEN * sizeof(floatX));
        for (int c = 0; c < SEEN; c++)
            p.equal(c, (float)got[c], (float)(floatX)((float)values[r][c] * h.slope[read_code(codes[r].data(), h.bits, c)]));
    }
    report({&p});
    if (on_cpu_backend()) munmap(memory, d_bytes + kept_bytes);
    else cudaCheck(cudaFree(memory));
}

// The launchers as the trainer calls them, on 2^31 elements and a few more, where there is the memory.
__host__ __device__ inline float pattern(size_t i, int stream) { return 8 * hash_uniform(hash64(stream, 0, i)) - 4; }
__global__ void pattern_kernel(floatX* p, size_t n, int stream) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] = (floatX)pattern(i, stream);
}
void test_large(bool asked) {
    const Codes h = codes_of<2>();
    const int OC = 1024;
    const int rows = (1 << 21) + 5;
    const size_t n = (size_t)rows * OC, bytes = n * sizeof(floatX) + n / 8 * h.bits + COLSUM_SLICES * OC * sizeof(float);
    if (!asked && (on_cpu_backend() || free_memory() < bytes + ((size_t)1 << 30))) {
        printf("  skipped: 2^31 elements for real take %.1f GB, and minutes on a CPU (--large)\n", bytes / 1e9);
        return;
    }
    set_case("2^31 + 5120 elements");
    Property forward("2^31 elements: forward and codes, in windows"),
        backward("2^31 elements: backward, in windows", "every bit");
    floatX* x;
    uint8_t* kept;
    cudaCheck(cudaMalloc((void**)&x, n * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&kept, n / 8 * h.bits));
    Buffer<float> scratch(COLSUM_SLICES * OC);
    GradBuffer dbias(OC, F32);
    const size_t window = 4096;
    std::vector<floatX> got(window);
    std::vector<uint8_t> codes(window / 8 * h.bits);
    for (bool back : {false, true}) {
        pattern_kernel<<<ceil_div(n, 256), 256>>>(x, n, back);
        cudaCheck(cudaGetLastError());
        if (!back) h.forward(x, kept, x, nullptr, rows, OC, 0);
        else h.backward(x, dbias.grad(), scratch.p, kept, false, rows, OC, 0);
        for (size_t at : {(size_t)0, n / 2, ((size_t)1 << 31) - 2048, n - window}) {
            cudaCheck(cudaMemcpy(got.data(), x + at, window * sizeof(floatX), cudaMemcpyDeviceToHost));
            cudaCheck(cudaMemcpy(codes.data(), kept + at / 8 * h.bits, codes.size(), cudaMemcpyDeviceToHost));
            digest(got.data(), window * sizeof(floatX));
            for (size_t i = 0; i < window; i++) {
                float inp = (float)(floatX)pattern(at + i, 0), d = (float)(floatX)pattern(at + i, 1);
                int code = code_reference(h, inp);
                if (back) {
                    backward.equal(at + i, (float)got[i], (float)(floatX)(d * h.slope[code]));
                } else {
                    forward.within(at + i, (float)got[i], gelu_reference(inp), gelu_bound(inp));
                    forward.equal(at + i, read_code(codes.data(), h.bits, i), code);
                }
            }
        }
    }
    report({&forward, &backward});
    cudaCheck(cudaFree(x));
    cudaCheck(cudaFree(kept));
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark: 2 bits against the exact kernels

void bench(const char* model, int rows, int OC) {
    constexpr int BITS = 2;
    const double X = sizeof(floatX), codes = BITS / 8.0;
    const size_t n = (size_t)rows * OC;
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: rows %d, OC %d", model, rows, OC);
    BenchTable t(title, n);
    // without a GPU nothing runs, and the tensors have one row
    size_t m = t.timed ? n : OC;
    Buffer<floatX> x(m), y(m), bias(OC);
    Buffer<uint8_t> kept(m / 8 * BITS), byte_codes(m);
    Buffer<float> scratch(COLSUM_SLICES * OC);
    GradBuffer dbias(OC, F32);
    pattern_kernel<<<ceil_div(m, 256), 256>>>(x.p, m, 0);
    pattern_kernel<<<ceil_div(OC, 256), 256>>>(bias.p, OC, 1);
    kept.fill(0, 256);
    t.row("forward, exact (the matmul has added the bias; x is kept)", 2 * X,
          [&] { act_forward<0>(y.p, nullptr, x.p, nullptr, rows, OC, 0); });
    t.row("forward, version 1: a step a kernel (keeps 8 bits)", 5 * X + 1,
          [&] { act_forward_1<BITS>(y.p, byte_codes.p, bias.p, rows, OC, 0); });
    t.row("forward, version 2: one kernel, an element a thread", 2 * X + codes,
          [&] { act_forward_2<BITS>(y.p, kept.p, x.p, bias.p, rows, OC, 0); });
    t.row("forward, version 3: the trainer's (keeps 2 bits)", 2 * X + codes,
          [&] { act_forward<BITS>(y.p, kept.p, x.p, bias.p, rows, OC, 0); });
    t.row("backward, exact", 3 * X, [&] { act_backward<0>(y.p, dbias.grad(), scratch.p, x.p, false, rows, OC, 0); });
    t.row("backward, version 1: a column a thread for the bias", 3 * X + codes,
          [&] { act_backward_1<BITS>(y.p, dbias.grad(), kept.p, false, rows, OC, 0); });
    t.row("backward, version 2: the trainer's column sum for the bias", 3 * X + codes,
          [&] { act_backward_2<BITS>(y.p, dbias.grad(), scratch.p, kept.p, false, rows, OC, 0); });
    t.row("backward, version 3: the trainer's, one pass", 2 * X + codes,
          [&] { act_backward<BITS>(y.p, dbias.grad(), scratch.p, kept.p, false, rows, OC, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "regelu2: GELU whose backward remembers 1 to 4 bits of an element");
    if (o.bench) {
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 4 * 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 4 * 1600);
        return 0;
    }
    test_misuse(o, {{"OC of 12", "act_forward: OC is 12: expected a multiple of 8",
                     [] { act_forward<2>(nullptr, nullptr, nullptr, nullptr, 1, 12, 0); }},
                    {"OC of 12, backward", "act_backward: OC is 12: expected a multiple of 8",
                     [] { act_backward<2>(nullptr, {}, nullptr, nullptr, false, 1, 12, 0); }}});
    printf("regelu2, %s\n", dtype_name(FLOATX));
    for (const Codes& h : {codes_of<1>(), codes_of<2>(), codes_of<3>(), codes_of<4>()}) {
        printf("%d bit%s\n", h.bits, h.bits > 1 ? "s" : "");
        test_constants(h);
        test_codes(h, o.seed);
        test_forward(h, o.seed);
        test_backward(h, o.seed);
        test_backward_far(h);
    }
    printf("large\n");
    test_large(o.large);
    return finish(o);
}
