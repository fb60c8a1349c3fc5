// The readers of pictures in examples/vision.cpp, MNIST's idx files and csv, which is compiled in; the header's implementation is linked.
#include <math.h>
#include <stdio.h>

#include <fstream>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

static FILE* errors = tmpfile();  // instead of what the example would show
#define BABYGPT_IMPLEMENTED
#define main main_of_the_example
#undef stderr
#define stderr errors
#include "../examples/vision.cpp"
#undef main

using std::string;

// Memory, counted.
static size_t held, peak;
void* operator new(size_t bytes) {
    size_t* const memory = static_cast<size_t*>(malloc(bytes + alignof(max_align_t)));
    if (!memory) throw std::bad_alloc();
    *memory = bytes, held += bytes;
    if (peak < held) peak = held;
    return reinterpret_cast<char*>(memory) + alignof(max_align_t);
}
void operator delete(void* memory) noexcept {
    if (!memory) return;
    char* const start = static_cast<char*>(memory) - alignof(max_align_t);
    held -= *reinterpret_cast<size_t*>(start);
    free(start);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

static string folder;  // and how the names of files in it begin
static string write(const char* name, const string& bytes) {
    const string path = folder + name;
    remove(path.c_str());  // a new file is written sooner than an old one is replaced
    FILE* const file = fopen(path.c_str(), "wb");
    CHECK(file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
    if (file) fclose(file);
    return path;
}

enum Format { idx, csv };
// Reads, and sees to it that there is either a model's input or one line that names the file; and how much memory that took.
static bool reads(Format format, const string& first, const string& labels = "") {
    const string path = write("first", first), second = write("labels", labels);
    rewind(errors);
    const size_t before = held;
    bool good;
    peak = held;
    {
        Pictures pictures;
        good = format == idx ? read_idx(path.c_str(), second.c_str(), pictures) : read_csv(path.c_str(), pictures);
        CHECK(peak - before < 16 * (first.size() + labels.size()) + 65536);  // a byte is a float of a vector, which doubles
        const size_t count = pictures.labels.size(), area = static_cast<size_t>(pictures.side * pictures.side);
        if (good && CHECK(count > 0 && pictures.side > 3 && pictures.pixels.size() == count * area)) {
            for (const float pixel : pictures.pixels) CHECK(pixel >= 0 && pixel <= 1);
            for (const int32_t label : pictures.labels) CHECK(label >= 0 && label <= 9);
            Batch batch(pictures.side, count);
            for (size_t i = 0; i < count; ++i) batch.put(i, pictures, i, 0.3f, -0.6f);
        }
    }
    CHECK(held == before && good == (ftell(errors) == 0));
    string said(static_cast<size_t>(ftell(errors)), '\0');
    rewind(errors);
    CHECK(fread(&said[0], 1, said.size(), errors) == said.size());
    CHECK(good || (said.find("error: " + path) == 0 && said.find('\n') == said.size() - 1));
    return good;
}

static string number(uint32_t value) {
    string bytes;
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(value >> shift & 255);
    return bytes;
}
static string images(uint32_t count = 6, uint32_t rows = 4, uint32_t columns = 4) {
    string bytes = number(0x803) + number(count) + number(rows) + number(columns);
    for (uint32_t i = 0; i < count * rows * columns; ++i) bytes += static_cast<char>(i * 37);
    return bytes;
}
static string labels(uint32_t count = 6) { return number(0x801) + number(count) + string("\1\0\7\11\3\4", 6).substr(0, count); }
static string table() {
    string text = "a,b,label\n";
    for (int i = 0; i < 6; ++i) {
        for (int k = 0; k < 16; ++k) text += std::to_string((i + k) % 17) + ",";
        text += std::to_string(i) + (i % 2 ? "\n" : "\r\n");
    }
    return text;
}

TEST(pictures_are_read, "the example would learn other pictures than there are") {
    Pictures pictures;
    const string first = write("first", images()), second = write("labels", labels()), text = write("csv", table());
    CHECK(read_idx(first.c_str(), second.c_str(), pictures) && pictures.side == 4 && pictures.pixels.size() == 96);
    CHECK(pictures.labels == (std::vector<int32_t>{1, 0, 7, 9, 3, 4}) && fabsf(pictures.pixels[95] - (95 * 37 & 255) / 255.0f) < 1e-6f);
    pictures = Pictures();
    CHECK(read_csv(text.c_str(), pictures) && pictures.side == 4 && pictures.pixels.size() == 96);
    CHECK(pictures.labels == (std::vector<int32_t>{0, 1, 2, 3, 4, 5}) && fabsf(pictures.pixels[16] - 1 / 16.0f) < 1e-6f);
}

TEST(pictures_that_contradict_themselves, "a file that is cut or of something else would be learnt from") {
    CHECK(reads(idx, images(), labels()));
    CHECK(!reads(idx, labels(), images()));
    CHECK(!reads(idx, images(0), labels(0)) && !reads(idx, "", ""));
    CHECK(!reads(idx, images(6, 4, 6), labels()) && !reads(idx, images(6, 3, 3), labels()) && !reads(idx, images(5), labels()));
    CHECK(!reads(idx, images().substr(0, 16 + 80), labels().substr(0, 8 + 5)));  // a picture less, and its label
    CHECK(!reads(idx, number(0x803) + number(0xFFFFFFFF) + number(4) + number(4), number(0x801) + number(0xFFFFFFFF)));
    CHECK(!reads(idx, number(0x803) + number(1) + number(0x10004) + number(0x10004) + string(16, 'x'), labels(1)));
    CHECK(!reads(idx, images(), labels().replace(8, 1, "\12")));  // a label of 10
    const string row = "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,16,9", names = "a\n";
    CHECK(reads(csv, names + row) && reads(csv, names + row + "\n\n"));
    for (const char* bad : {"", "0,0,0,0,5", "-", "-1", "1e999", "x", ","}) CHECK(!reads(csv, names + (*bad ? row + "\n" + bad : "")));
    CHECK(!reads(csv, names + row.substr(2) + "\n0," + row));  // a pixel too few, then one too many
    CHECK(!reads(csv, names + row.substr(0, 33) + "10") && !reads(csv, names + row + "0") && !reads(csv, names + "17" + row.substr(1)) &&
          !reads(csv, names + "nan" + row.substr(1)));
    CHECK(!reads(csv, names + string(100000, '1') + row) && !reads(csv, string(3 << 20, 'a')));
}

TEST(pictures_damaged, "a damaged file could crash or hang the example, take all memory, or pass for a whole one") {
    const string whole[] = {images(), labels(), table()};
    for (size_t cut = 0; cut < whole[0].size(); ++cut) CHECK(!reads(idx, whole[0].substr(0, cut), whole[1]));
    for (size_t cut = 0; cut < whole[1].size(); ++cut) CHECK(!reads(idx, whole[0], whole[1].substr(0, cut)));
    const size_t names = whole[2].find('\n') + 1;
    for (size_t cut = 0; cut < whole[2].size(); ++cut) {  // whole lines are a table
        const size_t last = whole[2].find_last_not_of("\r\n", cut == 0 ? 0 : cut - 1);
        CHECK(reads(csv, whole[2].substr(0, cut)) == (cut > names && whole[2].find_first_of("\r\n", last) == last + 1));
    }
    std::minstd_rand random(1);
    int good[2] = {}, bad[2] = {};
    for (int round = 0; round < 1000 * thoroughness(); ++round) {
        const Format format = round % 2 ? csv : idx;
        string bytes[] = {whole[0], whole[1], whole[2]};
        for (auto edits = 1 + random() % 3; edits > 0; --edits) {
            string& text = bytes[format == csv ? 2 : random() % 2];
            const size_t at = random() % text.size(), head = random() % 2 ? 16 : text.size();
            switch (random() % 5) {
                case 0:
                    text[at % head] = static_cast<char>(random());
                    break;
                case 1:
                    text[at % head] = "0123456789,.-+e\r\n \0\xff"[random() % 20];
                    break;
                case 2:
                    text.erase(at, random() % 20);
                    break;
                case 3:
                    text.insert(at, text.substr(random() % text.size(), random() % 20));
                    break;
                default:
                    text[at % head] = static_cast<char>(text[at % head] ^ 1 << random() % 7);
            }
            if (text.empty()) text = "x";
        }
        if (format == csv ? reads(csv, bytes[2]) : reads(idx, bytes[0], bytes[1])) ++good[format];
        else ++bad[format];
    }
    for (const Format format : {idx, csv}) CHECK(good[format] > 20 * thoroughness() && bad[format] > 100 * thoroughness());
}

int main(int count, char** words) {
    folder = string(words[0]) + ".";
    return run_tests(count, words);
}
