/*
RoPE, the turning of queries and keys by angles that grow with their position, forward and backward; and Qwen3's norm of each head
before it. The trainer's kernels, tested, and simpler ones beside them to learn from. Section 2 of train_llama.cu has them under
"positions".

    make dev/cuda/rope && ./dev/cuda/rope [--bench]

A row of qkv has NH heads of queries, NKV of keys and NKV of values, HS channels each. Channels i and i + HS/2 of a head of q or k
are a pair (a, b), which at position t becomes (a cos - b sin, b cos + a sin) of the angle t * frequency[i]; in each sequence
positions begin at 0, and again where a document begins. Backward turns by minus the angle. With norms, y = gamma * x * rstd of a head is what is turned, where
rstd = 1 / sqrt(mean(x^2) + eps). HS is a multiple of 8, and 128 at most.
*/
#define TESTING
#include "../../train_llama.cu"

#include <array>

#include "common.cuh"

// ---- versions without norms

struct Shape {
    int B, T, NH, NKV, HS;
    __host__ __device__ int rows() const { return B * T; }
    __host__ __device__ int heads() const { return NH + NKV; }   // those that are turned
    __host__ __device__ int QKV() const { return (NH + 2 * NKV) * HS; }
    size_t turned() const { return (size_t)rows() * heads() * HS; }
    size_t all() const { return (size_t)rows() * QKV(); }
};

// Version 1: as Hugging Face's Python has it, x * cos + rotate_half(x) * sin, where rotate_half(x) is (-b, a): one tensor of q
// and k turned by a quarter (2 + 2 bytes of an element in bf16), then the sum of both products (2 + 2 + 2): 10. The sines lie in
// a table, which all heads of a row read, and the cache has it.
__global__ void rotate_half_1_kernel(floatX* half, const floatX* qkv, size_t n, Shape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int columns = s.heads() * s.HS, c = (int)(i % s.HS);
    const floatX* x = qkv + i / columns * s.QKV() + i % columns;
    half[i] = c < s.HS / 2 ? (floatX)-(float)x[s.HS / 2] : x[-s.HS / 2];
}
__global__ void rope_1_kernel(floatX* out, const floatX* qkv, const floatX* half, const float2* angles, float sign, size_t n,
                              Shape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int columns = s.heads() * s.HS, pair = (int)(i % (s.HS / 2));
    const size_t row = i / columns;
    const float2 angle = angles[row % s.T * (s.HS / 2) + pair];
    out[i] = (floatX)((float)qkv[row * s.QKV() + i % columns] * angle.x + (float)half[i] * (sign * angle.y));
}
// out, half: (rows, NH + NKV, HS)
void rope_1(floatX* out, floatX* half, const floatX* qkv, const float2* angles, bool back, Shape s) {
    const size_t n = s.turned();
    rotate_half_1_kernel<<<ceil_div(n, 256), 256>>>(half, qkv, n, s);
    rope_1_kernel<<<ceil_div(n, 256), 256>>>(out, qkv, half, angles, back ? -1.0f : 1.0f, n, s);
}

// Version 2: in place, 4 bytes, because a thread has both channels of its pair in registers. It computes its angle itself. A
// power, a sine and a cosine are a hundred instructions and more for a pair, and large angles take a path with many more: no
// kernel that is to run at the speed of memory has time for that. And an angle of its own is less exact: the power's error grows
// with t.
__global__ void rope_2_kernel(floatX* qkv, float theta, float sign, size_t n, Shape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // of (rows, NH + NKV, HS/2)
    if (i >= n) return;
    const int half = s.HS / 2, pair = (int)(i % half);
    const size_t row = i / half / s.heads();
    floatX* x = qkv + row * s.QKV() + i / half % s.heads() * s.HS + pair;
    const float angle = (float)(row % s.T) * powf(theta, -2.0f * pair / s.HS), c = cosf(angle), d = sign * sinf(angle);
    const float a = (float)x[0], b = (float)x[half];
    x[0] = (floatX)(a * c - b * d);
    x[half] = (floatX)(b * c + a * d);
}
void rope_2(floatX* qkv, float theta, bool back, Shape s) {
    const size_t n = s.turned() / 2;
    rope_2_kernel<<<ceil_div(n, 256), 256>>>(qkv, theta, back ? -1.0f : 1.0f, n, s);
}

// Version 3, the trainer's rope_forward and rope_backward: in place, angles from the table, which the host computes once, and 8
// pairs per thread: two loads of 16 bytes in bf16, two stores, and four loads of the table, which is in the L1 cache for all
// heads of a row but the first. Where HS is no multiple of 16 a thread takes 4 pairs, so that its loads are aligned.

// ---- versions with norms

