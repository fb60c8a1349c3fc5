// babygpt_cuda.cu - training, evaluation and generation with babygpt.h on an NVIDIA GPU: one file beside the header. MIT licence (chapter 12).
//
// [CHAPTER 0] Read me
//
// What it is.  The same tape (babygpt.h, chapters 4 to 6) on a device: every op forward and backward, the loss, the gradient's norm, clipping,
// AdamW or Muon. Weights, gradients, moments and activations lie there, and running text (up to 1 GiB of ids): the host says where a batch's windows
// begin in it, or sends its ids, and gets a loss. The checkpoint is the same, and so is the result but for rounding: a run may begin on the
// processor, go on here, and end there.
//
// Do this.  Compile this file with nvcc and add it to the program; there is nothing to register, and nothing else changes:
//
//     nvcc -O3 -arch=native -c babygpt_cuda.cu                  (-arch=all-major: for other people's machines, too)
//     g++ -std=c++17 -O2 -pthread program.cpp babygpt_cuda.o -L/usr/local/cuda/lib64 -lcudart -lcublasLt -o program
//
// Then set Runtime::backend = Backend::cuda, and Runtime::precision = Precision::bf16 for speed. Without this file the library says that the program was built without CUDA.
//
// What there is.                                              What there is not.
//     all architectures, all ops, dropout, LoRA                   sessions with adapters or a source, encoders, and where a block has
//                                                                 too little shared memory (64 KB, before 2020): on the processor
//     float32; products by cuBLASLt in tf32; all of it in bf16;   sessions in fp16: they run in float32
//     or in fp16 with a loss's scale, also on GPUs before 2020
//     the same random numbers as on the processor                 more than one GPU in a Trainer
//     the same bits from run to run: no atomics                   Windows: nothing known against it, never tried
//     one graph launch a step, no waiting; memory taken once      sampling there, where few sessions ask, or penalties, biases,
//     AdamW, Muon; sessions of decoders: one launch a token,      banned strings or guards: the processor does it
//     of all; many sessions' next tokens, drawn in the same launch
//
// What it promises.  As the header: nothing throws, prints or exits; every error of CUDA becomes a Status that names the call and the reason.
// The device is the calling thread's current one when the object is made; it is never reset, and the thread's current device stays.
// Memory is known before (Memory::device) and taken in one piece; where there is not enough of it, that is an ordinary error.
//
// How to read it.  The chapters are the header's; the formulas, too, which are only named again here. Search for "[CHAPTER n]":
//
//     2  the platform corner: errors, launches        6  walking the tape
//     4  memory: one block, planned                   7  learning: norm, clipping, AdamW, Muon
//     5  the ops: kernels, each with its layout       8  running a model: a session's token in one launch
//                                                    11  what the header calls; 12  licence

#ifdef __CUDACC__
#ifdef __clang__  // as a host: of functions in NVIDIA's header that are for the device
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wunused-function"
#endif
#include <cooperative_groups.h>
#ifdef __clang__
#pragma clang diagnostic pop
#endif
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define BABYGPT_SHARED(T, name, count) __shared__ T name[count]
#define BABYGPT_DYNAMIC_SHARED(name)                                   \
    extern __shared__ __align__(128) unsigned char shared_of_launch[]; \
    unsigned char* const name = shared_of_launch
#define BABYGPT_PRAGMA(text) _Pragma(#text)
#define BABYGPT_UNROLL(times) BABYGPT_PRAGMA(unroll times)
#define BABYGPT_TIMES(i, n) _Pragma("unroll") for (int i = 0; i < static_cast<int>(n); ++i)  // unrolled: arrays become registers
#elif defined(BABYGPT_CUDA_EMULATOR)
#define BABYGPT_UNROLL(times)
#define BABYGPT_TIMES(i, n) for (int i = 0; i < static_cast<int>(n); ++i)
#else
#error "babygpt_cuda.cu: compile this file with nvcc"
#endif

#ifdef __CUDACC__
#pragma nv_diagnostic push
#pragma nv_diag_suppress 554  // nvcc thinks ill of Span's conversion to Span<const T> where T is const
#endif
#define BABYGPT_DEVICE
#include "babygpt.h"
#undef BABYGPT_DEVICE
#ifdef __CUDACC__
#pragma nv_diagnostic pop
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

// =====================================================================================================================
// [CHAPTER 2] The platform corner: errors, launches, random numbers
// =====================================================================================================================

namespace babygpt {
namespace cuda {

using namespace records;

// The call's name and CUDA's reason.
Status trouble(const char* call, cudaError_t error) {
    Status status;
    const char* end = strchr(call, '(');
    status.error = error == cudaErrorMemoryAllocation ? Error::out_of_memory : Error::device;
    snprintf(status.message, sizeof status.message, "CUDA: %.*s failed: %s", end ? static_cast<int>(end - call) : 40, call,
             cudaGetErrorString(error));
    return status;
}
Status trouble(const char* call, cublasStatus_t error) {
    Status status;
    const char* end = strchr(call, '(');
    status.error = error == CUBLAS_STATUS_ALLOC_FAILED ? Error::out_of_memory : Error::device;
    snprintf(status.message, sizeof status.message, "cuBLASLt: %.*s failed: %s", end ? static_cast<int>(end - call) : 40, call,
             cublasLtGetStatusString(error));
    return status;
}
Status refuse(Error error, const char* text) {
    Status status;
    status.error = error;
    snprintf(status.message, sizeof status.message, "%s", text);
    return status;
}
#define BABYGPT_CUDA(call)                                                                       \
    do {                                                                                         \
        const cudaError_t babygpt_error = (call);                                                \
        if (babygpt_error != cudaSuccess) return ::babygpt::cuda::trouble(#call, babygpt_error); \
    } while (false)
#define BABYGPT_CUBLAS(call)                                                                               \
    do {                                                                                                   \
        const cublasStatus_t babygpt_error = (call);                                                       \
        if (babygpt_error != CUBLAS_STATUS_SUCCESS) return ::babygpt::cuda::trouble(#call, babygpt_error); \
    } while (false)
#define BABYGPT_CUDA_TRY(expression)                     \
    do {                                                 \
        const Status babygpt_status = (expression);      \
        if (!babygpt_status.ok()) return babygpt_status; \
    } while (false)

// The object's device is current while it works; then the host's own is again.
struct Current {
    int before = 0;
    cudaError_t error;
    explicit Current(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess) error = cudaSetDevice(device);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    Status ok() const { return error == cudaSuccess ? Status() : trouble("cudaSetDevice", error); }
    ~Current() { (void)cudaSetDevice(before); }
};

constexpr int warp = 32, block_threads = 256, block_warps = block_threads / warp;

template <class T>
__host__ __device__ constexpr T lesser(T a, T b) {
    return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T greater(T a, T b) {
    return a < b ? b : a;
}
__host__ __device__ constexpr int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory on the current device; `advice` is for where there is not enough.
Status take_block(uint64_t bytes, void*& block, const char* advice) {
    const cudaError_t taken = cudaMalloc(&block, static_cast<size_t>(bytes));
    if (taken == cudaSuccess) return Status();
    block = nullptr;
    if (taken != cudaErrorMemoryAllocation) return trouble("cudaMalloc", taken);
    size_t left = 0, all = 0;
    (void)cudaMemGetInfo(&left, &all);
    Status status;
    status.error = Error::out_of_memory;
    snprintf(status.message, sizeof status.message, "out of memory: %llu bytes of the GPU's were asked for, %llu of %llu are free: %s",
             static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(left), static_cast<unsigned long long>(all), advice);
    (void)cudaGetLastError();  // it has been said
    return status;
}

// The calling thread's current GPU, if there is one at all.
Status find_gpu(int& ordinal) {
    int count = 0;
    const cudaError_t found = cudaGetDeviceCount(&count);
    if (found == cudaErrorInsufficientDriver)
        return refuse(Error::unsupported,
                      "the NVIDIA driver is missing, or older than the CUDA that babygpt_cuda.cu was compiled with: update it, or choose "
                      "the backend cpu");
    if (found == cudaErrorNoDevice || (found == cudaSuccess && count == 0))
        return refuse(Error::unsupported, "there is no NVIDIA GPU in this machine: choose the backend cpu");
    if (found != cudaSuccess) return trouble("cudaGetDeviceCount", found);
    BABYGPT_CUDA(cudaGetDevice(&ordinal));
    return Status();
}

// ---- inside a kernel -------------------------------------------------------------------------------------------------

// Two layouts serve most ops. Over elements: thread after thread, all over the grid. Over rows: a warp has a row, its lanes columns beside each
// other.
__device__ __forceinline__ int64_t first_element() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ __forceinline__ int first_row() { return static_cast<int>(blockIdx.x * (blockDim.x / warp) + threadIdx.x / warp); }
__device__ __forceinline__ int all_warps() { return static_cast<int>(gridDim.x * (blockDim.x / warp)); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % warp); }

// Of all lanes, for all lanes: a butterfly, in an order that never changes.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int apart = warp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}
__device__ __forceinline__ float warp_most(float x) {
    for (int apart = warp / 2; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
}
__device__ __forceinline__ int warp_most(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
    for (int apart = warp / 2; apart > 0; apart /= 2) x = greater(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
#endif
}

// What activations and their gradients are in memory is called Real: float, or, with Precision::bf16, __nv_bfloat16, or, with Precision::fp16,
// __half. They are computed with as float.
template <class Real>
constexpr bool is_half = false;
template <>
inline constexpr bool is_half<__half> = true;
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }
// Two of 16 bits in a register, the first in its lower half.
template <class Real = __nv_bfloat16>
__device__ __forceinline__ uint32_t two(float low, float high) {
    if constexpr (is_half<Real>) {
        const __half2 both = __floats2half2_rn(low, high);
        return static_cast<uint32_t>(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
    }
}
template <class Real = __nv_bfloat16>
__device__ __forceinline__ float low_of(uint32_t both) {
    if constexpr (is_half<Real>) return __half2float(__ushort_as_half(static_cast<unsigned short>(both & 0xffffu)));
    else return __uint_as_float(both << 16);
}
template <class Real = __nv_bfloat16>
__device__ __forceinline__ float high_of(uint32_t both) {
    if constexpr (is_half<Real>) return __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16)));
    else return __uint_as_float(both & 0xffff0000u);
}
// `size` of them beside each other, by one access: at places that are a multiple of it.
template <class T, size_t size>
struct alignas(sizeof(T) * size) Pack {
    T at[size];
};
// The same as they lie in memory: those of 16 bits by twos.
template <class Real, size_t size>
struct RawOf {
    using type = Pack<uint32_t, size / 2>;
};
template <size_t size>
struct RawOf<float, size> {
    using type = Pack<float, size>;
};
template <class Real, size_t size>
using Raw = typename RawOf<Real, size>::type;
template <class Real, size_t size>
__device__ __forceinline__ void widen(float (&to)[size], const Raw<Real, size>& from) {
    if constexpr (sizeof(Real) == sizeof(float))
        for (size_t i = 0; i < size; ++i) to[i] = from.at[i];
    else
        for (size_t i = 0; i < size / 2; ++i) to[2 * i] = low_of<Real>(from.at[i]), to[2 * i + 1] = high_of<Real>(from.at[i]);
}
template <size_t size, class Real>
__device__ __forceinline__ Raw<Real, size> raw(const Real* from) {
    return *reinterpret_cast<const Raw<Real, size>*>(from);
}
template <size_t size, class Real>
__device__ __forceinline__ void load(float (&to)[size], const Real* from) {
    if constexpr (size == 1) to[0] = static_cast<float>(*from);
    else widen<Real>(to, raw<size>(from));
}
template <size_t size>
__device__ __forceinline__ void store(float* to, const float (&from)[size]) {
    Pack<float, size> pack;
    for (size_t i = 0; i < size; ++i) pack.at[i] = from[i];
    *reinterpret_cast<Pack<float, size>*>(to) = pack;
}
template <size_t size, class Narrow>
__device__ __forceinline__ void store(Narrow* to, const float (&from)[size]) {
    if constexpr (size == 1) put(to, from[0]);
    else {
        Pack<uint32_t, size / 2> pack;
        for (size_t i = 0; i < size / 2; ++i) pack.at[i] = two<Narrow>(from[2 * i], from[2 * i + 1]);
        *reinterpret_cast<Pack<uint32_t, size / 2>*>(to) = pack;
    }
}
template <int n>
struct Size {
    static constexpr int value = n;
    static constexpr size_t many = n;  // of an array
};
// Over elements: f(i, Size<n>()) for elements i to i + n - 1, 16 bytes of them where there are as many.
template <class Real, class F>
__device__ __forceinline__ void over_all(int64_t count, const F& f) {
    constexpr int size = 16 / static_cast<int>(sizeof(Real));
    for (int64_t i = first_element() * size; i < count; i += all_threads() * size) {
        if (i + size <= count) f(i, Size<size>());
        else
            for (int64_t rest = i; rest < count; ++rest) f(rest, Size<1>());
    }
}
// A row's columns, by the lanes of a warp: four at a time where n is a multiple of it.
template <class F>
__device__ __forceinline__ void over_columns(int n, const F& f) {
    if (n % 4 == 0)
        for (int c = 4 * lane(); c < n; c += 4 * warp) f(c, Size<4>());
    else
        for (int c = lane(); c < n; c += warp) f(c, Size<1>());
}

// The header's random numbers (chapter 2).
__device__ __forceinline__ uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
__device__ __forceinline__ uint32_t bits_of(uint64_t key, uint32_t i) {
    uint32_t x = ((i + static_cast<uint32_t>(key)) * 0x9e3779b9u) ^ static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// =====================================================================================================================
// [CHAPTER 4] Memory
// =====================================================================================================================

// What changes from run to run: the host writes it down, and it is copied before each run; so a graph that was captured once serves all.
struct Now {
    int rows[3];    // of each side
    int sequences;  // of the text; where there is a source, as many of it
    int targets;    // rows of the head
    int fresh;      // no run's loss has been added up yet
    int weighted;   // the targets' weights were sent, and are not all 1
    int result;     // of an update: where the host reads what came of it
    uint32_t drop_below;
    float drop_keep;
    uint64_t seed, step, first_row[3];
    double smoothing;
    AdamW adam;
    Muon muon;
    double count, clip;  // count: as in DeviceUpdate
};
// Where a row stands.
struct Where {
    int position, sequence;
};
struct Place {
    int row, length, position;
    int start;  // in the text that lies here; -1: the ids were sent
};
// What the device says after an update.
struct Sums {
    double loss, targets, norm;  // targets: so many count
    float scale;
    int skipped;
};

// A matrix that Muon makes orthogonal: rows x cols, `stride` apart, n of the shorter side. It lies at `at` among the weights.
struct MuonMatrix {
    int64_t at, stride, space;  // space: of its five squares n x n, in floats
    int rows, cols, n;
    float longer;  // sqrt(max(1, outputs / inputs))
    __host__ __device__ int64_t square() const { return parts_of(static_cast<int64_t>(n) * n, 16) * 16; }
};

// Everything on the device, in this order, in one block.
struct Memory {
    float *weights, *adapter, *gradients, *moment1, *moment2, *waves;
    void *activations, *low, *logits;  // Real
    unsigned char* ways;               // of each 16 learnt weights: how they learn
    MuonMatrix* matrices;              // that Muon keeps apart,
    float* turned;                     // and by how much what it makes of one is multiplied
    double *losses, *partial;
    int32_t* ranks;
    Sums* sums;
    uint32_t *keys[2], *counts;  // sorting: an id and its row, twice; how often each digit is in each block
    int32_t* sorted_rows[2];
    uint32_t* totals;          // of each digit
    float* parts;              // of products over rows; embedding_backward's edges
    float* row_parts;          // of sums over rows, until they are added
    void* narrow_weights;      // a copy, of Real, where that has 16 bits
    float* loss_scale;         // Precision::fp16: by how much gradients are too large, and how many updates it has been good for
    unsigned char* workspace;  // cuBLASLt's, where there are tensor cores
    int32_t* text;             // the ids of what it learns from, sent once
    Where* where[2];
    // Sent for each run, from a copy that the host has.
    Now* now;
    Place* places[2];
    int32_t *ids[2], *targets;
    float *row_weights, *features;
};

constexpr int most_splits = 64;     // of a product's sum over rows
constexpr int fixed_shared = 1024;  // of a kernel that has dynamic shared memory, too: at most
constexpr int most_parts = 512;     // of a sum over rows alone
#ifdef BABYGPT_CUDA_EMULATOR
constexpr int64_t scratch_logits = 1 << 12;  // tests are small, and shall see several chunks
constexpr int64_t room_for_row_parts = 1 << 7;
constexpr int times_tried = 2;
constexpr size_t workspace_bytes = 4096;
#else
constexpr size_t workspace_bytes = size_t(32) << 20;  // what NVIDIA recommends for Hopper
constexpr int64_t scratch_logits = 1 << 27;           // of the head, at once: so many rows that dW's own traffic does not count
constexpr int times_tried = 4;
constexpr int64_t room_for_row_parts = 1 << 24;  // those of a step's ops, where they are not very many
#endif
constexpr int square_blocks_there = 512;
constexpr int sort_block = block_threads, digits = 256;
constexpr int edge_rows = 64;  // sorted rows that a block of embedding_backward sums

// A sum over so many rows is made of so many parts, which are added in order.
inline int parts_of_rows(int64_t rows) { return static_cast<int>(greater<int64_t>(1, lesser<int64_t>(most_parts, rows / 32))); }
// Of those of attention's backward pass a tile of a sequence makes one: so many, whatever the device makes of its shared memory.
constexpr int least_tile_rows = 32;
inline int64_t parts_of_tiles(const DevicePlan& plan) { return plan.sequences * parts_of(plan.context, least_tile_rows); }
// For the parts of sums over rows that are added together: of all ops, where that is not too much, or at least of one.
inline int64_t row_parts_room(const DevicePlan& plan) {
    int64_t all = 0, most = 0;
    for (const Op& op : plan.ops) {
        const int64_t count = parts_of_rows(plan.max_rows[static_cast<int>(op.side)]);
        const bool biased = (op.kind == OpKind::linear && op.bias_sum == nothing) || op.kind == OpKind::head;
        const int64_t size = op.kind == OpKind::norm                                  ? 3 * count * op.in
                             : biased && op.b != nothing                              ? count * op.out
                             : op.kind == OpKind::attention && op.bias_sum != nothing ? greater(count, parts_of_tiles(plan)) * op.in
                                                                                      : 0;
        all += size, most = greater(most, size);
    }
    return plan.training && !plan.frozen ? greater(most, lesser(all, room_for_row_parts)) : 0;
}
// The same of a product, whose tiles of `tile` by `tile` elements are blocks, too: no more parts than keep a large device busy.
constexpr int tile = 64;
inline int splits_of(int64_t rows, int64_t in, int64_t out) {
    constexpr int64_t busy = 512;
    const int64_t most = greater<int64_t>(1, lesser<int64_t>(most_splits, rows / 128));
    return static_cast<int>(lesser<int64_t>(most, parts_of(busy, parts_of(in, tile) * parts_of(out, tile))));
}
inline bool on_tensor_cores(const DevicePlan& plan) { return plan.precision != Precision::f32; }
inline bool is_narrow(const DevicePlan& plan) { return plan.precision == Precision::bf16 || plan.precision == Precision::fp16; }
inline int64_t real_bytes(const DevicePlan& plan) { return is_narrow(plan) ? 2 : 4; }
// Between two rows of logits: tensor cores want 16 bytes at a time.
inline int64_t logits_stride(const DevicePlan& plan) {
    return on_tensor_cores(plan) ? parts_of(plan.head_out, 8) * 8 : static_cast<int64_t>(plan.head_out);
}
inline int head_chunk(const DevicePlan& plan, int64_t rows) {
    const int64_t fit = greater<int64_t>(1, scratch_logits / plan.head_out / 64) * 64;
    return static_cast<int>(lesser(greater<int64_t>(rows, 1), fit));
}

// Hands out places in a block that is not there yet (`memory` null: only counts).
struct Plan {
    char* memory = nullptr;
    uint64_t bytes = 0;
    template <class T>
    T* take(int64_t count) {
        T* place = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
        bytes += (static_cast<uint64_t>(count) * sizeof(T) + 255) / 256 * 256;
        return place;
    }
    // The same of the device's memory. Under the emulator there are gaps between these, which nobody may touch.
    template <class T>
    T* take(int64_t count, const char* name) {
#ifdef BABYGPT_CUDA_EMULATOR
        bytes += 256;
        if (memory && count > 0) emulator::name_buffer(memory + bytes, static_cast<size_t>(count) * sizeof(T), name);
#endif
        (void)name;
        return take<T>(count);
    }
};

inline int64_t learnt_block(const DevicePlan& p) { return p.frozen ? p.adapter_block : p.weight_block; }
// What is sent for each run: in one piece,
template <class T>  // Memory, or the host's Slot
void plan_places(Plan& plan, const DevicePlan& p, T& m) {
    m.now = plan.take<Now>(1);
    for (int side = 0; side < 2; ++side) m.places[side] = plan.take<Place>(p.max_rows[side] > 0 ? p.sequences : 0);
}
// and of what does not follow from the text that lies here, what is used.
inline void plan_arrays(Plan& plan, const DevicePlan& p, Memory& m) {
    for (int side = 0; side < 2; ++side) m.ids[side] = plan.take<int32_t>(p.max_rows[side]);
    m.targets = plan.take<int32_t>(p.max_rows[0]);
    m.row_weights = plan.take<float>(p.max_rows[0]);
    m.features = plan.take<float>(static_cast<int64_t>(p.max_rows[0]) * p.features);
}
inline void plan_memory(Plan& plan, const DevicePlan& p, Memory& m) {
    const int64_t learnt = p.training ? learnt_block(p) : 0, rows = greater(p.max_rows[0], p.max_rows[1]);
    int64_t low = 0, parts = 0;
    bool embeds = false;
    for (const Op& op : p.ops) {
        const int64_t side_rows = p.max_rows[static_cast<int>(op.side)];
        low = greater(low, side_rows * op.loras * p.rank);
        if (op.kind == OpKind::linear || op.kind == OpKind::head)
            parts = greater(parts, splits_of(side_rows, op.in, op.out) * static_cast<int64_t>(op.in) * op.out);
        for (int i = 0; i < op.loras; ++i) parts = greater(parts, most_splits * static_cast<int64_t>(p.rank) * greater(op.in, op.out));
        embeds = embeds || (op.kind == OpKind::embedding && p.training && !p.frozen);
    }
    if (!p.training) parts = 0;
    int64_t matrices = 0;
    for (const WeightPlan& w : p.weights) matrices += p.training && !p.frozen ? w.matrices : 0;
    m.weights = plan.take<float>(p.weight_block, "weights");
    m.adapter = plan.take<float>(p.adapter_block, "adapter");
    m.gradients = plan.take<float>(learnt, "gradients");
    m.moment1 = plan.take<float>(learnt, "moment1");
    m.moment2 = plan.take<float>(learnt, "moment2");
    m.ways = plan.take<unsigned char>(learnt / 16, "ways");
    m.matrices = plan.take<MuonMatrix>(matrices, "matrices");
    m.turned = plan.take<float>(matrices, "turned");
    m.activations = plan.take<char>(p.activation_block * real_bytes(p), "activations");
    m.low = plan.take<char>(p.training ? 0 : low * real_bytes(p), "low");
    const int64_t head_rows = p.ops.size ? p.max_rows[static_cast<int>(p.ops[p.ops.size - 1].side)] : 0;
    m.logits = plan.take<char>(greater<int64_t>(head_chunk(p, head_rows) * logits_stride(p), 1) * real_bytes(p), "logits");
    m.parts = plan.take<float>(greater(parts, embeds ? 2 * parts_of(rows, edge_rows) * p.width : 0), "parts");
    m.row_parts = plan.take<float>(row_parts_room(p), "row_parts");
    m.narrow_weights = plan.take<uint16_t>(is_narrow(p) ? p.weight_block : 0, "narrow_weights");
    m.loss_scale = plan.take<float>(p.precision == Precision::fp16 ? 2 : 0, "loss_scale");
    if (p.precision != Precision::fp16) m.loss_scale = nullptr;
    m.workspace = plan.take<unsigned char>(on_tensor_cores(p) ? static_cast<int64_t>(workspace_bytes) : 0, "workspace");
    m.waves = plan.take<float>(static_cast<int64_t>(p.waves.size), "waves");
    m.losses = plan.take<double>(p.max_rows[0], "losses");
    m.ranks = plan.take<int32_t>(p.max_rows[0], "ranks");
    m.partial = plan.take<double>(2 * square_blocks_there, "partial");
    m.sums = plan.take<Sums>(1, "sums");
    for (int i = 0; i < 2; ++i) {
        m.keys[i] = plan.take<uint32_t>(embeds ? rows : 0, "keys");
        m.sorted_rows[i] = plan.take<int32_t>(embeds ? rows : 0, "sorted_rows");
    }
    m.counts = plan.take<uint32_t>(embeds ? digits * parts_of(rows, sort_block) : 0, "counts");
    m.totals = plan.take<uint32_t>(embeds ? digits : 0, "totals");
    m.text = plan.take<int32_t>(p.text, "text");
    for (int side = 0; side < 2; ++side) m.where[side] = plan.take<Where>(p.max_rows[side], "where");
    Plan sent;
    plan_places(sent, p, m), plan_arrays(sent, p, m);
    sent = Plan{plan.take<char>(static_cast<int64_t>(sent.bytes), "what is sent"), 0};
    plan_places(sent, p, m), plan_arrays(sent, p, m);
}

// =====================================================================================================================
// [CHAPTER 5] The ops
// =====================================================================================================================
// The formulas are in the header's chapter 5, under the same names. Bytes: of device memory, for each element of the op's rows x columns where
// nothing else is said; an op whose bytes stand here takes these divided by the memory's speed, since it computes next to nothing.

// How many there are of something: a number, or the rows of a side in this run, from `first` on, at most `size`.
struct Extent {
    int size, side, first;
    __device__ int now(const Now* n) const {
        if (side < 0) return size;
        const int left = n->rows[side] - first;
        return left < 0 ? 0 : left < size ? left : size;
    }
};

// ---- the batch: what follows from the places of its sequences, and is not sent ------------------------------------------------

// Where each row stands; the ids and targets of windows of the text that lies here; weights of 1. A block has a sequence, its threads every
// 256th row; weights over elements. 12 bytes a row, 20 more of a text.
__global__ void lay_rows(Memory m) {
    const Now& now = *m.now;
    for (int side = 0; side < 2; ++side)
        for (int i = static_cast<int>(blockIdx.x); i < now.sequences && now.rows[side] > 0; i += static_cast<int>(gridDim.x)) {
            const Place place = m.places[side][i];
            for (int j = static_cast<int>(threadIdx.x); j < place.length; j += block_threads) {
                const int row = place.row + j;
                m.where[side][row] = Where{place.position + j, i};
                if (place.start < 0) continue;
                m.ids[side][row] = m.text[place.start + j] & INT32_MAX;              // without the mark of what is only read,
                m.targets[row] = greater(m.text[place.start + j + 1], int32_t(-1));  // which is no target
            }
        }
    for (int64_t i = first_element(); i < now.targets && !now.weighted; i += all_threads()) m.row_weights[i] = 1;
}

// ---- embedding: y = token[id] + position[p]. Over rows. 12 bytes -----------------------------------------------------------

template <class Real>
__global__ void embedding_forward(Real* y, const float* token, const float* position, const int32_t* ids, const Where* where,
                                  const Now* now, int side, int n) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float* t = token + static_cast<int64_t>(ids[row]) * n;
        const float* p = position ? position + static_cast<int64_t>(where[row].position) * n : nullptr;
        over_columns(n, [&](int c, auto size) {
            float sum[size.many], more[size.many] = {};
            load(sum, t + c);
            if (p) load(more, p + c);
            for (int i = 0; i < size.value; ++i) sum[i] += more[i];
            store(y + static_cast<int64_t>(row) * n + c, sum);
        });
    }
}

// dtoken[id] += the sum of dy over the rows with this id. The rows are sorted by id first, by digits of 8 bits, the lowest first, each pass in three
// kernels; equal ids keep their order, so that the sums have one, too.
//   sort_count: a block has 256 rows, thread d counts digit d among them.   sort_places: a warp has a digit; how many of it are in the blocks
//   before each, and in all.   sort_move: a thread has a row; before it stand the smaller digits, the blocks before, and the equal in its own.
__global__ void sort_count(uint32_t* counts, const uint32_t* keys, const int32_t* ids, const Now* now, int side, int shift) {
    BABYGPT_SHARED(uint32_t, digit, sort_block);
    const int row = static_cast<int>(blockIdx.x) * sort_block + static_cast<int>(threadIdx.x), rows = now->rows[side];
    const uint32_t key = row >= rows ? 0 : keys ? keys[row] : static_cast<uint32_t>(ids[row]);
    digit[threadIdx.x] = row < rows ? key >> shift & (digits - 1) : digits;
    __syncthreads();
    uint32_t count = 0;
    for (int i = 0; i < sort_block; ++i) count += digit[i] == threadIdx.x;
    counts[threadIdx.x * gridDim.x + blockIdx.x] = count;
}
// Of all threads' numbers, the sum of those before this one's.
__device__ __forceinline__ uint32_t sum_before(uint32_t mine, uint32_t* sums) {
    const unsigned me = threadIdx.x;
    sums[me] = mine;
    __syncthreads();
    for (unsigned apart = 1; apart < block_threads; apart *= 2) {
        const uint32_t other = me >= apart ? sums[me - apart] : 0;
        __syncthreads();
        sums[me] += other;
        __syncthreads();
    }
    return sums[me] - mine;
}
__global__ void sort_places(uint32_t* counts, uint32_t* totals, int blocks) {
    const int digit = first_row();
    if (digit >= digits) return;
    uint32_t* const of_digit = counts + static_cast<int64_t>(digit) * blocks;
    uint32_t before = 0;
    for (int first = 4 * lane(); first - 4 * lane() < blocks; first += 4 * warp) {
        uint32_t own[4], sum = 0;
        for (int i = 0; i < 4; ++i) own[i] = first + i < blocks ? of_digit[first + i] : 0, sum += own[i];
        uint32_t place = before - sum;
        for (unsigned apart = 1; apart < warp; apart *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, sum, apart);
            if (lane() >= static_cast<int>(apart)) sum += other;
        }
        place += sum;
        before += __shfl_sync(0xffffffffu, sum, warp - 1);
        for (int i = 0; i < 4; ++i) {
            if (first + i < blocks) of_digit[first + i] = place;
            place += own[i];
        }
    }
    if (lane() == 0) totals[digit] = before;
}
__global__ void sort_move(uint32_t* to_keys, int32_t* to_rows, const uint32_t* places, const uint32_t* totals, const uint32_t* keys,
                          const int32_t* sorted, const int32_t* ids, const Now* now, int side, int shift) {
    BABYGPT_SHARED(uint32_t, digit, sort_block);
    BABYGPT_SHARED(uint32_t, sums, sort_block);
    BABYGPT_SHARED(uint32_t, smaller, digits);
    const int row = static_cast<int>(blockIdx.x) * sort_block + static_cast<int>(threadIdx.x), rows = now->rows[side];
    const uint32_t key = row >= rows ? 0 : keys ? keys[row] : static_cast<uint32_t>(ids[row]);
    const uint32_t mine = row < rows ? key >> shift & (digits - 1) : digits;
    digit[threadIdx.x] = mine;
    smaller[threadIdx.x] = sum_before(totals[threadIdx.x], sums);
    __syncthreads();
    if (row >= rows) return;
    uint32_t place = smaller[mine] + places[mine * gridDim.x + blockIdx.x];
    for (unsigned i = 0; i < threadIdx.x; ++i) place += digit[i] == mine;
    to_keys[place] = key, to_rows[place] = sorted ? sorted[row] : row;
}
// A warp has 64 sorted rows and `size` columns a lane. Rows of one id that all lie within them are added to dtoken at once; those that go on
// from the 64 before, or into the 64 after, are left in `edges`: [blocks][2][n], in the first or second place. 2 Real bytes.
template <int size, class Real>
__global__ void embedding_backward(float* dtoken, float* edges, const Real* dy, const uint32_t* keys, const int32_t* sorted, const Now* now,
                                   int side, int n) {
    constexpr size_t many = size;
    const int rows = now->rows[side], across = (n + size * warp - 1) / (size * warp);
    for (int number = first_row(); number / across * edge_rows < rows; number += all_warps()) {
        const int part = number / across, from = part * edge_rows, to = lesser(from + edge_rows, rows);
        const int c = (number % across * warp + lane()) * size;
        float sum[many] = {};
        for (int i = from; i < to && c < n; ++i) {
            float d[many];
            load(d, dy + static_cast<int64_t>(sorted[i]) * n + c);
            for (int j = 0; j < size; ++j) sum[j] += d[j];
            if (i + 1 < to && keys[i + 1] == keys[i]) continue;
            const bool goes_on = i + 1 == to && to < rows && keys[to] == keys[i];
            const bool came = from > 0 && keys[from - 1] == keys[i] && keys[from] == keys[i];
            const bool whole = !came && !goes_on;
            float* const at =
                whole ? dtoken + static_cast<int64_t>(keys[i]) * n + c : edges + (2 * static_cast<int64_t>(part) + (came ? 0 : 1)) * n + c;
            for (int j = 0; j < size; ++j) at[j] = whole ? at[j] + sum[j] : sum[j], sum[j] = 0;
        }
    }
}
// Then the block whose 64 rows such a sum begins in adds its parts, which may be a fifth of all: warp i of it every 8th, `size` columns a lane, then
// their sums, in an order that never changes.
template <int size>
__global__ void embedding_edges(float* dtoken, const float* edges, const uint32_t* keys, const Now* now, int side, int n) {
    constexpr size_t many = size;
    BABYGPT_SHARED(float, sums, (block_threads * size));
    const int rows = now->rows[side], parts = (rows + edge_rows - 1) / edge_rows, across = (n + size * warp - 1) / (size * warp);
    const int me = static_cast<int>(threadIdx.x);
    for (int number = static_cast<int>(blockIdx.x); number < parts * across; number += static_cast<int>(gridDim.x)) {
        const int part = number / across, from = part * edge_rows, to = from + edge_rows, c = (number % across * warp + lane()) * size;
        if (to >= rows || keys[to] != keys[to - 1]) continue;                                  // nothing goes on
        if (from > 0 && keys[from - 1] == keys[from] && keys[from] == keys[to - 1]) continue;  // it began before
        const uint32_t id = keys[to - 1];
        int last = part + 1, beyond = parts;  // the last part whose first row is of this id
        while (beyond - last > 1) {
            const int middle = (last + beyond) / 2;
            (keys[middle * edge_rows] == id ? last : beyond) = middle;
        }
        float sum[many] = {};
        BABYGPT_UNROLL(8)
        for (int next = part + me / warp; next <= last; next += block_warps) {
            if (c >= n) continue;
            float d[many];
            load(d, edges + (2 * static_cast<int64_t>(next) + (next == part ? 1 : 0)) * n + c);
            for (int j = 0; j < size; ++j) sum[j] += d[j];
        }
        for (int j = 0; j < size; ++j) sums[j * block_threads + me] = sum[j];
        __syncthreads();
        for (int j = 0; j < size && me < warp && c < n; ++j) {
            for (int i = 1; i < block_warps; ++i) sum[j] += sums[j * block_threads + i * warp + me];
            dtoken[static_cast<int64_t>(id) * n + c + j] += sum[j];
        }
        __syncthreads();
    }
}
// dposition[p] += the sum of dy over the sequences that reach p. A block has a position and `size` columns a lane, warp i of it every 8th sequence.
template <int size, class Real>
__global__ void position_backward(float* dposition, const Real* dy, const Place* places, const Now* now, int n) {
    constexpr size_t many = size;
    BABYGPT_SHARED(float, sums, (block_threads * size));
    const int across = (n + size * warp - 1) / (size * warp), p = static_cast<int>(blockIdx.x) / across;
    const int c = (static_cast<int>(blockIdx.x) % across * warp + lane()) * size;
    float sum[many] = {};
    for (int i = static_cast<int>(threadIdx.x) / warp; i < now->sequences && c < n; i += block_warps) {
        const int at = p - places[i].position;
        if (at < 0 || at >= places[i].length) continue;
        float d[many];
        load(d, dy + static_cast<int64_t>(places[i].row + at) * n + c);
        for (int j = 0; j < size; ++j) sum[j] += d[j];
    }
    for (int j = 0; j < size; ++j) sums[j * block_threads + static_cast<int>(threadIdx.x)] = sum[j];
    __syncthreads();
    if (threadIdx.x >= warp || c >= n) return;
    for (int j = 0; j < size; ++j) {
        for (int i = 1; i < block_warps; ++i) sum[j] += sums[j * block_threads + i * warp + lane()];
        dposition[static_cast<int64_t>(p) * n + c + j] += sum[j];
    }
}

// ---- input, waves, add, dropout: over rows, or over elements. Real bytes: 4 + 1, 2, 3, 2 ------------------------------------------

template <class Real>
__global__ void copy_rows(Real* y, const float* x, const Now* now, int side, int n) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) put(y + i, x[i]);
}
// x = x sqrt(n) + waves[position]; backward: dx = dx sqrt(n).
template <class Real>
__global__ void add_waves(Real* x, const float* waves, const Where* where, const Now* now, int side, int n, bool backward) {
    const float factor = sqrtf(static_cast<float>(n));
    for (int row = first_row(); row < now->rows[side]; row += all_warps())
        over_columns(n, [&](int c, auto size) {
            Real* const at = x + static_cast<int64_t>(row) * n + c;
            float value[size.many], wave[size.many] = {};
            load(value, at);
            if (!backward) load(wave, waves + static_cast<int64_t>(where[row].position) * n + c);
            for (int i = 0; i < size.value; ++i) value[i] = fmaf(value[i], factor, wave[i]);
            store(at, value);
        });
}
template <class Real>
__global__ void add_forward(Real* y, const Real* a, const Real* b, const Now* now, int side, int n) {
    over_all<Real>(static_cast<int64_t>(now->rows[side]) * n, [&](int64_t i, auto size) {
        float left[size.many], right[size.many];
        load(left, a + i), load(right, b + i);
        for (int j = 0; j < size.value; ++j) left[j] += right[j];
        store(y + i, left);
    });
}
// to is dy, or grows by it.
template <class Real>
__global__ void add_backward(Real* to, const Real* dy, const Now* now, int side, int n, bool adds) {
    over_all<Real>(static_cast<int64_t>(now->rows[side]) * n, [&](int64_t i, auto size) {
        float d[size.many], before[size.many] = {};
        load(d, dy + i);
        if (adds) load(before, to + i);
        for (int j = 0; j < size.value; ++j) d[j] += before[j];
        store(to + i, d);
    });
}
__device__ __forceinline__ uint64_t drop_key(const Now* now, int side, int op, int row) {
    return mixed(mixed(mixed(mixed(now->seed) ^ now->step) ^ static_cast<uint64_t>(op)) ^
                 (now->first_row[side] + static_cast<uint64_t>(row)));
}
__device__ __forceinline__ float drop_factor(const Now* now, uint64_t key, int i) {
    return bits_of(key, static_cast<uint32_t>(i)) < now->drop_below ? 0.0f : now->drop_keep;
}
// Forward and backward alike: to = from * factor, or grows by it.
template <class Real>
__global__ void dropout(Real* to, const Real* from, const Now* now, int side, int op, int n, bool adds) {
    const bool active = now->drop_below != 0;
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const uint64_t key = drop_key(now, side, op, row);
        over_columns(n, [&](int c, auto size) {
            const int64_t at = static_cast<int64_t>(row) * n + c;
            float d[size.many], before[size.many] = {};
            load(d, from + at);
            if (adds) load(before, to + at);
            for (int i = 0; i < size.value; ++i) d[i] = (active ? d[i] * drop_factor(now, key, c + i) : d[i]) + before[i];
            store(to + at, d);
        });
    }
}

