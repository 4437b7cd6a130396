// Attention of one query to a cache, whose keys and values are read once for all heads that share them. All architectures; bound by
// memory.
//
// A block takes CHUNK keys of one key head. What it finds goes to `partial`; the block that comes last puts the parts together
// by their largest scores and sums (log-sum-exp; Dao and others 2023, "Flash-Decoding"). Queries become bytes where keys are.
#pragma once
#include "attention.cuh"

constexpr int CHUNK = 128; // keys of a block, whose threads take one each
// The most heads that share a key head, and the widest; src/cuda/attention.rs has the same numbers.
constexpr int GROUP = 16;
constexpr int WIDEST = 128;

struct Decode {
    int keys, group, head_dim; // group: heads that share a key head
    long long head_stride;     // elements of a key head in the cache
    float scale;
};

// Four elements of a key or value.
__device__ __forceinline__ float4 four(const signed char* from) {
    int word = *(const int*)from;
    return make_float4((float)(signed char)word, (float)(signed char)(word >> 8), (float)(signed char)(word >> 16),
                       (float)(signed char)(word >> 24));
}
__device__ __forceinline__ float4 four(const __half* from) {
    uint2 words = *(const uint2*)from;
    return make_float4(__half2float(__ushort_as_half((unsigned short)words.x)),
                       __half2float(__ushort_as_half((unsigned short)(words.x >> 16))),
                       __half2float(__ushort_as_half((unsigned short)words.y)),
                       __half2float(__ushort_as_half((unsigned short)(words.y >> 16))));
}

// The queries of the group in shared memory, and their products with a key.
template <typename T>
struct Queries;

template <>
struct Queries<__half> {
    float element[GROUP][WIDEST];

    template <typename Query>
    __device__ __forceinline__ void load(Query query, const Decode& shape) {
        for (int i = threadIdx.x; i < shape.group * shape.head_dim; i += CHUNK) {
            int head = i / shape.head_dim, dimension = i % shape.head_dim;
            element[head][dimension] = query(head, dimension) * shape.scale;
        }
    }

    __device__ __forceinline__ void dots(const __half* key, const Decode& shape, float (&sums)[GROUP]) const {
        for (int i = 0; i < shape.head_dim; i += 4) {
            float4 k = four(key + i);
#pragma unroll
            for (int head = 0; head < GROUP; head++) {
                if (head >= shape.group) break;
                const float* q = element[head] + i;
                sums[head] += q[0] * k.x + q[1] * k.y + q[2] * k.z + q[3] * k.w;
            }
        }
    }

    __device__ __forceinline__ float factor(int) const { return 1.0f; }
};

template <>
struct Queries<signed char> {
    int words[GROUP][WIDEST / 4];
    float scales[GROUP];

    // A warp rounds a head, as the CPU does: largest magnitude / 127, to nearest.
    template <typename Query>
    __device__ __forceinline__ void load(Query query, const Decode& shape) {
        int lane = threadIdx.x % 32;
        for (int head = threadIdx.x / 32; head < shape.group; head += CHUNK / 32) {
            float largest = 0.0f;
            for (int i = lane; i < shape.head_dim; i += 32) largest = fmaxf(largest, fabsf(query(head, i)));
            largest = warp_max(largest);
            float factor = largest > 1e-30f ? 127.0f / largest : 0.0f;
            for (int word = lane; word < shape.head_dim / 4; word += 32) {
                uint32_t codes = 0;
                for (int i = 0; i < 4; i++)
                    codes |= ((uint32_t)__float2int_rn(query(head, 4 * word + i) * factor) & 0xffu) << (8 * i);
                words[head][word] = (int)codes;
            }
            if (lane == 0) scales[head] = largest / 127.0f * shape.scale;
        }
    }

    __device__ __forceinline__ void dots(const signed char* key, const Decode& shape, float (&sums)[GROUP]) const {
        int totals[GROUP] = {};
        for (int i = 0; i < shape.head_dim / 4; i++) {
            int k = ((const int*)key)[i];
#pragma unroll
            for (int head = 0; head < GROUP; head++)
                if (head < shape.group) totals[head] = dp4a(words[head][i], k, totals[head]);
        }
#pragma unroll
        for (int head = 0; head < GROUP; head++) sums[head] = (float)totals[head];
    }

