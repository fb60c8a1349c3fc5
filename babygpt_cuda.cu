// babygpt_cuda.cu - training and evaluation with babygpt.h on an NVIDIA GPU: one file beside the header. MIT licence (chapter 12).
//
// [CHAPTER 0] Read me
//
// What it is.  The same tape (babygpt.h, chapters 4 to 6) on a device: every op forward and backward, the loss, the gradient's norm, clipping,
// AdamW. Weights, gradients, moments and activations lie there; the host sends the ids of a batch and gets a loss. The checkpoint is the
// same, and so is the result but for rounding: a run may begin on the processor, go on here, and end there.
//
// Do this.  Compile this file with nvcc and add it to the program; there is nothing to register, and nothing else changes:
//
//     nvcc -O3 -arch=native -c babygpt_cuda.cu                  (-arch=all-major: for other people's machines, too)
//     g++ -std=c++17 -O2 -pthread program.cpp babygpt_cuda.o -L/usr/local/cuda/lib64 -lcudart -lcublasLt -o program
//
// Then set Runtime::backend = Backend::cuda, and Runtime::precision = Precision::bf16 for speed. Without this file the library says that the program was built without CUDA.
//
// What there is.                                              What there is not.
//     all architectures, all ops, dropout, LoRA                   generation: sessions compute on the processor
//     float32, and tf32 or bf16 in products by cuBLASLt           fp16, for GPUs before 2020
//     the same random numbers as on the processor                 Muon: refused by name
//     the same bits from run to run: no atomics                   more than one GPU in a Trainer
//     one graph launch a step; memory taken once                  Windows: nothing known against it, never tried
//
// What it promises.  As the header: nothing throws, prints or exits; every error of CUDA becomes a Status that names the call and the reason.
// The device is the calling thread's current one when the object is made; it is never reset, and the thread's current device stays.
// Memory is known before (Memory::device) and taken in one piece; where there is not enough of it, that is an ordinary error.
//
// How to read it.  The chapters are the header's; the formulas, too, which are only named again here. Search for "[CHAPTER n]":
//
//     2  the platform corner: errors, launches        6  walking the tape
//     4  memory: one block, planned                   7  learning: norm, clipping, AdamW
//     5  the ops: kernels, each with its layout      11  what the header calls; 12  licence

#ifdef __CUDACC__
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define BABYGPT_SHARED(T, name, count) __shared__ T name[count]
#define BABYGPT_DYNAMIC_SHARED(name)                                   \
    extern __shared__ __align__(128) unsigned char shared_of_launch[]; \
    unsigned char* const name = shared_of_launch
#elif !defined(BABYGPT_CUDA_EMULATOR)
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
constexpr int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// ---- inside a kernel -------------------------------------------------------------------------------------------------

// Two layouts serve most ops. Over elements: thread after thread, all over the grid. Over rows: a warp has a row, its lanes every 32nd column,
// so that neighbours read neighbours.
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
    uint32_t drop_below;
    float drop_keep;
    uint64_t seed, step, first_row[3];
    double smoothing;
    AdamW adam;
    double count, clip;
};
// Where a row stands.
struct Where {
    int position, sequence;
};
struct Place {
    int row, length, position;
};
// What the device says after an update.
struct Sums {
    double loss, norm;
    float scale;
    int skipped;
};

// Everything on the device, in this order, in one block.
struct Memory {
    float *weights, *adapter, *gradients, *moment1, *moment2, *activations, *low, *scratch, *waves;
    unsigned char* decays;  // of each 16 learnt weights: do they decay?
    double *losses, *partial;
    int32_t* ranks;
    Sums* sums;
    uint32_t *keys[2], *counts;  // sorting: an id and its row, twice; how often each digit is in each block
    int32_t* sorted_rows[2];
    float* edges;  // embedding_backward's
    // Precision::bf16: a copy of the weights, and of the rows that a product multiplies now (x, dy). Where there are tensor cores: cuBLASLt's.
    __nv_bfloat16 *narrow_weights, *narrow[2];
    unsigned char* workspace;
    // Sent for each run, in one piece that the host has a copy of.
    Now* now;
    Place* places[2];
    Where* where[2];
    int32_t *ids[2], *targets;
    float *row_weights, *features;
};

constexpr int most_splits = 64;  // of a sum over rows
#ifdef BABYGPT_CUDA_EMULATOR
constexpr int64_t scratch_logits = 1 << 12;  // tests are small, and shall see several chunks
constexpr size_t workspace_bytes = 4096;
#else
constexpr size_t workspace_bytes = size_t(32) << 20;  // what NVIDIA recommends for Hopper
constexpr int64_t scratch_logits = 1 << 26;           // of the head, at once: so many rows that dW's own traffic does not count
#endif
constexpr int square_blocks_there = 512;
constexpr int sort_block = block_threads, digits = 256;
constexpr int edge_rows = 64;  // sorted rows that a block of embedding_backward sums

// A sum over so many rows is made of so many parts, which are added in order.
inline int splits_of(int64_t rows) { return static_cast<int>(greater<int64_t>(1, lesser<int64_t>(most_splits, rows / 128))); }
// The same of a product, whose tiles of `tile` by `tile` elements are blocks, too: no more parts than keep a large device busy.
constexpr int tile = 64;
inline int splits_of(int64_t rows, int64_t in, int64_t out) {
    constexpr int64_t busy = 512;
    return static_cast<int>(lesser<int64_t>(splits_of(rows), parts_of(busy, parts_of(in, tile) * parts_of(out, tile))));
}
inline bool on_tensor_cores(const DevicePlan& plan) { return plan.precision != Precision::f32; }
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
// What is sent for each run.
inline void plan_input(Plan& plan, const DevicePlan& p, Memory& m) {
    m.now = plan.take<Now>(1);
    for (int side = 0; side < 2; ++side) {
        const int64_t rows = p.max_rows[side];
        m.places[side] = plan.take<Place>(rows > 0 ? p.sequences : 0);
        m.where[side] = plan.take<Where>(rows);
        m.ids[side] = plan.take<int32_t>(rows);
    }
    m.targets = plan.take<int32_t>(p.max_rows[0]);
    m.row_weights = plan.take<float>(p.max_rows[0]);
    m.features = plan.take<float>(static_cast<int64_t>(p.max_rows[0]) * p.features);
}
inline void plan_memory(Plan& plan, const DevicePlan& p, Memory& m) {
    const int64_t learnt = p.training ? learnt_block(p) : 0, rows = greater(p.max_rows[0], p.max_rows[1]);
    int64_t widest = 1, low = 0, parts = 0, narrow[2] = {};
    bool embeds = false;
    for (const Op& op : p.ops) {
        const int64_t side_rows = p.max_rows[static_cast<int>(op.side)];
        low = greater(low, side_rows * op.loras * p.rank);
        widest = greater<int64_t>(widest, greater(op.in, op.out));
        if (op.kind == OpKind::linear || op.kind == OpKind::head)
            parts = greater(parts, splits_of(side_rows, op.in, op.out) * static_cast<int64_t>(op.in) * op.out);
        if (op.w != nothing && (op.kind == OpKind::linear || op.kind == OpKind::head)) {
            const bool is_head = op.kind == OpKind::head;
            narrow[0] = greater(narrow[0], (is_head ? head_chunk(p, side_rows) : side_rows) * static_cast<int64_t>(op.in));
            if (p.training && !is_head) narrow[1] = greater(narrow[1], side_rows * op.out);
        }
        for (int i = 0; i < op.loras; ++i) parts = greater(parts, most_splits * static_cast<int64_t>(p.rank) * greater(op.in, op.out));
        embeds = embeds || (op.kind == OpKind::embedding && p.training && !p.frozen);
    }
    parts = p.training ? greater(parts, 2 * splits_of(rows) * widest) : 0;
    m.weights = plan.take<float>(p.weight_block, "weights");
    m.adapter = plan.take<float>(p.adapter_block, "adapter");
    m.gradients = plan.take<float>(learnt, "gradients");
    m.moment1 = plan.take<float>(learnt, "moment1");
    m.moment2 = plan.take<float>(learnt, "moment2");
    m.decays = plan.take<unsigned char>(learnt / 16, "decays");
    m.activations = plan.take<float>(p.activation_block, "activations");
    m.low = plan.take<float>(p.training ? 0 : low, "low");
    const int64_t head_rows = p.ops.size ? p.max_rows[static_cast<int>(p.ops[p.ops.size - 1].side)] : 0;
    m.scratch = plan.take<float>(greater<int64_t>(head_chunk(p, head_rows) * logits_stride(p), 1), "logits");
    m.edges = plan.take<float>(greater(parts, embeds ? 2 * parts_of(rows, edge_rows) * p.width : 0), "parts");
    const bool is_narrow = p.precision == Precision::bf16;
    m.narrow_weights = plan.take<__nv_bfloat16>(is_narrow ? p.weight_block : 0, "narrow_weights");
    for (int i = 0; i < 2; ++i) m.narrow[i] = plan.take<__nv_bfloat16>(is_narrow ? narrow[i] : 0, "narrow");
    m.workspace = plan.take<unsigned char>(on_tensor_cores(p) ? static_cast<int64_t>(workspace_bytes) : 0, "workspace");
    m.waves = plan.take<float>(static_cast<int64_t>(p.waves.size), "waves");
    m.losses = plan.take<double>(p.max_rows[0], "losses");
    m.ranks = plan.take<int32_t>(p.max_rows[0], "ranks");
    m.partial = plan.take<double>(square_blocks_there, "partial");
    m.sums = plan.take<Sums>(1, "sums");
    for (int i = 0; i < 2; ++i) {
        m.keys[i] = plan.take<uint32_t>(embeds ? rows : 0, "keys");
        m.sorted_rows[i] = plan.take<int32_t>(embeds ? rows : 0, "sorted_rows");
    }
    m.counts = plan.take<uint32_t>(embeds ? digits * parts_of(rows, sort_block) : 0, "counts");
    Plan sent;
    plan_input(sent, p, m);
    sent = Plan{plan.take<char>(static_cast<int64_t>(sent.bytes), "what is sent"), 0};
    plan_input(sent, p, m);
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

// ---- embedding: y = token[id] + position[p]. Over rows. 12 bytes -----------------------------------------------------------

__global__ void embedding_forward(float* y, const float* token, const float* position, const int32_t* ids, const Where* where,
                                  const Now* now, int side, int n) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float* t = token + static_cast<int64_t>(ids[row]) * n;
        const float* p = position ? position + static_cast<int64_t>(where[row].position) * n : nullptr;
        for (int c = lane(); c < n; c += warp) y[static_cast<int64_t>(row) * n + c] = t[c] + (p ? p[c] : 0.0f);
    }
}

