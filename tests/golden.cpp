// Golden numbers: the trained GPT of llm-viz (3 layers, 3 heads, width 48, it sorts three letters), with the weights and every tensor of
// one forward pass as PyTorch made them, against our tape on each backend. Needs ../shared.
#define BABYGPT_IMPLEMENTATION
#include <vector>

#include "../babygpt.h"
#include "check.h"

namespace golden_test {  // so that no name of the header's insides is in the way
using namespace babygpt;

namespace {

constexpr double limit = 1e-5;  // max |difference| / max |reference|
constexpr int batch = 3, context = 11, width = 48, heads = 3, dim = width / heads, vocab = 3, layers = 3, rows = batch * context;

struct Named {
    char name[64];
    std::vector<float> data;
};

// Four letters are three bytes (RFC 4648).
void decode_base64(Text text, std::vector<float>& to) {
    std::vector<unsigned char> bytes;
    uint32_t bits = 0;
    int count = 0;
    for (char c : text) {
        const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        const char* digit = c ? strchr(digits, c) : nullptr;
        if (!digit) break;
        bits = bits << 6 | static_cast<uint32_t>(digit - digits), count += 6;
        if (count >= 8) count -= 8, bytes.push_back(static_cast<unsigned char>(bits >> count & 255));
    }
    to.resize(bytes.size() / sizeof(float));
    if (!to.empty()) memcpy(to.data(), bytes.data(), to.size() * sizeof(float));
}

// A file of {"name": {"shape": [..], "dtype": "..", "data": base64}, ..}.
bool read_tensors(Runtime& runtime, const char* path, std::vector<Named>& to) {
    Array<char> file(runtime), text(runtime);
    if (!read_file(runtime, path, file).ok()) return false;
    Json json(runtime, Text(file));
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("config")) {
            json.skip();
            continue;
        }
        to.push_back(Named());
        Line(to.back().name, sizeof to.back().name).put(Text(json.key));
        for (json.enter_object(); json.next_key();) {
            if (json.key_is("data")) json.string(text);
            else json.skip();
        }
        decode_base64(Text(text), to.back().data);
    }
    return CHECK_OK(json.finish(path));
}

struct Golden {
    Runtime runtime;
    std::vector<Named> model, partials;
    bool present = false;
    Golden() {
        present = read_tensors(runtime, "../shared/data/models/llm-viz/gpt-nano-sort-model.json", model) &&
                  read_tensors(runtime, "../shared/data/models/llm-viz/gpt-nano-sort-t0-partials.json", partials);
    }
    static const std::vector<float>& find(const std::vector<Named>& in, const char* name) {
        static const std::vector<float> none;
        for (const Named& n : in)
            if (!strcmp(n.name, name)) return n.data;
        return none;
    }
};

// Copies their weights into our layout: "transformer." before the name; Linear's matrices are [out][in], ours [in][out].
void take_weights(const Tape& tape, const Golden& golden, std::vector<float>& weights) {
    weights.resize(static_cast<size_t>(tape.weight_block));
    for (size_t i = 0; i < tape.weights.count; ++i) {
        const Weight& w = tape.weights[i].weight;
        char name[80];
        Line line(name, sizeof name);
        if (strcmp(w.name, "lm_head.weight") != 0) line.put("transformer.");
        line.put(w.name);
        const std::vector<float>& theirs = Golden::find(golden.model, name);
        if (!CHECK(static_cast<int64_t>(theirs.size()) == w.rows * w.cols)) return;
        const bool transposed = starts_with(Text(w.name), "h.") && !w.is_vector;
        float* ours = weights.data() + w.offset;
        for (int64_t r = 0; r < w.rows; ++r)
            for (int64_t c = 0; c < w.cols; ++c)
                ours[r * w.cols + c] = theirs[static_cast<size_t>(transposed ? c * w.rows + r : r * w.cols + c)];
    }
}

double worst;  // over all tensors, for the line that is printed

