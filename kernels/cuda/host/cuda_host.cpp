// The emulator behind cuda_host.h: fibers, barriers, warp operations, asynchronous copies, matrix instructions.
//
// The fibers of a block change over directly, without a scheduler in between: whoever has to wait picks the next
// fiber that can run. Within a warp that is one bit operation, which keeps shuffles cheap. A warp operation is done by
// the last lane to arrive, for all lanes of its mask.
#include "cuda_host.h"

#include <link.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The thread sanitizer is told what orders the accesses of CUDA threads (barriers do, shuffles do not). The
// emulator's own data are no business of its: only one fiber runs at a time.
#if defined(__SANITIZE_THREAD__)
#define UNSEEN __attribute__((no_sanitize_thread))
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
static const unsigned no_order_by_switching = 1;
static inline UNSEEN void order_after(void* tag) { __tsan_acquire(tag); }
static inline UNSEEN void order_before(void* tag) { __tsan_release(tag); }
#else
#define UNSEEN
static inline void order_after(void*) {}
static inline void order_before(void*) {}
#endif

// Saves the callee-saved registers on the running stack, its top in *save, and goes on with the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void cuda_host_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .globl cuda_host_switch
    .hidden cuda_host_switch
    .type cuda_host_switch, @function
cuda_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_host_switch, .-cuda_host_switch
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
    .globl cuda_host_switch
    .hidden cuda_host_switch
    .type cuda_host_switch, %function
cuda_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_host_switch, .-cuda_host_switch
)");
#endif

// A stack that the first switch to it enters at `entry`.
static void* prepare_stack(char* top, void (*entry)()) {
#if defined(__x86_64__)
    // Six registers, the address that `ret` takes, and a zero where `entry` would return to.
    void** stack = reinterpret_cast<void**>(top) - 8;
    memset(stack, 0, 8 * sizeof(void*));
    stack[6] = reinterpret_cast<void*>(entry);
    return stack;
#elif defined(__aarch64__)
    char* stack = top - 160;
    memset(stack, 0, 160);
    reinterpret_cast<void**>(stack)[11] = reinterpret_cast<void*>(entry);  // x30, the return address
    return stack;
#endif
}