// dtoken[id] += the sum of dy over the rows with this id. The rows are sorted by id first, by digits of 8 bits, the lowest first, each pass in three
// kernels; equal ids keep their order, so that the sums have one, too.
//   sort_count: a block has 256 rows, thread d counts digit d among them.   sort_places: one block; the sums of all counts before each.
//   sort_move: a thread has a row; its place is the count's, and the number of equal digits before it in the block.
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
__global__ void sort_places(uint32_t* counts, int64_t n) {
    BABYGPT_SHARED(uint32_t, sum, block_threads);
    const int64_t each = (n + blockDim.x - 1) / blockDim.x, from = lesser<int64_t>(each * threadIdx.x, n),
                  to = lesser<int64_t>(from + each, n);
    uint32_t mine = 0;
    for (int64_t i = from; i < to; ++i) mine += counts[i];
    sum[threadIdx.x] = mine;
    __syncthreads();
    uint32_t before = 0;
    for (unsigned i = 0; i < threadIdx.x; ++i) before += sum[i];
    for (int64_t i = from; i < to; ++i) {
        const uint32_t count = counts[i];
        counts[i] = before, before += count;
    }
}
__global__ void sort_move(uint32_t* to_keys, int32_t* to_rows, const uint32_t* places, const uint32_t* keys, const int32_t* sorted,
                          const int32_t* ids, const Now* now, int side, int shift) {
    BABYGPT_SHARED(uint32_t, digit, sort_block);
    const int row = static_cast<int>(blockIdx.x) * sort_block + static_cast<int>(threadIdx.x), rows = now->rows[side];
    const uint32_t key = row >= rows ? 0 : keys ? keys[row] : static_cast<uint32_t>(ids[row]);
    const uint32_t mine = row < rows ? key >> shift & (digits - 1) : digits;
    digit[threadIdx.x] = mine;
    __syncthreads();
    if (row >= rows) return;
    uint32_t place = places[mine * gridDim.x + blockIdx.x];
    for (unsigned i = 0; i < threadIdx.x; ++i) place += digit[i] == mine;
    to_keys[place] = key, to_rows[place] = sorted ? sorted[row] : row;
}
// A warp has 64 sorted rows, its lanes 32 of the columns. Rows of one id that all lie within them are added to dtoken at once; those that go on
// from the 64 before, or into the 64 after, are left in `edges`: [blocks][2][n], in the first or second place. 8 bytes.
__global__ void embedding_backward(float* dtoken, float* edges, const float* dy, const uint32_t* keys, const int32_t* sorted,
                                   const Now* now, int side, int n) {
    const int rows = now->rows[side], across = (n + warp - 1) / warp;
    for (int number = first_row(); number / across * edge_rows < rows; number += all_warps()) {
        const int part = number / across, from = part * edge_rows, to = lesser(from + edge_rows, rows), c = number % across * warp + lane();
        float sum = 0;
        for (int i = from; i < to && c < n; ++i) {
            sum += dy[static_cast<int64_t>(sorted[i]) * n + c];
            if (i + 1 < to && keys[i + 1] == keys[i]) continue;
            const bool goes_on = i + 1 == to && to < rows && keys[to] == keys[i];
            const bool came = from > 0 && keys[from - 1] == keys[i] && keys[from] == keys[i];
            if (came || goes_on) edges[(2 * static_cast<int64_t>(part) + (came ? 0 : 1)) * n + c] = sum;
            else dtoken[static_cast<int64_t>(keys[i]) * n + c] += sum;
            sum = 0;
        }
    }
}
// Then the warp whose 64 rows such a sum begins in adds its parts.
__global__ void embedding_edges(float* dtoken, const float* edges, const uint32_t* keys, const Now* now, int side, int n) {
    const int rows = now->rows[side], across = (n + warp - 1) / warp;
    for (int number = first_row(); number / across * edge_rows < rows; number += all_warps()) {
        const int part = number / across, from = part * edge_rows, to = from + edge_rows, c = number % across * warp + lane();
        if (to >= rows || keys[to] != keys[to - 1]) continue;                                  // nothing goes on
        if (from > 0 && keys[from - 1] == keys[from] && keys[from] == keys[to - 1]) continue;  // it began before
        if (c >= n) continue;
        const uint32_t id = keys[to - 1];
        float sum = edges[(2 * static_cast<int64_t>(part) + 1) * n + c];
        for (int next = part + 1; next * edge_rows < rows && keys[next * edge_rows] == id; ++next)
            sum += edges[2 * static_cast<int64_t>(next) * n + c];
        dtoken[static_cast<int64_t>(id) * n + c] += sum;
    }
}
// dposition[p] += the sum of dy over the sequences that reach p. A warp has a position, its lanes 32 of the columns. 4 bytes.
__global__ void position_backward(float* dposition, const float* dy, const Place* places, const Now* now, int context, int n) {
    const int across = (n + warp - 1) / warp;
    for (int number = first_row(); number / across < context; number += all_warps()) {
        const int p = number / across, c = number % across * warp + lane();
        if (c >= n) continue;
        float sum = dposition[static_cast<int64_t>(p) * n + c];
        for (int i = 0; i < now->sequences; ++i) {
            const int at = p - places[i].position;
            if (at >= 0 && at < places[i].length) sum += dy[static_cast<int64_t>(places[i].row + at) * n + c];
        }
        dposition[static_cast<int64_t>(p) * n + c] = sum;
    }
}

// ---- input, waves, add, dropout: over rows, or over elements. 8, 8, 12 and 8 bytes ----------------------------------------------

__global__ void copy_rows(float* y, const float* x, const Now* now, int side, int n) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) y[i] = x[i];
}
// x = x sqrt(n) + waves[position]; backward: dx = dx sqrt(n).
__global__ void add_waves(float* x, const float* waves, const Where* where, const Now* now, int side, int n, bool backward) {
    const float factor = sqrtf(static_cast<float>(n));
    for (int row = first_row(); row < now->rows[side]; row += all_warps())
        for (int c = lane(); c < n; c += warp) {
            float& at = x[static_cast<int64_t>(row) * n + c];
            at = backward ? at * factor : fmaf(at, factor, waves[static_cast<int64_t>(where[row].position) * n + c]);
        }
}
__global__ void add_forward(float* y, const float* a, const float* b, const Now* now, int side, int n) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) y[i] = a[i] + b[i];
}
// da and db (each may be null) are dy, or grow by it.
__global__ void add_backward(float* da, float* db, const float* dy, const Now* now, int side, int n, bool adds_a, bool adds_b) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) {
        const float d = dy[i];
        if (da) da[i] = adds_a ? da[i] + d : d;
        if (db) db[i] = adds_b ? db[i] + d : d;
    }
}
__device__ __forceinline__ uint64_t drop_key(const Now* now, int side, int op, int row) {
    return mixed(mixed(mixed(mixed(now->seed) ^ now->step) ^ static_cast<uint64_t>(op)) ^
                 (now->first_row[side] + static_cast<uint64_t>(row)));
}
__device__ __forceinline__ float drop_factor(const Now* now, uint64_t key, int i) {
    return bits_of(key, static_cast<uint32_t>(i)) < now->drop_below ? 0.0f : now->drop_keep;
}
// Forward and backward alike: to = from * factor, or grows by it.
__global__ void dropout(float* to, const float* from, const Now* now, int side, int op, int n, bool adds) {
    const bool active = now->drop_below != 0;
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const uint64_t key = drop_key(now, side, op, row);
        for (int c = lane(); c < n; c += warp) {
            const int64_t i = static_cast<int64_t>(row) * n + c;
            const float d = active ? from[i] * drop_factor(now, key, c) : from[i];
            to[i] = adds ? to[i] + d : d;
        }
    }
}

// ---- norm: y = (x - mean) * scale * w + b. Over rows. 8 bytes forward, 12 backward (16 where it adds) ------------------------------

__global__ void norm_forward(float* y, float* statistics, const float* x, const float* w, const float* b, const Now* now, int side, int n,
                             float epsilon, bool centred) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float* from = x + static_cast<int64_t>(row) * n;
        float mean = 0, square = 0;
        for (int c = lane(); c < n && centred; c += warp) mean += from[c];
        mean = warp_sum(mean) / static_cast<float>(n);
        for (int c = lane(); c < n; c += warp) square = fmaf(from[c] - mean, from[c] - mean, square);
        const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(n) + epsilon);
        for (int c = lane(); c < n; c += warp) y[static_cast<int64_t>(row) * n + c] = fmaf((from[c] - mean) * scale, w[c], b ? b[c] : 0.0f);
        if (lane() == 0) statistics[2 * static_cast<int64_t>(row)] = mean, statistics[2 * static_cast<int64_t>(row) + 1] = scale;
    }
}
// With h = (x - mean) * scale and g = dy * w:  dx = scale * (g - mean(g) - h * mean(g * h)).
__global__ void norm_backward(float* dx, const float* dy, const float* x, const float* statistics, const float* w, const Now* now, int side,
                              int n, bool centred, bool adds) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const int64_t at = static_cast<int64_t>(row) * n;
        const float mean = statistics[2 * static_cast<int64_t>(row)], scale = statistics[2 * static_cast<int64_t>(row) + 1];
        float mean_g = 0, mean_gh = 0;
        for (int c = lane(); c < n; c += warp) {
            const float g = dy[at + c] * w[c];
            if (centred) mean_g += g;
            mean_gh = fmaf(g, (x[at + c] - mean) * scale, mean_gh);
        }
        mean_g = warp_sum(mean_g) / static_cast<float>(n), mean_gh = warp_sum(mean_gh) / static_cast<float>(n);
        for (int c = lane(); c < n; c += warp) {
            const float d = scale * fmaf(-(x[at + c] - mean) * scale, mean_gh, dy[at + c] * w[c] - mean_g);
            dx[at + c] = adds ? dx[at + c] + d : d;
        }
    }
}

// ---- sums over rows ----------------------------------------------------------------------------------------------------

// db = the sum of dy's rows, dw = the sum of dy * h (x null: not wanted). A block has 32 columns and a part of the rows, warp i of it every 8th
// row; parts: [splits][n] of db, then of dw. dy's rows are `stride` apart. 4 bytes, 8 with dw.
template <class T>
__global__ void sums_over_rows(float* parts, const T* dy, int64_t stride, const float* x, const float* statistics, Extent extent,
                               const Now* now, int n) {
    BABYGPT_SHARED(float, b, block_threads);
    BABYGPT_SHARED(float, w, block_threads);
    const int rows = extent.now(now), splits = static_cast<int>(gridDim.y), each = (rows + splits - 1) / splits;
    const int from = static_cast<int>(blockIdx.y) * each, to = lesser(from + each, rows);
    const int c = static_cast<int>(blockIdx.x) * warp + lane();
    float sum_b = 0, sum_w = 0;
    for (int row = from + static_cast<int>(threadIdx.x) / warp; row < to && c < n; row += block_warps) {
        const float d = static_cast<float>(dy[row * stride + c]);
        sum_b += d;
        if (x) sum_w = fmaf(d, (x[static_cast<int64_t>(row) * n + c] - statistics[2 * row]) * statistics[2 * row + 1], sum_w);
    }
    b[threadIdx.x] = sum_b, w[threadIdx.x] = sum_w;
    __syncthreads();
    if (threadIdx.x >= warp || c >= n) return;
    for (int i = 1; i < block_warps; ++i) sum_b += b[i * warp + lane()], sum_w += w[i * warp + lane()];
    parts[static_cast<int64_t>(blockIdx.y) * n + c] = sum_b;
    if (x) parts[(splits + static_cast<int64_t>(blockIdx.y)) * n + c] = sum_w;
}
// to += the parts, in order. Over elements. 4 bytes a part, and 8.
__global__ void add_parts(float* to, const float* parts, int splits, int64_t n) {
    for (int64_t i = first_element(); i < n; i += all_threads()) {
        float sum = parts[i];
        for (int s = 1; s < splits; ++s) sum += parts[s * n + i];
        to[i] += sum;
    }
}

// ---- activations and the gated one: over elements, over rows. 12 bytes, 16 and 24 -------------------------------------------------

