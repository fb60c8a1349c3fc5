// Our side of tools/compare_torch.py: torch_steps MODEL.safetensors VARIANT saves a fresh two-layer model, trains it for 100 steps on
// numbers that the Python side makes as well, and prints a line a step: the loss and the learning rate. Not a test by itself. Encoder-decoders
// (variants 7 and 8) take 50 steps, and before them say the logits of what comes last in the first example.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../babygpt.h"

using namespace babygpt;

static int report(const Status& status) {
    if (!status.ok()) fprintf(stderr, "torch_steps: %s\n", status.message);
    return status.ok() ? 0 : 1;
}

// Random numbers to read, and what is to be said of them.
struct Pair {
    std::vector<int32_t> source, ids, targets;
    void draw(uint32_t& random, int context) {
        const auto below = [&](int limit) {
            random = random * 1664525u + 1013904223u;
            return static_cast<int32_t>((random >> 8) % static_cast<uint32_t>(limit));
        };
        source.resize(1 + static_cast<size_t>(below(context)));
        for (int32_t& id : source) id = below(16);
        ids.resize(1 + static_cast<size_t>(below(context)));
        targets.resize(ids.size());
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = i == 0 ? 0 : targets[i - 1];
            targets[i] = (source[i % source.size()] * 3 + 1) % 16;
        }
    }
    Example example() const {
        Example e;
        e.source = {source.data(), source.size()}, e.ids = {ids.data(), ids.size()}, e.targets = {targets.data(), targets.size()};
        return e;
    }
};

static int train_pairs(Runtime& runtime, Model& model, const TrainConfig& how) {
    const int context = model.config.context;
    std::vector<Pair> pairs(static_cast<size_t>(how.batch * how.accumulate));
    std::vector<Example> examples(pairs.size());
    uint32_t random = 1;
    Data data;
    Trainer trainer;
    for (int64_t step = 0; step < how.steps; ++step) {
        for (size_t i = 0; i < pairs.size(); ++i) pairs[i].draw(random, context), examples[i] = pairs[i].example();
        const Span<const Example> all(examples.data(), examples.size());
        if (step == 0) {
            Session session;
            if (report(session.create(runtime, model)) || report(session.read_source(all[0].source)) || report(session.feed(all[0].ids)))
                return 1;
            for (const float logit : session.logits()) printf("%.9g ", static_cast<double>(logit));
            printf("\n");
            if (report(data.create(runtime, all)) || report(trainer.create(runtime, model, how, data))) return 1;
        }
        StepResult result;
        if (report(trainer.step(all, result))) return 1;
        printf("%.9f %.12g\n", result.loss, result.lr);
    }
    return 0;
}

// Sequences of random lengths for an encoder (variant 9: a target for two of three ids), a classifier that pools the mean (10), and one that reads
// features and pools the first row (11).
struct Sentence {
    std::vector<int32_t> ids, targets;
    std::vector<float> features;
    Example draw(uint32_t& random, const Config& config) {
        const auto below = [&](int limit) {
            random = random * 1664525u + 1013904223u;
            return static_cast<int32_t>((random >> 8) % static_cast<uint32_t>(limit));
        };
        ids.resize(1 + static_cast<size_t>(below(config.context)));
        for (int32_t& id : ids) id = below(config.vocab);
        targets.assign(config.classes > 0 ? 1 : ids.size(), ids[0] % 5);
        for (size_t i = 0; config.classes == 0 && i < ids.size(); ++i) targets[i] = i % 3 == 1 ? -1 : ids[ids.size() - 1 - i];
        features.resize(ids.size() * static_cast<size_t>(config.features));
        for (float& number : features) number = static_cast<float>(below(256)) / 128 - 1;
        return Example{{ids.data(), ids.size()}, {targets.data(), targets.size()}, {}, {features.data(), features.size()}};
    }
};

