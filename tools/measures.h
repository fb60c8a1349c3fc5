// measures.h: what is measured of texts, as plain functions: BLEU, distinct n-grams, accuracy and F1, spans copied from the training text.
// `babygpt measure` shows them; tests/measures.cpp and tools/compare_measures.py check them. Texts are UTF-8; needs the standard library only.
#ifndef MEASURES_H
#define MEASURES_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace measures {

// ---- words ------------------------------------------------------------------------------------------------------------

// The length in bytes of the white space that `text` begins with (one character of Python's str.isspace), or 0.
inline size_t blank(std::string_view text) {
    const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    const unsigned c = byte(0), code = (c & 15) << 12 | (byte(1) & 63) << 6 | (byte(2) & 63);
    if (c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F)) return 1;
    if (c == 0xC2) return byte(1) == 0x85 || byte(1) == 0xA0 ? 2 : 0;
    if (c < 0xE1 || c > 0xE3 || (byte(1) & 0xC0) != 0x80 || (byte(2) & 0xC0) != 0x80) return 0;
    const bool is_blank = code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F ||
                          code == 0x205F || code == 0x3000;
    return is_blank ? 3 : 0;
}

inline std::vector<std::string> split_words(std::string_view text) {
    std::vector<std::string> words;
    bool inside = false;
    for (size_t i = 0; i < text.size();) {
        const size_t length = blank(text.substr(i));
        if (length == 0) {
            if (!inside) words.emplace_back();
            words.back() += text[i];
        }
        inside = length == 0;
        i += std::max<size_t>(length, 1);
    }
    return words;
}

// Calls f(n, n-gram) for all n-grams of up to `longest` words; the n-gram is the words with blanks between them.
template <class F>
void for_each_ngram(const std::vector<std::string>& words, size_t longest, const F& f) {
    for (size_t i = 0; i < words.size(); ++i) {
        std::string ngram;
        for (size_t n = 1; n <= longest && i + n <= words.size(); ++n) {
            if (n > 1) ngram += ' ';
            ngram += words[i + n - 1];
            f(n, ngram);
        }
    }
}

// ---- BLEU (Papineni et al. 2002), as sacrebleu computes it (Post 2018): tokenization 13a, smoothing exp -----------------

inline void replace_all(std::string& text, const char* from, const char* to) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += strlen(to)) text.replace(at, strlen(from), to);
}

// Writes `text` anew, pair by pair from the left: where(a, b) says that of two neighbours the one or both get blanks around them; what it
// appends to `to` stands for both. As a regular expression of two characters does it, a character belongs to one match.
template <class F>
std::string replace_pairs(const std::string& text, const F& where) {
    std::string to;
    for (size_t i = 0; i < text.size(); ++i) {
        if (i + 1 < text.size() && where(text[i], text[i + 1], to)) ++i;
        else to += text[i];
    }
    return to;
}

// mteval-v13a's tokens of a line: punctuation stands alone, but for points and commas between digits, apostrophes, and hyphens in words.
inline std::vector<std::string> tokenize_13a(std::string line) {
    replace_all(line, "<skipped>", "");
    replace_all(line, "&quot;", "\"");
    replace_all(line, "&amp;", "&");
    replace_all(line, "&lt;", "<");
    replace_all(line, "&gt;", ">");
    const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
    const auto is_point = [](char c) { return c == '.' || c == ','; };
    std::string text = " ";
    for (const char c : line + " ") {
        const bool alone = (c >= '{' && c <= '~') || (c >= '[' && c <= '`') || (c >= ' ' && c <= '&') || (c >= '(' && c <= '+') ||
                           (c >= ':' && c <= '@') || c == '/';
        if (alone) ((text += ' ') += c) += ' ';
        else text += c;
    }
    text = replace_pairs(text, [&](char a, char b, std::string& to) {
        if (is_digit(a) || !is_point(b)) return false;
        (((to += a) += ' ') += b) += ' ';
        return true;
    });
    text = replace_pairs(text, [&](char a, char b, std::string& to) {
        if (!is_point(a) || is_digit(b)) return false;
        (((to += ' ') += a) += ' ') += b;
        return true;
    });
    text = replace_pairs(text, [&](char a, char b, std::string& to) {
        if (!is_digit(a) || b != '-') return false;
        (((to += a) += ' ') += b) += ' ';
        return true;
    });
    return split_words(text);
}

