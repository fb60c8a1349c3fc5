// g++ -std=c++17 -O2 -pthread examples/sentiment.cpp -o build/sentiment && build/sentiment
// A classifier: is a sentence for or against? Alone it learns from the few sentences below, which is enough for sentences that are made of the same
// words.   build/sentiment TRAIN.tsv DEV.tsv   reads lines of a sentence, a tab and a 0 or 1. Then it judges the lines of standard input.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;

static const char* bundled =
    "i loved the soup and the bread\t1\nwhat a lovely evening\t1\nthe room was clean and warm\t1\nthe smith is kind\t1\n"
    "the beer is good here\t1\nsuch a kind host\t1\nwe had a good time\t1\nthe bread was fresh and good\t1\nwarm room , lovely people\t1\n"
    "i will come again\t1\nthe best inn in the valley\t1\neverybody was friendly\t1\nfresh soup and friendly people\t1\n"
    "the music was lovely\t1\na clean and friendly inn\t1\nthe evening was warm and the beer was the best\t1\n"
    "i hated the soup and the bread\t0\nwhat an awful evening\t0\nthe room was dirty and cold\t0\nthe smith is rude\t0\n"
    "the beer is bad here\t0\nsuch a rude host\t0\nwe had a bad time\t0\nthe bread was stale and bad\t0\ncold room , awful people\t0\n"
    "i will never come again\t0\nthe worst inn in the valley\t0\neverybody was angry\t0\nstale soup and angry people\t0\n"
    "the music was awful\t0\na dirty and cold inn\t0\nthe evening was cold and the beer was the worst\t0\n";
static const char* questions = "the people in the inn are kind\nthe soup was cold and the host was rude\na lovely room and good beer\n";

struct Sentences {
    std::string text;  // without the labels, a line each
    std::vector<std::vector<int32_t>> ids;
    std::vector<int32_t> labels;
    std::vector<Example> examples;

    bool read(const std::string& lines) {
        for (size_t at = 0, end; at < lines.size(); at = end + 1) {
            end = lines.find('\n', at);
            if (end == std::string::npos) end = lines.size();
            const size_t tab = lines.rfind('\t', end);
            if (tab == std::string::npos || tab <= at || tab + 1 >= end || (lines[tab + 1] != '0' && lines[tab + 1] != '1')) return false;
            text += lines.substr(at, tab - at) + "\n";
            labels.push_back(lines[tab + 1] - '0');
        }
        return !labels.empty();
    }
    Status tokenize(Runtime& runtime, const Tokenizer& tokenizer, size_t context) {
        size_t at = 0;
        for (size_t i = 0; i < labels.size(); ++i) {
            const size_t end = text.find('\n', at);
            Array<int32_t> read(runtime);
            const Status s = tokenizer.encode(Text(&text[at], end - at), read);
            if (!s.ok()) return s;
            ids.emplace_back(read.begin(), read.begin() + (read.size() < context ? read.size() : context));
            at = end + 1;
        }
        for (size_t i = 0; i < labels.size(); ++i) examples.push_back(Example{{ids[i].data(), ids[i].size()}, {&labels[i], 1}, {}, {}});
        return Status();
    }
    Span<const Example> all() const { return Span<const Example>(examples.data(), examples.size()); }
};

static bool show(void*, const Progress& p) {
    if (p.evaluation)
        printf("step %4d, loss %.3f; on other sentences %.3f, %.1f %% right\n", static_cast<int>(p.step->step), p.step->loss,
               p.evaluation->loss, 100 * p.evaluation->top1);
    fflush(stdout);
    return true;
}

static std::string read_all(FILE* file) {
    std::string all;
    for (int c; file && (c = fgetc(file)) != EOF;) all += static_cast<char>(c);
    return all;
}

int main(int count, char** words) {
    const bool files = count == 3;
    FILE *a = files ? fopen(words[1], "rb") : nullptr, *b = files ? fopen(words[2], "rb") : nullptr;
    Sentences learn, other;
    const bool good = learn.read(files ? read_all(a) : bundled) && other.read(files ? read_all(b) : bundled);
    if (a) fclose(a);
    if (b) fclose(b);
    if (!good) return fprintf(stderr, "expected lines of a sentence, a tab and 0 or 1\n"), 1;

    Runtime runtime;
    Tokenizer tokenizer;
    Model model;
    Data data, held_out;
    Trainer trainer;
    Encoder encoder;
    RunConfig watch;
    RunResult result;
    Config config;
    TrainConfig how;
    config.causal = false, config.classes = 2;
    config.layers = 1, config.width = 64, config.context = 64;
    how.steps = files ? 1500 : 300, how.batch = files ? 32 : 8, how.lr = 1e-3, how.dropout = files ? 0.5 : 0.1;
    how.label_smoothing = 0.1, how.evaluate_every = how.steps / 30;
    watch.out = "build/sentiment.safetensors", watch.progress = &show;

    Status s = tokenizer.train(runtime, {TokenizerKind::wordpiece, files ? 14000 : 400}, Text(learn.text));
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = learn.tokenize(runtime, model.tokenizer, 64);
    if (s.ok()) s = other.tokenize(runtime, model.tokenizer, 64);
    if (s.ok()) s = data.create(runtime, learn.all());
    if (s.ok()) s = held_out.create(runtime, other.all());
    if (s.ok()) s = trainer.create(runtime, model, how, data, &held_out);
    if (s.ok()) s = model.set_labels("against\nfor\n");
    if (s.ok()) s = trainer.run(watch, result);
    if (s.ok()) s = model.load(runtime, watch.out);  // the best, not the last
    if (s.ok()) s = encoder.create(runtime, model);
    const std::string lines = files ? read_all(stdin) : questions;
    Array<int32_t> ids(runtime);
    for (size_t at = 0, end; s.ok() && at < lines.size(); at = end + 1) {
        float probabilities[2];
        end = lines.find('\n', at);
        if (end == std::string::npos) end = lines.size();
        s = encoder.encode(Text(&lines[at], end - at), ids);
        if (s.ok() && ids.size() == 0) continue;
        if (s.ok()) s = encoder.classify(Example{{ids.data(), ids.size()}, {}, {}, {}}, probabilities);
        const int best = probabilities[1] > probabilities[0];
        const Text label = model.label(best);
        if (s.ok()) printf("%.*s (%.2f): %.*s\n", int(label.size), label.data, double(probabilities[best]), int(end - at), &lines[at]);
    }
    if (!s.ok()) fprintf(stderr, "%s\n", s.message);
    return s.ok() ? 0 : 1;
}
