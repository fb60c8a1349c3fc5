// g++ -std=c++17 -O2 -pthread examples/retrieval.cpp -o build/retrieval && build/retrieval "who stole the pie" examples/village.txt
// Answers from documents: finds those that a question is about, puts the best into the prompt, lets a model (-m) answer, and names the source.
// Without a model it shows the best documents. QUESTION "-": one a line from standard input. In text files empty lines divide documents.
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;
using std::string;
using std::vector;

// Small letters and digits. Bytes above ASCII are letters, too.
static vector<string> words_of(const string& text) {
    vector<string> words;
    bool inside = false;
    for (const char c : text) {
        const bool capital = c >= 'A' && c <= 'Z', letter = capital || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c & 0x80) != 0;
        if (letter && !inside) words.emplace_back();
        if (letter) words.back() += static_cast<char>(capital ? c - 'A' + 'a' : c);
        inside = letter;
    }
    return words;
}

struct Library {
    struct Place {
        size_t document;
        double count;
    };
    vector<string> documents = {""}, sources;  // the last document is the one that is being read
    vector<double> lengths;                    // in words
    std::map<string, vector<Place>> index;     // where a word stands, and how often
    double total_length = 0;
    string file;  // that is being read, and the number of its first document
    size_t first = 0;

    void add() {
        const vector<string> words = words_of(documents.back());
        std::map<string, double> counts;
        for (const string& word : words) ++counts[word];
        for (const auto& [word, count] : counts) index[word].push_back({sources.size(), count});
        lengths.push_back(static_cast<double>(words.size()));
        total_length += lengths.back();
        sources.push_back(file + ", document " + std::to_string(sources.size() - first + 1));
        documents.emplace_back();
    }

    Status load(Runtime& runtime, const string& path, const char* field) {
        CorpusConfig config;
        config.split_documents = true, config.field = config.column = field;
        Corpus corpus;
        const Text files[] = {path};
        file = path, first = sources.size();
        const Status s = corpus.open(runtime, files, config);
        if (!s.ok()) return s;
        const auto read = [](void* user, Text bytes, bool end_of_document) {
            Library& library = *static_cast<Library*>(user);
            library.documents.back().append(bytes.data, bytes.size);
            if (end_of_document) library.add();
            return true;
        };
        return corpus.read(Part::all, read, this);
    }

    // BM25 (Robertson & Zaragoza 2009): for each word of the question, how rare it is times how often the document has it. A second score, say
    // the likeness of embeddings, is another such vector, added to this one.
    vector<double> bm25(const string& question, double k1 = 1.5, double b = 0.75) const {
        vector<double> scores(sources.size(), 0);
        const double n = static_cast<double>(sources.size()), mean_length = total_length / n;
        for (const string& word : words_of(question)) {
            const auto found = index.find(word);
            if (found == index.end()) continue;
            const double having = static_cast<double>(found->second.size()), rarity = log(1 + (n - having + 0.5) / (having + 0.5));
            for (const Place& p : found->second)
                scores[p.document] += rarity * p.count * (k1 + 1) / (p.count + k1 * (1 - b + b * lengths[p.document] / mean_length));
        }
        return scores;
    }
};

static vector<size_t> best(const vector<double>& scores, size_t k) {
    vector<size_t> order(scores.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    k = std::min(k, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(k), order.end(),
                      [&](size_t a, size_t b) { return scores[a] > scores[b] || (!(scores[a] < scores[b]) && a < b); });
    order.resize(k);
    return order;
}

// The document goes before the question, as much of its beginning as half the context holds.
static Status answer(const Model& model, const string& document, const string& source, const string& question) {
    Runtime& runtime = *model.runtime;
    Session session;
    Array<int32_t> ids(runtime);
    Array<char> text(runtime);
    Generation said;
    said.text = &text;
    SampleConfig how;
    how.temperature = 0, how.tokens = 60;
    Status s = session.create(runtime, model);
    if (s.ok()) s = model.tokenizer.encode(document + "\n", ids);
    const size_t count = std::min(ids.size(), static_cast<size_t>(model.config.context) / 2);
    if (s.ok()) s = session.feed(Span<const int32_t>(ids.data(), count));
    if (s.ok()) s = model.chat.empty() ? session.generate(question + "\n", how, said) : session.reply(question, how, said);
    printf("%.*s   [%s]\n\n", static_cast<int>(text.size()), text.data(), source.c_str());
    return s;
}

// The best documents, or with a model an answer from the very best.
static Status play(const Library& library, const Model& model, const string& question, size_t k) {
    const vector<double> scores = library.bm25(question);
    const vector<size_t> found = best(scores, k);
    if (!(scores[found[0]] > 0)) return printf("No document has a word of this question.\n\n"), Status();
    if (model.runtime) return answer(model, library.documents[found[0]], library.sources[found[0]], question);
    for (const size_t d : found)
        if (scores[d] > 0) printf("%.3f\t%s\t%s\n", scores[d], library.sources[d].c_str(), library.documents[d].c_str());
    printf("\n");
    return Status();
}

int main(int count, char** words) {
    const char *field = "text", *question = nullptr;
    size_t k = 3;
    Runtime runtime;
    Library library;
    Model model;
    Status s;
    for (int i = 1; i < count && s.ok(); ++i) {
        const string word = words[i];
        if (word == "-k" && i + 1 < count) k = static_cast<size_t>(std::max(1, atoi(words[++i])));
        else if (word == "-f" && i + 1 < count) field = words[++i];
        else if (word == "-m" && i + 1 < count) s = model.load(runtime, words[++i]);
        else if (!question) question = words[i];
        else s = library.load(runtime, word, field);
    }
    if (s.ok() && library.sources.empty())
        return fprintf(stderr, "usage: %s [-k N] [-f FIELD] [-m MODEL.safetensors] QUESTION DOCUMENTS...\n", words[0]), 2;
    char line[4096];
    if (s.ok() && string(question) != "-") s = play(library, model, question, k);
    else
        while (s.ok() && fgets(line, sizeof line, stdin)) s = play(library, model, line, k);
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
