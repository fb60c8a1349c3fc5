// g++ -std=c++17 -O2 -pthread examples/bert.cpp -o build/bert && build/bert
// An encoder as BERT (Devlin et al. 2019): it learns from the talk of a village by filling gaps that are made at random, then fills some of ours, and
// says which sentences are near to each other.   build/bert TEXT.txt   learns from another text.
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#include <stdio.h>

#include <vector>

#include "../babygpt.h"

using namespace babygpt;

static bool show(void*, const Progress& p) {
    if (p.evaluation)
        printf("step %4d, loss %.3f; of the gaps in other text %.1f %% right\n", static_cast<int>(p.step->step), p.step->loss,
               100 * p.evaluation->top1);
    fflush(stdout);
    return true;
}

// The three likeliest words for each gap.
static Status fill(Encoder& encoder, const char* text) {
    const Model& model = *encoder.model;
    Array<int32_t> ids(*encoder.runtime);
    std::vector<float> p(static_cast<size_t>(model.config.vocab));
    Status s = encoder.encode(text, ids, true);
    printf("%s:", text);
    for (size_t at = 0; s.ok() && at < ids.size(); ++at) {
        if (ids[at] != mask_id(model)) continue;
        s = encoder.fill(Example{ids, {}, {}, {}}, static_cast<int>(at), p);
        for (int n = 0; s.ok() && n < 3; ++n) {
            size_t best = 0;
            for (size_t id = 0; id < p.size(); ++id)
                if (p[id] > p[best]) best = id;
            const Text word = model.tokenizer.bytes(static_cast<int32_t>(best));
            printf(" %.*s (%.2f)", static_cast<int>(word.size), word.data, static_cast<double>(p[best]));
            p[best] = 0;
        }
    }
    printf("\n");
    return s;
}

// The cosine of the angle between the vectors of two sentences.
static Status compare(Encoder& encoder, const char* a, const char* b) {
    Array<int32_t> ids(*encoder.runtime);
    std::vector<float> v[2];
    const char* texts[] = {a, b};
    Status s;
    double product = 0, squares[2] = {};
    for (int i = 0; s.ok() && i < 2; ++i) {
        v[i].resize(static_cast<size_t>(encoder.model->config.width));
        s = encoder.encode(texts[i], ids);
        if (s.ok()) s = encoder.embed(Example{ids, {}, {}, {}}, v[i]);
    }
    for (size_t i = 0; s.ok() && i < v[0].size(); ++i) {
        product += static_cast<double>(v[0][i]) * static_cast<double>(v[1][i]);
        for (int k = 0; k < 2; ++k) squares[k] += static_cast<double>(v[k][i]) * static_cast<double>(v[k][i]);
    }
    if (s.ok()) printf("%.3f  %s / %s\n", product / sqrt(squares[0] * squares[1]), a, b);
    return s;
}

int main(int count, char** words) {
    const Text files[] = {count > 1 ? words[1] : "examples/village.txt"};
    Runtime runtime;
    Corpus corpus;
    Tokenizer tokenizer;
    Model model;
    Data data, held_out;
    Trainer trainer;
    Encoder encoder;
    RunConfig watch;
    RunResult result;
    CorpusConfig dialogues;
    Config config;
    TrainConfig how;
    dialogues.split_documents = true;
    config.causal = false;
    config.layers = 3, config.heads = 4, config.width = 96, config.context = 48, config.positions = Positions::rotary;
    how.steps = 1500, how.batch = 32, how.lr = 3e-3, how.evaluate_every = 150;
    watch.progress = &show;

    Status s = corpus.open(runtime, files, dialogues);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::wordpiece, 1500}, corpus);
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = data.create(runtime, corpus, Part::training, model.tokenizer);
    if (s.ok()) s = held_out.create(runtime, corpus, Part::validation, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data, &held_out);
    if (s.ok()) s = trainer.run(watch, result);
    if (s.ok()) s = encoder.create(runtime, model);
    if (s.ok()) s = fill(encoder, "You: Hello! Who are [MASK]?");
    if (s.ok()) s = fill(encoder, "Borin: I am the [MASK].");
    if (s.ok()) s = fill(encoder, "Mira: This is my [MASK], and you are [MASK] here.");
    if (s.ok()) s = compare(encoder, "Can you make me a sword?", "I need a new knife.");
    if (s.ok()) s = compare(encoder, "Can you make me a sword?", "Good night, sleep well.");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