namespace cuda_host {

constexpr unsigned warp_size = 32;
constexpr unsigned block_limit = 1024;
constexpr unsigned warp_limit = block_limit / warp_size;
constexpr unsigned worker_limit = 16;
constexpr size_t dynamic_limit = 227 << 10;  // the most that any device gives a block
constexpr size_t canary_bytes = 64;
constexpr unsigned char poison = 0xff;

enum State : uint32_t { Runnable, AtBarrier, InWarp, Left };
enum Operation : uint32_t {
    SyncWarp,
    Ballot,
    ShuffleIndex,
    ShuffleUp,
    ShuffleDown,
    ShuffleXor,
    LoadMatrices,
    MultiplyF16,
    MultiplyS8
};
static const char* const operation_names[] = {"__syncwarp",     "a vote",           "__shfl_sync",
                                              "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                              "ldmatrix",       "mma_f16",          "mma_s8"};

// What the lanes of a warp hand over when they meet. Results stay until their lane's next operation of the kind.
struct Warp {
    uint32_t exists, ready, arrived, left;  // a bit a lane
    Fiber* lanes;
    unsigned index;
    uint32_t mask[warp_size], operation[warp_size];
    alignas(64) uint64_t value[warp_size];
    alignas(64) uint64_t result[warp_size];
    int argument[warp_size];
    alignas(64) uint16_t row[32][8];  // ldmatrix: row of each lane
    // The fragments of mma, put where they belong by the lanes themselves. B lies transposed.
    alignas(64) uint16_t a_f16[16][16], b_f16[8][16];
    alignas(64) int8_t a_s8[16][32], b_s8[8][32];
    alignas(64) float sum_f32[16][8];
    alignas(64) int32_t sum_s32[16][8];
    unsigned turn;  // thread sanitizer: which of `turns` orders the present __syncwarp
    char turns[8], lane_tag[32];
};

struct Copy {
    void* target;
    const void* source;
    uint32_t bytes, source_bytes;
};

// The asynchronous copies of a thread that it has not waited for.
struct Copies {
    std::vector<Copy> list;
    std::vector<size_t> groups;  // end of each group in the list
    size_t first_copy = 0, first_group = 0;
};

struct Order {
    enum Kind { Ascending, Reverse, Random } kind;
    uint64_t seed;
};

// The block that a worker runs, and what it needs for any.
struct Block {
    BlockIndices indices;  // first, for `indices()`
    const Kernel* kernel;
    void** arguments;
    unsigned threads, warps, ready_warps, at_barrier, left;
    const struct Grid* grid;
    unsigned naps;  // since the last barrier, of threads that wait for other blocks
    bool alone;     // no other block runs
    Order::Kind order;
    uint64_t random;
    void* main_stack_pointer;
    size_t dynamic_bytes;
    const char *static_shared, *static_shared_end;
    unsigned barriers;  // thread sanitizer: two tags in turn, so that who is late at one barrier sees nothing later
    char barrier_tags[2], begin_tag, end_tag;
    void* sanitizer_main;
    const void* main_stack_bottom;
    size_t main_stack_size;
    void* main_fake_stack;
    Warp warp[warp_limit];
};

// A thread of the operating system that runs blocks.
struct Worker {
    Block block;
    Fiber* fibers = nullptr;
    unsigned prepared = 0;           // fibers that have a stack
    unsigned char* arena = nullptr;  // dynamic shared memory; ends where `guard` begins
    unsigned char* guard = nullptr;
    unsigned poisonings = 0;  // how often static shared memory is still to be poisoned in this launch
    Copies copies[block_limit];
};

__attribute__((visibility("hidden"))) uintptr_t fiber_stacks;
__attribute__((visibility("hidden"))) Fiber* fibers;

static Worker* workers[worker_limit];
static std::mutex launch_lock;
static Order order;
static size_t page_bytes;
static struct sigaction former_action;
// Poisoned with the other thread-local variables of this library, so that nothing else may be one. Its address makes
// the memory exist.
static thread_local volatile char shared_anchor;

// ---- Failing.

static const char* base_name(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

static bool in_stacks(uintptr_t address) {
    return fiber_stacks && address - fiber_stacks < stack_bytes * block_limit * worker_limit;
}

static bool in_fiber() { return in_stacks(reinterpret_cast<uintptr_t>(__builtin_frame_address(0))); }

static void print_place(const Fiber& fiber, Site site) {
    const Block& block = *fiber.block;
    const dim3 &b = block.indices.block_index, &t = fiber.thread;
    fprintf(stderr, "cuda: kernel %s, block (%u,%u,%u), thread (%u,%u,%u), %s:%d: ", block.kernel->name, b.x, b.y, b.z,
            t.x, t.y, t.z, base_name(site.file), site.line);
}

UNSEEN void fail(Site site, const char* format, ...) {
    if (in_fiber())
        print_place(self(), site);
    else
        fprintf(stderr, "cuda: ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    fflush(stderr);
    abort();
}

static UNSEEN void describe_wait(const Block& block, unsigned index, char* text, size_t size) {
    const Warp& warp = block.warp[index / warp_size];
    const Fiber& fiber = warp.lanes[index % warp_size];
    switch (fiber.state) {
        case Left: snprintf(text, size, "has returned"); break;
        case AtBarrier: snprintf(text, size, "waits at __syncthreads, %s:%d", base_name(fiber.file), fiber.line); break;
        case InWarp:
            snprintf(text, size, "waits at %s, mask %08x, %s:%d",
                     operation_names[warp.operation[index % warp_size] & 0xffu], warp.mask[index % warp_size],
                     base_name(fiber.file), fiber.line);
            break;
        default: snprintf(text, size, "can run");
    }
}

// Lists what the threads do, neighbours that do the same in one line.
static UNSEEN void print_threads(const Block& block) {
    char text[256], next[256];
    unsigned shown = 0;
    for (unsigned first = 0, end; first < block.threads && shown < 24; first = end, shown++) {
        describe_wait(block, first, text, sizeof(text));
        for (end = first + 1; end < block.threads; end++) {
            describe_wait(block, end, next, sizeof(next));
            if (strcmp(text, next) != 0) break;
        }
        if (end - first == 1)
            fprintf(stderr, "  thread %u %s\n", first, text);
        else
            fprintf(stderr, "  threads %u to %u: each %s\n", first, end - 1, text);
    }
}

[[noreturn]] static UNSEEN void fail_block(const Fiber& fiber, const char* reason) {
    print_place(fiber, {fiber.file, fiber.line});
    fprintf(stderr, "%s\n", reason);
    print_threads(*fiber.block);
    fflush(stderr);
    abort();
}

// ---- Changing over.

static inline UNSEEN unsigned random_bits(Block& block) {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return (unsigned)(block.random >> 32);
}

// One of the bits that are set.
static inline UNSEEN unsigned choose_bit(Block& block, uint32_t bits) {
    if (block.order == Order::Ascending) return (unsigned)__builtin_ctz(bits);
    if (block.order == Order::Reverse) return 31u - (unsigned)__builtin_clz(bits);
    unsigned turn = random_bits(block) & 31u;
    return ((unsigned)__builtin_ctz(bits >> turn | bits << (-turn & 31u)) + turn) & 31u;
}

static inline UNSEEN void make_ready(Block& block, Warp& warp, uint32_t lanes) {
    if (!lanes) return;
    warp.ready |= lanes;
    block.ready_warps |= 1u << warp.index;
}

// The next fiber that can run, taken from the ready ones; the present warp's first. None: null.
static inline UNSEEN Fiber* take_ready(Block& block, Warp* warp) {
    if (!block.ready_warps) return nullptr;
    if (!warp->ready || (block.order == Order::Random && random_bits(block) % 8 == 0))
        warp = &block.warp[choose_bit(block, block.ready_warps)];
    unsigned lane = choose_bit(block, warp->ready);
    warp->ready &= ~(1u << lane);
    if (!warp->ready) block.ready_warps &= ~(1u << warp->index);
    return &warp->lanes[lane];
}

// With the sanitizers, what is around a change of stacks. `to` null: the worker's own stack.
static inline UNSEEN void before_switch(Block& block, void** fake_stack, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
    if (to) {
        const char* bottom = reinterpret_cast<const char*>(fiber_stacks) + stack_bytes * (size_t)(to - fibers);
        __sanitizer_start_switch_fiber(fake_stack, bottom, stack_bytes);
    } else {
        __sanitizer_start_switch_fiber(fake_stack, block.main_stack_bottom, block.main_stack_size);
    }
#elif defined(__SANITIZE_THREAD__)
    (void)fake_stack;
    __tsan_switch_to_fiber(to ? to->sanitizer_fiber : block.sanitizer_main, no_order_by_switching);
#else
    (void)block, (void)fake_stack, (void)to;
#endif
}

static inline UNSEEN void after_switch(Block& block, void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    // Coming from outside of the fibers' stacks: that is the worker's own, to which they must find back.
    if (!in_stacks(reinterpret_cast<uintptr_t>(bottom))) {
        block.main_stack_bottom = bottom;
        block.main_stack_size = size;
    }
#else
    (void)block, (void)fake_stack;
#endif
}

static inline UNSEEN void switch_to(Fiber& from, Fiber* to) {
    Block& block = *from.block;
    before_switch(block, &from.fake_stack, to);
    cuda_host_switch(&from.stack_pointer, to ? to->stack_pointer : block.main_stack_pointer);
    after_switch(block, from.fake_stack);
}

static UNSEEN void release_barrier(Block& block) {
    for (unsigned i = 0; i < block.warps; i++) {
        Warp& warp = block.warp[i];
        for (uint32_t lanes = warp.exists; lanes; lanes &= lanes - 1) warp.lanes[__builtin_ctz(lanes)].state = Runnable;
        make_ready(block, warp, warp.exists);
    }
    block.at_barrier = block.naps = 0;
    block.barriers++;
}

// Nobody can run: either all are at the same barrier, or the kernel has a bug.
static UNSEEN void open_barrier_or_fail(Fiber& last) {
    Block& block = *last.block;
    const Fiber* waiting = nullptr;
    for (unsigned i = 0; i < block.threads; i++) {
        const Fiber& fiber = block.warp[i / warp_size].lanes[i % warp_size];
        if (fiber.state != AtBarrier) continue;
        if (!waiting) waiting = &fiber;
        if (fiber.line != waiting->line || fiber.file != waiting->file)
            fail_block(fiber, "threads of one block wait at different __syncthreads (barrier divergence)");
    }
    if (block.at_barrier == block.threads) return release_barrier(block);
    if (waiting && block.at_barrier + block.left == block.threads)
        fail_block(*waiting, "waits at __syncthreads, but threads of the block have returned (barrier divergence)");
    for (unsigned i = 0; i < block.threads; i++) {
        const Fiber& fiber = block.warp[i / warp_size].lanes[i % warp_size];
        if (fiber.state != InWarp) continue;
        const Warp& warp = *fiber.warp;
        uint32_t mask = warp.mask[fiber.lane] & warp.exists;
        if (mask & warp.left) fail_block(fiber, "deadlock: waits for lanes of its mask that have returned");
        for (uint32_t lanes = mask & warp.arrived; lanes; lanes &= lanes - 1)
            if ((warp.mask[__builtin_ctz(lanes)] & warp.exists) != mask)
                fail_block(fiber, "deadlock: lanes of one warp wait with different masks (mask mismatch)");
        fail_block(fiber, "deadlock: lanes of its mask never come");
    }
    fail_block(last, "deadlock: no thread can go on");
}

// Lets others run until this fiber is ready again.
static inline UNSEEN void yield(Fiber& me) {
    Block& block = *me.block;
    Fiber* next = take_ready(block, me.warp);
    if (__builtin_expect(!next, 0)) {
        open_barrier_or_fail(me);
        next = take_ready(block, me.warp);
    }
    if (next != &me) switch_to(me, next);
}

// The end of a thread's kernel.
static UNSEEN void leave(Fiber& me) {
    Block& block = *me.block;
    order_before(&block.end_tag);
    me.state = Left;
    me.warp->left |= 1u << me.lane;
    block.left++;
    Fiber* next = take_ready(block, me.warp);
    if (!next && block.left != block.threads) {
        open_barrier_or_fail(me);
        next = take_ready(block, me.warp);
    }
    switch_to(me, next);
}

// What runs on a fiber's stack, for one block after another.
static UNSEEN void fiber_main() {
    Fiber& me = self();
    after_switch(*me.block, nullptr);
    for (;;) {
        order_after(&me.block->begin_tag);
        me.block->kernel->run(me.block->kernel->function, me.block->arguments);
        leave(me);
    }
}

// ---- Barriers and warp operations.

UNSEEN void barrier(Site site) {
    Fiber& me = self();
    Block& block = *me.block;
    char* tag = &block.barrier_tags[block.barriers & 1];
    order_before(tag);
    me.state = AtBarrier;
    me.file = site.file;
    me.line = site.line;
    block.at_barrier++;
    yield(me);
    order_after(tag);
}

struct Grid {
    uint64_t blocks, first, step;
    std::atomic<uint64_t> next{0};
    std::atomic<unsigned> running{0};  // workers
};

// A thread that waits for another block lets all others run.
UNSEEN void nanosleep(Site site) {
    constexpr unsigned many_naps = 10000, endless_naps = 100000000;
    Fiber& me = self();
    Block& block = *me.block;
    me.file = site.file;
    me.line = site.line;
    make_ready(block, *me.warp, 1u << me.lane);
    Fiber* next = take_ready(block, me.warp);
    if (next != &me) {
        switch_to(me, next);
        return;
    }
    // Others may have done what is waited for, and ended.
    const bool alone = block.grid->running.load() == 1;
    if (alone != block.alone) block.naps = 0;
    block.alone = alone;
    sched_yield();
    block.naps++;
    if (alone && block.naps > many_naps)
        fail(site, "deadlock: waits for another block, and none is running (is the launch cooperative?)");
    if (block.naps > endless_naps) fail(site, "deadlock: waits for another block, which does not come");
}

// Makes the calling lane meet the others of its mask. True: it is the last, does the work for all and then calls
// `finish`. False: the work is done.
static inline UNSEEN bool meet(Fiber& me, Warp& warp, uint32_t& mask, Operation operation, Site site) {
    const uint32_t bit = 1u << me.lane, code = (uint32_t)site.line << 8 | operation;
    me.file = site.file;
    me.line = site.line;
    if (__builtin_expect(!(mask & bit), 0))
        fail(site, "%s with mask %08x, which leaves out the calling lane %u", operation_names[operation], mask,
             me.lane);
    mask &= warp.exists;
    warp.mask[me.lane] = mask;
    warp.operation[me.lane] = code;
    warp.arrived |= bit;
    me.state = InWarp;
    if (__builtin_expect((mask & warp.left) != 0, 0))
        fail_block(me, "a warp operation whose mask has lanes that have returned");
    if ((warp.arrived & mask) != mask) {
        yield(me);
        return false;
    }
    uint32_t differences = 0;
    if (mask == 0xffffffffu) {
        for (unsigned i = 0; i < warp_size; i++) differences |= (warp.mask[i] ^ mask) | (warp.operation[i] ^ code);
    } else {
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
            unsigned lane = (unsigned)__builtin_ctz(lanes);
            differences |= (warp.mask[lane] ^ mask) | (warp.operation[lane] ^ code);
        }
    }
    if (__builtin_expect(differences != 0, 0))
        fail_block(me, "lanes of one mask meet in different warp operations or with different masks (mask mismatch)");
    return true;
}

static inline UNSEEN void finish(Fiber& me, Warp& warp, uint32_t mask) {
    Block& block = *me.block;
    warp.arrived &= ~mask;
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) warp.lanes[__builtin_ctz(lanes)].state = Runnable;
    make_ready(block, warp, mask & ~(1u << me.lane));
    if (block.order == Order::Random && random_bits(block) & 1u) {  // who did the work need not be the first to go on
        make_ready(block, warp, 1u << me.lane);
        yield(me);
    }
}

UNSEEN void sync_warp(uint32_t mask, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    order_before(&warp.lane_tag[me.lane]);
    if (!meet(me, warp, mask, SyncWarp, site)) {
        order_after(&warp.turns[warp.result[me.lane]]);
        return;
    }
    warp.turn = (warp.turn + 1) % sizeof(warp.turns);
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        unsigned lane = (unsigned)__builtin_ctz(lanes);
        order_after(&warp.lane_tag[lane]);
        warp.result[lane] = warp.turn;
    }
    order_before(&warp.turns[warp.turn]);
    finish(me, warp, mask);
}

UNSEEN uint32_t ballot(uint32_t mask, bool predicate, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    warp.argument[me.lane] = predicate;
    if (meet(me, warp, mask, Ballot, site)) {
        uint32_t votes = 0;
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
            unsigned lane = (unsigned)__builtin_ctz(lanes);
            votes |= (uint32_t)warp.argument[lane] << lane;
        }
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) warp.result[__builtin_ctz(lanes)] = votes;
        finish(me, warp, mask);
    }
    return (uint32_t)warp.result[me.lane];
}