// ---- norm: y = (x - mean) * scale * w + b. Over rows. Real bytes: 2 forward, 3 backward (4 where it adds) --------------------------

template <class Real>
__global__ void norm_forward(Real* y, float* statistics, const Real* x, const float* w, const float* b, const Now* now, int side, int n,
                             float epsilon, bool centred) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const Real* from = x + static_cast<int64_t>(row) * n;
        float mean = 0, square = 0;
        if (centred)
            over_columns(n, [&](int c, auto size) {
                float value[size.many];
                load(value, from + c);
                for (const float one : value) mean += one;
            });
        mean = warp_sum(mean) / static_cast<float>(n);
        over_columns(n, [&](int c, auto size) {
            float value[size.many];
            load(value, from + c);
            for (const float one : value) square = fmaf(one - mean, one - mean, square);
        });
        const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(n) + epsilon);
        over_columns(n, [&](int c, auto size) {
            float value[size.many], factor[size.many], bias[size.many] = {};
            load(value, from + c), load(factor, w + c);
            if (b) load(bias, b + c);
            for (int i = 0; i < size.value; ++i) value[i] = fmaf((value[i] - mean) * scale, factor[i], bias[i]);
            store(y + static_cast<int64_t>(row) * n + c, value);
        });
        if (lane() == 0) statistics[2 * static_cast<int64_t>(row)] = mean, statistics[2 * static_cast<int64_t>(row) + 1] = scale;
    }
}
// The same, where a lane can keep its part of a row, `each` times four columns: a row is read once, and while it is made the warp's next one is under
// way. No more blocks are launched than the device has room for: so many a processor backward, twice as many forward.
template <int each>
constexpr int norm_blocks = each == 3 ? 2 : 1;
template <int each, class F>
__device__ __forceinline__ void over_kept(int n, const F& f) {
    BABYGPT_TIMES (k, each)
        if (const int c = 4 * (k * warp + lane()); c < n) f(k, c);
}
template <class Real, int each>
__global__ void __launch_bounds__(block_threads, 2 * norm_blocks<each>)
    norm_forward_keeping(Real* y, float* statistics, const Real* x, const float* w, const float* b, const Now* now, int side, int n,
                         float epsilon, bool centred) {
    constexpr size_t kept = each;
    const int rows = now->rows[side];
    Raw<Real, 4> next[kept] = {};
    const auto fetch = [&](int row) {
        if (row < rows) over_kept<each>(n, [&](int k, int c) { next[k] = raw<4>(x + static_cast<int64_t>(row) * n + c); });
    };
    fetch(first_row());
    for (int row = first_row(); row < rows; row += all_warps()) {
        float value[kept][4] = {}, mean = 0, square = 0;
        over_kept<each>(n, [&](int k, int) { widen<Real>(value[k], next[k]); });
        fetch(row + all_warps());
        over_kept<each>(n, [&](int k, int) {
            for (const float one : value[k]) mean += one;
        });
        mean = centred ? warp_sum(mean) / static_cast<float>(n) : 0.0f;
        over_kept<each>(n, [&](int k, int) {
            for (const float one : value[k]) square = fmaf(one - mean, one - mean, square);
        });
        const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(n) + epsilon);
        over_kept<each>(n, [&](int k, int c) {
            float factor[4], bias[4] = {};
            load(factor, w + c);
            if (b) load(bias, b + c);
            for (int i = 0; i < 4; ++i) value[k][i] = fmaf((value[k][i] - mean) * scale, factor[i], bias[i]);
            store(y + static_cast<int64_t>(row) * n + c, value[k]);
        });
        if (lane() == 0) statistics[2 * static_cast<int64_t>(row)] = mean, statistics[2 * static_cast<int64_t>(row) + 1] = scale;
    }
}
// With h = (x - mean) * scale and g = dy * w:  dx = scale * (g - mean(g) - h * mean(g * h)).
template <class Real>
__global__ void norm_backward(Real* dx, const Real* dy, const Real* x, const float* statistics, const float* w, const Now* now, int side,
                              int n, bool centred, bool adds) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const int64_t at = static_cast<int64_t>(row) * n;
        const float mean = statistics[2 * static_cast<int64_t>(row)], scale = statistics[2 * static_cast<int64_t>(row) + 1];
        float mean_g = 0, mean_gh = 0;
        const auto over = [&](const auto& f) {
            over_columns(n, [&](int c, auto size) {
                float g[size.many], h[size.many], factor[size.many];
                load(g, dy + at + c), load(h, x + at + c), load(factor, w + c);
                for (int i = 0; i < size.value; ++i) g[i] *= factor[i], h[i] = (h[i] - mean) * scale;
                f(c, g, h, size);
            });
        };
        over([&](int, auto& g, auto& h, auto size) {
            for (int i = 0; i < size.value; ++i) mean_g += centred ? g[i] : 0.0f, mean_gh = fmaf(g[i], h[i], mean_gh);
        });
        mean_g = warp_sum(mean_g) / static_cast<float>(n), mean_gh = warp_sum(mean_gh) / static_cast<float>(n);
        over([&](int c, auto& g, auto& h, auto size) {
            float before[size.many] = {};
            if (adds) load(before, dx + at + c);
            for (int i = 0; i < size.value; ++i) g[i] = fmaf(scale, fmaf(-h[i], mean_gh, g[i] - mean_g), before[i]);
            store(dx + at + c, g);
        });
    }
}
// The same, where a lane can keep its part of a row, `each` times four columns; then a block also leaves the sums over its rows of dy, which is db,
// of dy * h, which is dw, and of what stands in dx afterwards, which is the db of a product that made x's last summand: [blocks][3][n].
template <class Real, int each>
__global__ void __launch_bounds__(block_threads, norm_blocks<each>)
    norm_backward_summing(Real* dx, float* parts, const Real* dy, const Real* x, const float* statistics, const float* w, const Now* now,
                          int side, int n, bool centred, bool adds) {
    constexpr size_t kept = each;
    constexpr bool ahead = each * sizeof(Real) <= 16;  // what is under way has registers, too
    const int rows = now->rows[side];
    struct {
        Raw<Real, 4> dy[kept], x[kept], before[kept];
        float mean, scale;
    } next{};
    const auto fetch = [&](int row) {
        if (row >= rows) return;
        const int64_t at = static_cast<int64_t>(row) * n;
        next.mean = statistics[2 * static_cast<int64_t>(row)], next.scale = statistics[2 * static_cast<int64_t>(row) + 1];
        over_kept<each>(n, [&](int k, int c) {
            next.dy[k] = raw<4>(dy + at + c), next.x[k] = raw<4>(x + at + c);
            if (adds && ahead) next.before[k] = raw<4>(dx + at + c);
        });
    };
    float sums[3][kept][4] = {};
    if (ahead) fetch(first_row());
    for (int row = first_row(); row < rows; row += all_warps()) {
        if (!ahead) fetch(row);
        const float mean = next.mean, scale = next.scale;
        float g[kept][4], h[kept][4], mean_g = 0, mean_gh = 0;
        Raw<Real, 4> before[kept];
        over_kept<each>(n, [&](int k, int) { widen<Real>(g[k], next.dy[k]), widen<Real>(h[k], next.x[k]), before[k] = next.before[k]; });
        if (ahead) fetch(row + all_warps());  // under way while this one is made
        over_kept<each>(n, [&](int k, int c) {
            float factor[4];
            load(factor, w + c);
            for (int i = 0; i < 4; ++i) {
                h[k][i] = (h[k][i] - mean) * scale;
                sums[0][k][i] += g[k][i], sums[1][k][i] = fmaf(g[k][i], h[k][i], sums[1][k][i]);
                g[k][i] *= factor[i];
                mean_g += g[k][i], mean_gh = fmaf(g[k][i], h[k][i], mean_gh);
            }
        });
        mean_g = centred ? warp_sum(mean_g) / static_cast<float>(n) : 0.0f, mean_gh = warp_sum(mean_gh) / static_cast<float>(n);
        over_kept<each>(n, [&](int k, int c) {
            float so_far[4] = {};
            if (ahead) widen<Real>(so_far, before[k]);  // zeros where nothing is added to
            else if (adds) load(so_far, dx + static_cast<int64_t>(row) * n + c);
            for (int i = 0; i < 4; ++i) {
                g[k][i] = fmaf(scale, fmaf(-h[k][i], mean_gh, g[k][i] - mean_g), so_far[i]);
                sums[2][k][i] += g[k][i];
            }
            store(dx + static_cast<int64_t>(row) * n + c, g[k]);
        });
    }
    BABYGPT_SHARED(float, of_warps, (block_warps * warp * 4));
    const int me = static_cast<int>(threadIdx.x);
    BABYGPT_TIMES (which, 3)
        BABYGPT_TIMES (k, each) {
            for (int i = 0; i < 4; ++i) of_warps[4 * me + i] = sums[which][k][i];
            __syncthreads();
            const int c = 4 * k * warp + me;
            if (me < 4 * warp && c < n) {
                float sum = 0;
                for (int i = 0; i < block_warps; ++i) sum += of_warps[i * 4 * warp + me];
                parts[(3 * static_cast<int64_t>(blockIdx.x) + which) * n + c] = sum;
            }
            __syncthreads();
        }
}

// ---- sums over rows ----------------------------------------------------------------------------------------------------

// To to[c] and on: a block's sums of columns c and on, of which each warp has a part of the rows, and the same lane of each the same columns.
template <int size>
__device__ __forceinline__ void leave_sums(float* to, float* shared, const float (&own)[static_cast<size_t>(size)], int c, int n) {
    const int me = static_cast<int>(threadIdx.x);
    for (int j = 0; j < size; ++j) shared[j * block_threads + me] = own[j];
    __syncthreads();
    for (int j = 0; j < size && me < warp && c < n; ++j) {
        float sum = own[j];
        for (int i = 1; i < block_warps; ++i) sum += shared[j * block_threads + i * warp + me];
        to[c + j] = sum;
    }
}
// db = the sum of dy's rows, dw = the sum of dy * h (x null: not wanted). A block has `size` columns a lane and a part of the rows, warp i of it every
// 8th row; parts: [parts][n], of db, or [parts][2][n], of db and dw. dy's rows are `stride` apart. Real bytes: 1, 2 with dw.
template <int size, class Real>
__global__ void sums_over_rows(float* parts, const Real* dy, int64_t stride, const Real* x, const float* statistics, Extent extent,
                               const Now* now, int n) {
    constexpr size_t many = size;
    BABYGPT_SHARED(float, b, (block_threads * size));
    BABYGPT_SHARED(float, w, (block_threads * size));
    const int rows = extent.now(now), count = static_cast<int>(gridDim.y), each = (rows + count - 1) / count;
    const int from = static_cast<int>(blockIdx.y) * each, to = lesser(from + each, rows);
    const int c = (static_cast<int>(blockIdx.x) * warp + lane()) * size;
    float sum_b[many] = {}, sum_w[many] = {};
    BABYGPT_UNROLL(4)
    for (int row = from + static_cast<int>(threadIdx.x) / warp; row < to; row += block_warps) {
        if (c >= n) continue;
        float d[many], h[many] = {};
        load(d, dy + row * stride + c);
        if (x) load(h, x + static_cast<int64_t>(row) * n + c);
        const float mean = x ? statistics[2 * static_cast<int64_t>(row)] : 0.0f,
                    scale = x ? statistics[2 * static_cast<int64_t>(row) + 1] : 0.0f;
        for (int i = 0; i < size; ++i) sum_b[i] += d[i], sum_w[i] = fmaf(d[i], (h[i] - mean) * scale, sum_w[i]);
    }
    float* const own = parts + (x ? 2 : 1) * static_cast<int64_t>(blockIdx.y) * n;
    leave_sums<size>(own, b, sum_b, c, n);
    if (x) leave_sums<size>(own + n, w, sum_w, c, n);
}
// Sums that wait for being added: to[n] += that of `count` parts, which are `apart` floats from each other.
struct RowSum {
    float* to;
    const float* parts;
    int64_t apart;
    int count, n;
};
constexpr int most_waiting = 64;
struct RowSums {
    RowSum of[most_waiting];
};
// In an order that never changes: blocks (., i) have sum i, each 8 columns of it, each 8th thread every 32nd part of one. 4 bytes a part.
constexpr int sum_columns = 8;
__global__ void add_row_sums(RowSums waiting) {
    BABYGPT_SHARED(float, of_warps, block_threads);
    const RowSum& own = waiting.of[blockIdx.y];
    const int me = static_cast<int>(threadIdx.x), c = static_cast<int>(blockIdx.x) * sum_columns + me % sum_columns;
    if (static_cast<int>(blockIdx.x) * sum_columns >= own.n) return;
    float sum = 0;
    BABYGPT_UNROLL(8)
    for (int i = me / sum_columns; i < own.count; i += block_threads / sum_columns)
        if (c < own.n) sum += own.parts[i * own.apart + c];
    for (int apart = sum_columns; apart < warp; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    of_warps[me] = sum;
    __syncthreads();
    if (me >= sum_columns || c >= own.n) return;
    for (int i = 1; i < block_warps; ++i) sum += of_warps[i * warp + me];
    own.to[c] += sum;
}
// to += the parts of a product, in order. Over elements. 4 bytes a part, and 8.
__global__ void add_parts(float* to, const float* parts, int splits, int64_t n) {
    for (int64_t i = first_element(); i < n; i += all_threads()) {
        float sum = parts[i];
        for (int s = 1; s < splits; ++s) sum += parts[s * n + i];
        to[i] += sum;
    }
}

// ---- activations and the gated one: over elements, over rows. Real bytes: 2, 3; 3, 5 ------------------------------------------------

// In 16 bits: as exact as these deserve.
__device__ __forceinline__ float power_of_2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
__device__ __forceinline__ float inverse(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}
template <class Real>
__device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(Real) == 2) return inverse(1 + power_of_2(x * -1.44269504f));
    else return 1 / (1 + expf(-x));
}
template <class Real = float>
__device__ __forceinline__ float activated(float x, Activation activation) {
    if (activation == Activation::gelu) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (activation == Activation::gelu_tanh) return x * sigmoid<Real>(x * fmaf(0.07135481627f, x * x, 1.59576912161f));
    if (activation == Activation::silu) return x * sigmoid<Real>(x);
    if (activation == Activation::relu) return x > 0 ? x : 0;
    return x;
}
template <class Real>
__device__ __forceinline__ float activated_slope(float x, Activation activation) {
    if (activation == Activation::gelu) return fmaf(x * 0.39894228f, expf(-0.5f * x * x), 0.5f * (1 + erff(x * 0.70710678f)));
    if (activation == Activation::gelu_tanh) {
        const float s = sigmoid<Real>(x * fmaf(0.07135481627f, x * x, 1.59576912161f));
        return fmaf(x * s * (1 - s), fmaf(0.21406444882f, x * x, 1.59576912161f), s);
    }
    if (activation == Activation::silu) {
        const float s = sigmoid<Real>(x);
        return fmaf(x * s, 1 - s, s);
    }
    return activation != Activation::relu || x > 0 ? 1.0f : 0.0f;
}
template <class Real>
__global__ void activate(Real* y, const Real* before, const Now* now, int side, int n, Activation activation) {
    over_all<Real>(static_cast<int64_t>(now->rows[side]) * n, [&](int64_t i, auto size) {
        float x[size.many];
        load(x, before + i);
        for (float& one : x) one = activated(one, activation);
        store(y + i, x);
    });
}
template <class Real>
__global__ void activate_backward(Real* dy, const Real* before, const Now* now, int side, int n, Activation activation) {
    over_all<Real>(static_cast<int64_t>(now->rows[side]) * n, [&](int64_t i, auto size) {
        float d[size.many], x[size.many];
        load(d, dy + i), load(x, before + i);
        for (int j = 0; j < size.value; ++j) d[j] *= activated_slope<Real>(x[j], activation);
        store(dy + i, d);
    });
}
// The same, and its sums over rows, as sums_over_rows leaves them: a lane has four columns. Real bytes: 3.
template <class Real>
__global__ void activate_backward_summing(Real* dy, float* parts, const Real* before, Extent extent, const Now* now, int n,
                                          Activation activation) {
    BABYGPT_SHARED(float, shared, (block_threads * 4));
    const int rows = extent.now(now), count = static_cast<int>(gridDim.y), each = (rows + count - 1) / count;
    const int from = static_cast<int>(blockIdx.y) * each, to = lesser(from + each, rows);
    const int c = (static_cast<int>(blockIdx.x) * warp + lane()) * 4;
    float sum[4] = {};
    const auto over = [&](const auto& slope) {
        constexpr int together = 4;  // rows of a warp, whose loads are under way at once
        for (int first = from + static_cast<int>(threadIdx.x) / warp; first < to && c < n; first += together * block_warps) {
            Raw<Real, 4> raw_d[together], raw_x[together];
            BABYGPT_TIMES (k, together)
                if (const int row = first + k * block_warps; row < to)
                    raw_d[k] = raw<4>(dy + static_cast<int64_t>(row) * n + c),
                    raw_x[k] = raw<4>(before + static_cast<int64_t>(row) * n + c);
            BABYGPT_TIMES (k, together) {
                const int row = first + k * block_warps;
                if (row >= to) continue;
                float d[4], x[4];
                widen<Real>(d, raw_d[k]), widen<Real>(x, raw_x[k]);
                for (int i = 0; i < 4; ++i) d[i] *= slope(x[i]), sum[i] += d[i];
                store(dy + static_cast<int64_t>(row) * n + c, d);
            }
        }
    };
    if (activation == Activation::gelu_tanh) over([](float x) { return activated_slope<Real>(x, Activation::gelu_tanh); });
    else over([&](float x) { return activated_slope<Real>(x, activation); });
    leave_sums<4>(parts + static_cast<int64_t>(blockIdx.y) * n, shared, sum, c, n);
}
// y = activation(g) u, g and u the halves of a row of x
template <class Real>
__global__ void gate_forward(Real* y, const Real* x, const Now* now, int side, int n, Activation activation) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const Real *left = x + static_cast<int64_t>(row) * 2 * n, *right = left + n;
        over_columns(n, [&](int c, auto size) {
            float g[size.many], u[size.many];
            load(g, left + c), load(u, right + c);
            for (int i = 0; i < size.value; ++i) g[i] = activated(g[i], activation) * u[i];
            store(y + static_cast<int64_t>(row) * n + c, g);
        });
    }
}
template <class Real>
__global__ void gate_backward(Real* dx, const Real* dy, const Real* x, const Now* now, int side, int n, Activation activation, bool adds) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const int64_t at = static_cast<int64_t>(row) * 2 * n;
        over_columns(n, [&](int c, auto size) {
            float d[size.many], g[size.many], u[size.many], dg[size.many] = {}, du[size.many] = {};
            load(d, dy + static_cast<int64_t>(row) * n + c), load(g, x + at + c), load(u, x + at + n + c);
            if (adds) load(dg, dx + at + c), load(du, dx + at + n + c);
            for (int i = 0; i < size.value; ++i) {
                dg[i] += d[i] * u[i] * activated_slope<Real>(g[i], activation);
                du[i] += d[i] * activated(g[i], activation);
            }
            store(dx + at + c, dg), store(dx + at + n + c, du);
        });
    }
}

// ---- products: C = A B ---------------------------------------------------------------------------------------------------

// As the header's Product: element (k, i) of A is at [k * stride + i], or, where it runs along its rows, at [i * stride + k]; the same of B.
// The chains start from `start` (C itself, a bias with stride 0, null: 0). Where there are splits, part s is the sum over a part of the depth, at
// c + s * rows * columns.
template <class A, class B, class C>
struct Product {
    C* c;
    int64_t c_stride;
    const C* start;
    int64_t start_stride;
    const A* a;
    const B* b;
    int64_t a_stride, b_stride;
    Extent rows, depth;
    int columns;
    float factor = 1;     // of the sum
    C* before = nullptr;  // where not null: as C, without the activation
    Activation activation = Activation::none;
};
// A block makes 64 x 64 elements of C from 16 of the depth at a time, which it brings to shared memory; a thread makes 4 x 4 of them.
// Bytes: 4 (rows depth columns / 64 * 2 + rows columns), mostly from the cache; bound by shared memory: 1 load for 2 multiply-adds.
constexpr int tile_depth = 16, tile_stride = tile + 4;
template <bool along, class T>
__device__ __forceinline__ void load_tile(float* to, const T* from, int64_t stride, int first, int count, int k0, int k_end) {
    for (int e = static_cast<int>(threadIdx.x); e < tile * tile_depth; e += block_threads) {
        const int k = along ? e % tile_depth : e / tile, i = along ? e / tile_depth : e % tile;
        const bool inside = first + i < count && k0 + k < k_end;
        to[k * tile_stride + i] =
            inside ? static_cast<float>(from[along ? (first + i) * stride + k0 + k : (k0 + k) * stride + first + i]) : 0.0f;
    }
}
// The tile at row0, column0 of the sums over k from `from` to `to`: the chain of element (i, j) begins with start(i, j), and end(i, j, sum) gets it.
template <bool a_along, bool b_along, class A, class B, class Start, class End>
__device__ __forceinline__ void sum_tile(float* tile_a, float* tile_b, const A* a, int64_t a_stride, const B* b, int64_t b_stride, int rows,
                                         int columns, int row0, int column0, int from, int to, const Start& start, const End& end) {
    const int i0 = row0 + static_cast<int>(threadIdx.x) / 16 * 4, j0 = column0 + static_cast<int>(threadIdx.x) % 16 * 4;
    float sum[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sum[i][j] = i0 + i < rows && j0 + j < columns ? start(i0 + i, j0 + j) : 0.0f;
    for (int k0 = from; k0 < to; k0 += tile_depth) {
        load_tile<a_along>(tile_a, a, a_stride, row0, rows, k0, to);
        load_tile<b_along>(tile_b, b, b_stride, column0, columns, k0, to);
        __syncthreads();
        for (int k = 0; k < tile_depth; ++k) {
            float left[4], right[4];
            for (int i = 0; i < 4; ++i)
                left[i] = tile_a[k * tile_stride + i0 - row0 + i], right[i] = tile_b[k * tile_stride + j0 - column0 + i];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
            if (i0 + i < rows && j0 + j < columns) end(i0 + i, j0 + j, sum[i][j]);
}
template <bool a_along, bool b_along, class A, class B, class C>
__global__ void __launch_bounds__(block_threads) product(Product<A, B, C> p, const Now* now) {
    BABYGPT_SHARED(float, a, (tile_depth * tile_stride));
    BABYGPT_SHARED(float, b, (tile_depth * tile_stride));
    const int rows = p.rows.now(now), depth = p.depth.now(now), across = (p.columns + tile - 1) / tile;
    const int row0 = static_cast<int>(blockIdx.x) / across * tile, column0 = static_cast<int>(blockIdx.x) % across * tile;
    const int splits = static_cast<int>(gridDim.y), each = (depth + splits - 1) / splits;
    const int from = static_cast<int>(blockIdx.y) * each, to = lesser(from + each, depth);
    if (row0 >= rows) return;
    C* const c = p.c + (splits > 1 ? static_cast<int64_t>(blockIdx.y) * rows * p.columns : 0);
    const auto start = [&](int i, int j) { return p.start ? static_cast<float>(p.start[i * p.start_stride + j]) : 0.0f; };
    sum_tile<a_along, b_along>(a, b, p.a, p.a_stride, p.b, p.b_stride, rows, p.columns, row0, column0, from, to, start,
                               [&](int i, int j, float sum) {
                                   const int64_t at = i * p.c_stride + j;
                                   if (p.before) put(p.before + at, sum * p.factor);
                                   put(c + at, activated(sum * p.factor, p.activation));
                               });
}

// ---- products on tensor cores --------------------------------------------------------------------------------------------

// They are cuBLASLt's, from numbers in bf16 or tf32 and with sums in float. The library multiplies as many rows as there might be: where a run has
// fewer, the others are made zeros. What follows is beside the products: over elements; 6, 0 and 2 Real bytes.
template <class Narrow>
__global__ void narrow_copy(Narrow* to, const float* from, int64_t n) {
    for (int64_t i = first_element(); i < n; i += all_threads()) put(to + i, from[i]);
}
template <class Real>
__global__ void clear_rest(Real* x, Extent extent, const Now* now, int64_t n) {
    const int64_t there = static_cast<int64_t>(extent.now(now)) * n, all = static_cast<int64_t>(extent.size) * n;
    for (int64_t i = there + first_element(); i < all; i += all_threads()) put(x + i, 0.0f);
}
// Of a matrix's bits, where they are not zeros: the sum over a warp's elements, which all are of 32 bits here. Over elements. 4 bytes.
constexpr int hash_blocks = 64, hash_parts = hash_blocks * block_warps;
static_assert(hash_parts * sizeof(uint64_t) <= workspace_bytes);
__global__ void hash_matrix(uint64_t* parts, const uint32_t* from, int64_t n) {
    uint64_t sum = 0;
    BABYGPT_UNROLL(8)
    for (int64_t i = first_element(); i < n; i += all_threads())
        if (from[i] != 0) sum += mixed(static_cast<uint64_t>(i) << 32 ^ from[i]);
    sum = warp_sum(sum);
    if (lane() == 0) parts[first_row()] = sum;
}
template <class Real, class Bias>
__global__ void add_bias(Real* x, const Bias* bias, int64_t stride, Extent extent, const Now* now, int n) {
    for (int row = first_row(); row < extent.now(now); row += all_warps())
        for (int c = lane(); c < n; c += warp)
            put(x + row * stride + c, static_cast<float>(x[row * stride + c]) + static_cast<float>(bias[c]));
}
// C = A B + start + bias as above, `start` laid out as C. wide: C is float, and so is the bias; else both are Real. gelu: then tanh-GELU of that, of
// which `aux` keeps the argument where it is not null. (Its slope, backward, the library makes slower within a product than a pass of its own does.)
struct Matmul {
    void* c;
    int64_t c_stride;
    const void *start, *a, *b;
    int64_t a_stride, b_stride;
    bool a_along, b_along, wide;
    Extent rows, depth;
    int columns;
    const void* bias = nullptr;
    bool gelu = false;
    void* aux = nullptr;  // [rows][columns]
};
// How the library multiplies one shape: found when it is first wanted, as the library would or in a faster way that makes the same bits (Gpu::choose), so
// that a device makes the same each time. Where it does not do all of it in one, `alone` is set, and passes of their own follow.
struct Tensorial {
    Matmul of;  // its pointers say only whether there is something
    bool alone;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulHeuristicResult_t choice;
    Tensorial* next;
    // Alone, the product goes where the activation's argument is kept.
    void* place(const Matmul& m) const { return alone && m.gelu && m.aux ? m.aux : m.c; }
    bool fits(const Matmul& m) const {
        const auto alike = [](const void* x, const void* y) { return (x == nullptr) == (y == nullptr); };
        return of.rows.size == m.rows.size && of.depth.size == m.depth.size && of.columns == m.columns && of.a_stride == m.a_stride &&
               of.b_stride == m.b_stride && of.c_stride == m.c_stride && of.a_along == m.a_along && of.b_along == m.b_along &&
               of.wide == m.wide && of.gelu == m.gelu && alike(of.start, m.start) && alike(of.bias, m.bias) && alike(of.aux, m.aux);
    }
};

// ---- rope: turns pairs of a head's queries and keys. Over rows; sign -1: back. 8 bytes --------------------------------------------

template <class Real>
__global__ void rope(Real* x, const float* waves, const Where* where, const Now* now, int side, int heads, int kv_heads, int dim,
                     float sign) {
    const int half = dim / 2;
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float *cosine = waves + static_cast<int64_t>(where[row].position) * dim, *sine = cosine + half;
        for (int i = lane(); i < (heads + kv_heads) * half; i += warp) {
            const int k = i % half;
            Real* at = x + static_cast<int64_t>(row) * (heads + 2 * kv_heads) * dim + i / half * dim + k;
            const float a = static_cast<float>(at[0]), b = static_cast<float>(at[half]), c = cosine[k], d = sign * sine[k];
            put(at, fmaf(a, c, -(b * d)));
            put(at + half, fmaf(a, d, b * c));
        }
    }
}

// ---- attention -----------------------------------------------------------------------------------------------------------

// Tiles of T queries and T keys in shared memory, of any dim that fits there; nothing of size length x length is ever in device memory (Dao et al.
// 2022). Rows of a tile are dim + 1 apart, so that neighbouring lanes meet neighbouring banks. A head's probabilities are made from
// the maximum and the sum that the forward pass leaves for each query. Numbers in bf16 go through tensor cores, where dim allows it: further down.
template <class Real>
struct Attend {
    const Real *q, *k, *v;  // of row 0
    Real* y;                // [rows][heads * dim]
    float* softmax;         // [rows][heads][2]
    const Real* dy;
    Real *dq, *dk, *dv;
    int64_t q_stride, k_stride;
    const Place *places, *seen;  // of the queries' sequences, and of the keys'
    int heads, kv_heads, dim, side, op;
    int tiles;  // of the longest sequence
    int rows;   // of a tile, on tensor cores
    float scale;
    bool causal, adds_q, adds_kv;
    int resident;  // on tensor cores: blocks that run at once
    float* parts;  // null, or, on tensor cores, where the sums over rows of dq, dk and dv are left: [blocks / heads][3][heads * dim]
};
template <int T>
size_t attention_bytes(int dim, int tiles_of_rows, int tiles_of_scores) {
    return sizeof(float) * static_cast<size_t>(tiles_of_rows * T * (dim + 1) + tiles_of_scores * T * (T + 1) + 3 * T);
}
// to[i] = from[i], for the `count` rows from `first` on; zeros beyond them.
template <int T, class Real>
__device__ __forceinline__ void load_rows(float* to, const Real* from, int64_t stride, int count, int dim) {
    const int apart = dim + 1;
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps)
        for (int d = lane(); d < dim; d += warp) to[i * apart + d] = i < count ? static_cast<float>(from[i * stride + d]) : 0.0f;
}
// s[i][j] = a[i] . b[j]. Thread t has column t % T and every (256 / T)th row.
template <int T>
__device__ __forceinline__ void tile_products(float* s, const float* a, const float* b, int dim) {
    constexpr int step = block_threads / T;
    constexpr unsigned each = T > step ? T / step : 1;
    const int j = static_cast<int>(threadIdx.x) % T, i0 = static_cast<int>(threadIdx.x) / T;
    if (i0 >= T) return;
    float sum[each] = {};
    for (int d = 0; d < dim; ++d) {
        const float right = b[j * (dim + 1) + d];
        for (int e = 0; e < static_cast<int>(each); ++e) sum[e] = fmaf(a[(i0 + e * step) * (dim + 1) + d], right, sum[e]);
    }
    for (int e = 0; e < static_cast<int>(each); ++e) s[(i0 + e * step) * (T + 1) + j] = sum[e];
}
// to[i] += sum over j of p[i][j] * v[j], or p[j][i] * v[j]. Warp w has every 8th row from w on, its lanes the columns.
template <int T, bool across>
__device__ __forceinline__ void tile_sums(float* to, const float* p, const float* v, int dim) {
    constexpr unsigned each = T / block_warps;
    const int i0 = static_cast<int>(threadIdx.x) / warp;
    for (int d = lane(); d < dim; d += warp) {
        float sum[each];
        for (int e = 0; e < static_cast<int>(each); ++e) sum[e] = to[(i0 + e * block_warps) * (dim + 1) + d];
        for (int j = 0; j < T; ++j) {
            const float right = v[j * (dim + 1) + d];
            for (int e = 0; e < static_cast<int>(each); ++e) {
                const int i = i0 + e * block_warps;
                sum[e] = fmaf(p[across ? j * (T + 1) + i : i * (T + 1) + j], right, sum[e]);
            }
        }
        for (int e = 0; e < static_cast<int>(each); ++e) to[(i0 + e * block_warps) * (dim + 1) + d] = sum[e];
    }
}
// A block has T queries of a head, and goes through the keys that they see: maximum, sum and y so far are put right when a greater maximum comes
// (Milakov & Gimelshein 2018). 16 bytes for each element of y, and the keys and values again for each T queries, from the cache.
template <int T, class Real>
__global__ void __launch_bounds__(block_threads) attention_forward(Attend<Real> a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + 1, apart_s = T + 1, rows = T * apart;
    float *const q = reinterpret_cast<float*>(memory), *const k = q + rows, *const v = k + rows, *const y = v + rows, *const s = y + rows,
                 *const most = s + T * apart_s, *const total = most + T;
    const int number = static_cast<int>(blockIdx.x) / a.tiles / a.heads, head = static_cast<int>(blockIdx.x) / a.tiles % a.heads;
    if (number >= now->sequences) return;
    const int i0 = static_cast<int>(blockIdx.x) % a.tiles * T, queries = a.places[number].length - i0;
    if (queries <= 0) return;
    const int row = a.places[number].row + i0, key_row = a.seen[number].row, keys = a.seen[number].length;
    const int64_t kv_column = static_cast<int64_t>(head / (a.heads / a.kv_heads)) * dim;
    load_rows<T>(q, a.q + row * a.q_stride + static_cast<int64_t>(head) * dim, a.q_stride, queries, dim);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) y[i] = 0;
    for (int i = static_cast<int>(threadIdx.x); i < T; i += block_threads) most[i] = -INFINITY, total[i] = 0;
    for (int k0 = 0; k0 < keys && (!a.causal || k0 <= i0 + T - 1); k0 += T) {
        __syncthreads();
        load_rows<T>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        load_rows<T>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        __syncthreads();
        tile_products<T>(s, q, k, dim);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps) {  // a warp has a query, a lane a key
            const int j = lane();
            const bool sees = j < T && k0 + j < keys && i < queries && (!a.causal || k0 + j <= i0 + i);
            const float score = sees ? s[i * apart_s + j] * a.scale : -INFINITY, before = most[i];
            const float biggest = fmaxf(before, warp_most(score)), base = biggest == -INFINITY ? 0.0f : biggest;
            float p = sees ? expf(score - base) : 0.0f;
            const float factor = expf(before - base), sum = warp_sum(p);
            if (now->drop_below != 0 && sees) p *= drop_factor(now, drop_key(now, a.side, a.op, row + i), head * 65536 + k0 + j);
            __syncwarp();
            if (j < T) s[i * apart_s + j] = p;
            if (j == 0) most[i] = biggest, total[i] = fmaf(total[i], factor, sum);
            for (int d = j; d < dim; d += warp) y[i * apart + d] *= factor;
        }
        __syncthreads();
        tile_sums<T, false>(y, s, v, dim);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && i < queries; i += block_warps) {
        const float inverse = 1 / total[i];
        for (int d = lane(); d < dim; d += warp)
            put(a.y + static_cast<int64_t>(row + i) * a.heads * dim + static_cast<int64_t>(head) * dim + d, y[i * apart + d] * inverse);
        float* to = a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2;
        if (lane() == 0) to[0] = most[i], to[1] = total[i];
    }
}
// p, with f the dropout's factors, to s (f p), and p (f dp - D) / sqrt(dim), which is ds, to dp. D = dy . y of each query.
template <int T, class Real>
__device__ __forceinline__ void score_gradients(const Attend<Real>& a, const Now* now, float* s, float* dp, const float* most,
                                                const float* inverse, const float* D, int row, int i0, int k0, int queries, int keys,
                                                int head) {
    constexpr int apart_s = T + 1;
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps) {
        const int j = lane();
        if (j >= T) continue;
        const bool sees = k0 + j < keys && i < queries && (!a.causal || k0 + j <= i0 + i);
        const float p = sees ? expf(s[i * apart_s + j] * a.scale - most[i]) * inverse[i] : 0.0f;
        const float f = now->drop_below != 0 ? drop_factor(now, drop_key(now, a.side, a.op, row + i), head * 65536 + k0 + j) : 1.0f;
        const float d = dp[i * apart_s + j];
        s[i * apart_s + j] = p * f;
        dp[i * apart_s + j] = sees ? p * (d * f - D[i]) * a.scale : 0.0f;
    }
}
// The queries' maxima, the inverses of their sums, and D. A warp has a query.
template <int T, class Real>
__device__ __forceinline__ void load_queries(const Attend<Real>& a, float* most, float* inverse, float* D, int row, int queries, int head) {
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps) {
        float sum = 0;
        const int64_t at = (static_cast<int64_t>(row + i) * a.heads + head) * a.dim;
        for (int d = lane(); d < a.dim && i < queries; d += warp)
            sum = fmaf(static_cast<float>(a.dy[at + d]), static_cast<float>(a.y[at + d]), sum);
        sum = warp_sum(sum);
        const float* from = a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2;
        if (lane() == 0) most[i] = i < queries ? from[0] : 0.0f, inverse[i] = i < queries ? 1 / from[1] : 0.0f, D[i] = sum;
    }
}
// dq = sum over the keys of ds k. A block has T queries of a head.
template <int T, class Real>
__global__ void __launch_bounds__(block_threads) attention_backward_queries(Attend<Real> a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + 1, apart_s = T + 1, rows = T * apart;
    float *const q = reinterpret_cast<float*>(memory), *const dy = q + rows, *const k = dy + rows, *const v = k + rows,
                 *const dq = v + rows, *const s = dq + rows, *const dp = s + T * apart_s, *const most = dp + T * apart_s,
                 *const inverse = most + T, *const D = inverse + T;
    const int number = static_cast<int>(blockIdx.x) / a.tiles / a.heads, head = static_cast<int>(blockIdx.x) / a.tiles % a.heads;
    if (number >= now->sequences) return;
    const int i0 = static_cast<int>(blockIdx.x) % a.tiles * T, queries = a.places[number].length - i0;
    if (queries <= 0) return;
    const int row = a.places[number].row + i0, key_row = a.seen[number].row, keys = a.seen[number].length;
    const int64_t column = static_cast<int64_t>(head) * dim, kv_column = static_cast<int64_t>(head / (a.heads / a.kv_heads)) * dim;
    const int64_t width = static_cast<int64_t>(a.heads) * dim;
    load_rows<T>(q, a.q + row * a.q_stride + column, a.q_stride, queries, dim);
    load_rows<T>(dy, a.dy + row * width + column, width, queries, dim);
    load_queries<T>(a, most, inverse, D, row, queries, head);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) dq[i] = 0;
    for (int k0 = 0; k0 < keys && (!a.causal || k0 <= i0 + T - 1); k0 += T) {
        __syncthreads();
        load_rows<T>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        load_rows<T>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        __syncthreads();
        tile_products<T>(s, q, k, dim);
        tile_products<T>(dp, dy, v, dim);
        __syncthreads();
        score_gradients<T>(a, now, s, dp, most, inverse, D, row, i0, k0, queries, keys, head);
        __syncthreads();
        tile_sums<T, false>(dq, dp, k, dim);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && i < queries; i += block_warps)
        for (int d = lane(); d < dim; d += warp) {
            Real* const to = a.dq + (row + i) * a.q_stride + column + d;
            put(to, a.adds_q ? static_cast<float>(*to) + dq[i * apart + d] : dq[i * apart + d]);
        }
}
// dk = sum over the queries of ds q, dv = sum of f p dy. A block has T keys of a kv head, and goes through the queries that see them, head after
// head of those that share it.
template <int T, class Real>
__global__ void __launch_bounds__(block_threads) attention_backward_keys(Attend<Real> a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + 1, apart_s = T + 1, rows = T * apart;
    float *const k = reinterpret_cast<float*>(memory), *const v = k + rows, *const dk = v + rows, *const dv = dk + rows,
                 *const q = dv + rows, *const dy = q + rows, *const s = dy + rows, *const dp = s + T * apart_s,
                 *const most = dp + T * apart_s, *const inverse = most + T, *const D = inverse + T;
    const int number = static_cast<int>(blockIdx.x) / a.tiles / a.kv_heads, kv_head = static_cast<int>(blockIdx.x) / a.tiles % a.kv_heads;
    if (number >= now->sequences) return;
    const int k0 = static_cast<int>(blockIdx.x) % a.tiles * T, keys = a.seen[number].length;
    if (k0 >= keys) return;
    const int first = a.places[number].row, length = a.places[number].length, key_row = a.seen[number].row, group = a.heads / a.kv_heads;
    const int64_t kv_column = static_cast<int64_t>(kv_head) * dim, width = static_cast<int64_t>(a.heads) * dim;
    load_rows<T>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
    load_rows<T>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) dk[i] = dv[i] = 0;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int i0 = a.causal ? k0 : 0; i0 < length; i0 += T) {
            const int row = first + i0, queries = length - i0;
            const int64_t column = static_cast<int64_t>(head) * dim;
            __syncthreads();
            load_rows<T>(q, a.q + row * a.q_stride + column, a.q_stride, queries, dim);
            load_rows<T>(dy, a.dy + row * width + column, width, queries, dim);
            load_queries<T>(a, most, inverse, D, row, queries, head);
            __syncthreads();
            tile_products<T>(s, q, k, dim);
            tile_products<T>(dp, dy, v, dim);
            __syncthreads();
            score_gradients<T>(a, now, s, dp, most, inverse, D, row, i0, k0, queries, keys, head);
            __syncthreads();
            tile_sums<T, true>(dk, dp, q, dim);
            tile_sums<T, true>(dv, s, dy, dim);
        }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && k0 + i < keys; i += block_warps)
        for (int d = lane(); d < dim; d += warp) {
            const int64_t at = (key_row + k0 + i) * a.k_stride + kv_column + d;
            put(a.dk + at, a.adds_kv ? static_cast<float>(a.dk[at]) + dk[i * apart + d] : dk[i * apart + d]);
            put(a.dv + at, a.adds_kv ? static_cast<float>(a.dv[at]) + dv[i * apart + d] : dv[i * apart + d]);
        }
}

