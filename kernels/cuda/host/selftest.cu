// The emulator's own test: small kernels whose results are known, and kernels with one bug each that must be found.
//
//     selftest clean ORDER     runs every check in that order of threads; exit code 0 when all hold
//     selftest bug NAME ORDER  runs a kernel with a bug; the process must not end with code 0
//     selftest bugs            lists the bugs
//     selftest speed           times the emulator's operations
//
// kernels/tests/emulator.rs builds it plain and with the sanitizers and says which bug each build must find.
#include "common.cuh"

// ---- Kernels. `Bug` is the one that is planted, `Clean` for none.

enum Bug {
    Clean,
    MissingBarrier,
    MissingSecondBarrier,
    MissingSyncWarp,
    MissingWait,
    WrongFragment,
    DivergentBarrier,
    ReturnBeforeBarrier,
    OutsideMask,
    MaskMismatch,
    MissingLane,
    DynamicOverrun,
    DynamicUnderrun,
    StaticOverrun,
    GlobalOverrun,
    Misaligned,
    NotShared,
    StackOverflow,
    UncommittedCopy,
};

__device__ inline float sum_over_warp(float value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// out += the sum of x.
template <Bug bug> __global__ void reduce(const float* x, float* out, int n) {
    __shared__ float parts[32];
    float sum = 0.0f;
    const int end = bug == GlobalOverrun ? n + 1 : n;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x) sum += x[i];
    sum = sum_over_warp(sum);
    const int slot = threadIdx.x / 32 + (bug == StaticOverrun && threadIdx.x / 32 == blockDim.x / 32 - 1 ? 32 : 0);
    if (threadIdx.x % 32 == 0) parts[slot] = sum;
    if (bug != MissingBarrier) __syncthreads();
    if (threadIdx.x < 32) {
        sum = sum_over_warp(threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) atomicAdd(out, sum);
    }
}

// Rotates the numbers of each block through shared memory, round after round.
template <Bug bug> __global__ void rotate(int* data, int rounds) {
    DYN_SMEM(memory);
    int* shared = reinterpret_cast<int*>(memory);
    const unsigned i = threadIdx.x;
    for (int round = 0; round < rounds; round++) {
        shared[i] = data[blockIdx.x * blockDim.x + i];
        __syncthreads();
        data[blockIdx.x * blockDim.x + i] = shared[(i + 1) % blockDim.x];
        if (bug != MissingSecondBarrier) __syncthreads();
    }
    if (bug == DynamicOverrun && i == 3) shared[blockDim.x] = 1;
    if (bug == DynamicUnderrun && i == 3) shared[-1] = 1;
}

// Reverses each warp's numbers through shared memory.
template <Bug bug> __global__ void reverse_warp(int* data) {
    __shared__ int shared[128];
    const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
    shared[threadIdx.x] = data[threadIdx.x];
    if (bug != MissingSyncWarp) __syncwarp();
    data[threadIdx.x] = shared[first + 31 - lane];
}

// Attention of one warp a query, tiles of keys and values in two buffers, online softmax. Width 64.
template <Bug bug> __global__ void attention(const __half* q, const __half* k, const __half* v, float* out, int queries,
                                             int keys, float scale) {
    constexpr int width = 64, tile = 16;
    DYN_SMEM(memory);
    __half* buffers = reinterpret_cast<__half*>(memory);  // [2][keys, values][tile][width]
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query = blockIdx.x * (blockDim.x / 32) + warp;
    const bool live = query < queries;
    const float2 q2 =
        live ? __half22float2(reinterpret_cast<const __half2*>(q + ((size_t)head * queries + query) * width)[lane])
             : make_float2(0.0f, 0.0f);
    auto load = [&](int first, int buffer) {
        for (int i = threadIdx.x; i < tile * width / 8; i += blockDim.x) {
            const int row = first + i / (width / 8);
            const bool inside = row < keys;
            const size_t at = ((size_t)head * keys + (inside ? row : 0)) * width + i % (width / 8) * 8;
            cp_async16(buffers + (buffer * 2 + 0) * tile * width + i * 8, k + at, inside);
            cp_async16(buffers + (buffer * 2 + 1) * tile * width + i * 8, v + at, inside);
        }
        cp_async_commit();
    };
    float highest = -INFINITY, total = 0.0f;
    float2 sum = make_float2(0.0f, 0.0f);
    load(0, 0);
    for (int first = 0, buffer = 0; first < keys; first += tile, buffer ^= 1) {
        load(first + tile, buffer ^ 1);
        if (bug == MissingWait)
            cp_async_wait<2>();
        else
            cp_async_wait<1>();
        __syncthreads();
        const __half2* tile_k = reinterpret_cast<const __half2*>(buffers + (buffer * 2 + 0) * tile * width);
        const __half2* tile_v = reinterpret_cast<const __half2*>(buffers + (buffer * 2 + 1) * tile * width);
        for (int j = 0; j < min(tile, keys - first); j++) {
            const float2 k2 = __half22float2(tile_k[j * width / 2 + lane]);
            const float score = sum_over_warp(q2.x * k2.x + q2.y * k2.y) * scale;
            const float top = fmaxf(highest, score), keep = __expf(highest - top), weight = __expf(score - top);
            const float2 v2 = __half22float2(tile_v[j * width / 2 + lane]);
            total = total * keep + weight;
            sum = make_float2(sum.x * keep + weight * v2.x, sum.y * keep + weight * v2.y);
            highest = top;
        }
        if (bug != MissingBarrier) __syncthreads();
    }
    float2* result = reinterpret_cast<float2*>(out + ((size_t)head * queries + query) * width);
    if (live) result[lane] = make_float2(sum.x / total, sum.y / total);
}

