/*
Weights in 4 bits (NF4), and what else stands around an adapter's matmuls: dropout, and the unfolding of a norm's gamma. The
trainer's code, tested, and simpler versions beside it to learn from. Section 3 of train_gpt2.cu has it under "NF4" and "adapters'
input".

    make dev/cuda/nf4 && ./dev/cuda/nf4 [--bench]

Quantizing is done once, on the host. Of 64 neighbouring weights, rows one after the other, the largest |w| is kept (absmax), and of
each weight the index of the nearest of 16 values, where the border between two is halfway. With absmax = 0.1:
    w               -0.02     0.05      0.1       0.004
    w / absmax      -0.2      0.5       1         0.04
    between         -0.2346   0.3893    0.8615    0.0398     the border below; the index is how many of the 15 borders are below
    and             -0.1379   0.5017              0.1203     the border above
    index           5         12        15        8          in two bytes: 0x5c 0xf8
    value           -0.1848   0.4407    1         0.0796
    made again      -0.0185   0.0441    0.1       0.0080     value * absmax
The 16 values are quantiles of a normal distribution, so that weights, which have about such a one, use all indices alike; 0 and
+-1 are among them. Double quantization does the same to absmax, with 256 other values: less their mean, in blocks of 256.

Making a weight again is done before each matmul. After a shared norm gamma and beta are folded in on the way, as in layernorm.cu:
W' = W * gamma, b' = b + W beta. Matrices have rows of any multiple of 8 columns, so blocks of 64 do not end with rows.
*/
#define TESTING
#include "../../train_gpt2.cu"

#include "common.cuh"

// ---- versions of making a weight again

// Version 1: one kernel per step, one element per thread. absmax from its byte; the weight, from half a byte and its block's
// absmax; b', a thread per row; gamma, in another pass over the weight. Bytes of an element in bf16: 0.5 + 4/64 read and 2 written,
// 2 read for b', 2 read and 2 written for gamma: 8.6. The 16 values are fetched from a table in global memory, a load for each
// element, and each byte of codes twice.
__global__ void absmax_1_kernel(float* absmax, const uint8_t* index, const float* nested, const float* tables, size_t blocks) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < blocks) absmax[i] = __fadd_rn(__fmul_rn(tables[16 + index[i]], nested[1 + i / NF4_NESTED]), nested[0]);
}
__global__ void dequantize_1_kernel(floatX* weight, const uint8_t* codes, const float* absmax, const float* tables, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) weight[i] = (floatX)(tables[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / NF4_BLOCK]);
}
__global__ void fold_bias_1_kernel(floatX* folded_bias, const floatX* weight, const floatX* bias, const floatX* beta, int OC, int C) {
    int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= OC) return;
    float sum = bias != nullptr ? (float)bias[o] : 0.0f;
    for (int c = 0; c < C; c++) sum += (float)weight[(size_t)o * C + c] * (float)beta[c];
    folded_bias[o] = (floatX)sum;
}
__global__ void fold_gamma_1_kernel(floatX* weight, const floatX* gamma, size_t n, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) weight[i] = (floatX)((float)weight[i] * (float)gamma[i % C]);
}
// absmax: (nf4_blocks(OC * C)) scratch, used with double quantization
void dequantize_1(floatX* folded, floatX* folded_bias, const Nf4& w, const floatX* bias, const floatX* gamma, const floatX* beta,
                  float* absmax, int OC, int C) {
    const size_t n = (size_t)OC * C, blocks = nf4_blocks(n);
    if (w.nested) absmax_1_kernel<<<ceil_div(blocks, 256), 256>>>(absmax, (const uint8_t*)w.absmax, w.nested, w.tables, blocks);
    dequantize_1_kernel<<<ceil_div(n, 256), 256>>>(folded, w.codes, w.nested ? absmax : (const float*)w.absmax, w.tables, n);
    if (beta) fold_bias_1_kernel<<<ceil_div(OC, 128), 128>>>(folded_bias, folded, bias, beta, OC, C);
    if (gamma) fold_gamma_1_kernel<<<ceil_div(n, 256), 256>>>(folded, gamma, n, C);
}

