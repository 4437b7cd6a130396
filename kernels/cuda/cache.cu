// The write side of key-value caches, [key heads, capacity, head_dim]. All architectures; bound by memory.
#include "position.cuh"

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

// Codes and scales of a key and a value, by a warp. mean [key heads, width] is taken off the keys; position 0 makes a new one, of the
// first `averaged` rows, and whoever needs it computes it for itself. `key(row, i)` is an element of a key of this launch,
// `value(i)` one of the value.
template <typename Key, typename Value>
__device__ __forceinline__ void write_bytes(int row, int head, int width, int first, int capacity, int averaged, float* mean,
                                            signed char* keys, float* key_scales, signed char* values, float* value_scales,
                                            Key key, Value value) {
    size_t place = (size_t)head * capacity + first + row;
    float* kept = mean + head * width;
    auto centred = [&](int i) {
        if (first > 0) return key(row, i) - kept[i];
        float sum = 0.0f;
        for (int other = 0; other < averaged; other++) sum += key(other, i) / (float)averaged;
        if (row == 0) kept[i] = sum;
        return key(row, i) - sum;
    };
    float key_scale = round_to_bytes(width, centred, keys + place * width);
    float value_scale = round_to_bytes(width, value, values + place * width);
    if (threadIdx.x == 0) {
        key_scales[place] = key_scale;
        value_scales[place] = value_scale;
    }
}

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

// Element `i` of a head [2 · pairs] that is turned to a position (Su and others 2021; half-split as Qwen2's).
__device__ __forceinline__ float turned(const float* head, int i, int pairs, int position, const float* frequencies) {
    float sine, cosine;
    sine_cosine((float)position * frequencies[i % pairs], sine, cosine);
    return i < pairs ? head[i] * cosine - head[i + pairs] * sine : head[i] * cosine + head[i - pairs] * sine;
}

struct Turn {
    int heads, key_heads, pairs, first;
    const float* frequencies; // [pairs]
};

// Keys of one head, turned.
struct TurnedKeys {
    const float* k;
    const Turn& turn;
    int head;

    // Element `i` of the key of row `row`.
    __device__ __forceinline__ float operator()(int row, int i) const {
        const float* from = k + ((size_t)row * turn.key_heads + head) * 2 * turn.pairs;
        return turned(from, i, turn.pairs, turn.first + row, turn.frequencies);
    }
};

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
