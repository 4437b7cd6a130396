// Attention of one query to a cache (decoding). All architectures; bound by memory. A block for each chunk of each key head.
#include "decode.cuh"

// q and out [key heads, group, head_dim]
template <typename T>
__device__ __forceinline__ void decode(const float* q, const T* k, const T* v, const float* k_scales, const float* v_scales,
                                       const Decode& shape, float* partial, int* counters, float* out) {
    q += blockIdx.y * shape.group * shape.head_dim;
    auto query = [&](int head, int i) { return q[head * shape.head_dim + i]; };
    decode(query, k, v, k_scales, v_scales, shape, blockIdx.y, blockIdx.x, partial, counters, out);
}

extern "C" __global__ void __launch_bounds__(CHUNK)
    decode_f16(const float* q, const __half* k, const __half* v, Decode shape, float* partial, int* counters, float* out) {
    decode<__half>(q, k, v, nullptr, nullptr, shape, partial, counters, out);
}
EXPORT(decode_f16)

extern "C" __global__ void __launch_bounds__(CHUNK)
    decode_i8(const float* q, const signed char* k, const signed char* v, const float* k_scales, const float* v_scales,
              Decode shape, float* partial, int* counters, float* out) {
    decode<signed char>(q, k, v, k_scales, v_scales, shape, partial, counters, out);
}
EXPORT(decode_i8)
