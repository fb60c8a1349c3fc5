// Tokenizers: text to ids and back, learning, files. The reference implementations here are slow and simple on purpose.
#include <fenv.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;
using std::string;
using Ids = std::vector<int32_t>;

static uint64_t random_state = 1;
static uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((random_state >> 33) % n);
}
static string random_bytes(size_t size, uint32_t kinds) {
    string text(size, '\0');
    for (char& c : text) c = static_cast<char>(random_below(kinds));
    return text;
}

static Ids encode(const Tokenizer& tokenizer, const string& text, bool special = false, size_t* unknown = nullptr) {
    Array<int32_t> ids(*tokenizer.runtime);
    CHECK_OK(tokenizer.encode(text, ids, special, unknown));
    return Ids(ids.begin(), ids.end());
}
static string decode(const Tokenizer& tokenizer, const Ids& ids) {
    Array<char> text(*tokenizer.runtime);
    CHECK_OK(tokenizer.decode(Span<const int32_t>(ids.data(), ids.size()), text));
    return string(text.begin(), text.size());
}
static string saved(const Tokenizer& tokenizer) {
    Array<char> json(*tokenizer.runtime);
    CHECK_OK(tokenizer.save_memory(json));
    return string(json.begin(), json.size());
}
static TokenizerConfig bpe(int vocab) {
    TokenizerConfig config;
    config.vocab = vocab;
    return config;
}
static TokenizerConfig wordpiece(int vocab, bool cased = false) {
    TokenizerConfig config;
    config.kind = TokenizerKind::wordpiece, config.vocab = vocab, config.cased = cased;
    return config;
}
static TokenizerConfig unigram(int vocab, bool byte_fallback = false) {
    TokenizerConfig config;
    config.kind = TokenizerKind::sentencepiece, config.vocab = vocab, config.byte_fallback = byte_fallback;
    return config;
}
static string read_shared(const char* name) {
    string text;
    if (FILE* file = fopen((string("../shared/data/") + name).c_str(), "rb")) {
        char buffer[4096];
        for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
        fclose(file);
    }
    return text;
}

static const char prose[] =
    "It's a truth that we've all heard: the innkeeper doesn't sleep, and she'll tell you so. 1, 2, 345 times!\n\n"
    "  Two blanks, then  more;\ttabs\t\tand a line end \r\n  The smith, the smith's hammer, the smith's hammers. They'd have sung, I'm "
    "told.\n"
    "Good morning! Good evening! Good night. (There is no good afternoon here...) ''quoted'' 'tis 'twas don't'll\n";

// ---- a reference for the merges: everything is counted anew for each ----------------------------------------------------

// GPT-2's words, for ASCII only.
static std::vector<string> words_of(const string& text) {
    const auto kind = [](char c) {
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return 1;
        if (c >= '0' && c <= '9') return 2;
        return c == ' ' || (c >= '\t' && c <= '\r') ? 0 : 3;
    };
    std::vector<string> words;
    for (size_t i = 0; i < text.size();) {
        size_t n = 0;
        for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
            if (text.compare(i, strlen(ending), ending) == 0) n = strlen(ending);
        const size_t blank = text[i] == ' ' && i + 1 < text.size() && kind(text[i + 1]) != 0;
        if (n == 0 && kind(text[i + blank]) != 0)
            for (n = blank + 1; i + n < text.size() && kind(text[i + n]) == kind(text[i + blank]);) ++n;
        if (n == 0) {
            while (i + n < text.size() && kind(text[i + n]) == 0) ++n;
            if (i + n < text.size() && n > 1) --n;
        }
        words.push_back(text.substr(i, n));
        i += n;
    }
    return words;
}
static void merge_everywhere(Ids& word, std::pair<int32_t, int32_t> pair, int32_t id) {
    for (size_t i = 0; i + 1 < word.size(); ++i)
        if (word[i] == pair.first && word[i + 1] == pair.second) word[i] = id, word.erase(word.begin() + static_cast<long>(i) + 1);
}
using Merges = std::vector<std::pair<int32_t, int32_t>>;
static Merges naive_train(const string& text, int vocab) {
    std::vector<Ids> words;
    for (const string& word : words_of(text)) {
        words.emplace_back();
        for (const char c : word) words.back().push_back(static_cast<unsigned char>(c));
    }
    Merges merges;
    while (static_cast<int>(merges.size()) < vocab - 257) {
        std::map<std::pair<int32_t, int32_t>, int> counts;
        for (const Ids& word : words)
            for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
        if (counts.empty()) break;
        auto best = counts.begin();  // the smallest pair; a later one only with a higher count
        for (auto i = counts.begin(); i != counts.end(); ++i)
            if (i->second > best->second) best = i;
        merges.push_back(best->first);
        for (Ids& word : words) merge_everywhere(word, merges.back(), static_cast<int32_t>(255 + merges.size()));
    }
    return merges;
}
static Ids naive_encode(const Merges& merges, const string& text) {
    Ids ids;
    for (const string& text_word : words_of(text)) {
        Ids word;
        for (const char c : text_word) word.push_back(static_cast<unsigned char>(c));
        for (size_t m = 0; m < merges.size(); ++m) merge_everywhere(word, merges[m], static_cast<int32_t>(256 + m));
        ids.insert(ids.end(), word.begin(), word.end());
    }
    return ids;
}

TEST(training_is_the_reference, "BPE training chooses other merges than counting anew for each would") {
    Runtime runtime;
    string few_letters, runs;
    for (int i = 0; i < 3000; ++i) few_letters += "ab"[random_below(2)];
    for (int i = 0; i < 300; ++i) runs += string(1 + random_below(40), "aab "[random_below(4)]);
    string words;
    for (int i = 0; i < 400; ++i) words += " " + string(prose).substr(random_below(300), 1 + random_below(8));
    const string texts[] = {prose, few_letters, runs, words, "aaaaaaaaaaa", "", "a", "abab abab ab", random_bytes(2000, 128)};
    for (const string& text : texts) {
        const int vocab = 400;
        const Merges merges = naive_train(text, vocab);
        Tokenizer tokenizer;
        if (!CHECK_OK(tokenizer.train(runtime, bpe(vocab), text))) continue;
        CHECK(tokenizer.vocab == static_cast<int>(257 + merges.size()));
        CHECK(tokenizer.end_of_text == tokenizer.vocab - 1);
        for (size_t m = 0; m < merges.size(); ++m) {
            const Text left = tokenizer.bytes(merges[m].first), right = tokenizer.bytes(merges[m].second),
                       whole = tokenizer.bytes(static_cast<int32_t>(256 + m));
            if (!CHECK(string(left.begin(), left.end()) + string(right.begin(), right.end()) == string(whole.begin(), whole.end()))) break;
        }
        for (const string& other : texts) CHECK(encode(tokenizer, other) == naive_encode(merges, other));
    }
}

TEST(training_from_a_corpus, "a corpus read in pieces gives another tokenizer than its text at once") {
    Runtime runtime;
    string text;
    while (text.size() < 3000000) text += string(prose).substr(random_below(200), 1 + random_below(200)) + (random_below(9) ? " " : "\n\n");
    CorpusConfig all;
    all.validation_fraction = 0;
    Corpus corpus;
    if (!CHECK_OK(corpus.open_memory(runtime, text, all))) return;
    Tokenizer whole, pieces;
    CHECK_OK(whole.train(runtime, bpe(700), text));
    CHECK_OK(pieces.train(runtime, bpe(700), corpus));
    CHECK(saved(whole) == saved(pieces));
}

TEST(round_trips, "decode(encode(x)) is not x for some bytes") {
    Runtime runtime;
    Tokenizer tokenizers[3];
    CHECK_OK(tokenizers[0].create_bytes(runtime));
    CHECK_OK(tokenizers[1].train(runtime, bpe(500), prose));
    const bool gpt2 = tokenizers[2].load(runtime, "../shared/data/tokenizers/gpt2").ok();
    for (int t = 0; t < 2 + gpt2; ++t)
        for (int i = 0; i < 400; ++i) {
            string text = random_bytes(random_below(200), random_below(2) ? 256 : 128);
            for (int k = 0; k < 5; ++k)
                text.insert(random_below(static_cast<uint32_t>(text.size() + 1)),
                            i % 2 ? "\xe2\x82\xac" : "\xc4\xb1 don't \xf0\x9f\x98\x80");
            if (!CHECK(decode(tokenizers[t], encode(tokenizers[t], text)) == text)) break;
        }
}

TEST(long_words, "a very long word is cut otherwise than a short one, or takes quadratic time") {
    Runtime runtime;
    Tokenizer tokenizer;
    CHECK_OK(tokenizer.train(runtime, bpe(600), string(prose) + string(3000, 'a')));
    const Merges merges = naive_train(string(prose) + string(3000, 'a'), 600);
    for (uint32_t size : {63u, 64u, 65u, 66u, 200u, 3000u}) {
        string word;
        for (uint32_t i = 0; i < size; ++i) word += "aeinst"[random_below(6)];
        CHECK(encode(tokenizer, word) == naive_encode(merges, word));
        CHECK(encode(tokenizer, string(size, 'a')) == naive_encode(merges, string(size, 'a')));
    }
    for (const char c : {'a', '^', ' ', 'x'}) {
        string word(1000000, c);
        if (c == 'x')
            for (char& letter : word) letter = static_cast<char>('a' + random_below(26));
        CHECK(decode(tokenizer, encode(tokenizer, word)) == word);
    }
    CHECK_OK(tokenizer.train(runtime, bpe(300), string(300000, 'a')));
    CHECK(tokenizer.vocab < 300);  // 300,000 letters a are one token after some 20 merges
    CHECK(encode(tokenizer, string(300000, 'a')).size() == 1);
}

