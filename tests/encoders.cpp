// Encoders alone and classifiers: what they say is what training measures; gaps are learnt, the same whenever it is resumed; fine-tuning;
// what does not fit is refused; nothing is allocated once they are made.
#include <math.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;

static Config tiny_encoder() {
    Config config;
    config.causal = false, config.layers = 2, config.heads = 2, config.width = 24, config.context = 16, config.vocab = 30;
    return config;
}
static Config tiny_classifier(bool first = false, int features = 0) {
    Config config = tiny_encoder();
    config.classes = 3, config.pool_first = first, config.features = features;
    return config;
}
static TrainConfig tiny_run(int64_t steps) {
    TrainConfig how;
    how.batch = 4, how.steps = steps, how.lr = 1e-2, how.warmup = 5, how.evaluate_every = 1000;
    return how;
}

static const int32_t ids[] = {4, 7, 1, 29, 7, 0, 12, 3, 3, 28, 5, 9, 2, 2, 17, 21, 8};
static Example example_of(size_t length, const float* features = nullptr, size_t count = 0) {
    return Example{{ids, length}, {}, {}, {features, length * count}};
}

// The loss that training would measure.
static double loss_of(Runtime& runtime, const Model& model, Example example, const std::vector<int32_t>& targets) {
    Data data;
    Evaluation result;
    example.targets = Span<const int32_t>(targets.data(), targets.size());
    CHECK_OK(data.create(runtime, Span<const Example>(&example, 1)));
    CHECK_OK(evaluate(runtime, model, data, result, 1));
    return result.loss;
}