// The lane that `lane` reads, by the PTX ISA's definition of shfl.sync.
static inline UNSEEN unsigned shuffle_source(Shuffle kind, unsigned lane, unsigned argument, unsigned width) {
    const unsigned first = lane & ~(width - 1), last = first + width - 1;
    argument &= 31u;
    switch (kind) {
        case Shuffle::Index: return first | (argument & (width - 1));
        case Shuffle::Up: return lane < first + argument ? lane : lane - argument;
        case Shuffle::Down: return lane + argument > last ? lane : lane + argument;
        case Shuffle::Xor: return (lane ^ argument) > last ? lane : lane ^ argument;
    }
    return lane;
}

// Xor with one number for all lanes of a full warp: what sums and maxima over a warp are made of.
static inline UNSEEN bool shuffle_xor_all(Warp& warp, unsigned argument) {
    for (unsigned lane = 0; lane < warp_size; lane++)
        if (warp.argument[lane] != (int)argument) return false;
    for (unsigned lane = 0; lane < warp_size; lane++) warp.result[lane] = warp.value[lane ^ argument];
    return true;
}

UNSEEN uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    const unsigned lane = me.lane;
    warp.value[lane] = value;
    warp.argument[lane] = argument;
    if (__builtin_expect(width < 1 || width > 32 || (width & (width - 1)), 0))
        fail(site, "shuffle over %d lanes, which is not a power of two up to 32", width);
    if (!meet(me, warp, mask, (Operation)(ShuffleIndex + (unsigned)kind), site)) return warp.result[lane];
    const bool common = kind == Shuffle::Xor && width == 32 && mask == 0xffffffffu && (unsigned)argument < 32;
    if (!common || !shuffle_xor_all(warp, (unsigned)argument)) {
        for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
            const unsigned to = (unsigned)__builtin_ctz(lanes);
            const unsigned from = shuffle_source(kind, to, (unsigned)warp.argument[to], (unsigned)width);
            if (__builtin_expect(!(mask >> from & 1u), 0)) {
                print_place(warp.lanes[to], site);
                fprintf(stderr, "lane %u shuffles from lane %u, which is not in the mask %08x\n", to, from, mask);
                abort();
            }
            warp.result[to] = warp.value[from];
        }
    }
    finish(me, warp, mask);
    return warp.result[lane];
}