// Version 2, the trainer's norm_fold, is one kernel, the one that folds weights of 16 bits: a warp goes along a row, each lane takes
// 8 elements, 4 bytes of codes by one load, and 8 never straddle two blocks of 64. The 16 values are in shared memory, where lanes
// may look up different ones at once. The weight is rounded once, after gamma. 2.5 bytes for an element, of which 2 are the result:
// no version can do with much less, unless the matmul itself reads 4 bits. And of the matmul's time it is little: the weight is
// made once for all rows of a micro-batch.

// ---- versions of dropout

// An adapter's input loses a share p of its elements, others each time, and the rest is multiplied by 1 / (1 - p), so that the mean
// stays. Backward has to know which. Version 1 draws them into a mask, a byte for each element, which has to be kept from forward
// to backward: half as much again as the input, for each adapter. In bf16 it moves 1 byte for the mask, then 2 + 1 + 2.
__global__ void mask_1_kernel(uint8_t* mask, Dropout drop, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t limit = (uint32_t)(drop.p * 65536.0f);
    if (i < n) mask[i] = (hash64(drop.seed, drop.stream, i / 4 * 4) >> i % 4 * 16 & 0xffff) >= limit;
}
__global__ void dropout_1_kernel(floatX* out, const floatX* inp, const uint8_t* mask, Dropout drop, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (floatX)(mask[i] ? (float)inp[i] * (65536.0f / (65536 - (uint32_t)(drop.p * 65536.0f))) : 0.0f);
}
void dropout_1(floatX* out, const floatX* inp, uint8_t* mask, const Dropout& drop, size_t n) {
    mask_1_kernel<<<ceil_div(n, 256), 256>>>(mask, drop, n);
    dropout_1_kernel<<<ceil_div(n, 256), 256>>>(out, inp, mask, drop, n);
}
// Version 2, the trainer's dropout, draws again what it drew: random numbers are a hash of the step, the layer and the element, and
// cost a few dozen instructions for 4 elements of 16 random bits each. Nothing is kept, and 4 bytes are moved. With gamma and beta
// it makes the norm's output of z on the way. In backward it adds to the gradient of what the base weight has passed on (ADD).

// ---- the reference

// bitsandbytes' own borders between its 16 values (csrc/kernels.cu, dQuantizeNF4): fp32, each halfway, rounded once
const float BORDERS[15] = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
                           -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
                           0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
int count_below(float x, const std::vector<float>& borders) {   // no binary search
    return (int)std::count_if(borders.begin(), borders.end(), [=](float border) { return x > border; });
}
// A product and a sum, each rounded to fp32 once, which no compiler may make one of
float times(float a, float b) { return (float)((double)a * b); }
double normal_quantile(double p) {   // by bisection
    double low = -9, high = 9;
    for (int i = 0; i < 100; i++) (erfc(-(low + high) / 2 / sqrt(2.0)) / 2 < p ? low : high) = (low + high) / 2;
    return low;
}

struct Matrix {
    int OC, C;
    std::vector<float> w;
    Nf4Host host;   // the trainer's
    Matrix(uint64_t seed, int OC, int C, bool twice) : OC(OC), C(C), w((size_t)OC * C) {
        Random random(seed, ((uint64_t)OC << 32) + C * 2 + twice);
        float std = 0;
        for (size_t i = 0; i < w.size(); i++) {
            if (i % NF4_BLOCK == 0) std = i / NF4_BLOCK % 5 == 4 ? 0 : 0.02f + 0.03f * random.uniform();   // every fifth block is zeros
            w[i] = std * random.normal();
        }
        host.add(w.data(), w.size());
        host.finish(twice, nf4_tables().data());
    }
};
struct OnDevice {
    Buffer<uint8_t> codes, absmax8;
    Buffer<float> absmax, nested, tables;
    explicit OnDevice(const Nf4Host& h) : codes(h.codes), absmax8(h.absmax8), absmax(h.absmax), nested(h.nested), tables(nf4_tables()) {}
    Nf4 nf4() const {
        const bool twice = nested.n > 0;
        return {codes.p, twice ? (const void*)absmax8.p : absmax.p, twice ? nested.p : nullptr, tables.p};
    }
};
// What W[i] is made again as, from what the host has
float made_again(const Nf4Host& h, const std::vector<float>& tables, size_t i) {
    const size_t block = i / NF4_BLOCK;
    float absmax = h.absmax[block];
    if (!h.nested.empty()) {
        absmax = times(tables[16 + h.absmax8[block]], h.nested[1 + block / NF4_NESTED]);
        absmax += h.nested[0];
    }
    return times(tables[i % 2 ? h.codes[i / 2] & 15 : h.codes[i / 2] >> 4], absmax);
}