// Version 1: a thread norms a head (reads it, and once more from the cache; 2 + 2 bytes), and the turning is another pass over q
// and k (4). The normed head is rounded on the way. Neighbouring threads stand in neighbouring heads, and each load of a warp
// touches 32 lines.
__global__ void head_norm_1_kernel(floatX* out, const floatX* qkv, const floatX* q_gamma, const floatX* k_gamma, float eps,
                                   size_t n, Shape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // a head
    if (i >= n) return;
    const int head = (int)(i % (s.NH + 2 * s.NKV));
    const floatX *x = qkv + i * s.HS, *gamma = head < s.NH ? q_gamma : k_gamma;
    float square = 0;
    for (int c = 0; c < s.HS; c++) square += (float)x[c] * (float)x[c];
    const float rstd = rsqrtf(square / s.HS + eps);
    for (int c = 0; c < s.HS; c++) out[i * s.HS + c] = head < s.heads() ? (floatX)((float)gamma[c] * ((float)x[c] * rstd)) : x[c];
}
void qk_norm_rope_1(floatX* out, const floatX* qkv, const floatX* q_gamma, const floatX* k_gamma, const float2* angles, float eps,
                    Shape s) {
    const size_t n = (size_t)s.rows() * (s.NH + 2 * s.NKV);
    head_norm_1_kernel<<<ceil_div(n, 128), 128>>>(out, qkv, q_gamma, k_gamma, eps, n, s);
    rope_forward(out, out, nullptr, nullptr, angles, eps, nullptr, 0, s.rows(), s.T, s.NH, s.NKV, s.HS, 0);
}
// Backward in version 1: turned back in a pass of its own (4); dgamma, a thread per channel down all rows and heads, which
// computes rstd for each channel once more (4); then what comes through the norm, a thread per head (6): 14.
__device__ inline float head_rstd_1(const floatX* x, float eps, int HS) {
    float square = 0;
    for (int c = 0; c < HS; c++) square += (float)x[c] * (float)x[c];
    return rsqrtf(square / HS + eps);
}
__global__ void head_dgamma_1_kernel(Grad dgamma, const floatX* d, const floatX* qkv, float eps, bool accumulate, int first,
                                     int heads, Shape s) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= s.HS) return;
    float sum = 0;
    for (int row = 0; row < s.rows(); row++)
        for (int h = first; h < first + heads; h++) {
            const size_t at = (size_t)row * s.QKV() + h * s.HS;
            sum += (float)d[at + c] * ((float)qkv[at + c] * head_rstd_1(qkv + at, eps, s.HS));
        }
    grad_store(dgamma, c, sum, accumulate);
}
__global__ void head_norm_backward_1_kernel(floatX* d, const floatX* qkv, const floatX* q_gamma, const floatX* k_gamma, float eps,
                                            size_t n, Shape s) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // a head of q or k
    if (i >= n) return;
    const int head = (int)(i % s.heads());
    const size_t at = i / s.heads() * s.QKV() + head * s.HS;
    const floatX* gamma = head < s.NH ? q_gamma : k_gamma;
    const float rstd = head_rstd_1(qkv + at, eps, s.HS);
    float mean = 0;
    for (int c = 0; c < s.HS; c++) mean += (float)d[at + c] * (float)gamma[c] * ((float)qkv[at + c] * rstd) / s.HS;
    for (int c = 0; c < s.HS; c++)
        d[at + c] = (floatX)(rstd * ((float)d[at + c] * (float)gamma[c] - (float)qkv[at + c] * rstd * mean));
}
void qk_norm_rope_backward_1(floatX* d, Grad dq_gamma, Grad dk_gamma, const floatX* qkv, const floatX* q_gamma,
                             const floatX* k_gamma, const float2* angles, float eps, bool accumulate, Shape s) {
    const size_t n = (size_t)s.rows() * s.heads();
    rope_backward(d, {}, {}, nullptr, nullptr, nullptr, nullptr, angles, eps, nullptr, false, 0, s.rows(), s.T, s.NH, s.NKV, s.HS, 0);
    head_dgamma_1_kernel<<<1, 128>>>(dq_gamma, d, qkv, eps, accumulate, 0, s.NH, s);
    head_dgamma_1_kernel<<<1, 128>>>(dk_gamma, d, qkv, eps, accumulate, s.NH, s.NKV, s);
    head_norm_backward_1_kernel<<<ceil_div(n, 128), 128>>>(d, qkv, q_gamma, k_gamma, eps, n, s);
}

// Version 2, the trainer's: a head lies in the registers of neighbouring lanes, which add up its squares by shuffles, norm it and
// turn it: 4 bytes, of v too, which moves along into the tensor that attention reads. Backward, 6 bytes: turns back, makes rstd
// and z again of what the matmul wrote, and keeps sums of dgamma in registers down a slice of the heads; 512 slices are added up
// in their order.

// ---- the reference, in double precision

constexpr double EPSILON = 1e-3;   // larger than models have it, so that it is seen if it is missing or another

// A frequency as the papers say it, by the length of a whole turn: llama3's long ones (beyond original / low) are stretched by
// the factor, the short ones (below original / high) stay.
double frequency_reference(const Rope& r, int i, int HS) {
    const double f = 1 / exp(log((double)r.theta) * 2 * i / HS);
    if (r.scaling == ROPE_LINEAR) return f / r.factor;
    if (r.scaling != ROPE_LLAMA3) return f;
    const double length = 2 * M_PI / f, longest = r.original / (double)r.low, shortest = r.original / (double)r.high;
    if (length <= shortest) return f;
    if (length >= longest) return f / r.factor;
    const double smooth = (r.original / length - r.low) / ((double)r.high - r.low);
    return f * (smooth + (1 - smooth) / r.factor);
}

