// A stand-in for NVIDIA's driver library (libcuda.so.1) that runs this project's kernels on the CPU, so that the code
// that talks to a GPU is tested without one. Built by scripts/cuda-standin.sh together with the emulator and the
// kernels, which it finds by name among those that EXPORT lists; what is inside a loaded module does not matter.
//
// It is strict where a real driver forgives: device memory holds 0xff when allocated and lies between pages that may
// not be touched; copies, fills and frees outside of an allocation fail; freed memory is not used again soon; calls
// without a current context fail.
//
// CUDA_STANDIN, states for tests, separated by commas:
//     no-device            no GPU in this computer
//     old-driver           the driver is of CUDA 11.0
//     missing-symbol=NAME  the library lacks the function NAME (read when the library is loaded)
//     capability=7.2       compute capability (default 8.7)
//     memory=BYTES         size of the device memory (default 8 GiB)
//     largest=BYTES        no allocation larger than this succeeds (default: any that there is room for)
//     integrated=1         a board whose GPU shares memory with the CPU and can map it
//     register=none        host memory cannot be registered, and the device says so
//     register=refused     the device says that it can, and every registration fails, as for a file's pages on some kernels
//     pinned=none          there is no page-locked memory
//     fail-launch=N        launch number N (from 1, each of a graph counts) fails, and with it everything after
//     lost-launch=N        the device is gone in launch number N
//     lost-at=N            from call number N (from 1) on the device is gone
//     fail-memory=N        there is no memory for allocation number N (from 1) of the device; others go well
// CUDA_STANDIN_LAZY=1: streams do nothing until somebody waits for them, which shows where a wait is missing.
// Otherwise each call does its work at once, in order.
//
// standin_memory(&counts) tells tests what was allocated and what still is. standin_begin(state) forgets an error, puts the driver
// into another state, and counts anew; nothing may be under way. standin_progress(&progress) tells how far the counts are.
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "cuda_host.h"

// ---- Numbers of the driver's interface (cuda.h).

enum Result : int {
    Success = 0,
    InvalidValue = 1,
    OutOfMemory = 2,
    NotInitialized = 3,
    DeviceUnavailable = 46,
    NoDevice = 100,
    InvalidDevice = 101,
    InvalidImage = 200,
    InvalidContext = 201,
    NoBinaryForGpu = 209,
    InvalidHandle = 400,
    NotFound = 500,
    NotReady = 600,
    LaunchOutOfResources = 701,
    HostMemoryAlreadyRegistered = 712,
    HostMemoryNotRegistered = 713,
    LaunchFailed = 719,
    CooperativeLaunchTooLarge = 720,
    NotSupported = 801,
    CaptureUnsupported = 900,
    CaptureInvalidated = 901,
    CaptureUnmatched = 903,
    CaptureUnjoined = 904,
    CaptureIsolation = 905,
    CaptureImplicit = 906,
    CapturedEvent = 907,
    GraphExecUpdateFailure = 910,
};

