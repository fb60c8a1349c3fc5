// From files to documents, from documents to windows, and the n-gram baseline: chapter 7's first half.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;
using std::string;
using std::vector;

// ---- a disk in memory, which can be made to fail ----------------------------------------------------------------------

struct Disk {
    std::map<string, string> files;
    int64_t most_at_once = 1 << 30;  // bytes a read gives
    bool pipes = false;              // sizes are unknown
    int fail_at = -1;                // this call fails, and those after it
    int calls = 0;
    int handles = 0;
    struct Handle {
        string* bytes;
        int64_t at;
    };
    static bool fails(void* user) {
        Disk& disk = *static_cast<Disk*>(user);
        return disk.fail_at >= 0 && disk.calls++ >= disk.fail_at;
    }
    static void* open(void* user, const char* path, FileMode mode) {
        Disk& disk = *static_cast<Disk*>(user);
        if (fails(user) || (mode == FileMode::read && !disk.files.count(path))) return nullptr;
        if (mode == FileMode::write) disk.files[path].clear();
        ++disk.handles;
        return new Handle{&disk.files[path], 0};
    }
    static int64_t size(void* user, void* file) {
        return static_cast<Disk*>(user)->pipes ? -1 : static_cast<int64_t>(static_cast<Handle*>(file)->bytes->size());
    }
    static int64_t read(void* user, void* file, int64_t offset, void* to, int64_t bytes) {
        Disk& disk = *static_cast<Disk*>(user);
        Handle& handle = *static_cast<Handle*>(file);
        if (fails(user)) return -1;
        if (disk.pipes) offset = handle.at;
        const int64_t n = std::max<int64_t>(0, std::min({bytes, disk.most_at_once, static_cast<int64_t>(handle.bytes->size()) - offset}));
        if (n > 0) memcpy(to, handle.bytes->data() + offset, static_cast<size_t>(n));
        handle.at = offset + n;
        return n;
    }
    static int64_t write(void* user, void* file, const void* from, int64_t bytes) {
        if (fails(user)) return -1;
        static_cast<Handle*>(file)->bytes->append(static_cast<const char*>(from), static_cast<size_t>(bytes));
        return bytes;
    }
    static int sync(void* user, void*) { return fails(user) ? -1 : 0; }
    static int close(void* user, void* file) {
        --static_cast<Disk*>(user)->handles;
        delete static_cast<Handle*>(file);
        return 0;
    }
    static int rename(void* user, const char* from, const char* to) {
        if (fails(user)) return -1;
        Disk& disk = *static_cast<Disk*>(user);
        disk.files[to] = disk.files[from];
        disk.files.erase(from);
        return 0;
    }
    static int remove(void* user, const char* path) { return static_cast<Disk*>(user)->files.erase(path) ? 0 : -1; }
    static int sync_folder(void* user, const char*) { return fails(user) ? -1 : 0; }
    void lend(Runtime& runtime) { runtime.files = {this, open, size, read, write, sync, close, rename, remove, sync_folder}; }
};

// Counts what is allocated; can run out.
struct Heap {
    size_t now = 0, peak = 0;
    int calls = 0, fail_at = -1;
    static void* allocate(void* user, size_t bytes, size_t) {
        Heap& memory = *static_cast<Heap*>(user);
        if (memory.fail_at >= 0 && memory.calls++ >= memory.fail_at) return nullptr;
        memory.now += bytes;
        memory.peak = std::max(memory.peak, memory.now);
        return aligned_alloc(64, (bytes + 63) / 64 * 64);
    }
    static void release(void* user, void* pointer, size_t bytes) {
        static_cast<Heap*>(user)->now -= bytes;
        free(pointer);
    }
    void lend(Runtime& runtime) { runtime.memory_user = this, runtime.allocate = allocate, runtime.release = release; }
};

// ---- helpers ------------------------------------------------------------------------------------------------------------

static string text_of(Text text) { return string(text.data, text.size); }
static bool has(const Status& status, const char* word) { return strstr(status.message, word) != nullptr; }

struct Collected {
    vector<string> documents;
    vector<string> pieces;
    string all;
    bool open = false;  // the last document has not ended
    static bool take(void* user, Text bytes, bool ends) {
        Collected& to = *static_cast<Collected*>(user);
        if (!to.open) to.documents.push_back("");
        to.documents.back() += text_of(bytes);
        to.pieces.push_back(text_of(bytes));
        to.all += text_of(bytes);
        to.open = !ends;
        return true;
    }
};
static Collected collect(Corpus& corpus, Part part = Part::all) {
    Collected to;
    CHECK_OK(corpus.read(part, Collected::take, &to));
    return to;
}
static CorpusConfig as(TextFormat format, double validation_fraction = 0) {
    CorpusConfig config;
    config.format = format;
    config.validation_fraction = validation_fraction;
    return config;
}
using Documents = vector<string>;
static Documents documents(Runtime& runtime, const string& bytes, const CorpusConfig& config) {
    Corpus corpus;
    if (!CHECK_OK(corpus.open_memory(runtime, bytes, config))) return {};
    const Collected all = collect(corpus);
    CHECK(corpus.documents == all.documents.size() && corpus.bytes == all.all.size() && !all.open);
    return all.documents;
}
static Status opened(Runtime& runtime, const string& bytes, const CorpusConfig& config) {
    Corpus corpus;
    return corpus.open_memory(runtime, bytes, config);
}

static uint64_t random_state = 1;
static uint32_t random_below(uint32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((random_state >> 33) % limit);
}
// Words of random letters with spaces, line ends, and some that are not ASCII.
static string random_text(size_t size) {
    static const char* const parts[] = {
        " ", "  ", "\n", "\n\n", " \t", "\xc2\xa0", "\xe2\x80\x83", "\xe3\x80\x80", "\xc3\xa9", "\xe2\x80\x9c", "\xf0\x9f\x99\x82",
        "1", "'s", "."};
    string text;
    while (text.size() < size) {
        for (uint32_t n = random_below(9); n > 0; --n) text += static_cast<char>('a' + random_below(26));
        text += parts[random_below(3) ? 0 : random_below(14)];
    }
    return text;
}
static bool read_all(const string& path, string& bytes) {
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) return false;
    char buffer[65536];
    bytes.clear();
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) bytes.append(buffer, n);
    fclose(file);
    return true;
}

static vector<int32_t> encode(const Tokenizer& tokenizer, Text text) {
    Array<int32_t> ids(*tokenizer.runtime);
    CHECK_OK(tokenizer.encode(text, ids));
    return vector<int32_t>(ids.begin(), ids.end());
}

// ---- files to documents -------------------------------------------------------------------------------------------------

TEST(csv_follows_rfc_4180, "tables from spreadsheets would be read wrongly") {
    Runtime runtime;
    CorpusConfig csv = as(TextFormat::csv);
    CHECK(documents(runtime, "id,text\r\n1,one\r\n2,two\r\n", csv) == (Documents{"one", "two"}));
    CHECK(documents(runtime, "id,text\n1,one\n2,two", csv) == (Documents{"one", "two"}));
    CHECK(documents(runtime, "text,id\n\"a \"\"quoted\"\" word\",1\n", csv) == (Documents{"a \"quoted\" word"}));
    CHECK(documents(runtime, "text,id\n\"line\r\nand, line\n\",1\nplain,2\n", csv) == (Documents{"line\r\nand, line\n", "plain"}));
    CHECK(documents(runtime, "text\n\"\"\"\"\n\"x\"", csv) == (Documents{"\"", "x"}));
    CHECK(documents(runtime, "\"te\"\"xt\",\"text\"\r\n\"a\",\"b\"\r\n", csv) == (Documents{"b"}));
    CHECK(documents(runtime, "\xef\xbb\xbftext\nafter a mark\n", csv) == (Documents{"after a mark"}));
    CHECK(documents(runtime, "text,x\n\n,1\n\"\",2\na,3\n\n", csv) == (Documents{"a"}));  // what holds no text is no document
    CHECK(documents(runtime, "text,x\nin \"quotes\" inside,1\n", csv) == (Documents{"in \"quotes\" inside"}));
    CHECK(documents(runtime, "text,x\n leading and trailing ,1\n", csv) == (Documents{" leading and trailing "}));
    csv.column = "body, all";
    CHECK(documents(runtime, "id,\"body, all\"\n1,it\n", csv) == (Documents{"it"}));
}