__device__ __forceinline__ float activated(float x, Activation activation) {
    if (activation == Activation::gelu) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (activation == Activation::gelu_tanh) return x / (1 + expf(-x * fmaf(0.07135481627f, x * x, 1.59576912161f)));
    if (activation == Activation::silu) return x / (1 + expf(-x));
    if (activation == Activation::relu) return x > 0 ? x : 0;
    return x;
}
__device__ __forceinline__ float activated_slope(float x, Activation activation) {
    if (activation == Activation::gelu) return fmaf(x * 0.39894228f, expf(-0.5f * x * x), 0.5f * (1 + erff(x * 0.70710678f)));
    if (activation == Activation::gelu_tanh) {
        const float s = 1 / (1 + expf(-x * fmaf(0.07135481627f, x * x, 1.59576912161f)));
        return fmaf(x * s * (1 - s), fmaf(0.21406444882f, x * x, 1.59576912161f), s);
    }
    if (activation == Activation::silu) {
        const float s = 1 / (1 + expf(-x));
        return fmaf(x * s, 1 - s, s);
    }
    return activation != Activation::relu || x > 0 ? 1.0f : 0.0f;
}
__global__ void activate(float* y, const float* before, const Now* now, int side, int n, Activation activation) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) y[i] = activated(before[i], activation);
}
__global__ void activate_backward(float* dy, const float* before, const Now* now, int side, int n, Activation activation) {
    const int64_t all = static_cast<int64_t>(now->rows[side]) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) dy[i] *= activated_slope(before[i], activation);
}
// y = activation(g) u, g and u the halves of a row of x
__global__ void gate_forward(float* y, const float* x, const Now* now, int side, int n, Activation activation) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float *g = x + static_cast<int64_t>(row) * 2 * n, *u = g + n;
        for (int c = lane(); c < n; c += warp) y[static_cast<int64_t>(row) * n + c] = activated(g[c], activation) * u[c];
    }
}
__global__ void gate_backward(float* dx, const float* dy, const float* x, const Now* now, int side, int n, Activation activation,
                              bool adds) {
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float *g = x + static_cast<int64_t>(row) * 2 * n, *u = g + n;
        float *dg = dx + static_cast<int64_t>(row) * 2 * n, *du = dg + n;
        for (int c = lane(); c < n; c += warp) {
            const float d = dy[static_cast<int64_t>(row) * n + c];
            const float of_g = d * u[c] * activated_slope(g[c], activation), of_u = d * activated(g[c], activation);
            dg[c] = adds ? dg[c] + of_g : of_g;
            du[c] = adds ? du[c] + of_u : of_u;
        }
    }
}

// ---- products: C = A B ---------------------------------------------------------------------------------------------------

// As the header's Product: element (k, i) of A is at [k * stride + i], or, where it runs along its rows, at [i * stride + k]; the same of B.
// The chains start from `start` (C itself, a bias with stride 0, null: 0). Where there are splits, part s is the sum over a part of the depth, at
// c + s * rows * columns.
struct Product {
    float* c;
    int64_t c_stride;
    const float* start;
    int64_t start_stride;
    const float *a, *b;
    int64_t a_stride, b_stride;
    Extent rows, depth;
    int columns;
    float factor;   // of the sum
    float* before;  // where not null: as C, without the activation
    Activation activation;
};
// A block makes 64 x 64 elements of C from 16 of the depth at a time, which it brings to shared memory; a thread makes 4 x 4 of them.
// Bytes: 4 (rows depth columns / 64 * 2 + rows columns), mostly from the cache; bound by shared memory: 1 load for 2 multiply-adds.
constexpr int tile_depth = 16, tile_stride = tile + 4;
template <bool along>
__device__ __forceinline__ void load_tile(float* to, const float* from, int64_t stride, int first, int count, int k0, int k_end) {
    for (int e = static_cast<int>(threadIdx.x); e < tile * tile_depth; e += block_threads) {
        const int k = along ? e % tile_depth : e / tile, i = along ? e / tile_depth : e % tile;
        const bool inside = first + i < count && k0 + k < k_end;
        to[k * tile_stride + i] = inside ? from[along ? (first + i) * stride + k0 + k : (k0 + k) * stride + first + i] : 0.0f;
    }
}
template <bool a_along, bool b_along>
__global__ void __launch_bounds__(block_threads) product(Product p, const Now* now) {
    BABYGPT_SHARED(float, a, (tile_depth * tile_stride));
    BABYGPT_SHARED(float, b, (tile_depth * tile_stride));
    const int rows = p.rows.now(now), depth = p.depth.now(now), across = (p.columns + tile - 1) / tile;
    const int row0 = static_cast<int>(blockIdx.x) / across * tile, column0 = static_cast<int>(blockIdx.x) % across * tile;
    const int splits = static_cast<int>(gridDim.y), each = (depth + splits - 1) / splits;
    const int from = static_cast<int>(blockIdx.y) * each, to = lesser(from + each, depth);
    if (row0 >= rows) return;
    const int i0 = static_cast<int>(threadIdx.x) / 16 * 4, j0 = static_cast<int>(threadIdx.x) % 16 * 4;
    float sum[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const bool inside = row0 + i0 + i < rows && column0 + j0 + j < p.columns;
            sum[i][j] = p.start && inside ? p.start[(row0 + i0 + i) * p.start_stride + column0 + j0 + j] : 0.0f;
        }
    for (int k0 = from; k0 < to; k0 += tile_depth) {
        load_tile<a_along>(a, p.a, p.a_stride, row0, rows, k0, to);
        load_tile<b_along>(b, p.b, p.b_stride, column0, p.columns, k0, to);
        __syncthreads();
        for (int k = 0; k < tile_depth; ++k) {
            float left[4], right[4];
            for (int i = 0; i < 4; ++i) left[i] = a[k * tile_stride + i0 + i], right[i] = b[k * tile_stride + j0 + i];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
        }
        __syncthreads();
    }
    float* c = p.c + (splits > 1 ? static_cast<int64_t>(blockIdx.y) * rows * p.columns : 0);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            if (row0 + i0 + i >= rows || column0 + j0 + j >= p.columns) continue;
            const int64_t at = (row0 + i0 + i) * p.c_stride + column0 + j0 + j;
            const float value = sum[i][j] * p.factor;
            if (p.before) p.before[at] = value;
            c[at] = activated(value, p.activation);
        }
}

// ---- products on tensor cores --------------------------------------------------------------------------------------------

// They are cuBLASLt's, from numbers in bf16 or tf32 and with sums in float. The library multiplies as many rows as there might be: those that this
// run does not have must be zeros. What follows is beside them: over elements. 6, 0 and 8 bytes.
__global__ void narrow_rows(__nv_bfloat16* to, const float* from, Extent extent, const Now* now, int n) {
    const int64_t there = static_cast<int64_t>(extent.now(now)) * n, all = static_cast<int64_t>(extent.size) * n;
    for (int64_t i = first_element(); i < all; i += all_threads()) to[i] = __float2bfloat16_rn(i < there ? from[i] : 0.0f);
}
__global__ void clear_rest(float* x, Extent extent, const Now* now, int64_t n) {
    const int64_t there = static_cast<int64_t>(extent.now(now)) * n, all = static_cast<int64_t>(extent.size) * n;
    for (int64_t i = there + first_element(); i < all; i += all_threads()) x[i] = 0;
}
__global__ void add_bias(float* x, const float* bias, int64_t stride, Extent extent, const Now* now, int n) {
    for (int row = first_row(); row < extent.now(now); row += all_warps())
        for (int c = lane(); c < n; c += warp) x[row * stride + c] += bias[c];
}
// How the library multiplies one shape: found when it is first wanted, always its own first choice, so that a device makes the same bits each time.
struct Tensorial {
    Product of;  // its pointers say only whether there is something
    bool a_along, b_along, adds_bias;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulHeuristicResult_t choice;
    Tensorial* next;
    bool fits(const Product& p, bool along_a, bool along_b) const {
        return of.rows.size == p.rows.size && of.depth.size == p.depth.size && of.columns == p.columns && of.a_stride == p.a_stride &&
               of.b_stride == p.b_stride && of.c_stride == p.c_stride && (of.start == nullptr) == (p.start == nullptr) &&
               of.start_stride == p.start_stride && a_along == along_a && b_along == along_b;
    }
};

// ---- rope: turns pairs of a head's queries and keys. Over rows; sign -1: back. 8 bytes --------------------------------------------

__global__ void rope(float* x, const float* waves, const Where* where, const Now* now, int side, int heads, int kv_heads, int dim,
                     float sign) {
    const int half = dim / 2;
    for (int row = first_row(); row < now->rows[side]; row += all_warps()) {
        const float *cosine = waves + static_cast<int64_t>(where[row].position) * dim, *sine = cosine + half;
        for (int i = lane(); i < (heads + kv_heads) * half; i += warp) {
            const int k = i % half;
            float* at = x + static_cast<int64_t>(row) * (heads + 2 * kv_heads) * dim + i / half * dim + k;
            const float a = at[0], b = at[half], c = cosine[k], d = sign * sine[k];
            at[0] = fmaf(a, c, -(b * d));
            at[half] = fmaf(a, d, b * c);
        }
    }
}

// ---- attention -----------------------------------------------------------------------------------------------------------

// Tiles of T queries and T keys in shared memory, of any dim that fits there; nothing of size length x length is ever in device memory (Dao et al.
// 2022). Rows of a tile are dim + 1 apart, so that neighbouring lanes meet neighbouring banks. A head's probabilities are made from
// the maximum and the sum that the forward pass leaves for each query. Narrow: what is multiplied is rounded to bf16, and tensor cores do
// it, each warp a tile of 16 x 8 at a time; then T is 32, dim a multiple of 16, and rows are dim + 8 apart.
struct Attend {
    const float *q, *k, *v;  // of row 0
    float *y, *softmax;      // [rows][heads * dim]; [rows][heads][2]
    const float* dy;
    float *dq, *dk, *dv;
    int64_t q_stride, k_stride;
    const Place *places, *seen;  // of the queries' sequences, and of the keys'
    int heads, kv_heads, dim, side, op;
    int tiles;  // of the longest sequence
    float scale;
    bool causal, adds_q, adds_kv;
};
template <bool narrow>
constexpr int padding = narrow ? 8 : 1;
template <int T, bool narrow = false>
size_t attention_bytes(int dim, int tiles_of_rows, int tiles_of_scores) {
    constexpr int more = padding<narrow>;
    return sizeof(float) * static_cast<size_t>(tiles_of_rows * T * (dim + more) + tiles_of_scores * T * (T + more) + 3 * T);
}
// to[i] = from[i], for the `count` rows from `first` on; zeros beyond them.
template <int T, bool narrow>
__device__ __forceinline__ void load_rows(float* to, const float* from, int64_t stride, int count, int dim) {
    const int apart = dim + padding<narrow>;
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps)
        for (int d = lane(); d < dim; d += warp) to[i * apart + d] = i < count ? from[i * stride + d] : 0.0f;
}
// d += a b, on tiles of 16 x 16 and 16 x 8. In lane 4 g + t are: of a, rows g and g + 8, columns 2 t, 2 t + 1 and those 8 further; of b, rows 2 t,
// 2 t + 1 and those 8 further, column g; of d, rows g and g + 8, columns 2 t and 2 t + 1.
__device__ __forceinline__ void multiply_tiles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(BABYGPT_CUDA_EMULATOR)
    emulator::mma_m16n8k16(d, a, b, __nv_bfloat16());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    (void)d, (void)a, (void)b;  // Gpu::create has refused such a GPU