// ---- attention on tensor cores -----------------------------------------------------------------------------------------------

// Of numbers of 16 bits, in heads of C columns (fewer: zeros beyond), sums in float. Shared memory holds tiles of a.rows rows x C columns: all of a sequence, where
// it is not too long, so that each number is read once. A row's pieces of 16 bytes change places, so that those of 8 rows at one column lie in
// different banks. A warp has strips of 16 rows of its block's tile; what it multiplies and sums up for a strip stays in registers, and it waits for
// others only where a tile is loaded. The strips at both ends go to one warp, as a causal strip's work grows with its number.
constexpr int strip = 16, strip_warps = 6, strip_threads = strip_warps * warp, most_tile_rows = 2 * strip_warps * strip;

// Bytes: Q, K, V and for each query its dropout's key; backward dY, too, and for each query the logarithm of its sum, and D.
template <int C>
constexpr size_t narrow_bytes(int rows, bool backward) {
    return static_cast<size_t>(rows) * (backward ? 8 * C + 16 : 6 * C + 8);
}
// Of a tile, for a context and so much shared memory: a multiple of 32, or 0.
template <int C>
constexpr int tile_rows(int context, int shared) {
    const int64_t most = lesser<int64_t>(most_tile_rows, shared / static_cast<int>(narrow_bytes<C>(1, true)) / 32 * 32);
    return most == 0 ? 0 : static_cast<int>(parts_of(parts_of(context, parts_of(context, most)), 32) * 32);
}
// A strip as the left side of a product, and its sums.
template <int C>
using Strip = uint32_t[static_cast<size_t>(C / 16)][4];
template <int C>
using StripSums = float[static_cast<size_t>(C / 8)][4];
template <int C>
__device__ __forceinline__ int piece_at(int row, int piece) {
    return row * (2 * C) + (piece ^ (C < 64 ? row / 2 % 4 : row % 8)) * 16;
}
__device__ __forceinline__ int strips_of(int some_rows) { return some_rows > 0 ? (some_rows + strip - 1) / strip : 0; }
// The strip that a warp has in one of two passes over a tile with `strips` of them; `strips`: none. The compiler shall see that it is the warp's.
__device__ __forceinline__ int strip_of(int pass, int strips) {
    const int first = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / warp, 0), second = strips - 1 - first;
    return pass == 0 ? lesser(first, strips) : second >= strip_warps ? second : strips;
}
// 16 bytes from device to shared memory, or zeros: under way until copies_arrive, and then for the thread that asked.
__device__ __forceinline__ void copy_piece(void* to, const void* from, bool there) {
#if defined(BABYGPT_CUDA_EMULATOR)
    emulator::copy_async_zero16(to, from, there);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void copies_arrive() {
#if defined(BABYGPT_CUDA_EMULATOR)
    emulator::copy_async_commit();
    emulator::copy_async_wait<0>();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
// `count` rows of a head, of `rows`. A thread has one piece of every (strip_threads / pieces)th row.
template <int C, class Real>
__device__ __forceinline__ void copy_rows_narrow(unsigned char* to, const Real* from, int64_t stride, int rows, int count, int dim) {
    constexpr int pieces = C / 8, step = strip_threads / pieces;
    const int piece = static_cast<int>(threadIdx.x) % pieces;
    const bool has = piece * 8 < dim;
    for (int i = static_cast<int>(threadIdx.x) / pieces; i < rows; i += step) {
        const bool there = has && i < count;
        copy_piece(to + piece_at<C>(i, piece), there ? from + i * stride + piece * 8 : from, there);
    }
}
// So many blocks share a processor whose shared memory has room for them.
template <int C>
constexpr int narrow_blocks(bool backward) {
    return (C > 64 ? 1 : 2) + (backward ? 0 : 1);
}
// Blocks that begin at once load at once, and then compute at once, while the memory waits. So what the block needs that comes where this one is now, goes
// to the L2 cache meanwhile: its tiles of queries and keys, of no rows where none comes.
struct NextBlock {
    int head, row, queries, key_row, keys;
};
template <class Real>
__device__ __forceinline__ NextBlock next_block(const Attend<Real>& a, const Now* now, int heads) {
    const int block = static_cast<int>(blockIdx.x) + a.resident, number = block / a.tiles / heads, first = block % a.tiles * a.rows;
    if (number >= now->sequences) return NextBlock{};
    const Place of = a.places[number], seen = a.seen[number];
    return NextBlock{block / a.tiles % heads, of.row + first, lesser(a.rows, of.length - first), seen.row + first,
                     lesser(a.rows, seen.length - first)};
}
template <class Real>
__device__ __forceinline__ void rows_to_cache(const Real* from, int64_t stride, int count, int dim) {
#if defined(__CUDA_ARCH__)
    for (int i = static_cast<int>(threadIdx.x); i < count; i += strip_threads)
        for (int c = 0; c < dim; c += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i * stride + c));
#else
    (void)from, (void)stride, (void)count, (void)dim;
#endif
}
// Four tiles of 8 x 8. Lane l says where row l % 8 of tile l / 8 is, and gets, of each, row l / 4, columns 2 (l % 4) and the next; across: of its transpose.
template <bool across>
__device__ __forceinline__ void load_tiles(uint32_t (&to)[4], const unsigned char* row) {
#if defined(BABYGPT_CUDA_EMULATOR)
    if constexpr (across) emulator::ldmatrix_x4_trans(to, row);
    else emulator::ldmatrix_x4(to, row);
#elif defined(__CUDA_ARCH__)
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (across)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at));
#else
    (void)to, (void)row;
#endif
}
// d += a b, on tiles of 16 x 16 and 16 x 8. In lane 4 g + t are: of a, rows g and g + 8, columns 2 t, 2 t + 1 and those 8 further; of b, rows 2 t,
// 2 t + 1 and those 8 further, column g; of d, rows g and g + 8, columns 2 t and 2 t + 1.
template <class Real = __nv_bfloat16>
__device__ __forceinline__ void multiply_tiles(float (&d)[4], const uint32_t (&a)[4], uint32_t upper, uint32_t lower) {
#if defined(BABYGPT_CUDA_EMULATOR)
    if (is_half<Real> && emulator::settings.major < 8) {
        emulator::mma_m16n8k8(d, {a[0], a[1]}, {upper}, __half());
        emulator::mma_m16n8k8(d, {a[2], a[3]}, {lower}, __half());
    } else emulator::mma_m16n8k16(d, a, {upper, lower}, Real());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (is_half<Real>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(upper), "r"(lower));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(upper), "r"(lower));
#elif defined(__CUDA_ARCH__)  // before 2020: fp16 alone, and half as deep; Gpu::create has refused bf16
    if constexpr (is_half<Real>) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(upper));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2]), "r"(a[3]), "r"(lower));
    } else (void)d, (void)a, (void)upper, (void)lower;
#else
    (void)d, (void)a, (void)upper, (void)lower;
#endif
}
// Two sums of 16 x 8 that lie beside each other as the a of the next product.
template <class Real>
__device__ __forceinline__ void pack(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = two<Real>(left[0], left[1]), a[1] = two<Real>(left[2], left[3]);
    a[2] = two<Real>(right[0], right[1]), a[3] = two<Real>(right[2], right[3]);
}
// A strip's sums, times a factor for its rows g and another for g + 8, to `count` rows in device memory, or added to them. The lanes of a row exchange
// theirs, so that each has 16 bytes side by side.
template <int C, class Real>
__device__ __forceinline__ void store_strip(Real* to, int64_t stride, const StripSums<C>& sum, float upper, float lower, int count, int dim,
                                            bool adds) {
    const int g = lane() / 4, t = lane() % 4;
    BABYGPT_TIMES (half, 2)
        BABYGPT_TIMES (j, C / 32) {
            const float factor = half ? lower : upper;
            uint32_t w[4];
            BABYGPT_TIMES (i, 4) w[i] = two<Real>(sum[4 * j + i][2 * half] * factor, sum[4 * j + i][2 * half + 1] * factor);
            BABYGPT_TIMES (i, 2) {
                const uint32_t other = __shfl_xor_sync(0xffffffffu, t % 2 ? w[2 * i] : w[2 * i + 1], 1);
                if (t % 2) w[2 * i] = other;
                else w[2 * i + 1] = other;
            }
            BABYGPT_TIMES (i, 2) {
                const uint32_t other = __shfl_xor_sync(0xffffffffu, t / 2 ? w[i] : w[i + 2], 2);
                if (t / 2) w[i] = other;
                else w[i + 2] = other;
            }
            const int row = g + 8 * half, column = 32 * j + 8 * t;
            if (row >= count || column >= dim) continue;
            uint4* const place = reinterpret_cast<uint4*>(to + row * stride + column);
            if (adds) {
                const uint4 before = *place;
                const uint32_t b[4] = {before.x, before.y, before.z, before.w};
                BABYGPT_TIMES (i, 4) w[i] = two<Real>(low_of<Real>(b[i]) + low_of<Real>(w[i]), high_of<Real>(b[i]) + high_of<Real>(w[i]));
            }
            *place = make_uint4(w[0], w[1], w[2], w[3]);
        }
}
// to += the sums of a strip's first `count` rows, times a factor: of a strip of C columns lane 4 g + t gets C / 32, of which the ith is column_of(i).
// A lane has two rows of C / 4 columns; three times two lanes exchange, and each goes on with half of what it had.
template <int C>
using ColumnSums = float[static_cast<size_t>(C / 32)];
template <int C>
__device__ __forceinline__ int column_of(int i) {
    const int place = lane() / 4 * (C / 32) + i;
    return place / 2 * 8 + lane() % 4 * 2 + place % 2;
}
template <int C>
__device__ __forceinline__ void add_rows_up(ColumnSums<C>& to, const StripSums<C>& strip_sums, float factor, int count) {
    const int g = lane() / 4;
    const float upper = g < count ? factor : 0.0f, lower = g + 8 < count ? factor : 0.0f;
    float sum[static_cast<size_t>(C / 4)];
    BABYGPT_TIMES (i, C / 4) sum[i] = fmaf(strip_sums[i / 2][i % 2], upper, strip_sums[i / 2][i % 2 + 2] * lower);
    BABYGPT_TIMES (step, 3) {
        const int left = C / 8 >> step, apart = 16 >> step;
        const bool has_upper = (lane() & apart) != 0;
        BABYGPT_TIMES (i, C / 8) {
            if (i >= left) continue;
            const float other = __shfl_xor_sync(0xffffffffu, has_upper ? sum[i] : sum[i + left], apart);
            sum[i] = (has_upper ? sum[i + left] : sum[i]) + other;
        }
    }
    BABYGPT_TIMES (i, C / 32) to[i] += sum[i];
}

