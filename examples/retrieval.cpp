// g++ -std=c++17 -O2 -pthread examples/retrieval.cpp -o build/retrieval && build/retrieval "who stole the pie" examples/village.txt
// Answers from documents: finds those that a question is about by its words (BM25), with -e ENCODER also by vectors (of babygpt train
// --encoder-only or --classes), and by both. With -m MODEL a model reads the best one and answers; the source is named. QUESTION "-": one a line
// from standard input. In text files empty lines divide documents; -f FIELD: of jsonl or csv.
#define BABYGPT_IMPLEMENTATION
#include <ctype.h>
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;
using std::string, std::vector;

struct Document {
    string text, source;
    double length;          // in words
    vector<float> meaning;  // what an encoder makes of it
};
struct Library {
    vector<Document> documents;
    std::map<string, vector<std::pair<size_t, double>>> index;  // of each word: which documents have it, how often
};

// How often each word stands in a text: letters and digits, in small letters. Bytes above ASCII are letters, too.
static std::map<string, double> count_words(string text) {
    for (char& c : text)
        if (!(c & 0x80)) c = static_cast<char>(isalnum(c) ? tolower(c) : ' ');
    std::map<string, double> counts;
    std::istringstream words(text);
    for (string word; words >> word;) ++counts[word];
    return counts;
}
static Status load(Runtime& runtime, Text path, const CorpusConfig& config, Library& library) {
    Corpus corpus;
    vector<string> texts(1);
    const auto take = [](void* user, Text piece, bool end_of_document) {
        vector<string>& to = *static_cast<vector<string>*>(user);
        to.back().append(piece.data, piece.size);
        if (end_of_document) to.emplace_back();
        return true;
    };
    Status s = corpus.open(runtime, {&path, 1}, config);
    if (s.ok()) s = corpus.read(Part::all, take, &texts);
    for (size_t i = 0; i + 1 < texts.size(); ++i) {
        Document document{texts[i], path.data + (", document " + std::to_string(i + 1)), 0, {}};
        for (const auto& [word, count] : count_words(texts[i])) {
            library.index[word].push_back({library.documents.size(), count});
            document.length += count;
        }
        library.documents.push_back(document);
    }
    return s;
}

// BM25 (Robertson & Zaragoza 2009): for each word of the question, how rare it is times how often a document has it.
static vector<double> by_words(Library& library, const string& question, double k1 = 1.5, double b = 0.75) {
    vector<double> scores(library.documents.size());
    double n = static_cast<double>(scores.size()), mean = 0;
    for (const Document& d : library.documents) mean += d.length / n;
    for (const auto& [word, times] : count_words(question)) {
        const double having = static_cast<double>(library.index[word].size()), rarity = log(1 + (n - having + 0.5) / (having + 0.5));
        for (const auto& [d, count] : library.index[word])
            scores[d] += times * rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * library.documents[d].length / mean));
    }
    return scores;
}
// The mean of what the encoder makes of each token, of length 1. It reads as many as it was trained with.
static Status embed(Encoder& encoder, const string& text, vector<float>& meaning) {
    Array<int32_t> ids(*encoder.runtime);
    meaning.resize(static_cast<size_t>(encoder.model->config.width));
    Status s = encoder.encode(text, ids);
    if (s.ok() && ids.size() > 0) s = encoder.embed(Example{ids, {}, {}, {}}, meaning);
    const float length = sqrtf(std::inner_product(meaning.begin(), meaning.end(), meaning.begin(), 1e-12f));
    for (float& x : meaning) x /= length;
    return s;
}

// The document goes before the question, as much of its beginning as half the context holds.
static Status answer(const Model& model, const Document& document, const string& question) {
    Session session;
    SampleConfig how;
    Generation said;
    Array<int32_t> ids(*model.runtime);
    how.temperature = 0, how.tokens = 60;
    said.stream = [](void*, Text piece) { return fwrite(piece.data, 1, piece.size, stdout) == piece.size; };
    Status s = session.create(*model.runtime, model);
    if (s.ok()) s = model.tokenizer.encode(document.text + "\n", ids);
    if (s.ok()) s = session.feed({ids.data(), std::min(ids.size(), static_cast<size_t>(model.config.context) / 2)});
    if (s.ok()) s = model.chat.empty() ? session.generate(question + "\n", how, said) : session.reply(question, how, said);
    if (s.ok()) printf("   [%s]\n", document.source.c_str());
    return s;
}

static Status ask(Library& library, Encoder& encoder, const Model& model, const string& question) {
    const char* const ways[] = {"words", "vectors", "both"};
    const size_t n = library.documents.size();
    vector<double> scores[] = {by_words(library, question), vector<double>(n), vector<double>(n)};
    vector<size_t> order(n);  // the documents' numbers, the best first
    vector<float> asked;
    const Status s = encoder.model ? embed(encoder, question, asked) : Status();
    for (size_t d = 0; d < n; ++d)  // the cosine
        scores[1][d] = std::inner_product(asked.begin(), asked.end(), library.documents[d].meaning.begin(), 0.0);
    for (int way = 0; s.ok() && way < (encoder.model ? 3 : 1); ++way) {
        std::iota(order.begin(), order.end(), size_t(0));
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[way][a] > scores[way][b]; });
        if (!encoder.model && scores[0][order[0]] <= 0) return printf("No document has a word of this question.\n"), s;
        for (size_t rank = 0; rank < n; ++rank) {
            const Document& d = library.documents[order[rank]];
            const int line = static_cast<int>(std::min<size_t>(d.text.find('\n'), 70));  // of its beginning, so much is shown
            if (rank < 5 && !model.runtime)
                printf("%.3f by %s\t%s\t%.*s\n", scores[way][order[rank]], ways[way], d.source.c_str(), line, d.text.c_str());
            // Reciprocal rank fusion (Cormack, Clarke & Buettcher 2009): scores of two kinds cannot be added, but ranks can.
            if (way < 2) scores[2][order[rank]] += 1 / static_cast<double>(61 + rank);
        }
    }
    return s.ok() && model.runtime ? answer(model, library.documents[order[0]], question) : s;
}

int main(int count, char** arguments) {
    Runtime runtime;
    CorpusConfig config;
    Model model, reader;
    Encoder encoder;
    Library library;
    string question, line;
    Status s;
    config.split_documents = true;
    for (int i = 1; i < count && s.ok(); ++i) {  // the end of the arguments is a null pointer, which makes an empty Text
        const string word = arguments[i];
        if (word == "-f") config.field = config.column = arguments[++i];
        else if (word == "-m") s = model.load(runtime, arguments[++i]);
        else if (word == "-e") s = reader.load(runtime, arguments[++i]);
        else if (question.empty()) question = word;
        else s = load(runtime, arguments[i], config, library);
    }
    if (s.ok() && library.documents.empty()) return fprintf(stderr, "error: a question and documents are needed: see the first lines\n"), 2;
    if (s.ok() && reader.runtime) s = encoder.create(runtime, reader);
    for (Document& d : library.documents)
        if (s.ok() && encoder.model) s = embed(encoder, d.text, d.meaning);
    if (s.ok() && question != "-") s = ask(library, encoder, model, question);
    while (s.ok() && question == "-" && std::getline(std::cin, line)) s = ask(library, encoder, model, line), printf("\n");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
