// ceilings: what this machine can do at all. How many operations a second its cores can do when nothing leaves the registers, and how fast
// they can read working sets of several sizes. Every other figure of the bench is a share of one of these.
//
//     g++ -std=c++17 -O2 -pthread tools/bench/ceilings.cpp -o ceilings && ./ceilings
//
// The kernels are assembly, so that no compiler and no flag changes what is measured. What a processor or its system lacks is "none".
// A rate is the best of many windows of one or two milliseconds, as a ceiling should be; the middle one stands beside it in --json.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

constexpr size_t huge_page = size_t(2) << 20;

struct Work {
    const char* memory;  // of this thread; aligned to a huge page
    size_t bytes;
    int64_t rounds;
};
using Kernel = double (*)(const Work& work);  // returns what it has done: operations (a multiply-add is two), or bytes

// =====================================================================================================================
// Kernels
// =====================================================================================================================

// What the arithmetic kernels multiply: 1.0 as bf16 pairs, about 1.0 as float, and small integers.
struct alignas(64) Numbers {
    uint32_t values[256];
    Numbers() { std::fill(values, values + 256, 0x3F803F80u); }
};
const Numbers numbers;

#if defined(__x86_64__)

// Fourteen sums, more than latency times issue width of any processor so far; registers 14 and 15 hold the factors. Twice a round.
#define EACH_SUM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define CLOBBERED                                                                                                                       \
    "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
        "xmm14", "xmm15"
#define LINES(text) text "\n\t"
#define REGISTER_KERNEL(name, a_sum, load, reg, operations)                                                                                \
    double name(const Work& work) {                                                                                                        \
        int64_t left = work.rounds;                                                                                                        \
        __asm__ volatile(EACH_SUM(CLEAR_SUM) LINES(load " (%1), %%" reg "14") LINES(load " (%1), %%" reg "15") LINES("1:") EACH_SUM(a_sum) \
                             EACH_SUM(a_sum) LINES("dec %0") LINES("jnz 1b") LINES("vzeroupper")                                           \
                         : "+r"(left)                                                                                                      \
                         : "r"(numbers.values)                                                                                             \
                         : CLOBBERED);                                                                                                     \
        return double(work.rounds) * 28 * (operations);                                                                                    \
    }
#define CLEAR_SUM(i) LINES("vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i)
#define FMA128(i) LINES("vfmadd231ps %%xmm15, %%xmm14, %%xmm" #i)
#define FMA256(i) LINES("vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i)
#define FMA512(i) LINES("vfmadd231ps %%zmm15, %%zmm14, %%zmm" #i)
#define BF16_512(i) LINES("vdpbf16ps %%zmm15, %%zmm14, %%zmm" #i)
#define INT8_256(i) LINES("%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" #i)
#define INT8_512(i) LINES("vpdpbusd %%zmm15, %%zmm14, %%zmm" #i)
REGISTER_KERNEL(fma128, FMA128, "vmovups", "xmm", 2 * 4)
REGISTER_KERNEL(fma256, FMA256, "vmovups", "ymm", 2 * 8)
REGISTER_KERNEL(fma512, FMA512, "vmovups", "zmm", 2 * 16)
REGISTER_KERNEL(bf16_512, BF16_512, "vmovups", "zmm", 2 * 32)
REGISTER_KERNEL(int8_256, INT8_256, "vmovups", "ymm", 2 * 32)
REGISTER_KERNEL(int8_512, INT8_512, "vmovups", "zmm", 2 * 64)

