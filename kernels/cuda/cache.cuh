// Keys and values on their way into a cache of bytes, and rotary positions.
#pragma once
#include "position.cuh"

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
    for (int i = threadIdx.x % 32; i < count; i += 32) largest = max(largest, __float_as_uint(value(i)) & 0x7fffffffu);
    float scale, factor = code_factor(warp_max(largest), scale);
    for (int i = threadIdx.x % 32; i < count; i += 32) codes[i] = factor > 0.0f ? (signed char)rintf(value(i) * factor) : 0;
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
    if (threadIdx.x % 32 == 0) {
        key_scales[place] = key_scale;
        value_scales[place] = value_scale;
    }
}

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
