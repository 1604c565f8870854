/*
SwiGLU, forward and backward: exact, and keeping k = 1 to 4 bits of an element of gate for backward (ReSiLU2 for k = 2). The
trainer's kernels, tested, and simpler ones beside them to learn from. Section 2 of train_llama.cu has them under "activation",
and section 3 what the codes are and why they do not pay here.

    make dev/cuda/swiglu && ./dev/cuda/swiglu [--bench]

One matmul makes gate and up, a row of which is F channels of gate and then F of up. Forward: h = silu(gate) * up, with
silu(x) = x s, s = 1 / (1 + exp(-x)). Backward: dup = dh silu(gate), dgate = dh up silu'(gate), with silu'(x) = s + x s (1 - s).
With codes silu(gate) is kept in place of gate, and a slope for each code stands for silu'(gate).
A thread owns 8 neighbouring elements of a row, so F has to be a multiple of 8.
*/
#define TESTING
#include "../../train_llama.cu"

#include <array>

#include "common.cuh"
#include "codes.cuh"

// ---- versions of the forward pass

// Version 1: one kernel per operation, one element per thread, as a framework runs silu(gate) * up. Of an element of h in bf16
// the first reads gate and writes silu(gate) (2 + 2 bytes), the second reads that and up and writes h (2 + 2 + 2): 10. Codes, a
// byte for each, read gate once more (2 + 1). Autograd keeps the inputs of each operation: gate, silu(gate) and up, 6 bytes, and
// h for the matmul after it. silu(gate) is rounded to bf16 on the way.
__global__ void silu_1_kernel(floatX* silu, const floatX* gateup, size_t n, int F) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = (float)gateup[i / F * 2 * F + i % F];
    silu[i] = (floatX)(x / (1.0f + expf(-x)));
}
__global__ void multiply_1_kernel(floatX* h, const floatX* silu, const floatX* gateup, size_t n, int F) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) h[i] = (floatX)((float)silu[i] * (float)gateup[i / F * 2 * F + F + i % F]);
}
template <int BITS>
void swiglu_forward_1(floatX* h, floatX* silu, uint8_t* byte_codes, const floatX* gateup, size_t rows, int F) {
    const size_t n = rows * F;
    const int blocks = ceil_div(n, 256);
    silu_1_kernel<<<blocks, 256>>>(silu, gateup, n, F);
    if constexpr (BITS > 0) codes_1_kernel<BITS><<<blocks, 256>>>(byte_codes, gateup, silu_steps<BITS>(), n, F, 2 * F);
    multiply_1_kernel<<<blocks, 256>>>(h, silu, gateup, n, F);
}

// Version 2, the trainer's swiglu_forward: one kernel that reads gate and up and writes h, 6 bytes, and a thread takes 8 elements
// of each by loads of 16 bytes. It keeps what it has read, 4 bytes, because silu(gate) costs an exponential and a division to
// make again, for which a kernel that waits for memory has time; and h can be had again by the same kernel (-r 1). So codes have
// nothing to replace: silu'(gate) needs gate, and silu(gate) needs gate or 2 bytes of its own. They come on top, where silu(gate)
// takes gate's place: 8 + k/8 bytes are moved, and 4 + k/8 kept. What is kept is rounded, and h is made of the rounded number, so
// that h comes out with the same bits when it is made again.

// ---- versions of the backward pass