// ---- tests of quantizing

void test_tables() {
    Property values("16 values: quantiles of a normal distribution, 8 parts above 0 and 7 below", "bitsandbytes rounded some on the way"),
        borders("borders: bitsandbytes' own; NaN has index 0", "but for 2 units in the last place"),
        map("256 values: in 7 decades the middles of 1, 2, 4 ... 64 parts, of both signs; 0 and 1", "3 roundings");
    const std::vector<float> tables = nf4_tables();
    set_case("tables");
    std::vector<double> parts = {0};
    const double last = 0.9677083;   // 1 - 1/31, which is between 1 - 1/30 and 1 - 1/32
    for (int i = 0; i < 8; i++) parts.push_back(normal_quantile(last + (0.5 - last) * i / 8));
    for (int i = 0; i < 7; i++) parts.push_back(-normal_quantile(last + (0.5 - last) * i / 7));
    std::sort(parts.begin(), parts.end());
    for (int i = 0; i < 16; i++) {
        values.within(i, tables[i], parts[i] / parts[15], 5e-7 * fabs(tables[i]));
        borders.equal(i, nf4_nearest(tables[i], tables.data(), 16), i);
        if (i == 15) break;
        for (bool above : {false, true}) {
            const float side = above ? 2 : -2, x = nextafterf(nextafterf(BORDERS[i], side), side);
            borders.equal(i, nf4_nearest(x, tables.data(), 16), i + above);
        }
    }
    borders.equal(16, nf4_nearest(NAN, tables.data(), 16), 0);
    uint64_t hash = 0;   // of the 256 values as bitsandbytes has published them
    for (int i = 16; i < NF4_TABLES; i++) {
        uint32_t bits;
        memcpy(&bits, &tables[i], 4);
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull + 1;
    }
    map.is(hash == 0xc390db0b9e3a69e0, "other bits than bitsandbytes'");
    map.is(tables.size() == NF4_TABLES && tables[16 + 127] == 0 && tables[16 + 255] == 1, "0 or 1 is not in its place");
    for (int decade = 0, i = 16 + 128; decade < 7; decade++)
        for (int j = 0; j < 1 << decade; j++, i++) {
            map.close(i, tables[i], pow(10, decade - 6) * (0.1 + 0.9 * (j + 0.5) / (1 << decade)), 0, 3 * EPS32);
            map.equal(i, tables[16 + 127 + 16 + 127 - i], -tables[i]);
        }
    report({&values, &borders, &map});
}