template <class F>
void compare(const Golden& golden, const char* name, const F& ours) {
    const std::vector<float>& theirs = Golden::find(golden.partials, name);
    if (!CHECK(!theirs.empty())) return;
    double difference = 0, reference = 0;
    for (size_t i = 0; i < theirs.size(); ++i) {
        const double theirs_i = static_cast<double>(theirs[i]), d = static_cast<double>(ours(static_cast<int>(i))) - theirs_i;
        if (theirs_i < -1e30 && CHECK(static_cast<double>(ours(static_cast<int>(i))) < -1e30)) continue;  // -infinity: masked
        difference = d < 0 ? most(difference, -d) : d >= 0 ? most(difference, d) : 1e300;
        reference = most(reference, theirs_i < 0 ? -theirs_i : theirs_i);
    }
    worst = most(worst, difference / reference);
    if (!CHECK(difference <= limit * reference)) printf("    %s: relative error %g\n", name, difference / reference);
}

void check_backend(const Golden& golden, Runtime& runtime) {
    const BackendFunctions* backend = find_backend(runtime);
    Config config;
    config.layers = layers, config.heads = heads, config.width = width, config.context = context, config.vocab = vocab, config.tied = false;
    Tape tape(runtime);
    if (!CHECK(backend) || !CHECK_OK(record(tape, config, rows, true, 0))) return;
    tape.activation_block = 0;  // every tensor at a place of its own, so that all can be looked at afterwards
    for (Tensor& t : tape.tensors) t.offset = tape.activation_block, tape.activation_block += tape.elements(t), t.gradient = -1;

    std::vector<float> weights, activations(static_cast<size_t>(tape.activation_block));
    std::vector<float> scratch(static_cast<size_t>(backend->scratch(tape, runtime.thread_count())));
    std::vector<float> logits(batch * vocab), all_logits(rows * vocab);
    std::vector<double> losses(rows), probabilities(rows * vocab);
    take_weights(tape, golden, weights);
    Regions<float> r;
    r.weights = weights.data(), r.activations = activations.data(), r.scratch = scratch.data();
    r.losses = losses.data();

    std::vector<int32_t> ids, targets(rows);
    for (float id : Golden::find(golden.partials, "idx")) ids.push_back(static_cast<int32_t>(id));
    if (!CHECK(ids.size() == rows)) return;
    std::vector<Sequence> sequences;
    for (int s = 0; s < batch; ++s) sequences.push_back(Sequence{s * context, context, 0, nullptr, logits.data() + s * vocab});
    Run run;
    run.rows = rows, run.sequences = Span<const Sequence>(sequences.data(), batch), run.ids = ids.data(), run.targets = targets.data();

    // The logits of every row from runs that end there, every probability from the loss of a run that has it as target.
    for (int length = 1; length <= context; ++length) {
        for (Sequence& s : sequences) s.length = length;
        backend->forward(runtime, tape, r, run);
        for (int s = 0; s < batch; ++s)
            memcpy(all_logits.data() + (s * context + length - 1) * vocab, logits.data() + s * vocab, vocab * sizeof(float));
    }
    for (int v = 0; v < vocab; ++v) {
        for (int32_t& target : targets) target = v;
        backend->forward(runtime, tape, r, run);
        for (size_t row = 0; row < rows; ++row) probabilities[row * vocab + static_cast<size_t>(v)] = exp_of(-losses[row]);
    }

    const auto ours = [&](const char* name) {
        for (const Tensor& t : tape.tensors)
            if (!strcmp(t.name, name)) return static_cast<const float*>(r.activations + t.offset);
        return static_cast<const float*>(nullptr);
    };
    const auto whole = [&](const char* theirs, const char* name) {
        const float* values = ours(name);
        if (CHECK(values)) compare(golden, theirs, [&](int i) { return values[i]; });
    };
    const float* token = weights.data() + tape.weight(tape.ops[0].w).offset;
    const float* position = weights.data() + tape.weight(tape.ops[0].b).offset;
    compare(golden, "tok_emb", [&](int i) { return token[ids[static_cast<size_t>(i / width)] * width + i % width]; });
    compare(golden, "pos_emb", [&](int i) { return position[i]; });
    whole("x", "embedding");
    whole("ln1", "h.0.ln_1");
    whole("qkv", "h.0.attn.c_attn");
    const float *qkv = ours("h.0.attn.c_attn"), *softmax = ours("h.0.attn.softmax");
    for (int which = 0; which < 3; ++which)  // [batch][heads][context][dim]
        compare(golden,
                which == 0   ? "q"
                : which == 1 ? "k"
                             : "v",
                [&](int i) {
                    const int d = i % dim, t = i / dim % context, head = i / dim / context % heads, s = i / dim / context / heads;
                    return qkv[(s * context + t) * 3 * width + which * width + head * dim + d];
                });
    // We keep of a row of scores only its maximum and its sum: make the rows again. [batch][heads][context][context]
    const auto score = [&](int i, bool probability) {
        const int k = i % context, t = i / context % context, head = i / context / context % heads;
        const int row = i / context / context / heads * context + t;
        if (k > t) return probability ? 0.0 : -1e300;
        const float *query = qkv + row * 3 * width + head * dim, *key = qkv + (row - t + k) * 3 * width + width + head * dim;
        double s = 0;
        for (int d = 0; d < dim; ++d) s += static_cast<double>(query[d]) * static_cast<double>(key[d]);
        s /= root(static_cast<double>(dim));
        const float* kept = softmax + (row * heads + head) * 2;
        return probability ? exp_of(s - static_cast<double>(kept[0])) / static_cast<double>(kept[1]) : s;
    };
    compare(golden, "att", [&](int i) { return score(i, false); });
    compare(golden, "attSm", [&](int i) { return score(i, true); });
    whole("y", "h.0.attn");
    whole("yProj", "h.0.attn.c_proj");
    whole("attnResid", "h.0.attn.add");
    whole("ln2", "h.0.ln_2");
    whole("fc", "h.0.mlp.c_fc.before");
    whole("gelu", "h.0.mlp.c_fc");
    whole("mlp", "h.0.mlp.c_proj");
    whole("mlpResid", "h.0.mlp.add");
    whole("block0", "h.0.mlp.add");
    whole("block1", "h.1.mlp.add");
    whole("block2", "h.2.mlp.add");
    whole("ln_f", "ln_f");
    compare(golden, "lm_head", [&](int i) { return all_logits[static_cast<size_t>(i)]; });
    compare(golden, "probs", [&](int i) { return probabilities[static_cast<size_t>(i)]; });
}