// Version 1, operation by operation: dup from dh and silu(gate), the gradient of silu(gate) from dh and up, dgate from that and
// gate: three kernels of 2 + 2 + 2 bytes, 18; with codes in place of gate 16 + k/8. The gradient of silu(gate) is rounded on the
// way.
__global__ void product_1_kernel(floatX* out, const floatX* a, const floatX* b, size_t n, int F, int out_stride, int b_stride) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i / F * out_stride + i % F] = (floatX)((float)a[i] * (float)b[i / F * b_stride + i % F]);
}
template <int BITS> __global__ void silu_backward_1_kernel(floatX* dgateup, const floatX* dsilu, const floatX* gateup,
                                                           const uint8_t* codes, size_t n, int F) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const size_t at = i / F * 2 * F + i % F;
    float slope;
    if constexpr (BITS == 0) {
        const float x = (float)gateup[at], s = 1.0f / (1.0f + expf(-x));
        slope = s + x * s * (1.0f - s);
    } else slope = code_slope_1<BITS>(codes, silu_steps<BITS>(), i);
    dgateup[at] = (floatX)((float)dsilu[i] * slope);
}
template <int BITS>   // dsilu (rows, F) is scratch
void swiglu_backward_1(floatX* dgateup, floatX* dsilu, const floatX* dh, const floatX* silu, const floatX* gateup,
                       const uint8_t* codes, size_t rows, int F) {
    const size_t n = rows * F;
    const int blocks = ceil_div(n, 256);
    product_1_kernel<<<blocks, 256>>>(dgateup + F, dh, silu, n, F, 2 * F, F);
    product_1_kernel<<<blocks, 256>>>(dsilu, dh, gateup + F, n, F, F, 2 * F);
    silu_backward_1_kernel<BITS><<<blocks, 256>>>(dgateup, dsilu, gateup, codes, n, F);
}

// Version 2, the trainer's swiglu_backward: reads dh, gate and up, and writes both gradients where gate and up were, which nobody
// needs any more: 10 bytes and no memory; with codes k/8 more. One exponential gives silu and its derivative.

// ---- all numbers of bits, called alike: the tests are written once for all of them

struct SwiGLU : Codes {
    decltype(&swiglu_forward<0>) forward, again;
    decltype(&swiglu_backward<0>) backward;
    decltype(&swiglu_forward_1<0>) forward_1;
    decltype(&swiglu_backward_1<0>) backward_1;
};
template <int BITS> SwiGLU swiglu_of() {
    SwiGLU act = {{BITS, {}, {}}, swiglu_forward<BITS>, swiglu_forward<BITS, true>, swiglu_backward<BITS>,
                  swiglu_forward_1<BITS>, swiglu_backward_1<BITS>};
    if constexpr (BITS > 0) (Codes&)act = codes_of<BITS>(silu_steps<BITS>());
    return act;
}

// ---- the reference, in double precision; of codes: codes.cuh

struct Silu { double value, slope, value_terms, slope_terms; };   // silu(x), silu'(x), and the terms of their tolerance
Silu reference(double x) {
    const double s = 1 / (1 + exp(-x)), q = 1 / (1 + exp(x));   // q is 1 - s, to the last bit
    // An exponential makes a relative error of the absolute one of its argument, and 1 - s cancels, until s is 1. Where exp(-x)
    // is almost beyond fp32, 1 / exp(-x) is below what the hardware's reciprocal gives, and s is 0 too soon.
    const double steep = 1 + std::min(fabs(x), 100.0), cancels = q > 1e-9 ? fabs(x * s) : 0, early = x < -80 ? 1e-30 : 0;
    return {x * s, s + x * s * q, fabs(x * s) * steep + early, (s + cancels) * steep + early};
}

// ---- tests

// Gate and up beside each other, as the matmul writes them, and one of the two taken out again.
std::vector<floatX> packed(const std::vector<floatX>& gate, const std::vector<floatX>& up, int F) {
    std::vector<floatX> both(2 * gate.size());
    for (size_t i = 0; i < gate.size(); i++) both[i / F * 2 * F + i % F] = gate[i], both[i / F * 2 * F + F + i % F] = up[i];
    return both;
}
std::vector<floatX> part(const std::vector<floatX>& both, int F, bool up) {
    std::vector<floatX> v(both.size() / 2);
    for (size_t i = 0; i < v.size(); i++) v[i] = both[i / F * 2 * F + up * F + i % F];
    return v;
}
// A product that is beyond what floatX holds is infinite.
void check_product(Property& p, size_t i, floatX ours, double reference, double terms) {
    const float stored = (float)(floatX)(float)reference;
    if (std::isfinite(stored)) p.close(i, (float)ours, reference, terms);
    else p.equal(i, (float)ours, stored);
}