TEST(csv_errors_say_where, "nobody would find the damaged line of a table") {
    Runtime runtime;
    const CorpusConfig csv = as(TextFormat::csv);
    Status status = opened(runtime, "id,name\n1,x\n", csv);
    CHECK(status.error == Error::bad_file && has(status, "'text'") && has(status, "id, name") && has(status, "line 1"));
    status = opened(runtime, "id,text\n1,\"a\nb\"\n2,b,c\n", csv);
    CHECK(status.error == Error::bad_file && has(status, "line 4") && has(status, "3 fields"));
    status = opened(runtime, "id,text\n1,a\n2\n", csv);
    CHECK(status.error == Error::bad_file && has(status, "line 3") && has(status, "1 fields"));
    status = opened(runtime, "id,text\n1,\"a\n2,b\n", csv);
    CHECK(status.error == Error::bad_file && has(status, "line 2") && has(status, "does not end"));
    status = opened(runtime, "id,text\n1,\"a\"b\n", csv);
    CHECK(status.error == Error::bad_file && has(status, "line 2") && has(status, "closing quote"));
    CHECK(opened(runtime, "", csv).error == Error::bad_file);
    CHECK(opened(runtime, "text\n", csv).error == Error::bad_file);
}

TEST(jsonl_reads_one_field, "records would be read wrongly, or errors hidden") {
    Runtime runtime;
    CorpusConfig jsonl = as(TextFormat::jsonl);
    const char* const lines =
        "{\"text\":\"a\\n\\u00e9\\ud83d\\ude42\"}\n\n  \r\n{\"x\":[1,{\"text\":2}],\"text\":\"b\"}\r\n{\"text\": \"\"}";
    CHECK(documents(runtime, lines, jsonl) == (Documents{"a\n\xc3\xa9\xf0\x9f\x99\x82", "b"}));
    Status status = opened(runtime, "{\"text\":\"a\"}\n{\"dialogue\":\"b\",\"topic\":\"c\"}\n", jsonl);
    CHECK(status.error == Error::bad_file && has(status, "line 2") && has(status, "dialogue, topic"));
    status = opened(runtime, "\n{\"text\":1}\n", jsonl);
    CHECK(status.error == Error::bad_file && has(status, "line 2") && has(status, "not a string"));
    status = opened(runtime, "{\"text\":\"a\"}\n{\"text\":\"b\"\n", jsonl);
    CHECK(status.error == Error::bad_file && has(status, "line 2"));
    status = opened(runtime, "{\"text\":\"a\"} x\n", jsonl);
    CHECK(status.error == Error::bad_file && has(status, "line 1"));
    jsonl.field = "dialogue";
    CHECK(documents(runtime, "\xef\xbb\xbf{\"text\":\"a\",\"dialogue\":\"b\"}\n", jsonl) == (Documents{"b"}));
}

TEST(pairs_of_texts, "a translator would learn other pairs than those of the file, or nobody would find a wrong line") {
    Runtime runtime;
    Tokenizer bytes, tokenizer;
    CHECK_OK(bytes.create_bytes(runtime));
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 257}, "xy"));  // the bytes and the end of text
    const int32_t end = tokenizer.end_of_text;
    const auto list = [](Span<const int32_t> ids) { return vector<int32_t>(ids.begin(), ids.end()); };
    const string file = "\xef\xbb\xbfone\tuno\r\n\nlong source\tx\nx\tlong target\r\ntwo\tdos\nfour\tcinco5";
    CHECK(documents(runtime, file, as(TextFormat::tsv)) ==
          (Documents{"one\tuno", "long source\tx", "x\tlong target", "two\tdos", "four\tcinco5"}));
    Corpus corpus;
    Data data;
    CHECK_OK(corpus.open_memory(runtime, file, as(TextFormat::tsv)));
    CHECK_OK(data.create_pairs(runtime, corpus, Part::all, tokenizer, 7));
    CHECK(data.left_out == 2 && data.tokens == 4 + 4 + 7 && data.bytes == 3 + 3 + 6 && data.unknown == 0);
    const char* const sources[] = {"one", "two", "four"};
    const char* const targets[] = {"uno", "dos", "cinco5"};
    for (uint64_t i = 0; i < 3; ++i) {
        const Example* pair = data.evaluation_example(i);
        if (!CHECK(pair)) return;
        vector<int32_t> source, target;
        for (const int32_t id : encode(tokenizer, sources[i])) source.push_back(id);
        for (const int32_t id : encode(tokenizer, targets[i])) target.push_back(id);
        source.push_back(end), target.push_back(end);
        CHECK(list(pair->source) == source && list(pair->targets) == target);
        target.pop_back(), target.insert(target.begin(), end);
        CHECK(list(pair->ids) == target);
    }
    CHECK(!data.evaluation_example(3) && data.windows(7) == 3);
    int32_t ids[8], after[8];
    int length;
    CHECK(data.training_window(1, 0, 7, ids, after).error == Error::invalid_argument);
    CHECK(data.evaluation_window(0, 7, ids, after, length).error == Error::invalid_argument);
    NgramResult counting;
    CHECK(ngram_baseline(runtime, data, data, 257, counting).error == Error::invalid_argument);
    CHECK(has(data.create_pairs(runtime, corpus, Part::all, tokenizer, 2), "all 5 pairs are longer than context, 2"));
    CHECK(has(data.create_pairs(runtime, corpus, Part::all, bytes, 7), "end-of-text"));
    CHECK(!data.state && data.left_out == 0);
    const auto wrong = [&](const char* text, const char* what, TextFormat format = TextFormat::tsv) {
        CHECK_OK(corpus.open_memory(runtime, text, as(format)));
        const Status status = data.create_pairs(runtime, corpus, Part::all, tokenizer, 7);
        CHECK(!status.ok() && has(status, what) && !data.state);
    };
    wrong("a\tb\n\nc d\n", "line 3: there is no tab");
    wrong("a\tb\tc\n", "line 1: there is more than one tab");
    wrong("a\tb\n\tc\n", "line 2: the source is empty");
    wrong("a\t\r\n", "line 1: the target is empty");
    wrong("a\tb\n", "is no tsv file", TextFormat::text);
    // A very long line comes in pieces.
    string long_line;
    for (const char c : random_text(3 << 20)) long_line += c == '\n' || c == '\t' ? ' ' : c;
    long_line = "a\tb\n" + long_line + "\tb\nc\td";
    CHECK_OK(corpus.open_memory(runtime, long_line, as(TextFormat::tsv)));
    CHECK_OK(data.create_pairs(runtime, corpus, Part::all, tokenizer, 7));
    CHECK(data.left_out == 1 && data.windows(7) == 2);
    // The two parts are all pairs, each whole.
    for (int percent = 0; percent < 100; percent += 7) {
        string text;
        for (int i = 0; i < 9; ++i) text += "s" + std::to_string(i) + "\tt" + std::to_string(i * 1000) + "\n";
        CHECK_OK(corpus.open_memory(runtime, text, as(TextFormat::tsv, percent / 100.0)));
        uint64_t count = 0;
        Data validation;
        if (corpus.training_bytes > 0) CHECK_OK(data.create_pairs(runtime, corpus, Part::training, tokenizer, 7));
        if (corpus.training_bytes > 0) count += data.windows(7);
        if (corpus.training_bytes < corpus.bytes) CHECK_OK(validation.create_pairs(runtime, corpus, Part::validation, tokenizer, 7));
        else CHECK(has(validation.create_pairs(runtime, corpus, Part::validation, tokenizer, 7), "no pair"));
        count += validation.windows(7);
        CHECK(count == 9 && (percent < 15 || validation.windows(7) > 0));
        CHECK(data.fingerprint != validation.fingerprint);
    }
}