void test_quantize(uint64_t seed) {
    Property example("the example above"), codes("codes: how many borders are below w * (1 / absmax)", "every bit"),
        absmax("absmax, its mean, scales and 8 bits", "every bit"), pieces("the same bits, in pieces"),
        nan("NaN has index 0, as in bitsandbytes; zeros too, times an absmax of 0");
    const std::vector<float> tables = nf4_tables(), borders(BORDERS, BORDERS + 15);
    std::vector<float> middles;
    for (int i = 16; i < NF4_TABLES - 1; i++) middles.push_back((tables[i] + tables[i + 1]) * 0.5f);
    set_case("-0.02, 0.05, 0.1, 0.004");
    Nf4Host four;
    four.add(std::vector<float>{-0.02f, 0.05f, 0.1f, 0.004f}.data(), 4);
    example.is(four.codes == std::vector<uint8_t>{0x5c, 0xf8} && four.absmax == std::vector<float>{0.1f}, "other codes");
    for (bool twice : {false, true})
        for (auto [OC, C] : {std::pair{1, 8}, {3, 40}, {8, 72}, {40, 1000}, {256, 64}}) {
            set_case("OC %d, C %d%s", OC, C, twice ? ", twice" : "");
            const Matrix m(seed, OC, C, twice);
            const Nf4Host& h = m.host;
            const size_t n = m.w.size(), blocks = nf4_blocks(n);
            double sum = 0;
            for (size_t b = 0; b < blocks; b++) {
                float most = 0;
                for (size_t i = b * NF4_BLOCK; i < std::min(n, (b + 1) * NF4_BLOCK); i++) most = std::max(most, fabsf(m.w[i]));
                absmax.equal(b, h.absmax[b], most), sum += most;
                for (size_t i = b * NF4_BLOCK; i < std::min(n, (b + 1) * NF4_BLOCK); i++)
                    codes.equal(i, i % 2 ? h.codes[i / 2] & 15 : h.codes[i / 2] >> 4, count_below(m.w[i] * (1 / most), borders));
            }
            codes.is(h.codes.size() == n / 2 && h.absmax.size() == blocks && h.nested.size() == (twice ? nf4_nested(n) : 0), "sizes");
            const float mean = (float)(sum / blocks);
            if (twice) absmax.equal(0, h.nested[0], mean);
            for (size_t first = 0; twice && first < blocks; first += NF4_NESTED) {
                float most = 0;
                for (size_t b = first; b < std::min(blocks, first + NF4_NESTED); b++) most = std::max(most, fabsf(h.absmax[b] - mean));
                absmax.equal(first, h.nested[1 + first / NF4_NESTED], most);
                for (size_t b = first; b < std::min(blocks, first + NF4_NESTED); b++)
                    absmax.equal(b, h.absmax8[b], count_below((h.absmax[b] - mean) * (1 / most), middles));
            }
            Nf4Host again;
            for (size_t i = 0; i < n; i += 192) again.add(&m.w[i], std::min<size_t>(192, n - i));
            again.finish(twice, tables.data());
            pieces.is(again.codes == h.codes && again.absmax == h.absmax && again.absmax8 == h.absmax8 && again.nested == h.nested, "other");
        }
    set_case("NaN, and zeros");
    Nf4Host odd;
    std::vector<float> w(128, 0.0f);
    w[3] = NAN, w[7] = -2, w[9] = 1;
    odd.add(w.data(), w.size());
    nan.is(odd.codes[1] == 0x70 && odd.codes[3] == 0x70 && odd.codes[4] == 0x7c && odd.absmax[0] == 2, "a NaN has changed its block");
    nan.is(odd.absmax[1] == 0 && std::all_of(odd.codes.begin() + 32, odd.codes.end(), [](int code) { return code == 0; }), "zeros");
    report({&example, &codes, &absmax, &pieces, &nan});
}

// ---- tests of making weights again

struct Folding { const char* name; bool gamma, beta, bias; };
const Folding FOLDINGS[] = {{"as it is", false, false, false}, {"with gamma", true, false, false}, {"with gamma and beta", true, true, false},
                            {"with gamma, beta and b", true, true, true}};
struct Folded {
    std::vector<floatX> weight, bias;
    bool operator==(const Folded& f) const { return same_bits(weight, f.weight) && same_bits(bias, f.bias); }
};
struct Norm {   // whatever stands before the matmul
    std::vector<floatX> gamma, beta, bias;
    Norm(uint64_t seed, int OC, int C) {
        Random random(seed, 700000 + OC + C);
        gamma = random.normals(C, 1, 0.5f), beta = random.normals(C, 0.25f, 0.5f), bias = random.normals(OC);
    }
};
Folded dequantize(const Nf4Host& host, const Norm& norm, const Folding& f, int OC, int C, bool simple = false) {
    const OnDevice device(host);
    Buffer<floatX> gamma(norm.gamma), beta(norm.beta), bias(norm.bias), folded((size_t)OC * C), folded_bias(OC);
    Buffer<float> scratch(nf4_blocks((size_t)OC * C));
    const floatX *g = f.gamma ? gamma.p : nullptr, *be = f.beta ? beta.p : nullptr, *b = f.bias ? bias.p : nullptr;
    if (simple) dequantize_1(folded.p, folded_bias.p, device.nf4(), b, g, be, scratch.p, OC, C);
    else norm_fold(folded.p, f.beta ? folded_bias.p : nullptr, device.nf4(), b, g, be, OC, C, 0);
    device.codes.read(), device.absmax8.read(), device.absmax.read();   // for their guards
    return {folded.read(), folded_bias.read()};
}