// Each of the 65536 values of bf16 as gate, where up and dh are 1. An infinity on the left is multiplied by 0, which gives NaN,
// as in PyTorch; so is the one on the right in the slope.
void test_every_gate() {
    Property derivative("the reference's slope: the difference quotient of its value", "of order h^2, and what cancels"),
        value("silu, all bf16 values"), slope("silu', all bf16 values");
    for (double t = -12; t < 12; t += 0.0371) {
        const double h = 1e-5;
        set_case("x %g", t);
        derivative.within(0, (reference(t + h).value - reference(t - h).value) / (2 * h), reference(t).slope,
                          2 * h * h + 0x1p-52 * (1 + fabs(t)) / h);
    }
    const int F = 256;
    std::vector<floatX> x(65536);
    for (uint32_t bits = 0; bits < x.size(); bits++) {
        uint32_t word = bits << 16;
        float f;
        memcpy(&f, &word, 4);
        x[bits] = (floatX)f;
    }
    const std::vector<floatX> ones(x.size(), (floatX)1.0f);
    Buffer<floatX> gateup(packed(x, ones, F)), dh(ones), h(x.size());
    swiglu_forward<0>(h.p, gateup.p, nullptr, x.size() / F, F, 0);
    swiglu_backward<0>(gateup.p, dh.p, nullptr, x.size() / F, F, 0);
    const std::vector<floatX> y = h.read(), d = gateup.read(), dgate = part(d, F, false), dup = part(d, F, true);
    for (size_t i = 0; i < x.size(); i++) {
        const float gate = (float)x[i];
        const Silu r = reference(gate);
        set_case("gate %g", gate);
        for (floatX silu : {y[i], dup[i]}) {
            if (std::isfinite(gate)) value.close(i, (float)silu, r.value, r.value_terms);
            else value.equal(i, (float)silu, gate > 0 ? INFINITY : NAN);
        }
        if (std::isfinite(gate)) slope.close(i, (float)dgate[i], r.slope, r.slope_terms);
        else slope.equal(i, (float)dgate[i], NAN);
    }
    report({&derivative, &value, &slope});
}

// Tensors of one vector of 8 below, at and above a block of 256 threads; rows of which a block has many, and a row that several
// blocks share. For 1, 3 and 4 bits the small ones are enough.
struct Shape { int rows, F; };
std::vector<Shape> shapes(int bits) {
    std::vector<Shape> all;
    for (Shape s : {Shape{1, 8}, {3, 24}, {255, 8}, {256, 8}, {257, 8}, {31, 136}, {64, 256}, {7, 1000}, {3, 2056}})
        if (bits == 0 || bits == 2 || s.rows * s.F < 2500) all.push_back(s);
    return all;
}

void test_forward(const SwiGLU& act, uint64_t seed) {
    Property value("forward: h; with codes, silu(gate) and codes too"),
        product("forward with codes: h is the product of what is kept", "every bit"),
        only_read("forward: what it only reads is as it was"), again("forward: the same bits in a second run"),
        recomputed("h once more, from what forward has left", "every bit"), one("forward, version 1");
    const std::vector<float> special = act.special_values();
    for (auto [rows, F] : shapes(act.bits)) {
        const size_t n = (size_t)rows * F;
        set_case("%d bits, rows %d, F %d", act.bits, rows, F);
        Random random(seed, act.bits * 1000000 + F * 1000 + rows);
        std::vector<floatX> gate = random.normals(n, 0, 3), up = random.normals(n);
        for (size_t k = 0; k < special.size() && k < n; k++) gate[random.bits() % n] = (floatX)special[k];
        const std::vector<floatX> before = packed(gate, up, F);
        Buffer<floatX> gateup(before), h(n), h2(n);
        Buffer<uint8_t> codes(n / 8 * act.bits);
        act.forward(h.p, gateup.p, codes.p, rows, F, 0);
        const std::vector<floatX> y = h.read(), left = gateup.read(), silu = part(left, F, false);
        const std::vector<uint8_t> k = codes.read();
        only_read.is(act.bits ? same_bits(part(left, F, true), up) : same_bits(left, before), "gate or up has changed");
        for (size_t i = 0; i < n; i++) {
            const float g = (float)gate[i], u = (float)up[i];
            const Silu r = reference(g);
            const double exact = std::isfinite(g) ? r.value : g > 0 ? INFINITY : NAN;
            if (act.bits == 0) check_product(value, i, y[i], exact * u, r.value_terms * fabs(u));
            else {
                value.equal(i, act.read(k.data(), i), act.of(g));
                check_product(value, i, silu[i], exact, r.value_terms);
                product.equal(i, (float)y[i], (float)(floatX)((float)silu[i] * u));
            }
        }
        act.again(h2.p, gateup.p, nullptr, rows, F, 0);
        recomputed.is(same_bits(h2.read(), y) && same_bits(gateup.read(), left), "other bits");
        gateup.write(before);
        act.forward(h2.p, gateup.p, codes.p, rows, F, 0);
        again.is(same_bits(h2.read(), y) && same_bits(gateup.read(), left) && same_bits(codes.read(), k), "other bits");

        Buffer<floatX> silu_1(n);
        Buffer<uint8_t> byte_codes(n);
        gateup.write(before);
        act.forward_1(h.p, silu_1.p, byte_codes.p, gateup.p, rows, F);
        const std::vector<floatX> y1 = h.read();
        const std::vector<uint8_t> k1 = byte_codes.read();
        for (size_t i = 0; i < n; i++) {
            const float g = (float)gate[i];
            if (act.bits) one.equal(i, k1[i], act.of(g));
            const Silu r = reference(g);   // rounded, before it is multiplied
            if (fabsf(g) < 1e30f)
                one.close(i, (float)y1[i], r.value * (float)up[i],
                          (r.value_terms + EPSX / ROUNDINGS * fabs(r.value)) * fabs((float)up[i]) + 1e-30);
        }
    }
    report({&value, &only_read, &again, &recomputed});
    if (act.bits) report({&product});
    report({&one});
}

