// Activations as bytes, and four-bit weights as bytes: what the kernels for quantised weights share.
//
// As on the CPU, a block of 128 activations of a row becomes signed bytes with one scale (largest magnitude / 127, to nearest,
// ties to even), and products are summed in integers for as long as weights and activations share their scales.
#pragma once
#include "layers.cuh"

// Activations that share a scale. Every group of weights lies within a block.
constexpr int BLOCK = 128;
// Elements that are loaded together: 16 bytes of four-bit values, 32 bytes of others. Every group holds whole pieces.
constexpr int PIECE = 32;

// Sixteen times the even values of a word of four-bit values + 8, as signed bytes; and the odd ones.
__device__ __forceinline__ int even_values(uint32_t word) { return (int)((word << 4 & 0xf0f0f0f0u) ^ 0x80808080u); }
__device__ __forceinline__ int odd_values(uint32_t word) { return (int)((word & 0xf0f0f0f0u) ^ 0x80808080u); }

// What products with `even_values` and `odd_values` are too large by.
constexpr float FOUR_BITS_FACTOR = 1.0f / 16.0f;

// A block of the values that `value(i)` gives for i < depth, from `first` on, as codes [128] and a scale, by a warp; zeros behind the
// last. `words`: of every eight codes the even ones, then the odd ones, as words of four-bit weights fall apart.
template <typename Value>
__device__ __forceinline__ void round_block(Value value, int first, int depth, int words, int* codes, float* scale) {
    int lane = threadIdx.x % 32;
    first += 4 * lane;
    float values[4];
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[i] = first + i < depth ? value(first + i) : 0.0f;
        largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
    }
    for (int apart = 16; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
    float size = __uint_as_float(largest);
    // Infinity and what is no number make a scale that is none. A block of next to nothing is zero.
    bool finite = largest < 0x7f800000u;
    float factor = finite && size > 1e-30f ? 127.0f / size : 0.0f;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (factor > 0.0f) own |= ((uint32_t)__float2int_rn(values[i] * factor) & 0xffu) << (8 * i);
    if (words) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
        own = lane % 2 == 0 ? __byte_perm(own, other, 0x6420) : __byte_perm(other, own, 0x7531);
    }
    codes[lane] = (int)own;
    if (lane == 0) *scale = finite ? size / 127.0f : NAN;
}