struct ErrorText {
    Result code;
    const char *name, *text;
};
static const ErrorText error_texts[] = {
    {Success, "CUDA_SUCCESS", "no error"},
    {InvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DeviceUnavailable, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {NoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {InvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {InvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {InvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {InvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {LaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {HostMemoryAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {HostMemoryNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {LaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CooperativeLaunchTooLarge, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"},
    {NotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CaptureUnmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {CaptureUnjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CaptureIsolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CapturedEvent, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {GraphExecUpdateFailure, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE",
     "the graph update was not performed because it included changes which violated constraints"},
};

using Pointer = uint64_t;  // CUdeviceptr

// ---- The state of the driver.

struct Settings {
    bool no_device = false, old_driver = false, integrated = false, lazy = false;
    int major = 8, minor = 7;
    uint64_t memory = 8ull << 30, largest = UINT64_MAX, fail_launch = 0, lost_launch = 0, lost_at = 0,
             fail_memory = 0;
    bool may_register = true, registers = true, pinned = true;
    std::string missing_symbol;
};

struct Allocation {
    enum Kind { Device, Host, Registered } kind;
    size_t bytes;
    char* mapping;  // the pages, with a guard at each end
    size_t mapping_bytes;
    size_t slack;  // bytes after the allocation that should keep 0xff
};

struct Function {
    const cuda_host::Kernel* kernel;
    int dynamic_shared = 48 << 10;
    std::string name;
};

struct Module {
    std::map<std::string, Function> functions;
};

struct Stream;

struct Event {
    bool recorded = false, timing = true;
    Stream* stream = nullptr;      // where it was last recorded; it may be no more
    uint64_t position = 0;         // how many works of the stream come before it, itself included
    uint64_t captured = 0;         // the capture in which it was last recorded, 0: in none
    std::shared_ptr<double> time;  // seconds, set when the stream comes to it
};

// A piece of work of a stream, or a node of a graph.
struct Work {
    enum Kind { Kernel, Copy, Fill, Record, Wait, Host, Free, Graph } kind;
    explicit Work(Kind kind) : kind(kind) {}
    // Kernel
    const Function* function = nullptr;
    dim3 grid, block;
    unsigned shared_bytes = 0;
    bool cooperative = false;
    std::vector<unsigned char> arguments;
    // Copy, Fill, Free
    void *to = nullptr, *from = nullptr;
    size_t bytes = 0;
    bool to_device = false, from_device = false;
    std::shared_ptr<std::vector<char>> staged;  // what `from` held when the call was made, for ordinary memory
    unsigned value = 0, width = 1;
    // Record, Wait
    std::shared_ptr<double> time;
    Stream* stream = nullptr;
    uint64_t position = 0;
    // Host
    void (*callback)(void*) = nullptr;
    void* data = nullptr;
    // Graph
    std::shared_ptr<const std::vector<Work>> graph;
};

struct Graph {
    std::vector<Work> works;
    uint64_t capture = 0;  // the number of the capture that makes it
    bool invalid = false;
    int mode = 0;
    pthread_t thread{};
    std::vector<struct Node*> handles;  // made when asked for
};

struct Node {
    Graph* graph;
    size_t index;
    std::vector<void*> pointers;
};

struct GraphExec {
    std::shared_ptr<const std::vector<Work>> works;
};

struct Stream {
    bool blocking = true;  // waits for the null stream, and the null stream for it
    std::deque<Work> queue;
    uint64_t queued = 0, done = 0;
    Graph* capture = nullptr;
    Stream* capture_origin = nullptr;
};

struct Context {
    int users = 0;
    unsigned flags = 0;
};

struct Driver {
    std::recursive_mutex lock;
    Settings settings;
    bool initialized = false;
    Result sticky = Success;
    uint64_t calls = 0, launches = 0, device_allocations = 0, captures = 0;
    uint64_t used = 0, most_used = 0, made = 0;  // bytes of the device, and allocations and registrations so far
    std::map<Pointer, Allocation> allocations;
    std::deque<std::pair<char*, size_t>> graveyard;
    Context context;
    Stream null_stream;
    std::set<Stream*> streams;
    pthread_key_t current;  // the calling thread's context; a thread-local variable would be poisoned as shared memory

    Driver();
};

// Never destroyed: threads may still call while the process ends.
static Driver& driver() {
    static Driver* one = new Driver();
    return *one;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) static void stop(const char* format, ...) {
    va_list list;
    va_start(list, format);
    fputs("cuda: ", stderr);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    fflush(stderr);
    abort();
}

static Settings read_settings(const char* text) {
    Settings settings;
    const char* lazy = getenv("CUDA_STANDIN_LAZY");
    settings.lazy = lazy && strcmp(lazy, "1") == 0;
    std::string all = text ? text : "";
    for (size_t begin = 0; begin < all.size();) {
        size_t end = std::min(all.find(',', begin), all.size());
        std::string word = all.substr(begin, end - begin);
        begin = end + 1;
        size_t sign = word.find('=');
        std::string key = word.substr(0, sign), value = sign == std::string::npos ? "" : word.substr(sign + 1);
        auto number = [&] { return strtoull(value.c_str(), nullptr, 10); };
        if (key == "no-device")
            settings.no_device = true;
        else if (key == "old-driver")
            settings.old_driver = true;
        else if (key == "missing-symbol")
            settings.missing_symbol = value;
        else if (key == "capability" && sscanf(value.c_str(), "%d.%d", &settings.major, &settings.minor) == 2)
            continue;
        else if (key == "memory")
            settings.memory = number();
        else if (key == "largest")
            settings.largest = number();
        else if (word == "register=none")
            settings.may_register = settings.registers = false;
        else if (word == "register=refused")
            settings.registers = false;
        else if (word == "pinned=none")
            settings.pinned = false;
        else if (key == "integrated")
            settings.integrated = value == "1";
        else if (key == "fail-launch")
            settings.fail_launch = number();
        else if (key == "lost-launch")
            settings.lost_launch = number();
        else if (key == "lost-at")
            settings.lost_at = number();
        else if (key == "fail-memory")
            settings.fail_memory = number();
        else if (!key.empty())
            stop("CUDA_STANDIN has %s, which is no state", word.c_str());
    }
    return settings;
}

Driver::Driver() : settings(read_settings(getenv("CUDA_STANDIN"))) { pthread_key_create(&current, nullptr); }

// Takes a function out of this library's table of symbols.
static int hide_symbol(struct dl_phdr_info* object, size_t, void* name) {
    const auto here = reinterpret_cast<uintptr_t>(error_texts);
    const ElfW(Phdr)* dynamic = nullptr;
    bool ours = false;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr)& header = object->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && here - object->dlpi_addr - header.p_vaddr < header.p_memsz) ours = true;
        if (header.p_type == PT_DYNAMIC) dynamic = &header;
    }
    if (!ours || !dynamic) return 0;
    char *symbols = nullptr, *strings = nullptr;
    for (auto* entry = reinterpret_cast<ElfW(Dyn)*>(object->dlpi_addr + dynamic->p_vaddr); entry->d_tag != DT_NULL;
         entry++) {
        if (entry->d_tag == DT_SYMTAB) symbols = reinterpret_cast<char*>(entry->d_un.d_ptr);
        if (entry->d_tag == DT_STRTAB) strings = reinterpret_cast<char*>(entry->d_un.d_ptr);
    }
    if (!symbols || !strings) return 1;
    // The strings follow the symbols.
    for (auto* symbol = reinterpret_cast<ElfW(Sym)*>(symbols); reinterpret_cast<char*>(symbol + 1) <= strings;
         symbol++) {
        if (strcmp(strings + symbol->st_name, static_cast<const char*>(name)) != 0) continue;
        const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE),
                        begin = reinterpret_cast<uintptr_t>(symbol) / page * page;
        const uintptr_t end = reinterpret_cast<uintptr_t>(symbol + 1);
        if (mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE) != 0)
            stop("cannot hide %s", static_cast<const char*>(name));
        symbol->st_value = 0;
        return 1;
    }
    stop("missing-symbol=%s: this library has no such function", static_cast<const char*>(name));
}

__attribute__((constructor)) static void on_load() {
    std::string name = read_settings(getenv("CUDA_STANDIN")).missing_symbol;
    if (!name.empty()) dl_iterate_phdr(hide_symbol, &name[0]);
}

// ---- What every call begins with.

enum Need { Nothing, Initialized, Current };

// The lock for the time of a call, and whether the call may go on.
struct Call {
    std::lock_guard<std::recursive_mutex> guard;
    Result result = Success;

    explicit Call(Need need) : guard(driver().lock) {
        Driver& d = driver();
        d.calls++;
        if (d.settings.lost_at && d.calls >= d.settings.lost_at) d.sticky = DeviceUnavailable;
        if (d.sticky != Success)
            result = d.sticky;
        else if (need != Nothing && !d.initialized)
            result = NotInitialized;
        else if (need == Current && !pthread_getspecific(d.current))
            result = InvalidContext;
    }
};

#define API(name, ...) extern "C" __attribute__((visibility("default"))) Result name(__VA_ARGS__)
#define BEGIN(need)  \
    Call call(need); \
    if (call.result != Success) return call.result
#define REQUIRE(condition, error) \
    if (!(condition)) return error
#define TRY(expression)                     \
    do {                                    \
        Result tried = (expression);        \
        if (tried != Success) return tried; \
    } while (0)

// ---- Memory.

static size_t page_bytes() {
    static const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    return bytes;
}

static Allocation* find_allocation(Pointer address, size_t bytes) {
    auto& all = driver().allocations;
    auto after = all.upper_bound(address);
    if (after == all.begin()) return nullptr;
    auto& [begin, allocation] = *std::prev(after);
    const uint64_t offset = address - begin;
    return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

// Whether the device may access these bytes.
static bool on_device(Pointer address, size_t bytes) {
    if (bytes == 0) return true;
    const Allocation* allocation = find_allocation(address, bytes);
    return allocation && (allocation->kind == Allocation::Device || driver().settings.integrated);
}

static Result allocate(Pointer* result, size_t bytes, Allocation::Kind kind) {
    Driver& d = driver();
    REQUIRE(result && bytes > 0, InvalidValue);
    if (kind == Allocation::Device) {
        REQUIRE(bytes <= d.settings.largest, OutOfMemory);
        REQUIRE(++d.device_allocations != d.settings.fail_memory, OutOfMemory);
    }
    if (kind == Allocation::Host) REQUIRE(d.settings.pinned, OutOfMemory);
    if (kind == Allocation::Device || d.settings.integrated) {
        REQUIRE(bytes <= d.settings.memory && d.used <= d.settings.memory - bytes, OutOfMemory);
    }
    const size_t page = page_bytes(), rounded = (bytes + 255) / 256 * 256, pages = (rounded + page - 1) / page * page;
    char* mapping = static_cast<char*>(
        mmap(nullptr, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) return OutOfMemory;
    if (mprotect(mapping + page, pages, PROT_READ | PROT_WRITE) != 0) {
        munmap(mapping, pages + 2 * page);
        return OutOfMemory;
    }
    // As near to the guard behind it as the alignment allows.
    char* begin = mapping + page + pages - rounded;
    memset(begin, 0xff, rounded);
    *result = reinterpret_cast<Pointer>(begin);
    d.allocations[*result] = {kind, bytes, mapping, pages + 2 * page, rounded - bytes};
    d.made++;
    if (kind == Allocation::Device) d.used += bytes;
    d.most_used = std::max(d.most_used, d.used);
    return Success;
}

// The few bytes between an allocation's end and its guard page.
static void check_slack(Pointer begin, const Allocation& allocation, const char* who) {
    const auto* end = reinterpret_cast<const unsigned char*>(begin) + allocation.bytes;
    for (size_t i = 0; i < allocation.slack; i++)
        if (end[i] != 0xff)
            stop("%s wrote to byte %zu of an allocation of %zu bytes", who, allocation.bytes + i, allocation.bytes);
}

static Result release(Pointer address, Allocation::Kind kind) {
    Driver& d = driver();
    auto found = d.allocations.find(address);
    REQUIRE(found != d.allocations.end() && found->second.kind == kind, InvalidValue);
    Allocation allocation = found->second;
    check_slack(address, allocation, "some kernel");
    d.allocations.erase(found);
    if (kind == Allocation::Device) d.used -= allocation.bytes;
    // Kept without access for a while, so that a late use is caught and not served by another allocation.
    mmap(allocation.mapping, allocation.mapping_bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    d.graveyard.emplace_back(allocation.mapping, allocation.mapping_bytes);
    if (d.graveyard.size() > 256) {
        munmap(d.graveyard.front().first, d.graveyard.front().second);
        d.graveyard.pop_front();
    }
    return Success;
}

// ---- Work.

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static Result run_until(Stream& stream, uint64_t position);

// Pointers to the arguments, which lie one after another at multiples of 16 bytes.
static std::vector<void*> argument_pointers(const Work& work) {
    std::vector<void*> pointers;
    size_t offset = 0;
    const cuda_host::Kernel& kernel = *work.function->kernel;
    for (size_t i = 0; i < kernel.argument_count; i++) {
        pointers.push_back(const_cast<unsigned char*>(work.arguments.data()) + offset);
        offset += (kernel.argument_sizes[i] + 15) / 16 * 16;
    }
    pointers.push_back(nullptr);
    return pointers;
}

static void store_arguments(Work& work, void** parameters) {
    const cuda_host::Kernel& kernel = *work.function->kernel;
    size_t total = 0;
    for (size_t i = 0; i < kernel.argument_count; i++) total += (kernel.argument_sizes[i] + 15) / 16 * 16;
    work.arguments.assign(total, 0);
    std::vector<void*> pointers = argument_pointers(work);
    for (size_t i = 0; i < kernel.argument_count; i++) memcpy(pointers[i], parameters[i], kernel.argument_sizes[i]);
}

// Ends the process where an argument is an address of this process that the device may not access. A GPU would fail, or read
// something else; here the kernel would read the host's memory and come to the right result. Structs are not looked into: what
// lies between their fields is anything.
static void check_addresses(const Work& work) {
    const size_t page = page_bytes();
    const std::vector<void*> pointers = argument_pointers(work);
    for (size_t i = 0; i < work.function->kernel->argument_count; i++) {
        if (work.function->kernel->argument_sizes[i] != sizeof(Pointer)) continue;
        Pointer word;
        memcpy(&word, pointers[i], sizeof(word));
        // Small numbers, and what no process has, are no addresses.
        if (word < 1ull << 32 || word >> 48 || on_device(word, 1) || find_allocation(word, 0)) continue;
        unsigned char resident;
        if (mincore(reinterpret_cast<void*>(word / page * page), 1, &resident) == 0)
            stop("kernel %s is given the address %#llx, which the device may not access", work.function->name.c_str(),
                 (unsigned long long)word);
    }
}

static Result run_kernel(const Work& work) {
    const uint64_t launch = ++driver().launches;
    REQUIRE(launch != driver().settings.fail_launch, LaunchFailed);
    REQUIRE(launch != driver().settings.lost_launch, DeviceUnavailable);
    check_addresses(work);
    std::vector<void*> pointers = argument_pointers(work);
    cuda_host::launch(*work.function->kernel, work.grid, work.block, work.shared_bytes, pointers.data(),
                      work.cooperative);
    // Names the kernel where that does not cost more than to run it; else the end of the allocation has to do.
    const auto& all = driver().allocations;
    if (all.size() <= 64)
        for (const auto& [begin, allocation] : all) check_slack(begin, allocation, work.function->name.c_str());
    return Success;
}

static Result run_copy(const Work& work) {
    // Checked when the call was made, but memory may have been freed since.
    REQUIRE(!work.to_device || on_device(reinterpret_cast<Pointer>(work.to), work.bytes), InvalidValue);
    REQUIRE(!work.from_device || on_device(reinterpret_cast<Pointer>(work.from), work.bytes), InvalidValue);
    if (work.bytes) memmove(work.to, work.staged ? work.staged->data() : work.from, work.bytes);
    return Success;
}

static Result run_fill(const Work& work) {
    REQUIRE(on_device(reinterpret_cast<Pointer>(work.to), work.bytes), InvalidValue);
    auto* bytes = static_cast<unsigned char*>(work.to);
    if (work.width == 1) {
        memset(bytes, (int)work.value, work.bytes);
        return Success;
    }
    for (size_t i = 0; i < work.bytes; i += work.width) memcpy(bytes + i, &work.value, work.width);
    return Success;
}

static Result run(const Work& work) {
    switch (work.kind) {
        case Work::Kernel: return run_kernel(work);
        case Work::Copy: return run_copy(work);
        case Work::Fill: return run_fill(work);
        case Work::Record: *work.time = now(); return Success;
        case Work::Wait:
            return driver().streams.count(work.stream) || work.stream == &driver().null_stream
                       ? run_until(*work.stream, work.position)
                       : Success;
        case Work::Host: work.callback(work.data); return Success;
        case Work::Free: return release(reinterpret_cast<Pointer>(work.to), Allocation::Device);
        case Work::Graph:
            for (const Work& node : *work.graph) TRY(run(node));
            return Success;
    }
    return InvalidValue;
}

// Runs a stream's works up to a position. An error of one stays, as on a device.
static Result run_until(Stream& stream, uint64_t position) {
    Driver& d = driver();
    while (stream.done < position && !stream.queue.empty()) {
        Work work = std::move(stream.queue.front());
        stream.queue.pop_front();
        stream.done++;
        if (d.sticky == Success) d.sticky = run(work);
        if (d.sticky != Success) return d.sticky;
    }
    return Success;
}

static Result run_all(Stream& stream) { return run_until(stream, stream.queued); }

static Result run_everything() {
    Driver& d = driver();
    TRY(run_all(d.null_stream));
    for (Stream* stream : std::set<Stream*>(d.streams)) TRY(run_all(*stream));
    return Success;
}

static Stream* stream_of(void* handle) {
    Driver& d = driver();
    // Null, and the two handles for the default streams.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &d.null_stream;
    Stream* stream = static_cast<Stream*>(handle);
    return d.streams.count(stream) ? stream : nullptr;
}

static Work wait_for(Stream& stream) {
    Work work(Work::Wait);
    work.stream = &stream;
    work.position = stream.queued;
    return work;
}

static void push(Stream& stream, Work work) {
    stream.queue.push_back(std::move(work));
    stream.queued++;
}

// Gives work to a stream: done at once, kept for later, or recorded into a graph.
static Result submit(void* handle, Work work) {
    Driver& d = driver();
    Stream* stream = stream_of(handle);
    REQUIRE(stream, InvalidHandle);
    if (stream->capture) {
        REQUIRE(!stream->capture->invalid, CaptureInvalidated);
        stream->capture->works.push_back(std::move(work));
        return Success;
    }
    if (stream == &d.null_stream) {
        for (Stream* other : d.streams) {
            if (!other->blocking) continue;
            REQUIRE(!other->capture, CaptureImplicit);
            if (other->done < other->queued) push(*stream, wait_for(*other));
        }
    } else if (stream->blocking && d.null_stream.done < d.null_stream.queued) {
        push(*stream, wait_for(d.null_stream));
    }
    push(*stream, std::move(work));
    return d.settings.lazy ? Success : run_all(*stream);
}

// Calls that could make a capture wait are refused while one is going on, as the capture's mode says.
static Result refuse_while_capturing() {
    Driver& d = driver();
    for (Stream* stream : d.streams) {
        if (!stream->capture || stream->capture->mode == 2) continue;
        if (stream->capture->mode == 1 && !pthread_equal(stream->capture->thread, pthread_self())) continue;
        stream->capture->invalid = true;
        return CaptureUnsupported;
    }
    return Success;
}

static Result copy(void* stream, void* to, bool to_device, const void* from, bool from_device, size_t bytes) {
    REQUIRE(!to_device || on_device(reinterpret_cast<Pointer>(to), bytes), InvalidValue);
    REQUIRE(!from_device || on_device(reinterpret_cast<Pointer>(from), bytes), InvalidValue);
    REQUIRE(bytes == 0 || (to && from), InvalidValue);
    Work work(Work::Copy);
    work.to = to;
    work.from = const_cast<void*>(from);
    work.bytes = bytes;
    work.to_device = to_device;
    work.from_device = from_device;
    // Only page-locked host memory is copied in the background. From other memory the driver takes what it holds now,
    // to other memory it copies before it returns; in a graph both are read and written when the graph runs.
    const Stream* target = stream_of(stream);
    REQUIRE(target, InvalidHandle);
    if (target->capture || bytes == 0) return submit(stream, std::move(work));
    if (!from_device && !find_allocation(reinterpret_cast<Pointer>(from), bytes)) {
        const char* source = static_cast<const char*>(from);
        work.staged = std::make_shared<std::vector<char>>(source, source + bytes);
    }
    const bool wait = !to_device && !find_allocation(reinterpret_cast<Pointer>(to), bytes);
    TRY(submit(stream, std::move(work)));
    return wait ? run_all(*stream_of(stream)) : Success;
}

static Result wait_null_stream(Result submitted) {
    TRY(submitted);
    return run_all(driver().null_stream);
}

static void* host(Pointer address) { return reinterpret_cast<void*>(address); }

static Result fill(void* stream, Pointer to, unsigned value, unsigned width, size_t count) {
    REQUIRE(to % width == 0 && on_device(to, count * width), InvalidValue);
    Work work(Work::Fill);
    work.to = host(to);
    work.value = value;
    work.width = width;
    work.bytes = count * width;
    return submit(stream, std::move(work));
}

// ---- Errors and versions.

API(cuGetErrorName, Result error, const char** text) {
    REQUIRE(text, InvalidValue);
    for (const ErrorText& known : error_texts) {
        *text = known.name;
        if (known.code == error) return Success;
    }
    *text = nullptr;
    return InvalidValue;
}

API(cuGetErrorString, Result error, const char** text) {
    REQUIRE(text, InvalidValue);
    for (const ErrorText& known : error_texts) {
        *text = known.text;
        if (known.code == error) return Success;
    }
    *text = nullptr;
    return InvalidValue;
}

API(cuDriverGetVersion, int* version) {
    REQUIRE(version, InvalidValue);
    *version = driver().settings.old_driver ? 11000 : 12060;
    return Success;
}

API(cuInit, unsigned flags) {
    BEGIN(Nothing);
    REQUIRE(flags == 0, InvalidValue);
    REQUIRE(!driver().settings.no_device, NoDevice);
    driver().initialized = true;
    return Success;
}

// ---- The device: figures of a Jetson Orin.

API(cuDeviceGetCount, int* count) {
    BEGIN(Initialized);
    *count = 1;
    return Success;
}

API(cuDeviceGet, int* device, int ordinal) {
    BEGIN(Initialized);
    REQUIRE(ordinal == 0, InvalidDevice);
    *device = 0;
    return Success;
}

API(cuDeviceGetName, char* name, int length, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    REQUIRE(name && length > 0, InvalidValue);
    snprintf(name, (size_t)length, "CUDA stand-in (CPU)");
    return Success;
}

API(cuDeviceGetUuid_v2, unsigned char* uuid, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    memcpy(uuid, "cuda stand-in 00", 16);
    return Success;
}
API(cuDeviceGetUuid, unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

API(cuDeviceTotalMem_v2, size_t* bytes, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    *bytes = driver().settings.memory;
    return Success;
}

static constexpr int shared_opt_in = 163 << 10;
// As many blocks at once as the emulator runs.
static constexpr int multiprocessors = cuda_host::cooperative_limit > 1 ? 2 : 1;
static constexpr int most_blocks = (int)cuda_host::cooperative_limit / multiprocessors;

static int attribute_value(int attribute) {
    const Settings& settings = driver().settings;
    switch (attribute) {
        case 1: return 1024;  // threads a block
        case 2:
        case 3: return 1024;        // block x, y
        case 4: return 64;          // block z
        case 5: return 2147483647;  // grid x
        case 6:
        case 7: return 65535;                 // grid y, z
        case 8: return 48 << 10;              // shared memory a block
        case 9: return 64 << 10;              // constant memory
        case 10: return 32;                   // warp
        case 12: return 65536;                // registers a block
        case 13: return 1300000;              // clock, kHz
        case 15: return 1;                    // copies beside kernels
        case 16: return multiprocessors;
        case 18: return settings.integrated;  // shares memory with the host
        case 19: return settings.integrated;  // can map host memory
        case 31: return 1;                    // kernels side by side
        case 36: return 3199000;              // memory clock, kHz
        case 37: return 256;                  // memory bus, bits
        case 38: return 4 << 20;              // second-level cache
        case 39: return 1536;                 // threads a multiprocessor
        case 40: return 1;                    // copy engines
        case 41: return 1;                    // one address space
        case 75: return settings.major;
        case 76: return settings.minor;
        case 78: return 1;                     // priorities
        case 81: return 164 << 10;             // shared memory a multiprocessor
        case 82: return 65536;                 // registers a multiprocessor
        case 83: return 1;                     // managed memory
        case 91: return settings.integrated && settings.may_register;  // host pointers of registered memory
        case 97: return shared_opt_in;         // shared memory a block, on request
        case 99: return settings.may_register;  // registering host memory
        case 95: return 1;                     // cooperative launches
        case 106: return most_blocks;          // a multiprocessor
        case 111: return 1 << 10;              // shared memory that the driver takes a block
        case 113: return settings.integrated && settings.may_register;  // registering host memory read-only
        case 115: return 1;                    // memory pools
        default: return 0;
    }
}

API(cuDeviceGetAttribute, int* value, int attribute, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    REQUIRE(value && attribute > 0, InvalidValue);
    *value = attribute_value(attribute);
    return Success;
}

// ---- Contexts.

API(cuDevicePrimaryCtxRetain, void** context, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    driver().context.users++;
    *context = &driver().context;
    return Success;
}

API(cuDevicePrimaryCtxRelease_v2, int device) {
    BEGIN(Initialized);
    REQUIRE(device == 0, InvalidDevice);
    REQUIRE(driver().context.users > 0, InvalidContext);
    driver().context.users--;
    return Success;
}

API(cuCtxGetCurrent, void** context) {
    BEGIN(Initialized);
    *context = pthread_getspecific(driver().current);
    return Success;
}

API(cuCtxSetCurrent, void* context) {
    BEGIN(Initialized);
    REQUIRE(!context || context == &driver().context, InvalidContext);
    pthread_setspecific(driver().current, context);
    return Success;
}

API(cuCtxSynchronize) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return run_everything();
}

API(cuCtxSetFlags, unsigned flags) {
    BEGIN(Current);
    driver().context.flags = flags;
    return Success;
}

API(cuCtxGetLimit, size_t* value, int) {
    BEGIN(Current);
    *value = 1024;
    return Success;
}

API(cuCtxSetLimit, int, size_t) {
    BEGIN(Current);
    return Success;
}

API(cuCtxGetCacheConfig, int* config) {
    BEGIN(Current);
    *config = 0;
    return Success;
}

API(cuCtxSetCacheConfig, int) {
    BEGIN(Current);
    return Success;
}

API(cuCtxGetStreamPriorityRange, int* least, int* greatest) {
    BEGIN(Current);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return Success;
}

API(cuProfilerStart) {
    BEGIN(Current);
    return Success;
}
API(cuProfilerStop) {
    BEGIN(Current);
    return Success;
}

// ---- Memory.

// What tests ask: allocations and registrations so far, how many there are now of each kind, and the device's bytes that are
// used now, and the most that were since it was last asked.
struct Counts {
    uint64_t made, device, host, registered, used, most_used;
};
extern "C" __attribute__((visibility("default"))) void standin_memory(Counts* counts) {
    Driver& d = driver();
    std::lock_guard<std::recursive_mutex> guard(d.lock);
    *counts = {d.made, 0, 0, 0, d.used, d.most_used};
    for (const auto& [begin, allocation] : d.allocations) {
        switch (allocation.kind) {
            case Allocation::Device: counts->device++; break;
            case Allocation::Host: counts->host++; break;
            case Allocation::Registered: counts->registered++; break;
        }
    }
    d.most_used = d.used;
}

struct Progress {
    uint64_t calls, launches, device_allocations;
};
extern "C" __attribute__((visibility("default"))) void standin_progress(Progress* progress) {
    Driver& d = driver();
    std::lock_guard<std::recursive_mutex> guard(d.lock);
    *progress = {d.calls, d.launches, d.device_allocations};
}
extern "C" __attribute__((visibility("default"))) void standin_begin(const char* state) {
    Driver& d = driver();
    std::lock_guard<std::recursive_mutex> guard(d.lock);
    d.settings = read_settings(state);
    d.sticky = Success;
    d.calls = d.launches = d.device_allocations = 0;
    // Of a device that had failed nothing could be destroyed.
    for (Stream* stream : d.streams) delete stream;
    d.streams.clear();
    d.null_stream = Stream();
    d.context.users = 0;
}

API(cuMemGetInfo_v2, size_t* free, size_t* total) {
    BEGIN(Current);
    *total = driver().settings.memory;
    *free = driver().settings.memory - driver().used;
    return Success;
}

API(cuMemAlloc_v2, Pointer* address, size_t bytes) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return allocate(address, bytes, Allocation::Device);
}

API(cuMemAllocAsync, Pointer* address, size_t bytes, void* handle) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream, InvalidHandle);
    REQUIRE(!stream->capture, CaptureUnsupported);  // a real driver makes a node of it, this one does not
    return allocate(address, bytes, Allocation::Device);
}

API(cuMemFree_v2, Pointer address) {
    Call call(Current);
    // Nothing can be done with the memory of a device that failed; but its owner has let go of it.
    if (driver().sticky != Success) release(address, Allocation::Device);
    if (call.result != Success) return call.result;
    if (!address) return Success;
    TRY(refuse_while_capturing());
    TRY(run_everything());
    return release(address, Allocation::Device);
}

API(cuMemFreeAsync, Pointer address, void* stream) {
    Call call(Current);
    if (driver().sticky != Success) release(address, Allocation::Device);
    if (call.result != Success) return call.result;
    REQUIRE(driver().allocations.count(address), InvalidValue);
    Work work(Work::Free);
    work.to = host(address);
    return submit(stream, std::move(work));
}

API(cuMemHostAlloc, void** address, size_t bytes, unsigned) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    Pointer result = 0;
    TRY(allocate(&result, bytes, Allocation::Host));
    *address = host(result);
    return Success;
}
API(cuMemAllocHost_v2, void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

API(cuMemFreeHost, void* address) {
    Call call(Current);
    if (driver().sticky != Success) release(reinterpret_cast<Pointer>(address), Allocation::Host);
    if (call.result != Success) return call.result;
    TRY(refuse_while_capturing());
    TRY(run_everything());
    return release(reinterpret_cast<Pointer>(address), Allocation::Host);
}

API(cuMemHostRegister_v2, void* address, size_t bytes, unsigned flags) {
    BEGIN(Current);
    Driver& d = driver();
    const unsigned map = 2, read_only = 8;
    REQUIRE(address && bytes > 0, InvalidValue);
    REQUIRE(d.settings.may_register && (d.settings.integrated || !(flags & (map | read_only))), NotSupported);
    REQUIRE(d.settings.registers, InvalidValue);
    const Pointer begin = reinterpret_cast<Pointer>(address);
    auto next = d.allocations.lower_bound(begin);
    REQUIRE(!find_allocation(begin, 1), HostMemoryAlreadyRegistered);
    REQUIRE(next == d.allocations.end() || next->first - begin >= bytes, HostMemoryAlreadyRegistered);
    d.made++;
    d.allocations[begin] = {Allocation::Registered, bytes, nullptr, 0, 0};
    return Success;
}
API(cuMemHostRegister, void* address, size_t bytes, unsigned flags) {
    return cuMemHostRegister_v2(address, bytes, flags);
}

API(cuMemHostUnregister, void* address) {
    Call call(Current);
    auto& all = driver().allocations;
    auto found = all.find(reinterpret_cast<Pointer>(address));
    if (driver().sticky != Success && found != all.end() && found->second.kind == Allocation::Registered)
        all.erase(found);
    if (call.result != Success) return call.result;
    REQUIRE(found != all.end() && found->second.kind == Allocation::Registered, HostMemoryNotRegistered);
    TRY(run_everything());
    all.erase(found);
    return Success;
}

API(cuMemHostGetDevicePointer_v2, Pointer* device, void* address, unsigned flags) {
    BEGIN(Current);
    REQUIRE(device && flags == 0, InvalidValue);
    REQUIRE(driver().settings.integrated, NotSupported);
    const Allocation* allocation = find_allocation(reinterpret_cast<Pointer>(address), 1);
    REQUIRE(allocation && allocation->kind != Allocation::Device, InvalidValue);
    *device = reinterpret_cast<Pointer>(address);
    return Success;
}

API(cuMemcpyHtoDAsync_v2, Pointer to, const void* from, size_t bytes, void* stream) {
    BEGIN(Current);
    return copy(stream, host(to), true, from, false, bytes);
}
API(cuMemcpyDtoHAsync_v2, void* to, Pointer from, size_t bytes, void* stream) {
    BEGIN(Current);
    return copy(stream, to, false, host(from), true, bytes);
}
API(cuMemcpyDtoDAsync_v2, Pointer to, Pointer from, size_t bytes, void* stream) {
    BEGIN(Current);
    return copy(stream, host(to), true, host(from), true, bytes);
}
API(cuMemcpyHtoD_v2, Pointer to, const void* from, size_t bytes) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return wait_null_stream(copy(nullptr, host(to), true, from, false, bytes));
}
API(cuMemcpyDtoH_v2, void* to, Pointer from, size_t bytes) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return wait_null_stream(copy(nullptr, to, false, host(from), true, bytes));
}
API(cuMemcpyDtoD_v2, Pointer to, Pointer from, size_t bytes) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return wait_null_stream(copy(nullptr, host(to), true, host(from), true, bytes));
}

API(cuMemsetD8Async, Pointer to, unsigned char value, size_t count, void* stream) {
    BEGIN(Current);
    return fill(stream, to, value, 1, count);
}
API(cuMemsetD32Async, Pointer to, unsigned value, size_t count, void* stream) {
    BEGIN(Current);
    return fill(stream, to, value, 4, count);
}
API(cuMemsetD8_v2, Pointer to, unsigned char value, size_t count) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return wait_null_stream(fill(nullptr, to, value, 1, count));
}
API(cuMemsetD32_v2, Pointer to, unsigned value, size_t count) {
    BEGIN(Current);
    TRY(refuse_while_capturing());
    return wait_null_stream(fill(nullptr, to, value, 4, count));
}

// ---- Modules and functions.

// A cubin runs on devices of its own major capability, from its minor one on.
static Result check_image(const unsigned char* image) {
    const Settings& settings = driver().settings;
    if (memcmp(image, ELFMAG, SELFMAG) == 0) {
        Elf64_Ehdr header;
        memcpy(&header, image, sizeof(header));
        REQUIRE(header.e_machine == 190, InvalidImage);  // EM_CUDA
        // Since ABI version 8 the architecture is in the second byte of the flags.
        const unsigned architecture =
            (header.e_ident[EI_ABIVERSION] >= 8 ? header.e_flags >> 8 : header.e_flags) & 0xffu;
        const bool fits = (int)architecture / 10 == settings.major && (int)architecture % 10 <= settings.minor;
        return fits ? Success : NoBinaryForGpu;
    }
    const char* text = reinterpret_cast<const char*>(image);
    while (*text == ' ' || *text == '\n' || *text == '\r' || *text == '\t') text++;
    const bool ptx = strncmp(text, "//", 2) == 0 || strncmp(text, ".version", 8) == 0;
    return ptx || strncmp(text, "cuda stand-in", 13) == 0 ? Success : InvalidImage;
}

API(cuModuleLoadData, void** module, const void* image) {
    BEGIN(Current);
    REQUIRE(module && image, InvalidValue);
    TRY(refuse_while_capturing());
    TRY(check_image(static_cast<const unsigned char*>(image)));
    *module = new Module();
    return Success;
}
API(cuModuleLoadDataEx, void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

API(cuModuleUnload, void* module) {
    BEGIN(Current);
    REQUIRE(module, InvalidHandle);
    TRY(run_everything());
    delete static_cast<Module*>(module);
    return Success;
}

API(cuModuleGetFunction, void** function, void* module, const char* name) {
    BEGIN(Current);
    REQUIRE(function && module && name, InvalidValue);
    const cuda_host::Kernel* kernel = cuda_host::find_kernel(name);
    REQUIRE(kernel, NotFound);
    Function& entry = static_cast<Module*>(module)->functions[name];
    entry.kernel = kernel;
    entry.name = name;
    *function = &entry;
    return Success;
}

API(cuModuleGetGlobal_v2, Pointer*, size_t*, void*, const char*) {
    BEGIN(Current);
    return NotFound;
}

API(cuFuncGetAttribute, int* value, int attribute, void* function) {
    BEGIN(Current);
    REQUIRE(value && function, InvalidValue);
    const Settings& settings = driver().settings;
    switch (attribute) {
        case 0: *value = 1024; break;  // threads a block
        case 4: *value = 32; break;    // registers
        case 5:
        case 6: *value = settings.major * 10 + settings.minor; break;  // versions of PTX and of the binary
        case 8: *value = static_cast<Function*>(function)->dynamic_shared; break;
        default: *value = 0;
    }
    return Success;
}

API(cuFuncSetAttribute, void* function, int attribute, int value) {
    BEGIN(Current);
    REQUIRE(function, InvalidValue);
    if (attribute == 8) {
        REQUIRE(value >= 0 && value <= shared_opt_in, InvalidValue);
        static_cast<Function*>(function)->dynamic_shared = value;
    }
    return Success;
}

API(cuFuncSetCacheConfig, void*, int) {
    BEGIN(Current);
    return Success;
}

static int blocks_a_multiprocessor(int threads, size_t shared_bytes) {
    if (threads < 1 || threads > 1024) return 0;
    const int by_threads = 1536 / ((threads + 31) / 32 * 32);
    const int by_shared = (int)((164u << 10) / (shared_bytes + 1024));
    return std::min({by_threads, by_shared, most_blocks});
}

API(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int* blocks, void* function, int threads, size_t shared_bytes,
    unsigned) {
    BEGIN(Current);
    REQUIRE(blocks && function, InvalidValue);
    *blocks = blocks_a_multiprocessor(threads, shared_bytes);
    return Success;
}
API(cuOccupancyMaxActiveBlocksPerMultiprocessor, int* blocks, void* function, int threads, size_t shared_bytes) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared_bytes, 0);
}

// ---- Launches.

static Result make_launch(Work& work, void* function, dim3 grid, dim3 block, unsigned shared_bytes, void** parameters,
                          void** extra) {
    REQUIRE(function, InvalidHandle);
    work.function = static_cast<Function*>(function);
    REQUIRE(grid.x && grid.y && grid.z && block.x && block.y && block.z, InvalidValue);
    REQUIRE(grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535, InvalidValue);
    REQUIRE(block.x <= 1024 && block.y <= 1024 && block.z <= 64, InvalidValue);
    REQUIRE((uint64_t)block.x * block.y * block.z <= 1024, InvalidValue);
    REQUIRE((int)shared_bytes >= 0 && (int)shared_bytes <= work.function->dynamic_shared, InvalidValue);
    REQUIRE(!extra && (parameters || work.function->kernel->argument_count == 0), InvalidValue);
    work.grid = grid;
    work.block = block;
    work.shared_bytes = shared_bytes;
    store_arguments(work, parameters);
    return Success;
}

API(cuLaunchKernel, void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    BEGIN(Current);
    Work work(Work::Kernel);
    TRY(make_launch(work, function, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_bytes,
                    parameters, extra));
    return submit(stream, std::move(work));
}

API(cuLaunchCooperativeKernel, void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters) {
    BEGIN(Current);
    Work work(Work::Kernel);
    TRY(make_launch(work, function, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_bytes,
                    parameters, nullptr));
    const uint64_t blocks = (uint64_t)grid_x * grid_y * grid_z;
    const int most = multiprocessors * blocks_a_multiprocessor((int)(block_x * block_y * block_z), shared_bytes);
    REQUIRE(blocks <= (uint64_t)most, CooperativeLaunchTooLarge);
    work.cooperative = true;
    return submit(stream, std::move(work));
}

API(cuLaunchHostFunc, void* stream, void (*callback)(void*), void* data) {
    BEGIN(Current);
    REQUIRE(callback, InvalidValue);
    Work work(Work::Host);
    work.callback = callback;
    work.data = data;
    return submit(stream, std::move(work));
}

// ---- Streams.

API(cuStreamCreateWithPriority, void** handle, unsigned flags, int) {
    BEGIN(Current);
    REQUIRE(handle && flags <= 1, InvalidValue);
    Stream* stream = new Stream();
    stream->blocking = flags == 0;
    driver().streams.insert(stream);
    *handle = stream;
    return Success;
}
API(cuStreamCreate, void** handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }

API(cuStreamDestroy_v2, void* handle) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream && stream != &driver().null_stream, InvalidHandle);
    Result result = run_all(*stream);  // a real driver lets it finish in the background
    driver().streams.erase(stream);
    delete stream;
    return result;
}