void check_with(Backend which) {
    Golden golden;
    if (!golden.present) SKIP("../shared/data/models/llm-viz is not here");
    golden.runtime.backend = which;
    worst = 0;
    check_backend(golden, golden.runtime);
    printf("llm-viz, %s: largest relative error of a tensor %.2g\n", which == Backend::plain ? "plain" : golden.runtime.isa_name(), worst);
}

// The 256 ids that llama2.c's program says with stories260K after id 1, at temperature 0.
constexpr int story[] = {
    403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322,
    265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 391, 266, 267, 337, 335, 312, 432,
    398, 312, 286, 267, 414, 270, 333, 415, 426, 13,  438, 310, 439, 419, 357, 336, 432, 313, 438, 310, 432, 278, 316, 439, 419, 298,
    414, 267, 265, 282, 295, 433, 426, 436, 317, 286, 296, 418, 269, 279, 292, 416, 439, 413, 409, 416, 327, 263, 415, 294, 267, 400,
    426, 338, 336, 432, 313, 442, 391, 267, 337, 335, 364, 420, 268, 388, 432, 398, 359, 280, 303, 439, 413, 272, 417, 264, 312, 426,
    436, 13,  438, 310, 286, 296, 418, 269, 279, 292, 416, 439, 413, 409, 416, 327, 263, 415, 294, 267, 400, 426, 338, 336, 432, 313,
    442, 439, 423, 262, 304, 420, 422, 432, 317, 426, 359, 279, 292, 416, 439, 413, 409, 416, 327, 263, 415, 294, 267, 400, 426, 436,
    13,  438, 310, 279, 292, 416, 439, 413, 391, 267, 281, 421, 427, 311, 357, 432, 384, 358, 336, 432, 313, 442, 439, 423, 262, 304,
    420, 422, 432, 357, 426, 359, 279, 292, 416, 439, 413, 409, 416, 327, 263, 415, 294, 267, 400, 426, 436, 320, 285, 357, 336, 432,
    313, 455, 289, 439, 413, 263, 304, 420, 422, 432, 317, 426, 410, 448, 411, 280, 303, 281, 421, 427, 364, 426};