// A block has a tile of a head's queries, and goes through the keys that they see, 32 at a time: maximum, sum and y so far are put right when a
// greater maximum comes (Milakov & Gimelshein 2018). 8 bytes for each element of y; where there are several tiles, keys and values again for
// each, from the cache.
template <int C, class Real>
__global__ void __launch_bounds__(strip_threads, narrow_blocks<C>(false)) attention_forward_narrow(Attend<Real> a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    constexpr int steps = C / 16, row_bytes = 2 * C;
    const int rows = a.rows, number = static_cast<int>(blockIdx.x) / a.tiles / a.heads,
              head = static_cast<int>(blockIdx.x) / a.tiles % a.heads, chunk = static_cast<int>(blockIdx.x) % a.tiles;
    if (number >= now->sequences) return;
    const int queries = a.places[number].length - chunk * rows;
    if (queries <= 0) return;
    const int row = a.places[number].row + chunk * rows, key_row = a.seen[number].row, keys = a.seen[number].length;
    const int64_t width = static_cast<int64_t>(a.heads) * a.dim, column = static_cast<int64_t>(head) * a.dim,
                  kv_column = static_cast<int64_t>(head / (a.heads / a.kv_heads)) * a.dim;
    unsigned char *const q = memory, *const k = q + rows * row_bytes, *const v = k + rows * row_bytes;
    uint64_t* const drop_keys = reinterpret_cast<uint64_t*>(v + rows * row_bytes);
    const int g = lane() / 4, t = lane() % 4, strips = strips_of(lesser(rows, queries));
    const int by_rows = piece_at<C>(lane() % 16, lane() / 16), by_columns = piece_at<C>(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    const bool drops = now->drop_below != 0;
    const NextBlock next = next_block(a, now, a.heads);
    const float unit = a.scale * 1.44269504089f;  // probabilities are powers of 2
    copy_rows_narrow<C>(q, a.q + row * a.q_stride + column, a.q_stride, rows, queries, a.dim);
    for (int i = static_cast<int>(threadIdx.x); drops && i < rows; i += strip_threads) drop_keys[i] = drop_key(now, a.side, a.op, row + i);
    for (int pass = 0, there = -1; pass * strip_warps < strips; ++pass) {
        const int number_of_strip = strip_of(pass, strips), first = number_of_strip * strip;
        const bool works = number_of_strip < strips;
        Strip<C> left;
        StripSums<C> sum = {};
        float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
        for (int part = 0; part * rows < keys && (!a.causal || part <= chunk); ++part) {
            if (part != there) {
                const int64_t at = (key_row + part * rows) * a.k_stride + kv_column;
                __syncthreads();
                copy_rows_narrow<C>(k, a.k + at, a.k_stride, rows, keys - part * rows, a.dim);
                copy_rows_narrow<C>(v, a.v + at, a.k_stride, rows, keys - part * rows, a.dim);
                copies_arrive();
                __syncthreads();
                if (there < 0) {
                    const int64_t key_column = static_cast<int64_t>(next.head / (a.heads / a.kv_heads)) * a.dim;
                    rows_to_cache(a.q + next.row * a.q_stride + next.head * a.dim, a.q_stride, next.queries, a.dim);
                    rows_to_cache(a.k + next.key_row * a.k_stride + key_column, a.k_stride, next.keys, a.dim);
                    rows_to_cache(a.v + next.key_row * a.k_stride + key_column, a.k_stride, next.keys, a.dim);
                }
                there = part;
            }
            if (!works) continue;
            if (part == 0)
                BABYGPT_TIMES (i, steps) load_tiles<false>(left[i], q + first * row_bytes + (by_rows ^ i * 32));
            const int some = lesser(rows, keys - part * rows);
            const bool diagonal = a.causal && part == chunk;
            const int end = diagonal ? lesser(some, first + strip) : some;
            for (int k0 = 0; k0 < end; k0 += 32) {
                float s[4][4] = {};
                BABYGPT_TIMES (i, steps)
                    BABYGPT_TIMES (n, 2) {
                        uint32_t right[4];
                        load_tiles<false>(right, k + (k0 + 16 * n) * row_bytes + (by_columns ^ i * 32));
                        multiply_tiles<Real>(s[2 * n], left[i], right[0], right[1]);
                        multiply_tiles<Real>(s[2 * n + 1], left[i], right[2], right[3]);
                    }
                if (k0 + 32 > end || (diagonal && k0 + 31 > first))
                    BABYGPT_TIMES (e, 4) {
                        const int sees = (diagonal ? lesser(some, first + g + e / 2 * 8 + 1) : some) - k0 - 2 * t - e % 2;
                        BABYGPT_TIMES (n, 4) s[n][e] = 8 * n < sees ? s[n][e] : -INFINITY;
                    }
                BABYGPT_TIMES (half, 2) {
                    float biggest = most[half], more = 0;
                    BABYGPT_TIMES (n, 4) biggest = fmaxf(biggest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                    biggest = fmaxf(biggest, __shfl_xor_sync(0xffffffffu, biggest, 1));
                    biggest = fmaxf(biggest, __shfl_xor_sync(0xffffffffu, biggest, 2));
                    const float factor = power_of_2((most[half] - biggest) * unit), base = biggest * unit;
                    BABYGPT_TIMES (n, 4)
                        BABYGPT_TIMES (e, 2) {
                            float& p = s[n][2 * half + e];
                            p = power_of_2(fmaf(p, unit, -base));
                            more += p;
                        }
                    most[half] = biggest, total[half] = fmaf(total[half], factor, more);
                    BABYGPT_TIMES (j, C / 8) sum[j][2 * half] *= factor, sum[j][2 * half + 1] *= factor;
                }
                if (drops)
                    BABYGPT_TIMES (n, 4)
                        BABYGPT_TIMES (e, 4)
                            s[n][e] *=
                                drop_factor(now, drop_keys[first + g + e / 2 * 8], head * 65536 + part * rows + k0 + 8 * n + 2 * t + e % 2);
                BABYGPT_TIMES (n, 2) {
                    uint32_t p[4];
                    pack<Real>(p, s[2 * n], s[2 * n + 1]);
                    BABYGPT_TIMES (j, steps) {
                        uint32_t right[4];
                        load_tiles<true>(right, v + (k0 + 16 * n) * row_bytes + (by_rows ^ j * 32));
                        multiply_tiles<Real>(sum[2 * j], p, right[0], right[1]);
                        multiply_tiles<Real>(sum[2 * j + 1], p, right[2], right[3]);
                    }
                }
            }
        }
        if (!works) continue;
        BABYGPT_TIMES (half, 2) {
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
            const int i = first + g + 8 * half;
            if (t == 0 && i < queries)
                *reinterpret_cast<float2*>(a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2) =
                    make_float2(most[half] * a.scale, total[half]);
        }
        store_strip<C>(a.y + (row + first) * width + column, width, sum, 1 / total[0], 1 / total[1], queries - first, a.dim, false);
    }
}

// Q and dY of `rows` queries, of which `count` are there, and what is known of each: the dropout's key; the logarithm of what its powers of 2 are
// divided by, which is endless for those that are not there, so that their p is 0; D = dy . y. A thread's pieces are copy_rows_narrow's.
template <int C, class Real>
__device__ __forceinline__ void load_queries_narrow(const Attend<Real>& a, const Now* now, unsigned char* q, unsigned char* dy,
                                                    uint64_t* drop_keys, float* logarithm, float* D, int row, int count, int head) {
    constexpr int pieces = C / 8, step = strip_threads / pieces;
    constexpr unsigned each = most_tile_rows / step;
    const int i0 = static_cast<int>(threadIdx.x) / pieces, piece = static_cast<int>(threadIdx.x) % pieces;
    const int64_t width = static_cast<int64_t>(a.heads) * a.dim, column = static_cast<int64_t>(head) * a.dim;
    copy_rows_narrow<C>(q, a.q + row * a.q_stride + column, a.q_stride, a.rows, count, a.dim);
    copy_rows_narrow<C>(dy, a.dy + row * width + column, width, a.rows, count, a.dim);
    const Real* const y = a.y + row * width + column + piece * 8;
    uint4 own[each];
    BABYGPT_TIMES (n, each) {
        const int i = i0 + n * step;
        own[n] = i < lesser(a.rows, count) && piece * 8 < a.dim ? *reinterpret_cast<const uint4*>(y + i * width) : make_uint4(0, 0, 0, 0);
    }
    for (int i = static_cast<int>(threadIdx.x); i < a.rows; i += strip_threads) {
        const float* const from = a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2;
        logarithm[i] = i < count ? fmaf(from[0], 1.44269504089f, log2f(from[1])) : INFINITY;
        if (now->drop_below != 0) drop_keys[i] = drop_key(now, a.side, a.op, row + i);
    }
    copies_arrive();
    BABYGPT_TIMES (n, each) {
        const int i = i0 + n * step;
        const uint4 other = i < a.rows ? *reinterpret_cast<const uint4*>(dy + piece_at<C>(i, piece)) : make_uint4(0, 0, 0, 0);
        const uint32_t x[4] = {own[n].x, own[n].y, own[n].z, own[n].w}, z[4] = {other.x, other.y, other.z, other.w};
        float sum = 0;
        BABYGPT_TIMES (e, 4) sum = fmaf(low_of<Real>(x[e]), low_of<Real>(z[e]), fmaf(high_of<Real>(x[e]), high_of<Real>(z[e]), sum));
        for (int apart = pieces / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (piece == 0 && i < a.rows) D[i] = sum;
    }
}
// Of a score, p, with f the dropout's factor: f p, and p (f dp - D), which is ds without the scale.
template <bool drops>
__device__ __forceinline__ void score_gradient(float& s, float& dp, float unit, float logarithm, float D, const Now* now,
                                               const uint64_t* drop_key, int i) {
    const float p = power_of_2(fmaf(s, unit, -logarithm)), f = drops ? drop_factor(now, *drop_key, i) : 1.0f;
    s = drops ? p * f : p;
    dp = p * (drops ? fmaf(dp, f, -D) : dp - D);
}
// First dk = sum over the queries of ds q, and dv = sum of f p dy: a block has a tile of a kv head's keys, and goes through the queries that see them, 16
// at a time, head after head of those that share it. Then dq = sum over the keys of ds k: it has the tile of queries with the same number, and goes
// through the keys that they see. A tile that is there already is not loaded again. Where a.parts is there, no heads share keys and nothing is added
// to, and it leaves the sums over its rows, too. 16 bytes for each element of q where one tile is all.
template <int C, class Real>
__global__ void __launch_bounds__(strip_threads, narrow_blocks<C>(true)) attention_backward_narrow(Attend<Real> a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    constexpr int steps = C / 16, row_bytes = 2 * C;
    constexpr bool holds = C <= 64;  // a strip in registers; otherwise it is loaded for each product
    const int rows = a.rows, number = static_cast<int>(blockIdx.x) / a.tiles / a.kv_heads,
              kv_head = static_cast<int>(blockIdx.x) / a.tiles % a.kv_heads, chunk = static_cast<int>(blockIdx.x) % a.tiles;
    const bool there = number < now->sequences;
    const int row = there ? a.places[number].row : 0, queries = there ? a.places[number].length : 0,
              key_row = there ? a.seen[number].row : 0, keys = there ? a.seen[number].length : 0, group = a.heads / a.kv_heads;
    const int64_t kv_column = static_cast<int64_t>(kv_head) * a.dim, width = static_cast<int64_t>(a.heads) * a.dim;
    float* const parts = a.parts ? a.parts + (static_cast<int64_t>(number) * a.tiles + chunk) * 3 * width + kv_column : nullptr;
    if (chunk * rows >= queries && chunk * rows >= keys) {
        for (int i = static_cast<int>(threadIdx.x); parts && i < 3 * a.dim; i += strip_threads) parts[i / a.dim * width + i % a.dim] = 0;
        return;
    }
    ColumnSums<C> dq_sums = {}, dk_sums = {}, dv_sums = {};
    unsigned char *const k = memory, *const v = k + rows * row_bytes, *const q = v + rows * row_bytes, *const dy = q + rows * row_bytes;
    uint64_t* const drop_keys = reinterpret_cast<uint64_t*>(dy + rows * row_bytes);
    float *const logarithm = reinterpret_cast<float*>(drop_keys + rows), *const D = logarithm + rows;
    const int g = lane() / 4, t = lane() % 4;
    const int by_rows = piece_at<C>(lane() % 16, lane() / 16), by_columns = piece_at<C>(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    const bool drops = now->drop_below != 0;
    const float unit = a.scale * 1.44269504089f;
    const NextBlock next = next_block(a, now, a.kv_heads);
    int keys_there = -1, queries_there = -1, head_there = -1;
    const auto load = [&](int key_tile, int query_tile, int head) {
        const bool new_keys = key_tile != keys_there, new_queries = query_tile != queries_there || head != head_there;
        if (!new_keys && !new_queries) return;
        __syncthreads();
        if (new_keys) {
            const int64_t at = (key_row + key_tile * rows) * a.k_stride + kv_column;
            copy_rows_narrow<C>(k, a.k + at, a.k_stride, rows, keys - key_tile * rows, a.dim);
            copy_rows_narrow<C>(v, a.v + at, a.k_stride, rows, keys - key_tile * rows, a.dim);
        }
        if (new_queries)
            load_queries_narrow<C>(a, now, q, dy, drop_keys, logarithm, D, row + query_tile * rows, queries - query_tile * rows, head);
        else copies_arrive();
        __syncthreads();
        keys_there = key_tile, queries_there = query_tile, head_there = head;
    };

    const int first_head = kv_head * group, some_keys = lesser(rows, keys - chunk * rows), key_strips = strips_of(some_keys);
    if (key_strips > 0 && (a.causal ? chunk : 0) * rows < queries) load(chunk, a.causal ? chunk : 0, first_head);
    const int64_t query_column = static_cast<int64_t>(next.head) * group * a.dim, key_column = static_cast<int64_t>(next.head) * a.dim;
    rows_to_cache(a.k + next.key_row * a.k_stride + key_column, a.k_stride, next.keys, a.dim);
    rows_to_cache(a.v + next.key_row * a.k_stride + key_column, a.k_stride, next.keys, a.dim);
    rows_to_cache(a.q + next.row * a.q_stride + query_column, a.q_stride, next.queries, a.dim);
    rows_to_cache(a.dy + next.row * width + query_column, width, next.queries, a.dim);
    for (int pass = 0; pass * strip_warps < key_strips; ++pass) {
        const int number_of_strip = strip_of(pass, key_strips), first = number_of_strip * strip, from = a.causal ? chunk : 0;
        const bool works = number_of_strip < key_strips;
        Strip<holds ? C : strip> key, value;
        StripSums<C> dk = {}, dv = {};
        for (int head = first_head; head < first_head + group; ++head)
            for (int part = from; part * rows < queries; ++part) {
                load(chunk, part, head);
                if (!works) continue;
                if (holds && head == first_head && part == from)
                    BABYGPT_TIMES (i, steps) {
                        load_tiles<false>(key[holds ? i : 0], k + first * row_bytes + (by_rows ^ i * 32));
                        load_tiles<false>(value[holds ? i : 0], v + first * row_bytes + (by_rows ^ i * 32));
                    }
                const int some = lesser(rows, queries - part * rows);
                const bool diagonal = a.causal && part == chunk;
                for (int i0 = diagonal ? first : 0; i0 < some; i0 += strip) {
                    float s[2][4] = {}, dp[2][4] = {};
                    BABYGPT_TIMES (i, steps) {
                        constexpr int held = holds ? 1 : 0;
                        if (!holds) {
                            load_tiles<false>(key[0], k + first * row_bytes + (by_rows ^ i * 32));
                            load_tiles<false>(value[0], v + first * row_bytes + (by_rows ^ i * 32));
                        }
                        uint32_t right[4];
                        load_tiles<false>(right, q + i0 * row_bytes + (by_columns ^ i * 32));
                        multiply_tiles<Real>(s[0], key[held * i], right[0], right[1]);
                        multiply_tiles<Real>(s[1], key[held * i], right[2], right[3]);
                        load_tiles<false>(right, dy + i0 * row_bytes + (by_columns ^ i * 32));
                        multiply_tiles<Real>(dp[0], value[held * i], right[0], right[1]);
                        multiply_tiles<Real>(dp[1], value[held * i], right[2], right[3]);
                    }
                    if (diagonal && i0 == first)
                        BABYGPT_TIMES (n, 2)
                            BABYGPT_TIMES (e, 4) s[n][e] = g + e / 2 * 8 > 8 * n + 2 * t + e % 2 ? -INFINITY : s[n][e];
                    BABYGPT_TIMES (n, 2) {
                        const int i = i0 + 8 * n + 2 * t;
                        const float2 l = *reinterpret_cast<const float2*>(logarithm + i), d = *reinterpret_cast<const float2*>(D + i);
                        const int j = head * 65536 + chunk * rows + first + g;
                        if (drops)
                            BABYGPT_TIMES (e, 4)
                                score_gradient<true>(s[n][e], dp[n][e], unit, e % 2 ? l.y : l.x, e % 2 ? d.y : d.x, now,
                                                     drop_keys + i + e % 2, j + e / 2 * 8);
                        else
                            BABYGPT_TIMES (e, 4)
                                score_gradient<false>(s[n][e], dp[n][e], unit, e % 2 ? l.y : l.x, e % 2 ? d.y : d.x, now, nullptr, 0);
                    }
                    uint32_t p[4], ds[4];
                    pack<Real>(p, s[0], s[1]);
                    pack<Real>(ds, dp[0], dp[1]);
                    BABYGPT_TIMES (j, steps) {
                        uint32_t right[4];
                        load_tiles<true>(right, dy + i0 * row_bytes + (by_rows ^ j * 32));
                        multiply_tiles<Real>(dv[2 * j], p, right[0], right[1]);
                        multiply_tiles<Real>(dv[2 * j + 1], p, right[2], right[3]);
                        load_tiles<true>(right, q + i0 * row_bytes + (by_rows ^ j * 32));
                        multiply_tiles<Real>(dk[2 * j], ds, right[0], right[1]);
                        multiply_tiles<Real>(dk[2 * j + 1], ds, right[2], right[3]);
                    }
                }
            }
        if (!works) continue;
        const int64_t at = (key_row + chunk * rows + first) * a.k_stride + kv_column;
        store_strip<C>(a.dk + at, a.k_stride, dk, a.scale, a.scale, some_keys - first, a.dim, a.adds_kv);
        store_strip<C>(a.dv + at, a.k_stride, dv, 1, 1, some_keys - first, a.dim, a.adds_kv);
        if (parts) add_rows_up<C>(dk_sums, dk, a.scale, some_keys - first), add_rows_up<C>(dv_sums, dv, 1, some_keys - first);
    }

    const int some_queries = lesser(rows, queries - chunk * rows), query_strips = strips_of(some_queries);
    for (int head = first_head; head < first_head + group; ++head)
        for (int pass = 0; pass * strip_warps < query_strips; ++pass) {
            const int number_of_strip = strip_of(pass, query_strips), first = number_of_strip * strip;
            const bool works = number_of_strip < query_strips;
            Strip<holds ? C : strip> query, gradient;
            StripSums<C> dq = {};
            float l[2] = {}, d[2] = {};
            for (int part = 0; part * rows < keys && (!a.causal || part <= chunk); ++part) {
                load(part, chunk, head);
                if (!works) continue;
                if (part == 0) {
                    if (holds)
                        BABYGPT_TIMES (i, steps) {
                            load_tiles<false>(query[holds ? i : 0], q + first * row_bytes + (by_rows ^ i * 32));
                            load_tiles<false>(gradient[holds ? i : 0], dy + first * row_bytes + (by_rows ^ i * 32));
                        }
                    BABYGPT_TIMES (half, 2) l[half] = logarithm[first + g + 8 * half], d[half] = D[first + g + 8 * half];
                }
                const int some = lesser(rows, keys - part * rows);
                const bool diagonal = a.causal && part == chunk;
                const int end = diagonal ? lesser(some, first + strip) : some;
                for (int k0 = 0; k0 < end; k0 += strip) {
                    float s[2][4] = {}, dp[2][4] = {};
                    BABYGPT_TIMES (i, steps) {
                        constexpr int held = holds ? 1 : 0;
                        if (!holds) {
                            load_tiles<false>(query[0], q + first * row_bytes + (by_rows ^ i * 32));
                            load_tiles<false>(gradient[0], dy + first * row_bytes + (by_rows ^ i * 32));
                        }
                        uint32_t right[4];
                        load_tiles<false>(right, k + k0 * row_bytes + (by_columns ^ i * 32));
                        multiply_tiles<Real>(s[0], query[held * i], right[0], right[1]);
                        multiply_tiles<Real>(s[1], query[held * i], right[2], right[3]);
                        load_tiles<false>(right, v + k0 * row_bytes + (by_columns ^ i * 32));
                        multiply_tiles<Real>(dp[0], gradient[held * i], right[0], right[1]);
                        multiply_tiles<Real>(dp[1], gradient[held * i], right[2], right[3]);
                    }
                    if (k0 + strip > some || (diagonal && k0 == first))
                        BABYGPT_TIMES (e, 4) {
                            const int sees = (diagonal ? lesser(some, first + g + e / 2 * 8 + 1) : some) - k0 - 2 * t - e % 2;
                            BABYGPT_TIMES (n, 2) s[n][e] = 8 * n < sees ? s[n][e] : -INFINITY;
                        }
                    BABYGPT_TIMES (n, 2) {
                        const int j = head * 65536 + part * rows + k0 + 8 * n + 2 * t;
                        if (drops)
                            BABYGPT_TIMES (e, 4)
                                score_gradient<true>(s[n][e], dp[n][e], unit, l[e / 2], d[e / 2], now, drop_keys + first + g + e / 2 * 8,
                                                     j + e % 2);
                        else
                            BABYGPT_TIMES (e, 4) score_gradient<false>(s[n][e], dp[n][e], unit, l[e / 2], d[e / 2], now, nullptr, 0);
                    }
                    uint32_t ds[4];
                    pack<Real>(ds, dp[0], dp[1]);
                    BABYGPT_TIMES (j, steps) {
                        uint32_t right[4];
                        load_tiles<true>(right, k + k0 * row_bytes + (by_rows ^ j * 32));
                        multiply_tiles<Real>(dq[2 * j], ds, right[0], right[1]);
                        multiply_tiles<Real>(dq[2 * j + 1], ds, right[2], right[3]);
                    }
                }
            }
            if (!works) continue;
            const int64_t at = (row + chunk * rows + first) * a.q_stride + static_cast<int64_t>(head) * a.dim;
            store_strip<C>(a.dq + at, a.q_stride, dq, a.scale, a.scale, some_queries - first, a.dim, a.adds_q);
            if (parts) add_rows_up<C>(dq_sums, dq, a.scale, some_queries - first);
        }
    if (!parts) return;
    float* const of_warps = reinterpret_cast<float*>(memory);  // [warps][3][C], where the tiles were
    __syncthreads();
    BABYGPT_TIMES (i, C / 32) {
        float* const to = of_warps + static_cast<int>(threadIdx.x) / warp * 3 * C + column_of<C>(i);
        to[0] = dq_sums[i], to[C] = dk_sums[i], to[2 * C] = dv_sums[i];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 3 * C; i += strip_threads) {
        float sum = 0;
        for (int w = 0; w < strip_warps; ++w) sum += of_warps[w * 3 * C + i];
        if (i % C < a.dim) parts[i / C * width + i % C] = sum;
    }
}

// ---- pool: the first row of a sequence, or the mean of all. A warp has a sequence, or, backward, a row. Real bytes: 1; 2 --------------

template <class Real>
__global__ void pool_forward(Real* y, const Real* x, const Place* places, const Now* now, int n, bool first) {
    for (int i = first_row(); i < now->sequences; i += all_warps()) {
        const Real* rows = x + static_cast<int64_t>(places[i].row) * n;
        for (int c = lane(); c < n; c += warp) {
            float total = static_cast<float>(rows[c]);
            for (int row = 1; row < places[i].length && !first; ++row) total += static_cast<float>(rows[static_cast<int64_t>(row) * n + c]);
            put(y + static_cast<int64_t>(i) * n + c, first ? total : total / static_cast<float>(places[i].length));
        }
    }
}
template <class Real>
__global__ void pool_backward(Real* dx, const Real* dy, const Place* places, const Where* where, const Now* now, int n, bool first,
                              bool adds) {
    for (int row = first_row(); row < now->rows[0]; row += all_warps()) {
        const Place of = places[where[row].sequence];
        for (int c = lane(); c < n; c += warp) {
            const float whole = static_cast<float>(dy[static_cast<int64_t>(where[row].sequence) * n + c]);
            const float d = !first ? whole / static_cast<float>(of.length) : row == of.row ? whole : 0.0f;
            Real* const to = dx + static_cast<int64_t>(row) * n + c;
            put(to, adds ? static_cast<float>(*to) + d : d);
        }
    }
}

// ---- output head with softmax cross-entropy ------------------------------------------------------------------------------

// A warp has a row of logits, of a chunk of rows that begins at `first`, or a block has it where the row is long: the loss, the target's rank, and,
// where it learns, the logits' gradients in their place: dl = softmax(l) - (1-e) [v is the target] - e/V, times the row's weight and the loss's scale. Real bytes: 1 to
// read, 1 again (where a long row has no room in shared memory) and 1 to write.
template <class Real>
__device__ __forceinline__ float exp_like(float x) {  // as exact as Real deserves
    if constexpr (sizeof(Real) == 2) return exp2f(x * 1.44269504f);
    else return expf(x);
}
constexpr int long_row = 1024, long_row_threads = 512;
template <class Real, bool by_block>
__global__ void __launch_bounds__(by_block ? long_row_threads : block_threads)
    head_loss(Real* logits, int64_t stride, double* losses, int32_t* ranks, const int32_t* targets, const float* row_weights,
              const float* loss_scale, Extent extent, const Now* now, int vocab, bool learns, bool keeps) {
    constexpr int warps = long_row_threads / warp;
    BABYGPT_SHARED(float, shared, (3 * warps));
    BABYGPT_DYNAMIC_SHARED(memory);
    constexpr int size = 16 / static_cast<int>(sizeof(Real)), lanes = by_block ? long_row_threads : warp;
    const int rows = extent.now(now), me = by_block ? static_cast<int>(threadIdx.x) : lane();
    const bool aligned = stride % size == 0;
    const float smoothing = static_cast<float>(now->smoothing);
    const auto of_all = [&](float x, int place, const auto& join) {  // of all lanes
        for (int apart = warp / 2; apart > 0; apart /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, apart));
        if (!by_block) return x;
        float* const of_warps = shared + place * warps;
        if (lane() == 0) of_warps[me / warp] = x;
        __syncthreads();
        x = of_warps[0];
        for (int i = 1; i < warps; ++i) x = join(x, of_warps[i]);
        return x;
    };
    const auto plus = [](float a, float b) { return a + b; };
    for (int i = by_block ? static_cast<int>(blockIdx.x) : first_row(); i < rows;
         i += by_block ? static_cast<int>(gridDim.x) : all_warps()) {
        Real* const l = logits + i * stride;
        Real* const kept = keeps ? reinterpret_cast<Real*>(memory) : l;  // each thread reads again what it has read itself
        const int row = extent.first + i, target = targets[row];
        const float wanted = target < 0 ? 0.0f : static_cast<float>(l[target]);
        const auto over_logits = [&](const auto& f) {
            int v = size * me;
            BABYGPT_UNROLL(4)
            for (; aligned && v + size <= vocab; v += size * lanes) f(v, Size<size>());
            const int rest = aligned ? vocab / size * size : 0;
            for (v = rest + me; v < vocab; v += lanes) f(v, Size<1>());
        };
        float biggest = -INFINITY, sum = 0, all = 0, rank = 0;  // sum: of e^(l - biggest)
        over_logits([&](int v, auto count) {
            float x[count.many], most = biggest;
            load(x, l + v);
            if (keeps) store(kept + v, x);
            for (const float one : x) most = fmaxf(most, one);
            if (most > biggest) sum *= exp_like<Real>(biggest - most), biggest = most;
            for (const float one : x) sum += exp_like<Real>(one - biggest);
            if (smoothing > 0)
                for (const float one : x) all += one;
            if (!learns)
                for (int k = 0; k < count.value; ++k) rank += x[k] > wanted || (v + k < target && !(x[k] < wanted)) ? 1.0f : 0.0f;
        });
        const float most = of_all(biggest, 0, [](float a, float b) { return fmaxf(a, b); });
        sum = of_all(sum * exp_like<Real>(biggest - (most == -INFINITY ? 0.0f : most)), 1, plus);
        if (smoothing > 0) all = of_all(all, 2, plus);
        else if (!learns) rank = of_all(rank, 2, plus);
        if (smoothing > 0 && !learns) rank = of_all(rank, 0, plus);
        if (me == 0) {
            double loss = static_cast<double>(logf(sum)) + static_cast<double>(most) - (1 - now->smoothing) * static_cast<double>(wanted);
            if (smoothing > 0) loss -= now->smoothing * static_cast<double>(all) / vocab;
            losses[row] = target < 0 ? 0 : loss, ranks[row] = target < 0 ? 0 : static_cast<int32_t>(rank);
        }
        if (learns) {
            if (!by_block) __syncwarp();  // all lanes have read what is written over now
            const float weight = target < 0 ? 0.0f : row_weights[row] * (loss_scale ? *loss_scale : 1.0f), factor = weight / sum;
            const float each = smoothing / static_cast<float>(vocab) * weight, more = (1 - smoothing) * weight;
            over_logits([&](int v, auto count) {
                float x[count.many];
                load(x, kept + v);
                for (float& one : x) one = weight != 0 ? fmaf(exp_like<Real>(one - most), factor, -each) : 0.0f;
                if (v <= target && target < v + count.value)
                    for (int k = 0; k < count.value; ++k) x[k] -= v + k == target ? more : 0.0f;
                store(l + v, x);
            });
            for (int64_t v = vocab + me; v < stride; v += lanes) put(l + v, 0.0f);  // cuBLASLt reads two columns at a time
        }
        if (by_block) __syncthreads();  // before `shared` is of another row
    }
}

// Adds the run's losses up, times their weights, and counts the targets that count: parts [2][blocks], over elements, then one block. 20 bytes
// a row.
__device__ __forceinline__ double block_sum(double x, double* shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = block_threads / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + static_cast<unsigned>(half)];
        __syncthreads();
    }
    return shared[0];
}
__global__ void loss_parts(double* parts, const double* losses, const int32_t* targets, const float* row_weights, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    double loss = 0, count = 0;
    for (int64_t i = first_element(); i < now->targets; i += all_threads())
        if (targets[i] >= 0) loss += static_cast<double>(row_weights[i]) * losses[i], count += 1;
    loss = block_sum(loss, shared);
    __syncthreads();
    count = block_sum(count, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = loss, parts[gridDim.x + blockIdx.x] = count;
}
__global__ void add_losses_up(Sums* sums, const double* parts, int blocks, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    double loss = 0, count = 0;
    for (int i = static_cast<int>(threadIdx.x); i < blocks; i += block_threads) loss += parts[i], count += parts[blocks + i];
    loss = block_sum(loss, shared);
    __syncthreads();
    count = block_sum(count, shared);
    if (threadIdx.x != 0) return;
    sums->loss = now->fresh ? loss : sums->loss + loss;
    sums->targets = now->fresh ? count : sums->targets + count;
}

// =====================================================================================================================
// [CHAPTER 7] Learning
// =====================================================================================================================

// The sum of the gradients' squares, in double: a part a block, over elements. 4 bytes a weight.
__global__ void square_parts(double* parts, const float* g, int64_t n) {
    BABYGPT_SHARED(double, shared, block_threads);
    double sum = 0;
    for (int64_t i = first_element(); i < n; i += all_threads()) sum = fma(static_cast<double>(g[i]), static_cast<double>(g[i]), sum);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// Then one block: the norm, whether all is finite, and what the gradients are multiplied by. `results` are the host's, in pinned memory.
// The loss's scale (Micikevicius et al. 2018) is halved where something is not finite, and doubled after so many updates.
constexpr int updates_to_double = 2000;
__global__ void judge(Sums* sums, Sums* results, float* loss_scale, const double* parts, int count, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += block_threads) sum += parts[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0) return;
    const double targets = now->count > 0 ? now->count : fmax(sums->targets, 1.0);
    const double divisor = loss_scale ? targets * static_cast<double>(*loss_scale) : targets, norm = sqrt(sum) / divisor;
    sums->norm = norm;
    sums->skipped = !(fabs(norm) <= 1.7e308) || !(fabs(sums->loss) <= 1.7e308);
    sums->scale = static_cast<float>((now->clip > 0 && norm > now->clip ? now->clip / norm : 1) / divisor);
    results[now->result] = *sums;
    if (!loss_scale) return;
    const bool doubles = !sums->skipped && loss_scale[1] + 1 >= updates_to_double;
    if (sums->skipped) loss_scale[0] = fmaxf(loss_scale[0] * 0.5f, 0x1p-24f);  // whose loss is not finite may not change it for ever
    if (doubles) loss_scale[0] = fminf(loss_scale[0] * 2, 0x1p100f);
    loss_scale[1] = sums->skipped || doubles ? 0 : loss_scale[1] + 1;
}
// The header's adamw; then the gradient becomes zero. Over elements, four at a time. 32 bytes a weight, and 2 where it has a narrow copy.
// What Muon keeps apart gets the header's muon_momentum: its gradient is what will be made orthogonal.
constexpr unsigned char way_decays = 1, way_muon = 2;
template <class Real>
__global__ void adamw(float* w, Real* narrow, float* m, float* v, float* g, const unsigned char* ways, int64_t n, const Sums* sums,
                      const Now* now) {
    constexpr float tiny = 1e-30f;
    const AdamW a = now->adam;
    const Muon muon = now->muon;
    const float scale = sums->scale;
    const bool skipped = sums->skipped != 0;
    for (int64_t i = 4 * first_element(); i < n; i += 4 * all_threads()) {  // the block is made of sixteens
        float gradient[4], first[4], second[4], weight[4];
        load(gradient, g + i), load(first, m + i), load(second, v + i), load(weight, w + i);
        if (skipped) {
            store(g + i, {0, 0, 0, 0});
            continue;
        }
        if (ways[i / 16] & way_muon) {
            for (int k = 0; k < 4; ++k) {
                const float rest = muon.one_minus_momentum * (gradient[k] * scale);
                first[k] = fmaf(muon.momentum, first[k], rest);
                if (first[k] < tiny && first[k] > -tiny) first[k] = 0;
                gradient[k] = fmaf(muon.momentum, first[k], rest);
                weight[k] *= muon.keep;
            }
            store(m + i, first), store(w + i, weight), store(g + i, gradient);
            continue;
        }
        const float decay = ways[i / 16] & way_decays ? a.decay : 0.0f;
        for (int k = 0; k < 4; ++k) {
            const float scaled = gradient[k] * scale;
            first[k] = fmaf(a.beta1, first[k], a.one_minus_beta1 * scaled);
            second[k] = fmaf(a.beta2, second[k], a.one_minus_beta2 * (scaled * scaled));
            if (first[k] < tiny && first[k] > -tiny) first[k] = 0;
            if (second[k] < tiny) second[k] = 0;
            weight[k] = fmaf(-a.step_size, first[k] / fmaf(sqrtf(second[k]), a.root_scale, a.epsilon), fmaf(-decay, weight[k], weight[k]));
        }
        store(m + i, first), store(v + i, second), store(w + i, weight);
        if (narrow) store(narrow + i, weight);
        store(g + i, {0, 0, 0, 0});  // last: sooner, while the line is still on its way here, made all of it 2.7 times slower
    }
}

// ---- Muon: all matrices in each launch, which are a block's y ------------------------------------------------------------------------

// As the header's muon_step: with G = u u^T / trace, P = a I + b G + c G^2, Q = P Q, G = P G P, five times; w += Q u, scaled. A matrix has five squares
// of the shorter side's size; products are the float one's, in its tiles. 34 n^3 + 4 n^2 m FLOPs for n x m numbers: 86 GFLOP an update of baby.
__device__ __forceinline__ int tile_row(int columns) { return static_cast<int>(blockIdx.x) / ((columns + tile - 1) / tile) * tile; }
__device__ __forceinline__ int tile_column(int columns) { return static_cast<int>(blockIdx.x) % ((columns + tile - 1) / tile) * tile; }
// Square 0 = u u^T, for the shorter side of u.
__global__ void __launch_bounds__(block_threads) muon_gram(const MuonMatrix* matrices, const float* u, float* space) {
    BABYGPT_SHARED(float, a, (tile_depth * tile_stride));
    BABYGPT_SHARED(float, b, (tile_depth * tile_stride));
    const MuonMatrix m = matrices[blockIdx.y];
    const int row0 = tile_row(m.n), column0 = tile_column(m.n);
    if (row0 >= m.n) return;
    const float* const from = u + m.at;
    float* const to = space + m.space;
    const auto start = [](int, int) { return 0.0f; };
    const auto end = [&](int i, int j, float sum) { to[static_cast<int64_t>(i) * m.n + j] = sum; };
    if (m.rows <= m.cols) sum_tile<true, true>(a, b, from, m.stride, from, m.stride, m.n, m.n, row0, column0, 0, m.cols, start, end);
    else sum_tile<false, false>(a, b, from, m.stride, from, m.stride, m.n, m.n, row0, column0, 0, m.rows, start, end);
}
// Divides square 0 by its trace. Where that is nothing, nothing has been learnt, or the update is skipped: there is no direction. A block has a matrix.
__global__ void muon_normalise(const MuonMatrix* matrices, float* space, float* turned, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    const MuonMatrix m = matrices[blockIdx.x];
    float* const g = space + m.space;
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < m.n; i += block_threads)
        sum += static_cast<double>(g[static_cast<int64_t>(i) * m.n + i]);
    const double trace = block_sum(sum, shared);
    const bool learns = trace > 1e-30;
    const float inverse = learns ? static_cast<float>(1 / trace) : 0.0f;
    __syncthreads();  // all have read what is written over now
    for (int i = static_cast<int>(threadIdx.x); i < m.n * m.n; i += block_threads) g[i] *= inverse;
    if (threadIdx.x == 0)
        turned[blockIdx.x] =
            learns ? static_cast<float>(-static_cast<double>(now->muon.step_size) * static_cast<double>(m.longer) / sqrt(trace)) : 0.0f;
}
// Square `to` = factor left right + more left + diagonal I, times `turned` of the matrix where that is not null.
struct SquareProduct {
    int to, left, right;
    float factor, more, diagonal;
};
__global__ void __launch_bounds__(block_threads)
    muon_square(const MuonMatrix* matrices, float* space, SquareProduct p, const float* turned) {
    BABYGPT_SHARED(float, a, (tile_depth * tile_stride));
    BABYGPT_SHARED(float, b, (tile_depth * tile_stride));
    const MuonMatrix m = matrices[blockIdx.y];
    const int row0 = tile_row(m.n), column0 = tile_column(m.n);
    if (row0 >= m.n) return;
    float *const squares = space + m.space, *const to = squares + p.to * m.square();
    const float *const left = squares + p.left * m.square(), *const right = squares + p.right * m.square();
    const float factor = turned ? p.factor * turned[blockIdx.y] : p.factor;
    sum_tile<true, false>(
        a, b, left, m.n, right, m.n, m.n, m.n, row0, column0, 0, m.n, [](int, int) { return 0.0f; },
        [&](int i, int j, float sum) {
            const int64_t at = static_cast<int64_t>(i) * m.n + j;
            to[at] = fmaf(factor, sum, p.more != 0 ? p.more * left[at] : 0.0f) + (i == j ? p.diagonal : 0.0f);
        });
}
// w += square u, or u square.
__global__ void __launch_bounds__(block_threads)
    muon_turn(const MuonMatrix* matrices, float* w, const float* u, const float* space, int square) {
    BABYGPT_SHARED(float, a, (tile_depth * tile_stride));
    BABYGPT_SHARED(float, b, (tile_depth * tile_stride));
    const MuonMatrix m = matrices[blockIdx.y];
    const int row0 = tile_row(m.cols), column0 = tile_column(m.cols);
    if (row0 >= m.rows) return;
    float* const to = w + m.at;
    const float *const q = space + m.space + square * m.square(), *const from = u + m.at;
    const auto start = [&](int i, int j) { return to[i * m.stride + j]; };
    const auto end = [&](int i, int j, float sum) { to[i * m.stride + j] = sum; };
    if (m.rows <= m.cols) sum_tile<true, false>(a, b, q, m.n, from, m.stride, m.rows, m.cols, row0, column0, 0, m.n, start, end);
    else sum_tile<true, false>(a, b, from, m.stride, q, m.n, m.rows, m.cols, row0, column0, 0, m.n, start, end);
}
// Of what Muon keeps apart: the gradient becomes zero, the narrow copy the weight. Over elements, four at a time. 8 bytes, and 2.
template <class Real>
__global__ void muon_finish(const float* w, Real* narrow, float* g, const unsigned char* ways, int64_t n) {
    for (int64_t i = 4 * first_element(); i < n; i += 4 * all_threads()) {
        if (!(ways[i / 16] & way_muon)) continue;
        float weight[4];
        load(weight, w + i);
        if (narrow) store(narrow + i, weight);
        store(g + i, {0, 0, 0, 0});
    }
}

// ---- the device ----------------------------------------------------------------------------------------------------------

// All state. There are three walks of the tape: a forward pass alone, one with a backward pass, and one with an update after it; each for batches
// that are full, and for those that are not. The first of each launches kernel after kernel, so that the driver loads what it loads only when
// it is called; the second is captured in a graph. From then on a step is a copy of the batch
// (of running text: of where its windows begin) and one graph launch, and the host waits for none of it until it reads a result.

// What the host keeps of a run until it has ended: what is copied to the device, in pinned memory, and the event of its end.
struct Slot {
    Now* now;
    Place* places[2];
    cudaEvent_t ended;
};
constexpr int slots_there = 2 * steps_ahead;
struct Gpu {
    DevicePlan plan;
    Memory memory{};
    Memory input{};  // the host's copy of the arrays that are sent
    Slot slots[slots_there] = {};
    Sums* results = nullptr;                         // of the last updates, pinned: [steps_ahead]
    uint64_t runs = 0, runs_ended = 0;               // begun; of these the first so many are known to have ended
    uint64_t updates = 0, run_of[steps_ahead] = {};  // that made each of the last updates
    void *block = nullptr, *input_block = nullptr;
    uint64_t bytes = 0;
    int ordinal = 0, processors = 1, shared_bytes = 0, tile_of_attention = 32;
    cudaStream_t stream = nullptr;
    cudaEvent_t sent = nullptr;
    cudaGraphExec_t graphs[3][2] = {};
    bool walked[3][2] = {};
    bool full = false;             // the walk is of a batch that has all rows there might be
    cudaEvent_t* marks = nullptr;  // where somebody asks for the times of ops: [2 * ops + 1], before the first and after each
    int marks_made = 0;
    bool fresh = true;                // no run since the last update
    bool sending = false;             // a copy of the input's arrays may be under way
    cudaError_t error = cudaSuccess;  // of the first launch that failed
    cublasStatus_t product_error = CUBLAS_STATUS_SUCCESS;
    cublasLtHandle_t library = nullptr;
    Tensorial* products = nullptr;  // those that have been wanted
    cudaEvent_t trial[2] = {};      // before and after one that is tried
    Status choosing;                // how that went
    RowSums waiting{};              // sums over rows, for being added: so many, whose parts take so much of their room
    int sums_waiting = 0;
    int64_t row_parts_used = 0;

    template <class... Wanted, class... Given>
    void launch(void (*kernel)(Wanted...), int64_t blocks, int splits, size_t shared, Given... given) {
        launch_of(block_threads, kernel, blocks, splits, shared, given...);
    }
    template <class... Wanted, class... Given>
    void launch_of(int threads, void (*kernel)(Wanted...), int64_t blocks, int splits, size_t shared, Given... given) {
        if (!walked_well().ok()) return;  // what comes after a failure would compute from what is not there
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(greater<int64_t>(blocks, 1)), static_cast<unsigned>(splits));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        error = cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...);
    }
    // The two layouts' blocks: for n elements, for n rows. No more than keep the device busy.
    int64_t blocks(int64_t n, int64_t each) const { return lesser<int64_t>(parts_of(n, each), processors * int64_t(32)); }
    template <class... Wanted, class... Given>
    void over_elements(void (*kernel)(Wanted...), int64_t n, Given... given) {
        if (n > 0) launch(kernel, blocks(n, block_threads), 1, 0, given...);
    }
    template <class... Wanted, class... Given>
    void over_rows(void (*kernel)(Wanted...), int64_t n, Given... given) {
        if (n > 0) launch(kernel, blocks(n, block_warps), 1, 0, given...);
    }

    // ---- where things are ----

    const Tensor& at(int tensor) const { return plan.tensors[static_cast<size_t>(tensor)]; }
    template <class Real>
    Real* values(int tensor) const {
        return tensor == nothing ? nullptr : static_cast<Real*>(memory.activations) + at(tensor).offset;
    }
    template <class Real>
    Real* gradient(int tensor) const {
        return tensor == nothing || at(tensor).gradient < 0 ? nullptr : static_cast<Real*>(memory.activations) + at(tensor).gradient;
    }
    // What a norm or attention keeps, in float.
    template <class Real>
    float* statistics(int tensor) const {
        return reinterpret_cast<float*>(values<Real>(tensor));
    }
    const float* weight(int index) const {
        return index == nothing ? nullptr : memory.weights + plan.weights[static_cast<size_t>(index)].weight.offset;
    }
    float* weight_gradient(int index) const {
        return index == nothing || plan.frozen ? nullptr : memory.gradients + plan.weights[static_cast<size_t>(index)].weight.offset;
    }
    int64_t in_adapter(int index) const { return plan.adapter[static_cast<size_t>(index)].weight.offset; }
    int max_rows(const Op& op) const { return plan.max_rows[static_cast<int>(op.side)]; }
    bool runs_backward(const Op& op) const { return !at(op.y != nothing ? op.y : op.x).fixed; }

    // ---- products ----

    // f of a number of the type that Real is.
    template <class F>
    auto with_real(const F& f) const {
        if (plan.precision == Precision::bf16) return f(__nv_bfloat16());
        if (plan.precision == Precision::fp16) return f(__half());
        return f(float());
    }
    // Rows of an activation or a gradient that cuBLASLt is about to multiply.
    template <class Real>
    const Real* side_of(Real* x, Extent rows, int64_t n) {
        if (!full) over_elements(clear_rest<Real>, rows.size * n, x, rows, memory.now, n);
        return x;
    }
    template <class Real>
    const Real* side_of_weight(int index) const {
        const int64_t offset = plan.weights[static_cast<size_t>(index)].weight.offset;
        if constexpr (sizeof(Real) == 2) return static_cast<const Real*>(memory.narrow_weights) + offset;
        else return memory.weights + offset;
    }
    template <class Real>
    const void* bias_of(int index, bool wide) const {
        if (index == nothing) return nullptr;
        return wide ? static_cast<const void*>(weight(index)) : side_of_weight<Real>(index);
    }
    // On tensor cores.
    template <class Real>
    void multiply_fast(const Matmul& m) {
        const Tensorial* const t = walked_well().ok() ? tensorial(m) : nullptr;
        if (!t) return;
        product_error = multiply_by(*t, m, t->choice.algo);
        if (!t->alone) return;
        void* const to = t->place(m);
        const int64_t all = static_cast<int64_t>(m.rows.size) * m.columns;
        if (m.bias && m.wide)
            over_rows(add_bias<float, float>, m.rows.size, static_cast<float*>(to), static_cast<const float*>(m.bias), m.c_stride, m.rows,
                      memory.now, m.columns);
        else if (m.bias)
            over_rows(add_bias<Real, Real>, m.rows.size, static_cast<Real*>(to), static_cast<const Real*>(m.bias), m.c_stride, m.rows,
                      memory.now, m.columns);
        if (m.gelu)
            over_elements(activate<Real>, all, static_cast<Real*>(m.c), static_cast<const Real*>(to), memory.now, m.rows.side, m.columns,
                          Activation::gelu_tanh);
    }
    const Tensorial* tensorial(const Matmul& m);
    cublasStatus_t plan_product(Tensorial& t) const;
    cublasStatus_t ask_for_plans(const Tensorial& t, uint32_t schemes, cublasLtMatmulHeuristicResult_t* plans, int most, int& found) const;
    cublasStatus_t multiply_by(const Tensorial& t, const Matmul& m, const cublasLtMatmulAlgo_t& way) const;
    Status try_plan(const Tensorial& t, const Matmul& m, const cublasLtMatmulAlgo_t& way, float& least, uint64_t& hash);
    Status choose(Tensorial& t, const Matmul& m);

    template <class A, class B, class C>
    void multiply(const Product<A, B, C>& p, bool a_along, bool b_along, int splits = 1) {
        const int64_t tiles = parts_of(p.rows.size, tile) * parts_of(p.columns, tile);
        const auto kernel =
            a_along ? (b_along ? product<true, true, A, B, C> : product<true, false, A, B, C>) : product<false, false, A, B, C>;
        launch(kernel, tiles, splits, 0, p, memory.now);
    }
    // g [rows][columns] += a^T b, summed over the run's rows.
    template <class Real>
    void multiply_over_rows(float* g, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride, int rows, int columns,
                            Extent depth) {
        const int splits = splits_of(depth.size, rows, columns);
        float* const c = splits > 1 ? memory.parts : g;
        multiply(
            Product<Real, Real, float>{
                c, columns, splits > 1 ? nullptr : g, columns, a, b, a_stride, b_stride, {rows, -1, 0}, depth, columns},
            false, false, splits);
        const int64_t n = static_cast<int64_t>(rows) * columns;
        if (splits > 1) over_elements(add_parts, n, g, memory.parts, splits, n);
    }
    template <class Real>
    void weights_gradient(float* g, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride, int rows, int columns, Extent depth) {
        if (!on_tensor_cores(plan)) return multiply_over_rows(g, a, a_stride, b, b_stride, rows, columns, depth);
        multiply_fast<Real>(Matmul{g, columns, g, a, b, a_stride, b_stride, false, false, true, {rows, -1, 0}, depth, columns});
    }
    // Room for the parts of sums over rows, which are added by the end of the walk.
    float* room_for_parts(int64_t size) {
        if (row_parts_used + size > row_parts_room(plan)) add_sums(), row_parts_used = 0;
        float* const parts = memory.row_parts + row_parts_used;
        row_parts_used += size;
        return parts;
    }
    void add_later(const RowSum& sum) {
        if (!sum.to) return;
        bool waits = false;
        for (int i = 0; i < sums_waiting; ++i) waits = waits || waiting.of[i].to == sum.to;  // one launch adds to a place once
        if (waits || sums_waiting == most_waiting) add_sums();
        waiting.of[sums_waiting++] = sum;
    }
    void add_sums() {
        int widest = 0;
        for (int i = 0; i < sums_waiting; ++i) widest = greater(widest, waiting.of[i].n);
        if (sums_waiting > 0) launch(add_row_sums, parts_of(widest, sum_columns), sums_waiting, 0, waiting);
        sums_waiting = 0;
    }
    // db += the sum of dy's rows; dw += that of dy * h, where x and its norm's statistics are given.
    template <class Real>
    void sum_over_rows(float* db, float* dw, const Real* dy, int64_t stride, const Real* x, const float* statistics, Extent rows, int n) {
        const int count = parts_of_rows(rows.size), kinds = dw ? 2 : 1;
        const bool fours = n % 4 == 0 && stride % 4 == 0;
        float* const parts = room_for_parts(static_cast<int64_t>(count) * kinds * n);
        launch(fours ? sums_over_rows<4, Real> : sums_over_rows<1, Real>, parts_of(n, fours ? 4 * warp : warp), count, 0, parts, dy, stride,
               dw ? x : nullptr, statistics, rows, memory.now, n);
        add_later(RowSum{db, parts, kinds * n, count, n});
        add_later(RowSum{dw, parts + n, kinds * n, count, n});
    }

    Status create(const DevicePlan& of);
    void destroy();
    template <class Real>
    void linear_forward(const Op& op);
    template <class Real>
    void linear_backward(const Op& op);
    template <class Real>
    void lora_forward(const Op& op, Real* to);
    template <class Real>
    void lora_backward(const Op& op);
    template <class Real>
    void norm_there(const Op& op);
    template <class Real>
    void norm_back(const Op& op);
    template <class Real>
    void embed_backward(const Op& op);
    template <class Real>
    void head(const Op& op, bool learns);
    template <class Real>
    void attention(const Op& op, int number, bool backward);
    template <int T, class Real>
    void attention_of(Attend<Real> a, bool backward);
    template <int C, class Real>
    void attention_on_tensor_cores(Attend<Real> a, bool backward, float* bias_gradient = nullptr);
    template <class Real>
    Status allow_shared() const;
    template <class Real = __nv_bfloat16>
    Status allow_shared_on_tensor_cores() const;
    template <class Real>
    void op_forward(int number, bool learns);
    template <class Real>
    void op_backward(int number);
    void begin_launches() { error = cudaSuccess, product_error = CUBLAS_STATUS_SUCCESS, (void)(choosing = Status()); }
    void walk(int which, bool marked);
    template <class F>
    void over_matrices(const F& f) const;
    void orthogonalise();
    Status walked_well() const {
        if (!choosing.ok()) return choosing;
        if (product_error != CUBLAS_STATUS_SUCCESS) return trouble("cublasLtMatmul", product_error);
        return error == cudaSuccess ? Status() : trouble("cudaLaunchKernelEx", error);
    }
    Status walk_now(int which, double* seconds);
    Status make_marks();
    void mark(int number, bool marked) {
        const cudaError_t recorded = marked ? cudaEventRecord(marks[number], stream) : cudaSuccess;
        if (error == cudaSuccess) error = recorded;
    }
    template <class Real>
    void walk_tape(bool learns, bool marked);
    Status capture(int which, cudaGraphExec_t& to);
    void write_now(const Run& run, const DeviceUpdate* update);
    Status send(const Run& run, const DeviceUpdate* update);
    Status send_arrays(const Run& run);
    Slot& slot() { return slots[runs % slots_there]; }
    Status wait_for(uint64_t run);
    template <class T>
    Status send_array(T* to, T* by_way_of, const T* from, int64_t n) {
        if (n == 0) return Status();
        memcpy(by_way_of, from, static_cast<size_t>(n) * sizeof(T));
        BABYGPT_CUDA(cudaMemcpyAsync(to, by_way_of, static_cast<size_t>(n) * sizeof(T), cudaMemcpyHostToDevice, stream));
        return Status();
    }
    float* part(DevicePart which) const;
    int64_t elements(DevicePart which) const {
        switch (which) {
            case DevicePart::weights:
                return plan.weight_block;
            case DevicePart::adapter:
                return plan.adapter_block;
            case DevicePart::loss_scale:
                return memory.loss_scale ? 2 : 0;
            default:
                return learnt_block(plan);
        }
    }
};