API(cuStreamSynchronize, void* handle) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream, InvalidHandle);
    if (stream->capture) {
        stream->capture->invalid = true;
        return CaptureUnsupported;
    }
    if (stream == &driver().null_stream)
        for (Stream* other : std::set<Stream*>(driver().streams))
            if (other->blocking) TRY(run_all(*other));
    return run_all(*stream);
}

// Time passes between two questions: each does one piece of the work.
static Result query(Stream& stream, uint64_t position) {
    if (stream.done >= position) return Success;
    TRY(run_until(stream, stream.done + 1));
    return NotReady;
}

API(cuStreamQuery, void* handle) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream, InvalidHandle);
    REQUIRE(!stream->capture, CaptureUnsupported);
    return query(*stream, stream->queued);
}

API(cuStreamWaitEvent, void* handle, void* event_handle, unsigned) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    const Event* event = static_cast<Event*>(event_handle);
    REQUIRE(stream && event, InvalidHandle);
    if (!event->recorded) return Success;
    if (event->captured) {
        // A stream that waits for an event of a capture takes part in it from there on.
        const Stream* other = nullptr;
        for (const Stream* one : driver().streams)
            if (one->capture && one->capture->capture == event->captured) other = one;
        REQUIRE(other, CapturedEvent);
        REQUIRE(!stream->capture || stream->capture == other->capture, CaptureIsolation);
        stream->capture = other->capture;
        if (!stream->capture_origin) stream->capture_origin = other->capture_origin;
        return Success;
    }
    if (stream->capture) {
        stream->capture->invalid = true;
        return CaptureIsolation;
    }
    Work work(Work::Wait);
    work.stream = event->stream;
    work.position = event->position;
    return submit(handle, std::move(work));
}