TEST(begin_of_text_before_documents,
     "what begins a text would be missing, stand twice, stand where a document was cut, or be learnt as an answer") {
    Runtime runtime;
    Tokenizer tokenizer;
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 257}, "xy"));  // the bytes and the end of text
    const int32_t end = tokenizer.end_of_text, begin = tokenizer.begin_of_text = 0;
    Corpus corpus;
    Data data;
    const auto is = [&](Part part, const vector<int32_t>& expected, Text answers = Text(), const vector<int32_t>& targets = {}) {
        int32_t ids[50], after[50];
        int length = 0;
        CHECK_OK(data.create(runtime, corpus, part, tokenizer, Text(), 1 << 20, answers));
        CHECK_OK(data.evaluation_window(0, 50, ids, after, length));
        return data.tokens == expected.size() &&
               vector<int32_t>(ids, ids + length) == vector<int32_t>(expected.begin(), expected.end() - 1) &&
               (targets.empty() || vector<int32_t>(after, after + length) == targets);
    };
    CorpusConfig blocks = as(TextFormat::text);
    blocks.split_documents = true;
    CHECK_OK(corpus.open_memory(runtime, "ab\n\n\ncd\n\n", blocks));
    CHECK(is(Part::all, {begin, 'a', 'b', end, begin, 'c', 'd', end}));
    CHECK_OK(corpus.open_memory(runtime, "Q: a\nA: b\n\nA: c", blocks));
    const vector<int32_t> talk = {begin, 'Q', ':', ' ', 'a', '\n', 'A', ':', ' ', 'b', end, begin, 'A', ':', ' ', 'c', end};
    CHECK(is(Part::all, talk, "A: ", {-1, -1, -1, -1, -1, -1, -1, -1, 'b', end, -1, -1, -1, -1, 'c', end}));
    tokenizer.begin_of_text = end;  // then it ends what stands before it, too
    const vector<int32_t> one = {end, 'Q', ':', ' ', 'a', '\n', 'A', ':', ' ', 'b', end, 'A', ':', ' ', 'c'};
    CHECK(is(Part::all, one, "A: ", {-1, -1, -1, -1, -1, -1, -1, -1, 'b', end, -1, -1, -1, 'c'}));
    tokenizer.begin_of_text = begin;
    const string cut = "ab cd ef gh";
    CHECK_OK(corpus.open_memory(runtime, cut, as(TextFormat::text, 0.5)));
    const auto middle = cut.begin() + static_cast<std::ptrdiff_t>(corpus.training_bytes);
    vector<int32_t> first(cut.begin(), middle), rest(middle, cut.end());
    first.insert(first.begin(), begin), rest.push_back(end);
    CHECK(first.size() > 3 && rest.size() > 3 && is(Part::training, first) && is(Part::validation, rest));
    CHECK_OK(corpus.open_memory(runtime, "{\"text\":\"abcd\"}\n{\"text\":\"efgh\"}\n", as(TextFormat::jsonl, 0.5)));
    CHECK(is(Part::training, {begin, 'a', 'b', 'c', 'd', end}) && is(Part::validation, {begin, 'e', 'f', 'g', 'h', end}));
}

TEST(text_and_its_blocks, "dialogues in a text file would be glued together or lose lines") {
    Runtime runtime;
    CorpusConfig text = as(TextFormat::text);
    CHECK(documents(runtime, "\xef\xbb\xbfone\r\n\r\ntwo\n", text) == (Documents{"one\r\n\r\ntwo\n"}));
    text.split_documents = true;
    CHECK(documents(runtime, "\n\n\none\ntwo\n\n\nthree\n\nfour", text) == (Documents{"one\ntwo", "three", "four"}));
    CHECK(documents(runtime, "\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n", text) == (Documents{"one\r\ntwo", "three"}));
    CHECK(documents(runtime, "one\n \ntwo\n\r\n\r\n\n", text) == (Documents{"one\n \ntwo"}));
    CHECK(opened(runtime, "\n\r\n\n", text).error == Error::bad_file);
    CHECK(opened(runtime, "", text).error == Error::bad_file);
}

TEST(files_in_order, "several files, formats by name, pipes or slow disks would give another text") {
    Runtime runtime;
    Disk disk;
    disk.lend(runtime);
    string block;
    for (int i = 0; i < 40000; ++i) block += "line " + std::to_string(i) + (i % 7 ? "\n" : "\r\n") + (i % 5 == 4 ? "\n" : "");
    disk.files["a.txt"] = "\xef\xbb\xbf" + block;
    disk.files["b.jsonl"] = "{\"text\":\"from json\"}\n{\"text\":\"" + string(3 << 20, 'x') + "\"}\n";
    disk.files["c.csv"] = "id,text\n1,from csv\n2,\"" + string(3 << 20, 'y') + "\"\n";
    disk.files["d.txt"] = "";
    disk.files["e.txt"] = "the end";
    const Text paths[] = {"a.txt", "b.jsonl", "c.csv", "d.txt", "e.txt"};
    CorpusConfig config;
    config.split_documents = true;
    Corpus corpus;
    CHECK_OK(corpus.open(runtime, paths, config));
    const Collected first = collect(corpus);
    CHECK(first.documents.size() == 8000 + 5 && first.documents.front() == "line 0\r\nline 1\nline 2\nline 3\nline 4");
    CHECK(first.documents[8000] == "from json" && first.documents[8001].size() == 3 << 20 && first.documents[8002] == "from csv");
    CHECK(first.documents[8004] == "the end");
    CHECK(collect(corpus, Part::training).all + collect(corpus, Part::validation).all == first.all);
    for (int way = 0; way < 2; ++way) {
        disk.pipes = way == 0;
        disk.most_at_once = way == 0 ? 1000 : 77;
        CHECK_OK(corpus.open(runtime, paths, config));
        CHECK(collect(corpus).documents == first.documents);
    }
    disk.pipes = false;
    disk.most_at_once = 1 << 30;
    CHECK_OK(corpus.open(runtime, paths, config));
    disk.files["c.csv"].resize(1000);
    Collected cut;
    const Status status = corpus.read(Part::all, Collected::take, &cut);
    CHECK(status.error == Error::cannot_read && has(status, "c.csv"));
    const Text missing[] = {"no.txt"};
    CHECK(corpus.open(runtime, missing, config).error == Error::cannot_open);
    const Text twice[] = {"-", "-"};
    CHECK(corpus.open(runtime, twice, config).error == Error::invalid_argument);
    CHECK(corpus.open(runtime, Span<const Text>(), config).error == Error::invalid_argument);
    CHECK(disk.handles == 0);
}

TEST(standard_input, "text could not be piped in") {
    Runtime runtime;
    string expected;
    if (!read_all("tests/check.h", expected)) SKIP("it runs from the repository's root only");
    if (!freopen("tests/check.h", "rb", stdin)) SKIP("standard input cannot be replaced here");
    const Text paths[] = {"-"};
    Corpus corpus;
    CHECK_OK(corpus.open(runtime, paths));
    CHECK(collect(corpus).all == expected && collect(corpus).all == expected);
}

// ---- the validation part --------------------------------------------------------------------------------------------------

TEST(no_texts, "somebody would train for hours on the bytes of a .docx") {
    Runtime runtime;
    Corpus corpus;
    for (const char* begin : {"\xff\xfeh", "\xfe\xff", "\x1f\x8b\x08", "PK\x03\x04 and so on", "%PDF-1.7"})
        for (const TextFormat format : {TextFormat::text, TextFormat::csv, TextFormat::jsonl})
            CHECK(has(corpus.open_memory(runtime, begin, as(format)), "convert it first"));
    CHECK_OK(corpus.open_memory(runtime, "PK", as(TextFormat::text)));
    CHECK_OK(corpus.open_memory(runtime, " %PDF-", as(TextFormat::text)));
}

