// Operations on each element by itself. All architectures; bound by memory.
#include "common.cuh"

// x [len] = activation(x)
extern "C" __global__ void __launch_bounds__(256) activate(float* x, size_t len, int kind) {
    size_t i = global_index();
    if (i < len) x[i] = activation(kind, x[i]);
}
EXPORT(activate)

// to [len] = from [len]
extern "C" __global__ void __launch_bounds__(256) copy(const float* from, float* to, size_t len) {
    size_t i = global_index();
    if (i < len) to[i] = from[i];
}
EXPORT(copy)

// x [len] += y [len]
extern "C" __global__ void __launch_bounds__(256) add(float* x, const float* y, size_t len) {
    size_t i = global_index();
    if (i < len) x[i] += y[i];
}
EXPORT(add)

// x [len] *= y [len]
extern "C" __global__ void __launch_bounds__(256) multiply(float* x, const float* y, size_t len) {
    size_t i = global_index();
    if (i < len) x[i] *= y[i];
}
EXPORT(multiply)

// x [rows, width] += table[(first + row) mod table rows]
extern "C" __global__ void __launch_bounds__(256) add_positions(float* x, size_t len, Weight table, int first) {
    size_t i = global_index();
    if (i >= len) return;
    int row = (int)(((size_t)first + i / table.depth) % table.rows);
    x[i] += weight_at(table, row, (int)(i % table.depth));
}
EXPORT(add_positions)

// Token ids as an argument of their own: no copy to the device, and a graph can be given new ones.
struct Ids {
    unsigned id[64];
};

// out [count, width] = table[ids]
extern "C" __global__ void __launch_bounds__(256) embed(Weight table, Ids ids, int count, float* out) {
    size_t i = global_index();
    if (i >= (size_t)count * table.depth) return;
    out[i] = weight_at(table, (int)ids.id[i / table.depth], (int)(i % table.depth));
}
EXPORT(embed)

struct Parts {
    const float* part[8];
    float weight[8];
};

// out [len] = Σ weight · part [len], or out += that
extern "C" __global__ void __launch_bounds__(256) weighted_sum(Parts parts, int count, size_t len, int add_to, float* out) {
    size_t i = global_index();
    if (i >= len) return;
    float sum = add_to ? out[i] : 0.0f;
#pragma unroll // an index that is known leaves the pointers where arguments are
    for (int part = 0; part < 8; part++)
        if (part < count) sum += parts.weight[part] * parts.part[part][i];
    out[i] = sum;
}
EXPORT(weighted_sum)

// out [groups, width] = mean over the rows of x [groups, per_group, width]
extern "C" __global__ void __launch_bounds__(256)
    mean_rows(const float* x, size_t groups, int per_group, int width, float* out) {
    size_t i = global_index();
    if (i >= groups * width) return;
    const float* from = x + i / width * per_group * width + i % width;
    float sum = 0.0f;
    for (int row = 0; row < per_group; row++) sum += from[(size_t)row * width];
    out[i] = sum / (float)per_group;
}
EXPORT(mean_rows)

// x [groups, per_group, width] *= factor [groups, width]
extern "C" __global__ void __launch_bounds__(256)
    scale_groups(float* x, size_t len, int per_group, int width, const float* factor) {
    size_t i = global_index();
    if (i < len) x[i] *= factor[i / width / per_group * width + i % width];
}
EXPORT(scale_groups)