// Numbers of one case, and what becomes of them. Of each result the terms, too: the sum of the absolute values that it is added
// up of.
struct Problem {
    Shape s;
    std::vector<floatX> qkv, d, q_gamma, k_gamma;
    std::vector<float2> angles;
    std::vector<int> document;      // where each row's begins; empty: at the sequence's beginning
    std::vector<float> before[2];   // what dgamma of q and of k are added to
    Problem(uint64_t seed, Shape s) : s(s) {
        Random random(seed, ((uint64_t)s.rows() << 32) + s.QKV() * 256 + s.HS);
        qkv = random.normals(s.all(), 0.25f, 2);
        for (int i = 0; i < s.HS; i++) qkv[i] = (floatX)0.0f;   // a head of zeros
        d = random.normals(s.all());
        q_gamma = random.normals(s.HS, 1, 0.5f), k_gamma = random.normals(s.HS, -1, 0.5f);
        angles = rope_table({10000}, s.T, s.HS, s.T);
        before[0] = random.grads(s.HS), before[1] = random.grads(s.HS);
    }
    // f(where a head of q or k begins, its position, 0 for q and 1 for k)
    template <class F> void each_head(F&& f) const {
        for (size_t row = 0; row < (size_t)s.rows(); row++)
            for (int h = 0; h < s.heads(); h++) f(row * s.QKV() + (size_t)h * s.HS, (int)(row % s.T), (int)(h >= s.NH));
    }
    float gamma(int k, int c) const { return (float)(k ? k_gamma : q_gamma)[c]; }
};
struct Head {
    Doubles x, terms;
    explicit Head(int HS) : x(HS), terms(HS) {}
    void turn(const Problem& p, int t, bool back) {
        const int half = p.s.HS / 2;
        for (int i = 0; i < half; i++) {
            const float2 angle = p.angles[(size_t)t * half + i];
            const double c = angle.x, d = back ? -angle.y : angle.y, a = x[i], b = x[i + half], ta = terms[i],
                         tb = terms[i + half];
            x[i] = a * c - b * d, x[i + half] = b * c + a * d;
            terms[i] = ta * fabs(c) + tb * fabs(d), terms[i + half] = tb * fabs(c) + ta * fabs(d);
        }
    }
};
Head head_of(const std::vector<floatX>& v, size_t at, int HS) {
    Head h(HS);
    for (int c = 0; c < HS; c++) h.x[c] = (float)v[at + c], h.terms[c] = fabs(h.x[c]);
    return h;
}
double rstd_of(const Head& h) {
    double square = 0;
    for (double x : h.x) square += x * x / h.x.size();
    return 1 / sqrt(square + EPSILON);
}
Head forward_reference(const Problem& p, size_t at, int t, int k, bool norms) {
    Head h = head_of(p.qkv, at, p.s.HS);
    const double rstd = rstd_of(h);
    for (int c = 0; norms && c < p.s.HS; c++) h.x[c] *= rstd * p.gamma(k, c), h.terms[c] *= rstd * fabs(p.gamma(k, c));
    h.turn(p, t, false);
    return h;
}
// With norms it adds to dgamma: {sum, terms}.
Head backward_reference(const Problem& p, size_t at, int t, int k, bool norms, Doubles* dgamma) {
    const int HS = p.s.HS;
    Head dy = head_of(p.d, at, HS);
    dy.turn(p, t, true);
    if (!norms) return dy;
    const Head x = head_of(p.qkv, at, HS);
    const double rstd = rstd_of(x);
    double mean = 0, size = 0;
    for (int c = 0; c < HS; c++) {
        const double z = x.x[c] * rstd;
        dgamma[0][c] += dy.x[c] * z, dgamma[1][c] += dy.terms[c] * fabs(z);
        mean += dy.x[c] * p.gamma(k, c) * z / HS, size += dy.terms[c] * fabs(p.gamma(k, c) * z) / HS;
    }
    Head dx(HS);
    for (int c = 0; c < HS; c++) {
        const double g = p.gamma(k, c), z = x.x[c] * rstd;
        dx.x[c] = rstd * (dy.x[c] * g - z * mean), dx.terms[c] = rstd * (dy.terms[c] * fabs(g) + fabs(z) * size);
    }
    return dx;
}

// ---- tests

// Frequencies are rounded to fp32, as in the models' own code, and up to the positions that a model was made for (`rounded`) so are
// angles; beyond them nothing else is, up to the last position.
void test_table() {
    Property table("the table: cosine and sine of t * frequency", "a frequency of one rounding"),
        rounded("the table where the model was made for it", "an angle of two roundings"),
        last("the table up to position 2^24 - 1", "results of one rounding"),
        branches("llama3: some frequencies stay, some are stretched, some lie in between"),
        distance("the product of a query and a key depends on their distance alone", "but for the rounding of three entries");
    const int T = 4099;
    const struct { const char* name; Rope r; int HS; } cases[] = {
        {"plain", {10000}, 64}, {"linear", {10000, ROPE_LINEAR, 4}, 96}, {"8 channels", {500000}, 8},
        {"Llama 3.1", {500000, ROPE_LLAMA3, 8, 1, 4, 8192}, 128}, {"Llama 3.2", {500000, ROPE_LLAMA3, 32, 1, 4, 8192}, 64},
        {"a short original", {10000, ROPE_LLAMA3, 4, 1.5f, 6, 256}, 40}};
    for (auto [name, r, HS] : cases) {
        const std::vector<float2> angles = rope_table(r, T, HS, 0), within = rope_table(r, T, HS, T - 1);
        const int half = HS / 2;
        int stay = 0, stretched = 0;
        set_case("%s", name);
        for (int i = 0; i < half; i++) {
            const double f = frequency_reference(r, i, HS), plain = pow((double)r.theta, -2.0 * i / HS);
            stay += fabs(f / plain - 1) < 1e-9, stretched += fabs(f / plain * r.factor - 1) < 1e-9;
            for (int t = 0; t < T; t += t < 8 ? 1 : 13) {
                const size_t at = (size_t)t * half + i;
                const double bound = 1.01 * EPS32 * f * t + EPS32;
                table.within(at, angles[at].x, cos(f * t), bound);
                table.within(at, angles[at].y, sin(f * t), bound);
                rounded.within(at, within[at].x, cos(f * t), 2 * bound);
                rounded.within(at, within[at].y, sin(f * t), 2 * bound);
                const float angle = (float)t * (float)rope_frequency(r, i, HS);   // and it is that one, to the bit
                if (t < T - 1) rounded.equal(at, within[at].x, (float)cos((double)angle));
                else rounded.equal(at, within[at].x, angles[at].x);
                const float2 q = angles[at], k = angles[(size_t)(t / 3) * half + i],
                             apart = angles[(size_t)(t - t / 3) * half + i];
                distance.within(at, (double)q.x * k.x + (double)q.y * k.y, apart.x, 3 * EPS32);
            }
        }
        for (int first : {(1 << 20) - 1, (1 << 24) - 2}) {
            const std::vector<float2> far = rope_table(r, 2, HS, 0, first);
            for (int i = 0; i < HS; i++) {
                const double angle = (double)(float)rope_frequency(r, i % half, HS) * (first + i / half);
                last.within(i, far[i].x, cos(angle), EPS32);
                last.within(i, far[i].y, sin(angle), EPS32);
            }
        }
        if (r.scaling == ROPE_LLAMA3)
            branches.is(stay > 0 && stretched > 0 && stay + stretched < half,
                        std::to_string(stay) + " stay, " + std::to_string(stretched) + " are stretched");
    }
    report({&table, &rounded, &last, &branches, &distance});
}