#endif
}
__device__ __forceinline__ uint32_t two(float low, float high) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16 | __bfloat16_as_ushort(__float2bfloat16_rn(low));
}
// s[i][j] = a[i] . b[j], and to[i] += sum over j of p[i][j] * v[j], or p[j][i] * v[j]: as below, on tensor cores.
__device__ __forceinline__ void tile_products_narrow(float* s, const float* a, const float* b, int dim) {
    const int apart = dim + 8, number = static_cast<int>(threadIdx.x) / warp, g = lane() / 4, t = lane() % 4 * 2;
    const float *left = a + (number / 4 * 16 + g) * apart + t, *right = b + (number % 4 * 8 + g) * apart + t;
    float sum[4] = {};
    for (int k = 0; k < dim; k += 16, left += 16, right += 16) {
        const float* const lower = left + 8 * apart;
        const uint32_t x[4] = {two(left[0], left[1]), two(lower[0], lower[1]), two(left[8], left[9]), two(lower[8], lower[9])};
        const uint32_t y[2] = {two(right[0], right[1]), two(right[8], right[9])};
        multiply_tiles(sum, x, y);
    }
    float* const to = s + (number / 4 * 16 + g) * 40 + number % 4 * 8 + t;
    to[0] = sum[0], to[1] = sum[1], to[8 * 40] = sum[2], to[8 * 40 + 1] = sum[3];
}
template <bool across>
__device__ __forceinline__ void tile_sums_narrow(float* to, const float* p, const float* v, int dim) {
    constexpr int next_row = across ? 1 : 40, next_k = across ? 40 : 1;  // in p
    const int apart = dim + 8, g = lane() / 4, t = lane() % 4 * 2;
    for (int number = static_cast<int>(threadIdx.x) / warp; number < dim / 4; number += block_warps) {
        const int row = number % 2 * 16 + g, column = number / 2 * 8;
        float* const c = to + row * apart + column + t;
        float sum[4] = {c[0], c[1], c[8 * apart], c[8 * apart + 1]};
        for (int k = 0; k < 32; k += 16) {
            const float *const left = p + row * next_row + (k + t) * next_k, *const lower = left + 8 * next_row;
            const float* const right = v + (k + t) * apart + column + g;
            const uint32_t x[4] = {two(left[0], left[next_k]), two(lower[0], lower[next_k]), two(left[8 * next_k], left[9 * next_k]),
                                   two(lower[8 * next_k], lower[9 * next_k])};
            const uint32_t y[2] = {two(right[0], right[apart]), two(right[8 * apart], right[9 * apart])};
            multiply_tiles(sum, x, y);
        }
        c[0] = sum[0], c[1] = sum[1], c[8 * apart] = sum[2], c[8 * apart + 1] = sum[3];
    }
}
// s[i][j] = a[i] . b[j]. Thread t has column t % T and every (256 / T)th row.
template <int T>
__device__ __forceinline__ void tile_products_wide(float* s, const float* a, const float* b, int dim) {
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
__device__ __forceinline__ void tile_sums_wide(float* to, const float* p, const float* v, int dim) {
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
template <int T, bool narrow>
__device__ __forceinline__ void tile_products(float* s, const float* a, const float* b, int dim) {
    if constexpr (narrow) tile_products_narrow(s, a, b, dim);
    else tile_products_wide<T>(s, a, b, dim);
}
template <int T, bool narrow, bool across>
__device__ __forceinline__ void tile_sums(float* to, const float* p, const float* v, int dim) {
    if constexpr (narrow) tile_sums_narrow<across>(to, p, v, dim);
    else tile_sums_wide<T, across>(to, p, v, dim);
}
// A block has T queries of a head, and goes through the keys that they see: maximum, sum and y so far are put right when a greater maximum comes
// (Milakov & Gimelshein 2018). 16 bytes for each element of y, and the keys and values again for each T queries, from the cache.
template <int T, bool narrow>
__global__ void __launch_bounds__(block_threads) attention_forward(Attend a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + padding<narrow>, apart_s = T + padding<narrow>, rows = T * apart;
    float *const q = reinterpret_cast<float*>(memory), *const k = q + rows, *const v = k + rows, *const y = v + rows, *const s = y + rows,
                 *const most = s + T * apart_s, *const total = most + T;
    const int number = static_cast<int>(blockIdx.x) / a.tiles / a.heads, head = static_cast<int>(blockIdx.x) / a.tiles % a.heads;
    if (number >= now->sequences) return;
    const int i0 = static_cast<int>(blockIdx.x) % a.tiles * T, queries = a.places[number].length - i0;
    if (queries <= 0) return;
    const int row = a.places[number].row + i0, key_row = a.seen[number].row, keys = a.seen[number].length;
    const int64_t kv_column = static_cast<int64_t>(head / (a.heads / a.kv_heads)) * dim;
    load_rows<T, narrow>(q, a.q + row * a.q_stride + static_cast<int64_t>(head) * dim, a.q_stride, queries, dim);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) y[i] = 0;
    for (int i = static_cast<int>(threadIdx.x); i < T; i += block_threads) most[i] = -INFINITY, total[i] = 0;
    for (int k0 = 0; k0 < keys && (!a.causal || k0 <= i0 + T - 1); k0 += T) {
        __syncthreads();
        load_rows<T, narrow>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        load_rows<T, narrow>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        __syncthreads();
        tile_products<T, narrow>(s, q, k, dim);
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
        tile_sums<T, narrow, false>(y, s, v, dim);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && i < queries; i += block_warps) {
        const float inverse = 1 / total[i];
        for (int d = lane(); d < dim; d += warp)
            a.y[static_cast<int64_t>(row + i) * a.heads * dim + static_cast<int64_t>(head) * dim + d] = y[i * apart + d] * inverse;
        float* to = a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2;
        if (lane() == 0) to[0] = most[i], to[1] = total[i];
    }
}
// p, with f the dropout's factors, to s (f p), and p (f dp - D) / sqrt(dim), which is ds, to dp. D = dy . y of each query.
template <int T, bool narrow>
__device__ __forceinline__ void score_gradients(const Attend& a, const Now* now, float* s, float* dp, const float* most,
                                                const float* inverse, const float* D, int row, int i0, int k0, int queries, int keys,
                                                int head) {
    constexpr int apart_s = T + padding<narrow>;
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
template <int T>
__device__ __forceinline__ void load_queries(const Attend& a, float* most, float* inverse, float* D, int row, int queries, int head) {
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T; i += block_warps) {
        float sum = 0;
        const int64_t at = (static_cast<int64_t>(row + i) * a.heads + head) * a.dim;
        for (int d = lane(); d < a.dim && i < queries; d += warp) sum = fmaf(a.dy[at + d], a.y[at + d], sum);
        sum = warp_sum(sum);
        const float* from = a.softmax + (static_cast<int64_t>(row + i) * a.heads + head) * 2;
        if (lane() == 0) most[i] = i < queries ? from[0] : 0.0f, inverse[i] = i < queries ? 1 / from[1] : 0.0f, D[i] = sum;
    }
}
// dq = sum over the keys of ds k. A block has T queries of a head.
template <int T, bool narrow>
__global__ void __launch_bounds__(block_threads) attention_backward_queries(Attend a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + padding<narrow>, apart_s = T + padding<narrow>, rows = T * apart;
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
    load_rows<T, narrow>(q, a.q + row * a.q_stride + column, a.q_stride, queries, dim);
    load_rows<T, narrow>(dy, a.dy + row * width + column, width, queries, dim);
    load_queries<T>(a, most, inverse, D, row, queries, head);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) dq[i] = 0;
    for (int k0 = 0; k0 < keys && (!a.causal || k0 <= i0 + T - 1); k0 += T) {
        __syncthreads();
        load_rows<T, narrow>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        load_rows<T, narrow>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
        __syncthreads();
        tile_products<T, narrow>(s, q, k, dim);
        tile_products<T, narrow>(dp, dy, v, dim);
        __syncthreads();
        score_gradients<T, narrow>(a, now, s, dp, most, inverse, D, row, i0, k0, queries, keys, head);
        __syncthreads();
        tile_sums<T, narrow, false>(dq, dp, k, dim);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && i < queries; i += block_warps)
        for (int d = lane(); d < dim; d += warp) {
            float& to = a.dq[(row + i) * a.q_stride + column + d];
            to = a.adds_q ? to + dq[i * apart + d] : dq[i * apart + d];
        }
}
// dk = sum over the queries of ds q, dv = sum of f p dy. A block has T keys of a kv head, and goes through the queries that see them, head after
// head of those that share it.
template <int T, bool narrow>
__global__ void __launch_bounds__(block_threads) attention_backward_keys(Attend a, const Now* now) {
    BABYGPT_DYNAMIC_SHARED(memory);
    const int dim = a.dim, apart = dim + padding<narrow>, apart_s = T + padding<narrow>, rows = T * apart;
    float *const k = reinterpret_cast<float*>(memory), *const v = k + rows, *const dk = v + rows, *const dv = dk + rows,
                 *const q = dv + rows, *const dy = q + rows, *const s = dy + rows, *const dp = s + T * apart_s,
                 *const most = dp + T * apart_s, *const inverse = most + T, *const D = inverse + T;
    const int number = static_cast<int>(blockIdx.x) / a.tiles / a.kv_heads, kv_head = static_cast<int>(blockIdx.x) / a.tiles % a.kv_heads;
    if (number >= now->sequences) return;
    const int k0 = static_cast<int>(blockIdx.x) % a.tiles * T, keys = a.seen[number].length;
    if (k0 >= keys) return;
    const int first = a.places[number].row, length = a.places[number].length, key_row = a.seen[number].row, group = a.heads / a.kv_heads;
    const int64_t kv_column = static_cast<int64_t>(kv_head) * dim, width = static_cast<int64_t>(a.heads) * dim;
    load_rows<T, narrow>(k, a.k + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
    load_rows<T, narrow>(v, a.v + (key_row + k0) * a.k_stride + kv_column, a.k_stride, keys - k0, dim);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += block_threads) dk[i] = dv[i] = 0;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int i0 = a.causal ? k0 : 0; i0 < length; i0 += T) {
            const int row = first + i0, queries = length - i0;
            const int64_t column = static_cast<int64_t>(head) * dim;
            __syncthreads();
            load_rows<T, narrow>(q, a.q + row * a.q_stride + column, a.q_stride, queries, dim);
            load_rows<T, narrow>(dy, a.dy + row * width + column, width, queries, dim);
            load_queries<T>(a, most, inverse, D, row, queries, head);
            __syncthreads();
            tile_products<T, narrow>(s, q, k, dim);
            tile_products<T, narrow>(dp, dy, v, dim);
            __syncthreads();
            score_gradients<T, narrow>(a, now, s, dp, most, inverse, D, row, i0, k0, queries, keys, head);
            __syncthreads();
            tile_sums<T, narrow, true>(dk, dp, q, dim);
            tile_sums<T, narrow, true>(dv, s, dy, dim);
        }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / warp; i < T && k0 + i < keys; i += block_warps)
        for (int d = lane(); d < dim; d += warp) {
            const int64_t at = (key_row + k0 + i) * a.k_stride + kv_column + d;
            a.dk[at] = a.adds_kv ? a.dk[at] + dk[i * apart + d] : dk[i * apart + d];
            a.dv[at] = a.adds_kv ? a.dv[at] + dv[i * apart + d] : dv[i * apart + d];
        }
}

// ---- pool: the first row of a sequence, or the mean of all. A warp has a sequence, or, backward, a row. 4 bytes; 8 --------------------

__global__ void pool_forward(float* y, const float* x, const Place* places, const Now* now, int n, bool first) {
    for (int i = first_row(); i < now->sequences; i += all_warps()) {
        const float* rows = x + static_cast<int64_t>(places[i].row) * n;
        for (int c = lane(); c < n; c += warp) {
            float total = rows[c];
            for (int row = 1; row < places[i].length && !first; ++row) total += rows[static_cast<int64_t>(row) * n + c];
            y[static_cast<int64_t>(i) * n + c] = first ? total : total / static_cast<float>(places[i].length);
        }
    }
}
__global__ void pool_backward(float* dx, const float* dy, const Place* places, const Where* where, const Now* now, int n, bool first,
                              bool adds) {
    for (int row = first_row(); row < now->rows[0]; row += all_warps()) {
        const Place of = places[where[row].sequence];
        for (int c = lane(); c < n; c += warp) {
            const float whole = dy[static_cast<int64_t>(where[row].sequence) * n + c];
            const float d = !first ? whole / static_cast<float>(of.length) : row == of.row ? whole : 0.0f;
            float& to = dx[static_cast<int64_t>(row) * n + c];
            to = adds ? to + d : d;
        }
    }
}

