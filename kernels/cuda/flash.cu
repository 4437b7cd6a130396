// Attention of many queries (prompts, towers) by tensor cores, over buffers in f32 and caches in f16 and bytes. sm_80 and later; empty
// before that, where `attention` does it. Bound by arithmetic.
//
// A block takes 64 queries of a head, a warp 16 of them, and goes over the keys in tiles of 64 that all four warps share: scores,
// weights by online softmax, and the weighted values (Dao 2023, "FlashAttention-2"). Weights and values are f16, and so are queries
// and keys, but where keys are bytes: there queries become bytes too, and scores are sums of integers (Zhang and others 2024,
// "SageAttention"). Weights go from one product to the next in registers: what a lane holds of the first one's result is what it needs
// as the second one's input.
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

// Queries of a warp, and their scores with a tile of keys.
template <int WIDTH, typename T>
struct Scores {
    static constexpr int STEPS = WIDTH / 16;
    struct Tile {
        __align__(16) __half keys[KEYS][WIDTH + PAD];
    };
    uint32_t query[STEPS][4];

    // Tiles have as many keys as a block has queries. The barriers around are the caller's.
    __device__ __forceinline__ void put_queries(Tile& tile, const float* q, long long stride, int rows, int width, float scale) {
        load<WIDTH>(tile.keys, q, stride, rows, width, nullptr, scale);
    }
    __device__ __forceinline__ void take_queries(const Tile& tile) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            ldmatrix_x4(query[step], &tile.keys[16 * warp + lane % 16][16 * step + lane / 16 * 8]);
    }
    __device__ __forceinline__ void put_keys(Tile& tile, const T* k, long long stride, int rows, int width, const float*) {
        load<WIDTH>(tile.keys, k, stride, rows, width, nullptr, 1.0f);
    }
    __device__ __forceinline__ void of(const Tile& tile, float (&scores)[KEYS / 8][4]) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int part = 0; part < KEYS / 8; part += 2) {
                uint32_t both[4];
                ldmatrix_x4(both, &tile.keys[8 * part + lane / 16 * 8 + lane % 8][16 * step + lane / 8 % 2 * 8]);
                uint32_t low[2] = {both[0], both[1]}, high[2] = {both[2], both[3]};
                mma_f16(scores[part], query[step], low);
                mma_f16(scores[part + 1], query[step], high);
            }
        }
    }
};

template <int WIDTH>
struct Scores<WIDTH, signed char> {
    static constexpr int STEPS = WIDTH / 32;
    struct Tile {
        __align__(16) signed char codes[KEYS][WIDTH + 16];
        float scales[KEYS];
    };
    uint32_t query[STEPS][4];
    float factor[2]; // of this lane's two rows

    // A warp rounds its queries one after the other: largest magnitude / 127, to nearest, as the CPU does.
    __device__ __forceinline__ void put_queries(Tile& tile, const float* q, long long stride, int rows, int width, float scale) {
        int lane = threadIdx.x % 32;
        for (int row = threadIdx.x / 32; row < KEYS; row += THREADS / 32) {
            float largest = 0.0f, values[WIDTH / 32];
#pragma unroll
            for (int i = 0; i < WIDTH / 32; i++) {
                int at = lane + 32 * i;
                values[i] = row < rows && at < width ? q[row * stride + at] : 0.0f;
                largest = fmaxf(largest, fabsf(values[i]));
            }
            largest = warp_max(largest);
            float to_codes = largest > 1e-30f ? 127.0f / largest : 0.0f;
#pragma unroll
            for (int i = 0; i < WIDTH / 32; i++)
                tile.codes[row][lane + 32 * i] = (signed char)__float2int_rn(values[i] * to_codes);
            if (lane == 0) tile.scales[row] = largest / 127.0f * scale;
        }
    }
    __device__ __forceinline__ void take_queries(const Tile& tile) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            ldmatrix_x4(query[step], &tile.codes[16 * warp + lane % 16][32 * step + lane / 16 * 16]);
#pragma unroll
        for (int i = 0; i < 2; i++) factor[i] = tile.scales[16 * warp + lane / 4 + 8 * i];
    }
    __device__ __forceinline__ void put_keys(Tile& tile, const signed char* k, long long stride, int rows, int width,
                                             const float* scales) {
        bool words = width % 4 == 0;
        for (int i = threadIdx.x; i < KEYS * WIDTH / 4; i += THREADS) {
            int row = i / (WIDTH / 4), at = i % (WIDTH / 4) * 4;
            const signed char* from = k + row * stride + at;
            uint32_t four = 0;
            if (row < rows && words && at < width) four = *(const uint32_t*)from;
            if (row < rows && !words) {
                for (int j = 0; j < 4; j++)
                    if (at + j < width) four |= (uint32_t)(unsigned char)from[j] << (8 * j);
            }
            *(uint32_t*)&tile.codes[row][at] = four;
        }
        if (threadIdx.x < KEYS) tile.scales[threadIdx.x] = (int)threadIdx.x < rows ? scales[threadIdx.x] : 0.0f;
    }
    __device__ __forceinline__ void of(const Tile& tile, float (&scores)[KEYS / 8][4]) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int part = 0; part < KEYS / 8; part += 2) {
            int low[4] = {}, high[4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32_t both[4];
                ldmatrix_x4(both, &tile.codes[8 * part + lane / 16 * 8 + lane % 8][32 * step + lane / 8 % 2 * 16]);
                uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
                mma_s8(low, query[step], first);
                mma_s8(high, query[step], second);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = 8 * part + lane % 4 * 2 + i % 2;
                scores[part][i] = (float)low[i] * (factor[i / 2] * tile.scales[column]);
                scores[part + 1][i] = (float)high[i] * (factor[i / 2] * tile.scales[column + 8]);
            }
        }
    }
};

