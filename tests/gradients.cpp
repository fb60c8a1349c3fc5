// The derivatives, in double: each op's hand-written backward, and whole models, against central differences of the forward pass.
// Then what follows from the order of additions: micro-batches give the bits of the large batch, and sharing memory changes nothing.
#define BABYGPT_IMPLEMENTATION
#include <vector>

#include "../babygpt.h"
#include "check.h"

namespace gradients_test {  // so that no name of the header's insides is in the way
using namespace babygpt;

namespace {

constexpr double op_limit = 1e-6, model_limit = 1e-5;
constexpr double smallest_reference = 1e-4;  // the absolute floor: gradients below it are compared as if they were so large

double uniform(uint64_t key, uint64_t i) { return random_uniform(key, i) - 0.5; }

// What a tape is run on: sequences one after the other, random ids, random targets of which every fourth counts for nothing. The sources
// are of other lengths, and stand in another order. Where there are several sequences, rows have weights.
struct Input {
    std::vector<Sequence> sequences, sources;
    std::vector<int32_t> ids, targets, source_ids;
    std::vector<float> features, row_weights;
    Run run;
    Input(const std::vector<int>& lengths, int vocab, int position = 0, int outputs = 0, int features_a_row = 0) {
        const auto id = [](uint64_t key, size_t i, int below) { return static_cast<int32_t>(random_uniform(key, i) * below); };
        for (size_t i = 0; i < lengths.size(); ++i) {
            const int source_length = lengths[i] % 4 + 1;
            sequences.push_back(Sequence{run.rows, lengths[i], position, nullptr});
            sequences[i].source = static_cast<int>(lengths.size() - 1 - i);
            sources.push_back(Sequence{run.source.rows, source_length, 0, nullptr});
            run.rows += lengths[i], run.source.rows += source_length;
        }
        for (size_t i = 0; i < static_cast<size_t>(run.rows); ++i) {
            ids.push_back(id(1, i, vocab));
            targets.push_back(i % 4 == 2 ? -1 : id(2, i, outputs ? outputs : vocab));
            row_weights.push_back(i == 3 ? 0 : static_cast<float>(uniform(6, i) + 1));
        }
        for (size_t i = 0; i < static_cast<size_t>(run.source.rows); ++i) source_ids.push_back(id(3, i, vocab));
        for (size_t i = 0; i < ids.size() * static_cast<size_t>(features_a_row); ++i) features.push_back(static_cast<float>(uniform(4, i)));
        run.training = true;
        run.seed = 7, run.step = 3;
    }
    const Run& get() {
        run.sequences = Span<const Sequence>(sequences.data(), sequences.size());
        run.ids = ids.data(), run.targets = targets.data(), run.features = features.data();
        if (sequences.size() > 1) run.row_weights = row_weights.data();
        run.source.sequences = Span<const Sequence>(sources.data(), sources.size()), run.source.ids = source_ids.data();
        return run;
    }
};

// The memory of a tape.
template <class T>
struct Buffers {
    std::vector<T> weights, adapter, gradients, lookup, activations, low, scratch;
    std::vector<double> losses;
    Regions<T> r;
    Buffers(const Tape& tape, int64_t scratch_size)
        : weights(at_least_one(tape.weight_block)),
          adapter(at_least_one(tape.adapter_block)),
          gradients(at_least_one(tape.learnt_block())),
          lookup(at_least_one(tape.lookup_block())),
          activations(at_least_one(tape.activation_block)),
          low(at_least_one(tape.low_block())),
          scratch(at_least_one(scratch_size)),
          losses(at_least_one(most(tape.rows_on(Side::text), tape.rows_on(Side::whole)))) {
        for (size_t t = 0; t < tape.weights.count; ++t) {
            const WeightPlan& plan = tape.weights[t];
            T* w = weights.data() + plan.weight.offset;
            for (int64_t i = 0; i < plan.weight.rows * plan.weight.cols; ++i)
                w[i] = static_cast<T>((plan.deviation < 0 ? 1 : 0) + uniform(t + 10, static_cast<uint64_t>(i)));
        }
        for (size_t i = 0; i < adapter.size(); ++i) adapter[i] = static_cast<T>(uniform(9, i));
        r.adapter = adapter.data(), r.low = low.data();
        r.weights = weights.data(), r.gradients = gradients.data(), r.lookup_gradients = lookup.data();
        r.activations = activations.data(), r.scratch = scratch.data(), r.losses = losses.data();
    }
    static size_t at_least_one(int64_t n) { return n > 0 ? static_cast<size_t>(n) : 1; }
};

// ---- gradients against differences ------------------------------------------------------------------------------------

// The loss of a tape that ends in a head is the sum of its losses, that of any other the projection of its last tensor on random numbers.
double projection(int64_t i) { return uniform(5, static_cast<uint64_t>(i)); }
double loss(const Tape& tape, Buffers<double>& m, const Run& run) {
    plain_forward(tape, m.r, run);
    const Op& last = tape.ops[tape.ops.count - 1];
    const int rows = run.on(last.side).rows;
    double total = 0;
    if (last.kind == OpKind::head)
        for (int i = 0; i < rows; ++i) total += (run.row_weights ? double(run.row_weights[i]) : 1) * m.losses[static_cast<size_t>(i)];
    else
        for (int64_t i = 0; i < int64_t(rows) * last.out; ++i) total += projection(i) * values(tape, m.r, last.y)[i];
    return total;
}

void check_gradients(const char* what, const Tape& tape, const Run& run, double limit) {
    Buffers<double> m(tape, plain_scratch(tape));
    (void)loss(tape, m, run);
    const Op& last = tape.ops[tape.ops.count - 1];
    if (last.kind != OpKind::head)
        for (int64_t i = 0; i < int64_t(run.on(last.side).rows) * last.out; ++i) gradient(tape, m.r, last.y)[i] = projection(i);
    plain_backward(tape, m.r, run);
    fold_lookup_gradients(tape, m.r);
    std::vector<double>& learnt = tape.frozen ? m.adapter : m.weights;
    for (const WeightPlan& plan : tape.learnt()) {
        double worst = 0, biggest = smallest_reference;
        for (int64_t i = 0; i < plan.weight.rows * plan.weight.cols; ++i) {
            const size_t at = static_cast<size_t>(plan.weight.offset + i);
            const double w = learnt[at];
            const auto apart = [&](double h) {  // f(w + h) - f(w - h)
                const double above = (learnt[at] = w + h, loss(tape, m, run));
                return above - (learnt[at] = w - h, loss(tape, m, run));
            };
            // Of an op by four points far apart, with an error of order h^4; of a model by two, whose rounding alone is 1e-6 of a head's gradient.
            const double h = limit < model_limit ? 5e-5 : 1e-6;
            const double difference = limit < model_limit ? (8 * apart(h) - apart(2 * h)) / (12 * h) : apart(h) / (2 * h);
            learnt[at] = w;
            const double wrong = m.gradients[at] - difference;
            if (!(wrong < worst && wrong > -worst)) worst = wrong < 0 ? -wrong : wrong;
            biggest = most(biggest, difference < 0 ? -difference : difference);
        }
        if (!CHECK(worst <= limit * biggest)) printf("    %s, %s: relative error %g\n", what, plan.weight.name, worst / biggest);
    }
}

// A tape whose first op is an embedding of `width` (that is where an op's x comes from), and whose next ops are recorded by `record_ops`.
template <class F>
void check_op(const char* what, int width, int vocab, const std::vector<int>& lengths, const F& record_ops, double dropout = 0,
              double smoothing = 0, int position = 0) {
    Runtime runtime;
    Tape tape(runtime);
    Input input(lengths, vocab, position);
    tape.layers = 1, tape.width = width, tape.vocab = vocab, tape.context = position + 7, tape.training = true, tape.dropout = dropout;
    input.run.dropout = dropout, input.run.label_smoothing = smoothing;
    const int x = tape.embedding("wte", "wpe");
    record_ops(tape, x);
    if (CHECK_OK(tape.plan(input.run.rows, input.run.source.rows, static_cast<int>(lengths.size()))))
        check_gradients(what, tape, input.get(), op_limit);
}
const std::vector<int> shapes[] = {{1}, {5}, {1, 4, 2}, {7, 7}};
const int widths[] = {1, 3, 18};
const Activation activations[] = {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu};

}  // namespace

TEST(embedding, "tokens or positions would learn from the wrong rows") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            check_op(
                "embedding", width, 4, lengths, [](Tape&, int) {}, 0, 0, width == 3 ? 5 : 0);
}
TEST(norm, "layer norm's gradient would be wrong") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            for (bool bias : {false, true})
                for (Norm kind : {Norm::layer, Norm::rms})
                    check_op("norm", width, 5, lengths, [&](Tape& t, int x) { t.norm("n", x, bias, kind); });
}
TEST(linear, "a matrix, a bias or an activation would learn wrongly") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            for (int out : {1, 2, 17})
                for (bool bias : {false, true})
                    for (Activation activation : activations)
                        for (bool output_rows : {false, true})
                            check_op("linear", width, 5, lengths, [&](Tape& t, int x) {
                                t.output_rows = output_rows;
                                t.linear("l", x, out, bias, activation, 0.02);
                            });
}
TEST(linear_of_several, "queries, keys and values, or gate and up, would learn into each other's matrices") {
    for (const auto& lengths : shapes)
        for (bool bias : {false, true})
            check_op("linear of three", 3, 5, lengths, [&](Tape& t, int x) {
                const Slice slices[] = {{"q", 4}, {"k", 1}, {"v", 3}};
                t.output_rows = true;
                t.linear("qkv", x, slices, bias, Activation::none, 0.02);
                const Weight &k = t.names[t.names.count - 2 - 3 * bias], &whole = t.weights[2].weight;
                CHECK(!strcmp(k.name, "k.weight") && k.rows == 1 && k.cols == 3 && k.offset == whole.offset + 12 && k.scaled_rows);
                CHECK(whole.rows == 8 && t.weights[2].matrices == 3 && t.weights[2].outputs[2] == 3);
            });
}
TEST(gate, "one half of a gated layer would not learn what the other lets through") {
    for (const auto& lengths : shapes)
        for (int width : {2, 6, 36})
            for (Activation activation : activations)
                check_op("gate", width, 5, lengths, [&](Tape& t, int x) { t.gate("g", x, activation); });
}
TEST(waves, "the embedding would not grow by what its gradient grows by") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            check_op(
                "waves", width, 5, lengths, [](Tape& t, int x) { t.norm("n", t.add_waves(x), true); }, 0, 0, width == 3 ? 5 : 0);
}
TEST(attention, "queries, keys or values would learn wrongly, or look into the future or into another sequence") {
    for (const auto& lengths : shapes)
        for (int heads : {1, 3})
            for (int dim : {1, 3, 6})
                for (double dropout : {0.0, 0.4})
                    check_op(
                        "attention", 3 * heads * dim, 6, lengths, [&](Tape& t, int x) { t.attention("a", x, heads); }, dropout);
}
TEST(grouped_queries, "keys and values that several heads share would learn from one of them only") {
    for (const auto& lengths : shapes)
        for (int kv_heads : {1, 2})
            for (double dropout : {0.0, 0.4})
                check_op(
                    "grouped queries", (4 + 2 * kv_heads) * 2, 6, lengths,
                    [&](Tape& t, int x) { t.attention("a", t.rope(x, 4, kv_heads), 4, kv_heads); }, dropout);
}
TEST(attention_full, "a token would not see, or not learn from, what stands after it") {
    for (const auto& lengths : shapes)
        for (int kv_heads : {1, 2})
            for (double dropout : {0.0, 0.4})
                check_op(
                    "full attention", (4 + 2 * kv_heads) * 2, 6, lengths,
                    [&](Tape& t, int x) { t.attention("a", x, 4, kv_heads, Sight::full); }, dropout);
}
TEST(attention_to_the_source, "a decoder would look at another sequence's source, or its encoder would not learn") {
    for (const auto& lengths : shapes)
        for (int kv_heads : {1, 3})
            for (double dropout : {0.0, 0.4})
                check_op(
                    "attention to the source", 6, 6, lengths,
                    [&](Tape& t, int x) {
                        t.side = Side::source;
                        const int said = t.norm("n", t.embedding("wte", "encoder"), true);
                        t.side = Side::text;
                        const int first = t.linear("k1", said, 4 * kv_heads, true, Activation::none, 0.02);
                        const int second = t.linear("k2", said, 4 * kv_heads, true, Activation::none, 0.02);
                        x = t.attention_to_source("a1", x, first, 3, kv_heads);
                        t.attention_to_source("a2", x, second, 3, kv_heads);
                    },
                    dropout);
}
TEST(pool, "a sequence would learn from the rows of another one") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            for (bool first : {false, true}) {
                check_op("pool", width, 5, lengths, [&](Tape& t, int x) { t.pool("p", x, first); });
                check_op("pool(x) and a head", width, 5, lengths, [&](Tape& t, int x) { t.head("h", t.pool("p", x, first), 3, true); });
            }
}
TEST(rope, "queries and keys would not be turned back by the angle that they were turned by") {
    for (const auto& lengths : shapes)
        for (int heads : {1, 3})
            for (int dim : {2, 6, 18})
                for (int position : {0, 3}) {
                    check_op(
                        "rope", 3 * heads * dim, 5, lengths, [&](Tape& t, int x) { t.rope(x, heads); }, 0, 0, position);
                    check_op(
                        "rope, then attention", 3 * heads * dim, 5, lengths,
                        [&](Tape& t, int x) { t.attention("a", t.rope(x, heads), heads); }, 0, 0, 0);
                }
}
TEST(dropout, "the backward pass would drop other elements than the forward pass did") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            check_op(
                "dropout", width, 5, lengths, [](Tape& t, int x) { t.drop("d", x); }, 0.5);
}
TEST(head, "the loss would send a wrong gradient into the whole model") {
    for (const auto& lengths : shapes)
        for (int width : widths)
            for (int vocab : {1, 2, 33})
                for (double smoothing : {0.0, 0.1})
                    for (bool bias : {false, true})
                        check_op(
                            "head", width, vocab, lengths, [&](Tape& t, int x) { t.head("h", x, 0, bias); }, 0, smoothing);
}
TEST(tensors_read_twice, "an op would overwrite the gradient that another reader of its input has left") {
    const std::vector<int> lengths{3, 2};
    check_op("x + x", 3, 5, lengths, [](Tape& t, int x) { t.add("s", x, x); });
    check_op("x + norm(x)", 3, 5, lengths, [](Tape& t, int x) { t.add("s", x, t.norm("n", x, true)); });
    check_op("norm(x) + x", 3, 5, lengths, [](Tape& t, int x) { t.add("s", t.norm("n", x, true), x); });
    check_op("x + linear(x)", 3, 5, lengths, [](Tape& t, int x) { t.add("s", x, t.linear("l", x, 3, true, Activation::gelu, 0.02)); });
    check_op(
        "x + dropout(x)", 3, 5, lengths, [](Tape& t, int x) { t.add("s", x, t.drop("d", x)); }, 0.3);
    check_op("attention(x) + linear(x)", 6, 5, lengths, [](Tape& t, int x) {
        const int a = t.attention("a", x, 2);
        t.add("s", a, t.linear("l", x, 2, true, Activation::none, 0.02));
    });
    check_op("attention(x) + linear(x), shared keys", 8, 5, lengths, [](Tape& t, int x) {
        const int a = t.attention("a", x, 2, 1);
        t.add("s", a, t.linear("l", x, 4, true, Activation::none, 0.02));
    });
    check_op("gate(x) + linear(x)", 6, 5, lengths, [](Tape& t, int x) {
        const int gate = t.gate("g", x, Activation::silu);
        t.add("s", gate, t.linear("l", x, 3, true, Activation::none, 0.02));
    });
    check_op("(x + n) + n", 3, 5, lengths, [](Tape& t, int x) {
        const int n = t.norm("n", x, true);
        t.add("t", t.add("s", x, n), n);
    });
}

