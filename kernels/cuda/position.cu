// Rotary positions (Su and others 2021), in the half-split form of Qwen2. All architectures; bound by memory.
#include "position.cuh"

// x [rows, heads, 2 · pairs] in place; row r is at position first + r. frequencies [pairs]
extern "C" __global__ void __launch_bounds__(128)
    rope(float* x, size_t rows, int heads, int pairs, int first, const float* frequencies) {
    size_t i = global_index();
    if (i >= rows * pairs) return;
    int pair = (int)(i % pairs);
    size_t row = i / pairs;
    float sine, cosine;
    sine_cosine((float)((size_t)first + row) * frequencies[pair], sine, cosine);
    for (int head = 0; head < heads; head++) {
        float* at = x + (row * heads + head) * 2 * pairs + pair;
        float a = at[0], b = at[pairs];
        at[0] = a * cosine - b * sine;
        at[pairs] = b * cosine + a * sine;
    }
}
EXPORT(rope)
