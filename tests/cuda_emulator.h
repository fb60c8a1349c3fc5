// A GPU for tests: compiles the source of babygpt_cuda.cu with any C++ compiler and runs its kernels on the CPU, slowly and suspiciously.
//
//     #include "cuda_emulator.h"       // takes the place of cuda_runtime.h, cuda_bf16.h, cuda_fp16.h and cublasLt.h
//     #include "../babygpt_cuda.cu"    // the real source, not a copy
//
// Blocks are a loop, threads are fibers (each with a stack of its own) that run until they wait: at a barrier, a shuffle, a tile product.
// What it finds is a fault: a line on stderr, counted (emulator::faults()), and as with a real device an error in the calls that follow.
//   always          a barrier or shuffle that not all threads reach; shuffles from lanes that take no part; misuse of the interface (empty grids,
//                   too much shared memory, allocation while capturing, pointers freed before a graph is replayed); device memory read by the host
//   with ASan       reads and writes beyond a buffer (device memory and shared arrays have poisoned gaps), after a free
//   with the watch  every load and store of a kernel: two threads touching the same byte of shared or device memory without a barrier between
//                   them, reads of memory that nobody wrote, kernels that touch the host's memory. Compile with -fsanitize=thread
//                   -DEMULATOR_WATCH and link without it: the compiler's calls for each access come here instead of to its own library.
// Streams are lazy: work is done when somebody waits or asks, so that a result read too early is wrong here every time. Fresh memory is all
// ones (not a number). For Linux on x86-64, and elsewhere where ucontext is.
#ifndef BABYGPT_CUDA_EMULATOR
#define BABYGPT_CUDA_EMULATOR 1

#include <link.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What the watch itself is made of must not be watched.
#if defined(__clang__) && defined(EMULATOR_WATCH)
#define EMULATOR_PLAIN __attribute__((disable_sanitizer_instrumentation))
#elif defined(EMULATOR_WATCH)
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_PLAIN
#endif

// ---- The words of the language ---------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Shared memory: `count` elements, or the dynamic bytes of the launch. The source defines the same macros for nvcc.
#define BABYGPT_SHARED(T, name, count)         \
    static const char emulator_key_##name = 0; \
    T* const name = static_cast<T*>(emulator::shared_array(&emulator_key_##name, sizeof(T) * (count), #name))
#define BABYGPT_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

#define EMULATOR_VECTOR(T, name)                                       \
    struct name##1 {                                                   \
        T x;                                                           \
    };                                                                 \
    struct alignas(2 * sizeof(T)) name##2 {                            \
        T x, y;                                                        \
    };                                                                 \
    struct name##3 {                                                   \
        T x, y, z;                                                     \
    };                                                                 \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 {  \
        T x, y, z, w;                                                  \
    };                                                                 \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR(signed char, char)
EMULATOR_VECTOR(unsigned char, uchar)
EMULATOR_VECTOR(short, short)
EMULATOR_VECTOR(unsigned short, ushort)
EMULATOR_VECTOR(int, int)
EMULATOR_VECTOR(unsigned, uint)
EMULATOR_VECTOR(long long, longlong)
EMULATOR_VECTOR(unsigned long long, ulonglong)
EMULATOR_VECTOR(float, float)
EMULATOR_VECTOR(double, double)
#undef EMULATOR_VECTOR
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- The interface's types -------------------------------------------------------------------------------------------
#define EMULATOR_ERRORS(X)                                                                                                 \
    X(cudaSuccess, 0, "no error")                                                                                          \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                                                        \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                                                       \
    X(cudaErrorInitializationError, 3, "initialization error")                                                             \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                                  \
    X(cudaErrorInvalidPitchValue, 12, "invalid pitch argument")                                                            \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                                            \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")                     \
    X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                                                       \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                                        \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                                               \
    X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")                    \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                                                      \
    X(cudaErrorNotReady, 600, "device not ready")                                                                          \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                                            \
    X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                                       \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                                           \
    X(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch")                                    \
    X(cudaErrorNotSupported, 801, "operation not supported")                                                               \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")                          \
    X(cudaErrorStreamCaptureInvalidated, 901, "operation failed due to a previous error during capture")                   \
    X(cudaErrorStreamCaptureUnmatched, 903, "the capture was not initiated in this stream")                                \
    X(cudaErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work")                                           \
    X(cudaErrorStreamCaptureImplicit, 906, "operation would make the legacy stream depend on a capturing blocking stream") \
    X(cudaErrorUnknown, 999, "unknown error")
enum cudaError {
#define EMULATOR_ERROR(name, value, text) name = value,
    EMULATOR_ERRORS(EMULATOR_ERROR)
#undef EMULATOR_ERROR
};
typedef cudaError cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
    cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMemoryPoolsSupported = 115
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1,
                   cudaEventDisableTiming = 2, cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2,
                   cudaHostRegisterDefault = 0;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, maxThreadsPerBlock, maxThreadsPerMultiProcessor, warpSize, l2CacheSize, regsPerBlock,
        cooperativeLaunch, integrated;
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes;
};
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeIgnore = 0,
    cudaLaunchAttributeCooperative = 2,
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
union cudaLaunchAttributeValue {
    char pad[64];
    int cooperative, programmaticStreamSerializationAllowed;
    struct {
        unsigned x, y, z;
    } clusterDim;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
typedef void (*cudaHostFn_t)(void*);

namespace emulator {

struct Settings {
    bool no_device = false;
    int major = 9, minor = 0, processors = 4, cluster = 4;  // blocks of the largest cluster
    size_t memory = size_t(4) << 30, shared = 48 << 10, shared_optin = 227 << 10;
    long fail_call = 0;         // the call of this number from now (1 = the next one) fails
    long fail_allocation = 0;   // the same for allocations of device or pinned memory
    bool lazy = true;           // streams run when somebody waits
    unsigned order = 0;         // of blocks and threads: 0 forwards, 1 backwards, else mixed with this seed
    bool quiet = false;         // faults are only counted, for tests that expect them
    bool names = true;          // faults name functions and lines; looking these up takes a while
    bool unwritten = true;      // the watch reports reads of memory that nobody wrote
    bool rounds_tf32 = true;    // false: products in tf32 multiply floats, so that a test sees all but the rounding
    bool mixed_bias = true;     // false: cuBLASLt adds no bias to a product of other numbers than it makes
    bool plans_differ = false;  // cuBLASLt's first plan is slow, and its second makes other bits
};
inline Settings settings;
struct Counts {
    long calls = 0, launches = 0, kernels = 0, graph_launches = 0, clusters = 0, synchronisations = 0, allocations = 0, copies = 0,
         products = 0, by_plan[3] = {};
    long long sent = 0;  // bytes that were copied to the device, where no graph does it
};
inline Counts counts;

// ---- Faults ----------------------------------------------------------------------------------------------------------
struct Site {
    const char* file;
    int line;
};
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

enum class Wait { ready, done, warp, block, grid };
enum class Kind {
    none,
    sync,
    index,
    up,
    down,
    exclusive,
    ballot,
    any,
    all,
    add,
    least,
    most,
    bit_and,
    bit_or,
    bit_xor,
    matrix,
    matrix_across,
    product_16_bit,
    product_8,
    product_tf32,
    count
};
struct Block;
struct Copy {
    void* to;
    const void* from;
    bool valid;
    int group;
};
struct Thread {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    void* fake_stack = nullptr;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    bool started = false;
    Wait wait = Wait::done;
    Kind kind = Kind::none;
    Site site = {"", 0};
    unsigned mask = 0;
    int argument = 0, width = 32;
    uint32_t in[12], out[4];
    float sum[4];
    bool is_signed = false, is_half = false;
    uint64_t value = 0, result = 0;
    uint3 index{};
    unsigned number = 0;  // within the block
    Block* block = nullptr;
    std::vector<Copy> copies;
    int group = 0;
    bool arrived = false;  // at the cluster's barrier, and when
    uint32_t arrival = 0;
};
struct SharedArray {
    const void* key;
    const char* name;
    size_t at, bytes;
};
struct Cell {  // what the watch knows of four bytes, or of one; times count barriers
    uint32_t writer, write_time, reader, read_time;
};
struct Block {
    uint3 index{};
    uint32_t number = 0;
    std::vector<Thread*> threads;
    unsigned char* arena = nullptr;
    std::vector<SharedArray> arrays;
    size_t used = 0;
    uint32_t start_time = 0, barrier_time = 0, fence_time = 0, release_time = 0, acquire_time = 0;
    std::vector<uint32_t> warp_time;
};
struct Launch {
    const void* kernel = nullptr;
    dim3 grid, block;
    size_t dynamic = 0;
    bool cooperative = false;
    unsigned cluster = 0;  // blocks
    std::function<void()> body, check;
    const void* arguments = nullptr;
    size_t arguments_size = 0;
};
struct Allocation {
    size_t bytes;
    bool pinned;
    std::map<uintptr_t, std::pair<size_t, std::string>> names;
};
struct Stream;
struct State {
    std::vector<std::string> faults;
    std::set<const void*> reported;
    cudaError_t last = cudaSuccess, sticky = cudaSuccess;
    double late = 0;  // so many ms are events, of what slow plans took
    long next_call = 0, next_allocation = 0;
    std::map<uintptr_t, Allocation> allocations;
    size_t used = 0, peak = 0;
    std::map<const void*, int> dynamic_limit;
    std::set<const void*> large_clusters;  // kernels that may have more than 8 blocks in one
    std::set<Stream*> streams;
    std::set<const void*> handles;
    int capturing = 0;
    bool in_host_function = false, handler = false;
};
inline State state;
inline std::recursive_mutex mutex;

constexpr size_t stack_bytes = 256 << 10, arena_bytes = 320 << 10, most_resident = 64, gap = 256, page = 4096;
inline unsigned char *device = nullptr, *device_next = nullptr, *arenas = nullptr, *stacks = nullptr;
inline size_t device_bytes = 0;
struct Cells {  // of a range of memory: a word's cell counts for its bytes, until somebody touches a part of it
    Cell *words = nullptr, *bytes = nullptr;
};
constexpr uint32_t in_bytes = 0xffffffffu;  // as a word's writer: its bytes have cells of their own
inline Cells device_cells, arena_cells;
inline Thread* now = nullptr;           // the thread of a kernel that runs
inline const Launch* launch = nullptr;  // and its kernel
inline volatile int inside =
    0;  // > 0 in the emulator's own code: not watched; volatile, as the compiler believes that its calls read nothing
inline uint32_t clock_time = 1, launch_time = 1, grid_time = 1, cluster_time = 1;  // cluster_time: when these blocks began
inline std::vector<Block> resident;
struct Inside {
    EMULATOR_PLAIN Inside() { inside = inside + 1; }
    EMULATOR_PLAIN ~Inside() { inside = inside - 1; }
};

inline std::string format(const char* text, ...) {
    char line[1024];
    va_list list;
    va_start(list, text);
    vsnprintf(line, sizeof line, text, list);
    va_end(list);
    return line;
}
inline const char* short_name(const char* file) { return strrchr(file, '/') ? strrchr(file, '/') + 1 : file; }

inline int find_bias(dl_phdr_info* info, size_t, void* bias) {
    *static_cast<uintptr_t*>(bias) = info->dlpi_addr;
    return 1;  // the first is the program itself
}
// What stands at this address of the program: "function at file:line". Asks addr2line, where there is one.
inline std::string look_up(const void* address, bool function_only) {
    uintptr_t bias = 0;
    dl_iterate_phdr(find_bias, &bias);
    const uintptr_t at = reinterpret_cast<uintptr_t>(address) - bias;
    char path[512] = {};
    if (readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return format("address %zx", at);
    FILE* tool = popen(format("addr2line -Cfpse '%s' %zx 2> /dev/null", path, function_only ? at : at - 1).c_str(), "r");
    char line[900] = {};
    const bool found = tool && fgets(line, sizeof line, tool) && line[0] != '?';
    if (tool) pclose(tool);
    if (!found) return format("address %zx", at);
    line[strcspn(line, "\n")] = 0;
    if (function_only)
        if (char* end = strstr(line, " at ")) *end = 0;
    return line;
}
inline std::string symbol(const void* address, bool function_only = false) {
    if (!settings.names) return format("address %p", address);
    static std::map<const void*, std::string> known;
    std::string& text = known[address];
    if (text.empty()) text = look_up(address, function_only);
    return text;
}
inline std::string where() {
    if (!now || !launch) return "";
    const uint3 b = now->block->index, t = now->index;
    return format("kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", symbol(launch->kernel, true).c_str(), b.x, b.y, b.z, t.x, t.y,
                  t.z);
}
inline void fault(const std::string& text) {
    const Inside mark;
    state.faults.push_back(where() + text);
    if (!settings.quiet && state.faults.size() <= 20) fprintf(stderr, "emulator: %s\n", state.faults.back().c_str());
    if (state.sticky == cudaSuccess && now) state.sticky = cudaErrorLaunchFailure;
}
inline size_t faults() { return state.faults.size(); }

// ---- Memory ----------------------------------------------------------------------------------------------------------
inline void poison(const void* at, size_t bytes) {
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(at, bytes);
#else
    static_cast<void>(at), static_cast<void>(bytes);
#endif
}
inline void unpoison(const void* at, size_t bytes) {
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(at, bytes);
#else
    static_cast<void>(at), static_cast<void>(bytes);
#endif
}
inline void* reserve(size_t bytes, int protection) {
    void* const at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
}
EMULATOR_PLAIN inline bool in_device(const void* p) {
    return static_cast<size_t>(static_cast<const unsigned char*>(p) - device) < device_bytes;
}
EMULATOR_PLAIN inline bool in_stacks(const void* p) {
    return static_cast<size_t>(static_cast<const unsigned char*>(p) - stacks) < most_resident * 1024 * stack_bytes;
}
inline const std::pair<const uintptr_t, Allocation>* allocation_of(const void* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    auto next = state.allocations.upper_bound(at);
    if (next == state.allocations.begin()) return nullptr;
    --next;
    return at < next->first + next->second.bytes ? &*next : nullptr;
}
inline std::string describe(const void* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (const auto* a = allocation_of(p)) {
        auto next = a->second.names.upper_bound(at);
        if (next != a->second.names.begin() && at < (--next)->first + next->second.first)
            return format("byte %zu of %s (%zu bytes)", at - next->first, next->second.second.c_str(), next->second.first);
        return format("byte %zu of %s memory of %zu bytes", at - a->first, a->second.pinned ? "pinned" : "device", a->second.bytes);
    }
    for (const Block& b : resident)
        if (const size_t offset = at - reinterpret_cast<uintptr_t>(b.arena); offset < arena_bytes) {
            for (const SharedArray& s : b.arrays)
                if (offset - s.at < s.bytes) return format("byte %zu of shared %s", offset - s.at, s.name);
            return format("byte %zu of dynamic shared memory", offset);
        }
    return in_device(p) ? "device memory that is not allocated" : in_stacks(p) ? "another thread's stack" : "host memory";
}
inline void handle_signal(int number, siginfo_t* info, void*) {
    const void* const at = info->si_addr;
    if (in_device(at)) {
        const std::string text = now ? where() + "touched " : std::string("the host touched ");
        fprintf(stderr, "emulator: %s%s\n", text.c_str(), describe(at).c_str());
        _exit(139);
    }
    if (stacks && in_stacks(at)) {
        fprintf(stderr, "emulator: %sits stack of %zu bytes is full\n", where().c_str(), stack_bytes);
        _exit(139);
    }
    signal(number, SIG_DFL);
}
inline void set_up() {
    if (state.handler) return;
    state.handler = true;
#ifdef EMULATOR_WATCH
    device_bytes = size_t(64) << 30;
    for (Cells* cells : {&device_cells, &arena_cells}) {
        const size_t bytes = cells == &device_cells ? device_bytes : most_resident * arena_bytes;
        cells->words = static_cast<Cell*>(reserve(bytes / 4 * sizeof(Cell), PROT_READ | PROT_WRITE));
        cells->bytes = static_cast<Cell*>(reserve(bytes * sizeof(Cell), PROT_READ | PROT_WRITE));
    }
#else
    device_bytes = size_t(1) << 40;
#endif
    device = device_next = static_cast<unsigned char*>(reserve(device_bytes, PROT_NONE));
    if (!device) device = device_next = static_cast<unsigned char*>(reserve(device_bytes = size_t(8) << 30, PROT_NONE));
    arenas = static_cast<unsigned char*>(reserve(most_resident * arena_bytes, PROT_READ | PROT_WRITE));
    stacks = static_cast<unsigned char*>(reserve(most_resident * 1024 * stack_bytes, PROT_READ | PROT_WRITE));
    static unsigned char alternate[64 << 10];
    stack_t stack = {};
    stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = handle_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}
inline size_t pages(size_t bytes) { return (bytes + page - 1) / page * page; }
// Device memory can be touched only while an Open lives.
inline int opened = 0;
struct Open {
    static void protect(int how) {
        for (const auto& a : state.allocations)
            if (!a.second.pinned) mprotect(reinterpret_cast<void*>(a.first), pages(a.second.bytes), how);
    }
    Open() {
        if (opened++ == 0) protect(PROT_READ | PROT_WRITE);
    }
    ~Open() {
        if (--opened == 0) protect(PROT_NONE);
    }
};
EMULATOR_PLAIN inline void to_bytes(const Cells& cells, size_t word) {
    if (cells.words[word].writer == in_bytes) return;
    for (size_t i = 0; i < 4; ++i) cells.bytes[word * 4 + i] = cells.words[word];
    cells.words[word].writer = in_bytes;
}
EMULATOR_PLAIN inline void mark_written(const void* to, size_t bytes) {
#ifdef EMULATOR_WATCH
    if (!in_device(to)) return;
    const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(to) - device), end = at + bytes;
    for (size_t i = at; i < end;) {
        if (i % 4 == 0 && end - i >= 4) device_cells.words[i / 4] = {0, clock_time, 0, 0}, i += 4;
        else to_bytes(device_cells, i / 4), device_cells.bytes[i] = {0, clock_time, 0, 0}, ++i;
    }
#else
    static_cast<void>(to), static_cast<void>(bytes);
#endif
}
EMULATOR_PLAIN inline bool is_written(const void* p) {
    const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - device);
    const Cell& c = device_cells.words[at / 4];
    return c.writer == in_bytes ? device_cells.bytes[at].write_time != 0 : c.write_time != 0;
}
inline cudaError_t allocate(void** pointer, size_t bytes, bool pinned) {
    const Inside mark;
    ++counts.allocations;
    *pointer = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (settings.fail_allocation > 0 && --settings.fail_allocation == 0) return cudaErrorMemoryAllocation;
    if (pinned) {
        void* const at = reserve(pages(bytes), PROT_READ | PROT_WRITE);
        if (!at) return cudaErrorMemoryAllocation;
        memset(at, 0xff, bytes);
        *pointer = at;
    } else {
        if (bytes > settings.memory - state.used || pages(bytes) + page > static_cast<size_t>(device + device_bytes - device_next))
            return cudaErrorMemoryAllocation;
        unsigned char* const at = device_next;
        device_next += pages(bytes) + page;
        if (mprotect(at, pages(bytes), PROT_READ | PROT_WRITE) != 0) return cudaErrorMemoryAllocation;
        memset(at, 0xff, bytes);
        poison(at + bytes, pages(bytes) - bytes);
        if (opened == 0) mprotect(at, pages(bytes), PROT_NONE);
        state.used += bytes;
        if (state.used > state.peak) state.peak = state.used;
        *pointer = at;
    }
    state.allocations[reinterpret_cast<uintptr_t>(*pointer)] = {bytes, pinned, {}};
    return cudaSuccess;
}
inline cudaError_t release(void* pointer, bool pinned) {
    const Inside mark;
    if (!pointer) return cudaSuccess;
    const auto found = state.allocations.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state.allocations.end() || found->second.pinned != pinned) {
        fault(format("freed what is not %s memory, or was freed before: %s", pinned ? "pinned" : "device", describe(pointer).c_str()));
        return cudaErrorInvalidValue;
    }
    const size_t bytes = found->second.bytes;
    if (pinned) munmap(pointer, pages(bytes));
    else {
        unpoison(pointer, pages(bytes));
        mprotect(pointer, pages(bytes), PROT_NONE);
        madvise(pointer, pages(bytes), MADV_DONTNEED);
        poison(pointer, pages(bytes));
#ifdef EMULATOR_WATCH
        const size_t at = static_cast<size_t>(static_cast<unsigned char*>(pointer) - device);
        madvise(device_cells.words + at / 4, pages(bytes) / 4 * sizeof(Cell), MADV_DONTNEED);
        madvise(device_cells.bytes + at, pages(bytes) * sizeof(Cell), MADV_DONTNEED);
#endif
        state.used -= bytes;
    }
    state.allocations.erase(found);
    return cudaSuccess;
}
// Gives a part of an allocation a name for messages; what lies between named parts must not be touched.
inline void name_buffer(const void* pointer, size_t bytes, const char* name) {
    const Inside mark;
    auto* const a = const_cast<std::pair<const uintptr_t, Allocation>*>(allocation_of(pointer));
    if (!a || bytes == 0) return;
    const Open open;
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (a->second.names.empty()) poison(reinterpret_cast<void*>(a->first), a->second.bytes);
    a->second.names[at] = {bytes, name};
    unpoison(pointer, bytes);
}
// "" or what is wrong with these bytes as a place that a copy or a kernel touches.
inline std::string wrong_device_range(const void* p, size_t bytes) {
    const auto* a = allocation_of(p);
    if (!a) return describe(p);
    const size_t offset = reinterpret_cast<uintptr_t>(p) - a->first;
    if (bytes > a->second.bytes - offset) return format("%zu bytes from %s", bytes, describe(p).c_str());
    return "";
}
inline bool is_pinned(const void* p) {
    const auto* a = allocation_of(p);
    return a && a->second.pinned;
}