// =====================================================================================================================
// [CHAPTER 6] Walking the tape
// =====================================================================================================================

cublasStatus_t Gpu::plan_product(Tensorial& t) const {
    const Matmul& m = t.of;
    const cudaDataType_t type = plan.precision == Precision::bf16   ? CUDA_R_16BF
                                : plan.precision == Precision::fp16 ? CUDA_R_16F
                                                                    : CUDA_R_32F,
                         type_of_c = m.wide ? CUDA_R_32F : type;
    const bool biased = m.bias && !t.alone, gelu = m.gelu && !t.alone;
    const int32_t across_b = m.b_along ? CUBLAS_OP_T : CUBLAS_OP_N, across_a = m.a_along ? CUBLAS_OP_N : CUBLAS_OP_T,
                  epilogue = gelu && biased && m.aux ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
                             : gelu && biased        ? CUBLASLT_EPILOGUE_GELU_BIAS
                             : gelu && m.aux         ? CUBLASLT_EPILOGUE_GELU_AUX
                             : gelu                  ? CUBLASLT_EPILOGUE_GELU
                             : biased                ? CUBLASLT_EPILOGUE_BIAS
                                                     : CUBLASLT_EPILOGUE_DEFAULT;
    const uint64_t rows = static_cast<uint64_t>(m.rows.size), columns = static_cast<uint64_t>(m.columns),
                   depth = static_cast<uint64_t>(m.depth.size);
    const int64_t aux_stride = m.columns;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto after = [&](cublasStatus_t next) { status = status == CUBLAS_STATUS_SUCCESS ? next : status; };
    const auto set = [&](cublasLtMatmulDescAttributes_t which, const void* value, size_t size) {
        if (status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulDescSetAttribute(t.product, which, value, size);
    };
    after(cublasLtMatmulDescCreate(&t.product, plan.precision == Precision::tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                                   CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, &across_b, sizeof across_b);
    set(CUBLASLT_MATMUL_DESC_TRANSB, &across_a, sizeof across_a);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (biased) {
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type_of_c, sizeof type_of_c);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &m.bias, sizeof m.bias);
    }
    if (gelu && m.aux) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_stride, sizeof aux_stride);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &m.aux, sizeof m.aux);
    }
    after(cublasLtMatrixLayoutCreate(&t.b, type, m.b_along ? depth : columns, m.b_along ? columns : depth, m.b_stride));
    after(cublasLtMatrixLayoutCreate(&t.a, type, m.a_along ? depth : rows, m.a_along ? rows : depth, m.a_stride));
    after(cublasLtMatrixLayoutCreate(&t.c, type_of_c, columns, rows, m.c_stride));
    int found = 0;
    if (status == CUBLAS_STATUS_SUCCESS) status = ask_for_plans(t, CUBLASLT_REDUCTION_SCHEME_MASK, &t.choice, 1, found);
    return status == CUBLAS_STATUS_SUCCESS && found == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : status;
}
// The library's first plans, in its own order. schemes: how they may add what parts of the depth come to.
cublasStatus_t Gpu::ask_for_plans(const Tensorial& t, uint32_t schemes, cublasLtMatmulHeuristicResult_t* plans, int most,
                                  int& found) const {
    const uint32_t alignment = 16;
    const size_t space = workspace_bytes;
    cublasLtMatmulPreference_t wish = nullptr;
    cublasStatus_t status = cublasLtMatmulPreferenceCreate(&wish);
    const auto want = [&](cublasLtMatmulPreferenceAttributes_t which, const void* value, size_t size) {
        if (status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulPreferenceSetAttribute(wish, which, value, size);
    };
    want(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &space, sizeof space);
    want(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes);
    for (const auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        want(which, &alignment, sizeof alignment);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(library, t.product, t.b, t.a, t.c, t.c, wish, most, plans, &found);
    if (wish) (void)cublasLtMatmulPreferenceDestroy(wish);
    return status;
}
cublasStatus_t Gpu::multiply_by(const Tensorial& t, const Matmul& m, const cublasLtMatmulAlgo_t& way) const {
    const float one = 1, beta = m.start ? 1.0f : 0.0f;
    void* const to = t.place(m);
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto point = [&](cublasLtMatmulDescAttributes_t which, const void* at) {
        if (status == CUBLAS_STATUS_SUCCESS && at) status = cublasLtMatmulDescSetAttribute(t.product, which, &at, sizeof at);
    };
    if (!t.alone) point(CUBLASLT_MATMUL_DESC_BIAS_POINTER, m.bias), point(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, m.aux);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    // The library's matrices stand in columns: their rows are our columns, its left side is our right one.
    return cublasLtMatmul(library, t.product, &one, m.b, t.b, m.a, t.a, &beta, m.start ? m.start : to, t.c, to, t.c, &way, memory.workspace,
                          workspace_bytes, stream);
}
// The least of several times, in ms, and what the bits of the result come to; 0: the plan does not work.
Status Gpu::try_plan(const Tensorial& t, const Matmul& m, const cublasLtMatmulAlgo_t& way, float& least, uint64_t& hash) {
    least = INFINITY, hash = 0;
    for (int i = 0; i < times_tried; ++i) {  // the first time it loads what it needs
        float ms = 0;
        BABYGPT_CUDA(cudaEventRecord(trial[0], stream));
        if (multiply_by(t, m, way) != CUBLAS_STATUS_SUCCESS) return Status();
        BABYGPT_CUDA(cudaEventRecord(trial[1], stream));
        BABYGPT_CUDA(cudaStreamSynchronize(stream));
        BABYGPT_CUDA(cudaEventElapsedTime(&ms, trial[0], trial[1]));
        if (i > 0) least = lesser(least, ms);
    }
    uint64_t parts[hash_parts];
    uint64_t* const there = reinterpret_cast<uint64_t*>(memory.workspace);
    const int64_t words = static_cast<int64_t>(m.rows.size) * m.columns * (m.wide ? 4 : real_bytes(plan)) / 4;
    for (const void* const matrix : {t.place(m), t.alone ? nullptr : m.aux}) {
        if (!matrix) continue;
        launch(hash_matrix, hash_blocks, 1, 0, there, static_cast<const uint32_t*>(matrix), words);
        BABYGPT_CUDA_TRY(walked_well());
        BABYGPT_CUDA(cudaMemcpyAsync(parts, there, sizeof parts, cudaMemcpyDeviceToHost, stream));
        BABYGPT_CUDA(cudaStreamSynchronize(stream));
        for (const uint64_t part : parts) hash += part;
    }
    return Status();
}
// Of the plans that add in one sequence the fastest that makes the bits which the library's own choice makes of these numbers, millions of sums: one that
// added in another order would show in some of them. So what is fastest today changes no result. The product is made several times: not where it
// grows by it.
Status Gpu::choose(Tensorial& t, const Matmul& m) {
    if (m.start == m.c || m.c_stride != m.columns) return Status();
    cublasLtMatmulHeuristicResult_t plans[8];
    int found = 0;
    const cublasStatus_t asked = ask_for_plans(t, CUBLASLT_REDUCTION_SCHEME_NONE, plans, 8, found);
    if (asked != CUBLAS_STATUS_SUCCESS || found == 0) return Status();
    for (cudaEvent_t& event : trial)
        if (!event) BABYGPT_CUDA(cudaEventCreate(&event));
    float least, ms;
    uint64_t wanted, hash;
    BABYGPT_CUDA_TRY(try_plan(t, m, t.choice.algo, least, wanted));
    for (int i = 0; i < found; ++i) {
        BABYGPT_CUDA_TRY(try_plan(t, m, plans[i].algo, ms, hash));
        if (hash != 0 && hash == wanted && ms < least) t.choice = plans[i], least = ms;
    }
    return Status();
}
void destroy_plan(Tensorial& t) {
    if (t.product) (void)cublasLtMatmulDescDestroy(t.product);
    for (cublasLtMatrixLayout_t layout : {t.a, t.b, t.c})
        if (layout) (void)cublasLtMatrixLayoutDestroy(layout);
    t.product = nullptr, t.a = t.b = t.c = nullptr;
}
// Null: there is an error.
const Tensorial* Gpu::tensorial(const Matmul& m) {
    for (const Tensorial* t = products; t; t = t->next)
        if (t->fits(m)) return t;
    Tensorial* const t = new (std::nothrow) Tensorial();
    cublasStatus_t status = t ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
    if (t) {
        t->of = m;
        status = plan_product(*t);
        if (status == CUBLAS_STATUS_NOT_SUPPORTED && (m.bias || m.gelu)) {
            destroy_plan(*t);
            t->alone = true;
            status = plan_product(*t);
        }
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        t->next = products, products = t;
        (void)(choosing = choose(*t, m));  // nvcc wants that seen
        return choosing.ok() ? t : nullptr;
    }
    if (t) destroy_plan(*t);
    delete t;
    if (product_error == CUBLAS_STATUS_SUCCESS) product_error = status;
    return nullptr;
}

template <class Real>
void Gpu::linear_forward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const Extent all{rows, side, 0};
    const int64_t w_stride = plan.output_rows ? op.in : op.out;
    Real *const x = values<Real>(op.x), *const aux = values<Real>(op.aux), *y = values<Real>(op.y);
    // With LoRA the activation comes last, of what both have added up to.
    const bool fast = on_tensor_cores(plan), gelu = fast && op.loras == 0 && op.activation == Activation::gelu_tanh;
    const bool late = op.activation != Activation::none && (op.loras > 0 || (fast && !gelu));
    Real* const to = late && aux ? aux : y;
    if (fast) {
        const Op* const sum = op.sum == nothing ? nullptr : &plan.ops[static_cast<size_t>(op.sum)];
        Matmul m{to,    op.out,         nullptr, side_of(x, all, op.in),    side_of_weight<Real>(op.w),
                 op.in, w_stride,       true,    plan.output_rows,          false,
                 all,   {op.in, -1, 0}, op.out,  bias_of<Real>(op.b, false)};
        if (gelu) m.gelu = true, m.aux = aux;
        if (sum) m.c = values<Real>(sum->y), m.start = side_of(values<Real>(sum->x), all, op.out);
        multiply_fast<Real>(m);
    } else if constexpr (sizeof(Real) == 4)
        multiply(Product<float, float, float>{to,
                                              op.out,
                                              weight(op.b),
                                              0,
                                              x,
                                              weight(op.w),
                                              op.in,
                                              w_stride,
                                              all,
                                              {op.in, -1, 0},
                                              op.out,
                                              1,
                                              late ? nullptr : aux,
                                              late ? Activation::none : op.activation},
                 true, plan.output_rows);
    if (op.loras > 0) lora_forward(op, to);
    if (late) over_elements(activate<Real>, static_cast<int64_t>(rows) * op.out, y, to, memory.now, side, op.out, op.activation);
}
// LoRA: h = (x A^T) scale, then y += h B^T
template <class Real>
void Gpu::lora_forward(const Op& op, Real* y) {
    const Extent all{max_rows(op), static_cast<int>(op.side), 0};
    Real* const low = op.low == nothing ? static_cast<Real*>(memory.low) : values<Real>(op.low);
    const int64_t stride = static_cast<int64_t>(op.loras) * plan.rank;
    for (int i = 0; i < op.loras; ++i) {
        const Lora& lora = plan.loras[static_cast<size_t>(op.lora + i)];
        Real *const h = low + i * plan.rank, *const to = y + lora.first;
        multiply(Product<Real, float, Real>{h,
                                            stride,
                                            nullptr,
                                            0,
                                            values<Real>(op.x),
                                            memory.adapter + in_adapter(lora.a),
                                            op.in,
                                            op.in,
                                            all,
                                            {op.in, -1, 0},
                                            plan.rank,
                                            static_cast<float>(plan.lora_scale)},
                 true, true);
        multiply(
            Product<Real, float, Real>{
                to, op.out, to, op.out, h, memory.adapter + in_adapter(lora.b), stride, plan.rank, all, {plan.rank, -1, 0}, lora.outputs},
            true, true);
    }
}
// dy becomes the gradient before the activation; db = sum over rows of dy, dW = x^T dy, dx = dy W^T.
template <class Real>
void Gpu::linear_backward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const Extent all{rows, side, 0};
    const int64_t w_stride = plan.output_rows ? op.in : op.out;
    Real *const dy = gradient<Real>(op.y), *const dx = gradient<Real>(op.x), *const x = values<Real>(op.x);
    float *const dw = weight_gradient(op.w), *const db = weight_gradient(op.b);
    const bool activates = op.activation != Activation::none, sums = db && op.bias_sum == nothing;
    if (activates && sums && op.out % 4 == 0) {
        const int count = parts_of_rows(rows);
        float* const parts = room_for_parts(static_cast<int64_t>(count) * op.out);
        launch(activate_backward_summing<Real>, parts_of(op.out, 4 * warp), count, 0, dy, parts, values<Real>(op.aux), all, memory.now,
               op.out, op.activation);
        add_later(RowSum{db, parts, op.out, count, op.out});
    } else {
        if (activates)
            over_elements(activate_backward<Real>, static_cast<int64_t>(rows) * op.out, dy, values<Real>(op.aux), memory.now, side, op.out,
                          op.activation);
        if (sums) sum_over_rows<Real>(db, nullptr, dy, op.out, nullptr, nullptr, all, op.out);
    }
    const bool fast = on_tensor_cores(plan);
    if (fast && (dw || dx)) (void)side_of(dy, all, op.out);
    if (fast && dw) (void)side_of(x, all, op.in);
    if (dw && plan.output_rows) weights_gradient<Real>(dw, dy, op.out, x, op.in, op.out, op.in, all);
    else if (dw) weights_gradient<Real>(dw, x, op.in, dy, op.out, op.in, op.out, all);
    Real* const start = op.adds_to_dx ? dx : nullptr;
    if (dx && fast) {
        Matmul m{dx,
                 op.in,
                 start ? side_of(start, all, op.in) : nullptr,
                 dy,
                 side_of_weight<Real>(op.w),
                 op.out,
                 w_stride,
                 true,
                 !plan.output_rows,
                 false,
                 all,
                 {op.out, -1, 0},
                 op.in};
        multiply_fast<Real>(m);
    } else if constexpr (sizeof(Real) == 4) {
        if (dx)
            multiply(Product<float, float, float>{dx, op.in, start, op.in, dy, weight(op.w), op.out, w_stride, all, {op.out, -1, 0}, op.in},
                     true, !plan.output_rows);
    }
    lora_backward<Real>(op);
}
// dB = dy^T h,  dh = (dy B) scale,  dA = dh^T x,  dx += dh A.
template <class Real>
void Gpu::lora_backward(const Op& op) {
    const Extent all{max_rows(op), static_cast<int>(op.side), 0};
    const int rank = plan.rank;
    const int64_t stride = static_cast<int64_t>(op.loras) * rank;
    const Real* const x = values<Real>(op.x);
    Real* const dx = gradient<Real>(op.x);
    for (int i = 0; i < op.loras; ++i) {
        const Lora& lora = plan.loras[static_cast<size_t>(op.lora + i)];
        const int64_t a = in_adapter(lora.a), b = in_adapter(lora.b);
        const Real *h = values<Real>(op.low) + i * rank, *dy = gradient<Real>(op.y) + lora.first;
        Real* const dh = gradient<Real>(op.low) + i * rank;
        multiply_over_rows<Real>(memory.gradients + b, dy, op.out, h, stride, lora.outputs, rank, all);
        multiply(Product<Real, float, Real>{dh,
                                            stride,
                                            nullptr,
                                            0,
                                            dy,
                                            memory.adapter + b,
                                            op.out,
                                            rank,
                                            all,
                                            {lora.outputs, -1, 0},
                                            rank,
                                            static_cast<float>(plan.lora_scale)},
                 true, false);
        multiply_over_rows<Real>(memory.gradients + a, dh, stride, x, op.in, rank, op.in, all);
        if (dx)
            multiply(Product<Real, float, Real>{dx, op.in, dx, op.in, dh, memory.adapter + a, stride, op.in, all, {rank, -1, 0}, op.in},
                     true, false);
    }
}
template <class Real>
void Gpu::norm_there(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), n = op.in;
    const bool keeps = n % 4 == 0 && n <= device_norm_columns, few = n <= 4 * warp * 3;
    const auto kernel = !keeps ? norm_forward<Real> : few ? norm_forward_keeping<Real, 3> : norm_forward_keeping<Real, 8>;
    const int64_t resident = processors * 2 * (few ? norm_blocks<3> : norm_blocks<8>), all = blocks(rows, block_warps);
    if (rows > 0)
        launch(kernel, keeps ? lesser(all, resident) : all, 1, 0, values<Real>(op.y), statistics<Real>(op.aux), values<Real>(op.x),
               weight(op.w), weight(op.b), memory.now, side, n, static_cast<float>(plan.epsilon), op.centred);
}
template <class Real>
void Gpu::norm_back(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), n = op.in;
    const float *const aux = statistics<Real>(op.aux), *const w = weight(op.w);
    const Real *const x = values<Real>(op.x), *const dy = gradient<Real>(op.y);
    float *const dw = weight_gradient(op.w), *const db = weight_gradient(op.b);
    Real* const dx = gradient<Real>(op.x);
    if (!dw || n % 4 != 0 || n > device_norm_columns) {
        if (dw) sum_over_rows<Real>(db, dw, dy, n, x, aux, {rows, side, 0}, n);
        return over_rows(norm_backward<Real>, rows, dx, dy, x, aux, w, memory.now, side, n, op.centred, op.adds_to_dx);
    }
    static_assert(device_norm_columns <= 4 * warp * 8);
    const Op* const biased = op.bias_sum == nothing ? nullptr : &plan.ops[static_cast<size_t>(op.bias_sum)];
    const bool few = n <= 4 * warp * 3;
    const int count = lesser(parts_of_rows(rows), processors * (few ? norm_blocks<3> : norm_blocks<8>));
    float* const parts = room_for_parts(3 * static_cast<int64_t>(count) * n);
    launch(few ? norm_backward_summing<Real, 3> : norm_backward_summing<Real, 8>, count, 1, 0, dx, parts, dy, x, aux, w, memory.now, side,
           n, op.centred, op.adds_to_dx);
    float* const sums[3] = {db, dw, biased ? weight_gradient(biased->b) : nullptr};
    for (int i = 0; i < 3; ++i) add_later(RowSum{sums[i], parts + i * n, 3 * n, count, n});
}
template <class Real>
void Gpu::embed_backward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), n = op.out;
    const int64_t parts = parts_of(rows, sort_block);
    const uint32_t* keys = nullptr;
    const int32_t *sorted = nullptr, *ids = memory.ids[side];
    int to = 0;
    for (int shift = 0; shift == 0 || (shift < 32 && (plan.vocab - 1) >> shift != 0); shift += 8, to = 1 - to) {
        launch(sort_count, parts, 1, 0, memory.counts, keys, ids, memory.now, side, shift);
        launch(sort_places, digits / block_warps, 1, 0, memory.counts, memory.totals, static_cast<int>(parts));
        launch(sort_move, parts, 1, 0, memory.keys[to], memory.sorted_rows[to], memory.counts, memory.totals, keys, sorted, ids, memory.now,
               side, shift);
        keys = memory.keys[to], sorted = memory.sorted_rows[to];
    }
    float *const dtoken = weight_gradient(op.w), *const dposition = weight_gradient(op.b);
    const Real* const dy = gradient<Real>(op.y);
    const bool fours = n % 4 == 0;
    const int64_t across = parts_of(n, fours ? 4 * warp : warp), edges = parts_of(rows, edge_rows) * across;
    over_rows(fours ? embedding_backward<4, Real> : embedding_backward<1, Real>, edges, dtoken, memory.parts, dy, keys, sorted, memory.now,
              side, n);
    launch(fours ? embedding_edges<4> : embedding_edges<1>, blocks(edges, 1), 1, 0, dtoken, memory.parts, keys, memory.now, side, n);
    if (dposition)
        launch(fours ? position_backward<4, Real> : position_backward<1, Real>, plan.context * across, 1, 0, dposition, dy,
               memory.places[side], memory.now, n);
}
// Forward, and, where it learns, backward at once: chunk of rows after chunk, so that no more logits than these are ever there.
template <class Real>
void Gpu::head(const Op& op, bool learns) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), chunk = head_chunk(plan, rows);
    Real *const logits = static_cast<Real*>(memory.logits), *const dx = gradient<Real>(op.x);
    float *const dw = weight_gradient(op.w), *const db = weight_gradient(op.b);
    learns = learns && runs_backward(op);
    const int64_t stride = logits_stride(plan);
    const bool fast = on_tensor_cores(plan);
    for (int first = 0; first < rows; first += chunk) {
        const Extent here{lesser(chunk, rows - first), side, first};
        const int64_t from = static_cast<int64_t>(first) * op.in;
        Real* const x = values<Real>(op.x) + from;
        if (fast)
            multiply_fast<Real>(Matmul{logits,
                                       stride,
                                       nullptr,
                                       side_of(x, here, op.in),
                                       side_of_weight<Real>(op.w),
                                       op.in,
                                       op.in,
                                       true,
                                       true,
                                       false,
                                       here,
                                       {op.in, -1, 0},
                                       op.out,
                                       bias_of<Real>(op.b, false)});
        else if constexpr (sizeof(Real) == 4)
            multiply(
                Product<float, float, float>{logits, stride, weight(op.b), 0, x, weight(op.w), op.in, op.in, here, {op.in, -1, 0}, op.out},
                true, true);
        const size_t row_bytes = static_cast<size_t>(stride) * sizeof(Real);
        const bool is_long = op.out > long_row, keeps = is_long && learns && row_bytes <= static_cast<size_t>(shared_bytes - fixed_shared);
        launch_of(is_long ? long_row_threads : block_threads, is_long ? head_loss<Real, true> : head_loss<Real, false>,
                  is_long ? here.size : blocks(here.size, block_warps), 1, keeps ? row_bytes : 0, logits, stride, memory.losses,
                  memory.ranks, memory.targets, memory.row_weights, memory.loss_scale, here, memory.now, op.out, learns, keeps);
        if (!learns) continue;
        Real *const to = dx + from, *const start = op.adds_to_dx ? to : nullptr;
        if (fast)
            multiply_fast<Real>(Matmul{to,
                                       op.in,
                                       start ? side_of(start, here, op.in) : nullptr,
                                       side_of(logits, here, stride),
                                       side_of_weight<Real>(op.w),
                                       stride,
                                       op.in,
                                       true,
                                       false,
                                       false,
                                       here,
                                       {op.out, -1, 0},
                                       op.in});
        else if constexpr (sizeof(Real) == 4)
            multiply(
                Product<float, float, float>{to, op.in, start, op.in, logits, weight(op.w), stride, op.in, here, {op.out, -1, 0}, op.in},
                true, false);
        if (dw) weights_gradient<Real>(dw, logits, stride, x, op.in, op.out, op.in, here);
        if (db) sum_over_rows<Real>(db, nullptr, logits, stride, nullptr, nullptr, here, op.out);
    }
    if (!learns) return;
    const int parts = static_cast<int>(lesser<int64_t>(parts_of(rows, block_threads), square_blocks_there));
    launch(loss_parts, parts, 1, 0, memory.partial, memory.losses, memory.targets, memory.row_weights, memory.now);
    launch(add_losses_up, 1, 1, 0, memory.sums, memory.partial, parts, memory.now);
}
template <int T, class Real>
void Gpu::attention_of(Attend<Real> a, bool backward) {
    a.tiles = static_cast<int>(parts_of(plan.context, T));
    const int64_t of_queries = static_cast<int64_t>(plan.sequences) * a.heads * a.tiles,
                  of_keys = static_cast<int64_t>(plan.sequences) * a.kv_heads * a.tiles;
    if (!backward) return launch(attention_forward<T, Real>, of_queries, 1, attention_bytes<T>(a.dim, 4, 1), a, memory.now);
    launch(attention_backward_queries<T, Real>, of_queries, 1, attention_bytes<T>(a.dim, 5, 2), a, memory.now);
    launch(attention_backward_keys<T, Real>, of_keys, 1, attention_bytes<T>(a.dim, 6, 2), a, memory.now);
}
template <int C, class Real>
void Gpu::attention_on_tensor_cores(Attend<Real> a, bool backward, float* bias_gradient) {
    a.rows = tile_rows<C>(plan.context, shared_bytes), a.tiles = static_cast<int>(parts_of(plan.context, a.rows));
    const int64_t heads = static_cast<int64_t>(plan.sequences) * a.tiles * (backward ? a.kv_heads : a.heads);
    a.resident = processors * narrow_blocks<C>(backward);
    const int count = plan.sequences * a.tiles, n = 3 * a.heads * a.dim;
    if (bias_gradient) a.parts = room_for_parts(static_cast<int64_t>(count) * n);
    launch_of(strip_threads, backward ? attention_backward_narrow<C, Real> : attention_forward_narrow<C, Real>, heads, 1,
              narrow_bytes<C>(a.rows, backward), a, memory.now);
    if (bias_gradient) add_later(RowSum{bias_gradient, a.parts, n, count, n});
}
template <class Real>
void Gpu::attention(const Op& op, int number, bool backward) {
    Attend<Real> a{};
    const bool other = op.sight == Sight::source;
    const int64_t width = static_cast<int64_t>(op.heads) * op.dim(), kv_width = static_cast<int64_t>(op.kv_heads) * op.dim();
    a.heads = op.heads, a.kv_heads = op.kv_heads, a.dim = op.dim(), a.side = static_cast<int>(op.side), a.op = number;
    a.scale = 1 / sqrtf(static_cast<float>(a.dim));
    a.causal = op.sight == Sight::causal;
    a.q_stride = op.in, a.k_stride = other ? 2 * kv_width : op.in;
    a.q = values<Real>(op.x), a.k = other ? values<Real>(op.x2) : a.q + width, a.v = a.k + kv_width;
    a.y = values<Real>(op.y), a.softmax = statistics<Real>(op.aux);
    a.places = memory.places[a.side], a.seen = memory.places[other ? static_cast<int>(Side::source) : a.side];
    if (backward) {
        a.dy = gradient<Real>(op.y), a.dq = gradient<Real>(op.x);
        a.dk = other ? gradient<Real>(op.x2) : a.dq + width, a.dv = a.dk + kv_width;
        a.adds_q = op.adds_to_dx, a.adds_kv = other ? op.adds_to_dx2 : op.adds_to_dx;
    }
    // Of the product that made its x.
    float* const db = backward && op.bias_sum != nothing ? weight_gradient(plan.ops[static_cast<size_t>(op.bias_sum)].b) : nullptr;
    if constexpr (sizeof(Real) == 2)
        if (a.dim % 8 == 0 && a.dim <= 128 && tile_rows<128>(plan.context, shared_bytes) > 0)
            return a.dim <= 32   ? attention_on_tensor_cores<32>(a, backward, db)
                   : a.dim <= 64 ? attention_on_tensor_cores<64>(a, backward, db)
                                 : attention_on_tensor_cores<128>(a, backward, db);
    if (tile_of_attention == 32) attention_of<32>(a, backward);
    else if (tile_of_attention == 16) attention_of<16>(a, backward);
    else attention_of<8>(a, backward);
    if (db) sum_over_rows<Real>(db, nullptr, a.dq, op.in, nullptr, nullptr, {max_rows(op), a.side, 0}, op.in);
}
// The kernels may have all of the shared memory there is.
template <class Real>
Status Gpu::allow_shared() const {
    void (*const kernels[])(Attend<Real>, const Now*) = {
        attention_forward<32, Real>,          attention_forward<16, Real>,          attention_forward<8, Real>,
        attention_backward_queries<32, Real>, attention_backward_queries<16, Real>, attention_backward_queries<8, Real>,
        attention_backward_keys<32, Real>,    attention_backward_keys<16, Real>,    attention_backward_keys<8, Real>};
    for (const auto kernel : kernels) BABYGPT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    BABYGPT_CUDA(cudaFuncSetAttribute(head_loss<Real, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes - fixed_shared));
    if constexpr (sizeof(Real) == 2) return allow_shared_on_tensor_cores<Real>();
    else return Status();
}
template <class Real>
Status Gpu::allow_shared_on_tensor_cores() const {
    void (*const kernels[])(Attend<Real>, const Now*) = {attention_forward_narrow<32, Real>,  attention_forward_narrow<64, Real>,
                                                         attention_forward_narrow<128, Real>, attention_backward_narrow<32, Real>,
                                                         attention_backward_narrow<64, Real>, attention_backward_narrow<128, Real>};
    for (const auto kernel : kernels) {
        BABYGPT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        BABYGPT_CUDA(
            cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));  // %, so that blocks share a processor
    }
    return Status();
}

template <class Real>
void Gpu::op_forward(int number, bool learns) {
    const Op& op = plan.ops[static_cast<size_t>(number)];
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const int64_t size = static_cast<int64_t>(rows) * op.in;
    const Where* where = op.side == Side::whole ? nullptr : memory.where[side];
    const Real* const x = values<Real>(op.x);
    const float *const w = weight(op.w), *const b = weight(op.b);
    Real* const y = values<Real>(op.y);
    switch (op.kind) {
        case OpKind::embedding:
            return over_rows(embedding_forward<Real>, rows, y, w, b, memory.ids[side], where, memory.now, side, op.out);
        case OpKind::input:
            return over_elements(copy_rows<Real>, static_cast<int64_t>(rows) * op.out, y, memory.features, memory.now, side, op.out);
        case OpKind::waves:
            return over_rows(add_waves<Real>, rows, y, memory.waves, where, memory.now, side, op.in, false);
        case OpKind::norm:
            return norm_there<Real>(op);
        case OpKind::linear:
            return linear_forward<Real>(op);
        case OpKind::gate:
            return over_rows(gate_forward<Real>, rows, y, x, memory.now, side, op.out, op.activation);
        case OpKind::rope:
            return over_rows(rope<Real>, rows, y, memory.waves, where, memory.now, side, op.heads, op.kv_heads, op.dim(), 1.0f);
        case OpKind::attention:
            return attention<Real>(op, number, false);
        case OpKind::add:
            if (op.sum != nothing) return;  // the product has done it
            return over_elements(add_forward<Real>, size, y, x, values<Real>(op.x2), memory.now, side, op.in);
        case OpKind::dropout:
            return over_rows(dropout<Real>, rows, y, x, memory.now, side, number, op.in, false);
        case OpKind::pool:
            return over_rows(pool_forward<Real>, plan.sequences, y, x, memory.places[0], memory.now, op.in, op.first);
        case OpKind::head:
            return head<Real>(op, learns);
    }
}
template <class Real>
void Gpu::op_backward(int number) {
    const Op& op = plan.ops[static_cast<size_t>(number)];
    if (!runs_backward(op)) return;
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const int64_t size = static_cast<int64_t>(rows) * op.in;
    if (op.remakes != nothing) {  // what the planner did not keep
        const Op& maker = plan.ops[static_cast<size_t>(op.remakes)];
        if (maker.kind != OpKind::linear) op_forward<Real>(op.remakes, false);
        else
            over_elements(activate<Real>, static_cast<int64_t>(rows) * maker.out, values<Real>(maker.y), values<Real>(maker.aux),
                          memory.now, side, maker.out, maker.activation);
    }
    const Where* where = op.side == Side::whole ? nullptr : memory.where[side];
    const Real *const x = values<Real>(op.x), *const dy = gradient<Real>(op.y);
    Real* const dx = gradient<Real>(op.x);
    switch (op.kind) {
        case OpKind::embedding:
            return embed_backward<Real>(op);
        case OpKind::input:
        case OpKind::head:  // has been there
            return;
        case OpKind::waves:
            return over_rows(add_waves<Real>, rows, dx, memory.waves, where, memory.now, side, op.in, true);
        case OpKind::norm:
            return norm_back<Real>(op);
        case OpKind::linear:
            return linear_backward<Real>(op);
        case OpKind::gate:
            return over_rows(gate_backward<Real>, rows, dx, dy, x, memory.now, side, op.out, op.activation, op.adds_to_dx);
        case OpKind::rope:
            return over_rows(rope<Real>, rows, dx, memory.waves, where, memory.now, side, op.heads, op.kv_heads, op.dim(), -1.0f);
        case OpKind::attention:
            return attention<Real>(op, number, true);
        case OpKind::add:  // a summand's gradient may lie where the sum's does
            if (dx && dx != dy) over_elements(add_backward<Real>, size, dx, dy, memory.now, side, op.in, op.adds_to_dx);
            if (Real* const other = gradient<Real>(op.x2); other && other != dy)
                over_elements(add_backward<Real>, size, other, dy, memory.now, side, op.in, op.adds_to_dx2);
            return;
        case OpKind::dropout:
            return over_rows(dropout<Real>, rows, dx, dy, memory.now, side, number, op.in, op.adds_to_dx);
        case OpKind::pool:
            return over_rows(pool_backward<Real>, plan.max_rows[0], dx, dy, memory.places[0], memory.where[0], memory.now, op.in, op.first,
                             op.adds_to_dx);
    }
}
template <class Real>
void Gpu::walk_tape(bool learns, bool marked) {
    const int ops = static_cast<int>(plan.ops.size);
    sums_waiting = 0, row_parts_used = 0;
    launch(lay_rows, blocks(plan.sequences, 1), 1, 0, memory);
    mark(0, marked);
    for (int i = 0; i < ops; ++i) op_forward<Real>(i, learns), mark(i + 1, marked);
    for (int i = ops; i-- > 0 && learns;) op_backward<Real>(i), mark(2 * ops - i, marked);
    add_sums();
}
// f(matrix, does it begin a group): so many as have room in the activations' memory, which nobody needs any more, go through launches together.
template <class F>
void Gpu::over_matrices(const F& f) const {
    const int64_t room = plan.activation_block * real_bytes(plan) / static_cast<int64_t>(sizeof(float));
    int64_t used = 0;
    for (const WeightPlan& w : plan.weights) {
        int64_t at = w.weight.offset;
        for (int i = 0; i < w.matrices; ++i) {
            MuonMatrix m{at, w.weight.cols, 0, static_cast<int>(w.weight.rows), w.outputs[i], 0, 1};
            if (plan.output_rows) m.rows = w.outputs[i], m.cols = static_cast<int>(w.weight.cols);
            m.n = lesser(m.rows, m.cols);
            const float outputs = static_cast<float>(plan.output_rows ? m.rows : m.cols),
                        inputs = static_cast<float>(plan.output_rows ? m.cols : m.rows);
            if (outputs > inputs) m.longer = sqrtf(outputs / inputs);
            const bool begins = used == 0 || used + 5 * m.square() > room;
            m.space = begins ? 0 : used;
            used = m.space + 5 * m.square();
            f(m, begins);
            at += plan.output_rows ? w.outputs[i] * w.weight.cols : w.outputs[i];
        }
    }
}
void Gpu::orthogonalise() {
    constexpr int rounds = 5;
    constexpr float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const MuonMatrix* group = memory.matrices;
    float* const space = static_cast<float*>(memory.activations);
    int count = 0;
    int64_t tiles = 0, square_tiles = 0;  // of the largest
    const auto turn = [&] {
        if (count == 0) return;
        const float* const turned = memory.turned + (group - memory.matrices);
        launch(muon_gram, square_tiles, count, 0, group, memory.gradients, space);
        launch(muon_normalise, count, 1, 0, group, space, memory.turned + (group - memory.matrices), memory.now);
        int p = 1, q = 2, spare = 3;
        for (int round = 0; round < rounds; ++round) {
            const bool last = round == rounds - 1;
            launch(muon_square, square_tiles, count, 0, group, space, SquareProduct{p, 0, 0, c, b, a}, nullptr);
            if (round > 0)
                launch(muon_square, square_tiles, count, 0, group, space, SquareProduct{spare, p, q, 1, 0, 0}, last ? turned : nullptr);
            if (!last) {
                launch(muon_square, square_tiles, count, 0, group, space, SquareProduct{4, p, 0, 1, 0, 0}, nullptr);
                launch(muon_square, square_tiles, count, 0, group, space, SquareProduct{0, 4, p, 1, 0, 0}, nullptr);
            }
            const int made = round == 0 ? p : spare;  // the next Q; its old place, or P's next, is free
            (round == 0 ? p : spare) = q;
            q = made;
        }
        launch(muon_turn, tiles, count, 0, group, memory.weights, memory.gradients, space, q);
        group += count, count = 0, tiles = square_tiles = 0;
    };
    over_matrices([&](const MuonMatrix& m, bool begins) {
        if (begins) turn();
        ++count;
        tiles = greater(tiles, parts_of(m.rows, tile) * parts_of(m.cols, tile));
        square_tiles = greater(square_tiles, parts_of(m.n, tile) * parts_of(m.n, tile));
    });
    turn();
}
void Gpu::walk(int which, bool marked) {
    begin_launches();
    with_real([&](auto real) { walk_tape<decltype(real)>(which > 0, marked); });
    if (which < 2) return;
    const int64_t n = learnt_block(plan);
    const int parts = static_cast<int>(lesser<int64_t>(parts_of(n, block_threads), square_blocks_there));
    launch(square_parts, parts, 1, 0, memory.partial, memory.gradients, n);
    launch(judge, 1, 1, 0, memory.sums, results, memory.loss_scale, memory.partial, parts, memory.now);
    with_real([&](auto real) {
        using Real = decltype(real);
        Real* const narrow = plan.frozen || !is_narrow(plan) ? nullptr : static_cast<Real*>(memory.narrow_weights);
        over_elements(adamw<Real>, n / 4, plan.frozen ? memory.adapter : memory.weights, narrow, memory.moment1, memory.moment2,
                      memory.gradients, memory.ways, n, memory.sums, memory.now);
        if (!plan.muon) return;
        orthogonalise();
        over_elements(muon_finish<Real>, n / 4, memory.weights, narrow, memory.gradients, memory.ways, n);
    });
}