// Four tiles of sums of 16 x 16, and two by two tiles of factors: 16 rows of 64 bytes each.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#define TILE_KERNEL(name, op, operations)                                                                                        \
    double name(const Work& work) {                                                                                              \
        const TileConfig config;                                                                                                 \
        int64_t left = work.rounds;                                                                                              \
        const int64_t stride = 64;                                                                                               \
        __asm__ volatile(LINES("ldtilecfg (%2)") LINES("tilezero %%tmm0") LINES("tilezero %%tmm1") LINES("tilezero %%tmm2")      \
                             LINES("tilezero %%tmm3") LINES("tileloadd (%1,%3,1), %%tmm4") LINES("tileloadd (%1,%3,1), %%tmm5")  \
                                 LINES("tileloadd (%1,%3,1), %%tmm6") LINES("tileloadd (%1,%3,1), %%tmm7") LINES("1:")           \
                                     LINES(op " %%tmm6, %%tmm4, %%tmm0") LINES(op " %%tmm7, %%tmm4, %%tmm1")                     \
                                         LINES(op " %%tmm6, %%tmm5, %%tmm2") LINES(op " %%tmm7, %%tmm5, %%tmm3") LINES("dec %0") \
                                             LINES("jnz 1b") LINES("tilerelease")                                                \
                         : "+r"(left)                                                                                            \
                         : "r"(numbers.values), "r"(&config), "r"(stride)                                                        \
                         : "memory", "cc");                                                                                      \
        return double(work.rounds) * 4 * (operations);                                                                           \
    }
TILE_KERNEL(amx_bf16, "tdpbf16ps", 2 * 16 * 16 * 32)
TILE_KERNEL(amx_int8, "tdpbssd", 2 * 16 * 16 * 64)

// Reads all of the memory in four streams, each a quarter: more pages are under way at once than in one.
#define READ_KERNEL(name, load, reg, width, last)                                                                         \
    double name(const Work& work) {                                                                                       \
        const size_t quarter = work.bytes / 4 / 256 * 256;                                                                \
        for (int64_t round = 0; round < work.rounds; ++round) {                                                           \
            const char* at = work.memory;                                                                                 \
            const char* const end = at + quarter;                                                                         \
            __asm__ volatile(LINES("1:") READ_STREAM(load, reg, width, "(%0)") READ_STREAM(load, reg, width, "(%0,%2,1)") \
                                 READ_STREAM(load, reg, width, "(%0,%2,2)") READ_STREAM(load, reg, width, "(%0,%3,1)")    \
                                     LINES("add $2*" width ", %0") LINES("cmp %1, %0") LINES("jb 1b") LINES(last)         \
                             : "+r"(at)                                                                                   \
                             : "r"(end), "r"(quarter), "r"(3 * quarter)                                                   \
                             : CLOBBERED);                                                                                \
        }                                                                                                                 \
        return double(work.rounds) * 4 * double(quarter);                                                                 \
    }
#define READ_STREAM(load, reg, width, address) LINES(load " " address ", %%" reg "0") LINES(load " " width address ", %%" reg "1")
READ_KERNEL(read128, "movaps", "xmm", "16", "nop")
READ_KERNEL(read256, "vmovaps", "ymm", "32", "vzeroupper")
READ_KERNEL(read512, "vmovaps", "zmm", "64", "vzeroupper")

struct Processor {
    uint32_t leaf7[4] = {}, leaf7_1[4] = {}, leaf1[4] = {}, states = 0;
    char name[49] = "unknown";
    Processor() {
        leaf(1, 0, leaf1), leaf(7, 0, leaf7);
        if (leaf7[0] >= 1) leaf(7, 1, leaf7_1);
        if (leaf1[2] >> 27 & 1) {  // the system lets programs ask which registers it saves
            uint32_t high = 0;
            __asm__ volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
        }
        for (uint32_t i = 0; i < 3 && uint32_t(__get_cpuid_max(0x80000000u, nullptr)) >= 0x80000004u; ++i) {
            uint32_t part[4];
            leaf(0x80000002u + i, 0, part);
            memcpy(name + 16 * i, part, 16);
        }
    }
    static void leaf(uint32_t number, uint32_t sub, uint32_t (&out)[4]) {
        __get_cpuid_count(number, sub, &out[0], &out[1], &out[2], &out[3]);
    }
    bool saves(uint32_t mask) const { return (states & mask) == mask; }
    bool fma() const { return saves(0x6) && leaf1[2] >> 28 & 1 && leaf1[2] >> 12 & 1; }  // with AVX
    bool avx512() const { return saves(0xE6) && leaf7[1] >> 16 & 1; }
    bool avx512_bf16() const { return avx512() && leaf7_1[0] >> 5 & 1; }
    bool avx512_vnni() const { return avx512() && leaf7[2] >> 11 & 1; }
    bool avx_vnni() const { return fma() && leaf7_1[0] >> 4 & 1; }
    bool amx(int bit) const {  // of leaf 7: 22 bf16, 24 tiles, 25 int8
        bool allowed = false;
#if defined(__linux__)
        allowed = saves(0x60000) && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#endif
        return allowed && leaf7[3] >> 24 & 1 && leaf7[3] >> bit & 1;
    }
};

