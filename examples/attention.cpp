// g++ -std=c++17 -O2 -pthread examples/attention.cpp -o build/attention && build/attention
// Where does a word look? Trains a tiny model on a few hundred Turkish sentences, then prints the attention of two sentences as a table:
// each row is a word, each column a word that it looks at (itself and those before it), in per cent, the mean of all heads of the last layer.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include <string>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;

// Every subject with every object and verb that go together: enough for the model to learn who does what.
static std::string sentences() {
    struct Pattern {
        std::vector<std::string> subjects, objects, verbs;
    };
    const Pattern patterns[] = {
        {{"Kedi", "Minik kedi", "Aç kedi"}, {"mama", "balık", "peynir"}, {"yer", "yedi", "istiyor"}},
        {{"Ali", "Ayşe", "Mehmet", "Komşumuz"}, {"bankadan kredi", "arkadaşından borç", "bankadan para"}, {"çekti", "aldı", "istedi"}},
        {{"Ali", "Ayşe", "Mehmet", "Çocuk"}, {"elma", "ekmek", "kitap", "kalem"}, {"aldı", "verdi", "istedi"}},
        {{"Köpek", "Kuş"}, {"su", "yem", "ekmek"}, {"içti", "yedi", "istiyor"}},
    };
    std::string text;
    for (int round = 0; round < 3; ++round)
        for (const Pattern& p : patterns)
            for (const std::string& subject : p.subjects)
                for (const std::string& object : p.objects)
                    for (const std::string& verb : p.verbs) text += subject + " " + object + " " + verb + ".\n";
    return text;
}

static Status show(Runtime& runtime, const Model& model, const char* sentence) {
    Array<int32_t> ids(runtime);
    Array<float> table(runtime);
    Session session;
    Status s = model.tokenizer.encode(std::string(sentence) + ".", ids);
    if (s.ok()) s = session.create(runtime, model);
    if (s.ok()) s = session.feed(ids);
    if (s.ok()) s = session.attention(model.config.layers - 1, table);
    if (!s.ok()) return s;
    const size_t n = ids.size();
    std::vector<std::string> words;
    for (const int32_t id : ids) words.emplace_back(model.tokenizer.bytes(id).data, model.tokenizer.bytes(id).size);
    const auto print = [](const std::string& word) {  // in ten columns; a UTF-8 character takes one
        int width = 0;
        for (const char c : word) width += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
        printf("%s%*s", word.c_str(), width < 10 ? 10 - width : 1, "");
    };
    printf("\n%s\n%10s", sentence, "");
    for (const std::string& word : words) print(word);
    for (size_t i = 0; i < n; ++i) {
        printf("\n");
        print(words[i]);
        for (size_t k = 0; k <= i; ++k) {
            float mean = 0;
            for (int head = 0; head < model.config.heads; ++head)
                mean += table[(static_cast<size_t>(head) * n + i) * n + k] / static_cast<float>(model.config.heads);
            printf("%5.1f %%   ", static_cast<double>(100 * mean));
        }
    }
    printf("\n");
    return s;
}

int main() {
    const std::string text = sentences();
    Runtime runtime;
    Corpus corpus;
    Tokenizer tokenizer;
    Model model;
    Data data;
    Trainer trainer;
    Config config;
    config.layers = 2, config.heads = 4, config.width = 64, config.context = 32;
    TrainConfig how;
    how.steps = 300, how.lr = 3e-3;
    RunResult result;
    Status s = corpus.open_memory(runtime, text);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::bpe, 512}, corpus);  // enough merges for whole words
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    if (s.ok()) s = trainer.run(RunConfig(), result);
    for (const char* sentence : {"Kedi mama yer", "Ali bankadan kredi çekti"})
        if (s.ok()) s = show(runtime, model, sentence);
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