// ---- Fibers ----------------------------------------------------------------------------------------------------------
inline std::vector<std::unique_ptr<Thread>> threads;
inline void* scheduler_pointer = nullptr;
#if !defined(__x86_64__)
inline ucontext_t scheduler_context;
#endif
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline void* scheduler_fake = nullptr;

#if defined(__x86_64__)
// Saves what a call must keep on this stack and takes it from the other.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void switch_stack(void**, void*) {
    __asm__ volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif
EMULATOR_PLAIN inline void leave(Thread& t, [[maybe_unused]] bool for_good = false) {
    const int depth = inside;
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &t.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
    switch_stack(&t.stack_pointer, scheduler_pointer);
#else
    swapcontext(&t.context, &scheduler_context);
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
    inside = depth;
}
inline void fiber_main() {
    Thread& t = *now;
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {  // one launch after another on the same stack
        inside = 1;
        launch->body();
        if (!t.copies.empty()) fault("ended with asynchronous copies that it never waited for");
        t.wait = Wait::done;
        leave(t);
    }
}
inline void prepare(Thread& t, size_t number) {
    if (!t.stack) {
        t.stack = stacks + number * stack_bytes;
        mprotect(t.stack, page, PROT_NONE);
    }
    if (t.started) return;
    t.started = true;
    unpoison(t.stack + page, stack_bytes - page);
    t.fake_stack = nullptr;
#if defined(__x86_64__)
    // Tops at different distances, so that the stacks do not all compete for the same lines of the cache.
    void** top = reinterpret_cast<void**>(t.stack + stack_bytes - 64 - number % 61 * 1088 % 16384 / 64 * 64);
    *--top = nullptr;
    void (*const entry)() = fiber_main;
    --top;
    memcpy(top, &entry, sizeof entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    t.stack_pointer = top;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack + page, t.context.uc_stack.ss_size = stack_bytes - page;
    makecontext(&t.context, fiber_main, 0);
#endif
}
EMULATOR_PLAIN inline void enter(Thread& t) {
    now = &t;
    threadIdx = t.index, blockIdx = t.block->index;
    const int depth = inside;
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&scheduler_fake, t.stack, stack_bytes);
#endif
#if defined(__x86_64__)
    switch_stack(&scheduler_pointer, t.stack_pointer);
#else
    swapcontext(&scheduler_context, &t.context);
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
    inside = depth;
    now = nullptr;
}
inline bool stopped = false;  // a thread of this launch can not go on: nobody does
// Ends the kernel after a fault.
[[noreturn]] inline void stop() {
    stopped = true;
    now->started = false;
    leave(*now, true);
    abort();
}

inline const unsigned char *known_from = nullptr, *known_to = nullptr;  // an allocation that was touched lately

