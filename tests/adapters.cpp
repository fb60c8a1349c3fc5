// LoRA adapters: they change nothing at first, learn while their model stays as it is, are swapped between two tokens, saved, resumed, merged.
#include <math.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;

namespace {

Config some_config(bool llama) {
    Config config;
    if (llama) CHECK_OK(preset_architecture("llama", config));
    config.layers = 2, config.heads = 4, config.width = 24, config.context = 16, config.vocab = 29;
    if (llama) config.kv_heads = 2, config.hidden = 21;
    return config;
}
TrainConfig some_run(int64_t steps) {
    TrainConfig how;
    how.batch = 4, how.steps = steps, how.lr = 1e-2, how.warmup = 5, how.evaluate_every = 1000;
    return how;
}
// Each id follows from the one before it, by a rule of the text's own.
std::vector<int32_t> some_ids(int rule, size_t count = 3000) {
    std::vector<int32_t> ids(count);
    for (size_t i = 0; i < count; ++i)
        ids[i] = static_cast<int32_t>(i % 37 == 0 ? i / 37 % 29 : static_cast<size_t>(ids[i - 1] * rule + 1) % 29);
    return ids;
}
uint64_t hash(const float* values, int64_t count) {
    uint64_t h = 14695981039346656037u;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values);
    for (int64_t i = 0; i < count * 4; ++i) h = (h ^ bytes[i]) * 1099511628211u;
    return h;
}
uint64_t hash(const Adapter& adapter) { return hash(adapter.weights, adapter.block); }
// Numbers that change something.
void disturb(Adapter& adapter, unsigned seed) {
    for (int64_t i = 0; i < adapter.block; ++i) {
        seed = seed * 1664525u + 1013904223u;
        adapter.weights[i] = 0.4f * (static_cast<float>(seed >> 8) / 16777216.0f - 0.5f);
    }
    ++adapter.version;
}
std::vector<float> logits(const Session& session) {
    const Span<const float> l = session.logits();
    return std::vector<float>(l.begin(), l.end());
}
std::vector<float> logits_of(Runtime& runtime, const Model& model, const Adapter* adapter, const std::vector<int32_t>& ids) {
    Session session;
    CHECK_OK(session.create(runtime, model));
    CHECK_OK(session.use(adapter));
    CHECK_OK(session.feed(ids));
    return logits(session);
}
bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !a.empty() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
double distance(const std::vector<float>& a, const std::vector<float>& b) {  // max |difference| / max |reference|
    double difference = 0, reference = 0;
    for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        difference = fmax(difference, fabs(double(a[i]) - double(b[i])));
        reference = fmax(reference, fabs(double(b[i])));
    }
    return difference / reference;
}
// Trains an adapter on a fresh model; its hash.
uint64_t train(Runtime& runtime, bool llama, int64_t steps, bool accumulate = false, int rank = 4) {
    Model model;
    Adapter adapter;
    Data data;
    Trainer trainer;
    const std::vector<int32_t> ids = some_ids(5);
    TrainConfig how = some_run(steps);
    how.dropout = 0.1;
    if (accumulate) how.batch = 2, how.accumulate = 2;
    CHECK_OK(model.create(runtime, some_config(llama), Tokenizer()));
    const uint64_t before = hash(model.weights, model.block);
    CHECK_OK(adapter.create(runtime, model, {rank, 8, ""}));
    CHECK_OK(data.create(runtime, Span<const int32_t>(ids)));
    CHECK_OK(trainer.create(runtime, model, adapter, how, data));
    StepResult result;
    while (trainer.step_count < steps && check_status(trainer.step(result), "step", __FILE__, __LINE__)) {
    }
    CHECK(hash(model.weights, model.block) == before && model.version == 1);
    return hash(adapter);
}

struct Counter {  // of memory
    size_t in_use = 0, calls = 0, refuse_from = SIZE_MAX;
    void attach(Runtime& runtime) {
        runtime.memory_user = this;
        runtime.allocate = [](void* user, size_t bytes, size_t alignment) -> void* {
            Counter& counter = *static_cast<Counter*>(user);
            if (counter.calls++ >= counter.refuse_from) return nullptr;
            counter.in_use += bytes;
            return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
        };
        runtime.release = [](void* user, void* memory, size_t bytes) {
            static_cast<Counter*>(user)->in_use -= memory ? bytes : 0;
            free(memory);
        };
    }
};

}  // namespace