// ---- whole models ------------------------------------------------------------------------------------------------------

namespace {

Config config_of(int layers, int heads, int width, int vocab, bool tied, bool bias, Activation activation) {
    Config c;
    c.layers = layers, c.heads = heads, c.width = width, c.vocab = vocab, c.context = 7;
    c.tied = tied, c.bias = bias, c.activation = activation;
    return c;
}
void check_model(const char* what, const Config& config, const std::vector<int>& lengths, double dropout = 0, double smoothing = 0) {
    Runtime runtime;
    Tape tape(runtime);
    Input input(lengths, config.vocab, 0, config.classes, config.features);
    input.run.dropout = dropout, input.run.label_smoothing = smoothing;
    if (CHECK_OK(record(tape, config, input.run.rows, true, dropout, static_cast<int>(lengths.size()))))
        check_gradients(what, tape, input.get(), model_limit);
}

}  // namespace

TEST(models, "ops that are right alone would be joined wrongly: the model could not learn") {
    for (bool tied : {false, true})
        for (bool bias : {false, true})
            for (Activation activation : {Activation::gelu, Activation::gelu_tanh}) {
                Config rotary = config_of(2, 2, 8, 5, tied, bias, activation);
                rotary.positions = Positions::rotary;
                check_model("rotary positions", rotary, {7, 1, 3});
                check_model("two layers", config_of(2, 2, 6, 5, tied, bias, activation), {7, 1, 3});
                check_model("width 3, 3 heads, dropout and smoothing", config_of(1, 3, 3, 4, tied, bias, activation), {2, 5}, 0.3, 0.1);
            }
    for (Architecture architecture : {Architecture::gpt2, Architecture::llama})
        for (Norm norm : {Norm::layer, Norm::rms})
            for (Positions positions : {Positions::learned, Positions::rotary, Positions::sinusoidal, Positions::none})
                for (Activation activation : {Activation::relu, Activation::gelu_tanh, Activation::silu}) {
                    const int n = static_cast<int>(norm) + static_cast<int>(positions) + static_cast<int>(activation);
                    Config c = config_of(2, 4, 8, 5, n % 2 == 0, n % 3 == 0, activation);
                    c.architecture = architecture, c.norm = norm, c.positions = positions, c.gated = n % 4 < 2;
                    c.norm_after = n % 5 == 0, c.kv_heads = n % 3 == 1 ? 2 : n % 3 == 2 ? 1 : 4, c.hidden = 3, c.norm_epsilon = 1e-3;
                    if (positions == Positions::rotary) c.rope_base = 100;
                    check_model("combination", c, {7, 1, 3}, n % 7 == 0 ? 0.2 : 0);
                }
    check_model("one of everything", config_of(1, 1, 1, 1, true, true, Activation::gelu_tanh), {1});
    check_model("one token, one sequence", config_of(2, 1, 5, 3, false, true, Activation::gelu_tanh), {1});
    check_model("a vocabulary of one", config_of(1, 2, 4, 1, true, true, Activation::gelu), {4, 2});
    check_model("three heads of one", config_of(2, 3, 3, 7, true, false, Activation::gelu_tanh), {7, 7, 1}, 0.2);
}

