// The instructions of ptx.cuh that need sm_80, each so that a wrong operand shows in the result.
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 800

// C [m, n] = A [m, k] B [n, k]^T, one warp a tile of 16 x 8, tiles copied two steps ahead.
extern "C" __global__ void product_f16(const __half* a, const __half* b, float* c, int m, int n, int k) {
    __shared__ __align__(16) __half tile_a[2][16][16], tile_b[2][8][16];
    int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float d[4] = {0, 0, 0, 0};
    auto copy = [&](int stage, int at) {
        bool inside = row + lane / 2 < m && at < k;
        // Where nothing is read, the address may be outside.
        const __half* from = a + (size_t)(row + lane / 2) * k + at + lane % 2 * 8;
        cp_async16(&tile_a[stage][lane / 2][lane % 2 * 8], from, inside);
        if (lane < 16) {
            inside = column + lane / 2 < n && at < k;
            from = b + (size_t)(column + lane / 2) * k + at + lane % 2 * 8;
            cp_async16(&tile_b[stage][lane / 2][lane % 2 * 8], from, inside);
        }
        cp_async_commit();
    };
    copy(0, 0);
    for (int at = 0, stage = 0; at < k; at += 16, stage ^= 1) {
        copy(stage ^ 1, at + 16);
        cp_async_wait<1>();
        __syncthreads();
        uint32_t fa[4], fb[2];
        ldmatrix_x4(fa, &tile_a[stage][lane % 16][lane / 16 * 8]);
        ldmatrix_x2(fb, &tile_b[stage][lane % 8][lane / 8 % 2 * 8]);
        mma_f16(d, fa, fb);
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        int y = row + lane / 4 + i / 2 * 8, x = column + lane % 4 * 2 + i % 2;
        if (y < m && x < n) c[(size_t)y * n + x] = d[i];
    }
}

// C [16, 8] = A [16, 16] B [16, 8], both with the depth down the rows: A transposed in memory.
extern "C" __global__ void product_turned(const __half* a, const __half* b, float* c) {
    __shared__ __align__(16) __half tile_a[16][16], tile_b[16][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) tile_b[i / 8][i % 8] = b[i];
    __syncthreads();
    uint32_t fa[4], fb[2];
    float d[4] = {1, 2, 3, 4};
    // Matrices: (k 0, row 0), (k 0, row 8), (k 8, row 0), (k 8, row 8).
    ldmatrix_x4_trans(fa, &tile_a[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    ldmatrix_x2_trans(fb, &tile_b[lane % 16][0]);
    mma_f16(d, fa, fb);
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// C [m, n] = A [m, k] B [n, k]^T of bytes, whole tiles.
extern "C" __global__ void product_s8(const int8_t* a, const int8_t* b, int* c, int n, int k) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = blockIdx.y * 16, column = blockIdx.x * 8;
    int d[4] = {1000, 2000, 3000, 4000};
    for (int at = 0; at < k; at += 32) {
        uint32_t fa[4], fb[2];
        for (int i = 0; i < 4; i++)
            fa[i] = *(const uint32_t*)(a + (size_t)(row + g + i % 2 * 8) * k + at + i / 2 * 16 + 4 * t);
        for (int i = 0; i < 2; i++) fb[i] = *(const uint32_t*)(b + (size_t)(column + g) * k + at + i * 16 + 4 * t);
        mma_s8(d, fa, fb);
    }
    for (int i = 0; i < 4; i++) c[(size_t)(row + g + i / 2 * 8) * n + column + 2 * t + i % 2] = d[i];
}

#endif
