/*
The embedding, forward and backward: the trainer's kernels, tested, and simpler ones beside them to learn from. Section 3 of
train_gpt2.cu has them under "embedding"; the host sorts a micro-batch's positions by token in tokens_upload, section 7.

    make dev/cuda/embedding && ./dev/cuda/embedding [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/embedding.cu -lcublasLt -o embedding

Forward: out[b,t,:] = wte[token[b,t],:] + wpe[t,:]. Backward: dwte[v,:] += the sum of dout[b,t,:] over all positions whose token
is v, dwpe[t,:] (+)= the sum of dout[b,t,:] over b. wte is the lm-head's weight, too, which has its gradient there already, so
dwte is always added to; dwpe is written by the first micro-batch and added to by the others. A thread of the trainer's kernels
owns 8 neighbouring channels, so C has to be a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the forward pass

// Version 1: a step a kernel, an element a thread. The first copies rows of wte, the second adds wpe to them: out is written,
// read and written again, 6 bytes an element in bf16 where 2 have to be. What is read besides is little: the rows of tokens
// that occur twice come from the cache the second time (a quarter of the 65536 positions of a text have a token that none
// before them had: half a byte), and so does wpe after the first of B texts (2/64 of a byte). 6.5 bytes, 2.5 of them needed.
__global__ void gather_1_kernel(floatX* out, const int* tokens, const floatX* wte, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = wte[(size_t)tokens[i / C] * C + i % C];
}
__global__ void add_1_kernel(floatX* out, const floatX* wpe, size_t n, size_t TC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (floatX)((float)out[i] + (float)wpe[i % TC]);
}
void embedding_forward_1(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int B, int T, int C,
                         cudaStream_t stream) {
    size_t n = (size_t)B * T * C;
    gather_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, tokens, wte, n, C);
    add_1_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, wpe, n, (size_t)T * C);
    cudaCheck(cudaGetLastError());
}

// Version 2: one kernel, still an element a thread: 2.5 bytes, all that there is to move. What it wastes is instructions. A
// thread finds its place by divisions of 64-bit numbers, which the hardware does not have: each is some dozens of instructions,
// to move 2 bytes. And a position's token is fetched C times, once for each element of its row.
// Version 3, the trainer's embedding_forward, gives a thread 8 elements: one search for the place, one token, and loads and
// stores of 16 bytes.
__global__ void embedding_forward_2_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, size_t n,
                                           int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t bt = i / C, c = i % C;
    out[i] = (floatX)((float)wte[(size_t)tokens[bt] * C + c] + (float)wpe[bt % T * C + c]);
}
void embedding_forward_2(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int B, int T, int C,
                         cudaStream_t stream) {
    size_t n = (size_t)B * T * C;
    embedding_forward_2_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, tokens, wte, wpe, n, T, C);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// versions of the backward pass

// Backward is forward with its arrows turned around: rows are not fetched but thrown, and several may be thrown at one place.
// An element a thread, as in forward, would have to add with atomics, in the order of arrival: float addition is not
// associative, so no two runs would have the same bits.
//
// Version 1 needs no atomics, because a channel has one thread. It walks down all positions and adds what it finds to both
// gradients. In bytes that is less than all that follows: dout is read once, and a row of dwte or dwpe that comes back soon
// comes from the cache. But each step is a load, an addition and a store that the next step may have to wait for, half a
// microsecond or so, and there are 65536 steps: tens of milliseconds, where the bytes take less than one. C = 768 threads are
// 24 warps, where a large GPU holds 8000 to hide such waiting. And each addition rounds to the gradient's type. In
// bf16, with 8 bits, a sum of equal terms stops growing at 256 of them; "the" occurs thousands of times.
__global__ void embedding_backward_1_kernel(Grad dwte, Grad dwpe, const floatX* dout, const int* tokens, bool accumulate, int B,
                                            int T, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            size_t bt = (size_t)b * T + t;
            float d = (float)dout[bt * C + c];
            grad_store(dwte, (size_t)tokens[bt] * C + c, d, true);
            grad_store(dwpe, (size_t)t * C + c, d, accumulate || b > 0);
        }
}
void embedding_backward_1(Grad dwte, Grad dwpe, const floatX* dout, const int* tokens, bool accumulate, int B, int T, int C,
                          cudaStream_t stream) {
    embedding_backward_1_kernel<<<ceil_div(C, 32), 32, 0, stream>>>(dwte, dwpe, dout, tokens, accumulate, B, T, C);
    cudaCheck(cudaGetLastError());
}

// Version 2 asks not where a position's row goes, but where a token's rows come from. If somebody has sorted the positions by
// token (the host has, while the GPU was busy with the micro-batch before), then a token's positions stand side by side, a warp
// can add them up in registers, in fp32, and each row of dwte is read and written once, whatever its token's number. The rows
// of dwpe need no sorting: row t is the sum of the rows t of B texts. Two kernels read dout, each in its own order: 2 bytes
// more than version 1, for 16,000 warps instead of 24.
// What it wastes: few tokens make up much of a text. A warp that has one of 4000 positions goes down them for each 32 of its
// channels again, 24 times: 100,000 loads of 64 bytes, almost one after the other, while all the others have long been done.
// Version 3, the trainer's, takes 8 warps for 256 channels of a token, and 16 bytes a lane. Each warp goes down every eighth
// position, and thread by thread their 8 sums are added in a fixed order: 500 loads one after the other instead of 100,000.
// dwpe gets 16 bytes a thread, as in forward.
__global__ void embedding_backward_2_wte_kernel(Grad dwte, const floatX* dout, const int* positions, const int* bucket_token,
                                                const int* bucket_start, int C) {
    size_t row = (size_t)bucket_token[blockIdx.x] * C;
    int first = bucket_start[blockIdx.x], end = bucket_start[blockIdx.x + 1];
    for (int c = threadIdx.x; c < C; c += 32) {
        float sum = 0;
        for (int i = first; i < end; i++) sum += (float)dout[(size_t)positions[i] * C + c];
        grad_store(dwte, row + c, sum, true);
    }
}
__global__ void embedding_backward_2_wpe_kernel(Grad dwpe, const floatX* dout, int B, size_t TC, bool accumulate) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= TC) return;
    float sum = 0;
    for (int b = 0; b < B; b++) sum += (float)dout[b * TC + i];
    grad_store(dwpe, i, sum, accumulate);
}
void embedding_backward_2(Grad dwte, Grad dwpe, const floatX* dout, const int* positions, const int* bucket_token,
                          const int* bucket_start, int buckets, bool accumulate, int B, int T, int C, cudaStream_t stream) {
    size_t TC = (size_t)T * C;
    embedding_backward_2_wte_kernel<<<buckets, 32, 0, stream>>>(dwte, dout, positions, bucket_token, bucket_start, C);
    embedding_backward_2_wpe_kernel<<<ceil_div(TC, 256), 256, 0, stream>>>(dwpe, dout, B, TC, accumulate);
    cudaCheck(cudaGetLastError());
}

// What n roundings, one behind the other, can make of a sum, relative to the sum of the absolute values of its terms. A result
// of a few bits is rounded so often here that (1 + e)^n is not 1 + n e any more.
double compound(double n, double e) { return expm1(n * log1p(e)); }

// How many additions stand one behind the other where a token occurs k times, counting neither the first to an empty sum (it is
// exact) nor the last, to the gradient that was there.
double token_depth(int version, int k) { return version == 2 ? k - 1 : ceil_div(k, 8) - 1 + std::min(k, 8) - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// tests

// A micro-batch on the device, as the trainer has it: inputs, targets (nobody wants them here), then what tokens_upload sorts.
struct Batch {
    int B, T, V, buckets;
    std::vector<int> tokens;
    Buffer<int> device;
    const int *positions, *bucket_token, *bucket_start;   // on the device
    Batch(const std::vector<int>& tokens, int B, int T, int V)
        : B(B), T(T), V(V), tokens(tokens), device(token_ints((size_t)B * T, V)) {
        const int BT = B * T;
        std::vector<int> host = tokens;
        host.resize(device.n);
        buckets = tokens_upload(device.p, host.data(), BT, V, 0);
        positions = device.p + 2 * BT;
        bucket_token = positions + BT;
        bucket_start = bucket_token + token_cap(BT, V);
    }
    std::vector<int> counts() const {
        std::vector<int> count(V, 0);
        for (int token : tokens) count[token]++;
        return count;
    }
    void backward(int version, Grad dwte, Grad dwpe, const floatX* dout, bool accumulate, int C) const {   // 3: the trainer's
        if (version == 1) embedding_backward_1(dwte, dwpe, dout, device.p, accumulate, B, T, C, 0);
        else
            (version == 2 ? embedding_backward_2 : embedding_backward)(dwte, dwpe, dout, positions, bucket_token, bucket_start,
                                                                       buckets, accumulate, B, T, C, 0);
    }
};

enum Text { EVEN, SKEWED, REPEATED, DISTINCT, TEXTS };   // SKEWED: the k-th token has a share of 1/k, as in a language
const char* const TEXT_NAMES[] = {"any tokens", "skewed tokens", "one token", "distinct tokens"};
std::vector<int> text(Text kind, size_t n, int V, Random& random) {
    std::vector<int> tokens(n);
    for (size_t i = 0; i < n; i++)
        tokens[i] = kind == SKEWED     ? std::min(V, (int)pow(V + 1, random.uniform())) - 1
                    : kind == REPEATED ? V - 1
                    : kind == DISTINCT ? V - 1 - (int)i
                                       : (int)(random.bits() % V);
    tokens[random.bits() % n] = V - 1;   // the last row, whose neighbour is the end of the tensor
    return tokens;
}

// Numbers that addition could get wrong.
floatX odd_number(Random& random) {
    const float odd[] = {0.0f,  -0.0f,  1e-40f,          -1e-40f,          1.175494351e-38f, 1.0f,     -1.0f,
                         1e30f, -1e30f, 3.38953139e+38f, -3.38953139e+38f, INFINITY,         -INFINITY, NAN};
    return (floatX)odd[random.bits() % (sizeof odd / sizeof odd[0])];
}

// Each of the two elements has 8 bits (24 in fp32) and their sum is rounded twice, to fp32 and to bf16, as the reference does:
// all versions have to make the same bits. Rows of wte whose token does not occur are NaN, and so is a row of wpe behind the
// last position. Channels and texts are around what a thread, a warp's load and a block take: 8, 256, 2048 elements.
void test_forward(uint64_t seed) {
    Property value("forward: wte + wpe", "every bit"), again("forward: the same bits in a second run"),
        two("forward, version 2", "every bit"), one("forward, version 1", "every bit");
    struct Shape { int B, T, V, C; };
    for (auto [B, T, V, C] :
         {Shape{1, 1, 1, 8}, {1, 7, 3, 8}, {3, 5, 50, 24}, {3, 85, 100, 8}, {2, 128, 100, 8}, {1, 257, 300, 8}, {2, 31, 7, 136},
          {4, 2, 11, 256}, {3, 33, 64, 264}, {1, 3, 2, 1000}, {5, 1, 3, 4104}})
        for (Text kind : {EVEN, SKEWED, REPEATED}) {
            set_case("B %d, T %d, V %d, C %d, %s", B, T, V, C, TEXT_NAMES[kind]);
            const size_t n = (size_t)B * T * C;
            Random random(seed, n * 10 + kind);
            std::vector<int> ids = text(kind, B * T, V, random);
            std::vector<floatX> wte((size_t)V * C, (floatX)NAN), wpe = random.normals((size_t)(T + B % 2) * C);
            for (int token : ids)
                for (int c = 0; c < C; c++) wte[(size_t)token * C + c] = (floatX)random.normal();
            for (size_t i = 0; i < n / 8; i++) {
                size_t row = ids[random.bits() % ids.size()], c = random.bits() % C;
                wte[row * C + c] = odd_number(random);
            }
            for (size_t i = 0; i < (size_t)T * C; i += 11) wpe[i] = odd_number(random);
            std::fill(wpe.begin() + (size_t)T * C, wpe.end(), (floatX)NAN);
            Buffer<int> tokens(ids);
            Buffer<floatX> te(wte), pe(wpe), out(n), out2(n), out1(n), out0(n);
            embedding_forward(out.p, tokens.p, te.p, pe.p, B, T, C, 0);
            embedding_forward(out0.p, tokens.p, te.p, pe.p, B, T, C, 0);
            embedding_forward_2(out2.p, tokens.p, te.p, pe.p, B, T, C, 0);
            embedding_forward_1(out1.p, tokens.p, te.p, pe.p, B, T, C, 0);
            std::vector<floatX> got = out.read(), got2 = out2.read(), got1 = out1.read();
            again.is(same_bits(got, out0.read()), "other bits");
            for (size_t i = 0; i < n; i++) {
                size_t bt = i / C, c = i % C;
                float expected = (float)(floatX)((float)wte[(size_t)ids[bt] * C + c] + (float)wpe[bt % T * C + c]);
                value.equal(i, (float)got[i], expected);
                two.equal(i, (float)got2[i], expected);
                one.equal(i, (float)got1[i], expected);
            }
        }
    // Every number that bf16 has; in fp32, one for each.
    set_case("every bf16");
    const int T = 64, C = 1024;
    Random random(seed, 1);
    std::vector<floatX> wte(T * C), wpe(T * C);
    std::vector<int> ids(T);
    for (int i = 0; i < T * C; i++) {
        uint32_t bits = (uint32_t)i << 16 | (kFP32 ? (uint32_t)random.bits() & 0xffff : 0);
        float x;
        memcpy(&x, &bits, 4);
        wte[i] = (floatX)x;
        wpe[i] = random.bits() % 2 ? odd_number(random) : (floatX)(std::isfinite(x) ? x * random.normal() : 1.0f);
    }
    for (int t = 0; t < T; t++) ids[t] = t;
    Buffer<int> tokens(ids);
    Buffer<floatX> te(wte), pe(wpe), out(T * C);
    embedding_forward(out.p, tokens.p, te.p, pe.p, 1, T, C, 0);
    std::vector<floatX> got = out.read();
    for (int i = 0; i < T * C; i++) value.equal(i, (float)got[i], (float)(floatX)((float)wte[i] + (float)wpe[i]));
    printf("forward\n");
    report({&value, &again, &two, &one});
}

// What tokens_upload makes of a micro-batch: buckets in the order of tokens, and in each all positions of its token, in their
// order. Nothing is copied behind the last bucket's end.
void test_buckets(uint64_t seed) {
    Property p("buckets: each position once, sorted by token, ascending within one");
    struct Shape { int B, T, V; };
    for (auto [B, T, V] : {Shape{1, 1, 1}, {1, 1, 5}, {2, 3, 1}, {3, 7, 4}, {2, 8, 16}, {1, 17, 16}, {4, 50, 300}, {5, 41, 40}})
        for (int kind = 0; kind < TEXTS; kind++) {
            if (kind == DISTINCT && V < B * T) continue;
            set_case("B %d, T %d, V %d, %s", B, T, V, TEXT_NAMES[kind]);
            Random random(seed, kind);
            Batch batch(text((Text)kind, B * T, V, random), B, T, V);
            std::vector<int> all = batch.device.read(), count = batch.counts();
            const int BT = B * T, *positions = &all[2 * BT], *token = positions + BT, *start = token + token_cap(BT, V);
            int bucket = 0, begin = 0;
            for (int v = 0; v < V; v++) {
                if (count[v] == 0) continue;
                p.is(token[bucket] == v && start[bucket] == begin, "a bucket is missing, or begins elsewhere");
                for (int i = begin; i < begin + count[v]; i++) {
                    p.is(batch.tokens[positions[i]] == v, "a position is in the wrong bucket");
                    if (i > begin) p.is(positions[i] > positions[i - 1], "positions do not ascend");
                }
                begin += count[v];
                bucket++;
            }
            p.is(bucket == batch.buckets && start[bucket] == BT, "the last bucket does not end with the last position");
            for (const int* i = start + bucket + 1; i < &all[0] + all.size(); i++)
                p.is(*i == -1, "something was copied behind the last bucket's end");
        }
    printf("tokens_upload\n");
    report({&p});
}

std::vector<float> random_gradient(Random& random, size_t n, DType type) {
    std::vector<float> v(n);
    for (float& x : v) x = type == F32 ? 3 * random.normal() : (float)(__nv_bfloat16)(3 * random.normal());
    return v;
}

// Channels around a lane's 8, a block's 256, and more than two blocks; a token's occurrences on both sides of 8 and 16, and of
// several hundred; positions times channels around wpe's 2048 a block. dwpe has a row more than there are positions.
void test_backward(uint64_t seed) {
    Property wte32("dwte in fp32", "a rounding for each addition in a row, and one for what was there"),
        wte16("dwte in bf16", "and one of storing"), wpe32("dwpe in fp32", "a rounding for each text"),
        wpe16("dwpe in bf16", "and one of storing"),
        untouched("rows whose token does not occur, or behind the last position, keep every bit"),
        again("the same bits in a second run"),
        two("version 2: dwte and dwpe", "a rounding for each occurrence or text, one of storing"),
        one("version 1: dwte and dwpe", "a rounding to the gradient's type for each occurrence or text");
    struct Shape { int B, T, V, C; };
    for (auto [B, T, V, C] :
         {Shape{1, 1, 1, 8}, {1, 9, 3, 24}, {3, 5, 20, 8}, {2, 8, 5, 136}, {4, 33, 9, 264}, {3, 43, 150, 248},
          {1, 130, 140, 256}, {2, 4, 3, 520}, {1, 8, 8, 256}, {2, 255, 30, 8}, {3, 256, 2, 8}, {2, 257, 300, 8},
          {17, 2, 3, 16}})
        for (int kind = 0; kind < TEXTS; kind++) {
            if (kind == DISTINCT && V < B * T) continue;
            const size_t n = (size_t)B * T * C, te = (size_t)V * C, pe = (size_t)(T + 1) * C;
            Random random(seed, n * 10 + kind);
            const Batch batch(text((Text)kind, B * T, V, random), B, T, V);
            const std::vector<int> count = batch.counts();
            const std::vector<floatX> d = random.normals(n);
            Buffer<floatX> dout(d);
            Doubles sum_te(te, 0), terms_te(te, 0), sum_pe(pe, 0), terms_pe(pe, 0);
            for (size_t i = 0; i < n; i++) {
                size_t bt = i / C, c = i % C, at_te = (size_t)batch.tokens[bt] * C + c, at_pe = bt % T * C + c;
                sum_te[at_te] += (float)d[i], terms_te[at_te] += fabs((float)d[i]);
                sum_pe[at_pe] += (float)d[i], terms_pe[at_pe] += fabs((float)d[i]);
            }
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    const double e = type == F32 ? EPS32 : EPS16;
                    std::vector<float> before_te = random_gradient(random, te, type);
                    std::vector<float> before_pe = random_gradient(random, pe, type);
                    for (int v = 0; v < V; v++)   // zeros whose sign adding 0 to them would change
                        if (count[v] == 0) before_te[(size_t)v * C] = -0.0f, before_te[(size_t)v * C + C - 1] = NAN;
                    if (!accumulate) std::fill(before_pe.begin(), before_pe.end(), NAN);
                    GradBuffer dwte(te, type), dwpe(pe, type);
                    std::vector<float> first_te, first_pe;
                    for (int version : {3, 0, 2, 1}) {   // 3 and 0 are the trainer's
                        set_case("B %d, T %d, V %d, C %d, %s, %s gradients, dwpe %s, version %d", B, T, V, C, TEXT_NAMES[kind],
                                 dtype_name(type), accumulate ? "added to" : "written", version);
                        dwte.write(before_te);
                        dwpe.write(before_pe);
                        batch.backward(version, dwte.grad(), dwpe.grad(), dout.p, accumulate, C);
                        std::vector<float> got_te = dwte.read(), got_pe = dwpe.read();
                        if (version == 0) {
                            again.is(same_bits(got_te, first_te) && same_bits(got_pe, first_pe), "other bits");
                            continue;
                        }
                        if (version == 3) first_te = got_te, first_pe = got_pe;
                        const double storing = type == BF16 ? EPS16 : 0;
                        for (size_t i = 0; i < te; i++) {
                            const int k = count[i / C];
                            if (k == 0) {
                                untouched.equal(i, got_te[i], before_te[i]);
                                continue;
                            }
                            double was = before_te[i], reference = sum_te[i] + was;
                            double bound = terms_te[i] * compound(token_depth(version, k), EPS32) + fabs(reference) * EPS32;
                            bound = (bound + (fabs(reference) + bound) * storing) * 1.01;
                            if (version == 1) bound = (terms_te[i] + fabs(was)) * compound(k, e) * 1.01;
                            (version == 1 ? one : version == 2 ? two : type == F32 ? wte32 : wte16)
                                .within(i, got_te[i], reference, bound);
                        }
                        for (size_t i = 0; i < pe; i++) {
                            if (i >= (size_t)T * C) {
                                untouched.equal(i, got_pe[i], before_pe[i]);
                                continue;
                            }
                            // B texts and what was there, one behind the other; the first to an empty sum is exact, unless an
                            // fp32 number is stored in bf16
                            double was = accumulate ? before_pe[i] : 0;
                            double reference = sum_pe[i] + was, size = terms_pe[i] + fabs(was);
                            double bound = size * compound(accumulate ? B : B - 1, EPS32);
                            bound = (bound + (fabs(reference) + bound) * storing) * 1.01;
                            if (version == 1) bound = size * compound(B, e) * 1.01;
                            (version == 1 ? one : version == 2 ? two : type == F32 ? wpe32 : wpe16)
                                .within(i, got_pe[i], reference, bound);
                        }
                    }
                }
        }
    printf("backward\n");
    report({&wte32, &wte16, &wpe32, &wpe16, &untouched, &again, &two, &one});
}

// Why sums are made in fp32 even where the gradient is bf16: 4096 terms of 1.
void test_many_terms() {
    Property right("a token that occurs 4096 times has a gradient of 4096, in fp32 and bf16"),
        wrong("version 1 in bf16 stops at 256");
    const int B = 4, T = 1024, C = 8;
    const Batch batch(std::vector<int>(B * T, 0), B, T, 1);
    Buffer<floatX> dout(std::vector<floatX>((size_t)B * T * C, (floatX)1.0f));
    for (DType type : {F32, BF16})
        for (int version : {3, 1}) {
            set_case("%s, version %d", dtype_name(type), version);
            GradBuffer dwte(C, type), dwpe((size_t)T * C, type);
            dwte.write(std::vector<float>(C, 0.0f));
            batch.backward(version, dwte.grad(), dwpe.grad(), dout.p, false, C);
            const bool stops = version == 1 && type == BF16;
            std::vector<float> got = dwte.read();
            for (int c = 0; c < C; c++) (stops ? wrong : right).equal(c, got[c], stops ? 256 : 4096);
            for (float x : dwpe.read()) right.is(x == B, "dwpe is not the number of texts");
        }
    printf("many terms\n");
    report({&right, &wrong});
}

// A NaN or an infinity reaches the one element of each gradient that it is a term of, and all others keep their bits. Denormal
// numbers are multiples of the smallest, and their sums are exact.
void test_special(uint64_t seed) {
    Property p("a NaN or an infinity reaches its token's row and its position's, in its channel, and only these"),
        tiny("sums of denormal numbers", "every bit");
    const int B = 3, T = 43, V = 20, C = 264;
    const size_t n = (size_t)B * T * C;
    Random random(seed, 3);
    const Batch batch(text(EVEN, B * T, V, random), B, T, V);
    const std::vector<floatX> clean = random.normals(n);
    auto run = [&](const std::vector<floatX>& d, DType type) {
        Buffer<floatX> dout(d);
        GradBuffer dwte((size_t)V * C, type), dwpe((size_t)T * C, type);
        dwte.write(std::vector<float>((size_t)V * C, 0.0f));
        batch.backward(3, dwte.grad(), dwpe.grad(), dout.p, false, C);
        return std::make_pair(dwte.read(), dwpe.read());
    };
    for (DType type : {F32, BF16}) {
        const auto [te, pe] = run(clean, type);
        for (float odd : {NAN, INFINITY, -INFINITY})
            for (int c : {0, 100, C - 1}) {
                set_case("%f in channel %d, %s gradients", odd, c, dtype_name(type));
                const int bt = (int)(random.bits() % (B * T));
                std::vector<floatX> broken = clean;
                broken[(size_t)bt * C + c] = (floatX)odd;
                const auto [odd_te, odd_pe] = run(broken, type);
                const size_t at_te = (size_t)batch.tokens[bt] * C + c, at_pe = (size_t)(bt % T) * C + c;
                for (size_t i = 0; i < te.size(); i++) p.equal(i, odd_te[i], i == at_te ? odd : te[i]);
                for (size_t i = 0; i < pe.size(); i++) p.equal(i, odd_pe[i], i == at_pe ? odd : pe[i]);
            }
    }
    set_case("denormal numbers");
    std::vector<floatX> d(n);
    for (floatX& x : d) x = (floatX)(1e-40f * random.normal());
    Doubles sum_te((size_t)V * C, 0), sum_pe((size_t)T * C, 0);
    for (size_t i = 0; i < n; i++) {
        sum_te[(size_t)batch.tokens[i / C] * C + i % C] += (float)d[i];
        sum_pe[i % sum_pe.size()] += (float)d[i];
    }
    const auto [te, pe] = run(d, F32);
    for (size_t i = 0; i < te.size(); i++) tiny.is(te[i] == sum_te[i], "dwte is another number");
    for (size_t i = 0; i < pe.size(); i++) tiny.is(pe[i] == sum_pe[i], "dwpe is another number");
    printf("special values\n");
    report({&p, &tiny});
}

// Index arithmetic beyond 2^31 elements in each of the tensors, and beyond 2^32 in one: first and last blocks alone. Two texts;
// their first and last positions have the last token, in backward the first and the last.
void test_far(uint64_t seed) {
    constexpr int B = 2, T = (1 << 18) + 3, V = T, C = 8200, BT = B * T;
    constexpr size_t TC = (size_t)T * C, n = B * TC, VEC_BLOCK = 256 * VEC;
    static_assert(TC > (size_t)1 << 31 && n > (size_t)1 << 32, "");
    set_case("B %d, T %d, V %d, C %d", B, T, V, C);
    Property forward("forward beyond 2^32 elements, first and last block", "every bit"),
        backward("dwte and dwpe beyond 2^31 elements, first and last block", "every bit");
    FarBuffer<floatX> x(n), te(TC), pe(TC);   // gradients, too
    FarBuffer<int> tokens(BT);
    if (!x.p || !te.p || !pe.p || !tokens.p) return;
    Random random(seed, 4);
    const std::vector<floatX> last_te = random.normals(C), first_pe = random.normals(C), last_pe = random.normals(C);

    te.write(TC - C, last_te);
    pe.write(0, first_pe);
    pe.write(TC - C, last_pe);
    for (int i : {0, BT - 1}) tokens.write(i, {V - 1});
    for (size_t block : {(size_t)0, (n - 1) / VEC_BLOCK}) {
        const size_t at = block * VEC_BLOCK, count = std::min(VEC_BLOCK, n - at), c = at % C;
        launch_blocks(block, block, [&] { embedding_forward(x.p, tokens.p, te.p, pe.p, B, T, C, 0); });
        std::vector<floatX> got = x.read(at, count);
        for (size_t i = 0; i < count; i++)
            forward.equal(at + i, (float)got[i],
                          (float)(floatX)((float)last_te[c + i] + (float)(block ? last_pe : first_pe)[c + i]));
    }

    std::vector<floatX> d[4], before_te[2], before_pe[2];
    for (auto& v : d) v = random.normals(C);
    for (auto* v : {before_te, before_pe}) v[0] = random.normals(C), v[1] = random.normals(C);
    Buffer<int> positions({0, T, T - 1, BT - 1}), bucket_token({0, V - 1}), bucket_start({0, 2, 4});
    const int wte_last = 2 * ceil_div(C, 256) - 1, wpe_last = (int)((TC - 1) / VEC_BLOCK);
    for (int block : {0, wte_last, wpe_last}) {
        for (int i : {0, 1}) {   // a text's first and last position; a gradient's first and last row
            for (int b : {0, 1}) x.write(b * TC + i * (TC - C), d[2 * b + i]);
            te.write(i * (TC - C), before_te[i]);
            pe.write(i * (TC - C), before_pe[i]);
        }
        launch_blocks(block, block, [&] {
            Grad dwte = {te.p, FLOATX}, dwpe = {pe.p, FLOATX};
            embedding_backward(dwte, dwpe, x.p, positions.p, bucket_token.p, bucket_start.p, 2, true, B, T, C, 0);
        });
        const int i = block > 0;
        const std::vector<floatX>&one = d[i], &two = d[2 + i];
        if (block != wpe_last) {
            const size_t c = block ? C / 256 * 256 : 0, count = block ? C % 256 : 256, at = i * (TC - C) + c;
            std::vector<floatX> got = te.read(at, count);
            for (size_t k = 0; k < count; k++) {
                float sum = (float)one[c + k] + (float)two[c + k];
                backward.equal(at + k, (float)got[k], (float)(floatX)(sum + (float)before_te[i][c + k]));
            }
        }
        if (block != wte_last) {
            const size_t at = block * VEC_BLOCK, count = std::min(VEC_BLOCK, TC - at), c = at % C;
            std::vector<floatX> got = pe.read(at, count);
            for (size_t k = 0; k < count; k++) {
                float sum = (float)before_pe[i][c + k] + (float)one[c + k];
                backward.equal(at + k, (float)got[k], (float)(floatX)(sum + (float)two[c + k]));
            }
        }
    }
    printf("far\n");
    report({&forward, &backward});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

// Bytes: a row of wte or dwte counts once for all positions that have its token. The tokens' own 4 bytes are left out: they are
// 4 / C of an element's.
void bench(const char* model, int B, int T, int C) {
    const int V = 50257;
    const double X = sizeof(floatX), G = sizeof(float);
    const size_t n = (size_t)B * T * C;
    Random random(1337, 1);
    const Batch batch(text(SKEWED, B * T, V, random), B, T, V);
    const double rows = (double)batch.buckets / (B * T);
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: C %d, %d different tokens, gradients in fp32", model, C, batch.buckets);
    BenchTable t(title, n);
    // without a GPU nothing runs, and the tensors have one row
    const size_t m = t.timed ? n : C, te = t.timed ? (size_t)V * C : C, pe = t.timed ? (size_t)T * C : C;
    Buffer<floatX> wte(te), wpe(pe), out(m);
    for (Buffer<floatX>* b : {&wte, &wpe, &out}) b->fill();
    GradBuffer dwte(te, F32), dwpe(pe, F32);
    for (GradBuffer* g : {&dwte, &dwpe}) g->fill();
    t.row("forward, version 1: a step a kernel", X * (3 + rows + 1.0 / B),
          [&] { embedding_forward_1(out.p, batch.device.p, wte.p, wpe.p, B, T, C, 0); });
    t.row("forward, version 2: one kernel, an element a thread", X * (1 + rows + 1.0 / B),
          [&] { embedding_forward_2(out.p, batch.device.p, wte.p, wpe.p, B, T, C, 0); });
    t.row("forward, version 3: the trainer's, 8 elements a thread", X * (1 + rows + 1.0 / B),
          [&] { embedding_forward(out.p, batch.device.p, wte.p, wpe.p, B, T, C, 0); });
    t.row("backward, version 1: a channel a thread, down all positions", X + G * (2 * rows + 1.0 / B),
          [&] { batch.backward(1, dwte.grad(), dwpe.grad(), out.p, false, C); });
    t.row("backward, version 2: sorted positions, a token a warp", 2 * X + G * (2 * rows + 1.0 / B),
          [&] { batch.backward(2, dwte.grad(), dwpe.grad(), out.p, false, C); });
    t.row("backward, version 3: the trainer's, 8 warps a token", 2 * X + G * (2 * rows + 1.0 / B),
          [&] { batch.backward(3, dwte.grad(), dwpe.grad(), out.p, false, C); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "embedding: rows of two tables, added, and the gradients of the tables");
    if (o.bench) {
        bench_device();
        bench("124M, B 64, T 1024", 64, 1024, 768);
        bench("1558M, B 8, T 1024", 8, 1024, 1600);
        return 0;
    }
    test_misuse(o, {{"C of 12", "embedding_forward: C is 12: expected a multiple of 8",
                     [] { embedding_forward(nullptr, nullptr, nullptr, nullptr, 1, 1, 12, 0); }},
                    {"C of 12, backward", "embedding_backward: C is 12: expected a multiple of 8",
                     [] { embedding_backward({}, {}, nullptr, nullptr, nullptr, nullptr, 1, false, 1, 1, 12, 0); }}});
    printf("embedding, %s\n", dtype_name(FLOATX));
    test_forward(o.seed);
    test_buckets(o.seed);
    test_backward(o.seed);
    test_many_terms();
    test_special(o.seed);
    test_far(o.seed);
    return finish(o);
}
