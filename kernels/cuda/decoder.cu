// A whole decoder layer of one position in one launch (decoding), with quantised weights and a cache of bytes. All architectures;
// bound by memory.
//
// The launch is cooperative: its blocks are all on the GPU at once, share out each step's work, and meet between steps. What a step
// needs in whole (a norm, activations as bytes) every block makes for itself in shared memory, which costs less than one more
// meeting.
#include "cache.cuh"
#include "decode.cuh"
#include "matvec.cuh"

constexpr int THREADS = 32 * WARPS;
static_assert(THREADS == CHUNK, "a block takes chunks of keys too");

struct DecoderLayer {
    Layers attention;        // query, key and value
    Layers output;           // added to x
    Layers gated;            // gate and what it is multiplied by
    Layers down;             // added to x
    Weight attention_norm, mlp_norm;
    float* x;                // [width]
    float* attended;         // [heads · head_dim]
    signed char* keys;       // [key heads, capacity, head_dim], as the values
    signed char* values;
    float* key_scales;       // [key heads, capacity], as those of the values
    float* value_scales;
    float* mean;             // [key heads, head_dim], off every key
    float* partial;          // [key heads, chunks, group, head_dim + 2]
    int* counters;           // [key heads], zero before and after
    unsigned* arrived;       // of the grid
    const float* frequencies; // of rotary positions, [pairs]
    const int* position;     // as `set_position` left it, so that the launch is the same for every position
    int heads, key_heads, pairs;
    int capacity, blocks;    // blocks: the most of BLOCK activations that a layer reads
    float scale, eps;
};

// What a layer reads, as bytes in shared memory.
struct Activations {
    int* codes;
    float* scales;
};

// `value(i)` for i < depth as bytes.
template <int WORDS, typename Value>
__device__ __forceinline__ void round_all(Value value, int depth, const Activations& activations) {
    int blocks = (depth + BLOCK - 1) / BLOCK;
    for (int block = threadIdx.x / 32; block < blocks; block += WARPS)
        round_block(value, block * BLOCK, depth, WORDS == 4, activations.codes + block * (BLOCK / 4), activations.scales + block);
    __syncthreads();
}

// x / sqrt(mean(x²) + eps) · weight, as bytes.
template <int WORDS>
__device__ __forceinline__ void round_normed(const float* x, const Weight& weight, int width, float eps, float* parts,
                                             const Activations& activations) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += x[i] * x[i];
    float factor = 1.0f / sqrtf(block_sum(squares, parts) / (float)width + eps);
    round_all<WORDS>([&](int i) { return x[i] * factor * flat_at(weight, i); }, width, activations);
}

// Layers of one x, whose tasks the warps of the grid share out.
template <int WORDS>
__device__ __forceinline__ void layers_of(const Activations& activations, const Layers& layers) {
    int tasks = 0;
    for (int index = 0; index < layers.count; index++) tasks += layers.layer[index].tasks;
    for (int task = blockIdx.x * WARPS + threadIdx.x / 32; task < tasks; task += gridDim.x * WARPS)
        matvec<1, WORDS>(activations.codes, activations.scales, 1, 1, layers, task);
}

// Puts this position's key and value into the cache, and attends to what is there.
__device__ __forceinline__ void attend(const DecoderLayer& layer) {
    __shared__ float2 angle[WIDEST / 2]; // sine and cosine
    int position = *layer.position, keys = position + 1;
    int pairs = layer.pairs, width = 2 * pairs, group = layer.heads / layer.key_heads;
    int chunks = (keys + CHUNK - 1) / CHUNK;
    for (int i = threadIdx.x; i < pairs; i += THREADS)
        sine_cosine((float)position * layer.frequencies[i], angle[i].x, angle[i].y);
    __syncthreads();
    const float *q = layer.attention.layer[0].out, *k = layer.attention.layer[1].out, *v = layer.attention.layer[2].out;
    Decode shape{keys, group, width, (long long)layer.capacity * width, layer.scale};
    auto turned = [&](const float* head, int i) {
        float sine = angle[i % pairs].x, cosine = angle[i % pairs].y;
        return i < pairs ? head[i] * cosine - head[i + pairs] * sine : head[i] * cosine + head[i - pairs] * sine;
    };
    for (int task = blockIdx.x; task < layer.key_heads * chunks; task += gridDim.x) {
        int key_head = task / chunks, chunk = task % chunks;
        // Whoever reads this position's key writes it.
        if (chunk == chunks - 1 && threadIdx.x < 32) {
            const float *key = k + key_head * width, *value = v + key_head * width;
            write_bytes(
                0, key_head, width, position, layer.capacity, 1, layer.mean, layer.keys, layer.key_scales, layer.values,
                layer.value_scales, [&](int, int i) { return turned(key, i); }, [&](int i) { return value[i]; });
        }
        // It is written, and what the last task left in shared memory was read.
        __syncthreads();
        decode(
            [&](int head, int i) { return turned(q + (key_head * group + head) * width, i); }, layer.keys, layer.values,
            layer.key_scales, layer.value_scales, shape, key_head, chunk, layer.partial, layer.counters, layer.attended);
    }
}

// Dynamic shared memory: BLOCK codes and a scale for each of `blocks`.
template <int WORDS>
__device__ __forceinline__ void decoder_layer(const DecoderLayer& layer) {
    DYN_SMEM(memory);
    __shared__ float parts[WARPS];
    Activations activations{(int*)memory, (float*)(memory + layer.blocks * BLOCK)};
    int width = layer.output.layer[0].weight.rows;
    round_normed<WORDS>(layer.x, layer.attention_norm, width, layer.eps, parts, activations);
    layers_of<WORDS>(activations, layer.attention);
    grid_barrier(layer.arrived);
    attend(layer);
    grid_barrier(layer.arrived);
    round_all<WORDS>([&](int i) { return layer.attended[i]; }, layer.output.layer[0].weight.depth, activations);
    layers_of<WORDS>(activations, layer.output);
    grid_barrier(layer.arrived);
    round_normed<WORDS>(layer.x, layer.mlp_norm, width, layer.eps, parts, activations);
    layers_of<WORDS>(activations, layer.gated);
    grid_barrier(layer.arrived);
    const float* gated = layer.gated.layer[0].out;
    round_all<WORDS>([&](int i) { return gated[i]; }, layer.down.layer[0].weight.depth, activations);
    layers_of<WORDS>(activations, layer.down);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) decoder_layer_i4(DecoderLayer layer) { decoder_layer<4>(layer); }
EXPORT(decoder_layer_i4) // 4992 bytes of dynamic shared memory

extern "C" __global__ void __launch_bounds__(THREADS, 4) decoder_layer_i8(DecoderLayer layer) { decoder_layer<8>(layer); }
EXPORT(decoder_layer_i8) // 4992 bytes of dynamic shared memory

// The position that launches of `decoder_layer` behind this one are for.
extern "C" __global__ void __launch_bounds__(32) set_position(int* to, int position) {
    if (threadIdx.x == 0) *to = position;
}
EXPORT(set_position)