TEST(validation_is_the_last_part, "validation would see training text, or miss some of the text") {
    Runtime runtime;
    for (int round = 0; round < 300; ++round) {
        CorpusConfig config = as(TextFormat::text, random_below(60) / 100.0);
        config.split_documents = round % 2 == 0;
        const string text = "x" + random_text(1 + random_below(3000));
        Corpus corpus;
        if (!CHECK_OK(corpus.open_memory(runtime, text, config))) return;
        const Collected all = collect(corpus), training = collect(corpus, Part::training), validation = collect(corpus, Part::validation);
        CHECK(training.all + validation.all == all.all);
        CHECK(training.all.size() == corpus.training_bytes && all.all.size() == corpus.bytes);
        const double wanted = config.validation_fraction * static_cast<double>(corpus.bytes);
        // No farther from the split point than a 20th of the text, or half of what was asked for.
        CHECK(static_cast<double>(validation.all.size()) <= wanted);
        CHECK(static_cast<double>(validation.all.size()) >= std::min(wanted / 2, wanted - static_cast<double>(corpus.bytes) / 20) - 2);
    }
    // Documents stay whole where they are small.
    string lines;
    for (int i = 0; i < 100; ++i) lines += "{\"text\":\"document number " + std::to_string(i) + "\"}\n";
    Corpus corpus;
    CHECK_OK(corpus.open_memory(runtime, lines, as(TextFormat::jsonl, 0.105)));
    CHECK(collect(corpus, Part::validation).documents.front() == "document number 90");
    CHECK(collect(corpus, Part::validation).documents.size() == 10);
    // A single document is cut after a line; without lines at white space; without that between characters.
    const string with_lines = string(899, 'a') + "bc\nd\n" + string(95, 'e'), with_spaces = string(899, 'a') + "bc d " + string(95, 'e');
    CHECK_OK(corpus.open_memory(runtime, with_lines, as(TextFormat::text, 0.1)));
    CHECK(collect(corpus, Part::validation).all == "d\n" + string(95, 'e'));
    CHECK_OK(corpus.open_memory(runtime, with_spaces, as(TextFormat::text, 0.1)));
    CHECK(collect(corpus, Part::validation).all == " d " + string(95, 'e'));
    string kana;
    for (int i = 0; i < 333; ++i) kana += "\xe3\x81\x82";
    CHECK_OK(corpus.open_memory(runtime, kana, as(TextFormat::text, 0.1)));
    CHECK(collect(corpus, Part::validation).all.size() == 99 && corpus.training_bytes % 3 == 0);
    CorpusConfig limited = as(TextFormat::text, 0.5);  // each evaluation reads it all
    limited.validation_limit = 100;
    CHECK_OK(corpus.open_memory(runtime, with_lines, limited));
    CHECK(collect(corpus, Part::validation).all == "d\n" + string(95, 'e'));
    limited.validation_limit = 100000;
    CHECK_OK(corpus.open_memory(runtime, with_lines, limited));
    CHECK(collect(corpus, Part::validation).all.size() > 100);
    CHECK_OK(corpus.open_memory(runtime, "short", as(TextFormat::text, 0)));
    CHECK(corpus.training_bytes == 5 && collect(corpus, Part::validation).all.empty());
    CHECK(opened(runtime, "text", as(TextFormat::text, 1)).error == Error::invalid_argument);
    CHECK(opened(runtime, "text", as(TextFormat::text, -0.1)).error == Error::invalid_argument);
    CHECK(opened(runtime, "text", as(TextFormat::text, NAN)).error == Error::invalid_argument);
}

// ---- pieces -------------------------------------------------------------------------------------------------------------------

TEST(pieces_have_the_ids_of_the_whole, "long texts would get other tokens than short ones") {
    Runtime runtime;
    const string text = random_text(5 << 20) + string(3 << 20, 'x') + random_text(1 << 20);
    Tokenizer bpe, bytes;
    TokenizerConfig how;
    how.vocab = 400;
    CHECK_OK(bytes.create_bytes(runtime));
    CHECK_OK(bpe.train(runtime, how, Text(text.data(), 200000)));
    Corpus corpus;
    CHECK_OK(corpus.open_memory(runtime, text, as(TextFormat::text, 0)));
    const Collected all = collect(corpus);
    CHECK(all.all == text && all.pieces.size() > 3);
    const Tokenizer* const tokenizers[] = {&bytes, &bpe};
    for (const Tokenizer* tokenizer : tokenizers) {
        vector<int32_t> ids;
        for (const string& piece : all.pieces) {
            const vector<int32_t> more = encode(*tokenizer, piece);
            ids.insert(ids.end(), more.begin(), more.end());
        }
        CHECK(ids == encode(*tokenizer, text));
    }
}

TEST(endless_words_stay_bounded, "a file without white space would need memory for all of it, or never end") {
    Runtime runtime;
    Disk disk;
    disk.lend(runtime);
    Heap memory;
    memory.lend(runtime);
    string& text = disk.files["a.txt"];
    while (text.size() < 100 << 20) text += "\xe3\x81\x82";
    const Text paths[] = {"a.txt"};
    {
        Corpus corpus;
        CHECK_OK(corpus.open(runtime, paths, as(TextFormat::text, 0)));
        CHECK(corpus.bytes == text.size());
        size_t most = 0;
        struct Check {
            size_t* most;
            static bool take(void* user, Text piece, bool) {
                *static_cast<Check*>(user)->most = std::max(*static_cast<Check*>(user)->most, piece.size);
                return (static_cast<unsigned char>(piece[0]) & 0xc0) != 0x80;
            }
        } check{&most};
        CHECK_OK(corpus.read(Part::all, Check::take, &check));
        CHECK(most <= 64 << 20 && memory.peak < size_t(220) << 20);
    }
    CHECK(memory.now == 0);
}

// ---- windows ------------------------------------------------------------------------------------------------------------------

static vector<int32_t> counting(size_t n) {
    vector<int32_t> ids(n);
    for (size_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i);
    return ids;
}

TEST(an_epoch_visits_every_window_once, "training would repeat some text and never see other") {
    Runtime runtime;
    const vector<int32_t> ids = counting(1000);
    Data data;
    CHECK_OK(data.create(runtime, ids));
    for (int context : {1, 7, 64, 499, 999}) {
        const uint64_t windows = data.windows(context);
        CHECK(windows == std::max<uint64_t>(1, (1000 - static_cast<uint64_t>(context)) / static_cast<uint64_t>(context)));
        std::set<vector<int32_t>> orders;
        std::set<int32_t> phases;
        for (uint64_t epoch = 0; epoch < 20; ++epoch) {
            vector<int32_t> starts, x(static_cast<size_t>(context)), y(x);
            for (uint64_t i = 0; i < windows; ++i) {
                CHECK_OK(data.training_window(5, epoch * windows + i, context, x.data(), y.data()));
                for (int t = 0; t < context; ++t) CHECK(x[static_cast<size_t>(t)] == x[0] + t && y[static_cast<size_t>(t)] == x[0] + t + 1);
                starts.push_back(x[0]);
            }
            orders.insert(starts);
            std::sort(starts.begin(), starts.end());
            for (size_t i = 1; i < starts.size(); ++i) CHECK(starts[i] == starts[i - 1] + context);
            phases.insert(starts[0]);
            CHECK(starts[0] < context);
        }
        if (context > 1 && context < 900) CHECK(phases.size() > (context < 10 ? 4 : 10));
        if (windows > 10) CHECK(orders.size() == 20);
    }
    int32_t x[2000], y[2000];
    CHECK(data.windows(1000) == 0 && data.windows(0) == 0 && data.windows(-1) == 0);
    const Status status = data.training_window(5, 0, 1000, x, y);
    CHECK(status.error == Error::invalid_argument && has(status, "1000 tokens") && has(status, "1001"));
    const int32_t negative[] = {1, -1};
    CHECK(data.create(runtime, negative).error == Error::invalid_argument);
}

TEST(the_order_is_random, "windows would be seen in nearly their order, or an order would favour some") {
    Runtime runtime;
    const vector<int32_t> ids = counting(20);
    Data data;
    CHECK_OK(data.create(runtime, ids));
    const uint64_t windows = data.windows(2);  // 9
    int seen[9][9] = {};
    for (uint64_t epoch = 0; epoch < 9000; ++epoch)
        for (uint64_t i = 0; i < windows; ++i) {
            int32_t x[2], y[2];
            CHECK_OK(data.training_window(1, epoch * windows + i, 2, x, y));
            ++seen[i][x[0] / 2];
        }
    for (auto& row : seen)
        for (int count : row) CHECK(count > 850 && count < 1150);  // 1000 on average, 30 the deviation
}

