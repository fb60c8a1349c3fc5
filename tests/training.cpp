// Training: the same bits whatever the threads, kernels and the host's floating-point mode; accumulation; resuming; memory; what must not reach
// the weights; schedules, best model and early stopping.
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include <initializer_list>

#include "../babygpt.h"
#include "check.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

using namespace babygpt;

static Config tiny_config() {
    Config config;
    config.layers = 2, config.heads = 2, config.width = 24, config.context = 16, config.vocab = 29;
    return config;
}

static Config tiny_llama() {
    Config config = tiny_config();
    CHECK_OK(preset_architecture("llama", config));
    config.heads = 4, config.kv_heads = 2, config.hidden = 21;
    return config;
}

static TrainConfig tiny_run(int64_t steps) {
    TrainConfig how;
    how.batch = 4, how.steps = steps, how.lr = 3e-3, how.warmup = 5, how.evaluate_every = 1000;
    return how;
}

// A text that is neither constant nor random: each id follows from the one before it, but for a jump now and then.
static const int32_t* some_ids(size_t count) {
    static int32_t ids[6000];
    for (size_t i = 0; i < count; ++i)
        ids[i] = static_cast<int32_t>(i % 37 == 0 ? i / 37 % 29 : static_cast<size_t>(ids[i - 1] * 3 + 1) % 29);
    return ids;
}

static uint64_t hash(const float* values, int64_t count) {
    uint64_t h = 14695981039346656037u;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values);
    for (int64_t i = 0; i < count * 4; ++i) h = (h ^ bytes[i]) * 1099511628211u;
    return h;
}

// The hash of all weights and moments after so many steps.
static uint64_t train(Runtime& runtime, const Config& config, const TrainConfig& how, int64_t steps) {
    Model model;
    Data data;
    Trainer trainer;
    CHECK_OK(model.create(runtime, config, Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(6000), 6000)));
    CHECK_OK(trainer.create(runtime, model, how, data));
    StepResult result;
    while (trainer.step_count < steps && check_status(trainer.step(result), "step", __FILE__, __LINE__)) {
    }
    return hash(model.weights, model.block) ^ hash(trainer.moment1, model.block) * 3 ^ hash(trainer.moment2, model.block) * 7;
}

TEST(threads_and_kernels, "weights would depend on the number of threads or on the processor") {
    TrainConfig how = tiny_run(50);
    how.dropout = 0.1, how.label_smoothing = 0.05;
    Config config = tiny_config();
    config.activation = Activation::gelu;
    for (int variant = 0; variant < 3; ++variant) {
        config.tied = variant != 1;
        if (variant == 2) config.positions = Positions::rotary, how.optimizer = Optimizer::muon;
        Runtime reference;
        reference.threads = 1;
        reference.backend = Backend::plain;
        const int steps = variant == 0 ? 50 : 15;
        const uint64_t expected = train(reference, config, how, steps);
        for (const int threads : {1, 2, 3, 7}) {
            Runtime runtime;
            runtime.threads = threads;
            CHECK(train(runtime, config, how, steps) == expected);
        }
        for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {  // one that the machine lacks stands for the best it has
            Runtime runtime;
            runtime.isa = isa;
            CHECK(train(runtime, config, how, steps) == expected);
        }
    }
}

static void serial_jobs(void*, int count, void (*task)(void*, int), void* context) {
    for (int i = count; i-- > 0;) task(context, i);  // in an order of its own
}

TEST(host_jobs, "a host's own job system would change the result") {
    Runtime own, host;
    host.parallel = serial_jobs;
    CHECK(train(own, tiny_config(), tiny_run(10), 10) == train(host, tiny_config(), tiny_run(10), 10));
}

TEST(host_float_mode, "a host that flushes subnormals or rounds another way would get other weights, or lose its mode") {
    Runtime runtime;
    const uint64_t expected = train(runtime, tiny_config(), tiny_run(20), 20);
    CHECK(fesetround(FE_UPWARD) == 0);
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);  // flush to zero, denormals are zero
#endif
    const uint64_t found = train(runtime, tiny_config(), tiny_run(20), 20);
    CHECK(fegetround() == FE_UPWARD);
    fesetround(FE_TONEAREST);
    uint64_t llamas[2];
    Evaluation of_models[2], of_counts[3];
    for (const int up : {0, 1}) {  // only what is made and measured, not the steps
        Model model;
        Data data;
        Trainer trainer;
        StepResult result;
        Ngram counts;
        CHECK_OK(model.create(runtime, tiny_llama(), Tokenizer()));
        CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(2000), 2000)));
        CHECK_OK(counts.create(runtime, data, 29, 3));
        fesetround(up ? FE_UPWARD : FE_TONEAREST);
        CHECK_OK(trainer.create(runtime, model, tiny_run(20), data));
        CHECK_OK(evaluate(runtime, model, data, of_models[up]));
        CHECK_OK(evaluate(runtime, counts, data, of_counts[up]));
        fesetround(FE_TONEAREST);
        Runtime one;
        one.threads = 1;
        if (up) CHECK_OK(evaluate(one, counts, data, of_counts[2]));
        for (int i = 0; i < 5; ++i) CHECK_OK(trainer.step(result));
        llamas[up] = hash(model.weights, model.block);
    }
    CHECK(llamas[0] == llamas[1] && memcmp(&of_models[0], &of_models[1], sizeof *of_models) == 0);
    CHECK(memcmp(&of_counts[0], &of_counts[1], sizeof *of_counts) == 0 && memcmp(&of_counts[0], &of_counts[2], sizeof *of_counts) == 0);
