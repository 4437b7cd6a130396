// The write side of key-value caches, [key heads, capacity, head_dim]. All architectures; bound by memory.
#include "common.cuh"

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

// The scale of values whose largest magnitude has these bits: as those of the CPU's caches.
__device__ __forceinline__ float code_factor(unsigned largest, float& scale) {
    float size = __uint_as_float(largest);
    // Infinity and what is no number make a scale that is none.
    scale = largest < 0x7f800000u ? size / 127.0f : NAN;
    return largest < 0x7f800000u && size > 1e-30f ? 127.0f / size : 0.0f;
}

__device__ __forceinline__ unsigned warp_max(unsigned x) {
    for (int apart = 16; apart > 0; apart /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
}

// Codes of count values that `value` gives, by a warp; the result is their scale.
template <typename Value>
__device__ __forceinline__ float round_to_bytes(int count, Value value, signed char* codes) {
    unsigned largest = 0;
    for (int i = threadIdx.x; i < count; i += 32) largest = max(largest, __float_as_uint(value(i)) & 0x7fffffffu);
    float scale, factor = code_factor(warp_max(largest), scale);
    for (int i = threadIdx.x; i < count; i += 32) codes[i] = factor > 0.0f ? (signed char)rintf(value(i) * factor) : 0;
    return scale;
}

// A warp for each row and head. mean [key heads, head_dim] is taken off the keys; position 0 makes a new one, of the first
// `averaged` rows, and whoever needs it computes it for itself.
extern "C" __global__ void __launch_bounds__(32)
    cache_write_i8(const float* k, const float* v, int key_heads, int head_dim, int capacity, int first, int averaged,
                   float* mean, signed char* keys, float* key_scales, signed char* values, float* value_scales) {
    int row = blockIdx.x, head = blockIdx.y;
    size_t from = ((size_t)row * key_heads + head) * head_dim, place = (size_t)head * capacity + first + row;
    const float* own = k + from;
    float* kept = mean + head * head_dim;
    auto centred = [&](int i) {
        if (first > 0) return own[i] - kept[i];
        float sum = 0.0f;
        for (int other = 0; other < averaged; other++)
            sum += k[((size_t)other * key_heads + head) * head_dim + i] / (float)averaged;
        if (row == 0) kept[i] = sum;
        return own[i] - sum;
    };
    float key_scale = round_to_bytes(head_dim, centred, keys + place * head_dim);
    float value_scale = round_to_bytes(head_dim, [&](int i) { return v[from + i]; }, values + place * head_dim);
    if (threadIdx.x == 0) {
        key_scales[place] = key_scale;
        value_scales[place] = value_scale;
    }
}
EXPORT(cache_write_i8)