// Heads of each kind that the launcher tells apart: 8 and 4 pairs per thread; lanes of a head that are 1, 2, 4, 8 and 16, all of
// them used (8, 16, 32, 64, 128 channels) or not (24, 40, 48, 96, 104, 120); heads that end with a block, and in it. Positions
// begin anew in each sequence. For dgamma: slices of 16 heads and more, with fewer and more heads than a block takes at a time;
// 512 slices.
const Shape SHAPES[] = {{1, 1, 1, 1, 8},   {2, 5, 3, 1, 8},    {3, 7, 2, 2, 24},   {1, 33, 5, 1, 40},  {2, 65, 4, 2, 64},
                        {2, 19, 3, 3, 96}, {1, 91, 3, 3, 120}, {2, 13, 8, 2, 128}, {3, 100, 2, 1, 16}, {2, 9, 3, 1, 32},
                        {1, 11, 3, 1, 48}, {1, 40, 7, 7, 104}, {2, 1031, 8, 1, 8}};

std::string of(Shape s) {
    char text[100];
    snprintf(text, sizeof text, "B %d, T %d, NH %d, NKV %d, HS %d", s.B, s.T, s.NH, s.NKV, s.HS);
    return text;
}
const int* pointer(const Buffer<int>& document) { return document.n > 0 ? document.p : nullptr; }
void turn(floatX* qkv, const Buffer<float2>& angles, bool back, Shape s, const int* document = nullptr) {   // without norms
    const int half = (s.rows() + 1) / 2;   // in two parts, as chunks of rows come
    for (int first = 0; first < s.rows(); first += half) {
        const int rows = std::min(half, s.rows() - first);
        floatX* at = qkv + (size_t)first * s.QKV();
        if (back)
            rope_backward(at, {}, {}, nullptr, nullptr, nullptr, nullptr, angles.p, 0, document, false, first, rows, s.T, s.NH, s.NKV, s.HS, 0);
        else rope_forward(at, at, nullptr, nullptr, angles.p, 0, document, first, rows, s.T, s.NH, s.NKV, s.HS, 0);
    }
}
// Whether v is as it was.
bool same_values(const std::vector<floatX>& a, const std::vector<floatX>& b, Shape s) {
    bool same = true;
    for (size_t row = 0; row < (size_t)s.rows(); row++) {
        const size_t from = row * s.QKV() + (size_t)s.heads() * s.HS;
        same &= memcmp(&a[from], &b[from], sizeof(floatX) * s.NKV * s.HS) == 0;
    }
    return same;
}
constexpr double STORED = EPSX / ROUNDINGS;   // what storing on the way costs, as a multiple of close()'s terms