#if defined(__SSE2__)
    CHECK((_mm_getcsr() & 0x8040u) == 0x8040u);
    _mm_setcsr(before & ~0x6000u);
#endif
    CHECK(found == expected);
}

TEST(accumulation, "four micro-batches would not be one large batch") {
    Runtime runtime;
    TrainConfig whole = tiny_run(8), parts = tiny_run(8);
    whole.batch = 8, whole.dropout = parts.dropout = 0.2;
    parts.batch = 2, parts.accumulate = 4;
    CHECK(train(runtime, tiny_config(), whole, 8) == train(runtime, tiny_config(), parts, 8));
}

TEST(learns, "nothing would be learnt") {
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Evaluation before, after;
    CHECK_OK(model.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(1000), 1000)));
    TrainConfig how = tiny_run(300);
    how.lr = 1e-2;
    CHECK_OK(trainer.create(runtime, model, how, data));
    CHECK_OK(trainer.evaluate(data, before));
    RunResult result;
    CHECK_OK(trainer.run(RunConfig(), result));
    CHECK_OK(trainer.evaluate(data, after));
    CHECK(fabs(before.loss - log(29)) < 0.1 && after.loss < 0.5 * before.loss);
    CHECK(after.top5 >= after.top1 && after.top1 > 0.5 && before.top1 < 0.2);
    CHECK(fabs(after.perplexity - exp(after.loss)) < 1e-9 * after.perplexity && result.step == 300);
}

// Random symbols, of a random number, and the same backwards: 0 ends both, and 1 begins what the decoder reads.
struct Reversals {
    static constexpr int most_symbols = 6, count = 400;
    int32_t source[count][most_symbols + 1], ids[count][most_symbols + 1], targets[count][most_symbols + 1];
    Example examples[count];
    Reversals() {
        unsigned random = 12345;
        const auto next = [&](unsigned below) {
            return static_cast<int>((random = random * 1664525u + 1013904223u) >> 8) % static_cast<int>(below);
        };
        for (int n = 0; n < count; ++n) {
            const int length = 1 + next(most_symbols);
            for (int i = 0; i < length; ++i) source[n][i] = 2 + next(8);
            source[n][length] = 0, ids[n][0] = 1, targets[n][length] = 0;
            for (int i = 0; i < length; ++i) ids[n][i + 1] = targets[n][i] = source[n][length - 1 - i];
            const size_t size = static_cast<size_t>(length) + 1;
            examples[n] = Example{{ids[n], size}, {targets[n], size}, {source[n], size}, {}};
        }
    }
};
static Config reverser() {
    Config config = tiny_config();
    config.encoder_layers = 1, config.layers = 1, config.vocab = 10, config.context = Reversals::most_symbols + 1;
    return config;
}