// q and out [batch, queries, heads, head_dim]; the scales, where there are any, [batch, key heads, keys, or a cache's capacity].
template <int WIDTH, typename K, typename V>
__device__ __forceinline__ void flash(const float* q, const K* k, const V* v, const float* k_scales, const float* v_scales,
                                      int scales, const Shape& shape, const Strides& strides, float* out) {
    __shared__ typename Scores<WIDTH, K>::Tile keys;
    __shared__ __align__(16) __half values[KEYS][WIDTH + PAD];
    constexpr int PARTS = WIDTH / 8;
    int width = shape.head_dim, head = blockIdx.y, key_head = head / (shape.heads / shape.key_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * QUERIES;
    long long row_stride = (long long)shape.heads * width;
    long long start = (long long)blockIdx.z * shape.queries * row_stride + (long long)head * width;
    q += start + first * row_stride;
    out += start;
    long long of_head = blockIdx.z * strides.batches + key_head * strides.heads;
    k += of_head;
    v += of_head;
    long long scales_before = ((long long)blockIdx.z * shape.key_heads + key_head) * scales;
    if (k_scales) k_scales += scales_before;
    if (v_scales) v_scales += scales_before;

    // The queries stay in registers.
    Scores<WIDTH, K> queries;
    queries.put_queries(keys, q, row_stride, min(QUERIES, shape.queries - first), width, shape.scale);
    __syncthreads();
    queries.take_queries(keys);
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
        queries.put_keys(keys, k + key * strides.keys, strides.keys, rows, width, k_scales ? k_scales + key : nullptr);
        load<WIDTH>(values, v + key * strides.keys, strides.keys, rows, width, v_scales ? v_scales + key : nullptr, 1.0f);
        __syncthreads();
        float scores[KEYS / 8][4] = {};
        queries.of(keys, scores);
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

template <int WIDTH, typename K, typename V>
__device__ __forceinline__ void flash(const float*, const K*, const V*, const float*, const float*, int, const Shape&,
                                      const Strides&, float*) {}

#endif

// For heads of up to WIDTH dimensions; a multiprocessor should hold BLOCKS at once. Over buffers:
#define FLASH_BUFFERS(WIDTH, BLOCKS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_f32_##WIDTH(                                   \
        const float* q, const float* k, const float* v, Shape shape, Strides strides, float* out) {                    \
        flash<WIDTH>(q, k, v, nullptr, nullptr, 0, shape, strides, out);                                               \
    }                                                                                                                  \
    EXPORT(flash_f32_##WIDTH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        flash_keys_i8_##WIDTH(const float* q, const signed char* k, const float* v, const float* k_scales,             \
                              Shape shape, Strides strides, float* out) {                                              \
        flash<WIDTH>(q, k, v, k_scales, nullptr, shape.keys, shape, strides, out);                                     \
    }                                                                                                                  \
    EXPORT(flash_keys_i8_##WIDTH)

// Over caches:
#define FLASH_CACHES(WIDTH, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_f16_##WIDTH(                                   \
        const float* q, const __half* k, const __half* v, Shape shape, Strides strides, float* out) {                  \
        flash<WIDTH>(q, k, v, nullptr, nullptr, 0, shape, strides, out);                                               \
    }                                                                                                                  \
    EXPORT(flash_f16_##WIDTH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        flash_i8_##WIDTH(const float* q, const signed char* k, const signed char* v, const float* k_scales,            \
                         const float* v_scales, Shape shape, Strides strides, float* out) {                            \
        flash<WIDTH>(q, k, v, k_scales, v_scales, (int)(strides.heads / shape.head_dim), shape, strides, out);         \
    }                                                                                                                  \
    EXPORT(flash_i8_##WIDTH)

FLASH_BUFFERS(64, 3)
FLASH_BUFFERS(96, 2) // SigLIP's heads are 72 wide
FLASH_BUFFERS(128, 2)
FLASH_CACHES(64, 3)
FLASH_CACHES(128, 2)