// ---- output head with softmax cross-entropy ------------------------------------------------------------------------------

// A warp has a row of logits, of a chunk of rows that begins at `first`: the loss, the target's rank, and, where it learns, the logits' gradients in
// their place: dl = softmax(l) - (1-e) [v is the target] - e/V, times the row's weight. Narrow gradients lie in the first half of their
// row. 4 bytes to read, three times (from the cache where the row is short), 4 to write, or 2.
__global__ void head_loss(float* logits, int64_t stride, bool narrow, double* losses, int32_t* ranks, const int32_t* targets,
                          const float* row_weights, Extent extent, const Now* now, int vocab, bool learns) {
    const int rows = extent.now(now);
    for (int i = first_row(); i < rows; i += all_warps()) {
        float* l = logits + i * stride;
        const int row = extent.first + i, target = targets[row];
        float biggest = -INFINITY, sum = 0, all = 0;
        for (int v = lane(); v < vocab; v += warp) biggest = fmaxf(biggest, l[v]);
        biggest = warp_most(biggest);
        const float wanted = target < 0 ? 0.0f : l[target];
        int rank = 0;
        for (int v = lane(); v < vocab; v += warp) {
            sum += expf(l[v] - biggest);
            all += l[v];
            rank += l[v] > wanted || (v < target && !(l[v] < wanted));
        }
        sum = warp_sum(sum), all = warp_sum(all), rank = warp_sum(rank);
        if (lane() == 0) {
            double loss = log(static_cast<double>(sum)) + static_cast<double>(biggest) - (1 - now->smoothing) * static_cast<double>(wanted);
            if (now->smoothing > 0) loss -= now->smoothing * static_cast<double>(all) / vocab;
            losses[row] = target < 0 ? 0 : loss, ranks[row] = target < 0 ? 0 : rank;
        }
        if (!learns) continue;
        const float inverse = 1 / sum, weight = target < 0 ? 0.0f : row_weights[row];
        const float each = static_cast<float>(now->smoothing / vocab), more = static_cast<float>(1 - now->smoothing);
        for (int first = 0; first < vocab; first += warp) {
            const int v = first + lane();
            const bool counts = v < vocab && weight != 0;
            const float d = counts ? (expf(l[v] - biggest) * inverse - each - (v == target ? more : 0.0f)) * weight : 0.0f;
            __syncwarp();  // all lanes have read what is written over now
            if (v >= vocab) continue;
            if (narrow) reinterpret_cast<__nv_bfloat16*>(l)[v] = __float2bfloat16_rn(d);
            else l[v] = d;
        }
    }
}

