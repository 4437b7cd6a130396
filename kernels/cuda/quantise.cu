// Activations to bytes. All architectures; bound by memory.
#include "quantised.cuh"

// x [rows, depth] → codes [rows, blocks, 128], zeros behind the last, and scales [rows, blocks]. A warp for each block.
extern "C" __global__ void __launch_bounds__(128)
    quantise(const float* x, size_t count, int blocks, int depth, int words, int* codes, float* scales) {
    size_t block = global_index() / 32;
    if (block >= count) return;
    const float* row = x + block / blocks * depth;
    int first = (int)(block % blocks) * BLOCK;
    round_block([&](int i) { return row[i]; }, first, depth, words, codes + block * (BLOCK / 4), scales + block);
}
EXPORT(quantise)
