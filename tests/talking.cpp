// Talking: the KV cache, the sampler, stop and banned strings, streaming, the end of the context, chat turns, scores, sessions side by side.
#include <ctype.h>
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;

static const char* text() {
    static std::string lines;
    if (lines.empty())
        for (int i = 0; i < 60; ++i)
            lines += i % 3 == 0   ? "You: how are you\nMira: I am well, thank you.\n\n"
                     : i % 3 == 1 ? "You: what is this\nMira: This is the inn.\nYou: bye\nMira: Goodbye.\n\n"
                                  : "You: bir oda var mi\nMira: Elbette, g\xc3\xbczel bir oda.\n\n";
    return lines.c_str();
}

// A small model that knows the text above by heart; made once.
static const Model& model() {
    static Runtime runtime;
    static Model trained;
    static bool done = false;
    if (done) return trained;
    done = true;
    Corpus corpus;
    Tokenizer tokenizer;
    Data data;
    Trainer trainer;
    CorpusConfig dialogues;
    dialogues.split_documents = true;
    Config config;
    config.layers = 2, config.heads = 2, config.width = 32, config.context = 64;
    TrainConfig how;
    how.batch = 8, how.steps = 220, how.lr = 5e-3, how.warmup = 10;
    RunResult result;
    CHECK_OK(corpus.open_memory(runtime, text(), dialogues));
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 300}, corpus));
    CHECK_OK(trained.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK_OK(trained.set_chat("You: ", "Mira: "));
    CHECK_OK(data.create(runtime, corpus, Part::all, trained.tokenizer));
    CHECK_OK(trainer.create(runtime, trained, how, data));
    CHECK_OK(trainer.run(RunConfig(), result));
    return trained;
}

static SampleConfig greedy() {
    SampleConfig config;
    config.temperature = 0;
    return config;
}

static std::string say(Session& session, const char* prompt, const SampleConfig& config, bool reply = false, Generation* out = nullptr) {
    Array<char> said(*session.runtime);
    Generation own, &result = out ? *out : own;
    result.text = &said;
    CHECK_OK(reply ? session.reply(prompt, config, result) : session.generate(prompt, config, result));
    result.text = nullptr;
    return std::string(said.data() ? said.data() : "", said.size());
}

TEST(cache_is_the_full_pass, "a token read alone would give other bits than a token read with its text") {
    Runtime own;
    Config config;
    config.layers = 2, config.heads = 3, config.width = 42, config.context = 64, config.vocab = 90, config.positions = Positions::rotary;
    Model rotary, llama;
    CHECK_OK(rotary.create(own, config, Tokenizer()));
    CHECK_OK(preset_architecture("llama", config));
    config.kv_heads = 1;
    CHECK_OK(llama.create(own, config, Tokenizer()));
    for (int variant = 0; variant < 28; ++variant) {
        if (variant % 12 == 8) CHECK_OK(rotary.convert(Dtype::bf16)), CHECK_OK(llama.convert(Dtype::bf16));
        if (variant % 12 == 0 && variant) CHECK_OK(rotary.convert(Dtype::int8)), CHECK_OK(llama.convert(Dtype::int8));
        const Model& m = variant < 4 ? model() : variant % 8 < 4 ? rotary : llama;
        int32_t ids[60];
        for (int i = 0; i < 60; ++i) ids[i] = (i * 37 + i * i) % m.config.vocab;
        const Backend backend = variant & 1 ? Backend::cpu : Backend::plain;
        const int threads = variant & 2 ? 1 : 3;
        Runtime runtime;
        runtime.backend = backend, runtime.threads = threads;
        runtime.allocate = [](void*, size_t bytes, size_t alignment) {
            void* const memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
            return memory ? memset(memory, 0xff, bytes) : nullptr;  // NaN: what a session has not written must not count
        };
        runtime.release = [](void*, void* memory, size_t) { free(memory); };
        Session whole, single, mixed;
        CHECK_OK(whole.create(runtime, m));
        CHECK_OK(single.create(runtime, m));
        CHECK_OK(mixed.create(runtime, m));
        CHECK_OK(whole.feed(Span<const int32_t>(ids, 60)));
        for (int i = 0; i < 60; ++i) CHECK_OK(single.feed(Span<const int32_t>(ids + i, 1)));
        CHECK_OK(mixed.feed(Span<const int32_t>(ids, 33)));
        CHECK_OK(mixed.feed(Span<const int32_t>(ids + 33, 27)));
        const size_t bytes = whole.logits().size * sizeof(float);
        CHECK(bytes > 0 && memcmp(whole.logits().data, single.logits().data, bytes) == 0);
        CHECK(memcmp(whole.logits().data, mixed.logits().data, bytes) == 0);
    }
}

TEST(numbers_of_fewer_bits, "a model in bf16 or int8 would not say what its rounded weights say, or be much worse than it was") {
    Runtime fast, plain;
    plain.backend = Backend::plain;
    for (const bool tied : {true, false}) {
        Config config;
        config.layers = 2, config.heads = 2, config.width = 34, config.context = 40, config.vocab = 70, config.tied = tied;
        Model m;
        CHECK_OK(m.create(fast, config, Tokenizer()));
        for (const Weight& weight : m.names)  // logits that say something
            for (int64_t i = 0; i < weight.rows * weight.cols && !weight.is_vector; ++i) m.weights[weight.offset + i] *= 5;
        int32_t ids[40];
        for (int i = 0; i < 40; ++i) ids[i] = i * 29 % 70;
        Session session, other;
        CHECK_OK(session.create(fast, m));
        CHECK_OK(other.create(plain, m));
        std::vector<float> before, now;
        const auto read = [&](Session& with) {
            with.reset();
            CHECK_OK(with.feed(Span<const int32_t>(ids, 25)));
            for (int i = 25; i < 40; ++i) CHECK_OK(with.feed(Span<const int32_t>(ids + i, 1)));
            now.assign(with.logits().data, with.logits().data + 70);
        };
        read(session);
        before = now;
        for (const Dtype dtype : {Dtype::bf16, Dtype::int8}) {  // the sessions go on with the converted model
            std::vector<float> kept(m.weights, m.weights + m.block);
            CHECK_OK(m.convert(dtype));
            CHECK(m.config.dtype == dtype && memcmp(kept.data(), m.weights, kept.size() * sizeof(float)) != 0);
            kept.assign(m.weights, m.weights + m.block);
            CHECK_OK(m.convert(dtype));  // what has been rounded stays as it is
            CHECK(memcmp(kept.data(), m.weights, kept.size() * sizeof(float)) == 0);
            read(session);
            const std::vector<float> said = now;
            const auto error = [&](const std::vector<float>& of, const std::vector<float>& from) {
                double difference = 0, size = 0;
                for (size_t i = 0; i < 70; ++i) difference += std::pow(of[i] - from[i], 2), size += std::pow(from[i], 2);
                return std::sqrt(difference / size);
            };
            CHECK(error(said, before) > 0 && error(said, before) < (dtype == Dtype::bf16 ? 0.005 : 0.05));
            read(other);
            CHECK(now == said);
            Model floats;  // the same numbers, as floats
            CHECK_OK(floats.create(fast, config, Tokenizer()));
            memcpy(floats.weights, m.weights, static_cast<size_t>(m.block) * sizeof(float));
            Session third;
            CHECK_OK(third.create(fast, floats));
            read(third);
            // Which rounds neither keys and values nor, in int8, rows.
            CHECK(now != said && error(said, now) < (dtype == Dtype::bf16 ? 0.005 : 0.05));
        }
        const Weight* matrix = m.find("h.0.attn.c_attn.weight");
        m.weights[matrix->offset + 5] = NAN;
        CHECK(m.convert(Dtype::int8).error == Error::not_finite);
    }
    Model empty;
    CHECK(empty.convert(Dtype::int8).error == Error::invalid_argument);
}

TEST(evaluated_as_it_talks, "evaluate would report the loss of another computation than that of a session") {
    Runtime runtime;
    for (const bool llama : {false, true}) {
        Config config;
        config.layers = 2, config.heads = 2, config.width = 36, config.context = 40, config.vocab = 70;
        if (llama) CHECK_OK(preset_architecture("llama", config));
        Model m;
        CHECK_OK(m.create(runtime, config, Tokenizer()));
        for (const Weight& weight : m.names)  // so that keys and values matter
            for (int64_t i = 0; i < weight.rows * weight.cols && !weight.is_vector; ++i) m.weights[weight.offset + i] *= 5;
        int32_t ids[41];
        for (int i = 0; i < 41; ++i) ids[i] = i * 29 % 70;
        const Example example{Span<const int32_t>(ids, 40), Span<const int32_t>(ids + 1, 40), {}, {}};
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8}) {
            CHECK_OK(m.convert(dtype));
            Data data;
            Evaluation evaluation;
            CHECK_OK(data.create(runtime, Span<const Example>(&example, 1)));
            CHECK_OK(evaluate(runtime, m, data, evaluation));
            Session session;
            CHECK_OK(session.create(runtime, m));
            double sum = 0;
            for (int i = 0; i < 40; ++i) {
                CHECK_OK(session.feed(Span<const int32_t>(ids + i, 1)));
                double total = 0;
                for (const float logit : session.logits()) total += exp(static_cast<double>(logit));
                sum += log(total) - static_cast<double>(session.logits()[static_cast<size_t>(ids[i + 1])]);
            }
            CHECK(fabs(sum / 40 - evaluation.loss) < 1e-6 * evaluation.loss);
        }
    }
}

TEST(chat, "a model that knows its dialogues by heart would not answer") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    CHECK(say(session, "how are you", greedy(), true) == "I am well, thank you.");
    session.reset();
    CHECK(say(session, "what is this", greedy(), true) == "This is the inn.");
    CHECK(say(session, "bye", greedy(), true) == "Goodbye.");
}

TEST(greedy_is_top_1, "top_k = 1, or a very small top_p or temperature, would not be the best token") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    SampleConfig one = SampleConfig(), narrow = SampleConfig(), cold = SampleConfig();
    one.top_k = 1, narrow.top_p = 1e-9, narrow.min_p = 0, cold.temperature = 1e-6;
    const std::string expected = say(session, "You: bye", greedy());
    for (const SampleConfig& config : {one, narrow, cold}) {
        session.reset();
        CHECK(say(session, "You: bye", config) == expected);
    }
}

TEST(sampling_follows_the_probabilities, "sampled tokens would not be as frequent as the model says") {
    Runtime runtime;
    Session session;
    const Model& m = model();
    CHECK_OK(session.create(runtime, m));
    SampleConfig config;
    config.temperature = 3, config.min_p = 0;  // flat enough that many tokens occur
    const int32_t start[] = {m.tokenizer.end_of_text};
    CHECK_OK(session.feed(start));
    const Span<const float> logits = session.logits();
    double total = 0, chance[3000] = {};
    for (size_t i = 0; i < logits.size; ++i) total += chance[i] = exp(static_cast<double>(logits[i]) / 3);
    int seen[3000] = {};
    constexpr int draws = 20000;
    for (int i = 0; i < draws; ++i) {
        session.reset();
        CHECK_OK(session.feed(start));
        config.seed = static_cast<uint64_t>(i);
        int32_t id = 0;
        CHECK_OK(session.next(config, id));
        ++seen[id];
    }
    double chi = 0, kinds = 0;
    for (size_t i = 0; i < logits.size; ++i) {
        const double expected = chance[i] / total * draws;
        if (expected > 5) chi += (seen[i] - expected) * (seen[i] - expected) / expected, ++kinds;
    }
    CHECK(kinds > 20 && chi < kinds + 5 * sqrt(2 * kinds));
}