// Rows that end in the middle of a block, and blocks of 64 in several rows; more than 256 blocks; one row, and more than the 8 of a
// block of the kernel.
void test_dequantize(uint64_t seed) {
    Property weight("W, or W'", "every bit"), bias("b'"), again("the same bits in a second run"), simple("version 1"),
        unwritten("where there is no beta, there is no b'"), nan("a NaN in absmax, a scale or the mean reaches its elements, and only these");
    const std::vector<float> tables = nf4_tables();
    for (auto [OC, C] : {std::pair{1, 8}, {3, 24}, {9, 40}, {40, 72}, {17, 264}, {40, 1000}})
        for (bool twice : {false, true}) {
            const Matrix m(seed, OC, C, twice);
            const Norm norm(seed, OC, C);
            for (const Folding& f : FOLDINGS) {
                set_case("OC %d, C %d%s, %s", OC, C, twice ? ", twice" : "", f.name);
                const Folded got = dequantize(m.host, norm, f, OC, C), one = dequantize(m.host, norm, f, OC, C, true);
                again.is(got == dequantize(m.host, norm, f, OC, C), "other bits");
                for (int o = 0; o < OC; o++) {
                    double sum = f.bias ? (float)norm.bias[o] : 0, terms = fabs(sum), stored = 0;
                    for (int c = 0; c < C; c++) {
                        const size_t i = (size_t)o * C + c;
                        const float w = made_again(m.host, tables, i), folded = f.gamma ? times(w, (float)norm.gamma[c]) : w;
                        weight.equal(i, (float)got.weight[i], (float)(floatX)folded);
                        simple.within(i, (float)one.weight[i], folded, fabs(folded) * 2.1 * EPSX);   // rounded before gamma too
                        const double x = (double)w * (float)norm.beta[c];
                        if (f.beta) sum += x, terms += fabs(x), stored += EPSX * fabs(x);
                    }
                    if (f.beta) bias.close(o, (float)got.bias[o], sum, terms);
                    else unwritten.equal(o, (float)got.bias[o], NAN);
                    if (f.beta) simple.within(o, (float)one.bias[o], sum, stored + tolerance(sum, terms * (1 + C / 32.0)));
                }
            }
        }
    const int OC = 40, C = 1000;   // 625 blocks
    const Norm norm(seed, OC, C);
    for (bool twice : {false, true}) {
        const Matrix clean(seed, OC, C, twice);
        const Folded before = dequantize(clean.host, norm, FOLDINGS[3], OC, C);
        for (int which : {0, 1, 2}) {   // the mean; the second scale; or an absmax in fp32
            if ((which == 2) == twice) continue;
            set_case("NaN in %s", which == 0 ? "the mean" : which == 1 ? "a scale" : "absmax");
            Nf4Host broken = clean.host;
            (which == 2 ? broken.absmax[300] : broken.nested[which ? 2 : 0]) = NAN;
            const Folded after = dequantize(broken, norm, FOLDINGS[3], OC, C);
            auto reach = [&](size_t i) {
                const size_t block = i / NF4_BLOCK;
                return which == 0 || (which == 1 ? block / NF4_NESTED == 1 : block == 300);
            };
            check_reach(nan, after.weight, before.weight, reach, "W'");
            check_reach(nan, after.bias, before.bias, [&](size_t o) {
                bool any = false;
                for (int c = 0; c < C; c++) any |= reach(o * C + c);
                return any;
            }, "b'");
        }
    }
    report({&weight, &bias, &again, &unwritten, &nan, &simple});
}