// ---- Asynchronous copies. Their data arrive at the wait, no earlier; until then the target is poisoned.

UNSEEN void copy_async(void* target, const void* source, size_t bytes, size_t source_bytes) {
    Copies& copies = *self().copies;
    memset(target, poison, bytes);
    copies.list.push_back({target, source, (uint32_t)bytes, (uint32_t)source_bytes});
}

UNSEEN void copy_commit() {
    Copies& copies = *self().copies;
    copies.groups.push_back(copies.list.size());
}

UNSEEN void copy_wait(unsigned left) {
    Copies& copies = *self().copies;
    while (copies.groups.size() - copies.first_group > left) {
        for (size_t end = copies.groups[copies.first_group++]; copies.first_copy < end; copies.first_copy++) {
            const Copy& copy = copies.list[copies.first_copy];
            memcpy(copy.target, copy.source, copy.source_bytes);
            memset(static_cast<char*>(copy.target) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
        }
    }
    if (copies.first_copy != copies.list.size() || copies.first_group != copies.groups.size()) {
        // Long pipelines never empty the lists: move what is left to the front now and then.
        if (copies.first_copy < 64) return;
        copies.list.erase(copies.list.begin(), copies.list.begin() + (ptrdiff_t)copies.first_copy);
        copies.groups.erase(copies.groups.begin(), copies.groups.begin() + (ptrdiff_t)copies.first_group);
        for (size_t& end : copies.groups) end -= copies.first_copy;
    } else {
        copies.list.clear();
        copies.groups.clear();
    }
    copies.first_copy = copies.first_group = 0;
}

UNSEEN void require_shared(const void* address, size_t bytes, const char* what, Site site) {
    const Block& block = *self().block;
    const char* first = static_cast<const char*>(address);
    const char* dynamic = reinterpret_cast<const char*>(block.indices.dynamic_shared);
    if (first >= dynamic && first + bytes <= dynamic + block.dynamic_bytes) return;
    if (!block.static_shared || (first >= block.static_shared && first + bytes <= block.static_shared_end)) return;
    fail(site, "%s: %zu bytes at %p are not shared memory", what, bytes, address);
}

// ---- Matrix instructions. The fragments are those of ptx.cuh's comment.

UNSEEN void load_matrices(uint32_t* fragments, int matrices, bool transposed, const void* row, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    uint32_t mask = 0xffffffffu;
    if (me.lane < 8u * (unsigned)matrices) memcpy(warp.row[me.lane], row, 16);
    if (meet(me, warp, mask, LoadMatrices, site)) {
        // The next ldmatrix may overwrite rows before every lane has taken its own: hand out all of them now.
        for (unsigned lane = 0; lane < warp_size; lane++) {
            const unsigned g = lane / 4, t = lane % 4;
            uint16_t out[4][2] = {};
            for (int i = 0; i < matrices; i++) {
                out[i][0] = transposed ? warp.row[8 * i + 2 * t][g] : warp.row[8 * i + g][2 * t];
                out[i][1] = transposed ? warp.row[8 * i + 2 * t + 1][g] : warp.row[8 * i + g][2 * t + 1];
            }
            memcpy(&warp.value[lane], out[0], 8);
            memcpy(&warp.result[lane], out[2], 8);
        }
        finish(me, warp, mask);
    }
    memcpy(fragments, &warp.value[me.lane], 8);
    if (matrices == 4) memcpy(fragments + 2, &warp.result[me.lane], 8);
}

static inline UNSEEN void require_full_warp(const Fiber& me, const char* what, Site site) {
    if (__builtin_expect(me.warp->exists != 0xffffffffu, 0)) fail(site, "%s in a warp of fewer than 32 threads", what);
}

// Sums in double precision, rounded once: the products are exact there, and so are sums of usual sizes.
typedef double Row __attribute__((vector_size(64)));

// Halves to floats without branches, so that the compiler makes vector instructions of the loop.
static inline __attribute__((always_inline)) void widen(const uint16_t* halves, float* floats, int count) {
    for (int i = 0; i < count; i++) {
        const uint32_t magnitude = (uint32_t)(halves[i] & 0x7fffu) << 13, sign = (uint32_t)(halves[i] & 0x8000u) << 16;
        const uint32_t finite = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
        const uint32_t special = 0u - (uint32_t)(magnitude >= 0x0f800000u);  // infinity or NaN: all bits
        floats[i] = __uint_as_float(sign | (finite & ~special) | ((magnitude | 0x7f800000u) & special));
    }
}

// Products and sums may be fused, as the products are exact either way.
static __attribute__((optimize("O3", "fp-contract=fast"))) UNSEEN void multiply_f16_tile(Warp& warp) {
    float a_floats[16][16], b_floats[8][16];
    widen(warp.a_f16[0], a_floats[0], 16 * 16);
    widen(warp.b_f16[0], b_floats[0], 8 * 16);
    double a[16][16];
    Row b[16];
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++) a[m][k] = (double)a_floats[m][k];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) b[k][n] = (double)b_floats[n][k];
    // Four rows at a time, so that additions do not wait for one another.
    for (int m = 0; m < 16; m += 4) {
        Row sums[4] = {};
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 4; i++) sums[i] += a[m + i][k] * b[k];
        for (int i = 0; i < 4; i++)
            for (int n = 0; n < 8; n++) warp.sum_f32[m + i][n] = (float)(sums[i][n] + (double)warp.sum_f32[m + i][n]);
    }
}

