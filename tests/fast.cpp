// The fast backend computes the same bits as the plain one: every instruction set of this machine (and the text of AVX-512 in AVX2's
// instructions), every number of threads, odd shapes. And it is fast: its kernels really run as vectors.
#define BABYGPT_TEST_WIDE
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#if defined(__linux__)
#include <signal.h>
#include <ucontext.h>
#endif

#include <vector>

#include "babygpt.h"
#include "check.h"

using namespace babygpt;

namespace {

struct Set {
    const Kernels* kernels;
    const BackendFunctions* backend;
};
// Fills `sets`; returns how many there are.
int instruction_sets(Set (&sets)[5]) {
    int count = 0;
    sets[count++] = {&KernelsPortable::table, &Fast<KernelsPortable::table>::functions};
#if defined(__x86_64__) || defined(__i386__)
    if (choose(Isa::avx2).kernels == &KernelsAvx2::table) {
        sets[count++] = {&KernelsAvx2::table, &Fast<KernelsAvx2::table>::functions};
        sets[count++] = {&KernelsAvx2Wide::table, &Fast<KernelsAvx2Wide::table>::functions};
    }
    const Choice wide = choose(Isa::avx512);
    if (wide.kernels->exact.block == KernelsAvx512::table.exact.block) {
        sets[count++] = {&KernelsAvx512::table, &Fast<KernelsAvx512::table>::functions};
        if (wide.kernels != &KernelsAvx512::table) sets[count++] = {wide.kernels, wide.functions};  // with avx512_vnni
    }
#endif
    return count;
}

float small_number(uint64_t key, int64_t i) { return static_cast<float>(random_uniform(key, static_cast<uint64_t>(i)) - 0.5); }

// Everything that a run of a tape reads and writes, in T.
template <class T>
struct Bench {
    Runtime runtime;
    Tape tape{runtime};
    Array<T> weights{runtime}, gradients{runtime}, lookup{runtime}, activations{runtime};
    Array<float> kv{runtime}, logits{runtime};
    Block scratch;
    Array<float> packed{runtime};
    Array<double> losses{runtime}, partial{runtime};
    Array<int32_t> ranks{runtime}, ids{runtime}, targets{runtime}, source_ids{runtime};
    Array<float*> pages{runtime};
    Array<float> features{runtime};
    Array<Sequence> sequences{runtime}, sources{runtime};
    Regions<T> r;
    Run run;
    double squares = 0;