// Prints first what the model says of the last id, or of the class, of the first example (probabilities) and its vector, then 50 steps.
static int train_sentences(Runtime& runtime, const char* path, int variant) {
    Config config;
    config.layers = 2, config.heads = 4, config.width = 64, config.context = 32, config.vocab = 16;
    config.causal = false, config.head_bias = variant == 9;
    if (variant > 9) config.classes = 5;
    if (variant == 11) config.pool_first = true, config.features = 6;
    TrainConfig how;
    how.batch = 4, how.accumulate = 2, how.steps = 50, how.lr = 3e-3, how.warmup = 10;
    Model model;
    if (report(model.create(runtime, config, Tokenizer(), 42)) || report(model.save(path))) return 1;
    std::vector<Sentence> sentences(8);
    std::vector<Example> examples(8);
    uint32_t random = 1;
    Data data;
    Trainer trainer;
    for (int64_t step = 0; step < how.steps; ++step) {
        for (size_t i = 0; i < 8; ++i) examples[i] = sentences[i].draw(random, config);
        const Span<const Example> all(examples.data(), examples.size());
        if (step == 0) {
            Encoder encoder;
            float probabilities[16], vector[64];
            const int last = static_cast<int>(examples[0].ids.size) - 1;
            if (report(encoder.create(runtime, model)) || report(encoder.embed(examples[0], vector))) return 1;
            if (report(variant == 9 ? encoder.fill(examples[0], last, probabilities) : encoder.classify(examples[0], probabilities)))
                return 1;
            for (int i = 0; i < (variant == 9 ? 16 : 5); ++i) printf("%.9g ", static_cast<double>(probabilities[i]));
            printf("\n");
            for (const float number : vector) printf("%.9g ", static_cast<double>(number));
            printf("\n");
            if (report(data.create(runtime, all)) || report(trainer.create(runtime, model, how, data))) return 1;
        }
        StepResult result;
        if (report(trainer.step(all, result))) return 1;
        printf("%.9f %.12g\n", result.loss, result.lr);
    }
    return 0;
}

int main(int count, char** words) {
    if (count < 3) return report(Status()), 2;
    const int variant = atoi(words[2]);
    const bool second = variant == 1, llama = variant == 4 || variant == 5;
    Runtime runtime;
    if (variant >= 9) return train_sentences(runtime, words[1], variant);
    Config config;
    if (report(preset_architecture(llama ? "llama" : variant == 7 ? "transformer" : "gpt2", config))) return 1;
    config.layers = 2, config.heads = 4, config.width = 64, config.context = 32;
    if (second) config.tied = config.bias = false, config.activation = Activation::gelu;
    if (variant == 2) config.positions = Positions::rotary;
    if (llama) config.kv_heads = 2;
    if (variant == 6) config.positions = Positions::sinusoidal, config.norm_after = true, config.activation = Activation::relu;
    if (variant >= 7) config.encoder_layers = 2;
    TrainConfig how;
    how.optimizer = variant == 3 || variant == 5 ? Optimizer::muon : Optimizer::adamw;
    how.batch = 4, how.accumulate = 2, how.steps = 100, how.lr = 3e-3, how.warmup = 10;

    Tokenizer tokenizer;
    Model model;
    if (report(tokenizer.create_bytes(runtime)) || report(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer), 42))) return 1;
    if (report(model.save(words[1]))) return 1;

    if (variant >= 7) {
        how.steps = 50;
        return train_pairs(runtime, model, how);
    }

    // A walk through the 256 ids whose next step is one of four.
    uint32_t random = 1;
    int32_t id = 0;
    const auto next = [&] {
        random = random * 1664525u + 1013904223u;
        return id = static_cast<int32_t>((static_cast<uint32_t>(id) * 5 + (random >> 30)) % 256);
    };
    const size_t rows = static_cast<size_t>(how.batch * how.accumulate * config.context);
    std::vector<int32_t> ids(rows), targets(rows);
    Data data;
    Trainer trainer;
    if (report(data.create(runtime, Span<const int32_t>(ids.data(), rows))) || report(trainer.create(runtime, model, how, data))) return 1;
    for (int64_t step = 0; step < how.steps; ++step) {
        for (size_t i = 0; i < rows; ++i)
            ids[i] = i == 0 && step == 0 ? 0 : i == 0 ? targets[rows - 1] : targets[i - 1], targets[i] = next();
        StepResult result;
        if (report(trainer.step(Span<const int32_t>(ids.data(), rows), Span<const int32_t>(targets.data(), rows), result))) return 1;
        printf("%.9f %.12g\n", result.loss, result.lr);
    }
    return 0;
}