TEST(characters, "unknown characters are lost or not counted, or the ids are not in the order of the characters") {
    Runtime runtime;
    TokenizerConfig config;
    config.kind = TokenizerKind::characters;
    Tokenizer tokenizer, again;
    CHECK_OK(tokenizer.train(runtime, config, "cab\xc4\xb1\xe2\x82\xac\xff\xf0\x9f\x98\x80 \n\"\\"));
    CHECK(tokenizer.vocab == 11 && tokenizer.unknown == 10 && tokenizer.end_of_text == -1);
    size_t unknown = 9;
    CHECK(encode(tokenizer, "\nabc\xf0\x9f\x98\x80", false, &unknown) == (Ids{0, 4, 5, 6, 9}) && unknown == 0);
    CHECK(encode(tokenizer, "az\xe2\x82\xff\xc3\xa9", false, &unknown) == (Ids{4, 10, 10, 10, 10}) && unknown == 4);
    CHECK(decode(tokenizer, {4, 10, 7}) == "a\xef\xbf\xbd\xc4\xb1");
    CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
    CHECK(saved(again) == saved(tokenizer) && again.vocab == 11 && again.unknown == 10);
    CHECK_OK(tokenizer.train(runtime, config, ""));
    CHECK(tokenizer.vocab == 2);
    CHECK(encode(tokenizer, "h\nm") == (Ids{1, 0, 1}));  // the new line stands between documents
}

TEST(names, "a tokenizer's name on the command line means something else") {
    TokenizerConfig config;
    CHECK(parse_tokenizer("byte", config).ok() && config.kind == TokenizerKind::bytes);
    CHECK(parse_tokenizer("char", config).ok() && config.kind == TokenizerKind::characters);
    CHECK(parse_tokenizer("bpe:4096", config).ok() && config.kind == TokenizerKind::bpe && config.vocab == 4096);
    CHECK(parse_tokenizer("wordpiece:99:cased", config).ok() && config.kind == TokenizerKind::wordpiece && config.vocab == 99);
    CHECK(config.cased && parse_tokenizer("wordpiece:100", config).ok() && config.vocab == 100 && !config.cased);
    CHECK(parse_tokenizer("unigram:99", config).ok() && config.kind == TokenizerKind::sentencepiece && config.vocab == 99);
    CHECK(!config.byte_fallback && parse_tokenizer("unigram:500:bytes", config).ok() && config.vocab == 500 && config.byte_fallback);
    for (const char* wrong :
         {"", "bpe", "bpe:", "bpe:256", "bpe:-1", "bpe:1e3", "bpe:300 ", "Byte", "words", "bpe:300:cased", "wordpiece:", "wordpiece::cased",
          "wordpiece:cased", "wordpiece:9:uncase", "unigram:", "unigram::bytes", "unigram:9:cased", "unigram:x"})
        CHECK(!parse_tokenizer(wrong, config).ok());
}

TEST(what_is_empty, "an empty tokenizer or an id out of range is not refused") {
    Runtime runtime;
    Tokenizer tokenizer, other;
    Array<int32_t> ids(runtime);
    Array<char> text(runtime);
    CHECK(!tokenizer.encode("a", ids).ok() && !tokenizer.save_memory(text).ok() && !other.copy(runtime, tokenizer).ok());
    CHECK(tokenizer.bytes(0).size == 0);
    CHECK_OK(tokenizer.train(runtime, bpe(300), prose));
    for (const int32_t id : {-1, tokenizer.vocab, INT32_MAX, INT32_MIN}) {
        CHECK(tokenizer.bytes(id).size == 0);
        CHECK(!tokenizer.decode(Span<const int32_t>(&id, 1), text).ok());
    }
    CHECK(tokenizer.decode(Span<const int32_t>(), text).ok() && text.size() == 0);
    CHECK(!tokenizer.train(runtime, bpe(256), prose).ok());
    CHECK(!tokenizer.train(runtime, wordpiece(0), prose).ok() && !tokenizer.train(runtime, wordpiece(-1), prose).ok());
    CHECK(tokenizer.vocab == 300);  // as it was
    CHECK_OK(other.copy(runtime, tokenizer));
    CHECK(saved(other) == saved(tokenizer) && encode(other, prose) == encode(tokenizer, prose));
}

// ---- files -----------------------------------------------------------------------------------------------------------------

// A text with the first `from` in it changed.
static string replaced(string text, const string& from, const string& to) {
    const size_t at = text.find(from);
    if (!CHECK(at != string::npos)) return text;
    return text.replace(at, from.size(), to);
}

TEST(tokenizer_json, "what is saved is not what is loaded") {
    Runtime runtime;
    Tokenizer tokenizer, again;
    CHECK_OK(tokenizer.train(runtime, bpe(600), prose));
    const string json = saved(tokenizer);
    CHECK_OK(again.load_memory(runtime, json));
    CHECK(again.vocab == tokenizer.vocab && again.end_of_text == tokenizer.end_of_text && again.kind == TokenizerKind::bpe);
    CHECK(saved(again) == json && encode(again, prose) == encode(tokenizer, prose));
    CHECK_OK(tokenizer.create_bytes(runtime));
    CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
    CHECK(again.kind == TokenizerKind::bytes && again.vocab == 256);
    CHECK_OK(again.load(runtime, "byte"));
    // The other way to write a merge.
    CHECK_OK(tokenizer.train(runtime, bpe(258), "abab"));
    CHECK_OK(again.load_memory(runtime, replaced(saved(tokenizer), "\"a b\"", "[\"a\",\"b\"]")));
    CHECK(encode(again, "ab") == (Ids{256}));
}

TEST(special_tokens, "special tokens are found where they were not allowed, or not the longest, or not the first") {
    Runtime runtime;
    Tokenizer tokenizer;
    CHECK_OK(tokenizer.train(runtime, bpe(258), "abab"));
    const string end = "\"id\":257,\"content\":\"<|endoftext|>\"", more = "\"special\":true}";
    string json = saved(tokenizer);
    json = replaced(json, more + "]",
                    more +
                        ",{\"id\":258,\"content\":\"<a\",\"special\":true},{\"id\":259,\"content\":\"<a>b\",\"special\":true},"
                        "{\"id\":260,\"content\":\"a\\u0131 \",\"special\":true}]");
    CHECK(json.find(end) != string::npos);
    CHECK_OK(tokenizer.load_memory(runtime, json));
    CHECK(tokenizer.vocab == 261 && tokenizer.end_of_text == 257);
    CHECK(encode(tokenizer, "<a<a>ab<a>b<|endoftext|><|endoftext|", true).front() == 258);
    CHECK(encode(tokenizer, "<a<a>b", true) == (Ids{258, 259}));
    CHECK(encode(tokenizer, "ab<a>aba\xc4\xb1 <|endoftext|>", true) == (Ids{256, 258, '>', 256, 260, 257}));
    CHECK(encode(tokenizer, "<a>b") == (Ids{'<', 'a', '>', 'b'}));
    CHECK(decode(tokenizer, {257, 260, 256}) == "<|endoftext|>a\xc4\xb1 ab");
    Tokenizer again;
    CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
    CHECK(saved(again) == saved(tokenizer));
}

