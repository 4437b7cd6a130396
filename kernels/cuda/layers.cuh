// Linear layers of one x, up to three, that are computed by one launch.
#pragma once
#include "common.cuh"

struct Layer {
    Weight weight, bias;
    float* out;  // [rows, weight.rows]
    int kind;    // activation
    int tasks;   // this layer's share of the warps or blocks
    int aligned; // every row of the weight begins at a multiple of 16 bytes
    int add;     // to what is in out
};

struct Layers {
    Layer layer[3];
    int count;
    int gated; // out of the first = its activation · the second, of equal sizes
};

// The layer of task `task`, which becomes the number of this layer's task.
__device__ __forceinline__ const Layer& layer_of(const Layers& layers, int& task) {
    int index = 0;
    while (index + 1 < layers.count && task >= layers.layer[index].tasks) task -= layers.layer[index++].tasks;
    return layers.layer[index];
}

// What becomes of the sum of output `output` of row `row`.
__device__ __forceinline__ void finish(const Layer& layer, int row, int output, float sum) {
    if (layer.bias.data) sum += flat_at(layer.bias, output);
    float* out = layer.out + (size_t)row * layer.weight.rows + output;
    float value = activation(layer.kind, sum);
    *out = layer.add ? *out + value : value;
}