#elif defined(__aarch64__)

// Sixteen sums; registers 30 and 31 hold the factors.
#define EACH_SUM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)
#define CLEAR_SUM(i) "movi v" #i ".4s, #0\n\t"
#define FMA128(i) "fmla v" #i ".4s, v30.4s, v31.4s\n\t"
double fma128(const Work& work) {
    int64_t left = work.rounds;
    __asm__ volatile(EACH_SUM(CLEAR_SUM) "ldr q30, [%1]\n\tldr q31, [%1]\n\t1:\n\t" EACH_SUM(FMA128) "subs %0, %0, #1\n\tb.ne 1b"
                     : "+r"(left)
                     : "r"(numbers.values)
                     : "memory", "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
                       "v23", "v30", "v31");
    return double(work.rounds) * 16 * 2 * 4;
}

#endif

// Where there is no kernel of its own: sums that the compiler cannot leave out.
double read_words(const Work& work) {
    const size_t words = work.bytes / sizeof(uint64_t) / 4 * 4;
    const uint64_t* const at = reinterpret_cast<const uint64_t*>(work.memory);
    uint64_t sums[4] = {};
    for (int64_t round = 0; round < work.rounds; ++round) {
        std::atomic_signal_fence(std::memory_order_seq_cst);  // each round reads anew
        for (size_t i = 0; i < words; i += 4)
            for (size_t j = 0; j < 4; ++j) sums[j] += at[i + j];
    }
    static std::atomic<uint64_t> kept;
    kept.fetch_add(sums[0] + sums[1] + sums[2] + sums[3], std::memory_order_relaxed);
    return double(work.rounds) * double(words * sizeof(uint64_t));
}

struct Ceiling {
    const char* name;
    const char* title;
    Kernel kernel;  // null: this machine has none
};

struct Machine {
    std::string name = "unknown";
    std::vector<Ceiling> ceilings;
    Kernel read = read_words;
    size_t l2 = size_t(256) << 10;  // bytes a core
};

Machine this_machine() {
    Machine m;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) m.l2 = size_t(bytes);
#endif
#if defined(__x86_64__)
    const Processor p;
    m.name = p.name;
    m.read = p.avx512() ? read512 : p.fma() ? read256 : read128;
    const Kernel none = nullptr;
    m.ceilings = {{"fma128", "fp32 FMA, 128 bit", p.fma() ? fma128 : none},
                  {"fma256", "fp32 FMA, 256 bit", p.fma() ? fma256 : none},
                  {"fma512", "fp32 FMA, 512 bit", p.avx512() ? fma512 : none},
                  {"bf16", "bf16 vdpbf16ps, 512 bit", p.avx512_bf16() ? bf16_512 : none},
                  {"int8_256", "int8 vpdpbusd, 256 bit", p.avx_vnni() ? int8_256 : none},
                  {"int8_512", "int8 vpdpbusd, 512 bit", p.avx512_vnni() ? int8_512 : none},
                  {"amx_bf16", "bf16 AMX tiles", p.amx(22) ? amx_bf16 : none},
                  {"amx_int8", "int8 AMX tiles", p.amx(25) ? amx_int8 : none}};