    Bench(const Config& config, int batch, int length, bool training, int threads, double dropout, double smoothing,
          const BackendFunctions* backend) {
        runtime.threads = threads;
        start_pool(runtime);
        const int rows = batch * length;
        CHECK_OK(record(tape, config, rows, training, dropout, batch));
        const auto fill = [](Array<T>& a, int64_t n, uint64_t key) {
            CHECK(a.resize(static_cast<size_t>(n)));
            for (int64_t i = 0; i < n; ++i) a[static_cast<size_t>(i)] = static_cast<T>(small_number(key, i));
        };
        fill(weights, tape.weight_block, 1), fill(gradients, tape.weight_block, 2), fill(lookup, tape.lookup_block(), 3);
        for (const WeightPlan& plan : tape.weights) {  // what is between the tensors is 0
            const int64_t size = plan.weight.rows * plan.weight.cols;
            for (int64_t i = size; i < round_up(size, int64_t(16)); ++i)
                weights[static_cast<size_t>(plan.weight.offset + i)] = gradients[static_cast<size_t>(plan.weight.offset + i)] = 0;
        }
        CHECK(activations.resize(static_cast<size_t>(tape.activation_block)) && losses.resize(static_cast<size_t>(rows)) &&
              ranks.resize(static_cast<size_t>(rows)) && ids.resize(static_cast<size_t>(rows)) &&
              targets.resize(static_cast<size_t>(rows)) && sequences.resize(static_cast<size_t>(batch)) &&
              partial.resize(static_cast<size_t>(square_blocks(tape))));
        CHECK(scratch.take(runtime,
                           static_cast<size_t>(backend ? backend->scratch(tape, runtime.thread_count()) : plain_scratch(tape)) * sizeof(T),
                           true));
        for (int i = 0; i < rows; ++i)
            ids[static_cast<size_t>(i)] = i * 7 % config.vocab, targets[static_cast<size_t>(i)] = i % 5 == 3 ? -1 : i * 3 % tape.head_out;
        for (int i = 0; i < batch; ++i) sequences[static_cast<size_t>(i)] = Sequence{i * length, length, 0, nullptr};
        if (config.features) {
            CHECK(features.resize(static_cast<size_t>(rows * config.features)));
            for (size_t i = 0; i < features.count; ++i) features[i] = small_number(9, static_cast<int64_t>(i));
            run.features = features.items;
        }
        for (int i = 0; i < batch && config.encoder_layers; ++i) {  // of all lengths, in another order
            Sequence& source = sequences[static_cast<size_t>(i)];
            source.source = batch - 1 - i;
            CHECK(sources.push(Sequence{run.source.rows, i * 5 % config.context + 1, 0, nullptr}));
            run.source.rows += sources[static_cast<size_t>(i)].length;
        }
        for (int i = 0; i < run.source.rows; ++i) CHECK(source_ids.push(i * 5 % config.vocab));
        run.source.sequences = Span<const Sequence>(sources.items, sources.count), run.source.ids = source_ids.items;
        r.weights = weights.items, r.gradients = gradients.items, r.lookup_gradients = lookup.items, r.activations = activations.items;
        r.scratch = reinterpret_cast<T*>(scratch.memory);
        r.losses = losses.items, r.ranks = ranks.items;
        run.rows = rows, run.sequences = Span<const Sequence>(sequences.items, sequences.count), run.ids = ids.items,
        run.targets = targets.items;
        run.training = training, run.dropout = dropout, run.label_smoothing = smoothing, run.seed = 3, run.step = 5, run.first_row[0] = 2,
        run.first_row[1] = 5;
    }
};

UpdateRule some_rule(bool uses_muon) {
    UpdateRule rule;
    rule.uses_muon = uses_muon;
    rule.muon.gradient_scale = 0.01f, rule.muon.momentum = 0.95f, rule.muon.one_minus_momentum = 0.05f, rule.muon.step_size = 0.02f;
    rule.muon.keep = 0.999f;
    AdamW& a = rule.adam;
    a.gradient_scale = 0.01f, a.beta1 = 0.9f, a.one_minus_beta1 = 0.1f, a.beta2 = 0.99f, a.one_minus_beta2 = 0.01f;
    a.step_size = 1e-3f, a.root_scale = 3.0f, a.epsilon = 1e-8f, a.decay = 1e-4f;
    return rule;
}

// A whole step: forward, backward, sum of squares, AdamW with the activations' memory far away from it.
void step(Bench<float>& b, const BackendFunctions& backend) {
    backend.forward(b.runtime, b.tape, b.r, b.run);
    backend.backward(b.runtime, b.tape, b.r, b.run);
}

bool same(const char* what, const void* a, const void* b, size_t bytes) {
    if (memcmp(a, b, bytes) == 0) return true;
    const float *x = static_cast<const float*>(a), *y = static_cast<const float*>(b);
    size_t different = 0, first = 0;
    for (size_t i = 0; i < bytes / 4; ++i) {
        const uint32_t either = bits_as<uint32_t>(x[i]) | bits_as<uint32_t>(y[i]);
#if defined(__FAST_MATH__)
        if ((either & 0x7fffffffu) == 0) continue;  // under -ffast-math Clang may lose the sign of a zero
#endif
        if (memcmp(x + i, y + i, 4) != 0 && different++ == 0) first = i;
        (void)either;
    }
    if (different == 0) return true;
    printf("  %s: %zu of %zu differ, the first is %zu: %a %a\n", what, different, bytes / 4, first, static_cast<double>(x[first]),
           static_cast<double>(y[first]));
    return false;
}
template <class T>
bool same(const char* what, const Array<T>& a, const Array<T>& b) {
    return a.count == b.count && (a.count == 0 || same(what, a.items, b.items, a.count * sizeof(T)));
}

bool same_step(const Config& config, int batch, int length, double dropout, double smoothing, const Set& set, int threads,
               Bench<float>& plain) {
    Bench<float> fast(config, batch, length, true, threads, dropout, smoothing, set.backend);
    step(fast, *set.backend);
    bool good = same("losses", plain.losses, fast.losses) && same("ranks", plain.ranks, fast.ranks) &&
                same("gradients", plain.gradients, fast.gradients) && same("lookup gradients", plain.lookup, fast.lookup);
    for (const Tensor& t : plain.tape.tensors) {  // what is still there at the end
        const size_t n = static_cast<size_t>(plain.run.on(t.side).rows * t.cols) * sizeof(float);
        if (good && t.gradient >= 0 && t.gradient_dies == 2 * static_cast<int>(plain.tape.ops.count) - 1)
            good = same(t.name, plain.activations.items + t.gradient, fast.activations.items + t.gradient, n);
    }
    if (!good)
        printf("  %s, threads %d, batch %d x %d, width %d, heads %d, vocab %d, tied %d\n", set.kernels->exact.name, threads, batch, length,
               config.width, config.heads, config.vocab, config.tied);
    return good;
}

struct Shape {
    int layers, heads, width, vocab, batch, length;
    bool tied, bias;
    Activation activation;
    double dropout, smoothing;
    Positions positions = Positions::learned;
    Architecture architecture = Architecture::gpt2;
    int kv_heads = 0;
    bool gated = false, norm_after = false;
    int encoder_layers = 0;
    bool causal = true;
    int classes = 0, features = 0;
};
constexpr int thread_counts[] = {1, 2, 3, 7};
constexpr Shape shapes[] = {
    {1, 1, 1, 1, 1, 1, true, true, Activation::gelu_tanh, 0, 0},
    {1, 1, 3, 7, 1, 2, true, true, Activation::gelu, 0, 0},
    {2, 1, 17, 96, 1, 5, false, true, Activation::gelu_tanh, 0, 0.1},
    {2, 3, 48, 257, 3, 11, true, false, Activation::gelu_tanh, 0.2, 0.1},
    {1, 2, 96, 96, 2, 96, true, true, Activation::gelu_tanh, 0, 0},
    {1, 3, 192, 97, 1, 33, false, true, Activation::gelu, 0.1, 0},
    {2, 4, 20, 31, 6, 17, true, true, Activation::gelu_tanh, 0, 0},
    {2, 3, 102, 40, 2, 19, true, true, Activation::gelu_tanh, 0.1, 0, Positions::rotary},
    {1, 6, 132, 97, 2, 33, true, false, Activation::gelu_tanh, 0, 0, Positions::rotary},
    {2, 6, 36, 40, 2, 19, false, false, Activation::silu, 0.1, 0, Positions::rotary, Architecture::llama, 2, true},
    {1, 6, 156, 97, 2, 37, true, true, Activation::silu, 0, 0, Positions::rotary, Architecture::llama, 3, true},
    {2, 4, 20, 31, 3, 17, false, true, Activation::gelu_tanh, 0, 0.1, Positions::sinusoidal, Architecture::llama, 1, true, true},
    {2, 3, 51, 31, 3, 17, true, true, Activation::relu, 0.1, 0, Positions::none, Architecture::gpt2, 1, false, true},
    {1, 4, 36, 31, 2, 9, false, true, Activation::gelu, 0, 0, Positions::learned, Architecture::gpt2, 2, true},
    // encoder-decoders, an encoder alone, classifiers
    {2, 3, 51, 31, 5, 17, true, true, Activation::relu, 0.1, 0.1, Positions::sinusoidal, Architecture::gpt2, 1, false, true, 2},
    {1, 4, 128, 97, 3, 67, false, false, Activation::gelu_tanh, 0, 0, Positions::rotary, Architecture::gpt2, 0, false, false, 1},
    {2, 2, 48, 40, 3, 67, true, true, Activation::gelu, 0.1, 0, Positions::learned, Architecture::gpt2, 0, false, false, 0, false},
    {2, 4, 40, 3, 7, 17, true, true, Activation::gelu, 0.1, 0, Positions::learned, Architecture::gpt2, 2, false, false, 0, false, 10, 13},
    {1, 2, 34, 21, 5, 33, true, true, Activation::silu, 0, 0.1, Positions::rotary, Architecture::llama, 1, true, false, 0, false, 5},
    // longer than what attention takes at a time: of queries, of keys, of both backward
    {1, 2, 20, 31, 1, 301, true, true, Activation::gelu_tanh, 0.1, 0},
    {1, 2, 64, 31, 2, 131, true, true, Activation::gelu_tanh, 0, 0, Positions::learned, Architecture::gpt2, 1, false, false, 1},
};
Config config_of(const Shape& s) {
    Config c;
    c.layers = s.layers, c.heads = s.heads, c.width = s.width, c.vocab = s.vocab, c.context = s.length + 3, c.tied = s.tied,
    c.bias = s.bias, c.activation = s.activation, c.positions = s.positions, c.architecture = s.architecture, c.kv_heads = s.kv_heads,
    c.encoder_layers = s.encoder_layers, c.causal = s.causal, c.classes = s.classes, c.features = s.features;
    c.pool_first = s.features > 0, c.head_bias = !s.causal;
    c.gated = s.gated, c.norm_after = s.norm_after, c.norm = s.architecture == Architecture::llama ? Norm::rms : Norm::layer;
    return c;
}

}  // namespace