// Adds the run's losses up, times their weights: one block, each thread every 256th row, then a tree.
__device__ __forceinline__ double block_sum(double x, double* shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = block_threads / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + static_cast<unsigned>(half)];
        __syncthreads();
    }
    return shared[0];
}
__global__ void add_losses_up(Sums* sums, const double* losses, const int32_t* targets, const float* row_weights, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    double loss = 0;
    for (int i = static_cast<int>(threadIdx.x); i < now->targets; i += block_threads)
        if (targets[i] >= 0) loss += static_cast<double>(row_weights[i]) * losses[i];
    loss = block_sum(loss, shared);
    if (threadIdx.x == 0) sums->loss = now->fresh ? loss : sums->loss + loss;
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
// Then one block: the norm, whether all is finite, and what the gradients are multiplied by.
__global__ void judge(Sums* sums, const double* parts, int count, const Now* now) {
    BABYGPT_SHARED(double, shared, block_threads);
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += block_threads) sum += parts[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(sum) / now->count;
    sums->norm = norm;
    sums->skipped = !(fabs(norm) <= 1.7e308) || !(fabs(sums->loss) <= 1.7e308);
    sums->scale = static_cast<float>((now->clip > 0 && norm > now->clip ? now->clip / norm : 1) / now->count);
}
// The header's adamw; then the gradient becomes zero. Over elements. 32 bytes a weight, and 2 where it has a narrow copy.
__global__ void adamw(float* w, __nv_bfloat16* narrow, float* m, float* v, float* g, const unsigned char* decays, int64_t n,
                      const Sums* sums, const Now* now) {
    constexpr float tiny = 1e-30f;
    const AdamW a = now->adam;
    for (int64_t i = first_element(); i < n; i += all_threads()) {
        const float scaled = g[i] * sums->scale;
        g[i] = 0;
        if (sums->skipped) continue;
        float first = fmaf(a.beta1, m[i], a.one_minus_beta1 * scaled), second = fmaf(a.beta2, v[i], a.one_minus_beta2 * (scaled * scaled));
        if (first < tiny && first > -tiny) first = 0;
        if (second < tiny) second = 0;
        m[i] = first, v[i] = second;
        const float decay = decays[i / 16] ? a.decay : 0.0f;
        w[i] = fmaf(-a.step_size, first / fmaf(sqrtf(second), a.root_scale, a.epsilon), fmaf(-decay, w[i], w[i]));
        if (narrow) narrow[i] = __float2bfloat16_rn(w[i]);
    }
}

// ---- the device ----------------------------------------------------------------------------------------------------------

// All state. There are three walks of the tape: a forward pass alone, one with a backward pass, and one with an update after it. The first of each
// launches kernel after kernel, so that the driver loads what it loads only when it is called; the second is captured in a graph. From
// then on a step is a copy of the batch and one graph launch.
struct Gpu {
    DevicePlan plan;
    Memory memory{};
    Memory input{};  // the host's copy of what is sent
    void *block = nullptr, *input_block = nullptr;
    uint64_t bytes = 0, input_bytes = 0;
    Sums* sums = nullptr;  // the host's copy
    int ordinal = 0, processors = 1, shared_bytes = 0, tile_of_attention = 32;
    cudaStream_t stream = nullptr;
    cudaEvent_t sent = nullptr;
    cudaGraphExec_t graphs[3] = {};
    bool walked[3] = {};
    cudaEvent_t* marks = nullptr;  // where somebody asks for the times of ops: [2 * ops + 1], before the first and after each
    int marks_made = 0;
    bool fresh = true;                // no run since the last update
    bool sending = false;             // a copy of the input may be under way
    cudaError_t error = cudaSuccess;  // of the first launch that failed
    cublasStatus_t product_error = CUBLAS_STATUS_SUCCESS;
    cublasLtHandle_t library = nullptr;
    Tensorial* products = nullptr;  // those that have been wanted
    int64_t launches = 0;           // of kernels, in the graph that was captured last

    template <class... Wanted, class... Given>
    void launch(void (*kernel)(Wanted...), int64_t blocks, int splits, size_t shared, Given... given) {
        if (!walked_well().ok()) return;  // what comes after a failure would compute from what is not there
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(greater<int64_t>(blocks, 1)), static_cast<unsigned>(splits));
        config.blockDim = dim3(block_threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        ++launches;
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
    float* values(int tensor) const { return tensor == nothing ? nullptr : memory.activations + at(tensor).offset; }
    float* gradient(int tensor) const {
        return tensor == nothing || at(tensor).gradient < 0 ? nullptr : memory.activations + at(tensor).gradient;
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

    bool is_narrow() const { return plan.precision == Precision::bf16; }
    // A side of a product, as it shall be multiplied: n columns of the run's rows of an activation or a gradient (which: 0, 1), or a weight.
    const float* side_of(float* x, Extent rows, int n, int which) {
        const int64_t all = static_cast<int64_t>(rows.size) * n;
        if (is_narrow()) over_elements(narrow_rows, all, memory.narrow[which], x, rows, memory.now, n);
        else if (on_tensor_cores(plan)) over_elements(clear_rest, all, x, rows, memory.now, n);
        return is_narrow() ? reinterpret_cast<const float*>(memory.narrow[which]) : x;
    }
    const float* side_of_weight(int index) const {
        const int64_t offset = plan.weights[static_cast<size_t>(index)].weight.offset;
        return is_narrow() ? reinterpret_cast<const float*>(memory.narrow_weights + offset) : memory.weights + offset;
    }
    // On tensor cores, where these are wanted; there the sides are those above, and there is no activation.
    void multiply_fast(const Product& p, bool a_along, bool b_along) {
        if (!on_tensor_cores(plan)) return multiply(p, a_along, b_along);
        const bool adds = p.start == p.c;
        const Tensorial* const t = walked_well().ok() ? tensorial(p, a_along, b_along) : nullptr;
        if (!t) return;
        if (adds && p.rows.side >= 0) over_elements(clear_rest, p.rows.size * p.c_stride, p.c, p.rows, memory.now, p.c_stride);
        const float one = 1, beta = adds ? 1.0f : 0.0f;
        cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
        if (t->adds_bias) status = cublasLtMatmulDescSetAttribute(t->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.start, sizeof p.start);
        // The library's matrices stand in columns: their rows are our columns, its left side is our right one.
        if (status == CUBLAS_STATUS_SUCCESS)
            status = cublasLtMatmul(library, t->product, &one, p.b, t->b, p.a, t->a, &beta, p.c, t->c, p.c, t->c, &t->choice.algo,
                                    memory.workspace, workspace_bytes, stream);
        product_error = status;
        ++launches;
        if (p.start && !adds && !t->adds_bias) over_rows(add_bias, p.rows.size, p.c, p.start, p.c_stride, p.rows, memory.now, p.columns);
    }
    const Tensorial* tensorial(const Product& p, bool a_along, bool b_along);
    cublasStatus_t plan_product(Tensorial& t) const;

    void multiply(const Product& p, bool a_along, bool b_along, int splits = 1) {
        const int64_t tiles = parts_of(p.rows.size, tile) * parts_of(p.columns, tile);
        const auto kernel = a_along ? (b_along ? product<true, true> : product<true, false>) : product<false, false>;
        launch(kernel, tiles, splits, 0, p, memory.now);
    }
    // g [rows][columns] += a^T b, summed over the run's rows.
    void multiply_over_rows(float* g, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int rows, int columns,
                            Extent depth, bool fast) {
        if (on_tensor_cores(plan) && fast)
            return multiply_fast(
                Product{g, columns, g, columns, a, b, a_stride, b_stride, {rows, -1, 0}, depth, columns, 1, nullptr, Activation::none},
                false, false);
        const int splits = splits_of(depth.size, rows, columns);
        float* const c = splits > 1 ? memory.edges : g;
        multiply(Product{c,
                         columns,
                         splits > 1 ? nullptr : g,
                         columns,
                         a,
                         b,
                         a_stride,
                         b_stride,
                         {rows, -1, 0},
                         depth,
                         columns,
                         1,
                         nullptr,
                         Activation::none},
                 false, false, splits);
        const int64_t n = static_cast<int64_t>(rows) * columns;
        if (splits > 1) over_elements(add_parts, n, g, memory.edges, splits, n);
    }
    // db += the sum of dy's rows; dw += that of dy * h, where x and its norm's statistics are given.
    template <class T>
    void sum_over_rows(float* db, float* dw, const T* dy, int64_t stride, const float* x, const float* statistics, Extent rows, int n) {
        const int splits = splits_of(rows.size);
        launch(sums_over_rows<T>, parts_of(n, warp), splits, 0, memory.edges, dy, stride, dw ? x : nullptr, statistics, rows, memory.now,
               n);
        if (db) over_elements(add_parts, n, db, memory.edges, splits, n);
        if (dw) over_elements(add_parts, n, dw, memory.edges + static_cast<int64_t>(splits) * n, splits, n);
    }

    Status create(const DevicePlan& of);
    void destroy();
    void linear_forward(const Op& op);
    void linear_backward(const Op& op);
    void lora_backward(const Op& op);
    void embed_backward(const Op& op);
    void head(const Op& op, bool learns);
    void attention(const Op& op, int number, bool backward);
    template <int T, bool narrow = false>
    void attention_of(Attend a, int sequences, bool backward);
    void op_forward(int number, bool learns);
    void op_backward(int number);
    void walk(int which, bool marked);
    Status walked_well() const {
        if (product_error != CUBLAS_STATUS_SUCCESS) return trouble("cublasLtMatmul", product_error);
        return error == cudaSuccess ? Status() : trouble("cudaLaunchKernelEx", error);
    }
    Status walk_now(int which, double* seconds);
    Status make_marks();
    void mark(int number, bool marked) {
        const cudaError_t recorded = marked ? cudaEventRecord(marks[number], stream) : cudaSuccess;
        if (error == cudaSuccess) error = recorded;
    }
    Status capture(int which, cudaGraphExec_t& to);
    void write_input(const Run& run, const DeviceUpdate* update);
    float* part(DevicePart which) const;
    int64_t elements(DevicePart which) const {
        return which == DevicePart::weights ? plan.weight_block : which == DevicePart::adapter ? plan.adapter_block : learnt_block(plan);
    }
};

// =====================================================================================================================
// [CHAPTER 6] Walking the tape
// =====================================================================================================================

cublasStatus_t Gpu::plan_product(Tensorial& t) const {
    const Product& p = t.of;
    const cudaDataType_t type = is_narrow() ? CUDA_R_16BF : CUDA_R_32F;
    const int32_t across_b = t.b_along ? CUBLAS_OP_T : CUBLAS_OP_N, across_a = t.a_along ? CUBLAS_OP_N : CUBLAS_OP_T,
                  epilogue = t.adds_bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    const uint64_t rows = static_cast<uint64_t>(p.rows.size), columns = static_cast<uint64_t>(p.columns),
                   depth = static_cast<uint64_t>(p.depth.size);
    const uint32_t alignment = 16;
    const cudaDataType_t of_bias = CUDA_R_32F;
    const size_t space = workspace_bytes;
    cublasLtMatmulPreference_t wish = nullptr;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto then = [&](cublasStatus_t next) { status = status == CUBLAS_STATUS_SUCCESS ? next : status; };
    const auto set = [&](cublasLtMatmulDescAttributes_t which, const void* value, size_t size) {
        if (status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulDescSetAttribute(t.product, which, value, size);
    };
    const auto ask = [&](cublasLtMatmulPreferenceAttributes_t which, const void* value, size_t size) {
        if (status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulPreferenceSetAttribute(wish, which, value, size);
    };
    then(cublasLtMatmulDescCreate(&t.product, is_narrow() ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_FAST_TF32, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, &across_b, sizeof across_b);
    set(CUBLASLT_MATMUL_DESC_TRANSB, &across_a, sizeof across_a);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (t.adds_bias) {
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &of_bias, sizeof of_bias);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.start, sizeof p.start);
    }
    then(cublasLtMatrixLayoutCreate(&t.b, type, t.b_along ? depth : columns, t.b_along ? columns : depth, p.b_stride));
    then(cublasLtMatrixLayoutCreate(&t.a, type, t.a_along ? depth : rows, t.a_along ? rows : depth, p.a_stride));
    then(cublasLtMatrixLayoutCreate(&t.c, CUDA_R_32F, columns, rows, p.c_stride));
    then(cublasLtMatmulPreferenceCreate(&wish));
    ask(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &space, sizeof space);
    for (const auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        ask(which, &alignment, sizeof alignment);
    int found = 0;
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(library, t.product, t.b, t.a, t.c, t.c, wish, 1, &t.choice, &found);
    if (status == CUBLAS_STATUS_SUCCESS && found == 0) status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (wish) (void)cublasLtMatmulPreferenceDestroy(wish);
    return status;
}
void destroy_plan(Tensorial& t) {
    if (t.product) (void)cublasLtMatmulDescDestroy(t.product);
    for (cublasLtMatrixLayout_t layout : {t.a, t.b, t.c})
        if (layout) (void)cublasLtMatrixLayoutDestroy(layout);
    t.product = nullptr, t.a = t.b = t.c = nullptr;
}
// Null: there is an error. Where the library does not add a bias to such a product, a pass of its own does.
const Tensorial* Gpu::tensorial(const Product& p, bool a_along, bool b_along) {
    for (const Tensorial* t = products; t; t = t->next)
        if (t->fits(p, a_along, b_along)) return t;
    Tensorial* const t = new (std::nothrow) Tensorial();
    cublasStatus_t status = t ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
    if (t) {
        t->of = p, t->a_along = a_along, t->b_along = b_along, t->adds_bias = p.start && p.start != p.c;
        status = plan_product(*t);
        if (status != CUBLAS_STATUS_SUCCESS && t->adds_bias) {
            destroy_plan(*t);
            t->adds_bias = false;
            status = plan_product(*t);
        }
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        t->next = products, products = t;
        return t;
    }
    if (t) destroy_plan(*t);
    delete t;
    if (product_error == CUBLAS_STATUS_SUCCESS) product_error = status;
    return nullptr;
}

void Gpu::linear_forward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const Extent all{rows, side, 0};
    float *const y = values(op.y), *const aux = values(op.aux);
    // With LoRA the activation comes last, of what both have added up to; and after cuBLASLt, which knows one of them only.
    const bool late = op.loras > 0 || on_tensor_cores(plan);
    float* const before = late && aux ? aux : y;
    multiply_fast(Product{before,
                          op.out,
                          weight(op.b),
                          0,
                          side_of(values(op.x), all, op.in, 0),
                          side_of_weight(op.w),
                          op.in,
                          plan.output_rows ? op.in : op.out,
                          all,
                          {op.in, -1, 0},
                          op.out,
                          1,
                          late ? nullptr : aux,
                          late ? Activation::none : op.activation},
                  true, plan.output_rows);
    if (!late) return;
    // LoRA: h = (x A^T) scale, then y += h B^T
    for (int i = 0; i < op.loras; ++i) {
        const Lora& lora = plan.loras[static_cast<size_t>(op.lora + i)];
        const int64_t stride = static_cast<int64_t>(op.loras) * plan.rank;
        float *const h = (op.low == nothing ? memory.low : values(op.low)) + i * plan.rank, *const to = before + lora.first;
        multiply(Product{h,
                         stride,
                         nullptr,
                         0,
                         values(op.x),
                         memory.adapter + in_adapter(lora.a),
                         op.in,
                         op.in,
                         all,
                         {op.in, -1, 0},
                         plan.rank,
                         static_cast<float>(plan.lora_scale),
                         nullptr,
                         Activation::none},
                 true, true);
        multiply(Product{to,
                         op.out,
                         to,
                         op.out,
                         h,
                         memory.adapter + in_adapter(lora.b),
                         stride,
                         plan.rank,
                         all,
                         {plan.rank, -1, 0},
                         lora.outputs,
                         1,
                         nullptr,
                         Activation::none},
                 true, true);
    }
    if (before != y || op.activation != Activation::none)
        over_elements(activate, static_cast<int64_t>(rows) * op.out, y, before, memory.now, side, op.out, op.activation);
}
// dy becomes the gradient before the activation; db = sum over rows of dy, dW = x^T dy, dx = dy W^T.
void Gpu::linear_backward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const Extent all{rows, side, 0};
    float *const dy = gradient(op.y), *const dx = gradient(op.x), *const dw = weight_gradient(op.w), *const db = weight_gradient(op.b);
    float* const x = values(op.x);
    if (op.activation != Activation::none)
        over_elements(activate_backward, static_cast<int64_t>(rows) * op.out, dy, values(op.aux), memory.now, side, op.out, op.activation);
    if (db) sum_over_rows(db, nullptr, static_cast<const float*>(dy), op.out, nullptr, nullptr, all, op.out);
    const float* const right = dw || dx ? side_of(dy, all, op.out, 1) : nullptr;
    const float* const left = dw ? side_of(x, all, op.in, 0) : nullptr;
    if (dw && plan.output_rows) multiply_over_rows(dw, right, op.out, left, op.in, op.out, op.in, all, true);
    else if (dw) multiply_over_rows(dw, left, op.in, right, op.out, op.in, op.out, all, true);
    if (dx)
        multiply_fast(Product{dx,
                              op.in,
                              op.adds_to_dx ? dx : nullptr,
                              op.adds_to_dx ? op.in : 0,
                              right,
                              side_of_weight(op.w),
                              op.out,
                              plan.output_rows ? op.in : op.out,
                              all,
                              {op.out, -1, 0},
                              op.in,
                              1,
                              nullptr,
                              Activation::none},
                      true, !plan.output_rows);
    lora_backward(op);
}
// dB = dy^T h,  dh = (dy B) scale,  dA = dh^T x,  dx += dh A.
void Gpu::lora_backward(const Op& op) {
    const Extent all{max_rows(op), static_cast<int>(op.side), 0};
    const int rank = plan.rank;
    for (int i = 0; i < op.loras; ++i) {
        const Lora& lora = plan.loras[static_cast<size_t>(op.lora + i)];
        const int64_t stride = static_cast<int64_t>(op.loras) * rank, a = in_adapter(lora.a), b = in_adapter(lora.b);
        const float *h = values(op.low) + i * rank, *dy = gradient(op.y) + lora.first;
        float *const dh = gradient(op.low) + i * rank, *const dx = gradient(op.x);
        multiply_over_rows(memory.gradients + b, dy, op.out, h, stride, lora.outputs, rank, all, false);
        multiply(Product{dh,
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
                         static_cast<float>(plan.lora_scale),
                         nullptr,
                         Activation::none},
                 true, false);
        multiply_over_rows(memory.gradients + a, dh, stride, values(op.x), op.in, rank, op.in, all, false);
        if (dx)
            multiply(
                Product{
                    dx, op.in, dx, op.in, dh, memory.adapter + a, stride, op.in, all, {rank, -1, 0}, op.in, 1, nullptr, Activation::none},
                true, false);
    }
}
void Gpu::embed_backward(const Op& op) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), n = op.out;
    const int64_t parts = parts_of(rows, sort_block);
    const uint32_t* keys = nullptr;
    const int32_t *sorted = nullptr, *ids = memory.ids[side];
    int to = 0;
    for (int shift = 0; shift == 0 || (shift < 32 && (plan.vocab - 1) >> shift != 0); shift += 8, to = 1 - to) {
        launch(sort_count, parts, 1, 0, memory.counts, keys, ids, memory.now, side, shift);
        launch(sort_places, 1, 1, 0, memory.counts, digits * parts);
        launch(sort_move, parts, 1, 0, memory.keys[to], memory.sorted_rows[to], memory.counts, keys, sorted, ids, memory.now, side, shift);
        keys = memory.keys[to], sorted = memory.sorted_rows[to];
    }
    float *const dtoken = weight_gradient(op.w), *const dposition = weight_gradient(op.b);
    const int64_t across = parts_of(n, warp), warps = parts_of(rows, edge_rows) * across;
    over_rows(embedding_backward, warps, dtoken, memory.edges, gradient(op.y), keys, sorted, memory.now, side, n);
    over_rows(embedding_edges, warps, dtoken, memory.edges, keys, memory.now, side, n);
    if (dposition)
        over_rows(position_backward, plan.context * across, dposition, gradient(op.y), memory.places[side], memory.now, plan.context, n);
}
// Forward, and, where it learns, backward at once: chunk of rows after chunk, so that no more logits than these are ever there.
void Gpu::head(const Op& op, bool learns) {
    const int side = static_cast<int>(op.side), rows = max_rows(op), chunk = head_chunk(plan, rows);
    float *const logits = memory.scratch, *const dx = gradient(op.x), *const dw = weight_gradient(op.w), *const db = weight_gradient(op.b);
    learns = learns && runs_backward(op);
    const int64_t stride = logits_stride(plan), dl_stride = is_narrow() ? 2 * stride : stride;
    for (int first = 0; first < rows; first += chunk) {
        const Extent here{lesser(chunk, rows - first), side, first};
        const int64_t from = static_cast<int64_t>(first) * op.in;
        const float *const x = side_of(values(op.x) + from, here, op.in, 0), *const w = side_of_weight(op.w);
        multiply_fast(
            Product{logits, stride, weight(op.b), 0, x, w, op.in, op.in, here, {op.in, -1, 0}, op.out, 1, nullptr, Activation::none}, true,
            true);
        over_rows(head_loss, here.size, logits, stride, is_narrow(), memory.losses, memory.ranks, memory.targets, memory.row_weights, here,
                  memory.now, op.out, learns);
        if (!learns) continue;
        if (on_tensor_cores(plan)) over_elements(clear_rest, here.size * stride, logits, here, memory.now, stride);
        multiply_fast(Product{dx + from,
                              op.in,
                              op.adds_to_dx ? dx + from : nullptr,
                              op.adds_to_dx ? op.in : 0,
                              logits,
                              w,
                              dl_stride,
                              op.in,
                              here,
                              {op.out, -1, 0},
                              op.in,
                              1,
                              nullptr,
                              Activation::none},
                      true, false);
        if (dw) multiply_over_rows(dw, logits, dl_stride, x, op.in, op.out, op.in, here, true);
        if (db && is_narrow())
            sum_over_rows(db, nullptr, reinterpret_cast<const __nv_bfloat16*>(logits), dl_stride, nullptr, nullptr, here, op.out);
        else if (db) sum_over_rows(db, nullptr, static_cast<const float*>(logits), stride, nullptr, nullptr, here, op.out);
    }
    if (learns) launch(add_losses_up, 1, 1, 0, memory.sums, memory.losses, memory.targets, memory.row_weights, memory.now);
}
template <int T, bool narrow>
void Gpu::attention_of(Attend a, int sequences, bool backward) {
    a.tiles = static_cast<int>(parts_of(plan.context, T));
    const int64_t of_queries = static_cast<int64_t>(sequences) * a.heads * a.tiles,
                  of_keys = static_cast<int64_t>(sequences) * a.kv_heads * a.tiles;
    if (!backward) return launch(attention_forward<T, narrow>, of_queries, 1, attention_bytes<T, narrow>(a.dim, 4, 1), a, memory.now);
    launch(attention_backward_queries<T, narrow>, of_queries, 1, attention_bytes<T, narrow>(a.dim, 5, 2), a, memory.now);
    launch(attention_backward_keys<T, narrow>, of_keys, 1, attention_bytes<T, narrow>(a.dim, 6, 2), a, memory.now);
}
void Gpu::attention(const Op& op, int number, bool backward) {
    Attend a{};
    const bool other = op.sight == Sight::source;
    const int64_t width = static_cast<int64_t>(op.heads) * op.dim(), kv_width = static_cast<int64_t>(op.kv_heads) * op.dim();
    a.heads = op.heads, a.kv_heads = op.kv_heads, a.dim = op.dim(), a.side = static_cast<int>(op.side), a.op = number;
    a.scale = 1 / sqrtf(static_cast<float>(a.dim));
    a.causal = op.sight == Sight::causal;
    a.q_stride = op.in, a.k_stride = other ? 2 * kv_width : op.in;
    a.q = values(op.x), a.k = other ? values(op.x2) : a.q + width, a.v = a.k + kv_width;
    a.y = values(op.y), a.softmax = values(op.aux);
    a.places = memory.places[a.side], a.seen = memory.places[other ? static_cast<int>(Side::source) : a.side];
    if (backward) {
        a.dy = gradient(op.y), a.dq = gradient(op.x);
        a.dk = other ? gradient(op.x2) : a.dq + width, a.dv = a.dk + kv_width;
        a.adds_q = op.adds_to_dx, a.adds_kv = other ? op.adds_to_dx2 : op.adds_to_dx;
    }
    if (tile_of_attention == 32 && is_narrow() && a.dim % 16 == 0) return attention_of<32, true>(a, plan.sequences, backward);
    if (tile_of_attention == 32) return attention_of<32>(a, plan.sequences, backward);
    if (tile_of_attention == 16) return attention_of<16>(a, plan.sequences, backward);
    attention_of<8>(a, plan.sequences, backward);
}

void Gpu::op_forward(int number, bool learns) {
    const Op& op = plan.ops[static_cast<size_t>(number)];
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const int64_t size = static_cast<int64_t>(rows) * op.in;
    const Where* where = op.side == Side::whole ? nullptr : memory.where[side];
    const float *x = values(op.x), *w = weight(op.w), *b = weight(op.b);
    float *y = values(op.y), *aux = values(op.aux);
    switch (op.kind) {
        case OpKind::embedding:
            return over_rows(embedding_forward, rows, y, w, b, memory.ids[side], where, memory.now, side, op.out);
        case OpKind::input:
            return over_elements(copy_rows, static_cast<int64_t>(rows) * op.out, y, memory.features, memory.now, side, op.out);
        case OpKind::waves:
            return over_rows(add_waves, rows, y, memory.waves, where, memory.now, side, op.in, false);
        case OpKind::norm:
            return over_rows(norm_forward, rows, y, aux, x, w, b, memory.now, side, op.in, static_cast<float>(plan.epsilon), op.centred);
        case OpKind::linear:
            return linear_forward(op);
        case OpKind::gate:
            return over_rows(gate_forward, rows, y, x, memory.now, side, op.out, op.activation);
        case OpKind::rope:
            return over_rows(rope, rows, y, memory.waves, where, memory.now, side, op.heads, op.kv_heads, op.dim(), 1.0f);
        case OpKind::attention:
            return attention(op, number, false);
        case OpKind::add:
            return over_elements(add_forward, size, y, x, values(op.x2), memory.now, side, op.in);
        case OpKind::dropout:
            return over_rows(dropout, rows, y, x, memory.now, side, number, op.in, false);
        case OpKind::pool:
            return over_rows(pool_forward, plan.sequences, y, x, memory.places[0], memory.now, op.in, op.first);
        case OpKind::head:
            return head(op, learns);
    }
}
void Gpu::op_backward(int number) {
    const Op& op = plan.ops[static_cast<size_t>(number)];
    if (!runs_backward(op)) return;
    const int side = static_cast<int>(op.side), rows = max_rows(op);
    const int64_t size = static_cast<int64_t>(rows) * op.in;
    if (op.remakes != nothing) {  // what the planner did not keep
        const Op& maker = plan.ops[static_cast<size_t>(op.remakes)];
        if (maker.kind != OpKind::linear) op_forward(op.remakes, false);
        else
            over_elements(activate, static_cast<int64_t>(rows) * maker.out, values(maker.y), values(maker.aux), memory.now, side, maker.out,
                          maker.activation);
    }
    const Where* where = op.side == Side::whole ? nullptr : memory.where[side];
    const float *x = values(op.x), *w = weight(op.w), *aux = values(op.aux);
    float *dx = gradient(op.x), *dy = gradient(op.y);
    switch (op.kind) {
        case OpKind::embedding:
            return embed_backward(op);
        case OpKind::input:
        case OpKind::head:  // has been there
            return;
        case OpKind::waves:
            return over_rows(add_waves, rows, dx, memory.waves, where, memory.now, side, op.in, true);
        case OpKind::norm:
            if (!plan.frozen)
                sum_over_rows(weight_gradient(op.b), weight_gradient(op.w), static_cast<const float*>(dy), op.in, x, aux, {rows, side, 0},
                              op.in);
            return over_rows(norm_backward, rows, dx, dy, x, aux, w, memory.now, side, op.in, op.centred, op.adds_to_dx);
        case OpKind::linear:
            return linear_backward(op);
        case OpKind::gate:
            return over_rows(gate_backward, rows, dx, dy, x, memory.now, side, op.out, op.activation, op.adds_to_dx);
        case OpKind::rope:
            return over_rows(rope, rows, dx, memory.waves, where, memory.now, side, op.heads, op.kv_heads, op.dim(), -1.0f);
        case OpKind::attention:
            return attention(op, number, true);
        case OpKind::add:
            return over_elements(add_backward, size, dx, gradient(op.x2), dy, memory.now, side, op.in, op.adds_to_dx, op.adds_to_dx2);
        case OpKind::dropout:
            return over_rows(dropout, rows, dx, dy, memory.now, side, number, op.in, op.adds_to_dx);
        case OpKind::pool:
            return over_rows(pool_backward, plan.max_rows[0], dx, dy, memory.places[0], memory.where[0], memory.now, op.in, op.first,
                             op.adds_to_dx);
    }
}
void Gpu::walk(int which, bool marked) {
    const int ops = static_cast<int>(plan.ops.size);
    const bool learns = which > 0;
    error = cudaSuccess, product_error = CUBLAS_STATUS_SUCCESS, launches = 0;
    mark(0, marked);
    for (int i = 0; i < ops; ++i) op_forward(i, learns), mark(i + 1, marked);
    for (int i = ops; i-- > 0 && learns;) op_backward(i), mark(2 * ops - i, marked);
    if (which < 2) return;
    const int64_t n = learnt_block(plan);
    const int parts = static_cast<int>(lesser<int64_t>(parts_of(n, block_threads), square_blocks_there));
    launch(square_parts, parts, 1, 0, memory.partial, memory.gradients, n);
    launch(judge, 1, 1, 0, memory.sums, memory.partial, parts, memory.now);
    over_elements(adamw, n, plan.frozen ? memory.adapter : memory.weights, plan.frozen || !is_narrow() ? nullptr : memory.narrow_weights,
                  memory.moment1, memory.moment2, memory.gradients, memory.decays, n, memory.sums, memory.now);
    const cudaError_t copied = cudaMemcpyAsync(sums, memory.sums, sizeof *sums, cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess) error = copied;
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
    }
    return nullptr;
}