// ---- The watch -------------------------------------------------------------------------------------------------------
// Who: a thread is block * 1024 + thread + 1; several readers at once are a group with a mark in the upper bits.
constexpr uint32_t group_warp = 1u << 30, group_block = 2u << 30, group_all = 3u << 30, group_mask = 3u << 30, atomics = group_all | 1;
EMULATOR_PLAIN inline uint32_t self() { return now->block->number * 1024 + now->number + 1; }
// Whether a thread did it between its arrival at the cluster's barrier and its wait: that barrier says nothing of it.
EMULATOR_PLAIN inline bool after_arrival(uint32_t who, uint32_t time) {
    if (launch->cluster == 0 || who == atomics || (who & group_mask) != 0) return false;
    for (const Block& b : resident)
        if (b.number == (who - 1) / 1024) return time >= b.threads[(who - 1) % 1024]->arrival;
    return false;
}
// Whether what `who` did at `time` is surely before what the running thread does now.
EMULATOR_PLAIN inline bool ordered(uint32_t who, uint32_t time) {
    const Block& b = *now->block;
    if (time < launch_time || (time >= cluster_time && time < grid_time && !after_arrival(who, time))) return true;
    if (who == atomics) return time <= b.acquire_time || time < b.barrier_time;
    if ((who & group_mask) == group_all) return false;
    const uint32_t thread = (who & ~group_mask) - 1, block = thread / 1024;
    if (block == b.number) {
        if (time < b.barrier_time) return true;
        return (who & group_mask) != group_block && thread % 1024 / 32 == now->number / 32 && time < b.warp_time[now->number / 32];
    }
    for (const Block& other : resident)
        if (other.number == block) return time < other.release_time && other.release_time < b.acquire_time;
    return false;
}
inline std::map<uint32_t, uint32_t> releases;  // of blocks that ended: their last fence before an atomic
inline bool ordered_with_ended(uint32_t who, uint32_t time) {
    if (who == atomics || (who & group_mask) != 0) return false;
    const auto found = releases.find((who - 1) / 1024);
    return found != releases.end() && time < found->second && found->second < now->block->acquire_time;
}
inline std::string name_of(uint32_t who) {
    if (who == atomics) return "an atomic";
    if ((who & group_mask) == group_all) return "several blocks";
    const uint32_t thread = (who & ~group_mask) - 1;
    if (who & group_mask) return format("several threads of block %u", thread / 1024);
    return format("thread %u of block %u", thread % 1024, thread / 1024);
}
inline void report(const void* pc, const std::string& text) {
    if (!state.reported.insert(pc).second) return;
    fault(text + " at " + symbol(pc));
}
struct Access {
    uint32_t me, start, safe;  // start: of what counts here; what was before `safe` is before us
    bool write, atomic;
    const void *at, *pc;
};
inline void check_cell_slowly(Cell& c, const Access& a) {
    if (!a.write && c.write_time < a.start && settings.unwritten) report(a.pc, "reads " + describe(a.at) + ", which nobody has written,");
    if (c.writer && c.writer != a.me && !(a.atomic && c.writer == atomics) && !ordered(c.writer, c.write_time) &&
        !ordered_with_ended(c.writer, c.write_time))
        report(a.pc, std::string(a.write ? "writes " : "reads ") + describe(a.at) + ", which " + name_of(c.writer) +
                         " wrote with nothing between,");
    if (a.write && c.reader && c.reader != a.me && !(a.atomic && c.reader == atomics) && !ordered(c.reader, c.read_time) &&
        !ordered_with_ended(c.reader, c.read_time))
        report(a.pc, "writes " + describe(a.at) + ", which " + name_of(c.reader) + " read with nothing between,");
    if (a.write) c.writer = a.atomic ? atomics : a.me, c.write_time = clock_time;
    else if (c.reader == 0 || c.reader == a.me || c.read_time < launch_time || ordered(c.reader, c.read_time))
        c.reader = a.me, c.read_time = clock_time;
    else {
        const uint32_t other = (c.reader & ~group_mask) - 1, mine = a.me - 1;
        if ((c.reader & group_mask) == group_all || other / 1024 != mine / 1024) c.reader = group_all;
        else if ((c.reader & group_mask) == group_block || other / 32 != mine / 32) c.reader = group_block | a.me;
        else c.reader = group_warp | a.me;
        c.read_time = clock_time;
    }
}
EMULATOR_PLAIN inline void check_cell(Cell& c, const Access& a) {
    if (c.write_time < a.start) c.writer = c.write_time = 0;
    if (c.read_time < a.start) c.reader = c.read_time = 0;
    const bool after_write = c.writer == a.me || c.write_time < a.safe, after_read = c.reader == a.me || c.read_time < a.safe;
    if (a.atomic || !after_write || !after_read || (!a.write && c.write_time == 0)) return check_cell_slowly(c, a);
    if (a.write) c.writer = a.me, c.write_time = clock_time;
    else c.reader = a.me, c.read_time = clock_time;
}
EMULATOR_PLAIN inline void watch_cells(const Cells& cells, size_t offset, size_t bytes, Access a) {
    for (const size_t end = offset + bytes; offset < end;) {
        const size_t before = offset;
        if (offset % 4 == 0 && end - offset >= 4) {
            Cell& word = cells.words[offset / 4];
            if (word.writer != in_bytes) check_cell(word, a);
            else {
                for (size_t i = 0; i < 4; ++i) check_cell(cells.bytes[offset + i], a);
                if (a.write) word = cells.bytes[offset];
            }
            offset += 4;
        } else {
            to_bytes(cells, offset / 4);
            check_cell(cells.bytes[offset], a);
            ++offset;
        }
        a.at = static_cast<const unsigned char*>(a.at) + (offset - before);
    }
}
extern "C" unsigned char __executable_start, _end;
EMULATOR_PLAIN inline void watch(const void* at, size_t bytes, bool write, const void* pc, bool atomic = false) {
    const unsigned char* const p = static_cast<const unsigned char*>(at);
    if (in_stacks(p)) {
        if (static_cast<size_t>(p - now->stack) >= stack_bytes) report(pc, "touches another thread's stack");
        return;
    }
    const Block& b = *now->block;
    if (static_cast<size_t>(p - b.arena) < arena_bytes)
        return watch_cells(arena_cells, static_cast<size_t>(p - arenas), bytes,
                           {self(), b.start_time, b.barrier_time, write, atomic, at, pc});
    if (in_device(p)) {
        if (write && now->arrived)
            return report(pc, "writes device memory between its arrival at a barrier and its wait: others might not see it");
        if (p < known_from || p + bytes > known_to) {
            const std::string wrong = wrong_device_range(at, bytes);
            if (!wrong.empty()) return report(pc, (write ? "writes " : "reads ") + wrong);
            const auto* a = allocation_of(at);
            known_from = reinterpret_cast<const unsigned char*>(a->first), known_to = known_from + a->second.bytes;
        }
        return watch_cells(device_cells, static_cast<size_t>(p - device), bytes,
                           {self(), 1, launch_time > grid_time || launch->cluster > 0 ? launch_time : grid_time, write, atomic, at, pc});
    }
    if (p >= &__executable_start && p < &_end) return;  // constants
    if (static_cast<size_t>(p - static_cast<const unsigned char*>(launch->arguments)) < launch->arguments_size || is_pinned(p)) return;
    report(pc, std::string(write ? "writes " : "reads ") + describe(at));
}
#ifdef EMULATOR_WATCH
inline void watch_own(const void* at, size_t bytes, bool write, const void* pc, bool atomic = false) {
    watch(at, bytes, write, pc, atomic);
}
#else
inline void watch_own(const void*, size_t, bool, const void*, bool = false) {}
#endif

// ---- The scheduler ---------------------------------------------------------------------------------------------------
inline const char* kind_name(Kind kind) {
    switch (kind) {
        case Kind::sync:
            return "__syncwarp";
        case Kind::index:
        case Kind::up:
        case Kind::down:
        case Kind::exclusive:
            return "a shuffle";
        case Kind::ballot:
        case Kind::any:
        case Kind::all:
            return "a vote";
        case Kind::matrix:
        case Kind::matrix_across:
            return "ldmatrix";
        case Kind::product_16_bit:
        case Kind::product_8:
        case Kind::product_tf32:
            return "a tile product";
        default:
            return "a reduction";
    }
}
inline std::string waits(const Thread& t) {
    const uint3 i = t.index;
    const std::string name = format("thread (%u, %u, %u)", i.x, i.y, i.z);
    if (t.wait == Wait::done) return name + " has ended";
    const char* const what = t.wait == Wait::warp ? kind_name(t.kind) : t.wait == Wait::grid ? "the barrier of the grid" : "__syncthreads";
    return name + format(" waits at %s, %s:%d", what, short_name(t.site.file), t.site.line) +
           (t.wait == Wait::warp ? format(" with mask %08x", t.mask) : "");
}
EMULATOR_PLAIN inline Thread& suspend(Wait wait, Kind kind, unsigned mask, Site site) {
    Thread& t = *now;
    t.wait = wait, t.kind = kind, t.mask = mask, t.site = site;
    leave(t);
    return t;
}
EMULATOR_PLAIN inline Thread& meet(Kind kind, unsigned mask, Site site) {
    if (!(mask >> now->number % 32 & 1)) {
        fault(format("%s:%d: %s with mask %08x by lane %u, which is not in it", short_name(site.file), site.line, kind_name(kind), mask,
                     now->number % 32));
        stop();
    }
    return suspend(Wait::warp, kind, mask, site);
}
inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? ldexpf(static_cast<float>(1024 + mantissa), exponent - 25)
                                      : ldexpf(static_cast<float>(mantissa), -24);
    return h >> 15 ? -size : size;
}
inline float unpack(uint32_t pair, int which, bool is_half) {
    const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
    return is_half ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
}
inline float to_tf32(float f) {  // what the tensor cores read of a float: they cut the lower 13 bits off
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits_to_float(bits & 0xffffe000u);
}
// D += A B of one warp: lane 4 g + t holds rows g and g + 8 of A and D, column g of B.
inline void multiply_tile(Thread* const* lanes, Kind kind) {
    const int depth = kind == Kind::product_16_bit ? 16 : 8;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Thread& t = *lanes[lane];
        const int g = lane / 4, c = lane % 4;
        for (int i = 0; i < (kind == Kind::product_8 ? 2 : 4); ++i) {
            if (kind == Kind::product_tf32) a[g + i % 2 * 8][c + i / 2 * 4] = to_tf32(bits_to_float(t.in[i]));
            else
                for (int j = 0; j < 2; ++j) a[g + i % 2 * 8][c * 2 + j + i / 2 * 8] = unpack(t.in[i], j, t.is_half);
        }
        for (int i = 0; i < (kind == Kind::product_8 ? 1 : 2); ++i) {
            if (kind == Kind::product_tf32) b[c + i * 4][g] = to_tf32(bits_to_float(t.in[4 + i]));
            else
                for (int j = 0; j < 2; ++j) b[c * 2 + j + i * 8][g] = unpack(t.in[4 + i], j, t.is_half);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            double sum = 0;
            for (int k = 0; k < depth; ++k)
                sum += static_cast<double>(a[lane / 4 + i / 2 * 8][k]) * static_cast<double>(b[k][lane % 4 * 2 + i % 2]);
            lanes[lane]->sum[i] = static_cast<float>(static_cast<double>(lanes[lane]->sum[i]) + sum);
        }
}
inline void load_matrices(Thread* const* lanes, bool across) {
    const int count = lanes[0]->argument;
    for (int m = 0; m < count; ++m) {
        uint16_t rows[8][8];
        for (int r = 0; r < 8; ++r) {
            const Thread& t = *lanes[m * 8 + r];
            const void* row;
            memcpy(&row, t.in, sizeof row);
            memcpy(rows[r], row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = across ? rows[j][i] : rows[i][j], high = across ? rows[j + 1][i] : rows[i][j + 1];
            lanes[lane]->out[m] = low | high << 16;
        }
    }
}
// Gives every lane of the mask its result. All of them wait at the same place.
EMULATOR_PLAIN inline bool finish_warp(Thread* const* lanes, unsigned mask) {
    Thread* first = nullptr;
    for (int lane = 31; lane >= 0; --lane)
        if (mask >> lane & 1) first = lanes[lane];
    const Kind kind = first->kind;
    uint64_t all = 0;
    if (kind >= Kind::ballot && kind <= Kind::all)
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && lanes[lane]->value) all |= 1ull << lane;
    if (kind >= Kind::add && kind <= Kind::bit_xor) {
        all = first->value;
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1) || lanes[lane] == first) continue;
            const uint64_t v = lanes[lane]->value;
            const bool less = first->is_signed ? static_cast<int64_t>(v) < static_cast<int64_t>(all) : v < all;
            all = kind == Kind::add       ? all + v
                  : kind == Kind::least   ? (less ? v : all)
                  : kind == Kind::most    ? (less ? all : v)
                  : kind == Kind::bit_and ? all & v
                  : kind == Kind::bit_or  ? all | v
                                          : all ^ v;
        }
    }
    if (kind >= Kind::matrix && kind <= Kind::product_tf32 && mask != 0xffffffffu) {
        now = first,
        fault(format("%s:%d: %s needs the whole warp, but the mask is %08x", short_name(first->site.file), first->site.line,
                     kind_name(kind), mask)),
        now = nullptr;
        return false;
    }
    if (kind == Kind::matrix || kind == Kind::matrix_across) load_matrices(lanes, kind == Kind::matrix_across);
    if (kind >= Kind::product_16_bit && kind <= Kind::product_tf32) multiply_tile(lanes, kind);
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Thread& t = *lanes[lane];
        const int width = t.width, base = lane / width * width, end = base + width, n = t.argument;
        int from = lane;
        if (kind == Kind::index) from = base + (n & (width - 1));
        if (kind == Kind::up && lane - n >= base) from = lane - n;
        if (kind == Kind::down && lane + n < end) from = lane + n;
        if (kind == Kind::exclusive && (lane ^ n) < end) from = lane ^ n;
        if (!(mask >> from & 1)) {
            now = &t,
            fault(
                format("%s:%d: a shuffle reads lane %d, which is not in the mask %08x", short_name(t.site.file), t.site.line, from, mask)),
            now = nullptr;
            return false;
        }
        t.result = kind >= Kind::index && kind <= Kind::exclusive ? lanes[from]->value
                   : kind == Kind::any                            ? all != 0
                   : kind == Kind::all                            ? all == mask
                                                                  : all;
        t.wait = Wait::ready;
    }
    if (kind == Kind::sync) first->block->warp_time[first->number / 32] = ++clock_time;
    return true;
}
EMULATOR_PLAIN inline bool try_warp(Block& b, size_t warp, bool& bad) {
    Thread* lanes[32] = {};
    for (size_t lane = 0; lane < 32 && warp * 32 + lane < b.threads.size(); ++lane) lanes[lane] = b.threads[warp * 32 + lane];
    bool progress = false;
    for (int lane = 0; lane < 32 && !bad; ++lane) {
        if (!lanes[lane] || lanes[lane]->wait != Wait::warp) continue;
        const Thread& t = *lanes[lane];
        bool complete = true;
        for (int other = 0; other < 32 && complete; ++other)
            if (t.mask >> other & 1) {
                const Thread* const o = lanes[other];
                complete = o && o->wait == Wait::warp && o->mask == t.mask && o->kind == t.kind && o->site.line == t.site.line &&
                           o->site.file == t.site.file;
            }
        if (!complete) continue;
        if (!finish_warp(lanes, t.mask)) bad = true;
        progress = true;
    }
    return progress;
}
EMULATOR_PLAIN inline bool try_block(Block& b) {
    const Thread& first = *b.threads[0];
    if (first.wait != Wait::block) return false;
    uint64_t count = 0;
    for (const Thread* t : b.threads) {
        if (t->wait != Wait::block || t->kind != first.kind || t->site.line != first.site.line || t->site.file != first.site.file)
            return false;
        count += t->value != 0;
    }
    b.barrier_time = ++clock_time;
    for (Thread* t : b.threads) {
        t->wait = Wait::ready;
        t->result = t->kind == Kind::any ? count != 0 : t->kind == Kind::all ? count == b.threads.size() : count;
    }
    return true;
}
inline bool try_grid() {
    for (const Block& b : resident)
        for (const Thread* t : b.threads)
            if (t->wait != Wait::grid) return false;
    grid_time = ++clock_time;
    for (Block& b : resident)
        for (Thread* t : b.threads) t->wait = Wait::ready, t->arrived = false;
    return true;
}
// Nobody can go on: says who waits for whom.
inline void explain() {
    for (Block& b : resident)
        for (Thread* t : b.threads) {
            if (t->wait == Wait::done) continue;
            const Thread* other = nullptr;
            bool there = true;
            int lane = 0;
            if (t->wait == Wait::warp) {
                for (; lane < 32 && !other && there; ++lane) {
                    const size_t number = t->number / 32 * 32 + static_cast<size_t>(lane);
                    if (!(t->mask >> lane & 1)) continue;
                    there = number < b.threads.size();
                    const Thread* const o = there ? b.threads[number] : nullptr;
                    if (o && (o->wait != Wait::warp || o->mask != t->mask || o->kind != t->kind || o->site.line != t->site.line)) other = o;
                }
            } else {
                for (const Block& another : resident)
                    for (const Thread* o : another.threads)
                        if (!other && (o->wait != t->wait || o->site.line != t->site.line || o->kind != t->kind) &&
                            (t->wait == Wait::grid || &another == &b))
                            other = o;
            }
            if (!other && there) continue;
            now = t;
            fault(waits(*t) + ", but " + (other ? waits(*other) : format("lane %d of its mask does not exist", lane - 1)));
            now = nullptr;
            return;
        }
    fault("threads wait for each other");
}
inline uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
// The i-th of n in the order of the settings: forwards, backwards, or mixed.
EMULATOR_PLAIN inline const std::vector<uint32_t>& order_of(size_t n, uint32_t salt, int which) {
    static std::vector<uint32_t> orders[3];
    static unsigned made_for[3];
    std::vector<uint32_t>& order = orders[which];
    if (order.size() == n && settings.order < 2 && made_for[which] == settings.order) return order;
    made_for[which] = settings.order;
    order.resize(n);
    for (size_t i = 0; i < n; ++i) order[i] = static_cast<uint32_t>(settings.order == 1 ? n - 1 - i : i);
    if (settings.order > 1)
        for (size_t i = n; i > 1; --i)
            std::swap(order[i - 1], order[mix(settings.order * 7919 + salt * 104729 + static_cast<uint32_t>(i)) % i]);
    return order;
}
inline void start_block(Block& b, uint32_t number, size_t slot) {
    const Launch& l = *launch;
    const size_t count = static_cast<size_t>(l.block.x) * l.block.y * l.block.z;
    b.number = number;
    b.index = {number % l.grid.x, number / l.grid.x % l.grid.y, number / l.grid.x / l.grid.y};
    b.arena = arenas + slot * arena_bytes;
    b.arrays.clear();
    unpoison(b.arena, arena_bytes);
    memset(b.arena, 0xff, b.used ? b.used : arena_bytes);
    poison(b.arena + l.dynamic, arena_bytes - l.dynamic);
    b.used = (l.dynamic + gap - 1) / gap * gap + gap;
    b.start_time = b.barrier_time = ++clock_time;
    b.fence_time = b.release_time = b.acquire_time = 0;
    b.warp_time.assign((count + 31) / 32, clock_time);
    b.threads.resize(count);
    for (size_t i = 0; i < count; ++i) {
        while (threads.size() <= slot * 1024 + i) threads.emplace_back(new Thread);
        Thread& t = *threads[slot * 1024 + i];
        prepare(t, slot * 1024 + i);
        const unsigned n = static_cast<unsigned>(i);
        t.index = {n % l.block.x, n / l.block.x % l.block.y, n / l.block.x / l.block.y};
        t.number = n, t.block = &b, t.wait = Wait::ready, t.group = 0, t.arrived = false, t.arrival = 0xffffffffu;
        t.copies.clear();
        b.threads[i] = &t;
    }
}
EMULATOR_PLAIN inline void run_resident() {
    bool bad = false;
    for (uint32_t round = 0;; ++round) {
        bool progress = false, all_done = true;
        for (Block& b : resident) {
            const std::vector<uint32_t>&warps = order_of(b.warp_time.size(), round, 0), &lanes = order_of(32, round + 1, 1);
            for (const uint32_t warp : warps) {
                do {
                    for (const uint32_t lane : lanes) {
                        if (warp * 32 + lane >= b.threads.size()) continue;
                        Thread& t = *b.threads[warp * 32 + lane];
                        if (t.wait == Wait::ready) enter(t), progress = true;
                        if (stopped) return;
                    }
                } while (try_warp(b, warp, bad) && !bad);
            }
            if (!bad && try_block(b)) progress = true;
            for (const Thread* t : b.threads) all_done = all_done && t->wait == Wait::done;
        }
        if (all_done) return;
        if (!bad && (launch->cooperative || launch->cluster > 0) && try_grid()) progress = true;
        if (bad || !progress) {
            if (!bad) explain();
            stopped = true;
            return;
        }
    }
}
inline void run(const Launch& l) {
    const Inside mark;
    if (state.sticky != cudaSuccess) return;
    ++counts.kernels;
    const Launch* const outer = launch;
    launch = &l;
    gridDim = l.grid, blockDim = l.block;
    launch_time = ++clock_time;
    known_from = known_to = nullptr;
    stopped = false;
    releases.clear();
    l.check();
    const uint32_t blocks = l.grid.x * l.grid.y * l.grid.z;
    const size_t together = l.cooperative ? blocks : l.cluster > 0 ? l.cluster : 1;
    resident.resize(together);
    const std::vector<uint32_t> order = order_of(blocks / together, 17, 2);
    for (uint32_t first = 0; first < blocks && !stopped && state.sticky == cudaSuccess; first += static_cast<uint32_t>(together)) {
        cluster_time = l.cluster > 0 ? ++clock_time : launch_time;
        for (size_t i = 0; i < together; ++i)
            start_block(resident[i], order[first / together] * static_cast<uint32_t>(together) + static_cast<uint32_t>(i), i);
        run_resident();
        for (const Block& b : resident)
            if (b.release_time) releases[b.number] = b.release_time;
    }
    if (stopped)
        for (const Block& b : resident)
            for (Thread* t : b.threads)
                if (t->wait != Wait::done) t->started = false, t->wait = Wait::done;
    ++clock_time;
    launch = outer;
}