TEST(products, "a product of matrices is wrong, or adds in another order") {
    constexpr int sizes[][3] = {{1, 1, 1},    {1, 7, 3},   {2, 17, 5},   {5, 96, 257},  {33, 48, 300}, {192, 65, 600},
                                {7, 1000, 4}, {97, 33, 3}, {1, 300, 64}, {13, 64, 513}, {20, 96, 300}};
    Set sets[5];
    const int count = instruction_sets(sets);
    Runtime runtime;
    for (const auto& size : sizes) {
        const int rows = size[0], columns = size[1], depth = size[2];
        Array<float> a(runtime), b(runtime), bias(runtime), want(runtime), have(runtime), panels(runtime), a_panels(runtime);
        CHECK(a.resize(static_cast<size_t>(rows * depth)) && b.resize(static_cast<size_t>(depth * columns)) &&
              bias.resize(static_cast<size_t>(columns)) && want.resize(static_cast<size_t>(rows * columns)) &&
              have.resize(static_cast<size_t>(rows * columns)) &&
              panels.resize(static_cast<size_t>(depth + row_group) * static_cast<size_t>(columns + 64)) &&
              a_panels.resize(static_cast<size_t>((depth + row_group) * (rows + 16))));
        for (size_t i = 0; i < a.count; ++i) a[i] = small_number(1, static_cast<int64_t>(i));
        for (size_t i = 0; i < bias.count; ++i) bias[i] = small_number(3, static_cast<int64_t>(i));
        for (int form = 0; form < 36; ++form) {
            const bool a_across = form & 1, b_across = form & 2;
            const int starts = form / 4 % 3;  // 0: nothing, 1: a bias, 2: what is there
            const Dtype dtype = static_cast<Dtype>(form / 12);
            if (dtype != Dtype::f32 && !a_across) continue;  // x W is all that such weights are for
            const Factor fa{a.items, a_across ? depth : rows, a_across ? along : down},
                fb{b.items, b_across ? depth : columns, b_across ? along : down};
            for (size_t i = 0; i < b.count; ++i) b[i] = small_number(2, static_cast<int64_t>(i));
            for (int j = 0; j < columns && dtype != Dtype::f32; ++j) {
                const auto element = [&](int k) -> float& { return b[static_cast<size_t>(fb.element(k, j) - b.items)]; };
                float biggest = 0;
                for (int k = 0; k < depth; ++k) biggest = most(biggest, element(k) < 0 ? -element(k) : element(k));
                const float scale = int8_scale(biggest);
                for (int k = 0; k < depth; ++k)
                    element(k) = dtype == Dtype::int8 ? static_cast<float>(int8_of(element(k), scale)) * scale : bf16_of(element(k));
            }
            for (int i = 0; i < rows; ++i) {
                std::vector<float> row(static_cast<size_t>(depth)), space(static_cast<size_t>(depth + row_groups(depth)));
                for (int k = 0; k < depth; ++k) row[static_cast<size_t>(k)] = *fa.element(k, i);
                const bool rounds = dtype == Dtype::int8;
                const float* x = rounded_row(rounds ? space.data() : nullptr, row.data(), depth);
                for (int j = 0; j < columns; ++j)
                    want[static_cast<size_t>(i * columns + j)] = chain(starts == 0 ? 0.0f : bias[static_cast<size_t>(j)], x,
                                                                       fb.element(0, j), b_across ? 1 : columns, depth, rounds);
            }
            for (int set = 0; set < count; ++set) {
                const Kernels& kernels = *sets[set].kernels;
                for (int i = 0; i < rows * columns; ++i)
                    have[static_cast<size_t>(i)] = starts == 2 ? bias[static_cast<size_t>(i % columns)] : 99.0f;
                const ProductKernels& by = dtype == Dtype::int8 ? kernels.whole : kernels.exact;
                Product p{have.items,
                          columns,
                          starts == 0 ? nullptr : starts == 1 ? bias.items : have.items,
                          starts == 2 ? columns : 0,
                          fa,
                          fb,
                          rows,
                          columns,
                          depth,
                          false,
                          dtype};
                if (dtype == Dtype::f32) kernels.exact.pack_b(panels.items, fb, 0, columns, depth);
                for (int j = 0; j < columns && dtype != Dtype::f32; j += kernels.exact.tile_columns)
                    kernels.pack_weights(panels.items + j / kernels.exact.tile_columns * kernels.panel_floats(dtype, depth), fb, j, columns,
                                         depth, dtype);
                const int all = (columns + kernels.exact.tile_columns - 1) / kernels.exact.tile_columns, stream = all / 4;
                if (rows == 1 && a_across) {
                    if (dtype == Dtype::int8) by.pack_a(a_panels.items, fa, 0, 1, depth), p.a.at = a_panels.items;
                    for (int k = 0; k < all - 3 * stream; ++k)
                        kernels.single_row(p, panels.items, k < stream ? k : 3 * stream + k, k < stream ? stream : 0);
                } else
                    for (int row = 0; row < rows; row += row_block) {
                        Product part = p;
                        part.rows = least(row + row_block, rows);
                        float* packed = a_across && !by.packs_a ? nullptr : a_panels.items + row * depth;
                        if (packed) by.pack_a(packed, fa, row, part.rows, depth);
                        by.block(part, packed, panels.items, row, 0, columns);
                    }
                if (!CHECK(same("product", want, have)))
                    printf("  %s: %d x %d, depth %d, form %d (the last of three dozens: int8)\n", kernels.exact.name, rows, columns, depth,
                           form);
            }
        }
    }
}

