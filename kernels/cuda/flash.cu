// Attention of many queries (prompts, towers) by tensor cores, over buffers in f32 and caches in f16 and bytes. sm_80 and later; empty
// before that, where `attention` does it. Bound by arithmetic.
//
// A block takes 64 queries of a head, a warp 16 of them, and goes over the keys in tiles of 64 that all four warps share: scores,
// weights by online softmax, and the weighted values, all but the sums in f16 (Dao 2023, "FlashAttention-2"). Weights go from one
// product to the next in registers: what a lane holds of the first one's result is what it needs as the second one's input.
#include "attention.cuh"

constexpr int THREADS = 128;

#if __CUDA_ARCH__ >= 800

constexpr int QUERIES = 64;
constexpr int KEYS = 64;
// Elements behind each row in shared memory: rows begin at different banks.
constexpr int PAD = 8;

__device__ __forceinline__ uint32_t pack(float low, float high) {
    return (uint32_t)__half_as_ushort(__float2half_rn(low)) | (uint32_t)__half_as_ushort(__float2half_rn(high)) << 16;
}

// `rows` rows of head_dim elements, `stride` apart, times `factor` and their scales, to shared memory; zeros beyond.
template <int WIDTH, typename T>
__device__ __forceinline__ void load(__half (&tile)[KEYS][WIDTH + PAD], const T* from, long long stride, int rows, int head_dim,
                                     const float* scales, float factor) {
    for (int i = threadIdx.x; i < KEYS * WIDTH / 2; i += THREADS) {
        int row = i / (WIDTH / 2), at = i % (WIDTH / 2) * 2;
        float low = 0.0f, high = 0.0f;
        if (row < rows) {
            float own = scales ? factor * scales[row] : factor;
            if (at < head_dim) low = wide(from[row * stride + at]) * own;
            if (at + 1 < head_dim) high = wide(from[row * stride + at + 1]) * own;
        }
        *(uint32_t*)&tile[row][at] = pack(low, high);
    }
}

// q and out [batch, queries, heads, head_dim]; the scales, where there are any, [key heads, strides.heads / head_dim].
template <int WIDTH, typename T>
__device__ __forceinline__ void flash(const float* q, const T* k, const T* v, const float* k_scales, const float* v_scales,
                                      const Shape& shape, const Strides& strides, float* out) {
    __shared__ __align__(16) __half keys[KEYS][WIDTH + PAD];
    __shared__ __align__(16) __half values[KEYS][WIDTH + PAD];
    constexpr int STEPS = WIDTH / 16, PARTS = WIDTH / 8;
    int width = shape.head_dim, head = blockIdx.y, key_head = head / (shape.heads / shape.key_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * QUERIES;
    long long row_stride = (long long)shape.heads * width;
    long long start = (long long)blockIdx.z * shape.queries * row_stride + (long long)head * width;
    q += start + first * row_stride;
    out += start;
    long long of_head = blockIdx.z * strides.batches + key_head * strides.heads;
    k += of_head;
    v += of_head;
    if (k_scales) {
        k_scales += of_head / width;
        v_scales += of_head / width;
    }

    // The queries stay in registers. Tiles have as many keys as a block has queries.
    uint32_t query[STEPS][4];
    load<WIDTH>(keys, q, row_stride, min(QUERIES, shape.queries - first), width, nullptr, shape.scale);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        ldmatrix_x4(query[step], &keys[16 * warp + lane % 16][16 * step + lane / 16 * 8]);
    __syncthreads();

    // This lane's two rows, and what they see.
    int row = first + 16 * warp + lane / 4, hidden = shape.causal ? shape.keys - shape.queries : 0;
    int seen[2], last = min(first + QUERIES, shape.queries) - 1;
#pragma unroll
    for (int i = 0; i < 2; i++) seen[i] = shape.causal ? min(hidden + row + 8 * i + 1, shape.keys) : shape.keys;
    int end = shape.causal ? hidden + last + 1 : shape.keys;
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, sums[PARTS][4] = {};
    for (int key = 0; key < end; key += KEYS) {
        int rows = min(KEYS, shape.keys - key);
        load<WIDTH>(keys, k + key * strides.keys, strides.keys, rows, width, k_scales ? k_scales + key : nullptr, 1.0f);
        load<WIDTH>(values, v + key * strides.keys, strides.keys, rows, width, v_scales ? v_scales + key : nullptr, 1.0f);
        __syncthreads();
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int part = 0; part < KEYS / 8; part += 2) {
                uint32_t both[4];
                ldmatrix_x4(both, &keys[8 * part + lane / 16 * 8 + lane % 8][16 * step + lane / 8 % 2 * 8]);
                uint32_t low[2] = {both[0], both[1]}, high[2] = {both[2], both[3]};
                mma_f16(scores[part], query[step], low);
                mma_f16(scores[part + 1], query[step], high);
            }
        }
        // Four lanes share a row.
        float faded[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float larger = most[i];
#pragma unroll
            for (int part = 0; part < KEYS / 8; part++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    bool visible = key + 8 * part + lane % 4 * 2 + j < seen[i];
                    float& score = scores[part][2 * i + j];
                    score = visible ? score : -INFINITY;
                    larger = fmaxf(larger, score);
                }
            }
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
            // A row that has seen nothing yet has no largest score to go by.
            float base = larger > -INFINITY ? larger : 0.0f;
            faded[i] = expf(most[i] - base);
            most[i] = larger;
            float sum = 0.0f;
#pragma unroll
            for (int part = 0; part < KEYS / 8; part++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = scores[part][2 * i + j];
                    score = expf(score - base);
                    sum += score;
                }
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            total[i] = total[i] * faded[i] + sum;
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            sums[part][0] *= faded[0];
            sums[part][1] *= faded[0];
            sums[part][2] *= faded[1];
            sums[part][3] *= faded[1];
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            const float(&left)[4] = scores[2 * step];
            const float(&right)[4] = scores[2 * step + 1];
            uint32_t weights[4] = {pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]),
                                   pack(right[2], right[3])};