// ---- What kernels call -----------------------------------------------------------------------------------------------
inline unsigned char* dynamic_shared() {
    const Inside mark;
    return now->block->arena;
}
inline void* shared_array(const void* key, size_t bytes, const char* name) {
    const Inside mark;
    Block& b = *now->block;
    for (const SharedArray& s : b.arrays)
        if (s.key == key) return b.arena + s.at;
    size_t total = bytes;
    for (const SharedArray& s : b.arrays) total += s.bytes;
    if (total > settings.shared || total + launch->dynamic > settings.shared_optin) {
        fault(format("shared memory of %zu static and %zu dynamic bytes is more than the device has", total, launch->dynamic));
        stop();
    }
    const size_t at = b.used;
    b.used += (bytes + gap - 1) / gap * gap + gap;
    if (b.used > arena_bytes) {
        fault("the emulator's room for shared arrays is full");
        stop();
    }
    b.arrays.push_back({key, name, at, bytes});
    unpoison(b.arena + at, bytes);
    return b.arena + at;
}
inline void grid_sync(EMULATOR_SITE) {
    const Inside mark;
    if (!launch->cooperative) {
        fault(format("%s:%d: a barrier of the grid in a launch that is not cooperative", short_name(site.file), site.line));
        stop();
    }
    suspend(Wait::grid, Kind::sync, 0, site);
}
inline void cluster_arrive(EMULATOR_SITE) {
    const Inside mark;
    if (launch->cluster == 0 || now->arrived) {
        fault(format("%s:%d: arrives at a cluster's barrier %s", short_name(site.file), site.line,
                     now->arrived ? "twice" : "without a cluster"));
        stop();
    }
    now->arrived = true, now->arrival = ++clock_time;
}
inline void cluster_wait(EMULATOR_SITE) {
    const Inside mark;
    if (!now->arrived) {
        fault(format("%s:%d: waits at a cluster's barrier without having arrived", short_name(site.file), site.line));
        stop();
    }
    suspend(Wait::grid, Kind::sync, 0, site);
}
EMULATOR_PLAIN inline uint64_t block_vote(Kind kind, bool value, Site site) {
    const Inside mark;
    now->value = value;
    return suspend(Wait::block, kind, 0, site).result;
}
EMULATOR_PLAIN inline uint64_t warp_value(Kind kind, unsigned mask, uint64_t value, int argument, int width, bool is_signed, Site site) {
    const Inside mark;
    Thread& t = *now;
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fault(format("%s:%d: a shuffle of width %d", short_name(site.file), site.line, width));
        stop();
    }
    t.value = value, t.argument = argument, t.width = width, t.is_signed = is_signed;
    return meet(kind, mask, site).result;
}
template <class T>
T shuffle(Kind kind, unsigned mask, T value, int argument, int width, Site site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp_value(kind, mask, bits, argument, width, false, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline void load_matrix(uint32_t* r, int count, const void* row, bool across, Site site) {
    const Inside mark;
    Thread& t = *now;
    if (static_cast<int>(t.number % 32) < count * 8) {
        const unsigned char* const p = static_cast<const unsigned char*>(row);
        if (static_cast<size_t>(p - t.block->arena) > arena_bytes - 16 || reinterpret_cast<uintptr_t>(row) % 16 != 0) {
            fault(format("%s:%d: ldmatrix needs 16 aligned bytes of shared memory, not %s", short_name(site.file), site.line,
                         describe(row).c_str()));
            stop();
        }
#ifdef EMULATOR_ASAN
        if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(row), 16)) {
            fault(format("%s:%d: ldmatrix reads beyond an array: %s", short_name(site.file), site.line, describe(bad).c_str()));
            stop();
        }
#endif
        watch_own(row, 16, false, __builtin_return_address(0));
    }
    memcpy(t.in, &row, sizeof row);
    t.argument = count;
    meet(across ? Kind::matrix_across : Kind::matrix, 0xffffffffu, site);
    memcpy(r, t.out, sizeof(uint32_t) * static_cast<size_t>(count));
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_SITE) { load_matrix(r, 4, row, false, site); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_SITE) { load_matrix(r, 2, row, false, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_SITE) { load_matrix(r, 4, row, true, site); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMULATOR_SITE) { load_matrix(r, 2, row, true, site); }
inline void multiply(Kind kind, float* d, const uint32_t* a, int as, const uint32_t* b, int bs, bool is_half, Site site) {
    const Inside mark;
    Thread& t = *now;
    for (int i = 0; i < as; ++i) t.in[i] = a[i];
    for (int i = 0; i < bs; ++i) t.in[4 + i] = b[i];
    for (int i = 0; i < 4; ++i) t.sum[i] = d[i];
    t.is_half = is_half;
    meet(kind, 0xffffffffu, site);
    for (int i = 0; i < 4; ++i) d[i] = t.sum[i];
}
// cp.async: the bytes arrive when the thread waits, and are nonsense until then.
inline bool can_copy(const void* to, const void* from, bool valid, Site site) {
    std::string wrong =
        static_cast<size_t>(static_cast<const unsigned char*>(to) - now->block->arena) > arena_bytes - 16 ? "to " + describe(to) : "";
    if (valid && wrong.empty() && !wrong_device_range(from, 16).empty()) wrong = "from " + wrong_device_range(from, 16);
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        wrong = "between addresses that are not multiples of 16";
#ifdef EMULATOR_ASAN
    if (wrong.empty())
        if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(to), 16)) wrong = "beyond an array: " + describe(bad);
    if (wrong.empty() && valid)
        if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(from), 16)) wrong = "from beyond a buffer: " + describe(bad);
