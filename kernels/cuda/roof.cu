// What the GPU gives: the roofs that the speed of everything else is measured against. All architectures.
#include "common.cuh"

// Reads data [count] once; out [threads of the grid] keeps the compiler from leaving that out.
extern "C" __global__ void __launch_bounds__(256) read_all(const uint4* data, size_t count, uint32_t* out) {
    uint32_t sum = 0;
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = global_index(); i < count; i += 4 * step) {
        uint4 values[4];
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = i + j * step < count ? load_streaming(data + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    out[global_index()] = sum;
}
EXPORT(read_all)

// `rounds` times sixteen multiplications and additions of f32 in every thread.
extern "C" __global__ void __launch_bounds__(256) multiply_all(int rounds, float factor, float* out) {
    float values[16];
#pragma unroll
    for (int i = 0; i < 16; i++) values[i] = (float)(threadIdx.x + i);
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < 16; i++) values[i] = fmaf(values[i], factor, 1.0f);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) sum += values[i];
    out[global_index()] = sum;
}
EXPORT(multiply_all)