TEST(a_fresh_one_changes_nothing, "an adapter would begin by spoiling its model") {
    Runtime runtime;
    for (bool llama : {false, true}) {
        Model model;
        Adapter adapter;
        CHECK_OK(model.create(runtime, some_config(llama), Tokenizer()));
        CHECK_OK(adapter.create(runtime, model, {4, 8, ""}));
        const std::vector<int32_t> ids = some_ids(3, 12);
        CHECK(same(logits_of(runtime, model, nullptr, ids), logits_of(runtime, model, &adapter, ids)));
        CHECK(adapter.names.size == (llama ? 28u : 16u));
        const float bound = 1 / sqrtf(24);
        float biggest = 0;
        for (int i = 0; i < 4 * 24; ++i) biggest = fmaxf(biggest, fabsf(adapter.weights[adapter.names[0].offset + i]));
        CHECK(biggest <= bound && biggest > 0.9f * bound);
        disturb(adapter, 1);
        CHECK(distance(logits_of(runtime, model, nullptr, ids), logits_of(runtime, model, &adapter, ids)) > 0.01);
    }
}

TEST(same_bits, "an adapter would depend on threads, kernels or micro-batches, or training it would change its model") {
    for (bool llama : {false, true}) {
        Runtime plain, fast;
        plain.backend = Backend::plain;
        const uint64_t expected = train(plain, llama, 15);
        CHECK(train(fast, llama, 15, false, 1) == train(plain, llama, 15, false, 1));  // rank 1: products of a single row
        for (const int threads : {1, 2, 3, 7}) {
            Runtime runtime;
            runtime.threads = threads;
            CHECK(train(runtime, llama, 15) == expected);
            CHECK(train(runtime, llama, 15, true) == expected);
        }
        for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
            Runtime runtime;
            runtime.isa = isa;
            CHECK(train(runtime, llama, 15) == expected);
        }
    }
}

TEST(learns_resumes_and_is_saved, "an adapter would not learn another text, lose what it learnt, or go on otherwise after a kill") {
    Runtime runtime;
    Model model;
    Data first, second;
    Trainer trainer, whole, resumed;
    StepResult result;
    Evaluation before, after, outside;
    const std::vector<int32_t> old_ids = some_ids(3), new_ids = some_ids(5);
    CHECK_OK(model.create(runtime, some_config(true), Tokenizer()));
    CHECK_OK(first.create(runtime, Span<const int32_t>(old_ids)));
    CHECK_OK(second.create(runtime, Span<const int32_t>(new_ids)));
    CHECK_OK(trainer.create(runtime, model, some_run(300), first));
    while (trainer.step_count < 300 && check_status(trainer.step(result), "step", __FILE__, __LINE__)) {
    }
    CHECK_OK(model.convert(Dtype::int8));  // the model beneath may be of any dtype
    const uint64_t weights = hash(model.weights, model.block);
    Adapter adapter, other, loaded, from_file;
    CHECK_OK(adapter.create(runtime, model, {4, 8, ""}));
    CHECK_OK(other.create(runtime, model, {4, 8, ""}));
    CHECK_OK(trainer.create(runtime, model, adapter, some_run(200), second));
    CHECK_OK(whole.create(runtime, model, other, some_run(200), second));
    CHECK_OK(trainer.evaluate(second, before));
    while (trainer.step_count < 77) CHECK_OK(trainer.step(result));
    CHECK_OK(trainer.save("build/test_adapter.resume.safetensors"));
    CHECK_OK(loaded.load(runtime, model, "build/test_adapter.resume.safetensors"));  // it is an adapter to use, too
    CHECK(hash(loaded) == hash(adapter));
    CHECK_OK(resumed.create(runtime, model, loaded, some_run(200), second));
    CHECK_OK(resumed.load("build/test_adapter.resume.safetensors"));
    while (whole.step_count < 200) CHECK_OK(whole.step(result));
    while (resumed.step_count < 200) CHECK_OK(resumed.step(result));
    CHECK(hash(loaded) == hash(other) && hash(loaded) != hash(adapter));
    CHECK_OK(resumed.evaluate(second, after));
    if (!CHECK(after.loss < 0.6 * before.loss)) printf("    from %g to %g\n", before.loss, after.loss);
    Model floats;  // the same numbers; an int8 model that runs rounds what goes into its matrices, too
    CHECK_OK(floats.create(runtime, some_config(true), Tokenizer()));
    memcpy(floats.weights, model.weights, static_cast<size_t>(model.block) * sizeof(float));
    CHECK_OK(evaluate(runtime, floats, second, outside, 4, nullptr, nullptr, &loaded));
    CHECK(memcmp(&outside, &after, sizeof after) == 0);
    CHECK_OK(evaluate(runtime, model, second, outside, 4, nullptr, nullptr, &loaded));
    CHECK(outside.loss != after.loss && std::fabs(outside.loss - after.loss) < 0.01 * after.loss);
    CHECK(hash(model.weights, model.block) == weights && model.config.dtype == Dtype::int8);

    CHECK_OK(loaded.save("build/test_adapter.safetensors"));
    CHECK_OK(from_file.load(runtime, model, "build/test_adapter.safetensors"));
    CHECK(hash(from_file) == hash(loaded) && from_file.config.rank == 4 && from_file.config.alpha == 8);
    Adapter third;
    CHECK_OK(third.create(runtime, model, {3, 8, ""}));
    CHECK_OK(resumed.create(runtime, model, third, some_run(200), second));
    const Status wrong = resumed.load("build/test_adapter.resume.safetensors");
    CHECK(wrong.error == Error::mismatch && strstr(wrong.message, "rank 4"));
    TrainConfig muon = some_run(10);
    muon.optimizer = Optimizer::muon;
    CHECK(resumed.create(runtime, model, third, muon, second).error == Error::invalid_argument);
    remove("build/test_adapter.safetensors"), remove("build/test_adapter.resume.safetensors");
}