// From numbers and codes that have nothing to do with each other: backward has to make of them what the formula says.
void test_backward(const SwiGLU& act, uint64_t seed) {
    Property gradients("backward: dgate and dup"), again("backward: the same bits in a second run"),
        only_read("backward: dh and codes are as they were"), one("backward, version 1");
    for (auto [rows, F] : shapes(act.bits)) {
        const size_t n = (size_t)rows * F;
        set_case("%d bits, rows %d, F %d", act.bits, rows, F);
        Random random(seed, 2000000000 + act.bits * 1000000 + F * 1000 + rows);
        std::vector<floatX> gate = random.normals(n, 0, 3), up = random.normals(n), d = random.normals(n), silu(n);
        for (float x : {0.0f, -0.0f, 1e-40f, -1e-40f, 20.0f, -20.0f, 88.0f, -88.0f, 89.0f, -104.0f, 1e20f, -1e20f})
            gate[random.bits() % n] = (floatX)x;
        for (size_t i = 0; i < n; i++) silu[i] = (floatX)(float)reference((float)gate[i]).value;
        std::vector<uint8_t> keep(n / 8 * act.bits);
        for (uint8_t& k : keep) k = (uint8_t)random.bits();
        const std::vector<floatX> before = packed(act.bits ? silu : gate, up, F);
        Buffer<floatX> gateup(before), dh(d), silu_1(silu), dsilu(n);
        Buffer<uint8_t> codes(keep);
        act.backward(gateup.p, dh.p, codes.p, rows, F, 0);
        const std::vector<floatX> both = gateup.read();
        gateup.write(before);
        act.backward(gateup.p, dh.p, codes.p, rows, F, 0);
        again.is(same_bits(gateup.read(), both), "other bits");
        only_read.is(same_bits(dh.read(), d) && same_bits(codes.read(), keep), "dh or codes have changed");
        Buffer<floatX> gateup_1(packed(gate, up, F)), both_1(2 * n);
        act.backward_1(both_1.p, dsilu.p, dh.p, silu_1.p, gateup_1.p, codes.p, rows, F);
        const std::vector<floatX> first = both_1.read();
        for (bool simple : {false, true}) {
            Property& p = simple ? one : gradients;
            const std::vector<floatX> dgate = part(simple ? first : both, F, false), dup = part(simple ? first : both, F, true);
            for (size_t i = 0; i < n; i++) {
                const Silu r = reference((float)gate[i]);
                const double dh = (float)d[i], u = (float)up[i], kept = (float)silu[i];
                const double slope = act.bits ? act.slope[act.read(keep.data(), i)] : r.slope;
                const double terms =
                    fabs(dh * u) * ((act.bits ? fabs(slope) : r.slope_terms) + simple * EPSX / ROUNDINGS * fabs(slope));
                p.close(i, (float)dgate[i], dh * u * slope, terms + simple * 1e-30);
                if (act.bits || simple) p.equal(i, (float)dup[i], (float)(floatX)(float)(dh * kept));
                else p.close(i, (float)dup[i], dh * r.value, fabs(dh) * r.value_terms);
            }
        }
    }
    report({&gradients, &again, &only_read, &one});
}

