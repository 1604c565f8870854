/*
The optimizer's step over all parameter tensors: the norm of all gradients, the verdict that follows from it, and AdamW; AdamW with m
and v in 8 bits, and AdaLomo, which section 5 describes; and the weights that training starts from. The trainer's kernels, tested, and simpler ones beside them to learn from. Section 5 of
train_gpt2.cu has them.

    make dev/cuda/optimizer && ./dev/cuda/optimizer [--bench]

norm = sqrt(sum of g^2) over the elements of all tensors. Gradients are multiplied by clip / norm where norm > clip. A step whose
loss or norm is not finite is skipped, and so is one whose loss or norm lies more than a given number of standard deviations above
the mean of the last 128. AdamW, with g the gradient times the clip factor, m and v running means of g and g^2, and c1 = 1 -
beta1^t, c2 = 1 - beta2^t:

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   x -= lr ((m / c1) / (sqrt(v / c2) + eps) + decay x)

x is the fp32 master copy of a weight, where there is one; the weight is then its nearest bf16. Without a master copy x is the
weight itself, and what comes out is rounded to one of the two bf16 beside it by chance, so that it is right on average. A step that
the verdict skips changes nothing. Gradients are fp32 or bf16. A thread owns 8 neighbouring elements, so a tensor has a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include <memory>

#include "common.cuh"

// ---- versions of the sum of squares
//
// Each reads every gradient once: 4 bytes per element in fp32, 2 in bf16. What differs is how much of the GPU reads, how often the
// host waits, and how many additions stand one after the other.

// Version 1. A kernel adds the squares of a tensor into at most 1024 partial sums, they are copied to the host, and the host adds them
// up (in double precision, since it costs nothing) and goes on to the next tensor. GPT-2 has 16 tensors: 16 times the GPU runs dry,
// and waits for a copy, the host and the next launch, ten microseconds or more, where all gradients of the 124M model, 498 MB in
// fp32, take 150 at an H100's 3.35 TB/s. And the norm ends up on the host, so that AdamW has to wait until it has been there and back.
struct Tensors {   // that the optimizer works on, as model_update finds them
    std::vector<OptTensor> t;
    std::vector<size_t> share;   // elements of one rank's share of each
    int blocks = 0;              // of the sum of squares
    void add(const OptTensor& tensor, size_t n) {
        t.push_back(tensor), share.push_back(n);
        if (n > 0) blocks += ceil_div(n, OPT_BLOCK) * (int)(tensor.n / n);
    }
};
__global__ void square_sum_1_kernel(float* partial, Grad grad, size_t n) {
    __shared__ float shared[8];
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        float g = grad_load(grad, i);
        sum += g * g;
    }
    sum = block_sum_256(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
constexpr int BLOCKS_1 = 1024;
float square_sum_1(float* partial, const Tensors& tensors) {   // partial (BLOCKS_1)
    double sum = 0;
    std::vector<float> on_host(BLOCKS_1);
    for (const OptTensor& t : tensors.t) {
        int blocks = std::min(ceil_div(t.n, OPT_BLOCK), BLOCKS_1);
        if (blocks == 0) continue;
        square_sum_1_kernel<<<blocks, 256>>>(partial, t.grad, t.n);
        cudaCheck(cudaMemcpy(on_host.data(), partial, blocks * sizeof(float), cudaMemcpyDeviceToHost));   // waits for the kernel
        for (int b = 0; b < blocks; b++) sum += (double)on_host[b];
    }
    return (float)sum;
}

// Version 2, the trainer's, launched as model_update does: the sums of all blocks of all tensors lie in one array, and a last launch
// adds them up. The host waits for nothing, and the result stays where it is used. A block takes 2048 elements: at 124M there are
// 60784, and the whole GPU reads until the end. (With a block per tensor 16 blocks would be at work, and that of wte, a third of the
// model, long after the others. And a thread would add 150000 squares one after the other: in fp32, which has 24 bits, what is 2^24
// times smaller than a sum is lost.) A thread takes 8 neighbours at a time, 16 bytes in bf16, where it loaded 2 before. It adds 8
// squares, then there are trees, and 238 partial sums per thread in the last kernel: less than 300 additions stand one after the
// other. The partial sums cost 4 bytes for 2048 elements.
void square_sum_2(float* sum, float* partial, const Tensors& tensors) {   // partial (blocks)
    float* at = partial;
    for (size_t k = 0; k < tensors.t.size(); k++) {
        const size_t share = tensors.share[k];
        if (share == 0) continue;
        const dim3 grid(ceil_div(share, OPT_BLOCK), tensors.t[k].n / share);
        square_sum_kernel<<<grid, 256>>>(at, tensors.t[k].grad, share);
        at += grid.x * grid.y;
    }
    sum_kernel<<<1, 256>>>(sum, partial, false, (unsigned)(at - partial));
}

// ---- versions of AdamW
//
// There is almost no arithmetic here and nothing to sum: what counts is bytes, launches, and how x is rounded.

// Version 1: one kernel for all of the formula, with m, v and x in registers between its lines: 22 bytes. (One kernel for each
// line, as when every operation on tensors is a call into a library, would move 36.) But a thread takes one element, so a load is 2 or
// 4 bytes where the hardware moves 16 at once.
//
// And how it rounds is wrong. bf16 has 8 bits: the neighbours of a weight of 1 are 0.004 and 0.008 away. AdamW's update is about
// lr, say 0.0001. The nearest bf16 to 1 - 0.0001 is 1, in this step and in all that follow: a weight that is large beside lr never
// moves. Cutting off the lower bits instead makes it worse: 1 - 0.0001 becomes 0.996, 39 times the update, and 1 + 0.0001 becomes
// 1, none of it; all weights are drawn to 0. test_lost_updates shows it.
enum Rounding { NEAREST, CUT, STOCHASTIC };
template <Rounding ROUNDING> __global__ void adamw_1_kernel(OptTensor t, const Verdict* verdict, AdamW a) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= t.n || verdict->skip) return;
    float g = grad_load(t.grad, i) * verdict->clip, x = (float)t.param[i];
    float m = a.beta1 * t.m[i] + (1 - a.beta1) * g;
    float v = a.beta2 * t.v[i] + (1 - a.beta2) * g * g;
    x -= a.lr * ((m / a.correction1) / (sqrtf(v / a.correction2) + a.eps) + t.decay * x);
    t.m[i] = m;
    t.v[i] = v;
    if constexpr (ROUNDING == CUT && !kFP32) t.param[i] = __float2bfloat16_rz(x);
    else t.param[i] = (floatX)x;
}
template <Rounding ROUNDING> void adamw_1(const Tensors& tensors, const Verdict* verdict, AdamW a) {
    for (const OptTensor& t : tensors.t)
        if (t.n > 0) adamw_1_kernel<ROUNDING><<<ceil_div(t.n, 256), 256>>>(t, verdict, a);
}

// Version 2, the trainer's, launched as model_update does: 8 elements per thread, in loads of 16 bytes. The bytes stay: g 2, m 4 + 4, v 4 + 4, x 2 + 2. What is new is the rounding. 16 random
// bits are added below those that bf16 keeps, and then it is cut: 1 - 0.0001 becomes 0.996 in one of 39 steps and 1 in the others,
// which is right on average, for every value. The bits are a hash of seed, step, tensor and element: no state to keep, the same in
// any order of threads, on any number of GPUs that share the tensor, and after a resume.
//
// A master copy in fp32 leaves nothing to chance. It costs 4 + 4 bytes, less the reading of the weight: 28 bytes per step, and 4
// bytes of memory for each weight.
void adamw_2(const Tensors& tensors, const Verdict* verdict, AdamW a) {
    for (const OptTensor& t : tensors.t)
        if (t.n > 0) adamw_kernel<<<ceil_div(t.n, OPT_BLOCK), 256>>>(t, verdict, a);
}

// Only the trainer's knows master copies and shares.
const struct { const char* name; decltype(&adamw_2) run; Rounding rounding; } versions[] = {
    {"version 1", adamw_1<NEAREST>, NEAREST}, {"version 1, cut", adamw_1<CUT>, CUT}, {"the trainer's", adamw_2, STOCHASTIC}};
enum { ONE, ONE_CUT, TRAINER };

// ---- tables of tensors

struct Tensor {
    size_t n;   // of a share
    DType grad_type;
    bool master = false;
    float decay = 0;
    size_t offset = 0;
    int shares = 1;
    size_t size() const { return n * shares; }
};
struct State {   // of one tensor, on the host
    std::vector<float> grad, m, v, master;   // master: empty without a master copy
    std::vector<floatX> param;
    bool operator==(const State& s) const {
        return same_bits(grad, s.grad) && same_bits(m, s.m) && same_bits(v, s.v) && same_bits(param, s.param) &&
               same_bits(master, s.master);
    }
};
// Gradients of all magnitudes, m and v as they may have come to be by them. In the first step they are 0.
State random_state(const Tensor& t, Random& random, bool first_step = false) {
    State s;
    for (size_t i = 0; i < t.size(); i++) {
        const float scale = powf(10, -12 * random.uniform() * random.uniform()), x = (i % 7 == 3 ? 1.0f : 0.02f) * random.normal(),
                    g = scale * random.normal();
        const bool seen = i % 13 != 7;   // or a token that does not occur
        s.grad.push_back(!seen || i % 11 == 5 ? 0 : t.grad_type == BF16 ? (float)(__nv_bfloat16)g : g);
        s.m.push_back(!seen || first_step ? 0 : 0.3f * scale * random.normal());
        s.v.push_back(!seen || first_step ? 0 : scale * scale * random.uniform());
        s.param.push_back((floatX)(i % 17 == 1 ? 0 : x));
        if (t.master) s.master.push_back(i % 17 == 1 ? 0 : x);
    }
    return s;
}

// All of them on the device, each tensor with memory of its own that ends with it.
struct Device {
    struct Memory {
        GradBuffer grad;
        Buffer<float> m, v, master;
        Buffer<floatX> param;
        Memory(const Tensor& t)
            : grad(t.size(), t.grad_type), m(t.size()), v(t.size()), master(t.master ? t.size() : 0), param(t.size()) {}
    };
    std::vector<Tensor> tensors;
    std::vector<std::unique_ptr<Memory>> memory;
    Buffer<Verdict> verdict;
    Tensors table;

    Device(const std::vector<Tensor>& tensors) : tensors(tensors), verdict(1) {
        for (const Tensor& t : tensors) {
            memory.push_back(std::make_unique<Memory>(t));
            Memory& d = *memory.back();
            table.add({d.param.p, d.grad.grad(), d.m.p, d.v.p, t.master ? d.master.p : nullptr, t.size(), t.offset, t.decay,
                       (unsigned)memory.size() - 1}, t.n);
        }
    }
    void write(const std::vector<State>& states, float clip = 1, bool skip = false) {
        for (size_t k = 0; k < tensors.size(); k++) {
            Memory& d = *memory[k];
            d.grad.write(states[k].grad), d.m.write(states[k].m), d.v.write(states[k].v), d.param.write(states[k].param);
            if (tensors[k].master) d.master.write(states[k].master);
        }
        verdict.write({Verdict{NAN, NAN, NAN, NAN, clip, skip}});   // what a step does depends on the last two
    }
    std::vector<State> read() {
        std::vector<State> states;
        for (auto& d : memory) states.push_back({d->grad.read(), d->m.read(), d->v.read(), d->master.read(), d->param.read()});
        return states;
    }
};
std::vector<State> random_states(const std::vector<Tensor>& tensors, Random random, bool first_step = false) {
    std::vector<State> states;
    for (const Tensor& t : tensors) states.push_back(random_state(t, random, first_step));
    return states;
}

// Sizes around what a warp takes and what a block does, and none at all; of both types, with and without a master copy, in one share
// and in several; every fifth begins far into its whole.
std::vector<Tensor> tensors_of(int count) {
    const size_t sizes[] = {2056, 8, 4096, 2040, 0, 2048, 24, 6152, 16, 4088, 4104, 40, 248, 256, 264, 1000};
    std::vector<Tensor> tensors;
    for (int k = 0; k < count; k++)
        tensors.push_back({sizes[(k + count) % 16], (k + count / 4) % 2 ? BF16 : F32, k % 4 >= 2, k % 3 ? 0.1f : 0.0f, k % 5 == 4 ? ((size_t)1 << 33) + 8 : 0, k % 3 == 1 ? 3 : 1});
    return tensors;
}

// ---- tests of the norm

constexpr int STEPS = 128;   // that are remembered, not taken from the trainer

StepState judge(Buffer<StepState>& state, float loss_scale, float grad_clip, float skip_loss_z, float skip_grad_z) {
    verdict_kernel<<<1, 1>>>(state.p, loss_scale, grad_clip, skip_loss_z, skip_grad_z);
    return state.read()[0];
}

void test_norm(uint64_t seed) {
    Property parts("a block's sum of squares"), sum("the sum of all squares"), again("the same bits in a second run"),
        norm("the norm, by the verdict"), clipped("clip"), simple("version 1: the sum"),
        nan("a NaN or an infinity anywhere: the step is skipped, and not remembered; other blocks' sums keep their bits");
    std::vector<std::vector<Tensor>> tables;
    for (int count = 1; count <= 16; count++) tables.push_back(tensors_of(count));
    tables.push_back({{256 * OPT_BLOCK, BF16}, {OPT_BLOCK + 8, BF16}});   // 258 partial sums
    int number = 0;
    for (std::vector<Tensor> tensors : tables) {
        const bool whole = ++number % 2;   // version 1 knows no shares
        for (Tensor& t : tensors)
            if (whole) t.shares = 1;
        set_case("table %d: %zu tensors", number, tensors.size());
        const std::vector<State> states = random_states(tensors, Random(seed, 100 + number));
        Device d(tensors);
        d.write(states);
        const Tensors& table = d.table;
        Buffer<float> squares(table.blocks), squares2(table.blocks), total(1), total2(1), partial(BLOCKS_1);
        square_sum_2(total.p, squares.p, table);
        square_sum_2(total2.p, squares2.p, table);
        const std::vector<float> blocks = squares.read(), ours = total.read();
        again.is(same_bits(blocks, squares2.read()) && same_bits(ours, total2.read()), "other bits");
        double reference = 0;
        size_t block = 0;
        for (size_t t = 0; t < tensors.size(); t++)
            for (size_t share = 0; share < states[t].grad.size(); share += tensors[t].n)
                for (size_t first = 0; first < tensors[t].n; first += OPT_BLOCK, block++) {
                    double part = 0;
                    for (size_t i = first; i < std::min(tensors[t].n, first + OPT_BLOCK); i++)
                        part += (double)states[t].grad[share + i] * states[t].grad[share + i];
                    parts.close(block, blocks[block], part, part, EPS32);
                    reference += part;
                }
        parts.is(block == (size_t)table.blocks, "another number of blocks");
        sum.close(0, ours[0], reference, reference, EPS32);
        if (whole) simple.close(0, square_sum_1(partial.p, table), reference, reference, EPS32);

        // as model_update goes on: the sum is part of the state, and the verdict is made of it
        Buffer<StepState> state(1);
        StepState s = state.read()[0];
        s.loss_sum = 3;
        s.history.count = 5;
        auto judged = [&](float limit) {
            state.write({s});
            square_sum_2(&state.p->square_sum, squares.p, table);
            return judge(state, 1, limit, 0, 0);
        };
        const double root = sqrt(reference), ratio = number % 3 ? 0.5 : 2;
        const StepState after = judged((float)(root * ratio));
        norm.close(0, after.verdict.grad_norm, root, root, EPS32);
        clipped.close(0, after.verdict.clip, std::min(ratio, 1.0), 1, EPS32);
        clipped.is(after.verdict.skip == 0 && after.history.count == 6, "skipped");

        for (bool last : {false, true})   // in the first element of the first tensor, or in the last of the last
            for (float value : {NAN, INFINITY, -1e20f}) {
                const size_t t = last ? tensors.size() - 1 : 0;
                if (tensors[t].n == 0) continue;
                set_case("table %d: %g in the %s tensor", number, value, last ? "last" : "first");
                std::vector<State> broken = states;
                (last ? broken[t].grad.back() : broken[t].grad.front()) = value;
                d.write(broken);
                const StepState bad = judged(1);
                nan.equal(0, bad.verdict.grad_norm, std::isnan(value) ? NAN : INFINITY);
                nan.is(bad.verdict.skip == 1, "not skipped");
                nan.is(memcmp(&bad.history, &s.history, sizeof(History)) == 0, "remembered");
                check_reach(nan, squares.read(), blocks, [&](size_t i) { return i == (last ? blocks.size() - 1 : 0); }, "blocks");
            }
    }
    printf("the norm\n");
    report({&parts, &sum, &again, &norm, &clipped, &nan, &simple});
}

// Numbers whose sum is known: ones are counted, denormals are kept, and what a large sum has no bits for is lost. 4096^2 = 2^24,
// whose neighbours are 2 apart: adding 1 to it changes nothing. It stands in element 0 of a tensor, with a 1 in every 256th element
// after it: those that meet it in its block are lost.
void test_known() {
    Property p("sums that are known, in all versions", "every bit");
    Buffer<float> partial(BLOCKS_1), total(1);
    const struct { const char* name; size_t n; float first, every_256th, others; double sum; } cases[] = {
        {"ones", 5000, 1, 1, 1, 5000},
        {"squares that are denormal", 4096, 0x1p-74f, 0x1p-74f, 0x1p-74f, 0x1p-136},
        {"a sum beyond the largest number", 8, 0x1.6cp62f, 0, 0x1.6cp62f, INFINITY},
        {"2^24 and 1024 times 1", 256 * 1024 + 8, 4096, 1, 0, 16777216 + 1024 - 8}};
    for (auto& c : cases)
        for (DType type : {F32, BF16}) {
            set_case("%s, %s", c.name, dtype_name(type));
            Device d({{c.n, type}});
            std::vector<float> values(c.n, c.others);
            for (size_t i = 0; i < c.n; i += 256) values[i] = i ? c.every_256th : c.first;
            d.memory[0]->grad.write(values);
            p.equal(1, square_sum_1(partial.p, d.table), c.sum);
            square_sum_2(total.p, partial.p, d.table);
            p.equal(2, total.read()[0], c.sum);
        }
    report({&p});
}

// ---- tests of the verdict

// Cases at the edge of each condition. The losses so far are 1 and 3 by turns: mean 2, standard deviation 1. The norms are 0 and 4:
// mean 2, standard deviation 2. All numbers are exact.
void test_edges() {
    Property p("limits, clipping, equal values, the ring's ends", "every bit");
    enum { TURNS, SAME };
    struct Case {
        const char* name;
        int history, count;
        float loss, square_sum, clip, loss_limit, grad_limit;
        Verdict expected;
        int count_after;
    };
    const float INF = INFINITY;
    const Case cases[] = {
        // loss, norm, their z, clip, skip
        {"127 steps seen", TURNS, 127, 4, 16, 0, 1, 1, {4, 4, NAN, NAN, 1, 0}, 128},
        {"128 steps seen, z at the limit", TURNS, 128, 4, 16, 0, 2, 1, {4, 4, 2, 1, 1, 0}, 129},
        {"254 steps seen", TURNS, 254, 4, 16, 0, 2, 1, {4, 4, 2, 1, 1, 0}, 255},
        {"255 steps seen: the counter goes back", TURNS, 255, 4, 16, 0, 2, 1, {4, 4, 2, 1, 1, 0}, 128},
        {"z of the loss above the limit", TURNS, 200, 4, 16, 0, 1.99f, 1, {4, 4, 2, 1, 1, 1}, 201},
        {"z of the norm above the limit", TURNS, 200, 4, 16, 0, 2, 0.99f, {4, 4, 2, 1, 1, 1}, 201},
        {"no limit of z", TURNS, 200, 4, 16, 0, 0, 0, {4, 4, 2, 1, 1, 0}, 201},
        {"one limit, of the loss", TURNS, 200, 4, 16, 0, 1, 0, {4, 4, 2, 1, 1, 1}, 201},
        {"one limit, of the norm", TURNS, 200, 4, 16, 0, 0, 0.5f, {4, 4, 2, 1, 1, 1}, 201},
        {"far below", TURNS, 200, -8, 0, 0, 1, 1, {-8, 0, -10, -1, 1, 0}, 201},
        {"at the mean", TURNS, 200, 2, 4, 0, 1, 1, {2, 2, 0, 0, 1, 0}, 201},
        {"equal values, and another", SAME, 128, 2, 4, 0, 1, 1, {2, 2, 0, 0, 1, 0}, 129},
        {"equal values, and far away", SAME, 128, 9, 100, 0, 1, 1, {9, 10, 0, 0, 1, 0}, 129},
        {"the norm below the clip", TURNS, 0, 4, 16, 4.5f, 0, 0, {4, 4, NAN, NAN, 1, 0}, 1},
        {"the norm at the clip", TURNS, 0, 4, 16, 4, 0, 0, {4, 4, NAN, NAN, 1, 0}, 1},
        {"the norm above the clip", TURNS, 0, 4, 16, 1, 0, 0, {4, 4, NAN, NAN, 0.25f, 0}, 1},
        {"a norm of 0", TURNS, 0, 4, 0, 1, 0, 0, {4, 0, NAN, NAN, 1, 0}, 1},
        {"a norm of 0, no clip", TURNS, 0, 4, 0, 0, 0, 0, {4, 0, NAN, NAN, 1, 0}, 1},
        {"a loss of NaN", TURNS, 200, NAN, 16, 2, 9, 9, {NAN, 4, NAN, 1, 0.5f, 1}, 200},
        {"a loss of inf", TURNS, 200, INF, 16, 2, 0, 0, {INF, 4, INF, 1, 0.5f, 1}, 200},
        {"a loss of -inf", TURNS, 200, -INF, 16, 2, 9, 9, {-INF, 4, -INF, 1, 0.5f, 1}, 200},
        {"a norm of NaN", TURNS, 200, 4, NAN, 2, 0, 0, {4, NAN, 2, NAN, 1, 1}, 200},
        {"a norm of inf", TURNS, 255, 4, INF, 2, 0, 0, {4, INF, 2, INF, 0, 1}, 255},
        {"a norm of inf, and a clip of inf", TURNS, 0, 4, INF, INF, 0, 0, {4, INF, NAN, NAN, 1, 1}, 0},
        {"a negative sum of squares", TURNS, 127, 4, -1, 2, 0, 0, {4, NAN, NAN, NAN, 1, 1}, 127},
    };
    printf("the verdict\n");
    for (const Case& c : cases) {
        set_case("%s", c.name);
        StepState s;
        memset(&s, 0xff, sizeof s);
        s.loss_sum = 1024 * c.loss;
        s.square_sum = c.square_sum;
        s.history.count = c.count;
        for (int w : {0, 1})
            for (int i = 0; i < std::min(c.count, STEPS); i++)
                s.history.value[w][i] = c.history == SAME ? 2 : w == 0 ? 1 + 2 * (i % 2) : 4 * (i % 2);
        Buffer<StepState> state({s});
        const StepState after = judge(state, 1 / 1024.0f, c.clip, c.loss_limit, c.grad_limit);
        const Verdict &v = after.verdict, &e = c.expected;
        const double ours[] = {v.loss, v.grad_norm, v.loss_z, v.grad_z, v.clip, (double)v.skip, (double)after.history.count,
                               after.loss_sum, after.square_sum},
                     expected[] = {e.loss, e.grad_norm, e.loss_z, e.grad_z, e.clip, (double)e.skip, (double)c.count_after,
                                   s.loss_sum, s.square_sum};
        for (int i = 0; i < 9; i++) p.equal(i, ours[i], expected[i]);
        if (c.count_after != c.count)
            for (int w : {0, 1}) s.history.value[w][c.count % STEPS] = w == 0 ? e.loss : e.grad_norm;
        s.history.count = after.history.count;
        p.is(memcmp(&s.history, &after.history, sizeof(History)) == 0, "another history");
    }
    report({&p});
}

// ---- AdamW's reference, in double precision, which counts the roundings on its way

// A number, and how far from it fp32 may come out. Every operation passes on the errors of its operands and adds a rounding: half a
// unit in the last place of the result, or half the smallest step that there is.
struct Real {
    double x, error;
    Real(double x, double error = 0) : x(x), error(error) {}
};
Real rounded(double x, double error) { return Real(x, error + EPS32 * (fabs(x) + error) + 0x1p-150); }
Real operator+(Real a, Real b) { return rounded(a.x + b.x, a.error + b.error); }
Real operator-(Real a, Real b) { return rounded(a.x - b.x, a.error + b.error); }
Real operator*(Real a, Real b) { return rounded(a.x * b.x, fabs(a.x) * b.error + fabs(b.x) * a.error + a.error * b.error); }
Real operator/(Real a, Real b) {
    return rounded(a.x / b.x, (a.error + fabs(a.x / b.x) * b.error) / (fabs(b.x) - b.error));
}
Real root(Real a) {   // |sqrt a - sqrt b| is |a - b| / (sqrt a + sqrt b), and never more than sqrt |a - b|
    return rounded(sqrt(a.x), std::min(sqrt(a.error), a.error / (sqrt(a.x) + sqrt(std::max(a.x - a.error, 0.0)))));
}

struct Update { Real m, v, x; };
Update reference(double g, double m_before, double v_before, double x_before, float clip, float decay, const AdamW& a) {
    const Real clipped = Real(g) * clip, one = 1, x = x_before;
    Real m = Real(a.beta1) * m_before + (one - a.beta1) * clipped;
    Real v = Real(a.beta2) * v_before + (one - a.beta2) * clipped * clipped;
    return {m, v, x - Real(a.lr) * ((m / a.correction1) / (root(v / a.correction2) + a.eps) + Real(decay) * x)};
}

// What an fp32 number becomes in floatX. bf16 has 8 bits, so its neighbours below 2^e are 2^(e - 8) apart, and 2^-133 at least.
float round_reference(float x, Rounding rounding, uint32_t random) {
    if (kFP32 || !std::isfinite(x) || x == 0) return x;
    int e;
    frexp((double)x, &e);   // |x| is in [2^(e-1), 2^e)
    double step = ldexp(1, std::max(e - 8, -133)), steps = fabs((double)x) / step, below = floor(steps), part = steps - below;
    bool odd = fmod(below, 2) == 1;
    bool up = rounding == CUT ? false : rounding == NEAREST ? part > 0.5 || (part == 0.5 && odd)
                                     : part + (random % 65536) / 65536.0 >= 1;
    return (float)copysign((below + up) * step, (double)x);
}

AdamW hyper(uint64_t seed, uint64_t step, int t) {
    return {6e-4f, 0.9f, 0.95f, 1e-8f, (float)(1 - pow(0.9, t)), (float)(1 - pow(0.95, t)), seed, step};
}

// ---- tests of AdamW

// Compares one element after a step with the reference.
struct Comparison {
    Property moments, master, weight;
    size_t decided = 0, undecided = 0;

    void element(Rounding rounding, const Tensor& t, const AdamW& a, int which, float clip, size_t i, const State& before,
                 const State& after) {
        const float x = t.master ? before.master[i] : (float)before.param[i];
        const Update r = reference(before.grad[i], before.m[i], before.v[i], x, clip, t.decay, a);
        moments.within(i, after.m[i], r.m.x, r.m.error);
        moments.within(i, after.v[i], r.v.x, r.v.error);
        weights(rounding, t, a.seed, a.step, which, i, r.x, after);
    }
    void weights(Rounding rounding, const Tensor& t, uint64_t seed, uint64_t step, int which, size_t i, Real x, const State& after) {
        if (t.master) {
            master.within(i, after.master[i], x.x, x.error);
            master.equal(i, (float)after.param[i], (float)(floatX)after.master[i]);
        } else if (kFP32) {
            weight.within(i, (float)after.param[i], x.x, x.error);
        } else {   // all that the fp32 number may be is rounded in the same direction, but for one element in a hundred at most
            const uint32_t random = (uint32_t)hash64(seed, step * ROUNDING_STREAMS + which, t.offset + i);
            const float low = round_reference(nextafterf((float)(x.x - x.error), -INFINITY), rounding, random),
                        high = round_reference(nextafterf((float)(x.x + x.error), INFINITY), rounding, random),
                        ours = (float)after.param[i];
            weight.is(low <= ours && ours <= high, "a weight was rounded to where it must not be");
            (low == high ? decided : undecided)++;
        }
    }
};

void test_step(uint64_t seed) {
    const char* counted = "the roundings that the reference counts";
    const char* bits = kFP32 ? counted : "every bit, where those leave no doubt";
    Comparison shipped = {{"m and v", counted}, {"master copy, and the weight that is the nearest to it", counted},
                           {"weight: rounded as seed, step, tensor and element say", bits}},
               simple = {{"version 1: m and v", counted}, {""}, {"version 1: weight, nearest or cut", bits}};
    Property again("the same bits in a second run"), skipped("a step that is skipped changes nothing", "every bit"),
        untouched("gradients stay as they are", "every bit");
    for (int count : {1, 2, 5, 16})
        for (int version : {TRAINER, ONE, ONE_CUT})
            for (int t : {1, 3, 1000}) {
                const auto& v = versions[version];
                const bool trainers = version == TRAINER;
                set_case("%s, %d tensors, step %d", v.name, count, t);
                std::vector<Tensor> tensors = tensors_of(count);
                for (Tensor& s : tensors)
                    if (!trainers) s.master = false, s.shares = 1;
                std::vector<State> before = random_states(tensors, Random(seed, count * 10000 + t), t == 1);
                const float clip = t == 3 ? 0.37f : 1;
                const AdamW a = hyper(seed, t + 7, t);
                Device d(tensors);
                auto step = [&](float clip, bool skip) {
                    d.write(before, clip, skip);
                    v.run(d.table, d.verdict.p, a);
                    return d.read();
                };
                const std::vector<State> after = step(clip, false);
                for (int k = 0; k < count; k++) {
                    for (size_t i = 0; i < tensors[k].size(); i++)
                        (trainers ? shipped : simple).element(v.rounding, tensors[k], a, k, clip, i, before[k], after[k]);
                    untouched.is(same_bits(before[k].grad, after[k].grad), "a gradient has changed");
                }
                if (!trainers) continue;
                const std::vector<State> second = step(clip, false);
                for (State& s : before)   // with what steps are skipped for
                    for (size_t i = 0; i < s.grad.size(); i += 5) s.grad[i] = i % 2 ? (float)(__nv_bfloat16)NAN : INFINITY;
                const std::vector<State> third = step(NAN, true);
                for (int k = 0; k < count; k++) {
                    again.is(after[k] == second[k], "other bits");
                    skipped.is(before[k] == third[k], "something has changed");
                }
            }
    set_case("all weights");
    shipped.weight.is(shipped.undecided * 100 <= shipped.decided, "for too many it is not clear how they are to be rounded");
    printf("AdamW\n");
    report({&shipped.moments, &shipped.master, &shipped.weight, &untouched, &again, &skipped, &simple.moments, &simple.weight});
}

// ---- tests of AdamW in 8 bits

// Dettmers et al.: the values of a decade are the means of neighbours among evenly spaced points of [0.1, 1].
std::vector<double> map_reference(bool with_sign) {
    std::vector<double> map = {0, 1};
    for (int decade = 0; decade < 7; decade++) {
        const int values = (1 << decade) * (with_sign ? 1 : 2);
        for (int i = 0; i < values; i++) {
            const double value = pow(10, decade - 6) * (0.1 + 0.9 * (i + 0.5) / values);
            map.push_back(value);
            if (with_sign) map.push_back(-value);
        }
    }
    std::sort(map.begin(), map.end());
    return map;
}
void test_8bits(uint64_t seed) {
    const char* counted = "the roundings that the reference counts";
    Property map("8 bits: the map", "4 roundings"), scale("8 bits: a block's scale is its largest |m|, or v", counted),
        code("8 bits: an element is the nearest value", counted), zero("8 bits: only a v of 0 is 0"),
        again("8 bits: the same bits in a second run"), skipped("8 bits: a step that is skipped changes nothing", "every bit");
    Comparison weight = {{""}, {"8 bits: master copy, and the weight that is the nearest to it", counted},
                         {"8 bits: weight", kFP32 ? counted : "every bit, where those leave no doubt"}};
    std::vector<float> maps;
    for (bool with_sign : {true, false}) {
        const std::vector<float> ours = dynamic_map(with_sign);
        const std::vector<double> theirs = map_reference(with_sign);
        map.is(ours.size() == 256 && theirs.size() == 256, "expected 256 values");
        for (int i = 0; i < 256; i++) map.within(i, ours[i], theirs[i], 4 * EPS32 * fabs(theirs[i]));
        maps.insert(maps.end(), ours.begin(), ours.end());
    }
    Buffer<float> device_maps(maps);
    Random random(seed, 20);
    for (size_t n : {8, 248, 256, 264, 2040, 2048, 2056, 6152})
        for (int shares : {1, 3})
            for (int t : {1, 3, 1000}) {
                const Tensor tensor = {n, t == 3 ? F32 : BF16, shares == 3, t > 1 ? 0.1f : 0.0f, t == 3 ? ((size_t)1 << 33) + 8 : 0, shares};
                set_case("%zu elements in %d shares, step %d", n, shares, t);
                State before = random_state(tensor, random, true);
                const size_t all = tensor.size(), each = ceil_div(n, 256), blocks = q8_blocks(all, n);
                map.is(blocks == each * shares, "another number of blocks");
                std::vector<uint8_t> codes[2];
                std::vector<float> absmax[2];
                for (int v : {0, 1}) {
                    for (size_t i = 0; i < all; i++) codes[v].push_back(t == 1 ? 0 : (uint8_t)random.bits());
                    for (size_t b = 0; b < blocks; b++) absmax[v].push_back(t == 1 || b % 5 == 4 ? 0 : powf(10, -6 * random.uniform()));
                }
                auto block_of = [&](size_t i) { return i / n * each + i % n / 256; };
                for (size_t i = 0; i < all; i++) {
                    before.m[i] = maps[codes[0][i]] * absmax[0][block_of(i)];
                    before.v[i] = maps[256 + codes[1][i]] * absmax[1][block_of(i)];
                }
                Device d({tensor});
                Buffer<uint8_t> m(all), v(all);
                Buffer<float> m_absmax(blocks), v_absmax(blocks);
                const float clip = t == 3 ? 0.37f : 1;
                const AdamW a = hyper(seed, t + 7, t);
                auto step = [&](bool skip) {
                    d.write({before}, clip, skip);
                    m.write(codes[0]), v.write(codes[1]), m_absmax.write(absmax[0]), v_absmax.write(absmax[1]);
                    const Moments8 moments = {m.p, v.p, m_absmax.p, v_absmax.p, device_maps.p};
                    adamw8_kernel<<<dim3(ceil_div(n, OPT_BLOCK), shares), 256>>>(d.table.t[0], moments, d.verdict.p, a, n);
                    return d.read()[0];
                };
                const State after = step(false);
                const std::vector<uint8_t> after_codes[2] = {m.read(), v.read()};
                const std::vector<float> after_absmax[2] = {m_absmax.read(), v_absmax.read()};
                std::vector<double> most[2], error[2];
                most[0].resize(blocks), most[1] = error[0] = error[1] = most[0];
                std::vector<Update> expected;
                for (size_t i = 0; i < all; i++) {
                    const float x = tensor.master ? before.master[i] : (float)before.param[i];
                    expected.push_back(reference(before.grad[i], before.m[i], before.v[i], x, clip, tensor.decay, a));
                    weight.weights(STOCHASTIC, tensor, a.seed, a.step, 0, i, expected[i].x, after);
                    for (int k : {0, 1}) {
                        const Real r = k ? expected[i].v : expected[i].m;
                        most[k][block_of(i)] = std::max(most[k][block_of(i)], fabs(r.x));
                        error[k][block_of(i)] = std::max(error[k][block_of(i)], r.error);
                    }
                }
                for (int k : {0, 1}) {
                    for (size_t b = 0; b < blocks; b++) scale.within(b, after_absmax[k][b], most[k][b], error[k][b]);
                    for (size_t i = 0; i < all; i++) {
                        const double of = after_absmax[k][block_of(i)], x = (k ? expected[i].v : expected[i].m).x;
                        double nearest = INFINITY;
                        for (int c = 0; c < 256; c++) nearest = std::min(nearest, fabs(maps[256 * k + c] * of - x));
                        const int found = after_codes[k][i];
                        if (k && found == 1) nearest = maps[257] * of;   // it may be nearer to 0
                        code.within(i, fabs(maps[256 * k + found] * of - x), nearest, error[k][block_of(i)] + 8 * EPS32 * of);
                        if (k) zero.is(found > 0 || x <= error[1][block_of(i)], "a v has become 0");
                    }
                }
                again.is(after == step(false) && same_bits(m.read(), after_codes[0]) && same_bits(v.read(), after_codes[1]), "other bits");
                skipped.is(before.param == step(true).param && same_bits(m.read(), codes[0]) && same_bits(v_absmax.read(), absmax[1]),
                           "something has changed");
            }
    printf("AdamW in 8 bits\n");
    report({&map, &scale, &code, &zero, &weight.master, &weight.weight, &again, &skipped});
}

// ---- tests of AdaLomo

constexpr double LOMO_ROUNDINGS = 300 * EPS32;   // a lane adds up to 128 squares one after the other, and there are trees of these

void test_adalomo(uint64_t seed) {
    const char* bound = "300 roundings";
    Property factors("AdaLomo: second moments of rows and columns", bound), squares("AdaLomo: the sum of all squares", bound),
        again("AdaLomo: the same bits in a second run"), finite("AdaLomo: rows without a gradient, beside large ones, stay as they are"),
        nan("AdaLomo: a gradient that is not finite changes nothing, and is seen by the norm", "every bit");
    Comparison weight = {{""}, {"AdaLomo: master copy, and the weight that is the nearest to it", bound},
                         {"AdaLomo: weight", kFP32 ? bound : "every bit, where those leave no doubt"}};
    const struct { size_t rows, cols, room; } shapes[] = {{1, 8, 1}, {1, 4096, 1}, {3, 264, 1}, {300, 40, 300}, {300, 40, 128}, {70, 2056, 70}, {513, 256, 100}};
    Random random(seed, 30);
    int number = 0;
    for (auto& shape : shapes)
        for (int t : {1, 5}) {
            const size_t R = shape.rows, C = shape.cols, n = R * C;
            const Tensor tensor = {n, number % 2 ? F32 : BF16, number++ % 3 == 0, t > 1 ? 0.1f : 0.0f, t > 1 ? ((size_t)1 << 33) + 8 : 0};
            set_case("%zu x %zu, %zu rows at a time, step %d", R, C, shape.room, t);
            State before = random_state(tensor, random, true);
            for (size_t i = 0; i < n; i++)   // rows without a gradient, as an embedding has them
                if (R > 4 && i / C % 3 == 1) before.grad[i] = 0;
            std::vector<float> rows(R), cols(C);
            for (float& r : rows) r = t == 1 ? 0 : powf(10, -8 * random.uniform());
            for (float& c : cols) c = t == 1 ? 0 : powf(10, -8 * random.uniform());
            const AdaLomo a = {t == 1 ? 0.05f : 0.5f, tensor.decay, (float)(1 - pow(t, -0.8)), seed, (uint64_t)t + 7};
            Device d({tensor});
            Buffer<float> v_rows(R), v_cols(C), scratch(LomoScratch::floats(R, C)), total(1);
            GradBuffer part(shape.room * C, tensor.grad_type);
            const OptTensor& o = d.table.t[0];
            auto step = [&](const State& from) {
                d.write({from});
                v_rows.write(rows), v_cols.write(cols), total.write({1});
                const bool parts = shape.room < R;
                const LomoMatrix m = {o.param, parts ? part.grad() : o.grad, v_rows.p, v_cols.p, o.master, R, C, tensor.offset, tensor.decay, 0};
                auto copy = [&](size_t first, size_t count) {
                    const size_t bytes = dtype_size(tensor.grad_type);
                    cudaCheck(cudaMemcpy(part.memory.p, (o.grad + first * C).p, count * C * bytes, cudaMemcpyDeviceToDevice));
                };
                adalomo(m, LomoScratch(scratch.p, R, C), total.p, a, shape.room, parts ? copy : std::function<void(size_t, size_t)>(), nullptr);
                return d.read()[0];
            };
            const State after = step(before);
            const std::vector<float> after_rows = v_rows.read(), after_cols = v_cols.read();
            std::vector<double> r(R, LOMO_EPS1), c(C, LOMO_EPS1), x(n);
            double sum = 0, mean = 0, weights = 0, updates = 0;
            for (size_t i = 0; i < n; i++) {
                const double g2 = (double)before.grad[i] * before.grad[i];
                r[i / C] += g2 / C, c[i % C] += g2 / R, sum += g2;
                x[i] = tensor.master ? before.master[i] : (float)before.param[i];
                weights += x[i] * x[i] / n;
            }
            squares.within(0, total.read()[0], 1 + sum, LOMO_ROUNDINGS * (1 + sum));
            for (size_t i = 0; i < R; i++) {
                r[i] = a.beta2 * rows[i] + (1 - (double)a.beta2) * r[i], mean += r[i] / R;
                factors.within(i, after_rows[i], r[i], LOMO_ROUNDINGS * r[i]);
            }
            for (size_t j = 0; j < C; j++) {
                c[j] = a.beta2 * cols[j] + (1 - (double)a.beta2) * c[j];
                factors.within(j, after_cols[j], c[j], LOMO_ROUNDINGS * c[j]);
            }
            auto u = [&](size_t i) { return before.grad[i] / sqrt(r[i / C] * c[i % C] / mean); };
            for (size_t i = 0; i < n; i++) updates += u(i) * u(i) / n;
            const double rate = a.lr * std::max(1e-3, sqrt(weights)), size = rate / std::max(1.0, sqrt(updates));
            for (size_t i = 0; i < n; i++)
                weight.weights(STOCHASTIC, tensor, a.seed, a.step, 0, i,
                               Real(x[i] - size * u(i) - rate * tensor.decay * x[i], 2 * LOMO_ROUNDINGS * fabs(size * u(i)) + 4 * EPS32 * fabs(x[i])),
                               after);
            again.is(after == step(before) && same_bits(v_rows.read(), after_rows) && same_bits(v_cols.read(), after_cols), "other bits");
            if (R > 4) {
                State large = before;   // as gradients of 1e13 would be, so that a row without has 1e-43 of the mean
                std::fill(rows.begin(), rows.end(), 0), std::fill(cols.begin(), cols.end(), 0);
                for (float& g : large.grad) g *= tensor.grad_type == BF16 ? 0x1p40f : 1e13f;
                const State moved = step(large);
                for (size_t i = 0; i < n; i++) finite.is(std::isfinite((float)moved.param[i]), "a weight is no number");
                for (size_t i = C; i < 2 * C && tensor.decay == 0 && tensor.master; i++) finite.is(moved.master[i] == large.master[i], "it has moved");
            }
            for (float value : {NAN, -INFINITY, 1e20f}) {
                State broken = before;
                broken.grad[n - 3] = value;
                const State kept = step(broken);
                nan.is(same_bits(kept.param, before.param) && same_bits(kept.master, before.master) && same_bits(v_rows.read(), rows) &&
                           same_bits(v_cols.read(), cols), "something has changed");
                nan.is(!std::isfinite(total.read()[0]), "the sum of squares is finite");
            }
        }
    set_case("all weights");
    weight.weight.is(weight.undecided * 50 <= weight.decided, "for too many it is not clear how they are to be rounded");
    printf("AdaLomo\n");
    report({&factors, &squares, &weight.master, &weight.weight, &again, &finite, &nan});
}

// What is no number goes where its element is and nowhere else; what overflows is still well defined.
void test_special(uint64_t seed) {
    Property nan("a NaN or an infinity reaches its element alone, in m, v and the weight as the formula says"),
        large("a square that overflows: x does not move");
    for (bool master : {false, true}) {
        const Tensor t = {2048 + 80, F32, master};
        Random random(seed, 8);
        State clean = random_state(t, random);
        clean.grad[2090] = 1e30f;   // m is finite, v is infinite: a quotient of 0
        State odd = clean;
        odd.grad[3] = NAN;
        odd.grad[292] = -INFINITY;
        odd.m[581] = NAN;
        odd.v[870] = NAN;
        odd.param[1159] = (floatX)NAN, odd.param[2080] = (floatX)INFINITY;
        if (master) odd.master[1159] = NAN, odd.master[2080] = INFINITY;
        Device d({t});
        auto step = [&](const State& s) {
            d.write({s});
            adamw_2(d.table, d.verdict.p, hyper(seed, 9, 9));
            return d.read()[0];
        };
        const State before = step(clean), after = step(odd);
        set_case("%s", master ? "master" : "no master");
        check_reach(nan, after.m, before.m, [](size_t i) { return i == 3 || i == 292 || i == 581; }, "m");
        check_reach(nan, after.v, before.v, [](size_t i) { return i == 3 || i == 292 || i == 870 || i == 2090; }, "v");
        // inf / inf is no number, and neither is decay * inf without decay
        check_reach(nan, after.param, before.param, [](size_t i) { return (i < 1160 && i % 289 == 3) || i == 2080; }, "weight");
        large.equal(0, (float)after.param[2090], (float)clean.param[2090]);
        large.is(std::isfinite(after.m[2090]) && after.v[2090] == INFINITY, "m is not finite, or v is");
    }
    report({&nan, &large});
}

// Index arithmetic beyond 2^31 and 2^32: the first block, those at 2^31 and 2^32, and the last.
template <class T> void test_far(uint64_t seed) {
    const DType type = sizeof(T) == 4 ? F32 : BF16;
    const size_t window = OPT_BLOCK, tail = 24, n = ((size_t)1 << 32) + window + tail, blocks = ceil_div(n, OPT_BLOCK);
    set_case("2^32 + %zu elements, gradients in %s", window + tail, dtype_name(type));
    Property p("squares and AdamW beyond 2^32 elements", dtype_name(type));
    Random random(seed, 300 + type);
    const State s = random_state({window, type}, random);
    Far<floatX> param(n, s.param, 8, 8);
    Far<T> grad(n, std::vector<T>(s.grad.begin(), s.grad.end()), 8, 8);
    Far<float> m(n, s.m, 8, 8), v(n, s.v, 8, 8), partial(blocks, 1, 1, 1);
    Buffer<Verdict> verdict({Verdict{0, 0, 0, 0, 1, 0}});
    const AdamW a = hyper(seed, 1 << 20, 1 << 20);
    for (size_t at : {(size_t)0, (size_t)1 << 31, (size_t)1 << 32, n - tail}) {
        const size_t count = std::min(window, n - at);
        param.at = grad.at = m.at = v.at = at, partial.at = at / OPT_BLOCK;
        param.rows = grad.rows = m.rows = v.rows = count / 8;
        check_far(p, {&param, &grad, &m, &v, &partial}, {(int64_t)(at / OPT_BLOCK)}, [&](bool far) {
            const Grad g = {grad.p(far), type};
            const size_t offset = ((size_t)3 << 33) + (far ? 0 : at), all = far ? n : count;
            square_sum_kernel<<<ceil_div(all, OPT_BLOCK), 256>>>(partial.p(far), g, all);
            const OptTensor tensor = {param.p(far), g, m.p(far), v.p(far), nullptr, all, offset, 0.1f, 1};
            adamw_kernel<<<ceil_div(all, OPT_BLOCK), 256>>>(tensor, verdict.p, a);
        });
    }
    report({&p});
}

// ---- rounding by itself

__global__ void round_kernel(floatX* out, const float* x, const uint32_t* random, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = round_stochastic(x[i], random[i]);
}
void test_rounding(uint64_t seed) {
    if (kFP32) return;   // there is nothing to round
    Property p("stochastic rounding: every bf16 stays, NaN and infinities too; ties go up in half of the cases", "every bit");
    std::vector<float> x;
    std::vector<uint32_t> r;
    auto add = [&](uint32_t bits, uint32_t draw) {
        float value;
        memcpy(&value, &bits, 4);
        x.push_back(value), r.push_back(draw);
    };
    Random random(seed, 9);
    for (uint32_t bits = 0; bits < 65536; bits++) add(bits << 16, bits % 3 ? (uint32_t)random.bits() : 0xffffffffu);
    for (uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu}) add(bits, 0xffff);   // NaN in the bits that are cut
    // halfway, next to a bf16, across a power of two, denormal, beyond the largest
    for (uint32_t bits : {0x3f808000u, 0x3f818000u, 0x3f800001u, 0x3f7fffffu, 0x3f80ffffu, 0x00000001u, 0x00008000u, 0x0000ffffu,
                          0x007fffffu, 0x00800000u, 0x00801234u, 0x7f7effffu, 0x7f7f8000u, 0x7f7fffffu, 0x3e9a6b51u})
        for (uint32_t sign : {0u, 0x80000000u})
            for (uint32_t draw : {0u, 1u, 0x7fffu, 0x8000u, 0xffffu, 0x1234u}) add(bits | sign, 0xabcd0000u | draw);
    Buffer<float> inp(x);
    Buffer<uint32_t> draws(r);
    Buffer<floatX> out(x.size());
    round_kernel<<<ceil_div(x.size(), 256), 256>>>(out.p, inp.p, draws.p, (int)x.size());
    const std::vector<floatX> y = out.read();
    set_case("single values");
    for (size_t i = 0; i < x.size(); i++) p.equal(i, (float)y[i], round_reference(x[i], STOCHASTIC, r[i]));
    report({&p});
}

// Many small updates in one direction: where do weights of 1 come to be in bf16? The gradient is 1 or -1, so that each step is lr.
void test_lost_updates(uint64_t seed) {
    if (kFP32) return;
    const int STEPS = 500;
    const size_t n = 1024;
    const float LR = 1e-4f;
    Property average("many small updates: the mean of stochastically rounded weights", "5 standard deviations"),
        lost("many small updates: rounding to nearest loses them all; cutting loses those up, and goes down too far");
    printf("  %d updates of %g, weights of 1:            mean of %zu\n", STEPS, LR, n);
    for (float direction : {-1.0f, 1.0f})
        for (int version : {ONE, ONE_CUT, TRAINER}) {
            Device d({{n, BF16}});
            const std::vector<float> zeros(n, 0.0f), ones(n, 1.0f);
            d.write({{std::vector<float>(n, -direction), zeros, zeros, ones, std::vector<floatX>(n, (floatX)1.0f)}});
            for (int k = 1; k <= STEPS; k++) {
                AdamW a = hyper(seed, k, k);
                a.lr = LR;
                versions[version].run(d.table, d.verdict.p, a);
            }
            const double expected = 1 + direction * STEPS * (double)LR;
            double mean = 0;
            const State s = d.read()[0];
            for (floatX x : s.param) mean += (double)(float)x / n;
            set_case("%s, %s", versions[version].name, direction < 0 ? "down" : "up");
            printf("       %-27s   expected %.4f, is %.4f\n", case_name.c_str(), expected, mean);
            const double step = direction > 0 ? 0x1p-7 : 0x1p-8, p = LR / step;   // to the next bf16, and the chance to get there
            if (version == TRAINER) average.within(0, mean, expected, 5 * step * sqrt(STEPS * p * (1 - p) / n));
            else if (version == ONE_CUT && direction < 0) lost.is(mean < 0.1, "cutting should have taken more");
            else lost.equal(0, mean, 1);
        }
    report({&average, &lost});
}

// ---- what training starts from

// std sqrt(-2 log u1) cos(2 pi u2). logf and cosf may be off by 2 units in the last place, 4 roundings; the square root halves what
// is relative. The angle has the roundings of a product and of the constant 2 pi, and moves the cosine by as much.
void normal_within(Property& p, size_t i, float ours, uint64_t seed, int which) {
    double u1 = hash_uniform(hash64(seed, 2 * which, i)), u2 = hash_uniform(hash64(seed, 2 * which + 1, i));
    double radius = 0.02f * sqrt(-2 * log(u1)), angle = 2 * M_PI * u2, x = radius * cos(angle);
    double error = EPS32 * (fabs(x) * (2 + 1 + 1 + 1 + 4) + radius * angle * 2);
    p.within(i, ours, x, error + EPSX * (fabs(x) + error));
}
void test_init(uint64_t seed) {
    Property hash("the hash: numbers that a run of another day, or another build, must get too", "every bit"),
        value("init, normal: Box and Muller's formula", "9 roundings, and 2 of the angle"),
        constant("init, constant; a master copy as its weights are", "every bit"),
        part("init, a part of a tensor: as in the whole", "every bit");
    set_case("hash64");
    hash.is(hash64(0, 0, 0) == 0x58016df76f315627 && hash64(1337, 2, 3) == 0x67557fdf3673ae4f &&
                hash64(~(uint64_t)0, (uint64_t)1 << 40, ((uint64_t)1 << 33) + 5) == 0xe87dba3bf7ea9880, "another number");
    hash.equal(0, hash_uniform(0), 0x1p-24);                    // never 0, whose logarithm is infinite
    hash.equal(1, hash_uniform(~(uint64_t)0), 1 - 0x1p-24);     // nor 1
    auto init = [=](floatX* param, size_t n, size_t drawn, int which, size_t first = 0) {   // as model_init does
        init_kernel<<<ceil_div(n, 256), 256>>>(param, n, drawn, 0.02f, 1, seed, which, first);
    };
    for (size_t n : {1, 7, 255, 256, 257, 511, 512, 513, 1031}) {
        set_case("n %zu", n);
        Buffer<floatX> x(n);
        init(x.p, n, n - n / 3, 3);
        const std::vector<floatX> a = x.read();
        for (size_t i = 0; i < n - n / 3; i++) normal_within(value, i, (float)a[i], seed, 3);
        for (size_t i = n - n / 3; i < n; i++) constant.equal(i, (float)a[i], 1);
        Buffer<floatX> half(n - n / 2);
        init(half.p, half.n, n - n / 3, 3, n / 2);
        part.is(same_bits(half.read(), {a.begin() + n / 2, a.end()}), "other bits");
        Buffer<float> master(n);
        widen_kernel<<<ceil_div(n, 256), 256>>>(master.p, x.p, n);
        constant.is(same_bits(master.read(), floats(a)), "the master copy is another");
    }
    report({&hash, &value, &constant, &part});

    const size_t many = ((size_t)1 << 32) + 256 + 3;
    set_case("2^32 + 259 elements");
    FarBuffer<floatX> far(many);
    if (far.p == nullptr) return;
    Property beyond("init, normal and constant: the last of 2^32 elements, alone too", "as above");
    Buffer<floatX> near(3);
    run_blocks({(1 << 24) + 1}, [&] { init(far.p, many, many - 1, 15); });
    init(near.p, 3, many - 1, 15, many - 3);
    beyond.is(same_bits(near.read(), far.read(many - 3, 3)), "other bits");
    for (size_t i = many - 3; i < many - 1; i++) normal_within(beyond, i, (float)far.read(i, 1)[0], seed, 15);
    beyond.equal(0, (float)far.read(many - 1, 1)[0], 1);
    report({&beyond});
}

// ---- benchmark: a model's 16 tensors

void bench(const char* model, const Config& config) {
    const double X = sizeof(floatX);
    const size_t n = param_count(config), bytes = n * (sizeof(floatX) + 4 * sizeof(float));
    if (!on_cpu_backend() && free_memory() < bytes + ((size_t)4 << 30)) {
        if (!bench_json) printf("\n%s: skipped, it takes %.1f GB\n", model, bytes / 1e9);
        return;
    }
    BenchTable u(n, BenchTable::BYTES, "%s: the norm of the gradients, %d tensors", model, (int)LORA_A);
    const size_t m = u.here(n, LORA_A * VEC);
    Buffer<floatX> param(m);
    Buffer<float> mean(m), square(m), master(m), grad(m);
    Buffer<Verdict> verdict({Verdict{0, 0, 0, 0, 1, 0}});
    for (Buffer<float>* b : {&mean, &master, &grad}) b->fill();
    square.fill(0, 0.001f);
    param.fill();
    auto table = [&](DType grad_type, bool with_master) {
        Tensors table;
        size_t at = 0;
        for (int p = 0; p < LORA_A; p++) {
            ParamShape s = param_shape(config, p);
            size_t count = u.here(s.elements(), VEC);
            table.add({param.p + at, Grad{grad.p, grad_type} + at, mean.p + at, square.p + at, with_master ? master.p + at : nullptr, count,
                       0, s.cols ? 0.1f : 0.0f, (unsigned)p}, count);
            at += count;
        }
        return table;
    };
    const Tensors plain = table(FLOATX, false), exact = table(FLOATX, true), wide = table(F32, true);
    Buffer<float> partial(std::max(plain.blocks, BLOCKS_1)), sum(1);
    for (DType type : {F32, BF16}) {   // of several micro-batches per step, and of one
        const Tensors t = table(type, false);
        auto row = [&](const char* name, auto run) {
            u.row(name + std::string(", ") + dtype_name(type), dtype_size(type), run);
        };
        row("norm, version 1: added up by the host, tensor by tensor", [&] { square_sum_1(partial.p, t); });
        row("norm, version 2: the trainer's, added up by a kernel", [&] { square_sum_2(sum.p, partial.p, t); });
    }
    BenchTable t(n, BenchTable::BYTES, "%s: AdamW, %zu parameters in %d tensors", model, n, (int)LORA_A);
    AdamW a = hyper(1337, 1, 1);
    t.row("AdamW, version 1: an element a thread", 16 + 3 * X, [&] { adamw_1<NEAREST>(plain, verdict.p, a); });
    t.row("AdamW, version 2: the trainer's, 8 elements a thread", 16 + 3 * X, [&] { adamw_2(plain, verdict.p, a); });
    t.row("AdamW, version 2 with a master copy", 24 + 2 * X, [&] { adamw_2(exact, verdict.p, a); });
    if (!kFP32) t.row("AdamW, version 2 with a master copy, gradients in fp32", 28 + X, [&] { adamw_2(wide, verdict.p, a); });
    Buffer<uint8_t> codes(2 * m);
    Buffer<float> absmax(2 * ceil_div(m, 256) + LORA_A), maps(512);
    for (bool with_sign : {true, false})
        cudaCheck(cudaMemcpy(maps.p + 256 * !with_sign, dynamic_map(with_sign).data(), 256 * sizeof(float), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemset(codes.p, 77, codes.bytes()));
    absmax.fill(0, 1);
    t.row("AdamW in 8 bits", 4 + 16.0 / 256 + 3 * X, [&] {
        size_t at = 0, block = 0;
        for (const OptTensor& tensor : plain.t) {
            const Moments8 moments = {codes.p + at, codes.p + m + at, absmax.p + block, absmax.p + absmax.n / 2 + block, maps.p};
            adamw8_kernel<<<ceil_div(tensor.n, OPT_BLOCK), 256>>>(tensor, moments, verdict.p, a, tensor.n);
            at += tensor.n, block += ceil_div(tensor.n, 256);
        }
    });
    // AdaLomo reads a gradient four times, a weight twice, and writes it; the rest is small. Layers lie below one another here.
    Buffer<float> v_rows(m / VEC), v_cols(8 * (size_t)config.C), scratch(LomoScratch::floats(m / VEC, 8 * (size_t)config.C)), total(1);
    v_rows.fill(1e-8f, 1e-6f), v_cols.fill(1e-8f, 1e-6f), total.fill();
    t.row("AdaLomo", 7 * X, [&] {
        for (const OptTensor& tensor : plain.t) {
            const size_t cols = std::max<size_t>(VEC, param_shape(config, (int)tensor.stream).cols), rows = std::max<size_t>(1, tensor.n / cols);
            const size_t some = std::min(cols, tensor.n);
            adalomo({tensor.param, tensor.grad, v_rows.p, v_cols.p, nullptr, rows, some, 0, 0, tensor.stream},
                    LomoScratch(scratch.p, rows, some), total.p, {1e-3f, 0, 0.9f, 1337, 1}, rows, nullptr, nullptr);
        }
    });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "optimizer: the norm of all gradients, the verdict, AdamW, and the first weights");
    if (o.bench) {
        bench_device();
        bench("GPT-2 124M", {1024, 50257, 50304, 12, 12, 768});
        bench("GPT-2 1558M", {1024, 50257, 50304, 48, 25, 1600});
        return 0;
    }
    printf("optimizer, %s\n", dtype_name(FLOATX));
    test_norm(o.seed);
    test_known();
    test_edges();
    test_step(o.seed);
    test_8bits(o.seed);
    test_adalomo(o.seed);
    test_special(o.seed);
    test_far<float>(o.seed);
    test_far<__nv_bfloat16>(o.seed);
    test_rounding(o.seed);
    test_lost_updates(o.seed);
    test_init(o.seed);
    return finish(o);
}
