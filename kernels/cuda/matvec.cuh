// Quantised linear layers over few rows: every weight is read once, as it is stored. All architectures (dp4a); bound by memory.
//
// A warp takes OUTPUTS rows of the weight; each lane a piece of 32 elements of each, then the piece 32 further on. A gate goes with
// what it is multiplied by: a warp takes a row of each.
#pragma once
#include "quantised.cuh"

constexpr int OUTPUTS = 2;
constexpr int WARPS = 4; // of a block

// The words of piece `piece` of a row of weights; zeros behind its end.
template <int WORDS>
__device__ __forceinline__ void load_piece(const Weight& weight, const unsigned char* row, int piece, bool aligned,
                                           uint32_t (&words)[WORDS]) {
    int first = piece * WORDS * 4;
    if (aligned) {
#pragma unroll
        for (int part = 0; part < WORDS / 4; part++) {
            uint4 four = first + 16 * part < weight.row_bytes ? load_streaming((const uint4*)(row + first) + part)
                                                              : make_uint4(0, 0, 0, 0);
            words[4 * part] = four.x;
            words[4 * part + 1] = four.y;
            words[4 * part + 2] = four.z;
            words[4 * part + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
        words[word] = 0;
        for (int byte = 0; byte < 4; byte++) {
            int at = first + 4 * word + byte;
            if (at < weight.row_bytes) words[word] |= (uint32_t)row[at] << (8 * byte);
        }
    }
}

// Σ weight · code over a piece.
__device__ __forceinline__ int dot(const uint32_t (&weight)[4], const int (&codes)[8]) {
    int sum = 0;
#pragma unroll
    for (int word = 0; word < 4; word++) {
        sum = dp4a(even_values(weight[word]), codes[2 * word], sum);
        sum = dp4a(odd_values(weight[word]), codes[2 * word + 1], sum);
    }
    return sum;
}

__device__ __forceinline__ int dot(const uint32_t (&weight)[8], const int (&codes)[8]) {
    int sum = 0;
#pragma unroll
    for (int word = 0; word < 8; word++) sum = dp4a((int)weight[word], codes[word], sum);
    return sum;
}

// Task `task` of the layers, by a warp. codes [rows, blocks, 128], scales [rows, blocks] as `round_block` makes them; rows ≤ ROWS.
// WORDS: 32-bit words of a piece.
template <int ROWS, int WORDS>
__device__ __forceinline__ void matvec(const int* codes, const float* scales, int rows, int blocks, const Layers& layers, int task) {
    int lane = threadIdx.x % 32;
    const Layer& layer = layer_of(layers, task);
    if (task >= layer.tasks) return;
    int first = layers.gated ? task : task * OUTPUTS;
    float sums[OUTPUTS][ROWS] = {};
    int pieces = (layer.weight.depth + PIECE - 1) / PIECE;
    for (int piece = lane; piece < pieces; piece += 32) {
        uint32_t words[OUTPUTS][WORDS];
        float factors[OUTPUTS];
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++) {
            const Weight& weight = layers.gated ? layers.layer[output].weight : layer.weight;
            bool aligned = layers.gated ? layers.layer[output].aligned : layer.aligned;
            int row = layers.gated ? first : min(first + output, weight.rows - 1);
            load_piece(weight, weight.data + row * weight.row_bytes, piece, aligned, words[output]);
            factors[output] = scale_at(weight, row, piece * PIECE) * (WORDS == 4 ? FOUR_BITS_FACTOR : 1.0f);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (ROWS > 1 && row >= rows) break;
            int own[8];
            const int4* from = (const int4*)(codes + ((size_t)row * blocks * BLOCK + piece * PIECE) / 4);
            *(int4*)own = from[0];
            *(int4*)(own + 4) = from[1];
            float scale = scales[row * blocks + piece * PIECE / BLOCK];
#pragma unroll
            for (int output = 0; output < OUTPUTS; output++)
                sums[output][row] += (float)dot(words[output], own) * (scale * factors[output]);
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++) sums[output][row] = warp_sum(sums[output][row]);
        if (lane != 0 || row >= rows) continue;
        if (layers.gated) {
            layer.out[(size_t)row * layer.weight.rows + first] = activation(layer.kind, sums[0][row]) * sums[1][row];
            continue;
        }
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++)
            if (first + output < layer.weight.rows) finish(layer, row, first + output, sums[output][row]);
    }
}