TEST(examples, "an encoder-decoder could not learn to read one thing and say another, or micro-batches would teach it other things") {
    static const Reversals data_of;
    TrainConfig how = tiny_run(1000);
    how.batch = 32, how.lr = 1e-2, how.weight_decay = 0.01;
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Evaluation before, after;
    StepResult result;
    CHECK_OK(model.create(runtime, reverser(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const Example>(data_of.examples)));
    CHECK_OK(trainer.create(runtime, model, how, data, &data));
    CHECK_OK(trainer.evaluate(data, before));
    while (trainer.step_count < how.steps && check_status(trainer.step(result), "step", __FILE__, __LINE__)) {
    }
    CHECK_OK(trainer.evaluate(data, after));
    CHECK(before.loss > 2.2 && before.loss < 2.5 && before.tokens == data.tokens);
    if (!CHECK(after.loss < 0.05 && after.top1 > 0.98)) printf("    loss %g, top1 %g\n", after.loss, after.top1);

    uint64_t hashes[3];
    for (int way = 0; way < 3; ++way) {
        how.batch = way == 0 ? 12 : 3, how.accumulate = way == 0 ? 1 : 4, how.dropout = 0.1, how.steps = 5;
        runtime.threads = way + 1;
        Runtime other;
        other.threads = way + 1, other.backend = way == 2 ? Backend::plain : Backend::cpu;
        CHECK_OK(model.create(other, reverser(), Tokenizer()));
        CHECK_OK(trainer.create(other, model, how, data));
        for (int i = 0; i < 5; ++i) CHECK_OK(trainer.step(result));
        hashes[way] = hash(model.weights, model.block);
        trainer = Trainer(), model = Model();
    }
    CHECK(hashes[0] == hashes[1] && hashes[1] == hashes[2]);
}
TEST(weights_of_examples, "an example of weight 2 would not count as two, or weights would cost the bits that backends share") {
    static Reversals data_of;
    Runtime runtime;
    Data data;
    StepResult result, other;
    const auto step = [&](Span<const Example> examples, StepResult& to) {  // of a fresh model; with its weights' hash
        Model model;
        Trainer trainer;
        TrainConfig how = tiny_run(5);
        how.batch = static_cast<int>(examples.size), how.clip = 0;
        CHECK_OK(model.create(runtime, reverser(), Tokenizer()));
        CHECK_OK(data.create(runtime, examples));
        CHECK_OK(trainer.create(runtime, model, how, data));
        CHECK_OK(trainer.step(examples, to));
        return hash(model.weights, model.block);
    };
    Example some[3] = {data_of.examples[0], data_of.examples[1], data_of.examples[2]};
    const Example twice[4] = {some[0], some[0], some[1], some[2]};
    some[0].weight = 2;
    step(Span<const Example>(some, 3), result), step(Span<const Example>(twice, 4), other);
    CHECK(fabs(result.loss - other.loss) < 1e-9 && fabs(result.grad_norm - other.grad_norm) < 1e-6 * other.grad_norm);
    some[0].weight = 0;
    step(Span<const Example>(some, 3), result), step(Span<const Example>(some + 1, 2), other);
    CHECK(fabs(result.loss - other.loss) < 1e-9 && fabs(result.grad_norm - other.grad_norm) < 1e-6 * other.grad_norm);
    const uint64_t unweighted = step(Span<const Example>(some + 1, 2), result);
    some[1].weight = some[2].weight = 0.25f;  // of all alike: nothing changes, and a power of two not even a bit
    CHECK(step(Span<const Example>(some + 1, 2), other) == unweighted && !(result.loss < other.loss) && !(result.loss > other.loss));

    for (int n = 0; n < Reversals::count; ++n) data_of.examples[n].weight = 0.3f * static_cast<float>(n % 5);
    CHECK_OK(data.create(runtime, Span<const Example>(data_of.examples)));
    uint64_t hashes[3];
    for (int way = 0; way < 3; ++way) {
        TrainConfig how = tiny_run(5);
        how.batch = way == 0 ? 12 : 3, how.accumulate = way == 0 ? 1 : 4;
        Runtime own;
        own.threads = way + 1, own.backend = way == 2 ? Backend::plain : Backend::cpu;
        Model model;
        Trainer trainer;
        CHECK_OK(model.create(own, reverser(), Tokenizer()));
        CHECK_OK(trainer.create(own, model, how, data));
        for (int i = 0; i < 5; ++i) CHECK_OK(trainer.step(result));
        hashes[way] = hash(model.weights, model.block);
    }
    CHECK(hashes[0] == hashes[1] && hashes[1] == hashes[2]);
    const uint64_t fingerprint = data.fingerprint;
    data_of.examples[7].weight = 5;
    CHECK_OK(data.create(runtime, Span<const Example>(data_of.examples)));
    CHECK(data.fingerprint != fingerprint);
    for (const float wrong : {-1.0f, static_cast<float>(NAN), static_cast<float>(INFINITY)}) {
        Model model;
        Trainer trainer;
        TrainConfig how = tiny_run(5);
        how.batch = 1;
        Example example = data_of.examples[0];
        example.weight = wrong;
        CHECK_OK(model.create(runtime, reverser(), Tokenizer()));
        CHECK_OK(trainer.create(runtime, model, how, data));
        CHECK(trainer.step(Span<const Example>(&example, 1), result).error == Error::invalid_argument && trainer.step_count == 0);
    }
}
TEST(wrong_examples, "an example that does not fit its model would be read beyond its end") {
    Runtime runtime;
    Model model, decoder;
    Data data, text;
    Trainer trainer;
    StepResult result;
    static const int32_t ids[20] = {1, 2, 3};
    static const float numbers[6] = {};
    const Example good{{ids, 3}, {ids, 3}, {ids, 2}, {}};
    CHECK_OK(model.create(runtime, reverser(), Tokenizer()));
    CHECK_OK(decoder.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const Example>(&good, 1)));
    CHECK_OK(text.create(runtime, Span<const int32_t>(ids)));
    TrainConfig how = tiny_run(20);
    how.batch = 1;
    CHECK(trainer.create(runtime, model, how, text).error == Error::invalid_argument);
    CHECK_OK(trainer.create(runtime, model, how, data));
    CHECK_OK(trainer.step(result));
    const int32_t outside = 10;
    const Example bad[] = {{{ids, 0}, {ids, 0}, {ids, 2}, {}},      {{ids, 8}, {ids, 8}, {ids, 2}, {}},
                           {{ids, 3}, {ids, 2}, {ids, 2}, {}},      {{ids, 3}, {ids, 3}, {}, {}},
                           {{ids, 3}, {ids, 3}, {ids, 8}, {}},      {{ids, 3}, {ids, 3}, {ids, 2}, {numbers, 3}},
                           {{&outside, 1}, {ids, 1}, {ids, 2}, {}}, {{ids, 1}, {&outside, 1}, {ids, 2}, {}},
                           {{ids, 1}, {ids, 1}, {&outside, 1}, {}}};
    for (const Example& example : bad) CHECK(trainer.step(Span<const Example>(&example, 1), result).error == Error::invalid_argument);
    CHECK(trainer.step_count == 1);
    CHECK_OK(trainer.step(Span<const Example>(&good, 1), result));
    CHECK_OK(trainer.create(runtime, decoder, how, text));
    CHECK(trainer.step(Span<const Example>(&good, 1), result).error == Error::invalid_argument);
}

