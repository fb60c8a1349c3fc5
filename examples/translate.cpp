// g++ -std=c++17 -O2 -pthread examples/translate.cpp -o build/translate && build/translate
// An encoder-decoder, as the first Transformer was one, learns to translate from English to Turkish. The sentences are put together from the lists
// below; a third of them is kept back, and translated at the end: the model has learnt the words and their endings, not the sentences.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include <string>

#include "../babygpt.h"

using namespace babygpt;

static const char* const people[][2] = {{"I", "um"}, {"you", "sun"}, {"she", ""}, {"we", "uz"}, {"they", "lar"}};  // of a verb in -yor
static const char* const verbs[][2] = {{"see", "görüyor"}, {"love", "seviyor"}, {"want", "istiyor"}, {"find", "buluyor"},
                                       {"buy", "alıyor"},  {"sell", "satıyor"}, {"draw", "çiziyor"}, {"bring", "getiriyor"}};
static const char* const things[][2] = {{"the cat", "kediyi"},           {"the dog", "köpeği"}, {"the house", "evi"},
                                        {"the book", "kitabı"},          {"the tea", "çayı"},   {"the tree", "ağacı"},
                                        {"the apple", "elmayı"},         {"the bird", "kuşu"},  {"the red flower", "kırmızı çiçeği"},
                                        {"the old boat", "eski tekneyi"}};
static const char* const times[][2] = {{"", ""}, {" today", "bugün "}, {" now", "şimdi "}, {" every day", "her gün "}};

struct Sentence {
    std::string english, turkish;
};
static Sentence sentence(int person, int verb, int thing, int time) {
    const bool third = person == 2;  // she sees
    Sentence s;
    s.english = std::string(people[person][0]) + " " + verbs[verb][0] + (third ? "s " : " ") + things[thing][0] + times[time][0];
    s.turkish = std::string(times[time][1]) + things[thing][1] + " " + verbs[verb][1] + people[person][1];
    return s;
}
// Calls use(sentence, is it kept back?) with all of them.
template <class Use>
static void each(const Use& use) {
    for (int person = 0; person < 5; ++person)
        for (int verb = 0; verb < 8; ++verb)
            for (int thing = 0; thing < 10; ++thing)
                for (int time = 0; time < 4; ++time) use(sentence(person, verb, thing, time), (person + verb + thing + time) % 3 == 0);
}

static bool show(void*, const Progress& p) {
    if (p.step->step % 100 == 0)
        printf("step %4d of %d   loss %.4f\n", static_cast<int>(p.step->step), static_cast<int>(p.steps), p.step->loss), fflush(stdout);
    return true;
}

static Status play(Runtime& runtime) {
    std::string pairs;  // as a tsv file has them: source, tab, target
    each([&](const Sentence& s, bool kept_back) {
        if (!kept_back) pairs += s.english + "\t" + s.turkish + "\n";
    });
    CorpusConfig tsv;
    tsv.format = TextFormat::tsv, tsv.validation_fraction = 0;
    Config config;
    config.layers = config.encoder_layers = 2, config.heads = 4, config.width = 64, config.context = 32;
    TrainConfig how;
    how.batch = 32, how.steps = 600, how.lr = 2e-3, how.dropout = 0.1, how.label_smoothing = 0.1, how.schedule = Schedule::inverse_sqrt;
    RunConfig run;
    run.progress = show;
    Corpus corpus;
    Tokenizer tokenizer;
    Model model;
    Data data;
    Trainer trainer;
    RunResult result;
    Session session;
    Status s = preset_architecture("transformer", config);  // norms after the additions, ReLU, sinusoidal positions
    if (s.ok()) s = corpus.open_memory(runtime, pairs, tsv);
    if (s.ok()) s = tokenizer.train(runtime, {TokenizerKind::bpe, 400}, corpus);  // one for both languages
    if (s.ok()) s = model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer));
    if (s.ok()) s = data.create_pairs(runtime, corpus, Part::all, model.tokenizer, config.context);
    if (s.ok()) s = trainer.create(runtime, model, how, data);
    if (s.ok()) s = trainer.run(run, result);
    if (s.ok()) s = session.create(runtime, model);
    int count = 0, right = 0;
    each([&](const Sentence& one, bool kept_back) {
        if (!kept_back || !s.ok()) return;
        Array<char> text(runtime);
        Generation said;
        said.text = &text;
        SampleConfig greedy;
        greedy.temperature = 0, greedy.tokens = 30;
        s = session.read_source(one.english);
        if (s.ok()) s = session.generate("", greedy, said);
        const bool good = std::string(text.data() ? text.data() : "", text.size()) == one.turkish;
        if (count % 60 == 0) printf("%-32s %.*s\n", one.english.c_str(), static_cast<int>(text.size()), text.data());
        ++count, right += good;
    });
    if (s.ok()) printf("%d of %d sentences that it had never read are translated rightly\n", right, count);
    return s;
}

int main() {
    Runtime runtime;
    const Status s = play(runtime);
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