UNSEEN void multiply_f16(float* sums, const uint32_t* a, const uint32_t* b, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    require_full_warp(me, "mma_f16", site);
    const unsigned g = me.lane / 4, t = me.lane % 4;
    for (unsigned i = 0; i < 4; i++) memcpy(&warp.a_f16[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)], &a[i], 4);
    for (unsigned i = 0; i < 2; i++) memcpy(&warp.b_f16[g][2 * t + 8 * i], &b[i], 4);
    for (unsigned i = 0; i < 2; i++) memcpy(&warp.sum_f32[g + 8 * i][2 * t], &sums[2 * i], 8);
    uint32_t mask = 0xffffffffu;
    if (meet(me, warp, mask, MultiplyF16, site)) {
        multiply_f16_tile(warp);
        finish(me, warp, mask);
    }
    for (unsigned i = 0; i < 2; i++) memcpy(&sums[2 * i], &warp.sum_f32[g + 8 * i][2 * t], 8);
}

static __attribute__((optimize("O3"))) UNSEEN void multiply_s8_tile(Warp& warp) {
    int16_t b[8][32];
    for (int n = 0; n < 8; n++)
        for (int k = 0; k < 32; k++) b[n][k] = warp.b_s8[n][k];
    for (int m = 0; m < 16; m++) {
        int16_t a[32];
        for (int k = 0; k < 32; k++) a[k] = warp.a_s8[m][k];
        for (int n = 0; n < 8; n++) {
            int32_t sum = 0;  // at most 32 * 128 * 128
            for (int k = 0; k < 32; k++) sum += (int32_t)a[k] * (int32_t)b[n][k];
            warp.sum_s32[m][n] = (int32_t)((uint32_t)warp.sum_s32[m][n] + (uint32_t)sum);
        }
    }
}