// c = a b^T, a [rows][depth], b [columns][depth]; a warp makes a tile of 16 x 8 with ldmatrix and mma.
template <Bug bug> __global__ void multiply_halves(const __half* a, const __half* b, float* c, int columns, int depth) {
    __shared__ __align__(16) __half tile_a[16 * 16];
    __shared__ __align__(16) __half tile_b[8 * 16];
    const int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float d[4] = {0, 0, 0, 0};
    for (int k = 0; k < depth; k += 16) {
        const int offset = bug == Misaligned ? 4 : 0;
        cp_async16(tile_a + lane * 8, a + (size_t)(row + lane / 2) * depth + k + lane % 2 * 8 + offset);
        if (lane < 16) cp_async16(tile_b + lane * 8, b + (size_t)(column + lane / 2) * depth + k + lane % 2 * 8);
        if (bug != UncommittedCopy) cp_async_commit();
        if (bug != MissingWait) cp_async_wait<0>();
        __syncwarp();
        uint32_t fa[4], fb[2];
        ldmatrix_x4(fa, tile_a + lane % 16 * 16 + lane / 16 * 8);
        ldmatrix_x2(fb, tile_b + lane % 8 * 16 + lane / 8 % 2 * 8);
        if (bug == WrongFragment) fa[1] ^= fa[2], fa[2] ^= fa[1], fa[1] ^= fa[2];
        mma_f16(d, fa, fb);
        if (bug == NotShared) ldmatrix_x2(fb, b);
        __syncwarp();
    }
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) c[(size_t)(row + g + i / 2 * 8) * columns + column + 2 * t + i % 2] = d[i];
}

// The same with b [depth][columns] by transposing ldmatrix, and a read straight from memory by the fragments' table.
__global__ void multiply_transposed(const __half* a, const __half* b, float* c, int columns, int depth) {
    __shared__ __align__(16) __half tile_b[16 * 8];
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float d[4] = {0, 0, 0, 0};
    for (int k = 0; k < depth; k += 16) {
        if (lane < 16)
            *reinterpret_cast<uint4*>(tile_b + lane * 8) =
                *reinterpret_cast<const uint4*>(b + (size_t)(k + lane) * columns + column);
        __syncwarp();
        uint32_t fa[4], fb[2];
        for (int i = 0; i < 4; i++)
            fa[i] =
                *reinterpret_cast<const uint32_t*>(a + (size_t)(row + g + i % 2 * 8) * depth + k + 2 * t + i / 2 * 8);
        ldmatrix_x2_trans(fb, tile_b + lane % 16 * 8);
        mma_f16(d, fa, fb);
        __syncwarp();
    }
    for (int i = 0; i < 4; i++) c[(size_t)(row + g + i / 2 * 8) * columns + column + 2 * t + i % 2] = d[i];
}

// c = a b^T in signed bytes.
template <Bug bug> __global__ void multiply_bytes(const int8_t* a, const int8_t* b, int* c, int columns, int depth) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = blockIdx.y * 16, column = blockIdx.x * 8;
    int d[4] = {0, 0, 0, 0};
    for (int k = 0; k < depth; k += 32) {
        uint32_t fa[4], fb[2];
        for (int i = 0; i < 4; i++)
            fa[i] =
                *reinterpret_cast<const uint32_t*>(a + (size_t)(row + g + i % 2 * 8) * depth + k + 4 * t + i / 2 * 16);
        for (int i = 0; i < 2; i++)
            fb[i] = *reinterpret_cast<const uint32_t*>(b + (size_t)(column + g) * depth + k +
                                                       4 * (bug == WrongFragment ? 3 - t : t) + 16 * i);
        mma_s8(d, fa, fb);
    }
    for (int i = 0; i < 4; i++) c[(size_t)(row + g + i / 2 * 8) * columns + column + 2 * t + i % 2] = d[i];
}