TEST(refusals, "a tokenizer.json that would give other ids here than elsewhere is accepted, or the message does not name the reason") {
    Runtime runtime;
    Tokenizer tokenizer, again;
    CHECK_OK(tokenizer.train(runtime, bpe(260), "abab abcabc"));
    const string json = saved(tokenizer);
    const char* changes[][3] = {
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", "normalizer"},
        {"\"truncation\":null", "\"truncation\":{}", "truncation"},
        {"\"padding\":null", "\"padding\":{}", "padding"},
        {"\"type\":\"ByteLevel\"", "\"type\":\"Metaspace\"", "Metaspace"},
        {"\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space"},
        {"\"add_prefix_space\":false,", "", "add_prefix_space"},
        {"\"use_regex\":true", "\"use_regex\":false", "use_regex"},
        {"\"post_processor\":null", "\"post_processor\":{\"type\":\"BertProcessing\"}", "BertProcessing"},
        {"\"type\":\"BPE\"", "\"type\":\"Unigram\"", "Unigram"},
        {"\"dropout\":null", "\"dropout\":0.1", "dropout"},
        {"\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"", "continuing_subword_prefix"},
        {"\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix"},
        {"\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback"},
        {"\"fuse_unk\":false", "\"shiny\":false", "shiny"},
        {"\"special\":true", "\"special\":false", "<|endoftext|>"},
        {"\"lstrip\":false", "\"lstrip\":true", "lstrip"},
        {"\"a b\"", "\"a zz\"", "merge 1"},
        {"\"a b\"", "\"ab\"", "merge 1"},
        {"\"!\":33", "\"!!\":33", "byte 33"},
        {"\"!\":33", "\"!\":34", "34"},
        {"\"!\":33", "\"!\":33000000000", "33000000000"},
        {"\"!\":33", "\"\":33", "33"},
        {"\"!\":33", "\"\\u4e00\":33", "not byte-level"},
    };
    for (const auto& change : changes) {
        const Status status = again.load_memory(runtime, replaced(json, change[0], change[1]));
        if (!CHECK(!status.ok() && strstr(status.message, change[2]))) printf("    %s: %s\n", change[1], status.message);
    }
    CHECK(again.kind == TokenizerKind::none);
    CHECK_OK(again.load_memory(runtime, json));
    for (const char* wrong : {"{\"babygpt\":{\"kind\":\"characters\",\"characters\":\"ba\"}}",
                              "{\"babygpt\":{\"kind\":\"characters\",\"characters\":\"aa\"}}", "{\"babygpt\":{\"kind\":\"words\"}}",
                              "{\"babygpt\":{\"kind\":\"bytes\"},\"x\":1}", "{\"babygpt\":{}}", "{}", "[]", "", "null", "{\"babygpt\""})
        CHECK(!again.load_memory(runtime, wrong).ok());
}

// A host's memory that can run out and that counts.
struct HostMemory {
    int64_t used = 0, peak = 0, blocks = 0, calls = 0, fail_at = -1;
    static void* allocate(void* self, size_t bytes, size_t) {
        HostMemory& m = *static_cast<HostMemory*>(self);
        if (m.calls++ == m.fail_at) return nullptr;
        m.used += static_cast<int64_t>(bytes), ++m.blocks;
        if (m.used > m.peak) m.peak = m.used;
        return malloc(bytes);
    }
    static void release(void* self, void* memory, size_t bytes) {
        HostMemory& m = *static_cast<HostMemory*>(self);
        m.used -= static_cast<int64_t>(bytes), --m.blocks;
        free(memory);
    }
    void lend(Runtime& runtime) {
        runtime.memory_user = this;
        runtime.allocate = allocate;
        runtime.release = release;
    }
};

// One to three times: something goes, comes, changes, or stands there twice.
static string mutated(string file) {
    const char interesting[] = "\"{}[],:\\0129-ue\x80\xff ";
    for (uint32_t k = 1 + random_below(3); k > 0; --k) {
        const size_t at = random_below(static_cast<uint32_t>(file.size()));
        const uint32_t how = random_below(4);
        if (how == 0) file.erase(at, 1 + random_below(4));
        else if (how == 1) file.insert(at, 1, interesting[random_below(sizeof interesting - 1)]);
        else if (how == 2) file[at] = static_cast<char>(random_below(256));
        else file.insert(at, file.substr(random_below(static_cast<uint32_t>(file.size())), 20));
        if (file.empty()) file = "{";
    }
    return file;
}

TEST(damage, "a damaged tokenizer.json crashes, leaks, or takes much more memory than its size") {
    HostMemory memory;
    Runtime runtime;
    memory.lend(runtime);
    string files[2];
    {
        Tokenizer tokenizer;
        CHECK_OK(tokenizer.train(runtime, bpe(300), prose));
        files[0] = saved(tokenizer);
        TokenizerConfig config;
        config.kind = TokenizerKind::characters;
        CHECK_OK(tokenizer.train(runtime, config, prose));
        files[1] = saved(tokenizer);
    }
    const auto load = [&](const string& file) {
        memory.peak = 0;
        Tokenizer tokenizer;
        const Status status = tokenizer.load_memory(runtime, file);
        CHECK(status.ok() || status.message[0]);
        CHECK(memory.peak < static_cast<int64_t>(100 * file.size() + 200000));
        if (status.ok() && tokenizer.kind == TokenizerKind::bpe) CHECK(decode(tokenizer, encode(tokenizer, prose, true)) == prose);
        return status.ok();
    };
    for (const string& file : files) {
        for (size_t n = 0; n + 2 < file.size(); ++n)
            if (!CHECK(!load(file.substr(0, n)))) break;
        for (int i = 0; i < 20000; ++i) load(mutated(file));
    }
    CHECK(memory.used == 0 && memory.blocks == 0);
}

TEST(out_of_memory, "an allocation that fails is not reported, or leaks") {
    HostMemory memory;
    Runtime runtime;
    memory.lend(runtime);
    TokenizerConfig characters;
    characters.kind = TokenizerKind::characters;
    const string text = string(prose) + string(200, 'a') + string(5000, '.');
    for (int what = 0; what < 4; ++what) {
        bool done = false;
        for (int64_t n = 0; !done && n < 10000; ++n) {
            memory.calls = 0;
            memory.fail_at = n;
            {
                Tokenizer tokenizer, copied, loaded;
                Array<int32_t> ids(runtime);
                Array<char> back(runtime), json(runtime);
                const auto step = [&](Status status) {
                    if (!CHECK(status.ok() || status.error == Error::out_of_memory))
                        printf("    allocation %d: %s\n", static_cast<int>(n), status.message);
                    return status.ok();
                };
                done = step(tokenizer.train(runtime,
                                            what == 3   ? unigram(100)
                                            : what == 2 ? wordpiece(150)
                                            : what      ? characters
                                                        : bpe(350),
                                            text)) &&
                       step(copied.copy(runtime, tokenizer)) && step(copied.encode(text, ids, true)) &&
                       step(copied.decode(Span<const int32_t>(ids.begin(), ids.size()), back)) && step(copied.save_memory(json)) &&
                       step(loaded.load_memory(runtime, json)) && memory.calls <= n;
                if (done && what != 2) CHECK(string(back.begin(), back.end()) == text);
            }
            if (!CHECK(memory.used == 0 && memory.blocks == 0)) return;
        }
        CHECK(done);
    }
}

// ---- whole characters from pieces ---------------------------------------------------------------------------------------

TEST(streams, "a character is cut in two on its way to the terminal, or a byte is lost") {
    const string alphabet[] = {"a",       "\n",       "\xc4\xb1",     "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xff",
                               "\xc3",    "\xe2\x82", "\xf0\x9f\x98", "\x80",         "\xed\xa0\x80",     "\xf5",
                               "\xc0\xaf"};
    for (int i = 0; i < 3000; ++i) {
        string text, out;
        std::vector<size_t> starts;  // of characters that stand whole in the text
        for (int k = 0; k < 12; ++k) {
            const string& piece = alphabet[random_below(sizeof alphabet / sizeof *alphabet)];
            starts.push_back(text.size());
            text += piece;
        }
        Utf8Stream stream;
        std::vector<size_t> cuts;
        for (size_t at = 0; at < text.size();) {
            const size_t n = random_below(4);
            const string piece = text.substr(at, n);
            at += piece.size();
            char buffer[16];
            const size_t written = stream.push(piece, buffer);
            CHECK(written <= piece.size() + 3);
            out.append(buffer, written);
            cuts.push_back(out.size());
            CHECK(at - out.size() <= 3);
        }
        char buffer[4];
        const size_t left = stream.finish(buffer);
        CHECK(left <= 3);
        out.append(buffer, left);
        CHECK(out == text);
        // No cut stands inside one of the valid characters.
        for (size_t k = 0; k < starts.size(); ++k) {
            const size_t start = starts[k], end = k + 1 < starts.size() ? starts[k + 1] : text.size();
            const string piece = text.substr(start, end - start);
            if (piece == "\xc4\xb1" || piece == "\xe2\x82\xac" || piece == "\xf0\x9f\x98\x80")
                for (const size_t cut : cuts) CHECK(cut <= start || cut >= end);
        }
    }
}

// ---- GPT-2 -----------------------------------------------------------------------------------------------------------------

// llama.cpp's inputs and ids.
static void check_llamacpp(const Tokenizer& tokenizer, const char* vocabulary) {
    const string path = string("tokenizers/llamacpp/ggml-vocab-") + vocabulary + ".gguf";
    const string inputs = read_shared((path + ".inp").c_str()), outputs = read_shared((path + ".out").c_str());
    const string between = "\n__ggml_vocab_test__\n";
    int vectors = 0;
    for (size_t in = 0, out = 0; out < outputs.size(); ++vectors) {
        const size_t in_end = inputs.find(between, in), out_end = outputs.find('\n', out);
        if (!CHECK(out_end != string::npos)) break;
        string found;
        for (const int32_t id : encode(tokenizer, inputs.substr(in, in_end - in))) found += " " + std::to_string(id);
        string wanted = outputs.substr(out, out_end - out);
        if (!CHECK(found == wanted)) printf("    vector %d: %s, but %s\n", vectors, found.c_str(), wanted.c_str());
        in = in_end + between.size(), out = out_end + 1;
    }
    CHECK(vectors >= 40);
}

TEST(gpt2_ids, "GPT-2's tokenizer gives other ids than those that others have published") {
    Runtime runtime;
    Tokenizer tokenizer, ranks;
    if (read_shared("tokenizers/gpt2/vocab.bpe").empty()) SKIP("../shared/data/tokenizers/gpt2 is absent");
    if (!CHECK_OK(tokenizer.load(runtime, "../shared/data/tokenizers/gpt2"))) return;
    CHECK(tokenizer.vocab == 50257 && tokenizer.end_of_text == 50256);
    CHECK_OK(ranks.load(runtime, "../shared/data/tokenizers/gpt2/r50k_base.tiktoken"));
    CHECK(saved(ranks) == saved(tokenizer));
    CHECK(encode(tokenizer, "hello <|endoftext|>", true) == (Ids{31373, 220, 50256}));
    CHECK(encode(tokenizer, "hello <|endoftext|>") == (Ids{31373, 1279, 91, 437, 1659, 5239, 91, 29}));

    check_llamacpp(tokenizer, "gpt-2");
    CHECK_OK(ranks.load(runtime, "../shared/data/tokenizers/llamacpp/ggml-vocab-gpt-2.gguf"));
    CHECK(saved(ranks) == saved(tokenizer));

    const string facts = read_shared("tokenizers/vectors/known_vectors.jsonl");
    int known = 0;
    for (size_t at = 0; at < facts.size();) {
        const size_t end = facts.find('\n', at);
        const string line = facts.substr(at, end - at);
        at = end == string::npos ? facts.size() : end + 1;
        const size_t text = line.find("\"text\":\""), text_end = line.find("\",\"ids\":[");
        if (line.find("\"tokenizer\":\"gpt2\"") == string::npos || text == string::npos || text_end == string::npos) continue;
        // Enough of JSON's escapes for these facts.
        string unescaped;
        for (size_t i = text + 8; i < text_end; ++i)
            unescaped += line[i] != '\\' ? line[i] : line[++i] == 'n' ? '\n' : line[i] == 't' ? '\t' : line[i];
        string found;
        for (const int32_t id : encode(tokenizer, unescaped, line.find("\"special\":true") != string::npos))
            found += (found.empty() ? "" : ",") + std::to_string(id);
        const size_t ids = text_end + 9;
        if (!CHECK(found == line.substr(ids, line.find(']', ids) - ids))) printf("    %s\n", line.c_str());
        ++known;
    }
    CHECK(known >= 10);
}

// GPT-2's three files in memory, behind the hooks.
struct GptFiles {
    string files[3];  // r50k_base.tiktoken, vocab.bpe, encoder.json
    static const char* name(int i) { return i == 0 ? "r50k_base.tiktoken" : i == 1 ? "vocab.bpe" : "encoder.json"; }
    void lend(Runtime& runtime) {
        runtime.files.user = this;
        runtime.files.open = [](void* self, const char* path, FileMode) -> void* {
            for (int i = 0; i < 3; ++i)
                if (strstr(path, i == 0 ? ".tiktoken" : name(i))) return &static_cast<GptFiles*>(self)->files[i];
            return nullptr;
        };
        runtime.files.size = [](void*, void* file) { return static_cast<int64_t>(static_cast<string*>(file)->size()); };
        runtime.files.read = [](void*, void* file, int64_t at, void* to, int64_t bytes) {
            const string& text = *static_cast<string*>(file);
            if (static_cast<size_t>(at) >= text.size()) return int64_t(0);
            return static_cast<int64_t>(text.copy(static_cast<char*>(to), static_cast<size_t>(bytes), static_cast<size_t>(at)));
        };
        runtime.files.close = [](void*, void*) { return 0; };
    }
    // Whether the tokenizer with file f as it is now can be loaded; it then must work.
    bool load(Runtime& runtime, int f) const {
        Tokenizer tokenizer;
        const Status status = tokenizer.load(runtime, f == 0 ? "x.tiktoken" : "folder");
        CHECK(status.ok() || status.message[0]);
        if (status.ok()) CHECK(decode(tokenizer, encode(tokenizer, prose)) == prose);
        return status.ok();
    }
};

static string base64(Text bytes) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    string text;
    for (size_t i = 0; i < bytes.size; i += 3) {
        uint32_t three = 0;
        for (size_t k = 0; k < 3; ++k) three = three << 8 | (i + k < bytes.size ? static_cast<unsigned char>(bytes[i + k]) : 0u);
        for (size_t k = 0; k < 4; ++k) text += i + k > bytes.size ? '=' : digits[three >> (18 - 6 * k) & 63];
    }
    return text;
}

