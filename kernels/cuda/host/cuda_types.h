// The types and arithmetic of CUDA C++ for a host compiler: vectors, half and bfloat16, bit casts, mathematics.
// Part of cuda_host.h, which the kernels are compiled with.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// ---- Vectors. The alignments are CUDA's: a misaligned access through them is a bug on the device as well.

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_HOST_VECTOR2(name, type, alignment) \
    struct alignas(alignment) name {             \
        type x, y;                               \
    };                                           \
    inline name make_##name(type x, type y) { return {x, y}; }
#define CUDA_HOST_VECTOR4(name, type, alignment) \
    struct alignas(alignment) name {             \
        type x, y, z, w;                         \
    };                                           \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_HOST_VECTOR2(char2, signed char, 2)
CUDA_HOST_VECTOR2(uchar2, unsigned char, 2)
CUDA_HOST_VECTOR2(short2, short, 4)
CUDA_HOST_VECTOR2(ushort2, unsigned short, 4)
CUDA_HOST_VECTOR2(int2, int, 8)
CUDA_HOST_VECTOR2(uint2, unsigned, 8)
CUDA_HOST_VECTOR2(float2, float, 8)
CUDA_HOST_VECTOR4(char4, signed char, 4)
CUDA_HOST_VECTOR4(uchar4, unsigned char, 4)
CUDA_HOST_VECTOR4(short4, short, 8)
CUDA_HOST_VECTOR4(ushort4, unsigned short, 8)
CUDA_HOST_VECTOR4(int4, int, 16)
CUDA_HOST_VECTOR4(uint4, unsigned, 16)
CUDA_HOST_VECTOR4(float4, float, 16)

struct float3 {
    float x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
struct uint3 {
    unsigned x, y, z;
};
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- Bits.

namespace cuda_host {
template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the sizes differ");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace cuda_host

inline int __float_as_int(float value) { return cuda_host::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_host::bits_as<unsigned>(value); }
inline float __int_as_float(int bits) { return cuda_host::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cuda_host::bits_as<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (bits >> i & 1u) << (31 - i);
    return reversed;
}

// Each nibble of `selector` names one of the eight bytes of high:low; its top bit spreads that byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned choice = selector >> (4 * i) & 15u;
        unsigned byte = (unsigned)(bytes >> (8 * (choice & 7u))) & 0xffu;
        if (choice & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        result |= byte << (8 * i);
    }
    return result;
}

// Four signed bytes times four signed bytes, added to `sum` modulo 2^32.
inline int __dp4a(int a, int b, int sum) {
    unsigned total = (unsigned)sum;
    for (int i = 0; i < 4; i++) total += (unsigned)((int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i)));
    return (int)total;
}

// ---- Mathematics. The device's approximations (__expf and the like) are more exact here.

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

namespace cuda_host {
// The device's conversions clamp to the target's range and turn NaN into 0, where C++ leaves both undefined.
template <class Integer> inline Integer to_integer(float rounded) {
    constexpr double low =
        (double)(Integer)(std::is_signed<Integer>::value ? (Integer)1 << (sizeof(Integer) * 8 - 1) : 0);
    constexpr double beyond = (std::is_signed<Integer>::value ? 2147483648.0 : 4294967296.0);
    if (rounded != rounded) return 0;
    if ((double)rounded < low) return (Integer)low;
    if ((double)rounded >= beyond) return (Integer)(beyond - 1.0);
    return (Integer)rounded;
}
}  // namespace cuda_host