TEST(windows_do_not_depend_on_where_the_ids_lie, "a resumed run with a token cache or less memory would see other data") {
    Runtime runtime;
    Disk disk;
    disk.lend(runtime);
    for (int i = 0; i < 3; ++i) {
        string& lines = disk.files["a" + std::to_string(i) + ".jsonl"];
        while (lines.size() < 150000) {
            string text = random_text(random_below(4000));
            string escaped;
            for (char c : text) {
                if (c == '\n') escaped += "\\n";
                else if (c == '\t') escaped += "\\t";
                else escaped += c;
            }
            lines += "{\"text\":\"" + escaped + "\"}\n";
        }
    }
    const Text paths[] = {"a0.jsonl", "a1.jsonl", "a2.jsonl"};
    Corpus corpus;
    CHECK_OK(corpus.open(runtime, paths));
    Tokenizer bytes, bpe;
    TokenizerConfig how;
    how.vocab = 300;
    CHECK_OK(bytes.create_bytes(runtime));
    CHECK_OK(bpe.train(runtime, how, corpus));
    CHECK(bpe.end_of_text >= 0);
    for (int kind = 0; kind < 4; ++kind) {
        const Tokenizer& tokenizer = kind ? bpe : bytes;
        if (kind >= 2) bpe.begin_of_text = kind == 2 ? 7 : bpe.end_of_text;  // 3: one token between documents, not two
        vector<int32_t> expected;
        uint64_t separators = 0;
        for (const string& document : collect(corpus, Part::training).documents) {
            const vector<int32_t> more = encode(tokenizer, document), blank = encode(tokenizer, "\n\n");
            if (kind >= 2) expected.push_back(bpe.begin_of_text);
            expected.insert(expected.end(), more.begin(), more.end());
            if (kind == 3) continue;
            if (kind) expected.push_back(bpe.end_of_text);
            else expected.insert(expected.end(), blank.begin(), blank.end()), separators += 2;
        }
        Data host, memory, small, file, small_file;
        CHECK_OK(host.create(runtime, expected));
        CHECK_OK(memory.create(runtime, corpus, Part::training, tokenizer));
        CHECK_OK(small.create(runtime, corpus, Part::training, tokenizer, "", 100000));
        CHECK_OK(file.create(runtime, corpus, Part::training, tokenizer, "ids.cache"));
        const string old = disk.files["ids.cache"];
        disk.files["small.cache"] = "not trusted" + old.substr(old.size() - 40);
        CHECK_OK(small_file.create(runtime, corpus, Part::training, tokenizer, "small.cache", 100000));
        CHECK(memory.tokens == expected.size() && memory.bytes == corpus.training_bytes + separators && memory.unknown == 0);
        CHECK(disk.files["ids.cache"] == disk.files["small.cache"] && disk.files["ids.cache"].size() == 2 * expected.size() + 40);
        Data refused;
        disk.files["precious"] = string(100, 'x');
        CHECK(refused.create(runtime, corpus, Part::training, tokenizer, "precious").error == Error::invalid_argument);
        CHECK(disk.files["precious"] == string(100, 'x') && refused.tokens == 0);
        disk.files.erase("precious");
        Data* const all[] = {&host, &memory, &small, &file, &small_file};
        const int context = 100;
        const uint64_t windows[] = {memory.windows(context), small.windows(context)};
        CHECK(expected.size() > 3 << 16 && windows[1] > 0 && windows[1] <= windows[0]);
        for (Data* data : all) {
            CHECK(data->fingerprint == host.fingerprint && data->tokens == host.tokens);
            CHECK(data->windows(context) == windows[data == &small || data == &small_file]);
        }
        int32_t x[5][100], y[5][100];
        for (uint64_t n = 0; n < 2 * windows[0]; ++n) {
            for (int i = 0; i < 5; ++i)
                if (i != 2 || n % 16 < 2 || n < windows[1]) CHECK_OK(all[i]->training_window(9, n, context, x[i], y[i]));
            for (int i : {1, 3}) CHECK(!memcmp(x[0], x[i], sizeof x[0]) && !memcmp(y[0], y[i], sizeof y[0]));
            if (n < windows[1]) CHECK(!memcmp(x[2], x[4], sizeof x[2]) && !memcmp(y[2], y[4], sizeof y[2]));
        }
        // Out of turn, too.
        for (int i = 0; i < 20; ++i) {
            const uint64_t n = random_below(static_cast<uint32_t>(3 * windows[1]));
            CHECK_OK(small.training_window(9, n, context, x[2], y[2]));
            CHECK_OK(small_file.training_window(9, n, context, x[4], y[4]));
            CHECK(!memcmp(x[2], x[4], sizeof x[2]) && !memcmp(y[2], y[4], sizeof y[2]));
        }
        // An epoch of groups: each window once.
        std::map<vector<int32_t>, int> seen;
        for (uint64_t n = 0; n < windows[1]; ++n) {
            CHECK_OK(small_file.training_window(9, n, context, x[4], y[4]));
            ++seen[vector<int32_t>(x[4], x[4] + context)];
        }
        CHECK(seen.size() == windows[1]);
        for (Data* data : all) {
            vector<int32_t> read(1, expected[0]);
            for (uint64_t n = 0; n < data->evaluation_windows(1000); ++n) {
                int32_t ids[1000], targets[1000];
                int length = 0;
                CHECK_OK(data->evaluation_window(n, 1000, ids, targets, length));
                CHECK(ids[0] == read.back() && !memcmp(ids + 1, targets, sizeof(int32_t) * static_cast<size_t>(length - 1)));
                read.insert(read.end(), targets, targets + length);
            }
            CHECK(read == expected);  // every token but the first is a target once
        }
    }
    CHECK(collect(corpus, Part::training).all.size() == corpus.training_bytes);
}

TEST(evaluation_windows_cover_the_text, "a validation loss would leave out or repeat some tokens") {
    Runtime runtime;
    for (size_t n = 0; n < 40; ++n)
        for (int context = 1; context < 12; ++context) {
            const vector<int32_t> ids = counting(n);
            Data data;
            CHECK_OK(data.create(runtime, ids));
            vector<int> seen(n + 1);
            const uint64_t windows = data.evaluation_windows(context);
            int32_t x[16], y[16];
            int length;
            for (uint64_t w = 0; w < windows; ++w) {
                CHECK_OK(data.evaluation_window(w, context, x, y, length));
                CHECK(length == context || (w + 1 == windows && length > 0 && length < context));
                for (int t = 0; t < length; ++t) CHECK(y[t] == x[t] + 1), ++seen[static_cast<size_t>(y[t])];
            }
            for (size_t i = 1; i < n; ++i) CHECK(seen[i] == 1);
            CHECK(data.evaluation_window(windows, context, x, y, length).error == Error::invalid_argument);
        }
}