// Forward and backward, with a NaN in one of the inputs: h, dgate and dup of its element, and nothing else. With codes dgate
// knows of a NaN in gate only by the highest code; h has told the loss.
void test_nan(const SwiGLU& act, uint64_t seed) {
    Property p("a NaN in gate, up or dh reaches what is made of it, and only that");
    const int rows = 5, F = 136;
    const size_t n = (size_t)rows * F;
    Random random(seed, 77);
    const std::vector<floatX> clean[3] = {random.normals(n, 0, 3), random.normals(n), random.normals(n)};   // gate, up, dh
    auto run = [&](const std::vector<floatX>* in) {
        Buffer<floatX> gateup(packed(in[0], in[1], F)), dh(in[2]), h(n);
        Buffer<uint8_t> codes(n / 8 * act.bits);
        act.forward(h.p, gateup.p, codes.p, rows, F, 0);
        const std::vector<floatX> y = h.read();
        act.backward(gateup.p, dh.p, codes.p, rows, F, 0);
        const std::vector<floatX> both = gateup.read();
        return std::array<std::vector<floatX>, 3>{y, part(both, F, false), part(both, F, true)};
    };
    const auto before = run(clean);
    for (int which = 0; which < 3; which++) {
        const size_t at = random.bits() % n;
        set_case("%d bits, NaN in %s", act.bits, which == 0 ? "gate" : which == 1 ? "up" : "dh");
        std::vector<floatX> in[3] = {clean[0], clean[1], clean[2]};
        in[which][at] = (floatX)NAN;
        const auto after = run(in);
        const Reach reaches[3][3] = {{MUST, act.bits ? MAY : MUST, MUST}, {MUST, MUST, NOT}, {NOT, MUST, MUST}};
        for (int out = 0; out < 3; out++) {
            std::vector<floatX> other = after[out];
            if (reaches[which][out] == MAY) other[at] = before[out][at];   // its slope is that of another code
            check_reach(
                p, other, before[out], [&](size_t i) { return i == at ? reaches[which][out] : NOT; },
                out == 0 ? "h" : "a gradient");
        }
    }
    report({&p});
}

// Rows of 24 channels, with windows where h or gateup passes 2^31 and 2^32 elements, and at the ends; and three rows so long that
// one of gateup has more than 2^31.
void test_far(const SwiGLU& act, uint64_t seed) {
    Property forward("forward beyond 2^32 elements", "every bit"), backward("backward beyond 2^32 elements", "every bit");
    Random random(seed, 3 + act.bits);
    auto check = [&](size_t rows, size_t F, size_t near_rows, size_t near_F, size_t row, size_t column) {
        set_case("%d bits, rows %zu, F %zu, from row %zu and column %zu", act.bits, rows, F, row, column);
        Far<floatX> gateup(2 * rows * F, random.normals(2 * near_rows * near_F), near_F, F, near_rows, 2 * F);
        Far<floatX> h(rows * F, random.normals(near_rows * near_F), near_F, F);
        const size_t bytes = near_F / 8 * act.bits;
        Far<uint8_t> codes(std::max(rows * F / 8 * act.bits, (size_t)1), near_rows * bytes, std::max(bytes, (size_t)1),
                           F / 8 * act.bits);
        gateup.at = 2 * row * F + column, h.at = row * F + column, codes.at = h.at / 8 * act.bits;
        std::vector<int64_t> blocks;
        for (size_t r = row; r < row + near_rows; r++)
            for (size_t b = (r * F + column) / (256 * VEC); b <= (r * F + column + near_F - 1) / (256 * VEC); b++)
                if (blocks.empty() || blocks.back() < (int64_t)b) blocks.push_back(b);
        std::vector<FarTensor*> all = {&gateup, &h};
        if (act.bits) all.push_back(&codes);
        check_far(forward, all, blocks, [&](bool far) {
            act.forward(h.p(far), gateup.p(far), codes.p(far), far ? rows : near_rows, (int)(far ? F : near_F), 0);
        });
        for (uint8_t& k : codes.values) k = (uint8_t)random.bits();
        check_far(backward, all, blocks, [&](bool far) {
            act.backward(gateup.p(far), h.p(far), codes.p(far), far ? rows : near_rows, (int)(far ? F : near_F), 0);
        });
    };
    const size_t F = 24, near = 256, rows = ((size_t)1 << 32) / F + 2 * near, LONG = (1 << 30) + 64;
    for (size_t row : {(size_t)0, ((size_t)1 << 30) / F, ((size_t)1 << 31) / F, ((size_t)1 << 32) / F, rows - near})
        check(rows, F, near, F, row, 0);
    for (size_t column : {(size_t)0, LONG - 40}) check(3, LONG, 3, 40, 0, column);
    report({&forward, &backward});
}

