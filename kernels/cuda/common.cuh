// What all kernels share: stored weights, activation functions, sums over a block.
#pragma once
#include "ptx.cuh"

// How a weight's elements are stored; the numbers are those of `WeightType` in src/cuda/weight.rs.
enum Type : int { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };

// A stored weight [rows, depth], row-major. Integers are multiplied by scales [rows, scales_per_row], one for each
// 2^group_shift elements of a row. Four-bit values lie eight a little-endian word, the first in the lowest bits, as value + 8.
struct Weight {
    const unsigned char* data;
    const unsigned char* scales; // f32, f16 or bf16; none but for integers
    long long row_bytes;
    int rows, depth;
    int type, scale_type;
    int group_shift, scales_per_row; // 31 where a row has one scale
};

__device__ __forceinline__ float as_float(const unsigned char* data, int type, size_t at) {
    if (type == F16) return __half2float(((const __half*)data)[at]);
    if (type == BF16) return __bfloat162float(((const __nv_bfloat16*)data)[at]);
    return ((const float*)data)[at];
}

// The scale of element `at` of row `row`.
__device__ __forceinline__ float scale_at(const Weight& weight, int row, int at) {
    return as_float(weight.scales, weight.scale_type, (size_t)row * weight.scales_per_row + (at >> weight.group_shift));
}

// Element `at` of row `row`, of any type: the definition. Kernels that read much have loads of their own.
__device__ __forceinline__ float weight_at(const Weight& weight, int row, int at) {
    const unsigned char* data = weight.data + (size_t)row * weight.row_bytes;
    if (weight.type == I8) return (float)((const signed char*)data)[at] * scale_at(weight, row, at);
    if (weight.type == I4) {
        int code = data[at / 2] >> (at % 2 * 4) & 15;
        return (float)(code - 8) * scale_at(weight, row, at);
    }
    return as_float(data, weight.type, at);
}

// Element `at` of a weight that is taken as one run of numbers: a norm's weight, a bias, a depthwise kernel.
__device__ __forceinline__ float flat_at(const Weight& weight, int at) {
    return weight.depth == 1 ? weight_at(weight, at, 0) : weight_at(weight, at / weight.depth, at % weight.depth);
}

// The numbers are those of `code` in src/cuda/mod.rs.
enum Activation : int { IDENTITY = 0, GELU = 1, GELU_TANH = 2, SILU = 3, SIGMOID = 4, TANH = 5, RELU = 6 };

__device__ __forceinline__ float activation(int kind, float x) {
    switch (kind) {
    case GELU: return 0.5f * x * (1.0f + erff(0.70710678118654752f * x));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case SILU: return x / (1.0f + expf(-x));
    case SIGMOID: return 1.0f / (1.0f + expf(-x));
    case TANH: return tanhf(x);
    case RELU: return x < 0.0f ? 0.0f : x; // what is no number stays none
    default: return x;
    }
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
}

// The sum over a block of whole warps, in every thread. `parts` is shared memory for a number a warp; what stood there is read
// by nobody any more when this begins, as each call ends with a barrier.
__device__ __forceinline__ float block_sum(float x, float* parts) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += parts[warp];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ float block_max(float x, float* parts) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float most = parts[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; warp++) most = fmaxf(most, parts[warp]);
    __syncthreads();
    return most;
}

// This thread's number among all of the grid.
__device__ __forceinline__ size_t global_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

// All blocks of a cooperative launch meet here, and see what each of them wrote before. `arrived` is zero before the first launch, and
// no other launch uses it at the same time.
__device__ __forceinline__ void grid_barrier(unsigned* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // The highest bit turns when all have come, and the others are zero again: the first block adds what is missing to that.
        unsigned own = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        __threadfence();
        unsigned before = atomicAdd(arrived, own);
        while (((before ^ *(volatile unsigned*)arrived) & 0x80000000u) == 0) __nanosleep(20);
        __threadfence();
    }
    __syncthreads();
}