TEST(what_it_says, "an encoder would say other probabilities than those that training measures") {
    for (const Backend backend : {Backend::plain, Backend::cpu})
        for (const size_t length : {size_t(1), size_t(5), size_t(16)}) {
            Runtime runtime;
            runtime.backend = backend;
            Model model;
            Encoder encoder;
            float probabilities[30];
            CHECK_OK(model.create(runtime, tiny_encoder(), Tokenizer(), 5));
            CHECK_OK(encoder.create(runtime, model));
            for (size_t at = 0; at < length; at += 2) {
                CHECK_OK(encoder.fill(example_of(length), static_cast<int>(at), probabilities));
                double sum = 0;
                for (const float p : probabilities) sum += static_cast<double>(p);
                CHECK(fabs(sum - 1) < 1e-5);
                for (const int32_t target : {0, 17, 29}) {
                    std::vector<int32_t> targets(length, -1);
                    targets[at] = target;
                    const double said = -log(static_cast<double>(probabilities[target]));
                    CHECK(fabs(said - loss_of(runtime, model, example_of(length), targets)) < 1e-5);
                }
            }
        }
}
TEST(classes, "a classifier would say other probabilities than those that training measures, or look at something else than its vector") {
    float numbers[16 * 5];
    for (int i = 0; i < 80; ++i) numbers[i] = static_cast<float>(i % 7) - 3;
    for (int variant = 0; variant < 8; ++variant) {
        const int features = variant & 1 ? 5 : 0;
        const size_t length = variant & 4 ? 6 : 16;
        Runtime runtime;
        Model model;
        Encoder encoder;
        float probabilities[3], vector[24];
        CHECK_OK(model.create(runtime, tiny_classifier((variant & 2) != 0, features), Tokenizer(), 5));
        const Weight *w = model.find("score.weight"), *b = model.find("score.bias");
        if (!CHECK(w && b)) return;
        for (int i = 0; i < 72; ++i) model.weights[w->offset + i] *= 20;  // so that it has an opinion
        ++model.version;
        CHECK_OK(encoder.create(runtime, model));
        const Example example = example_of(length, numbers, static_cast<size_t>(features));
        CHECK_OK(encoder.classify(example, probabilities));
        CHECK_OK(encoder.embed(example, vector));
        double expected[3], sum = 0;
        for (int c = 0; c < 3; ++c) {
            double logit = static_cast<double>(model.weights[b->offset + c]);
            for (int i = 0; i < 24; ++i)
                logit += static_cast<double>(model.weights[w->offset + c * 24 + i]) * static_cast<double>(vector[i]);
            sum += expected[c] = exp(logit);
        }
        for (int32_t c = 0; c < 3; ++c) {
            const double p = static_cast<double>(probabilities[c]);
            CHECK(fabs(p - expected[c] / sum) < 1e-5);
            CHECK(fabs(-log(p) - loss_of(runtime, model, example, {c})) < 1e-5);
        }
        Array<SummaryRow> rows;
        CHECK_OK(summary(runtime, model.config, 1, rows));
        CHECK(strcmp(rows[rows.count - 1].layer, "score (head)") == 0);
    }
}
TEST(vectors,
     "a sentence's vector would not be the mean of its rows, or would depend on the backend, the threads or what was read before") {
    Runtime runtime, plain;
    plain.backend = Backend::plain, plain.threads = 1;
    Model model, other;
    Encoder encoder, slow;
    float vector[24], again[24];
    CHECK_OK(model.create(runtime, tiny_encoder(), Tokenizer(), 5));
    CHECK_OK(other.create(plain, tiny_encoder(), Tokenizer(), 5));
    CHECK_OK(encoder.create(runtime, model));
    CHECK_OK(slow.create(plain, other));
    for (const size_t length : {size_t(16), size_t(1), size_t(7), size_t(16)}) {
        CHECK_OK(encoder.embed(example_of(length), vector));
        CHECK_OK(slow.embed(example_of(length), again));
        CHECK(memcmp(vector, again, sizeof vector) == 0);
        // The last layer's norm makes rows of mean 0 and variance 1, so their mean has a mean of 0, and one row's variance is 1.
        double mean = 0, square = 0;
        for (const float x : vector) mean += static_cast<double>(x), square += static_cast<double>(x) * static_cast<double>(x);
        CHECK(fabs(mean) < 1e-4 && (length > 1 ? square / 24 < 0.9 : fabs(square / 24 - 1) < 5e-2));
    }
    // Of one row the head makes its logits, of the same vector.
    float probabilities[30];
    const Weight* w = model.find("wte.weight");
    CHECK_OK(encoder.embed(example_of(1), vector));
    CHECK_OK(encoder.fill(example_of(1), 0, probabilities));
    double sum = 0, expected[30];
    for (int v = 0; v < 30; ++v) {
        double logit = 0;
        for (int i = 0; i < 24; ++i) logit += static_cast<double>(model.weights[w->offset + v * 24 + i]) * static_cast<double>(vector[i]);
        sum += expected[v] = exp(logit);
    }
    for (int v = 0; v < 30; ++v) CHECK(fabs(expected[v] / sum - static_cast<double>(probabilities[v])) < 1e-5);
}

// A text in which each id follows from the one after it: what comes before says little.
static std::vector<int32_t> backwards(size_t count) {
    std::vector<int32_t> text(count);
    uint32_t random = 1;
    for (size_t i = count; i-- > 0;) {
        random = random * 1664525u + 1013904223u;
        text[i] = i + 1 == count ? 0 : (text[i + 1] * 2 + static_cast<int32_t>(random >> 31)) % 29;
    }
    return text;
}