void check_story(Backend which) {
    Runtime runtime;
    runtime.backend = which;
    Model model;
    Session session;
    const Status status = model.load(runtime, "../shared/data/models/stories260K/stories260K.bin");
    if (status.error == Error::cannot_open) SKIP("../shared/data/models/stories260K is not here");
    if (!CHECK_OK(status) || !CHECK_OK(session.create(runtime, model))) return;
    CHECK(model.config.hidden == 172 && model.config.kv_heads == 4 && model.config.tied && model.parameters == 260032);
    SampleConfig greedy;
    greedy.temperature = 0;
    int32_t id = 1;
    CHECK_OK(session.feed(Span<const int32_t>(&id, 1)));
    for (const int wanted : story) {
        CHECK_OK(session.next(greedy, id));
        if (!CHECK(id == wanted)) return;
    }
}

// The loss that PyTorch computes, with the same weights and SentencePiece's ids, of the first 20 stories of a sample of TinyStories, divided as
// llama2.c does it when it trains: <s> between them, windows of 512. (llama2.c publishes 1.297 for its own validation text, which is not here.)
void check_story_loss() {
    Runtime runtime;
    Model model;
    Tokenizer tokenizer;
    const Status status = model.load(runtime, "../shared/data/models/stories260K/stories260K.bin");
    FILE* file = fopen("../shared/data/text/tinystories_sample_2MiB.txt", "rb");
    if (status.error == Error::cannot_open || !file) SKIP("../shared/data/models/stories260K or tinystories_sample_2MiB.txt is not here");
    char text[1 << 15];
    const size_t size = fread(text, 1, sizeof text, file);
    fclose(file);
    if (!CHECK_OK(status) || !CHECK_OK(tokenizer.load(runtime, "../shared/data/models/stories260K/tok512.bin"))) return;
    const char mark[] = "\n<|endoftext|>\n";
    const size_t mark_size = sizeof mark - 1;
    Array<int32_t> ids(runtime);
    int stories = 0;
    for (size_t at = 0, begin = 0; at + mark_size <= size && stories < 20; ++at) {
        if (memcmp(text + at, mark, mark_size) != 0) continue;
        CHECK_OK(tokenizer.encode(Text(text + begin, at - begin), ids));
        CHECK(ids.push(tokenizer.end_of_text));
        begin = at + mark_size;
        ++stories;
    }
    Data data;
    Evaluation result;
    if (!CHECK(stories == 20) || !CHECK_OK(data.create(runtime, Span<const int32_t>(ids.items, ids.count)))) return;
    CHECK_OK(evaluate(runtime, model, data, result));
    CHECK(result.tokens == 6424 && result.loss > 1.29366 - 1e-5 && result.loss < 1.29366 + 1e-5);
    printf("stories260K, 20 stories: loss %.5f, PyTorch's 1.29366\n", result.loss);
}

}  // namespace

TEST(story_loss, "documents of a llama2.c model would not be divided by <s>, as it has learnt, or its loss would not be PyTorch's") {
    check_story_loss();
}
TEST(story_plain, "a Llama-type model of other people's would say something else, on the plain backend") { check_story(Backend::plain); }
TEST(story_fast, "a Llama-type model of other people's would say something else") { check_story(Backend::cpu); }
TEST(llm_viz_plain, "the plain backend would not compute what PyTorch computes") { check_with(Backend::plain); }
TEST(llm_viz_fast, "the fast backend would not compute what PyTorch computes") { check_with(Backend::cpu); }

}  // namespace golden_test

int main(int count, char** words) { return run_tests(count, words); }
