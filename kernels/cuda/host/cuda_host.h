// Runs CUDA C++ kernels on the CPU, so that they are proven without a GPU.
//
// A .cu file is compiled as C++ with this file in front of it:
//
//     g++ -std=c++17 -O2 -pthread -include cuda_host.h -x c++ kernel.cu test.cpp cuda_host.cpp
//
// Each CUDA thread of a block is a fiber with a stack of its own; the fibers of a block run one at a time and change
// over at barriers and warp operations. Blocks run one after another, or spread over the threads of the operating
// system that the environment variable CUDA_HOST_THREADS asks for; those of a cooperative launch have one each. CUDA_HOST_ORDER is the order in which fibers and
// blocks are taken: 0 (ascending), `reverse`, or the seed of a random order.
//
// Bugs end the process with a message that names kernel, block, thread and line: threads of a block that wait at
// different barriers or have left, lanes that meet in different warp operations or with different masks, a shuffle
// from a lane outside of the mask, misaligned addresses in ptx.cuh's functions, accesses past the dynamic shared
// memory, an overflow of a thread's stack. Shared memory holds 0xff (a NaN in every format) when a block begins, and
// the target of an asynchronous copy holds it until the copy was waited for. The address sanitizer finds what is
// outside of an allocation, the thread sanitizer finds accesses of two threads of a block without a barrier between.
//
// Not modelled: races between blocks, weak memory order, more than one grid at a time.
#pragma once
// Standard headers first: kernels need none of their own, and their tests get the usual ones.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda_types.h"

#define CUDA_HOST 1
#if !defined(CUDA_HOST_ARCH)
#define CUDA_HOST_ARCH 870
#endif
#define __CUDA_ARCH__ CUDA_HOST_ARCH

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // the address sanitizer puts red zones around these, but not around thread-local ones
#else
#define __shared__ static thread_local  // one block runs on a thread of the operating system at a time
#endif

#if defined(__SANITIZE_THREAD__)
// The thread sanitizer's own functions (its header does not declare them).
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
#endif

namespace cuda_host {

// ---- Kernels known by name.

struct Kernel {
    const char* name;
    void (*function)();                                 // the kernel, its type hidden
    void (*run)(void (*function)(), void** arguments);  // calls it with arguments read through pointers
    const size_t* argument_sizes;
    size_t argument_count;
};

// Adds a kernel to the list that `find_kernel` searches. The name must be unique.
void add_kernel(const Kernel& kernel);
const Kernel* find_kernel(const char* name);

template <class... Arguments> struct Call {
    static constexpr size_t sizes[sizeof...(Arguments) + 1] = {sizeof(Arguments)..., 0};
    template <size_t... Index>
    static void run_with(void (*function)(), void** arguments, std::index_sequence<Index...>) {
        (void)arguments;  // a kernel may have none
        reinterpret_cast<void (*)(Arguments...)>(function)(
            *static_cast<std::remove_cv_t<Arguments>*>(arguments[Index])...);
    }
    static void run(void (*function)(), void** arguments) {
        run_with(function, arguments, std::index_sequence_for<Arguments...>{});
    }
};

template <class... Arguments> Kernel describe(const char* name, void (*kernel)(Arguments...)) {
    static_assert((std::is_trivially_copyable_v<Arguments> && ...), "kernel arguments are copied as bytes");
    return {name, reinterpret_cast<void (*)()>(kernel), Call<Arguments...>::run, Call<Arguments...>::sizes,
            sizeof...(Arguments)};
}

struct Registration {
    template <class... Arguments> Registration(const char* name, void (*kernel)(Arguments...)) {
        add_kernel(describe(name, kernel));
    }
};

// ---- Launching.

// Runs a grid to its end. The arguments are pointers to the kernel's arguments. The blocks of a cooperative launch, at
// most `cooperative_limit`, run at the same time.
void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
            bool cooperative = false);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr unsigned cooperative_limit = 1;  // as static shared memory exists once
#else
constexpr unsigned cooperative_limit = 16;
#endif

// The order of threads and blocks from now on, as in CUDA_HOST_ORDER. False: not an order.
bool set_order(const char* order);

template <class... Parameters, class... Arguments>
void launch_typed(bool cooperative, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  size_t shared_bytes, Arguments... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "wrong number of kernel arguments");
    auto run = [&](Parameters... converted) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&converted))..., nullptr};
        launch(describe(name, kernel), grid, block, shared_bytes, pointers, cooperative);
    };
    run(arguments...);
}

// ---- What the code of a kernel calls.

struct Block;
struct Warp;
struct Copies;

// A CUDA thread. Its place in `fibers` follows from the address of its stack.
struct Fiber {
    void* stack_pointer;
    Block* block;
    Warp* warp;
    dim3 thread;
    unsigned lane;
    const char* file;  // where it last waited
    int line;
    uint32_t state;
    Copies* copies;
    void* sanitizer_fiber;  // thread sanitizer
    void* fake_stack;       // address sanitizer
};