API(cuStreamBeginCapture_v2, void* handle, int mode) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream && mode >= 0 && mode <= 2, InvalidValue);
    REQUIRE(stream != &driver().null_stream && !stream->capture, CaptureUnsupported);
    stream->capture = new Graph();
    stream->capture->capture = ++driver().captures;
    stream->capture->mode = mode;
    stream->capture->thread = pthread_self();
    stream->capture_origin = stream;
    return Success;
}

API(cuStreamEndCapture, void* handle, void** result) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream && result, InvalidValue);
    *result = nullptr;
    Graph* graph = stream->capture;
    REQUIRE(graph, InvalidValue);
    REQUIRE(stream->capture_origin == stream, CaptureUnmatched);
    for (Stream* other : driver().streams) {
        if (other->capture != graph) continue;
        other->capture = nullptr;
        other->capture_origin = nullptr;
    }
    if (graph->invalid) {
        delete graph;
        return CaptureInvalidated;
    }
    *result = graph;
    return Success;
}

API(cuStreamIsCapturing, void* handle, int* status) {
    BEGIN(Current);
    Stream* stream = stream_of(handle);
    REQUIRE(stream && status, InvalidValue);
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return Success;
}

// ---- Events.

API(cuEventCreate, void** handle, unsigned flags) {
    BEGIN(Current);
    REQUIRE(handle, InvalidValue);
    Event* event = new Event();
    event->timing = !(flags & 2);
    *handle = event;
    return Success;
}

