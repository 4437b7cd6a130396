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
