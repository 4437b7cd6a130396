// Linear layers as they are defined: every other kernel for them is compared with this one. All architectures; slow.
#include "common.cuh"

// out [rows, outputs] = activation(x [rows, depth] · weight [outputs, depth]ᵀ + bias [outputs]); bias.data may be null
extern "C" __global__ void __launch_bounds__(128)
    linear(const float* x, size_t rows, Weight weight, Weight bias, int kind, float* out) {
    size_t i = global_index();
    if (i >= rows * weight.rows) return;
    int output = (int)(i % weight.rows);
    x += i / weight.rows * weight.depth;
    // Several sums lose less to rounding than one.
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int at = 0; at < weight.depth; at += 4)
        for (int part = 0; part < 4; part++)
            if (at + part < weight.depth) sums[part] += x[at + part] * weight_at(weight, output, at + part);
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (bias.data) sum += flat_at(bias, output);
    out[i] = activation(kind, sum);
}
EXPORT(linear)