// Every kind of shuffle. out [kind][thread], as 64-bit numbers.
__global__ void shuffles(const int* lanes, int width, uint64_t* out) {
    const unsigned i = threadIdx.x, n = blockDim.x;
    const uint64_t mine = i * 0x100000001ull;
    out[0 * n + i] = __shfl_sync(0xffffffffu, mine, lanes[i], width);
    out[1 * n + i] = __shfl_up_sync(0xffffffffu, mine, (unsigned)lanes[i], width);
    out[2 * n + i] = __shfl_down_sync(0xffffffffu, mine, (unsigned)lanes[i], width);
    out[3 * n + i] = __shfl_xor_sync(0xffffffffu, mine, lanes[i], width);
    out[4 * n + i] = (uint64_t)__shfl_xor_sync(0xffffffffu, (float)i, 5);
    out[5 * n + i] = (uint64_t)__half2float(__shfl_down_sync(0xffffffffu, __float2half((float)(i % 32)), 1));
    out[6 * n + i] = __ballot_sync(0xffffffffu, lanes[i] & 1);
    out[7 * n + i] = (uint64_t)(__any_sync(0xffffffffu, lanes[i] == 3) * 2 + __all_sync(0xffffffffu, lanes[i] < 32));
}

// Divergent, and legal: halves of a warp that go different ways with masks of their own, warps that loop unequally,
// threads that return before others end.
__global__ void divergent(int* out) {
    const unsigned i = threadIdx.x, lane = i % 32, warp = i / 32;
    int value = (int)lane;
    if (lane < 16) {
        for (int step = 8; step; step >>= 1) value += __shfl_xor_sync(0x0000ffffu, value, step);
    } else if (lane & 1) {
        value = __popc(__ballot_sync(0xaaaa0000u, lane > 20));
        value += __shfl_sync(0xaaaa0000u, value, 17 + 2 * (int)(lane / 2 % 8));
    } else {
        for (unsigned k = 0; k < lane; k++) value += __any_sync(1u << lane, 1);
        __syncwarp(0x55550000u);
    }
    __syncwarp();
    for (unsigned k = 0; k <= warp; k++) value += __shfl_sync(0xffffffffu, value, 31 - (int)k);
    __syncthreads();
    out[i] = value;
    if (warp & 1) return;
    out[i] += (int)__shfl_down_sync(0xffffffffu, lane, 1);
}

// Shared memory at the beginning of a block: nothing that could be taken for a result.
__global__ void fresh_shared(int* stale, int words) {
    __shared__ int fixed[64];
    DYN_SMEM(memory);
    int* dynamic = reinterpret_cast<int*>(memory);
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
        if (dynamic[i] != -1) atomicAdd(stale, 1);
#if !defined(__SANITIZE_ADDRESS__)
        if (fixed[i] != -1) atomicAdd(stale, 1);
#endif
    }
    __syncthreads();
    for (int i = threadIdx.x; i < words; i += blockDim.x) dynamic[i] = fixed[i] = i;
}

// Groups of asynchronous copies, in and out of order, with and without data.
__global__ void copies(const int4* source, int* out) {
    __shared__ __align__(16) int4 target[4];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; i++) {
            cp_async16(&target[i], &source[i], i != 1);
            cp_async_commit();
        }
        out[0] = target[0].x;  // not there yet
        cp_async_wait<2>();
        out[1] = target[0].x, out[2] = target[1].x;
        cp_async_wait<1>();
        out[3] = target[1].x, out[4] = target[2].x;
        cp_async_commit();  // an empty group counts
        cp_async_wait<1>();
        out[5] = target[2].x;
        for (int i = 0; i < 200; i++) {  // a long pipeline
            cp_async16(&target[3], &source[i % 3]);
            cp_async_commit();
            cp_async_wait<1>();
        }
        cp_async_wait<0>();
        out[6] = target[3].x;
        out[7] = (int)load_streaming(reinterpret_cast<const uint4*>(&source[2])).w;
    }
}

__global__ void atomics(int* counters, float* sum, int* highest, unsigned* owner) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&counters[i % 7], 1);
    atomicAdd(sum, 0.5f);
    atomicMax(highest, (i * 37) % 1001);
    atomicCAS(owner, 0u, (unsigned)i + 1u);
}

__global__ void indices(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], (int)(block * 100 + thread + 1));
}

template <Bug bug> __global__ void barriers(int* out) {
    const unsigned i = threadIdx.x;
    if (bug == ReturnBeforeBarrier && i == 40) return;
    if (bug == DivergentBarrier && i >= 32)
        __syncthreads();
    else
        __syncthreads();
    out[i] = 1;
}

template <Bug bug> __global__ void masks(int* out) {
    const unsigned i = threadIdx.x;
    int value = (int)i;
    if (bug == OutsideMask && i < 16) value = __shfl_xor_sync(0x0000ffffu, value, 16);
    if (bug == MaskMismatch && i < 16) value = __shfl_xor_sync(i & 1 ? 0x0000ffffu : 0x0000fffdu, value, 4);
    if (bug == MissingLane && i != 5) value = __shfl_xor_sync(0xffffffffu, value, 4);
    __syncthreads();
    out[i] = value;
}

