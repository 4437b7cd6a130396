// The parts of log-mel features of sound that are no linear layers: the power of a spectrum, and the logarithm on Whisper's scale.
// All architectures; bound by memory.
//
// The largest of all powers takes two launches: each block of the first leaves the largest of its share, and each block of the second
// looks through those.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr float LEAST = 1e-10f;

// out [rows, width] = real² + imaginary² of x [rows, 2, width]; len = rows · width
extern "C" __global__ void __launch_bounds__(THREADS) power(const float* x, size_t len, int width, float* out) {
    size_t i = global_index();
    if (i >= len) return;
    const float* from = x + i / width * 2 * width + i % width;
    out[i] = from[0] * from[0] + from[width] * from[width];
}
EXPORT(power)

// parts [blocks] = the largest that each block sees of x [len]. fmaxf leaves out what is no number.
extern "C" __global__ void __launch_bounds__(THREADS) log_mel_most(const float* x, size_t len, float* parts) {
    __shared__ float of_warps[THREADS / 32];
    float most = LEAST;
    for (size_t i = global_index(); i < len; i += (size_t)gridDim.x * THREADS) most = fmaxf(most, x[i]);
    most = block_max(most, of_warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = most;
}
EXPORT(log_mel_most)

// Orders of ten, from -10 on; what is no number stays none.
__device__ __forceinline__ float decades(float x) { return log10f(x < LEAST ? LEAST : x); }

// x [len] = (decades + 4) / 4, decades no more than 8 below those of the largest of parts [count]
extern "C" __global__ void __launch_bounds__(THREADS) log_mel(float* x, size_t len, const float* parts, int count) {
    __shared__ float of_warps[THREADS / 32];
    float most = LEAST;
    for (int i = threadIdx.x; i < count; i += THREADS) most = fmaxf(most, parts[i]);
    float least = decades(block_max(most, of_warps)) - 8.0f;
    size_t i = global_index();
    if (i >= len) return;
    float value = decades(x[i]);
    x[i] = ((value < least ? least : value) + 4.0f) / 4.0f;
}
EXPORT(log_mel)
