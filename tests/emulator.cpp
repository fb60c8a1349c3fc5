// Tests of tests/cuda_emulator.h itself: each kind of mistake that it is there for is found, and kernels without one are silent.
// Built with the watch, except in config=sanitize.
#include "check.h"

#if defined(__linux__)
#include <sys/wait.h>

#include "cuda_emulator.h"

#ifdef EMULATOR_WATCH
constexpr bool watched = true;
#else
constexpr bool watched = false;
#endif
constexpr unsigned all = 0xffffffffu;

// One allocation and one stream for every test; ends with nothing left alive.
struct Device {
    cudaStream_t stream = nullptr;
    float* data = nullptr;
    size_t alive;
    Device(size_t floats = 1024, bool zero = true) {
        emulator::forget();
        emulator::settings = emulator::Settings();
        emulator::settings.names = false;
        alive = emulator::alive();
        CHECK(cudaStreamCreate(&stream) == cudaSuccess && cudaMalloc(&data, floats * sizeof(float)) == cudaSuccess);
        if (zero) CHECK(cudaMemsetAsync(data, 0, floats * sizeof(float), stream) == cudaSuccess);
    }
    ~Device() {
        emulator::settings.no_device = false;
        emulator::settings.quiet = true;
        cudaFree(data);
        cudaStreamDestroy(stream);
        CHECK(emulator::alive() == alive);
        emulator::forget();
    }
    cudaLaunchConfig_t shape(unsigned blocks, unsigned threads, size_t shared = 0) const {
        cudaLaunchConfig_t c;
        c.gridDim = blocks, c.blockDim = threads, c.dynamicSmemBytes = shared, c.stream = stream;
        return c;
    }
    template <class... P, class... A>
    cudaError_t run(unsigned blocks, unsigned threads, void (*kernel)(P...), A... arguments) {
        const cudaLaunchConfig_t c = shape(blocks, threads);
        const cudaError_t error = cudaLaunchKernelEx(&c, kernel, arguments...);
        return error != cudaSuccess ? error : cudaStreamSynchronize(stream);
    }
    // Whether this kernel is found out, with these words.
    template <class... P, class... A>
    bool finds(const char* words, unsigned blocks, unsigned threads, void (*kernel)(P...), A... arguments) {
        emulator::forget();
        emulator::settings.quiet = true;
        run(blocks, threads, kernel, arguments...);
        const bool found = emulator::found(words);
        if (!found)
            for (const std::string& text : emulator::state.faults) printf("  said instead: %s\n", text.c_str());
        emulator::forget();
        return found;
    }
    std::vector<float> read(size_t count, const float* from = nullptr) {
        std::vector<float> values(count);
        CHECK(cudaMemcpyAsync(values.data(), from ? from : data, count * sizeof(float), cudaMemcpyDeviceToHost, stream) == cudaSuccess);
        return values;
    }
};
static bool silent() { return emulator::faults() == 0; }