// A matrix of more than 2^31 elements: the first 8 rows and the last, whose 65 blocks of 64 begin with a row, and with a scale.
void test_far(uint64_t seed) {
    constexpr int C = 520, OC = (1 << 22) + 5, BLOCKS = 8 * C / NF4_BLOCK;
    constexpr size_t n = (size_t)OC * C;
    static_assert(n > (size_t)1 << 31 && (OC - 1) / 8 * BLOCKS % NF4_NESTED == 0, "");
    Property p("a matrix beyond 2^31 elements, first and last block", "every bit");
    const Norm norm(seed, 8, C);
    Random random(seed, 800000);
    std::vector<uint8_t> bytes(8 * C / 2), index(BLOCKS);
    for (auto* v : {&bytes, &index})
        for (uint8_t& b : *v) b = (uint8_t)random.bits();
    std::vector<float> scales(nf4_nested(n));
    for (float& s : scales) s = 0.01f + random.uniform();
    Buffer<float> tables(nf4_tables()), nested(scales), near_nested(2);
    Buffer<floatX> gamma(norm.gamma), beta(norm.beta);
    for (bool twice : {false, true}) {
        set_case("OC %d, C %d%s", OC, C, twice ? ", twice" : "");
        Far<uint8_t> codes(n / 2, bytes, C / 2, C / 2), absmax8(twice ? nf4_blocks(n) : 65, index, 1, 1);
        Far<float> absmax(twice ? 65 : nf4_blocks(n), std::vector<float>(scales.begin(), scales.begin() + BLOCKS), 1, 1);
        Far<floatX> folded(n, (size_t)8 * C, C, C), bias(OC, norm.bias, 1, 1), folded_bias(OC, 8, 1, 1);
        for (int block : {0, (OC - 1) / 8}) {
            const int rows = std::min(OC - block * 8, 8);
            const size_t first = (size_t)block * BLOCKS;
            codes.at = first * NF4_BLOCK / 2, folded.at = first * NF4_BLOCK, bias.at = folded_bias.at = block * 8;
            (twice ? absmax8.at : absmax.at) = first;
            codes.rows = folded.rows = bias.rows = folded_bias.rows = rows, absmax8.rows = absmax.rows = nf4_blocks((size_t)rows * C);
            near_nested.write({scales[0], scales[1 + first / NF4_NESTED]});
            std::vector<FarTensor*> tensors = {&codes, &folded, &bias, &folded_bias};
            tensors.push_back(twice ? (FarTensor*)&absmax8 : &absmax);
            check_far(p, tensors, {block}, [&](bool far) {
                const Nf4 w = {codes.p(far), twice ? (const void*)absmax8.p(far) : absmax.p(far),
                               !twice ? nullptr : far ? nested.p : near_nested.p, tables.p};
                norm_fold(folded.p(far), folded_bias.p(far), w, bias.p(far), gamma.p, beta.p, far ? OC : rows, C, 0);
            });
        }
    }
    report({&p});
}

// ---- tests of an adapter's input and gradient