void test_turning(uint64_t seed) {
    Property forward("forward: q and k"), backward("backward: q and k"), values("v is as it was"),
        again("the same bits in a second run"), inverse("backward gives back what forward has turned", "but for rounding it"),
        sines("backward is forward with the sines' signs changed", "every bit"), one("version 1: rotate_half"),
        two("version 2: with angles of its own", "and their error");
    for (const Shape& s : SHAPES) {
        const Problem p(seed, s);
        set_case("%s", of(s).c_str());
        Buffer<floatX> x(p.qkv), d(p.d);
        Buffer<float2> angles(p.angles), mirrored(p.angles.size());
        std::vector<float2> other = p.angles;
        for (float2& angle : other) angle.y = -angle.y;
        mirrored.write(other);
        turn(x.p, angles, false, s);
        turn(d.p, angles, true, s);
        const std::vector<floatX> y = x.read(), dx = d.read();
        values.is(same_values(y, p.qkv, s) && same_values(dx, p.d, s), "v has changed");
        turn(x.p, angles, true, s);
        const std::vector<floatX> once = x.read();
        x.write(p.qkv), d.write(p.d);
        turn(x.p, angles, false, s);
        turn(d.p, mirrored, false, s);
        again.is(same_bits(x.read(), y), "other bits");
        sines.is(same_bits(d.read(), dx), "other bits");
        // the simple ones
        Buffer<floatX> turned(s.turned()), half(s.turned());
        x.write(p.qkv);
        rope_1(turned.p, half.p, x.p, angles.p, false, s);
        const std::vector<floatX> y1 = turned.read();
        x.write(p.d);
        rope_1(turned.p, half.p, x.p, angles.p, true, s);
        const std::vector<floatX> dx1 = turned.read();
        x.write(p.qkv);
        rope_2(x.p, 10000, false, s);
        const std::vector<floatX> y2 = x.read();
        size_t i = 0;   // of version 1's results
        p.each_head([&](size_t at, int t, int k) {
            const Head f = forward_reference(p, at, t, k, false), b = backward_reference(p, at, t, k, false, nullptr);
            for (int c = 0; c < s.HS; c++, i++) {
                forward.close(at + c, (float)y[at + c], f.x[c], f.terms[c]);
                backward.close(at + c, (float)dx[at + c], b.x[c], b.terms[c]);
                one.close(i, (float)y1[i], f.x[c], f.terms[c]);
                one.close(i, (float)dx1[i], b.x[c], b.terms[c]);
                const double pair = hypot((float)p.qkv[at + c], (float)p.qkv[at + (c + s.HS / 2) % s.HS]);
                inverse.close(at + c, (float)once[at + c], (float)p.qkv[at + c], 2 * pair * (1 + STORED));
                two.close(at + c, (float)y2[at + c], f.x[c], f.terms[c] + pair * (1 + t));
            }
        });
    }
    report({&forward, &backward, &values, &again, &inverse, &sines, &one, &two});
}

struct Backward {
    std::vector<floatX> d;
    std::vector<float> dgamma[2];
    bool operator==(const Backward& b) const {
        return same_bits(d, b.d) && same_bits(dgamma[0], b.dgamma[0]) && same_bits(dgamma[1], b.dgamma[1]);
    }
};
std::vector<floatX> norm_forward(const Problem& p, bool simple, Property& only_read) {
    const Shape& s = p.s;
    Buffer<floatX> qkv(p.qkv), out(s.all()), q_gamma(p.q_gamma), k_gamma(p.k_gamma);
    Buffer<float2> angles(p.angles);
    Buffer<int> document(p.document);
    if (simple) qk_norm_rope_1(out.p, qkv.p, q_gamma.p, k_gamma.p, angles.p, (float)EPSILON, s);
    else
        rope_forward(out.p, qkv.p, q_gamma.p, k_gamma.p, angles.p, (float)EPSILON, pointer(document), 0, s.rows(), s.T, s.NH, s.NKV, s.HS, 0);
    only_read.is(same_bits(qkv.read(), p.qkv), "qkv has changed");
    return out.read();
}
// wanted: which of dgamma; what is not wanted stays as it was
Backward norm_backward(const Problem& p, bool simple, DType type, bool accumulate, std::array<bool, 2> wanted,
                       Property& only_read) {
    const Shape& s = p.s;
    Buffer<floatX> qkv(p.qkv), d(p.d), q_gamma(p.q_gamma), k_gamma(p.k_gamma);
    Buffer<float2> angles(p.angles);
    Buffer<int> document(p.document);
    Buffer<float> scratch((size_t)std::max(norm_slices(s.rows() * s.NH), norm_slices(s.rows() * s.NKV)) *
                          s.HS);   // no more than is used
    GradBuffer dq(s.HS, type), dk(s.HS, type);
    if (accumulate) dq.write(p.before[0]), dk.write(p.before[1]);
    const Grad gq = wanted[0] ? dq.grad() : Grad{}, gk = wanted[1] ? dk.grad() : Grad{};
    if (simple) qk_norm_rope_backward_1(d.p, gq, gk, qkv.p, q_gamma.p, k_gamma.p, angles.p, (float)EPSILON, accumulate, s);
    else
        rope_backward(d.p, gq, gk, scratch.p, qkv.p, q_gamma.p, k_gamma.p, angles.p, (float)EPSILON, pointer(document), accumulate,
                      0, s.rows(), s.T, s.NH, s.NKV, s.HS, 0);
    only_read.is(same_bits(qkv.read(), p.qkv), "qkv has changed");
    return {d.read(), {dq.read(), dk.read()}};
}