struct Bleu {
    double score = 0;            // 0 to 100
    double precisions[4] = {};   // of n-grams, in percent, smoothed where none agreed
    double brevity_penalty = 1;  // below 1: the hypotheses are shorter than the references
    uint64_t hypothesis_words = 0, reference_words = 0;
};

// One hypothesis a line; references[k] holds the k-th reference of each.
inline Bleu bleu(const std::vector<std::string>& hypotheses, const std::vector<std::vector<std::string>>& references) {
    using Counts = std::unordered_map<std::string, uint64_t>;
    uint64_t agreeing[4] = {}, all[4] = {};
    Bleu result;
    for (size_t line = 0; line < hypotheses.size(); ++line) {
        const std::vector<std::string> said = tokenize_13a(hypotheses[line]);
        Counts allowed;  // as often as the reference that has it most
        size_t nearest = 0, distance = std::numeric_limits<size_t>::max();
        for (const std::vector<std::string>& texts : references) {
            const std::vector<std::string> words = tokenize_13a(texts[line]);
            Counts counts;
            for_each_ngram(words, 4, [&](size_t, const std::string& ngram) { ++counts[ngram]; });
            for (const auto& [ngram, count] : counts) allowed[ngram] = std::max(allowed[ngram], count);
            const size_t away = words.size() > said.size() ? words.size() - said.size() : said.size() - words.size();
            if (away < distance || (away == distance && words.size() < nearest)) distance = away, nearest = words.size();
        }
        for_each_ngram(said, 4, [&](size_t n, const std::string& ngram) {
            ++all[n - 1];
            const auto found = allowed.find(ngram);
            if (found != allowed.end() && found->second > 0) --found->second, ++agreeing[n - 1];
        });
        result.hypothesis_words += said.size(), result.reference_words += nearest;
    }
    const double said = double(result.hypothesis_words), wanted = double(result.reference_words);
    if (said < wanted) result.brevity_penalty = said > 0 ? std::exp(1 - wanted / said) : 0;
    if (agreeing[0] == 0) return result;  // nothing agrees
    double halved = 1, logs = 0;
    for (size_t n = 0; n < 4; ++n) {
        if (all[n] == 0) return result;  // the text is too short for an n-gram of this order
        if (agreeing[n] == 0) halved *= 2;
        result.precisions[n] = 100.0 * (agreeing[n] > 0 ? double(agreeing[n]) : 1 / halved) / double(all[n]);
        logs += std::log(result.precisions[n]) / 4;
    }
    result.score = result.brevity_penalty * std::exp(logs);
    return result;
}

// ---- variety ------------------------------------------------------------------------------------------------------------

struct Variety {
    double distinct1 = 0, distinct2 = 0;  // different n-grams / all n-grams (Li et al. 2016)
    double repetition = 0;                // share of the 4-grams that had been said before: 1 - different / all (Welleck et al. 2020)
    uint64_t words = 0;
};

// Over all lines together; words are divided by white space, and an n-gram does not cross the end of a line.
inline Variety variety(const std::vector<std::string>& lines) {
    std::unordered_set<std::string> different[4];
    double all[4] = {};
    Variety result;
    for (const std::string& line : lines) {
        const std::vector<std::string> words = split_words(line);
        result.words += words.size();
        for_each_ngram(words, 4, [&](size_t n, const std::string& ngram) {
            ++all[n - 1];
            if (n != 3) different[n - 1].insert(ngram);
        });
    }
    const auto share = [&](size_t n) { return double(different[n - 1].size()) / std::max(1.0, all[n - 1]); };
    result.distinct1 = share(1), result.distinct2 = share(2);
    result.repetition = all[3] > 0 ? 1 - share(4) : 0;
    return result;
}

// ---- accuracy and F1 ------------------------------------------------------------------------------------------------------