TEST(adapters, "what is learnt beside a frozen model would learn wrongly, or the model beneath it") {
    const auto check_adapter_of = [](const char* what, const Config& config, const std::vector<int>& lengths, const char* targets,
                                     double dropout) {
        Runtime runtime;
        Tape tape(runtime), whole(runtime);
        Input input(lengths, config.vocab, 0, config.classes, config.features);
        input.run.dropout = dropout;
        const AdapterConfig adapter{2, 3, targets};
        tape.frozen = true;
        const int sequences = static_cast<int>(lengths.size());
        if (!CHECK_OK(record(tape, config, input.run.rows, true, dropout, sequences, &adapter)) ||
            !CHECK_OK(record(whole, config, input.run.rows, true, dropout, sequences)))
            return;
        CHECK(tape.activation_block <= whole.activation_block + 16 * static_cast<int64_t>(tape.loras.count) * input.run.rows);
        check_gradients(what, tape, input.get(), model_limit);
    };
    const std::vector<int> lengths{7, 1, 3};
    const char* const gpt2[] = {"c_attn,c_proj,c_fc", "attn.c_proj", "h.1.mlp.c_proj", "h.1.attn.c_attn"};
    const char* const llama[] = {"q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "q_proj,v_proj", "layers.1.mlp.up_proj"};
    for (bool tied : {false, true})
        for (const char* targets : gpt2) {
            check_adapter_of("GPT-2", config_of(2, 2, 6, 5, tied, true, Activation::gelu_tanh), lengths, targets, tied ? 0.2 : 0);
            Config after = config_of(2, 2, 8, 5, tied, false, Activation::relu);
            after.norm_after = true, after.positions = Positions::sinusoidal;
            check_adapter_of("norms after", after, lengths, targets, 0);
        }
    for (const char* targets : llama) {
        Config c = config_of(2, 4, 8, 5, false, false, Activation::silu);
        CHECK_OK(preset_architecture("llama", c));
        c.kv_heads = 2, c.hidden = 5;
        check_adapter_of("Llama", c, lengths, targets, 0);
    }
    Config both = config_of(2, 2, 8, 5, true, true, Activation::gelu);
    both.encoder_layers = 2;
    for (const char* targets :
         {"c_attn,c_proj,c_fc,q_attn", "h.0.crossattention.q_attn", "h.1.crossattention.c_attn", "encoder.h.1.mlp.c_fc"})
        check_adapter_of("an encoder-decoder", both, {4, 2, 3}, targets, 0.1);
    Config classifier = config_of(2, 2, 8, 5, false, true, Activation::gelu);
    classifier.causal = false, classifier.classes = 3, classifier.features = 3;
    check_adapter_of("a classifier", classifier, {4, 2, 3}, "c_attn", 0.1);
}

// ---- gaps ---------------------------------------------------------------------------------------------------------------

TEST(gaps, "an encoder would be asked for too much or too little, or see what it is asked for more or less often than BERT does") {
    Runtime runtime;
    Model model;
    Config config = config_of(1, 1, 8, 1001, true, true, Activation::gelu);
    config.causal = false;
    CHECK_OK(model.create(runtime, config, Tokenizer()));  // ids 0 to 999, and the mask
    constexpr int length = 100, windows = 2000;
    int asked = 0, masked = 0, kept = 0, other = 0, seen[1000] = {}, different = 0;
    for (uint64_t window = 0; window < windows; ++window) {
        int32_t ids[length], targets[length], again[length], same[length];
        for (int i = 0; i < length; ++i) ids[i] = again[i] = i;
        make_gaps(model, random_key(3, window, random_mask, 0), ids, targets, length);
        make_gaps(model, random_key(3, window, random_mask, 0), again, same, length);
        CHECK(memcmp(ids, again, sizeof ids) == 0 && memcmp(targets, same, sizeof same) == 0);
        for (int i = 0; i < length; ++i) {
            CHECK(targets[i] == i || (targets[i] == -1 && ids[i] == i));
            if (targets[i] < 0) continue;
            ++asked, masked += ids[i] == 1000, kept += ids[i] == i;
            if (ids[i] != 1000 && ids[i] != i) ++other, different += seen[ids[i]]++ == 0;
        }
    }
    const auto near = [](int count, double of, double share) { return count > of * (share - 0.01) && count < of * (share + 0.01); };
    CHECK(near(asked, length * windows, 0.15) && near(masked, asked, 0.8) && near(kept, asked, 0.1) && near(other, asked, 0.1));
    CHECK(different > 900);                              // of 1000 ids, some 3000 times one of them
    for (uint64_t window = 0; window < 100; ++window) {  // one at the least
        int32_t ids[2] = {5, 6}, targets[2];
        make_gaps(model, random_key(4, window, random_mask, 0), ids, targets, 2);
        CHECK(targets[0] == 5 || targets[1] == 6);
    }
}

// ---- bits --------------------------------------------------------------------------------------------------------------

TEST(encoders, "an encoder, an encoder-decoder, a classifier or a model of pictures could not learn") {
    for (bool tied : {false, true})
        for (bool after : {false, true}) {
            Config encoder = config_of(2, 2, 8, 5, tied, true, Activation::gelu);
            encoder.causal = false, encoder.norm_after = after, encoder.norm_last = tied, encoder.head_bias = true;
            check_model("an encoder", encoder, {4, 2}, 0.2);
            Config both = config_of(2, 2, 8, 5, tied, !after, Activation::relu);
            both.encoder_layers = 2, both.norm_after = after, both.positions = after ? Positions::sinusoidal : Positions::learned;
            check_model("an encoder-decoder", both, {4, 2, 3}, 0.2, 0.1);
            Config classifier = encoder;
            classifier.classes = 3, classifier.pool_first = after, classifier.features = tied ? 3 : 0;
            check_model("a classifier", classifier, {4, 2, 3}, 0.2);
        }
}

namespace {

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
bool any(const std::vector<float>& a) {
    for (float x : a)
        if (x < 0 || x > 0) return true;
    return false;
}

void accumulate_on(Backend which) {
    Runtime runtime;
    runtime.backend = which, runtime.threads = 3;
    start_pool(runtime);
    const BackendFunctions* backend = find_backend(runtime);
    if (!CHECK(backend)) return;
    for (bool tied : {false, true}) {
        const Config config = config_of(2, 3, 27, 21, tied, true, Activation::gelu_tanh);
        const std::vector<int> lengths{7, 7, 7, 7, 7, 7};
        Input input(lengths, config.vocab);
        input.run.dropout = 0.2, input.run.label_smoothing = 0.1;
        Tape large(runtime);
        if (!CHECK_OK(record(large, config, input.run.rows, true, 0.2))) return;
        Buffers<float> whole(large, backend->scratch(large, runtime.thread_count()));
        const Run run = input.get();
        backend->forward(runtime, large, whole.r, run);
        backend->backward(runtime, large, whole.r, run);
        CHECK(any(whole.gradients) && any(whole.lookup) == tied);
        for (int micro : {1, 2, 3}) {  // sequences at once
            Tape tape(runtime);
            if (!CHECK_OK(record(tape, config, 7 * micro, true, 0.2))) return;
            Buffers<float> parts(tape, backend->scratch(tape, runtime.thread_count()));
            std::vector<double> losses;
            for (int first = 0; first < 6; first += micro) {
                Run part = run;
                part.rows = 7 * micro, part.first_row[0] = static_cast<uint64_t>(7 * first);
                part.sequences = Span<const Sequence>(run.sequences.data, static_cast<size_t>(micro));  // all start alike
                part.ids = run.ids + 7 * first, part.targets = run.targets + 7 * first, part.row_weights = run.row_weights + 7 * first;
                backend->forward(runtime, tape, parts.r, part);
                backend->backward(runtime, tape, parts.r, part);
                losses.insert(losses.end(), parts.losses.begin(), parts.losses.end());
            }
            CHECK(losses == whole.losses);
            CHECK(same_bits(parts.gradients, whole.gradients));
            CHECK(same_bits(parts.lookup, whole.lookup));
        }
    }
}

struct Place {
    int64_t from, to;
    int born, dies;
};

}  // namespace

TEST(accumulation_plain, "micro-batches would train otherwise than one large batch") { accumulate_on(Backend::plain); }
TEST(accumulation_fast, "micro-batches would train otherwise than one large batch, on the fast backend") { accumulate_on(Backend::cpu); }

TEST(planner, "two tensors that are needed at the same time would share memory") {
    Runtime runtime;
    for (int kind = 0; kind < 4; ++kind)
        for (double dropout : {0.0, 0.2}) {
            const bool training = kind % 2 == 1;
            const AdapterConfig lora{2, 4, "attn.c_attn,c_fc"};
            const AdapterConfig* adapter = kind < 2 ? nullptr : &lora;
            const Config config = config_of(3, 3, 9, 11, true, true, Activation::gelu_tanh);
            Input input({7, 3, 1}, config.vocab);
            input.run.training = training, input.run.dropout = dropout;
            Tape tape(runtime), apart(runtime);
            tape.frozen = apart.frozen = training && adapter;
            if (!CHECK_OK(record(tape, config, input.run.rows, training, dropout, 1, adapter))) return;
            if (!CHECK_OK(record(apart, config, input.run.rows, training, dropout, 1, adapter))) return;

            std::vector<Place> places;
            for (const Tensor& t : tape.tensors) {
                places.push_back(Place{t.offset, t.offset + tape.elements(t), t.born, t.dies});
                if (t.gradient < 0 || t.shares != nothing) continue;
                places.push_back(Place{t.gradient, t.gradient + tape.elements(t), t.gradient_born, t.gradient_dies});
            }
            for (size_t i = 0; i < places.size(); ++i) {
                const Place& a = places[i];
                CHECK(a.from >= 0 && a.from % 16 == 0 && a.to <= tape.activation_block && a.born <= a.dies);
                for (size_t j = 0; j < i; ++j) {
                    const Place& b = places[j];
                    CHECK(a.dies < b.born || b.dies < a.born || a.to <= b.from || b.to <= a.from);
                }
            }

            // Every tensor at a place of its own, filled with numbers that would be noticed.
            apart.activation_block = 0;
            for (Tensor& t : apart.tensors) {
                t.offset = apart.activation_block, apart.activation_block += apart.elements(t);
                if (t.gradient >= 0) t.gradient = apart.activation_block, apart.activation_block += apart.elements(t);
            }
            CHECK(tape.activation_block < apart.activation_block);
            for (Backend which : {Backend::plain, Backend::cpu}) {
                runtime.backend = which;
                const BackendFunctions* backend = find_backend(runtime);
                if (!CHECK(backend)) return;
                Buffers<float> a(tape, backend->scratch(tape, runtime.thread_count()));
                Buffers<float> b(apart, backend->scratch(apart, runtime.thread_count()));
                for (float& x : a.activations) x = 1e30f;
                for (float& x : b.activations) x = 1e30f;
                std::vector<float> packed(static_cast<size_t>(training ? 0 : packed_block(*backend, tape)));
                if (!training) pack_all(*backend, runtime, tape, a.r.weights, packed.data());  // tapes that only run read packed weights
                a.r.packed = b.r.packed = packed.data();
                backend->forward(runtime, tape, a.r, input.get());
                backend->forward(runtime, apart, b.r, input.get());
                CHECK(a.losses == b.losses);
                if (!training) continue;
                backend->backward(runtime, tape, a.r, input.get());
                backend->backward(runtime, apart, b.r, input.get());
                CHECK(any(a.gradients) && same_bits(a.gradients, b.gradients) && same_bits(a.lookup, b.lookup));
            }
        }
}

}  // namespace gradients_test

int main(int count, char** words) { return run_tests(count, words); }