#endif
    if (!wrong.empty()) fault(format("%s:%d: copies 16 bytes ", short_name(site.file), site.line) + wrong);
    return wrong.empty();
}
inline void copy_async_zero16(void* to, const void* from, bool valid, EMULATOR_SITE) {
    const Inside mark;
    if (!can_copy(to, from, valid, site)) stop();
    watch_own(to, 16, true, __builtin_return_address(0));
    if (valid) watch_own(from, 16, false, __builtin_return_address(0));
    memset(to, 0xff, 16);
    now->copies.push_back({to, from, valid, now->group});
}
inline void copy_async16(void* to, const void* from, EMULATOR_SITE) { copy_async_zero16(to, from, true, site); }
inline void copy_async_commit() {
    const Inside mark;
    ++now->group;
}
template <int N>
void copy_async_wait() {
    const Inside mark;
    Thread& t = *now;
    std::vector<Copy> left;
    for (const Copy& c : t.copies) {
        if (c.group >= t.group - N) {
            left.push_back(c);
            continue;
        }
        watch_own(c.to, 16, true, __builtin_return_address(0));
        if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    }
    t.copies.swap(left);
}
template <class T, class F>
T atomic(T* at, F change, const void* pc) {
    const Inside mark;
    Block& b = *now->block;
    if (in_device(at)) b.acquire_time = ++clock_time, b.release_time = b.fence_time;
    watch_own(at, sizeof *at, true, pc, true);
    const T old = *at;
    *at = change(old);
    return old;
}

}  // namespace emulator

