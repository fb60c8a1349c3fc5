// g++ -std=c++17 -O2 -pthread examples/bigram.cpp -o build/bigram && build/bigram examples/village.txt
// A bigram model guesses the next character from one character. It can be counted, or learnt: a GPT whose context is one character long
// is a bigram model, since attention has nothing to look at but the character itself. Both must reach the same loss.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include "../babygpt.h"

using namespace babygpt;

static Status play(Runtime& runtime, const char* path) {
    const Text files[] = {path};
    Corpus corpus;
    Tokenizer tokenizer;
    Model model;
    Data training, validation;
    Config config;
    config.layers = 1, config.heads = 1, config.width = 64, config.context = 1;
    Status s = corpus.open(runtime, files);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::characters, 0}, corpus);
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = training.create(runtime, corpus, Part::training, model.tokenizer);
    if (s.ok()) s = validation.create(runtime, corpus, Part::validation, model.tokenizer);
    if (!s.ok()) return s;

    NgramResult counted;
    s = ngram_baseline(runtime, training, validation, model.config.vocab, counted, 2);
    if (!s.ok()) return s;
    printf("counted: no context %.3f, one character %.3f nats per character\n", counted.loss_by_order[1], counted.loss_by_order[2]);

    TrainConfig how;
    how.batch = 2048, how.steps = 1500, how.lr = 1e-2, how.weight_decay = 0, how.evaluate_every = 300;
    Trainer trainer;
    s = trainer.create(runtime, model, how, training, &validation);
    if (!s.ok()) return s;
    RunConfig run;
    run.progress = [](void*, const Progress& p) {
        if (p.evaluation) printf("learnt: step %4d, %.3f nats per character\n", static_cast<int>(p.step->step), p.evaluation->loss);
        return true;
    };
    RunResult result;
    s = trainer.run(run, result);
    if (!s.ok()) return s;
    printf("the difference: %+.3f\n", result.best_validation_loss - counted.loss_by_order[2]);

    Session session;
    Array<char> text(runtime);
    Generation written;
    written.text = &text;
    s = session.create(runtime, model);
    if (s.ok()) s = session.generate("T", SampleConfig(), written);
    printf("T%.*s\n", static_cast<int>(text.size()), text.data());
    return s;
}

int main(int count, char** arguments) {
    Runtime runtime;
    const Status s = play(runtime, count > 1 ? arguments[1] : "examples/village.txt");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
