/*
The embedding, forward and backward: the trainer's kernels, tested, and simpler ones beside them to learn from. Section 3 of
train_gpt2.cu has them under "embedding"; the host sorts a micro-batch's positions by token in tokens_upload, section 7.

    make dev/cuda/embedding && ./dev/cuda/embedding [--bench]

Forward: out[b,t,:] = wte[token[b,t],:] + wpe[t,:]. Backward: dwte[v,:] += the sum of dout[b,t,:] over all positions whose token is
v, dwpe[t,:] (+)= the sum of dout[b,t,:] over b. wte is the lm-head's weight, too, which has its gradient there already, so dwte is
always added to; dwpe is written by the first micro-batch and added to by the others. A thread of the trainer's kernels owns 8
neighbouring channels, so C has to be a multiple of 8. Where a row has several documents, t is counted from where each begins.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---- versions of the forward pass

// Version 1: one kernel per step, one element per thread. The first copies rows of wte, the second adds wpe to them: out is
// written, read and written again, 6 bytes per element in bf16 where 2 have to be. What is read besides is little: the rows of
// tokens that occur twice come from the cache the second time (a quarter of the 65536 positions of a text have a token that none
// before them had: half a byte), and so does wpe after the first of B texts (2/64 of a byte). 6.5 bytes, 2.5 of them needed.
__global__ void gather_1_kernel(floatX* out, const int* tokens, const floatX* wte, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = wte[(size_t)tokens[i / C] * C + i % C];
}
__global__ void add_1_kernel(floatX* out, const floatX* wpe, size_t n, size_t TC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (floatX)((float)out[i] + (float)wpe[i % TC]);
}
void embedding_forward_1(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, const int*, int B, int T, int C,
                         cudaStream_t) {   // of one document in a row
    size_t n = (size_t)B * T * C;
    gather_1_kernel<<<ceil_div(n, 256), 256>>>(out, tokens, wte, n, C);
    add_1_kernel<<<ceil_div(n, 256), 256>>>(out, wpe, n, (size_t)T * C);
}

// It wastes instructions too. A thread finds its place by divisions of 64-bit numbers, which the hardware does not have: each is
// some dozens of instructions, to move 2 bytes. And a position's token is fetched C times, once for each element of its row.
//
// Version 2, the trainer's embedding_forward, is one kernel that moves 2.5 bytes, and gives a thread 8 elements: one search for the
// place, one token, and loads and stores of 16 bytes.

// ---- versions of the backward pass

// Backward is forward with its arrows turned around: rows are not fetched but thrown, and several may be thrown at one place. With
// one element per thread, as in forward, one would have to add with atomics, in the order of arrival: float addition is not
// associative, so no two runs would have the same bits.
//
// Version 1 needs no atomics, because a channel has one thread. It walks down all positions and adds what it finds to both
// gradients. In bytes that is less than all that follows: dout is read once, and a row of dwte or dwpe that comes back soon comes
// from the cache. But each step is a load, an addition and a store that the next step may have to wait for, half a microsecond or
// so, and there are 65536 steps: tens of milliseconds, where the bytes take less than one. C = 768 threads are 24 warps, where a
// large GPU holds 8000 to hide such waiting. And each addition rounds to the gradient's type. In bf16, with 8 bits, a sum of equal
// terms stops growing at 256 of them; "the" occurs thousands of times.
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

// Version 2, the trainer's embedding_backward, asks not where a position's row goes, but where a token's rows come from. If
// somebody has sorted the positions by token (the host has, while the GPU was busy with the micro-batch before), then a token's
// positions stand side by side, can be added up in registers, in fp32, and each row of dwte is read and written once, whatever its
// token's number. But few tokens make up much of a text: one warp that had one of 4000 positions would go down them long after all
// others are done. So a block has 8 warps for 256 channels of a token, 16 bytes per lane, each warp goes down every eighth
// position, and their sums are added in a fixed order: 500 loads one after the other. The rows of dwpe need no sorting: row t is
// the sum of the rows t of B texts, with 16 bytes per thread, as in forward. Two kernels read dout, each in its own order: 2 bytes
// more than version 1.

// ---- tests

// The trainer's in a second run, some rows of dwte at a time, where nothing has been written to dwte before, and where rows have documents.
enum Version { ONE = 1, TRAINERS, AGAIN, PARTS, WRITTEN, DOCUMENTS };

// A micro-batch on the device, as the trainer has it: inputs, targets (nobody wants them here), then what tokens_upload sorts.
struct Batch {
    int B, T, V, buckets;
    std::vector<int> tokens;
    Buffer<int> device;
    const int *positions, *bucket_token, *bucket_start;   // on the device
    Batch(const std::vector<int>& tokens, int B, int T, int V)
        : B(B), T(T), V(V), tokens(tokens), device(token_ints((size_t)B * T, V, false)) {
        const int BT = B * T;
        std::vector<int> host = tokens;
        host.resize(device.n);
        buckets = tokens_upload(device.p, host.data(), BT, V, 0);
        positions = device.p + 2 * BT;
        bucket_token = positions + BT;
        bucket_start = bucket_token + token_cap(BT, V);
    }
    void backward(int version, Grad dwte, Grad dwpe, const floatX* dout, const int* document, bool accumulate, int C) const {
        if (version == ONE)
            embedding_backward_1_kernel<<<ceil_div(C, 32), 32>>>(dwte, dwpe, dout, device.p, accumulate, B, T, C);
        else if (version == PARTS)
            for (int first = 0, rows = ceil_div(V, 3); first < V; first += rows)
                embedding_backward(dwte + (size_t)first * C, first > 0 ? Grad{} : dwpe, dout, positions, bucket_token, bucket_start, document,
                                   buckets, true, accumulate, B, T, C, 0, first, std::min(rows, V - first));
        else
            embedding_backward(dwte, dwpe, dout, positions, bucket_token, bucket_start, document, buckets, version != WRITTEN,
                               accumulate, B, T, C, 0);
    }
};

enum Text { EVEN, SKEWED, REPEATED, DISTINCT, TEXTS };   // SKEWED: the k-th token has a share of 1/k, as in a language
const char* const TEXT_NAMES[] = {"any tokens", "skewed tokens", "one token", "distinct tokens"};
std::vector<int> text(Text kind, size_t n, int V, Random& random) {
    std::vector<int> tokens(n);
    for (size_t i = 0; i < n; i++)
        tokens[i] = kind == SKEWED ? std::min(V, (int)pow(V + 1, random.uniform())) - 1 : kind == REPEATED ? V - 1
                    : kind == DISTINCT ? V - 1 - (int)i : (int)(random.bits() % V);
    tokens[random.bits() % n] = V - 1;   // the last row, whose neighbour is the end of the tensor
    return tokens;
}

// Numbers that addition could get wrong.
floatX odd_number(Random& random) {
    const float odd[] = {0.0f,  -0.0f,  1e-40f,          -1e-40f,          1.175494351e-38f, 1.0f,     -1.0f,
                         1e30f, -1e30f, 3.38953139e+38f, -3.38953139e+38f, INFINITY,         -INFINITY, NAN};
    return (floatX)odd[random.bits() % (sizeof odd / sizeof odd[0])];
}

// Each of the two elements has 8 bits (24 in fp32) and their sum is rounded twice, to fp32 and to bf16, as the reference does: all
// versions have to make the same bits. Rows of wte whose token does not occur are NaN, and so is a row of wpe after the last
// position. Channels and texts are around what a thread, a warp's load and a block take: 8, 256, 2048 elements. Then every number
// that bf16 has, in a text of all different tokens; in fp32, one number for each.
void test_forward(uint64_t seed) {
    Property value("forward: wte + wpe", "every bit"), again("forward: the same bits in a second run"),
        simple("forward, version 1", "every bit"), in_documents("forward with documents: positions begin anew", "every bit");
    struct Shape { int B, T, V, C; };
    for (auto [B, T, V, C] :
         {Shape{1, 1, 1, 8}, {1, 7, 3, 8}, {3, 5, 50, 24}, {3, 85, 100, 8}, {2, 128, 100, 8}, {1, 257, 300, 8}, {2, 31, 7, 136},
          {4, 2, 11, 256}, {3, 33, 64, 264}, {1, 3, 2, 1000}, {5, 1, 3, 4104}, {1, 64, 64, 1024}})
        for (Text kind : {EVEN, SKEWED, REPEATED, DISTINCT}) {
            const bool every = V == 64 && T == 64;
            if ((kind == DISTINCT) != every) continue;
            set_case("B %d, T %d, V %d, C %d, %s", B, T, V, C, TEXT_NAMES[kind]);
            const size_t n = (size_t)B * T * C;
            Random random(seed, n * 10 + kind);
            const std::vector<int> ids = text(kind, B * T, V, random);
            std::vector<floatX> wte((size_t)V * C, (floatX)NAN), wpe = random.normals((size_t)(T + B % 2) * C);
            for (int token : ids)
                for (int c = 0; c < C; c++) wte[(size_t)token * C + c] = (floatX)random.normal();
            for (size_t i = 0; i < n / 8; i++) wte[ids[random.bits() % ids.size()] * C + random.bits() % C] = odd_number(random);
            for (uint32_t i = 0; every && i < 65536; i++) {
                const uint32_t bits = i << 16 | (kFP32 ? (uint32_t)random.bits() & 0xffff : 0);
                float x;
                memcpy(&x, &bits, 4);
                wte[i] = (floatX)x;
            }
            for (size_t i = 0; i < (size_t)T * C; i += every ? 2 : 11) wpe[i] = odd_number(random);
            std::fill(wpe.begin() + (size_t)T * C, wpe.end(), (floatX)NAN);
            const std::vector<int> begin = documents(random, B, T, 1 + B);
            Buffer<int> tokens(ids), document(begin);
            Buffer<floatX> te(wte), pe(wpe), out(n);
            std::vector<floatX> first;
            for (Version version : {TRAINERS, AGAIN, ONE, DOCUMENTS}) {
                (version == ONE ? embedding_forward_1 : embedding_forward)(
                    out.p, tokens.p, te.p, pe.p, version == DOCUMENTS ? document.p : nullptr, B, T, C, 0);
                const std::vector<floatX> got = out.read();
                if (version == TRAINERS) first = got;
                if (version == AGAIN) again.is(same_bits(got, first), "other bits");
                for (size_t i = 0; i < n; i++) {
                    const size_t t = i / C % T - (version == DOCUMENTS ? begin[i / C] : 0);
                    const floatX token = wte[(size_t)ids[i / C] * C + i % C], position = wpe[t * C + i % C];
                    const floatX expected = (floatX)((float)token + (float)position);
                    (version == ONE ? simple : version == DOCUMENTS ? in_documents : value).equal(i, (float)got[i], (float)expected);
                }
            }
        }
    printf("forward\n");
    report({&value, &again, &simple, &in_documents});
}

// Channels around a lane's 8, a block's 256, and more than two blocks; a token's occurrences on both sides of 8 and 16, and of
// several hundred; positions times channels around wpe's 2048 per block. dwpe has a row more than there are positions.
void test_backward(uint64_t seed) {
    Property sums32("dwte and dwpe in fp32"), sums16("dwte and dwpe in bf16"),
        untouched("rows whose token does not occur, or after the last position, keep every bit"),
        again("the same bits in a second run"), simple("version 1: dwte and dwpe"), in_documents("with documents: dwte and dwpe"),
        sorted("positions, sorted by token, ascending within one");
    struct Shape { int B, T, V, C; };
    for (auto [B, T, V, C] :
         {Shape{1, 1, 1, 8}, {1, 9, 3, 24}, {3, 5, 20, 8}, {2, 8, 5, 136}, {4, 33, 9, 264}, {3, 43, 150, 248},
          {1, 130, 140, 256}, {2, 4, 3, 520}, {1, 8, 8, 256}, {2, 255, 30, 8}, {3, 256, 2, 8}, {2, 257, 300, 8},
          {17, 2, 3, 16}})
        for (int kind = 0; kind < TEXTS; kind++) {
            if (kind == DISTINCT && V < B * T) continue;
            const size_t n = (size_t)B * T * C, te = (size_t)V * C, all = te + (size_t)(T + 1) * C;   // dwte, then dwpe
            Random random(seed, n * 10 + kind);
            const Batch batch(text((Text)kind, B * T, V, random), B, T, V);
            const std::vector<int> ints = batch.device.read();
            const size_t positions = 2 * batch.tokens.size();   // where they begin
            auto key = [&](size_t i) { return std::make_pair(batch.tokens[ints[positions + i]], ints[positions + i]); };
            for (int i = 1; i < B * T; i++) sorted.is(key(i - 1) < key(i), "they are not");
            std::vector<int> count(V, 0);
            for (int token : batch.tokens) count[token]++;
            const std::vector<floatX> d = random.normals(n);
            const std::vector<int> begin = documents(random, B, T, 1 + B);
            Buffer<floatX> dout(d);
            Buffer<int> document(begin);
            Doubles sum(2 * all - te, 0), terms(2 * all - te, 0);   // dwte, dwpe, and dwpe where rows have documents
            for (size_t i = 0; i < n; i++)
                for (size_t at : {batch.tokens[i / C] * (size_t)C + i % C, te + i / C % T * C + i % C,
                                  all + (i / C % T - begin[i / C]) * C + i % C})
                    sum[at] += (float)d[i], terms[at] += fabs((float)d[i]);
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    GradBuffer dwte(te, type), dwpe(all - te, type);
                    std::vector<float> before = random.grads(all, 3);
                    for (int v = 0; v < V; v++)   // zeros whose sign adding 0 to them would change
                        if (count[v] == 0) before[(size_t)v * C] = -0.0f, before[(size_t)v * C + C - 1] = NAN;
                    if (!accumulate) std::fill(before.begin() + te, before.end(), NAN);
                    std::vector<float> first;
                    for (Version version : {TRAINERS, AGAIN, PARTS, WRITTEN, DOCUMENTS, ONE}) {
                        if (version == ONE && type == BF16) continue;   // rounds too often to say much
                        set_case("B %d, T %d, V %d, C %d, %s, %s gradients, dwpe %s, version %d", B, T, V, C, TEXT_NAMES[kind],
                                 dtype_name(type), accumulate ? "added to" : "written", version);
                        dwte.write({before.begin(), before.begin() + te});
                        dwpe.write({before.begin() + te, before.end()});
                        batch.backward(version, dwte.grad(), dwpe.grad(), dout.p, version == DOCUMENTS ? document.p : nullptr,
                                       accumulate, C);
                        std::vector<float> got = dwte.read(), got_pe = dwpe.read();
                        got.insert(got.end(), got_pe.begin(), got_pe.end());
                        if (version == TRAINERS) first = got;
                        if (version == AGAIN || version == PARTS) again.is(same_bits(got, first), "other bits");
                        Property& sums = version == ONE ? simple : version == DOCUMENTS ? in_documents : type == F32 ? sums32 : sums16;
                        for (size_t i = 0; i < all; i++) {
                            const size_t of = version == DOCUMENTS && i >= te ? i + all - te : i;
                            const double was = (i < te ? version != WRITTEN : accumulate) ? before[i] : 0;
                            if (i < te ? count[i / C] == 0 : i >= te + (size_t)T * C) untouched.equal(i, got[i], before[i]);
                            else sums.close(i, got[i], sum[of] + was, terms[of] + fabs(was), store_of(type));
                        }
                    }
                }
        }
    printf("backward\n");
    report({&sums32, &sums16, &untouched, &again, &sorted, &simple, &in_documents});
}

void test_special(uint64_t seed) {
    Property p("a NaN or an infinity reaches its token's row and its position's, in its channel, and only these");
    const int B = 3, T = 43, V = 20, C = 264;
    const size_t n = (size_t)B * T * C;
    Random random(seed, 3);
    const Batch batch(text(EVEN, B * T, V, random), B, T, V);
    const std::vector<floatX> clean = random.normals(n);
    auto run = [&](const std::vector<floatX>& d, DType type) {
        Buffer<floatX> dout(d);
        GradBuffer dwte((size_t)V * C, type), dwpe((size_t)T * C, type);
        dwte.write(std::vector<float>((size_t)V * C, 0.0f));
        batch.backward(TRAINERS, dwte.grad(), dwpe.grad(), dout.p, nullptr, false, C);
        return std::make_pair(dwte.read(), dwpe.read());
    };
    for (DType type : {F32, BF16})
        for (float odd : {NAN, -INFINITY}) {
            const size_t bt = random.bits() % (B * T), c = random.bits() % C;
            set_case("%f in channel %zu, %s gradients", odd, c, dtype_name(type));
            std::vector<floatX> broken = clean;
            broken[bt * C + c] = (floatX)odd;
            const auto [te, pe] = run(clean, type);
            const auto [odd_te, odd_pe] = run(broken, type);
            check_reach(p, odd_te, te, [&](size_t i) { return i == (size_t)batch.tokens[bt] * C + c; }, "dwte");
            check_reach(p, odd_pe, pe, [&](size_t i) { return i == bt % T * C + c; }, "dwpe");
        }
    report({&p});
}

// Index arithmetic beyond 2^31 elements in each of the tensors, and beyond 2^32 in one: first and last blocks alone. Two texts;
// their first and last positions have the last token, in backward the first and the last.
void test_far(uint64_t seed) {
    constexpr int B = 2, T = (1 << 18) + 3, V = T, C = 8200, BT = B * T;
    constexpr size_t TC = (size_t)T * C, n = B * TC, BLOCK = 256 * VEC;
    static_assert(TC > (size_t)1 << 31 && n > (size_t)1 << 32, "");
    set_case("B %d, T %d, V %d, C %d", B, T, V, C);
    Property forward("forward beyond 2^32 elements, first and last block", "every bit"),
        backward("dwte and dwpe beyond 2^31 elements, first and last block", "every bit");
    Random random(seed, 4);
    Buffer<int> one(std::vector<int>{0});
    FarBuffer<int> tokens(BT);
    if (!tokens.p) return;
    for (int i : {0, BT - 1}) tokens.write(i, {V - 1});
    for (size_t block : {(size_t)0, (n - 1) / BLOCK}) {
        const size_t at = block * BLOCK, count = std::min(BLOCK, n - at), row = block ? T - 1 : 0;
        Far<floatX> out(n, count, count, C), te(TC, random.normals(count), count, C), pe(TC, random.normals(count), count, C);
        out.at = at, te.at = TC - C + at % C, pe.at = row * C + at % C;
        check_far(forward, {&out, &te, &pe}, {(int64_t)block}, [&](bool far) {
            if (far) embedding_forward(out.p(far), tokens.p, te.p(far), pe.p(far), nullptr, B, T, C, 0);
            else embedding_forward(out.p(far), one.p, te.p(far), pe.p(far), nullptr, 1, 1, (int)count, 0);
        });
    }
    Buffer<int> positions({0, T, T - 1, BT - 1}), bucket_token({0, V - 1}), bucket_start({0, 2, 4}), near_positions({0, 1});
    for (bool last : {false, true}) {   // the last block of dwte has 8 channels
        const size_t count = last ? 8 : 256, at = last ? TC - count : 0;
        Far<floatX> dout(n, random.normals(2 * count), count, C, 2, TC), te(TC, random.normals(count), count, C),
            pe(TC, random.normals(count), count, C);
        dout.at = te.at = pe.at = at;
        std::vector<int64_t> blocks = {0};
        if (last) blocks = {2 * ceil_div(C, 256) - 1, (int64_t)((TC - 1) / BLOCK)};
        check_far(backward, {&dout, &te, &pe}, blocks, [&](bool far) {
            const Grad dwte = {te.p(far), FLOATX}, dwpe = {pe.p(far), FLOATX};
            if (far)
                embedding_backward(dwte, dwpe, dout.p(far), positions.p, bucket_token.p, bucket_start.p, nullptr, 2, true, true, B, T,
                                   C, 0);
            else
                embedding_backward(dwte, dwpe, dout.p(far), near_positions.p, one.p, bucket_start.p, nullptr, 1, true, true, 2, 1,
                                   (int)count, 0);
        });
    }
    report({&forward, &backward});
}

// ---- benchmark

// Bytes: a row of wte or dwte counts once for all positions that have its token. The tokens' own 4 bytes are left out: they are 4 /
// C of an element's.
void bench(const char* model, int BT, int C) {
    const int V = 50257, T = 1024, B = BT / T;
    const double X = sizeof(floatX), G = sizeof(float);
    Random random(1337, 1);
    const Batch batch(text(SKEWED, BT, V, random), B, T, V);
    const double rows = (double)batch.buckets / BT, once = X * (1 + rows + 1.0 / B), gradients = G * (2 * rows + 1.0 / B);
    BenchTable t((size_t)BT * C, BenchTable::BYTES, "%s: C %d, %d tokens, gradients in fp32", model, C, batch.buckets);
    Buffer<floatX> wte(t.here((size_t)V * C, C)), wpe(t.here((size_t)T * C, C)), out(t.here(t.n, C));
    for (Buffer<floatX>* b : {&wte, &wpe, &out}) b->fill();
    GradBuffer dwte(wte.n, F32), dwpe(wpe.n, F32);
    for (GradBuffer* g : {&dwte, &dwpe}) g->fill();
    auto forward = [&](auto layer) { return [&, layer] { layer(out.p, batch.device.p, wte.p, wpe.p, nullptr, B, T, C, 0); }; };
    const Grad te = dwte.grad(), pe = dwpe.grad();
    auto backward = [&](Version version) { return [&, version] { batch.backward(version, te, pe, out.p, nullptr, false, C); }; };
    t.row("forward, version 1: one kernel per step", once + 2 * X, forward(embedding_forward_1));
    t.row("forward, version 2: the trainer's, 8 elements per thread", once, forward(embedding_forward));
    t.row("backward, version 1: one thread per channel, down all positions", X + gradients, backward(ONE));
    t.row("backward, version 2: the trainer's, sorted positions, 8 warps per token", 2 * X + gradients, backward(TRAINERS));
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "embedding: rows of two tables, added, and the gradients of the tables");
    if (o.bench) return bench_models(bench);
    auto forward = [] { embedding_forward(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 12, 0); };
    auto backward = [] { embedding_backward({}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, 1, true, false, 1, 1, 12, 0); };
    test_misuse(o, {refuses_12("embedding_forward: C", forward), refuses_12("embedding_backward: C", backward)});
    printf("embedding, %s\n", dtype_name(FLOATX));
    test_forward(o.seed);
    test_backward(o.seed);
    test_special(o.seed);
    test_far(o.seed);
    return finish(o);
}
