// g++ -std=c++17 -O2 -pthread examples/llama.cpp -o build/llama && build/llama
// A Llama-type model: RMSNorm, rotary positions, SwiGLU, keys and values shared by two heads each. It is trained on the talk of a village,
// then written as llama2.c's file and read again: both say the same.   build/llama FILE FOLDER also writes a folder that Python's transformers loads.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>
#include <string.h>

#include "../babygpt.h"
using namespace babygpt;

static bool show(void*, const Progress& p) {
    if (p.step->step % 20 == 0)
        printf("step %3d of %d, loss %.3f\n", static_cast<int>(p.step->step), static_cast<int>(p.steps), p.step->loss);
    return true;
}

// What the model says without chance, as ids.
static Status say(Runtime& runtime, const Model& model, int32_t (&ids)[60]) {
    Session session;
    SampleConfig greedy;
    greedy.temperature = 0;
    const int32_t start[] = {'T', 'h', 'e', ' '};  // bytes are their own ids
    Status s = session.create(runtime, model);
    if (s.ok()) s = session.feed(start);
    for (int32_t& id : ids)
        if (s.ok()) s = session.next(greedy, id);
    return s;
}

static Status run(const char* text, const char* file, const char* folder) {
    Runtime runtime;
    Corpus corpus;
    Tokenizer bytes;
    Model model, again;
    Data data;
    Trainer trainer;
    RunResult result;
    Config config;
    TrainConfig how;
    RunConfig watch;
    int32_t ids[60], ids_again[60];
    const Text files[] = {text};
    how.steps = 200, how.batch = 8, how.lr = 3e-3;
    watch.progress = &show;

    Status s = preset_architecture("llama", config);
    config.layers = 3, config.heads = 4, config.kv_heads = 2, config.width = 64, config.context = 64;
    if (s.ok()) s = corpus.open(runtime, files);
    if (s.ok()) s = bytes.create_bytes(runtime);
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(bytes));
    if (s.ok()) s = data.create(runtime, corpus, Part::training, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    if (s.ok()) s = trainer.run(watch, result);
    if (s.ok()) s = model.save_llama2c(file);
    if (s.ok()) s = again.load(runtime, file);
    if (s.ok()) s = say(runtime, model, ids);
    if (s.ok()) s = say(runtime, again, ids_again);
    if (!s.ok()) return s;

    for (const Weight& weight : model.names)  // Hugging Face's names and layout
        if (strstr(weight.name, "layers.0."))
            printf("%-50s %4d x %d\n", weight.name, static_cast<int>(weight.rows), static_cast<int>(weight.cols));
    printf("The ");
    for (const int32_t id : ids) printf("%c", id);
    printf("\n%s says %s\n", file, memcmp(ids, ids_again, sizeof ids) == 0 ? "the same" : "something else");
    return folder ? model.save_huggingface(folder) : s;
}

int main(int count, char** words) {
    const Status s = run("examples/village.txt", count > 1 ? words[1] : "build/llama.bin", count > 2 ? words[2] : nullptr);
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