struct LabelScore {
    uint64_t right = 0, predicted = 0, real = 0;  // true positives; true and false positives; true positives and false negatives
    double precision() const { return predicted > 0 ? double(right) / double(predicted) : 0; }
    double recall() const { return real > 0 ? double(right) / double(real) : 0; }
    double f1() const { return predicted + real > 0 ? 2 * double(right) / double(predicted + real) : 0; }
};
struct Classification {
    double accuracy = 0;
    double f1_macro = 0;                       // the mean of the labels' F1
    std::map<std::string, LabelScore> labels;  // that were predicted or are real
};

inline Classification classification(const std::vector<std::string>& predictions, const std::vector<std::string>& real) {
    Classification result;
    uint64_t right = 0;
    for (size_t i = 0; i < real.size(); ++i) {
        const bool agree = predictions[i] == real[i];
        ++result.labels[predictions[i]].predicted;
        ++result.labels[real[i]].real;
        result.labels[real[i]].right += agree;
        right += agree;
    }
    for (const auto& [name, score] : result.labels) result.f1_macro += score.f1() / double(result.labels.size());
    result.accuracy = real.empty() ? 0 : double(right) / double(real.size());
    return result;
}

// ---- what was copied from the training text -------------------------------------------------------------------------------

// UTF-8 to numbers, one a character: its bytes, the first in the highest place. What is no UTF-8 gives one for each byte.
class Characters {
 public:
    template <class F>
    void read(std::string_view bytes, bool end, const F& f) {
        for (const char c : bytes) {
            const uint32_t byte = static_cast<unsigned char>(c);
            if ((byte & 0xC0) == 0x80 && wanted > 1) {
                value = value << 8 | byte, --wanted;
                continue;
            }
            if (wanted > 0) f(value);
            value = byte;
            wanted = byte >= 0xF0 && byte < 0xF8 ? 4 : byte >= 0xE0 && byte < 0xF0 ? 3 : byte >= 0xC0 && byte < 0xE0 ? 2 : 1;
        }
        if (end && wanted > 0) f(value), wanted = 0;
    }

 private:
    uint32_t value = 0;
    int wanted = 0;  // 1 and the bytes that are still to come; 0: there is nothing
};

struct Copied {
    uint64_t characters = 0;        // of the output
    uint64_t longest = 0;           // characters of its longest span that stands in the training text
    std::string text;               // that span
    uint64_t document = 0;          // where: in the training text's so many-th document, counted from 1
    uint64_t spans = 0, found = 0;  // all spans of so many characters, and those that stand in the training text
    double share() const { return spans > 0 ? double(found) / double(spans) : 0; }
};

// Builds the suffix automaton of the output (Blumer et al. 1985): its states are the sets of the output's substrings that end at the same
// places. The training text then runs through it once, so the time grows with both, the memory (about 100 bytes a character) with the output.
// First all of output(), then finish_output(), all of training(), result(). Spans do not cross the ends of documents.
class CopyMeter {
 public:
    explicit CopyMeter(size_t characters_a_span) : span(std::max<size_t>(characters_a_span, 1)) { states.push_back({}); }

    // False: the output is too long for the numbers here.
    bool output(std::string_view piece, bool end_of_document) {
        reader.read(piece, end_of_document, [&](uint32_t c) { extend(c); });
        if (end_of_document) extend(border);
        return letters.size() < size_t(1) << 30;
    }
    void finish_output() {  // the edges of a state side by side, sorted
        std::vector<Edge> sorted;
        sorted.reserve(edges.size());
        for (State& state : states) {
            const size_t first = sorted.size();
            for (uint32_t e = state.edges; e != none; e = edges[e].next) sorted.push_back(edges[e]);
            std::sort(sorted.begin() + std::ptrdiff_t(first), sorted.end(),
                      [](const Edge& a, const Edge& b) { return a.letter < b.letter; });
            state.edges = uint32_t(first);
        }
        edges.swap(sorted);
        is_copied.assign(states.size(), false);
    }
    void training(std::string_view piece, bool end_of_document) {
        reader.read(piece, end_of_document, [&](uint32_t c) {
            step(here, c, letters.size());
            if (here.length > best.length) best = here, best_document = documents;
            step(window, c, span);
            if (window.length == span) is_copied[window.state] = true;
        });
        if (end_of_document) here = window = {}, ++documents;
    }
    Copied result() const {
        Copied copied;
        Place place;
        size_t in_document = 0;
        for (const uint32_t c : letters) {
            step(place, c, span);
            copied.characters += c != border;
            in_document = c == border ? 0 : in_document + 1;
            if (in_document >= span) ++copied.spans, copied.found += is_copied[place.state];
        }
        copied.longest = best.length;
        copied.document = best.length > 0 ? best_document + 1 : 0;
        for (size_t i = states[best.state].end - best.length; i < states[best.state].end; ++i)
            for (int shift = 24; shift >= 0; shift -= 8)
                if (letters[i] >> shift || shift == 0) copied.text += char(letters[i] >> shift & 255);
        return copied;
    }