// =====================================================================================================================
// [CHAPTER 8] Running a model
// =====================================================================================================================
// A session's run is one launch of one kernel, which walks through a list of steps: a token has no more than five a layer, since what stands before
// and after a product is part of its step: norm or gate where a block brings rows of x to shared memory, bias, activation and addition where it
// writes y. Rows are divided into tiles of at most 40, and each tile has a group of blocks, which meet at a barrier between two steps.
//
// Sessions that each read one token have nothing to do with each other. So a group is a thread-block cluster (sm_90 and later): up to 16 blocks with a
// barrier of the hardware's, beside seven others that it never waits for, and each with so many of the sessions. Where rows see each other's keys,
// in a prompt, and on other devices, the groups are parts of a cooperative grid, with one barrier for all. How a sum is divided depends on neither,
// so that a session's bits are the same alone, beside others, and on either kind of device.
//
// What does not depend on activations is not waited for: once a block has multiplied, the weights of its next product go to shared memory, by one bulk
// copy where all fit (72 KiB, what a block needs of baby's in bf16), and the norm's and the bias. What then follows the barrier is one trip to the cache
// for rows of x, the norm, the multiplications, and the sum over warps. In so short a step it is instructions that cost, those of each warp before it
// gets to work, and whatever waits in line: a register that is spilled comes back from the cache, behind all else; of loads with a branch between, each
// waits for the one before. So there are few warps, with many registers, what they need to know is shifted and masked rather than divided, loads come
// first and together, and what is no product is a function apart, so that it does not take registers from those.
//
// Activations are floats, or, between two products that nothing stands between, what is multiplied. Matrices are packed as warps read them, whole or in
// bf16 as the runtime says, and so are keys and values; sums are floats.
//
// Baby in bf16 (6 layers, 6 heads, width 384) on an H200, a token of each session in microseconds: 1 session 126, 8 138, 64 209, 256 500. What its
// bytes alone would take: of one session 12 (21 MB of weights by 16 multiprocessors, 64 bytes a clock each); of 256 as 7 clusters of 37 rows 30 for
// the weights (7 times 21 MB from the cache at 5.5 TB/s), 30 for x, and 53 for keys and values (96 positions seen, 226 MB from memory). Of one session's
// 250 thousand cycles barriers and their fences take 40, what stands between a barrier and x 50, multiplying 40, attention 35, what is left 85.

enum class StepKind : int { embed, norm, product, attend };
enum class Before : int { nothing, norm, gate };  // a product multiplies

struct alignas(16) Step {
    StepKind kind;
    Before before;
    Activation activation;  // of a product's sums, or of the gate
    const float *norm_w, *norm_b;
    const float *table, *positions;  // embed: of tokens, of positions
    const void* w;                   // product: as pack_matrix leaves it, `apart` columns
    const float* bias;
    float *x, *y;
    const float* addend;  // y = addend + what is computed
    int64_t apart;
    int in, out;
    int log_parts;                    // product: 2^log_parts warps share a sum; it follows from the depth alone
    int first, end;                   // this block's tiles, as it finds out itself
    int layer, heads, kv_heads, dim;  // attend
    bool centred, turns, waves, is_head;
    bool narrow_x, narrow_y;  // bf16, which is what is multiplied
};
// A matrix, and where it is packed to.
struct Copied {
    int64_t from;
    int rows, columns;
    int64_t apart;
    void* to;
    bool across;  // it came as [columns][rows]
};
// What the host says of a tile: this, its rows, and the lists of pages of their sequences.
struct TileHere {
    int first, rows;    // of all
    int heads, logits;  // so many of its rows want logits; theirs are those from number `logits` on
};
struct RowHere {
    int id, position, pages;  // pages: where the list of its sequence's begins
    int wanted;               // in the i-th row: which is the i-th that wants logits
};
// A run, as the kernel gets it.
template <class T>
struct alignas(16) Reading {
    const Step* steps;
    const unsigned char* sent;  // of each tile `room` bytes, the first `used` of which are to be read
    int room, used;
    int count, rows, tiles, groups, blocks;  // blocks: of a group
    bool cluster;                            // a group is one
    bool alone;                              // each row is a sequence's only one
    bool scores;                             // the head says all rows' losses
    int wanted;                              // scores: rows that want logits besides: the host's `wanted_rows`
    const int *wanted_rows, *targets;
    const float* waves;
    float* logits;             // the host's, [wanted][vocab]
    float* all_logits;         // scores: [rows][vocab]
    double* losses;            // the host's
    const Draw* draws;         // the host's, of each wanted row; null: nobody wants a token
    int32_t* drawn;            // the host's
    int64_t stride;            // of floats, between two rows of activations
    int depth, normed, vocab;  // of the deepest product, and of the deepest that a norm is before
    float epsilon;
};

#ifdef BABYGPT_CUDA_EMULATOR
constexpr int talk_threads = 128, cluster_sizes[] = {4, 2};
#else
constexpr int talk_threads = 256, cluster_sizes[] = {16, 8};  // more than 8: where a device allows it
#endif
static_assert(talk_threads <= 256, "a row's outputs of a round are at most so many");
constexpr int talk_warps = talk_threads / warp, talk_rows = 40, talk_outputs = 8, talk_depth = 32;
constexpr int rows_at_once = device_rows;
constexpr int part_steps = 6;  // of 32 of the depth: a warp's part of a tile, where all warps can share it
constexpr int log_head_parts = 3, head_parts = 1 << log_head_parts;  // of what a head of a row sees: each has every 8th page
// Devices of sm_90 to sm_110 have 227 KB of shared memory for a block; others 99 or less (but sm_80, whose code they run).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool much_shared = false;
#else
constexpr bool much_shared = true;
#endif
#ifdef BABYGPT_CUDA_EMULATOR
inline bool has_much_shared(int) { return much_shared; }
#else
inline bool has_much_shared(int compiled_for) { return compiled_for >= 90 && compiled_for < 120; }
#endif
template <class T>
constexpr int rounds_of(bool much) {
    return much ? (sizeof(T) == 2 ? 3 : 2) : 1;
}
template <class T>
constexpr int talk_rounds = rounds_of<T>(much_shared);  // tiles of a warp whose weights are under way at once

// Elements between two rows of x in shared memory: eight lanes that read 16 bytes each, of two rows of bf16, meet all banks once.
template <class T>
__host__ __device__ constexpr int talk_apart(int depth) {
    return sizeof(T) == 2 && depth % 64 == 0 ? depth + 32 : depth;
}
inline int talk_pages(int context) { return (context + kv_page - 1) / kv_page; }
// Where warps keep what they work on, of a head: its query, and the probabilities of a page; and of each part the sum. A warp has all parts of a
// head, or 2^log_warps warps share them: no fewer than the sums have room for.
struct HeadSpace {
    float *p, *q, *outs, *totals;
    int* mosts;
    __device__ HeadSpace(unsigned char* shared, int dim)
        : p(reinterpret_cast<float*>(shared)),
          q(p + talk_warps * kv_page),
          outs(q + talk_warps * dim),
          totals(outs + sums(dim) * dim),
          mosts(reinterpret_cast<int*>(totals + sums(dim))) {}
    __host__ __device__ static constexpr int least_log_warps(int dim) {
        constexpr int room = (32 << 10) / static_cast<int>(sizeof(float));
        int log_warps = 0;
        while (log_warps < log_head_parts && (1 << log_warps) < talk_warps && ((talk_warps * head_parts) >> log_warps) * dim > room)
            ++log_warps;
        return log_warps;
    }
    __host__ __device__ static constexpr int sums(int dim) { return (talk_warps * head_parts) >> least_log_warps(dim); }
    static constexpr size_t bytes(int dim) {
        return sizeof(float) * static_cast<size_t>(talk_warps * (dim + kv_page) + sums(dim) * (dim + 2));
    }
};
// Of a warp that draws a token: the weights, and the ids by weight.
constexpr size_t draw_bytes(int vocab) {
    return vocab <= drawn_vocab ? (sizeof(float) + sizeof(int)) * static_cast<size_t>(talk_warps * vocab) : 0;
}
// What a block has in shared memory, after the run itself, and which it is of its group.
template <class T>
struct Space {
    static constexpr int most_outputs = talk_rounds<T> * talk_warps * talk_outputs, barriers = talk_warps + 2,
                         weights_ahead = talk_warps * talk_rounds<T> * part_steps * warp * 8;
    int thread, lane, block, blocks;
    uint64_t* arrivals;  // of each warp's weights, and of all; one more, so that what follows lies at a multiple of 16 bytes
    float* bias;         // of the outputs in work, and of the next
    T* weights;          // under way or in work: [step][piece][lane] of 16 bytes
    Step* steps;
    float *norm_w, *norm_b;  // of the next product
    TileHere* tile;
    RowHere* row;
    unsigned char* rest;  // attention's, or
    T* x;                 // [rows][talk_apart], and sums [tile][part][rows][8]
    // rounds: the host's are those of the device that it plans for.
    __host__ __device__ static constexpr size_t fixed(int rounds, int steps, int of_tile, int normed) {
        return (sizeof(Reading<T>) + sizeof(uint64_t) * barriers +
                static_cast<size_t>(rounds * talk_warps) * (sizeof(float) * 2 * talk_outputs + sizeof(T) * part_steps * warp * 8) +
                sizeof(Step) * static_cast<size_t>(steps) + sizeof(float) * static_cast<size_t>(2 * normed) + static_cast<size_t>(of_tile) +
                127) /
               128 * 128;
    }
    static int tile_bytes(int rows, int context) {
        return static_cast<int>(parts_of(
                   static_cast<int64_t>(sizeof(TileHere) + static_cast<size_t>(rows) *
                                                               (sizeof(RowHere) + sizeof(T*) * static_cast<size_t>(talk_pages(context)))),
                   16)) *
               16;
    }
    static size_t bytes(int rounds, int steps, int context, int depth, int normed, int dim, int vocab, int rows) {
        const size_t product = sizeof(T) * static_cast<size_t>(rows * talk_apart<T>(depth)) +
                               sizeof(float) * static_cast<size_t>(rounds * talk_warps * talk_outputs * rows);
        return fixed(rounds, steps, tile_bytes(rows, context), normed) +
               greater(product, greater(HeadSpace::bytes(dim), draw_bytes(vocab)));
    }
    __device__ Space(unsigned char* memory, const Reading<T>& r)
        : thread(static_cast<int>(threadIdx.x)),
          lane(thread % warp),
          block(static_cast<int>(blockIdx.x) % r.blocks),
          blocks(r.blocks),
          arrivals(reinterpret_cast<uint64_t*>(memory + sizeof(Reading<T>))),
          bias(reinterpret_cast<float*>(arrivals + barriers)),
          weights(reinterpret_cast<T*>(bias + 2 * most_outputs)),
          steps(reinterpret_cast<Step*>(weights + weights_ahead)),
          norm_w(reinterpret_cast<float*>(steps + r.count)),
          norm_b(norm_w + r.normed),
          tile(reinterpret_cast<TileHere*>(norm_b + r.normed)),
          row(reinterpret_cast<RowHere*>(tile + 1)),
          rest(memory + fixed(talk_rounds<T>, r.count, r.used, r.normed)),
          x(reinterpret_cast<T*>(rest)) {}
    __device__ T* const* pages(int i) const { return reinterpret_cast<T* const*>(row + tile->rows) + row[i].pages; }
    __device__ int first_warp() const { return block * talk_warps + thread / warp; }
    __device__ int number() const { return thread / warp; }
    // Piece `which` of this lane's, of a step.
    __device__ __forceinline__ T* piece(int step, int which) const {
        return weights + ((step * static_cast<int>(sizeof(T) / 2) + which) * warp + lane) * (16 / static_cast<int>(sizeof(T)));
    }
    // Asked anew, so that nothing that follows from it is kept for the next step, where registers are needed for other things.
    __device__ void ask_thread() {
#ifdef __CUDACC__
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        lane = thread % warp;
#endif
    }
};

__device__ __forceinline__ void grid_barrier() {
#ifdef __CUDACC__
    cooperative_groups::this_grid().sync();
#else
    emulator::grid_sync();
#endif
}
// A barrier of a group's blocks, in two halves: who has waited sees what all have written before they arrived, but not what they write between.
// One thread's fence is for its block: if all had one, each would wait for the others'.
__device__ __forceinline__ void arrive(bool cluster) {
    __syncthreads();
#if defined(BABYGPT_CUDA_EMULATOR)
    if (cluster) emulator::cluster_arrive();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (cluster) {
        if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    }
#endif
    (void)cluster;
}
__device__ __forceinline__ void wait(bool cluster) {
#if defined(BABYGPT_CUDA_EMULATOR)
    if (cluster) return emulator::cluster_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (cluster) {
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    (void)cluster;
    grid_barrier();
}

// The matrix as warps read it, with zeros behind: [tile of 8 rows][32 of the depth][piece of 16 bytes][lane]. Lane 4 g + t has, of row g, the 8 from 8 t
// on. Over elements. 4 and 2 or 4 bytes.
template <class T>
__global__ void pack_matrix(T* to, const float* from, int rows, int columns, int64_t apart, bool across) {
    constexpr int size = 16 / static_cast<int>(sizeof(T)), of_step = 8 / size;
    const int64_t all = parts_of(rows, talk_outputs) * talk_outputs * apart, steps = apart / talk_depth;
    for (int64_t i = first_element(); i < all; i += all_threads()) {
        const int64_t lane = i / size % warp, piece = i / (size * warp) % of_step, step = i / (talk_outputs * talk_depth);
        const int64_t row = step / steps * talk_outputs + lane / 4,
                      column = step % steps * talk_depth + lane % 4 * 8 + piece * size + i % size;
        put(to + i, column >= columns || row >= rows ? 0.0f : from[across ? column * rows + row : row * columns + column]);
    }
}

// The compiler cannot see that a pointer that was read from shared memory is not to shared memory.
template <class T>
__device__ __forceinline__ T* global(T* p) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}
// x = token[id] + position[p]. A thread has an element.
template <class T>
__device__ void embed_rows(const Step& s, const Reading<T>& r, const Space<T>& space) {
    const float factor = sqrtf(static_cast<float>(s.out));
    const int first = space.tile->first;
    for (int i = space.block * talk_threads + static_cast<int>(threadIdx.x); i < space.tile->rows * s.out;
         i += space.blocks * talk_threads) {
        const RowHere row = space.row[i / s.out];
        const int64_t c = i % s.out, p = static_cast<int64_t>(row.position) * s.out + c;
        const float x = global(s.table)[static_cast<int64_t>(row.id) * s.out + c] + (s.positions ? global(s.positions)[p] : 0.0f);
        s.y[(first + i / s.out) * r.stride + c] = s.waves ? fmaf(x, factor, r.waves[p]) : x;
    }
}
// Four neighbours of a row, of which `left` are there; `whole`: rows are fours, 16 bytes apart.
struct Four {
    float of[4];
};
__device__ __forceinline__ Four four(const float* x, int left, bool whole) {
    Four four = {};
    if (whole && left > 0) {
        const float4 all = *reinterpret_cast<const float4*>(x);
        four.of[0] = all.x, four.of[1] = all.y, four.of[2] = all.z, four.of[3] = all.w;
    } else {
        for (int i = 0; i < 4; ++i)
            if (i < left) four.of[i] = x[i];
    }
    return four;
}
__device__ __forceinline__ void put_four(float* to, const Four& x) {
    *reinterpret_cast<float4*>(to) = make_float4(x.of[0], x.of[1], x.of[2], x.of[3]);
}
__device__ __forceinline__ void put_four(__nv_bfloat16* to, const Four& x) {
    *reinterpret_cast<uint2*>(to) = make_uint2(two(x.of[0], x.of[1]), two(x.of[2], x.of[3]));
}
// The first 512 columns of a row, of which a lane has every 32nd four: all of them under way at once.
constexpr int fours_held = 4;
__device__ __forceinline__ void bring_row(Four (&held)[fours_held], const Step& s, int lane, const float* x, int from = 0) {
    if (s.in % 4 == 0) {  // nothing but loads, so that none waits for another
        BABYGPT_TIMES (i, fours_held) {
            const int c = from + (i * warp + lane) * 4;
            float4 all = make_float4(0, 0, 0, 0);
            if (c < s.in) all = *reinterpret_cast<const float4*>(x + c);
            held[i].of[0] = all.x, held[i].of[1] = all.y, held[i].of[2] = all.z, held[i].of[3] = all.w;
        }
        return;
    }
    BABYGPT_TIMES (i, fours_held) {
        const int c = from + (i * warp + lane) * 4;
        held[i] = four(x + c, s.in - c, false);
    }
}
// f(four, from which column) of what the norm makes of a row, whose first columns are `held`. A warp does it. w, b: the norm's, the latter perhaps null.
// `fits`: all of it is held, and its columns are fours.
template <bool fits, class F>
__device__ __forceinline__ void over_normed(const Step& s, int lane, const Four (&held)[fours_held], const float* x, const float* w,
                                            const float* b, float epsilon, const F& f) {
    constexpr int apart = 4 * warp;
    const int n = s.in, first = lane * 4;
    const auto over = [&](const auto& g) {
        BABYGPT_TIMES (i, fours_held)
            if (first + i * apart < n) g(held[i], first + i * apart);
        for (int from = fours_held * apart; from < n && !fits; from += fours_held * apart) {
            Four some[fours_held];
            bring_row(some, s, lane, x, from);
            BABYGPT_TIMES (i, fours_held)
                if (from + first + i * apart < n) g(some[i], from + first + i * apart);
        }
    };
    float mean = 0, square = 0;
    if (s.centred) over([&](const Four& some, int) { mean += some.of[0] + some.of[1] + (some.of[2] + some.of[3]); });
    const float by_n = 1 / static_cast<float>(n);
    if (s.centred) mean = warp_sum(mean) * by_n;
    over([&](const Four& some, int c) {
        BABYGPT_TIMES (e, 4)
            if (fits || c + e < n) square = fmaf(some.of[e] - mean, some.of[e] - mean, square);
    });
    const float scale = rsqrtf(fmaf(warp_sum(square), by_n, epsilon));
    over([&](const Four& some, int c) {
        const Four by = four(w + c, n - c, fits || n % 4 == 0), plus = b ? four(b + c, n - c, fits || n % 4 == 0) : Four();
        Four y;
        BABYGPT_TIMES (e, 4) y.of[e] = fmaf((some.of[e] - mean) * scale, by.of[e], plus.of[e]);
        f(y, c);
    });
}
template <class T>
__device__ void norm_rows(const Step& s, const Reading<T>& r, const Space<T>& space) {
    for (int i = space.first_warp(); i < space.tile->rows; i += space.blocks * talk_warps) {
        const int64_t place = (space.tile->first + i) * r.stride;
        Four held[fours_held];
        bring_row(held, s, space.lane, s.x + place);
        over_normed<false>(s, space.lane, held, s.x + place, s.norm_w, s.norm_b, r.epsilon, [&](const Four& y, int c) {
            for (int e = 0; e < 4; ++e)
                if (c + e < s.in) s.y[place + c + e] = y.of[e];
        });
    }
}

// ---- a product: y = f(x) W^T ----

