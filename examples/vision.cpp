// g++ -std=c++17 -O2 -pthread examples/vision.cpp -o build/vision && build/vision
// A Vision Transformer (Dosovitskiy et al. 2021): a picture is cut into 4 x 4 patches, which are read as a sentence is, after one more row that
// stands for the class. Alone it learns digits that it draws itself.   build/vision TRAIN.csv TEST.csv   reads a line of names, then lines of
// pixels (0 to 16) and a label;   build/vision TRAIN-IMAGES TRAIN-LABELS TEST-IMAGES TEST-LABELS   reads MNIST's idx files (gunzip them first).
#define BABYGPT_IMPLEMENTATION
#include <math.h>
#include <stdio.h>

#include <fstream>
#include <random>
#include <vector>

#include "../babygpt.h"

using namespace babygpt;

struct Pictures {
    int side = 0;
    std::vector<float> pixels;    // [count][side][side], from 0 to 1
    std::vector<int32_t> labels;  // [count], from 0 to 9
    bool complete() const { return side > 3 && !labels.empty() && pixels.size() == labels.size() * static_cast<size_t>(side * side); }
};

// MNIST's format: a mark, the number of pictures, of rows and columns, a byte a pixel; and a mark, the number of labels, a byte for each.
static bool read_idx(const char* images, const char* labels, Pictures& to) {
    std::ifstream pixels(images, std::ios::binary), classes(labels, std::ios::binary);
    const auto number = [](std::istream& file) {  // four bytes, the greatest first
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) value = value << 8 | (file.get() & 255);
        return value;
    };
    bool good = number(pixels) == 0x803 && number(classes) == 0x801;
    const uint32_t count = number(pixels), rows = number(pixels), columns = number(pixels);
    good = good && count == number(classes) && rows == columns && rows < 256;
    for (int byte; (byte = pixels.get()) != EOF;) to.pixels.push_back(static_cast<float>(byte) / 255);
    for (int byte; (byte = classes.get()) != EOF; good = good && byte < 10) to.labels.push_back(byte);
    to.side = static_cast<int>(rows & 255);
    if (good && count == to.labels.size() && to.complete()) return true;
    return fprintf(stderr, "error: %s, %s: not as many square pictures as labels from 0 to 9, in MNIST's format\n", images, labels), false;
}

static bool read_csv(const char* path, Pictures& to) {
    std::ifstream file(path);
    file.ignore(1 << 20, '\n');  // the names
    bool good = true;
    int line = 2;
    for (float value = 0; good && !(file >> std::ws).eof();) {
        good = file >> value && value >= 0 && value <= 16;
        if (file.get() == ',') to.pixels.push_back(value / 16);
        else if (good) {  // the last of its line
            to.labels.push_back(static_cast<int32_t>(value));
            to.side = static_cast<int>(sqrt(to.pixels.size() / to.labels.size()));
            if ((good = value < 10 && to.complete())) ++line;
        }
    }
    if (good && to.complete()) return true;
    return fprintf(stderr, "error: %s, line %d: not a square picture's pixels from 0 to 16, and a label from 0 to 9\n", path, line), false;
}

static void draw(int count, std::mt19937& random, Pictures& to) {
    const char* digits[] = {"####.##.##.####", ".#.##..#..#.###", "###..#####..###", "###..####..####", "#.##.####..#..#",
                            "####..###..####", "####..####.####", "###..#..#.#..#.", "####.#####.####", "####.####..####"};
    to.side = 12;
    for (int n = 0; n < count; ++n) {
        const int label = static_cast<int>(random() % 10), x = static_cast<int>(random() % 7), y = static_cast<int>(random() % 3);
        to.labels.push_back(label);
        for (int i = 0; i < 144; ++i) {  // each of its 3 x 5 squares is 2 x 2 pixels; and noise
            const int across = (i % 12 - x) / 2, down = (i / 12 - y) / 2, inside = i % 12 >= x && i / 12 >= y && across < 3 && down < 5;
            to.pixels.push_back((inside && digits[label][3 * down + across] == '#' ? 0.6f : 0) + static_cast<float>(random() % 5) / 10);
        }
    }
}

