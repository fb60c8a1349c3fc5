// The GPU's backend, babygpt_cuda.cu itself, compiled for the processor by cuda_emulator.h and compared with the plain backend. What stands here
// is "the same" where each tensor's largest difference is at most 1e-5 of its largest number. With ON_A_GPU defined (make cuda-test) it is what
// nvcc made of that file, on the GPU that is here; then some tests are larger, and those that need the emulator's eyes are left out.
#include "babygpt.h"
#include "check.h"
#ifdef ON_A_GPU
#include <cuda_runtime_api.h>
#include <math.h>
#include <time.h>
#else
#include "cuda_emulator.h"
//
#include "babygpt_cuda.cu"
#endif
//
#include <string>
#include <vector>

using namespace babygpt;

namespace {

#define TRY(expression)                    \
    do {                                   \
        const Status tried = (expression); \
        if (!tried.ok()) return tried;     \
    } while (false)

#ifdef ON_A_GPU
constexpr double usual = 5e-5;  // its exp, its division and the order of its sums are others
bool no_faults() { return true; }
#else
constexpr double usual = 1e-5;
bool no_faults() { return emulator::faults() == 0; }
#endif

uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
double uniform(uint64_t key, uint64_t i) { return static_cast<double>(mixed(key ^ mixed(i)) >> 11) * 0x1p-53; }

// What a case trains on, and how.
struct Case {
    const char* name;
    Config config;
    TrainConfig how;
    bool examples = false, lora = false;
    int steps = 2;
    const char* targets = "";
    Precision precision = Precision::f32;
    double tolerance = usual;
    Backend reference = Backend::plain;
};
Config small(const char* architecture) {
    Config c;
    CHECK_OK(preset_architecture(architecture, c));
    c.layers = 1, c.heads = 3, c.width = 18, c.hidden = 20, c.context = 11, c.vocab = 37;
    return c;
}
#ifdef ON_A_GPU
Config baby(int vocab) {
    Config c;
    CHECK_OK(preset("baby", c));
    c.vocab = vocab;
    return c;
}
#endif
TrainConfig some(int batch) {
    TrainConfig how;
    how.batch = batch, how.steps = 10, how.warmup = 0, how.lr = 1e-2;
    how.beta1 = 0;       // moment1 is the gradient
    how.epsilon = 1e-3;  // without it AdamW would make much of the rounding where a gradient is nearly nothing
    return how;
}
std::vector<int32_t> text(size_t n, int vocab) {
    std::vector<int32_t> ids(n);
    for (size_t i = 0; i < n; ++i)  // much of it is one id, as a blank is
        ids[i] = i % 3 == 0 ? 7 % vocab : static_cast<int32_t>(mixed(i) % static_cast<uint64_t>(vocab));
    return ids;
}

// A model, its data and its trainer on a backend.
struct Learner {
    Runtime runtime;
    Model model;
    Adapter adapter;
    Data data;
    Trainer trainer;
    std::vector<int32_t> ids;
    std::vector<float> features;
    std::vector<Example> examples;

    Status create(Backend backend, const Case& c, uint64_t seed = 5) {
        runtime.backend = backend, runtime.threads = backend == Backend::cpu ? 0 : 1;
        runtime.precision = c.precision;
        TRY(model.create(runtime, c.config, Tokenizer(), seed));
        for (const Weight& w : model.names)  // biases, too, and nothing too even
            for (int64_t i = w.offset; i < w.offset + w.rows * w.cols; ++i)
                model.weights[i] += static_cast<float>(uniform(9, static_cast<uint64_t>(i)) - 0.5) * 0.1f;
        const Config& full = model.config;
        ids = text(c.examples ? 500 : static_cast<size_t>(4 * full.context + 30), full.vocab);
        if (!c.examples) TRY(data.create(runtime, Span<const int32_t>(ids)));
        else {
            features.resize(ids.size() * static_cast<size_t>(full.features + 1));
            for (size_t i = 0; i < features.size(); ++i) features[i] = static_cast<float>(uniform(3, i)) - 0.5f;
            for (size_t n = 0; n < 9; ++n) {
                Example e;
                const size_t length = n % 3 == 0 ? static_cast<size_t>(full.context) : 1 + mixed(n) % static_cast<uint64_t>(full.context);
                e.ids = {ids.data() + 40 * n, length}, e.targets = {ids.data() + 40 * n + 1, full.classes > 0 ? 1 : length};
                if (full.encoder_layers > 0) e.source = {ids.data() + 7 * n, 1 + mixed(n + 99) % static_cast<uint64_t>(full.context)};
                if (full.features > 0) e.features = {features.data() + 5 * n, length * static_cast<size_t>(full.features)};
                e.weight = n % 4 == 0 ? 0.5f : 1.0f;
                examples.push_back(e);
            }
            for (int32_t& id : ids)
                if (full.classes > 0) id %= full.classes;
            TRY(data.create(runtime, Span<const Example>(examples.data(), examples.size())));
        }
        if (!c.lora) return trainer.create(runtime, model, c.how, data);
        TRY(adapter.create(runtime, model, {3, 6, c.targets}));
        for (int64_t i = 0; i < adapter.block; ++i)
            adapter.weights[i] += static_cast<float>(uniform(8, static_cast<uint64_t>(i)) - 0.5) * 0.1f;
        ++adapter.version;
        return trainer.create(runtime, model, adapter, c.how, data);
    }
};

// The largest relative error of a weight's part of a block.
double distance(Span<const Weight> names, const float* a, const float* b, double tolerance, const char* what, const char* where) {
    double worst = 0;
    for (const Weight& w : names) {
        double difference = 0, reference = 1e-6;
        for (int64_t i = w.offset; i < w.offset + w.rows * w.cols; ++i) {
            const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]), r = fabs(static_cast<double>(a[i]));
            difference = fabs(d) <= 1e300 ? fmax(difference, fabs(d)) : 1e300;
            reference = fmax(reference, r);
        }
        if (difference / reference > tolerance) printf("  %s, %s of %s: off by %.2g of %.2g\n", where, what, w.name, difference, reference);
        worst = fmax(worst, difference / reference);
    }
    return worst;
}

void compare(const Case& c) {
    const double tolerance = c.tolerance;
    Learner plain, cuda;
    if (!CHECK_OK(plain.create(c.reference, c)) || !CHECK_OK(cuda.create(Backend::cuda, c))) return;
    StepResult a, b;
    const Span<const Weight> names = c.lora ? plain.adapter.names : plain.model.names;
    double gradients = 0, weights = 0;
    for (int step = 0; step < c.steps; ++step) {
        CHECK_OK(plain.trainer.step(a));
        CHECK_OK(cuda.trainer.step(b));
        if (!CHECK(fabs(a.loss - b.loss) <= tolerance * a.loss) || !CHECK(fabs(a.grad_norm - b.grad_norm) <= tolerance * a.grad_norm))
            printf("  %s, step %d: loss %.9g and %.9g, norm %.9g and %.9g\n", c.name, step, a.loss, b.loss, a.grad_norm, b.grad_norm);
        if (step > 0) continue;
        CHECK_OK(cuda.trainer.fetch());
        gradients = distance(names, plain.trainer.moment1, cuda.trainer.moment1, tolerance, "the gradient", c.name);
    }
    CHECK_OK(cuda.trainer.fetch());
    weights = distance(names, c.lora ? plain.adapter.weights : plain.model.weights, c.lora ? cuda.adapter.weights : cuda.model.weights,
                       tolerance, "the weights", c.name);
    const double wide = c.precision == Precision::bf16 ? 2 * tolerance : tolerance;  // AdamW makes much of a small gradient's rounding
    CHECK(gradients <= tolerance && weights <= wide);
    Evaluation e, f;
    CHECK_OK(plain.trainer.evaluate(plain.data, e));
    CHECK_OK(cuda.trainer.evaluate(cuda.data, f));
    CHECK(fabs(e.loss - f.loss) <= tolerance * e.loss && e.tokens == f.tokens);
    CHECK(fabs(e.top1 - f.top1) <= 0.02 + tolerance &&
          fabs(e.top5 - f.top5) <= 0.02 + tolerance);  // two logits may be equal but for rounding
    CHECK_OK(evaluate(cuda.runtime, cuda.model, cuda.data, f, 3, nullptr, nullptr, c.lora ? &cuda.adapter : nullptr));
    CHECK(fabs(e.loss - f.loss) <= tolerance * e.loss);
    CHECK(no_faults());
    fflush(stdout);
    printf("%-34s gradients off by at most %.1g, weights after %d steps by %.1g\n", c.name, gradients, c.steps, weights);
}

}  // namespace

