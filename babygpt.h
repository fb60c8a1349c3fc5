// babygpt.h - tokenize text, train a small GPT and talk to it: one C++17 header, no packages. MIT licence (chapter 12).
//
// [CHAPTER 0] Read me
//
// What it is.  A whole language model in one file: byte-level BPE, BERT's WordPiece, SentencePiece's unigram model, byte and character
// tokenizers; decoders of GPT-2's and Llama's type, encoder-decoders and encoders; training with AdamW or Muon, LoRA adapters; generation
// with a KV cache, from f32, bf16 or int8; checkpoints that Python reads (safetensors), llama.cpp's GGUF. It is made for models of up to some
// ten million parameters on the cores of an ordinary computer, for programs that include it, and for people who want to read how it works.
// What it is not.  A runner for large models, or a wrapper around anything: it depends on the C library and the system's threads.
//
// Do this.  In exactly one source file:
//
//     #define BABYGPT_IMPLEMENTATION
//     #include "babygpt.h"
//
// and in the others only the #include. Compile with any C++17 compiler (GCC 9, Clang 10 or newer):
//
//     g++ -std=c++17 -O2 -pthread program.cpp -o program
//
// No flag is needed for speed: the kernels for AVX2, AVX-512 and others are compiled in and chosen when the program runs.
//
// A whole program (examples/hello.cpp). It trains on a string and prints what the model says:
//
//     #define BABYGPT_IMPLEMENTATION
//     #include "../babygpt.h"
//     #include <stdio.h>
//     using namespace babygpt;
//     int main() {
//         const char* text = "the cat sat on the mat. the dog sat on the log. the cat saw the dog. the dog saw the cat on the mat. ";
//         Runtime runtime;  // memory, threads and files: the defaults
//         Corpus corpus; Tokenizer tokenizer; Model model; Data data; Trainer trainer; Session session;
//         Config config;
//         config.layers = 2, config.heads = 2, config.width = 64, config.context = 32;
//         TrainConfig how;
//         how.steps = 200, how.lr = 3e-3;
//         RunResult run;
//         Array<char> said(runtime);
//         Generation reply;
//         reply.text = &said;
//         Status s = corpus.open_memory(runtime, text);
//         if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::characters, 0}, corpus);
//         if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
//         if (s.ok()) s = data.create(runtime, corpus, Part::all, model.tokenizer);
//         if (s.ok()) s = trainer.create(runtime, model, how, data);
//         if (s.ok()) s = trainer.run(RunConfig(), run);
//         if (s.ok()) s = session.create(runtime, model);
//         if (s.ok()) s = session.generate("the dog", SampleConfig(), reply);
//         printf("%s%.*s\n", s.message, static_cast<int>(said.size()), said.data());
//     }
//
// Options.  There are no macros to set but BABYGPT_IMPLEMENTATION. Memory, threads, files, log and backend are members of Runtime.
//
// What it promises.  Nothing here throws, prints, exits, reads the environment, opens a file it was not given or changes the host's
// floating-point mode, locale or signals. What data, disk or memory can spoil returns a Status with a message. A training step and a
// generated token allocate nothing. Files are taken as hostile. Training gives the same bits for any number of threads and any
// instruction set, and an interrupted run that is resumed ends with the bits of one that was not.
//
// How to read it.  From top to bottom; a chapter uses only what stands above it. To understand a GPT, read chapters 4 to 8: the tape, the
// ops in plain loops with each backward pass under its forward pass, the architecture as a list of ops, learning, talking. Chapters 10 and
// 11 compute the same bits fast. Search for "[CHAPTER n]":
//
//     0  read me                                      7  learning: the data order, the schedule, the training step
//     1  the public interface                         8  talking: KV cache, sampling, beam search, chat
//     2  memory, threads, files, random numbers       9  files: the checkpoint
//     3  text: JSON, UTF-8, the tokenizers           10  the same ops, fast: one kernel text for all instruction sets
//     4  tensors, ops and the tape                   11  the fast backend: which processor, who does what; the self-test
//     5  the ops, plainly, forward and backward      12  licence
//     6  the architectures and the model

// =====================================================================================================================
// [CHAPTER 1] The public interface
// =====================================================================================================================
// Conventions. Every object is made empty and free of cost; a call named create, train, open or load fills it. Objects can
// be moved, not copied, and release what they own when they end. Whatever data, disk or memory can spoil returns a Status.
// Nothing here throws, prints, reads the environment or keeps global state. An object keeps a pointer to the Runtime it
// was made with: the Runtime must outlive it and stay where it is.

#ifndef BABYGPT_H
#define BABYGPT_H

#include <stddef.h>
#include <stdint.h>

#define BABYGPT_VERSION_MAJOR 0
#define BABYGPT_VERSION_MINOR 1
#define BABYGPT_VERSION_PATCH 0
#define BABYGPT_FORMAT_VERSION 1  // of the checkpoint file

// For functions of one line, which shall not be calls even where nothing is optimised.
#if defined(__GNUC__) || defined(__clang__)
#define BABYGPT_AT_ONCE __attribute__((always_inline))
#else
#define BABYGPT_AT_ONCE
#endif

namespace babygpt {

// ---- Text and Span: views of memory that somebody else owns ----------------------------------------------------------

// Bytes, usually UTF-8, not ending in a zero. Made from a C string or anything with data() and size().
struct Text {
    const char* data = "";
    size_t size = 0;
    constexpr Text() = default;
    BABYGPT_AT_ONCE constexpr Text(const char* bytes, size_t count) : data(bytes), size(count) {}
    constexpr Text(const char* zero_ended) : data(zero_ended ? zero_ended : "") {
#if defined(__GNUC__) || defined(__clang__)
        size = __builtin_strlen(data);  // a constant, where the text is one
#else
        while (data[size] != '\0') ++size;
#endif
    }
    template <class T, class = decltype(static_cast<const char*>(static_cast<const T*>(nullptr)->data())),
              class = decltype(static_cast<size_t>(static_cast<const T*>(nullptr)->size()))>
    constexpr Text(const T& text) : data(text.data()), size(text.size()) {}
    BABYGPT_AT_ONCE constexpr char operator[](size_t i) const { return data[i]; }
    BABYGPT_AT_ONCE constexpr const char* begin() const { return data; }
    BABYGPT_AT_ONCE constexpr const char* end() const { return data + size; }
};

// `size` elements at `data`. Made from a pointer and a count, an array, or anything with data() and size().
template <class T>
struct Span {
    T* data = nullptr;
    size_t size = 0;
    constexpr Span() = default;
    BABYGPT_AT_ONCE constexpr Span(T* elements, size_t count) : data(elements), size(count) {}
    template <size_t N>
    constexpr Span(T (&array)[N]) : data(array), size(N) {}
    template <class C, class = decltype(static_cast<T*>(static_cast<C*>(nullptr)->data()))>
    constexpr Span(C& container) : data(container.data()), size(container.size()) {}
    BABYGPT_AT_ONCE constexpr operator Span<const T>() const { return Span<const T>(data, size); }
    BABYGPT_AT_ONCE constexpr T& operator[](size_t i) const { return data[i]; }
    BABYGPT_AT_ONCE constexpr T* begin() const { return data; }
    BABYGPT_AT_ONCE constexpr T* end() const { return data + size; }
};

// ---- Status: how everything that can fail answers --------------------------------------------------------------------

// The one list of errors: name, text.
#define BABYGPT_ERRORS(X)                                       \
    X(ok, "ok")                                                 \
    X(invalid_argument, "invalid argument")                     \
    X(out_of_memory, "out of memory")                           \
    X(cannot_open, "cannot open")                               \
    X(cannot_read, "cannot read")                               \
    X(cannot_write, "cannot write")                             \
    X(bad_file, "the file is damaged or not what it should be") \
    X(unsupported, "not supported")                             \
    X(mismatch, "two things that must agree do not")            \
    X(not_finite, "a number is not finite")                     \
    X(no_room, "the caller's storage is too small")             \
    X(cancelled, "cancelled by the caller")                     \
    X(not_built, "not built into this program")                 \
    X(device, "the graphics processor failed")

enum class Error : int32_t {
#define BABYGPT_X(name, text) name,
    BABYGPT_ERRORS(BABYGPT_X)
#undef BABYGPT_X
};

// The text of the list above.
const char* error_text(Error error);

// An error and a message that names the thing, the value and what to do. The message ends in a zero, "" when ok.
struct [[nodiscard]] Status {
    Error error = Error::ok;
    char message[252];  // empty where all went well
    BABYGPT_AT_ONCE Status() { message[0] = '\0'; }
    Status(const Status& other);
    Status& operator=(const Status& other);
    BABYGPT_AT_ONCE bool ok() const { return error == Error::ok; }
};

// ---- Runtime: what the host lends us ---------------------------------------------------------------------------------

// cpu: the fast one; plain: chapter 5, slow and readable; cuda: training, evaluation and the sessions of decoders on a GPU, where babygpt_cuda.cu
// is part of the program, and everything else as cpu: encoders, sessions of an encoder-decoder, and those that use an adapter.
enum class Backend : int32_t { cpu, plain, cuda };
// Of the numbers in a computation; sums, weights and their gradients, moments are f32. On a GPU: tf32: of what is multiplied; bf16: of activations and
// their gradients, too; fp16, for GPUs before 2020: so, too, where a model is trained (sessions run in f32). On a processor (Backend::cpu) all is
// f32, but bf16: in training, of what is multiplied with weights and into their gradients. It is for processors with AMX, or AMD's avx512_bf16 (which
// only GCC's kernels use), and gains nothing on others; the bits are the same for any number of threads, but not on another kind of processor.
enum class Precision : int32_t { f32, tf32, bf16, fp16 };
enum class Isa : int32_t { automatic, sse2, avx2, avx512, neon, portable };  // which kernels; for tests. bits are the same

enum class FileMode : int32_t { read, write };  // write: create, or empty what is there

// Files as the host has them. Every hook gets `user`. Paths are UTF-8 and end in a zero. A handle is whatever open returned.
// Results: 0 or a count on success, negative on failure, unless said otherwise.
struct FileHooks {
    void* user = nullptr;
    void* (*open)(void* user, const char* path, FileMode mode) = nullptr;                        // null: failed
    int64_t (*size)(void* user, void* file) = nullptr;                                           // bytes; -1: not seekable (a pipe)
    int64_t (*read)(void* user, void* file, int64_t offset, void* to, int64_t bytes) = nullptr;  // may read less; 0: the end;
                                                                                                 // a pipe ignores the offset
    int64_t (*write)(void* user, void* file, const void* from, int64_t bytes) = nullptr;         // appends; less than asked: failed
    int (*sync)(void* user, void* file) = nullptr;                                               // to the disk itself
    int (*close)(void* user, void* file) = nullptr;
    int (*rename)(void* user, const char* from, const char* to) = nullptr;  // replaces `to` in one piece
    int (*remove)(void* user, const char* path) = nullptr;
    int (*sync_folder)(void* user, const char* path_inside) = nullptr;  // the folder that holds the path
};

// Memory, threads, log, files and backend. Zero and null mean the default (malloc, all cores, silence, the file system).
// Set the fields, then use it; do not change them while an object made with it lives. Move- and copy-free.
// Threads: any thread may use a Runtime at any time. When two threads need its workers at once, one of them works alone.
struct Runtime {
    Backend backend = Backend::cpu;
    Precision precision = Precision::f32;
    Isa isa = Isa::automatic;
    int threads = 0;  // 0: as many as there are cores; 1: never starts a thread

    void* memory_user = nullptr;
    void* (*allocate)(void* user, size_t bytes, size_t alignment) = nullptr;  // null: out of memory
    void (*release)(void* user, void* memory, size_t bytes) = nullptr;

    // The host's own job system: call task(context, i) for each i in [0, count), in any order, on any threads; return when all are done.
    void* parallel_user = nullptr;
    void (*parallel)(void* user, int count, void (*task)(void* context, int index), void* context) = nullptr;

    void* log_user = nullptr;
    void (*log)(void* user, Text line) = nullptr;

    FileHooks files;

    void* pool = nullptr;  // ours: the workers, started when first needed

    Runtime() = default;
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;
    ~Runtime();
    const char* isa_name() const;  // which kernels this machine gets, e.g. "avx2"
    int thread_count() const;      // `threads`, or what 0 stands for here
};

// A growing array of plain values whose memory comes from a Runtime. Used where a result's size is not known before.
template <class T>
struct Array {
    T* items = nullptr;
    size_t count = 0;
    size_t capacity = 0;
    Runtime* runtime = nullptr;
    Array() = default;
    BABYGPT_AT_ONCE explicit Array(Runtime& from) : runtime(&from) {}
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    Array(Array&& other) noexcept : items(other.items), count(other.count), capacity(other.capacity), runtime(other.runtime) {
        other.items = nullptr;
        other.count = other.capacity = 0;
    }
    Array& operator=(Array&& other) noexcept {
        if (this != &other) {
            clear();
            items = other.items, count = other.count, capacity = other.capacity, runtime = other.runtime;
            other.items = nullptr;
            other.count = other.capacity = 0;
        }
        return *this;
    }
    ~Array() { clear(); }
    BABYGPT_AT_ONCE T* data() const { return items; }
    BABYGPT_AT_ONCE size_t size() const { return count; }
    BABYGPT_AT_ONCE T& operator[](size_t i) const { return items[i]; }
    BABYGPT_AT_ONCE T* begin() const { return items; }
    BABYGPT_AT_ONCE T* end() const { return items + count; }
    bool reserve(size_t wanted);  // false: out of memory, nothing changed
    bool resize(size_t wanted);   // new elements are zero bytes
    bool push(const T& value);
    bool append(const T* values, size_t n);
    void clear();  // gives the memory back
};

// ---- Tokenizer: text <-> ids ------------------------------------------------------------------------------------------

enum class TokenizerKind : int32_t { none, bytes, characters, bpe, wordpiece, sentencepiece };

struct Corpus;  // below

struct TokenizerConfig {
    TokenizerKind kind = TokenizerKind::bpe;
    // All tokens. bpe: with the 256 bytes and the end-of-text token; wordpiece: with the characters and 5 special tokens; sentencepiece: with
    // the characters, <unk>, <s> and </s>.
    int vocab = 1024;
    bool cased = false;          // wordpiece: capitals and accents are kept, as BERT cased does
    bool byte_fallback = false;  // sentencepiece: 256 more pieces, the bytes, which an unseen character is written with
};

// Reads "byte", "char", "bpe:N", "wordpiece:N", "wordpiece:N:cased", "unigram:N" or "unigram:N:bytes" (with byte_fallback).
Status parse_tokenizer(Text text, TokenizerConfig& config);

// bytes:      id = byte value, vocab 256.
// characters: ids in the order of code points, "\n" always among them; the last id stands for any character not seen in training.
// bpe:        byte-level BPE with GPT-2's pre-tokenization.
// wordpiece:  BERT's. encode adds no [CLS] or [SEP]; [SEP] is the end of text. decode joins words by blanks (none before . , ! ?), as
//             BERT's decoder does. It changes the text: uncased, all letters become small ones without accents. These are Unicode's small
//             letters, not Turkish: I and U+0130 give i, U+0131 stays; Turkish wants `cased`.
// sentencepiece: unigram (Kudo 2018), or a .model file of that type or BPE. encode adds no <s> or </s>; decode leaves control pieces out.
//             The end of text is what the file calls eos_piece, </s>; of llama2.c's tok512.bin it is <s>, which its documents begin with.
//             Files often change the text. One that was trained here does not: decode(encode(x)) == x where all characters are known.
// Bytes and bpe: decode(encode(x)) == x for any bytes whatever. Read-only once filled: any number of threads may use it.
// begin_of_text, <s>, is what some models of other people's have read before each text, and miss where it is absent. Data, Session and Encoder
// put it there, encode does not. There is one where GGUF's add_bos_token says so (if it says nothing, llama.cpp's rule: with SentencePiece BPE);
// where a tokenizer.json of bpe or sentencepiece has a TemplateProcessing that begins with it; in a folder with tokenizer.model, unless
// tokenizer_config.json says add_bos_token false; and in llama2.c's tok512.bin. GPT-2's, a .model alone and what is trained here have none.
struct Tokenizer {
    TokenizerKind kind = TokenizerKind::none;
    int vocab = 0;
    int32_t end_of_text = -1;         // between documents; -1: there is none
    int32_t begin_of_text = -1;       // before each text, a special token; -1: none. May be the same as end_of_text
    int32_t unknown = -1;             // the id for unseen characters; -1: there is none
    struct Tables* tables = nullptr;  // ours (chapter 3)
    Runtime* runtime = nullptr;

    Tokenizer() = default;
    Tokenizer(Tokenizer&& other) noexcept;
    Tokenizer& operator=(Tokenizer&& other) noexcept;
    ~Tokenizer();

    Status create_bytes(Runtime& runtime);
    // Learns from the training part of a corpus, or from a text. Ties: higher count first, then smaller (left id, right id).
    Status train(Runtime& runtime, const TokenizerConfig& config, Corpus& corpus);
    Status train(Runtime& runtime, const TokenizerConfig& config, Text text);
    // A tokenizer.json (BPE, WordPiece or Unigram), a .tiktoken file, vocab.bpe or encoder.json (the other one beside it), BERT's vocab.txt, a
    // SentencePiece .model, llama2.c's tok512.bin, GGUF's (gpt2, llama, t5, bert), a folder of these but the last, or "byte". A vocab.txt does not say whether it tells capital from
    // small letters: the path must, with "uncased" or "cased" in it or after it ("vocab.txt:uncased").
    Status load(Runtime& runtime, Text path);
    Status load_memory(Runtime& runtime, Text json);  // a tokenizer.json
    // As tokenizer.json; a sentencepiece one as .model where the path ends so, which cannot say what begin_of_text is. (What Hugging Face's
    // form of that file cannot say about a SentencePiece model, as BPE and user-defined pieces, only we read.)
    Status save(Text path) const;
    Status save_memory(Array<char>& json) const;
    Status copy(Runtime& runtime, const Tokenizer& from);

    // Appends to `ids`. With `special`, names of special tokens in the text become their ids; without, they are plain text.
    // `unknown_count`, where not null, receives how many characters became `unknown`.
    Status encode(Text text, Array<int32_t>& ids, bool special = false, size_t* unknown_count = nullptr) const;
    // The bytes of one id, a view that lives as long as the tokenizer. Unknown characters are U+FFFD. "" for an id out of range.
    Text bytes(int32_t id) const;
    // Appends the exact bytes; an id out of range is an error.
    Status decode(Span<const int32_t> ids, Array<char>& text) const;
};

// Turns a stream of byte pieces into a stream of whole UTF-8 characters, so that a terminal never sees half of one.
struct Utf8Stream {
    unsigned char pending[4] = {};
    int count = 0;
    // Takes a piece; writes what is complete to `out`, which needs room for piece.size + 3; returns how many bytes that are.
    // A byte that can be no part of any character is passed on as it is.
    size_t push(Text piece, char* out);
    size_t finish(char* out);  // what is left, at most 3 bytes
};

// ---- Corpus and Data: from files to batches -----------------------------------------------------------------------------

enum class TextFormat : int32_t { automatic, text, jsonl, csv, tsv };  // automatic: by the name's ending; tsv: a document a line

struct CorpusConfig {
    TextFormat format = TextFormat::automatic;
    Text field;                        // jsonl: the string to read from each line (default: "text")
    Text column;                       // csv: the column to read, by the name in the first line (default: "text")
    bool split_documents = false;      // text: empty lines divide documents (dialogues); else a file is one
    double validation_fraction = 0.1;  // the last part of the text; 0: none
    uint64_t validation_limit = 0;     // bytes of it at most, which each evaluation reads; 0: no limit
};

enum class Part : int32_t { all, training, validation };

// Where text comes from: files and memory, read in order as documents, again and again, in bounded memory.
// "-" is standard input, which is kept in memory. One thread at a time.
struct Corpus {
    CorpusConfig config;
    Runtime* runtime = nullptr;
    struct CorpusState* state = nullptr;  // ours
    uint64_t bytes = 0;                   // of text, all parts
    uint64_t training_bytes = 0;          // where the validation part begins
    uint64_t documents = 0;

    Corpus() = default;
    Corpus(Corpus&& other) noexcept;
    Corpus& operator=(Corpus&& other) noexcept;
    ~Corpus();

    Status open(Runtime& runtime, Span<const Text> files, const CorpusConfig& config = CorpusConfig());
    Status open_memory(Runtime& runtime, Text text, const CorpusConfig& config = CorpusConfig());  // the text must live as long
    // Calls piece(user, bytes, end_of_document) with the text of a part in order. Pieces are at most about 1 MiB, and are cut where
    // no token crosses (before white space that follows something else), so that they may be tokenized one by one; where a SentencePiece
    // tokenizer puts a blank before a text, it does so before each piece. False from it ends the pass.
    Status read(Part part, bool (*piece)(void* user, Text bytes, bool end_of_document), void* user);
};

// What a model is to learn where there is no running text. Views of the caller's memory.
struct Example {
    Span<const int32_t> ids;      // what the model reads, 1 to `context`; an encoder-decoder: what its decoder reads
    Span<const int32_t> targets;  // one for each id, -1: counts for nothing; of a classifier one, the class
    Span<const int32_t> source;   // what the encoder of an encoder-decoder reads, 1 to `context`
    Span<const float> features;   // [ids][Config::features]
    float weight = 1;             // its loss and gradients count so many times; the mean is over the sum of these
};

// Token ids, cut into windows of `context`. One epoch visits every window once, in an order drawn from (seed, epoch).
// Documents are kept apart by the end-of-text token where the tokenizer has one, by an empty line where not; each begins with the
// begin-of-text token where there is one (if it is the same as the end-of-text token, nothing else stands between them).
// Data that would need more than `memory_limit` bytes is kept in groups: each is read from the files and tokenized when its turn comes.
struct Data {
    Runtime* runtime = nullptr;
    struct DataState* state = nullptr;  // ours
    uint64_t tokens = 0;
    uint64_t bytes = 0;        // of text that these tokens came from; 0 where the ids came from the host
    uint64_t unknown = 0;      // characters that the tokenizer had never seen
    uint64_t learnt = 0;       // tokens that are not only read: all, or those of answers; of examples, all ids
    uint64_t fingerprint = 0;  // of the ids: two runs with equal fingerprints had equal data
    uint64_t left_out = 0;     // pairs that are too long

    Data() = default;
    Data(Data&& other) noexcept;
    Data& operator=(Data&& other) noexcept;
    ~Data();

    // Tokenizes a part. The corpus and the tokenizer must outlive it. `cache`: a path for the tokens instead of memory ("": none).
    // `answers`: where not empty, only what follows this text in lines that begin with it (a chat's reply_turn) is learnt, up to the line's
    // end: all other targets are -1. For tokenizers that keep line ends.
    Status create(Runtime& runtime, Corpus& corpus, Part part, const Tokenizer& tokenizer, Text cache = Text(),
                  uint64_t memory_limit = uint64_t(256) << 20, Text answers = Text());
    Status create(Runtime& runtime, Span<const int32_t> ids);       // the host's own ids, which must live as long, unchanged
    Status create(Runtime& runtime, Span<const Example> examples);  // in the place of windows; they and what they show must live as long
    // Pairs of texts for an encoder-decoder, a line each of a tsv corpus: SOURCE tab TARGET. The source ends with the end-of-text token (E),
    // which the tokenizer must have; ids: E target; targets: target E. Pairs of which one side is longer than `context` are left out. All
    // ids are kept in memory; `bytes` counts the targets only.
    Status create_pairs(Runtime& runtime, Corpus& corpus, Part part, const Tokenizer& tokenizer, int context);
    uint64_t windows(int context) const;  // in one epoch; 0: too little text for one
    // Window number n of training, n counted over all epochs: ids and the ids that follow each of them (-1: not to be learnt).
    Status training_window(uint64_t seed, uint64_t n, int context, int32_t* ids, int32_t* targets);
    // Window number n of a fixed division from the first token to the last (n < evaluation_windows): returns its length, the last may be short.
    uint64_t evaluation_windows(int context) const;
    Status evaluation_window(uint64_t n, int context, int32_t* ids, int32_t* targets, int& length);
    // Example number n of training, n counted over all epochs, and of an evaluation; null where there are none.
    const Example* training_example(uint64_t seed, uint64_t n) const;
    const Example* evaluation_example(uint64_t n) const;
};

// What counting achieves: an interpolated Witten-Bell n-gram model over the same ids, the best order up to max_order, nats per token on
// `validation`. Training is capped at its first `cap` tokens. Memory: as Ngram's, and 13 to 16 bytes more a validation token. (Witten & Bell
// 1991; Chen & Goodman 1998, section 2.5.)
struct NgramResult {
    int order = 0;                 // the best; 1 is the unigram model
    double loss = 0;               // nats per token of the best order
    double loss_by_order[9] = {};  // [1..max_order]
    uint64_t training_tokens = 0;
};
Status ngram_baseline(Runtime& runtime, Data& training, Data& validation, int vocab, NgramResult& result, int max_order = 8,
                      uint64_t cap = uint64_t(64) << 20);

// The same model of one order (2: bigrams), kept: a baseline that predicts, and is evaluated as a Model is. Read-only once made: any number of
// threads may use it. Memory: 5 to 8 bytes a training token, of which the first `cap` count; a little more while it is made.
struct Ngram {
    int order = 0, vocab = 0;
    Runtime* runtime = nullptr;
    struct NgramState* state = nullptr;  // ours

    Ngram() = default;
    Ngram(Ngram&& other) noexcept;
    Ngram& operator=(Ngram&& other) noexcept;
    ~Ngram();

    Status create(Runtime& runtime, Data& training, int vocab, int order, uint64_t cap = uint64_t(64) << 20);  // order: 1 to 8
    // The probability of each id after a history, of which the last order - 1 ids count: [vocab], their sum is 1.
    Status predict(Span<const int32_t> history, Span<double> probabilities) const;
};

// ---- Config and Model -------------------------------------------------------------------------------------------------

enum class Architecture : int32_t { gpt2, llama };                      // whose names and layout the tensors have
enum class Activation : int32_t { none, gelu, gelu_tanh, relu, silu };  // gelu: with erf (Hendrycks & Gimpel 2016); silu: x sigmoid(x)
enum class Norm : int32_t { layer, rms };                               // layer norm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019)
enum class Dtype : int32_t { f32, bf16, int8 };                         // of the numbers in a model's matrices: Model::convert
// GPT-2's vectors, added to the tokens'; RoPE (Su et al. 2021); sines and cosines (Vaswani et al. 2017).
enum class Positions : int32_t { learned, rotary, sinusoidal, none };

// A Transformer. As it is: GPT-2's, a decoder. preset_architecture makes it Llama's; what lies between may be chosen field by field.
//   encoder_layers > 0: an encoder-decoder (Vaswani et al. 2017): so many layers read a source, which the decoder's layers look at.
//   causal = false:     an encoder alone (BERT, Devlin et al. 2019): every token sees all others, and the head says what each one is. From
//                       running text it learns to fill gaps (masked language modelling): see mask_id.
//   classes > 0:        what the last layer says is pooled, a vector for each sequence, and the head says to which class it belongs.
//   features > 0:       a row comes with so many numbers, e.g. a patch of a picture (Dosovitskiy et al. 2021), of which a linear layer makes
//                       what is added to its id's vector.
// Those learn from examples (struct Example), the decoder and the encoder alone also from running text.
struct Config {
    Architecture architecture = Architecture::gpt2;
    int layers = 4;
    int encoder_layers = 0;
    bool causal = true;
    int classes = 0;
    bool pool_first = false;  // classes: pools the first row, not the mean of all
    int features = 0;
    int heads = 4;
    int kv_heads = 0;  // of keys and values, a divisor of heads: each serves a group of queries (Ainslie et al. 2023); 0: as many as heads
    int width = 128;
    int hidden = 0;  // width of the feed-forward part; 0: 4 * width, where it is gated 8/3 of it, up to a multiple of 32
    int context = 128;
    int vocab = 0;     // 0: the tokenizer's, and one more for the gaps of an encoder alone whose tokenizer has no [MASK]
    bool tied = true;  // the output head shares the embedding's matrix; a classifier's does not
    bool bias = true;  // of linear layers and layer norms; an RMSNorm has none
    Activation activation = Activation::gelu_tanh;
    bool gated =
        false;  // one half of the hidden layer, activated, multiplies the other (Shazeer 2020): SwiGLU with silu, GeGLU with gelu_tanh
    Norm norm = Norm::layer;
    bool norm_after = false;  // each sub-layer's addition is normalized, as in Vaswani et al. 2017, not its input, as in GPT-2
    bool norm_last = false;   // norm_after: one more before the head, which GPT-2 has anyway
    bool head_bias = false;   // of the output head; a classifier's has one if other layers do
    double norm_epsilon = 1e-5;
    Positions positions = Positions::learned;  // rotary: width / heads must be even
    double rope_base = 10000;                  // rotary: the slowest angle's wavelength in positions is about 2 pi times that
    Dtype dtype = Dtype::f32;                  // of a model that only talks; training is in f32
};

// nano, tiny, small, baby, gpt2, gpt2-medium, gpt2-large, gpt2-xl: how large. Leaves vocab alone except for GPT-2's own (50257).
Status preset(Text name, Config& config);
// gpt2: learned positions, layer norm, GELU, biases, a tied head. llama (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases,
// an untied head. transformer (Vaswani et al. 2017): GPT-2's names, but sinusoidal positions, norms after the additions, ReLU. lecture: as some
// write a first GPT: norms after and at the end, ReLU, an untied head with a bias. Leaves the size alone, encoder_layers too.
Status preset_architecture(Text name, Config& config);
Status check(const Config& config);  // says which field is wrong, and what it may be

// How a conversation is written: the text before the user's turn and before the model's. One line a turn.
struct Chat {
    Array<char> user_turn;
    Array<char> reply_turn;
    bool plain_words =
        false;  // the text had the user's lines in small letters without punctuation; a session writes them so: HELLO! is hello
    bool empty() const { return user_turn.count == 0 && reply_turn.count == 0; }
};

struct Weight {          // one named tensor inside Model::weights, row-major
    char name[56];       // Hugging Face's, e.g. GPT-2's "h.0.attn.c_attn.weight", Llama's "model.layers.0.self_attn.q_proj.weight"
    int64_t offset;      // in floats
    int64_t rows, cols;  // a vector has rows 1; GPT-2's matrices are (in, out), as Conv1D has them, Llama's (out, in), as Linear has them
    bool decay;          // 2-D: weight decay applies
    bool is_vector;
    bool scaled_rows;  // in int8 each row has a scale (a token's vector), not each column (an output of a layer)
};

enum class Purpose : int32_t { training, running };  // training: or anything else

// Config, tokenizer, chat template and named weights in one block. Read-only once trained: any number of sessions on any threads share it;
// a Trainer writes to it.
struct Model {
    Config config;
    Tokenizer tokenizer;
    Chat chat;
    Array<char> labels;  // of a classifier: the names of its classes, each ended by a line end; empty: they have only numbers
    // `parameters` floats; tensors of one product (Llama's q, k, v) adjoin, others begin on a cache line. Null where it was loaded to run only.
    float* weights = nullptr;
    int64_t parameters = 0;  // without the padding
    int64_t block = 0;       // floats in the block
    Span<Weight> names;
    uint64_t version = 0;  // grows with each change of the weights; keys packed copies
    Runtime* runtime = nullptr;
    struct ModelState* state = nullptr;  // ours: packed copies of the weights, shared by the sessions

    Model() = default;
    Model(Model&& other) noexcept;
    Model& operator=(Model&& other) noexcept;
    ~Model();

    // Fresh weights as GPT-2's (normal 0.02, residual projections divided by sqrt(2*layers)). Takes the tokenizer over.
    Status create(Runtime& runtime, const Config& config, Tokenizer&& tokenizer, uint64_t seed = 1);
    // A checkpoint (safetensors); GGUF of architecture gpt2 or llama in F32, F16, BF16 or Q8_0; llama2.c's .bin; or a folder of Hugging Face's with config.json and model.safetensors, in one or several
    // pieces, of type gpt2 or llama: then also the tokenizer that lies there, where there is one. Other people's models become f32.
    // Purpose::running: only for sessions and encoders on the runtime's backend and isa, which begin sooner and say the same; but of a decoder
    // that runs on a GPU all stays here, too, from where the GPU gets it. The matrices are
    // there once, as these read them, and not as floats beside it; only the embeddings' are. What needs them is an error then: to train,
    // evaluate, convert, save, compare or merge the model, Session::attention, other kernels.
    Status load(Runtime& runtime, Text path, Purpose purpose = Purpose::training);
    Status load_memory(Runtime& runtime, Text bytes, Purpose purpose = Purpose::training);  // a checkpoint, GGUF or a .bin
    Status save(Text path) const;  // a checkpoint: temporary file, sync, rename, sync of the folder
    Status save_memory(Array<char>& bytes) const;
    // For other people's programs; what these cannot express is an error that says so. The folder must be there; transformers loads it.
    Status save_huggingface(Text folder) const;
    Status save_llama2c(Text path) const;
    // llama.cpp's, of architecture gpt2 or llama: f32 as F32, bf16 as BF16, int8 as Q8_0 (the same numbers; matrices whose rows are no whole
    // blocks of 32 stay F32), with the tokenizer, whose encoding adds no <s>. `chat` goes along for load, not as a chat template.
    Status save_gguf(Text path) const;
    const Weight* find(Text name) const;  // null: no such tensor
    // Rounds all matrices to what the dtype can hold; vectors stay f32. bf16: 8 significant bits. int8: whole numbers from -127 to 127
    // times a power of two, one for each output of a layer and each token's vector. Files and what sessions read for every token become half as
    // large, or a quarter; `weights` stay floats, and a model computes with them as any other, to the bit. What has been rounded stays so
    // when converted to f32. Training makes a model f32 again. Whoever writes to the weights of a converted model converts it again.
    Status convert(Dtype to);
    Status set_chat(Text user_turn, Text reply_turn, bool plain_words = false);
    Status set_labels(Text lines);  // as many as the model has classes
    Text label(int of) const;       // the name of a class; "": it has none
    // Takes over the tensors that have a name and a shape in common, as fine-tuning begins: a classifier learns from what an encoder has
    // learnt. Returns how many.
    int copy_weights(const Model& from);
};

// ---- Adapter ----------------------------------------------------------------------------------------------------------

struct AdapterConfig {
    int rank = 8;
    double alpha = 16;  // what an adapter adds counts alpha / rank times
    Text targets;  // which matrices: the ends of their names, with commas between ("q_proj,v_proj", "attn.c_proj"); "": all of the layers
};

// LoRA (Hu et al. 2021): beside the matrix W of a linear layer stand two small ones, A (rank x in) and B (out x rank), and where the layer
// says x W, it says x W + (x A^T) B^T alpha / rank. They alone are trained, the model stays as it is; many adapters share one model. The
// tensors have the names of Hugging Face's PEFT. Read-only once trained, as a model is.
struct Adapter {
    AdapterConfig config;
    float* weights = nullptr;
    int64_t parameters = 0;  // without the padding
    int64_t block = 0;       // floats in the block
    Span<Weight> names;      // "h.0.attn.c_attn.lora_A.weight", "h.0.attn.c_attn.lora_B.weight", ...
    uint64_t version = 0;    // grows with each change of the weights
    Runtime* runtime = nullptr;
    struct AdapterState* state = nullptr;  // ours

    Adapter() = default;
    Adapter(Adapter&& other) noexcept;
    Adapter& operator=(Adapter&& other) noexcept;
    ~Adapter();

    // A fresh one changes nothing: A is random, B is 0. The model is only looked at.
    Status create(Runtime& runtime, const Model& model, const AdapterConfig& config, uint64_t seed = 1);
    // A safetensors file of ours, or PEFT's folder with adapter_config.json and adapter_model.safetensors, for this model.
    Status load(Runtime& runtime, const Model& model, Text path);
    Status load_memory(Runtime& runtime, const Model& model, Text bytes);
    Status save(Text path) const;  // a file; the content of adapter_config.json stands in its metadata
    Status save_memory(Array<char>& bytes) const;
    Status save_peft(Text folder) const;  // adapter_config.json and adapter_model.safetensors; the folder must be there
};
// Adds what the adapter adds to the model's own matrices: W + A^T B^T alpha / rank. The model is f32 then.
Status merge(Model& model, const Adapter& adapter);

// What stands in the gaps that an encoder alone fills: the tokenizer's [MASK] (or <mask>), else the last id of the vocabulary where that is no
// token's; -1: there is none.
int32_t mask_id(const Model& model);

struct Memory {  // exact, in bytes
    uint64_t weights = 0, gradients = 0, moments = 0, activations = 0, kv = 0, scratch = 0, records = 0;
    uint64_t device = 0;  // with Backend::cuda, of the GPU's; not in total()
    uint64_t total() const { return weights + gradients + moments + activations + kv + scratch + records; }
};
// What a Trainer takes, or, running, a Session or an Encoder, each with its Model, loaded for that purpose. batch: sequences at once.
// adapter: where one is trained, or used. tokens: of the running text that it is trained on (Data::tokens), which a GPU keeps.
Status memory_needed(Runtime& runtime, const Config& config, Purpose purpose, int batch, Memory& memory, double dropout = 0,
                     const AdapterConfig* adapter = nullptr, uint64_t tokens = 0);

struct SummaryRow {  // one row of info's table
    char layer[48];
    char shape[32];                            // of the output, e.g. "[8, 192, 384]"
    int64_t parameters, multiply_adds, bytes;  // multiply-adds: of a forward pass over the batch; bytes: of the output
};
Status summary(Runtime& runtime, const Config& config, int batch, Array<SummaryRow>& rows);
// Multiply-adds x 2 of one token, averaged over a full context, attention counted causally. Training is three times that.
double flops_per_token(const Config& config);

// ---- Trainer ----------------------------------------------------------------------------------------------------------

// wsd: warm-up, stable, decay over the last fifth. inverse_sqrt: as 1 / sqrt(step) after the warm-up (Vaswani et al. 2017).
enum class Schedule : int32_t { cosine, linear, constant, wsd, inverse_sqrt };

// muon (Jordan et al. 2024): what the blocks' matrices gather as momentum is made orthogonal before it is added; the rest learns by AdamW.
enum class Optimizer : int32_t { adamw, muon };

struct TrainConfig {
    int batch = 16;
    int accumulate = 1;    // micro-batches a step; the same bits as one batch of batch * accumulate
    int64_t steps = 1000;  // the total, and the schedule's horizon
    double lr = 1e-3;
    double min_lr = -1;   // negative: lr / 10, with inverse_sqrt 0
    int64_t warmup = -1;  // steps; negative: the smaller of 100 and steps / 10
    Schedule schedule = Schedule::cosine;
    Optimizer optimizer = Optimizer::adamw;
    double muon_lr = 0.02;  // of the matrices under muon; it follows lr's schedule
    double weight_decay = 0.1;
    double beta1 = 0.9;
    double beta2 = 0.99;
    double epsilon = 1e-8;
    double clip = 1.0;  // of the gradient's global norm; 0: none
    double dropout = 0;
    double label_smoothing = 0;
    uint64_t seed = 1;
    int64_t evaluate_every = 0;  // 0: about 20 times in a run
    int64_t patience = 0;        // evaluations without a better one (Progress::best) before it stops; 0: never
};

// On a GPU: so many steps may be begun before the first one's result is read.
constexpr int steps_ahead = 8;

struct StepResult {
    int64_t step = 0;  // steps done with it
    double loss = 0;   // nats per token, the mean over the step's batch (by the examples' weights)
    double lr = 0;
    double grad_norm = 0;  // before clipping
    double tokens_per_second = 0;
    bool skipped = false;  // not finite: the weights were left as they were
};

struct Evaluation {
    double loss = 0;           // nats per token; of a classifier, per example
    double bits_per_byte = 0;  // 0 where the bytes are unknown
    double perplexity = 0;
    double top1 = 0, top5 = 0;  // share of tokens whose true successor was among the best 1, 5
    uint64_t tokens = 0;
    uint64_t unknown = 0;
};

struct Progress {                            // what a callback sees
    const StepResult* step = nullptr;        // null where a run begins with the evaluation that the one before was interrupted in
    const Evaluation* evaluation = nullptr;  // null unless one was just made
    bool best = false;  // it is the best so far (and was saved): of a classifier by accuracy, then by loss; else by loss
    int64_t steps = 0;  // the run's total
    double seconds = 0, seconds_left = 0;
};

struct RunConfig {
    Text out;                // the model is written here, what resuming needs beside it; "": nowhere
    int64_t stop_at = 0;     // saves and ends before step `stop_at` + 1, as an interruption would; 0: no
    int64_t save_every = 0;  // steps between two saves of the resume file; 0: at evaluations
    void* user = nullptr;
    // After each step; false: save and end. On a GPU the host hears of a step up to steps_ahead later, but before an evaluation of all.
    bool (*progress)(void* user, const Progress& progress) = nullptr;
    // While an evaluation goes on, after each batch; done: the share that is made. False: save and end; the next run() begins with it.
    bool (*evaluating)(void* user, double done) = nullptr;
};

struct RunResult {
    int64_t step = 0;
    double best_validation_loss = 0;  // of best_step; 0 where there was no validation
    int64_t best_step = 0;
    double seconds = 0;
    bool stopped_early = false;  // by patience
    bool cancelled = false;      // by the callback or stop_at
};

// Gradients, AdamW's moments, schedule, data position and random state around one Model, which it writes to. One thread at a time; nobody
// may use the model while a call runs. After create, a step allocates nothing (unless its data is kept in groups).
struct Trainer {
    TrainConfig config;
    const Model* model = nullptr;
    Adapter* adapter = nullptr;  // what is trained, and saved, in the place of the model; may be null
    Data* training = nullptr;
    Data* validation = nullptr;  // may be null
    int64_t step_count = 0;
    double best_validation_loss = 0, best_accuracy = 0;  // of best_step; best_accuracy: of a classifier
    int64_t best_step = -1;                              // -1: none yet
    int64_t bad_evaluations = 0;                         // in a row
    bool evaluation_due = false;                         // one was interrupted
    int under_way = 0;                                   // steps that were begun, and whose results have not been read
    // Precision::fp16: what losses are multiplied by, so that no gradient is too small for it, and how many steps it has been good for. Not finite
    // gradients halve it, 2000 good steps double it. Others' losses are means: their 2^16 of 4096 tokens is 16 here.
    float* loss_scale = nullptr;  // [2]
    float* gradients = nullptr;   // sums over the step's tokens, laid out as Model::weights, or as those of the adapter; cuda: null
    float* moment1 = nullptr;
    float* moment2 = nullptr;
    Runtime* runtime = nullptr;
    struct TrainerState* state = nullptr;  // ours: the tape and its memory

    Trainer() = default;
    Trainer(Trainer&& other) noexcept;
    Trainer& operator=(Trainer&& other) noexcept;
    ~Trainer();

    Status create(Runtime& runtime, Model& model, const TrainConfig& config, Data& training, Data* validation = nullptr);
    // Trains the adapter, by AdamW. The model, of any dtype, is only read: others may use it meanwhile.
    Status create(Runtime& runtime, const Model& model, Adapter& adapter, const TrainConfig& config, Data& training,
                  Data* validation = nullptr);
    Status step(StepResult& result);  // one update
    // The host's own batch: config.batch * config.accumulate rows of config.context ids and their targets (a target of -1 counts for nothing).
    Status step(Span<const int32_t> ids, Span<const int32_t> targets, StepResult& result);
    Status step(Span<const Example> examples, StepResult& result);  // batch * accumulate of them
    // step() in halves, so that a GPU need not wait for the host: the first returns as soon as the update is under way, the second waits for
    // the oldest step whose result has not been read. With steps_ahead unread ones begin_step() is an error; step() reads them all.
    Status begin_step();
    Status finish_step(StepResult& result);
    Status evaluate(Data& data, Evaluation& result);
    // With Backend::cuda: brings the weights and moments from the GPU, for a host that reads them itself. What is here does so by itself.
    Status fetch();
    // Steps up to config.steps, evaluates, keeps the best model in out, and what resuming needs in resume_path(out).
    Status run(const RunConfig& config, RunResult& result);
    // The state of training, with the weights of the last step. Loading refuses what contradicts, and says what.
    Status save(Text path) const;
    Status load(Text path);
    double learning_rate(int64_t step) const;  // of the update that follows `step` done ones
};

// How well a model predicts a text, with memory for reading only (`batch` windows at a time). progress, where given, is called between two
// batches with the share that is done, and ends it by returning false: then the result is of what was read.
Status evaluate(Runtime& runtime, const Model& model, Data& data, Evaluation& result, int batch = 8,
                bool (*progress)(void* user, double done) = nullptr, void* user = nullptr, const Adapter* adapter = nullptr);

// The same of an n-gram model. It reads the text in one piece.
Status evaluate(Runtime& runtime, const Ngram& model, Data& data, Evaluation& result);

// "M.safetensors" -> "M.resume.safetensors". That file is itself a model to load: the weights of the last step.
Status resume_path(Text model_path, Array<char>& path);
// The TrainConfig that a resume file was made with, so that nobody has to say it again.
Status read_train_config(Runtime& runtime, Text resume_file, TrainConfig& config);

// ---- Session ----------------------------------------------------------------------------------------------------------

// Patterns that a generated text must not hold, made ready to be looked for. Read-only once created: any number of sessions may use it.
//   a letter or other character is itself; capitals and small letters are the same (Latin, Greek, Cyrillic), and so are all four Turkish i's
//   ?       one character that is not white space                *   any number of these, also none
//   [a-z]   one character of these; [!a-z] one that is none      a blank   one or more characters of white space
//   \b      the beginning or end of a word (letters and digits)   \ before any other character: that one itself
// Invisible characters in the text (soft hyphen, zero width, U+0307) are passed over. At most 60 characters a pattern; the time is
// linear in the text, whatever the pattern.
// What it promises: no text that a session says with it holds a match that ends there, however the text is cut into tokens, in whatever
// turn, also where a match begins in the prompt; nor would it if it ended after any token. For that, a harmless word may be refused where a
// token ends behind a banned one. What it cannot promise: that a text is harmless. It knows spellings, not meanings: other spellings
// (l33t, look-alike letters of other scripts, letters with blanks between them) need patterns of their own, and what is bad can be
// said in words that are not. Fewer ids are possible, so that a text may also come out worse.
struct Guard {
    struct Element {
        int32_t kind;
        uint32_t from, to;  // a character, or, for a class, its ranges
    };
    struct Range {
        uint32_t low, high;
    };
    Array<Element> elements;
    Array<Range> ranges;
    Array<int32_t> ends;  // where each pattern ends in `elements`
    Status create(Runtime& runtime, Span<const Text> patterns);
    Status find(Text text, bool& found) const;  // does a text hold a match?
};

// What a guard of the output says about a piece of it.
enum class Verdict : int32_t { pass, replace, stop };

struct LogitBias {
    int32_t id;
    float bias;  // added to the logit; -infinity bans the token
};

struct SampleConfig {
    double temperature = 0.8;         // 0: greedy
    int top_k = 0;                    // 0: off
    double top_p = 1.0;               // 1: off (Holtzman et al. 2020)
    double min_p = 0.05;              // share of the best token's probability; 0: off
    double repetition_penalty = 1.0;  // on every token in the context (Keskar et al. 2019)
    uint64_t seed = 1;
    int tokens = 200;  // at most so many are generated
    Span<const LogitBias> bias;
    Span<const Text> banned;  // never appear in the text, however they would be cut into tokens; letter by letter
    Span<const Text> stop;    // end the text; not part of it
    const Guard* guard =
        nullptr;  // patterns that never appear in it; must not change while a text is generated. A session takes memory (16 bytes a
                  // pattern) when it first meets a guard with more patterns than before
};

struct Generation {  // caller's storage; either may be null
    Array<char>* text = nullptr;
    Array<int32_t>* ids = nullptr;
    Array<float>* logprobs = nullptr;  // natural, of each generated token, under the model itself (temperature 1)
    void* user = nullptr;
    bool (*stream)(void* user, Text piece) = nullptr;  // whole UTF-8 characters as they come; false: stop
    // Sees the text before it goes to `text` and `stream`, word by word (each with the white space behind it) or line by line; what is longer
    // than 1,024 bytes comes in pieces. It may put another text in its place (in `instead`) or end the reply before it. `ids` and what the
    // session remembers are what the model said.
    Verdict (*inspect)(void* user, Text piece, Array<char>& instead) = nullptr;
    bool inspect_lines = false;
    // Out:
    int generated = 0;
    double seconds = 0;
    bool cancelled = false;
    bool stopped = false;  // by a stop string or the end-of-text token
    bool refused = false;  // ended by `inspect`
    uint64_t unknown = 0;  // characters of the prompt that the tokenizer had never seen
};

// When a beam search ends before its hypotheses do; the names are transformers'.
// yes:   as soon as `beams` hypotheses have ended.
// no:    as soon as `beams` have ended and none that goes on would have a better score than the worst of these if it ended here.
// never: not before none that goes on can have a better score than these, however long it grows.
enum class EarlyStopping : int32_t { no, yes, never };

struct BeamConfig {
    int beams = 4;              // hypotheses that go on side by side; 1: greedy, which ends with its first hypothesis
    int best = 1;               // how many of those that have ended are wanted, at most `beams`
    double length_penalty = 1;  // score = log-probability / tokens^length_penalty: above 0 for longer texts, below 0 for shorter ones
    EarlyStopping early_stopping = EarlyStopping::no;
    int tokens = 200;              // a hypothesis ends after so many, or where the context does
    Span<const int32_t> stop_ids;  // end a hypothesis and belong to it, as the end-of-text token does
    Span<const Text> stop;         // end a hypothesis; not part of its text
    Span<const Text> banned;       // as SampleConfig's
    const Guard* guard = nullptr;  // likewise
};

struct Hypothesis {
    double score = 0;                                         // what they are ordered by, the best first
    double logprob = 0;                                       // natural, the sum over its tokens, under the model itself
    bool ended = false;                                       // by the end-of-text token, a stop id or a stop string, not by the limit
    size_t first_id = 0, ids = 0, first_byte = 0, bytes = 0;  // its places in SearchResult::ids and text
};

struct SearchResult {
    Array<Hypothesis> best;
    Array<int32_t> ids;  // of all of them, one after another; with the token that ended it
    Array<char> text;    // likewise; empty where the model has no tokenizer
    double seconds = 0;
    uint64_t unknown = 0;  // characters of the prompt that the tokenizer had never seen
    Span<const int32_t> ids_of(size_t i) const { return Span<const int32_t>(ids.items + best[i].first_id, best[i].ids); }
    Text text_of(size_t i) const { return Text(text.items + best[i].first_byte, best[i].bytes); }
};

// One conversation: a KV cache and a sampler over a shared, read-only model. One thread at a time; different sessions at the same time.
// Past the end of the context the older half of the text is forgotten (in a chat: whole turns) and the rest is read again.
// After create, a token allocates nothing. With Backend::cuda the weights, once for all sessions of a model, and the KV cache are on the GPU (the
// one that is current when the model's first session is made), which reads 256 ids at once; sampling is the processor's.
// Precision::bf16: matrices, keys and values are rounded to bf16, and what matrices multiply; tf32 computes as f32.
struct Session {
    const Model* model = nullptr;
    Runtime* runtime = nullptr;
    struct SessionState* state = nullptr;  // ours
    int position = 0;                      // ids in the context so far
    uint64_t forgotten = 0;                // ids that fell out of the context
    uint64_t sampled = 0;                  // tokens drawn so far: the counter of the random numbers

    Session() = default;
    Session(Session&& other) noexcept;
    Session& operator=(Session&& other) noexcept;
    ~Session();

    Status create(Runtime& runtime, const Model& model);
    // Goes on with this adapter, which must live as long and stay what it is, or with the model alone (null). On a GPU there are no
    // adapters: the session computes on the processor from then on. What has been read is read
    // again with it, unless keep_cache says that the keys and values that are there serve on: then the next token is still drawn from the
    // logits that are there, and a change costs next to nothing.
    Status use(const Adapter* adapter, bool keep_cache = false);
    void reset();  // forget everything, but not the adapter
    // Becomes a session that goes on where `from` is, as `from` would, to the bit: characters of one scene need not read its text one by one.
    // The full KV pages (of 32 ids) are not copied: both read them, and neither forgets, at the end of the context, what both have read; they
    // forget the older half of what came after it. So the context must have some room left. All else is this session's own: from then on each
    // may do what it likes, in any order, on any thread, and what is shared ends with the last that needs it. A session that is reset, reads a
    // source, or goes on with another adapter without keep_cache, takes memory for pages of its own when it reads next.
    Status fork(Session& from);
    // An encoder-decoder must read a source before anything else. What had been read and said is forgotten, and all that is said from now on
    // looks at this source. As text it ends with the end-of-text token; from 1 to `context` ids.
    Status read_source(Text text);
    Status read_source(Span<const int32_t> ids);
    Status feed(Span<const int32_t> ids);  // reads ids; the logits of the last one are ready then
    Span<const float> logits() const;      // of the token that comes next, `vocab` of them; empty before the first feed
    // Draws one token from the logits and feeds it: a game calls this once a frame.
    Status next(const SampleConfig& config, int32_t& id, float* logprob = nullptr);
    // Continues a prompt. A fresh session first reads the begin-of-text token where the tokenizer has one, which is never forgotten; else an
    // empty prompt starts a new document by what stands between them. With a source, all that is said begins with the end-of-text token. So
    // do reply, search and score; feed adds nothing.
    Status generate(Text prompt, const SampleConfig& config, Generation& result);
    // One turn of a chat by the model's template; `reply_turn`, where not empty, stands in for the model's own (another character speaks).
    Status reply(Text user, const SampleConfig& config, Generation& result, Text reply_turn = Text());
    // Beam search: the likeliest continuations of a prompt (or, with an empty one, of what has been read) that the beams find; not always the
    // likeliest of all, seldom worse than the greedy one. Afterwards the session has read the prompt and no more: feed it the ids that you
    // choose. Hypotheses share the KV pages of what they have in common, and each step reads the weights once for up to 64 of them. The
    // memory (beams * vocab floats, KV pages for beams * tokens positions, small things) is taken by the first search, kept for the
    // following ones, and enlarged where one needs more; a step allocates nothing. The same bits for any number of threads.
    Status search(Text prompt, const BeamConfig& config, SearchResult& result);
    // Log-probability of each token of a text after what the session has read (the first of a fresh session has none: 0, but where the
    // tokenizer has a begin-of-text token, that stands before it, or, where there is a source, the end-of-text token). Returns the sum.
    Status score(Text text, Array<int32_t>& ids, Array<float>& logprobs, double& sum);
    // The attention of the ids read so far: probabilities [heads][position][position] of one layer; to_source: [heads][position][ids of the
    // source], where an encoder has read one.
    Status attention(int layer, Array<float>& probabilities, bool to_source = false);
};
// Draws one token for each of several sessions of the same model, and feeds each its own: as Session::next would do it one after the other,
// to the bit, but the weights are read once for all. One config for all (then give each session another prompt, or they say the same), or one
// for each. ids: [sessions]. After an error no session has said a token that it has not read.
Status next(Span<Session* const> sessions, Span<const SampleConfig> configs, int32_t* ids);

// Draws an id from logits (or log-probabilities) of the host's own, as a session does: by temperature, top_k, top_p, min_p, bias and seed, the
// config's other fields do not count. `sampled`: how many were drawn before. The logits are written over; scratch: as many.
Status sample(Span<float> logits, const SampleConfig& config, uint64_t sampled, Span<int32_t> scratch, int32_t& id);

// ---- Encoder ----------------------------------------------------------------------------------------------------------

// Reads with a model that says nothing: an encoder alone, or a classifier. Each call reads one example as a whole (its targets and source count
// for nothing). One thread at a time; different encoders of one model at the same time. After create, the last three allocate nothing.
struct Encoder {
    const Model* model = nullptr;
    Runtime* runtime = nullptr;
    struct EncoderState* state = nullptr;  // ours

    Encoder() = default;
    Encoder(Encoder&& other) noexcept;
    Encoder& operator=(Encoder&& other) noexcept;
    ~Encoder();

    Status create(Runtime& runtime, const Model& model);
    // A text's ids, the begin-of-text token before them where there is one, at most `context` in all. With `gaps`, each "[MASK]" in it is
    // mask_id; a blank before it goes to where bpe has blanks: into the token that is looked for.
    Status encode(Text text, Array<int32_t>& ids, bool gaps = false) const;
    Status classify(const Example& example, Span<float> probabilities);  // of each of its classes
    // Of each of `vocab` ids: how probable it is in row `at` of the example, in which usually the mask stands.
    Status fill(const Example& example, int at, Span<float> probabilities);
    // A vector for all of it, `width` floats: the mean of the last layer's rows, or of a classifier what its head looks at.
    Status embed(const Example& example, Span<float> vector);
};

// ---- Measuring and checking -------------------------------------------------------------------------------------------

double fma_ceiling(Runtime& runtime, int threads);  // GFLOP/s of a register-only loop of what this machine's kernels train with
// The same of a GPU, with Backend::cuda: FLOP/s of a large product in the runtime's precision, and bytes/s of a large copy, read and written.
Status gpu_ceilings(Runtime& runtime, double& flops, double& bytes);

struct ProfileRow {  // one op in a training step, forward or backward
    char op[48];
    char kind[16];   // embedding, waves, norm, linear, gate, rope, attention, add, dropout, head, update
    bool backward;   // head: both in its forward row
    double seconds;  // the mean of several steps
    double flops;    // useful ones: 2 for a multiply-add; attention causal, nothing computed anew
    double bytes;    // that it must read and write: tensors, gradients and weights, each once; what the op before does on a GPU is its
};
// Trains a fresh model (config.vocab > 0) on random ids for about so many seconds. The last row is the update: the gradients' norm, AdamW,
// zeroing.
Status profile(Runtime& runtime, const Config& config, int batch, double seconds, Array<ProfileRow>& rows);

struct CheckResult {
    char what[64];
    double error, limit;  // relative, as max |difference| / max |reference|
    bool passed;
};
// Gradient checks in double and golden numbers, under the flags that this was compiled with.
Status selftest(Runtime& runtime, Array<CheckResult>& results);

struct Difference {  // what `compare` finds
    char name[56];
    double max_difference, max_reference;
    int64_t index;  // of the first element that differs
    bool same_bits, same_shape;
};
Status compare(const Model& a, const Model& b, Array<Difference>& rows);

}  // namespace babygpt

#undef BABYGPT_AT_ONCE

#endif  // BABYGPT_H
// =====================================================================================================================
// [CHAPTER 2] The platform corner: memory, threads, files, processor, random numbers
// =====================================================================================================================
// Nearly everything that differs between compilers and systems stands here.

#if defined(BABYGPT_IMPLEMENTATION) && !defined(BABYGPT_IMPLEMENTED)
#define BABYGPT_IMPLEMENTED
#define BABYGPT_IMPLEMENTING  // until the end

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <new>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#define BABYGPT_UNDEF_LEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#define BABYGPT_UNDEF_NOMINMAX
#endif
#include <io.h>
#include <windows.h>
#ifdef BABYGPT_UNDEF_LEAN
#undef WIN32_LEAN_AND_MEAN
#undef BABYGPT_UNDEF_LEAN
#endif
#ifdef BABYGPT_UNDEF_NOMINMAX
#undef NOMINMAX
#undef BABYGPT_UNDEF_NOMINMAX
#endif
#else
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

// The numbers below must not depend on the host's flags: no -ffast-math, no contraction of a*b+c behind our back.
#if defined(__clang__)
#pragma float_control(push)
#pragma float_control(precise, on)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("no-fast-math", "fp-contract=off")
#if defined(__i386__) && !defined(__SSE2_MATH__)
#pragma GCC target("sse2,fpmath=sse")  // the x87 unit would round to 64 bits of precision first
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsubobject-linkage"  // our records hold types of this one translation unit; so they shall
#endif

#if defined(__GNUC__) || defined(__clang__)
#define BABYGPT_INLINE inline __attribute__((always_inline))
#define BABYGPT_RARE __attribute__((noinline, cold))  // for what runs once, or when something is wrong: made small, not fast
#define BABYGPT_CALL __attribute__((noinline))        // for what is called from many places and need not be fast: there is less to compile
#else
#define BABYGPT_INLINE inline
#define BABYGPT_CALL
#define BABYGPT_RARE
#endif
// A function of simple loops, which GCC at -O2 would not turn into vectors.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#define BABYGPT_LOOPS __attribute__((optimize("O3")))
#else
#define BABYGPT_LOOPS
#endif
#if defined(__GNUC__) || defined(__clang__) || defined(_MSC_VER)
#define BABYGPT_ALONE __restrict  // nothing else points there
#else
#define BABYGPT_ALONE
#endif
// Between these two: what need not be fast. GCC at -O2 takes three times as long for it as with -Og, and it is most of this file.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define BABYGPT_UNHURRIED_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"Og\")")
#define BABYGPT_UNHURRIED_END _Pragma("GCC pop_options")
#else
#define BABYGPT_UNHURRIED_BEGIN
#define BABYGPT_UNHURRIED_END
#endif
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define BABYGPT_X86 1
#else
#define BABYGPT_X86 0
#endif

namespace babygpt {

const char* error_text(Error error) {
    switch (error) {
#define BABYGPT_X(name, text) \
    case Error::name:         \
        return text;
        BABYGPT_ERRORS(BABYGPT_X)
#undef BABYGPT_X
    }
    return "unknown error";
}

BABYGPT_RARE Status::Status(const Status& other) : error(other.error) { memcpy(message, other.message, strlen(other.message) + 1); }
BABYGPT_RARE Status& Status::operator=(const Status& other) {
    if (this == &other) return *this;
    error = other.error;
    memcpy(message, other.message, strlen(other.message) + 1);
    return *this;
}

namespace {

// ---- messages --------------------------------------------------------------------------------------------------------

template <class T>
BABYGPT_INLINE T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
BABYGPT_INLINE T most(T a, T b) {
    return a < b ? b : a;
}

// A line of text in somebody's fixed buffer; what does not fit is left out. Numbers never depend on the locale.
struct Line {
    char* to;
    size_t room, count = 0;
    Line(char* buffer, size_t size) : to(buffer), room(size) { to[0] = '\0'; }
    void put(Text text);
    void put(const char* text);
    void put(uint64_t value);
    void put(int64_t value);
    void put(int value) { put(static_cast<int64_t>(value)); }
    void put(unsigned value) { put(static_cast<uint64_t>(value)); }
#if defined(__APPLE__) || defined(__wasm__) || defined(_WIN32)
    void put(size_t value) { put(static_cast<uint64_t>(value)); }
#endif
    void put(double value);  // six significant digits, as "%g" writes them
};
BABYGPT_RARE void Line::put(Text text) {
    const size_t n = least(text.size, room - 1 - count);
    memcpy(to + count, text.data, n);
    to[count += n] = '\0';
}
BABYGPT_RARE void Line::put(const char* text) { put(Text(text)); }
BABYGPT_RARE void Line::put(uint64_t value) {
    char digits[24];
    size_t n = sizeof digits;
    do digits[--n] = static_cast<char>('0' + value % 10);
    while ((value /= 10) != 0);
    put(Text(digits + n, sizeof digits - n));
}
BABYGPT_RARE void Line::put(int64_t value) {
    if (value < 0) put("-");
    put(value < 0 ? ~static_cast<uint64_t>(value) + 1 : static_cast<uint64_t>(value));
}
void Line::put(double value) {
    if (value != value) return put("nan");
    if (value < 0) put("-"), value = -value;
    if (value > 1.7e308) return put("inf");
    if (value == 0) return put("0");
    int exponent = 0;
    while (value >= 10) value /= 10, ++exponent;
    while (value < 1) value *= 10, --exponent;
    uint64_t digits = static_cast<uint64_t>(value * 1e5 + 0.5);
    if (digits >= 1000000) digits /= 10, ++exponent;
    char text[8];
    for (int i = 5; i >= 0; --i) text[i] = static_cast<char>('0' + digits % 10), digits /= 10;
    int last = 5;
    while (last > 0 && text[last] == '0') --last;
    const bool scientific = exponent < -5 || exponent > 5;
    const int point = scientific ? 0 : exponent;  // the digit before the decimal point
    if (point < 0) {
        put("0.");
        for (int i = -1; i > point; --i) put("0");
    }
    for (int i = 0; i <= most(last, point); ++i) {
        put(Text(text + i, 1));
        if (i == point && i < last) put(".");
    }
    if (scientific) put("e"), put(exponent);
}

// A piece of a file as a message may show it: not too long, and without what would confuse a terminal.
struct Shown {
    char text[64];
    explicit Shown(Text from) {
        Line line(text, sizeof text);
        line.put(from);
        for (char* c = text; *c; ++c)
            if (static_cast<unsigned char>(*c) < ' ' || *c == 0x7f) *c = '?';
    }
    operator Text() const { return Text(text); }
};

// fail(Error::bad_file, "'", path, "' ends after ", n, " bytes")
template <class... Parts>
BABYGPT_RARE Status fail(Error error, Parts... parts) {
    Status status;
    status.error = error;
    Line line(status.message, sizeof status.message);
    (line.put(parts), ...);
    return status;
}

BABYGPT_RARE inline Status out_of_memory(uint64_t bytes) {
    return fail(Error::out_of_memory, "out of memory: ", bytes, " bytes were asked for");
}

// if (Status s = ...; !s.ok()) return s;
#define BABYGPT_TRY(expression)                          \
    do {                                                 \
        ::babygpt::Status babygpt_status = (expression); \
        if (!babygpt_status.ok()) return babygpt_status; \
    } while (false)

inline bool equal(Text a, Text b) { return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0); }
inline bool starts_with(Text text, Text with) { return text.size >= with.size && equal(Text(text.data, with.size), with); }
inline bool ends_with(Text text, Text with) { return text.size >= with.size && equal(Text(text.end() - with.size, with.size), with); }

template <class To, class From>
BABYGPT_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
// By the bits, since a host's -ffast-math lets a compiler believe that every number is finite.
BABYGPT_INLINE bool is_finite(float x) { return (bits_as<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
BABYGPT_INLINE bool is_finite(double x) { return (bits_as<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

// ---- memory ----------------------------------------------------------------------------------------------------------

constexpr size_t cache_line = 64;
constexpr size_t huge_page = size_t(2) << 20;

// a * b, or false where that is no number of bytes that could be allocated.
template <class A, class B>
bool product(A a, B b, size_t& result) {
    const uint64_t x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
    if (x != 0 && y > static_cast<uint64_t>(PTRDIFF_MAX) / x) return false;
    result = static_cast<size_t>(x * y);
    return true;
}
template <class T>
BABYGPT_INLINE T round_up(T value, T to) {
    return (value + to - 1) / to * to;
}

// Large blocks ask for huge pages: first touch of 4 KiB pages costs ten times more.
inline void* default_allocate(void*, size_t bytes, size_t alignment) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, alignment);
#else
    const bool huge = bytes >= 2 * huge_page;
    void* memory = nullptr;
    if (posix_memalign(&memory, huge ? huge_page : most(alignment, sizeof(void*)), bytes) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (huge) (void)madvise(memory, bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
    return memory;
#endif
}
inline void default_release(void*, void* memory, size_t) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

inline void* allocate(Runtime& runtime, size_t bytes) {
    const size_t wanted = most(bytes, size_t(1));
    return runtime.allocate ? runtime.allocate(runtime.memory_user, wanted, cache_line) : default_allocate(nullptr, wanted, cache_line);
}
inline void release(Runtime& runtime, void* memory, size_t bytes) {
    if (!memory) return;
    const size_t given = most(bytes, size_t(1));
    runtime.release ? runtime.release(runtime.memory_user, memory, given) : default_release(nullptr, memory, given);
}
// Our own records (plain structs with constructors): create<T>(runtime) / destroy(runtime, pointer).
template <class T, class... A>
T* create(Runtime& runtime, A&&... arguments) {
    void* memory = allocate(runtime, sizeof(T));
    return memory ? new (memory) T(static_cast<A&&>(arguments)...) : nullptr;
}
template <class T>
void destroy(Runtime& runtime, T* object) {
    if (!object) return;
    object->~T();
    release(runtime, object, sizeof(T));
}

bool grow(Runtime* runtime, void*& items, size_t& capacity, size_t count, size_t wanted, size_t size) {
    if (wanted <= capacity) return true;
    if (!runtime) return false;
    const size_t next = most(wanted, most(capacity + capacity / 2, 64 / size + 1));
    size_t bytes;
    if (!product(next, size, bytes)) return false;
    void* memory = allocate(*runtime, bytes);
    if (!memory) return false;
    if (count) memcpy(memory, items, count * size);
    release(*runtime, items, capacity * size);
    items = memory;
    capacity = next;
    return true;
}

}  // namespace

template <class T>
bool Array<T>::reserve(size_t wanted) {
    void* memory = items;
    if (!grow(runtime, memory, capacity, count, wanted, sizeof(T))) return false;
    items = static_cast<T*>(memory);
    return true;
}
template <class T>
bool Array<T>::resize(size_t wanted) {
    if (!reserve(wanted)) return false;
    if (wanted > count) memset(static_cast<void*>(items + count), 0, (wanted - count) * sizeof(T));
    count = wanted;
    return true;
}
template <class T>
bool Array<T>::push(const T& value) {
    const T copy = value;  // it may lie in this array
    if (count == capacity && !reserve(count + 1)) return false;
    items[count++] = copy;
    return true;
}
template <class T>
bool Array<T>::append(const T* values, size_t n) {
    if (n > SIZE_MAX - count || !reserve(count + n)) return false;
    if (n) memcpy(static_cast<void*>(items + count), values, n * sizeof(T));
    count += n;
    return true;
}
template <class T>
void Array<T>::clear() {
    if (items) release(*runtime, items, capacity * sizeof(T));
    items = nullptr;
    count = capacity = 0;
}
// The element types that a host uses; the implementation makes the others itself.
template struct Array<char>;
template struct Array<int32_t>;
template struct Array<float>;
template struct Array<SummaryRow>;
template struct Array<CheckResult>;
template struct Array<Difference>;
template struct Array<ProfileRow>;
template struct Array<Hypothesis>;
template struct Array<Guard::Element>;
template struct Array<Guard::Range>;

namespace {

inline bool append(Array<char>& to, Text text) { return to.append(text.data, text.size); }
inline Text view(const Array<char>& from) { return Text(from.items ? from.items : "", from.count); }

// One planned block of memory: sizes are added up first, then everything is taken at once.
struct Block {
    Runtime* runtime = nullptr;
    char* memory = nullptr;
    size_t bytes = 0;
    Block() = default;
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { clear(); }
    bool take(Runtime& from, uint64_t wanted, bool zero) {
        clear();
        const size_t size = static_cast<size_t>(wanted);
        if (wanted > static_cast<uint64_t>(PTRDIFF_MAX)) return false;
        memory = static_cast<char*>(babygpt::allocate(from, size));
        if (!memory) return false;
        runtime = &from;
        bytes = size;
        if (zero) memset(memory, 0, size);
        return true;
    }
    void clear() {
        if (memory) release(*runtime, memory, bytes);
        memory = nullptr;
        bytes = 0;
    }
    void swap(Block& other) {
        Runtime* const its_runtime = other.runtime;
        char* const its_memory = other.memory;
        const size_t its_bytes = other.bytes;
        other.runtime = runtime, other.memory = memory, other.bytes = bytes;
        runtime = its_runtime, memory = its_memory, bytes = its_bytes;
    }
};

// ---- time ------------------------------------------------------------------------------------------------------------

inline double seconds_now() {
#if defined(_WIN32)
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return static_cast<double>(count.QuadPart) / static_cast<double>(frequency.QuadPart);
#else
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#endif
}

// ---- the processor's floating-point mode -----------------------------------------------------------------------------

// Round to nearest, subnormals kept, no traps: every public call that computes stands under one of these, and so does every task of a worker.
struct FloatMode {
#if BABYGPT_X86 && (defined(__SSE__) || defined(_M_X64))
    unsigned found;
    static unsigned get() {
        unsigned mode;
#if defined(__GNUC__) || defined(__clang__)
        __asm__ __volatile__("stmxcsr %0" : "=m"(mode));
#else
        mode = _mm_getcsr();
#endif
        return mode;
    }
    static void set(unsigned mode) {
#if defined(__GNUC__) || defined(__clang__)
        __asm__ __volatile__("ldmxcsr %0" : : "m"(mode) : "memory");
#else
        _mm_setcsr(mode);
#endif
    }
    FloatMode() : found(get()) { set(0x1f80u); }
    ~FloatMode() { set(found); }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    uint64_t found;
    static uint64_t get() {
        uint64_t mode;
        __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set(uint64_t mode) { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode) : "memory"); }
    FloatMode() : found(get()) { set(0); }
    ~FloatMode() { set(found); }
#else
    FloatMode() {}
    ~FloatMode() {}
#endif
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;
};

// ---- threads ---------------------------------------------------------------------------------------------------------

BABYGPT_INLINE void spin_pause() {
#if BABYGPT_X86 && (defined(__GNUC__) || defined(__clang__))
    __builtin_ia32_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("yield");
#endif
}

inline int core_count() {
#if defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return most(1, static_cast<int>(info.dwNumberOfProcessors));
#else
#if defined(__linux__) && defined(CPU_COUNT)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? static_cast<int>(least(n, 1024L)) : 1;
#endif
}

// A mutex with a condition, for workers that sleep.
struct Bell {
#if defined(_WIN32)
    SRWLOCK lock = SRWLOCK_INIT;
    CONDITION_VARIABLE condition = CONDITION_VARIABLE_INIT;
    void enter() { AcquireSRWLockExclusive(&lock); }
    void leave() { ReleaseSRWLockExclusive(&lock); }
    void wait() { SleepConditionVariableSRW(&condition, &lock, INFINITE, 0); }
    void ring() { WakeAllConditionVariable(&condition); }
#else
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    void enter() { pthread_mutex_lock(&lock); }
    void leave() { pthread_mutex_unlock(&lock); }
    void wait() { pthread_cond_wait(&condition, &lock); }
    void ring() { pthread_cond_broadcast(&condition); }
#endif
};

constexpr int max_threads = 256;
// A worker that finds nothing for so long goes to sleep. While the others are still at a job it lets other threads run, but stays awake for
// longer: the next job follows closely, and waking takes 50 us or, in a virtual machine, 400, which is as long as many a job.
constexpr double spin_seconds = 100e-6, open_job_seconds = 5e-3;

// Workers that take the numbers 0..count-1 of one job after the other. The caller works too.
struct Pool {
    Bell bell;
    std::atomic<bool> taken{false};  // somebody's job runs; a second caller works alone
    std::atomic<uint32_t> job{0};    // grows with each job, even when it ends
    std::atomic<bool> closing{false};
    std::atomic<int> sleeping{0};
    std::atomic<int> next{0}, inside{0};
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
    int count = 0;
    int workers = 0;
#if defined(_WIN32)
    HANDLE threads[max_threads];
#else
    pthread_t threads[max_threads];
#endif

    void work() {
        for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    }
    void live() {
        const FloatMode mode;
        uint32_t seen = 0;
        while (true) {
            const double start = seconds_now();
            for (int spins = 1; job.load(std::memory_order_acquire) == seen; ++spins) {
                if (closing.load(std::memory_order_relaxed)) return;
                spin_pause();
                if (spins % 64 != 0) continue;
                const double waited = seconds_now() - start;
                if (waited < spin_seconds) continue;
                if (seen % 2 == 1 && waited < open_job_seconds) {
                    yield();
                    continue;
                }
                bell.enter();
                sleeping.fetch_add(1);
                while (job.load() == seen && !closing.load()) bell.wait();
                sleeping.fetch_sub(1);
                bell.leave();
            }
            // Enter first, then look whether the job is still open: the caller closes it, then waits for those inside.
            inside.fetch_add(1);
            seen = job.load();
            if (seen % 2 == 1) work();
            inside.fetch_sub(1);
        }
    }
    void run(int n, void (*what)(void*, int), void* with) {
        task = what, context = with, count = n;
        next.store(0, std::memory_order_relaxed);
        job.fetch_add(1);  // odd: open
        if (sleeping.load() > 0) {
            bell.enter();
            bell.ring();
            bell.leave();
        }
        work();
        job.fetch_add(1);  // even: closed
        for (int spins = 1; inside.load() != 0; ++spins) {
            spin_pause();
            if (spins % 4096 == 0) yield();
        }
    }
    static void yield() {
#if defined(_WIN32)
        SwitchToThread();
#else
        sched_yield();
#endif
    }
#if defined(_WIN32)
    static DWORD WINAPI enter(void* self) { return static_cast<Pool*>(self)->live(), 0; }
#else
    static void* enter(void* self) { return static_cast<Pool*>(self)->live(), nullptr; }
#endif
    // Fewer threads than asked for is slower, not wrong.
    void start(int wanted) {
        for (workers = 0; workers < wanted; ++workers) {
#if defined(_WIN32)
            threads[workers] = CreateThread(nullptr, 0, &Pool::enter, this, 0, nullptr);
            if (!threads[workers]) break;
#else
            if (pthread_create(&threads[workers], nullptr, &Pool::enter, this) != 0) break;
#endif
        }
    }
    ~Pool() {
        closing.store(true);
        bell.enter();
        bell.ring();
        bell.leave();
        for (int i = 0; i < workers; ++i) {
#if defined(_WIN32)
            WaitForSingleObject(threads[i], INFINITE);
            CloseHandle(threads[i]);
#else
            pthread_join(threads[i], nullptr);
#endif
        }
    }
};

inline Pool* pool_of(Runtime& runtime) {
#if defined(_MSC_VER)
    return static_cast<Pool*>(InterlockedCompareExchangePointer(&runtime.pool, nullptr, nullptr));
#else
    return static_cast<Pool*>(__atomic_load_n(&runtime.pool, __ATOMIC_ACQUIRE));
#endif
}

// The pool is made by the first create() of an object that computes, so that a step or a token never allocates.
inline void start_pool(Runtime& runtime) {
    if (pool_of(runtime) || runtime.parallel || least(runtime.thread_count(), core_count()) == 1) return;
    Pool* pool = create<Pool>(runtime);
    if (!pool) return;                                             // alone, then
    pool->start(least(runtime.thread_count(), core_count()) - 1);  // more would take turns, and wait for whom the system has stopped
#if defined(_MSC_VER)
    const bool first = !InterlockedCompareExchangePointer(&runtime.pool, pool, nullptr);
#else
    void* none = nullptr;
    const bool first =
        __atomic_compare_exchange_n(&runtime.pool, &none, static_cast<void*>(pool), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
#endif
    if (!first) destroy(runtime, pool);  // another thread was as quick
}

// f(i) for each i in [0, count), on the runtime's threads, under our floating-point mode. Who does which i must not matter to the result.
template <class F>
void parallel(Runtime& runtime, int count, const F& f) {
    struct Call {
        const F* f;
        static void run(void* self, int i) { (*static_cast<Call*>(self)->f)(i); }
        static void run_guarded(void* self, int i) {
            const FloatMode mode;
            (*static_cast<Call*>(self)->f)(i);
        }
    } call{&f};
    Pool* pool = pool_of(runtime);
    if (count > 1 && runtime.parallel) return runtime.parallel(runtime.parallel_user, count, &Call::run_guarded, &call);
    if (count > 1 && pool && pool->workers > 0 && !pool->taken.exchange(true, std::memory_order_acquire)) {
        pool->run(count, &Call::run, &call);
        pool->taken.store(false, std::memory_order_release);
        return;
    }
    for (int i = 0; i < count; ++i) f(i);
}

}  // namespace

Runtime::~Runtime() { destroy(*this, static_cast<Pool*>(pool)); }

int Runtime::thread_count() const { return threads > 0 ? least(threads, max_threads) : least(core_count(), max_threads); }

namespace {

BABYGPT_UNHURRIED_BEGIN

// ---- files -----------------------------------------------------------------------------------------------------------

#if defined(_WIN32)
// UTF-8 to UTF-16 for the system's calls.
struct WidePath {
    wchar_t text[1024];
    explicit WidePath(const char* path) {
        if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, text, 1024)) text[0] = L'\0';
    }
};
#endif

inline void* default_open(void*, const char* path, FileMode mode) {
#if defined(_WIN32)
    return _wfopen(WidePath(path).text, mode == FileMode::read ? L"rb" : L"wb");
#else
    FILE* file = fopen(path, mode == FileMode::read ? "rb" : "wb");
    struct stat info;  // a folder can be opened, but not read
    if (file && fstat(fileno(file), &info) == 0 && S_ISDIR(info.st_mode)) {
        fclose(file);
        errno = EISDIR;
        return nullptr;
    }
    return file;
#endif
}
inline int64_t default_size(void*, void* file) {
    FILE* f = static_cast<FILE*>(file);
#if defined(_WIN32)
    if (_fseeki64(f, 0, SEEK_END) != 0) return -1;
    return _ftelli64(f);
#else
    struct stat info;
    if (fstat(fileno(f), &info) != 0 || !S_ISREG(info.st_mode)) return -1;
    return info.st_size;
#endif
}
inline int64_t default_read(void*, void* file, int64_t offset, void* to, int64_t bytes) {
    FILE* f = static_cast<FILE*>(file);
#if defined(_WIN32)
    if (_ftelli64(f) != offset) (void)_fseeki64(f, offset, SEEK_SET);
#else
    if (ftello(f) != offset) (void)fseeko(f, static_cast<off_t>(offset), SEEK_SET);  // a pipe stays where it is
#endif
    const size_t n = fread(to, 1, static_cast<size_t>(bytes), f);
    return n == 0 && ferror(f) ? -1 : static_cast<int64_t>(n);
}
inline int64_t default_write(void*, void* file, const void* from, int64_t bytes) {
    return static_cast<int64_t>(fwrite(from, 1, static_cast<size_t>(bytes), static_cast<FILE*>(file)));
}
inline int default_sync(void*, void* file) {
    FILE* f = static_cast<FILE*>(file);
    if (fflush(f) != 0) return -1;
#if defined(_WIN32)
    return _commit(_fileno(f));
#else
    return fsync(fileno(f));
#endif
}
inline int default_close(void*, void* file) { return fclose(static_cast<FILE*>(file)); }
inline int default_rename(void*, const char* from, const char* to) {
#if defined(_WIN32)
    return MoveFileExW(WidePath(from).text, WidePath(to).text, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) ? 0 : -1;
#else
    return rename(from, to);
#endif
}
inline int default_remove(void*, const char* path) {
#if defined(_WIN32)
    return _wremove(WidePath(path).text);
#else
    return remove(path);
#endif
}
inline int default_sync_folder(void*, const char* path) {
#if defined(_WIN32)
    (void)path;  // MOVEFILE_WRITE_THROUGH has done it
    return 0;
#else
    char folder[4096];
    size_t n = strlen(path);
    while (n > 0 && path[n - 1] != '/') --n;
    if (n >= sizeof folder) return -1;
    memcpy(folder, n ? path : ".", n ? n : 1);
    folder[n ? n : 1] = '\0';
    const int handle = open(folder, O_RDONLY);
    if (handle < 0) return errno == EACCES || errno == EPERM ? 0 : -1;  // one may write in it without being allowed to look
    const int result = fsync(handle), why = errno;
    close(handle);
    return result != 0 && (why == EINVAL || why == ENOTSUP || why == ENOSYS || why == EBADF) ? 0 : result;  // some file systems cannot
#endif
}

inline const FileHooks default_files() {
    FileHooks hooks;
    hooks.open = default_open, hooks.size = default_size, hooks.read = default_read, hooks.write = default_write, hooks.sync = default_sync;
    hooks.close = default_close, hooks.rename = default_rename, hooks.remove = default_remove, hooks.sync_folder = default_sync_folder;
    return hooks;
}

// A path as the hooks want it: ending in a zero.
struct Path {
    char text[4096];
    bool fits;
    explicit Path(Text path, Text suffix = Text()) : fits(path.size + suffix.size < sizeof text) {
        Line line(text, sizeof text);
        line.put(path);
        line.put(suffix);
    }
};

// A file of the host, closed when it ends.
struct File {
    FileHooks hooks;
    void* handle = nullptr;
    char name[128];  // for messages; the end of a long path
    explicit File(Runtime& runtime) : hooks(runtime.files.open ? runtime.files : default_files()) { name[0] = '\0'; }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() { (void)close(); }
    Status open(Text path, FileMode mode) {
        Line line(name, sizeof name);
        if (path.size >= sizeof name) line.put("..."), line.put(Text(path.end() - (sizeof name - 5), sizeof name - 5));
        else line.put(path);
        const Path zero_ended(path);
        if (!zero_ended.fits || path.size == 0)
            return fail(Error::cannot_open, "cannot open '", Text(name), "': the path is empty or too long");
        errno = 0;
        handle = hooks.open(hooks.user, zero_ended.text, mode);
        if (handle) return Status();
        const int why = errno;
        return fail(mode == FileMode::read ? Error::cannot_open : Error::cannot_write, "cannot ", mode == FileMode::read ? "open" : "write",
                    " '", Text(name), "'",
                    why == ENOENT   ? ": no such file or folder"
                    : why == EACCES ? ": permission denied"
                    : why == EISDIR ? ": it is a folder"
                    : why == ENOSPC ? ": the disk is full"
                    : why == EROFS  ? ": the disk is read-only"
                                    : "");
    }
    bool close() {
        if (!handle) return true;
        const bool good = hooks.close(hooks.user, handle) == 0;
        handle = nullptr;
        return good;
    }
    int64_t size() { return hooks.size(hooks.user, handle); }
    // Reads until `bytes` or the end; `got` says how many.
    Status read(int64_t offset, void* to, int64_t bytes, int64_t& got) {
        for (got = 0; got < bytes;) {
            const int64_t n = hooks.read(hooks.user, handle, offset + got, static_cast<char*>(to) + got, bytes - got);
            if (n < 0 || n > bytes - got) return fail(Error::cannot_read, "cannot read '", Text(name), "' at byte ", offset + got);
            if (n == 0) break;
            got += n;
        }
        return Status();
    }
    Status write(const void* from, int64_t bytes) {
        if (hooks.write(hooks.user, handle, from, bytes) == bytes) return Status();
        return fail(Error::cannot_write, "cannot write '", Text(name), "': is the disk full?");
    }
};

// A whole file, or a pipe to its end. A file is read into memory of its own size, a pipe into memory that grows with it.
inline Status read_file(Runtime& runtime, Text path, Array<char>& bytes) {
    bytes = Array<char>(runtime);
    File file(runtime);
    BABYGPT_TRY(file.open(path, FileMode::read));
    const int64_t size = file.size();
    int64_t got = 0;
    if (size >= 0) {
        size_t wanted;
        if (!product(size, 1, wanted) || !bytes.resize(wanted)) return out_of_memory(static_cast<uint64_t>(size));
        BABYGPT_TRY(file.read(0, bytes.items, size, got));
        bytes.count = static_cast<size_t>(got);
        return Status();
    }
    constexpr size_t piece = 1 << 16;
    do {
        if (!bytes.reserve(bytes.count + piece)) return out_of_memory(bytes.count + piece);
        BABYGPT_TRY(file.read(static_cast<int64_t>(bytes.count), bytes.items + bytes.count, static_cast<int64_t>(piece), got));
        bytes.count += static_cast<size_t>(got);
    } while (got == static_cast<int64_t>(piece));
    return Status();
}

// Where the bytes come from: a file or memory.
struct ByteSource {
    File* file = nullptr;
    Text memory;
    Text name = "the checkpoint in memory";
    uint64_t size = 0;
    explicit ByteSource(Text bytes) : memory(bytes), size(bytes.size) {}
    explicit ByteSource(File& from) : file(&from) {}
    Status open(Text path) {
        BABYGPT_TRY(file->open(path, FileMode::read));
        name = Text(file->name);
        const int64_t bytes = file->size();
        if (bytes < 0) return fail(Error::cannot_read, "cannot read '", name, "': a checkpoint must be a file, not a pipe");
        size = static_cast<uint64_t>(bytes);
        return Status();
    }
    // offset + bytes <= size
    Status read(uint64_t offset, void* to, uint64_t bytes) {
        if (!file) {
            if (bytes) memcpy(to, memory.data + offset, static_cast<size_t>(bytes));
            return Status();
        }
        int64_t got = 0;
        BABYGPT_TRY(file->read(static_cast<int64_t>(offset), to, static_cast<int64_t>(bytes), got));
        if (static_cast<uint64_t>(got) == bytes) return Status();
        const uint64_t end = offset + static_cast<uint64_t>(got);
        return fail(Error::cannot_read, "'", name, "' became shorter while it was read: it ends at byte ", end);
    }
};

// Writes beside the path, syncs, renames over it, syncs the folder. Until the rename the old file is whole; after it the new one is.
// write(file) writes the content.
template <class Write>
Status write_atomically(Runtime& runtime, Text path, const Write& write) {
    const Path from(path, ".tmp"), to(path);
    if (!from.fits || path.size == 0) return fail(Error::cannot_write, "cannot write '", path, "': the path is empty or too long");
    File file(runtime);
    BABYGPT_TRY(file.open(Text(from.text), FileMode::write));
    Status status = write(file);
    if (status.ok() && file.hooks.sync(file.hooks.user, file.handle) != 0)
        status = fail(Error::cannot_write, "cannot write '", path, "' to the disk: is it full?");
    if (!file.close() && status.ok()) status = fail(Error::cannot_write, "cannot close '", path, "': is the disk full?");
    if (status.ok() && file.hooks.rename(file.hooks.user, from.text, to.text) != 0)
        status = fail(Error::cannot_write, "cannot rename '", Text(from.text), "' to '", path, "'");
    if (!status.ok()) {
        (void)file.hooks.remove(file.hooks.user, from.text);
        return status;
    }
    if (file.hooks.sync_folder(file.hooks.user, to.text) != 0)
        return fail(Error::cannot_write, "'", path, "' is written, but its folder cannot be synced");
    return status;
}

BABYGPT_UNHURRIED_END

// ---- random numbers --------------------------------------------------------------------------------------------------

// Counter-based: a number is a function of what it is for, so nothing depends on who asked first. The mixer is splitmix64's
// (Steele, Lea & Flood 2014).
BABYGPT_INLINE uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
BABYGPT_INLINE uint64_t random_key(uint64_t seed, uint64_t step, uint64_t op, uint64_t row) {
    return mix(mix(mix(mix(seed) ^ step) ^ op) ^ row);
}
// 32 bits for element `i` under a key; 32-bit arithmetic only, so that vectors do the same. (Finalizer: Wellons' "lowbias32".)
BABYGPT_INLINE uint32_t random_bits(uint64_t key, uint32_t i) {
    uint32_t x = (i + static_cast<uint32_t>(key)) * 0x9e3779b9u ^ static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
// In [0, 1), 53 bits.
BABYGPT_INLINE double random_uniform(uint64_t key, uint64_t i) { return static_cast<double>(mix(key ^ mix(i)) >> 11) * 0x1p-53; }

// The purposes that random keys are made for, beside the ops' own numbers (0, 1, 2, ...).
enum : uint64_t { random_weights = 1u << 20, random_order, random_sample, random_mask };

// ---- e^x and ln x ----------------------------------------------------------------------------------------------------

constexpr double log2_e = 1.44269504088896340736;

// x = n ln 2 + r, |r| <= ln(2)/2; e^r by its Taylor series, 2^n by the exponent's bits.
inline double exp_of(double x) {
    if (x < -700) return 0;
    x = least(x, 700.0);
    const double n = static_cast<double>(static_cast<int64_t>(x * log2_e + (x < 0 ? -0.5 : 0.5)));
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double term = 1, sum = 1;
    for (int k = 1; k <= 14; ++k) term *= r / k, sum += term;
    return sum * bits_as<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}
// ln x for x > 0, always in double: x = m 2^e with m near 1; ln m = 2 atanh((m-1)/(m+1)).
inline double log_of(double x) {
    if (!(x > 0)) return -1e300;
    if (!is_finite(x)) return x;
    int e = 0;
    while (x < 0x1p-1000) x *= 0x1p100, e -= 100;
    const uint64_t bits = bits_as<uint64_t>(x);
    e += static_cast<int>(bits >> 52) - 1023;
    double m = bits_as<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m > 1.4142135623730951) m *= 0.5, ++e;
    const double z = (m - 1) / (m + 1), z2 = z * z;
    double sum = 0;
    for (int k = 21; k >= 1; k -= 2) sum = sum * z2 + 1.0 / k;
    return 2 * z * sum + e * 0.693147180559945309417;
}

}  // namespace
}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 3] Text: UTF-8, JSON and the tokenizers
// =====================================================================================================================
// From bytes to characters, from characters to words, from words to the ids that a model sees; and back.
// In this order: UTF-8 (RFC 3629), JSON (RFC 8259), exact decimal numbers, the classes of Unicode characters, GPT-2's words,
// byte-pair encoding, WordPiece, SentencePiece, learning merges from text, reading and writing tokenizer files, learning WordPiece and unigram
// models, the public Tokenizer.

namespace babygpt {
namespace {

// ---- UTF-8 -----------------------------------------------------------------------------------------------------------

constexpr uint32_t not_utf8 = 0xffffffffu;

// The character at `at` (which is before `end`) and how many bytes it takes. What is no UTF-8 is `not_utf8`, and `length` is then the
// longest start of a character that stands there, at least 1: where Python and browsers put one U+FFFD (Unicode 3.9, "maximal subparts").
inline uint32_t decode_utf8(const char* at, const char* end, size_t& length) {
    const unsigned char* s = reinterpret_cast<const unsigned char*>(at);
    const unsigned lead = s[0];
    length = 1;
    if (lead < 0x80) return lead;
    if (lead < 0xc2 || lead > 0xf4) return not_utf8;
    const size_t wanted = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4, available = static_cast<size_t>(end - at);
    // The second byte keeps out overlong forms, surrogates and what is above U+10FFFF.
    const unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (available < 2 || s[1] < low || s[1] > high) return not_utf8;
    uint32_t code = (lead & (0x7fu >> wanted)) << 6 | (s[1] & 0x3fu);
    for (length = 2; length < wanted; ++length) {
        if (length == available || (s[length] & 0xc0u) != 0x80) return not_utf8;
        code = code << 6 | (s[length] & 0x3fu);
    }
    return code;
}

inline bool is_utf8(Text text) {
    for (size_t i = 0, length; i < text.size; i += length)
        if (decode_utf8(text.data + i, text.end(), length) == not_utf8) return false;
    return true;
}

// Writes the 1 to 4 bytes of a character; a surrogate or what is no character is written as U+FFFD.
inline size_t encode_utf8(uint32_t code, char* to) {
    if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) code = 0xfffd;
    const size_t length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    if (length == 1) return to[0] = static_cast<char>(code), 1;
    for (size_t i = length - 1; i > 0; --i, code >>= 6) to[i] = static_cast<char>(0x80 | (code & 0x3f));
    to[0] = static_cast<char>((0xf00u >> length & 0xf0u) | code);
    return length;
}
inline bool append_utf8(Array<char>& to, uint32_t code) {
    char bytes[4];
    return to.append(bytes, encode_utf8(code, bytes));
}

// ---- plain words -----------------------------------------------------------------------------------------------------

// The small letter of a Latin, Greek or Cyrillic capital (Unicode's simple mappings, by ranges); all four Turkish i's become one, since a
// capital I does not say which language it is from.
inline uint32_t small_letter(uint32_t c) {
    if (c == 'I' || c == 0x130 || c == 0x131) return 'i';
    if ((c >= 'A' && c <= 'Z') || (c >= 0xc0 && c <= 0xde && c != 0xd7) || (c >= 0x391 && c <= 0x3a9) || (c >= 0x410 && c <= 0x42f))
        return c + 32;
    if (c >= 0x400 && c <= 0x40f) return c + 80;
    if (c == 0x178) return 0xff;
    if ((c >= 0x100 && c <= 0x137) || (c >= 0x14a && c <= 0x177)) return c | 1;
    if ((c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17e)) return c + (c & 1);
    return c;
}
// Is a small letter, or a digit, of a word?
inline bool is_of_word(uint32_t c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
           (c >= 0xc0 && c != not_utf8 && !(c >= 0x2000 && c < 0x2070) && !(c >= 0x3000 && c < 0x3040));
}
// Appends a text as plain words: small letters and digits, one space between words. An apostrophe closes the gap, other punctuation is a space.
inline bool append_plain_words(Array<char>& to, Text text) {
    const size_t start = to.count;
    bool space = false, good = true;
    for (size_t i = 0, length; i < text.size && good; i += length) {
        const uint32_t c = small_letter(decode_utf8(text.data + i, text.end(), length));
        if (c == '\'' || c == 0x2019 || c == 0x307) continue;  // 0x307: the dot that some systems put over a small i
        const bool word = is_of_word(c);
        if (word && space && to.count > start) good = to.push(' ');
        if (word) good = good && append_utf8(to, c);
        space = !word;
    }
    return good;
}

BABYGPT_UNHURRIED_BEGIN

// ---- exact decimal numbers -------------------------------------------------------------------------------------------

// A whole number of up to 1,280 bits: enough to hold any double times or over the power of ten that makes its digits whole.
struct Wide {
    uint32_t words[40] = {};
    bool lost = false;  // a division or shift left a remainder
    explicit Wide(uint64_t value) { words[0] = static_cast<uint32_t>(value), words[1] = static_cast<uint32_t>(value >> 32); }
    void multiply(uint32_t by) {
        uint64_t carry = 0;
        for (uint32_t& word : words) carry += uint64_t(word) * by, word = static_cast<uint32_t>(carry), carry >>= 32;
    }
    void divide(uint32_t by) {
        uint64_t rest = 0;
        for (int i = 39; i >= 0; --i) rest = rest << 32 | words[i], words[i] = static_cast<uint32_t>(rest / by), rest %= by;
        lost |= rest != 0;
    }
    void scale(uint32_t base, int power) {  // times base^power
        for (; power > 0; --power) multiply(base);
        for (; power < 0; ++power) divide(base);
    }
    void scale_by_two(int power) {
        for (; power >= 31; power -= 31) multiply(1u << 31);
        for (; power <= -31; power += 31) divide(1u << 31);
        power > 0 ? multiply(1u << power) : divide(1u << -power);
    }
    int bits() const {
        for (int i = 1279; i >= 0; --i)
            if (words[i / 32] >> (i % 32) & 1) return i + 1;
        return 0;
    }
    // The value, a half or more rounded up to even.
    uint64_t rounded_half() {
        const bool half = words[0] & 1, above = lost;
        divide(2);
        const uint64_t value = uint64_t(words[1]) << 32 | words[0];
        return value + (half && (above || (value & 1)));
    }
};

// digits * 10^power, the nearest double (Clinger 1990, by whole numbers).
inline double decimal_to_double(uint64_t digits, int power) {
    if (digits == 0 || power < -345) return 0.0;
    if (power > 309) return bits_as<double>(uint64_t(0x7ff) << 52);
    Wide wide(digits);
    int two = 0;  // wide * 2^two is the value
    if (power < 0) two = -1216, wide.scale_by_two(1216);
    wide.scale(10, power);
    // 53 bits and one to round by; fewer where the smallest doubles end.
    int shift = most(wide.bits() - 54, -1075 - two);
    wide.scale_by_two(-shift);
    two += shift + 1;
    uint64_t mantissa = wide.rounded_half();
    if (mantissa >> 53) mantissa >>= 1, ++two;
    if (two > 971) return bits_as<double>(uint64_t(0x7ff) << 52);
    if (mantissa >> 52 == 0) return bits_as<double>(mantissa);  // subnormal: two is -1074
    return bits_as<double>((mantissa & ((uint64_t(1) << 52) - 1)) | static_cast<uint64_t>(two + 1075) << 52);
}

// The shortest decimal that reads back as the same double: "0.001", "1e-05", "12345678". Not finite: "null", as JSON has no word for it.
inline bool append_number(Array<char>& to, double value) {
    const uint64_t bits = bits_as<uint64_t>(value);
    if (!is_finite(value)) return append(to, "null");
    if (bits >> 63 && !to.push('-')) return false;
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
    const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1), mantissa = exponent ? fraction | uint64_t(1) << 52 : fraction;
    const uint64_t positive = bits & ~(uint64_t(1) << 63);
    const int two = (exponent ? exponent : 1) - 1075;  // mantissa * 2^two is the value
    if (mantissa == 0) return to.push('0');
    uint64_t digits = 0;
    int ten = 0;  // digits * 10^ten is the value
    for (int wanted = 15; wanted <= 17; ++wanted) {
        uint64_t limit = 1;
        for (int i = 0; i < wanted; ++i) limit *= 10;
        // The first guess at the power may be one too small; the digits are then one too many.
        int magnitude = 0;
        for (uint64_t m = mantissa; m > 1; m >>= 1) ++magnitude;
        ten = (magnitude + two) * 301 / 1000 - (magnitude + two < 0) - wanted + 1;
        for (;; ++ten) {
            Wide wide(mantissa);
            if (ten < 0) {  // up first, so that nothing is lost before the end
                wide.scale(5, -ten);
                wide.scale_by_two(two - ten + 1);
            } else {
                wide.scale_by_two(two + 1);
                wide.scale(10, -ten);
            }
            digits = wide.rounded_half();
            if (digits < limit) break;
        }
        if (bits_as<uint64_t>(decimal_to_double(digits, ten)) == positive) break;
    }
    for (; digits % 10 == 0; digits /= 10) ++ten;
    char text[24];
    size_t first = sizeof text;
    for (uint64_t rest = digits; rest; rest /= 10) text[--first] = static_cast<char>('0' + rest % 10);
    const char* digit = text + first;
    const int count = static_cast<int>(sizeof text - first), point = count + ten;  // the point stands after this many digits
    bool good = true;
    if (point > 17 || point < -3) {
        good &= to.push(digit[0]);
        if (count > 1) good &= to.push('.') && to.append(digit + 1, static_cast<size_t>(count - 1));
        char number[16];
        Line line(number, sizeof number);
        line.put(point - 1 < 0 ? "e-" : "e+");
        if (point - 1 > -10 && point - 1 < 10) line.put("0");
        line.put(point - 1 < 0 ? 1 - point : point - 1);
        return good && append(to, Text(number, line.count));
    }
    if (point <= 0) good &= append(to, "0.");
    for (int i = least(point, 0); i < most(count, point); ++i) {
        if (i == point && i > 0) good &= to.push('.');
        good &= to.push(i < 0 || i >= count ? '0' : digit[i]);
    }
    return good;
}

// ---- JSON ------------------------------------------------------------------------------------------------------------

// Reads a JSON text from left to right. The caller asks for what it expects; the first thing that is not as asked is remembered in
// `problem` (and `at`), and from then on every call returns false. So loops end by themselves, and one look at the end is enough:
//
//     Json json(runtime, text);
//     int64_t layers = 0;
//     for (json.enter_object(); json.next_key();) {
//         if (json.key_is("n_layer")) json.integer(layers);
//         else if (json.key_is("list")) for (json.enter_array(); json.next_item();) json.string(name);
//         else json.skip();                       // every value must be taken or skipped
//     }
//     BABYGPT_TRY(json.finish("config.json"));    // the first problem, or something after the end
//
// Strings may have any escape; a lone surrogate becomes U+FFFD; bytes that are no UTF-8 are passed on as they are.
enum class JsonType { none, object, array, string, number, boolean, null };

struct Json {
    Text text;
    size_t at = 0;                  // the byte that is read next
    const char* problem = nullptr;  // what was wrong at `at`; null: nothing so far
    Array<char> key;                // of the object's member whose value is next
    bool first = true;              // just after '{' or '[': no comma before the next one
    Json(Runtime& runtime, Text document) : text(document), key(runtime) {}

    // For the caller too: json.reject("n_layer must be positive").
    BABYGPT_RARE bool reject(const char* why) {
        if (!problem) problem = why;
        return false;
    }
    // The type of the value that is next; none at the end or after an error.
    JsonType peek() {
        space();
        if (problem || at >= text.size) return JsonType::none;
        switch (text[at]) {
            case '{':
                return JsonType::object;
            case '[':
                return JsonType::array;
            case '"':
                return JsonType::string;
            case 't':
            case 'f':
                return JsonType::boolean;
            case 'n':
                return JsonType::null;
            default:
                return text[at] == '-' || is_digit() ? JsonType::number : JsonType::none;
        }
    }
    bool enter_object() { return first = take('{') || reject("expected '{'"); }
    // Goes to the next member and reads its key; false after the last.
    bool next_key() {
        if (!next('}')) return false;
        return read_string(&key) && (take(':') || reject("expected ':'"));
    }
    BABYGPT_CALL bool key_is(Text name) const { return equal(Text(key), name); }
    bool enter_array() { return first = take('[') || reject("expected '['"); }
    bool next_item() { return next(']'); }

    bool string(Array<char>& to) { return read_string(&to); }  // replaces what was in `to`
    bool boolean(bool& value) {
        space();
        if (word("true")) return value = true;
        if (word("false")) return value = false, true;
        return reject("expected true or false");
    }
    bool null() {
        space();
        return word("null") || reject("expected null");
    }
    bool integer(int64_t& value) {
        bool negative, whole;
        uint64_t digits;
        int power;
        const size_t start = (space(), at);
        if (!read_number(negative, whole, digits, power)) return false;
        if (!whole || power != 0 || digits > (uint64_t(1) << 63) - !negative)
            return at = start, reject("expected a whole number of at most 64 bits");
        value = static_cast<int64_t>(negative ? ~digits + 1 : digits);
        return true;
    }
    // The nearest double to the number's first 19 digits.
    bool number(double& value) {
        bool negative, whole;
        uint64_t digits;
        int power;
        if (!read_number(negative, whole, digits, power)) return false;
        value = decimal_to_double(digits, power);
        if (negative) value = -value;
        return true;
    }
    bool skip() {
        Text raw;
        return skip(raw);
    }
    // Passes over a value of any kind, and gives its text. No deeper than 64 levels.
    bool skip(Text& raw) {
        const size_t start = (space(), at);
        uint64_t objects = 0;  // a bit a level: it is an object
        int depth = 0;
        do {
            if (depth > 0) {
                const bool inside = objects & 1 ? next_key_skipped() : next(']');
                if (problem) return false;
                if (!inside) {
                    objects >>= 1, --depth;
                    continue;
                }
            }
            bool yes, negative, whole;
            uint64_t digits;
            int power;
            switch (peek()) {
                case JsonType::object:
                case JsonType::array:
                    if (depth++ == 64) return reject("nested deeper than 64 levels");
                    objects = objects << 1 | (text[at] == '{');
                    ++at, first = true;
                    break;
                case JsonType::string:
                    read_string(nullptr);
                    break;
                case JsonType::number:
                    read_number(negative, whole, digits, power);
                    break;
                case JsonType::boolean:
                    boolean(yes);
                    break;
                case JsonType::null:
                    null();
                    break;
                case JsonType::none:
                    return reject("expected a value");
            }
        } while (!problem && depth > 0);
        raw = Text(text.data + start, at - start);
        return !problem;
    }
    // ok where all was as asked and nothing but white space follows.
    Status finish(Text name) {
        space();
        if (!problem && at < text.size) problem = "expected the end";
        if (!problem) return Status();
        if (problem == memory_problem()) return out_of_memory(key.count);
        return fail(Error::bad_file, "'", name, "', byte ", at, ": ", problem);
    }

 private:
    static const char* memory_problem() {
        static const char text[] = "out of memory";
        return text;
    }
    bool is_digit() const { return at < text.size && text[at] >= '0' && text[at] <= '9'; }
    BABYGPT_CALL void space() {
        while (at < text.size && (text[at] == ' ' || text[at] == '\n' || text[at] == '\r' || text[at] == '\t')) ++at;
    }
    BABYGPT_CALL bool take(char c) {
        space();
        if (problem || at >= text.size || text[at] != c) return false;
        ++at;
        return true;
    }
    bool word(Text expected) {
        if (problem || !starts_with(Text(text.data + at, text.size - at), expected)) return false;
        at += expected.size;
        first = false;
        return true;
    }
    // To the next element of the array or object that `close` ends.
    bool next(char close) {
        if (take(close)) return first = false;
        if (!first && !take(',')) return reject(close == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
        first = true;  // until its value has been read; a ',' that nothing follows is an error
        space();
        if (at < text.size && text[at] == close) return reject("expected a value");
        return !problem;
    }
    bool next_key_skipped() { return next('}') && read_string(nullptr) && (take(':') || reject("expected ':'")); }
    bool hex(uint32_t& code) {
        code = 0;
        for (int i = 0; i < 4; ++i, ++at) {
            const char c = at < text.size ? text[at] : '\0';
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) return reject("expected four hexadecimal digits");
            code = code << 4 | static_cast<uint32_t>(digit);
        }
        return true;
    }
    bool read_string(Array<char>* to) {
        if (!take('"')) return reject("expected a string");
        if (to) to->count = 0;
        for (;;) {
            const size_t run = at;
            while (at < text.size && static_cast<unsigned char>(text[at]) >= 0x20 && text[at] != '"' && text[at] != '\\') ++at;
            if (to && !to->append(text.data + run, at - run)) return reject(memory_problem());
            if (at >= text.size) return reject("the string does not end");
            if (text[at] == '"') return ++at, first = false, true;
            if (text[at] != '\\') return reject("a control character in a string");
            if (++at >= text.size) return reject("the string does not end");
            static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
            uint32_t code = not_utf8;
            for (int i = 0; i < 8; ++i)
                if (names[i] == text[at]) code = static_cast<unsigned char>(values[i]);
            if (code == not_utf8 && text[at] != 'u') return reject("an unknown escape in a string");
            ++at;
            if (code == not_utf8) {
                if (!hex(code)) return false;
                // A high surrogate and a low one after it are one character.
                if (code >= 0xd800 && code < 0xdc00 && starts_with(Text(text.data + at, text.size - at), "\\u")) {
                    const size_t before = at;
                    uint32_t low;
                    at += 2;
                    if (!hex(low)) return false;
                    if (low >= 0xdc00 && low < 0xe000) code = 0x10000 + ((code & 0x3ff) << 10) + (low & 0x3ff);
                    else at = before;
                }
            }
            if (to && !append_utf8(*to, code)) return reject(memory_problem());
        }
    }
    // -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?  as digits * 10^power; `whole`: neither a point nor an exponent.
    bool read_number(bool& negative, bool& whole, uint64_t& digits, int& power) {
        space();
        if (problem) return false;
        const size_t start = at;
        negative = at < text.size && text[at] == '-';
        at += negative;
        digits = 0, power = 0, whole = true;
        const size_t integer_part = at;
        if (!read_digits(digits, power, false)) return at = start, reject("expected a number");
        if (text[integer_part] == '0' && at - integer_part > 1) return at = start, reject("a number with a leading zero");
        if (at < text.size && text[at] == '.') {
            ++at, whole = false;
            if (!read_digits(digits, power, true)) return reject("expected a digit after the point");
        }
        if (at < text.size && (text[at] == 'e' || text[at] == 'E')) {
            ++at, whole = false;
            const bool down = at < text.size && text[at] == '-';
            at += at < text.size && (text[at] == '-' || text[at] == '+');
            if (!is_digit()) return reject("expected a digit in the exponent");
            int exponent = 0;
            for (; is_digit(); ++at) exponent = least(exponent * 10 + (text[at] - '0'), 100000);
            power += down ? -exponent : exponent;
        }
        first = false;
        return true;
    }
    // Keeps 19 digits; those after them only move the point.
    bool read_digits(uint64_t& digits, int& power, bool fraction) {
        const size_t start = at;
        for (; is_digit(); ++at) {
            const bool kept = digits < 1000000000000000000u;
            if (kept) digits = digits * 10 + static_cast<uint64_t>(text[at] - '0');
            if (kept == fraction) power = fraction ? most(power - 1, -100000) : least(power + 1, 100000);
        }
        return at > start;
    }
};

// A text as a JSON string, quotes included. What is no UTF-8 becomes U+FFFD.
inline bool append_json(Array<char>& to, Text text) {
    bool good = to.push('"');
    for (size_t i = 0, length; i < text.size && good; i += length) {
        const uint32_t code = decode_utf8(text.data + i, text.end(), length);
        if (code == '"' || code == '\\') good = to.push('\\') && to.push(text[i]);
        else if (code == '\n') good = append(to, "\\n");
        else if (code < 0x20) good = append(to, "\\u00") && to.push("01"[code >> 4]) && to.push("0123456789abcdef"[code & 15]);
        else if (code == not_utf8) good = append_utf8(to, 0xfffd);
        else good = to.append(text.data + i, length);
    }
    return good && to.push('"');
}
inline bool append_json(Array<char>& to, int64_t value) {
    char digits[24];
    Line line(digits, sizeof digits);
    line.put(value);
    return append(to, Text(digits, line.count));
}

}  // namespace
}  // namespace babygpt
namespace babygpt {

BABYGPT_UNHURRIED_END

// ---- the classes of Unicode characters ---------------------------------------------------------------------------------

namespace {

enum CharClass : unsigned char { class_other, class_letter, class_number, class_white, beyond_ascii };

// \p{L}, \p{N} and white space of Unicode 16.0: how many characters to leave out, how many more than one to take, and so on. A number is
// written to the base 26, capital letters for all digits but the last.
constexpr char letter_ranges[] =
    "CnzgzBvakaeafwbBebRpeloehabaEzebbcdbagabcbabtbDebFiiGjbBlcagBoCtBaedBtBqBjbbDubapbhbkccaqabBdBdDklayBgjbeafveajadaxyhk"
    "fxbfrBpCgCbdasahjppehcbcvbgbadddaqanbbcobkaifebcvbgbbbbbbBfdbatcqibcbvbgbbbedasapbxalhcbcvbgbbbedaBebbcparabfdcbddbbab"
    "bdbdcdlwaCahbcbwbpdaBaccacbBeaehbcbwbjbedaBfbbbpbribcbBocaqafcicyffrdxbibacgCgBvbbmgCgbbabebxbabjbbjacebavdBgaClhbBjBb"
    "eElBquaqfeddadbhcemmarBlbafacBqbMubdcgbabdcBobdcBgbdcgbabdcobCebdcCoBlpqDhcfdXvcqbzfCwghhrnsorombcpBzBjaeaCpDkhecBhbaf"
    "CrkBeBxBdcelBrezCcwjCaDeaDpBurhCcBdnbkBrBaBjBpckBjckfBqccBpdbfbbdafHjCmKrcfcBlcfchbabababBecCabgbadcbgddcfemfcbgEmanaq"
    "mDxaeacjbadegabababdbkcdfeeaCabDZfIugddbmBlbafacCdhaqwjgbgbgbgbgbgbgbgDcaSbbBqefbeDhgcbDlbdfBqbDprBfBwpTsJTnCmBGUeCpBt"
    "cKidpkbuBuqBecCrBxicDycCocbbabhvpbcbdbwBdBzoBxCkfdabblBbkwzBchBuBcaqebjkebBoxcbhuwdadBxbadbcecabaycckhcmfcfcfjgbgbBqbn"
    "gEkBdQNrmweBwMNcObcEbBmgmefabjbmbebabbbbbEdBhNysClcCbBolEmebFeBkzgzlDkdfcfcfccBjlbzbsbbbocnBiEsOzBcdBwBvBfntbhgBlkBdcB"
    "jehBwGbsBjeBjeBniBzmkbobgbbbkbobgbbdBzmLyjvkhyfbBpbiCrfcabBrbbdacwkwjBeCnsbbkvkzCsCdgbCmapdbcbBcBqBcdBcBjhbBbBbCbkvksn"
    "rEgCuCdBynBynBjBmBbjwJqBpgbqcChBckaivBqrBuuBbwmCaCfbcanBsBgyBaBjBdacaiBidamBvodvabaBjrbytbClgbabdbobjhBuBmhcbcvbgbbbed"
    "asameBejbacabBlbazabaBsCasducBeBvubbaHcBuBpdBkBvuaChBqnaCtBaBlgHdBrEmClBfhcachbbbxpabaDqhcBmqabaBcakBnhavalBttasCuHrBg"
    "BfibBkraBxBdEigbbbBlvazfbbbBfoaMpspabmbBhEuaDbBJlIwHnDXkDspBPfrfzFXqfWkKDdBdCPuVwhBerDarBdsBvqdBfufsQqBsIdClEyCwfaComC"
    "mbbaBcJBziBVpBpjNFrdbgbbbLepaBdccaodiPfDKuEcfmdihjIWkDgbCsbbcacbcdblbabgbCmbdchbgbBbbdbebadgbNbcybybBebybBebybBebybBeb"
    "ybhCSyBegfKbCjFqBskgqaMjBdsBrSqBbIuBdcaTbgbdbbbobHoChCphaBUidbBabbbacabjbdbabagaeabababcbbbacabababababbbacdbgbdbdbabj"
    "bqfcbebqGOaCLFbBgGDtgIncINpoLBkpXxDQwUvCFyHHyfGFf";
constexpr char number_ranges[] =
    "BwjEqbfaccCDljFejHqjPwjEojefEejEojEojcfEgmEljigDzjEaghsEfjDsjEojCstKijCsjBBrtBHxcJfjgjwjLojEykGjjgjHajDijFejgjBOgadfgj"
    "HqByceBByChDavYgBdCBhaBDxaziocNfdFijBehboBgjBnoBRSajHgjMifFyjBmjHqjwjDijPqjBFMcjSzBsmCerbNdBaBkdBdaiaFeeHujBKghzgBniCx"
    "ewfGebcpcBtCmiCabBecCxeEahyhBpgMsfBwjgjKsBeGcjBqdEigFeBdEyjCijFojhtJrjNejEojOkjDyjgtCylQesDpjZmjDiBcItjCsjQgjDyuBPbEgX"
    "AfjDMcjDijFejbgUgjKcwBJSzjCEwtmtEeyBQrBxDNcjQgjTijJnjBBoiEyjBElCgbcbdCyBsboBLamEDfj";
constexpr char white_ranges[] = "jesaDwaBaaIHjaDPnkBdbfaBvaFXwa";
constexpr uint32_t classes_end = 205744;  // from here on everything is `class_other`

// Two bits a character: 50 KiB.
inline void mark_ranges(unsigned char* classes, const char* ranges, unsigned mark) {
    uint32_t code = 0, value = 0;
    for (bool take = false; *ranges; ++ranges) {
        const bool last_digit = *ranges >= 'a';
        value = value * 26 + static_cast<uint32_t>(*ranges - (last_digit ? 'a' : 'A'));
        if (!last_digit) continue;
        const uint32_t end = code + value + take;
        for (; take && code < end; ++code) classes[code / 4] = static_cast<unsigned char>(classes[code / 4] | mark << code % 4 * 2);
        code = end, value = 0, take = !take;
    }
}

// ---- BERT's characters -------------------------------------------------------------------------------------------------

// What BERT's clean-up and cutting make of a character (tools/bert_tables.py; the punctuation is that of Unicode 8, as in Hugging Face's
// library, with all of ASCII's signs). The two maps are runs of pairs: the gap from the last code, how many more than one, the step of the
// codes, the step of the targets, and how far the first target is from the last one (doubled; plus one: below it). Target 0: no character.
enum WordClass : unsigned char { word_plain, word_white, word_punctuation, word_removed };  // white and removed: removed
constexpr char removed_ranges[] = "aicbbrDrBgnaCAkfwaHkaBxaGLiaDAqeBaeBxebjCUOeJMdCHbaJpcbaGIxaCNCkdHWxh";
constexpr char punctuation_ranges[] =
    "BhokgBafBadBiafadakbdadaBBaaiaRyfBpbBzabacacaBsbubbbnacbCwdDyaBrnIzcCcoBfaKbbkaOtaBDraDmakbGmobaBldCtaCweebEhfGpaXoiFvaXwbBsbDacCtbG"
    "bcbcBlkMbbIibEygbfGqgFzdCheCkbCmhlaBFwxitbmblBebobYjdBdbBPtnDbbBfjPnvCldBgbBDjdbbEiaFnBubsRecejclqamaDuaDmaBRYgbKjcDvakaElfOqdDibBoc"
    "baBxbBvaDtmqbEudEwbqbJpaBEUsbIajwBibnbaeabbFtcbfbdkbdbBacbaBbababgPucZsaBwaPyaBCpaHraBfaKmiBmaEigCogDldBTygEfbbdEwdBwbDbedanabcDkfEd"
    "aUuaJqwEbcJocEZxeBAMzbFdaCneiaBEVaaLIle";
constexpr char accent_map[] =
    "HkfbaFacbbcebcbaabdbaicbbbkbdbaaddbambabaidfbaqcbbcebcbaabdbaicbbbkbdbaaddbambbcaibabaEjbabaCmbabaCnbabaCmbabaCnbabaCmbabaCjbabaCmba"
    "baCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmdabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCjbabaCmbabaCnbabaCmba"
    "baCnbabaCmbabaCnbabaCmbabaClbabaCmdabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCneabacbabaCmbabaClbabaCmcabaClbabaCmbabaCnbab"
    "aCmbabaCnbabaCmfabaCjbabaCmbabaCnbabaCmbabaCnbabaCmeabaClbabaCmbabaCnbabaCmbabaCnbabaCmdabaChbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbab"
    "aCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmdabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbab"
    "aCmbabaCjbabaCmbabaCjbabaCmbbbbCnbabaCmbabaCnbabaCmbabaCnbabaCmBiabaDjbabaCmoabaCbbabaCmBdabaEbbabaCmbabaBxbabaCmbabaCbbabaCmbabaCbb"
    "abaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmcabaEbbabaCmbabaCnbabaCmbabaHubabaCmdabaMhbabaCmbabaCfbabaCmbabaCfbabaCmbabaCnb"
    "abaCmbabaZgbabaQwbabaBQneabaCtbabaCmdabaBzbabaCmbabaDnbabaCmbabaHubabaCmbabaBdbabaCmbabaOdbabaCmbabaCnbabaCmbabaCfbabaCmbabaCnbabaCm"
    "babaCfbabaCmbabaCnbabaCmbabaCbbabaCmbabaCnbabaCmbabaChbabaCmbabaCnbabaCmbabaChbabaCmbabaCnbabaCmbabaCrbabaCmbabaClbabaCmdabaDlbabaCm"
    "habaDbbabaCmbabaCfbabaCmbabaBtbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaBtbabaCmHxEhbaJjfabaCBqkabaBXdhabaIkbabaCFibabaCEfbcbcCE"
    "mcabamcabambabaibabaBgBaabaCnbabaybabaybcbcibabayBaabazbabaybabanbabambabaifbbasBsbbaFecabafeabaBbfabaBobabafbabawlabaxBgabaCmxbbahc"
    "abafeabaCsfabaCfbabafbabawybbbDumebaDJvCgabaDCmbabaCmoabaCzbabaCmbabaCnbabaCmdabaCdbabaCmdbbbMobabaPbbabaCmbabaClbabaCmdabaClbabaCmb"
    "abaCnbabaCmbabaCbbabaCmdbbbNcbabaOnbabaCmbabaDhbabaCmbabaCnbabaCmbabaCnbabaCmbabaCfbabaCmdabaCfbabaCmFwBsbaDGpcbcaabbcaabbcaaCvkbaai"
    "bbaERebabaCobabaCpbabaCsBlubaETxrabaaDcabaFEocabaBprabaBidgbaFEjdfbaadbbaacdbaaBkabaaBfBabaaDokbaaChibaaBjdbaacibaaccbaacebaaBscbaaF"
    "gBfbaaBnabaGYiiabaqdabaggbcaGZffhbaafabaaegbaabcbbGWwbabakbbbbkbabasbabaidbbaGYxBeabaaChabaafdbaahabaHKoaabatbabasaabaBgbabaHLvpbbbH"
    "HqcabaBadbbaHItBebbaaBxabaHSudabamgabaHThfbbaafbbaadcbaaeabaaibbbHQqbabakdabaBesbbaHSheabaambbaaCgabaafebaacbbaafabaavbbaaBeabaaChab"
    "aadbcaabcbaaeabaIOcdabaaaabatbabasaabaBgbabaIPjjabaagbbbILefbbaILhBfabaasabaITwaabaFiBsabaIZfkabaIXwaabarbabasaabatbabaqaabaBibabaIZ"
    "fBzabaaCkcbaagcbaacdbaaibbaambbaaBeabaaChabaadabaababaJSsgabaJStbbbbJSscbbaBpaabaBmbbbaJStvbbaaBeabaaCmdbaagabaKBkaabarbabasaabatbab"
    "aqaabaBibabaKCtvbbaaDzabaaicbaacabaaebcaKMsaabavbabauaabavbabauaabamDfabaKNfdgbaanhbaaDvabaadfbaacbbaamfbaaCxbbaaBcccaakabaLOmkabauf"
    "abakfabakfabaknabaCdinbaLOjcebaacbbaagkbaacBjbaakabaaDsabaMFyhdbaMFzcfbaacbbaadbbaaBabbaafcbaardbaaoabaadbbaahabaaqabaaBBccbaaBKlcba"
    "aBecbaaBebbaaBfbbaaCnbbaacgbaajabaadkbaakabaaBucbaaGaabaaEpcbaafbbaakabaahcbaaImbbaadabaaChbcaabfbaacbcaadhbaahjbaadabaaBxnbaaCpdbaa"
    "dabaUMcaabaDscabaDpaabaDocabaDlaabaDkcabaDhaabaDgcabaDdaabaDceabaCvaabaCuBibcaUPvbdbaababaUPubabaUPvbabaUPudabasaabatbabauaabavbabaU"
    "PvbabaUPuBoibaUPvnbbaaBhdbaadbbaaccbaaCfbcaababaaebcaabbbaaChhbaadbbaaFxcbaacmbaacgbaafabaahabaaebbaaHrCbbaahdbaababaFababaCmbabaClb"
    "abaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnb"
    "abaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaClbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnb"
    "abaCmbabaCjbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaClb"
    "abaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCjbabaCmbabaCnb"
    "abaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnb"
    "abaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnb"
    "abaCmbabaCnbabaCmbabaClbabaCmbabaCnbabaCmbabaClbabaCmbabaClbabaCmbabaCnbabaCmbabaCnbabaCmbabaBlbabaybbbcgcabaUefabaYnbabaCmbabaCnbab"
    "aCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCfbab"
    "aCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCfbabaCmbabaCnbabaCmbabaCbbabaCmbabaCnbab"
    "aCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCbbab"
    "aCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmbabaCfbabaCmbabaCnbabaCmbabaCnbabaCmbabaCnbabaCmhhbaCLkbh"
    "baCnbfbaCudfbaCndhbaCqbhbaCnbhbaCqbhbaCnbfbaCydfbaCndhbaCycdcaCnbhbaCubhbaCnbbbaqbbbaibbbaebbbaebbbambbbambbbaidhbaBxbhbaCnbhbaCybhb"
    "aCnbhbaDwbhbaCnbebaqcbbaabebaCncabaDcdabaCIlbcbaCIgcbbaabbbaCrbcbaebcbaVImbdbaVFxdbbaabdbaCnccbaVNebdbaVJvbbbajbbbaibdbaCnbabajbbbaC"
    "GpbabaFpdcbaCPecbbaabbbaDhbcbaubabaCGhdbbbXSmHzmbaYGlfabaaelbaaCcabaCUceabaCOjbabavEhbbcZFytabaeBfabaEqbabaibabafCbabaDufabakdabagyb"
    "ccBwBbabaBudabaodabaecabagxabaZUlcabaZWilabaBpbbbcZUxbbbbZWmdbbbBadbbbghbbbgdbbbodbbbgBjabaCcbbbbmbabaeBxbbbDrbbbbBohdbbCmCibbbKCkCX"
    "uabaDXxUlcbaBGMdFmabaaDtBfbaaVjdbaaBflccBKPadcccghbbaocbbagcbbagcbbagcbbagxabaEdfbbaBKOreabaBKViolccBcdcccghbbaocbbagcbbagcbbagcbbag"
    "xabaEdddbbFqeabawBSMjabaBLCtfjbaaBhbbaaDdbbaaKnabaaeabaafabaaBabbaaGcabaaBcrbaaCbhbaaBakbaaBvcbaaBxabaaddbaadabaaBpabaaCqfbaadbbaadb"
    "baanabaajabaaBwabaaCabcaabbbaadbbaagbbaacabaaBrbbaajabaaJfabaadabaafabaaBDExabaECGmbabaBCHdbabaBEEmbabaBNpbabaWSdbabaYSlbabaEIgbbbaC"
    "FJababaCBGhbabaBQUqbabaBTRhbabaCVybabaGOybabaPMsbabaGXkbabaFCmbabaBDebabaYmbabaFTmbabaBDFfbabaCJababaCVsbabaCHmbabaMKkbabaJZmbabaGLy"
    "babaCFDnbabaDTmbabaRVybabaFJqbabaPFgbabaSDmbabaBXCfbabaOCkbabaQOybabaCSsbabaBDGhbabaXNqbabaETqbabaBFHzbabaGHmbabaEUobabaEFsbabaWPgba"
    "baBXLpbabaBRebabaWsbabaNOmbabaEPibabaFMobabaDRibabaGXgbabaEOobabaGqbabaFTebabaHAkbabaDFmbabaBYcbabaBCJdbabaSsbabaDDibabaERibabaLNyba"
    "baIScbabaOXfbabaBLVzbabaERababaWGebabaDDcbabaKRxbabaEWebabaPDgbabaHTababaBVBjbabaCRsbabaKJqbabaCWkbabaXubabaKSebabaUibabaSGebabaBZCt"
    "babaBIQkbabaBJJjbabaBhbabaBENwbabaCTobabaEScbabaOAqbabaIHvbabaBEVjbabaFLubabaYZobabaBUAtbabaKJkbabaDEcbabaOTebabaBLqbabaBAAlbabaBCSe"
    "babaBFGbbabaMBkbabaNIvbabaXHmbabaFOjbabaRYababaBFItbabaDMsbabaXFibabaKBobabaEVqbabaXLhbabaBBGebabaBAQjbabaHFxbabaYEgbabaXRvbabaNLyba"
    "baBDIlbabaCBubabaHkbabaRFkbabaPLsbabaEEybabaGJebabaFHqbabaBVPtbabaZqbabaDYgbabaEDubabaFEwbabaHTibabaGYqbabaVPmbabaDPibabaDEgbabaEgba"
    "baCFSpbabaPHebabaDOkbabaBBFibabaBLBpbabaCJgbabaIqbabaBZgbabaHZmbabaBQibabaCMababaDZmbabaDEababaBWwbabaLDubabaHThbabaIMsbabaCKcbabaBX"
    "JzbabaKubabaBPkbabaVGgbabaSEebabaBLobabaBHGdbabaXcbabaCRkbabaGFmbabaMOebabaGRbbabaBBSdbabaGDebabaDTcbabaBJybabaBUybabaOVsbabaOcbabaI"
    "MkbabaNgbabaNPcbabaDPsbabaGibabaQababaCCYtbabaBFXubabaSFcbabaDUubabaBOUhbabaNXnbabaBTwbabaIKebabaGgbabaHCebabaDIwbabaFXobabaDJsbabaL"
    "EababaISmbabaLKsbabaBRExbabaBKCibabaBZGdbabaPWmbabaJgbabaEAmbabaBAsbabaECwbabaZwbabaCImbabaDNmbabaURsbabaCBTbbabaMRybabaBNPsbabaCBGl"
    "babaJUqbabaMTebabaZEubabaBKBvbabaBHybabaFEkbabaIRgbabaBANebabaBZUhbabaBLkbabaGIebabaHIqbabaYgbabaBAqbabaDFmbabaFKkbabaBKqbabaHGwbaba"
    "HBwbabaBkbabaGTqbabaDWebabaBZFzbabaUVebabaUEdbabaWMwbabaCCubabaNEibabaMQcbabaEIibabaBSybabaBPRtbabaESebabaPGcbabaFKdbabaGobabaBCmbab"
    "aHLlbabaBQlbabaUGsbabaBTXhbabaBNTcbabaBLCrbabaDzbabaJOobabaDEgbabaTSgbabaZGdbabaNIobabaEWjbabaBEScbabaFGpbabaKPubabaJRhbabaBGJhbabaK"
    "HjbabaDKqdabaBZgcabaKRsdabaPPlbabaZFsbabaCTkbabaBWebabaCqbabaobabaDgbabaWOkbabaUDtbabaCHacabaEUscabaDSmdabaDZkbabaPeeabaGAmbabaBabab"
    "aDkbabaDLobabaJSvbabaELebabaCBUxbabaYcbabaHwbabaBDgbabaCcbabaIkbabaBTgbabaIcbabaHobabaBKibabaIababaCVobabaubabaDDsbabaQibabaCybabaHs"
    "babaCOgbabaLibabaNmbabaBMmbabaDTkbabaMobabaUibabaBTgbabaOobabaBMsbabaDJibabaNibabawbabadbabaqbabambabaobbbbDsbabaNsbabaFababaYobabaB"
    "RkbabaBqbabaEibabaXmbabaLibabaBLobbbaKubabaBKubabaDPababaKibabaBBybabaEibabaBFobabaEcbabaCAubabaKababaFBibabaVwbabaEqbabaBQGjbabaOBL"
    "ababaNBYrdabaBNIzbabaCScbabaFzbabaBLpbabaBIwbabaEobabaZebabaDybabaBZybabaFpbabaFgbabaFqbabaBWqbabaGwbabaLebabaBgbabaUubabaPgbabaCUeb"
    "abaobabaLcbabaFgbabaXababaJcbabaFlbabaKibabaDpbabaLgbabaFcbabaBEubabaGubabaEebabaUababaWababaMobabaibabaEobabaDDmbabaFababaBEcbabaBF"
    "obabaBhbabaGsbabaTkbabaZwbabaESobabaEDhbabaJkbabaJmbabaZebabaLmbabaEcbbbcRkbabaNebabaBibabaBybabaGqbabavbabaBEmbabaBLibabaUwbabaOkba"
    "baRgbabaLubabaZkbabaPibabaCNababaMcbabaCRsbabaBJcbabaFibabaBgbabaWwbabaEkbabaDnbabaEebabahbabaBjbabaFwbabaGgbabaBDkbabaBRcbabaYebaba"
    "WsbabaRababaDBgbabaHybabaIwbabaKgbabaCubabaybabaDsbabaCDybabaDLkbabaLLKubabanbabaITubabaORXhbabaDKgbabaCobabaPLMebabaHZibabaZTubabaN"
    "ZFtbabaFuCqabaEMKxbabaELfbabaENcldbatbcbaBzbfbbccebbecbccebbcccbbcccbdbbcbabaBrbabajbabaubabasBAopbaEMbrpbaaBLmabaaItabaaFuebaaCMhcb"
    "aacbbaagdbaaBpcbaafabaaGkbbaaBYhabaaCdobaaCfcbaazbccHYMcpabauidbaHYNbdbbaaCscbaaBlebaachbaaClabaanbbaaCbibaamcbaaDvcbaadbcaababaaGma"
    "baaehbaawbbaaChabaaeabaalabaIAMwaabatbabasaabaBgBagbaIAOdeebaaMhfbaacabaabbbaIBPiaabatcabasaabaibbbaIBPrcbbaaJfdbaafabaICIyaabatbaba"
    "uaabavbbbaICIhcbbaaBcbbaaDihbaadbcaababaaEdbcaadfbaacabaaDycbaaddbaacebaaBFSvebaaCigbaaBQvdbaaBDEpbbaaHWiabaNOLqaabaBcbabaBbaabaBaba"
    "baBbaabaBaaabasbabaBtaabaBaaabaubabaBvaabaBaaabawbabaBxaabaBaaabaybabaBzaabaBaaabaBadcbaNONtshbaadgbaaBfdbaaoabaNOTeaabaGnbabaGoaaba"
    "GpbabaGmaabaGnaabasbabaFwaabaGpaabasbabaFuaabaGnaabaubabaFuaabaGpaabauFacbaNONnCYeCcbaafBxbaajabaapabaaxebaacobaaFJdgbaaDYRyabaCHGsb"
    "abalbabasbabaMRJubabaMQNtbabaGababaBababaFmbabaJgbabaCkbabaGababaBxbabaVJfbabaNOQybabaMSYdbabaobabaBgbabaBmbabaMRYwbabaNNSxbabaVSuba"
    "baCybabaMSAubabaMSAbbabaBababaCEbbabaCEqbabasbabaQUKababaQUFdbabaBcbabaWBxbabaWGebabawbabaDkbabakbabaWGrbbbcWMubabaCcbabaBsbbbbwbaba"
    "BibabaDwbabaqbabasbabaBybbbcubbbaababaMUGobabaLYIrbabaVSfbabaBqbabaMUXcbabaMUWfbabambabaBqbabaLsbabaHxbabaBgbabaCmbabaEmbabaGmbabaCa"
    "babaFebabaBgbbbaCobabaBqbabaBkbabaqbabaBebabaBAebabaUzbabaVababaPhbabaCsbabaDJfbabaFFybabaWfbabaCybabaBybabaKbbabaMwbabadbabaJmbabaM"
    "YLsbabaMYGjbabakbabaBebabaBobabaqbabaEybabaMZGmbabaFcbabaMZAzbabaDqbabaybabaGdbabaKybabaBAWnbabaBcbabaBBHwbbbaEebabaNAFkbabaMZVfbaba"
    "BqbabaBebabaybabaNARibabaNAQlbabaobabaCNababaCKxbabaBBTjbabaBBYcbabaBcbabaGibabaDzbabaNCIobabaNBUpbabaNBUsbabaNBRlbabahbabaBibbbbHub"
    "abaBCOlbabaBCQmbabaDibabaBqbabaDkbabaBCUxbabaOGMcbabaOGKdbabaBCYibabagbabagbabaBobabaQXWybabaQXSzbbbaNEMwbabaMDZlbbbaBAKtbabaBDBjbab"
    "aOTFebabaBJSebabaOZRdbabasbabaBDEvbabaBDIkbabaDybabaubabaCqbabaKmbabaBDTnbabaCjbabaBDXgbabaNGBgbabaNFXjbabaJybbbcibabafbabaDobabaBob"
    "abaCubabaBdbabawbabaDqbabaBobabaibabaCababawbabaFcbabaGmbabaCsbabaJobabaNHEmbabaNHFzbabaFbbabaIibabaCcbabaHmbabaNHKsbabaNHFzbabaHfba"
    "baCfbabaBFKxbabaBFZqbabaBqbabaCkbabaCzbabaBFVzbabaBGMobabaCgbabaNJJgbabaNJAdbabaVibabaNnbabaBGSnbabaBGYababaBGZjbabaCvbabaREqbabagba"
    "baQFubabaHtbabaTTibabaBUBxbabaBASababaibabambabaEsbabaxbabaNKTcbabaOSCjbabaBHWcbabaJbbabaPubabaDybabaNKIqbabaNKHzbabaIpbabaSwbabaBIL"
    "jbabaBIOwbabaHmbabaFmbabaOqbabaNKKcbabaNKGfbabaBJKxbabaBJQgbabaNLOmbabaNLKpbabaBJQbbabaBJSibabaDmbbbbCcbabaNMOababaWJdbabaWRmbabaNML"
    "dbabaNNTsbabaNNLbbabaBcbabaHxbabaNmbabaDcbabaEkbabaEfbabaDcbabaBebabaBababaNNDibabaNNJpbabaTibabaEwbabaBLHnbabaBLOqbabajbabaNNMababa"
    "NOBxbabaBCsbabaNNKababaDsbabaNNGzbabaIwbabaCdbabahbabaBMGxbabaBMKmbabaDybabanbabaEebabaLUIybabaLTXhbabaNOHgbabaNOApbabaNOZubabaNOPbb"
    "abaBababaCcbabaNQGmbabaNQCvbabaBqbabaNQYibabaRebabaNQXxbabaBibabaBOBfbabaBODebbbaBOChbabaBOOsbabaBqbabaBqbabaBobabaFibabaBORfbabaBOY"
    "cbabaNSUmbabaNSSnbabaNSZobabaNSVtbabaMMHybabaMLVrbabaNURqbabaBubabaKubabaPKDdbabaybabaBPPobabaNVAcbabadbabaDababaCabbbbNVBvbabaababa"
    "DibabaBPSlbabaBPXkbabaBPWlbabaGebabaPMPababaNWJvbabaEubabaEybabaBQJbbabaPNXebabaNXDpbabaNXMmbabaDibabaNXLlbabaHcbabaBQZhbabaBRFubaba"
    "ubabakbabaNYYcbbbaXababaNZIxbabaBRCzbabaPRFubabaNZMhbabagbabaBRQzbabaPRTibabaNZIbbabaBSCbbabaBSDsbabalbabaCgbabaOBMababaOBElbabaBSFt"
    "babaBSNkbabaEobabaFebabaBSTfbabaPVGababaCkbabaPVFpbabaPVQubabaOCCtbabaOCKmbabaOCIlbabaHubabawbabaODFmbabaFqbabaODEdbabaODOibabaODNdb"
    "abaMRKwbabaOLIjbabaBUCobabaGgbabaBUErbabaBUJebabaBDExbabaPHPkbabaBcbabaBNMrbabasbabaMQKtbabagbabaKHwbabaCEYxbabaBVBwbabanbabaBkbabaB"
    "KHpbbbcBKJcbabaubabaDebabaOFWmbabaOFWpbabaEibabaFkbabaFsbabaKrbabaLwbabaDgbabaIqbabaUbbbbcJebabaBgbabaOFWubabaXubabaLpbabaQBVpbbbcBW"
    "HwbabaCsbabaOKRwbabaOKLxbabaOGYybabaQDLvbabaibabaQDVsbabaWgbabaQERfbabaBXDybabaybbbcwbabaEybabaCpbabaKibabaDlbabaLqbabaGhbabaFebabaC"
    "cbabaBXTnbabaBYAmbabaCmbabaBYAjbabaBYHqbabagbabaOKEibabaOJVlbabaobabaBYMtbabaBYOwbabaCLVbbabaQXGobabaOebabaQKEbbabasbabaBZKcbabaFyba"
    "baMcbabaPqbabaOLXubabaOLRfbabaBsbabaGybabaHcbabaOMZgbabaDMGtbabaLAMdbabaBfbabaEababaLBAababaLAInbabaHsbabaOQRkbabaCcbabaOPStbabaHeba"
    "baCmbabaOQHubabaOQHbbabaVybbbbMgbabaHdbabaBDibabaCebabaORQwbabaOQOdbabaCFNxbabaCFRgbabaOROababaQWZbbabaCGFqbabaBRFvbabaBRNebabaOTIyb"
    "abaQkbabaRABxbabaqbabaCGQmbabaOUWybabaRBIvbabaRBTobbbaOVElbabaCibabaOVYgbabaOVKbbabaCGVvbabaCHBgbabaJsbabaCcbabaEqbabaCHFtbabaRFXsba"
    "baOXWvbabaXgbabaOobabaCITbbabaCkbabaCIYubabaPAJmbabaRJHlbabaRJLqbabaUkbabaKcbabaPASbbabaCJQxbabaCJVqbabakbabaobabaubabaobabaCwbabaPC"
    "XuBPDApJfbaTTNl";
constexpr char small_letter_map[] =
    "CnzbbHmDywbbHwcgbbeBixccgcabaPhaabaBZoccccBKbdhccgdwccgcabaJhbcccJmeabaQkbbccQbcabaPybabaPtcbbbPwbabaPrdabaGgbbbcJobabaPncabaPwbabag"
    "cabambabadbabaPzeabaQmbabagcabagbcccQjcabaQwbabaQrcabaQwdabaQncabaQwbabaQrcbbbQubbccQpcabaQybabaQteabaiibbascbbagcbbagchccediccgdbba"
    "icabaecabaHlbabaDgbtccEmcabaJzciccKgiabaBFYybabaBFYhcabaMnbabaBGKudabaBFXxcabaOzbabaUkbabagbeccFjLebccWieabaijabaJohbcbFnbbbbccbcbCg"
    "babaccqbbChcibbeBkabayjlccegabaEhdabaEycabanbabasdcbbJxbpbbQgbBfbbDrBxqccBkkBaccucabaBgbgccBbdBvccgdBlbbDwEHeBlbbBDXkcabaegabamBBvDb"
    "bbDRQkbfbbEKYxDGmabaGMkhBqbbIWzdcbbgMjCwccJWekabaWNdcBvccWOakhbbcjfbbslhbbwjhbbsjfbbsmdccyjhbbszhbbByjhbbsjhbbsjbbbsbbbbFbbabaFcmdbb"
    "FbbabaGambbbBabbbbHbnbbbIcbbbbHzbabaIembbbIlbbbbgbabaJcLmabaVIreabaCOjbabaJkhabaYOgBupbbCquabakBFnzbbCMyCSvBvbbFNiBxabaecabaBFUjbaba"
    "UNcbabaULtdcccBFTmcabaBFXfbabaCmbbbcCpcabaBFXqdabagjbbbBFZjbBxccBGAcjbccsfabakBTYkwccDNWuunccBoFggccKmeBeccilbccwcabaEANvbeccEAOafab"
    "akcabaEVChdbccEVCqejccicabaEVElbabavbabakbabawbabafcabaEababaBvbabaBsbabaEXUibhccCThcabaDrbabaEVArbabaUMqbbccEASacabaEVHdbhccEVHicab"
    "aEVXxzabaEVZyBHAizbbCODaBVaBnbbDQqFhBjbbKoGbkbbMacobbecgbbecbbbeCQdBybbFIeGcvbbJsEGpBfbbINeBGJxBfbbCMTuCnybbEqBUIaBhbbDOQo";

struct CharPair {
    uint32_t code, to;
};
inline bool read_map(const char* text, Array<CharPair>& map) {
    const auto number = [&] {
        uint32_t value = 0;
        for (; *text < 'a'; ++text) value = (value + static_cast<uint32_t>(*text - 'A')) * 26;
        return value + static_cast<uint32_t>(*text++ - 'a');
    };
    for (CharPair pair = {0, 0}; *text;) {
        pair.code += number();
        const uint32_t more = number(), step = number(), up = number(), change = number();
        pair.to += change & 1 ? 0 - change / 2 : change / 2;
        if (!map.push(pair)) return false;
        for (uint32_t i = 0; i < more; ++i) {
            pair.code += step, pair.to += up;
            if (!map.push(pair)) return false;
        }
    }
    return true;
}
// BERT stands each of these alone. (The gap at U+2B820 is the reference library's.)
inline bool is_chinese(uint32_t c) {
    return (c >= 0x4e00 && c <= 0x9fff) || (c >= 0x3400 && c <= 0x4dbf) || (c >= 0xf900 && c <= 0xfaff) || (c >= 0x20000 && c <= 0x2a6df) ||
           (c >= 0x2a700 && c <= 0x2b81f) || (c >= 0x2b920 && c <= 0x2ceaf) || (c >= 0x2f800 && c <= 0x2fa1f);
}

// ---- hash tables and heaps -----------------------------------------------------------------------------------------------

// From 64-bit hashes to the numbers of items that stand in some array. Open addressing, at most half full.
struct HashIndex {
    struct Slot {
        uint64_t hash;
        int64_t item;  // plus one; 0: the slot is free
    };
    Array<Slot> slots;
    size_t count = 0;
    explicit HashIndex(Runtime& runtime) : slots(runtime) {}
    // The item with this hash for which same(item) holds, or -1.
    template <class Same>
    int32_t find(uint64_t hash, const Same& same) const {
        if (slots.count == 0) return -1;
        for (size_t i = static_cast<size_t>(hash);; ++i) {
            const Slot& slot = slots.items[i & (slots.count - 1)];
            if (slot.item == 0) return -1;
            if (slot.hash == hash && same(static_cast<int32_t>(slot.item - 1))) return static_cast<int32_t>(slot.item - 1);
        }
    }
    bool reserve(size_t wanted) {
        size_t size = most(slots.count, size_t(64));
        while (size / 2 < wanted) size *= 2;
        if (size == slots.count) return true;
        Array<Slot> larger(*slots.runtime);
        if (!larger.resize(size)) return false;
        for (const Slot& slot : slots)
            if (slot.item) place(larger, slot);
        slots = static_cast<Array<Slot>&&>(larger);
        return true;
    }
    bool insert(uint64_t hash, size_t item) {
        if (!reserve(count + 1)) return false;
        place(slots, Slot{hash, static_cast<int64_t>(item) + 1});
        return ++count, true;
    }
    static void place(Array<Slot>& slots, const Slot& slot) {
        size_t i = static_cast<size_t>(slot.hash);
        while (slots.items[i & (slots.count - 1)].item) ++i;
        slots.items[i & (slots.count - 1)] = slot;
    }
};

// A pair of ids as one number; `mix` maps different pairs to different hashes, so that the hash alone tells them apart.
BABYGPT_INLINE uint64_t pair_key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}
inline int32_t find_pair(const HashIndex& index, int32_t left, int32_t right) {
    return index.find(mix(pair_key(left, right)), [](int32_t) { return true; });
}

// Words of at most 16 bytes are told apart by their length and these two numbers, longer ones by their bytes.
struct WordKey {
    uint64_t a, b;
};
template <class T>
BABYGPT_INLINE uint64_t load_as(const char* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}
BABYGPT_INLINE WordKey short_key(const char* word, size_t size) {  // the two parts overlap, and so never read outside the word
    if (size >= 8) return {load_as<uint64_t>(word), load_as<uint64_t>(word + size - 8)};
    if (size >= 4) return {load_as<uint32_t>(word) | load_as<uint32_t>(word + size - 4) << 32, 0};
    if (size == 0) return {0, 0};
    return {load_as<unsigned char>(word) | load_as<unsigned char>(word + size / 2) << 8 | load_as<unsigned char>(word + size - 1) << 16, 0};
}
BABYGPT_INLINE uint64_t hash_key(WordKey key, size_t size) { return mix(mix(key.a ^ size) ^ key.b); }
inline uint64_t hash_word(Text word) {
    if (word.size <= 16) return hash_key(short_key(word.data, word.size), word.size);
    uint64_t hash = word.size;
    for (size_t i = 0; i + 8 < word.size; i += 8) hash = mix(hash ^ load_as<uint64_t>(word.data + i));
    return mix(hash ^ load_as<uint64_t>(word.end() - 8));
}

// A heap with four children a node, which lie together in memory; the least item, by operator<, is first.
template <class T>
bool heap_push(Array<T>& heap, const T& item) {
    if (!heap.push(item)) return false;
    size_t i = heap.count - 1;
    for (; i > 0 && item < heap[(i - 1) / 4]; i = (i - 1) / 4) heap[i] = heap[(i - 1) / 4];
    heap[i] = item;
    return true;
}
template <class T>
T heap_pop(Array<T>& heap) {
    const T result = heap[0], last = heap[--heap.count];
    size_t i = 0;
    for (size_t child; (child = 4 * i + 1) < heap.count; i = child) {
        const size_t end = least(child + 4, heap.count);
        for (size_t j = child + 1; j < end; ++j)
            if (heap[j] < heap[child]) child = j;
        if (!(heap[child] < last)) break;
        heap[i] = heap[child];
    }
    if (heap.count > 0) heap[i] = last;
    return result;
}

// The different words of a text and how often each occurs.
struct WordCounter {
    struct Word {
        size_t start, size;
        uint64_t count;
    };
    Array<char> text;
    Array<Word> words;
    HashIndex index;
    Status status;
    explicit WordCounter(Runtime& runtime) : text(runtime), words(runtime), index(runtime) {}

    Text word(size_t i) const { return Text(text.items + words[i].start, words[i].size); }
    bool add(Text word_of_text, uint64_t times = 1) {
        const uint64_t hash = hash_word(word_of_text);
        const int32_t known = index.find(hash, [&](int32_t i) { return equal(word(static_cast<size_t>(i)), word_of_text); });
        if (known >= 0) return words.items[known].count += times, true;
        if (text.count + word_of_text.size > INT32_MAX)
            return status = fail(Error::unsupported, "the text has more than 2 GiB of different words"), false;
        const bool good =
            index.insert(hash, words.count) && words.push(Word{text.count, word_of_text.size, times}) && append(text, word_of_text);
        if (!good) status = out_of_memory(text.count + word_of_text.size);
        return good;
    }
};

// A trie of byte strings in one hash table: from a node and a byte to the node that follows, and to the string that ends there. Its memory
// is in proportion to the strings whatever they are, and a step is mostly one look.
struct Trie {
    struct Slot {
        uint32_t key;   // node and byte; `empty`
        uint32_t node;  // that follows
        int32_t id;     // of the string that ends there, or -1
    };
    static constexpr uint32_t empty = 0xffffffffu, most_nodes = 1u << 24;
    Array<Slot> slots;  // a power of two, at most half full
    uint32_t nodes = 1;
    explicit Trie(Runtime& runtime) : slots(runtime) {}
    static BABYGPT_INLINE size_t place(uint32_t key) { return size_t(key >> 8) * 0x9e3779b1u + (key & 0xff); }
    // The slot for this key, or where it would stand.
    BABYGPT_INLINE const Slot* find(uint32_t node, char byte) const {
        const uint32_t key = node << 8 | static_cast<unsigned char>(byte);
        const size_t mask = slots.count - 1;
        for (size_t i = place(key);; ++i) {
            const Slot* slot = &slots.items[i & mask];
            if (slot->key == key || slot->key == empty) return slot;
        }
    }
    bool grow() {
        Array<Slot> old(*slots.runtime);
        old = static_cast<Array<Slot>&&>(slots);
        slots.runtime = old.runtime;
        if (!slots.resize(most(old.count * 2, size_t(64)))) return false;
        for (Slot& slot : slots) slot.key = empty;
        for (const Slot& slot : old)
            if (slot.key != empty) slots.items[find(slot.key >> 8, static_cast<char>(slot.key & 0xff)) - slots.items] = slot;
        return true;
    }
    bool add(Text string, int32_t id) {  // false: no memory, or too many nodes
        uint32_t node = 0;
        for (size_t i = 0; i < string.size; ++i) {
            if (size_t(2) * nodes >= slots.count && !grow()) return false;
            Slot& slot = slots.items[find(node, string[i]) - slots.items];
            if (slot.key == empty) {
                if (nodes == most_nodes - 1) return false;
                slot = Slot{node << 8 | static_cast<unsigned char>(string[i]), nodes++, -1};
            }
            node = slot.node;
            if (i + 1 == string.size) slot.id = id;
        }
        return true;
    }
};

}  // namespace

// ---- what a tokenizer holds ------------------------------------------------------------------------------------------------

struct Tables {
    struct Token {
        size_t start, size;  // its bytes, in `text`; size 0: an id that the file left out
        bool special;
    };
    struct Merge {
        int32_t left, right, result;
    };
    Runtime& runtime;
    TokenizerKind kind = TokenizerKind::none;
    Array<char> text;
    Array<Token> tokens;      // by id
    Array<int32_t> specials;  // ids, in the order of their names' bytes

    // characters
    Array<uint32_t> codes;  // by id, ascending
    // bpe
    Array<Merge> merges;             // the first has the highest priority
    HashIndex pairs;                 // (left, right) -> merge
    HashIndex words;                 // bytes -> id, for words that are one token
    size_t longest = 0;              // of these words
    bool whole_words_first = false;  // a word that is a token is that token, even where no merges lead to it (.tiktoken)
    int32_t byte_ids[256] = {};
    Array<unsigned char> classes;
    unsigned char ascii[256] = {};  // classes again, one a byte
    // wordpiece: tokens that begin a word have a blank before it, those that go on with one ("##") are bare
    bool lower_case = false, strip_accents = false;
    Array<CharPair> accents, small_letters;  // by code; a code that has several characters comes again for each
    int32_t unknown = -1;
    // sentencepiece: the blank that the file writes as U+2581 is a blank here
    Array<char> proto;                 // the file
    Array<unsigned char> piece_kinds;  // by id
    Array<double> scores;              // by id; log probabilities where `unigram`, else the higher, the sooner merged
    Trie pieces;                       // unigram: what text is cut into
    Array<int32_t> user_pieces;        // ids in the order of their bytes: what is cut out before all else
    bool ascii_stays[128] = {};        // before another ASCII character it is normalised to itself
    bool unigram = false, byte_fallback = false;
    bool add_dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true, treat_whitespace_as_suffix = false;
    int32_t piece_between = -1;  // sentencepiece: the control piece that the file calls eos_piece, while it is read
    int32_t begin_of_text = -1;  // likewise
    float unknown_score = 0;
    size_t charsmap = 0, charsmap_size = 0;  // in `proto`: a double array, and what it leads to
    size_t unknown_surface = 0;              // what `unknown` is decoded to, in `text` after the tokens

    explicit Tables(Runtime& r)
        : runtime(r),
          text(r),
          tokens(r),
          specials(r),
          codes(r),
          merges(r),
          pairs(r),
          words(r),
          classes(r),
          accents(r),
          small_letters(r),
          proto(r),
          piece_kinds(r),
          scores(r),
          pieces(r),
          user_pieces(r) {}

    Text bytes(int32_t id) const {
        const Token& token = tokens[static_cast<size_t>(id)];
        return Text(text.items + token.start, token.size);
    }
    int32_t find_word(Text word, uint64_t hash) const {
        return words.find(hash, [&](int32_t id) { return equal(bytes(id), word); });
    }
    int32_t find_word(Text word) const { return find_word(word, hash_word(word)); }
    bool add(Text token, bool special = false) { return tokens.push(Token{text.count, token.size, special}) && append(text, token); }
    bool make_classes() {
        if (!classes.resize(classes_end / 4)) return false;
        mark_ranges(classes.items, letter_ranges, class_letter);
        mark_ranges(classes.items, number_ranges, class_number);
        mark_ranges(classes.items, white_ranges, class_white);
        for (uint32_t c = 0; c < 256; ++c) ascii[c] = c < 128 ? classify(c) : static_cast<unsigned char>(beyond_ascii);
        return true;
    }
    unsigned char classify(uint32_t code) const {
        return static_cast<unsigned char>(code < classes_end ? classes.items[code / 4] >> code % 4 * 2 & 3 : class_other);
    }
    unsigned char classify(const char* at, const char* end, size_t& length) const {
        const unsigned char c = ascii[static_cast<unsigned char>(*at)];
        if (c != beyond_ascii) return length = 1, c;
        return classify(decode_utf8(at, end, length));  // what is no UTF-8 is `class_other`
    }

    // ---- GPT-2's words ----
    // The end of the word that begins at `at`, as this pattern cuts words (Radford et al. 2019, encoder.py), first alternative first:
    //   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    const char* word_end(const char* at, const char* end) const {
        if (*at == '\'' && end - at >= 2) {
            const char c = at[1], d = end - at >= 3 ? at[2] : '\0';
            if (c == 's' || c == 't' || c == 'm' || c == 'd') return at + 2;
            if ((c == 'l' && d == 'l') || ((c == 'v' || c == 'r') && d == 'e')) return at + 3;
        }
        size_t length;
        const unsigned char c = classify(at, end, length);
        if (c != class_white) return run_end(at + length, end, c);
        if (*at == ' ' && end - at >= 2) {  // one blank belongs to what follows it
            const unsigned char next = classify(at + 1, end, length);
            if (next != class_white) return run_end(at + 1 + length, end, next);
            length = 1;
        }
        // White space, without its last character where something follows.
        const char *last = at, *to = at + length;
        for (; to < end && classify(to, end, length) == class_white; to += length) last = to;
        return to == end || last == at ? to : last;
    }
    const char* run_end(const char* at, const char* end, unsigned char c) const {
        for (size_t length; at < end; at += length) {
            while (at < end && ascii[static_cast<unsigned char>(*at)] == c) ++at;
            if (at == end || ascii[static_cast<unsigned char>(*at)] != beyond_ascii || classify(decode_utf8(at, end, length)) != c) break;
        }
        return at;
    }
};

namespace {

// ---- byte-pair encoding ----------------------------------------------------------------------------------------------------

// Sennrich, Haddow & Birch 2016: a word begins as its bytes; again and again the pair whose merge stands first in the list, the leftmost
// of these, becomes one token, until no two neighbours are in the list.
struct Encoding {
    static constexpr size_t short_word = 64;  // up to here the next pair is looked for by looking at all
    static constexpr size_t cache_size = 4096;
    struct Known {  // a word seen before in this text
        WordKey key;
        uint16_t size, count;
        int32_t ids[7];
    };
    struct Symbol {
        int32_t id, before, after;  // neighbours: positions; -1: none. id -1: merged into the one before
        uint32_t rank;              // of the merge with the one after
    };
    static constexpr uint32_t no_rank = 0xffffffffu;
    const Tables& tables;
    Array<int32_t>& out;
    Array<Known> known;
    Array<Symbol> symbols;
    Array<uint64_t> queue;  // rank, then position
    Encoding(const Tables& t, Array<int32_t>& ids, Runtime& runtime)
        : tables(t), out(ids), known(runtime), symbols(runtime), queue(runtime) {}

    uint32_t rank(int32_t left, int32_t right) const { return static_cast<uint32_t>(find_pair(tables.pairs, left, right)); }
    int32_t merged(uint32_t rank_of_pair) const { return tables.merges.items[rank_of_pair].result; }
    int32_t byte_id(char byte) const { return tables.byte_ids[static_cast<unsigned char>(byte)]; }

    // A text that ends where a word ends. False: out of memory.
    bool encode(Text text) {
        if (text.size >= 4096 && known.count == 0) (void)known.resize(cache_size);  // without it, it is only slower
        for (const char *at = text.data, *end = text.end(), *to; at < end; at = to) {
            to = tables.word_end(at, end);
            const Text word(at, static_cast<size_t>(to - at));
            // Never more ids than bytes; some more room lets the cache copy without counting.
            if (out.capacity - out.count < word.size + 8 && !out.reserve(out.count + word.size + 8)) return false;
            if (word.size > 16) {
                if (!encode_word(word, word.size <= tables.longest ? hash_word(word) : 0)) return false;
                continue;
            }
            const WordKey key = short_key(word.data, word.size);
            const uint64_t hash = hash_key(key, word.size);
            Known* entry = known.count ? &known.items[hash >> 32 & (cache_size - 1)] : nullptr;
            if (entry && entry->key.a == key.a && entry->key.b == key.b && entry->size == word.size) {
                memcpy(out.items + out.count, entry->ids, sizeof entry->ids);
                out.count += entry->count;
                continue;
            }
            const size_t before = out.count;
            if (!encode_word(word, hash)) return false;
            if (!entry || out.count - before > 7) continue;
            entry->key = key;
            entry->size = static_cast<uint16_t>(word.size);
            entry->count = static_cast<uint16_t>(out.count - before);
            memcpy(entry->ids, out.items + before, entry->count * sizeof(int32_t));
        }
        return true;
    }
    // `out` has room for word.size ids.
    bool encode_word(Text word, uint64_t hash) {
        if (word.size <= tables.longest) {
            const int32_t id = tables.find_word(word, hash);
            if (id >= 0) return out.items[out.count++] = id, true;
        }
        return merge_word(word);
    }
    bool merge_word(Text word) { return word.size <= short_word ? (merge_short(word), true) : merge_long(word); }

    void merge_short(Text word) {
        int32_t* ids = out.items + out.count;
        uint32_t ranks[short_word];
        size_t n = word.size;
        for (size_t i = 0; i < n; ++i) ids[i] = byte_id(word[i]);
        for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank(ids[i], ids[i + 1]);
        while (n > 1) {
            size_t best = 0;
            for (size_t i = 1; i + 1 < n; ++i)
                if (ranks[i] < ranks[best]) best = i;
            if (ranks[best] == no_rank) break;
            ids[best] = merged(ranks[best]);
            --n;
            memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
            memmove(ranks + best, ranks + best + 1, (n - best) * sizeof *ranks);
            if (best + 1 < n) ranks[best] = rank(ids[best], ids[best + 1]);
            if (best > 0) ranks[best - 1] = rank(ids[best - 1], ids[best]);
        }
        out.count += n;
    }
    // The same with a linked list and a heap, in O(n log n). A pair in the heap that is no longer there has another rank by now.
    bool merge_long(Text word) {
        if (word.size > INT32_MAX || !symbols.resize(word.size)) return false;
        queue.count = 0;
        const int32_t n = static_cast<int32_t>(word.size);
        for (int32_t i = 0; i < n; ++i) {
            Symbol& s = symbols.items[i];
            s.id = byte_id(word[static_cast<size_t>(i)]), s.before = i - 1, s.after = i + 1 < n ? i + 1 : -1, s.rank = no_rank;
        }
        for (int32_t i = 0; i < n; ++i)
            if (!note(i)) return false;
        while (queue.count > 0) {
            const uint64_t first = heap_pop(queue);
            const uint32_t r = static_cast<uint32_t>(first >> 32);
            const int32_t at = static_cast<int32_t>(first & 0xffffffffu);
            Symbol& left = symbols.items[at];
            if (left.id < 0 || left.rank != r) continue;
            Symbol& right = symbols.items[left.after];
            left.id = merged(r), left.after = right.after;
            right.id = -1;
            if (left.after >= 0) symbols.items[left.after].before = at;
            if (!note(at) || (left.before >= 0 && !note(left.before))) return false;
        }
        for (int32_t i = 0; i >= 0; i = symbols.items[i].after) out.items[out.count++] = symbols.items[i].id;
        return true;
    }
    bool note(int32_t at) {
        Symbol& s = symbols.items[at];
        s.rank = s.after >= 0 ? rank(s.id, symbols.items[s.after].id) : no_rank;
        return s.rank == no_rank || heap_push(queue, static_cast<uint64_t>(s.rank) << 32 | static_cast<uint64_t>(at));
    }
};

// Tokens in the order of their bytes, of which a text's bytes, one after another, leave fewer and fewer: halving narrows them down.
struct Prefixes {
    const Tables& tables;
    const Array<int32_t>& sorted;
    size_t low = 0, high, depth = 0;
    Prefixes(const Tables& t, const Array<int32_t>& ids) : tables(t), sorted(ids), high(ids.count) {}
    // The tokens in [low, high) share their first `depth` bytes; keeps those that go on with this one.
    bool step(char next) {
        const unsigned byte = static_cast<unsigned char>(next);
        if (low < high && tables.bytes(sorted[low]).size == depth) ++low;
        high = first_from(byte + 1);
        low = first_from(byte);
        return ++depth, low < high;
    }
    size_t first_from(unsigned byte) const {
        size_t from = low, to = high;
        while (from < to) {
            const size_t middle = from + (to - from) / 2;
            if (static_cast<unsigned char>(tables.bytes(sorted[middle])[depth]) < byte) from = middle + 1;
            else to = middle;
        }
        return from;
    }
    int32_t token() const { return low < high && tables.bytes(sorted[low]).size == depth ? sorted[low] : -1; }
};
// The longest of the sorted tokens that `text` begins with, or -1.
inline int32_t longest_at(const Tables& tables, const Array<int32_t>& sorted, Text text) {
    int32_t found = -1;
    Prefixes prefixes(tables, sorted);
    for (size_t i = 0; i < text.size && prefixes.step(text[i]); ++i)
        if (prefixes.token() >= 0) found = prefixes.token();
    return found;
}
// Puts ids in the order of their bytes.
inline bool sort_tokens(const Tables& tables, Array<int32_t>& ids) {
    struct Item {
        Text bytes;
        int32_t id;
        bool operator<(const Item& other) const {
            const int order = memcmp(bytes.data, other.bytes.data, least(bytes.size, other.bytes.size));
            return order < 0 || (order == 0 && bytes.size < other.bytes.size);
        }
    };
    Array<Item> heap(tables.runtime);
    for (const int32_t id : ids)
        if (!heap_push(heap, Item{tables.bytes(id), id})) return false;
    for (int32_t& id : ids) id = heap_pop(heap).id;
    return true;
}
// The ids of the special tokens, sorted by name.
inline Status collect_specials(Tables& tables) {
    for (size_t i = 0; i < tables.tokens.count; ++i)
        if (tables.tokens[i].special && !tables.specials.push(static_cast<int32_t>(i))) return out_of_memory(i);
    return sort_tokens(tables, tables.specials) ? Status() : out_of_memory(tables.specials.count);
}

// Everything that follows from the tokens and the merges. The tokens' bytes all differ, except where one of the two is special.
inline Status finish_bpe(Tables& tables) {
    if (!tables.make_classes()) return out_of_memory(classes_end / 4);
    if (!tables.pairs.reserve(tables.merges.count)) return out_of_memory(tables.merges.count * sizeof(HashIndex::Slot));
    for (size_t i = 0; i < tables.merges.count; ++i) {
        const Tables::Merge& m = tables.merges[i];
        if (!tables.pairs.insert(mix(pair_key(m.left, m.right)), i)) return out_of_memory(tables.merges.count);
    }
    BABYGPT_TRY(collect_specials(tables));
    // A word that is a token may be looked up whole where merging its bytes gives that token. (Not worth finding out for very long ones.)
    tables.words = HashIndex(tables.runtime);
    tables.longest = 0;
    Array<int32_t> ids(tables.runtime);
    Encoding encoder(tables, ids, tables.runtime);
    for (size_t i = 0; i < tables.tokens.count; ++i) {
        const Tables::Token& token = tables.tokens[i];
        if (token.size == 0) continue;
        const Text word = tables.bytes(static_cast<int32_t>(i));
        if (token.special) continue;
        bool whole = tables.whole_words_first;
        if (!whole && word.size <= 1024) {
            ids.count = 0;
            if (!ids.reserve(word.size) || !encoder.merge_word(word)) return out_of_memory(word.size);
            whole = ids.count == 1 && ids[0] == static_cast<int32_t>(i);
        }
        if (!whole) continue;
        tables.longest = most(tables.longest, word.size);
        if (!tables.words.insert(hash_word(word), i)) return out_of_memory(tables.words.count);
    }
    return Status();
}

// ---- WordPiece -------------------------------------------------------------------------------------------------------------

// BERT's (Devlin et al. 2019, tokenization.py; Wu et al. 2016): control characters go, Chinese characters and punctuation stand alone,
// accents are stripped (canonical decomposition without the marks, Mn) and letters made small; a word is cut into the longest token that it
// begins with, again and again, and is [UNK] as a whole where none fits or it has more than 100 characters. Small letters are Unicode's
// own, not Turkish: I gives i, and so does U+0130, whose dot is an accent; U+0131 stays. Without stripping U+0130 gives i and U+0307.
struct WordPieceEncoder {
    const Tables& tables;
    Array<int32_t>& out;
    Array<char> word;                // a blank, then what has been gathered
    size_t letters = 0;              // characters of it
    size_t unknown = 0;              // characters of words that had no tokens
    WordCounter* counter = nullptr;  // where given, words are counted, not cut
    WordPieceEncoder(const Tables& t, Array<int32_t>& ids, Runtime& runtime) : tables(t), out(ids), word(runtime) {}

    bool encode(Text text) {
        word.count = 0;
        if (!word.push(' ')) return false;
        for (size_t i = 0, length; i < text.size; i += length) {
            uint32_t c = decode_utf8(text.data + i, text.end(), length);
            if (c == not_utf8) c = 0xfffd;
            if (word_class(c) == word_removed) continue;
            const bool alone = is_chinese(c);
            if ((alone && !end_word()) || !strip(c) || (alone && !end_word())) return false;
        }
        return end_word();
    }
    unsigned word_class(uint32_t c) const {
        if (c < classes_end) return tables.classes.items[c / 4] >> c % 4 * 2 & 3;
        return c == 0xe0001 || (c >= 0xe0020 && c <= 0xe007f) || (c >= 0xf0000 && (c & 0xffff) < 0xfffe) ? word_removed : word_plain;
    }
    static size_t find(const Array<CharPair>& map, uint32_t c) {
        size_t low = 0, high = map.count;
        while (low < high) {
            const size_t middle = (low + high) / 2;
            if (map.items[middle].code < c) low = middle + 1;
            else high = middle;
        }
        return low < map.count && map.items[low].code == c ? low : map.count;
    }
    bool strip(uint32_t c) {
        if (!tables.strip_accents || c < 0x80) return lower(c);
        if (c >= 0xac00 && c < 0xd7a4) {  // Hangul syllables are put together by arithmetic (Unicode 3.12)
            const uint32_t s = c - 0xac00;
            return lower(0x1100 + s / 588) && lower(0x1161 + s % 588 / 28) && (s % 28 == 0 || lower(0x11a7 + s % 28));
        }
        size_t at = find(tables.accents, c);
        if (at == tables.accents.count) return lower(c);
        for (; at < tables.accents.count && tables.accents[at].code == c; ++at)
            if (tables.accents[at].to && !lower(tables.accents[at].to)) return false;
        return true;
    }
    bool lower(uint32_t c) {
        if (c < 0x80) return add(c + (tables.lower_case && c >= 'A' && c <= 'Z' ? 32 : 0));
        size_t at = tables.lower_case ? find(tables.small_letters, c) : tables.small_letters.count;
        if (at == tables.small_letters.count) return add(c);
        for (; at < tables.small_letters.count && tables.small_letters[at].code == c; ++at)
            if (!add(tables.small_letters[at].to)) return false;
        return true;
    }
    bool add(uint32_t c) {
        const unsigned kind = word_class(c);
        if (kind == word_white) return end_word();
        const bool alone = kind == word_punctuation;
        return (!alone || end_word()) && append_utf8(word, c) && (++letters, !alone || end_word());
    }
    bool end_word() {
        const size_t first = out.count;
        bool known = letters <= 100;
        if (counter) {
            const bool good = !known || letters == 0 || counter->add(view(word));
            return word.count = 1, letters = 0, good;
        }
        for (size_t at = 0, end; at < word.count && letters > 0 && known; at = end) {
            int32_t id = -1;
            for (end = least(word.count, at + tables.longest); end > at && id < 0; end -= id < 0)
                id = tables.find_word(Text(word.items + at, end - at));
            known = id >= 0;
            if (known && !out.push(id)) return false;
        }
        if (!known) {
            out.count = first, unknown += letters;
            if (!out.push(tables.unknown)) return false;
        }
        return word.count = 1, letters = 0, true;
    }
};

// ---- SentencePiece ---------------------------------------------------------------------------------------------------------

enum PieceKind : unsigned char { piece_none, piece_normal, piece_unknown, piece_control, piece_user, piece_unused, piece_byte };

constexpr char blank_symbol[] = "\xe2\x96\x81";  // U+2581, which files write for a blank

// Kudo & Richardson 2018: the text is normalised, blanks included, and cut without regard to words: by the most probable way (unigram,
// Kudo 2018), or by merging neighbours (BPE).
struct PieceEncoder {
    struct Node {  // unigram: the best way to cut the text up to here ends with piece `id` of `length` bytes; 0: there is none yet
        float score;
        int32_t id;
        uint32_t length, next;  // next: the length of the piece that follows here in the end
    };
    struct Symbol {
        size_t start, size;
        size_t before, after;
        bool fixed;  // a user-defined piece, which nothing is merged with
    };
    struct Pair {
        double score;
        size_t left, right, size;
        int32_t id;
        bool operator<(const Pair& other) const { return score != other.score ? score > other.score : left < other.left; }
    };
    struct Part {
        size_t start, size;
    };
    static constexpr size_t none = ~size_t(0);
    const Tables& tables;
    Array<int32_t>& out;
    Array<char> text;  // normalised
    Array<Node> nodes;
    Array<Symbol> symbols;
    Array<Pair> queue;
    Array<size_t> cuts;  // of unused pieces: how long the left part was
    Array<Part> parts;
    size_t unknown = 0;
    PieceEncoder(const Tables& t, Array<int32_t>& ids, Runtime& runtime)
        : tables(t), out(ids), text(runtime), nodes(runtime), symbols(runtime), queue(runtime), cuts(runtime), parts(runtime) {}

    bool encode(Text given) {
        if (given.size == 0) return true;
        if (!normalize(given)) return false;
        return tables.unigram ? most_probable() : merge();
    }

    // ---- normalisation ----
    // The text that the first characters of `input` become, and how many bytes they are.
    Text normalized_prefix(Text input, size_t& taken) const {
        if (tables.user_pieces.count) {  // as they stand in the file, where a blank is no blank
            Prefixes prefixes(tables, tables.user_pieces);
            int32_t found = -1;
            for (size_t i = 0; i < input.size;) {
                const bool symbol = tables.escape_whitespaces && starts_with(Text(input.data + i, input.size - i), blank_symbol);
                if ((input[i] == ' ' && tables.escape_whitespaces) || !prefixes.step(symbol ? ' ' : input[i])) break;
                i += symbol ? 3 : 1;
                if (prefixes.token() >= 0) found = prefixes.token(), taken = i;
            }
            if (found >= 0) return Text(input.data, taken);
        }
        Text replacement;
        if (tables.charsmap_size && mapped(input, taken, replacement)) return replacement;
        if (decode_utf8(input.data, input.end(), taken) == not_utf8) return taken = 1, Text("\xef\xbf\xbd");
        return Text(input.data, taken);
    }
    // The double array (Aoe 1989, as in Yata's Darts-clone): a node's unit says where its children begin; a child is at that place with its
    // label flipped in, and its unit holds the label. Every place is checked, the file being a stranger's.
    bool mapped(Text input, size_t& taken, Text& replacement, size_t* matched = nullptr) const {
        const char* const units = tables.proto.items + tables.charsmap + 4;
        const uint32_t bytes = load_little(units - 4), count = bytes / 4;
        const auto unit = [&](uint32_t at) { return at < count ? load_little(units + size_t(4) * at) : 0x80000000u; };
        const auto children = [](uint32_t u) { return u >> 10 << ((u & (1u << 9)) >> 6); };
        uint32_t at = children(unit(0));
        bool found = false;
        for (size_t i = 0; i < input.size; ++i) {
            const uint32_t label = static_cast<unsigned char>(input[i]), u = unit(at ^= label);
            if ((u & 0x800000ffu) != label) break;
            if (matched) *matched = i + 1;  // some rule begins so
            at ^= children(u);
            if (!(u >> 8 & 1)) continue;
            const uint32_t place = unit(at) & 0x7fffffffu;
            const size_t texts = tables.charsmap_size - 4 - bytes;
            if (place >= texts) continue;
            const char* const start = units + bytes + place;
            const char* const end = static_cast<const char*>(memchr(start, 0, texts - place));
            replacement = Text(start, end ? static_cast<size_t>(end - start) : texts - place);
            taken = i + 1, found = true;
        }
        return found;
    }
    static uint32_t load_little(const char* from) {
        const unsigned char* s = reinterpret_cast<const unsigned char*>(from);
        return s[0] | static_cast<uint32_t>(s[1]) << 8 | static_cast<uint32_t>(s[2]) << 16 | static_cast<uint32_t>(s[3]) << 24;
    }
    bool stays(char c) const { return static_cast<unsigned char>(c) < 0x80 && tables.ascii_stays[static_cast<unsigned char>(c)]; }
    bool normalize(Text input) {
        size_t at = 0, taken = 0;
        const auto rest = [&] { return Text(input.data + at, input.size - at); };
        text.count = 0;
        if (tables.remove_extra_whitespaces)
            for (; at < input.size && equal(normalized_prefix(rest(), taken), " "); at += taken) {
            }
        if (at == input.size) return true;
        if (!text.reserve(input.size + 1)) return false;
        if (tables.add_dummy_prefix && !tables.treat_whitespace_as_suffix && !text.push(' ')) return false;
        bool after_blank = tables.remove_extra_whitespaces;
        for (; at < input.size; at += taken) {
            // Most text is plain.
            for (; at + 1 < input.size && stays(input[at]) && static_cast<unsigned char>(input[at + 1]) < 0x80; ++at, after_blank = false)
                if (!text.push(input[at])) return false;
            Text piece = normalized_prefix(rest(), taken);
            while (after_blank && starts_with(piece, " ")) piece = Text(piece.data + 1, piece.size - 1);
            if (piece.size) after_blank = ends_with(piece, " ") && tables.remove_extra_whitespaces;
            for (size_t i = 0; i < piece.size; ++i) {
                const bool symbol = tables.escape_whitespaces && starts_with(Text(piece.data + i, piece.size - i), blank_symbol);
                if (!text.push(symbol ? ' ' : piece[i])) return false;
                if (symbol) i += 2;
            }
        }
        while (tables.remove_extra_whitespaces && text.count && text[text.count - 1] == ' ') --text.count;
        return !tables.add_dummy_prefix || !tables.treat_whitespace_as_suffix || text.push(' ');
    }
    size_t character(size_t at) const {  // its bytes; a charsmap may have brought in what is no UTF-8
        static const char lengths[] = "\1\1\1\1\1\1\1\1\1\1\1\1\2\2\3\4";
        return least(static_cast<size_t>(lengths[static_cast<unsigned char>(text[at]) >> 4]), text.count - at);
    }
    size_t characters(size_t at, size_t end) const {
        size_t count = 0;
        for (; at < end; at += character(at)) ++count;
        return count;
    }

    // ---- unigram ----
    // Sums are of floats, as in the reference, where they decide between ways that are equally probable; as there (0.2.3) they start
    // anew before they grow so large that they are no longer exact.
    // Where no piece crosses a place, the best way up to there is known, and its nodes are no longer needed.
    bool most_probable() {
        const size_t longest = most(tables.longest, size_t(4));
        size_t base = 0;  // the nodes begin there; they go on as far as a piece has reached
        bool after_unknown = false;
        nodes.count = 0;
        if (!nodes.reserve(least(text.count, size_t(1024)) + longest + 1) || !nodes.push(Node{0, 0, 0, 0})) return false;
        for (size_t start = 0, length; start < text.count; start += length) {
            length = character(start);
            float here = nodes.items[start - base].score;
            if (start - base >= 512 && nodes.count == start - base + 1) {
                if (!emit_nodes(base, after_unknown)) return false;
                base = start, nodes.count = 1;
            }
            if (here > 100000 || here < -100000) {
                for (size_t i = start - base + 1; i < nodes.count; ++i) nodes.items[i].score -= here;
                here = 0;
            }
            if (!nodes.reserve(start - base + longest + 1)) return false;
            bool single = false;  // a piece covers just this character
            uint32_t node = 0;
            for (size_t end = start; end < text.count;) {
                const Trie::Slot* slot = tables.pieces.find(node, text.items[end]);
                if (slot->key == Trie::empty) break;
                ++end, node = slot->node;
                if (slot->id < 0) continue;
                single |= end - start == length;
                offer(end - base, static_cast<float>(tables.scores.items[slot->id]) + here, slot->id, end - start);
            }
            if (!single) offer(start + length - base, tables.unknown_score + here, tables.unknown, length);
        }
        return emit_nodes(base, after_unknown);
    }
    BABYGPT_INLINE void offer(size_t at, float score, int32_t id, size_t length) {
        while (nodes.count <= at) nodes.items[nodes.count++] = Node{0, 0, 0, 0};
        Node& node = nodes.items[at];
        if (node.length == 0 || score > node.score) node.score = score, node.id = id, node.length = static_cast<uint32_t>(length);
    }
    bool emit_nodes(size_t base, bool& after_unknown) {
        for (size_t at = nodes.count - 1; at > 0;) {
            const uint32_t length = nodes.items[at].length;
            at -= length, nodes.items[at].next = length;
        }
        for (size_t at = 0, end; at + 1 < nodes.count; at = end) {
            end = at + nodes.items[at].next;
            if (!emit(nodes.items[end].id, base + at, base + end, after_unknown)) return false;
        }
        return true;
    }
    // Unknown characters are their bytes, or one unknown token for a run of them.
    bool emit(int32_t id, size_t start, size_t end, bool& after_unknown) {
        const bool is_unknown = id == tables.unknown, again = is_unknown && after_unknown;
        after_unknown = is_unknown;
        if (!is_unknown) return out.push(id);
        if (!tables.byte_fallback) return unknown += characters(start, end), again || out.push(id);
        for (; start < end; ++start) {  // a blank stands for its symbol
            const Text bytes = text[start] == ' ' && tables.escape_whitespaces ? Text(blank_symbol) : Text(text.items + start, 1);
            for (const char c : bytes)
                if (!out.push(tables.byte_ids[static_cast<unsigned char>(c)])) return false;
        }
        return true;
    }

    // ---- BPE ----
    int32_t find(size_t start, size_t size) const { return size <= tables.longest ? tables.find_word(Text(text.items + start, size)) : -1; }
    bool merge() {
        symbols.count = queue.count = 0;
        for (size_t at = 0; at < text.count;) {
            const int32_t user =
                tables.user_pieces.count ? longest_at(tables, tables.user_pieces, Text(text.items + at, text.count - at)) : -1;
            const size_t size = user >= 0 ? tables.bytes(user).size : character(at), n = symbols.count;
            if (!symbols.push(Symbol{at, size, n - 1, n + 1, user >= 0})) return false;
            at += size;
        }
        if (symbols.count == 0) return true;
        symbols[symbols.count - 1].after = none;
        for (size_t i = 0; i + 1 < symbols.count; ++i)
            if (!note(i, i + 1)) return false;
        while (queue.count) {
            const Pair pair = heap_pop(queue);
            Symbol &left = symbols[pair.left], &right = symbols[pair.right];
            if (left.size == 0 || right.size == 0 || left.size + right.size != pair.size) continue;
            left.size = pair.size, right.size = 0;
            left.after = right.after;
            if (right.after != none) symbols[right.after].before = pair.left;
            if (!note(left.before, pair.left) || !note(pair.left, left.after)) return false;
        }
        bool after_unknown = false;
        for (size_t i = 0; i != none; i = symbols[i].after) {
            parts.count = 0;
            if (!parts.push(Part{symbols[i].start, symbols[i].size})) return false;
            while (parts.count) {  // an unused piece falls back into the two that made it
                const Part part = parts[--parts.count];
                const int32_t id = find(part.start, part.size);
                const size_t cut = id >= 0 && cuts.count && tables.piece_kinds[static_cast<size_t>(id)] == piece_unused
                                       ? cuts[static_cast<size_t>(id)]
                                       : 0;
                if (cut == 0) {
                    if (!emit(id < 0 ? tables.unknown : id, part.start, part.start + part.size, after_unknown)) return false;
                } else if (!parts.push(Part{part.start + cut, part.size - cut}) || !parts.push(Part{part.start, cut})) return false;
            }
        }
        return true;
    }
    bool note(size_t left, size_t right) {
        if (left == none || right == none || symbols[left].fixed || symbols[right].fixed) return true;
        const size_t size = symbols[left].size + symbols[right].size;
        const int32_t id = find(symbols[left].start, size);
        if (id < 0) return true;
        if (tables.piece_kinds[static_cast<size_t>(id)] == piece_unused) {
            if (cuts.count == 0 && !cuts.resize(tables.tokens.count)) return false;
            cuts[static_cast<size_t>(id)] = symbols[left].size;
        }
        return heap_push(queue, Pair{tables.scores[static_cast<size_t>(id)], left, right, size, id});
    }
};

// ---- learning the merges ---------------------------------------------------------------------------------------------------

// All words stand one after another in `spots`. Each pair of neighbours has the list of spots where it begins, and a count; a merge
// visits only these spots and changes only the pairs beside them. The heap holds counts as they were: a pair's count never grows after the
// merge that made it, so an outdated one is put back with its present count when it comes up.
struct MergeLearner {
    struct Spot {
        int32_t id, before, after;  // neighbours in the word; -1: none. id -1: merged into the one before
        int32_t pair;               // that begins here, or -1
        int32_t previous, next;     // other spots of this pair
        int32_t word;
    };
    struct Pair {
        int32_t left, right;
        uint64_t count;
        int32_t head, tail;
    };
    struct Candidate {
        uint64_t count, key;
        int32_t pair;
        bool operator<(const Candidate& other) const { return count != other.count ? count > other.count : key < other.key; }
    };
    const WordCounter& counter;
    Array<Spot> spots;
    Array<Pair> pairs;
    HashIndex index;
    Array<Candidate> heap;
    Array<int32_t> places;  // of the pair that is being merged
    MergeLearner(Runtime& runtime, const WordCounter& c)
        : counter(c), spots(runtime), pairs(runtime), index(runtime), heap(runtime), places(runtime) {}

    bool link(int32_t at) {
        Spot& spot = spots.items[at];
        spot.pair = -1;
        if (spot.after < 0) return true;
        const int32_t left = spot.id, right = spots.items[spot.after].id;
        spot.pair = find_pair(index, left, right);
        if (spot.pair < 0) {
            spot.pair = static_cast<int32_t>(pairs.count);
            if (!index.insert(mix(pair_key(left, right)), pairs.count) || !pairs.push(Pair{left, right, 0, -1, -1})) return false;
        }
        Pair& pair = pairs.items[spot.pair];
        spot.previous = pair.tail, spot.next = -1;
        (pair.tail >= 0 ? spots.items[pair.tail].next : pair.head) = at;
        pair.tail = at;
        pair.count += counter.words.items[spot.word].count;
        return true;
    }
    void unlink(int32_t at) {
        Spot& spot = spots.items[at];
        if (spot.pair < 0) return;
        Pair& pair = pairs.items[spot.pair];
        (spot.previous >= 0 ? spots.items[spot.previous].next : pair.head) = spot.next;
        (spot.next >= 0 ? spots.items[spot.next].previous : pair.tail) = spot.previous;
        pair.count -= counter.words.items[spot.word].count;
        spot.pair = -1;
    }
    bool offer(size_t pair) {
        const Pair& p = pairs[pair];
        return p.count == 0 || heap_push(heap, Candidate{p.count, pair_key(p.left, p.right), static_cast<int32_t>(pair)});
    }
    // The spots of a pair, in the order of the text where it matters: of "aaa" the first two are merged.
    bool gather(const Pair& pair) {
        places.count = 0;
        bool sorted = true;
        for (int32_t at = pair.head; at >= 0; at = spots.items[at].next) {
            sorted = sorted && (places.count == 0 || places[places.count - 1] < at);
            if (!places.push(at)) return false;
        }
        if (sorted || pair.left != pair.right) return true;
        Array<int32_t> queue(*places.runtime);
        for (const int32_t at : places)
            if (!heap_push(queue, at)) return false;
        for (int32_t& at : places) at = heap_pop(queue);
        return true;
    }
    // Word number w, symbol by symbol, from its first to its last.
    bool add(size_t w, int32_t id, bool is_first, bool is_last) {
        const int32_t at = static_cast<int32_t>(spots.count);
        return spots.push(Spot{id, is_first ? -1 : at - 1, is_last ? -1 : at + 1, -1, -1, -1, static_cast<int32_t>(w)});
    }
    // At most `limit` merges; merge number i makes id `first_id` + i.
    BABYGPT_CALL bool learn(size_t first_id, size_t limit, Array<Tables::Merge>& merges) {
        for (size_t i = 0; i < spots.count; ++i)
            if (!link(static_cast<int32_t>(i))) return false;
        for (size_t i = 0; i < pairs.count; ++i)
            if (!offer(i)) return false;
        while (merges.count < limit && heap.count > 0) {
            const Candidate best = heap_pop(heap);
            const size_t chosen = static_cast<size_t>(best.pair);
            if (pairs[chosen].count != best.count) {
                if (!offer(chosen)) return false;
                continue;
            }
            const int32_t id = static_cast<int32_t>(first_id + merges.count);
            const size_t first_new = pairs.count;
            if (!merges.push(Tables::Merge{pairs[chosen].left, pairs[chosen].right, id}) || !gather(pairs[chosen])) return false;
            for (const int32_t at : places)
                if (spots.items[at].pair == best.pair && !merge(at, id)) return false;
            for (size_t i = first_new; i < pairs.count; ++i)
                if (!offer(i)) return false;
        }
        return true;
    }
    bool merge(int32_t at, int32_t id) {
        Spot& left = spots.items[at];
        Spot& right = spots.items[left.after];
        if (left.before >= 0) unlink(left.before);
        unlink(at);
        unlink(left.after);
        left.id = id, left.after = right.after;
        right.id = -1;
        if (left.after >= 0) spots.items[left.after].before = at;
        return (left.before < 0 || link(left.before)) && link(at);
    }
};

// Byte-level BPE: GPT-2's words, which are merged from bytes.
BABYGPT_RARE inline Status learn_bpe(Tables& tables, WordCounter& counter, size_t limit) {
    MergeLearner learner(tables.runtime, counter);
    bool good = learner.spots.reserve(counter.text.count);
    for (size_t w = 0; w < counter.words.count && good; ++w) {
        const Text word = counter.word(w);
        for (size_t i = 0; i < word.size && good; ++i)
            good = learner.add(w, static_cast<unsigned char>(word[i]), i == 0, i + 1 == word.size);
    }
    good = good && learner.learn(256, limit, tables.merges);
    return good ? Status() : out_of_memory(counter.text.count * sizeof(MergeLearner::Spot));
}
struct WordReader {  // passes GPT-2's words to the counter
    const Tables& tables;
    WordCounter& counter;
    static bool add_piece(void* self, Text piece, bool) {
        const WordReader& reader = *static_cast<WordReader*>(self);
        for (const char *at = piece.data, *end = piece.end(), *to; at < end; at = to) {
            to = reader.tables.word_end(at, end);
            if (!reader.counter.add(Text(at, static_cast<size_t>(to - at)))) return false;
        }
        return true;
    }
};

constexpr char end_of_text_name[] = "<|endoftext|>";

BABYGPT_UNHURRIED_BEGIN

// ---- tokenizer files -------------------------------------------------------------------------------------------------------

// GPT-2 writes bytes as printable characters: those that are printable in Latin-1 stand for themselves, the others, in order, are
// U+0100, U+0101, ... (Radford et al. 2019, encoder.py).
inline uint32_t byte_to_symbol(uint32_t byte) {
    if (byte <= 32) return 256 + byte;
    if (byte >= 127 && byte <= 160) return 289 + byte - 127;
    return byte == 173 ? 323 : byte;
}
inline uint32_t symbol_to_byte(uint32_t symbol) {  // 256: no byte has this symbol
    const uint32_t byte = symbol < 256    ? symbol
                          : symbol <= 288 ? symbol - 256
                          : symbol <= 322 ? symbol - 289 + 127
                          : symbol == 323 ? 173u
                                          : 256u;
    return byte < 256 && byte_to_symbol(byte) == symbol ? byte : 256u;
}
// A token's bytes from its symbols; false where one is no symbol.
inline bool symbols_to_bytes(Text symbols, Array<char>& bytes, bool& enough_memory) {
    bytes.count = 0;
    for (size_t i = 0, length; i < symbols.size; i += length) {
        const uint32_t byte = symbol_to_byte(decode_utf8(symbols.data + i, symbols.end(), length));
        if (byte == 256) return false;
        if (!bytes.push(static_cast<char>(byte))) return enough_memory = false;
    }
    return true;
}

// RFC 4648. False: this is not base 64, or memory ran out.
inline bool decode_base64(Text text, Array<char>& bytes, bool& enough_memory) {
    uint32_t bits = 0, padding = 0;
    for (size_t i = 0; i < text.size; ++i) {
        const char c = text[i];
        const int digit = c >= 'A' && c <= 'Z'   ? c - 'A'
                          : c >= 'a' && c <= 'z' ? c - 'a' + 26
                          : c >= '0' && c <= '9' ? c - '0' + 52
                          : c == '+'             ? 62
                          : c == '/'             ? 63
                                                 : -1;
        if (c == '=') ++padding;
        else if (digit < 0 || padding) return false;
        bits = bits << 6 | static_cast<uint32_t>(most(digit, 0));
        if (i % 4 != 3) continue;
        for (uint32_t k = 0; k + padding < 3; ++k)
            if (!bytes.push(static_cast<char>(bits >> (16 - 8 * k) & 0xff))) return enough_memory = false;
    }
    return text.size % 4 == 0 && padding <= 2;
}
inline bool append_base64(Array<char>& to, Text bytes) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < bytes.size; i += 3) {
        uint32_t bits = 0;
        for (size_t k = 0; k < 3; ++k) bits = bits << 8 | (i + k < bytes.size ? static_cast<unsigned char>(bytes[i + k]) : 0u);
        for (size_t k = 0; k < 4; ++k)
            if (!to.push(i + k > bytes.size ? '=' : digits[bits >> (18 - 6 * k) & 63])) return false;
    }
    return true;
}

// Reads the fields of a protobuf message from left to right: a number and a value, either a whole number (also the bits of a float) or
// bytes. As with Json, the first thing that is wrong ends it.
struct Protobuf {
    Text text;
    size_t at = 0;
    bool good = true;
    uint64_t field = 0, value = 0;
    Text bytes;
    bool is_bytes = false;
    explicit Protobuf(Text message) : text(message) {}
    uint64_t number() {
        uint64_t result = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            if (at >= text.size) break;
            const unsigned char byte = static_cast<unsigned char>(text[at++]);
            result |= uint64_t(byte & 0x7f) << shift;
            if (byte < 0x80) return result;
        }
        return good = false, 0;
    }
    bool next() {
        if (!good || at >= text.size) return false;
        const uint64_t key = number(), kind = key & 7;
        field = key >> 3, value = 0, bytes = Text(), is_bytes = kind == 2;
        if (kind == 0) return value = number(), good;
        const uint64_t size = kind == 2 ? number() : kind == 1 ? 8 : kind == 5 ? 4 : ~uint64_t(0);
        if (!good || size > text.size - at) return good = false;
        bytes = Text(text.data + at, static_cast<size_t>(size));
        if (kind == 5) value = PieceEncoder::load_little(bytes.data);
        at += bytes.size;
        return true;
    }
};

constexpr const char* bert_specials[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};

// llama.cpp's file (github.com/ggml-org/ggml, docs/gguf.md), all little-endian: "GGUF", its version, the counts of tensors and of keys; the
// keys, each a name, a type and a value; the tensors, each a name, its sizes, a type and where it begins; and then their bytes.
enum GgufType : uint32_t { gguf_u32 = 4, gguf_i32, gguf_f32, gguf_bool, gguf_string, gguf_array, gguf_f64 = 12 };
struct Gguf {
    struct Key {
        size_t name, name_size;  // in `bytes`
        uint64_t type;           // of the value, or of an array's items
        uint64_t count;
        size_t at;  // of the value in `bytes`
        bool is_array;
    };
    ByteSource& source;
    Array<char> bytes;  // the file from its beginning, as far as it was needed
    Array<Key> keys;
    uint64_t tensors = 0;
    size_t at = 0;
    Gguf(Runtime& runtime, ByteSource& from) : source(from), bytes(runtime), keys(runtime) {}

    template <class... Parts>
    Status bad(Parts... parts) const {
        return fail(Error::bad_file, "'", source.name, "'", parts...);
    }
    Status unsupported(const char* what, Text value) const { return fail(Error::unsupported, "'", source.name, "': ", what, Shown(value)); }
    static uint64_t load(const char* from, unsigned size) {
        uint64_t value = 0;
        for (unsigned i = size; i-- > 0;) value = value << 8 | static_cast<unsigned char>(from[i]);
        return value;
    }
    // `more` bytes from `at` on are in memory.
    Status need(uint64_t more) {
        if (more > source.size - at) return bad(" was cut short: more is wanted at byte ", at, " than its ", source.size, " bytes hold");
        const uint64_t end = at + more, had = bytes.count;
        if (end <= had) return Status();
        const uint64_t wanted = least(source.size, most(end, most(2 * had, uint64_t(1) << 16)));
        if (wanted != static_cast<size_t>(wanted) || !bytes.resize(static_cast<size_t>(wanted))) return out_of_memory(wanted);
        return source.read(had, bytes.items + had, wanted - had);
    }
    Status number(unsigned size, uint64_t& value) {
        BABYGPT_TRY(need(size));
        value = load(bytes.items + at, size);
        at += size;
        return Status();
    }
    Status string(size_t& start, size_t& size) {
        uint64_t length;
        BABYGPT_TRY(number(8, length));
        BABYGPT_TRY(need(length));
        start = at, size = static_cast<size_t>(length), at += size;
        return Status();
    }
    static unsigned size_of(uint64_t type) {  // 0: of no fixed size
        static const unsigned char sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
        return sizes[type];
    }
    // Everything up to the list of tensors, which begins at `at`.
    BABYGPT_RARE Status open() {
        uint64_t version, count;
        at = 4;
        if (source.size < 24) return bad(" is no GGUF file: it has only ", source.size, " bytes");
        BABYGPT_TRY(number(4, version));
        if (version != 2 && version != 3) return bad(" has GGUF's version ", version, ", but only 2 and 3, little-endian, are read");
        BABYGPT_TRY(number(8, tensors));
        BABYGPT_TRY(number(8, count));
        for (; count > 0; --count) {
            Key key{};
            key.count = 1;
            BABYGPT_TRY(string(key.name, key.name_size));
            BABYGPT_TRY(number(4, key.type));
            key.is_array = key.type == gguf_array;
            if (key.is_array) {
                BABYGPT_TRY(number(4, key.type));
                BABYGPT_TRY(number(8, key.count));
            }
            key.at = at;
            if (key.type > gguf_f64 || key.type == gguf_array)
                return bad(": the key '", Shown(Text(bytes.items + key.name, key.name_size)), "' is of the unknown type ", key.type);
            if (key.type == gguf_string) {
                size_t start, size;
                for (uint64_t i = 0; i < key.count; ++i) BABYGPT_TRY(string(start, size));
            } else {
                if (key.count > source.size / size_of(key.type)) return bad(" was cut short: an array would have ", key.count, " items");
                BABYGPT_TRY(need(key.count * size_of(key.type)));
                at += static_cast<size_t>(key.count) * size_of(key.type);
            }
            if (!keys.push(key)) return out_of_memory(keys.count * sizeof key);
        }
        return Status();
    }
    const Key* find(Text name) const {
        for (const Key& key : keys)
            if (equal(Text(bytes.items + key.name, key.name_size), name)) return &key;
        return nullptr;
    }
    // Item number i of numbers; whole numbers beyond 2^53 come out rounded.
    double number_at(const Key& key, size_t i) const {
        const unsigned size = size_of(key.type), unused = 64 - 8 * size;
        const uint64_t raw = load(bytes.items + key.at + i * size, size);
        if (key.type == gguf_f32) return static_cast<double>(bits_as<float>(static_cast<uint32_t>(raw)));
        if (key.type == gguf_f64) return bits_as<double>(raw);
        const bool is_signed = key.type < gguf_f32 ? key.type % 2 == 1 : key.type == 11;
        return is_signed ? static_cast<double>(static_cast<int64_t>(raw << unused) >> unused) : static_cast<double>(raw);
    }
    // The value of a key, or what it was where there is no such key.
    Status read(Text name, double& value) const {
        const Key* key = find(name);
        if (!key) return Status();
        if (key->is_array || key->type == gguf_string) return bad(": the key '", name, "' is not a single number");
        value = number_at(*key, 0);
        return Status();
    }
    Text text(Text name) const {  // "": there is no such key, or it has no text
        const Key* key = find(name);
        size_t place = key ? key->at : 0;
        return key && key->type == gguf_string && !key->is_array ? next_text(place) : Text();
    }
    Text next_text(size_t& place) const {
        const Text result(bytes.items + place + 8, static_cast<size_t>(load(bytes.items + place, 8)));
        return place += 8 + result.size, result;
    }
    // An array of texts, or of numbers; `count`, where not 0, is how many there must be.
    Status array(Text name, bool texts, uint64_t count, const Key*& key) const {
        key = find(name);
        if (!key || (key->is_array && texts == (key->type == gguf_string) && (count == 0 || key->count == count))) return Status();
        return bad(": the key '", name, "' is no list of ", texts ? "texts" : "numbers", ", or not as long as that of the tokens");
    }
};

// Fills the tables of a tokenizer from one of the files that others write. Messages name the file.
struct TokenizerReader {
    Runtime& runtime;
    Tables& tables;
    Text name;                    // of the file, for messages
    size_t file_size = 0;         // no file has ids larger than its size
    HashIndex by_bytes, by_name;  // the ordinary tokens, the special ones
    HashIndex seen_pairs;
    Array<char> scratch, left, right;
    TokenizerReader(Tables& t, Text file)
        : runtime(t.runtime),
          tables(t),
          name(file),
          by_bytes(runtime),
          by_name(runtime),
          seen_pairs(runtime),
          scratch(runtime),
          left(runtime),
          right(runtime) {}

    template <class... Parts>
    Status bad(const Parts&... parts) {
        return fail(Error::bad_file, "'", name, "': ", parts...);
    }
    template <class... Parts>
    Status unsupported(const Parts&... parts) {
        return fail(Error::unsupported, "'", name, "': ", parts...);
    }
    Status no_memory() { return out_of_memory(tables.text.count); }

    int32_t find_in(const HashIndex& index, Text bytes) const {
        return index.find(hash_word(bytes), [&](int32_t id) { return equal(tables.bytes(id), bytes); });
    }
    int32_t find(Text bytes) const { return find_in(by_bytes, bytes); }
    Status add(int64_t id, Text bytes, bool special) {
        if (id < 0 || static_cast<uint64_t>(id) >= file_size || id >= INT32_MAX) return bad("token id ", id, " is out of range");
        const size_t at = static_cast<size_t>(id);
        if (at >= tables.tokens.count && !tables.tokens.resize(at + 1)) return no_memory();
        if (bytes.size == 0) return bad("token ", id, " is empty");
        if (tables.tokens[at].size) return bad("token id ", id, " is given twice");
        if (special && !tables.text.push(' ')) return no_memory();  // WordPiece shows a special token with a blank before it
        tables.tokens[at] = Tables::Token{tables.text.count, bytes.size, special};
        if (!append(tables.text, bytes)) return no_memory();
        HashIndex& index = special ? by_name : by_bytes;
        if (find_in(index, bytes) >= 0) return bad("tokens ", find_in(index, bytes), " and ", id, " are the same");
        return index.insert(hash_word(bytes), at) ? Status() : no_memory();
    }
    // `a` and `b` as GPT-2's symbols.
    Status add_merge(Text a, Text b) {
        const size_t number = tables.merges.count + 1;
        bool memory = true;
        if (!symbols_to_bytes(a, left, memory) || !symbols_to_bytes(b, right, memory))
            return memory ? bad("merge ", number, " is not byte-level") : no_memory();
        Tables::Merge merge{find(view(left)), find(view(right)), -1};
        if (!append(left, view(right))) return no_memory();
        merge.result = find(view(left));
        if (merge.left < 0 || merge.right < 0 || merge.result < 0) return bad("merge ", number, " has a part or a result that is no token");
        if (find_pair(seen_pairs, merge.left, merge.right) >= 0) return bad("merge ", number, " is given twice");
        return seen_pairs.insert(mix(pair_key(merge.left, merge.right)), number) && tables.merges.push(merge) ? Status() : no_memory();
    }
    Status finish() {
        for (int byte = 0; byte < 256; ++byte) {
            const char c = static_cast<char>(byte);
            tables.byte_ids[byte] = find(Text(&c, 1));
            if (tables.byte_ids[byte] < 0) return bad("byte ", byte, " has no token");
        }
        size_t specials = 0;
        for (const Tables::Token& token : tables.tokens) specials += token.special;
        if (specials > 4096) return unsupported(specials, " special tokens are too many");
        return finish_bpe(tables);
    }

    // The object of tokens and ids. Tokens that are special by now keep their name; with `default_special`, so does <|endoftext|>.
    Status vocabulary(Json& json, bool default_special) {
        for (json.enter_object(); json.next_key();) {
            int64_t id = 0;
            if (!json.integer(id)) break;
            const Text symbols = view(json.key);
            if (default_special && equal(symbols, end_of_text_name)) {
                BABYGPT_TRY(add(id, symbols, true));
                continue;
            }
            const int32_t special = find_in(by_name, symbols);
            if (special >= 0 && special != id) return bad("special token '", symbols, "' has the ids ", special, " and ", id);
            if (special >= 0) continue;
            bool memory = true;
            if (!symbols_to_bytes(symbols, scratch, memory))
                return memory ? unsupported("token '", symbols, "' is not byte-level") : no_memory();
            BABYGPT_TRY(add(id, view(scratch), false));
        }
        return Status();
    }

    // ---- encoder.json and vocab.bpe, also named vocab.json and merges.txt ----
    Status encoder_json(Text json_text) {
        file_size = json_text.size;
        Json json(runtime, json_text);
        BABYGPT_TRY(vocabulary(json, true));
        return json.finish(name);
    }
    // A line a merge, "left right"; the first line may be a comment.
    Status vocab_bpe(Text text) {
        for (size_t at = 0, line_number = 1; at < text.size; ++line_number) {
            const char* end = static_cast<const char*>(memchr(text.data + at, '\n', text.size - at));
            Text line(text.data + at, end ? static_cast<size_t>(end - text.data) - at : text.size - at);
            at += line.size + 1;
            if (line.size && line[line.size - 1] == '\r') --line.size;
            if (line.size == 0 || (line_number == 1 && starts_with(line, "#version"))) continue;
            BABYGPT_TRY(merge_line(line));
        }
        return Status();
    }
    Status merge_line(Text line) {
        const char* blank = static_cast<const char*>(memchr(line.data, ' ', line.size));
        if (!blank) return bad("merge ", tables.merges.count + 1, " has no blank between its parts");
        const size_t size = static_cast<size_t>(blank - line.data);
        return add_merge(Text(line.data, size), Text(blank + 1, line.size - size - 1));
    }

    // ---- .tiktoken ----
    // A line a token: its bytes in base 64, its id, which is also its rank. Two neighbours merge where together they are a token. The pair
    // that this comes to for a token is the one that is left when its bytes are encoded with the tokens of lower rank.
    Status tiktoken(Text text) {
        file_size = text.size;
        for (size_t at = 0, line_number = 1; at < text.size; ++line_number) {
            const size_t start = at;
            while (at < text.size && text[at] != ' ' && text[at] != '\n') ++at;
            if (at == start && (at == text.size || text[at] == '\n')) {
                ++at;
                continue;  // an empty line
            }
            scratch.count = 0;
            bool memory = true;
            if (!decode_base64(Text(text.data + start, at - start), scratch, memory))
                return memory ? bad("line ", line_number, " is not in base 64") : no_memory();
            uint64_t id = 0;
            const size_t digits = ++at;
            for (; at < text.size && text[at] >= '0' && text[at] <= '9'; ++at)
                id = least(id * 10 + static_cast<uint64_t>(text[at] - '0'), uint64_t(INT32_MAX));
            if (at == digits) return bad("line ", line_number, " has no id");
            at += at < text.size && text[at] == '\r';
            if (at < text.size && text[at] != '\n') return bad("line ", line_number, " does not end after its id");
            ++at;
            BABYGPT_TRY(add(static_cast<int64_t>(id), view(scratch), false));
        }
        for (int byte = 0; byte < 256; ++byte) {
            const char c = static_cast<char>(byte);
            tables.byte_ids[byte] = find(Text(&c, 1));
        }
        Array<int32_t> ids(runtime);
        Encoding encoder(tables, ids, runtime);
        for (size_t i = 0; i < tables.tokens.count; ++i) {
            const Text token = tables.bytes(static_cast<int32_t>(i));
            if (token.size < 2) continue;
            ids.count = 0;
            for (const char c : token)
                if (tables.byte_ids[static_cast<unsigned char>(c)] < 0)
                    return bad("byte ", static_cast<int>(static_cast<unsigned char>(c)), " has no token");
            if (!ids.reserve(token.size) || !encoder.merge_word(token)) return no_memory();
            if (ids.count != 2) {
                tables.whole_words_first = true;
                continue;
            }
            const bool good = tables.pairs.insert(mix(pair_key(ids[0], ids[1])), tables.merges.count) &&
                              tables.merges.push(Tables::Merge{ids[0], ids[1], static_cast<int32_t>(i)});
            if (!good) return no_memory();
        }
        tables.pairs = HashIndex(runtime);
        file_size += 1;
        // The file does not say how a text is cut into words: these two are known to differ from GPT-2.
        if (tables.tokens.count == 100256 || tables.tokens.count == 199998)
            return fail(Error::unsupported, "'", name, "' is the vocabulary of cl100k or o200k, which cut words in other ways than GPT-2");
        int32_t free_id = 0;  // r50k's is after the last token, p50k's is a hole
        while (free_id < static_cast<int32_t>(tables.tokens.count) && tables.bytes(free_id).size > 0) ++free_id;
        BABYGPT_TRY(add(free_id, end_of_text_name, true));
        return finish();
    }

    // ---- tokenizer.json ----
    // Hugging Face's file. What would change the ids and is not known here is refused by its name.
    BABYGPT_RARE Status tokenizer_json(Text text) {
        file_size = text.size;
        Text added, model, normalizer, cutting, decoder, after;
        Json json(runtime, text);
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("added_tokens")) json.skip(added);
            else if (json.key_is("model")) json.skip(model);
            else if (json.key_is("normalizer")) json.skip(normalizer);
            else if (json.key_is("pre_tokenizer")) json.skip(cutting);
            else if (json.key_is("decoder")) json.skip(decoder);
            else if (json.key_is("post_processor")) json.skip(after);
            else if (json.key_is("truncation") || json.key_is("padding")) BABYGPT_TRY(must_be_null(json));
            else json.skip();
        }
        BABYGPT_TRY(json.finish(name));
        if (model.size == 0) return bad("there is no model");
        Array<char> type(runtime);
        Json look = part_of(text, model);
        for (look.enter_object(); look.next_key();)
            if (look.key_is("type")) look.string(type);
            else look.skip();
        BABYGPT_TRY(look.finish(name));
        if (equal(view(type), "Unigram")) {
            tables.kind = TokenizerKind::sentencepiece;
            UnigramForm form(runtime);
            BABYGPT_TRY(unigram_steps(text, normalizer, "normalizer", "normalizers", form));
            BABYGPT_TRY(unigram_steps(text, cutting, "pre_tokenizer", "pretokenizers", form));
            BABYGPT_TRY(unigram_steps(text, decoder, "decoder", "decoders", form));
            BABYGPT_TRY(unigram_model(text, added, model, form));
            return unigram_steps(text, after, "post_processor", "processors", form);
        }
        if (added.size) BABYGPT_TRY(added_tokens(part_of(text, added)));
        if (equal(view(type), "WordPiece")) {
            tables.kind = TokenizerKind::wordpiece;
            BABYGPT_TRY(bert_part(part_of(text, normalizer), "normalizer", "BertNormalizer"));
            BABYGPT_TRY(bert_part(part_of(text, cutting), "pre_tokenizer", "BertPreTokenizer"));
            BABYGPT_TRY(bert_part(part_of(text, decoder), "decoder", "WordPiece"));
            return wordpiece_model(part_of(text, model));  // what a post_processor adds is not part of the text
        }
        const struct { Text part, name; } parts[] = {{cutting, "pre_tokenizer"}, {decoder, "decoder"}};
        for (const auto& part : parts) {
            Json read = part_of(text, part.part);
            if (part.part.size) BABYGPT_TRY(byte_level(read, part.name));
        }
        if (normalizer.size && !equal(normalizer, "null")) return unsupported("normalizer is not supported");
        if (!has_words) return unsupported("pre_tokenizer is not ByteLevel");
        BABYGPT_TRY(bpe_model(part_of(text, model)));
        BABYGPT_TRY(finish());
        UnigramForm none(runtime);
        return unigram_steps(text, after, "post_processor", "processors", none);
    }
    // TemplateProcessing says what stands before each text: the first of "single", where that is a special token. What stands after it, and
    // what others do, is no part of the text.
    BABYGPT_RARE Status processing_step(Json& json) {
        Array<char> type(runtime), first(runtime);
        Text single;
        for (json.enter_object(); json.next_key();)
            if (json.key_is("type")) json.string(type);
            else if (json.key_is("single")) json.skip(single);
            else json.skip();
        if (json.problem) return json.finish(name);
        if (tables.kind == TokenizerKind::bpe && !equal(view(type), "ByteLevel") && !equal(view(type), "TemplateProcessing"))
            return unsupported("post_processor '", Shown(view(type)), "' is not supported");
        if (!equal(view(type), "TemplateProcessing") || single.size == 0) return Status();
        Json item = part_of(json.text, single);
        if (item.enter_array() && item.next_item())
            for (item.enter_object(); item.next_key();) {
                if (!item.key_is("SpecialToken")) item.skip();
                else
                    for (item.enter_object(); item.next_key();) item.key_is("id") ? item.string(first) : item.skip();
            }
        if (item.problem) return item.finish(name);
        return first.count ? begin_with(find_in(by_name, view(first)), view(first)) : Status();
    }
    // `named`: as the file calls it. Of another token the text would be lost, since what begins a text is no part of it.
    BABYGPT_RARE Status begin_with(double id, Text named) {
        if (id < 0) return bad(Shown(named), ", the token before each text, is missing");
        if (!(id < static_cast<double>(tables.tokens.count)) || !tables.tokens[static_cast<size_t>(id)].special ||
            static_cast<int32_t>(id) == tables.unknown)
            return bad(Shown(named), ", the token before each text, is ", id, ", which is no special token");
        tables.begin_of_text = static_cast<int32_t>(id);
        return Status();
    }
    // Reads one value of a text, with places in messages counted from the text's beginning.
    Json part_of(Text text, Text part) const {
        if (part.size == 0) return Json(runtime, Text());
        Json json(runtime, Text(text.data, static_cast<size_t>(part.end() - text.data)));
        json.at = static_cast<size_t>(part.data - text.data);
        return json;
    }
    bool has_words = false;

    Status must_be_null(Json& json) {
        if (json.peek() != JsonType::null)
            return json.peek() == JsonType::none ? json.finish(name) : unsupported(view(json.key), " is not supported");
        json.null();
        return Status();
    }
    Status byte_level(Json& json, Text part) {
        if (json.peek() == JsonType::null) {
            json.null();
            return Status();
        }
        bool prefix = equal(part, "pre_tokenizer"), words = true, known_type = false;  // add_prefix_space is true where it is not said
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("type")) {
                if (!json.string(scratch)) break;
                if (!equal(view(scratch), "ByteLevel")) return unsupported(part, " '", view(scratch), "' is not supported");
                known_type = true;
            } else if (json.key_is("add_prefix_space")) {
                bool value = false;
                json.boolean(value);
                prefix = prefix && value;
            } else if (json.key_is("use_regex")) {
                json.boolean(words);
            } else if (json.key_is("trim_offsets")) {
                json.skip();
            } else return unsupported(part, " has the unknown member '", view(json.key), "'");
        }
        if (json.problem) return json.finish(name);
        if (!known_type) return unsupported(part, " has no type");
        if (!equal(part, "pre_tokenizer")) return Status();
        if (prefix) return unsupported("add_prefix_space is not supported");
        if (!words) return unsupported("use_regex = false is not supported");
        has_words = true;
        return Status();
    }
    Status added_tokens(Json json) {
        for (json.enter_array(); json.next_item();) {
            int64_t id = -1;
            bool special = false;
            left.count = 0;
            for (json.enter_object(); json.next_key();) {
                if (json.key_is("id")) json.integer(id);
                else if (json.key_is("content")) json.string(left);
                else if (json.key_is("special")) json.boolean(special);
                else if (json.key_is("single_word") || json.key_is("lstrip") || json.key_is("rstrip")) {
                    bool value = false;
                    json.boolean(value);
                    if (value) return unsupported("added_tokens: ", view(json.key), " is not supported");
                } else json.skip();
            }
            if (json.problem) break;
            if (!special) return unsupported("added token '", view(left), "' is not special");
            BABYGPT_TRY(add(id, view(left), true));
        }
        return json.finish(name);
    }
    Status bpe_model(Json json) {
        Text vocab, merges;
        for (json.enter_object(); json.next_key();) {
            const JsonType type = json.peek();
            if (json.key_is("type")) {
                if (json.string(scratch) && !equal(view(scratch), "BPE"))
                    return unsupported("model '", view(scratch), "' is not supported");
            } else if (json.key_is("vocab")) json.skip(vocab);
            else if (json.key_is("merges")) json.skip(merges);
            else if (json.key_is("dropout")) BABYGPT_TRY(must_be_null(json));
            else if (json.key_is("continuing_subword_prefix") || json.key_is("end_of_word_suffix")) {
                if (type == JsonType::null) json.null();
                else if (json.string(scratch) && scratch.count) return unsupported(view(json.key), " is not supported");
            } else if (json.key_is("byte_fallback")) {
                bool value = false;
                if (json.boolean(value) && value) return unsupported("byte_fallback is not supported");
            } else if (json.key_is("ignore_merges")) json.boolean(tables.whole_words_first);
            else if (json.key_is("unk_token") || json.key_is("fuse_unk")) json.skip();  // every byte has a token
            else return unsupported("model has the unknown member '", view(json.key), "'");
        }
        BABYGPT_TRY(json.finish(name));
        if (vocab.size == 0 || merges.size == 0) return bad("the model has no vocab or no merges");
        Json tokens = part_of(json.text, vocab);
        BABYGPT_TRY(vocabulary(tokens, false));
        BABYGPT_TRY(tokens.finish(name));
        Json list = part_of(json.text, merges);
        Array<char> first(runtime), second(runtime);
        for (list.enter_array(); list.next_item();) {
            if (list.peek() == JsonType::string) {
                if (list.string(first)) BABYGPT_TRY(merge_line(view(first)));
                continue;
            }
            if (!list.enter_array() || !list.next_item() || !list.string(first) || !list.next_item() || !list.string(second) ||
                list.next_item()) {
                list.reject("expected a merge of two tokens");
                break;
            }
            if (!list.problem) BABYGPT_TRY(add_merge(view(first), view(second)));
        }
        return list.finish(name);
    }

    // ---- Unigram in tokenizer.json ----
    // What T5's, XLM-R's, ALBERT's and Llama's files say about blanks and characters, as far as a SentencePiece model can say it, too: it is
    // made anew. (Hugging Face's library looks up the charsmap by grapheme clusters, and sums scores in double, word by word.)
    struct UnigramForm {
        Array<char> charsmap;
        bool precompiled = false, strips_end = false, collapses = false, prepends = false, replaces = false;  // normalizer
        bool splits = false, metaspace = false, always = false;                                               // pre_tokenizer
        bool no_extra_blanks = false;                                                                         // what follows from these
        explicit UnigramForm(Runtime& runtime) : charsmap(runtime) {}
    };
    // One step, or a sequence of them under `list`.
    BABYGPT_RARE Status unigram_steps(Text text, Text part, Text part_name, Text list, UnigramForm& form) {
        if (part.size == 0 || equal(part, "null")) return Status();
        Text steps;
        bool sequence = false;
        Json json = part_of(text, part);
        for (json.enter_object(); json.next_key();) {
            if (json.key_is(list)) json.skip(steps);
            else if (json.key_is("type")) sequence = json.string(scratch) && equal(view(scratch), "Sequence");
            else json.skip();
        }
        if (json.problem) return json.finish(name);
        if (!sequence || steps.size == 0) return unigram_step(part_of(text, part), part_name, form);
        Json each = part_of(text, steps);
        for (each.enter_array(); each.next_item();) {
            Text step;
            if (!each.skip(step)) break;
            BABYGPT_TRY(unigram_step(part_of(text, step), part_name, form));
        }
        return each.problem ? each.finish(name) : Status();
    }
    BABYGPT_RARE Status unigram_step(Json json, Text part, UnigramForm& form) {
        if (equal(part, "post_processor")) return processing_step(json);
        Array<char> type(runtime), pattern(runtime), content(runtime), scheme(runtime), map(runtime), odd(runtime);
        bool regex = false, left_side = false, right_side = false, prefix = true, ignored = false;
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("type")) json.string(type);
            else if (json.key_is("precompiled_charsmap")) json.peek() == JsonType::null ? json.null() : json.string(map);
            else if (json.key_is("pattern")) {
                for (json.enter_object(); json.next_key();) {
                    regex = json.key_is("Regex");
                    if (!regex && !json.key_is("String"))
                        return unsupported(part, ": a pattern '", Shown(view(json.key)), "' is not supported");
                    json.string(pattern);
                }
            } else if (json.key_is("content") || json.key_is("prepend") || json.key_is("replacement")) json.string(content);
            else if (json.key_is("strip_left")) json.boolean(left_side);
            else if (json.key_is("strip_right")) json.boolean(right_side);
            else if (json.key_is("add_prefix_space")) json.boolean(prefix);
            else if (json.key_is("prepend_scheme")) json.string(scheme);
            else if (json.key_is("split")) json.boolean(ignored);  // no piece has a blank but at its beginning
            else if (json.key_is("str_rep") || json.key_is("start") || json.key_is("stop")) json.skip();
            else if (json.skip() && odd.count == 0 && !append(odd, view(json.key))) return no_memory();
        }
        if (json.problem) return json.finish(name);
        const auto is = [&](Text of_part, Text of_type) { return equal(part, of_part) && equal(view(type), of_type); };
        const auto maps = [&](bool by_regex, Text from, Text to) {
            return regex == by_regex && equal(view(pattern), from) && equal(view(content), to);
        };
        bool known =
            equal(part, "decoder") && (equal(view(type), "Metaspace") || equal(view(type), "Replace") || equal(view(type), "Fuse") ||
                                       equal(view(type), "ByteFallback") || equal(view(type), "Strip"));
        if (is("normalizer", "Precompiled")) {
            bool memory = true;
            known = !form.precompiled && !form.replaces && !form.collapses && !form.prepends;  // before what makes blanks symbols
            form.precompiled = true;
            if (!decode_base64(view(map), form.charsmap, memory))
                return memory ? bad("precompiled_charsmap is not in base 64") : no_memory();
        } else if (is("normalizer", "Strip")) known = form.strips_end = right_side && !left_side;
        else if (is("normalizer", "Prepend")) known = form.prepends = equal(view(content), blank_symbol);
        else if (is("normalizer", "Replace")) {
            if (maps(true, " {2,}", " ") || maps(true, " {2,}", blank_symbol)) known = form.collapses = true;
            else if (maps(true, "^ +| +$", "")) known = form.strips_end = true;
            else if (maps(false, " ", blank_symbol)) known = form.replaces = true;
            else return unsupported(part, ": Replace of '", Shown(view(pattern)), "' is not supported");
        } else if (is("pre_tokenizer", "WhitespaceSplit")) known = form.splits = true;
        else if (is("pre_tokenizer", "Metaspace")) {
            if (!equal(view(content), blank_symbol)) return unsupported(part, ": a replacement that is not U+2581 is not supported");
            form.always = scheme.count ? equal(view(scheme), "always") : prefix;
            known = form.metaspace = true;
            if (scheme.count && !form.always && !equal(view(scheme), "never"))
                return unsupported(part, ": prepend_scheme '", Shown(view(scheme)), "' is not supported");
        }
        if (!known) return unsupported(part, " '", Shown(view(type)), "' is not supported with Unigram");
        return odd.count ? unsupported(part, " has the unknown member '", Shown(view(odd)), "'") : Status();
    }
    // Whether the steps together do what a model with a blank before the text, or none, does with blanks.
    BABYGPT_RARE Status unigram_blanks(UnigramForm& form) {
        form.no_extra_blanks = form.splits || (form.collapses && form.strips_end);
        if (!form.metaspace) {
            if (form.splits || form.collapses || form.strips_end || !form.replaces)
                return unsupported("a pre_tokenizer that is not Metaspace is not supported with Unigram");
            form.always = form.prepends;
            return Status();
        }
        if (form.prepends || form.replaces) return unsupported("normalizer 'Prepend' or 'Replace' beside Metaspace is not supported");
        if (!form.no_extra_blanks && (form.always || form.collapses || form.strips_end))
            return unsupported(
                "Metaspace that keeps blanks at the ends of a text is not supported: WhitespaceSplit, or Replace of ' {2,}' and Strip, "
                "make it "
                "known");
        return Status();
    }
    struct Entry {
        Text raw;  // the piece, as JSON
        float score;
        char kind;
    };
    BABYGPT_RARE Status unigram_model(Text text, Text added, Text model, UnigramForm& form) {
        BABYGPT_TRY(unigram_blanks(form));
        Array<Entry> entries(runtime);
        int64_t unknown_id = -1;
        bool fallback = false;
        Text vocab;
        Json json = part_of(text, model);
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("type")) json.skip();
            else if (json.key_is("unk_id")) json.peek() == JsonType::null ? json.null() : json.integer(unknown_id);
            else if (json.key_is("byte_fallback")) json.boolean(fallback);
            else if (json.key_is("vocab")) json.skip(vocab);
            else return unsupported("model has the unknown member '", Shown(view(json.key)), "'");
        }
        BABYGPT_TRY(json.problem ? json.finish(name) : Status());
        if (vocab.size == 0) return bad("the model has no vocab");
        Json list = part_of(text, vocab);
        for (list.enter_array(); list.next_item();) {
            Entry entry{Text(), 0, piece_normal};
            double score = 0;
            if (!list.enter_array() || !list.next_item() || list.peek() != JsonType::string || !list.skip(entry.raw) || !list.next_item() ||
                !list.number(score) || list.next_item()) {
                list.reject("expected a piece and its score");
                break;
            }
            if (list.problem) break;
            entry.score = static_cast<float>(score);
            if (!is_finite(entry.score)) return bad("the score of piece ", entries.count, " is not finite");
            if (!entries.push(entry)) return no_memory();
        }
        BABYGPT_TRY(list.problem ? list.finish(name) : Status());
        if (unknown_id < 0) return bad("there is no unk_id");
        if (static_cast<uint64_t>(unknown_id) >= entries.count) return bad("unk_id ", unknown_id, " is no piece");
        if (added.size) BABYGPT_TRY(unigram_added(part_of(text, added), entries, form));
        entries[static_cast<size_t>(unknown_id)].kind = piece_unknown;
        Array<char> proto(runtime);
        for (size_t id = 0; id < entries.count; ++id) {
            Entry& entry = entries[id];
            BABYGPT_TRY(string_of(text, entry.raw));
            const Text piece = view(scratch);
            if (entry.kind == piece_normal && fallback && piece.size == 6 && starts_with(piece, "<0x") && piece[5] == '>')
                entry.kind = piece_byte;
            if (entry.kind == piece_normal && memchr(piece.data, ' ', piece.size))
                return unsupported("piece ", id, " has a blank that is not written as U+2581");
            if (!put_piece(proto, piece, bits_as<uint32_t>(entry.score), entry.kind)) return no_memory();
        }
        entries.clear();
        BABYGPT_TRY(sentencepiece_of(proto, 1, fallback, form.always, form.no_extra_blanks, view(form.charsmap)));
        // WhitespaceSplit parts words at other white space, too: then the charsmap must make blanks of it.
        Array<int32_t> no_ids;
        PieceEncoder encoder(tables, no_ids, runtime);
        for (const char c : Text("\t\n\f\r")) {
            size_t taken;
            const Text becomes = encoder.normalized_prefix(Text(&c, 1), taken);
            if (form.splits && becomes.size && !equal(becomes, " "))
                return unsupported("WhitespaceSplit where the normalizer keeps white space other than blanks is not supported");
        }
        return Status();
    }
    Status string_of(Text text, Text raw) {  // into `scratch`
        Json json = part_of(text, raw);
        return json.string(scratch) ? Status() : json.finish(name);
    }
    // Special tokens are control pieces; those after the vocabulary come to it.
    BABYGPT_RARE Status unigram_added(Json json, Array<Entry>& entries, const UnigramForm& form) {
        for (json.enter_array(); json.next_item();) {
            int64_t id = -1;
            bool special = false, sided = false, whole = false;
            Text raw;
            for (json.enter_object(); json.next_key();) {
                bool value = false;
                if (json.key_is("id")) json.integer(id);
                else if (json.key_is("content")) json.peek() == JsonType::string ? json.skip(raw) : json.string(left);
                else if (json.key_is("special")) json.boolean(special);
                else if (json.key_is("lstrip") || json.key_is("rstrip")) sided |= json.boolean(value) && value;
                else if (json.key_is("single_word")) json.boolean(whole);
                else json.skip();
            }
            if (json.problem) break;
            BABYGPT_TRY(string_of(json.text, raw));
            if (!special) return unsupported("added token '", Shown(view(scratch)), "' is not special");
            if (whole) return unsupported("added_tokens: single_word is not supported");
            if (sided && !form.no_extra_blanks)
                return unsupported("added_tokens: lstrip and rstrip are not supported where blanks are kept");
            if (id < 0 || static_cast<uint64_t>(id) > entries.count) return bad("token id ", id, " is out of range");
            if (static_cast<uint64_t>(id) == entries.count && !entries.push(Entry{raw, 0, piece_control})) return no_memory();
            left.count = 0;
            if (!append(left, view(scratch))) return no_memory();
            Entry& entry = entries[static_cast<size_t>(id)];
            BABYGPT_TRY(string_of(json.text, entry.raw));
            if (!equal(view(left), view(scratch)))
                return bad("token ", id, " is '", Shown(view(scratch)), "' and the added token '", Shown(view(left)), "'");
            entry.kind = piece_control;
        }
        return json.problem ? json.finish(name) : Status();
    }

    // ---- WordPiece: vocab.txt and tokenizer.json ----
    // BERT's file: a line a token. Whether letters are made small and stripped of their accents, the path says.
    Status vocab_txt(Text text) {
        file_size = text.size;
        const auto path_has = [&](Text word) {
            for (size_t i = 0; i + word.size <= name.size; ++i)
                if (equal(Text(name.data + i, word.size), word)) return true;
            return false;
        };
        if (!path_has("cased"))
            return unsupported("a vocab.txt does not say whether capitals count: write ", name, ":cased or ", name, ":uncased");
        const bool ends_cased = ends_with(name, ":cased");
        tables.lower_case = tables.strip_accents = !ends_cased && path_has("uncased");
        int64_t id = 0;
        for (size_t at = 0; at < text.size; ++id) {
            const char* end = static_cast<const char*>(memchr(text.data + at, '\n', text.size - at));
            Text line(text.data + at, end ? static_cast<size_t>(end - text.data) - at : text.size - at);
            at += line.size + 1;
            if (line.size && line[line.size - 1] == '\r') --line.size;
            bool special = false;
            for (const char* known : bert_specials) special |= equal(line, known);
            BABYGPT_TRY(add_word(id, line, special));
        }
        return finish_wordpiece("[UNK]");
    }
    Status add_word(int64_t id, Text word, bool special) {
        scratch.count = 0;
        if (special) return add(id, word, true);
        const bool goes_on = starts_with(word, "##") && word.size > 2;
        if (goes_on) word = Text(word.data + 2, word.size - 2);
        if (word.size == 0) return bad("token ", id, " is empty");
        if (goes_on && word[0] == ' ') return bad("token ", id, " has a blank after ##");
        if (!goes_on && !scratch.push(' ')) return no_memory();
        if (!append(scratch, word)) return no_memory();
        return add(id, view(scratch), false);
    }
    Status finish_wordpiece(Text unknown) {
        tables.unknown = find_in(by_name, unknown);
        if (tables.unknown < 0) return bad("the token for unknown words, '", unknown, "', is not a special token");
        for (size_t i = 0; i < tables.tokens.count; ++i)
            if (!tables.tokens[i].special) tables.longest = most(tables.longest, tables.tokens[i].size);
        tables.words = static_cast<HashIndex&&>(by_bytes);
        BABYGPT_TRY(word_classes());
        return collect_specials(tables);
    }
    Status word_classes() {
        if (tables.classes.count) return Status();
        if (!tables.classes.resize(classes_end / 4)) return out_of_memory(classes_end / 4);
        mark_ranges(tables.classes.items, white_ranges, word_white);
        mark_ranges(tables.classes.items, punctuation_ranges, word_punctuation);
        mark_ranges(tables.classes.items, removed_ranges, word_removed);
        const bool good = (!tables.strip_accents || read_map(accent_map, tables.accents)) &&
                          (!tables.lower_case || read_map(small_letter_map, tables.small_letters));
        return good ? Status() : no_memory();
    }
    // {"type":"BertNormalizer",...} and so on; what is not as BERT has it is refused by its name.
    Status bert_part(Json json, Text part, Text type) {
        bool known_type = false, value = false, accents_said = false;
        if (json.peek() != JsonType::object) return unsupported(part, " is not ", type);
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("type")) {
                if (!json.string(scratch)) break;
                if (!equal(view(scratch), type)) return unsupported(part, " '", view(scratch), "' is not supported with WordPiece");
                known_type = true;
            } else if (json.key_is("clean_text") || json.key_is("handle_chinese_chars") || json.key_is("cleanup")) {
                if (json.boolean(value) && !value) return unsupported(part, ": ", view(json.key), " = false is not supported");
            } else if (json.key_is("lowercase")) {
                json.boolean(tables.lower_case);
            } else if (json.key_is("strip_accents")) {
                accents_said = json.peek() == JsonType::boolean;
                accents_said ? json.boolean(tables.strip_accents) : json.null();
            } else if (json.key_is("prefix")) {
                if (json.string(scratch) && !equal(view(scratch), "##"))
                    return unsupported(part, ": prefix '", view(scratch), "' is not supported");
            } else return unsupported(part, " has the unknown member '", view(json.key), "'");
        }
        if (json.problem) return json.finish(name);
        if (!known_type) return unsupported(part, " has no type");
        if (equal(part, "normalizer") && !accents_said) tables.strip_accents = tables.lower_case;
        return Status();
    }
    Status wordpiece_model(Json json) {
        Text vocab;
        int64_t longest_word = 100;
        left.count = 0;
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("type")) json.skip();
            else if (json.key_is("vocab")) json.skip(vocab);
            else if (json.key_is("unk_token")) json.string(left);
            else if (json.key_is("max_input_chars_per_word")) {
                if (json.integer(longest_word) && longest_word != 100)
                    return unsupported("max_input_chars_per_word = ", longest_word, " is not supported");
            } else if (json.key_is("continuing_subword_prefix")) {
                if (json.string(scratch) && !equal(view(scratch), "##"))
                    return unsupported("continuing_subword_prefix '", view(scratch), "' is not supported");
            } else return unsupported("model has the unknown member '", view(json.key), "'");
        }
        BABYGPT_TRY(json.finish(name));
        Json tokens = part_of(json.text, vocab);
        for (tokens.enter_object(); tokens.next_key();) {
            int64_t id = 0;
            if (!tokens.integer(id)) break;
            const int32_t special = find_in(by_name, view(tokens.key));
            if (special >= 0 && special != id) return bad("special token '", view(tokens.key), "' has the ids ", special, " and ", id);
            if (special < 0) BABYGPT_TRY(add_word(id, view(tokens.key), false));
        }
        BABYGPT_TRY(tokens.finish(name));
        return finish_wordpiece(view(left));
    }

    // ---- SentencePiece's .model ----
    // A protobuf message, ModelProto (sentencepiece_model.proto): 1 the pieces, 2 the trainer's settings, 3 the normaliser's, 5 the
    // denormaliser's. It is kept as it is, for saving.
    Status sentencepiece(Text text) {
        file_size = text.size;
        if (!append(tables.proto, text)) return no_memory();
        const Text whole = view(tables.proto);
        const Text default_surface(" \xe2\x81\x87 ");
        Text surface = default_surface, between = "</s>";
        Protobuf model(whole);
        uint64_t type = 1;
        while (model.next()) {
            Protobuf part(model.bytes);
            if (model.field == 2)
                while (part.next()) {
                    if (part.field == 3) type = part.value;
                    if (part.field == 24) tables.treat_whitespace_as_suffix = part.value != 0;
                    if (part.field == 35) tables.byte_fallback = part.value != 0;
                    if (part.field == 44) surface = part.bytes;
                    if (part.field == 47) between = part.bytes;
                }
            if (model.field == 3)
                while (part.next()) {
                    if (part.field == 2)
                        tables.charsmap_size = part.bytes.size, tables.charsmap = static_cast<size_t>(part.bytes.data - whole.data);
                    if (part.field == 3) tables.add_dummy_prefix = part.value != 0;
                    if (part.field == 4) tables.remove_extra_whitespaces = part.value != 0;
                    if (part.field == 5) tables.escape_whitespaces = part.value != 0;
                }
            if (model.field == 5)
                while (part.next())
                    if (part.field == 2 && part.bytes.size) return unsupported("a denormalizer is not supported");
            if (!part.good) return bad("field ", model.field, " is damaged before byte ", model.at);
        }
        if (!model.good) return bad("not a SentencePiece model, or damaged at byte ", model.at);
        if (type != 1 && type != 2)
            return unsupported("model type ", type == 3 ? "WORD" : type == 4 ? "CHAR" : "of an unknown number", " is not supported");
        tables.unigram = type == 1;
        const size_t map = tables.charsmap_size;
        if (map && (map < 8 || PieceEncoder::load_little(whole.data + tables.charsmap) > map - 4))
            return bad("the precompiled_charsmap is damaged");
        for (int32_t& id : tables.byte_ids) id = -1;
        double lowest = 0;
        bool any = false;
        for (Protobuf pieces(whole); pieces.next();)
            if (pieces.field == 1) {
                BABYGPT_TRY(add_piece(pieces.bytes));
                const size_t at = tables.tokens.count - 1;
                if (tables.piece_kinds[at] != piece_normal) continue;
                lowest = any ? least(lowest, tables.scores[at]) : tables.scores[at];
                any = true;
            }
        if (tables.unknown < 0) return bad("there is no unknown piece");
        tables.unknown_score = static_cast<float>(lowest) - 10.0f;
        if (!tables.pieces.grow()) return no_memory();  // there may be no piece at all
        for (size_t i = 0; i < tables.tokens.count; ++i) {
            const int32_t id = static_cast<int32_t>(i);
            const unsigned kind = tables.piece_kinds[i];
            if (kind != piece_normal && kind != piece_user && kind != piece_unused) continue;
            tables.longest = most(tables.longest, tables.tokens[i].size);
            if (tables.unigram && kind != piece_unused && !tables.pieces.add(tables.bytes(id), id))
                return tables.pieces.nodes == Trie::most_nodes - 1 ? unsupported("the pieces are too many") : no_memory();
            if (kind == piece_user && !tables.user_pieces.push(id)) return no_memory();
            if (kind != piece_user || !tables.unigram) continue;
            size_t length = 0;  // as in the file: a user-defined piece is always taken
            for (const char c : tables.bytes(id)) length += c == ' ' && tables.escape_whitespaces ? 3 : 1;
            tables.scores[i] = 0.1 * (static_cast<double>(length) - 1);
        }
        for (int byte = 0; byte < 256 && tables.byte_fallback; ++byte)
            if (tables.byte_ids[byte] < 0) return bad("byte ", byte, " has no piece");
        tables.words = static_cast<HashIndex&&>(by_bytes);
        if (!sort_tokens(tables, tables.user_pieces)) return no_memory();
        note_plain_ascii();
        BABYGPT_TRY(collect_specials(tables));
        for (const int32_t id : tables.specials)
            if (equal(tables.bytes(id), between)) tables.piece_between = id;
        tables.unknown_surface = tables.text.count;
        return append(tables.text, surface.size ? surface : default_surface) ? Status() : no_memory();
    }
    void note_plain_ascii() {
        for (unsigned c = 0x21; c < 0x80; ++c) {
            bool& stays = tables.ascii_stays[c];
            stays = true;
            for (const int32_t id : tables.user_pieces) stays = stays && tables.bytes(id)[0] != static_cast<char>(c);
            Array<int32_t> no_ids;
            const PieceEncoder encoder(tables, no_ids, runtime);
            for (unsigned next = 0; next < 0x80 && tables.charsmap_size; ++next) {
                const char both[] = {static_cast<char>(c), static_cast<char>(next)};
                size_t taken = 0, matched = 0;
                Text replacement;
                stays = stays && !encoder.mapped(Text(both, 2), taken, replacement, &matched) && matched < 2;
            }
        }
    }
    Status add_piece(Text message) {
        Protobuf field(message);
        Text piece;
        uint64_t kind = piece_normal;
        float score = 0;
        while (field.next()) {
            if (field.field == 1) piece = field.bytes;
            if (field.field == 2) score = bits_as<float>(static_cast<uint32_t>(field.value));
            if (field.field == 3) kind = field.value;
        }
        const int64_t id = static_cast<int64_t>(tables.tokens.count);
        if (!field.good) return bad("piece ", id, " is damaged");
        if (kind < piece_normal || kind > piece_byte) return unsupported("piece ", id, " is of the unknown type ", kind);
        if (!is_finite(static_cast<double>(score))) return bad("the score of piece ", id, " is not finite");
        if (!tables.piece_kinds.push(static_cast<unsigned char>(kind)) || !tables.scores.push(static_cast<double>(score)))
            return no_memory();
        if (kind == piece_byte) {
            static const char digits[] = "0123456789ABCDEF";
            const void *high = nullptr, *low = nullptr;
            if (piece.size == 6 && starts_with(piece, "<0x") && piece[5] == '>')
                high = memchr(digits, piece[3], 16), low = memchr(digits, piece[4], 16);
            if (!high || !low) return bad("byte piece ", id, " is not <0x00> to <0xFF>");
            if (!tables.byte_fallback) return bad("piece ", id, " is a byte, but byte_fallback is off");
            const size_t byte = static_cast<size_t>(static_cast<const char*>(high) - digits) * 16 +
                                static_cast<size_t>(static_cast<const char*>(low) - digits);
            if (tables.byte_ids[byte] >= 0) return bad("byte piece ", id, " is given twice");
            tables.byte_ids[byte] = static_cast<int32_t>(id);
            const char c = static_cast<char>(byte);
            return tables.add(Text(&c, 1)) ? Status() : no_memory();
        }
        if (kind == piece_unknown) {
            if (tables.unknown >= 0) return bad("pieces ", tables.unknown, " and ", id, " are both unknown pieces");
            tables.unknown = static_cast<int32_t>(id);
        }
        const bool special = kind == piece_unknown || kind == piece_control;
        scratch.count = 0;
        for (size_t i = 0; i < piece.size; ++i) {
            const bool symbol = !special && tables.escape_whitespaces && starts_with(Text(piece.data + i, piece.size - i), blank_symbol);
            if (!special && tables.escape_whitespaces && piece[i] == ' ')
                return unsupported("piece ", id, " has a blank that is not written as U+2581");
            if (!scratch.push(symbol ? ' ' : piece[i])) return no_memory();
            if (symbol) i += 2;
        }
        return add(id, view(scratch), special);
    }

    // ---- llama2.c's tokenizer.bin ----
    // The longest token's bytes, then for each its score (float), its size and its bytes; the first three are <unk>, <s> and </s>, then
    // come the 256 bytes. It was made from a SentencePiece BPE model (byte fallback, a blank before the text), which is made anew here.
    // llama2.c trains on documents with <s> before each and nothing behind, and its program stops at <s>: that is what stands between them.
    Status llama2c(Text text) {
        Array<char> proto(runtime);
        const auto number = [&](size_t at) { return PieceEncoder::load_little(text.data + at); };
        if (text.size < 4) return bad("the file is too short");
        size_t id = 0;
        for (size_t at = 4; at < text.size; ++id) {
            if (text.size - at < 8 || number(at + 4) > text.size - at - 8) return bad("token ", id, " goes over the end of the file");
            const Text token(text.data + at + 8, number(at + 4));
            if (token.size > number(0)) return bad("token ", id, " is longer than the file says the longest is");
            const char kind = id == 0 ? piece_unknown : id < 3 ? piece_control : id < 259 ? piece_byte : piece_normal;
            const Text piece = id == 1 ? "<s>" : id == 2 ? "</s>" : token;  // llama2.c writes these with line ends around
            if (!put_piece(proto, piece, number(at), kind)) return no_memory();
            at += 8 + token.size;
        }
        BABYGPT_TRY(sentencepiece_of(proto, 2, true, true, false, Text(), "<s>"));
        return begin_with(1, "<s>");
    }
    // A SentencePiece model is made anew: its pieces first. Blanks become U+2581.
    static bool put_field(Array<char>& to, char key, Text bytes) {
        bool good = to.push(key);
        size_t size = bytes.size;
        for (; size >= 0x80; size >>= 7) good = good && to.push(static_cast<char>(size | 0x80));
        return good && to.push(static_cast<char>(size)) && append(to, bytes);
    }
    bool put_piece(Array<char>& proto, Text piece, uint32_t score, char kind) {
        left.count = right.count = 0;
        bool good = true;
        for (const char c : piece) good = good && (c == ' ' ? append(left, blank_symbol) : left.push(c));
        good = good && put_field(right, 0x0a, view(left)) && right.push(0x15);
        for (int shift = 0; shift < 32; shift += 8) good = good && right.push(static_cast<char>(score >> shift & 0xff));
        return good && right.push(0x18) && right.push(kind) && put_field(proto, 0x0a, view(right));
    }
    // ... then the trainer's settings and the normaliser's. `between`: eos_piece, where it is not </s>.
    Status sentencepiece_of(Array<char>& proto, char type, bool bytes, bool prefix, bool no_extra_blanks, Text charsmap,
                            Text between = Text()) {
        const char settings[] = {0x18, type, static_cast<char>(0x98), 2, bytes};
        const char blanks[] = {0x18, prefix, 0x20, no_extra_blanks, 0x28, 1};
        left.count = 0;
        bool good = left.append(settings, sizeof settings);
        if (between.size) good = good && left.push(static_cast<char>(0xfa)) && put_field(left, 2, between);  // field 47
        good = good && put_field(proto, 0x12, view(left));
        left.count = 0;
        good = good && (charsmap.size == 0 || put_field(left, 0x12, charsmap)) && left.append(blanks, sizeof blanks) &&
               put_field(proto, 0x1a, view(left));
        return good ? sentencepiece(view(proto)) : no_memory();
    }

    // ---- GGUF ----
    // tokenizer.ggml.model: gpt2 is byte-level BPE, llama SentencePiece's BPE, t5 its unigram model, bert WordPiece.
    BABYGPT_RARE Status gguf(const Gguf& file) {
        const Text model = file.text("tokenizer.ggml.model");
        const Gguf::Key *tokens, *types, *scores;
        BABYGPT_TRY(file.array("tokenizer.ggml.tokens", true, 0, tokens));
        if (model.size == 0 || !tokens || tokens->count == 0) return unsupported("there is no tokenizer in it");
        BABYGPT_TRY(file.array("tokenizer.ggml.token_type", false, tokens->count, types));
        BABYGPT_TRY(file.array("tokenizer.ggml.scores", false, tokens->count, scores));
        file_size = file.bytes.count;
        const auto kind_of = [&](size_t id) {
            const double kind = types ? file.number_at(*types, id) : 1;
            return kind >= 0 && kind < 7 ? static_cast<int>(kind) : 7;
        };
        const size_t count = static_cast<size_t>(tokens->count);
        size_t place = tokens->at;
        if (equal(model, "gpt2")) {
            for (size_t id = 0; id < count; ++id) BABYGPT_TRY(gguf_token(id, file.next_text(place), kind_of(id)));
            BABYGPT_TRY(gguf_bpe(file));
            return gguf_begin(file, false, -1);
        }
        if (equal(model, "bert")) {
            for (size_t id = 0; id < count; ++id) BABYGPT_TRY(gguf_word(id, file.next_text(place), kind_of(id)));
            tables.kind = TokenizerKind::wordpiece;
            double lower = 1;
            BABYGPT_TRY(file.read("tokenizer.ggml.normalizer.lowercase", lower));
            double strip = lower;
            BABYGPT_TRY(file.read("tokenizer.ggml.normalizer.strip_accents", strip));
            tables.lower_case = lower != 0, tables.strip_accents = strip != 0;
            return finish_wordpiece("[UNK]");
        }
        const bool unigram = equal(model, "t5");
        if (!unigram && !equal(model, "llama"))
            return file.unsupported("gpt2, llama, t5 and bert are known, but not tokenizer.ggml.model ", model);
        double prefix = 1, no_extra_blanks = 0;
        BABYGPT_TRY(file.read("tokenizer.ggml.add_space_prefix", prefix));
        BABYGPT_TRY(file.read("tokenizer.ggml.remove_extra_whitespaces", no_extra_blanks));
        const Gguf::Key* map;
        BABYGPT_TRY(file.array("tokenizer.ggml.precompiled_charsmap", false, 0, map));
        if (map && (!unigram || Gguf::size_of(map->type) != 1)) return unsupported("a precompiled_charsmap of this kind is not supported");
        Array<char> proto(runtime);
        bool bytes = false;
        double last = -1;
        BABYGPT_TRY(file.read("tokenizer.ggml.eos_token_id", last));
        Text between;
        for (size_t id = 0; id < count; ++id) {
            const float score = scores ? static_cast<float>(file.number_at(*scores, id)) : 0;
            const int kind = kind_of(id);
            bytes |= kind == piece_byte;
            const Text piece = file.next_text(place);
            if (kind == piece_control && static_cast<double>(id) == last && !equal(piece, "</s>")) between = piece;
            if (!put_piece(proto, piece, bits_as<uint32_t>(score), static_cast<char>(kind))) return no_memory();
        }
        tables.kind = TokenizerKind::sentencepiece;
        BABYGPT_TRY(sentencepiece_of(proto, unigram ? 1 : 2, bytes, prefix != 0, no_extra_blanks != 0 && unigram,
                                     map ? Text(file.bytes.items + map->at, static_cast<size_t>(map->count)) : Text(), between));
        return gguf_begin(file, !unigram, unigram ? -1 : 1);
    }
    // What llama.cpp puts before each text. `adds`, `id`: where the file does not say it.
    Status gguf_begin(const Gguf& file, double adds, double id) {
        BABYGPT_TRY(file.read("tokenizer.ggml.add_bos_token", adds));
        BABYGPT_TRY(file.read("tokenizer.ggml.bos_token_id", id));
        return adds != 0 ? begin_with(id, "tokenizer.ggml.bos_token_id") : Status();
    }
    Status gguf_token(size_t id, Text token, int kind) {
        bool memory = true;
        if (kind == piece_unused) return Status();  // a hole
        if (kind == piece_control) return add(static_cast<int64_t>(id), token, true);
        if (kind != piece_normal)
            return unsupported("token ", id, " '", Shown(token), "' is of type ", kind, ", which byte-level BPE has not here");
        if (!symbols_to_bytes(token, scratch, memory))
            return memory ? unsupported("token ", id, " '", Shown(token), "' is not byte-level") : no_memory();
        return add(static_cast<int64_t>(id), view(scratch), false);
    }
    Status gguf_bpe(const Gguf& file) {
        static const char* const as_gpt2[] = {"gpt-2", "phi-2", "mpt", "olmo"};  // which cut texts into words as GPT-2 does
        const Text pre = file.text("tokenizer.ggml.pre");
        bool known = false;
        for (const char* like : as_gpt2) known |= equal(pre, like);
        if (!known)
            return file.unsupported("only GPT-2's pre-tokenizer is known, but tokenizer.ggml.pre is ", pre.size ? pre : Text("not said"));
        const Gguf::Key* merges;
        BABYGPT_TRY(file.array("tokenizer.ggml.merges", true, 0, merges));
        size_t place = merges ? merges->at : 0;
        for (uint64_t i = 0; merges && i < merges->count; ++i) BABYGPT_TRY(merge_line(file.next_text(place)));
        return finish();
    }
    // What begins a word has U+2581 before it; what goes on with one is bare, and so are names in brackets.
    Status gguf_word(size_t id, Text token, int kind) {
        if (kind == piece_unused) return Status();  // a hole
        const bool begins = starts_with(token, blank_symbol),
                   bracketed = starts_with(token, "[") && ends_with(token, "]") && token.size > 1;
        left.count = 0;
        if (begins) token = Text(token.data + 3, token.size - 3);
        if ((!begins && !bracketed && !append(left, "##")) || !append(left, token)) return no_memory();
        return add_word(static_cast<int64_t>(id), view(left), kind == piece_control);
    }
};

// The code points of a text, one bit each.
struct CharacterSet {
    Array<unsigned char> bits;
    explicit CharacterSet(Runtime& runtime) : bits(runtime) {}
    bool begin() { return bits.resize(0x110000 / 8); }
    void add(Text piece) {
        for (size_t i = 0, length; i < piece.size; i += length) {
            const uint32_t code = decode_utf8(piece.data + i, piece.end(), length);
            if (code != not_utf8) bits.items[code / 8] = static_cast<unsigned char>(bits.items[code / 8] | 1u << code % 8);
        }
    }
    static bool add_piece(void* self, Text piece, bool) { return static_cast<CharacterSet*>(self)->add(piece), true; }
};

// Where a code stands among ascending ones, or would.
inline int32_t code_rank(const Array<uint32_t>& codes, uint32_t code) {
    size_t low = 0, high = codes.count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (codes.items[middle] < code) low = middle + 1;
        else high = middle;
    }
    return static_cast<int32_t>(low);
}
inline bool add_character(Tables& tables, uint32_t code) {
    char bytes[4];
    return tables.codes.push(code) && tables.add(Text(bytes, encode_utf8(code, bytes)));
}

// WordPiece. As Hugging Face's WordPieceTrainer does (tokenizers, src/models/wordpiece/trainer.rs: it is BpeTrainer with the prefix ##),
// the most frequent pair of neighbours is merged; Schuster & Nakajima 2012 and Wu et al. 2016 would take the pair that gains most
// likelihood, count(ab) / (count(a) count(b)), which prefers rare pairs that never part and needs a lower limit of their counts.
// Ids: BERT's special tokens; all characters, by code; those of them that go on with a word, as ##; then the merges.
struct WordPieceTrainer {
    Tables& tables;
    TokenizerReader reader;
    WordCounter counter;
    CharacterSet begin, go_on;  // all characters; those that are not the first of a word
    Array<int32_t> no_ids;
    WordPieceEncoder words;
    explicit WordPieceTrainer(Tables& t)
        : tables(t),
          reader(t, "the text"),
          counter(t.runtime),
          begin(t.runtime),
          go_on(t.runtime),
          no_ids(t.runtime),
          words(t, no_ids, t.runtime) {
        words.counter = &counter;
        reader.file_size = SIZE_MAX;
    }
    static bool add_piece(void* self, Text piece, bool) {
        WordPieceTrainer& trainer = *static_cast<WordPieceTrainer*>(self);
        if (trainer.words.encode(piece)) return true;
        if (trainer.counter.status.ok()) trainer.counter.status = out_of_memory(piece.size);
        return false;
    }
    // Gives the characters of a set ids, from the next free one on.
    BABYGPT_RARE Status add_characters(const CharacterSet& set, bool first, Array<uint32_t>& codes) {
        for (uint32_t code = 0; code < 0x110000; ++code) {
            if (!(set.bits[code / 8] >> code % 8 & 1)) continue;
            char bytes[5] = {' '};
            const size_t size = 1 + encode_utf8(code, bytes + 1);
            if (!codes.push(code)) return reader.no_memory();
            BABYGPT_TRY(reader.add(static_cast<int64_t>(tables.tokens.count), Text(bytes + !first, size - !first), false));
        }
        return Status();
    }
    BABYGPT_RARE Status learn(size_t vocab) {
        if (!begin.begin() || !go_on.begin()) return out_of_memory(0x110000 / 8);
        for (size_t w = 0; w < counter.words.count; ++w) {
            const Text word = counter.word(w);  // a blank, then the characters
            size_t length;
            decode_utf8(word.data + 1, word.end(), length);
            begin.add(Text(word.data + 1, word.size - 1));
            go_on.add(Text(word.data + 1 + length, word.size - 1 - length));
        }
        for (size_t i = 0; i < 5; ++i) BABYGPT_TRY(reader.add(static_cast<int64_t>(i), bert_specials[i], true));
        Array<uint32_t> first_codes(tables.runtime), codes(tables.runtime);
        BABYGPT_TRY(add_characters(begin, true, first_codes));
        BABYGPT_TRY(add_characters(go_on, false, codes));
        const size_t smallest = tables.tokens.count;
        if (smallest > vocab)
            return fail(Error::invalid_argument, "a vocabulary of ", vocab, " is too small: the text's ", first_codes.count,
                        " characters, ", codes.count, " of them again within words, and 5 special tokens need ", smallest);
        MergeLearner learner(tables.runtime, counter);
        Array<Tables::Merge> merges(tables.runtime);
        bool good = true;
        for (size_t w = 0; w < counter.words.count && good; ++w) {
            const Text word = counter.word(w);
            for (size_t at = 1, length; at < word.size && good; at += length) {
                const uint32_t code = decode_utf8(word.data + at, word.end(), length);
                const int32_t id =
                    at == 1 ? 5 + code_rank(first_codes, code) : static_cast<int32_t>(5 + first_codes.count) + code_rank(codes, code);
                good = learner.add(w, id, at == 1, at + length == word.size);
            }
        }
        if (!good || !learner.learn(smallest, vocab - smallest, merges))
            return out_of_memory(counter.text.count * sizeof(MergeLearner::Spot));
        Array<char> bytes(tables.runtime);
        for (const Tables::Merge& merge : merges) {
            bytes.count = 0;
            if (!append(bytes, tables.bytes(merge.left)) || !append(bytes, tables.bytes(merge.right))) return reader.no_memory();
            BABYGPT_TRY(reader.add(merge.result, view(bytes), false));
        }
        return reader.finish_wordpiece("[UNK]");
    }
};

// ---- learning a unigram model ----------------------------------------------------------------------------------------------

// Kudo 2018, as SentencePiece does it (unigram_model_trainer.cc): begin with all substrings that occur twice and have no extension that
// occurs as often; by expectation-maximization find how probable each piece is; drop the quarter of them whose loss costs least likelihood;
// again, until few are left. Pieces never go over a blank or a line's end, nor from letters to other characters, so that it is enough to
// know the runs of letters, and of others, that a text consists of, with the blank before them, and how often each occurs.
// SentencePiece takes each line for a text. Here, what stands beside a line's end counts as it would if the line were a text of its own (a
// blank before it, no line end after it), and half as often as it stands, so that both ways to cut a text into few tokens are learnt.
struct UnigramTrainer {
    static constexpr size_t longest_run = 32, longest_piece = 16;  // in characters; a longer run is learnt from in parts
    static constexpr size_t most_bytes = 4 * longest_piece, most_seeds = 1000000;
    static constexpr double shift = 16;  // nats a character that probabilities are raised by, lest the product over a run underflow
    struct Piece {
        size_t start;
        uint32_t size, length;  // in bytes, in characters
        double score;           // the natural logarithm of its probability
        Text bytes(const Array<char>& from) const { return Text(from.items + start, size); }
    };
    struct Suffix {
        uint32_t at, run;
    };
    struct Edge {
        uint32_t start, end;
        int32_t id;
    };
    struct Step {  // of the best way: the piece that ends here
        double score;
        int32_t id;
        uint32_t start;
    };
    Tables& tables;
    WordCounter runs;
    Array<char> run, blank_run;  // that is being read: perhaps a blank, then characters of one class; the same with a blank before it
    size_t run_length = 0;       // in characters
    bool run_letters = false, document_begins = true, line_begins = false;
    uint32_t last = 0;  // character
    CharacterSet all;
    Array<char> text;  // the runs, each ended by a byte that UTF-8 does not have
    Array<Suffix> suffixes;
    Array<Piece> pieces;
    size_t single = 0;  // how many pieces are single characters, which stand first and stay
    Trie trie;
    Array<double> probabilities, expected;  // by piece
    Array<Edge> edges;
    Array<Step> steps;
    explicit UnigramTrainer(Tables& t)
        : tables(t),
          runs(t.runtime),
          run(t.runtime),
          blank_run(t.runtime),
          all(t.runtime),
          text(t.runtime),
          suffixes(t.runtime),
          pieces(t.runtime),
          trie(t.runtime),
          probabilities(t.runtime),
          expected(t.runtime),
          edges(t.runtime),
          steps(t.runtime) {}

    // ---- the text's runs ----
    static bool add_piece(void* self, Text piece, bool end_of_document) {
        UnigramTrainer& trainer = *static_cast<UnigramTrainer*>(self);
        if (trainer.add(piece) && (!end_of_document || trainer.end_run())) return trainer.document_begins |= end_of_document, true;
        if (trainer.runs.status.ok()) trainer.runs.status = out_of_memory(piece.size);
        return false;
    }
    // Letters and what stands over and under them in the scripts that are written so; signs and digits are something else.
    bool is_letter(uint32_t c) const {
        const unsigned kind = tables.classify(c);
        return kind == class_letter || (kind == class_other && c >= 0x300 && c < 0x2000);
    }
    bool add(Text piece) {
        for (size_t i = 0, length; i < piece.size; i += length) {
            uint32_t c = decode_utf8(piece.data + i, piece.end(), length);
            if (c == not_utf8) c = 0xfffd;
            const bool blank = c == ' ', letter = !blank && is_letter(c), begun = run_length > 1 || (run_length == 1 && run[0] != ' ');
            const bool new_line = ends_line(last) && !ends_line(c) && !document_begins;
            if (document_begins && !add_to_run(' ')) return false;  // as the encoder puts one before each text
            document_begins = false;
            if ((blank || new_line || run_length == longest_run || (begun && letter != run_letters)) && !end_run()) return false;
            if (ends_line(c) && !ends_line(last) && run.count && !runs.add(view(run), 2)) return false;  // as if the text ended here
            line_begins |= new_line && !blank;
            run_letters = letter;
            last = c;
            if (!add_to_run(c)) return false;
        }
        return true;
    }
    static bool ends_line(uint32_t c) { return c == '\n' || c == '\r'; }
    bool add_to_run(uint32_t c) { return ++run_length, append_utf8(run, c); }
    bool end_run() {
        bool good = run.count == 0 || runs.add(view(run), line_begins || ends_line(static_cast<unsigned char>(run[run.count - 1])) ? 1 : 2);
        if (line_begins && run.count) {
            blank_run.count = 0;
            good = good && blank_run.push(' ') && append(blank_run, view(run)) && runs.add(view(blank_run), 2);
        }
        line_begins = false;
        return run.count = run_length = 0, good;
    }

    // ---- seeds ----
    unsigned byte_of(const Suffix& suffix, size_t depth) const { return static_cast<unsigned char>(text.items[suffix.at + depth]); }
    double weight(size_t r) const { return static_cast<double>(runs.words.items[r].count) / 2; }  // how often a run occurs
    static size_t character_size(char first) {
        const unsigned char c = static_cast<unsigned char>(first);
        return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    }
    // The characters of the text, the runs one after another, and where each suffix of a run begins.
    BABYGPT_RARE bool read_runs() {
        Array<uint32_t> codes(*text.runtime);
        if (!all.begin()) return false;
        all.add(" \n");  // stand between words and documents
        for (size_t r = 0; r < runs.words.count; ++r) {
            const Text bytes = runs.word(r);
            all.add(bytes);
            for (size_t i = 0; i < bytes.size; i += character_size(bytes[i]))
                if (!suffixes.push(Suffix{static_cast<uint32_t>(text.count + i), static_cast<uint32_t>(r)})) return false;
            if (!append(text, bytes) || !text.push('\xff')) return false;
        }
        for (uint32_t code = 0; code < 0x110000; ++code) {
            if (!(all.bits[code / 8] >> code % 8 & 1)) continue;
            char bytes[4];
            const size_t size = encode_utf8(code, bytes);
            if (!codes.push(code) || !pieces.push(Piece{text.count, static_cast<uint32_t>(size), 1, 0}) || !text.append(bytes, size))
                return false;
        }
        for (const Suffix& suffix : suffixes) {
            size_t length;
            const uint32_t code = decode_utf8(text.items + suffix.at, text.end(), length);
            pieces.items[code_rank(codes, code)].score += weight(suffix.run);
        }
        single = pieces.count;
        return true;
    }
    // Puts the suffixes in the order of their first bytes, by multikey quicksort (Bentley & Sedgewick 1997).
    BABYGPT_CALL bool sort_suffixes() {
        struct Range {
            size_t from, to, depth;
        };
        Array<Range> ranges(*text.runtime);
        if (!ranges.push(Range{0, suffixes.count, 0})) return false;
        while (ranges.count) {
            const Range range = ranges[--ranges.count];
            if (range.to - range.from < 2 || range.depth == most_bytes) continue;
            Suffix* const list = suffixes.items;
            const unsigned pivot = byte_of(list[range.from + (range.to - range.from) / 2], range.depth);
            size_t less = range.from, greater = range.to;
            for (size_t i = less; i < greater;) {
                const unsigned byte = byte_of(list[i], range.depth);
                const Suffix here = list[i];
                if (byte < pivot) list[i++] = list[less], list[less++] = here;
                else if (byte > pivot) list[i] = list[--greater], list[greater] = here;
                else ++i;
            }
            const bool good = ranges.push(Range{range.from, less, range.depth}) && ranges.push(Range{greater, range.to, range.depth}) &&
                              (pivot == 0xff || ranges.push(Range{less, greater, range.depth + 1}));
            if (!good) return false;
        }
        return true;
    }
    // Substrings that many suffixes begin with and no longer one has the same: the inner nodes of the suffix tree (Abouelhoda et al. 2004),
    // and its leaves.
    BABYGPT_RARE bool find_seeds() {
        struct Open {
            uint32_t at;
            size_t depth;
            double weight;
        };
        Array<Open> open(*text.runtime);
        if (!open.push(Open{0, 0, 0})) return false;
        size_t before = 0;  // the length of the last suffix
        for (size_t i = 0; i <= suffixes.count; ++i) {
            size_t length = 0, common = 0;
            if (i < suffixes.count) {
                for (size_t n = 0; n < longest_piece && byte_of(suffixes[i], length) != 0xff; ++n)
                    length += character_size(text.items[suffixes[i].at + length]);
                while (i > 0 && common < least(length, before) && byte_of(suffixes[i], common) == byte_of(suffixes[i - 1], common))
                    ++common;
            }
            while (open[open.count - 1].depth > common) {
                const Open top = open[--open.count];
                Open& below = open[open.count - 1];
                if (!add_seed(top.at, top.depth, most(common, below.depth), top.weight)) return false;
                if (below.depth >= common) below.weight += top.weight;
                else if (!open.push(Open{top.at, common, top.weight})) return false;
            }
            if (i == suffixes.count) break;
            if (length == common) open[open.count - 1].weight += weight(suffixes[i].run);
            else if (!open.push(Open{suffixes[i].at, length, weight(suffixes[i].run)})) return false;
            before = length;
        }
        return true;
    }
    bool add_seed(uint32_t at, size_t size, size_t parent_size, double count) {
        while ((text.items[at + size] & 0xc0) == 0x80) --size;  // bytes may differ within a character
        if (size <= parent_size || count < 2) return true;
        uint32_t length = 0;
        for (size_t i = 0; i < size; i += character_size(text.items[at + i])) ++length;
        return length < 2 || pieces.push(Piece{at, static_cast<uint32_t>(size), length, count * length});
    }
    // Keeps, beside the single characters, the `count` pieces with the highest values, in their order; negative ones never.
    BABYGPT_RARE bool keep(const Array<double>& values, size_t count) {
        Array<double> rest(*text.runtime);
        for (size_t i = single; i < pieces.count; ++i)
            if (values[i] >= 0 && !rest.push(values[i])) return false;
        double limit = -1;
        size_t at_limit = 0;
        if (count < rest.count) {  // quickselect (Hoare 1961)
            for (size_t from = 0, to = rest.count; to - from > 1;) {
                const double pivot = rest[from + (to - from) / 2];
                size_t less = from, greater = to;
                for (size_t i = from; i < greater;) {
                    const double here = rest[i];
                    if (here > pivot) rest[i++] = rest[less], rest[less++] = here;
                    else if (here < pivot) rest[i] = rest[--greater], rest[greater] = here;
                    else ++i;
                }
                if (count < less) to = less;
                else if (count >= greater) from = greater;
                else from = to;
            }
            limit = rest[count];
            at_limit = count;
            for (const double value : rest) at_limit -= value > limit;
        }
        size_t kept = single;
        for (size_t i = single; i < pieces.count; ++i) {
            const bool equal_one = values[i] == limit && at_limit > 0;
            if (values[i] < 0 || (values[i] <= limit && !equal_one)) continue;
            at_limit -= equal_one;
            pieces.items[kept++] = pieces[i];
        }
        pieces.count = kept;
        return true;
    }
    BABYGPT_RARE bool make_seeds() {
        if (!read_runs() || !sort_suffixes() || !find_seeds()) return false;
        suffixes.clear();
        expected.count = 0;
        for (const Piece& piece : pieces)
            if (!expected.push(piece.score)) return false;
        if (!keep(expected, most_seeds)) return false;
        double sum = 0;
        for (const Piece& piece : pieces) sum += most(piece.score, 1.0);
        for (Piece& piece : pieces) piece.score = log_of(most(piece.score, 1.0)) - log_of(sum);
        return true;
    }

    // ---- expectation-maximization ----
    BABYGPT_CALL bool build_trie() {
        trie.slots.clear();
        trie.nodes = 1;
        for (size_t i = 0; i < pieces.count; ++i)
            if (!trie.add(pieces[i].bytes(text), static_cast<int32_t>(i))) return false;
        return true;
    }
    // How often each piece is to be expected in the text: the forward-backward algorithm (Baum et al. 1970) over each run.
    BABYGPT_CALL bool expect() {
        probabilities.count = expected.count = 0;
        if (!probabilities.resize(pieces.count) || !expected.resize(pieces.count)) return false;
        for (size_t i = 0; i < pieces.count; ++i) probabilities[i] = exp_of(pieces[i].score + shift * pieces[i].length);
        for (size_t r = 0; r < runs.words.count; ++r) {
            const Text bytes = runs.word(r);
            double forward[4 * longest_run + 5] = {1}, backward[4 * longest_run + 5] = {};  // a blank may come before a run
            edges.count = 0;
            for (size_t start = 0; start < bytes.size; start += character_size(bytes[start])) {
                uint32_t node = 0;
                for (size_t end = start; end < bytes.size;) {
                    const Trie::Slot* slot = trie.find(node, bytes[end]);
                    if (slot->key == Trie::empty) break;
                    ++end, node = slot->node;
                    if (slot->id < 0) continue;
                    forward[end] += forward[start] * probabilities.items[slot->id];
                    if (!edges.push(Edge{static_cast<uint32_t>(start), static_cast<uint32_t>(end), slot->id})) return false;
                }
            }
            const double scale = weight(r) / forward[bytes.size];
            backward[bytes.size] = 1;
            for (size_t e = edges.count; e-- > 0;) {
                const Edge& edge = edges.items[e];
                const double rest = probabilities.items[edge.id] * backward[edge.end];
                backward[edge.start] += rest;
                expected.items[edge.id] += forward[edge.start] * rest * scale;
            }
        }
        return true;
    }
    // d ln Gamma(x) / dx: up to where its asymptotic series is exact, then that.
    static double digamma(double x) {
        double sum = 0;
        for (; x < 8; ++x) sum -= 1 / x;
        const double y = 1 / (x * x);
        return sum + log_of(x) - 0.5 / x - y * (1.0 / 12 - y * (1.0 / 120 - y * (1.0 / 252 - y * (1.0 / 240 - y / 132))));
    }
    // The new probabilities, with a prior that lets rare pieces die (Liang & Klein 2007, variational Bayes); what is expected less than half
    // a time goes.
    BABYGPT_RARE void maximize() {
        size_t kept = 0;
        double sum = 0;
        for (size_t i = 0; i < pieces.count; ++i) {
            if (i >= single && expected[i] < 0.5) continue;
            Piece piece = pieces[i];
            piece.score = most(expected[i], 0.5);
            sum += piece.score;
            pieces[kept++] = piece;
        }
        pieces.count = kept;
        const double all_of_it = digamma(sum);
        for (Piece& piece : pieces) piece.score = digamma(piece.score) - all_of_it;
    }

    // ---- pruning ----
    // The best way to cut some bytes without piece `without`: its probability's logarithm, and in `steps` the pieces from the end.
    BABYGPT_CALL bool best_way(Text bytes, int32_t without) {
        steps.count = 0;
        if (!steps.resize(bytes.size + 1)) return false;
        for (size_t start = 0; start < bytes.size; start += character_size(bytes[start])) {
            uint32_t node = 0;
            for (size_t end = start; end < bytes.size;) {
                const Trie::Slot* slot = trie.find(node, bytes[end]);
                if (slot->key == Trie::empty) break;
                ++end, node = slot->node;
                if (slot->id < 0 || slot->id == without) continue;
                const double score = steps.items[start].score + pieces.items[slot->id].score;
                Step& step = steps.items[end];
                if (step.score == 0 || score > step.score) step = Step{score, slot->id, static_cast<uint32_t>(start)};
            }
        }
        return true;
    }
    // For each piece, in `probabilities`, how much likelihood is lost without it, its place being taken by the best way to cut it; negative
    // where that is more probable than the piece, or the best ways to cut the text do not use it.
    bool find_losses() {
        if (!build_trie()) return false;
        expected.count = probabilities.count = 0;
        if (!expected.resize(pieces.count) || !probabilities.resize(pieces.count)) return false;
        double sum = 0;
        for (size_t r = 0; r < runs.words.count; ++r) {
            const Text bytes = runs.word(r);
            const double count = weight(r);
            if (!best_way(bytes, -1)) return false;
            for (size_t end = bytes.size; end > 0; end = steps[end].start) expected.items[steps[end].id] += count, sum += count;
        }
        for (size_t i = single; i < pieces.count; ++i) {
            const Text bytes = pieces[i].bytes(text);
            double& loss = probabilities[i];
            const double count = expected[i];
            loss = -1;
            if (count <= 0) continue;
            if (!best_way(bytes, static_cast<int32_t>(i))) return false;
            if (steps[bytes.size].score > pieces[i].score) continue;
            double others = 0, logarithms = 0;
            for (size_t end = bytes.size; end > 0; end = steps[end].start)
                logarithms += log_of(expected.items[steps[end].id] + count), ++others;
            loss = most(0.0, count * (log_of(count / sum) - logarithms + others * log_of(sum + count * (others - 1))));
        }
        return true;
    }
    BABYGPT_RARE Status learn(size_t vocab, bool byte_fallback) {
        const Status no_memory = out_of_memory(runs.text.count * sizeof(Suffix));
        if (!make_seeds()) return no_memory;
        const size_t others = 3 + (byte_fallback ? 256 : 0);
        if (vocab < others + single)
            return fail(Error::invalid_argument, "a vocabulary of ", vocab, " is too small: the text's ", single, " characters and ",
                        others, " other pieces need ", others + single);
        const size_t wanted = vocab - others - single, more = wanted + vocab / 10;
        for (;;) {
            if (!build_trie()) return no_memory;
            for (int i = 0; i < 2; ++i) {
                if (!expect()) return no_memory;
                maximize();
                if (!build_trie()) return no_memory;
            }
            const bool few = pieces.count - single <= more;
            if (!find_losses() || !keep(probabilities, most(more, pieces.count * 3 / 4 - least(single, pieces.count * 3 / 4))))
                return no_memory;
            if (few) break;
        }
        probabilities.count = 0;
        for (const Piece& piece : pieces)
            if (!probabilities.push(piece.score + 1000)) return no_memory;
        return keep(probabilities, wanted) ? write(byte_fallback) : no_memory;
    }
    // The model as a file: <unk>, <s>, </s>, the bytes, then the pieces, the most probable first.
    BABYGPT_RARE Status write(bool byte_fallback) {
        struct Item {
            double score;
            size_t piece;
            bool operator<(const Item& other) const { return score != other.score ? score > other.score : piece < other.piece; }
        };
        TokenizerReader reader(tables, "the text");
        Array<Item> order(tables.runtime);
        Array<char> proto(tables.runtime);
        const auto put = [&](Text piece, double score, char kind) {
            return reader.put_piece(proto, piece, bits_as<uint32_t>(static_cast<float>(score)), kind);
        };
        bool good = put("<unk>", 0, piece_unknown) && put("<s>", 0, piece_control) && put("</s>", 0, piece_control);
        for (unsigned byte = 0; byte < 256 && byte_fallback; ++byte) {
            static const char digits[] = "0123456789ABCDEF";
            const char symbol[] = {'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
            good = good && put(Text(symbol, 6), 0, piece_byte);
        }
        for (size_t i = 0; i < pieces.count; ++i) good = good && heap_push(order, Item{pieces[i].score, i});
        while (good && order.count) {
            const Item item = heap_pop(order);
            good = put(pieces[item.piece].bytes(text), item.score, piece_normal);
        }
        tables.classes.clear();
        return good ? reader.sentencepiece_of(proto, 1, byte_fallback, true, false, Text()) : out_of_memory(proto.count);
    }
};

// ---- making a tokenizer -----------------------------------------------------------------------------------------------------

BABYGPT_RARE inline Status begin_tokenizer(Tokenizer& made, Runtime& runtime, TokenizerKind kind) {
    made.runtime = &runtime;
    made.tables = create<Tables>(runtime, runtime);
    if (!made.tables) return out_of_memory(sizeof(Tables));
    made.tables->kind = kind;
    return Status();
}
BABYGPT_RARE inline Status finish_tokenizer(Tokenizer& made) {
    Tables& tables = *made.tables;
    made.kind = tables.kind;  // a tokenizer.json says which
    if (made.kind == TokenizerKind::characters) {
        made.unknown = static_cast<int32_t>(tables.tokens.count);
        if (!tables.add("\xef\xbf\xbd")) return out_of_memory(tables.text.count);
    }
    if (tables.tokens.count > INT32_MAX) return fail(Error::unsupported, "the tokenizer has ", tables.tokens.count, " tokens");
    made.vocab = static_cast<int>(tables.tokens.count);
    if (tables.unknown >= 0) made.unknown = tables.unknown;
    made.end_of_text = tables.piece_between, made.begin_of_text = tables.begin_of_text;
    const Text separator = tables.kind == TokenizerKind::wordpiece ? "[SEP]" : end_of_text_name;
    for (const int32_t id : tables.specials)
        if (tables.kind != TokenizerKind::sentencepiece && equal(tables.bytes(id), separator)) made.end_of_text = id;
    return Status();
}
// A tokenizer that `fill(tables)` fills, in the place of what `tokenizer` was; that stays as it was where something fails.
template <class Fill>
Status make_tokenizer(Tokenizer& tokenizer, Runtime& runtime, TokenizerKind kind, const Fill& fill) {
    Tokenizer made;
    BABYGPT_TRY(begin_tokenizer(made, runtime, kind));
    BABYGPT_TRY(fill(*made.tables));
    BABYGPT_TRY(finish_tokenizer(made));
    tokenizer = static_cast<Tokenizer&&>(made);
    return Status();
}

// What is learnt from: a corpus's training part, which comes in pieces, or a text.
struct TrainingText {
    Corpus* corpus;
    Text text;
    Status operator()(void* user, bool (*piece)(void*, Text, bool)) const {
        if (corpus) return corpus->read(Part::training, piece, user);
        return piece(user, text, true), Status();
    }
};
BABYGPT_RARE inline Status train_tokenizer(Tokenizer& tokenizer, Runtime& runtime, const TokenizerConfig& config,
                                           const TrainingText& read) {
    if (config.kind == TokenizerKind::bytes) return tokenizer.create_bytes(runtime);
    if (config.kind == TokenizerKind::characters)
        return make_tokenizer(tokenizer, runtime, config.kind, [&](Tables& tables) {
            CharacterSet set(runtime);
            if (!set.begin()) return out_of_memory(0x110000 / 8);
            set.add("\n");  // stands between documents, whether or not it stands in one
            BABYGPT_TRY(read(&set, &CharacterSet::add_piece));
            for (uint32_t code = 0; code < 0x110000; ++code)
                if (set.bits[code / 8] >> code % 8 & 1 && !add_character(tables, code)) return out_of_memory(tables.text.count);
            return Status();
        });
    if (config.kind == TokenizerKind::wordpiece)
        return make_tokenizer(tokenizer, runtime, config.kind, [&](Tables& tables) {
            tables.lower_case = tables.strip_accents = !config.cased;
            WordPieceTrainer trainer(tables);
            BABYGPT_TRY(trainer.reader.word_classes());
            BABYGPT_TRY(read(&trainer, &WordPieceTrainer::add_piece));
            BABYGPT_TRY(trainer.counter.status);
            return trainer.learn(static_cast<size_t>(most(config.vocab, 0)));
        });
    if (config.kind == TokenizerKind::sentencepiece)
        return make_tokenizer(tokenizer, runtime, config.kind, [&](Tables& tables) {
            if (!tables.make_classes()) return out_of_memory(classes_end / 4);
            UnigramTrainer trainer(tables);
            BABYGPT_TRY(read(&trainer, &UnigramTrainer::add_piece));
            if (!trainer.end_run() && trainer.runs.status.ok()) trainer.runs.status = out_of_memory(trainer.runs.text.count);
            BABYGPT_TRY(trainer.runs.status);
            return trainer.learn(static_cast<size_t>(most(config.vocab, 0)), config.byte_fallback);
        });
    if (config.kind != TokenizerKind::bpe) return fail(Error::invalid_argument, "a tokenizer of this kind cannot be trained");
    if (config.vocab < 257)
        return fail(Error::invalid_argument, "a vocabulary of ", config.vocab,
                    " is too small: 256 bytes and the end-of-text token need 257");
    return make_tokenizer(tokenizer, runtime, config.kind, [&](Tables& tables) {
        if (!tables.make_classes()) return out_of_memory(classes_end / 4);
        WordCounter counter(runtime);
        WordReader reader{tables, counter};
        BABYGPT_TRY(read(&reader, &WordReader::add_piece));
        BABYGPT_TRY(counter.status);
        BABYGPT_TRY(learn_bpe(tables, counter, static_cast<size_t>(config.vocab - 257)));
        for (int byte = 0; byte < 256; ++byte) {
            const char c = static_cast<char>(byte);
            tables.byte_ids[byte] = byte;
            if (!tables.add(Text(&c, 1))) return out_of_memory(256);
        }
        for (const Tables::Merge& merge : tables.merges) {
            const size_t start = tables.text.count, left = tables.bytes(merge.left).size, right = tables.bytes(merge.right).size;
            if (left + right > INT32_MAX || !tables.text.reserve(start + left + right)) return out_of_memory(start + left + right);
            const bool good = append(tables.text, tables.bytes(merge.left)) && append(tables.text, tables.bytes(merge.right)) &&
                              tables.tokens.push(Tables::Token{start, left + right, false});
            if (!good) return out_of_memory(tables.tokens.count);
        }
        if (!tables.add(end_of_text_name, true)) return out_of_memory(tables.text.count);
        return finish_bpe(tables);
    });
}

// {"babygpt":{"kind":"bytes"}}, {"babygpt":{"kind":"characters","characters":"..."}}, the characters in ascending order, or
// {"babygpt":{"kind":"sentencepiece","model":"...","begin_of_text":1}}, a .model in base 64, and the token where there is one.
BABYGPT_RARE inline Status read_simple_tokenizer(Tokenizer& tokenizer, Runtime& runtime, Json& json, Text name) {
    Array<char> kind(runtime), characters(runtime), model(runtime);
    int64_t begin = -1;
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("kind")) json.string(kind);
        else if (json.key_is("begin_of_text")) json.integer(begin);
        else if (json.key_is("characters")) json.string(characters);
        else if (json.key_is("model")) json.string(model);
        else return fail(Error::unsupported, "'", name, "': babygpt has the unknown member '", view(json.key), "'");
    }
    if (json.problem) return json.finish(name);
    if (equal(view(kind), "sentencepiece"))
        return make_tokenizer(tokenizer, runtime, TokenizerKind::sentencepiece, [&](Tables& tables) {
            Array<char> proto(runtime);
            bool memory = true;
            if (!decode_base64(view(model), proto, memory))
                return memory ? fail(Error::bad_file, "'", name, "': the model is not in base 64") : out_of_memory(model.count);
            TokenizerReader reader(tables, name);
            BABYGPT_TRY(reader.sentencepiece(view(proto)));
            return begin == -1 ? Status() : reader.begin_with(static_cast<double>(begin), "begin_of_text");
        });
    if (begin != -1) return fail(Error::bad_file, "'", name, "': a tokenizer of this kind has no begin_of_text");
    if (equal(view(kind), "bytes")) return tokenizer.create_bytes(runtime);
    if (!equal(view(kind), "characters"))
        return fail(Error::unsupported, "'", name, "': the kind of tokenizer '", view(kind), "' is not known");
    return make_tokenizer(tokenizer, runtime, TokenizerKind::characters, [&](Tables& tables) {
        const Text text = view(characters);
        for (size_t i = 0, length; i < text.size; i += length) {
            const uint32_t code = decode_utf8(text.data + i, text.end(), length);
            if (code == not_utf8 || (tables.codes.count && code <= tables.codes[tables.codes.count - 1]))
                return fail(Error::bad_file, "'", name, "': the characters are not in ascending order at number ", tables.codes.count);
            if (!add_character(tables, code)) return out_of_memory(tables.text.count);
        }
        return Status();
    });
}

BABYGPT_RARE inline Status read_tokenizer_json(Tokenizer& tokenizer, Runtime& runtime, Text text, Text name) {
    Tokenizer read;
    Json json(runtime, text);
    const bool simple = json.enter_object() && json.next_key() && json.key_is("babygpt");
    if (json.problem) return json.finish(name);
    if (simple) {
        BABYGPT_TRY(read_simple_tokenizer(read, runtime, json, name));
        if (json.next_key()) json.reject("expected nothing after \"babygpt\"");
        BABYGPT_TRY(json.finish(name));
    } else {
        BABYGPT_TRY(make_tokenizer(read, runtime, TokenizerKind::bpe,
                                   [&](Tables& tables) { return TokenizerReader(tables, name).tokenizer_json(text); }));
    }
    tokenizer = static_cast<Tokenizer&&>(read);
    return Status();
}

BABYGPT_RARE inline Status read_vocab_and_merges(Tokenizer& tokenizer, Runtime& runtime, Text vocab_path, Text merges_path) {
    Array<char> vocab, merges;
    BABYGPT_TRY(read_file(runtime, vocab_path, vocab));
    BABYGPT_TRY(read_file(runtime, merges_path, merges));
    return make_tokenizer(tokenizer, runtime, TokenizerKind::bpe, [&](Tables& tables) {
        TokenizerReader reader(tables, vocab_path);
        BABYGPT_TRY(reader.encoder_json(view(vocab)));
        reader.name = merges_path;
        BABYGPT_TRY(reader.vocab_bpe(view(merges)));
        reader.name = vocab_path;
        return reader.finish();
    });
}

// A key of ours holds what GGUF has no words for.
inline Status read_gguf_tokenizer(Tokenizer& tokenizer, Runtime& runtime, const Gguf& gguf) {
    const Text ours = gguf.text("babygpt.tokenizer"), name = gguf.source.name;
    if (ours.size) return read_tokenizer_json(tokenizer, runtime, ours, name);
    return make_tokenizer(tokenizer, runtime, TokenizerKind::bpe, [&](Tables& tables) { return TokenizerReader(tables, name).gguf(gguf); });
}

// One file of a tokenizer: what it is shows in its name.
BABYGPT_RARE inline Status read_tokenizer_file(Tokenizer& tokenizer, Runtime& runtime, Text path) {
    static const char* const beside[][2] = {{"encoder.json", "vocab.bpe"}, {"vocab.json", "merges.txt"}};
    for (const auto& names : beside)
        for (const char* name : names) {
            if (!ends_with(path, name)) continue;
            const Text folder(path.data, path.size - Text(name).size);
            const Path vocab(folder, names[0]), merges(folder, names[1]);
            if (!vocab.fits || !merges.fits) return fail(Error::cannot_open, "the path '", path, "' is too long");
            return read_vocab_and_merges(tokenizer, runtime, Text(vocab.text), Text(merges.text));
        }
    if (ends_with(path, ".gguf")) {
        File opened(runtime);
        ByteSource source(opened);
        BABYGPT_TRY(source.open(path));
        Gguf gguf(runtime, source);
        BABYGPT_TRY(gguf.open());
        return read_gguf_tokenizer(tokenizer, runtime, gguf);
    }
    Array<char> file;
    Text plain = path;  // without ":cased"
    static const char* const marks[] = {":cased", ":uncased"};
    for (const char* mark : marks)
        if (ends_with(path, mark)) plain.size = path.size - Text(mark).size;
    BABYGPT_TRY(read_file(runtime, plain, file));
    if (ends_with(plain, ".txt"))
        return make_tokenizer(tokenizer, runtime, TokenizerKind::wordpiece,
                              [&](Tables& tables) { return TokenizerReader(tables, path).vocab_txt(view(file)); });
    if (ends_with(path, ".model") || ends_with(path, ".bin"))
        return make_tokenizer(tokenizer, runtime, TokenizerKind::sentencepiece, [&](Tables& tables) {
            TokenizerReader reader(tables, path);
            return ends_with(path, ".bin") ? reader.llama2c(view(file)) : reader.sentencepiece(view(file));
        });
    if (!ends_with(path, ".tiktoken")) return read_tokenizer_json(tokenizer, runtime, view(file), path);
    return make_tokenizer(tokenizer, runtime, TokenizerKind::bpe,
                          [&](Tables& tables) { return TokenizerReader(tables, path).tiktoken(view(file)); });
}

// A .model does not say what stands before each text: tokenizer_config.json beside it does. As in llama.cpp, it is <s> where nothing is said.
BABYGPT_RARE inline Status read_begin_of_text(Tokenizer& tokenizer, Runtime& runtime, Text folder) {
    const Path path(folder, "/tokenizer_config.json");
    Array<char> file(runtime), token(runtime);
    if (!path.fits) return Status();
    const Status status = read_file(runtime, Text(path.text), file);
    if (!status.ok() && status.error != Error::cannot_open) return status;
    bool adds = true, said = false;
    if (!append(token, "<s>")) return out_of_memory(token.count);
    Json json(runtime, view(file));
    const auto text_or_none = [&] { return json.peek() == JsonType::null ? token.count = 0, json.null() : json.string(token); };
    if (status.ok()) {
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("add_bos_token") && json.peek() == JsonType::boolean) said = json.boolean(adds);
            else if (!json.key_is("bos_token")) json.skip();
            else if (json.peek() != JsonType::object) text_or_none();
            else
                for (json.enter_object(); json.next_key();) json.key_is("content") ? json.string(token) : json.skip();
        }
        BABYGPT_TRY(json.finish(Text(path.text)));
    }
    if (!adds) return Status();
    for (const int32_t id : tokenizer.tables->specials)
        if (equal(tokenizer.tables->bytes(id), view(token)) && id != tokenizer.unknown) tokenizer.begin_of_text = id;
    if (tokenizer.begin_of_text >= 0 || !said) return Status();
    return fail(Error::bad_file, "'", Text(path.text), "': bos_token '", Shown(view(token)), "' is no special token");
}

inline bool append_symbols(Array<char>& to, Text bytes) {
    for (const char c : bytes)
        if (!append_utf8(to, byte_to_symbol(static_cast<unsigned char>(c)))) return false;
    return true;
}

inline bool write_specials(const Tables& tables, Array<char>& to) {
    bool good = true;
    for (size_t i = 0; i < tables.specials.count && good; ++i) {
        good = append(to, i ? ",\n{\"id\":" : "\n{\"id\":") && append_json(to, int64_t(tables.specials[i])) &&
               append(to, ",\"content\":") && append_json(to, tables.bytes(tables.specials[i])) &&
               append(to, ",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}");
    }
    return good;
}
// What others put before each text.
BABYGPT_RARE inline bool write_begin_of_text(const Tables& tables, int32_t id, Array<char>& to) {
    if (id < 0) return append(to, "null");
    const Text name = tables.bytes(id);
    const auto put = [&](const char* before, const char* after) {
        return append(to, before) && append_json(to, name) && append(to, after);
    };
    return append(to, "{\"type\":\"TemplateProcessing\",\"single\":[") &&
           put("{\"SpecialToken\":{\"id\":", ",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[") &&
           put("{\"SpecialToken\":{\"id\":", ",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},") &&
           put("{\"SpecialToken\":{\"id\":", ",\"type_id\":1}},{\"Sequence\":{\"id\":\"B\",\"type_id\":1}}],") &&
           put("\"special_tokens\":{", ":{\"id\":") && put("", ",\"ids\":[") && append_json(to, int64_t(id)) &&
           put("],\"tokens\":[", "]}}}");
}
BABYGPT_RARE inline bool write_bpe_json(const Tables& tables, int32_t begin, Array<char>& to) {
    Array<char> symbols(*to.runtime);
    const auto write_token = [&](int32_t id) {
        symbols.count = 0;
        const Text bytes = tables.bytes(id);
        return (tables.tokens[static_cast<size_t>(id)].special ? append(symbols, bytes) : append_symbols(symbols, bytes)) &&
               append_json(to, view(symbols));
    };
    bool good = append(to, "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[");
    good = good && write_specials(tables, to);
    good = good &&
           append(to,
                  "],\n\"normalizer\":null,\n"
                  "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},\n"
                  "\"post_processor\":") &&
           write_begin_of_text(tables, begin, to) &&
           append(to,
                  ",\n\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},\n"
                  "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,\"end_of_word_"
                  "suffix\":null,"
                  "\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":") &&
           append(to, tables.whole_words_first ? "true" : "false") && append(to, ",\n\"vocab\":{");
    bool first = true;
    for (size_t i = 0; i < tables.tokens.count && good; ++i) {
        if (tables.tokens[i].size == 0) continue;
        good = append(to, first ? "\n" : ",\n") && write_token(static_cast<int32_t>(i)) && to.push(':') &&
               append_json(to, static_cast<int64_t>(i));
        first = false;
    }
    good = good && append(to, "},\n\"merges\":[");
    for (size_t i = 0; i < tables.merges.count && good; ++i) {
        symbols.count = 0;
        const Tables::Merge& merge = tables.merges[i];
        good = append(to, i ? ",\n" : "\n") && append_symbols(symbols, tables.bytes(merge.left)) && symbols.push(' ') &&
               append_symbols(symbols, tables.bytes(merge.right)) && append_json(to, view(symbols));
    }
    return good && append(to, "]}}\n");
}

BABYGPT_RARE inline bool write_wordpiece_json(const Tables& tables, Array<char>& to) {
    bool good =
        append(to, "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[") && write_specials(tables, to) &&
        append(to,
               "],\n\"normalizer\":{\"type\":\"BertNormalizer\",\"clean_text\":true,\"handle_chinese_chars\":true,\"strip_accents\":") &&
        append(to, tables.strip_accents ? "true,\"lowercase\":" : "false,\"lowercase\":") &&
        append(to, tables.lower_case ? "true" : "false") &&
        append(to,
               "},\n\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"},\n\"post_processor\":null,\n"
               "\"decoder\":{\"type\":\"WordPiece\",\"prefix\":\"##\",\"cleanup\":true},\n"
               "\"model\":{\"type\":\"WordPiece\",\"unk_token\":") &&
        append_json(to, tables.bytes(tables.unknown)) &&
        append(to, ",\"continuing_subword_prefix\":\"##\",\"max_input_chars_per_word\":100,\n\"vocab\":{");
    Array<char> word(*to.runtime);
    bool first = true;
    for (size_t i = 0; i < tables.tokens.count && good; ++i) {
        const Text bytes = tables.bytes(static_cast<int32_t>(i));
        if (bytes.size == 0) continue;
        const bool bare = tables.tokens[i].special, begins = !bare && bytes[0] == ' ';
        word.count = 0;
        good = (bare || begins || append(word, "##")) && append(word, Text(bytes.data + begins, bytes.size - begins)) &&
               append(to, first ? "\n" : ",\n") && append_json(to, view(word)) && to.push(':') && append_json(to, static_cast<int64_t>(i));
        first = false;
    }
    return good && append(to, "}}}\n");
}

// Whether a tokenizer.json of Hugging Face's can say what a SentencePiece model says.
BABYGPT_RARE inline bool fits_unigram_json(const Tables& tables) {
    bool fits = tables.unigram && tables.escape_whitespaces && !tables.treat_whitespace_as_suffix && tables.user_pieces.count == 0 &&
                (tables.add_dummy_prefix || !tables.remove_extra_whitespaces);
    for (size_t i = 0; i < tables.tokens.count && fits; ++i)
        fits = tables.piece_kinds[i] == piece_byte ||
               (tables.piece_kinds[i] != piece_unused && is_utf8(tables.bytes(static_cast<int32_t>(i))));
    return fits;
}
BABYGPT_RARE inline bool write_unigram_json(const Tables& tables, int32_t begin, Array<char>& to) {
    static const char metaspace[] =
        "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"always\",\"split\":true}";
    const bool collapses = tables.remove_extra_whitespaces;
    bool good = append(to, "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[") && write_specials(tables, to) &&
                append(to, "],\n\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[");
    if (tables.charsmap_size)
        good = good && append(to, "\n{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"") &&
               append_base64(to, Text(tables.proto.items + tables.charsmap, tables.charsmap_size)) && append(to, "\"},");
    if (collapses)
        good = good &&
               append(to,
                      "\n{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"^ +| +$\"},\"content\":\"\"},"
                      "\n{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\" \"}]},\n\"pre_tokenizer\":") &&
               append(to, metaspace);
    else {
        if (tables.add_dummy_prefix) good = good && append(to, "\n{\"type\":\"Prepend\",\"prepend\":\"\xe2\x96\x81\"},");
        good = good && append(to,
                              "\n{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}]},\n"
                              "\"pre_tokenizer\":null");
    }
    good = good && append(to, ",\n\"post_processor\":") && write_begin_of_text(tables, begin, to) && append(to, ",\n\"decoder\":");
    if (collapses) good = good && append(to, metaspace);
    else
        good = good &&
               append(to,
                      "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"\xe2\x96\x81\"},\"content\":\" "
                      "\"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}") &&
               (!tables.add_dummy_prefix || append(to, ",{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}")) &&
               append(to, "]}");
    good = good && append(to, ",\n\"model\":{\"type\":\"Unigram\",\"unk_id\":") && append_json(to, int64_t(tables.unknown)) &&
           append(to, ",\"byte_fallback\":") && append(to, tables.byte_fallback ? "true" : "false") && append(to, ",\n\"vocab\":[");
    Array<char> piece(*to.runtime);
    for (size_t i = 0; i < tables.tokens.count && good; ++i) {
        const Text bytes = tables.bytes(static_cast<int32_t>(i));
        piece.count = 0;
        if (tables.piece_kinds[i] == piece_byte) {
            static const char digits[] = "0123456789ABCDEF";
            const unsigned byte = static_cast<unsigned char>(bytes[0]);
            const char symbol[] = {'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
            good = piece.append(symbol, 6);
        } else
            for (const char c : bytes) good = good && (c == ' ' && !tables.tokens[i].special ? append(piece, blank_symbol) : piece.push(c));
        good = good && append(to, i ? ",\n[" : "\n[") && append_json(to, view(piece)) && to.push(',') &&
               append_number(to, tables.scores[i]) && to.push(']');
    }
    return good && append(to, "]}}\n");
}

template <class T>
bool copy_array(Array<T>& to, const Array<T>& from) {
    return to.append(from.items, from.count);
}

}  // namespace

// ---- the public Tokenizer --------------------------------------------------------------------------------------------------

Status parse_tokenizer(Text text, TokenizerConfig& config) {
    if (equal(text, "byte")) return config.kind = TokenizerKind::bytes, config.vocab = 256, Status();
    if (equal(text, "char")) return config.kind = TokenizerKind::characters, Status();
    static const struct {
        const char* name;
        TokenizerKind kind;
    } learnt[] = {{"bpe:", TokenizerKind::bpe}, {"wordpiece:", TokenizerKind::wordpiece}, {"unigram:", TokenizerKind::sentencepiece}};
    for (const auto& way : learnt) {
        if (!starts_with(text, way.name)) continue;
        Text number(text.data + Text(way.name).size, text.size - Text(way.name).size);
        const bool cased = way.kind == TokenizerKind::wordpiece && ends_with(number, ":cased");
        const bool fallback = way.kind == TokenizerKind::sentencepiece && ends_with(number, ":bytes");
        if (cased || fallback) number.size -= 6;
        int64_t vocab = 0;
        bool good = number.size > 0;
        for (const char c : number) {
            good = good && c >= '0' && c <= '9';
            vocab = least(vocab * 10 + (c - '0'), int64_t(INT32_MAX));
        }
        if (!good) break;
        if (vocab < 257 && way.kind == TokenizerKind::bpe)
            return fail(Error::invalid_argument, "'", text, "': N must be at least 257, the 256 bytes and the end-of-text token");
        config.kind = way.kind, config.vocab = static_cast<int>(vocab), config.cased = cased, config.byte_fallback = fallback;
        return Status();
    }
    return fail(Error::invalid_argument, "'", text,
                "' is no tokenizer: say byte, char, bpe:N, wordpiece:N, wordpiece:N:cased, unigram:N or unigram:N:bytes");
}

Tokenizer::Tokenizer(Tokenizer&& from) noexcept
    : kind(from.kind),
      vocab(from.vocab),
      end_of_text(from.end_of_text),
      begin_of_text(from.begin_of_text),
      unknown(from.unknown),
      tables(from.tables),
      runtime(from.runtime) {
    from.kind = TokenizerKind::none;
    from.vocab = 0;
    from.end_of_text = from.begin_of_text = from.unknown = -1;
    from.tables = nullptr;
}
Tokenizer& Tokenizer::operator=(Tokenizer&& from) noexcept {
    if (this == &from) return *this;
    this->~Tokenizer();
    return *new (this) Tokenizer(static_cast<Tokenizer&&>(from));
}
Tokenizer::~Tokenizer() {
    if (tables) destroy(*runtime, tables);
}

Status Tokenizer::create_bytes(Runtime& from) {
    return make_tokenizer(*this, from, TokenizerKind::bytes, [](Tables& to) {
        for (int byte = 0; byte < 256; ++byte) {
            const char c = static_cast<char>(byte);
            if (!to.add(Text(&c, 1))) return out_of_memory(256);
        }
        return Status();
    });
}

Status Tokenizer::train(Runtime& from, const TokenizerConfig& config, Corpus& corpus) {
    return train_tokenizer(*this, from, config, TrainingText{&corpus, Text()});
}
Status Tokenizer::train(Runtime& from, const TokenizerConfig& config, Text text) {
    return train_tokenizer(*this, from, config, TrainingText{nullptr, text});
}

Status Tokenizer::load(Runtime& from, Text path) {
    if (equal(path, "byte")) return create_bytes(from);
    const Status status = read_tokenizer_file(*this, from, path);
    if (status.ok() || status.error != Error::cannot_open || path.size == 0) return status;
    static const char* const endings[] = {".json", ".tiktoken", ".bpe", ".txt", ".model", ".bin", "cased", ".gguf"};
    for (const char* ending : endings)
        if (ends_with(path, ending)) return status;
    // Perhaps a folder; its files cannot be listed, so we try the usual names.
    static const char* const names[] = {"/tokenizer.json", "/encoder.json",    "/vocab.json", "/r50k_base.tiktoken",
                                        "/gpt2.tiktoken",  "/tokenizer.model", "/vocab.txt"};
    Status refused;  // a tokenizer.json that says what we do not know, as Llama's does: tokenizer.model then says it, too
    for (const char* name : names) {
        const bool is_model = ends_with(name, ".model");
        const Path inside(path, name);
        if (!inside.fits) return status;
        File file(from);
        if ((!refused.ok() && !is_model) || !file.open(Text(inside.text), FileMode::read).ok()) continue;
        Tokenizer read;
        const Status done = read_tokenizer_file(read, from, Text(inside.text));
        if (done.error == Error::unsupported && !is_model) {
            refused = done;
            continue;
        }
        BABYGPT_TRY(done);
        if (is_model) BABYGPT_TRY(read_begin_of_text(read, from, path));
        *this = static_cast<Tokenizer&&>(read);
        return Status();
    }
    if (!refused.ok()) return refused;
    return fail(Error::cannot_open, "'", path,
                "' is neither a tokenizer file nor a folder with tokenizer.json, encoder.json, vocab.json, r50k_base.tiktoken, "
                "tokenizer.model or vocab.txt");
}
Status Tokenizer::load_memory(Runtime& from, Text json) { return read_tokenizer_json(*this, from, json, "tokenizer.json"); }

Status Tokenizer::save_memory(Array<char>& json) const {
    if (!tables) return fail(Error::invalid_argument, "an empty tokenizer cannot be saved");
    if (!json.runtime) json.runtime = runtime;
    json.count = 0;
    bool good = false;
    if (kind == TokenizerKind::bytes) good = append(json, "{\"babygpt\":{\"kind\":\"bytes\"}}\n");
    if (kind == TokenizerKind::bpe) good = write_bpe_json(*tables, begin_of_text, json);
    if (kind == TokenizerKind::wordpiece) good = write_wordpiece_json(*tables, json);
    if (kind == TokenizerKind::sentencepiece)
        good = append(json, "{\"babygpt\":{\"kind\":\"sentencepiece\",\"model\":\"") && append_base64(json, view(tables->proto)) &&
               append(json, "\"") &&
               (begin_of_text < 0 || (append(json, ",\"begin_of_text\":") && append_json(json, int64_t(begin_of_text)))) &&
               append(json, "}}\n");
    if (kind == TokenizerKind::characters) {
        const Text characters(tables->text.items, tables->text.count - tables->bytes(unknown).size);
        good =
            append(json, "{\"babygpt\":{\"kind\":\"characters\",\"characters\":") && append_json(json, characters) && append(json, "}}\n");
    }
    return good ? Status() : out_of_memory(json.count);
}
Status Tokenizer::save(Text path) const {
    Array<char> json;
    if (kind == TokenizerKind::sentencepiece && ends_with(path, ".model")) {
        json.runtime = runtime;
        if (!append(json, view(tables->proto))) return out_of_memory(tables->proto.count);
    } else if (kind == TokenizerKind::sentencepiece && fits_unigram_json(*tables)) {
        json.runtime = runtime;
        if (!write_unigram_json(*tables, begin_of_text, json)) return out_of_memory(json.count);
    } else BABYGPT_TRY(save_memory(json));
    return write_atomically(*runtime, path, [&](File& file) { return file.write(json.items, static_cast<int64_t>(json.count)); });
}

Status Tokenizer::copy(Runtime& to, const Tokenizer& from) {
    if (!from.tables) return fail(Error::invalid_argument, "an empty tokenizer cannot be copied");
    Tokenizer made;
    made.tables = create<Tables>(to, to);
    if (!made.tables) return out_of_memory(sizeof(Tables));
    made.runtime = &to;
    Tables& t = *made.tables;
    const Tables& f = *from.tables;
    const bool good = copy_array(t.text, f.text) && copy_array(t.tokens, f.tokens) && copy_array(t.specials, f.specials) &&
                      copy_array(t.codes, f.codes) && copy_array(t.merges, f.merges) && copy_array(t.pairs.slots, f.pairs.slots) &&
                      copy_array(t.words.slots, f.words.slots) && copy_array(t.classes, f.classes) && copy_array(t.accents, f.accents) &&
                      copy_array(t.small_letters, f.small_letters) && copy_array(t.proto, f.proto) &&
                      copy_array(t.piece_kinds, f.piece_kinds) && copy_array(t.scores, f.scores) &&
                      copy_array(t.pieces.slots, f.pieces.slots) && copy_array(t.user_pieces, f.user_pieces);
    if (!good) return out_of_memory(f.text.count);
    t.pairs.count = f.pairs.count, t.words.count = f.words.count, t.pieces.nodes = f.pieces.nodes;
    t.longest = f.longest, t.whole_words_first = f.whole_words_first;
    t.kind = f.kind, t.lower_case = f.lower_case, t.strip_accents = f.strip_accents, t.unknown = f.unknown;
    t.unigram = f.unigram, t.byte_fallback = f.byte_fallback, t.add_dummy_prefix = f.add_dummy_prefix;
    t.remove_extra_whitespaces = f.remove_extra_whitespaces, t.escape_whitespaces = f.escape_whitespaces;
    t.treat_whitespace_as_suffix = f.treat_whitespace_as_suffix, t.unknown_score = f.unknown_score;
    t.charsmap = f.charsmap, t.charsmap_size = f.charsmap_size, t.unknown_surface = f.unknown_surface;
    memcpy(t.byte_ids, f.byte_ids, sizeof t.byte_ids);
    memcpy(t.ascii, f.ascii, sizeof t.ascii);
    memcpy(t.ascii_stays, f.ascii_stays, sizeof t.ascii_stays);
    made.kind = from.kind, made.vocab = from.vocab, made.end_of_text = from.end_of_text, made.unknown = from.unknown;
    made.begin_of_text = from.begin_of_text;
    *this = static_cast<Tokenizer&&>(made);
    return Status();
}

BABYGPT_UNHURRIED_END

Status Tokenizer::encode(Text text, Array<int32_t>& ids, bool special, size_t* unknown_count) const {
    if (unknown_count) *unknown_count = 0;
    if (!tables) return fail(Error::invalid_argument, "the tokenizer is empty: create, train or load it first");
    if (!ids.runtime) ids.runtime = runtime;
    const size_t before = ids.count;
    if (kind == TokenizerKind::bytes) {
        if (!ids.resize(before + text.size)) return out_of_memory((before + text.size) * sizeof(int32_t));
        for (size_t i = 0; i < text.size; ++i) ids.items[before + i] = static_cast<unsigned char>(text[i]);
        return Status();
    }
    if (kind == TokenizerKind::characters) {
        for (size_t i = 0, length; i < text.size; i += length) {
            const uint32_t code = decode_utf8(text.data + i, text.end(), length);
            const int32_t id = code_rank(tables->codes, code);
            const bool known = static_cast<size_t>(id) < tables->codes.count && tables->codes.items[id] == code;
            if (!known && unknown_count) ++*unknown_count;
            if (!ids.push(known ? id : unknown)) return ids.count = before, out_of_memory((before + text.size) * sizeof(int32_t));
        }
        return Status();
    }
    Encoding encoder(*tables, ids, *runtime);
    WordPieceEncoder words(*tables, ids, *runtime);
    PieceEncoder pieces(*tables, ids, *runtime);
    bool starts[256] = {};  // of the names of special tokens
    if (special)
        for (const int32_t id : tables->specials) starts[static_cast<unsigned char>(tables->bytes(id)[0])] = true;
    bool good = true;
    for (size_t at = 0, from = 0; at <= text.size && good; ++at) {
        if (at < text.size && !special) at = text.size;
        int32_t id = -1;
        if (at < text.size) {
            if (!starts[static_cast<unsigned char>(text[at])]) continue;
            id = longest_at(*tables, tables->specials, Text(text.data + at, text.size - at));
            if (id < 0) continue;
        }
        const Text part(text.data + from, at - from);
        good = (kind == TokenizerKind::bpe         ? encoder.encode(part)
                : kind == TokenizerKind::wordpiece ? words.encode(part)
                                                   : pieces.encode(part)) &&
               (id < 0 || ids.push(id));
        if (id >= 0) from = at + tables->bytes(id).size, at = from - 1;
    }
    if (unknown_count) *unknown_count = words.unknown + pieces.unknown;
    if (good) return Status();
    ids.count = before;
    return out_of_memory((before + text.size) * sizeof(int32_t));
}

Text Tokenizer::bytes(int32_t id) const {
    if (!tables || id < 0 || id >= vocab) return Text();
    const Text token = tables->bytes(id);
    if (kind == TokenizerKind::wordpiece && token.size) {
        if (tables->tokens[static_cast<size_t>(id)].special) return Text(token.data - 1, token.size + 1);  // a blank stands before it
        if (token.size == 2 && token[0] == ' ' && memchr(".,!?", token[1], 4)) return Text(token.data + 1, 1);
    }
    if (kind == TokenizerKind::sentencepiece && id == unknown)
        return Text(tables->text.items + tables->unknown_surface, tables->text.count - tables->unknown_surface);
    return token;
}

Status Tokenizer::decode(Span<const int32_t> ids, Array<char>& text) const {
    if (!tables) return fail(Error::invalid_argument, "the tokenizer is empty: create, train or load it first");
    if (!text.runtime) text.runtime = runtime;
    const size_t before = text.count;
    bool starts_text = true, begins = kind == TokenizerKind::wordpiece || (kind == TokenizerKind::sentencepiece &&
                                                                           (tables->add_dummy_prefix || tables->remove_extra_whitespaces));
    for (const int32_t id : ids) {
        Text token = bytes(id);
        if (token.size == 0)
            return text.count = before, fail(Error::invalid_argument, "there is no token ", id, " in a vocabulary of ", vocab);
        if (kind == TokenizerKind::sentencepiece && tables->piece_kinds[static_cast<size_t>(id)] == piece_control) continue;
        // The blank before the first word goes; before an unknown piece it is its own, and stays.
        const bool drop =
            begins && token[0] == ' ' &&
            !(kind == TokenizerKind::sentencepiece && (id == unknown || tables->piece_kinds[static_cast<size_t>(id)] == piece_byte));
        if (drop) token = Text(token.data + 1, token.size - 1);
        begins = begins && drop && kind == TokenizerKind::sentencepiece && tables->remove_extra_whitespaces && token.size == 0;
        // A word's end with no beginning shows its mark.
        const bool end_first = starts_text && kind == TokenizerKind::wordpiece && !tables->tokens[static_cast<size_t>(id)].special &&
                               tables->bytes(id)[0] != ' ';
        starts_text = false;
        if ((end_first && !append(text, "##")) || !append(text, token)) return text.count = before, out_of_memory(before + token.size);
    }
    return Status();
}

// ---- whole characters from a stream of bytes -------------------------------------------------------------------------------

size_t Utf8Stream::push(Text piece, char* out) {
    size_t written = 0;
    char* const held = reinterpret_cast<char*>(pending);
    for (const char c : piece) {
        held[count++] = c;
        while (count > 0) {
            size_t length;
            const uint32_t code = decode_utf8(held, held + count, length);
            // The start of a character that may still be completed is kept.
            const unsigned char lead = pending[0];
            const int wanted = lead < 0xc2 || lead > 0xf4 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
            if (code == not_utf8 && static_cast<int>(length) == count && count < wanted) break;
            memcpy(out + written, held, length);
            written += length;
            count -= static_cast<int>(length);
            memmove(held, held + length, static_cast<size_t>(count));
        }
    }
    return written;
}
size_t Utf8Stream::finish(char* out) {
    const size_t left = static_cast<size_t>(count);
    memcpy(out, pending, left);
    count = 0;
    return left;
}

}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 4] Tensors, ops and the tape
// =====================================================================================================================
// A model's forward pass is recorded once, as a flat list of ops. Running the list is the forward pass; running it backwards,
// each op's own backward, is backpropagation (reverse-mode automatic differentiation with the derivative rules written by hand).
// A tensor is a place in a region: a matrix of rows (one a token) by columns. Rows are a number of the run; columns are fixed.
// While recording, the architecture also names its weights, so one function a model (chapter 6) says everything about it.
// Then the planner gives every tensor an offset in one block of memory: two tensors share a place when they are never needed at the same time.

#endif  // BABYGPT_IMPLEMENTING

// ---- the records of a tape: plain, since babygpt_cuda.cu, a translation unit of its own, sees them, too ----------------------------

#if (defined(BABYGPT_IMPLEMENTING) || defined(BABYGPT_DEVICE)) && !defined(BABYGPT_RECORDS)
#define BABYGPT_RECORDS

namespace babygpt {
namespace records {

enum class OpKind : int32_t { embedding, input, waves, norm, linear, gate, rope, attention, add, dropout, pool, head };

inline const char* op_name(OpKind kind) {
    static constexpr const char* names[] = {"embedding", "input",     "waves", "norm",    "linear", "gate",
                                            "rope",      "attention", "add",   "dropout", "pool",   "head"};
    return names[static_cast<int>(kind)];
}

// What a row stands for: a token of the text; a token of the source, which an encoder reads for the text's decoder; a whole sequence.
enum class Side : int32_t { text, source, whole };

// What a token's attention sees: itself and what stands before it; all of its sequence; all of the source's sequence.
enum class Sight : int32_t { causal, full, source };

constexpr int nothing = -1;  // no tensor, no weight

// Activations: rows x cols in the activations region; the gradient, where there is one, is as large and lies at `gradient`.
struct Tensor {
    char name[48];
    int cols;
    Side side;
    bool fixed;                        // comes from outside: there is no gradient
    int64_t offset;                    // in elements
    int64_t gradient;                  // in elements; -1: none
    int shares;                        // the tensor whose gradient is this one's, too; nothing: it has its own
    int born, dies;                    // the planner's times of the values ...
    int again;                         // ... when they are made once more, for a backward pass; -1: never
    int gradient_born, gradient_dies;  // ... and of the gradient
};

struct Op {
    OpKind kind;
    Side side;                      // of y
    int layer;                      // which block of the model; -1 outside
    int x = nothing, x2 = nothing;  // tensors it reads (x2: the other summand; attention to the source: its keys and values)
    int y = nothing;                // the tensor it writes
    int aux = nothing;              // what its forward leaves for its backward, see chapter 5
    int w = nothing, b = nothing;   // weights: indices into Tape::weights
    int remakes = nothing;          // the op that makes x once more before this one's backward pass: cheaper than to keep x until then
    int in = 0, out = 0;            // columns of x and of y
    int heads = 0, kv_heads = 0;    // attention, rope
    Sight sight = Sight::causal;    // attention
    int lookup = nothing;           // embedding: which of the blocks of Regions::lookup_gradients its own go to; nothing: to the gradients
    bool centred = false;           // norm: takes the mean off
    bool first = false;             // pool: takes the first row, not the mean
    Activation activation = Activation::none;
    bool adds_to_dx = false;  // some later op has already written a gradient of x (x2): add to it, do not set it
    bool adds_to_dx2 = false;
    int lora = nothing, loras = 0;  // linear: the first of those beside it in Tape::loras, and how many they are
    int low = nothing;              // of these, in training: [rank * loras], x A^T times the scale
    int sum = nothing;              // linear, add: each other, where a device's product also makes the sum whose second summand is its y
    int bias_sum = nothing;  // linear, and norm or attention: each other, where the latter's backward pass there sums up b's gradient
    int dim() const { return in / (sight == Sight::source ? heads : heads + 2 * kv_heads); }  // attention, rope: columns of a head
};

// A weight as an architecture declares it: the public record, and how it starts. Several tensors may make one weight, one below the other:
// then the record is that of the whole, and Tape::names has one for each.
struct WeightPlan {
    Weight weight;
    double deviation;  // of the normal distribution; 0: zeros; -1: ones
    int matrices;      // in it that Muon keeps apart; 0: it leaves this weight to AdamW
    int outputs[3];    // of each of these: so many columns, or rows where ...
    bool output_rows;  // ... the layout is Tape::output_rows
};

// LoRA beside a linear op, or beside one of the parts that it computes at once: y gets (x A^T) B^T times a scale.
struct Lora {
    int a, b;            // [rank][in], [outputs][rank]: indices into Tape::adapter
    int first, outputs;  // columns of y
};

// One of the tensors that make a weight: what it is called, and for how many outputs it stands.
struct Slice {
    const char* name;
    int outputs;
};

// One sequence of a run: `length` rows from `row` on, which stand at `position` and after in their text.
// What decides a sequence's next token, where nothing else does, so that a device can draw it, too (chapter 8, draw).
struct Draw {
    double below;  // so far below the biggest logit those begin that are left out; negative
    double top_p, min_p, uniform;
    float inverse;  // of the temperature; 0: the biggest
    int32_t top_k;
    int32_t unknown, limit;  // this id, and all from `limit` on, never come
    int32_t id = -1;         // what was drawn; -1: nothing
};
struct Sequence {
    int row, length, position;
    float* const* pages;      // running with a KV cache: where its pages lie; null: training, positions are those of this run
    float* logits = nullptr;  // of the head: [vocab] of row `wanted`; null: not wanted
    int wanted = -1;          // of the sequence's rows; negative: counted from its end
    int source = 0;           // the sequence of the source that it sees
    Draw* draw = nullptr;     // a device draws from the logits; null: it does not
};

// What goes in on one side.
struct Stream {
    int rows = 0;
    Span<const Sequence> sequences;
    const int32_t* ids = nullptr;  // [rows]
};

// What changes from run to run, read when the tape runs.
struct Run {
    int rows = 0;
    Span<const Sequence> sequences;
    const int32_t* ids = nullptr;        // [rows]
    const float* features = nullptr;     // [rows][Config::features]
    Stream source;                       // sequences without rows: they were read in a run before
    const int32_t* targets = nullptr;    // of the head's rows, -1: counts for nothing; null: no loss is wanted
    const float* row_weights = nullptr;  // of the head's rows: how many times their gradients count; null: once
    const int32_t* starts = nullptr;     // where the sequences begin in the text that a device keeps: then ids and targets are that text's
    bool training = false;               // dropout is on and gradients follow
    double dropout = 0;
    double label_smoothing = 0;
    uint64_t seed = 0, step = 0;
    uint64_t first_row[3] = {};  // of this run in the whole batch of the step, of each side, for the random numbers
    double* seconds = nullptr;   // [2 * ops], grows by what each op takes forward, then by what each takes backward; null: nobody asks
    Stream on(Side side) const {
        if (side == Side::source) return source;
        return Stream{side == Side::whole ? static_cast<int>(sequences.size) : rows, sequences, ids};
    }
    // The head's row of which sequence i wants the logits.
    int64_t wanted_row(Side side, size_t i) const {
        const Sequence& s = sequences[i];
        return side == Side::whole ? static_cast<int64_t>(i) : s.row + s.wanted + (s.wanted < 0 ? s.length : 0);
    }
};

// What the update does to each element; the numbers are prepared once a step (chapter 7). The formulas are in chapter 5.
struct AdamW {
    float gradient_scale;  // 1 / tokens, times the clipping factor
    float beta1, beta2, one_minus_beta1, one_minus_beta2;
    float step_size;   // lr / (1 - beta1^t)
    float root_scale;  // 1 / sqrt(1 - beta2^t)
    float epsilon;
    float decay;  // lr * weight_decay, for matrices
};
struct Muon {
    float gradient_scale;  // as AdamW's
    float momentum, one_minus_momentum;
    float step_size;
    float keep;  // 1 - step_size * weight_decay
};
struct UpdateRule {
    AdamW adam;
    bool uses_muon;
    Muon muon;
};

// ---- a device: a backend whose memory is elsewhere ----

// What it has to know of a tape. What the spans show stays where it is as long as the device lives.
struct DevicePlan {
    Span<const Tensor> tensors;
    Span<const Op> ops;
    Span<const WeightPlan> weights, adapter;
    Span<const Lora> loras;
    Span<const float> waves;
    int64_t weight_block, adapter_block, activation_block;  // elements
    int max_rows[3], sequences;                             // of each side; of text, at most
    int width, vocab, context, features, head_out, rank;
    double epsilon, lora_scale;
    bool output_rows, frozen, training, muon;  // muon: what it keeps apart learns by it
    Precision precision;
    int64_t text;  // ids of a running text that it keeps, at most
};
// One update of the weights: the rule with gradients divided by `count` (0: by the number of targets that count, which the device knows where
// its text was read), not clipped yet, and where clipping begins (0: never).
struct DeviceUpdate {
    UpdateRule rule;
    double count, clip;
};
// What came of an update. Sums are of the runs that it was made from.
struct DeviceResult {
    double loss, targets, grad_norm;  // targets: how many count, whatever their weights
    double seconds;                   // from the end of the update before; 0: unknown
    bool skipped;                     // the loss or the norm was not finite, and the weights are as before
};
enum class DevicePart : int32_t { weights, adapter, gradients, moment1, moment2, loss_scale };  // loss_scale: Trainer's

struct Device;     // all that a trainer keeps there
struct Generator;  // all that a model's sessions share there: weights, and space for one run at a time

struct DeviceFunctions {
    const size_t* sizes;  // device_sizes, so that files of different versions do not misunderstand each other
    Status (*create)(const DevicePlan& plan, Device*& device);  // takes all of its memory
    void (*destroy)(Device* device);
    uint64_t (*bytes)(const DevicePlan& plan);                             // of the device's memory
    Status (*upload)(Device* device, DevicePart part, const float* from);  // null: zeros
    Status (*download)(Device* device, DevicePart part, float* to);
    // A forward pass, where run.training is set a backward pass, and then, where `update` is not null, an update. It returns as soon as that
    // is under way; the run's arrays have been read by then.
    Status (*run)(Device* device, const Run& run, const DeviceUpdate* update);
    // Waits: of the update that `later` updates have followed since, fewer than steps_ahead.
    Status (*result)(Device* device, int later, DeviceResult& result);
    Status (*losses)(Device* device, int rows, double* losses, int32_t* ranks);  // waits: those of the last run, as in Regions
    // Ids from place `at` of the text on, as Data keeps them: `only_read` is set where one is no target.
    Status (*keep_text)(Device* device, int64_t at, const int32_t* ids, int64_t count);
    Status (*ceilings)(Precision precision, double& flops, double& bytes);  // gpu_ceilings
    // Sessions, of decoders. A generator copies what it needs of the plan. One call at a time.
    Status (*create_generator)(const DevicePlan& plan, Generator*& generator);
    void (*destroy_generator)(Generator* generator);
    uint64_t (*generator_bytes)(const DevicePlan& plan);
    Status (*set_weights)(Generator* generator, const float* weights);
    Status (*take_pages)(Generator* generator, uint64_t bytes, void*& pages);  // of a KV cache, in the device's memory, zeros
    void (*drop_pages)(Generator* generator, void* pages);
    Status (*copy_pages)(Generator* generator, void* to, const void* from, uint64_t bytes);
    // A forward pass of at most `device_rows` rows; the sequences' pages are the device's. losses: of all rows, where not null. Where a sequence
    // has a Draw, a token is drawn from its logits. Waits.
    Status (*read)(Generator* generator, const Run& run, double* losses);
};
constexpr int device_rows = 256;
constexpr int device_norm_columns = 1024;  // of a row of which a norm's backward pass makes sums at once, where four divide it: at most
constexpr int drawn_vocab = 256;           // logits that a device draws from, at most
constexpr size_t device_sizes[8] = {sizeof(DeviceFunctions), sizeof(Tensor),     sizeof(Op),          sizeof(WeightPlan), sizeof(Run),
                                    sizeof(Sequence),        sizeof(DevicePlan), sizeof(DeviceUpdate)};

// KV cache: pages of `kv_page` positions, each for all layers. In a page, layer after layer: the keys as [head][dim][position]
// (so that a vector holds one dimension of neighbouring positions), then the values as [head][position][dim]. Floats; on a device that
// multiplies bf16 these.
constexpr int kv_page = 32;

}  // namespace records
}  // namespace babygpt

// In babygpt_cuda.cu, where that file is part of the program; else null.
#if defined(_MSC_VER)
extern "C" const babygpt::records::DeviceFunctions* babygpt_cuda_device();
#if defined(BABYGPT_IMPLEMENTING)
extern "C" const babygpt::records::DeviceFunctions* babygpt_no_device() { return nullptr; }
#if defined(_M_IX86)
#pragma comment(linker, "/alternatename:_babygpt_cuda_device=_babygpt_no_device")
#else
#pragma comment(linker, "/alternatename:babygpt_cuda_device=babygpt_no_device")
#endif
#endif
#elif defined(__ELF__)
extern "C" __attribute__((weak)) const babygpt::records::DeviceFunctions* babygpt_cuda_device();
#endif

#endif  // BABYGPT_RECORDS
#ifdef BABYGPT_IMPLEMENTING

BABYGPT_UNHURRIED_BEGIN

namespace babygpt {
namespace {

using namespace records;

// The regions, bound when the tape runs. T is float, or double for the oracle.
template <class T>
struct Regions {
    const T* weights = nullptr;
    const T* adapter = nullptr;     // its weights
    T* low = nullptr;               // running with an adapter: Op::low, of each op in turn
    T* gradients = nullptr;         // laid out as the weights, or as the adapter's where the tape is frozen: sums over tokens, added to
    T* lookup_gradients = nullptr;  // of a token embedding that others share: each embedding's part, apart, so that it is one chain
    T* activations = nullptr;
    T* scratch = nullptr;           // as the backend asked for
    int threads = 0;                // that `scratch` has room for; 0: as many as the runtime has
    double* losses = nullptr;       // [rows], nats, each counted once; written where there are targets
    int32_t* ranks = nullptr;       // [rows], how many tokens were thought likelier than the target; may be null
    const float* packed = nullptr;  // the fast backend's copies of the weights, when running
};

struct Tape {
    Runtime* runtime = nullptr;
    Array<Tensor> tensors;
    Array<Op> ops;
    Array<WeightPlan> weights;
    Array<Weight> names;       // of the tensors in them, in this order
    Array<float> waves;        // of each position: rope: [context][2][dim / 2], cosines and sines; waves: [context][width]
    int64_t weight_block = 0;  // elements of the weights region
    int64_t parameters = 0;
    int max_rows[3] = {};          // of each side
    int64_t activation_block = 0;  // elements of the activations region
    Side side = Side::text;        // recording: of what is embedded next
    int layer = -1;                // recording: the block we are in
    const char* block = "h.";      // recording: what stands before a layer's number in names
    int layers = 0, width = 0, vocab = 0, context = 0;
    int kv_width = 0;          // columns of the keys, and of the values
    int lookups = 0;           // blocks of lookup gradients
    int head_out = 0;          // columns of the logits
    bool output_rows = false;  // the matrices of linear ops have a row for each output, not a column
    Dtype dtype = Dtype::f32;  // running: what the matrices' numbers are
    bool tied = false;
    Array<WeightPlan> adapter;  // LoRA's matrices, in a block of their own
    Array<Lora> loras;
    int64_t adapter_block = 0, adapter_parameters = 0;
    int rank = 0, low_columns = 0;  // of Op::low, at most
    double lora_scale = 0;
    bool frozen = false;                     // training: the adapter's weights are learnt, and no others
    bool training = false;                   // plan gradients, and keep what backward reads
    bool on_device = false, halves = false;  // a device runs it; there the activations' numbers have 16 bits
    bool makes_sums = false;                 // its products can add a sum's other summand
    bool rounds = false;                     // a processor runs it, in Precision::bf16
    double dropout = 0;
    double epsilon = 1e-5;  // of the norms
    double rope_base = 10000;
    bool no_memory = false;

    explicit Tape(Runtime& from)
        : runtime(&from), tensors(from), ops(from), weights(from), names(from), waves(from), adapter(from), loras(from) {}

    // ---- recording: each call appends one op and returns the tensor that it writes ----

    // position_name null: the embedding says nothing about positions. Two embeddings of one name share the tokens' vectors.
    int embedding(const char* token_name, const char* position_name) {
        Op op = start(OpKind::embedding, nothing);
        for (size_t i = 0; i < weights.count; ++i)
            if (equal(Text(weights[i].weight.name), Text(token_name))) op.w = static_cast<int>(i);
        if (tied || op.w != nothing) op.lookup = lookups++;
        if (op.w == nothing) op.w = declare(token_name, "", vocab, width, 0.02, false);
        if (position_name) op.b = declare(position_name, "", context, width, 0.02, false);
        return finish(op, "embedding", width);
    }
    // Numbers from outside, `cols` for each row.
    int input(const char* name, int cols) {
        Op op = start(OpKind::input, nothing);
        const int y = finish(op, name, cols);
        if (!no_memory) tensors[static_cast<size_t>(y)].fixed = true;
        return y;
    }
    // Adds sines and cosines of the position to x, which grows by sqrt(width). In place: x itself is the result.
    int add_waves(int x) { return in_place(start(OpKind::waves, x)); }
    BABYGPT_CALL int norm(const char* name, int x, bool bias, Norm kind = Norm::layer) {
        Op op = start(OpKind::norm, x);
        op.centred = kind == Norm::layer;
        op.w = declare(name, ".weight", 1, op.in, -1, true);
        if (bias) op.b = declare(name, ".bias", 1, op.in, 0, true);
        op.aux = tensor(name, ".statistics", floats(2), op.side);
        return finish(op, name, op.in);
    }
    BABYGPT_CALL int linear(const char* name, int x, int out, bool bias, Activation activation, double deviation) {
        const Slice whole{name, out};
        return linear(name, x, Span<const Slice>(&whole, 1), bias, activation, deviation);
    }
    // Several parts (of which output_rows must be set) are computed as one product, beside each other.
    BABYGPT_CALL int linear(const char* name, int x, Span<const Slice> parts, bool bias, Activation activation, double deviation) {
        Op op = start(OpKind::linear, x);
        int out = 0;
        for (const Slice& part : parts) out += part.outputs;
        op.w =
            output_rows ? declare(parts, ".weight", out, op.in, deviation, false) : declare(parts, ".weight", op.in, out, deviation, false);
        if (!no_memory) {
            weights[static_cast<size_t>(op.w)].weight.scaled_rows = names[names.count - 1].scaled_rows = output_rows;
            for (size_t i = 0; i < parts.size; ++i) keep_apart(op.w, i, parts[i].outputs);
        }
        if (bias) op.b = declare(parts, ".bias", 1, out, 0, true);
        op.activation = activation;
        if (training && activation != Activation::none) op.aux = tensor(name, ".before", out, op.side);
        return finish(op, name, out);
    }
    // y = activation(the left half of x) * the right half
    int gate(const char* name, int x, Activation activation) {
        Op op = start(OpKind::gate, x);
        op.activation = activation;
        keep_apart(x, {op.in / 2, op.in / 2, 0});
        return finish(op, name, op.in / 2);
    }
    // Turns the queries and keys in x by angles that grow with the position. In place: x itself is the result.
    int rope(int x, int heads, int kv_heads = 0) {
        Op op = start(OpKind::rope, x);
        op.heads = heads, op.kv_heads = kv_heads ? kv_heads : heads;
        return in_place(op);
    }
    // x holds queries (for all heads), keys and values (for kv_heads; 0: as many) beside each other.
    int attention(const char* name, int x, int heads, int kv_heads = 0, Sight sight = Sight::causal) {
        Op op = start(OpKind::attention, x);
        op.heads = heads, op.kv_heads = kv_heads ? kv_heads : heads, op.sight = sight;
        kv_width = op.dim() * op.kv_heads;
        keep_apart(x, {op.in - 2 * kv_width, kv_width, kv_width});
        return finish_attention(op, name, op.in - 2 * kv_width);
    }
    // To the source: x holds queries, keys_values the source's keys and values.
    int attention_to_source(const char* name, int x, int keys_values, int heads, int kv_heads) {
        Op op = start(OpKind::attention, x);
        op.x2 = keys_values, op.heads = heads, op.kv_heads = kv_heads, op.sight = Sight::source;
        keep_apart(keys_values, {op.dim() * kv_heads, op.dim() * kv_heads, 0});
        return finish_attention(op, name, op.in);
    }
    BABYGPT_CALL int add(const char* name, int a, int b) {
        Op op = start(OpKind::add, a);
        op.x2 = b;
        return finish(op, name, op.in);
    }
    BABYGPT_CALL int drop(const char* name, int x) {
        if (!training || dropout <= 0) return x;
        Op op = start(OpKind::dropout, x);
        return finish(op, name, op.in);
    }
    // A row for each sequence: its first one, or the mean of all.
    int pool(const char* name, int x, bool first) {
        Op op = start(OpKind::pool, x);
        op.side = Side::whole, op.first = first;
        return finish(op, name, op.in);
    }
    // Output head and loss in one: logits = x W^T + b, never all of them in memory. Its tensor y is empty. outputs 0: as many as the vocabulary.
    void head(const char* name, int x, int outputs = 0, bool bias = false) {
        Op op = start(OpKind::head, x);
        op.out = head_out = outputs ? outputs : vocab;
        op.w = tied ? ops.count && ops[0].kind == OpKind::embedding ? ops[0].w : nothing
                    : declare(name, ".weight", op.out, width, 0.02, false);
        if (bias) op.b = declare(name, ".bias", 1, op.out, 0, true);
        op.aux = tensor("head", ".softmax", floats(2), op.side);
        if (!no_memory && !ops.push(op)) no_memory = true;
    }

    // ---- an adapter: LoRA is put beside linear ops that have been recorded ----

    // Without one again.
    void unadapt() {
        for (Op& op : ops) op.lora = op.low = nothing, op.loras = 0;
        adapter.count = loras.count = 0;
        adapter_block = adapter_parameters = 0, low_columns = 0;
    }
    // Beside the matrices of layers whose names end in one of the targets. In training before plan; else at any time, and again.
    BABYGPT_RARE Status adapt(const AdapterConfig& config) {
        const auto stem = [](const Weight& one) { return Text(one.name, Text(one.name).size - Text(".weight").size); };
        unadapt();
        rank = config.rank, lora_scale = config.alpha / config.rank;
        for (size_t i = 0; i < ops.count; ++i) {
            Op& op = ops[i];
            if (op.kind != OpKind::linear || op.layer < 0) continue;
            const Weight& whole = weight(op.w);
            const int64_t end = whole.offset + whole.rows * whole.cols;
            op.lora = static_cast<int>(loras.count);
            for (const Weight& one : names) {
                if (one.offset < whole.offset || one.offset >= end || !is_target(stem(one), config.targets)) continue;
                Lora lora{};
                lora.first = output_rows ? static_cast<int>((one.offset - whole.offset) / one.cols) : 0;
                lora.outputs = static_cast<int>(output_rows ? one.rows : one.cols);
                lora.a = declare_lora(stem(one), ".lora_A.weight", rank, op.in);
                lora.b = declare_lora(stem(one), ".lora_B.weight", lora.outputs, rank);
                if (no_memory || !loras.push(lora)) return no_memory = false, unadapt(), out_of_memory(sizeof lora);
                ++op.loras;
            }
            low_columns = most(low_columns, op.loras * rank);
            if (op.loras == 0 || !training) continue;
            layer = op.layer;
            const int low = tensor("lora", ".low", op.loras * rank, op.side);
            layer = -1;
            op.low = low;
        }
        if (frozen) lookups = 0;
        if (no_memory) return out_of_memory(0);
        return loras.count ? Status() : fail(Error::invalid_argument, "no matrix of the model's layers is called '", config.targets, "'");
    }
    // Does "h.0.attn.c_proj" end in one of "c_attn,c_proj"? Whole words, as PEFT has it.
    static bool is_target(Text name, Text targets) {
        for (size_t at = 0; at < targets.size;) {
            const void* comma = memchr(targets.data + at, ',', targets.size - at);
            const size_t end = comma ? static_cast<size_t>(static_cast<const char*>(comma) - targets.data) : targets.size;
            const Text target(targets.data + at, end - at);
            const size_t before = name.size - least(name.size, target.size);
            if (target.size > 0 && equal(Text(name.data + before, name.size - before), target) && (before == 0 || name[before - 1] == '.'))
                return true;
            at = end + 1;
        }
        return false;
    }
    // What training changes.
    Span<const WeightPlan> learnt() const {
        const Array<WeightPlan>& plans = frozen ? adapter : weights;
        return Span<const WeightPlan>(plans.items, plans.count);
    }
    int64_t learnt_block() const { return frozen ? adapter_block : weight_block; }
    // Regions::low
    int64_t low_block() const {
        const int64_t rows = most(most(max_rows[0], max_rows[1]), max_rows[2]);
        return training ? 0 : round_up(rows * low_columns, static_cast<int64_t>(16));
    }

    // ---- what the ops declare: which values does an op's backward read? ----

    static bool backward_reads_x(const Op& op) {
        return op.kind == OpKind::norm || op.kind == OpKind::linear || op.kind == OpKind::gate || op.kind == OpKind::attention ||
               op.kind == OpKind::head;
    }
    // A frozen matrix needs no x for a gradient of its own.
    bool needs_x(const Op& op) const { return backward_reads_x(op) && (op.kind != OpKind::linear || !frozen || op.loras > 0); }
    // Has the op a backward pass? None where nothing before it is learnt.
    bool runs_backward(const Op& op) const {
        const int t = op.y != nothing ? op.y : op.x;
        return training && !tensors[static_cast<size_t>(t)].fixed;
    }
    static bool backward_reads_x2(const Op& op) { return op.kind == OpKind::attention; }
    static bool backward_reads_y(const Op& op) { return op.kind == OpKind::attention; }

    // ---- planning ----

    // Times: op i runs forward at i and backward at 2n-1-i. A tensor's place is its own from its first write to its last read; but what a
    // norm, a gate or an activation function makes, and only one backward pass reads, is not kept until then, but made once more (but on a
    // device in 16 bits, which has the memory).
    // The head may write its gradient while it runs forward. What the source gives to attention, a running decoder needs again and again.
    // rows: at most, of text; 0: it will not run, only the weights are of interest. source: rows; sequences: at most.
    Status plan(int rows, int source = 0, int sequences = 0) {
        for (const Op& op : ops)
            if (rows > 0 && !no_memory && (op.kind == OpKind::rope || op.kind == OpKind::waves) && waves.count == 0)
                no_memory = !fill_waves(op);
        if (no_memory) return out_of_memory(0);
        max_rows[static_cast<int>(Side::text)] = rows, max_rows[static_cast<int>(Side::source)] = source;
        max_rows[static_cast<int>(Side::whole)] = sequences;
        const int n = static_cast<int>(ops.count);
        for (Tensor& t : tensors)
            t.born = t.gradient_born = INT32_MAX, t.dies = t.gradient_dies = -1, t.gradient = t.again = -1, t.shares = nothing;
        if (frozen) fix();
        for (int i = 0; i < n; ++i) {
            Op& op = ops[static_cast<size_t>(i)];
            const int back = 2 * n - 1 - i;
            op.sum = op.bias_sum = nothing;
            touch(op.x, i), touch(op.x2, i), touch(op.y, i), touch(op.aux, i), touch(op.low, i);
            if (!training && op.sight == Sight::source) touch(op.x2, 0), touch(op.x2, n);
            if (!runs_backward(op)) continue;
            touch(op.aux, back), touch(op.low, back), touch_gradient(op.low, back);
            op.remakes = needs_x(op) && op.kind == OpKind::linear && !halves ? cheap_maker(op.x) : nothing;
            if (op.remakes != nothing) {
                const Op& maker = ops[static_cast<size_t>(op.remakes)];
                tensors[static_cast<size_t>(op.x)].again = back;
                touch(maker.kind == OpKind::linear ? nothing : maker.x, back), touch(maker.aux, back);
            } else if (needs_x(op)) touch(op.x, back);
            if (backward_reads_x2(op)) touch(op.x2, back);
            if (backward_reads_y(op)) touch(op.y, back);
            const int writes = op.kind == OpKind::head ? i : back;
            touch_gradient(op.x, writes), touch_gradient(op.x2, writes), touch_gradient(op.y, writes);
        }
        if (training) {  // backwards, the first op to reach a tensor sets its gradient, later ones add to it
            Array<char> seen(*runtime);
            if (!seen.resize(tensors.count)) return out_of_memory(tensors.count);
            for (int i = n - 1; i >= 0; --i) {
                Op& op = ops[static_cast<size_t>(i)];
                if (!runs_backward(op)) continue;
                if (op.x != nothing) op.adds_to_dx = seen[static_cast<size_t>(op.x)] != 0, seen[static_cast<size_t>(op.x)] = 1;
                if (op.x2 != nothing) op.adds_to_dx2 = seen[static_cast<size_t>(op.x2)] != 0, seen[static_cast<size_t>(op.x2)] = 1;
            }
        }
        if (on_device) merge_sums();
        activation_block = 0;
        for (size_t i = 0; i < tensors.count; ++i) {
            Tensor& t = tensors[i];
            t.offset = place(i, false, t.born, t.dies, t.again);
            if (t.gradient_dies >= 0) t.gradient = place(i, true, t.gradient_born, t.gradient_dies, -1);
        }
        for (Tensor& t : tensors)
            if (t.shares != nothing) t.gradient = at(t.shares).gradient;
        if (on_device) merge_bias_sums();
        for (const WeightPlan& plan : learnt())  // Muon works there once the activations are not needed any more
            if (training && plan.matrices) activation_block = most(activation_block, (halves ? 2 : 1) * muon_space(plan));
        return Status();
    }
    static int64_t muon_space(const WeightPlan& plan) {
        const int64_t in = plan.output_rows ? plan.weight.cols : plan.weight.rows;
        int64_t side = 0;
        for (int i = 0; i < plan.matrices; ++i) side = most(side, least<int64_t>(in, plan.outputs[i]));
        return 5 * round_up(side * side, static_cast<int64_t>(16));
    }
    int64_t elements(const Tensor& t) const { return round_up(rows_on(t.side) * t.cols, static_cast<int64_t>(16)); }
    int64_t rows_on(Side which) const { return max_rows[static_cast<int>(which)]; }
    // What the targets and losses belong to.
    int64_t head_rows() const { return ops.count ? rows_on(ops[ops.count - 1].side) : 0; }

    const Tensor& at(int tensor_index) const { return tensors[static_cast<size_t>(tensor_index)]; }
    const Weight& weight(int index) const { return weights[static_cast<size_t>(index)].weight; }
    // The token embedding that the head or another embedding shares; nothing where there is none.
    int shared_embedding() const { return lookups ? ops[0].w : nothing; }
    int64_t one_lookup() const { return round_up(static_cast<int64_t>(vocab) * width, static_cast<int64_t>(16)); }
    int64_t lookup_block() const { return lookups * one_lookup(); }
    // Floats of one KV page.
    int64_t kv_page_block() const { return static_cast<int64_t>(layers) * 2 * kv_width * kv_page; }

 private:
    // Marks what no learnt weight stands before. Of the two that attention reads to see a source both get a gradient, or none.
    void fix() {
        const auto is_fixed = [&](int t) { return t == nothing || tensors[static_cast<size_t>(t)].fixed; };
        for (const Op& op : ops) {
            if (op.y == nothing || op.y == op.x) continue;
            const bool fixed = op.loras == 0 && is_fixed(op.x) && is_fixed(op.x2);
            tensors[static_cast<size_t>(op.y)].fixed = fixed;
            if (!fixed && op.kind == OpKind::attention && op.x2 != nothing)
                tensors[static_cast<size_t>(op.x)].fixed = tensors[static_cast<size_t>(op.x2)].fixed = false;
        }
    }
    int declare_lora(Text stem, const char* suffix, int rows, int cols) {
        WeightPlan plan{};
        Line name(plan.weight.name, sizeof plan.weight.name);
        name.put(stem), name.put(suffix);
        plan.weight.offset = adapter_block, plan.weight.rows = rows, plan.weight.cols = cols;
        plan.weight.decay = plan.weight.scaled_rows = true;
        const int64_t size = static_cast<int64_t>(rows) * cols;
        adapter_parameters += size, adapter_block += round_up(size, static_cast<int64_t>(16));
        if (no_memory || !adapter.push(plan)) no_memory = true;
        return static_cast<int>(adapter.count) - 1;
    }
    // Columns of a tensor that keeps so many floats, whatever the others' numbers are.
    int floats(int count) const { return halves ? 2 * count : count; }
    BABYGPT_CALL Op start(OpKind kind, int x) {
        Op op{};
        op.kind = kind;
        op.side = side;
        op.layer = layer;
        op.x = x;
        op.x2 = op.y = op.aux = op.w = op.b = op.lookup = nothing;
        if (x != nothing && !no_memory) op.in = tensors[static_cast<size_t>(x)].cols, op.side = tensors[static_cast<size_t>(x)].side;
        return op;
    }
    int finish_attention(Op& op, const char* name, int cols) {
        op.aux = tensor(name, ".softmax", floats(2 * op.heads), op.side);
        return finish(op, name, cols);
    }
    BABYGPT_CALL int finish(Op& op, const char* name, int cols) {
        op.out = cols;
        op.y = tensor(name, "", cols, op.side);
        if (!no_memory && !ops.push(op)) no_memory = true;
        return op.y;
    }
    int in_place(Op op) {
        op.out = op.in, op.y = op.x;
        if (!no_memory && !ops.push(op)) no_memory = true;
        return op.y;
    }
    bool fill_waves(const Op& op);  // chapter 5, which knows cosines
    // What Muon finds in a weight: its matrix number i has so many outputs.
    void keep_apart(int weight, size_t i, int outputs) {
        WeightPlan& plan = weights[static_cast<size_t>(weight)];
        plan.matrices = static_cast<int>(i) + 1, plan.outputs[i] = outputs;
    }
    // The same of the weight that made x, where it is one tensor.
    void keep_apart(int x, const int (&outputs)[3]) {
        for (const Op& maker : ops)
            if (!no_memory && maker.y == x && maker.kind == OpKind::linear && weights[static_cast<size_t>(maker.w)].matrices == 1)
                for (size_t i = 0; i < 3 && outputs[i] > 0; ++i) keep_apart(maker.w, i, outputs[i]);
    }
    void full_name(Line line, const char* name, const char* suffix) const {
        if (layer >= 0) line.put(block), line.put(layer), line.put(".");
        line.put(name);
        line.put(suffix);
    }
    BABYGPT_CALL int tensor(const char* name, const char* suffix, int cols, Side of) {
        Tensor t{};
        full_name(Line(t.name, sizeof t.name), name, suffix);
        t.cols = cols, t.side = of;
        if (no_memory || !tensors.push(t)) no_memory = true;
        return no_memory ? 0 : static_cast<int>(tensors.count) - 1;
    }
    BABYGPT_CALL int declare(const char* name, const char* suffix, int rows, int cols, double deviation, bool is_vector) {
        const Slice whole{name, 0};
        return declare(Span<const Slice>(&whole, 1), suffix, rows, cols, deviation, is_vector);
    }
    // Several parts divide the rows of a matrix, or a vector.
    BABYGPT_CALL int declare(Span<const Slice> parts, const char* suffix, int rows, int cols, double deviation, bool is_vector) {
        WeightPlan plan{};
        plan.weight.offset = weight_block;
        plan.weight.rows = rows, plan.weight.cols = cols;
        plan.weight.is_vector = is_vector, plan.weight.decay = plan.weight.scaled_rows = !is_vector;
        plan.deviation = deviation;
        plan.output_rows = output_rows;
        Weight one = plan.weight;
        for (const Slice& part : parts) {
            full_name(Line(one.name, sizeof one.name), part.name, suffix);
            if (parts.size > 1) (is_vector ? one.cols : one.rows) = part.outputs;
            if (no_memory || !names.push(one)) no_memory = true;
            one.offset += one.rows * one.cols;
        }
        full_name(Line(plan.weight.name, sizeof plan.weight.name), parts[0].name, suffix);
        const int64_t size = static_cast<int64_t>(rows) * cols;
        parameters += size;
        weight_block += round_up(size, static_cast<int64_t>(16));
        if (no_memory || !weights.push(plan)) no_memory = true;
        return no_memory ? 0 : static_cast<int>(weights.count) - 1;
    }
    BABYGPT_CALL void touch(int tensor_index, int time) {
        if (tensor_index == nothing) return;
        Tensor& t = tensors[static_cast<size_t>(tensor_index)];
        t.born = least(t.born, time), t.dies = most(t.dies, time);
    }
    BABYGPT_CALL void touch_gradient(int tensor_index, int time) {
        if (tensor_index == nothing || tensors[static_cast<size_t>(tensor_index)].fixed) return;
        Tensor& t = tensors[static_cast<size_t>(tensor_index)];
        t.gradient_born = least(t.gradient_born, time), t.gradient_dies = most(t.gradient_dies, time);
    }

    int readers(int tensor_index) const {
        int count = 0;
        for (const Op& op : ops) count += op.x == tensor_index || op.x2 == tensor_index;
        return count;
    }
    // On a device. A product whose result only the next op reads, as a sum's second summand, makes that sum: it is written one op sooner. A sum's
    // summands have its gradient: where nothing else has been added to it when they want it, they have its place, too.
    void merge_sums() {
        const int n = static_cast<int>(ops.count);
        for (int i = 1; i < n; ++i) {
            Op &op = ops[static_cast<size_t>(i)], &before = ops[static_cast<size_t>(i - 1)];
            if (op.kind != OpKind::add || before.y != op.x2) continue;
            const bool is_bare = before.kind == OpKind::linear && before.activation == Activation::none;
            if (makes_sums && is_bare && before.loras == 0 && op.x != op.x2 && readers(op.x2) == 1)
                op.sum = i - 1, before.sum = i, touch(op.y, i - 1);
            const bool keeps = before.kind == OpKind::dropout || is_bare;
            if (!runs_backward(op) || op.adds_to_dx || op.adds_to_dx2 || !keeps || at(op.x).fixed || at(op.x2).fixed) continue;
            const int place = at(op.x).shares != nothing ? at(op.x).shares : op.x;
            touch_gradient(op.y, 2 * n - i);  // when that op reads it
            share_gradient(op.y, place), share_gradient(op.x2, place);
        }
    }
    // There, a norm's dx is the gradient of a product with a bias, which made x's last summand, where both have one place; and attention's that of the
    // product that made its queries, keys and values, where it alone reads them, and no head shares its keys.
    void merge_bias_sums() {
        for (size_t i = 1; training && !frozen && i < ops.count; ++i) {
            Op &op = ops[i], &maker = ops[i - 1];
            const bool makes = op.kind == OpKind::attention && op.x2 == nothing && op.heads == op.kv_heads &&
                               maker.kind == OpKind::linear && maker.y == op.x && maker.activation == Activation::none &&
                               maker.b != nothing;
            if (makes && !op.adds_to_dx && readers(op.x) == 1) pair_bias(i, i - 1);
        }
        for (size_t i = 2; training && !frozen && i < ops.count; ++i) {
            const Op &norm = ops[i], &maker = ops[i - 2];
            const Op& sum = ops[i - 1];
            const bool makes = norm.kind == OpKind::norm && sum.kind == OpKind::add && sum.y == norm.x && maker.kind == OpKind::linear &&
                               maker.y == sum.x2 && maker.b != nothing;
            if (makes && at(maker.y).gradient == at(norm.x).gradient && norm.in % 4 == 0 && norm.in <= device_norm_columns)
                pair_bias(i, i - 2);
        }
    }
    void pair_bias(size_t op, size_t maker) { ops[op].bias_sum = static_cast<int>(maker), ops[maker].bias_sum = static_cast<int>(op); }
    void share_gradient(int tensor_index, int with) {
        Tensor &t = tensors[static_cast<size_t>(tensor_index)], &of = tensors[static_cast<size_t>(with)];
        of.gradient_born = least(of.gradient_born, t.gradient_born), of.gradient_dies = most(of.gradient_dies, t.gradient_dies);
        t.shares = with, t.gradient_dies = -1;
    }
    // The norm, gate, or linear op with an activation function, whose result this is, where one op reads it; nothing: it has to be kept.
    int cheap_maker(int tensor_index) const {
        int maker = nothing;
        for (size_t i = 0; i < ops.count; ++i) {
            const Op& op = ops[i];
            const bool cheap = op.kind == OpKind::norm || op.activation != Activation::none;
            if (op.y == tensor_index && cheap) maker = static_cast<int>(i);
        }
        return readers(tensor_index) == 1 ? maker : nothing;
    }
    // The lowest place that no tensor placed before it needs at the same time.
    int64_t place(size_t index, bool gradient, int born, int dies, int again) {
        const int64_t size = elements(tensors[index]);
        int64_t at = 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (size_t i = 0; i <= index; ++i) {
                const Tensor& t = tensors[i];
                const int64_t other = elements(t);
                const auto meets = [&](int from, int to) { return (from <= dies && born <= to) || (from <= again && again <= to); };
                if ((i < index || gradient) && (meets(t.born, t.dies) || (t.again >= 0 && meets(t.again, t.again))) &&
                    at < t.offset + other && t.offset < at + size)
                    at = t.offset + other, moved = true;
                if (i < index && t.gradient >= 0 && meets(t.gradient_born, t.gradient_dies) && at < t.gradient + other &&
                    t.gradient < at + size)
                    at = t.gradient + other, moved = true;
            }
        }
        activation_block = most(activation_block, at + size);
        return at;
    }
};

}  // namespace
}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 5] The ops, plainly
// =====================================================================================================================
// Each op's forward pass with its backward pass under it, in scalar loops, for float and for double. This is the reference backend: the
// fast one (chapters 10 and 11) computes the same function, and in float the same bits. For that, the order of additions is part of the
// definition, and always one of these two:
//   a chain:  s = start; for k in order: s = a[k] * b[k] + s, each step one fused multiply-add (rounded once). Products of matrices,
//             and sums over rows (gradients of weights), which start from what is there;
//   lanes:    sums along a row: 16 sums side by side, element i goes to sum i % 16, then a fixed tree adds the 16.
// In backward passes dx means d loss / d x. Gradients of weights are added to, gradients of tensors are set, or added to where
// another op has already written (`adds`).

namespace babygpt {
namespace {

// ---- arithmetic ------------------------------------------------------------------------------------------------------

// a * b + c, rounded once. In double the reference is not about bits.
BABYGPT_INLINE double madd(double a, double b, double c) { return a * b + c; }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
BABYGPT_INLINE float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// In double the product is exact; the sum is rounded to odd, so that rounding it again, to float, gives the right answer
// (Boldo & Melquiond 2008). Standing on no instruction, it gives the same bits everywhere.
inline float madd(float a, float b, float c) {
    const double product_ = static_cast<double>(a) * static_cast<double>(b), addend = static_cast<double>(c);
    double sum = product_ + addend;
    const double part = sum - product_;
    const double error = (product_ - (sum - part)) + (addend - part);  // exact (Knuth's two-sum)
    const uint64_t bits = bits_as<uint64_t>(sum);
    if (error != 0 && (bits & 1) == 0 && is_finite(sum)) sum = bits_as<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
    return static_cast<float>(sum);
}
#endif

// e^x as in chapter 2, but e^r by a polynomial fitted to it.
inline float exp_of(float x) {
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    const float n = madd(x, 1.44269504f, 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    float r = madd(n, -0.693359375f, x);                              // ln 2 in two parts, the first one exact
    r = madd(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = madd(p, r, 1.3981999507e-3f);
    p = madd(p, r, 8.3334519073e-3f);
    p = madd(p, r, 4.1665795894e-2f);
    p = madd(p, r, 1.6666665459e-1f);
    p = madd(p, r, 5.0000001201e-1f);
    p = madd(p, r * r, r) + 1.0f;
    return p * bits_as<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
// cos(pi x) for x >= 0, by the Taylor series around the nearer of the two zeros' sides.
inline double cos_pi(double x) {
    x -= 2 * static_cast<double>(static_cast<int64_t>(x / 2));
    if (x > 1) x = 2 - x;
    const double y = (0.5 - x) * 3.14159265358979323846;  // cos(pi x) = sin(pi/2 - pi x)
    double term = y, sum = y;
    for (int k = 2; k <= 26; k += 2) term *= -y * y / (k * (k + 1)), sum += term;
    return sum;
}
#if defined(__clang__) && defined(__SSE2__)  // under a host's -ffast-math Clang would estimate the root: its pragmas do not reach calls
BABYGPT_INLINE float root(float x) {
    __asm__("sqrtss %0, %0" : "+x"(x));
    return x;
}
BABYGPT_INLINE double root(double x) {
    __asm__("sqrtsd %0, %0" : "+x"(x));
    return x;
}
#else
BABYGPT_INLINE float root(float x) { return __builtin_sqrtf(x); }
BABYGPT_INLINE double root(double x) { return __builtin_sqrt(x); }
#endif

// Sixteen sums and their tree.
template <class T>
struct Lanes {
    T lane[16] = {};
    T total() const {
        T a[16];
        for (int i = 0; i < 16; ++i) a[i] = lane[i];
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a[i] = a[i] + a[i + half];
        return a[0];
    }
};
// sum of f(i), i < n
template <class T, class F>
T sum(int n, const F& f) {
    Lanes<T> lanes;
    for (int i = 0; i < n; ++i) lanes.lane[i % 16] = lanes.lane[i % 16] + f(i);
    return lanes.total();
}
// sum of f(i) * g(i)
template <class T, class F, class G>
T dot_lanes(int n, const F& f, const G& g) {
    Lanes<T> lanes;
    for (int i = 0; i < n; ++i) lanes.lane[i % 16] = madd(f(i), g(i), lanes.lane[i % 16]);
    return lanes.total();
}

// ---- embedding: y = token[id] + position[p], or token[id] alone ----------------------------------------------------------

template <class T>
void embedding_forward(T* y, const T* token, const T* position, const int32_t* ids, Span<const Sequence> sequences, int width) {
    for (const Sequence& s : sequences)
        for (int i = 0; i < s.length; ++i)
            for (int c = 0; c < width; ++c)
                y[static_cast<int64_t>(s.row + i) * width + c] =
                    token[static_cast<int64_t>(ids[s.row + i]) * width + c] +
                    (position ? position[static_cast<int64_t>(s.position + i) * width + c] : static_cast<T>(0));
}
template <class T>
void embedding_backward(T* dtoken, T* dposition, const T* dy, const int32_t* ids, Span<const Sequence> sequences, int width) {
    for (const Sequence& s : sequences)
        for (int i = 0; i < s.length; ++i)
            for (int c = 0; c < width; ++c) {
                const T d = dy[static_cast<int64_t>(s.row + i) * width + c];
                dtoken[static_cast<int64_t>(ids[s.row + i]) * width + c] += d;
                if (dposition) dposition[static_cast<int64_t>(s.position + i) * width + c] += d;
            }
}

// ---- sinusoidal positions (Vaswani et al. 2017, sections 3.4 and 3.5): x = x sqrt(width) + waves[position] ---------------------

// waves[p]: the sine of p / 10000^(2i / width) in column 2i, its cosine in column 2i + 1. backward: dx = dx sqrt(width).
template <class T>
void add_waves(T* x, const float* waves, Span<const Sequence> sequences, int width, bool backward) {
    const T factor = root(static_cast<T>(width));
    for (const Sequence& s : sequences)
        for (int i = 0; i < s.length; ++i) {
            const float* wave = waves + static_cast<int64_t>(s.position + i) * width;
            T* row = x + static_cast<int64_t>(s.row + i) * width;
            for (int c = 0; c < width; ++c) row[c] = backward ? row[c] * factor : madd(row[c], factor, static_cast<T>(wave[c]));
        }
}

// ---- layer norm (Ba, Kiros & Hinton 2016): y = (x - mean) / sqrt(variance + epsilon) * w + b -----------------------------

// RMSNorm (Zhang & Sennrich 2019) is the same with 0 for the mean. statistics: [rows][2], the mean and 1 / sqrt(variance + epsilon). b may
// be null.
template <class T>
void norm_forward(T* y, T* statistics, const T* x, const T* w, const T* b, int rows, int n, double epsilon, bool centred) {
    for (int row = 0; row < rows; ++row, x += n, y += n, statistics += 2) {
        const T mean = centred ? sum<T>(n, [&](int i) { return x[i]; }) / static_cast<T>(n) : static_cast<T>(0);
        const auto off = [&](int i) { return x[i] - mean; };
        const T variance = dot_lanes<T>(n, off, off) / static_cast<T>(n);
        const T scale = static_cast<T>(1) / root(variance + static_cast<T>(epsilon));
        for (int i = 0; i < n; ++i) y[i] = b ? madd((x[i] - mean) * scale, w[i], b[i]) : (x[i] - mean) * scale * w[i];
        statistics[0] = mean, statistics[1] = scale;
    }
}
// With h = (x - mean) * scale and g = dy * w:  dx = scale * (g - mean(g) - h * mean(g * h)),  dw = sum over rows of dy * h,  db = sum of dy.
// Where the mean was not taken off, mean(g) is not either.
template <class T>
void norm_backward(T* dx, T* dw, T* db, const T* dy, const T* x, const T* statistics, const T* w, int rows, int n, bool centred,
                   bool adds) {
    for (int row = 0; row < rows; ++row, x += n, dy += n, dx += n, statistics += 2) {
        const T mean = statistics[0], scale = statistics[1];
        const auto h = [&](int i) { return (x[i] - mean) * scale; };
        const auto g = [&](int i) { return dy[i] * w[i]; };
        const T mean_g = centred ? sum<T>(n, g) / static_cast<T>(n) : static_cast<T>(0);
        const T mean_gh = dot_lanes<T>(n, g, h) / static_cast<T>(n);
        for (int i = 0; i < n; ++i) {
            const T d = scale * madd(-h(i), mean_gh, g(i) - mean_g);
            if (dw) dw[i] = madd(dy[i], h(i), dw[i]);
            if (db) db[i] = db[i] + dy[i];
            dx[i] = adds ? dx[i] + d : d;
        }
    }
}

// ---- activations -------------------------------------------------------------------------------------------------------

// erf, by the series 2/sqrt(pi) * e^(-x^2) * sum 2^k x^(2k+1) / (1*3*5*...*(2k+1)): all terms have one sign (Abramowitz & Stegun 7.1.6).
// Beyond 6 it is 1 to the last bit of a double.
inline double erf_of(double x) {
    const double a = x < 0 ? -x : x;
    if (a > 6) return x < 0 ? -1 : 1;
    double term = a, total = a;
    for (int k = 1; k < 150; ++k) {
        term *= 2 * a * a / (2 * k + 1);
        total += term;
        if (term < total * 1e-17) break;
    }
    const double value = 1.12837916709551257390 * exp_of(-a * a) * total;
    return x < 0 ? -value : value;
}

// P(N(0,1) <= x), in float as Abramowitz & Stegun 26.2.17 has it: e^(-x^2/2) times a polynomial in t = 1 / (1 + p |x|) is the smaller of
// the two sides. Ours has eight terms, from t^8 down to t, fitted to within 1e-7 of it.
constexpr float normal_p = 0.305f, normal_terms[] = {3.66992122e-2f, -1.52988399e-1f, 1.85717044e-1f, -3.79769477e-2f,
                                                     1.21021734e-1f, 1.03420852e-1f,  1.22466819e-1f, 1.21639733e-1f};
inline double normal_of(double x) { return 0.5 * (1 + erf_of(x * 0.70710678118654752440)); }
inline float normal_of(float x) {
    const float t = 1.0f / madd(x < 0 ? -x : x, normal_p, 1.0f);
    float side = 0;
    for (const float term : normal_terms) side = madd(side, t, term);
    side = side * t * exp_of(x * x * -0.5f);
    return x < 0 ? side : 1.0f - side;
}

// GELU (Hendrycks & Gimpel 2016): x * P(N(0,1) <= x). The tanh form is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), since
// (1 + tanh u) / 2 = sigmoid(2u).
constexpr double gelu_a = 1.59576912160573071176;  // 2 sqrt(2/pi)
constexpr double gelu_b = 1.59576912160573071176 * 0.044715;
template <class T>
T activate(T x, Activation activation) {
    if (activation == Activation::gelu) return x * normal_of(x);
    if (activation == Activation::gelu_tanh) {
        const T u = x * madd(static_cast<T>(gelu_b), x * x, static_cast<T>(gelu_a));
        return x / (static_cast<T>(1) + exp_of(-u));
    }
    if (activation == Activation::silu) return x / (static_cast<T>(1) + exp_of(-x));
    if (activation == Activation::relu) return x > static_cast<T>(0) ? x : static_cast<T>(0);
    return x;
}
// Its derivative. gelu: P(x) + x p(x). gelu_tanh, with s = sigmoid(u): s + x s (1 - s) u'. silu: the same with u = x. relu: 0 at 0.
template <class T>
T activate_derivative(T x, Activation activation) {
    if (activation == Activation::gelu)
        return madd(x * static_cast<T>(0.39894228040143267794), exp_of(x * x * static_cast<T>(-0.5)), normal_of(x));
    if (activation == Activation::gelu_tanh) {
        const T u = x * madd(static_cast<T>(gelu_b), x * x, static_cast<T>(gelu_a));
        const T s = static_cast<T>(1) / (static_cast<T>(1) + exp_of(-u));
        const T slope = madd(static_cast<T>(3 * gelu_b), x * x, static_cast<T>(gelu_a));
        return madd(x * s * (static_cast<T>(1) - s), slope, s);
    }
    if (activation == Activation::silu) {
        const T s = static_cast<T>(1) / (static_cast<T>(1) + exp_of(-x));
        return madd(x * s, static_cast<T>(1) - s, s);
    }
    if (activation == Activation::relu) return static_cast<T>(x > static_cast<T>(0) ? 1 : 0);
    return static_cast<T>(1);
}

// ---- gated activation (Shazeer 2020): y = activation(g) u, where g and u are the halves of a row of x ------------------------

template <class T>
void gate_forward(T* y, const T* x, int rows, int n, Activation activation) {
    for (int row = 0; row < rows; ++row, x += 2 * n, y += n)
        for (int i = 0; i < n; ++i) y[i] = activate(x[i], activation) * x[n + i];
}
// dg = dy u activation'(g),  du = dy activation(g)
template <class T>
void gate_backward(T* dx, const T* dy, const T* x, int rows, int n, Activation activation, bool adds) {
    for (int row = 0; row < rows; ++row, x += 2 * n, dx += 2 * n, dy += n)
        for (int i = 0; i < n; ++i) {
            const T dg = dy[i] * x[n + i] * activate_derivative(x[i], activation), du = dy[i] * activate(x[i], activation);
            dx[i] = adds ? dx[i] + dg : dg;
            dx[n + i] = adds ? dx[n + i] + du : du;
        }
}

// ---- linear: y = activation(x W + b), W [in][out], or stored with output_rows as [out][in] -----------------------------------

// before: [rows][out], x W + b; may be null where no backward pass follows. b may be null.
template <class T>
void linear_forward(T* y, T* before, const T* x, const T* w, const T* b, int rows, int in, int out, bool output_rows,
                    Activation activation) {
    const int64_t next_in = output_rows ? 1 : out, next_out = output_rows ? in : 1;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < out; ++o) {
            T s = b ? b[o] : static_cast<T>(0);
            for (int64_t i = 0; i < in; ++i) s = madd(x[row * in + i], w[i * next_in + o * next_out], s);
            if (before) before[row * out + o] = s;
            y[row * out + o] = activate(s, activation);
        }
}
// dy becomes the gradient before the activation, in place; then db = sum over rows of dy, dW = x^T dy, dx = dy W^T (each may be null: not
// wanted).
template <class T>
void linear_backward(T* dx, T* dw, T* db, T* dy, const T* before, const T* x, const T* w, int rows, int in, int out, bool output_rows,
                     Activation activation, bool adds) {
    const int64_t next_in = output_rows ? 1 : out, next_out = output_rows ? in : 1;
    if (activation != Activation::none)
        for (int64_t i = 0; i < static_cast<int64_t>(rows) * out; ++i) dy[i] = dy[i] * activate_derivative(before[i], activation);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t o = 0; o < out; ++o)
            if (db) db[o] = db[o] + dy[row * out + o];
        for (int64_t i = 0; dw && i < in; ++i)
            for (int64_t o = 0; o < out; ++o) {
                T& d = dw[i * next_in + o * next_out];
                d = madd(x[row * in + i], dy[row * out + o], d);
            }
        for (int64_t i = 0; dx && i < in; ++i) {
            T s = adds ? dx[row * in + i] : static_cast<T>(0);
            for (int64_t o = 0; o < out; ++o) s = madd(dy[row * out + o], w[i * next_in + o * next_out], s);
            dx[row * in + i] = s;
        }
    }
}

// ---- LoRA (Hu et al. 2021): y += h B^T, h = (x A^T) scale, A [rank][in], B [outputs][rank] -----------------------------------

// Strides: of y's rows, and of h's.
template <class T>
void lora_forward(T* y, T* h, const T* x, const T* a, const T* b, int rows, int in, int outputs, int rank, int64_t y_stride,
                  int64_t h_stride, T scale) {
    for (int row = 0; row < rows; ++row, x += in, y += y_stride, h += h_stride) {
        for (int64_t k = 0; k < rank; ++k) {
            T s = 0;
            for (int64_t i = 0; i < in; ++i) s = madd(x[i], a[k * in + i], s);
            h[k] = s * scale;
        }
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t k = 0; k < rank; ++k) y[o] = madd(h[k], b[o * rank + k], y[o]);
    }
}
// dB = dy^T h,  dh = (dy B) scale,  dA = dh^T x,  dx += dh A  (null: not wanted).
template <class T>
void lora_backward(T* dx, T* da, T* db, T* dh, const T* dy, const T* h, const T* x, const T* a, const T* b, int rows, int in, int outputs,
                   int rank, int64_t y_stride, int64_t h_stride, T scale) {
    for (int row = 0; row < rows; ++row, x += in, dy += y_stride, h += h_stride, dh += h_stride) {
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t k = 0; k < rank; ++k) db[o * rank + k] = madd(dy[o], h[k], db[o * rank + k]);
        for (int64_t k = 0; k < rank; ++k) {
            T s = 0;
            for (int64_t o = 0; o < outputs; ++o) s = madd(dy[o], b[o * rank + k], s);
            dh[k] = s * scale;
            for (int64_t i = 0; i < in; ++i) da[k * in + i] = madd(dh[k], x[i], da[k * in + i]);
        }
        for (int64_t i = 0; dx && i < in; ++i)
            for (int64_t k = 0; k < rank; ++k) dx[i] = madd(dh[k], a[k * in + i], dx[i]);
        if (dx) dx += in;
    }
}

// ---- dropout (Srivastava et al. 2014): with probability p an element becomes 0, the others grow by 1 / (1 - p) -------------

// Row r of the whole batch and element i always meet the same fate in a step: nothing needs to be remembered.
struct Dropout {
    uint32_t below;  // an element whose bits are below this is dropped
    float keep;      // 1 / (1 - p)
    uint64_t seed, step, op, first_row;
    Dropout(const Run& run, int op_number, Side side)
        : below(run.training ? static_cast<uint32_t>(run.dropout * 4294967296.0) : 0),
          keep(static_cast<float>(1 / (1 - run.dropout))),
          seed(run.seed),
          step(run.step),
          op(static_cast<uint64_t>(op_number)),
          first_row(run.first_row[static_cast<int>(side)]) {}
    bool active() const { return below != 0; }
    uint64_t key(int row) const { return random_key(seed, step, op, first_row + static_cast<uint64_t>(row)); }
    // What element i of a row with this key is multiplied by.
    BABYGPT_INLINE float factor(uint64_t row_key, int i) const {
        return random_bits(row_key, static_cast<uint32_t>(i)) < below ? 0.0f : keep;
    }
};
template <class T>
void dropout_forward(T* y, const T* x, const Dropout& drop, int rows, int n) {
    for (int row = 0; row < rows; ++row, x += n, y += n) {
        const uint64_t key = drop.key(row);
        for (int i = 0; i < n; ++i) y[i] = drop.active() ? x[i] * static_cast<T>(drop.factor(key, i)) : x[i];
    }
}
template <class T>
void dropout_backward(T* dx, const T* dy, const Dropout& drop, int rows, int n, bool adds) {
    for (int row = 0; row < rows; ++row, dx += n, dy += n) {
        const uint64_t key = drop.key(row);
        for (int i = 0; i < n; ++i) {
            const T d = drop.active() ? dy[i] * static_cast<T>(drop.factor(key, i)) : dy[i];
            dx[i] = adds ? dx[i] + d : d;
        }
    }
}

// ---- rotary positions, RoPE (Su et al. 2021) ---------------------------------------------------------------------------

// Pair i of a head's query or key, the elements i and i + dim / 2, is a point in the plane; at position p it is turned by the angle
// p * base^(-2i / dim), base 10000. So the product of a query and a key depends on how far they are apart, not on where they stand. Turning
// back by the same angle is the backward pass.

// The cosines and sines of rope, or of the op waves: the same angles, but beside each other.
inline bool Tape::fill_waves(const Op& op) {
    const bool beside = op.kind == OpKind::waves;
    const int dim = beside ? op.in : op.dim(), half = dim / 2;
    size_t count;
    if (!product(context, dim, count) || !waves.resize(count)) return false;
    for (int i = 0; 2 * i < dim; ++i) {
        const double half_turns = exp_of(-log_of(beside ? 10000.0 : rope_base) * 2 * i / dim) / 3.14159265358979323846;  // a position
        for (int p = 0; p < context; ++p) {
            float* wave = waves.items + static_cast<int64_t>(p) * dim;
            const float cosine = static_cast<float>(cos_pi(p * half_turns)), sine = static_cast<float>(cos_pi(p * half_turns + 1.5));
            if (!beside) wave[i] = cosine, wave[half + i] = sine;
            else {
                wave[2 * i] = sine;
                if (2 * i + 1 < dim) wave[2 * i + 1] = cosine;
            }
        }
    }
    return true;
}
// x: [rows][(heads + 2 * kv_heads) * dim], of which the queries and keys turn; sign -1: back.
template <class T>
void rope(T* x, const float* waves, Span<const Sequence> sequences, int heads, int kv_heads, int dim, int sign) {
    const int half = dim / 2;
    for (const Sequence& s : sequences)
        for (int i = 0; i < s.length; ++i) {
            const float *cosine = waves + static_cast<int64_t>(s.position + i) * dim, *sine = cosine + half;
            T* row = x + static_cast<int64_t>(s.row + i) * (heads + 2 * kv_heads) * dim;
            for (int head = 0; head < heads + kv_heads; ++head, row += dim)
                for (int k = 0; k < half; ++k) {
                    const T a = row[k], b = row[half + k], c = static_cast<T>(cosine[k]),
                            d = static_cast<T>(sign) * static_cast<T>(sine[k]);
                    row[k] = madd(a, c, -(b * d));
                    row[half + k] = madd(a, d, b * c);
                }
        }
}

// ---- multi-head attention (Vaswani et al. 2017) --------------------------------------------------------------------------

// One sequence's part of an attention op. Pointers: of its first row. Head h reads the keys and values of kv head h / group (grouped queries:
// Ainslie et al. 2023).
template <class T>
struct Attention {
    int heads, kv_heads, dim, group;
    int layer;  // for the KV cache
    bool causal;
    int row;            // of the first query, in the run
    int queries, keys;  // rows; without those in a cache
    int before;         // keys in a cache
    int64_t width, kv_width, q_stride, k_stride;
    const T *q, *k, *v;  // [queries][q_stride], [keys][k_stride]
    T *y, *softmax;      // [queries][width]; [queries][heads][2]: max(s) and sum of e^(s - max), enough to make p again
    const T* dy;
    T *dq, *dk, *dv;
    bool adds_q, adds_kv;
    const Sequence& s;

    Attention(const Tape& tape, const Regions<T>& r, const Run& run, const Op& op, size_t i)
        : heads(op.heads),
          kv_heads(op.kv_heads),
          dim(op.dim()),
          group(heads / kv_heads),
          layer(op.layer),
          causal(op.sight == Sight::causal),
          s(run.on(op.side).sequences[i]) {
        width = static_cast<int64_t>(heads) * dim, kv_width = static_cast<int64_t>(kv_heads) * dim;
        const bool other = op.sight == Sight::source;
        const Sequence& seen = other ? run.source.sequences[static_cast<size_t>(s.source)] : s;
        row = s.row, queries = s.length, keys = seen.length, before = s.pages && !other ? s.position : 0;
        q_stride = op.in, k_stride = other ? 2 * kv_width : op.in;
        q = values_of(tape, r, op.x, s.row), k = other ? values_of(tape, r, op.x2, seen.row) : q + width, v = k + kv_width;
        y = values_of(tape, r, op.y, s.row), softmax = values_of(tape, r, op.aux, s.row);
        dy = gradient_of(tape, r, op.y, s.row), dq = gradient_of(tape, r, op.x, s.row);
        dk = other ? gradient_of(tape, r, op.x2, seen.row) : dq ? dq + width : nullptr, dv = dk ? dk + kv_width : nullptr;
        adds_q = op.adds_to_dx, adds_kv = other ? op.adds_to_dx2 : op.adds_to_dx;
    }
    bool has_cache() const { return s.pages && causal; }
    int seen_by(int query) const { return causal ? before + query + 1 : keys; }
    // The keys (which: 0) or values (1) of the page that holds this position.
    float* page(int position, int which) const { return s.pages[position / kv_page] + (layer * 2 + which) * kv_width * kv_page; }

 private:
    static T* values_of(const Tape& tape, const Regions<T>& r, int tensor, int row) {
        return r.activations + tape.at(tensor).offset + static_cast<int64_t>(row) * tape.at(tensor).cols;
    }
    static T* gradient_of(const Tape& tape, const Regions<T>& r, int tensor, int row) {
        const Tensor& t = tape.at(tensor);
        return t.gradient < 0 ? nullptr : r.activations + t.gradient + static_cast<int64_t>(row) * t.cols;
    }
};

// For each query, in each head, over the keys k that it sees:
//   s[k] = q . k[k] / sqrt(dim),  p = softmax(s),  y = sum over k of p[k] * v[k]   (with dropout on p)
// With a KV cache the new keys and values are first stored in their pages, and the keys before them come from there. scratch: [context] for s.
template <class T>
void attention_forward(const Attention<T>& a, const Dropout& drop, T* scratch) {
    const T scale = static_cast<T>(1) / root(static_cast<T>(a.dim));
    const bool cached = a.has_cache();
    for (int i = 0; cached && i < a.keys; ++i)
        for (int64_t c = 0; c < a.kv_width; ++c) {
            const int at = (a.before + i) % kv_page;
            a.page(a.before + i, 0)[c * kv_page + at] = static_cast<float>(a.k[i * a.k_stride + c]);
            a.page(a.before + i, 1)[(c / a.dim * kv_page + at) * a.dim + c % a.dim] = static_cast<float>(a.v[i * a.k_stride + c]);
        }
    for (int64_t i = 0; i < a.queries; ++i)
        for (int head = 0; head < a.heads; ++head) {
            const int64_t column = static_cast<int64_t>(head) * a.dim, kv_head = head / a.group, kv_column = kv_head * a.dim;
            const int seen = a.seen_by(static_cast<int>(i));
            const auto key = [&](int k, int d) {
                return cached ? static_cast<T>(a.page(k, 0)[(kv_column + d) * kv_page + k % kv_page]) : a.k[k * a.k_stride + kv_column + d];
            };
            const auto value = [&](int k, int d) {
                return cached ? static_cast<T>(a.page(k, 1)[(kv_head * kv_page + k % kv_page) * a.dim + d])
                              : a.v[k * a.k_stride + kv_column + d];
            };
            T biggest = 0;
            for (int k = 0; k < seen; ++k) {
                T score = 0;
                for (int d = 0; d < a.dim; ++d) score = madd(a.q[i * a.q_stride + column + d], key(k, d), score);
                scratch[k] = score * scale;
                biggest = k == 0 ? scratch[0] : most(biggest, scratch[k]);
            }
            for (int k = 0; k < seen; ++k) scratch[k] = exp_of(scratch[k] - biggest);
            const T total = sum<T>(seen, [&](int k) { return scratch[k]; });
            a.softmax[(i * a.heads + head) * 2] = biggest, a.softmax[(i * a.heads + head) * 2 + 1] = total;
            const T inverse = static_cast<T>(1) / total;
            const uint64_t random = drop.key(a.row + static_cast<int>(i));
            for (int d = 0; d < a.dim; ++d) {
                T value_sum = 0;
                for (int k = 0; k < seen; ++k) {
                    const T p = drop.active() ? scratch[k] * static_cast<T>(drop.factor(random, head * 65536 + k)) : scratch[k];
                    value_sum = madd(p, value(k, d), value_sum);
                }
                a.y[i * a.width + column + d] = value_sum * inverse;
            }
        }
}
// With p as above, f the dropout's factors and D = dy . y (which is sum over k of p dp):
//   dv[k] += f p dy,   dp = f (dy . v[k]),   ds = p (dp - D) / sqrt(dim),   dq = sum over k of ds k[k],   dk[k] += ds q
// Head after head: so are the sums of dk and dv where several heads share them.
template <class T>
void attention_backward(const Attention<T>& a, const Dropout& drop) {
    const T scale = static_cast<T>(1) / root(static_cast<T>(a.dim));
    for (int64_t i = 0; i < a.queries && !a.adds_q; ++i)
        for (int64_t c = 0; c < a.width; ++c) a.dq[i * a.q_stride + c] = 0;
    for (int64_t i = 0; i < a.keys && !a.adds_kv; ++i)
        for (int64_t c = 0; c < 2 * a.kv_width; ++c) a.dk[i * a.k_stride + c] = 0;
    for (int head = 0; head < a.heads; ++head)
        for (int64_t i = 0; i < a.queries; ++i) {
            const int64_t column = static_cast<int64_t>(head) * a.dim, kv_column = head / a.group * a.dim;
            const T *q = a.q + i * a.q_stride + column, *out = a.y + i * a.width + column, *dout = a.dy + i * a.width + column;
            T* dq = a.dq + i * a.q_stride + column;
            const T biggest = a.softmax[(i * a.heads + head) * 2], inverse = static_cast<T>(1) / a.softmax[(i * a.heads + head) * 2 + 1];
            const uint64_t random = drop.key(a.row + static_cast<int>(i));
            const T D = dot_lanes<T>(
                a.dim, [&](int d) { return dout[d]; }, [&](int d) { return out[d]; });
            for (int k = 0; k < a.seen_by(static_cast<int>(i)); ++k) {
                const int64_t at = k * a.k_stride + kv_column;
                const T *key = a.k + at, *value = a.v + at;
                T *dkey = a.dk + at, *dvalue = a.dv + at;
                T score = 0, dp = 0;
                for (int d = 0; d < a.dim; ++d) score = madd(q[d], key[d], score);
                for (int d = 0; d < a.dim; ++d) dp = madd(dout[d], value[d], dp);
                const T p = exp_of(score * scale - biggest) * inverse;
                const T f = drop.active() ? static_cast<T>(drop.factor(random, head * 65536 + k)) : static_cast<T>(1);
                const T ds = p * (dp * f - D) * scale;
                for (int d = 0; d < a.dim; ++d) {
                    dvalue[d] = madd(p * f, dout[d], dvalue[d]);
                    dq[d] = madd(ds, key[d], dq[d]);
                    dkey[d] = madd(ds, q[d], dkey[d]);
                }
            }
        }
}

// ---- add: y = a + b ----------------------------------------------------------------------------------------------------

template <class T>
void add_forward(T* y, const T* a, const T* b, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}
template <class T>
void add_backward(T* da, T* db, const T* dy, int64_t n, bool adds_a, bool adds_b) {
    for (int64_t i = 0; da && i < n; ++i) da[i] = adds_a ? da[i] + dy[i] : dy[i];
    for (int64_t i = 0; db && i < n; ++i) db[i] = adds_b ? db[i] + dy[i] : dy[i];
}

// ---- pool: a row for each sequence, its first one or the mean of all ---------------------------------------------------------

template <class T>
void pool_forward(T* y, const T* x, Span<const Sequence> sequences, int n, bool first) {
    for (const Sequence& s : sequences) {
        const T* rows = x + static_cast<int64_t>(s.row) * n;
        for (int c = 0; c < n; ++c) {
            T total = rows[c];
            for (int64_t i = 1; i < s.length && !first; ++i) total = total + rows[i * n + c];
            *y++ = first ? total : total / static_cast<T>(s.length);
        }
    }
}
// dx = dy in the first row and 0 in the others; or dy / length in each.
template <class T>
void pool_backward(T* dx, const T* dy, Span<const Sequence> sequences, int n, bool first, bool adds) {
    for (const Sequence& s : sequences) {
        for (int64_t i = 0; i < s.length; ++i)
            for (int c = 0; c < n; ++c) {
                const T d = !first ? dy[c] / static_cast<T>(s.length) : i == 0 ? dy[c] : static_cast<T>(0);
                T& to = dx[(s.row + i) * n + c];
                to = adds ? to + d : d;
            }
        dy += n;
    }
}

// ---- output head with softmax cross-entropy ------------------------------------------------------------------------------

// logits = x W^T + b, W [vocab][width]; b may be null; loss = -log softmax(logits)[target], in nats, a number a row. Label smoothing e (Szegedy et al. 2016)
// mixes the target with the uniform distribution: loss = log(sum e^l) - (1-e) l[target] - e mean(l). Only a row of logits exists at a time.
// softmax: [rows][2], max and sum of e^(l - max). rank: how many tokens come before the target, by logit, then by id.
template <class To, class T>
void head_logits(To* logits, const T* x, const T* w, const T* b, int width, int vocab) {
    for (int64_t v = 0; v < vocab; ++v) {
        T s = b ? b[v] : static_cast<T>(0);
        for (int64_t c = 0; c < width; ++c) s = madd(x[c], w[v * width + c], s);
        logits[v] = static_cast<To>(s);
    }
}
template <class T>
T biggest_of(const T* x, int n) {
    T biggest = x[0];
    for (int i = 1; i < n; ++i) biggest = most(biggest, x[i]);
    return biggest;
}
// e^((x - biggest) * factor) of each, to `to` (null: nowhere), and their sum.
template <class T>
T exponentials(T* to, const T* x, int n, T biggest, T factor) {
    return sum<T>(n, [&](int i) {
        const T e = exp_of((x[i] - biggest) * factor);
        if (to) to[i] = e;
        return e;
    });
}
template <class T>
void head_forward(double* losses, int32_t* ranks, T* softmax, const T* x, const T* w, const T* b, const int32_t* targets, int rows,
                  int width, int vocab, double smoothing, T* logits) {
    for (int row = 0; row < rows; ++row, x += width, softmax += 2) {
        const int target = targets[row];
        losses[row] = 0;
        if (ranks) ranks[row] = 0;
        if (target < 0) continue;
        head_logits(logits, x, w, b, width, vocab);
        const T biggest = biggest_of(logits, vocab), total = exponentials<T>(nullptr, logits, vocab, biggest, 1);
        softmax[0] = biggest, softmax[1] = total;
        losses[row] =
            log_of(static_cast<double>(total)) + static_cast<double>(biggest) - (1 - smoothing) * static_cast<double>(logits[target]);
        if (smoothing > 0) losses[row] -= smoothing * static_cast<double>(sum<T>(vocab, [&](int v) { return logits[v]; })) / vocab;
        if (ranks)
            for (int v = 0; v < vocab; ++v) ranks[row] += logits[v] > logits[target] || (v < target && !(logits[v] < logits[target]));
    }
}
// dl = softmax(l) - (1-e) [v is the target] - e/V, times the row's weight;  dx = dl W,  dW += dl^T x,  db += dl.
template <class T>
void head_backward(T* dx, T* dw, T* db, const T* softmax, const T* x, const T* w, const T* b, const int32_t* targets,
                   const float* row_weights, int rows, int width, int vocab, double smoothing, bool adds, T* logits) {
    for (int row = 0; row < rows; ++row, x += width, dx += width, softmax += 2) {
        const int target = targets[row];
        for (int c = 0; c < width && !adds; ++c) dx[c] = 0;
        if (target < 0) continue;
        head_logits(logits, x, w, b, width, vocab);
        const T inverse = static_cast<T>(1) / softmax[1];
        for (int64_t v = 0; v < vocab; ++v) {
            T dl = exp_of(logits[v] - softmax[0]) * inverse - static_cast<T>(smoothing / vocab);
            if (v == target) dl = dl - static_cast<T>(1 - smoothing);
            if (row_weights) dl = dl * static_cast<T>(row_weights[row]);
            if (db) db[v] = db[v] + dl;
            for (int c = 0; c < width; ++c) {
                dx[c] = madd(dl, w[v * width + c], dx[c]);
                if (dw) dw[v * width + c] = madd(dl, x[c], dw[v * width + c]);
            }
        }
    }
}

// ---- walking the tape --------------------------------------------------------------------------------------------------

// Elements of scratch that the plain backend needs: a row of scores, or of logits.
inline int64_t plain_scratch(const Tape& tape) {
    return round_up(static_cast<int64_t>(most(tape.context, tape.head_out)), static_cast<int64_t>(16));
}

template <class T>
T* values(const Tape& tape, const Regions<T>& r, int tensor) {
    return tensor == nothing ? nullptr : r.activations + tape.at(tensor).offset;
}
template <class T>
T* gradient(const Tape& tape, const Regions<T>& r, int tensor) {
    return tensor == nothing || tape.at(tensor).gradient < 0 ? nullptr : r.activations + tape.at(tensor).gradient;
}
template <class T>
const T* weights(const Tape& tape, const Regions<T>& r, int weight) {
    return weight == nothing ? nullptr : r.weights + tape.weight(weight).offset;
}
template <class T>
T* weight_gradient(const Tape& tape, const Regions<T>& r, int weight) {
    return weight == nothing || tape.frozen ? nullptr : r.gradients + tape.weight(weight).offset;
}
// The same of one beside a linear op, whatever its number; h and its gradient, of the op.
template <class T>
struct LoraPlaces {
    const T *a, *b;
    T *da, *db, *h, *dh;
    int64_t stride;  // of h
    LoraPlaces(const Tape& tape, const Regions<T>& r, const Op& op, int number) {
        const Lora& lora = tape.loras[static_cast<size_t>(op.lora + number)];
        const auto offset = [&](int index) { return tape.adapter[static_cast<size_t>(index)].weight.offset; };
        a = r.adapter + offset(lora.a), b = r.adapter + offset(lora.b);
        da = tape.frozen ? r.gradients + offset(lora.a) : nullptr, db = tape.frozen ? r.gradients + offset(lora.b) : nullptr;
        h = (op.low == nothing ? r.low : values(tape, r, op.low)) + number * tape.rank;
        dh = tape.frozen ? gradient(tape, r, op.low) + number * tape.rank : nullptr;
        stride = static_cast<int64_t>(op.loras) * tape.rank;
    }
};

template <class T>
void plain_linear_forward(const Tape& tape, const Regions<T>& r, const Op& op, int rows) {
    const T *x = values(tape, r, op.x), *w = weights(tape, r, op.w), *b = weights(tape, r, op.b);
    T *y = values(tape, r, op.y), *before = values(tape, r, op.aux);
    if (op.loras == 0) return linear_forward(y, before, x, w, b, rows, op.in, op.out, tape.output_rows, op.activation);
    if (!before) before = y;
    linear_forward<T>(before, nullptr, x, w, b, rows, op.in, op.out, tape.output_rows, Activation::none);
    for (int i = 0; i < op.loras; ++i) {
        const LoraPlaces<T> l(tape, r, op, i);
        const Lora& lora = tape.loras[static_cast<size_t>(op.lora + i)];
        lora_forward(before + lora.first, l.h, x, l.a, l.b, rows, op.in, lora.outputs, tape.rank, op.out, l.stride,
                     static_cast<T>(tape.lora_scale));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(rows) * op.out; ++i) y[i] = activate(before[i], op.activation);
}
template <class T>
void plain_lora_backward(const Tape& tape, const Regions<T>& r, const Op& op, int rows) {
    for (int i = 0; i < op.loras; ++i) {
        const LoraPlaces<T> l(tape, r, op, i);
        const Lora& lora = tape.loras[static_cast<size_t>(op.lora + i)];
        lora_backward<T>(gradient(tape, r, op.x), l.da, l.db, l.dh, gradient(tape, r, op.y) + lora.first, l.h, values(tape, r, op.x), l.a,
                         l.b, rows, op.in, lora.outputs, tape.rank, op.out, l.stride, static_cast<T>(tape.lora_scale));
    }
}

template <class T>
void plain_op_forward(const Tape& tape, const Regions<T>& r, const Run& run, int number) {
    const Op& op = tape.ops[static_cast<size_t>(number)];
    const Stream in = run.on(op.side);
    if (in.rows == 0) return;  // a source that has been read before
    const int64_t size = static_cast<int64_t>(in.rows) * op.in;
    const T *x = values(tape, r, op.x), *w = weights(tape, r, op.w), *b = weights(tape, r, op.b);
    T *y = values(tape, r, op.y), *aux = values(tape, r, op.aux);
    switch (op.kind) {
        case OpKind::embedding:
            return embedding_forward(y, w, b, in.ids, in.sequences, op.out);
        case OpKind::input:
            for (int64_t i = 0; i < static_cast<int64_t>(in.rows) * op.out; ++i) y[i] = static_cast<T>(run.features[i]);
            return;
        case OpKind::norm:
            return norm_forward(y, aux, x, w, b, in.rows, op.in, tape.epsilon, op.centred);
        case OpKind::waves:
            return add_waves(y, tape.waves.items, in.sequences, op.in, false);
        case OpKind::linear:
            return plain_linear_forward(tape, r, op, in.rows);
        case OpKind::gate:
            return gate_forward(y, x, in.rows, op.out, op.activation);
        case OpKind::rope:
            return rope(y, tape.waves.items, in.sequences, op.heads, op.kv_heads, op.dim(), 1);
        case OpKind::dropout:
            return dropout_forward(y, x, Dropout(run, number, op.side), in.rows, op.in);
        case OpKind::add:
            return add_forward(y, x, values(tape, r, op.x2), size);
        case OpKind::attention:
            for (size_t i = 0; i < in.sequences.size; ++i)
                attention_forward(Attention<T>(tape, r, run, op, i), Dropout(run, number, op.side), r.scratch);
            return;
        case OpKind::pool:
            return pool_forward(y, x, run.sequences, op.in, op.first);
        case OpKind::head:
            if (run.targets)
                head_forward(r.losses, r.ranks, aux, x, w, b, run.targets, in.rows, op.in, op.out, run.label_smoothing, r.scratch);
            for (size_t i = 0; i < run.sequences.size; ++i)
                if (run.sequences[i].logits)
                    head_logits(run.sequences[i].logits, x + run.wanted_row(op.side, i) * op.in, w, b, op.in, op.out);
            return;
    }
}
// Once more what the planner did not keep: a norm, a gate, or an activation function of what has been kept from before it.
template <class T>
void plain_remake(const Tape& tape, const Regions<T>& r, const Run& run, int number) {
    const Op& op = tape.ops[static_cast<size_t>(number)];
    if (op.kind != OpKind::linear) return plain_op_forward(tape, r, run, number);
    const T* before = values(tape, r, op.aux);
    T* y = values(tape, r, op.y);
    for (int64_t i = 0; i < static_cast<int64_t>(run.on(op.side).rows) * op.out; ++i) y[i] = activate(before[i], op.activation);
}
template <class T>
void plain_op_backward(const Tape& tape, const Regions<T>& r, const Run& run, int number) {
    const Op& op = tape.ops[static_cast<size_t>(number)];
    const Stream in = run.on(op.side);
    const int64_t size = static_cast<int64_t>(in.rows) * op.in;
    const T *x = values(tape, r, op.x), *aux = values(tape, r, op.aux), *w = weights(tape, r, op.w), *b = weights(tape, r, op.b);
    T *dx = gradient(tape, r, op.x), *dy = gradient(tape, r, op.y), *dw = weight_gradient(tape, r, op.w),
      *db = weight_gradient(tape, r, op.b);
    if (!tape.runs_backward(op)) return;
    if (op.remakes != nothing) plain_remake(tape, r, run, op.remakes);
    switch (op.kind) {
        case OpKind::embedding:
            if (op.lookup != nothing) dw = r.lookup_gradients + op.lookup * tape.one_lookup();
            return embedding_backward(dw, db, dy, in.ids, in.sequences, op.out);
        case OpKind::input:
            return;
        case OpKind::norm:
            return norm_backward(dx, dw, db, dy, x, aux, w, in.rows, op.in, op.centred, op.adds_to_dx);
        case OpKind::waves:
            return add_waves(dx, tape.waves.items, in.sequences, op.in, true);
        case OpKind::linear:
            linear_backward(dx, dw, db, dy, aux, x, w, in.rows, op.in, op.out, tape.output_rows, op.activation, op.adds_to_dx);
            return plain_lora_backward(tape, r, op, in.rows);
        case OpKind::gate:
            return gate_backward(dx, dy, x, in.rows, op.out, op.activation, op.adds_to_dx);
        case OpKind::rope:
            return rope(dx, tape.waves.items, in.sequences, op.heads, op.kv_heads, op.dim(), -1);
        case OpKind::dropout:
            return dropout_backward(dx, dy, Dropout(run, number, op.side), in.rows, op.in, op.adds_to_dx);
        case OpKind::add:
            return add_backward(dx, gradient(tape, r, op.x2), dy, size, op.adds_to_dx, op.adds_to_dx2);
        case OpKind::attention:
            for (size_t i = 0; i < in.sequences.size; ++i)
                attention_backward(Attention<T>(tape, r, run, op, i), Dropout(run, number, op.side));
            return;
        case OpKind::pool:
            return pool_backward(dx, dy, run.sequences, op.in, op.first, op.adds_to_dx);
        case OpKind::head:
            return head_backward(dx, dw, db, aux, x, w, b, run.targets, run.row_weights, in.rows, op.in, op.out, run.label_smoothing,
                                 op.adds_to_dx, r.scratch);
    }
}
// Does the work, and adds the time that it takes where somebody asks (Run::seconds).
template <class Work>
void timed(const Run& run, int slot, const Work& work) {
    const double start = run.seconds ? seconds_now() : 0;
    work();
    if (run.seconds) run.seconds[slot] += seconds_now() - start;
}
template <class T>
void plain_forward(const Tape& tape, const Regions<T>& r, const Run& run) {
    for (int i = 0; i < static_cast<int>(tape.ops.count); ++i) timed(run, i, [&] { plain_op_forward(tape, r, run, i); });
}
template <class T>
void plain_backward(const Tape& tape, const Regions<T>& r, const Run& run) {
    const int ops = static_cast<int>(tape.ops.count);
    for (int i = ops; i-- > 0;) timed(run, ops + i, [&] { plain_op_backward(tape, r, run, i); });
}

BABYGPT_UNHURRIED_END

// ---- AdamW (Loshchilov & Hutter 2019) ------------------------------------------------------------------------------------

// g' = g * scale;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;  w = w - decay w - step_size m / (sqrt(v) root_scale + epsilon).
// Moments so small that they would be subnormal become 0: those of rarely seen tokens would slow a processor down by a factor.
inline void adamw(float* w, float* m, float* v, const float* g, int64_t n, const AdamW& a, bool decays) {
    constexpr float tiny = 1e-30f;
    const float decay = decays ? a.decay : 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = g[i] * a.gradient_scale;
        float first = madd(a.beta1, m[i], a.one_minus_beta1 * scaled);
        float second = madd(a.beta2, v[i], a.one_minus_beta2 * (scaled * scaled));
        if (first < tiny && first > -tiny) first = 0;
        if (second < tiny) second = 0;
        m[i] = first, v[i] = second;
        w[i] = madd(-a.step_size, first / madd(root(second), a.root_scale, a.epsilon), madd(-decay, w[i], w[i]));
    }
}

// ---- numbers of fewer bits -----------------------------------------------------------------------------------------------

// The nearest finite bf16 (a tie: the even one), as a float. Of a finite number.
inline float bf16_of(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), size = (bits & 0x7fffffffu) + 0x7fffu + (bits >> 16 & 1);
    return bits_as<float>((bits & 0x80000000u) | (least(size, 0x7f7fffffu) & 0xffff0000u));
}
// The scale of numbers of which the largest is `biggest`: the power of two that brings it between 64 and 127. So nothing is rounded but the
// numbers themselves: sums of products with the whole numbers, scaled at the end, have the bits of sums with the scaled numbers, and what
// has been made int8 once comes out the same when it is done again. (The MX formats, too, have such scales.)
inline float int8_scale(float biggest) {
    if (biggest < 1e-24f) return 1;  // 0, all of them
    const uint32_t bits = bits_as<uint32_t>(biggest / 127);
    return bits_as<float>((bits + 0x7fffffu) & 0x7f800000u);
}
inline int8_t int8_of(float x, float scale) {  // x / scale, to the nearest whole number
    return static_cast<int8_t>(bits_as<uint32_t>(x / scale + 12582912.0f) & 0xff);
}

// ---- products of matrices ------------------------------------------------------------------------------------------------

// A matrix as a factor of a product, whose depth runs down its columns, so that element (k, j) is at [k * stride + j], or along its rows,
// so that it is at [j * stride + k].
enum Depth { down, along };
struct Factor {
    const float* at;
    int64_t stride;
    Depth runs;
    BABYGPT_INLINE const float* element(int64_t k, int64_t j) const { return at + (runs == along ? j * stride + k : k * stride + j); }
};
// rows x columns of C, from A (depth x rows) and B (depth x columns). The chains start from what is at `start`: C itself, or a bias
// (stride 0); null: from 0.
struct Product {
    float* c;
    int64_t c_stride;
    const float* start;
    int64_t start_stride;
    Factor a, b;
    int rows, columns, depth;
    bool is_symmetric = false;  // only what lies on the diagonal and right of it is wanted
    Dtype dtype = Dtype::f32;   // of B, where it has been packed
};

// The plain backend's.
struct PlainProducts {
    void product(const Product& p) const {
        for (int64_t i = 0; i < p.rows; ++i)
            for (int64_t j = p.is_symmetric ? i : 0; j < p.columns; ++j) {
                float sum = p.start ? p.start[i * p.start_stride + j] : 0;
                for (int64_t k = 0; k < p.depth; ++k) sum = madd(*p.a.element(k, i), *p.b.element(k, j), sum);
                p.c[i * p.c_stride + j] = sum;
            }
    }
    void scale(float* to, const float* from, int64_t n, float factor) const {
        for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
    }
};

// The half left of the diagonal from the other one, in blocks that fit in the first cache.
inline void mirror(float* a, int64_t n) {
    constexpr int64_t block = 32;
    for (int64_t i0 = 0; i0 < n; i0 += block)
        for (int64_t j0 = i0; j0 < n; j0 += block)
            for (int64_t i = i0; i < least(i0 + block, n); ++i)
                for (int64_t j = most(j0, i + 1); j < least(j0 + block, n); ++j) a[j * n + i] = a[i * n + j];
}

// ---- Muon (Jordan et al. 2024) -------------------------------------------------------------------------------------------

// g' = g * scale;  m = b m + (1-b) g';  g = b m + (1-b) g' (Nesterov);  w = keep w.
inline void muon_momentum(float* w, float* m, float* g, int64_t n, const Muon& a) {
    constexpr float tiny = 1e-30f;
    for (int64_t i = 0; i < n; ++i) {
        const float rest = a.one_minus_momentum * (g[i] * a.gradient_scale);
        m[i] = madd(a.momentum, m[i], rest);
        if (m[i] < tiny && m[i] > -tiny) m[i] = 0;
        g[i] = madd(a.momentum, m[i], rest);
        w[i] = w[i] * a.keep;
    }
}

// Then w gets -step_size * sqrt(max(1, out / in)) * U V^T, where u = U S V^T is the singular value decomposition of the g above: all of
// the momentum's directions, equally long. U V^T = Q u with Q = (u u^T)^(-1/2) (for the shorter side of u), and Q comes from the iteration
// of Newton and Schulz: with G = u u^T / trace,
//   P = a I + b G + c G^2,   Q = P Q,   G = P G P,
// five times, brings all eigenvalues of G near to 1. But for u all matrices are square and small, and polynomials of G: so they are
// symmetric, of which half is computed, and commute.
// `by` is PlainProducts, or a backend's own. space: Tape::muon_space. output_rows: it is w's rows that are outputs: `in` of them.
template <class By>
void muon_step(float* w, const float* u, int in, int out, int64_t stride, float step_size, float* space, const By& by,
               bool output_rows = false) {
    constexpr int rounds = 5;
    constexpr float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const bool is_wide = in <= out;
    const int n = is_wide ? in : out, depth = is_wide ? out : in;
    const int64_t size = static_cast<int64_t>(n) * n, apart = round_up(size, static_cast<int64_t>(16));
    float *g = space, *p = g + apart, *q = p + apart, *next = q + apart, *other = next + apart;
    const auto square = [&](float* to, const Factor& left, const Factor& right, int k, const float* start) {
        by.product(Product{to, n, start, n, left, right, n, n, k, true});
        mirror(to, n);
    };
    const auto multiply = [&](float* to, const float* left, const float* right, const float* start) {
        square(to, Factor{left, n, along}, Factor{right, n, down}, n, start);
    };
    const Factor rows{u, stride, is_wide ? along : down};  // u, or its transpose: n rows
    square(g, rows, rows, depth, nullptr);
    double trace = 0;
    for (int64_t i = 0; i < n; ++i) trace += static_cast<double>(g[i * n + i]);
    if (!(trace > 1e-30)) return;  // nothing has been learnt: there is no direction
    by.scale(g, g, size, static_cast<float>(1 / trace));
    for (int round = 0; round < rounds; ++round) {
        by.scale(other, g, size, c);
        by.scale(p, g, size, b);
        multiply(p, other, g, p);
        for (int64_t i = 0; i < n; ++i) p[i * n + i] += a;
        if (round == 0) memcpy(q, p, static_cast<size_t>(size) * sizeof(float));
        else {
            multiply(next, p, q, nullptr);
            float* const old = q;
            q = next, next = old;
        }
        if (round == rounds - 1) break;
        multiply(other, p, g, nullptr);
        multiply(g, other, p, nullptr);
    }
    const double outputs = output_rows ? in : out, inputs = output_rows ? out : in;
    const double longer = outputs > inputs ? root(outputs / inputs) : 1;
    by.scale(p, q, size, static_cast<float>(-static_cast<double>(step_size) * longer / root(trace)));
    const Factor scaled{p, n, along}, columns{u, stride, is_wide ? down : along};
    if (is_wide) by.product(Product{w, stride, w, stride, scaled, columns, in, out, in});
    else by.product(Product{w, stride, w, stride, columns, scaled, in, out, out});
}
// The matrices that stand side by side, or one below the other, in a weight.
template <class By>
void muon_steps(const WeightPlan& plan, float* w, const float* u, const Muon& muon, float* space, const By& by) {
    const int rows = static_cast<int>(plan.weight.rows), cols = static_cast<int>(plan.weight.cols);
    for (int i = 0; i < plan.matrices; ++i) {
        const int outputs = plan.outputs[i];
        if (plan.output_rows) muon_step(w, u, outputs, cols, cols, muon.step_size, space, by, true);
        else muon_step(w, u, rows, outputs, cols, muon.step_size, space, by);
        const int64_t next = plan.output_rows ? static_cast<int64_t>(outputs) * cols : outputs;
        w += next, u += next;
    }
}

// ---- the update ----------------------------------------------------------------------------------------------------------

// The sum of squares of n elements, in double, lanes along blocks of 4096 elements, block after block.
constexpr int64_t square_block = 4096;
inline double sum_of_squares(const float* g, int n) {
    const auto wide = [&](int i) { return static_cast<double>(g[i]); };
    return dot_lanes<double>(n, wide, wide);
}

// ---- what a backend is ---------------------------------------------------------------------------------------------------

// A backend takes the whole tape and owns the whole cycle of a step. The fast one follows in chapter 11.
struct BackendFunctions {
    int64_t (*scratch)(const Tape& tape, int threads);  // floats of Regions::scratch
    // Running: how many floats an op's packed copy of its matrix takes (0: the op reads the matrix itself), and how that is made of it.
    int64_t (*packed)(const Tape& tape, const Op& op);
    void (*pack)(Runtime& runtime, const Tape& tape, const Op& op, const float* matrix, float* packed);
    void (*forward)(Runtime& runtime, const Tape& tape, const Regions<float>& r, const Run& run);
    void (*backward)(Runtime& runtime, const Tape& tape, const Regions<float>& r, const Run& run);
    // Adds the lookup gradients to the gradients (and zeroes them), then returns the sum of all squares: block after block, weight after weight.
    double (*square_sum)(Runtime& runtime, const Tape& tape, const Regions<float>& r, double* partial);
    // AdamW or Muon on every weight; gradients become zero, and the activations' memory serves as space.
    void (*update)(Runtime& runtime, const Tape& tape, const Regions<float>& r, float* weights, float* moment1, float* moment2,
                   const UpdateRule& rule);
    // Sampling: the largest of n numbers; and e^((x - biggest) * factor) of each, to `to` (null: nowhere), and their sum.
    float (*biggest)(const float* x, int n);
    float (*exponentials)(float* to, const float* x, int n, float biggest, float factor);
};
// All packed copies, which lie one behind the other.
inline int64_t packed_block(const BackendFunctions& backend, const Tape& tape) {
    int64_t total = 0;
    for (const Op& op : tape.ops) total += backend.packed(tape, op);
    return total;
}
inline void pack_all(const BackendFunctions& backend, Runtime& runtime, const Tape& tape, const float* weights, float* packed) {
    for (const Op& op : tape.ops) {
        const int64_t size = backend.packed(tape, op);
        if (size > 0) backend.pack(runtime, tape, op, weights + tape.weight(op.w).offset, packed);
        packed += size;
    }
}
// Null: not built into this program. With Backend::cuda: what the processor does beside the device.
const BackendFunctions* find_backend(const Runtime& runtime, bool training = false);
// Null: the backend's memory is the processor's own.
inline const DeviceFunctions* find_device(const Runtime& runtime) {
    const DeviceFunctions* device = nullptr;
#if defined(_MSC_VER)
    if (runtime.backend == Backend::cuda) device = babygpt_cuda_device();
#elif defined(__ELF__)
    if (runtime.backend == Backend::cuda && babygpt_cuda_device) device = babygpt_cuda_device();
#endif
    for (size_t i = 0; device && i < 7; ++i)
        if (device->sizes[i] != device_sizes[i]) device = nullptr;
    (void)runtime;
    return device;
}

// How many partial sums square_sum needs.
inline int64_t square_blocks(const Tape& tape) {
    return (tape.learnt_block() + square_block - 1) / square_block + static_cast<int64_t>(tape.learnt().size);
}

template <class T>
void fold_lookup_gradients(const Tape& tape, const Regions<T>& r) {
    for (int k = 0; k < tape.lookups; ++k) {
        T *g = r.gradients + tape.weight(tape.shared_embedding()).offset, *lookup = r.lookup_gradients + k * tape.one_lookup();
        for (int64_t i = 0; i < static_cast<int64_t>(tape.vocab) * tape.width; ++i) g[i] = g[i] + lookup[i], lookup[i] = 0;
    }
}
inline double plain_square_sum(Runtime&, const Tape& tape, const Regions<float>& r, double*) {
    fold_lookup_gradients(tape, r);
    double total = 0;
    for (const WeightPlan& plan : tape.learnt()) {
        const int64_t size = plan.weight.rows * plan.weight.cols;
        for (int64_t i = 0; i < size; i += square_block)
            total += sum_of_squares(r.gradients + plan.weight.offset + i, static_cast<int>(least(square_block, size - i)));
    }
    return total;
}
inline void plain_update(Runtime&, const Tape& tape, const Regions<float>& r, float* w, float* m, float* v, const UpdateRule& rule) {
    for (const WeightPlan& plan : tape.learnt()) {
        const int64_t at = plan.weight.offset, size = plan.weight.rows * plan.weight.cols;
        if (rule.uses_muon && plan.matrices) {
            muon_momentum(w + at, m + at, r.gradients + at, size, rule.muon);
            muon_steps(plan, w + at, r.gradients + at, rule.muon, r.activations, PlainProducts());
        } else adamw(w + at, m + at, v + at, r.gradients + at, size, rule.adam, plan.weight.decay);
    }
    memset(r.gradients, 0, static_cast<size_t>(tape.learnt_block()) * sizeof(float));
}
inline const BackendFunctions* plain_backend() {
    static constexpr BackendFunctions functions = {
        [](const Tape& tape, int) { return plain_scratch(tape); },
        [](const Tape&, const Op&) { return int64_t(0); },
        [](Runtime&, const Tape&, const Op&, const float*, float*) {},
        [](Runtime&, const Tape& tape, const Regions<float>& r, const Run& run) { plain_forward(tape, r, run); },
        [](Runtime&, const Tape& tape, const Regions<float>& r, const Run& run) { plain_backward(tape, r, run); },
        &plain_square_sum,
        &plain_update,
        &biggest_of,
        &exponentials,
    };
    return &functions;
}

}  // namespace
}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 6] The architectures
// =====================================================================================================================
// Each is one function that writes its forward pass down on a tape; its backward pass follows from the ops.

BABYGPT_UNHURRIED_BEGIN

namespace babygpt {
namespace {

// A stack of layers: those of GPT-2 (Radford et al. 2019), of Llama (Touvron et al. 2023), of Vaswani et al. 2017, and what lies between. Weights
// start as normal(0.02); what adds to the residual stream is divided by sqrt(2 * layers), so that the stream's variance does not grow with
// depth. Dropout stands after the embedding, on attention's probabilities and before each addition. Of two names the first is Hugging Face's
// for GPT-2, whose matrices are (in, out), the second that for Llama, whose are (out, in), queries, keys and values apart.
// source: what an encoder says, which each layer then looks at; or nothing.
int record_layers(Tape& t, const Config& c, int x, int layers, bool causal, int source) {
    const bool llama = c.architecture == Architecture::llama;
    const auto name = [&](const char* gpt2, const char* other) { return llama ? other : gpt2; };
    const auto norm = [&](const char* which, int of) { return t.norm(which, of, c.bias && c.norm == Norm::layer, c.norm); };
    const auto linear = [&](const char* which, int of, int out, Activation activation, double deviation) {
        return t.linear(which, of, out, c.bias, activation, deviation);
    };
    const double into_stream = 0.02 / root(2.0 * layers);
    const int kv_width = c.width / c.heads * c.kv_heads;
    const Slice qkv[] = {{"self_attn.q_proj", c.width}, {"self_attn.k_proj", kv_width}, {"self_attn.v_proj", kv_width}};
    const Slice gate_up[] = {{"mlp.gate_proj", c.hidden}, {"mlp.up_proj", c.hidden}};
    // x + f(norm(x)), or norm(x + f(x))
    const auto sub_layer = [&](const char* norm_name, const char* drop, const char* add, const auto& f) {
        const int h = t.drop(drop, f(c.norm_after ? x : norm(norm_name, x)));
        x = t.add(add, x, h);
        if (c.norm_after) x = norm(norm_name, x);
    };
    for (t.layer = 0; t.layer < layers; ++t.layer) {
        sub_layer(name("ln_1", "input_layernorm"), "attn.drop", "attn.add", [&](int h) {
            h = llama ? t.linear("self_attn.qkv", h, qkv, c.bias, Activation::none, 0.02)
                      : linear("attn.c_attn", h, c.width + 2 * kv_width, Activation::none, 0.02);
            if (c.positions == Positions::rotary) h = t.rope(h, c.heads, c.kv_heads);
            h = t.attention(name("attn", "self_attn"), h, c.heads, c.kv_heads, causal ? Sight::causal : Sight::full);
            return linear(name("attn.c_proj", "self_attn.o_proj"), h, c.width, Activation::none, into_stream);
        });
        if (source != nothing)
            sub_layer("ln_cross_attn", "crossattention.drop", "crossattention.add", [&](int h) {
                h = linear("crossattention.q_attn", h, c.width, Activation::none, 0.02);
                const int keys_values = linear("crossattention.c_attn", source, 2 * kv_width, Activation::none, 0.02);
                h = t.attention_to_source("crossattention", h, keys_values, c.heads, c.kv_heads);
                return linear("crossattention.c_proj", h, c.width, Activation::none, into_stream);
            });
        sub_layer(name("ln_2", "post_attention_layernorm"), "mlp.drop", "mlp.add", [&](int h) {
            if (!c.gated) h = linear(name("mlp.c_fc", "mlp.up_proj"), h, c.hidden, c.activation, 0.02);
            else {
                h = llama ? t.linear("mlp.gate_up", h, gate_up, c.bias, Activation::none, 0.02)
                          : linear("mlp.c_fc", h, 2 * c.hidden, Activation::none, 0.02);
                h = t.gate("mlp.gate", h, c.activation);
            }
            return linear(name("mlp.c_proj", "mlp.down_proj"), h, c.width, Activation::none, into_stream);
        });
    }
    t.layer = -1;
    return x;
}

// A Transformer: perhaps an encoder, whose tensors' names begin with "encoder."; the layers that everything has; a head.
void record_transformer(Tape& t, const Config& c) {
    const bool llama = c.architecture == Architecture::llama;
    const char* token_vectors = llama ? "model.embed_tokens.weight" : "wte.weight";
    const auto embed = [&](const char* positions) {
        int x = t.embedding(token_vectors, c.positions == Positions::learned ? positions : nullptr);
        if (c.features > 0 && t.side == Side::text)
            x = t.add("features.add", x, t.linear("features", t.input("features.in", c.features), c.width, false, Activation::none, 0.02));
        if (c.positions == Positions::sinusoidal) x = t.add_waves(x);
        return t.drop("embedding.drop", x);
    };
    const auto last_norm = [&](const char* name, int x) {
        return c.norm_after && !c.norm_last ? x : t.norm(name, x, c.bias && c.norm == Norm::layer, c.norm);
    };
    t.output_rows = llama;
    int source = nothing;
    if (c.encoder_layers > 0) {
        t.side = Side::source, t.block = "encoder.h.";
        source = record_layers(t, c, embed("encoder.wpe.weight"), c.encoder_layers, false, nothing);
        source = last_norm("encoder.ln_f", source);
    }
    t.side = Side::text, t.block = llama ? "model.layers." : "h.";
    int x = record_layers(t, c, embed(llama ? "model.embed_positions.weight" : "wpe.weight"), c.layers, c.causal, source);
    x = last_norm(llama ? "model.norm" : "ln_f", x);
    if (c.classes > 0) t.head("score", t.pool("pool", x, c.pool_first), c.classes, c.bias);
    else t.head("lm_head", x, 0, c.head_bias);
}

// Do its sessions compute on the runtime's device, where there is one?
inline bool runs_on_device(const Config& c) { return c.encoder_layers == 0 && c.causal && c.classes == 0 && c.features == 0; }

// With numbers for what 0 stands for.
Config complete(Config c) {
    if (c.kv_heads == 0) c.kv_heads = c.heads;
    if (c.hidden == 0) c.hidden = c.gated ? round_up(c.width * 8 / 3, 32) : 4 * c.width;
    if (c.classes > 0) c.tied = false;
    return c;
}

// The tape of a config, planned for `rows` tokens of so many sequences at once (and as many sources), perhaps with an adapter.
BABYGPT_RARE Status record(Tape& tape, const Config& config, int rows, bool training, double dropout, int sequences = 1,
                           const AdapterConfig* adapter = nullptr) {
    const Config c = complete(config);
    tape.layers = c.layers, tape.width = c.width, tape.vocab = c.vocab, tape.context = c.context;
    tape.tied = c.tied, tape.training = training, tape.dropout = dropout;
    tape.epsilon = c.norm_epsilon, tape.rope_base = c.rope_base;
    record_transformer(tape, c);
    if (adapter && !tape.no_memory) BABYGPT_TRY(tape.adapt(*adapter));
    return tape.plan(rows, rows > 0 && c.encoder_layers > 0 ? sequences * c.context : 0, rows > 0 ? sequences : 0);
}

}  // namespace

Status preset(Text name, Config& config) {
    struct Preset {
        const char* name;
        int layers, heads, width, context, vocab;
    };
    static constexpr Preset presets[] = {
        {"nano", 2, 2, 32, 32, 0},
        {"tiny", 4, 4, 128, 128, 0},
        {"small", 6, 6, 192, 192, 0},
        {"baby", 6, 6, 384, 192, 0},
        {"gpt2", 12, 12, 768, 1024, 50257},
        {"gpt2-medium", 24, 16, 1024, 1024, 50257},
        {"gpt2-large", 36, 20, 1280, 1024, 50257},
        {"gpt2-xl", 48, 25, 1600, 1024, 50257},
    };
    for (const Preset& p : presets)
        if (equal(name, Text(p.name))) {
            config.layers = p.layers, config.heads = p.heads, config.width = p.width, config.context = p.context;
            if (p.vocab) config.vocab = p.vocab;
            return Status();
        }
    return fail(Error::invalid_argument, "there is no preset '", name,
                "'; there are nano, tiny, small, baby, gpt2, gpt2-medium, gpt2-large and gpt2-xl");
}

Status preset_architecture(Text name, Config& config) {
    const bool llama = equal(name, Text("llama")), first = equal(name, Text("transformer")), lecture = equal(name, Text("lecture"));
    if (!llama && !first && !lecture && !equal(name, Text("gpt2")))
        return fail(Error::invalid_argument, "there is no architecture '", name, "'; there are gpt2, llama, transformer and lecture");
    const Config plain;
    config.architecture = llama ? Architecture::llama : Architecture::gpt2;
    config.kv_heads = config.hidden = 0;
    config.tied = !llama && !lecture, config.bias = !llama;
    config.activation = llama ? Activation::silu : first || lecture ? Activation::relu : plain.activation;
    config.gated = llama;
    config.norm = llama ? Norm::rms : Norm::layer;
    config.norm_after = first || lecture, config.norm_last = config.head_bias = lecture;
    config.norm_epsilon = plain.norm_epsilon, config.rope_base = plain.rope_base;
    config.positions = llama ? Positions::rotary : first ? Positions::sinusoidal : Positions::learned;
    return Status();
}

BABYGPT_RARE Status check(const Config& config) {
    const auto within = [](const char* name, int value, int low, int high) {
        if (value >= low && value <= high) return Status();
        return fail(Error::invalid_argument, name, " is ", value, ", but must be from ", low, " to ", high);
    };
    const auto among = [](const char* name, auto value, auto last, Text words) {
        const int32_t number = static_cast<int32_t>(value);
        return number >= 0 && number <= static_cast<int32_t>(last) ? Status() : fail(Error::invalid_argument, name, " must be ", words);
    };
    BABYGPT_TRY(within("layers", config.layers, 1, 1000));
    BABYGPT_TRY(within("heads", config.heads, 1, 1024));
    BABYGPT_TRY(within("width", config.width, 1, 65536));
    const Config c = complete(config);
    BABYGPT_TRY(within("kv_heads", c.kv_heads, 1, c.heads));
    BABYGPT_TRY(within("hidden", c.hidden, 1, 1000000));
    BABYGPT_TRY(within("context", c.context, 1, 65536));
    BABYGPT_TRY(within("vocab", c.vocab, 1, 10000000));
    BABYGPT_TRY(within("encoder_layers", c.encoder_layers, 0, 1000));
    BABYGPT_TRY(within("classes", c.classes, 0, 1000000));
    BABYGPT_TRY(within("features", c.features, 0, 1000000));
    if (c.encoder_layers > 0 && c.architecture != Architecture::gpt2)
        return fail(Error::invalid_argument, "encoder_layers is ", c.encoder_layers, ", but only the architecture gpt2 has an encoder");
    if (c.encoder_layers > 0 && (!c.causal || c.classes > 0))
        return fail(Error::invalid_argument, "encoder_layers is ", c.encoder_layers,
                    ": such a model's decoder must be causal and have no classes; an encoder alone has 0, and causal false");
    if (c.width % c.heads != 0) return fail(Error::invalid_argument, "width is ", c.width, ", but must be a multiple of heads, ", c.heads);
    if (c.heads % c.kv_heads != 0)
        return fail(Error::invalid_argument, "heads is ", c.heads, ", but must be a multiple of kv_heads, ", c.kv_heads);
    BABYGPT_TRY(among("architecture", c.architecture, Architecture::llama, "gpt2 or llama"));
    BABYGPT_TRY(among("activation", c.activation, Activation::silu, "gelu, gelu_tanh, relu or silu"));
    BABYGPT_TRY(among("norm", c.norm, Norm::rms, "layer or rms"));
    BABYGPT_TRY(among("positions", c.positions, Positions::none, "learned, rotary, sinusoidal or none"));
    if (c.activation == Activation::none) return fail(Error::invalid_argument, "activation must be gelu, gelu_tanh, relu or silu");
    if (!(c.norm_epsilon > 0 && c.norm_epsilon < 1))
        return fail(Error::invalid_argument, "norm_epsilon is ", c.norm_epsilon, ", but must be above 0 and below 1");
    if (!(c.rope_base >= 1 && c.rope_base <= 1e12))
        return fail(Error::invalid_argument, "rope_base is ", c.rope_base, ", but must be from 1 to 1e12");
    if (c.positions != Positions::rotary && c.rope_base != Config().rope_base)
        return fail(Error::invalid_argument, "rope_base is ", c.rope_base, ", but it means something only with rotary positions");
    if (c.positions == Positions::rotary && c.width / c.heads % 2 != 0)
        return fail(Error::invalid_argument, "width / heads is ", c.width / c.heads, ", but rotary positions need an even number");
    return Status();
}

double flops_per_token(const Config& config) {
    const Config c = complete(config);
    const double width = c.width, kv_width = width / c.heads * c.kv_heads, into_hidden = (c.gated ? 2.0 : 1.0) * c.hidden;
    const double linear = width * (2 * width + 2 * kv_width + into_hidden + c.hidden), all = 2 * width * c.context,
                 attention = c.causal ? width * (c.context + 1) : all;
    const double layer = linear + attention + (c.encoder_layers > 0 ? width * (2 * width + 2 * kv_width) + all : 0);
    const double head = c.classes > 0 ? width * c.classes / c.context : width * c.vocab;
    return 2 * (c.layers * layer + c.encoder_layers * (linear + all) + width * c.features + head);
}

// ---- the model -----------------------------------------------------------------------------------------------------------

// Weights that a device has changed, and not given back yet.
struct Borrowed {
    struct TrainerState* by = nullptr;
    Borrowed() = default;
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    ~Borrowed();  // chapter 7: then they are lost
};

// The backend's packed copies of the weights, made once for each version of them and shared by all sessions.
struct ModelState {
    Array<WeightPlan> plans;
    Array<Weight> names;
    Block weights;           // all of them, or ...
    bool only_runs = false;  // ... those that leave_out_packed keeps, and the others only in packed[0]
    Borrowed borrowed;
    Bell lock;
    struct Packed {
        const BackendFunctions* by = nullptr;  // since each has its own layout
        Array<float> floats;
        uint64_t version = 0;
        // Gets memory for the copies that a backend makes for a tape.
        Status take(Runtime& runtime, const Tape& tape, const BackendFunctions& backend, uint64_t of_version) {
            const size_t wanted = static_cast<size_t>(packed_block(backend, tape));
            if (!floats.runtime) floats = Array<float>(runtime);
            if (!floats.reserve(wanted)) return out_of_memory(wanted * sizeof(float));
            floats.count = wanted;
            by = &backend, version = of_version;
            return Status();
        }
    } packed[5];
    struct OnDevice* on_device[2] = {};  // sessions' weights there, in f32 and in bf16; chapter 8
    explicit ModelState(Runtime& runtime) : plans(runtime), names(runtime) {}
    ModelState(const ModelState&) = delete;
    ModelState& operator=(const ModelState&) = delete;
    ~ModelState();
};

namespace {

Status give_back(const Borrowed& borrowed);  // chapter 7: brings them
inline Status bring(const Model& model) {
    if (!model.state) return Status();
    if (!model.state->only_runs) return give_back(model.state->borrowed);
    return fail(Error::unsupported, "the model was loaded only to run, and this needs its weights: load it without Purpose::running");
}
inline float* block_of(const Model& model) { return reinterpret_cast<float*>(model.state->weights.memory); }

// The scales of a matrix in int8, one for each of its rows, or each of its columns.
Status int8_scales(const Weight& weight, const float* w, Array<float>& scales) {
    if (!scales.resize(static_cast<size_t>(weight.scaled_rows ? weight.rows : weight.cols)))
        return out_of_memory(sizeof(float) * static_cast<uint64_t>(weight.cols));
    for (float& scale : scales) scale = 0;
    for (int64_t row = 0; row < weight.rows; ++row)
        for (int64_t col = 0; col < weight.cols; ++col, ++w) {
            float& biggest = scales[static_cast<size_t>(weight.scaled_rows ? row : col)];
            biggest = most(biggest, *w < 0 ? -*w : *w);
        }
    for (float& scale : scales) scale = int8_scale(scale);
    return Status();
}
Status must_be_finite(const Weight& weight, const float* w) {
    for (int64_t i = 0; i < weight.rows * weight.cols; ++i)
        if (!is_finite(w[i])) return fail(Error::not_finite, "'", weight.name, "' holds a number that is not finite");
    return Status();
}
// What Model::convert does to a weight; `scales` is space.
Status round_weight(const Weight& weight, float* w, Dtype to, Array<float>& scales) {
    if (weight.is_vector || to == Dtype::f32) return Status();
    if (to == Dtype::int8) BABYGPT_TRY(int8_scales(weight, w, scales));
    for (int64_t row = 0; row < weight.rows; ++row)
        for (int64_t col = 0; col < weight.cols; ++col, ++w) {
            const float scale = to == Dtype::int8 ? scales[static_cast<size_t>(weight.scaled_rows ? row : col)] : 0;
            *w = to == Dtype::int8 ? static_cast<float>(int8_of(*w, scale)) * scale : bf16_of(*w);
        }
    return Status();
}
// Does a run read this weight itself, not only packed copies of it?
bool is_read(const Tape& tape, const BackendFunctions& backend, int weight) {
    for (const Op& op : tape.ops)
        if (op.b == weight || (op.w == weight && backend.packed(tape, op) == 0)) return true;
    return false;
}
// Makes the weights region of a tape as small as it can be where all packed copies are there. What it leaves out would lie behind the region.
void leave_out_packed(Tape& tape, const BackendFunctions& backend) {
    int64_t end = 0;
    for (int pass = 0; pass < 2; ++pass) {
        const bool stays = pass == 0;
        Weight* name = tape.names.items;
        for (size_t i = 0; i < tape.weights.count; ++i) {
            Weight& weight = tape.weights[i].weight;
            const bool now = is_read(tape, backend, static_cast<int>(i)) == stays;
            const int64_t size = weight.rows * weight.cols;
            if (now) weight.offset = end, end += round_up(size, static_cast<int64_t>(16));
            for (int64_t at = 0; at < size; at += name->rows * name->cols, ++name)
                if (now) name->offset = weight.offset + at;
        }
        if (stays) tape.weight_block = end;
    }
}

// Takes memory for a config's weights, all zero or only what is between them, and names them. only_runs_on: for what this backend reads, and
// for its packed copies.
Status allocate_weights(Runtime& runtime, Model& model, const Config& config, bool zero, const BackendFunctions* only_runs_on = nullptr) {
    BABYGPT_TRY(check(config));
    Tape tape(runtime);
    BABYGPT_TRY(record(tape, config, 0, false, 0));
    tape.dtype = config.dtype;
    if (only_runs_on) leave_out_packed(tape, *only_runs_on);
    ModelState* state = create<ModelState>(runtime, runtime);
    if (!state) return out_of_memory(sizeof(ModelState));
    model.state = state;
    model.runtime = &runtime;
    model.config = complete(config);
    state->names = static_cast<Array<Weight>&&>(tape.names);
    state->plans = static_cast<Array<WeightPlan>&&>(tape.weights);
    size_t bytes;
    if (!product(tape.weight_block, sizeof(float), bytes) || !state->weights.take(runtime, bytes, zero))
        return out_of_memory(static_cast<uint64_t>(tape.weight_block) * sizeof(float));
    float* const block = block_of(model);
    for (size_t i = 0; i < state->plans.count; ++i) {
        const Weight& weight = state->plans[i].weight;
        if (only_runs_on && !is_read(tape, *only_runs_on, static_cast<int>(i))) continue;
        for (int64_t k = weight.rows * weight.cols; k % 16 != 0; ++k) block[weight.offset + k] = 0;
    }
    if (only_runs_on) {
        state->only_runs = true;
        BABYGPT_TRY(state->packed[0].take(runtime, tape, *only_runs_on, model.version = 1));
    } else model.weights = block;
    model.block = tape.weight_block;
    model.parameters = tape.parameters;
    model.names = Span<Weight>(state->names.items, state->names.count);
    model.version = 1;
    model.chat.user_turn = Array<char>(runtime);
    model.chat.reply_turn = Array<char>(runtime);
    model.labels = Array<char>(runtime);
    return Status();
}

// An encoder alone, which learns to fill gaps where it learns from running text.
inline bool fills_gaps(const Config& c) { return !c.causal && c.classes == 0 && c.features == 0; }
// Between or before texts, and no part of them.
inline bool is_mark(const Tokenizer& tokenizer, int32_t id) { return id == tokenizer.end_of_text || id == tokenizer.begin_of_text; }
BABYGPT_RARE int32_t mask_of(const Tokenizer& tokenizer) {
    for (size_t i = 0; tokenizer.tables && i < tokenizer.tables->specials.count; ++i) {
        const int32_t id = tokenizer.tables->specials[i];
        const Text name = tokenizer.tables->bytes(id);
        if (equal(name, "[MASK]") || equal(name, "<mask>")) return id;
    }
    return -1;
}

// Two independent normal numbers, by Marsaglia's polar method; the counter's next values serve where a point falls outside the circle.
void normal_pair(uint64_t key, uint64_t i, double& first, double& second) {
    for (uint64_t attempt = 0;; ++attempt) {
        const double u = 2 * random_uniform(key, (i << 8) + 2 * attempt) - 1, v = 2 * random_uniform(key, (i << 8) + 2 * attempt + 1) - 1;
        const double s = u * u + v * v;
        if (s >= 1 || s == 0) continue;
        const double factor = root(-2 * log_of(s) / s);
        first = u * factor, second = v * factor;
        return;
    }
}

}  // namespace

Model::Model(Model&& other) noexcept { *this = static_cast<Model&&>(other); }
Model& Model::operator=(Model&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    config = other.config;
    tokenizer = static_cast<Tokenizer&&>(other.tokenizer);
    chat.user_turn = static_cast<Array<char>&&>(other.chat.user_turn);
    chat.reply_turn = static_cast<Array<char>&&>(other.chat.reply_turn);
    chat.plain_words = other.chat.plain_words;
    labels = static_cast<Array<char>&&>(other.labels);
    weights = other.weights, parameters = other.parameters, block = other.block, names = other.names;
    version = other.version, runtime = other.runtime, state = other.state;
    other.weights = nullptr, other.state = nullptr, other.names = Span<Weight>();
    other.parameters = other.block = 0;
    return *this;
}
Model::~Model() {
    if (state) destroy(*runtime, state);
}

Status Model::create(Runtime& from, const Config& wanted, Tokenizer&& taken, uint64_t seed) {
    const FloatMode mode;
    Config full = wanted;
    if (full.vocab == 0) full.vocab = taken.vocab + (fills_gaps(full) && mask_of(taken) < 0);
    if (full.vocab < taken.vocab) return fail(Error::mismatch, "vocab is ", full.vocab, ", but the tokenizer has ", taken.vocab, " ids");
    Tokenizer kept = static_cast<Tokenizer&&>(taken);  // it may be this model's own
    *this = Model();
    BABYGPT_TRY(allocate_weights(from, *this, full, true));
    tokenizer = static_cast<Tokenizer&&>(kept);
    for (size_t t = 0; t < state->plans.count; ++t) {
        const WeightPlan& plan = state->plans[t];
        const uint64_t key = random_key(seed, 0, random_weights, t);
        const int64_t size = plan.weight.rows * plan.weight.cols;
        float* w = weights + plan.weight.offset;
        if (plan.deviation < 0)
            for (int64_t i = 0; i < size; ++i) w[i] = 1;
        else if (plan.deviation > 0)
            for (int64_t i = 0; i < size; i += 2) {
                double pair[2];
                normal_pair(key, static_cast<uint64_t>(i), pair[0], pair[1]);
                for (int64_t j = i; j < least(i + 2, size); ++j) w[j] = static_cast<float>(plan.deviation * pair[j - i]);
            }
    }
    return full.dtype == Dtype::f32 ? Status() : convert(full.dtype);
}
Status Model::convert(Dtype to) {
    const FloatMode mode;
    if (!state) return fail(Error::invalid_argument, "an empty model cannot be converted");
    BABYGPT_TRY(bring(*this));
    for (const Weight& weight : names) BABYGPT_TRY(must_be_finite(weight, weights + weight.offset));
    Array<float> scales(*runtime);
    for (const Weight& weight : names) BABYGPT_TRY(round_weight(weight, weights + weight.offset, to, scales));
    config.dtype = to;
    ++version;
    return Status();
}

const Weight* Model::find(Text name) const {
    for (const Weight& weight : names)
        if (equal(name, Text(weight.name))) return &weight;
    return nullptr;
}

// ---- the adapter ---------------------------------------------------------------------------------------------------------

struct AdapterState {
    Array<Weight> names;
    Array<char> targets;
    Block weights;
    Borrowed borrowed;
    Architecture architecture = Architecture::gpt2;  // of its model
    explicit AdapterState(Runtime& runtime) : names(runtime), targets(runtime) {}
};

namespace {

// The matrices of all layers.
Text all_targets(const Config& c) {
    if (c.architecture == Architecture::gpt2) return c.encoder_layers > 0 ? "c_attn,c_proj,c_fc,q_attn" : "c_attn,c_proj,c_fc";
    return c.gated ? "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj" : "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj";
}

// Each of the targets names a matrix.
Status check_targets(const Tape& tape, Text targets) {
    for (size_t at = 0; at <= targets.size;) {
        size_t end = at;
        while (end < targets.size && targets[end] != ',') ++end;
        const Text target(targets.data + at, end - at);
        bool found = false;
        for (const WeightPlan& plan : tape.adapter) {
            const Text name(plan.weight.name);
            found = found || Tape::is_target(Text(name.data, name.size - Text(".lora_A.weight").size), target);
        }
        if (!found) return fail(Error::invalid_argument, "no matrix of the model's layers is called '", target, "'");
        at = end + 1;
    }
    return Status();
}

// Is this what the tape's model can use?
Status check_adapter(const Tape& tape, const Adapter& adapter) {
    bool same = tape.adapter.count == adapter.names.size;
    for (size_t i = 0; same && i < tape.adapter.count; ++i) {
        const Weight &a = tape.adapter[i].weight, &b = adapter.names[i];
        same = equal(Text(a.name), Text(b.name)) && a.rows == b.rows && a.cols == b.cols;
    }
    return same ? Status() : fail(Error::mismatch, "the adapter was made for a model of another shape");
}

Status check(const AdapterConfig& config) {
    if (config.rank < 1 || config.rank > 65536)
        return fail(Error::invalid_argument, "rank is ", config.rank, ", but must be from 1 to 65536");
    if (!(config.alpha > 0) || !is_finite(config.alpha))
        return fail(Error::invalid_argument, "alpha is ", config.alpha, ", but must be above 0");
    return Status();
}

// Memory for its weights, all zero, and their names.
BABYGPT_RARE Status allocate_adapter(Runtime& runtime, const Model& model, const AdapterConfig& config, Adapter& adapter) {
    adapter = Adapter();
    if (!model.state) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    BABYGPT_TRY(check(config));
    AdapterState* const state = create<AdapterState>(runtime, runtime);
    if (!state) return out_of_memory(sizeof(AdapterState));
    adapter.runtime = &runtime, adapter.state = state;
    if (!append(state->targets, config.targets.size > 0 ? config.targets : all_targets(model.config))) return out_of_memory(64);
    adapter.config = config, adapter.config.targets = view(state->targets);
    state->architecture = model.config.architecture;
    Tape tape(runtime);
    BABYGPT_TRY(record(tape, model.config, 0, false, 0, 1, &adapter.config));
    BABYGPT_TRY(check_targets(tape, adapter.config.targets));
    for (const WeightPlan& plan : tape.adapter)
        if (!state->names.push(plan.weight)) return out_of_memory(sizeof(Weight));
    size_t bytes;
    if (!product(tape.adapter_block, sizeof(float), bytes) || !state->weights.take(runtime, bytes, true))
        return out_of_memory(static_cast<uint64_t>(tape.adapter_block) * sizeof(float));
    adapter.weights = reinterpret_cast<float*>(state->weights.memory);
    adapter.parameters = tape.adapter_parameters, adapter.block = tape.adapter_block;
    adapter.names = Span<Weight>(state->names.items, state->names.count);
    adapter.version = 1;
    return Status();
}

}  // namespace

Adapter::Adapter(Adapter&& other) noexcept { *this = static_cast<Adapter&&>(other); }
Adapter& Adapter::operator=(Adapter&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    config = other.config, weights = other.weights, parameters = other.parameters, block = other.block, names = other.names;
    version = other.version, runtime = other.runtime, state = other.state;
    other.weights = nullptr, other.state = nullptr, other.names = Span<Weight>(), other.config = AdapterConfig();
    other.parameters = other.block = 0;
    return *this;
}
Adapter::~Adapter() {
    if (state) destroy(*runtime, state);
}

// A: uniform up to 1 / sqrt(in), as PEFT has it. B: 0.
Status Adapter::create(Runtime& from, const Model& model, const AdapterConfig& wanted, uint64_t seed) {
    const FloatMode mode;
    Adapter made;
    BABYGPT_TRY(allocate_adapter(from, model, wanted, made));
    for (size_t t = 0; t < made.names.size; t += 2) {
        const Weight& a = made.names[t];
        const uint64_t key = random_key(seed, 1, random_weights, t);
        const double most_of_it = 1 / root(static_cast<double>(a.cols));
        for (int64_t i = 0; i < a.rows * a.cols; ++i)
            made.weights[a.offset + i] = static_cast<float>((2 * random_uniform(key, static_cast<uint64_t>(i)) - 1) * most_of_it);
    }
    *this = static_cast<Adapter&&>(made);
    return Status();
}

Status merge(Model& model, const Adapter& adapter) {
    const FloatMode mode;
    if (!model.state || !adapter.weights) return fail(Error::invalid_argument, "an empty model or adapter cannot be merged");
    BABYGPT_TRY(bring(model));
    BABYGPT_TRY(give_back(adapter.state->borrowed));
    Tape tape(*model.runtime);
    BABYGPT_TRY(record(tape, model.config, 0, false, 0, 1, &adapter.config));
    BABYGPT_TRY(check_adapter(tape, adapter));
    const double scale = adapter.config.alpha / adapter.config.rank;
    const bool output_rows = tape.output_rows;
    for (const Op& op : tape.ops)
        for (int n = 0; n < op.loras; ++n) {
            const Lora& lora = tape.loras[static_cast<size_t>(op.lora + n)];
            const auto matrix = [&](int index) { return adapter.weights + tape.adapter[static_cast<size_t>(index)].weight.offset; };
            const float *a = matrix(lora.a), *b = matrix(lora.b);
            float* w = model.weights + tape.weight(op.w).offset + (output_rows ? static_cast<int64_t>(lora.first) * op.in : lora.first);
            for (int64_t o = 0; o < lora.outputs; ++o)
                for (int64_t i = 0; i < op.in; ++i) {
                    double sum = 0;
                    for (int64_t k = 0; k < tape.rank; ++k)
                        sum += static_cast<double>(b[o * tape.rank + k]) * static_cast<double>(a[k * op.in + i]);
                    float& to = w[output_rows ? o * op.in + i : i * op.out + o];
                    to = static_cast<float>(static_cast<double>(to) + scale * sum);
                }
        }
    model.config.dtype = Dtype::f32;
    ++model.version;
    return Status();
}

Status Model::set_chat(Text user_turn, Text reply_turn, bool plain_words) {
    if (!runtime) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    chat.plain_words = plain_words;
    if (!is_utf8(user_turn) || !is_utf8(reply_turn)) return fail(Error::invalid_argument, "a chat's turns must be UTF-8");
    chat.user_turn = Array<char>(*runtime);
    chat.reply_turn = Array<char>(*runtime);
    if (!append(chat.user_turn, user_turn) || !append(chat.reply_turn, reply_turn)) return out_of_memory(user_turn.size + reply_turn.size);
    return Status();
}

Status Model::set_labels(Text lines) {
    if (!runtime) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    int count = 0;
    for (const char c : lines) count += c == '\n';
    if (!is_utf8(lines) || (lines.size > 0 && lines[lines.size - 1] != '\n'))
        return fail(Error::invalid_argument, "the names of classes must be UTF-8, and a line each");
    if (count != config.classes)
        return fail(Error::invalid_argument, "there are ", count, " names of classes, but ", config.classes, " classes");
    labels = Array<char>(*runtime);
    return append(labels, lines) ? Status() : out_of_memory(lines.size);
}
Text Model::label(int of) const {
    size_t start = 0;
    for (size_t i = 0; i < labels.count; ++i) {
        if (labels[i] != '\n') continue;
        if (of-- == 0) return Text(labels.items + start, i - start);
        start = i + 1;
    }
    return Text();
}

int Model::copy_weights(const Model& from) {
    int copied = 0;
    if (!bring(*this).ok() || !bring(from).ok()) return 0;
    for (const Weight& weight : names) {
        const Weight* there = from.find(weight.name);
        if (!there || there->rows != weight.rows || there->cols != weight.cols) continue;
        memcpy(weights + weight.offset, from.weights + there->offset, static_cast<size_t>(weight.rows * weight.cols) * sizeof(float));
        ++copied;
    }
    ++version;
    return copied;
}

int32_t mask_id(const Model& model) {
    const int32_t mask = mask_of(model.tokenizer);
    return mask >= 0 || model.tokenizer.vocab >= model.config.vocab ? mask : model.config.vocab - 1;
}

}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 7] Learning
// =====================================================================================================================
// From text to a trained model, in this order: where the text comes from (files to documents to pieces), the ids and the order in which
// training sees them, what mere counting achieves on them; then the optimizer, the schedule and the loop that trains.

namespace babygpt {
namespace {

// ---- where the text comes from ---------------------------------------------------------------------------------------

constexpr size_t piece_bytes = size_t(1) << 20;     // what is read from a file and tokenized at once
constexpr size_t longest_piece = size_t(64) << 20;  // where no white space offers a place to cut
constexpr size_t most_marks = 1024;

// A file, or a text in memory. What cannot be read again (standard input, a pipe) is kept in memory.
struct Source {
    Array<char> name;
    TextFormat format = TextFormat::text;
    Array<char> kept;
    Text memory;
    bool in_memory = false;
    uint64_t size = 0;   // in bytes, as it was when the corpus was opened
    uint64_t first = 0;  // where the text or the first record begins: after the byte order mark and the header line
    uint64_t first_line = 1;
    size_t column = 0, columns = 0;  // csv: the one to read, and how many there are
    explicit Source(Runtime& runtime) : name(runtime), kept(runtime) {}
};

// Where reading can begin: before a piece of a document.
struct Place {
    size_t source = 0;
    uint64_t offset = 0;  // in the source. text: of the next byte; jsonl, csv: of the record
    uint64_t line = 1;    // jsonl, csv: of the record, for messages
    uint64_t inside = 0;  // bytes of the document before this place
    uint64_t text = 0;    // bytes of text before this place, over all documents
};

}  // namespace

struct CorpusState {
    Runtime& runtime;
    Array<Source*> sources;
    Array<char> field, column;
    bool split_documents = false;
    uint64_t bytes = 0, training_bytes = 0;
    Array<Place> marks;             // places at about equal distances, so that reading can begin anywhere without a long search
    uint64_t stride = piece_bytes;  // between two marks
    explicit CorpusState(Runtime& from) : runtime(from), sources(from), field(from), column(from), marks(from) {}
    ~CorpusState() {
        for (Source* source : sources) destroy(runtime, source);
    }
    Text field_name() const { return field.count ? view(field) : Text("text"); }
    Text column_name() const { return column.count ? view(column) : Text("text"); }
};

namespace {

// When there are too many marks, every second one goes.
bool add_mark(CorpusState& corpus, const Place& place) {
    Array<Place>& marks = corpus.marks;
    if (marks.count > 0 && place.text < marks[marks.count - 1].text + corpus.stride) return true;
    if (marks.count == most_marks) {
        for (size_t i = 0; i < most_marks / 2; ++i) marks[i] = marks[2 * i];
        marks.count = most_marks / 2;
        corpus.stride *= 2;
    }
    return marks.push(place);
}

inline bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
inline bool is_inside_character(char c) { return (static_cast<unsigned char>(c) & 0xc0u) == 0x80; }

// May text be cut before byte `at`, so that the tokens of the two parts are those of the whole? Before white space that follows
// something else: there GPT-2's pre-tokenization always begins a new word. (c2, e1 9a, e2 80, e2 81 and e3 80 begin all white space
// beyond ASCII; that they begin other characters, too, only makes places to cut rarer.)
inline bool may_cut(Text text, size_t at) {
    if (at < 3 || !is_ascii_space(text[at])) return false;
    unsigned char before[3];
    memcpy(before, text.data + at - 3, 3);
    if (before[2] < 0x80) return before[2] > ' ';
    const unsigned start = static_cast<unsigned>(before[0] << 8 | before[1]);
    return before[1] != 0xc2 && start != 0xe19a && start != 0xe280 && start != 0xe281 && start != 0xe380;
}

// One row of a CSV file (RFC 4180) at the start of `rest`.
struct Row {
    size_t size = 0;     // bytes, with the line end
    uint64_t lines = 0;  // line ends, with those inside of quotes
    size_t fields = 0;
    const char* problem = nullptr;
};
// Calls field(index, text, quoted) for each field, its text without the outer quotes. False: the row does not end in `rest`, and there is
// more to read.
template <class F>
bool scan_row(Text rest, bool is_all, Row& row, const F& field) {
    row = Row();
    for (size_t at = 0;; ++at) {
        const size_t start = at;
        const bool quoted = at < rest.size && rest[at] == '"';
        Text value;
        if (quoted) {
            do {  // to the quote that is not doubled
                const void* quote = memchr(rest.data + at + 1, '"', rest.size - at - 1);
                if (!quote) row.problem = "a quoted field does not end";
                if (!quote) return is_all;
                at = static_cast<size_t>(static_cast<const char*>(quote) - rest.data) + 1;
            } while (at < rest.size && rest[at] == '"');
            value = Text(rest.data + start + 1, at - start - 2);
            for (char c : value) row.lines += c == '\n';
            if (at + 1 < rest.size && rest[at] == '\r' && rest[at + 1] == '\n') ++at;
        } else {
            while (at < rest.size && rest[at] != ',' && rest[at] != '\n') ++at;
            const bool cr = at < rest.size && rest[at] == '\n' && at > start && rest[at - 1] == '\r';
            value = Text(rest.data + start, at - start - cr);
        }
        if (!is_all && rest.size - at < 2) return false;  // what follows may decide: a second quote, a line end of two bytes
        field(row.fields++, value, quoted);
        row.size = at;
        if (at == rest.size) return true;
        if (rest[at] == '\n') return ++row.size, ++row.lines, true;
        if (rest[at] != ',') return row.problem = "something follows the closing quote of a field", true;
    }
}
// Doubled quotes become one.
inline bool append_field(Array<char>& to, Text value, bool quoted) {
    for (size_t at = 0; at < value.size;) {
        const void* quote = quoted ? memchr(value.data + at, '"', value.size - at) : nullptr;
        const size_t end = quote ? static_cast<size_t>(static_cast<const char*>(quote) - value.data) + 1 : value.size;
        if (!to.append(value.data + at, end - at)) return false;
        at = end + (quote != nullptr);
    }
    return true;
}

// Where a block of lines ends: before the line end that an empty line or nothing follows. False: not in `rest`, and there is more to read.
inline bool find_block_end(Text rest, bool is_all, size_t& end) {
    end = rest.size;
    for (size_t at = 0; at < rest.size; ++at) {
        const void* line_end = memchr(rest.data + at, '\n', rest.size - at);
        if (!line_end) break;
        at = static_cast<size_t>(static_cast<const char*>(line_end) - rest.data);
        const size_t left = rest.size - at - 1;
        if (!is_all && left < 2) return false;
        if (left == 0 || rest[at + 1] == '\n' || (left > 1 && rest[at + 1] == '\r' && rest[at + 2] == '\n')) {
            end = at - (at > 0 && rest[at - 1] == '\r');
            return true;
        }
    }
    return is_all;
}

// What people take for a text; none of them begins as one.
BABYGPT_RARE Status must_be_text(Text name, Text begin) {
    const char* const others[][2] = {{"\xff\xfe", "in UTF-16"},
                                     {"\xfe\xff", "in UTF-16"},
                                     {"\x1f\x8b", "packed by gzip"},
                                     {"PK\x03\x04", "a zip archive, as .docx and .xlsx are"},
                                     {"%PDF-", "a PDF"}};
    for (const auto& other : others)
        if (starts_with(begin, other[0]))
            return fail(Error::bad_file, "'", name, "' is ", other[1], ": what is read is text in UTF-8, csv or jsonl; convert it first");
    return Status();
}

// Reads a corpus in order, in pieces of documents. Sources are seen through a window that moves forward, and grows only as far as one
// piece or record needs.
struct Reader {
    const CorpusState& corpus;
    Place place;        // of the next piece
    Place from;         // of the piece that was read last,
    Text piece;         // the piece,
    bool ends = false;  // and whether its document ends with it

    explicit Reader(const CorpusState& of) : corpus(of), file(of.runtime), buffer(of.runtime), record(of.runtime) {}

    void go_to(const Place& to) {
        place = to;
        has_record = false;
    }
    // To the text's byte `text`. The piece that is read next begins there.
    Status seek(uint64_t text) {
        Place nearest;
        size_t low = 0, high = corpus.marks.count;
        while (low < high) {
            const size_t middle = (low + high) / 2;
            if (corpus.marks[middle].text <= text) nearest = corpus.marks[middle], low = middle + 1;
            else high = middle;
        }
        go_to(nearest);
        for (bool found = true; found && place.text < text;) {
            BABYGPT_TRY(next(found));
            if (place.text <= text) continue;
            const uint64_t skipped = text - from.text;
            go_to(from);
            if (source().format == TextFormat::text) place.offset += skipped;
            place.inside += skipped;
            place.text = text;
        }
        return Status();
    }
    // The next piece; `found` is false after the last.
    Status next(bool& found) {
        BABYGPT_TRY(find_document(found));
        if (!found) return Status();
        from = place;
        size_t size = 0;
        ends = false;
        for (size_t limit = piece_bytes; size == 0; limit *= 2) {
            Text rest;
            bool is_all = false;
            BABYGPT_TRY(rest_of_document(limit + 1, rest, is_all));
            piece = rest;
            if (is_all && rest.size <= limit) {
                ends = true;
                break;
            }
            const size_t searched = limit == piece_bytes ? 0 : limit / 2;
            for (size = limit; size > searched && !may_cut(rest, size);) --size;
            if (size > searched) continue;
            size = 0;
            if (limit < longest_piece) continue;
            for (size = limit; size > limit - 4 && is_inside_character(rest[size]);) --size;
        }
        if (!ends) piece.size = size;
        place.text += piece.size;
        if (source().format == TextFormat::text) place.offset += piece.size;
        place.inside += piece.size;
        if (ends) end_document();
        return Status();
    }
    // The next piece of the text before byte `end`, where a document may be cut.
    Status next_before(uint64_t end, bool& found) {
        found = place.text < end;
        if (found) BABYGPT_TRY(next(found));
        if (!found || place.text <= end) return Status();
        found = from.text < end;
        piece.size = static_cast<size_t>(end - from.text);
        ends = false;
        return Status();
    }
    // Reads the beginning of a source: a byte order mark, a header line.
    Status start(size_t index, Source& of) {
        Place at;
        at.source = index;
        go_to(at);
        BABYGPT_TRY(enter());
        BABYGPT_TRY(fill(5));
        if (starts_with(unread(), "\xef\xbb\xbf")) of.first = place.offset = 3;
        BABYGPT_TRY(must_be_text(view(of.name), unread()));
        if (of.format != TextFormat::csv || of.size == of.first) return Status();
        Array<char> name(corpus.runtime);
        bool good = true;
        char names[160];
        Line list(names, sizeof names);
        Row row;
        bool there = false;
        BABYGPT_TRY(read_row(row, [&](size_t i, Text value, bool quoted) {
            if (i == 0) list.count = 0, there = false;
            name.count = 0;
            good &= append_field(name, value, quoted);
            if (!there && equal(view(name), corpus.column_name())) there = true, of.column = i;
            if (i > 0) list.put(", ");
            list.put(view(name));
        }));
        if (!good) return out_of_memory(row.size);
        if (!there)
            return fail(Error::bad_file, "'", view(of.name), "', line 1: no column '", corpus.column_name(),
                        "'; there are: ", Text(names, list.count));
        of.columns = row.fields;
        of.first += row.size;
        of.first_line += row.lines;
        return Status();
    }

 private:
    File file;
    size_t opened = SIZE_MAX;  // the source that `file` is
    size_t seen = SIZE_MAX;    // the source that the window is over
    Array<char> buffer;
    Text window;
    uint64_t window_at = 0;
    Array<char> record;  // jsonl, csv: the text of the record at `place`
    bool has_record = false;
    uint64_t record_end = 0, record_lines = 0;

    const Source& source() const { return *corpus.sources[place.source]; }
    Text unread() const {
        const size_t read = static_cast<size_t>(place.offset - window_at);
        return Text(window.data + read, window.size - read);
    }
    bool is_all_read() const { return window_at + window.size == source().size; }

    // Puts the window over the place.
    Status enter() {
        if (seen == place.source && place.offset >= window_at && place.offset - window_at <= window.size) return Status();
        const Source& of = source();
        seen = place.source;
        window = of.memory;
        window_at = of.in_memory ? 0 : place.offset;
        if (of.in_memory || opened == seen) return Status();
        opened = SIZE_MAX;
        (void)file.close();
        BABYGPT_TRY(file.open(view(of.name), FileMode::read));
        opened = seen;
        return Status();
    }
    // Makes at least `wanted` bytes unread, or all that are left.
    Status fill(uint64_t wanted) {
        const Text rest = unread();
        if (rest.size >= wanted || is_all_read()) return Status();
        const uint64_t at = place.offset + rest.size, more = least(most(wanted - rest.size, uint64_t(piece_bytes)), source().size - at);
        if (rest.size) memmove(buffer.items, rest.data, rest.size);
        buffer.count = rest.size;
        window = view(buffer), window_at = place.offset;
        size_t total;
        if (!product(rest.size + more, 1, total) || !buffer.reserve(total)) return out_of_memory(rest.size + more);
        int64_t got;
        BABYGPT_TRY(file.read(static_cast<int64_t>(at), buffer.items + rest.size, static_cast<int64_t>(more), got));
        buffer.count += static_cast<size_t>(got);
        window = view(buffer);
        if (static_cast<uint64_t>(got) == more) return Status();
        return fail(Error::cannot_read, "'", view(source().name), "' has become shorter than the ", source().size, " bytes that it had");
    }
    void end_document() {
        place.inside = 0;
        if (source().format == TextFormat::text) return;
        place.offset = record_end, place.line += record_lines;
        has_record = false;
    }
    // To the next document that holds any text, unless the place is inside of one.
    Status find_document(bool& found) {
        for (found = true; place.source < corpus.sources.count; ++place.source, place.offset = 0, place.line = 1) {
            const Source& of = source();
            if (place.offset < of.first) place.offset = of.first, place.line = of.first_line;
            BABYGPT_TRY(enter());
            if (of.format == TextFormat::text) {
                BABYGPT_TRY(fill(1));
                if (corpus.split_documents && place.inside == 0) BABYGPT_TRY(skip_empty_lines());
                if (unread().size > 0) return Status();
                continue;
            }
            for (bool more = true;;) {
                if (!has_record) BABYGPT_TRY(of.format == TextFormat::csv ? read_csv(more) : read_line(more));
                if (!more) break;
                if (place.inside < record.count) return Status();
                end_document();
            }
        }
        found = false;
        return Status();
    }
    Status skip_empty_lines() {
        for (;;) {
            BABYGPT_TRY(fill(2));
            const Text rest = unread();
            const bool cr = starts_with(rest, "\r\n");
            if (!cr && !starts_with(rest, "\n")) return Status();
            place.offset += cr ? 2 : 1;
        }
    }
    // What is left of the document; when it is not all, at least `wanted` bytes of it.
    Status rest_of_document(size_t wanted, Text& rest, bool& is_all) {
        if (source().format != TextFormat::text) {
            const size_t inside = static_cast<size_t>(place.inside);
            rest = Text(record.items + inside, record.count - inside);
            is_all = true;
            return Status();
        }
        size_t end = 0;
        if (corpus.split_documents && find_block_end(unread(), is_all_read(), end)) {
            rest = Text(unread().data, end);
            is_all = true;
            return Status();
        }
        BABYGPT_TRY(fill(wanted));
        rest = unread();
        is_all = is_all_read();
        if (corpus.split_documents && find_block_end(rest, is_all, end)) rest.size = end, is_all = true;
        return Status();
    }
    template <class F>
    Status read_row(Row& row, const F& field) {
        while (!scan_row(unread(), is_all_read(), row, field)) BABYGPT_TRY(fill(2 * static_cast<uint64_t>(unread().size) + 1));
        if (row.problem) return fail(Error::bad_file, "'", view(source().name), "', line ", place.line, ": ", row.problem);
        return Status();
    }
    // The record at the place. `more`: there was one.
    Status read_csv(bool& more) {
        BABYGPT_TRY(fill(1));
        more = unread().size > 0;
        if (!more) return Status();
        const Source& of = source();
        Row row;
        Text value;
        bool is_quoted = false;
        BABYGPT_TRY(read_row(row, [&](size_t i, Text text, bool quoted) {
            if (i == of.column || i == 0) value = text, is_quoted = quoted;
        }));
        const bool is_empty_line = row.fields == 1 && value.size == 0;
        if (row.fields != of.columns && !is_empty_line)
            return fail(Error::bad_file, "'", view(of.name), "', line ", place.line, ": ", uint64_t(row.fields),
                        " fields, but the header line has ", uint64_t(of.columns));
        record.count = 0;
        if (!append_field(record, value, is_quoted)) return out_of_memory(value.size);
        has_record = true;
        record_end = place.offset + row.size, record_lines = row.lines;
        return Status();
    }
    // jsonl, tsv
    Status read_line(bool& more) {
        BABYGPT_TRY(fill(1));
        more = unread().size > 0;
        if (!more) return Status();
        const void* line_end;
        for (uint64_t searched = 0; !(line_end = memchr(unread().data + searched, '\n', unread().size - static_cast<size_t>(searched)));) {
            if (is_all_read()) break;
            searched = unread().size;
            BABYGPT_TRY(fill(2 * searched));
        }
        Text line = unread();
        if (line_end) line.size = static_cast<size_t>(static_cast<const char*>(line_end) - line.data);
        record.count = 0;
        has_record = true;
        record_end = place.offset + line.size + (line_end != nullptr), record_lines = 1;
        if (source().format == TextFormat::tsv) {
            if (line.size > 0 && line[line.size - 1] == '\r') --line.size;
            return append(record, line) ? Status() : out_of_memory(line.size);
        }
        size_t blank = 0;
        while (blank < line.size && is_ascii_space(line[blank])) ++blank;
        return blank == line.size ? Status() : parse_jsonl(line);
    }
    Status parse_jsonl(Text line) {
        const Text field = corpus.field_name();
        char where[192], names[160];
        Line name(where, sizeof where), list(names, sizeof names);
        name.put(view(source().name));
        name.put("', line ");
        name.put(place.line);
        Json json(corpus.runtime, line);
        bool there = false, is_string = true;
        for (json.enter_object(); json.next_key();) {
            if (list.count > 0) list.put(", ");
            list.put(view(json.key));
            if (!json.key_is(field)) json.skip();
            else if (there = true, is_string = json.peek() == JsonType::string; is_string) json.string(record);
            else json.skip();
        }
        const Status status = json.finish("line");
        if (status.error == Error::out_of_memory) return status;
        if (!status.ok()) return fail(status.error, "'", Text(where), ", byte ", uint64_t(json.at), ": ", json.problem);
        if (!there) return fail(Error::bad_file, "'", Text(where), ": no field '", field, "'; there are: ", Text(names));
        if (!is_string) return fail(Error::bad_file, "'", Text(where), ": the field '", field, "' is not a string");
        return Status();
    }
};

// A name's ending decides the format.
inline TextFormat format_of(Text name) {
    if (ends_with(name, ".jsonl") || ends_with(name, ".ndjson")) return TextFormat::jsonl;
    return ends_with(name, ".csv") ? TextFormat::csv : ends_with(name, ".tsv") ? TextFormat::tsv : TextFormat::text;
}

// Standard input to its end.
inline Status read_standard_input(Array<char>& bytes) {
    constexpr size_t part = 1 << 16;
    for (size_t got = part; got == part; bytes.count += got) {
        if (!bytes.reserve(bytes.count + part)) return out_of_memory(bytes.count + part);
        got = fread(bytes.items + bytes.count, 1, part, stdin);
    }
    return ferror(stdin) ? fail(Error::cannot_read, "cannot read standard input") : Status();
}

// Where the validation part begins. The split point lies `validation_fraction` of the bytes before the end. When a document begins there,
// this is it. A split point inside of a document moves to the document's end; but the last document, or one of more than a 20th of the
// text, is cut (no line of a tsv file is): after the first line end, or else before the first white space, or else at the first character that follows the split point
// (no farther than 64 KiB and half of the validation part).
inline Status find_split(CorpusState& corpus, double validation_fraction, uint64_t validation_limit) {
    const uint64_t bytes = corpus.bytes, wanted = static_cast<uint64_t>(validation_fraction * static_cast<double>(bytes));
    const uint64_t split = bytes - least(validation_limit > 0 ? least(wanted, validation_limit) : wanted, bytes);
    corpus.training_bytes = split;
    if (split == 0 || split == bytes) return Status();
    Reader reader(corpus);
    BABYGPT_TRY(reader.seek(split));
    if (reader.place.inside == 0) return Status();
    const uint64_t begin = split - reader.place.inside;
    const Place at_split = reader.place;
    const bool whole = corpus.sources[at_split.source]->format == TextFormat::tsv;
    bool found = true;
    for (reader.ends = false; found && !reader.ends && (whole || reader.place.text - begin <= bytes / 20);) BABYGPT_TRY(reader.next(found));
    corpus.training_bytes = reader.place.text;
    if (whole || (reader.place.text - begin <= bytes / 20 && reader.place.text < bytes)) return Status();

    reader.go_to(at_split);
    BABYGPT_TRY(reader.next(found));
    const Text text = reader.piece;
    const size_t limit = static_cast<size_t>(least(uint64_t(least(text.size, size_t(1) << 16)), (bytes - split + 1) / 2));
    size_t line = 0, space = 0, character = 0;
    while (line < limit && text[line] != '\n') ++line;
    while (space < limit && !is_ascii_space(text[space])) ++space;
    while (character < limit && is_inside_character(text[character])) ++character;
    corpus.training_bytes = split + (line + 1 < limit ? line + 1 : space < limit ? space : character < limit ? character : 0);
    return Status();
}

inline Status open_corpus(CorpusState& state, const CorpusConfig& config, uint64_t& documents) {
    if (!(config.validation_fraction >= 0 && config.validation_fraction < 1))
        return fail(Error::invalid_argument, "validation_fraction is ", config.validation_fraction, ", but must be at least 0 and below 1");
    if (!append(state.field, config.field) || !append(state.column, config.column))
        return out_of_memory(config.field.size + config.column.size);
    state.split_documents = config.split_documents;
    Reader reader(state);
    for (size_t i = 0; i < state.sources.count; ++i) BABYGPT_TRY(reader.start(i, *state.sources[i]));
    reader.go_to(Place());
    for (bool found = true; found;) {
        BABYGPT_TRY(reader.next(found));
        if (!found) break;
        documents += reader.ends;
        if (!add_mark(state, reader.from)) return out_of_memory(sizeof(Place));
    }
    state.bytes = reader.place.text;
    if (state.bytes == 0)
        return fail(Error::bad_file, "there is no text in '", view(state.sources[0]->name),
                    state.sources.count > 1 ? "' and the files after it" : "'");
    return find_split(state, config.validation_fraction, config.validation_limit);
}

inline Status add_source(CorpusState& state, Text name, TextFormat format, Source*& source) {
    source = create<Source>(state.runtime, state.runtime);
    if (!source || !state.sources.push(source)) {
        destroy(state.runtime, source);
        return out_of_memory(sizeof(Source));
    }
    source->format = format == TextFormat::automatic ? format_of(name) : format;
    return append(source->name, name) ? Status() : out_of_memory(name.size);
}
inline void keep_in_memory(Source& source, Text text) {
    source.memory = text;
    source.size = text.size;
    source.in_memory = true;
}
inline Status add_file(CorpusState& state, Text path, TextFormat format) {
    Source* source;
    BABYGPT_TRY(add_source(state, equal(path, "-") ? Text("standard input") : path, format, source));
    if (equal(path, "-")) {
        BABYGPT_TRY(read_standard_input(source->kept));
        return keep_in_memory(*source, view(source->kept)), Status();
    }
    File file(state.runtime);
    BABYGPT_TRY(file.open(path, FileMode::read));
    const int64_t size = file.size();
    source->size = static_cast<uint64_t>(size);
    if (size >= 0) return Status();
    (void)file.close();
    BABYGPT_TRY(read_file(state.runtime, path, source->kept));
    return keep_in_memory(*source, view(source->kept)), Status();
}

// Fills an object from a state that is complete, or leaves it empty.
inline Status take_corpus(Corpus& corpus, CorpusState* state, const CorpusConfig& config, Status status) {
    uint64_t documents = 0;
    if (status.ok()) status = open_corpus(*state, config, documents);
    if (!status.ok()) return destroy(state->runtime, state), status;
    corpus.runtime = &state->runtime;
    corpus.state = state;
    corpus.config = config;
    corpus.config.field = state->field_name(), corpus.config.column = state->column_name();
    corpus.bytes = state->bytes, corpus.training_bytes = state->training_bytes, corpus.documents = documents;
    return status;
}
inline uint64_t part_begin(const CorpusState& corpus, Part part) { return part == Part::validation ? corpus.training_bytes : 0; }
inline uint64_t part_end(const CorpusState& corpus, Part part) { return part == Part::training ? corpus.training_bytes : corpus.bytes; }

}  // namespace

Corpus::Corpus(Corpus&& other) noexcept { *this = static_cast<Corpus&&>(other); }
Corpus& Corpus::operator=(Corpus&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    config = other.config;
    runtime = other.runtime, state = other.state;
    bytes = other.bytes, training_bytes = other.training_bytes, documents = other.documents;
    other.state = nullptr;
    other.bytes = other.training_bytes = other.documents = 0;
    return *this;
}
Corpus::~Corpus() {
    if (state) destroy(*runtime, state);
}

Status Corpus::open(Runtime& from, Span<const Text> files, const CorpusConfig& how) {
    *this = Corpus();
    const FloatMode mode;
    int inputs = 0;
    for (Text path : files) inputs += equal(path, "-");
    if (files.size == 0) return fail(Error::invalid_argument, "no file is named");
    if (inputs > 1) return fail(Error::invalid_argument, "standard input ('-') is named twice");
    CorpusState* opened = create<CorpusState>(from, from);
    if (!opened) return out_of_memory(sizeof(CorpusState));
    Status status;
    for (size_t i = 0; i < files.size && status.ok(); ++i) status = add_file(*opened, files[i], how.format);
    return take_corpus(*this, opened, how, status);
}

Status Corpus::open_memory(Runtime& from, Text text, const CorpusConfig& how) {
    *this = Corpus();
    const FloatMode mode;
    CorpusState* opened = create<CorpusState>(from, from);
    if (!opened) return out_of_memory(sizeof(CorpusState));
    Source* source;
    const Status status = add_source(*opened, "text in memory", how.format, source);
    if (status.ok()) keep_in_memory(*source, text);
    return take_corpus(*this, opened, how, status);
}

Status Corpus::read(Part part, bool (*take)(void* user, Text bytes, bool end_of_document), void* user) {
    if (!state) return fail(Error::invalid_argument, "the corpus is not open");
    Reader reader(*state);
    BABYGPT_TRY(reader.seek(part_begin(*state, part)));
    for (bool found = true; found;) {
        BABYGPT_TRY(reader.next_before(part_end(*state, part), found));
        if (found && !take(user, reader.piece, reader.ends)) break;
    }
    return Status();
}

namespace {

// ---- ids, and the order in which training sees them -------------------------------------------------------------------

// Where only answers are learnt, the ids of what belongs to none are marked, by their highest bit: so the marks go wherever the ids go.
constexpr int32_t only_read = INT32_MIN;
inline int32_t id_of(int32_t marked) { return marked & INT32_MAX; }

// Ids in blocks of memory, 16 bits each where the vocabulary allows it. Blocks are kept when it is emptied.
struct IdStore {
    Runtime& runtime;
    size_t width = 4;      // bytes an id
    bool marked = false;   // ids may be marked
    size_t block_ids = 0;  // ids a block
    Array<void*> blocks;
    uint64_t count = 0;
    explicit IdStore(Runtime& from) : runtime(from), blocks(from) {}
    IdStore(const IdStore&) = delete;
    IdStore& operator=(const IdStore&) = delete;
    ~IdStore() { clear(); }
    void clear() {
        for (void* block : blocks) release(runtime, block, block_ids * width);
        blocks.count = 0;
        count = 0;
    }
    uint64_t bytes_with(size_t more) const { return (count + more + block_ids - 1) / block_ids * block_ids * width; }
    bool append(const int32_t* ids, size_t n) {
        for (size_t done = 0; done < n;) {
            const size_t block = static_cast<size_t>(count / block_ids), inside = static_cast<size_t>(count % block_ids);
            if (block == blocks.count) {
                void* memory = allocate(runtime, block_ids * width);
                if (!memory || !blocks.push(memory)) return release(runtime, memory, block_ids * width), false;
            }
            const size_t run = least(n - done, block_ids - inside);
            narrow(ids + done, run, width, static_cast<char*>(blocks[block]) + inside * width);
            done += run, count += run;
        }
        return true;
    }
    void read(uint64_t at, size_t n, int32_t* out) const {
        for (size_t done = 0; done < n;) {
            const size_t inside = static_cast<size_t>((at + done) % block_ids), run = least(n - done, block_ids - inside);
            widen(static_cast<const char*>(blocks[static_cast<size_t>((at + done) / block_ids)]) + inside * width, run, width, marked,
                  out + done);
            done += run;
        }
    }
    // Both work in place, too: narrow to the beginning of `ids`, widen from the last bytes of `to`. In 16 bits, marked: the highest is a mark.
    static void narrow(const int32_t* ids, size_t n, size_t width, char* to) {
        if (width == 4) memmove(to, ids, n * 4);
        else
            for (size_t i = 0; i < n; ++i) {
                const uint16_t id = static_cast<uint16_t>(ids[i] | (ids[i] < 0 ? 0x8000 : 0));
                memcpy(to + 2 * i, &id, 2);
            }
    }
    static void widen(const char* from, size_t n, size_t width, bool marked, int32_t* to) {
        if (width == 4) memmove(to, from, n * 4);
        else
            for (size_t i = 0; i < n; ++i) {
                uint16_t id;
                memcpy(&id, from + 2 * i, 2);
                to[i] = marked && (id & 0x8000) ? (id & 0x7fff) | only_read : id;
            }
    }
};

// The ids of a part of a corpus, piece after piece. A separator follows each document, but where what begins the next one is that.
struct IdStream {
    Reader reader;
    const Tokenizer* tokenizer;
    uint64_t end;  // of the part
    Array<int32_t> separator, ids;
    uint64_t unknown = 0;       // characters of the last piece
    Text answers;               // what an answer's line begins with; "": everything is learnt
    size_t matched = 0;         // bytes of that at the beginning of the line that we are in: all, in an answer; `never`: it is another line
    size_t matched_before = 0;  // ... where the last piece began
    static constexpr size_t never = SIZE_MAX;
    IdStream(const CorpusState& corpus, const Tokenizer& with, Part part)
        : reader(corpus), tokenizer(&with), end(part_end(corpus, part)), separator(corpus.runtime), ids(corpus.runtime) {}
    Status start(uint64_t begin) {
        if (tokenizer->end_of_text < 0) BABYGPT_TRY(tokenizer->encode("\n\n", separator));
        else if (tokenizer->end_of_text != tokenizer->begin_of_text && !separator.push(tokenizer->end_of_text))
            return out_of_memory(sizeof(int32_t));
        return reader.seek(begin);
    }
    Status next(bool& found) {
        ids.count = 0;
        matched_before = matched;
        BABYGPT_TRY(reader.next_before(end, found));
        if (!found) return Status();
        size_t strange = 0;
        const bool begins = reader.from.inside == 0 && tokenizer->begin_of_text >= 0;
        if (begins && !ids.push(tokenizer->begin_of_text)) return out_of_memory(sizeof(int32_t));
        BABYGPT_TRY(tokenizer->encode(reader.piece, ids, false, &strange));
        unknown = strange;
        for (size_t i = 0; i < ids.count; ++i) mark(ids[i], i == 0 && begins ? "\n" : tokenizer->bytes(ids[i]));
        if (!reader.ends) return Status();
        if (!ids.append(separator.items, separator.count)) return out_of_memory(separator.count * sizeof(int32_t));
        for (size_t i = ids.count - separator.count; i < ids.count; ++i) mark(ids[i], "\n");  // the first may end an answer
        return Status();
    }
    // An id is learnt where one of its bytes is an answer's: after what its line begins with, up to the line's end.
    void mark(int32_t& id, Text bytes) {
        if (answers.size == 0) return;
        bool learnt = false;
        for (const char c : bytes) {
            learnt = learnt || matched == answers.size;
            if (c == '\n') matched = 0;
            else if (matched < answers.size) matched = c == answers[matched] ? matched + 1 : never;
        }
        if (!learnt) id |= only_read;
    }
};

// Training shuffles within groups of ids that follow each other, so that only one must be in memory at a time. Their size depends on
// nothing but a memory limit that is too small for four of them: with any larger one the order is the same, wherever the ids lie.
constexpr uint64_t largest_group = uint64_t(1) << 24, smallest_group = uint64_t(1) << 16;
struct Group {
    Place place;     // of the piece in which its first id lies,
    size_t skip;     // after so many others
    size_t matched;  // IdStream's, where the piece begins
};

enum class IdPlace { memory, groups, file, host };

}  // namespace

struct DataState {
    IdPlace where = IdPlace::memory;
    Span<const int32_t> host;
    Span<const Example> examples;
    Array<Example> pairs;  // what `examples` shows where they are our own,
    Array<int32_t> pair_ids;
    IdStore store;  // memory: all ids; groups: those of one
    uint64_t tokens = 0;
    uint64_t group_ids = largest_group;  // the last group may have fewer
    Array<Group> groups;
    uint64_t loaded = UINT64_MAX;  // groups: the one in `store`
    IdStream* stream = nullptr;    // groups: reads them again,
    Tokenizer tokenizer;           // with a copy, since the host may have handed its own to a model
    Array<char> answers;           // IdStream's
    File cache;
    explicit DataState(Runtime& runtime)
        : pairs(runtime), pair_ids(runtime), store(runtime), groups(runtime), answers(runtime), cache(runtime) {}
    ~DataState() { destroy(store.runtime, stream); }
};

namespace {

// FNV-1a (Fowler, Noll & Vo), an id a step.
constexpr uint64_t empty_fingerprint = 0xcbf29ce484222325u;
inline uint64_t add_to_fingerprint(uint64_t hash, const int32_t* ids, size_t n) {
    for (size_t i = 0; i < n; ++i) hash = (hash ^ static_cast<uint32_t>(ids[i])) * 0x100000001b3u;
    return hash;
}

// The end of a cache file. What is before it are the ids, `width` bytes each. It says what the file is; the library itself never trusts
// one that it finds, it writes it anew.
struct CacheEnd {
    char magic[8] = {'b', 'a', 'b', 'y', 't', 'o', 'k', '\0'};
    uint32_t version = BABYGPT_FORMAT_VERSION, width = 0;
    uint64_t vocab = 0, count = 0, fingerprint = 0;
};

// Reads a part once from its beginning to its end: counts, and keeps the ids (in memory, or in `file` where there is one).
inline Status read_ids(Data& data, DataState& state, uint64_t memory_limit, File* file) {
    IdStream& stream = *state.stream;
    IdStore& store = state.store;
    const Array<int32_t>& ids = stream.ids;
    data.fingerprint = empty_fingerprint;
    for (bool found = true;;) {
        BABYGPT_TRY(stream.next(found));
        if (!found) break;
        for (; state.groups.count * state.group_ids < data.tokens + ids.count;) {
            const Group group = {stream.reader.from, static_cast<size_t>(state.groups.count * state.group_ids - data.tokens),
                                 stream.matched_before};
            if (!state.groups.push(group)) return out_of_memory(sizeof(Group));
        }
        data.tokens += ids.count;
        data.bytes += stream.reader.piece.size + (stream.reader.ends && stream.tokenizer->end_of_text < 0 ? 2 : 0);
        data.unknown += stream.unknown;
        for (const int32_t id : ids) data.learnt += id >= 0;
        data.fingerprint = add_to_fingerprint(data.fingerprint, ids.items, ids.count);
        if (file) {
            char* bytes = reinterpret_cast<char*>(ids.items);  // made narrow in their place
            IdStore::narrow(ids.items, ids.count, store.width, bytes);
            BABYGPT_TRY(file->write(bytes, static_cast<int64_t>(ids.count * store.width)));
        } else if (state.where == IdPlace::memory && store.bytes_with(ids.count) <= memory_limit) {
            if (!store.append(ids.items, ids.count)) return out_of_memory(store.block_ids * store.width);
        } else if (state.where == IdPlace::memory) {
            store.clear();
            state.where = IdPlace::groups;
        }
    }
    state.tokens = data.tokens;
    data.fingerprint = mix(data.fingerprint ^ data.tokens);
    return Status();
}

inline Status create_data(Data& data, DataState& state, const Corpus& corpus, Part part, const Tokenizer& tokenizer, Text cache,
                          uint64_t memory_limit, Text answers) {
    Runtime& runtime = state.store.runtime;
    state.stream = create<IdStream>(runtime, *corpus.state, tokenizer, part);
    if (!state.stream) return out_of_memory(sizeof(IdStream));
    if (!append(state.answers, answers)) return out_of_memory(answers.size);
    state.stream->answers = view(state.answers);
    state.store.marked = answers.size > 0;
    const uint64_t begin = part_begin(*corpus.state, part);
    BABYGPT_TRY(state.stream->start(begin));
    state.store.width = tokenizer.vocab <= (state.store.marked ? 32768 : 65536) ? 2 : 4;
    while (state.group_ids > smallest_group && state.group_ids * state.store.width > memory_limit / 4) state.group_ids /= 2;
    // No token is shorter than a byte.
    const uint64_t marks = state.stream->separator.count + (tokenizer.begin_of_text >= 0);
    const uint64_t most_ids = state.stream->end - begin + (corpus.documents + 1) * marks;
    state.store.block_ids = static_cast<size_t>(least(most_ids, uint64_t(1) << 19));
    if (cache.size > 0) {
        const auto write = [&](File& file) {
            BABYGPT_TRY(read_ids(data, state, memory_limit, &file));
            CacheEnd end;
            end.width = static_cast<uint32_t>(state.store.width), end.vocab = static_cast<uint64_t>(tokenizer.vocab);
            end.count = data.tokens, end.fingerprint = data.fingerprint;
            return file.write(&end, sizeof end);
        };
        BABYGPT_TRY(write_atomically(runtime, cache, write));
        BABYGPT_TRY(state.cache.open(cache, FileMode::read));
        state.where = IdPlace::file;
    } else {
        BABYGPT_TRY(read_ids(data, state, memory_limit, nullptr));
    }
    if (state.store.marked && data.tokens > 0 && data.learnt == 0)
        return fail(Error::invalid_argument, "no line of the text begins with '", answers, "', so there is no answer to learn");
    if (state.where == IdPlace::groups) {
        state.store.block_ids = static_cast<size_t>(smallest_group);
        BABYGPT_TRY(state.tokenizer.copy(runtime, tokenizer));
        state.stream->tokenizer = &state.tokenizer;
    } else {
        destroy(runtime, state.stream);
        state.stream = nullptr;
    }
    return Status();
}

inline Status load_group(DataState& state, uint64_t index) {
    if (state.loaded == index) return Status();
    state.loaded = UINT64_MAX;
    state.store.count = 0;
    const Group group = state.groups[static_cast<size_t>(index)];
    const uint64_t wanted = least(state.group_ids, state.tokens - index * state.group_ids);
    IdStream& stream = *state.stream;
    stream.reader.go_to(group.place);
    stream.matched = group.matched;
    for (size_t skip = group.skip; state.store.count < wanted; skip = 0) {
        bool found;
        BABYGPT_TRY(stream.next(found));
        if (!found || stream.ids.count < skip)
            return fail(Error::mismatch, "the text is no longer what it was when its tokens were counted");
        const size_t taken = static_cast<size_t>(least(uint64_t(stream.ids.count - skip), wanted - state.store.count));
        if (!state.store.append(stream.ids.items + skip, taken)) return out_of_memory(state.store.block_ids * state.store.width);
    }
    state.loaded = index;
    return Status();
}

// A line's two texts grow the arrays by an example, without its pointers, and by its ids: source E E target E.
inline Status add_pair(Data& data, DataState& state, const Tokenizer& tokenizer, const Reader& reader, Text line, size_t context) {
    size_t tabs = 0, tab = 0;
    for (size_t i = line.size; i-- > 0;)
        if (line[i] == '\t') ++tabs, tab = i;
    const auto wrong = [&](const char* what) {
        return fail(Error::bad_file, "'", view(reader.corpus.sources[reader.from.source]->name), "', line ", reader.from.line, ": ", what,
                    "; a pair is SOURCE, a tab, TARGET");
    };
    if (tabs != 1) return wrong(tabs == 0 ? "there is no tab" : "there is more than one tab");
    if (tab == 0 || tab + 1 == line.size) return wrong(tab == 0 ? "the source is empty" : "the target is empty");
    Array<int32_t>& ids = state.pair_ids;
    const size_t before = ids.count;
    size_t unknown[2] = {};
    BABYGPT_TRY(tokenizer.encode(Text(line.data, tab), ids, false, &unknown[0]));
    const size_t source = ids.count + 1 - before;
    bool good = ids.push(tokenizer.end_of_text) && ids.push(tokenizer.end_of_text);
    if (good) BABYGPT_TRY(tokenizer.encode(Text(line.data + tab + 1, line.size - tab - 1), ids, false, &unknown[1]));
    const size_t target = ids.count - before - source;
    good = good && ids.push(tokenizer.end_of_text);
    if (good && (source > context || target > context)) {
        ids.count = before;
        ++data.left_out;
        return Status();
    }
    Example example;
    example.source.size = source, example.ids.size = example.targets.size = target;
    if (!good || !state.pairs.push(example)) return out_of_memory(sizeof example);
    data.bytes += line.size - tab - 1;
    data.unknown += unknown[0] + unknown[1];
    return Status();
}

BABYGPT_RARE Status read_pairs(Data& data, DataState& state, const Corpus& corpus, Part part, const Tokenizer& tokenizer, int context) {
    Runtime& runtime = state.store.runtime;
    for (const Source* source : corpus.state->sources)
        if (source->format != TextFormat::tsv)
            return fail(Error::invalid_argument, "'", view(source->name), "' is no tsv file, which pairs are read from");
    Reader reader(*corpus.state);
    BABYGPT_TRY(reader.seek(part_begin(*corpus.state, part)));
    const uint64_t end = part_end(*corpus.state, part);
    Array<char> line(runtime);
    for (bool found = true;;) {
        BABYGPT_TRY(reader.next_before(end, found));
        if (!found) break;
        if (reader.ends && line.count == 0) {
            BABYGPT_TRY(add_pair(data, state, tokenizer, reader, reader.piece, static_cast<size_t>(context)));
            continue;
        }
        if (!append(line, reader.piece)) return out_of_memory(line.count + reader.piece.size);  // a very long line comes in pieces
        if (reader.ends) BABYGPT_TRY(add_pair(data, state, tokenizer, reader, view(line), static_cast<size_t>(context)));
        if (reader.ends) line.count = 0;
    }
    const int32_t* at = state.pair_ids.items;
    for (Example& e : state.pairs) {
        e.source.data = at, e.ids.data = at + e.source.size, e.targets.data = e.ids.data + 1;
        at = e.targets.data + e.targets.size;
    }
    return Status();
}

// Examples have no windows.
inline Status need_running_text(const Data& data) {
    return data.evaluation_example(0) ? fail(Error::invalid_argument, "the data is made of examples, not of running text") : Status();
}

// Ids at, at + 1, ..., at + n - 1, wherever they lie.
inline Status fetch_ids(DataState& state, uint64_t at, size_t n, int32_t* to) {
    switch (state.where) {
        case IdPlace::host:
            memcpy(to, state.host.data + at, n * sizeof(int32_t));
            break;
        case IdPlace::memory:
            state.store.read(at, n, to);
            break;
        case IdPlace::file: {
            const size_t width = state.store.width;
            char* bytes = reinterpret_cast<char*>(to) + n * (4 - width);
            int64_t got;
            BABYGPT_TRY(state.cache.read(static_cast<int64_t>(at * width), bytes, static_cast<int64_t>(n * width), got));
            if (static_cast<uint64_t>(got) != n * width)
                return fail(Error::cannot_read, "the token cache '", Text(state.cache.name), "' has become shorter");
            IdStore::widen(bytes, n, width, state.store.marked, to);
            break;
        }
        case IdPlace::groups:
            for (size_t done = 0; done < n;) {
                BABYGPT_TRY(load_group(state, (at + done) / state.group_ids));
                const uint64_t inside = (at + done) % state.group_ids;
                const size_t run = static_cast<size_t>(least(uint64_t(n - done), state.store.count - inside));
                state.store.read(inside, run, to + done);
                done += run;
            }
    }
    return Status();
}

// `n` ids, and the ids that follow each of them. From first to last, so that no group is loaded twice.
inline Status fetch_window(DataState& state, uint64_t at, size_t n, int32_t* ids, int32_t* targets) {
    BABYGPT_TRY(fetch_ids(state, at, n, ids));
    memcpy(targets, ids + 1, (n - 1) * sizeof(int32_t));
    BABYGPT_TRY(fetch_ids(state, at + n, 1, targets + n - 1));
    for (size_t i = 0; i < n && state.store.marked; ++i) ids[i] = id_of(ids[i]), targets[i] = most(targets[i], -1);
    return Status();
}

// Where item i of `count` stands in a random order, without a list of it: a Feistel network (Luby & Rackoff 1988) over the next power of
// four, walked until it lands below `count` (Black & Rogaway 2002).
inline uint64_t shuffled(uint64_t i, uint64_t count, uint64_t key) {
    int half = 1;
    while (half < 31 && uint64_t(1) << (2 * half) < count) ++half;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 6; ++round) {
            const uint64_t next = left ^ (mix(key + (right << 3) + round) & mask);
            left = right, right = next;
        }
        i = left << half | right;
    } while (i >= count);
    return i;
}

// How many windows a group gives. The first begins at a phase of 0..context-1 that changes with the epoch; the number stays.
inline uint64_t windows_in(uint64_t ids, uint64_t context) { return ids <= context ? 0 : most(uint64_t(1), (ids - context) / context); }

// Where window `index` of an epoch begins: groups in random order (the last, shorter one at a random place), and in each of them windows in
// random order.
inline uint64_t window_start(const DataState& state, uint64_t seed, uint64_t epoch, uint64_t index, uint64_t context) {
    const uint64_t full = state.tokens / state.group_ids, rest = state.tokens % state.group_ids;
    const uint64_t in_full = windows_in(state.group_ids, context), in_last = windows_in(rest, context);
    const uint64_t order = random_key(seed, epoch, random_order, 0);
    const uint64_t before_last = mix(order) % (full + 1) * in_full;
    uint64_t group = full, ids = rest, count = in_last, window = index - before_last;
    if (index < before_last || window >= in_last) {
        if (index >= before_last) index -= in_last;
        group = shuffled(index / in_full, full, order);
        ids = state.group_ids, count = in_full, window = index % in_full;
    }
    const uint64_t key = random_key(seed, epoch, random_order, 1 + group);
    const uint64_t phase = mix(key) % (least(context - 1, ids - 1 - count * context) + 1);
    return group * state.group_ids + phase + shuffled(window, count, key) * context;
}

}  // namespace

Data::Data(Data&& other) noexcept { *this = static_cast<Data&&>(other); }
Data& Data::operator=(Data&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    runtime = other.runtime, state = other.state;
    tokens = other.tokens, bytes = other.bytes, unknown = other.unknown, fingerprint = other.fingerprint, left_out = other.left_out;
    other.state = nullptr;
    learnt = other.learnt;
    other.tokens = other.bytes = other.unknown = other.learnt = other.fingerprint = other.left_out = 0;
    return *this;
}
Data::~Data() {
    if (state) destroy(*runtime, state);
}

Status Data::create(Runtime& from, Corpus& corpus, Part part, const Tokenizer& tokenizer, Text cache, uint64_t memory_limit, Text answers) {
    *this = Data();
    if (!corpus.state) return fail(Error::invalid_argument, "the corpus is not open");
    if (tokenizer.vocab <= 0) return fail(Error::invalid_argument, "the tokenizer is empty");
    runtime = &from;
    state = babygpt::create<DataState>(from, from);
    if (!state) return out_of_memory(sizeof(DataState));
    const Status status = create_data(*this, *state, corpus, part, tokenizer, cache, memory_limit, answers);
    if (!status.ok()) *this = Data();
    return status;
}

Status Data::create(Runtime& from, Span<const int32_t> ids) {
    *this = Data();
    for (size_t i = 0; i < ids.size; ++i)
        if (ids[i] < 0) return fail(Error::invalid_argument, "id ", uint64_t(i), " is ", ids[i], ", but ids are not negative");
    runtime = &from;
    state = babygpt::create<DataState>(from, from);
    if (!state) return out_of_memory(sizeof(DataState));
    state->where = IdPlace::host;
    state->host = ids;
    state->tokens = tokens = learnt = ids.size;
    fingerprint = mix(add_to_fingerprint(empty_fingerprint, ids.data, ids.size) ^ tokens);
    return Status();
}

namespace {

void take_examples(Data& data, Span<const Example> examples) {
    data.state->where = IdPlace::host;
    data.state->examples = examples;
    uint64_t hash = empty_fingerprint;
    for (const Example& e : examples) {
        data.tokens += e.ids.size;
        const Span<const int32_t> all[] = {e.ids, e.targets, e.source};
        for (const Span<const int32_t>& ids : all) hash = add_to_fingerprint(hash, ids.data, ids.size);
        for (const float number : e.features) hash = mix(hash ^ bits_as<uint32_t>(number));
        if (e.weight < 1 || e.weight > 1) hash = mix(hash ^ bits_as<uint32_t>(e.weight));
    }
    data.learnt = data.tokens;
    data.fingerprint = mix(hash ^ examples.size);
}

}  // namespace

Status Data::create(Runtime& from, Span<const Example> examples) {
    *this = Data();
    if (examples.size == 0) return fail(Error::invalid_argument, "there is no example");
    runtime = &from;
    state = babygpt::create<DataState>(from, from);
    if (!state) return out_of_memory(sizeof(DataState));
    take_examples(*this, examples);
    return Status();
}

BABYGPT_RARE Status Data::create_pairs(Runtime& from, Corpus& corpus, Part part, const Tokenizer& tokenizer, int context) {
    *this = Data();
    if (!corpus.state) return fail(Error::invalid_argument, "the corpus is not open");
    if (context < 1) return fail(Error::invalid_argument, "context is ", context, ", but must be 1 or more");
    if (tokenizer.end_of_text < 0)
        return fail(Error::invalid_argument, "pairs need a tokenizer with an end-of-text token, as bpe and wordpiece have it");
    runtime = &from;
    state = babygpt::create<DataState>(from, from);
    if (!state) return out_of_memory(sizeof(DataState));
    Status status = read_pairs(*this, *state, corpus, part, tokenizer, context);
    const Array<Example>& pairs = state->pairs;
    if (status.ok() && pairs.count == 0)
        status = left_out > 0
                     ? fail(Error::invalid_argument, "all ", left_out, " pairs are longer than context, ", context, ", on one side")
                     : fail(Error::invalid_argument, "there is no pair in this part of the corpus");
    if (status.ok()) take_examples(*this, Span<const Example>(pairs.items, pairs.count));
    else *this = Data();
    return status;
}

const Example* Data::training_example(uint64_t seed, uint64_t n) const {
    const uint64_t count = state ? state->examples.size : 0;
    if (count == 0) return nullptr;
    return &state->examples[static_cast<size_t>(shuffled(n % count, count, random_key(seed, n / count, random_order, 0)))];
}
const Example* Data::evaluation_example(uint64_t n) const {
    return state && n < state->examples.size ? &state->examples[static_cast<size_t>(n)] : nullptr;
}

uint64_t Data::windows(int context) const {
    if (!state || context < 1) return 0;
    if (state->examples.size > 0) return state->examples.size;
    const uint64_t length = static_cast<uint64_t>(context);
    return tokens / state->group_ids * windows_in(state->group_ids, length) + windows_in(tokens % state->group_ids, length);
}

namespace {

// Where window number n of training begins.
Status find_window(const Data& data, uint64_t seed, uint64_t n, int context, uint64_t& start) {
    BABYGPT_TRY(need_running_text(data));
    const uint64_t count = data.windows(context);
    if (count == 0)
        return fail(Error::invalid_argument, "there are ", data.tokens, " tokens, but a window of context ", context, " needs ",
                    int64_t(context) + 1, ": take a smaller context or more text");
    start = window_start(*data.state, seed, n / count, n % count, static_cast<uint64_t>(context));
    return Status();
}

}  // namespace

Status Data::training_window(uint64_t seed, uint64_t n, int context, int32_t* ids, int32_t* targets) {
    uint64_t start;
    BABYGPT_TRY(find_window(*this, seed, n, context, start));
    return fetch_window(*state, start, static_cast<size_t>(context), ids, targets);
}

uint64_t Data::evaluation_windows(int context) const {
    const uint64_t length = static_cast<uint64_t>(most(context, 1));
    if (state && state->examples.size > 0) return state->examples.size;
    return tokens < 2 || context < 1 ? 0 : (tokens - 1 + length - 1) / length;
}

Status Data::evaluation_window(uint64_t n, int context, int32_t* ids, int32_t* targets, int& length) {
    BABYGPT_TRY(need_running_text(*this));
    const uint64_t count = evaluation_windows(context);
    if (n >= count)
        return fail(Error::invalid_argument, "there is no evaluation window ", n, ": ", tokens, " tokens give ", count, " of context ",
                    context);
    const uint64_t start = n * static_cast<uint64_t>(context), here = least(static_cast<uint64_t>(context), tokens - 1 - start);
    length = static_cast<int>(here);
    return fetch_window(*state, start, static_cast<size_t>(here), ids, targets);
}

namespace {

BABYGPT_UNHURRIED_END

// ---- what counting achieves --------------------------------------------------------------------------------------------

// P(w | h) = (c(h, w) + T(h) P(w | h')) / (c(h) + T(h)), where h' is h without its oldest token, T(h) counts the different tokens that
// followed h in training, and P of order 0 is uniform. A history that training never saw leaves the decision to the shorter one.
// No table of n-grams is needed: where all places of a text are sorted by the ids that begin there, those that begin with h stand side by
// side, and among them those that go on with w.

}  // namespace

struct NgramState {
    Array<unsigned char> ids;  // each in as few bytes as the vocabulary allows
    size_t count = 0, vocab, bytes = 1;
    Array<uint32_t> sorted;  // places
    Array<uint32_t> ends;    // [vocab] in `sorted`: of those that begin with an id
    NgramState(Runtime& runtime, int of_vocab) : ids(runtime), vocab(static_cast<size_t>(of_vocab)), sorted(runtime), ends(runtime) {
        while (bytes < 4 && (vocab - 1) >> (8 * bytes) > 0) ++bytes;
    }
    int32_t id(size_t at) const {
        uint32_t id = ids[at * bytes];
        for (size_t k = 1; k < bytes; ++k) id |= static_cast<uint32_t>(ids[at * bytes + k]) << (8 * k);
        return static_cast<int32_t>(id);
    }
    // The id at a place and 1; 0 behind the text's end.
    uint32_t letter(size_t at) const { return at < count ? static_cast<uint32_t>(id(at)) + 1 : 0; }
    // Of sorted[low, high), whose first `depth` letters agree: where those with this letter, or a greater one, at `depth` begin.
    size_t find(size_t low, size_t high, size_t depth, uint32_t wanted) const {
        while (low < high) {
            const size_t middle = low + (high - low) / 2;
            if (letter(sorted[middle] + depth) < wanted) low = middle + 1;
            else high = middle;
        }
        return low;
    }
    // Leaves those with this letter.
    void narrow(size_t& low, size_t& high, size_t depth, uint32_t wanted) const {
        low = find(low, high, depth, wanted);
        high = find(low, high, depth, wanted + 1);
    }
    // Calls f(id, count) for each id that follows a history of `depth` ids, which stands at sorted[low, high).
    template <class F>
    void followers(size_t low, size_t high, size_t depth, const F& f) const {
        while (low < high) {
            const uint32_t here = letter(sorted[low] + depth);
            size_t step = 1;
            while (step < high - low && letter(sorted[low + step] + depth) == here) step *= 2;
            const size_t end = find(low + step / 2, least(low + step, high), depth, here + 1);
            f(here - 1, end - low);
            low = end;
        }
    }
};

namespace {

// learnt, where not null: whether each counts.
Status copy_ids(Data& data, uint64_t cap, NgramState& s, Array<char>* learnt = nullptr) {
    if (!data.state || data.state->examples.size > 0) return fail(Error::invalid_argument, "n-grams need text, not examples");
    const uint64_t count = least(data.tokens, least(cap, uint64_t(UINT32_MAX) - 8));
    size_t bytes;
    if (!product(count, s.bytes, bytes) || !s.ids.resize(bytes)) return out_of_memory(count * s.bytes);
    s.count = static_cast<size_t>(count);
    if (learnt && !learnt->resize(s.count)) return out_of_memory(count);
    unsigned char* to = s.ids.items;
    int32_t buffer[1024];
    for (size_t i = 0; i < s.count; i += 1024) {
        const size_t n = least(s.count - i, size_t(1024));
        BABYGPT_TRY(fetch_ids(*data.state, i, n, buffer));
        for (size_t j = 0; j < n; ++j) {
            const uint32_t id = static_cast<uint32_t>(id_of(buffer[j]));
            if (id >= s.vocab)
                return fail(Error::mismatch, "id ", id, " in the text, but the vocabulary is ", static_cast<uint64_t>(s.vocab));
            for (size_t k = 0; k < s.bytes; ++k) *to++ = static_cast<unsigned char>(id >> (8 * k));
            if (learnt) (*learnt)[i + j] = buffer[j] >= 0;
        }
    }
    return Status();
}

// Sorts by the first letter; then some neighbours at a time, so that little room is needed, by the last letter first (LSD): each pass counts
// how often a letter is there, and keeps the order of equal ones.
Status sort_places(NgramState& s, int order) {
    Array<uint32_t> other(*s.ids.runtime), starts(*s.ids.runtime);
    const size_t n = s.count, letters = s.vocab + 1;
    if (!s.sorted.resize(n) || !s.ends.resize(s.vocab) || !starts.resize(letters))
        return out_of_memory((n + s.vocab + letters) * sizeof(uint32_t));
    const auto sum_up = [](uint32_t* counts, size_t size) {
        uint32_t before = 0;
        for (size_t i = 0; i < size; ++i) {
            const uint32_t count = counts[i];
            counts[i] = before, before += count;
        }
    };
    memset(s.ends.items, 0, s.vocab * sizeof(uint32_t));
    for (size_t i = 0; i < n; ++i) ++s.ends[static_cast<size_t>(s.id(i))];
    sum_up(s.ends.items, s.vocab);
    for (size_t i = 0; i < n; ++i) s.sorted[s.ends[static_cast<size_t>(s.id(i))]++] = static_cast<uint32_t>(i);
    for (size_t first = 0, begin = 0; first < s.vocab;) {
        size_t last = first;
        while (last + 1 < s.vocab && s.ends[last + 1] - begin <= n / 16) ++last;
        const size_t count = s.ends[last] - begin;
        if (!other.resize(most(other.count, count))) return out_of_memory(count * sizeof(uint32_t));
        uint32_t *from = s.sorted.items + begin, *to = other.items;
        for (size_t depth = static_cast<size_t>(order); depth-- > (first == last ? 1 : 0);) {
            memset(starts.items, 0, letters * sizeof(uint32_t));
            for (size_t i = 0; i < count; ++i) ++starts[s.letter(from[i] + depth)];
            sum_up(starts.items, letters);
            for (size_t i = 0; i < count; ++i) to[starts[s.letter(from[i] + depth)]++] = from[i];
            uint32_t* const sorted = to;
            to = from, from = sorted;
        }
        if (from == other.items) memcpy(to, from, count * sizeof(uint32_t));
        begin = s.ends[last], first = last + 1;
    }
    return Status();
}

// One order more: p[i], from histories of length - 1 ids, becomes the probability of id i of a text. Equal histories are looked up once. They
// are the work of the thread in whose share, sorted[begin, end), they begin.
void predict_text(const NgramState& training, const NgramState& text, size_t length, size_t begin, size_t end, double* p) {
    const auto agree = [&](size_t a, size_t b) {
        size_t depth = 0;
        while (depth < length && text.letter(text.sorted[a] + depth) == text.letter(text.sorted[b] + depth)) ++depth;
        return depth == length;
    };
    while (begin > 0 && begin < end && agree(begin - 1, begin)) ++begin;
    for (size_t at = begin, next; at < end; at = next) {
        size_t low = 0, high = training.count;
        for (size_t depth = 0; depth < length; ++depth) training.narrow(low, high, depth, text.letter(text.sorted[at] + depth));
        low = training.find(low, high, length, 1);  // where the text ends, nothing follows
        double kinds = 0;
        training.followers(low, high, length, [&](uint32_t, size_t) { ++kinds; });
        const double sum = static_cast<double>(high - low) + kinds;
        size_t first = low, last = low;
        uint32_t letter = 0;
        for (next = at; next < text.count && agree(at, next); ++next) {
            const size_t i = text.sorted[next] + length;
            if (text.letter(i) == 0 || low == high) continue;
            if (text.letter(i) != letter) {
                letter = text.letter(i);
                first = last, last = high;
                training.narrow(first, last, length, letter);
            }
            p[i] = (static_cast<double>(last - first) + kinds * p[i]) / sum;
        }
    }
}

}  // namespace

Status ngram_baseline(Runtime& runtime, Data& training, Data& validation, int vocab, NgramResult& result, int max_order, uint64_t cap) {
    if (vocab < 1 || max_order < 1 || max_order > 8)
        return fail(Error::invalid_argument, "the vocabulary is ", vocab, " and max_order ", max_order, " (1 to 8)");
    BABYGPT_TRY(need_running_text(training));
    BABYGPT_TRY(need_running_text(validation));
    if (training.tokens < 1 || validation.tokens < 2) return fail(Error::invalid_argument, "too little text to count n-grams in");
    const FloatMode mode;
    NgramState from(runtime, vocab), on(runtime, vocab);
    Array<char> learnt(runtime);
    BABYGPT_TRY(copy_ids(training, most(cap, uint64_t(2)), from));
    BABYGPT_TRY(copy_ids(validation, validation.tokens, on, &learnt));
    BABYGPT_TRY(sort_places(from, max_order));
    BABYGPT_TRY(sort_places(on, max_order));
    Array<double> p(runtime);
    if (!p.resize(on.count)) return out_of_memory(on.count * sizeof(double));
    for (double& one : p) one = 1.0 / vocab;
    start_pool(runtime);
    const size_t threads = static_cast<size_t>(runtime.thread_count()), n = on.count;
    result = NgramResult();
    result.training_tokens = from.count;
    for (int order = 1; order <= max_order; ++order) {
        parallel(runtime, static_cast<int>(threads), [&](int thread) {
            const size_t t = static_cast<size_t>(thread);
            predict_text(from, on, static_cast<size_t>(order) - 1, n * t / threads, n * (t + 1) / threads, p.items);
        });
        double sum = 0, count = 0;
        for (size_t i = 1; i < n; ++i)
            if (learnt[i]) sum -= log_of(p[i]), ++count;
        const double loss = sum / most(count, 1.0);
        result.loss_by_order[order] = loss;
        if (order == 1 || loss < result.loss) result.order = order, result.loss = loss;
    }
    return Status();
}

namespace {

void predict_next(const Ngram& model, const int32_t* history, size_t length, double* p) {
    const NgramState& s = *model.state;
    const double vocab = model.vocab, n = static_cast<double>(s.count);
    double kinds = 0;
    const auto begin = [&](int id) { return id > 0 ? s.ends[static_cast<size_t>(id) - 1] : 0; };
    const auto count = [&](int id) { return static_cast<double>(s.ends[static_cast<size_t>(id)] - begin(id)); };
    for (int id = 0; id < model.vocab; ++id) kinds += count(id) > 0;
    for (int id = 0; id < model.vocab; ++id) p[id] = (count(id) + kinds / vocab) / (n + kinds);
    for (size_t depth = 1; depth <= least(length, static_cast<size_t>(model.order) - 1); ++depth) {
        const int32_t* h = history + (length - depth);
        size_t low = begin(h[0]), high = s.ends[static_cast<size_t>(h[0])];
        for (size_t i = 1; i < depth; ++i) s.narrow(low, high, i, static_cast<uint32_t>(h[i]) + 1);
        low = s.find(low, high, depth, 1);  // where the text ends, nothing follows
        if (low == high) return;            // never seen: longer ones neither
        kinds = 0;
        s.followers(low, high, depth, [&](uint32_t, size_t) { ++kinds; });
        const double scale = 1 / (static_cast<double>(high - low) + kinds);
        for (int id = 0; id < model.vocab; ++id) p[id] *= kinds * scale;
        s.followers(low, high, depth, [&](uint32_t id, size_t times) { p[id] += static_cast<double>(times) * scale; });
    }
}

BABYGPT_RARE Status no_ngrams() { return fail(Error::invalid_argument, "the n-gram model is empty: create it first"); }

}  // namespace

Ngram::Ngram(Ngram&& other) noexcept { *this = static_cast<Ngram&&>(other); }
Ngram& Ngram::operator=(Ngram&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    order = other.order, vocab = other.vocab, runtime = other.runtime, state = other.state;
    other.state = nullptr;
    return *this;
}
Ngram::~Ngram() {
    if (state) destroy(*runtime, state);
}

BABYGPT_RARE Status Ngram::create(Runtime& from, Data& training, int with_vocab, int of_order, uint64_t cap) {
    *this = Ngram();
    if (with_vocab < 1 || with_vocab > INT32_MAX - 2 || of_order < 1 || of_order > 8)
        return fail(Error::invalid_argument, "the vocabulary is ", with_vocab, " and the order ", of_order, " (1 to 8)");
    if (training.tokens < 1) return fail(Error::invalid_argument, "there is no text to count n-grams in");
    Ngram made;
    made.order = of_order, made.vocab = with_vocab, made.runtime = &from;
    made.state = babygpt::create<NgramState>(from, from, with_vocab);
    if (!made.state) return out_of_memory(sizeof(NgramState));
    BABYGPT_TRY(copy_ids(training, most(cap, uint64_t(1)), *made.state));
    BABYGPT_TRY(sort_places(*made.state, of_order));
    *this = static_cast<Ngram&&>(made);
    return Status();
}

Status Ngram::predict(Span<const int32_t> history, Span<double> probabilities) const {
    if (!state) return no_ngrams();
    if (probabilities.size != static_cast<size_t>(vocab))
        return fail(Error::no_room, "there is room for ", static_cast<uint64_t>(probabilities.size), " probabilities, the vocabulary is ",
                    vocab);
    for (const int32_t id : history)
        if (id < 0 || id >= vocab) return fail(Error::invalid_argument, "the id ", id, " is none of the model's ", vocab);
    const FloatMode mode;
    predict_next(*this, history.data, history.size, probabilities.data);
    return Status();
}

}  // namespace babygpt

BABYGPT_UNHURRIED_BEGIN

// ---- the schedule --------------------------------------------------------------------------------------------------------

namespace babygpt {

// Warm-up is linear from lr / warmup; then lr falls to min_lr, along half a cosine (Loshchilov & Hutter 2017), a line, not at all, along a
// line over the last fifth of the run (wsd, Hu et al. 2024), or as lr sqrt(warmup / step) (Vaswani et al. 2017, equation 3).
double Trainer::learning_rate(int64_t step) const {
    const double low = config.schedule == Schedule::constant ? config.lr : config.min_lr;
    if (step < config.warmup) return config.lr * static_cast<double>(step + 1) / static_cast<double>(config.warmup);
    const int64_t start = config.schedule == Schedule::wsd ? most(config.warmup, config.steps - config.steps / 5) : config.warmup;
    const double done = config.steps > start ? static_cast<double>(step - start) / static_cast<double>(config.steps - start) : 1;
    const double left = 1 - least(most(done, 0.0), 1.0);
    switch (config.schedule) {
        case Schedule::constant:
            return config.lr;
        case Schedule::inverse_sqrt:
            return most(low, config.lr * root(static_cast<double>(most<int64_t>(config.warmup, 1)) / static_cast<double>(step + 1)));
        case Schedule::cosine:
            return low + (config.lr - low) * 0.5 * (1 + cos_pi(1 - left));
        case Schedule::linear:
        case Schedule::wsd:
            return low + (config.lr - low) * left;
    }
    return low;
}

// ---- the trainer's memory ------------------------------------------------------------------------------------------------

// What is known of a step before its result is read.
struct Begun {
    StepResult result;
    double start = 0, rows = 0;  // rows: of text and source
    double weight = 0;           // what a device's sums are divided by; 0: the number of targets, which it knows
};
// Everything that a step needs, or (without gradients and moments) an evaluation alone, in one block.
struct TrainerState {
    Tape tape;
    Block memory;
    Model* trained = nullptr;  // null: the adapter is
    const BackendFunctions* backend = nullptr;
    Regions<float> regions;
    int32_t *ids = nullptr, *targets = nullptr, *source_ids = nullptr;  // [batch * context] of one micro-batch
    const int32_t *run_ids = nullptr, *run_targets = nullptr;           // ids and targets, or the caller's own
    float* row_weights = nullptr;                                       // of the targets
    bool weighted = false;                                              // not all of these are 1
    float* features = nullptr;                                          // [batch * context][Config::features]
    Sequence *sequences = nullptr, *sources = nullptr;                  // [batch]
    int count = 0, rows = 0, source_rows = 0, target_rows = 0;          // of what lies there
    double* partial = nullptr;
    double* op_seconds = nullptr;  // see Run::seconds
    // With a device, where weights, gradients and moments are; the host's are copies.
    const DeviceFunctions* on = nullptr;
    Device* device = nullptr;
    Borrowed* lent = nullptr;                       // by whom, where the device's weights are newer,
    float* home = nullptr;                          // and where they belong
    float *moment1 = nullptr, *moment2 = nullptr;   // the trainer's
    float loss_scale[2] = {256, 0};                 // the trainer's
    bool newer_moments = false;                     // on the device
    bool newer_here = true;                         // the host's moments: they have been loaded
    uint64_t weights_there = 0, adapter_there = 0;  // versions of the model's and the adapter's; 0: none yet
    uint64_t text_room = 0;                         // ids of a running text that it has room for,
    uint64_t text_there = 0, tokens_there = 0;      // the fingerprint of the one that it has, and its length; 0: none yet
    int32_t* starts = nullptr;                      // [batch] windows in it
    bool from_text = false;                         // the micro-batch is made of these
    Begun begun[steps_ahead];                       // step number n's is begun[n % steps_ahead]
    explicit TrainerState(Runtime& runtime) : tape(runtime) {}
    TrainerState(const TrainerState&) = delete;
    TrainerState& operator=(const TrainerState&) = delete;
    ~TrainerState() {
        if (lent) lent->by = nullptr;
        if (device) on->destroy(device);
    }
};
Borrowed::~Borrowed() {
    if (by) by->lent = nullptr;
}

namespace {

// ---- on a device -----------------------------------------------------------------------------------------------------------

// Whether the processor trains with products of numbers in bf16.
inline bool rounds(const Runtime& runtime) { return runtime.backend == Backend::cpu && runtime.precision == Precision::bf16; }

inline void choose_device(TrainerState& s, const Runtime& runtime) {
    s.on = find_device(runtime);
    s.tape.on_device = s.on != nullptr;
    s.tape.halves = s.on && (runtime.precision == Precision::bf16 || runtime.precision == Precision::fp16);
    s.tape.makes_sums = s.on && runtime.precision != Precision::f32;
    s.tape.rounds = rounds(runtime);
}
// Nothing is copied before somebody looks: then the weights come back.
BABYGPT_RARE Status give_back(const Borrowed& borrowed) {
    if (!borrowed.by) return Status();
    TrainerState& s = *borrowed.by;
    BABYGPT_TRY(s.on->download(s.device, s.tape.frozen ? DevicePart::adapter : DevicePart::weights, s.home));
    s.lent->by = nullptr, s.lent = nullptr;
    return Status();
}
BABYGPT_RARE Status bring_moments(TrainerState& s) {
    if (!s.newer_moments) return Status();
    BABYGPT_TRY(s.on->download(s.device, DevicePart::moment1, s.moment1));
    BABYGPT_TRY(s.on->download(s.device, DevicePart::moment2, s.moment2));
    BABYGPT_TRY(s.on->download(s.device, DevicePart::loss_scale, s.loss_scale));
    s.newer_moments = false;
    return Status();
}
BABYGPT_RARE Status bring_all(TrainerState& s) {
    if (s.lent) BABYGPT_TRY(give_back(*s.lent));
    return bring_moments(s);
}
// What the host has changed since the device saw it.
BABYGPT_RARE Status send(TrainerState& s, const Model& model, const Adapter* adapter) {
    if (s.weights_there != model.version) {
        BABYGPT_TRY(bring(model));
        BABYGPT_TRY(s.on->upload(s.device, DevicePart::weights, model.weights));
        s.weights_there = model.version;
    }
    if (adapter && s.adapter_there != adapter->version) {
        BABYGPT_TRY(give_back(adapter->state->borrowed));
        BABYGPT_TRY(s.on->upload(s.device, DevicePart::adapter, adapter->weights));
        s.adapter_there = adapter->version;
    }
    if (!s.newer_here || !s.moment1) return Status();
    BABYGPT_TRY(s.on->upload(s.device, DevicePart::moment1, s.moment1));
    BABYGPT_TRY(s.on->upload(s.device, DevicePart::moment2, s.moment2));
    BABYGPT_TRY(s.on->upload(s.device, DevicePart::loss_scale, s.loss_scale));
    s.newer_here = false;
    return Status();
}
// What a decoder learns from running text lies on the device, four bytes an id; of a batch only the places of its windows are sent. More than
// 1 GiB would be missed there by weights and activations: then the ids are sent, a batch at a time.
BABYGPT_RARE uint64_t text_room(const Config& c, const Data* data, uint64_t tokens) {
    constexpr uint64_t most_text = (uint64_t(1) << 30) / sizeof(int32_t);
    const bool reads = c.causal && c.encoder_layers == 0 && c.classes == 0 && c.features == 0 && !(data && data->evaluation_example(0));
    return reads && tokens <= most_text ? tokens : 0;
}
inline bool is_there(const TrainerState& s, const Config& c, const Data& data) {
    return data.tokens <= s.text_room && text_room(c, &data, data.tokens) > 0;
}
// The training data's text, where it is not the one that was sent before; all of its ids are looked at, now and never again.
BABYGPT_RARE Status send_text(TrainerState& s, const Data& data) {
    int32_t ids[4096];
    s.tokens_there = 0;
    for (uint64_t at = 0; at < data.tokens; at += 4096) {
        const size_t n = static_cast<size_t>(least(data.tokens - at, uint64_t(4096)));
        BABYGPT_TRY(fetch_ids(*data.state, at, n, ids));
        for (size_t i = 0; i < n; ++i)
            if (id_of(ids[i]) >= s.tape.vocab)
                return fail(Error::invalid_argument, "the id ", id_of(ids[i]), " is none of the model's ", s.tape.vocab);
        BABYGPT_TRY(s.on->keep_text(s.device, static_cast<int64_t>(at), ids, static_cast<int64_t>(n)));
    }
    s.text_there = data.fingerprint, s.tokens_there = data.tokens;
    return Status();
}
BABYGPT_RARE DevicePlan plan_of(const Runtime& runtime, const Tape& t, const Config& config, int sequences, uint64_t text = 0) {
    DevicePlan p{};
    p.tensors = {t.tensors.items, t.tensors.count}, p.ops = {t.ops.items, t.ops.count}, p.weights = {t.weights.items, t.weights.count};
    p.adapter = {t.adapter.items, t.adapter.count}, p.loras = {t.loras.items, t.loras.count}, p.waves = {t.waves.items, t.waves.count};
    p.weight_block = t.weight_block, p.adapter_block = t.adapter_block, p.activation_block = t.activation_block;
    for (int side = 0; side < 3; ++side) p.max_rows[side] = t.max_rows[side];
    p.sequences = sequences;
    p.width = t.width, p.vocab = t.vocab, p.context = t.context, p.features = config.features, p.head_out = t.head_out, p.rank = t.rank;
    p.epsilon = t.epsilon, p.lora_scale = t.lora_scale;
    p.output_rows = t.output_rows, p.frozen = t.frozen, p.training = t.training;
    p.precision = runtime.precision;
    p.text = static_cast<int64_t>(text);
    return p;
}
// A forward pass alone, with its losses.
Status forward(Runtime& runtime, TrainerState& s, const Run& run) {
    if (!s.device) return s.backend->forward(runtime, s.tape, s.regions, run), Status();
    BABYGPT_TRY(s.on->run(s.device, run, nullptr));
    return s.on->losses(s.device, s.target_rows, s.regions.losses, s.regions.ranks);
}

// Hands out places in a block that is not there yet. `memory` null: only counts.
struct Layout {
    char* memory = nullptr;
    uint64_t bytes = 0;
    template <class T>
    T* take(int64_t count) {
        T* place = memory ? reinterpret_cast<T*>(memory + static_cast<size_t>(bytes)) : nullptr;
        bytes += round_up(static_cast<uint64_t>(count) * sizeof(T), uint64_t(cache_line));
        return place;
    }
};

// The order of the block. The first three are a trainer's open fields; an evaluation alone has none.
inline void lay_out(Layout& layout, TrainerState& s, Trainer* trainer, const Config& config, int batch, int threads) {
    const Tape& tape = s.tape;
    const int64_t rows = tape.rows_on(Side::text), sources = tape.rows_on(Side::source);
    if (trainer) {
        trainer->gradients = s.on ? nullptr : layout.take<float>(tape.learnt_block());
        trainer->moment1 = layout.take<float>(tape.learnt_block());
        trainer->moment2 = layout.take<float>(tape.learnt_block());
        s.moment1 = trainer->moment1, s.moment2 = trainer->moment2;
        s.regions.gradients = trainer->gradients;
        s.regions.lookup_gradients = s.on ? nullptr : layout.take<float>(tape.lookup_block());
    }
    if (!s.on) {
        s.regions.activations = layout.take<float>(tape.activation_block);
        s.regions.low = layout.take<float>(tape.low_block());
        s.regions.scratch = layout.take<float>(s.backend->scratch(tape, threads));
    }
    s.regions.threads = threads;
    s.regions.losses = layout.take<double>(rows);
    s.regions.ranks = layout.take<int32_t>(rows);
    s.ids = layout.take<int32_t>(rows);
    s.targets = layout.take<int32_t>(rows);
    s.row_weights = layout.take<float>(rows);
    s.source_ids = layout.take<int32_t>(sources);
    s.features = layout.take<float>(rows * config.features);
    s.sequences = layout.take<Sequence>(batch);
    s.sources = layout.take<Sequence>(sources > 0 ? batch : 0);
    s.starts = layout.take<int32_t>(s.text_room > 0 ? batch : 0);
    if (trainer && !s.on) s.partial = layout.take<double>(square_blocks(tape));
}

// Bytes that a tape's own records take.
inline uint64_t record_bytes(const Tape& tape) {
    return tape.tensors.capacity * sizeof(Tensor) + tape.ops.capacity * sizeof(Op) + tape.weights.capacity * sizeof(WeightPlan) +
           tape.names.capacity * sizeof(Weight) + tape.waves.capacity * sizeof(float) + tape.adapter.capacity * sizeof(WeightPlan) +
           tape.loras.capacity * sizeof(Lora);
}

Status check_batch(int batch, int context) {
    constexpr int64_t max_rows = int64_t(1) << 24;
    if (batch >= 1 && static_cast<int64_t>(batch) * context <= max_rows) return Status();
    return fail(Error::invalid_argument, "batch is ", batch, ", but batch * context must be from 1 to ", max_rows);
}

Status backend_for(const Runtime& runtime, const BackendFunctions*& backend, bool training = false) {
    backend = find_backend(runtime, training);
    if (backend) return Status();
    return fail(Error::not_built,
                "this program was built without CUDA: add babygpt_cuda.cu to its compile line, or choose the backend cpu");
}

Status check(const TrainConfig& c, int context) {
    const auto positive = [](const char* name, double value) {
        return value > 0 && is_finite(value) ? Status() : fail(Error::invalid_argument, name, " is ", value, ", but must be above 0");
    };
    const auto share = [](const char* name, double value) {  // in [0, 1)
        return value >= 0 && value < 1 ? Status() : fail(Error::invalid_argument, name, " is ", value, ", but must be from 0 to below 1");
    };
    BABYGPT_TRY(positive("batch", c.batch));
    BABYGPT_TRY(positive("accumulate", c.accumulate));
    BABYGPT_TRY(check_batch(c.batch, context));
    BABYGPT_TRY(positive("steps", static_cast<double>(c.steps)));
    BABYGPT_TRY(positive("lr", c.lr));
    BABYGPT_TRY(positive("muon_lr", c.muon_lr));
    if (c.optimizer != Optimizer::adamw && c.optimizer != Optimizer::muon)
        return fail(Error::invalid_argument, "optimizer must be adamw or muon");
    BABYGPT_TRY(positive("epsilon", static_cast<double>(static_cast<float>(c.epsilon))));
    BABYGPT_TRY(share("beta1", c.beta1));
    BABYGPT_TRY(share("beta2", c.beta2));
    BABYGPT_TRY(share("dropout", c.dropout));
    BABYGPT_TRY(share("label_smoothing", c.label_smoothing));
    if (!(c.weight_decay >= 0) || !(c.clip >= 0)) return fail(Error::invalid_argument, "weight_decay and clip must not be below 0");
    if (!(c.min_lr <= c.lr)) return fail(Error::invalid_argument, "min_lr is ", c.min_lr, ", above lr, ", c.lr);
    if (c.warmup > c.steps) return fail(Error::invalid_argument, "warmup is ", c.warmup, " steps, but the whole run has ", c.steps);
    return Status();
}

inline double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent > 0; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

// Running text cannot teach everything.
Status check_data(const Model& model, const Data& data) {
    const Config& c = model.config;
    if (data.evaluation_example(0)) return Status();
    if (c.encoder_layers > 0 || c.classes > 0 || c.features > 0)
        return fail(Error::invalid_argument, "a model with an encoder, classes or features learns from examples, not from running text");
    if (c.causal || mask_id(model) >= 0) return Status();
    return fail(Error::invalid_argument, "vocab is ", c.vocab,
                ", as many as the tokenizer has, of which none is [MASK]: an encoder needs one more");
}

Status no_trainer() { return fail(Error::invalid_argument, "the trainer is empty: create it first"); }

Status fill(Trainer& trainer, Runtime& from, const Model& of, Adapter* adapter, const TrainConfig& wanted, const Data& data) {
    if (adapter && !adapter->weights) return fail(Error::invalid_argument, "the adapter is empty: create or load it first");
    if (adapter && wanted.optimizer != Optimizer::adamw) return fail(Error::invalid_argument, "an adapter learns by adamw, not by muon");
    if (!of.state) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    BABYGPT_TRY(bring(of));
    BABYGPT_TRY(check(wanted, of.config.context));
    TrainConfig& config = trainer.config;
    config = wanted;
    if (config.min_lr < 0) config.min_lr = config.schedule == Schedule::inverse_sqrt ? 0 : config.lr / 10;
    if (config.warmup < 0) config.warmup = least<int64_t>(100, config.steps / 10);
    if (config.evaluate_every <= 0) config.evaluate_every = most<int64_t>(1, config.steps / 20);
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(from, backend, true));
    trainer.runtime = &from;
    TrainerState* const state = trainer.state = create<TrainerState>(from, from);
    if (!state) return out_of_memory(sizeof(TrainerState));
    trainer.loss_scale = state->loss_scale;
    state->backend = backend;
    choose_device(*state, from);
    state->text_room = state->on ? text_room(of.config, &data, data.tokens) : 0;
    state->tape.frozen = adapter != nullptr;
    BABYGPT_TRY(record(state->tape, of.config, config.batch * of.config.context, true, config.dropout, config.batch,
                       adapter ? &adapter->config : nullptr));
    if (adapter) BABYGPT_TRY(check_adapter(state->tape, *adapter));
    Layout layout;
    lay_out(layout, *state, &trainer, of.config, config.batch, from.thread_count());
    if (!state->memory.take(from, layout.bytes, true)) return out_of_memory(layout.bytes);
    layout = Layout{state->memory.memory, 0};
    lay_out(layout, *state, &trainer, of.config, config.batch, from.thread_count());
    if (!state->on) return Status();
    DevicePlan plan = plan_of(from, state->tape, of.config, config.batch, state->text_room);
    plan.muon = config.optimizer == Optimizer::muon;
    return state->on->create(plan, state->device);
}

Status start(Trainer& t, Runtime& from, const Model& of, Adapter* adapter, const TrainConfig& wanted, Data& data, Data* held_out) {
    t = Trainer();
    Status status = fill(t, from, of, adapter, wanted, data);
    if (status.ok()) status = check_data(of, data);
    if (status.ok() && held_out && held_out->evaluation_windows(of.config.context) == 0)
        status = fail(Error::invalid_argument, "the validation data has fewer than two tokens: leave it out or give more text");
    if (!status.ok()) return t = Trainer(), status;
    t.model = &of, t.adapter = adapter;
    t.training = &data, t.validation = held_out;
    start_pool(from);
    return status;
}

}  // namespace

Trainer::Trainer(Trainer&& other) noexcept { *this = static_cast<Trainer&&>(other); }
Trainer& Trainer::operator=(Trainer&& other) noexcept {
    if (this == &other) return *this;
    if (state) (void)fetch();
    if (state) destroy(*runtime, state);
    config = other.config, model = other.model, adapter = other.adapter, training = other.training, validation = other.validation;
    step_count = other.step_count;
    best_validation_loss = other.best_validation_loss, best_accuracy = other.best_accuracy, best_step = other.best_step,
    bad_evaluations = other.bad_evaluations, evaluation_due = other.evaluation_due, under_way = other.under_way;
    gradients = other.gradients, moment1 = other.moment1, moment2 = other.moment2, loss_scale = other.loss_scale, runtime = other.runtime,
    state = other.state;
    other.state = nullptr;
    other.gradients = other.moment1 = other.moment2 = other.loss_scale = nullptr;
    return *this;
}
Trainer::~Trainer() {
    if (state) (void)fetch();
    if (state) destroy(*runtime, state);
}

Status Trainer::create(Runtime& from, const Model& of, Adapter& learner, const TrainConfig& wanted, Data& data, Data* held_out) {
    return start(*this, from, of, &learner, wanted, data, held_out);
}
Status Trainer::create(Runtime& from, Model& of, const TrainConfig& wanted, Data& data, Data* held_out) {
    BABYGPT_TRY(start(*this, from, of, nullptr, wanted, data, held_out));
    state->trained = &of;
    of.config.dtype = Dtype::f32;
    return Status();
}

// ---- a step --------------------------------------------------------------------------------------------------------------

namespace {

// The micro-batch that lies in the state: sequences of up to `context` rows each.
inline Run make_run(const TrainerState& state) {
    Run run;
    run.sequences = Span<const Sequence>(state.sequences, static_cast<size_t>(state.count));
    run.rows = state.rows;
    run.ids = state.run_ids;
    run.features = state.features;
    if (state.source_rows > 0) {
        run.source.rows = state.source_rows, run.source.ids = state.source_ids;
        run.source.sequences = Span<const Sequence>(state.sources, static_cast<size_t>(state.count));
    }
    run.targets = state.run_targets;
    run.row_weights = state.weighted ? state.row_weights : nullptr;
    run.starts = state.from_text ? state.starts : nullptr;
    return run;
}
inline void empty_batch(TrainerState& s) {
    s.count = s.rows = s.source_rows = s.target_rows = 0, s.weighted = s.from_text = false;
    s.run_ids = s.ids, s.run_targets = s.targets;
}
// So many targets more. A weight is written where it is not 1, or one before was not.
inline void add_targets(TrainerState& s, int count, float weight) {
    float* const weights = s.row_weights;
    const int before = s.target_rows, after = before + count;
    if (!s.weighted && (weight < 1 || weight > 1)) {
        for (int i = 0; i < before; ++i) weights[i] = 1;
        s.weighted = true;
    }
    for (int i = before; i < after && s.weighted; ++i) weights[i] = weight;
    s.target_rows = after;
}
inline double row_weight(const TrainerState& s, int row) { return s.weighted ? static_cast<double>(s.row_weights[row]) : 1; }
// The batch grows by a sequence of running text, whose ids and targets already stand where they belong.
inline void add_window(TrainerState& s, int length) {
    s.sequences[s.count++] = Sequence{s.rows, length, 0, nullptr};
    s.rows += length;
    add_targets(s, length, 1);
}
// Of a window of running text an encoder alone sees gaps (Devlin et al. 2019, appendix A.1): of 100 ids 15 are to be said; in the place of 80
// in 100 of these stands the mask, of 10 any id, and 10 stay. Which these are follows from the window's number, so that resuming is exact.
void make_gaps(const Model& model, uint64_t key, int32_t* ids, int32_t* targets, int length) {
    const int32_t mask = mask_id(model), known = model.tokenizer.vocab > 0 ? model.tokenizer.vocab : mask;
    int gaps = 0;
    const auto ask = [&](int i) {
        const uint64_t at = 4 * static_cast<uint64_t>(i);
        const double what = random_uniform(key, at + 1);
        targets[i] = ids[i];
        if (what < 0.8) ids[i] = mask;
        else if (what < 0.9) ids[i] = static_cast<int32_t>(random_uniform(key, at + 2) * known);
        ++gaps;
    };
    for (int i = 0; i < length; ++i) {
        targets[i] = -1;
        if (!is_mark(model.tokenizer, ids[i]) && random_uniform(key, 4 * static_cast<uint64_t>(i)) < 0.15) ask(i);
    }
    if (gaps == 0) ask(static_cast<int>(random_uniform(key, 3) * length));
}
// Is it what a model can read?
Status check_example(const Config& c, const Example& e) {
    const size_t context = static_cast<size_t>(c.context), features = e.ids.size * static_cast<size_t>(c.features);
    if (e.ids.size < 1 || e.ids.size > context)
        return fail(Error::invalid_argument, "an example has ", uint64_t(e.ids.size), " ids, but must have from 1 to context, ", c.context);
    if (e.features.size != features)
        return fail(Error::invalid_argument, "an example has ", uint64_t(e.features.size), " features, but must have ", uint64_t(features));
    return Status();
}
// The batch grows by an example.
Status add_example(TrainerState& s, const Config& c, const Example& e) {
    const size_t context = static_cast<size_t>(c.context), targets = c.classes > 0 ? 1 : e.ids.size;
    BABYGPT_TRY(check_example(c, e));
    if (e.targets.size != targets)
        return fail(Error::invalid_argument, "an example has ", uint64_t(e.targets.size), " targets, but must have ", uint64_t(targets));
    if ((e.source.size > 0) != (c.encoder_layers > 0) || e.source.size > context)
        return fail(Error::invalid_argument, "an example has a source of ", uint64_t(e.source.size),
                    c.encoder_layers > 0 ? " ids, but must have from 1 to context" : " ids, but the model has no encoder");
    if (!(e.weight >= 0) || !is_finite(e.weight))
        return fail(Error::invalid_argument, "an example's weight is ", static_cast<double>(e.weight), ", but must not be below 0");
    const auto put = [](auto* to, const auto& from) {
        if (from.size > 0) memcpy(to, from.data, from.size * sizeof *to);
    };
    put(s.ids + s.rows, e.ids), put(s.targets + s.target_rows, e.targets);
    put(s.features + static_cast<int64_t>(s.rows) * c.features, e.features);
    const int source = s.count, length = static_cast<int>(e.ids.size), source_length = static_cast<int>(e.source.size);
    if (source_length > 0) {
        put(s.source_ids + s.source_rows, e.source);
        s.sources[source] = Sequence{s.source_rows, source_length, 0, nullptr};
    }
    s.sequences[s.count++] = Sequence{s.rows, length, 0, nullptr, nullptr, -1, source};
    s.rows += length, s.source_rows += source_length;
    add_targets(s, static_cast<int>(targets), e.weight);
    return Status();
}

BABYGPT_UNHURRIED_END

// Over all ids of a batch, eight at once: so compilers make vectors of it. x - low and high - 1 - x are not negative where x is in [low, high).
bool any_outside(const int32_t* ids, int count, int32_t low, int32_t high) {
    uint32_t outside[8] = {};
    const uint32_t first = static_cast<uint32_t>(low), last = static_cast<uint32_t>(high) - 1;
    const auto look = [&](int i, int k) { outside[k] |= (static_cast<uint32_t>(ids[i]) - first) | (last - static_cast<uint32_t>(ids[i])); };
    int i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; ++k) look(i + k, k);
    for (; i < count; ++i) look(i, 0);
    for (int k = 1; k < 8; ++k) outside[0] |= outside[k];
    return outside[0] >> 31;
}
int count_negative(const int32_t* ids, int count) {
    uint32_t negative[8] = {};
    int i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; ++k) negative[k] += static_cast<uint32_t>(ids[i + k]) >> 31;
    for (; i < count; ++i) negative[0] += static_cast<uint32_t>(ids[i]) >> 31;
    for (int k = 1; k < 8; ++k) negative[0] += negative[k];
    return static_cast<int>(negative[0]);
}

BABYGPT_UNHURRIED_BEGIN

Status check_ids(const TrainerState& s) {
    const int vocab = s.tape.vocab, outputs = s.tape.head_out;
    const auto check = [](const char* what, const int32_t* ids, int count, int32_t low, int32_t high) {
        if (!any_outside(ids, count, low, high)) return Status();
        while (*ids >= low && *ids < high) ++ids;
        return fail(Error::invalid_argument, "the ", what, " ", *ids, " is none of the model's ", high);
    };
    BABYGPT_TRY(check("id", s.run_ids, s.rows, 0, vocab));
    BABYGPT_TRY(check("id", s.source_ids, s.source_rows, 0, vocab));
    return check("target", s.run_targets, s.target_rows, -1, outputs);
}
// How many targets count, by their weights.
double weights_sum(const TrainerState& s) {
    if (!s.weighted) return s.target_rows - count_negative(s.run_targets, s.target_rows);
    double sum = 0;
    for (int i = 0; i < s.target_rows; ++i) sum += s.run_targets[i] < 0 ? 0 : static_cast<double>(s.row_weights[i]);
    return sum;
}
// Where a step's batch comes from: the caller's examples, the caller's windows of ids and targets, or, without either, the training data.
struct Given {
    Span<const Example> examples;
    const int32_t *ids = nullptr, *targets = nullptr;
};
// The training data's windows from number n on, whose ids the device has.
Status fill_from_text(Trainer& t, uint64_t n) {
    TrainerState& s = *t.state;
    const Data& data = *t.training;
    const int context = t.model->config.context;
    if (s.tokens_there != data.tokens || s.text_there != data.fingerprint) BABYGPT_TRY(send_text(s, data));
    for (int i = 0; i < t.config.batch; ++i) {
        uint64_t start;
        BABYGPT_TRY(find_window(data, t.config.seed, n + static_cast<uint64_t>(i), context, start));
        s.starts[i] = static_cast<int32_t>(start);
        s.sequences[i] = Sequence{i * context, context, 0, nullptr};
    }
    s.count = t.config.batch, s.rows = s.target_rows = s.count * context;
    s.from_text = true;
    return Status();
}
Status fill_batch(Trainer& t, const Given& given, int micro) {
    TrainerState& s = *t.state;
    const Config& config = t.model->config;
    const uint64_t batch = static_cast<uint64_t>(t.config.batch), first = static_cast<uint64_t>(micro) * batch;
    const uint64_t before = static_cast<uint64_t>(t.step_count) * batch * static_cast<uint64_t>(t.config.accumulate);
    empty_batch(s);
    const bool plain = config.encoder_layers == 0 && config.classes == 0 && config.features == 0;
    if (given.ids && plain) {  // they are read where they are
        const size_t at = static_cast<size_t>(first) * static_cast<size_t>(config.context);
        s.run_ids = given.ids + at, s.run_targets = given.targets + at;
        for (int i = 0; i < t.config.batch; ++i) add_window(s, config.context);
        return check_ids(s);
    }
    if (s.device && !given.ids && given.examples.size == 0 && is_there(s, config, *t.training)) return fill_from_text(t, before + first);
    for (uint64_t n = first; n < first + batch; ++n) {
        const size_t i = static_cast<size_t>(n), context = static_cast<size_t>(config.context);
        const Example* example = given.examples.size > 0 ? &given.examples[i] : nullptr;
        Example window;
        if (given.ids) {
            window.ids = {given.ids + i * context, context}, window.targets = {given.targets + i * context, context};
            example = &window;
        }
        if (!example) example = t.training->training_example(t.config.seed, before + n);
        if (example) BABYGPT_TRY(add_example(s, config, *example));
        else {
            int32_t *const ids = s.ids + s.rows, *const targets = s.targets + s.rows;
            BABYGPT_TRY(t.training->training_window(t.config.seed, before + n, config.context, ids, targets));
            if (!config.causal) make_gaps(*t.model, random_key(t.config.seed, before + n, random_mask, 0), ids, targets, config.context);
            add_window(s, config.context);
        }
    }
    return check_ids(s);
}

// The sum of the micro-batch's losses, and of their weights.
inline void add_losses(const TrainerState& s, double& loss, double& weight) {
    for (int i = 0; i < s.target_rows; ++i) {
        const double counts = s.run_targets[i] < 0 ? 0 : row_weight(s, i);
        loss += counts * s.regions.losses[i], weight += counts;
    }
}
// What the update is made of, without the gradients' scale.
UpdateRule rule_of(const TrainConfig& c, double lr, int64_t number) {
    UpdateRule rule{};
    AdamW& adam = rule.adam;
    adam.beta1 = static_cast<float>(c.beta1), adam.one_minus_beta1 = static_cast<float>(1 - c.beta1);
    adam.beta2 = static_cast<float>(c.beta2), adam.one_minus_beta2 = static_cast<float>(1 - c.beta2);
    adam.step_size = static_cast<float>(lr / (1 - power(c.beta1, number)));
    adam.root_scale = static_cast<float>(1 / root(1 - power(c.beta2, number)));
    adam.epsilon = static_cast<float>(c.epsilon);
    adam.decay = static_cast<float>(lr * c.weight_decay);
    constexpr double momentum = 0.95;
    const double muon_lr = c.muon_lr * (lr / c.lr);
    rule.uses_muon = c.optimizer == Optimizer::muon;
    rule.muon.momentum = static_cast<float>(momentum), rule.muon.one_minus_momentum = static_cast<float>(1 - momentum);
    rule.muon.step_size = static_cast<float>(muon_lr);
    rule.muon.keep = static_cast<float>(1 - muon_lr * c.weight_decay);
    return rule;
}
// Nothing may be left of the micro-batches before.
BABYGPT_RARE Status drop_gradients(Trainer& t, const Status& why) {
    TrainerState& s = *t.state;
    if (s.device) {
        const Status zeroed = s.on->upload(s.device, DevicePart::gradients, nullptr);
        return zeroed.ok() ? why : zeroed;
    }
    memset(t.gradients, 0, static_cast<size_t>(s.tape.learnt_block()) * sizeof(float));
    memset(s.regions.lookup_gradients, 0, static_cast<size_t>(s.tape.lookup_block()) * sizeof(float));
    return why;
}
// One update. Gradients are weighted sums over tokens; they are divided once, here: so micro-batches add up to the bits of the large batch.
Status begin(Trainer& t, const Given& given) {
    const FloatMode mode;
    TrainerState& s = *t.state;
    if (t.under_way == steps_ahead)
        return fail(Error::invalid_argument, steps_ahead, " steps are under way: read the oldest one's result by finish_step");
    Begun& begun = s.begun[static_cast<size_t>((t.step_count + 1) % steps_ahead)];
    StepResult& result = begun.result;
    begun = Begun();
    begun.start = seconds_now();
    s.regions.weights = t.model->weights;
    s.regions.adapter = t.adapter ? t.adapter->weights : nullptr;
    uint64_t& version = t.adapter ? t.adapter->version : s.trained->version;
    const int64_t number = t.step_count + 1;
    double loss = 0, weight = 0;
    uint64_t first_row[3] = {};
    result.lr = t.learning_rate(t.step_count);
    UpdateRule rule = rule_of(t.config, result.lr, number);
    if (s.device) BABYGPT_TRY(send(s, *t.model, t.adapter));
    for (int micro = 0; micro < t.config.accumulate; ++micro) {
        const Status status = fill_batch(t, given, micro);
        if (!status.ok()) return drop_gradients(t, status);
        Run run = make_run(s);
        run.training = true;
        run.dropout = t.config.dropout, run.label_smoothing = t.config.label_smoothing;
        run.seed = t.config.seed, run.step = static_cast<uint64_t>(t.step_count);
        for (int side = 0; side < 3; ++side) {
            run.first_row[side] = first_row[side];
            first_row[side] += static_cast<uint64_t>(run.on(static_cast<Side>(side)).rows);
        }
        run.seconds = s.op_seconds;
        if (s.device) {
            if (!s.from_text) weight += weights_sum(s);
            const DeviceUpdate update = {rule, s.from_text ? 0 : weight > 0 ? weight : 1, t.config.clip};
            BABYGPT_TRY(s.on->run(s.device, run, micro + 1 == t.config.accumulate ? &update : nullptr));
            continue;
        }
        int32_t* ranks = s.regions.ranks;
        s.regions.ranks = nullptr;
        s.backend->forward(*t.runtime, s.tape, s.regions, run);
        s.backend->backward(*t.runtime, s.tape, s.regions, run);
        s.regions.ranks = ranks;
        add_losses(s, loss, weight);
    }
    begun.rows = static_cast<double>(first_row[0] + first_row[1]);
    if (s.device) {
        begun.weight = s.from_text ? 0 : weight > 0 ? weight : 1;
        s.newer_moments = true;
        s.lent = t.adapter ? &t.adapter->state->borrowed : &s.trained->state->borrowed;
        s.lent->by = &s, s.home = t.adapter ? t.adapter->weights : s.trained->weights;
        (t.adapter ? s.adapter_there : s.weights_there) = ++version;  // also where it will turn out to be skipped
    } else {
        const double count = weight > 0 ? weight : 1;
        const double norm = root(s.backend->square_sum(*t.runtime, s.tape, s.regions, s.partial)) / count;
        result.loss = loss / count, result.grad_norm = norm, result.skipped = !is_finite(loss) || !is_finite(norm);
        if (result.skipped) memset(t.gradients, 0, static_cast<size_t>(s.tape.learnt_block()) * sizeof(float));
        else {
            const double clipping = t.config.clip > 0 && norm > t.config.clip ? t.config.clip / norm : 1;
            rule.adam.gradient_scale = rule.muon.gradient_scale = static_cast<float>(clipping / count);
            float* const w = t.adapter ? t.adapter->weights : s.trained->weights;
            s.backend->update(*t.runtime, s.tape, s.regions, w, t.moment1, t.moment2, rule);
            ++version;
        }
        result.tokens_per_second = begun.rows / most(seconds_now() - begun.start, 1e-9);
    }
    result.step = t.step_count = number;
    ++t.under_way;
    return Status();
}
// The oldest step's result. A device's steps overlap what the host does: one has taken no longer than since the one before ended.
Status finish(Trainer& t, StepResult& result) {
    const FloatMode mode;
    TrainerState& s = *t.state;
    if (t.under_way == 0) return fail(Error::invalid_argument, "no step is under way: begin one first");
    const Begun& begun = s.begun[static_cast<size_t>((t.step_count - --t.under_way) % steps_ahead)];
    result = begun.result;
    if (!s.device) return Status();
    DeviceResult there{};
    BABYGPT_TRY(s.on->result(s.device, t.under_way, there));
    const double count = begun.weight > 0 ? begun.weight : there.targets > 0 ? there.targets : 1;
    result.loss = there.loss / count, result.grad_norm = there.grad_norm, result.skipped = there.skipped;
    const double seconds = seconds_now() - begun.start;
    result.tokens_per_second = begun.rows / most(there.seconds > 0 ? least(there.seconds, seconds) : seconds, 1e-9);
    return Status();
}
Status step(Trainer& t, const Given& given, StepResult& result) {
    while (t.under_way > 0) BABYGPT_TRY(finish(t, result));
    BABYGPT_TRY(begin(t, given));
    return finish(t, result);
}

}  // namespace

Status Trainer::step(StepResult& result) { return state ? babygpt::step(*this, Given(), result) : no_trainer(); }
Status Trainer::begin_step() { return state ? begin(*this, Given()) : no_trainer(); }
Status Trainer::finish_step(StepResult& result) { return state ? finish(*this, result) : no_trainer(); }

Status Trainer::step(Span<const int32_t> ids, Span<const int32_t> targets, StepResult& result) {
    if (!state) return no_trainer();
    const size_t wanted =
        static_cast<size_t>(config.batch) * static_cast<size_t>(config.accumulate) * static_cast<size_t>(model->config.context);
    if (ids.size != wanted || targets.size != wanted)
        return fail(Error::invalid_argument, "a step needs ", static_cast<uint64_t>(wanted),
                    " ids and targets (batch * accumulate * context), not ", static_cast<uint64_t>(ids.size), " and ",
                    static_cast<uint64_t>(targets.size));
    return babygpt::step(*this, Given{{}, ids.data, targets.data}, result);
}

Status Trainer::step(Span<const Example> examples, StepResult& result) {
    if (!state) return no_trainer();
    const size_t wanted = static_cast<size_t>(config.batch) * static_cast<size_t>(config.accumulate);
    if (examples.size != wanted)
        return fail(Error::invalid_argument, "a step needs ", uint64_t(wanted), " examples (batch * accumulate), not ",
                    uint64_t(examples.size));
    return babygpt::step(*this, Given{examples, nullptr, nullptr}, result);
}

namespace {

BABYGPT_RARE Status nothing_to_evaluate() {
    return fail(Error::invalid_argument, "there is nothing to evaluate on: the text has fewer than two tokens, or no answers");
}
struct Sums {  // what an evaluation is made of
    double loss = 0, weight = 0;
    uint64_t tokens = 0, best1 = 0, best5 = 0;
    void add(double token_loss, int32_t rank, double counts = 1) {
        loss += counts * token_loss, weight += counts;
        ++tokens;
        best1 += rank < 1, best5 += rank < 5;
    }
    void finish(const Data& data, Evaluation& result) const {
        const double count = static_cast<double>(tokens);
        const double of_all = data.evaluation_example(0) ? 1 : count / static_cast<double>(data.tokens - 1);
        const double bytes = static_cast<double>(data.bytes) * of_all;
        result.tokens = tokens;
        result.loss = loss / weight;
        result.perplexity = exp_of(result.loss);
        result.bits_per_byte = bytes > 0 ? loss * log2_e / bytes : 0;
        result.top1 = static_cast<double>(best1) / count;
        result.top5 = static_cast<double>(best5) / count;
        result.unknown = data.unknown;
    }
};

template <class GoOn>
Status evaluate_windows(Runtime& runtime, TrainerState& s, const Model& model, const Adapter* adapter, int batch, Data& data,
                        Evaluation& result, const GoOn& go_on) {
    const FloatMode mode;
    const int context = model.config.context;
    const uint64_t windows = data.evaluation_windows(context);
    s.regions.weights = model.weights;
    s.regions.adapter = adapter ? adapter->weights : nullptr;
    BABYGPT_TRY(check_data(model, data));
    if (s.device) BABYGPT_TRY(send(s, model, adapter));
    result = Evaluation();
    Sums sums;
    for (uint64_t window = 0; window < windows && (window == 0 || go_on(static_cast<double>(window) / static_cast<double>(windows)));) {
        empty_batch(s);
        for (; s.count < batch && window < windows; ++window) {
            if (const Example* example = data.evaluation_example(window)) {
                BABYGPT_TRY(add_example(s, model.config, *example));
                continue;
            }
            int length = 0;
            int32_t *const ids = s.ids + s.rows, *const targets = s.targets + s.rows;
            BABYGPT_TRY(data.evaluation_window(window, context, ids, targets, length));
            if (!model.config.causal) make_gaps(model, random_key(0, window, random_mask, 1), ids, targets, length);
            add_window(s, length);
        }
        BABYGPT_TRY(check_ids(s));
        BABYGPT_TRY(forward(runtime, s, make_run(s)));
        for (int i = 0; i < s.target_rows; ++i)
            if (s.run_targets[i] >= 0) sums.add(s.regions.losses[i], s.regions.ranks[i], row_weight(s, i));
    }
    if (!(sums.weight > 0)) return nothing_to_evaluate();
    sums.finish(data, result);
    if (!model.config.causal) result.bits_per_byte = 0;  // not all of the text was to be said
    return Status();
}

}  // namespace

Status Trainer::fetch() { return state ? bring_all(*state) : no_trainer(); }

Status Trainer::evaluate(Data& data, Evaluation& result) {
    if (!state) return no_trainer();
    return evaluate_windows(*runtime, *state, *model, adapter, config.batch, data, result, [](double) { return true; });
}

Status evaluate(Runtime& runtime, const Model& model, Data& data, Evaluation& result, int batch, bool (*progress)(void* user, double done),
                void* user, const Adapter* adapter) {
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(runtime, backend));
    TrainConfig config;
    config.batch = batch;
    BABYGPT_TRY(check(config, model.config.context));
    BABYGPT_TRY(bring(model));
    TrainerState state(runtime);
    state.backend = backend;
    choose_device(state, runtime);
    if (adapter && !adapter->weights) return fail(Error::invalid_argument, "the adapter is empty: create or load it first");
    BABYGPT_TRY(record(state.tape, model.config, batch * model.config.context, false, 0, batch, adapter ? &adapter->config : nullptr));
    if (adapter) BABYGPT_TRY(check_adapter(state.tape, *adapter));
    if (adapter) BABYGPT_TRY(give_back(adapter->state->borrowed));
    Layout layout;
    lay_out(layout, state, nullptr, model.config, batch, runtime.thread_count());
    if (!state.memory.take(runtime, layout.bytes, true)) return out_of_memory(layout.bytes);
    layout = Layout{state.memory.memory, 0};
    lay_out(layout, state, nullptr, model.config, batch, runtime.thread_count());
    if (state.on) BABYGPT_TRY(state.on->create(plan_of(runtime, state.tape, model.config, batch), state.device));
    start_pool(runtime);
    return evaluate_windows(runtime, state, model, adapter, batch, data, result,
                            [=](double done) { return !progress || progress(user, done); });
}

BABYGPT_RARE Status evaluate(Runtime& runtime, const Ngram& model, Data& data, Evaluation& result) {
    if (!model.state) return no_ngrams();
    if (data.tokens < 2) return nothing_to_evaluate();
    NgramState text(runtime, model.vocab);
    Array<char> learnt(runtime);
    BABYGPT_TRY(copy_ids(data, data.tokens, text, &learnt));
    start_pool(runtime);
    const size_t vocab = text.vocab, threads = static_cast<size_t>(runtime.thread_count()), n = text.count - 1;
    Array<double> probabilities(runtime), losses(runtime);
    Array<int32_t> ranks(runtime);
    if (!probabilities.resize(threads * vocab) || !losses.resize(n) || !ranks.resize(n))
        return out_of_memory(threads * vocab * sizeof(double) + n * (sizeof(double) + sizeof(int32_t)));
    parallel(runtime, static_cast<int>(threads), [&](int thread) {
        const size_t t = static_cast<size_t>(thread);
        double* p = probabilities.items + t * vocab;
        for (size_t i = n * t / threads; i < n * (t + 1) / threads; ++i) {
            const size_t length = least(i + 1, size_t(7)), target = static_cast<size_t>(text.id(i + 1));
            int32_t history[7];
            for (size_t k = 0; k < length; ++k) history[k] = text.id(i + 1 - length + k);
            predict_next(model, history, length, p);
            losses[i] = -log_of(p[target]);
            for (size_t v = 0; v < vocab; ++v) ranks[i] += p[v] > p[target] || (v < target && !(p[v] < p[target]));
        }
    });
    Sums sums;
    for (size_t i = 0; i < n; ++i)
        if (learnt[i + 1]) sums.add(losses[i], ranks[i]);
    if (sums.tokens == 0) return nothing_to_evaluate();
    sums.finish(data, result);
    return Status();
}

// ---- a whole run ---------------------------------------------------------------------------------------------------------

Status Trainer::run(const RunConfig& how, RunResult& result) {
    if (!state) return no_trainer();
    const double start = seconds_now();
    const int64_t first = step_count;
    const bool saves = how.out.size > 0;
    Array<char> resume(*runtime);
    if (saves) BABYGPT_TRY(resume_path(how.out, resume));
    // The model to use is the best by validation, or, where nothing is validated, the last. It is written before the state that goes beyond it.
    const auto save_all = [&]() {
        if (!saves) return Status();
        if (best_step < 0) BABYGPT_TRY(adapter ? adapter->save(how.out) : model->save(how.out));
        return save(view(resume));
    };
    result = RunResult();
    if (saves && best_step >= 0) {  // a resumed run writes its best model only when it gets better
        File best(*runtime);
        if (!best.open(how.out, FileMode::read).ok())
            return fail(Error::cannot_open, "'", how.out,
                        "', the best model of the run so far, is missing: put it back beside the resume file");
    }
    const auto go_on = [&](double done) {
        evaluation_due = how.evaluating && !how.evaluating(how.user, done);
        return !evaluation_due;
    };
    const auto report = [&](Progress& progress) {
        progress.steps = config.steps;
        progress.seconds = seconds_now() - start;
        const int64_t done = step_count - under_way;
        progress.seconds_left =
            progress.seconds / static_cast<double>(most(done - first, int64_t(1))) * static_cast<double>(config.steps - done);
        if (how.progress && !how.progress(how.user, progress)) result.cancelled = true;
    };
    // Of the steps under way, until no more are left than so many.
    const auto report_steps = [&](int left) {
        while (under_way > left) {
            StepResult one;
            Progress progress;
            progress.step = &one;
            BABYGPT_TRY(finish(*this, one));
            report(progress);
        }
        return Status();
    };
    while (evaluation_due || step_count < config.steps) {
        if (config.patience > 0 && bad_evaluations >= config.patience) {
            result.stopped_early = true;
            break;
        }
        if (how.stop_at > 0 && step_count >= how.stop_at && !evaluation_due) {
            result.cancelled = true;
            break;
        }
        StepResult step_result;
        Evaluation evaluation;
        Progress progress;
        const bool steps = !evaluation_due;
        if (steps) BABYGPT_TRY(begin(*this, Given()));
        const bool scheduled = evaluation_due || step_count % config.evaluate_every == 0 || step_count == config.steps;
        if (steps && !scheduled) {  // a device has enough to do with half of them
            BABYGPT_TRY(report_steps(!state->device ? 0 : under_way < steps_ahead ? steps_ahead : steps_ahead / 2));
        } else if (steps) {
            BABYGPT_TRY(report_steps(1));
            BABYGPT_TRY(finish(*this, step_result));
            progress.step = &step_result;
        }
        evaluation_due = false;
        if (scheduled && validation) {
            const Status status = evaluate_windows(*runtime, *state, *model, adapter, config.batch, *validation, evaluation, go_on);
            if (!evaluation_due) BABYGPT_TRY(status);  // of what was interrupted nothing may have counted yet
        }
        if (scheduled && validation && !evaluation_due) {
            progress.evaluation = &evaluation;
            // A classifier's loss rises while more and more is right: few examples, of which it is too sure, outweigh the others.
            const bool by_loss = model->config.classes == 0 || !(evaluation.top1 < best_accuracy || evaluation.top1 > best_accuracy);
            const bool better = by_loss ? evaluation.loss < best_validation_loss : evaluation.top1 > best_accuracy;
            progress.best = is_finite(evaluation.loss) && (best_step < 0 || better);
            ++bad_evaluations;
            if (progress.best) {
                best_validation_loss = evaluation.loss, best_step = step_count, bad_evaluations = 0;
                if (model->config.classes > 0) best_accuracy = evaluation.top1;
                if (saves) BABYGPT_TRY(adapter ? adapter->save(how.out) : model->save(how.out));
            }
        }
        result.stopped_early = config.patience > 0 && bad_evaluations >= config.patience;
        if (scheduled) report(progress);
        if (evaluation_due) result.cancelled = true;
        if (how.save_every > 0 ? step_count % how.save_every == 0 : scheduled) BABYGPT_TRY(save_all());
        if (result.cancelled || result.stopped_early) break;
    }
    BABYGPT_TRY(report_steps(0));
    BABYGPT_TRY(save_all());
    result.step = step_count;
    result.best_step = best_step;
    result.best_validation_loss = best_step < 0 ? 0 : best_validation_loss;
    result.seconds = seconds_now() - start;
    return Status();
}

}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 8] Talking
// =====================================================================================================================
// A session reads ids and keeps their keys and values (the KV cache), so that a further token costs one row. From the last row's
// logits the sampler draws the next token. generate() and reply() are loops around that, with stop strings and streaming; search() goes on
// with several texts at once and keeps the likeliest.

namespace babygpt {

namespace {

// Hypotheses are paths in a tree of tokens.
struct Branch {
    int32_t before, id;  // before: -1: it is the first
};
struct Beam {
    double logprob;
    int32_t branch;
    int parent;  // which of the beams before the last step it goes on from
};
struct Candidate {
    double logprob;
    int parent;
    int32_t id;
};
struct Ending {
    double score, logprob;
    int32_t branch;
    int tokens;
    bool by_itself;  // not by the limit
};

// How far each pattern of a guard has come.
struct Watch {
    uint64_t* states;  // [patterns], a bit for each element that may come next
    char bytes[4];     // the beginning of a character
    int count;
    bool in_word;   // the last character is of a word
    bool is_fresh;  // all of it stands in the prompt
};

// The end of what has been said: as much of it as a banned or stop string may have begun in.
struct Said {
    char* tail;
    size_t count;
    Watch watch;
};

// What a search needs beside the session's own; laid out by each search.
struct SearchMemory {
    Block block;
    float* logits = nullptr;                  // [beams][vocab]
    int32_t* tables[2] = {nullptr, nullptr};  // [beams][pages of a context]: the beams' pages, and those of the beams before the last step
    float** places = nullptr;                 // [sequences at once][pages of a context]: where those lie that they read
    int32_t* users = nullptr;                 // [all pages]
    int32_t* free_pages = nullptr;            // [all pages], a stack
    int32_t* ids = nullptr;                   // [beams] that they read next
    double* norms = nullptr;                  // [beams], log of the sum of e^logit
    Said* said[2] = {nullptr, nullptr};       // [beams]
    Branch* tree = nullptr;
    Beam* live[2] = {nullptr, nullptr};  // [beams]
    Candidate* candidates = nullptr;
    Ending* ended = nullptr;  // [beams]
};

}  // namespace

// A model's weights on a device, and what runs there; it ends with the last of the model and those sessions and pages that use it.
struct OnDevice {
    Runtime* runtime = nullptr;
    std::atomic<int> users{1};
    Bell lock;
    const DeviceFunctions* functions = nullptr;
    Generator* generator = nullptr;
    std::atomic<uint64_t> version{0};  // of the weights; 0: none yet
    static void drop(OnDevice*& device) {
        if (device && device->users.fetch_sub(1) == 1) {
            if (device->generator) device->functions->destroy_generator(device->generator);
            destroy(*device->runtime, device);
        }
        device = nullptr;
    }
};
ModelState::~ModelState() {
    for (OnDevice*& device : on_device) OnDevice::drop(device);
}

// Pages of the KV cache in one piece of memory, which ends with the last session that reads them.
struct Pages {
    Runtime* runtime = nullptr;
    std::atomic<int> users{1};
    Block memory;  // or, on a device, ...
    OnDevice* on = nullptr;
    void* there = nullptr;
    char* begin() const { return on ? static_cast<char*>(there) : memory.memory; }
    ~Pages() {
        if (there) {
            on->lock.enter();
            on->functions->drop_pages(on->generator, there);
            on->lock.leave();
        }
        OnDevice::drop(on);
    }
};

struct SessionState {
    Tape tape;
    Block memory, low_memory, here_memory;
    // The pages from number `shared` on are the session's own. Those before lie in `common`, are full and never written to.
    Pages *own = nullptr, *common = nullptr;
    int first_own = 0;  // the number of the page that `own` begins with
    int shared = 0;
    int kept = 0;        // ids that are not forgotten, those of the shared pages among them
    int page_count = 0;  // with those of searches, which come behind those of a context
    const Adapter* adapter = nullptr;
    SearchMemory search{};
    const BackendFunctions* backend = nullptr;
    OnDevice* on = nullptr;     // null: the session computes here
    bool narrow_pages = false;  // of bf16
    Regions<float> regions;
    float** pages = nullptr;        // [context / kv_page]: the keys and values of what has been read
    int32_t* history = nullptr;     // [context] ids read
    int32_t* source_ids = nullptr;  // [context] of an encoder-decoder's source
    int32_t* targets = nullptr;     // [chunk]
    float* logits = nullptr;        // [vocab]
    float* adjusted = nullptr;      // [vocab] after bias and penalty, then the candidates' weights
    int32_t* candidates = nullptr;  // [vocab]
    unsigned char* seen = nullptr;  // [vocab] for the repetition penalty
    char* held = nullptr;           // text that may yet turn out to be a stop string
    Said said{};
    // What a device has drawn of the logits, where the next token is the one from number `ahead_of`, drawn as `ahead_how` says.
    Draw ahead{};
    SampleConfig ahead_how;
    uint64_t ahead_of = 0;
    size_t held_room = 0;    // of both
    Sequence source{};       // length 0: none has been read. Its keys and values stay in the activations
    int chunk = 0;           // rows read at once
    int turn = 0;            // where the newest turn of a chat begins
    size_t place = 0;        // among the sessions of a next() for several
    bool ready = false;      // logits are there
    bool holes = false;      // the tokenizer has ids without a text
    bool line_open = false;  // what was read last does not end a line
    bool watches = false;    // said.watch is up to date for the guard that ...
    const Guard* watched = nullptr;
    Array<uint64_t> states;  // ... these are of: said.watch's, then those of a token on trial
    explicit SessionState(Runtime& runtime) : tape(runtime), states(runtime) {}
    ~SessionState() { drop(own), drop(common), OnDevice::drop(on); }
    static void drop(Pages*& pages) {
        if (pages && pages->users.fetch_sub(1) == 1) destroy(*pages->runtime, pages);
        pages = nullptr;
    }
};

namespace {

constexpr size_t longest_stop = 256;     // bytes of a stop or banned string
constexpr int most_at_once = 64;         // sequences that read a token in one pass
constexpr int worth_drawing_there = 16;  // of a device's: the processor draws fewer before the device's answer has come

inline int context_pages(int context) { return (context + kv_page - 1) / kv_page; }
inline uint64_t pages_bytes(const SessionState& s, int64_t pages) {
    const uint64_t floats = static_cast<uint64_t>(s.tape.kv_page_block()) * static_cast<uint64_t>(pages);
    return floats * (s.narrow_pages ? 2 : sizeof(float));
}
Status copy_page(const SessionState& s, void* to, const void* from) {
    if (s.on) return s.on->functions->copy_pages(s.on->generator, to, from, pages_bytes(s, 1));
    memcpy(to, from, static_cast<size_t>(pages_bytes(s, 1)));
    return Status();
}

inline void lay_out(Layout& layout, SessionState& s, bool on_device, int threads, size_t longest_token) {
    const Tape& tape = s.tape;
    s.regions.activations = layout.take<float>(on_device ? 0 : tape.activation_block);
    s.regions.scratch = layout.take<float>(on_device ? 0 : s.backend->scratch(tape, threads));
    s.regions.threads = threads;
    s.regions.losses = layout.take<double>(tape.rows_on(Side::text));
    s.pages = layout.take<float*>(context_pages(tape.context));
    s.history = layout.take<int32_t>(tape.context);
    s.source_ids = layout.take<int32_t>(tape.rows_on(Side::source));
    s.targets = layout.take<int32_t>(tape.rows_on(Side::text));
    s.logits = layout.take<float>(tape.head_out);
    s.adjusted = layout.take<float>(tape.vocab);
    s.candidates = layout.take<int32_t>(tape.vocab);
    s.seen = layout.take<unsigned char>(tape.vocab);
    s.held_room = 2 * longest_stop + longest_token;
    s.held = layout.take<char>(static_cast<int64_t>(s.held_room));
    s.said.tail = layout.take<char>(static_cast<int64_t>(s.held_room));
}

inline int chunk_rows(const Config& config) { return least(config.context, 256); }

// What a tape's runs read: the model's weights, and their packed copies in its present version, made by the first session that needs them.
Status bind_weights(Runtime& runtime, const Model& model, Tape& tape, const BackendFunctions& backend, Regions<float>& r) {
    ModelState& m = *model.state;
    m.lock.enter();
    Status status = give_back(m.borrowed);
    tape.dtype = model.config.dtype;
    ModelState::Packed* mine = m.packed;
    while (!m.only_runs && mine->by && mine->by != &backend) ++mine;  // there are no more backends than places
    if (m.only_runs && mine->by != &backend)
        status = fail(Error::unsupported,
                      "the model was loaded only to run, and with other kernels than these: load it without Purpose::running");
    if (status.ok() && mine->version != model.version) {
        status = mine->take(*model.runtime, tape, backend, model.version);
        if (status.ok()) pack_all(backend, runtime, tape, block_of(model), mine->floats.items);
    }
    r.weights = block_of(model);
    r.packed = status.ok() && mine->floats.count > 0 ? mine->floats.items : nullptr;
    m.lock.leave();
    return status;
}

// Gives a session `count` pages, of which the first `shared` stay what they are; what stands in the others of a context is copied.
BABYGPT_RARE Status take_pages(Session& session, int shared, int64_t count) {
    SessionState& s = *session.state;
    const int in_context = context_pages(s.tape.context);
    const uint64_t bytes = pages_bytes(s, count - shared);
    Pages* taken = create<Pages>(*session.runtime);
    if (!taken) return out_of_memory(sizeof(Pages));
    taken->runtime = session.runtime;
    Status status;
    if (s.on) {
        taken->on = s.on, ++s.on->users;
        s.on->lock.enter();
        status = s.on->functions->take_pages(s.on->generator, bytes, taken->there);
    } else if (!taken->memory.take(*session.runtime, bytes, !s.own)) status = out_of_memory(bytes);
    for (int i = shared; status.ok() && s.own && i < in_context; ++i)
        status = copy_page(s, taken->begin() + pages_bytes(s, i - shared), s.pages[i]);
    if (s.on) s.on->lock.leave();
    if (!status.ok()) return destroy(*session.runtime, taken), status;
    for (int i = shared; i < in_context; ++i) s.pages[i] = reinterpret_cast<float*>(taken->begin() + pages_bytes(s, i - shared));
    SessionState::drop(s.own);
    s.own = taken, s.first_own = s.shared = shared, s.page_count = static_cast<int>(count);
    if (shared == 0) SessionState::drop(s.common);
    return Status();
}
// Lets a new session read the full pages of another one, as far as they lie in one piece of memory, and copies the others.
BABYGPT_RARE Status share_pages(Session& session, const Session& with) {
    SessionState &s = *session.state, &from = *with.state;
    const int full = with.position / kv_page, shared = from.common && from.common != from.own ? least(full, from.shared) : full;
    for (int i = 0; i < shared; ++i) s.pages[i] = from.pages[i];
    if (shared > 0) s.common = from.common ? from.common : from.own, ++s.common->users;
    BABYGPT_TRY(take_pages(session, shared, context_pages(s.tape.context)));
    Status status;
    if (s.on) s.on->lock.enter();
    for (int i = shared; status.ok() && i < context_pages(with.position); ++i) status = copy_page(s, s.pages[i], from.pages[i]);
    if (s.on) s.on->lock.leave();
    s.kept = with.position;
    return status;
}
// The same weights on the session's device, if they are not there yet.
Status send_weights(const Model& model, OnDevice& device) {
    Status status;
    if (device.version.fetch_add(0) == model.version) return status;  // not load, which would stay in the object file as a function of std
    device.lock.enter();
    if (device.version.fetch_add(0) != model.version) {
        model.state->lock.enter();
        status = bring(model);
        if (status.ok()) status = device.functions->set_weights(device.generator, model.weights);
        if (status.ok()) device.version.exchange(model.version);
        model.state->lock.leave();
    }
    device.lock.leave();
    return status;
}
// What the session's runs read.
Status bind_weights(Session& session) {
    SessionState& s = *session.state;
    if (s.on) return send_weights(*session.model, *s.on);
    return bind_weights(*session.runtime, *session.model, s.tape, *s.backend, s.regions);
}
// Lets a session compute on the runtime's device, if there is one and the model is one for it.
BABYGPT_RARE Status go_to_device(SessionState& s, Runtime& from, const Model& of) {
    const DeviceFunctions* const functions = find_device(from);
    if (!functions || !runs_on_device(of.config)) return Status();
    BABYGPT_TRY(bring(of));
    s.narrow_pages = from.precision == Precision::bf16;
    OnDevice*& shared = of.state->on_device[s.narrow_pages];
    of.state->lock.enter();
    Status status;
    if (!shared) {
        OnDevice* made = create<OnDevice>(*of.runtime);
        if (made) {
            made->runtime = of.runtime, made->functions = functions;
            status = functions->create_generator(plan_of(from, s.tape, of.config, device_rows), made->generator);
        } else status = out_of_memory(sizeof(OnDevice));
        if (status.ok()) shared = made;
        else OnDevice::drop(made);
    }
    if (status.ok()) s.on = shared, ++shared->users;
    of.state->lock.leave();
    return status;
}
// Before a session reads: what a run needs. Where it begins anew it must not write to what it shared.
Status prepare(Session& session) {
    SessionState& s = *session.state;
    BABYGPT_TRY(bind_weights(session));
    return s.shared > 0 && session.position == 0 ? take_pages(session, 0, s.page_count) : Status();
}

Status fill(Session& session, Runtime& from, const Model& of, const Session* parent, bool on_processor) {
    if (!of.state) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    if (!of.config.causal || of.config.classes > 0 || of.config.features > 0)
        return fail(Error::unsupported, "only a decoder can talk, and this model is none: see Encoder");
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(from, backend));
    session.runtime = &from;
    SessionState* const state = session.state = create<SessionState>(from, from);
    if (!state) return out_of_memory(sizeof(SessionState));
    state->backend = backend;
    state->chunk = !on_processor && find_device(from) && runs_on_device(of.config) ? device_rows : chunk_rows(of.config);
    BABYGPT_TRY(record(state->tape, of.config, state->chunk, false, 0));
    if (of.state->only_runs) leave_out_packed(state->tape, *backend);
    if (!on_processor) BABYGPT_TRY(go_to_device(*state, from, of));
    size_t longest_token = 4;
    for (int32_t id = 0; id < of.tokenizer.vocab; ++id) {
        const size_t size = of.tokenizer.bytes(id).size;
        longest_token = most(longest_token, size);
        state->holes |= size == 0;
    }
    Layout layout;
    const bool on_device = state->on != nullptr;
    lay_out(layout, *state, on_device, from.thread_count(), longest_token);
    if (!state->memory.take(from, layout.bytes, true)) return out_of_memory(layout.bytes);
    layout = Layout{state->memory.memory, 0};
    lay_out(layout, *state, on_device, from.thread_count(), longest_token);
    BABYGPT_TRY(parent ? share_pages(session, *parent) : take_pages(session, 0, context_pages(of.config.context)));
    session.model = &of;
    start_pool(from);
    return bind_weights(session);
}

}  // namespace

Session::Session(Session&& other) noexcept { *this = static_cast<Session&&>(other); }
Session& Session::operator=(Session&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    model = other.model, runtime = other.runtime, state = other.state, position = other.position, forgotten = other.forgotten,
    sampled = other.sampled;
    other.state = nullptr;
    return *this;
}
Session::~Session() {
    if (state) destroy(*runtime, state);
}

Status Session::create(Runtime& from, const Model& of) {
    const FloatMode mode;
    *this = Session();
    const Status status = fill(*this, from, of, nullptr, false);
    if (!status.ok()) *this = Session();
    return status;
}

void Session::reset() {
    position = 0;
    forgotten = 0;
    sampled = 0;
    if (!state) return;
    state->turn = state->kept = 0;
    state->said.count = 0;
    state->source.length = 0;
    state->watches = false;
    state->ready = state->line_open = false;
}

// ---- reading -------------------------------------------------------------------------------------------------------------

namespace {

void have_read(Session& session, const int32_t* ids, int count) {
    SessionState& s = *session.state;
    memmove(s.history + session.position, ids, static_cast<size_t>(count) * sizeof(int32_t));
    session.position += count;
    s.ready = true;
    s.ahead.id = -1;
    const Tokenizer& tokenizer = session.model->tokenizer;
    const Text last = tokenizer.bytes(ids[count - 1]);
    s.line_open = !is_mark(tokenizer, ids[count - 1]) && !(last.size > 0 && last[last.size - 1] == '\n');
}

void bind_adapter(Session& session) {
    SessionState& s = *session.state;
    s.regions.adapter = s.adapter ? s.adapter->weights : nullptr;
}
// Where the session computes. losses: of all rows; null: they are not wanted.
Status forward(Session& session, const Run& run, double* losses) {
    SessionState& s = *session.state;
    if (s.on) {
        s.on->lock.enter();
        const Status status = s.on->functions->read(s.on->generator, run, losses);
        s.on->lock.leave();
        return status;
    }
    bind_adapter(session);
    s.backend->forward(*session.runtime, s.tape, s.regions, run);
    if (losses) memcpy(losses, s.regions.losses, static_cast<size_t>(run.rows) * sizeof(double));
    return Status();
}
// The encoder's run.
void look_at_source(Session& session) {
    SessionState& s = *session.state;
    Run run;
    run.source = Stream{s.source.length, Span<const Sequence>(&s.source, 1), s.source_ids};
    bind_adapter(session);
    s.backend->forward(*session.runtime, s.tape, s.regions, run);
}

// Of a run that does not read the source, only looks at it.
inline Stream seen_source(const SessionState& s) {
    Stream source;
    if (s.source.length > 0) source.sequences = Span<const Sequence>(&s.source, 1);
    return source;
}

// Reads `count` ids (they fit the context) in chunks. With losses: losses[i] = -log p(ids[i+1]), the last one for `after` (-1: none).
Status read_ids(Session& session, const int32_t* ids, int count, double* losses, int32_t after) {
    SessionState& s = *session.state;
    for (int done = 0; done < count;) {
        const int rows = least(s.chunk, count - done);
        const Sequence sequence{0, rows, session.position, s.pages, done + rows == count ? s.logits : nullptr};
        Run run;
        run.rows = rows;
        run.sequences = Span<const Sequence>(&sequence, 1);
        run.ids = ids + done;
        run.source = seen_source(s);
        if (losses) {
            for (int i = 0; i < rows; ++i) s.targets[i] = done + i + 1 < count ? ids[done + i + 1] : after;
            run.targets = s.targets;
        }
        BABYGPT_TRY(forward(session, run, losses ? losses + done : nullptr));
        have_read(session, ids + done, rows);
        done += rows;
    }
    return Status();
}

// The largest piece that make_room can always make room for.
inline int piece_rows(const Session& session) { return most(1, (session.model->config.context - session.state->kept) / 2); }

// Makes room for at most so many more ids: forgets the older half of what may be forgotten, in a chat up to the beginning of a turn, and
// reads the rest again.
Status make_room(Session& session, int count) {
    SessionState& s = *session.state;
    const int context = session.model->config.context;
    if (session.position + count <= context) return Status();
    int from = most(session.position - (context - s.kept) / 2, s.kept);
    if (s.turn > from && s.turn < session.position) from = s.turn;
    const int again = session.position - from;
    session.forgotten += static_cast<uint64_t>(from - s.kept);
    session.position = s.kept;
    s.turn = most(s.turn - (from - s.kept), 0);
    return read_ids(session, s.history + from, again, nullptr, -1);
}

Status check_session_ids(const Session& session, Span<const int32_t> ids) {
    if (!session.state) return fail(Error::invalid_argument, "the session is empty: create it first");
    for (const int32_t id : ids)
        if (id < 0 || id >= session.model->config.vocab)
            return fail(Error::invalid_argument, "the id ", id, " is none of the model's ", session.model->config.vocab);
    return Status();
}
Status check_session(const Session& session, Span<const int32_t> ids) {
    BABYGPT_TRY(check_session_ids(session, ids));
    if (session.model->config.encoder_layers == 0 || session.state->source.length > 0) return Status();
    return fail(Error::invalid_argument, "the model has an encoder, and the session no source yet: let it read one first");
}

}  // namespace

BABYGPT_RARE Status Session::read_source(Span<const int32_t> ids) {
    BABYGPT_TRY(check_session_ids(*this, ids));
    if (model->config.encoder_layers == 0) return fail(Error::invalid_argument, "the model has no encoder, which reads sources");
    if (ids.size < 1 || ids.size > static_cast<size_t>(model->config.context))
        return fail(Error::invalid_argument, "the source has ", uint64_t(ids.size), " ids, but must have from 1 to context, ",
                    model->config.context);
    const FloatMode mode;
    BABYGPT_TRY(prepare(*this));
    reset();
    memcpy(state->source_ids, ids.data, ids.size * sizeof(int32_t));
    state->source = Sequence{0, static_cast<int>(ids.size), 0, nullptr};
    look_at_source(*this);
    return Status();
}
BABYGPT_RARE Status Session::read_source(Text text) {
    BABYGPT_TRY(check_session_ids(*this, Span<const int32_t>()));
    const Tokenizer& tokenizer = model->tokenizer;
    if (tokenizer.kind == TokenizerKind::none) return fail(Error::invalid_argument, "the model has no tokenizer: let it read ids");
    Array<int32_t> ids(*runtime);
    BABYGPT_TRY(tokenizer.encode(text, ids));
    if (tokenizer.end_of_text >= 0 && !ids.push(tokenizer.end_of_text)) return out_of_memory(sizeof(int32_t));
    return read_source(Span<const int32_t>(ids.items, ids.count));
}
namespace {

// From now on the session computes on the processor, which reads once more what has been read.
BABYGPT_RARE Status leave_device(Session& session) {
    SessionState& s = *session.state;
    OnDevice* on = s.on;
    Pages* own = s.own;
    const bool narrow = s.narrow_pages;
    const int64_t activations = round_up(s.tape.activation_block, static_cast<int64_t>(16));
    const uint64_t bytes = static_cast<uint64_t>(activations + s.backend->scratch(s.tape, session.runtime->thread_count())) * sizeof(float);
    if (!s.here_memory.take(*session.runtime, bytes, true)) return out_of_memory(bytes);
    s.regions.activations = reinterpret_cast<float*>(s.here_memory.memory);
    s.regions.scratch = s.regions.activations + activations;
    s.on = nullptr, s.own = nullptr, s.narrow_pages = false;
    const Status status = take_pages(session, 0, context_pages(s.tape.context));
    if (!status.ok()) return s.on = on, s.own = own, s.narrow_pages = narrow, status;
    SessionState::drop(own), OnDevice::drop(on);
    BABYGPT_TRY(bind_weights(session));
    const int count = session.position;
    session.position = 0;
    return count > 0 ? read_ids(session, s.history, count, nullptr, -1) : Status();
}

}  // namespace

Status Session::use(const Adapter* adapter, bool keep_cache) {
    BABYGPT_TRY(check_session_ids(*this, Span<const int32_t>()));
    const FloatMode mode;
    SessionState& s = *state;
    if (adapter && !adapter->weights) return fail(Error::invalid_argument, "the adapter is empty: create or load it first");
    if (adapter) BABYGPT_TRY(give_back(adapter->state->borrowed));
    if (adapter && s.on) BABYGPT_TRY(leave_device(*this));
    const auto put = [&](const Adapter* wanted) {
        s.tape.unadapt();
        s.adapter = nullptr;
        if (!wanted) return Status();
        BABYGPT_TRY(s.tape.adapt(wanted->config));
        BABYGPT_TRY(check_adapter(s.tape, *wanted));
        const uint64_t bytes = static_cast<uint64_t>(s.tape.low_block()) * sizeof(float);
        if (s.low_memory.bytes < bytes && !s.low_memory.take(*runtime, bytes, true)) return out_of_memory(bytes);
        s.regions.low = reinterpret_cast<float*>(s.low_memory.memory);
        s.adapter = wanted;
        return Status();
    };
    const Adapter* const before = s.adapter;
    const Status status = put(adapter);
    if (!status.ok()) return (void)put(before), status;  // as before, or, where there is no memory even for that, without one
    if (keep_cache || (position == 0 && s.source.length == 0)) return Status();
    BABYGPT_TRY(bind_weights(*this));
    if (s.shared > 0) BABYGPT_TRY(take_pages(*this, 0, s.page_count));
    if (s.source.length > 0) look_at_source(*this);
    const int count = position;
    position = 0;
    return count > 0 ? read_ids(*this, s.history, count, nullptr, -1) : Status();
}

BABYGPT_RARE Status Session::fork(Session& from) {
    const FloatMode mode;
    if (&from == this) return fail(Error::invalid_argument, "a session cannot be forked from itself");
    *this = Session();
    BABYGPT_TRY(check_session(from, Span<const int32_t>()));
    const int context = from.model->config.context;
    if (from.position == 0) return fail(Error::invalid_argument, "the session has read nothing that another one could share");
    if (from.position == context)
        return fail(Error::no_room, "the session has filled its context, ", context, ", so that another one could not go on");
    Status status = fill(*this, *from.runtime, *from.model, &from, !from.state->on);
    if (status.ok() && from.state->adapter) status = use(from.state->adapter, true);
    if (!status.ok()) return *this = Session(), status;
    SessionState &s = *state, &f = *from.state;
    position = from.position, forgotten = from.forgotten, sampled = from.sampled;
    memcpy(s.history, f.history, static_cast<size_t>(position) * sizeof(int32_t));
    memcpy(s.logits, f.logits, static_cast<size_t>(s.tape.head_out) * sizeof(float));
    memcpy(s.said.tail, f.said.tail, s.said.count = f.said.count);
    s.turn = f.turn, s.ready = f.ready, s.line_open = f.line_open;
    if (s.shared > 0 && !f.common) f.common = s.common, ++f.common->users;
    f.shared = most(f.shared, s.shared), f.kept = position;
    if (f.source.length == 0) return Status();
    s.source = f.source;  // what the encoder says of it is among the activations
    memcpy(s.source_ids, f.source_ids, static_cast<size_t>(s.source.length) * sizeof(int32_t));
    memcpy(s.regions.activations, f.regions.activations, static_cast<size_t>(s.tape.activation_block) * sizeof(float));
    return Status();
}

Status Session::feed(Span<const int32_t> ids) {
    BABYGPT_TRY(check_session(*this, ids));
    const FloatMode mode;
    BABYGPT_TRY(prepare(*this));
    state->said.count = 0;
    state->watches = false;
    const size_t context = static_cast<size_t>(model->config.context);
    if (ids.size <= context - least(context, static_cast<size_t>(position)))  // it fits as it is
        return read_ids(*this, ids.data, static_cast<int>(ids.size), nullptr, -1);
    for (size_t i = 0; i < ids.size;) {
        const int count = static_cast<int>(least(static_cast<size_t>(piece_rows(*this)), ids.size - i));
        BABYGPT_TRY(make_room(*this, count));
        BABYGPT_TRY(read_ids(*this, ids.data + i, count, nullptr, -1));
        i += static_cast<size_t>(count);
    }
    return Status();
}

Span<const float> Session::logits() const {
    return state && state->ready ? Span<const float>(state->logits, static_cast<size_t>(model->config.vocab)) : Span<const float>();
}

BABYGPT_UNHURRIED_END

// ---- sampling ------------------------------------------------------------------------------------------------------------

namespace {

// log of the sum of e^logit: log p(id) = logits[id] - log_sum
double log_sum(const SessionState& s, const float* logits, int vocab) {
    const float biggest = s.backend->biggest(logits, vocab), total = s.backend->exponentials(nullptr, logits, vocab, biggest, 1);
    return static_cast<double>(biggest) + log_of(static_cast<double>(total));
}
float log_probability(const SessionState& s, int32_t id, int vocab) {
    return static_cast<float>(static_cast<double>(s.logits[id]) - log_sum(s, s.logits, vocab));
}

// A heap of candidates, the heaviest (then the smallest id) on top.
struct Heap {
    int32_t* ids;
    const float* weights;  // by id
    int count;
    bool before(int32_t a, int32_t b) const { return weights[a] > weights[b] || (!(weights[a] < weights[b]) && a < b); }
    void sink(int i) {
        for (int child; (child = 2 * i + 1) < count; i = child) {
            if (child + 1 < count && before(ids[child + 1], ids[child])) ++child;
            if (!before(ids[child], ids[i])) return;
            const int32_t id = ids[i];
            ids[i] = ids[child], ids[child] = id;
        }
    }
    void build() {
        for (int i = count / 2; i-- > 0;) sink(i);
    }
    // Moves the top to the place after the heap's new end.
    int32_t pop() {
        const int32_t top = ids[0];
        ids[0] = ids[--count], ids[count] = top;
        sink(0);
        return top;
    }
};

// The logarithm of the smallest weight that counts, the biggest being 1. Where top_p does, what min_p cuts off counts for it.
double lowest_of(const SampleConfig& c) { return c.min_p > 0 && c.top_p >= 1 ? most(-40.0, log_of(c.min_p)) : -40.0; }

// Draws from adjusted logits; -1: no token is possible. Temperature first, then top_k, top_p, min_p. Candidates are selected, never all
// sorted: what is e^-40 below the best is left out at once, and only as many are taken from a heap as top_k and top_p need.
int32_t draw(const BackendFunctions& backend, float* l, int32_t* candidates, const SampleConfig& c, int vocab, uint64_t key) {
    const float biggest = backend.biggest(l, vocab);
    if (!(biggest >= -bits_as<float>(0x7f7fffffu))) return -1;
    if (c.temperature <= 0 || !is_finite(biggest)) {
        int32_t best = 0;
        while (l[best] != biggest) ++best;
        return best;
    }
    const float cut = static_cast<float>(static_cast<double>(biggest) + lowest_of(c) * c.temperature),
                inverse = static_cast<float>(1 / c.temperature);
    int count = 0;
    for (int32_t i = 0; i < vocab; ++i) {
        candidates[count] = i;
        count += l[i] >= cut;
    }
    backend.exponentials(l, l, vocab, biggest, inverse);
    double total = 0;
    for (int i = 0; i < count; ++i) total += static_cast<double>(l[candidates[i]]);
    const int32_t* chosen = candidates;
    const bool fewer = c.top_k > 0 && c.top_k < count;
    if (fewer || c.top_p < 1) {  // popped candidates stand at the end, the heaviest last
        Heap heap{candidates, l, count};
        heap.build();
        const int limit = fewer ? c.top_k : count;
        double mass = 0, aim = fewer ? total : c.top_p * total;
        int taken = 0;
        do mass += static_cast<double>(l[heap.pop()]), ++taken;
        while (taken < limit && mass < aim);
        if (fewer && c.top_p < 1) {  // top_p counts among the top_k
            aim = c.top_p * mass;
            mass = 0, taken = 0;
            do mass += static_cast<double>(l[candidates[count - ++taken]]);
            while (taken < limit && mass < aim);
        }
        chosen = candidates + (count - taken);
        count = taken;
        total = mass;
        for (; c.min_p > 0 && count > 1 && static_cast<double>(l[chosen[0]]) < c.min_p; ++chosen, --count)  // the lightest stand first
            total -= static_cast<double>(l[chosen[0]]);
    }
    double left = random_uniform(key, 0) * total;
    for (int i = count; i-- > 0;) {
        left -= static_cast<double>(l[chosen[i]]);
        if (left < 0) return chosen[i];
    }
    return chosen[0];
}

// What a token adds to the text.
Text said_by(const Tokenizer& tokenizer, int32_t id) { return is_mark(tokenizer, id) ? Text() : tokenizer.bytes(id); }

BABYGPT_UNHURRIED_BEGIN

// ---- guards (a nondeterministic automaton for each pattern, all states of it as bits: Baeza-Yates & Gonnet 1992) ----

enum GuardKind : int32_t {
    guard_character,
    guard_any,
    guard_class,
    guard_other_class,
    guard_white,
    guard_star,
    guard_white_star,
    guard_edge
};
constexpr int longest_pattern = 60;

inline bool is_white(uint32_t c) {
    return c == ' ' || (c >= 9 && c <= 13) || c == 0x85 || c == 0xa0 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}
inline bool is_invisible(uint32_t c) {
    return c == 0xad || c == 0x307 || (c >= 0x200b && c <= 0x200f) || (c >= 0x2060 && c <= 0x2064) || c == 0xfeff;
}

bool matches(const Guard& guard, const Guard::Element& e, uint32_t c) {
    switch (e.kind) {
        case guard_character:
            return c == e.from;
        case guard_any:
        case guard_star:
            return !is_white(c);
        case guard_white:
        case guard_white_star:
            return is_white(c);
        case guard_edge:
            return false;
        default:
            break;
    }
    bool found = false;
    for (uint32_t i = e.from; i < e.to; ++i) found |= c >= guard.ranges[i].low && c <= guard.ranges[i].high;
    return found == (e.kind == guard_class);
}
// Between two characters, of which `c` is the second. Does a match end here? With `reads`, the patterns go on behind c.
bool guard_step(const Guard& guard, uint64_t* states, bool at_edge, bool reads, uint32_t c) {
    bool found = false;
    for (size_t p = 0, first = 0; p < guard.ends.count; first = static_cast<size_t>(guard.ends[p++])) {
        const size_t n = static_cast<size_t>(guard.ends[p]) - first;
        const Guard::Element* e = guard.elements.items + first;
        uint64_t now = states[p] | 1, next = 0;
        for (size_t i = 0; i < n; ++i) {
            if (!(now >> i & 1)) continue;
            const bool is_star = e[i].kind == guard_star || e[i].kind == guard_white_star;
            if (is_star || (at_edge && e[i].kind == guard_edge)) now |= uint64_t(2) << i;
            if (reads && matches(guard, e[i], c)) next |= uint64_t(is_star ? 1 : 2) << i;
        }
        found |= (now >> n & 1) != 0;
        if (reads) states[p] = next;
    }
    return found;
}
// Does the text, behind what was read before, hold the end of a match, or would it if it ended here, or before a stop string?
bool guard_reads(const Guard& guard, Watch& w, Text text, Span<const Text> stops) {
    bool found = false;
    for (const char byte : text) {
        w.bytes[w.count++] = byte;
        while (w.count > 0) {
            size_t length;
            uint32_t c = decode_utf8(w.bytes, w.bytes + w.count, length);
            const unsigned lead = static_cast<unsigned char>(w.bytes[0]);
            if (c == not_utf8 && length == static_cast<size_t>(w.count) && lead >= 0xc2 && lead <= 0xf4) break;  // not yet whole
            w.count -= static_cast<int>(length);
            memmove(w.bytes, w.bytes + length, static_cast<size_t>(w.count));
            c = small_letter(c);
            if (is_invisible(c)) continue;
            const bool of_word = is_of_word(c);
            bool ends = false;
            for (const Text& stop : stops) ends |= stop.size > 0 && small_letter(decode_utf8(stop.data, stop.end(), length)) == c;
            found |= ends && !w.is_fresh && guard_step(guard, w.states, true, false, 0);
            found |= guard_step(guard, w.states, of_word != w.in_word, true, c) && !w.is_fresh;
            w.in_word = of_word, w.is_fresh = false;
        }
    }
    return found || (!w.is_fresh && guard_step(guard, w.states, w.in_word, false, 0));
}
void start_watch(const Guard& guard, Watch& w, uint64_t* states) {
    w = Watch{states, {}, 0, false, false};
    for (size_t i = 0; i < guard.ends.count; ++i) states[i] = 0;
}
// As guard_reads, on trial.
bool guard_refuses(const Guard* guard, const Watch& w, uint64_t* states, Text text, Span<const Text> stops) {
    if (!guard || text.size == 0) return false;
    Watch trial = w;
    trial.states = states;
    for (size_t i = 0; i < guard->ends.count; ++i) states[i] = w.states[i];
    return guard_reads(*guard, trial, text, stops);
}
// The session's watch, from what it has read, where it is not up to date.
Status begin_watch(Session& session, const Guard* guard) {
    SessionState& s = *session.state;
    if (!guard || (s.watches && s.watched == guard && s.states.count >= 2 * guard->ends.count)) return Status();
    if (s.states.count < 2 * guard->ends.count && !s.states.resize(2 * guard->ends.count)) return out_of_memory(16 * guard->ends.count);
    start_watch(*guard, s.said.watch, s.states.items);
    for (int i = 0; i < session.position; ++i)
        (void)guard_reads(*guard, s.said.watch, said_by(session.model->tokenizer, s.history[i]), Span<const Text>());
    s.said.watch.is_fresh = true;
    s.watches = true, s.watched = guard;
    return Status();
}

// Where `part` begins in `text`; text.size: nowhere.
size_t find_in(Text text, Text part) {
    for (size_t i = 0; part.size > 0 && i + part.size <= text.size; ++i)
        if (memcmp(text.data + i, part.data, part.size) == 0) return i;
    return text.size;
}

// Would the text said so far and this token hold one of these?
bool completes(const Said& said, Span<const Text> strings, Text token) {
    if (strings.size == 0 || token.size == 0) return false;
    memcpy(said.tail + said.count, token.data, token.size);
    const Text text(said.tail, said.count + token.size);
    for (const Text& string : strings)
        if (find_in(text, string) < text.size) return true;
    return false;
}

void remember(Said& said, Text token) {
    memcpy(said.tail + said.count, token.data, token.size);
    said.count += token.size;
    if (said.count > longest_stop) {
        memmove(said.tail, said.tail + (said.count - longest_stop), longest_stop);
        said.count = longest_stop;
    }
}

// A padded vocabulary's other ids say nothing, and nobody means "unknown". The token's text must begin with `start`.
bool may_come(const Session& session, Text start, int32_t id) {
    const Tokenizer& tokenizer = session.model->tokenizer;
    if (tokenizer.kind == TokenizerKind::none) return true;
    return id < tokenizer.vocab && id != tokenizer.unknown && (start.size == 0 || starts_with(tokenizer.bytes(id), start)) &&
           (!session.state->holes || tokenizer.bytes(id).size > 0);
}

constexpr unsigned char seen_before = 1, seen_banned = 2;  // SessionState::seen

// The logits as the sampler wants them: bias, repetition penalty, and -infinity for what may not come.
void adjust(Session& session, const SampleConfig& c, Text start) {
    SessionState& s = *session.state;
    const Tokenizer& tokenizer = session.model->tokenizer;
    const int vocab = session.model->config.vocab;
    const float never = -bits_as<float>(0x7f800000u);
    memcpy(s.adjusted, s.logits, static_cast<size_t>(vocab) * sizeof(float));
    for (const LogitBias& bias : c.bias) s.adjusted[bias.id] += bias.bias;
    if (c.repetition_penalty != 1 && c.repetition_penalty > 0) {
        const float penalty = static_cast<float>(c.repetition_penalty);
        for (int i = 0; i < session.position; ++i) {
            const int32_t id = s.history[i];
            if (!(s.seen[id] & seen_before)) s.adjusted[id] = s.adjusted[id] > 0 ? s.adjusted[id] / penalty : s.adjusted[id] * penalty;
            s.seen[id] |= seen_before;
        }
        for (int i = 0; i < session.position; ++i) s.seen[s.history[i]] &= seen_banned;
    }
    if (tokenizer.unknown >= 0) s.adjusted[tokenizer.unknown] = never;
    const bool each = c.banned.size > 0 || c.guard || start.size > 0 || s.holes;
    for (int32_t i = each || tokenizer.kind == TokenizerKind::none ? 0 : tokenizer.vocab; i < vocab; ++i)
        if ((s.seen[i] & seen_banned) || !may_come(session, start, i)) s.adjusted[i] = never;
}

BABYGPT_RARE Status check_strings(const char* kind, Span<const Text> strings) {
    for (const Text& string : strings)
        if (string.size > longest_stop)
            return fail(Error::invalid_argument, "a ", kind, " string has ", static_cast<uint64_t>(string.size),
                        " bytes, at most 256 are possible");
    return Status();
}

Status check(const SampleConfig& c) {
    if (!(c.temperature >= 0 && c.temperature <= 1e6))
        return fail(Error::invalid_argument, "temperature is ", c.temperature, " (0 to 1e6)");
    if (!(c.top_p > 0 && c.top_p <= 1)) return fail(Error::invalid_argument, "top_p is ", c.top_p, ", but must be above 0 and at most 1");
    if (!(c.min_p >= 0 && c.min_p <= 1)) return fail(Error::invalid_argument, "min_p is ", c.min_p, ", but must be from 0 to 1");
    if (!(c.repetition_penalty > 0))
        return fail(Error::invalid_argument, "repetition_penalty is ", c.repetition_penalty, ", must be above 0");
    return Status();
}

// Whether nothing but the logits and a few numbers decides the next token.
bool is_plain(const Session& session, const SampleConfig& c) {
    const bool penalised = c.repetition_penalty < 1 || c.repetition_penalty > 1;
    return !penalised && c.bias.size == 0 && c.banned.size == 0 && !c.guard && !session.state->holes;
}
// Lets the device that is about to read the session's last id draw the next one, as if `c` were to say how then, too.
void draw_ahead(const Session& session, const SampleConfig& c, Draw& draw) {
    const Tokenizer& tokenizer = session.model->tokenizer;
    draw.below = lowest_of(c) * c.temperature;
    draw.top_p = c.top_p, draw.min_p = c.min_p, draw.top_k = c.top_k;
    draw.uniform = random_uniform(mix(random_key(c.seed, session.sampled, random_sample, 0)), 0);
    draw.inverse = c.temperature > 0 ? static_cast<float>(1 / c.temperature) : 0.0f;
    draw.unknown = tokenizer.unknown;
    draw.limit = tokenizer.kind == TokenizerKind::none ? session.model->config.vocab : tokenizer.vocab;
    draw.id = -1;
}
bool is_drawn(const Session& session, const SampleConfig& c) {
    const SessionState& s = *session.state;
    const SampleConfig& how = s.ahead_how;
    const auto same = [](double a, double b) { return a <= b && a >= b; };
    return s.ahead.id >= 0 && s.ahead_of == session.sampled && how.seed == c.seed && how.top_k == c.top_k &&
           same(how.temperature, c.temperature) && same(how.top_p, c.top_p) && same(how.min_p, c.min_p) && is_plain(session, c);
}

// Next, where the token's text must begin with `start` (empty: anything goes).
Status draw_token(Session& session, const SampleConfig& c, Text start, int32_t& id, float* logprob) {
    BABYGPT_TRY(check_session(session, Span<const int32_t>()));
    SessionState& s = *session.state;
    const Model& model = *session.model;
    const int vocab = model.config.vocab;
    BABYGPT_TRY(check(c));
    if (!s.ready) return fail(Error::invalid_argument, "nothing has been read yet: feed the session at least one id");
    BABYGPT_TRY(check_strings("banned", c.banned));
    BABYGPT_TRY(begin_watch(session, c.guard));
    for (const LogitBias& bias : c.bias)
        if (bias.id < 0 || bias.id >= vocab)
            return fail(Error::invalid_argument, "a bias names the id ", bias.id, ", which is none of the model's ", vocab);
    const uint64_t key = random_key(c.seed, session.sampled, random_sample, 0);
    bool found = start.size == 0 && is_drawn(session, c);
    if (found) id = s.ahead.id;
    for (int attempt = 0; !found && attempt <= vocab;
         ++attempt) {  // a token that would complete a banned string is drawn again, without it
        adjust(session, c, start);
        id = draw(*s.backend, s.adjusted, s.candidates, c, vocab, mix(key + static_cast<uint64_t>(attempt)));
        if (id < 0) break;
        const Text token = said_by(model.tokenizer, id);
        found = !completes(s.said, c.banned, token) &&
                !guard_refuses(c.guard, s.said.watch, s.states.items + s.states.count / 2, token, c.stop);
        if (!found) s.seen[id] |= seen_banned;
    }
    for (int32_t i = 0; (c.banned.size > 0 || c.guard) && i < vocab; ++i) s.seen[i] = 0;
    if (!found)
        return fail(Error::invalid_argument,
                    "no next token is possible: all are banned, by a bias or as the end of a banned string or pattern");
    if (logprob) *logprob = log_probability(s, id, vocab);
    ++session.sampled;
    remember(s.said, said_by(model.tokenizer, id));
    if (c.guard) (void)guard_reads(*c.guard, s.said.watch, said_by(model.tokenizer, id), Span<const Text>());
    else s.watches = false;
    return Status();
}
Status next_token(Session& session, const SampleConfig& c, Text start, int32_t& id, float* logprob) {
    BABYGPT_TRY(check_session(session, Span<const int32_t>()));
    BABYGPT_TRY(prepare(session));
    BABYGPT_TRY(draw_token(session, c, start, id, logprob));
    BABYGPT_TRY(make_room(session, 1));
    return read_ids(session, &id, 1, nullptr, -1);
}

// Each session's next token. drawn: which have one; status: the first error, behind which nobody draws; but where there is so much to do that
// several threads share it, they do.
void draw_tokens(Span<Session* const> sessions, Span<const SampleConfig> configs, int32_t* ids, bool* drawn, Status& status) {
    constexpr size_t each = 8;                              // that a thread takes at a time
    constexpr uint64_t worth_a_thread = uint64_t(1) << 13;  // logits
    const size_t count = sessions.size;
    const auto draw_one = [&](size_t k) {
        const Status mine = draw_token(*sessions[k], configs[configs.size == 1 ? 0 : k], Text(), ids[k], nullptr);
        drawn[k] = mine.ok();
        return mine;
    };
    for (size_t k = 0; k < count; ++k) drawn[k] = false;
    if (count * static_cast<uint64_t>(sessions[0]->model->config.vocab) < worth_a_thread) {
        for (size_t k = 0; k < count && status.ok(); ++k) status = draw_one(k);
        return;
    }
    size_t failed = count;
    Bell lock;
    parallel(*sessions[0]->runtime, static_cast<int>((count + each - 1) / each), [&](int part) {
        for (size_t k = static_cast<size_t>(part) * each; k < least(static_cast<size_t>(part + 1) * each, count); ++k) {
            const Status mine = draw_one(k);
            if (mine.ok()) continue;
            lock.enter();
            if (k < failed) failed = k, status = mine;
            lock.leave();
        }
    });
}

}  // namespace

Status Session::next(const SampleConfig& config, int32_t& id, float* logprob) {
    const FloatMode mode;
    return next_token(*this, config, Text(), id, logprob);
}
BABYGPT_RARE Status sample(Span<float> logits, const SampleConfig& config, uint64_t sampled, Span<int32_t> scratch, int32_t& id) {
    const FloatMode mode;
    BABYGPT_TRY(check(config));
    if (logits.size == 0 || logits.size > INT32_MAX || scratch.size < logits.size)
        return fail(Error::invalid_argument, "there are ", static_cast<uint64_t>(logits.size), " logits, and scratch for ",
                    static_cast<uint64_t>(scratch.size));
    for (const LogitBias& bias : config.bias) {
        if (bias.id < 0 || static_cast<size_t>(bias.id) >= logits.size)
            return fail(Error::invalid_argument, "a bias names the id ", bias.id, ", which is none of ",
                        static_cast<uint64_t>(logits.size));
        logits[static_cast<size_t>(bias.id)] += bias.bias;
    }
    const uint64_t key = mix(random_key(config.seed, sampled, random_sample, 0));
    id = draw(*plain_backend(), logits.data, scratch.data, config, static_cast<int>(logits.size), key);
    return id < 0 ? fail(Error::invalid_argument, "no next token is possible: no logit is above -infinity") : Status();
}
Status next(Span<Session* const> sessions, Span<const SampleConfig> configs, int32_t* ids) {
    const FloatMode mode;
    if (configs.size != 1 && configs.size != sessions.size)
        return fail(Error::invalid_argument, "there must be one config, or one for each of the ", uint64_t(sessions.size), " sessions");
    for (size_t i = 0; i < sessions.size; ++i) {
        if (!sessions[i] || !sessions[i]->state)
            return fail(Error::invalid_argument, "session ", uint64_t(i), " is empty: create it first");
        const Session &one = *sessions[i], &first = *sessions[0];
        if (one.model != first.model || one.state->backend != first.state->backend)
            return fail(Error::mismatch, "session ", uint64_t(i), " has another model or backend than session 0");
        one.state->place = SIZE_MAX;
    }
    for (size_t i = 0; i < sessions.size; ++i) {
        const Session& one = *sessions[i];
        SessionState& s = *one.state;
        if (s.place != SIZE_MAX) return fail(Error::invalid_argument, "session ", uint64_t(i), " is session ", uint64_t(s.place));
        s.place = i;
        // Each, since make_room may let it read alone:
        BABYGPT_TRY(prepare(*sessions[i]));
    }
    const auto how = [&](size_t i) -> const SampleConfig& { return configs[configs.size == 1 ? 0 : i]; };
    Status status;
    if (sessions.size > 0 && sessions[0]->model->config.encoder_layers > 0) {  // each has its source in its own activations
        for (size_t i = 0; status.ok() && i < sessions.size; ++i) status = next_token(*sessions[i], how(i), Text(), ids[i], nullptr);
        return status;
    }
    for (size_t i = 0; status.ok() && i < sessions.size;) {
        Session& first = *sessions[i];
        SessionState& s = *first.state;
        Sequence sequences[device_rows];
        Draw draws[device_rows];
        int32_t said[device_rows];
        bool drawn[device_rows];
        int all = 0, count = 0;
        const int at_once = s.on ? device_rows : least(most_at_once, s.chunk);
        while (i + static_cast<size_t>(all) < sessions.size && all < at_once) {  // others' turn comes in the next pass
            const SessionState& other = *sessions[i + static_cast<size_t>(all)]->state;
            if (other.adapter != s.adapter || other.on != s.on) break;
            ++all;
        }
        draw_tokens(Span<Session* const>(sessions.data + i, static_cast<size_t>(all)),
                    Span<const SampleConfig>(configs.data + (configs.size == 1 ? 0 : i), configs.size == 1 ? 1 : static_cast<size_t>(all)),
                    ids + i, drawn, status);
        for (int k = 0; k < all; ++k) {
            Session& session = *sessions[i + static_cast<size_t>(k)];
            if (!drawn[k]) continue;
            const Status room = make_room(session, 1);
            if (!room.ok() && status.ok()) status = room;
            drawn[k] = room.ok();
            if (!drawn[k]) continue;
            said[count] = ids[i + static_cast<size_t>(k)];
            sequences[count] = Sequence{count, 1, session.position, session.state->pages, session.state->logits};
            draws[k].id = -1;
            if (s.on && all >= worth_drawing_there && session.model->config.vocab <= drawn_vocab &&
                is_plain(session, how(i + static_cast<size_t>(k)))) {
                draw_ahead(session, how(i + static_cast<size_t>(k)), draws[k]);
                sequences[count].draw = &draws[k];
            }
            ++count;
        }
        if (count > 0) {
            Run run;
            run.rows = count;
            run.sequences = Span<const Sequence>(sequences, static_cast<size_t>(count));
            run.ids = said;
            BABYGPT_TRY(forward(first, run, nullptr));
        }
        for (int k = 0; k < all; ++k, ++i) {
            if (!drawn[k]) continue;
            SessionState& its = *sessions[i]->state;
            have_read(*sessions[i], ids + i, 1);
            its.ahead = draws[k], its.ahead_how = how(i), its.ahead_of = sessions[i]->sampled;
        }
    }
    return status;
}

// ---- generating ----------------------------------------------------------------------------------------------------------

namespace {

// Text on its way to the caller: exact bytes to the array, whole characters to the stream.
struct Output {
    Generation& result;
    Array<char> instead;
    Utf8Stream utf8{};
    bool good = true;
    char piece[1024];  // that waits to be inspected
    size_t count = 0;
    Output(Generation& to, Runtime& runtime) : result(to), instead(runtime) {}
    Status show(Text text) {
        if (result.text && !append(*result.text, text)) return out_of_memory(text.size);
        while (result.stream && good && text.size > 0) {
            char whole[64];
            const Text some(text.data, least(text.size, sizeof whole - 4));
            const size_t n = utf8.push(some, whole);
            if (n > 0) good = result.stream(result.user, Text(whole, n));
            text = Text(text.data + some.size, text.size - some.size);
        }
        return Status();
    }
    Status inspect() {
        const Text seen(piece, count);
        count = 0;
        if (seen.size == 0 || result.refused) return Status();
        instead.count = 0;
        const Verdict verdict = result.inspect(result.user, seen, instead);
        if (verdict == Verdict::stop) result.refused = true;
        return verdict == Verdict::pass ? show(seen) : verdict == Verdict::replace ? show(view(instead)) : Status();
    }
    // A word ends before the first letter behind its white space, a line behind its line break.
    Status put(Text text) {
        if (!result.inspect) return show(text);
        for (const char c : text) {
            const bool is_space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
            const bool ends =
                count == sizeof piece || (count > 0 && (result.inspect_lines ? piece[count - 1] == '\n' : was_space && !is_space));
            if (ends) BABYGPT_TRY(inspect());
            piece[count++] = c;
            was_space = is_space;
        }
        return Status();
    }
    Status finish() {
        if (result.inspect) BABYGPT_TRY(inspect());
        char rest[4];
        const size_t n = utf8.finish(rest);
        if (result.stream && good && n > 0) good = result.stream(result.user, Text(rest, n));
        return Status();
    }
    bool was_space = false;
};

// How much of the end of `text` could be the beginning of `stop`.
size_t overlap(Text text, Text stop) {
    for (size_t n = least(text.size, stop.size); n > 0; --n)
        if (memcmp(text.end() - n, stop.data, n) == 0) return n;
    return 0;
}

// Draws tokens until a stop string, the end-of-text token, the limit or the caller ends it. The first token's text must begin with `start`, which is
// not part of the result.
Status continue_text(Session& session, const SampleConfig& c, Text start, Generation& result) {
    SessionState& s = *session.state;
    const Tokenizer& tokenizer = session.model->tokenizer;
    BABYGPT_TRY(check_strings("stop", c.stop));
    const double begin = seconds_now();
    Output output(result, *session.runtime);
    size_t held = 0;
    Status status;
    while (status.ok() && output.good && !result.stopped && !result.refused && result.generated < c.tokens) {
        int32_t id;
        float logprob;
        status = next_token(session, c, result.generated == 0 ? start : Text(), id, result.logprobs ? &logprob : nullptr);
        if (!status.ok()) break;
        ++result.generated;
        if ((result.ids && !result.ids->push(id)) || (result.logprobs && !result.logprobs->push(logprob))) {
            status = out_of_memory(sizeof id);
            break;
        }
        if (id == tokenizer.end_of_text) {
            result.stopped = true;
            break;
        }
        Text bytes = said_by(tokenizer, id);
        if (result.generated == 1) bytes = Text(bytes.data + start.size, bytes.size - start.size);
        memcpy(s.held + held, bytes.data, bytes.size);
        held += bytes.size;
        size_t ready = held;
        for (const Text& stop : c.stop)
            for (size_t i = 0; stop.size > 0 && i + stop.size <= held; ++i)
                if (memcmp(s.held + i, stop.data, stop.size) == 0) ready = least(ready, i), result.stopped = true;
        if (!result.stopped)
            for (const Text& stop : c.stop) ready = least(ready, held - overlap(Text(s.held, held), stop));
        status = output.put(Text(s.held, ready));
        if (result.stopped) held = ready;
        held -= ready;
        memmove(s.held, s.held + ready, held);
    }
    if (status.ok() && !result.stopped) status = output.put(Text(s.held, held));
    const Status finished = output.finish();
    if (status.ok()) status = finished;
    result.cancelled = !output.good;
    result.seconds += seconds_now() - begin;
    return status;
}

// What stands between documents.
inline Text document_separator(const Tokenizer& tokenizer) { return tokenizer.end_of_text >= 0 ? Text() : Text("\n\n"); }

Status feed_text(Session& session, Text text, bool new_document, Generation& result) {
    const Tokenizer& tokenizer = session.model->tokenizer;
    if (tokenizer.kind == TokenizerKind::none) return fail(Error::invalid_argument, "the model has no tokenizer: feed it ids");
    Array<int32_t> ids(*session.runtime);
    if (new_document) {
        if (tokenizer.end_of_text >= 0 && !ids.push(tokenizer.end_of_text)) return out_of_memory(sizeof(int32_t));
        BABYGPT_TRY(tokenizer.encode(document_separator(tokenizer), ids));
    }
    size_t unknown = 0;
    BABYGPT_TRY(tokenizer.encode(text, ids, false, &unknown));
    result.unknown += unknown;
    if (ids.count > 0) BABYGPT_TRY(session.feed(Span<const int32_t>(ids.items, ids.count)));
    return Status();
}

// The first of all is the begin-of-text token, which stays when the context is full. What belongs to a source begins with the end-of-text
// token, as what was learnt did.
Status begin_text(Session& session) {
    const Model& model = *session.model;
    const bool has_source = model.config.encoder_layers > 0;
    const int32_t first = has_source ? model.tokenizer.end_of_text : model.tokenizer.begin_of_text;
    if (session.position > 0 || first < 0) return Status();
    BABYGPT_TRY(session.feed(Span<const int32_t>(&first, 1)));
    if (!has_source && model.config.context > 1) session.state->kept = 1;
    return Status();
}

// A prompt that ends in a space would be cut where the training text never is (the space belongs to the next word's token): the
// space is taken off, and the first token must begin with it. So must that of a new document where a tokenizer puts a space before its first
// word: the text has none there.
BABYGPT_RARE Text take_last_space(const Tokenizer& tokenizer, Text& prompt, bool new_document) {
    if (tokenizer.kind < TokenizerKind::bpe) return Text();
    const bool puts_space = tokenizer.kind == TokenizerKind::wordpiece ||
                            (tokenizer.kind == TokenizerKind::sentencepiece && tokenizer.tables->add_dummy_prefix);
    if (new_document ? !puts_space : prompt.size < 2 || prompt[prompt.size - 1] != ' ' || prompt[prompt.size - 2] == ' ') return Text();
    bool is_possible = false;  // in some SentencePiece models the space belongs to the word before it
    for (int32_t id = 0; id < tokenizer.vocab && !is_possible; ++id)
        is_possible = id != tokenizer.end_of_text && starts_with(tokenizer.bytes(id), Text(" "));
    if (!is_possible) return Text();
    if (!new_document) prompt = Text(prompt.data, prompt.size - 1);
    return Text(" ");
}

inline void start_result(Generation& result) {
    result.generated = 0;
    result.seconds = 0;
    result.cancelled = result.stopped = result.refused = false;
    result.unknown = 0;
}

}  // namespace

BABYGPT_RARE Status Guard::create(Runtime& from, Span<const Text> patterns) {
    elements = Array<Element>(from), ranges = Array<Range>(from), ends = Array<int32_t>(from);
    for (size_t p = 0; p < patterns.size; ++p) {
        const Text text = patterns[p];
        const auto wrong = [&](const char* what) {
            return fail(Error::invalid_argument, "pattern ", uint64_t(p), ", '", text, "', ", what);
        };
        const size_t first = elements.count;
        bool has_character = false;
        size_t at = 0;
        const auto next = [&] {  // a small letter
            size_t length;
            const uint32_t c = decode_utf8(text.data + at, text.end(), length);
            at += length;
            return c;
        };
        while (at < text.size) {
            uint32_t c = next();
            Element e{guard_character, 0, 0};
            if (c == '*') e.kind = guard_star;
            else if (c == '?') e.kind = guard_any;
            else if (c == ' ') e.kind = guard_white;
            else if (c == '[') {
                e.from = static_cast<uint32_t>(ranges.count);
                e.kind = at < text.size && text[at] == '!' ? guard_other_class : guard_class;
                at += e.kind == guard_other_class;
                bool closed = false;
                while (at < text.size && !(closed = text[at] == ']' && ranges.count > e.from)) {
                    if (text[at] == '\\' && at + 1 < text.size) ++at;
                    const uint32_t low = next();
                    uint32_t high = low;
                    if (at + 1 < text.size && text[at] == '-' && text[at + 1] != ']') ++at, high = next();
                    if (low == not_utf8 || high == not_utf8) return wrong("is not UTF-8");
                    if (small_letter(low) > small_letter(high)) return wrong("has a range whose end comes before its beginning");
                    if (!ranges.push(Range{small_letter(low), small_letter(high)})) return out_of_memory(sizeof(Range));
                }
                if (!closed) return wrong("lacks a ]");
                ++at;
                e.to = static_cast<uint32_t>(ranges.count);
            } else {
                if (c == '\\') {
                    if (at == text.size) return wrong("ends in a backslash");
                    c = next();
                    if (c == 'b') e.kind = guard_edge;
                }
                if (c == not_utf8) return wrong("is not UTF-8");
                e.from = small_letter(c);
                if (is_invisible(e.from)) continue;
            }
            has_character |= e.kind != guard_star && e.kind != guard_edge;
            if (!elements.push(e) || (e.kind == guard_white && !elements.push(Element{guard_white_star, 0, 0})))
                return out_of_memory(sizeof(Element));
            if (elements.count - first > longest_pattern) return wrong("is too long: at most 60 characters are possible");
        }
        if (!has_character) return wrong("has no character that must be there");
        if (!ends.push(static_cast<int32_t>(elements.count))) return out_of_memory(sizeof(int32_t));
    }
    return Status();
}
BABYGPT_RARE Status Guard::find(Text text, bool& found) const {
    if (!elements.runtime) return fail(Error::invalid_argument, "the guard is empty: create it first");
    Array<uint64_t> states(*elements.runtime);
    if (!states.resize(ends.count)) return out_of_memory(8 * ends.count);
    Watch watch;
    start_watch(*this, watch, states.items);
    found = guard_reads(*this, watch, text, Span<const Text>());
    return Status();
}

Status Session::generate(Text prompt, const SampleConfig& config, Generation& result) {
    BABYGPT_TRY(check_session(*this, Span<const int32_t>()));
    const FloatMode mode;
    start_result(result);
    const Text start = take_last_space(model->tokenizer, prompt, position == 0 && prompt.size == 0);
    const double begin = seconds_now();
    BABYGPT_TRY(begin_text(*this));
    BABYGPT_TRY(feed_text(*this, prompt, position == 0 && prompt.size == 0, result));
    result.seconds = seconds_now() - begin;
    return continue_text(*this, config, start, result);
}

Status Session::reply(Text user, const SampleConfig& config, Generation& result, Text reply_turn) {
    BABYGPT_TRY(check_session(*this, Span<const int32_t>()));
    const FloatMode mode;
    start_result(result);
    if (reply_turn.size == 0) reply_turn = view(model->chat.reply_turn);
    Array<char> prompt(*runtime);
    bool good = (position == 0 || !state->line_open || append(prompt, "\n")) && append(prompt, view(model->chat.user_turn));
    if (model->chat.plain_words) good = good && append_plain_words(prompt, user);
    else
        for (const char c : user) good = good && prompt.push(c == '\n' ? ' ' : c);  // a turn is a line
    good = good && append(prompt, "\n") && append(prompt, reply_turn);
    if (!good) return out_of_memory(prompt.count + user.size);
    Text text = view(prompt);
    const Text start = take_last_space(model->tokenizer, text, false);
    const int turn = position;
    const uint64_t forgotten_before = forgotten;
    const double begin = seconds_now();
    BABYGPT_TRY(begin_text(*this));
    BABYGPT_TRY(feed_text(*this, text, position == 0, result));
    state->turn = most(0, turn - static_cast<int>(forgotten - forgotten_before));
    result.seconds = seconds_now() - begin;
    SampleConfig turn_config = config;
    Array<Text> stops(*runtime);
    if (!stops.append(config.stop.data, config.stop.size) || !stops.push(Text("\n"))) return out_of_memory(sizeof(Text));
    turn_config.stop = Span<const Text>(stops.items, stops.count);
    return continue_text(*this, turn_config, start, result);
}

// ---- beam search -----------------------------------------------------------------------------------------------------------
// (Graves 2012; the length penalty and the rules by which it ends are those of transformers' generate.) First the search itself, which
// sees rows of logits and gives out which beams go on with which token; then how a session computes these rows.

namespace {

struct BeamSearch {
    const BeamConfig& config;
    SearchMemory& memory;
    int vocab, limit, keep;  // keep: candidates of a step, so many that `beams` are left however many of them end
    void* user;
    bool (*may_go_on)(void* user, int beam, int32_t id);  // with this token
    bool (*would_end)(void* user, int beam, int32_t id);  // the hypothesis
    int tokens = 0, live = 1, candidates = 0, ended = 0;
    int32_t branches = 0;
    bool done = false;

    double score(double logprob, int length) const { return logprob / exp_of(config.length_penalty * log_of(static_cast<double>(length))); }
    // The best candidates, the best first, then that of the earlier beam, then of the smaller id. norms: log of the sum of e^logit of each row.
    void gather(const double* norms) {
        Candidate* const best = memory.candidates;
        candidates = 0;
        for (int beam = 0; beam < live; ++beam) {
            const float* row = memory.logits + static_cast<int64_t>(beam) * vocab;
            const double start = memory.live[0][beam].logprob - norms[beam];
            for (int32_t id = 0; id < vocab; ++id) {
                const double logprob = start + static_cast<double>(row[id]);
                if (candidates == keep && !(logprob > best[keep - 1].logprob)) continue;
                if (!is_finite(row[id]) || !may_go_on(user, beam, id)) continue;
                int low = 0, high = candidates;
                while (low < high) {
                    const int middle = (low + high) / 2;
                    if (best[middle].logprob >= logprob) low = middle + 1;
                    else high = middle;
                }
                candidates += candidates < keep;
                memmove(best + low + 1, best + low, static_cast<size_t>(candidates - 1 - low) * sizeof(Candidate));
                best[low] = Candidate{logprob, beam, id};
            }
        }
    }
    int32_t grow(const Candidate& c) {
        memory.tree[branches] = Branch{memory.live[0][c.parent].branch, c.id};
        return branches++;
    }
    // Keeps the best `beams`, in order.
    void end(const Candidate& c, bool by_itself) {
        const double value = score(c.logprob, tokens);
        int at = ended;
        while (at > 0 && memory.ended[at - 1].score < value) --at;
        if (at == config.beams) return;
        ended += ended < config.beams;
        memmove(memory.ended + at + 1, memory.ended + at, static_cast<size_t>(ended - 1 - at) * sizeof(Ending));
        memory.ended[at] = Ending{value, c.logprob, grow(c), tokens, by_itself};
    }
    // One token more: the candidates end or become the beams that go on.
    void step(const double* norms) {
        gather(norms);
        ++tokens;
        int next = 0;
        for (int i = 0; i < candidates; ++i) {
            const Candidate& c = memory.candidates[i];
            const bool by_itself = would_end(user, c.parent, c.id);
            if (by_itself || tokens == limit) {
                if (i < config.beams) end(c, by_itself);  // the others are there to go on
            } else if (next < config.beams) memory.live[1][next++] = Beam{c.logprob, grow(c), c.parent};
        }
        Beam* const before = memory.live[0];
        memory.live[0] = memory.live[1], memory.live[1] = before;
        live = next;
        done = live == 0;
        if (done || ended < config.beams) return;
        const bool forever = config.early_stopping == EarlyStopping::never && config.length_penalty > 0 && config.beams > 1;
        done = (config.early_stopping == EarlyStopping::yes || config.beams == 1) ||
               !(score(memory.live[0][0].logprob, forever ? limit : tokens) > memory.ended[ended - 1].score);
    }
};

// A session's search. What the session has read stays as it is: beams share its full pages, and copy the one that is partly filled.
struct SessionSearch {
    Session& session;
    const BeamConfig& config;
    Text start;                     // that the first token must begin with
    int longest;                    // pages of a context
    int free_pages = 0, lived = 1;  // lived: beams of the step before
    BeamSearch search;
    SessionSearch(Session& of, const BeamConfig& how, Text first, int limit, int keep)
        : session(of),
          config(how),
          start(first),
          longest(context_pages(of.model->config.context)),
          search{how, of.state->search, of.model->config.vocab, limit, keep, this, &may_go_on, &would_end} {}

    int32_t* table(int beam) const { return search.memory.tables[0] + static_cast<int64_t>(beam) * longest; }
    float* page(int32_t number) const {
        const SessionState& s = *session.state;
        if (number < longest) return s.pages[number];
        return reinterpret_cast<float*>(s.own->begin() + pages_bytes(s, number - s.first_own));
    }
    // Pages that a beam may need beside those that the session has filled.
    int own_pages() const {
        const int first = session.position / kv_page;
        return search.limit > 1 ? (session.position + search.limit - 2) / kv_page - first + 1 : 0;
    }

    void lay_out(Layout& layout) const {
        SearchMemory& m = search.memory;
        const int64_t beams = config.beams, room = static_cast<int64_t>(session.state->held_room), pages = session.state->page_count,
                      patterns = config.guard ? static_cast<int64_t>(config.guard->ends.count) : 0;
        m.logits = layout.take<float>(beams * search.vocab);
        for (int i = 0; i < 2; ++i) {
            m.tables[i] = layout.take<int32_t>(beams * longest);
            m.live[i] = layout.take<Beam>(beams);
            m.said[i] = layout.take<Said>(beams);
            for (int64_t beam = 0; beam < beams; ++beam) {
                char* const tail = layout.take<char>(room);
                uint64_t* const states = layout.take<uint64_t>(patterns);
                if (layout.memory) m.said[i][beam] = Said{tail, 0, Watch{states, {}, 0, false, false}};
            }
        }
        m.places = layout.take<float*>(least<int64_t>(beams, most_at_once) * longest);
        m.users = layout.take<int32_t>(pages);
        m.free_pages = layout.take<int32_t>(pages);
        m.ids = layout.take<int32_t>(beams);
        m.norms = layout.take<double>(beams);
        m.tree = layout.take<Branch>(2 * beams * search.limit);
        m.candidates = layout.take<Candidate>(search.keep);
        m.ended = layout.take<Ending>(beams);
    }
    // Enlarges the KV cache where there are too few pages, and takes the rest.
    BABYGPT_RARE Status take_memory() const {
        SessionState& s = *session.state;
        const int64_t wanted = longest + static_cast<int64_t>(config.beams) * own_pages();
        if (wanted > INT32_MAX) return out_of_memory(pages_bytes(s, wanted));
        if (wanted > s.page_count) BABYGPT_TRY(take_pages(session, s.shared, wanted));
        Layout layout;
        lay_out(layout);
        if (layout.bytes > s.search.block.bytes && !s.search.block.take(*session.runtime, layout.bytes, false))
            return out_of_memory(layout.bytes);
        layout = Layout{s.search.block.memory, 0};
        lay_out(layout);
        return Status();
    }
    void begin() {
        SessionState& s = *session.state;
        memcpy(s.search.logits, s.logits, static_cast<size_t>(search.vocab) * sizeof(float));
        for (int i = 0; i < longest; ++i) table(0)[i] = i;
        memcpy(s.search.said[0][0].tail, s.said.tail, s.said.count);
        s.search.said[0][0].count = s.said.count;
        copy_watch(s.search.said[0][0].watch, s.said.watch);
        s.search.live[0][0] = Beam{0, -1, 0};
        for (int i = 0; i < s.page_count; ++i) s.search.users[i] = (i < longest) + (i < context_pages(session.position));
        for (int i = s.page_count; i-- > longest;) s.search.free_pages[free_pages++] = i;
    }

    static bool may_go_on(void* user, int beam, int32_t id) {
        const SessionSearch& me = *static_cast<SessionSearch*>(user);
        const SessionState& s = *me.session.state;
        const Text token = said_by(me.session.model->tokenizer, id);
        return may_come(me.session, me.search.tokens == 0 ? me.start : Text(), id) &&
               !completes(me.search.memory.said[0][beam], me.config.banned, token) &&
               !guard_refuses(me.config.guard, me.search.memory.said[0][beam].watch, s.states.items + s.states.count / 2, token,
                              me.config.stop);
    }
    static bool would_end(void* user, int beam, int32_t id) {
        const SessionSearch& me = *static_cast<SessionSearch*>(user);
        const Tokenizer& tokenizer = me.session.model->tokenizer;
        if (id == tokenizer.end_of_text) return true;
        for (const int32_t stop : me.config.stop_ids)
            if (id == stop) return true;
        return me.config.stop.size > 0 && me.completes_stop(me.search.memory.live[0][beam].branch, id);
    }
    void copy_watch(Watch& to, const Watch& from) const {
        uint64_t* const states = to.states;
        for (size_t i = 0; config.guard && i < config.guard->ends.count; ++i) states[i] = from.states[i];
        to = from, to.states = states;
    }
    // What a token adds to a hypothesis; `start` stands in the prompt.
    Text bytes_of(int32_t id, bool is_first) const {
        const Text bytes = said_by(session.model->tokenizer, id);
        return is_first && bytes.size >= start.size ? Text(bytes.data + start.size, bytes.size - start.size) : bytes;
    }
    // Does the token complete a stop string? It may have begun in those before it: they are put together from the last one backwards.
    bool completes_stop(int32_t branch, int32_t id) const {
        char* const text = session.state->held;
        const size_t room = session.state->held_room;
        Text bytes = bytes_of(id, branch < 0);
        const size_t enough = least(room, bytes.size + longest_stop);
        size_t at = room;
        for (;; branch = search.memory.tree[branch].before) {
            const size_t n = least(bytes.size, at);
            at -= n;
            memcpy(text + at, bytes.end() - n, n);
            if (branch < 0 || room - at >= enough) break;
            const Branch& b = search.memory.tree[branch];
            bytes = bytes_of(b.id, b.before < 0);
        }
        const Text end(text + at, room - at);
        for (const Text& stop : config.stop)
            if (find_in(end, stop) < end.size) return true;
        return false;
    }

    // The beams of the last step go on: their tables are copied, pages that nobody needs become free, and one that two would write to is
    // copied, all but its first.
    Status fork() {
        SearchMemory& m = search.memory;
        SessionState& s = *session.state;
        const int position = session.position + search.tokens - 1, filled = context_pages(position), at = position / kv_page;
        int32_t* const before = m.tables[0];
        m.tables[0] = m.tables[1], m.tables[1] = before;
        Said* const said_before = m.said[0];
        m.said[0] = m.said[1], m.said[1] = said_before;
        for (int beam = 0; beam < search.live; ++beam) {
            const Beam& b = m.live[0][beam];
            memcpy(table(beam), before + static_cast<int64_t>(b.parent) * longest, static_cast<size_t>(longest) * sizeof(int32_t));
            for (int i = 0; i < filled; ++i) ++m.users[table(beam)[i]];
            m.ids[beam] = m.tree[b.branch].id;
            const Said& from = said_before[b.parent];
            Said& to = m.said[0][beam];
            memcpy(to.tail, from.tail, to.count = from.count);
            const Text token = said_by(session.model->tokenizer, m.ids[beam]);
            remember(to, token);
            copy_watch(to.watch, from.watch);
            if (config.guard) (void)guard_reads(*config.guard, to.watch, token, Span<const Text>());
        }
        for (int beam = 0; beam < lived; ++beam)
            for (int i = 0; i < filled; ++i)
                if (--m.users[before[static_cast<int64_t>(beam) * longest + i]] == 0)
                    m.free_pages[free_pages++] = before[static_cast<int64_t>(beam) * longest + i];
        for (int beam = 0; beam < search.live; ++beam) {
            int32_t& mine = table(beam)[at];
            const bool is_new = at == filled;
            if (!is_new && m.users[mine] == 1) continue;
            const int32_t own = m.free_pages[--free_pages];
            m.users[own] = 1;
            if (!is_new) {
                --m.users[mine];
                if (s.on) s.on->lock.enter();
                const Status status = copy_page(s, page(own), page(mine));
                if (s.on) s.on->lock.leave();
                BABYGPT_TRY(status);
            }
            mine = own;
        }
        return Status();
    }
    // Reads the newest token of each beam: their logits are ready then.
    Status read() {
        SearchMemory& m = search.memory;
        SessionState& s = *session.state;
        for (int first = 0, n; first < search.live; first += n) {
            n = least(search.live - first, least(most_at_once, s.chunk));
            Sequence sequences[most_at_once];
            const int position = session.position + search.tokens - 1;
            for (int i = 0; i < n; ++i) {
                float** const places = m.places + static_cast<int64_t>(i) * longest;
                for (int k = 0; k <= position / kv_page; ++k) places[k] = page(table(first + i)[k]);
                sequences[i] = Sequence{i, 1, position, places, m.logits + static_cast<int64_t>(first + i) * search.vocab};
            }
            Run run;
            run.rows = n;
            run.sequences = Span<const Sequence>(sequences, static_cast<size_t>(n));
            run.source = seen_source(s);
            run.ids = m.ids + first;
            BABYGPT_TRY(babygpt::forward(session, run, nullptr));
        }
        return Status();
    }
    Status run() {
        SearchMemory& m = search.memory;
        for (begin();;) {
            for (int beam = 0; beam < search.live; ++beam)
                m.norms[beam] = log_sum(*session.state, m.logits + static_cast<int64_t>(beam) * search.vocab, search.vocab);
            lived = search.live;
            search.step(m.norms);
            if (search.done) return Status();
            BABYGPT_TRY(fork());
            BABYGPT_TRY(read());
        }
    }
    BABYGPT_RARE Status tell(SearchResult& result) const {
        const SearchMemory& m = search.memory;
        for (int i = 0; i < least(search.ended, config.best); ++i) {
            const Ending& e = m.ended[i];
            Hypothesis h;
            h.score = e.score, h.logprob = e.logprob, h.ended = e.by_itself;
            h.first_id = result.ids.count, h.ids = static_cast<size_t>(e.tokens), h.first_byte = result.text.count;
            if (!result.ids.resize(h.first_id + h.ids)) return out_of_memory(h.ids * sizeof(int32_t));
            int32_t branch = e.branch;
            for (size_t k = h.ids; k-- > 0; branch = m.tree[branch].before) result.ids[h.first_id + k] = m.tree[branch].id;
            for (size_t k = 0; k < h.ids; ++k) {
                const Text bytes = bytes_of(result.ids[h.first_id + k], k == 0);
                if (!append(result.text, bytes)) return out_of_memory(bytes.size);
            }
            h.bytes = result.text.count - h.first_byte;
            const Text whole(result.text.items + h.first_byte, h.bytes);
            for (const Text& stop : config.stop) h.bytes = least(h.bytes, find_in(whole, stop));
            result.text.count = h.first_byte + h.bytes;
            if (!result.best.push(h)) return out_of_memory(sizeof h);
        }
        return Status();
    }
};

BABYGPT_RARE Status check(const BeamConfig& c, int vocab) {
    if (c.beams < 1 || c.beams > 4096) return fail(Error::invalid_argument, "beams is ", c.beams, ", but must be from 1 to 4096");
    if (c.best < 1 || c.best > c.beams)
        return fail(Error::invalid_argument, "best is ", c.best, ", but must be from 1 to the number of beams, ", c.beams);
    if (!(c.length_penalty >= -10 && c.length_penalty <= 10))
        return fail(Error::invalid_argument, "length_penalty is ", c.length_penalty, ", but must be from -10 to 10");
    if (c.tokens < 1) return fail(Error::invalid_argument, "tokens is ", c.tokens, ", but a search needs at least 1");
    for (const int32_t id : c.stop_ids)
        if (id < 0 || id >= vocab) return fail(Error::invalid_argument, "a stop id is ", id, ", which is none of the model's ", vocab);
    BABYGPT_TRY(check_strings("stop", c.stop));
    return check_strings("banned", c.banned);
}

}  // namespace

Status Session::search(Text prompt, const BeamConfig& config, SearchResult& result) {
    BABYGPT_TRY(check_session(*this, Span<const int32_t>()));
    const FloatMode mode;
    BABYGPT_TRY(check(config, model->config.vocab));
    result.best = Array<Hypothesis>(*runtime), result.ids = Array<int32_t>(*runtime), result.text = Array<char>(*runtime);
    const double begin = seconds_now();
    Text start;
    Generation read;
    if (prompt.size > 0 || position == 0) start = take_last_space(model->tokenizer, prompt, position == 0 && prompt.size == 0);
    BABYGPT_TRY(begin_text(*this));
    if (prompt.size > 0 || !state->ready) BABYGPT_TRY(feed_text(*this, prompt, position == 0 && prompt.size == 0, read));
    result.unknown = read.unknown;
    if (!state->ready) return fail(Error::invalid_argument, "nothing has been read yet: feed the session at least one id");
    BABYGPT_TRY(prepare(*this));
    BABYGPT_TRY(make_room(*this, least(config.tokens, piece_rows(*this))));
    const int limit = least(config.tokens, model->config.context - position + 1);
    // Of a step's best candidates, so many that `beams` are left however many of the ways to end they hold.
    const size_t ends = least(1 + config.stop_ids.size + config.stop.size, static_cast<size_t>(model->config.vocab));
    const int64_t most_candidates = static_cast<int64_t>(config.beams) * model->config.vocab;
    const int64_t candidates = least(static_cast<int64_t>(config.beams) * static_cast<int64_t>(1 + ends), most_candidates);
    if (candidates > INT32_MAX) return out_of_memory(static_cast<uint64_t>(candidates) * sizeof(Candidate));
    SessionSearch search(*this, config, start, limit, static_cast<int>(candidates));
    BABYGPT_TRY(search.take_memory());
    BABYGPT_TRY(begin_watch(*this, config.guard));
    BABYGPT_TRY(search.run());
    BABYGPT_TRY(search.tell(result));
    result.seconds = seconds_now() - begin;
    if (result.best.count > 0) return Status();
    return fail(Error::invalid_argument, "no next token is possible: all are banned, or end a banned string");
}

Status Session::score(Text text, Array<int32_t>& ids, Array<float>& logprobs, double& sum_of_logprobs) {
    BABYGPT_TRY(check_session(*this, Span<const int32_t>()));
    const FloatMode mode;
    BABYGPT_TRY(prepare(*this));
    BABYGPT_TRY(begin_text(*this));
    state->watches = false;
    ids = Array<int32_t>(*runtime);
    logprobs = Array<float>(*runtime);
    BABYGPT_TRY(model->tokenizer.encode(text, ids));
    Array<double> losses(*runtime);
    if (!logprobs.resize(ids.count) || !losses.resize(static_cast<size_t>(piece_rows(*this))))
        return out_of_memory(ids.count * sizeof(float));
    sum_of_logprobs = 0;
    for (size_t i = 0; i < ids.count;) {
        if (i == 0 && state->ready) logprobs[0] = log_probability(*state, ids[0], model->config.vocab);
        const int count = static_cast<int>(least(static_cast<size_t>(piece_rows(*this)), ids.count - i));
        BABYGPT_TRY(make_room(*this, count));
        const bool more = i + static_cast<size_t>(count) < ids.count;
        BABYGPT_TRY(read_ids(*this, ids.items + i, count, losses.items, more ? ids[i + static_cast<size_t>(count)] : -1));
        for (size_t j = 0; j < static_cast<size_t>(count) && i + j + 1 < ids.count; ++j)
            logprobs[i + j + 1] = static_cast<float>(-losses[j]);
        i += static_cast<size_t>(count);
    }
    for (const float logprob : logprobs) sum_of_logprobs += static_cast<double>(logprob);
    return Status();
}

// ---- encoders ------------------------------------------------------------------------------------------------------------

struct EncoderState {
    Tape tape;
    Block memory;
    const BackendFunctions* backend = nullptr;
    Regions<float> regions;
    float* logits = nullptr;  // [of the head]
    explicit EncoderState(Runtime& from) : tape(from) {}
};

namespace {

inline bool is_encoder(const Config& c) { return c.encoder_layers == 0 && (!c.causal || c.classes > 0); }

inline void lay_out(Layout& layout, EncoderState& s, int threads) {
    s.regions.activations = layout.take<float>(s.tape.activation_block);
    s.regions.scratch = layout.take<float>(s.backend->scratch(s.tape, threads));
    s.regions.threads = threads;
    s.logits = layout.take<float>(s.tape.head_out);
}

Status fill(Encoder& encoder, Runtime& from, const Model& of) {
    if (!of.state) return fail(Error::invalid_argument, "the model is empty: create or load it first");
    if (!is_encoder(of.config))
        return fail(Error::unsupported, "the model is neither an encoder alone nor a classifier: it needs a session");
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(from, backend));
    encoder.runtime = &from;
    EncoderState* const s = encoder.state = create<EncoderState>(from, from);
    if (!s) return out_of_memory(sizeof(EncoderState));
    s->backend = backend;
    BABYGPT_TRY(record(s->tape, of.config, of.config.context, false, 0));
    if (of.state->only_runs) leave_out_packed(s->tape, *backend);
    Layout layout;
    lay_out(layout, *s, from.thread_count());
    if (!s->memory.take(from, layout.bytes, true)) return out_of_memory(layout.bytes);
    layout = Layout{s->memory.memory, 0};
    lay_out(layout, *s, from.thread_count());
    encoder.model = &of;
    start_pool(from);
    return bind_weights(from, of, s->tape, *backend, s->regions);
}

// Reads an example; of row `at` the head says its logits. `wanted`: how many floats the caller expects, for which there is `room`.
Status read_example(Encoder& encoder, const Example& example, int at, float* logits, size_t wanted, size_t room) {
    if (!encoder.state) return fail(Error::invalid_argument, "the encoder is empty: create it first");
    const Config& c = encoder.model->config;
    BABYGPT_TRY(check_example(c, example));
    const int rows = static_cast<int>(example.ids.size);
    if (at < 0 || at >= rows) return fail(Error::invalid_argument, "there is no row ", at, " in an example of ", rows);
    for (const int32_t id : example.ids)
        if (id < 0 || id >= c.vocab) return fail(Error::invalid_argument, "the id ", id, " is none of the model's ", c.vocab);
    if (room < wanted) return fail(Error::no_room, "the result has ", uint64_t(wanted), " floats, but there is room for ", uint64_t(room));
    EncoderState& s = *encoder.state;
    BABYGPT_TRY(bind_weights(*encoder.runtime, *encoder.model, s.tape, *s.backend, s.regions));
    const Sequence sequence{0, rows, 0, nullptr, logits, at};
    Run run;
    run.rows = rows;
    run.sequences = Span<const Sequence>(&sequence, 1);
    run.ids = example.ids.data, run.features = example.features.data;
    s.backend->forward(*encoder.runtime, s.tape, s.regions, run);
    return Status();
}

Status read_probabilities(Encoder& encoder, const Example& example, int at, Span<float> probabilities) {
    const FloatMode mode;
    const int outputs = encoder.state ? encoder.state->tape.head_out : 0;
    BABYGPT_TRY(read_example(encoder, example, at, encoder.state ? encoder.state->logits : nullptr, static_cast<size_t>(outputs),
                             probabilities.size));
    const EncoderState& s = *encoder.state;
    const float sum = s.backend->exponentials(probabilities.data, s.logits, outputs, s.backend->biggest(s.logits, outputs), 1);
    for (int i = 0; i < outputs; ++i) probabilities[static_cast<size_t>(i)] /= sum;
    return Status();
}

}  // namespace

Encoder::Encoder(Encoder&& other) noexcept { *this = static_cast<Encoder&&>(other); }
Encoder& Encoder::operator=(Encoder&& other) noexcept {
    if (this == &other) return *this;
    if (state) destroy(*runtime, state);
    model = other.model, runtime = other.runtime, state = other.state;
    other.state = nullptr;
    return *this;
}
Encoder::~Encoder() {
    if (state) destroy(*runtime, state);
}

Status Encoder::create(Runtime& from, const Model& of) {
    const FloatMode mode;
    *this = Encoder();
    const Status status = babygpt::fill(*this, from, of);
    if (!status.ok()) *this = Encoder();
    return status;
}

Status Encoder::encode(Text text, Array<int32_t>& ids, bool gaps) const {
    if (!state) return fail(Error::invalid_argument, "the encoder is empty: create it first");
    const Text mark = "[MASK]";
    const int32_t mask = mask_id(*model);
    const int32_t first = model->tokenizer.begin_of_text;
    ids = Array<int32_t>(*runtime);
    if (first >= 0 && text.size > 0 && !ids.push(first)) return out_of_memory(sizeof(int32_t));
    for (size_t at = 0; at <= text.size;) {
        size_t end = gaps ? at : text.size;
        while (end < text.size && !starts_with(Text(text.data + end, text.size - end), mark)) ++end;
        Text part(text.data + at, end - at);
        const bool gap = end < text.size;
        if (gap && mask < 0) return fail(Error::unsupported, "the model has no id for a gap");
        if (gap && equal(part, " ") && model->tokenizer.kind >= TokenizerKind::bpe) part = Text();  // between two gaps
        if (gap) (void)take_last_space(model->tokenizer, part, false);
        BABYGPT_TRY(model->tokenizer.encode(part, ids));
        if (gap && !ids.push(mask)) return out_of_memory(ids.count * sizeof(int32_t));
        at = end + (gap ? mark.size : 1);
    }
    ids.count = least(ids.count, static_cast<size_t>(model->config.context));
    return Status();
}

Status Encoder::classify(const Example& example, Span<float> probabilities) {
    if (state && model->config.classes == 0) return fail(Error::unsupported, "the model has no classes");
    return read_probabilities(*this, example, 0, probabilities);
}

Status Encoder::fill(const Example& example, int at, Span<float> probabilities) {
    if (state && model->config.classes > 0) return fail(Error::unsupported, "the model is a classifier, and fills no gaps");
    return read_probabilities(*this, example, at, probabilities);
}

Status Encoder::embed(const Example& example, Span<float> vector) {
    const FloatMode mode;
    const size_t width = state ? static_cast<size_t>(model->config.width) : 0;
    BABYGPT_TRY(read_example(*this, example, 0, nullptr, width, vector.size));
    const Op& head = state->tape.ops[state->tape.ops.count - 1];
    const float* x = values(state->tape, state->regions, head.x);
    const size_t rows = head.side == Side::whole ? 1 : example.ids.size;
    for (size_t i = 0; i < width; ++i) {
        float sum = 0;
        for (size_t row = 0; row < rows; ++row) sum += x[row * width + i];
        vector[i] = sum / static_cast<float>(rows);
    }
    return Status();
}

// ---- looking inside --------------------------------------------------------------------------------------------------------

Status Session::attention(int layer, Array<float>& probabilities, bool to_source) {
    BABYGPT_TRY(check_session(*this, Span<const int32_t>()));
    const FloatMode mode;
    if (layer < 0 || layer >= model->config.layers)
        return fail(Error::invalid_argument, "layer is ", layer, ", but the model has ", model->config.layers);
    if (position == 0) return fail(Error::invalid_argument, "nothing has been read yet");
    BABYGPT_TRY(bring(*model));
    if (to_source && model->config.encoder_layers == 0)
        return fail(Error::invalid_argument, "the model has no encoder, which reads sources");
    // A tape planned as for training keeps queries, keys and softmax sums.
    Tape tape(*runtime);
    BABYGPT_TRY(record(tape, model->config, position, true, 0, 1, state->adapter ? &state->adapter->config : nullptr));
    Layout layout;
    Regions<float> r;
    Block memory;
    for (int pass = 0; pass < 2; ++pass) {
        r.activations = layout.take<float>(tape.activation_block);
        r.threads = runtime->thread_count();
        r.scratch = layout.take<float>(state->backend->scratch(tape, r.threads));
        if (pass == 0 && !memory.take(*runtime, layout.bytes, true)) return out_of_memory(layout.bytes);
        layout = Layout{memory.memory, 0};
    }
    const Sequence sequence{0, position, 0, nullptr};
    Run run;
    run.rows = position;
    run.sequences = Span<const Sequence>(&sequence, 1);
    run.ids = state->history;
    run.source = seen_source(*state);
    run.source.rows = state->source.length, run.source.ids = state->source_ids;
    r.weights = model->weights, r.adapter = state->adapter ? state->adapter->weights : nullptr;
    state->backend->forward(*runtime, tape, r, run);
    for (const Op& op : tape.ops) {
        if (op.kind != OpKind::attention || op.layer != layer || op.side != Side::text || (op.sight == Sight::source) != to_source)
            continue;
        const Attention<float> a(tape, r, run, op, 0);
        const float scale = 1 / root(static_cast<float>(a.dim));
        probabilities = Array<float>(*runtime);
        size_t count;
        if (!product(int64_t(a.heads) * a.queries, a.keys, count) || !probabilities.resize(count))
            return out_of_memory(static_cast<uint64_t>(a.heads) * static_cast<uint64_t>(a.queries) * static_cast<uint64_t>(a.keys) *
                                 sizeof(float));
        float* p = probabilities.items;
        for (int head = 0; head < a.heads; ++head)
            for (int i = 0; i < a.queries; ++i, p += a.keys)
                for (int k = 0; k < a.seen_by(i); ++k) {
                    float score = 0;
                    const float *query = a.q + i * a.q_stride + head * a.dim, *key = a.k + k * a.k_stride + head / a.group * a.dim;
                    for (int d = 0; d < a.dim; ++d) score = madd(query[d], key[d], score);
                    const float* m = a.softmax + (int64_t(i) * a.heads + head) * 2;
                    p[k] = exp_of(score * scale - m[0]) / m[1];
                }
        return Status();
    }
    return fail(Error::invalid_argument, "the model has no attention in layer ", layer);
}

// ---- what things take ----------------------------------------------------------------------------------------------------

BABYGPT_RARE Status memory_needed(Runtime& runtime, const Config& config, Purpose purpose, int batch, Memory& memory, double dropout,
                                  const AdapterConfig* beside, uint64_t tokens) {
    memory = Memory();
    BABYGPT_TRY(check(config));
    BABYGPT_TRY(check_batch(batch, config.context));
    AdapterConfig full = beside ? *beside : AdapterConfig();
    const AdapterConfig* const adapter = beside ? &full : nullptr;
    if (full.targets.size == 0) full.targets = all_targets(config);
    BABYGPT_TRY(check(full));
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(runtime, backend));
    const bool training = purpose == Purpose::training;
    uint64_t learnt;  // bytes of what is trained
    {                 // the model's own, and the adapter's
        Tape tape(runtime);
        BABYGPT_TRY(record(tape, config, 0, false, 0, 1, adapter));
        if (!training && !(find_device(runtime) && runs_on_device(config))) leave_out_packed(tape, *backend);
        memory.weights = static_cast<uint64_t>(tape.weight_block) * sizeof(float);
        memory.records = sizeof(ModelState) + tape.weights.capacity * sizeof(WeightPlan) + tape.names.capacity * sizeof(Weight);
        learnt = memory.weights;
        if (adapter) {
            learnt = static_cast<uint64_t>(tape.adapter_block) * sizeof(float);
            memory.weights += learnt;
            Array<Weight> names(runtime);
            Array<char> targets(runtime);
            if (!append(targets, full.targets)) return out_of_memory(full.targets.size);
            for (const WeightPlan& plan : tape.adapter)
                if (!names.push(plan.weight)) return out_of_memory(sizeof(Weight));
            memory.records += sizeof(AdapterState) + names.capacity * sizeof(Weight) + targets.capacity;
        }
    }
    Layout layout;
    const auto activations = [&](const Tape& tape) {
        return round_up(static_cast<uint64_t>(tape.activation_block) * sizeof(float), uint64_t(cache_line));
    };
    const auto scratch = [&](const Tape& tape) {
        return round_up(static_cast<uint64_t>(backend->scratch(tape, runtime.thread_count())) * sizeof(float), uint64_t(cache_line));
    };
    if (training) {
        TrainerState state(runtime);
        Trainer trainer;
        state.backend = backend;
        choose_device(state, runtime);
        state.text_room = state.on ? text_room(config, nullptr, tokens) : 0;
        state.tape.frozen = adapter != nullptr;
        BABYGPT_TRY(record(state.tape, config, batch * config.context, true, dropout, batch, adapter));
        lay_out(layout, state, &trainer, config, batch, runtime.thread_count());
        if (state.on) memory.device = state.on->bytes(plan_of(runtime, state.tape, config, batch, state.text_room));
        memory.moments = 2 * learnt;
        if (!state.on) {
            memory.gradients = learnt + round_up(static_cast<uint64_t>(state.tape.lookup_block()) * sizeof(float), uint64_t(cache_line));
            memory.activations = activations(state.tape);
            memory.scratch = scratch(state.tape);
        }
        memory.records += sizeof(TrainerState) + record_bytes(state.tape);
    } else if (is_encoder(config)) {
        EncoderState state(runtime);
        state.backend = backend;
        BABYGPT_TRY(record(state.tape, config, config.context, false, 0));
        lay_out(layout, state, runtime.thread_count());
        layout.bytes *= static_cast<size_t>(batch);  // `batch` encoders of one model
        memory.weights += static_cast<uint64_t>(packed_block(*backend, state.tape)) * sizeof(float);
        memory.activations = activations(state.tape) * static_cast<uint64_t>(batch);
        memory.scratch = scratch(state.tape) * static_cast<uint64_t>(batch);
        memory.records += sizeof(EncoderState) + record_bytes(state.tape);
    } else {
        SessionState state(runtime);
        state.backend = backend;
        const DeviceFunctions* const device = adapter || !runs_on_device(config) ? nullptr : find_device(runtime);
        BABYGPT_TRY(record(state.tape, config, device ? device_rows : chunk_rows(config), false, 0, 1, adapter));
        lay_out(layout, state, device != nullptr, runtime.thread_count(), longest_stop);
        if (device) {
            state.narrow_pages = runtime.precision == Precision::bf16;
            memory.device = device->generator_bytes(plan_of(runtime, state.tape, config, device_rows)) +
                            static_cast<uint64_t>(batch) * pages_bytes(state, context_pages(config.context));
        } else {
            memory.weights += static_cast<uint64_t>(packed_block(*backend, state.tape)) * sizeof(float);
            memory.activations = activations(state.tape);
            memory.scratch = scratch(state.tape);
            memory.kv = pages_bytes(state, context_pages(config.context));
        }
        memory.records += sizeof(SessionState) + sizeof(Pages) + record_bytes(state.tape);
        layout.bytes *= static_cast<size_t>(batch);  // `batch` sessions of one model
        memory.records += static_cast<uint64_t>(batch) * static_cast<uint64_t>(state.tape.low_block()) * sizeof(float);
        memory.activations *= static_cast<uint64_t>(batch), memory.scratch *= static_cast<uint64_t>(batch),
            memory.kv *= static_cast<uint64_t>(batch);
    }
    // The small arrays of the block: ids, losses, pages.
    memory.records += layout.bytes - (memory.gradients + memory.moments + memory.activations + memory.scratch);
    return Status();
}

BABYGPT_RARE Status summary(Runtime& runtime, const Config& config, int batch, Array<SummaryRow>& rows) {
    BABYGPT_TRY(check(config));
    Tape tape(runtime);
    BABYGPT_TRY(record(tape, config, 0, false, 0));
    rows = Array<SummaryRow>(runtime);
    BABYGPT_TRY(check_batch(batch, config.context));
    for (const Op& op : tape.ops) {
        const int length = op.side == Side::whole ? 1 : config.context, seen = op.sight == Sight::causal ? length + 1 : 2 * length;
        const int64_t tokens = static_cast<int64_t>(batch) * length;
        SummaryRow row{};
        Line layer(row.layer, sizeof row.layer), shape(row.shape, sizeof row.shape);
        layer.put(op.kind == OpKind::head ? "lm_head" : tape.at(op.y).name);
        layer.put(" (");
        layer.put(op_name(op.kind));
        layer.put(")");
        shape.put("["), shape.put(batch), shape.put(", "), shape.put(length), shape.put(", "), shape.put(op.out), shape.put("]");
        const bool owns = op.kind == OpKind::head ? !tape.tied : op.kind != OpKind::embedding || op.lookup < 1;
        if (op.w != nothing && owns) row.parameters += tape.weight(op.w).rows * tape.weight(op.w).cols;
        if (op.b != nothing) row.parameters += tape.weight(op.b).rows * tape.weight(op.b).cols;
        if (op.kind == OpKind::linear || op.kind == OpKind::head) row.multiply_adds = tokens * op.in * op.out;
        if (op.kind == OpKind::attention) row.multiply_adds = tokens * op.out * seen;
        row.bytes = op.kind == OpKind::head ? 0 : tokens * op.out * static_cast<int64_t>(sizeof(float));
        if (!rows.push(row)) return out_of_memory(sizeof row);
    }
    return Status();
}

}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 9] Files: the checkpoint
// =====================================================================================================================
// A checkpoint is a safetensors file (huggingface.co/docs/safetensors), so that Python reads it as it is:
//
//     8 bytes   the length of the header, little-endian
//     header    {"__metadata__": {"format": "pt", ...}, "wte.weight": {"dtype": "F32", "shape": [96, 32], "data_offsets": [0, 12288]}, ...}
//               padded with spaces to a multiple of 8 bytes
//     data      the tensors' bytes, little-endian, one tensor after the other without holes
//
// Tensors have Hugging Face's names for GPT-2 or Llama. After Model::convert the matrices are BF16, or I8 with their scales in a vector: "X" and "X_scale",
// one for each row of the embeddings and each column of the others. The values of the metadata are strings; ours hold JSON:
//
//     babygpt.format_version   1
//     babygpt.config           what the model is, with the keys of Hugging Face's GPT-2 or Llama (and "bias", "dtype", and others of ours)
//     babygpt.tokenizer        a tokenizer.json; absent where there is none
//     babygpt.chat             {"user_turn": ..., "reply_turn": ..., "plain_words": false}; absent where there is none
//     babygpt.labels           the names of a classifier's classes, each ended by a line end; absent where they have none
//     babygpt.training         {"config": TrainConfig, "state": ...}: only in a resume file, beside the tensors moment1.* and moment2.*
//
// An adapter is such a file of its own, with PEFT's names: "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight". In the place of
// config, tokenizer and chat stands
//
//     babygpt.adapter          what PEFT writes into adapter_config.json
//
// In this order: values as JSON, reading a header, checking it against its config, other people's files, writing, then Model's and Trainer's
// calls.
//
// GGUF, llama.cpp's file, comes in as it is found (gpt2 and llama; F32, F16, BF16, Q8_0) and goes out by Model::save_gguf. Its Llama has the
// rows of queries and keys in another order, because llama.cpp turns pairs of neighbours: they are put in ours, and back.
//
// Reading trusts nothing. A length is compared with the file's size before it is used, every tensor's shape with the config before the
// weights get their memory. All memory that reading a file takes, added up, is less than 100 times the file's size and 256 KiB more.

#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "babygpt writes floats as they lie in memory, and the file format wants them little-endian"
#endif
#endif

namespace babygpt {
namespace {

// ---- values as JSON --------------------------------------------------------------------------------------------------

// A double as C99 and Python's float.fromhex write it, every bit kept: 0x1.8p+3 is 12.
bool append_hex(Array<char>& to, double value) {
    const uint64_t bits = bits_as<uint64_t>(value);
    uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
    if (bits >> 63 && !to.push('-')) return false;
    if (exponent == 0x7ff) return append(to, fraction ? "nan" : "inf");
    bool good = append(to, exponent ? "0x1" : "0x0");
    if (fraction) good = good && to.push('.');
    for (; fraction; fraction = fraction << 4 & ((uint64_t(1) << 52) - 1)) good = good && to.push("0123456789abcdef"[fraction >> 48]);
    char power[16];
    Line line(power, sizeof power);
    const int p = exponent ? exponent - 1023 : bits << 1 ? -1022 : 0;
    line.put(p < 0 ? "p" : "p+");
    line.put(p);
    return good && append(to, Text(power, line.count));
}

// Reads what append_hex wrote, and nothing that would have to be rounded.
bool parse_hex(Text text, double& value) {
    const uint64_t sign = starts_with(text, "-") ? uint64_t(1) << 63 : 0;
    size_t at = sign ? 1 : 0;
    const auto result = [&](uint64_t bits) { return value = bits_as<double>(sign | bits), true; };
    const Text unsigned_text(text.data + at, text.size - at);
    if (equal(unsigned_text, "inf")) return result(uint64_t(0x7ff) << 52);
    if (equal(unsigned_text, "nan")) return result(uint64_t(0xfff) << 51);
    const bool normal = starts_with(unsigned_text, "0x1");
    if (!normal && !starts_with(unsigned_text, "0x0")) return false;
    at += 3;
    uint64_t fraction = 0;
    if (at < text.size && text[at] == '.') {
        int shift = 48;
        for (++at; at < text.size && text[at] != 'p'; ++at, shift -= 4) {
            const char c = text[at];
            const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
            if (digit < 0 || shift < 0) return false;
            fraction |= static_cast<uint64_t>(digit) << shift;
        }
    }
    if (at + 2 >= text.size || text[at] != 'p' || (text[at + 1] != '+' && text[at + 1] != '-')) return false;
    const bool down = text[at + 1] == '-';
    int exponent = 0;
    for (at += 2; at < text.size; ++at) {
        if (text[at] < '0' || text[at] > '9' || exponent > 1023) return false;
        exponent = exponent * 10 + (text[at] - '0');
    }
    if (down) exponent = -exponent;
    if (normal) return exponent >= -1022 && exponent <= 1023 && result(static_cast<uint64_t>(exponent + 1023) << 52 | fraction);
    return exponent == (fraction ? -1022 : 0) && result(fraction);
}

template <class E>
struct Word {
    E value;
    const char* text;
};
// Of several words for one value the first is written.
constexpr Word<Activation> activation_words[] = {{Activation::gelu, "gelu"}, {Activation::gelu_tanh, "gelu_new"},
                                                 {Activation::relu, "relu"}, {Activation::gelu_tanh, "gelu_pytorch_tanh"},
                                                 {Activation::silu, "silu"}, {Activation::silu, "swish"}};
constexpr Word<Positions> position_words[] = {
    {Positions::learned, "absolute"}, {Positions::rotary, "rotary"}, {Positions::sinusoidal, "sinusoidal"}, {Positions::none, "none"}};
constexpr Word<Norm> norm_words[] = {{Norm::layer, "layer"}, {Norm::rms, "rms"}};
constexpr Word<Architecture> architecture_words[] = {{Architecture::gpt2, "gpt2"}, {Architecture::llama, "llama"}};
constexpr Word<Dtype> dtype_words[] = {{Dtype::f32, "float32"}, {Dtype::bf16, "bfloat16"}, {Dtype::int8, "int8"}};
constexpr Word<Optimizer> optimizer_words[] = {{Optimizer::adamw, "adamw"}, {Optimizer::muon, "muon"}};
constexpr Word<Schedule> schedule_words[] = {{Schedule::cosine, "cosine"},
                                             {Schedule::linear, "linear"},
                                             {Schedule::constant, "constant"},
                                             {Schedule::wsd, "wsd"},
                                             {Schedule::inverse_sqrt, "inverse_sqrt"}};

bool append_value(Array<char>& to, int64_t value) { return append_json(to, value); }
bool append_value(Array<char>& to, int value) { return append_json(to, static_cast<int64_t>(value)); }
bool append_value(Array<char>& to, uint64_t value) {
    char digits[24];
    Line line(digits, sizeof digits);
    line.put(value);
    return append(to, Text(digits, line.count));
}
bool append_value(Array<char>& to, bool value) { return append(to, value ? "true" : "false"); }
bool append_value(Array<char>& to, double value) { return to.push('"') && append_hex(to, value) && to.push('"'); }
bool append_value(Array<char>& to, Text value) { return append_json(to, value); }
template <class E, size_t N>
bool append_word(Array<char>& to, const Word<E> (&words)[N], E value) {
    for (const Word<E>& word : words)
        if (word.value == value) return append_json(to, Text(word.text));
    return append(to, "null");
}
bool append_value(Array<char>& to, Activation value) { return append_word(to, activation_words, value); }
bool append_value(Array<char>& to, Positions value) { return append_word(to, position_words, value); }
bool append_value(Array<char>& to, Norm value) { return append_word(to, norm_words, value); }
bool append_value(Array<char>& to, Architecture value) { return append_word(to, architecture_words, value); }
bool append_value(Array<char>& to, Dtype value) { return append_word(to, dtype_words, value); }
bool append_value(Array<char>& to, Optimizer value) { return append_word(to, optimizer_words, value); }
bool append_value(Array<char>& to, Schedule value) { return append_word(to, schedule_words, value); }

// The next member of the object that `to` ends in.
bool append_key(Array<char>& to, Text key) {
    return (to.count == 0 || to[to.count - 1] == '{' || to.push(',')) && append_json(to, key) && to.push(':');
}
template <class T>
bool append_member(Array<char>& to, Text key, const T& value) {
    return append_key(to, key) && append_value(to, value);
}

// The bytes between a string's quotes; escapes stay as they are, since no word of ours has one.
bool read_plain(Json& json, Text& text) {
    if (json.peek() != JsonType::string) return json.reject("expected a string");
    if (!json.skip(text)) return false;
    text = Text(text.data + 1, text.size - 2);
    return true;
}
bool read_value(Json& json, int64_t& value) { return json.integer(value); }
bool read_value(Json& json, int& value) {
    int64_t wide = 0;
    if (!json.integer(wide)) return false;
    value = static_cast<int>(wide);
    return (wide >= INT32_MIN && wide <= INT32_MAX) || json.reject("expected a whole number of at most 32 bits");
}
bool read_value(Json& json, uint64_t& value) {
    Text digits;
    if (json.peek() != JsonType::number || !json.skip(digits)) return json.reject("expected a whole number");
    value = 0;
    for (const char c : digits) {
        const uint64_t digit = static_cast<uint64_t>(c - '0');
        const bool good = c >= '0' && c <= '9' && value <= (UINT64_MAX - digit) / 10;
        if (!good) return json.reject("expected a whole number from 0, of at most 64 bits");
        value = value * 10 + digit;
    }
    return true;
}
bool read_value(Json& json, bool& value) { return json.boolean(value); }
bool read_value(Json& json, double& value) {
    Text text;
    if (json.peek() == JsonType::number) return json.number(value);
    return read_plain(json, text) && (parse_hex(text, value) || json.reject("expected a hexadecimal number such as \"0x1.8p+3\""));
}
template <class E, size_t N>
bool read_word(Json& json, const Word<E> (&words)[N], E& value, const char* otherwise) {
    Text text;
    if (!read_plain(json, text)) return false;
    for (const Word<E>& word : words)
        if (equal(text, Text(word.text))) return value = word.value, true;
    return json.reject(otherwise);
}
bool read_value(Json& json, Activation& value) { return read_word(json, activation_words, value, "this activation function is not known"); }
bool read_value(Json& json, Positions& value) {
    return read_word(json, position_words, value, "positions must be absolute, rotary, sinusoidal or none");
}
bool read_value(Json& json, Norm& value) { return read_word(json, norm_words, value, "norm must be layer or rms"); }
bool read_value(Json& json, Architecture& value) {
    return read_word(json, architecture_words, value, "the only model_type known are \"gpt2\" and \"llama\"");
}
bool read_value(Json& json, Dtype& value) { return read_word(json, dtype_words, value, "dtype must be float32, bfloat16 or int8"); }
bool read_value(Json& json, Optimizer& value) { return read_word(json, optimizer_words, value, "this optimizer is not known"); }
bool read_value(Json& json, Schedule& value) { return read_word(json, schedule_words, value, "this schedule is not known"); }

// ---- records: the fields of what we store, listed once for writing, reading and comparing ------------------------------

// f(key in the file, name in the program, member). The keys are those of Hugging Face's GPT-2 or Llama, and some of our own.
template <class F>
void each_field(const Config* c, const F& f) {
    const bool llama = c->architecture == Architecture::llama;
    const auto key = [&](const char* gpt2, const char* other) { return llama ? other : gpt2; };
    f("model_type", "architecture", &Config::architecture);
    f(key("n_layer", "num_hidden_layers"), "layers", &Config::layers);
    f(key("n_head", "num_attention_heads"), "heads", &Config::heads);
    f(key("n_embd", "hidden_size"), "width", &Config::width);
    f(key("n_positions", "max_position_embeddings"), "context", &Config::context);
    f("vocab_size", "vocab", &Config::vocab);
    f("tie_word_embeddings", "tied", &Config::tied);
    f(key("bias", "attention_bias"), "bias", &Config::bias);
    f(key("activation_function", "hidden_act"), "activation", &Config::activation);
    f("position_embedding_type", "positions", &Config::positions);
    f("dtype", "dtype", &Config::dtype);
    f(key("layer_norm_epsilon", "rms_norm_eps"), "norm_epsilon", &Config::norm_epsilon);
    f("num_key_value_heads", "kv_heads", &Config::kv_heads);
    f(key("n_inner", "intermediate_size"), "hidden", &Config::hidden);
    f("gated", "gated", &Config::gated);
    f("norm", "norm", &Config::norm);
    f("norm_after", "norm_after", &Config::norm_after);
    f("rope_theta", "rope_base", &Config::rope_base);
    f("encoder_layers", "encoder_layers", &Config::encoder_layers);
    f("causal", "causal", &Config::causal);
    f("classes", "classes", &Config::classes);
    f("pool_first", "pool_first", &Config::pool_first);
    f("features", "features", &Config::features);
    f("norm_last", "norm_last", &Config::norm_last);
    f("head_bias", "head_bias", &Config::head_bias);
}
template <class F>
void each_field(const TrainConfig*, const F& f) {
    const auto own = [&](const char* name, auto member) { f(name, name, member); };
    own("batch", &TrainConfig::batch);
    own("accumulate", &TrainConfig::accumulate);
    own("steps", &TrainConfig::steps);
    own("lr", &TrainConfig::lr);
    own("min_lr", &TrainConfig::min_lr);
    own("warmup", &TrainConfig::warmup);
    own("schedule", &TrainConfig::schedule);
    own("optimizer", &TrainConfig::optimizer);
    own("muon_lr", &TrainConfig::muon_lr);
    own("weight_decay", &TrainConfig::weight_decay);
    own("beta1", &TrainConfig::beta1);
    own("beta2", &TrainConfig::beta2);
    own("epsilon", &TrainConfig::epsilon);
    own("clip", &TrainConfig::clip);
    own("dropout", &TrainConfig::dropout);
    own("label_smoothing", &TrainConfig::label_smoothing);
    own("seed", &TrainConfig::seed);
    own("evaluate_every", &TrainConfig::evaluate_every);
    own("patience", &TrainConfig::patience);
}
// Where training stands. Random numbers and the order of the data are functions of the seed and the step: the step says where they are.
struct TrainingState {
    int64_t step_count, best_step, bad_evaluations;
    double best_validation_loss, best_accuracy;
    double loss_scale, loss_scale_steps;
    bool evaluation_due;
    uint64_t training_tokens, training_fingerprint, validation_tokens, validation_fingerprint;
};
template <class F>
void each_field(const TrainingState*, const F& f) {
    const auto own = [&](const char* name, auto member) { f(name, name, member); };
    own("step_count", &TrainingState::step_count);
    own("best_validation_loss", &TrainingState::best_validation_loss);
    own("best_step", &TrainingState::best_step);
    own("bad_evaluations", &TrainingState::bad_evaluations);
    own("training_tokens", &TrainingState::training_tokens);
    own("training_fingerprint", &TrainingState::training_fingerprint);
    own("validation_tokens", &TrainingState::validation_tokens);
    own("validation_fingerprint", &TrainingState::validation_fingerprint);
    own("best_accuracy", &TrainingState::best_accuracy);
    own("evaluation_due", &TrainingState::evaluation_due);
    own("loss_scale", &TrainingState::loss_scale);
    own("loss_scale_steps", &TrainingState::loss_scale_steps);
}

template <class Record>
bool append_fields(Array<char>& to, const Record& record) {
    bool good = true;
    each_field(&record, [&](const char* key, const char*, auto member) { good = good && append_member(to, key, record.*member); });
    return good;
}
// The member whose key was just read, if it is one of the record's. `seen`: a bit a field.
template <class Record>
bool read_field(Json& json, Record& record, uint64_t& seen) {
    uint64_t bit = 1;
    bool found = false;
    each_field(&record, [&](const char* key, const char*, auto member) {
        if (!found && json.key_is(key)) {
            found = true;
            if (seen & bit) json.reject("this key stands here twice");
            else read_value(json, record.*member);
            seen |= bit;
        }
        bit <<= 1;
    });
    return found;
}
template <size_t N>
bool is_one_of(const char* key, const char* const (&names)[N]) {
    for (const char* name : names)
        if (equal(Text(key), Text(name))) return true;
    return false;
}
// What GPT-2 does not have; where a GPT-2 model does not either, it is not written.
constexpr const char* beyond_gpt2[] = {"num_key_value_heads", "n_inner", "gated", "norm", "norm_after", "rope_theta"};
// The same of any decoder.
constexpr const char* beyond_decoders[] = {"encoder_layers", "causal", "classes", "pool_first", "features", "norm_last", "head_bias"};
// What files of the first kind, or other people's, may lack; it then has its default.
inline bool is_optional(const char* key) {
    static constexpr const char* names[] = {
        "position_embedding_type", "dtype",      "optimizer",          "muon_lr",      "model_type",    "tie_word_embeddings", "bias",
        "attention_bias",          "hidden_act", "layer_norm_epsilon", "rms_norm_eps", "best_accuracy", "evaluation_due",      "loss_scale",
        "loss_scale_steps"};
    return is_one_of(key, names) || is_one_of(key, beyond_gpt2) || is_one_of(key, beyond_decoders);
}
template <class Record>
Status all_seen(const Record& record, uint64_t seen, Text where) {
    uint64_t bit = 1;
    const char* missing = nullptr;
    each_field(&record, [&](const char* key, const char*, auto) {
        if (!missing && !(seen & bit) && !is_optional(key)) missing = key;
        bit <<= 1;
    });
    return missing ? fail(Error::bad_file, "'", where, "' lacks '", missing, "'") : Status();
}
template <class T>
bool append_shown(Array<char>& to, T value) {
    return append_value(to, value);
}
inline bool append_shown(Array<char>& to, double value) { return append_number(to, value); }

// "'M.resume.safetensors' was made with lr 0.001, but lr is 0.002"
BABYGPT_RARE inline Status differ(Text file, const char* name, Text was, Text is) {
    return fail(Error::mismatch, "'", file, "' was made with ", name, " ", was, ", but ", name, " is ", is);
}
template <class T>
BABYGPT_RARE Status must_agree(Runtime& runtime, Text file, const char* name, T stored, T ours) {
    if (stored == ours) return Status();
    Array<char> was(runtime), is(runtime);
    if (!append_shown(was, stored) || !append_shown(is, ours)) return out_of_memory(64);
    return differ(file, name, view(was), view(is));
}
template <class Record>
Status must_agree(Runtime& runtime, Text file, const Record& stored, const Record& ours) {
    Status status;
    each_field(&ours, [&](const char*, const char* name, auto member) {
        if (status.ok()) status = must_agree(runtime, file, name, stored.*member, ours.*member);
    });
    return status;
}

// ---- reading a header ------------------------------------------------------------------------------------------------

// Pieces put together for a message or a name; what does not fit is left out.
struct Words {
    char text[176];
    template <class... Parts>
    explicit Words(const Parts&... parts) {
        Line line(text, sizeof text);
        (line.put(parts), ...);
    }
    operator Text() const { return Text(text); }
};

enum class Stored : int32_t { f32, f16, bf16, int8, q8_0 };  // the last in GGUF only
constexpr Word<Stored> stored_words[] = {{Stored::f32, "F32"}, {Stored::f16, "F16"}, {Stored::bf16, "BF16"}, {Stored::int8, "I8"}};
inline Stored stored_as(Dtype dtype) { return dtype == Dtype::f32 ? Stored::f32 : dtype == Dtype::bf16 ? Stored::bf16 : Stored::int8; }
inline uint64_t stored_size(Stored type) {  // of a number; q8_0 has 34 bytes for 32 numbers
    return type == Stored::f32 ? 4 : type == Stored::int8 ? 1 : 2;
}

struct StoredTensor {
    Text name;
    Text shown;  // the shape as the header writes it
    Stored type;
    int dimensions;
    bool wanted;          // by the config
    int64_t shape[2];     // the first two
    uint64_t begin, end;  // in the data, which ...
    uint64_t data;        // ... begins at this byte of ...
    ByteSource* source;   // ... this file
    Status read(uint64_t at, void* to, uint64_t bytes) const { return source->read(data + at, to, bytes); }
};
struct StoredValue {  // of the metadata
    Text name;
    Text json;  // the string as it stands in the header, quotes and escapes included
};

// What a file holds, before any of its tensors is read.
struct Checkpoint {
    ByteSource& source;
    Array<char> header, names;
    Array<StoredValue> metadata;  // both sorted by name
    Array<StoredTensor> tensors;
    uint64_t data = 0;  // where the tensors' bytes begin
    Config config;
    char folder[128];  // its name, where the tensors lie in several files
    bool gguf = false;
    template <class... Parts>
    Status bad(const Parts&... parts) const {
        return fail(Error::bad_file, "'", source.name, "'", parts...);
    }
    Checkpoint(Runtime& runtime, ByteSource& from) : source(from), header(runtime), names(runtime), metadata(runtime), tensors(runtime) {}
};

inline bool before(Text a, Text b) {
    const int order = memcmp(a.data, b.data, least(a.size, b.size));
    return order < 0 || (order == 0 && a.size < b.size);
}

// Heap sort (Williams 1964): in place, and never slower than n log n.
template <class T, class Less>
void sort_items(Array<T>& items, const Less& less) {
    const auto sift = [&](size_t at, size_t count) {
        for (size_t child; (child = 2 * at + 1) < count; at = child) {
            if (child + 1 < count && less(items[child], items[child + 1])) ++child;
            if (!less(items[at], items[child])) return;
            const T moved = items[at];
            items[at] = items[child], items[child] = moved;
        }
    };
    for (size_t i = items.count / 2; i-- > 0;) sift(i, items.count);
    for (size_t n = items.count; n-- > 1;) {
        const T last = items[n];
        items[n] = items[0], items[0] = last;
        sift(0, n);
    }
}
// Sorts by name; gives a name that two have, or null.
template <class T>
const T* sort_by_name(Array<T>& items) {
    sort_items(items, [](const T& a, const T& b) { return before(a.name, b.name); });
    for (size_t i = 1; i < items.count; ++i)
        if (equal(items[i].name, items[i - 1].name)) return &items[i];
    return nullptr;
}
template <class T>
T* find_by_name(const Array<T>& items, Text name) {
    size_t low = 0, high = items.count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        before(items[middle].name, name) ? low = middle + 1 : high = middle;
    }
    return low < items.count && equal(items[low].name, name) ? &items[low] : nullptr;
}

// {"dtype": "F32", "shape": [96, 32], "data_offsets": [0, 12288]}; `elements` is the product of the shape.
bool read_tensor_entry(Json& json, StoredTensor& tensor, uint64_t& elements) {
    unsigned seen = 0;
    const auto once = [&](unsigned bit) {
        if (seen & bit) return json.reject("this key stands here twice");
        seen |= bit;
        return true;
    };
    elements = 1;
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("dtype")) once(1) && read_word(json, stored_words, tensor.type, "only the dtypes F32, F16, BF16 and I8 are read");
        else if (json.key_is("shape")) {
            const size_t start = (json.peek(), json.at);
            if (!once(2) || !json.enter_array()) continue;
            for (int64_t size = 0; json.next_item();) {
                size_t result;
                if (!json.integer(size)) break;
                if (size < 0 || !product(elements, size, result)) {
                    json.reject("a tensor of this shape does not fit into memory");
                    break;
                }
                elements = result;
                if (tensor.dimensions < 2) tensor.shape[tensor.dimensions] = size;
                ++tensor.dimensions;
            }
            tensor.shown = Text(json.text.data + start, json.at - start);
        } else if (json.key_is("data_offsets")) {
            if (!once(4)) continue;
            uint64_t* const offsets[] = {&tensor.begin, &tensor.end};
            size_t count = 0;
            for (json.enter_array(); json.next_item(); ++count)
                if (count == 2 ? !json.reject("expected two offsets") : !read_value(json, *offsets[count])) break;
            if (count < 2) json.reject("expected two offsets");
        } else json.reject("expected dtype, shape or data_offsets");
    }
    return seen == 7 || json.reject("expected dtype, shape and data_offsets");
}

constexpr uint64_t longest_header = 100000000;  // bytes, as the reference implementation has it

// Reads and checks the header by itself: afterwards every tensor has as many bytes as its shape says, and they lie inside the file.
Status read_header(Runtime& runtime, Checkpoint& c) {
    ByteSource& source = c.source;
    unsigned char bytes[8];
    if (source.size < 8) return c.bad(" is no checkpoint: it has only ", source.size, " bytes");
    BABYGPT_TRY(source.read(0, bytes, 8));
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | bytes[i];
    if (length > source.size - 8 || length > longest_header)
        return c.bad(" is no safetensors file, or was cut short: the header would have ", length, " bytes, the file has ", source.size);
    c.data = 8 + length;
    // Strings never grow when their escapes are resolved: `names` has room for all of them, and stays where it is.
    if (!c.header.resize(static_cast<size_t>(length)) || !c.names.reserve(static_cast<size_t>(length))) return out_of_memory(length);
    BABYGPT_TRY(source.read(8, c.header.items, length));
    const Text text = view(c.header);
    if (!starts_with(text, "{")) return c.bad(" is no safetensors file: its header does not begin with '{'");
    for (size_t at = 0, size; at < text.size; at += size)
        if (decode_utf8(text.data + at, text.end(), size) == not_utf8) return c.bad(": its header is not UTF-8 at byte ", at);

    Json json(runtime, text);
    bool has_metadata = false, memory = true;
    const auto keep = [&](const Array<char>& name) {
        const Text kept(c.names.items + c.names.count, name.count);
        memory = memory && c.names.append(name.items, name.count);
        return kept;
    };
    for (json.enter_object(); memory && json.next_key();) {
        if (json.key_is("__metadata__")) {
            if (has_metadata) json.reject("__metadata__ stands here twice");
            has_metadata = true;
            for (json.enter_object(); memory && json.next_key();) {
                StoredValue value{keep(json.key), Text()};
                if (json.peek() != JsonType::string) json.reject("expected a string, as all metadata are");
                else if (json.skip(value.json)) memory = memory && c.metadata.push(value);
            }
            continue;
        }
        StoredTensor tensor{};
        uint64_t elements;
        tensor.name = keep(json.key), tensor.data = c.data, tensor.source = &source;
        if (!read_tensor_entry(json, tensor, elements)) continue;
        size_t wanted;
        if (tensor.end < tensor.begin || !product(elements, stored_size(tensor.type), wanted) || tensor.end - tensor.begin != wanted)
            return c.bad(": the tensor '", Shown(tensor.name), "' has the shape ", Shown(tensor.shown), ", but lies from byte ",
                         tensor.begin, " to ", tensor.end);
        memory = memory && c.tensors.push(tensor);
    }
    if (!memory) return out_of_memory(length);
    BABYGPT_TRY(json.finish(Words("the header of ", source.name)));

    sort_items(c.tensors,
               [](const StoredTensor& a, const StoredTensor& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
    uint64_t end = 0;
    for (const StoredTensor& tensor : c.tensors) {
        if (tensor.begin != end)
            return c.bad(": the tensor '", Shown(tensor.name), "' begins at byte ", tensor.begin, ", but the one before it ends at ", end);
        end = tensor.end;
    }
    if (end != source.size - c.data)
        return c.bad(" was cut short or has something at its end: its tensors take ", end, " bytes, but it has ", source.size - c.data);
    const StoredTensor* tensor = sort_by_name(c.tensors);
    if (tensor) return c.bad(" has two tensors '", Shown(tensor->name), "'");
    const StoredValue* value = sort_by_name(c.metadata);
    if (value) return c.bad(" has two metadata '", Shown(value->name), "'");
    return Status();
}

// The text of one of the metadata; empty where there is none.
Status read_metadata(Runtime& runtime, const Checkpoint& c, Text name, Array<char>& text) {
    text = Array<char>(runtime);
    const StoredValue* value = find_by_name(c.metadata, name);
    if (!value) return Status();
    Json json(runtime, value->json);
    json.string(text);
    return json.finish(Words(name, " of ", c.source.name));
}

// ---- is it what its config says? ---------------------------------------------------------------------------------------

// A GPT-2 or Llama config of Hugging Face's. null is as good as no key. Keys that are not ours may be there, where they say nothing against it.
// `foreign`: of another program, where "dtype" is about the file.
BABYGPT_RARE Status parse_config(Runtime& runtime, Text text, Text where, Config& config, bool foreign = false) {
    for (Json json(runtime, text); json.enter_object();) {  // its architecture decides what the other keys are
        while (json.next_key()) json.key_is("model_type") ? read_value(json, config.architecture) : json.skip();
        BABYGPT_TRY(json.finish(where));
        break;
    }
    const bool llama = config.architecture == Architecture::llama;
    if (llama) {
        BABYGPT_TRY(preset_architecture("llama", config));
        config.norm_epsilon = 1e-6;
    }
    Json json(runtime, text);
    uint64_t seen = 0;
    int head_dim = 0;
    bool mlp_bias = false;
    const auto must_be = [&](bool wanted, const char* why) {
        bool value = wanted;
        if (json.boolean(value) && value != wanted) json.reject(why);
    };
    for (json.enter_object(); json.next_key();) {
        if (json.peek() == JsonType::null || (foreign && json.key_is("dtype"))) json.skip();
        else if (read_field(json, config, seen)) continue;
        else if (json.key_is("head_dim")) read_value(json, head_dim);
        else if (json.key_is("mlp_bias")) json.boolean(mlp_bias);
        else if (json.key_is("rope_scaling")) json.reject("rope_scaling is not supported");
        else if (json.key_is("rope_parameters")) {
            Text type("default");
            for (json.enter_object(); json.next_key();) {
                if (json.key_is("rope_theta")) json.number(config.rope_base);
                else if (json.key_is("rope_type")) read_plain(json, type);
                else json.skip();
            }
            if (!equal(type, "default")) json.reject("the only rope_type supported is \"default\"");
        } else if (json.key_is("scale_attn_weights")) must_be(true, "scale_attn_weights must be true");
        else if (json.key_is("scale_attn_by_inverse_layer_idx")) must_be(false, "scale_attn_by_inverse_layer_idx is not supported");
        else if (json.key_is("add_cross_attention")) must_be(false, "add_cross_attention is not supported");
        else json.skip();
    }
    BABYGPT_TRY(json.finish(where));
    BABYGPT_TRY(all_seen(config, seen, where));
    Status status = check(config);
    if (status.ok() && head_dim && int64_t(head_dim) * config.heads != config.width)
        status = fail(Error::unsupported, "head_dim is ", head_dim, ", but only hidden_size / num_attention_heads is supported");
    if (status.ok() && llama && mlp_bias != config.bias)
        status = fail(Error::unsupported, "mlp_bias and attention_bias differ, which is not supported");
    if (!status.ok()) return fail(Error::bad_file, "'", where, "': ", Text(status.message));
    if (config.hidden == 0) config.hidden = 4 * config.width;  // GPT-2's
    config = complete(config);
    return Status();
}

// The members of such a config. Numbers are decimals, as Python writes them.
bool append_config(Array<char>& to, const Config& config) {
    const bool llama = config.architecture == Architecture::llama;
    Config gpt2;
    gpt2.kv_heads = config.heads, gpt2.hidden = config.gated ? -1 : 4 * config.width;
    bool good = append(to, "\"architectures\":[") && append_value(to, Text(llama ? "LlamaForCausalLM" : "GPT2LMHeadModel")) && to.push(']');
    each_field(&config, [&](const char* key, const char*, auto member) {
        const bool may_lack = is_one_of(key, beyond_decoders) || (!llama && is_one_of(key, beyond_gpt2));
        if (!good || (may_lack && config.*member == gpt2.*member)) return;
        good = append_key(to, key) && append_shown(to, config.*member);
    });
    return good && (!llama || append_member(to, "mlp_bias", config.bias));
}

// The scales of a matrix that is stored in int8, as a tensor of their own.
inline Weight scales_of(const Weight& weight) {
    Weight scales{};
    Line name(scales.name, sizeof scales.name);
    name.put(Text(weight.name)), name.put("_scale");
    scales.rows = 1, scales.cols = weight.scaled_rows ? weight.rows : weight.cols;
    scales.is_vector = true;
    return scales;
}

// GGUF's name for a tensor: "blk.0.attn_q.weight" for "model.layers.0.self_attn.q_proj.weight".
BABYGPT_RARE Words gguf_name(Text name) {
    static constexpr const char* names[][2] = {{"wte", "token_embd"},
                                               {"wpe", "position_embd"},
                                               {"ln_1", "attn_norm"},
                                               {"attn.c_attn", "attn_qkv"},
                                               {"attn.c_proj", "attn_output"},
                                               {"ln_2", "ffn_norm"},
                                               {"mlp.c_fc", "ffn_up"},
                                               {"mlp.c_proj", "ffn_down"},
                                               {"ln_f", "output_norm"},
                                               {"lm_head", "output"},
                                               {"model.embed_tokens", "token_embd"},
                                               {"input_layernorm", "attn_norm"},
                                               {"self_attn.q_proj", "attn_q"},
                                               {"self_attn.k_proj", "attn_k"},
                                               {"self_attn.v_proj", "attn_v"},
                                               {"self_attn.o_proj", "attn_output"},
                                               {"post_attention_layernorm", "ffn_norm"},
                                               {"mlp.gate_proj", "ffn_gate"},
                                               {"mlp.up_proj", "ffn_up"},
                                               {"mlp.down_proj", "ffn_down"},
                                               {"model.norm", "output_norm"}};
    const Text kind(ends_with(name, ".bias") ? ".bias" : ".weight");
    Text stem(name.data, name.size - kind.size), layer;
    const Text prefixes[] = {"h.", "model.layers."};
    for (const Text& prefix : prefixes) {
        if (!starts_with(stem, prefix)) continue;
        const char* const start = stem.data + prefix.size;
        size_t digits = 0;
        while (start[digits] != '.') ++digits;
        layer = Text(start, digits + 1);
        stem = Text(layer.end(), static_cast<size_t>(stem.end() - layer.end()));
    }
    Text theirs = stem;
    for (const auto& pair : names)
        if (equal(stem, Text(pair[0]))) theirs = Text(pair[1]);
    return Words(layer.size ? Text("blk.") : Text(), layer, theirs, kind);
}
// GGUF's matrices all have a row for each output: GPT-2's lie on their side. And it turns queries and keys in pairs of neighbours, as llama2.c
// does: their rows, and biases, change places within a head, whose width this gives (0: they do not).
bool on_its_side(const Config& config, const Weight& weight) {
    return config.architecture == Architecture::gpt2 && !weight.is_vector && !weight.scaled_rows;
}
int turned_rows(const Config& config, Text name) {
    for (size_t i = 0; i + 8 <= name.size; ++i)
        if (equal(Text(name.data + i, 8), ".q_proj.") || equal(Text(name.data + i, 8), ".k_proj.")) return config.width / config.heads;
    return 0;
}

// Where a weight, or a moment of it, lies in the file: same name, same shape. And its scales, where it is int8.
Status find_tensor(const Checkpoint& c, Text prefix, const Weight& weight, const StoredTensor*& found, const StoredTensor** scales) {
    const Words name = c.gguf ? gguf_name(Text(weight.name)) : Words(prefix, Text(weight.name));
    const bool side = c.gguf && on_its_side(c.config, weight);
    const int64_t shape_rows = side ? weight.cols : weight.rows, shape_cols = side ? weight.rows : weight.cols;
    const Words rows(shape_rows, ", "), shape("[", weight.is_vector ? Text() : Text(rows), shape_cols, "]");
    StoredTensor* tensor = find_by_name(c.tensors, name);
    found = tensor;
    if (!tensor) return c.bad(" lacks the tensor '", Text(name), "' of shape ", Text(shape));
    tensor->wanted = true;
    const bool same = weight.is_vector ? tensor->dimensions == 1 && tensor->shape[0] == weight.cols
                                       : tensor->dimensions == 2 && tensor->shape[0] == shape_rows && tensor->shape[1] == shape_cols;
    if (!same) return c.bad(": the tensor '", Text(name), "' has the shape ", Shown(tensor->shown), ", but its config wants ", Text(shape));
    if (tensor->type == Stored::q8_0 && weight.is_vector)
        return c.bad(": the tensor '", Text(name), "' is Q8_0, which only a matrix may be");
    if (tensor->type != Stored::int8) return Status();
    if (weight.is_vector || prefix.size) return c.bad(": the tensor '", Text(name), "' is I8, which only a matrix of the weights may be");
    BABYGPT_TRY(find_tensor(c, prefix, scales_of(weight), *scales, nullptr));
    if ((*scales)->type == Stored::f32) return Status();
    return c.bad(": the tensor '", Text((*scales)->name), "' must be F32");
}

// A tensor for every weight of the config. No other tensors but the moments of a resume file.
Status match_tensors(Runtime& runtime, Checkpoint& c, bool moments) {
    // The tape knows the weights by name. A layer has six at least; so the tape is in proportion to the header.
    if (c.tensors.count / 6 < static_cast<size_t>(c.config.layers))
        return c.bad(" has ", c.tensors.count, " tensors, too few for the ", c.config.layers, " layers of its config");
    Tape tape(runtime);
    BABYGPT_TRY(record(tape, c.config, 0, false, 0));
    const StoredTensor *found, *scales;
    for (const Weight& weight : tape.names) {
        BABYGPT_TRY(find_tensor(c, "", weight, found, &scales));
        if (moments) BABYGPT_TRY(find_tensor(c, "moment1.", weight, found, &scales));
        if (moments) BABYGPT_TRY(find_tensor(c, "moment2.", weight, found, &scales));
    }
    for (const StoredTensor& tensor : c.tensors) {
        const bool moment = starts_with(tensor.name, "moment1.") || starts_with(tensor.name, "moment2.");
        if (!tensor.wanted && (moments || !moment))
            return c.bad(" has a tensor '", Shown(tensor.name), "' of shape ", Shown(tensor.shown), ", which its config does not know");
    }
    return Status();
}

// Header, version, config and tensors.
Status open_checkpoint(Runtime& runtime, Checkpoint& c, bool moments) {
    BABYGPT_TRY(read_header(runtime, c));
    const Text name = c.source.name;
    Array<char> version(runtime), text(runtime);
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.format_version", version));
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.config", text));
    if (find_by_name(c.metadata, "babygpt.adapter"))
        return fail(Error::unsupported, "'", name, "' is an adapter: load the model that it stands beside");
    const char* missing = version.count == 0 ? "babygpt.format_version" : text.count == 0 ? "babygpt.config" : nullptr;
    if (missing)
        return fail(Error::unsupported, "'", name, "' is a safetensors file, but not one of babygpt: its metadata lack '", missing,
                    "'; of Hugging Face's models, name the folder");
    const Words known(BABYGPT_FORMAT_VERSION);
    if (!equal(view(version), known))
        return fail(Error::unsupported, "'", name, "' has the format version ", Shown(view(version)), ", but this program knows only ",
                    Text(known));
    BABYGPT_TRY(parse_config(runtime, view(text), Words("babygpt.config of ", name), c.config));
    return match_tensors(runtime, c, moments);
}

// ---- reading tensors -------------------------------------------------------------------------------------------------

BABYGPT_UNHURRIED_END
BABYGPT_INLINE float float_from(Stored type, uint16_t half) {
    if (type == Stored::bf16) return bits_as<float>(static_cast<uint32_t>(half) << 16);
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest < 0x400) return bits_as<float>(bits_as<uint32_t>(static_cast<float>(rest) * 0x1p-24f) | sign);  // zero or subnormal
    const uint32_t more_exponent = rest < 0x7c00 ? 112u << 23 : 224u << 23;  // infinity and NaN keep theirs full
    return bits_as<float>(sign | ((rest << 13) + more_exponent));
}
// A row of numbers as floats. int8: times a scale for each number, or, `one`, for all; the magnitudes of each number, or of all, are or-ed to
// what is there.
BABYGPT_LOOPS void widen(float* BABYGPT_ALONE to, const uint16_t* from, int64_t n, Stored type) {
    if (type == Stored::bf16)
        for (int64_t i = 0; i < n; ++i) to[i] = float_from(Stored::bf16, from[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = float_from(Stored::f16, from[i]);
}
BABYGPT_LOOPS void widen(float* BABYGPT_ALONE to, const signed char* from, int64_t n, const float* scale,
                         unsigned char* BABYGPT_ALONE magnitudes, bool one) {
    if (one) {
        const float by = *scale;
        unsigned all = *magnitudes;
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]) * by;
        for (int64_t i = 0; i < n; ++i) all |= static_cast<unsigned char>(from[i] < 0 ? -from[i] : from[i]);
        *magnitudes = static_cast<unsigned char>(all);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]) * scale[i];
        for (int64_t i = 0; i < n; ++i) magnitudes[i] |= static_cast<unsigned char>(from[i] < 0 ? -from[i] : from[i]);
    }
}
BABYGPT_UNHURRIED_BEGIN

// Reads a tensor in pieces of whole rows, and lets threads turn them into floats: f(thread, row, its bytes). (A new block's pages are made
// when they are first written to, which takes as long as the reading: so threads share that too.)
constexpr int reading_threads = 16;
template <class F>
Status read_rows(Runtime& runtime, const StoredTensor& tensor, int64_t rows, const F& f) {
    const int64_t row_bytes = static_cast<int64_t>(tensor.end - tensor.begin) / rows;
    const int64_t some = least(most(int64_t(1), (int64_t(1) << 20) / row_bytes), rows),
                  threads = least(runtime.thread_count(), reading_threads);
    Array<char> piece(runtime);
    if (!piece.resize(static_cast<size_t>(some * row_bytes))) return out_of_memory(static_cast<uint64_t>(some * row_bytes));
    for (int64_t row = 0; row < rows; row += some) {
        const int64_t count = least(some, rows - row);
        BABYGPT_TRY(
            tensor.read(tensor.begin + static_cast<uint64_t>(row * row_bytes), piece.items, static_cast<uint64_t>(count * row_bytes)));
        parallel(runtime, static_cast<int>(threads), [&](int thread) {
            for (int64_t i = thread * count / threads; i < (thread + 1) * count / threads; ++i)
                f(thread, row + i, piece.items + i * row_bytes);
        });
    }
    return Status();
}

// A matrix in int8. as_converted becomes false where the scales are not what Model::convert makes of the numbers.
Status read_int8(Runtime& runtime, const Weight& weight, const StoredTensor& tensor, const StoredTensor& scales, float* to,
                 bool& as_converted) {
    Array<float> scale(runtime);
    Array<unsigned char> seen(runtime);  // for each thread and feature: all magnitudes, or-ed, whose highest bit is that of the largest
    const size_t features = static_cast<size_t>(scales_of(weight).cols);
    if (!scale.resize(features) || !seen.resize(reading_threads * features)) return out_of_memory(reading_threads * features);
    BABYGPT_TRY(scales.read(scales.begin, scale.items, scales.end - scales.begin));
    BABYGPT_TRY(read_rows(runtime, tensor, weight.rows, [&](int thread, int64_t row, const char* bytes) {
        unsigned char* mine = seen.items + static_cast<size_t>(thread) * features;
        const int64_t feature = weight.scaled_rows ? row : 0;
        widen(to + row * weight.cols, reinterpret_cast<const signed char*>(bytes), weight.cols, scale.items + feature, mine + feature,
              weight.scaled_rows);
    }));
    for (size_t i = 0; i < features; ++i) {
        int magnitude = 0;
        for (size_t thread = 0; thread < reading_threads; ++thread) magnitude |= seen[thread * features + i];
        as_converted = as_converted && magnitude < 128 && scale[i] == int8_scale(static_cast<float>(magnitude) * scale[i]);
    }
    return Status();
}

// Llama2.c and GGUF turn queries and keys in pairs of neighbours, we in pairs half a head apart: rows change places within a head, `dim` of
// them (0: they do not). Row number `row` of theirs among ours.
inline int64_t row_among_ours(int64_t row, int dim) { return dim ? row / dim * dim + row % dim % 2 * (dim / 2) + row % dim / 2 : row; }

// Number i of a row as it is stored.
inline float stored_number(Stored type, const char* row, int64_t i) {
    float value;
    uint16_t half;
    if (type == Stored::f32) return memcpy(&value, row + 4 * i, sizeof value), value;
    if (type != Stored::q8_0) return memcpy(&half, row + 2 * i, sizeof half), float_from(type, half);
    const char* const block = row + i / 32 * 34;  // a scale in f16, then 32 whole numbers
    memcpy(&half, block, sizeof half);
    return static_cast<float>(static_cast<signed char>(block[2 + i % 32])) * float_from(Stored::f16, half);
}
// A matrix of GGUF.
Status read_gguf_tensor(Runtime& runtime, const Config& config, const Weight& weight, const StoredTensor& tensor, float* to) {
    const bool side = on_its_side(config, weight);
    const int dim = turned_rows(config, Text(weight.name));
    const int64_t across = side ? weight.cols : 1;  // from one number of a row of the file to the next
    const bool vector = weight.is_vector;           // then each number is a row
    const int64_t rows = vector || side ? weight.cols : weight.rows, cols = vector ? 1 : side ? weight.rows : weight.cols;
    return read_rows(runtime, tensor, rows, [&](int, int64_t row, const char* bytes) {
        float* out = to + (side ? row : row_among_ours(row, dim) * cols);
        for (int64_t i = 0; i < cols; ++i, out += across) *out = stored_number(tensor.type, bytes, i);
    });
}

// A weight, or a moment of it. as_converted: whether Model::convert would change nothing.
Status read_tensor(Runtime& runtime, const Checkpoint& c, Text prefix, const Weight& weight, float* to, bool& as_converted) {
    const StoredTensor *tensor, *scales;
    BABYGPT_TRY(find_tensor(c, prefix, weight, tensor, &scales));
    as_converted = weight.is_vector || c.config.dtype == Dtype::f32 || tensor->type == stored_as(c.config.dtype);
    if (c.gguf) return read_gguf_tensor(runtime, c.config, weight, *tensor, to);
    if (tensor->type == Stored::int8) return read_int8(runtime, weight, *tensor, *scales, to, as_converted);
    if (tensor->type == Stored::f32) return tensor->read(tensor->begin, to, tensor->end - tensor->begin);
    return read_rows(runtime, *tensor, weight.rows, [&](int, int64_t row, const char* bytes) {
        widen(to + row * weight.cols, reinterpret_cast<const uint16_t*>(bytes), weight.cols, tensor->type);
    });
}
// All of them, each to its place in the block.
Status read_tensors(Runtime& runtime, const Checkpoint& c, Text prefix, Span<const Weight> names, float* block) {
    bool as_converted;
    for (const Weight& weight : names) BABYGPT_TRY(read_tensor(runtime, c, prefix, weight, block + weight.offset, as_converted));
    return Status();
}

// Where the weights of a model that is loaded go, one after the other: place() says where weight number i shall be put, keep() is called when
// it is there. To run only: what the backend reads as packed copies is packed, and never there as a whole.
struct Filling {
    Runtime& runtime;
    Model& model;
    const BackendFunctions* backend = nullptr;  // of a model that only runs
    Tape tape;
    Block piece;  // a matrix on its way to its packed copies
    Filling(Runtime& from, Model& of) : runtime(from), model(of), tape(from) {}

    Status begin(const Config& config, Purpose purpose) {
        start_pool(runtime);
        const bool whole = purpose == Purpose::training || (find_device(runtime) && runs_on_device(config));  // a device copies it
        if (whole) return allocate_weights(runtime, model, config, false);
        BABYGPT_TRY(backend_for(runtime, backend));
        BABYGPT_TRY(allocate_weights(runtime, model, config, false, backend));
        BABYGPT_TRY(record(tape, config, 0, false, 0));
        tape.dtype = config.dtype;
        uint64_t largest = 0;
        for (size_t i = 0; i < tape.weights.count; ++i)
            if (!is_read(tape, *backend, static_cast<int>(i)))
                largest = most(largest, static_cast<uint64_t>(tape.weights[i].weight.rows * tape.weights[i].weight.cols));
        return largest == 0 || piece.take(runtime, largest * sizeof(float), false) ? Status() : out_of_memory(largest * sizeof(float));
    }
    float* place(size_t i) const {
        if (backend && !is_read(tape, *backend, static_cast<int>(i))) return reinterpret_cast<float*>(piece.memory);
        return block_of(model) + model.state->plans[i].weight.offset;
    }
    void keep(size_t i) const {
        float* to = model.state->packed[0].floats.items;
        for (const Op& op : tape.ops) {  // none where the model is whole
            const int64_t size = backend->packed(tape, op);
            if (size > 0 && op.w == static_cast<int>(i)) backend->pack(runtime, tape, op, place(i), to);
            to += size;
        }
    }
};

// Gives a model all of its weights.
Status read_weights(Runtime& runtime, const Checkpoint& c, Purpose purpose, Model& model) {
    Filling filling(runtime, model);
    BABYGPT_TRY(filling.begin(c.config, purpose));
    Array<float> scales(runtime);
    const Weight* name = model.names.data;
    for (size_t i = 0; i < model.state->plans.count; ++i) {
        const Weight& whole = model.state->plans[i].weight;
        for (int64_t at = 0; at < whole.rows * whole.cols; at += name->rows * name->cols, ++name) {
            float* const to = filling.place(i) + at;
            bool as_converted;
            BABYGPT_TRY(read_tensor(runtime, c, "", *name, to, as_converted));
            if (as_converted) continue;
            Status status = must_be_finite(*name, to);
            if (status.ok()) status = round_weight(*name, to, c.config.dtype, scales);
            if (!status.ok()) return c.bad(": ", Text(status.message));
        }
        filling.keep(i);
    }
    return Status();
}

Status read_chat(Runtime& runtime, const Checkpoint& c, Chat& chat) {
    Array<char> text(runtime);
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.chat", text));
    chat.user_turn = Array<char>(runtime);
    chat.reply_turn = Array<char>(runtime);
    if (text.count == 0) return Status();
    Json json(runtime, view(text));
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("user_turn")) json.string(chat.user_turn);
        else if (json.key_is("reply_turn")) json.string(chat.reply_turn);
        else if (json.key_is("plain_words")) json.boolean(chat.plain_words);
        else json.skip();
    }
    return json.finish(Words("babygpt.chat of ", c.source.name));
}

// ---- other people's models -------------------------------------------------------------------------------------------

// llama2.c's first format: seven numbers of 32 bits, then floats: the tensors below, each of all layers, in this order. Its queries and keys
// are turned in pairs of neighbours, ours in pairs half a head apart: their rows change places.
struct Llama2c {
    int32_t width, hidden, layers, heads, kv_heads, vocab, context;  // vocab below 0: the head is not the embedding's matrix
    static constexpr uint64_t start = 7 * sizeof(int32_t);
    uint64_t table_floats() const {  // cosines and sines, which no program reads any more
        return static_cast<uint64_t>(context) * static_cast<uint64_t>(width / heads / 2 * 2);
    }
    // f(weight, dim): rows of its matrices change places within `dim` rows, 0: they do not. Between the last two, skip(floats).
    template <class F, class G>
    Status each(const Model& model, const F& f, const G& skip) const {
        const int dim = width / heads;
        const auto one = [&](int layer, const char* name, int turned) {
            const Words whole("model.layers.", layer, ".", name, ".weight");
            const Weight* weight = model.find(layer < 0 ? Text(name) : Text(whole));
            return weight ? f(*weight, turned) : fail(Error::unsupported, "the model has no tensor '", Text(name), "'");
        };
        static constexpr const char* names[] = {"input_layernorm",  "self_attn.q_proj", "self_attn.k_proj",
                                                "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
                                                "mlp.gate_proj",    "mlp.down_proj",    "mlp.up_proj"};
        BABYGPT_TRY(one(-1, "model.embed_tokens.weight", 0));
        for (size_t i = 0; i < 9; ++i)
            for (int layer = 0; layer < layers; ++layer) BABYGPT_TRY(one(layer, names[i], i == 1 || i == 2 ? dim : 0));
        BABYGPT_TRY(one(-1, "model.norm.weight", 0));
        BABYGPT_TRY(skip(table_floats()));
        return vocab > 0 ? Status() : one(-1, "lm_head.weight", 0);
    }
};

// Whether these bytes are such a file: the numbers make sense and the size is theirs exactly.
Status is_llama2c(ByteSource& source, Llama2c& header, Config& config, bool& is) {
    is = false;
    if (source.size < Llama2c::start) return Status();
    BABYGPT_TRY(source.read(0, &header, Llama2c::start));
    BABYGPT_TRY(preset_architecture("llama", config));
    const Llama2c& h = header;
    if (h.vocab == INT32_MIN) return Status();
    config.width = h.width, config.hidden = h.hidden, config.layers = h.layers, config.heads = h.heads, config.kv_heads = h.kv_heads;
    config.vocab = h.vocab < 0 ? -h.vocab : h.vocab, config.context = h.context, config.tied = h.vocab > 0;
    if (h.hidden < 1 || h.kv_heads < 1 || !check(config).ok()) return Status();
    const uint64_t width = static_cast<uint64_t>(h.width),
                   kv_width = width / static_cast<uint64_t>(h.heads) * static_cast<uint64_t>(h.kv_heads);
    const uint64_t layer = 2 * width + 2 * width * width + 2 * width * kv_width + 3 * width * static_cast<uint64_t>(h.hidden);
    const uint64_t matrices = static_cast<uint64_t>(config.vocab) * width * (config.tied ? 1 : 2);
    const uint64_t floats = static_cast<uint64_t>(h.layers) * layer + matrices + width + h.table_floats();
    is = source.size == Llama2c::start + floats * sizeof(float);
    return Status();
}

BABYGPT_RARE Status load_llama2c(Runtime& runtime, ByteSource& source, const Llama2c& header, const Config& config, Purpose purpose,
                                 Model& result) {
    Model model;
    BABYGPT_TRY(allocate_weights(runtime, model, config, false));
    uint64_t at = Llama2c::start;
    BABYGPT_TRY(header.each(
        model,
        [&](const Weight& weight, int dim) {
            const uint64_t bytes = static_cast<uint64_t>(weight.cols) * sizeof(float);
            Status status;
            for (int64_t row = 0; row < weight.rows && status.ok(); ++row, at += bytes)
                status = source.read(at, model.weights + weight.offset + row_among_ours(row, dim) * weight.cols, bytes);
            return status;
        },
        [&](uint64_t floats) { return at += floats * sizeof(float), Status(); }));
    if (purpose == Purpose::training) return result = static_cast<Model&&>(model), Status();
    Model running;  // what is one product lies in several places of the file, so only now
    Filling filling(runtime, running);
    BABYGPT_TRY(filling.begin(config, purpose));
    for (size_t i = 0; i < model.state->plans.count; ++i) {
        const Weight& weight = model.state->plans[i].weight;
        memcpy(filling.place(i), model.weights + weight.offset, static_cast<size_t>(weight.rows * weight.cols) * sizeof(float));
        filling.keep(i);
    }
    result = static_cast<Model&&>(running);
    return Status();
}

// One file of a model that is stored in several.
struct Shard {
    File file;
    ByteSource source;
    Checkpoint checkpoint;
    Shard* next = nullptr;
    explicit Shard(Runtime& runtime) : file(runtime), source(file), checkpoint(runtime, source) {}
};
struct Shards {
    Runtime& runtime;
    Shard* first = nullptr;
    explicit Shards(Runtime& from) : runtime(from) {}
    Shards(const Shards&) = delete;
    Shards& operator=(const Shards&) = delete;
    ~Shards() {
        while (first) {
            Shard* const next = first->next;
            destroy(runtime, first);
            first = next;
        }
    }
    Status open(Text path) {
        Shard* const shard = create<Shard>(runtime, runtime);
        if (!shard) return out_of_memory(sizeof(Shard));
        shard->next = first, first = shard;
        BABYGPT_TRY(shard->source.open(path));
        return read_header(runtime, shard->checkpoint);
    }
};

// The files that an index names, each once: {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors", ...}}.
Status open_shards(Runtime& runtime, Text folder, Text index, Shards& shards) {
    Array<char> text(runtime);
    BABYGPT_TRY(read_file(runtime, index, text));
    const Words where("model.safetensors.index.json of ", folder);
    Array<StoredValue> files(runtime);
    Json json(runtime, view(text));
    for (json.enter_object(); json.next_key();) {
        if (!json.key_is("weight_map")) {
            json.skip();
            continue;
        }
        for (json.enter_object(); json.next_key();) {
            StoredValue file{};
            if (!read_plain(json, file.name)) break;
            for (const char c : file.name)
                if (c == '/' || c == '\\' || c == ':') json.reject("expected the name of a file in the same folder");
            if (file.name.size == 0 || file.name.size > 200) json.reject("expected the name of a file in the same folder");
            if (files.count && equal(files[files.count - 1].name, file.name)) continue;
            if (!files.push(file)) return out_of_memory(files.count * sizeof file);
        }
    }
    BABYGPT_TRY(json.finish(where));
    (void)sort_by_name(files);
    for (size_t i = 0; i < files.count; ++i) {
        if (i && equal(files[i].name, files[i - 1].name)) continue;
        const Words slash("/", files[i].name);
        const Path path(folder, slash);
        if (!path.fits) return fail(Error::cannot_open, "the path of '", Text(slash), "' is too long");
        BABYGPT_TRY(shards.open(Text(path.text)));
    }
    return files.count ? Status() : fail(Error::bad_file, "'", Text(where), "' names no file");
}

// What such a file may hold beside the weights: masks and angles that follow from the config, and a tied head once more.
bool is_idle(const Config& config, Text name) {
    return ends_with(name, ".attn.bias") || ends_with(name, ".attn.masked_bias") || ends_with(name, ".rotary_emb.inv_freq") ||
           (config.tied && equal(name, Text("lm_head.weight")));
}

// config: of folder/config.json
BABYGPT_RARE Status load_huggingface(Runtime& runtime, Text folder, Text config, Purpose purpose, Model& result) {
    Shards shards(runtime);
    ByteSource whole{Text()};
    Checkpoint c(runtime, whole);
    Line(c.folder, sizeof c.folder).put(Shown(folder));
    whole.name = Text(c.folder);
    BABYGPT_TRY(parse_config(runtime, config, Words("config.json of ", folder), c.config, true));
    const Path single(folder, "/model.safetensors"), index(folder, "/model.safetensors.index.json");
    if (!index.fits) return fail(Error::cannot_open, "the path of the folder is too long");
    Status status = shards.open(Text(single.text));
    if (status.error == Error::cannot_open) {
        status = open_shards(runtime, folder, Text(index.text), shards);
        if (status.error == Error::cannot_open)
            return fail(Error::cannot_open, "'", whole.name,
                        "' has no model.safetensors that can be opened, in one piece or several: ", Text(status.message));
    }
    BABYGPT_TRY(status);
    for (const Shard* shard = shards.first; shard; shard = shard->next)
        for (StoredTensor tensor : shard->checkpoint.tensors) {
            const Text prefix("transformer.");
            if (c.config.architecture == Architecture::gpt2 && starts_with(tensor.name, prefix))
                tensor.name = Text(tensor.name.data + prefix.size, tensor.name.size - prefix.size);
            if (!is_idle(c.config, tensor.name) && !c.tensors.push(tensor)) return out_of_memory(c.tensors.count * sizeof tensor);
        }
    const StoredTensor* twice = sort_by_name(c.tensors);
    if (twice) return c.bad(" has two tensors '", Shown(twice->name), "'");
    BABYGPT_TRY(match_tensors(runtime, c, false));
    Model model;
    status = model.tokenizer.load(runtime, folder);
    if (status.error != Error::cannot_open) BABYGPT_TRY(status);  // there need not be one
    if (model.tokenizer.vocab > c.config.vocab)
        return c.bad(": its tokenizer has ", model.tokenizer.vocab, " ids, but vocab_size is ", c.config.vocab);
    BABYGPT_TRY(read_weights(runtime, c, purpose, model));
    result = static_cast<Model&&>(model);
    return Status();
}

// ---- GGUF ------------------------------------------------------------------------------------------------------------

// The list of tensors, and where their bytes are.
BABYGPT_RARE Status read_gguf_tensors(Gguf& g, Checkpoint& c) {
    static const char* const types[] = {"F32",     "F16",    "Q4_0",    "Q4_1",  "type 4", "type 5", "Q5_0",  "Q5_1",
                                        "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",   "Q6_K",  "Q8_K",
                                        "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",  "IQ2_S", "IQ4_XS",
                                        "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M",  "BF16"};
    double alignment = 32;
    BABYGPT_TRY(g.read("general.alignment", alignment));
    const uint64_t step = alignment >= 1 && alignment <= 65536 ? static_cast<uint64_t>(alignment) : 0;
    if (step == 0 || (step & (step - 1)) != 0) return c.bad(": general.alignment is no power of two up to 65536");
    const auto aligned = [&](uint64_t place) { return (place + step - 1) / step * step; };
    const size_t start = g.at;
    uint64_t end = 0;
    for (int pass = 0; pass < 2; ++pass) {  // the first only brings all into memory, where it then stays
        g.at = start;
        for (uint64_t i = 0; i < g.tensors; ++i) {
            StoredTensor tensor{};
            size_t name, size;
            uint64_t dimensions, sizes[4] = {1, 1, 1, 1}, type, elements = 1;
            BABYGPT_TRY(g.string(name, size));
            BABYGPT_TRY(g.number(4, dimensions));
            tensor.name = Text(g.bytes.items + name, size);
            if (dimensions < 1 || dimensions > 4) return c.bad(": the tensor '", Shown(tensor.name), "' has ", dimensions, " dimensions");
            for (uint64_t k = 0; k < dimensions; ++k) BABYGPT_TRY(g.number(8, sizes[k]));
            BABYGPT_TRY(g.number(4, type));
            BABYGPT_TRY(g.number(8, tensor.begin));
            if (pass == 0) continue;
            tensor.type = type == 0 ? Stored::f32 : type == 1 ? Stored::f16 : type == 8 ? Stored::q8_0 : Stored::bf16;
            if (type > 1 && type != 8 && type != 30)
                return fail(Error::unsupported, "'", c.source.name, "': the tensor '", Shown(tensor.name), "' is ",
                            Text(type < 31 ? types[type] : "of an unknown type"), ", but only F32, F16, BF16 and Q8_0 are read");
            for (const uint64_t many : sizes) {
                size_t result;
                if (many > INT64_MAX || !product(elements, many, result))
                    return c.bad(": the tensor '", Shown(tensor.name), "' does not fit into memory");
                elements = result;
            }
            tensor.dimensions = static_cast<int>(dimensions);
            tensor.shape[0] = static_cast<int64_t>(sizes[dimensions > 1]), tensor.shape[1] = static_cast<int64_t>(sizes[0]);
            const Words shape("[", static_cast<int64_t>(sizes[1]), ", ", static_cast<int64_t>(sizes[0]), "]"), length("[", sizes[0], "]");
            const Text shown = dimensions == 1 ? Text(length) : dimensions == 2 ? Text(shape) : Text("of more than two dimensions");
            const size_t shown_at = c.names.count;
            if (!append(c.names, shown)) return out_of_memory(c.names.count);
            tensor.shown = Text(c.names.items + shown_at, shown.size);
            const bool blocks = tensor.type == Stored::q8_0;
            size_t bytes;
            if ((blocks && sizes[0] % 32 != 0) ||
                !product(blocks ? elements / 32 : elements, blocks ? 34 : stored_size(tensor.type), bytes) ||
                tensor.begin != aligned(end) || bytes > g.source.size)
                return c.bad(": the tensor '", Shown(tensor.name), "' of shape ", Shown(shown), " cannot begin at byte ", tensor.begin,
                             " of the tensors, after byte ", end);
            tensor.end = end = tensor.begin + bytes;
            tensor.source = &g.source;
            if (!c.tensors.push(tensor)) return out_of_memory(c.tensors.count * sizeof tensor);
        }
        if (pass == 0 && !c.names.reserve(static_cast<size_t>(g.tensors) * 48)) return out_of_memory(g.tensors * 48);
    }
    c.data = aligned(g.at);
    for (StoredTensor& tensor : c.tensors) tensor.data = c.data;
    if (c.data > g.source.size || end > g.source.size - c.data || g.source.size - c.data > aligned(end))
        return c.bad(" was cut short or has something at its end: its tensors end at byte ", c.data + end, ", but it has ", g.source.size);
    const StoredTensor* twice = sort_by_name(c.tensors);
    return twice ? c.bad(" has two tensors '", Shown(twice->name), "'") : Status();
}

// A number that was a double before it became a float: of the decimals that round to this float the shortest.
BABYGPT_RARE double shortest_decimal(double number) {
    double ten = 1;
    for (int places = 0; places < 40; ++places, ten *= 10) {
        if (!(number > 0 && number * ten < 1e15)) break;
        const double decimal = decimal_to_double(static_cast<uint64_t>(number * ten + 0.5), -places);
        if (static_cast<float>(decimal) == static_cast<float>(number)) return decimal;
    }
    return number;
}

BABYGPT_RARE Status read_gguf_config(const Gguf& g, const Checkpoint& c, Config& config) {
    const Text name = g.text("general.architecture");
    if (!equal(name, "gpt2") && !equal(name, "llama"))
        return g.unsupported("only GGUF's architectures gpt2 and llama are known, but this is ", name);
    BABYGPT_TRY(preset_architecture(name, config));
    const bool llama = config.architecture == Architecture::llama;
    struct Number {
        const char* key;
        int Config::*to;
    };
    static constexpr Number numbers[] = {{"block_count", &Config::layers},         {"embedding_length", &Config::width},
                                         {"context_length", &Config::context},     {"feed_forward_length", &Config::hidden},
                                         {"attention.head_count", &Config::heads}, {"attention.head_count_kv", &Config::kv_heads}};
    for (const Number& number : numbers) {
        double value = number.to == &Config::kv_heads ? 0 : -1;
        const Words key(name, ".", number.key);
        BABYGPT_TRY(g.read(key, value));
        if (!(value >= 0 && value <= INT32_MAX && value == static_cast<int>(value)))
            return c.bad(" lacks the key '", Text(key), "', or it is out of range");
        config.*number.to = static_cast<int>(value);
    }
    config.norm_epsilon = -1;
    BABYGPT_TRY(g.read(Words(name, llama ? ".attention.layer_norm_rms_epsilon" : ".attention.layer_norm_epsilon"), config.norm_epsilon));
    if (llama) BABYGPT_TRY(g.read(Words(name, ".rope.freq_base"), config.rope_base));
    config.norm_epsilon = shortest_decimal(config.norm_epsilon), config.rope_base = shortest_decimal(config.rope_base);
    const StoredTensor* embedding = find_by_name(c.tensors, "token_embd.weight");
    if (!embedding) return c.bad(" lacks the tensor 'token_embd.weight'");
    config.vocab = static_cast<int>(least(embedding->shape[0], int64_t(INT32_MAX)));
    config.tied = !find_by_name(c.tensors, "output.weight");
    config.bias = !llama || find_by_name(c.tensors, "blk.0.attn_q.bias");
    const Status status = check(config);
    if (!status.ok()) return c.bad(": ", Text(status.message));
    const double dim = config.width / config.heads;
    const struct {
        const char* key;
        double value;
    } fixed[] = {{"rope.dimension_count", dim}, {"attention.key_length", dim}, {"attention.value_length", dim},
                 {"attention.causal", 1},       {"rope.scaling.factor", 1},    {"rope.scale_linear", 1},
                 {"expert_count", 0},           {"use_parallel_residual", 0}};
    for (const auto& must : fixed) {
        double value = must.value;
        const Words key(name, ".", must.key);
        BABYGPT_TRY(g.read(key, value));
        if (value != must.value)
            return fail(Error::unsupported, "'", g.source.name, "': ", Text(key), " is ", value, ", but only ", must.value,
                        " is supported");
    }
    const Text scaling = g.text(Words(name, ".rope.scaling.type"));
    return scaling.size == 0 || equal(scaling, "none") ? Status() : g.unsupported("rope.scaling.type is not supported: ", scaling);
}

BABYGPT_RARE Status load_gguf(Runtime& runtime, ByteSource& source, Purpose purpose, Model& result) {
    Gguf g(runtime, source);
    Checkpoint c(runtime, source);
    c.gguf = true;
    BABYGPT_TRY(g.open());
    if (g.tensors == 0) return c.bad(" is a GGUF file without tensors: a tokenizer, but no model");
    BABYGPT_TRY(read_gguf_tensors(g, c));
    BABYGPT_TRY(read_gguf_config(g, c, c.config));
    c.config = complete(c.config);
    BABYGPT_TRY(match_tensors(runtime, c, false));
    Model model;
    const Text kind = g.text("tokenizer.ggml.model");
    if (kind.size && !equal(kind, "none") && !equal(kind, "no_vocab")) BABYGPT_TRY(read_gguf_tokenizer(model.tokenizer, runtime, g));
    if (model.tokenizer.vocab > c.config.vocab)
        return c.bad(": its tokenizer has ", model.tokenizer.vocab, " ids, but token_embd.weight only ", c.config.vocab);
    BABYGPT_TRY(read_weights(runtime, c, purpose, model));
    double plain_words = 0;
    BABYGPT_TRY(g.read("babygpt.plain_words", plain_words));
    BABYGPT_TRY(model.set_chat(g.text("babygpt.user_turn"), g.text("babygpt.reply_turn"), plain_words != 0));
    result = static_cast<Model&&>(model);
    return Status();
}

// Of bytes that are our checkpoint, GGUF or a .bin.
Status load_model(Runtime& runtime, ByteSource& source, Purpose purpose, Model& result) {
    Llama2c header;
    Config config;
    bool is;
    char magic[4] = {};
    BABYGPT_TRY(source.read(0, magic, least(source.size, uint64_t(sizeof magic))));
    if (equal(Text(magic, sizeof magic), "GGUF")) return load_gguf(runtime, source, purpose, result);
    BABYGPT_TRY(is_llama2c(source, header, config, is));
    if (is) return load_llama2c(runtime, source, header, config, purpose, result);
    Checkpoint c(runtime, source);
    Model model;
    BABYGPT_TRY(open_checkpoint(runtime, c, false));
    {
        Array<char> json(runtime);
        BABYGPT_TRY(read_metadata(runtime, c, "babygpt.tokenizer", json));
        if (json.count) BABYGPT_TRY(model.tokenizer.load_memory(runtime, view(json)));
    }
    if (model.tokenizer.vocab > c.config.vocab)
        return c.bad(": its tokenizer has ", model.tokenizer.vocab, " ids, but vocab_size is ", c.config.vocab);
    BABYGPT_TRY(read_weights(runtime, c, purpose, model));
    BABYGPT_TRY(read_chat(runtime, c, model.chat));
    Array<char> labels(runtime);
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.labels", labels));
    if (labels.count) {
        const Status status = model.set_labels(view(labels));
        if (!status.ok()) return c.bad(": ", Text(status.message));
    }
    result = static_cast<Model&&>(model);
    return Status();
}

// ---- writing ---------------------------------------------------------------------------------------------------------

// Values laid out as the weights are, and what stands before their names.
struct Section {
    const char* prefix;
    const float* values;
    Dtype dtype;           // of the matrices
    bool foreign = false;  // for other programs: none of our metadata, and the head has no prefix
    Dtype of(const Weight& weight) const { return weight.is_vector ? Dtype::f32 : dtype; }
};

// write(bytes, count) gets a tensor as it stands in the file: and, where it is int8, its scales after it.
template <class F>
Status write_tensor(Runtime& runtime, const Weight& weight, const float* values, Dtype dtype, const F& write) {
    const int64_t size = weight.rows * weight.cols;
    if (dtype == Dtype::f32) return write(values, static_cast<size_t>(size) * sizeof(float));
    Array<float> scales(runtime);
    if (dtype == Dtype::int8) BABYGPT_TRY(int8_scales(weight, values, scales));
    constexpr int64_t some = 4096;
    uint16_t shorts[some];
    int8_t bytes[some];
    for (int64_t at = 0; at < size; at += some) {
        const int64_t count = least(some, size - at);
        for (int64_t i = 0; i < count; ++i) {
            const float value = values[at + i];
            if (dtype == Dtype::bf16) shorts[i] = static_cast<uint16_t>(bits_as<uint32_t>(value) >> 16);
            else
                bytes[i] =
                    int8_of(value, scales[static_cast<size_t>(weight.scaled_rows ? (at + i) / weight.cols : (at + i) % weight.cols)]);
        }
        if (dtype == Dtype::bf16) BABYGPT_TRY(write(shorts, static_cast<size_t>(count) * sizeof(uint16_t)));
        else BABYGPT_TRY(write(bytes, static_cast<size_t>(count)));
    }
    return scales.count ? write(scales.items, scales.count * sizeof(float)) : Status();
}

// The end of a header: the tensors, and the length in its first eight bytes.
BABYGPT_RARE Status finish_header(Span<const Section> sections, Span<const Weight> names, Array<char>& to) {
    bool good = to.push('}');
    uint64_t offset = 0;
    for (const Section& section : sections)
        for (const Weight& weight : names) {
            const auto entry = [&](const Weight& tensor, Stored type) {
                const uint64_t bytes = static_cast<uint64_t>(tensor.rows * tensor.cols) * stored_size(type);
                const bool bare = section.foreign && equal(Text(tensor.name), Text("lm_head.weight"));
                good = good && append_key(to, Words(Text(bare ? "" : section.prefix), Text(tensor.name)));
                good = good && append(to, "{\"dtype\":") && append_word(to, stored_words, type) && append(to, ",\"shape\":[");
                if (!tensor.is_vector) good = good && append_value(to, tensor.rows) && to.push(',');
                good = good && append_value(to, tensor.cols) && append(to, "],\"data_offsets\":[") && append_value(to, offset);
                good = good && to.push(',') && append_value(to, offset += bytes) && append(to, "]}");
            };
            const Dtype dtype = section.of(weight);
            entry(weight, stored_as(dtype));
            if (dtype == Dtype::int8) entry(scales_of(weight), Stored::f32);
        }
    good = good && to.push('}');
    while (good && to.count % 8 != 0) good = to.push(' ');
    if (!good) return out_of_memory(to.count);
    if (to.count - 8 > longest_header) return fail(Error::unsupported, "the tokenizer is too large for a checkpoint: ", to.count, " bytes");
    const uint64_t length = to.count - 8;
    for (size_t i = 0; i < 8; ++i) to[i] = static_cast<char>(length >> (8 * i) & 0xff);
    return Status();
}

// The header, from the eight bytes of its length to its last space.
BABYGPT_RARE Status build_header(const Model& model, Span<const Section> sections, Text training, Array<char>& to) {
    Runtime& runtime = *model.runtime;
    to = Array<char>(runtime);
    Array<char> config(runtime), tokenizer(runtime), chat(runtime);
    bool good = config.push('{') && append_config(config, model.config) && config.push('}');
    if (model.tokenizer.kind != TokenizerKind::none) BABYGPT_TRY(model.tokenizer.save_memory(tokenizer));
    if (!model.chat.empty()) {
        good = good && chat.push('{') && append_member(chat, "user_turn", view(model.chat.user_turn));
        good = good && append_member(chat, "reply_turn", view(model.chat.reply_turn));
        good = good && append_member(chat, "plain_words", model.chat.plain_words) && chat.push('}');
    }
    good = good && to.resize(8) && append(to, "{\"__metadata__\":{\"format\":\"pt\"");
    const bool ours = !sections[0].foreign;
    if (ours) {
        good = good && append_member(to, "babygpt.format_version", Text(Words(BABYGPT_FORMAT_VERSION)));
        good = good && append_member(to, "babygpt.config", view(config));
    }
    if (tokenizer.count && ours) good = good && append_member(to, "babygpt.tokenizer", view(tokenizer));
    if (chat.count && ours) good = good && append_member(to, "babygpt.chat", view(chat));
    if (model.labels.count && ours) good = good && append_member(to, "babygpt.labels", view(model.labels));
    if (training.size) good = good && append_member(to, "babygpt.training", training);
    return good ? finish_header(sections, model.names, to) : out_of_memory(to.count);
}

Status write_tensors(Runtime& runtime, Span<const Section> sections, Span<const Weight> names, const Array<char>& header, Text path) {
    return write_atomically(runtime, path, [&](File& file) {
        Status status = file.write(header.items, static_cast<int64_t>(header.count));
        for (const Section& section : sections)
            for (const Weight& weight : names)
                if (status.ok())
                    status = write_tensor(runtime, weight, section.values + weight.offset, section.of(weight),
                                          [&](const void* bytes, size_t count) { return file.write(bytes, static_cast<int64_t>(count)); });
        return status;
    });
}
Status save_checkpoint(const Model& model, Span<const Section> sections, Text training, Text path) {
    if (!model.weights) return fail(Error::invalid_argument, "an empty model cannot be saved to '", path, "'");
    Array<char> header;
    BABYGPT_TRY(build_header(model, sections, training, header));
    return write_tensors(*model.runtime, sections, model.names, header, path);
}

// ---- adapters --------------------------------------------------------------------------------------------------------

// What stands before the names of an adapter's tensors.
inline const char* peft_prefix(Architecture architecture) {
    return architecture == Architecture::gpt2 ? "base_model.model.transformer." : "base_model.model.";
}

// PEFT's adapter_config.json.
bool append_adapter_config(Array<char>& to, const Adapter& adapter) {
    const AdapterConfig& c = adapter.config;
    const bool gpt2 = adapter.state->architecture == Architecture::gpt2;
    bool good = append(to, "{\"peft_type\":\"LORA\",\"task_type\":\"CAUSAL_LM\",\"base_model_name_or_path\":null,\"bias\":\"none\"");
    good = good && append_member(to, "r", c.rank) && append_key(to, "lora_alpha") && append_shown(to, c.alpha);
    good = good && append(to, ",\"lora_dropout\":0.0") && append_member(to, "fan_in_fan_out", gpt2);
    good = good && append(to, ",\"inference_mode\":true,\"target_modules\":[");
    for (size_t at = 0, end; good && at <= c.targets.size; at = end + 1) {
        for (end = at; end < c.targets.size && c.targets[end] != ',';) ++end;
        good = (at == 0 || to.push(',')) && append_json(to, Text(c.targets.data + at, end - at));
    }
    return good && append(to, "]}");
}
// targets: where those of `config` will lie.
BABYGPT_RARE Status parse_adapter_config(Runtime& runtime, Text text, Text where, AdapterConfig& config, Array<char>& targets) {
    Json json(runtime, text);
    bool rank = false, alpha = false;
    targets = Array<char>(runtime);
    const auto none = [&](const char* problem) {  // null, false, or nothing in it
        Text value;
        const JsonType type = json.peek();
        if (json.skip(value) && type != JsonType::null && !equal(value, "false") && !equal(value, "{}") && !equal(value, "[]"))
            json.reject(problem);
    };
    for (json.enter_object(); json.next_key();) {
        Text word;
        if (json.key_is("r")) rank = read_value(json, config.rank);
        else if (json.key_is("lora_alpha")) alpha = json.number(config.alpha);
        else if (json.key_is("peft_type")) (void)(read_plain(json, word) && (equal(word, "LORA") || json.reject("only LORA is read")));
        else if (json.key_is("bias")) (void)(read_plain(json, word) && (equal(word, "none") || json.reject("bias must be none")));
        else if (json.key_is("target_modules")) {
            if (json.peek() == JsonType::string) {
                if (read_plain(json, word) && !equal(word, "all-linear")) json.reject("target_modules must be a list, or \"all-linear\"");
                continue;
            }
            for (json.enter_array(); json.next_item();) {
                if (!read_plain(json, word)) break;
                if ((targets.count > 0 && !targets.push(',')) || !append(targets, word)) return out_of_memory(targets.count);
            }
        } else if (json.key_is("use_rslora")) none("use_rslora is not supported");
        else if (json.key_is("use_dora")) none("use_dora is not supported");
        else if (json.key_is("rank_pattern")) none("rank_pattern is not supported");
        else if (json.key_is("alpha_pattern")) none("alpha_pattern is not supported");
        else if (json.key_is("modules_to_save")) none("modules_to_save is not supported");
        else if (json.key_is("layers_to_transform")) none("layers_to_transform is not supported");
        else json.skip();
    }
    BABYGPT_TRY(json.finish(where));
    config.targets = view(targets);
    if (!rank || !alpha) return fail(Error::bad_file, "'", where, "' lacks '", rank ? "lora_alpha" : "r", "'");
    const Status status = check(config);
    return status.ok() ? status : fail(Error::bad_file, "'", where, "': ", Text(status.message));
}

// The header of an adapter's file.
BABYGPT_RARE Status build_adapter_header(const Adapter& adapter, Span<const Section> sections, Text training, Array<char>& to) {
    to = Array<char>(*adapter.runtime);
    Array<char> config(*adapter.runtime);
    bool good = append_adapter_config(config, adapter) && to.resize(8) && append(to, "{\"__metadata__\":{\"format\":\"pt\"");
    good = good && append_member(to, "babygpt.format_version", Text(Words(BABYGPT_FORMAT_VERSION)));
    good = good && append_member(to, "babygpt.adapter", view(config));
    if (training.size) good = good && append_member(to, "babygpt.training", training);
    return good ? finish_header(sections, adapter.names, to) : out_of_memory(to.count);
}
Status save_adapter(const Adapter& adapter, Span<const Section> sections, Text training, Text path) {
    Array<char> header;
    BABYGPT_TRY(build_adapter_header(adapter, sections, training, header));
    return write_tensors(*adapter.runtime, sections, adapter.names, header, path);
}

// Are the file's tensors the adapter's, and no others but moments? prefix: what stands before their names.
Status match_adapter(const Checkpoint& c, const Adapter& adapter, bool moments, const char*& prefix) {
    prefix = peft_prefix(adapter.state->architecture);
    const Words first(Text(prefix), Text(adapter.names[0].name));
    if (!find_by_name(c.tensors, first)) prefix = "base_model.model.";  // of a model without a head
    const StoredTensor *found, *scales;
    for (const Weight& weight : adapter.names) {
        BABYGPT_TRY(find_tensor(c, Text(prefix), weight, found, &scales));
        if (moments) BABYGPT_TRY(find_tensor(c, "moment1.", weight, found, &scales));
        if (moments) BABYGPT_TRY(find_tensor(c, "moment2.", weight, found, &scales));
    }
    for (const StoredTensor& tensor : c.tensors) {
        const bool moment = starts_with(tensor.name, "moment1.") || starts_with(tensor.name, "moment2.");
        if (!tensor.wanted && (moments || !moment))
            return c.bad(" has a tensor '", Shown(tensor.name), "' of shape ", Shown(tensor.shown), ", which is none of the adapter's");
    }
    return Status();
}

// The adapter's config, which stands in the metadata.
Status read_adapter_config(Runtime& runtime, Checkpoint& c, AdapterConfig& config, Array<char>& targets) {
    Array<char> text(runtime);
    BABYGPT_TRY(read_header(runtime, c));
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.adapter", text));
    if (text.count == 0) return c.bad(" is no adapter: its metadata lack 'babygpt.adapter'; of Hugging Face's PEFT, name the folder");
    return parse_adapter_config(runtime, view(text), Words("babygpt.adapter of ", c.source.name), config, targets);
}
Status read_adapter(Runtime& runtime, const Checkpoint& c, const Model& model, const AdapterConfig& config, Adapter& result) {
    Adapter adapter;
    const char* prefix;
    const Status status = allocate_adapter(runtime, model, config, adapter);
    if (status.error == Error::invalid_argument) return c.bad(": ", Text(status.message));
    BABYGPT_TRY(status);
    BABYGPT_TRY(match_adapter(c, adapter, false, prefix));
    BABYGPT_TRY(read_tensors(runtime, c, Text(prefix), adapter.names, adapter.weights));
    result = static_cast<Adapter&&>(adapter);
    return Status();
}
Status load_adapter(Runtime& runtime, const Model& model, ByteSource& source, Adapter& result) {
    Checkpoint c(runtime, source);
    AdapterConfig config;
    Array<char> targets(runtime);
    if (!model.state) return fail(Error::invalid_argument, "the adapter's model is empty: create or load it first");
    BABYGPT_TRY(read_adapter_config(runtime, c, config, targets));
    return read_adapter(runtime, c, model, config, result);
}

// ---- writing GGUF ----------------------------------------------------------------------------------------------------

struct GgufWriter {
    Array<char> bytes;
    uint64_t keys = 0;
    bool good = true;
    explicit GgufWriter(Runtime& runtime) : bytes(runtime) {}
    void number(uint64_t value, unsigned size = 4) {
        for (unsigned i = 0; i < size; ++i) good = good && bytes.push(static_cast<char>(value >> (8 * i) & 0xff));
    }
    void text(Text value) { number(value.size, 8), good = good && append(bytes, value); }
    void key(Text name, GgufType type) { ++keys, text(name), number(type); }
    void key(Text name, Text value) { key(name, gguf_string), text(value); }
    void key(Text name, const char* value) { key(name, Text(value)); }
    void key(Text name, int value) { key(name, gguf_u32), number(static_cast<uint32_t>(value)); }
    void key(Text name, bool value) { key(name, gguf_bool), number(value, 1); }
    void key(Text name, double value) { key(name, gguf_f32), number(bits_as<uint32_t>(static_cast<float>(value))); }
    void list(Text name, GgufType type, size_t count, const GgufWriter& items) {
        key(name, gguf_array), number(type), number(count, 8);
        good = good && items.good && append(bytes, view(items.bytes));
    }
};

// The tokenizer as llama.cpp has it. Its ids are ours, and it puts the same before a text; but of characters never seen a whole run becomes
// one id, and it wants a token that ends a text: what has none gets one that no text has.
struct GgufTokenizer {
    const Tokenizer& tokenizer;
    const Tables& tables;
    GgufWriter &to, tokens, types, scores;
    size_t count = 0;
    GgufTokenizer(const Tokenizer& t, GgufWriter& writer)
        : tokenizer(t), tables(*t.tables), to(writer), tokens(*t.runtime), types(*t.runtime), scores(*t.runtime) {}

    static Status unsupported(const char* what) {
        return fail(Error::unsupported, "GGUF cannot express a tokenizer ", what, ": save the model as a checkpoint");
    }
    void add(Text token, int kind, float score = 0) {
        tokens.text(token), types.number(static_cast<uint32_t>(kind)), scores.number(bits_as<uint32_t>(score));
        ++count;
    }
    void fill(size_t wanted) {
        while (count < wanted) add(Words("[PAD", count, "]"), piece_unused);
    }
    Status put(int vocab) {
        const TokenizerKind kind = tokenizer.kind;
        const bool pieces = kind == TokenizerKind::sentencepiece, characters = kind == TokenizerKind::characters;
        if (pieces) BABYGPT_TRY(put_pieces());
        else {
            if (tables.whole_words_first) return unsupported("that takes whole words before merges");
            if (kind == TokenizerKind::wordpiece && !(tables.lower_case && tables.strip_accents))
                return unsupported("of WordPiece that tells capitals");
            if (characters && tokenizer.vocab > 1) {
                for (const uint32_t code : tables.codes)
                    if (code == 0x2581) return unsupported("of characters with U+2581, its blank");
            }
            Array<char> token(*tokenizer.runtime);
            for (int id = 0; id < tokenizer.vocab && to.good; ++id) BABYGPT_TRY(put_token(id, token));
        }
        fill(static_cast<size_t>(vocab));
        const bool unigram = pieces && tables.unigram;
        to.key("tokenizer.ggml.model", kind == TokenizerKind::wordpiece ? "bert"
                                       : characters || unigram          ? "t5"
                                       : pieces                         ? "llama"
                                                                        : "gpt2");
        to.key("tokenizer.ggml.pre", kind == TokenizerKind::bpe || kind == TokenizerKind::bytes ? "gpt-2" : "default");
        to.list("tokenizer.ggml.tokens", gguf_string, count, tokens);
        to.list("tokenizer.ggml.token_type", gguf_i32, count, types);
        if (pieces || characters) {
            to.list("tokenizer.ggml.scores", gguf_f32, count, scores);
            to.key("tokenizer.ggml.add_space_prefix", pieces && tables.add_dummy_prefix);
            to.key("tokenizer.ggml.remove_extra_whitespaces", pieces && tables.remove_extra_whitespaces);
        }
        if (kind == TokenizerKind::bpe || kind == TokenizerKind::bytes) put_merges();
        if (unigram && tables.charsmap_size) {
            to.key("tokenizer.ggml.precompiled_charsmap", gguf_array), to.number(0), to.number(tables.charsmap_size, 8);
            to.good = to.good && to.bytes.append(tables.proto.items + tables.charsmap, tables.charsmap_size);
        }
        int end = tokenizer.end_of_text, begin = end;
        if (end < 0) begin = end = most(tokenizer.unknown, 0);  // bytes: zero
        for (const int32_t id : tables.specials)
            if (equal(tables.bytes(id), pieces ? "<s>" : kind == TokenizerKind::wordpiece ? "[CLS]" : "")) begin = id;
        if (tokenizer.begin_of_text >= 0) begin = tokenizer.begin_of_text;
        to.key("tokenizer.ggml.bos_token_id", begin);
        to.key("tokenizer.ggml.eos_token_id", end);
        if (tokenizer.unknown >= 0) to.key("tokenizer.ggml.unknown_token_id", tokenizer.unknown);
        to.key("tokenizer.ggml.add_bos_token", tokenizer.begin_of_text >= 0);
        to.key("tokenizer.ggml.add_eos_token", false);
        to.key("tokenizer.ggml.add_sep_token", false);
        if (!characters && kind != TokenizerKind::bytes) return Status();
        Array<char> json(*tokenizer.runtime);  // for ourselves, so that it comes back as what it was
        BABYGPT_TRY(tokenizer.save_memory(json));
        to.key("babygpt.tokenizer", view(json));
        return Status();
    }
    Status put_token(int id, Array<char>& token) {
        const Text bytes = tables.bytes(id);
        const bool special = tables.tokens[static_cast<size_t>(id)].special;
        token.count = 0;
        if (bytes.size == 0) return fill(count + 1), Status();
        if (id == tokenizer.unknown && !special) return add("<unk>", piece_unknown), Status();
        bool good;
        if (special) good = append(token, bytes);
        else if (tokenizer.kind == TokenizerKind::wordpiece || tokenizer.kind == TokenizerKind::characters) {
            const bool blank = bytes[0] == ' ', bracketed = blank && bytes[1] == '[' && bytes.size > 2 && ends_with(bytes, "]");
            good = (!blank || bracketed || append(token, blank_symbol)) && append(token, Text(bytes.data + blank, bytes.size - blank));
        } else good = append_symbols(token, bytes);
        if (special && tokenizer.kind == TokenizerKind::bpe && tables.find_word(bytes) >= 0)
            return unsupported("with a special token that is also a word");
        add(view(token), special ? piece_control : piece_normal);
        return good ? Status() : out_of_memory(token.count);
    }
    void put_merges() {
        GgufWriter merges(*tokenizer.runtime);
        Array<char> line(*tokenizer.runtime);
        for (const Tables::Merge& merge : tables.merges) {
            line.count = 0;
            merges.good = merges.good && append_symbols(line, tables.bytes(merge.left)) && line.push(' ') &&
                          append_symbols(line, tables.bytes(merge.right));
            merges.text(view(line));
        }
        to.list("tokenizer.ggml.merges", gguf_string, tables.merges.count, merges);
    }
    Status put_pieces() {
        if (!tables.escape_whitespaces || tables.treat_whitespace_as_suffix)
            return unsupported("of SentencePiece that treats blanks in this way");
        if (!tables.unigram && tables.charsmap_size) return unsupported("of SentencePiece BPE with a precompiled_charsmap");
        if (!tables.unigram && tables.remove_extra_whitespaces) return unsupported("of SentencePiece BPE with remove_extra_whitespaces");
        if (tables.unigram == tables.byte_fallback) return unsupported("of SentencePiece with this byte_fallback");
        for (Protobuf pieces(view(tables.proto)); pieces.next();) {
            if (pieces.field != 1) continue;
            Text piece;
            for (Protobuf field(pieces.bytes); field.next();)
                if (field.field == 1) piece = field.bytes;
            const size_t id = count;
            add(piece, tables.piece_kinds[id], static_cast<float>(tables.scores[id]));
        }
        return Status();
    }
};

// How a tensor lies in GGUF: rows of `cols` numbers, a row for each output.
struct GgufTensor {
    int64_t rows, cols;
    bool side;
    int dim;      // row_among_ours
    Stored type;  // vectors, and matrices whose rows are no whole blocks of 32, stay floats
    uint64_t bytes;
    GgufTensor(const Config& config, const Weight& weight) {
        side = on_its_side(config, weight), dim = turned_rows(config, Text(weight.name));
        rows = weight.is_vector ? weight.cols : side ? weight.cols : weight.rows;
        cols = weight.is_vector ? 1 : side ? weight.rows : weight.cols;
        type = weight.is_vector || (config.dtype == Dtype::int8 && cols % 32 != 0) ? Stored::f32 : stored_as(config.dtype);
        if (type == Stored::int8) type = Stored::q8_0;
        bytes = static_cast<uint64_t>(rows) *
                (type == Stored::q8_0 ? static_cast<uint64_t>(cols) / 32 * 34 : static_cast<uint64_t>(cols) * stored_size(type));
    }
};
// A power of two as f16; below the smallest it is that.
inline uint16_t f16_power(float power) {
    const int exponent = static_cast<int>(bits_as<uint32_t>(power) >> 23) - 127;
    return static_cast<uint16_t>(exponent >= -14 ? (exponent + 15) << 10 : 1 << most(exponent + 24, 0));
}
// Our scales, one for each output, are Q8_0's for each of its blocks: the same numbers, as long as f16 holds the scale. Of smaller ones the
// numbers are rounded to the multiples of 2^-24; larger ones are an error.
Status write_gguf_tensor(const Model& model, const Weight& weight, File& file) {
    const GgufTensor tensor(model.config, weight);
    const float* const values = model.weights + weight.offset;
    Array<float> scales(*model.runtime);
    Array<char> row(*model.runtime);
    if (tensor.type == Stored::q8_0) BABYGPT_TRY(int8_scales(weight, values, scales));
    const size_t row_bytes = static_cast<size_t>(tensor.bytes / static_cast<uint64_t>(tensor.rows));
    if (!row.resize(row_bytes)) return out_of_memory(row_bytes);
    const int64_t across = tensor.side ? weight.cols : 1;
    for (int64_t r = 0; r < tensor.rows; ++r) {
        const int64_t ours = row_among_ours(r, tensor.dim);
        const float* from = values + (tensor.side ? r : ours * tensor.cols);
        const float scale = scales.count ? most(scales[static_cast<size_t>(ours)], 0x1p-24f) : 0;
        if (scale > 0x1p15f) return fail(Error::unsupported, "'", weight.name, "' holds numbers that are too large for Q8_0");
        const uint16_t half = scales.count ? f16_power(scale) : 0;
        for (int64_t i = 0; i < tensor.cols; ++i, from += across) {
            const uint32_t bits = bits_as<uint32_t>(*from);
            const uint16_t upper = static_cast<uint16_t>(bits >> 16);
            if (tensor.type == Stored::f32) memcpy(row.items + 4 * i, &bits, 4);
            else if (tensor.type == Stored::bf16) memcpy(row.items + 2 * i, &upper, 2);
            else {
                char* const block = row.items + i / 32 * 34;
                if (i % 32 == 0) memcpy(block, &half, 2);
                block[2 + i % 32] = static_cast<char>(int8_of(*from, scale));
            }
        }
        BABYGPT_TRY(file.write(row.items, static_cast<int64_t>(row_bytes)));
    }
    return Status();
}

// Everything before the tensors' bytes.
BABYGPT_RARE Status build_gguf(const Model& model, GgufWriter& to) {
    const Config& c = model.config;
    const bool llama = c.architecture == Architecture::llama;
    const Text name(llama ? "llama" : "gpt2");
    GgufWriter keys(*model.runtime), tensors(*model.runtime);
    const auto own = [&](const char* key, auto value) { keys.key(Words(name, ".", key), value); };
    keys.key("general.architecture", name);
    keys.key("general.file_type", c.dtype == Dtype::f32 ? 0 : c.dtype == Dtype::bf16 ? 32 : 7);
    if (c.dtype == Dtype::int8) keys.key("general.quantization_version", 2);
    own("vocab_size", c.vocab), own("context_length", c.context), own("embedding_length", c.width);
    own("block_count", c.layers), own("feed_forward_length", c.hidden);
    own("attention.head_count", c.heads), own("attention.head_count_kv", c.kv_heads);
    own(llama ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon", c.norm_epsilon);
    if (llama) own("rope.freq_base", c.rope_base), own("rope.dimension_count", c.width / c.heads);
    if (model.tokenizer.kind == TokenizerKind::none) keys.key("tokenizer.ggml.model", "none");
    else BABYGPT_TRY(GgufTokenizer(model.tokenizer, keys).put(c.vocab));
    if (!model.chat.empty()) {
        keys.key("babygpt.user_turn", view(model.chat.user_turn));
        keys.key("babygpt.reply_turn", view(model.chat.reply_turn));
        keys.key("babygpt.plain_words", model.chat.plain_words);
    }
    uint64_t offset = 0;
    for (const Weight& weight : model.names) {
        const GgufTensor tensor(c, weight);
        tensors.text(gguf_name(Text(weight.name)));
        tensors.number(weight.is_vector ? 1 : 2);
        tensors.number(static_cast<uint64_t>(weight.is_vector ? weight.cols : tensor.cols), 8);
        if (!weight.is_vector) tensors.number(static_cast<uint64_t>(tensor.rows), 8);
        tensors.number(tensor.type == Stored::f32 ? 0 : tensor.type == Stored::bf16 ? 30 : 8);
        tensors.number(offset, 8);
        offset += (tensor.bytes + 31) / 32 * 32;
    }
    to.good = append(to.bytes, "GGUF");
    to.number(3), to.number(model.names.size, 8), to.number(keys.keys, 8);
    to.good = to.good && keys.good && tensors.good && append(to.bytes, view(keys.bytes)) && append(to.bytes, view(tensors.bytes));
    while (to.good && to.bytes.count % 32 != 0) to.number(0, 1);
    return to.good ? Status() : out_of_memory(keys.bytes.count + tensors.bytes.count);
}

// ---- the state of training -------------------------------------------------------------------------------------------

TrainingState state_of(const Trainer& t) {
    TrainingState state{};
    state.step_count = t.step_count, state.best_step = t.best_step, state.bad_evaluations = t.bad_evaluations;
    state.best_validation_loss = t.best_validation_loss, state.best_accuracy = t.best_accuracy, state.evaluation_due = t.evaluation_due;
    state.loss_scale = static_cast<double>(t.loss_scale[0]), state.loss_scale_steps = static_cast<double>(t.loss_scale[1]);
    if (t.training) state.training_tokens = t.training->tokens, state.training_fingerprint = t.training->fingerprint;
    if (t.validation) state.validation_tokens = t.validation->tokens, state.validation_fingerprint = t.validation->fingerprint;
    return state;
}

Status parse_training(Runtime& runtime, const Checkpoint& c, TrainConfig& config, TrainingState& state) {
    Array<char> text(runtime);
    const Words where("babygpt.training of ", c.source.name);
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.training", text));
    if (text.count == 0) return c.bad(" holds no state of training to resume from: that is in the .resume.safetensors beside the model");
    uint64_t in_config = 0, in_state = 0;
    state.best_accuracy = 0, state.evaluation_due = false;  // where an older version wrote the file
    state.loss_scale = 256, state.loss_scale_steps = 0;
    Json json(runtime, view(text));
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("config"))
            for (json.enter_object(); json.next_key();) read_field(json, config, in_config) || json.skip();
        else if (json.key_is("state"))
            for (json.enter_object(); json.next_key();) read_field(json, state, in_state) || json.skip();
        else json.skip();
    }
    BABYGPT_TRY(json.finish(where));
    BABYGPT_TRY(all_seen(config, in_config, where));
    BABYGPT_TRY(all_seen(state, in_state, where));
    const int64_t steps = state.step_count;
    const bool possible = steps >= 0 && steps >> 53 == 0 && state.best_step >= -1 && state.best_step <= steps &&
                          state.bad_evaluations >= 0 && state.bad_evaluations <= steps && state.loss_scale > 0 && state.loss_scale < 1e38 &&
                          state.loss_scale_steps >= 0 && state.loss_scale_steps < 1e6;
    return possible ? Status()
                    : fail(Error::bad_file, "'", Text(where), "' cannot be: ", steps, " steps, the best of them number ", state.best_step,
                           ", and ", state.bad_evaluations, " evaluations that were worse");
}

// Does the file go on with what this trainer was made for?
Status check_resume(const Trainer& t, const Checkpoint& c) {
    Runtime& runtime = *t.runtime;
    const Text name = c.source.name;
    BABYGPT_TRY(must_agree(runtime, name, c.config, t.model->config));
    Array<char> stored(runtime), ours(runtime);
    BABYGPT_TRY(read_metadata(runtime, c, "babygpt.tokenizer", stored));
    if (t.model->tokenizer.kind != TokenizerKind::none) BABYGPT_TRY(t.model->tokenizer.save_memory(ours));
    if (!equal(view(stored), view(ours))) return fail(Error::mismatch, "'", name, "' was made with another tokenizer");
    Chat chat;
    BABYGPT_TRY(read_chat(runtime, c, chat));
    const auto same_turn = [&](const char* what, const Array<char>& was, const Array<char>& is) {
        if (equal(view(was), view(is))) return Status();
        const Shown stored_turn(view(was)), our_turn(view(is));
        return fail(Error::mismatch, "'", name, "' was made with ", what, " \"", stored_turn, "\", but ", what, " is \"", our_turn, "\"");
    };
    BABYGPT_TRY(same_turn("user_turn", chat.user_turn, t.model->chat.user_turn));
    BABYGPT_TRY(same_turn("reply_turn", chat.reply_turn, t.model->chat.reply_turn));
    if (chat.plain_words != t.model->chat.plain_words)
        return fail(Error::mismatch, "the checkpoint was made ", chat.plain_words ? "with" : "without", " plain_words");
    return Status();
}
Status check_resume(const Trainer& t, Text name, const TrainConfig& config, const TrainingState& there) {
    BABYGPT_TRY(must_agree(*t.runtime, name, config, t.config));
    const auto same_data = [&](const char* what, uint64_t tokens, uint64_t fingerprint, uint64_t our_tokens, uint64_t our_fingerprint) {
        if (tokens == our_tokens && fingerprint == our_fingerprint) return Status();
        return fail(Error::mismatch, "'", name, "' was made with other ", what, " data: ", tokens, " tokens (fingerprint ", fingerprint,
                    "), but here are ", our_tokens, " (fingerprint ", our_fingerprint, ")");
    };
    const TrainingState here = state_of(t);
    BABYGPT_TRY(same_data("training", there.training_tokens, there.training_fingerprint, here.training_tokens, here.training_fingerprint));
    return same_data("validation", there.validation_tokens, there.validation_fingerprint, here.validation_tokens,
                     here.validation_fingerprint);
}

}  // namespace

// ---- the public calls ------------------------------------------------------------------------------------------------

Status Model::load(Runtime& from, Text path, Purpose purpose) {
    const FloatMode mode;
    const Path inside(path, "/config.json");  // is it a folder?
    if (inside.fits && path.size) {
        Array<char> json(from);
        const Status status = read_file(from, Text(inside.text), json);
        if (status.ok()) return load_huggingface(from, path, view(json), purpose, *this);
        if (status.error != Error::cannot_open) return status;
    }
    File file(from);
    ByteSource source(file);
    BABYGPT_TRY(source.open(path));
    return load_model(from, source, purpose, *this);
}
Status Model::load_memory(Runtime& from, Text bytes, Purpose purpose) {
    const FloatMode mode;
    ByteSource source(bytes);
    return load_model(from, source, purpose, *this);
}

Status Model::save(Text path) const {
    const Section sections[] = {{"", weights, config.dtype}};
    BABYGPT_TRY(bring(*this));
    return save_checkpoint(*this, sections, Text(), path);
}
Status Model::save_memory(Array<char>& bytes) const {
    if (!state) return fail(Error::invalid_argument, "an empty model cannot be saved");
    BABYGPT_TRY(bring(*this));
    const Section sections[] = {{"", weights, config.dtype}};
    BABYGPT_TRY(build_header(*this, Span<const Section>(sections), Text(), bytes));
    for (const Weight& weight : names)
        BABYGPT_TRY(write_tensor(*runtime, weight, weights + weight.offset, sections[0].of(weight), [&](const void* from, size_t count) {
            return bytes.append(static_cast<const char*>(from), count) ? Status() : out_of_memory(bytes.count + count);
        }));
    return Status();
}

namespace {
inline bool is_plain_decoder(const Config& c) {
    return c.encoder_layers == 0 && c.causal && c.classes == 0 && c.features == 0 && !c.head_bias;
}
// What Llama or GPT-2 of other people's programs does not have.
BABYGPT_RARE Status must_be_plain(const Config& config, const char* whose) {
    const bool llama = config.architecture == Architecture::llama;
    const char* other = !is_plain_decoder(config)                                              ? "an encoder, classes or a head with a bias"
                        : config.norm_after                                                    ? "norms after additions"
                        : config.norm != (llama ? Norm::rms : Norm::layer)                     ? "this norm"
                        : config.gated != llama                                                ? "a feed-forward part of this kind"
                        : config.positions != (llama ? Positions::rotary : Positions::learned) ? "positions of this kind"
                        : !llama && (!config.bias || config.kv_heads != config.heads)          ? "grouped queries, or no biases"
                                                                                               : nullptr;
    return other ? fail(Error::unsupported, whose, llama ? " Llama" : " GPT-2", " has not ", other, ": save it as a checkpoint") : Status();
}
}  // namespace

BABYGPT_RARE Status Model::save_huggingface(Text folder) const {
    if (!state) return fail(Error::invalid_argument, "an empty model cannot be saved to '", folder, "'");
    BABYGPT_TRY(bring(*this));
    BABYGPT_TRY(must_be_plain(config, "Hugging Face's"));
    const Path path(folder, "/model.safetensors"), config_path(folder, "/config.json"), tokenizer_path(folder, "/tokenizer.json");
    if (!path.fits || !tokenizer_path.fits || !config_path.fits) return fail(Error::cannot_write, "the path of the folder is too long");
    Config floats = config;
    if (config.dtype == Dtype::int8) floats.dtype = Dtype::f32;
    Array<char> json(*runtime);
    if (!json.push('{') || !append_config(json, floats) || !append(json, "}\n")) return out_of_memory(json.count);
    const bool llama = config.architecture == Architecture::llama;
    const Section sections[] = {{llama ? "" : "transformer.", weights, floats.dtype, true}};
    BABYGPT_TRY(save_checkpoint(*this, sections, Text(), Text(path.text)));
    if (tokenizer.kind != TokenizerKind::none) BABYGPT_TRY(tokenizer.save(Text(tokenizer_path.text)));
    return write_atomically(*runtime, Text(config_path.text),
                            [&](File& file) { return file.write(json.items, static_cast<int64_t>(json.count)); });
}

Status Model::save_llama2c(Text path) const {
    if (!state) return fail(Error::invalid_argument, "an empty model cannot be saved to '", path, "'");
    BABYGPT_TRY(bring(*this));
    Config wanted = config;
    BABYGPT_TRY(preset_architecture("llama", wanted));
    if (config.architecture != Architecture::llama || !is_plain_decoder(config) || config.norm != wanted.norm || !config.gated ||
        config.norm_after || config.bias || config.activation != wanted.activation || config.positions != wanted.positions ||
        config.rope_base != wanted.rope_base || config.norm_epsilon != wanted.norm_epsilon)
        return fail(Error::unsupported, "llama2.c knows only Llama's architecture, with norm_epsilon 1e-05 and rope_base 10000");
    const Llama2c header{config.width,  config.hidden,   config.layers,
                         config.heads,  config.kv_heads, config.tied ? config.vocab : -config.vocab,
                         config.context};
    return write_atomically(*runtime, path, [&](File& file) {
        BABYGPT_TRY(file.write(&header, static_cast<int64_t>(Llama2c::start)));
        return header.each(
            *this,
            [&](const Weight& weight, int dim) {
                Status status;
                for (int64_t row = 0; row < weight.rows && status.ok(); ++row)
                    status = file.write(weights + weight.offset + row_among_ours(row, dim) * weight.cols,
                                        weight.cols * static_cast<int64_t>(sizeof(float)));
                return status;
            },
            [&](uint64_t floats) {
                const float none = 0;
                Status status;
                for (uint64_t i = 0; i < floats && status.ok(); ++i) status = file.write(&none, sizeof none);
                return status;
            });
    });
}

Status Adapter::load(Runtime& from, const Model& model, Text path) {
    const FloatMode mode;
    const Path inside(path, "/adapter_config.json"), tensors(path, "/adapter_model.safetensors");  // is it a folder?
    File file(from);
    ByteSource source(file);
    Array<char> json(from), targets(from);
    if (inside.fits && tensors.fits && path.size) {
        const Status status = read_file(from, Text(inside.text), json);
        if (status.ok()) {
            Checkpoint c(from, source);
            AdapterConfig wanted;
            if (!model.state) return fail(Error::invalid_argument, "the adapter's model is empty: create or load it first");
            BABYGPT_TRY(parse_adapter_config(from, view(json), Words("adapter_config.json of ", path), wanted, targets));
            BABYGPT_TRY(source.open(Text(tensors.text)));
            BABYGPT_TRY(read_header(from, c));
            return read_adapter(from, c, model, wanted, *this);
        }
        if (status.error != Error::cannot_open) return status;
    }
    BABYGPT_TRY(source.open(path));
    return load_adapter(from, model, source, *this);
}
Status Adapter::load_memory(Runtime& from, const Model& model, Text bytes) {
    const FloatMode mode;
    ByteSource source(bytes);
    return load_adapter(from, model, source, *this);
}
Status Adapter::save(Text path) const {
    if (!weights) return fail(Error::invalid_argument, "an empty adapter cannot be saved to '", path, "'");
    BABYGPT_TRY(give_back(state->borrowed));
    const Section sections[] = {{peft_prefix(state->architecture), weights, Dtype::f32}};
    return save_adapter(*this, sections, Text(), path);
}
Status Adapter::save_memory(Array<char>& bytes) const {
    if (!weights) return fail(Error::invalid_argument, "an empty adapter cannot be saved");
    BABYGPT_TRY(give_back(state->borrowed));
    const Section sections[] = {{peft_prefix(state->architecture), weights, Dtype::f32}};
    BABYGPT_TRY(build_adapter_header(*this, Span<const Section>(sections), Text(), bytes));
    for (const Weight& weight : names) {
        const size_t size = static_cast<size_t>(weight.rows * weight.cols) * sizeof(float);
        if (!bytes.append(reinterpret_cast<const char*>(weights + weight.offset), size)) return out_of_memory(bytes.count + size);
    }
    return Status();
}
BABYGPT_RARE Status Adapter::save_peft(Text folder) const {
    if (!weights) return fail(Error::invalid_argument, "an empty adapter cannot be saved to '", folder, "'");
    const Path path(folder, "/adapter_model.safetensors"), config_path(folder, "/adapter_config.json");
    if (!path.fits || !config_path.fits) return fail(Error::cannot_write, "the path of the folder is too long");
    Array<char> json(*runtime);
    if (!append_adapter_config(json, *this) || !json.push('\n')) return out_of_memory(json.count);
    BABYGPT_TRY(save(Text(path.text)));
    return write_atomically(*runtime, Text(config_path.text),
                            [&](File& file) { return file.write(json.items, static_cast<int64_t>(json.count)); });
}

Status Model::save_gguf(Text path) const {
    if (!state) return fail(Error::invalid_argument, "an empty model cannot be saved to '", path, "'");
    BABYGPT_TRY(bring(*this));
    BABYGPT_TRY(must_be_plain(config, "GGUF's"));
    const bool llama = config.architecture == Architecture::llama;
    if (config.activation != (llama ? Activation::silu : Activation::gelu_tanh))
        return fail(Error::unsupported, "GGUF's ", llama ? "Llama has only silu" : "GPT-2 has only gelu_tanh", " as activation");
    GgufWriter header(*runtime);
    BABYGPT_TRY(build_gguf(*this, header));
    return write_atomically(*runtime, path, [&](File& file) {
        const char zeros[32] = {};
        Status status = file.write(header.bytes.items, static_cast<int64_t>(header.bytes.count));
        uint64_t padding = 0;
        for (const Weight& weight : names) {
            if (status.ok() && padding) status = file.write(zeros, static_cast<int64_t>(padding));
            if (status.ok()) status = write_gguf_tensor(*this, weight, file);
            padding = (0 - GgufTensor(config, weight).bytes) % 32;
        }
        return status;
    });
}

Status Trainer::save(Text path) const {
    if (!model) return fail(Error::invalid_argument, "an empty trainer cannot be saved to '", path, "'");
    BABYGPT_TRY(bring_all(*state));
    Array<char> training_json(*runtime);
    bool good = append(training_json, "{\"config\":{") && append_fields(training_json, config) && append(training_json, "},\"state\":{");
    good = good && append_fields(training_json, state_of(*this)) && append(training_json, "}}");
    if (!good) return out_of_memory(training_json.count);
    const Section sections[] = {
        {adapter ? peft_prefix(model->config.architecture) : "", adapter ? adapter->weights : model->weights, Dtype::f32},
        {"moment1.", moment1, Dtype::f32},
        {"moment2.", moment2, Dtype::f32}};
    if (adapter) return save_adapter(*adapter, sections, view(training_json), path);
    return save_checkpoint(*model, sections, view(training_json), path);
}

Status Trainer::load(Text path) {
    const FloatMode mode;
    if (!model) return fail(Error::invalid_argument, "create the trainer before it loads '", path, "'");
    File file(*runtime);
    ByteSource source(file);
    BABYGPT_TRY(source.open(path));
    Checkpoint c(*runtime, source);
    TrainConfig stored_config;
    TrainingState stored{};
    const char* prefix = "";
    if (adapter) {
        AdapterConfig there;
        Array<char> targets(*runtime);
        BABYGPT_TRY(read_adapter_config(*runtime, c, there, targets));
        if (there.rank != adapter->config.rank || there.alpha != adapter->config.alpha || !equal(there.targets, adapter->config.targets))
            return fail(Error::mismatch, "'", path, "' was made with rank ", there.rank, ", alpha ", there.alpha, " and the targets ",
                        there.targets, ", but here they are ", adapter->config.rank, ", ", adapter->config.alpha, " and ",
                        adapter->config.targets);
        BABYGPT_TRY(match_adapter(c, *adapter, true, prefix));
    } else BABYGPT_TRY(open_checkpoint(*runtime, c, true));
    BABYGPT_TRY(parse_training(*runtime, c, stored_config, stored));
    if (!adapter) BABYGPT_TRY(check_resume(*this, c));
    BABYGPT_TRY(check_resume(*this, c.source.name, stored_config, stored));
    BABYGPT_TRY(bring_all(*state));
    // From here on the trainer changes.
    state->newer_here = true;
    under_way = 0;
    ++(adapter ? adapter->version : state->trained->version);
    const Span<const Weight> names = adapter ? adapter->names : model->names;
    Status status = read_tensors(*runtime, c, Text(prefix), names, adapter ? adapter->weights : state->trained->weights);
    if (status.ok()) status = read_tensors(*runtime, c, "moment1.", names, moment1);
    if (status.ok()) status = read_tensors(*runtime, c, "moment2.", names, moment2);
    if (!status.ok()) return fail(status.error, Text(status.message), "; the model is now half loaded: load again before it is used");
    step_count = stored.step_count, best_step = stored.best_step, bad_evaluations = stored.bad_evaluations;
    best_validation_loss = stored.best_validation_loss, best_accuracy = stored.best_accuracy, evaluation_due = stored.evaluation_due;
    loss_scale[0] = static_cast<float>(stored.loss_scale), loss_scale[1] = static_cast<float>(stored.loss_scale_steps);
    return Status();
}

Status resume_path(Text model_path, Array<char>& path) {
    const Text ending(".safetensors");
    if (!path.runtime) return fail(Error::invalid_argument, "resume_path needs an Array that was made with a Runtime");
    if (ends_with(model_path, ending)) model_path.size -= ending.size;
    path.count = 0;
    if (!append(path, model_path) || !append(path, ".resume.safetensors")) return out_of_memory(model_path.size + 20);
    return Status();
}

Status read_train_config(Runtime& runtime, Text resume_file, TrainConfig& config) {
    File file(runtime);
    ByteSource source(file);
    BABYGPT_TRY(source.open(resume_file));
    Checkpoint c(runtime, source);
    TrainConfig stored_config;
    TrainingState stored{};
    BABYGPT_TRY(read_header(runtime, c));
    BABYGPT_TRY(parse_training(runtime, c, stored_config, stored));
    config = stored_config;
    return Status();
}

// ---- comparing two models --------------------------------------------------------------------------------------------

// A row for each of a's tensors, then one for each that only b has.
Status compare(const Model& a, const Model& b, Array<Difference>& rows) {
    const FloatMode mode;
    if (!a.runtime || !b.runtime) return fail(Error::invalid_argument, "an empty model cannot be compared");
    BABYGPT_TRY(bring(a));
    BABYGPT_TRY(bring(b));
    rows = Array<Difference>(*a.runtime);
    // Where both have the same config, a name stands at the same place in both.
    const auto twin = [](const Model& in, size_t at, const Weight& weight) {
        return at < in.names.size && equal(Text(in.names[at].name), Text(weight.name)) ? &in.names[at] : in.find(Text(weight.name));
    };
    const auto add = [&](const Weight& x, const Weight* y) {
        Difference row{};
        memcpy(row.name, x.name, sizeof row.name);
        row.index = -1;
        row.same_shape = y && x.rows == y->rows && x.cols == y->cols && x.is_vector == y->is_vector;
        row.same_bits = row.same_shape;
        for (int64_t i = 0; row.same_shape && i < x.rows * x.cols; ++i) {
            const float p = a.weights[x.offset + i], q = b.weights[y->offset + i];
            const double difference = p < q ? double(q) - double(p) : double(p) - double(q);
            row.max_reference = most(row.max_reference, p < 0 ? -double(p) : double(p));
            if (bits_as<uint32_t>(p) == bits_as<uint32_t>(q)) continue;
            if (row.index < 0) row.index = i;
            row.same_bits = false;
            row.max_difference = is_finite(difference) ? most(row.max_difference, difference) : bits_as<double>(uint64_t(0x7ff) << 52);
        }
        return rows.push(row) ? Status() : out_of_memory(sizeof row);
    };
    for (size_t i = 0; i < a.names.size; ++i) BABYGPT_TRY(add(a.names[i], twin(b, i, a.names[i])));
    for (size_t i = 0; i < b.names.size; ++i)
        if (!twin(a, i, b.names[i])) BABYGPT_TRY(add(b.names[i], nullptr));
    return Status();
}

}  // namespace babygpt
BABYGPT_UNHURRIED_END

// =====================================================================================================================
// [CHAPTER 10] The same ops, fast
// =====================================================================================================================
// One text for all instruction sets: every kernel is a template over `Set`, a set of vectors of Set::width floats, and is compiled once for
// each set by the thin wrappers of chapter 11. On GCC and Clang Set::V is a vector of the compiler's own (a + b works on all elements);
// elsewhere it is a float, and the same text becomes scalar loops. First the vectors, then products of matrices, then what works along
// rows.
//
// Rules: everything here is always_inline, since a compiler silently refuses to inline a function across instruction sets; vectors pass by
// reference, since by value their calling convention would depend on the set; no lambda, which would not inherit the wrapper's set.
// The order of additions is chapter 5's, so that the results have the same bits.

namespace babygpt {
namespace {

#if defined(__GNUC__) || defined(__clang__)
#define BABYGPT_VECTORS 1
#define BABYGPT_UNROLL _Pragma("GCC unroll 32")  // for loops over registers: left rolled up, they would live in memory
#else
#define BABYGPT_VECTORS 0
#define BABYGPT_UNROLL
#endif
#if BABYGPT_VECTORS && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BABYGPT_SHUFFLES 1
#endif
#endif
#ifndef BABYGPT_SHUFFLES
#define BABYGPT_SHUFFLES 0
#endif
// 256 bits and more on x86; GCC for Windows does not align such vectors on the stack (GCC bug 54412).
#if BABYGPT_X86 && BABYGPT_VECTORS && (defined(__clang__) || !defined(_WIN32))
#define BABYGPT_WIDE 1
#else
#define BABYGPT_WIDE 0
#endif

// Processors with a matrix unit, and those that multiply pairs of bf16: instructions that older assemblers do not know, and Clang not in
// vectors of 512 bits.
#if BABYGPT_WIDE && defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define BABYGPT_TILES 1
#else
#define BABYGPT_TILES 0
#endif
#if BABYGPT_WIDE && !defined(__clang__) && __GNUC__ >= 11
#define BABYGPT_PAIRS 1
#else
#define BABYGPT_PAIRS 0
#endif

// V: floats; U: as many unsigned integers; M: what comparing them gives, for `m ? a : b`; D: as many doubles; L: as many 64-bit integers;
// Loose: V at any address; Couples: pairs of 32-bit integers, as half as many of 64 bits; Words: half as many of 32.
template <int W>
struct VectorTypes {
#if BABYGPT_VECTORS
    typedef float V __attribute__((vector_size(4 * W)));
    typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
    typedef uint32_t U __attribute__((vector_size(4 * W)));
    typedef int32_t M __attribute__((vector_size(4 * W)));
    typedef double D __attribute__((vector_size(8 * W)));
    typedef uint64_t L __attribute__((vector_size(8 * W)));
    typedef uint16_t Half __attribute__((vector_size(2 * W)));
    typedef uint8_t Quarter __attribute__((vector_size(W)));
    typedef uint64_t Couples __attribute__((vector_size(4 * W)));
    typedef uint32_t Words __attribute__((vector_size(2 * W)));
#endif
};
template <>
struct VectorTypes<1> {
    typedef float V, Loose;
    typedef uint32_t U;
    typedef bool M;
    typedef double D;
    typedef uint64_t L;
};

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // the convention for passing wide vectors does not matter to what is always inlined
#endif
#if BABYGPT_X86 && defined(__GNUC__) && !defined(__clang__)
// GCC knows the builtins of an instruction set after the first function that wants it.
__attribute__((target("avx2,fma,avx512f"), unused)) inline void know_builtins() {}
#endif

BABYGPT_CALL inline void copy_part(float* to, const float* from, int n) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
}

#if BABYGPT_X86 && BABYGPT_VECTORS && !defined(__clang__)
// Bytes 0 to 7, then 8 to 15, of 16 into the upper bytes of 32-bit elements; -128: zero.
#define BABYGPT_X(byte) -128, -128, -128, byte
alignas(32) constexpr int8_t int8_places[64] = {BABYGPT_X(0),  BABYGPT_X(1),  BABYGPT_X(2),  BABYGPT_X(3), BABYGPT_X(4),  BABYGPT_X(5),
                                                BABYGPT_X(6),  BABYGPT_X(7),  BABYGPT_X(8),  BABYGPT_X(9), BABYGPT_X(10), BABYGPT_X(11),
                                                BABYGPT_X(12), BABYGPT_X(13), BABYGPT_X(14), BABYGPT_X(15)};
#undef BABYGPT_X
#endif

// A set of vectors: `width` floats each; `fused` is the width of the fused multiply-add instruction, 0: there is none.
template <int width_, int fused>
struct Simd : VectorTypes<width_> {
    static constexpr int width = width_;
    static constexpr int registers = width_ == 16 || (fused == 4 && width_ == 4) ? 32 : 16;
    static constexpr bool is_narrow = fused == width_ && fused >= 8;  // it can load bf16 and int8; other sets keep packed weights as floats
    static constexpr bool calls = BABYGPT_VECTORS && fused == 0;      // each multiply-add is a call: little code is worth more than speed
    static constexpr int tile_rows = calls ? 2 : registers == 32 ? 12 : 6;
    static constexpr int depth_unit = 1;  // a panel has a multiple of so many words for each row or column
    static constexpr bool pairs = false;  // a word is two numbers in bf16, not a float
    static constexpr bool tiles = false;  // and tiles of C are a matrix unit's
    typedef float Lanes[static_cast<size_t>(width_)];
    using typename VectorTypes<width_>::V;
    using typename VectorTypes<width_>::Loose;
    using typename VectorTypes<width_>::U;
    using typename VectorTypes<width_>::M;
    using typename VectorTypes<width_>::D;
    using typename VectorTypes<width_>::L;

    static BABYGPT_INLINE void load(V& v, const float* p) { v = *reinterpret_cast<const Loose*>(p); }
    static BABYGPT_INLINE void store(float* p, const V& v) { *reinterpret_cast<Loose*>(p) = v; }
#if BABYGPT_VECTORS
    using typename VectorTypes<width_>::Half;
    using typename VectorTypes<width_>::Quarter;
    // The lower halves, or quarters, of numbers of 32 bits. (GCC knows instructions for one step at a time.)
    static BABYGPT_INLINE void store_low(uint16_t* to, const U& bits) {
        const Half half = __builtin_convertvector(bits, Half);
        memcpy(to, &half, sizeof half);
    }
    static BABYGPT_INLINE void store_low(int8_t* to, const U& bits) {
        const Half half = __builtin_convertvector(bits, Half);
        const Quarter quarter = __builtin_convertvector(half, Quarter);
        memcpy(to, &quarter, sizeof quarter);
    }
#endif
    // bf16 is the upper half of a float. int8: two vectors of them, times int8_unit. (Clang refuses 512 bits in assembly here, and GCC 12
    // takes such conversions apart; with 256 bits a shuffle into the upper bytes is faster than sign extension.)
#if defined(__clang__)
    static constexpr float int8_unit = 1;
    static BABYGPT_INLINE void load(V& v, const uint16_t* p) {
        typedef uint16_t Shorts __attribute__((vector_size(2 * width_), aligned(2), may_alias));
        const U wide = __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), U) << 16;
        from_bits(v, wide);
    }
    static BABYGPT_INLINE void load(V& v, V& w, const int8_t* p) {
        typedef int8_t Bytes __attribute__((vector_size(width_), aligned(1), may_alias));
        v = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), V);
        w = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p + width_), V);
    }
#elif BABYGPT_VECTORS && BABYGPT_X86
    static constexpr float int8_unit = width_ == 8 ? 0x1p24f : 1;
    static BABYGPT_INLINE void load(V& v, const uint16_t* p) {
        struct __attribute__((may_alias)) Shorts {
            uint16_t each[static_cast<size_t>(width_)];
        };
        __asm__("vpmovzxwd {%1, %0|%0, %1}\n\tvpslld {$16, %0, %0|%0, %0, 16}" : "=v"(v) : "m"(*reinterpret_cast<const Shorts*>(p)));
    }
    static BABYGPT_INLINE void load(V& v, V& w, const int8_t* p) {
        struct __attribute__((may_alias)) Bytes {
            int8_t each[16];
        };
        const Bytes* bytes = reinterpret_cast<const Bytes*>(p);
        if constexpr (width_ == 8)
            __asm__(
                "vbroadcasti128 {%2, %1|%1, %2}\n\tvpshufb {%3, %1, %0|%0, %1, %3}\n\tvpshufb {%4, %1, %1|%1, %1, %4}\n\t"
                "vcvtdq2ps %0, %0\n\tvcvtdq2ps %1, %1"
                : "=&x"(v), "=&x"(w)
                : "m"(*bytes), "xm"(*reinterpret_cast<const V*>(int8_places)), "xm"(*reinterpret_cast<const V*>(int8_places + 32)));
        else
            __asm__("vpmovsxbd {%2, %0|%0, %2}\n\tvpmovsxbd {%3, %1|%1, %3}\n\tvcvtdq2ps %0, %0\n\tvcvtdq2ps %1, %1"
                    : "=&v"(v), "=&v"(w)
                    : "m"(bytes[0]), "m"(bytes[1]));
    }
#endif
    // Rounds floats to bf16: the upper halves are the result, the nearest (a tie: the even one). What is not finite stays so.
    static BABYGPT_INLINE void to_bf16(U& bits) {
        U half, infinite, low;
        splat(half, 0x7fffu), splat(infinite, 0x7f800000u), splat(low, 1u);
        const U size = bits & 0x7fffffffu, nearest = bits + half + (bits >> 16 & low);
        bits = size > infinite ? bits | 0x10000u : nearest;
    }
    // The first n elements; the others are 0.
    static BABYGPT_INLINE void load_part(V& v, const float* p, int n) {
        Lanes part = {};
        copy_part(part, p, n);
        load(v, part);
    }
    static BABYGPT_INLINE void store_part(float* p, const V& v, int n) {
        Lanes part;
        store(part, v);
        copy_part(p, part, n);
    }
    // s in every element. Not by V{s, s, ...} or v * s: a vector that GCC's basic set lacks would be filled element by element.
    static BABYGPT_INLINE void splat(V& v, float s) {
#if BABYGPT_X86 && BABYGPT_VECTORS && !defined(__clang__)
        if constexpr (fused == 8 && width == 16) {
            typename VectorTypes<8>::V half[2];
            Simd<8, 8>::splat(half[0], s);
            half[1] = half[0];
            memcpy(&v, half, sizeof v);
        } else if constexpr (fused > 0) __asm__("vbroadcastss {%1, %0|%0, %1}" : "=v"(v) : "vm"(s));
        else v = s - V{};
#else
        v = s - V{};  // s - 0 is s, -0 too
#endif
    }
    static BABYGPT_INLINE void splat(U& u, uint32_t s) {
        V v;
        splat(v, bits_as<float>(s));
        bits(u, v);
    }
    static BABYGPT_INLINE void bits(U& to, const V& from) { memcpy(&to, &from, sizeof to); }
    static BABYGPT_INLINE void from_bits(V& to, const U& from) { memcpy(&to, &from, sizeof to); }
    // 0, 1, 2, ...
    static BABYGPT_INLINE void count_up(U& u) {
        if constexpr (width == 1) u = 0;
        else if constexpr (width == 4) u = U{0, 1, 2, 3};
        else if constexpr (width == 8) u = U{0, 1, 2, 3, 4, 5, 6, 7};
        else u = U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    }
    // Elements from n on become 0 (n may be 0 or less, or width or more).
    static BABYGPT_INLINE void keep_first(V& v, int n) {
        U index, value, end;
        count_up(index);
        bits(value, v);
        splat(end, static_cast<uint32_t>(most(n, 0)));
        value = index < end ? value : U{};
        from_bits(v, value);
    }

    // sum = a * b + sum, rounded once
    static BABYGPT_INLINE void fma(V& sum, const V& a, const V& b) {
#if BABYGPT_X86 && BABYGPT_VECTORS && !defined(__clang__)
        if constexpr (fused == width && width >= 8) {  // so that each sum stays in its register: GCC would move sums about, and out of them
            __asm__("vfmadd231ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(a), "v"(b));
            return;
        }
#endif
        fma(sum, a, b, sum);
    }
    // d = a * b + c, rounded once
    static BABYGPT_INLINE void fma(V& d, const V& a, const V& b, const V& c) {
#if BABYGPT_VECTORS
        if constexpr (fused == 0) fma_in_double(d, a, b, c);
        else fma_instruction(d, a, b, c);
#else
        d = madd(a, b, c);
#endif
    }

    // a * b that is to be added to something afterwards, rounded twice: write this instead of a * b + c. (Under a host's -ffast-math Clang
    // would fuse the two, whatever our pragmas say.)
    static BABYGPT_INLINE void mul(V& d, const V& a, const V& b) {
#if defined(__clang__) && (BABYGPT_X86 || defined(__aarch64__))
        if constexpr (fused == 0) {
            d = a * b;
            return;
        }
        float minus_zero = -0.0f;
#if BABYGPT_X86
        __asm__("" : "+x"(minus_zero));  // what it cannot see through it cannot simplify
#else
        __asm__("" : "+w"(minus_zero));
#endif
        V addend;
        splat(addend, minus_zero);
        fma(d, a, b, addend);
#else
        d = a * b;
#endif
    }

    // a < b ? b : a
    static BABYGPT_INLINE void larger(V& d, const V& a, const V& b) { d = a < b ? b : a; }
    static BABYGPT_INLINE void sqrt(V& d, const V& a) {
#if BABYGPT_X86 && BABYGPT_VECTORS && !defined(__clang__)
        if constexpr (width == 8) d = __builtin_ia32_sqrtps256(a);
        else if constexpr (width == 16 && fused == 16) d = __builtin_ia32_sqrtps512_mask(a, a, short(-1), 4);
        else
#elif defined(__SSE2__) && BABYGPT_VECTORS  // Clang would estimate it under -ffast-math
        if constexpr (width > 1) {
            typedef typename VectorTypes<4>::V Quarter;
            Quarter part[width / 4];
            memcpy(part, &a, sizeof part);
            for (int i = 0; i < width / 4; ++i) {
                if constexpr (fused == 0) __asm__("sqrtps {%1, %0|%0, %1}" : "=x"(part[i]) : "x"(part[i]));
                else __asm__("vsqrtps {%1, %0|%0, %1}" : "=x"(part[i]) : "x"(part[i]));
            }
            memcpy(&d, part, sizeof part);
        } else
#endif
        {
            Lanes lane;
            store(lane, a);
            for (int i = 0; i < width; ++i) lane[i] = root(lane[i]);
            load(d, lane);
        }
    }

    // exp_of, chapter 5: the integer n stands in the low bits of the number that rounding left.
    static BABYGPT_INLINE void exp(V& y, const V& x) {
        if constexpr (calls) exp_called(y, x);
        else exp_inline(y, x);
    }
    static BABYGPT_INLINE void exp_inline(V& y, const V& x) {
        V low, high, scale, rounder, part, r, p, n, c;
        splat(low, -87.3f), splat(high, 88.3f), splat(scale, 1.44269504f), splat(rounder, 12582912.0f);
        const V limited = x < low ? low : (x > high ? high : x);
        fma(n, limited, scale, rounder);
        U power;
        bits(power, n);
        power = (power + (127u - 0x4b400000u)) << 23;
        n = n - rounder;
        splat(part, -0.693359375f), fma(r, n, part, limited);
        splat(part, 2.12194440e-4f), fma(r, n, part, r);
        splat(p, 1.9875691500e-4f);
        splat(c, 1.3981999507e-3f), fma(p, p, r, c);
        splat(c, 8.3334519073e-3f), fma(p, p, r, c);
        splat(c, 4.1665795894e-2f), fma(p, p, r, c);
        splat(c, 1.6666665459e-1f), fma(p, p, r, c);
        splat(c, 5.0000001201e-1f), fma(p, p, r, c);
        fma(p, p, r * r, r);
        splat(c, 1.0f);
        from_bits(n, power);
        y = (p + c) * n;
    }

    // random_bits(key, first + 0, 1, 2, ...), chapter 2
    static BABYGPT_INLINE void random(U& x, uint64_t key, uint32_t first) {
        U low, high;
        splat(low, first + static_cast<uint32_t>(key)), splat(high, static_cast<uint32_t>(key >> 32));
        count_up(x);
        x = (x + low) * 0x9e3779b9u ^ high;
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        x = x ^ (x >> 16);
    }

    // The sixteen sums of chapter 5: part[j] holds those from j * width on. Element i of a row goes to part[i / width % parts].
    static constexpr int parts = 16 / width;
    typedef V Parts[static_cast<size_t>(parts)];
    struct Sums {
        Parts part = {};
        // The fixed tree: halves are added until one number is left.
        BABYGPT_INLINE float total() const {
            Parts sum;
            BABYGPT_UNROLL
            for (int j = 0; j < parts; ++j) sum[j] = part[j];
            BABYGPT_UNROLL
            for (int half = parts / 2; half > 0; half /= 2)
                for (int j = 0; j < half; ++j) sum[j] = sum[j] + sum[j + half];
            Lanes lane;
            store(lane, sum[0]);
            BABYGPT_UNROLL
            for (int half = width / 2; half > 0; half /= 2)
                for (int j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
            return lane[0];
        }
    };
    static BABYGPT_INLINE float biggest(const V& v) {
        Lanes lane;
        store(lane, v);
        float best = lane[0];
        for (int i = 1; i < width; ++i) best = most(best, lane[i]);
        return best;
    }

 private:
#if BABYGPT_VECTORS
    static __attribute__((noinline)) void exp_called(V& y, const V& x) { exp_inline(y, x); }
    // madd, chapter 5: the double sum is rounded to odd, then to float. Not inlined: it is slow as it is, and long.
    static __attribute__((noinline)) void fma_in_double(V& d, const V& a, const V& b, const V& c) {
        const D product_ = __builtin_convertvector(a, D) * __builtin_convertvector(b, D), addend = __builtin_convertvector(c, D);
        D sum = product_ + addend;
        const D part = sum - product_;
        const D error = (product_ - (sum - part)) + (addend - part);
        L whole;
        memcpy(&whole, &sum, sizeof whole);
        const L none = {}, all = ~none;
        const L same_sign = (error > 0.0) == (sum > 0.0) ? none + 1u : all;
        const L inexact = error != 0.0 ? all : none, even = (whole & 1u) == 0u ? all : none;
        const L finite = (whole & 0x7ff0000000000000u) != 0x7ff0000000000000u ? all : none;
        whole += same_sign & inexact & even & finite;
        memcpy(&sum, &whole, sizeof sum);
        d = __builtin_convertvector(sum, V);
    }
#if defined(__clang__)
    static BABYGPT_INLINE void fma_instruction(V& d, const V& a, const V& b, const V& c) {
#if __has_builtin(__builtin_elementwise_fma)
        d = __builtin_elementwise_fma(a, b, c);
#else
#pragma clang fp contract(on)
        d = a * b + c;  // within one expression, on a set that has the instruction, it is always used
#endif
    }
#elif BABYGPT_X86
    static BABYGPT_INLINE void fma_instruction(V& d, const V& a, const V& b, const V& c) {
        if constexpr (fused == width && width == 8) d = __builtin_ia32_vfmaddps256(a, b, c);
        else if constexpr (fused == width && width == 16) d = __builtin_ia32_vfmaddps512_mask(a, b, c, short(-1), 4);
        else {
            typedef typename VectorTypes<8>::V Half;
            Half x[2], y[2], z[2];
            memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(z, &c, sizeof z);
            for (int i = 0; i < 2; ++i) z[i] = __builtin_ia32_vfmaddps256(x[i], y[i], z[i]);
            memcpy(&d, z, sizeof d);
        }
    }
#else
    static BABYGPT_INLINE void fma_instruction(V& d, const V& a, const V& b, const V& c) {
        V result = c;
        for (int i = 0; i < width; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
        d = result;
    }
#endif
#endif
};

#if !BABYGPT_VECTORS
using Portable = Simd<1, 0>;
#elif defined(__ARM_FEATURE_FMA)
using Portable = Simd<4, 4>;
#else
using Portable = Simd<4, 0>;  // also SSE2
#endif
#if BABYGPT_WIDE
using Avx2 = Simd<8, 8>;
using Avx512 = Simd<16, 16>;
using Avx2Wide = Simd<16, 8>;  // the text of AVX-512 on a machine that lacks it, for tests
#endif

// Four by four floats, rows to columns.
BABYGPT_INLINE void transpose(float* to, int64_t to_row, const float* from, int64_t from_row) {
#if BABYGPT_SHUFFLES
    typedef float Four __attribute__((vector_size(16)));
    Four a, b, c, d;
    memcpy(&a, from, sizeof a), memcpy(&b, from + from_row, sizeof b), memcpy(&c, from + 2 * from_row, sizeof c),
        memcpy(&d, from + 3 * from_row, sizeof d);
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), d = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
    memcpy(to, &a, sizeof a), memcpy(to + to_row, &b, sizeof b), memcpy(to + 2 * to_row, &c, sizeof c),
        memcpy(to + 3 * to_row, &d, sizeof d);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j * to_row + i] = from[i * from_row + j];
#endif
}

BABYGPT_INLINE void prefetch(const void* p) {
#if BABYGPT_VECTORS
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

constexpr int ahead = 8;  // rows that lie apart are prefetched so many before

// to[c * to_row + r] = from[r * from_row + c], in squares of 4 x 4
BABYGPT_CALL inline void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int rows, int cols) {
    int r = 0;
    for (; r + 4 <= rows && cols % 4 == 0; r += 4) {
        for (int j = 0; j < 4; ++j)
            for (int c = 0; c < cols; c += 16) prefetch(from + (r + ahead + j) * from_row + c);
        for (int c = 0; c < cols; c += 4) transpose(to + c * to_row + r, to_row, from + r * from_row + c, from_row);
    }
    for (; r < rows; ++r)
        for (int c = 0; c < cols; ++c) to[c * to_row + r] = from[r * from_row + c];
}
// Copies rows x cols; columns from `cols` to `padded` become 0.
BABYGPT_CALL inline void copy_rows(float* to, int64_t to_row, const float* from, int64_t from_row, int rows, int cols, int padded) {
    for (int r = 0; r < rows; ++r, to += to_row, from += from_row) {
        for (int c = 0; c < cols; c += 16) prefetch(from + ahead * from_row + c);
        memcpy(to, from, static_cast<size_t>(cols) * sizeof(float));
        memset(to + cols, 0, static_cast<size_t>(padded - cols) * sizeof(float));
    }
}

}  // namespace
}  // namespace babygpt
// ---- products of matrices -------------------------------------------------------------------------------------------------
// C = start + A B, each element of C one chain along the depth. The scheme is that of Goto & van de Geijn ("Anatomy of high-performance
// matrix multiplication", 2008): B is copied into panels in the order in which it is read, A too where its depth runs down the columns, and
// a tile of C stays in registers while rows of A and a panel of B stream by. The depth is cut in blocks small enough for the caches; a tile
// goes on from where the last block left it in C.

namespace babygpt {
namespace {

constexpr int depth_block = 256;  // a panel of B of this depth stays in the first cache ...
constexpr int row_block = 96;     // ... and so many rows of A in the second; a multiple of every tile's rows

template <class Set>
struct Called;  // what is called rather than inlined: a set's own functions (chapter 11, BABYGPT_KERNELS)

template <class Set>
struct Products {
    using V = typename Set::V;
    using U = typename Set::U;
    static constexpr int tile_rows = Set::tile_rows;
    static constexpr int tile_columns = 2 * Set::width;

    // Copies elements (k, j), k < depth, j < count, into a panel [k][size]; what is missing up to `size` becomes 0.
    template <int size>
    static BABYGPT_INLINE void pack(float* to, const float* from, int64_t stride, Depth runs, int depth, int count) {
        if (count < size || size < 4) {
            for (int k = 0; k < depth; ++k)
                for (int j = 0; j < size; ++j) to[k * size + j] = j < count ? from[runs == along ? j * stride + k : k * stride + j] : 0.0f;
        } else if (runs == along) {
            for (int j = 0; j < size; j += 4) {
                const int first = least(j, size - 4);  // the last four may overlap those before
                int k = 0;
                for (; k + 4 <= depth; k += 4) transpose(to + k * size + first, size, from + first * stride + k, stride);
                for (; k < depth; ++k)
                    for (int i = first; i < first + 4; ++i) to[k * size + i] = from[i * stride + k];
            }
        } else if (size % Set::width == 0) {
            V v;
            for (int k = 0; k < depth; ++k, to += size, from += stride)
                for (int j = 0; j < size; j += Set::width) Set::load(v, from + j), Set::store(to + j, v);
        } else {
            for (int k = 0; k < depth; ++k, to += size, from += stride)
                for (int j = 0; j < size; j += 4) memcpy(to + least(j, size - 4), from + least(j, size - 4), 4 * sizeof(float));
        }
    }
    static BABYGPT_INLINE void pack_a(float* to, const Factor& a, int row, int depth, int rows) {
        pack<tile_rows>(to, a.element(0, row), a.stride, a.runs, depth, least(tile_rows, rows - row));
    }
    static BABYGPT_INLINE void pack_b(float* to, const Factor& b, int column, int depth, int columns, Dtype dtype) {
        const int count = least(tile_columns, columns - column);
        if constexpr (Set::is_narrow) {
            if (dtype == Dtype::bf16) return pack_narrow<uint16_t>(to, b.element(0, column), b.stride, b.runs, depth, count);
            if (dtype == Dtype::int8) return pack_narrow<int8_t>(to, b.element(0, column), b.stride, b.runs, depth, count);
        }
        pack<tile_columns>(to, b.element(0, column), b.stride, b.runs, depth, count);
    }

    // A panel's elements are floats, uint16_t (the upper halves of floats), or int8_t, with the columns' scales and their inverses before.
    template <class E>
    static constexpr int scales = sizeof(E) == 1 ? 2 * tile_columns : 0;
    template <class E>
    static BABYGPT_INLINE const E* elements(const float* panel) {
        return reinterpret_cast<const E*>(panel + scales<E>);
    }
    static BABYGPT_INLINE int64_t panel_floats(Dtype dtype, int depth) {
        const int64_t count = static_cast<int64_t>(depth) * tile_columns;
        if (!Set::is_narrow || dtype == Dtype::f32) return count;
        return dtype == Dtype::bf16 ? count / 2 : scales<int8_t> + count / 4;
    }
    // Of numbers that Model::convert has rounded: nothing more is lost.
    template <class E>
    static BABYGPT_INLINE void pack_narrow(float* to, const float* from, int64_t stride, Depth runs, int depth, int count) {
        constexpr int some = 64;
        float piece[static_cast<size_t>(some * tile_columns)], scale[static_cast<size_t>(tile_columns)];
        E* narrow = reinterpret_cast<E*>(to + scales<E>);
        V by[2], v[2], magic;
        U bits, no_sign;
        Set::splat(magic, 12582912.0f), Set::splat(no_sign, 0x7fffffffu), Set::splat(by[0], 0), by[1] = by[0];
        for (int pass = sizeof(E) == 1 ? 0 : 1; pass < 2; ++pass) {  // first what is largest in each column, then the numbers
            for (int k = 0; k < depth; k += some) {
                const int deep = least(some, depth - k);
                pack<tile_columns>(piece, runs == along ? from + k : from + k * stride, stride, runs, deep, count);
                for (int i = 0; i < deep; ++i) {
                    BABYGPT_UNROLL
                    for (int j = 0; j < 2; ++j) {
                        Set::load(v[j], piece + (2 * i + j) * Set::width);
                        if (pass == 0) {
                            Set::bits(bits, v[j]);
                            bits = bits & no_sign;
                            Set::from_bits(v[j], bits);
                            Set::larger(by[j], by[j], v[j]);
                            continue;
                        }
                        if constexpr (sizeof(E) == 1) v[j] = v[j] * by[j] + magic;  // its last byte is the whole number
                        Set::bits(bits, v[j]);
                        if constexpr (sizeof(E) == 2) bits = bits >> 16;
                        Set::store_low(narrow, bits);
                        narrow += Set::width;
                    }
                }
            }
            if (pass == 1) break;
            Set::store(scale, by[0]), Set::store(scale + Set::width, by[1]);
            for (int j = 0; j < tile_columns && sizeof(E) == 1; ++j) {
                scale[j] = int8_scale(scale[j]);
                to[j] = scale[j] / Set::int8_unit, to[j + tile_columns] = Set::int8_unit / scale[j];
                scale[j] = 1 / scale[j];
            }
            Set::load(by[0], scale), Set::load(by[1], scale + Set::width);
        }
    }

    // rows x columns of C: c[r][j] = start[r][j] + sum over k < depth of a[r * a_row + k * a_step] * b[k * b_row + j], a chain; start null: 0.
    // Meanwhile it fetches what is needed next: at every k from `next` on, in steps; null: nothing.
    // `unroll` values of k at a time: where another thread shares the core, the number of instructions bounds it, not that of multiply-adds.
    template <int rows, int columns, int unroll, class E>
    static BABYGPT_INLINE void tile(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a, int64_t a_row,
                                    int64_t a_step, const E* b, int64_t b_row, int depth, const float* scale = nullptr,
                                    const E* next = nullptr, int64_t next_step = 0) {
        constexpr int vectors = columns / Set::width;
        V sum[static_cast<size_t>(rows * vectors)], by;
        BABYGPT_UNROLL
        for (int r = 0; r < rows; ++r) {
            BABYGPT_UNROLL
            for (int j = 0; j < vectors; ++j) {
                if (start) Set::load(sum[r * vectors + j], start + r * start_row + j * Set::width);
                else Set::splat(sum[r * vectors + j], 0);
                if constexpr (sizeof(E) == 1)
                    Set::load(by, scale + columns + j * Set::width), sum[r * vectors + j] = sum[r * vectors + j] * by;
            }
        }
        int64_t k = 0;
        for (; k + unroll <= depth; k += unroll, b += unroll * b_row) {
            if (next) {
                BABYGPT_UNROLL
                for (int i = 0; i < unroll; ++i) prefetch(next), next += next_step;
            }
            BABYGPT_UNROLL
            for (int i = 0; i < unroll; ++i) add_outer<rows, vectors>(sum, a, a_row, (k + i) * a_step, b + i * b_row);
        }
        for (; k < depth && unroll > 1; ++k, b += b_row) add_outer<rows, vectors>(sum, a, a_row, k * a_step, b);
        BABYGPT_UNROLL
        for (int r = 0; r < rows; ++r) {
            BABYGPT_UNROLL
            for (int j = 0; j < vectors; ++j) {
                if constexpr (sizeof(E) == 1) Set::load(by, scale + j * Set::width), sum[r * vectors + j] = sum[r * vectors + j] * by;
                Set::store(c + r * c_row + j * Set::width, sum[r * vectors + j]);
            }
        }
    }
    // What one k adds: sum[r][j] += a[r * a_row + at] * b[j].
    template <int rows, int vectors, class E>
    static BABYGPT_INLINE void add_outer(V* sum, const float* a, int64_t a_row, int64_t at, const E* b) {
        V right[static_cast<size_t>(vectors)], left;
        BABYGPT_UNROLL
        for (int j = 0; j < vectors; ++j) {
            if constexpr (sizeof(E) > 1) Set::load(right[j], b + j * Set::width);
            else if (j % 2 == 0) Set::load(right[j], right[j + 1], b + j * Set::width);
        }
        BABYGPT_UNROLL
        for (int r = 0; r < rows; ++r) {
            Set::splat(left, (a + r * a_row)[at]);
            BABYGPT_UNROLL
            for (int j = 0; j < vectors; ++j) Set::fma(sum[r * vectors + j], left, right[j]);
        }
    }
    template <int rows>
    static constexpr int unroll = Set::calls ? 1 : (rows > 6 ? 2 : 8);  // of panels

    // A whole tile, with a panel of B from k0 on. A runs along its rows, or is a panel, too; it is one only where all is float.
    // `next`: the panel that will be needed after this one, of which it fetches a share; null: none; a matrix unit: the next tile of C.
    struct Next {
        const float* panel;
        int64_t from, step;  // in elements
    };
    template <int rows, Depth a_runs, class E>
    static BABYGPT_INLINE void panel_tile(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a, int64_t a_row,
                                          const float* panel, const Next& next, int k0, int depth) {
        const int64_t from = static_cast<int64_t>(k0) * tile_columns;
        Called<Set>::template panel_tile<rows, a_runs>(c, c_row, start, start_row, a, a_row, elements<E>(panel) + from, depth, panel,
                                                       next.panel ? elements<E>(next.panel) + from + next.from : nullptr, next.step);
    }
    template <int rows>
    static BABYGPT_INLINE void panel_tile(Dtype dtype, float* c, int64_t c_row, const float* start, int64_t start_row, const float* a,
                                          int64_t a_row, const float* panel, const Next& next, int k0, int depth) {
        if constexpr (Set::is_narrow) {
            if (dtype == Dtype::bf16)
                return panel_tile<rows, along, uint16_t>(c, c_row, start, start_row, a, a_row, panel, next, k0, depth);
            if (dtype == Dtype::int8) return panel_tile<rows, along, int8_t>(c, c_row, start, start_row, a, a_row, panel, next, k0, depth);
        }
        panel_tile<rows, along, float>(c, c_row, start, start_row, a, a_row, panel, next, k0, depth);
    }
    // How many rows the tile has that begins where `left` rows are left: for a few sessions, or at the end, a low one may waste less.
    static constexpr int low_rows = Set::calls ? tile_rows : 4;
    static BABYGPT_INLINE int rows_of_tile(int left) {
        return left <= 2 * low_rows && round_up(left, low_rows) < round_up(left, tile_rows) ? low_rows : tile_rows;
    }

    // Rows from `row` on, at most row_block, and columns [column, end) of C (whole panels of B, except the last).
    // a: panels, each [p.depth][tile_rows], of these rows (and all is float); null: A runs along its rows, and is read where it is.
    // b: panels, each [p.depth][tile_columns], of all columns.
    static BABYGPT_INLINE void block(const Product& p, const float* a, const float* b, int row, int column, int end) {
        const int64_t apart = panel_floats(p.dtype, p.depth);
        const int rows = least(row_block, p.rows - row);
        int rest = rows;
        while (rest >= rows_of_tile(rest) && !a) rest -= rows_of_tile(rest);
        const int blocks = Set::tiles ? 1 : (p.depth + depth_block - 1) / depth_block;  // a matrix unit waits longer for C than for panels
        const int step = round_up((p.depth + blocks - 1) / blocks, Set::depth_unit);
        float last_rows[static_cast<size_t>(Set::pairs ? 1 : tile_rows * depth_block)];  // of A that do not fill a tile, and rows of zeros
        for (int k0 = 0; k0 < p.depth; k0 += step) {
            const int depth = least(step, p.depth - k0);
            if (!a && rest && !Set::pairs) {
                copy_rows(last_rows, depth, p.a.element(k0, row + rows - rest), p.a.stride, rest, depth, depth);
                memset(last_rows + rest * depth, 0, static_cast<size_t>((tile_rows - rest) * depth) * sizeof(float));
            }
            for (int j = column; j < end; j += tile_columns) {
                const float* panel = b + j / tile_columns * apart;
                const int columns = least(tile_columns, p.columns - j);
                for (int r = 0, height; r < rows; r += height) {
                    const int tall = a ? tile_rows : rows_of_tile(rows - r);
                    height = least(tall, rows - r);
                    const float* from = a                ? a + static_cast<int64_t>(r) * p.depth + static_cast<int64_t>(k0) * tile_rows
                                        : height == tall ? p.a.element(k0, row + r)
                                                         : last_rows;
                    const int64_t a_row = height == tall ? p.a.stride : depth;
                    const bool is_whole = height == tall && columns == tile_columns;
                    float edge[static_cast<size_t>(tile_rows * tile_columns)];  // a tile at the edge of C is computed here
                    float* c = p.c + (row + r) * p.c_stride + j;
                    const float* start = k0 ? c : p.start ? p.start + (row + r) * p.start_stride + j : nullptr;
                    int64_t start_row = k0 ? p.c_stride : p.start_stride;
                    if (!is_whole)
                        for (int i = 0; i < tall; ++i)
                            for (int m = 0; m < tile_columns; ++m)
                                edge[i * tile_columns + m] = start && i < height && m < columns ? start[i * start_row + m] : 0.0f;
                    float* to = is_whole ? c : edge;
                    if (!is_whole) start = edge, start_row = tile_columns;
                    const int64_t c_row = is_whole ? p.c_stride : tile_columns;
                    const float* below = r + height < rows ? c + height * p.c_stride : p.c + row * p.c_stride + j + tile_columns;
                    // Where C is larger than the caches. (A matrix unit is so fast that this has to be spread over its work.)
                    for (int i = 0; i < tile_rows && !Set::tiles; ++i) prefetch(below + i * p.c_stride);
                    // Many rows hide the fetching of one panel, and another one would take the first cache from what they need.
                    const Next next = Set::tiles ? Next{below, 0, p.c_stride}
                                                 : Next{rows < row_block ? panel + apart : nullptr, r * depth / rows * tile_columns,
                                                        most(1, height * tile_columns / rows)};
                    if (a) panel_tile<tile_rows, down, float>(to, c_row, start, start_row, from, tile_rows, panel, next, k0, depth);
                    else if constexpr (!Set::pairs) {
                        if (tall == tile_rows)
                            panel_tile<tile_rows>(p.dtype, to, c_row, start, start_row, from, a_row, panel, next, k0, depth);
                        else panel_tile<low_rows>(p.dtype, to, c_row, start, start_row, from, a_row, panel, next, k0, depth);
                    }
                    for (int i = 0; i < height && !is_whole; ++i)
                        memcpy(c + i * p.c_stride, edge + i * tile_columns, static_cast<size_t>(columns) * sizeof(float));
                }
            }
        }
    }

    // One row of C, columns [column, end): each panel of B is read once, four side by side, which is as fast as memory can.
    static BABYGPT_INLINE void single_row(const Product& p, const float* b, int column, int end) {
        constexpr int most_panels = Set::calls ? 1 : 4;
        for (int j = column; j < end; j += most_panels * tile_columns) {
            if (end - j >= most_panels * tile_columns) panels<most_panels>(p, b, j);
            else
                for (int i = j; i < end; i += tile_columns) panels<1>(p, b, i);
        }
    }
    template <int count>
    static BABYGPT_INLINE void panels(const Product& p, const float* b, int column) {
        const int64_t apart = panel_floats(p.dtype, p.depth);
        const float* panel = b + column / tile_columns * apart;
        const int whole = least(count * tile_columns, p.columns - column);  // columns that exist
        const bool is_scaled = Set::is_narrow && p.dtype == Dtype::int8;
        V sum[static_cast<size_t>(2 * count)], by;
        BABYGPT_UNROLL
        for (int i = 0; i < 2 * count; ++i) {
            const int from = i * Set::width;
            if (!p.start || from >= whole) Set::splat(sum[i], 0);
            else if (whole - from >= Set::width) Set::load(sum[i], p.start + column + from);
            else Set::load_part(sum[i], p.start + column + from, whole - from);
            if (is_scaled) Set::load(by, panel + i / 2 * apart + tile_columns + i % 2 * Set::width), sum[i] = sum[i] * by;
        }
        if constexpr (Set::is_narrow) {
            if (p.dtype == Dtype::bf16) add_row<count>(sum, p, elements<uint16_t>(panel), 2 * apart);
            else if (p.dtype == Dtype::int8) add_row<count>(sum, p, elements<int8_t>(panel), 4 * apart);
            else add_row<count>(sum, p, panel, apart);
        } else add_row<count>(sum, p, panel, apart);
        BABYGPT_UNROLL
        for (int i = 0; i < 2 * count; ++i) {
            const int from = i * Set::width;
            if (is_scaled) Set::load(by, panel + i / 2 * apart + i % 2 * Set::width), sum[i] = sum[i] * by;
            if (whole - from >= Set::width) Set::store(p.c + column + from, sum[i]);
            else if (whole > from) Set::store_part(p.c + column + from, sum[i], whole - from);
        }
    }
    template <int count, class E>
    static BABYGPT_INLINE void add_row(V* sum, const Product& p, const E* panel, int64_t apart) {
        V x, y, z;
        for (int k = 0; k < p.depth; ++k, panel += tile_columns) {
            Set::splat(x, *p.a.element(k, 0));
            BABYGPT_UNROLL
            for (int i = 0; i < 2 * count; i += 2) {
                const E* pair = panel + i / 2 * apart;
                if constexpr (sizeof(E) > 1) Set::load(y, pair), Set::load(z, pair + Set::width);
                else Set::load(y, z, pair);
                Set::fma(sum[i], x, y), Set::fma(sum[i + 1], x, z);
            }
        }
    }

    // A loop in registers: how fast multiply-adds can be. Returns their number.
    static BABYGPT_INLINE double ceiling(int64_t rounds, float* result) {
        constexpr int chains = Set::registers == 32 ? 24 : 12;
        V sum[static_cast<size_t>(chains)], x, y;
        Set::splat(x, 0.999f), Set::splat(y, 1e-3f);
        BABYGPT_UNROLL
        for (int i = 0; i < chains; ++i) Set::splat(sum[i], static_cast<float>(i));
        for (int64_t n = 0; n < rounds; ++n) {
            BABYGPT_UNROLL
            for (int i = 0; i < chains; ++i) Set::fma(sum[i], x, y);
        }
        BABYGPT_UNROLL
        for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
        *result = Set::biggest(sum[0]);
        return static_cast<double>(rounds) * chains * Set::width * (Set::pairs ? 2 : 1);
    }
};

// ---- products of numbers in bf16 -----------------------------------------------------------------------------------------
// Precision::bf16: the factors are rounded to bf16 on their way into the panels, sums are floats as ever. There are three ways, and all of
// them are the scheme above:
//   rounded  Panels of floats that have been rounded. Works anywhere, and gains nothing.
//   pairs    A word of a panel is two neighbours along the depth, and a multiply-add of words adds both their products: on AMD's processors
//            since Zen 4 as fast as one of floats (vdpbf16ps; on Intel's it takes as long as four).
//   tiles    Such words, multiplied by Intel's matrix unit (AMX): 16 x 16 sums at a time, 16 words deep.

template <class Set>
struct Rounded {
    using P = Products<Set>;
    static BABYGPT_INLINE void round_panel(float* panel, int64_t n) {
        typename Set::V v;
        typename Set::U bits;
        for (int64_t i = 0; i < n; i += Set::width) {
            const int left = static_cast<int>(least(n - i, static_cast<int64_t>(Set::width)));
            if (left == Set::width) Set::load(v, panel + i);
            else Set::load_part(v, panel + i, left);
            Set::bits(bits, v);
            Set::to_bf16(bits);
            bits = bits & 0xffff0000u;
            Set::from_bits(v, bits);
            if (left == Set::width) Set::store(panel + i, v);
            else Set::store_part(panel + i, v, left);
        }
    }
    static BABYGPT_INLINE void pack_a(float* to, const Factor& a, int row, int depth, int rows) {
        P::pack_a(to, a, row, depth, rows);
        round_panel(to, static_cast<int64_t>(depth) * P::tile_rows);
    }
    static BABYGPT_INLINE void pack_b(float* to, const Factor& b, int column, int depth, int columns) {
        P::pack_b(to, b, column, depth, columns, Dtype::f32);
        round_panel(to, static_cast<int64_t>(depth) * P::tile_columns);
    }
};

#if BABYGPT_VECTORS
// 32 x 32 of C: four registers of sums, of two by two of factors. a: [depth][32 rows][16 words], b: [16 words][32 columns]. Meanwhile it
// fetches the next tile of C.
template <class Unit>
BABYGPT_INLINE void tile_product(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a, const float* b, int depth,
                                 const float* next, int64_t next_row) {
    const int rows_at_a_time = (16 * 32 + depth - 1) / depth;
    if (start) {
        Unit::template load<0>(start, start_row), Unit::template load<1>(start + 16, start_row);
        Unit::template load<2>(start + 16 * start_row, start_row), Unit::template load<3>(start + 16 * start_row + 16, start_row);
    } else Unit::template zero<0>(), Unit::template zero<1>(), Unit::template zero<2>(), Unit::template zero<3>();
    for (int k = 0, row = 0; k < depth; k += 16, a += 16 * 32, b += 16 * 32) {
        for (const int end = least(row + rows_at_a_time, 32); row < end; ++row, next += next_row) prefetch(next), prefetch(next + 16);
        Unit::template load<4>(a, 16), Unit::template load<6>(b, 32);
        Unit::template multiply<0, 4, 6>();
        Unit::template load<7>(b + 16, 32);
        Unit::template multiply<1, 4, 7>();
        Unit::template load<5>(a + 16 * 16, 16);
        Unit::template multiply<2, 5, 6>(), Unit::template multiply<3, 5, 7>();
    }
    Unit::template store<0>(c, c_row), Unit::template store<1>(c + 16, c_row);
    Unit::template store<2>(c + 16 * c_row, c_row), Unit::template store<3>(c + 16 * c_row + 16, c_row);
}

template <class Set>
struct Pairs {
    using P = Products<Set>;
    static constexpr int W = Set::width;
    static BABYGPT_INLINE int words(int depth) { return round_up((depth + 1) / 2, Set::depth_unit); }

    // Words of neighbours: word t of from[2t] and from[2t + 1], t < count (a multiple of W / 2); from `depth` on there are zeros.
    static BABYGPT_INLINE void along_depth(float* to, const float* from, int depth, int count) {
        typename Set::V v;
        typename Set::U bits;
        for (int t = 0; t < count; t += W / 2) {
            if (depth - 2 * t >= W) Set::load(v, from + 2 * t);
            else Set::load_part(v, from + 2 * t, most(depth - 2 * t, 0));
            Set::bits(bits, v);
            Set::to_bf16(bits);
            typename Set::Couples two;
            memcpy(&two, &bits, sizeof two);  // the first number in the lower half
            two = (two >> 16 & 0xffffu) | (two >> 32 & 0xffff0000u);
            const typename Set::Words one = __builtin_convertvector(two, typename Set::Words);
            memcpy(to + t, &one, sizeof one);
        }
    }
    // Words of two rows: word j of even[j] and odd[j], j < count.
    static BABYGPT_INLINE void across_depth(float* to, const float* even, const float* odd, int count) {
        int j = 0;
        for (; j + W <= count; j += W) two_rows<Set>(to + j, even + j, odd + j, W);
        for (; j < count; j += 4) two_rows<Simd<4, 0>>(to + j, even + j, odd + j, least(4, count - j));
    }
    template <class S>
    static BABYGPT_INLINE void two_rows(float* to, const float* even, const float* odd, int count) {
        typename S::V v[2];
        typename S::U bits[2];
        BABYGPT_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (count == S::width) S::load(v[i], i ? odd : even);
            else S::load_part(v[i], i ? odd : even, count);
            S::bits(bits[i], v[i]);
            S::to_bf16(bits[i]);
        }
        bits[0] = (bits[0] >> 16) | (bits[1] & 0xffff0000u);
        S::from_bits(v[0], bits[0]);
        if (count == S::width) S::store(to, v[0]);
        else S::store_part(to, v[0], count);
    }
    // Words t0 to t0 + n, depth running down: [n][size], of `count` columns; what is missing becomes 0.
    static BABYGPT_INLINE void rows_of_words(float* to, int size, const float* from, int64_t stride, int depth, int count, int t0, int n) {
        const float zeros[static_cast<size_t>(P::tile_columns)] = {};
        for (int t = t0; t < t0 + n; ++t, to += size) {
            const float* even = from + 2 * t * stride;
            across_depth(to, 2 * t < depth ? even : zeros, 2 * t + 1 < depth ? even + stride : zeros, count);
            for (int j = count; j < size; ++j) to[j] = 0;
        }
    }

    // Into a panel [words][size].
    template <int size>
    static BABYGPT_INLINE void pack(float* to, const float* from, int64_t stride, Depth runs, int depth, int count) {
        if (runs == down) return rows_of_words(to, size, from, stride, depth, count, 0, words(depth));
        constexpr int some = 64;
        float rows[static_cast<size_t>(size * some)];
        for (int t = 0; t < words(depth); t += some) {
            const int n = least(some, words(depth) - t);
            for (int j = 0; j < count; ++j) along_depth(rows + j * some, from + j * stride + 2 * t, depth - 2 * t, n);
            memset(rows + count * some, 0, static_cast<size_t>((size - count) * some) * sizeof(float));
            P::template pack<size>(to + t * size, rows, some, along, n, size);
        }
    }
    // As the matrix unit reads them: 16 words of each row, then the next 16 of each.
    static BABYGPT_INLINE void pack_for_tiles(float* to, const float* from, int64_t stride, Depth runs, int depth, int count) {
        constexpr int size = P::tile_rows;
        const int all = words(depth);
        for (int r = 0; r < size && runs == along; ++r)  // row after row, as they are read fastest
            for (int t = 0; t < all; t += 16) {
                float* row = to + t * size + 16 * r;
                if (r < count) along_depth(row, from + r * stride + 2 * t, depth - 2 * t, 16);
                else memset(row, 0, 16 * sizeof(float));
            }
        for (int t = 0; t < all && runs == down; t += 16) {
            float across[static_cast<size_t>(16 * size)];
            rows_of_words(across, size, from, stride, depth, count, t, 16);
            for (int r = 0; r < size; r += 16)
                transpose_16<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(to + t * size + 16 * r, across + r, size);
        }
    }
    // 16 x 16 words, rows to columns: of each pair of rows, n apart, the elements that are n apart change places.
    template <int... element>
    static BABYGPT_INLINE void transpose_16(float* to, const float* from, int64_t from_row) {
#if BABYGPT_SHUFFLES
        typename Set::V row[16];
        BABYGPT_UNROLL
        for (int i = 0; i < 16; ++i) Set::load(row[i], from + i * from_row);
        change_places<8, element...>(row), change_places<4, element...>(row);
        change_places<2, element...>(row), change_places<1, element...>(row);
        BABYGPT_UNROLL
        for (int i = 0; i < 16; ++i) Set::store(to + 16 * i, row[i]);
#else
        transpose(to, 16, from, from_row, 16, 16);
#endif
    }
#if BABYGPT_SHUFFLES
    template <int n, int... element>
    static BABYGPT_INLINE void change_places(typename Set::V* row) {
        BABYGPT_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (i & n) continue;
            const typename Set::V a = row[i], b = row[i + n];
            row[i] = __builtin_shufflevector(a, b, (element & n ? 16 + element - n : element)...);
            row[i + n] = __builtin_shufflevector(a, b, (element & n ? 16 + element : element + n)...);
        }
    }
#endif
    static BABYGPT_INLINE void pack_a(float* to, const Factor& a, int row, int depth, int rows) {
        const int count = least(P::tile_rows, rows - row);
        if constexpr (Set::tiles) pack_for_tiles(to, a.element(0, row), a.stride, a.runs, depth, count);
        else pack<P::tile_rows>(to, a.element(0, row), a.stride, a.runs, depth, count);
    }
    static BABYGPT_INLINE void pack_b(float* to, const Factor& b, int column, int depth, int columns) {
        pack<P::tile_columns>(to, b.element(0, column), b.stride, b.runs, depth, least(P::tile_columns, columns - column));
    }

    template <int rows>
    static BABYGPT_INLINE void tile(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a, const float* b,
                                    int depth, const float* next, int64_t next_step) {
        if constexpr (Set::tiles) tile_product<typename Set::Unit>(c, c_row, start, start_row, a, b, depth, next, next_step);
        else
            P::template tile<rows, P::tile_columns, P::template unroll<rows>>(c, c_row, start, start_row, a, 1, rows, b, P::tile_columns,
                                                                              depth, static_cast<const float*>(nullptr), next, next_step);
    }
    static BABYGPT_INLINE void block(const Product& p, const float* a, const float* b, int row, int column, int end) {
        if constexpr (Set::tiles) Set::Unit::configure();
        P::block(p, a, b, row, column, end);
        if constexpr (Set::tiles) Set::Unit::release();
    }
    static BABYGPT_INLINE double ceiling(int64_t rounds, float* result) {
        if constexpr (Set::tiles) return Set::Unit::ceiling(rounds, result);
        else return P::ceiling(rounds, result);
    }
};

// What is in a word, times what is in another: both products are added to the sum, the second number's first, each rounded once. (As
// vdpbf16ps does it, but for subnormal numbers, which that takes for zeros.)
template <class Base>
struct PairsOf : Base {
    static constexpr bool pairs = true, is_narrow = false;
    static constexpr int depth_unit = Base::width / 2;
    using typename Base::U;
    using typename Base::V;
    static BABYGPT_INLINE void fma(V& sum, const V& a, const V& b) {
        U left, right;
        Base::bits(left, a), Base::bits(right, b);
        BABYGPT_UNROLL
        for (int second = 1; second >= 0; --second) {
            const U x = second ? left & 0xffff0000u : left << 16, y = second ? right & 0xffff0000u : right << 16;
            V v, w;
            Base::from_bits(v, x), Base::from_bits(w, y);
            Base::fma(sum, v, w);
        }
    }
};

// Unit: eight registers, each of 16 rows of 16 words.
template <class Base, class Unit_>
struct TilesOf : Base {
    using Unit = Unit_;
    static constexpr bool pairs = true, is_narrow = false, tiles = true;
    static constexpr int tile_rows = 32, depth_unit = 16;
};
#endif

#if BABYGPT_TILES
// AMX (Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3). Register names are part of an instruction.
struct MatrixUnit {
    static BABYGPT_INLINE void configure() {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } tiles = {};
        tiles.palette = 1;
        for (int t = 0; t < 8; ++t) tiles.row_bytes[t] = 64, tiles.rows[t] = 16;
        __asm__ volatile("ldtilecfg %0" : : "m"(tiles));
    }
    static BABYGPT_INLINE void release() { __asm__ volatile("tilerelease"); }
    template <int t>
    static BABYGPT_INLINE void zero() {
        __asm__ volatile("tilezero {%%|}tmm%c0" : : "i"(t));
    }
    template <int t>
    static BABYGPT_INLINE void load(const float* from, int64_t row) {
        __asm__ volatile("tileloadd {(%0,%1,4), %%tmm%c2|tmm%c2, [%0+%1*4]}" : : "r"(from), "r"(row), "i"(t) : "memory");
    }
    template <int t>
    static BABYGPT_INLINE void store(float* to, int64_t row) {
        __asm__ volatile("tilestored {%%tmm%c2, (%0,%1,4)|[%0+%1*4], tmm%c2}" : : "r"(to), "r"(row), "i"(t) : "memory");
    }
    template <int sum, int a, int b>
    static BABYGPT_INLINE void multiply() {
        __asm__ volatile("tdpbf16ps {%%tmm%c2, %%tmm%c1, %%tmm%c0|tmm%c0, tmm%c1, tmm%c2}" : : "i"(sum), "i"(a), "i"(b));
    }
    // Multiply-adds in registers.
    static BABYGPT_INLINE double ceiling(int64_t rounds, float* result) {
        configure();
        zero<0>(), zero<1>(), zero<2>(), zero<3>(), zero<4>(), zero<5>(), zero<6>(), zero<7>();
        for (int64_t n = 0; n < rounds; ++n) multiply<0, 4, 6>(), multiply<1, 4, 7>(), multiply<2, 5, 6>(), multiply<3, 5, 7>();
        release();
        *result = 0;
        return static_cast<double>(rounds) * 4 * 16 * 16 * 32;
    }
};
using Tiles = TilesOf<Avx512, MatrixUnit>;
#endif
#if BABYGPT_PAIRS
struct FastPairs : PairsOf<Avx512> {
    static BABYGPT_INLINE void fma(V& sum, const V& a, const V& b) {
        __asm__("vdpbf16ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(a), "v"(b));
    }
};
#endif

}  // namespace
}  // namespace babygpt

// ---- what works along rows ---------------------------------------------------------------------------------------------
//
// Everything that is not a product of matrices with weights, for a set of vectors. Each function does a part of an op of chapter 5, so
// that threads can share it, and takes what that op takes:
//   rows [r0, r1):       embedding_forward, add_waves, norm_forward, norm_backward_rows, gate_forward, gate_backward, rope, dropout_forward,
//                        dropout_backward, head_rows; of sequences: pool_forward, pool_backward
//   columns [c0, c1), all rows in order (threads best take multiples of 16 columns):
//                        embedding_backward, norm_backward_columns, bias_backward
//   any n elements:      activation_forward, activation_backward, add_forward, add_backward, adamw, square_sum, fold
//   one kv head of one sequence, with the heads that it serves: attention_forward, attention_backward
// Pointers are those of the whole tensors, except where a function says otherwise. No alignment is asked for.

namespace babygpt {
namespace {

// In double, so not inlined into an instruction set that might fuse what is written here. `sum` of all logits matters only with smoothing.
BABYGPT_CALL inline double cross_entropy(float total, float biggest, float target, double smoothing, float sum, int vocab) {
    double loss = log_of(static_cast<double>(total)) + static_cast<double>(biggest) - (1 - smoothing) * static_cast<double>(target);
    if (smoothing > 0) loss -= smoothing * static_cast<double>(sum) / vocab;
    return loss;
}

template <class Set>
struct Rows {
    using V = typename Set::V;
    using U = typename Set::U;
    using Sums = typename Set::Sums;
    static constexpr int W = Set::width;

    // ---- parts of a vector ----

    // The vector at p, of which `left` elements exist; the others are 0.
    static BABYGPT_INLINE void get(V& v, const float* p, int left) {
        if (left >= W) Set::load(v, p);
        else Set::load_part(v, p, left);
    }
    static BABYGPT_INLINE void put(float* p, const V& v, int left) {
        if (left >= W) Set::store(p, v);
        else Set::store_part(p, v, left);
    }
    // The first n elements of `from` come to `to`.
    static BABYGPT_INLINE void take_first(V& to, const V& from, int n) {
        if (n >= W) {
            to = from;
            return;
        }
        U index, end;
        Set::count_up(index), Set::splat(end, static_cast<uint32_t>(most(n, 0)));
        to = index < end ? from : to;
    }
    // One part of sixteen sums: part += v, and part += a * b; `left` elements exist.
    static BABYGPT_INLINE void add(V& part, const V& v, int left) {
        const V sum = part + v;
        take_first(part, sum, left);
    }
    static BABYGPT_INLINE void add_product(V& part, const V& a, const V& b, int left) {
        V sum;
        Set::fma(sum, a, b, part);
        take_first(part, sum, left);
    }
    // 1 / sqrt(x) in every element. (Of a scalar, Clang under -ffast-math would only make an estimate.)
    static BABYGPT_INLINE void inverse_root(V& v, float x) {
        V one;
        Set::splat(one, 1.0f), Set::splat(v, x);
        Set::sqrt(v, v);
        v = one / v;
    }
    static BABYGPT_INLINE float first(const V& v) {
        typename Set::Lanes lane;
        Set::store(lane, v);
        return lane[0];
    }
    static BABYGPT_INLINE void copy(float* to, const float* from, int n) {
        V v;
        for (int i = 0; i < n; i += W) get(v, from + i, n - i), put(to + i, v, n - i);
    }

    // ---- embedding ----

    static BABYGPT_INLINE void embedding_forward(float* y, const float* token, const float* position, const int32_t* ids,
                                                 Span<const Sequence> sequences, int width, int r0, int r1) {
        for (const Sequence& s : sequences)
            for (int row = most(r0, s.row); row < least(r1, s.row + s.length); ++row) {
                const float* t = token + static_cast<int64_t>(ids[row]) * width;
                float* to = y + static_cast<int64_t>(row) * width;
                if (position) add_forward(to, t, position + static_cast<int64_t>(s.position + row - s.row) * width, width);
                else memcpy(to, t, static_cast<size_t>(width) * sizeof(float));
            }
    }
    static BABYGPT_INLINE void embedding_backward(float* dtoken, float* dposition, const float* dy, const int32_t* ids,
                                                  Span<const Sequence> sequences, int width, int c0, int c1) {
        for (const Sequence& s : sequences)
            for (int i = 0; i < s.length; ++i) {
                const float* d = dy + static_cast<int64_t>(s.row + i) * width + c0;
                add_backward(dtoken + static_cast<int64_t>(ids[s.row + i]) * width + c0, d, c1 - c0, true);
                if (dposition) add_backward(dposition + static_cast<int64_t>(s.position + i) * width + c0, d, c1 - c0, true);
            }
    }

    // ---- pool ----

    static BABYGPT_INLINE void pool_forward(float* y, const float* x, Span<const Sequence> sequences, int n, bool first, int r0, int r1) {
        for (int row = r0; row < r1; ++row) {
            const Sequence& s = sequences[static_cast<size_t>(row)];
            const float* rows = x + static_cast<int64_t>(s.row) * n;
            float* to = y + static_cast<int64_t>(row) * n;
            copy(to, rows, n);
            if (first) continue;
            for (int64_t i = 1; i < s.length; ++i) add_forward(to, to, rows + i * n, n);
            V v, length;
            Set::splat(length, static_cast<float>(s.length));
            for (int c = 0; c < n; c += W) get(v, to + c, n - c), v = v / length, put(to + c, v, n - c);
        }
    }
    static BABYGPT_INLINE void pool_backward(float* dx, const float* dy, Span<const Sequence> sequences, int n, bool first, bool adds,
                                             int r0, int r1) {
        V v, length, d;
        for (int row = r0; row < r1; ++row) {
            const Sequence& s = sequences[static_cast<size_t>(row)];
            Set::splat(length, static_cast<float>(s.length));
            for (int64_t i = 0; i < s.length; ++i)
                for (int c = 0; c < n; c += W) {
                    float* to = dx + (s.row + i) * n + c;
                    get(v, dy + static_cast<int64_t>(row) * n + c, n - c);
                    if (!first) v = v / length;
                    else if (i > 0) Set::splat(v, 0);
                    if (adds) get(d, to, n - c), v = d + v;
                    put(to, v, n - c);
                }
        }
    }

    // ---- norm ----

    static BABYGPT_INLINE void norm_forward(float* y, float* statistics, const float* x, const float* w, const float* b, int n,
                                            double epsilon, bool centred, int r0, int r1) {
        x += static_cast<int64_t>(r0) * n, y += static_cast<int64_t>(r0) * n, statistics += static_cast<int64_t>(r0) * 2;
        for (int row = r0; row < r1; ++row, x += n, y += n, statistics += 2) {
            V a, c, means, scales;
            Sums sums;
            for (int i = 0; i < n && centred; i += 16) {
                BABYGPT_UNROLL
                for (int j = 0; j < Set::parts; ++j) {
                    const int at = i + j * W, left = n - at;
                    if (left > 0) get(a, x + at, left), add(sums.part[j], a, left);
                }
            }
            const float mean = sums.total() / static_cast<float>(n);  // 0 where there is no sum
            Set::splat(means, mean);
            sums = Sums();
            for (int i = 0; i < n; i += 16) {
                BABYGPT_UNROLL
                for (int j = 0; j < Set::parts; ++j) {
                    const int at = i + j * W, left = n - at;
                    if (left > 0) get(a, x + at, left), a = a - means, add_product(sums.part[j], a, a, left);
                }
            }
            const float variance = sums.total() / static_cast<float>(n);
            inverse_root(scales, variance + static_cast<float>(epsilon));
            for (int i = 0; i < n; i += W) {
                get(a, x + i, n - i), get(c, w + i, n - i);
                a = (a - means) * scales;
                if (b) {
                    V bias;
                    get(bias, b + i, n - i);
                    Set::fma(a, a, c, bias);
                } else a = a * c;
                put(y + i, a, n - i);
            }
            statistics[0] = mean, statistics[1] = first(scales);
        }
    }
    static BABYGPT_INLINE void norm_backward_rows(float* dx, const float* dy, const float* x, const float* statistics, const float* w,
                                                  int n, bool centred, bool adds, int r0, int r1) {
        const int64_t start = static_cast<int64_t>(r0) * n;
        x += start, dy += start, dx += start, statistics += static_cast<int64_t>(r0) * 2;
        for (int row = r0; row < r1; ++row, x += n, dy += n, dx += n, statistics += 2) {
            V mean, scale, g, h, a, mean_g, mean_gh;
            Set::splat(mean, statistics[0]), Set::splat(scale, statistics[1]);
            Sums sums, products;
            for (int i = 0; i < n; i += 16) {
                BABYGPT_UNROLL
                for (int j = 0; j < Set::parts; ++j) {
                    const int at = i + j * W, left = n - at;
                    if (left <= 0) break;
                    get(g, dy + at, left), get(a, w + at, left), get(h, x + at, left);
                    Set::mul(g, g, a), h = (h - mean) * scale;
                    add(sums.part[j], g, left), add_product(products.part[j], g, h, left);
                }
            }
            Set::splat(mean_g, centred ? sums.total() / static_cast<float>(n) : 0.0f);
            Set::splat(mean_gh, products.total() / static_cast<float>(n));
            for (int i = 0; i < n; i += W) {
                get(g, dy + i, n - i), get(a, w + i, n - i), get(h, x + i, n - i);
                Set::mul(g, g, a), h = (h - mean) * scale, h = -h;
                Set::fma(h, h, mean_gh, g - mean_g);
                Set::mul(h, scale, h);
                if (adds) get(a, dx + i, n - i), h = a + h;
                put(dx + i, h, n - i);
            }
        }
    }
    // Rows by fours, so that sums stay in registers for a while.
    static BABYGPT_INLINE void norm_backward_columns(float* dw, float* db, const float* dy, const float* x, const float* statistics,
                                                     int rows, int n, int c0, int c1) {
        for (int row = 0; row < rows; row += 4) {
            const int64_t start = static_cast<int64_t>(row) * n;
            const int count = least(4, rows - row);
            for (int i = c0; i < c1; i += W) {
                const int left = c1 - i;
                V sum_w, sum_b = {}, d, h, mean, scale;
                get(sum_w, dw + i, left);
                if (db) get(sum_b, db + i, left);
                for (int r = 0; r < count; ++r) {
                    get(d, dy + start + static_cast<int64_t>(r) * n + i, left), get(h, x + start + static_cast<int64_t>(r) * n + i, left);
                    Set::splat(mean, statistics[(row + r) * 2]), Set::splat(scale, statistics[(row + r) * 2 + 1]);
                    h = (h - mean) * scale;
                    Set::fma(sum_w, d, h);
                    sum_b = sum_b + d;
                }
                put(dw + i, sum_w, left);
                if (db) put(db + i, sum_b, left);
            }
        }
    }
    // The bias of a linear op: db += sum over rows of dy.
    static BABYGPT_INLINE void bias_backward(float* db, const float* dy, int rows, int n, int c0, int c1) {
        for (int row = 0; row < rows; row += 4) {
            const float* d = dy + static_cast<int64_t>(row) * n;
            const int count = least(4, rows - row);
            for (int i = c0; i < c1; i += W) {
                V sum, v;
                get(sum, db + i, c1 - i);
                for (int r = 0; r < count; ++r) get(v, d + static_cast<int64_t>(r) * n + i, c1 - i), sum = sum + v;
                put(db + i, sum, c1 - i);
            }
        }
    }

    // ---- activations ----

    // normal_of, chapter 5, and the e^(-x^2/2) in it
    static BABYGPT_INLINE void normal(V& y, V& e, const V& x) {
        V t, one, none, c;
        Set::splat(none, 0), Set::splat(one, 1.0f);
        Set::splat(c, normal_p), Set::fma(t, x < none ? -x : x, c, one);
        t = one / t;
        Set::splat(c, -0.5f), e = x * x * c;
        Set::exp(e, e);
        y = none;
        BABYGPT_UNROLL
        for (const float term : normal_terms) Set::splat(c, term), Set::fma(y, y, t, c);
        Set::mul(y, y * t, e);
        y = x < none ? y : one - y;
    }
    // 1 + e^-u, u = x (b x^2 + a): the sigmoid's denominator
    static BABYGPT_INLINE void gelu_tanh_part(V& d, V& square, const V& x) {
        V a, b;
        Set::splat(a, static_cast<float>(gelu_a)), Set::splat(b, static_cast<float>(gelu_b));
        square = x * x;
        Set::fma(d, b, square, a);
        d = -(x * d);
        Set::exp(d, d);
        Set::splat(a, 1.0f);
        d = a + d;
    }
    static BABYGPT_INLINE void gelu_tanh(V& y, const V& x) {
        V d, square;
        gelu_tanh_part(d, square, x);
        y = x / d;
    }
    static BABYGPT_INLINE void gelu_tanh_derivative(V& y, const V& x) {
        V s, square, slope, one;
        gelu_tanh_part(s, square, x);
        Set::splat(one, 1.0f);
        s = one / s;
        V a, b;
        Set::splat(a, static_cast<float>(gelu_a)), Set::splat(b, static_cast<float>(3 * gelu_b));
        Set::fma(slope, b, square, a);
        Set::fma(y, x * s * (one - s), slope, s);
    }
    // Of all elements, y = activation(x) or its derivative there.
    static BABYGPT_INLINE void activate(V& y, const V& x, Activation activation) {
        V d, other;
        if (activation == Activation::gelu) {
            normal(d, other, x);
            y = x * d;
        } else if (activation == Activation::gelu_tanh) gelu_tanh(y, x);
        else if (activation == Activation::silu) {
            Set::splat(other, 1.0f);
            d = -x;
            Set::exp(d, d);
            y = x / (other + d);
        } else {
            Set::splat(other, 0);
            y = x > other ? x : other;
        }
    }
    static BABYGPT_INLINE void activate_derivative(V& y, const V& x, Activation activation) {
        V s, one;
        Set::splat(one, 1.0f);
        if (activation == Activation::gelu) {
            V density;
            normal(s, density, x);
            Set::splat(one, 0.39894228040143267794f);
            Set::fma(y, x * one, density, s);
        } else if (activation == Activation::gelu_tanh) gelu_tanh_derivative(y, x);
        else if (activation == Activation::silu) {
            s = -x;
            Set::exp(s, s);
            s = one / (one + s);
            Set::fma(y, x * s, one - s, s);
        } else {
            Set::splat(s, 0);
            y = x > s ? one : s;
        }
    }
    // y may be `before`.
    static BABYGPT_INLINE void activation_forward(float* y, const float* before, int64_t n, Activation activation) {
        for (int64_t i = 0; i < n; i += W) {
            const int left = static_cast<int>(least(n - i, static_cast<int64_t>(W)));
            V v;
            get(v, before + i, left), activate(v, v, activation), put(y + i, v, left);
        }
    }
    // dy = dy * derivative
    static BABYGPT_INLINE void activation_backward(float* dy, const float* before, int64_t n, Activation activation) {
        for (int64_t i = 0; i < n; i += W) {
            const int left = static_cast<int>(least(n - i, static_cast<int64_t>(W)));
            V v, d;
            get(v, before + i, left), get(d, dy + i, left);
            activate_derivative(v, v, activation);
            d = d * v;
            put(dy + i, d, left);
        }
    }
    static BABYGPT_INLINE void gate_forward(float* y, const float* x, int n, Activation activation, int r0, int r1) {
        for (int64_t row = r0; row < r1; ++row)
            for (int i = 0; i < n; i += W) {
                const float* from = x + row * 2 * n + i;
                V g, u;
                get(g, from, n - i), get(u, from + n, n - i);
                activate(g, g, activation);
                u = g * u;
                put(y + row * n + i, u, n - i);
            }
    }
    static BABYGPT_INLINE void gate_backward(float* dx, const float* dy, const float* x, int n, Activation activation, bool adds, int r0,
                                             int r1) {
        for (int64_t row = r0; row < r1; ++row)
            for (int i = 0; i < n; i += W) {
                const float* from = x + row * 2 * n + i;
                float* to = dx + row * 2 * n + i;
                V g, u, d, slope;
                get(g, from, n - i), get(u, from + n, n - i), get(d, dy + row * n + i, n - i);
                activate_derivative(slope, g, activation), activate(g, g, activation);
                Set::mul(u, d * u, slope), Set::mul(d, d, g);
                if (adds) get(g, to, n - i), u = g + u, get(g, to + n, n - i), d = g + d;
                put(to, u, n - i), put(to + n, d, n - i);
            }
    }

    // ---- positions ----

    static BABYGPT_INLINE void add_waves(float* x, const float* waves, Span<const Sequence> sequences, int width, bool backward, int r0,
                                         int r1) {
        V factor, v, wave;
        Set::splat(factor, static_cast<float>(width));
        Set::sqrt(factor, factor);
        for (const Sequence& s : sequences)
            for (int i = most(r0, s.row); i < least(r1, s.row + s.length); ++i)
                for (int c = 0; c < width; c += W) {
                    float* at = x + static_cast<int64_t>(i) * width + c;
                    get(v, at, width - c), get(wave, waves + static_cast<int64_t>(s.position + i - s.row) * width + c, width - c);
                    if (backward) v = v * factor;
                    else Set::fma(v, v, factor, wave);
                    put(at, v, width - c);
                }
    }
    static BABYGPT_INLINE void rope(float* x, const float* waves, Span<const Sequence> sequences, int heads, int kv_heads, int dim,
                                    int sign, int r0, int r1) {
        const int half = dim / 2;
        V signs;
        Set::splat(signs, static_cast<float>(sign));
        for (const Sequence& s : sequences)
            for (int i = most(r0, s.row); i < least(r1, s.row + s.length); ++i) {
                const float* cosine = waves + static_cast<int64_t>(s.position + i - s.row) * dim;
                float* row = x + static_cast<int64_t>(i) * (heads + 2 * kv_heads) * dim;
                for (int head = 0; head < heads + kv_heads; ++head, row += dim)
                    for (int k = 0; k < half; k += W) {
                        const int left = half - k;
                        V a, b, c, d, u, v;
                        get(a, row + k, left), get(b, row + half + k, left), get(c, cosine + k, left), get(d, cosine + half + k, left);
                        Set::mul(d, signs, d);
                        Set::mul(u, b, d), Set::mul(v, b, c);
                        Set::fma(u, a, c, -u), Set::fma(v, a, d, v);
                        put(row + k, u, left), put(row + half + k, v, left);
                    }
            }
    }

    // ---- dropout ----

    // What the elements i, i + 1, ... of the row with this key are multiplied by.
    static BABYGPT_INLINE void factors(V& f, const Dropout& drop, uint64_t key, int i) {
        U random, below;
        Set::random(random, key, static_cast<uint32_t>(i)), Set::splat(below, drop.below);
        V keep, none;
        Set::splat(keep, drop.keep), Set::splat(none, 0);
        f = random < below ? none : keep;
    }
    static BABYGPT_INLINE void dropout_forward(float* y, const float* x, const Dropout& drop, int n, int r0, int r1) {
        dropout_backward(y, x, drop, n, false, r0, r1);
    }
    static BABYGPT_INLINE void dropout_backward(float* dx, const float* dy, const Dropout& drop, int n, bool adds, int r0, int r1) {
        for (int64_t row = r0; row < r1; ++row) {
            const uint64_t key = drop.key(static_cast<int>(row));
            for (int i = 0; i < n; i += W) {
                V d, f, before;
                get(d, dy + row * n + i, n - i);
                if (drop.active()) factors(f, drop, key, i), Set::mul(d, d, f);
                if (adds) get(before, dx + row * n + i, n - i), d = before + d;
                put(dx + row * n + i, d, n - i);
            }
        }
    }

    // ---- add ----

    static BABYGPT_INLINE void add(float* y, const float* a, const float* b, int64_t n) {
        for (int64_t i = 0; i < n; i += W) {
            const int left = static_cast<int>(least(n - i, static_cast<int64_t>(W)));
            V v, u;
            get(v, a + i, left), get(u, b + i, left);
            v = v + u;
            put(y + i, v, left);
        }
    }
    static BABYGPT_INLINE void add_forward(float* y, const float* a, const float* b, int64_t n) { Called<Set>::add(y, a, b, n); }
    // For one of the operands.
    static BABYGPT_INLINE void add_backward(float* dx, const float* dy, int64_t n, bool adds) {
        if (adds) add_forward(dx, dx, dy, n);
        else memcpy(dx, dy, static_cast<size_t>(n) * sizeof(float));
    }

    // ---- softmax cross-entropy ----

    // Some rows of the output head; all pointers stand at the first of them, row r of logits at logits + r * stride. With `gradient`, the
    // logits become d loss / d logits in place (0 where the target is negative). ranks may be null.
    static BABYGPT_INLINE void head_rows(double* losses, int32_t* ranks, float* softmax, float* logits, int64_t stride,
                                         const int32_t* targets, int vocab, double smoothing, bool gradient, int rows) {
        for (int row = 0; row < rows; ++row, logits += stride, softmax += 2) {
            const int target = targets[row];
            losses[row] = 0;
            if (ranks) ranks[row] = 0;
            if (target < 0) {
                if (gradient) memset(logits, 0, static_cast<size_t>(vocab) * sizeof(float));
                continue;
            }
            const float wanted = logits[target], biggest = biggest_of(logits, vocab);
            if (ranks) ranks[row] = rank(logits, target, vocab);
            V a;
            float all = 0;
            if (smoothing > 0) {
                Sums sums;
                for (int i = 0; i < vocab; i += W) get(a, logits + i, vocab - i), add(sums.part[i / W % Set::parts], a, vocab - i);
                all = sums.total();
            }
            const float total = exponentials(gradient ? logits : nullptr, logits, vocab, biggest, 1);
            softmax[0] = biggest, softmax[1] = total;
            losses[row] = cross_entropy(total, biggest, wanted, smoothing, all, vocab);
            if (!gradient) continue;
            V inverse, share;
            Set::splat(inverse, 1.0f / total), Set::splat(share, static_cast<float>(smoothing / vocab));
            for (int i = 0; i < vocab; i += W) {
                get(a, logits + i, vocab - i);
                Set::mul(a, a, inverse);
                a = a - share;
                put(logits + i, a, vocab - i);
            }
            logits[target] = logits[target] - static_cast<float>(1 - smoothing);
        }
    }
    // exponentials, chapter 5
    static BABYGPT_INLINE float exponentials(float* to, const float* x, int n, float biggest, float factor) {
        V top, by, a;
        Sums sums;
        Set::splat(top, biggest), Set::splat(by, factor);
        for (int i = 0; i < n; i += 16) {
            BABYGPT_UNROLL
            for (int j = 0; j < Set::parts; ++j) {
                const int at = i + j * W, left = n - at;
                if (left <= 0) break;
                get(a, x + at, left);
                a = (a - top) * by;
                Set::exp(a, a);
                add(sums.part[j], a, left);
                if (to) put(to + at, a, left);
            }
        }
        return sums.total();
    }
    static BABYGPT_INLINE float biggest_of(const float* x, int n) {
        float best = x[0];
        int i = 0;
        if (n >= 4 * W) {
            V top[4], a;
            BABYGPT_UNROLL
            for (int j = 0; j < 4; ++j) Set::load(top[j], x + j * W);
            for (i = 4 * W; i + 4 * W <= n; i += 4 * W) {
                BABYGPT_UNROLL
                for (int j = 0; j < 4; ++j) Set::load(a, x + i + j * W), Set::larger(top[j], top[j], a);
            }
            Set::larger(top[0], top[0], top[1]), Set::larger(top[2], top[2], top[3]), Set::larger(top[0], top[0], top[2]);
            best = Set::biggest(top[0]);
        }
        for (; i < n; ++i) best = most(best, x[i]);
        return best;
    }
    // How many stand before the target, by logit, then by id.
    static BABYGPT_INLINE int32_t rank(const float* logits, int target, int vocab) {
        const float wanted = logits[target];
        int32_t count = 0;
        int i = 0;
        V w, a;
        U counts = {}, zero = {}, one;
        Set::splat(w, wanted), Set::splat(one, 1u);
        for (; i + W <= target; i += W) Set::load(a, logits + i), counts = counts + (a < w ? zero : one);
        for (; i < target || (i < vocab && i % W != 0); ++i) count += logits[i] > wanted || (i < target && !(logits[i] < wanted));
        for (; i + W <= vocab; i += W) Set::load(a, logits + i), counts = counts + (a > w ? one : zero);
        for (; i < vocab; ++i) count += logits[i] > wanted;
        uint32_t lane[static_cast<size_t>(W)];
        memcpy(lane, &counts, sizeof lane);
        for (int j = 0; j < W; ++j) count += static_cast<int32_t>(lane[j]);
        return count;
    }

    // ---- the update ----
    //
    // In whole vectors: there is room behind a weight, and behind Muon's matrices, up to a multiple of 16 elements.

    // What is nearer to 0 than 1e-30 becomes 0: moments of what gets no gradient would come to be subnormal numbers, which are slow.
    static BABYGPT_INLINE void flush(V& v) {
        U value, size, limit;
        Set::bits(value, v), Set::splat(size, 0x7fffffffu), Set::splat(limit, bits_as<uint32_t>(1e-30f));
        size = size & value;
        value = size < limit ? U{} : value;
        Set::from_bits(v, value);
    }
    static BABYGPT_INLINE void scale(float* to, const float* from, int64_t n, float factor) {
        V v, f;
        Set::splat(f, factor);
        for (int64_t i = 0; i < n; i += W) {
            Set::load(v, from + i);
            v = v * f;
            Set::store(to + i, v);
        }
    }
    static BABYGPT_INLINE void muon_momentum(float* w, float* m, float* g, int64_t n, const Muon& a) {
        V scale, momentum, rest, keep;
        Set::splat(scale, a.gradient_scale), Set::splat(momentum, a.momentum), Set::splat(rest, a.one_minus_momentum),
            Set::splat(keep, a.keep);
        for (int64_t i = 0; i < n; i += W) {
            V weight, first, gradient;
            Set::load(weight, w + i), Set::load(first, m + i), Set::load(gradient, g + i);
            Set::mul(gradient, gradient, scale), Set::mul(gradient, rest, gradient);
            Set::fma(first, momentum, first, gradient);
            flush(first);
            Set::fma(gradient, momentum, first, gradient);
            weight = weight * keep;
            Set::store(w + i, weight), Set::store(m + i, first), Set::store(g + i, gradient);
        }
    }
    // Also zeroes the gradients.
    static BABYGPT_INLINE void adamw(float* w, float* m, float* v, float* g, int64_t n, const AdamW& a, bool decays) {
        V scale, beta1, beta2, rest1, rest2, step, root_scale, epsilon, decay, none;
        Set::splat(scale, a.gradient_scale), Set::splat(beta1, a.beta1), Set::splat(beta2, a.beta2), Set::splat(rest1, a.one_minus_beta1),
            Set::splat(rest2, a.one_minus_beta2);
        Set::splat(step, -a.step_size), Set::splat(root_scale, a.root_scale), Set::splat(epsilon, a.epsilon),
            Set::splat(decay, decays ? -a.decay : -0.0f);
        Set::splat(none, 0);
        for (int64_t i = 0; i < n; i += W) {
            V weight, first, second, gradient, size;
            Set::load(weight, w + i), Set::load(first, m + i), Set::load(second, v + i), Set::load(gradient, g + i);
            gradient = gradient * scale;
            Set::fma(first, beta1, first, rest1 * gradient);
            Set::fma(second, beta2, second, rest2 * (gradient * gradient));
            flush(first), flush(second);
            Set::store(m + i, first), Set::store(v + i, second), Set::store(g + i, none);
            Set::sqrt(size, second);
            Set::fma(size, size, root_scale, epsilon);
            first = first / size;
            Set::fma(weight, decay, weight, weight);
            Set::fma(weight, step, first, weight);
            Set::store(w + i, weight);
        }
    }
    // Of at most square_block elements. (The square of a float is exact in double.)
    static BABYGPT_INLINE double square_sum(const float* g, int n) {
        Lanes<double> lanes;
        int i = 0;
#if BABYGPT_VECTORS
        constexpr int half = W / 2;
        using Half = VectorTypes<half>;
        typename Half::D part[static_cast<size_t>(16 / half)] = {}, d;
        for (; i + 16 <= n; i += 16) {
            BABYGPT_UNROLL
            for (int j = 0; j < 16 / half; ++j) {
                typename Half::V v;
                memcpy(&v, g + i + j * half, sizeof v);
                d = __builtin_convertvector(v, typename Half::D);
                part[j] = d * d + part[j];
            }
        }
        BABYGPT_UNROLL
        for (int j = 0; j < 16 / half; ++j) memcpy(lanes.lane + j * half, &part[j], sizeof part[j]);
#endif
        for (; i < n; ++i) lanes.lane[i % 16] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
        return lanes.total();
    }
    // g += lookup, lookup = 0
    static BABYGPT_INLINE void fold(float* g, float* lookup, int64_t n) {
        add_forward(g, g, lookup, n);
        memset(lookup, 0, static_cast<size_t>(n) * sizeof(float));
    }

    // ---- attention ----
    //
    // Products of small matrices, by tiles of `tall` rows by `wide` columns in registers:
    //   forward, for `tall` queries: scores = q K^T, softmax along each row, y = p V;
    //   backward, for blocks of queries and keys: scores and dp = dy V^T, from these p and ds, then dq += ds K, dk += ds^T q, dv += p^T dy.
    // Queries of a tile see different numbers of keys: what all see is one product; the triangle that is left follows (or, for dk and dv,
    // comes first), so that nothing is added to a chain that is not in it. Scores above the diagonal are computed where a tile holds them,
    // and not used.

    static constexpr int tall = Set::calls ? 2 : 6, wide = 2 * W, block = tall * W;  // block: a multiple of both
    static constexpr int together = W == 16 ? 2 : 4, wide_single = together * W;     // of one row: more columns, a divisor of a page
    static constexpr int page = kv_page;

    // c[r][0..columns) += sum over k < n of a[r * a_row + k * a_step] * b[k * b_row + 0..columns); fresh: c was 0.
    template <int rows, int columns = wide>
    static BABYGPT_INLINE void tile(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                    int n, bool fresh) {
        if constexpr (rows == tall && columns == wide) Called<Set>::tile(c, c_row, fresh ? nullptr : c, a, a_row, a_step, b, b_row, n);
        else Products<Set>::template tile<rows, columns, 1>(c, c_row, fresh ? nullptr : c, c_row, a, a_row, a_step, b, b_row, n);
    }
    // One row: c[0..columns) += sum over k < n of a[k] * b[k * b_row + 0..columns), for so many vectors of columns; fresh: c was 0. Of what
    // is read after this it fetches as much as it reads: rows at `next` (null: none).
    template <int vectors>
    static BABYGPT_INLINE void single(float* c, const float* a, const float* b, int64_t b_row, int n, bool fresh, const float* next) {
        V sum[static_cast<size_t>(vectors)], left, right;
        BABYGPT_UNROLL
        for (int j = 0; j < vectors; ++j) {
            if (fresh) Set::splat(sum[j], 0);
            else Set::load(sum[j], c + j * W);
        }
        for (int k = 0; k < n; ++k, b += b_row) {
            if (next) {
                BABYGPT_UNROLL
                for (int i = 0; i < vectors * W; i += 16) prefetch(next + i);
                next += b_row;
            }
            Set::splat(left, a[k]);
            BABYGPT_UNROLL
            for (int j = 0; j < vectors; ++j) Set::load(right, b + j * W), Set::fma(sum[j], left, right);
        }
        BABYGPT_UNROLL
        for (int j = 0; j < vectors; ++j) Set::store(c + j * W, sum[j]);
    }
    // The triangle of a tile: step e = 0..count-1 adds a[r * a_row + e * a_step] * b[e][0..wide) to the rows r > e (lower: r <= e).
    template <bool lower>
    static BABYGPT_INLINE void triangle(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_step, const float* const* b,
                                        int64_t b_column, int count) {
        V sum[static_cast<size_t>(tall)][2], b0, b1, s;
        BABYGPT_UNROLL
        for (int r = 0; r < tall; ++r) Set::load(sum[r][0], c + r * c_row), Set::load(sum[r][1], c + r * c_row + W);
        BABYGPT_UNROLL
        for (int e = 0; e < tall - 1; ++e) {
            if (e >= count) break;
            Set::load(b0, b[e] + b_column), Set::load(b1, b[e] + b_column + W);
            BABYGPT_UNROLL
            for (int r = 0; r < tall; ++r) {
                if (lower ? r > e : r <= e) continue;
                Set::splat(s, a[r * a_row + e * a_step]);
                Set::fma(sum[r][0], s, b0), Set::fma(sum[r][1], s, b1);
            }
        }
        BABYGPT_UNROLL
        for (int r = 0; r < tall; ++r) Set::store(c + r * c_row, sum[r][0]), Set::store(c + r * c_row + W, sum[r][1]);
    }

    // Floats of scratch for one thread. `keys`: the longest position + length of a sequence.
    static int64_t attention_scratch(int keys, int dim, bool training) {
        const int64_t padded = round_up(dim, wide), pages = round_up(keys, page), blocks = round_up(keys, block);
        const int64_t forward = tall * (dim + padded + pages) + pages * (dim + padded);
        const int64_t backward = blocks * (3 * padded + 1) + block * (3 * padded + 2 * dim + 2 * block);
        return round_up(training ? most(forward, backward) : forward, static_cast<int64_t>(16));
    }

    // Where the keys and values of one head are: in the pages of a KV cache, or, packed in the same way, in scratch.
    struct Cache {
        float *keys, *values;  // in scratch: pages of keys [dim][page], values [position][row]
        float* const* pages;   // null: no KV cache
        int64_t offset;        // of this layer and head in a page
        int64_t value_offset;  // from keys to values
        int dim, row;          // row: from one position's values to the next
        bool copied;           // the values are in scratch
        BABYGPT_INLINE float* key_page(int i) const { return pages ? pages[i] + offset : keys + static_cast<int64_t>(i) * page * dim; }
        BABYGPT_INLINE float* value_page(int i) const { return pages[i] + offset + value_offset; }
        BABYGPT_INLINE const float* value(int position) const {
            return copied ? values + static_cast<int64_t>(position) * row : value_page(position / page) + position % page * dim;
        }
    };

    static BABYGPT_INLINE void attention_forward(const Attention<float>& a, const Dropout& drop, int kv_head, float* scratch) {
        const int64_t kv_column = static_cast<int64_t>(kv_head) * a.dim;
        const int dim = a.dim, before = a.before, keys = before + a.keys, padded = round_up(dim, wide);
        const bool cached = a.has_cache();
        const float *new_keys = a.k + kv_column, *new_values = a.v + kv_column;
        float *queries = scratch, *out = queries + tall * dim, *scores = out + tall * padded, inverse[static_cast<size_t>(tall)] = {};
        const int64_t scores_row = round_up(keys, page);
        Cache cache;
        cache.keys = scores + tall * scores_row;
        cache.values = cache.keys + scores_row * dim;
        cache.pages = cached ? a.s.pages : nullptr;
        cache.offset = (a.layer * 2 * a.kv_width + kv_column) * page;
        cache.value_offset = a.kv_width * page;
        cache.dim = dim, cache.row = padded;
        cache.copied = !cached || padded != dim;  // a tile reads whole vectors
        for (int i = 0, n; i < a.keys; i += n) {
            const int at = (before + i) % page;
            n = least(page - at, a.keys - i);
            const int64_t from = i * a.k_stride;
            transpose(cache.key_page((before + i) / page) + at, page, new_keys + from, a.k_stride, n, dim);
            if (cached) copy_rows(cache.value_page((before + i) / page) + at * dim, dim, new_values + from, a.k_stride, n, dim, dim);
        }
        if (!cached) copy_rows(cache.values, padded, new_values, a.k_stride, a.keys, dim, padded);
        else if (cache.copied)
            for (int64_t k = 0; k < keys; k += page) {
                const int n = static_cast<int>(least(static_cast<int64_t>(page), keys - k));
                copy_rows(cache.values + k * padded, padded, cache.value_page(static_cast<int>(k) / page), dim, n, dim, padded);
            }

        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
            const int64_t column = static_cast<int64_t>(head) * dim;
            const float* q = a.q + column;
            for (int i = 0, n; i < a.queries; i += n) {
                n = least(tall, a.queries - i);
                if (n <= 2) n = 1;  // one by one
                const int first = a.seen_by(i), last = a.seen_by(i + n - 1);
                copy_rows(queries, dim, q + i * a.q_stride, a.q_stride, n, dim, dim);
                for (int j = n * dim; j < tall * dim && n > 1; ++j) queries[j] = 0;
                if (n == 1) scores_of_one(scores, queries, cache, last);
                else scores_of(scores, scores_row, queries, cache, last);
                for (int r = 0; r < n; ++r) {
                    float* statistics = a.softmax + (static_cast<int64_t>(i + r) * a.heads + head) * 2;
                    softmax_row(scores + r * scores_row, a.seen_by(i + r), dim, drop, a.row + i + r, head, statistics);
                    inverse[r] = 1.0f / statistics[1];
                }
                if (n == 1) mix_values_of_one(out, scores, cache, first);
                else mix_values(out, scores, scores_row, cache, first, last - first);
                for (int r = 0; r < n; ++r) {
                    float* to = a.y + (i + r) * a.width + column;
                    V v, scale;
                    Set::splat(scale, inverse[r]);
                    for (int d = 0; d < dim; d += W) {
                        Set::load(v, out + r * padded + d);
                        v = v * scale;
                        put(to + d, v, dim - d);
                    }
                }
            }
        }
    }
    static BABYGPT_INLINE void scores_of(float* scores, int64_t scores_row, const float* queries, const Cache& cache, int keys) {
        for (int k = 0; k < keys; k += wide)
            tile<tall>(scores + k, scores_row, queries, cache.dim, 1, cache.key_page(k / page) + k % page, page, cache.dim, true);
    }
    // A query alone reads all keys and values for little arithmetic: what sets the time is how early they are fetched.
    static BABYGPT_INLINE void scores_of_one(float* scores, const float* query, const Cache& cache, int keys) {
        for (int k = 0; k < keys; k += page) {
            const float* next = k + page < keys ? cache.key_page(k / page + 1) : cache.value(0);
            for (int c = 0; c < page; c += wide_single)
                single<together>(scores + k + c, query, cache.key_page(k / page) + c, page, cache.dim, true, next + c);
        }
    }
    // Scores become e^(score / sqrt(dim) - max), dropped or not; the maximum and the sum before dropout go to `statistics`.
    static BABYGPT_INLINE void softmax_row(float* scores, int keys, int dim, const Dropout& drop, int row, int head, float* statistics) {
        V scale, top, v;
        inverse_root(scale, static_cast<float>(dim));
        Set::splat(top, scores[0]);
        top = top * scale;
        for (int k = 0; k < keys; k += W) {
            Set::load(v, scores + k);
            Set::mul(v, v, scale);
            Set::store(scores + k, v);
            if (k + W <= keys) Set::larger(top, top, v);
        }
        float biggest = Set::biggest(top);
        for (int k = keys / W * W; k < keys; ++k) biggest = most(biggest, scores[k]);
        Set::splat(top, biggest);
        Sums sums;
        for (int k = 0; k < keys; k += 16) {  // scores has room for whole vectors
            BABYGPT_UNROLL
            for (int j = 0; j < Set::parts; ++j) {
                const int at = k + j * W;
                Set::load(v, scores + at);
                v = v - top;
                Set::exp(v, v);
                if (at < keys) add(sums.part[j], v, keys - at);
                Set::store(scores + at, v);
            }
        }
        statistics[0] = biggest, statistics[1] = sums.total();
        if (!drop.active()) return;
        const uint64_t key = drop.key(row);
        for (int k = 0; k < keys; k += W) {
            Set::load(v, scores + k), factors(scale, drop, key, head * 65536 + k);
            v = v * scale;
            Set::store(scores + k, v);
        }
    }
    // out = p V. All queries see `keys` keys; then each sees one more than the one before, up to `more`.
    static BABYGPT_INLINE void mix_values(float* out, const float* p, int64_t p_row, const Cache& cache, int keys, int more) {
        const float* last[static_cast<size_t>(tall - 1)] = {};
        for (int e = 0; e < more; ++e) last[e] = cache.value(keys + e);
        const int run = cache.copied ? keys : page;  // so many follow each other in memory
        for (int c = 0; c < cache.row; c += wide) {
            for (int k = 0; k < keys; k += run)
                tile<tall>(out + c, cache.row, p + k, p_row, 1, cache.value(k) + c, cache.row, least(run, keys - k), k == 0);
            triangle<false>(out + c, cache.row, p + keys, p_row, 1, last, c, more);
        }
    }
    static BABYGPT_INLINE void mix_values_of_one(float* out, const float* p, const Cache& cache, int keys) {
        const int run = cache.copied ? keys : page, most_columns = 2 * wide_single;
        for (int k = 0; k < keys; k += run) {
            const float *value = cache.value(k), *next = k + run < keys ? cache.value(k + run) : cache.key_page(0) + page * cache.dim;
            const int n = least(run, keys - k);
            int c = 0;  // the keys of the next head lie behind those of this one
            for (; c + most_columns <= cache.row; c += most_columns)
                single<2 * together>(out + c, p + k, value + c, cache.row, n, k == 0, next + c);
            for (; c < cache.row; c += wide) single<2>(out + c, p + k, value + c, cache.row, n, k == 0, next + c);
        }
    }

    // These heads' part of the gradients, head after head.
    static BABYGPT_INLINE void attention_backward(const Attention<float>& a, const Dropout& drop, int kv_head, float* scratch) {
        for (int i = 0; i < a.group; ++i) head_backward(a, drop, a.adds_kv || i > 0, kv_head * a.group + i, kv_head, scratch);
    }
    // kv_adds: to the gradients of keys and values.
    static BABYGPT_INLINE void head_backward(const Attention<float>& a, const Dropout& drop, bool kv_adds, int head, int kv_head,
                                             float* scratch) {
        const int64_t column = static_cast<int64_t>(head) * a.dim, kv_column = static_cast<int64_t>(kv_head) * a.dim;
        const int n = a.queries, dim = a.dim, rows = round_up(n, block), padded = round_up(dim, wide);
        float *q = scratch, *dout = q + rows * padded, *dq = dout + rows * padded, *D = dq + rows * padded;  // of the sequence
        float *k = D + rows, *kt = k + block * padded, *vt = kt + block * dim, *dk = vt + block * dim,
              *dv = dk + block * padded;                          // of a block
        float *p = dv + block * padded, *ds = p + block * block;  // [queries][keys]
        const float *y = a.y + column, *softmax = a.softmax + 2 * head;
        copy_rows(q, padded, a.q + column, a.q_stride, n, dim, padded);
        copy_rows(dout, padded, a.dy + column, a.width, n, dim, padded);
        memset(q + n * padded, 0, static_cast<size_t>((rows - n) * padded) * sizeof(float));
        memset(dout + n * padded, 0, static_cast<size_t>((rows - n) * padded) * sizeof(float));
        start_rows(dq, padded, a.dq + column, a.q_stride, n, dim, a.adds_q);
        for (int i = 0; i < n; ++i) D[i] = dot(dout + i * padded, y + i * a.width, dim);

        for (int k0 = 0; k0 < a.keys; k0 += block) {
            const int keys = least(block, a.keys - k0);
            const int64_t at = k0 * a.k_stride + kv_column;
            const float *key = a.k + at, *value = a.v + at;
            float *dkey = a.dk + at, *dvalue = a.dv + at;
            copy_rows(k, padded, key, a.k_stride, keys, dim, padded);
            for (int which = 0; which < 2; ++which) {  // keys, values: one text, so that it is compiled once
                transpose(which ? vt : kt, block, which ? value : key, a.k_stride, keys, dim);
                start_rows(which ? dv : dk, padded, which ? dvalue : dkey, a.k_stride, keys, dim, kv_adds);
            }
            for (int q0 = a.causal ? k0 : 0; q0 < n; q0 += block) {
                const int queries = least(block, n - q0);
                const bool diagonal = a.causal && q0 == k0;
                const float *q_block = q + q0 * padded, *dout_block = dout + q0 * padded;
                for (int i = 0; i < queries; i += tall)
                    for (int j = 0; j < (diagonal ? least(i + tall, keys) : keys); j += wide)
                        for (int which = 0; which < 2; ++which)
                            tile<tall>((which ? ds : p) + i * block + j, block, (which ? dout_block : q_block) + i * padded, padded, 1,
                                       (which ? vt : kt) + j, block, dim, true);
                for (int i = 0; i < queries; ++i)
                    softmax_row_backward(p + i * block, ds + i * block, D[q0 + i], softmax + static_cast<int64_t>(q0 + i) * a.heads * 2,
                                         diagonal ? i + 1 : keys, dim, drop, a.row + q0 + i, head * 65536 + k0);
                mix_keys(dq + q0 * padded, ds, k, padded, queries, keys, diagonal);
                for (int which = 0; which < 2; ++which)
                    mix_queries(which ? dv : dk, which ? p : ds, which ? dout_block : q_block, padded, queries, keys, diagonal);
            }
            for (int which = 0; which < 2; ++which) copy_rows(which ? dvalue : dkey, a.k_stride, which ? dv : dk, padded, keys, dim, dim);
        }
        copy_rows(a.dq + column, a.q_stride, dq, padded, n, dim, dim);
    }
    static BABYGPT_INLINE float dot(const float* a, const float* b, int n) {
        Sums sums;
        V v, u;
        for (int i = 0; i < n; i += 16) {
            BABYGPT_UNROLL
            for (int j = 0; j < Set::parts; ++j) {
                const int at = i + j * W, left = n - at;
                if (left > 0) get(v, a + at, left), get(u, b + at, left), add_product(sums.part[j], v, u, left);
            }
        }
        return sums.total();
    }
    // p holds scores, ds holds dp. They become p f and ds; `element`: of the first key in the row's random numbers.
    static BABYGPT_INLINE void softmax_row_backward(float* p, float* ds, float D, const float* statistics, int keys, int dim,
                                                    const Dropout& drop, int row, int element) {
        V scale, top, inverse, delta, a, b, f;
        inverse_root(scale, static_cast<float>(dim)), Set::splat(top, statistics[0]), Set::splat(inverse, 1.0f / statistics[1]);
        Set::splat(delta, D);
        const uint64_t key = drop.key(row);
        for (int j = 0; j < keys; j += W) {
            Set::load(a, p + j), Set::load(b, ds + j);
            Set::mul(a, a, scale);
            a = a - top;
            Set::exp(a, a);
            a = a * inverse;
            if (drop.active()) {
                factors(f, drop, key, element + j);
                Set::mul(b, b, f);
                b = a * (b - delta) * scale, a = a * f;
            } else b = a * (b - delta) * scale;
            Set::store(p + j, a), Set::store(ds + j, b);
        }
    }
    // What chains start from: what is there, or 0.
    static BABYGPT_INLINE void start_rows(float* to, int padded, const float* from, int64_t from_row, int rows, int dim, bool adds) {
        if (adds) copy_rows(to, padded, from, from_row, rows, dim, padded);
        else memset(to, 0, static_cast<size_t>(rows) * static_cast<size_t>(padded) * sizeof(float));
    }
    // d[query] += sum over the block's keys of a[query][key] * b[key]
    static BABYGPT_INLINE void mix_keys(float* d, const float* a, const float* b, int padded, int queries, int keys, bool diagonal) {
        const float* last[static_cast<size_t>(tall - 1)] = {};
        for (int i = 0; i < queries; i += tall) {
            for (int e = 0; e < tall - 1; ++e) last[e] = b + (i + 1 + e) * padded;
            for (int c = 0; c < padded; c += wide) {
                float* to = d + i * padded + c;
                tile<tall>(to, padded, a + i * block, block, 1, b + c, padded, diagonal ? i + 1 : keys, false);
                if (diagonal) triangle<false>(to, padded, a + i * block + i + 1, block, 1, last, c, least(tall, queries - i) - 1);
            }
        }
    }
    // d[key] += sum over the block's queries of a[query][key] * b[query]
    static BABYGPT_INLINE void mix_queries(float* d, const float* a, const float* b, int padded, int queries, int keys, bool diagonal) {
        const float* first[static_cast<size_t>(tall - 1)] = {};
        for (int j = 0; j < keys; j += tall) {
            const int start = diagonal ? least(j + tall - 1, queries) : 0;  // from here on, every query sees all keys of the tile
            for (int e = 0; e < tall - 1; ++e) first[e] = b + (j + e) * padded;
            for (int c = 0; c < padded; c += wide) {
                float* to = d + j * padded + c;
                if (diagonal) triangle<true>(to, padded, a + j * block + j, 1, block, first, c, start - j);
                tile<tall>(to, padded, a + start * block + j, 1, block, b + start * padded + c, padded, queries - start, false);
            }
        }
    }
};

}  // namespace
}  // namespace babygpt
// =====================================================================================================================
// [CHAPTER 11] The fast backend
// =====================================================================================================================
// Which processor is this, how is the work divided, and in which order does the tape run? The kernels are compiled once for every
// instruction set, by wrappers of one line, and chosen at run time. Threads divide the outputs of an op, never the terms of a sum.

namespace babygpt {
namespace {

// ---- what a thread does at a time ----------------------------------------------------------------------------------------

// Some of an op's units: rows, heads of sequences (attention), or groups of 16 columns (gradients of vectors, and of embeddings).
constexpr int column_group = 16;
struct Work {
    const Tape& tape;
    const Regions<float>& r;
    const Run& run;
    int number;               // of the op
    bool by_columns = false;  // backward: the part whose sums run along all rows
    float* logits = nullptr;  // head: a chunk of rows, from first_row on
    int64_t logits_stride = 0;
    int first_row = 0, chunk = 0;
    bool logits_gradient = false;
};

template <class Set>
BABYGPT_INLINE void forward_part(const Work& work, int from, int to) {
    using R = Rows<Set>;
    const Op& op = work.tape.ops[static_cast<size_t>(work.number)];
    const Run& run = work.run;
    const Stream in = run.on(op.side);
    const float *x = values(work.tape, work.r, op.x), *w = weights(work.tape, work.r, op.w), *b = weights(work.tape, work.r, op.b);
    float *y = values(work.tape, work.r, op.y), *aux = values(work.tape, work.r, op.aux);
    const int64_t first = static_cast<int64_t>(from) * op.out, count = static_cast<int64_t>(to - from) * op.out;
    switch (op.kind) {
        case OpKind::input:
            return R::copy(y + first, run.features + first, static_cast<int>(count));
        case OpKind::embedding:
            return R::embedding_forward(y, w, b, in.ids, in.sequences, op.out, from, to);
        case OpKind::norm:
            return R::norm_forward(y, aux, x, w, b, op.in, work.tape.epsilon, op.centred, from, to);
        case OpKind::waves:
            return R::add_waves(y, work.tape.waves.items, in.sequences, op.in, false, from, to);
        case OpKind::linear:
            return R::activation_forward(y + first, (aux ? aux : y) + first, count, op.activation);
        case OpKind::gate:
            return R::gate_forward(y, x, op.out, op.activation, from, to);
        case OpKind::rope:
            return R::rope(y, work.tape.waves.items, in.sequences, op.heads, op.kv_heads, op.dim(), 1, from, to);
        case OpKind::dropout:
            return R::dropout_forward(y, x, Dropout(run, work.number, op.side), op.in, from, to);
        case OpKind::add:
            return R::add_forward(y + first, x + first, values(work.tape, work.r, op.x2) + first, count);
        case OpKind::pool:
            return R::pool_forward(y, x, run.sequences, op.in, op.first, from, to);
        case OpKind::attention:
            return;  // apart, below
        case OpKind::head: {
            const int row = work.first_row + from;
            int32_t* ranks = work.r.ranks ? work.r.ranks + row : nullptr;
            R::head_rows(work.r.losses + row, ranks, aux + 2 * static_cast<int64_t>(row), work.logits + from * work.logits_stride,
                         work.logits_stride, run.targets + row, op.out, run.label_smoothing, work.logits_gradient, to - from);
            for (int i = from; i < to && run.row_weights && work.logits_gradient; ++i) {
                float* logits = work.logits + i * work.logits_stride;
                R::scale(logits, logits, op.out, run.row_weights[work.first_row + i]);
            }
            return;
        }
    }
}

template <class Set>
BABYGPT_INLINE void backward_part(const Work& work, int from, int to) {
    using R = Rows<Set>;
    const Tape& tape = work.tape;
    const Op& op = tape.ops[static_cast<size_t>(work.number)];
    const Run& run = work.run;
    const Stream in = run.on(op.side);
    const float *x = values(tape, work.r, op.x), *aux = values(tape, work.r, op.aux), *w = weights(tape, work.r, op.w);
    float *dx = gradient(tape, work.r, op.x), *dx2 = gradient(tape, work.r, op.x2), *dy = gradient(tape, work.r, op.y);
    float *dw = weight_gradient(tape, work.r, op.w), *db = weight_gradient(tape, work.r, op.b);
    const int64_t first = static_cast<int64_t>(from) * op.out, count = static_cast<int64_t>(to - from) * op.out;
    const int column = from * column_group, end = least(to * column_group, op.out);
    switch (op.kind) {
        case OpKind::embedding:
            if (op.lookup != nothing) dw = work.r.lookup_gradients + op.lookup * tape.one_lookup();
            return R::embedding_backward(dw, db, dy, in.ids, in.sequences, op.out, column, end);
        case OpKind::norm:
            if (work.by_columns) return R::norm_backward_columns(dw, db, dy, x, aux, in.rows, op.in, column, end);
            return R::norm_backward_rows(dx, dy, x, aux, w, op.in, op.centred, op.adds_to_dx, from, to);
        case OpKind::waves:
            return R::add_waves(dx, tape.waves.items, in.sequences, op.in, true, from, to);
        case OpKind::linear:
            // By columns: the slope of the activation, and, while four rows are in the first cache, the bias. By rows: the slope alone.
            for (int row = work.by_columns ? 0 : from, left; (left = (work.by_columns ? in.rows : to) - row) > 0; row += 4) {
                const int64_t at = static_cast<int64_t>(row) * op.out, c0 = work.by_columns ? column : 0,
                              c1 = work.by_columns ? end : op.out;
                for (int i = 0; i < least(4, left) && op.activation != Activation::none; ++i)
                    R::activation_backward(dy + at + i * op.out + c0, aux + at + i * op.out + c0, c1 - c0, op.activation);
                if (work.by_columns) R::bias_backward(db, dy + at, least(4, left), op.out, column, end);
            }
            return;
        case OpKind::gate:
            return R::gate_backward(dx, dy, x, op.out, op.activation, op.adds_to_dx, from, to);
        case OpKind::rope:
            return R::rope(dx, tape.waves.items, in.sequences, op.heads, op.kv_heads, op.dim(), -1, from, to);
        case OpKind::dropout:
            return R::dropout_backward(dx, dy, Dropout(run, work.number, op.side), op.in, op.adds_to_dx, from, to);
        case OpKind::add:
            if (dx) R::add_backward(dx + first, dy + first, count, op.adds_to_dx);
            if (dx2) R::add_backward(dx2 + first, dy + first, count, op.adds_to_dx2);
            return;
        case OpKind::pool:
            return R::pool_backward(dx, dy, run.sequences, op.in, op.first, op.adds_to_dx, from, to);
        case OpKind::head:
            return R::bias_backward(db, work.logits, work.chunk, static_cast<int>(work.logits_stride), column, end);
        case OpKind::input:
        case OpKind::attention:
            return;
    }
}

// From unit to unit: the kv heads of the first sequence, of the second one, and so on. (Apart from the others, since a compiler takes longer
// for one long function than for two.)
template <class Set>
BABYGPT_INLINE void attention_part(const Work& work, int from, int to, float* space, bool backward) {
    const Op& op = work.tape.ops[static_cast<size_t>(work.number)];
    const Dropout drop(work.run, work.number, op.side);
    for (int i = from; i < to; ++i) {
        const Attention<float> a(work.tape, work.r, work.run, op, static_cast<size_t>(i / op.kv_heads));
        if (backward) Rows<Set>::attention_backward(a, drop, i % op.kv_heads, space);
        else Rows<Set>::attention_forward(a, drop, i % op.kv_heads, space);
    }
}

// What happens to a weight after the backward pass, in blocks of square_block elements.
struct Update {
    enum What { folding, squaring, stepping, gathering, scaling } what;
    int64_t size;
    float *g, *lookup = nullptr;
    const float* from = nullptr;
    float factor = 0;
    double* partial = nullptr;
    float *w = nullptr, *m = nullptr, *v = nullptr;
    const UpdateRule* rule = nullptr;
    bool decays = false;
};
template <class Set>
BABYGPT_INLINE void update_part(const Update& u, int from, int to) {
    using R = Rows<Set>;
    const int64_t at = from * square_block, n = least(to * square_block, u.size) - at;
    if (u.what == Update::folding) R::fold(u.g + at, u.lookup + at, n);
    else if (u.what == Update::stepping) R::adamw(u.w + at, u.m + at, u.v + at, u.g + at, n, u.rule->adam, u.decays);
    else if (u.what == Update::gathering) R::muon_momentum(u.w + at, u.m + at, u.g + at, n, u.rule->muon);
    else if (u.what == Update::scaling) R::scale(u.g + at, u.from + at, n, u.factor);
    else
        for (int i = from; i < to; ++i)
            u.partial[i] = R::square_sum(u.g + i * square_block, static_cast<int>(least(square_block, u.size - i * square_block)));
}

// ---- one table of kernels for each instruction set -----------------------------------------------------------------------

// A way to multiply matrices. The depth of a panel, and of the products that `block` gets, is counted in words: of one number, or of two.
struct ProductKernels {
    const char* name;
    int tile_rows, tile_columns, numbers, depth_unit;
    bool packs_a;  // always, not only where its depth runs down
    void (*pack_a)(float* to, const Factor& a, int row, int depth, int rows);
    void (*pack_b)(float* to, const Factor& b, int column, int depth, int columns);
    void (*block)(const Product& p, const float* a, const float* b, int row, int column, int end);
    double (*ceiling)(int64_t rounds, float* result);
    int words(int depth) const { return round_up((depth + numbers - 1) / numbers, depth_unit); }
};
struct Kernels {
    const char* name;
    ProductKernels exact, rounded;
    int64_t (*attention_scratch)(int keys, int dim, bool training);
    int64_t (*panel_floats)(Dtype dtype, int depth);
    void (*pack_weights)(float* to, const Factor& b, int column, int depth, int columns, Dtype dtype);
    void (*single_row)(const Product& p, const float* b, int column, int end);
    void (*forward)(const Work& work, int from, int to);
    void (*backward)(const Work& work, int from, int to);
    void (*attention)(const Work& work, int from, int to, float* space, bool backward);
    void (*update)(const Update& u, int from, int to);
    float (*biggest)(const float* x, int n);
    float (*exponentials)(float* to, const float* x, int n, float biggest, float factor);
};

#define BABYGPT_KERNELS(set, Set, name, target)                                                                                            \
    template <>                                                                                                                            \
    struct Called<Set> {                                                                                                                   \
        target static BABYGPT_CALL void tile(float* c, int64_t c_row, const float* start, const float* a, int64_t a_row, int64_t a_step,   \
                                             const float* b, int64_t b_row, int n) {                                                       \
            constexpr int unroll = Set::calls ? 1 : 2; /* strides that only the caller knows need registers */                             \
            Products<Set>::template tile<Rows<Set>::tall, Rows<Set>::wide, unroll>(c, c_row, start, c_row, a, a_row, a_step, b, b_row, n); \
        }                                                                                                                                  \
        template <int rows, Depth a_runs, class E>                                                                                         \
        target static BABYGPT_CALL void panel_tile(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a,         \
                                                   int64_t a_row, const E* b, int depth, const float* scale, const E* next,                \
                                                   int64_t next_step) {                                                                    \
            using P = Products<Set>;                                                                                                       \
            P::template tile<rows, P::tile_columns, P::template unroll<rows>>(c, c_row, start, start_row, a, a_runs == along ? a_row : 1,  \
                                                                              a_runs == along ? 1 : P::tile_rows, b, P::tile_columns,      \
                                                                              depth, scale, next, next_step);                              \
        }                                                                                                                                  \
        target static BABYGPT_CALL void add(float* y, const float* a, const float* b, int64_t n) { Rows<Set>::add(y, a, b, n); }           \
    };                                                                                                                                     \
    struct set {                                                                                                                           \
        target static void pack_a(float* to, const Factor& a, int row, int depth, int rows) {                                              \
            Products<Set>::pack_a(to, a, row, depth, rows);                                                                                \
        }                                                                                                                                  \
        target static void pack_rounded_a(float* to, const Factor& a, int row, int depth, int rows) {                                      \
            Rounded<Set>::pack_a(to, a, row, depth, rows);                                                                                 \
        }                                                                                                                                  \
        static int64_t panel_floats(Dtype dtype, int depth) { return Products<Set>::panel_floats(dtype, depth); }                          \
        target static void pack_weights(float* to, const Factor& b, int column, int depth, int columns, Dtype dtype) {                     \
            Products<Set>::pack_b(to, b, column, depth, columns, dtype);                                                                   \
        }                                                                                                                                  \
        static void pack_b(float* to, const Factor& b, int column, int depth, int columns) {                                               \
            pack_weights(to, b, column, depth, columns, Dtype::f32);                                                                       \
        }                                                                                                                                  \
        target static void pack_rounded_b(float* to, const Factor& b, int column, int depth, int columns) {                                \
            Rounded<Set>::pack_b(to, b, column, depth, columns);                                                                           \
        }                                                                                                                                  \
        target static void block(const Product& p, const float* a, const float* b, int row, int column, int end) {                         \
            Products<Set>::block(p, a, b, row, column, end);                                                                               \
        }                                                                                                                                  \
        target static void single_row(const Product& p, const float* b, int column, int end) {                                             \
            Products<Set>::single_row(p, b, column, end);                                                                                  \
        }                                                                                                                                  \
        target static void forward(const Work& work, int from, int to) { forward_part<Set>(work, from, to); }                              \
        target static void backward(const Work& work, int from, int to) { backward_part<Set>(work, from, to); }                            \
        target static void attention(const Work& work, int from, int to, float* space, bool backward) {                                    \
            attention_part<Set>(work, from, to, space, backward);                                                                          \
        }                                                                                                                                  \
        target static void update(const Update& u, int from, int to) { update_part<Set>(u, from, to); }                                    \
        target static float biggest(const float* x, int n) { return Rows<Set>::biggest_of(x, n); }                                         \
        target static float exponentials(float* to, const float* x, int n, float biggest, float factor) {                                  \
            return Rows<Set>::exponentials(to, x, n, biggest, factor);                                                                     \
        }                                                                                                                                  \
        target static double ceiling(int64_t rounds, float* result) { return Products<Set>::ceiling(rounds, result); }                     \
        static constexpr int height = Products<Set>::tile_rows, width = Products<Set>::tile_columns;                                       \
        static constexpr Kernels table = {name,                                                                                            \
                                          {name, height, width, 1, 1, false, &pack_a, &pack_b, &block, &ceiling},                          \
                                          {name, height, width, 1, 1, true, &pack_rounded_a, &pack_rounded_b, &block, &ceiling},           \
                                          &Rows<Set>::attention_scratch,                                                                   \
                                          &panel_floats,                                                                                   \
                                          &pack_weights,                                                                                   \
                                          &single_row,                                                                                     \
                                          &forward,                                                                                        \
                                          &backward,                                                                                       \
                                          &attention,                                                                                      \
                                          &update,                                                                                         \
                                          &biggest,                                                                                        \
                                          &exponentials};                                                                                  \
    };

#if defined(__ARM_NEON) && BABYGPT_VECTORS
BABYGPT_KERNELS(KernelsPortable, Portable, "neon", )
#elif BABYGPT_X86 && BABYGPT_VECTORS
BABYGPT_UNHURRIED_BEGIN
BABYGPT_KERNELS(KernelsPortable, Portable, "sse2", )  // each multiply-add is a call: nothing else counts
BABYGPT_UNHURRIED_END
#else
BABYGPT_KERNELS(KernelsPortable, Portable, "portable", )
#endif
#if BABYGPT_WIDE
BABYGPT_KERNELS(KernelsAvx2, Avx2, "avx2", __attribute__((target("avx2,fma"))))
#if defined(__clang__)
BABYGPT_KERNELS(KernelsAvx512, Avx512, "avx512", __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512))))
#else
BABYGPT_KERNELS(KernelsAvx512, Avx512, "avx512", __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#ifdef BABYGPT_TEST_WIDE
BABYGPT_UNHURRIED_BEGIN
BABYGPT_KERNELS(KernelsAvx2Wide, Avx2Wide, "avx2, wide", __attribute__((target("avx2,fma"))))
BABYGPT_UNHURRIED_END
#endif
#endif

// Products of pairs.
#define BABYGPT_PAIR_PRODUCTS(set, Set, name, target)                                                                                \
    template <>                                                                                                                      \
    struct Called<Set> {                                                                                                             \
        template <int rows, Depth a_runs, class E>                                                                                   \
        target static BABYGPT_CALL void panel_tile(float* c, int64_t c_row, const float* start, int64_t start_row, const float* a,   \
                                                   int64_t, const E* b, int depth, const E*, const E* next, int64_t next_step) {     \
            Pairs<Set>::template tile<rows>(c, c_row, start, start_row, a, b, depth, next, next_step);                               \
        }                                                                                                                            \
    };                                                                                                                               \
    struct set {                                                                                                                     \
        target static void pack_a(float* to, const Factor& a, int row, int depth, int rows) {                                        \
            Pairs<Set>::pack_a(to, a, row, depth, rows);                                                                             \
        }                                                                                                                            \
        target static void pack_b(float* to, const Factor& b, int column, int depth, int columns) {                                  \
            Pairs<Set>::pack_b(to, b, column, depth, columns);                                                                       \
        }                                                                                                                            \
        target static void block(const Product& p, const float* a, const float* b, int row, int column, int end) {                   \
            Pairs<Set>::block(p, a, b, row, column, end);                                                                            \
        }                                                                                                                            \
        target static double ceiling(int64_t rounds, float* result) { return Pairs<Set>::ceiling(rounds, result); }                  \
        static constexpr int height = Products<Set>::tile_rows, width = Products<Set>::tile_columns;                                 \
        static constexpr ProductKernels table = {name, height, width, 2, Set::depth_unit, true, &pack_a, &pack_b, &block, &ceiling}; \
    };

#if BABYGPT_TILES
#if defined(__clang__)
BABYGPT_PAIR_PRODUCTS(TileProducts, Tiles, "avx512 and amx_bf16",
                      __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"), min_vector_width(512))))
#else
BABYGPT_PAIR_PRODUCTS(TileProducts, Tiles, "avx512 and amx_bf16",
                      __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"))))
#endif
#endif
#if BABYGPT_PAIRS
BABYGPT_PAIR_PRODUCTS(PairProducts, FastPairs, "avx512 and avx512_bf16", __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#ifdef BABYGPT_TEST_WIDE
#if BABYGPT_WIDE
BABYGPT_UNHURRIED_BEGIN
using TestPairs = PairsOf<Avx2Wide>;
BABYGPT_PAIR_PRODUCTS(TestPairProducts, TestPairs, "pairs, in software", __attribute__((target("avx2,fma"))))
#if BABYGPT_TILES
using TrappedTiles = TilesOf<Avx2Wide, MatrixUnit>;
BABYGPT_PAIR_PRODUCTS(TrappedTileProducts, TrappedTiles, "tiles, by their instructions",
                      __attribute__((target("avx2,fma,amx-tile,amx-bf16"))))
constexpr const ProductKernels& trapped_tiles = TrappedTileProducts::table;  // for a processor that has them, or who traps them
#else
constexpr const ProductKernels& trapped_tiles = TestPairProducts::table;  // the assembler has no such instructions
#endif
BABYGPT_UNHURRIED_END
#endif
#endif

BABYGPT_UNHURRIED_BEGIN

#if BABYGPT_TILES
// Whether there is a matrix unit, and Linux lets this process use it (Documentation/arch/x86/xstate.rst).
BABYGPT_RARE inline bool has_tiles() {
    uint32_t a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr uint32_t bf16 = 1u << 22, tiles = 1u << 24;
    constexpr long ask_permission = 0x1023, tile_data = 18, arch_prctl = 158;
    return (d & bf16) && (d & tiles) && syscall(arch_prctl, ask_permission, tile_data) == 0;
}
#endif
// ---- walking the tape ----------------------------------------------------------------------------------------------------

// How the scratch of a tape is divided.
struct Scratch {
    int64_t panels;  // the packed right factor of a product, for all threads
    int64_t logits;  // a chunk of rows of them
    int64_t slot;    // each thread's own: attention's, or rows of a left factor, packed
    int chunk;       // rows of the chunk
    Scratch(const Kernels& kernels, const Tape& tape) {
        // Logits at a time: in training, W and its gradient are read once a chunk, so that many rows are better than few.
        const int64_t wide = round_up(tape.head_out, column_group), some = int64_t(1) << 18, many = int64_t(1) << 23;
        const int64_t rows =
            most<int64_t>(1, tape.training ? most(some / wide, least<int64_t>(many / wide, 192)) : most<int64_t>(some / wide, 8));
        const int64_t all = tape.head_rows(), chunks = (all + rows - 1) / rows, even = (all + chunks - 1) / most<int64_t>(chunks, 1);
        chunk = static_cast<int>(least<int64_t>(round_up<int64_t>(even, 12), all));
        logits = round_up<int64_t>(chunk * wide, 16);
        // In training little enough for a shared cache; running, the weights are packed before.
        panels = tape.training ? most(1 << 20, 512 * tape.width) : 2 * depth_block * kernels.exact.tile_columns;
        slot = tape.training ? row_block * 2048 : 16;
        for (const Op& op : tape.ops)
            if (op.kind == OpKind::attention) slot = most(slot, kernels.attention_scratch(tape.context, op.dim(), tape.training));
    }
};

// One walk along a tape with one set of kernels.
struct Walk {
    const Kernels& kernels;
    Runtime& runtime;
    const Tape& tape;
    const Regions<float>& r;
    const Run& run;
    const Scratch scratch;
    const ProductKernels& learning;  // of the products with weights that are not packed
    const int threads;
    float *panels, *logits, *slots;

    Walk(const Kernels& kernels_, Runtime& runtime_, const Tape& tape_, const Regions<float>& r_, const Run& run_)
        : kernels(kernels_),
          runtime(runtime_),
          tape(tape_),
          r(r_),
          run(run_),
          scratch(kernels_, tape_),
          learning(tape_.rounds && tape_.training ? kernels_.rounded : kernels_.exact),
          threads(r_.threads > 0 ? r_.threads : runtime_.thread_count()),
          panels(r_.scratch),
          logits(panels + scratch.panels),
          slots(logits + scratch.logits) {}

    // f(item, worker) for each item, on the threads.
    template <class F>
    void divide(int items, const F& f) const {
        const int workers = least(threads, items);
        if (workers <= 1) {
            for (int i = 0; i < items; ++i) f(i, 0);
            return;
        }
        std::atomic<int> next[max_threads];  // exchange: store is a function of the standard library's, which would stay in the object file
        for (int w = 0; w < workers; ++w) next[w].exchange(w * items / workers, std::memory_order_relaxed);
        parallel(runtime, workers, [&](int worker) {
            for (int w = worker, tried = 0; tried < workers; ++tried, w = (w + 1) % workers)
                for (int i; (i = next[w].fetch_add(1, std::memory_order_relaxed)) < (w + 1) * items / workers;) f(i, worker);
        });
    }
    float* slot(int worker) const { return slots + worker * scratch.slot; }
    static constexpr int64_t least_cost = 1 << 14;  // what takes fewer multiply-adds is done before another thread has noticed
    // f(from, to, space) for ranges of `units` that cost about `cost` multiply-adds each.
    template <class F>
    void share(int units, int64_t cost, const F& f) const {
        const int64_t worth = most(units * cost / least_cost, int64_t(1));
        const int64_t items = least(worth, static_cast<int64_t>(least(units, 8 * threads)));
        divide(static_cast<int>(items),
               [&](int i, int worker) { f(static_cast<int>(i * units / items), static_cast<int>((i + 1) * units / items), slot(worker)); });
    }
    void share_forward(const Work& work, int units, int64_t cost) const {
        share(units, cost, [&](int from, int to, float*) { kernels.forward(work, from, to); });
    }
    void share_backward(const Work& work, int units, int64_t cost) const {
        share(units, cost, [&](int from, int to, float*) { kernels.backward(work, from, to); });
    }
    void share_attention(const Work& work, const Op& op, bool backward) const {
        share(attention_units(op), attention_cost(op) * (backward ? 5 : 2),
              [&](int from, int to, float* space) { kernels.attention(work, from, to, space, backward); });
    }

    // ---- products ----

    // With B in panels. Each thread packs the rows of A that it multiplies, `packs_a` numbers deep, into its own memory; 0: A is read where it
    // is. diagonal: what is to be added to a row to make it the column on the whole product's diagonal. then: an op whose activation follows,
    // best while the rows are in the second cache; null: none.
    void multiply(const ProductKernels& by, const Product& p, const float* b, int packs_a = 0, int diagonal = 0,
                  const Work* then = nullptr) const {
        const int columns = by.tile_columns;
        const int all_panels = (p.columns + columns - 1) / columns;
        if (p.rows < 4 && packs_a == 0 && !p.is_symmetric) {
            // Memory sets the speed: best if each thread reads the same weights for every token.
            const int units = (all_panels + 3) / 4, unit = 4 * columns;
            const int64_t worth = most(static_cast<int64_t>(p.depth) * p.columns / least_cost, int64_t(1));
            const int workers = static_cast<int>(least(worth, static_cast<int64_t>(least(threads, units))));
            parallel(runtime, workers, [&](int i) {
                for (int u = i * units / workers; u < (i + 1) * units / workers; ++u) {
                    Product one = p;
                    one.rows = 1;
                    for (int row = 0; row < p.rows; ++row) {
                        kernels.single_row(one, b, u * unit, least((u + 1) * unit, p.columns));
                        one.c += p.c_stride, one.a.at += p.a.stride;
                        if (one.start) one.start += p.start_stride;
                    }
                }
            });
            return finish_forward(then);
        }
        const int tall = packs_a > 0 ? least(row_block, round_up((p.rows + threads - 1) / threads, by.tile_rows)) : row_block;
        const int row_blocks = (p.rows + tall - 1) / tall;
        const bool is_small = static_cast<int64_t>(p.rows) * p.columns * p.depth < 1 << 17;
        const int groups = is_small || threads == 1 ? 1 : least((8 * threads + row_blocks - 1) / row_blocks, (all_panels + 3) / 4);
        int packed_row[max_threads];
        for (int w = 0; w < threads; ++w) packed_row[w] = -1;
        divide(row_blocks * groups, [&](int i, int worker) {
            const int64_t group = i % groups;
            const int row = i / groups * tall, left = p.is_symmetric ? most(row + diagonal, 0) / columns : 0;
            const int from = most(left, static_cast<int>(group * all_panels / groups)),
                      to = static_cast<int>((group + 1) * all_panels / groups);
            if (from >= to) return;
            Product part = p;
            part.rows = least(row + tall, p.rows);
            float* a = packs_a > 0 ? slot(worker) : nullptr;
            for (int k = row; k < part.rows && a && packed_row[worker] != row; k += by.tile_rows)
                by.pack_a(a + static_cast<int64_t>(k - row) * p.depth, p.a, k, packs_a, p.rows);
            packed_row[worker] = row;
            by.block(part, a, b, row, from * columns, least(to * columns, p.columns));
            if (then && groups == 1) kernels.forward(*then, row, part.rows);
        });
        if (groups > 1) finish_forward(then);
    }
    // B is packed here, in pieces that fit: all columns at a time where they are not too many, then as deep as there is room.
    void product(const Product& all) const { product(kernels.exact, all); }
    void product(const ProductKernels& by, const Product& all, const Work* then = nullptr) const {
        const int width = by.tile_columns, words = by.words(all.depth);
        const bool packs_a = by.packs_a || (all.a.runs == down && all.rows > 1);
        const int64_t deep = least(words, 2 * depth_block);
        const int wide = static_cast<int>(least<int64_t>(round_up(all.columns, width), scratch.panels / deep / width * width));
        const int64_t room = least(scratch.panels / wide, packs_a ? scratch.slot / row_block : static_cast<int64_t>(INT64_MAX));
        const int64_t whole = room / by.depth_unit * by.depth_unit, pieces = (words + whole - 1) / whole;
        const int piece = round_up(static_cast<int>((words + pieces - 1) / pieces), by.depth_unit), depth = piece * by.numbers;
        Product p = all;
        for (int column = 0; column < all.columns; column += wide)
            for (int k = 0; k < all.depth; k += depth) {
                const int deepness = least(depth, all.depth - k);
                p.columns = least(wide, all.columns - column), p.depth = by.words(deepness);
                p.c = all.c + column;
                p.start = k ? p.c : all.start ? all.start + column : nullptr;
                p.start_stride = k ? all.c_stride : all.start_stride;
                p.a.at = all.a.element(k, 0);
                p.b.at = all.b.element(k, column);
                share((p.columns + width - 1) / width, static_cast<int64_t>(p.depth) * width, [&](int from, int to, float*) {
                    for (int i = from; i < to; ++i)
                        by.pack_b(panels + static_cast<int64_t>(i) * width * p.depth, p.b, i * width, deepness, p.columns);
                });
                const bool is_last = k + depth >= all.depth && wide >= all.columns;
                multiply(by, p, panels, packs_a ? deepness : 0, -column, is_last ? then : nullptr);
            }
        if (wide < all.columns) finish_forward(then);
    }

    // ---- ops ----

    // Where an op's packed weights begin; null: there are none.
    const float* packed(int number) const {
        if (!r.packed) return nullptr;
        const float* at = r.packed;
        for (int i = 0; i < number; ++i) at += packed_size(tape.ops[static_cast<size_t>(i)]);
        return at;
    }
    int64_t packed_size(const Op& op) const { return packed_size(kernels, tape.dtype, op); }
    static int64_t packed_size(const Kernels& kernels, Dtype dtype, const Op& op) {
        if (op.kind != OpKind::linear && op.kind != OpKind::head) return 0;
        return (op.out + kernels.exact.tile_columns - 1) / kernels.exact.tile_columns * kernels.panel_floats(dtype, op.in);
    }

    // The matrix of a linear op or a head as the right factor of x W, and of dy W^T; `from`: of the weights or a copy of them.
    static Factor forward_factor(const Tape& tape, const Op& op, const float* w) {
        return op.kind == OpKind::head || tape.output_rows ? Factor{w, op.in, along} : Factor{w, op.out, down};
    }
    Factor backward_factor(const Op& op, const float* w) const {
        return tape.output_rows ? Factor{w, op.in, down} : Factor{w, op.out, along};
    }
    // KV heads of sequences, and the multiply-adds of one of the products that each takes.
    int attention_units(const Op& op) const { return static_cast<int>(run.on(op.side).sequences.size) * op.kv_heads; }
    int64_t attention_cost(const Op& op) const {
        int64_t pairs = 0;
        const Stream in = run.on(op.side);
        for (const Sequence& s : in.sequences) {
            const int64_t seen = op.sight == Sight::source ? run.source.sequences[static_cast<size_t>(s.source)].length
                                 : op.sight == Sight::full ? s.length
                                                           : (s.length + 1) / 2 + (s.pages ? s.position : 0);
            pairs += s.length * seen;
        }
        return pairs / static_cast<int64_t>(most(in.sequences.size, size_t(1))) * (op.out / op.kv_heads);
    }
    // With the weights packed before, or here.
    void multiply_weights(int number, Product p, const Work* then = nullptr) const {
        const float* ready = packed(number);
        if (!ready) return product(learning, p, then);
        p.dtype = tape.dtype;
        multiply(kernels.exact, p, ready, 0, 0, then);
    }

    void forward(int number) const {
        const Op& op = tape.ops[static_cast<size_t>(number)];
        const int rows = run.on(op.side).rows;
        if (rows == 0) return;
        const Work work{tape, r, run, number};
        const float *x = values(tape, r, op.x), *w = weights(tape, r, op.w), *b = weights(tape, r, op.b);
        switch (op.kind) {
            case OpKind::attention:
                return share_attention(work, op, false);
            case OpKind::linear: {
                float* before = values(tape, r, op.aux != nothing ? op.aux : op.y);
                const Product p{before, op.out, b, 0, Factor{x, op.in, along}, forward_factor(tape, op, w), rows, op.out, op.in};
                const Work* const activates = op.activation != Activation::none ? &work : nullptr;
                multiply_weights(number, p, op.loras > 0 ? nullptr : activates);
                if (op.loras == 0) return;
                lora_forward(op, before, x, rows);
                return finish_forward(activates);
            }
            case OpKind::head:
                return head(number);
            case OpKind::embedding:
            case OpKind::input:
            case OpKind::waves:
            case OpKind::pool:
            case OpKind::norm:
            case OpKind::gate:
            case OpKind::rope:
            case OpKind::add:
            case OpKind::dropout:
                return finish_forward(work);
        }
    }
    // The rows of an op: all of it, or what comes after its product.
    void finish_forward(const Work* work) const {
        if (work) finish_forward(*work);
    }
    void finish_forward(const Work& work) const {
        const Op& op = tape.ops[static_cast<size_t>(work.number)];
        share_forward(work, run.on(op.side).rows, static_cast<int64_t>(op.out) * (op.activation != Activation::none ? 8 : 2));
    }

    // What LoRA adds to y, before an activation.
    BABYGPT_CALL void lora_forward(const Op& op, float* y, const float* x, int rows) const {
        const int rank = tape.rank;
        for (int i = 0; i < op.loras; ++i) {
            const LoraPlaces<float> l(tape, r, op, i);
            product(Product{l.h, l.stride, nullptr, 0, Factor{x, op.in, along}, Factor{l.a, op.in, along}, rows, rank, op.in});
        }
        float* h = LoraPlaces<float>(tape, r, op, 0).h;
        scale(h, h, static_cast<int64_t>(rows) * op.loras * rank, static_cast<float>(tape.lora_scale));
        for (int i = 0; i < op.loras; ++i) {
            const LoraPlaces<float> l(tape, r, op, i);
            const Lora& lora = tape.loras[static_cast<size_t>(op.lora + i)];
            float* to = y + lora.first;
            product(Product{to, op.out, to, op.out, Factor{l.h, l.stride, along}, Factor{l.b, rank, along}, rows, lora.outputs, rank});
        }
    }
    // Its gradients, and what they add to dx.
    BABYGPT_CALL void lora_backward(const Op& op, float* dx, const float* dy, const float* x, int rows) const {
        const int rank = tape.rank;
        for (int i = 0; i < op.loras; ++i) {
            const LoraPlaces<float> l(tape, r, op, i);
            const Lora& lora = tape.loras[static_cast<size_t>(op.lora + i)];
            const float* from = dy + lora.first;
            product(Product{l.db, rank, l.db, rank, Factor{from, op.out, down}, Factor{l.h, l.stride, down}, lora.outputs, rank, rows});
            product(Product{l.dh, l.stride, nullptr, 0, Factor{from, op.out, along}, Factor{l.b, rank, down}, rows, rank, lora.outputs});
        }
        float* dh = LoraPlaces<float>(tape, r, op, 0).dh;
        scale(dh, dh, static_cast<int64_t>(rows) * op.loras * rank, static_cast<float>(tape.lora_scale));
        for (int i = 0; i < op.loras; ++i) {
            const LoraPlaces<float> l(tape, r, op, i);
            product(Product{l.da, op.in, l.da, op.in, Factor{l.dh, l.stride, down}, Factor{x, op.in, down}, rank, op.in, rows});
            if (dx) product(Product{dx, op.in, dx, op.in, Factor{l.dh, l.stride, along}, Factor{l.a, op.in, down}, rows, op.in, rank});
        }
    }

    // Chunk of rows after chunk of rows; in training the logits turn into their gradients, and those of x and W follow at once.
    void head(int number) const {
        const Op& op = tape.ops[static_cast<size_t>(number)];
        const float *x = values(tape, r, op.x), *w = weights(tape, r, op.w), *b = weights(tape, r, op.b);
        float *dx = gradient(tape, r, op.x), *dw = weight_gradient(tape, r, op.w);
        const int in = op.in, out = op.out, all_rows = run.on(op.side).rows;
        const int64_t wide = round_up(out, column_group);
        Work work{tape, r, run, number};
        work.logits = logits, work.logits_stride = wide, work.logits_gradient = run.training;
        for (int row = 0; row < all_rows && run.targets; row += scratch.chunk) {
            const int rows = least(scratch.chunk, all_rows - row);
            const int64_t at = static_cast<int64_t>(row) * in;
            work.first_row = row, work.chunk = rows;
            multiply_weights(number, Product{logits, wide, b, 0, Factor{x + at, in, along}, Factor{w, in, along}, rows, out, in});
            share_forward(work, rows, wide * 8);
            if (!run.training) continue;
            Work columns = work;
            columns.by_columns = true;
            if (b && dw) share_backward(columns, (out + column_group - 1) / column_group, static_cast<int64_t>(rows) * column_group);
            const float* there = op.adds_to_dx ? dx + at : nullptr;
            product(learning, Product{dx + at, in, there, in, Factor{logits, wide, along}, Factor{w, in, down}, rows, in, out});
            if (dw) product(learning, Product{dw, in, dw, in, Factor{logits, wide, down}, Factor{x + at, in, down}, out, in, rows});
        }
        // The rows whose logits are wanted: those that stand beneath each other are done together.
        const size_t all = run.sequences.size, at_once = static_cast<size_t>(scratch.chunk);
        for (size_t i = 0, n; i < all; i += n) {
            const Sequence& s = run.sequences[i];
            const int64_t wanted = run.wanted_row(op.side, i);
            const auto is_next = [&](size_t k) {
                return run.sequences[k].logits && run.wanted_row(op.side, k) == wanted + static_cast<int64_t>(k - i);
            };
            for (n = 1; s.logits && i + n < all && n < at_once && is_next(i + n);) ++n;
            if (!s.logits) continue;
            const float* last = x + wanted * in;
            float* to = n == 1 ? s.logits : logits;
            multiply_weights(number, Product{to, n == 1 ? out : wide, b, 0, Factor{last, in, along}, Factor{w, in, along},
                                             static_cast<int>(n), out, in});
            for (size_t k = 0; n > 1 && k < n; ++k)
                memcpy(run.sequences[i + k].logits, logits + static_cast<int64_t>(k) * wide, static_cast<size_t>(out) * sizeof(float));
        }
    }

    void backward(int number) const {
        const Op& op = tape.ops[static_cast<size_t>(number)];
        Work work{tape, r, run, number};
        Work columns = work;
        columns.by_columns = true;
        const int groups = (op.out + column_group - 1) / column_group, rows = run.on(op.side).rows;
        if (!tape.runs_backward(op)) return;
        switch (op.kind) {
            case OpKind::attention:
                return share_attention(work, op, true);
            case OpKind::linear: {
                const float *x = values(tape, r, op.x), *w = weights(tape, r, op.w);
                float *dx = gradient(tape, r, op.x), *dy = gradient(tape, r, op.y), *dw = weight_gradient(tape, r, op.w);
                if (op.remakes != nothing) finish_forward(Work{tape, r, run, op.remakes});
                const bool slopes = op.activation != Activation::none;
                if (op.b != nothing && dw) share_backward(columns, groups, static_cast<int64_t>(rows) * column_group * (slopes ? 8 : 1));
                else if (slopes) share_backward(work, rows, static_cast<int64_t>(op.out) * 8);
                const Factor from_x{x, op.in, down}, from_dy{dy, op.out, down};
                if (dw)
                    product(learning, tape.output_rows ? Product{dw, op.in, dw, op.in, from_dy, from_x, op.out, op.in, rows}
                                                       : Product{dw, op.out, dw, op.out, from_x, from_dy, op.in, op.out, rows});
                if (dx)
                    product(learning, Product{dx, op.in, op.adds_to_dx ? dx : nullptr, op.in, Factor{dy, op.out, along},
                                              backward_factor(op, w), rows, op.in, op.out});
                if (op.loras > 0) lora_backward(op, dx, dy, x, rows);
                return;
            }
            case OpKind::norm:
                if (!tape.frozen) share_backward(columns, groups, static_cast<int64_t>(rows) * column_group * 2);
                return share_backward(work, rows, static_cast<int64_t>(op.out) * 4);
            case OpKind::embedding:
                return share_backward(columns, groups, static_cast<int64_t>(rows) * column_group * 2);
            case OpKind::gate:
                return share_backward(work, rows, static_cast<int64_t>(op.out) * 16);
            case OpKind::waves:
            case OpKind::rope:
            case OpKind::add:
            case OpKind::dropout:
            case OpKind::pool:
                return share_backward(work, rows, static_cast<int64_t>(op.out) * 2);
            case OpKind::input:
            case OpKind::head:
                return;  // done in the forward pass
        }
    }

    void update(const Update& u) const {
        const int blocks = static_cast<int>((u.size + square_block - 1) / square_block);
        share(blocks, square_block, [&](int from, int to, float*) { kernels.update(u, from, to); });
    }

    // ---- what the backend offers ----

    BABYGPT_CALL static int64_t scratch_size(const Kernels& kernels, const Tape& tape, int threads) {
        const Scratch s(kernels, tape);
        return s.panels + s.logits + threads * s.slot;
    }
    BABYGPT_CALL static void pack(const Kernels& kernels, Runtime& runtime, const Tape& tape, const Op& op, const float* w, float* to) {
        const int columns = kernels.exact.tile_columns;
        const Factor factor = forward_factor(tape, op, w);
        parallel(runtime, (op.out + columns - 1) / columns, [&](int i) {
            kernels.pack_weights(to + i * kernels.panel_floats(tape.dtype, op.in), factor, i * columns, op.in, op.out, tape.dtype);
        });
    }
    BABYGPT_CALL void forward() const {
        for (int i = 0; i < static_cast<int>(tape.ops.count); ++i) timed(run, i, [&] { forward(i); });
    }
    BABYGPT_CALL void backward() const {
        const int ops = static_cast<int>(tape.ops.count);
        for (int i = ops; i-- > 0;) timed(run, ops + i, [&] { backward(i); });
    }
    BABYGPT_CALL double square_sum(double* partial) const {
        double total = 0;
        for (const WeightPlan& plan : tape.learnt()) {
            Update u{};
            u.g = r.gradients + plan.weight.offset, u.size = plan.weight.rows * plan.weight.cols;
            for (int k = 0; k < tape.lookups && &plan == &tape.weights[static_cast<size_t>(tape.shared_embedding())]; ++k) {
                u.what = Update::folding, u.lookup = r.lookup_gradients + k * tape.one_lookup();
                update(u);
            }
            u.what = Update::squaring, u.partial = partial;
            update(u);
            for (int64_t i = 0; i < u.size; i += square_block) total += *partial++;
        }
        return total;
    }
    BABYGPT_CALL void update(float* w, float* m, float* v, const UpdateRule& rule) const {
        for (const WeightPlan& plan : tape.learnt()) {
            const int64_t at = plan.weight.offset;
            const bool by_muon = rule.uses_muon && plan.matrices;
            Update u{};
            u.what = by_muon ? Update::gathering : Update::stepping, u.size = plan.weight.rows * plan.weight.cols;
            u.g = r.gradients + at, u.w = w + at, u.m = m + at, u.v = v + at;
            u.rule = &rule, u.decays = plan.weight.decay;
            update(u);
            if (!by_muon) continue;
            muon_steps(plan, u.w, u.g, rule.muon, r.activations, *this);
            memset(u.g, 0, static_cast<size_t>(u.size) * sizeof(float));
        }
    }
    void scale(float* to, const float* from, int64_t n, float factor) const {
        Update u{};
        u.what = Update::scaling, u.size = n, u.g = to, u.from = from, u.factor = factor;
        update(u);
    }
};

// The backend of one set of kernels.
template <const Kernels& kernels>
struct Fast {
    static int64_t scratch(const Tape& tape, int threads) { return Walk::scratch_size(kernels, tape, threads); }
    static int64_t packed(const Tape& tape, const Op& op) { return Walk::packed_size(kernels, tape.dtype, op); }
    static void pack(Runtime& runtime, const Tape& tape, const Op& op, const float* matrix, float* to) {
        Walk::pack(kernels, runtime, tape, op, matrix, to);
    }
    static void forward(Runtime& runtime, const Tape& tape, const Regions<float>& r, const Run& run) {
        Walk(kernels, runtime, tape, r, run).forward();
    }
    static void backward(Runtime& runtime, const Tape& tape, const Regions<float>& r, const Run& run) {
        Walk(kernels, runtime, tape, r, run).backward();
    }
    static double square_sum(Runtime& runtime, const Tape& tape, const Regions<float>& r, double* partial) {
        return Walk(kernels, runtime, tape, r, Run()).square_sum(partial);
    }
    static void update(Runtime& runtime, const Tape& tape, const Regions<float>& r, float* w, float* m, float* v, const UpdateRule& rule) {
        Walk(kernels, runtime, tape, r, Run()).update(w, m, v, rule);
    }
    static constexpr BackendFunctions functions = {
        &scratch, &packed, &pack, &forward, &backward, &square_sum, &update, kernels.biggest, kernels.exponentials};
};

// ---- which kernels does this machine get? --------------------------------------------------------------------------------

struct Choice {
    const Kernels* kernels;
    const BackendFunctions* functions;
};
template <const Kernels& kernels>
constexpr Choice these() {
    return {&kernels, &Fast<kernels>::functions};
}
// Products of factors in bf16, where a processor is fast at them; by its kind, not by measuring, so that it is the same every time.
constexpr Kernels with_rounded(Kernels kernels, const ProductKernels& products) {
    kernels.rounded = products;
    return kernels;
}
#if BABYGPT_TILES
constexpr Kernels kernels_of_tiles = with_rounded(KernelsAvx512::table, TileProducts::table);
#endif
#if BABYGPT_PAIRS
constexpr Kernels kernels_of_pairs = with_rounded(KernelsAvx512::table, PairProducts::table);
#endif
// What was asked for, or else the best that this machine has.
inline Choice choose(Isa wanted, bool rounding = false) {
    (void)wanted, (void)rounding;
#if BABYGPT_WIDE
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (wanted == Isa::automatic || wanted == Isa::avx512)) {
#if BABYGPT_TILES
        if (rounding && has_tiles()) return these<kernels_of_tiles>();
#endif
#if BABYGPT_PAIRS
        if (rounding && __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16")) return these<kernels_of_pairs>();
#endif
        return these<KernelsAvx512::table>();
    }
    if (avx2 && wanted != Isa::sse2 && wanted != Isa::portable) return these<KernelsAvx2::table>();
#endif
    return these<KernelsPortable::table>();
}

// Those of training.
inline const ProductKernels& products_of(const Runtime& runtime) {
    const Kernels& kernels = *choose(runtime.isa, rounds(runtime)).kernels;
    return rounds(runtime) ? kernels.rounded : kernels.exact;
}

const BackendFunctions* find_backend(const Runtime& runtime, bool training) {
    if (runtime.backend == Backend::cuda && !find_device(runtime)) return nullptr;
    return runtime.backend == Backend::plain ? plain_backend() : choose(runtime.isa, training && rounds(runtime)).functions;
}

}  // namespace

const char* Runtime::isa_name() const { return backend == Backend::plain ? "plain" : products_of(*this).name; }

double fma_ceiling(Runtime& runtime, int threads) {
    const ProductKernels& products = products_of(runtime);
    start_pool(runtime);
    const int tasks = least(most(threads, 1), max_threads);
    constexpr int64_t rounds = 1 << 20;
    double best = 0;
    // For a while: a system may keep a new thread on its creator's core at first.
    for (const double begin = seconds_now(); seconds_now() - begin < 0.3;) {
        std::atomic<int64_t> done{0};
        const double start = seconds_now();
        parallel(runtime, tasks, [&](int) {
            float result;
            done.fetch_add(static_cast<int64_t>(products.ceiling(rounds, &result)) + (result > 1e30f));
        });
        best = most(best, 2e-9 * static_cast<double>(done.exchange(0)) / (seconds_now() - start));
    }
    return best;
}

namespace {

// What an op computes and moves in `rows` tokens.
void count_work(const Tape& tape, const Op& op, double rows, ProfileRow& forward, ProfileRow& backward) {
    const double number = tape.halves ? 2 : 4;  // bytes of one, but for weights' gradients, which are always floats
    const double x = op.in * rows * number, y = (op.kind == OpKind::head ? 0 : op.out) * rows * number;
    double w = 0;
    if (op.w != nothing) w += static_cast<double>(tape.weight(op.w).rows * tape.weight(op.w).cols);
    double dw = 4 * w;
    w *= number;
    if (op.kind == OpKind::embedding) w = dw = 8.0 * op.out * rows;  // the rows that were looked up
    if (op.kind == OpKind::linear || op.kind == OpKind::head) forward.flops = 2.0 * op.in * op.out * rows;
    if (op.kind == OpKind::attention) forward.flops = 2.0 * op.out * (tape.context + 1) * rows;
    backward.flops = 2 * forward.flops;
    forward.bytes = x + (op.kind == OpKind::add ? x : 0) + y + w;
    backward.bytes = y + x + w + dw + (Tape::backward_reads_x(op) ? x : 0);
    if (op.kind == OpKind::add) {  // a summand's gradient may lie where the sum's does
        const int64_t place = tape.at(op.y).gradient;
        const int copies = (tape.at(op.x).gradient != place) + (tape.at(op.x2).gradient != place);
        backward.bytes = copies > 0 ? y + copies * x : 0;
        if (op.sum != nothing) forward.bytes = 0;
    } else if (op.sum != nothing) forward.bytes += y;  // the other summand
    if (op.kind != OpKind::head) return;
    forward.flops += backward.flops, forward.bytes += backward.bytes;
    backward.flops = backward.bytes = 0;
}

}  // namespace

BABYGPT_RARE Status profile(Runtime& runtime, const Config& config, int batch, double seconds, Array<ProfileRow>& rows) {
    rows = Array<ProfileRow>(runtime);
    Model model;
    BABYGPT_TRY(model.create(runtime, config, Tokenizer()));
    TrainConfig how;
    how.batch = batch, how.schedule = Schedule::constant;
    const size_t tokens = static_cast<size_t>(batch) * static_cast<size_t>(config.context);
    Array<int32_t> ids(runtime);
    if (!ids.resize(tokens + 1)) return out_of_memory(tokens * sizeof(int32_t));
    for (size_t i = 0; i <= tokens; ++i) ids[i] = static_cast<int32_t>(mix(i) % static_cast<uint64_t>(config.vocab));
    Data data;
    BABYGPT_TRY(data.create(runtime, Span<const int32_t>(ids.items, ids.count)));
    Trainer trainer;
    BABYGPT_TRY(trainer.create(runtime, model, how, data));
    const Tape& tape = trainer.state->tape;
    const size_t ops = tape.ops.count;
    Array<double> times(runtime);
    if (!times.resize(2 * ops) || !rows.resize(2 * ops + 1)) return out_of_memory(ops * 2 * sizeof(ProfileRow));
    const auto step = [&] {
        StepResult result;
        return trainer.step(result);
    };
    BABYGPT_TRY(step());  // touches the memory
    trainer.state->op_seconds = times.items;
    const double start = seconds_now();
    int steps = 0;
    do {
        BABYGPT_TRY(step());
        ++steps;
    } while (seconds_now() - start < seconds);
    double rest = (seconds_now() - start) / steps;
    for (size_t i = 0; i < ops; ++i) {
        const Op& op = tape.ops[i];
        ProfileRow &forward = rows[i], &backward = rows[2 * ops - 1 - i];
        Line(forward.op, sizeof forward.op).put(op.kind == OpKind::head ? "lm_head" : tape.at(op.y).name);
        Line(forward.kind, sizeof forward.kind).put(op_name(op.kind));
        backward = forward;
        backward.backward = true;
        forward.seconds = times[i] / steps, backward.seconds = times[ops + i] / steps;
        rest -= forward.seconds + backward.seconds;
        count_work(tape, op, static_cast<double>(tokens), forward, backward);
    }
    ProfileRow& update = rows[2 * ops];
    Line(update.op, sizeof update.op).put(runtime.backend == Backend::cuda ? "AdamW, launches, host" : "norm and AdamW");
    Line(update.kind, sizeof update.kind).put("update");
    // g; w, m, v, g read and written; the narrow copy.
    update.seconds = rest, update.bytes = (tape.halves ? 38.0 : 36.0) * static_cast<double>(model.parameters);
    return Status();
}

Status gpu_ceilings(Runtime& runtime, double& flops, double& bytes) {
    const BackendFunctions* backend;
    BABYGPT_TRY(backend_for(runtime, backend));
    const DeviceFunctions* const device = find_device(runtime);
    if (!device) return fail(Error::invalid_argument, "gpu_ceilings needs the backend cuda");
    return device->ceilings(runtime.precision, flops, bytes);
}

}  // namespace babygpt

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#undef BABYGPT_KERNELS
#undef BABYGPT_PAIR_PRODUCTS
#undef BABYGPT_PAIRS
#undef BABYGPT_SHUFFLES
#undef BABYGPT_TILES
#undef BABYGPT_UNROLL
#undef BABYGPT_VECTORS
#undef BABYGPT_WIDE

// ---- selftest ------------------------------------------------------------------------------------------------------------
// Does this program, as it was compiled, on this machine, compute what it should? In this order: elementary functions against known
// values, a small GPT's gradients in double against differences, the runtime's backend against the plain one, and the bits of a model
// after a few steps of training. It takes about a second.

namespace babygpt {
namespace {

// A small tape with memory of its own, random weights and an input: two sequences of different lengths.
template <class T>
struct Specimen {
    Tape tape;
    Block memory;
    Regions<T> r;
    Run run;
    Sequence sequences[2];
    T* weights = nullptr;
    int32_t *ids = nullptr, *targets = nullptr;
    explicit Specimen(Runtime& runtime) : tape(runtime) {}

    Status create(Runtime& runtime, const BackendFunctions* backend, const Config& config, int first_length, int second_length) {
        constexpr double dropout = 0.2;
        run.rows = first_length + second_length;
        BABYGPT_TRY(record(tape, config, run.rows, true, dropout));
        Layout layout;
        lay_out(layout, runtime, backend);
        if (!memory.take(runtime, layout.bytes, true)) return out_of_memory(layout.bytes);
        layout = Layout{memory.memory, 0};
        lay_out(layout, runtime, backend);
        for (size_t t = 0; t < tape.weights.count; ++t) {
            const Weight& weight = tape.weights[t].weight;
            const double middle = tape.weights[t].deviation < 0 ? 1 : 0;
            for (int64_t i = 0; i < weight.rows * weight.cols; ++i)
                weights[weight.offset + i] = static_cast<T>(middle + random_uniform(t, static_cast<uint64_t>(i)) - 0.5);
        }
        for (int i = 0; i < run.rows; ++i) {
            ids[i] = (i * 5 + 1) % config.vocab;
            targets[i] = i == 2 ? -1 : (i * 3 + 2) % config.vocab;
        }
        sequences[0] = Sequence{0, first_length, 0, nullptr};
        sequences[1] = Sequence{first_length, second_length, 0, nullptr};
        run.sequences = Span<const Sequence>(sequences, 2);
        run.ids = ids, run.targets = targets;
        run.training = true, run.dropout = dropout, run.label_smoothing = 0.1;
        return Status();
    }
    void lay_out(Layout& layout, Runtime& runtime, const BackendFunctions* backend) {
        r.weights = weights = layout.take<T>(tape.weight_block);
        r.gradients = layout.take<T>(tape.weight_block);
        r.lookup_gradients = layout.take<T>(tape.lookup_block());
        r.activations = layout.take<T>(tape.activation_block);
        r.scratch = layout.take<T>(backend->scratch(tape, runtime.thread_count()));
        r.losses = layout.take<double>(run.rows);
        ids = layout.take<int32_t>(run.rows);
        targets = layout.take<int32_t>(run.rows);
    }
    double loss() const {
        double total = 0;
        for (int i = 0; i < run.rows; ++i) total += r.losses[i];
        return total;
    }
};

struct SelfTest {
    Runtime& runtime;
    Array<CheckResult>& results;

    template <class... Parts>
    Status report(double error, double limit, const Parts&... what) {
        CheckResult result{};
        Line line(result.what, sizeof result.what);
        (line.put(what), ...);
        result.error = error, result.limit = limit, result.passed = error <= limit;
        return results.push(result) ? Status() : out_of_memory(sizeof result);
    }

    BABYGPT_RARE Status functions() {
        const struct {
            const char* name;
            double value, truth, limit;
        } known[] = {
            {"exp(1) in double", exp_of(1.0), 2.718281828459045235, 1e-15},
            {"exp(-20) in double", exp_of(-20.0), 2.061153622438557828e-9, 1e-15},
            {"exp(-5) in float", static_cast<double>(exp_of(-5.0f)), 6.737946999085467097e-3, 2e-7},
            {"log(10)", log_of(10.0), 2.302585092994045684, 1e-15},
            {"erf(0.5)", erf_of(0.5), 0.5204998778130465377, 1e-15},
            {"erf(-2)", erf_of(-2.0), -0.9953222650189527342, 1e-15},
            {"P(N(0,1) <= -2) in float", static_cast<double>(normal_of(-2.0f)), 2.275013194817920721e-2, 2e-7},
            {"cos(pi / 4)", cos_pi(0.25), 0.7071067811865475244, 1e-15},
        };
        for (const auto& k : known) {
            const double error = k.value / k.truth - 1;
            BABYGPT_TRY(report(error < 0 ? -error : error, k.limit, k.name));
        }
        return Status();
    }

    // (loss(w + h) - loss(w - h)) / 2h, for every weight.
    BABYGPT_RARE Status gradients(const Config& config) {
        Specimen<double> s(runtime);
        BABYGPT_TRY(s.create(runtime, plain_backend(), config, 5, 3));
        plain_forward(s.tape, s.r, s.run);
        plain_backward(s.tape, s.r, s.run);
        fold_lookup_gradients(s.tape, s.r);
        for (const WeightPlan& plan : s.tape.weights) {
            double difference = 0, reference = 1e-3;
            for (int64_t i = 0; i < plan.weight.rows * plan.weight.cols; ++i) {
                double& w = s.weights[plan.weight.offset + i];
                const double before = w, h = 1e-5;
                const auto loss_at = [&](double value) {
                    w = value;
                    plain_forward(s.tape, s.r, s.run);
                    return s.loss();
                };
                const double slope = (loss_at(before + h) - loss_at(before - h)) / (2 * h);
                const double off = slope - s.r.gradients[plan.weight.offset + i];
                w = before;
                difference = most(difference, is_finite(off) ? off < 0 ? -off : off : 1e300);
                reference = most(reference, slope < 0 ? -slope : slope);
            }
            BABYGPT_TRY(report(difference / reference, 1e-6, "gradient of ", plan.weight.name,
                               config.tied    ? ", erf"
                               : config.gated ? ""
                                              : ", tanh, untied, rotary"));
        }
        return Status();
    }

    // All gradients of a step, in bits.
    BABYGPT_RARE Status backend() {
        const BackendFunctions* chosen;
        BABYGPT_TRY(backend_for(runtime, chosen));
        Config config;
        config.layers = 2, config.heads = 3, config.width = 42, config.context = 21, config.vocab = 50;
        config.positions = Positions::rotary;
        Specimen<float> a(runtime), b(runtime);
        BABYGPT_TRY(a.create(runtime, plain_backend(), config, 19, 21));
        BABYGPT_TRY(b.create(runtime, chosen, config, 19, 21));
        start_pool(runtime);
        plain_forward(a.tape, a.r, a.run);
        plain_backward(a.tape, a.r, a.run);
        chosen->forward(runtime, b.tape, b.r, b.run);
        chosen->backward(runtime, b.tape, b.r, b.run);
        double difference = 0, reference = 0;
        for (int64_t i = 0; i < a.tape.weight_block; ++i) {
            const double x = static_cast<double>(a.r.gradients[i]), d = static_cast<double>(b.r.gradients[i]) - x;
            difference = most(difference, is_finite(d) ? d < 0 ? -d : d : 1e300);
            reference = most(reference, x < 0 ? -x : x);
        }
        return report(difference / reference, 0, "backend (", runtime.isa_name(), ") against plain");
    }

    // The same on every machine and compiler, with any flags, number of threads and instruction set.
    BABYGPT_RARE Status bits(const char* architecture, Positions positions, Optimizer optimizer, uint64_t golden) {
        constexpr int batch = 3, context = 13, steps = 5;
        Config config;
        BABYGPT_TRY(preset_architecture(architecture, config));
        config.layers = 2, config.heads = 2, config.width = 20, config.context = context, config.positions = positions;
        if (config.gated) config.kv_heads = 1;
        TrainConfig how;
        how.batch = batch, how.steps = steps, how.dropout = 0.1, how.optimizer = optimizer;
        Tokenizer tokenizer;
        BABYGPT_TRY(tokenizer.create_bytes(runtime));
        Model model;
        BABYGPT_TRY(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
        int32_t ids[batch * context + 1];
        for (int i = 0; i <= batch * context; ++i) ids[i] = i * i % 251;
        Data data;
        BABYGPT_TRY(data.create(runtime, Span<const int32_t>(ids, batch * context + 1)));
        Trainer trainer;
        BABYGPT_TRY(trainer.create(runtime, model, how, data));
        StepResult result;
        for (int step = 0; step < steps; ++step)
            BABYGPT_TRY(trainer.step(Span<const int32_t>(ids, batch * context), Span<const int32_t>(ids + 1, batch * context), result));
        uint64_t hash = 0;
        for (int64_t i = 0; i < model.block; ++i) hash = mix(hash ^ bits_as<uint32_t>(model.weights[i]));
        char digits[17] = {};
        for (int i = 0; i < 16; ++i) digits[i] = "0123456789abcdef"[hash >> (60 - 4 * i) & 15];
        return report(hash == golden ? 0 : 1, 0, "bits of a model after ", steps, " steps",
                      optimizer == Optimizer::muon ? " of Muon, " : ", ", architecture, ": ", digits);
    }
};

}  // namespace

Status selftest(Runtime& runtime, Array<CheckResult>& results) {
    const FloatMode mode;
    results = Array<CheckResult>(runtime);
    if (runtime.backend == Backend::cuda)
        return fail(Error::unsupported, "the self-test is of the processor's backends: choose cpu or plain");
    SelfTest test{runtime, results};
    BABYGPT_TRY(test.functions());
    Config config;
    config.layers = 1, config.heads = 2, config.width = 6, config.context = 5, config.vocab = 7, config.activation = Activation::gelu;
    BABYGPT_TRY(test.gradients(config));
    config.tied = false, config.activation = Activation::gelu_tanh, config.positions = Positions::rotary, config.width = 8;
    BABYGPT_TRY(test.gradients(config));
    BABYGPT_TRY(preset_architecture("llama", config));
    config.kv_heads = 1, config.hidden = 3;
    BABYGPT_TRY(test.gradients(config));
    BABYGPT_TRY(test.backend());
    BABYGPT_TRY(test.bits("gpt2", Positions::learned, Optimizer::adamw, 0xac013e181805d245u));
    BABYGPT_TRY(test.bits("gpt2", Positions::rotary, Optimizer::muon, 0x3d916449051abd6du));
    return test.bits("llama", Positions::rotary, Optimizer::muon, 0xe59e3743c54be807u);
}

}  // namespace babygpt

BABYGPT_UNHURRIED_END

// ---- the end of the implementation -----------------------------------------------------------------------------------

#if defined(__clang__)
#pragma float_control(pop)
#elif defined(__GNUC__)
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#undef BABYGPT_TRY
#undef BABYGPT_INLINE
#undef BABYGPT_CALL
#undef BABYGPT_RARE
#undef BABYGPT_LOOPS
#undef BABYGPT_ALONE
#undef BABYGPT_UNHURRIED_BEGIN
#undef BABYGPT_UNHURRIED_END
#undef BABYGPT_X86

#undef BABYGPT_IMPLEMENTING
#endif  // BABYGPT_IMPLEMENTING

// =====================================================================================================================
// [CHAPTER 12] Licence (MIT)
// =====================================================================================================================
// Copyright (c) 2026 the babygpt.h authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
// files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
// modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
// Software is furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
// Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
// WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
// COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
// OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