// A block has neighbouring tiles of 8 outputs, goes through `each` of them in a round, and divides a tile's depth into 2^log_parts parts, each a warp's.
// What is ahead in shared memory are whole tiles, or, of those too deep for it, each warp's.
struct Share {
    int log_parts, each, first, end, steps;
    int tile, part, begin, stop;  // this warp's: which tile of a round, and its steps of the depth
    bool whole;
    int base, stride;  // where its first step is, and how much further that of the next round
    __device__ __forceinline__ Share(const Step& s, int number, int rounds) {
        steps = static_cast<int>(s.apart) / talk_depth;
        log_parts = s.log_parts, each = talk_warps >> log_parts, first = s.first, end = s.end;
        tile = number >> log_parts, part = number & ((1 << log_parts) - 1);
        begin = part * steps >> log_parts, stop = (part + 1) * steps >> log_parts;
        whole = steps <= part_steps << log_parts;
        base = whole ? tile * steps + begin : number * rounds * part_steps, stride = whole ? each * steps : part_steps;
    }
    // A block's tiles, before anything is asked of them.
    __device__ static void divide(Step& s, int block, int blocks) {
        const uint32_t tiles = static_cast<uint32_t>(s.out + talk_outputs - 1) / talk_outputs;
        s.first = static_cast<int>(tiles * static_cast<uint32_t>(block) / static_cast<uint32_t>(blocks));
        s.end = static_cast<int>(tiles * static_cast<uint32_t>(block + 1) / static_cast<uint32_t>(blocks));
    }
    // How many tiles the rounds have that begin at `from`, and how many of these rounds have one for this warp.
    __device__ int tiles_of(int from, int rounds) const { return lesser(rounds * each, end - from); }
    __device__ int rounds_of(int from, int most) const {
        int rounds = 0;
        for (int round = 0; round < most; ++round) rounds += tile_of(from, round) >= 0;
        return rounds;
    }
    // That of this warp in a round of those that begin at `from`, or -1.
    __device__ int tile_of(int from, int round) const {
        const int mine = from + round * each + tile;
        return mine < end ? mine : -1;
    }
};
// Eight neighbours of a row of a matrix.
template <class T>
struct Eight {
    uint4 of[sizeof(T) / 2];
    __device__ __forceinline__ void bring(const T* from) {
        for (size_t i = 0; i < sizeof(T) / 2; ++i) of[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    __device__ __forceinline__ void widen(float (&to)[8]) const {
        const uint32_t words[] = {of[0].x,
                                  of[0].y,
                                  of[0].z,
                                  of[0].w,
                                  of[sizeof(T) / 2 - 1].x,
                                  of[sizeof(T) / 2 - 1].y,
                                  of[sizeof(T) / 2 - 1].z,
                                  of[sizeof(T) / 2 - 1].w};
        BABYGPT_TIMES (i, 8) to[i] = sizeof(T) == 4 ? __uint_as_float(words[i]) : i % 2 == 0 ? low_of(words[i / 2]) : high_of(words[i / 2]);
    }
};
// Weights under way to shared memory, of as many rounds and steps as fit. From sm_90 on these are bulk copies, whose bytes a barrier counts: one for
// all of a block's tiles, or of what is not whole one a warp and round. With older devices each lane brings its own.
template <class T>
struct Weights {
    static constexpr int of_step = warp * 8;  // a tile's, of 32 of the depth
    uint32_t turn = 0, turn_of_all = 0;       // of the barriers
    __device__ __forceinline__ static uint32_t place(const void* at) {
#if defined(__CUDA_ARCH__)
        return static_cast<uint32_t>(__cvta_generic_to_shared(at));
#else
        return at != nullptr;
#endif
    }
    __device__ __forceinline__ static const T* source(const Step& s, const Share& share, int which, int begin) {
        return static_cast<const T*>(s.w) + (static_cast<int64_t>(which) * share.steps + begin) * of_step;
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __device__ __forceinline__ static void begin(const Space<T>& space) {
        if (space.thread <= talk_warps)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(place(space.arrivals + space.thread)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __device__ __forceinline__ static void expect(uint64_t* barrier, int count) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(place(barrier)), "r"(count * static_cast<int>(sizeof(T)))
                     : "memory");
    }
    __device__ __forceinline__ static void copy(T* to, const T* from, int count, uint64_t* barrier) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(place(to)),
                     "l"(__cvta_generic_to_global(from)), "r"(count * static_cast<int>(sizeof(T))), "r"(place(barrier))
                     : "memory");
    }
    __device__ __forceinline__ static void wait(const uint64_t* barrier, uint32_t& turn) {
        asm volatile("{\n.reg .pred done;\nagain_%=:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again_%=;\n}\n" ::"r"(
                         place(barrier)),
                     "r"(turn)
                     : "memory");
        turn ^= 1;
    }
    // Those of the tiles from `from` on, whose rounds begin there, and of a warp's steps from `begin` on.
    __device__ __forceinline__ static void bring(const Step& s, const Space<T>& space, const Share& share, int from, int begin) {
        if (share.whole && space.thread == talk_threads - 1) {
            const int count = share.tiles_of(from, talk_rounds<T>) * share.steps * of_step;
            uint64_t* const barrier = space.arrivals + talk_warps;
            expect(barrier, count), copy(space.weights, source(s, share, from, 0), count, barrier);
        }
        if (share.whole || space.lane != 0) return;
        const int rounds = share.rounds_of(from, talk_rounds<T>), count = lesser(share.stop - begin, part_steps) * of_step;
        uint64_t* const barrier = space.arrivals + space.number();
        if (rounds > 0) expect(barrier, rounds * count);
        for (int round = 0; round < rounds; ++round)
            copy(space.piece(share.base + round * share.stride, 0), source(s, share, share.tile_of(from, round), begin), count, barrier);
    }
    __device__ __forceinline__ void arrive(const Space<T>& space, const Share& share, int from) {
        if (share.whole) wait(space.arrivals + talk_warps, turn_of_all);
        else if (share.tile_of(from, 0) >= 0) wait(space.arrivals + space.number(), turn);
    }
#else
    __device__ __forceinline__ static void begin(const Space<T>&) {}
    __device__ __forceinline__ static void bring(const Step& s, const Space<T>& space, const Share& share, int from, int begin) {
        constexpr int pieces = static_cast<int>(sizeof(T)) / 2, size = 16 / static_cast<int>(sizeof(T));
        const int rounds = share.rounds_of(from, talk_rounds<T>), there = lesser(share.stop - begin, part_steps);
        for (int round = 0; round < rounds; ++round)
            for (int i = 0; i < there * pieces; ++i)
                copy_piece(space.piece(share.base + round * share.stride, i),
                           source(s, share, share.tile_of(from, round), begin) + (i * warp + space.lane) * size, true);
    }
    __device__ __forceinline__ void arrive(const Space<T>&, const Share&, int) { copies_arrive(); }
#endif
};
// A tile's sums, or a part's, of so many rows, and what a lane has of x, 32 of the depth of them. On tensor cores lane 4 g + t has rows g and g + 8 of
// x: they do not mind in which order a sum's parts come, so that all is read 16 bytes at a time. In floats a lane has sums of all rows.
template <class T>
struct TileSums;
template <>
struct TileSums<__nv_bfloat16> {
    static constexpr int rows = 16;
    struct Side {
        uint4 upper = {}, lower = {};
        __device__ __forceinline__ void bring(const __nv_bfloat16* x, int lane, int apart, int there) {
            const __nv_bfloat16* const from = x + lane / 4 * apart + lane % 4 * 8;
            if (lane / 4 < there) upper = *reinterpret_cast<const uint4*>(from);
            if (lane / 4 + 8 < there) lower = *reinterpret_cast<const uint4*>(from + 8 * apart);
        }
    };
    float even[4] = {}, odd[4] = {};  // two chains of products, so that one does not wait for the other
    __device__ __forceinline__ void add(const Eight<__nv_bfloat16>& w, const Side& x) {
        const uint4 b = w.of[0];
        const uint32_t a[4] = {x.upper.x, x.lower.x, x.upper.y, x.lower.y}, c[4] = {x.upper.z, x.lower.z, x.upper.w, x.lower.w};
        multiply_tiles(even, a, b.x, b.y);
        multiply_tiles(odd, c, b.z, b.w);
    }
    __device__ __forceinline__ void leave(float* to, int lane, int there) const {
        for (int half = 0; half < 2; ++half)
            if (lane / 4 + 8 * half < there)
                *reinterpret_cast<float2*>(to + (lane / 4 + 8 * half) * talk_outputs + lane % 4 * 2) =
                    make_float2(even[2 * half] + odd[2 * half], even[2 * half + 1] + odd[2 * half + 1]);
    }
};
template <>
struct TileSums<float> {
    static constexpr int rows = 8;
    struct Side {
        const float* from = nullptr;
        int apart = 0, there = 0;
        __device__ __forceinline__ void bring(const float* x, int lane, int apart_, int there_) {
            from = x + lane % 4 * 8, apart = apart_, there = there_;
        }
    };
    float sum[rows] = {};
    __device__ __forceinline__ void add(const Eight<float>& w, const Side& x) {
        float4 a, b;
        a = make_float4(__uint_as_float(w.of[0].x), __uint_as_float(w.of[0].y), __uint_as_float(w.of[0].z), __uint_as_float(w.of[0].w));
        b = make_float4(__uint_as_float(w.of[1].x), __uint_as_float(w.of[1].y), __uint_as_float(w.of[1].z), __uint_as_float(w.of[1].w));
        BABYGPT_TIMES (row, rows) {
            if (row >= x.there) continue;
            const float4 *const from = reinterpret_cast<const float4*>(x.from + row * x.apart), c = from[0], d = from[1];
            const float upper = fmaf(a.w, c.w, fmaf(a.z, c.z, fmaf(a.y, c.y, a.x * c.x)));
            sum[row] += fmaf(b.w, d.w, fmaf(b.z, d.z, fmaf(b.y, d.y, fmaf(b.x, d.x, upper))));
        }
    }
    __device__ __forceinline__ void leave(float* to, int lane, int there) const {
        BABYGPT_TIMES (row, rows) {
            if (row >= there) continue;
            float all = sum[row];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            if (lane % 4 == 0) to[row * talk_outputs + lane / 4] = all;
        }
    }
};
// All that a product's rounds from tile `from` on need and no activation decides. The last warp brings what is no weight, under way until its
// copies_arrive. bias: where to.
template <class T>
__device__ __forceinline__ void bring_ahead(const Step& s, const Space<T>& space, int from, float* bias) {
    const Share share(s, space.number(), talk_rounds<T>);
    if (share.first == share.end) return;
    Weights<T>::bring(s, space, share, from, share.begin);
    if (space.number() != talk_warps - 1) return;
    for (int c = 4 * space.lane; from == s.first && s.before == Before::norm && c < s.in; c += 4 * warp) {
        copy_piece(space.norm_w + c, s.norm_w + c, true);
        if (s.norm_b) copy_piece(space.norm_b + c, s.norm_b + c, true);
    }
    const int outputs = share.tiles_of(from, talk_rounds<T>) * talk_outputs;
    for (int i = 4 * space.lane; s.bias && i < outputs; i += 4 * warp)
        copy_piece(bias + i, s.bias + from * talk_outputs + i, from * talk_outputs + i < s.out);
}
// The tile's rows of x to shared memory, as they are multiplied. A row is a warp's where a norm wants its sum, and the next one on its way meanwhile;
// else several warps'.
template <class T>
__device__ __forceinline__ void load_side(const Step& s, const Reading<T>& r, const Space<T>& space, int rows) {
    const int number = space.thread / warp, apart = talk_apart<T>(r.depth), padded = static_cast<int>(s.apart);
    const auto row_at = [&](int i) { return global(s.x) + (space.tile->first + (s.is_head ? space.row[i].wanted : i)) * r.stride; };
    if (s.before == Before::norm) {
        const float* const norm_b = s.norm_b ? space.norm_b : nullptr;
        Four held[fours_held] = {}, next[fours_held] = {};
        if (number < rows) bring_row(held, s, space.lane, row_at(number));
        for (int i = number; i < rows; i += talk_warps) {
            if (i + talk_warps < rows) bring_row(next, s, space.lane, row_at(i + talk_warps));
            T* const to = space.x + i * apart;
            const auto put = [&](const Four& y, int c) { put_four(to + c, y); };
            if (s.in % 4 == 0 && s.in <= fours_held * 4 * warp)
                over_normed<true>(s, space.lane, held, nullptr, space.norm_w, norm_b, r.epsilon, put);
            else over_normed<false>(s, space.lane, held, row_at(i), space.norm_w, norm_b, r.epsilon, put);
            for (int c = (s.in + 3) / 4 * 4 + space.lane * 4; c < padded; c += 4 * warp) put_four(to + c, Four());
            BABYGPT_TIMES (k, fours_held) held[k] = next[k];
        }
        return;
    }
    int log_team = 0;
    while ((rows << (log_team + 1)) <= talk_warps) ++log_team;
    const int place = (number & ((1 << log_team) - 1)) * warp + space.lane, step = warp << log_team;
    for (int i = number >> log_team; i < rows; i += talk_warps >> log_team) {
        const float* const x = row_at(i);
        T* const to = space.x + i * apart;
        if (s.narrow_x) {
            for (int c = place * 8; c < padded; c += step * 8) copy_piece(to + c, reinterpret_cast<const T*>(x) + c, c < s.in);
            continue;
        }
        BABYGPT_UNROLL(1)
        for (int c = place * 4; c < padded; c += step * 4) {
            Four value = four(x + c, s.in - c, s.in % 4 == 0);
            if (s.before == Before::gate) {
                const Four up = four(x + s.in + c, s.in - c, s.in % 4 == 0);
                BABYGPT_UNROLL(1)
                for (int e = 0; e < 4; ++e) value.of[e] = activated(value.of[e], s.activation) * up.of[e];
            }
            put_four(to + c, value);
        }
    }
}
// So many rounds' sums of a warp's part, of the rows from `row` on. exact: the part has as many steps as are under way at once.
template <int rounds, bool exact, class T>
__device__ __forceinline__ void multiply_part(const Step& s, const Space<T>& space, const Share& share, Weights<T>& weights, int from,
                                              int row, int rows, int apart, float* parts) {
    TileSums<T> sums[static_cast<size_t>(rounds)];
    for (int begin = share.begin; begin < share.stop; begin += part_steps) {
        if (!exact && (begin > share.begin || (row > 0 && share.stop - share.begin > part_steps))) {
            __syncwarp();  // all have read those before
            weights.bring(s, space, share, from, begin);
            weights.arrive(space, share, from);
        }
        BABYGPT_UNROLL(3)  // more, and registers that others need hold what is not multiplied yet
        for (int i = 0; i < part_steps; ++i) {
            if (!exact && begin + i >= share.stop) continue;
            typename TileSums<T>::Side side;
            side.bring(space.x + row * apart + (begin + i) * talk_depth, space.lane, apart, rows - row);
            BABYGPT_TIMES (round, rounds) {
                if (!exact && share.tile_of(from, round) < 0) continue;
                Eight<T> w;
                for (int which = 0; which < static_cast<int>(sizeof(T) / 2); ++which)
                    w.of[which] = *reinterpret_cast<const uint4*>(space.piece(share.base + round * share.stride + i, which));
                sums[round].add(w, side);
            }
        }
        if (exact) break;
    }
    float* to = parts + (space.thread / warp * rows + row) * talk_outputs;
    BABYGPT_TIMES (round, rounds) {
        if (exact || share.tile_of(from, round) >= 0) sums[round].leave(to, space.lane, rows - row);
        to += talk_warps * rows * talk_outputs;
    }
}
// What a thread makes of an output's sums over parts, for rows from `row` on, `step` apart: addend + f(sum + bias).
struct Outputs {
    const float *parts, *addend;  // of this output
    int of_tile, log_parts, step, rows;
    int64_t stride;
    float bias;
    Activation activation;
    // What is added to as many rows.
    template <size_t many>
    __device__ __forceinline__ void bring(float (&more)[many], int row) const {
        if (!addend || row >= rows) return;
        BABYGPT_TIMES (k, many) more[k] = addend[lesser(row + k * step, rows - 1) * stride];
    }
    // f(row, y) of them. more: what is added.
    template <class T, size_t many, size_t all, class F>
    __device__ __forceinline__ void finish(int row, const float (&more)[all], const F& f) const {
        float sum[many] = {};
        BABYGPT_UNROLL(2)
        for (int i = 0; i < 1 << log_parts; ++i)
            BABYGPT_TIMES (k, many) sum[k] += parts[i * of_tile + lesser(row + k * step, rows - 1) * talk_outputs];
        BABYGPT_TIMES (k, many) sum[k] += bias;
        if (activation == Activation::gelu_tanh) {
            BABYGPT_TIMES (k, many) sum[k] = activated<T>(sum[k], Activation::gelu_tanh);
        } else if (activation != Activation::none) {
            BABYGPT_TIMES (k, many) sum[k] = activated<T>(sum[k], activation);
        }
        BABYGPT_TIMES (k, many)
            if (row + k * step < rows) f(row + k * step, sum[k] + more[k]);
    }
};
// meet: waits until x is there. ahead: brings what the next product needs.
template <class T, class F, class G>
__device__ __forceinline__ void multiply_rows(const Step& s, const Reading<T>& r, const Space<T>& space, Weights<T>& weights, int& set,
                                              const F& meet, const G& ahead) {
    constexpr int rounds = talk_rounds<T>;
    constexpr size_t together = 4;
    const TileHere& here = *space.tile;
    const int rows = s.is_head ? here.heads : here.rows, of_tile = rows * talk_outputs, apart = talk_apart<T>(r.depth),
              thread = space.thread;
    const Share share(s, space.number(), rounds);
    if (rows == 0 || share.first == share.end) {
        meet();
        if (share.first < share.end) weights.arrive(space, share, share.first);
        __syncthreads();
        return ahead();
    }
    float *const parts = reinterpret_cast<float*>(space.x + rows * apart), *const logits = r.scores ? r.all_logits : r.logits;
    for (int from = share.first; from < share.end;) {
        const int tiles = share.tiles_of(from, rounds), next = from + tiles, outputs = tiles * talk_outputs;
        // At the end a thread has an output, and of the rows every `step`th.
        const int log_wide = outputs <= 32    ? 5
                             : outputs <= 128 ? 7
                                              : 8,
                  number = thread & ((1 << log_wide) - 1), step = talk_threads >> log_wide, output = from * talk_outputs + number,
                  first_row = number < outputs && output < s.out ? thread >> log_wide : rows;
        Outputs of{parts + (number / talk_outputs << share.log_parts) * of_tile + number % talk_outputs,
                   s.addend ? global(s.addend) + here.first * r.stride + output : nullptr,
                   of_tile,
                   share.log_parts,
                   step,
                   rows,
                   r.stride,
                   0,
                   s.before == Before::gate ? Activation::none : s.activation};
        const int mine = share.rounds_of(from, rounds);
        if (from == share.first) meet();
        float more[together] = {};
        of.bring(more, first_row);  // on their way with x
        if (from == share.first) {
            load_side(s, r, space, rows);
            copies_arrive();
            __syncthreads();
        } else copies_arrive();
        weights.arrive(space, share, from);
        for (int row = 0; row < rows && mine > 0; row += TileSums<T>::rows) {
            const auto multiply = [&](auto many, auto exact) {
                multiply_part<decltype(many)::value, decltype(exact)::value>(s, space, share, weights, from, row, rows, apart, parts);
            };
            if (share.stop - share.begin != part_steps) multiply(Size<rounds>(), Size<0>());
            else if (mine == 1) multiply(Size<1>(), Size<1>());
            else if (mine == 2) multiply(Size<2>(), Size<1>());
            else multiply(Size<rounds>(), Size<1>());
        }
        __syncthreads();
        float* const bias = space.bias + set * Space<T>::most_outputs;
        set ^= 1;
        if (next < share.end) bring_ahead(s, space, next, space.bias + set * Space<T>::most_outputs);
        else ahead();
        if (s.bias && number < outputs) of.bias = bias[number];
        const bool draws = s.is_head && r.draws;
        float* const y = s.is_head ? logits + static_cast<int64_t>(here.logits) * s.out : s.y + here.first * r.stride;
        float* const again = r.all_logits + static_cast<int64_t>(here.logits) * s.out;
        const int64_t y_stride = s.is_head ? s.out : r.stride;
        const auto leave = [&](int row, float sum) {
            float* const to = global(y + row * y_stride);
            if (s.narrow_y) put(reinterpret_cast<T*>(to) + output, sum);
            else to[output] = sum;
            if (draws) again[static_cast<int64_t>(row) * s.out + output] = sum;
        };
        if (rows <= step) {
            if (first_row < rows) of.template finish<T, 1>(first_row, more, leave);
        } else {
            for (int row = first_row; row < rows; row += static_cast<int>(together) * step) {
                if (row > first_row) of.bring(more, row);
                of.template finish<T, together>(row, more, leave);
            }
        }
        from = next;
        if (from < share.end) __syncthreads();
    }
}

// ---- attention over the pages of a KV cache ----

// Element d of a head of row i, turned where the positions are rotary.
__device__ __forceinline__ float turned_pair(const Step& s, const float* waves, const float* head, int position, int d) {
    const int half = s.dim / 2, k = d % half;
    const float* const wave = waves + static_cast<int64_t>(position) * s.dim;
    const float a = head[k], b = head[half + k];
    return d < half ? fmaf(a, wave[k], -(b * wave[half + k])) : fmaf(a, wave[half + k], b * wave[k]);
}
__device__ __forceinline__ float turned(const Step& s, const float* waves, const float* head, int position, int d) {
    return s.turns ? turned_pair(s, waves, head, position, d) : head[d];
}
// Where the keys [dim][page], or the values [page][dim], of a head begin in a page.
template <class T>
__device__ __forceinline__ T* keys_of(const Step& s, T* page, int head) {
    return global(page) + (static_cast<int64_t>(s.layer) * 2 * s.kv_heads + head) * s.dim * kv_page;
}
template <class T>
__device__ __forceinline__ T* values_of(const Step& s, T* page, int head) {
    return global(page) + ((static_cast<int64_t>(s.layer) * 2 + 1) * s.kv_heads + head) * s.dim * kv_page;
}
// A row's keys and values of a head to its page; a warp does it.
template <class T>
__device__ __forceinline__ void store_row(const Step& s, const float* waves, T* const* pages, int position, const float* x, int head) {
    T* const page = pages[position / kv_page];
    T *const keys = keys_of(s, page, head), *const values = values_of(s, page, head);
    const float *k = x + (s.heads + head) * s.dim, *v = k + s.kv_heads * s.dim;
    const int at = position % kv_page;
    for (int d = lane(); d < s.dim; d += warp) {
        put(keys + d * kv_page + at, turned(s, waves, k, position, d));
        put(values + at * s.dim + d, v[d]);
    }
}
// A head's scores are s = q . k / sqrt(dim) * log2(e), its output the sum of 2^(s - most) v, by that of 2^(s - most). A part of what it sees, every 8th
// page, has its own `most`, which is whole: what was summed with one is taken to another without rounding.
constexpr float most_bound = 1 << 28;
__device__ __forceinline__ int most_of(float score) { return static_cast<int>(ceilf(fminf(fmaxf(score, -most_bound), most_bound))); }
// 2^n, of an n that is not positive.
__device__ __forceinline__ float two_to(int n) { return n < -126 ? 0.0f : __uint_as_float(static_cast<uint32_t>(127 + n) << 23); }
struct Seen {
    int most = -static_cast<int>(most_bound);
    float total = 0;
};
// What it is about: a head of row i of the tile, which sees `seen` positions of the pages and, in the last part, where rows are `alone`, its own, which
// nobody has stored before.
template <class T>
struct HeadOf {
    const Step& s;
    const float *waves, *x;
    T* const* pages;
    int position, seen, head, kv_head;
    bool alone;
    __device__ __forceinline__ HeadOf(const Step& step, const Reading<T>& r, const Space<T>& space, int i, int which)
        : s(step),
          waves(r.waves),
          x(global(step.x) + (space.tile->first + i) * r.stride),
          pages(space.pages(i)),
          position(space.row[i].position),
          seen(position + (r.alone ? 0 : 1)),
          head(which),
          kv_head(which / (step.heads / step.kv_heads)),
          alone(r.alone) {}
    __device__ __forceinline__ const float* query() const { return x + head * s.dim; }
    __device__ __forceinline__ const float* key() const { return x + (s.heads + kv_head) * s.dim; }
    __device__ __forceinline__ const float* value() const { return x + (s.heads + s.kv_heads + kv_head) * s.dim; }
    // Elements d, d + 8 and so on of the query or the key, whose loads do not wait for each other.
    template <size_t many>
    __device__ __forceinline__ void bring(float (&to)[many], const float* from, int d) const {
        if (s.turns) {
            BABYGPT_TIMES (i, many) to[i] = turned_pair(s, waves, from, position, d + 8 * i);
        } else {
            BABYGPT_TIMES (i, many) to[i] = from[d + 8 * i];
        }
    }
    // As it will be read from the page.
    __device__ __forceinline__ static float rounded(float of) {
        T narrow;
        put(&narrow, of);
        return static_cast<float>(narrow);
    }
};
constexpr float log2_e = 1.44269504f;
// One part, of any number of dimensions. A lane has a key of a page; then columns of the values. q: [dim], p: [page].
template <class T>
__device__ Seen see_part(const HeadOf<T>& of, int part, const float* q, float* out, float* p) {
    const int dim = of.s.dim;
    Seen now;
    const bool owns = of.alone && part == head_parts - 1;
    float own = 0;
    for (int d = lane(); owns && d < dim; d += warp) own = fmaf(q[d], of.rounded(turned(of.s, of.waves, of.key(), of.position, d)), own);
    if (owns) own = warp_sum(own), now.most = most_of(own), now.total = power_of_2(own - static_cast<float>(now.most));
    for (int d = lane(); d < dim; d += warp) out[d] = owns ? now.total * of.rounded(of.value()[d]) : 0.0f;
    for (int begin = part * kv_page; begin < of.seen; begin += head_parts * kv_page) {
        const int count = lesser(kv_page, of.seen - begin);
        T* const page = of.pages[begin / kv_page];
        const T *const keys = keys_of(of.s, page, of.kv_head), *const values = values_of(of.s, page, of.kv_head);
        float score = 0;
        for (int d = 0; d < dim && lane() < count; ++d) score = fmaf(q[d], static_cast<float>(keys[d * kv_page + lane()]), score);
        if (lane() >= count) score = -INFINITY;
        const int before = now.most;
        now.most = greater(before, warp_most(most_of(score)));
        const float factor = two_to(before - now.most), mine = power_of_2(score - static_cast<float>(now.most));
        now.total = fmaf(now.total, factor, warp_sum(mine));
        __syncwarp();  // p is as the page before has left it
        p[lane()] = mine;
        __syncwarp();
        for (int d = lane(); d < dim; d += warp) {
            float sum = out[d] * factor;
            for (int j = 0; j < count; ++j) sum = fmaf(p[j], static_cast<float>(values[j * dim + d]), sum);
            out[d] = sum;
        }
    }
    __syncwarp();
    return now;
}
// Sums of eight over lanes that differ in the bits from `least` to 16 of their numbers, divided among them: a lane has from x[0] on those that begin
// at what is returned.
template <int least>
__device__ __forceinline__ int divide_sums(float (&x)[8]) {
    int from = 0;
    BABYGPT_TIMES (i, 3) {
        const int apart = 16 >> i, kept = 4 >> i;
        if (apart < least) continue;
        const bool upper = (lane() & apart) != 0;
        BABYGPT_TIMES (e, 4) {
            if (e >= kept) continue;
            const float mine = upper ? x[e + kept] : x[e], other = upper ? x[e] : x[e + kept];
            x[e] = mine + __shfl_xor_sync(0xffffffffu, other, apart);
        }
        from += upper ? kept : 0;
    }
    return from;
}
// A warp's parts, from number `from` on every `apart`th, of 32 or 64 dimensions, 16 bytes at a time. Lane 4 g + t has every 8th dimension's
// 8 keys from 8 t on, and ends with one score; then dim / 8 lanes have 8 values each of a position, dim / 8 positions after one another. The next page
// is on its way meanwhile.
template <int dim, class T>
__device__ void see_parts(const HeadOf<T>& of, int from, int apart, int slot, const HeadSpace& space) {
    constexpr int across = dim / 8, loads = across;
    const int first = lane() / across * loads, column = lane() % across * 8, t = lane() % 4 * 8, g = lane() / 4,
              count = (of.seen + kv_page - 1) / kv_page, number = static_cast<int>(threadIdx.x) / warp;
    float* const weights = space.p + number * kv_page;
    Eight<T> keys[static_cast<size_t>(loads)], values[static_cast<size_t>(loads)];
    const auto bring_keys = [&](int page) {
        const T* const at = keys_of(of.s, of.pages[page], of.kv_head) + g * kv_page + t;
        BABYGPT_TIMES (i, loads) keys[i].bring(at + i * 8 * kv_page);
    };
    const auto bring_values = [&](int page) {  // of the last page perhaps its last position several times
        const T* const at = values_of(of.s, of.pages[page], of.kv_head) + column;
        const int last = of.seen - page * kv_page - 1;
        BABYGPT_TIMES (i, loads) values[i].bring(at + lesser(first + i, last) * dim);
    };
    constexpr bool both = sizeof(T) == 2;  // registers have room for both
    if (from < count) bring_keys(from);
    if (both && from < count) bring_values(from);
    float q[static_cast<size_t>(loads)], own_key[static_cast<size_t>(loads)] = {}, own_value[8] = {};
    of.bring(q, of.query(), g);
    if (of.alone && from == apart - 1) {  // the last part is one of its
        of.bring(own_key, of.key(), g);
        load(reinterpret_cast<float(&)[4]>(own_value[0]), of.value() + column),
            load(reinterpret_cast<float(&)[4]>(own_value[4]), of.value() + column + 4);
    }
    const float scale = log2_e / sqrtf(static_cast<float>(dim));
    BABYGPT_TIMES (i, loads) q[i] *= scale;
    for (int part = from; part < head_parts; part += apart) {
        Seen now;
        float sum[8] = {}, eight[8];
        if (part >= count && !(of.alone && part == head_parts - 1)) {
            if (lane() == 0) space.mosts[slot + part] = now.most, space.totals[slot + part] = 0;
            continue;
        }
        if (of.alone && part == head_parts - 1) {
            float score = 0;
            BABYGPT_TIMES (i, loads) score = fmaf(q[i], of.rounded(own_key[i]), score);
            for (int lanes = 4; lanes < warp; lanes *= 2) score += __shfl_xor_sync(0xffffffffu, score, lanes);
            now.most = most_of(score);
            const float p = power_of_2(score - static_cast<float>(now.most));
            if (lane() == 0) now.total = p;
            BABYGPT_TIMES (e, 8)
                if (first == 0) sum[e] = p * of.rounded(own_value[e]);
        }
        for (int page = part; page < count; page += head_parts) {
            float score[8] = {};
            BABYGPT_TIMES (i, loads) {
                keys[i].widen(eight);
                BABYGPT_TIMES (e, 8) score[e] = fmaf(q[i], eight[e], score[e]);
            }
            const int next = page + head_parts < count ? page + head_parts : part + apart < head_parts ? part + apart : count;
            if (both && next < count) bring_keys(next);
            if (!both) bring_values(page);
            const int key = t + divide_sums<4>(score), before = now.most;
            const float mine = page * kv_page + key < of.seen ? score[0] : -INFINITY;
            now.most = greater(before, warp_most(most_of(mine)));
            const float factor = two_to(before - now.most), p = power_of_2(mine - static_cast<float>(now.most));
            now.total = fmaf(now.total, factor, p);
            __syncwarp();  // who reads the weights of the page before has done it
            weights[key] = p;
            __syncwarp();
            BABYGPT_TIMES (e, 8) sum[e] *= factor;
            BABYGPT_TIMES (four, loads / 4) {
                float w[4];
                load(w, weights + first + 4 * four);
                BABYGPT_TIMES (i, 4) {
                    values[4 * four + i].widen(eight);
                    BABYGPT_TIMES (e, 8) sum[e] = fmaf(w[i], eight[e], sum[e]);
                }
            }
            if (both && next < count) bring_values(next);
            if (!both && next < count) bring_keys(next);
        }
        now.total = warp_sum(now.total);
        float* const out = space.outs + (slot + part) * dim + column + divide_sums<across>(sum);
        BABYGPT_TIMES (e, dim / warp) out[e] = sum[e];
        if (lane() == 0) space.mosts[slot + part] = now.most, space.totals[slot + part] = now.total;
    }
}
// `slot`: where the first part's sum belongs.
template <class T>
__device__ void see_head(const HeadOf<T>& of, int from, int apart, int slot, const HeadSpace& space) {
    const int dim = of.s.dim, number = static_cast<int>(threadIdx.x) / warp;
    if (dim == 32) see_parts<32>(of, from, apart, slot, space);
    else if (dim == 64) see_parts<64>(of, from, apart, slot, space);
    else {
        float *const q = space.q + number * dim, *const p = space.p + number * kv_page;
        for (int d = lane(); d < dim; d += warp)
            q[d] = turned(of.s, of.waves, of.query(), of.position, d) * (log2_e / sqrtf(static_cast<float>(dim)));
        __syncwarp();
        for (int part = from; part < head_parts; part += apart) {
            const Seen now = see_part(of, part, q, space.outs + (slot + part) * dim, p);
            if (lane() == 0) space.mosts[slot + part] = now.most, space.totals[slot + part] = now.total;
        }
    }
}
// y, from what was found out of the parts in the slots from `first` on. f(d, y) for each; a warp does it.
template <class F>
__device__ __forceinline__ void put_together(const HeadSpace& space, int first, int dim, const F& f) {
    int mosts[head_parts], most = -static_cast<int>(most_bound);
    float factors[head_parts], total = 0;
    BABYGPT_TIMES (i, head_parts) mosts[i] = space.mosts[first + i], factors[i] = space.totals[first + i], most = greater(most, mosts[i]);
    BABYGPT_TIMES (i, head_parts) {
        const float seen = factors[i];
        factors[i] = two_to(mosts[i] - most), total = fmaf(seen, factors[i], total);
    }
    const float by = 1 / total;
    BABYGPT_UNROLL(2)
    for (int d = lane(); d < dim; d += warp) {
        float sum = 0;
        BABYGPT_TIMES (i, head_parts)
            if (factors[i] > 0) sum = fmaf(space.outs[(first + i) * dim + d], factors[i], sum);
        f(d, sum * by);
    }
}
// Where rows see each other's, before any is looked for.
template <class T>
__device__ void store_rows(const Step& s, const Reading<T>& r, const Space<T>& space) {
    for (int i = space.first_warp(); i < space.tile->rows * s.kv_heads; i += space.blocks * talk_warps) {
        const int row = i / s.kv_heads;
        store_row(s, r.waves, space.pages(row), space.row[row].position, s.x + (space.tile->first + row) * r.stride, i % s.kv_heads);
    }
}
// A block has every `blocks`th head of keys of a row, and all that look at it, which are stored to when these have been read. 2^log_warps warps share a
// head, more of them where there are few; then one puts the parts together.
template <class T>
__device__ void attend_rows(const Step& s, const Reading<T>& r, const Space<T>& space) {
    const HeadSpace seen(space.rest, s.dim);
    const int group = s.heads / s.kv_heads, all = space.tile->rows * s.kv_heads, number = static_cast<int>(threadIdx.x) / warp,
              stored = space.block < all ? (all - space.block - 1) / space.blocks + 1 : 0, count = stored * group;
    int log_warps = HeadSpace::least_log_warps(s.dim);
    while (log_warps < log_head_parts && (count << (log_warps + 1)) <= talk_warps) ++log_warps;
    const int at_once = talk_warps >> log_warps;
    const auto row_of = [&](int i) { return (space.block + i * space.blocks) / s.kv_heads; };
    const auto head_of = [&](int i, int row) { return space.block + i * space.blocks - row * s.kv_heads; };
    for (int first = 0; first < count; first += at_once) {
        const int mine = number >> log_warps, task = first + mine, which = group == 1 ? task : task / group, row = row_of(which),
                  head = head_of(which, row) * group + task - which * group, place = number & ((1 << log_warps) - 1);
        if (task < count) see_head(HeadOf<T>(s, r, space, row, head), place, 1 << log_warps, mine * head_parts, seen);
        __syncthreads();
        if (place == 0 && task < count) {
            float* const y = global(s.y) + (space.tile->first + row) * r.stride;
            put_together(seen, mine * head_parts, s.dim, [&](int d, float value) {
                if (s.narrow_y) put(reinterpret_cast<T*>(y) + head * s.dim + d, value);
                else y[head * s.dim + d] = value;
            });
        }
        if (first + at_once < count) __syncthreads();
    }
    for (int i = talk_warps - 1 - number; r.alone && i < stored; i += talk_warps) {  // what all who share it have read
        const int row = row_of(i);
        store_row(s, r.waves, space.pages(row), space.row[row].position, s.x + (space.tile->first + row) * r.stride, head_of(i, row));
    }
}

// The losses of all rows, -log p(target), and the logits that are wanted. A warp has a row.
template <class T>
__device__ void score_rows(const Reading<T>& r) {
    for (int i = first_row(); i < r.rows; i += all_warps()) {
        const float* const logits = r.all_logits + static_cast<int64_t>(i) * r.vocab;
        float most = -INFINITY;
        for (int c = lane(); c < r.vocab; c += warp) most = fmaxf(most, logits[c]);
        most = warp_most(most);
        double sum = 0;
        for (int c = lane(); c < r.vocab; c += warp) sum += static_cast<double>(expf(logits[c] - most));
        sum = warp_sum(sum);
        const int target = r.targets[i];
        if (lane() == 0) r.losses[i] = target < 0 ? 0.0 : log(sum) + static_cast<double>(most) - static_cast<double>(logits[target]);
    }
    for (int i = first_row(); i < r.wanted; i += all_warps())
        for (int c = lane(); c < r.vocab; c += warp)
            r.logits[static_cast<int64_t>(i) * r.vocab + c] = r.all_logits[static_cast<int64_t>(r.wanted_rows[i]) * r.vocab + c];
}

// ---- the next token, where many sessions want theirs: the header's draw (chapter 8). Of few, the host has drawn sooner. ----

// From weights by id, those that do not count negative; by_weight: the heaviest first, the smaller of two equal ones' ids before the other.
__device__ int draw_one(const Draw& d, const float* weights, const int* by_weight, int vocab) {
    const auto weight = [&](int id) { return static_cast<double>(weights[id]); };
    double total = 0;
    int count = 0, chosen = -1;
    for (int id = 0; id < vocab; ++id)
        if (weights[id] >= 0) total += weight(id), ++count;
    const bool fewer = d.top_k > 0 && d.top_k < count;
    if (!fewer && d.top_p >= 1) {
        double left = d.uniform * total;
        for (int id = vocab; id-- > 0 && !(left < 0);)
            if (weights[id] >= 0) left -= weight(id), chosen = id;
        return chosen;
    }
    const int limit = fewer ? d.top_k : count;
    int taken = 0;
    double mass = 0;
    const auto take = [&](double aim) {
        mass = 0, taken = 0;
        do mass += weight(by_weight[taken]), ++taken;
        while (taken < limit && mass < aim);
    };
    take(fewer ? total : d.top_p * total);
    if (fewer && d.top_p < 1) take(d.top_p * mass);
    for (; d.min_p > 0 && taken > 1 && weight(by_weight[taken - 1]) < d.min_p; --taken) mass -= weight(by_weight[taken - 1]);
    double left = d.uniform * mass;
    for (int i = 0; i < taken && !(left < 0); ++i) chosen = by_weight[i], left -= weight(chosen);
    return chosen;
}
// A warp has a row, and its first lane what goes from one id to the next.
template <class T>
__device__ void draw_rows(const Reading<T>& r, const Space<T>& space) {
    const int number = static_cast<int>(threadIdx.x) / warp;
    float* const weights = reinterpret_cast<float*>(space.rest) + number * r.vocab;
    int* const by_weight = reinterpret_cast<int*>(space.rest) + (talk_warps + number) * r.vocab;
    for (int i = space.first_warp(); i < space.tile->heads; i += space.blocks * talk_warps) {
        const int row = space.tile->logits + i;
        const Draw d = r.draws[row];
        const float* const logits = r.all_logits + static_cast<int64_t>(row) * r.vocab;
        float biggest = -INFINITY, wrong = 0;
        for (int id = lane(); id < r.vocab; id += warp) {
            weights[id] = id == d.unknown || id >= d.limit ? -INFINITY : logits[id];
            biggest = fmaxf(biggest, weights[id]), wrong = fmaxf(wrong, isnan(weights[id]) ? 1.0f : 0.0f);
        }
        biggest = warp_most(biggest), wrong = warp_most(wrong);
        int chosen = -1;
        if (wrong > 0 || d.limit <= 0 || isinf(biggest)) {
            // the host finds out what to say of it
        } else if (!(d.inverse > 0)) {
            float first = -INFINITY;  // the smallest, with a minus
            for (int id = lane(); id < r.vocab; id += warp)
                if (weights[id] >= biggest) first = fmaxf(first, static_cast<float>(-id));
            chosen = static_cast<int>(-warp_most(first));
        } else {
            const float cut = static_cast<float>(static_cast<double>(biggest) + d.below);
            for (int id = lane(); id < r.vocab; id += warp)
                weights[id] = weights[id] >= cut ? expf((weights[id] - biggest) * d.inverse) : -1.0f;
            __syncwarp();
            for (int id = lane(); id < r.vocab && (d.top_k > 0 || d.top_p < 1); id += warp) {
                int before = 0;
                for (int other = 0; other < r.vocab; ++other)
                    before += weights[other] > weights[id] || (other < id && weights[other] >= weights[id]);
                by_weight[before] = id;
            }
            __syncwarp();
            if (lane() == 0) chosen = draw_one(d, weights, by_weight, r.vocab);
        }
        if (lane() == 0) r.drawn[row] = chosen;
        __syncwarp();
    }
}

// What is no product, as functions of their own: what the compiler would keep in registers for them, products need for the weights that are under way.
// They find the run in shared memory, too, where it begins.
template <class T, class F>
__device__ __forceinline__ void with_run(const F& f) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const Reading<T>& r = *reinterpret_cast<const Reading<T>*>(memory);
    f(r, Space<T>(memory, r));
}
template <class T>
__noinline__ __device__ void other_step(int number) {
    with_run<T>([&](const Reading<T>& r, const Space<T>& space) {
        const Step& s = space.steps[number];
        if (s.kind == StepKind::embed) embed_rows(s, r, space);
        else if (s.kind == StepKind::norm) norm_rows(s, r, space);
        else attend_rows(s, r, space);
    });
}
template <class T>
__noinline__ __device__ void store_step(int number) {
    with_run<T>([&](const Reading<T>& r, const Space<T>& space) { store_rows(space.steps[number], r, space); });
}
template <class T>
__noinline__ __device__ void draw_step() {
    with_run<T>([](const Reading<T>& r, const Space<T>& space) { draw_rows(r, space); });
}
template <class T>
__noinline__ __device__ void score_step() {
    with_run<T>([](const Reading<T>& r, const Space<T>&) { score_rows(r); });
}

template <class T>
__global__ void __launch_bounds__(talk_threads) read_rows(const __grid_constant__ Reading<T> r) {
    BABYGPT_DYNAMIC_SHARED(memory);
    Space<T> space(memory, r);
    const int group = static_cast<int>(blockIdx.x) / r.blocks < r.groups ? static_cast<int>(blockIdx.x) / r.blocks : r.tiles;
    const auto copy = [](void* to, const void* from, size_t bytes) {
        for (size_t i = threadIdx.x; i < bytes / sizeof(uint4); i += talk_threads)
            static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
    };
    const auto bring_tile = [&](int number) {
        copy(space.tile, r.sent + static_cast<int64_t>(number) * r.room, static_cast<size_t>(r.used));
    };
    // f(which) of each of the group's tiles. There is one, unless shared memory is too small for so many rows.
    const auto over_tiles = [&](const auto& f) {
        for (int number = group; number < r.tiles; number += r.groups) {
            if (r.tiles > r.groups) {
                __syncthreads();
                bring_tile(number);
                __syncthreads();
            }
            f(number);
        }
    };
    static_assert(sizeof(Step) % sizeof(uint4) == 0 && sizeof r % sizeof(uint4) == 0, "both are copied by sixteens of bytes");
    copy(memory, &r, sizeof r);
    copy(space.steps, r.steps, static_cast<size_t>(r.count) * sizeof(Step));
    if (group < r.tiles) bring_tile(group);
    Weights<T> weights;
    int set = 0;  // of what is brought ahead: which of two biases
    weights.begin(space);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < r.count; i += talk_threads) Share::divide(space.steps[i], space.block, space.blocks);
    __syncthreads();
    // Of the first product from step i on.
    const auto ahead = [&](int i) {
        while (i < r.count && space.steps[i].kind != StepKind::product) ++i;
        if (i < r.count) bring_ahead(space.steps[i], space, space.steps[i].first, space.bias + set * Space<T>::most_outputs);
    };
    if (group < r.tiles) ahead(0);
    for (int i = 0; i < r.count; ++i) {
        const Step& s = space.steps[i];
        space.ask_thread();
        if (i > 0) arrive(r.cluster);
        const auto meet = [&] {
            copies_arrive();
            if (i > 0) wait(r.cluster);
            __syncthreads();  // what was copied after the arrival, others see only now
        };
        if (s.kind == StepKind::product && group < r.tiles) {
            over_tiles([&](int number) {
                const auto meet_here = [&] {
                    if (number == group) return meet();
                    copies_arrive();
                    __syncthreads();
                };
                multiply_rows(s, r, space, weights, set, meet_here, [&] { ahead(number + r.groups < r.tiles ? i : i + 1); });
            });
            continue;
        }
        meet();
        if (s.kind == StepKind::product) continue;
        if (s.kind == StepKind::attend && !r.alone) {
            over_tiles([&](int) { store_step<T>(i); });
            grid_barrier();
        }
        over_tiles([&](int) { other_step<T>(i); });
    }
    if (r.draws) {
        arrive(r.cluster);
        wait(r.cluster);
        over_tiles([&](int) { draw_step<T>(); });
    }
    if (!r.scores) return;
    grid_barrier();
    score_step<T>();
}

// ---- the host's side ----

// Everything on the device, in one block, and what host and device both see.
struct TalkMemory {
    float *weights, *waves, *activations, *all_logits;
    Step* steps;
};
struct TalkInput {
    unsigned char* tiles;
    int *wanted, *targets;
    float* logits;
    double* losses;
    Draw* draws;
    int32_t* drawn;
};

struct Talker {
    bool narrow = false;
    int ordinal = 0, processors = 1, steps_there = 0, copies_there = 0, depth = 0, normed = 0, vocab = 0, context = 0;
    int tile_rows = 0;                                               // that shared memory has room for
    int clusters[parts_of(sizeof cluster_sizes, sizeof(int))] = {};  // of each size: how many run at once
    float epsilon = 0;
    size_t shared_bytes = 0;
    int64_t weight_block = 0, stride = 0;
    Step* steps = nullptr;
    Copied* copies = nullptr;
    TalkMemory memory{};
    TalkInput input{};
    void *block = nullptr, *input_block = nullptr;
    cudaStream_t stream = nullptr;

    Status begin(const DevicePlan& plan);
    Status plan_steps(const DevicePlan& plan, Plan& there);
    void plan_narrow(const int* numbers);
    Status create(const DevicePlan& plan);
    void destroy();
    template <class T>
    Status plan_launch(int dim, int optin, int generation);
    cudaLaunchConfig_t launch(int blocks, int cluster, cudaLaunchAttribute& attribute) const;
    template <class T>
    void divide(Reading<T>& r, int& each) const;
    template <class T>
    void send(const Run& run, Reading<T>& r, int each);
    template <class T>
    Status read(const Run& run, double* losses);
    void plan_input(Plan& here);
};
void Talker::plan_input(Plan& here) {
    // Tiles of any number of rows, of which the last may have fewer.
    const int64_t of_row = static_cast<int64_t>(sizeof(TileHere) + sizeof(RowHere)) + 8 * talk_pages(context) + 16;
    input.tiles = here.take<unsigned char>((rows_at_once + talk_rows) * of_row);
    input.wanted = here.take<int>(rows_at_once);
    input.targets = here.take<int>(rows_at_once);
    input.logits = here.take<float>(static_cast<int64_t>(rows_at_once) * vocab);
    input.losses = here.take<double>(rows_at_once);
    input.draws = here.take<Draw>(rows_at_once);
    input.drawn = here.take<int32_t>(rows_at_once);
}

