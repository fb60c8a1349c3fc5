// g++ -std=c++17 -O2 -pthread examples/reverse.cpp -o build/reverse && build/reverse
// The smallest task for an encoder-decoder: the encoder reads 1 to 16 random letters, the decoder says them backwards. There is no text and no
// tokenizer, only ids: 0 begins and ends what is said, 1 to 26 are the letters. Every step learns from new letters; then 2,000 others are reversed.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include "../babygpt.h"

using namespace babygpt;

constexpr int32_t end = 0, letters = 26;
constexpr int longest = 16, batch = 64;

static uint32_t random_number() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

// source: the letters and the end. said: the end, the letters backwards, the end; what the decoder reads begins at the first, what it learns to say
// at the second.
struct Letters {
    int32_t source[longest + 1], said[longest + 2];
    size_t count;
    void draw() {
        count = 1 + random_number() % longest;
        for (size_t i = 0; i < count; ++i) source[i] = said[count - i] = 1 + static_cast<int32_t>(random_number() % letters);
        source[count] = said[0] = said[count + 1] = end;
    }
    Example example() const {
        Example e;
        e.source = {source, count + 1}, e.ids = {said, count + 1}, e.targets = {said + 1, count + 1};
        return e;
    }
};

static Status train(Runtime& runtime, Model& model) {
    Config config;
    config.layers = config.encoder_layers = 2, config.heads = 4, config.width = 64, config.context = longest + 1,
    config.vocab = letters + 1;
    TrainConfig how;
    how.batch = batch, how.steps = 2000, how.lr = 3e-3, how.warmup = 100, how.weight_decay = 0.01;
    static Letters drawn[batch];
    Example examples[batch];
    for (int i = 0; i < batch; ++i) drawn[i].draw(), examples[i] = drawn[i].example();
    Data data;
    Trainer trainer;
    StepResult step;
    Status s = model.create(runtime, config, Tokenizer());
    if (s.ok()) s = data.create(runtime, Span<const Example>(examples));
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    while (s.ok() && trainer.step_count < how.steps) {
        for (int i = 0; i < batch; ++i) drawn[i].draw(), examples[i] = drawn[i].example();
        s = trainer.step(Span<const Example>(examples), step);
        if (step.step % 200 == 0) printf("step %4d   loss %.4f\n", static_cast<int>(step.step), step.loss), fflush(stdout);
    }
    return s;
}

// What the model says of these letters, from the end token to the end token: is it right?
static Status reverse(Session& session, const Letters& l, int32_t* said, bool& right) {
    SampleConfig greedy;
    greedy.temperature = 0;
    Status s = session.read_source({l.source, l.count + 1});
    if (s.ok()) s = session.feed({&end, 1});
    size_t n = 0;
    do {
        if (s.ok()) s = session.next(greedy, said[n]);
    } while (s.ok() && said[n] != end && ++n < longest);
    right = s.ok() && n == l.count;
    for (size_t i = 0; i < n && right; ++i) right = said[i] == l.said[i + 1];
    if (n < longest) said[n] = end;
    return s;
}

static void print(const int32_t* ids) {
    for (int i = 0; i < longest && ids[i] != end; ++i) putchar('a' + ids[i] - 1);
}

int main() {
    Runtime runtime;
    Model model;
    Session session;
    Status s = train(runtime, model);
    if (s.ok()) s = session.create(runtime, model);
    const int trials = 2000;
    int right = 0;
    for (int i = 0; i < trials && s.ok(); ++i) {
        Letters l;
        int32_t said[longest + 1];
        bool good;
        l.draw();
        s = reverse(session, l, said, good);
        right += good;
        if (i >= 5 && good) continue;
        print(l.source), printf(" -> "), print(said), printf(good ? "\n" : "   WRONG\n");
    }
    if (s.ok()) printf("%d of %d are right\n", right, trials);
    else fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