TEST(merged, "a merged model would say something else than the model with its adapter beside it") {
    Runtime runtime;
    for (bool llama : {false, true})
        for (const char* targets : {"", llama ? "k_proj,down_proj" : "attn.c_proj,c_fc"}) {
            Model model;
            Adapter adapter;
            CHECK_OK(model.create(runtime, some_config(llama), Tokenizer()));
            CHECK_OK(adapter.create(runtime, model, {3, 5, targets}));
            disturb(adapter, 7);
            const std::vector<int32_t> ids = some_ids(3, 14);
            const std::vector<float> beside = logits_of(runtime, model, &adapter, ids);
            const Weight& a = adapter.names[0];
            const Weight* w = model.find(std::string(a.name, strlen(a.name) - strlen(".lora_A.weight")) + ".weight");
            if (!CHECK(w)) return;
            // One element by hand: row 2, column 1 as the model has it.
            const Weight& b = adapter.names[1];
            const int64_t in = llama ? 1 : 2, out = llama ? 2 : 1;
            double sum = double(model.weights[w->offset + 2 * w->cols + 1]);
            for (int k = 0; k < 3; ++k)
                sum += 5.0 / 3 * double(adapter.weights[b.offset + out * 3 + k]) * double(adapter.weights[a.offset + k * a.cols + in]);
            CHECK_OK(merge(model, adapter));
            CHECK(model.weights[w->offset + 2 * w->cols + 1] == static_cast<float>(sum));
            const double off = distance(logits_of(runtime, model, nullptr, ids), beside);
            if (!CHECK(off < 1e-5)) printf("    off by %g\n", off);
        }
}

TEST(swapped, "a session would mix two adapters, or not say with one what a session of its own says") {
    Runtime runtime;
    Model model;
    Adapter a, b;
    Session session, alone;
    CHECK_OK(model.create(runtime, some_config(true), Tokenizer()));
    CHECK_OK(model.convert(Dtype::bf16));
    CHECK_OK(a.create(runtime, model, {4, 8, "q_proj,v_proj"}));
    CHECK_OK(b.create(runtime, model, {7, 3, ""}));
    disturb(a, 1), disturb(b, 2);
    const std::vector<int32_t> ids = some_ids(3, 10);
    CHECK_OK(session.create(runtime, model));
    CHECK_OK(session.feed(ids));
    const std::vector<float> by_none = logits(session), by_a = logits_of(runtime, model, &a, ids),
                             by_b = logits_of(runtime, model, &b, ids);
    CHECK(!same(by_none, by_a) && !same(by_a, by_b));
    CHECK_OK(session.use(&a));
    CHECK(same(logits(session), by_a) && session.position == 10);
    CHECK_OK(session.use(&b));
    CHECK(same(logits(session), by_b));
    CHECK_OK(session.use(nullptr));
    CHECK(same(logits(session), by_none));

    CHECK_OK(session.use(&a, true));  // the logits stay; what comes next is read with the adapter, among the keys and values that are there
    CHECK(same(logits(session), by_none));
    const int32_t next_id[] = {4};
    CHECK_OK(session.feed(next_id));
    std::vector<int32_t> more = ids;
    more.push_back(4);
    const std::vector<float> kept = logits(session);
    CHECK(!same(kept, logits_of(runtime, model, &a, more)) && !same(kept, logits_of(runtime, model, nullptr, more)));
    CHECK_OK(session.use(&a));
    CHECK(same(logits(session), logits_of(runtime, model, &a, more)));

    Array<float> attention(runtime);
    CHECK_OK(session.attention(1, attention));
    std::vector<float> with(attention.begin(), attention.end());
    CHECK_OK(session.use(nullptr));
    CHECK_OK(session.attention(1, attention));
    CHECK(!same(with, std::vector<float>(attention.begin(), attention.end())));

    const Adapter* const adapters[] = {&a, nullptr, &b, &b, &a};  // together, each with its own, past the end of the context, too
    Session together[5], each[5];
    Session* all[5];
    SampleConfig how[5];
    for (int i = 0; i < 5; ++i) {
        all[i] = &together[i];
        how[i].seed = static_cast<uint64_t>(i);
        for (Session* one : {&together[i], &each[i]}) {
            CHECK_OK(one->create(runtime, model));
            CHECK_OK(one->use(adapters[i]));
            CHECK_OK(one->feed(ids));
        }
    }
    for (int step = 0; step < 20; ++step) {
        int32_t said[5], own;
        CHECK_OK(next(Span<Session* const>(all, 5), Span<const SampleConfig>(how, 5), said));
        for (int i = 0; i < 5; ++i) {
            CHECK_OK(each[i].next(how[i], own));
            CHECK(own == said[i]);
        }
    }

    Model other;
    Adapter foreign;
    Config wide = some_config(true);
    wide.width = 32;
    CHECK_OK(other.create(runtime, wide, Tokenizer()));
    CHECK_OK(foreign.create(runtime, other, {4, 8, ""}));
    CHECK_OK(session.use(&a));
    CHECK(session.use(&foreign).error == Error::mismatch);
    CHECK(same(logits(session), logits_of(runtime, model, &a, more)));  // as before
    CHECK_OK(session.feed(next_id));
    CHECK(session.use(nullptr).ok() && merge(model, foreign).error == Error::mismatch);
}