TEST(gpt2, "GPT-2 would learn otherwise on a GPU") {
    Case c{"gpt2", small("gpt2"), some(3)};
    c.config.layers = 2, c.config.hidden = 70;
    compare(c);
    c.name = "gpt2, dropout, smoothing, 2 parts", c.how.dropout = 0.2, c.how.label_smoothing = 0.1, c.how.accumulate = 2;
    compare(c);
    c = Case{"gpt2, erf, untied, long, large V", small("gpt2"), some(4)};
    c.config.activation = Activation::gelu, c.config.tied = false, c.config.context = 70, c.config.vocab = 300;
    c.config.head_bias = true;  // whose gradient is a sum of each chunk's
    compare(c);
    c = Case{"gpt2, rotary, 2 kv heads of 4", small("gpt2"), some(2)};
    c.config.positions = Positions::rotary, c.config.heads = 4, c.config.kv_heads = 2, c.config.width = 24, c.config.head_bias = true;
    c.config.activation = Activation::relu;
    compare(c);
    c = Case{"gpt2, a head of 1101", small("gpt2"), some(1)};  // rows of logits that a block has
    c.config.vocab = 1101, c.config.context = 7, c.config.tied = false;
    compare(c);
    c.name = "bf16: a head of 1101", c.precision = Precision::bf16, c.tolerance = 3e-2;
    compare(c);
}
TEST(llama, "Llama would learn otherwise on a GPU") {
    Case c{"llama", small("llama"), some(3)};
    c.config.kv_heads = 1;
    compare(c);
}
TEST(transformer, "an encoder with a decoder would learn otherwise on a GPU") {
    Case c{"transformer", small("transformer"), some(4), true};
    c.config.encoder_layers = 1;
    compare(c);
    c.name = "lecture, dropout", c.config = small("lecture"), c.examples = false, c.how.dropout = 0.1;
    compare(c);
}
TEST(encoders, "an encoder alone would learn otherwise on a GPU") {
    Case c{"encoder, gaps", small("gpt2"), some(3)};
    c.config.causal = false;
    compare(c);
    c = Case{"classes, mean", small("gpt2"), some(5), true};
    c.config.causal = false, c.config.classes = 4;
    compare(c);
    c.name = "classes, first row, features", c.config.pool_first = true, c.config.features = 3;
    compare(c);
}
TEST(adapters, "LoRA would learn otherwise on a GPU") {
    Case c{"LoRA beside gpt2", small("gpt2"), some(3), false, true};
    c.how.dropout = 0.1;
    compare(c);
    c = Case{"LoRA beside llama, 3 parts of 7", small("llama"), some(2), false, true};
    c.targets = "q_proj,v_proj,up_proj";
    compare(c);
}
TEST(tensor_cores, "products in tf32 or bf16 would learn otherwise than in f32 but for rounding") {
    for (const Precision precision : {Precision::tf32, Precision::bf16}) {
        const bool narrow = precision == Precision::bf16;
        Case c{narrow ? "bf16: gpt2, dropout, 2 parts" : "tf32: gpt2, dropout, 2 parts", small("gpt2"), some(3)};
        c.precision = precision, c.tolerance = narrow ? 3e-2 : 1e-5;
#ifdef ON_A_GPU
        if (!narrow) c.tolerance = 5e-3;
#else
        emulator::settings.rounds_tf32 = false;
        emulator::settings.mixed_bias = !narrow;
#endif
        c.config.layers = 2, c.how.dropout = 0.2, c.how.accumulate = 2;
        compare(c);
        c.name = narrow ? "bf16: gpt2, untied, biased head" : "tf32: gpt2, untied, biased head", c.config = small("gpt2"), c.how = some(4);
        c.config.tied = false, c.config.head_bias = true, c.config.vocab = 300;  // no relu here: it jumps where rounding changes a sign
        compare(c);
#ifndef ON_A_GPU
        emulator::settings.mixed_bias = true;
#endif
        c.name = narrow ? "bf16: llama" : "tf32: llama", c.config = small("llama"), c.how = some(3);
        compare(c);
        c.name = narrow ? "bf16: transformer, ragged" : "tf32: transformer, ragged", c.config = small("transformer"), c.examples = true;
        c.config.encoder_layers = 1, c.config.activation = Activation::gelu;
        compare(c);
        c.name = narrow ? "bf16: classes, ragged" : "tf32: classes, ragged", c.config = small("gpt2");
        c.config.causal = false, c.config.classes = 4, c.config.features = 3;
        compare(c);
        c.name = narrow ? "bf16: LoRA" : "tf32: LoRA", c.config = small("llama"), c.examples = false, c.lora = true;
        c.targets = "q_proj,v_proj,up_proj";
        compare(c);
    }
    Case heads{"bf16: attention in heads of 16, dropout", small("gpt2"), some(3)};
    heads.precision = Precision::bf16, heads.tolerance = 3e-2, heads.how.dropout = 0.1;
    heads.config.heads = 2, heads.config.width = 32, heads.config.context = 70;
    compare(heads);
    heads.name = "bf16: 2 heads of 32, 1 of keys", heads.config = small("llama"), heads.config.heads = 2, heads.config.kv_heads = 1;
    heads.config.width = 64, heads.config.context = 40;
    compare(heads);
    heads.name = "bf16: attention to a source", heads.config = small("transformer"), heads.config.heads = 1, heads.config.width = 16;
    heads.config.encoder_layers = 1, heads.config.context = 35, heads.config.activation = Activation::gelu, heads.examples = true;
    compare(heads);
#ifndef ON_A_GPU
    emulator::settings.rounds_tf32 = true;
    Case c{"tf32, as it rounds", small("gpt2"), some(3)};
    c.precision = Precision::tf32, c.tolerance = 5e-3;
    compare(c);
    emulator::settings.major = 7;
    Learner old;
    CHECK(old.create(Backend::cuda, c).error == Error::unsupported);
    emulator::settings.major = 9;
#endif
}
#ifndef ON_A_GPU
TEST(chosen_plans, "a product would be made by a plan that is slower, or makes other bits, than another") {
    Case c{"", small("gpt2"), some(3)};
    c.precision = Precision::bf16, c.config.vocab = 40;
    std::vector<float> first;
    for (const bool differ : {false, true}) {
        emulator::settings.plans_differ = differ;
        Learner l;
        StepResult r;
        CHECK_OK(l.create(Backend::cuda, c));
        CHECK_OK(l.trainer.step(r));  // they are tried
        const emulator::Counts before = emulator::counts;
        CHECK_OK(l.trainer.step(r));
        CHECK_OK(l.trainer.fetch());
        long by_plan[3];
        for (int i = 0; i < 3; ++i) by_plan[i] = emulator::counts.by_plan[i] - before.by_plan[i];
        printf("products by the library's first, second and third plan: %ld, %ld, %ld\n", by_plan[0], by_plan[1], by_plan[2]);
        if (differ) CHECK(by_plan[0] == 5 && by_plan[1] == 0 && by_plan[2] == 10);  // the first are dW, which are never tried
        else first.assign(l.model.weights, l.model.weights + l.model.block);
        CHECK(memcmp(first.data(), l.model.weights, first.size() * sizeof(float)) == 0 && no_faults());
    }
    emulator::settings.plans_differ = false;
}
#endif
TEST(muon, "Muon would learn otherwise on a GPU") {
    Case c{"Muon: gpt2, dropout", small("gpt2"), some(3)};
    c.how.optimizer = Optimizer::muon, c.how.beta1 = 0.9, c.steps = 3, c.tolerance = 1e-3;  // five rounds make much of rounding
    c.config.hidden = 70, c.how.dropout = 0.1;
    compare(c);
    c.name = "Muon: llama, little room", c.config = small("llama"), c.config.kv_heads = 1, c.config.context = 3, c.how.batch = 1;
    c.steps = 2;
    compare(c);
    c.name = "Muon: gpt2, bf16", c.config = small("gpt2"), c.precision = Precision::bf16, c.how.batch = 3, c.tolerance = 1e-1;
    compare(c);
    // A step that is skipped, and one that goes on from the processor.
    c = Case{"", small("gpt2"), some(3)};
    c.how.optimizer = Optimizer::muon;
    Learner plain, cuda;
    StepResult r, s;
    CHECK_OK(plain.create(Backend::plain, c));
    for (int i = 0; i < 2; ++i) CHECK_OK(plain.trainer.step(r));
    CHECK_OK(plain.trainer.save("build/test_cuda_muon.safetensors"));
    CHECK_OK(cuda.create(Backend::cuda, c, 77));
    CHECK_OK(cuda.trainer.load("build/test_cuda_muon.safetensors"));
    for (int i = 0; i < 2; ++i)
        CHECK(CHECK_OK(plain.trainer.step(r)) && CHECK_OK(cuda.trainer.step(s)) && fabs(r.loss - s.loss) < 1e-3 * r.loss);
    CHECK_OK(cuda.trainer.fetch());
    const std::vector<float> before(cuda.model.weights, cuda.model.weights + cuda.model.block);
    float& broken = cuda.model.weights[cuda.model.find("ln_f.weight")->offset];
    const float good = broken;
    broken = INFINITY, ++cuda.model.version;
    CHECK(CHECK_OK(cuda.trainer.step(s)) && s.skipped && CHECK_OK(cuda.trainer.fetch()));
    broken = good;
    CHECK(memcmp(before.data(), cuda.model.weights, before.size() * sizeof(float)) == 0 && no_faults());
}
TEST(fp16, "fp16 would learn otherwise than f32 but for rounding, or its loss's scale would not follow the gradients") {
    Case c{"fp16: gpt2, dropout, 2 parts", small("gpt2"), some(3)};
    c.precision = Precision::fp16, c.tolerance = 6e-3, c.how.dropout = 0.2, c.how.accumulate = 2;
    compare(c);
    c.name = "fp16: transformer, ragged", c.config = small("transformer"), c.examples = true, c.how = some(3);
    c.config.encoder_layers = 1, c.config.activation = Activation::gelu;
    compare(c);
    c.name = "fp16: LoRA", c.config = small("llama"), c.examples = false, c.lora = true, c.targets = "q_proj,v_proj,up_proj";
    compare(c);
    c = Case{"fp16: attention in heads of 16", small("gpt2"), some(2)};
    c.precision = Precision::fp16, c.tolerance = 6e-3, c.how.dropout = 0.1;
    c.config.heads = 2, c.config.width = 32, c.config.context = 40;
    compare(c);
#ifndef ON_A_GPU
    c.name = "fp16: the same before 2020", emulator::settings.major = 7, emulator::settings.shared_optin = 64 << 10;
    compare(c);
    c.precision = Precision::bf16;
    Learner none;
    const Status status = none.create(Backend::cuda, c);
    CHECK(status.error == Error::unsupported && strstr(status.message, "fp16"));
    emulator::settings.major = 9, emulator::settings.shared_optin = 227 << 10;
    c.config = small("gpt2");
#endif
    // A gradient that is too large for it leaves the weights as they are, and halves the scale; after 2000 good steps it doubles.
    c.precision = Precision::fp16, c.how = some(2);
    Learner l, other;
    StepResult r;
    CHECK_OK(l.create(Backend::cuda, c));
    const std::vector<float> before(l.model.weights, l.model.weights + l.model.block);
    const auto scale_is = [&](float scale, float good) {
        return CHECK_OK(l.trainer.fetch()) && memcmp(l.trainer.loss_scale, std::vector<float>{scale, good}.data(), 2 * sizeof(float)) == 0;
    };
    l.trainer.loss_scale[0] = 1048576, l.trainer.loss_scale[1] = 7;
    CHECK(CHECK_OK(l.trainer.step(r)) && r.skipped && isfinite(r.loss) && scale_is(524288, 0));
    CHECK(memcmp(before.data(), l.model.weights, before.size() * sizeof(float)) == 0);
    CHECK_OK(l.create(Backend::cuda, c));
    l.trainer.loss_scale[0] = 64, l.trainer.loss_scale[1] = 1998;
    const double expected[][2] = {{64, 1999}, {128, 0}, {128, 1}};
    for (const auto& wanted : expected)
        CHECK(CHECK_OK(l.trainer.step(r)) && !r.skipped && scale_is(static_cast<float>(wanted[0]), static_cast<float>(wanted[1])));
    // It is part of what a run goes on with, to the bit, also where it has been on the processor.
    CHECK_OK(l.trainer.save("build/test_cuda_half.safetensors"));
    CHECK_OK(l.trainer.step(r));
    for (const Backend where : {Backend::plain, Backend::cuda}) {
        CHECK_OK(other.create(where, c, 77));
        CHECK_OK(other.trainer.load("build/test_cuda_half.safetensors"));
        CHECK(other.trainer.loss_scale[0] <= 128 && other.trainer.loss_scale[0] >= 128);
        if (where == Backend::plain) CHECK_OK(other.trainer.save("build/test_cuda_half.safetensors"));
    }
    StepResult s;
    CHECK(CHECK_OK(other.trainer.step(s)) && memcmp(&r.loss, &s.loss, sizeof r.loss) == 0);
    CHECK_OK(l.trainer.fetch());
    CHECK_OK(other.trainer.fetch());
    CHECK(memcmp(l.model.weights, other.model.weights, before.size() * sizeof(float)) == 0 && other.trainer.loss_scale[1] >= 2);
    CHECK(CHECK_OK(l.create(Backend::cpu, c, 77)) && CHECK_OK(other.trainer.save("build/test_cuda_half.safetensors")));
    CHECK(CHECK_OK(l.trainer.load("build/test_cuda_half.safetensors")) && CHECK_OK(l.trainer.step(r)) && CHECK_OK(other.trainer.step(s)));
    CHECK(fabs(r.loss - s.loss) < 1e-3 * r.loss && no_faults());
}
#ifndef ON_A_GPU
// Attention in bf16 alone: its kernels in the shapes that matter, against the formulas in double.
struct Shape {
    const char* name;
    int dim, heads, kv_heads;
    std::vector<int> lengths, sources;  // sources: of the keys, where they are another sequence's
    bool causal = true;
    double dropout = 0;
    int shared = 227 << 10;
    bool adds = false;
};
template <class T>
struct OnDevice {
    T* there = nullptr;
    size_t count;
    explicit OnDevice(const std::vector<T>& from) : count(from.size()) {
        CHECK(cudaMalloc(reinterpret_cast<void**>(&there), count * sizeof(T)) == cudaSuccess &&
              cudaMemcpy(there, from.data(), count * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    ~OnDevice() { cudaFree(there); }
    std::vector<T> read() const {
        std::vector<T> to(count);
        CHECK(cudaMemcpy(to.data(), there, count * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
        return to;
    }
};
// A block of rows in bf16, and what it should be. Between two sequences is a row that nobody may touch.
struct Rows {
    std::vector<cuda::Place> places;
    int count = 0;
    explicit Rows(const std::vector<int>& lengths) {
        for (const int length : lengths) places.push_back({count, length, 0, -1}), count += length + 1;
    }
    std::vector<__nv_bfloat16> numbers(int columns, uint64_t key, double size) const {
        std::vector<__nv_bfloat16> x(static_cast<size_t>(count) * static_cast<size_t>(columns));
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((uniform(key, i) - 0.5) * size);
        return x;
    }
};
double worst(const std::vector<__nv_bfloat16>& x, const std::vector<double>& wanted, const Rows& rows, int columns,
             const std::vector<__nv_bfloat16>& before, bool adds) {
    double difference = 0, largest = 0;
    std::vector<bool> used(static_cast<size_t>(rows.count));
    for (const cuda::Place& p : rows.places)
        for (int i = 0; i < p.length; ++i) used[static_cast<size_t>(p.row + i)] = true;
    for (size_t i = 0; i < x.size(); ++i) {
        if (!used[i / static_cast<size_t>(columns)]) {
            if (memcmp(&x[i], &before[i], sizeof x[i]) != 0) return 1e9;
            continue;
        }
        const double d = fabs(static_cast<double>(x[i]) - wanted[i] - (adds ? static_cast<double>(before[i]) : 0.0));
        difference = d <= 1e9 ? fmax(difference, d) : 1e9, largest = fmax(largest, fabs(wanted[i]));
    }
    return difference / largest;
}
void attend(const Shape& shape) {
    using namespace cuda;
    const bool other = !shape.sources.empty();
    const Rows queries(shape.lengths), keys(other ? shape.sources : shape.lengths);
    const int dim = shape.dim, width = shape.heads * dim, kv = shape.kv_heads * dim, group = shape.heads / shape.kv_heads;
    const int q_stride = other ? width : width + 2 * kv, k_stride = other ? 2 * kv : q_stride, k_column = other ? 0 : width;
    const auto q = queries.numbers(q_stride, 1, 3), k = other ? keys.numbers(k_stride, 2, 3) : q, y = queries.numbers(width, 3, 1),
               dy = queries.numbers(width, 4, 2), dq = queries.numbers(q_stride, 5, 1), dk = keys.numbers(k_stride, 6, 1);
    Now now{};
    now.sequences = static_cast<int>(shape.lengths.size()), now.seed = 77, now.step = 3;
    now.drop_below = static_cast<uint32_t>(shape.dropout * 0x1p32), now.drop_keep = static_cast<float>(1 / (1 - shape.dropout));
    now.rows[0] = queries.count, now.first_row[0] = 5;

    // The formulas.
    std::vector<double> y_wanted(y.size()), dq_wanted(dq.size()), dk_wanted(dk.size());
    const auto at = [](int row, int stride, int column) {
        return static_cast<size_t>(row) * static_cast<size_t>(stride) + static_cast<size_t>(column);
    };
    for (size_t s = 0; s < shape.lengths.size(); ++s)
        for (int head = 0; head < shape.heads; ++head)
            for (int i = 0; i < queries.places[s].length; ++i) {
                const int row = queries.places[s].row + i, first = keys.places[s].row, k0 = k_column + head / group * dim, v0 = k0 + kv;
                const int sees = shape.causal ? i + 1 : keys.places[s].length;
                std::vector<double> p(static_cast<size_t>(sees)), f(p.size(), 1.0), dp(p.size());
                double sum = 0, D = 0;
                for (int j = 0; j < sees; ++j) {
                    double score = 0, d = 0;
                    for (int c = 0; c < dim; ++c)
                        score += static_cast<double>(q[at(row, q_stride, head * dim + c)]) *
                                 static_cast<double>(k[at(first + j, k_stride, k0 + c)]),
                            d += static_cast<double>(dy[at(row, width, head * dim + c)]) *
                                 static_cast<double>(k[at(first + j, k_stride, v0 + c)]);
                    if (shape.dropout > 0)
                        f[static_cast<size_t>(j)] = static_cast<double>(drop_factor(&now, drop_key(&now, 0, 9, row), head * 65536 + j));
                    sum += p[static_cast<size_t>(j)] = exp(score / sqrt(dim));
                    dp[static_cast<size_t>(j)] = d * f[static_cast<size_t>(j)];
                }
                for (size_t j = 0; j < p.size(); ++j) p[j] /= sum, D += p[j] * dp[j];
                for (int j = 0; j < sees; ++j) {
                    const size_t n = static_cast<size_t>(j);
                    const double ds = p[n] * (dp[n] - D) / sqrt(dim);
                    for (int c = 0; c < dim; ++c) {
                        const size_t in_y = at(row, width, head * dim + c), in_q = at(row, q_stride, head * dim + c);
                        const size_t in_k = at(first + j, k_stride, k0 + c), in_v = at(first + j, k_stride, v0 + c);
                        y_wanted[in_y] += p[n] * f[n] * static_cast<double>(k[in_v]);
                        dq_wanted[in_q] += ds * static_cast<double>(k[in_k]);
                        (other ? dk_wanted : dq_wanted)[in_k] += ds * static_cast<double>(q[in_q]);
                        (other ? dk_wanted : dq_wanted)[in_v] += p[n] * f[n] * static_cast<double>(dy[in_y]);
                    }
                }
            }

    const OnDevice<__nv_bfloat16> on_q(q), on_k(k), on_y(y), on_dy(dy), on_dq(dq), on_dk(dk);
    const OnDevice<float> softmax(std::vector<float>(2 * static_cast<size_t>(queries.count * shape.heads)));
    const OnDevice<Place> places(queries.places), seen(keys.places);
    const OnDevice<Now> on_now({now});
    Attend<__nv_bfloat16> a{};
    a.q = on_q.there, a.k = (other ? on_k : on_q).there + k_column, a.v = a.k + kv, a.y = on_y.there, a.softmax = softmax.there;
    a.dy = on_dy.there, a.dq = on_dq.there, a.dk = (other ? on_dk : on_dq).there + k_column, a.dv = a.dk + kv;
    a.q_stride = q_stride, a.k_stride = k_stride, a.places = places.there, a.seen = seen.there;
    a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.dim = dim, a.op = 9;
    a.scale = 1 / sqrtf(static_cast<float>(dim)), a.causal = shape.causal, a.adds_q = a.adds_kv = shape.adds;
    const bool sums = !other && group == 1 && !shape.adds;
    Gpu gpu;
    gpu.plan.sequences = static_cast<int>(shape.lengths.size()) + 1, gpu.plan.context = 1;  // more than this run has
    for (const int length : shape.lengths) gpu.plan.context = greater(gpu.plan.context, length);
    for (const int length : shape.sources) gpu.plan.context = greater(gpu.plan.context, length);
    gpu.shared_bytes = shape.shared, gpu.memory.now = on_now.there;
    const int tile_of = dim <= 32   ? tile_rows<32>(gpu.plan.context, shape.shared)
                        : dim <= 64 ? tile_rows<64>(gpu.plan.context, shape.shared)
                                    : tile_rows<128>(gpu.plan.context, shape.shared);
    const size_t columns = static_cast<size_t>(q_stride),
                 parts = static_cast<size_t>(gpu.plan.sequences * parts_of(gpu.plan.context, tile_of));
    const OnDevice<float> on_parts(std::vector<float>(parts * columns, NAN));
    if (sums) a.parts = on_parts.there;
    CHECK_OK(gpu.allow_shared_on_tensor_cores());
    for (const bool backward : {false, true})
        if (dim <= 32) gpu.attention_on_tensor_cores<32>(a, backward);
        else if (dim <= 64) gpu.attention_on_tensor_cores<64>(a, backward);
        else gpu.attention_on_tensor_cores<128>(a, backward);
    CHECK_OK(gpu.walked_well());
    CHECK(cudaDeviceSynchronize() == cudaSuccess && no_faults());
    const double errors[] = {worst(on_y.read(), y_wanted, queries, width, y, false),
                             worst(on_dq.read(), dq_wanted, queries, q_stride, dq, shape.adds),
                             other ? worst(on_dk.read(), dk_wanted, keys, k_stride, dk, shape.adds) : 0.0};
    double sum_error = 0;
    const std::vector<float> parts_made = on_parts.read();
    for (size_t c = 0; c < columns && sums; ++c) {
        double wanted = 0, size = 1e-9, made = 0;
        for (size_t i = c; i < dq_wanted.size(); i += columns) wanted += dq_wanted[i], size += fabs(dq_wanted[i]);
        for (size_t i = c; i < parts_made.size(); i += columns) made += static_cast<double>(parts_made[i]);
        sum_error = fabs(made - wanted) <= 1e9 ? fmax(sum_error, fabs(made - wanted) / size) : 1e9;
    }
    printf("%-34s y off by %.1e, gradients by %.1e and %.1e, their sums by %.1e\n", shape.name, errors[0], errors[1], errors[2], sum_error);
    CHECK(errors[0] < 6e-3 && errors[1] < 8e-3 && errors[2] < 8e-3 && sum_error < 2e-3);
    fflush(stdout);
}
TEST(attention_kernels, "attention in bf16 would not be the formula's in every shape") {
    attend({"attention: 192 x 64, causal", 64, 1, 1, {192}, {}});
    attend({"attention: 192 x 64, dropout", 64, 2, 2, {192}, {}, true, 0.2});
    attend({"attention: ragged, 2 of 4 heads", 64, 4, 2, {1, 37, 96, 130, 17}, {}, true});
    attend({"attention: 16 columns, all seen", 16, 3, 3, {16, 50, 33}, {}, false, 0.1});
    attend({"attention: 128 columns, adds", 128, 2, 1, {70, 45}, {}, true, 0, 227 << 10, true});
    attend({"attention: 40 columns, a source", 40, 2, 2, {31, 5, 100}, {64, 129, 3}, false, 0, 227 << 10, true});
    attend({"attention: 24 columns, shared keys", 24, 4, 1, {33, 80}, {}, true, 0.1});
    attend({"attention: 4 tiles of rows", 64, 2, 1, {200, 67, 128}, {}, true, 0.1, 64 * 544});
    attend({"attention: 3 tiles, all seen", 128, 1, 1, {90, 33}, {}, false, 0, 32 * 1040});
    attend({"attention: tiles of a source", 32, 2, 1, {20, 70}, {100, 40}, false, 0.1, 32 * 272});
    attend({"attention: longer than a tile", 32, 1, 1, {250}, {}});
    attend({"attention: 2 tiles of 128 columns", 128, 2, 2, {90, 33, 7}, {}, true, 0, 64 * 1040});
}
// A norm of rows that lanes keep, and its sums: more rows than there are warps, and some beyond those that are there. x, dy and dx are of a type, what
// is wanted is in double.
template <class Real>
void normalise(const char* name, int n, bool centred, bool adds, double tolerance) {
    using namespace cuda;
    const int rows = 70, space = 73;
    const size_t columns = static_cast<size_t>(n);
    const auto numbers = [&](uint64_t key, double middle) {
        std::vector<Real> some(space * columns);
        for (size_t i = 0; i < some.size(); ++i) some[i] = static_cast<float>(uniform(key, i) - 0.5 + middle);
        return some;
    };
    const std::vector<Real> x = numbers(1, 0.3), dy = numbers(2, 0.1), dx = numbers(3, 0), y = numbers(4, 0);
    std::vector<float> w, b;
    for (size_t i = 0; i < columns; ++i)
        w.push_back(static_cast<float>(uniform(5, i)) + 0.5f), b.push_back(static_cast<float>(uniform(6, i)));
    Now now{};
    now.rows[0] = rows;
    const OnDevice<Real> on_x(x), on_dy(dy), on_dx(dx), on_y(y);
    const OnDevice<float> on_w(w), on_b(b), statistics(std::vector<float>(2 * space));
    const OnDevice<Now> on_now(std::vector<Now>{now});
    Gpu gpu;
    const bool few = n <= 4 * warp * 3;
    const int blocks = few ? 2 : 1;
    const OnDevice<float> parts(std::vector<float>(3 * columns * static_cast<size_t>(blocks)));
    gpu.launch(few ? norm_forward_keeping<Real, 3> : norm_forward_keeping<Real, 8>, blocks, 1, 0, on_y.there, statistics.there, on_x.there,
               on_w.there, on_b.there, on_now.there, 0, n, 1e-5f, centred);
    gpu.launch(few ? norm_backward_summing<Real, 3> : norm_backward_summing<Real, 8>, blocks, 1, 0, on_dx.there, parts.there, on_dy.there,
               on_x.there, statistics.there, on_w.there, on_now.there, 0, n, centred, adds);
    CHECK_OK(gpu.walked_well());
    const std::vector<Real> y_made = on_y.read(), dx_made = on_dx.read();
    const std::vector<float> parts_made = parts.read();
    std::vector<double> sums(3 * columns);
    double off = 0;
    const auto differ = [&](double made, double wanted) { off = fabs(made - wanted) <= 1e9 ? fmax(off, fabs(made - wanted)) : 1e9; };
    for (size_t row = 0; row < space; ++row) {
        const size_t at = row * columns;
        if (row >= rows) {  // nobody may touch it
            CHECK(memcmp(&y_made[at], &y[at], columns * sizeof(Real)) == 0 && memcmp(&dx_made[at], &dx[at], columns * sizeof(Real)) == 0);
            continue;
        }
        double mean = 0, square = 0, mean_g = 0, mean_gh = 0;
        for (size_t c = 0; c < columns && centred; ++c) mean += static_cast<double>(x[at + c]) / n;
        for (size_t c = 0; c < columns; ++c) square += pow(static_cast<double>(x[at + c]) - mean, 2) / n;
        const double scale = 1 / sqrt(square + 1e-5);
        const auto h = [&](size_t c) { return (static_cast<double>(x[at + c]) - mean) * scale; };
        const auto g = [&](size_t c) { return static_cast<double>(dy[at + c]) * static_cast<double>(w[c]); };
        for (size_t c = 0; c < columns; ++c) mean_g += centred ? g(c) / n : 0.0, mean_gh += g(c) * h(c) / n;
        for (size_t c = 0; c < columns; ++c) {
            const double d = scale * (g(c) - mean_g - h(c) * mean_gh) + (adds ? static_cast<double>(dx[at + c]) : 0.0);
            differ(static_cast<double>(y_made[at + c]), h(c) * static_cast<double>(w[c]) + static_cast<double>(b[c]));
            differ(static_cast<double>(dx_made[at + c]), d);
            sums[c] += static_cast<double>(dy[at + c]), sums[columns + c] += static_cast<double>(dy[at + c]) * h(c),
                sums[2 * columns + c] += d;
        }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
        double made = 0;
        for (size_t block = 0; block < static_cast<size_t>(blocks); ++block)
            made += static_cast<double>(parts_made[block * 3 * columns + i]);
        differ(made / rows, sums[i] / rows);
    }
    printf("%-34s off by %.1e\n", name, off);
    CHECK(off <= tolerance && no_faults());
}
TEST(norm_kernels, "a norm of rows that lanes keep, or its sums, would not be the formula's in every width") {
    normalise<float>("norm: 8", 8, true, false, 1e-5);
    normalise<float>("norm: 384, adds", 384, true, true, 1e-5);
    normalise<float>("norm: 388, not centred, adds", 388, false, true, 1e-5);
    normalise<__nv_bfloat16>("norm in bf16: 100, not centred", 100, false, false, 1e-2);
    normalise<__nv_bfloat16>("norm in bf16: 384, adds", 384, true, true, 1e-2);
    normalise<__nv_bfloat16>("norm in bf16: 1024, adds", 1024, true, true, 1e-2);
    normalise<__half>("norm in fp16: 516", 516, true, false, 1.2e-3);
}
#endif

#ifndef ON_A_GPU
TEST(frequent_ids, "the gradient of an id that is a fifth of a text would miss some of its rows, or be other bits from run to run") {
    using namespace cuda;
    for (const int n : {8, 5}) {
        // 1100 sorted rows: an id that ends where 64 of them do, one that has 700, one of 64 exactly, one that goes on into the last few.
        const int ends[] = {64, 130, 830, 832, 896, 1040, 1100};
        std::vector<uint32_t> keys;
        std::vector<int32_t> sorted;
        for (int row = 0, id = 0; row < 1100; ++row) {
            id += row == ends[id];
            keys.push_back(static_cast<uint32_t>(id)), sorted.push_back(1099 - row);
        }
        std::vector<float> dy(1100 * static_cast<size_t>(n)), zeros(8 * static_cast<size_t>(n)), first;
        for (size_t i = 0; i < dy.size(); ++i) dy[i] = static_cast<float>(uniform(4, i) - 0.3);
        Now now{};
        now.rows[0] = 1100;
        const OnDevice<Now> on_now(std::vector<Now>{now});
        const OnDevice<uint32_t> on_keys(keys);
        const OnDevice<int32_t> on_sorted(sorted);
        const OnDevice<float> on_dy(dy), edges(std::vector<float>(2 * 18 * static_cast<size_t>(n)));
        for (const int processors : {4, 1}) {
            const OnDevice<float> dtoken(zeros);
            Gpu gpu;
            gpu.processors = processors;
            gpu.over_rows(n == 8 ? embedding_backward<4, float> : embedding_backward<1, float>, 18, dtoken.there, edges.there, on_dy.there,
                          on_keys.there, on_sorted.there, on_now.there, 0, n);
            gpu.launch(n == 8 ? embedding_edges<4> : embedding_edges<1>, processors, 1, 0, dtoken.there, edges.there, on_keys.there,
                       on_now.there, 0, n);
            CHECK_OK(gpu.walked_well());
            const std::vector<float> sums = dtoken.read();
            if (first.empty()) first = sums;
            CHECK(memcmp(first.data(), sums.data(), sums.size() * sizeof(float)) == 0);
            double off = 0;
            for (size_t i = 0; i < sums.size(); ++i) {
                double wanted = 0;
                const size_t columns = static_cast<size_t>(n), id = i / columns;
                for (size_t row = 0; row < 1100; ++row)
                    if (keys[row] == id) wanted += static_cast<double>(dy[(1099 - row) * columns + i % columns]);
                off = fmax(off, fabs(static_cast<double>(sums[i]) - wanted));
            }
            CHECK(off < 1e-4 && no_faults());
        }
    }
}
TEST(wide_heads, "attention would not work in smaller tiles, where heads are wide or shared memory is small") {
    Case c{"tiles of 16", small("gpt2"), some(2)};
    c.config.heads = 1, c.steps = 1;
    emulator::settings.shared_optin = 24 << 10;
    compare(c);
    c.name = "tiles of 8", emulator::settings.shared_optin = 12 << 10;
    compare(c);
    Learner none;
    emulator::settings.shared_optin = 2 << 10;
    const Status status = none.create(Backend::cuda, c);
    CHECK(status.error == Error::unsupported && strstr(status.message, "too many columns"));
    emulator::settings.shared_optin = 227 << 10;
}
#endif

void deterministic_in(Precision precision) {
    Case c{"", small("gpt2"), some(4)};
    c.how.dropout = 0.1, c.precision = precision;
    std::vector<float> first;
    for (unsigned order = 0; order < 2; ++order) {
#ifdef ON_A_GPU
        c.config = baby(96), c.how.batch = 64;
#else
        emulator::settings.order = order;
#endif
        Learner l;
        StepResult r;
        CHECK_OK(l.create(Backend::cuda, c));
        for (int i = 0; i < 2; ++i) CHECK_OK(l.trainer.step(r));
        CHECK_OK(l.trainer.fetch());
        if (order == 0) first.assign(l.model.weights, l.model.weights + l.model.block);
        CHECK(memcmp(first.data(), l.model.weights, first.size() * sizeof(float)) == 0);
    }
#ifndef ON_A_GPU
    emulator::settings.order = 0;
#endif
}
TEST(deterministic, "a GPU would compute other bits from run to run") {
    for (const Precision precision : {Precision::f32, Precision::tf32, Precision::bf16, Precision::fp16}) deterministic_in(precision);
}

// What is in a text that comes with the library: 96 characters.
std::vector<int32_t> village() {
    std::vector<int32_t> ids;
    FILE* const file = fopen("examples/village.txt", "rb");
    for (int c = file ? fgetc(file) : EOF; c != EOF; c = fgetc(file)) ids.push_back(c < 32 ? 95 : c > 126 ? 94 : c - 32);
    if (file) fclose(file);
    return ids;
}
TEST(losses, "a run's losses would leave the processor's") {
    Case c{"", small("gpt2"), some(4)};
    int steps = 12;
    c.config.vocab = 96;
#ifdef ON_A_GPU
    c.config = baby(96), c.how.batch = 8;
    steps = 200;
#endif
    c.how = TrainConfig(), c.how.batch = 8, c.how.steps = steps;
    const std::vector<int32_t> ids = village();
    CHECK(ids.size() > 10000);
    std::vector<double> reference;
    for (int way = 0; way < 5; ++way) {
        constexpr const char* names[] = {"cpu", "f32", "tf32", "bf16", "fp16"};
        constexpr double bars[] = {0, 1e-4, 2e-2, 2e-2, 2e-2};
        Runtime runtime;
        runtime.backend = way > 0 ? Backend::cuda : Backend::cpu;
        runtime.precision = way > 1 ? static_cast<Precision>(way - 1) : Precision::f32;
        Model model;
        Data data;
        Trainer trainer;
        if (!CHECK_OK(model.create(runtime, c.config, Tokenizer(), 3)) ||
            !CHECK_OK(data.create(runtime, Span<const int32_t>(ids.data(), ids.size()))) ||
            !CHECK_OK(trainer.create(runtime, model, c.how, data)))
            return;
        double worst = 0, last = 0;
        StepResult r;
        for (size_t i = 0; i < static_cast<size_t>(steps); ++i) {
            if (!CHECK_OK(trainer.step(r))) return;
            if (way == 0) reference.push_back(r.loss);
            else worst = fmax(worst, fabs(r.loss - reference[i]) / reference[i]);
            last = r.loss;
        }
        CHECK(worst <= bars[way]);
        printf("%-5s loss after %d steps %.5f, at most %.1e from the processor's\n", names[way], steps, last, worst);
        fflush(stdout);
    }
}

#ifdef ON_A_GPU
long long bytes_sent() { return 0; }
#else
long long bytes_sent() { return emulator::counts.sent; }
#endif
TEST(batches, "a GPU that has the text itself would make other batches of it than the processor, or of one that is no longer learnt from") {
    Case c{"", small("gpt2"), some(3)};
    c.config.vocab = 256, c.how.accumulate = 2, c.how.dropout = 0.1;
    std::string talk;
    for (int i = 0; i < 20; ++i)
        talk += "You: what is it?\nMira: " + std::to_string(i * i) + " boats, or three\nYou: where?\nMira: at sea\n";
    const std::vector<int32_t> large = text(4000, 256), given = text(200, 250);
    struct All : Learner {
        Corpus corpus;
        Tokenizer bytes;
        Data answers, groups, too_large, few;
    } all[2];
    for (All& l : all) {
        CHECK_OK(l.corpus.open_memory(l.runtime, Text(talk.data(), talk.size()), CorpusConfig{}));
        CHECK_OK(l.bytes.create_bytes(l.runtime));
        CHECK_OK(l.create(&l == all ? Backend::plain : Backend::cuda, c));
        CHECK_OK(l.answers.create(l.runtime, l.corpus, Part::all, l.bytes, Text(), 1 << 20, "Mira: "));
        CHECK_OK(l.groups.create(l.runtime, l.corpus, Part::all, l.bytes, Text(), 200));
        CHECK_OK(l.too_large.create(l.runtime, Span<const int32_t>(large.data(), large.size())));
        CHECK_OK(l.few.create(l.runtime, Span<const int32_t>(large.data(), 30)));
        CHECK_OK(l.trainer.create(l.runtime, l.model, c.how, l.answers));
        CHECK(l.answers.learnt < l.answers.tokens && l.answers.tokens == l.groups.tokens && l.answers.tokens < l.too_large.tokens);
    }
    const auto agree = [](const char* what, double a, double b) {
        if (!CHECK(fabs(a - b) <= usual * a)) printf("  %s: %.9g and %.9g\n", what, a, b);
    };
    const auto step = [&](const char* what, Data All::*data, bool gives = false) {
        StepResult r[2];
        for (int i = 0; i < 2; ++i) {
            const size_t n = static_cast<size_t>(c.how.batch * c.how.accumulate * c.config.context);
            all[i].trainer.training = &(all[i].*data);
            if (gives) CHECK_OK(all[i].trainer.step(Span<const int32_t>(given.data(), n), Span<const int32_t>(given.data() + 1, n), r[i]));
            else CHECK_OK(all[i].trainer.step(r[i]));
        }
        agree(what, r[0].loss, r[1].loss), agree(what, r[0].grad_norm, r[1].grad_norm);
    };
    const auto evaluate = [&] {
        Evaluation e[2];
        for (int i = 0; i < 2; ++i) CHECK_OK(all[i].trainer.evaluate(all[i].few, e[i]));
        agree("evaluation", e[0].loss, e[1].loss);
        CHECK(e[0].tokens == 29 && e[1].tokens == 29);
    };
    for (int i = 0; i < 3; ++i) step("its text", &All::data);
    evaluate();
    step("its text after an evaluation", &All::data);
    step("the caller's batch", &All::data, true);
    step("its text after the caller's batch", &All::data);
    step("a shorter text", &All::few);
    for (int i = 0; i < 3; ++i) step("answers", &All::answers);
    const long long before = bytes_sent();
    step("answers", &All::answers);
    CHECK(bytes_sent() - before < 1000);
    step("groups", &All::groups);
    step("a text that it has no room for", &All::too_large);
    // All ids are looked at before the first of them is used; what was there is no longer used.
    std::vector<int32_t> wrong = all[1].ids;
    wrong.back() = 256;
    Data bad;
    CHECK_OK(bad.create(all[1].runtime, Span<const int32_t>(wrong.data(), wrong.size())));
    all[1].trainer.training = &bad;
    StepResult r;
    const Status status = all[1].trainer.step(r);
    CHECK(status.error == Error::invalid_argument && strcmp(status.message, "the id 256 is none of the model's 256") == 0);
    step("its text after a wrong one", &All::data);
    CHECK(no_faults());
}

TEST(hand_over, "a run could not go from the processor to a GPU and back") {
    Case c{"", small("gpt2"), some(3)};
    Learner whole;
    StepResult a, b;
    CHECK_OK(whole.create(Backend::plain, c));
    for (int i = 0; i < 6; ++i) CHECK_OK(whole.trainer.step(a));
    const Backend order[] = {Backend::plain, Backend::cuda, Backend::cpu};
    for (int part = 0; part < 3; ++part) {
        Learner l;
        CHECK_OK(l.create(order[part], c, 77));
        if (part == 0) CHECK_OK(l.create(order[part], c));
        else CHECK_OK(l.trainer.load("build/test_cuda.resume.safetensors"));
        for (int i = 0; i < 2; ++i) CHECK_OK(l.trainer.step(b));
        CHECK_OK(l.trainer.save("build/test_cuda.resume.safetensors"));
    }
    CHECK(b.step == 6 && fabs(a.loss - b.loss) < 1e-3 * a.loss);
}

TEST(who_looks, "what reads a model while a GPU trains it would see old weights, or writing them would be lost") {
    Case c{"", small("gpt2"), some(3)};
    Learner l, other;
    StepResult r;
    CHECK_OK(l.create(Backend::cuda, c));
    CHECK_OK(other.create(Backend::cuda, c));
    const std::vector<float> before(l.model.weights, l.model.weights + l.model.block);
    const auto old = [&] { return memcmp(before.data(), l.model.weights, before.size() * sizeof(float)) == 0; };
    CHECK_OK(l.trainer.step(r));
    CHECK(old());  // nothing is copied before somebody looks
    Array<char> file(l.runtime);
    CHECK_OK(l.model.save_memory(file));
    CHECK(!old());
    Model loaded;
    CHECK_OK(loaded.load_memory(l.runtime, Text(file.items, file.count)));
    CHECK(memcmp(loaded.weights, l.model.weights, static_cast<size_t>(loaded.block) * sizeof(float)) == 0);
    CHECK_OK(l.trainer.step(r));
    Session session;
    std::vector<float> there(l.model.weights, l.model.weights + l.model.block);
    CHECK_OK(session.create(l.runtime, l.model));
    CHECK(memcmp(there.data(), l.model.weights, there.size() * sizeof(float)) != 0);
    // What the host writes is used from the next step on.
    CHECK_OK(other.trainer.step(r));
    CHECK_OK(other.trainer.step(r));
    CHECK(other.model.copy_weights(l.model) > 0);
    StepResult s;
    CHECK_OK(l.trainer.step(r));
    CHECK_OK(other.trainer.step(s));
    CHECK(r.loss <= s.loss && r.loss >= s.loss);
    // What a trainer that ends has learnt stays.
    l.trainer = Trainer();
    CHECK_OK(other.trainer.fetch());
    CHECK(!old() && memcmp(other.model.weights, l.model.weights, before.size() * sizeof(float)) == 0);
}

TEST(not_finite, "a loss that is not finite would spoil the weights on a GPU") {
    Case c{"", small("gpt2"), some(3)};
    Learner l;
    StepResult r;
    CHECK_OK(l.create(Backend::cuda, c));
    CHECK_OK(l.trainer.step(r));
    CHECK_OK(l.trainer.fetch());
    const float good = l.model.weights[5];
    const std::vector<float> moments(l.trainer.moment1, l.trainer.moment1 + l.model.block);
    l.model.weights[l.model.find("ln_f.weight")->offset] = INFINITY, ++l.model.version;
    CHECK_OK(l.trainer.step(r));
    CHECK(r.skipped && l.trainer.step_count == 2);
    CHECK_OK(l.trainer.fetch());
    CHECK(good <= l.model.weights[5] && good >= l.model.weights[5]);
    CHECK(memcmp(moments.data(), l.trainer.moment1, moments.size() * sizeof(float)) == 0);
    l.model.weights[l.model.find("ln_f.weight")->offset] = 1, ++l.model.version;
    CHECK_OK(l.trainer.step(r));
    CHECK(!r.skipped && isfinite(r.loss));
}

// The same model twice, on the plain backend (or the processor's fast one) and on the GPU.
struct Speakers {
    Runtime runtimes[2];
    Model models[2];
    Session sessions[2];
    Status create(const Config& config, Precision precision, Backend reference = Backend::plain) {
        runtimes[0].backend = reference, runtimes[0].threads = reference == Backend::plain ? 1 : 0;
        runtimes[1].backend = Backend::cuda, runtimes[1].precision = precision;
        for (int i = 0; i < 2; ++i) {
            Tokenizer tokenizer;
            TRY(tokenizer.create_bytes(runtimes[i]));
            TRY(models[i].create(runtimes[i], config, config.vocab == 256 ? static_cast<Tokenizer&&>(tokenizer) : Tokenizer(), 5));
            for (const Weight& w : models[i].names)
                for (int64_t k = w.offset; k < w.offset + w.rows * w.cols; ++k)
                    models[i].weights[k] += static_cast<float>(uniform(9, static_cast<uint64_t>(k)) - 0.5) * 0.2f;
            TRY(sessions[i].create(runtimes[i], models[i]));
        }
        return Status();
    }
};
double distance(Span<const float> a, Span<const float> b) {
    double difference = 0, reference = 1e-6;
    for (size_t i = 0; i < a.size && a.size == b.size; ++i) {
        const double d = fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        difference = d <= 1e300 ? fmax(difference, d) : 1e300;
        reference = fmax(reference, fabs(static_cast<double>(a[i])));
    }
    return a.size > 0 && a.size == b.size ? difference / reference : 1e300;
}
// Reads a prompt, then says more than there is room for, which both forget alike; the GPU is told what the reference has said.
void says_the_same(const char* name, const Config& config, Precision precision, double tolerance, Backend reference = Backend::plain) {
    Speakers two;
    if (!CHECK_OK(two.create(config, precision, reference))) return;
    const size_t context = static_cast<size_t>(config.context), length = context * 2 / 3;
    const std::vector<int32_t> ids = text(length, config.vocab);
    Session *const a = &two.sessions[0], *const b = &two.sessions[1];
    CHECK_OK(a->feed(Span<const int32_t>(ids)));
    CHECK_OK(b->feed(Span<const int32_t>(ids)));
    double worst = distance(a->logits(), b->logits());
    int others = 0;
    for (size_t i = 0; i < context; ++i) {
        SampleConfig how;
        how.temperature = i % 2 == 0 ? 0.0 : 0.9;
        how.top_k = i % 3 == 0 ? 5 : 0, how.repetition_penalty = i % 5 == 0 ? 1.1 : 1.0;
        int32_t first = -1, second = -1;
        if (precision == Precision::f32) {
            CHECK_OK(a->next(how, first));
            CHECK_OK(b->next(how, second));
            others += first != second;
            if (first != second) break;
        } else {
            CHECK_OK(a->next(how, first));
            CHECK_OK(b->feed(Span<const int32_t>(&first, 1)));
        }
        worst = fmax(worst, distance(a->logits(), b->logits()));
        CHECK(a->position == b->position && a->forgotten == b->forgotten);
    }
    CHECK(others == 0 && worst <= tolerance && a->forgotten > 0);
    CHECK(no_faults());
    fflush(stdout);
    printf("%-34s logits off by at most %.1g\n", name, worst);
}
Config speaker(const char* architecture) {
    Config c = small(architecture);
    c.layers = 2, c.context = 45;
    return c;
}
TEST(generation, "a session on a GPU would say something else than on the processor") {
    Config c = speaker("gpt2");
    says_the_same("says: gpt2", c, Precision::f32, usual);
    c.heads = 4, c.width = 32, c.hidden = 70, c.tied = false, c.head_bias = true, c.activation = Activation::gelu;
    says_the_same("says: gpt2, untied, erf", c, Precision::f32, usual);
    c.positions = Positions::rotary, c.kv_heads = 2;
    says_the_same("says: gpt2, rotary, 2 kv heads of 4", c, Precision::f32, usual);
    says_the_same("says in bf16: the same", c, Precision::bf16, 3e-2);
    c = speaker("gpt2"), c.width = 15, c.bias = false;
    says_the_same("says in bf16: heads of 5, no biases", c, Precision::bf16, 3e-2);
    c = speaker("gpt2"), c.width = 64, c.heads = 4, c.kv_heads = 1, c.context = 140;
    says_the_same("says in bf16: heads of 16, 1 of keys", c, Precision::bf16, 3e-2);
    c = speaker("llama"), c.width = 64, c.heads = 1;
    says_the_same("says in bf16: llama, heads of 64", c, Precision::bf16, 3e-2);
    c = speaker("llama"), c.kv_heads = 1;
    says_the_same("says: llama, 1 kv head of 3", c, Precision::f32, usual);
    says_the_same("says in bf16: the same", c, Precision::bf16, 3e-2);
    c = speaker("transformer");
    says_the_same("says: norms after, sines", c, Precision::f32, usual);
    c = speaker("lecture");
    says_the_same("says: as in a lecture", c, Precision::f32, usual);
    c = speaker("gpt2"), c.layers = 1;
    c.hidden = 8 * 6 * 32 + 96;  // deeper than what is brought to shared memory at once: of 8 warps
#ifndef ON_A_GPU
    c.hidden /= 2;  // of 4
#endif
    says_the_same("says in bf16: deep", c, Precision::bf16, 3e-2);
#ifdef ON_A_GPU
    says_the_same("says: deep", c, Precision::f32, usual);
    c = speaker("llama"), c.heads = 1;
    c.width = 128;
    says_the_same("says in bf16: llama, heads of 128", c, Precision::bf16, 3e-2);
    c = speaker("gpt2"), c.layers = 1, c.width = 32, c.heads = 1, c.context = 270;  // a part of it is two pages
    says_the_same("says: far back", c, Precision::f32, usual);
    says_the_same("says in bf16: far back", c, Precision::bf16, 3e-2);
    c = small("gpt2");
    CHECK_OK(preset("baby", c));
    c.hidden = 0, c.vocab = 96;
    says_the_same("says: baby", c, Precision::f32, 2e-5, Backend::cpu);
    says_the_same("says in bf16: baby", c, Precision::bf16, 5e-2, Backend::cpu);
    CHECK_OK(preset_architecture("llama", c));
    says_the_same("says in bf16: baby, llama", c, Precision::bf16, 5e-2, Backend::cpu);
#else
    c = speaker("gpt2"), c.width = 96, c.hidden = 300, c.layers = 1;
    emulator::settings.shared_optin = 64 << 10;  // then few rows fit in a tile
    says_the_same("says: in parts", c, Precision::f32, usual);
    emulator::settings.shared_optin = 50 << 10;
    says_the_same("says in bf16: in parts", c, Precision::bf16, 3e-2);
    emulator::settings.shared_optin = 227 << 10;
#endif
}
TEST(generation_together, "several sessions on a GPU would not be independent, or search and score would find something else") {
    Config c = speaker("llama");
    c.kv_heads = 1, c.vocab = 256, c.layers = 1;
    Speakers two;
    if (!CHECK_OK(two.create(c, Precision::f32))) return;
    // Prompts of several lengths; one becomes two that go on apart; one forgets.
    constexpr size_t count = 5;
    std::vector<int32_t> said[2];
    for (size_t side = 0; side < 2; ++side) {
        Session sessions[count];
        Session* all[count];
        SampleConfig how[count];
        for (size_t i = 0; i < count; ++i) {
            all[i] = &sessions[i], how[i].seed = i + 1;
            if (i == 4) {
                CHECK_OK(sessions[i].fork(sessions[3]));
                continue;
            }
            CHECK_OK(sessions[i].create(two.runtimes[side], two.models[side]));
            const std::vector<int32_t> ids = text(i == 2 ? 44 : 1 + 12 * i, 256);
            CHECK_OK(sessions[i].feed(Span<const int32_t>(ids)));
        }
        int32_t ids[count];
        for (int round = 0; round < 8; ++round) {
            CHECK_OK(next(Span<Session* const>(all, count), Span<const SampleConfig>(how, count), ids));
            said[side].insert(said[side].end(), ids, ids + count);
        }
        CHECK(sessions[2].forgotten > 0);
        sessions[3] = Session();  // its pages are still read
        CHECK_OK(sessions[4].next(how[4], ids[0]));
        said[side].push_back(ids[0]);
    }
    CHECK(said[0] == said[1]);
    // A search, and what a text's tokens are thought.
    for (const bool is_search : {true, false}) {
        SearchResult found[2];
        Array<int32_t> ids[2];
        Array<float> logprobs[2];
        double sums[2] = {};
        for (size_t side = 0; side < 2; ++side) {
            BeamConfig beams;
            beams.beams = 3, beams.best = 3, beams.tokens = 12;
            Session session;
            CHECK_OK(session.create(two.runtimes[side], two.models[side]));
            if (is_search) CHECK_OK(session.search("It was a dark and stormy night", beams, found[side]));
            else
                CHECK_OK(session.score("It was a dark and stormy night; the rain fell in torrents, except ...", ids[side], logprobs[side],
                                       sums[side]));
        }
        if (is_search) CHECK(found[0].text.count == found[1].text.count && found[0].text.count == 36);
        if (is_search) CHECK(memcmp(found[0].text.items, found[1].text.items, found[0].text.count) == 0);
        if (!is_search) CHECK(fabs(sums[0] - sums[1]) <= usual * fabs(sums[0]) && sums[0] < -100);
        if (!is_search)
            CHECK(distance(Span<const float>(logprobs[0].items, logprobs[0].count),
                           Span<const float>(logprobs[1].items, logprobs[1].count)) <= usual);
    }
    CHECK(no_faults());
}
TEST(generation_many, "so many sessions that their rows are several tiles, and several threads draw, would say something else") {
    Config c = speaker("gpt2");
    c.layers = 1, c.vocab = 256;
    for (const Precision precision : {Precision::f32, Precision::bf16}) {
        Speakers two;
        if (!CHECK_OK(two.create(c, precision))) return;
        two.runtimes[1].threads = 3;
        constexpr size_t count = 40;
        std::vector<int32_t> said[2];
        double worst = 0;
        std::vector<Session> sessions[2];
        for (size_t side = 0; side < 2; ++side) {
            sessions[side].resize(count);
            Session* all[count];
            SampleConfig how[count];
            for (size_t i = 0; i < count; ++i) {
                all[i] = &sessions[side][i], how[i].seed = i + 1;
                const int32_t id = static_cast<int32_t>(6 * i);
                CHECK_OK(all[i]->create(two.runtimes[side], two.models[side]));
                CHECK_OK(all[i]->feed(Span<const int32_t>(&id, 1)));
            }
            int32_t ids[count];
            for (int round = 0; round < (precision == Precision::f32 ? 3 : 1); ++round) {
                CHECK_OK(next(Span<Session* const>(all, count), Span<const SampleConfig>(how, count), ids));
                said[side].insert(said[side].end(), ids, ids + count);
            }
            if (precision != Precision::f32) continue;
            // One that cannot go on does not keep those before it from reading what they have said.
            const LogitBias wrong{-1, 0.0f};
            how[20].bias = Span<const LogitBias>(&wrong, 1);
            const Status status = next(Span<Session* const>(all, count), Span<const SampleConfig>(how, count), ids);
            CHECK(status.error == Error::invalid_argument && strstr(status.message, "-1"));
            for (size_t i = 0; i < count; ++i) CHECK(all[i]->position == static_cast<int>(all[i]->sampled) + 1);
            CHECK(all[19]->position == all[20]->position + 1);
        }
        for (size_t i = 0; i < 20; ++i)
            if (said[0][i] == said[1][i]) worst = fmax(worst, distance(sessions[0][i].logits(), sessions[1][i].logits()));
        if (precision == Precision::f32) CHECK(said[0] == said[1]);
        CHECK(worst <= (precision == Precision::f32 ? usual : 3e-2) && no_faults());
    }
}
TEST(generation_drawn, "a token that a GPU draws for one of many sessions would be another than the processor's") {
    Config c = speaker("gpt2");
    c.layers = 1, c.vocab = 70;
    Speakers two;
    if (!CHECK_OK(two.create(c, Precision::f32))) return;
    constexpr size_t count = 24;
    const LogitBias bias{3, 2.0f};
    std::vector<int32_t> said[2];
    for (size_t side = 0; side < 2; ++side) {
        Session sessions[count];
        Session* all[count];
        SampleConfig how[count];
        for (size_t i = 0; i < count; ++i) {
            all[i] = &sessions[i], how[i].seed = i + 1, how[i].temperature = i % 5 == 4 ? 0 : 0.3 + 0.3 * static_cast<double>(i % 4);
            how[i].top_k = i % 3 == 1 ? 1 + static_cast<int>(i) : 0, how[i].top_p = i % 4 > 1 ? 0.8 : 1,
            how[i].min_p = i % 2 == 0 ? 0.1 : 0;
            if (i == 7) how[i].repetition_penalty = 1.5;
            if (i == 8) how[i].bias = Span<const LogitBias>(&bias, 1);
            const int32_t id = static_cast<int32_t>(2 * i);
            CHECK_OK(sessions[i].create(two.runtimes[side], two.models[side]));
            CHECK_OK(sessions[i].feed(Span<const int32_t>(&id, 1)));
        }
        int32_t ids[count];
        for (int round = 0; round < 8; ++round) {
            if (round == 5) how[2].temperature = 2, how[3].seed = 77, how[5].top_k = 2;  // others than were expected
            if (round == 6) CHECK_OK(sessions[6].feed(Span<const int32_t>(ids, 1)));
            CHECK_OK(next(Span<Session* const>(all, count), Span<const SampleConfig>(how, count), ids));
            said[side].insert(said[side].end(), ids, ids + count);
        }
    }
    CHECK(said[0] == said[1] && said[0].size() == 8 * count && no_faults());
}
TEST(generation_adapter, "a session on a GPU would not go on with an adapter, or not with its text") {
    const Config c = speaker("gpt2");
    Speakers two;
    if (!CHECK_OK(two.create(c, Precision::f32))) return;
    Adapter adapters[2];
    const std::vector<int32_t> ids = text(20, c.vocab);
    for (const bool keep : {true, false}) {
        for (int i = 0; i < 2; ++i) {
            Session& s = two.sessions[i];
            CHECK_OK(s.create(two.runtimes[i], two.models[i]));
            CHECK_OK(adapters[i].create(two.runtimes[i], two.models[i], {3, 6, ""}));
            for (int64_t k = 0; k < adapters[i].block; ++k) adapters[i].weights[k] += static_cast<float>(k % 7) * 0.01f;
            CHECK_OK(s.feed(Span<const int32_t>(ids)));
            CHECK_OK(s.use(&adapters[i], keep));
            CHECK_OK(s.feed(Span<const int32_t>(ids.data(), 3)));
        }
        CHECK(distance(two.sessions[0].logits(), two.sessions[1].logits()) <= usual);
    }
}
#ifndef ON_A_GPU
TEST(generation_cluster, "few sessions would get other bits on a GPU with clusters than on one without, or another's beside them") {
    Config configs[] = {speaker("gpt2"), speaker("llama"), speaker("gpt2")};
    configs[1].kv_heads = 1, configs[1].context = 75;
    configs[2].width = 64, configs[2].heads = 2, configs[2].vocab = 300, configs[2].context = 140;
    for (Config& c : configs) c.layers = 1;
    for (const Config& c : configs) {
        for (const Precision precision : {Precision::f32, Precision::bf16}) {
            std::vector<float> found[3];  // by a cluster, by a grid, and by a cluster each session alone
            for (int side = 0; side < 3; ++side) {
                emulator::settings.major = side == 1 ? 8 : 9;
                Speakers two;
                if (!CHECK_OK(two.create(c, precision))) return;
                constexpr size_t count = 3;
                Session sessions[count];
                Session* all[count];
                SampleConfig how;
                how.temperature = 0;
                const long clusters = emulator::counts.clusters, launches = emulator::counts.launches;
                for (size_t i = 0; i < count; ++i) {
                    all[i] = &sessions[i];
                    CHECK_OK(sessions[i].create(two.runtimes[1], two.models[1]));
                    const std::vector<int32_t> ids = text(i == 2 ? static_cast<size_t>(c.context) - 4 : 1 + 12 * i, c.vocab);
                    CHECK_OK(sessions[i].feed(Span<const int32_t>(ids)));
                }
                int32_t ids[count];
                for (int round = 0; round < 2; ++round) {
                    if (side < 2) CHECK_OK(next(Span<Session* const>(all, count), Span<const SampleConfig>(&how, 1), ids));
                    for (size_t i = 0; i < count && side == 2; ++i) CHECK_OK(all[i]->next(how, ids[i]));
                    for (Session* s : all) found[side].insert(found[side].end(), s->logits().begin(), s->logits().end());
                }
                CHECK(side == 1 ? emulator::counts.clusters == clusters : emulator::counts.clusters - clusters >= 2);
                CHECK(emulator::counts.launches > launches && no_faults());
            }
            CHECK(found[0].size() == 6 * static_cast<size_t>(c.vocab));
            for (int side = 1; side < 3; ++side)
                CHECK(found[side].size() == found[0].size() &&
                      memcmp(found[side].data(), found[0].data(), found[0].size() * sizeof(float)) == 0);
        }
    }
    emulator::settings.major = 9;
}
TEST(generation_counts, "how many sessions read a token together would change what one of them says") {
    Config c = speaker("gpt2");
    c.layers = 1;
    for (const Precision precision : {Precision::bf16, Precision::f32}) {
        Speakers two;
        if (!CHECK_OK(two.create(c, precision))) return;
        SampleConfig how;
        how.temperature = 0;
        std::vector<float> alone;  // [first id][vocab]
        for (int32_t id = 0; id < c.vocab; ++id) {
            Session& s = two.sessions[1];
            int32_t said;
            s.reset();
            CHECK_OK(s.feed(Span<const int32_t>(&id, 1)));
            CHECK_OK(s.next(how, said));
            alone.insert(alone.end(), s.logits().begin(), s.logits().end());
        }
        for (const int major : {9, 8}) {
            emulator::settings.major = major;  // with clusters and without
            Speakers other;
            if (!CHECK_OK(other.create(c, precision))) return;
            for (const size_t count : {size_t(1), size_t(8), size_t(9), size_t(17), size_t(256)}) {
                if (count == 256 && major == 9 && precision == Precision::f32) continue;
                std::vector<Session> sessions(count);
                std::vector<Session*> all;
                std::vector<int32_t> said(count);
                for (size_t i = 0; i < count; ++i) {
                    const int32_t id = static_cast<int32_t>(i % static_cast<size_t>(c.vocab));
                    all.push_back(&sessions[i]);
                    CHECK_OK(sessions[i].create(other.runtimes[1], other.models[1]));
                    CHECK_OK(sessions[i].feed(Span<const int32_t>(&id, 1)));
                }
                CHECK_OK(next(Span<Session* const>(all.data(), count), Span<const SampleConfig>(&how, 1), said.data()));
                int others = 0;
                for (size_t i = 0; i < count; ++i)
                    others += memcmp(sessions[i].logits().data, &alone[i % static_cast<size_t>(c.vocab) * static_cast<size_t>(c.vocab)],
                                     static_cast<size_t>(c.vocab) * sizeof(float)) != 0;
                CHECK(others == 0 && no_faults());
            }
        }
        emulator::settings.major = 9;
    }
}
#endif
TEST(generation_learnt, "a session would run with weights that a GPU has changed since") {
    Case c{"", small("gpt2"), some(3)};
    Learner l;
    StepResult r;
    CHECK_OK(l.create(Backend::cuda, c));
    Session session;
    CHECK_OK(session.create(l.runtime, l.model));
    const std::vector<int32_t> ids = text(9, c.config.vocab);
    for (int i = 0; i < 2; ++i) {
        CHECK_OK(l.trainer.step(r));
        session.reset();
        CHECK_OK(session.feed(Span<const int32_t>(ids)));
        Runtime runtime;
        runtime.backend = Backend::plain;
        Session plain;
        CHECK_OK(plain.create(runtime, l.model));
        CHECK_OK(plain.feed(Span<const int32_t>(ids)));
        CHECK(distance(plain.logits(), session.logits()) <= usual);
    }
    // Loaded only to run.
    Array<char> file(l.runtime);
    CHECK_OK(l.model.save_memory(file));
    Model loaded;
    CHECK_OK(loaded.load_memory(l.runtime, Text(file.items, file.count), Purpose::running));
    Session other;
    CHECK_OK(other.create(l.runtime, loaded));
    CHECK_OK(other.feed(Span<const int32_t>(ids)));
    CHECK(distance(session.logits(), other.logits()) <= 0);
}
#ifndef ON_A_GPU
TEST(generation_memory,
     "a session's memory on a GPU would not be known before, a token would be more than one launch, or an error would be lost") {
    const Config c = speaker("llama");
    Runtime runtime;
    runtime.backend = Backend::cuda;
    for (const Precision precision : {Precision::f32, Precision::bf16}) {
        runtime.precision = precision;
        Model model;
        CHECK_OK(model.create(runtime, c, Tokenizer(), 5));
        Memory memory;
        CHECK_OK(memory_needed(runtime, c, Purpose::running, 2, memory));
        const size_t all = emulator::settings.memory;
        emulator::settings.memory = static_cast<size_t>(memory.device);
        {
            Session one, two;
            CHECK_OK(one.create(runtime, model));
            CHECK_OK(two.create(runtime, model));
            const std::vector<int32_t> ids = text(9, c.vocab);
            CHECK_OK(one.feed(Span<const int32_t>(ids)));
            const emulator::Counts before = emulator::counts;
            int32_t id;
            for (int i = 0; i < 3; ++i) CHECK_OK(one.next(SampleConfig(), id));
            const emulator::Counts& now = emulator::counts;
            CHECK(now.launches - before.launches == 3 && now.copies == before.copies && now.allocations == before.allocations);
            CHECK(now.synchronisations - before.synchronisations == 3);
        }
        model = Model();
        CHECK_OK(model.create(runtime, c, Tokenizer(), 5));
        emulator::settings.memory = static_cast<size_t>(memory.device) - 1;
        Session one, two;
        CHECK_OK(one.create(runtime, model));
        const Status status = two.create(runtime, model);
        CHECK(status.error == Error::out_of_memory && strstr(status.message, "of the GPU's were asked for"));
        emulator::settings.memory = all;
        int failed = 0;
        for (long call = 1; call < 1000; ++call) {  // each call in turn
            Model fresh;
            CHECK_OK(fresh.create(runtime, c, Tokenizer(), 5));
            emulator::settings.fail_call = call;
            Session session;
            int32_t id = 1;
            Status of = session.create(runtime, fresh);
            if (of.ok()) of = session.feed(Span<const int32_t>(&id, 1));
            if (of.ok()) of = session.next(SampleConfig(), id);
            const bool reached = emulator::settings.fail_call == 0;
            emulator::settings.fail_call = 0;
            if (!reached) break;
            failed += !of.ok();
            CHECK(of.ok() || strlen(of.message) > 10);
        }
        CHECK(failed > 15);
    }
    Model model;
    Session session;
    CHECK_OK(model.create(runtime, c, Tokenizer(), 5));
    emulator::settings.no_device = true;
    CHECK(strstr(session.create(runtime, model).message, "no NVIDIA GPU"));
    emulator::settings.no_device = false;
}
#endif

#ifdef ON_A_GPU
TEST(large, "a model of a useful size would learn otherwise on a GPU") {
    Case c{"baby, f32", small("gpt2"), some(8)};
    c.config = baby(96), c.how.epsilon = 1e-3, c.reference = Backend::cpu, c.tolerance = 2e-5, c.steps = 1;
    compare(c);
    c.name = "baby, tf32", c.precision = Precision::tf32, c.tolerance = 5e-3;
    compare(c);
    c.name = "baby, bf16", c.precision = Precision::bf16, c.tolerance = 1e-2;
    compare(c);
    c.name = "baby, bf16, V=50304", c.config.vocab = 50304, c.how.batch = 2;
    compare(c);
}
double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
TEST(memory, "a trainer would take more of the GPU's memory than was planned") {
    for (const int batch : {64, 512}) {
        Case c{"", small("gpt2"), some(batch)};
        c.config = baby(96), c.precision = Precision::bf16;
        Runtime runtime;
        runtime.backend = Backend::cuda, runtime.precision = Precision::bf16;
        Memory plan;
        CHECK_OK(memory_needed(runtime, c.config, Purpose::training, batch, plan, 0, nullptr, 800));
        size_t before = 0, after = 0, all = 0;
        CHECK(cudaMemGetInfo(&before, &all) == cudaSuccess);
        Learner l;
        StepResult r;
        if (!CHECK_OK(l.create(Backend::cuda, c))) return;
        const double start = seconds();
        CHECK_OK(l.trainer.step(r));
        const double first = seconds() - start;
        for (int i = 0; i < 3; ++i) CHECK_OK(l.trainer.step(r));
        CHECK(cudaMemGetInfo(&after, &all) == cudaSuccess);
        const double taken = static_cast<double>(before - after), planned = static_cast<double>(plan.device);
        printf("B=%d: planned %.1f MB, taken %.1f MB; first step %.2f s\n", batch, planned / 1e6, taken / 1e6, first);
        CHECK(taken <= planned + 256e6);  // the driver's own: kernels, graphs
    }
}
#else
TEST(one_graph, "a step on a GPU would be more than one graph launch, or take memory") {
    Case c{"", small("gpt2"), some(3)};
    Learner l;
    StepResult r;
    CHECK_OK(l.create(Backend::cuda, c));
    for (int i = 0; i < 2; ++i) CHECK_OK(l.trainer.step(r));  // kernel after kernel; to be captured
    const emulator::Counts before = emulator::counts;
    for (int i = 0; i < 3; ++i) CHECK_OK(l.trainer.step(r));
    const emulator::Counts& now = emulator::counts;
    CHECK(now.graph_launches - before.graph_launches == 3 && now.launches == before.launches && now.allocations == before.allocations);
    const long long sent = (now.sent - before.sent) / 3, rows = int64_t(c.how.batch) * c.config.context;
    CHECK(now.copies - before.copies == 3 && sent <= 256 + 16 * c.how.batch);  // numbers of the run, and where each window begins
    printf("a step: %ld kernels in %ld graph, %ld synchronisations, %lld bytes sent\n", (now.kernels - before.kernels) / 3,
           (now.graph_launches - before.graph_launches) / 3, (now.synchronisations - before.synchronisations) / 3, sent);
    // Of a batch that the caller gives, the ids and targets, and of an evaluation no more rows than it has.
    const size_t n = static_cast<size_t>(rows);
    const long long sent_before = bytes_sent();
    CHECK_OK(l.trainer.step(Span<const int32_t>(l.ids.data(), n), Span<const int32_t>(l.ids.data() + 1, n), r));
    CHECK(now.sent - sent_before == sent + 8 * rows);
    Data few;
    Evaluation e;
    CHECK_OK(few.create(l.runtime, Span<const int32_t>(l.ids.data(), 6)));
    CHECK_OK(l.trainer.evaluate(few, e));
    const long long evaluated = now.sent;
    CHECK_OK(l.trainer.evaluate(few, e));
    CHECK(now.sent - evaluated == sent - 16 * (c.how.batch - 1) + 8 * 5 && e.tokens == 5);
    Memory memory, without;
    CHECK_OK(memory_needed(l.runtime, c.config, Purpose::training, c.how.batch, without));
    CHECK_OK(memory_needed(l.runtime, c.config, Purpose::training, c.how.batch, memory, 0, nullptr, l.data.tokens));
    CHECK(memory.device >= without.device + 4 * l.data.tokens);
    const size_t all = emulator::settings.memory;
    l.trainer = Trainer();
    emulator::settings.memory = static_cast<size_t>(memory.device);
    CHECK_OK(l.trainer.create(l.runtime, l.model, c.how, l.data));
    l.trainer = Trainer();
    emulator::settings.memory = static_cast<size_t>(memory.device) - 1;
    const Status status = l.trainer.create(l.runtime, l.model, c.how, l.data);
    CHECK(status.error == Error::out_of_memory && strstr(status.message, "of the GPU's were asked for"));
    emulator::settings.memory = all;
}

// Calls of a step, without and with those that read the results of others.
TEST(no_waiting, "the host would wait for a step on a GPU before it begins the next one, or hear of another one's loss") {
    Case c{"", small("gpt2"), some(1)};
    c.how.steps = 27, c.how.evaluate_every = 11;
    c.config.context = 4, c.config.heads = 1, c.config.width = c.config.hidden = 6, c.config.vocab = 13;
    Learner by_one, ahead, in_a_run;
    StepResult r;
    std::vector<double> losses;
    CHECK_OK(by_one.create(Backend::cuda, c));
    for (int i = 0; i < 27; ++i) {
        CHECK_OK(by_one.trainer.step(r));
        losses.push_back(r.loss);
    }
    const auto is_its_own = [&] { return r.step > 0 && r.step <= 27 && memcmp(&r.loss, &losses[static_cast<size_t>(r.step - 1)], 8) == 0; };
    CHECK_OK(ahead.create(Backend::cuda, c));
    for (int i = 0; i < 2; ++i) CHECK_OK(ahead.trainer.step(r));  // kernel after kernel; to be captured
    const emulator::Counts before = emulator::counts;
    const emulator::Counts& now = emulator::counts;
    for (int i = 0; i < steps_ahead; ++i) CHECK_OK(ahead.trainer.begin_step());
    CHECK(now.graph_launches - before.graph_launches == steps_ahead && now.copies - before.copies == steps_ahead);
    CHECK(now.synchronisations == before.synchronisations && now.launches == before.launches && now.kernels == before.kernels);
    CHECK(ahead.trainer.begin_step().error == Error::invalid_argument && ahead.trainer.step_count == 2 + steps_ahead);
    for (int64_t i = 3; i <= 22; ++i) {
        if (ahead.trainer.under_way > steps_ahead / 2) CHECK(CHECK_OK(ahead.trainer.finish_step(r)) && r.step == i && is_its_own());
        for (int k = 0; k < steps_ahead / 2 && i % 4 == 2 && ahead.trainer.step_count < 22; ++k) CHECK_OK(ahead.trainer.begin_step());
    }
    CHECK(now.graph_launches - before.graph_launches == 20 && now.synchronisations - before.synchronisations == 4);
    CHECK(now.launches == before.launches && now.allocations == before.allocations);
    printf("20 steps: 20 graph launches, %ld calls of CUDA's in all, %ld of them waits for a step at least %d before\n",
           now.calls - before.calls, now.synchronisations - before.synchronisations, steps_ahead / 2);
    CHECK(CHECK_OK(ahead.trainer.step(r)) && r.step == 23 && is_its_own() && ahead.trainer.under_way == 0);
    CHECK(ahead.trainer.finish_step(r).error == Error::invalid_argument);
    // What is saved is the state after the steps that were begun.
    for (int i = 0; i < 3; ++i) CHECK_OK(ahead.trainer.begin_step());
    CHECK_OK(ahead.trainer.save("build/test_cuda_ahead.safetensors"));
    CHECK_OK(in_a_run.create(Backend::cuda, c));
    CHECK(CHECK_OK(in_a_run.trainer.load("build/test_cuda_ahead.safetensors")) && in_a_run.trainer.step_count == 26);
    CHECK(CHECK_OK(in_a_run.trainer.step(r)) && is_its_own());
    CHECK(CHECK_OK(ahead.trainer.finish_step(r)) && r.step == 24 && is_its_own());
    // A loss that is not finite is told with its step's number.
    CHECK_OK(ahead.trainer.step(r));
    CHECK_OK(ahead.trainer.fetch());
    ahead.model.weights[ahead.model.find("ln_f.weight")->offset] = INFINITY, ++ahead.model.version;
    for (int i = 0; i < 2; ++i) CHECK_OK(ahead.trainer.begin_step());
    for (int i = 0; i < 2; ++i) CHECK(CHECK_OK(ahead.trainer.finish_step(r)) && r.skipped && r.step == 28 + i);
    // In a run: each step once, in order, and all before an evaluation.
    struct Seen {
        const std::vector<double>* losses;
        int64_t steps, stop;
        int wrong, evaluations;
    } seen{&losses, 0, 0, 0, 0};
    RunConfig how;
    RunResult result;
    how.user = &seen;
    how.progress = [](void* user, const Progress& p) {
        Seen& s = *static_cast<Seen*>(user);
        s.wrong += p.step->step != ++s.steps || memcmp(&p.step->loss, &(*s.losses)[static_cast<size_t>(s.steps - 1)], 8) != 0;
        s.wrong += p.step->tokens_per_second <= 0 || (p.evaluation && s.steps % 11 != 0 && s.steps != 27);
        s.evaluations += p.evaluation != nullptr;
        return s.steps != s.stop;
    };
    Trainer& trainer = in_a_run.trainer;
    Data few;
    CHECK_OK(in_a_run.create(Backend::cuda, c));
    CHECK_OK(few.create(in_a_run.runtime, Span<const int32_t>(in_a_run.ids.data(), 6)));
    trainer.validation = &few;
    for (const int64_t stop : {13, 0}) {
        seen.stop = stop;
        CHECK_OK(trainer.run(how, result));
        CHECK(seen.wrong == 0 && seen.steps == trainer.step_count && trainer.under_way == 0 && result.step == seen.steps);
        CHECK(stop == 0 ? seen.steps == 27 && seen.evaluations == 3 && !result.cancelled : seen.steps < 22 && result.cancelled);
    }
    CHECK(no_faults());
}

TEST(troubles, "an error of CUDA's would not be said, or leave something behind") {
    Case c{"", small("gpt2"), some(1)};
    c.config.context = 4, c.config.heads = 1;
    const auto message = [&] {
        Learner l;
        return std::string(l.create(Backend::cuda, c).message);
    };
    emulator::settings.no_device = true;
    CHECK(message().find("no NVIDIA GPU") != std::string::npos);
    emulator::settings.no_device = false;
    emulator::settings.fail_allocation = 1;
    CHECK(message().find("out of memory: ") != std::string::npos);
    emulator::settings.fail_allocation = 0;
    int failed = 0;
    c.precision = Precision::bf16;
    for (long call = 1; call < 1000; call += call < 60 ? 1 : 31) {  // each call in turn; then launches, one like the other
        emulator::settings.fail_call = call;
        Learner l;
        Status status = l.create(Backend::cuda, c);
        StepResult r;
        for (int i = 0; i < 3 && status.ok(); ++i) status = l.trainer.step(r);
        if (status.ok()) status = l.trainer.fetch();
        const bool reached = emulator::settings.fail_call == 0;
        emulator::settings.fail_call = 0;
        if (!reached) break;
        failed += !status.ok();
        CHECK(status.ok() || strlen(status.message) > 10);
    }
    CHECK(failed > 20);
    // After such a step a trainer goes on from where it was saved, or not at all.
    const char* path = "build/test_cuda_troubles.safetensors";
    double losses[2] = {};
    int refused = 0;
    for (long call = 0; call < 200; call += call < 12 ? 1 : 13) {  // 0: none fails
        Learner l;
        StepResult r;
        if (!CHECK_OK(l.create(Backend::cuda, c)) || !CHECK_OK(l.trainer.save(path))) return;
        emulator::settings.fail_call = call;
        const Status status = l.trainer.step(r);
        const bool reached = call == 0 || emulator::settings.fail_call == 0;
        emulator::settings.fail_call = 0;
        if (!reached) break;
        if (!status.ok() && !l.trainer.step(r).ok()) {
            ++refused;
            CHECK(!l.trainer.save(path).ok());
            CHECK_OK(l.trainer.load(path));
            CHECK_OK(l.trainer.step(r));
        }
        const double first = r.loss;
        CHECK_OK(l.trainer.step(r));
        if (call == 0) losses[0] = first, losses[1] = r.loss;
        else CHECK(fabs(first - losses[0]) + fabs(r.loss - losses[1]) < 1e-9);
    }
    CHECK(refused > 5);
    remove(path);
}
TEST(two_models,
     "sessions of a small model would take shared memory from those of a large one, or a GPU with too little of it would have none") {
    Config large = speaker("gpt2"), tiny = speaker("gpt2");
    large.width = 96, large.hidden = 256, tiny.width = 8, tiny.heads = 1;
    const int32_t ids[] = {1, 2, 3};
    const auto feed = [&](Speakers& of, double tolerance) {
        for (Session& session : of.sessions) CHECK_OK(session.feed(ids));
        CHECK(distance(of.sessions[0].logits(), of.sessions[1].logits()) < tolerance);
    };
    Speakers one, two, here;
    if (!CHECK_OK(one.create(large, Precision::f32))) return;
    feed(one, 1e-5);
    if (!CHECK_OK(two.create(tiny, Precision::f32))) return;
    feed(two, 1e-5), feed(one, 1e-5);
    emulator::settings.shared_optin = 16 << 10;  // then it runs on the processor
    if (!CHECK_OK(here.create(large, Precision::bf16))) return;
    feed(here, 1e-6), feed(here, 1e-6);
    emulator::settings.shared_optin = 227 << 10;
}
#endif

// What compute-sanitizer looks at, too: each kernel that a decoder needs, in a few small steps.
void sanitized(const char* name, Precision precision, double tolerance, Optimizer optimizer = Optimizer::adamw) {
    Case c{name, small("gpt2"), some(3)};
    c.how.optimizer = optimizer;
    c.how.dropout = 0.1, c.steps = 3, c.precision = precision, c.tolerance = tolerance;
    compare(c);
}
TEST(sanitized_f32, "a small model would learn otherwise on a GPU, in f32") { sanitized("a few steps in f32", Precision::f32, usual); }
TEST(sanitized_bf16, "a small model would learn otherwise on a GPU, in bf16") { sanitized("a few steps in bf16", Precision::bf16, 3e-2); }
TEST(sanitized_fp16, "a small model would learn otherwise on a GPU, in fp16") { sanitized("a few steps in fp16", Precision::fp16, 6e-3); }
TEST(sanitized_muon, "a small model would learn otherwise by Muon on a GPU") {
    sanitized("a few steps by Muon", Precision::f32, 1e-3, Optimizer::muon);
}

TEST(profile, "where the time of a step on a GPU goes could not be seen") {
    Runtime runtime;
    runtime.backend = Backend::cuda;
    Array<ProfileRow> rows(runtime);
    const Config config = small("gpt2");
    CHECK_OK(profile(runtime, config, 2, 0.01, rows));
    double sum = 0;
    for (const ProfileRow& row : rows) sum += row.seconds;
    CHECK(rows.count > 10 && sum > 0 && no_faults());
    double bytes = 0;
    for (const ProfileRow& row : rows) bytes += row.bytes;
    for (const Precision precision : {Precision::f32, Precision::tf32, Precision::bf16, Precision::fp16}) {
        double flops = 0, rate = 0, narrow = 0;
        runtime.precision = precision;
        CHECK(CHECK_OK(gpu_ceilings(runtime, flops, rate)) && flops > 0 && isfinite(flops) && rate > 0 && isfinite(rate) && no_faults());
        if (precision != Precision::bf16) continue;
        CHECK_OK(profile(runtime, config, 2, 0.01, rows));
        for (const ProfileRow& row : rows) {
            narrow += row.bytes;
            if (strcmp(row.kind, "add") == 0) CHECK(row.bytes <= 0);  // the products before have made it
        }
        CHECK(narrow > 0.4 * bytes && narrow < 0.95 * bytes);
    }
    runtime.backend = Backend::plain;
    double none = 0;
    CHECK(gpu_ceilings(runtime, none, none).error == Error::invalid_argument);
}

int main(int count, char** arguments) {
#ifdef ON_A_GPU
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: there is no NVIDIA GPU in this machine\n0 passed, 0 failed\n");
        return 0;
    }
#endif
    return run_tests(count, arguments);
}