API(cuEventDestroy_v2, void* handle) {
    BEGIN(Current);
    REQUIRE(handle, InvalidHandle);
    delete static_cast<Event*>(handle);
    return Success;
}

API(cuEventRecord, void* handle, void* stream_handle) {
    BEGIN(Current);
    Event* event = static_cast<Event*>(handle);
    Stream* stream = stream_of(stream_handle);
    REQUIRE(event && stream, InvalidHandle);
    event->recorded = true;
    event->stream = stream;
    event->captured = stream->capture ? stream->capture->capture : 0;
    if (stream->capture) return stream->capture->invalid ? CaptureInvalidated : Success;
    event->time = std::make_shared<double>(-1.0);
    Work work(Work::Record);
    work.time = event->time;
    TRY(submit(stream_handle, std::move(work)));
    event->position = stream->queued;
    return Success;
}

static bool is_over(const Event& event) { return !event.recorded || !event.time || *event.time >= 0; }

static bool stream_lives(const Stream* stream) {
    return stream == &driver().null_stream || driver().streams.count(const_cast<Stream*>(stream));
}

API(cuEventQuery, void* handle) {
    BEGIN(Current);
    Event* event = static_cast<Event*>(handle);
    REQUIRE(event, InvalidHandle);
    REQUIRE(!event->captured, CapturedEvent);
    if (is_over(*event) || !stream_lives(event->stream)) return Success;
    return query(*event->stream, event->position);
}