#pragma unroll
            for (int part = 0; part < PARTS; part += 2) {
                uint32_t both[4];
                ldmatrix_x4_trans(both, &values[16 * step + lane % 16][8 * part + lane / 16 * 8]);
                uint32_t low[2] = {both[0], both[1]}, high[2] = {both[2], both[3]};
                mma_f16(sums[part], weights, low);
                mma_f16(sums[part + 1], weights, high);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (row + 8 * i >= shape.queries) continue;
        float factor = 1.0f / total[i];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int at = 8 * part + lane % 4 * 2 + j;
                if (at < width) out[(row + 8 * i) * row_stride + at] = sums[part][2 * i + j] * factor;
            }
        }
    }
}

#else

template <int WIDTH, typename T>
__device__ __forceinline__ void flash(const float*, const T*, const T*, const float*, const float*, const Shape&,
                                      const Strides&, float*) {}

#endif

// For heads of up to WIDTH dimensions; a multiprocessor should hold BLOCKS at once.
#define FLASH(WIDTH, BLOCKS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_f32_##WIDTH(                                   \
        const float* q, const float* k, const float* v, Shape shape, Strides strides, float* out) {                    \
        flash<WIDTH, float>(q, k, v, nullptr, nullptr, shape, strides, out);                                           \
    }                                                                                                                  \
    EXPORT(flash_f32_##WIDTH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_f16_##WIDTH(                                   \
        const float* q, const __half* k, const __half* v, Shape shape, Strides strides, float* out) {                  \
        flash<WIDTH, __half>(q, k, v, nullptr, nullptr, shape, strides, out);                                          \
    }                                                                                                                  \
    EXPORT(flash_f16_##WIDTH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        flash_i8_##WIDTH(const float* q, const signed char* k, const signed char* v, const float* k_scales,            \
                         const float* v_scales, Shape shape, Strides strides, float* out) {                            \
        flash<WIDTH, signed char>(q, k, v, k_scales, v_scales, shape, strides, out);                                   \
    }                                                                                                                  \
    EXPORT(flash_i8_##WIDTH)

FLASH(64, 3)
FLASH(128, 2)