TEST(logits_of_the_host, "an n-gram model would draw in another way than a session does") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    const size_t vocab = static_cast<size_t>(model().config.vocab);
    std::vector<float> logits(vocab);
    std::vector<int32_t> scratch(vocab);
    const LogitBias bias[] = {{3, 4.0f}};
    int32_t first[] = {5}, mine = 0, theirs = 0;
    for (int variant = 0; variant < 6; ++variant) {
        session.reset();
        CHECK_OK(session.feed(first));
        SampleConfig config;
        config.temperature = variant == 1 ? 0 : 1.3, config.top_k = variant == 2 ? 5 : 0, config.top_p = variant == 3 ? 0.7 : 1;
        config.min_p = variant == 4 ? 0 : 0.02, config.seed = 9;
        if (variant == 5) config.bias = bias;
        for (uint64_t i = 0; i < 40; ++i) {
            std::copy(session.logits().begin(), session.logits().end(), logits.begin());
            if (model().tokenizer.unknown >= 0) logits[static_cast<size_t>(model().tokenizer.unknown)] = -INFINITY;
            CHECK_OK(sample(logits, config, i, scratch, mine));
            CHECK_OK(session.next(config, theirs));
            CHECK(mine == theirs);
        }
    }
    SampleConfig cold;
    for (const double temperature : {0.0, 1e-45, 1e-39, 1e-37}) {  // where 1 / temperature is no float, too
        cold.temperature = temperature;
        for (size_t i = 0; i < vocab; ++i) logits[i] = i == 7 ? 1.0f : 0.5f;
        CHECK_OK(sample(logits, cold, 0, scratch, mine));
        CHECK(mine == 7);
    }
    std::fill(logits.begin(), logits.end(), -INFINITY);
    CHECK(!sample(logits, SampleConfig(), 0, scratch, mine).ok());
    CHECK(!sample(logits, SampleConfig(), 0, Span<int32_t>(scratch.data(), 3), mine).ok());
    CHECK(!sample(Span<float>(), SampleConfig(), 0, scratch, mine).ok());
}

TEST(seeds, "the same seed would give another text, or every seed the same") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    SampleConfig config;
    config.temperature = 2;
    const std::string first = say(session, "", config);
    session.reset();
    CHECK(say(session, "", config) == first);
    session.reset();
    config.seed = 2;
    CHECK(say(session, "", config) != first);
}

TEST(stop_strings, "a stop string would stand in the text, or not end it") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    SampleConfig config = greedy();
    const Text stops[] = {"nowhere", "thank"};
    config.stop = stops;
    Generation result;
    std::string streamed;
    result.user = &streamed;
    result.stream = [](void* user, Text piece) {
        static_cast<std::string*>(user)->append(piece.data, piece.size);
        return true;
    };
    CHECK(say(session, "You: how are you\nMira: ", config, false, &result) == "I am well, ");
    CHECK(result.stopped && streamed == "I am well, ");
}

TEST(banned_strings, "a banned word would be said, though cut into other tokens") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    SampleConfig config = greedy();
    const Text banned[] = {"well", "e"};
    config.banned = banned, config.tokens = 60;
    CHECK(say(session, "You: how are you\nMira: ", config).find('e') == std::string::npos);
    const std::string said = say(session, "You: how are you\nMira: ", greedy());  // what has been said stands; it is not said again
    const Text word = Text(said.data(), 4);
    config.banned = Span<const Text>(&word, 1);
    CHECK(say(session, "", config).find(said.substr(0, 4)) == std::string::npos);
    // What was said before a score is not joined with what comes after it.
    const Text across = "ca";
    Array<int32_t> ids(runtime);
    Array<float> logprobs(runtime);
    double sum = 0;
    LogitBias letter[] = {{0, 1e9f}};
    const auto says = [&](const char* text) {
        Array<int32_t> one(runtime);
        CHECK_OK(model().tokenizer.encode(text, one));
        letter[0].id = one[0];
        return say(session, "", config) == text;
    };
    config = greedy();
    config.bias = letter, config.tokens = 1;
    CHECK(says("c"));
    CHECK_OK(session.score("you", ids, logprobs, sum));
    config.banned = Span<const Text>(&across, 1);
    CHECK(says("a") && says("c") && !says("a"));
    const LogitBias bias[] = {{model().tokenizer.end_of_text, 1e9f}};
    config = greedy();
    config.bias = bias;
    Generation result;
    CHECK(say(session, "x", config, false, &result).empty() && result.stopped && result.generated == 1);
}

// The language of patterns by trying everything, for ASCII.
static bool is_word(const std::string& t, size_t i) { return i < t.size() && isalnum(static_cast<unsigned char>(t[i])); }
static bool matches_here(const char* p, const std::string& t, size_t i) {
    const bool more = i < t.size(), white = more && isspace(static_cast<unsigned char>(t[i]));
    if (!*p) return true;
    if (*p == '*') return matches_here(p + 1, t, i) || (more && !white && matches_here(p, t, i + 1));
    if (*p == '?') return more && !white && matches_here(p + 1, t, i + 1);
    if (*p == ' ') return white && (matches_here(p + 1, t, i + 1) || matches_here(p, t, i + 1));
    if (*p == '\\' && p[1] == 'b') return (i > 0 && is_word(t, i - 1)) != is_word(t, i) && matches_here(p + 2, t, i);
    if (*p == '[') {
        const char* end = strchr(p, ']');
        const bool none = p[1] == '!';
        bool found = false;
        for (const char* r = p + 1 + none; more && r < end; r += r[1] == '-' ? 3 : 1)
            found |= r[1] == '-' ? tolower(t[i]) >= r[0] && tolower(t[i]) <= r[2] : tolower(t[i]) == r[0];
        return more && found != none && matches_here(end + 1, t, i + 1);
    }
    return more && tolower(t[i]) == tolower(*p) && matches_here(p + 1, t, i + 1);
}
static bool holds(const char* pattern, const std::string& t, size_t from = 0) {  // a match that ends behind `from`
    for (size_t end = from + 1; end <= t.size(); ++end)
        for (size_t i = 0; i < end; ++i)
            if (matches_here(pattern, t, i) && !matches_here(pattern, t.substr(0, from), i)) return true;
    return false;
}

TEST(patterns, "a pattern would find what it does not say, or miss what it says") {
    Runtime runtime;
    const auto finds = [&](const char* pattern, const char* in) {
        const Text patterns[] = {"zzzz", pattern};
        Guard guard;
        bool found = false;
        CHECK_OK(guard.create(runtime, patterns));
        CHECK_OK(guard.find(in, found));
        return found;
    };
    const char* const patterns[] = {"ass",      "\\bass\\b", "as*t",  "a??t",  "[a-c]x[!0-9]",
                                    "big  cat", "\\b*ss",    "a*b*c", "?s\\b", "b[a-c]*\\b"};
    const char* const texts[] = {"ass",    "an ASS.", "asset",   "as set", "as", "a sst", "bx1",   "bxy",    "CX!",      "big \n cat",
                                 "bigcat", "glass",   "axxbxxc", "ab bc",  "",   " ",     "asast", "babcaz", "passes as"};
    for (const char* pattern : patterns)
        for (const char* in : texts) {
            std::string once = pattern;
            if (!strcmp(pattern, "big  cat")) once = "big cat";  // there one blank is any number, too
            bool expected = false;
            for (size_t i = 0; i <= strlen(in); ++i) expected |= matches_here(once.c_str(), in, i);
            if (!CHECK(finds(once.c_str(), in) == expected)) printf("  '%s' in '%s'\n", pattern, in);
        }
    CHECK(finds("kiz", "K\xc4\xb1Z") && finds("K\xc4\xb0Z", "k\xc4\xb1z") &&
          finds("\xc5\x9e"
                "ey",
                "bir \xc5\x9f"
                "ey"));  // Turkish: ı, İ, Ş
    CHECK(finds("\xd0\x9c\xd0\xb8\xd1\x80", "\xd0\xbc\xd0\x98\xd1\x80") &&
          finds("b?d",
                "b\xc3\xbc"
                "d") &&
          !finds("b??d",
                 "b\xc3\xbc"
                 "d"));
    const char* const capitals[][2] = {
        {"\u03ac\u03ad\u03ae\u03af\u03cc\u03cd\u03ce\u03ca\u03cb\u03c2",
         "\u0386\u0388\u0389\u038a\u038c\u038e\u038f\u03aa\u03ab\u03a3"},                  // Greek
        {"\u0219\u021b\u0103", "\u0218\u021a\u0102"},                                      // Romanian
        {"\u01a1\u01b0\u1ea1\u1ef9", "\u01a0\u01af\u1ea0\u1ef8"},                          // Vietnamese
        {"\u0491\u0454\u0457", "\u0490\u0404\u0407"},                                      // Ukrainian
        {"\u0259", "\u018f"},                                                              // Azerbaijani
        {"\u049b\u04d9\u04a3\u04b1\u04e9\u052f", "\u049a\u04d8\u04a2\u04b0\u04e8\u052e"},  // Kazakh, and the last of its row
        {"\u0253\u0257\u0199\u01b4", "\u0181\u018a\u0198\u01b3"},                          // Hausa
        {"\u04cf\u04c2\u04ce", "\u04c0\u04c1\u04cd"},                                      // of the Caucasus
        {"\u01ce\u01dc\u00df", "\u01cd\u01db\u1e9e"},
        {"\u0142\u017c\u00ff\u00fe", "\u0141\u017b\u0178\u00de"}};
    for (const auto& pair : capitals) CHECK(finds(pair[0], pair[1]) && finds(pair[1], pair[0]) && finds(pair[1], pair[1]));
    CHECK(!finds("\u00d7", "\u00f7") && !finds("\u0490", "\u0413"));
    CHECK(finds("bad",
                "b\xc2\xad"
                "a\xe2\x80\x8b"
                "d") &&
          finds("\\[x\\*", "a [x* b") && finds("a\\\\b", "A\\B") && finds("[]]", "a]"));
    for (const char* wrong :
         {"", "*", "\\b", "\\b*\\b", "[a", "[z-a]", "a\\", "\xff", "[]", "1234567890123456789012345678901234567890123456789012345678901"}) {
        const Text one[] = {wrong};
        Guard guard;
        CHECK(guard.create(runtime, one).error == Error::invalid_argument);
    }
    Guard empty;
    bool found;
    CHECK(empty.find("a", found).error == Error::invalid_argument);
}