TEST(whole_numbers, "a model in int8 would round what goes in otherwise than it says, overflow, or take what is not finite for a number") {
    Set sets[5];
    const int count = instruction_sets(sets), columns = 40, depth = 70, most_rows = 5;
    std::vector<float> x(static_cast<size_t>(most_rows * depth)), w(static_cast<size_t>(depth * columns)),
        y(static_cast<size_t>(most_rows * columns));
    for (int set = 0; set < count; ++set) {
        const Kernels& kernels = *sets[set].kernels;
        const int wide = kernels.whole.tile_columns, all = (columns + wide - 1) / wide;
        std::vector<float> panels(static_cast<size_t>(all * kernels.panel_floats(Dtype::int8, depth))),
            packed(static_cast<size_t>(8 * packed_row(depth)));
        const auto multiply = [&](int rows) {
            const Factor a{x.data(), depth, along}, b{w.data(), columns, down};
            for (int i = 0; i < all; ++i)
                kernels.pack_weights(panels.data() + i * kernels.panel_floats(Dtype::int8, depth), b, i * wide, columns, depth,
                                     Dtype::int8);
            Product p{y.data(), columns, nullptr, 0, a, b, rows, columns, depth, false, Dtype::int8};
            kernels.whole.pack_a(packed.data(), a, 0, rows, depth);
            if (rows > 1) return kernels.whole.block(p, packed.data(), panels.data(), 0, 0, columns);
            p.a.at = packed.data();
            for (int i = 0; i < all; ++i) kernels.single_row(p, panels.data(), i, 0);
        };
        for (const int rows : {1, most_rows}) {
            for (const int sign : {1, -1}) {  // the largest bytes that there are
                for (float& each : x) each = 3;
                for (float& each : w) each = static_cast<float>(sign * 127) / 128;
                multiply(rows);
                for (int i = 0; i < rows * columns; ++i)
                    CHECK(y[static_cast<size_t>(i)] == static_cast<float>(sign * depth * 3 * 127) / 128);
            }
            for (size_t i = 0; i < x.size(); ++i) x[i] = small_number(5, static_cast<int64_t>(i)) * (i % 7 == 0 ? 30 : 1);
            for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(static_cast<int>(mix(i) % 255) - 127) / 1024;
            multiply(rows);
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < columns; ++j) {
                    double sum = 0;
                    for (int k = 0; k < depth; ++k) {
                        double biggest = 0;
                        for (int n = k / 32 * 32; n < k / 32 * 32 + 32 && n < depth; ++n)
                            biggest = std::max(biggest, std::fabs(static_cast<double>(x[static_cast<size_t>(i * depth + n)])));
                        const double whole = std::nearbyint(static_cast<double>(x[static_cast<size_t>(i * depth + k)]) * 64 / biggest);
                        sum += whole * biggest / 64 * static_cast<double>(w[static_cast<size_t>(k * columns + j)]);
                    }
                    CHECK(std::fabs(static_cast<double>(y[static_cast<size_t>(i * columns + j)]) - sum) < 1e-5);
                }
        }
        for (const float wrong : {NAN, INFINITY, -INFINITY})
            for (const int at : {0, 31, 45, depth - 1}) {
                float& place = x[static_cast<size_t>(2 * depth + at)];
                const float kept = place;
                place = wrong;
                multiply(most_rows);
                for (int i = 0; i < most_rows * columns; ++i) CHECK(is_finite(y[static_cast<size_t>(i)]) == (i / columns != 2));
                place = kept;
            }
    }
}

#if defined(__linux__) && defined(__x86_64__)
// Whether this machine runs the matrix unit's instructions.
bool has_matrix_unit() { return strstr(choose(Isa::automatic, true).kernels->rounded.name, "amx") != nullptr; }
// The matrix unit of a processor that has none: what its instructions do, done when they are trapped as illegal. Their encodings are from
// Intel's Software Developer's Manual, volume 2, not from an assembler.
struct MatrixUnitTrap {
    struct Unit {
        uint8_t palette = 0, rows[8] = {};
        uint16_t row_bytes[8] = {};
        uint32_t tiles[8][256] = {};
    };
    static Unit& unit() {
        static thread_local Unit of_this_thread;
        return of_this_thread;
    }
    struct sigaction before = {};
    const bool needed = !has_matrix_unit();
    MatrixUnitTrap() {
        struct sigaction action = {};
        action.sa_sigaction = &trapped, action.sa_flags = SA_SIGINFO;
        if (needed) CHECK(sigaction(SIGILL, &action, &before) == 0);
    }
    ~MatrixUnitTrap() {
        if (needed) CHECK(sigaction(SIGILL, &before, nullptr) == 0);
    }
    MatrixUnitTrap(const MatrixUnitTrap&) = delete;
    MatrixUnitTrap& operator=(const MatrixUnitTrap&) = delete;

    static void trapped(int, siginfo_t*, void* context) {
        greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
        const size_t length = run(code, registers);
        if (length == 0) {
            fprintf(stderr, "an illegal instruction that is not the matrix unit's: %02x %02x %02x %02x %02x\n", code[0], code[1], code[2],
                    code[3], code[4]);
            _Exit(1);
        }
        registers[REG_RIP] += static_cast<greg_t>(length);
    }
    // VEX.128, map 0F38, W0. Returns the instruction's length; 0: it is another one.
    static size_t run(const uint8_t* code, const greg_t* registers) {
        constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;
        const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8, third = ~code[2] >> 3 & 15, prefix = code[2] & 3;
        const int opcode = code[3], mode = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
        Unit& u = unit();
        size_t length = 5;
        uint8_t* address = nullptr;
        int64_t stride = 0;
        if (mode < 3) {
            int base = rm | b;
            if (rm == 4) {
                const uint8_t sib = code[length++];
                base = (sib & 7) | b;
                const int index = (sib >> 3 & 7) | x;
                if (index != 4) stride = registers[order[index]] << (sib >> 6);
            } else if (opcode != 0x49) return 0;
            if ((base & 7) == 5 && mode == 0) return 0;  // no base, or from the instruction on: our kernels have neither
            int32_t displacement = 0;
            if (mode == 1) displacement = static_cast<int8_t>(code[length++]);
            if (mode == 2) memcpy(&displacement, code + length, 4), length += 4;
            address = reinterpret_cast<uint8_t*>(registers[order[base]] + displacement);
        }
        if (opcode == 0x49 && prefix == 0 && mode < 3 && reg == 0) {  // ldtilecfg
            u = Unit();
            u.palette = address[0];
            memcpy(u.row_bytes, address + 16, sizeof u.row_bytes), memcpy(u.rows, address + 48, sizeof u.rows);
            bool good = u.palette == 1;
            for (int i = 1; i < 64; ++i) good = good && ((i >= 16 && i < 32) || (i >= 48 && i < 56) || address[i] == 0);
            for (int t = 0; t < 8; ++t) good = good && u.rows[t] <= 16 && u.row_bytes[t] <= 64;
            return good ? length : 0;
        }
        if (opcode == 0x49 && prefix == 0 && code[4] == 0xc0) return u = Unit(), length;  // tilerelease
        if (u.palette != 1) return 0;
        if (opcode == 0x49 && prefix == 3 && mode == 3 && rm == 0) return memset(u.tiles[reg], 0, sizeof u.tiles[reg]), length;  // tilezero
        if (opcode == 0x4b && prefix > 0 && mode < 3) {  // tileloadd, tileloaddt1; tilestored
            const bool loads = prefix != 2;
            if (loads) memset(u.tiles[reg], 0, sizeof u.tiles[reg]);
            for (int r = 0; r < u.rows[reg]; ++r) {
                uint8_t* there = address + r * stride;
                uint32_t* here = u.tiles[reg] + 16 * r;
                if (loads) memcpy(here, there, u.row_bytes[reg]);
                else memcpy(there, here, u.row_bytes[reg]);
            }
            return length;
        }
        if (opcode == 0x5c && prefix == 2 && mode == 3) {  // tdpbf16ps reg, rm, third
            for (int m = 0; m < u.rows[reg]; ++m)
                for (int k = 0; k < u.row_bytes[rm] / 4; ++k)
                    for (int n = 0; n < u.row_bytes[reg] / 4; ++n) {
                        const uint32_t left = u.tiles[rm][16 * m + k], right = u.tiles[third & 7][16 * k + n];
                        float sum = bits_as<float>(u.tiles[reg][16 * m + n]);
                        sum = madd(bits_as<float>(left << 16), bits_as<float>(right << 16), sum);
                        sum = madd(bits_as<float>(left & 0xffff0000u), bits_as<float>(right & 0xffff0000u), sum);
                        u.tiles[reg][16 * m + n] = bits_as<uint32_t>(sum);
                    }
            return length;
        }
        return 0;
    }
};
#else
struct MatrixUnitTrap {
    MatrixUnitTrap() {}  // there is nothing to trap
};
#endif