UNSEEN void multiply_s8(int* sums, const uint32_t* a, const uint32_t* b, Site site) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    require_full_warp(me, "mma_s8", site);
    const unsigned g = me.lane / 4, t = me.lane % 4;
    for (unsigned i = 0; i < 4; i++) memcpy(&warp.a_s8[g + 8 * (i & 1)][4 * t + 16 * (i >> 1)], &a[i], 4);
    for (unsigned i = 0; i < 2; i++) memcpy(&warp.b_s8[g][4 * t + 16 * i], &b[i], 4);
    for (unsigned i = 0; i < 2; i++) memcpy(&warp.sum_s32[g + 8 * i][2 * t], &sums[2 * i], 8);
    uint32_t mask = 0xffffffffu;
    if (meet(me, warp, mask, MultiplyS8, site)) {
        multiply_s8_tile(warp);
        finish(me, warp, mask);
    }
    for (unsigned i = 0; i < 2; i++) memcpy(&sums[2 * i], &warp.sum_s32[g + 8 * i][2 * t], 8);
}

// ---- Bad addresses.

static void explain_fault(const Fiber& fiber, uintptr_t address) {
    const Block& block = *fiber.block;
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(block.indices.dynamic_shared);
    print_place(fiber, {fiber.file, fiber.line});
    if (in_stacks(address)) {
        fprintf(stderr, "stack overflow: a thread of the emulator has %zu bytes\n", stack_bytes);
    } else if (address - dynamic < block.dynamic_bytes + page_bytes) {
        fprintf(stderr, "access to byte %zu of dynamic shared memory, of which the launch has %zu\n",
                (size_t)(address - dynamic), block.dynamic_bytes);
    } else {
        fprintf(stderr, "access to %p, which is not memory\n", reinterpret_cast<void*>(address));
    }
    fprintf(stderr, "  (the line is that of the thread's last barrier or warp operation)\n");
}

// Says which thread it was, and leaves the rest to who handled the signal before.
static void on_fault(int, siginfo_t* info, void* context) {
    const ucontext_t& interrupted = *static_cast<ucontext_t*>(context);
#if defined(__x86_64__)
    const uintptr_t stack = (uintptr_t)interrupted.uc_mcontext.gregs[REG_RSP];
#elif defined(__aarch64__)
    const uintptr_t stack = (uintptr_t)interrupted.uc_mcontext.sp;
#endif
    if (in_stacks(stack)) explain_fault(fibers[(stack - fiber_stacks) / stack_bytes], (uintptr_t)info->si_addr);
    fflush(stderr);
    sigaction(SIGSEGV, &former_action, nullptr);
}

// A stack for the signal handler while this lives: a thread's own may just have overflowed.
class SignalStack {
  public:
    SignalStack() : memory(new char[bytes]) {
        stack_t stack = {};
        stack.ss_sp = memory.get();
        stack.ss_size = bytes;
        sigaltstack(&stack, &former);
    }
    ~SignalStack() { sigaltstack(&former, nullptr); }
    SignalStack(const SignalStack&) = delete;
    SignalStack& operator=(const SignalStack&) = delete;

  private:
    static constexpr size_t bytes = 64 << 10;
    std::unique_ptr<char[]> memory;
    stack_t former = {};
};

// ---- Launching.

static void* reserve(size_t bytes, int protection) {
    void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail({nullptr, 0}, "cannot map %zu bytes for the emulator", bytes);
    return memory;
}

static bool parse_order(const char* text, Order& result) {
    if (!text || !*text || strcmp(text, "0") == 0) {
        result = {Order::Ascending, 0};
        return true;
    }
    if (strcmp(text, "reverse") == 0) {
        result = {Order::Reverse, 0};
        return true;
    }
    char* end;
    result = {Order::Random, strtoull(text, &end, 10)};
    return *end == 0 && result.seed != 0;
}

bool set_order(const char* text) {
    std::lock_guard<std::mutex> guard(launch_lock);
    Order parsed;
    if (!parse_order(text, parsed)) return false;
    order = parsed;
    return true;
}