API(cuEventSynchronize, void* handle) {
    BEGIN(Current);
    Event* event = static_cast<Event*>(handle);
    REQUIRE(event, InvalidHandle);
    REQUIRE(!event->captured, CapturedEvent);
    if (is_over(*event) || !stream_lives(event->stream)) return Success;
    return run_until(*event->stream, event->position);
}

API(cuEventElapsedTime, float* milliseconds, void* begin_handle, void* end_handle) {
    BEGIN(Current);
    const Event *begin = static_cast<Event*>(begin_handle), *end = static_cast<Event*>(end_handle);
    REQUIRE(milliseconds && begin && end, InvalidValue);
    REQUIRE(begin->timing && end->timing && begin->time && end->time, InvalidHandle);
    REQUIRE(is_over(*begin) && is_over(*end), NotReady);
    *milliseconds = (float)((*end->time - *begin->time) * 1e3);
    return Success;
}
API(cuEventElapsedTime_v2, float* milliseconds, void* begin, void* end) {
    return cuEventElapsedTime(milliseconds, begin, end);
}

// ---- Graphs. The order of capture is an order that respects all dependencies.

API(cuGraphInstantiateWithFlags, void** exec, void* graph, unsigned long long flags) {
    BEGIN(Current);
    REQUIRE(exec && graph && flags < 16, InvalidValue);
    REQUIRE((flags & 5) != 5, InvalidValue);  // freeing at launch and launching from the device exclude each other
    *exec = new GraphExec{std::make_shared<const std::vector<Work>>(static_cast<Graph*>(graph)->works)};
    return Success;
}

