// Softmax attention as it is defined, over buffers and caches of every type. All architectures; slow.
//
// A block for each query of each head. Keys come in tiles: a thread takes the score of a key, then, with the tile's weights
// known, the sums of a dimension of the values. The largest score so far goes out of all sums (online softmax, Milakov and
// Gimelshein 2018).
#include "attention.cuh"

constexpr int THREADS = 128;
// The widest head; src/cuda/attention.rs has the same number.
constexpr int WIDEST = 512;

// q and out [batch, queries, heads, head_dim]; the scales, where there are any, [key heads, strides.heads / head_dim].
template <typename T>
__device__ __forceinline__ void attend(const float* q, const T* k, const T* v, const float* k_scales, const float* v_scales,
                                       const Shape& shape, const Strides& strides, float* out) {
    DYN_SMEM(memory);
    float* query = (float*)memory; // [head_dim]
    __shared__ float weights[THREADS];
    __shared__ float parts[THREADS / 32];
    int width = shape.head_dim, head = blockIdx.y, key_head = head / (shape.heads / shape.key_heads);
    size_t at = (((size_t)blockIdx.z * shape.queries + blockIdx.x) * shape.heads + head) * width;
    long long start = blockIdx.z * strides.batches + key_head * strides.heads;
    k += start;
    v += start;
    if (k_scales) {
        k_scales += start / width;
        v_scales += start / width;
    }
    for (int i = threadIdx.x; i < width; i += THREADS) query[i] = q[at + i] * shape.scale;
    __syncthreads();
    int seen = shape.causal ? shape.keys - shape.queries + (int)blockIdx.x + 1 : shape.keys;
    float most = -INFINITY, total = 0.0f, sums[WIDEST / THREADS] = {};
    for (int first = 0; first < seen; first += THREADS) {
        int key = first + threadIdx.x;
        float score = -INFINITY;
        if (key < seen) {
            const T* from = k + key * strides.keys;
            score = 0.0f;
            for (int i = 0; i < width; i++) score += query[i] * wide(from[i]);
            if (k_scales) score *= k_scales[key];
        }
        float larger = fmaxf(most, block_max(score, parts));
        float weight = key < seen ? expf(score - larger) : 0.0f;
        float faded = expf(most - larger);
        most = larger;
        total = total * faded + block_sum(weight, parts);
        weights[threadIdx.x] = v_scales && key < seen ? weight * v_scales[key] : weight;
        __syncthreads();
        int count = min(THREADS, seen - first);
#pragma unroll
        for (int part = 0; part < WIDEST / THREADS; part++) {
            int i = part * THREADS + threadIdx.x;
            if (i >= width) continue;
            float sum = sums[part] * faded;
            for (int j = 0; j < count; j++) sum += weights[j] * wide(v[(first + j) * strides.keys + i]);
            sums[part] = sum;
        }
        __syncthreads();
    }
#pragma unroll
    for (int part = 0; part < WIDEST / THREADS; part++) {
        int i = part * THREADS + threadIdx.x;
        if (i < width) out[at + i] = sums[part] / total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_f32(const float* q, const float* k, const float* v,
                                                                    Shape shape, Strides strides, float* out) {
    attend<float>(q, k, v, nullptr, nullptr, shape, strides, out);
}
EXPORT(attention_f32) // 512 bytes of dynamic shared memory

extern "C" __global__ void __launch_bounds__(THREADS) attention_f16(const float* q, const __half* k, const __half* v,
                                                                    Shape shape, Strides strides, float* out) {
    attend<__half>(q, k, v, nullptr, nullptr, shape, strides, out);
}
EXPORT(attention_f16) // 512 bytes of dynamic shared memory

// Keys without their mean: that changes every score of a query by the same, which softmax does not see.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_i8(const float* q, const signed char* k, const signed char* v, const float* k_scales, const float* v_scales,
                 Shape shape, Strides strides, float* out) {
    attend<signed char>(q, k, v, k_scales, v_scales, shape, strides, out);
}
EXPORT(attention_i8) // 512 bytes of dynamic shared memory
