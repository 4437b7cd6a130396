// Norms and softmax: a block for each row. All architectures; bound by memory.
#include "common.cuh"

constexpr int THREADS = 128;

// out [rows, width] = (x - mean) / sqrt(variance + eps) · weight [width] + bias [width]
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm(const float* x, int width, Weight weight, Weight bias, float eps, float* out) {
    __shared__ float parts[THREADS / 32];
    x += (size_t)blockIdx.x * width;
    out += (size_t)blockIdx.x * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) sum += x[i];
    float mean = block_sum(sum, parts) / (float)width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / sqrtf(block_sum(squares, parts) / (float)width + eps);
    for (int i = threadIdx.x; i < width; i += THREADS)
        out[i] = (x[i] - mean) * factor * flat_at(weight, i) + flat_at(bias, i);
}
EXPORT(layer_norm)

// out [rows, width] = x / sqrt(mean(x²) + eps) · weight [width]
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, int width, Weight weight, float eps, float* out) {
    __shared__ float parts[THREADS / 32];
    x += (size_t)blockIdx.x * width;
    out += (size_t)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += x[i] * x[i];
    float factor = 1.0f / sqrtf(block_sum(squares, parts) / (float)width + eps);
    for (int i = threadIdx.x; i < width; i += THREADS) out[i] = x[i] * factor * flat_at(weight, i);
}
EXPORT(rms_norm)

// out [rows, width] = softmax over each row of x
extern "C" __global__ void __launch_bounds__(THREADS) softmax(const float* x, int width, float* out) {
    __shared__ float parts[THREADS / 32];
    x += (size_t)blockIdx.x * width;
    out += (size_t)blockIdx.x * width;
    float most = -INFINITY;
    for (int i = threadIdx.x; i < width; i += THREADS) most = fmaxf(most, x[i]);
    most = block_max(most, parts);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float weight = expf(x[i] - most);
        out[i] = weight;
        sum += weight;
    }
    float factor = 1.0f / block_sum(sum, parts);
    for (int i = threadIdx.x; i < width; i += THREADS) out[i] *= factor;
}
EXPORT(softmax)