// Each block takes what the one before it left, and meets all others in between, twice.
__global__ void hand_on(unsigned* arrived, int* slots) {
    for (int round = 0; round < 2; round++) {
        if (threadIdx.x == 0) slots[blockIdx.x] += (int)blockIdx.x + 1;
        grid_barrier(arrived);
        const int own = slots[(blockIdx.x + 1) % gridDim.x];
        grid_barrier(arrived);
        if (threadIdx.x == blockDim.x - 1) slots[blockIdx.x] = own;
        grid_barrier(arrived);
    }
}

__device__ __attribute__((noinline)) static int dig(volatile int* out, int depth) {
    volatile char room[1024];
    room[0] = (char)depth;
    if (depth == 0) return room[0];
    return dig(out, depth - 1) + room[0] + *out;
}
template <Bug bug> __global__ void recurse(int* out) {
    __syncthreads();
    *out = dig(out, bug == StackOverflow ? 1000 : 4);
}

// A kernel known by its name, with each kind of argument.
struct Pair {
    int first;
    float second;
};
extern "C" __global__ void fill_numbers(float* out, int n, unsigned step, float factor, size_t offset, Pair pair) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[offset + (size_t)i * step] = (float)i * factor + (float)pair.first * pair.second;
}
EXPORT(fill_numbers)

// Reads from x[0] to x[n - 1]; with an `n` that is too large, past the end.
extern "C" __global__ void sum_numbers(const float* x, float* out, int n) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += 32) sum += x[i];
    sum = sum_over_warp(sum);
    if (threadIdx.x == 0) *out = sum;
}
EXPORT(sum_numbers)

// Uses all of the dynamic shared memory of the launch.
extern "C" __global__ void use_shared(int* out, int words) {
    DYN_SMEM(words_memory);
    int* shared = reinterpret_cast<int*>(words_memory);
    for (int i = threadIdx.x; i < words; i += blockDim.x) shared[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) *out = shared[words - 1];
}
EXPORT(use_shared)

#if !defined(SELFTEST_KERNELS_ONLY)

// ---- The host's side.

#include <chrono>
#include <functional>

static int failures = 0;

static void check(bool holds, const char* what) {
    if (holds) return;
    failures++;
    printf("WRONG: %s\n", what);
}

static uint64_t random_state = 88172645463325252ull;
static uint32_t random_bits() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(random_state >> 32);
}
static float random_float() { return (float)random_bits() * 0x1p-31f - 1.0f; }
static std::vector<__half> random_halves(size_t n) {
    std::vector<__half> all(n);
    for (__half& one : all) one = __float2half_rn(random_float());
    return all;
}

template <Bug bug> static void check_reduce(int n = 5003, int threads = 256) {
    std::vector<float> x(n);
    double expected = 0;
    for (float& one : x) expected += one = random_float();
    float sum = 0;
    CUDA_HOST_LAUNCH(reduce<bug>, dim3(3), dim3(threads), 0, x.data(), &sum, n);
    check(fabs(sum - expected) < 1e-3, "reduce");
}

template <Bug bug> static void check_rotate() {
    const int threads = 96, blocks = 2, rounds = 5;
    std::vector<int> data(threads * blocks);
    for (size_t i = 0; i < data.size(); i++) data[i] = (int)i;
    CUDA_HOST_LAUNCH(rotate<bug>, dim3(blocks), dim3(threads), threads * sizeof(int), data.data(), rounds);
    bool right = true;
    for (int i = 0; i < threads * blocks; i++)
        right &= data[i] == i / threads * threads + (i % threads + rounds) % threads;
    check(right, "rotate");
}

template <Bug bug> static void check_reverse_warp() {
    std::vector<int> data(128);
    for (int i = 0; i < 128; i++) data[i] = i;
    CUDA_HOST_LAUNCH(reverse_warp<bug>, dim3(1), dim3(128), 0, data.data());
    bool right = true;
    for (int i = 0; i < 128; i++) right &= data[i] == (i | 31) - i % 32;
    check(right, "reverse_warp");
}

template <Bug bug> static void check_attention(int heads, int queries, int keys) {
    const int width = 64;
    auto q = random_halves((size_t)heads * queries * width), k = random_halves((size_t)heads * keys * width),
         v = random_halves((size_t)heads * keys * width);
    std::vector<float> out((size_t)heads * queries * width, NAN);
    CUDA_HOST_LAUNCH(attention<bug>, dim3((queries + 3) / 4, heads), dim3(128), 2 * 2 * 16 * width * sizeof(__half),
                     q.data(), k.data(), v.data(), out.data(), queries, keys, 0.125f);
    double worst = 0;
    std::vector<double> weights(keys);
    for (int row = 0; row < heads * queries; row++) {
        const int head = row / queries;
        double total = 0;
        for (int j = 0; j < keys; j++) {
            double dot = 0;
            for (int d = 0; d < width; d++)
                dot += (double)__half2float(q[(size_t)row * width + d]) *
                       __half2float(k[((size_t)head * keys + j) * width + d]);
            total += weights[j] = exp(dot * 0.125);
        }
        for (int d = 0; d < width; d++) {
            double expected = 0;
            for (int j = 0; j < keys; j++)
                expected += weights[j] / total * __half2float(v[((size_t)head * keys + j) * width + d]);
            const double error = fabs(expected - out[(size_t)row * width + d]);
            if (!(error <= worst)) worst = error;  // a NaN stays
        }
    }
    check(worst < 1e-5, "attention");
}

