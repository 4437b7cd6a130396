// What the kernels for attention share.
#pragma once
#include "common.cuh"

struct Shape {
    int queries, keys, heads, key_heads, head_dim, causal;
    float scale;
};

// Where the elements of keys and values lie: element = batch · batches + head · heads + key · keys + dimension.
struct Strides {
    long long batches, heads, keys;
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(signed char x) { return (float)x; }