void test_norms(uint64_t seed) {
    Property forward("norms, forward: q and k"), backward("norms, backward: q and k"), sums32("norms: dgamma in fp32"),
        sums16("norms: dgamma in bf16"), values("norms: v is as it was"), again("norms: the same bits in a second run"),
        unwanted("norms: the same bits of the rest where a dgamma is not wanted"), only_read("norms: qkv is as it was"),
        one("norms, version 1");
    for (const Shape& s : SHAPES) {
        const Problem p(seed, s);
        Doubles dgamma[2][2] = {{Doubles(s.HS, 0), Doubles(s.HS, 0)},
                                {Doubles(s.HS, 0), Doubles(s.HS, 0)}};   // of q and k: sums, terms
        for (bool simple : {false, true}) {
            set_case("%s, version %d", of(s).c_str(), 2 - simple);
            const std::vector<floatX> y = norm_forward(p, simple, only_read);
            const Backward b = norm_backward(p, simple, F32, false, {true, true}, only_read);
            if (!simple) {
                again.is(same_bits(norm_forward(p, false, only_read), y), "other bits");
                again.is(norm_backward(p, false, F32, false, {true, true}, only_read) == b, "other bits");
                p.each_head([&](size_t at, int t, int k) { backward_reference(p, at, t, k, true, dgamma[k]); });
            }
            values.is(same_values(y, p.qkv, s) && same_values(b.d, p.d, s), "v has changed");
            const double stored = simple ? 2 * STORED : 0;   // version 1 rounds what it has normed, or turned back
            Doubles ignored[2] = {Doubles(s.HS), Doubles(s.HS)};
            p.each_head([&](size_t at, int t, int k) {
                const Head f = forward_reference(p, at, t, k, true), back = backward_reference(p, at, t, k, true, ignored);
                for (int c = 0; c < s.HS; c++) {
                    (simple ? one : forward).close(at + c, (float)y[at + c], f.x[c], f.terms[c] * (1 + stored));
                    (simple ? one : backward).close(at + c, (float)b.d[at + c], back.x[c], back.terms[c] * (1 + stored));
                }
            });
            const bool large = s.rows() * s.NH > 5000;   // each way once
            for (DType type : {F32, BF16})
                for (bool accumulate : {false, true}) {
                    if ((simple || large) && accumulate != (type == F32)) continue;
                    const Backward g = norm_backward(p, simple, type, accumulate, {true, true}, only_read);
                    for (int k : {0, 1})
                        for (int c = 0; c < s.HS; c++) {
                            const double was = accumulate ? p.before[k][c] : 0,
                                         terms = dgamma[k][1][c] * (1 + stored) * (simple ? 1 + s.rows() * s.NH / 32.0 : 1);
                            Property& sums = simple ? one : type == F32 ? sums32 : sums16;
                            sums.close(c, g.dgamma[k][c], was + dgamma[k][0][c], fabs(was) + terms, store_of(type));
                        }
                }
            if (simple || large) continue;
            const Backward all = norm_backward(p, false, F32, true, {true, true}, only_read);
            for (std::array<bool, 2> wanted : {std::array{true, false}, {false, true}, {false, false}}) {
                Backward g = norm_backward(p, false, F32, true, wanted, only_read);
                for (int k : {0, 1})
                    if (!wanted[k])
                        unwanted.is(same_bits(g.dgamma[k], p.before[k]), "dgamma was written"), g.dgamma[k] = all.dgamma[k];
                unwanted.is(g == all, "other bits");
            }
        }
    }
    report({&forward, &backward, &sums32, &sums16, &values, &again, &unwanted, &only_read, &one});
}

// A row with documents is turned like one long sequence whose table has, for each token, the angles of its place in its document.
void test_documents(uint64_t seed) {
    Property p("positions begin anew at a document: every bit as by a table of each token's angles"), only_read("and qkv is as it was");
    for (const Shape& s : SHAPES) {
        set_case("%s", of(s).c_str());
        Problem packed(seed, s), flat = packed;
        Random random(seed, s.all());
        packed.document = documents(random, s.B, s.T, 4);
        flat.s = {1, s.rows(), s.NH, s.NKV, s.HS}, flat.angles.clear();
        for (int row = 0; row < s.rows(); row++) {
            const auto angle = packed.angles.begin() + (row % s.T - packed.document[row]) * (s.HS / 2);
            flat.angles.insert(flat.angles.end(), angle, angle + s.HS / 2);
        }
        auto turned = [](const Problem& q, bool back) {
            Buffer<floatX> x(back ? q.d : q.qkv);
            Buffer<float2> angles(q.angles);
            Buffer<int> document(q.document);
            turn(x.p, angles, back, q.s, pointer(document));
            return x.read();
        };
        for (bool back : {false, true}) p.is(same_bits(turned(packed, back), turned(flat, back)), back ? "d" : "qkv");
        p.is(same_bits(norm_forward(packed, false, only_read), norm_forward(flat, false, only_read)), "with norms, out");
        p.is(norm_backward(packed, false, F32, false, {true, true}, only_read) ==
                 norm_backward(flat, false, F32, false, {true, true}, only_read), "with norms, backward");
    }
    report({&p, &only_read});
}