TEST(trained_after_conversion,
     "a model in int8 that is trained, or gets weights, would be read beyond its end, or rounded when it is saved") {
    Runtime runtime, plain;
    plain.backend = Backend::plain;
    const int32_t ids[] = {1, 2, 3, 4};
    const auto says_the_same = [&](Session& session, const Model& model) {
        Session other;
        CHECK_OK(other.create(plain, model));
        session.reset();
        CHECK_OK(session.feed(ids));
        CHECK_OK(other.feed(ids));
        CHECK(memcmp(session.logits().data, other.logits().data, other.logits().size * sizeof(float)) == 0);
    };
    for (const Dtype dtype : {Dtype::bf16, Dtype::int8}) {
        Model model, other;
        Data data;
        Trainer trainer;
        Session session;
        StepResult result;
        Config config = tiny_config();
        CHECK_OK(other.create(runtime, config, Tokenizer(), 2));
        config.dtype = dtype;
        CHECK_OK(model.create(runtime, config, Tokenizer()));
        CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(500), 500)));
        CHECK_OK(session.create(runtime, model));
        says_the_same(session, model);
        CHECK_OK(trainer.create(runtime, model, tiny_run(10), data));
        CHECK(model.config.dtype == Dtype::f32);
        says_the_same(session, model);
        CHECK_OK(trainer.step(result));
        CHECK_OK(model.convert(dtype));
        says_the_same(session, model);
        CHECK_OK(trainer.step(result));
        CHECK(model.config.dtype == Dtype::f32);
        says_the_same(session, model);
        CHECK_OK(model.convert(dtype));
        CHECK(model.copy_weights(other) > 0 && model.config.dtype == Dtype::f32);
        says_the_same(session, model);
    }
}

TEST(summaries, "the rows of a summary would not add up to the model") {
    Runtime runtime;
    for (const bool tied : {false, true})
        for (const int encoder_layers : {0, 1}) {
            Config config = tiny_config();
            config.tied = tied, config.encoder_layers = encoder_layers;
            Model model;
            Array<SummaryRow> rows;
            CHECK_OK(model.create(runtime, config, Tokenizer()));
            CHECK_OK(summary(runtime, config, 2, rows));
            int64_t parameters = 0;
            for (const SummaryRow& row : rows) parameters += row.parameters;
            CHECK(parameters == model.parameters);
        }
    Config huge = tiny_config();  // a batch that check allows
    Array<SummaryRow> rows;
    huge.width = 65536, huge.context = 65536, huge.vocab = 10000000;
    CHECK(summary(runtime, huge, 256, rows).error == Error::invalid_argument);
}

TEST(evaluating, "a loss would depend on who measures it, or a long measurement could not be watched and ended") {
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Evaluation by_trainer, whole, part;
    CHECK_OK(model.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(1000), 1000)));
    CHECK_OK(trainer.create(runtime, model, tiny_run(10), data));
    CHECK_OK(trainer.evaluate(data, by_trainer));
    CHECK_OK(evaluate(runtime, model, data, whole, 3));
    CHECK(memcmp(&whole, &by_trainer, sizeof whole) == 0 && whole.tokens == 999);
    double seen = -1;
    const auto stop_late = [](void* user, double done) {
        double& last = *static_cast<double*>(user);
        CHECK(done > last && done < 1);
        last = done;
        return done < 0.5;
    };
    CHECK_OK(evaluate(runtime, model, data, part, 3, stop_late, &seen));
    CHECK(seen >= 0.5 && part.tokens >= 480 && part.tokens < 600);
    CHECK(evaluate(runtime, model, data, part, 0).error == Error::invalid_argument);
    // Of pairs that were only begun, too, a byte has as many bits as of all.
    Config translator = tiny_config();
    translator.encoder_layers = 1;
    char lines[4000];
    size_t size = 0;
    for (int i = 0; i < 100; ++i) size += static_cast<size_t>(snprintf(lines + size, sizeof lines - size, "abc d%02d\txyz u%02d\n", i, i));
    Corpus corpus;
    CorpusConfig how;
    how.format = TextFormat::tsv;
    Tokenizer bytes;
    Model other;
    Data pairs;
    CHECK_OK(corpus.open_memory(runtime, Text(lines, size), how));
    CHECK_OK(bytes.train(runtime, {TokenizerKind::bpe, 256 + 1}, Text(lines, size)));
    translator.vocab = 0;
    CHECK_OK(pairs.create_pairs(runtime, corpus, Part::all, bytes, translator.context));
    CHECK_OK(other.create(runtime, translator, static_cast<Tokenizer&&>(bytes)));
    CHECK_OK(evaluate(runtime, other, pairs, whole));
    CHECK_OK(evaluate(runtime, other, pairs, part, 8, [](void*, double) { return false; }));
    CHECK(part.tokens < whole.tokens / 4 && fabs(part.bits_per_byte / part.loss - whole.bits_per_byte / whole.loss) < 1e-9);
}

