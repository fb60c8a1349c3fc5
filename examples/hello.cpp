// g++ -std=c++17 -O2 -pthread examples/hello.cpp -o build/hello && build/hello
#define BABYGPT_IMPLEMENTATION
#include "../babygpt.h"
#include <stdio.h>
using namespace babygpt;
int main() {
    const char* text = "the cat sat on the mat. the dog sat on the log. the cat saw the dog. the dog saw the cat on the mat. ";
    Runtime runtime;  // memory, threads and files: the defaults
    Corpus corpus; Tokenizer tokenizer; Model model; Data data; Trainer trainer; Session session;
    Config config;
    config.layers = 2, config.heads = 2, config.width = 64, config.context = 32;
    TrainConfig how;
    how.steps = 200, how.lr = 3e-3;
    RunResult run;
    Array<char> said(runtime);
    Generation reply;
    reply.text = &said;
    Status s = corpus.open_memory(runtime, text);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::characters, 0}, corpus);
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    if (s.ok()) s = trainer.run(RunConfig(), run);
    if (s.ok()) s = session.create(runtime, model);
    if (s.ok()) s = session.generate("the dog", SampleConfig(), reply);
    printf("%s%.*s\n", s.message, static_cast<int>(said.size()), said.data());
}