template <Bug bug> static void check_multiply_halves() {
    const int rows = 32, columns = 24, depth = 48;
    auto a = random_halves(rows * depth + 8), b = random_halves(columns * depth);
    std::vector<__half> transposed(columns * depth);
    for (int n = 0; n < columns; n++)
        for (int k = 0; k < depth; k++) transposed[k * columns + n] = b[n * depth + k];
    std::vector<float> c(rows * columns, NAN), second(rows * columns, NAN);
    const dim3 grid(columns / 8, rows / 16);
    CUDA_HOST_LAUNCH(multiply_halves<bug>, grid, dim3(32), 0, a.data(), b.data(), c.data(), columns, depth);
    if (bug == Clean)
        CUDA_HOST_LAUNCH(multiply_transposed, grid, dim3(32), 0, a.data(), transposed.data(), second.data(), columns,
                         depth);
    bool right = true, same = true;
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            double expected = 0;
            for (int k = 0; k < depth; k++)
                expected += (double)__half2float(a[m * depth + k]) * __half2float(b[n * depth + k]);
            right &= fabs(expected - c[m * columns + n]) < 1e-5;
            same &= bug != Clean || c[m * columns + n] == second[m * columns + n];
        }
    check(right, "multiply_halves");
    check(same, "multiply_transposed");
}

template <Bug bug> static void check_multiply_bytes() {
    const int rows = 32, columns = 16, depth = 96;
    std::vector<int8_t> a(rows * depth), b(columns * depth);
    for (int8_t& one : a) one = (int8_t)random_bits();
    for (int8_t& one : b) one = (int8_t)random_bits();
    for (int k = 0; k < depth; k++) a[k] = b[k] = -128;  // the largest sum
    std::vector<int> c(rows * columns);
    CUDA_HOST_LAUNCH(multiply_bytes<bug>, dim3(columns / 8, rows / 16), dim3(32), 0, a.data(), b.data(), c.data(),
                     columns, depth);
    bool right = true;
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            int expected = 0;
            for (int k = 0; k < depth; k++) expected += a[m * depth + k] * b[n * depth + k];
            right &= expected == c[m * columns + n];
        }
    check(right, "multiply_bytes");
}

// The PTX ISA's pseudocode of shfl, with its clamp and segment mask.
static unsigned expected_lane(int kind, unsigned lane, unsigned b, unsigned width) {
    const unsigned clamp = kind == 1 ? 0 : 31, segments = ~(width - 1) & 31;
    b &= 31;
    const unsigned most = (lane & segments) | (clamp & ~segments), least = lane & segments;
    int j = 0;
    bool valid = true;
    switch (kind) {
        case 0:
            j = (int)(least | (b & ~segments));
            valid = j <= (int)most;
            break;
        case 1:
            j = (int)lane - (int)b;
            valid = j >= (int)most;
            break;
        case 2:
            j = (int)(lane + b);
            valid = j <= (int)most;
            break;
        case 3:
            j = (int)(lane ^ b);
            valid = j <= (int)most;
            break;
    }
    return valid ? (unsigned)j : lane;
}

static void check_shuffles() {
    const unsigned n = 64;
    for (unsigned width = 1; width <= 32; width *= 2) {
        for (int uniform = 0; uniform < 2; uniform++) {
            std::vector<int> lanes(n);
            for (int& lane : lanes) lane = uniform ? 3 : (int)(random_bits() % 33);
            std::vector<uint64_t> out(8 * n);
            CUDA_HOST_LAUNCH(shuffles, dim3(1), dim3(n), 0, lanes.data(), (int)width, out.data());
            bool right = true;
            uint32_t odd[2] = {0, 0};
            bool three[2] = {false, false}, small[2] = {true, true};
            for (unsigned i = 0; i < n; i++) {
                odd[i / 32] |= (uint32_t)(lanes[i] & 1) << i % 32;
                three[i / 32] |= lanes[i] == 3;
                small[i / 32] &= lanes[i] < 32;
            }
            for (unsigned i = 0; i < n; i++) {
                for (int kind = 0; kind < 4; kind++)
                    right &= out[kind * n + i] ==
                             (i / 32 * 32 + expected_lane(kind, i % 32, (unsigned)lanes[i], width)) * 0x100000001ull;
                right &= out[4 * n + i] == (i ^ 5) && out[5 * n + i] == std::min(i % 32 + 1, 31u);
                right &= out[6 * n + i] == odd[i / 32] && out[7 * n + i] == three[i / 32] * 2u + small[i / 32];
            }
            check(right, "shuffles");
        }
    }
}