// Makes the steps of the tape's ops, where `steps` and `copies` have room for them; places everything on the device.
Status Talker::plan_steps(const DevicePlan& plan, Plan& there) {
    const int ops = static_cast<int>(plan.ops.size), tensors = static_cast<int>(plan.tensors.size);
    const size_t element = narrow ? sizeof(__nv_bfloat16) : sizeof(float);
    memory.weights = there.take<float>(plan.weight_block, "weights");
    memory.waves = there.take<float>(static_cast<int64_t>(plan.waves.size), "waves");
    memory.steps = there.take<Step>(ops, "steps");
    memory.all_logits = there.take<float>(static_cast<int64_t>(rows_at_once) * vocab, "all_logits");
    const auto weight = [&](int index) -> const Weight& { return plan.weights[static_cast<size_t>(index)].weight; };
    const auto values = [&](int index) { return index == nothing || !memory.weights ? nullptr : memory.weights + weight(index).offset; };
    const auto readers = [&](int tensor) {
        int count = 0;
        for (const Op& op : plan.ops) count += (op.x == tensor) + (op.x2 == tensor);
        return count;
    };
    const auto refuses = [] { return refuse(Error::unsupported, "the backend cuda runs no model of this kind: choose the backend cpu"); };
    struct Life {
        int born, dies, columns;
        int64_t place;
    };
    Life* const lives = static_cast<Life*>(malloc(static_cast<size_t>(tensors + 1) * sizeof(Life)));
    int* const numbers = static_cast<int*>(malloc(static_cast<size_t>(3 * ops + 3) * sizeof(int)));  // each step's x, addend and y
    if (!lives || !numbers) return free(lives), free(numbers), refuse(Error::out_of_memory, "out of memory");
    for (int i = 0; i < tensors; ++i)
        lives[i] = Life{-1, -1, static_cast<int>(parts_of(plan.tensors[static_cast<size_t>(i)].cols, 8) * 8), 0};
    steps_there = copies_there = 0;
    bool good = true;
    Step next{};  // what comes before a product has been seen
    int next_x = nothing;
    bool turns = false;
    for (int i = 0; i < ops && good; ++i) {
        const Op& op = plan.ops[static_cast<size_t>(i)];
        const Op* const after = i + 1 < ops ? &plan.ops[static_cast<size_t>(i + 1)] : nullptr;
        const bool feeds_product =
            after && after->x == op.y && readers(op.y) == 1 && (after->kind == OpKind::linear || after->kind == OpKind::head);
        Step s{};
        int x = op.x, addend = nothing, y = op.y;
        s.in = op.in, s.out = op.out, s.layer = op.layer;
        if (op.kind == OpKind::embedding) {
            s.kind = StepKind::embed, s.table = values(op.w), s.positions = values(op.b), s.waves = after && after->kind == OpKind::waves;
        } else if (op.kind == OpKind::waves || op.kind == OpKind::rope) {
            good = op.kind == OpKind::rope ? after && after->kind == OpKind::attention : steps_there == 1 && steps[0].waves;
            turns = op.kind == OpKind::rope;
            continue;
        } else if (op.kind == OpKind::norm) {
            s.kind = StepKind::norm, s.norm_w = values(op.w), s.norm_b = values(op.b), s.centred = op.centred, s.before = Before::norm;
            if (feeds_product) {
                next = s, next_x = x;
                continue;
            }
        } else if (op.kind == OpKind::gate) {
            good = feeds_product;
            next = Step{}, next_x = x;
            next.before = Before::gate, next.activation = op.activation;
            continue;
        } else if (op.kind == OpKind::attention) {
            good = op.sight == Sight::causal;
            s.kind = StepKind::attend, s.heads = op.heads, s.kv_heads = op.kv_heads, s.dim = op.dim(), s.turns = turns;
            turns = false;
        } else if (op.kind == OpKind::linear || op.kind == OpKind::head) {
            s.kind = StepKind::product, s.activation = op.activation, s.is_head = op.kind == OpKind::head, s.bias = values(op.b);
            if (next_x != nothing) {
                x = next_x;
                s.before = next.before, s.norm_w = next.norm_w, s.norm_b = next.norm_b, s.centred = next.centred;
                if (s.before == Before::gate) good = op.activation == Activation::none, s.activation = next.activation;
                next_x = nothing;
            }
            if (after && after->kind == OpKind::add && (after->x == op.y || after->x2 == op.y) && readers(op.y) == 1)
                addend = after->x == op.y ? after->x2 : after->x, y = after->y, ++i;
            const bool across = !s.is_head && !plan.output_rows;
            s.apart = parts_of(op.in, talk_depth) * talk_depth;
            while ((1 << s.log_parts) < talk_warps && (part_steps << s.log_parts) * talk_depth < s.apart) ++s.log_parts;
            unsigned char* const to = there.take<unsigned char>(
                static_cast<int64_t>(element) * parts_of(op.out, talk_outputs) * talk_outputs * s.apart, "matrices");
            s.w = to;
            copies[copies_there++] = Copied{weight(op.w).offset, op.out, op.in, s.apart, to, across};
        } else good = false;
        if (!good) break;
        const auto touch = [&](int tensor) {
            if (tensor == nothing) return;
            Life& life = lives[tensor];
            life.born = life.born < 0 ? steps_there : life.born, life.dies = steps_there;
        };
        touch(x), touch(addend), touch(y);
        numbers[3 * steps_there] = x, numbers[3 * steps_there + 1] = addend, numbers[3 * steps_there + 2] = y;
        steps[steps_there++] = s;
    }
    // Each tensor has the lowest place in a row's memory that none before it needs at the same time. Rows do not share any, since tiles do not
    // wait for each other.
    stride = 0;
    for (int i = 0; i < tensors && good; ++i) {
        Life& mine = lives[i];
        if (mine.born < 0) continue;
        for (bool moved = true; moved;) {
            moved = false;
            for (int k = 0; k < i; ++k) {
                const Life& other = lives[k];
                if (other.born < 0 || other.born > mine.dies || mine.born > other.dies) continue;
                if (mine.place >= other.place + other.columns || other.place >= mine.place + mine.columns) continue;
                mine.place = other.place + other.columns, moved = true;
            }
        }
        stride = greater(stride, mine.place + mine.columns);
    }
    memory.activations = there.take<float>(stride * rows_at_once, "activations");
    for (int i = 0; i < steps_there && good; ++i) {
        const auto at = [&](int which) -> float* {
            const int tensor = numbers[3 * i + which];
            return tensor == nothing || !memory.activations ? nullptr : memory.activations + lives[tensor].place;
        };
        steps[i].x = at(0), steps[i].addend = at(1), steps[i].y = at(2);
    }
    if (good) plan_narrow(numbers);
    free(lives), free(numbers);
    return good ? Status() : refuses();
}
// Where, in bf16, all who read a step's y multiply it as it is, it is left to them so. numbers: each step's x, addend and y.
void Talker::plan_narrow(const int* numbers) {
    for (int i = 0; narrow && i < steps_there; ++i) {
        if (steps[i].kind == StepKind::embed || steps[i].kind == StepKind::norm || steps[i].is_head) continue;
        const int y = numbers[3 * i + 2];
        int readers = 0;
        bool good = true;
        for (int k = 0; k < steps_there; ++k) {
            good = good && numbers[3 * k + 1] != y && (k == i || numbers[3 * k + 2] != y);
            if (numbers[3 * k] != y) continue;
            good = good && steps[k].kind == StepKind::product && steps[k].before == Before::nothing && steps[k].in % 8 == 0;
            ++readers;
        }
        steps[i].narrow_y = good && readers > 0;
        for (int k = 0; k < steps_there && steps[i].narrow_y; ++k) steps[k].narrow_x = steps[k].narrow_x || numbers[3 * k] == y;
    }
}
// What can be said without a device.
Status Talker::begin(const DevicePlan& plan) {
    narrow = plan.precision == Precision::bf16;
    vocab = plan.head_out, context = plan.context, epsilon = static_cast<float>(plan.epsilon);
    weight_block = plan.weight_block;
    steps = static_cast<Step*>(malloc((plan.ops.size + 1) * sizeof(Step)));
    copies = static_cast<Copied*>(malloc((plan.ops.size + 1) * sizeof(Copied)));
    return steps && copies ? Status() : refuse(Error::out_of_memory, "out of memory");
}
Status Talker::create(const DevicePlan& plan) {
    BABYGPT_CUDA_TRY(begin(plan));
    int generation = 0, optin = 0;
    BABYGPT_CUDA_TRY(find_gpu(ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, ordinal));
    if (narrow && generation < 8)
        return refuse(Error::unsupported, "this GPU does not multiply bf16 (those from 2020 on do): choose the precision f32");
    int dim = 1;
    for (const Op& op : plan.ops) {
        if (op.kind == OpKind::attention) dim = greater(dim, op.dim());
        if (op.kind == OpKind::linear || op.kind == OpKind::head) depth = greater(depth, op.in);
    }
    depth = static_cast<int>(parts_of(depth, talk_depth)) * talk_depth;
    Plan there;
    BABYGPT_CUDA_TRY(plan_steps(plan, there));
    for (int i = 0; i < steps_there; ++i)
        if (steps[i].before == Before::norm) normed = greater(normed, static_cast<int>(parts_of(steps[i].in, talk_depth)) * talk_depth);
    BABYGPT_CUDA_TRY(narrow ? plan_launch<__nv_bfloat16>(dim, optin, generation) : plan_launch<float>(dim, optin, generation));
    if (tile_rows == 0) return Status();
    BABYGPT_CUDA_TRY(take_block(there.bytes, block, "take a smaller model, or the backend cpu"));
    there = Plan{static_cast<char*>(block), 0};
    BABYGPT_CUDA_TRY(plan_steps(plan, there));
    Plan here;
    plan_input(here);
    BABYGPT_CUDA(cudaMallocHost(&input_block, static_cast<size_t>(here.bytes)));
    here = Plan{static_cast<char*>(input_block), 0};
    plan_input(here);
    BABYGPT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (plan.waves.size > 0)
        BABYGPT_CUDA(cudaMemcpyAsync(memory.waves, plan.waves.data, plan.waves.size * sizeof(float), cudaMemcpyHostToDevice, stream));
    BABYGPT_CUDA(cudaMemcpyAsync(memory.steps, steps, static_cast<size_t>(steps_there) * sizeof(Step), cudaMemcpyHostToDevice, stream));
    BABYGPT_CUDA(cudaStreamSynchronize(stream));
    return Status();
}
void Talker::destroy() {
    if (stream) (void)cudaStreamSynchronize(stream);
    if (stream) (void)cudaStreamDestroy(stream);
    if (input_block) (void)cudaFreeHost(input_block);
    if (block) (void)cudaFree(block);
    free(steps), free(copies);
}
// How many rows fit in a tile, and on how many clusters. A cluster's barrier is sooner passed than a whole device's; but 16 multiprocessors take
// longer than all to bring each megabyte.
template <class T>
Status Talker::plan_launch(int dim, int optin, int generation) {
    constexpr int64_t much = int64_t(4) << 20;
    cudaFuncAttributes compiled{};
    BABYGPT_CUDA(cudaFuncGetAttributes(&compiled, read_rows<T>));
    const int rounds = rounds_of<T>(has_much_shared(compiled.ptxVersion));
    for (tile_rows = talk_rows; tile_rows > 0; --tile_rows) {
        shared_bytes = Space<T>::bytes(rounds, steps_there, context, depth, normed, dim, vocab, tile_rows);
        if (shared_bytes <= static_cast<size_t>(optin)) break;
    }
    if (tile_rows == 0) return Status();
    // All that there is, since the limit is the kernel's: sessions of other models launch it, too.
    BABYGPT_CUDA(cudaFuncSetAttribute(read_rows<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, optin));
    int64_t bytes = 0;
    for (int i = 0; i < steps_there; ++i)
        if (steps[i].kind == StepKind::product) bytes += steps[i].out * steps[i].apart * static_cast<int64_t>(sizeof(T));
    if (generation < 9 || compiled.ptxVersion < 90 || bytes > much * steps_there) return Status();
    BABYGPT_CUDA(cudaFuncSetAttribute(read_rows<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    for (size_t i = 0; i < sizeof clusters / sizeof *clusters; ++i) {
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = launch(cluster_sizes[i], cluster_sizes[i], attribute);
        if (cudaOccupancyMaxActiveClusters(&clusters[i], read_rows<T>, &config) == cudaSuccess) continue;
        clusters[i] = 0;
        (void)cudaGetLastError();  // there are none of this size, then
    }
    return Status();
}
// cluster: its blocks; 0: all are a cooperative grid.
cudaLaunchConfig_t Talker::launch(int blocks, int cluster, cudaLaunchAttribute& attribute) const {
    cudaLaunchConfig_t config{};
    attribute = cudaLaunchAttribute{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(talk_threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    if (cluster > 0) attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    else attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    return config;
}
// Rows into tiles, tiles to groups of blocks: as many clusters as run at once, of the first size with which they take all rows; or parts of a grid.
template <class T>
void Talker::divide(Reading<T>& r, int& each) const {
    int size = 0, at_once = 0;
    for (size_t i = 0; r.alone && at_once * tile_rows < r.rows && i < sizeof clusters / sizeof *clusters; ++i)
        if (clusters[i] > 0) size = cluster_sizes[i], at_once = clusters[i];
    r.cluster = size > 0;
    each = r.cluster ? lesser(tile_rows, static_cast<int>(parts_of(r.rows, at_once))) : tile_rows;
    r.tiles = static_cast<int>(parts_of(r.rows, each));
    r.groups = r.cluster ? r.tiles : lesser(r.tiles, processors);
    r.blocks = r.cluster ? size : processors / r.groups;
}
// What the kernel wants to know of the run's rows, in memory that it sees.
template <class T>
void Talker::send(const Run& run, Reading<T>& r, int each) {
    unsigned char* at = nullptr;  // this tile's place
    TileHere* here = nullptr;
    RowHere* row = nullptr;
    int pages = 0, wanted = 0;
    r.room = Space<T>::tile_bytes(each, context), r.used = 0;
    for (size_t i = 0; i < run.sequences.size; ++i) {
        const Sequence& s = run.sequences[i];
        const int64_t wants = s.logits ? run.wanted_row(Side::text, i) : -1;
        const int count = talk_pages(s.position + s.length);
        if (wants >= 0) {
            input.wanted[wanted] = static_cast<int>(wants), input.draws[wanted] = s.draw ? *s.draw : Draw();
            if (s.draw && !r.scores) r.draws = input.draws, r.drawn = input.drawn;
        }
        for (int k = 0; k < s.length; ++k) {
            const int number = s.row + k, local = number % each;
            if (local == 0) {
                at = input.tiles + static_cast<int64_t>(number / each) * r.room;
                here = reinterpret_cast<TileHere*>(at), row = reinterpret_cast<RowHere*>(here + 1);
                *here = TileHere{number, lesser(each, r.rows - number), 0, r.scores ? number : wanted};
                pages = 0;
            }
            if (local == 0 || k == 0) {
                memcpy(reinterpret_cast<void**>(row + here->rows) + pages, s.pages, static_cast<size_t>(count) * sizeof(void*));
                pages += count;
                const size_t used =
                    static_cast<size_t>(reinterpret_cast<unsigned char*>(reinterpret_cast<void**>(row + here->rows) + pages) - at);
                r.used = greater(r.used, static_cast<int>(parts_of(static_cast<int64_t>(used), 16) * 16));
            }
            row[local].id = run.ids[number], row[local].position = s.position + k, row[local].pages = pages - count;
            if (r.scores || number == wants) row[here->heads++].wanted = local;
            if (r.scores) input.targets[number] = run.targets ? run.targets[number] : -1;
        }
        wanted += wants >= 0;
    }
    r.wanted = wanted;
}
template <class T>
Status Talker::read(const Run& run, double* losses) {
    Reading<T> r{};
    r.steps = memory.steps, r.sent = input.tiles, r.count = steps_there, r.rows = run.rows, r.scores = losses != nullptr;
    r.alone = !r.scores && run.sequences.size == static_cast<size_t>(run.rows);
    r.wanted_rows = input.wanted, r.targets = input.targets, r.waves = memory.waves;
    r.logits = input.logits, r.all_logits = memory.all_logits, r.losses = input.losses;
    r.stride = stride, r.depth = depth, r.normed = normed, r.vocab = vocab, r.epsilon = epsilon;
    int each = 0;
    divide(r, each);
    send(run, r, each);
    if (r.wanted == 0 && !r.scores) --r.count;  // the head, which is the last step
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch(r.cluster ? r.groups * r.blocks : processors, r.cluster ? r.blocks : 0, attribute);
    BABYGPT_CUDA(cudaLaunchKernelEx(&config, read_rows<T>, r));
    BABYGPT_CUDA(cudaStreamSynchronize(stream));
    if (losses) memcpy(losses, input.losses, static_cast<size_t>(r.rows) * sizeof(double));
    size_t number = 0;  // of those that want logits
    for (const Sequence& s : run.sequences) {
        if (!s.logits) continue;
        const size_t columns = static_cast<size_t>(vocab);
        memcpy(s.logits, input.logits + number * columns, columns * sizeof(float));
        if (s.draw) s.draw->id = r.draws ? input.drawn[number] : -1;
        ++number;
    }
    return Status();
}

// =====================================================================================================================
// [CHAPTER 11] What the header calls
// =====================================================================================================================

float* Gpu::part(DevicePart which) const {
    switch (which) {
        case DevicePart::weights:
            return memory.weights;
        case DevicePart::adapter:
            return memory.adapter;
        case DevicePart::gradients:
            return memory.gradients;
        case DevicePart::moment1:
            return memory.moment1;
        case DevicePart::moment2:
            return memory.moment2;
        case DevicePart::loss_scale:
            return memory.loss_scale;
    }
    return nullptr;
}

Status Gpu::create(const DevicePlan& of) {
    plan = of;
    BABYGPT_CUDA_TRY(find_gpu(ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
    int generation = 0;
    BABYGPT_CUDA(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, ordinal));
    if ((plan.precision == Precision::tf32 || plan.precision == Precision::bf16) && generation < 8)
        return refuse(Error::unsupported,
                      "this GPU multiplies neither tf32 nor bf16 (those from 2020 on do): choose the precision fp16, or f32");
    int dim = 1;
    for (const Op& op : plan.ops)
        if (op.kind == OpKind::attention) dim = greater(dim, op.dim());
    const auto fits = [&](size_t wanted) { return wanted <= static_cast<size_t>(shared_bytes); };
    tile_of_attention = fits(attention_bytes<32>(dim, 6, 2)) ? 32 : fits(attention_bytes<16>(dim, 6, 2)) ? 16 : 8;
    if (!fits(attention_bytes<8>(dim, 6, 2)))
        return refuse(Error::unsupported,
                      "attention's heads have too many columns for this GPU's shared memory: take more heads, or the backend cpu");
    BABYGPT_CUDA_TRY(with_real([&](auto real) { return allow_shared<decltype(real)>(); }));

    if (on_tensor_cores(plan)) BABYGPT_CUBLAS(cublasLtCreate(&library));
    Plan there;
    plan_memory(there, plan, memory);
    bytes = there.bytes;
    BABYGPT_CUDA_TRY(take_block(bytes, block, "take a smaller batch"));
    there = Plan{static_cast<char*>(block), 0};
    plan_memory(there, plan, memory);
    const auto plan_here = [&](Plan here) {
        for (Slot& one : slots) plan_places(here, plan, one);
        plan_arrays(here, plan, input);
        results = here.take<Sums>(steps_ahead);
        return static_cast<size_t>(here.bytes);
    };
    const size_t here = plan_here(Plan());
    BABYGPT_CUDA(cudaMallocHost(&input_block, here));
    memset(input_block, 0, here);
    (void)plan_here(Plan{static_cast<char*>(input_block), 0});
    BABYGPT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (Slot& one : slots) BABYGPT_CUDA(cudaEventCreate(&one.ended));
    BABYGPT_CUDA(cudaEventCreateWithFlags(&sent, cudaEventDisableTiming));
    if (plan.waves.size > 0)
        BABYGPT_CUDA(cudaMemcpyAsync(memory.waves, plan.waves.data, plan.waves.size * sizeof(float), cudaMemcpyHostToDevice, stream));
    if (plan.training) {
        const int64_t learnt = learnt_block(plan);
        unsigned char* const ways = static_cast<unsigned char*>(malloc(static_cast<size_t>(learnt / 16) + 1));
        if (!ways) return refuse(Error::out_of_memory, "out of memory");
        memset(ways, 0, static_cast<size_t>(learnt / 16) + 1);
        for (const WeightPlan& w : plan.frozen ? plan.adapter : plan.weights)
            for (int64_t i = 0; i < w.weight.rows * w.weight.cols; i += 16)
                ways[(w.weight.offset + i) / 16] =
                    static_cast<unsigned char>((w.weight.decay ? way_decays : 0) | (plan.muon && w.matrices > 0 ? way_muon : 0));
        cudaError_t done = cudaMemcpyAsync(memory.ways, ways, static_cast<size_t>(learnt / 16), cudaMemcpyHostToDevice, stream);
        int number = 0;
        if (plan.muon)
            over_matrices([&](const MuonMatrix& m, bool) {
                if (done == cudaSuccess) done = cudaMemcpyAsync(memory.matrices + number++, &m, sizeof m, cudaMemcpyHostToDevice, stream);
            });
        if (done == cudaSuccess) done = cudaStreamSynchronize(stream);
        free(ways);
        if (done != cudaSuccess) return trouble("cudaMemcpyAsync", done);
        for (float* zero : {memory.gradients, memory.moment1, memory.moment2})
            BABYGPT_CUDA(cudaMemsetAsync(zero, 0, static_cast<size_t>(learnt) * sizeof(float), stream));
        BABYGPT_CUDA(cudaMemsetAsync(memory.sums, 0, sizeof(Sums), stream));
    }
    BABYGPT_CUDA(cudaStreamSynchronize(stream));
    return Status();
}
void Gpu::destroy() {
    if (stream) (void)cudaStreamSynchronize(stream);
    for (const auto& both : graphs)
        for (cudaGraphExec_t graph : both)
            if (graph) (void)cudaGraphExecDestroy(graph);
    for (Tensorial* t = products; t; t = products) {
        products = t->next;
        destroy_plan(*t);
        delete t;
    }
    if (library) (void)cublasLtDestroy(library);
    for (cudaEvent_t event : {sent, trial[0], trial[1]})
        if (event) (void)cudaEventDestroy(event);
    for (const Slot& one : slots)
        if (one.ended) (void)cudaEventDestroy(one.ended);
    for (int i = 0; i < marks_made; ++i) (void)cudaEventDestroy(marks[i]);
    free(marks);
    if (stream) (void)cudaStreamDestroy(stream);
    if (input_block) (void)cudaFreeHost(input_block);
    if (block) (void)cudaFree(block);
}

// The run's numbers, where the next copy takes them from.
void Gpu::write_now(const Run& run, const DeviceUpdate* update) {
    Now& now = *slot().now;
    const int ops = static_cast<int>(plan.ops.size);
    now.rows[0] = run.rows, now.rows[1] = run.source.rows, now.rows[2] = static_cast<int>(run.sequences.size);
    now.sequences = now.rows[2];
    now.targets = now.rows[static_cast<int>(plan.ops[static_cast<size_t>(ops - 1)].side)];
    now.fresh = fresh;
    now.weighted = run.row_weights != nullptr;
    now.result = static_cast<int>(updates % steps_ahead);
    now.drop_below = run.training ? static_cast<uint32_t>(run.dropout * 4294967296.0) : 0;
    now.drop_keep = static_cast<float>(1 / (1 - run.dropout));
    now.seed = run.seed, now.step = run.step, now.smoothing = run.label_smoothing;
    for (int side = 0; side < 3; ++side) now.first_row[side] = run.first_row[side];
    if (update) now.adam = update->rule.adam, now.muon = update->rule.muon, now.count = update->count, now.clip = update->clip;
}
// Of a window of the text that lies here, 16 bytes; the rest is on the device already, or follows from that there.
Status Gpu::send(const Run& run, const DeviceUpdate* update) {
    write_now(run, update);
    const Slot& from = slot();
    const char* end = reinterpret_cast<const char*>(from.now + 1);
    for (int side = 0; side < 2; ++side) {
        const Stream in = side == 0 ? run.on(Side::text) : run.source;
        Place* to = from.places[side];
        for (size_t i = 0; i < in.sequences.size && in.rows > 0; ++i) {
            const Sequence& s = in.sequences[i];
            *to++ = Place{s.row, s.length, s.position, run.starts ? run.starts[i] : -1};
            end = reinterpret_cast<const char*>(to);
        }
    }
    const size_t used = static_cast<size_t>(end - reinterpret_cast<const char*>(from.now));
    BABYGPT_CUDA(cudaMemcpyAsync(memory.now, from.now, used, cudaMemcpyHostToDevice, stream));
    return run.starts ? Status() : send_arrays(run);
}
// Of the host's own batch. There is one copy of these: it waits until that is on its way no longer.
Status Gpu::send_arrays(const Run& run) {
    const Now& now = *slot().now;
    if (sending) BABYGPT_CUDA(cudaEventSynchronize(sent));
    for (int side = 0; side < 2; ++side)
        BABYGPT_CUDA_TRY(send_array(memory.ids[side], input.ids[side], side == 0 ? run.ids : run.source.ids, now.rows[side]));
    if (run.targets) BABYGPT_CUDA_TRY(send_array(memory.targets, input.targets, run.targets, now.targets));
    else BABYGPT_CUDA(cudaMemsetAsync(memory.targets, 0xff, static_cast<size_t>(now.targets) * sizeof(int32_t), stream));  // -1
    BABYGPT_CUDA_TRY(send_array(memory.row_weights, input.row_weights, run.row_weights, now.weighted ? now.targets : 0));
    BABYGPT_CUDA_TRY(send_array(memory.features, input.features, run.features, static_cast<int64_t>(run.rows) * plan.features));
    BABYGPT_CUDA(cudaEventRecord(sent, stream));
    sending = true;
    return Status();
}
// Until a run has ended. Its slot may be a later one's by now, which ends later.
Status Gpu::wait_for(uint64_t run) {
    if (run < runs_ended) return Status();
    BABYGPT_CUDA(cudaEventSynchronize(slots[run % slots_there].ended));
    runs_ended = run + 1;
    return Status();
}
// Kernel after kernel. `seconds` not null: as in Run.
Status Gpu::walk_now(int which, double* seconds) {
    if (seconds) BABYGPT_CUDA_TRY(make_marks());
    walk(which, seconds != nullptr);
    BABYGPT_CUDA_TRY(walked_well());
    if (!seconds) return Status();
    BABYGPT_CUDA(cudaStreamSynchronize(stream));
    const int ops = static_cast<int>(plan.ops.size), count = which > 0 ? 2 * ops : ops;
    for (int i = 0; i < count; ++i) {
        float ms = 0;
        BABYGPT_CUDA(cudaEventElapsedTime(&ms, marks[i], marks[i + 1]));
        seconds[i < ops ? i : ops + (2 * ops - 1 - i)] += 1e-3 * static_cast<double>(ms);
    }
    return Status();
}
Status Gpu::make_marks() {
    const int count = 2 * static_cast<int>(plan.ops.size) + 1;
    if (!marks) marks = static_cast<cudaEvent_t*>(malloc(static_cast<size_t>(count) * sizeof(cudaEvent_t)));
    if (!marks) return refuse(Error::out_of_memory, "out of memory");
    for (; marks_made < count; ++marks_made) BABYGPT_CUDA(cudaEventCreate(&marks[marks_made]));
    return Status();
}
Status Gpu::capture(int which, cudaGraphExec_t& to) {
    cudaGraph_t graph = nullptr;
    BABYGPT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    walk(which, false);
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    const Status status = walked_well();
    if (!status.ok() || ended != cudaSuccess) {
        if (graph) (void)cudaGraphDestroy(graph);
        return status.ok() ? trouble("cudaStreamEndCapture", ended) : status;
    }
    const cudaError_t made = cudaGraphInstantiate(&to, graph, 0);
    (void)cudaGraphDestroy(graph);
    return made == cudaSuccess ? Status() : trouble("cudaGraphInstantiate", made);
}

}  // namespace cuda

struct records::Device : cuda::Gpu {};
struct records::Generator : cuda::Talker {};

namespace cuda {

// A trainer's device, or a model's generator.
template <class T>
void destroy_there(T* there) {
    {
        const Current current(there->ordinal);
        there->destroy();
    }
    delete there;
}
template <class T>
Status create_there(const DevicePlan& plan, T*& made) {
    made = nullptr;
    T* const there = new (std::nothrow) T;
    if (!there) return refuse(Error::out_of_memory, "out of memory");
    const Status status = there->create(plan);
    if (status.ok()) made = there;
    else destroy_there(there);
    return status;
}
uint64_t device_bytes(const DevicePlan& plan) {
    Plan there;
    Memory memory{};
    plan_memory(there, plan, memory);
    return there.bytes;
}
Status upload(Device* d, DevicePart which, const float* from) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    const size_t bytes = static_cast<size_t>(d->elements(which)) * sizeof(float);
    if (which == DevicePart::gradients) d->fresh = true;
    if (bytes == 0) return Status();
    if (from) BABYGPT_CUDA(cudaMemcpyAsync(d->part(which), from, bytes, cudaMemcpyHostToDevice, d->stream));
    else BABYGPT_CUDA(cudaMemsetAsync(d->part(which), 0, bytes, d->stream));
    if (which == DevicePart::weights && is_narrow(d->plan)) {
        d->begin_launches();
        d->with_real([&](auto real) {
            d->over_elements(narrow_copy<decltype(real)>, d->plan.weight_block, static_cast<decltype(real)*>(d->memory.narrow_weights),
                             d->memory.weights, d->plan.weight_block);
        });
        BABYGPT_CUDA_TRY(d->walked_well());
    }
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}
Status download(Device* d, DevicePart which, float* to) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    const size_t bytes = static_cast<size_t>(d->elements(which)) * sizeof(float);
    if (bytes > 0) BABYGPT_CUDA(cudaMemcpyAsync(to, d->part(which), bytes, cudaMemcpyDeviceToHost, d->stream));
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}
Status run_device(Device* d, const Run& run, const DeviceUpdate* update) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    for (size_t i = 0; i < run.sequences.size && run.source.rows > 0; ++i)
        if (run.sequences[i].source != static_cast<int>(i))
            return refuse(Error::unsupported, "the backend cuda wants a source of its own for each sequence");
    if (d->runs >= slots_there) BABYGPT_CUDA_TRY(d->wait_for(d->runs - slots_there));
    BABYGPT_CUDA_TRY(d->send(run, update));
    const int which = !run.training ? 0 : update ? 2 : 1;
    d->full = true;
    for (int side = 0; side < 3; ++side) d->full = d->full && d->slot().now->rows[side] == d->plan.max_rows[side];
    if (run.seconds || !d->walked[which][d->full]) {
        BABYGPT_CUDA_TRY(d->walk_now(which, run.seconds));
        d->walked[which][d->full] = true;
    } else {
        cudaGraphExec_t& graph = d->graphs[which][d->full];
        if (!graph) BABYGPT_CUDA_TRY(d->capture(which, graph));
        BABYGPT_CUDA(cudaGraphLaunch(graph, d->stream));
    }
    BABYGPT_CUDA(cudaEventRecord(d->slot().ended, d->stream));
    if (run.training) d->fresh = update != nullptr;
    if (update) d->run_of[d->updates++ % steps_ahead] = d->runs;
    ++d->runs;
    return Status();
}
// Where it has to wait, it waits for half of the updates that followed, too: so who has many under way waits for several at once.
Status result_of(Device* d, int later, DeviceResult& result) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    const uint64_t number = d->updates - 1 - static_cast<uint64_t>(later), run = d->run_of[number % steps_ahead];
    if (run >= d->runs_ended) BABYGPT_CUDA_TRY(d->wait_for(d->run_of[(number + static_cast<uint64_t>(later) / 2) % steps_ahead]));
    const Sums& sums = d->results[number % steps_ahead];
    result.loss = sums.loss, result.targets = sums.targets, result.grad_norm = sums.norm, result.skipped = sums.skipped != 0;
    result.seconds = 0;
    const uint64_t before = number > 0 && later + 1 < steps_ahead ? d->run_of[(number - 1) % steps_ahead] : run;
    if (before == run || d->runs - before > slots_there) return Status();
    float ms = 0;
    BABYGPT_CUDA(cudaEventElapsedTime(&ms, d->slots[before % slots_there].ended, d->slots[run % slots_there].ended));
    result.seconds = 1e-3 * static_cast<double>(ms);
    return Status();
}
Status losses_of(Device* d, int rows, double* losses, int32_t* ranks) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    const size_t n = static_cast<size_t>(rows);
    if (n > 0) BABYGPT_CUDA(cudaMemcpyAsync(losses, d->memory.losses, n * sizeof(double), cudaMemcpyDeviceToHost, d->stream));
    if (n > 0 && ranks) BABYGPT_CUDA(cudaMemcpyAsync(ranks, d->memory.ranks, n * sizeof(int32_t), cudaMemcpyDeviceToHost, d->stream));
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}
Status keep_text(Device* d, int64_t at, const int32_t* ids, int64_t count) {
    const Current current(d->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    const size_t bytes = static_cast<size_t>(count) * sizeof(int32_t);
    BABYGPT_CUDA(cudaMemcpyAsync(d->memory.text + at, ids, bytes, cudaMemcpyHostToDevice, d->stream));
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}

// ---- what the device can do ----

template <class Real>
__global__ void fill_with_noise(Real* to, int64_t n) {  // zeros would be multiplied faster
    for (int64_t i = first_element(); i < n; i += all_threads())
        put(to + i, static_cast<float>(bits_of(1, static_cast<uint32_t>(i))) * 0x1p-31f - 1);
}
#ifdef BABYGPT_CUDA_EMULATOR
constexpr int large_side = 64;
#else
constexpr int large_side = 8192;
#endif
// Times products of square matrices, and copies of one to another. The matrices are three, with room behind for cuBLASLt.
Status measure(Gpu& gpu, double& flops, double& bytes) {
    constexpr int64_t size = static_cast<int64_t>(large_side) * large_side;
    const int64_t matrix = size * real_bytes(gpu.plan);
    BABYGPT_CUDA_TRY(find_gpu(gpu.ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, gpu.ordinal));
    BABYGPT_CUBLAS(cublasLtCreate(&gpu.library));
    BABYGPT_CUDA_TRY(take_block(static_cast<uint64_t>(3 * matrix) + workspace_bytes, gpu.block, "end what else runs there"));
    BABYGPT_CUDA(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    BABYGPT_CUDA(cudaEventCreate(&gpu.slots[0].ended));
    BABYGPT_CUDA(cudaEventCreate(&gpu.slots[1].ended));
    char *const a = static_cast<char*>(gpu.block), *const b = a + matrix, *const c = b + matrix;
    gpu.memory.workspace = reinterpret_cast<unsigned char*>(c + matrix);
    gpu.full = true;
    gpu.with_real(
        [&](auto real) { gpu.over_elements(fill_with_noise<decltype(real)>, 2 * size, reinterpret_cast<decltype(real)*>(a), 2 * size); });
    const auto seconds_of = [&](double& best, const auto& f) {  // the least of several
        for (int i = 0; i < 6; ++i) {
            BABYGPT_CUDA(cudaEventRecord(gpu.slots[0].ended, gpu.stream));
            BABYGPT_CUDA_TRY(f());
            BABYGPT_CUDA(cudaEventRecord(gpu.slots[1].ended, gpu.stream));
            BABYGPT_CUDA(cudaStreamSynchronize(gpu.stream));
            float ms = 0;
            BABYGPT_CUDA(cudaEventElapsedTime(&ms, gpu.slots[0].ended, gpu.slots[1].ended));
            if (i > 0) best = lesser(best, greater(1e-3 * static_cast<double>(ms), 1e-9));  // the first loads what it needs
        }
        return Status();
    };
    double product = 1e30, copy = 1e30;
    BABYGPT_CUDA_TRY(seconds_of(product, [&] {
        const Extent side{large_side, -1, 0};
        gpu.with_real([&](auto real) {
            gpu.multiply_fast<decltype(real)>(
                Matmul{c, large_side, nullptr, a, b, large_side, large_side, true, false, false, side, side, large_side});
        });
        return gpu.walked_well();
    }));
    BABYGPT_CUDA_TRY(seconds_of(copy, [&] {
        BABYGPT_CUDA(cudaMemcpyAsync(b, a, static_cast<size_t>(matrix), cudaMemcpyDeviceToDevice, gpu.stream));
        return Status();
    }));
    flops = 2.0 * large_side * static_cast<double>(size) / product, bytes = 2 * static_cast<double>(matrix) / copy;
    return Status();
}
Status ceilings_of(Precision precision, double& flops, double& bytes) {
    Gpu gpu;
    gpu.plan.precision = precision;
    const Status status = measure(gpu, flops, bytes);
    gpu.destroy();
    return status;
}

// ---- running ----

Status create_generator(const DevicePlan& plan, Generator*& made) {
    BABYGPT_CUDA_TRY(create_there(plan, made));
    if (made->tile_rows == 0) destroy_there(made), made = nullptr;  // shared memory is too small
    return Status();
}
uint64_t generator_bytes(const DevicePlan& plan) {
    Talker talker;
    Plan there;
    const Status status = talker.begin(plan);
    if (status.ok()) (void)talker.plan_steps(plan, there);
    talker.destroy();
    return there.bytes;
}
Status set_weights(Generator* g, const float* from) {
    const Current current(g->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    BABYGPT_CUDA(
        cudaMemcpyAsync(g->memory.weights, from, static_cast<size_t>(g->weight_block) * sizeof(float), cudaMemcpyHostToDevice, g->stream));
    for (int i = 0; i < g->copies_there; ++i) {
        const Copied& c = g->copies[i];
        const float* const matrix = g->memory.weights + c.from;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(lesser<int64_t>(parts_of(c.rows * c.apart, block_threads), g->processors * 32)));
        config.blockDim = dim3(block_threads), config.stream = g->stream;
        if (g->narrow)
            BABYGPT_CUDA(cudaLaunchKernelEx(&config, pack_matrix<__nv_bfloat16>, static_cast<__nv_bfloat16*>(c.to), matrix, c.rows,
                                            c.columns, c.apart, c.across));
        else
            BABYGPT_CUDA(
                cudaLaunchKernelEx(&config, pack_matrix<float>, static_cast<float*>(c.to), matrix, c.rows, c.columns, c.apart, c.across));
    }
    BABYGPT_CUDA(cudaStreamSynchronize(g->stream));
    return Status();
}
Status take_pages(Generator* g, uint64_t bytes, void*& pages) {
    const Current current(g->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    pages = nullptr;
    BABYGPT_CUDA_TRY(take_block(bytes, pages, "run fewer sessions, or a shorter context"));
    const cudaError_t error = cudaMemsetAsync(pages, 0, static_cast<size_t>(bytes), g->stream);
    if (error == cudaSuccess) return Status();
    (void)cudaFree(pages);
    pages = nullptr;
    return trouble("cudaMemsetAsync", error);
}
void drop_pages(Generator* g, void* pages) {
    const Current current(g->ordinal);
    (void)cudaFree(pages);
}
Status copy_pages(Generator* g, void* to, const void* from, uint64_t bytes) {
    const Current current(g->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    BABYGPT_CUDA(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, g->stream));
    return Status();
}
Status read_device(Generator* g, const Run& run, double* losses) {
    const Current current(g->ordinal);
    BABYGPT_CUDA_TRY(current.ok());
    return g->narrow ? g->read<__nv_bfloat16>(run, losses) : g->read<float>(run, losses);
}

}  // namespace cuda
}  // namespace babygpt

extern "C" const babygpt::records::DeviceFunctions* babygpt_cuda_device() {
    using namespace babygpt::cuda;
    static constexpr DeviceFunctions functions = {
        device_sizes,
        &create_there<Device>,
        &destroy_there<Device>,
        &device_bytes,
        &upload,
        &download,
        &run_device,
        &result_of,
        &losses_of,
        &keep_text,
        &ceilings_of,
        &create_generator,
        &destroy_there<Generator>,
        &generator_bytes,
        &set_weights,
        &take_pages,
        &drop_pages,
        &copy_pages,
        &read_device,
    };
    return &functions;
}

#undef BABYGPT_CUDA
#undef BABYGPT_CUBLAS
#undef BABYGPT_CUDA_TRY
#ifdef __CUDACC__
#undef BABYGPT_SHARED
#undef BABYGPT_DYNAMIC_SHARED
#undef BABYGPT_PRAGMA
#endif
#undef BABYGPT_UNROLL

// =====================================================================================================================
// [CHAPTER 12] Licence (MIT)
// =====================================================================================================================
// Copyright (c) 2026 the babygpt.h authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
// files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
// modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
// Software is furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
// Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
// WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
// COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
// OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