// The ways to multiply factors in bf16 that can run here.
int rounding_ways(const ProductKernels* ways[9], const Set* sets, int count) {
    int n = 0;
    for (int i = 0; i < count; ++i) ways[n++] = &sets[i].kernels->rounded;
#if defined(__x86_64__) || defined(__i386__)
    if (choose(Isa::avx2).kernels == &KernelsAvx2::table) ways[n++] = &TestPairProducts::table, ways[n++] = &trapped_tiles;
    if (choose(Isa::avx512).kernels->exact.block == KernelsAvx512::table.exact.block && __builtin_cpu_supports("avx512bf16"))
        ways[n++] = &fast_pairs;
    const ProductKernels& best = choose(Isa::automatic, true).kernels->rounded;
    if (best.numbers > 1) ways[n++] = &best;
#endif
    return n;
}

TEST(rounded_products, "training in bf16 would multiply other numbers than the rounded ones, or leave some out") {
    constexpr int sizes[][3] = {{1, 1, 1},      {3, 7, 3},    {2, 17, 5},  {5, 96, 257}, {33, 48, 300},
                                {192, 65, 600}, {7, 200, 31}, {97, 33, 3}, {40, 64, 64}, {1030, 5, 1040}};
    Set sets[5];
    const int count = instruction_sets(sets);
    const ProductKernels* ways[9];
    const int all_ways = rounding_ways(ways, sets, count);
    Runtime runtime;
    Config config;
    config.layers = config.heads = 1, config.width = 8, config.context = 8, config.vocab = 8;
    Bench<float> bench(config, 1, 8, true, 1, 0, 0, sets[0].backend);  // for its scratch
    const MatrixUnitTrap trap;
    for (const auto& size : sizes) {
        const int rows = size[0], columns = size[1], depth = size[2];
        Array<float> a(runtime), b(runtime), bias(runtime), want(runtime), have(runtime), again(runtime);
        const size_t n = static_cast<size_t>(rows * columns);
        CHECK(a.resize(static_cast<size_t>(rows * depth)) && b.resize(static_cast<size_t>(depth * columns)) &&
              bias.resize(static_cast<size_t>(columns)) && want.resize(n) && have.resize(n) && again.resize(n));
        for (size_t i = 0; i < a.count; ++i) a[i] = small_number(1, static_cast<int64_t>(i));
        for (size_t i = 0; i < b.count; ++i) b[i] = small_number(2, static_cast<int64_t>(i));
        for (size_t i = 0; i < bias.count; ++i) bias[i] = small_number(3, static_cast<int64_t>(i));
        for (int form = 0; form < (rows > 1000 ? 2 : 12); ++form) {  // many rows: A does not fit in its panels at once
            const bool a_across = form & 1, b_across = form & 2;
            const int starts = form / 4;  // 0: nothing, 1: a bias, 2: what is there
            const Factor fa{a.items, a_across ? depth : rows, a_across ? along : down},
                fb{b.items, b_across ? depth : columns, b_across ? along : down};
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < columns; ++j) {
                    float s = starts == 0 ? 0.0f : bias[static_cast<size_t>(j)];
                    for (int k = 0; k < depth; ++k) s = madd(bf16_of(*fa.element(k, i)), bf16_of(*fb.element(k, j)), s);
                    want[static_cast<size_t>(i * columns + j)] = s;
                }
            for (int way = 0; way < all_ways; ++way) {
                const ProductKernels& by = *ways[way];
                for (const int threads : {1, 3}) {
                    runtime.threads = threads;
                    Array<float>& to = threads == 1 ? have : again;
                    for (int i = 0; i < rows * columns; ++i)
                        to[static_cast<size_t>(i)] = starts == 2 ? bias[static_cast<size_t>(i % columns)] : 99.0f;
                    const float* start = starts == 0 ? nullptr : starts == 1 ? bias.items : to.items;
                    const Product p{to.items, columns, start, starts == 2 ? columns : 0, fa, fb, rows, columns, depth};
                    Walk(*sets[0].kernels, runtime, bench.tape, bench.r, bench.run).product(by, p);
                }
                bool good = same("with 3 threads", have, again);
                if (by.numbers == 1) good = good && same("rounded product", want, have);
                double worst = 0;
                for (size_t i = 0; i < n; ++i)
                    worst = most(worst, fabs(static_cast<double>(have[i]) - static_cast<double>(want[i])) / (1 + 0.01 * depth));
                if (!CHECK(good && worst <= 1e-6))
                    printf("  %s: %d x %d, depth %d, form %d: off by %g\n", by.name, rows, columns, depth, form, worst);
            }
        }
    }
}

TEST(not_finite, "an overflow in training with bf16 would look like a number") {
    Set sets[5];
    const int count = instruction_sets(sets);
    const ProductKernels* ways[9];
    const int all_ways = rounding_ways(ways, sets, count);
    for (int way = 0; way < all_ways; ++way)
        for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffffffffu, 0x7f800001u, 0x7f7fffffu}) {
            float from[64], panel[32 * 64 + 16];
            for (int i = 0; i < 64; ++i) from[i] = bits_as<float>(bits);
            const ProductKernels& by = *ways[way];
            by.pack_b(panel, Factor{from, 1, along}, 0, by.tile_columns, 1);
            const uint32_t word = bits_as<uint32_t>(panel[0]), half = by.numbers == 1 ? word : word << 16;
            CHECK((half & 0x7f800000u) == 0x7f800000u && (half & 0xffffu) == 0);
            const bool is_number = (bits & 0x7fffffu) == 0 || bits == 0x7f7fffffu;
            CHECK(((half & 0x7fffffu) == 0) == is_number);
        }
}

