// The write side of key-value caches, [key heads, capacity, head_dim], and keys of a buffer as bytes. All architectures; bound by
// memory.
#include "cache.cuh"

// k and v [rows, key heads, head_dim] to positions first ...
template <typename T, typename Store>
__device__ __forceinline__ void write(const float* k, const float* v, size_t rows, int key_heads, int head_dim, int capacity,
                                      int first, T* keys, T* values, Store store) {
    size_t i = global_index();
    if (i >= rows * key_heads * head_dim) return;
    int dimension = (int)(i % head_dim), head = (int)(i / head_dim % key_heads);
    size_t position = first + i / head_dim / key_heads;
    size_t to = ((size_t)head * capacity + position) * head_dim + dimension;
    keys[to] = store(k[i]);
    values[to] = store(v[i]);
}

extern "C" __global__ void __launch_bounds__(256)
    cache_write_f32(const float* k, const float* v, size_t rows, int key_heads, int head_dim, int capacity, int first,
                    float* keys, float* values) {
    write(k, v, rows, key_heads, head_dim, capacity, first, keys, values, [](float x) { return x; });
}
EXPORT(cache_write_f32)

extern "C" __global__ void __launch_bounds__(256)
    cache_write_f16(const float* k, const float* v, size_t rows, int key_heads, int head_dim, int capacity, int first,
                    __half* keys, __half* values) {
    write(k, v, rows, key_heads, head_dim, capacity, first, keys, values, [](float x) { return __float2half_rn(x); });
}
EXPORT(cache_write_f16)

// A warp for each row and head.
extern "C" __global__ void __launch_bounds__(32)
    cache_write_i8(const float* k, const float* v, int key_heads, int head_dim, int capacity, int first, int averaged,
                   float* mean, signed char* keys, float* key_scales, signed char* values, float* value_scales) {
    int row = blockIdx.x, head = blockIdx.y;
    auto at = [&](int other) { return ((size_t)other * key_heads + head) * head_dim; };
    write_bytes(
        row, head, head_dim, first, capacity, averaged, mean, keys, key_scales, values, value_scales,
        [&](int other, int i) { return k[at(other) + i]; }, [&](int i) { return v[at(row) + i]; });
}
EXPORT(cache_write_i8)

// Turns the head of q [rows, heads, 2 · pairs] that this warp is for, in place; false if it is for a key head.
__device__ __forceinline__ bool turn_query(float* q, const Turn& turn) {
    int head = blockIdx.y, position = turn.first + blockIdx.x;
    if (head >= turn.heads) return false;
    float* own = q + ((size_t)blockIdx.x * turn.heads + head) * 2 * turn.pairs;
    for (int i = threadIdx.x; i < turn.pairs; i += 32) {
        float sine, cosine;
        sine_cosine((float)position * turn.frequencies[i], sine, cosine);
        float a = own[i], b = own[i + turn.pairs];
        own[i] = a * cosine - b * sine;
        own[i + turn.pairs] = b * cosine + a * sine;
    }
    return true;
}

// What is in k and v [rows, key heads, 2 · pairs] for this warp's row and head goes to the cache, the key turned.
template <typename T, typename Store>
__device__ __forceinline__ void turn_and_write(const float* k, const float* v, const Turn& turn, int capacity, T* keys, T* values,
                                               Store store) {
    int row = blockIdx.x, head = blockIdx.y - turn.heads, width = 2 * turn.pairs;
    TurnedKeys key{k, turn, head};
    const float* value = v + ((size_t)row * turn.key_heads + head) * width;
    size_t place = ((size_t)head * capacity + turn.first + row) * width;
    for (int i = threadIdx.x; i < width; i += 32) {
        keys[place + i] = store(key(row, i));
        values[place + i] = store(value[i]);
    }
}

// A warp for each row and each head of q and of k.
extern "C" __global__ void __launch_bounds__(32)
    rope_write_f32(float* q, const float* k, const float* v, Turn turn, int capacity, float* keys, float* values) {
    if (!turn_query(q, turn)) turn_and_write(k, v, turn, capacity, keys, values, [](float x) { return x; });
}
EXPORT(rope_write_f32)

extern "C" __global__ void __launch_bounds__(32)
    rope_write_f16(float* q, const float* k, const float* v, Turn turn, int capacity, __half* keys, __half* values) {
    if (!turn_query(q, turn)) turn_and_write(k, v, turn, capacity, keys, values, [](float x) { return __float2half_rn(x); });
}
EXPORT(rope_write_f16)

extern "C" __global__ void __launch_bounds__(32)
    rope_write_i8(float* q, const float* k, const float* v, Turn turn, int capacity, int averaged, float* mean,
                  signed char* keys, float* key_scales, signed char* values, float* value_scales) {
    if (turn_query(q, turn)) return;
    int row = blockIdx.x, head = blockIdx.y - turn.heads, width = 2 * turn.pairs;
    const float* value = v + ((size_t)row * turn.key_heads + head) * width;
    write_bytes(row, head, width, turn.first, capacity, averaged, mean, keys, key_scales, values, value_scales,
                TurnedKeys{k, turn, head}, [&](int i) { return value[i]; });
}
EXPORT(rope_write_i8)

constexpr int KEY_WARPS = 8;
constexpr int WIDEST = 128; // elements of a head

// Keys k [batch, keys, key heads, head_dim] as bytes, in the same order, the mean of each head's taken off, which changes no weight of an
// attention; scales [batch, key heads, keys]. A block for each head and sequence.
extern "C" __global__ void __launch_bounds__(32 * KEY_WARPS)
    round_keys(const float* k, int keys, int key_heads, int head_dim, signed char* codes, float* scales) {
    __shared__ float mean[KEY_WARPS][WIDEST];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t row = (size_t)key_heads * head_dim, start = (size_t)blockIdx.y * keys * row + (size_t)blockIdx.x * head_dim;
    float sums[WIDEST / 32] = {};
    for (int key = warp; key < keys; key += KEY_WARPS) {
#pragma unroll
        for (int i = 0; i < WIDEST / 32; i++)
            if (lane + 32 * i < head_dim) sums[i] += k[start + key * row + lane + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < WIDEST / 32; i++) mean[warp][lane + 32 * i] = sums[i];
    __syncthreads();
    if ((int)threadIdx.x < head_dim) {
        float sum = 0.0f;
        for (int other = 0; other < KEY_WARPS; other++) sum += mean[other][threadIdx.x];
        mean[0][threadIdx.x] = sum / (float)keys;
    }
    __syncthreads();
    scales += ((size_t)blockIdx.y * key_heads + blockIdx.x) * keys;
    for (int key = warp; key < keys; key += KEY_WARPS) {
        size_t from = start + key * row;
        float scale = round_to_bytes(head_dim, [&](int i) { return k[from + i] - mean[0][i]; }, codes + from);
        if (lane == 0) scales[key] = scale;
    }
}
EXPORT(round_keys)
