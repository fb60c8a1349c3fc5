// g++ -std=c++17 -O2 -pthread examples/lora.cpp -o build/lora && build/lora
// LoRA: one model of a whole village, and two small adapters, each trained on the dialogues of one villager while the model stays as it is.
// Then one session goes from one voice to another: that is a matter of microseconds.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "../babygpt.h"
using namespace babygpt;

static bool show(void*, const Progress& p) {
    if (p.step->step % 100 == 0 || p.step->step == 1)
        printf("  step %3d of %d, loss %.3f\n", static_cast<int>(p.step->step), static_cast<int>(p.steps), p.step->loss);
    return true;
}

// What both of them have in common: the text, cut into dialogues.
static Status read_dialogues(Runtime& runtime, Text text, Corpus& corpus) {
    CorpusConfig config;
    config.split_documents = true, config.validation_fraction = 0;
    return corpus.open_memory(runtime, text, config);
}

static Status train_model(Runtime& runtime, Text text, Model& model) {
    Corpus corpus;
    Tokenizer tokenizer;
    Data data;
    Trainer trainer;
    RunResult result;
    Config config;
    TrainConfig how;
    RunConfig watch;
    config.layers = 2, config.heads = 4, config.width = 64, config.context = 48;
    how.steps = 600, how.batch = 8, how.lr = 5e-3;
    watch.progress = &show;
    Status s = read_dialogues(runtime, text, corpus);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::bpe, 768}, corpus);
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = model.set_chat("You: ", "Mira: ", true);
    if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    return s.ok() ? trainer.run(watch, result) : s;
}

// Trained on the dialogues in which `turn` begins a line, and of these only on what follows it.
static Status train_adapter(Runtime& runtime, Text text, const Model& model, const char* turn, Adapter& adapter) {
    Array<char> own(runtime);
    for (size_t at = 0, end; at < text.size; at = end + 2) {
        for (end = at; end + 1 < text.size && (text[end] != '\n' || text[end + 1] != '\n');) ++end;
        if (end + 1 >= text.size) end = text.size;
        bool speaks = false;
        for (size_t i = at; i + strlen(turn) < end && !speaks; ++i)
            speaks = text[i] == '\n' && memcmp(text.data + i + 1, turn, strlen(turn)) == 0;
        if (!speaks || (own.append(text.data + at, end - at) && own.append("\n\n", 2))) continue;
        Status full;
        full.error = Error::out_of_memory;
        return full;
    }
    Corpus corpus;
    Data data;
    Trainer trainer;
    RunResult result;
    TrainConfig how;
    Evaluation before, after;
    how.steps = 200, how.batch = 8, how.lr = 1e-2;
    Status s = read_dialogues(runtime, own, corpus);
    if (s.ok()) s = adapter.create(runtime, model, {4, 8, ""});
    if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer, Text(), uint64_t(1) << 28, turn);
    if (s.ok()) s = trainer.create(runtime, model, adapter, how, data);
    if (s.ok()) s = evaluate(runtime, model, data, before);
    if (s.ok()) s = trainer.run(RunConfig(), result);
    if (s.ok()) s = evaluate(runtime, model, data, after, 8, nullptr, nullptr, &adapter);
    if (s.ok()) printf("an adapter for what follows '%s': loss %.3f without it, %.3f with it\n", turn, before.loss, after.loss);
    return s;
}

static Status run(const char* path) {
    Runtime runtime;
    Corpus whole;
    Array<char> text(runtime);
    const Text files[] = {path};
    Model model;
    Adapter adapters[2];
    const char* const turns[] = {"Mira: ", "Borin: "};
    Session session;
    const auto collect = [](void* user, Text bytes, bool) { return static_cast<Array<char>*>(user)->append(bytes.data, bytes.size); };
    Status s = whole.open(runtime, files);
    if (s.ok()) s = whole.read(Part::all, collect, &text);
    if (s.ok()) s = train_model(runtime, text, model);
    for (int i = 0; i < 2 && s.ok(); ++i) s = train_adapter(runtime, text, model, turns[i], adapters[i]);
    if (s.ok()) s = session.create(runtime, model);
    if (!s.ok()) return s;
    printf("%lld numbers in the model, %lld in each adapter\n", static_cast<long long>(model.parameters),
           static_cast<long long>(adapters[0].parameters));
    for (int i = 0; i < 4 && s.ok(); ++i) {
        Array<char> said(runtime);
        Generation reply;
        SampleConfig greedy;
        greedy.temperature = 0, reply.text = &said;
        const clock_t start = clock();
        s = session.use(&adapters[i % 2], true);  // what has been said stays in the cache
        const double microseconds = 1e6 * static_cast<double>(clock() - start) / CLOCKS_PER_SEC;
        if (s.ok()) s = session.reply(i < 2 ? "who are you" : "what do you sell", greedy, reply, turns[i % 2]);
        printf("%s%.*s   (changed in %.0f us)\n", turns[i % 2], static_cast<int>(said.size()), said.data(), microseconds);
    }
    if (s.ok()) s = adapters[0].save("build/mira.safetensors");  // PEFT's names: Python reads it
    return s;
}

int main(int count, char** words) {
    const Status s = run(count > 1 ? words[1] : "examples/village.txt");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message[0] ? s.message : error_text(s.error));
    return s.ok() ? 0 : 1;
}
