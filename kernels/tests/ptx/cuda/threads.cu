// Threads together: shared memory, warps, atomics, calls, tables, structures, local arrays.
#include "ptx.cuh"

extern "C" __global__ void reduce(const float* x, float* out, int n) {
    __shared__ float part[32];
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
        for (int step = 16; step; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (threadIdx.x == 0) atomicAdd(out, sum);
    }
}

template <int T> __device__ float tile_product(const float* a, const float* b, int n) {
    __shared__ float tile_a[T][T + 1], tile_b[T][T + 1];
    int row = blockIdx.y * T + threadIdx.y, column = blockIdx.x * T + threadIdx.x;
    float sum = 0;
    for (int k = 0; k < n; k += T) {
        tile_a[threadIdx.y][threadIdx.x] = a[row * n + k + threadIdx.x];
        tile_b[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + column];
        __syncthreads();
#pragma unroll
        for (int j = 0; j < T; j++) sum += tile_a[threadIdx.y][j] * tile_b[j][threadIdx.x];
        __syncthreads();
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) product(const float* a, const float* b, float* c, int n) {
    c[(blockIdx.y * 16 + threadIdx.y) * n + blockIdx.x * 16 + threadIdx.x] = tile_product<16>(a, b, n);
}

// One row a block; the longest row fits the dynamic shared memory.
extern "C" __global__ void softmax(const float* x, float* y, int n) {
    DYN_SMEM(raw);
    float* row = (float*)raw;
    __shared__ float shared;
    float most = -INFINITY;
    for (int i = threadIdx.x; i < n; i += blockDim.x) most = fmaxf(most, row[i] = x[(size_t)blockIdx.x * n + i]);
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[i] = expf(row[i] - most);
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) shared = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[(size_t)blockIdx.x * n + i] = row[i] / shared;
}

__constant__ float table[8] = {1, 2, 3, 4, 5, 6, 7, 8.5f};
__device__ int counter = 5;

__device__ __noinline__ float horner(float x, int terms) {
    float sum = 0;
    for (int i = 0; i < terms; i++) sum = sum * x + table[i & 7];
    return sum;
}

struct Settings {
    int terms;
    float scale;
    const float* values;
    signed char small;
    short middle;
    float offsets[5];
};

extern "C" __global__ void mixture(Settings s, float* out, int* counts, int which) {
    int i = threadIdx.x;
    float local[16];
    for (int k = 0; k < 16; k++) local[k] = s.values[k] * s.scale;
    float value = horner(local[(i * which) & 15] * 0.01f, s.terms) + s.offsets[i % 5] + s.small + s.middle;
    switch (which) {
    case 0: value += 1; break;
    case 1: value *= 2; break;
    case 2: value -= 3; break;
    case 3: value *= value; break;
    case 4: value = -value; break;
    case 5: value += i; break;
    default: value = 0;
    }
    out[i] = value;
    atomicAdd(counts, 1);
    atomicMax(counts + 1, i);
    atomicMin(counts + 2, -i);
    atomicOr(counts + 3, 1 << (i & 31));
    atomicExch(counts + 4, 77);
    atomicCAS(counts + 5, 0, i + 1);
    atomicAdd(&counter, 1);
    __syncthreads();
    if (i == 0) counts[6] = counter;
    counts[7 + i] = __syncthreads_count(i % 3 == 0);
}

extern "C" __global__ void lanes(const int* x, int* out) {
    int i = threadIdx.x, lane = i % 32, v = x[i];
    const unsigned all = 0xffffffffu;
    int* o = out + i * 12;
    int at = 0;
    o[at++] = __shfl_sync(all, v, 3);
    o[at++] = __shfl_xor_sync(all, v, 5);
    o[at++] = __shfl_up_sync(all, v, 2);
    o[at++] = __shfl_down_sync(all, v, 7);
    o[at++] = __shfl_sync(all, v, lane * 3, 16);
    o[at++] = __shfl_xor_sync(all, v, 1, 8);
    o[at++] = __ballot_sync(all, v > 50);
    o[at++] = __any_sync(all, v > 98) + 2 * __all_sync(all, v >= 0);
    if (lane < 16) v = __shfl_down_sync(0xffffu, v, 1, 16);
    __syncwarp();
    o[at++] = v;
    o[at++] = (int)(__shfl_xor_sync(all, (long long)v << 20, 1) >> 20);
    float2 pair = make_float2((float)v, 1.f);
    pair.x = __shfl_xor_sync(all, pair.x, 16);
    o[at++] = (int)pair.x;
    uint4 four = load_streaming((const uint4*)x + lane / 4);
    o[at++] = four.x + four.y + four.z + four.w;
}
