// g++ -std=c++17 -O2 -pthread examples/retrieval.cpp -o build/retrieval && build/retrieval "who stole the pie" examples/village.txt
// Answers from documents: finds those that a question is about by its words (BM25), with -e ENCODER also by vectors (of babygpt train
// --encoder-only or --classes), and by both. With -m MODEL a model reads the best one and answers; the source is named. QUESTION "-": one a line
// from standard input. In text files empty lines divide documents; -f FIELD: of jsonl or csv.
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;
using std::string;
using std::vector;
using Counts = std::map<string, double>;

// Words in small letters and digits. Bytes above ASCII are letters, too.
static Counts count_words(const string& text) {
    Counts counts;
    string word;
    for (const char c : text + ' ') {
        const char small = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
        if ((small >= 'a' && small <= 'z') || (c >= '0' && c <= '9') || (c & 0x80)) word += small;
        else if (!word.empty()) ++counts[word], word.clear();
    }
    return counts;
}
struct Document {
    string text, source;
    Counts counts;
    double length = 0;  // in words
    vector<float> meaning;
};

static Status load(Runtime& runtime, const string& path, const string& field, vector<Document>& documents) {
    CorpusConfig config;
    config.split_documents = true, config.field = config.column = field;
    Corpus corpus;
    const Text files[] = {path};
    vector<string> texts(1);
    const auto take = [](void* user, Text bytes, bool end_of_document) {
        vector<string>& to = *static_cast<vector<string>*>(user);
        to.back().append(bytes.data, bytes.size);
        if (end_of_document) to.emplace_back();
        return true;
    };
    Status s = corpus.open(runtime, files, config);
    if (s.ok()) s = corpus.read(Part::all, take, &texts);
    for (size_t i = 0; s.ok() && i + 1 < texts.size(); ++i) {
        documents.push_back({texts[i], path + ", document " + std::to_string(i + 1), count_words(texts[i]), 0, {}});
        for (const auto& [word, count] : documents.back().counts) documents.back().length += count;
    }
    return s;
}
// BM25 (Robertson & Zaragoza 2009): for each word of the question, how rare it is times how often the document has it.
static vector<double> by_words(const vector<Document>& documents, const string& question, double k1 = 1.5, double b = 0.75) {
    vector<double> scores(documents.size());
    double n = static_cast<double>(documents.size()), mean = 0, having;
    for (const Document& d : documents) mean += d.length / n;
    for (const auto& [word, times] : count_words(question)) {
        having = 0;
        for (const Document& d : documents) having += static_cast<double>(d.counts.count(word));
        for (size_t d = 0; d < documents.size(); ++d) {
            const auto found = documents[d].counts.find(word);
            const double count = found == documents[d].counts.end() ? 0 : found->second;
            scores[d] += times * log(1 + (n - having + 0.5) / (having + 0.5)) * count * (k1 + 1) /
                         (count + k1 * (1 - b + b * documents[d].length / mean));
        }
    }
    return scores;
}
// The mean of what the encoder makes of each token, of length 1. It reads as many as it was trained with.
static Status read(Encoder& encoder, const string& text, vector<float>& meaning) {
    Array<int32_t> ids(*encoder.runtime);
    meaning.assign(static_cast<size_t>(encoder.model->config.width), 0);
    Status s = encoder.encode(text, ids);
    if (s.ok() && ids.size() > 0) s = encoder.embed(Example{{ids.data(), ids.size()}, {}, {}, {}}, {meaning.data(), meaning.size()});
    float square = 1e-12f;
    for (const float x : meaning) square += x * x;
    for (float& x : meaning) x /= sqrtf(square);
    return s;
}
static vector<size_t> best_of(const vector<double>& scores) {
    vector<size_t> order(scores.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    return order;
}

static Status play(vector<Document>& documents, Encoder& encoder, const Model& model, const string& question) {
    Status s;
    vector<double> scores[3] = {by_words(documents, question), vector<double>(documents.size()), vector<double>(documents.size())};
    if (encoder.model) {
        vector<float> asked;
        s = read(encoder, question, asked);
        for (size_t d = 0; d < documents.size() && s.ok(); ++d) {
            if (documents[d].meaning.empty()) s = read(encoder, documents[d].text, documents[d].meaning);
            for (size_t i = 0; i < asked.size(); ++i) scores[1][d] += static_cast<double>(asked[i] * documents[d].meaning[i]);  // cosine
        }
        // Reciprocal rank fusion (Cormack, Clarke & Buettcher 2009): scores of two kinds cannot be added, but ranks can.
        for (int i = 0; i < 2; ++i) {
            double rank = 60;
            for (const size_t d : best_of(scores[i])) scores[2][d] += 1 / ++rank;
        }
    }
    if (s.ok() && !encoder.model && !(scores[0][best_of(scores[0])[0]] > 0)) return printf("No document has a word of this question.\n"), s;
    static const char* const ways[] = {"words", "vectors", "both"};
    for (int i = 0; s.ok() && !model.runtime && i < (encoder.model ? 3 : 1); ++i) {
        vector<size_t> best = best_of(scores[i]);
        best.resize(std::min<size_t>(best.size(), 5));
        for (const size_t d : best) {
            const int shown = static_cast<int>(std::min<size_t>(70, documents[d].text.find('\n')));
            printf("%.3f by %s\t%s\t%.*s\n", scores[i][d], ways[i], documents[d].source.c_str(), shown, documents[d].text.c_str());
        }
    }
    if (!s.ok() || !model.runtime) return s;
    // The document goes before the question, as much of its beginning as half the context holds.
    const Document& best = documents[best_of(scores[encoder.model ? 2 : 0])[0]];
    Session session;
    Array<int32_t> ids(*model.runtime);
    Array<char> text(*model.runtime);
    Generation said;
    said.text = &text;
    SampleConfig how;
    how.temperature = 0, how.tokens = 60;
    s = session.create(*model.runtime, model);
    if (s.ok()) s = model.tokenizer.encode(best.text + "\n", ids);
    if (s.ok()) s = session.feed({ids.data(), std::min(ids.size(), static_cast<size_t>(model.config.context) / 2)});
    if (s.ok()) s = model.chat.empty() ? session.generate(question + "\n", how, said) : session.reply(question, how, said);
    printf("%.*s   [%s]\n", static_cast<int>(text.size()), text.data(), best.source.c_str());
    return s;
}

int main(int count, char** arguments) {
    string field = "text", question;
    Runtime runtime;
    Model model, reader;
    Encoder encoder;
    vector<Document> documents;
    Status s;
    for (int i = 1; i < count && s.ok(); ++i) {
        const string word = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
        if (word == "-f") field = value, ++i;
        else if (word == "-m") s = model.load(runtime, value), ++i;
        else if (word == "-e") s = reader.load(runtime, value), ++i;
        else if (question.empty()) question = word;
        else s = load(runtime, word, field, documents);
    }
    if (s.ok() && documents.empty()) return fprintf(stderr, "no question, or no documents: see the example's first lines\n"), 2;
    if (s.ok() && reader.runtime) s = encoder.create(runtime, reader);
    char line[4096];
    if (s.ok() && question != "-") s = play(documents, encoder, model, question);
    else
        while (s.ok() && fgets(line, sizeof line, stdin)) s = play(documents, encoder, model, line), printf("\n");
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