// ---- kernels without a mistake ---------------------------------------------------------------------------------------
__global__ void sums(float* out, const float* in, int n) {
    BABYGPT_SHARED(float, part, 32);
    float sum = 0;
    for (unsigned i = threadIdx.x; i < static_cast<unsigned>(n); i += blockDim.x) sum += in[i] * static_cast<float>(blockIdx.x + 1);
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(all, sum, by);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(all, sum, static_cast<unsigned>(by));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
__global__ void fill(float* out, float value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value + static_cast<float>(threadIdx.x); }
TEST(correct_kernels, "a correct kernel gives wrong numbers or is accused, in some order of its threads") {
    Device d;
    for (unsigned order = 0; order < 6; ++order) {
        emulator::settings.order = order;
        CHECK(d.run(2, 128, fill, d.data, 1.0f) == cudaSuccess);
        CHECK(d.run(3, 96, sums, d.data + 512, d.data, 256) == cudaSuccess);
        const std::vector<float> got = d.read(3, d.data + 512);
        for (size_t b = 0; b < 3; ++b) CHECK(got[b] == 2 * (128 + 127 * 64) * static_cast<float>(b + 1));
    }
    CHECK(silent());
}
__global__ void exchanges(float* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const float x = static_cast<float>(lane);
    float* const row = out + lane * 8;
    row[0] = __shfl_sync(all, x, 5);
    row[1] = __shfl_up_sync(all, x, 3);
    row[2] = __shfl_down_sync(all, x, 3, 8);
    row[3] = __shfl_xor_sync(all, x, 6, 16);
    row[4] = static_cast<float>(__popc(__ballot_sync(all, lane % 3 == 0)));
    row[5] = static_cast<float>(__any_sync(all, lane == 40) * 2 + __all_sync(all, lane < 32));
    row[6] = static_cast<float>(__reduce_add_sync(all, lane) + __reduce_min_sync(all, lane - 7) + __reduce_max_sync(all, -lane));
    row[7] = lane < 16 ? __shfl_xor_sync(0xffffu, x, 1) : __shfl_xor_sync(0xffff0000u, x, 2);
}
TEST(shuffles_and_votes, "a shuffle or a vote does not answer what the language says") {
    Device d;
    CHECK(d.run(1, 32, exchanges, d.data) == cudaSuccess && silent());
    const std::vector<float> got = d.read(256);
    for (int lane = 0; lane < 32; ++lane) {
        const float* const row = got.data() + lane * 8;
        CHECK(row[0] == 5 && row[1] == static_cast<float>(lane < 3 ? lane : lane - 3) &&
              row[2] == static_cast<float>(lane % 8 < 5 ? lane + 3 : lane));
        CHECK(row[3] == static_cast<float>(lane ^ 6) && row[4] == 11 && row[5] == 1 && row[6] == 496 - 7 + 0 &&
              row[7] == static_cast<float>(lane ^ (lane < 16 ? 1 : 2)));
    }
}

// ---- barriers and warps ----------------------------------------------------------------------------------------------
__global__ void barrier_in_a_branch(float* out) {
    if (threadIdx.x < 10) __syncthreads();
    else out[threadIdx.x] = 1;
}
__global__ void two_barriers(float*) {
    if (threadIdx.x < 40) __syncthreads();
    else __syncthreads();
}
__global__ void barrier_and_shuffle(float* out) {
    if (threadIdx.x < 3) __syncthreads();
    else out[0] = __shfl_sync(all, 1.0f, 0);
}
__global__ void shuffle_after_exit(float* out) {
    if (threadIdx.x == 7) return;
    out[threadIdx.x] = __shfl_xor_sync(all, 1.0f, 1);
}
__global__ void shuffle_without_itself(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffu, 1.0f, 1); }
__global__ void shuffle_from_outside(float* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 9);
}
__global__ void shuffle_in_a_part(float* out) { out[threadIdx.x] = __shfl_xor_sync(all, 1.0f, 1); }
TEST(divergence, "a barrier or shuffle that not all threads reach is not reported") {
    Device d;
    CHECK(d.finds("has ended", 1, 64, barrier_in_a_branch, d.data));
    CHECK(d.finds("but thread (40, 0, 0) waits at __syncthreads", 2, 64, two_barriers, d.data));
    CHECK(d.finds("waits at a shuffle", 1, 64, barrier_and_shuffle, d.data));
    CHECK(d.finds("thread (7, 0, 0) has ended", 1, 64, shuffle_after_exit, d.data));
    CHECK(d.finds("lane 8, which is not in it", 1, 32, shuffle_without_itself, d.data));
    CHECK(d.finds("reads lane 9, which is not in the mask", 1, 32, shuffle_from_outside, d.data));
    CHECK(d.finds("lane 16 of its mask does not exist", 1, 16, shuffle_in_a_part, d.data));
    CHECK(d.run(1, 32, fill, d.data, 0.0f) == cudaSuccess && silent());  // the device works again
}
TEST(messages, "a fault's message does not name the kernel, the block, the thread and the line") {
    Device d;
    emulator::settings.quiet = emulator::settings.names = true;
    d.run(2, 64, two_barriers, d.data);
    CHECK(emulator::found("two_barriers") && emulator::found("block (0, 0, 0), thread (0, 0, 0)") && emulator::found("emulator.cpp:"));
}