// ---- Device functions ------------------------------------------------------------------------------------------------
inline void __syncthreads(EMULATOR_SITE) { emulator::block_vote(emulator::Kind::sync, false, site); }
inline int __syncthreads_or(int p, EMULATOR_SITE) { return static_cast<int>(emulator::block_vote(emulator::Kind::any, p != 0, site)); }
inline int __syncthreads_and(int p, EMULATOR_SITE) { return static_cast<int>(emulator::block_vote(emulator::Kind::all, p != 0, site)); }
inline int __syncthreads_count(int p, EMULATOR_SITE) { return static_cast<int>(emulator::block_vote(emulator::Kind::count, p != 0, site)); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
    emulator::warp_value(emulator::Kind::sync, mask, 0, 0, 32, false, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_SITE) {
    return emulator::shuffle(emulator::Kind::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_SITE) {
    return emulator::shuffle(emulator::Kind::up, mask, value, static_cast<int>(by), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_SITE) {
    return emulator::shuffle(emulator::Kind::down, mask, value, static_cast<int>(by), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
    return emulator::shuffle(emulator::Kind::exclusive, mask, value, bits, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATOR_SITE) {
    return static_cast<unsigned>(emulator::warp_value(emulator::Kind::ballot, mask, p != 0, 0, 32, false, site));
}
inline int __any_sync(unsigned mask, int p, EMULATOR_SITE) {
    return static_cast<int>(emulator::warp_value(emulator::Kind::any, mask, p != 0, 0, 32, false, site));
}
inline int __all_sync(unsigned mask, int p, EMULATOR_SITE) {
    return static_cast<int>(emulator::warp_value(emulator::Kind::all, mask, p != 0, 0, 32, false, site));
}
#define EMULATOR_REDUCE(name, kind)                                                                                      \
    inline unsigned name(unsigned mask, unsigned value, EMULATOR_SITE) {                                                 \
        return static_cast<unsigned>(emulator::warp_value(emulator::Kind::kind, mask, value, 0, 32, false, site));       \
    }                                                                                                                    \
    inline int name(unsigned mask, int value, EMULATOR_SITE) {                                                           \
        return static_cast<int>(                                                                                         \
            emulator::warp_value(emulator::Kind::kind, mask, static_cast<uint64_t>(int64_t(value)), 0, 32, true, site)); \
    }
EMULATOR_REDUCE(__reduce_add_sync, add)
EMULATOR_REDUCE(__reduce_min_sync, least)
EMULATOR_REDUCE(__reduce_max_sync, most)
EMULATOR_REDUCE(__reduce_and_sync, bit_and)
EMULATOR_REDUCE(__reduce_or_sync, bit_or)
EMULATOR_REDUCE(__reduce_xor_sync, bit_xor)
#undef EMULATOR_REDUCE
inline void __threadfence() {
    const emulator::Inside mark;
    emulator::now->block->fence_time = ++emulator::clock_time;
}
inline void __threadfence_block() {}
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() {
    emulator::fault("__trap()");
    emulator::stop();
}
// No atomics on floats: their order would differ from run to run.
#define EMULATOR_ATOMICS(T)                                                                   \
    inline T atomicAdd(T* at, T v) {                                                          \
        return emulator::atomic(                                                              \
            at, [=](T old) { return static_cast<T>(old + v); }, __builtin_return_address(0)); \
    }                                                                                         \
    inline T atomicMax(T* at, T v) {                                                          \
        return emulator::atomic(                                                              \
            at, [=](T old) { return old > v ? old : v; }, __builtin_return_address(0));       \
    }                                                                                         \
    inline T atomicMin(T* at, T v) {                                                          \
        return emulator::atomic(                                                              \
            at, [=](T old) { return old < v ? old : v; }, __builtin_return_address(0));       \
    }                                                                                         \
    inline T atomicOr(T* at, T v) {                                                           \
        return emulator::atomic(                                                              \
            at, [=](T old) { return old | v; }, __builtin_return_address(0));                 \
    }                                                                                         \
    inline T atomicAnd(T* at, T v) {                                                          \
        return emulator::atomic(                                                              \
            at, [=](T old) { return old & v; }, __builtin_return_address(0));                 \
    }                                                                                         \
    inline T atomicExch(T* at, T v) {                                                         \
        return emulator::atomic(                                                              \
            at, [=](T) { return v; }, __builtin_return_address(0));                           \
    }                                                                                         \
    inline T atomicCAS(T* at, T was, T v) {                                                   \
        return emulator::atomic(                                                              \
            at, [=](T old) { return old == was ? v : old; }, __builtin_return_address(0));    \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
inline unsigned atomicInc(unsigned* at, unsigned most) {
    return emulator::atomic(
        at, [=](unsigned old) { return old >= most ? 0u : old + 1; }, __builtin_return_address(0));
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldca(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T v) {
    *p = v;
}
template <class T>
void __stcg(T* p, T v) {
    *p = v;
}
template <class T>
void __stwt(T* p, T v) {
    *p = v;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
inline float __uint_as_float(unsigned u) { return emulator::bits_to_float(u); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline long long __double_as_longlong(double d) {
    long long i;
    memcpy(&i, &d, 8);
    return i;
}
inline double __longlong_as_double(long long i) {
    double d;
    memcpy(&d, &i, 8);
    return d;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __saturatef(float x) { return x > 1 ? 1.0f : x > 0 ? x : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ typedef unsigned __int128 Wide;
    return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline long long clock64() {
    const emulator::Inside mark;
    return emulator::clock_time;
}
#define EMULATOR_EXTREMES(T)                         \
    inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_EXTREMES(int)
EMULATOR_EXTREMES(unsigned)
EMULATOR_EXTREMES(long)
EMULATOR_EXTREMES(unsigned long)
EMULATOR_EXTREMES(long long)
EMULATOR_EXTREMES(unsigned long long)
#undef EMULATOR_EXTREMES
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- bf16 and half ---------------------------------------------------------------------------------------------------
namespace emulator {
inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fff;
    const float size = bits_to_float(bits);
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
    if (size < 6.103515625e-05f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rintf(ldexpf(size, 24))));
    bits += 0xfffu + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}
}  // namespace emulator
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) : bits(emulator::float_to_bf16(f)) {}
    operator float() const { return emulator::bits_to_float(static_cast<uint32_t>(bits) << 16); }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float f) : bits(emulator::float_to_half(f)) {}
    operator float() const { return emulator::half_to_float(bits); }
};
typedef __half half;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half2 half2;
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
    __nv_bfloat16 b;
    b.bits = u;
    return b;
}
inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline float __half2float(__half h) { return h; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short u) {
    __half h;
    h.bits = u;
    return h;
}
namespace emulator {
// d += a b on a warp's tiles, in the register layouts of PTX's mma instructions.
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16, EMULATOR_SITE) {
    multiply(Kind::product_16_bit, d, a, 4, b, 2, false, site);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half, EMULATOR_SITE) {
    multiply(Kind::product_16_bit, d, a, 4, b, 2, true, site);
}
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], __half, EMULATOR_SITE) {
    multiply(Kind::product_8, d, a, 2, b, 1, true, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
    multiply(Kind::product_tf32, d, a, 4, b, 2, false, site);
}
}  // namespace emulator

// ---- Streams, events, graphs -----------------------------------------------------------------------------------------
namespace emulator {
typedef std::function<void()> Work;
struct Graph {
    std::vector<Work> nodes;
    std::vector<Stream*> joined;  // the streams that record into it; the first began
    bool bad = false;
};
struct Event {
    Stream* stream = nullptr;
    uint64_t position = 0;
    Graph* graph = nullptr;
    size_t captured = 0;
    double time = 0;
    bool recorded = false;
};
struct Stream {
    std::deque<Work> queue;
    uint64_t done = 0, pushed = 0;
    Graph* graph = nullptr;       // records instead of running
    size_t last = 0, joined = 0;  // of a fork: its last node, and how far the first stream waits for it
};
inline Stream legacy;  // the null stream

// Every call of the interface: counted, and told to fail where the settings say so.
struct Call {
    std::lock_guard<std::recursive_mutex> lock;
    Inside mark;
    cudaError_t error = cudaSuccess;
    explicit Call(bool may_fail = true) : lock(mutex) {
        set_up();
        ++counts.calls;
        if (state.in_host_function) fault("a host function in a stream must not call the interface");
        if (settings.no_device) error = cudaErrorNoDevice;
        else if (state.sticky != cudaSuccess) error = state.sticky;
        else if (may_fail && settings.fail_call > 0 && --settings.fail_call == 0) error = cudaErrorUnknown;
    }
};
inline cudaError_t keep(cudaError_t error) {
    if (error != cudaSuccess && error != cudaErrorNotReady) state.last = error;
    return error;
}
#define EMULATOR_CALL    \
    emulator::Call call; \
    if (call.error != cudaSuccess) return emulator::keep(call.error)
inline bool known(const void* handle) { return state.handles.count(handle) != 0; }

inline void run_to(Stream& s, uint64_t position) {
    const Open open;
    while (s.done < position && !s.queue.empty()) {
        const Work work = std::move(s.queue.front());
        s.queue.pop_front();
        work();
        ++s.done;
    }
}
inline void run_all() {
    run_to(legacy, legacy.pushed);
    for (Stream* s : state.streams) run_to(*s, s->pushed);
}
// The stream of a handle; null for one that is not alive.
inline Stream* stream_of(Stream* handle) { return !handle ? &legacy : state.streams.count(handle) ? handle : nullptr; }
// Queues work, or records it.
inline cudaError_t push(Stream* handle, Work work) {
    Stream* const s = stream_of(handle);
    if (!s) {
        fault("a stream that does not exist");
        return cudaErrorInvalidResourceHandle;
    }
    if (s->graph) {
        if (s->graph->bad) return cudaErrorStreamCaptureInvalidated;
        s->graph->nodes.push_back(std::move(work));
        s->last = s->graph->nodes.size();
        return cudaSuccess;
    }
    if (s == &legacy) {
        if (state.capturing) return cudaErrorStreamCaptureImplicit;
        run_all();
    }
    s->queue.push_back(std::move(work));
    ++s->pushed;
    if (!settings.lazy || s == &legacy) run_to(*s, s->pushed);
    return state.sticky;
}
// What must not happen while a stream records.
inline cudaError_t refuse_capture(Stream* s = nullptr) {
    if (s ? s->graph != nullptr : state.capturing > 0) {
        for (Stream* other : state.streams)
            if (other->graph && (!s || s == other)) other->graph->bad = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    return cudaSuccess;
}
inline void check_range(const void* p, size_t bytes, const char* what) {
    const std::string wrong = wrong_device_range(p, bytes);
    if (!wrong.empty()) {
        fault(std::string(what) + ": " + wrong);
        if (state.sticky == cudaSuccess) state.sticky = cudaErrorIllegalAddress;
    }
}
inline void copy_now(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (state.sticky != cudaSuccess) return;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_device) check_range(to, bytes, "a copy writes");
    else if (in_device(to)) fault("a copy to the host writes " + describe(to));
    if (from_device) check_range(from, bytes, "a copy reads");
    else if (in_device(from)) fault("a copy from the host reads " + describe(from));
    if (state.sticky != cudaSuccess) return;
    mark_written(to, bytes);
    memmove(to, from, bytes);
}
inline cudaMemcpyKind actual(void* to, const void* from, cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDefault) return kind;
    return in_device(to)     ? (in_device(from) ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
           : in_device(from) ? cudaMemcpyDeviceToHost
                             : cudaMemcpyHostToHost;
}
inline cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, Stream* stream) {
    ++counts.copies;
    kind = actual(to, from, kind);
    if (bytes == 0) return cudaSuccess;
    if (!to || !from) return cudaErrorInvalidValue;
    Stream* const s = stream_of(stream);
    const bool recording = s && s->graph;
    if (!recording && kind == cudaMemcpyHostToDevice) counts.sent += static_cast<long long>(bytes);
    if (!recording && kind == cudaMemcpyHostToDevice && !is_pinned(from)) {  // read now, as a real device does with small ones
        auto bytes_now = std::make_shared<std::vector<unsigned char>>(static_cast<const unsigned char*>(from),
                                                                      static_cast<const unsigned char*>(from) + bytes);
        return push(stream, [=] { copy_now(to, bytes_now->data(), bytes, kind); });
    }
    const cudaError_t error = push(stream, [=] { copy_now(to, from, bytes, kind); });
    if (error == cudaSuccess && !recording && kind == cudaMemcpyDeviceToHost && !is_pinned(to)) {
        run_to(*s, s->pushed);
        return state.sticky;
    }
    return error;
}
template <class T>
void check_argument(const T& value) {
    if (std::is_pointer<T>::value) {
        const void* p;
        memcpy(&p, &value, sizeof p);
        if (p && !allocation_of(p))
            fault("kernel " + symbol(launch->kernel, true) + ": an argument points to " + describe(p)),
                state.sticky = cudaErrorIllegalAddress;
        return;
    }
    // Pointers inside a struct: memory that was device memory once must still be. An int with what stands in the padding behind it is none.
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(&value);
    for (size_t i = 0; i + sizeof(void*) <= sizeof value && alignof(T) >= alignof(void*); i += sizeof(void*)) {
        const void* p;
        memcpy(&p, bytes + i, sizeof p);
        const bool may_be_int = (reinterpret_cast<uintptr_t>(p) & 0xffffffffu) < 1u << 20;
        if (!may_be_int && in_device(p) && p < device_next && !allocation_of(p)) {
            const auto* before = allocation_of(static_cast<const unsigned char*>(p) - 1);  // the end of a buffer may be passed
            if (!before)
                fault("kernel " + symbol(launch->kernel, true) + ": an argument holds a pointer to " + describe(p)),
                    state.sticky = cudaErrorIllegalAddress;
        }
    }
}
inline std::string wrong_launch(const Launch& l) {
    const size_t count = static_cast<size_t>(l.block.x) * l.block.y * l.block.z;
    if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || count == 0) return "an empty grid or block";
    if (count > 1024 || l.block.z > 64 || l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535)
        return format("a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads", l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y,
                      l.block.z);
    const auto found = state.dynamic_limit.find(l.kernel);
    const size_t most = found == state.dynamic_limit.end() ? settings.shared : static_cast<size_t>(found->second);
    if (l.dynamic > most) return format("%zu bytes of dynamic shared memory, where %zu are allowed", l.dynamic, most);
    return "";
}
// 8 blocks everywhere, more where it has been allowed.
inline bool cluster_fits(unsigned blocks, const void* kernel) {
    return settings.major >= 9 && blocks <= static_cast<unsigned>(settings.cluster) && (blocks <= 8 || state.large_clusters.count(kernel));
}
}  // namespace emulator
typedef emulator::Stream* cudaStream_t;
typedef emulator::Event* cudaEvent_t;
typedef emulator::Graph* cudaGraph_t;
struct emulator_graph_exec {
    std::vector<emulator::Work> nodes;
};
typedef emulator_graph_exec* cudaGraphExec_t;
typedef emulator::Work* cudaGraphNode_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    EMULATOR_CALL;
    typedef std::tuple<typename std::decay<P>::type...> Arguments;
    ++emulator::counts.launches;
    emulator::Launch l;
    l.kernel = reinterpret_cast<const void*>(kernel);
    l.grid = config->gridDim, l.block = config->blockDim, l.dynamic = config->dynamicSmemBytes;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeCooperative && config->attrs[i].val.cooperative) l.cooperative = true;
        else if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) l.cluster = config->attrs[i].val.clusterDim.x;
    const std::string wrong = emulator::wrong_launch(l);
    if (!wrong.empty()) {
        emulator::fault("kernel " + emulator::symbol(l.kernel, true) + ": launched with " + wrong);
        return emulator::keep(cudaErrorInvalidConfiguration);
    }
    const size_t blocks = static_cast<size_t>(l.grid.x) * l.grid.y * l.grid.z;
    if (l.cluster > 0 && (blocks % l.cluster != 0 || !emulator::cluster_fits(l.cluster, l.kernel))) {
        emulator::fault("kernel " + emulator::symbol(l.kernel, true) + ": clusters that do not divide the grid, or are too large");
        return emulator::keep(cudaErrorInvalidConfiguration);
    }
    if (l.cooperative && (blocks > emulator::most_resident || blocks > static_cast<size_t>(emulator::settings.processors) * 2))
        return emulator::keep(cudaErrorCooperativeLaunchTooLarge);
    emulator::counts.clusters += l.cluster > 0;
    const auto kept = std::make_shared<Arguments>(std::forward<A>(arguments)...);
    l.arguments = kept.get(), l.arguments_size = sizeof(Arguments);
    const auto watched = [kernel](P... values) {
        void (*const start)(P...) = kernel;
        emulator::inside = 0;
        start(values...);
        emulator::inside = 1;
    };
    l.body = [kept, watched] { std::apply(watched, *kept); };
    l.check = [kept] { std::apply([](const auto&... values) { (emulator::check_argument(values), ...); }, *kept); };
    return emulator::keep(emulator::push(config->stream, [l] { emulator::run(l); }));
}

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    EMULATOR_CALL;
    const cudaError_t error = emulator::refuse_capture();
    return emulator::keep(error != cudaSuccess ? error : emulator::allocate(pointer, bytes, false));
}
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
inline cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t stream) {
    return cudaMallocAsync(reinterpret_cast<void**>(pointer), bytes, stream);
}
inline cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    EMULATOR_CALL;
    const cudaError_t error = emulator::refuse_capture();
    return emulator::keep(error != cudaSuccess ? error : emulator::allocate(pointer, bytes, true));
}
template <class T>
cudaError_t cudaHostAlloc(T** pointer, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t bytes, unsigned flags = 0) {
    return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
inline cudaError_t cudaFree(void* pointer) {
    const emulator::Call call(false);
    if (emulator::settings.no_device) return cudaErrorNoDevice;
    if (!pointer) return emulator::keep(call.error);
    const cudaError_t error = emulator::refuse_capture();
    if (error != cudaSuccess) return emulator::keep(error);
    emulator::run_all();  // cudaFree waits
    const cudaError_t freed = emulator::release(pointer, false);
    return emulator::keep(call.error != cudaSuccess ? call.error : freed);
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
    const emulator::Call call(false);
    return emulator::keep(emulator::push(stream, [=] { emulator::release(pointer, false); }));
}
inline cudaError_t cudaFreeHost(void* pointer) {
    const emulator::Call call(false);
    emulator::run_all();
    const cudaError_t freed = emulator::release(pointer, true);
    return emulator::keep(call.error != cudaSuccess ? call.error : freed);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
    EMULATOR_CALL;
    return emulator::keep(emulator::copy(to, from, bytes, kind, stream));
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    EMULATOR_CALL;
    ++emulator::counts.synchronisations;
    return emulator::keep(emulator::copy(to, from, bytes, kind, nullptr));
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
    EMULATOR_CALL;
    if (width > to_pitch || width > from_pitch) return emulator::keep(cudaErrorInvalidPitchValue);
    for (size_t i = 0; i < height; ++i) {
        const cudaError_t error =
            emulator::copy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width, kind, stream);
        if (error != cudaSuccess) return emulator::keep(error);
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream = nullptr) {
    EMULATOR_CALL;
    if (bytes == 0) return cudaSuccess;
    return emulator::keep(emulator::push(stream, [=] {
        if (emulator::state.sticky == cudaSuccess) emulator::check_range(at, bytes, "a memset writes");
        if (emulator::state.sticky != cudaSuccess) return;
        emulator::mark_written(at, bytes);
        memset(at, value, bytes);
    }));
}
inline cudaError_t cudaMemset(void* at, int value, size_t bytes) { return cudaMemsetAsync(at, value, bytes, nullptr); }
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    EMULATOR_CALL;
    *total = emulator::settings.memory, *free_bytes = emulator::settings.memory - emulator::state.used;
    return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* p) {
    EMULATOR_CALL;
    const bool device = emulator::in_device(p), pinned = emulator::is_pinned(p);
    *to = {device   ? cudaMemoryTypeDevice
           : pinned ? cudaMemoryTypeHost
                    : cudaMemoryTypeUnregistered,
           0, device || pinned ? const_cast<void*>(p) : nullptr, device ? nullptr : const_cast<void*>(p)};
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    EMULATOR_CALL;
    *stream = new emulator::Stream;
    emulator::state.streams.insert(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const emulator::Call call(false);
    if (!stream || !emulator::stream_of(stream)) {
        emulator::fault("destroyed a stream that does not exist");
        return emulator::keep(cudaErrorInvalidResourceHandle);
    }
    if (stream->graph) emulator::fault("destroyed a stream that records a graph");
    emulator::run_to(*stream, stream->pushed);
    emulator::state.streams.erase(stream);
    delete stream;
    return emulator::keep(call.error);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMULATOR_CALL;
    ++emulator::counts.synchronisations;
    emulator::Stream* const s = emulator::stream_of(stream);
    if (!s) return emulator::keep(cudaErrorInvalidResourceHandle);
    const cudaError_t error = emulator::refuse_capture(s);
    if (error != cudaSuccess) return emulator::keep(error);
    emulator::run_to(*s, s->pushed);
    return emulator::keep(emulator::state.sticky);
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    EMULATOR_CALL;
    emulator::Stream* const s = emulator::stream_of(stream);
    if (!s) return emulator::keep(cudaErrorInvalidResourceHandle);
    const cudaError_t error = emulator::refuse_capture(s);
    if (error != cudaSuccess) return emulator::keep(error);
    if (s->done == s->pushed) return emulator::state.sticky;
    emulator::run_to(*s, s->done + 1);  // some time passes
    return cudaErrorNotReady;
}
inline cudaError_t cudaDeviceSynchronize() {
    EMULATOR_CALL;
    ++emulator::counts.synchronisations;
    const cudaError_t error = emulator::refuse_capture();
    if (error != cudaSuccess) return emulator::keep(error);
    emulator::run_all();
    return emulator::keep(emulator::state.sticky);
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    EMULATOR_CALL;
    return emulator::keep(emulator::push(stream, [=] {
        emulator::state.in_host_function = true;
        function(data);
        emulator::state.in_host_function = false;
    }));
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    EMULATOR_CALL;
    *event = new emulator::Event;
    emulator::state.handles.insert(*event);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const emulator::Call call(false);
    if (!emulator::known(event)) {
        emulator::fault("destroyed an event that does not exist");
        return emulator::keep(cudaErrorInvalidResourceHandle);
    }
    emulator::run_all();
    emulator::state.handles.erase(event);
    delete event;
    return emulator::keep(call.error);
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    EMULATOR_CALL;
    emulator::Stream* const s = emulator::stream_of(stream);
    if (!s || !emulator::known(event)) return emulator::keep(cudaErrorInvalidResourceHandle);
    event->stream = s, event->recorded = true, event->graph = s->graph;
    if (s->graph) {
        event->captured = s->last;
        return cudaSuccess;
    }
    const cudaError_t error = emulator::push(stream, [event] {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        event->time = static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6 + emulator::state.late;
    });
    event->position = s->pushed;
    return emulator::keep(error);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    EMULATOR_CALL;
    emulator::Stream* const s = emulator::stream_of(stream);
    if (!s || !emulator::known(event)) return emulator::keep(cudaErrorInvalidResourceHandle);
    if (!event->recorded) return cudaSuccess;
    if (event->graph && !s->graph) {  // a fork of the capture
        s->graph = event->graph, s->last = s->joined = 0;
        s->graph->joined.push_back(s);
    }
    if (s->graph) {
        if (event->graph != s->graph) return emulator::keep(cudaErrorStreamCaptureUnsupported);
        if (event->captured > event->stream->joined) event->stream->joined = event->captured;
        return cudaSuccess;
    }
    emulator::Stream* const other = event->stream;
    const uint64_t position = event->position;
    return emulator::keep(emulator::push(stream, [=] {
        if (emulator::stream_of(other == &emulator::legacy ? nullptr : other)) emulator::run_to(*other, position);
    }));
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMULATOR_CALL;
    if (!emulator::known(event)) return emulator::keep(cudaErrorInvalidResourceHandle);
    if (event->graph) return emulator::keep(cudaErrorStreamCaptureUnsupported);
    if (!event->recorded || event->stream->done >= event->position) return emulator::state.sticky;
    emulator::run_to(*event->stream, event->stream->done + 1);
    return cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMULATOR_CALL;
    ++emulator::counts.synchronisations;
    if (!emulator::known(event)) return emulator::keep(cudaErrorInvalidResourceHandle);
    if (event->graph) return emulator::keep(cudaErrorStreamCaptureUnsupported);
    if (event->recorded) emulator::run_to(*event->stream, event->position);
    return emulator::keep(emulator::state.sticky);
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    EMULATOR_CALL;
    if (!emulator::known(from) || !emulator::known(to)) return emulator::keep(cudaErrorInvalidResourceHandle);
    if (from->time == 0.0 || to->time == 0.0) return cudaErrorNotReady;
    *milliseconds = static_cast<float>(to->time - from->time);
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    EMULATOR_CALL;
    if (!stream || !emulator::stream_of(stream) || stream->graph) return emulator::keep(cudaErrorStreamCaptureUnsupported);
    stream->graph = new emulator::Graph;
    stream->graph->joined.push_back(stream);
    stream->last = stream->joined = 0;
    ++emulator::state.capturing;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    emulator::Call call;
    *graph = nullptr;
    if (!stream || !emulator::stream_of(stream) || !stream->graph || stream->graph->joined[0] != stream)
        return emulator::keep(call.error != cudaSuccess ? call.error : cudaErrorStreamCaptureUnmatched);
    emulator::Graph* const g = stream->graph;
    bool unjoined = false;
    for (size_t i = 0; i < g->joined.size(); ++i) {
        emulator::Stream* const s = g->joined[i];
        if (i > 0 && s->joined < s->last) unjoined = true;
        s->graph = nullptr;
    }
    --emulator::state.capturing;
    const cudaError_t error = call.error != cudaSuccess ? call.error
                              : g->bad                  ? cudaErrorStreamCaptureInvalidated
                              : unjoined                ? cudaErrorStreamCaptureUnjoined
                                                        : cudaSuccess;
    if (error != cudaSuccess) {
        delete g;
        return emulator::keep(error);
    }
    emulator::state.handles.insert(g);
    *graph = g;
    return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    EMULATOR_CALL;
    emulator::Stream* const s = emulator::stream_of(stream);
    if (!s) return emulator::keep(cudaErrorInvalidResourceHandle);
    *status = !s->graph ? cudaStreamCaptureStatusNone : s->graph->bad ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long = 0) {
    EMULATOR_CALL;
    if (!emulator::known(graph)) return emulator::keep(cudaErrorInvalidResourceHandle);
    *exec = new emulator_graph_exec{graph->nodes};
    emulator::state.handles.insert(*exec);
    return cudaSuccess;
}
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    EMULATOR_CALL;
    *count = graph->nodes.size();
    return cudaSuccess;
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
    EMULATOR_CALL;
    return emulator::known(exec) ? cudaSuccess : emulator::keep(cudaErrorInvalidResourceHandle);
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EMULATOR_CALL;
    ++emulator::counts.graph_launches;
    if (!emulator::known(exec)) return emulator::keep(cudaErrorInvalidResourceHandle);
    return emulator::keep(emulator::push(stream, [exec] {
        for (const emulator::Work& work : exec->nodes) work();
    }));
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    const emulator::Call call(false);
    if (!emulator::state.handles.erase(exec)) {
        emulator::fault("destroyed a graph that does not exist");
        return emulator::keep(cudaErrorInvalidResourceHandle);
    }
    emulator::run_all();
    delete exec;
    return emulator::keep(call.error);
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    const emulator::Call call(false);
    if (!emulator::state.handles.erase(graph)) {
        emulator::fault("destroyed a graph that does not exist");
        return emulator::keep(cudaErrorInvalidResourceHandle);
    }
    delete graph;
    return emulator::keep(call.error);
}