TEST(gaps, "an encoder would not learn from what stands after a gap, or validate on other gaps each time") {
    const std::vector<int32_t> text = backwards(6000);
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Evaluation before, after, again;
    StepResult result;
    TrainConfig how = tiny_run(500);
    how.batch = 32;
    Config config = tiny_encoder();
    config.positions = Positions::rotary;
    CHECK_OK(model.create(runtime, config, Tokenizer(), 5));
    CHECK(mask_id(model) == 29);
    CHECK_OK(data.create(runtime, Span<const int32_t>(text.data(), text.size())));
    CHECK_OK(trainer.create(runtime, model, how, data));
    CHECK_OK(trainer.evaluate(data, before));
    CHECK(before.tokens > 800 && before.tokens < 1000 && before.bits_per_byte == 0);  // 15 in 100
    while (trainer.step_count < how.steps && check_status(trainer.step(result), "step", __FILE__, __LINE__)) {
    }
    CHECK_OK(trainer.evaluate(data, after));
    CHECK_OK(evaluate(runtime, model, data, again, 3));
    CHECK(after.loss == again.loss && after.tokens == before.tokens && after.top1 == again.top1);
    // Known from the ids around it: one of two, or less. Chance is log 29 = 3.4; what was drawn at random in a gap's place misleads it at times.
    if (!CHECK(before.loss > 3.2 && after.loss < 1.0)) printf("    loss %g to %g\n", before.loss, after.loss);
    Encoder encoder;
    float probabilities[30];
    CHECK_OK(encoder.create(runtime, model));
    double right = 0;
    for (int32_t i = 0; i < 50; ++i) {
        int32_t window[16];
        memcpy(window, &text[static_cast<size_t>(100 * i)], sizeof window);
        const int32_t hidden = window[8];
        window[8] = 29;
        CHECK_OK(encoder.fill(Example{{window, 16}, {}, {}, {}}, 8, probabilities));
        right += static_cast<double>(probabilities[hidden]);
    }
    if (!CHECK(right > 20)) printf("    %g of 50\n", right);
}
TEST(gaps_again, "an encoder's training that was interrupted would see other gaps than one that was not") {
    const char* path = "build/test_encoder.safetensors";
    const std::vector<int32_t> text = backwards(500);
    TrainConfig how = tiny_run(12);
    std::vector<float> weights[2];
    for (int way = 0; way < 2; ++way) {
        Runtime runtime;
        runtime.threads = way + 1;
        Model model;
        Data data;
        Trainer trainer;
        StepResult result;
        CHECK_OK(model.create(runtime, tiny_encoder(), Tokenizer(), 5));
        CHECK_OK(data.create(runtime, Span<const int32_t>(text.data(), text.size())));
        CHECK_OK(trainer.create(runtime, model, how, data));
        while (trainer.step_count < (way == 0 ? 12 : 5)) CHECK_OK(trainer.step(result));
        if (way == 1) {
            CHECK_OK(trainer.save(path));
            trainer = Trainer();
            CHECK_OK(model.load(runtime, path));
            CHECK_OK(trainer.create(runtime, model, how, data));
            CHECK_OK(trainer.load(path));
            while (trainer.step_count < 12) CHECK_OK(trainer.step(result));
        }
        weights[way].assign(model.weights, model.weights + model.block);
    }
    CHECK(memcmp(weights[0].data(), weights[1].data(), weights[0].size() * sizeof(float)) == 0);
    remove(path);
}

TEST(mask, "the gap's id would be a token's, or a text with gaps would be cut in another way than the text that was learnt") {
    Runtime runtime;
    Model model;
    Tokenizer tokenizer;
    Config config = tiny_encoder();
    config.vocab = 0;
    Array<int32_t> read(runtime);
    Encoder encoder;
    CHECK_OK(tokenizer.create_bytes(runtime));
    CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK(model.config.vocab == 257 && mask_id(model) == 256);
    CHECK_OK(encoder.create(runtime, model));
    CHECK_OK(encoder.encode("a [MASK]b[MASK]", read, true));
    CHECK(read.size() == 5 && read[0] == 'a' && read[1] == ' ' && read[2] == 256 && read[3] == 'b' && read[4] == 256);
    CHECK_OK(encoder.encode("[MASK]", read));
    CHECK(read.size() == 6 && read[0] == '[');
    CHECK_OK(encoder.encode("a text that is longer than the context", read));
    CHECK(read.size() == 16);
    CHECK_OK(encoder.encode("", read, true));
    CHECK(read.size() == 0);

    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 300}, Text("the cat sat on the mat, the cat sat on the hat")));
    CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK(model.config.vocab == model.tokenizer.vocab + 1 && mask_id(model) == model.tokenizer.vocab);
    CHECK_OK(encoder.create(runtime, model));
    Array<int32_t> whole(runtime);
    CHECK_OK(model.tokenizer.encode("the cat on", whole));
    CHECK_OK(encoder.encode("the [MASK] on", read, true));
    CHECK(whole.size() == 3 && read.size() == 3 && read[0] == whole[0] && read[1] == mask_id(model) && read[2] == whole[2]);
    CHECK_OK(encoder.encode("the [MASK] [MASK]", read, true));
    CHECK(read.size() == 3 && read[0] == whole[0] && read[1] == mask_id(model) && read[2] == mask_id(model));

    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::wordpiece, 60}, Text("the cat sat on the mat, the cat sat on the hat")));
    CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    const Text name = model.tokenizer.bytes(mask_id(model));
    CHECK(model.config.vocab == model.tokenizer.vocab && std::string(name.data, name.size) == " [MASK]");

    Data data;
    Trainer trainer;
    config.vocab = 256;
    CHECK_OK(tokenizer.create_bytes(runtime));
    CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK(mask_id(model) == -1);
    CHECK_OK(data.create(runtime, Span<const int32_t>(ids)));
    CHECK(trainer.create(runtime, model, tiny_run(3), data).error == Error::invalid_argument);
    CHECK_OK(encoder.create(runtime, model));
    CHECK(encoder.encode("[MASK]", read, true).error == Error::unsupported);
}