// ---- races -----------------------------------------------------------------------------------------------------------
__global__ void reverse(float* out, bool barrier) {
    BABYGPT_SHARED(float, x, 64);
    x[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = x[63 - threadIdx.x];
}
__global__ void reverse_in_warps(float* out, bool across) {
    BABYGPT_SHARED(float, x, 64);
    x[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] = x[threadIdx.x ^ (across ? 63 : 31)];
}
__global__ void reuse_too_early(float* out) {
    BABYGPT_DYNAMIC_SHARED(bytes);
    float* const x = reinterpret_cast<float*>(bytes);
    for (int turn = 0; turn < 2; ++turn) {
        x[threadIdx.x] = static_cast<float>(turn);
        __syncthreads();
        out[threadIdx.x] = x[63 - threadIdx.x];
    }
}
__global__ void same_place(float* out) { out[threadIdx.x / 2] = 1; }
__global__ void neighbours(float* out) {
    __nv_bfloat16* const to = reinterpret_cast<__nv_bfloat16*>(out);
    to[blockIdx.x * 64 + threadIdx.x] = 1.0f;
}
__global__ void same_place_in_blocks(float* out) {
    if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}
__global__ void last_block_sums(float* parts, unsigned* counter, bool fence) {
    BABYGPT_SHARED(unsigned, turn, 1);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = static_cast<float>(blockIdx.x);
        if (fence) __threadfence();
        turn[0] = atomicAdd(counter, 1u);
    }
    __syncthreads();
    if (turn[0] != gridDim.x - 1) return;
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
    parts[gridDim.x] = sum;
    *counter = 0;
}
TEST(races,
     "two threads that touch the same memory with nothing between them are not reported, or threads with a barrier between them are") {
    if (!watched) SKIP("built without the watch");
    Device d;
    CHECK(d.finds("of block 0 wrote", 2, 64, reverse, d.data, true));  // both blocks write the same
    CHECK(d.run(1, 64, reverse, d.data, true) == cudaSuccess && d.run(1, 64, reverse_in_warps, d.data, false) == cudaSuccess &&
          d.run(3, 64, neighbours, d.data) == cudaSuccess && silent());
    CHECK(d.finds("nothing between", 1, 64, reverse, d.data, false));
    CHECK(d.finds("shared x", 1, 64, reverse_in_warps, d.data, true));
    CHECK(d.finds("which thread 0 of block 0 wrote", 1, 64, same_place, d.data));
    CHECK(d.finds("of block 0 wrote", 4, 64, same_place_in_blocks, d.data));
    emulator::settings.quiet = true;
    cudaLaunchConfig_t c = d.shape(1, 64, 256);
    cudaLaunchKernelEx(&c, reuse_too_early, d.data);
    cudaStreamSynchronize(d.stream);
    CHECK(emulator::found("dynamic shared memory") && emulator::found("read with nothing between"));
    emulator::forget();
    unsigned* const counter = reinterpret_cast<unsigned*>(d.data + 100);
    CHECK(d.run(5, 32, last_block_sums, d.data, counter, true) == cudaSuccess && silent());
    CHECK(d.read(1, d.data + 5)[0] == 10);
    CHECK(d.finds("wrote with nothing between", 5, 32, last_block_sums, d.data, counter, false));
}
__global__ void grid_turns(float* out, bool barrier) {
    out[blockIdx.x] = 1;
    if (barrier) emulator::grid_sync();
    if (threadIdx.x == 0) out[8 + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}
TEST(barrier_of_the_grid, "a cooperative launch does not run its blocks together, or is not limited to what fits") {
    Device d;
    cudaLaunchAttribute together;
    together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
    cudaLaunchConfig_t c = d.shape(4, 1);
    c.attrs = &together, c.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&c, grid_turns, d.data, true) == cudaSuccess && cudaStreamSynchronize(d.stream) == cudaSuccess && silent());
    CHECK(d.read(1, d.data + 8)[0] == 1);
    c.gridDim = 1000;
    CHECK(cudaLaunchKernelEx(&c, grid_turns, d.data, true) == cudaErrorCooperativeLaunchTooLarge);
    CHECK(d.finds("not cooperative", 2, 1, grid_turns, d.data, true));
    if (watched) CHECK(d.finds("nothing between", 4, 1, grid_turns, d.data, false));
}
enum class Turn { right, no_arrival, two_arrivals, late };
__global__ void cluster_turns(float* out, Turn turn) {
    const unsigned next = (blockIdx.x + 1) % gridDim.x;
    if (turn != Turn::late) out[blockIdx.x] = 1;
    if (turn != Turn::no_arrival) emulator::cluster_arrive();
    if (turn == Turn::two_arrivals) emulator::cluster_arrive();
    if (turn == Turn::late) out[blockIdx.x] = 1;
    emulator::cluster_wait();
    out[8 + blockIdx.x] = out[next];
}
TEST(barrier_of_a_cluster,
     "a cluster does not run its blocks together, is larger than it may be, or its barrier's two halves can be mistaken") {
    Device d;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {4, 1, 1};
    cudaLaunchConfig_t c = d.shape(4, 1);
    c.attrs = &attribute, c.numAttrs = 1;
    const auto run = [&](Turn turn) {
        emulator::settings.quiet = turn != Turn::right;
        const cudaError_t launched = cudaLaunchKernelEx(&c, cluster_turns, d.data, turn);
        return launched == cudaSuccess ? cudaStreamSynchronize(d.stream) : launched;
    };
    CHECK(run(Turn::right) == cudaSuccess && silent());
    CHECK(d.read(1, d.data + 8)[0] == 1);
    const auto finds = [&](const char* text, Turn turn) {
        (void)run(turn);
        const bool found = emulator::found(text);
        emulator::forget();
        return found;
    };
    CHECK(finds("without having arrived", Turn::no_arrival));
    CHECK(finds("barrier twice", Turn::two_arrivals));
    if (watched) CHECK(finds("between its arrival at a barrier and its wait", Turn::late));
    int fit = -1;
    CHECK(cudaOccupancyMaxActiveClusters(&fit, cluster_turns, &c) == cudaSuccess && fit == 1);
    emulator::settings.major = 8;
    CHECK(cudaOccupancyMaxActiveClusters(&fit, cluster_turns, &c) == cudaSuccess && fit == 0);
    emulator::settings.major = 9, emulator::settings.cluster = emulator::settings.processors = 16;
    c.gridDim = 16, attribute.val.clusterDim.x = 16;
    CHECK(finds("too large", Turn::no_arrival));
    CHECK(cudaFuncSetAttribute(cluster_turns, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess);
    CHECK(cudaOccupancyMaxActiveClusters(&fit, cluster_turns, &c) == cudaSuccess && fit == 1);
    emulator::settings.cluster = emulator::settings.processors = 4;
}

// ---- memory ----------------------------------------------------------------------------------------------------------
__global__ void unwritten_shared(float* out) {
    BABYGPT_SHARED(float, x, 32);
    if (threadIdx.x < 31) x[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
}
__global__ void copy_one(float* to, const float* from) { to[0] = from[0]; }
TEST(unwritten_memory, "memory that nobody has written looks usable") {
    Device d(64, false);
    CHECK(d.read(1)[0] != d.read(1)[0]);  // not a number
    CHECK(d.run(1, 1, fill, d.data, 1.0f) == cudaSuccess);
    if (watched) CHECK(d.finds("shared x, which nobody has written", 1, 32, unwritten_shared, d.data));
    else CHECK(d.run(1, 32, unwritten_shared, d.data) == cudaSuccess && d.read(32)[31] != d.read(32)[31]);
    if (watched) CHECK(d.finds("which nobody has written", 1, 1, copy_one, d.data, d.data + 63));
}
struct Two {
    float* a;
    const float* b;
};
__global__ void copy_in_struct(Two p) { p.a[0] = p.b[0]; }
// The exit code of a child that does this, with its messages thrown away.
template <class F>
int child(F what) {
    fflush(stdout);
    const pid_t id = fork();
    if (id == 0) {
        if (!freopen("/dev/null", "w", stderr) || !freopen("/dev/null", "w", stdout)) _exit(99);
        what();
        _exit(emulator::faults() ? 3 : 0);
    }
    int status = 0;
    waitpid(id, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}
TEST(host_and_device, "the host's memory in a kernel, or the device's on the host, is not found") {
    Device d;
    std::vector<float> host(64);
    CHECK(d.finds("an argument points to host memory", 1, 1, copy_one, d.data, host.data()));
    float* const gone = d.data + 100000;
    CHECK(d.finds("memory that is not allocated", 1, 1, copy_one, gone, d.data));
    if (watched) CHECK(d.finds("host memory", 1, 1, copy_in_struct, Two{d.data, host.data()}));
    volatile float sink = 0;
    CHECK(child([&] { sink = d.data[0]; }) == 139);
    CHECK(child([&] { d.data[0] = 1; }) == 139);
    emulator::settings.quiet = true;
    CHECK(cudaMemcpyAsync(d.data + 1000, host.data(), 64 * sizeof(float), cudaMemcpyHostToDevice, d.stream) == cudaSuccess &&
          cudaStreamSynchronize(d.stream) == cudaErrorIllegalAddress);
    emulator::forget();
    emulator::settings.quiet = true;
    CHECK(cudaMemcpyAsync(host.data(), host.data() + 1, 4, cudaMemcpyDeviceToHost, d.stream) == cudaErrorIllegalAddress);
    emulator::forget();
    emulator::settings.quiet = true;
    CHECK(cudaFree(host.data()) == cudaErrorInvalidValue);
}
__global__ void touch(const float* from, float* to, int i) { to[0] = from[i]; }
__global__ void touch_shared(float* to, int i) {
    BABYGPT_SHARED(float, x, 8);
    x[i] = 1;
    to[0] = x[i];
}
__global__ void deep(float* to, int n) {
    volatile float room[1000];
    for (int i = 0; i < 1000; ++i) room[i] = static_cast<float>(n);
    if (n > 0) deep(to, n - 1);
    to[0] = room[n];
}
TEST(beyond_the_end, "a kernel that reads or writes beyond a buffer is not stopped") {
    Device d;
    d.read(1);
#ifdef EMULATOR_ASAN
    const bool asan = true;
#else
    const bool asan = false;
#endif
    const auto dies = [&](int i) { return child([&] { d.run(1, 1, touch, d.data, d.data, i); }); };
    CHECK(dies(1023) == 0);
    if (asan || watched) CHECK(dies(1024) != 0 && dies(-1) != 0);
    CHECK(dies(100000) != 0);  // the gap between allocations
    if (asan)
        CHECK(child([&] { d.run(1, 1, touch_shared, d.data, 8); }) != 0 && child([&] { d.run(1, 1, touch_shared, d.data, -1); }) != 0);
    CHECK(child([&] { d.run(1, 1, touch_shared, d.data, 7); }) == 0);
    CHECK(child([&] { d.run(1, 1, deep, d.data, 10); }) == 0 && child([&] { d.run(1, 1, deep, d.data, 900); }) != 0);
    if (asan) {
        emulator::name_buffer(d.data, 100, "first");
        emulator::name_buffer(d.data + 128, 100, "second");
        CHECK(dies(24) == 0 && dies(25) != 0 && dies(128) == 0 && dies(127) != 0);
        CHECK(emulator::describe(d.data + 129) == "byte 4 of second (100 bytes)");
    }
}
TEST(allocations, "memory is not limited, not counted, or a failure that was asked for does not come") {
    Device d;
    void* p = nullptr;
    const size_t before = emulator::state.used;
    emulator::settings.memory = 1 << 20;
    CHECK(cudaMalloc(&p, 2 << 20) == cudaErrorMemoryAllocation && !p && emulator::state.used == before);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess);
    size_t free_bytes = 0, total = 0;
    CHECK(cudaMemGetInfo(&free_bytes, &total) == cudaSuccess && total == 1 << 20 && free_bytes == total - before);
    emulator::settings.fail_allocation = 2;
    CHECK(cudaMalloc(&p, 100) == cudaSuccess && cudaFree(p) == cudaSuccess && cudaMallocHost(&p, 100) == cudaErrorMemoryAllocation);
    emulator::settings.fail_call = 2;
    CHECK(cudaGetDevice(&emulator::settings.processors) == cudaSuccess && cudaStreamQuery(d.stream) == cudaErrorUnknown);
    CHECK(cudaMalloc(&p, 100) == cudaSuccess && emulator::alive() == d.alive + 3 && cudaFree(p) == cudaSuccess &&
          emulator::alive() == d.alive + 2);
    emulator::settings.quiet = true;
    CHECK(cudaFree(p) == cudaErrorInvalidValue && emulator::found("freed before"));
    emulator::settings.no_device = true;
    int count = 7;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0 && cudaMalloc(&p, 4) == cudaErrorNoDevice);
}
TEST(launches, "a launch that no device takes is taken") {
    Device d;
    emulator::settings.quiet = true;
    CHECK(d.run(0, 32, fill, d.data, 0.0f) == cudaErrorInvalidConfiguration &&
          d.run(1, 0, fill, d.data, 0.0f) == cudaErrorInvalidConfiguration);
    CHECK(d.run(1, 1025, fill, d.data, 0.0f) == cudaErrorInvalidConfiguration);
    cudaLaunchConfig_t c = d.shape(1, 64, 60000);
    CHECK(cudaLaunchKernelEx(&c, reuse_too_early, d.data) == cudaErrorInvalidConfiguration);
    CHECK(cudaFuncSetAttribute(reuse_too_early, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000) == cudaSuccess &&
          cudaLaunchKernelEx(&c, reuse_too_early, d.data) == cudaSuccess);
    emulator::settings.shared_optin = 64 << 10;  // as on compute capability 7.5
    CHECK(cudaFuncSetAttribute(reuse_too_early, cudaFuncAttributeMaxDynamicSharedMemorySize, 90000) == cudaErrorInvalidValue);
    emulator::state.dynamic_limit.clear();
}
TEST(faults_stay, "the calls after a fault succeed, as if nothing were") {
    Device d;
    emulator::settings.quiet = true;
    CHECK(d.run(1, 64, two_barriers, d.data) == cudaErrorLaunchFailure &&
          cudaMemsetAsync(d.data, 0, 4, d.stream) == cudaErrorLaunchFailure && cudaGetLastError() == cudaErrorLaunchFailure);
}

// ---- streams and graphs ----------------------------------------------------------------------------------------------
TEST(streams_are_late, "a result that is read before anybody waited for it is there already") {
    Device d;
    float *pinned = nullptr, pageable = 5;
    CHECK(cudaMallocHost(&pinned, sizeof(float)) == cudaSuccess);
    *pinned = 3;
    const cudaLaunchConfig_t c = d.shape(1, 1);
    cudaMemcpyAsync(d.data, pinned, 4, cudaMemcpyHostToDevice, d.stream);
    cudaMemcpyAsync(d.data + 1, &pageable, 4, cudaMemcpyHostToDevice, d.stream);
    *pinned = 4, pageable = 6;  // too early for pinned memory; the other was read by the call
    CHECK(cudaStreamSynchronize(d.stream) == cudaSuccess && d.read(2)[0] == 4 && d.read(2)[1] == 5);
    CHECK(cudaLaunchKernelEx(&c, fill, d.data, 9.0f) == cudaSuccess &&
          cudaMemcpyAsync(pinned, d.data, 4, cudaMemcpyDeviceToHost, d.stream) == cudaSuccess && *pinned == 4);
    cudaEvent_t event = nullptr;
    CHECK(cudaEventCreate(&event) == cudaSuccess && cudaEventRecord(event, d.stream) == cudaSuccess &&
          cudaEventQuery(event) == cudaErrorNotReady && *pinned == 4);
    int turns = 0;
    while (cudaEventQuery(event) == cudaErrorNotReady && turns < 10) ++turns;
    CHECK(turns == 2 && *pinned == 9);
    cudaStream_t other = nullptr;  // waits for the first
    CHECK(cudaStreamCreate(&other) == cudaSuccess && cudaLaunchKernelEx(&c, fill, d.data, 11.0f) == cudaSuccess &&
          cudaEventRecord(event, d.stream) == cudaSuccess);
    CHECK(cudaStreamWaitEvent(other, event, 0) == cudaSuccess &&
          cudaMemcpyAsync(pinned, d.data, 4, cudaMemcpyDeviceToHost, other) == cudaSuccess);
    CHECK(cudaStreamSynchronize(other) == cudaSuccess && *pinned == 11 && cudaStreamDestroy(other) == cudaSuccess &&
          cudaEventDestroy(event) == cudaSuccess && cudaFreeHost(pinned) == cudaSuccess);
    CHECK(silent());
}
TEST(graphs, "a graph does not replay what was recorded, with the values and pointers of then") {
    Device d;
    float *pinned = nullptr, *extra = nullptr, value = 1;
    CHECK(cudaMallocHost(&pinned, sizeof(float)) == cudaSuccess && cudaMalloc(&extra, 4) == cudaSuccess);
    cudaLaunchConfig_t c = d.shape(1, 1);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal) == cudaSuccess &&
          cudaLaunchKernelEx(&c, fill, extra, value) == cudaSuccess);
    CHECK(cudaMemcpyAsync(pinned, extra, 4, cudaMemcpyDeviceToHost, d.stream) == cudaSuccess &&
          cudaStreamEndCapture(d.stream, &graph) == cudaSuccess);
    size_t nodes = 0;
    CHECK(cudaGraphGetNodes(graph, nullptr, &nodes) == cudaSuccess && nodes == 2 && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess &&
          cudaGraphDestroy(graph) == cudaSuccess);
    *pinned = 0, value = 2;
    const emulator::Counts before = emulator::counts;
    CHECK(cudaGraphLaunch(exec, d.stream) == cudaSuccess && *pinned == 0 && emulator::counts.graph_launches == before.graph_launches + 1 &&
          emulator::counts.synchronisations == before.synchronisations);
    CHECK(cudaStreamSynchronize(d.stream) == cudaSuccess && *pinned == 1 && silent());
    CHECK(cudaFree(extra) == cudaSuccess);
    emulator::settings.quiet = true;
    CHECK(cudaGraphLaunch(exec, d.stream) == cudaSuccess && cudaStreamSynchronize(d.stream) == cudaErrorIllegalAddress &&
          emulator::found("not allocated"));
    emulator::forget();
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess && cudaFreeHost(pinned) == cudaSuccess);
}
TEST(captures, "what must not happen while a graph is recorded is let pass") {
    Device d;
    void* p = nullptr;
    cudaGraph_t graph = nullptr;
    cudaStream_t fork = nullptr;
    cudaEvent_t event = nullptr;
    cudaLaunchConfig_t c = d.shape(1, 1);
    const auto begin = [&] { return cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal); };
    CHECK(begin() == cudaSuccess && cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported &&
          cudaStreamEndCapture(d.stream, &graph) == cudaErrorStreamCaptureInvalidated && !graph);
    CHECK(begin() == cudaSuccess && cudaStreamSynchronize(d.stream) == cudaErrorStreamCaptureUnsupported &&
          cudaStreamEndCapture(d.stream, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK(cudaStreamEndCapture(d.stream, &graph) == cudaErrorStreamCaptureUnmatched);
    CHECK(cudaStreamCreate(&fork) == cudaSuccess && cudaEventCreate(&event) == cudaSuccess);
    for (int join = 0; join < 2; ++join) {
        CHECK(begin() == cudaSuccess && cudaEventRecord(event, d.stream) == cudaSuccess &&
              cudaStreamWaitEvent(fork, event, 0) == cudaSuccess);
        c.stream = fork;
        CHECK(cudaLaunchKernelEx(&c, fill, d.data, 1.0f) == cudaSuccess);
        if (join) CHECK(cudaEventRecord(event, fork) == cudaSuccess && cudaStreamWaitEvent(d.stream, event, 0) == cudaSuccess);
        CHECK(cudaStreamEndCapture(d.stream, &graph) == (join ? cudaSuccess : cudaErrorStreamCaptureUnjoined));
    }
    CHECK(cudaGraphDestroy(graph) == cudaSuccess && cudaStreamDestroy(fork) == cudaSuccess && cudaEventDestroy(event) == cudaSuccess &&
          silent());
}

// ---- tiles and asynchronous copies -----------------------------------------------------------------------------------
// One warp multiplies 16x16 by 16x8 tiles, loaded the way a real kernel does: A by rows, B by columns (so B's rows are loaded across).
template <class T>
__global__ void tile_16(float* d, const T* a, const T* b) {
    BABYGPT_SHARED(T, sa, 16 * 16);
    BABYGPT_SHARED(T, sb, 16 * 8);
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    emulator::copy_async16(sa + lane * 8, a + lane * 8);
    if (lane < 16) emulator::copy_async16(sb + lane * 8, b + lane * 8);
    emulator::copy_async_commit();
    emulator::copy_async_wait<0>();
    __syncwarp();
    uint32_t ra[4], rb[2];
    float sum[4] = {1, 1, 1, 1};
    emulator::ldmatrix_x4(ra, sa + lane % 16 * 16 + lane / 16 * 8);
    emulator::ldmatrix_x2_trans(rb, sb + lane % 16 * 8);
    emulator::mma_m16n8k16(sum, ra, rb, T{});
    d[g * 8 + t * 2] = sum[0], d[g * 8 + t * 2 + 1] = sum[1], d[(g + 8) * 8 + t * 2] = sum[2], d[(g + 8) * 8 + t * 2 + 1] = sum[3];
}
__global__ void tile_tf32(float* d, const float* a, const float* b) {
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const uint32_t ra[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]), __float_as_uint(a[g * 8 + t + 4]),
                            __float_as_uint(a[(g + 8) * 8 + t + 4])};
    const uint32_t rb[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
    float sum[4] = {1, 1, 1, 1};
    emulator::mma_m16n8k8_tf32(sum, ra, rb);
    d[g * 8 + t * 2] = sum[0], d[g * 8 + t * 2 + 1] = sum[1], d[(g + 8) * 8 + t * 2] = sum[2], d[(g + 8) * 8 + t * 2 + 1] = sum[3];
}
template <class T>
void check_tile(int depth, void (*kernel)(float*, const T*, const T*)) {
    Device d;
    std::vector<T> a(static_cast<size_t>(16 * depth)), b(static_cast<size_t>(depth * 8));
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<T>(static_cast<float>(i * 7 % 13) - 6.0f);
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<T>(static_cast<float>(i * 5 % 11) - 5.0f);
    T* const at = reinterpret_cast<T*>(d.data + 256);
    T* const bt = reinterpret_cast<T*>(d.data + 512);
    cudaMemcpyAsync(at, a.data(), a.size() * sizeof(T), cudaMemcpyHostToDevice, d.stream);
    cudaMemcpyAsync(bt, b.data(), b.size() * sizeof(T), cudaMemcpyHostToDevice, d.stream);
    CHECK(d.run(1, 32, kernel, d.data, at, bt) == cudaSuccess && silent());
    const std::vector<float> got = d.read(128);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            float sum = 1;
            for (int k = 0; k < depth; ++k)
                sum += static_cast<float>(a[static_cast<size_t>(i * depth + k)]) * static_cast<float>(b[static_cast<size_t>(k * 8 + j)]);
            CHECK(got[static_cast<size_t>(i * 8 + j)] == sum);
        }
}
TEST(tiles, "a tile product or a matrix load has another register layout than PTX says") {
    check_tile(16, tile_16<__nv_bfloat16>);
    check_tile(16, tile_16<__half>);
    check_tile(8, tile_tf32);
}
__global__ void copies(float* to, const float* from, int waits) {
    BABYGPT_SHARED(float, x, 32 * 4);
    emulator::copy_async_zero16(x + threadIdx.x * 4, from + threadIdx.x * 4, threadIdx.x != 3);
    emulator::copy_async_commit();
    if (waits > 0) emulator::copy_async_wait<0>();
    if (waits > 1) __syncthreads();
    to[threadIdx.x] = x[(threadIdx.x + 1) % 32 * 4];
    if (waits == 0) emulator::copy_async_wait<0>();
}
__global__ void copies_left(float*, const float* from) {
    BABYGPT_SHARED(float, x, 4);
    emulator::copy_async16(x, from);
    emulator::copy_async_commit();
}
TEST(asynchronous_copies, "bytes of an asynchronous copy are there before anybody waited") {
    Device d;
    CHECK(d.run(1, 128, fill, d.data + 256, 1.0f) == cudaSuccess && d.run(1, 32, copies, d.data, d.data + 256, 2) == cudaSuccess &&
          silent());
    CHECK(d.read(32)[0] == 5 && d.read(32)[2] == 0 && d.read(32)[31] == 1);
    if (watched)
        CHECK(d.finds("nothing between", 1, 32, copies, d.data, d.data + 256, 1) &&
              d.finds("nothing between", 1, 32, copies, d.data, d.data + 256, 0));
    else CHECK(d.run(1, 32, copies, d.data, d.data + 256, 0) == cudaSuccess && d.read(1)[0] != d.read(1)[0]);
    CHECK(d.finds("never waited", 1, 1, copies_left, d.data, d.data + 256) &&
          d.finds("multiples of 16", 1, 1, copies_left, d.data, d.data + 1));
}