    __device__ __forceinline__ float factor(int head) const { return scales[head]; }
};

// What a block finds for a head: its largest score, the sum of the weights relative to that, and that of the weighted values.
struct Found {
    float most, total;
};

// Chunk `chunk` of a key head, by a block. `query(head, i)` is element i of a head of the key head's group; out [key heads, group,
// head_dim]; partial [key heads, chunks, group, head_dim + 2]; counters [key heads], zero before the first chunk and after the last.
template <typename T, typename Query>
__device__ __forceinline__ void decode(Query query, const T* k, const T* v, const float* k_scales, const float* v_scales,
                                       const Decode& shape, int key_head, int chunk, float* partial, int* counters, float* out) {
    __shared__ Queries<T> queries;
    __shared__ float weights[GROUP][CHUNK];
    __shared__ Found found[GROUP];
    __shared__ float halves[CHUNK];
    __shared__ int before;
    int chunks = (shape.keys + CHUNK - 1) / CHUNK, lane = threadIdx.x % 32;
    int group = shape.group, width = shape.head_dim, first = chunk * CHUNK, count = min(CHUNK, shape.keys - first);
    out += key_head * group * width;
    k += key_head * shape.head_stride + (long long)first * width;
    v += key_head * shape.head_stride + (long long)first * width;
    long long place = key_head * (shape.head_stride / width) + first;
    queries.load(query, shape);
    __syncthreads();
    int key = threadIdx.x;
    if (key < count) {
        float sums[GROUP] = {};
        queries.dots(k + (long long)key * width, shape, sums);
        float of_key = k_scales ? k_scales[place + key] : 1.0f;
#pragma unroll
        for (int head = 0; head < GROUP; head++)
            if (head < group) weights[head][key] = sums[head] * queries.factor(head) * of_key;
    }
    __syncthreads();
    // A warp makes weights of a head's scores, and puts the scales of the values to them.
    for (int head = threadIdx.x / 32; head < group; head += CHUNK / 32) {
        float most = -INFINITY, total = 0.0f;
        for (int i = lane; i < count; i += 32) most = fmaxf(most, weights[head][i]);
        most = warp_max(most);
        for (int i = lane; i < count; i += 32) {
            float weight = expf(weights[head][i] - most);
            total += weight;
            weights[head][i] = v_scales ? weight * v_scales[place + i] : weight;
        }
        total = warp_sum(total);
        if (lane == 0) found[head] = Found{most, total};
    }
    __syncthreads();
    // Threads share out dimensions, and keys where there are fewer dimensions than threads.
    int shares = CHUNK / width, dimension = threadIdx.x % width, share = threadIdx.x / width;
    float* own = partial + ((size_t)key_head * chunks + chunk) * group * (width + 2);
    for (int head = 0; head < group; head++) {
        float sum = 0.0f;
        if (share < shares)
            for (int i = share; i < count; i += shares) sum += weights[head][i] * wide(v[(long long)i * width + dimension]);
        halves[threadIdx.x] = sum;
        __syncthreads();
        if (share == 0) {
            for (int other = 1; other < shares; other++) sum += halves[other * width + dimension];
            own[head * (width + 2) + dimension] = sum;
            if (dimension == 0) {
                own[head * (width + 2) + width] = found[head].most;
                own[head * (width + 2) + width + 1] = found[head].total;
            }
        }
        __syncthreads();
    }
    // Whoever counts last sees what all others wrote before they counted.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(counters + key_head, 1);
    __syncthreads();
    if (before != chunks - 1) return;
    __threadfence();
    const volatile float* all = partial + (size_t)key_head * chunks * group * (width + 2);
    for (int i = threadIdx.x; i < group * width; i += CHUNK) {
        int head = i / width;
        float most = -INFINITY, total = 0.0f, sum = 0.0f;
        for (int other = 0; other < chunks; other++)
            most = fmaxf(most, all[((size_t)other * group + head) * (width + 2) + width]);
        for (int other = 0; other < chunks; other++) {
            const volatile float* part = all + ((size_t)other * group + head) * (width + 2);
            float faded = expf(part[width] - most);
            total += part[width + 1] * faded;
            sum += part[i % width] * faded;
        }
        out[i] = sum / total;
    }
    if (threadIdx.x == 0) counters[key_head] = 0;
}
