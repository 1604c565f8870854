/*
AdamW over all parameter tensors in one launch, and the weights that training starts from: the trainer's kernels, tested, and
simpler ones beside them to learn from. Section 4 of train_gpt2.cu has them.

    make dev/cuda/adamw && ./dev/cuda/adamw [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/adamw.cu -lcublasLt -o adamw

With g the gradient times the clip factor, m and v running means of g and g^2, and c1 = 1 - beta1^t, c2 = 1 - beta2^t:

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   x -= lr ((m / c1) / (sqrt(v / c2) + eps) + decay x)

x is the fp32 master copy of a weight, where there is one; the weight is then its nearest bf16. Without a master copy x is the
weight itself, and what comes out is rounded to one of the two bf16 beside it by chance, so that it is right on average.
Gradients are fp32 or bf16. A step that the verdict skips changes nothing. A thread owns 8 neighbouring elements, so a tensor
has a multiple of 8.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include <memory>

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions
//
// There is almost no arithmetic here and nothing to sum: what counts is bytes, launches, and how x is rounded.

// Version 1: a tensor at a time, and a kernel for each line of the formula, as it is when every operation on tensors is a call
// into a library. Each kernel brings from memory what the one before has just written there. In bf16: clipping 2 + 2 bytes (and
// g is rounded once more), m 4 + 4 and g 2, v the same, the weight 2 + 2, m 4, v 4: 36 bytes an element, where all that there
// is to read and write is 22. A step of the 124M model moves 4.5 GB instead of 2.7. GPT-2 has 16 tensors, so that is 64
// launches, and 10 of the tensors are so small that a launch takes longer than what it launches.
__global__ void clip_1_kernel(Grad grad, size_t n, const Verdict* verdict) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && !verdict->skip) grad_store(grad, i, grad_load(grad, i) * verdict->clip, false);
}
__global__ void mean_1_kernel(float* m, Grad grad, size_t n, const Verdict* verdict, float beta) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && !verdict->skip) m[i] = beta * m[i] + (1 - beta) * grad_load(grad, i);
}
__global__ void square_1_kernel(float* v, Grad grad, size_t n, const Verdict* verdict, float beta) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && !verdict->skip) v[i] = beta * v[i] + (1 - beta) * grad_load(grad, i) * grad_load(grad, i);
}
__global__ void weight_1_kernel(floatX* param, const float* m, const float* v, size_t n, const Verdict* verdict, AdamW a,
                                float decay) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || verdict->skip) return;
    float x = (float)param[i];
    x -= a.lr * ((m[i] / a.correction1) / (sqrtf(v[i] / a.correction2) + a.eps) + decay * x);
    param[i] = (floatX)x;
}
void adamw_1(const OptTable& table, const Verdict* verdict, AdamW a, cudaStream_t stream) {
    for (int k = 0; k < table.count; k++) {
        const OptTensor& t = table.t[k];
        int blocks = ceil_div(t.n, 256);
        if (blocks == 0) continue;
        clip_1_kernel<<<blocks, 256, 0, stream>>>(t.grad, t.n, verdict);
        mean_1_kernel<<<blocks, 256, 0, stream>>>(t.m, t.grad, t.n, verdict, a.beta1);
        square_1_kernel<<<blocks, 256, 0, stream>>>(t.v, t.grad, t.n, verdict, a.beta2);
        weight_1_kernel<<<blocks, 256, 0, stream>>>(t.param, t.m, t.v, t.n, verdict, a, t.decay);
        cudaCheck(cudaGetLastError());
    }
}

// Version 2: one kernel for all of the formula, with m, v and x in registers between its lines: 22 bytes. There are still 16
// launches, and a thread takes one element, so a load is 2 or 4 bytes where the hardware moves 16 at once.
//
// And how it rounds is wrong, as it is in version 1. bf16 has 8 bits: the neighbours of a weight of 1 are 0.004 and 0.008 away.
// AdamW's update is about lr, say 0.0001. The nearest bf16 to 1 - 0.0001 is 1, in this step and in all that follow: a weight
// that is large beside lr never moves. Cutting off the lower bits instead makes it worse: 1 - 0.0001 becomes 0.996, 39 times
// the update, and 1 + 0.0001 becomes 1, none of it; all weights are drawn to 0. test_lost_updates shows it.
enum Rounding { NEAREST, CUT, STOCHASTIC };
template <Rounding ROUNDING>
__global__ void adamw_2_kernel(OptTensor t, const Verdict* verdict, AdamW a) {
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
template <Rounding ROUNDING>
void adamw_2(const OptTable& table, const Verdict* verdict, AdamW a, cudaStream_t stream) {
    for (int k = 0; k < table.count; k++) {
        int blocks = ceil_div(table.t[k].n, 256);
        if (blocks == 0) continue;
        adamw_2_kernel<ROUNDING><<<blocks, 256, 0, stream>>>(table.t[k], verdict, a);
        cudaCheck(cudaGetLastError());
    }
}

// Version 3, the trainer's, launched as gpt2_update does: one launch for all tensors. A block takes 2048 elements of one of
// them, which it finds among 16 or fewer by their first blocks, and a thread 8 elements, in loads of 16 bytes. The bytes stay:
// g 2, m 4 + 4, v 4 + 4, x 2 + 2. What is new is the rounding. 16 random bits are added below those that bf16 keeps, and then
// it is cut: 1 - 0.0001 becomes 0.996 in one of 39 steps and 1 in the others, which is right on average, for every value. The
// bits are a hash of seed, step, tensor and element: no state to keep, the same in any order of threads, on any number of GPUs
// that share the tensor, and after a resume.
//
// A master copy in fp32 leaves nothing to chance. It costs 4 + 4 bytes, less the reading of the weight: 28 bytes a step, and 4
// bytes of memory for each weight.
void adamw_3(const OptTable& table, const Verdict* verdict, AdamW a, cudaStream_t stream) {
    adamw_kernel<<<table.blocks, 256, 0, stream>>>(table, verdict, a);
    cudaCheck(cudaGetLastError());
}

struct Version {
    const char* name;
    void (*run)(const OptTable&, const Verdict*, AdamW, cudaStream_t);
    Rounding rounding;
    bool master, rounds_gradient;   // knows what a master copy is; stores the clipped gradient
};
const Version versions[] = {{"version 1", adamw_1, NEAREST, false, true},
                            {"version 2", adamw_2<NEAREST>, NEAREST, false, false},
                            {"version 2, cut", adamw_2<CUT>, CUT, false, false},
                            {"the trainer's", adamw_3, STOCHASTIC, true, false}};
enum { ONE, TWO, TWO_CUT, TRAINER };

// ---------------------------------------------------------------------------------------------------------------------
// the reference, in double precision, which counts the roundings on its way

// A number, and how far from it fp32 may come out. Every operation passes on the errors of its operands and adds a rounding:
// half a unit in the last place of the result, or half the smallest step that there is.
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
Update reference(double g, double m_before, double v_before, double x_before, float clip, float decay, const AdamW& a,
                 bool rounds_gradient, DType grad) {
    Real clipped = Real(g) * clip, one = 1, x = x_before;
    if (rounds_gradient && grad == BF16) clipped.error += EPS16 * (fabs(clipped.x) + clipped.error) + 0x1p-134;
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
    bool up = rounding == CUT        ? false
              : rounding == NEAREST ? part > 0.5 || (part == 0.5 && odd)
                                     : part + (random % 65536) / 65536.0 >= 1;
    return (float)copysign((below + up) * step, (double)x);
}
uint32_t random_of(const AdamW& a, int which, size_t element) {
    return (uint32_t)hash64(a.seed, a.step * MAX_PARAMS + which, element);
}

// ---------------------------------------------------------------------------------------------------------------------
// tables of tensors

struct Tensor {
    size_t n;
    DType grad_type;
    bool master;
    float decay;
    size_t offset;
};
struct State {   // of one tensor, on the host
    std::vector<float> grad, m, v, master;
    std::vector<floatX> param;

    // Gradients of all magnitudes, m and v as they may have come to be by them. In the first step they are 0.
    State(const Tensor& t, Random& random, bool first_step) : grad(t.n), m(t.n), v(t.n), master(t.n), param(t.n) {
        for (size_t i = 0; i < t.n; i++) {
            float scale = powf(10, -12 * random.uniform() * random.uniform());
            grad[i] = i % 11 == 5 ? 0 : scale * random.normal();
            if (t.grad_type == BF16) grad[i] = (float)(__nv_bfloat16)grad[i];
            m[i] = first_step ? 0 : 0.3f * scale * random.normal();
            v[i] = first_step ? 0 : scale * scale * random.uniform();
            if (i % 13 == 7) m[i] = v[i] = grad[i] = 0;   // never seen: a token that does not occur
            master[i] = (i % 7 == 3 ? 1.0f : 0.02f) * random.normal();
            if (i % 17 == 1) master[i] = 0;
            param[i] = (floatX)master[i];
        }
    }
    State() = default;
    float before(const Tensor& t, size_t i) const { return t.master ? master[i] : (float)param[i]; }
};

// All of them on the device, each tensor with memory of its own that ends with it.
struct Device {
    struct Memory {
        GradBuffer grad;
        Buffer<float> m, v, master;
        Buffer<floatX> param;
        Memory(const Tensor& t) : grad(t.n, t.grad_type), m(t.n), v(t.n), master(t.master ? t.n : 0), param(t.n) {}
    };
    std::vector<Tensor> tensors;
    std::vector<std::unique_ptr<Memory>> memory;
    Buffer<Verdict> verdict;
    OptTable table = {};

    Device(const std::vector<Tensor>& tensors) : tensors(tensors), verdict(1) {
        for (const Tensor& t : tensors) {
            memory.push_back(std::make_unique<Memory>(t));
            Memory& d = *memory.back();
            float* master = t.master ? d.master.p : nullptr;
            table.t[table.count++] = {d.param.p, d.grad.grad(), d.m.p,   d.v.p, master,
                                      t.n,       t.offset,      t.decay, 1,     table.blocks};
            table.blocks += ceil_div(t.n, OPT_BLOCK);
        }
    }
    void write(const std::vector<State>& states, float clip, bool skip) {
        for (size_t k = 0; k < tensors.size(); k++) {
            memory[k]->grad.write(states[k].grad);
            memory[k]->m.write(states[k].m);
            memory[k]->v.write(states[k].v);
            if (tensors[k].master) memory[k]->master.write(states[k].master);
            memory[k]->param.write(states[k].param);
        }
        Verdict v = {NAN, NAN, NAN, NAN, clip, skip};   // what a step does depends on the last two
        verdict.write({v});
    }
    std::vector<State> read() {
        std::vector<State> states(tensors.size());
        for (size_t k = 0; k < tensors.size(); k++) {
            states[k].grad = memory[k]->grad.read();
            states[k].m = memory[k]->m.read();
            states[k].v = memory[k]->v.read();
            if (tensors[k].master) states[k].master = memory[k]->master.read();
            states[k].param = memory[k]->param.read();
        }
        return states;
    }
};
bool same(const State& a, const State& b, bool master) {
    if (a.grad.empty()) return true;
    return same_bits(a.grad, b.grad) && same_bits(a.m, b.m) && same_bits(a.v, b.v) && same_bits(a.param, b.param) &&
           (!master || same_bits(a.master, b.master));
}

AdamW hyper(uint64_t seed, uint64_t step, int t) {
    return {6e-4f, 0.9f, 0.95f, 1e-8f, (float)(1 - pow(0.9, t)), (float)(1 - pow(0.95, t)), seed, step};
}

// ---------------------------------------------------------------------------------------------------------------------
// tests

// Compares one element after a step with the reference.
struct Comparison {
    Property m, v, master, rounded_master, weight;
    size_t decided = 0, undecided = 0;
    Comparison(const char* m_name, const char* v_name, const char* master_name, const char* rounded_name,
               const char* weight_name, const char* weight_bound)
        : m(m_name, "the roundings that the reference counts"), v(v_name, "the same"), master(master_name, "the same"),
          rounded_master(rounded_name, "every bit"), weight(weight_name, weight_bound) {}

    void element(const Version& version, const Tensor& t, const AdamW& a, int which, float clip, size_t i, const State& before,
                 const State& after) {
        Update r = reference(before.grad[i], before.m[i], before.v[i], before.before(t, i), clip, t.decay, a,
                             version.rounds_gradient, t.grad_type);
        m.within(i, after.m[i], r.m.x, r.m.error);
        v.within(i, after.v[i], r.v.x, r.v.error);
        if (t.master) {
            master.within(i, after.master[i], r.x.x, r.x.error);
            rounded_master.equal(i, (float)after.param[i], (float)(floatX)after.master[i]);
        } else if (kFP32) {
            weight.within(i, (float)after.param[i], r.x.x, r.x.error);
        } else {   // all that the fp32 number may be is rounded in the same direction, but for one element in a hundred at most
            uint32_t random = random_of(a, which, t.offset + i);
            float low = round_reference(nextafterf((float)(r.x.x - r.x.error), -INFINITY), version.rounding, random);
            float high = round_reference(nextafterf((float)(r.x.x + r.x.error), INFINITY), version.rounding, random);
            float ours = (float)after.param[i];
            weight.is(low <= ours && ours <= high, "a weight was rounded to where it must not be");
            (low == high ? decided : undecided)++;
        }
    }
    void print(bool trainer) {   // of the others, weights are to be rounded to nearest or cut that may be bf16, or ties
        if (!kFP32 && trainer) {
            set_case("all weights");
            weight.is(undecided * 100 <= decided, "for too many the reference cannot tell how they are to be rounded");
        }
        if (master.compared) report({&m, &v, &master, &rounded_master, &weight});
        else report({&m, &v, &weight});
    }
};

// Sizes one vector of 8 below, at and above a block and two; none at all; fewer tensors than a table holds, as many, and one.
std::vector<std::vector<Tensor>> tables() {
    std::vector<std::vector<Tensor>> all;
    for (int count : {1, 2, 5, MAX_PARAMS}) {
        const size_t sizes[] = {2056, 8, 4096, 2040, 0, 2048, 24, 6152, 16, 4088, 4104, 40, 248, 256, 264, 1000};
        std::vector<Tensor> tensors;
        for (int k = 0; k < count; k++)
            tensors.push_back({sizes[(k + count) % 16], k % 2 ? BF16 : F32, k % 4 >= 2, k % 3 ? 0.1f : 0.0f,
                               k % 5 == 4 ? ((size_t)1 << 33) + 8 : 0});
        all.push_back(tensors);
    }
    return all;
}

void test_step(uint64_t seed) {
    Comparison trainer("m", "v", "master copy", "weight: the nearest to the master copy",
                       kFP32 ? "weight" : "weight: rounded as seed, step, tensor and element say",
                       kFP32 ? "the same" : "every bit, where those leave no doubt");
    const char* as = kFP32 ? "the same" : "every bit, where those leave no doubt";
    Comparison one("version 1: m", "version 1: v", "", "", "version 1: weight", as);
    Comparison two("version 2: m", "version 2: v", "", "", "version 2: weight, nearest or cut", as);
    Property again("the same bits in a second run"), skipped("a step that is skipped changes nothing", "every bit"),
        untouched("gradients stay as they are", "every bit");
    for (const std::vector<Tensor>& tensors : tables())
        for (int version : {TRAINER, TWO, TWO_CUT, ONE})
            for (int t : {1, 3, 1000}) {
                const Version& v = versions[version];
                set_case("%s, %zu tensors, step %d", v.name, tensors.size(), t);
                std::vector<Tensor> used = tensors;
                if (!v.master)
                    for (Tensor& s : used) s.master = false;
                Random random(seed, tensors.size() * 10000 + t);
                std::vector<State> before;
                for (const Tensor& s : used) before.push_back(State(s, random, t == 1));
                float clip = t == 3 ? 0.37f : 1;
                AdamW a = hyper(seed, t + 7, t);
                Device d(used);
                d.write(before, clip, false);
                v.run(d.table, d.verdict.p, a, 0);
                std::vector<State> after = d.read();
                Comparison& c = version == TRAINER ? trainer : version == ONE ? one : two;
                for (size_t k = 0; k < used.size(); k++) {
                    for (size_t i = 0; i < used[k].n; i++) c.element(v, used[k], a, (int)k, clip, i, before[k], after[k]);
                    if (!v.rounds_gradient && used[k].n > 0)
                        untouched.is(same_bits(before[k].grad, after[k].grad), "a gradient has changed");
                }
                if (version != TRAINER) continue;
                d.write(before, clip, false);
                v.run(d.table, d.verdict.p, a, 0);
                std::vector<State> second = d.read();
                for (size_t k = 0; k < used.size(); k++) again.is(same(after[k], second[k], used[k].master), "other bits");
                for (State& s : before)   // with what steps are skipped for
                    for (size_t i = 0; i < s.grad.size(); i += 5) s.grad[i] = i % 2 ? NAN : INFINITY;
                d.write(before, NAN, true);
                std::vector<State> written = d.read();
                v.run(d.table, d.verdict.p, a, 0);
                second = d.read();
                for (size_t k = 0; k < used.size(); k++)
                    skipped.is(same(written[k], second[k], used[k].master), "something has changed");
            }
    trainer.print(true);
    report({&untouched, &again, &skipped});
    two.print(false);
    one.print(false);
}

// Shares of a tensor, one a GPU: each has its own m and v, and the weights come out as if it had been one.
void test_shares(uint64_t seed) {
    Property equal("shares of a tensor, as on 2, 3 and 8 GPUs: the bits of the whole"),
        other("another seed, step, tensor or place: how many weights are rounded otherwise", "5 standard deviations of chance");
    const size_t n = 8 * 3 * 280;
    const Tensor whole = {n, F32, false, 0.1f, 0};
    Random random(seed, 5);
    State before(whole, random, false);
    for (size_t i = 0; i < n; i++) before.param[i] = (floatX)random.normal(), before.grad[i] = before.m[i] = random.normal();
    AdamW a = hyper(seed, 12, 12);
    auto weights = [&](AdamW a, int which, size_t offset, int shares) {   // the tensor stands at place `which`
        std::vector<Tensor> tensors(which + 1, Tensor{8, F32, false, 0, 0});
        Device d(tensors);
        std::vector<State> states(which + 1, State(tensors[0], random, false));
        d.write(states, 1, false);
        GradBuffer grad(n, F32);
        Buffer<float> m(before.m), v(before.v);
        Buffer<floatX> param(before.param);
        grad.write(before.grad);
        for (int s = 0; s < shares; s++) {
            size_t at = n / shares * s;
            OptTable table = d.table;
            OptTensor& t = table.t[which];
            t = {param.p + at, grad.grad() + at, m.p + at,    v.p + at, nullptr,
                 n / shares,   offset + at,      whole.decay, 1,        t.first_block};
            table.blocks = t.first_block + ceil_div(t.n, OPT_BLOCK);
            adamw_3(table, d.verdict.p, a, 0);
        }
        return param.read();
    };
    auto differ = [&](const std::vector<floatX>& x, const std::vector<floatX>& y) {
        size_t count = 0;
        for (size_t i = 0; i < n; i++) count += (float)x[i] != (float)y[i];
        return count / (double)n;
    };
    std::vector<floatX> expected = weights(a, 2, 0, 1);
    for (int shares : {2, 3, 8}) {
        set_case("%d shares", shares);
        equal.is(same_bits(weights(a, 2, 0, shares), expected), "other bits");
    }
    // A weight that is rounded up with probability p comes out differently in two draws with probability 2 p (1 - p).
    double expected_share = 0, variance = 0;
    for (size_t i = 0; i < n; i++) {
        Update r = reference(before.grad[i], before.m[i], before.v[i], (float)before.param[i], 1, whole.decay, a, false, F32);
        float x = (float)r.x.x, low = round_reference(x, CUT, 0), high = round_reference(x, STOCHASTIC, 0xffff);
        double p = high == low ? 0 : (x - low) / (high - low), q = 2 * p * (1 - p);
        expected_share += q / n;
        variance += q * (1 - q) / n / n;
    }
    AdamW seeded = a, later = a;
    seeded.seed++;
    later.step++;
    const std::vector<floatX> variants[] = {weights(seeded, 2, 0, 1), weights(later, 2, 0, 1), weights(a, 3, 0, 1),
                                            weights(a, 2, 8, 1), weights(a, 2, (size_t)1 << 32, 1)};
    for (int k = 0; k < 5; k++) {
        const char* names[] = {"seed + 1", "step + 1", "the next tensor", "offset + 8", "offset + 2^32"};
        set_case("%s", names[k]);
        if (kFP32) equal.is(same_bits(variants[k], expected), "in fp32 nothing is left to chance");
        else other.within(k, differ(variants[k], expected), expected_share, 5 * sqrt(variance));
    }
    if (kFP32) report({&equal});
    else report({&equal, &other});
}

// Index arithmetic beyond 2^31 and 2^32, in a tensor between two small ones: its first block, those at 2^31 and 2^32, its last.
void test_far(uint64_t seed) {
    const size_t window = OPT_BLOCK, tail = 24, n = ((size_t)1 << 32) + window + tail;
    set_case("2^32 + %zu elements", window + tail);
    FarBuffer<floatX> param(n);
    FarBuffer<float> grad(n), m(n), v(n);
    if (!param.p || !grad.p || !m.p || !v.p) return;
    Comparison c("2^32 elements: m", "2^32 elements: v", "", "", "2^32 elements: weight",
                 kFP32 ? "the same" : "every bit, where those leave no doubt");
    const Tensor small = {40, F32, false, 0, 0}, far = {n, F32, false, 0.1f, (size_t)3 << 33};
    AdamW a = hyper(seed, 1 << 20, 1 << 20);
    Random random(seed, 6);
    Device d({small, small, small});
    std::vector<State> before(3, State(small, random, false));
    d.write(before, 1, false);
    OptTable table = d.table;
    table.t[1] = {param.p, {grad.p, F32}, m.p, v.p, nullptr, n, far.offset, far.decay, 1, 1};
    const int blocks = ceil_div(n, OPT_BLOCK);
    table.t[2].first_block = 1 + blocks;
    table.blocks = 2 + blocks;

    const size_t starts[] = {0, (size_t)1 << 31, (size_t)1 << 32, n - tail};
    std::vector<State> windows;
    for (size_t at : starts) {
        Tensor t = far;
        t.n = std::min(window, n - at);
        windows.push_back(State(t, random, false));
        param.write(at, windows.back().param);
        grad.write(at, windows.back().grad);
        m.write(at, windows.back().m);
        v.write(at, windows.back().v);
    }
    run_blocks({0, 1, 1 + (1 << 20), 1 + (1 << 21), blocks, 1 + blocks}, [&] { adamw_3(table, d.verdict.p, a, 0); });
    for (size_t w = 0; w < windows.size(); w++) {
        Tensor t = far;
        size_t count = windows[w].grad.size();
        t.offset += starts[w];
        State after;
        after.param = param.read(starts[w], count);
        after.m = m.read(starts[w], count);
        after.v = v.read(starts[w], count);
        for (size_t i = 0; i < count; i++) c.element(versions[TRAINER], t, a, 1, 1, i, windows[w], after);
    }
    std::vector<State> after = d.read();
    for (int k : {0, 2})
        for (size_t i = 0; i < small.n; i++) c.element(versions[TRAINER], small, a, k, 1, i, before[k], after[k]);
    c.print(true);
}

// What is no number goes where its element is and nowhere else; what overflows is still well defined.
void test_special(uint64_t seed) {
    Property nan("NaN and infinities: in their element alone"), large("a square that overflows, in fp32: x does not move");
    const size_t n = 2048 + 80;
    for (bool master : {false, true}) {
        const Tensor t = {n, F32, master, 0, 0};
        Random random(seed, 8);
        State before(t, random, false);
        enum { GRAD_NAN, GRAD_INF, M_NAN, V_NAN, X_NAN, X_INF, LARGE, WHATS };
        size_t where[WHATS];
        for (int w = 0; w < WHATS; w++) where[w] = 289 * w + 3;
        before.grad[where[GRAD_NAN]] = NAN;
        before.grad[where[GRAD_INF]] = -INFINITY;
        before.m[where[M_NAN]] = NAN;
        before.v[where[V_NAN]] = NAN;
        before.master[where[X_NAN]] = NAN;
        before.master[where[X_INF]] = INFINITY;
        for (int w : {X_NAN, X_INF}) before.param[where[w]] = (floatX)before.master[where[w]];
        before.grad[where[LARGE]] = 1e30f;   // m is finite, v is infinite: a quotient of 0
        set_case("%s", master ? "master" : "no master");
        AdamW a = hyper(seed, 9, 9);
        Device d({t});
        d.write({before}, 1, false);
        adamw_3(d.table, d.verdict.p, a, 0);
        State after = d.read()[0];
        for (size_t i = 0; i < n; i++) {
            int what = -1;
            for (int w = 0; w < WHATS; w++)
                if (where[w] == i) what = w;
            float x = (float)after.param[i];
            bool g = what == GRAD_NAN, inf = what == GRAD_INF;
            nan.is(std::isnan(after.m[i]) == (g || what == M_NAN), "m is wrong about NaN");
            nan.is(std::isnan(after.v[i]) == (g || what == V_NAN), "v is wrong about NaN");
            // inf / inf is none, and neither is inf - inf, which decay makes of an infinite x, or decay * inf without decay
            nan.is(std::isnan(x) == (what >= 0 && what != LARGE), "x is wrong about NaN");
            if (inf) nan.is(after.m[i] == -INFINITY && after.v[i] == INFINITY, "m or v is not infinite");
            if (what == LARGE) {
                large.equal(i, x, (float)before.param[i]);
                large.is(std::isfinite(after.m[i]) && after.v[i] == INFINITY, "m is not finite, or v is");
            }
        }
    }
    report({&nan, &large});
}

// ---- rounding by itself

__global__ void round_kernel(floatX* out, const float* x, const uint32_t* random, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = round_stochastic(x[i], random[i]);
}
// sum[i, s]: over random numbers whose lower half is in [256 s, 256 s + 256). Exact: it is 256 times one of two neighbours.
__global__ void round_sum_kernel(double* sum, const float* x, int n) {
    int i = blockIdx.x, s = threadIdx.x;
    double total = 0;
    for (uint32_t r = 0; r < 256; r++) total += (double)(float)round_stochastic(x[i], (r * 0x1234567u) << 16 | (256 * s + r));
    sum[i * 256 + s] = total;
}
float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
void test_rounding(uint64_t seed) {
    if (kFP32) return;   // there is nothing to round
    Property mean("stochastic rounding: the mean over all 65536 random numbers is the value", "exactly"),
        still("a bf16 value stays, and infinities and NaN, whatever the random number", "every bit"),
        edge("ties, and beyond the largest bf16: up in one half of the cases, and to infinity", "every bit");
    // halfway, next to a bf16, across a power of two, denormal, any
    std::vector<float> x;
    Random random(seed, 9);
    for (uint32_t bits : {0x3f808000u, 0x3f818000u, 0x3f800001u, 0x3f7fffffu, 0x3f80ffffu, 0x00000001u, 0x00008000u,
                          0x0000ffffu, 0x007fffffu, 0x00800000u, 0x00801234u, 0x7f7effffu, 0x7f7f0000u, 0x00000000u})
        for (uint32_t sign : {0u, 0x80000000u}) x.push_back(from_bits(bits | sign));
    while (x.size() < 200) {
        float any = from_bits((uint32_t)random.bits());
        if (fabsf(any) < 3.38e38f) x.push_back(any);
    }
    Buffer<float> values(x);
    Buffer<double> sum(x.size() * 256);
    round_sum_kernel<<<(int)x.size(), 256>>>(sum.p, values.p, (int)x.size());
    cudaCheck(cudaGetLastError());
    std::vector<double> sums = sum.read();
    set_case("mean");
    for (size_t i = 0; i < x.size(); i++) {
        double total = 0;
        for (int s = 0; s < 256; s++) total += sums[i * 256 + s];
        mean.equal(i, total / 65536, x[i] == 0 ? 0 : (double)x[i]);   // 0 - 0 is 0
    }

    std::vector<float> all;
    std::vector<uint32_t> r;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        all.push_back(from_bits(bits << 16));
        r.push_back(bits % 3 ? (uint32_t)random.bits() : 0xffffffffu);
    }
    for (uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0xff800001u, 0xffffffffu, 0x7fffffffu}) {   // NaN in the bits that are cut
        all.push_back(from_bits(bits));
        r.push_back(bits & 1 ? 0 : 0xffff);
    }
    const size_t edges = all.size();
    for (uint32_t sign : {0u, 0x80000000u}) {
        for (uint32_t bits : {0x3f808000u, 0x7f7f8000u})
            for (uint32_t low : {0x7fffu, 0x8000u}) all.push_back(from_bits(bits | sign)), r.push_back(0xabcd0000u | low);
        all.push_back(from_bits(0x7f7fffffu | sign)), r.push_back(0);
        all.push_back(from_bits(0x7f7fffffu | sign)), r.push_back(1);
    }
    Buffer<float> inp(all);
    Buffer<uint32_t> draws(r);
    Buffer<floatX> out(all.size());
    round_kernel<<<ceil_div(all.size(), 256), 256>>>(out.p, inp.p, draws.p, (int)all.size());
    cudaCheck(cudaGetLastError());
    std::vector<floatX> y = out.read();
    set_case("single values");
    for (size_t i = 0; i < edges; i++) still.equal(i, (float)y[i], all[i]);
    for (size_t i = edges; i < all.size(); i++) edge.equal(i, (float)y[i], round_reference(all[i], STOCHASTIC, r[i]));
    report({&mean, &still, &edge});
}

// Many small updates in one direction: where do weights of 1 come to be? The gradient is 1 or -1, so that each step is lr.
void test_lost_updates(uint64_t seed) {
    const int STEPS = 500;
    const size_t n = 1024;
    const float LR = 1e-4f;
    Property average("many small updates: the mean of stochastically rounded weights", "5 standard deviations"),
        exact("many small updates: the master copy", "its roundings"),
        lost(kFP32 ? "many small updates: nothing is lost in fp32" : "many small updates: rounding to nearest loses them all; "
             "cutting loses those up, and goes down too far");
    printf("  %d updates of %g, weights of 1:            mean of %zu\n", STEPS, LR, n);
    for (float direction : {-1.0f, 1.0f}) {
        double expected = 1 + direction * STEPS * (double)LR;
        for (int way = TWO; way <= TRAINER + 1; way++) {   // the last: with a master copy
            bool master = way > TRAINER;
            const Version& v = versions[master ? (int)TRAINER : way];
            set_case("%s%s", v.name, master ? ", master" : "");
            Tensor t = {n, FLOATX, master, 0, 0};
            Device d({t});
            State s;
            s.grad.assign(n, -direction);
            s.m.assign(n, 0);
            s.v.assign(n, 0);
            s.master.assign(n, 1);
            s.param.assign(n, (floatX)1.0f);
            d.write({s}, 1, false);
            for (int k = 1; k <= STEPS; k++) {
                AdamW a = hyper(seed, k, k);
                a.lr = LR;
                v.run(d.table, d.verdict.p, a, 0);
            }
            s = d.read()[0];
            double mean = 0;
            for (size_t i = 0; i < n; i++) mean += (master ? (double)s.master[i] : (float)s.param[i]) / n;
            printf("       %-16s %s        expected %.4f, is %.4f\n", master ? "master copy" : way == TWO ? "to nearest" :
                   way == TWO_CUT ? "cut" : "stochastic", direction < 0 ? "down" : "up  ", expected, mean);
            // x and lr times the quotient are rounded in each step; the quotient is 1 within 10 roundings
            double roundings = STEPS * (EPS32 * 1.05 + LR * 10 * EPS32);
            if (master) {
                for (size_t i = 0; i < n; i++) exact.within(i, s.master[i], expected, roundings);
            } else if (kFP32) {
                for (size_t i = 0; i < n; i++) lost.within(i, (float)s.param[i], expected, roundings);
            } else if (way == TRAINER) {   // a step up has 2^-7 to the next bf16, one down 2^-8, each with a chance of its own
                double step = direction > 0 ? 0x1p-7 : 0x1p-8, p = LR / step;
                average.within(0, mean, expected, 5 * step * sqrt(STEPS * p * (1 - p) / n));
            } else if (way == TWO || direction > 0) {
                lost.equal(0, mean, 1);
            } else {
                lost.is(mean < 0.1, "cutting should have taken more");
            }
        }
    }
    if (kFP32) report({&exact, &lost});
    else report({&average, &exact, &lost});
}

// ---- what training starts from

void init_normal(floatX* param, size_t n, float std, uint64_t seed, int which) {   // as gpt2_init does
    init_normal_kernel<<<ceil_div(n, 256), 256>>>(param, n, std, seed, which);
    cudaCheck(cudaGetLastError());
}
void init_constant(floatX* param, size_t n, float value) {
    init_constant_kernel<<<ceil_div(n, 256), 256>>>(param, n, value);
    cudaCheck(cudaGetLastError());
}

void test_hash() {
    Property p("the hash: numbers that a run of another day, or another build, must get too", "every bit");
    set_case("hash64");
    const struct { uint64_t seed, stream, index, value; } known[] = {
        {0, 0, 0, 0x58016df76f315627},
        {1337, 2, 3, 0x67557fdf3673ae4f},
        {~(uint64_t)0, (uint64_t)1 << 40, ((uint64_t)1 << 33) + 5, 0xe87dba3bf7ea9880}};
    for (auto& k : known) p.is(hash64(k.seed, k.stream, k.index) == k.value, "another number");
    p.equal(0, hash_uniform(0), 0x1p-24);                    // never 0, whose logarithm is infinite
    p.equal(1, hash_uniform(~(uint64_t)0), 1 - 0x1p-24);     // nor 1
    report({&p});
}

// std sqrt(-2 log u1) cos(2 pi u2). logf and cosf may be off by 2 units in the last place, 4 roundings; the square root halves
// what is relative. The angle has the roundings of a product and of the constant 2 pi, and moves the cosine by as much.
void normal_within(Property& p, size_t i, float ours, float std, uint64_t seed, int which) {
    double u1 = hash_uniform(hash64(seed, 2 * which, i)), u2 = hash_uniform(hash64(seed, 2 * which + 1, i));
    double radius = std * sqrt(-2 * log(u1)), angle = 2 * M_PI * u2, x = radius * cos(angle);
    double error = EPS32 * (fabs(x) * (2 + 1 + 1 + 1 + 4) + radius * angle * 2);
    p.within(i, ours, x, error + EPSX * (fabs(x) + error));
}
void test_init(uint64_t seed) {
    Property value("init, normal: Box and Muller's formula", "9 roundings, and 2 of the angle"),
        moments("init, normal: mean, variance, skewness, kurtosis", "5 standard deviations of chance"),
        shape("init, normal: largest distance from the distribution function", "2.6 / sqrt(n), by Kolmogorov: 3 in a million"),
        free("init, normal: no correlation between neighbours, tensors, seeds", "5 standard deviations of chance"),
        again("init, normal: the same bits in a second run, and in a tensor of another length"),
        constant("init, constant", "every bit"), wide("a master copy of weights that have none", "every bit");
    for (size_t n : {1, 7, 255, 256, 257, 511, 512, 513, 1031}) {
        set_case("n %zu", n);
        Buffer<floatX> x(n), y(n + 300);
        init_normal(x.p, n, 0.02f, seed, 3);
        init_normal(y.p, n + 300, 0.02f, seed, 3);
        std::vector<floatX> a = x.read(), b = y.read();
        for (size_t i = 0; i < n; i++) normal_within(value, i, (float)a[i], 0.02f, seed, 3);
        again.is(memcmp(a.data(), b.data(), n * sizeof(floatX)) == 0, "other bits");
        Buffer<float> master(n);
        widen_kernel<<<ceil_div(n, 256), 256>>>(master.p, x.p, n);
        cudaCheck(cudaGetLastError());
        std::vector<float> m = master.read();
        for (size_t i = 0; i < n; i++) wide.equal(i, m[i], (float)a[i]);
        init_constant(x.p, n, 1);
        for (floatX c : x.read()) constant.equal(n, (float)c, 1);
    }

    const size_t n = 60000;
    auto draw = [&](uint64_t seed, int which) {   // with a std of 1
        Buffer<floatX> x(n);
        init_normal(x.p, n, 1, seed, which);
        return doubles(x.read());
    };
    const Doubles x = draw(seed, 4), next = draw(seed, 5), other = draw(seed + 1, 4);
    double sum[5] = {};
    for (double v : x)
        for (int k = 1; k <= 4; k++) sum[k] += pow(v, k) / n;
    set_case("moments");   // of a normal distribution: 0, 1, 0, 3; their estimates' variances: 1/n, 2/n, 15/n, 96/n
    moments.within(1, sum[1], 0, 5 * sqrt(1.0 / n));
    moments.within(2, sum[2], 1, 5 * sqrt(2.0 / n));
    moments.within(3, sum[3], 0, 5 * sqrt(15.0 / n));
    moments.within(4, sum[4], 3, 5 * sqrt(96.0 / n));
    Doubles sorted = x;
    std::sort(sorted.begin(), sorted.end());
    double distance = 0;
    for (size_t i = 0; i < n; i++) {
        if (i + 1 < n && sorted[i + 1] == sorted[i]) continue;   // in bf16 many are equal
        // half a step of bf16 further is where the numbers end that have been rounded to this one
        double end = sorted[i] + (kFP32 ? 0 : fabs(sorted[i]) * 0x1p-9);
        distance = std::max(distance, fabs((i + 1) / (double)n - 0.5 * erfc(-end / sqrt(2))));
    }
    set_case("distribution");
    shape.within(0, distance, 0, 2.6 / sqrt((double)n) + (kFP32 ? 0 : 0x1p-9));
    double products[3] = {};
    for (size_t i = 0; i < n; i++) {
        products[0] += x[i] * x[(i + 1) % n] / n;
        products[1] += x[i] * next[i] / n;
        products[2] += x[i] * other[i] / n;
    }
    set_case("correlation");
    for (int k = 0; k < 3; k++) free.within(k, products[k], 0, 5 / sqrt((double)n));
    report({&value, &moments, &shape, &free, &again, &wide, &constant});

    const size_t many = ((size_t)1 << 32) + 256 + 3;
    set_case("2^32 + 259 elements");
    FarBuffer<floatX> far(many);
    if (far.p == nullptr) return;
    Property far_value("init, normal: 2^32 elements", "as above"), far_constant("init, constant: 2^32 elements", "every bit");
    for (bool normal : {true, false}) {
        run_blocks({0, 1 << 23, 1 << 24, (1 << 24) + 1}, [&] {
            if (normal) init_normal(far.p, many, 0.02f, seed, 15);
            else init_constant(far.p, many, 1);
        });
        for (size_t at : {(size_t)0, (size_t)1 << 31, (size_t)1 << 32, many - 3}) {
            std::vector<floatX> got = far.read(at, std::min((size_t)256, many - at));
            for (size_t i = 0; i < got.size(); i++) {
                if (normal) normal_within(far_value, at + i, (float)got[i], 0.02f, seed, 15);
                else far_constant.equal(at + i, (float)got[i], 1);
            }
        }
    }
    report({&far_value, &far_constant});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark

void bench(const char* model, const GPT2Config& config) {
    const double X = sizeof(floatX);
    size_t n = 0;
    for (int p = 0; p < NUM_PARAMS; p++) n += param_shape(config, p).elements();
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: a step over %zu parameters in %d tensors", model, n, (int)NUM_PARAMS);
    const size_t bytes = n * (sizeof(floatX) + 4 * sizeof(float));
    if (!on_cpu_backend() && free_memory() < bytes + ((size_t)4 << 30)) {
        if (!bench_json) printf("\n%s: skipped, it takes %.1f GB\n", title, bytes / 1e9);
        return;
    }
    BenchTable t(title, n);
    size_t m = t.timed ? n : NUM_PARAMS * VEC;   // without a GPU nothing runs
    Buffer<floatX> param(m);
    Buffer<float> mean(m), square(m), master(m), grad(m);
    Buffer<Verdict> verdict({Verdict{0, 0, 0, 0, 1, 0}});
    for (Buffer<float>* b : {&mean, &master, &grad}) b->fill();
    square.fill(0, 0.001f);
    param.fill();
    auto table = [&](DType grad_type, bool with_master) {
        OptTable table = {};
        size_t at = 0;
        for (int p = 0; p < NUM_PARAMS; p++) {
            ParamShape s = param_shape(config, p);
            size_t count = t.timed ? s.elements() : VEC;
            table.t[p] = {param.p + at, Grad{grad.p, grad_type} + at, mean.p + at, square.p + at,
                          with_master ? master.p + at : nullptr, count, 0, s.cols ? 0.1f : 0.0f, 1, table.blocks};
            table.blocks += ceil_div(count, OPT_BLOCK);
            at += count;
        }
        table.count = NUM_PARAMS;
        return table;
    };
    AdamW a = hyper(1337, 1, 1);
    OptTable plain = table(FLOATX, false), exact = table(FLOATX, true), wide = table(F32, true);
    t.row("version 1: a line a kernel, a tensor at a time", 24 + 6 * X, [&] { adamw_1(plain, verdict.p, a, 0); });
    t.row("version 2: one kernel, a tensor at a time", 16 + 3 * X, [&] { adamw_2<NEAREST>(plain, verdict.p, a, 0); });
    t.row("version 3: the trainer's, all tensors in one launch", 16 + 3 * X, [&] { adamw_3(plain, verdict.p, a, 0); });
    t.row("version 3 with a master copy", 24 + 2 * X, [&] { adamw_3(exact, verdict.p, a, 0); });
    if (!kFP32) t.row("version 3 with a master copy and gradients in fp32", 28 + X, [&] { adamw_3(wide, verdict.p, a, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "adamw: AdamW over all parameter tensors, and what training starts from");
    if (o.bench) {
        bench_device();
        bench("124M", {1024, 50257, 50304, 12, 12, 768});
        bench("1558M", {1024, 50257, 50304, 48, 25, 1600});
        return 0;
    }
    printf("adamw, %s\n", dtype_name(FLOATX));
    test_hash();
    test_step(o.seed);
    test_shares(o.seed);
    test_far(o.seed);
    test_special(o.seed);
    test_rounding(o.seed);
    test_lost_updates(o.seed);
    test_init(o.seed);
    return finish(o);
}