TEST(small_gpt2_damage, "a damaged vocab.bpe, encoder.json or .tiktoken file crashes, leaks, or takes much more memory than its size") {
    HostMemory memory;
    Runtime runtime;
    memory.lend(runtime);
    GptFiles disk;
    disk.lend(runtime);
    {  // the same small tokenizer in each form
        Tokenizer tokenizer, from_ranks, from_merges;
        CHECK_OK(tokenizer.train(runtime, bpe(300), prose));
        for (int32_t id = 0; id < tokenizer.end_of_text; ++id)
            disk.files[0] += base64(tokenizer.bytes(id)) + " " + std::to_string(id) + "\n";
        const string json = saved(tokenizer);
        const size_t vocab = json.find("\"vocab\":{"), merges = json.find("\"merges\":[");
        if (!CHECK(vocab != string::npos && merges != string::npos)) return;
        disk.files[2] = json.substr(vocab + 8, json.find("},", vocab) + 1 - vocab - 8);
        disk.files[1] = "#version: 0.2\n";
        for (size_t at = merges + 10, end; json[at] != ']'; at = end + 1) {
            const size_t start = json.find('"', at) + 1;
            end = json.find('"', start);
            disk.files[1] += json.substr(start, end - start) + "\n";
        }
        CHECK_OK(from_ranks.load(runtime, "x.tiktoken"));
        CHECK_OK(from_merges.load(runtime, "folder"));
        CHECK(saved(from_ranks) == json && saved(from_merges) == json);
    }
    for (int f = 0; f < 3; ++f) {
        const string whole = disk.files[f];
        memory.peak = 0;
        for (size_t n = 0; n <= whole.size(); ++n) disk.files[f] = whole.substr(0, n), disk.load(runtime, f);
        for (int i = 0; i < 1000 * thoroughness(); ++i) disk.files[f] = mutated(whole), disk.load(runtime, f);
        CHECK(memory.peak < static_cast<int64_t>(100 * whole.size() + 200000));
        disk.files[f] = whole;
        CHECK(disk.load(runtime, f));
    }
    CHECK(memory.used == 0 && memory.blocks == 0);
}

TEST(large_gpt2_damage, "a damaged vocab.bpe, encoder.json or .tiktoken file of GPT-2's crashes") {
    if (read_shared("tokenizers/gpt2/vocab.bpe").empty()) SKIP("../shared/data/tokenizers/gpt2 is absent");
    Runtime runtime;
    GptFiles disk;
    disk.lend(runtime);
    for (int i = 0; i < 3; ++i) disk.files[i] = read_shared((string("tokenizers/gpt2/") + GptFiles::name(i)).c_str());
    for (int f = 0; f < 3; ++f) {
        const string whole = disk.files[f];
        for (int i = 0; i < 12 * thoroughness(); ++i) {
            disk.files[f] = whole.substr(0, i % 6 == 5 ? whole.size() : random_below(static_cast<uint32_t>(whole.size())));
            for (int k = 0; k < (i % 6 + 1) / 3; ++k)  // not every cut
                disk.files[f][random_below(static_cast<uint32_t>(disk.files[f].size()))] = static_cast<char>(random_below(256));
            disk.load(runtime, f);
        }
        disk.files[f] = whole;
    }
}

// ---- WordPiece and SentencePiece ------------------------------------------------------------------------------------------

static const char wordpiece_json[] =
    "{\"added_tokens\":[{\"id\":0,\"content\":\"[UNK]\",\"special\":true}],\"normalizer\":{\"type\":\"BertNormalizer\",\"clean_text\":true,"
    "\"handle_chinese_chars\":true,\"strip_accents\":null,\"lowercase\":true},\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"},"
    "\"decoder\":{\"type\":\"WordPiece\",\"prefix\":\"##\",\"cleanup\":true},\"post_processor\":null,\"model\":{\"type\":\"WordPiece\","
    "\"unk_token\":\"[UNK]\",\"continuing_subword_prefix\":\"##\",\"max_input_chars_per_word\":100,\"vocab\":{\"[UNK]\":0,\"i\":1,\"g\":2,"
    "\"s\":3,\"\\u0131\":4,\"a\":5,\"##a\":6,\"##ab\":7,\".\":8,\"\\u4e2d\":9,\"\\u0130\":10,\"##\\u011f\":11}}}";

TEST(wordpiece, "BERT's words are cut, cleaned or made small in another way, or a word is unknown that is none") {
    Runtime runtime;
    Tokenizer small, cased, again;
    if (!CHECK_OK(small.load_memory(runtime, wordpiece_json))) return;
    CHECK(small.kind == TokenizerKind::wordpiece && small.vocab == 12 && small.unknown == 0);
    size_t unknown = 9;
    // The Turkish letters: capital dotted I and I give i, the dotless one stays, the accents of g and s go.
    CHECK(encode(small, "\xc4\xb0 I \xc4\xb1 \xc4\x9e \xc4\x9f \xc5\x9e \xc5\x9f", false, &unknown) == (Ids{1, 1, 4, 2, 2, 3, 3}) &&
          unknown == 0);
    CHECK(encode(small,
                 "aab.\xe4\xb8\xad"
                 "a\t\x01zz\xff",
                 false, &unknown) == (Ids{5, 7, 8, 9, 5, 0}) &&
          unknown == 2);
    CHECK(encode(small, string(100, 'a')).size() == 100 && encode(small, string(101, 'a')) == (Ids{0}));
    CHECK(decode(small, {5, 7, 8, 9, 0, 5}) == "aab. \xe4\xb8\xad [UNK] a" && decode(small, {6, 6}) == "##aa");
    CHECK_OK(again.load_memory(runtime, saved(small)));
    CHECK(saved(again) == saved(small));
    CHECK_OK(cased.load_memory(runtime, replaced(wordpiece_json, "\"lowercase\":true", "\"lowercase\":false")));
    CHECK(encode(cased, "\xc4\xb0 I a\xc4\x9f") == (Ids{10, 0, 5, 11}));
    for (const char* change : {"BertNormalizer", "BertPreTokenizer", "clean_text\":true", "##\",\"max", "100", "WordPiece\",\"unk"}) {
        const Status status = again.load_memory(runtime, replaced(wordpiece_json, change, "7"));
        CHECK(!status.ok() && status.message[0]);
    }
}