TEST(guards,
     "a banned pattern would slip through: cut into tokens, across the prompt's end, where a stop string cuts, in a reply or a search") {
    Runtime runtime;
    Session session;
    const Model& m = model();
    CHECK_OK(session.create(runtime, m));
    const char* const patterns[] = {"WELL", "\\bi\\b", "e*k", "?n\\b", "[m-o]i", "d b", "\\bth", "x"};
    Text views[8];
    for (int i = 0; i < 8; ++i) views[i] = patterns[i];
    Guard guard;
    CHECK_OK(guard.create(runtime, views));
    std::vector<LogitBias> ascii;
    for (int32_t id = 0; id < m.config.vocab; ++id)
        for (const char c : m.tokenizer.bytes(id))
            if (c < 0 || id == m.tokenizer.end_of_text) ascii.push_back(LogitBias{id, -INFINITY});
    const Text stops[] = {"zq", "t", "ou"};
    int held[2] = {}, cut = 0;
    for (const bool guarded : {false, true})
        for (int seed = 0; seed < 60; ++seed) {
            SampleConfig config;
            config.temperature = 1 + seed % 4, config.min_p = 0, config.tokens = 40, config.seed = static_cast<uint64_t>(seed);
            config.bias = Span<const LogitBias>(ascii.data(), ascii.size());
            if (guarded) config.guard = &guard;
            if (seed % 3 == 0) config.stop = stops;
            session.reset();
            const std::string prompt = seed % 5 == 0 ? "You: bye\nMira: I am we" : seed % 5 == 1 ? "th" : "You: how are you\nMira: ";
            Generation result;
            const std::string said = say(session, prompt.c_str(), config, false, &result);
            cut += guarded && result.stopped;
            for (const char* pattern : patterns) held[guarded] += holds(pattern, prompt + said, prompt.size());
            for (int turn = 0; turn < 2; ++turn) {
                const std::string reply = say(session, "i am well", config, true);
                for (const char* pattern : patterns) held[guarded] += holds(pattern, "Mira: " + reply, 6);
            }
            const size_t before = static_cast<size_t>(session.position);
            int32_t id = 0;
            std::string alone;
            for (int i = 0; i < 20; ++i) {
                CHECK_OK(session.next(config, id));
                alone.append(m.tokenizer.bytes(id).data, m.tokenizer.bytes(id).size);
            }
            CHECK(before > 0);
            for (const char* pattern : patterns) held[guarded] += holds(pattern, "?" + alone, 2);
            if (seed > 5) continue;
            BeamConfig beams;
            beams.beams = 6, beams.best = 6, beams.tokens = 30, beams.guard = config.guard, beams.stop = config.stop;
            SearchResult found;
            session.reset();
            CHECK_OK(session.search(prompt.c_str(), beams, found));
            for (size_t i = 0; i < found.best.size(); ++i) {
                const std::string text(found.text_of(i).data, found.text_of(i).size);
                for (const char* pattern : patterns) held[guarded] += holds(pattern, prompt + text, prompt.size());
            }
        }
    CHECK(held[0] > 300 && held[1] == 0 && cut > 5);
    for (size_t length = 1; length < 5; ++length)  // a stop string makes a word of what is none, also in the middle of a token
        for (const bool guarded : {false, true}) {
            const std::string word = std::string("thank ").substr(0, length), stop = std::string("thank ").substr(length, 2);
            const std::string pattern = "\\b" + word + "\\b", plain = "I am well, " + word;
            const Text cuts[] = {Text(stop)}, words[] = {Text(pattern)};
            Guard no_word;
            CHECK_OK(no_word.create(runtime, words));
            SampleConfig config = greedy();
            config.stop = cuts, config.guard = guarded ? &no_word : nullptr;
            session.reset();
            const std::string said = say(session, "You: how are you\nMira: ", config);
            CHECK((said == plain) != guarded && (!guarded || !holds(pattern.c_str(), said)));
            BeamConfig beams;
            beams.stop = cuts, beams.guard = config.guard, beams.tokens = 20;
            SearchResult found;
            session.reset();
            CHECK_OK(session.search("You: how are you\nMira: ", beams, found));
            for (size_t i = 0; guarded && i < found.best.size(); ++i)
                CHECK(!holds(pattern.c_str(), std::string(found.text_of(i).data, found.text_of(i).size)));
        }
    // A byte is a token.
    Model bytes;
    Tokenizer byte_tokenizer;
    CHECK_OK(byte_tokenizer.create_bytes(runtime));
    Config config;
    config.layers = 1, config.heads = 1, config.width = 8, config.context = 32;
    CHECK_OK(bytes.create(runtime, config, static_cast<Tokenizer&&>(byte_tokenizer)));
    Session by_bytes;
    CHECK_OK(by_bytes.create(runtime, bytes));
    std::vector<LogitBias> abc;
    for (int32_t id = 0; id < 256; ++id)
        if (!strchr("ab\xc3\xa7\x87 ", id) || id == 0) abc.push_back(LogitBias{id, -INFINITY});
    const Text three[] = {"aba", "b\xc3\x87", "\\bb\\b"};  // small c with cedilla is meant, too
    CHECK_OK(guard.create(runtime, three));
    SampleConfig wild;
    wild.temperature = 1, wild.min_p = 0, wild.tokens = 400, wild.bias = Span<const LogitBias>(abc.data(), abc.size());
    for (const bool guarded : {false, true}) {
        by_bytes.reset();
        wild.guard = guarded ? &guard : nullptr;
        const std::string said = say(by_bytes, "a", wild);
        for (const char* never : {"aba", "b\xc3\x87", "b\xc3\xa7", " b "}) CHECK((said.find(never) == std::string::npos) == guarded);
    }
}

TEST(guards_go_on,
     "a guard made anew in its place would look for the old patterns, or a fork would forget what its parent's guard has seen") {
    Runtime runtime;
    const Model& m = model();
    Guard guard;
    SampleConfig config = greedy();
    config.guard = &guard, config.tokens = 4;
    Session session, fork;
    CHECK_OK(session.create(runtime, m));
    const Text first = "qqqq", second = "well";
    CHECK_OK(guard.create(runtime, Span<const Text>(&first, 1)));
    CHECK(say(session, "You: how are you\nMira: I am", config).substr(0, 4) == " wel");
    CHECK_OK(guard.create(runtime, Span<const Text>(&second, 1)));
    CHECK_OK(fork.fork(session));
    const std::string next = say(session, "", config);
    CHECK(next.substr(0, 1) != "l");
    CHECK(say(fork, "", config) == next);
    // A match that ends at a word's edge is decided by the token after it.
    const Text edge = "x-\\b";
    CHECK_OK(guard.create(runtime, Span<const Text>(&edge, 1)));
    std::vector<LogitBias> letter;
    for (int32_t id = 0; id < m.config.vocab; ++id) {
        const Text bytes = m.tokenizer.bytes(id);
        letter.push_back(LogitBias{id, bytes.size == 1 && bytes[0] == '-'   ? 1000.0f
                                       : bytes.size == 1 && bytes[0] == 'a' ? 500.0f
                                                                            : -1000.0f});
    }
    config.bias = Span<const LogitBias>(letter.data(), letter.size()), config.tokens = 1;
    session.reset();
    CHECK(say(session, "x", config) == "-");
    CHECK_OK(fork.fork(session));
    letter[0].bias = 0;
    for (LogitBias& one : letter) one.bias = one.bias > 600 ? -2000 : one.bias;
    const std::string after = say(session, "", config);
    CHECK(after != "a" && say(fork, "", config) == after);
}

TEST(inspection, "a host would not see the text before it is shown, word by word or line by line, or could not change or stop it") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    struct Host {
        std::string seen, shown;
        int pieces = 0;
        const char* bad = "";
        Verdict verdict = Verdict::pass;
    } host;
    Generation result;
    Array<char> text(runtime);
    result.text = &text, result.user = &host;
    result.inspect = [](void* user, Text piece, Array<char>& instead) {
        Host& h = *static_cast<Host*>(user);
        h.seen.append(piece.data, piece.size), ++h.pieces;
        if (std::string(piece.data, piece.size).find(h.bad) == std::string::npos || !*h.bad) return Verdict::pass;
        CHECK(instead.append("*** ", 4));
        return h.verdict;
    };
    result.stream = [](void* user, Text piece) {
        Host& h = *static_cast<Host*>(user);
        h.shown.append(piece.data, piece.size);
        CHECK(h.shown.size() <= h.seen.size());
        return true;
    };
    const auto ask = [&](const char* bad, Verdict verdict, bool lines) {
        host = Host(), host.bad = bad, host.verdict = verdict, result.inspect_lines = lines;
        text.clear();
        session.reset();
        CHECK_OK(session.generate("You: how are you\nMira: ", greedy(), result));
        CHECK(std::string(text.data(), text.size()) == host.shown);
        return host.shown;
    };
    CHECK(ask("", Verdict::pass, false) == "I am well, thank you." && host.pieces == 5 && !result.refused);
    CHECK(ask("well", Verdict::replace, false) == "I am *** thank you." && host.seen == "I am well, thank you.");
    CHECK(ask("well", Verdict::stop, false) == "I am " && result.refused && host.seen == "I am well, ");
    CHECK(ask("well", Verdict::replace, true) == "*** " && host.pieces == 1);
}

// A model whose tokenizer is of another kind, and that knows one line by heart.
static void learn_line(Runtime& runtime, Tokenizer&& tokenizer, const char* line, Model& m) {
    std::string lines;
    for (int i = 0; i < 40; ++i) lines += std::string(line) + "\n\n";
    Corpus corpus;
    Data data;
    Trainer trainer;
    CorpusConfig documents;
    documents.split_documents = true;
    Config config;
    config.layers = 1, config.heads = 2, config.width = 32, config.context = 24;
    TrainConfig how;
    how.batch = 4, how.steps = 150, how.lr = 1e-2, how.warmup = 10;
    RunResult result;
    CHECK_OK(corpus.open_memory(runtime, Text(lines), documents));
    CHECK_OK(m.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK_OK(data.create(runtime, corpus, Part::all, m.tokenizer));
    CHECK_OK(trainer.create(runtime, m, how, data));
    CHECK_OK(trainer.run(RunConfig(), result));
}

TEST(spaces, "a prompt that ends in a space, or none, would put two spaces or one too many before a word of WordPiece or SentencePiece") {
    for (const bool pieces : {false, true}) {
        Runtime runtime;
        Tokenizer tokenizer;
        std::string model_file;  // a SentencePiece model: pieces as protocol buffers
        if (pieces) {
            const char* const texts[] = {"<unk>",        "<s>", "</s>", "\xe2\x96\x81one", "\xe2\x96\x81two", "\xe2\x96\x81th", "ree",
                                         "\xe2\x96\x81", "e",   "f"};
            for (int i = 0; i < 10; ++i) {
                const float score = i < 3 ? 0.0f : -1.0f - static_cast<float>(i) / 10;
                std::string piece = std::string("\x0a") + static_cast<char>(strlen(texts[i])) + texts[i] + "\x15";
                piece.append(reinterpret_cast<const char*>(&score), 4);
                piece += std::string("\x18") + (i == 0 ? '\x02' : i < 3 ? '\x03' : '\x01');
                model_file += std::string("\x0a") + static_cast<char>(piece.size()) + piece;
            }
            model_file += std::string("\x12\x02\x18\x01\x1a\x06\x18\x01\x20\x01\x28\x01");
            runtime.files.user = &model_file;
            runtime.files.open = [](void* self, const char*, FileMode) { return self; };
            runtime.files.size = [](void*, void* file) { return static_cast<int64_t>(static_cast<std::string*>(file)->size()); };
            runtime.files.read = [](void*, void* file, int64_t at, void* to, int64_t bytes) {
                return static_cast<int64_t>(
                    static_cast<std::string*>(file)->copy(static_cast<char*>(to), static_cast<size_t>(bytes), static_cast<size_t>(at)));
            };
            runtime.files.close = [](void*, void*) { return 0; };
            CHECK_OK(tokenizer.load(runtime, "small.model"));
        } else {
            TokenizerConfig words;
            words.kind = TokenizerKind::wordpiece, words.vocab = 60;
            CHECK_OK(tokenizer.train(runtime, words, "one two three one two three"));
        }
        Model m;
        learn_line(runtime, static_cast<Tokenizer&&>(tokenizer), "one two three", m);
        Session session;
        CHECK_OK(session.create(runtime, m));
        for (const char* prompt : {"", "one", "one ", "one two", "one two "}) {
            session.reset();
            const std::string said = say(session, prompt, greedy());
            if (!CHECK(prompt + said == "one two three")) printf("  '%s' goes on with '%s'\n", prompt, said.c_str());
            session.reset();
            SearchResult found;
            BeamConfig config;
            config.beams = 3;
            CHECK_OK(session.search(prompt, config, found));
            CHECK(prompt + std::string(found.text_of(0).data, found.text_of(0).size) == "one two three");
        }
    }
}

TEST(odd_prompts,
     "white space that a tokenizer drops would be an error, or a token that begins texts, and has a name with a space, a crash") {
    Runtime runtime;
    Tokenizer tokenizer;
    TokenizerConfig words;
    words.kind = TokenizerKind::wordpiece, words.vocab = 60;
    CHECK_OK(tokenizer.train(runtime, words, "one two three one two three"));
    Model m;
    learn_line(runtime, static_cast<Tokenizer&&>(tokenizer), "one two three", m);
    Session session;
    CHECK_OK(session.create(runtime, m));
    for (const char* prompt : {" ", "\n", "\xcc\x81"}) {
        session.reset();
        CHECK(say(session, prompt, greedy()) == "one two three");
        session.reset();
        SearchResult found;
        CHECK_OK(session.search(prompt, BeamConfig(), found));
        CHECK(found.best.size() == 1);
    }
    Model marked;
    Tokenizer spaced;
    Config config;
    config.layers = 1, config.heads = 1, config.width = 8, config.context = 32;
    CHECK_OK(spaced.train(runtime, {TokenizerKind::bpe, 300}, text()));
    int32_t mark = 0;
    while (!(spaced.bytes(mark).size > 1 && spaced.bytes(mark)[0] == ' ')) ++mark;
    spaced.begin_of_text = mark;
    CHECK_OK(marked.create(runtime, config, static_cast<Tokenizer&&>(spaced)));
    CHECK_OK(session.create(runtime, marked));
    const LogitBias likely[] = {{mark, 1000.0f}};
    SampleConfig how;
    how.bias = likely, how.tokens = 1;
    Generation result;
    Array<int32_t> ids;  // of no runtime: it gets the session's
    Array<char> said;
    result.ids = &ids, result.text = &said;
    CHECK_OK(session.generate("how ", how, result));
    CHECK(ids.size() == 1 && ids[0] != mark);
}

TEST(streaming, "a stream would cut a character in two, or not stop when told") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    SampleConfig config;
    config.temperature = 4, config.min_p = 0, config.tokens = 300;
    Generation result;
    std::string pieces;
    result.user = &pieces;
    result.stream = [](void* user, Text piece) {
        std::string& all = *static_cast<std::string*>(user);
        all.append(piece.data, piece.size);
        return all.size() < 40;
    };
    const std::string exact = say(session, "", config, false, &result);
    CHECK(result.cancelled && exact.compare(0, pieces.size(), pieces) == 0);
    Utf8Stream utf8;
    char out[16];
    CHECK(utf8.push(Text("\xc3", 1), out) == 0 && utf8.push(Text("\xbcx", 2), out) == 3 && memcmp(out, "\xc3\xbcx", 3) == 0);
}