struct BlockIndices {
    dim3 block_index, block_size, grid_size;
    unsigned char* dynamic_shared;
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t stack_bytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
extern __attribute__((visibility("hidden"))) uintptr_t fiber_stacks;
extern __attribute__((visibility("hidden"))) Fiber* fibers;

// The running CUDA thread. No thread-local variable is needed, which would be slow in a shared library.
inline Fiber& self() {
    uintptr_t stack;
#if defined(__x86_64__)
    asm("movq %%rsp, %0" : "=r"(stack));
#elif defined(__aarch64__)
    asm("mov %0, sp" : "=r"(stack));
#else
#error "the emulator knows x86-64 and aarch64"
#endif
    return fibers[(stack - fiber_stacks) / stack_bytes];
}

inline const BlockIndices& indices() { return *reinterpret_cast<const BlockIndices*>(self().block); }

// A place in the source. As a default argument, `here` is the place of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
#define CUDA_HOST_SITE cuda_host::Site site = cuda_host::Site::here()

enum class Shuffle : unsigned { Index, Up, Down, Xor };

void barrier(Site site);
void nanosleep(Site site);
void sync_warp(uint32_t mask, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site);
void copy_async(void* target, const void* source, size_t bytes, size_t source_bytes);
void copy_commit();
void copy_wait(unsigned left);
void load_matrices(uint32_t* fragments, int matrices, bool transposed, const void* row, Site site);
void multiply_f16(float* sums, const uint32_t* a, const uint32_t* b, Site site);
void multiply_s8(int* sums, const uint32_t* a, const uint32_t* b, Site site);
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);
void require_shared(const void* address, size_t bytes, const char* what, Site site);

inline void require_aligned(const void* address, size_t alignment, const char* what, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
    fail(site, "%s: the address %p is not a multiple of %zu", what, address, alignment);
}

// Tells the thread sanitizer of an access that the emulator makes for this line of the kernel.
__forceinline__ void note_read(const void* address, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    __tsan_read_range(const_cast<void*>(address), bytes);
#else
    (void)address, (void)bytes;
#endif
}
__forceinline__ void note_write(void* address, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    __tsan_write_range(address, bytes);
#else
    (void)address, (void)bytes;
#endif
}

template <class Value>
inline Value shuffle_value(Shuffle kind, uint32_t mask, Value value, int argument, int width, Site site) {
    static_assert(sizeof(Value) <= 8 && std::is_trivially_copyable_v<Value>, "too large to shuffle");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(Value));
    bits = shuffle(kind, mask, bits, argument, width, site);
    memcpy(&value, &bits, sizeof(Value));
    return value;
}

}  // namespace cuda_host

// Makes a kernel known by its name.
#define EXPORT(kernel) static const cuda_host::Registration registration_of_##kernel(#kernel, kernel);
// Runs a kernel from C++, for tests.
#define CUDA_HOST_LAUNCH(kernel, grid, block, shared_bytes, ...) \
    cuda_host::launch_typed(false, #kernel, kernel, grid, block, shared_bytes, ##__VA_ARGS__)
#define CUDA_HOST_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, ...) \
    cuda_host::launch_typed(true, #kernel, kernel, grid, block, shared_bytes, ##__VA_ARGS__)

#define threadIdx (cuda_host::self().thread)
#define blockIdx (cuda_host::indices().block_index)
#define blockDim (cuda_host::indices().block_size)
#define gridDim (cuda_host::indices().grid_size)
constexpr int warpSize = 32;

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::barrier(site); }
inline void __nanosleep(unsigned, CUDA_HOST_SITE) { cuda_host::nanosleep(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) { cuda_host::sync_warp(mask, site); }
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return cuda_host::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return cuda_host::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
    return cuda_host::ballot(mask, predicate == 0, site) == 0;  // nobody says no
}
template <class Value> inline Value __shfl_sync(unsigned mask, Value value, int lane, int width = 32, CUDA_HOST_SITE) {
    return cuda_host::shuffle_value(cuda_host::Shuffle::Index, mask, value, lane, width, site);
}
template <class Value>
inline Value __shfl_up_sync(unsigned mask, Value value, unsigned lanes, int width = 32, CUDA_HOST_SITE) {
    return cuda_host::shuffle_value(cuda_host::Shuffle::Up, mask, value, (int)lanes, width, site);
}
template <class Value>
inline Value __shfl_down_sync(unsigned mask, Value value, unsigned lanes, int width = 32, CUDA_HOST_SITE) {
    return cuda_host::shuffle_value(cuda_host::Shuffle::Down, mask, value, (int)lanes, width, site);
}
template <class Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = 32, CUDA_HOST_SITE) {
    return cuda_host::shuffle_value(cuda_host::Shuffle::Xor, mask, value, lanes, width, site);
}

// The emulator runs the threads of a block one at a time; only between blocks does a fence do more than hold back the compiler.
inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)
    asm volatile("" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

template <class Value> inline Value __ldg(const Value* address) { return *address; }

// ---- Atomics. Relaxed, as on the device.

inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(address);
    uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + value), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return __uint_as_float(old);
}

namespace cuda_host {
// Replaces the value if `better(value, old)`, and gives the old one.
template <class Value, class Better> inline Value atomic_choose(Value* address, Value value, Better better) {
    Value old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (better(value, old) &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
}  // namespace cuda_host

#define CUDA_HOST_ATOMICS(type)                                                                            \
    inline type atomicMax(type* address, type value) {                                                     \
        return cuda_host::atomic_choose(address, value, [](type a, type b) { return a > b; });             \
    }                                                                                                      \
    inline type atomicMin(type* address, type value) {                                                     \
        return cuda_host::atomic_choose(address, value, [](type a, type b) { return a < b; });             \
    }                                                                                                      \
    inline type atomicExch(type* address, type value) {                                                    \
        return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);                                      \
    }                                                                                                      \
    inline type atomicCAS(type* address, type expected, type value) {                                      \
        __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
        return expected;                                                                                   \
    }
CUDA_HOST_ATOMICS(int)
CUDA_HOST_ATOMICS(unsigned)
CUDA_HOST_ATOMICS(unsigned long long)