static void check_divergent() {
    const int threads = 128;
    std::vector<int> out(threads);
    CUDA_HOST_LAUNCH(divergent, dim3(1), dim3(threads), 0, out.data());
    bool right = true;
    for (int warp = 0; warp < threads / 32; warp++) {
        int values[32];
        for (int lane = 0; lane < 32; lane++)
            values[lane] = lane < 16 ? 120 : lane & 1 ? 12 : 2 * lane;  // six lanes above 20 vote
        for (int k = 0; k <= warp; k++) {
            const int added = values[31 - k];
            for (int& value : values) value += added;
        }
        for (int lane = 0; lane < 32; lane++)
            right &= out[warp * 32 + lane] == values[lane] + (warp & 1 ? 0 : std::min(lane + 1, 31));
    }
    check(right, "divergent");
}

static void check_memory() {
    int stale = 0;
    CUDA_HOST_LAUNCH(fresh_shared, dim3(3), dim3(32), 64 * sizeof(int), &stale, 64);
    check(stale == 0, "shared memory holds something when a block begins");
    alignas(16) int4 source[3] = {{1, 0, 0, 0}, {2, 0, 0, 0}, {3, 0, 0, 4}};
    int out[8];
    CUDA_HOST_LAUNCH(copies, dim3(1), dim3(32), 0, source, out);
    const int expected[8] = {-1, 1, -1, 0, -1, 3, 2, 4};
    check(memcmp(out, expected, sizeof(out)) == 0, "asynchronous copies");
}

static void check_atomics_and_indices() {
    int counters[7] = {}, highest = -5;
    float sum = 0;
    unsigned owner = 0;
    CUDA_HOST_LAUNCH(atomics, dim3(5), dim3(70), 0, counters, &sum, &highest, &owner);
    bool right = sum == 175.0f && highest == 999 && owner >= 1 && owner <= 350;
    for (int counter : counters) right &= counter == 50;
    check(right, "atomics");
    std::vector<int> seen(2 * 3 * 2 * 60);
    CUDA_HOST_LAUNCH(indices, dim3(2, 3, 2), dim3(5, 4, 3), 0, seen.data());
    right = true;
    for (int i = 0; i < (int)seen.size(); i++) right &= seen[i] == i / 60 * 100 + i % 60 + 1;
    check(right, "indices");
}

// A half's value by its definition.
static double half_value(unsigned bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                            : ldexp(fraction, -24);
    return bits >> 15 ? -magnitude : magnitude;
}

static __half random_half() { return __ushort_as_half((unsigned short)random_bits()); }

// A finite half in units of 2^-24: a whole number.
static __int128 half_units(__half value) { return (__int128)ldexp(half_value(value.bits), 24); }

// The half that is nearest to `exact` units of 2^-48, ties to the even one.
static double nearest_half(__int128 exact) {
    const __int128 size = exact < 0 ? -exact : exact;
    unsigned low = 0, high = 0x7c00;  // the largest half not above the number lies between
    auto value = [](unsigned bits) {
        return (bits == 0x7c00 ? (__int128)65536 << 24 : half_units({(uint16_t)bits})) << 24;
    };
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        (value(middle) <= size ? low : high) = middle;
    }
    const __int128 below = size - value(low), above = value(high) - size;
    const unsigned nearest = below < above || (below == above && low % 2 == 0) ? low : high;
    return exact < 0 ? -half_value(nearest) : half_value(nearest);
}

static void check_halves() {
    bool to_float = true, to_half = true, ties = true, sums = true;
    for (unsigned bits = 0; bits < 65536; bits++) {
        const double value = half_value(bits);
        const float converted = __half2float(__ushort_as_half((unsigned short)bits));
        if (value != value) {
            to_float &= __float_as_uint(converted) == 0x7fffffffu;
            to_half &= __half_as_ushort(__float2half_rn(converted)) == 0x7fff;
            continue;
        }
        to_float &= (double)converted == value && std::signbit(converted) == (bits >> 15);
        to_half &= __half_as_ushort(__float2half_rn(converted)) == bits;
        // The middle between two neighbours goes to the even one, what lies beside it to the nearer one.
        if ((bits & 0x7fff) >= 0x7c00) continue;
        const double next = (bits & 0x7fff) == 0x7bff ? ldexp(bits >> 15 ? -1 : 1, 16) : half_value(bits + 1);
        const float middle = (float)((value + next) / 2);
        ties &= __half_as_ushort(__float2half_rn(middle)) == (bits & 1 ? bits + 1 : bits);
        ties &= __half_as_ushort(__float2half_rn(nextafterf(middle, 0.0f))) == bits;
        ties &= __half_as_ushort(__float2half_rn(nextafterf(middle, bits >> 15 ? -INFINITY : INFINITY))) == bits + 1;
    }
    check(to_float, "half to float");
    check(to_half && __half_as_ushort(__float2half_rn(NAN)) == 0x7fff, "float to half");
    check(ties && __half_as_ushort(__float2half_rn(1e9f)) == 0x7c00, "float to half, ties");
    for (int i = 0; i < 200000; i++) {
        const __half a = random_half(), b = random_half(), c = random_half();
        const double got = half_value(__hfma(a, b, c).bits),
                     rough = half_value(a.bits) * half_value(b.bits) + half_value(c.bits);
        if (!std::isfinite(rough)) {
            sums &= rough != rough ? got != got : got == rough;
            continue;
        }
        sums &= got == nearest_half(half_units(a) * half_units(b) + half_units(c) * (1 << 24));
    }
    check(sums, "fused multiply and add of halves");
}