TEST(profiles, "nobody could see where the time of a step goes, or its work would be counted wrongly") {
    Runtime runtime;
    Array<ProfileRow> rows(runtime);
    CHECK_OK(profile(runtime, tiny_config(), 4, 0.05, rows));
    double flops = 0, seconds = 0;
    for (const ProfileRow& row : rows) {
        CHECK(row.seconds >= 0 && row.bytes >= 0 && row.op[0] && row.kind[0]);
        flops += row.flops, seconds += row.seconds;
    }
    CHECK(fabs(flops / (3 * flops_per_token(tiny_config()) * 4 * 16) - 1) < 1e-9 && seconds > 0);
    CHECK(strcmp(rows[0].kind, "embedding") == 0 && !rows[0].backward && strcmp(rows[rows.size() - 1].kind, "update") == 0);
    Config none = tiny_config();
    none.vocab = 0;
    CHECK(!profile(runtime, none, 4, 0.05, rows).ok());
    none.causal = false;  // an encoder has a gap's id at least, and sees the whole text
    CHECK_OK(profile(runtime, none, 4, 0, rows));
    flops = 0, none.vocab = 1;
    for (const ProfileRow& row : rows) flops += row.flops;
    CHECK(fabs(flops / (3 * flops_per_token(none) * 4 * 16) - 1) < 1e-9);
}

TEST(resume, "an interrupted run would end with other weights than one that was not") {
    const char* path = "build/test_resume.safetensors";
    for (const int at : {1, 13, 24}) {
        Runtime before, after;
        before.threads = 2, after.threads = 3;
        Model model, whole, again;
        Data data;
        Trainer first, straight, second;
        TrainConfig how = tiny_run(25);
        how.dropout = 0.1;
        StepResult result;
        CHECK_OK(data.create(before, Span<const int32_t>(some_ids(2000), 2000)));
        CHECK_OK(model.create(before, tiny_config(), Tokenizer()));
        CHECK_OK(first.create(before, model, how, data));
        for (int i = 0; i < at; ++i) CHECK_OK(first.step(result));
        if (!CHECK_OK(first.save(path)) || !CHECK_OK(again.load(after, path))) return;
        TrainConfig stored;
        CHECK_OK(read_train_config(after, path, stored));
        CHECK_OK(second.create(after, again, stored, data));
        CHECK_OK(second.load(path));
        for (int i = at; i < 25; ++i) CHECK_OK(second.step(result));
        CHECK_OK(whole.create(before, tiny_config(), Tokenizer()));
        CHECK_OK(straight.create(before, whole, how, data));
        for (int i = 0; i < 25; ++i) CHECK_OK(straight.step(result));
        CHECK(memcmp(whole.weights, again.weights, static_cast<size_t>(whole.block) * 4) == 0);
        CHECK(memcmp(straight.moment1, second.moment1, static_cast<size_t>(whole.block) * 4) == 0);
        CHECK(memcmp(straight.moment2, second.moment2, static_cast<size_t>(whole.block) * 4) == 0);
    }
    remove(path);
}

// Memory that is counted, and refused from the n-th allocation on.
struct Counter {
    size_t in_use = 0, peak = 0, calls = 0, refuse_from = SIZE_MAX;
    void attach(Runtime& runtime) {
        runtime.memory_user = this;
        runtime.allocate = [](void* user, size_t bytes, size_t alignment) -> void* {
            Counter& c = *static_cast<Counter*>(user);
            if (++c.calls > c.refuse_from) return nullptr;
            void* memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
            memset(memory, 0xa5, bytes);  // nobody may count on zeros
            c.in_use += bytes;
            c.peak = c.in_use > c.peak ? c.in_use : c.peak;
            return memory;
        };
        runtime.release = [](void* user, void* memory, size_t bytes) {
            static_cast<Counter*>(user)->in_use -= bytes;
            free(memory);
        };
    }
};

