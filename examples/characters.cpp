// g++ -std=c++17 -O2 -pthread examples/characters.cpp -o build/characters && build/characters README.md
// Trains a small GPT on the characters of a text file for 500 steps, shows how the loss falls, then lets the model write.
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#include <stdio.h>

#include "../babygpt.h"

using namespace babygpt;

static bool show(void*, const Progress& p) {
    if (p.step->step == 1 || p.step->step % 50 == 0)
        printf("step %4d of %d   loss %.3f   %6.0f characters/s   %3.0f s left\n", static_cast<int>(p.step->step),
               static_cast<int>(p.steps), p.step->loss, p.step->tokens_per_second, p.seconds_left);
    if (p.evaluation)
        printf("           validation %.3f, perplexity %.2f%s\n", p.evaluation->loss, p.evaluation->perplexity,
               p.best ? "   the best so far" : "");
    return true;
}

static Status play(Runtime& runtime, const char* path) {
    const Text files[] = {path};
    Corpus corpus;
    Status s = corpus.open(runtime, files);
    if (!s.ok()) return s;

    // Characters become numbers; the last id stands for characters that the training text does not have.
    Tokenizer tokenizer;
    s = tokenizer.train(runtime, {TokenizerKind::characters, 0}, corpus);
    if (!s.ok()) return s;
    printf("%d different characters; a model that knows nothing has a loss of ln %d = %.3f\n", tokenizer.vocab, tokenizer.vocab,
           log(tokenizer.vocab));

    Config config;  // 4 layers, 4 heads, width 128
    config.context = 64;
    Model model;
    s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (!s.ok()) return s;

    Data training, validation;  // nine tenths and one tenth of the text
    s = training.create(runtime, corpus, Part::training, model.tokenizer);
    if (s.ok()) s = validation.create(runtime, corpus, Part::validation, model.tokenizer);
    if (!s.ok()) return s;

    TrainConfig how;
    how.steps = 500, how.lr = 3e-3, how.evaluate_every = 250;
    Trainer trainer;
    s = trainer.create(runtime, model, how, training, &validation);
    RunConfig run;
    run.progress = show;
    RunResult result;
    if (s.ok()) s = trainer.run(run, result);
    if (!s.ok()) return s;

    Session session;
    s = session.create(runtime, model);
    if (!s.ok()) return s;
    Array<char> text(runtime);
    Generation written;
    written.text = &text;
    SampleConfig sampling;
    sampling.tokens = 400;
    s = session.generate("", sampling, written);
    printf("\n%.*s\n\n%d characters in %.2f s\n", static_cast<int>(text.size()), text.data(), written.generated, written.seconds);
    return s;
}

int main(int count, char** arguments) {
    Runtime runtime;
    const Status s = play(runtime, count > 1 ? arguments[1] : "examples/village.txt");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