TEST(answers_alone, "a chat would learn what its user says, or miss a part of its own lines, or differ with where the ids lie") {
    const string turn = "Mira: ";
    string text;
    for (unsigned n = 0, random = 7; text.size() < 240000; ++n) {
        random = random * 1664525u + 1013904223u;
        const char* const lines[] = {"You: who are you",
                                     "Mira: I am Mira: the innkeeper.",
                                     "Mira:no blank, no answer",
                                     "Borin: Mira: is hers",
                                     "Mira: G\xc3\xbcle g\xc3\xbcle!",
                                     "Mira: ",
                                     " Mira: not at the beginning",
                                     "Mi"};
        text += lines[random >> 24 & 7];
        text += (random >> 20 & 7) == 0 ? "\n\n" : "\n";
    }
    text += "You: bye\nMira: Bye";
    string stream = text + "\n\n";  // with what stands between documents
    vector<bool> answers(stream.size());
    for (size_t at = 0, end; at < stream.size(); at = end + 1) {
        end = stream.find('\n', at);
        if (stream.compare(at, turn.size(), turn) == 0)
            for (size_t i = at + turn.size(); i <= end; ++i) answers[i] = true;
    }
    Disk disk;
    Runtime runtime;
    disk.lend(runtime);
    CorpusConfig how;
    how.split_documents = true, how.validation_fraction = 0;
    for (const char* kind : {"byte", "char", "bpe:400"}) {
        TokenizerConfig config;
        Corpus corpus;
        Tokenizer tokenizer;
        CHECK_OK(parse_tokenizer(kind, config));
        CHECK_OK(corpus.open_memory(runtime, text, how));
        CHECK_OK(tokenizer.train(runtime, config, corpus));
        Data memory, groups, file, all;
        CHECK_OK(memory.create(runtime, corpus, Part::all, tokenizer, Text(), 1 << 30, turn));
        CHECK_OK(groups.create(runtime, corpus, Part::all, tokenizer, Text(), 100000, turn));
        CHECK_OK(file.create(runtime, corpus, Part::all, tokenizer, "ids.cache", 100000, turn));
        CHECK_OK(all.create(runtime, corpus, Part::all, tokenizer));
        CHECK(all.learnt == all.tokens && all.fingerprint != memory.fingerprint && all.tokens == memory.tokens);
        CHECK(groups.fingerprint == memory.fingerprint && file.fingerprint == memory.fingerprint);
        const int context = 61;
        int32_t ids[4][61], targets[4][61];
        size_t at = 0;  // in the stream
        uint64_t learnt = 0;
        bool good = true;
        for (uint64_t n = 0; n < memory.evaluation_windows(context); ++n) {
            int length[4];
            Data* const each[] = {&memory, &groups, &file, &all};
            for (int i = 0; i < 4; ++i) CHECK_OK(each[i]->evaluation_window(n, context, ids[i], targets[i], length[i]));
            const size_t size = static_cast<size_t>(length[0]) * sizeof(int32_t);
            for (int i = 1; i < 4; ++i) good = good && length[i] == length[0] && memcmp(ids[0], ids[i], size) == 0;
            good = good && memcmp(targets[0], targets[1], size) == 0 && memcmp(targets[0], targets[2], size) == 0;
            for (int i = 0; i < length[0]; ++i) {
                const auto bytes = [&](int32_t id) { return id == tokenizer.end_of_text ? size_t(2) : tokenizer.bytes(id).size; };
                at += bytes(ids[3][i]);
                bool answer = false;
                for (size_t k = at; k < at + bytes(targets[3][i]) && k < stream.size(); ++k) answer = answer || answers[k];
                good = good && targets[0][i] == (answer ? targets[3][i] : -1);
                learnt += answer;
            }
        }
        CHECK(good && learnt > 1000 && learnt < memory.tokens / 2);
        CHECK(memory.learnt == learnt && groups.learnt == learnt);
        for (uint64_t n = 0; n < memory.windows(context) && good; n += 97) {  // the order of training is that of all text
            CHECK_OK(memory.training_window(5, n, context, ids[0], targets[0]));
            CHECK_OK(groups.training_window(5, n, context, ids[1], targets[1]));
            CHECK_OK(file.training_window(5, n, context, ids[2], targets[2]));
            CHECK_OK(all.training_window(5, n, context, ids[3], targets[3]));
            good = memcmp(ids[0], ids[3], sizeof ids[0]) == 0 && memcmp(ids[1], ids[2], sizeof ids[0]) == 0 &&
                   memcmp(targets[1], targets[2], sizeof ids[0]) == 0;
            for (int i = 0; i < context; ++i) good = good && (targets[0][i] == targets[3][i] || targets[0][i] == -1);
        }
        CHECK(good);
        const Status none = memory.create(runtime, corpus, Part::all, tokenizer, Text(), 1 << 30, "Smith: ");
        CHECK(none.error == Error::invalid_argument && strstr(none.message, "Smith: "));
    }
}

TEST(fingerprints_tell_data_apart, "a run could be resumed on other data") {
    Runtime runtime;
    const int32_t a[] = {1, 2, 3}, b[] = {1, 3, 2}, c[] = {1, 2, 3, 0}, d[] = {1, 2, 3};
    Data data[4];
    CHECK_OK(data[0].create(runtime, a));
    CHECK_OK(data[1].create(runtime, b));
    CHECK_OK(data[2].create(runtime, c));
    CHECK_OK(data[3].create(runtime, d));
    CHECK(data[0].fingerprint != data[1].fingerprint && data[0].fingerprint != data[2].fingerprint);
    CHECK(data[0].fingerprint == data[3].fingerprint);
    Data moved(static_cast<Data&&>(data[0]));
    CHECK(moved.tokens == 3 && data[0].tokens == 0 && data[0].windows(1) == 0 && moved.windows(1) == 2);
}

// ---- the n-gram baseline --------------------------------------------------------------------------------------------------------

// The formula, word for word.
static double naive_probability(const vector<int32_t>& text, const int32_t* history, int length, int32_t next, int vocab) {
    const double shorter = length == 0 ? 1.0 / vocab : naive_probability(text, history + 1, length - 1, next, vocab);
    int count = 0, pair = 0;
    std::set<int32_t> kinds;
    for (size_t i = static_cast<size_t>(length); i < text.size(); ++i) {
        if (!std::equal(history, history + length, text.begin() + static_cast<long>(i) - length)) continue;
        ++count;
        pair += text[i] == next;
        kinds.insert(text[i]);
    }
    const double t = static_cast<double>(kinds.size());
    return count == 0 ? shorter : (pair + t * shorter) / (count + t);
}

TEST(ngrams_follow_the_formula, "the scoreboard beside every loss would be wrong") {
    // "abab" then "ab": order 1: P(a) = (2 + 2/3) / 6 = 4/9 = P(b) with vocabulary 3; order 2: P(b | a) = (2 + 4/9) / 3 = 22/27.
    Runtime runtime;
    const int32_t abab[] = {0, 1, 0, 1}, ab[] = {0, 1};
    Data on_abab, on_ab;
    CHECK_OK(on_abab.create(runtime, abab));
    CHECK_OK(on_ab.create(runtime, ab));
    NgramResult hand;
    CHECK_OK(ngram_baseline(runtime, on_abab, on_ab, 3, hand));
    CHECK(fabs(hand.loss_by_order[1] + log(4.0 / 9)) < 1e-12 && fabs(hand.loss_by_order[2] + log(22.0 / 27)) < 1e-12);
    CHECK(hand.loss_by_order[3] == hand.loss_by_order[2] && hand.order == 2 && hand.training_tokens == 4);

    for (int vocab : {2, 5, 70000}) {
        vector<int32_t> training, validation;
        const auto any = [&] { return static_cast<int32_t>(random_below(static_cast<uint32_t>(vocab))); };
        for (int i = 0; i < 300; ++i) training.push_back(random_below(2) ? static_cast<int32_t>(random_below(2)) : any());
        for (size_t i = 0; i < 60; ++i) validation.push_back(random_below(4) ? training[i + 100] : any());
        Data from, on;
        CHECK_OK(from.create(runtime, training));
        CHECK_OK(on.create(runtime, validation));
        NgramResult result;
        CHECK_OK(ngram_baseline(runtime, from, on, vocab, result));
        for (int order = 1; order <= 8; ++order) {
            double sum = 0;
            for (int i = 1; i < 60; ++i) {
                const int length = std::min(order - 1, i);
                sum -= log(naive_probability(training, validation.data() + i - length, length, validation[static_cast<size_t>(i)], vocab));
            }
            CHECK(fabs(result.loss_by_order[order] - sum / 59) < 1e-9);
        }
        CHECK(result.loss == result.loss_by_order[result.order]);
    }
    NgramResult result;
    CHECK(ngram_baseline(runtime, on_abab, on_ab, 1, result).error == Error::mismatch);
    CHECK(ngram_baseline(runtime, on_abab, on_ab, 3, result, 9).error == Error::invalid_argument);
    Data empty;
    CHECK(ngram_baseline(runtime, empty, on_ab, 3, result).error == Error::invalid_argument);
}