// A NaN or an infinity in a channel reaches its pair, at position 0 too, where it is multiplied by a sine of 0. With norms a NaN
// of qkv reaches its head (an infinity makes zeros of the others there, which are other bits), that of gamma its pairs in all
// heads.
void test_special(uint64_t seed) {
    Property p("a NaN in any input reaches what it is part of, and only that"), only_read("and qkv is as it was");
    const Shape s = {2, 37, 3, 2, 40};
    const Problem clean(seed, s);
    auto pair = [&](size_t i, size_t at) { return i == at || (i / s.HS == at / s.HS && (i + s.HS / 2 - at) % (s.HS / 2) == 0); };
    auto head = [&](size_t i) { return (int)(i / s.HS % (s.NH + 2 * s.NKV)); };   // within its row
    {
        Buffer<float2> angles(clean.angles);
        auto both = [&](const Problem& q) {
            Buffer<floatX> x(q.qkv), d(q.d);
            turn(x.p, angles, false, s), turn(d.p, angles, true, s);
            return std::array{x.read(), d.read()};
        };
        const auto before = both(clean);
        for (float odd : {NAN, -INFINITY})
            for (size_t at :
                 {(size_t)s.HS + 3, s.all() / 2 / s.QKV() * s.QKV() + 4 * s.HS + 25, s.all() - 1}) {   // of q, of k, of v
                set_case("%g in element %zu, without norms", odd, at);
                Problem q = clean;
                q.qkv[at] = q.d[at] = (floatX)odd;
                const auto after = both(q);
                for (int i : {0, 1})
                    check_reach(
                        p, after[i], before[i], [&](size_t e) { return head(at) < s.heads() ? pair(e, at) : e == at; },
                        i ? "d" : "qkv");
            }
    }
    auto both = [&](const Problem& q) {
        return std::make_pair(norm_forward(q, false, only_read), norm_backward(q, false, F32, false, {true, true}, only_read));
    };
    const auto before = both(clean);
    const int c = 7;
    for (int k : {0, 1}) {
        const size_t at = (size_t)(s.T + 5) * s.QKV() + (k ? s.NH + 1 : 1) * s.HS + c;   // in the second sequence
        auto in_head = [&](size_t i) { return i / s.HS == at / s.HS; };
        auto in_kind = [&](size_t i) { return head(i) < s.heads() && (head(i) >= s.NH) == k; };
        auto channel = [&](size_t i) { return i % (s.HS / 2) == c % (s.HS / 2); };
        auto nothing = [](size_t) { return false; };
        auto check = [&](const char* name, std::vector<floatX> Problem::*in, size_t where, auto out, auto d, auto dgamma) {
            set_case("NaN in %s of %s, with norms", name, k ? "k" : "q");
            Problem q = clean;
            (q.*in)[where] = (floatX)NAN;
            const auto after = both(q);
            check_reach(p, after.first, before.first, out, "out");
            check_reach(p, after.second.d, before.second.d, d, "d");
            check_reach(p, after.second.dgamma[k], before.second.dgamma[k], dgamma, "dgamma");
            check_reach(p, after.second.dgamma[!k], before.second.dgamma[!k], nothing, "the other's dgamma");
        };
        check("qkv", &Problem::qkv, at, in_head, in_head, [](size_t) { return true; });
        check("d", &Problem::d, at, nothing, in_head, channel);
        check(
            "gamma", k ? &Problem::k_gamma : &Problem::q_gamma, c, [&](size_t i) { return in_kind(i) && channel(i % s.HS); },
            in_kind, nothing);
    }
    report({&p, &only_read});
}

// Index arithmetic where qkv, the table and partial sums have more than 2^31 elements: the first rows and the last ones. Rows of
// one head of each kind, 128 channels, one sequence. A block of 256 threads takes 32 heads. In the trainer backward has 512
// slices at most; here it has one for each row, so that partial sums are many.
void test_far(uint64_t seed) {
    Property forward("turning beyond 2^31 elements, first and last rows", "every bit"), chunk("and chunks of rows there", "every bit"),
        norms("norms, forward, beyond 2^31 elements", "every bit"), back("norms, backward, beyond 2^31 elements", "every bit");
    constexpr int HS = 128, QKV = 3 * HS, NEAR = 32;
    const Problem p(seed, {1, NEAR, 1, 1, HS});
    Buffer<floatX> q_gamma(p.q_gamma), k_gamma(p.k_gamma);
    {
        constexpr int rows = (1 << 25) + 5;
        set_case("%d rows", rows);
        Far<floatX> x((size_t)rows * QKV, p.qkv, QKV, QKV);
        Far<float2> angles((size_t)rows * (HS / 2), p.angles, HS / 2, HS / 2);
        for (int row : {0, rows / 16 * 16}) {   // 16 rows have 32 heads of q and k
            x.at = (size_t)row * QKV, angles.at = (size_t)row * (HS / 2), x.rows = angles.rows = std::min(rows - row, 16);
            check_far(forward, {&x, &angles}, {row / 16}, [&](bool far) {
                rope_forward(x.p(far), x.p(far), nullptr, nullptr, angles.p(far), 0, nullptr, 0, far ? rows : (int)x.rows,
                             far ? rows : (int)x.rows, 1, 1, HS, 0);
            });
            check_far(chunk, {&x, &angles}, {0}, [&](bool far) {   // a chunk of these rows alone
                floatX* at = x.p(far) + (far ? x.at : 0);
                rope_forward(at, at, nullptr, nullptr, angles.p(far), 0, nullptr, far ? row : 0, (int)x.rows, far ? rows : (int)x.rows, 1, 1,
                             HS, 0);
            });
        }
    }
    {
        constexpr int rows = (1 << 23) + 5;
        set_case("%d rows with norms", rows);
        Far<floatX> x((size_t)rows * QKV, p.qkv, QKV, QKV), out((size_t)rows * QKV, p.qkv.size(), QKV, QKV);
        Far<float2> angles((size_t)rows * (HS / 2), p.angles, HS / 2, HS / 2);
        for (int row : {0, rows / NEAR * NEAR}) {   // 32 rows have 96 heads, three blocks of them
            x.at = out.at = (size_t)row * QKV, angles.at = (size_t)row * (HS / 2),
            x.rows = out.rows = angles.rows = std::min(rows - row, NEAR);
            const int64_t block = (int64_t)row * 3 / 32;
            std::vector<int64_t> blocks = {block};
            if (x.rows > 10) blocks.push_back(block + 1), blocks.push_back(block + 2);
            check_far(norms, {&x, &out, &angles}, blocks, [&](bool far) {
                rope_forward(out.p(far), x.p(far), q_gamma.p, k_gamma.p, angles.p(far), (float)EPSILON, nullptr,
                             0, far ? rows : (int)x.rows, far ? rows : (int)x.rows, 1, 1, HS, 0);
            });
        }
    }
    constexpr int rows = (1 << 24) + 5;
    set_case("%d rows, backward", rows);
    const std::vector<floatX> one_row(p.qkv.begin() + QKV, p.qkv.begin() + 2 * QKV),
        gradient(p.d.begin() + QKV, p.d.begin() + 2 * QKV);
    Far<floatX> x((size_t)rows * QKV, one_row, QKV, QKV), d((size_t)rows * QKV, gradient, QKV, QKV);
    Far<float2> angles((size_t)rows * (HS / 2), {p.angles.begin() + HS / 2, p.angles.begin() + HS}, HS / 2, HS / 2);
    Far<float> partial((size_t)rows * HS, HS, HS, HS);
    for (int row : {0, rows - 1})
        for (int first_head : {0, 1}) {
            x.at = d.at = (size_t)row * QKV, angles.at = (size_t)row * (HS / 2), partial.at = (size_t)row * HS;
            check_far(back, {&x, &d, &angles, &partial}, {row}, [&](bool far) {
                const int all = far ? rows : 1;
                qk_norm_rope_backward_kernel<8><<<all, 256>>>(d.p(far), partial.p(far), x.p(far),
                                                              first_head ? k_gamma.p : q_gamma.p, angles.p(far), (float)EPSILON,
                                                              RopeShape{0, all, 1, 1, HS, 8}, first_head, 1, all);
            });
        }
    report({&forward, &chunk, &norms, &back});
}

