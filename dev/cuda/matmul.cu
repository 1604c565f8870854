/*
The three matmuls of a linear layer and the gradient of its bias: the trainer's, tested, and simpler ones beside them to learn
from. The trainer leaves matmuls to cuBLASLt; here is what such a library does about memory, as far as plain arithmetic goes.

    make dev/cuda/matmul && ./dev/cuda/matmul [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/matmul.cu -lcublasLt -o matmul

With inp (rows, C), weight (OC, C), out and dout (rows, OC): out = inp W^T + bias, dinp = dout W, dW (+)= dout^T inp, dbias (+)=
the sum of dout over its rows. C and OC are multiples of 8, rows can be any number. Sums are in fp32. Weight and bias gradients
are fp32 or floatX, written or added to.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the matmul
//
// All three are D[i][j] = sum over k of A[i][k] * B[k][j], and differ in which neighbours of A and of B stand side by side in
// memory. So a kernel takes the distances, and one kernel does for all.
struct Product {
    int m, n, k;   // D is (m, n)
    const floatX *a, *b;
    size_t a_i, a_k;      // elements from A[i][k] to A[i + 1][k], and to A[i][k + 1]: one of them is 1
    size_t b_k, b_j;      // likewise
    const floatX* bias;   // (n) or null
    Grad out;             // (m, n)
    bool accumulate;
};
__device__ void product_store(const Product& p, int i, int j, float sum) {
    if (p.bias != nullptr) sum += (float)p.bias[j];
    grad_store(p.out, (size_t)i * p.n + j, sum, p.accumulate);
}
Product forward_product(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, int rows, int C, int OC) {
    return {rows, OC, C, inp, weight, (size_t)C, 1, 1, (size_t)C, bias, {out, FLOATX}, false};
}
Product backward_input_product(floatX* dinp, const floatX* dout, const floatX* weight, int rows, int C, int OC) {
    return {rows, C, OC, dout, weight, (size_t)OC, 1, (size_t)C, 1, nullptr, {dinp, FLOATX}, false};
}
Product backward_weight_product(Grad dweight, const floatX* dout, const floatX* inp, bool accumulate, int rows, int C, int OC) {
    return {OC, C, rows, dout, inp, 1, (size_t)OC, (size_t)C, 1, nullptr, dweight, accumulate};
}

// Version 1: an element of D a thread, which walks along a row of A and down a column of B. For the 2 flops of a multiplication
// and an addition it loads 4 bytes in bf16: 0.5 flop a byte. Every element of A is loaded n times and every one of B m times;
// caches take much of that, but they too can deliver only so much. Forward is the worst of the three: neighbouring lanes have
// neighbouring j, W stands there as (OC, C), and a load touches 32 lines to use 2 bytes of each.
// A large GPU adds and multiplies 60e12 times a second in fp32 and reads some 4e12 bytes: it wants 15 flops for each byte, and
// its tensor cores, which make ten times as many or more, want 200 and up. That is what the versions below are about.
__global__ void matmul_1_kernel(Product p) {
    int tiles = (p.n + 31) / 32;   // blocks of 8 x 32 elements of D
    int i = blockIdx.x / tiles * 8 + threadIdx.y, j = blockIdx.x % tiles * 32 + threadIdx.x;
    if (i >= p.m || j >= p.n) return;
    const floatX *a = p.a + i * p.a_i, *b = p.b + j * p.b_j;
    float sum = 0;
    for (int k = 0; k < p.k; k++) sum += (float)a[k * p.a_k] * (float)b[k * p.b_k];
    product_store(p, i, j, sum);
}
void matmul_1(const Product& p, cudaStream_t stream) {
    matmul_1_kernel<<<ceil_div(p.m, 8) * ceil_div(p.n, 32), dim3(32, 8), 0, stream>>>(p);
    cudaCheck(cudaGetLastError());
}

// Version 2: a block makes a tile of 32 x 32 elements of D. It brings tiles of 32 x 32 of A and of B into shared memory, each
// thread one element, neighbours reading neighbours whichever way the matrix lies, and uses each element 32 times: 2 * 32^3
// flops for 2 * 32^2 elements are 16 flops a byte in bf16. (The 33rd column keeps lanes that write one below the other out of
// the same bank.) The next limit is shared memory: it delivers 32 floats a clock to a multiprocessor that could multiply and
// add 128 times, and a warp's step wants two such deliveries, one of A (the same for all lanes) and one of B. An eighth of the
// peak, at best.
__global__ void __launch_bounds__(1024) matmul_2_kernel(Product p) {
    __shared__ float a[32][33], b[32][33];   // [i][k] and [k][j]
    int tiles = (p.n + 31) / 32, x = threadIdx.x, y = threadIdx.y;
    int i0 = blockIdx.x / tiles * 32, j0 = blockIdx.x % tiles * 32;
    // which element of a tile the thread brings: lanes along the side that is contiguous
    int a_i = p.a_k == 1 ? y : x, a_k = p.a_k == 1 ? x : y, b_k = p.b_k == 1 ? x : y, b_j = p.b_k == 1 ? y : x;
    float sum = 0;
    for (int k0 = 0; k0 < p.k; k0 += 32) {
        bool a_there = i0 + a_i < p.m && k0 + a_k < p.k, b_there = j0 + b_j < p.n && k0 + b_k < p.k;
        a[a_i][a_k] = a_there ? (float)p.a[(i0 + a_i) * p.a_i + (k0 + a_k) * p.a_k] : 0.0f;
        b[b_k][b_j] = b_there ? (float)p.b[(j0 + b_j) * p.b_j + (k0 + b_k) * p.b_k] : 0.0f;
        __syncthreads();
        for (int k = 0; k < 32; k++) sum += a[y][k] * b[k][x];
        __syncthreads();   // or a fast warp would write the next tile into this one
    }
    if (i0 + y < p.m && j0 + x < p.n) product_store(p, i0 + y, j0 + x, sum);
}
void matmul_2(const Product& p, cudaStream_t stream) {
    matmul_2_kernel<<<ceil_div(p.m, 32) * ceil_div(p.n, 32), dim3(32, 32), 0, stream>>>(p);
    cudaCheck(cudaGetLastError());
}

// Version 3: a tile of 128 x 128 a block and 8 x 8 elements of D a thread, in registers. From memory comes a quarter of what
// version 2 reads: 64 flops a byte. From shared memory a thread reads 8 elements of A and 8 of B for 64 multiplications, where
// it read 2 for one: plain arithmetic is the limit now, no longer its supply. 8 steps of k are brought at a time, half of the
// threads for A and half for B, each 8 neighbours with one load of 16 bytes; the next ones are on their way while these are
// used. A thread's rows are two groups of 4, 64 apart, and so are its columns, so that neighbouring threads read neighbouring
// banks.
//
// Version 4, the trainer's, is cuBLASLt. It goes on in the same manner: tiles of 128 x 256 or so, 85 flops a byte, several
// steps of k ahead, copied to shared memory without passing through registers. And a warp multiplies whole tiles in tensor
// cores, with more than ten times the flops of plain arithmetic, of which nothing here makes use.
__global__ void __launch_bounds__(256) matmul_3_kernel(Product p) {
    constexpr int TILE = 128, K = VEC;
    __shared__ float a[K][TILE + 4], b[K][TILE + 4];   // [k][i] and [k][j]
    int tiles = (p.n + TILE - 1) / TILE;
    int i0 = blockIdx.x / tiles * TILE, j0 = blockIdx.x % tiles * TILE;
    // what the thread brings: 8 steps of k of one row (or column), or one step of 8 of them
    const bool for_a = threadIdx.x < 128;
    const bool along_k = for_a ? p.a_k == 1 : p.b_k == 1;
    const int t = threadIdx.x % 128, place = along_k ? t : t % 16 * VEC, step = along_k ? 0 : t / 16;
    const int row = (for_a ? i0 : j0) + place;
    const bool there = row < (for_a ? p.m : p.n);
    const size_t stride = for_a ? p.a_k : p.b_k;
    const floatX* from = for_a ? p.a + row * p.a_i : p.b + row * p.b_j;
    float(&tile)[K][TILE + 4] = for_a ? a : b;
    auto fetch = [&](int k) {
        Floats f = {};
        if (there && k + step < p.k) f = load(from + (k + step) * stride);
        return f;
    };
    const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
    float sum[8][8] = {};
    Floats next = fetch(0);
    for (int k0 = 0; k0 < p.k; k0 += K) {
#pragma unroll
        for (int e = 0; e < VEC; e++) tile[along_k ? e : step][along_k ? place : place + e] = next[e];
        __syncthreads();
        next = fetch(k0 + K);
#pragma unroll
        for (int k = 0; k < K; k++) {
            float x[8], y[8];
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] = a[k][ty + e / 4 * 64 + e % 4], x[e] = b[k][tx + e / 4 * 64 + e % 4];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] += y[i] * x[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < 64; e++) {
        int i = i0 + ty + e / 32 * 64 + e / 8 % 4, j = j0 + tx + e % 8 / 4 * 64 + e % 4;
        if (i < p.m && j < p.n) product_store(p, i, j, sum[e / 8][e % 8]);
    }
}
void matmul_3(const Product& p, cudaStream_t stream) {
    matmul_3_kernel<<<ceil_div(p.m, 128) * ceil_div(p.n, 128), 256, 0, stream>>>(p);
    cudaCheck(cudaGetLastError());
}

void matmul_simple(int version, const Product& p, cudaStream_t stream) {
    if (version == 1) matmul_1(p, stream);
    else if (version == 2) matmul_2(p, stream);
    else matmul_3(p, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the bias gradient

// Version 1: a column a thread. The 32 lanes of a warp read 64 bytes, half a line, and 3072 columns are 96 warps on a GPU that
// can hold 8000 and needs thousands of loads on their way to keep its memory busy. And 65536 additions stand in a row. 2 bytes
// an element, as few as can be, but slowly.
//
// Version 2, the trainer's bias_backward: 8 columns a lane, so a warp reads 512 bytes; up to 64 slices of the rows, so that
// there are 64 times as many blocks, of 8 warps that take every eighth row of the slice; and a second, small kernel that adds
// the slices in their order. The same 2 bytes, near the speed of memory. Atomics would save the second kernel, and with it the
// order: the sums would differ from run to run. (Where a kernel of the trainer has the tensor in its hands anyway, it makes
// these sums on its way: see regelu2.cu and layernorm.cu.)
__global__ void bias_backward_1_kernel(Grad dbias, const floatX* dout, bool accumulate, int rows, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += (float)dout[(size_t)r * OC + c];
    grad_store(dbias, c, sum, accumulate);
}
void bias_backward_1(Grad dbias, const floatX* dout, bool accumulate, int rows, int OC, cudaStream_t stream) {
    bias_backward_1_kernel<<<ceil_div(OC, 128), 128, 0, stream>>>(dbias, dout, accumulate, rows, OC);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// tests of the matmul

// A tensor in the middle of an allocation, `offset` bytes from where cudaMalloc's alignment would have it, with NaN around it:
// who reads beside it computes NaN.
template <class T>
struct Middle {
    size_t n, before;
    Buffer<T> all;
    T* p;
    Middle(size_t n, int offset) : n(n), before(offset / sizeof(T)), all(before + n + 16 / sizeof(T)), p(all.p + before) {}
    Middle(const std::vector<T>& v, int offset) : Middle(v.size(), offset) { write(v); }
    void write(const std::vector<T>& v) { cudaCheck(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> read() const {
        const std::vector<T> v = all.read();
        for (size_t i = 0; i < v.size(); i++)
            if ((i < before || i >= before + n) && !std::isnan((float)v[i]))
                fail("%s: something was written beside a tensor of %zu elements", case_name.c_str(), n);
        return std::vector<T>(v.begin() + before, v.begin() + before + n);
    }
};

struct Layer {   // everything that a linear layer is given
    int rows, C, OC;
    std::vector<floatX> inp, weight, bias, dout;
    Layer(uint64_t seed, int rows, int C, int OC) : rows(rows), C(C), OC(OC) {
        Random random(seed, ((uint64_t)rows << 32) + C * 1000 + OC);
        inp = random.normals((size_t)rows * C, 0.1f);
        weight = random.normals((size_t)OC * C, 0, 1 / sqrtf(C));
        bias = random.normals(OC, 0, 3);
        dout = random.normals((size_t)rows * OC, 0.1f);
    }
};

enum Which { FORWARD, NO_BIAS, INPUT, WEIGHT, WEIGHT_ADDED };
const char* const NAMES[] = {"forward", "forward without bias", "backward, input", "backward, weight",
                             "backward, weight, added to"};
constexpr int TRAINERS = 4;   // the version

// One of the five, into elements of type T.
template <class T>
std::vector<T> compute(Which which, int version, const Layer& l, const std::vector<T>& before, int offset) {
    Middle<floatX> inp(l.inp, offset), weight(l.weight, offset), bias(l.bias, offset), dout(l.dout, offset);
    const size_t n = (size_t)(which >= WEIGHT ? l.OC : l.rows) * (which == FORWARD || which == NO_BIAS ? l.OC : l.C);
    Middle<T> out(n, offset);
    if (which == WEIGHT_ADDED) out.write(before);
    const Grad grad = {out.p, std::is_same<T, float>::value ? F32 : BF16};
    const floatX* b = which == FORWARD ? bias.p : nullptr;
    const bool add = which == WEIGHT_ADDED;
    if (which <= NO_BIAS) {
        if (version == TRAINERS) matmul_forward((floatX*)grad.p, inp.p, weight.p, b, l.rows, l.C, l.OC, 0);
        else matmul_simple(version, forward_product((floatX*)grad.p, inp.p, weight.p, b, l.rows, l.C, l.OC), 0);
    } else if (which == INPUT) {
        if (version == TRAINERS) matmul_backward_input((floatX*)grad.p, dout.p, weight.p, l.rows, l.C, l.OC, 0);
        else matmul_simple(version, backward_input_product((floatX*)grad.p, dout.p, weight.p, l.rows, l.C, l.OC), 0);
    } else {
        if (version == TRAINERS) matmul_backward_weight(grad, dout.p, inp.p, add, l.rows, l.C, l.OC, 0);
        else matmul_simple(version, backward_weight_product(grad, dout.p, inp.p, add, l.rows, l.C, l.OC), 0);
    }
    return out.read();
}

// In double precision, with the sum of the terms' absolute values.
struct Reference {
    int m, n, k;
    Doubles out, terms;
    Reference(Which which, const Layer& l, const Doubles& before) {
        const bool forward = which <= NO_BIAS, weight = which >= WEIGHT;
        m = weight ? l.OC : l.rows, n = forward ? l.OC : l.C, k = forward ? l.C : weight ? l.rows : l.OC;
        const Doubles a = doubles(forward ? l.inp : l.dout), b = doubles(weight ? l.inp : l.weight), bias = doubles(l.bias);
        out = terms = Doubles((size_t)m * n, 0);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double &sum = out[(size_t)i * n + j], &size = terms[(size_t)i * n + j];
                if (which == FORWARD) sum = bias[j];
                if (which == WEIGHT_ADDED) sum = before[(size_t)i * n + j];
                size = fabs(sum);
                for (int r = 0; r < k; r++) {
                    double x = (weight ? a[(size_t)r * m + i] : a[(size_t)i * k + r]) *
                               (forward ? b[(size_t)j * k + r] : b[(size_t)r * n + j]);
                    sum += x, size += fabs(x);
                }
            }
    }
};

struct Versions {   // a statement about each of them
    Property p[5];
    Versions(const char* one, const char* two, const char* three, const char* four, const char* bound)
        : p{{""}, {one, bound}, {two, bound}, {three, bound}, {four, bound}} {}
    Versions(const Versions&) = delete;
    Property& operator[](int v) { return p[v]; }
    void print() { report({&p[4], &p[3], &p[2], &p[1]}); }
};

template <class T>
void test_type(Which which, const Layer& l, Versions& fp32, Versions& bf16, Property& again) {
    const bool wide = std::is_same<T, float>::value;
    std::vector<T> before;
    if (which == WEIGHT_ADDED) {
        Random random(7, l.rows);
        for (size_t i = 0; i < (size_t)l.OC * l.C; i++) before.push_back((T)(10 * random.normal()));
    }
    const Reference ref(which, l, doubles(before));
    for (int version = 1; version <= TRAINERS; version++)
        for (int offset : {0, 16}) {
            if (version < TRAINERS && offset == 0) continue;
            set_case("%s, rows %d, C %d, OC %d, %s, version %d, addresses + %d", NAMES[which], l.rows, l.C, l.OC,
                     wide ? "fp32" : "bf16", version, offset);
            const std::vector<T> got = compute<T>(which, version, l, before, offset);
            if (version == TRAINERS) again.is(same_bits(got, compute<T>(which, version, l, before, offset)), "other bits");
            // An addition for each term, and one for the bias or what was there. A tensor core adds bf16 products as fp32 does
            // or cuts where fp32 rounds: twice the error.
            const double step = EPS32 * (version == TRAINERS && !kFP32 ? 2 : 1), store = wide ? EPS32 : EPS16;
            for (size_t i = 0; i < got.size(); i++) {
                double error = ref.terms[i] * step * (ref.k + 2);
                (wide ? fp32 : bf16)[version].within(i, (float)got[i], ref.out[i],
                                                     (error + (fabs(ref.out[i]) + error) * store) * 1.01);
            }
        }
}

void test_matmul(uint64_t seed) {
    Versions fp32("version 1 into fp32", "version 2 into fp32", "version 3 into fp32", "the trainer's into fp32",
                  "a rounding for each term"),
        bf16("version 1 into bf16", "version 2 into bf16", "version 3 into bf16", "the trainer's into bf16",
             "and one of storing");
    Property again("the trainer's: the same bits in a second run");
    struct Shape { int C, OC; };
    for (int rows : {1, 7, 33, 130})
        for (Shape s : {Shape{8, 8}, Shape{24, 40}, Shape{136, 8}, Shape{8, 264}, Shape{72, 136}, Shape{264, 32}}) {
            const Layer l(seed, rows, s.C, s.OC);
            for (Which which : {FORWARD, NO_BIAS, INPUT, WEIGHT, WEIGHT_ADDED}) {
                test_type<floatX>(which, l, fp32, bf16, again);
                if (!kFP32 && which >= WEIGHT) test_type<float>(which, l, fp32, bf16, again);
            }
        }
    printf("matmul, in the middle of tensors too\n");
    fp32.print();
    if (!kFP32) bf16.print();
    report({&again});
}

// What is no number goes where it must, and all else keeps its bits. A matrix times 1 is that matrix.
void test_special(uint64_t seed) {
    Property odd("a NaN or an infinity reaches its row or its column, and only that"),
        one("a matrix times 1 is itself, every bit", "denormals may become 0");
    const Layer clean(seed, 37, 40, 136);
    const int r = 35, c = 9, o = 131;
    enum { NOTHING, ROW, COLUMN };
    struct Case { const char* where; int forward, input, weight; };
    for (int version = 1; version <= TRAINERS; version++) {
        const std::vector<floatX> out = compute<floatX>(FORWARD, version, clean, {}, 16),
                                  dinp = compute<floatX>(INPUT, version, clean, {}, 16),
                                  dweight = compute<floatX>(WEIGHT, version, clean, {}, 16);
        for (float bad : {NAN, INFINITY, -INFINITY})
            for (const Case& k : {Case{"inp", ROW, NOTHING, COLUMN}, Case{"weight", COLUMN, COLUMN, NOTHING},
                                  Case{"bias", COLUMN, NOTHING, NOTHING}, Case{"dout", NOTHING, ROW, ROW}}) {
                set_case("%f in %s, version %d", bad, k.where, version);
                Layer l = clean;
                std::string w = k.where;
                (w == "inp"      ? l.inp[r * l.C + c]
                 : w == "weight" ? l.weight[o * l.C + c]
                 : w == "bias"   ? l.bias[o]
                                 : l.dout[r * l.OC + o]) = (floatX)bad;
                auto check = [&](Which which, const std::vector<floatX>& before, int where, int row, int column, int columns) {
                    const std::vector<floatX> got = compute<floatX>(which, version, l, {}, 16);
                    bool fine = true;
                    for (size_t i = 0; i < got.size(); i++) {
                        bool hit = where == ROW ? (int)i / columns == row : where == COLUMN && (int)i % columns == column;
                        fine &= hit ? !std::isfinite((float)got[i]) : (float)got[i] == (float)before[i];
                    }
                    odd.is(fine, NAMES[which]);
                };
                check(FORWARD, out, k.forward, r, o, l.OC);
                check(INPUT, dinp, k.input, r, c, l.C);
                check(WEIGHT, dweight, k.weight, o, c, l.C);
            }
        set_case("times 1, version %d", version);
        Layer l(seed, 40, 40, 136);
        for (size_t i = 0; i < l.inp.size(); i++) l.inp[i] = (floatX)(i % 41 == 0 ? 1.0f : 0.0f);
        const float values[] = {3.3e38f, -1.2e-38f, 1e-39f, -1e-20f, 1e20f};
        for (int i = 0; i < 5; i++) l.weight[i * 1001] = (floatX)values[i];
        const std::vector<floatX> got = compute<floatX>(NO_BIAS, version, l, {}, 16);
        for (int j = 0; j < l.OC; j++)
            for (int i = 0; i < l.C; i++) {
                float ours = (float)got[i * l.OC + j], expected = (float)l.weight[j * l.C + i];
                one.is(ours == expected || (fabsf(expected) < 1.17549435e-38f && ours == 0), "another number");
            }
    }
    printf("special values\n");
    report({&odd, &one});
}

// The first and the last block of each version where A and D have more than 2^31 elements.
void test_far(uint64_t seed) {
    constexpr int C = 8, OC = 8, rows = (1 << 28) + 5;
    constexpr size_t n = (size_t)rows * C;
    Property p("versions 1 to 3 beyond 2^31 elements, first and last block", "every bit of the same rows elsewhere");
    set_case("%d rows of %d", rows, C);
    FarBuffer<floatX> inp(n), out(n);
    if (!inp.p || !out.p) return;
    const Layer l(seed, 5, C, OC);
    Buffer<floatX> weight(l.weight), bias(l.bias);
    for (int version = 1; version <= 3; version++) {
        const int a_block = version == 1 ? 8 : version == 2 ? 32 : 128;
        const std::vector<floatX> expected = compute<floatX>(FORWARD, version, l, {}, 0);
        for (int block : {0, ceil_div(rows, a_block) - 1}) {   // the last has 5 rows
            set_case("%d rows of %d, version %d, block %d", rows, C, version, block);
            const size_t at = (size_t)block * a_block * C;
            inp.write(at, l.inp);
            launch_blocks(block, block,
                          [&] { matmul_simple(version, forward_product(out.p, inp.p, weight.p, bias.p, rows, C, OC), 0); });
            p.is(same_bits(out.read(at, expected.size()), expected), "other bits");
        }
    }
    printf("far\n");
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// tests of the bias gradient

void test_bias(uint64_t seed) {
    Property fp32("bias gradient in fp32", "a rounding for each of the additions that stand in a row"),
        bf16("bias gradient in bf16", "and one of storing"), again("the same bits in a second run"),
        one("version 1: bias gradient", "likewise"), nan("a NaN or an infinity reaches its column's bias, and only that");
    struct Shape { int rows, OC; };
    std::vector<Shape> shapes;
    // columns around those of a lane, of a block that finishes and of one that sums; rows around 8 warps; 1, 2, 16, 64 slices
    for (int OC : {8, 24, 136, 256, 264, 520})
        for (int rows : {1, 7, 8, 65, 129, 1031}) shapes.push_back({rows, OC});
    shapes.push_back({4101, 40});
    for (Shape s : shapes) {
        const auto [rows, OC] = s;
        Random random(seed, 1000000 + OC * 10000 + rows);
        const std::vector<floatX> d = random.normals((size_t)rows * OC, 0.25f);
        std::vector<float> before(OC);
        for (float& x : before) x = (float)(__nv_bfloat16)(10 * random.normal());
        Doubles sum(OC, 0), terms(OC, 0);
        for (size_t i = 0; i < d.size(); i++) sum[i % OC] += (float)d[i], terms[i % OC] += fabs((float)d[i]);
        Buffer<floatX> dout(d);
        for (DType type : {F32, BF16})
            for (bool accumulate : {false, true}) {
                std::vector<float> first;
                for (int version : {2, 3, 1}) {   // 2 and 3 are the trainer's
                    set_case("rows %d, OC %d, %s, %s, version %d", rows, OC, dtype_name(type),
                             accumulate ? "added to" : "written", version);
                    GradBuffer dbias(OC, type);
                    Buffer<float> scratch((size_t)colsum_slices(rows) * OC);   // no more than is used
                    if (accumulate) dbias.write(before);
                    if (version == 1) bias_backward_1(dbias.grad(), dout.p, accumulate, rows, OC, 0);
                    else bias_backward(dbias.grad(), scratch.p, dout.p, accumulate, rows, OC, 0);
                    const std::vector<float> got = dbias.read();
                    if (version == 3) again.is(same_bits(got, first), "other bits");
                    if (version == 2) first = got;
                    const double depth = version == 1 ? rows + 1 : colsum_depth(rows);
                    for (int c = 0; c < OC; c++) {
                        double was = accumulate ? before[c] : 0, error = (terms[c] + fabs(was)) * EPS32 * depth;
                        double storing = type == BF16 ? (fabs(sum[c] + was) + error) * EPS16 : 0;
                        Property& p = version == 1 ? one : type == F32 ? fp32 : bf16;
                        p.within(c, got[c], sum[c] + was, (error + storing) * 1.01);
                    }
                }
            }
        for (float bad : {NAN, INFINITY, -INFINITY}) {
            set_case("rows %d, OC %d, %f", rows, OC, bad);
            const size_t where = random.bits() % d.size();
            std::vector<floatX> broken = d;
            broken[where] = (floatX)bad;
            dout.write(broken);
            GradBuffer dbias(OC, F32);
            Buffer<float> scratch((size_t)colsum_slices(rows) * OC);
            bias_backward(dbias.grad(), scratch.p, dout.p, false, rows, OC, 0);
            const std::vector<float> got = dbias.read();
            for (int c = 0; c < OC; c++) {
                if ((size_t)c == where % OC) nan.equal(c, got[c], bad);
                else nan.is(std::isfinite(got[c]), "a number is none any more");
            }
            dout.write(d);
        }
    }
    printf("bias gradient\n");
    report({&fp32, &bf16, &again, &nan, &one});
}

// Beyond 2^31 elements, and partial sums: the first and the last block of a launch of 64 slices of 65 rows. (The launcher makes
// so many slices of 4096 rows and up.) The first slice has row 0, the last one rows 63 and 64.
void test_bias_far(uint64_t seed) {
    constexpr int OC = (1 << 25) + 72, rows = 65, slices = 64;
    constexpr size_t n = (size_t)rows * OC, partials = (size_t)slices * OC;
    static_assert(n > (size_t)1 << 31 && partials > (size_t)1 << 31, "");
    Property p("bias gradient beyond 2^31 elements, first and last block", "every bit");
    set_case("%d rows of %d", rows, OC);
    FarBuffer<floatX> dout(n);
    FarBuffer<float> partial(2 * partials), out(OC), second(OC);   // twice: colsum_finish adds up to three such arrays
    if (!dout.p || !partial.p || !out.p || !second.p) return;
    const dim3 grid(ceil_div(OC, 32 * VEC), slices);
    for (bool last : {false, true}) {
        const size_t column = last ? (size_t)(grid.x - 1) * 32 * VEC : 0, slice = last ? slices - 1 : 0;
        const int first = last ? 63 : 0, end = last ? 65 : 1, count = last ? OC % (32 * VEC) : 32 * VEC;
        std::vector<float> expected(count, 0);
        Random random(seed, 77 + last);
        for (int r = first; r < end; r++) {
            const std::vector<floatX> d = random.normals(count);
            dout.write((size_t)r * OC + column, d);
            for (int c = 0; c < count; c++) expected[c] += (float)d[c];
        }
        const int64_t block = last ? (int64_t)grid.x * slices - 1 : 0;
        launch_blocks(block, block, [&] {
            colsum_kernel<<<grid, 256>>>(partial.p, dout.p, rows, OC);
            cudaCheck(cudaGetLastError());
        });
        const std::vector<float> sums = partial.read(slice * OC + column, count);
        p.is(same_bits(sums, expected), "a partial sum has other bits");
        // all other slices' sums are 0; 32 columns a block, and the last block has what is left
        const int finish_blocks = ceil_div(OC, 32), ends = last ? OC % 32 : 32;
        const size_t at = last ? (size_t)(finish_blocks - 1) * 32 : 0;
        std::vector<float> twice(ends);
        for (int c = 0; c < ends; c++) twice[c] = 2 * expected[at - column + c];
        partial.write(partials + slice * OC + at, twice);
        for (int i : {0, 1}) {
            const int64_t finish = (int64_t)i * finish_blocks + (last ? finish_blocks - 1 : 0);
            launch_blocks(finish, finish, [&] {
                colsum_finish({{{out.p, F32}, {second.p, F32}}}, 2, partial.p, slices, OC, false, 0);
            });
        }
        const std::vector<float> total = out.read(at, ends), total2 = second.read(at, ends);
        for (int c = 0; c < ends; c++) {
            p.equal(c, total[c], expected[at - column + c]);
            p.equal(c, total2[c], twice[c]);
        }
    }
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

struct BenchLayer {
    Buffer<floatX> inp, weight, bias, out;   // inp and out take the parts of dinp and dout
    GradBuffer dweight, dbias;
    Buffer<float> scratch;
    BenchLayer(int rows, int C, int OC)
        : inp((size_t)rows * C), weight((size_t)OC * C), bias(OC), out((size_t)rows * OC), dweight((size_t)OC * C, FLOATX),
          dbias(OC, F32), scratch((size_t)COLSUM_SLICES * OC) {
        for (Buffer<floatX>* b : {&inp, &weight, &bias, &out}) b->fill();
    }
};
void bench_matmul(const char* model, const char* name, int rows, int C, int OC, bool all_versions) {
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: %s, rows %d, C %d, OC %d", model, name, rows, C, OC);
    BenchTable t(title, (size_t)rows * OC, BenchTable::FLOPS);
    BenchLayer l(t.timed ? rows : 1, t.timed ? C : 8, t.timed ? OC : 8);   // without a GPU nothing runs
    const double flops = 2.0 * C;
    const Product forward = forward_product(l.out.p, l.inp.p, l.weight.p, l.bias.p, rows, C, OC),
                  input = backward_input_product(l.inp.p, l.out.p, l.weight.p, rows, C, OC),
                  weight = backward_weight_product(l.dweight.grad(), l.out.p, l.inp.p, false, rows, C, OC);
    if (all_versions) {
        t.row("forward, version 1: an element a thread", flops, [&] { matmul_1(forward, 0); });
        t.row("forward, version 2: a tile in shared memory", flops, [&] { matmul_2(forward, 0); });
    }
    t.row("forward, version 3: 8 x 8 elements in registers", flops, [&] { matmul_3(forward, 0); });
    t.row("forward, version 4: the trainer's, cuBLASLt", flops,
          [&] { matmul_forward(l.out.p, l.inp.p, l.weight.p, l.bias.p, rows, C, OC, 0); });
    if (all_versions) {
        t.row("backward, input, version 1", flops, [&] { matmul_1(input, 0); });
        t.row("backward, input, version 2", flops, [&] { matmul_2(input, 0); });
    }
    t.row("backward, input, version 3", flops, [&] { matmul_3(input, 0); });
    t.row("backward, input, version 4: the trainer's", flops,
          [&] { matmul_backward_input(l.inp.p, l.out.p, l.weight.p, rows, C, OC, 0); });
    if (all_versions) {
        t.row("backward, weight, version 1", flops, [&] { matmul_1(weight, 0); });
        t.row("backward, weight, version 2", flops, [&] { matmul_2(weight, 0); });
    }
    t.row("backward, weight, version 3", flops, [&] { matmul_3(weight, 0); });
    t.row("backward, weight, version 4: the trainer's", flops,
          [&] { matmul_backward_weight(l.dweight.grad(), l.out.p, l.inp.p, false, rows, C, OC, 0); });
}
void bench_bias(const char* model, int rows, int OC) {
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: bias gradient, rows %d, OC %d", model, rows, OC);
    BenchTable t(title, (size_t)rows * OC);
    BenchLayer l(t.timed ? rows : 1, 8, OC);
    t.row("version 1: a column a thread", sizeof(floatX),
          [&] { bias_backward_1(l.dbias.grad(), l.out.p, false, rows, OC, 0); });
    t.row("version 2: the trainer's, 64 slices of the rows", sizeof(floatX),
          [&] { bias_backward(l.dbias.grad(), l.scratch.p, l.out.p, false, rows, OC, 0); });
}
void bench(const char* model, int rows, int C) {
    constexpr int Vp = 50304;
    const int chunk = loss_auto_rows(rows, Vp, CHUNK_BYTES);   // as the trainer makes logits
    bench_matmul(model, "fc, fewer rows to save time", 2048, C, 4 * C, true);
    bench_matmul(model, "qkv", rows, C, 3 * C, false);
    bench_matmul(model, "attproj", rows, C, C, false);
    bench_matmul(model, "fc", rows, C, 4 * C, false);
    bench_matmul(model, "fcproj", rows, 4 * C, C, false);
    bench_matmul(model, "lm-head, a chunk of rows", chunk, C, Vp, false);
    bench_bias(model, rows, 4 * C);
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "matmul: the matmuls of a linear layer, and the gradient of its bias");
    if (o.bench) {
        MatmulSession cublas;
        bench_device();
        bench("124M, B 64, T 1024", 64 * 1024, 768);
        bench("1558M, B 8, T 1024", 8 * 1024, 1600);
        return 0;
    }
    test_misuse(o, {{"OC of 12", "bias_backward: OC is 12: expected a multiple of 8",
                     [] { bias_backward({}, nullptr, nullptr, false, 1, 12, 0); }}});
    MatmulSession cublas;
    printf("matmul, %s\n", dtype_name(FLOATX));
    test_matmul(o.seed);
    test_special(o.seed);
    test_far(o.seed);
    test_bias(o.seed);
    test_bias_far(o.seed);
    return finish(o);
}