static void check_memory(const Config& config) {
    Counter counter;
    Runtime runtime;
    runtime.threads = 1;
    counter.attach(runtime);
    {
        Memory training, running;
        CHECK_OK(memory_needed(runtime, config, Purpose::training, 4, training));
        CHECK_OK(memory_needed(runtime, config, Purpose::running, 1, running));
        Data data;
        Example examples[5];
        for (Example& e : examples) e.ids = e.targets = e.source = Span<const int32_t>(some_ids(9), 9);
        if (config.encoder_layers > 0) CHECK_OK(data.create(runtime, Span<const Example>(examples)));
        else CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(500), 500)));
        const size_t others = counter.in_use;
        Model model;
        CHECK_OK(model.create(runtime, config, Tokenizer()));
        {
            Trainer trainer;
            CHECK_OK(trainer.create(runtime, model, tiny_run(10), data));
            CHECK(counter.in_use - others == training.total());
            const size_t calls = counter.calls;
            StepResult result;
            for (int i = 0; i < 3; ++i) CHECK_OK(trainer.step(result));
            CHECK(counter.calls == calls);
        }
        Array<char> file(runtime);
        CHECK_OK(model.save_memory(file));
        CHECK_OK(model.load_memory(runtime, Text(file.items, file.count), Purpose::running));
        file.clear();
        Session session;
        CHECK_OK(session.create(runtime, model));
        const int32_t ids[] = {1, 2, 3};
        if (config.encoder_layers > 0) CHECK_OK(session.read_source(Span<const int32_t>(ids)));
        CHECK_OK(session.feed(ids));
        const size_t calls = counter.calls;
        SampleConfig sampling;
        const Text banned[] = {"xx"};
        sampling.banned = banned, sampling.repetition_penalty = 1.1, sampling.top_p = 0.9, sampling.top_k = 10;
        int32_t id;
        for (int i = 0; i < 40; ++i) CHECK_OK(session.next(sampling, id));  // beyond the end of the context, too
        CHECK(counter.calls == calls);
        CHECK(counter.in_use - others <= running.total() && counter.in_use - others + 4096 > running.total());
    }
    CHECK(counter.in_use == 0);
}
static void check_memory_of_several(const Config& config, Dtype dtype) {
    Counter counter;
    Runtime runtime;
    runtime.threads = 1;
    counter.attach(runtime);
    Config narrow = config;
    narrow.dtype = dtype;
    Memory running;
    CHECK_OK(memory_needed(runtime, narrow, Purpose::running, 5, running));
    Model model;
    Array<char> file(runtime);
    CHECK_OK(model.create(runtime, narrow, Tokenizer()));
    CHECK_OK(model.save_memory(file));
    CHECK_OK(model.load_memory(runtime, Text(file.items, file.count), Purpose::running));
    file.clear();
    {
        Session sessions[5];
        for (Session& session : sessions) CHECK_OK(session.create(runtime, model));
        CHECK(counter.in_use <= running.total() && counter.in_use + 4096 > running.total());
    }
}
TEST(memory, "memory_needed would be a guess, or a step or a token would allocate") {
    check_memory(tiny_config());
    check_memory(tiny_llama());
    Config translator = tiny_config();
    translator.encoder_layers = 3;
    check_memory(translator);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8}) check_memory_of_several(tiny_llama(), dtype);
}

TEST(out_of_memory, "an allocation that fails would crash or leak") {
    for (size_t n = 0; n < 200; ++n) {
        Counter counter;
        Runtime runtime;
        runtime.threads = 1;
        counter.refuse_from = n;
        counter.attach(runtime);
        bool done = false;
        {
            Model model;
            Data data;
            Trainer trainer;
            Session session;
            StepResult result;
            Status s = data.create(runtime, Span<const int32_t>(some_ids(500), 500));
            if (s.ok()) s = model.create(runtime, tiny_config(), Tokenizer());
            if (s.ok()) s = trainer.create(runtime, model, tiny_run(10), data);
            if (s.ok()) s = trainer.step(result);
            if (s.ok()) s = session.create(runtime, model);
            CHECK(s.ok() || s.error == Error::out_of_memory);
            done = s.ok();
            int32_t id = 0;  // what could not be made is empty, and says so
            RunResult run;
            Evaluation evaluation;
            if (!trainer.state)
                CHECK(trainer.step(result).error == Error::invalid_argument &&
                      trainer.run(RunConfig(), run).error == Error::invalid_argument &&
                      trainer.evaluate(data, evaluation).error == Error::invalid_argument);
            if (!done) CHECK(!session.state && session.next(SampleConfig(), id).error == Error::invalid_argument);
        }
        CHECK(counter.in_use == 0);
        if (done) return;
    }
    CHECK(!"it never went through");
}

TEST(baby_fits, "the ten-million-parameter baby would need more than 600 MB to train") {
    Runtime runtime;
    Config config;
    Memory memory;
    CHECK_OK(preset("baby", config));
    config.vocab = 96;
    CHECK_OK(memory_needed(runtime, config, Purpose::training, 8, memory));
    CHECK(memory.total() < 600000000);
    CHECK(fabs(flops_per_token(config) / 1e6 - 22.20) < 0.01);
}

TEST(deep, "to plan many layers would take long") {
    Runtime runtime;
    Config config = tiny_config();
    Memory memory;
    config.layers = 400;
    const clock_t start = clock();
    CHECK_OK(memory_needed(runtime, config, Purpose::training, 4, memory));
    CHECK(clock() - start < 10 * CLOCKS_PER_SEC);  // it takes a hundredth of that
}