Status Gpu::create(const DevicePlan& of) {
    plan = of;
    int count = 0;
    const cudaError_t found = cudaGetDeviceCount(&count);
    if (found == cudaErrorInsufficientDriver)
        return refuse(Error::unsupported,
                      "the NVIDIA driver is missing, or older than the CUDA that babygpt_cuda.cu was compiled with: update it, or choose "
                      "the backend cpu");
    if (found == cudaErrorNoDevice || (found == cudaSuccess && count == 0))
        return refuse(Error::unsupported, "there is no NVIDIA GPU in this machine: choose the backend cpu");
    BABYGPT_CUDA(found);
    BABYGPT_CUDA(cudaGetDevice(&ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal));
    BABYGPT_CUDA(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
    int generation = 0;
    BABYGPT_CUDA(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, ordinal));
    if (on_tensor_cores(plan) && generation < 8)
        return refuse(Error::unsupported, "this GPU multiplies neither tf32 nor bf16 (those from 2020 on do): choose the precision f32");
    int dim = 1;
    for (const Op& op : plan.ops)
        if (op.kind == OpKind::attention) dim = greater(dim, op.dim());
    const auto fits = [&](size_t wanted) { return wanted <= static_cast<size_t>(shared_bytes); };
    tile_of_attention = fits(is_narrow() ? attention_bytes<32, true>(dim, 6, 2) : attention_bytes<32>(dim, 6, 2)) ? 32
                        : fits(attention_bytes<16>(dim, 6, 2))                                                    ? 16
                                                                                                                  : 8;
    if (!fits(attention_bytes<8>(dim, 6, 2)))
        return refuse(Error::unsupported,
                      "attention's heads have too many columns for this GPU's shared memory: take more heads, or the backend cpu");
    void (*const kernels[])(Attend, const Now*) = {
        attention_forward<32, true>,  attention_backward_queries<32, true>,  attention_backward_keys<32, true>,
        attention_forward<32, false>, attention_backward_queries<32, false>, attention_backward_keys<32, false>,
        attention_forward<16, false>, attention_backward_queries<16, false>, attention_backward_keys<16, false>,
        attention_forward<8, false>,  attention_backward_queries<8, false>,  attention_backward_keys<8, false>};
    for (const auto kernel : kernels) BABYGPT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));

    if (on_tensor_cores(plan)) BABYGPT_CUBLAS(cublasLtCreate(&library));
    Plan there;
    plan_memory(there, plan, memory);
    bytes = there.bytes;
    const cudaError_t taken = cudaMalloc(&block, bytes);
    if (taken == cudaErrorMemoryAllocation) {
        size_t left = 0, all = 0;
        (void)cudaMemGetInfo(&left, &all);
        Status status;
        status.error = Error::out_of_memory;
        snprintf(status.message, sizeof status.message,
                 "out of memory: %llu bytes of the GPU's were asked for, %llu of %llu are free: take a smaller batch",
                 static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(left), static_cast<unsigned long long>(all));
        (void)cudaGetLastError();  // it has been said
        return status;
    }
    BABYGPT_CUDA(taken);
    there = Plan{static_cast<char*>(block), 0};
    plan_memory(there, plan, memory);
    Plan here;
    plan_input(here, plan, input);
    input_bytes = here.bytes;
    BABYGPT_CUDA(cudaMallocHost(&input_block, input_bytes + sizeof(Sums)));
    here = Plan{static_cast<char*>(input_block), 0};
    memset(input_block, 0, input_bytes + sizeof(Sums));
    plan_input(here, plan, input);
    sums = reinterpret_cast<Sums*>(static_cast<char*>(input_block) + input_bytes);
    BABYGPT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    BABYGPT_CUDA(cudaEventCreateWithFlags(&sent, cudaEventDisableTiming));
    if (plan.waves.size > 0)
        BABYGPT_CUDA(cudaMemcpyAsync(memory.waves, plan.waves.data, plan.waves.size * sizeof(float), cudaMemcpyHostToDevice, stream));
    if (plan.training) {
        const int64_t learnt = learnt_block(plan);
        unsigned char* const decays = static_cast<unsigned char*>(malloc(static_cast<size_t>(learnt / 16) + 1));
        if (!decays) return refuse(Error::out_of_memory, "out of memory");
        memset(decays, 0, static_cast<size_t>(learnt / 16) + 1);
        for (const WeightPlan& w : plan.frozen ? plan.adapter : plan.weights)
            for (int64_t i = 0; i < w.weight.rows * w.weight.cols; i += 16) decays[(w.weight.offset + i) / 16] = w.weight.decay;
        cudaError_t done = cudaMemcpyAsync(memory.decays, decays, static_cast<size_t>(learnt / 16), cudaMemcpyHostToDevice, stream);
        if (done == cudaSuccess) done = cudaStreamSynchronize(stream);
        free(decays);
        BABYGPT_CUDA(done);
        for (float* zero : {memory.gradients, memory.moment1, memory.moment2})
            BABYGPT_CUDA(cudaMemsetAsync(zero, 0, static_cast<size_t>(learnt) * sizeof(float), stream));
        BABYGPT_CUDA(cudaMemsetAsync(memory.sums, 0, sizeof(Sums), stream));
    }
    BABYGPT_CUDA(cudaStreamSynchronize(stream));
    return Status();
}
void Gpu::destroy() {
    if (stream) (void)cudaStreamSynchronize(stream);
    for (cudaGraphExec_t graph : graphs)
        if (graph) (void)cudaGraphExecDestroy(graph);
    for (Tensorial* t = products; t; t = products) {
        products = t->next;
        destroy_plan(*t);
        delete t;
    }
    if (library) (void)cublasLtDestroy(library);
    if (sent) (void)cudaEventDestroy(sent);
    for (int i = 0; i < marks_made; ++i) (void)cudaEventDestroy(marks[i]);
    free(marks);
    if (stream) (void)cudaStreamDestroy(stream);
    if (input_block) (void)cudaFreeHost(input_block);
    if (block) (void)cudaFree(block);
}