inline int __float2int_rn(float x) { return cuda_host::to_integer<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return cuda_host::to_integer<int>(truncf(x)); }
inline int __float2int_rd(float x) { return cuda_host::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return cuda_host::to_integer<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return cuda_host::to_integer<unsigned>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

// CUDA has min and max for every pair of built-in numbers, mixed signs included.
#define CUDA_HOST_MIN_MAX(result, left, right)                                                      \
    constexpr result min(left a, right b) { return (result)b < (result)a ? (result)b : (result)a; } \
    constexpr result max(left a, right b) { return (result)a < (result)b ? (result)b : (result)a; }
CUDA_HOST_MIN_MAX(int, int, int)
CUDA_HOST_MIN_MAX(unsigned, unsigned, unsigned)
CUDA_HOST_MIN_MAX(unsigned, int, unsigned)
CUDA_HOST_MIN_MAX(unsigned, unsigned, int)
CUDA_HOST_MIN_MAX(long, long, long)
CUDA_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUDA_HOST_MIN_MAX(long long, long long, long long)
CUDA_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- Half and bfloat16, rounded to the nearest, ties to even; every NaN becomes the device's one NaN.

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half value) {
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude > 0x7c00u) return __uint_as_float(0x7fffffffu);
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16;
    if (magnitude == 0x7c00u) return __uint_as_float(sign | 0x7f800000u);
    // As a float's bits the magnitude has an exponent that is 112 too small, subnormal numbers included.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
#endif
}

inline __half __float2half_rn(float value) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {0x7fff};
#if defined(__F16C__)
    return {(uint16_t)_cvtss_sh(value, 0)};
#else
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t half_bits;
    if (magnitude >= 0x477ff000u) {  // from 65520 on the nearest is infinity
        half_bits = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: added to 0.5 a float's last bit is worth 2^-24
        half_bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half_bits = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    }
    return {(uint16_t)(sign | half_bits)};
#endif
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
// A sum or product of two halves is right after two roundings, as a float has more than twice a half's bits.
inline __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
inline __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
inline __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }

namespace cuda_host {
// Rounds to the number of the smaller type with an odd last bit where it is not exact, so that a second rounding
// to a still smaller type ends where one rounding would have.
inline float to_float_odd(double exact, double rest) {
    uint64_t bits = bits_as<uint64_t>(exact);
    // `exact + rest` is the true value; make `exact` itself odd first.
    if (rest != 0.0 && !(bits & 1)) exact = bits_as<double>((rest > 0) == (exact > 0) ? bits | 1 : bits - 1);
    float near = (float)exact;
    if ((double)near == exact || !std::isfinite(near)) return near;
    uint32_t near_bits = bits_as<uint32_t>(near);
    if (near_bits & 1) return near;
    return bits_as<float>(std::fabs((double)near) < std::fabs(exact) ? near_bits + 1 : near_bits - 1);
}
}  // namespace cuda_host

// One rounding of a * b + c, as the device does it.
inline __half __hfma(__half a, __half b, __half c) {
    double product = (double)__half2float(a) * (double)__half2float(b), addend = (double)__half2float(c);
    double sum = product + addend;
    if (!std::isfinite(sum) || sum == 0.0) return __float2half_rn((float)sum);
    double part = sum - product, rest = (product - (sum - part)) + (addend - part);
    return __float2half_rn(cuda_host::to_float_odd(sum, rest));
}

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __half2half2(__half both) { return {both, both}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline __half2 __float2half2_rn(float both) { return __half2half2(__float2half_rn(both)); }
inline __half2 __float22half2_rn(float2 both) { return __floats2half2_rn(both.x, both.y); }
inline float2 __half22float2(__half2 both) { return {__half2float(both.x), __half2float(both.y)}; }
inline float __low2float(__half2 both) { return __half2float(both.x); }
inline float __high2float(__half2 both) { return __half2float(both.y); }
inline __half __low2half(__half2 both) { return both.x; }
inline __half __high2half(__half2 both) { return both.y; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float((uint32_t)value.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 both) { return {__bfloat162float(both.x), __bfloat162float(both.y)}; }
inline float __low2float(__nv_bfloat162 both) { return __bfloat162float(both.x); }
inline float __high2float(__nv_bfloat162 both) { return __bfloat162float(both.y); }