API(cuGraphExecDestroy, void* exec) {
    BEGIN(Current);
    REQUIRE(exec, InvalidValue);
    delete static_cast<GraphExec*>(exec);
    return Success;
}

API(cuGraphDestroy, void* handle) {
    BEGIN(Current);
    Graph* graph = static_cast<Graph*>(handle);
    REQUIRE(graph, InvalidValue);
    for (Node* node : graph->handles) delete node;
    delete graph;
    return Success;
}

API(cuGraphLaunch, void* exec, void* stream) {
    BEGIN(Current);
    REQUIRE(exec, InvalidValue);
    Work work(Work::Graph);
    work.graph = static_cast<GraphExec*>(exec)->works;
    return submit(stream, std::move(work));
}

API(cuGraphUpload, void* exec, void*) {
    BEGIN(Current);
    REQUIRE(exec, InvalidValue);
    return Success;
}

API(cuGraphGetNodes, void* handle, void** nodes, size_t* count) {
    BEGIN(Current);
    Graph* graph = static_cast<Graph*>(handle);
    REQUIRE(graph && count, InvalidValue);
    while (graph->handles.size() < graph->works.size())
        graph->handles.push_back(new Node{graph, graph->handles.size(), {}});
    const size_t room = *count;
    *count = graph->works.size();
    if (!nodes) return Success;
    for (size_t i = 0; i < room; i++) nodes[i] = i < graph->handles.size() ? graph->handles[i] : nullptr;
    *count = std::min(room, graph->works.size());
    return Success;
}