TEST(fine_tuning, "a classifier would not begin with what its encoder has learnt, or would take what is of another shape") {
    Runtime runtime;
    Model encoder, classifier, wider;
    Config wide = tiny_classifier();
    wide.width = 32;
    CHECK_OK(encoder.create(runtime, tiny_encoder(), Tokenizer(), 5));
    CHECK_OK(classifier.create(runtime, tiny_classifier(), Tokenizer(), 6));
    CHECK_OK(wider.create(runtime, wide, Tokenizer(), 6));
    const uint64_t version = classifier.version;
    CHECK(classifier.copy_weights(encoder) == static_cast<int>(encoder.names.size) && classifier.version > version);
    for (const Weight& weight : encoder.names) {
        const Weight* mine = classifier.find(weight.name);
        CHECK(mine && memcmp(classifier.weights + mine->offset, encoder.weights + weight.offset,
                             static_cast<size_t>(weight.rows * weight.cols) * sizeof(float)) == 0);
    }
    CHECK(wider.copy_weights(encoder) == 0);
}

TEST(best_classifier, "the file would not be the classifier that is right most often, or a resumed run would forget how often that was") {
    // Half of the labels to learn are wrong: the longer it learns, the surer it is of them, and the loss of the right ones rises.
    static int32_t words[64][6], labels[64], right[64];
    std::vector<Example> learnt, held_out;
    for (int i = 0; i < 64; ++i) {
        for (int k = 0; k < 6; ++k) words[i][k] = (i * 7 + k * k * 5 + i * k) % 30;
        right[i] = words[i][0] % 3, labels[i] = i % 4 < 2 ? right[i] : (i * 5 + 1) % 3;
        Example example{{words[i], 6}, {&labels[i], 1}, {}, {}};
        learnt.push_back(example);
        example.targets = {&right[i], 1};
        held_out.push_back(example);
    }
    struct Seen {
        double accuracy = -1, loss = 0, lowest = 1e9;
        int64_t step = 0, step_of_lowest = 0;
        static bool look(void* user, const Progress& p) {
            Seen& seen = *static_cast<Seen*>(user);
            if (!p.evaluation) return true;
            const double accuracy = p.evaluation->top1, loss = p.evaluation->loss;
            const bool better = accuracy > seen.accuracy || (!(accuracy < seen.accuracy) && loss < seen.loss);
            CHECK(better == p.best);
            if (better) seen.accuracy = accuracy, seen.loss = loss, seen.step = p.step->step;
            if (loss < seen.lowest) seen.lowest = loss, seen.step_of_lowest = p.step->step;
            return true;
        }
    };
    Runtime runtime;
    TrainConfig how = tiny_run(200);
    how.evaluate_every = 5;
    Seen all, parts;
    RunResult whole, resumed;
    for (const bool stop : {false, true}) {
        Model model;
        Data data, validation;
        Trainer trainer;
        CHECK_OK(model.create(runtime, tiny_classifier(), Tokenizer(), 5));
        CHECK_OK(data.create(runtime, Span<const Example>(learnt.data(), learnt.size())));
        CHECK_OK(validation.create(runtime, Span<const Example>(held_out.data(), held_out.size())));
        CHECK_OK(trainer.create(runtime, model, how, data, &validation));
        RunConfig run;
        run.out = "build/test_best_classifier.safetensors";
        run.progress = &Seen::look, run.user = stop ? &parts : &all;
        if (!stop) {
            CHECK_OK(trainer.run(run, whole));
            continue;
        }
        run.stop_at = whole.best_step + 2;
        CHECK_OK(trainer.run(run, resumed));
        Trainer again;
        CHECK_OK(again.create(runtime, model, how, data, &validation));
        CHECK_OK(again.load("build/test_best_classifier.resume.safetensors"));
        run.stop_at = 0;
        CHECK_OK(again.run(run, resumed));
    }
    CHECK(all.step != all.step_of_lowest && all.step > 0);  // else this test shows nothing
    CHECK(whole.best_step == all.step && resumed.best_step == all.step && parts.step == all.step);
    CHECK(whole.best_validation_loss <= all.loss && whole.best_validation_loss >= all.loss);
    remove("build/test_best_classifier.safetensors"), remove("build/test_best_classifier.resume.safetensors");
}