TEST(not_finite, "a loss that is not a number would reach the weights") {
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    StepResult result;
    CHECK_OK(model.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(500), 500)));
    CHECK_OK(trainer.create(runtime, model, tiny_run(10), data));
    CHECK_OK(trainer.step(result));
    const int64_t gain = model.find("ln_f.weight")->offset;
    const float kept = model.weights[gain];
    model.weights[gain] = NAN;
    const uint64_t before = hash(model.weights, model.block);
    CHECK_OK(trainer.step(result));
    CHECK(result.skipped && result.step == 2 && hash(model.weights, model.block) == before);
    model.weights[gain] = kept;
    CHECK_OK(trainer.step(result));
    CHECK(!result.skipped && isfinite(result.loss) && hash(model.weights, model.block) != before);
}

TEST(wrong_calls, "wrong numbers would be taken, or crash") {
    {
        Runtime runtime;
        Model empty;
        Data data;
        Trainer trainer;
        CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(100), 100)));
        CHECK(trainer.create(runtime, empty, tiny_run(10), data).error == Error::invalid_argument);
        Evaluation evaluation;
        CHECK(evaluate(runtime, empty, data, evaluation).error == Error::invalid_argument);
        Array<ProfileRow> rows;
        CHECK(profile(runtime, tiny_config(), -1, 0.01, rows).error == Error::invalid_argument);
    }
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Config config = tiny_config();
    config.heads = 5;
    Tokenizer bytes;
    CHECK_OK(bytes.create_bytes(runtime));
    config.vocab = 256;
    CHECK(model.create(runtime, config, static_cast<Tokenizer&&>(bytes)).error == Error::invalid_argument && bytes.vocab == 256);
    config = tiny_config();
    config.dtype = static_cast<Dtype>(9);
    CHECK(model.create(runtime, config, Tokenizer()).error == Error::invalid_argument);
    config = tiny_config();
    config.norm_epsilon = 1e-60;  // 0 in 32 bits
    CHECK(model.create(runtime, config, Tokenizer()).error == Error::invalid_argument);
    CHECK_OK(model.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(500), 500)));
    TrainConfig how = tiny_run(10);
    how.lr = -1;
    CHECK(trainer.create(runtime, model, how, data).error == Error::invalid_argument);
    how = tiny_run(10);
    how.batch = 1 << 30;
    CHECK(trainer.create(runtime, model, how, data).error == Error::invalid_argument);
    CHECK_OK(trainer.create(runtime, model, tiny_run(10), data));
    StepResult result;
    int32_t ids[64] = {}, targets[64] = {};
    ids[63] = 29;
    CHECK(trainer.step(Span<const int32_t>(ids), Span<const int32_t>(targets), result).error == Error::invalid_argument);
    CHECK(trainer.step(Span<const int32_t>(ids, 63), Span<const int32_t>(targets, 63), result).error == Error::invalid_argument);
    for (int i = 0; i < 8; ++i) CHECK_OK(trainer.begin_step());  // as many as may be under way: run goes on behind them
    RunResult ran;
    CHECK_OK(trainer.run(RunConfig(), ran));
    CHECK(ran.step == 10);
    Data too_short;
    CHECK_OK(too_short.create(runtime, Span<const int32_t>(some_ids(500), 1)));
    CHECK(trainer.create(runtime, model, tiny_run(10), data, &too_short).error == Error::invalid_argument && !trainer.state);
    Array<CheckResult> results;
    runtime.precision = Precision::bf16;
    CHECK(selftest(runtime, results).error == Error::unsupported);
    runtime.backend = Backend::cuda;
    CHECK(trainer.create(runtime, model, tiny_run(10), data).error == Error::not_built);
}

TEST(schedules, "the learning rate would not follow its schedule") {
    Trainer t;
    t.config.steps = 100, t.config.warmup = 10, t.config.lr = 1, t.config.min_lr = 0.1;
    const auto near = [](double a, double b) { return fabs(a - b) < 1e-12; };
    t.config.schedule = Schedule::cosine;
    CHECK(near(t.learning_rate(0), 0.1) && near(t.learning_rate(9), 1) && near(t.learning_rate(10), 1) && near(t.learning_rate(55), 0.55));
    CHECK(near(t.learning_rate(40), 0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979323846 / 3))) && near(t.learning_rate(100), 0.1));
    t.config.schedule = Schedule::linear;
    CHECK(near(t.learning_rate(55), 0.55) && near(t.learning_rate(100), 0.1));
    t.config.schedule = Schedule::constant;
    CHECK(near(t.learning_rate(4), 0.5) && near(t.learning_rate(99), 1));
    t.config.schedule = Schedule::inverse_sqrt;
    CHECK(near(t.learning_rate(4), 0.5) && near(t.learning_rate(9), 1) && near(t.learning_rate(39), 0.5) &&
          near(t.learning_rate(10000), 0.1));
    t.config.schedule = Schedule::wsd;
    CHECK(near(t.learning_rate(80), 1) && near(t.learning_rate(90), 0.55) && near(t.learning_rate(100), 0.1));
    t.config.steps = 4, t.config.warmup = 0;
    CHECK(near(t.learning_rate(0), 1) && near(t.learning_rate(3), 1) && near(t.learning_rate(4), 0.1));
}