TEST(bf16, "a number would be rounded to another one than the nearest, or a finite one to infinity") {
    for (int64_t n = 0; n < 100000; ++n) {
        const uint32_t bits = static_cast<uint32_t>(mix(static_cast<uint64_t>(n))) & (n % 2 ? 0xff7fffffu : 0xffff8fffu);
        const float x = bits_as<float>(bits);
        if (!is_finite(static_cast<double>(x))) continue;
        const float rounded = bf16_of(x);
        CHECK((bits_as<uint32_t>(rounded) & 0xffffu) == 0 && is_finite(static_cast<double>(rounded)));
        const double away = fabs(static_cast<double>(x) - static_cast<double>(rounded));
        for (const uint32_t step : {0x10000u, 0xffff0000u}) {  // no neighbour is nearer
            const double other = static_cast<double>(bits_as<float>(bits_as<uint32_t>(rounded) + step));
            if (is_finite(other)) CHECK(away <= fabs(static_cast<double>(x) - other));
        }
    }
    CHECK(bf16_of(3.4e38f) < 3.39e38f && bf16_of(-3.4028234e38f) > -3.39e38f && bf16_of(1e-45f) >= 0);
}

TEST(whole_steps, "training gives other bits on another processor, with another number of threads, or than the plain backend") {
    Set sets[5];
    const int count = instruction_sets(sets);
    for (const Shape& s : shapes) {
        const Config config = config_of(s);
        Bench<float> plain(config, s.batch, s.length, true, 1, s.dropout, s.smoothing, nullptr);
        step(plain, *plain_backend());
        for (int set = 0; set < count; ++set)
            for (const int threads : thread_counts)
                if (set == 1 || threads == 3)
                    CHECK(same_step(config, s.batch, s.length, s.dropout, s.smoothing, sets[set], threads, plain));
    }
}

#if defined(__x86_64__) || defined(__i386__)
static constexpr Kernels pairs_in_software = with_rounded(KernelsAvx2Wide::table, TestPairProducts::table),
                         tiles_trapped = with_rounded(KernelsAvx2Wide::table, trapped_tiles);
#endif

TEST(whole_steps_in_bf16, "training in bf16 gives other bits with another number of threads, or goes astray") {
    const MatrixUnitTrap trap;
    Set sets[8];
    int count = 0;
    {
        Set some[5];
        for (const int n = instruction_sets(some); count < n; ++count) sets[count] = some[count];
    }
#if defined(__x86_64__) || defined(__i386__)
    if (count > 1) {
        sets[count++] = {&pairs_in_software, &Fast<pairs_in_software>::functions};
        sets[count++] = {&tiles_trapped, &Fast<tiles_trapped>::functions};
    }
    const Choice best = choose(Isa::automatic, true);
    if (best.kernels->rounded.numbers > 1) sets[count++] = {best.kernels, best.functions};
#endif
    for (size_t k = 1; k < sizeof shapes / sizeof shapes[0]; ++k) {
        const Shape& s = shapes[k];
        if (k % 2 == 0 && s.length < 100) continue;  // half of them: the products are few
        const Config config = config_of(s);
        const auto run = [&](const Set& set, bool rounds, int threads, Array<float>& gradients) {
            Bench<float> b(config, s.batch, s.length, true, threads, s.dropout, s.smoothing, set.backend);
            b.tape.rounds = rounds;
            step(b, *set.backend);
            gradients.clear();  // taken from b, they would outlive its runtime
            CHECK(gradients.append(b.gradients.items, b.gradients.count));
        };
        Runtime runtime;
        Array<float> exact(runtime), rounded(runtime);
        run(sets[0], false, 1, exact), run(sets[0], true, 1, rounded);
        double biggest = 0;
        for (const float g : exact) biggest = most(biggest, fabs(static_cast<double>(g)));
        const auto apart = [&](const Array<float>& a, const Array<float>& b) {
            double worst = 0;
            for (size_t i = 0; i < a.count; ++i) worst = most(worst, fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])) / biggest);
            return worst;
        };
        const double by_rounding = apart(exact, rounded);
        if (!CHECK(by_rounding < 0.08 && (by_rounding > 1e-5 || config.width < 16)))
            printf("  %g, batch %d x %d, width %d, vocab %d\n", by_rounding, s.batch, s.length, config.width, config.vocab);
        for (int i = 0; i < count; ++i) {
            Array<float> one(runtime), three(runtime);
            run(sets[i], true, 1, one), run(sets[i], true, 3, three);
            CHECK(same("gradients with 3 threads", one, three));
            const ProductKernels& by = sets[i].kernels->rounded;
            if (!CHECK(by.numbers == 1 ? same("gradients", rounded, one) : apart(rounded, one) <= (by.attention ? 2 : 1) * by_rounding))
                printf("  %g of %g: %s, batch %d x %d, width %d, vocab %d\n", apart(rounded, one), by_rounding, by.name, s.batch, s.length,
                       config.width, config.vocab);
        }
    }
}

#if defined(__x86_64__) || defined(__i386__)
TEST(attention_by_tiles, "attention by a matrix unit would mix other rows than those that a query sees, or leave some out") {
    const auto attention = tiles_trapped.rounded.attention;
    if (choose(Isa::avx2).kernels != &KernelsAvx2::table) SKIP("a processor without AVX2");
    if (!strstr(trapped_tiles.name, "tiles")) SKIP("the assembler knows no matrix unit");
    const MatrixUnitTrap trap;
    for (const Shape& s : shapes) {
        const Config config = config_of(s);
        Bench<float> exact(config, s.batch, s.length, true, 1, s.dropout, 0, &Fast<tiles_trapped>::functions),
            tiles(config, s.batch, s.length, true, 1, s.dropout, 0, &Fast<tiles_trapped>::functions);
        for (size_t number = 0; number < exact.tape.ops.count; ++number) {
            const Op& op = exact.tape.ops[number];
            if (op.kind != OpKind::attention) continue;
            for (Bench<float>* b : {&exact, &tiles})
                for (size_t i = 0; i < b->activations.count; ++i) b->activations[i] = 2 * small_number(number, static_cast<int64_t>(i));
            for (const bool backward : {false, true}) {
                for (Bench<float>* b : {&exact, &tiles}) {
                    const Work work{b->tape, b->r, b->run, static_cast<int>(number)};
                    const int units = static_cast<int>(b->run.on(op.side).sequences.size) * op.kv_heads;
                    (b == &exact ? tiles_trapped.attention : attention)(work, 0, units, b->r.scratch, backward);
                }
                for (const int tensor : {backward ? op.x : op.y, backward ? op.x2 : op.aux}) {  // aux: the softmax's sums
                    if (tensor == nothing) continue;
                    const Tensor& t = exact.tape.at(tensor);
                    const int64_t at = backward ? t.gradient : t.offset;
                    double biggest = 0, worst = 0;
                    for (int64_t i = at; i < at + exact.run.on(t.side).rows * t.cols; ++i) {
                        const double want = static_cast<double>(exact.activations[static_cast<size_t>(i)]);
                        biggest = most(biggest, fabs(want));
                        worst = most(worst, fabs(want - static_cast<double>(tiles.activations[static_cast<size_t>(i)])));
                    }
                    if (!CHECK(worst <= 0.01 * biggest && (worst > 0 || s.width < 4)))
                        printf("  %s%s: off by %g of %g, batch %d x %d, width %d, heads %d\n", backward ? "gradient of " : "", t.name,
                               worst, biggest, s.batch, s.length, s.width, s.heads);
                }
            }
        }
    }
}
#endif