TEST(labels, "the names of classes would be lost in the file, or a damaged file would give a class another one's name") {
    Runtime runtime;
    Model model, loaded;
    Array<char> bytes(runtime);
    CHECK_OK(model.create(runtime, tiny_classifier(), Tokenizer(), 5));
    CHECK(model.set_labels("good\nbad\n").error == Error::invalid_argument);
    CHECK(model.set_labels("good\nbad\nugly").error == Error::invalid_argument);
    CHECK(model.set_labels("good\nbad\nu\xff\n").error == Error::invalid_argument);
    CHECK(model.label(0).size == 0);
    CHECK_OK(model.set_labels("good\n\nso \"so\"\n"));
    CHECK_OK(model.save_memory(bytes));
    CHECK_OK(loaded.load_memory(runtime, Text(bytes.data(), bytes.size())));
    const Text last = loaded.label(2);
    CHECK(std::string(last.data, last.size) == "so \"so\"" && loaded.label(1).size == 0 && loaded.label(3).size == 0 &&
          loaded.label(-1).size == 0);
    std::string damaged(bytes.data(), bytes.size());
    const size_t at = damaged.find("good\\n");
    if (CHECK(at != std::string::npos)) damaged[at + 4] = damaged[at + 5] = 'x';
    CHECK(loaded.load_memory(runtime, Text(damaged.data(), damaged.size())).error == Error::bad_file);
}