TEST(end_of_context, "a talk longer than the context would end, or what is remembered would not be what was read last") {
    Runtime runtime;
    const Model& m = model();
    Session session, fresh;
    int32_t ids[150];
    for (int i = 0; i < 150; ++i) ids[i] = (i * 31 + i * i) % m.config.vocab;
    CHECK_OK(session.create(runtime, m));
    CHECK_OK(fresh.create(runtime, m));
    for (const int piece : {1, 7, 30, 150}) {
        session.reset();
        for (int i = 0; i < 150; i += piece) {
            CHECK_OK(session.feed(Span<const int32_t>(ids + i, static_cast<size_t>(i + piece < 150 ? piece : 150 - i))));
            CHECK(session.position <= m.config.context);
        }
        CHECK(session.forgotten > 0 && session.forgotten + static_cast<uint64_t>(session.position) == 150 &&
              session.position >= m.config.context / 2);
        fresh.reset();
        CHECK_OK(fresh.feed(Span<const int32_t>(ids + session.forgotten, static_cast<size_t>(session.position))));
        CHECK(memcmp(session.logits().data, fresh.logits().data, session.logits().size * sizeof(float)) == 0);
    }
    Generation result;
    SampleConfig config = greedy();
    const LogitBias never[] = {{m.tokenizer.end_of_text, -1e9f}};
    config.tokens = 200, config.bias = never;
    session.reset();
    say(session, "You: ", config, false, &result);
    CHECK(result.generated == 200 && session.position <= m.config.context);
}

TEST(scores, "a score would not be the sum of the model's log-probabilities") {
    Runtime runtime;
    Session session, other;
    const Model& m = model();
    CHECK_OK(session.create(runtime, m));
    CHECK_OK(other.create(runtime, m));
    Array<int32_t> ids;
    Array<float> logprobs;
    double known = 0, strange = 0;
    CHECK_OK(session.score("You: how are you\nMira: I am well, thank you.\n", ids, logprobs, known));
    CHECK(ids.size() == logprobs.size() && logprobs[0] == 0.0f);
    double total = 0;
    for (size_t i = 1; i < ids.size(); ++i) {  // one id at a time, from the logits
        CHECK_OK(other.feed(Span<const int32_t>(&ids[i - 1], 1)));
        double sum = 0, biggest = -1e30;
        for (const float l : other.logits()) biggest = static_cast<double>(l) > biggest ? static_cast<double>(l) : biggest;
        for (const float l : other.logits()) sum += exp(static_cast<double>(l) - biggest);
        const double logprob = static_cast<double>(other.logits()[static_cast<size_t>(ids[i])]) - biggest - log(sum);
        CHECK(fabs(logprob - static_cast<double>(logprobs[i])) < 1e-4);
        total += logprob;
    }
    CHECK(fabs(total - known) < 1e-3);
    session.reset();
    CHECK_OK(session.score("uoY :woh era uoy\narMi: I ma llew, knaht uoy.\n", ids, logprobs, strange));
    CHECK(strange < known - 20);
}

static void check_attention(const Model& m) {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, m));
    const int32_t ids[] = {5, 9, 12, 7, 9};
    CHECK_OK(session.feed(ids));
    Array<float> p;
    CHECK_OK(session.attention(1, p));
    for (size_t head = 0; head < 2; ++head)
        for (size_t i = 0; i < 5; ++i) {
            double sum = 0;
            for (size_t k = 0; k < 5; ++k) {
                const double one = static_cast<double>(p[(head * 5 + i) * 5 + k]);
                CHECK(k <= i ? one >= 0 : !(one > 0));
                sum += one;
            }
            CHECK(fabs(sum - 1) < 1e-5);
        }
    CHECK(session.attention(2, p).error == Error::invalid_argument);
}

