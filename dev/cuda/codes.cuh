// Codes of 1 to 4 bits of an activation's input, which backward gets in place of it: what gelu.cu and swiglu.cu share. Include it
// after common.cuh; the trainer's StepFunction has thresholds and slopes.
#pragma once

// As one writes it first: one element per thread, and a byte per code. x: (rows, columns) of rows that are `stride` apart.
template <int BITS>
__global__ void codes_1_kernel(uint8_t* byte_codes, const floatX* x, StepFunction<BITS> h, size_t n, int columns, int stride) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float value = (float)x[i / columns * stride + i % columns];
    int code = 0;   // how many thresholds are below x; a NaN is above them all
#pragma unroll
    for (int j = 0; j < (1 << BITS) - 1; j++) code += !(value <= h.threshold[j]);
    byte_codes[i] = (uint8_t)code;
}
// The slope of element i: its code is read bit by bit, and looked up in a table. The table is indexed by a variable, which registers
// cannot be: it lies in memory, local or constant.
template <int BITS> __device__ inline float code_slope_1(const uint8_t* codes, const StepFunction<BITS>& h, size_t i) {
    int code = 0;
    for (int b = 0; b < BITS; b++) {
        int bit = BITS * (int)(i % 8) + b;
        code |= (codes[i / 8 * BITS + bit / 8] >> (bit % 8) & 1) << b;
    }
    return h.slope[code];
}

// The reference, one bit at a time.
struct Codes {
    int bits;                              // 0: none
    std::vector<float> threshold, slope;
    int of(float x) const {                // the number of thresholds below x. A NaN has the highest code
        if (std::isnan(x)) return (1 << bits) - 1;
        int code = 0;
        for (float c : threshold) code += x > c;
        return code;
    }
    // Element i has bits k*(i%8) and up of the k bytes of its group of 8, the lowest first.
    int read(const uint8_t* kept, size_t i) const {
        int code = 0;
        for (int b = 0; b < bits; b++) {
            size_t bit = bits * (i % 8) + b;
            code |= (kept[i / 8 * bits + bit / 8] >> (bit % 8) & 1) << b;
        }
        return code;
    }
    // Inputs where something could go wrong: at and beside thresholds, and at the ends. (In bf16 they become fewer.)
    std::vector<float> special_values() const {
        std::vector<float> v = {0.0f, 1.401298464e-45f, 1e-40f, 1.175494210e-38f, 1.175494351e-38f, 1e-20f, 1e-3f, 1.0f, 9.0f, 12.0f,
                                1e4f, 1e20f, 3.402823466e38f, INFINITY, NAN};
        for (size_t k = v.size(); k-- > 0;) v.push_back(-v[k]);
        for (float c : threshold)
            for (float x : {c, nextafterf(c, -INFINITY), nextafterf(c, INFINITY)}) v.push_back(x);
        return v;
    }
};
template <int BITS> Codes codes_of(const StepFunction<BITS>& h) {
    return {BITS, {std::begin(h.threshold), std::end(h.threshold)}, {std::begin(h.slope), std::end(h.slope)}};
}