 private:
    static constexpr uint32_t none = 0xFFFFFFFF, border = 0xFFFFFFFF;
    struct State {
        uint32_t length = 0;    // of its longest substring
        uint32_t link = none;   // the state of the longest suffix that stands at more places
        uint32_t end = 0;       // the first place where its substrings end
        uint32_t edges = none;  // the first of a chain; after finish_output, of those up to the next state's
    };
    struct Edge {
        uint32_t letter, to, next;
    };
    struct Place {  // the state of the longest suffix of what was read that stands in the output
        uint32_t state = 0;
        size_t length = 0;
    };
    size_t span;
    std::vector<uint32_t> letters;
    std::vector<State> states;
    std::vector<Edge> edges;
    std::vector<bool> is_copied;  // a state whose substring of `span` characters stands in the training text
    Characters reader;
    Place here, window, best;  // window: of the last `span` characters at most
    uint64_t documents = 0, best_document = 0;
    uint32_t last = 0;

    uint32_t* find(uint32_t state, uint32_t letter) {  // while the chains are built
        for (uint32_t e = states[state].edges; e != none; e = edges[e].next)
            if (edges[e].letter == letter) return &edges[e].to;
        return nullptr;
    }
    void connect(uint32_t state, uint32_t letter, uint32_t to) {
        edges.push_back({letter, to, states[state].edges});
        states[state].edges = uint32_t(edges.size() - 1);
    }
    void extend(uint32_t letter) {
        letters.push_back(letter);
        const uint32_t added = uint32_t(states.size()), length = uint32_t(letters.size());
        states.push_back({length, 0, length, none});
        uint32_t from = last;
        last = added;
        uint32_t* there = nullptr;
        for (; from != none && !(there = find(from, letter)); from = states[from].link) connect(from, letter, added);
        if (from == none) return;
        const uint32_t old = *there;
        if (states[old].length == states[from].length + 1) {
            states[added].link = old;
            return;
        }
        const uint32_t copy = uint32_t(states.size());  // of the old state's substrings, those that now end here, too
        states.push_back({states[from].length + 1, states[old].link, states[old].end, none});
        for (uint32_t e = states[old].edges; e != none; e = edges[e].next) {
            const Edge edge = edges[e];
            connect(copy, edge.letter, edge.to);
        }
        states[added].link = states[old].link = copy;
        for (; from != none && (there = find(from, letter)) && *there == old; from = states[from].link) *there = copy;
    }
    // Reads a letter, then forgets from the front until the rest is no longer than `most`.
    void step(Place& place, uint32_t letter, size_t most) const {
        for (;;) {
            const auto begin = edges.begin() + std::ptrdiff_t(states[place.state].edges);
            const auto end = place.state + 1 < states.size() ? edges.begin() + std::ptrdiff_t(states[place.state + 1].edges) : edges.end();
            const auto edge = std::lower_bound(begin, end, letter, [](const Edge& e, uint32_t c) { return e.letter < c; });
            if (edge != end && edge->letter == letter) {
                place.state = edge->to, ++place.length;
                break;
            }
            if (place.state == 0) {
                place.length = 0;
                break;
            }
            place.state = states[place.state].link;
            place.length = states[place.state].length;
        }
        if (place.length <= most) return;
        place.length = most;
        while (states[states[place.state].link].length >= most) place.state = states[place.state].link;
    }
};

}  // namespace measures

#endif