static void check_small_functions() {
    bool bfloat = __bfloat16_as_ushort(__float2bfloat16_rn(NAN)) == 0x7fff;
    for (unsigned bits = 0; bits < 65536; bits++) {
        const float value = __bfloat162float(__ushort_as_bfloat16((unsigned short)bits));
        if (value != value) continue;
        bfloat &= __bfloat16_as_ushort(__float2bfloat16_rn(value)) == bits;
        if ((bits & 0x7fff) >= 0x7f80) continue;
        const float middle = __uint_as_float(bits << 16 | 0x8000u);
        bfloat &= __bfloat16_as_ushort(__float2bfloat16_rn(middle)) == (bits & 1 ? bits + 1 : bits);
        bfloat &= __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(bits << 16 | 0x8001u))) == bits + 1;
        bfloat &= __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(bits << 16 | 0x7fffu))) == bits;
    }
    check(bfloat, "bfloat16");
    check(dp4a(0x807f01ff, (int)0x80ff0203, 10) == 128 * 128 - 127 + 2 - 3 + 10, "dp4a");
    check(__byte_perm(0x44332211u, 0x88776655u, 0x7410u) == 0x88552211u, "__byte_perm");
    check(__byte_perm(0x44338211u, 0, 0x9080u) == 0xff110011u, "__byte_perm with signs");
    check(__clz(0) == 32 && __clz(1) == 31 && __ffs(0) == 0 && __ffs(8) == 4 && __popc(255) == 8, "bits");
    check(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rn(NAN) == 0, "__float2int_rn");
    check(__float2int_rn(3e9f) == 2147483647 && __float2int_rn(-INFINITY) == -2147483647 - 1,
          "__float2int_rn, out of range");
    check(min(-1, 1) == -1 && max(2u, 1u) == 2u && min(1.0f, NAN) == 1.0f && min((size_t)3, (size_t)4) == 3,
          "min and max");
    std::vector<float> out(20, 0.0f);
    CUDA_HOST_LAUNCH(fill_numbers, dim3(2), dim3(4), 0, out.data(), 6, 3u, 0.5f, (size_t)1, Pair{2, 0.25f});
    check(out[1] == 0.5f && out[16] == 3.0f && out[19] == 0.0f, "arguments");
    check(cuda_host::find_kernel("fill_numbers") && !cuda_host::find_kernel("fill"), "kernels by name");
}

static void check_cooperative() {
    const int blocks = std::min(7u, cuda_host::cooperative_limit);
    unsigned arrived = 0;
    std::vector<int> slots(blocks), expected(blocks);
    CUDA_HOST_LAUNCH_COOPERATIVE(hand_on, dim3(blocks), dim3(40), 0, &arrived, slots.data());
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < blocks; i++) expected[i] += i + 1;
        std::rotate(expected.begin(), expected.begin() + 1, expected.end());
    }
    if (slots != expected || arrived != 0) {
        printf("WRONG: hand_on\n");
        failures++;
    }
}

static void check_all() {
    check_cooperative();
    check_reduce<Clean>();
    check_reduce<Clean>(77, 64);
    check_rotate<Clean>();
    check_reverse_warp<Clean>();
    check_attention<Clean>(2, 5, 37);
    check_attention<Clean>(1, 1, 1);
    check_multiply_halves<Clean>();
    check_multiply_bytes<Clean>();
    check_shuffles();
    check_divergent();
    check_memory();
    check_atomics_and_indices();
    check_halves();
    check_small_functions();
    std::vector<int> out(128);
    CUDA_HOST_LAUNCH(barriers<Clean>, dim3(1), dim3(128), 0, out.data());
    CUDA_HOST_LAUNCH(masks<Clean>, dim3(1), dim3(100), 0, out.data());
    CUDA_HOST_LAUNCH(recurse<Clean>, dim3(1), dim3(1), 0, out.data());
}

template <Bug bug> static void run_on_integers(const char* name, void (*kernel)(int*), int threads) {
    std::vector<int> out(threads);
    cuda_host::launch_typed(false, name, kernel, dim3(2), dim3(threads), 0, out.data());
}