// ---- The device ------------------------------------------------------------------------------------------------------
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define EMULATOR_ERROR(name, value, text) \
    case name:                            \
        return text;
        EMULATOR_ERRORS(EMULATOR_ERROR)
#undef EMULATOR_ERROR
    }
    return "unrecognized error code";
}
inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define EMULATOR_ERROR(name, value, text) \
    case name:                            \
        return #name;
        EMULATOR_ERRORS(EMULATOR_ERROR)
#undef EMULATOR_ERROR
    }
    return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulator::state.sticky != cudaSuccess ? emulator::state.sticky : emulator::state.last;
    emulator::state.last = cudaSuccess;
    return error;
}
inline cudaError_t cudaPeekAtLastError() { return emulator::state.sticky != cudaSuccess ? emulator::state.sticky : emulator::state.last; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    EMULATOR_CALL;
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    EMULATOR_CALL;
    return emulator::keep(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDevice(int* device) {
    EMULATOR_CALL;
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceReset() {
    emulator::fault("the device is not ours to reset");
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int device) {
    EMULATOR_CALL;
    if (device != 0) return emulator::keep(cudaErrorInvalidDevice);
    const emulator::Settings& s = emulator::settings;
    *to = {};
    snprintf(to->name, sizeof to->name, "emulated device");
    to->totalGlobalMem = s.memory, to->sharedMemPerBlock = s.shared, to->sharedMemPerBlockOptin = s.shared_optin,
    to->sharedMemPerMultiprocessor = s.shared_optin + 1024;
    to->major = s.major, to->minor = s.minor, to->multiProcessorCount = s.processors, to->maxThreadsPerBlock = 1024,
    to->maxThreadsPerMultiProcessor = 2048;
    to->warpSize = 32, to->l2CacheSize = 1 << 20, to->regsPerBlock = 65536, to->cooperativeLaunch = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    EMULATOR_CALL;
    if (device != 0) return emulator::keep(cudaErrorInvalidDevice);
    const emulator::Settings& s = emulator::settings;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = 1024;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = static_cast<int>(s.shared);
            break;
        case cudaDevAttrWarpSize:
            *value = 32;
            break;
        case cudaDevAttrClockRate:
            *value = 1000000;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = s.processors;
            break;
        case cudaDevAttrL2CacheSize:
            *value = 1 << 20;
            break;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = 2048;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = s.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = s.minor;
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = static_cast<int>(s.shared_optin) + 1024;
            break;
        case cudaDevAttrCooperativeLaunch:
            *value = 1;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(s.shared_optin);
            break;
        case cudaDevAttrMemoryPoolsSupported:
            *value = 1;
            break;
    }
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    EMULATOR_CALL;
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && value)
        emulator::state.large_clusters.insert(reinterpret_cast<const void*>(kernel));
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > emulator::settings.shared_optin) return emulator::keep(cudaErrorInvalidValue);
    emulator::state.dynamic_limit[reinterpret_cast<const void*>(kernel)] = value;
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, void (*)(P...)) {
    EMULATOR_CALL;
    *to = {};
    to->maxThreadsPerBlock = 1024, to->numRegs = 32,
    to->ptxVersion = to->binaryVersion = emulator::settings.major * 10 + emulator::settings.minor;
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads, size_t dynamic) {
    EMULATOR_CALL;
    const size_t by_shared = emulator::settings.shared_optin / (dynamic + 1024);
    *blocks = threads > 1024 ? 0 : by_shared < 2 ? static_cast<int>(by_shared) : 2;
    return cudaSuccess;
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...), const cudaLaunchConfig_t* config) {
    EMULATOR_CALL;
    *clusters = 0;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            if (emulator::cluster_fits(config->attrs[i].val.clusterDim.x, reinterpret_cast<const void*>(kernel)))
                *clusters = emulator::settings.processors / static_cast<int>(config->attrs[i].val.clusterDim.x);
    return cudaSuccess;
}

// ---- cuBLASLt: plain products ----------------------------------------------------------------------------------------
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_32I = 10, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C };
enum cublasComputeType_t {
    CUBLAS_COMPUTE_16F = 64,
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_64F = 70,
    CUBLAS_COMPUTE_32F_FAST_16F = 74,
    CUBLAS_COMPUTE_32F_FAST_16BF = 75,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasLtOrder_t { CUBLASLT_ORDER_COL, CUBLASLT_ORDER_ROW };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_DEVICE };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_RELU = 2,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_RELU_BIAS = 6,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_RELU_AUX = 130,
    CUBLASLT_EPILOGUE_RELU_AUX_BIAS = 134,
    CUBLASLT_EPILOGUE_DRELU = 136,
    CUBLASLT_EPILOGUE_DRELU_BGRAD = 152,
    CUBLASLT_EPILOGUE_GELU_AUX = 160,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_DGELU_BGRAD = 208,
    CUBLASLT_EPILOGUE_BGRADA = 256,
    CUBLASLT_EPILOGUE_BGRADB = 512
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET = 15,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_TYPE,
    CUBLASLT_MATRIX_LAYOUT_ORDER,
    CUBLASLT_MATRIX_LAYOUT_ROWS,
    CUBLASLT_MATRIX_LAYOUT_COLS,
    CUBLASLT_MATRIX_LAYOUT_LD,
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_MASK = 7 };
struct cublasLtMatmulAlgo_t {
    uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};