static unsigned wanted_workers() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return 1;  // static shared memory exists once, or the report should name CUDA threads only
#else
    const char* text = getenv("CUDA_HOST_THREADS");
    unsigned long count = text ? strtoul(text, nullptr, 10) : 1;
    return (unsigned)std::min<unsigned long>(std::max<unsigned long>(count, 1), worker_limit);
#endif
}

static void start_emulator() {
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    if (!parse_order(getenv("CUDA_HOST_ORDER"), order))
        fail({nullptr, 0}, "CUDA_HOST_ORDER is %s: give 0, reverse or a number", getenv("CUDA_HOST_ORDER"));
    fibers = static_cast<Fiber*>(reserve(sizeof(Fiber) * block_limit * worker_limit, PROT_READ | PROT_WRITE));
    // One stack more than needed, so that the first can begin at a multiple of the size.
    uintptr_t stacks = reinterpret_cast<uintptr_t>(reserve(stack_bytes * (block_limit * worker_limit + 1), PROT_NONE));
    fiber_stacks = (stacks + stack_bytes - 1) / stack_bytes * stack_bytes;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &former_action);
}

static Worker& prepare_worker(unsigned index, unsigned threads) {
    if (!workers[index]) {
        Worker& worker = *(workers[index] = new Worker());
        const size_t bytes = (dynamic_limit + canary_bytes + page_bytes - 1) / page_bytes * page_bytes;
        worker.arena = static_cast<unsigned char*>(reserve(bytes + page_bytes, PROT_READ | PROT_WRITE));
        worker.guard = worker.arena + bytes;
        mprotect(worker.guard, page_bytes, PROT_NONE);
        worker.fibers = fibers + index * block_limit;
        for (unsigned i = 0; i < warp_limit; i++) {
            worker.block.warp[i].index = i;
            worker.block.warp[i].lanes = worker.fibers + i * warp_size;
        }
    }
    Worker& worker = *workers[index];
    for (; worker.prepared < threads; worker.prepared++) {
        const unsigned i = worker.prepared;
        Fiber& fiber = worker.fibers[i];
        char* stack = reinterpret_cast<char*>(fiber_stacks) + stack_bytes * (size_t)(&fiber - fibers);
        mprotect(stack + page_bytes, stack_bytes - page_bytes, PROT_READ | PROT_WRITE);  // the lowest page is a guard
        // The tops lie apart in the cache: at the same place of every stack they would share a few of its lines.
        fiber.stack_pointer = prepare_stack(stack + stack_bytes - i % 16 * 256, fiber_main);
        fiber.block = &worker.block;
        fiber.warp = &worker.block.warp[i / warp_size];
        fiber.lane = i % warp_size;
        fiber.copies = &worker.copies[i];
#if defined(__SANITIZE_THREAD__)
        fiber.sanitizer_fiber = __tsan_create_fiber(0);
#endif
    }
    return worker;
}

// The thread-local variables of this library in the calling thread: the static shared memory of all its kernels.
// With the address sanitizer it is ordinary memory, and keeps what it held.
static __attribute__((unused)) int find_static_shared(struct dl_phdr_info* object, size_t, void* result) {
    Block& block = *static_cast<Block*>(result);
    const ElfW(Phdr)* local = nullptr;
    bool ours = false, dynamic = false;
    const uintptr_t here = reinterpret_cast<uintptr_t>(&fiber_stacks);
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr)& header = object->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && here - object->dlpi_addr - header.p_vaddr < header.p_memsz) ours = true;
        if (header.p_type == PT_TLS) local = &header;
        if (header.p_type == PT_DYNAMIC) dynamic = true;
    }
    if (!ours) return 0;
    // In a statically linked program the C library's variables are among them: there nothing is poisoned.
    if (local && dynamic && object->dlpi_tls_data) {
        const char* data = static_cast<const char*>(object->dlpi_tls_data);
        block.static_shared = data + local->p_filesz;
        block.static_shared_end = data + local->p_memsz;
    }
    return 1;
}

static void locate_static_shared(Block& block) {
    block.static_shared = block.static_shared_end = nullptr;
#if !defined(__SANITIZE_ADDRESS__)
    shared_anchor = 0;
    dl_iterate_phdr(find_static_shared, &block);
#endif
}

static UNSEEN void fill(unsigned char* from, unsigned char* to) { memset(from, poison, (size_t)(to - from)); }

static UNSEEN void begin_block(Worker& worker) {
    Block& block = worker.block;
    fill(block.indices.dynamic_shared - canary_bytes, worker.guard);
    if (worker.poisonings) {
        worker.poisonings--;
        fill((unsigned char*)block.static_shared, (unsigned char*)block.static_shared_end);
    }
    block.at_barrier = block.left = block.ready_warps = block.naps = 0;
    const dim3 size = block.indices.block_size;
    for (unsigned i = 0; i < block.threads; i++) {
        Fiber& fiber = worker.fibers[i];
        fiber.state = Runnable;
        fiber.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
        fiber.file = nullptr;
        fiber.line = 0;
        Copies& copies = *fiber.copies;
        if (!copies.list.empty() || !copies.groups.empty()) {
            copies.list.clear();
            copies.groups.clear();
            copies.first_copy = copies.first_group = 0;
        }
    }
    for (unsigned i = 0; i < block.warps; i++) {
        Warp& warp = block.warp[i];
        const unsigned lanes = std::min(warp_size, block.threads - i * warp_size);
        warp.exists = lanes == warp_size ? 0xffffffffu : (1u << lanes) - 1;
        warp.ready = warp.arrived = warp.left = 0;
        make_ready(block, warp, warp.exists);
    }
}