TEST(wrong_use, "what does not fit the model would be read beyond its end, or a decoder would be taken for an encoder") {
    Runtime runtime;
    Model encoder, classifier, decoder;
    Encoder reads, judges, none;
    Session session;
    float few[2], room[30];
    Config causal = tiny_encoder();
    causal.causal = true;
    CHECK_OK(encoder.create(runtime, tiny_encoder(), Tokenizer()));
    CHECK_OK(classifier.create(runtime, tiny_classifier(false, 5), Tokenizer()));
    CHECK_OK(decoder.create(runtime, causal, Tokenizer()));
    CHECK(session.create(runtime, encoder).error == Error::unsupported);
    CHECK(none.create(runtime, decoder).error == Error::unsupported);
    CHECK(none.create(runtime, Model()).error == Error::invalid_argument);
    CHECK(none.fill(example_of(3), 0, room).error == Error::invalid_argument);
    CHECK(none.embed(example_of(3), room).error == Error::invalid_argument);
    CHECK_OK(reads.create(runtime, encoder));
    CHECK_OK(judges.create(runtime, classifier));
    CHECK(reads.classify(example_of(3), room).error == Error::unsupported);
    CHECK(judges.fill(example_of(3), 0, room).error == Error::unsupported);
    CHECK(judges.classify(example_of(3), room).error == Error::invalid_argument);  // no features
    CHECK(reads.fill(example_of(3), 0, few).error == Error::no_room);
    CHECK(reads.embed(example_of(3), few).error == Error::no_room);
    CHECK(reads.fill(example_of(3), 3, room).error == Error::invalid_argument);
    CHECK(reads.fill(example_of(3), -1, room).error == Error::invalid_argument);
    CHECK(reads.fill(example_of(0), 0, room).error == Error::invalid_argument);
    CHECK(reads.fill(example_of(17), 0, room).error == Error::invalid_argument);
    const int32_t outside[] = {30, -1};
    CHECK(reads.embed(Example{{outside, 1}, {}, {}, {}}, room).error == Error::invalid_argument);
    CHECK(reads.embed(Example{{outside + 1, 1}, {}, {}, {}}, room).error == Error::invalid_argument);
    CHECK_OK(reads.embed(example_of(3), room));
}

// Counts what is allocated, and fails at the number `fails`.
struct Host {
    int count = 0, fails = -1, alive = 0;
    uint64_t bytes = 0;
    void lend(Runtime& runtime) {
        runtime.memory_user = this;
        runtime.allocate = [](void* user, size_t size, size_t alignment) -> void* {
            Host& m = *static_cast<Host*>(user);
            if (m.count++ == m.fails) return nullptr;
            ++m.alive, m.bytes += size;
            return aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
        };
        runtime.release = [](void* user, void* memory, size_t size) {
            Host& m = *static_cast<Host*>(user);
            --m.alive, m.bytes -= size;
            free(memory);
        };
    }
};
TEST(memory, "reading would allocate, memory would be lost when there is too little of it, or be more than what was said") {
    Host memory;
    Runtime runtime;
    memory.lend(runtime);
    runtime.threads = 1;  // or its workers' memory would be among what is counted
    {
        Model model;
        Encoder encoder;
        Memory said;
        float room[30];
        CHECK_OK(memory_needed(runtime, tiny_encoder(), Purpose::running, 1, said));
        CHECK_OK(model.create(runtime, tiny_encoder(), Tokenizer()));
        CHECK_OK(encoder.create(runtime, model));
        float whole[30];
        CHECK_OK(encoder.embed(example_of(16), whole));
        Array<char> file(runtime);
        CHECK_OK(model.save_memory(file));
        encoder = Encoder();
        CHECK_OK(model.load_memory(runtime, Text(file.items, file.count), Purpose::running));
        file.clear();
        CHECK_OK(encoder.create(runtime, model));
        CHECK_OK(encoder.embed(example_of(16), room));
        CHECK(memcmp(room, whole, sizeof(float) * static_cast<size_t>(model.config.width)) == 0);
        if (!CHECK(memory.bytes == said.total()))
            printf("    %lld bytes, not %lld\n", static_cast<long long>(memory.bytes), static_cast<long long>(said.total()));
        const int before = memory.count;
        CHECK_OK(encoder.embed(example_of(16), room));
        CHECK_OK(encoder.fill(example_of(9), 3, room));
        CHECK(memory.count == before);
    }
    CHECK(memory.alive == 0);
    for (int fails = 0; fails < 60; ++fails) {
        Model model;
        Encoder encoder;
        memory.fails = -1;
        CHECK_OK(model.create(runtime, tiny_encoder(), Tokenizer()));
        const int alive = memory.alive;
        memory.count = 0, memory.fails = fails;
        const Status status = encoder.create(runtime, model);
        memory.fails = -1;
        if (status.ok()) break;
        CHECK(status.error == Error::out_of_memory && fails < 59);
        CHECK(memory.alive <= alive + 1);  // the model keeps what it has packed
    }
}

int main() { return run_tests(); }
