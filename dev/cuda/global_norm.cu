/*
The norm of all gradients, and the verdict on a step that follows from it: the trainer's kernels, tested, and simpler ones
beside them to learn from. Section 4 of train_gpt2.cu has them.

    make dev/cuda/global_norm && ./dev/cuda/global_norm [--bench]        or, with nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/global_norm.cu -lcublasLt -o global_norm

norm = sqrt(sum of g^2) over the elements of all tensors. Gradients are multiplied by clip / norm where norm > clip. A step
whose loss or norm is no finite number is skipped, and so is one whose loss or norm lies more than a given number of standard
deviations above the mean of the last 128. There are 1 to 16 tensors, of either type, each a multiple of 8 elements.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include <deque>

#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// versions of the sum of squares
//
// Each reads every gradient once: 4 bytes an element in fp32, 2 in bf16. What differs is how much of the GPU reads, how often
// the host waits, and how many additions stand one behind the other.

// Version 1: a tensor at a time. A kernel adds the squares into at most 1024 partial sums, they are copied to the host, the
// host adds them up (in double precision, since it costs nothing) and goes on to the next tensor. GPT-2 has 16 tensors: 16
// times the GPU runs dry, and waits for a copy, the host and the next launch, ten microseconds or more, where all gradients of
// the 124M model, 498 MB in fp32, take 150 at an H100's 3.35 TB/s. 10 of the 16 are vectors, for which a few blocks run, or
// one. And the norm ends up on the host, so that AdamW has to wait until it has been there and back.
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
int blocks_1(size_t n) { return std::min(ceil_div(n, OPT_BLOCK), BLOCKS_1); }
float square_sum_1(float* partial,   // (BLOCKS_1)
                   const OptTable& table, cudaStream_t stream) {
    double sum = 0;
    std::vector<float> on_host(BLOCKS_1);
    for (int t = 0; t < table.count; t++) {
        int blocks = blocks_1(table.t[t].n);
        if (blocks == 0) continue;
        square_sum_1_kernel<<<blocks, 256, 0, stream>>>(partial, table.t[t].grad, table.t[t].n);
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaMemcpyAsync(on_host.data(), partial, blocks * sizeof(float), cudaMemcpyDeviceToHost, stream));
        cudaCheck(cudaStreamSynchronize(stream));
        for (int b = 0; b < blocks; b++) sum += (double)on_host[b] * table.t[t].norm_weight;
    }
    return (float)sum;
}

// Version 2: all tensors in one launch, a block each, and a second launch for the sum of 16 numbers: the host waits for
// nothing, and the result stays where it is used. But 16 blocks are at work on a GPU that has 132 multiprocessors, and not for
// long: wte, 38.6M elements, is a third of the 124M model, and its block is still reading when the other 15 have gone. The sum
// suffers too. A thread adds 150000 squares one behind the other, 1.9 million of the largest tensor at 1558M; a sum in fp32
// has 24 bits, so what is 2^24 times smaller than it is lost altogether, and what is near that is rounded away for the most
// part.
__global__ void square_sum_2_kernel(float* partial, OptTable table) {
    __shared__ float shared[8];
    const OptTensor& t = table.t[blockIdx.x];
    float sum = 0;
    for (size_t i = threadIdx.x; i < t.n; i += 256) {
        float g = grad_load(t.grad, i);
        sum += g * g;
    }
    sum = block_sum_256(sum * t.norm_weight, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
void square_sum_2(float* sum, float* partial, const OptTable& table, cudaStream_t stream) {   // partial (count)
    square_sum_2_kernel<<<table.count, 256, 0, stream>>>(partial, table);
    cudaCheck(cudaGetLastError());
    partial_sum_kernel<<<1, 256, 0, stream>>>(sum, partial, table.count);
    cudaCheck(cudaGetLastError());
}

// Version 3, the trainer's, launched as gpt2_update does: one launch over all tensors again, but in equal pieces. A block
// takes 2048 elements of one tensor, whichever that is; it looks for its tensor among the 16 by their first blocks. At 124M
// that is 60784 blocks, and the whole GPU reads until the end. A thread takes 8 neighbours at a time, 16 bytes in bf16, where
// it loaded 2 before; so tensors are whole vectors of 8. It adds 8 squares, then there are trees, and 238 partial sums a
// thread in the second kernel: less than 300 additions stand one behind the other where version 2 had 150000. The partial sums
// cost 4 bytes for 2048 elements.
void square_sum_3(float* sum, float* partial, const OptTable& table, cudaStream_t stream) {   // partial (blocks)
    square_sum_kernel<<<table.blocks, 256, 0, stream>>>(partial, table);
    cudaCheck(cudaGetLastError());
    partial_sum_kernel<<<1, 256, 0, stream>>>(sum, partial, table.blocks);
    cudaCheck(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// tables of tensors

struct Tensor { size_t n; DType type; float norm_weight; };
constexpr size_t GAP = 64;   // bytes of NaN between two tensors

// Gradients in one piece of memory that ends with the last of them, with a gap of NaN before each. The rows of the table that
// do not count are such a gap, and begin at block 0: whoever looks at them finds a tensor of NaN.
struct Gradients {
    std::vector<Tensor> tensors;
    std::vector<size_t> at;   // in bytes
    Buffer<uint8_t> memory;
    OptTable table = {};

    static size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }
    static size_t size(const std::vector<Tensor>& tensors) {
        size_t end = 0;
        for (const Tensor& t : tensors) end = padded(end) + GAP + t.n * dtype_size(t.type);
        return end;
    }
    explicit Gradients(const std::vector<Tensor>& tensors) : tensors(tensors), memory(size(tensors)) {
        size_t end = 0;
        table.count = (int)tensors.size();
        for (int i = 0; i < MAX_PARAMS; i++) {
            OptTensor& t = table.t[i];
            t.norm_weight = 1;
            t.grad = {memory.p, F32};
            t.n = GAP / sizeof(float);
            if (i >= table.count) continue;
            at.push_back(padded(end) + GAP);
            t.grad = {memory.p + at[i], tensors[i].type};
            t.n = tensors[i].n;
            t.norm_weight = tensors[i].norm_weight;
            t.first_block = table.blocks;
            table.blocks += ceil_div(t.n, OPT_BLOCK);
            end = at[i] + t.n * dtype_size(tensors[i].type);
        }
    }
    void write(std::vector<std::vector<float>>& g) {   // rounds g to the types
        std::vector<uint8_t> raw(memory.n, 0xff);
        for (size_t t = 0; t < tensors.size(); t++)
            for (size_t i = 0; i < tensors[t].n; i++) {
                if (tensors[t].type == BF16) {
                    __nv_bfloat16 rounded = (__nv_bfloat16)g[t][i];
                    g[t][i] = (float)rounded;
                    memcpy(&raw[at[t] + 2 * i], &rounded, 2);
                } else memcpy(&raw[at[t] + 4 * i], &g[t][i], 4);
            }
        memory.write(raw);
    }
};

// How many roundings a square goes through until it is part of the sum: its own, those of its thread's sum, of the warp's, of
// the block's; then as many again for the partial sums. All terms are positive, so that each rounding is at most EPS32 of the
// result.
double depth(int version, const OptTable& table) {
    double block = 5 + 7, depth = 0;
    for (int t = 0; t < table.count; t++) {
        size_t n = table.t[t].n;
        if (n == 0) continue;
        if (version == 1) depth = std::max(depth, ceil_div(n, blocks_1(n) * 256) + block + 1);   // the host's sum in double: 1
        if (version == 2) depth = std::max(depth, ceil_div(n, 256) + block + block);
        if (version == 3) depth = std::max(depth, 8 + block + ceil_div(table.blocks, 256) - 1 + block);
    }
    return depth;
}

// ---------------------------------------------------------------------------------------------------------------------
// tests of the norm

// Around what a warp takes and what a block does, and nothing at all.
const size_t SIZES[] = {8, 2048, 16, 2056, 0, 248, 4096, 256, 24, 6152, 2040, 264, 4104, 32, 5000, 40, 1024, 1032};

std::vector<std::vector<Tensor>> tables(uint64_t seed) {
    std::vector<std::vector<Tensor>> all;
    Random random(seed, 1);
    int number = 0;
    for (DType type : {F32, BF16}) {
        for (size_t n : SIZES)
            if (n) all.push_back({{n, type, 1}});
        for (int count = 2; count <= MAX_PARAMS; count++) {   // of both types; every fourth counts elsewhere
            std::vector<Tensor> tensors;
            for (int t = 0; t < count; t++) {
                size_t n = SIZES[number++ % (sizeof SIZES / sizeof *SIZES)];
                tensors.push_back({n, (random.bits() % 2) ? F32 : BF16, random.bits() % 4 ? 1.0f : 0.0f});
            }
            tensors[0].n = std::max(tensors[0].n, (size_t)8);
            tensors[0].norm_weight = 1;
            tensors.back().n = count % 5 == 0 ? 0 : std::max(tensors.back().n, (size_t)24);   // some end with nothing
            all.push_back(tensors);
        }
    }
    all.push_back({{256 * OPT_BLOCK, BF16, 1}, {OPT_BLOCK + 8, BF16, 1}});   // 258 partial sums
    return all;
}

void test_norm(uint64_t seed) {
    Property partial("a block's sum of squares", "20 roundings of fp32"),
        sum("the sum of all squares", "32 roundings, and one for each 256 blocks but the first"),
        again("the same bits in a second run"), norm("the norm, by the verdict", "half the sum's roundings and one"),
        one("version 1", "21 roundings"), two("version 2", "24 roundings, and one for 256 elements"),
        clipped("clip", "two roundings of limit / norm"), nan("a NaN anywhere: the step is skipped, and not remembered");
    int number = 0;
    for (const std::vector<Tensor>& tensors : tables(seed)) {
        Random random(seed, 100 + number++);
        set_case("table %d: %zu tensors, the first of %zu", number, tensors.size(), tensors[0].n);
        Gradients g(tensors);
        std::vector<std::vector<float>> values;
        for (const Tensor& t : tensors) {
            float scale = expf(2 * random.normal());
            values.emplace_back(t.n);
            for (float& x : values.back()) x = scale * random.normal();
        }
        g.write(values);
        const OptTable& table = g.table;
        Buffer<float> squares(table.blocks), squares2(table.blocks), total(1), total2(1), partial1(BLOCKS_1),
            partial2(table.count);
        square_sum_3(total.p, squares.p, table, 0);
        square_sum_3(total2.p, squares2.p, table, 0);
        std::vector<float> blocks = squares.read(), ours = total.read();
        again.is(same_bits(blocks, squares2.read()) && same_bits(ours, total2.read()), "other bits");
        double reference = 0;
        unsigned block = 0;
        for (size_t t = 0; t < tensors.size(); t++)
            for (size_t first = 0; first < tensors[t].n; first += OPT_BLOCK, block++) {
                double part = 0;
                for (size_t i = first; i < std::min(tensors[t].n, first + OPT_BLOCK); i++)
                    part += (double)values[t][i] * values[t][i];
                part *= tensors[t].norm_weight;
                partial.within(block, blocks[block], part, part * EPS32 * 1.01 * (8 + 12));
                reference += part;
            }
        partial.is(block == table.blocks, "another number of blocks");
        sum.within(0, ours[0], reference, reference * EPS32 * 1.01 * depth(3, table));
        one.within(0, square_sum_1(partial1.p, table, 0), reference, reference * EPS32 * 1.01 * depth(1, table));
        square_sum_2(total2.p, partial2.p, table, 0);
        two.within(0, total2.read()[0], reference, reference * EPS32 * 1.01 * depth(2, table));

        // as gpt2_update goes on: the sum is part of the state, and the verdict is made of it
        Buffer<StepState> state(1);
        StepState s = state.read()[0];
        s.loss_sum = 3;
        s.history.count = 5;
        state.write({s});
        const float limit = (float)(sqrt(reference) / (number % 2 ? 2 : 0.5));
        square_sum_3(&state.p->square_sum, squares.p, table, 0);
        verdict_kernel<<<1, 1>>>(state.p, 1, limit, 0, 0);
        cudaCheck(cudaGetLastError());
        StepState after = state.read()[0];
        const double half = EPS32 * 1.01 * (depth(3, table) / 2 + 1);
        norm.within(0, after.verdict.grad_norm, sqrt(reference), sqrt(reference) * half);
        clipped.within(0, after.verdict.clip, number % 2 ? 0.5 : 1, number % 2 ? 0.5 * (half + 2 * EPS32) : 0);
        clipped.is(after.verdict.skip == 0 && after.history.count == 6, "skipped");

        // a NaN in a first and in a last element, and infinities by way of a square
        if (number % 3) continue;
        for (size_t t : {(size_t)0, tensors.size() - 1})
            for (bool last : {false, true})
                for (float value : {NAN, INFINITY, -1e20f}) {
                    if (tensors[t].n == 0 || tensors[t].norm_weight == 0) continue;
                    set_case("table %d: %g in the %s element of tensor %zu", number, value, last ? "last" : "first", t);
                    std::vector<std::vector<float>> broken = values;
                    (last ? broken[t].back() : broken[t].front()) = value;
                    g.write(broken);
                    state.write({s});
                    square_sum_3(&state.p->square_sum, squares.p, table, 0);
                    verdict_kernel<<<1, 1>>>(state.p, 1, limit, 0, 0);
                    cudaCheck(cudaGetLastError());
                    after = state.read()[0];
                    nan.equal(0, after.verdict.grad_norm, std::isnan(value) ? NAN : INFINITY);
                    nan.is(after.verdict.skip == 1, "not skipped");
                    nan.is(memcmp(&after.history, &s.history, sizeof(History)) == 0, "remembered");
                    // the blocks of the tensor that have it, and no other
                    std::vector<float> b = squares.read();
                    size_t where = table.t[t].first_block + (last ? (tensors[t].n - 1) / OPT_BLOCK : 0);
                    for (size_t i = 0; i < b.size(); i++)
                        nan.is(i == where ? !std::isfinite(b[i]) : b[i] == blocks[i], "another block's sum has changed");
                    square_sum_2(total2.p, partial2.p, table, 0);
                    nan.equal(0, total2.read()[0], std::isnan(value) ? NAN : INFINITY);
                    nan.equal(0, square_sum_1(partial1.p, table, 0), std::isnan(value) ? NAN : INFINITY);
                }
    }
    printf("the norm\n");
    report({&partial, &sum, &again, &norm, &clipped, &nan, &one, &two});
}

// Numbers whose sum is known: denormals are kept, ones are counted, and what a large sum has no bits for is lost, to each
// version in its own way.
void test_known() {
    Property p("sums that are known, in all versions");
    Buffer<float> partial(BLOCKS_1), total(1);
    auto check = [&](const char* what, std::vector<Tensor> tensors, auto value, double one, double two, double three) {
        for (DType type : {F32, BF16}) {
            for (Tensor& t : tensors) t.type = type;
            set_case("%s, %s", what, dtype_name(type));
            Gradients g(tensors);
            std::vector<std::vector<float>> values;
            for (const Tensor& t : tensors) {
                values.emplace_back(t.n);
                for (size_t i = 0; i < t.n; i++) values.back()[i] = value(i);
            }
            g.write(values);
            p.equal(1, square_sum_1(partial.p, g.table, 0), one);
            square_sum_2(total.p, partial.p, g.table, 0);
            p.equal(2, total.read()[0], two);
            square_sum_3(total.p, partial.p, g.table, 0);
            p.equal(3, total.read()[0], three);
        }
    };
    auto all = [&](const char* what, std::vector<Tensor> tensors, float value, double sum) {
        auto same = [&](size_t) { return value; };
        check(what, tensors, same, sum, sum, sum);
    };
    all("ones", {{5000, F32, 1}, {8, F32, 1}, {2056, F32, 0}, {264, F32, 1}}, 1, 5272);
    all("zeros", {{5000, F32, 1}}, 0, 0);
    all("squares that are denormal", {{4096, F32, 1}}, 0x1p-70f, 0x1p-128);
    all("the smallest square", {{4096, F32, 1}, {8, F32, 1}}, 0x1p-74f, 4104 * 0x1p-148);
    all("squares that are 0", {{4096, F32, 1}}, 0x1p-80f, 0);
    all("denormals", {{4096, F32, 1}}, 1e-40f, 0);
    all("a sum near the largest number", {{8, F32, 1}}, 0x1.6p62f, 0x1.e4p127);
    all("a sum beyond the largest number", {{8, F32, 1}}, 0x1.6cp62f, INFINITY);
    // 4096^2 = 2^24, whose neighbours are 2 apart: adding 1 to it changes nothing. It stands in element 0 of a tensor, with a
    // 1 in every 256th behind it. All of these are one thread's in version 2; the others lose those that meet in a block.
    auto first_and_every_256th = [](size_t i) { return i == 0 ? 4096.0f : i % 256 ? 0.0f : 1.0f; };
    const double kept = 16777216 + 1024 - 8;
    check("2^24 and 1024 times 1", {{256 * 1024 + 8, F32, 1}}, first_and_every_256th, kept, 16777216, kept);
    report({&p});
}

// A tensor of more than 2^32 elements, the first one beside it: block 0 is the small one's, and the last has 8 elements.
template <class T>
void test_far(uint64_t seed) {
    const DType type = sizeof(T) == 4 ? F32 : BF16;
    Property p(type == F32 ? "a tensor beyond 2^32 elements, fp32" : "a tensor beyond 2^32 elements, bf16", "as a block's sum");
    const size_t n = ((size_t)1 << 32) + 3 * OPT_BLOCK + 8, small = 80, tail = OPT_BLOCK + 8;
    set_case("2^32 + %zu elements, %s", n - ((size_t)1 << 32), dtype_name(type));
    FarBuffer<T> g(n);
    if (g.p == nullptr) return;
    Random random(seed, 300 + type);
    auto numbers = [&](size_t count) {
        std::vector<T> v(count);
        for (T& x : v) x = (T)(3 * random.normal());
        return v;
    };
    std::vector<T> a = numbers(small), first = numbers(OPT_BLOCK), last = numbers(tail);
    g.write(0, first);
    g.write(n - tail, last);
    Buffer<T> other(a);
    OptTable table = {};
    table.count = 2;
    table.blocks = 1 + ceil_div(n, OPT_BLOCK);
    table.t[0].grad = {other.p, type};
    table.t[0].n = small;
    table.t[1].grad = {g.p, type};
    table.t[1].n = n;
    table.t[1].first_block = 1;
    for (int t : {0, 1}) table.t[t].norm_weight = 1;
    FarBuffer<float> partial(table.blocks);
    if (partial.p == nullptr) return;
    auto launch = [&] { square_sum_kernel<<<table.blocks, 256>>>(partial.p, table); };
    auto sum = [](const T* x, size_t count) {
        double s = 0;
        for (size_t i = 0; i < count; i++) s += (double)(float)x[i] * (float)x[i];
        return s;
    };
    auto check = [&](size_t block, double ours, double reference) {
        p.within(block, ours, reference, reference * EPS32 * 1.01 * (8 + 12));
    };
    launch_blocks(0, 1, launch);
    cudaCheck(cudaGetLastError());
    std::vector<float> got = partial.read(0, 2);
    check(0, got[0], sum(a.data(), small));
    check(1, got[1], sum(first.data(), OPT_BLOCK));
    launch_blocks(table.blocks - 2, table.blocks - 1, launch);
    cudaCheck(cudaGetLastError());
    got = partial.read(table.blocks - 2, 2);
    check(table.blocks - 2, got[0], sum(last.data(), OPT_BLOCK));
    check(table.blocks - 1, got[1], sum(last.data() + OPT_BLOCK, 8));
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// tests of the verdict

constexpr int STEPS = 128;   // that are remembered, not taken from the trainer

StepState judge(const StepState& s, float loss_scale, float grad_clip, float skip_loss_z, float skip_grad_z) {
    Buffer<StepState> state({s});
    verdict_kernel<<<1, 1>>>(state.p, loss_scale, grad_clip, skip_loss_z, skip_grad_z);
    cudaCheck(cudaGetLastError());
    return state.read()[0];
}

// (now - mean) / standard deviation, and how far fp32 may be from it. The mean is off by the roundings of 127 additions
// (dividing by 128 makes none). So is the sum of squared deviations, each of which has 3 more, and by 128 times the square of
// the mean's error. The difference, the root and the quotient round once each.
double z_score(const float* value, float now, double* bound) {
    double mean = 0, size = 0, square = 0;
    for (int i = 0; i < STEPS; i++) mean += (double)value[i] / STEPS, size += fabs((double)value[i]) / STEPS;
    for (int i = 0; i < STEPS; i++) square += (value[i] - mean) * (value[i] - mean);
    double shift = 127 * EPS32 * size, deviation = sqrt(square / STEPS), z = (now - mean) / deviation;
    double spread = 130 * EPS32 + STEPS * shift * shift / square;
    *bound = 1.01 * (shift / deviation + fabs(z) * (spread / 2 + 3 * EPS32));
    return z;
}

// A run of 700 steps with a drifting loss, outliers, and steps that are no numbers: as the trainer's, and as a list of all
// that was ever pushed says. The place in the ring goes round five times, and the counter from 255 back to 128.
void test_run(uint64_t seed) {
    Property value("loss and norm", "every bit"),
        z("z of loss and norm", "127 additions in the mean, 130 roundings in the variance"),
        none("z is NaN until 128 steps have been seen"),
        skip("a step is skipped if a z is above its limit, or there is no number"),
        history("the last 128 finite values are remembered, and how many there were"), clip("clip");
    Random random(seed, 500);
    StepState s;
    memset(&s, 0xff, sizeof s);   // nothing that was not pushed may be looked at
    s.history.count = 0;
    std::vector<float> pushed[2];
    const float loss_scale = 1 / 3000.0f, limits[2] = {2.5f, 3.5f};
    int skipped = 0;
    for (int step = 0; step < 700; step++) {
        set_case("step %d", step);
        s.loss_sum = (3 + 0.3f * random.normal() + 500.0f / (200 + step)) * 3000;
        s.square_sum = expf(0.5f * random.normal());
        if (step % 37 == 5) s.loss_sum = step % 2 ? NAN : INFINITY;
        if (step % 41 == 7) s.square_sum = step % 2 ? INFINITY : NAN;
        const float now[2] = {s.loss_sum * loss_scale, sqrtf(s.square_sum)};
        const bool finite = std::isfinite(now[0]) && std::isfinite(now[1]);
        s = judge(s, loss_scale, 1.25f, limits[0], limits[1]);
        const Verdict& v = s.verdict;
        value.equal(0, v.loss, now[0]);
        value.equal(1, v.grad_norm, now[1]);
        bool above = false;
        for (int w : {0, 1}) {
            const float ours = w == 0 ? v.loss_z : v.grad_z;
            if (pushed[w].size() < STEPS) {
                none.is(std::isnan(ours), "it is a number");
                continue;
            }
            above |= ours > limits[w];
            double bound, reference = z_score(&pushed[w][pushed[w].size() - STEPS], now[w], &bound);
            if (std::isfinite(now[w])) z.within(w, ours, reference, bound);
            else z.equal(w, ours, now[w]);
        }
        skip.is(v.skip == (above || !finite), "it was the other way round");
        skipped += above;
        if (!finite) clip.is(v.clip == (std::isinf(now[1]) ? 0 : now[1] > 1.25f ? 1.25f / now[1] : 1), "another factor");
        else clip.equal(0, v.clip, now[1] > 1.25f ? 1.25f / now[1] : 1);
        if (finite)
            for (int w : {0, 1}) pushed[w].push_back(now[w]);
        const size_t n = pushed[0].size();
        history.equal(0, s.history.count, n < 2 * STEPS ? (double)n : (double)(STEPS + n % STEPS));
        for (int w : {0, 1})
            for (size_t i = n < STEPS ? 0 : n - STEPS; i < n; i++)
                history.equal(i, s.history.value[w][i % STEPS], pushed[w][i]);
    }
    skip.is(skipped > 3, "the limits were never tried");
    printf("the verdict\n");
    report({&value, &z, &none, &skip, &history, &clip});
}

// Cases at the edge of each condition. The history is 1 and 3 by turns: mean 2, standard deviation 1, all numbers exact.
void test_edges() {
    Property p("limits, clipping, equal values, the ring's ends: every bit");
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
        {"128 steps seen, z at the limit", TURNS, 128, 4, 16, 0, 2, 2, {4, 4, 2, 2, 1, 0}, 129},
        {"254 steps seen", TURNS, 254, 4, 16, 0, 2, 2, {4, 4, 2, 2, 1, 0}, 255},
        {"255 steps seen: the counter goes back", TURNS, 255, 4, 16, 0, 2, 2, {4, 4, 2, 2, 1, 0}, 128},
        {"z of the loss above the limit", TURNS, 200, 4, 16, 0, 1.99f, 2, {4, 4, 2, 2, 1, 1}, 201},
        {"z of the norm above the limit", TURNS, 200, 4, 16, 0, 2, 1.99f, {4, 4, 2, 2, 1, 1}, 201},
        {"no limit of z", TURNS, 200, 4, 16, 0, 0, 0, {4, 4, 2, 2, 1, 0}, 201},
        {"one limit, of the loss", TURNS, 200, 4, 16, 0, 1, 0, {4, 4, 2, 2, 1, 1}, 201},
        {"one limit, of the norm", TURNS, 200, 4, 16, 0, 0, 1, {4, 4, 2, 2, 1, 1}, 201},
        {"far below", TURNS, 200, -8, 0, 0, 1, 1, {-8, 0, -10, -2, 1, 0}, 201},
        {"at the mean", TURNS, 200, 2, 4, 0, 1, 1, {2, 2, 0, 0, 1, 0}, 201},
        {"equal values, and another", SAME, 128, 2, 4, 0, 1, 1, {2, 2, 0, 0, 1, 0}, 129},
        {"equal values, and far away", SAME, 128, 9, 100, 0, 1, 1, {9, 10, 0, 0, 1, 0}, 129},
        {"the norm below the clip", TURNS, 0, 4, 16, 4.5f, 0, 0, {4, 4, NAN, NAN, 1, 0}, 1},
        {"the norm at the clip", TURNS, 0, 4, 16, 4, 0, 0, {4, 4, NAN, NAN, 1, 0}, 1},
        {"the norm above the clip", TURNS, 0, 4, 16, 1, 0, 0, {4, 4, NAN, NAN, 0.25f, 0}, 1},
        {"a norm of 0", TURNS, 0, 4, 0, 1, 0, 0, {4, 0, NAN, NAN, 1, 0}, 1},
        {"a norm of 0, no clip", TURNS, 0, 4, 0, 0, 0, 0, {4, 0, NAN, NAN, 1, 0}, 1},
        {"a loss of NaN", TURNS, 200, NAN, 16, 2, 9, 9, {NAN, 4, NAN, 2, 0.5f, 1}, 200},
        {"a loss of inf", TURNS, 200, INF, 16, 2, 0, 0, {INF, 4, INF, 2, 0.5f, 1}, 200},
        {"a loss of -inf", TURNS, 200, -INF, 16, 2, 9, 9, {-INF, 4, -INF, 2, 0.5f, 1}, 200},
        {"a norm of NaN", TURNS, 200, 4, NAN, 2, 0, 0, {4, NAN, 2, NAN, 1, 1}, 200},
        {"a norm of inf", TURNS, 255, 4, INF, 2, 0, 0, {4, INF, 2, INF, 0, 1}, 255},
        {"a norm of inf, and a clip of inf", TURNS, 0, 4, INF, INF, 0, 0, {4, INF, NAN, NAN, 1, 1}, 0},
        {"a negative sum of squares", TURNS, 127, 4, -1, 2, 0, 0, {4, NAN, NAN, NAN, 1, 1}, 127},
    };
    for (const Case& c : cases) {
        set_case("%s", c.name);
        StepState s;
        memset(&s, 0xff, sizeof s);
        s.loss_sum = 1024 * c.loss;
        s.square_sum = c.square_sum;
        s.history.count = c.count;
        for (int w : {0, 1})
            for (int i = 0; i < std::min(c.count, STEPS); i++) s.history.value[w][i] = c.history == SAME ? 2 : 1 + 2 * (i % 2);
        const StepState after = judge(s, 1 / 1024.0f, c.clip, c.loss_limit, c.grad_limit);
        const Verdict &v = after.verdict, &e = c.expected;
        p.equal(0, v.loss, e.loss);
        p.equal(1, v.grad_norm, e.grad_norm);
        p.equal(2, v.loss_z, e.loss_z);
        p.equal(3, v.grad_z, e.grad_z);
        p.equal(4, v.clip, e.clip);
        p.equal(5, v.skip, e.skip);
        p.equal(6, after.history.count, c.count_after);
        if (c.count_after != c.count)
            for (int w : {0, 1}) s.history.value[w][c.count % STEPS] = w == 0 ? e.loss : e.grad_norm;
        s.history.count = after.history.count;
        p.is(memcmp(&s.history, &after.history, sizeof(History)) == 0, "another history");
        p.equal(7, after.loss_sum, s.loss_sum);
        p.equal(8, after.square_sum, s.square_sum);
    }
    report({&p});
}

// ---------------------------------------------------------------------------------------------------------------------
// benchmark: a model's 16 tensors, by the trainer's own table

void bench(const char* model, const GPT2Config& config, DType type) {
    char title[200];
    snprintf(title, sizeof title, "GPT-2 %s: %d tensors, gradients in %s", model, (int)NUM_PARAMS, dtype_name(type));
    BenchTable t(title, param_count(config));
    GradBuffer memory(t.timed ? t.n : 1, type);                      // without a GPU nothing runs
    memory.fill();
    GPT2 g = {};
    g.config = config;
    size_t at = 0;
    for (int p = 0; p < NUM_PARAMS; p++) {
        g.grad[p] = {(char*)memory.memory.p + (t.timed ? at : 0) * dtype_size(type), type};
        at += param_shape(config, p).elements();
    }
    const OptTable table = gpt2_opt_table(g, 0);
    Buffer<float> partial(std::max(table.blocks, (unsigned)BLOCKS_1)), sum(1);
    const double bytes = dtype_size(type);
    t.row("version 1: a tensor at a time, added up by the host", bytes, [&] { square_sum_1(partial.p, table, 0); });
    t.row("version 2: a block a tensor", bytes, [&] { square_sum_2(sum.p, partial.p, table, 0); });
    t.row("version 3: the trainer's, in equal pieces", bytes, [&] { square_sum_3(sum.p, partial.p, table, 0); });
}

// With --zero 1 a rank has its shares alone. What all ranks make together must have the bits that one makes who has the whole.
void test_shares(uint64_t seed) {
    Property same("shared out over 1 to 4 ranks: the partial sums of the whole gradient");
    for (GPT2Config c : {GPT2Config{32, 257, 384, 2, 2, 32}, GPT2Config{30, 50, 128, 3, 3, 48}, GPT2Config{64, 600, 640, 5, 1, 40}}) {
        GPT2 g = {};
        g.config = c;
        Random random(seed, 9000 + c.C);
        std::deque<GradBuffer> grads;   // which never moves them
        for (int p = 0; p < NUM_PARAMS; p++) {
            grads.emplace_back(param_shape(c, p).elements(), p == WTE || p % 2 ? F32 : FLOATX);
            std::vector<float> values(grads[p].n);
            for (float& x : values) x = random.normal();
            grads[p].write(values);
            g.grad[p] = grads[p].grad();
            g.param[p] = (floatX*)g.grad[p].p;   // not looked at
        }
        for (int ranks = 1; ranks <= 4; ranks++) {
            set_case("C %d, %d ranks", c.C, ranks);
            world = {0, ranks};
            Buffer<float> squares(gpt2_opt_blocks(c));
            OptTable table = gpt2_opt_table(g, 0);
            square_sum_kernel<<<table.blocks, 256>>>(squares.p, table);
            cudaCheck(cudaGetLastError());
            const std::vector<float> whole = squares.read();
            std::vector<float> sum(whole.size(), 0.0f);
            size_t blocks = 0;
            for (int rank = 0; rank < ranks; rank++) {
                world = {rank, ranks};
                world.sharded = true;
                table = gpt2_opt_table(g, 0);
                blocks += table.blocks;
                cudaCheck(cudaMemset(squares.p, 0, squares.bytes()));
                square_sum_kernel<<<table.blocks, 256>>>(squares.p, table);
                cudaCheck(cudaGetLastError());
                const std::vector<float> mine = squares.read();
                for (size_t i = 0; i < sum.size(); i++) sum[i] += mine[i];
            }
            same.is(same_bits(sum, whole), "other bits");
            same.is(blocks < whole.size() * ranks || ranks == 1, "every rank had all");
        }
    }
    world = {};
    report({&same});
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "global_norm: the norm of all gradients, and the verdict on a step");
    if (o.bench) {
        bench_device();
        for (DType type : {F32, BF16}) {   // of several micro-batches a step, and of one
            bench("124M", {1024, 50257, 50304, 12, 12, 768}, type);
            bench("1558M", {1024, 50257, 50304, 48, 25, 1600}, type);
        }
        return 0;
    }
    printf("global_norm, %s\n", dtype_name(FLOATX));
    test_norm(o.seed);
    test_shares(o.seed);
    test_known();
    test_far<float>(o.seed);
    test_far<__nv_bfloat16>(o.seed);
    test_run(o.seed);
    test_edges();
    return finish(o);
}
