// Quantised linear layers over few rows (decoding). All architectures (dp4a); bound by memory. Layers of one x, up to three, go in
// one launch.
#include "matvec.cuh"

#define MATVEC(name, ROWS, WORDS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                               \
        name(const int* codes, const float* scales, int rows, int blocks, Layers layers) {                                 \
        matvec<ROWS, WORDS>(codes, scales, rows, blocks, layers, blockIdx.x * WARPS + threadIdx.x / 32);                   \
    }                                                                                                                      \
    EXPORT(name)

MATVEC(matvec_i4_1, 1, 4)
MATVEC(matvec_i4_8, 8, 4)
MATVEC(matvec_i8_1, 1, 8)
MATVEC(matvec_i8_8, 8, 8)