// ---- benchmark

void bench(const BenchModel& m) {
    const Shape s = {m.B, m.T, m.NH, m.NKV, m.HS};
    const double X = sizeof(floatX), table = (double)m.T * m.HS / 2 * sizeof(float2) / s.turned(),
                 all = (double)s.all() / s.turned();
    BenchTable t(s.turned(), BenchTable::BYTES, "%s: an element of q and k, %d and %d heads of %d", m.name, m.NH, m.NKV, m.HS);
    const size_t here = t.here(s.all(), s.QKV()), turned = t.here(s.turned(), s.QKV());
    Random random(1337, 1);
    Buffer<floatX> x(here), out(here), half(turned), q_gamma(random.normals(m.HS, 1, 0.5f)),
        k_gamma(random.normals(m.HS, 1, 0.5f));
    x.fill(), out.fill();
    Buffer<float2> angles(rope_table({10000}, m.T, m.HS, m.T));
    Buffer<float> scratch((size_t)NORM_SLICES * m.HS);
    GradBuffer dq(m.HS, F32), dk(m.HS, F32);
    t.row("version 1: rotate_half, then two products", 5 * X + table, [&] { rope_1(out.p, half.p, x.p, angles.p, false, s); });
    t.row("version 2: in place, each pair computes its angle", 2 * X, [&] { rope_2(x.p, 10000, false, s); });
    t.row("version 3: the trainer's, a table, 8 pairs per thread", 2 * X + table, [&] { turn(x.p, angles, false, s); });
    t.row("version 3, backward", 2 * X + table, [&] { turn(x.p, angles, true, s); });
    t.row("norms, version 1: a thread per head, then the turning", 2 * X * all + 2 * X + table,
          [&] { qk_norm_rope_1(out.p, x.p, q_gamma.p, k_gamma.p, angles.p, 1e-6f, s); });
    t.row("norms, version 2: the trainer's, one pass (v moves too)", 2 * X * all + table, [&] {
        rope_forward(out.p, x.p, q_gamma.p, k_gamma.p, angles.p, 1e-6f, nullptr, 0, s.rows(), s.T, s.NH, s.NKV, s.HS, 0);
    });
    t.row("norms, backward, version 1: three passes", 7 * X + table, [&] {
        qk_norm_rope_backward_1(out.p, dq.grad(), dk.grad(), x.p, q_gamma.p, k_gamma.p, angles.p, 1e-6f, false, s);
    });
    t.row("norms, backward, version 2: the trainer's, one pass", 3 * X + table, [&] {
        rope_backward(out.p, dq.grad(), dk.grad(), scratch.p, x.p, q_gamma.p, k_gamma.p, angles.p, 1e-6f, nullptr, false, 0, s.rows(),
                      s.T, s.NH, s.NKV, s.HS, 0);
    });
}

int main(int argc, char** argv) {
    Arguments o =
        parse_arguments(argc, argv, "rope: turning queries and keys by their position, with a norm of each head or without");
    if (o.bench) return bench_models(bench);
    floatX other, *none = nullptr;
    auto forward = [=](int HS) { rope_forward(none, none, none, none, nullptr, 0, nullptr, 0, 1, 1, 1, 1, HS, 0); };
    auto expected = [](int HS) { return "a head has " + std::to_string(HS) + " channels: expected a multiple of 8, up to 128"; };
    test_misuse(o, {{"12 channels", expected(12), [=] { forward(12); }},
                    {"0 channels", expected(0), [=] { forward(0); }},
                    {"136 channels", expected(136),
                     [=] { rope_backward(none, {}, {}, nullptr, none, none, none, nullptr, 0, nullptr, false, 0, 1, 1, 1, 1, 136, 0); }},
                    {"norms in place", "with norms it does not",
                     [&] { rope_forward(none, none, &other, &other, nullptr, 0, nullptr, 0, 1, 1, 1, 1, 8, 0); }},
                    {"without norms into another tensor", "without norms it works in place",
                     [&] { rope_forward(&other, none, none, none, nullptr, 0, nullptr, 0, 1, 1, 1, 1, 8, 0); }}});
    printf("rope, %s\n", dtype_name(FLOATX));
    test_table();
    test_turning(o.seed);
    test_norms(o.seed);
    test_documents(o.seed);
    test_special(o.seed);
    test_far(o.seed);
    return finish(o);
}