#elif defined(__aarch64__)
    m.name = "AArch64";
    m.ceilings = {{"fma128", "fp32 FMA, 128 bit", fma128}};
#endif
    return m;
}

// =====================================================================================================================
// Measuring
// =====================================================================================================================

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Barrier {
    int count;
    std::atomic<int> arrived{0}, phase{0};
    void wait() {
        const int before = phase;
        if (++arrived == count) arrived = 0, ++phase;
        else
            for (int spins = 0; phase == before; ++spins)  // who gives its core away to another program gets it back much later
                if (spins > 100000) std::this_thread::yield();
    }
};

// Each thread stays on a core of its own, where there are enough: a system may leave two that wait for each other on one.
void stay(size_t core, size_t threads) {
#if defined(__linux__)
    cpu_set_t may, one;
    if (sched_getaffinity(0, sizeof may, &may) != 0 || size_t(CPU_COUNT(&may)) < threads) return;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &may) || core-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        sched_setaffinity(0, sizeof one, &one);
        return;
    }
#else
    (void)core, (void)threads;
#endif
}

struct Rate {
    double best = 0, middle = 0;  // a second, all threads together
};

// `bytes`: the working set of all threads together, each reads its own part.
Rate measure(Kernel kernel, int threads, size_t bytes, double seconds) {
    const size_t part = bytes / size_t(threads) / 1024 * 1024;
    std::vector<double> windows, begins(size_t(threads), 0.0), ends = begins, done = begins;
    Barrier barrier{threads};
    int64_t rounds = 1;
    bool over = false;
    const double start = now();
    const auto run = [&](size_t me) {
        stay(me, size_t(threads));
        const size_t room = (part + huge_page) / huge_page * huge_page;
        char* const memory = static_cast<char*>(::operator new(room, std::align_val_t(huge_page)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (part >= huge_page) madvise(memory, room, MADV_HUGEPAGE);  // advice: what it refuses is only slower
#endif
        memset(memory, 1, part);
        if (me == 0) {  // how much takes a millisecond: of three tries, as this thread may be interrupted
            for (double time = 0; time < 1e-3; rounds *= 2) {
                time = 1;
                for (int i = 0; i < 3; ++i) {
                    const double before = now();
                    kernel({memory, part, 2 * rounds});
                    time = std::min(time, now() - before);
                }
            }
        }
        while (!over) {
            barrier.wait();
            begins[me] = now();
            done[me] = kernel({memory, part, rounds});
            ends[me] = now();
            barrier.wait();
            if (me == 0) {
                double all = 0;
                for (double one : done) all += one;
                windows.push_back(all / (*std::max_element(ends.begin(), ends.end()) - *std::min_element(begins.begin(), begins.end())));
                over = windows.size() >= 3 && now() - start > seconds;
            }
            barrier.wait();
        }
        ::operator delete(memory, std::align_val_t(huge_page));
    };
    std::vector<std::thread> all;
    for (size_t i = 0; i < size_t(threads); ++i) all.emplace_back(run, i);
    for (std::thread& one : all) one.join();
    std::sort(windows.begin(), windows.end());
    return {windows.back(), windows[windows.size() / 2]};
}

// =====================================================================================================================
// main
// =====================================================================================================================

std::string bytes_text(size_t bytes) {
    char text[32];
    if (bytes < 1000000) snprintf(text, sizeof text, "%.0f kB", double(bytes) / 1e3);
    else snprintf(text, sizeof text, "%.1f MB", double(bytes) / 1e6);
    return text;
}

std::vector<std::string> split(const char* list) {
    std::vector<std::string> parts(1);
    for (; *list; ++list)
        if (*list == ',') parts.emplace_back();
        else parts.back() += *list;
    return parts;
}

const char* const help =
    "ceilings [options]: the most that this machine's cores can compute and read\n\n"
    "  --threads N,N..  how many at once (1 and all)\n"
    "  --only NAME,..   some of: fma128 fma256 fma512 bf16 int8_256 int8_512 amx_bf16 amx_int8 read (all)\n"
    "  --bytes N,N..    the working sets that are read, of all threads together (three quarters of the L2 caches, 4, 11, 43 and 256 MB)\n"
    "  --seconds X      how long each is measured (0.3)\n"
    "  --json           one JSON object each; what this machine does not have is null\n";

}  // namespace

int main(int count, char** words) {
    bool json = false;
    double seconds = 0.3;
    std::vector<int> threads;
    std::vector<size_t> sets;
    std::vector<std::string> only;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const char* const value = i + 1 < count ? words[i + 1] : "";
        if (word == "--json") {
            json = true;
            continue;
        }
        if (word == "--help" || word == "-h") return fputs(help, stdout) < 0;
        bool good = i + 1 < count;
        if (word == "--threads") {
            for (const std::string& n : split(value))
                threads.push_back(atoi(n.c_str())), good = good && threads.back() > 0 && threads.back() <= 1024;
        } else if (word == "--bytes") {
            for (const std::string& n : split(value))
                sets.push_back(size_t(strtoull(n.c_str(), nullptr, 10))), good = good && sets.back() >= 65536;
        } else if (word == "--only") only = split(value);
        else if (word == "--seconds") seconds = atof(value), good = good && seconds > 0 && seconds < 1e6;
        else good = false;
        if (!good) return fprintf(stderr, "ceilings: error: %s %s: see ceilings --help\n", word.c_str(), value), 2;
        ++i;
    }
    const Machine machine = this_machine();
    if (threads.empty()) {
        threads = {1, int(std::max(1u, std::thread::hardware_concurrency()))};
        if (threads[1] == 1) threads.pop_back();
    }
    const auto wanted = [&](const char* name) { return only.empty() || std::find(only.begin(), only.end(), name) != only.end(); };
    const int columns = json ? 0 : int(threads.size());
    if (!json) {
        printf("%s, %u cores\n%-28s", machine.name.c_str(), std::thread::hardware_concurrency(), "billions a second; threads:");
        for (int n : threads) printf(" %9d", n);
        putchar('\n');
    }
    // A row: one kernel, each number of threads. bytes: 0 for arithmetic.
    const auto row = [&](const char* name, const std::string& title, Kernel kernel, const char* unit, const auto& bytes) {
        if (columns) printf("%-28s", title.c_str());
        for (int n : threads) {
            const Rate rate = kernel ? measure(kernel, n, bytes(n), seconds) : Rate();
            char best[32] = "null", middle[32] = "null";
            if (kernel) snprintf(best, sizeof best, "%.4g", rate.best / 1e9), snprintf(middle, sizeof middle, "%.4g", rate.middle / 1e9);
            if (columns) printf(" %9s", kernel ? best : "none");
            else
                printf(
                    "{\"ceiling\":\"%s\",\"title\":\"%s\",\"threads\":%d,\"bytes\":%zu,\"unit\":\"%s\","
                    "\"best\":%s,\"middle\":%s,\"cpu\":\"%s\"}\n",
                    name, title.c_str(), n, bytes(n), unit, best, middle, machine.name.c_str());
            fflush(stdout);
        }
        if (columns) printf("  %s\n", unit);
    };
    for (const Ceiling& c : machine.ceilings)
        if (wanted(c.name))
            row(c.name, c.title, c.kernel, strncmp(c.title, "int8", 4) == 0 ? "Gop/s" : "GFLOP/s", [](int) { return size_t(0); });
    if (wanted("read")) {
        if (sets.empty()) {
            const size_t each = machine.l2 / 4 * 3;
            row("read", "read, L2: " + bytes_text(each) + " a core", machine.read, "GB/s", [&](int n) { return each * size_t(n); });
            sets = {4000000, 11000000, 43000000, 256000000};
        }
        for (size_t set : sets) row("read", "read, " + bytes_text(set) + " in all", machine.read, "GB/s", [&](int) { return set; });
    }
    return ferror(stdout) || fflush(stdout) != 0;
}