bool dropped(const Dropout& d, size_t i) {
    return (hash64(d.seed, d.stream, i / 4 * 4) >> i % 4 * 16 & 0xffff) < (uint64_t)(d.p * 65536.0f);
}
void test_dropout(uint64_t seed) {
    Property value("which are 0, and the others times 1 / (1 - p)", "one rounding"), norm("with gamma, with gamma and beta: of their sum"),
        add("added to what is there"), share("a share of p, and of the rest a mean as before", "5 standard deviations"),
        again("the same bits in a second run; others with another seed or stream"), simple("version 1, with a mask", "every bit");
    for (const auto& shape : {std::pair{1, 8}, {3, 40}, {31, 264}, {130, 1000}})
        for (float p : {1e-6f, 0.1f, 0.5f, 0.9f}) {   // of the first 16 bits make 0. The trainer does not call it with 0
            const int rows = shape.first, C = shape.second;
            set_case("rows %d, C %d, p %g", rows, C, p);
            const size_t n = (size_t)rows * C;
            const Dropout drop = {p, seed, 77};
            const Norm affine(seed, 8, C);
            Random random(seed, n);
            const std::vector<floatX> x = random.normals(n, 1), before = random.normals(n);
            Buffer<floatX> inp(x), out(n), gamma(affine.gamma), beta(affine.beta);
            auto run = [&](const Dropout& drop, bool with_gamma, bool with_beta, bool adds = false) {
                const floatX *g = with_gamma ? gamma.p : nullptr, *b = with_beta ? beta.p : nullptr;
                if (adds) out.write(before);
                (adds ? dropout<true> : dropout<false>)(out.p, inp.p, g, b, drop, rows, C, 0);
                return out.read();
            };
            const std::vector<floatX> plain = run(drop, false, false), with_gamma = run(drop, true, false), both = run(drop, true, true),
                                      added = run(drop, true, true, true);
            again.is(same_bits(plain, run(drop, false, false)), "other bits");
            const double keep = 65536.0 / (65536 - (uint32_t)(p * 65536.0f));
            double zeros = 0, rest = 0;
            for (size_t i = 0; i < n; i++) {
                const double xi = (float)x[i], g = (float)affine.gamma[i % C], b = (float)affine.beta[i % C];
                const double k = dropped(drop, i) ? 0 : keep, was = (float)before[i];
                value.close(i, (float)plain[i], xi * k, fabs(xi * k));
                norm.close(i, (float)with_gamma[i], xi * g * k, fabs(xi * g * k));
                norm.close(i, (float)both[i], (xi * g + b) * k, (fabs(xi * g) + fabs(b)) * k);
                add.close(i, (float)added[i], was + (xi * g + b) * k, fabs(was) + (fabs(xi * g) + fabs(b)) * k);
                zeros += dropped(drop, i), rest += k;
            }
            share.within(0, zeros / n, p, 5 * sqrt(p * (1 - p) / n) + 1.0 / 65536);
            share.within(1, rest / n, 1, 5 * sqrt(p / (1 - p) / n) + 1.0 / 65536);
            Buffer<uint8_t> mask(n);
            dropout_1(out.p, inp.p, mask.p, drop, n);
            simple.is(same_bits(out.read(), plain), "other bits");
            for (const Dropout& other : {Dropout{p, seed + 1, 77}, {p, seed, 78}})
                if (n > 100 && p > 0.01f) again.is(!same_bits(plain, run(other, false, false)), "the same elements");
        }
    const size_t C = 520, rows = (1 << 22) + 5, n = rows * C, last = (n - 1) / (256 * VEC) * (256 * VEC);
    set_case("%zu rows of %zu", rows, C);
    FarBuffer<floatX> inp(n), out(n);
    if (inp.p && out.p) {
        const std::vector<floatX> x = Random(seed, 5).normals(n - last);
        inp.write(last, x);
        const Dropout drop = {0.5f, seed, 1ull << 40};
        run_blocks({(int64_t)(last / (256 * VEC))}, [&] { dropout<false>(out.p, inp.p, nullptr, nullptr, drop, rows, C, 0); });
        const std::vector<floatX> got = out.read(last, n - last);
        for (size_t i = 0; i < got.size(); i++) value.close(i, (float)got[i], dropped(drop, last + i) ? 0 : 2 * (float)x[i], 0);
    }
    report({&value, &norm, &add, &share, &again, &simple});
}

// dA (+)= G * gamma + dt_sum beta^T
void test_unfold(uint64_t seed) {
    Property value("an adapter's gradient: G * gamma + dt_sum beta^T"), again("the same bits in a second run");
    for (const auto& shape : {std::pair{8, 8}, {16, 40}, {24, 264}, {8, 1000}})
        for (DType type : {F32, BF16})
            for (bool with_beta : {false, true})
                for (bool accumulate : {false, true}) {
                    const int rows = shape.first, C = shape.second;
                    set_case("%d rows of %d, %s, %s, %s", rows, C, dtype_name(type), with_beta ? "with beta" : "without",
                             accumulate ? "added to" : "written");
                    Random random(seed, 900000 + rows * C);
                    const std::vector<float> G = random.grads((size_t)rows * C), dt_sum = random.grads(rows), before = random.grads(G.size());
                    const Norm norm(seed, 8, C);
                    Buffer<float> g(G), sum(dt_sum);
                    Buffer<floatX> gamma(norm.gamma), beta(norm.beta);
                    auto run = [&] {
                        GradBuffer dA(G.size(), type);
                        if (accumulate) dA.write(before);
                        adapter_unfold(dA.grad(), g.p, with_beta ? sum.p : nullptr, gamma.p, with_beta ? beta.p : nullptr, accumulate,
                                       rows, C, 0);
                        return dA.read();
                    };
                    const std::vector<float> got = run();
                    again.is(same_bits(got, run()), "other bits");
                    for (size_t i = 0; i < G.size(); i++) {
                        const double a = (double)G[i] * (float)norm.gamma[i % C], was = accumulate ? before[i] : 0;
                        const double b = with_beta ? (double)dt_sum[i / C] * (float)norm.beta[i % C] : 0;
                        value.close(i, got[i], was + a + b, fabs(was) + fabs(a) + fabs(b), store_of(type));
                    }
                }
    report({&value, &again});
}