TEST(ngrams_that_predict, "the n-gram model would be another one than the baseline, or be judged in another way than a GPT") {
    Runtime runtime;
    for (int vocab : {1, 2, 5, 300}) {
        vector<int32_t> training, validation;
        const auto any = [&] { return static_cast<int32_t>(random_below(static_cast<uint32_t>(vocab))); };
        for (int i = 0; i < 400; ++i)
            training.push_back(random_below(3) ? std::min(vocab - 1, static_cast<int32_t>(random_below(2))) : any());
        for (size_t i = 0; i < 80; ++i) validation.push_back(random_below(4) ? training[i + 100] : any());
        validation.back() = training.back();  // what only the text's end was seen with
        Data from, on;
        CHECK_OK(from.create(runtime, training));
        CHECK_OK(on.create(runtime, validation));
        NgramResult counted;
        CHECK_OK(ngram_baseline(runtime, from, on, vocab, counted));
        for (int order = 1; order <= 8; ++order) {
            Ngram model;
            CHECK_OK(model.create(runtime, from, vocab, order));
            vector<double> p(static_cast<size_t>(vocab));
            double worst = 0, top1 = 0, top5 = 0;
            for (int i = 0; i < 80; ++i) {
                const int length = std::min(order - 1, i);
                CHECK_OK(model.predict(Span<const int32_t>(validation.data(), static_cast<size_t>(i)), p));
                double sum = 0;
                int better = 0;
                const int32_t next = validation[static_cast<size_t>(i)];
                for (int32_t id = 0; id < vocab; ++id) {
                    const double mine = p[static_cast<size_t>(id)];
                    sum += mine;
                    better += mine > p[static_cast<size_t>(next)] || (id < next && mine >= p[static_cast<size_t>(next)]);
                    if (i % 8 == 0)
                        worst =
                            std::max(worst, fabs(mine - naive_probability(training, validation.data() + i - length, length, id, vocab)));
                }
                worst = std::max(worst, fabs(sum - 1));
                if (i > 0) top1 += better < 1, top5 += better < 5;
            }
            CHECK(worst < 1e-12);
            for (const int threads : {1, 3}) {
                Runtime other;
                other.threads = threads;
                Evaluation result;
                CHECK_OK(evaluate(other, model, on, result));
                CHECK(fabs(result.loss - counted.loss_by_order[order]) < 1e-12 && result.tokens == 79);
                CHECK(fabs(result.perplexity - exp(result.loss)) < 1e-9 * result.perplexity);
                CHECK(fabs(result.top1 - top1 / 79) < 1e-12 && fabs(result.top5 - top5 / 79) < 1e-12);
            }
        }
    }
    const int32_t ids[] = {0, 1, 2};
    Data data;
    CHECK_OK(data.create(runtime, ids));
    Ngram model, moved;
    double p[3];
    Evaluation result;
    CHECK(model.predict(Span<const int32_t>(), p).error == Error::invalid_argument);
    CHECK(evaluate(runtime, model, data, result).error == Error::invalid_argument);
    CHECK(model.create(runtime, data, 2, 2).error == Error::mismatch && !model.state);
    CHECK(model.create(runtime, data, 3, 9).error == Error::invalid_argument);
    CHECK(model.create(runtime, data, 3, 0).error == Error::invalid_argument);
    CHECK_OK(model.create(runtime, data, 3, 2));
    moved = static_cast<Ngram&&>(model);
    CHECK(moved.predict(Span<const int32_t>(), Span<double>(p, 2)).error == Error::no_room);
    const int32_t wrong[] = {3};
    CHECK(moved.predict(wrong, p).error == Error::invalid_argument);
    Example example;
    example.ids = Span<const int32_t>(ids, 3);
    Data examples;
    CHECK_OK(examples.create(runtime, Span<const Example>(&example, 1)));
    CHECK(moved.create(runtime, examples, 3, 2).error == Error::invalid_argument);
}

static bool near(double value, double published) { return fabs(value - published) < 0.0015; }

TEST(ngrams_on_shakespeare, "the scoreboard would not be the published one") {
    Runtime runtime;
    const Text paths[] = {"../shared/data/text/tinyshakespeare.txt"};
    Corpus corpus;
    if (!corpus.open(runtime, paths).ok()) SKIP("../shared is not here");
    Tokenizer tokenizer;
    TokenizerConfig how;
    how.kind = TokenizerKind::characters;
    CHECK_OK(tokenizer.train(runtime, how, corpus));
    Data training, validation;
    CHECK_OK(training.create(runtime, corpus, Part::training, tokenizer));
    CHECK_OK(validation.create(runtime, corpus, Part::validation, tokenizer));
    NgramResult result;
    CHECK_OK(ngram_baseline(runtime, training, validation, tokenizer.vocab, result));
    const double published[] = {0, 3.347, 2.486, 2.049, 1.774, 1.669};
    for (int order = 1; order <= 5; ++order) CHECK(near(result.loss_by_order[order], published[order]));
    CHECK(result.order >= 5);
    Ngram bigrams;
    Evaluation evaluation;
    CHECK_OK(bigrams.create(runtime, training, tokenizer.vocab, 2));
    CHECK_OK(evaluate(runtime, bigrams, validation, evaluation));
    CHECK(near(evaluation.loss, 2.486) && evaluation.top1 > 0.2 && evaluation.top5 > evaluation.top1);
}

TEST(ngrams_on_dialogsum, "the scoreboard would not be the published one") {
    Runtime runtime;
    const Text train[] = {"../shared/data/dialogsum/dialogsum.train.jsonl"}, dev[] = {"../shared/data/dialogsum/dialogsum.dev.jsonl"};
    CorpusConfig config;
    config.field = "dialogue";
    config.validation_fraction = 0;
    Corpus from, on;
    if (!from.open(runtime, train, config).ok()) SKIP("../shared is not here");
    CHECK_OK(on.open(runtime, dev, config));
    CHECK(from.documents == 12460 && on.documents == 500);
    Tokenizer tokenizer;
    TokenizerConfig how;
    how.kind = TokenizerKind::characters;
    CHECK_OK(tokenizer.train(runtime, how, from));
    Data training, validation;
    CHECK_OK(training.create(runtime, from, Part::all, tokenizer));
    CHECK_OK(validation.create(runtime, on, Part::all, tokenizer));
    NgramResult result;
    CHECK_OK(ngram_baseline(runtime, training, validation, tokenizer.vocab, result));
    const double published[] = {1.110, 1.032, 0.998, 0.990};
    for (int order = 5; order <= 8; ++order) CHECK(near(result.loss_by_order[order], published[order - 5]));
    CHECK(result.order == 8);
}

// ---- hostile bytes, memory and disk -----------------------------------------------------------------------------------------------

TEST(damaged_tables_are_an_error_or_text, "a damaged file could crash or hang the host") {
    Runtime runtime;
    Heap memory;
    memory.lend(runtime);
    string csv = "id,text,topic\r\n", jsonl;
    for (int i = 0; i < 40; ++i) {
        csv += std::to_string(i) + ",\"a \"\"word\"\", a\nline\",plain " + std::to_string(i) + "\r\n";
        jsonl += "{\"id\":" + std::to_string(i) + ",\"text\":\"a \\\"word\\\" \\u00e9\\n\",\"list\":[1,2.5e3,{\"x\":null}],\"ok\":true}\n";
    }
    Tokenizer tokenizer;
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 257}, "xy"));
    const uint64_t held = memory.now;
    string tsv;
    for (int i = 0; i < 40; ++i) tsv += "source " + std::to_string(i) + "\ttarget" + (i % 2 ? "\n" : "\r\n");
    for (int kind = 0; kind < 3; ++kind) {
        const string& whole = kind == 2 ? tsv : kind ? csv : jsonl;
        const CorpusConfig config = as(kind == 2 ? TextFormat::tsv : kind ? TextFormat::csv : TextFormat::jsonl, 0.1);
        const auto check = [&](const string& bytes) {
            Corpus corpus;
            const Status status = corpus.open_memory(runtime, bytes, config);
            if (!status.ok()) {
                CHECK(status.error == Error::bad_file && status.message[0] != '\0');
                return;
            }
            CHECK(collect(corpus, Part::training).all.size() + collect(corpus, Part::validation).all.size() == corpus.bytes);
            if (kind < 2) return;
            Data pairs;
            const Status read = pairs.create_pairs(runtime, corpus, Part::training, tokenizer, 16);
            CHECK(read.ok() || read.error == Error::bad_file || read.error == Error::invalid_argument);
        };
        check(whole);
        for (size_t cut = 0; cut < whole.size(); ++cut) check(whole.substr(0, cut));
        static const char special[] = "\"\\,\r\n{}[]:u\t\0\xff";
        for (int round = 0; round < 20000; ++round) {
            string bytes = whole;
            for (uint32_t n = 1 + random_below(4); n > 0; --n) {
                const size_t at = random_below(static_cast<uint32_t>(bytes.size()));
                switch (random_below(4)) {
                    case 0:
                        bytes[at] = static_cast<char>(random_below(256));
                        break;
                    case 1:
                        bytes[at] = special[random_below(sizeof special - 1)];
                        break;
                    case 2:
                        bytes.erase(at, random_below(20));
                        break;
                    default:
                        bytes.insert(at, 1, special[random_below(sizeof special - 1)]);
                }
                if (bytes.empty()) bytes = "x";
            }
            check(bytes);
        }
        CHECK(memory.now == held && memory.peak < 64 * whole.size() + 100000 + held);
    }
}

