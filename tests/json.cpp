// The JSON reader and the exact decimal numbers under it: looks inside the implementation.
#define BABYGPT_IMPLEMENTATION
#include <stdlib.h>

#include <string>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;
using std::string;

static string written(double value) {
    Runtime runtime;
    Array<char> text(runtime);
    CHECK(append_number(text, value));
    return string(text.begin(), text.size());
}
static bool parses(const string& text) {
    Runtime runtime;
    Json json(runtime, text);
    json.skip();
    return json.finish("text").ok();
}

TEST(names, "a test program told to run a test that it has not would say that all is well") {
    CHECK(has_test("names") && has_test("umber") && !has_test("numbers "));
}

TEST(numbers, "a number is not read as the nearest double, or not written so that it reads back") {
    Runtime runtime;
    const auto same = [&](const string& text) {
        double value = 0;
        Json json(runtime, text);
        json.number(value);
        const double wanted = strtod(text.c_str(), nullptr);
        if (!CHECK(json.finish("number").ok() && memcmp(&value, &wanted, sizeof value) == 0)) printf("    %s\n", text.c_str());
    };
    for (uint64_t i = 0; i < 20000; ++i) {
        const uint64_t bits = mix(i) & ~(uint64_t(1) << 63);
        double value = bits_as<double>(bits);
        if (i % 3 == 0) value = static_cast<double>(mix(i) % 100000000) / 1e6;
        if (i % 7 == 0) value = bits_as<double>(mix(i) >> (12 + i % 52));  // the smallest ones
        if (is_finite(value)) {
            char text[64];
            snprintf(text, sizeof text, "%.17g", value);
            same(text);
            const double back = strtod(written(value).c_str(), nullptr);
            if (!CHECK(memcmp(&back, &value, sizeof value) == 0)) printf("    %s %s\n", text, written(value).c_str());
        }
        same(std::to_string(mix(i) >> 1).substr(0, 1 + i % 18) + "e" + std::to_string(static_cast<int>(mix(~i) % 700) - 360));
    }
    for (const char* text : {"0", "-0", "0.0e-0", "1e400", "1e-400", "4.9e-324", "2.4703282292062327e-324", "2.4703282292062328e-324",
                             "1.7976931348623157e308", "1.7976931348623159e308", "2.2250738585072014e-308", "2.2250738585072011e-308",
                             "9007199254740993", "9007199254740995"})
        same(text);
    CHECK(written(0.001) == "0.001" && written(1e-5) == "1e-05" && written(-0.25) == "-0.25" && written(100) == "100" && written(0) == "0");
    CHECK(written(3e-4) == "0.0003" && written(1e22) == "1e+22" && written(123456.75) == "123456.75" &&
          written(bits_as<double>(uint64_t(0x7ff) << 52)) == "null");
}

TEST(whole_numbers, "a whole number loses digits, or one that does not fit is accepted") {
    Runtime runtime;
    const auto read = [&](const char* text, int64_t wanted) {
        int64_t value = 0;
        Json json(runtime, text);
        return json.integer(value) && json.finish("number").ok() && value == wanted;
    };
    CHECK(read("0", 0) && read(" -17 ", -17) && read("9223372036854775807", INT64_MAX) && read("-9223372036854775808", INT64_MIN));
    for (const char* wrong :
         {"9223372036854775808", "-9223372036854775809", "18446744073709551616", "1.0", "1e3", "01", "", "-", "x", "\"1\"", "1 2"})
        CHECK(!read(wrong, 0) && !read(wrong, 1));
}

TEST(strings, "an escape is read or written wrongly") {
    Runtime runtime;
    const auto read = [&](const char* text) {
        Array<char> value(runtime);
        Json json(runtime, text);
        return json.string(value) && json.finish("string").ok() ? string(value.begin(), value.size()) : string("wrong");
    };
    CHECK(read("\"\"") == "" && read("\"a\\\"\\\\\\/\\b\\f\\n\\r\\t\"") == "a\"\\/\b\f\n\r\t");
    CHECK(read("\"\\u0131\\u20AC\\ud83d\\ude00\"") == "\xc4\xb1\xe2\x82\xac\xf0\x9f\x98\x80");
    CHECK(read("\"\\ud83d\"") == "\xef\xbf\xbd" &&
          read("\"\\ud83d\\u0041\"") ==
              "\xef\xbf\xbd"
              "A" &&
          read("\"\\ude00x\"") == "\xef\xbf\xbdx");
    CHECK(read("\"\\u0000\"") == string(1, '\0') && read("\"\xff\"") == "\xff");
    for (const char* wrong : {"\"", "\"a", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\u123g\"", "\"\n\"", "\"\t\"", "a", "'a'"})
        CHECK(read(wrong) == "wrong");
    Array<char> out(runtime);
    CHECK(append_json(out, "a\"\\\n\x01\x1f\xc4\xb1\xff\xe2\x82"));
    CHECK(string(out.begin(), out.size()) == "\"a\\\"\\\\\\n\\u0001\\u001f\xc4\xb1\xef\xbf\xbd\xef\xbf\xbd\"");
}

TEST(grammar, "what is no JSON is accepted, or what is JSON is refused") {
    for (const char* right :
         {"{}", "[]", " [ ] ", "{\"a\":[1,2,{\"b\":null}],\"c\":true}", "[[[]],{}]", "-1.5e+3", "false", "\"x\"", "[1,\"a\",{\"b\":{}}]"})
        CHECK(parses(right));
    for (const char* wrong : {"",          "[",        "]",     "{",   "[1,]",  "{\"a\":1,}", "[,]",       "{,}",       "[1 2]",
                              "{\"a\" 1}", "{\"a\":}", "{a:1}", "nul", "truex", "1 1",        "[1}",       "{\"a\":1]", "+1",
                              ".5",        "1.",       "1e",    "-",   "NaN",   "[\"a\":1]",  "{\"a\",1}", "//",        "\xef\xbb\xbf[]"})
        if (!CHECK(!parses(wrong))) printf("    %s\n", wrong);
    CHECK(parses(string(64, '[') + string(64, ']')) && !parses(string(65, '[') + string(65, ']')) && !parses(string(1000000, '[')));
}

TEST(reading, "members are mixed up, or the message does not tell the place") {
    Runtime runtime;
    Json json(runtime,
              "{\"layers\": 6, \"skip\": [{\"x\": [1, 2]}, \"}\"], \"names\": [\"a\", \"b\"], \"lr\": 1e-3, \"on\": true, \"none\": null}");
    int64_t layers = 0;
    double lr = 0;
    bool on = false;
    string names;
    Array<char> name(runtime);
    Text raw;
    for (json.enter_object(); json.next_key();) {
        if (json.key_is("layers")) json.integer(layers);
        else if (json.key_is("names"))
            for (json.enter_array(); json.next_item();) names += json.string(name) ? string(name.begin(), name.size()) : "?";
        else if (json.key_is("lr")) json.number(lr);
        else if (json.key_is("on")) json.boolean(on);
        else if (json.key_is("skip")) json.skip(raw);
        else json.skip();
    }
    CHECK_OK(json.finish("config.json"));
    CHECK(layers == 6 && names == "ab" && lr == 1e-3 && on && string(raw.begin(), raw.size) == "[{\"x\": [1, 2]}, \"}\"]");
    Json wrong(runtime, "{\"a\": [1, 2");
    wrong.skip();
    const Status status = wrong.finish("config.json");
    CHECK(status.error == Error::bad_file && strstr(status.message, "'config.json', byte 11"));
}

int main(int count, char** arguments) { return run_tests(count, arguments); }
