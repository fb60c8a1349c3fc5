// g++ -std=c++17 -O2 -pthread examples/resume.cpp -o build/resume && build/resume
// Trains 60 steps in one go; then again, stopped after 25 steps as if the power had failed, and resumed from the file. The weights must have the same bits.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>
#include <string.h>

#include "../babygpt.h"

using namespace babygpt;

static const char* file = "build/resume_example.safetensors";

// Trains on our own source for `steps` of 60 steps; begins anew, or with what is in the file.
static Status train(Runtime& runtime, Model& model, int64_t steps, bool resume) {
    const Text files[] = {"examples/resume.cpp"};
    Corpus corpus;
    Tokenizer bytes;
    Data data;
    Trainer trainer;
    Config config;
    config.layers = 2, config.heads = 2, config.width = 32, config.context = 32;
    TrainConfig how;
    how.steps = 60, how.batch = 4, how.dropout = 0.1;
    Status s = corpus.open(runtime, files);
    if (s.ok()) s = bytes.create_bytes(runtime);
    if (s.ok()) s = resume ? model.load(runtime, file) : model.create(runtime, config, static_cast<Tokenizer&&>(bytes));
    if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    if (s.ok() && resume) s = trainer.load(file);  // moments, step, data position
    StepResult step;
    while (s.ok() && trainer.step_count < steps) s = trainer.step(step);
    if (s.ok()) printf("%s step %2d, loss %.6f\n", resume ? "resumed, now at" : "trained to", static_cast<int>(step.step), step.loss);
    if (s.ok() && steps < how.steps) s = trainer.save(file);
    return s;
}

int main() {
    Runtime one_thread, many_threads;  // the bits do not depend on the number of threads
    one_thread.threads = 1;
    many_threads.threads = 3;
    Model whole, cut, resumed;
    Status s = train(one_thread, whole, 60, false);
    if (s.ok()) s = train(one_thread, cut, 25, false);
    if (s.ok()) s = train(many_threads, resumed, 60, true);
    if (!s.ok()) {
        fprintf(stderr, "error: %s\n", s.message);
        return 1;
    }
    const bool same = memcmp(whole.weights, resumed.weights, static_cast<size_t>(whole.block) * sizeof(float)) == 0;
    printf("all %d weights have %s bits\n", static_cast<int>(whole.parameters), same ? "the same" : "OTHER");
    remove(file);
    return same ? 0 : 1;
}
