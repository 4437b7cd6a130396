// Every instruction that kernels use and that CUDA C++ has no function for, once: on the device as inline PTX, in
// the emulator (host/cuda_host.h) as its exact meaning by the PTX ISA. Kernels contain no PTX of their own.
//
//     cp_async16, cp_async_commit, cp_async_wait      sm_80+
//     ldmatrix_x2, _x4, _x2_trans, _x4_trans          sm_75+
//     mma_f16 (m16n8k16), mma_s8 (m16n8k32)           sm_80+
//     dp4a                                            all (sm_61+)
//     load_streaming                                  all
//
// A function that an architecture lacks does not exist there: kernels have another path under #if.
//
// Fragments of the matrix instructions, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments"):
//     mma_f16  A 16x16: a0 (g, 2t) a1 (g+8, 2t) a2 (g, 2t+8) a3 (g+8, 2t+8), each two neighbours of a row
//              B 16x8:  b0 (rows 2t, 2t+1; column g)  b1 (rows 2t+8, 2t+9; column g)
//     mma_s8   A 16x32: a0 (g, 4t) a1 (g+8, 4t) a2 (g, 4t+16) a3 (g+8, 4t+16), each four neighbours of a row
//              B 32x8:  b0 (rows 4t to 4t+3; column g)  b1 (rows 4t+16 to 4t+19; column g)
//     both     D 16x8:  d0 (g, 2t) d1 (g, 2t+1) d2 (g+8, 2t) d3 (g+8, 2t+1)
#pragma once

#if !defined(CUDA_HOST)

#if defined(__CUDACC_RTC__)
// NVRTC has neither <stdint.h> nor <math.h>.
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <math.h>
#include <stdint.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Kernels are found by their name in the module; only the emulator needs a list.
#define EXPORT(kernel)
// The dynamic shared memory of the launch, aligned to 16 bytes.
#define DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Four products of signed bytes, added to `sum`.
__device__ __forceinline__ int dp4a(int a, int b, int sum) { return __dp4a(a, b, sum); }

// 16 bytes that are read once: they do not displace what the first-level cache holds. Aligned to 16 bytes.
__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

#if __CUDA_ARCH__ >= 750

// Each lane gives the address of a row of eight 16-bit numbers: lanes 0 to 7 those of the first 8x8 matrix, lanes 8
// to 15 those of the second, and so on. Each lane gets numbers (g, 2t) and (g, 2t+1) of each matrix; the transposed
// ones get (2t, g) and (2t+1, g). Rows lie in shared memory, aligned to 16 bytes.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif  // sm_75

#if __CUDA_ARCH__ >= 800

// Copies 16 bytes from global to shared memory in the background, or writes 16 zero bytes (and reads nothing) where
// `ok` is false. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void cp_async16(void* target, const void* source, bool ok = true) {
    int bytes = ok ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Left` of the latest groups of this thread are under way. Other threads see the data after
// the next barrier.
template <int Left> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// d += A B, A and B of halves, d of floats.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += A B, A and B of signed bytes, d of 32-bit integers.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // sm_80

#else  // the emulator

#define DYN_SMEM(name) unsigned char* const name = cuda_host::indices().dynamic_shared

inline int dp4a(int a, int b, int sum) { return __dp4a(a, b, sum); }

inline uint4 load_streaming(const uint4* address, CUDA_HOST_SITE) {
    cuda_host::require_aligned(address, 16, "load_streaming", site);
    return *address;
}

#if __CUDA_ARCH__ >= 750

// Read by the lane that gives the address: as on the device, nothing but a barrier orders that after another
// lane's write.
__forceinline__ void cuda_host_ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row,
                                        cuda_host::Site site) {
    if (cuda_host::self().lane < 8u * (unsigned)matrices) {
        cuda_host::require_aligned(row, 16, "ldmatrix", site);
        cuda_host::require_shared(row, 16, "ldmatrix", site);
        cuda_host::note_read(row, 16);
    }
    cuda_host::load_matrices(r, matrices, transposed, row, site);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row, CUDA_HOST_SITE) {
    cuda_host_ldmatrix(r, 2, false, row, site);
}
__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_HOST_SITE) {
    cuda_host_ldmatrix(r, 4, false, row, site);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, CUDA_HOST_SITE) {
    cuda_host_ldmatrix(r, 2, true, row, site);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUDA_HOST_SITE) {
    cuda_host_ldmatrix(r, 4, true, row, site);
}

#endif  // sm_75

#if __CUDA_ARCH__ >= 800

__forceinline__ void cp_async16(void* target, const void* source, bool ok = true, CUDA_HOST_SITE) {
    cuda_host::require_aligned(target, 16, "cp_async16, target", site);
    cuda_host::require_aligned(source, 16, "cp_async16, source", site);
    cuda_host::require_shared(target, 16, "cp_async16, target", site);
    cuda_host::note_write(target, 16);
    if (ok) cuda_host::note_read(source, 16);
    cuda_host::copy_async(target, source, 16, ok ? 16 : 0);
}
inline void cp_async_commit() { cuda_host::copy_commit(); }
template <int Left> inline void cp_async_wait() { cuda_host::copy_wait(Left); }

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_SITE) {
    cuda_host::multiply_f16(d, a, b, site);
}
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_SITE) {
    cuda_host::multiply_s8(d, a, b, site);
}

#endif  // sm_80

#endif
