// tools/measures.h against sums done by hand and by brute force. (tools/compare_measures.py compares with sacrebleu and scikit-learn.)
#include "../tools/measures.h"

#include "check.h"

using namespace measures;
using std::string;
using std::vector;

static bool near(double a, double b) { return std::fabs(a - b) < 1e-9; }
static string joined(const vector<string>& words) {
    string text;
    for (const string& word : words) text += (text.empty() ? "" : "|") + word;
    return text;
}

TEST(white_space_divides_words, "the words that all measures count would be others than Python's") {
    CHECK(joined(split_words(" a\tb\xC2\xA0"
                             "c\xE3\x80\x80\n")) == "a|b|c");
    CHECK(joined(split_words("\xE2\x80\xA8x\xE2\x80\x8By\x1C.\xC2")) == "x\xE2\x80\x8By|.\xC2");  // U+200B is no white space
    CHECK(split_words("").empty());
}

TEST(tokens_13a, "BLEU would not be sacrebleu's") {
    CHECK(joined(tokenize_13a("It's 3.5, no: 1,000-fold (x-y)... \"A/B\".")) ==
          "It's|3.5|,|no|:|1,000|-|fold|(|x-y|)|.|.|.|\"|A|/|B|\"|.");  // as sacrebleu 2.6 has it
    CHECK(joined(tokenize_13a("&amp;lt; <skipped>&quot;")) == "<|\"");
    CHECK(joined(tokenize_13a("caf\xC3\xA9.5 ,\xC3\xA9")) == "caf\xC3\xA9|.|5|,|\xC3\xA9");
}

TEST(bleu_by_hand, "the figure for translations would be wrong") {
    // 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, none of 2: the last counts as half of one.
    const Bleu one = bleu({"the cat sat down here"}, {{"the cat sat up here now"}});
    CHECK(near(one.score, 100 * std::exp(1 - 6.0 / 5) * std::pow(4.0 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2, 0.25)));
    CHECK(one.hypothesis_words == 5 && one.reference_words == 6);
    // A word counts as often as one reference has it; the reference whose length is nearest counts, of two the shorter.
    const Bleu several = bleu({"a a a b"}, {{"a a c c c"}, {"a b b"}});
    CHECK(near(several.precisions[0], 75) && near(several.precisions[1], 200.0 / 3) && several.reference_words == 3);
    CHECK(near(bleu({"a b c d", "e f"}, {{"a b c d", "e f"}}).score, 100));
    CHECK(near(bleu({"a b"}, {{"a b"}}).score, 0) && near(bleu({""}, {{"a"}}).score, 0) && near(bleu({"a b c d"}, {{"e"}}).score, 0));
}

TEST(variety_by_hand, "a model that says one thing again and again would look lively") {
    const Variety v = variety({"a b a b a b", "", "a b a b"});
    CHECK(v.words == 10 && near(v.distinct1, 2.0 / 10) && near(v.distinct2, 2.0 / 8) && near(v.repetition, 1 - 2.0 / 4));
    CHECK(near(variety({"one two"}).repetition, 0) && variety({}).words == 0);
}

TEST(labels_by_hand, "a classifier would be judged by wrong figures") {
    const Classification c = classification({"x", "x", "y", "z", "y"}, {"x", "y", "y", "y", "x"});
    CHECK(near(c.accuracy, 0.4) && c.labels.size() == 3);
    CHECK(near(c.labels.at("x").f1(), 0.5) && near(c.labels.at("y").f1(), 0.4) && near(c.labels.at("z").f1(), 0));
    CHECK(near(c.f1_macro, 0.3) && near(c.labels.at("y").precision(), 0.5) && near(c.labels.at("y").recall(), 1.0 / 3));
}

// A span of characters: where one begins is no continuation byte.
static vector<string> characters_of(const string& text) {
    vector<string> result;
    for (const char c : text) {
        if ((static_cast<unsigned char>(c) & 0xC0) == 0x80 && !result.empty()) result.back() += c;
        else result.push_back(string(1, c));
    }
    return result;
}

TEST(copied_is_what_searching_finds, "a text learnt by heart would be passed off as the model's own") {
    uint32_t state = 1;
    const auto below = [&](uint32_t n) { return state = state * 1664525 + 1013904223, (state >> 9) % n; };
    const char* letters[] = {"a", "b", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "c"};
    for (int round = 0; round < 400; ++round) {
        const size_t span = 1 + below(6);
        const uint32_t alphabet = 1 + below(6);
        const auto documents = [&](uint32_t longest) {
            vector<string> texts(1 + below(3));
            for (string& text : texts)
                for (uint32_t i = below(longest); i > 0; --i) text += letters[below(alphabet)];
            return texts;
        };
        const vector<string> output = documents(40), training = documents(80);
        CopyMeter meter(span);
        for (const string& text : output) CHECK(meter.output(text, true));
        meter.finish_output();
        for (const string& text : training) {  // in pieces, cut anywhere
            const size_t cut = text.empty() ? 0 : below(uint32_t(text.size()));
            meter.training(text.substr(0, cut), false);
            meter.training(text.substr(cut), true);
        }
        const Copied copied = meter.result();

        size_t spans = 0, found = 0, longest = 0, all = 0;
        for (const string& text : output) {
            const vector<string> parts = characters_of(text);
            all += parts.size();
            for (size_t i = 0; i < parts.size(); ++i) {
                string part;
                for (size_t n = 1; i + n <= parts.size(); ++n) {
                    part += parts[i + n - 1];
                    bool is_there = false;
                    for (const string& source : training) is_there |= source.find(part) != string::npos;
                    if (is_there) longest = std::max(longest, n);
                    if (n == span) ++spans, found += is_there;
                }
            }
        }
        CHECK(copied.characters == all && copied.spans == spans && copied.found == found && copied.longest == longest);
        CHECK(characters_of(copied.text).size() == longest);
        CHECK(longest == 0 || training[size_t(copied.document) - 1].find(copied.text) != string::npos);
    }
}

TEST(copied_of_a_long_text, "measuring a book would take hours") {
    string output, training;
    for (uint32_t i = 0; i < 300000; ++i)
        output += char('a' + i * 7919 % 26 * (i % 3) % 26), training += char('a' + i * 104729 % 26 * (i % 5) % 26);
    CopyMeter meter(50);
    meter.output(output, true);
    meter.finish_output();
    for (int i = 0; i < 10; ++i) meter.training(training, false);
    meter.training(output.substr(1000, 100000), true);
    const Copied copied = meter.result();
    CHECK(copied.longest >= 100000 && copied.found >= 100000 - 49 && copied.spans == 300000 - 49);
    CHECK(output.find(copied.text) != string::npos);
}

TEST(bytes_that_are_no_text, "a damaged file would be read past its end, or differ from itself") {
    string bytes;
    for (int i = 0; i < 4000; ++i) bytes += char(i * i * 31 >> 3 & 255);
    CopyMeter meter(3);
    meter.output(bytes, true);
    meter.finish_output();
    for (const char c : bytes) meter.training(string(1, c), false);
    meter.training("", true);
    const Copied copied = meter.result();
    CHECK(copied.text == bytes && copied.found == copied.spans && copied.longest == copied.characters);
}

int main(int count, char** words) { return run_tests(count, words); }