TEST(close_to_double, "the fast backend computes something else than the mathematics in double") {
    const Shape& s = shapes[3];
    const Config config = config_of(s);
    Bench<double> exact(config, s.batch, s.length, true, 1, s.dropout, s.smoothing, nullptr);
    plain_forward(exact.tape, exact.r, exact.run);
    plain_backward(exact.tape, exact.r, exact.run);
    Set sets[5];
    const int count = instruction_sets(sets);
    for (int set = 0; set < count; ++set) {
        Bench<float> fast(config, s.batch, s.length, true, 2, s.dropout, s.smoothing, sets[set].backend);
        step(fast, *sets[set].backend);
        double difference = 0, biggest = 0;
        for (size_t i = 0; i < exact.gradients.count; ++i) {
            const double d = exact.gradients[i] - static_cast<double>(fast.gradients[i]);
            difference = most(difference, d < 0 ? -d : d),
            biggest = most(biggest, exact.gradients[i] < 0 ? -exact.gradients[i] : exact.gradients[i]);
        }
        if (!CHECK(difference <= 1e-5 * biggest)) printf("  %s: relative error %g\n", sets[set].kernels->exact.name, difference / biggest);
    }
}

static void compare_updates(const UpdateRule& rule, const Shape& shape) {
    Set sets[5];
    const int count = instruction_sets(sets);
    const Config config = config_of(shape);
    Bench<float> plain(config, 1, 3, true, 1, 0, 0, nullptr);
    Array<float> m(plain.runtime), v(plain.runtime);
    const auto moments = [&](Array<float>& first, Array<float>& second) {
        CHECK(first.resize(plain.weights.count) && second.resize(plain.weights.count));
        for (size_t i = 0; i < first.count; ++i) {
            first[i] = i % 3 == 0 ? 1e-31f : plain.weights[i] * 0.1f;
            second[i] = i % 3 == 0 ? 1e-37f : plain.weights[i] * plain.weights[i];
        }
        for (const WeightPlan& plan : plain.tape.weights) {
            const int64_t size = plan.weight.rows * plan.weight.cols;
            for (int64_t i = size; i < round_up(size, int64_t(16)); ++i)
                first[static_cast<size_t>(plan.weight.offset + i)] = second[static_cast<size_t>(plan.weight.offset + i)] = 0;
        }
    };
    moments(m, v);
    const double squares = plain_square_sum(plain.runtime, plain.tape, plain.r, plain.partial.items);
    Bench<float> start(config, 1, 3, true, 1, 0, 0, nullptr);
    Array<float> m0(plain.runtime), v0(plain.runtime);
    CHECK(m0.append(m.items, m.count) && v0.append(v.items, v.count));
    plain_update(plain.runtime, plain.tape, plain.r, plain.weights.items, m.items, v.items, rule);
    for (int set = 0; set < count; ++set)
        for (const int threads : thread_counts) {
            const BackendFunctions& backend = *sets[set].backend;
            Bench<float> fast(config, 1, 3, true, threads, 0, 0, &backend);
            Array<float> first(fast.runtime), second(fast.runtime);
            CHECK(first.append(m0.items, m0.count) && second.append(v0.items, v0.count));
            const double sum = backend.square_sum(fast.runtime, fast.tape, fast.r, fast.partial.items);
            CHECK(memcmp(&sum, &squares, sizeof sum) == 0);
            backend.update(fast.runtime, fast.tape, fast.r, fast.weights.items, first.items, second.items, rule);
            CHECK(same("weights", plain.weights, fast.weights) && same("first moments", m, first) && same("second moments", v, second) &&
                  same("gradients", plain.gradients, fast.gradients) && same("lookup gradients", plain.lookup, fast.lookup));
        }
}

TEST(activations, "an activation in float is not what it is in double") {
    for (Activation activation : {Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu})
        for (double x = -12; x <= 12; x += 1.0 / 256) {  // a float, too
            const float narrow = static_cast<float>(x), size = x < -1 || x > 1 ? static_cast<float>(fabs(x)) : 1.0f;
            const double off = static_cast<double>(activate(narrow, activation)) - activate(x, activation),
                         slope_off = static_cast<double>(activate_derivative(narrow, activation)) - activate_derivative(x, activation);
            if (!CHECK(fabs(off) <= 2e-7 * static_cast<double>(size) &&
                       fabs(slope_off) <= (activation == Activation::gelu_tanh ? 2.5e-6 : 1e-6)))
                printf("  activation %d at %g: %g, its slope %g\n", static_cast<int>(activation), x, off, slope_off);
        }
}

TEST(update, "the optimizer's step differs between the backends") {
    for (const Shape& shape : {shapes[3], shapes[9]})  // of GPT-2's type and Llama's
        for (bool uses_muon : {false, true}) compare_updates(some_rule(uses_muon), shape);
    for (int dim = 1; dim <= 4; ++dim) {  // keys and values of so few columns
        Shape shape{1, 6, 6 * dim, 31, 1, 3, true, true, Activation::gelu_tanh, 0, 0};
        shape.kv_heads = 1;
        compare_updates(some_rule(true), shape);
    }
}