TEST(begin_of_text, "what begins a text would not stand once before all that a session reads, be forgotten, or show in what it says") {
    Runtime runtime;
    Model with;
    Tokenizer tokenizer;
    Config config;
    config.layers = 1, config.heads = 2, config.width = 16, config.context = 32;
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::sentencepiece, 80}, text()));
    const int32_t begin = tokenizer.begin_of_text = 1;  // <s>
    CHECK_OK(with.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK_OK(with.set_chat("You: ", "Mira:"));
    const auto ids_of = [&](const char* some, bool begins) {
        Array<int32_t> ids(runtime);
        if (begins) CHECK(ids.push(begin));
        CHECK_OK(with.tokenizer.encode(some, ids));
        return std::vector<int32_t>(ids.begin(), ids.end());
    };
    // Has the session read just these ids?
    const auto has_read = [&](const Session& session, const std::vector<int32_t>& ids) {
        Session other;
        CHECK_OK(other.create(runtime, with));
        CHECK_OK(other.feed(Span<const int32_t>(ids.data(), ids.size())));
        const Span<const float> a = session.logits(), b = other.logits();
        return session.position == static_cast<int>(ids.size()) && a.size == b.size && memcmp(a.data, b.data, a.size * sizeof(float)) == 0;
    };
    const auto joined = [](std::vector<int32_t> a, const std::vector<int32_t>& b) { return a.insert(a.end(), b.begin(), b.end()), a; };
    SampleConfig nothing = greedy();
    nothing.tokens = 0;
    Session session;
    CHECK_OK(session.create(runtime, with));
    for (int twice = 0; twice < 2; ++twice, session.reset()) {
        say(session, "You: hi", nothing);
        CHECK(has_read(session, ids_of("You: hi", true)));
        say(session, " you", nothing);
        CHECK(has_read(session, joined(ids_of("You: hi", true), ids_of(" you", false))));
    }
    say(session, "", nothing);
    CHECK(has_read(session, {begin}));
    say(session, "bye", nothing, true);
    const std::vector<int32_t> turn = ids_of("You: bye\nMira:", false);
    CHECK(has_read(session, joined({begin}, turn)));
    session.reset();
    say(session, "bye", nothing, true);
    CHECK(has_read(session, joined({begin}, turn)));
    session.reset();
    CHECK_OK(session.feed(Span<const int32_t>(turn.data(), turn.size())));  // the host's ids
    say(session, "hi", nothing);
    CHECK(has_read(session, joined(turn, ids_of("hi", false))));
    // score and search
    session.reset();
    CHECK_OK(session.feed(Span<const int32_t>(&begin, 1)));
    Array<int32_t> ids, ids_after;
    Array<float> logprobs, logprobs_after;
    double sum = 0, sum_after = 0;
    CHECK_OK(session.score("how are you", ids_after, logprobs_after, sum_after));
    session.reset();
    CHECK_OK(session.score("how are you", ids, logprobs, sum));
    CHECK(std::vector<int32_t>(ids.begin(), ids.end()) == ids_of("how are you", false) && logprobs[0] < 0 && sum == sum_after);
    CHECK(has_read(session, ids_of("how are you", true)));
    BeamConfig beams;
    SearchResult found;
    beams.tokens = 5;
    for (const char* prompt : {"You: hi", ""}) {
        session.reset();
        CHECK_OK(session.search(prompt, beams, found));
        CHECK(has_read(session, *prompt ? ids_of(prompt, true) : std::vector<int32_t>{begin}));
    }
    // Said, it is no text, and does not end it. At the end of the context it stays where it is.
    const LogitBias bias[] = {{begin, 1e9f}};
    SampleConfig only = greedy();
    only.bias = bias, only.tokens = 3;
    Generation said;
    Array<int32_t> spoken(runtime);
    said.ids = &spoken;
    session.reset();
    CHECK(say(session, "You: hi", only, false, &said) == "" && !said.stopped && spoken.count == 3 && spoken[2] == begin);
    std::vector<int32_t> all = ids_of("You: hi", false);
    all.insert(all.end(), 3, begin);
    SampleConfig more;
    more.tokens = 60;
    const LogitBias never[] = {{with.tokenizer.end_of_text, -1e9f}};
    more.bias = never;
    spoken.count = 0;
    say(session, "", more, false, &said);
    all.insert(all.end(), spoken.begin(), spoken.end());
    CHECK(session.forgotten > 0 && all.size() > 60);
    CHECK(has_read(session, joined({begin}, std::vector<int32_t>(all.end() - (session.position - 1), all.end()))));
    // An encoder's texts begin with it, too.
    Model reader;
    Encoder encoder;
    config.causal = false;
    CHECK_OK(tokenizer.copy(runtime, with.tokenizer));
    CHECK_OK(reader.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK_OK(encoder.create(runtime, reader));
    CHECK_OK(encoder.encode("how are you", ids));
    CHECK(std::vector<int32_t>(ids.begin(), ids.end()) == ids_of("how are you", true));
    CHECK_OK(encoder.encode("", ids));
    CHECK(ids.count == 0);
}

TEST(attention_to_the_source, "a picture of a translation would show other words than those that were looked at") {
    Runtime runtime;
    Config config;
    config.layers = config.encoder_layers = 2, config.heads = 4, config.width = 32, config.context = 16, config.vocab = 30;
    config.positions = Positions::none;  // then what the source's tokens say does not depend on where they stand
    Model m;
    CHECK_OK(m.create(runtime, config, Tokenizer(), 3));
    for (int64_t i = 0; i < m.block; ++i) m.weights[i] *= 4;  // let it look at some more than at others
    const int32_t source[] = {7, 3, 21, 12}, moved[] = {12, 7, 3, 21}, ids[] = {5, 9, 12, 7, 9};
    Session session;
    Array<float> p, q;
    CHECK_OK(session.create(runtime, m));
    CHECK_OK(session.read_source(source));
    CHECK_OK(session.feed(ids));
    CHECK_OK(session.attention(1, p, true));
    CHECK_OK(session.read_source(moved));
    CHECK_OK(session.feed(ids));
    CHECK_OK(session.attention(1, q, true));
    if (!CHECK(p.size() == 4 * 5 * 4 && q.size() == p.size())) return;
    float unequal = 0;
    for (size_t row = 0; row < 4 * 5; ++row) {
        const float *at = p.data() + row * 4, *after = q.data() + row * 4;
        CHECK(std::fabs(at[0] + at[1] + at[2] + at[3] - 1) < 1e-5f);
        for (size_t k = 0; k < 4; ++k) CHECK(std::fabs(at[k] - after[(k + 1) % 4]) < 1e-4f);
        unequal = std::max(unequal, std::fabs(at[0] - at[1]));
    }
    CHECK(unequal > 0.01f);
    CHECK_OK(session.attention(1, q));
    CHECK(q.size() == 4 * 5 * 5);
    CHECK(session.attention(2, q, true).error == Error::invalid_argument);
    Session decoder;
    CHECK_OK(decoder.create(runtime, model()));
    CHECK_OK(decoder.feed(ids));
    CHECK(decoder.attention(0, q, true).error == Error::invalid_argument);
}

// A fresh encoder-decoder that has read a source, which reads ids at once or one by one.
static std::vector<float> said_of(const Model& m, Runtime& runtime, Span<const int32_t> source, Span<const int32_t> ids, bool one_by_one) {
    Session session;
    CHECK_OK(session.create(runtime, m));
    CHECK_OK(session.read_source(source));
    for (size_t i = 0; i < ids.size; i += one_by_one ? 1 : ids.size)
        CHECK_OK(session.feed(Span<const int32_t>(ids.data + i, one_by_one ? 1 : ids.size)));
    return std::vector<float>(session.logits().begin(), session.logits().end());
}

TEST(sources, "what a decoder says would not look at its source as training did, or would depend on what the session had read before") {
    Runtime fast, one, slow;
    fast.threads = 3, one.threads = 1, slow.backend = Backend::plain;
    for (int variant = 0; variant < 4; ++variant) {
        Config config;
        config.layers = 2, config.encoder_layers = 3, config.heads = 3, config.width = 42, config.context = 40, config.vocab = 90;
        if (variant != 1) CHECK_OK(preset_architecture("transformer", config));
        if (variant == 1) config.kv_heads = 1, config.positions = Positions::rotary;
        Model m;
        CHECK_OK(m.create(fast, config, Tokenizer()));
        int32_t source[40], other[7] = {5, 6, 7, 8, 1, 0, 89}, ids[33], targets[32];
        for (int i = 0; i < 40; ++i) source[i] = (i * 31 + i * i) % 90;
        for (int i = 0; i < 33; ++i) ids[i] = (i * 17 + i * i) % 90;
        for (int i = 0; i < 32; ++i) targets[i] = ids[i + 1];
        // The loss of training's tape, all at once and among other examples, is the score's.
        const Example examples[] = {{{ids, 32}, {targets, 32}, source, {}}, {{ids, 32}, {targets, 32}, other, {}}};
        for (int which = 0; which < 2 && variant < 2; ++which) {
            Data data;
            Evaluation evaluation;
            CHECK_OK(data.create(fast, Span<const Example>(examples + which, 1)));
            CHECK_OK(evaluate(fast, m, data, evaluation));
            Session session;
            CHECK_OK(session.create(one, m));
            CHECK_OK(session.read_source(examples[which].source));
            double sum = 0;
            for (int i = 0; i < 32; ++i) {
                CHECK_OK(session.feed(Span<const int32_t>(ids + i, 1)));
                double total = 0;
                for (const float logit : session.logits()) total += exp(static_cast<double>(logit));
                sum += log(total) - static_cast<double>(session.logits()[static_cast<size_t>(targets[i])]);
            }
            CHECK(fabs(sum / 32 - evaluation.loss) < 1e-6 * evaluation.loss);
        }
        if (variant == 2) CHECK_OK(m.convert(Dtype::bf16));
        if (variant == 3) CHECK_OK(m.convert(Dtype::int8));
        const std::vector<float> said = said_of(m, one, source, Span<const int32_t>(ids), false);
        CHECK(said == said_of(m, fast, source, Span<const int32_t>(ids), true));
        CHECK(said == said_of(m, slow, source, Span<const int32_t>(ids), true));
        CHECK(said != said_of(m, one, other, Span<const int32_t>(ids), false));
        CHECK(said != said_of(m, one, Span<const int32_t>(source, 39), Span<const int32_t>(ids), false));
        Session session;  // a second source leaves nothing of the first
        CHECK_OK(session.create(one, m));
        CHECK_OK(session.read_source(other));
        CHECK_OK(session.feed(Span<const int32_t>(ids, 9)));
        CHECK_OK(session.read_source(source));
        CHECK(session.position == 0 && session.logits().size == 0);
        CHECK_OK(session.feed(Span<const int32_t>(ids)));
        CHECK(said == std::vector<float>(session.logits().begin(), session.logits().end()));
        Array<float> p(one);
        CHECK_OK(session.attention(1, p));
        CHECK(p.size() == 3 * 33 * 33);
    }
}

TEST(sources_side_by_side, "sessions that go on together would look at each other's sources") {
    Runtime runtime;
    Config config;
    config.layers = 1, config.encoder_layers = 1, config.heads = 2, config.width = 24, config.context = 16, config.vocab = 50;
    Model m;
    CHECK_OK(m.create(runtime, config, Tokenizer()));
    Session alone[3], together[3];
    Session* sessions[3];
    for (int32_t i = 0; i < 3; ++i) {
        const int32_t source[] = {i * 7, i + 3, 9}, first = 1;
        for (Session* session : {&alone[i], &together[i]}) {
            CHECK_OK(session->create(runtime, m));
            CHECK_OK(session->read_source(source));
            CHECK_OK(session->feed(Span<const int32_t>(&first, 1)));
        }
        sessions[i] = &together[i];
    }
    for (int step = 0; step < 20; ++step) {  // beyond the end of the context, too
        int32_t ids[3], id = 0;
        const SampleConfig how = SampleConfig();
        CHECK_OK(next(sessions, Span<const SampleConfig>(&how, 1), ids));
        for (int i = 0; i < 3; ++i) {
            CHECK_OK(alone[i].next(how, id));
            CHECK(id == ids[i]);
            CHECK(memcmp(alone[i].logits().data, together[i].logits().data, 50 * sizeof(float)) == 0);
        }
    }
}

TEST(translating, "a model that knows its pairs by heart would not translate them, or a wrong call would crash") {
    static const char pairs[] =
        "one cat\tbir kedi\ntwo dogs\tiki k\xc3\xb6pek\na red house\tk\xc4\xb1rm\xc4\xb1z\xc4\xb1 bir ev\nthe sea\tdeniz\n";
    Runtime runtime;
    CorpusConfig tsv;
    tsv.format = TextFormat::tsv, tsv.validation_fraction = 0;
    Corpus corpus;
    Tokenizer tokenizer;
    Model m;
    Data data;
    Trainer trainer;
    Session session;
    Config config;
    CHECK_OK(preset_architecture("transformer", config));
    config.layers = config.encoder_layers = 1, config.heads = 2, config.width = 32, config.context = 24;
    TrainConfig how;
    how.batch = 4, how.steps = 120, how.lr = 5e-3, how.warmup = 20, how.schedule = Schedule::inverse_sqrt, how.label_smoothing = 0.1;
    RunResult run;
    CHECK_OK(corpus.open_memory(runtime, pairs, tsv));
    CHECK_OK(tokenizer.train(runtime, {TokenizerKind::bpe, 280}, corpus));
    CHECK_OK(m.create(runtime, config, static_cast<Tokenizer&&>(tokenizer)));
    CHECK_OK(data.create_pairs(runtime, corpus, Part::all, m.tokenizer, 24));
    CHECK_OK(trainer.create(runtime, m, how, data));
    CHECK_OK(trainer.run(RunConfig(), run));
    CHECK_OK(session.create(runtime, m));
    Generation result;
    Array<int32_t> ids(runtime);
    Array<float> logprobs(runtime);
    double sum = 0;
    CHECK(session.generate("", greedy(), result).error == Error::invalid_argument);  // no source
    CHECK(session.feed(Span<const int32_t>()).error == Error::invalid_argument);
    CHECK(session.score("x", ids, logprobs, sum).error == Error::invalid_argument);
    for (const char* line : {"the sea\tdeniz", "one cat\tbir kedi", "a red house\tk\xc4\xb1rm\xc4\xb1z\xc4\xb1 bir ev"}) {
        const std::string pair = line, source = pair.substr(0, pair.find('\t')), target = pair.substr(pair.find('\t') + 1);
        CHECK_OK(session.read_source(source));
        CHECK(say(session, "", greedy(), false, &result) == target && result.stopped);
        SearchResult found;
        BeamConfig search;
        for (const int beams : {1, 3}) {  // all see the same source
            search.beams = beams;
            CHECK_OK(session.read_source(source));
            CHECK_OK(session.search("", search, found));
            CHECK(std::string(found.text_of(0).data, found.text_of(0).size) == target && found.best[0].ended);
        }
        double last = found.best[0].logprob;
        CHECK_OK(session.read_source(source));  // what the search says of its best is what the session says when it reads it
        CHECK_OK(session.feed(Span<const int32_t>(&m.tokenizer.end_of_text, 1)));
        for (const int32_t id : found.ids_of(0)) {
            double total = 0;
            for (const float logit : session.logits()) total += exp(static_cast<double>(logit));
            last -= static_cast<double>(session.logits()[static_cast<size_t>(id)]) - log(total);
            CHECK_OK(session.feed(Span<const int32_t>(&id, 1)));
        }
        CHECK(fabs(last) < 1e-5);
        CHECK_OK(session.read_source(source));
        CHECK(say(session, target.substr(0, 3).c_str(), greedy()).size() > 0);  // the beginning may be given
        CHECK_OK(session.read_source(source));
        CHECK_OK(session.score(target, ids, logprobs, sum));
        CHECK(sum > -4 && logprobs[0] < 0);
        const double right = sum;
        CHECK_OK(session.read_source("two dogs"));
        CHECK_OK(session.score(target, ids, logprobs, sum));
        CHECK(sum < right - 4);
        session.reset();
        CHECK(session.generate("", greedy(), result).error == Error::invalid_argument);
    }
    int32_t many[25] = {};
    CHECK(session.read_source(Span<const int32_t>(many)).error == Error::invalid_argument);
    CHECK(session.read_source(Span<const int32_t>()).error == Error::invalid_argument);
    many[0] = m.config.vocab;
    CHECK(session.read_source(Span<const int32_t>(many, 1)).error == Error::invalid_argument);
    Session talks;
    CHECK(talks.read_source("x").error == Error::invalid_argument);
    CHECK_OK(talks.create(runtime, model()));
    CHECK(talks.read_source("x").error == Error::invalid_argument);
}

TEST(attention_rows, "attention would not be a probability over what came before") {
    check_attention(model());
    Runtime runtime;
    Config config = model().config;
    Model llama;
    CHECK_OK(preset_architecture("llama", config));
    config.kv_heads = 1;
    CHECK_OK(llama.create(runtime, config, Tokenizer()));
    check_attention(llama);
}

TEST(side_by_side, "sessions of one model on several threads would disturb each other") {
    const Model& m = model();
    static std::string said[4];
    std::thread threads[4];
    Runtime shared;  // one pool for all
    for (int i = 0; i < 4; ++i)
        threads[i] = std::thread([&m, &shared, i] {
            Session session;
            CHECK_OK(session.create(shared, m));
            for (int round = 0; round < 5; ++round) {
                session.reset();
                said[i] = say(session, i % 2 ? "how are you" : "what is this", greedy(), true);
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < 4; ++i) CHECK(said[i] == (i % 2 ? "I am well, thank you." : "This is the inn."));
}

TEST(several_at_once, "sessions that go on together would say other things than each alone, or a wrong call would lose a token") {
    for (int variant = 0; variant < 6; ++variant) {
        Runtime runtime;
        runtime.backend = variant % 2 ? Backend::cpu : Backend::plain, runtime.threads = variant / 2 + 1;
        constexpr int count = 70;  // more than are read in one pass
        Session together[count], alone[count];
        Session* all[count];
        SampleConfig configs[count];
        int32_t said[count], id;
        for (int i = 0; i < count; ++i) {
            CHECK_OK(together[i].create(runtime, model()));
            CHECK_OK(alone[i].create(runtime, model()));
            all[i] = &together[i];
            configs[i].seed = static_cast<uint64_t>(i), configs[i].temperature = 1 + 0.01 * i;
            std::vector<int32_t> prompt;  // of different lengths; some are near the end of the context
            for (int k = 0; k < (i * 13) % model().config.context + 1; ++k) prompt.push_back((i + k * 7) % model().config.vocab);
            CHECK_OK(together[i].feed(Span<const int32_t>(prompt.data(), prompt.size())));
            CHECK_OK(alone[i].feed(Span<const int32_t>(prompt.data(), prompt.size())));
        }
        int different = 0;
        for (int round = 0; round < 5; ++round) {
            CHECK_OK(next(Span<Session* const>(all, count), Span<const SampleConfig>(configs, count), said));
            for (int i = 0; i < count; ++i) {
                CHECK_OK(alone[i].next(configs[i], id));
                different += id != said[i] || alone[i].position != together[i].position;
                different += memcmp(alone[i].logits().data, together[i].logits().data, alone[i].logits().size * sizeof(float)) != 0;
            }
        }
        CHECK(different == 0);
        // The third cannot go on; the first two have said and read a token.
        const LogitBias wrong{-1, 0.0f};
        configs[2].bias = Span<const LogitBias>(&wrong, 1);
        const Status status = next(Span<Session* const>(all, 4), Span<const SampleConfig>(configs, 4), said);
        CHECK(status.error == Error::invalid_argument && strstr(status.message, "-1"));
        for (int i = 0; i < 4; ++i) CHECK(together[i].sampled == (i < 2 ? 6u : 5u));
        CHECK_OK(alone[1].next(configs[1], id));
        CHECK(id == said[1] && memcmp(alone[1].logits().data, together[1].logits().data, alone[1].logits().size * sizeof(float)) == 0);
        const auto fails = [&](Span<Session* const> sessions, size_t how_many, Error error) {
            return next(sessions, Span<const SampleConfig>(configs + 5, how_many), said).error == error;
        };
        Session* wrong_ones[] = {all[0], all[0], nullptr};
        CHECK(fails(Span<Session* const>(wrong_ones, 2), 1, Error::invalid_argument));
        CHECK(fails(Span<Session* const>(wrong_ones + 1, 2), 1, Error::invalid_argument));
        CHECK(fails(Span<Session* const>(all, 3), 2, Error::invalid_argument));
        CHECK_OK(next(Span<Session* const>(), Span<const SampleConfig>(configs, 1), said));
    }
}

static double logprob_of(Session& session, Span<const int32_t> ids) {  // of ids after what the session has read, from its logits
    double sum = 0;
    for (size_t i = 0; i < ids.size; ++i) {
        double total = 0;
        for (const float l : session.logits()) total += exp(static_cast<double>(l));
        sum += static_cast<double>(session.logits()[static_cast<size_t>(ids[i])]) - log(total);
        if (i + 1 < ids.size) CHECK_OK(session.feed(Span<const int32_t>(&ids[i], 1)));
    }
    return sum;
}
static std::vector<int32_t> ids_of(const SearchResult& result, size_t i) {
    return std::vector<int32_t>(result.ids_of(i).begin(), result.ids_of(i).end());
}

// A model of five tokens with opinions.
static void create_tiny(Runtime& runtime, Model& m, const char* architecture) {
    Config config;
    config.layers = 2, config.heads = 2, config.width = 16, config.context = 40, config.vocab = 5;
    CHECK_OK(preset_architecture(architecture, config));
    CHECK_OK(m.create(runtime, config, Tokenizer(), 3));
    for (const Weight& weight : m.names)
        for (int64_t i = 0; i < weight.rows * weight.cols && !weight.is_vector; ++i) m.weights[weight.offset + i] *= 12;
}

TEST(search_of_everything, "beams as many as there are texts would not find the likeliest ones") {
    for (const char* architecture : {"gpt2", "llama"}) {
        Runtime runtime;
        Model m;
        create_tiny(runtime, m, architecture);
        Session session, other;
        CHECK_OK(session.create(runtime, m));
        CHECK_OK(other.create(runtime, m));
        const int32_t prompt[] = {1, 2, 4, 3}, stop[] = {0};
        struct Found {
            std::vector<int32_t> ids;
            double logprob, score;
        };
        std::vector<Found> all;
        constexpr int longest = 4;
        for (int number = 0; number < 5 * 5 * 5 * 5; ++number) {  // the texts of up to four tokens, of which only the last is 0
            std::vector<int32_t> ids;
            for (int i = 0, rest = number; i < longest && (i == 0 || ids.back() != 0); ++i, rest /= 5) ids.push_back(rest % 5);
            int again = number;
            for (size_t i = 0; i < ids.size(); ++i) again /= 5;
            if (again != 0) continue;  // the same text has been seen with other digits behind its end
            other.reset();
            CHECK_OK(other.feed(prompt));
            all.push_back(Found{ids, logprob_of(other, Span<const int32_t>(ids.data(), ids.size())), 0});
        }
        CHECK(all.size() == 1 + 4 + 16 + 64 * 5);
        for (const double penalty : {0.0, 1.0, -1.0, 2.5})
            for (const EarlyStopping early : {EarlyStopping::no, EarlyStopping::yes, EarlyStopping::never}) {
                for (Found& found : all) found.score = found.logprob / pow(static_cast<double>(found.ids.size()), penalty);
                std::sort(all.begin(), all.end(), [](const Found& a, const Found& b) { return a.score > b.score; });
                BeamConfig config;
                config.beams = 625, config.best = 341, config.tokens = longest, config.length_penalty = penalty;
                config.early_stopping = early, config.stop_ids = stop;
                session.reset();
                CHECK_OK(session.feed(prompt));
                SearchResult result;
                CHECK_OK(session.search("", config, result));
                CHECK(result.best.size() == all.size());
                int different = 0;
                for (size_t i = 0; i < result.best.size() && i < all.size(); ++i) {
                    different += !(fabs(result.best[i].score - all[i].score) < 1e-5 * (1 + fabs(all[i].score)));
                    different += !(fabs(result.best[i].logprob - all[i].logprob) < 1e-5 * (1 + fabs(all[i].logprob)));
                    different += result.best[i].ended != (all[i].ids.back() == 0);
                    if (i + 1 < all.size() && i > 0 && all[i - 1].score - all[i].score > 1e-4 && all[i].score - all[i + 1].score > 1e-4)
                        different += ids_of(result, i) != all[i].ids;
                }
                CHECK(different == 0);
                CHECK(ids_of(result, 0) == all[0].ids);
            }
    }
}

TEST(one_beam_is_greedy, "a search with one beam would find other tokens than the likeliest one after another") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    for (const char* prompt : {"You: how are you\nMira: ", "You: what", "Mi", "", "bir "})
        for (const double penalty : {0.0, 1.0, 3.0}) {
            Array<int32_t> ids(runtime);
            Generation said;
            said.ids = &ids;
            SampleConfig sampling = greedy();
            sampling.tokens = 40;
            session.reset();
            const std::string expected = say(session, prompt, sampling, false, &said);
            session.reset();
            BeamConfig config;
            config.beams = 1, config.tokens = 40, config.length_penalty = penalty, config.early_stopping = EarlyStopping::never;
            SearchResult result;
            CHECK_OK(session.search(prompt, config, result));
            CHECK(ids_of(result, 0) == std::vector<int32_t>(ids.begin(), ids.end()));
            CHECK(std::string(result.text_of(0).data, result.text_of(0).size) == expected && result.best[0].ended == said.stopped);
        }
}

TEST(search,
     "beams would read each other's keys and values, disturb the session, give other bits with other threads, or find worse than greedy") {
    std::vector<double> scores[2];
    std::vector<std::vector<int32_t>> texts[2];
    for (int variant = 0; variant < 6; ++variant) {
        Runtime runtime, one;
        runtime.threads = variant % 3 * 3 + 1, runtime.backend = variant < 3 ? Backend::cpu : Backend::plain;
        Session session, other;
        CHECK_OK(session.create(runtime, model()));
        CHECK_OK(other.create(one, model()));
        std::vector<double> found;
        std::vector<std::vector<int32_t>> said;
        for (int length = 1; length <= 64;
             length += 9) {  // prompts that end before, at and after the border of a page; the last fills the context
            std::vector<int32_t> prompt;
            for (int i = 0; i < length; ++i) prompt.push_back((i * 37 + i * i + length) % model().config.vocab);
            session.reset();
            CHECK_OK(session.feed(Span<const int32_t>(prompt.data(), prompt.size())));
            BeamConfig config;
            config.beams = 7, config.best = 5, config.tokens = 30 + length % 2 * 10, config.length_penalty = length % 4 * 0.5;
            config.early_stopping = static_cast<EarlyStopping>(length / 9 % 3);
            SearchResult result;
            CHECK_OK(session.search("", config, result));
            const int kept = session.position;
            const std::vector<int32_t> read(prompt.end() - kept, prompt.end());
            other.reset();
            CHECK_OK(other.feed(Span<const int32_t>(read.data(), read.size())));
            CHECK(memcmp(other.logits().data, session.logits().data, other.logits().size * sizeof(float)) == 0);
            for (size_t i = 0; i < result.best.size(); ++i) {
                const Hypothesis& h = result.best[i];
                other.reset();
                CHECK_OK(other.feed(Span<const int32_t>(read.data(), read.size())));
                CHECK(fabs(logprob_of(other, result.ids_of(i)) - h.logprob) < 1e-4);
                CHECK(fabs(h.score - h.logprob / pow(static_cast<double>(h.ids), config.length_penalty)) < 1e-9);
                CHECK(i == 0 || result.best[i - 1].score >= h.score);
                for (size_t k = 0; k < i; ++k) CHECK(ids_of(result, i) != ids_of(result, k));
                found.push_back(h.score), found.push_back(h.logprob), said.push_back(ids_of(result, i));
            }
            const double best = result.best[0].score;
            const std::vector<int32_t> winner = ids_of(result, 0);
            const BeamConfig how = config;
            config.beams = config.best = 1;
            CHECK_OK(session.search("", config, result));
            CHECK(best >= result.best[0].score || how.early_stopping == EarlyStopping::yes);  // which may end before longer texts do
            CHECK_OK(session.feed(Span<const int32_t>(winner.data(), winner.size())));        // the session goes on as if nothing had been
            other.reset();
            CHECK_OK(other.feed(Span<const int32_t>(read.data(), read.size())));
            CHECK_OK(other.feed(Span<const int32_t>(winner.data(), winner.size())));
            CHECK(memcmp(other.logits().data, session.logits().data, other.logits().size * sizeof(float)) == 0);
        }
        if (variant == 0) scores[0] = found, texts[0] = said;
        CHECK(found == scores[0] && said == texts[0]);
    }
}

TEST(search_ends, "a search would say a banned string, go on behind a stop string, or count the space that the prompt ends in") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    BeamConfig config;
    config.beams = 4, config.best = 4, config.tokens = 40;
    const Text stops[] = {"\n", "thank"}, banned[] = {"well", "inn"};
    SearchResult result;
    CHECK_OK(session.search("You: how are you\nMira: ", config, result));
    CHECK(std::string(result.text_of(0).data, result.text_of(0).size) == "I am well, thank you." && result.best[0].ended);
    config.stop = stops;
    session.reset();
    CHECK_OK(session.search("You: how are you\nMira: ", config, result));
    CHECK(std::string(result.text_of(0).data, result.text_of(0).size) == "I am well, " && result.best[0].ended);
    config.banned = banned;
    session.reset();
    CHECK_OK(session.search("You: how are you\nMira: ", config, result));
    CHECK(result.best.size() == 4);
    for (size_t i = 0; i < result.best.size(); ++i) {
        const std::string text(result.text_of(i).data, result.text_of(i).size);
        CHECK(text.find("well") == std::string::npos && text.find("inn") == std::string::npos && text.find("thank") == std::string::npos);
    }
}

TEST(search_memory, "a search that finds no memory would crash or leak, a second one would take it again, or a session could not go on") {
    struct Counter {
        size_t calls = 0, refuse_from = ~size_t(0), in_use = 0;
    };
    for (size_t n = 0;; ++n) {
        Counter counter;
        Runtime runtime;
        runtime.threads = 1, runtime.memory_user = &counter;
        runtime.allocate = [](void* user, size_t bytes, size_t) {
            Counter& c = *static_cast<Counter*>(user);
            void* memory = c.calls++ >= c.refuse_from ? nullptr : malloc(bytes);
            if (memory) c.in_use += bytes;
            return memory;
        };
        runtime.release = [](void* user, void* memory, size_t bytes) {
            static_cast<Counter*>(user)->in_use -= bytes;
            free(memory);
        };
        bool done = false;
        {
            Session session;
            CHECK_OK(session.create(runtime, model()));
            const int32_t prompt[] = {5, 9, 70};
            CHECK_OK(session.feed(prompt));
            const size_t before = counter.calls;
            counter.refuse_from = before + n;
            BeamConfig config;
            config.beams = 3, config.best = 1;
            SearchResult result;
            const Status status = session.search("", config, result);
            CHECK(status.ok() || status.error == Error::out_of_memory);
            done = status.ok();
            counter.refuse_from = ~size_t(0);
            const size_t first = counter.calls - before;
            CHECK_OK(session.search("", config, result));
            if (done) CHECK(counter.calls - before - first < first);
            int32_t id = 0;
            CHECK_OK(session.next(greedy(), id));
        }
        CHECK(counter.in_use == 0);
        if (done) break;
        CHECK(n < 50);
        if (n > 50) break;
    }
}

TEST(kernels_side_by_side, "sessions with different kernels would read each other's packed weights") {
    Runtime best, portable;
    portable.isa = Isa::portable;
    Session a, b;
    CHECK_OK(a.create(best, model()));
    CHECK_OK(b.create(portable, model()));
    CHECK(say(a, "how are you", greedy(), true) == "I am well, thank you." &&
          say(b, "how are you", greedy(), true) == "I am well, thank you.");
    a.reset();
    CHECK(say(a, "what is this", greedy(), true) == "This is the inn.");
}

// A model that is small, of one of several kinds.
static void create_kind(Runtime& runtime, int kind, Model& m) {
    Config config;
    config.layers = 2, config.heads = 4, config.width = 48, config.context = 96, config.vocab = 90;
    if (kind == 1) CHECK_OK(preset_architecture("llama", config)), config.kv_heads = 2;
    if (kind == 2) CHECK_OK(preset_architecture("transformer", config)), config.encoder_layers = 2;
    if (kind == 3) CHECK_OK(preset_architecture("lecture", config)), config.kv_heads = 1;
    CHECK_OK(m.create(runtime, config, Tokenizer()));
}
static const char* const kinds[] = {"gpt2", "llama, keys shared by two", "encoder-decoder", "lecture, keys shared by four"};

// A host's job system that does another job while it waits: here one that talks with the model, too.
struct OtherJobs {
    Runtime alone;
    const Model* model = nullptr;
    bool inside = false;
    static void parallel(void* user, int count, void (*task)(void* context, int index), void* context) {
        OtherJobs& jobs = *static_cast<OtherJobs*>(user);
        if (jobs.model && !jobs.inside) {
            jobs.inside = true;
            Session session;
            jobs.alone.threads = 1;
            CHECK_OK(session.create(jobs.alone, *jobs.model));
            jobs.inside = false;
        }
        for (int i = 0; i < count; ++i) task(context, i);
    }
};
TEST(other_jobs, "a host's job that makes a session while another one of the same model is made would wait for ever") {
    Runtime runtime;
    OtherJobs jobs;
    Model fresh;
    Config config;
    config.layers = 1, config.heads = 1, config.width = 32, config.context = 16, config.vocab = 90;
    CHECK_OK(fresh.create(runtime, config, Tokenizer()));
    jobs.model = &fresh;
    runtime.parallel = &OtherJobs::parallel, runtime.parallel_user = &jobs;
    Session session;
    CHECK_OK(session.create(runtime, fresh));
    const int32_t ids[] = {1, 2, 3};
    CHECK_OK(session.feed(ids));
}

TEST(loaded_to_run,
     "a model that was loaded only to run would say something else, take as much memory as a whole one, or crash where it cannot serve") {
    for (int kind = 0; kind < 4; ++kind)
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8}) {
            Runtime fast, plain, portable;
            fast.threads = 3, plain.backend = Backend::plain, portable.isa = Isa::portable;
            Model whole;
            create_kind(fast, kind, whole);
            CHECK_OK(whole.convert(dtype));
            Array<char> file(fast);
            CHECK_OK(whole.save_memory(file));
            int32_t ids[70], source[20];
            for (int i = 0; i < 70; ++i) ids[i] = (i * 17 + i * i) % 90, source[i % 20] = (i * 31) % 90;
            std::vector<float> said[2];
            const auto read = [&](Runtime& runtime, const Model& m, std::vector<float>& logits) {
                Session session;
                CHECK_OK(session.create(runtime, m));
                if (kind == 2) CHECK_OK(session.read_source(source));
                CHECK_OK(session.feed(Span<const int32_t>(ids, 50)));
                for (int i = 50; i < 70; ++i) CHECK_OK(session.feed(Span<const int32_t>(ids + i, 1)));
                logits.assign(session.logits().begin(), session.logits().end());
            };
            read(fast, whole, said[0]);
            for (Runtime* runtime : {&fast, &plain, &portable}) {
                Model m;
                CHECK_OK(m.load_memory(*runtime, Text(file.items, file.count), Purpose::running));
                CHECK(m.parameters == whole.parameters && m.config.dtype == dtype && !m.weights);
                read(*runtime, m, said[1]);
                if (!CHECK(said[0] == said[1])) printf("  in %s\n", kinds[kind]);
                // What needs its weights is refused.
                Session session;
                CHECK(session.create(runtime == &fast ? plain : fast, m).error == Error::unsupported && !session.state);
                CHECK_OK(session.create(*runtime, m));
                if (kind == 2) CHECK_OK(session.read_source(source));
                CHECK_OK(session.feed(Span<const int32_t>(ids, 3)));
                Array<float> p(*runtime);
                Array<char> bytes(*runtime);
                Array<Difference> rows(*runtime);
                Data data;
                Trainer trainer;
                Evaluation evaluation;
                Adapter adapter;
                const Example example{Span<const int32_t>(ids, 9), Span<const int32_t>(ids, 9), Span<const int32_t>(source), {}, 1};
                CHECK_OK(data.create(*runtime, Span<const Example>(&example, 1)));
                CHECK(session.attention(0, p).error == Error::unsupported && m.save_memory(bytes).error == Error::unsupported);
                CHECK(m.save("nowhere").error == Error::unsupported && m.convert(Dtype::f32).error == Error::unsupported);
                CHECK(m.save_gguf("nowhere").error == Error::unsupported && m.save_llama2c("nowhere").error == Error::unsupported);
                CHECK(compare(m, whole, rows).error == Error::unsupported && compare(whole, m, rows).error == Error::unsupported);
                CHECK(trainer.create(*runtime, m, TrainConfig(), data).error == Error::unsupported);
                CHECK(evaluate(*runtime, m, data, evaluation).error == Error::unsupported && m.copy_weights(whole) == 0);
                CHECK_OK(adapter.create(*runtime, m, AdapterConfig()));  // it may stand beside it
                CHECK_OK(session.use(&adapter));
                CHECK_OK(session.feed(Span<const int32_t>(ids, 50)));
                CHECK(merge(m, adapter).error == Error::unsupported);
                CHECK_OK(whole.load_memory(fast, Text(file.items, file.count)));
            }
        }
}

