// Linear layers of weights in f16 over many rows (towers in f16), by mma.sync. sm_80 and later; empty before that, where `float` does
// it. Bound by arithmetic.
#include "tile.cuh"

// x [rows, depth] → f16 [rows, blocks, 64], zeros behind the last, times the power of two that makes the largest of a row 2¹³ to 2¹⁴:
// nothing overflows, and what is small keeps its digits. `scales` [rows] take that back. A block for each row.
extern "C" __global__ void __launch_bounds__(THREADS)
    to_half(const float* x, int blocks, int depth, __half* halves, float* scales) {
    __shared__ float parts[THREADS / 32];
    x += (size_t)blockIdx.x * depth;
    halves += (size_t)blockIdx.x * blocks * 64;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < depth; i += THREADS) largest = fmaxf(largest, fabsf(x[i]));
    largest = block_max(largest, parts);
    // The bits of the exponent alone: that of 2¹³ over that of the largest.
    int exponent = (__float_as_int(largest) >> 23) - 127;
    bool usual = exponent > -100 && exponent < 128;
    float factor = usual ? __int_as_float((13 - exponent + 127) << 23) : 1.0f;
    for (int i = threadIdx.x; i < blocks * 64; i += THREADS) halves[i] = __float2half_rn(i < depth ? x[i] * factor : 0.0f);
    if (threadIdx.x == 0) scales[blockIdx.x] = 1.0f / factor;
}
EXPORT(to_half)

#if __CUDA_ARCH__ >= 800

// sums += x · weightᵀ over 16 elements, the piece of 32 bytes `piece`.
__device__ __forceinline__ void multiply(const Stage<8>& stage, int piece, float (&sums)[2][4][4]) {
    uint32_t x[2][4], weight[4][2];
    take_x(stage, piece * PIECE, x);
    take_weight(stage, piece * PIECE, weight);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_f16(sums[i][j], x[i], weight[j]);
}

#endif

// x [rows, blocks, 64] and scales [rows] as `to_half` makes them.
extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_f16(const __half* x, const float* scales, int rows, int blocks, Layers layers) {
#if __CUDA_ARCH__ >= 800
    DYN_SMEM(memory);
    Stage<8>* stages = (Stage<8>*)memory;
    int task = blockIdx.x;
    const Layer& layer = layer_of(layers, task);
    const Weight& weight = layer.weight;
    int row = blockIdx.y * TILE, output = task * TILE;
    int steps = (2 * weight.depth + STEP - 1) / STEP;
    auto fetch = [&](int step) {
        if (step < steps) load<8>(stages[step % STAGES], (const int*)x, rows, blocks, row, weight, layer.aligned, output, step);
        commit();
    };
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    float sums[2][4][4] = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        // What was computed last is free: everybody is past it.
        fetch(step + STAGES - 1);
#pragma unroll
        for (int piece = 0; piece < STEP / PIECE; piece++) multiply(stages[step % STAGES], piece, sums);
    }
#pragma unroll
    for (int i = 0; i < ROW_PARTS; i++) {
        int own = row + row_of(i);
        if (own >= rows) continue;
        float scale = scales[own];
#pragma unroll
        for (int j = 0; j < OUTPUT_PARTS; j++)
            if (output + output_of(j) < weight.rows)
                finish(layer, own, output + output_of(j), sums[i / 2][j / 2][i % 2 * 2 + j % 2] * scale);
    }
#endif
}
EXPORT(matmul_f16) // 30720 bytes of dynamic shared memory