struct Planted {
    const char* name;
    std::function<void()> run;
};
static const Planted planted[] = {
    {"missing-barrier", [] { check_reduce<MissingBarrier>(); }},
    {"missing-second-barrier", [] { check_rotate<MissingSecondBarrier>(); }},
    {"missing-tile-barrier", [] { check_attention<MissingBarrier>(1, 8, 70); }},
    {"missing-syncwarp", [] { check_reverse_warp<MissingSyncWarp>(); }},
    {"missing-wait", [] { check_multiply_halves<MissingWait>(); }},
    {"missing-wait-in-pipeline", [] { check_attention<MissingWait>(1, 8, 70); }},
    {"uncommitted-copy", [] { check_multiply_halves<UncommittedCopy>(); }},
    {"wrong-fragment-f16", [] { check_multiply_halves<WrongFragment>(); }},
    {"wrong-fragment-s8", [] { check_multiply_bytes<WrongFragment>(); }},
    {"divergent-barrier", [] { run_on_integers<DivergentBarrier>("barriers", barriers<DivergentBarrier>, 64); }},
    {"return-before-barrier",
     [] { run_on_integers<ReturnBeforeBarrier>("barriers", barriers<ReturnBeforeBarrier>, 64); }},
    {"outside-mask", [] { run_on_integers<OutsideMask>("masks", masks<OutsideMask>, 32); }},
    {"mask-mismatch", [] { run_on_integers<MaskMismatch>("masks", masks<MaskMismatch>, 32); }},
    {"missing-lane", [] { run_on_integers<MissingLane>("masks", masks<MissingLane>, 32); }},
    {"not-cooperative",
     [] {
         unsigned arrived = 0;
         int slots[2] = {};
         CUDA_HOST_LAUNCH(hand_on, dim3(2), dim3(40), 0, &arrived, slots + 0);
     }},
    {"dynamic-overrun", [] { check_rotate<DynamicOverrun>(); }},
    {"dynamic-underrun", [] { check_rotate<DynamicUnderrun>(); }},
    {"static-overrun", [] { check_reduce<StaticOverrun>(); }},
    {"global-overrun", [] { check_reduce<GlobalOverrun>(); }},
    {"misaligned-copy", [] { check_multiply_halves<Misaligned>(); }},
    {"not-shared", [] { check_multiply_halves<NotShared>(); }},
    {"stack-overflow", [] { run_on_integers<StackOverflow>("recurse", recurse<StackOverflow>, 1); }},
};

// ---- Speed.

__global__ void many_shuffles(float* out, int n) {
    float value = (float)threadIdx.x;
    for (int i = 0; i < n; i++) value = sum_over_warp(value) * 0.03f;
    out[threadIdx.x] = value;
}
__global__ void many_barriers(float* out, int n) {
    for (int i = 0; i < n; i++) __syncthreads();
    out[threadIdx.x] = 0;
}
__global__ void many_products(float* out, int n) {
    const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {0x38003c00, 0x3c003c00};
    float d[4] = {0, 0, 0, 0};
    for (int i = 0; i < n; i++) mma_f16(d, a, b);
    out[threadIdx.x] = d[0];
}
__global__ void many_byte_products(float* out, int n) {
    const uint32_t a[4] = {1, 2, 3, 4}, b[2] = {0x01010101, 0x02020202};
    int d[4] = {0, 0, 0, 0};
    for (int i = 0; i < n; i++) mma_s8(d, a, b);
    out[threadIdx.x] = (float)d[0];
}
__global__ void nothing(float* out, int n) { out[threadIdx.x] = (float)n; }

static void time_one(const char* what, void (*kernel)(float*, int), unsigned blocks, int n, double operations) {
    std::vector<float> out(128);
    double best = 1e9;
    for (int repeat = 0; repeat < 3; repeat++) {
        const auto begin = std::chrono::steady_clock::now();
        cuda_host::launch_typed(false, what, kernel, dim3(blocks), dim3(128), 0, out.data(), n);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    printf("%-36s %7.1f ns\n", what, best * 1e9 / (blocks * 128.0 * operations));
}

static void print_speed() {
    time_one("shuffle, a lane", many_shuffles, 4, 2000, 2000 * 5);
    time_one("barrier, a thread", many_barriers, 4, 2000, 2000);
    time_one("mma_f16, a warp", many_products, 4, 2000, 2000 / 32.0);
    time_one("mma_s8, a warp", many_byte_products, 4, 2000, 2000 / 32.0);
    time_one("an empty kernel, a thread", nothing, 4000, 0, 1);
}

int main(int count, char** arguments) {
    const std::string mode = count > 1 ? arguments[1] : "";
    if (mode == "clean" && count == 3 && cuda_host::set_order(arguments[2])) {
        check_all();
        printf("%d failures\n", failures);
        return failures != 0;
    }
    if (mode == "bugs") {
        for (const Planted& one : planted) printf("%s\n", one.name);
        return 0;
    }
    if (mode == "bug" && count == 4 && cuda_host::set_order(arguments[3])) {
        for (const Planted& one : planted) {
            if (arguments[2] != std::string(one.name)) continue;
            one.run();
            printf("%d failures\n", failures);
            return failures != 0;
        }
    }
    if (mode == "speed") {
        print_speed();
        return 0;
    }
    fprintf(stderr, "usage: selftest clean ORDER | bug NAME ORDER | bugs | speed\n");
    return 2;
}

#endif