// WordPiece again, for ASCII, with everything counted anew for each merge. Symbols are texts as in vocab.txt.
struct NaiveWordPiece {
    std::vector<string> vocab = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
    bool cased;
    NaiveWordPiece(const string& text, size_t size, bool with_capitals) : cased(with_capitals) {
        std::vector<std::vector<string>> words;
        std::map<string, int> begin, go_on;
        for (const string& word : words_of_bert(text)) {
            if (word.size() > 100) continue;
            words.emplace_back();
            for (const char c : word) words.back().push_back((words.back().empty() ? "" : "##") + string(1, c));
            for (const char c : word) begin[string(1, c)];
            for (const char c : word.substr(1)) go_on["##" + string(1, c)];
        }
        for (const auto& c : begin) vocab.push_back(c.first);
        for (const auto& c : go_on) vocab.push_back(c.first);
        std::map<string, size_t> ids;
        for (size_t i = 0; i < vocab.size(); ++i) ids[vocab[i]] = i;
        while (vocab.size() < size) {
            std::map<std::pair<size_t, size_t>, int> counts;
            for (const auto& word : words)
                for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{ids[word[i]], ids[word[i + 1]]}];
            if (counts.empty()) break;
            auto best = counts.begin();
            for (auto i = counts.begin(); i != counts.end(); ++i)
                if (i->second > best->second) best = i;
            const string left = vocab[best->first.first], right = vocab[best->first.second], both = left + right.substr(2);
            ids[both] = vocab.size();
            vocab.push_back(both);
            for (auto& word : words)
                for (size_t i = 0; i + 1 < word.size(); ++i)
                    if (word[i] == left && word[i + 1] == right) word[i] = both, word.erase(word.begin() + static_cast<long>(i) + 1);
        }
    }
    std::vector<string> words_of_bert(const string& text) const {
        std::vector<string> words;
        bool inside = false;
        for (const char given : text) {
            const char c = cased || given < 'A' || given > 'Z' ? given : static_cast<char>(given + 32);
            const bool blank = c == ' ' || (c >= '\t' && c <= '\r'), removed = (c < ' ' && !blank) || c == '\v' || c == '\f' || c == 127;
            const bool sign = !removed && !blank && !((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'));
            if (removed) continue;
            if (!blank && (sign || !inside)) words.emplace_back();
            if (!blank) words.back() += c;
            inside = !blank && !sign;
        }
        return words;
    }
    Ids encode(const string& text) const {
        Ids ids;
        for (const string& word : words_of_bert(text)) {
            Ids found;
            if (word.size() > 100) found = {1};
            for (size_t at = 0; at < word.size() && word.size() <= 100;) {
                size_t best = 0, longest = 0;
                for (size_t i = 5; i < vocab.size(); ++i) {
                    const bool goes_on = vocab[i].size() > 2 && vocab[i].compare(0, 2, "##") == 0;
                    const string letters = goes_on ? vocab[i].substr(2) : vocab[i];
                    if (goes_on == (at > 0) && letters.size() > longest && word.compare(at, letters.size(), letters) == 0)
                        best = i, longest = letters.size();
                }
                found.push_back(static_cast<int32_t>(best));
                at += longest;
                if (longest == 0) {
                    found = {1};
                    break;
                }
            }
            ids.insert(ids.end(), found.begin(), found.end());
        }
        return ids;
    }
};

TEST(wordpiece_training, "WordPiece learns other merges than counting anew for each would, or gives them other ids") {
    Runtime runtime;
    string few_letters, runs;
    for (int i = 0; i < 2000; ++i) few_letters += "abA "[random_below(4)];
    for (int i = 0; i < 200; ++i) runs += string(1 + random_below(40), "aab "[random_below(4)]);
    const string texts[] = {prose, few_letters, runs, "", "a", "aaaaaaa", "ab-ab-ab", random_bytes(1500, 128)};
    for (const bool cased : {false, true})
        for (const string& text : texts) {
            const NaiveWordPiece naive(text, 220, cased);
            Tokenizer tokenizer, again;
            if (!CHECK_OK(tokenizer.train(runtime, wordpiece(220, cased), text))) continue;
            if (!CHECK(tokenizer.vocab == static_cast<int>(naive.vocab.size()))) continue;
            CHECK(tokenizer.unknown == 1 && tokenizer.end_of_text == 3);
            const string json = saved(tokenizer);
            for (size_t i = 0; i < naive.vocab.size(); ++i) {
                const string& name = naive.vocab[i];
                const string escaped = name == "\"" || name == "\\" ? "\\" + name : name;
                if (!CHECK(json.find("\n\"" + escaped + "\":" + std::to_string(i)) != string::npos)) printf("    %s\n", name.c_str());
            }
            for (const string& other : texts) CHECK(encode(tokenizer, other) == naive.encode(other));
            CHECK_OK(again.load_memory(runtime, json));
            CHECK(saved(again) == json && encode(again, text) == encode(tokenizer, text));
        }
    Tokenizer tokenizer;
    const Status status = tokenizer.train(runtime, wordpiece(9), "abc ca");  // a b c, ##a ##b ##c, and 5
    CHECK(status.error == Error::invalid_argument && strstr(status.message, "need 11"));
    CHECK_OK(tokenizer.train(runtime, wordpiece(11), "abc ca"));
    // A word of more than 100 characters is never cut, and so not learnt from.
    CHECK_OK(tokenizer.train(runtime, wordpiece(100), string(101, 'z') + " a"));
    CHECK(tokenizer.vocab == 6);
    string text;
    while (text.size() < 2500000) text += string(prose).substr(random_below(200), 1 + random_below(200)) + (random_below(9) ? " " : "\n\n");
    CorpusConfig all;
    all.validation_fraction = 0;
    Corpus corpus;
    if (!CHECK_OK(corpus.open_memory(runtime, text, all))) return;
    Tokenizer whole, pieces;
    CHECK_OK(whole.train(runtime, wordpiece(500), text));
    CHECK_OK(pieces.train(runtime, wordpiece(500), corpus));
    CHECK(saved(whole) == saved(pieces));
}

TEST(turkish_letters, "WordPiece that was trained uncased keeps a dot or an accent that it should not, or cased loses one") {
    Runtime runtime;
    Tokenizer tokenizer;
    // ISTANBUL with a dotted capital, ILIK without dots, dotless small letters, soft g, s and c with cedillas, o and u with dots.
    const string text =
        "\xc4\xb0STANBUL ISPARTA \xc4\xb1l\xc4\xb1k ILIK \xc4\x9f\xc4\x9e \xc5\x9f\xc5\x9e \xc3\xa7\xc3\x87 \xc3\xb6\xc3\x96 "
        "\xc3\xbc\xc3\x9c";
    const auto back = [&](const string& some) { return decode(tokenizer, encode(tokenizer, some)); };
    CHECK_OK(tokenizer.train(runtime, wordpiece(200), text));
    CHECK(back(text) == "istanbul isparta \xc4\xb1l\xc4\xb1k ilik gg ss cc oo uu");
    CHECK(encode(tokenizer, "\xc4\xb0 I i i\xcc\x87") == Ids(4, encode(tokenizer, "i")[0]));
    CHECK(encode(tokenizer, "\xc4\xb1") != encode(tokenizer, "i"));  // the dotless small i is no capital's small letter
    CHECK_OK(tokenizer.train(runtime, wordpiece(200, true), text));
    CHECK(back(text) == text);
}

// A SentencePiece model by hand: pieces of (text, score, kind), then the settings.
static string field_of(int number, const string& bytes) {
    string field(1, static_cast<char>(number < 16 ? number * 8 + 2 : (number * 8 + 2) % 128 + 128));
    if (number >= 16) field += static_cast<char>(number / 16);
    for (size_t size = bytes.size();; size >>= 7) {
        field += static_cast<char>(size >= 128 ? (size & 127) | 128 : size);
        if (size < 128) return field + bytes;
    }
}
static string piece_of(const string& text, float score, char kind = 1) {
    string bytes = field_of(1, text) + '\x15';
    bytes.append(reinterpret_cast<const char*>(&score), 4);
    return field_of(1, bytes + '\x18' + kind);
}
static string small_model(bool unigram, const string& normalizer = "\x18\x01\x20\x01\x28\x01") {
    const struct {
        const char* text;
        float score;
        char kind;
    } pieces[] = {{"<unk>", 0, 2},
                  {"<s>", 0, 3},
                  {"</s>", 0, 3},
                  {"\xe2\x96\x81"
                   "a",
                   -1, 1},
                  {"a", -2, 1},
                  {"b", -2.5f, 1},
                  {"ab", -3, 1},
                  {"\xe2\x96\x81", -2, 1},
                  {"user", 0, 4},
                  {"\xe2\x96\x81"
                   "ab",
                   -5, 5}};
    string model;
    for (const auto& piece : pieces) model += piece_of(piece.text, piece.score, piece.kind);
    return model + field_of(2, string("\x18") + (unigram ? '\x01' : '\x02')) + field_of(3, normalizer);
}
// The only file that there is; what is written takes its place.
struct OneFile {
    string text, written;
    explicit OneFile(Runtime& runtime) {
        runtime.files.user = this;
        runtime.files.open = [](void* self, const char*, FileMode) { return self; };
        runtime.files.size = [](void*, void* file) { return static_cast<int64_t>(static_cast<OneFile*>(file)->text.size()); };
        runtime.files.read = [](void*, void* file, int64_t at, void* to, int64_t bytes) {
            const string& from = static_cast<OneFile*>(file)->text;
            if (static_cast<size_t>(at) >= from.size()) return int64_t(0);
            return static_cast<int64_t>(from.copy(static_cast<char*>(to), static_cast<size_t>(bytes), static_cast<size_t>(at)));
        };
        runtime.files.close = [](void*, void*) { return 0; };
        runtime.files.write = [](void*, void* file, const void* from, int64_t bytes) {
            static_cast<OneFile*>(file)->written.append(static_cast<const char*>(from), static_cast<size_t>(bytes));
            return bytes;
        };
        runtime.files.sync = [](void*, void*) { return 0; };
        runtime.files.rename = [](void* self, const char*, const char*) {
            static_cast<OneFile*>(self)->text.swap(static_cast<OneFile*>(self)->written);
            return static_cast<OneFile*>(self)->written.clear(), 0;
        };
        runtime.files.remove = [](void*, const char*) { return 0; };
        runtime.files.sync_folder = [](void*, const char*) { return 0; };
    }
};

TEST(sentencepiece, "a SentencePiece model cuts, joins or keeps blanks in another way than it says") {
    Runtime runtime;
    OneFile file(runtime);
    for (const bool unigram : {true, false}) {
        Tokenizer tokenizer, again;
        file.text = small_model(unigram);
        if (!CHECK_OK(tokenizer.load(runtime, "small.model"))) return;
        CHECK(tokenizer.vocab == 10 && tokenizer.unknown == 0 && tokenizer.end_of_text == 2);
        size_t unknown = 0;
        CHECK(encode(tokenizer, " ab  userzz a ", false, &unknown) == (unigram ? Ids{3, 5, 7, 8, 0, 3} : Ids{3, 5, 7, 8, 0, 3}) &&
              unknown == 2);
        CHECK(encode(tokenizer, "a</s>", true) == (Ids{3, 2}) && encode(tokenizer, "") == Ids() && encode(tokenizer, "  ") == Ids());
        CHECK(decode(tokenizer, {1, 3, 5, 7, 8, 0, 2}) == "ab user \xe2\x81\x87 ");
        CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
        CHECK(saved(again) == saved(tokenizer) && encode(again, "a ab b user") == encode(tokenizer, "a ab b user"));
        file.text = small_model(unigram) + field_of(2, "\xfa\x02\x03<s>");  // eos_piece
        CHECK_OK(tokenizer.load(runtime, "small.model"));
        CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
        CHECK(tokenizer.end_of_text == 1 && again.end_of_text == 1);
        file.text = small_model(unigram, string("\x18\x00\x20\x00\x28\x01", 6));
        CHECK_OK(tokenizer.load(runtime, "small.model"));
        CHECK(encode(tokenizer, "b  b") == (Ids{5, 7, 7, 5}) && decode(tokenizer, {7, 5}) == " b");
        CHECK(decode(tokenizer, encode(tokenizer, string(100000, 'a'))) == string(100000, 'a'));
    }
    Tokenizer tokenizer;
    // A charsmap whose only letter comes after itself: without end, looking it up would take a minute.
    string circle("\0\x08\0\0\0\0\x04\0", 8);
    circle.resize(4 + 2048 + 2);
    circle.replace(4 + 4 * 0x161, 4, string("\x61\x84\x01\0", 4));
    file.text = small_model(true, field_of(2, circle));
    CHECK_OK(tokenizer.load(runtime, "small.model"));
    CHECK(encode(tokenizer, string(100000, 'a')).size() == 100000);
    file.text = replaced(small_model(true), "\x12\x02\x18\x01", "\x12\x02\x18\x04");
    Status status = tokenizer.load(runtime, "small.model");
    CHECK(status.error == Error::unsupported && strstr(status.message, "CHAR"));
    file.text = "[UNK]\na\n##b\n";
    status = tokenizer.load(runtime, "vocab.txt");
    CHECK(status.error == Error::unsupported && strstr(status.message, "uncased"));
    CHECK_OK(tokenizer.load(runtime, "vocab.txt:uncased"));
    CHECK(encode(tokenizer, "Ab") == (Ids{1, 2}));
    CHECK_OK(tokenizer.load(runtime, "vocab.txt:cased"));
    CHECK(encode(tokenizer, "Ab ab") == (Ids{0, 1, 2}));
}

// As T5's tokenizer.json has it, but for the charsmap.
static const char unigram_json[] =
    "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[{\"id\":0,\"content\":\"<pad>\",\"special\":true},"
    "{\"id\":1,\"content\":\"</s>\",\"special\":true},{\"id\":9,\"content\":\"<mask>\",\"lstrip\":true,\"special\":true}],"
    "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\",\"strip_left\":false,\"strip_right\":true},"
    "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\"\\u2581\"}]},"
    "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"always\",\"split\":true},"
    "\"post_processor\":{\"type\":\"TemplateProcessing\"},"
    "\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"add_prefix_space\":true},"
    "\"model\":{\"type\":\"Unigram\",\"unk_id\":2,\"byte_fallback\":false,\"vocab\":[[\"<pad>\",0.0],[\"</s>\",0],[\"<unk>\",0],"
    "[\"\\u2581\",-2.5],[\"a\",-2],[\"\\u2581a\",-2.25e0],[\"b\",-3],[\"ab\",-3.5],[\"\\u0131\",-4]]}}";

TEST(unigram_json_files, "a tokenizer.json of type Unigram cuts or joins in another way than it says, or is not written as it was read") {
    Runtime runtime;
    OneFile file(runtime);
    Tokenizer tokenizer, again;
    if (!CHECK_OK(tokenizer.load_memory(runtime, unigram_json))) return;
    CHECK(tokenizer.kind == TokenizerKind::sentencepiece && tokenizer.vocab == 10 && tokenizer.unknown == 2 && tokenizer.end_of_text == 1);
    CHECK(encode(tokenizer, "  ab  a\xc4\xb1zz b ") == (Ids{5, 6, 5, 8, 2, 3, 6}));
    CHECK(encode(tokenizer, "a <mask> b</s>", true) == (Ids{5, 9, 3, 6, 1}) && encode(tokenizer, "</s>").size() > 1);
    CHECK(decode(tokenizer, {5, 6, 5, 8, 1}) == "ab a\xc4\xb1");
    // Files by us: with blanks kept and not, with and without bytes, with a charsmap.
    const auto round = [&](Tokenizer& some) {
        CHECK_OK(some.save("x.json"));
        CHECK(file.text.find("\"type\":\"Unigram\"") != string::npos);
        if (!CHECK_OK(again.load(runtime, "x.json"))) return;
        const string text = string(prose) + " \xc4\xb1 \xe4\xb8\xad";
        CHECK(again.vocab == some.vocab && encode(again, text) == encode(some, text) && encode(again, "  a ") == encode(some, "  a "));
        CHECK(decode(again, encode(again, text)) == decode(some, encode(some, text)));
    };
    round(tokenizer);
    for (const bool bytes : {false, true}) {
        CHECK_OK(tokenizer.train(runtime, unigram(400, bytes), prose));
        round(tokenizer);
        CHECK(saved(again) == saved(tokenizer));  // what --resume --tokenizer x.json compares
    }
    string map("\x20\0\0\0", 4);
    for (int i = 0; i < 8; ++i) map += string("\x61\x05\0\0", 4);
    file.text = small_model(true, field_of(2, map + string("b\0", 2)) + string("\x18\x01\x20\x01\x28\x01"));
    CHECK_OK(tokenizer.load(runtime, "small.model"));  // with a user-defined and an unused piece, which only a .model has
    CHECK_OK(tokenizer.save("x.json"));
    CHECK(file.text.find("babygpt") != string::npos && again.load(runtime, "x.json").ok());
    // Hugging Face's form does not say what ends a text, nor how an unknown piece looks: then it is ours.
    const string few = piece_of("<unk>", 0, 2) + piece_of("[SEP]", 0, 3) + piece_of("\xe2\x96\x81", -1) + piece_of("x", -2);
    for (const string& settings : {string(), field_of(44, "<?>"), field_of(47, "[SEP]")}) {
        file.text = few + field_of(2, "\x18\x01" + settings);
        CHECK_OK(tokenizer.load(runtime, "small.model"));
        CHECK_OK(tokenizer.save("x.json"));
        CHECK((file.text.find("babygpt") == string::npos) == settings.empty());
        CHECK_OK(again.load(runtime, "x.json"));
        CHECK(again.end_of_text == tokenizer.end_of_text && decode(again, {0}) == decode(tokenizer, {0}));
    }
    // The name of a special token may have a blank in it.
    CHECK_OK(again.load_memory(runtime, replaced(unigram_json, "<mask>", "<a mask>")));
    CHECK(decode(again, {6}) == "b" && again.bytes(9).size == 8 && memcmp(again.bytes(9).data, "<a mask>", 8) == 0);
    CHECK(encode(again, "a <a mask> b", true) == (Ids{5, 9, 3, 6}));
    const char* changes[][3] = {
        {"\"Strip\"", "\"NFKC\"", "NFKC"},
        {" {2,}", " {3,}", "Replace of ' {3,}'"},
        {"{\"type\":\"Strip\",\"strip_left\":false,\"strip_right\":true},", "", "Strip"},
        {"\"strip_left\":false", "\"strip_left\":true", "Strip"},
        {"\"Metaspace\"", "\"Whitespace\"", "Whitespace"},
        {"\"Metaspace\"", "\"WhitespaceSplit\"", "Metaspace"},
        {"\"prepend_scheme\":\"always\"", "\"prepend_scheme\":\"first\"", "first"},
        {"\"replacement\":\"\\u2581\"", "\"replacement\":\"_\"", "U+2581"},
        {"\"split\"", "\"shiny\"", "shiny"},
        {"\"decoder\":{\"type\":\"Metaspace\"", "\"decoder\":{\"type\":\"BPEDecoder\"", "BPEDecoder"},
        {"\"unk_id\":2", "\"unk_id\":null", "unk_id"},
        {"\"unk_id\":2", "\"unk_id\":9", "unk_id 9"},
        {"\"byte_fallback\":false", "\"byte_fallback\":true", "byte 0"},
        {"\"byte_fallback\"", "\"alpha\"", "alpha"},
        {"-2.25e0", "-1e999", "not finite"},
        {"[\"b\",-3]", "[\"b\"]", "a piece and its score"},
        {"[\"b\",-3]", "[\"a\",-3]", "tokens 4 and 6"},
        {"[\"b\",-3]", "[\"b c\",-3]", "piece 6 has a blank"},
        {"\"id\":9", "\"id\":10", "10"},
        {"\"id\":1,\"content\":\"</s>\"", "\"id\":1,\"content\":\"<s>\"", "</s>"},
        {"\"<mask>\",\"lstrip\":true,\"special\":true", "\"<mask>\",\"lstrip\":true,\"special\":false", "<mask>"},
    };
    for (const auto& change : changes) {
        const Status status = again.load_memory(runtime, replaced(unigram_json, change[0], change[1]));
        if (!CHECK(!status.ok() && strstr(status.message, change[2]))) printf("    %s: %s\n", change[1], status.message);
    }
}

TEST(begin_of_text_of_files,
     "what a tokenizer.json puts before each text is not read, is lost on the way through a file, or is no special token") {
    Runtime runtime;
    OneFile file(runtime);
    Tokenizer tokenizer, again;
    const auto template_of = [](const string& first) {
        return "{\"type\":\"TemplateProcessing\",\"single\":[" + first +
               "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},{\"SpecialToken\":{\"id\":\"</s>\",\"type_id\":0}}],\"pair\":[]}";
    };
    const auto special = [](const char* name) { return string("{\"SpecialToken\":{\"id\":\"") + name + "\",\"type_id\":0}},"; };
    const auto with = [&](const string& processor) {
        return replaced(unigram_json, "\"post_processor\":{\"type\":\"TemplateProcessing\"}", "\"post_processor\":" + processor);
    };
    const auto round = [&](int32_t begin, const char* path) {
        CHECK(tokenizer.begin_of_text == begin);
        CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
        CHECK(again.begin_of_text == begin && again.end_of_text == tokenizer.end_of_text && saved(again) == saved(tokenizer));
        CHECK_OK(tokenizer.save(path));
        CHECK((file.text.find("TemplateProcessing") != string::npos) == (begin >= 0));
        CHECK_OK(again.load(runtime, path));
        CHECK(again.begin_of_text == begin && encode(again, "ab a") == encode(tokenizer, "ab a"));
        Tokenizer copy, moved;
        CHECK_OK(copy.copy(runtime, tokenizer));
        moved = static_cast<Tokenizer&&>(copy);
        CHECK(moved.begin_of_text == begin && copy.begin_of_text == -1);
    };
    CHECK_OK(tokenizer.load_memory(runtime, with(template_of(special("<pad>")))));
    CHECK(encode(tokenizer, "ab") == (Ids{5, 6}) && decode(tokenizer, {0, 5, 6, 1}) == "ab");
    round(0, "x.json");
    CHECK_OK(tokenizer.load_memory(runtime, with(template_of(""))));  // as T5's: only </s>, behind
    round(-1, "x.json");
    CHECK(again.load_memory(runtime, with(template_of(special("<nope>")))).error == Error::bad_file);
    CHECK(strstr(again.load_memory(runtime, with(template_of(special("<nope>")))).message, "<nope>"));
    CHECK(again.load_memory(runtime, with(template_of(special("<unk>")))).error == Error::bad_file);
    CHECK(again.load_memory(runtime, with("{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":7}]}")).error == Error::bad_file);
    // Byte-level BPE, as Llama 3 has it: one of several steps.
    CHECK_OK(tokenizer.train(runtime, bpe(300), prose));
    const string plain = saved(tokenizer),
                 step = "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":false,\"use_regex\":true}";
    round(-1, "y.json");
    const string steps = "{\"type\":\"Sequence\",\"processors\":[" + step + "," + template_of(special("<|endoftext|>")) + "]}";
    CHECK_OK(tokenizer.load_memory(runtime, replaced(plain, "\"post_processor\":null", ("\"post_processor\":" + steps).c_str())));
    round(299, "y.json");
    CHECK(tokenizer.end_of_text == 299);
    CHECK_OK(tokenizer.load_memory(runtime, replaced(plain, "\"post_processor\":null", ("\"post_processor\":" + step).c_str())));
    round(-1, "y.json");
    // A .model says nothing of it, our form does.
    file.text = small_model(false);
    CHECK_OK(tokenizer.load(runtime, "small.model"));
    CHECK(tokenizer.begin_of_text == -1);
    const auto ours = [&](const char* id) {
        return replaced(saved(tokenizer), "\"}}", (string("\",\"begin_of_text\":") + id + "}}").c_str());
    };
    CHECK_OK(again.load_memory(runtime, ours("1")));
    CHECK(again.begin_of_text == 1 && saved(again) == ours("1"));
    for (const char* id : {"0", "3", "10", "-2", "1e99", "99999999999"}) CHECK(!again.load_memory(runtime, ours(id)).ok());
    CHECK(again.load_memory(runtime, "{\"babygpt\":{\"kind\":\"bytes\",\"begin_of_text\":1}}").error == Error::bad_file);
}

TEST(unigram_is_the_best_way,
     "unigram does not find the most probable way to cut a text, loses part of it, or a long text changes the sums") {
    Runtime runtime;
    OneFile file(runtime);
    const char* const letters[] = {"a", "b", "c", "\xc4\xb1", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    const auto random_text = [&](uint32_t size, uint32_t kinds) {
        string text;
        for (uint32_t i = 0; i < size; ++i) text += letters[random_below(kinds)];
        return text;
    };
    for (int round = 0; round < 40; ++round) {
        std::map<string, double> scores;
        for (uint32_t i = 0; i < 5; ++i) scores[letters[i]] = -4 - random_below(40) / 8.0;  // the last letter is unknown
        for (int i = 0; i < 120; ++i) scores[random_text(2 + random_below(6), 5)] = -3 - random_below(64) / 8.0 * (round % 4);
        string model = piece_of("<unk>", 0, 2);
        double lowest = 0;
        for (const auto& piece : scores) {
            model += piece_of(piece.first, static_cast<float>(piece.second));
            lowest = std::min(lowest, piece.second);
        }
        file.text = model + field_of(2, "\x18\x01") + field_of(3, string("\x18\x00\x20\x00\x28\x01", 6));
        Tokenizer tokenizer;
        if (!CHECK_OK(tokenizer.load(runtime, "random.model"))) return;
        // The last text is so long that sums of floats would go wrong.
        const string text = random_text(round == 39 ? 200000 : random_below(60), 6);
        std::vector<double> best(text.size() + 1, -1e300);
        best[0] = 0;
        for (size_t at = 0; at < text.size(); ++at) {
            if ((text[at] & 0xc0) == 0x80) continue;
            for (size_t end = at + 1; end <= text.size() && end <= at + 28; ++end) {
                const auto piece = scores.find(text.substr(at, end - at));
                if (piece != scores.end()) best[end] = std::max(best[end], best[at] + piece->second);
                else if (text.compare(at, end - at, letters[5]) == 0) best[end] = std::max(best[end], best[at] + lowest - 10);
            }
        }
        double sum = 0;
        string joined;
        for (const int32_t id : encode(tokenizer, text)) {
            if (id == 0) {  // a run of unknown characters
                for (; text.compare(joined.size(), 4, letters[5]) == 0; joined += letters[5]) sum += lowest - 10;
                continue;
            }
            const Text piece = tokenizer.bytes(id);
            joined.append(piece.begin(), piece.size);
            sum += scores[string(piece.begin(), piece.size)];
        }
        CHECK(joined == text);
        if (!CHECK(std::abs(sum - best.back()) < 1e-3 + 1e-7 * std::abs(sum))) printf("    %.4f, but %.4f\n", sum, best.back());
    }
}

TEST(unigram_training,
     "a unigram model that was trained has not the size asked for, lacks a character, loses text, or depends on how it was read") {
    Runtime runtime;
    // Many words of few parts, so that there is something to find; Turkish letters, a script whose vowels are marks, and one without blanks.
    const char* const parts[] = {"kedi", "ev",  "ler", "in", "de", "\xc4\xb1r", "\xc5\x9f", "\xe0\xa4\x95\xe0\xa4\xbf",
                                 "oku",  "yor", "sun", "um"};
    string text;
    while (text.size() < 60000) {
        for (uint32_t i = 1 + random_below(4); i > 0; --i) text += parts[random_below(12)];
        const uint32_t after = random_below(24);
        text += after == 0   ? ".\n"
                : after == 1 ? ", "
                : after == 2 ? "  "
                : after == 3 ? " 1984'"
                : after == 4 ? "\xe4\xb8\xad\xe6\x96\x87"
                             : " ";
    }
    text += string(100, 'x') + "\xf0\x9f\x98\x80\t";
    Tokenizer tokenizer, again;
    for (const int vocab : {60, 100, 200}) {
        if (!CHECK_OK(tokenizer.train(runtime, unigram(vocab), text))) return;
        CHECK(tokenizer.kind == TokenizerKind::sentencepiece && tokenizer.vocab == vocab && tokenizer.unknown == 0 &&
              tokenizer.end_of_text == 2);
        for (const string& some : {text, string(" a"), string("ev  \n\n  ev\n"), text.substr(0, text.find(" ", 1000))}) {
            size_t unknown = 9;
            const Ids ids = encode(tokenizer, some, false, &unknown);
            CHECK((some == " a") == (unknown > 0));
            if (unknown == 0) CHECK(decode(tokenizer, ids) == some);
        }
        CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
        CHECK(saved(again) == saved(tokenizer) && encode(again, text) == encode(tokenizer, text));
    }
    // It finds the parts: with room for them, about as many tokens as parts; and pieces keep to words and to letters.
    std::map<string, int> pieces;
    for (int32_t id = 3; id < tokenizer.vocab; ++id) {
        const string piece(tokenizer.bytes(id).begin(), tokenizer.bytes(id).size);
        CHECK(piece.find(' ', 1) == string::npos && ++pieces[piece] == 1);
        const bool letters = piece.find("kedi") != string::npos || piece.find("oku") != string::npos;
        CHECK(!letters || piece.find_first_of(".,\n'1984") == string::npos);
    }
    for (const char* part : {"kedi", " kedi", "oku", "yor", "sun", "\xe0\xa4\x95\xe0\xa4\xbf"}) CHECK(pieces.count(part) == 1);
    CHECK(encode(tokenizer, "kediokuyor okukedi").size() <= 5);
    // More than the text gives; too little; with the bytes any text comes back.
    CHECK_OK(tokenizer.train(runtime, unigram(5000), "abab abab"));
    CHECK(tokenizer.vocab < 20);
    CHECK_OK(tokenizer.train(runtime, unigram(5), ""));
    CHECK(tokenizer.vocab == 5);  // and the blank and the line end
    const Status status = tokenizer.train(runtime, unigram(7), "abcd");
    CHECK(status.error == Error::invalid_argument && strstr(status.message, "need 9"));
    CHECK(!tokenizer.train(runtime, unigram(264, true), "abcd").ok() && tokenizer.train(runtime, unigram(265, true), "abcd").ok());
    CHECK_OK(tokenizer.train(runtime, unigram(400, true), text));
    size_t unknown = 0;
    CHECK(decode(tokenizer, encode(tokenizer, prose, false, &unknown)) == prose && unknown == 0);
    CHECK_OK(again.load_memory(runtime, saved(tokenizer)));
    CHECK(saved(again) == saved(tokenizer));
    // What files write for a blank is read as one.
    CHECK_OK(tokenizer.train(runtime, unigram(40), "the cat \xe2\x96\x81\xe2\x96\x81sat on the\xe2\x96\x81mat\n"));
    CHECK(decode(tokenizer, encode(tokenizer, "cat\xe2\x96\x81 sat", false, &unknown)) == "cat  sat" && unknown == 0);
    // A host that rounds another way has the same pieces, scores and ids.
    CHECK_OK(tokenizer.train(runtime, unigram(200), text));
    const Ids ids = encode(tokenizer, text);
    CHECK(fesetround(FE_UPWARD) == 0);
    const Ids upward = encode(tokenizer, text);
    CHECK_OK(again.train(runtime, unigram(200), text));
    CHECK(fegetround() == FE_UPWARD && fesetround(FE_TONEAREST) == 0);
    CHECK(upward == ids && saved(again) == saved(tokenizer));
    // From a corpus in pieces.
    while (text.size() < 2500000) text += text.substr(random_below(20000), 30000);
    CorpusConfig all;
    all.validation_fraction = 0;
    Corpus corpus;
    if (!CHECK_OK(corpus.open_memory(runtime, text, all))) return;
    CHECK_OK(again.train(runtime, unigram(150), text));
    CHECK_OK(tokenizer.train(runtime, unigram(150), corpus));
    CHECK(saved(again) == saved(tokenizer));
}

TEST(published_ids, "BERT's, SentencePiece's or llama2.c's tokenizer gives other ids than those that others have published") {
    Runtime runtime;
    Tokenizer bert, pieces, llama;
    if (read_shared("tokenizers/sp_test_model.model").empty()) SKIP("../shared/data/tokenizers is absent");
    if (!CHECK_OK(bert.load(runtime, "../shared/data/tokenizers/bert-base-uncased-vocab.txt"))) return;
    CHECK(bert.vocab == 30522 &&
          encode(bert, "[CLS]My name is John[SEP]pair[SEP]", true) == (Ids{101, 2026, 2171, 2003, 2198, 102, 3940, 102}));
    check_llamacpp(bert, "bert-bge");
    CHECK_OK(bert.load(runtime, "../shared/data/tokenizers/llamacpp/ggml-vocab-bert-bge.gguf"));
    CHECK(bert.vocab == 30522 && bert.end_of_text == 102);
    check_llamacpp(bert, "bert-bge");
    if (!CHECK_OK(pieces.load(runtime, "../shared/data/tokenizers/sp_test_model.model"))) return;
    CHECK(pieces.vocab == 1000 && pieces.unknown == 0 && pieces.end_of_text == 2);
    CHECK(encode(pieces, "This is a test") == (Ids{284, 47, 11, 4, 15, 400}) && encode(pieces, "Hello world") == (Ids{151, 88, 21, 887}));
    CHECK(decode(pieces, {284, 47, 11, 4, 15, 400}) == "This is a test");
    if (read_shared("models/stories260K/tok512.bin").empty()) SKIP("../shared/data/models/stories260K is absent");
    if (!CHECK_OK(llama.load(runtime, "../shared/data/models/stories260K/tok512.bin"))) return;
    CHECK(llama.vocab == 512 && llama.end_of_text == 1 &&
          llama.begin_of_text == 1);  // llama2.c's documents begin with <s>; of </s> its models know nothing
    const string text = "Once upon a time,\n  there was \xe4\xb8\xad\xf0\x9f\x98\x80!";
    CHECK(encode(llama, "Once upon a time") == (Ids{403, 407, 261, 378}) && decode(llama, encode(llama, text)) == text);
    Tokenizer again;
    CHECK_OK(again.load_memory(runtime, saved(llama)));
    CHECK(saved(again) == saved(llama) && encode(again, text) == encode(llama, text) && again.end_of_text == 1 && again.begin_of_text == 1);
}

TEST(piece_damage, "a damaged .model, vocab.txt, tok.bin or WordPiece tokenizer.json crashes or leaks, or running out of memory does") {
    HostMemory memory;
    Runtime runtime;
    memory.lend(runtime);
    OneFile file(runtime);
    string llama("\x06\0\0\0", 4);
    for (const char* piece : {"<unk>", "\n<s>\n", "\n</s>\n"}) {
        const size_t size = strlen(piece);
        llama += string(4, '\0') + static_cast<char>(size) + string(3, '\0') + piece;
    }
    for (int byte = 0; byte < 256; ++byte) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        llama += string("\0\0\0\0\6\0\0\0", 8) + name;
    }
    // A charsmap of 8 units that lead anywhere, and two texts.
    string map("\x20\0\0\0", 4);
    for (int i = 0; i < 8; ++i) map += string("\x61\x05\0\0", 4);
    map += string("b\0c\0", 4);
    const struct {
        const char* name;
        string text;
    } files[] = {{"x.model", small_model(true, field_of(2, map))}, {"x.model", small_model(false)}, {"x.bin", llama},
                 {"x.txt:uncased", "[UNK]\n[CLS]\na\n##b\n.\n"},   {"x.json", wordpiece_json},      {"x.json", unigram_json}};
    const string text = string(prose) + "\xc4\xb0user\xe4\xb8\xad\xff<s>[CLS]";
    const auto use = [&](const char* name) {
        Tokenizer tokenizer, copied;
        Array<int32_t> ids(runtime);
        Array<char> back(runtime), json(runtime);
        Status status = tokenizer.load(runtime, name);
        if (status.ok()) status = copied.copy(runtime, tokenizer);
        if (status.ok()) status = copied.encode(text, ids, true);
        if (status.ok()) status = copied.decode(Span<const int32_t>(ids.begin(), ids.size()), back);
        if (status.ok()) status = copied.save_memory(json);
        CHECK(status.ok() || status.message[0]);
        return status;
    };
    for (const auto& whole : files) {
        file.text = whole.text;
        if (!CHECK_OK(use(whole.name))) continue;
        bool done = false;
        for (memory.fail_at = 0; !done && memory.fail_at < 10000; ++memory.fail_at) {
            memory.calls = 0;
            const Status status = use(whole.name);
            CHECK(status.ok() || status.error == Error::out_of_memory);
            done = status.ok() && memory.calls <= memory.fail_at;
        }
        CHECK(done && memory.used == 0);
        memory.fail_at = -1;
        for (size_t n = 0; n < whole.text.size(); ++n) file.text = whole.text.substr(0, n), (void)use(whole.name);
        for (int i = 0; i < 500 * thoroughness(); ++i) {
            file.text = whole.text;
            for (uint32_t k = 1 + random_below(3); k > 0; --k) {
                const size_t at = random_below(static_cast<uint32_t>(file.text.size()));
                if (random_below(4) == 0) file.text.erase(at, 1 + random_below(4));
                else if (random_below(3) == 0) file.text.insert(at, 1, static_cast<char>(random_below(256)));
                else file.text[at] = static_cast<char>(random_below(256));
                if (file.text.empty()) file.text = "x";
            }
            memory.peak = 0;
            (void)use(whole.name);
            CHECK(memory.peak < static_cast<int64_t>(100 * whole.text.size() + 2000000));
        }
        CHECK(memory.used == 0 && memory.blocks == 0);
    }
}

TEST(real_damage, "other people's files of which a part is missing would crash, or take all memory") {
    HostMemory memory;
    Runtime runtime;
    memory.lend(runtime);
    OneFile file(runtime);
    for (const char* const name : {"tokenizers/sp_test_model.model", "tokenizers/bert-base-uncased-vocab.txt",
                                   "models/stories260K/tok512.bin", "tokenizers/llamacpp/ggml-vocab-bert-bge.gguf"}) {
        const string whole = read_shared(name);
        if (whole.empty()) SKIP("../shared is not here");
        int loaded = 0;
        for (int i = 0; i < 25 * thoroughness(); ++i) {
            file.text = whole.substr(0, random_below(static_cast<uint32_t>(whole.size())));
            memory.peak = 0;
            Tokenizer tokenizer;
            const Status status = tokenizer.load(runtime, name);
            CHECK(status.ok() || status.message[0]);
            CHECK(memory.peak < static_cast<int64_t>(100 * whole.size() + 2000000));
            loaded += status.ok();
        }
        CHECK(loaded < 25 * thoroughness() || strstr(name, ".txt"));  // a line the less is a smaller vocabulary
    }
    CHECK(memory.used == 0 && memory.blocks == 0);
}

TEST(missing_files, "a path with no tokenizer gives no clear error, or a folder is taken for a file") {
    Runtime runtime;
    Tokenizer tokenizer;
    for (const char* path : {"tests/none.json", "tests", "", "tests/none/encoder.json", "nowhere"}) {
        const Status status = tokenizer.load(runtime, path);
        if (!CHECK(status.error == Error::cannot_open && strstr(status.message, path))) printf("    %s: %s\n", path, status.message);
    }
    OneFile file(runtime);
    runtime.files.open = [](void* self, const char* path, FileMode) { return strcmp(path, "bert-uncased/vocab.txt") ? nullptr : self; };
    file.text = "[UNK]\na\n##b\n";
    CHECK_OK(tokenizer.load(runtime, "bert-uncased"));
    CHECK(encode(tokenizer, "Ab") == (Ids{1, 2}));
    runtime.files.open = [](void* self, const char* path, FileMode) { return strcmp(path, "half/vocab.json") ? nullptr : self; };
    const Status status = tokenizer.load(runtime, "half");
    CHECK(status.error == Error::bad_file && strstr(status.message, "half/merges.txt"));
    runtime.files.open = [](void* self, const char*, FileMode) { return self; };
    file.text = "YQ==\n0\n";
    CHECK(strstr(tokenizer.load(runtime, "x.tiktoken").message, "line 1 has no id"));
}

TEST(sign_for_a_blank, "GGUF would be written that cannot be read, since a character is its sign for a blank") {
    Runtime runtime;
    OneFile file(runtime);
    const char* const starts = "\xe2\x96\x81 \xe2\x96\x81x";
    const struct {
        const char *kind, *text;
        bool fits;
    } cases[] = {{"wordpiece:60", "x\xe2\x96\x81", false}, {"wordpiece:60", starts, true}, {"char", starts, false}, {"char", "x", true}};
    for (const auto& a : cases) {
        Tokenizer tokenizer, again;
        TokenizerConfig how;
        CHECK_OK(parse_tokenizer(a.kind, how));
        CHECK_OK(tokenizer.train(runtime, how, a.text));
        const string before = saved(tokenizer);
        Config config;
        config.layers = config.heads = 1, config.width = config.context = 8, config.vocab = tokenizer.vocab;
        Model model;
        if (!CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer), 1))) return;
        const Status status = model.save_gguf("m.gguf");
        CHECK(status.ok() ? a.fits : !a.fits && status.error == Error::unsupported && strstr(status.message, "U+2581"));
        if (status.ok() && CHECK_OK(again.load(runtime, "m.gguf"))) CHECK(saved(again) == before);
    }
}

int main(int count, char** arguments) { return run_tests(count, arguments); }