// A host that counts bytes and jobs, and refuses memory from a call on.
struct Meter {
    size_t in_use = 0, calls = 0, refuse_from = ~size_t(0), jobs = 0;
    void attach(Runtime& runtime) {
        runtime.memory_user = runtime.parallel_user = this;
        runtime.threads = 2;
        runtime.allocate = [](void* user, size_t bytes, size_t alignment) -> void* {
            Meter& m = *static_cast<Meter*>(user);
            if (m.calls++ >= m.refuse_from) return nullptr;
            m.in_use += bytes;
            return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
        };
        runtime.release = [](void* user, void* memory, size_t bytes) {
            static_cast<Meter*>(user)->in_use -= bytes;
            free(memory);
        };
        runtime.parallel = [](void* user, int count, void (*task)(void*, int), void* context) {
            ++static_cast<Meter*>(user)->jobs;
            for (int i = count; i-- > 0;) task(context, i);
        };
    }
};
// What a session says next after it has read some ids more.
static std::vector<float> after(Session& session, const std::vector<int32_t>& ids) {
    CHECK_OK(session.feed(Span<const int32_t>(ids.data(), ids.size())));
    return std::vector<float>(session.logits().begin(), session.logits().end());
}
static std::vector<int32_t> some(int from, int count) {
    std::vector<int32_t> ids;
    for (int i = from; i < from + count; ++i) ids.push_back((i * 17 + i * i) % 90);
    return ids;
}