// ---- benchmark

void bench(const BenchModel& m) {
    const double X = sizeof(floatX), codes = 2 / 8.0;
    const int rows = m.rows(), F = m.F;
    const size_t n = (size_t)rows * F;
    BenchTable t(n, BenchTable::BYTES, "%s: rows %d, F %d", m.name, rows, F);
    const size_t here = t.here(n, F);
    Buffer<floatX> gateup(2 * here), dgateup(2 * here), h(here), dh(here), silu(here), dsilu(here);
    for (Buffer<floatX>* b : {&gateup, &dh, &silu}) b->fill();
    Buffer<uint8_t> kept(here);   // enough for version 1's codes
    kept.fill(0, 256);
    auto version_1 = [&](const char* forward, const char* backward, double bytes, double back, const SwiGLU& act) {
        t.row(forward, bytes, [&] { act.forward_1(h.p, silu.p, kept.p, gateup.p, rows, F); });
        t.row(backward, back, [&] { act.backward_1(dgateup.p, dsilu.p, dh.p, silu.p, gateup.p, kept.p, rows, F); });
    };
    // These two write over their input; what stands there then costs as much time as what was there.
    auto version_2 = [&](const char* forward, const char* backward, double bytes, double back, const SwiGLU& act) {
        t.row(forward, bytes, [&] { act.forward(h.p, gateup.p, kept.p, rows, F, 0); });
        gateup.fill();
        t.row(backward, back, [&] { act.backward(gateup.p, dh.p, kept.p, rows, F, 0); });
        gateup.fill();
    };
    const SwiGLU exact = swiglu_of<0>(), two = swiglu_of<2>();
    version_1("forward, version 1: one kernel per operation", "backward, version 1", 5 * X, 9 * X, exact);
    version_2("forward, version 2: the trainer's, one kernel", "backward, version 2: the trainer's, in place", 3 * X, 5 * X,
              exact);
    version_1("2 bits: forward, version 1 (keeps 8 bits)", "2 bits: backward, version 1", 6 * X + 1, 8 * X + codes, two);
    version_2("2 bits: forward, version 2: the trainer's", "2 bits: backward, version 2: the trainer's", 4 * X + codes,
              5 * X + codes, two);
    t.row("2 bits: h once more (-r 1)", 3 * X, [&] { two.again(h.p, gateup.p, nullptr, rows, F, 0); });
}

int main(int argc, char** argv) {
    Arguments o = parse_arguments(argc, argv, "swiglu: exact, or keeping 1 to 4 bits of an element for backward");
    if (o.bench) return bench_models(bench);
    test_misuse(o, {refuses_12("swiglu_forward: F", [] { swiglu_forward<0>(nullptr, nullptr, nullptr, 1, 12, 0); }),
                    refuses_12("swiglu_backward: F", [] { swiglu_backward<2>(nullptr, nullptr, nullptr, 1, 12, 0); })});
    printf("swiglu, %s\n", dtype_name(FLOATX));
    test_every_gate();
    for (const SwiGLU& act : {swiglu_of<0>(), swiglu_of<1>(), swiglu_of<2>(), swiglu_of<3>(), swiglu_of<4>()}) {
        printf("%d bits\n", act.bits);
        test_forward(act, o.seed);
        test_backward(act, o.seed);
        test_nan(act, o.seed);
        test_far(act, o.seed);
    }
    return finish(o);
}