namespace emulator {
struct Context {
    int unused = 0;
};
struct Product {
    int32_t compute = CUBLAS_COMPUTE_32F, scale = CUDA_R_32F, pointer_mode = 0, across_a = 0, across_b = 0,
            epilogue = CUBLASLT_EPILOGUE_DEFAULT, aux_type = -1, bias_type = -1;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_stride = 0;
};
struct Layout {
    int32_t type = 0, order = 0, batch = 1;
    uint64_t rows = 0, columns = 0;
    int64_t stride = 0, batch_stride = 0;
    size_t at(size_t b, size_t row, size_t column) const {
        const size_t ld = static_cast<size_t>(stride);
        return b * static_cast<size_t>(batch_stride) + (order == CUBLASLT_ORDER_ROW ? row * ld + column : row + column * ld);
    }
    size_t elements() const { return rows && columns ? at(static_cast<size_t>(batch) - 1, rows - 1, columns - 1) + 1 : 0; }
};
struct Preference {
    uint64_t workspace = 0;
};
inline size_t size_of(int type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_16F || type == CUDA_R_16BF ? 2 : 4; }
inline float load(const void* p, int type, size_t i) {
    const unsigned char* const at = static_cast<const unsigned char*>(p) + i * size_of(type);
#ifdef EMULATOR_WATCH
    if (in_device(at) && !is_written(at) && settings.unwritten && state.reported.insert(p).second)
        fault("a product reads " + describe(at) + ", which nobody has written");
#endif
    if (type == CUDA_R_16F || type == CUDA_R_16BF) {
        uint16_t bits;
        memcpy(&bits, at, 2);
        return type == CUDA_R_16F ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
    }
    float f;
    memcpy(&f, at, 4);
    return f;
}
inline void store(void* p, int type, size_t i, float f) {
    unsigned char* const at = static_cast<unsigned char*>(p) + i * size_of(type);
    mark_written(at, size_of(type));
    if (type == CUDA_R_16F || type == CUDA_R_16BF) {
        const uint16_t bits = type == CUDA_R_16F ? float_to_half(f) : float_to_bf16(f);
        memcpy(at, &bits, 2);
    } else memcpy(at, &f, 4);
}
inline double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
inline double gelu_slope(double x) {
    const double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}
inline std::string wrong_product(const Product& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const uint64_t m = d.rows, n = d.columns, k = p.across_a ? a.rows : a.columns;
    if ((p.across_a ? a.columns : a.rows) != m || (p.across_b ? b.rows : b.columns) != n || (p.across_b ? b.columns : b.rows) != k ||
        c.rows != m || c.columns != n)
        return format("shapes that do not fit: %zux%zu and %zux%zu to %zux%zu", size_t(a.rows), size_t(a.columns), size_t(b.rows),
                      size_t(b.columns), size_t(m), size_t(n));
    if (m == 0 || n == 0 || k == 0) return "an empty matrix";
    if (a.type != b.type || c.type != d.type || a.batch != d.batch || b.batch != d.batch || c.batch != d.batch)
        return "types or batches that do not fit";
    for (const Layout* l : {&a, &b, &c, &d})
        if (static_cast<uint64_t>(l->stride) < (l->order == CUBLASLT_ORDER_ROW ? l->columns : l->rows))
            return "a leading dimension that is too small";
    return "";
}
inline void multiply(const Product& p, float alpha, const void* a, const Layout& la, const void* b, const Layout& lb, float beta,
                     const void* c, const Layout& lc, void* d, const Layout& ld, void* workspace, size_t workspace_bytes) {
    if (state.sticky != cudaSuccess) return;
    ++counts.products;
    const size_t m = ld.rows, n = ld.columns, k = p.across_a ? la.rows : la.columns;
    const int bias_type = p.bias_type < 0 ? ld.type : p.bias_type, aux_type = p.aux_type < 0 ? ld.type : p.aux_type;
    const bool adds_bias = (p.epilogue & 4) != 0, sums_rows = (p.epilogue & 16) != 0, sums_a = p.epilogue == CUBLASLT_EPILOGUE_BGRADA,
               sums_b = p.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    const bool has_aux = (p.epilogue & 128) != 0, relu = (p.epilogue & 2) != 0, gelu_forward = (p.epilogue & 32) != 0,
               gelu_back = (p.epilogue & 64) != 0, relu_back = (p.epilogue & 8) != 0;
    check_range(a, la.elements() * size_of(la.type), "a product reads");
    check_range(b, lb.elements() * size_of(lb.type), "a product reads");
    check_range(d, ld.elements() * size_of(ld.type), "a product writes");
    if (beta != 0.0f) check_range(c, lc.elements() * size_of(lc.type), "a product reads");
    if (adds_bias || sums_rows || sums_a || sums_b) check_range(p.bias, (sums_b ? n : m) * size_of(bias_type), "a product's bias");
    if (has_aux) check_range(p.aux, (static_cast<size_t>(p.aux_stride) * (n - 1) + m) * size_of(aux_type), "a product's auxiliary matrix");
    if (workspace_bytes) check_range(workspace, workspace_bytes, "a product's workspace");
    if (state.sticky != cudaSuccess) return;
    if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
    const bool tf32 = p.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && la.type == CUDA_R_32F && settings.rounds_tf32;
    std::vector<float> rows(m * k), columns(n * k);
    std::vector<double> row_sums(m), a_sums(m), b_sums(n);
    for (size_t batch = 0; batch < static_cast<size_t>(ld.batch); ++batch) {
        for (size_t i = 0; i < m; ++i)
            for (size_t j = 0; j < k; ++j) {
                const float x = load(a, la.type, p.across_a ? la.at(batch, j, i) : la.at(batch, i, j));
                rows[i * k + j] = tf32 ? to_tf32(x) : x, a_sums[i] += static_cast<double>(x);
            }
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j < k; ++j) {
                const float x = load(b, lb.type, p.across_b ? lb.at(batch, i, j) : lb.at(batch, j, i));
                columns[i * k + j] = tf32 ? to_tf32(x) : x, b_sums[i] += static_cast<double>(x);
            }
        for (size_t j = 0; j < n; ++j)
            for (size_t i = 0; i < m; ++i) {
                double sum = 0;
                for (size_t l = 0; l < k; ++l) sum += static_cast<double>(rows[i * k + l]) * static_cast<double>(columns[j * k + l]);
                double x = static_cast<double>(alpha) * sum;
                if (beta != 0.0f) x += static_cast<double>(beta) * static_cast<double>(load(c, lc.type, lc.at(batch, i, j)));
                if (adds_bias) x += static_cast<double>(load(p.bias, bias_type, i));
                const size_t aux = i + j * static_cast<size_t>(p.aux_stride);
                if (has_aux && gelu_forward) store(p.aux, aux_type, aux, static_cast<float>(x));
                if (gelu_forward) x = gelu(x);
                if (relu) x = x > 0 ? x : 0;
                if (gelu_back) x *= gelu_slope(static_cast<double>(load(p.aux, aux_type, aux)));
                if (relu_back || (has_aux && relu)) fault("the emulator does not know the masks of RELU_AUX");
                row_sums[i] += x;
                store(d, ld.type, ld.at(batch, i, j), static_cast<float>(x));
            }
    }
    for (size_t i = 0; i < m && (sums_rows || sums_a); ++i)
        store(p.bias, bias_type, i, static_cast<float>(sums_a ? a_sums[i] : row_sums[i]));
    for (size_t i = 0; i < n && sums_b; ++i) store(p.bias, bias_type, i, static_cast<float>(b_sums[i]));
}
template <class T>
cublasStatus_t make(T** handle) {
    const Call call;
    *handle = nullptr;
    if (call.error != cudaSuccess) return CUBLAS_STATUS_INTERNAL_ERROR;
    *handle = new T;
    state.handles.insert(*handle);
    return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t unmake(T* handle) {
    const Call call(false);
    if (!state.handles.erase(handle)) {
        fault("destroyed a cuBLASLt object that does not exist");
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t set(T& to, const void* from, size_t bytes) {
    if (bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace emulator
typedef emulator::Context* cublasLtHandle_t;
typedef emulator::Product* cublasLtMatmulDesc_t;
typedef emulator::Layout* cublasLtMatrixLayout_t;
typedef emulator::Preference* cublasLtMatmulPreference_t;
inline size_t cublasLtGetVersion() { return 130000; }
inline const char* cublasLtGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "success";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "the library was not initialized";
        case CUBLAS_STATUS_ALLOC_FAILED:
            return "the resource allocation failed";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "an invalid value was used as a parameter";
        case CUBLAS_STATUS_ARCH_MISMATCH:
            return "an absent device architectural feature is required";
        case CUBLAS_STATUS_MAPPING_ERROR:
            return "an access to GPU memory space failed";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "the function failed to launch on the GPU";
        case CUBLAS_STATUS_INTERNAL_ERROR:
            return "an internal operation failed";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "the requested functionality is not supported";
        case CUBLAS_STATUS_LICENSE_ERROR:
            return "the functionality requested requires some license";
    }
    return "unknown status";
}
inline const char* cublasGetStatusString(cublasStatus_t status) { return cublasLtGetStatusString(status); }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return emulator::make(handle); }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return emulator::unmake(handle); }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t compute, cudaDataType_t scale) {
    const cublasStatus_t status = emulator::make(product);
    if (*product) (*product)->compute = compute, (*product)->scale = scale;
    return status;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) { return emulator::unmake(product); }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t which, const void* from,
                                                     size_t bytes) {
    const emulator::Call call;
    if (call.error != cudaSuccess) return CUBLAS_STATUS_INTERNAL_ERROR;
    switch (which) {
        case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
            return emulator::set(product->compute, from, bytes);
        case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
            return emulator::set(product->scale, from, bytes);
        case CUBLASLT_MATMUL_DESC_POINTER_MODE:
            return emulator::set(product->pointer_mode, from, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return emulator::set(product->across_a, from, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return emulator::set(product->across_b, from, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return emulator::set(product->epilogue, from, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return emulator::set(product->bias, from, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return emulator::set(product->aux, from, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return emulator::set(product->aux_stride, from, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
            return emulator::set(product->aux_type, from, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            return emulator::set(product->bias_type, from, bytes);
        case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
            return CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t stride) {
    const cublasStatus_t status = emulator::make(layout);
    if (*layout) (*layout)->type = type, (*layout)->rows = rows, (*layout)->columns = columns, (*layout)->stride = stride;
    return status;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return emulator::unmake(layout); }
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which,
                                                       const void* from, size_t bytes) {
    const emulator::Call call;
    if (call.error != cudaSuccess) return CUBLAS_STATUS_INTERNAL_ERROR;
    switch (which) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE:
            return emulator::set(layout->type, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ORDER:
            return emulator::set(layout->order, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            return emulator::set(layout->rows, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            return emulator::set(layout->columns, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_LD:
            return emulator::set(layout->stride, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            return emulator::set(layout->batch, from, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return emulator::set(layout->batch_stride, from, bytes);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) { return emulator::make(preference); }
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return emulator::unmake(preference); }
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t which, const void* from, size_t bytes) {
    const emulator::Call call;
    if (call.error != cudaSuccess) return CUBLAS_STATUS_INTERNAL_ERROR;
    return which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? emulator::set(preference->workspace, from, bytes) : CUBLAS_STATUS_SUCCESS;
}
// Offers the same plan three times, each asking for more workspace (and see settings.plans_differ).
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int most,
                                                     cublasLtMatmulHeuristicResult_t* results, int* count) {
    const emulator::Call call;
    *count = 0;
    if (call.error != cudaSuccess || !emulator::known(handle)) return CUBLAS_STATUS_INTERNAL_ERROR;
    if (!emulator::wrong_product(*product, *a, *b, *c, *d).empty()) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!emulator::settings.mixed_bias && product->epilogue != CUBLASLT_EPILOGUE_DEFAULT && a->type != d->type)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = 0; i < most && i < 3 && static_cast<uint64_t>(i) * 1024 <= preference->workspace; ++i) {
        results[i] = {};
        results[i].algo.data[0] = 0x616c676fu, results[i].algo.data[1] = static_cast<uint64_t>(i),
        results[i].workspaceSize = static_cast<size_t>(i) * 1024, results[i].wavesCount = 1;
        *count = i + 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void* alpha, const void* a,
                                     cublasLtMatrixLayout_t layout_a, const void* b, cublasLtMatrixLayout_t layout_b, const void* beta,
                                     const void* c, cublasLtMatrixLayout_t layout_c, void* d, cublasLtMatrixLayout_t layout_d,
                                     const cublasLtMatmulAlgo_t* plan, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    const emulator::Call call;
    if (call.error != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (!emulator::known(handle) || !emulator::known(product) || !emulator::known(layout_a) || !emulator::known(layout_b) ||
        !emulator::known(layout_c) || !emulator::known(layout_d) || (plan && plan->data[0] != 0x616c676fu) || product->scale != CUDA_R_32F)
        return CUBLAS_STATUS_INVALID_VALUE;
    const emulator::Product p = *product;
    const emulator::Layout la = *layout_a, lb = *layout_b, lc = *layout_c, ld = *layout_d;
    const std::string wrong = emulator::wrong_product(p, la, lb, lc, ld);
    if (!wrong.empty()) {
        emulator::fault("a product of " + wrong);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    float scales[2] = {};  // read now, or by the device when the product runs
    const bool later = p.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
    if (!later) memcpy(&scales[0], alpha, sizeof(float)), memcpy(&scales[1], beta, sizeof(float));
    const float alpha_now = scales[0], beta_now = scales[1];
    const uint64_t number = plan ? plan->data[1] : 0;
    const cudaError_t error = emulator::push(stream, [=] {
        float s = alpha_now, t = beta_now;
        if (later) memcpy(&s, alpha, sizeof s), memcpy(&t, beta, sizeof t);
        ++emulator::counts.by_plan[number];
        if (emulator::settings.plans_differ && number == 0) emulator::state.late += 10;
        if (emulator::settings.plans_differ && number == 1) s *= 1.01f;
        emulator::multiply(p, s, a, la, b, lb, t, c, lc, d, ld, workspace, workspace_bytes);
    });
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

// ---- For tests -------------------------------------------------------------------------------------------------------
namespace emulator {
// Forgets faults and errors, as a new process would; what is still allocated stays.
inline void forget() {
    const Inside mark;
    state.faults.clear();
    state.reported.clear();
    state.last = state.sticky = cudaSuccess;
    settings.quiet = false;
    settings.fail_call = settings.fail_allocation = 0;
}
// Whether a fault was found whose text holds these words.
inline bool found(const char* words) {
    for (const std::string& text : state.faults)
        if (strstr(text.c_str(), words)) return true;
    return false;
}
// What has not been freed or destroyed.
inline size_t alive() { return state.allocations.size() + state.streams.size() + state.handles.size(); }
}  // namespace emulator

// ---- The compiler's calls for each access ------------------------------------------------------------------------------
#ifdef EMULATOR_WATCH
EMULATOR_PLAIN inline void emulator_watch(const void* p, size_t bytes, bool write, const void* pc) {
    if (!emulator::now || emulator::inside) return;
    emulator::inside = emulator::inside + 1;
    emulator::watch(p, bytes, write, pc);
    emulator::inside = emulator::inside - 1;
}
extern "C" {
#define EMULATOR_PC __builtin_return_address(0)
#define EMULATOR_ACCESS(size)                                                                                 \
    EMULATOR_PLAIN void __tsan_read##size(void* p) { emulator_watch(p, size, false, EMULATOR_PC); }           \
    EMULATOR_PLAIN void __tsan_write##size(void* p) { emulator_watch(p, size, true, EMULATOR_PC); }           \
    EMULATOR_PLAIN void __tsan_unaligned_read##size(void* p) { emulator_watch(p, size, false, EMULATOR_PC); } \
    EMULATOR_PLAIN void __tsan_unaligned_write##size(void* p) { emulator_watch(p, size, true, EMULATOR_PC); } \
    EMULATOR_PLAIN void __tsan_volatile_read##size(void* p) { emulator_watch(p, size, false, EMULATOR_PC); }  \
    EMULATOR_PLAIN void __tsan_volatile_write##size(void* p) { emulator_watch(p, size, true, EMULATOR_PC); }  \
    EMULATOR_PLAIN void __tsan_read_write##size(void* p) {                                                    \
        emulator_watch(p, size, false, EMULATOR_PC), emulator_watch(p, size, true, EMULATOR_PC);              \
    }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
#undef EMULATOR_ACCESS
EMULATOR_PLAIN void __tsan_read_range(void* p, size_t n) { emulator_watch(p, n, false, EMULATOR_PC); }
EMULATOR_PLAIN void __tsan_write_range(void* p, size_t n) { emulator_watch(p, n, true, EMULATOR_PC); }
EMULATOR_PLAIN void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emulator_watch(from, n, false, EMULATOR_PC), emulator_watch(to, n, true, EMULATOR_PC);
    return memcpy(to, from, n);
}
EMULATOR_PLAIN void* __tsan_memmove(void* to, const void* from, size_t n) {
    emulator_watch(from, n, false, EMULATOR_PC), emulator_watch(to, n, true, EMULATOR_PC);
    return memmove(to, from, n);
}
EMULATOR_PLAIN void* __tsan_memset(void* to, int value, size_t n) {
    emulator_watch(to, n, true, EMULATOR_PC);
    return memset(to, value, n);
}
EMULATOR_PLAIN void __tsan_init() {}
EMULATOR_PLAIN void __tsan_func_entry(void*) {}
EMULATOR_PLAIN void __tsan_func_exit() {}
EMULATOR_PLAIN void __tsan_vptr_update(void**, void*) {}
EMULATOR_PLAIN void __tsan_vptr_read(void**) {}
// Atomics of the host's own code (counters, once-only initialisation): plain ones do, in the order of the strongest.
#define EMULATOR_HOST_ATOMICS(bits, T)                                                                                               \
    EMULATOR_PLAIN T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
    EMULATOR_PLAIN void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
    EMULATOR_PLAIN T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
    EMULATOR_PLAIN T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
    EMULATOR_PLAIN T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
    EMULATOR_PLAIN T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }   \
    EMULATOR_PLAIN T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
    EMULATOR_PLAIN int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* was, T v, int, int) {                         \
        return __atomic_compare_exchange_n(p, was, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                    \
    }                                                                                                                                \
    EMULATOR_PLAIN int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* was, T v, int, int) {                           \
        return __atomic_compare_exchange_n(p, was, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                    \
    }
EMULATOR_HOST_ATOMICS(8, uint8_t)
EMULATOR_HOST_ATOMICS(16, uint16_t)
EMULATOR_HOST_ATOMICS(32, uint32_t)
EMULATOR_HOST_ATOMICS(64, uint64_t)
#undef EMULATOR_HOST_ATOMICS
EMULATOR_PLAIN void __tsan_atomic_thread_fence(int) { __asm__ volatile("" ::: "memory"); }
EMULATOR_PLAIN void __tsan_atomic_signal_fence(int) {}
#undef EMULATOR_PC
}
#endif

#endif