// ---- benchmark

void bench(const char* model, int rows, int C) {
    const int OC = 4 * C;
    const double X = sizeof(floatX), once = 0.5 + 4.0 / NF4_BLOCK, twice = 0.5 + 1.0 / NF4_BLOCK;
    BenchTable t((size_t)OC * C, BenchTable::BYTES, "%s: a weight, %d x %d", model, OC, C);
    const size_t n = t.here(t.n, C);
    Buffer<uint8_t> codes(n / 2), absmax8(nf4_blocks(n));
    Buffer<float> absmax(nf4_blocks(n)), nested(nf4_nested(n)), tables(nf4_tables());
    Buffer<floatX> folded(n), folded_bias(OC), gamma(C), beta(C), bias(OC);
    for (Buffer<floatX>* b : {&gamma, &beta, &bias}) b->fill();
    for (Buffer<float>* b : {&absmax, &nested}) b->fill();
    fill_random(codes.p, codes.n, 0, 255), fill_random(absmax8.p, absmax8.n, 0, 255);
    const Nf4 plain = {codes.p, absmax.p, nullptr, tables.p}, doubled = {codes.p, absmax8.p, nested.p, tables.p};
    t.row("version 1: one kernel per step, with gamma, beta and b", once + 4 * X,
          [&] { dequantize_1(folded.p, folded_bias.p, plain, bias.p, gamma.p, beta.p, absmax.p, OC, C); });
    t.row("version 2: the trainer's, with gamma, beta and b", once + X,
          [&] { norm_fold(folded.p, folded_bias.p, plain, bias.p, gamma.p, beta.p, OC, C, 0); });
    t.row("version 2, double quantization, as it is", twice + X,
          [&] { norm_fold(folded.p, nullptr, doubled, nullptr, nullptr, nullptr, OC, C, 0); });

    BenchTable u((size_t)rows * C, BenchTable::BYTES, "%s: an adapter's input, rows %d, C %d", model, rows, C);
    const size_t m = u.here(u.n, C);
    Buffer<floatX> inp(m), out(m);
    Buffer<uint8_t> mask(m);
    inp.fill(), out.fill();
    const Dropout drop = {0.1f, 1337, 1};
    u.row("dropout, version 1: a mask", 2 + 2 * X, [&] { dropout_1(out.p, inp.p, mask.p, drop, u.n); });
    u.row("dropout, version 2: the trainer's, a hash", 2 * X, [&] { dropout<false>(out.p, inp.p, nullptr, nullptr, drop, rows, C, 0); });
    u.row("dropout, version 2, added", 3 * X, [&] { dropout<true>(out.p, inp.p, nullptr, nullptr, drop, rows, C, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "nf4: weights in 4 bits, and what stands around an adapter's matmuls");
    if (o.bench) return bench_models(bench);
    test_misuse(o, {refuses_12("norm_fold: C", [] { norm_fold(nullptr, nullptr, Nf4{}, nullptr, nullptr, nullptr, 8, 12, 0); }),
                    refuses_12("dropout: C", [] { dropout<true>(nullptr, nullptr, nullptr, nullptr, {}, 1, 12, 0); }),
                    refuses_12("adapter_unfold: C", [] { adapter_unfold({}, nullptr, nullptr, nullptr, nullptr, false, 8, 12, 0); })});
    printf("nf4, %s\n", dtype_name(FLOATX));
    test_tables();
    test_quantize(o.seed);
    test_dequantize(o.seed);
    test_far(o.seed);
    test_dropout(o.seed);
    test_unfold(o.seed);
    return finish(o);
}