// ---- numbers ---------------------------------------------------------------------------------------------------------
TEST(short_floats, "bf16 or half is not the nearest one, ties to even") {
    const auto f16 = [](float x) { return emulator::float_to_half(x); };
    const auto bf16 = [](float x) { return __nv_bfloat16(x).bits; };
    for (uint32_t i = 0; i < 0x7c00; ++i) {  // every half and the middle of each pair
        const float low = emulator::half_to_float(static_cast<uint16_t>(i));
        const float high = i == 0x7bff ? 65536.0f : emulator::half_to_float(static_cast<uint16_t>(i + 1)), middle = (low + high) / 2;
        CHECK(low < high && f16(low) == i && f16(-low) == (i | 0x8000) && f16(middle) == (i + 1) / 2 * 2 &&
              f16(nextafterf(middle, 0)) == i);
    }
    for (uint32_t i = 0; i < 0x7f80; ++i) {
        const float low = emulator::bits_to_float(i << 16), middle = emulator::bits_to_float(i << 16 | 0x8000);
        CHECK(bf16(low) == i && bf16(-middle) == ((i + 1) / 2 * 2 | 0x8000) && bf16(nextafterf(middle, 0)) == i);
    }
    CHECK(isnan(static_cast<float>(__nv_bfloat16(NAN))) && isnan(static_cast<float>(__half(NAN))) &&
          isinf(static_cast<float>(__half(1e30f))));
}
// D = f(op(A) op(B) + bias) by cuBLASLt, against loops.
static void check_product(bool across_a, bool across_b, int type, cublasLtEpilogue_t epilogue, bool by_rows) {
    Device d;
    const size_t m = 5, n = 3, k = 7;
    std::vector<float> a(m * k), b(k * n), bias(m), want(m * n), aux(m * n);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 13) * 0.25f - 1.5f;
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 11) * 0.25f - 1.25f;
    for (size_t i = 0; i < m; ++i) bias[i] = static_cast<float>(i) * 0.5f;
    const bool is_short = type == CUDA_R_16BF, has_bias = (epilogue & 4) != 0, gelu = (epilogue & 32) != 0,
               bias_sums = epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    // a is m x k and b is k x n here; each is stored by columns or rows, straight or across.
    const auto put = [&](float* to, const std::vector<float>& from, size_t rows, size_t columns, bool across) {
        std::vector<float> x(rows * columns);
        for (size_t i = 0; i < rows; ++i)
            for (size_t j = 0; j < columns; ++j) x[across != by_rows ? i * columns + j : i + j * rows] = from[i * columns + j];
        std::vector<__nv_bfloat16> y(x.begin(), x.end());
        cudaMemcpyAsync(to, is_short ? static_cast<const void*>(y.data()) : x.data(), x.size() * (is_short ? 2u : 4u),
                        cudaMemcpyHostToDevice, d.stream);
    };
    put(d.data, a, m, k, across_a);
    put(d.data + 100, b, k, n, across_b);
    cudaMemcpyAsync(d.data + 200, bias.data(), m * 4, cudaMemcpyHostToDevice, d.stream);
    for (size_t i = 0; i < m * n; ++i) aux[i] = static_cast<float>(i) * 0.1f - 0.7f;
    cudaMemcpyAsync(d.data + 400, aux.data(), m * n * 4, cudaMemcpyHostToDevice, d.stream);
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t la = nullptr, lb = nullptr, ld = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    const cudaDataType in = is_short ? CUDA_R_16BF : CUDA_R_32F;
    const int32_t op_a = across_a, op_b = across_b, row_order = by_rows ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL, f32 = CUDA_R_32F;
    const auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType t, size_t rows, size_t columns) {
        CHECK(cublasLtMatrixLayoutCreate(l, t, rows, columns, static_cast<int64_t>(by_rows ? columns : rows)) == CUBLAS_STATUS_SUCCESS);
        CHECK(cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_ORDER, &row_order, sizeof row_order) == CUBLAS_STATUS_SUCCESS);
    };
    CHECK(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS &&
          cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
    layout(&la, in, across_a ? k : m, across_a ? m : k);
    layout(&lb, in, across_b ? n : k, across_b ? k : n);
    layout(&ld, CUDA_R_32F, m, n);
    const float* const bias_at = d.data + 200;
    const float* const aux_at = d.data + 400;
    const int64_t aux_stride = m;
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_at, sizeof bias_at);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &f32, sizeof f32);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux_at, sizeof aux_at);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_stride, sizeof aux_stride);
    const uint64_t room = 1500;
    cublasLtMatmulHeuristicResult_t plans[8];
    int count = 0;
    CHECK(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS &&
          cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room) ==
              CUBLAS_STATUS_SUCCESS);
    CHECK(cublasLtMatmulAlgoGetHeuristic(handle, product, la, lb, ld, ld, preference, 8, plans, &count) == CUBLAS_STATUS_SUCCESS &&
          count == 2);
    const float one = 1, zero = 0;
    CHECK(cublasLtMatmul(handle, product, &one, d.data, la, d.data + 100, lb, &zero, d.data + 300, ld, d.data + 300, ld, &plans[1].algo,
                         d.data + 500, 1500, d.stream) == CUBLAS_STATUS_SUCCESS);
    const std::vector<float> got = d.read(m * n, d.data + 300), got_bias = d.read(m, bias_at), got_aux = d.read(m * n, aux_at);
    CHECK(silent());
    std::vector<double> sums(m);
    for (size_t i = 0; i < m; ++i)
        for (size_t j = 0; j < n; ++j) {
            double sum = has_bias ? static_cast<double>(bias[i]) : 0.0;
            for (size_t l = 0; l < k; ++l) sum += static_cast<double>(a[i * k + l]) * static_cast<double>(b[l * n + j]);
            if (epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) CHECK(fabs(static_cast<double>(got_aux[i + j * m]) - sum) < 1e-5);
            const auto smooth = [](double x) { return x / (1 + exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))); };
            if (gelu) sum = smooth(sum);
            if (bias_sums) {
                const double x = static_cast<double>(aux[i + j * m]);
                sum *= (smooth(x + 1e-5) - smooth(x - 1e-5)) / 2e-5;
            }
            sums[i] += sum;
            CHECK(fabs(static_cast<double>(got[by_rows ? i * n + j : i + j * m]) - sum) < 1e-4);
        }
    for (size_t i = 0; i < m && bias_sums; ++i) CHECK(fabs(static_cast<double>(got_bias[i]) - sums[i]) < 1e-4);
    CHECK(cublasLtMatmulPreferenceDestroy(preference) == CUBLAS_STATUS_SUCCESS &&
          cublasLtMatrixLayoutDestroy(la) == CUBLAS_STATUS_SUCCESS && cublasLtMatrixLayoutDestroy(lb) == CUBLAS_STATUS_SUCCESS &&
          cublasLtMatrixLayoutDestroy(ld) == CUBLAS_STATUS_SUCCESS && cublasLtMatmulDescDestroy(product) == CUBLAS_STATUS_SUCCESS &&
          cublasLtDestroy(handle) == CUBLAS_STATUS_SUCCESS);
}
TEST(products, "what takes cuBLASLt's place computes something else") {
    for (int across = 0; across < 4; ++across)
        for (int rows = 0; rows < 2; ++rows) {
            check_product(across & 1, across & 2, CUDA_R_32F, CUBLASLT_EPILOGUE_DEFAULT, rows);
            check_product(across & 1, across & 2, CUDA_R_16BF, CUBLASLT_EPILOGUE_BIAS, rows);
        }
    check_product(true, false, CUDA_R_32F, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, false);
    check_product(true, false, CUDA_R_32F, CUBLASLT_EPILOGUE_DGELU_BGRAD, false);
}

int main(int count, char** words) { return run_tests(count, words); }
#else
int main() {
    printf("skipped: the emulator needs Linux\n");
    return run_tests();
}
#endif