TEST(forks, "a session that shares a prefix would say something else than one that read it, read it once more, or take memory for it") {
    const std::vector<int32_t> one = some(100, 7), other = some(200, 9), source = some(300, 20);
    for (int kind = 0; kind < 4; ++kind)
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8})
            for (const int length : {5, 32, 45, 64, 70}) {
                Meter meter;
                Runtime runtime;
                meter.attach(runtime);
                Model m;
                create_kind(runtime, kind, m);
                CHECK_OK(m.convert(dtype));
                const auto fresh = [&](Session& session, const std::vector<int32_t>& ids) {
                    CHECK_OK(session.create(runtime, m));
                    if (kind == 2) CHECK_OK(session.read_source(Span<const int32_t>(source.data(), source.size())));
                    return after(session, ids);
                };
                Session base, first, second, third, alone;
                fresh(base, some(0, length));
                size_t before = meter.in_use;
                const std::vector<float> logits = fresh(alone, some(0, length));
                const size_t whole = meter.in_use - before;
                before = meter.in_use;
                const size_t jobs = meter.jobs;
                CHECK_OK(first.fork(base));
                const Config& c = m.config;
                const size_t page = 32 * (dtype == Dtype::f32 ? 4 : 2) * 2 * static_cast<size_t>(c.layers * c.width / c.heads * c.kv_heads);
                CHECK(meter.in_use - before == whole - static_cast<size_t>(length / 32) * page);
                CHECK(meter.jobs == jobs && first.position == length);
                CHECK(std::vector<float>(first.logits().begin(), first.logits().end()) == logits);
                CHECK_OK(second.fork(base));
                // Each goes on by itself.
                const std::vector<float> said = after(alone, one);
                CHECK(after(first, one) == said);
                CHECK_OK(third.fork(first));  // a fork of a fork
                Session two;
                fresh(two, some(0, length));
                CHECK(after(two, other) == after(base, other) && after(first, other) == after(alone, other));
                CHECK(after(second, one) == said);
                CHECK(after(third, other) == std::vector<float>(alone.logits().begin(), alone.logits().end()));
                // The one that they come from ends, or begins anew, before them.
                Session again, last;
                fresh(again, some(0, length));
                CHECK_OK(last.fork(again));
                base = Session();
                again.reset();
                if (kind == 2) CHECK_OK(again.read_source(Span<const int32_t>(source.data(), source.size())));
                Session clean;
                CHECK(after(again, other) == fresh(clean, other));
                CHECK(after(last, one) == said);
                last.reset();
                if (kind == 2) CHECK_OK(last.read_source(Span<const int32_t>(source.data(), source.size())));
                CHECK(after(last, other) == std::vector<float>(clean.logits().begin(), clean.logits().end()));
                first = Session(), second = Session(), third = Session(), alone = Session(), two = Session(), again = Session();
                last = Session(), clean = Session(), m = Model();
                CHECK(meter.in_use == 0);
            }
}

TEST(forks_at_the_end_of_the_context, "what sessions share would be written over or forgotten, or a token would take memory") {
    for (const int length : {3, 40, 64, 95}) {
        Meter meter;
        Runtime runtime;
        meter.attach(runtime);
        Model m;
        create_kind(runtime, 1, m);
        const int context = m.config.context;
        Session base, fork;
        CHECK_OK(base.create(runtime, m));
        after(base, some(0, length));
        CHECK_OK(fork.fork(base));
        const size_t calls = meter.calls;
        Session* const both[] = {&base, &fork};
        for (int which = 0; which < 2; ++which) {
            std::vector<int32_t> seen = some(0, length);
            uint64_t forgotten = 0;
            Session& session = *both[which];
            for (int n = 0; n < 230; ++n) {
                const int32_t id = (n * 7 + which) % 90;
                if (static_cast<int>(seen.size()) + 1 > context) {
                    const int half = (context - length) / 2, drop = static_cast<int>(seen.size()) - length - half;
                    seen.erase(seen.begin() + length, seen.begin() + length + drop);
                    forgotten += static_cast<uint64_t>(drop);
                }
                seen.push_back(id);
                CHECK_OK(session.feed(Span<const int32_t>(&id, 1)));
            }
            CHECK(meter.calls == calls && session.forgotten == forgotten && session.position == static_cast<int>(seen.size()));
            Runtime own;
            Session whole;
            CHECK_OK(whole.create(own, m));
            CHECK(after(whole, seen) == std::vector<float>(session.logits().begin(), session.logits().end()));
        }
        const std::vector<int32_t> many = some(0, 300);  // at once
        CHECK(after(base, many) == after(fork, many) && base.position == fork.position);
    }
}

