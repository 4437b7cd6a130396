// Tiles of 64 rows × 64 outputs of linear layers over many rows, on their way through shared memory. A block of four warps makes one in
// steps of 64 bytes of the depth; while a step is computed, the next two are on their way.
#pragma once
#include "quantised.cuh"

constexpr int THREADS = 128;
constexpr int TILE = 64;
constexpr int STEP = 64; // bytes of a row of x
constexpr int STAGES = 3;
// Bytes behind each row in shared memory: rows begin at different banks.
constexpr int PAD = 16;

// WORDS: 32-bit words of a weight for 32 bytes of x: 4 for four-bit values and 8 for what takes as many bytes as x.
template <int WORDS>
struct Stage {
    signed char x[TILE][STEP + PAD];
    unsigned char weight[TILE][STEP * WORDS / 8 + PAD];
};

// 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy16(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    cp_async16(to, from, there);
#else
    *(uint4*)to = there ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    cp_async_commit();
#endif
}

// Step `step` of x [rows, blocks, 128 bytes] and weight, from `row` and `output` on, to shared memory.
template <int WORDS>
__device__ __forceinline__ void load(Stage<WORDS>& stage, const int* codes, int rows, int blocks, int row, const Weight& weight,
                                     bool aligned, int output, int step) {
    for (int i = threadIdx.x; i < TILE * STEP / 16; i += THREADS) {
        int at = i / (STEP / 16), byte = i % (STEP / 16) * 16;
        // Blocks are filled up with zeros, so that only the last step of an odd number of blocks' half may be missing.
        bool there = row + at < rows && step * STEP < blocks * BLOCK;
        const signed char* from = (const signed char*)codes + (size_t)(row + at) * blocks * BLOCK + step * STEP + byte;
        copy16(&stage.x[at][byte], there ? from : (const signed char*)codes, there);
    }
    constexpr int BYTES = STEP * WORDS / 8;
    for (int i = threadIdx.x; i < TILE * BYTES / 16; i += THREADS) {
        int at = i / (BYTES / 16), byte = i % (BYTES / 16) * 16;
        long long start = (long long)step * BYTES + byte;
        bool there = output + at < weight.rows && start < weight.row_bytes;
        const unsigned char* from = there ? weight.data + (output + at) * weight.row_bytes + start : weight.data;
        if (aligned) {
            copy16(&stage.weight[at][byte], from, there);
        } else {
            for (int j = 0; j < 16; j++) stage.weight[at][byte + j] = there && start + j < weight.row_bytes ? from[j] : 0;
        }
    }
}

#if __CUDA_ARCH__ >= 800

// A warp's part of the tile, 32 × 32: two fragments of 16 rows by four of 8 outputs.
constexpr int ROW_PARTS = 4, OUTPUT_PARTS = 8;

// The row, or output, of the tile that part `part` of this thread's sums is of.
__device__ __forceinline__ int row_of(int part) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp / 2 * 32 + part * 8 + lane / 4;
}

__device__ __forceinline__ int output_of(int part) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp % 2 * 32 + part / 2 * 8 + lane % 4 * 2 + part % 2;
}

// A warp's fragments of 32 bytes of its rows of x, from byte `from` on.
template <int WORDS>
__device__ __forceinline__ void take_x(const Stage<WORDS>& stage, int from, uint32_t (&x)[2][4]) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 64 * 32;
#pragma unroll
    for (int i = 0; i < 2; i++) ldmatrix_x4(x[i], &stage.x[row + 16 * i + lane % 16][from + lane / 16 * 16]);
}

// Those of its outputs of the weight, where that takes as many bytes.
__device__ __forceinline__ void take_weight(const Stage<8>& stage, int from, uint32_t (&weight)[4][2]) {
    int lane = threadIdx.x % 32, output = threadIdx.x / 32 % 2 * 32;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t two[4];
        ldmatrix_x4(two, &stage.weight[output + 8 * i + lane / 16 * 8 + lane % 8][from + lane / 8 % 2 * 16]);
        weight[i][0] = two[0];
        weight[i][1] = two[1];
        weight[i + 1][0] = two[2];
        weight[i + 1][1] = two[3];
    }
}

#endif
