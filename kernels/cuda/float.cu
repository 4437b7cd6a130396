// Linear layers over weights in f32, f16 and bf16, with f32 activations. All architectures.
//
// Few rows: a warp for OUTPUTS rows of the weight, which is read once, by 16 bytes where its rows allow; bound by memory. More rows:
// tiles of 64 × 64 outputs in shared memory; bound by arithmetic.
#include "layers.cuh"

constexpr int OUTPUTS = 2;
constexpr int WARPS = 4;

// Eight consecutive elements of a weight's row as f32, zeros behind its end.
__device__ __forceinline__ void load8(const Weight& weight, const unsigned char* row, int at, bool aligned, float (&values)[8]) {
    if (aligned && at + 8 <= weight.depth) {
        if (weight.type == F32) {
            float4 low = *(const float4*)(row + 4 * (size_t)at), high = *(const float4*)(row + 4 * (size_t)at + 16);
            values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
            values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
            return;
        }
        uint4 four = load_streaming((const uint4*)(row + 2 * (size_t)at));
        uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (weight.type == BF16) {
                values[2 * i] = __uint_as_float(words[i] << 16);
                values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
            } else {
                values[2 * i] = __half2float(__ushort_as_half((unsigned short)words[i]));
                values[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(words[i] >> 16)));
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = at + i < weight.depth ? as_float(row, weight.type, at + i) : 0.0f;
}

// x [rows, depth], rows ≤ ROWS
template <int ROWS>
__device__ __forceinline__ void float_matvec(const float* x, int rows, const Layers& layers) {
    int task = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const Layer& layer = layer_of(layers, task);
    const Weight& weight = layer.weight;
    if (task >= layer.tasks) return;
    int first = task * OUTPUTS;
    float sums[OUTPUTS][ROWS] = {};
    for (int at = 8 * lane; at < weight.depth; at += 8 * 32) {
        float values[OUTPUTS][8];
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++) {
            int row = min(first + output, weight.rows - 1);
            load8(weight, weight.data + row * weight.row_bytes, at, layer.aligned, values[output]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (ROWS > 1 && row >= rows) break;
            const float* own = x + (size_t)row * weight.depth + at;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float value = at + i < weight.depth ? own[i] : 0.0f;
#pragma unroll
                for (int output = 0; output < OUTPUTS; output++) sums[output][row] += values[output][i] * value;
            }
        }
    }
#pragma unroll
    for (int output = 0; output < OUTPUTS; output++) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float sum = warp_sum(sums[output][row]);
            int at = first + output;
            if (lane != 0 || row >= rows || at >= weight.rows) continue;
            finish(layer, row, at, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) float_matvec_1(const float* x, int rows, Layers layers) {
    float_matvec<1>(x, rows, layers);
}
EXPORT(float_matvec_1)

extern "C" __global__ void __launch_bounds__(32 * WARPS) float_matvec_8(const float* x, int rows, Layers layers) {
    float_matvec<8>(x, rows, layers);
}
EXPORT(float_matvec_8)

constexpr int TILE = 64;
constexpr int DEEP = 16;
constexpr int THREADS = 128;
constexpr int ROW_PARTS = 8, OUTPUT_PARTS = 4;

// x [rows, depth]. A thread makes 8 rows of 4 outputs.
extern "C" __global__ void __launch_bounds__(THREADS) float_matmul(const float* x, int rows, Layers layers) {
    __shared__ float of_x[DEEP][TILE + 4], of_weight[DEEP][TILE + 4];
    int task = blockIdx.x;
    const Layer& layer = layer_of(layers, task);
    const Weight& weight = layer.weight;
    int row = blockIdx.y * TILE, output = task * TILE;
    int down = threadIdx.x / 16 * ROW_PARTS, across = threadIdx.x % 16 * OUTPUT_PARTS;
    float sums[ROW_PARTS][OUTPUT_PARTS] = {};
    for (int first = 0; first < weight.depth; first += DEEP) {
        // A thread brings eight consecutive elements of one row of each.
        int own = threadIdx.x / 2, at = threadIdx.x % 2 * 8;
        float values[8];
        if (output + own < weight.rows) {
            load8(weight, weight.data + (output + own) * weight.row_bytes, first + at, layer.aligned, values);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            of_weight[at + i][own] = values[i];
            bool there = row + own < rows && first + at + i < weight.depth;
            of_x[at + i][own] = there ? x[(size_t)(row + own) * weight.depth + first + at + i] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            float a[ROW_PARTS], b[OUTPUT_PARTS];
#pragma unroll
            for (int i = 0; i < ROW_PARTS; i++) a[i] = of_x[k][down + i];
#pragma unroll
            for (int j = 0; j < OUTPUT_PARTS; j++) b[j] = of_weight[k][across + j];
#pragma unroll
            for (int i = 0; i < ROW_PARTS; i++)
#pragma unroll
                for (int j = 0; j < OUTPUT_PARTS; j++) sums[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROW_PARTS; i++)
#pragma unroll
        for (int j = 0; j < OUTPUT_PARTS; j++)
            if (row + down + i < rows && output + across + j < weight.rows)
                finish(layer, row + down + i, output + across + j, sums[i][j]);
}
EXPORT(float_matmul)