// What lies around the dynamic shared memory must be as it was; behind it is a guard page, which ends the process.
static UNSEEN void check_canaries(Worker& worker) {
    const Block& block = worker.block;
    const unsigned char* memory = block.indices.dynamic_shared;
    const unsigned char* end = memory + block.dynamic_bytes;
    for (const unsigned char* byte = memory - canary_bytes; byte < worker.guard; byte++) {
        if (byte == memory) byte = end;
        if (byte == worker.guard || *byte == poison) continue;
        const dim3& b = block.indices.block_index;
        fprintf(stderr,
                "cuda: kernel %s, block (%u,%u,%u): a thread wrote to byte %td of dynamic shared memory, of which the "
                "launch has %zu\n",
                block.kernel->name, b.x, b.y, b.z, byte - memory, block.dynamic_bytes);
        abort();
    }
}

static UNSEEN void run_block(Worker& worker) {
    Block& block = worker.block;
    begin_block(worker);
    order_before(&block.begin_tag);
    void* fake_stack = nullptr;
    Fiber* first = take_ready(block, &block.warp[0]);
    before_switch(block, &fake_stack, first);
    cuda_host_switch(&block.main_stack_pointer, first->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    order_after(&block.end_tag);
    check_canaries(worker);
}

static void run_blocks(Worker& worker, Grid& grid) {
    SignalStack signal_stack;
    Block& block = worker.block;
    locate_static_shared(block);
    // It is that of all kernels together. Where that is much, the first blocks of a launch must do.
    const ptrdiff_t bytes = block.static_shared_end - block.static_shared;
    worker.poisonings = bytes == 0 ? 0 : bytes <= 16 << 10 ? UINT32_MAX : 16;
#if defined(__SANITIZE_THREAD__)
    block.sanitizer_main = __tsan_get_current_fiber();
#endif
    const dim3 size = block.indices.grid_size;
    for (uint64_t turn; (turn = grid.next.fetch_add(1, std::memory_order_relaxed)) < grid.blocks;) {
        const uint64_t i = (grid.first + turn % grid.blocks * grid.step) % grid.blocks;
        block.indices.block_index =
            dim3((unsigned)(i % size.x), (unsigned)(i / size.x % size.y), (unsigned)(i / size.x / size.y));
        block.random = (order.seed * 0x9e3779b97f4a7c15u + i + 1) * 0xbf58476d1ce4e5b9u | 1u;
        run_block(worker);
    }
    grid.running--;
}

// The blocks in the present order: all of them, once each.
static void arrange(Grid& grid, dim3 size) {
    grid.blocks = (uint64_t)size.x * size.y * size.z;
    grid.first = 0;
    grid.step = 1;
    if (order.kind == Order::Reverse) {
        grid.first = grid.step = grid.blocks - 1;
    } else if (order.kind == Order::Random) {
        grid.first = order.seed % grid.blocks;
        // A step that has no factor in common with the number of blocks visits every one.
        auto divisor = [](uint64_t a, uint64_t b) {
            while (b) std::swap(a %= b, b);
            return a;
        };
        grid.step = order.seed * 2654435761u % grid.blocks | 1u;
        while (divisor(grid.step, grid.blocks) != 1) grid.step += 2;
    }
}

void launch(const Kernel& kernel, dim3 grid_size, dim3 block_size, size_t shared_bytes, void** arguments,
            bool cooperative) {
    std::lock_guard<std::mutex> guard(launch_lock);
    if (!fibers) start_emulator();
    const uint64_t threads = (uint64_t)block_size.x * block_size.y * block_size.z;
    const Site nowhere = {nullptr, 0};
    if (threads < 1 || threads > block_limit)
        fail(nowhere, "kernel %s: a block of %llu threads", kernel.name, (unsigned long long)threads);
    if (shared_bytes > dynamic_limit) fail(nowhere, "kernel %s: %zu bytes of shared memory", kernel.name, shared_bytes);
    Grid grid;
    arrange(grid, grid_size);
    if (grid.blocks < 1) fail(nowhere, "kernel %s: an empty grid", kernel.name);
    if (cooperative && grid.blocks > cooperative_limit)
        fail(nowhere, "kernel %s: a cooperative launch of %llu blocks", kernel.name, (unsigned long long)grid.blocks);
    const unsigned count = (unsigned)(cooperative ? grid.blocks : std::min<uint64_t>(wanted_workers(), grid.blocks));
    grid.running = count;
    for (unsigned i = 0; i < count; i++) {
        Worker& worker = prepare_worker(i, (unsigned)threads);
        Block& block = worker.block;
        block.kernel = &kernel;
        block.arguments = arguments;
        block.threads = (unsigned)threads;
        block.warps = ((unsigned)threads + warp_size - 1) / warp_size;
        block.grid = &grid;
        block.order = order.kind;
        block.dynamic_bytes = shared_bytes;
        block.indices = {dim3(), block_size, grid_size, worker.guard - (shared_bytes + 15) / 16 * 16};
    }
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; i++) others.emplace_back([i, &grid] { run_blocks(*workers[i], grid); });
    run_blocks(*workers[0], grid);
    for (std::thread& other : others) other.join();
}

// ---- Kernels by name.

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

void add_kernel(const Kernel& kernel) {
    if (!kernels().emplace(kernel.name, kernel).second) fail({nullptr, 0}, "two kernels are named %s", kernel.name);
}

const Kernel* find_kernel(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace cuda_host
