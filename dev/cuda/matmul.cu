/*
The three matmuls of a linear layer and the gradient of its bias: the trainer's, tested, and simpler ones beside them to learn from.
The trainer leaves matmuls to cuBLASLt; here is what such a library does about memory, as far as plain arithmetic goes.

    make dev/cuda/matmul && ./dev/cuda/matmul [--bench]

With inp (rows, C), weight (OC, C), out and dout (rows, OC): out = inp W^T + bias, dinp = dout W, dW (+)= dout^T inp, dbias (+)= the
sum of dout over its rows. C and OC are multiples of 8, rows can be any number. Sums are in fp32. Weight and bias gradients are fp32
or floatX, written or added to.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---- versions of the matmul
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

// Version 1: one thread per element of D, which walks along a row of A and down a column of B. For the 2 flops of a multiplication
// and an addition it loads 4 bytes in bf16: 0.5 flop per byte. Every element of A is loaded n times and every one of B m times;
// caches take much of that, but they too can deliver only so much. Forward is the worst of the three: neighbouring lanes have
// neighbouring j, W stands there as (OC, C), and a load touches 32 lines to use 2 bytes of each.
// A large GPU adds and multiplies 60e12 times a second in fp32 and reads some 4e12 bytes: it wants 15 flops for each byte, and its
// tensor cores, which make ten times as many or more, want 200 and up. That is what the versions below are about.
__global__ void matmul_1_kernel(Product p) {
    int tiles = (p.n + 31) / 32;   // blocks of 8 x 32 elements of D
    int i = blockIdx.x / tiles * 8 + threadIdx.y, j = blockIdx.x % tiles * 32 + threadIdx.x;
    if (i >= p.m || j >= p.n) return;
    const floatX *a = p.a + i * p.a_i, *b = p.b + j * p.b_j;
    float sum = 0;
    for (int k = 0; k < p.k; k++) sum += (float)a[k * p.a_k] * (float)b[k * p.b_k];
    product_store(p, i, j, sum);
}

// Version 2: a block makes a tile of 32 x 32 elements of D. It brings tiles of 32 x 32 of A and of B into shared memory, each
// thread one element, neighbours reading neighbours whichever way the matrix lies, and uses each element 32 times: 2 * 32^3 flops
// for 2 * 32^2 elements are 16 flops per byte in bf16. (The 33rd column keeps lanes that write one below the other out of the same
// bank.) The next limit is shared memory: it delivers 32 floats per clock to a multiprocessor that could multiply and add 128
// times, and a warp's step wants two such deliveries, one of A (the same for all lanes) and one of B. An eighth of the peak, at
// best.
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

// Version 3: a tile of 128 x 128 per block and 8 x 8 elements of D per thread, in registers. From memory comes a quarter of what
// version 2 reads: 64 flops per byte. From shared memory a thread reads 8 elements of A and 8 of B for 64 multiplications, where it
// read 2 for one: plain arithmetic is the limit now, no longer its supply. 8 steps of k are brought at a time, half of the threads
// for A and half for B, each 8 neighbours with one load of 16 bytes; the next ones are on their way while these are used. A
// thread's rows are two groups of 4, 64 apart, and so are its columns, so that neighbouring threads read neighbouring banks.
//
// Version 4, the trainer's, is cuBLASLt. It goes on in the same manner: tiles of 128 x 256 or so, 85 flops per byte, several steps
// of k ahead, copied to shared memory without passing through registers. And a warp multiplies whole tiles in tensor cores, with
// more than ten times the flops of plain arithmetic, of which nothing here makes use.
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

void matmul_simple(int version, const Product& p) {
    if (version == 1) matmul_1_kernel<<<ceil_div(p.m, 8) * ceil_div(p.n, 32), dim3(32, 8)>>>(p);
    else if (version == 2) matmul_2_kernel<<<ceil_div(p.m, 32) * ceil_div(p.n, 32), dim3(32, 32)>>>(p);
    else matmul_3_kernel<<<ceil_div(p.m, 128) * ceil_div(p.n, 128), 256>>>(p);
}

// The three matmuls of a linear layer, each from the tensors that it takes.
enum Which { FORWARD, NO_BIAS, INPUT, WEIGHT, WEIGHT_ADDED };
const char* const NAMES[] = {"forward", "forward without bias", "backward, input", "backward, weight",
                             "backward, weight, added to"};
struct Operands {
    const floatX *inp, *weight, *bias, *dout;
    Grad out;   // (rows, OC), (rows, C) or (OC, C)
};
constexpr int TRAINERS = 4;   // the version
void run(Which which, int version, const Operands& o, int rows, int C, int OC) {
    const size_t c = C, oc = OC;
    const floatX* bias = which == FORWARD ? o.bias : nullptr;
    const bool add = which == WEIGHT_ADDED;
    if (version < TRAINERS) {
        if (which <= NO_BIAS) matmul_simple(version, {rows, OC, C, o.inp, o.weight, c, 1, 1, c, bias, o.out, false});
        else if (which == INPUT) matmul_simple(version, {rows, C, OC, o.dout, o.weight, oc, 1, c, 1, nullptr, o.out, false});
        else matmul_simple(version, {OC, C, rows, o.dout, o.inp, 1, oc, c, 1, nullptr, o.out, add});
    } else {
        if (which <= NO_BIAS) matmul_forward((floatX*)o.out.p, o.inp, o.weight, bias, rows, C, OC, 0);
        else if (which == INPUT) matmul_backward_input((floatX*)o.out.p, o.dout, o.weight, rows, C, OC, 0);
        else matmul_backward_weight(o.out, o.dout, o.inp, add, rows, C, OC, 0);
    }
}

// ---- versions of the bias gradient

// Version 1, bias_backward_1 of common.cuh: one thread per column. The 32 lanes of a warp read 64 bytes, half a line, and 3072
// columns are 96 warps on a GPU that can hold 8000 and needs thousands of loads on their way to keep its memory busy. And 65536
// additions stand in a row. 2 bytes per element, as few as can be, but slowly.
//
// Version 2, the trainer's bias_backward: 8 columns per lane, so a warp reads 512 bytes; up to 64 slices of the rows, so that there
// are 64 times as many blocks, of 8 warps that take every eighth row of the slice; and a second, small kernel that adds the slices
// in their order. The same 2 bytes, near the speed of memory. Atomics would save the second kernel, and with it the order: the sums
// would differ from run to run. (Where a kernel of the trainer has the tensor in its hands anyway, it makes these sums on its way:
// see gelu.cu and layernorm.cu.)

// ---- tests of the matmul

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

std::vector<float> compute(Which which, int version, const Layer& l, DType type, const std::vector<float>& before = {}) {
    Buffer<floatX> inp(l.inp), weight(l.weight), bias(l.bias), dout(l.dout);
    GradBuffer out((size_t)(which >= WEIGHT ? l.OC : l.rows) * (which <= NO_BIAS ? l.OC : l.C), type);
    if (which == WEIGHT_ADDED) out.write(before);
    run(which, version, {inp.p, weight.p, bias.p, dout.p, out.grad()}, l.rows, l.C, l.OC);
    return out.read();
}

// Where bf16 is added to, cuBLASLt's kernels for Hopper round the product before they add it, unless they split the sum: with 768 x 1024
// x 3072 every bit is that of two roundings (H200, cuBLASLt 13.0). So a GPU is granted the second one.
double product_rounding(bool accumulate, DType type, double product) {
    return accumulate && type == BF16 && !on_cpu_backend() ? EPS16 * fabs(product) : 0;
}

// Against double precision, every version. The trainer's with tensors that lie 16 bytes beside the alignment of cudaMalloc, too.
void test_type(Which which, const Layer& l, DType type, Property (&versions)[5], Property& again) {
    const bool forward = which <= NO_BIAS, weight = which >= WEIGHT;
    const int m = weight ? l.OC : l.rows, n = forward ? l.OC : l.C, K = forward ? l.C : weight ? l.rows : l.OC;
    const Doubles a = doubles(forward ? l.inp : l.dout), b = doubles(weight ? l.inp : l.weight);
    const std::vector<float> before = Random(7, l.rows).grads((size_t)m * n);
    Doubles out, terms, products;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const double first = which == FORWARD ? (float)l.bias[j] : which == WEIGHT_ADDED ? before[i * n + j] : 0;
            double sum = first, size = fabs(first);
            for (int k = 0; k < K; k++) {
                double x = (weight ? a[k * m + i] : a[i * K + k]) * (forward ? b[j * K + k] : b[k * n + j]);
                sum += x, size += fabs(x);
            }
            out.push_back(sum), terms.push_back(size), products.push_back(sum - first);
        }
    const size_t usual = guard_bytes;
    for (int version : {1, 2, 3, TRAINERS, TRAINERS}) {
        set_case("%s, rows %d, C %d, OC %d, %s, version %d", NAMES[which], l.rows, l.C, l.OC, dtype_name(type), version);
        const std::vector<float> got = compute(which, version, l, type, before);
        for (size_t i = 0; i < got.size(); i++)
            versions[version].within(i, got[i], out[i], tolerance(out[i], terms[i], store_of(type)) +
                                     (version == TRAINERS ? product_rounding(which == WEIGHT_ADDED, type, products[i]) : 0));
        if (version == TRAINERS) again.is(same_bits(got, compute(which, version, l, type, before)), "other bits");
        if (version == TRAINERS && usual > 0) guard_bytes = 16;
    }
    guard_bytes = usual;
}

void test_matmul(uint64_t seed) {
    Property versions[5] = {"", "version 1", "version 2", "version 3", "the trainer's"},
             again("the trainer's: the same bits in a second run");
    struct Shape { int C, OC; };
    for (int rows : {1, 7, 33, 130})
        for (Shape s : {Shape{8, 8}, Shape{24, 40}, Shape{136, 8}, Shape{8, 264}, Shape{72, 136}, Shape{264, 32}}) {
            const Layer l(seed, rows, s.C, s.OC);
            for (Which which : {FORWARD, NO_BIAS, INPUT, WEIGHT, WEIGHT_ADDED}) {
                test_type(which, l, FLOATX, versions, again);
                if (!kFP32 && which >= WEIGHT) test_type(which, l, F32, versions, again);
            }
        }
    report({&versions[TRAINERS], &versions[3], &versions[2], &versions[1], &again});
}

// Some columns of wider tensors, times a factor, as adapters need them: of t the columns of one target, of out its rows of the weight.
void test_columns(uint64_t seed) {
    Property value("columns of wider tensors, times a factor"), beside("the columns beside them keep their bits, and are not read");
    int number = 0;
    struct Shape { int rows, m, columns; };
    for (auto [rows, m, columns] : {Shape{1, 8, 8}, {7, 24, 8}, {33, 8, 136}, {130, 72, 40}})
        for (int way = 0; way < 3; way++)       // t B^T, dout B, and dout^T t; these are (transposed A, transposed B)
            for (long gap : {0, 8, 40})         // columns beside
                for (DType type : {FLOATX, F32})
                    for (bool accumulate : {false, true}) {
                        const bool trans_a = way == 0, trans_b = way == 2;
                        const int n = trans_b ? columns : rows, k = trans_b ? rows : columns;
                        const float alpha = number++ % 3 == 0 ? 1 : number % 3 == 1 ? 0.375f : -2.5f;
                        set_case("n %d, m %d, k %d, way %d, %ld columns beside, %s, alpha %g", n, m, k, way, gap, dtype_name(type), alpha);
                        Random random(seed, 90000 + number);
                        auto wide = [&](int rows, int columns) {   // with NaN beside
                            std::vector<floatX> v((size_t)rows * (columns + gap), (floatX)NAN);
                            for (size_t i = 0; i < v.size(); i++)
                                if ((int)(i % (columns + gap)) < columns) v[i] = (floatX)random.normal();
                            return v;
                        };
                        const int a_columns = trans_a ? k : m, b_columns = trans_b ? n : k;
                        const std::vector<floatX> a = wide(trans_a ? m : k, a_columns), b = wide(trans_b ? k : n, b_columns);
                        const std::vector<float> before = random.grads((size_t)n * (m + gap));
                        Buffer<floatX> A(a), B(b);
                        GradBuffer D(before.size(), type);
                        D.write(before);
                        const MatmulShape shape = {m, n, k, trans_a, trans_b, gap ? a_columns + gap : 0, gap ? b_columns + gap : 0,
                                                   gap ? m + gap : 0};
                        matmul(D.grad().p, type, A.p, B.p, shape, accumulate, 0, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, alpha);
                        const std::vector<float> d = D.read();
                        for (int i = 0; i < n; i++)
                            for (int j = 0; j < m + gap; j++) {
                                const size_t at = i * (m + gap) + j;
                                double sum = 0, terms = 0;
                                for (int l = 0; j < m && l < k; l++) {
                                    const double x = (double)alpha * (float)a[(trans_a ? j : l) * (a_columns + gap) + (trans_a ? l : j)] *
                                                     (float)b[(trans_b ? l : i) * (b_columns + gap) + (trans_b ? i : l)];
                                    sum += x, terms += fabs(x);
                                }
                                const double was = accumulate ? before[at] : 0;
                                if (j >= m) beside.equal(at, d[at], before[at]);
                                else value.within(at, d[at], sum + was, tolerance(sum + was, terms + fabs(was), store_of(type)) +
                                                  product_rounding(accumulate, type, sum));
                            }
                    }
    report({&value, &beside});
}

void test_special(uint64_t seed) {
    Property p("a NaN or an infinity reaches its row or its column, and only that");
    const Layer clean(seed, 37, 40, 136);
    const int r = 35, c = 9, o = 131;
    enum { NOTHING, ROW, COLUMN };
    struct Case { const char* name; std::vector<floatX> Layer::*in; int at, forward, input, weight; };
    for (int version = 1; version <= TRAINERS; version++)
        for (float odd : {NAN, -INFINITY})
            for (const Case& k : {Case{"inp", &Layer::inp, r * 40 + c, ROW, NOTHING, COLUMN},
                                  {"weight", &Layer::weight, o * 40 + c, COLUMN, COLUMN, NOTHING},
                                  {"bias", &Layer::bias, o, COLUMN, NOTHING, NOTHING},
                                  {"dout", &Layer::dout, r * 136 + o, NOTHING, ROW, ROW}}) {
                set_case("%f in %s, version %d", odd, k.name, version);
                Layer l = clean;
                (l.*k.in)[k.at] = (floatX)odd;
                auto check = [&](Which which, int where, int row, int column, int columns) {
                    auto reach = [&](size_t i) {
                        return where == ROW ? (int)i / columns == row : where == COLUMN && (int)i % columns == column;
                    };
                    check_reach(p, compute(which, version, l, FLOATX), compute(which, version, clean, FLOATX), reach, NAMES[which]);
                };
                check(FORWARD, k.forward, r, o, l.OC);
                check(INPUT, k.input, r, c, l.C);
                check(WEIGHT, k.weight, o, c, l.C);
            }
    report({&p});
}

// ---- tests of the bias gradient

void test_bias(uint64_t seed) {
    Property trainers("bias gradient"), again("the same bits in a second run"), one("version 1: bias gradient"),
        nan("a NaN or an infinity reaches its column's bias, and only that");
    // columns around those of a lane, of a block that finishes and of one that sums; rows around 8 warps; 1, 2, 16, 64 slices
    for (int OC : {8, 24, 40, 136, 256, 264, 520})
        for (int rows : {1, 7, 8, 65, 129, 1031, 4101}) {
            if (rows == 4101 && OC != 40) continue;
            Random random(seed, 1000000 + OC * 10000 + rows);
            const std::vector<floatX> d = random.normals((size_t)rows * OC, 0.25f);
            const std::vector<float> before = random.grads(OC);
            Doubles sum(OC), terms(OC);
            for (size_t i = 0; i < d.size(); i++) sum[i % OC] += (float)d[i], terms[i % OC] += fabs((float)d[i]);
            Buffer<floatX> dout(d);
            Buffer<float> scratch((size_t)colsum_slices(rows) * OC);   // no more than is used
            std::vector<float> first;
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true})
                    for (int version : {2, 3, 1}) {   // 2 and 3 are the trainer's
                        set_case("rows %d, OC %d, %s, %s, version %d", rows, OC, dtype_name(type),
                                 accumulate ? "added to" : "written", version);
                        GradBuffer dbias(OC, type);
                        if (accumulate) dbias.write(before);
                        if (version == 1) bias_backward_1(dbias.grad(), dout.p, accumulate, rows, OC);
                        else bias_backward(dbias.grad(), scratch.p, dout.p, accumulate, rows, OC, 0);
                        const std::vector<float> got = dbias.read();
                        if (version == 3) again.is(same_bits(got, first), "other bits");
                        first = got;
                        for (int c = 0; c < OC; c++) {
                            const double was = accumulate ? before[c] : 0;
                            (version == 1 ? one : trainers).close(c, got[c], sum[c] + was, terms[c] + fabs(was), store_of(type));
                        }
                    }
            auto run = [&](const std::vector<floatX>& d) {
                GradBuffer dbias(OC, F32);
                dout.write(d);
                bias_backward(dbias.grad(), scratch.p, dout.p, false, rows, OC, 0);
                return dbias.read();
            };
            const std::vector<float> clean = run(d);
            for (float bad : {NAN, INFINITY}) {
                set_case("rows %d, OC %d, %f", rows, OC, bad);
                const size_t at = random.bits() % d.size();
                std::vector<floatX> broken = d;
                broken[at] = (floatX)bad;
                check_reach(nan, run(broken), clean, [&](size_t c) { return c == at % OC; }, "dbias");
            }
        }
    report({&trainers, &again, &nan, &one});
}

// A few rows so long that there are more than 2^31 elements, their first and last columns; then so many slices of the rows that
// there are more than 2^31 partial sums, and two such arrays.
void test_bias_far(uint64_t seed) {
    Property p("bias gradient beyond 2^31 elements, and partial sums", "every bit");
    Random random(seed, 77);
    auto columns = [&](int rows, size_t OC, size_t seen, size_t at, const std::vector<int64_t>& blocks) {
        set_case("rows %d, OC %zu, columns from %zu", rows, OC, at);
        const int slices = colsum_slices(rows);
        Far<floatX> d(rows * OC, random.normals(rows * seen), seen, OC);
        Far<float> scratch(slices * OC, slices * seen, seen, OC), dbias(OC, seen, seen, 0);
        d.at = scratch.at = dbias.at = at;
        check_far(p, {&d, &scratch, &dbias}, blocks, [&](bool far) {
            bias_backward({dbias.p(far), F32}, scratch.p(far), d.p(far), false, rows, far ? OC : seen, 0);
        });
    };
    const int64_t OC = (1 << 30) + 64, wide = (1 << 25) + 8, finish = ceil_div(OC, 32);
    columns(5, OC, 32, 0, {0});
    columns(5, OC, 64, OC - 64, {ceil_div(OC, 32 * VEC) - 1, finish - 2, finish - 1});
    std::vector<int64_t> blocks;   // the first of every slice, and at the end number 0, which both kernels have
    for (int s = 63; s >= 0; s--) blocks.push_back(s * ceil_div(wide, 32 * VEC));
    columns(4096, wide, 32, 0, blocks);

    set_case("two arrays of 64 x %d partial sums", (int)wide);
    Far<float> partial(2 * 64 * wide, floats(random.normals(2 * 64 * 8)), 8, wide, 2, 64 * wide), one(wide, 8, 8, 0),
        two(wide, 8, 8, 0);
    partial.at = one.at = two.at = wide - 8;
    const int64_t last = ceil_div(wide, 32) - 1;
    check_far(p, {&partial, &one, &two}, {last, 2 * last + 1}, [&](bool far) {
        colsum_finish({{{one.p(far), F32}, {two.p(far), F32}}}, 2, partial.p(far), 64, far ? wide : 8, false, 0);
    });
    report({&p});
}

// ---- benchmark

void bench_matmul(const char* model, const char* name, int rows, int C, int OC, bool all_versions) {
    BenchTable t((size_t)rows * OC, BenchTable::FLOPS, "%s: %s, rows %d, C %d, OC %d", model, name, rows, C, OC);
    const size_t r = t.here(rows, 1), c = t.here(C, 8), oc = t.here(OC, 8);
    Buffer<floatX> inp(r * c), weight(oc * c), bias(oc), out(r * oc), dweight(oc * c);   // inp, out: dinp, dout too
    for (Buffer<floatX>* b : {&inp, &weight, &bias, &out}) b->fill();
    const char* names[] = {"version 1: one element per thread", "version 2: a tile in shared memory",
                           "version 3: 8 x 8 elements in registers", "version 4: the trainer's, cuBLASLt"};
    for (Which which : {FORWARD, INPUT, WEIGHT})
        for (int v = all_versions ? 1 : 3; v <= TRAINERS; v++)
            t.row(std::string(NAMES[which]) + ", " + names[v - 1], 2.0 * C, [&] {
                const floatX* to = which == FORWARD ? out.p : which == INPUT ? inp.p : dweight.p;
                run(which, v, {inp.p, weight.p, bias.p, out.p, {(void*)to, FLOATX}}, rows, C, OC);
            });
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

    const int OC = 4 * C;
    BenchTable t((size_t)rows * OC, BenchTable::BYTES, "%s: bias gradient, rows %d, OC %d", model, rows, OC);
    Buffer<floatX> dout(t.here(t.n, OC));
    dout.fill();
    GradBuffer dbias(OC, F32);
    Buffer<float> scratch((size_t)COLSUM_SLICES * OC);
    t.row("version 1: one thread per column", sizeof(floatX), [&] { bias_backward_1(dbias.grad(), dout.p, false, rows, OC); });
    t.row("version 2: the trainer's, 64 slices of the rows", sizeof(floatX),
          [&] { bias_backward(dbias.grad(), scratch.p, dout.p, false, rows, OC, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "matmul: the matmuls of a linear layer, and the gradient of its bias");
    if (o.bench) {
        MatmulSession cublas;
        return bench_models(bench);
    }
    test_misuse(o, {refuses_12("bias_backward: OC", [] { bias_backward({}, nullptr, nullptr, false, 1, 12, 0); })});
    MatmulSession cublas;
    printf("matmul, %s\n", dtype_name(FLOATX));
    test_matmul(o.seed);
    test_columns(o.seed);
    test_special(o.seed);
    test_bias(o.seed);
    test_bias_far(o.seed);
    return finish(o);
}