TEST(best_and_patience, "the file would not be the best model, or training would not stop when it gets worse") {
    const char* path = "build/test_best.safetensors";
    Runtime runtime;
    Model model, best;
    Data data, validation;
    Trainer trainer;
    static int32_t other[400];  // a text that follows another rule: the better the training text is known, the worse this one
    for (int i = 0; i < 400; ++i) other[i] = (i * i * 7 + i / 3) % 29;
    CHECK_OK(model.create(runtime, tiny_config(), Tokenizer()));
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(500), 500)));
    CHECK_OK(validation.create(runtime, Span<const int32_t>(other, 400)));
    TrainConfig how = tiny_run(400);
    how.evaluate_every = 5, how.patience = 4, how.lr = 1e-2;
    CHECK_OK(trainer.create(runtime, model, how, data, &validation));
    RunConfig run;
    run.out = path;
    RunResult result;
    CHECK_OK(trainer.run(run, result));
    CHECK(result.stopped_early && result.step == result.best_step + 20 && result.step < 400);
    CHECK_OK(best.load(runtime, path));
    Trainer judge;
    Evaluation evaluation;
    CHECK_OK(judge.create(runtime, best, how, data));
    CHECK_OK(judge.evaluate(validation, evaluation));
    CHECK(evaluation.loss == result.best_validation_loss);
    Array<char> resume(runtime);
    CHECK_OK(resume_path(path, resume));
    CHECK_OK(trainer.load(Text(resume.data(), resume.size())));  // it has ended: going on changes nothing
    CHECK_OK(trainer.run(run, result));
    CHECK(result.stopped_early && result.step == result.best_step + 20);
    remove(path);
    CHECK(trainer.run(run, result).error == Error::cannot_open);  // the best model is gone: better said than overwritten
    CHECK(resume.push('\0') && remove(resume.data()) == 0);
}

// Ends in the evaluation after `stop_in`; counts what it sees.
struct Watch {
    int64_t stop_in = 0;
    const Trainer* trainer = nullptr;
    int steps = 0, evaluations = 0;
    static bool step(void* user, const Progress& p) {
        Watch& w = *static_cast<Watch*>(user);
        w.steps += p.step != nullptr, w.evaluations += p.evaluation != nullptr;
        return true;
    }
    static bool evaluating(void* user, double done) {
        Watch& w = *static_cast<Watch*>(user);
        CHECK(done > 0 && done < 1);
        return w.trainer->step_count != w.stop_in;
    }
};

TEST(interrupted_evaluation, "Ctrl-C would wait for the end of a long evaluation, or the run that goes on would do without it") {
    const char *path = "build/test_due.safetensors", *resume = "build/test_due.resume.safetensors";
    Runtime runtime;
    Data data, validation;
    TrainConfig how = tiny_run(20);
    how.evaluate_every = 5, how.patience = 3;
    CHECK_OK(data.create(runtime, Span<const int32_t>(some_ids(2000), 2000)));
    CHECK_OK(validation.create(runtime, Span<const int32_t>(some_ids(700), 700)));
    const auto train = [&](Model& model, Trainer& trainer, Watch& watch, bool goes_on) {
        CHECK_OK(goes_on ? model.load(runtime, resume) : model.create(runtime, tiny_config(), Tokenizer()));
        CHECK_OK(trainer.create(runtime, model, how, data, &validation));
        if (goes_on) CHECK_OK(trainer.load(resume));
        CHECK(trainer.evaluation_due == goes_on);
        watch.trainer = &trainer;
        RunConfig run;
        run.out = path, run.user = &watch, run.progress = &Watch::step, run.evaluating = &Watch::evaluating;
        RunResult result;
        CHECK_OK(trainer.run(run, result));
        CHECK(result.cancelled == (watch.stop_in > 0) && trainer.evaluation_due == result.cancelled);
    };
    Model whole;
    Trainer straight;
    Watch all;
    train(whole, straight, all, false);
    CHECK(all.steps == 20 && all.evaluations == 4);
    for (const int at : {5, 10, 20}) {
        Model begun, ended;
        Trainer first, second;
        Watch before, after;
        before.stop_in = at;
        train(begun, first, before, false);
        CHECK(before.steps == at && before.evaluations == at / 5 - 1);
        train(ended, second, after, true);
        CHECK(after.steps == 20 - at && before.evaluations + after.evaluations == 4);
        CHECK(memcmp(whole.weights, ended.weights, static_cast<size_t>(whole.block) * 4) == 0);
        CHECK(second.best_step == straight.best_step && second.bad_evaluations == straight.bad_evaluations);
        CHECK(memcmp(&second.best_validation_loss, &straight.best_validation_loss, sizeof(double)) == 0);
    }
    CHECK(remove(path) == 0 && remove(resume) == 0);
}

int main(int count, char** arguments) { return run_tests(count, arguments); }
