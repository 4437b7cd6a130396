// Quantised linear layers over many rows (prompts, towers). From sm_80 on by mma.sync on bytes, loaded by cp.async; before that by
// dp4a. Bound by arithmetic.
//
// Codes are summed in integers for CHUNK elements, those that share scales, and in f32 beyond.
#include "tile.cuh"

#if __CUDA_ARCH__ >= 800

// A warp's fragments of four-bit values, as bytes.
__device__ __forceinline__ void take_weight(const Stage<4>& stage, int from, uint32_t (&weight)[4][2]) {
    int lane = threadIdx.x % 32, output = threadIdx.x / 32 % 2 * 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t* words = (const uint32_t*)&stage.weight[output + 8 * i + lane / 4][from / 2];
        uint32_t first = words[lane % 4 / 2], second = words[2 + lane % 4 / 2];
        weight[i][0] = lane % 2 ? odd_values(first) : even_values(first);
        weight[i][1] = lane % 2 ? odd_values(second) : even_values(second);
    }
}

// sums += x · weightᵀ over PIECE elements from `piece` · PIECE on.
template <int WORDS>
__device__ __forceinline__ void multiply(const Stage<WORDS>& stage, int piece, int (&sums)[ROW_PARTS][OUTPUT_PARTS]) {
    uint32_t x[2][4], weight[4][2];
    take_x(stage, piece * PIECE, x);
    take_weight(stage, piece * PIECE, weight);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int own[4] = {sums[2 * i][2 * j], sums[2 * i][2 * j + 1], sums[2 * i + 1][2 * j], sums[2 * i + 1][2 * j + 1]};
            mma_s8(own, x[i], weight[j]);
            sums[2 * i][2 * j] = own[0];
            sums[2 * i][2 * j + 1] = own[1];
            sums[2 * i + 1][2 * j] = own[2];
            sums[2 * i + 1][2 * j + 1] = own[3];
        }
    }
}

#else

// A thread's part of the tile, 8 × 4.
constexpr int ROW_PARTS = 8, OUTPUT_PARTS = 4;

__device__ __forceinline__ int row_of(int part) { return threadIdx.x / 16 * ROW_PARTS + part; }
__device__ __forceinline__ int output_of(int part) { return threadIdx.x % 16 + 16 * part; }

template <int WORDS>
__device__ __forceinline__ void multiply(const Stage<WORDS>& stage, int piece, int (&sums)[ROW_PARTS][OUTPUT_PARTS]) {
    for (int four = 0; four < PIECE / 4; four++) {
        int weight[OUTPUT_PARTS];
#pragma unroll
        for (int j = 0; j < OUTPUT_PARTS; j++) {
            const uint32_t* words = (const uint32_t*)&stage.weight[output_of(j)][piece * PIECE * WORDS / 8];
            if (WORDS == 8)
                weight[j] = (int)words[four];
            else
                weight[j] = four % 2 ? odd_values(words[four / 2]) : even_values(words[four / 2]);
        }
#pragma unroll
        for (int i = 0; i < ROW_PARTS; i++) {
            int x = *(const int*)&stage.x[row_of(i)][piece * PIECE + 4 * four];
#pragma unroll
            for (int j = 0; j < OUTPUT_PARTS; j++) sums[i][j] = dp4a(x, weight[j], sums[i][j]);
        }
    }
}

#endif

// codes [rows, blocks, 128], scales [rows, blocks] as `quantise` makes them. `chunk`: elements that share scales, 32, 64 or 128.
template <int WORDS>
__device__ __forceinline__ void matmul(const int* codes, const float* scales, int rows, int blocks, int chunk,
                                       const Layers& layers) {
    DYN_SMEM(memory);
    Stage<WORDS>* stages = (Stage<WORDS>*)memory;
    int task = blockIdx.x;
    const Layer& layer = layer_of(layers, task);
    const Weight& weight = layer.weight;
    int row = blockIdx.y * TILE, output = task * TILE;
    int steps = (weight.depth + STEP - 1) / STEP;
    auto fetch = [&](int step) {
        if (step < steps) load<WORDS>(stages[step % STAGES], codes, rows, blocks, row, weight, layer.aligned, output, step);
        commit();
    };
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    float totals[ROW_PARTS][OUTPUT_PARTS] = {};
    int sums[ROW_PARTS][OUTPUT_PARTS] = {};
    for (int step = 0; step < steps; step++) {
#if __CUDA_ARCH__ >= 800
        cp_async_wait<STAGES - 2>();
#endif
        __syncthreads();
        // What was computed last is free: everybody is past it.
        fetch(step + STAGES - 1);
#pragma unroll
        for (int piece = 0; piece < STEP / PIECE; piece++) {
            multiply<WORDS>(stages[step % STAGES], piece, sums);
            int at = step * STEP + piece * PIECE;
            if ((at + PIECE) % chunk != 0 && (step + 1 < steps || piece + 1 < STEP / PIECE)) continue;
            if (at >= weight.depth) at = (weight.depth - 1) / PIECE * PIECE;
            float of_weight[OUTPUT_PARTS];
#pragma unroll
            for (int j = 0; j < OUTPUT_PARTS; j++) {
                int own = min(output + output_of(j), weight.rows - 1);
                of_weight[j] = scale_at(weight, own, at) * (WORDS == 4 ? FOUR_BITS_FACTOR : 1.0f);
            }
#pragma unroll
            for (int i = 0; i < ROW_PARTS; i++) {
                int own = min(row + row_of(i), rows - 1);
                float of_x = scales[(size_t)own * blocks + at / BLOCK];
#pragma unroll
                for (int j = 0; j < OUTPUT_PARTS; j++) {
                    totals[i][j] += (float)sums[i][j] * (of_x * of_weight[j]);
                    sums[i][j] = 0;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_PARTS; i++)
#pragma unroll
        for (int j = 0; j < OUTPUT_PARTS; j++)
            if (row + row_of(i) < rows && output + output_of(j) < weight.rows)
                finish(layer, row + row_of(i), output + output_of(j), totals[i][j]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_i4(const int* codes, const float* scales, int rows, int blocks, int chunk, Layers layers) {
    matmul<4>(codes, scales, rows, blocks, chunk, layers);
}
EXPORT(matmul_i4) // 24576 bytes of dynamic shared memory

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_i8(const int* codes, const float* scales, int rows, int blocks, int chunk, Layers layers) {
    matmul<8>(codes, scales, rows, blocks, chunk, layers);
}
EXPORT(matmul_i8) // 30720 bytes of dynamic shared memory
