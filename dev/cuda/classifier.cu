/*
Softmax, cross-entropy and their gradient, in place of the logits: the trainer's kernels, tested, and simpler ones beside them to
learn from. Section 3 of train_gpt2.cu has them under "loss".

    make dev/cuda/classifier && ./dev/cuda/classifier [--bench]

A row of V logits x and a target t: loss = log sum exp(x) - x[t], and in training x becomes (softmax(x) - onehot(t)) * dloss. exp
overflows beyond 88, so everything is taken relative to the row's maximum m: p = exp(x - m) / sum exp(x - m), loss = log sum exp(x -
m) + m - x[t]. A row has Vp >= V columns, a multiple of 8. Whatever stands in columns V and up takes no part, and its gradient is 0.
A target of -1 says that the row has no loss: it is 0, and so is all of its gradient, whatever its logits are.
sum_kernel adds up the losses of a micro-batch. In validation likeliest_kernel tells the rows whose target has the largest logit.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---- versions
//
// Which pass over a row goes to memory, and which to a cache? GPT-2 has 50257 columns, 100 KB a row in bf16, and the trainer makes
// logits in chunks of about 1 GB, 9472 rows at B = 64 and T = 1024. An H100 has 50 MB of L2 cache. Where all rows of a chunk are
// under way at once, a second pass over a row finds nothing of the first, and counts as bytes moved.

// Version 1: one thread per row, and a pass for each step: the maximum, the sum, the gradient. Read, read, read and write: 8 bytes
// per element in bf16. The 32 lanes of a warp stand in 32 rows, 100 KB apart, so that each load of the warp touches 32 lines to use
// 2 bytes of each, and the lines have to stay cached until the lanes have walked through them. 9472 rows make 296 warps, on a GPU
// that can hold 8448. And a sum of 50257 terms one by one rounds as often.
__global__ void classifier_1_kernel(floatX* logits, float* losses, const int* targets, float dloss, bool train, int rows, int V,
                                    int Vp) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    floatX* x = logits + (size_t)row * Vp;
    int target = targets[row];
    float max = -INFINITY, sum = 0;
    for (int c = 0; c < V; c++) max = fmaxf(max, (float)x[c]);
    for (int c = 0; c < V; c++) sum += expf((float)x[c] - max);
    losses[row] = logf(sum) + max - (float)x[target];
    if (!train) return;
    for (int c = 0; c < V; c++) x[c] = (floatX)((expf((float)x[c] - max) / sum - (c == target ? 1.0f : 0.0f)) * dloss);
    for (int c = V; c < Vp; c++) x[c] = (floatX)0.0f;
}
void classifier_1(floatX* logits, float* losses, const int* targets, float dloss, bool train, int rows, int V, int Vp,
                  cudaStream_t) {
    classifier_1_kernel<<<ceil_div(rows, 128), 128>>>(logits, losses, targets, dloss, train, rows, V, Vp);
}

// Version 2: one warp per row, whose lanes take 8 neighbouring columns each: a load of the warp is 512 bytes in a row and uses all
// of them, and a row's sum is made of 32 sums. It also saves a pass. A sum relative to one maximum becomes the sum relative to
// another by one factor, exp(old - new) (Milakov and Gimelshein, arXiv 1805.02867). A lane starts with the maximum of its first 8
// columns, and multiplies when a later one is larger, which grows rare; at the end lanes do the same to one another. Maximum and
// sum take one pass: 6 bytes, and 2 instead of 4 where only the loss is wanted. The division has become a multiplication. What
// remains is the second reading: a chunk is 9472 warps, and 8448 of these are under way at once.
__global__ void classifier_2_kernel(floatX* logits, float* losses, const int* targets, float dloss, bool train, int rows, int V,
                                    int Vp) {
    int lane = threadIdx.x % 32;
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    floatX* x = logits + (size_t)row * Vp;
    int target = targets[row];
    float max = -INFINITY, sum = 0;
    for (int c = lane * VEC; c < V; c += 32 * VEC) {
        Floats f = load(x + c);
        float old = max;
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            if (c + k >= V) f[k] = -INFINITY;
            max = fmaxf(max, f[k]);
        }
        if (max > old) sum *= expf(old - max);
        float base = max == -INFINITY ? 0.0f : max;   // of -inf alone: exp(-inf - 0) = 0, where -inf - -inf is no number
#pragma unroll
        for (int k = 0; k < VEC; k++) sum += expf(f[k] - base);
    }
    float row_max = warp_max(max);
    sum = warp_sum(max == row_max ? sum : sum * expf(max - row_max));
    if (lane == 0) losses[row] = logf(sum) + row_max - (float)x[target];
    __syncwarp();   // lane 0 reads a logit that another lane is about to overwrite
    if (!train) return;
    float scale = 1.0f / sum;
    for (int c = lane * VEC; c < Vp; c += 32 * VEC) {
        Floats f = load(x + c);
#pragma unroll
        for (int k = 0; k < VEC; k++)
            f[k] = c + k < V ? (expf(f[k] - row_max) * scale - (c + k == target ? 1.0f : 0.0f)) * dloss : 0.0f;
        store(x + c, f);
    }
}
void classifier_2(floatX* logits, float* losses, const int* targets, float dloss, bool train, int rows, int V, int Vp,
                  cudaStream_t) {
    classifier_2_kernel<<<ceil_div(rows, 4), 128>>>(logits, losses, targets, dloss, train, rows, V, Vp);
}

// Version 3, the trainer's classifier, gives a row to a block, of 1024 threads where it is that long. Two blocks fit on a
// multiprocessor, so that 264 rows are under way on an H100 instead of thousands, 26 MB: the second reading finds its row in L2,
// and memory sees every logit read once and its gradient written once, 4 bytes. (In fp32 it is 53 MB, and some of it falls out.)
// The price is two barriers a row, and threads that wait: 6288 vectors of 8 take 1024 threads 7 turns, the last of them for 144. A
// thread's sum has 56 terms at most instead of 1576.

const struct { const char* name; decltype(&classifier) run; } versions[] = {
    {"version 1", classifier_1}, {"version 2", classifier_2}, {"the trainer's", classifier}};
enum { ONE, TWO, TRAINER, VERSIONS };

// ---- the reference, in double precision

struct Reference {
    double loss, loss_terms;
    Doubles gradient, gradient_terms;   // (V)
    void compare(Property& p, float ours, const floatX* g) const {
        if (std::isinf(loss)) p.equal(0, ours, loss);
        else p.close(0, ours, loss, loss_terms, EPS32);
        for (size_t c = 0; c < gradient.size(); c++) p.close(c, (float)g[c], gradient[c], gradient_terms[c]);
    }
};
Reference reference(const floatX* x, int target, double dloss, int V) {
    Reference r;
    double max = -INFINITY, sum = 0, spread = 0;   // x - max is rounded, and exp makes a relative error of an absolute one
    for (int c = 0; c < V; c++) max = std::max(max, (double)(float)x[c]);
    for (int c = 0; c < V; c++) {
        double e = exp((float)x[c] - max);
        sum += e;
        if (e > 0) spread += e * (max - (float)x[c]);
    }
    r.loss = log(sum) + max - (float)x[target];
    r.loss_terms = 1 + spread / sum + log(sum) + fabs(max) + fabs((float)x[target]);
    for (int c = 0; c < V; c++) {
        double p = exp((float)x[c] - max) / sum, hot = c == target, distance = p > 0 ? max - (float)x[c] : 0;
        r.gradient.push_back((p - hot) * dloss);
        r.gradient_terms.push_back((p * (1 + distance + spread / sum) + hot) * fabs(dloss));
    }
    return r;
}

// ---- tests

// What may stand in the padding.
floatX garbage(Random& random) {
    const float values[] = {NAN, INFINITY, -INFINITY, 1e38f, 50, 0};
    return (floatX)values[random.bits() % 6];
}

enum Logits { GAUSSIAN, WIDE, RISING, FALLING, EQUAL, FAR_APART, LARGE, KINDS };
const char* kind_names[] = {"normal", "wide", "rising", "falling", "equal", "1e4 apart", "around 1e4"};
float logit(Random& random, int kind, int c, float same) {
    switch (kind) {
        case GAUSSIAN: return 3 * random.normal();
        case WIDE: return 40 * random.normal();   // down to the denormals of exp and below
        case RISING: return 0.01f * c - 2;   // every vector of a lane has a new maximum
        case FALLING: return 2 - 0.01f * c;
        case EQUAL: return same;
        case FAR_APART: return random.bits() % 2 ? 1e4f : -1e4f;
        default: return 1e4f + 64 * (float)(random.bits() % 4);   // 64 is bf16's step there
    }
}

// V below, at and above a vector of 8, what a warp takes in a turn, and what the largest block does; with and without a padding,
// and with one that is longer than the row.
struct Shape { int V, Vp; };
const Shape shapes[] = {{1, 8}, {1, 600}, {5, 8}, {7, 8}, {8, 8}, {8, 16}, {9, 16}, {16, 16}, {31, 32}, {33, 40}, {248, 248},
                        {255, 256}, {256, 256}, {256, 264}, {257, 264}, {265, 528}, {512, 512}, {513, 520}, {1031, 1152},
                        {8191, 8192}, {8192, 8192}, {8192, 8200}, {8193, 8200}};

void test_classifier(uint64_t seed) {
    Property close[] = {"version 1: loss and gradient", "version 2", "the trainer's"},
             padding("the gradient of padded columns is 0, whatever stood there"),
             only_loss("without training: the same loss, and the logits stay"), again("the same bits in a second run"),
             none("target -1: loss and gradient are 0, whatever the logits; the other rows keep their bits", "every bit");
    // A row for a block of 32 warps, run before one of fewer, leaves in shared memory what nobody must take for its own maximum.
    Buffer<floatX> tall(std::vector<floatX>(8192, (floatX)1e4f));
    Buffer<float> tall_loss(1);
    Buffer<int> tall_target(std::vector<int>{0});
    int number = 0;
    auto test = [&](int rows, int V, int Vp, int kind) {
        set_case("rows %d, V %d, Vp %d, %s", rows, V, Vp, kind_names[kind]);
        Random random(seed, ++number);
        const float dloss = number % 3 == 0 ? 1 : number % 3 == 1 ? 1 / 65536.0f : -0.3f, same = 3 * random.normal();
        std::vector<floatX> x((size_t)rows * Vp);
        std::vector<int> targets(rows);
        std::vector<Reference> refs;
        for (int r = 0; r < rows; r++) {
            for (int c = 0; c < Vp; c++) x[(size_t)r * Vp + c] = c < V ? (floatX)logit(random, kind, c, same) : garbage(random);
            targets[r] = r == 0 ? 0 : r == 1 ? V - 1 : (int)(random.bits() % V);
            refs.push_back(reference(&x[(size_t)r * Vp], targets[r], dloss, V));
        }
        Buffer<int> t(targets);
        for (int v = V > 8000 ? TWO : ONE; v < VERSIONS; v++) {   // version 1 adds up long rows with too many roundings
            Buffer<floatX> logits(x), kept(x);
            Buffer<float> losses(rows), only_losses(rows);
            if (kind == GAUSSIAN && V < 8000) versions[v].run(tall.p, tall_loss.p, tall_target.p, 1, false, 1, 8192, 8192, 0);
            versions[v].run(logits.p, losses.p, t.p, dloss, true, rows, V, Vp, 0);
            versions[v].run(kept.p, only_losses.p, t.p, dloss, false, rows, V, Vp, 0);
            const std::vector<floatX> d = logits.read();
            const std::vector<float> l = losses.read();
            only_loss.is(same_bits(l, only_losses.read()) && same_bits(x, kept.read()), "another loss, or other logits");
            if (v == TRAINER) {
                versions[v].run(kept.p, only_losses.p, t.p, dloss, true, rows, V, Vp, 0);
                again.is(same_bits(l, only_losses.read()) && same_bits(d, kept.read()), "other bits");
                std::vector<floatX> odd = x, expected = d;
                std::vector<float> expected_losses = l;
                std::vector<int> some = targets;
                for (int r = number % 2; r < rows; r += 2) {
                    some[r] = -1, expected_losses[r] = 0, odd[(size_t)r * Vp + random.bits() % Vp] = garbage(random);
                    std::fill_n(&expected[(size_t)r * Vp], Vp, (floatX)0.0f);
                }
                t.write(some);
                for (bool train : {false, true}) {
                    logits.write(odd);
                    versions[v].run(logits.p, losses.p, t.p, dloss, train, rows, V, Vp, 0);
                    none.is(same_bits(losses.read(), expected_losses) && same_bits(logits.read(), train ? expected : odd), "other bits");
                }
            }
            for (int r = 0; r < rows; r++) {
                refs[r].compare(close[v], l[r], &d[(size_t)r * Vp]);
                for (int c = V; c < Vp; c++) padding.equal(r * (size_t)Vp + c, (float)d[(size_t)r * Vp + c], 0);
            }
        }
    };
    for (Shape s : shapes)
        for (int kind = 0; kind < KINDS; kind++) {
            if (s.V < 8000) test(1 + number % 9, s.V, s.Vp, kind);   // 4 rows are a block in version 2
            else if (kind == GAUSSIAN || kind == RISING || kind == FALLING) test(2, s.V, s.Vp, kind);
        }
    test(3, 50257, 50304, GAUSSIAN);
    report({&close[TRAINER], &close[TWO], &close[ONE], &padding, &only_loss, &again, &none});
}

// What is no number, or not finite, must reach the loss and all of its row's gradient, and no other row.
void test_special(uint64_t seed) {
    Property nan("a NaN or +inf, or nothing but -inf: the loss and its row's gradient are NaN, and no other row's"),
        minus("-inf: a probability of 0; an infinite loss if it is the target");
    const int rows = 9, V = 521, Vp = 536, broken = 4;
    const size_t row = (size_t)broken * Vp;
    const float dloss = 0.25f;
    Random random(seed, 1000000);
    std::vector<floatX> clean = random.normals((size_t)rows * Vp, 0, 3);
    std::vector<int> targets(rows);
    for (int r = 0; r < rows; r++) {
        targets[r] = (int)(random.bits() % V);
        for (int c = V; c < Vp; c++) clean[(size_t)r * Vp + c] = garbage(random);
    }
    for (auto& version : versions) {
        auto run = [&](const std::vector<floatX>& x, int target) {
            targets[broken] = target;
            Buffer<int> t(targets);
            Buffer<floatX> logits(x);
            Buffer<float> losses(rows);
            version.run(logits.p, losses.p, t.p, dloss, true, rows, V, Vp, 0);
            return std::make_pair(logits.read(), losses.read());
        };
        auto with = [&](int target, int first, int last, float value) {   // columns [first, last] of the row become `value`
            set_case("%s: %g in columns %d to %d, target %d", version.name, value, first, last, target);
            std::vector<floatX> x = clean;
            std::fill(&x[row + first], &x[row + last] + 1, (floatX)value);
            const auto [clean_d, clean_l] = run(clean, target);
            const auto [d, l] = run(x, target);
            if (value == -INFINITY && (first > 0 || last < V - 1))   // the gradient of such a column is 0, or -dloss
                return reference(&x[row], target, dloss, V).compare(minus, l[broken], &d[row]);
            check_reach(nan, l, clean_l, [&](size_t r) { return (int)r == broken; }, "loss");
            check_reach(nan, d, clean_d, [&](size_t i) { return i >= row && i < row + V; }, "gradient");
        };
        for (int c : {0, 7, 8, 255, 256, 263, 512, 519, V - 1})   // first and last of a vector, a turn of the warp, the row
            for (int target : {c, 300})
                for (float value : {NAN, INFINITY, -INFINITY}) with(target, c, c, value);
        with(300, 0, 255, -INFINITY);   // all that a thread begins with
        with(300, 0, V - 1, -INFINITY);
    }
    report({&nan, &minus});
}

// Logits of few different values, so that some are equal; whatever stands in the padding takes no part.
void test_likeliest(uint64_t seed) {
    Property p("the target is the likeliest: of equal ones the first; rows without a target, and all others, keep theirs", "every bit");
    for (Shape s : shapes) {
        const int rows = 12;
        set_case("V %d, Vp %d", s.V, s.Vp);
        Random random(seed, 4000000 + s.Vp);
        std::vector<floatX> x((size_t)rows * s.Vp);
        std::vector<int> targets(rows), expected(rows);
        for (int r = 0; r < rows; r++) {
            const int levels = 1 + r % 4, shift = (int)(random.bits() % s.V);   // of one level: the first is the likeliest
            for (int c = 0; c < s.Vp; c++)
                x[(size_t)r * s.Vp + c] = c < s.V ? (floatX)(float)((c + shift) % s.V * levels / s.V) : garbage(random);
            const auto row = x.begin() + (size_t)r * s.Vp;
            const int best = (int)(std::max_element(row, row + s.V, [](floatX a, floatX b) { return (float)a < (float)b; }) - row);
            targets[r] = r % 3 == 0 ? best : r == 1 ? NO_TARGET : (int)(random.bits() % s.V);
            expected[r] = targets[r] == best ? HIT : targets[r];
        }
        Buffer<floatX> logits(x);
        Buffer<int> t(targets);
        likeliest_kernel<<<rows, 256>>>(t.p, logits.p, s.V, s.Vp);
        p.is(t.read() == expected, "other targets");
    }
    report({&p});
}

// A row's index times Vp, beyond 2^31: rows of GPT-2's width, the first three and the last three.
void test_far(uint64_t seed) {
    Property p("loss and gradient of rows beyond 2^31 elements", "every bit of the same rows alone");
    const int V = 50257, Vp = 50304, rows = 128 * 335 + 3;
    Random random(seed, 2000000);
    set_case("%d rows of %d", rows, Vp);
    Far<floatX> logits((size_t)rows * Vp, random.normals(3 * (size_t)Vp, 0, 3), Vp, Vp);
    Far<float> losses(rows, 3, 1, 1);
    Far<int> targets(rows, std::vector<int>{0, V - 1, 1234}, 1, 1);
    for (int row : {0, rows - 3}) {
        logits.at = (size_t)row * Vp, losses.at = targets.at = row;
        check_far(p, {&logits, &losses, &targets}, {row, row + 1, row + 2}, [&](bool far) {
            classifier(logits.p(far), losses.p(far), targets.p(far), 1, true, far ? rows : 3, V, Vp, 0);
        });
    }
    report({&p});
}

// The sum of the losses: 256 threads, then a block's sum. What stands after the last loss is NaN, or the end of memory, which the
// sanitizers find.
void test_loss_sum(uint64_t seed) {
    Property sum("the sum of the losses, written over NaN, and added to what is there"), again("the same bits in a second run"),
        nan("a NaN or an infinity among the losses, or in the sum so far, stays");
    for (int n : {1, 2, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1000, 4099})
        for (bool beside : {false, true}) {
            Random random(seed, 3000000 + n);
            std::vector<float> losses(n);
            for (float& l : losses) l = 3 + random.normal();
            Buffer<float> l(n + (beside ? 256 : 0)), total(1);
            auto run = [&](const std::vector<float>& losses, bool accumulate, float before) {
                total.write({before});
                l.write(losses);
                sum_kernel<<<1, 256>>>(total.p, l.p, accumulate, n);
                return total.read()[0];
            };
            for (bool accumulate : {false, true}) {
                set_case("%d losses, %s", n, accumulate ? "added" : "written");
                const float before = accumulate ? 1000 * random.normal() : NAN;
                double reference = accumulate ? before : 0, terms = fabs(reference);
                for (float x : losses) reference += x, terms += fabs(x);
                const float got = run(losses, accumulate, before);
                sum.close(0, got, reference, terms, EPS32);
                again.equal(0, run(losses, accumulate, before), got);
                for (int where : {0, n / 2, n - 1})
                    for (float value : {NAN, INFINITY}) {
                        std::vector<float> broken = losses;
                        broken[where] = value;
                        nan.equal(where, run(broken, accumulate, 1), value);
                    }
            }
            nan.equal(0, run(losses, true, NAN), NAN);
        }
    report({&sum, &again, &nan});
}

// ---- benchmark: a chunk of logits as the trainer makes it

void bench(const char* model, int positions, int) {
    const Config c = {1024, 50257, 50304};
    const int rows = loss_auto_rows(positions, c.Vp, CHUNK_BYTES);
    const double X = sizeof(floatX);
    BenchTable t((size_t)rows * c.Vp, BenchTable::BYTES, "%s: a chunk of %d rows, V %d", model, rows, c.V);
    const int r = t.here(rows, 1);
    Buffer<floatX> logits((size_t)r * c.Vp);
    Buffer<float> losses(r);
    Buffer<int> targets(std::vector<int>(r, 1));
    logits.fill();
    const float dloss = 1.0f / positions;
    for (bool train : {false, true}) {
        const char* names[] = {"version 1: one thread per row", "version 2: one warp per row, maximum and sum in one pass",
                               "version 3: the trainer's, one block per row"};
        const int reads[] = {train ? 3 : 2, train ? 2 : 1, 1};   // that find nothing in a cache
        for (int v = 0; v < VERSIONS; v++)
            t.row((std::string(train ? "loss and gradient, " : "loss, ") + names[v]).c_str(), (reads[v] + train) * X,
                  [&] { versions[v].run(logits.p, losses.p, targets.p, dloss, train, rows, c.V, c.Vp, 0); });
    }
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "classifier: softmax, cross-entropy and their gradient in place of the logits");
    if (o.bench) return bench_models(bench);
    test_misuse(o, {refuses_12("classifier: Vp", [] { classifier(nullptr, nullptr, nullptr, 1, true, 1, 9, 12, 0); })});
    printf("classifier, %s\n", dtype_name(FLOATX));
    test_classifier(o.seed);
    test_special(o.seed);
    test_likeliest(o.seed);
    test_far(o.seed);
    test_loss_sum(o.seed);
    return finish(o);
}