API(cuGraphNodeGetType, void* node_handle, int* type) {
    BEGIN(Current);
    const Node* node = static_cast<Node*>(node_handle);
    REQUIRE(node && type, InvalidValue);
    switch (node->graph->works[node->index].kind) {
        case Work::Kernel: *type = 0; break;
        case Work::Copy: *type = 1; break;
        case Work::Fill: *type = 2; break;
        case Work::Host: *type = 3; break;
        default: *type = 5;  // empty
    }
    return Success;
}

// CUDA_KERNEL_NODE_PARAMS; its second version has a kernel and a context after these.
struct KernelNodeParameters {
    void* function;
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void** parameters;
    void** extra;
};

static Result set_kernel(Work& work, const KernelNodeParameters* p) {
    REQUIRE(p && work.kind == Work::Kernel, InvalidValue);
    return make_launch(work, p->function, dim3(p->grid_x, p->grid_y, p->grid_z),
                       dim3(p->block_x, p->block_y, p->block_z), p->shared_bytes, p->parameters, p->extra);
}

API(cuGraphCreate, void** handle, unsigned flags) {
    BEGIN(Current);
    REQUIRE(handle && flags == 0, InvalidValue);
    *handle = new Graph();
    return Success;
}

// Only chains: each node behind the one before it.
API(cuGraphAddKernelNode_v2, void** node, void* handle, void* const* dependencies, size_t count,
    const KernelNodeParameters* p) {
    BEGIN(Current);
    Graph* graph = static_cast<Graph*>(handle);
    REQUIRE(node && graph, InvalidValue);
    const bool chained = graph->handles.empty() ? count == 0 : count == 1 && dependencies[0] == graph->handles.back();
    REQUIRE(chained && graph->handles.size() == graph->works.size(), NotSupported);
    Work work(Work::Kernel);
    TRY(set_kernel(work, p));
    graph->works.push_back(std::move(work));
    graph->handles.push_back(new Node{graph, graph->handles.size(), {}});
    *node = graph->handles.back();
    return Success;
}

API(cuGraphKernelNodeSetAttribute, void* handle, int attribute, const void* value) {
    BEGIN(Current);
    Node* node = static_cast<Node*>(handle);
    REQUIRE(node && value, InvalidValue);
    REQUIRE(attribute == 2, NotSupported);  // cooperative
    node->graph->works[node->index].cooperative = *static_cast<const int*>(value) != 0;
    return Success;
}

API(cuGraphKernelNodeGetParams_v2, void* handle, KernelNodeParameters* p) {
    BEGIN(Current);
    Node* node = static_cast<Node*>(handle);
    REQUIRE(node && p, InvalidValue);
    const Work& work = node->graph->works[node->index];
    REQUIRE(work.kind == Work::Kernel, InvalidValue);
    node->pointers = argument_pointers(work);
    *p = {const_cast<Function*>(work.function),
          work.grid.x,
          work.grid.y,
          work.grid.z,
          work.block.x,
          work.block.y,
          work.block.z,
          work.shared_bytes,
          node->pointers.data(),
          nullptr};
    void** more = reinterpret_cast<void**>(p + 1);
    more[0] = nullptr;
    more[1] = &driver().context;
    return Success;
}

API(cuGraphKernelNodeSetParams_v2, void* handle, const KernelNodeParameters* p) {
    BEGIN(Current);
    Node* node = static_cast<Node*>(handle);
    REQUIRE(node, InvalidValue);
    return set_kernel(node->graph->works[node->index], p);
}

API(cuGraphExecKernelNodeSetParams_v2, void* exec_handle, void* node_handle, const KernelNodeParameters* p) {
    BEGIN(Current);
    GraphExec* exec = static_cast<GraphExec*>(exec_handle);
    const Node* node = static_cast<Node*>(node_handle);
    REQUIRE(exec && node && node->index < exec->works->size(), InvalidValue);
    // Launches that are under way keep the old ones.
    auto changed = std::make_shared<std::vector<Work>>(*exec->works);
    TRY(set_kernel((*changed)[node->index], p));
    exec->works = std::move(changed);
    return Success;
}
API(cuGraphExecKernelNodeSetParams, void* exec, void* node, const KernelNodeParameters* p) {
    return cuGraphExecKernelNodeSetParams_v2(exec, node, p);
}

struct UpdateResult {
    int result;
    void *node, *from;
};

API(cuGraphExecUpdate_v2, void* exec_handle, void* graph_handle, UpdateResult* result) {
    BEGIN(Current);
    GraphExec* exec = static_cast<GraphExec*>(exec_handle);
    const Graph* graph = static_cast<Graph*>(graph_handle);
    REQUIRE(exec && graph && result, InvalidValue);
    *result = {0, nullptr, nullptr};
    const std::vector<Work>& old = *exec->works;
    if (old.size() != graph->works.size()) result->result = 2;  // topology changed
    for (size_t i = 0; result->result == 0 && i < old.size(); i++)
        if (old[i].kind != graph->works[i].kind) result->result = 3;  // node type changed
    REQUIRE(result->result == 0, GraphExecUpdateFailure);
    exec->works = std::make_shared<const std::vector<Work>>(graph->works);
    return Success;
}