// Pictures as a model reads them: row 0, of id 0, stands for the class; the others, of id 1, are patches.
struct Batch {
    int patch, rows = 17;
    std::vector<float> features;  // [count][rows][patch * patch]
    std::vector<int32_t> ids = {0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    std::vector<Example> examples;
    Batch(int side, size_t count) : patch(side / 4), features(count * static_cast<size_t>(rows * patch * patch)), examples(count) {}
    // A picture that is moved by a part of a pixel, or by some.
    void put(size_t at, const Pictures& from, size_t n, float x = 0, float y = 0) {
        const int side = from.side, area = patch * patch, left = static_cast<int>(floorf(x)), up = static_cast<int>(floorf(y));
        const float *pixels = &from.pixels[n * static_cast<size_t>(side * side)], dx = x - floorf(x), dy = y - floorf(y);
        const auto pixel = [&](int c, int r) { return c >= 0 && c < side && r >= 0 && r < side ? pixels[r * side + c] : 0; };
        const auto between = [&](int c, int r) { return (1 - dx) * pixel(c, r) + dx * pixel(c + 1, r); };
        float* to = &features[at * static_cast<size_t>(rows * area)];
        for (int i = area; i < rows * area; ++i) {
            const int which = i / area - 1, c = which % 4 * patch + i % patch + left, r = which / 4 * patch + i % area / patch + up;
            to[i] = (1 - dy) * between(c, r) + dy * between(c, r + 1);
        }
        examples[at] = Example{ids, {&from.labels[n], 1}, {}, {to, static_cast<size_t>(rows * area)}};
    }
};

static Status run(const Pictures& learn, const Pictures& exam, int steps) {
    Runtime runtime;
    Model model;
    Data data;
    Trainer trainer;
    Evaluation result;
    Config config;
    TrainConfig how;
    how.batch = 50, how.steps = steps, how.lr = 2e-3, how.min_lr = 1e-5, how.dropout = 0.1, how.optimizer = Optimizer::muon;
    Batch batch(learn.side, static_cast<size_t>(how.batch)), all(exam.side, exam.labels.size());
    for (size_t n = 0; n < exam.labels.size(); ++n) all.put(n, exam, n);
    config.layers = 4, config.heads = 4, config.width = 64, config.context = batch.rows, config.vocab = 2;
    config.causal = false, config.classes = 10, config.pool_first = true, config.features = batch.patch * batch.patch;

    Status s = model.create(runtime, config, Tokenizer());
    if (s.ok()) s = data.create(runtime, Span<const Example>(all.examples));
    if (s.ok()) s = trainer.create(runtime, model, how, data);  // data: only for evaluation, the batches are made here
    std::mt19937 random(1);
    const auto move = [&] { return (static_cast<float>(random() % 2001) / 1000 - 1) * static_cast<float>(learn.side) / 28; };
    for (StepResult step; s.ok() && trainer.step_count < how.steps;) {
        for (size_t i = 0; i < batch.examples.size(); ++i) {
            const float x = move(), y = move();
            batch.put(i, learn, random() % learn.labels.size(), x, y);
        }
        s = trainer.step(Span<const Example>(batch.examples), step);
        if (!s.ok() || step.step % (how.steps / 10) != 0) continue;
        s = trainer.evaluate(data, result);
        printf("step %4d, loss %.3f; of the test pictures %.2f %% right\n", static_cast<int>(step.step), step.loss, 100 * result.top1);
        fflush(stdout);
    }
    return s;
}

int main(int count, char** words) {
    Pictures learn, exam;
    std::mt19937 random(7);
    if (count != 1 && count != 3 && count != 5) return fprintf(stderr, "error: needs no file, two or four: see the first lines\n"), 2;
    if (count == 5 && !(read_idx(words[1], words[2], learn) && read_idx(words[3], words[4], exam))) return 1;
    if (count == 3 && !(read_csv(words[1], learn) && read_csv(words[2], exam))) return 1;
    if (count == 1) draw(4000, random, learn), draw(1000, random, exam);
    if (learn.side != exam.side) return fprintf(stderr, "error: the pictures to learn from and those of the test differ in size\n"), 1;
    const Status s = run(learn, exam, count > 1 ? 5000 : 1500);
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