TEST(forks_do_all_that_sessions_do,
     "sessions with a common prefix would disturb each other, or lose their adapter, their words or their place") {
    Runtime runtime;
    Model m;
    create_kind(runtime, 3, m);
    Adapter adapter;
    CHECK_OK(adapter.create(runtime, m, AdapterConfig()));
    for (int64_t i = 0; i < adapter.block; ++i) adapter.weights[i] += 0.01f * static_cast<float>(i % 7);
    Session base, alone, forks[5], singles[5];
    CHECK_OK(base.create(runtime, m));
    CHECK_OK(base.use(&adapter));
    after(base, some(0, 70));
    // Five go on side by side, as each would alone.
    Session* side_by_side[5];
    int32_t ids[5];
    const SampleConfig sampling;
    for (int i = 0; i < 5; ++i) {
        CHECK_OK(forks[i].fork(base));
        CHECK_OK(singles[i].fork(i ? forks[i - 1] : base));
        after(forks[i], some(i * 10, i + 1)), after(singles[i], some(i * 10, i + 1));
        side_by_side[i] = &forks[i];
        if (i)
            CHECK_OK(singles[i].create(runtime, m)), CHECK_OK(singles[i].use(&adapter)), after(singles[i], some(0, 70)),
                after(singles[i], some(i * 10, i + 1));
    }
    for (int n = 0; n < 60; ++n) {
        CHECK_OK(next(Span<Session* const>(side_by_side), Span<const SampleConfig>(&sampling, 1), ids));
        for (int i = 0; i < 5 && n < 20; ++i) {
            int32_t id;
            CHECK_OK(singles[i].next(SampleConfig(), id));
            CHECK(id == ids[i]);
        }
    }
    // With another adapter each reads all of it once more.
    CHECK_OK(alone.create(runtime, m));
    after(alone, some(0, 70));
    Session fork, kept;
    CHECK_OK(fork.fork(base));
    CHECK_OK(kept.fork(base));
    CHECK_OK(fork.use(nullptr));
    CHECK(after(fork, some(5, 9)) == after(alone, some(5, 9)));
    CHECK_OK(kept.use(nullptr, true));
    CHECK(after(kept, some(5, 9)) != after(base, some(5, 9)));
    // Searches, whose pages come behind a session's own.
    BeamConfig beams;
    beams.beams = 3, beams.best = 3, beams.tokens = 15;
    SearchResult results[3];
    Session searches[3];
    CHECK_OK(searches[0].create(runtime, m));
    after(searches[0], some(0, 70));
    CHECK_OK(searches[1].fork(searches[0]));
    CHECK_OK(searches[2].fork(searches[1]));
    for (int round = 0; round < 2; ++round)
        for (int i = 0; i < 3; ++i) {
            CHECK_OK(searches[i].search("", beams, results[i]));
            CHECK(results[i].ids.count > 0 && results[i].ids.count == results[0].ids.count &&
                  memcmp(results[i].ids.items, results[0].ids.items, results[0].ids.count * sizeof(int32_t)) == 0);
            Session of_searched;
            CHECK_OK(of_searched.fork(searches[i]));
            CHECK(after(of_searched, some(9, 3)) == after(searches[i], some(9, 3)));
        }
    // Words: what may not be said is not said either where it begins in what is shared, and a chat's turns stay whole.
    Session talk, copy;
    CHECK_OK(talk.create(runtime, model()));
    const std::string first = say(talk, "how are you", greedy(), true);
    CHECK_OK(copy.fork(talk));
    CHECK(say(copy, "what is this", greedy(), true) == "This is the inn." &&
          say(talk, "what is this", greedy(), true) == "This is the inn.");
    Session ahead, behind;
    SampleConfig careful = greedy();
    const Text banned[] = {"I am well"};
    careful.banned = banned;
    CHECK_OK(ahead.create(runtime, model()));
    careful.tokens = 2;
    say(ahead, "You: how are you\nMira: ", careful);
    CHECK_OK(behind.fork(ahead));
    careful.tokens = 30;
    CHECK(say(behind, "", careful) == say(ahead, "", careful));
    // Wrong calls.
    Session empty, full;
    CHECK(empty.fork(empty).error == Error::invalid_argument && empty.fork(full).error == Error::invalid_argument);
    CHECK_OK(full.create(runtime, m));
    CHECK(empty.fork(full).error == Error::invalid_argument);
    after(full, some(0, m.config.context));
    CHECK(empty.fork(full).error == Error::no_room && !empty.state);
}

TEST(forks_without_memory, "too little memory for a fork would crash, leak or spoil the session that it comes from") {
    for (size_t n = 0;; ++n) {
        Meter meter;
        Runtime runtime;
        meter.attach(runtime);
        bool done = false;
        {
            Model m;
            create_kind(runtime, 0, m);
            Adapter adapter;
            CHECK_OK(adapter.create(runtime, m, AdapterConfig()));
            Session base, fork, alone;
            CHECK_OK(base.create(runtime, m));
            CHECK_OK(base.use(&adapter));
            after(base, some(0, 70));
            CHECK_OK(alone.create(runtime, m));
            after(alone, some(0, 70));
            meter.calls = 0, meter.refuse_from = n;
            Status status = fork.fork(base);
            CHECK(status.ok() == (fork.state != nullptr));
            if (status.ok()) {
                fork.reset();
                const int32_t id = 3;
                status = fork.feed(Span<const int32_t>(&id, 1));
                done = status.ok();
            }
            CHECK(status.ok() || status.error == Error::out_of_memory);
            meter.refuse_from = ~size_t(0);
            CHECK(after(base, some(5, 50)) == after(alone, some(5, 50)) || fork.state);
            if (!done && fork.state) CHECK(after(fork, some(5, 3)).size() == 90);
        }
        CHECK(meter.in_use == 0);
        if (done || n > 60) {
            CHECK(done);
            break;
        }
    }
}

TEST(converted_meanwhile, "a session would read keys and values as what they are not, or be lost where there is no memory for others") {
    for (int kind = 0; kind < 4; ++kind) {
        Meter meter;
        Runtime runtime;
        meter.attach(runtime);
        Model m;
        create_kind(runtime, kind, m);
        const std::vector<int32_t> source = some(300, 20);
        const auto begin = [&](Session& session, const std::vector<int32_t>& ids) {
            if (kind == 2) CHECK_OK(session.read_source(Span<const int32_t>(source.data(), source.size())));
            return after(session, ids);
        };
        Session session;
        CHECK_OK(session.create(runtime, m));
        begin(session, some(0, 40));
        const size_t floats = meter.in_use;
        for (const Dtype dtype : {Dtype::bf16, Dtype::f32, Dtype::int8, Dtype::f32}) {
            CHECK_OK(m.convert(dtype));
            // With those that it has, which were read with the weights as they were.
            Session fresh, other;
            CHECK_OK(fresh.create(runtime, m));
            const std::vector<float> goes_on = after(session, some(40, 30)), whole = begin(fresh, some(0, 70));
            double difference = 0, size = 0;
            for (size_t i = 0; i < whole.size(); ++i) difference += std::pow(goes_on[i] - whole[i], 2), size += std::pow(whole[i], 2);
            CHECK(difference < 0.01 * size);
            fresh = Session();
            session.reset();
            meter.refuse_from = meter.calls;
            const Span<const int32_t> five(source.data(), 5);
            CHECK((kind == 2 ? session.read_source(five) : session.feed(five)).error == Error::out_of_memory);
            meter.refuse_from = ~size_t(0);
            const std::vector<float> said = begin(session, some(0, 40));
            if (dtype == Dtype::f32) CHECK(meter.in_use == floats);
            CHECK_OK(other.create(runtime, m));
            CHECK(begin(other, some(0, 40)) == said);
        }
    }
}

TEST(turns_stand_on_lines_of_their_own, "a turn would begin in the middle of a line that the host fed") {
    Runtime runtime;
    Session by_text, by_ids;
    CHECK_OK(by_text.create(runtime, model()));
    CHECK_OK(by_ids.create(runtime, model()));
    Array<int32_t> ids(runtime);
    CHECK_OK(model().tokenizer.encode("You: what is this", ids));
    Generation result;
    SampleConfig none = greedy();
    none.tokens = 0;
    say(by_text, "You: what is this", none);
    CHECK_OK(by_ids.feed(Span<const int32_t>(ids.data(), ids.size())));
    CHECK(say(by_text, "how are you", greedy(), true) == say(by_ids, "how are you", greedy(), true) && by_text.position == by_ids.position);
}

TEST(top_p_before_min_p, "top_p would be a share of what min_p has left") {
    Runtime runtime;
    Session session;
    CHECK_OK(session.create(runtime, model()));
    const int32_t start[] = {1};
    CHECK_OK(session.feed(start));
    // Two tokens of 0.5 and 0.3, twenty of 0.01: the nucleus of 0.6 is the first two, whatever min_p is.
    std::string bytes(static_cast<size_t>(model().config.vocab) * sizeof(LogitBias), '\0');
    LogitBias* bias = reinterpret_cast<LogitBias*>(&bytes[0]);
    for (int i = 0; i < model().config.vocab; ++i) {
        const double p = i == 5 ? 0.5 : i == 6 ? 0.3 : i >= 10 && i < 30 ? 0.01 : 0;
        const float logit = session.logits()[static_cast<size_t>(i)];
        bias[i] = LogitBias{i, p > 0 ? static_cast<float>(log(p)) - logit : -1e30f};
    }
    SampleConfig config;
    config.temperature = 1, config.top_p = 0.6, config.min_p = 0.05;
    config.bias = Span<const LogitBias>(bias, static_cast<size_t>(model().config.vocab));
    int seen[2] = {};
    for (int i = 0; i < 200; ++i) {
        Session one;
        CHECK_OK(one.create(runtime, model()));
        CHECK_OK(one.feed(start));
        config.seed = static_cast<uint64_t>(i);
        int32_t id = 0;
        CHECK_OK(one.next(config, id));
        if (!CHECK(id == 5 || id == 6)) return;
        ++seen[id - 5];
    }
    CHECK(seen[0] > 95 && seen[1] > 45);
}

TEST(plain_words, "HELLO! and hello would be two questions to a model that was trained on plain words") {
    Runtime runtime;
    Model& m = const_cast<Model&>(model());
    CHECK_OK(m.set_chat("You: ", "Mira: ", true));
    Session session;
    CHECK_OK(session.create(runtime, m));
    CHECK(say(session, "HOW, are   YOU?!", greedy(), true) == "I am well, thank you.");
    session.reset();
    CHECK(say(session, "B\xc4\xb0R ODA VAR MI?", greedy(), true).find("Elbette") == 0);
    CHECK(m.set_chat("\xff", "Mira: ", false).error == Error::invalid_argument && m.chat.plain_words);
    CHECK_OK(m.set_chat(m.chat.user_turn, m.chat.reply_turn, false));  // its own
    CHECK(!m.chat.plain_words && std::string(m.chat.user_turn.data(), m.chat.user_turn.size()) == "You: ");
}

TEST(wrong_calls, "a wrong call would crash") {
    Runtime runtime;
    Session session;
    int32_t id = 0;
    CHECK(session.next(SampleConfig(), id).error == Error::invalid_argument);
    CHECK_OK(session.create(runtime, model()));
    CHECK(session.next(SampleConfig(), id).error == Error::invalid_argument);  // nothing read yet
    const int32_t bad[] = {1, 100000};
    CHECK(session.feed(bad).error == Error::invalid_argument && session.position == 0);
    SampleConfig config;
    const LogitBias bias[] = {{-1, 0.0f}};
    const int32_t good[] = {1};
    CHECK_OK(session.feed(good));
    config.bias = bias;
    CHECK(session.next(config, id).error == Error::invalid_argument);
    config = SampleConfig();
    config.min_p = 5, config.top_p = 0.9;
    CHECK(session.next(config, id).error == Error::invalid_argument);
    config = SampleConfig();
    config.temperature = NAN;
    CHECK(session.next(config, id).error == Error::invalid_argument);
    LogitBias never[1000];
    for (int i = 0; i < model().config.vocab; ++i) never[i] = LogitBias{i, -INFINITY};
    config = SampleConfig();
    config.bias = Span<const LogitBias>(never, static_cast<size_t>(model().config.vocab));
    CHECK(session.next(config, id).error == Error::invalid_argument);  // nothing may come
    BeamConfig beams;
    SearchResult found;
    const auto search_fails = [&](Session& with) {
        const bool failed = with.search("", beams, found).error == Error::invalid_argument;
        beams = BeamConfig();
        return failed;
    };
    Session fresh;
    CHECK(search_fails(fresh));
    {  // what is wrong is said before the prompt is read
        SampleConfig wrong[3];
        Generation result;
        const std::string long_one(300, 'x');
        const Text strings[] = {Text(long_one.data(), long_one.size())};
        wrong[0].temperature = -1, wrong[1].stop = strings, wrong[2].bias = bias;
        const int before = session.position;
        for (const SampleConfig& how : wrong)
            CHECK(session.generate("hello", how, result).error == Error::invalid_argument &&
                  session.reply("hello", how, result).error == Error::invalid_argument && session.position == before);
    }
    beams.beams = 0;
    CHECK(search_fails(session));
    beams.best = 5;
    CHECK(search_fails(session));
    beams.tokens = 0;
    CHECK(search_fails(session));
    beams.length_penalty = NAN;
    CHECK(search_fails(session));
    beams.stop_ids = bad;
    CHECK(search_fails(session));
    Model none;
    CHECK(none.set_chat("a", "b").error == Error::invalid_argument);
    CHECK(session.create(runtime, none).error == Error::invalid_argument);
}

int main(int count, char** arguments) { return run_tests(count, arguments); }