TEST(muon, "Muon's step does not go equally far in all directions, or is not the momentum's") {
    for (int variant = 0; variant < 2; ++variant) {
        const bool is_wide = variant == 0;
        const int in = is_wide ? 24 : 60, out = is_wide ? 60 : 24, n = 24;
        std::vector<float> w(static_cast<size_t>(in * out)), u(w.size()), space(5 * 24 * 24);
        for (size_t i = 0; i < u.size(); ++i) u[i] = small_number(9, static_cast<int64_t>(i)) * 1e-4f;
        muon_step(w.data(), u.data(), in, out, out, -1.0f, space.data(), PlainProducts());
        // w = Q u, so w w^T has all its eigenvalues near to 1 (near to out / in): it is near to the unit matrix, and w . u is large.
        const auto element = [&](const std::vector<float>& x, int i, int k) {
            return static_cast<double>(is_wide ? x[static_cast<size_t>(i * out + k)] : x[static_cast<size_t>(k * out + i)]);
        };
        double off = 0, aligned = 0, length = 0;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
                double sum = 0;
                for (int k = 0; k < 60; ++k) sum += element(w, i, k) * element(w, j, k);
                sum /= is_wide ? 60.0 / 24 : 1;
                off += i == j ? (sum - 1) * (sum - 1) : sum * sum;
            }
        for (size_t i = 0; i < w.size(); ++i)
            aligned += static_cast<double>(w[i]) * static_cast<double>(u[i]),
                length += static_cast<double>(u[i]) * static_cast<double>(u[i]);
        CHECK(off / n < 0.25);  // Newton-Schulz with these numbers leaves them between about 0.5 and 1.3
        CHECK(aligned > 0.7 * root(length * n * (is_wide ? 60.0 / 24 : 1)));
    }
}

// Reads `length` ids with a KV cache, of floats or (narrow) of bf16, so many at a time; returns the logits of the last.
static void talk(Bench<float>& b, const BackendFunctions& backend, const Config& config, int length, int at_a_time, bool narrow) {
    const int pages = (config.context + kv_page - 1) / kv_page;
    CHECK(b.kv.resize(static_cast<size_t>(b.tape.kv_page_block() * pages)) && b.pages.resize(static_cast<size_t>(pages)) &&
          b.logits.resize(static_cast<size_t>(config.vocab)) && b.packed.resize(static_cast<size_t>(packed_block(backend, b.tape))));
    for (int i = 0; i < pages; ++i) b.pages[static_cast<size_t>(i)] = b.kv.items + b.tape.kv_page_block() * (pages - 1 - i);
    pack_all(backend, b.runtime, b.tape, b.r.weights, b.packed.items);
    b.r.packed = b.packed.count ? b.packed.items : nullptr;
    b.run.sequences.size = 1;
    for (int i = 0; i < length; i += at_a_time) {
        b.sequences[0] = Sequence{0, least(at_a_time, length - i), i, b.pages.items, b.logits.items};
        b.sequences[0].narrow = narrow;
        b.run.rows = b.sequences[0].length, b.run.ids = b.ids.items + i, b.run.targets = b.targets.items + i;
        b.r.losses = b.losses.items + i, b.r.ranks = b.ranks.items + i;
        backend.forward(b.runtime, b.tape, b.r, b.run);
        b.run.source.rows = 0;  // it has been read; what the decoder sees of it stays
    }
}

TEST(talking, "a token read with the KV cache gives other logits than the whole text read at once") {
    Set sets[5];
    const int count = instruction_sets(sets);
    for (const Shape& s : shapes) {
        if (!s.causal) continue;
        const Config config = config_of(s);
        for (const bool narrow : {false, true}) {
            Bench<float> plain(config, 1, s.length, false, 1, 0, 0, nullptr);
            talk(plain, *plain_backend(), config, s.length, s.length, narrow);
            for (int set = 0; set < count; ++set)
                for (int way = 0; way < 6; ++way) {
                    Bench<float> fast(config, 1, s.length, false, way < 3 ? 1 : 3, 0, 0, sets[set].backend);
                    const int at_a_time[] = {s.length, 1, (s.length + 2) / 3};
                    talk(fast, *sets[set].backend, config, s.length, at_a_time[way % 3], narrow);
                    CHECK(same("logits", plain.logits, fast.logits) && same("losses", plain.losses, fast.losses) &&
                          same("ranks", plain.ranks, fast.ranks));
                }
        }
    }
}

TEST(waiting, "a worker would have to be woken for the next job while this one is done, or keep a core busy when there is none") {
    Runtime runtime;
    runtime.threads = 2;
    start_pool(runtime);
    if (!pool_of(runtime)) SKIP("there is one core");
    Pool& pool = *pool_of(runtime);
    const auto sleeps = [&] { return pool.worker[0].state.load() == Pool::asleep; };
    const auto after = [](double seconds, const auto& ready) {
        const double start = seconds_now();
        while (!ready() && seconds_now() - start < seconds) Pool::yield();
        return seconds_now() - start;
    };
    static thread_local int of_thread;
    const int* const caller = &of_thread;
    bool awake = false;
    for (const double end = seconds_now() + 10; !awake && seconds_now() < end;) {  // once the machine lets both run at a time
        std::atomic<int> began{0};
        parallel(runtime, 2, [&](int) {
            began.fetch_add(1);
            if (&of_thread != caller) return;
            after(1, [&] { return began.fetch_add(0) > 1; });
            awake = after(10 * spin_seconds, [] { return false; }) < open_job_seconds / 2 && !sleeps();
        });
    }
    CHECK(awake);
    after(10, sleeps);
    CHECK(sleeps());
}

TEST(speed, "a compiler no longer makes vectors of the kernels") {
    Runtime runtime;
    runtime.threads = 1;
    constexpr int rows = 192, size = 384;
    Array<float> a(runtime), b(runtime), c(runtime), panels(runtime);
    CHECK(a.resize(rows * size) && b.resize(size * size) && c.resize(rows * size) && panels.resize(size * size));
    const Kernels& kernels = *choose(Isa::automatic).kernels;
    if (&kernels == &KernelsPortable::table) SKIP("this machine has only the portable kernels");
    const Product p{c.items, size, nullptr, 0, Factor{a.items, size, along}, Factor{b.items, size, down}, rows, size, size};
    kernels.exact.pack_b(panels.items, p.b, 0, size, size);
    double best = 0;
    for (int i = 0; i < 20; ++i) {
        const double start = seconds_now();
        kernels.exact.block(p, nullptr, panels.items, 0, 0, size);
        best = most(best, 2e-9 * rows * size * size / (seconds_now() - start));
    }
    const double ceiling = fma_ceiling(runtime, 1);
#if defined(__OPTIMIZE__)
    if (!CHECK(best >= 0.25 * ceiling)) printf("  %.1f GFLOP/s of %.1f\n", best, ceiling);
#else
    (void)best, (void)ceiling;
#endif
}

int main(int count, char** words) { return run_tests(count, words); }
