// Arithmetic of every kind: each thread computes one column of results, in the order that compiled.rs lists them.
#include "ptx.cuh"

extern "C" __global__ void functions(const float* x, const float* y, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i], b = y[i];
    float* o = out + i;
    int row = 0;
#define PUT(value) o[(size_t)n * row++] = (value)
    PUT(expf(a));
    PUT(__expf(a));
    PUT(exp2f(a));
    PUT(logf(fabsf(a)));
    PUT(__logf(fabsf(a)));
    PUT(log1pf(fabsf(a)));
    PUT(expm1f(a));
    PUT(erff(a));
    PUT(tanhf(a));
    PUT(sqrtf(fabsf(a)));
    PUT(rsqrtf(fabsf(a)));
    PUT(a / b);
    PUT(1.f / a);
    PUT(__fdividef(a, b));
    PUT(powf(fabsf(a), 0.7f));
    PUT(sinf(a));
    PUT(cosf(a));
    PUT(__sinf(a));
    PUT(fmodf(a, 1.7f));
    PUT(a / (1.f + __expf(-a)));
    PUT(0.5f * a * (1.f + erff(a * 0.70710678f)));
}

extern "C" __global__ void exact(const float* x, const float* y, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i], b = y[i];
    float* o = out + i;
    int row = 0;
    PUT(a + b);
    PUT(a * b - 1.5f);  // one rounding: the compiler fuses them
    PUT(fmaxf(a, b));
    PUT(fminf(a, b));
    PUT(rintf(a));
    PUT(floorf(a));
    PUT(ceilf(a));
    PUT(truncf(a));
    PUT(copysignf(a, b));
    PUT(fmaf(a, b, a));
    PUT(__frcp_rn(a));
    PUT(__fsqrt_rn(fabsf(a)));
    PUT(__saturatef(a));
    PUT((float)__float2int_rn(a));
    PUT((float)(int)a);
    PUT((float)(unsigned)fabsf(a));
    PUT(__int_as_float(__float_as_int(a) ^ 0x80000000));
    PUT((float)((double)a / b));
    PUT((float)(signed char)(int)a);
    PUT(isfinite(a / 0.f) ? 1.f : 2.f);
}

extern "C" __global__ void integers(const int* x, const int* y, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int a = x[i], b = y[i];
    unsigned p = a, q = b;
    int* o = out + i;
    int row = 0;
    PUT(a / b);
    PUT(a % b);
    PUT(p / q);
    PUT(p % q);
    PUT(a / 7);
    PUT(p % 10u);
    PUT(a >> (b & 31));
    PUT(p >> (b & 31));
    PUT(a << (b & 31));
    PUT(min(a, b));
    PUT(max(p, q));
    PUT(abs(a));
    PUT(__popc(a));
    PUT(__clz(a));
    PUT(__ffs(a));
    PUT(__brev(a));
    PUT(__byte_perm(a, b, 0x3715));
    PUT(__mulhi(a, b));
    PUT((int)(((long long)a * b) >> 20));
    PUT((int)((unsigned long long)p * q % 1000003u));
    PUT((int)(((long long)a << 20) / b));
    PUT((int8_t)a + (uint8_t)b);
    PUT((int)(p << 20) >> 28);
    PUT((a & b) | (~a & 0x0f0f0f0f) ^ b);
    PUT(__funnelshift_l(a, b, 9));
    PUT(dp4a(a, b, 17));
    PUT(a < b && p > q ? 3 : 4);
    PUT((a > 0) + (b > 0) * 2);
}

extern "C" __global__ void halves(const __half* x, const __half* y, unsigned short* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    __half a = x[i], b = y[i];
    __half2 both = __halves2half2(a, b), turned = __lowhigh2highlow(both);
    unsigned short* o = out + i;
    int row = 0;
    PUT(__half_as_ushort(__hadd(a, b)));
    PUT(__half_as_ushort(__hmul(a, b)));
    PUT(__half_as_ushort(__hfma(a, b, a)));
    PUT(__half_as_ushort(__low2half(__hadd2(both, turned))));
    PUT(__half_as_ushort(__high2half(__hmul2(both, turned))));
    PUT(__half_as_ushort(__high2half(__hfma2(both, turned, both))));
    PUT(__half_as_ushort(__float2half_rn(__half2float(a) * 1.37f)));
    PUT(__half_as_ushort(__high2half(__floats2half2_rn(1.f, __high2float(both) + 0.1f))));
    PUT(__half_as_ushort(__hmax(a, b)));
    PUT(__bfloat16_as_ushort(__float2bfloat16_rn(__half2float(a))));
    PUT(__bfloat16_as_ushort(__float2bfloat16_rn(__bfloat162float(__float2bfloat16_rn(__half2float(a))) * 3.f)));
}
