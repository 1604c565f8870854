// bfloat16: every pattern, and rounding where it is decided.
#include <cuda_bf16.h>

#include "expect.h"

typedef __nv_bfloat16 bf16;

__global__ void widen_kernel(float* out) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __bfloat162float(__ushort_as_bfloat16((unsigned short)i));
}
__global__ void round_kernel(unsigned short* out, const float* in, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
}
__global__ void arithmetic_kernel(float* out) {
    bf16 a = 1.5f, b = __float2bfloat16(0.00390625f);
    out[0] = (float)(a + b);                  // 1.50390625 is half way: to even, 1.5
    out[1] = (float)(a - b * b);
    out[2] = (float)(a * a);
    out[3] = (float)(a / __float2bfloat16(3.0f));
    out[4] = a > b && b < a && a != b && !(a == b) && a >= b && b <= a ? 1.0f : 0.0f;
    float2 pair = __bfloat1622float2(__floats2bfloat162_rn(1.0f, 2.0f));
    out[5] = pair.x;
    out[6] = pair.y;
    out[7] = (float)(-a);
    out[8] = (float)__shfl_xor_sync(0xffffffff, bf16((float)threadIdx.x), 1);
}

static uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

int main() {
    static float wide[65536];
    float* device = device_array<float>(65536);
    widen_kernel<<<256, 256>>>(device);
    to_host(wide, device, 65536);
    for (uint32_t i = 0; i < 65536; i++) EXPECT(bits(wide[i]) == i << 16);

    // each pattern, its neighbours in fp32 and the half way point to the next, with the result of exact arithmetic
    static float in[65536 * 5];
    static unsigned short expected[65536 * 5], got[65536 * 5];
    int n = 0;
    for (uint32_t i = 0; i < 65536; i++) {
        bool nan = (i & 0x7fff) > 0x7f80, infinite = (i & 0x7fff) == 0x7f80;
        uint32_t half = (i << 16) + 0x8000;
        auto add = [&](uint32_t u, uint32_t result) { in[n] = from_bits(u); expected[n++] = (unsigned short)result; };
        add(i << 16, nan ? 0x7fff : i);
        if (nan || infinite) continue;
        add((i << 16) + 1, i);
        add(half - 1, i);
        add(half, i & 1 ? i + 1 : i);         // a tie: to the even one, which may be infinity
        add(half + 1, i + 1);
    }
    float* din = to_device(in, n);
    unsigned short* dout = to_device(got, n);
    round_kernel<<<(n + 255) / 256, 256>>>(dout, din, n);
    to_host(got, dout, n);
    for (int i = 0; i < n; i++) EXPECT(got[i] == expected[i]);
    EXPECT(__bfloat16_as_ushort(__float2bfloat16(from_bits(0x7f800001))) == 0x7fff);      // a NaN whose upper half is infinity
    EXPECT(__bfloat16_as_ushort(bf16(1.0 + 1.0 / 256 + 1e-12)) == 0x3f81);                // a double is rounded once, not by way of float
    EXPECT(__bfloat16_as_ushort(bf16(1.0 + 1.0 / 256)) == 0x3f80);
    EXPECT(__bfloat16_as_ushort(__float2bfloat16_rz(1.9999f)) == 0x3fff);
    EXPECT((int)bf16(-7.5f) == -7 && bf16(3) == bf16(3.0f) && (bool)bf16(0.0f) == false);

    float a[9];
    arithmetic_kernel<<<1, 32>>>(device);
    to_host(a, device, 9);
    EXPECT(a[0] == 1.5f && a[1] == 1.5f && a[2] == 2.25f && a[3] == 0.5f && a[4] == 1.0f);
    EXPECT(a[5] == 1.0f && a[6] == 2.0f && a[7] == -1.5f);
    return finish();
}