TEST(damaged_real_files, "a download that broke off could crash or hang the host") {
    struct {
        const char* path;
        TextFormat format;
    } const files[] = {{"../shared/data/dialogsum/dialogsum.dev.jsonl", TextFormat::jsonl},
                       {"../shared/data/dialogsum/validation.csv", TextFormat::csv},
                       {"../shared/data/parallel/tur-eng_manythings.tsv", TextFormat::tsv}};
    for (const auto& file : files) {
        FILE* f = fopen(file.path, "rb");
        if (!f) SKIP("../shared is not here");
        string whole;
        char buffer[65536];
        for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) whole.append(buffer, n);
        fclose(f);
        CorpusConfig config;
        config.format = file.format;
        if (file.format != TextFormat::tsv) (file.format == TextFormat::csv ? config.column : config.field) = "dialogue";
        Runtime runtime;
        Heap memory;
        memory.lend(runtime);
        int good = 0;
        for (int round = 0; round < 1000; ++round) {
            const std::vector<char> bytes(whole.begin(), whole.begin() + random_below(static_cast<uint32_t>(whole.size())));
            Corpus corpus;
            const Status status = corpus.open_memory(runtime, Text(bytes.data(), bytes.size()), config);
            good += status.ok();
            if (!CHECK(status.ok() || (status.error == Error::bad_file && status.message[0] != '\0'))) return;
        }
        CHECK(good < 1000 || file.format == TextFormat::tsv);  // a shorter line is a line
        CHECK(memory.now == 0 && memory.peak < 64 * whole.size() + 100000);
    }
}

TEST(lost_file, "a file that went away while it is trained on would crash where it is asked for again") {
    Runtime runtime;
    Disk disk;
    disk.lend(runtime);
    disk.files["one.txt"] = random_text(100000), disk.files["two.txt"] = random_text(100000);
    const Text paths[] = {"one.txt", "two.txt"};
    Corpus corpus;
    Tokenizer tokenizer;
    Data data;
    CHECK_OK(corpus.open(runtime, paths));
    CHECK_OK(tokenizer.create_bytes(runtime));
    CHECK_OK(data.create(runtime, corpus, Part::all, tokenizer, "", 1000));
    const uint64_t last = data.evaluation_windows(64) - 1;
    int32_t x[64], y[64];
    int length;
    CHECK_OK(data.evaluation_window(last, 64, x, y, length));
    CHECK_OK(data.evaluation_window(0, 64, x, y, length));
    const string two = disk.files["two.txt"];
    disk.files.erase("two.txt");
    for (int i = 0; i < 2; ++i) CHECK(data.evaluation_window(last, 64, x, y, length).error == Error::cannot_open);
    CHECK_OK(data.evaluation_window(0, 64, x, y, length));
    disk.files["two.txt"] = two;
    CHECK_OK(data.evaluation_window(last, 64, x, y, length));
}

TEST(every_allocation_may_fail, "a host without memory would crash or lose what it had") {
    Runtime runtime;
    runtime.threads = 1;
    Heap memory;
    memory.lend(runtime);
    Disk disk;
    disk.lend(runtime);
    disk.files["a.csv"] = "id,text\n1,\"some \"\"text\"\"\"\n2,more of it\n";
    disk.files["b.jsonl"] = "{\"text\":\"and more\",\"x\":1}\n{\"text\":\"the end of it\"}\n";
    disk.files["c.txt"] = random_text(70000);
    disk.files["d.tsv"] = "one\tuno\ntwo\tdos\n";
    const Text paths[] = {"a.csv", "b.jsonl", "c.txt"};
    const auto all = [&](int kind) {
        const char* cache = kind == 2 ? "ids" : "";
        const uint64_t limit = kind == 1 ? 1000 : 1 << 20;
        Corpus corpus;
        Status status = corpus.open(runtime, paths);
        Tokenizer tokenizer;
        if (status.ok()) status = tokenizer.create_bytes(runtime);
        Data training, validation;
        if (status.ok()) status = training.create(runtime, corpus, Part::all, tokenizer, cache, limit);
        if (status.ok()) status = validation.create(runtime, corpus, Part::validation, tokenizer);
        int32_t x[64], y[64];
        for (uint64_t n = 0; n < 20 && status.ok(); n += 5) status = training.training_window(1, n, 64, x, y);
        if (kind != 0) return status;  // what follows is the same for all kinds
        NgramResult result;
        if (status.ok()) status = ngram_baseline(runtime, training, validation, 256, result, 2);
        Ngram model;
        Evaluation evaluation;
        if (status.ok()) status = model.create(runtime, training, 256, 3);
        if (status.ok()) status = evaluate(runtime, model, validation, evaluation);
        const Text table = "d.tsv";
        if (status.ok()) status = corpus.open(runtime, Span<const Text>(&table, 1));
        if (status.ok()) status = tokenizer.train(runtime, {TokenizerKind::bpe, 257}, "xy");
        if (status.ok()) status = training.create_pairs(runtime, corpus, Part::training, tokenizer, 8);
        return status;
    };
    const string old = "the old one" + string("babytok") + string(33, '\0');
    for (int kind = 0; kind < 3; ++kind) {
        memory.fail_at = -1;
        CHECK_OK(all(kind));
        int failed = 0;
        for (memory.fail_at = 0; memory.fail_at < 100000; ++memory.fail_at) {
            memory.calls = 0;
            const Status status = all(kind);
            CHECK(memory.now == 0 && disk.handles == 0);
            if (status.ok()) break;
            CHECK(status.error == Error::out_of_memory);
            ++failed;
        }
        CHECK(failed > 20 && failed < 100000);
        memory.fail_at = -1;
        for (disk.fail_at = 0; disk.fail_at < 100000; ++disk.fail_at) {
            disk.calls = 0;
            disk.files["ids"] = old;
            const Status status = all(kind);
            CHECK(memory.now == 0 && disk.handles == 0 && !disk.files.count("ids.tmp"));
            if (status.ok()) break;
            CHECK(status.error == Error::cannot_open || status.error == Error::cannot_read || status.error == Error::cannot_write);
            CHECK(disk.files["ids"] == old || kind == 2);
        }
        disk.fail_at = -1;
    }
}

TEST(text_of_any_size_in_bounded_memory, "a file of some gigabytes would need as much memory") {
    Runtime runtime;
    Heap memory;
    memory.lend(runtime);
    Disk disk;
    disk.lend(runtime);
    string& text = disk.files["a.txt"];
    const string some = random_text(1 << 20);
    while (text.size() < 40 << 20) text += some;
    const Text paths[] = {"a.txt"};
    Corpus corpus;
    Tokenizer tokenizer;
    CHECK_OK(tokenizer.create_bytes(runtime));
    CHECK_OK(corpus.open(runtime, paths));
    Data data;
    CHECK_OK(data.create(runtime, corpus, Part::training, tokenizer, "", 16 << 20));
    int32_t x[64], y[64];
    for (uint64_t n = 0; n < 30; ++n) CHECK_OK(data.training_window(1, n * data.windows(64) / 30, 64, x, y));
    CHECK(memory.peak < 32 << 20);
}

int main(int count, char** words) { return run_tests(count, words); }
