// g++ -std=c++17 -O2 -pthread examples/sentiment.cpp -o build/sentiment && build/sentiment
// A classifier: is a sentence for or against? Alone it learns from the few sentences below, which is enough for sentences that are made of the same
// words.   build/sentiment TRAIN.tsv DEV.tsv   reads lines of a sentence, a tab and a 0 or 1. Then it judges the lines of standard input.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <sstream>
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
    std::vector<int32_t> labels;
    std::vector<Array<int32_t>> ids;
    std::vector<Example> examples;

    bool read(std::istream&& lines) {
        for (std::string line; std::getline(lines, line);) {
            const size_t tab = line.rfind('\t');
            if (tab == std::string::npos || tab == 0 || (line[tab + 1] != '0' && line[tab + 1] != '1')) return false;
            text += line.substr(0, tab) + "\n";
            labels.push_back(line[tab + 1] - '0');
        }
        return !labels.empty();
    }
    Status tokenize(Runtime& runtime, const Tokenizer& tokenizer, size_t context) {
        std::istringstream lines(text);
        Status s;
        for (std::string line; s.ok() && std::getline(lines, line);) {
            const size_t i = ids.size();
            ids.emplace_back(runtime);
            s = tokenizer.encode(line, ids[i]);
            examples.push_back(Example{{ids[i].data(), std::min(ids[i].size(), context)}, {&labels[i], 1}, {}, {}});
        }
        return s;
    }
};

static bool show(void*, const Progress& p) {
    if (p.evaluation)
        printf("step %4d, loss %.3f; on other sentences %.3f, %.1f %% right\n", static_cast<int>(p.step->step), p.step->loss,
               p.evaluation->loss, 100 * p.evaluation->top1);
    fflush(stdout);
    return true;
}

int main(int count, char** words) {
    const bool files = count == 3;
    Sentences learn, other;
    const bool good = files ? learn.read(std::ifstream(words[1])) && other.read(std::ifstream(words[2]))
                            : learn.read(std::istringstream(bundled)) && other.read(std::istringstream(bundled));
    if (!good) return fprintf(stderr, "error: expected lines of a sentence, a tab and 0 or 1\n"), 1;

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
    if (s.ok()) s = data.create(runtime, Span<const Example>(learn.examples));
    if (s.ok()) s = held_out.create(runtime, Span<const Example>(other.examples));
    if (s.ok()) s = trainer.create(runtime, model, how, data, &held_out);
    if (s.ok()) s = model.set_labels("against\nfor\n");
    if (s.ok()) s = trainer.run(watch, result);
    if (s.ok()) s = model.load(runtime, watch.out);  // the best, not the last
    if (s.ok()) s = encoder.create(runtime, model);
    std::istringstream asked(questions);
    std::istream& lines = files ? std::cin : asked;
    Array<int32_t> ids(runtime);
    for (std::string line; s.ok() && std::getline(lines, line);) {
        float probabilities[2] = {};
        s = encoder.encode(line, ids);
        if (s.ok() && ids.size() == 0) continue;
        if (s.ok()) s = encoder.classify(Example{ids, {}, {}, {}}, probabilities);
        const int best = probabilities[1] > probabilities[0];
        const Text label = model.label(best);
        if (s.ok()) printf("%.*s (%.2f): %s\n", int(label.size), label.data, double(probabilities[best]), line.c_str());
    }
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