TEST(sources, "an adapter of an encoder-decoder would leave its encoder, or what it said of a source, as they were") {
    Runtime runtime;
    Model model;
    Adapter adapter;
    Config config = some_config(false);
    config.encoder_layers = 1;
    CHECK_OK(model.create(runtime, config, Tokenizer()));
    const std::vector<int32_t> source = some_ids(3, 9), ids = some_ids(5, 6);
    for (const char* targets : {"", "encoder.h.0.mlp.c_fc", "h.1.crossattention.c_attn"}) {
        CHECK_OK(adapter.create(runtime, model, {4, 8, targets}));
        disturb(adapter, 3);
        Session swapped, fresh;
        for (Session* session : {&swapped, &fresh}) {
            CHECK_OK(session->create(runtime, model));
            if (session == &fresh) CHECK_OK(session->use(&adapter));
            CHECK_OK(session->read_source(source));
            CHECK_OK(session->feed(ids));
        }
        const std::vector<float> before = logits(swapped);
        CHECK(!same(before, logits(fresh)));
        CHECK_OK(swapped.use(&adapter));
        CHECK(same(logits(swapped), logits(fresh)));
        CHECK_OK(fresh.use(nullptr));
        CHECK(same(logits(fresh), before));
    }
}

TEST(memory, "memory_needed would be a guess, a step would allocate, or a frozen model would cost gradients and moments") {
    for (bool llama : {false, true}) {
        Counter counter;
        Runtime runtime;
        runtime.threads = 1;
        counter.attach(runtime);
        {
            const AdapterConfig rank4{4, 8, ""};
            Memory needed, full, running;
            CHECK_OK(memory_needed(runtime, some_config(llama), Purpose::training, 4, needed, 0, &rank4));
            CHECK_OK(memory_needed(runtime, some_config(llama), Purpose::training, 4, full));
            CHECK_OK(memory_needed(runtime, some_config(llama), Purpose::running, 1, running, 0, &rank4));
            CHECK(needed.total() < full.total() && needed.moments < full.moments / 2 && needed.gradients < full.gradients / 2);
            Config baby = some_config(llama);
            CHECK_OK(preset("baby", baby));
            Memory beside, whole;
            baby.hidden = 0, baby.kv_heads = 0;
            CHECK_OK(memory_needed(runtime, baby, Purpose::training, 8, beside, 0, &rank4));
            CHECK_OK(memory_needed(runtime, baby, Purpose::training, 8, whole));
            CHECK(beside.activations < whole.activations / 1000 * 1001 && beside.total() < whole.total() / 10 * 7);
            Data data;
            const std::vector<int32_t> ids = some_ids(3);
            CHECK_OK(data.create(runtime, Span<const int32_t>(ids)));
            const size_t others = counter.in_use;
            Model model;
            Adapter adapter;
            CHECK_OK(model.create(runtime, some_config(llama), Tokenizer()));
            CHECK_OK(adapter.create(runtime, model, rank4));
            {
                Trainer trainer;
                CHECK_OK(trainer.create(runtime, model, adapter, some_run(10), data));
                if (!CHECK(counter.in_use - others == needed.total()))
                    printf("    %zu in use, %zu said\n", counter.in_use - others, static_cast<size_t>(needed.total()));
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
            CHECK_OK(session.use(&adapter));
            CHECK_OK(session.feed(Span<const int32_t>(ids.data(), 5)));
            const size_t calls = counter.calls;
            int32_t id;
            for (int i = 0; i < 20; ++i) CHECK_OK(session.next(SampleConfig(), id));
            CHECK(counter.calls == calls);
            CHECK(counter.in_use - others <= running.total() && counter.in_use - others + 4096 > running.total());
        }
        CHECK(counter.in_use == 0);
    }
}

TEST(out_of_memory, "an allocation that fails would crash or leak") {
    for (size_t n = 0;; ++n) {
        Counter counter;
        Runtime runtime;
        runtime.threads = 1;
        counter.refuse_from = n;
        counter.attach(runtime);
        bool done = false;
        {
            Model model;
            Adapter adapter, again;
            Data data;
            Trainer trainer;
            Session session;
            StepResult result;
            Array<char> bytes(runtime);
            const std::vector<int32_t> ids = some_ids(3, 200);
            Status s = data.create(runtime, Span<const int32_t>(ids));
            if (s.ok()) s = model.create(runtime, some_config(false), Tokenizer());
            if (s.ok()) s = adapter.create(runtime, model, {2, 4, ""});
            if (s.ok()) s = trainer.create(runtime, model, adapter, some_run(10), data);
            if (s.ok()) s = trainer.step(result);
            if (s.ok()) s = adapter.save_memory(bytes);
            if (s.ok()) s = again.load_memory(runtime, model, bytes);
            if (s.ok()) s = session.create(runtime, model);
            if (s.ok()) s = session.feed(Span<const int32_t>(ids.data(), 5));
            if (s.ok()) s = session.use(&again);
            if (s.ok()) s = merge(model, again);
            CHECK(s.ok() || s.error == Error::out_of_memory);
            done = s.ok();
            int32_t id;
            if (session.state && session.position > 0) CHECK(session.next(SampleConfig(), id).error != Error::mismatch);
        }
        CHECK(counter.in_use == 0);
        if (done) return;
        if (!CHECK(n < 3000)) return;
    }
}

TEST(damaged_files, "a damaged adapter would crash, or be taken for a whole one") {
    Runtime runtime;
    Model model, llama;
    Adapter adapter, again;
    Array<char> bytes(runtime);
    CHECK_OK(model.create(runtime, some_config(false), Tokenizer()));
    CHECK_OK(llama.create(runtime, some_config(true), Tokenizer()));
    CHECK_OK(adapter.create(runtime, model, {2, 4, "c_attn"}));
    CHECK_OK(adapter.save_memory(bytes));
    CHECK_OK(again.load_memory(runtime, model, bytes));
    CHECK(hash(again) == hash(adapter));
    for (size_t n = 0; n < bytes.size(); ++n) CHECK(!again.load_memory(runtime, model, Text(bytes.data(), n)).ok());
    unsigned random = 1;
    for (int n = 0; n < 3000 * thoroughness(); ++n) {  // any answer, no crash
        random = random * 1664525u + 1013904223u;
        char& c = bytes[(random >> 8) % 1500 % bytes.size()];
        const char before = c;
        c = static_cast<char>(random >> 3);
        (void)again.load_memory(runtime, model, bytes).ok();
        c = before;
    }
    CHECK_OK(again.load_memory(runtime, model, bytes));
    CHECK(again.load_memory(runtime, llama, bytes).error == Error::bad_file);
    Array<char> checkpoint(runtime);
    CHECK_OK(model.save_memory(checkpoint));
    const Status no_adapter = again.load_memory(runtime, model, checkpoint);
    CHECK(no_adapter.error == Error::bad_file && strstr(no_adapter.message, "is no adapter"));
    for (const AdapterConfig& wrong : {AdapterConfig{0, 4, ""}, AdapterConfig{4, 0, ""}, AdapterConfig{4, 8, "q_proj"},
                                       AdapterConfig{4, 8, "c_attn,"}, AdapterConfig{4, 8, "attn"}})
        CHECK(again.create(runtime, model, wrong).error == Error::invalid_argument);
    CHECK(hash(again) == hash(adapter));
}

int main(int count, char** arguments) { return run_tests(count, arguments); }
