// Activations to bytes. All architectures; bound by memory.
#include "quantised.cuh"

// x [rows, depth] → codes [rows, blocks, 128], zeros behind the last, and scales [rows, blocks]. A warp for each block.
// `words`: of every eight codes the even ones, then the odd ones, as words of four-bit weights fall apart.
extern "C" __global__ void __launch_bounds__(128)
    quantise(const float* x, size_t count, int blocks, int depth, int words, int* codes, float* scales) {
    size_t block = global_index() / 32;
    if (block >= count) return;
    int lane = threadIdx.x % 32;
    const float* row = x + block / blocks * depth;
    int first = (int)(block % blocks) * BLOCK + 4 * lane;
    float values[4];
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[i] = first + i < depth ? row[first + i] : 0.0f;
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
    codes[block * (BLOCK / 4) + lane] = (int)own;
    if (lane == 0) scales[block] = finite ? size / 127.0f : NAN;
}
EXPORT(quantise)