// The run's numbers and arrays, where the next copy takes them from.
void Gpu::write_input(const Run& run, const DeviceUpdate* update) {
    Now& now = *input.now;
    const int source = static_cast<int>(run.source.rows), ops = static_cast<int>(plan.ops.size);
    now.rows[0] = run.rows, now.rows[1] = source, now.rows[2] = static_cast<int>(run.sequences.size);
    now.sequences = now.rows[2];
    now.targets = now.rows[static_cast<int>(plan.ops[static_cast<size_t>(ops - 1)].side)];
    now.fresh = fresh;
    now.drop_below = run.training ? static_cast<uint32_t>(run.dropout * 4294967296.0) : 0;
    now.drop_keep = static_cast<float>(1 / (1 - run.dropout));
    now.seed = run.seed, now.step = run.step, now.smoothing = run.label_smoothing;
    for (int side = 0; side < 3; ++side) now.first_row[side] = run.first_row[side];
    if (update) now.adam = update->rule.adam, now.count = update->count, now.clip = update->clip;
    for (int side = 0; side < 2; ++side) {
        const Stream in = side == 0 ? run.on(Side::text) : run.source;
        for (size_t i = 0; i < in.sequences.size && in.rows > 0; ++i) {
            const Sequence& s = in.sequences[i];
            input.places[side][i] = Place{s.row, s.length, s.position};
            for (int j = 0; j < s.length; ++j) input.where[side][s.row + j] = Where{s.position + j, static_cast<int>(i)};
        }
        if (in.rows > 0) memcpy(input.ids[side], in.ids, static_cast<size_t>(in.rows) * sizeof(int32_t));
    }
    for (int i = 0; i < now.targets; ++i) {
        input.targets[i] = run.targets ? run.targets[i] : -1;
        input.row_weights[i] = run.row_weights ? run.row_weights[i] : 1.0f;
    }
    if (plan.features > 0)
        memcpy(input.features, run.features, static_cast<size_t>(run.rows) * static_cast<size_t>(plan.features) * sizeof(float));
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
    BABYGPT_CUDA(made);
    return Status();
}

}  // namespace cuda

struct records::Device : cuda::Gpu {};

namespace cuda {

void destroy_device(Device* device) {
    {
        const Current current(device->ordinal);
        device->destroy();
    }
    delete device;
}
Status create_device(const DevicePlan& plan, Device*& made) {
    made = nullptr;
    Device* const device = new (std::nothrow) Device;
    if (!device) return refuse(Error::out_of_memory, "out of memory");
    const Status status = device->create(plan);
    if (status.ok()) made = device;
    else destroy_device(device);
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
    BABYGPT_CUDA(current.error);
    const size_t bytes = static_cast<size_t>(d->elements(which)) * sizeof(float);
    if (which == DevicePart::gradients) d->fresh = true;
    if (bytes == 0) return Status();
    if (from) BABYGPT_CUDA(cudaMemcpyAsync(d->part(which), from, bytes, cudaMemcpyHostToDevice, d->stream));
    else BABYGPT_CUDA(cudaMemsetAsync(d->part(which), 0, bytes, d->stream));
    if (which == DevicePart::weights && d->is_narrow()) {
        const int rows = static_cast<int>(d->plan.weight_block / 16);  // the block is made of sixteens
        d->error = cudaSuccess, d->product_error = CUBLAS_STATUS_SUCCESS;
        d->over_elements(narrow_rows, d->plan.weight_block, d->memory.narrow_weights, d->memory.weights, Extent{rows, -1, 0}, d->memory.now,
                         16);
        if (d->error != cudaSuccess) return trouble("cudaLaunchKernelEx", d->error);
    }
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}
Status download(Device* d, DevicePart which, float* to) {
    const Current current(d->ordinal);
    BABYGPT_CUDA(current.error);
    const size_t bytes = static_cast<size_t>(d->elements(which)) * sizeof(float);
    if (bytes > 0) BABYGPT_CUDA(cudaMemcpyAsync(to, d->part(which), bytes, cudaMemcpyDeviceToHost, d->stream));
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}
Status run_device(Device* d, const Run& run, const DeviceUpdate* update) {
    const Current current(d->ordinal);
    BABYGPT_CUDA(current.error);
    for (size_t i = 0; i < run.sequences.size && run.source.rows > 0; ++i)
        if (run.sequences[i].source != static_cast<int>(i))
            return refuse(Error::unsupported, "the backend cuda wants a source of its own for each sequence");
    if (d->sending) BABYGPT_CUDA(cudaEventSynchronize(d->sent));
    d->write_input(run, update);
    BABYGPT_CUDA(cudaMemcpyAsync(d->memory.now, d->input.now, d->input_bytes, cudaMemcpyHostToDevice, d->stream));
    BABYGPT_CUDA(cudaEventRecord(d->sent, d->stream));
    d->sending = true;
    const int which = !run.training ? 0 : update ? 2 : 1;
    if (run.seconds || !d->walked[which]) {
        BABYGPT_CUDA_TRY(d->walk_now(which, run.seconds));
        d->walked[which] = true;
    } else {
        if (!d->graphs[which]) BABYGPT_CUDA_TRY(d->capture(which, d->graphs[which]));
        BABYGPT_CUDA(cudaGraphLaunch(d->graphs[which], d->stream));
    }
    if (run.training) d->fresh = update != nullptr;
    return Status();
}
Status result_of(Device* d, DeviceResult& result) {
    const Current current(d->ordinal);
    BABYGPT_CUDA(current.error);
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    d->sending = false;
    result.loss = d->sums->loss, result.grad_norm = d->sums->norm, result.skipped = d->sums->skipped != 0;
    return Status();
}
Status losses_of(Device* d, int rows, double* losses, int32_t* ranks) {
    const Current current(d->ordinal);
    BABYGPT_CUDA(current.error);
    const size_t n = static_cast<size_t>(rows);
    if (n > 0) BABYGPT_CUDA(cudaMemcpyAsync(losses, d->memory.losses, n * sizeof(double), cudaMemcpyDeviceToHost, d->stream));
    if (n > 0 && ranks) BABYGPT_CUDA(cudaMemcpyAsync(ranks, d->memory.ranks, n * sizeof(int32_t), cudaMemcpyDeviceToHost, d->stream));
    BABYGPT_CUDA(cudaStreamSynchronize(d->stream));
    return Status();
}

}  // namespace cuda
}  // namespace babygpt

extern "C" const babygpt::records::DeviceFunctions* babygpt_cuda_device() {
    using namespace babygpt::cuda;
    static constexpr DeviceFunctions functions = {
        device_sizes, &create_device, &destroy_device, &device_bytes, &upload, &download, &run_device, &result_of, &losses_of,
    };
    return &functions;
}

#undef BABYGPT_CUDA
#undef BABYGPT_CUBLAS
#undef BABYGPT_CUDA_TRY
#ifdef __CUDACC__
#undef BABYGPT_SHARED
#undef BABYGPT_DYNAMIC_SHARED
#endif

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
