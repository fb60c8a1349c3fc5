// babygpt: the command line. Trains, talks, measures and draws, with nothing but the public interface of ../babygpt.h.
//
//     make
//     build/babygpt train story.txt --out story.safetensors
//     build/babygpt generate story.safetensors --prompt "Once upon"
//
// A command is a function: it lists its options in a table, parses, and does its work. Errors are thrown as Failure and become one line in
// main. Results go to standard output, everything else to standard error; with --json standard output holds one JSON object a line.
// In this order: errors and text, output, JSON, options, files, charts, training, talking, looking, measuring texts, measuring speed, main.

#include "../babygpt.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <filesystem>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <variant>
#include <vector>

#include "measures.h"

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace {

using namespace babygpt;
using std::string;
using std::vector;

constexpr double none = std::numeric_limits<double>::quiet_NaN();  // no value
constexpr double infinite = std::numeric_limits<double>::infinity();

// =====================================================================================================================
// Errors and text
// =====================================================================================================================

struct Failure {
    int code;  // the program's exit status: 1 an error, 2 wrong usage
    string message;
};

#if defined(__GNUC__)
string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
#endif
string format(const char* pattern, ...) {
    va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    string text(size_t(std::max(0, vsnprintf(nullptr, 0, pattern, arguments))), '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(arguments);
    va_end(again);
    return text;
}

[[noreturn]] void error(string message) { throw Failure{1, std::move(message)}; }
[[noreturn]] void usage(string message) { throw Failure{2, std::move(message)}; }

void must(const Status& status) {
    if (!status.ok()) error(status.message[0] ? status.message : error_text(status.error));
}
// For values that came from an option: `what` names it.
void must_be(const string& what, const Status& status) {
    if (!status.ok()) usage(what + ": " + (status.message[0] ? status.message : error_text(status.error)));
}

string to_string(Text text) { return string(text.data, text.size); }
bool starts_with(const string& text, const char* start) { return text.compare(0, strlen(start), start) == 0; }
bool ends_with(const string& text, const char* end) {
    return text.size() >= strlen(end) && text.compare(text.size() - strlen(end), strlen(end), end) == 0;
}

// The length of the well-formed UTF-8 sequence at the start of `text` (not empty), or 0; then `bad` is the length of the part that could
// have begun one (the Unicode standard's "maximal subpart", which Python's errors='replace' turns into one U+FFFD).
size_t utf8_length(Text text, size_t& bad) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned lead = byte(0);
    bad = 1;
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return 0;
    const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    unsigned low = 0x80, high = 0xBF;  // of the second byte: no overlong forms, no surrogates, nothing above U+10FFFF
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
    for (size_t i = 1; i < length; ++i) {
        if (i >= text.size || byte(i) < low || byte(i) > high) return 0;
        bad = i + 1;
        low = 0x80, high = 0xBF;
    }
    return length;
}

void append_utf8(string& to, unsigned c) {
    if (c < 0x80) to += char(c);
    else if (c < 0x800) (to += char(0xC0 | c >> 6)) += char(0x80 | (c & 63));
    else if (c < 0x10000) ((to += char(0xE0 | c >> 12)) += char(0x80 | (c >> 6 & 63))) += char(0x80 | (c & 63));
    else (((to += char(0xF0 | c >> 18)) += char(0x80 | (c >> 12 & 63))) += char(0x80 | (c >> 6 & 63))) += char(0x80 | (c & 63));
}

size_t code_points(Text text) {
    return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

// At most `count` code points.
string cut(const string& text, size_t count) {
    size_t at = 0, seen = 0;
    for (; at < text.size(); ++at)
        if ((static_cast<unsigned char>(text[at]) & 0xC0) != 0x80 && ++seen > count) break;
    return at < text.size() ? text.substr(0, at) + "..." : text;
}

string pad(const string& text, size_t width, bool right = false) {
    const string space(width - std::min(width, code_points(text)), ' ');
    return right ? space + text : text + space;
}

// A token as people can read it: white space and bytes that are no character are written out.
string visible(Text token, bool mark_spaces) {
    string result;
    for (size_t i = 0; i < token.size;) {
        size_t bad = 0;
        const size_t length = utf8_length(Text(token.data + i, token.size - i), bad);
        const unsigned char c = static_cast<unsigned char>(token[i]);
        if (c == '\n') result += "\\n";
        else if (c == '\t') result += "\\t";
        else if (c == '\r') result += "\\r";
        else if (c == ' ' && mark_spaces) result += "\xC2\xB7";  // a middle dot
        else if (c < 0x20 || c == 0x7F || length == 0) result += format("\\x%02x", unsigned(c));
        else result.append(token.data + i, length);
        i += std::max<size_t>(length, 1);
    }
    return result;
}

string one_line(const string& text, const char* line_end) {
    string result;
    for (char c : text) {
        if (c == '\n') result += line_end;
        else if (c != '\r') result += c;
    }
    return result;
}

string grouped(int64_t n) {  // 1234567 -> 1,234,567
    string text = std::to_string(n);
    for (size_t i = text.size(); i > 3 + (n < 0 ? 1u : 0u); i -= 3) text.insert(i - 3, ",");
    return text;
}

string bytes_text(uint64_t bytes) {
    const char* units[] = {"bytes", "kB", "MB", "GB", "TB"};
    double amount = double(bytes);
    size_t unit = 0;
    while (amount >= 1000 && unit < 4) amount /= 1000, ++unit;
    return format(unit == 0 ? "%.0f %s" : "%.1f %s", amount, units[unit]);
}

string duration(double seconds) {
    const int64_t s = int64_t(std::clamp(seconds, 0.0, 1e9) + 0.5);
    if (s >= 3600)
        return format("%lld:%02lld:%02lld", static_cast<long long>(s / 3600), static_cast<long long>(s / 60 % 60),
                      static_cast<long long>(s % 60));
    return format("%lld:%02lld", static_cast<long long>(s / 60), static_cast<long long>(s % 60));
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// =====================================================================================================================
// Output: results to standard output, where every write is checked; notes to standard error
// =====================================================================================================================

bool write_output(Text text) noexcept { return fwrite(text.data, 1, text.size, stdout) == text.size; }
bool flush_output() noexcept { return fflush(stdout) == 0 && !ferror(stdout); }
[[noreturn]] void output_failed() { error(string("cannot write to standard output: ") + strerror(errno)); }

void put(Text text) {
    if (!write_output(text)) output_failed();
}
void put_line(const string& text) { put(text + "\n"); }
void put_now(const string& text) {
    put(text);
    if (!flush_output()) output_failed();
}
void note(const string& text) { fprintf(stderr, "babygpt: %s\n", text.c_str()); }

bool is_terminal(FILE* file) {
#if defined(_WIN32)
    return _isatty(_fileno(file)) != 0;
#else
    return isatty(fileno(file)) != 0;
#endif
}

volatile std::sig_atomic_t interrupted = 0;

void on_interrupt(int number) {
    interrupted = 1;
#if defined(_WIN32)
    std::signal(number, on_interrupt);  // it is reset with each delivery there
#else
    (void)number;
#endif
}

// From here on Ctrl-C only sets `interrupted`. While training, SIGTERM does the same, and no write is disturbed; in a chat, a read that
// waits returns at once.
void catch_interrupts(bool training) {
#if defined(_WIN32)
    std::signal(SIGINT, on_interrupt);
    if (training) std::signal(SIGTERM, on_interrupt);
#else
    struct sigaction action = {};
    action.sa_handler = on_interrupt;
    if (training) action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    if (training) sigaction(SIGTERM, &action, nullptr);
#endif
}
void release_interrupts() {
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
}

// =====================================================================================================================
// JSON: objects of one line, written and read
// =====================================================================================================================

string json_string(Text text) {  // what is not UTF-8 becomes U+FFFD, as Python's errors='replace' does it
    string result = "\"";
    for (size_t i = 0; i < text.size;) {
        size_t bad = 0;
        const size_t length = utf8_length(Text(text.data + i, text.size - i), bad);
        const unsigned char c = static_cast<unsigned char>(text[i]);
        if (length == 0) result += "\xEF\xBF\xBD";
        else if (c == '"' || c == '\\') (result += '\\') += char(c);
        else if (c == '\n') result += "\\n";
        else if (c == '\t') result += "\\t";
        else if (c == '\r') result += "\\r";
        else if (c < 0x20 || c == 0x7F) result += format("\\u%04x", unsigned(c));
        else result.append(text.data + i, length);
        i += length ? length : bad;
    }
    return result + "\"";
}

string json_value(bool value) { return value ? "true" : "false"; }
string json_value(double value) { return std::isfinite(value) ? format("%.9g", value) : "null"; }
string json_value(const string& value) { return json_string(value); }
string json_value(const char* value) { return json_string(value); }
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
string json_value(T value) {
    return std::to_string(value);
}
string json_value(float value) { return json_value(double(value)); }

template <class T>
string json_list(const T* values, size_t count) {
    string result = "[";
    for (size_t i = 0; i < count; ++i) {
        if (i) result += ",";
        result += json_value(values[i]);
    }
    return result + "]";
}

struct Json {
    string text = "{";
    Json& raw(const char* key, const string& value) {
        if (text.size() > 1) text += ",";
        text += json_string(key) + ":" + value;
        return *this;
    }
    template <class T>
    Json& add(const char* key, const T& value) {
        return raw(key, json_value(value));
    }
    void print() { put_now(text + "}\n"); }
};

// Reads one object. Of its members only those named text, hex and ids are kept; others are skipped, however deep.
struct JsonLine {
    string text;
    string hex;
    vector<int32_t> ids;
    bool has_text = false, has_hex = false, has_ids = false;

    void parse(const string& line, size_t number) {
        *this = JsonLine();
        source = &line, at = 0, line_number = number;
        expect('{');
        if (!accept('}')) {
            do {
                const string key = read_string();
                expect(':');
                if (key == "text") text = read_string(), has_text = true;
                else if (key == "hex") hex = from_hex(read_string()), has_hex = true;
                else if (key == "ids") read_ids(), has_ids = true;
                else skip();
            } while (accept(','));
            expect('}');
        }
        peek();
        if (at < source->size()) bad("nothing more after the object");
    }
    [[noreturn]] void bad(const char* wanted) const {
        error(format("standard input, line %zu, byte %zu: expected %s", line_number, at + 1, wanted));
    }

 private:
    const string* source = nullptr;
    size_t at = 0;
    size_t line_number = 0;

    char peek() {
        while (at < source->size() && strchr(" \t\r\n", (*source)[at]) && (*source)[at]) ++at;
        return at < source->size() ? (*source)[at] : '\0';
    }
    bool accept(char c) {
        if (peek() != c) return false;
        ++at;
        return true;
    }
    void expect(char c) {
        const char wanted[] = {'\'', c, '\'', '\0'};
        if (!accept(c)) bad(wanted);
    }
    unsigned read_hex4() {
        unsigned value = 0;
        const char* start = source->data() + at;
        if (at + 4 > source->size() || std::from_chars(start, start + 4, value, 16).ptr != start + 4) bad("four hex digits");
        at += 4;
        return value;
    }
    string read_string() {
        if (!accept('"')) bad("a string");
        string result;
        while (at < source->size() && (*source)[at] != '"') {
            char c = (*source)[at++];
            if (c != '\\') {
                result += c;
                continue;
            }
            c = at < source->size() ? (*source)[at++] : '\0';
            const char* escapes = "\"\\/bfnrt";
            const char* found = c ? strchr(escapes, c) : nullptr;
            if (found) result += "\"\\/\b\f\n\r\t"[found - escapes];
            else if (c == 'u') {
                unsigned code = read_hex4();
                if (code >= 0xD800 && code < 0xDC00 && source->compare(at, 2, "\\u") == 0) {
                    const size_t back = at;
                    at += 2;
                    const unsigned low = read_hex4();
                    if (low >= 0xDC00 && low < 0xE000) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
                    else at = back;
                }
                append_utf8(result, code >= 0xD800 && code < 0xE000 ? 0xFFFD : code);  // half of a pair is no character
            } else bad("an escape of JSON");
        }
        if (at >= source->size()) bad("the string's end");
        ++at;
        return result;
    }
    string from_hex(const string& digits) const {
        string bytes;
        for (size_t i = 0; i < digits.size(); i += 2) {
            unsigned value = 0;
            const char* start = digits.data() + i;
            if (i + 2 > digits.size() || std::from_chars(start, start + 2, value, 16).ptr != start + 2) bad("two hex digits a byte");
            bytes += char(value);
        }
        return bytes;
    }
    void read_ids() {
        expect('[');
        if (accept(']')) return;
        do {
            peek();
            int32_t id = 0;
            const auto [end, fault] = std::from_chars(source->data() + at, source->data() + source->size(), id);
            if (fault != std::errc()) bad("a token's number");
            at = size_t(end - source->data());
            ids.push_back(id);
        } while (accept(','));
        expect(']');
    }
    void skip() {  // any value; brackets are counted, not checked
        int64_t depth = 0;
        do {
            const char c = peek();
            if (c == '\0') bad("a value");
            if (c == '"') {
                read_string();
                continue;
            }
            if (c == '[' || c == '{') ++depth;
            if (c == ']' || c == '}') --depth;
            if (depth < 0) bad("a value");
            if (strchr("[]{},:", c)) ++at;
            else
                while (at < source->size() && !strchr("[]{},:\" \t\r\n", (*source)[at])) ++at;
        } while (depth > 0);
    }
};

// =====================================================================================================================
// Options: a table for each command
// =====================================================================================================================

using Target = std::variant<std::monostate, bool*, int*, int64_t*, uint64_t*, double*, string*, vector<string>*>;

struct Option {
    const char* name;   // "--steps"; null: a heading of the help
    const char* value;  // what the help calls the value; null: a flag; a|b|c in small letters: one of these
    const char* help;   // null: not shown
    Target target = {};
    double least = -infinite, most = infinite;
};

// What every command understands.
struct Common {
    Runtime runtime;
    int threads = 0;
    string backend = "cpu", precision = "f32", isa;
    vector<Option> options() {
        return {{nullptr, nullptr, "Everywhere"},
                {"--threads", "N", "how many threads (all cores; the result is the same with any number)", &threads, 1, 1024},
                {"--backend", "plain|cpu|cuda", "plain: the readable, slow one; cuda: on a GPU (cpu)", &backend},
                {"--precision", "f32|tf32|bf16|fp16",
                 "cuda: tf32: of what is multiplied; bf16: of what is passed on, too, and the fastest; fp16: so, too, when "
                 "training, also on GPUs before 2020. cpu: bf16: of what train multiplies, for AMX or AMD's avx512_bf16 (f32)",
                 &precision},
                {"--isa", "automatic|sse2|avx2|avx512|neon|portable", nullptr, &isa}};
    }
    void apply(bool command_trains) {
        runtime.threads = threads;
        runtime.backend = backend == "plain" ? Backend::plain : backend == "cuda" ? Backend::cuda : Backend::cpu;
        runtime.precision = precision == "bf16"   ? Precision::bf16
                            : precision == "tf32" ? Precision::tf32
                            : precision == "fp16" ? Precision::fp16
                                                  : Precision::f32;
        const bool trains = runtime.backend == Backend::cpu && runtime.precision == Precision::bf16 && command_trains;
        if (runtime.backend != Backend::cuda && runtime.precision != Precision::f32 && !trains)
            usage("--precision " + precision + (precision == "bf16" ? " is for training on a processor, or needs" : " needs") +
                  " --backend cuda");
        const char* names[] = {"automatic", "sse2", "avx2", "avx512", "neon", "portable"};
        for (int i = 0; i < 6; ++i)
            if (isa == names[i]) runtime.isa = Isa(i);
    }
};

struct Command;

struct Arguments {
    const Command& command;
    vector<string> words;
    vector<string> operands;
    std::set<string> given = {};
    bool has(const char* option) const { return given.count(option) != 0; }
    // Fills the options' targets and `operands`. Shows the help and throws Failure{0} when asked for it.
    void parse(Common& common, vector<Option> options, size_t least, size_t most);
};

struct Command {
    const char* name;
    const char* operands;
    const char* summary;
    const char* examples;
    int (*run)(Arguments& arguments);
};
extern const vector<Command> commands;

size_t edit_distance(const string& a, const string& b) {  // Levenshtein 1965
    vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t above = row[j];
            row[j] = std::min({row[j - 1] + 1, above + 1, diagonal + (a[i - 1] != b[j - 1])});
            diagonal = above;
        }
    }
    return row[b.size()];
}

// "; did you mean X?", or "" when nothing is near.
string nearest(const string& word, const vector<string>& known) {
    string best;
    size_t distance = 1 + std::max<size_t>(2, std::min(word.size(), size_t(80)) / 3);
    for (const string& name : known) {
        const bool begins = word.size() > 3 && starts_with(name, word.c_str());
        const size_t d = begins ? 0 : edit_distance(word.substr(0, 80), name);
        if (d < distance + (begins ? 1 : 0)) distance = d, best = name;
    }
    return best.empty() ? "" : "; did you mean " + best + "?";
}

void show_help(const Command& command, const vector<Option>& options) {
    put_line(format("babygpt %s %s\n\n%s\n", command.name, command.operands, command.summary));
    for (const Option& option : options) {
        if (!option.help) continue;
        if (!option.name) {
            put_line(format("%s:", option.help));
            continue;
        }
        const string left = string("  ") + option.name + (option.value ? string(" ") + option.value : "");
        put_line(left.size() < 34 ? pad(left, 34) + option.help : left + "\n" + string(34, ' ') + option.help);
    }
    if (command.examples[0]) put_line(format("\nExamples:\n%s", command.examples));
}

template <class T>
bool read_number(const string& text, T& value) {
    if constexpr (std::is_floating_point_v<T>) {
        if (text.empty() || text.find_first_not_of("0123456789+-.eE") != string::npos) return false;  // no "nan", no "0x1"
        char* end = nullptr;
        value = strtod(text.c_str(), &end);
        return *end == '\0' && std::isfinite(value);
    } else {
        const char* end = text.data() + text.size();
        const auto result = std::from_chars(text.data(), end, value);
        return result.ec == std::errc() && result.ptr == end;
    }
}

template <class T>
void set_number(const Option& option, const string& text, T& target) {
    T value = {};
    const bool whole = !std::is_floating_point_v<T>;
    if (read_number(text, value) && double(value) >= option.least && double(value) <= option.most) {
        target = value;
        return;
    }
    string may = whole ? "a whole number" : "a number";
    if (std::isfinite(option.least)) may += format(" from %.15g to %.15g", option.least, option.most);
    usage(format("%s '%s': must be %s", option.name, text.c_str(), may.c_str()));
}

void set_text(const Option& option, const string& text, string& target) {
    const string choices = option.value;
    if (choices.find('|') != string::npos && std::none_of(choices.begin(), choices.end(), [](char c) { return c >= 'A' && c <= 'Z'; }) &&
        ("|" + choices + "|").find("|" + text + "|") == string::npos)
        usage(format("%s '%s': must be one of %s", option.name, text.c_str(), choices.c_str()));
    target = text;
}

void set_option(const Option& option, const string& text) {
    std::visit(
        [&](auto target) {
            using T = decltype(target);
            if constexpr (std::is_same_v<T, bool*>) *target = true;
            else if constexpr (std::is_same_v<T, string*>) set_text(option, text, *target);
            else if constexpr (std::is_same_v<T, vector<string>*>) target->push_back(text);
            else if constexpr (!std::is_same_v<T, std::monostate>) set_number(option, text, *target);
        },
        option.target);
}

void Arguments::parse(Common& common, vector<Option> options, size_t least, size_t most) {
    for (const Option& option : common.options()) options.push_back(option);
    vector<string> names = {"--help"};
    for (const Option& option : options)
        if (option.name && option.help) names.push_back(option.name);
    const auto find = [&](const string& name) {
        return std::find_if(options.begin(), options.end(), [&](const Option& option) { return option.name && name == option.name; });
    };
    bool only_operands = false;
    for (size_t i = 0; i < words.size(); ++i) {
        const string& word = words[i];
        if (only_operands || word.size() < 2 || word[0] != '-') {
            operands.push_back(word);
            continue;
        }
        if (word == "--") {
            only_operands = true;
            continue;
        }
        if (word == "--help" || word == "-h") {
            show_help(command, options);
            throw Failure{0, ""};
        }
        const size_t equals = word.find('=');
        const auto option = find(word.substr(0, equals));
        if (option == options.end())
            usage(format("%s: unknown option '%s'%s", command.name, word.c_str(), nearest(word.substr(0, equals), names).c_str()));
        given.insert(option->name);
        if (!option->value) {
            if (equals != string::npos) usage(format("%s takes no value", option->name));
            set_option(*option, "");
        } else if (equals != string::npos) {
            set_option(*option, word.substr(equals + 1));
        } else {
            if (i + 1 == words.size()) usage(format("%s needs a value: %s", option->name, option->value));
            if (find(words[i + 1]) != options.end())
                usage(format("%s needs a value: %s (if you mean the text '%s', write %s=%s)", option->name, option->value,
                             words[i + 1].c_str(), option->name, words[i + 1].c_str()));
            set_option(*option, words[++i]);
        }
    }
    if (operands.size() < least) usage(format("%s needs %s (see babygpt %s --help)", command.name, command.operands, command.name));
    if (operands.size() > most) usage(format("%s: '%s' is one argument too many", command.name, operands[most].c_str()));
    common.apply(command.name == string("train") || command.name == string("bench") || command.name == string("info"));
}

// =====================================================================================================================
// Files: models, tokenizers, corpora, standard input
// =====================================================================================================================

namespace fs = std::filesystem;

fs::path path_of(const string& utf8) {
#if defined(__cpp_lib_char8_t)
    return fs::path(std::u8string(utf8.begin(), utf8.end()));
#else
    return fs::u8path(utf8);
#endif
}
string to_string(const fs::path& path) {
    const auto utf8 = path.u8string();
    return string(utf8.begin(), utf8.end());
}
bool exists(const string& path) {
    std::error_code ignored;
    return fs::exists(path_of(path), ignored);
}
bool same_file(const string& a, const string& b) {  // files that are still to be written have only their paths
    std::error_code ignored;
    const auto whole = [&](const string& path) { return fs::weakly_canonical(fs::absolute(path_of(path), ignored), ignored); };
    const fs::path place = whole(a);
    return a == b || fs::equivalent(path_of(a), path_of(b), ignored) || (!place.empty() && place == whole(b));
}

// Empty names are no files.
void need_other_than(const vector<string>& inputs, const char* option, const string& path) {
    for (const string& file : inputs)
        if (!file.empty() && !path.empty() && same_file(file, path)) usage(format("%s %s is a file to read from", option, file.c_str()));
}

FILE* open_file(const string& path, const char* mode) {
#if defined(_WIN32)
    return _wfopen(path_of(path).c_str(), fs::path(mode).c_str());
#else
    return fopen(path.c_str(), mode);
#endif
}

string read_all(FILE* file, const string& name) {
    string text;
    char buffer[1 << 16];
    size_t got = 0;
    while ((got = fread(buffer, 1, sizeof buffer, file)) > 0) text.append(buffer, got);
    if (ferror(file)) error("cannot read " + name + ": " + strerror(errno));
    return text;
}
string read_file(const string& path) {
    FILE* file = open_file(path, "rb");
    if (!file) error("cannot open " + path + ": " + strerror(errno));
    string text;
    try {
        text = read_all(file, path);
    } catch (...) {
        fclose(file);
        throw;
    }
    fclose(file);
    return text;
}
// Without their ends and a byte order mark. "-" is standard input.
vector<string> read_lines(const string& path) {
    const string text = path == "-" ? read_all(stdin, "standard input") : read_file(path);
    vector<string> lines;
    for (size_t at = starts_with(text, "\xEF\xBB\xBF") ? 3 : 0; at < text.size();) {
        const size_t end = std::min(text.find('\n', at), text.size());
        lines.push_back(text.substr(at, end - at));
        if (!lines.back().empty() && lines.back().back() == '\r') lines.back().pop_back();
        at = end + 1;
    }
    return lines;
}
void write_file(const string& path, const string& text) {
    FILE* file = open_file(path, "wb");
    bool good = file && fwrite(text.data(), 1, text.size(), file) == text.size();
    int fault = errno;
    if (file && fclose(file) != 0) {
        if (good) fault = errno;
        good = false;
    }
    if (!good) error("cannot write " + path + ": " + strerror(fault));
}

// Lines of standard input, without their ends.
enum class Line { text, end, broken_off };
Line read_line(string& line, const string& name = "standard input") {
    line.clear();
    for (;;) {
        errno = 0;
        const int c = fgetc(stdin);
        if (c == EOF && ferror(stdin)) {
            if (errno != EINTR) error("cannot read " + name + ": " + strerror(errno));
            clearerr(stdin);
            return Line::broken_off;
        }
        if (c == EOF && line.empty()) return Line::end;
        if (c == EOF || c == '\n') break;
        line += char(c);
    }
    if (!line.empty() && line.back() == '\r') line.pop_back();
    return Line::text;
}

// A safetensors file begins with the length of its header, then the header's brace.
bool is_checkpoint(const string& path) {
    std::error_code ignored;
    if (!fs::is_regular_file(path_of(path), ignored)) return false;
    FILE* file = open_file(path, "rb");
    unsigned char start[9] = {};
    const size_t got = file ? fread(start, 1, 9, file) : 0;
    if (file) fclose(file);
    uint64_t length = 0;
    for (int i = 0; i < 8; ++i) length |= uint64_t(start[i]) << (8 * i);
    return got == 9 && start[8] == '{' && length < fs::file_size(path_of(path), ignored);
}

bool is_gguf(const string& path) {
    char start[4] = {};
    FILE* file = open_file(path, "rb");
    const size_t got = file ? fread(start, 1, 4, file) : 0;
    if (file) fclose(file);
    return string(start, got) == "GGUF";
}

void need_tokenizer(const Model& model, const string& path) {
    if (model.tokenizer.kind == TokenizerKind::none) error(path + " has no tokenizer, so it can neither read nor write text");
}

void load_tokenizer(Runtime& runtime, const string& path, Tokenizer& tokenizer) {
    if (is_checkpoint(path)) {
        Model model;
        must(model.load(runtime, path));
        need_tokenizer(model, path);
        must(tokenizer.copy(runtime, model.tokenizer));
    } else {
        must(tokenizer.load(runtime, path));
    }
}

// An adapter that stands beside a model.
struct Beside {
    string path;
    Adapter adapter;
    Option option() { return {"--adapter", "A", "what train --lora wrote, or PEFT's folder: M with this adapter beside it", &path}; }
    const Adapter* load(Runtime& runtime, const Model& model) {
        if (path.empty()) return nullptr;
        must(adapter.load(runtime, model, path));
        return &adapter;
    }
};

// The options that say how text is read.
struct TextOptions {
    string field, column;
    bool dialogues = false;
    vector<Option> options() {
        return {{"--field", "NAME", "jsonl: the member to read (text)", &field},
                {"--column", "NAME", "csv: the column to read (text)", &column},
                {"--dialogues", nullptr, "text files: empty lines divide documents (on for chat models)", &dialogues}};
    }
    CorpusConfig config(double validation_fraction) const {
        CorpusConfig config;
        if (!field.empty()) config.field = field;
        if (!column.empty()) config.column = column;
        config.split_documents = dialogues;
        config.validation_fraction = validation_fraction;
        return config;
    }
};

void open_corpus(Runtime& runtime, const vector<string>& files, const CorpusConfig& config, Corpus& corpus) {
    const vector<Text> views(files.begin(), files.end());
    must(corpus.open(runtime, views, config));
}

// Lines of a text, a tab and its label, for a classifier.
struct Labelled {
    vector<string> texts, labels;
    vector<int32_t> ids, classes;
    vector<size_t> ends;  // in ids
    vector<Example> examples;

    // Replaces what was read before. Empty lines are left out.
    void read(const vector<string>& files) {
        *this = Labelled();
        for (const string& path : files) {
            size_t number = 0;
            for (const string& line : read_lines(path)) {
                ++number;
                if (line.empty()) continue;
                const size_t tab = line.rfind('\t');
                if (tab == string::npos || tab == 0 || tab + 1 == line.size())
                    error(format("%s, line %zu: expected a text, a tab and a label", path.c_str(), number));
                texts.push_back(line.substr(0, tab));
                labels.push_back(line.substr(tab + 1));
            }
        }
        if (texts.empty()) error("there is no line of a text, a tab and a label");
    }
    // Sorted, a line each: first numbers, by their size.
    string names() const {
        const auto before = [](const string& a, const string& b) {
            const auto is_number = [](const string& text) { return text.find_first_not_of("0123456789") == string::npos; };
            const bool number = is_number(a);
            if (number != is_number(b)) return number;
            return number && a.size() != b.size() ? a.size() < b.size() : a < b;
        };
        vector<string> sorted = labels;
        std::sort(sorted.begin(), sorted.end(), before);
        sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
        string result;
        for (const string& name : sorted) result += name + "\n";
        return result;
    }
    string text() const {
        string result;
        for (const string& line : texts) result += line + "\n";
        return result;
    }
    // names: of all classes, a line each.
    void tokenize(Runtime& runtime, const Tokenizer& tokenizer, const string& names) {
        vector<string> known;
        for (size_t at = 0; at < names.size(); at = names.find('\n', at) + 1) known.push_back(names.substr(at, names.find('\n', at) - at));
        Array<int32_t> read(runtime);
        for (size_t i = 0; i < texts.size(); ++i) {
            const size_t found = size_t(std::find(known.begin(), known.end(), labels[i]) - known.begin());
            if (found == known.size()) error("the label '" + labels[i] + "' is none of the model's classes");
            classes.push_back(int32_t(found));
            read.count = 0;
            must(tokenizer.encode(texts[i], read));
            if (read.count == 0) error("the text '" + texts[i] + "' gives no token");
            if (tokenizer.begin_of_text >= 0) ids.push_back(tokenizer.begin_of_text);
            ids.insert(ids.end(), read.begin(), read.end());
            ends.push_back(ids.size());
        }
    }
    size_t longest() const {
        size_t most = 0;
        for (size_t i = 0; i < ends.size(); ++i) most = std::max(most, ends[i] - (i ? ends[i - 1] : 0));
        return most;
    }
    // What is beyond the context is not read.
    void cut_to(int context) {
        examples.clear();
        for (size_t i = 0; i < ends.size(); ++i) {
            const size_t begin = i ? ends[i - 1] : 0;
            examples.push_back(Example{{&ids[begin], std::min(ends[i] - begin, size_t(context))}, {&classes[i], 1}, {}, {}});
        }
    }
    Span<const Example> part(size_t begin, size_t end) const { return {examples.data() + begin, end - begin}; }
};

vector<Option> operator+(vector<Option> a, const vector<Option>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

// =====================================================================================================================
// Charts: SVG and terminal
// =====================================================================================================================

struct Point {
    double x, y;
};
struct Curve {
    string name;
    vector<Point> training, validation;  // step, loss
    double counting = none;              // what n-grams achieve on the validation text
};

// Bounds that a chart needs, and ticks at round numbers.
struct Axis {
    double low, high, step;
    Axis(double from, double to, int wanted) : low(from), high(to), step(1) {
        if (!(high > low)) high = low + 1;
        const double rough = (high - low) / wanted, unit = std::pow(10.0, std::floor(std::log10(rough)));
        const double share = rough / unit;
        step = unit * (share <= 1 ? 1 : share <= 2 ? 2 : share <= 5 ? 5 : 10);
    }
    vector<double> ticks() const {
        vector<double> result;
        for (double i = std::ceil(low / step - 1e-9); i * step <= high + step * 1e-9; ++i) result.push_back(i * step + 0.0);  // no -0
        return result;
    }
    double place(double value) const { return std::clamp((value - low) / (high - low), 0.0, 1.0); }
    string label(double value) const {
        if (step >= 1) return grouped(int64_t(std::llround(value)));
        return format("%.*f", int(std::ceil(-std::log10(step) - 1e-9)), value);
    }
};

vector<Point> smooth(const vector<Point>& points) {  // a moving mean over a fiftieth of the run
    const size_t n = points.size(), half = n / 100;
    vector<double> sums(n + 1, 0);
    for (size_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + points[i].y;
    vector<Point> result(n);
    for (size_t i = 0; i < n; ++i) {
        const size_t reach = std::min({half, i, n - 1 - i});
        result[i] = {points[i].x, (sums[i + reach + 1] - sums[i - reach]) / double(2 * reach + 1)};
    }
    return result;
}

vector<Point> thin(const vector<Point>& points, size_t most) {  // means of neighbours, at most so many
    if (points.size() <= most) return points;
    vector<Point> result;
    for (size_t i = 0; i < most; ++i) {
        const size_t from = i * points.size() / most, to = (i + 1) * points.size() / most;
        Point mean = {0, 0};
        for (size_t j = from; j < to; ++j) mean.x += points[j].x / double(to - from), mean.y += points[j].y / double(to - from);
        result.push_back(mean);
    }
    return result;
}

// The first fiftieth of a long run, where the loss falls from its start, does not stretch the chart: what is above is left out.
void chart_bounds(const vector<Curve>& curves, Axis& x, Axis& y, int x_ticks, int y_ticks) {
    double left = infinite, right = -infinite, low = infinite, high = -infinite;
    const auto see = [&](const vector<Point>& points) {
        for (const Point& p : points) left = std::min(left, p.x), right = std::max(right, p.x);
        for (size_t i = points.size() < 100 ? 0 : points.size() / 50; i < points.size(); ++i)
            low = std::min(low, points[i].y), high = std::max(high, points[i].y);
    };
    for (const Curve& curve : curves) {
        see(smooth(curve.training));
        see(curve.validation);
        if (std::isfinite(curve.counting)) low = std::min(low, curve.counting), high = std::max(high, curve.counting);
    }
    if (!(right >= left) || !(high >= low)) error("there is no loss to draw");
    x = Axis(std::min(left, right - 1), right, x_ticks);
    const double edge = 0.04 * std::max(high - low, 1e-3);
    y = Axis(low - edge, high + edge, y_ticks);
}

string xml(const string& text) {
    string result;
    for (const char c : visible(text, false)) {  // which is UTF-8, and has no control characters
        if (c == '<') result += "&lt;";
        else if (c == '&') result += "&amp;";
        else if (c == '"') result += "&quot;";
        else result += c;
    }
    return result;
}

struct Svg {
    string body;
    void rectangle(double x, double y, double w, double h, const char* style) {
        body += format("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y, w, h, style);
    }
    void line(double x1, double y1, double x2, double y2, const char* style) {
        body += format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
    }
    void text(double x, double y, const string& words, const char* style) {
        body += format("<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, xml(words).c_str());
    }
    void circle(double x, double y, double r, const char* style) {
        body += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" %s/>\n", x, y, r, style);
    }
    void path(const vector<Point>& points, const char* style) {
        body += "<polyline points=\"";
        for (const Point& p : points) body += format("%.1f,%.1f ", p.x, p.y);
        body += format("\" fill=\"none\" stroke-linejoin=\"round\" %s/>\n", style);
    }
    void save(const string& path_name, double width, double height) const {
        write_file(
            path_name,
            format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
                   "font-family=\"system-ui, sans-serif\" font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
                   width, height, width, height) +
                body + "</svg>\n");
    }
};

void draw_svg(const vector<Curve>& curves, const string& path) {
    const double width = 880, height = 500, left = 70, right = 24, top = 44, bottom = 58;
    const double inner_width = width - left - right, inner_height = height - top - bottom;
    const char* colours[] = {"#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2", "#be185d", "#4d7c0f"};
    Axis x(0, 1, 1), y(0, 1, 1);
    chart_bounds(curves, x, y, 8, 7);
    const auto at = [&](Point p) { return Point{left + inner_width * x.place(p.x), top + inner_height * (1 - y.place(p.y))}; };
    const auto placed = [&](const vector<Point>& points) {
        vector<Point> result;
        for (const Point& p : points)
            if (p.y <= y.high) result.push_back(at(p));
        return result;
    };
    Svg svg;
    svg.text(left, 26, "Loss while learning", "font-size=\"16\" font-weight=\"600\" fill=\"#111\"");
    for (double tick : y.ticks()) {
        const double height_at = at({x.low, tick}).y;
        svg.line(left, height_at, width - right, height_at, "stroke=\"#e5e7eb\"");
        svg.text(left - 8, height_at + 4.5, y.label(tick), "text-anchor=\"end\" fill=\"#4b5563\"");
    }
    for (double tick : x.ticks()) {
        const double place = at({tick, y.low}).x;
        svg.line(place, height - bottom, place, height - bottom + 5, "stroke=\"#9ca3af\"");
        svg.text(place, height - bottom + 20, x.label(tick), "text-anchor=\"middle\" fill=\"#4b5563\"");
    }
    svg.line(left, height - bottom, width - right, height - bottom, "stroke=\"#9ca3af\"");
    svg.text(left + inner_width / 2, height - 14, "step", "text-anchor=\"middle\" fill=\"#111\"");
    svg.text(0, 0, "loss, nats a token",
             format("text-anchor=\"middle\" fill=\"#111\" transform=\"translate(18 %.1f) rotate(-90)\"", top + inner_height / 2).c_str());
    const double legend_left = width - right - (curves.size() == 1 ? 236 : 330);
    double legend = top + 14;
    const auto explain = [&](const string& words, const string& style) {
        svg.rectangle(legend_left - 6, legend - 14, width - right - legend_left + 6, 20, "fill=\"#fff\" fill-opacity=\"0.85\"");
        svg.line(legend_left, legend - 4, legend_left + 30, legend - 4, style.c_str());
        svg.text(legend_left + 38, legend, words, "fill=\"#111\"");
        legend += 20;
    };
    for (size_t i = 0; i < curves.size(); ++i) {
        const Curve& curve = curves[i];
        const bool alone = curves.size() == 1;
        const char* colour = colours[i % 8];
        const char* second = alone ? colours[1] : colour;
        const string name = alone ? "" : cut(curve.name, 14) + ", ";
        if (!curve.training.empty()) {
            const string thick = format("stroke=\"%s\" stroke-width=\"2.4\"", colour);
            svg.path(placed(thin(curve.training, 1200)), format("stroke=\"%s\" stroke-opacity=\"0.22\"", colour).c_str());
            svg.path(placed(thin(smooth(curve.training), 600)), thick.c_str());
            explain(name + "training", thick);
        }
        if (!curve.validation.empty()) {
            const string dashed = format("stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"5 3\"", second);
            svg.path(placed(curve.validation), dashed.c_str());
            const Point best =
                *std::min_element(curve.validation.begin(), curve.validation.end(), [](Point a, Point b) { return a.y < b.y; });
            for (const Point& p : curve.validation) svg.circle(at(p).x, at(p).y, 2.6, format("fill=\"%s\"", second).c_str());
            svg.circle(at(best).x, at(best).y, 6, format("fill=\"none\" stroke=\"%s\" stroke-width=\"2\"", second).c_str());
            explain(name + format("validation, best %.3f", best.y), dashed);
        }
        if (std::isfinite(curve.counting)) {
            const Point from = at({x.low, curve.counting});
            svg.line(from.x, from.y, width - right, from.y, "stroke=\"#6b7280\" stroke-dasharray=\"2 4\" stroke-width=\"1.6\"");
            explain(name + format("counting (n-grams) %.3f", curve.counting),
                    "stroke=\"#6b7280\" stroke-dasharray=\"2 4\" stroke-width=\"1.6\"");
        }
    }
    svg.save(path, width, height);
}

// The training loss as Braille dots (2 x 4 a cell), the validation losses as 'o', what counting achieves as a line.
string draw_terminal(const Curve& curve) {
    const size_t columns = 64, rows = 14;
    Axis x(0, 1, 1), y(0, 1, 1);
    chart_bounds({curve}, x, y, 6, 5);
    vector<vector<unsigned>> dots(rows, vector<unsigned>(columns, 0));
    const auto dot = [&](int column, int row) {
        const unsigned bits[4][2] = {{1, 8}, {2, 16}, {4, 32}, {64, 128}};
        dots[size_t(row) / 4][size_t(column) / 2] |= bits[row % 4][column % 2];
    };
    Point last = {-1, 0};
    for (const Point& p : thin(smooth(curve.training), columns * 2)) {
        if (p.y > y.high) continue;
        const Point here = {x.place(p.x) * double(columns * 2 - 1), (1 - y.place(p.y)) * double(rows * 4 - 1)};
        const int steps = last.x < 0 ? 1 : std::max(1, int(std::max(here.x - last.x, std::fabs(here.y - last.y))));
        for (int i = 1; i <= steps; ++i) {  // a straight line from the last point
            const double share = last.x < 0 ? 1 : double(i) / steps;
            dot(int(last.x + share * (here.x - last.x)), int(last.y + share * (here.y - last.y)));
        }
        last = here;
    }
    const auto row_of = [&](double value) { return size_t((1 - y.place(value)) * double(rows - 1) + 0.5); };
    vector<vector<bool>> marks(rows, vector<bool>(columns, false));
    for (const Point& p : curve.validation) marks[row_of(p.y)][size_t(x.place(p.x) * double(columns - 1))] = true;
    const bool counts = std::isfinite(curve.counting);
    const size_t counting_row = counts ? row_of(curve.counting) : rows;
    vector<string> labels(rows);
    for (double tick : y.ticks()) labels[row_of(tick)] = y.label(tick);
    string picture;
    for (size_t r = 0; r < rows; ++r) {
        picture += pad(labels[r], 8, true) + (labels[r].empty() ? " \xE2\x94\x82" : " \xE2\x94\xA4");
        for (size_t c = 0; c < columns; ++c) {
            const unsigned code = 0x2800 + dots[r][c];
            if (marks[r][c]) picture += "o";
            else if (dots[r][c] == 0) picture += r == counting_row ? "\xE2\x95\x8C" : " ";
            else append_utf8(picture, code);
        }
        picture += "\n";
    }
    string axis(columns + 16, ' ');
    picture += string(9, ' ') + "\xE2\x94\x94";
    for (size_t c = 0; c < columns; ++c) picture += "\xE2\x94\x80";
    for (double tick : x.ticks()) {
        const string label = x.label(tick);
        const size_t place = 10 + size_t(x.place(tick) * double(columns - 1)) - label.size() / 2;
        axis.replace(std::min(place, axis.size() - label.size()), label.size(), label);
    }
    return picture + "\n" + axis.substr(0, axis.find_last_not_of(' ') + 1) + "\n          step; training loss as dots" +
           (curve.validation.empty() ? "" : ", validation as o") + (counts ? ", counting as a line" : "") + "; nats a token\n";
}

// ---- The log of a training, as CSV -----------------------------------------------------------------------------------

const char* const log_header = "step,loss,lr,grad_norm,tokens_per_second,validation_loss";

Curve read_log(const string& path) {
    Curve curve;
    curve.name = to_string(path_of(path).stem());
    size_t number = 0;
    vector<string> names;
    for (const string& line : read_lines(path)) {
        ++number;
        if (line.empty()) continue;
        vector<string> cells;
        for (size_t from = 0;;) {
            const size_t comma = line.find(',', from);
            cells.push_back(line.substr(from, comma - from));
            if (comma == string::npos) break;
            from = comma + 1;
        }
        if (names.empty()) {
            names = cells;
            if (std::find(names.begin(), names.end(), "step") == names.end() ||
                std::find(names.begin(), names.end(), "loss") == names.end())
                error(path + ": the first line must name the columns, among them step and loss");
            continue;
        }
        double step = none, loss = none, validation = none;
        for (size_t i = 0; i < cells.size() && i < names.size(); ++i) {
            double value = 0;
            double* to = names[i] == "step" ? &step : names[i] == "loss" ? &loss : names[i] == "validation_loss" ? &validation : nullptr;
            if (!to || cells[i].empty() || cells[i] == "nan" || cells[i] == "-nan" || cells[i] == "inf") continue;
            if (!read_number(cells[i], value)) error(format("%s, line %zu: '%s' is not a number", path.c_str(), number, cells[i].c_str()));
            if (std::fabs(value) <= 1e12) *to = value;
            else if (to == &step) error(format("%s, line %zu: '%s' is too large to draw", path.c_str(), number, cells[i].c_str()));
        }
        if (std::isfinite(step) && std::isfinite(loss)) curve.training.push_back({step, loss});
        if (std::isfinite(step) && std::isfinite(validation)) curve.validation.push_back({step, validation});
    }
    return curve;
}

void check_log(const string& path) {  // what is there may be written over, if it is a log
    if (!exists(path)) return;
    FILE* file = open_file(path, "rb");
    if (!file) error("cannot open --log " + path + ": " + strerror(errno));
    string old(strlen(log_header), '\0');
    old.resize(fread(&old[0], 1, old.size(), file));
    fclose(file);
    if (!old.empty() && old != log_header) error("--log " + path + ": the file exists and is no log of a training; choose another name");
}

// A resumed run goes on where its checkpoint stood: rows of later steps belong to work that was lost.
FILE* open_log(const string& path, bool resume, int64_t step, string* owed) {
    string kept = string(log_header) + "\n";
    const string old = resume && exists(path) ? read_file(path) : "";
    for (size_t at = old.find('\n') + 1; at > 0 && at < old.size();) {
        const size_t end = old.find('\n', at);
        if (end == string::npos) break;  // cut off in the middle of a row
        const string row = old.substr(at, end - at);
        at = end + 1;
        int64_t row_step = 0;
        if (!read_number(row.substr(0, row.find(',')), row_step) || row_step > step) continue;
        if (owed && row_step == step) *owed = row;
        else kept += row + "\n";
    }
    write_file(path, kept);
    FILE* log = open_file(path, "ab");
    if (!log) error("cannot open --log " + path + ": " + strerror(errno));
    return log;
}

int plot(Arguments& in) {
    Common common;
    string svg;
    in.parse(common, {{"--svg", "FILE", "writes the picture there (without it: drawn in the terminal)", &svg}}, 1, 64);
    need_other_than(in.operands, "--svg", svg);
    vector<Curve> curves;
    for (const string& path : in.operands) curves.push_back(read_log(path));
    if (!svg.empty()) {
        draw_svg(curves, svg);
        return 0;
    }
    for (const Curve& curve : curves) put_line((curves.size() > 1 ? curve.name + "\n" : "") + draw_terminal(curve));
    return 0;
}

// =====================================================================================================================
// Training
// =====================================================================================================================

// One process at a time may write a model: holds a lock beside its resume file until it ends.
struct Lock {
    string path;
    Lock(const string& out, const string& resume_file) : path(resume_file + ".lock") {
#if defined(_WIN32)
        handle = CreateFileW(path_of(path).c_str(), GENERIC_WRITE, 0, nullptr, CREATE_ALWAYS, FILE_FLAG_DELETE_ON_CLOSE, nullptr);
        if (handle == INVALID_HANDLE_VALUE) busy(out);
#else
        for (;;) {
            handle = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
            if (handle < 0) error("cannot write " + path + ": " + strerror(errno) + "; --out must be in a folder that can be written to");
            if (flock(handle, LOCK_EX | LOCK_NB) != 0) {
                const int why = errno;
                close(handle);
                if (why == EINTR) continue;
                if (why == EWOULDBLOCK) busy(out);
                error("cannot lock " + path + ": " + strerror(why));
            }
            struct stat mine, there;  // another process may have removed the file between our open and our lock
            if (fstat(handle, &mine) == 0 && stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino) return;
            close(handle);
        }
#endif
    }
    ~Lock() {
#if defined(_WIN32)
        CloseHandle(handle);
#else
        unlink(path.c_str());
        close(handle);
#endif
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

 private:
    [[noreturn]] void busy(const string& out) const {
        error("another process is training --out " + out + " (it holds " + path + "); wait for it or choose another name");
    }
#if defined(_WIN32)
    HANDLE handle;
#else
    int handle;
#endif
};

const char* const architecture_help =
    "the fields and names of GPT-2 or Llama; the first Transformer's, with as many --encoder-layers as --layers; or those of a lecture's "
    "GPT: "
    "norms after, ReLU, a head of its own with a bias; the options below change single ones (gpt2)";
const char* const architecture_names[] = {"gpt2", "llama"};
const char* const activation_names[] = {"none", "gelu", "gelu_tanh", "relu", "silu"};
const char* const position_names[] = {"learned", "rotary", "sinusoidal", "none"};
const char* const norm_names[] = {"layer", "rms"};

// "swiglu" for silu that is gated
string activation_name(const Config& c) {
    if (!c.gated) return activation_names[int(c.activation)];
    if (c.activation == Activation::silu) return "swiglu";
    if (c.activation == Activation::gelu_tanh) return "geglu";
    return string("gated ") + activation_names[int(c.activation)];
}
template <class E, size_t N>
E named(const char* option, const string& name, const char* const (&names)[N]) {
    for (size_t i = 0; i < N; ++i)
        if (name == names[i]) return E(i);
    usage(format("%s '%s' is not known", option, name.c_str()));
}

struct TrainOptions {
    string out, from, tokenizer, preset_name = "tiny", schedule = "cosine", validation, user_turn, reply_turn, log, plot, cache,
                                 architecture = "gpt2", activation, norm, positions, optimizer = "adamw";
    bool encoder_only = false, classes = false, resume = false, overwrite = false, untie = false, tie = false, no_bias = false,
         no_counting = false, json = false, plain_words = false, answers_only = false;
    double epochs = 0, time = 0, validation_fraction = 0.1;
    AdapterConfig lora{0, 0, {}};
    string lora_targets;
    int64_t stop_at = 0, save_every = 0;
    Config shape;
    TrainConfig learning;
    TextOptions text;

    vector<Option> options() {
        return vector<Option>{
                   {nullptr, nullptr, "What is written"},
                   {"--out", "M.safetensors", "the model (what resuming needs is kept beside it, in M.resume.safetensors)", &out},
                   {"--resume", nullptr,
                    "go on where --out stopped; options are remembered, but say again where the text comes from (FILE, --field, "
                    "--validation, ...) and how to compute (--precision, --backend, --threads)",
                    &resume},
                   {"--overwrite", nullptr, "start anew although --out exists", &overwrite},
                   {"--from", "M.safetensors",
                    "go on from this model, on other text: its shape, tokenizer and chat, but a schedule and moments of its own", &from},
                   {"--lora", "RANK", "train only an adapter beside --from's model, which stays as it is; --out is the adapter", &lora.rank,
                    1, 65536},
                   {"--lora-alpha", "X", "what the adapter adds counts alpha / rank times (twice the rank)", &lora.alpha, 1e-9, 1e9},
                   {"--lora-targets", "LIST", "ends of names of matrices, e.g. q_proj,v_proj or attn.c_attn (all of the layers)",
                    &lora_targets},
                   {"--log", "FILE.csv", "a row a step", &log},
                   {"--plot", "FILE.svg", "the loss curves as a picture", &plot},
                   {"--json", nullptr, "one JSON object a step on standard output, a last one at the end", &json},
                   {nullptr, nullptr,
                    "How text is read (FILE: .txt, .jsonl, .csv, or - for standard input; with --encoder-layers, lines SOURCE tab TARGET)"},
                   {"--tokenizer", "byte|char|bpe:N|wordpiece:N|unigram:N|FILE",
                    "wordpiece makes capitals small and drops accents, wordpiece:N:cased does not (bpe:1024, and char below 100 kB of "
                    "text)",
                    &tokenizer},
                   {"--user-turn", "TEXT", "a chat: what stands before the user's line, e.g. '#Person1#: '", &user_turn},
                   {"--reply-turn", "TEXT", "a chat: what stands before the model's line, e.g. '#Person2#: '", &reply_turn},
                   {"--plain-words", nullptr,
                    "a chat: the text has the user's lines in small letters without punctuation; so will the chat", &plain_words},
                   {"--answers-only", nullptr, "a chat: learn what follows --reply-turn in its line, and only read the rest",
                    &answers_only},
                   {"--classes", nullptr,
                    "a classifier: each line is a text, a tab and its label (any word); an encoder with a head for the classes", &classes},
                   {"--validation", "FILE", "validate on this file instead of the text's last part", &validation},
                   {"--validation-fraction", "X", "share of the text that is held out, its last part (0.1, but of a text at most 1 MB)",
                    &validation_fraction, 0, 0.9},
                   {"--token-cache", "FILE", "keep the training tokens in this file instead of in memory", &cache}} +
               text.options() +
               vector<Option>{
                   {nullptr, nullptr, "The model"},
                   {"--preset", "NAME", "nano, tiny, small, baby, gpt2, gpt2-medium, gpt2-large, gpt2-xl (tiny)", &preset_name},
                   {"--arch", "gpt2|llama|transformer|lecture", architecture_help, &architecture},
                   {"--encoder-layers", "N", "an encoder of so many layers reads the source of each pair: the model translates (0)",
                    &shape.encoder_layers, 0, 1000},
                   {"--encoder-only", nullptr, "as BERT: each token sees all others, and it learns to fill gaps", &encoder_only},
                   {"--layers", "N", "blocks of attention and feed-forward", &shape.layers, 1, 1000},
                   {"--heads", "N", "of attention in a block", &shape.heads, 1, 1000},
                   {"--kv-heads", "N", "of keys and values, each for a group of heads (as many as heads)", &shape.kv_heads, 1, 1000},
                   {"--width", "N", "a multiple of the heads", &shape.width, 1, 1e6},
                   {"--hidden", "N", "width of the feed-forward part (4 times --width; gated, 8/3 of it)", &shape.hidden, 1, 1e6},
                   {"--context", "N", "how many tokens it sees at once", &shape.context, 1, 1e6},
                   {"--untie", nullptr, "the output head gets a matrix of its own, as Llama's has", &untie},
                   {"--tie", nullptr, "the output head shares the embedding's matrix, as GPT-2's does", &tie},
                   {"--no-bias", nullptr, "no biases, as in Llama", &no_bias},
                   {"--activation", "gelu|gelu_tanh|relu|silu|swiglu|geglu", "swiglu and geglu are gated (gelu_tanh; Llama's: swiglu)",
                    &activation},
                   {"--norm", "layer|rms", "(layer; Llama's: rms)", &norm},
                   {"--norm-after", nullptr, "after each sub-layer's addition, as in the first Transformer, not before", &shape.norm_after},
                   {"--positions", "learned|rotary|sinusoidal|none",
                    "rotary (RoPE) learns faster; learned is GPT-2's (learned; Llama's: rotary)", &positions},
                   {nullptr, nullptr, "Learning"},
                   {"--steps", "N", "the total, and the schedule's horizon", &learning.steps, 1, 1e15},
                   {"--epochs", "N", "times through the text instead", &epochs, 1e-9, 1e9},
                   {"--time", "SECONDS", "as many steps as fit in this time instead (120); the number is printed", &time, 0.1, 1e8},
                   {"--batch", "N", "sequences at once (16)", &learning.batch, 1, 1e6},
                   {"--accumulate", "N", "batches a step (1)", &learning.accumulate, 1, 1e6},
                   {"--optimizer", "adamw|muon", "muon needs fewer steps, of which each takes longer: give it a large batch (adamw)",
                    &optimizer},
                   {"--muon-lr", "X", "of the blocks' matrices under muon; follows the schedule of --lr (0.02)", &learning.muon_lr, 0, 10},
                   {"--lr", "X", "the highest learning rate (1e-3 at width 384, more for narrower models, less for wider)", &learning.lr, 0,
                    10},
                   {"--min-lr", "X", "where it ends (a tenth of --lr; with inverse_sqrt 0)", &learning.min_lr, 0, 10},
                   {"--warmup", "N", "steps (100, or a tenth of the run)", &learning.warmup, 0, 1e15},
                   {"--schedule", "cosine|linear|constant|wsd|inverse_sqrt",
                    "inverse_sqrt: the first Transformer's, a longer --warmup suits it (cosine)", &schedule},
                   {"--weight-decay", "X", "(0.1)", &learning.weight_decay, 0, 100},
                   {"--beta1", "X", "(0.9)", &learning.beta1, 0, 0.999999},
                   {"--beta2", "X", "(0.99)", &learning.beta2, 0, 0.999999},
                   {"--clip", "X", "the gradient's largest norm; 0: any (1)", &learning.clip, 0, 1e9},
                   {"--dropout", "X", "(0)", &learning.dropout, 0, 0.95},
                   {"--label-smoothing", "X", "(0)", &learning.label_smoothing, 0, 0.95},
                   {"--seed", "N", "(1)", &learning.seed},
                   {"--evaluate-every", "N", "steps (a twentieth of the run)", &learning.evaluate_every, 1, 1e15},
                   {"--patience", "N", "end after so many evaluations without a better one; 0: never (0)", &learning.patience, 0, 1e9},
                   {"--stop-at", "STEP", "save and end there, as an interruption would", &stop_at, 1, 1e15},
                   {"--save-every", "N", "steps between two saves for resuming (at evaluations)", &save_every, 1, 1e15},
                   {"--no-counting", nullptr, "leave the n-gram baseline out of the report", &no_counting}};
    }
};

// Everything that a training holds. Members stay where they are: later ones point to earlier ones.
struct Training {
    Common common;
    TrainOptions options;
    Corpus corpus, validation_corpus;
    Tokenizer tokenizer;
    Labelled labelled, validation_labelled;
    Data data, validation;
    bool has_validation = false;
    bool pairs = false;    // the model has an encoder, and learns to translate
    Model model, encoder;  // encoder: of --from beside --classes
    Adapter adapter;
    bool adapts = false;  // the adapter is trained, and the model is as it was
    TrainConfig config;
    Trainer trainer;
    int64_t parameters() const { return adapts ? adapter.parameters : model.parameters; }
    Status create(Trainer& to, Model& of, Adapter& beside, const TrainConfig& how, Data* held_out = nullptr) {
        return adapts ? to.create(common.runtime, of, beside, how, data, held_out) : to.create(common.runtime, of, how, data, held_out);
    }
};

[[noreturn]] void contradicts(const char* option, const string& given, const string& stored) {
    error(format("%s %s contradicts the checkpoint, which was made with %s; leave the option out, or start anew", option, given.c_str(),
                 stored.c_str()));
}

template <class T>
void agree(const Arguments& in, const char* option, const T& given, const T& stored) {
    if (in.has(option) && !(given == stored)) contradicts(option, json_value(given), json_value(stored));
}

const char* const schedules[] = {"cosine", "linear", "constant", "wsd", "inverse_sqrt"};

// --arch says what many fields are, but for those that options name.
void check_architecture(const Arguments& in, const TrainOptions& o, const Config& shape) {
    if (!in.has("--arch")) return;
    Config wanted = shape;
    must_be("--arch", preset_architecture(o.architecture, wanted));
    if (in.has("--positions")) wanted.positions = shape.positions;
    if (in.has("--activation")) wanted.activation = shape.activation, wanted.gated = shape.gated;
    if (in.has("--norm")) wanted.norm = shape.norm;
    if (in.has("--norm-after")) wanted.norm_after = shape.norm_after;
    if (wanted.architecture != shape.architecture || wanted.positions != shape.positions || wanted.activation != shape.activation ||
        wanted.gated != shape.gated || wanted.norm != shape.norm || wanted.norm_after != shape.norm_after ||
        wanted.norm_last != shape.norm_last || wanted.head_bias != shape.head_bias)
        contradicts("--arch", o.architecture,
                    format("%s%s, %s positions, %s, norms %s", architecture_names[int(shape.architecture)],
                           shape.head_bias ? ", a bias in the head" : "", position_names[int(shape.positions)],
                           activation_name(shape).c_str(), shape.norm_after ? "after" : "before"));
}

// What is said about a model that is there must be so.
void check_shape(const Arguments& in, const TrainOptions& o, const Config& shape) {
    if (in.has("--preset")) {
        Config wanted = shape;
        must_be("--preset", preset(o.preset_name, wanted));
        if (in.has("--layers")) wanted.layers = shape.layers;
        if (in.has("--heads")) wanted.heads = shape.heads;
        if (in.has("--width")) wanted.width = shape.width;
        if (in.has("--context") || shape.context < wanted.context) wanted.context = shape.context;  // a very short text made it less
        if (wanted.layers != shape.layers || wanted.heads != shape.heads || wanted.width != shape.width || wanted.context != shape.context)
            contradicts("--preset", o.preset_name,
                        format("%d layers, %d heads, width %d, context %d", shape.layers, shape.heads, shape.width, shape.context));
    }
    agree(in, "--layers", o.shape.layers, shape.layers);
    agree(in, "--encoder-layers", o.shape.encoder_layers, shape.encoder_layers);
    agree(in, "--heads", o.shape.heads, shape.heads);
    agree(in, "--width", o.shape.width, shape.width);
    agree(in, "--context", o.shape.context, shape.context);
    agree(in, "--untie", o.untie, !shape.tied);
    agree(in, "--tie", o.tie, shape.tied);
    agree(in, "--no-bias", o.no_bias, !shape.bias);
    check_architecture(in, o, shape);
    agree(in, "--encoder-only", o.encoder_only, !shape.causal);
    agree(in, "--kv-heads", o.shape.kv_heads, shape.kv_heads);
    agree(in, "--hidden", o.shape.hidden, shape.hidden);
    agree(in, "--activation", o.activation, activation_name(shape));
    agree(in, "--norm", o.norm, string(norm_names[int(shape.norm)]));
    agree(in, "--norm-after", o.shape.norm_after, shape.norm_after);
    agree(in, "--positions", o.positions, string(position_names[int(shape.positions)]));
}

// What was said again beside --resume must be what was said first.
void check_agreement(const Arguments& in, const TrainOptions& o, const Model& model, const TrainConfig& stored) {
    if (o.classes != (model.config.classes > 0))
        contradicts("--classes", o.classes ? "given" : "left out", o.classes ? "running text" : "classes");
    check_shape(in, o, model.config);
    agree(in, "--batch", o.learning.batch, stored.batch);
    agree(in, "--accumulate", o.learning.accumulate, stored.accumulate);
    agree(in, "--steps", o.learning.steps, stored.steps);
    agree(in, "--lr", o.learning.lr, stored.lr);
    agree(in, "--min-lr", o.learning.min_lr, stored.min_lr);
    agree(in, "--warmup", o.learning.warmup, stored.warmup);
    agree(in, "--schedule", o.schedule, string(schedules[int(stored.schedule)]));
    agree(in, "--optimizer", o.optimizer, string(stored.optimizer == Optimizer::muon ? "muon" : "adamw"));
    agree(in, "--muon-lr", o.learning.muon_lr, stored.muon_lr);
    agree(in, "--weight-decay", o.learning.weight_decay, stored.weight_decay);
    agree(in, "--beta1", o.learning.beta1, stored.beta1);
    agree(in, "--beta2", o.learning.beta2, stored.beta2);
    agree(in, "--clip", o.learning.clip, stored.clip);
    agree(in, "--dropout", o.learning.dropout, stored.dropout);
    agree(in, "--label-smoothing", o.learning.label_smoothing, stored.label_smoothing);
    agree(in, "--seed", o.learning.seed, stored.seed);
    agree(in, "--evaluate-every", o.learning.evaluate_every, stored.evaluate_every);
    agree(in, "--patience", o.learning.patience, stored.patience);
    if (!o.from.empty()) return;  // of an adapter these are about the text alone
    agree(in, "--user-turn", o.user_turn, to_string(model.chat.user_turn));
    agree(in, "--reply-turn", o.reply_turn, to_string(model.chat.reply_turn));
    agree(in, "--plain-words", o.plain_words, model.chat.plain_words);
}

bool named_tokenizer(const string& name) {
    return name == "byte" || name == "char" || starts_with(name, "bpe:") || starts_with(name, "wordpiece:") ||
           starts_with(name, "unigram:");
}

void get_tokenizer(Runtime& runtime, const string& name, Corpus& corpus, Tokenizer& tokenizer) {
    if (!named_tokenizer(name)) return load_tokenizer(runtime, name, tokenizer);
    TokenizerConfig config;
    must_be("--tokenizer " + name, parse_tokenizer(name, config));
    must(tokenizer.train(runtime, config, corpus));
}

void choose_tokenizer(Training& t) {
    string name = t.options.tokenizer;
    if (name.empty()) name = t.corpus.bytes < 100000 && !t.pairs ? "char" : "bpe:1024";
    get_tokenizer(t.common.runtime, name, t.corpus, t.tokenizer);
}

void check_tokenizer(Training& t) {  // --tokenizer beside --resume or --from
    const string& name = t.options.tokenizer;
    const Tokenizer& stored = t.model.tokenizer;
    const string kinds[] = {"none", "byte", "char", "bpe:" + std::to_string(stored.vocab), "wordpiece", "sentencepiece"};
    const string kept = kinds[int(stored.kind)];
    if (name == kept || (stored.kind == TokenizerKind::bpe && starts_with(name, "bpe:"))) {
        if (starts_with(name, "bpe:")) {
            TokenizerConfig config;
            must_be("--tokenizer " + name, parse_tokenizer(name, config));
            Tokenizer again;  // a short text gives fewer tokens than were asked for
            if (config.vocab > stored.vocab) must(again.train(t.common.runtime, config, t.corpus));
            if (config.vocab < stored.vocab || again.vocab > stored.vocab) contradicts("--tokenizer", name, kept);
        }
        return;
    }
    Tokenizer given;
    const string way = stored.kind == TokenizerKind::sentencepiece ? "unigram:" : kept + ":";
    if (starts_with(name, way.c_str())) {  // the same text gives the same again
        TokenizerConfig config;
        must_be("--tokenizer " + name, parse_tokenizer(name, config));
        must(given.train(t.common.runtime, config, t.corpus));
    } else if (named_tokenizer(name)) contradicts("--tokenizer", name, kept);
    else load_tokenizer(t.common.runtime, name, given);
    Array<char> a(t.common.runtime), b(t.common.runtime);
    must(given.save_memory(a));
    must(stored.save_memory(b));
    if (to_string(a) != to_string(b)) contradicts("--tokenizer", name, "another vocabulary");
}

// The sequence length where no text is too short for it.
int wanted_context(const Arguments& in, const Training& t) {
    if (t.options.resume || !t.options.from.empty()) return t.model.config.context;
    if (in.has("--context")) return t.options.shape.context;
    Config shape;
    must_be("--preset", preset(t.options.preset_name, shape));
    return shape.context;
}

void create_data(const Arguments& in, Training& t, Corpus& corpus, Part part, const string& cache, Data& data) {
    const TrainOptions& o = t.options;
    const string answers = !o.answers_only ? "" : o.reply_turn.empty() ? to_string(t.model.chat.reply_turn) : o.reply_turn;
    if (!t.pairs) return must(data.create(t.common.runtime, corpus, part, t.tokenizer, cache, uint64_t(256) << 20, answers));
    const Status status = data.create_pairs(t.common.runtime, corpus, part, t.tokenizer, wanted_context(in, t));
    if (status.error == Error::invalid_argument && t.tokenizer.end_of_text < 0)
        usage("--tokenizer: " + string(status.message) + "; take bpe:N or wordpiece:N");
    must(status);
}

// The texts, labels and tokenizer of a classifier.
void open_labelled(Training& t, const vector<string>& files) {
    TrainOptions& o = t.options;
    Runtime& runtime = t.common.runtime;
    t.labelled.read(files);
    if (!o.validation.empty()) t.validation_labelled.read({o.validation});
    const string text = t.labelled.text(), names = o.resume ? to_string(t.model.labels) : t.labelled.names();
    CorpusConfig how;
    how.validation_fraction = 0;
    must(t.corpus.open_memory(runtime, text, how));
    const Model& known = o.resume ? t.model : t.encoder;
    if (known.weights) {
        if (!o.tokenizer.empty() && !o.resume) usage("--tokenizer: --from has one");
        if (!o.tokenizer.empty()) check_tokenizer(t);
        must(t.tokenizer.copy(runtime, known.tokenizer));
    } else {
        choose_tokenizer(t);
    }
    t.labelled.tokenize(runtime, t.tokenizer, names);
    if (!o.validation.empty()) t.validation_labelled.tokenize(runtime, t.tokenizer, names);
}
// Once the context is known.
void cut_labelled(Training& t, int context) {
    const bool own = !t.options.validation.empty();
    t.labelled.cut_to(context), t.validation_labelled.cut_to(context);
    const size_t all = t.labelled.examples.size(), held_out = own ? 0 : size_t(double(all) * t.options.validation_fraction);
    must(t.data.create(t.common.runtime, t.labelled.part(0, all - held_out)));
    t.has_validation = own || held_out > 0;
    if (t.has_validation)
        must(t.validation.create(t.common.runtime, own ? t.validation_labelled.part(0, t.validation_labelled.examples.size())
                                                       : t.labelled.part(all - held_out, all)));
}

void open_data(const Arguments& in, Training& t) {
    TrainOptions& o = t.options;
    Runtime& runtime = t.common.runtime;
    if (o.classes) return open_labelled(t, in.operands);
    if (!o.user_turn.empty() || !t.model.chat.empty()) o.text.dialogues = true;
    const auto config = [&](double fraction) {
        CorpusConfig result = o.text.config(fraction);
        if (t.pairs) result.format = TextFormat::tsv;
        if (!in.has("--validation-fraction")) result.validation_limit = 1000000;
        return result;
    };
    open_corpus(runtime, in.operands, config(o.validation.empty() ? o.validation_fraction : 0), t.corpus);
    if (!o.validation.empty()) open_corpus(runtime, {o.validation}, config(0), t.validation_corpus);
    if (t.model.tokenizer.kind != TokenizerKind::none) {
        if (!o.tokenizer.empty()) check_tokenizer(t);
        must(t.tokenizer.copy(runtime, t.model.tokenizer));
    } else {
        if (!o.from.empty() && (o.tokenizer.empty() || named_tokenizer(o.tokenizer)))
            usage(o.from + " has no tokenizer: give the file of its own with --tokenizer FILE");
        choose_tokenizer(t);
        if (!o.from.empty()) {
            const int vocab = t.model.config.vocab;
            if (t.tokenizer.vocab > vocab)
                error(format("--tokenizer %s has %d ids, but %s only %d", o.tokenizer.c_str(), t.tokenizer.vocab, o.from.c_str(), vocab));
            must(t.model.tokenizer.copy(runtime, t.tokenizer));
        }
    }
    if (o.answers_only && o.reply_turn.empty() && t.model.chat.reply_turn.count == 0)
        usage("--answers-only needs --reply-turn: " + o.from + o.out + " has no chat template");
    create_data(in, t, t.corpus, o.validation.empty() ? Part::training : Part::all, o.cache, t.data);
    if (t.data.tokens < 2) error(format("the text has %lld tokens: too little to learn from", static_cast<long long>(t.data.tokens)));
    if (!o.validation.empty() || o.validation_fraction > 0) {
        const bool is_there = !t.pairs || !o.validation.empty() || t.corpus.training_bytes < t.corpus.bytes;
        if (is_there && o.validation.empty()) create_data(in, t, t.corpus, Part::validation, "", t.validation);
        if (is_there && !o.validation.empty()) create_data(in, t, t.validation_corpus, Part::all, "", t.validation);
        t.has_validation = t.validation.tokens >= 2;
        if (!t.has_validation) note("the validation text is too short: the last model will be kept instead of the best");
    }
}

bool begins_a_line(Corpus& corpus, const string& turn) {
    struct Search {
        const string& turn;
        size_t found = 0;  // so much of the turn stands since the line's beginning; npos: something else does
        static bool read(void* user, Text piece, bool end_of_document) noexcept {
            Search& s = *static_cast<Search*>(user);
            for (const char c : piece) {
                if (s.found == s.turn.size()) return false;
                if (s.found < s.turn.size() && c == s.turn[s.found]) ++s.found;
                else s.found = c == '\n' ? 0 : string::npos;
            }
            if (s.found == s.turn.size()) return false;
            if (end_of_document) s.found = 0;
            return true;
        }
    } search{turn};
    must(corpus.read(Part::all, Search::read, &search));
    return search.found == turn.size();
}

// The model's shape and the way of learning, from the options.
Config choose_shape(const Arguments& in, Training& t) {
    const TrainOptions& o = t.options;
    Config shape = t.model.config;
    if (!o.from.empty() && !o.classes) {
        check_shape(in, o, shape);
        shape.dtype = Dtype::f32;
        if (t.data.windows(shape.context) > 0) return shape;
        error(format("the training text has %lld tokens, too few for the context of %s, %d; give more text",
                     static_cast<long long>(t.data.tokens), o.from.c_str(), shape.context));
    }
    shape = t.encoder.weights ? t.encoder.config : Config();
    if (t.encoder.weights) {
        check_shape(in, o, shape);
        shape.dtype = Dtype::f32;
    } else {
        must_be("--preset", preset(o.preset_name, shape));
        must_be("--arch", preset_architecture(o.architecture, shape));
        shape.vocab = o.encoder_only ? 0 : t.tokenizer.vocab;  // 0: perhaps one more, for the gaps
        shape.causal = !o.encoder_only && !o.classes;
    }
    if (o.classes) {
        const string names = t.labelled.names();
        shape.classes = int(std::count(names.begin(), names.end(), '\n'));
        if (!t.encoder.weights) shape.context = std::min(shape.context, int(t.labelled.longest()));
    }
    if (in.has("--layers")) shape.layers = o.shape.layers;
    if (in.has("--heads")) shape.heads = o.shape.heads;
    if (in.has("--width")) shape.width = o.shape.width;
    if (t.pairs) shape.encoder_layers = in.has("--encoder-layers") ? o.shape.encoder_layers : shape.layers;
    if (in.has("--context")) shape.context = o.shape.context;
    else if (!t.pairs && !o.classes && t.data.tokens <= uint64_t(shape.context))
        shape.context = int(t.data.tokens) - 1;  // a very short text
    if (in.has("--kv-heads")) shape.kv_heads = o.shape.kv_heads;
    if (in.has("--hidden")) shape.hidden = o.shape.hidden;
    if (o.untie || o.tie) shape.tied = o.tie;
    if (o.no_bias) shape.bias = false;
    if (in.has("--activation")) {
        shape.gated = o.activation == "swiglu" || o.activation == "geglu";
        const string plain = !shape.gated ? o.activation : o.activation == "swiglu" ? "silu" : "gelu_tanh";
        shape.activation = named<Activation>("--activation", plain, activation_names);
    }
    if (in.has("--norm")) shape.norm = named<Norm>("--norm", o.norm, norm_names);
    if (o.shape.norm_after) shape.norm_after = true;
    if (in.has("--positions")) shape.positions = named<Positions>("--positions", o.positions, position_names);
    Config checked = shape;
    if (checked.vocab == 0) checked.vocab = t.tokenizer.vocab + 1;
    must_be("the model's shape", check(checked));
    if (o.classes) cut_labelled(t, shape.context);
    if (t.data.windows(shape.context) == 0)
        error(format("the training text has %lld tokens, too few for --context %d; give a smaller --context or more text",
                     static_cast<long long>(t.data.tokens), shape.context));
    return shape;
}

void create_model(Training& t, const Config& shape, Model& model) {
    Tokenizer copy;
    must(copy.copy(t.common.runtime, t.tokenizer));
    must(model.create(t.common.runtime, shape, std::move(copy), t.config.seed));
    if (shape.classes > 0) must(model.set_labels(t.labelled.names()));
    if (t.encoder.weights) model.copy_weights(t.encoder);
}

void set_chat(const Training& t, Model& model) { must(model.set_chat(t.options.user_turn, t.options.reply_turn, t.options.plain_words)); }

// The mean time of a step, by training a throw-away model for a moment. The first step, which touches all memory, does not count.
double seconds_per_step(Training& t, const Config& shape, double budget) {
    Model model;
    Adapter adapter;
    if (t.adapts) must(adapter.create(t.common.runtime, t.model, t.adapter.config));
    else create_model(t, shape, model);
    TrainConfig config = t.config;
    config.steps = 1000000;
    Trainer trainer;
    must_be("the options", t.create(trainer, t.adapts ? t.model : model, adapter, config));
    StepResult result;
    const double start = now();
    must(trainer.step(result));
    const double first = now();
    if (first - start > budget / 4) return first - start;
    int steps = 0;
    while (steps < 2 || now() - first < std::min(4.0, budget / 20)) must(trainer.step(result)), ++steps;
    return (now() - first) / steps;
}

double windows_a_step(const Training& t) { return double(t.config.batch) * t.config.accumulate; }
int64_t steps_of_epochs(const Training& t, int context) {
    return std::max<int64_t>(1, int64_t(std::ceil(t.options.epochs * double(t.data.windows(context)) / windows_a_step(t))));
}

void choose_steps(const Arguments& in, Training& t, const Config& shape, double budget) {
    const double tokens_a_step =
        windows_a_step(t) * (t.pairs ? double(t.data.tokens) / double(t.data.windows(shape.context)) : double(shape.context));
    if (in.has("--steps")) return;
    if (in.has("--epochs")) {
        t.config.steps = steps_of_epochs(t, shape.context);
        return;
    }
    const double start = now(), step = seconds_per_step(t, shape, budget);
    budget = std::max(budget * 0.1, budget * 0.97 - (now() - start));
    // An evaluation costs about a third of the training steps that read as many tokens: twenty of them, but no more than a quarter of the
    // time.
    const double evaluation = t.has_validation ? step / 3 * double(t.validation.tokens) / tokens_a_step : 0;
    double evaluations = std::clamp(budget / 4 / std::max(evaluation, 1e-9), 1.0, 20.0);
    const bool given = in.has("--evaluate-every");
    if (given) evaluations = budget / (step * double(t.config.evaluate_every) + evaluation);
    double evaluating = std::floor(evaluations) * evaluation;
    if (!given && evaluating > budget / 4) {
        note(
            format("an evaluation takes about %s, more than a quarter of the time: less with a smaller --validation-fraction, or file of "
                   "--validation",
                   duration(evaluation).c_str()));
        evaluating = budget / 4;
    }
    t.config.steps = std::max<int64_t>(1, int64_t((budget - evaluating) / step));
    if (!given) t.config.evaluate_every = std::max<int64_t>(1, int64_t(std::ceil(double(t.config.steps) / std::floor(evaluations))));
    fprintf(stderr, "babygpt: %.1f ms a step: to repeat this run exactly, give --steps %lld --evaluate-every %lld\n", step * 1e3,
            static_cast<long long>(t.config.steps), static_cast<long long>(t.config.evaluate_every));
}

// How far a long reading is: on a terminal a line that changes; elsewhere, with `lines`, one each ten seconds. Called by the library, so it
// must not throw.
struct ReadingView {
    double tokens = 0;
    bool lines = false;
    double start = now(), shown_at = now();
    bool line_is_open = false;
    static bool show(void* user, double done) {
        ReadingView& view = *static_cast<ReadingView*>(user);
        const double time = now();
        const bool terminal = is_terminal(stderr);
        if ((terminal || view.lines) && done > 0 && time - view.shown_at > (terminal ? 0.2 : 10)) {
            view.shown_at = time;
            view.line_is_open = terminal;
            fprintf(stderr, "%s%2.0f %%  %s tokens/s  %s left%s", terminal ? "\r" : "validating: ", 100 * done,
                    grouped(int64_t(view.tokens * done / (time - view.start))).c_str(),
                    duration((time - view.start) / done * (1 - done)).c_str(), terminal ? "\x1b[K" : "\n");
            fflush(stderr);
        }
        return true;
    }
    void end_line() const {
        if (line_is_open) fputs("\r\x1b[K", stderr);
    }
};

// What is shown while it learns. `show` is called by the library after each step: it must not throw.
struct TrainingView {
    Training& t;
    FILE* log = nullptr;
    string owed_row = {};  // of the log: its step was followed by an evaluation that is still to be made
    Curve curve = {};
    double first_loss = none, last_loss = none, bits_per_nat = none;  // bits a byte for each nat a token
    double shown_at = -1;
    ReadingView reading = {};
    double evaluated = 1;  // the share of the last evaluation
    bool terminal = is_terminal(stderr), line_is_open = false;
    std::exception_ptr failure = nullptr;

    explicit TrainingView(Training& training) : t(training) {}
    ~TrainingView() {
        if (log) fclose(log);
        end_line();
    }
    void end_line() {
        if (line_is_open) fputc('\n', stderr);
        line_is_open = false;
    }
    TrainingView(const TrainingView&) = delete;
    TrainingView& operator=(const TrainingView&) = delete;

    static bool show(void* user, const Progress& progress) noexcept {
        TrainingView& view = *static_cast<TrainingView*>(user);
        try {
            view.update(progress);
        } catch (...) {
            view.failure = std::current_exception();
            return false;
        }
        return !interrupted;
    }

    // While an evaluation goes on; `done` begins anew with each.
    static bool evaluating(void* user, double done) noexcept {
        TrainingView& view = *static_cast<TrainingView*>(user);
        if (done < view.evaluated) view.reading = ReadingView{double(view.t.validation.tokens), true};
        view.evaluated = done;
        if (!view.t.options.json) ReadingView::show(&view.reading, done);
        return !interrupted;
    }

    // A token of the text that was hidden, as the encoder is now, in brackets among its neighbours.
    string filled() {
        const Model& m = t.model;
        Data& data = t.has_validation ? t.validation : t.data;
        vector<int32_t> ids(size_t(m.config.context)), targets(ids.size());
        int length = 0;
        must(data.evaluation_window(0, m.config.context, ids.data(), targets.data(), length));
        const size_t at = size_t(length) / 2, begin = at - std::min<size_t>(at, 10), end = std::min(size_t(length), at + 10);
        vector<float> probabilities(size_t(m.config.vocab));
        Encoder encoder;
        must(encoder.create(t.common.runtime, m));
        ids[at] = mask_id(m);
        must(encoder.fill(Example{{ids.data(), size_t(length)}, {}, {}, {}}, int(at), probabilities));
        const auto best = std::max_element(probabilities.begin(), probabilities.begin() + m.tokenizer.vocab);
        string text;
        for (size_t i = begin; i < end; ++i)
            text += i == at ? "[" + to_string(m.tokenizer.bytes(int32_t(best - probabilities.begin()))) + "]"
                            : to_string(m.tokenizer.bytes(ids[i]));
        return text;
    }
    string sample() {  // a few words from the model as it is now; the training does not notice
        if (!t.model.config.causal) return filled();
        Session session;
        must(session.create(t.common.runtime, t.model));
        Array<char> text(t.common.runtime);
        SampleConfig how;
        how.tokens = std::min(80, t.model.config.context);
        Generation result;
        result.text = &text;
        if (t.pairs) {  // the likeliest translation of the first pair that is not learnt from
            const Example& pair = *(t.has_validation ? t.validation : t.data).evaluation_example(0);
            how.temperature = 0;
            must(session.read_source(pair.source));
        }
        must(session.generate("", how, result));
        return to_string(text);
    }

    void update(const Progress& progress) {
        StepResult s;
        if (progress.step) s = *progress.step;
        else s.step = t.trainer.step_count, s.loss = s.lr = s.grad_norm = none;  // was shown by the run before
        const Evaluation* e = progress.evaluation;
        if (std::isfinite(s.loss)) {
            if (std::isnan(first_loss)) first_loss = s.loss;
            curve.training.push_back({double(s.step), s.loss});
        }
        if (e && std::isfinite(e->loss)) {
            curve.validation.push_back({double(s.step), e->loss});
            if (e->loss > 0 && e->bits_per_byte > 0) bits_per_nat = e->bits_per_byte / e->loss;
        }
        if (log) {
            const string row = !progress.step && !owed_row.empty() ? owed_row
                                                                   : format("%lld,%.9g,%.9g,%.9g,%.0f,", static_cast<long long>(s.step),
                                                                            s.loss, s.lr, s.grad_norm, s.tokens_per_second);
            fprintf(log, "%s%s\n", row.c_str(), e ? format("%.9g", e->loss).c_str() : "");
            if (fflush(log) != 0) error("cannot write --log " + t.options.log + ": " + strerror(errno));
        }
        string talk;
        if (e && t.model.config.classes > 0) talk = format("%.2f %% right", 100 * e->top1);
        else if (e && std::isfinite(e->loss)) talk = sample();
        if (t.options.json) {
            Json line;
            line.add("step", s.step)
                .add("loss", s.loss)
                .add("lr", s.lr)
                .add("grad_norm", s.grad_norm)
                .add("tokens_per_second", s.tokens_per_second);
            if (s.skipped) line.add("skipped", true);
            if (e)
                line.add("validation_loss", e->loss)
                    .add("bits_per_byte", e->bits_per_byte)
                    .add("perplexity", e->perplexity)
                    .add("top1", e->top1)
                    .add("top5", e->top5)
                    .add("best", progress.best)
                    .add("sample", talk);
            line.print();
            return;
        }
        if (progress.step) show_line(progress, s, e != nullptr);
        else reading.end_line(), fprintf(stderr, "step %lld\n", static_cast<long long>(s.step));
        if (e)
            fprintf(stderr, "  validation %.4f%s  %s\n", e->loss, progress.best ? " best" : "     ",
                    visible(Text(cut(one_line(talk, " / "), 90)), false).c_str());
    }

    // On a terminal one line that changes ten times a second; else a line each fiftieth of the run.
    void show_line(const Progress& progress, const StepResult& s, bool ends) {
        const double time = now();
        const int64_t every = std::max<int64_t>(1, progress.steps / 50);
        const bool last = s.step == progress.steps || interrupted;
        if (!ends && !last && !s.skipped && (terminal ? time - shown_at < 0.1 : s.step % every != 0)) return;
        shown_at = time;
        string line = format("step %lld/%lld  loss %.4f  lr %.2e  %s tokens/s  %s left", static_cast<long long>(s.step),
                             static_cast<long long>(progress.steps), s.loss, s.lr, grouped(int64_t(s.tokens_per_second)).c_str(),
                             duration(progress.seconds_left).c_str());
        if (s.skipped) line += "  (not finite: skipped)";
        line_is_open = terminal && !ends && !last;
        if (terminal) fprintf(stderr, "\r%s\x1b[K%s", line.c_str(), line_is_open ? "" : "\n");
        else fprintf(stderr, "%s\n", line.c_str());
        fflush(stderr);
    }
};

void show_start(Training& t) {
    if (t.options.json) return;
    const Config& c = t.model.config;
    Memory memory;
    must(memory_needed(t.common.runtime, c, Purpose::training, t.config.batch, memory, t.config.dropout,
                       t.adapts ? &t.adapter.config : nullptr));
    const char* kinds[] = {"no", "byte", "character", "BPE", "WordPiece", "SentencePiece"};
    const auto windows = [&](const Data& data) { return static_cast<long long>(data.windows(c.context)); };
    if (t.pairs) {
        const uint64_t left_out = t.data.left_out + t.validation.left_out;
        note(format("%lld training and %lld validation pairs%s", windows(t.data), t.has_validation ? windows(t.validation) : 0,
                    left_out == 0 ? ""
                                  : format(" (%lld others are longer than --context %d, and are left out)",
                                           static_cast<long long>(left_out), c.context)
                                        .c_str()));
    }
    if (c.classes > 0)
        note(format("%lld training and %lld validation texts of %d classes", windows(t.data), t.has_validation ? windows(t.validation) : 0,
                    c.classes));
    note(format("%s of text: %s training and %s validation tokens%s (%s tokenizer, vocabulary %s)", bytes_text(t.corpus.bytes).c_str(),
                grouped(int64_t(t.data.tokens)).c_str(), grouped(int64_t(t.has_validation ? t.validation.tokens : 0)).c_str(),
                t.pairs ? " of the targets" : "", kinds[int(t.tokenizer.kind)], grouped(c.vocab).c_str()));
    note(format("%s%d layers, %d heads, width %d, context %d: %s parameters, %s to train; %s %s, %d threads",
                c.encoder_layers > 0 ? format("%d encoder and ", c.encoder_layers).c_str() : "", c.layers, c.heads, c.width, c.context,
                grouped(t.parameters()).c_str(), bytes_text(memory.total()).c_str(), t.common.backend.c_str(), t.common.runtime.isa_name(),
                t.common.runtime.thread_count()));
    if (t.adapts)
        note(format("these are an adapter's, of rank %d, beside %s of %s", t.adapter.config.rank, grouped(t.model.parameters).c_str(),
                    t.options.from.c_str()));
    const int64_t sequences = int64_t(t.config.batch) * t.config.accumulate;
    note(format("%lld steps of %lld %s (%.1f times through the text), lr %g, %s schedule, seed %llu",
                static_cast<long long>(t.config.steps),
                static_cast<long long>(t.pairs || c.classes > 0 ? sequences : sequences * c.context),
                t.pairs         ? "pairs"
                : c.classes > 0 ? "texts"
                                : "tokens",
                double(t.config.steps) * t.config.batch * t.config.accumulate / double(std::max<uint64_t>(1, t.data.windows(c.context))),
                t.config.lr, schedules[int(t.config.schedule)], static_cast<unsigned long long>(t.config.seed)));
}

double mean_of_end(const vector<Point>& points) {
    const size_t count = std::max<size_t>(1, points.size() / 50);
    double sum = 0;
    for (size_t i = points.size() - std::min(points.size(), count); i < points.size(); ++i) sum += points[i].y;
    return points.empty() ? none : sum / double(count);
}

void show_report(Training& t, const TrainingView& view, const RunResult& result, const NgramResult& counting) {
    const double best = result.best_step > 0 ? result.best_validation_loss : none;
    put_line(format("\nTrained for %s: step %lld of %lld%s", duration(result.seconds).c_str(), static_cast<long long>(result.step),
                    static_cast<long long>(t.config.steps),
                    interrupted            ? ", interrupted (go on with --resume)"
                    : result.stopped_early ? ", ended by --patience"
                    : result.cancelled     ? ", ended by --stop-at (go on with --resume)"
                                           : ""));
    if (!view.curve.training.empty())
        put_line(format("  training loss    %.4f at first, %.4f at last (nats a %s)", view.first_loss, mean_of_end(view.curve.training),
                        t.model.config.classes > 0 ? "text" : "token"));
    if (std::isfinite(best)) {
        string line = format("  validation loss  %.4f at step %lld, the best; perplexity %.2f", best,
                             static_cast<long long>(result.best_step), std::exp(best));
        if (std::isfinite(view.bits_per_nat)) line += format(", %.3f bits a byte", best * view.bits_per_nat);
        put_line(line);
    }
    if (counting.order > 0) {
        const double gain = counting.loss - best;
        put_line(format("  counting         %.4f, the best n-gram's loss (order %d): the model is %.4f %s", counting.loss, counting.order,
                        std::fabs(gain), gain > 0 ? "better" : "worse, it has not learnt enough yet"));
    }
    if (view.curve.training.size() > 1) put_line("\n" + draw_terminal(view.curve));
    const string use = t.adapts ? t.options.from + " --adapter " + t.options.out : t.options.out;
    put_line(format("The %s is %s; try it: babygpt %s %s", t.adapts ? "adapter" : "model", t.options.out.c_str(),
                    t.model.config.classes > 0 ? "classify"
                    : !t.model.config.causal   ? "fill"
                    : t.pairs                  ? "translate"
                    : t.model.chat.empty()     ? "generate"
                                               : "chat",
                    use.c_str()));
}

// What is written by putting a new file in the place of the old one must not be put in the place of a device.
void need_ordinary(const char* option, const string& path) {
    std::error_code ignored;
    const fs::file_status there = fs::status(path_of(path), ignored);
    if (fs::exists(there) && !fs::is_regular_file(there)) error(string(option) + " " + path + " is no ordinary file; choose another name");
}

void check_train_options(const Arguments& in, const Training& t, const string& resume_file) {
    const TrainOptions& o = t.options;
    if (o.resume && o.overwrite) usage("--resume and --overwrite exclude each other");
    if (o.lora.rank > 0 && o.from.empty()) usage("--lora needs --from M: the model that the adapter stands beside");
    for (const char* option : {"--lora-alpha", "--lora-targets"})
        if (in.has(option) && !in.has("--lora")) usage(string(option) + " belongs to --lora");
    if (o.resume && in.has("--lora")) usage("--resume goes on with the adapter that is there: leave --lora out");
    for (const char* option : {"--user-turn", "--plain-words", "--answers-only", "--token-cache", "--dialogues", "--field", "--column"})
        if (o.classes && in.has(option)) usage(string(option) + " does not belong to --classes, which reads lines of text and label");
    if (o.classes && t.pairs) usage("--classes and --encoder-layers exclude each other: a classifier does not translate");
    if (o.encoder_only && t.pairs) usage("--encoder-only and --encoder-layers exclude each other");
    if (o.classes && o.encoder_only) usage("--classes and --encoder-only exclude each other: a classifier has no gaps to fill");
    if (o.encoder_only && !o.user_turn.empty()) usage("--encoder-only and --user-turn exclude each other: an encoder does not talk");
    if (o.classes && o.lora.rank > 0) usage("--classes and --lora exclude each other");
    if (in.has("--steps") + in.has("--epochs") + in.has("--time") > 1) usage("give only one of --steps, --epochs and --time");
    if (in.has("--validation") && in.has("--validation-fraction")) usage("--validation and --validation-fraction exclude each other");
    if (in.has("--user-turn") != in.has("--reply-turn")) usage("--user-turn and --reply-turn belong together: a chat needs both");
    if (in.has("--user-turn") && (o.user_turn.empty() || o.reply_turn.empty())) usage("--user-turn and --reply-turn must not be empty");
    if (o.plain_words && o.user_turn.empty() && !o.resume) usage("--plain-words belongs to --user-turn and --reply-turn");
    if (t.pairs)
        for (const char* option : {"--user-turn", "--answers-only", "--token-cache"})
            if (in.has(option)) usage(string(option) + " is not for a model with an encoder, which learns from pairs");
    const vector<std::pair<const char*, string>> written = {
        {"--out", o.out}, {"--out's resume file", resume_file}, {"--log", o.log}, {"--plot", o.plot}, {"--token-cache", o.cache}};
    vector<string> inputs = in.operands;
    inputs.insert(inputs.end(), {o.validation, o.from, named_tokenizer(o.tokenizer) ? "" : o.tokenizer});
    for (size_t i = 0; i < written.size(); ++i) {
        if (written[i].second.empty()) continue;
        if (written[i].first != string("--plot")) need_ordinary(written[i].first, written[i].second);
        need_other_than(inputs, written[i].first, written[i].second);
        for (size_t j = 0; j < i; ++j)
            if (same_file(written[i].second, written[j].second))
                usage(format("%s and %s name the same file", written[j].first, written[i].first));
        std::error_code ignored;
        const fs::path folder = path_of(written[i].second).parent_path();
        if (!folder.empty() && !fs::is_directory(folder, ignored))
            error(format("%s %s: there is no folder %s", written[i].first, written[i].second.c_str(), to_string(folder).c_str()));
    }
}

int train(Arguments& in) {
    Training t;
    TrainOptions& o = t.options;
    in.parse(t.common, o.options(), 1, 1000000);
    t.pairs = in.has("--encoder-layers") ? o.shape.encoder_layers > 0 : o.architecture == "transformer";
    if (o.out.empty()) usage("train needs --out M.safetensors");
    Runtime& runtime = t.common.runtime;
    Array<char> resume_name(runtime);
    must(resume_path(o.out, resume_name));
    const string resume_file = to_string(resume_name);
    check_train_options(in, t, resume_file);
    if (!o.log.empty()) check_log(o.log);
    const Lock lock(o.out, resume_file);
    if (!o.resume && !o.overwrite)
        for (const string& path : {o.out, resume_file})
            if (exists(path)) error(path + " exists; go on with --resume, start anew with --overwrite, or choose another --out");
    const double start = now();

    t.adapts = o.lora.rank > 0 || (o.resume && !o.from.empty());
    if (o.resume) {
        if (!exists(resume_file)) error("--resume: there is no " + resume_file + " to go on from; leave --resume out");
        const Status there = t.adapts ? Status() : t.model.load(runtime, resume_file);
        if (!there.ok()) error(string(there.message) + (strstr(there.message, "is an adapter") ? "; say --from MODEL again" : ""));
        if (t.adapts) must(t.model.load(runtime, o.from));
        const Status beside = t.adapts ? t.adapter.load(runtime, t.model, resume_file) : Status();
        if (!beside.ok()) error(string(beside.message) + "; only the training of an adapter goes on with --from");
        must(read_train_config(runtime, resume_file, t.config));
        check_agreement(in, o, t.model, t.config);
    } else if (!o.from.empty()) {
        Model& known = o.classes ? t.encoder : t.model;
        must(known.load(runtime, o.from));
        if (o.classes) need_tokenizer(known, o.from);
        if (o.classes && known.config.encoder_layers > 0) error("--from " + o.from + " translates, and cannot become a classifier");
        o.lora.targets = o.lora_targets;
        if (!in.has("--lora-alpha")) o.lora.alpha = 2 * o.lora.rank;
        if (t.adapts) must_be("--lora", t.adapter.create(runtime, t.model, o.lora, o.learning.seed));
    }
    if (t.adapts && !o.user_turn.empty() && !o.answers_only && t.model.chat.empty())
        usage("--user-turn: an adapter holds no chat template and " + o.from +
              " has none, so chat would not know the turns; leave them out "
              "(--dialogues divides the text as they do), or train without --lora");
    if (o.resume || !o.from.empty()) t.pairs = t.model.config.encoder_layers > 0;
    open_data(in, t);
    if (o.resume && o.classes) cut_labelled(t, t.model.config.context);
    if (o.resume) {
        if (in.has("--epochs")) {
            const int64_t steps = steps_of_epochs(t, t.model.config.context);
            if (steps != t.config.steps)
                contradicts("--epochs", format("%g (%lld steps)", o.epochs, static_cast<long long>(steps)),
                            format("%lld steps", static_cast<long long>(t.config.steps)));
        }
        if (in.has("--time") && !o.json)
            note(format("--time was measured when the run began: it goes on to step %lld", static_cast<long long>(t.config.steps)));
    } else {
        t.config = o.learning;
        for (int i = 0; i < 5; ++i)
            if (o.schedule == schedules[i]) t.config.schedule = Schedule(i);
        t.config.optimizer = o.optimizer == "muon" ? Optimizer::muon : Optimizer::adamw;
        const Config shape = choose_shape(in, t);
        if (!in.has("--lr")) t.config.lr = std::clamp(1e-3 * 384 / shape.width, 3e-4, 3e-3);
        choose_steps(in, t, shape, in.has("--time") ? o.time : 120);
        if (o.from.empty() || o.classes) create_model(t, shape, t.model);
        if (o.from.empty() || !o.user_turn.empty()) set_chat(t, t.model);
        for (const Array<char>* turn : {&t.model.chat.user_turn, &t.model.chat.reply_turn})
            if (turn->count > 0 && !begins_a_line(t.corpus, to_string(*turn)))
                note("no line of the text begins with '" + to_string(*turn) + "', so the model cannot learn such a turn");
    }
    const Status created = t.create(t.trainer, t.model, t.adapter, t.config, t.has_validation ? &t.validation : nullptr);
    if (created.error == Error::invalid_argument && !o.resume) usage(created.message);
    must(created);
    if (o.resume) {
        const Status loaded = t.trainer.load(resume_file);
        if (loaded.error == Error::mismatch)
            error(string(loaded.message) +
                  "; give the same files, --field, --column, --dialogues, --answers-only, --validation and --validation-fraction");
        must(loaded);
    }
    show_start(t);
    if (o.resume && !o.json) note(format("going on after step %lld", static_cast<long long>(t.trainer.step_count)));

    TrainingView view(t);
    if (!o.log.empty()) view.log = open_log(o.log, o.resume, t.trainer.step_count, t.trainer.evaluation_due ? &view.owed_row : nullptr);
    RunConfig how;
    how.out = o.out;
    how.stop_at = o.stop_at;
    how.save_every = o.save_every;
    how.user = &view;
    how.progress = TrainingView::show;
    how.evaluating = TrainingView::evaluating;
    RunResult result;
    catch_interrupts(true);
    if (o.overwrite) {  // or a kill could leave the old run's resume file beside the new run's model
        std::error_code ignored;
        fs::remove(path_of(resume_file), ignored);
    }
    must(t.trainer.run(how, result));
    view.end_line();
    if (view.failure) std::rethrow_exception(view.failure);
    const bool ended_by_signal = interrupted != 0;
    release_interrupts();

    NgramResult counting;
    if (t.has_validation && !t.pairs && !o.classes && t.model.config.causal && !o.no_counting && !result.cancelled) {
        if (t.corpus.bytes > 10000000 && !o.json) note("counting n-grams, for comparison (--no-counting leaves it out)");
        must(ngram_baseline(runtime, t.data, t.validation, t.model.config.vocab, counting));
        view.curve.counting = counting.loss;
    }
    if (!o.plot.empty()) {
        Curve curve = view.curve;
        if (!o.log.empty()) curve = read_log(o.log), curve.counting = view.curve.counting;  // with what was learnt before a resume
        if (!curve.training.empty()) draw_svg({curve}, o.plot);
    }
    if (o.json) {
        Json line;
        line.add("done", !result.cancelled && !ended_by_signal).add("step", result.step).add("steps", t.config.steps);
        line.add("best_validation_loss", result.best_step > 0 ? result.best_validation_loss : none).add("best_step", result.best_step);
        if (result.best_step > 0)
            line.add("perplexity", std::exp(result.best_validation_loss))
                .add("bits_per_byte", result.best_validation_loss * view.bits_per_nat);
        line.add("first_loss", view.first_loss).add("last_loss", mean_of_end(view.curve.training));
        if (counting.order > 0) line.add("ngram_loss", counting.loss).add("ngram_order", counting.order);
        line.add("seconds", now() - start).add("stopped_early", result.stopped_early).add("interrupted", ended_by_signal);
        line.add("parameters", t.parameters()).add("training_tokens", t.data.tokens).add("out", o.out);
        line.print();
    } else {
        show_report(t, view, result, counting);
    }
    return ended_by_signal ? 130 : 0;
}

int make_tokenizer(Arguments& in) {
    Common common;
    TextOptions text;
    int vocab = 0;
    string out, kind = "bpe";
    bool json = false, cased = false, byte_fallback = false, overwrite = false;
    in.parse(
        common,
        vector<Option>{
            {"--kind", "bpe|wordpiece|unigram",
             "byte-level BPE as GPT-2's, WordPiece as BERT's, or a unigram model as SentencePiece's (bpe)", &kind},
            {"--vocab", "N",
             "tokens in all (bpe: with the 256 bytes and the end-of-text token; wordpiece: with the text's characters, most "
             "of them twice, and [PAD] [UNK] [CLS] [SEP] [MASK]; unigram: with the characters, <unk> <s> </s>)",
             &vocab, 1, 1e6},
            {"--cased", nullptr, "wordpiece: keep capitals and accents (else I and dotted I give i, and accents go: Turkish wants it)",
             &cased},
            {"--byte-fallback", nullptr, "unigram: 256 more pieces, the bytes that unseen characters are written with", &byte_fallback},
            {"--out", "T",
             "written as tokenizer.json (a file, or a folder for it); a unigram model as SentencePiece's file where T ends in .model",
             &out},
            {"--overwrite", nullptr, "although T exists", &overwrite},
            {"--json", nullptr, "one JSON object on standard output", &json}} +
            text.options(),
        1, 1000000);
    if (vocab == 0) usage("tokenizer needs --vocab N");
    if (cased && kind != "wordpiece") usage("--cased is for --kind wordpiece");
    if (byte_fallback && kind != "unigram") usage("--byte-fallback is for --kind unigram");
    if (ends_with(out, ".model") && kind != "unigram") usage("--out " + out + ": a .model file is for --kind unigram");
    TokenizerConfig config;
    const Status known = parse_tokenizer(kind + ":" + std::to_string(vocab) + (cased ? ":cased" : byte_fallback ? ":bytes" : ""), config);
    if (!known.ok()) usage(known.message);
    if (out.empty()) usage("tokenizer needs --out T");
    std::error_code ignored;
    if (fs::is_directory(path_of(out), ignored)) out = to_string(path_of(out) / "tokenizer.json");
    // What is read as files of another kind.
    for (const char* taken : {"vocab.json", "encoder.json", "vocab.bpe", ".txt", ".tiktoken", ".bin", ".gguf"})
        if (ends_with(out, taken)) usage("--out " + out + ": a tokenizer.json is written; choose a name that does not end in " + taken);
    need_ordinary("--out", out);
    need_other_than(in.operands, "--out", out);
    if (!overwrite && exists(out)) error(out + " exists; replace it with --overwrite, or choose another --out");
    Corpus corpus;
    open_corpus(common.runtime, in.operands, text.config(0), corpus);
    Tokenizer tokenizer;
    const double start = now();
    must(tokenizer.train(common.runtime, config, corpus));
    const double seconds = now() - start;
    must(tokenizer.save(out));
    if (tokenizer.vocab < vocab) note(format("the text gives only %d tokens", tokenizer.vocab));
    if (json) Json().add("vocab", tokenizer.vocab).add("bytes", corpus.bytes).add("seconds", seconds).add("out", out).print();
    else
        put_line(format("%s: %d tokens learnt from %s in %.2f s", out.c_str(), tokenizer.vocab, bytes_text(corpus.bytes).c_str(), seconds));
    return 0;
}

// =====================================================================================================================
// Talking: generate, chat, encode, decode
// =====================================================================================================================

struct Sampling {
    SampleConfig config;
    vector<string> stop, ban, patterns;
    vector<Text> stop_views, ban_views, pattern_views;
    Guard guard;
    vector<Option> options() {
        return {{nullptr, nullptr, "Choosing tokens"},
                {"--tokens", "N", "at most so many (200)", &config.tokens, 0, 1e9},
                {"--temperature", "X", "0: always the likeliest (generate 0.8, chat 0.7)", &config.temperature, 0, 100},
                {"--top-k", "N", "only the N likeliest; 0: all (0)", &config.top_k, 0, 1e9},
                {"--top-p", "X", "only the likeliest that hold this share together (1)", &config.top_p, 1e-6, 1},
                {"--min-p", "X", "none below this share of the likeliest (0.05)", &config.min_p, 0, 1},
                {"--repetition-penalty", "X", "above 1: against repetition (1)", &config.repetition_penalty, 0.01, 100},
                {"--stop", "TEXT", "end before this text (may be given several times)", &stop},
                {"--ban", "TEXT", "never write this text (may be given several times)", &ban},
                {"--ban-pattern", "P", "nor what is like this: ? a character, * any of a word, [a-z], \\b a word's edge (several times)",
                 &patterns},
                {"--seed", "N", "the same seed gives the same text (1)", &config.seed}};
    }
    const SampleConfig& ready(Runtime& runtime) {
        pattern_views.assign(patterns.begin(), patterns.end());
        must_be("--ban-pattern", guard.create(runtime, Span<const Text>(pattern_views.data(), pattern_views.size())));
        config.guard = patterns.empty() ? nullptr : &guard;
        stop_views.assign(stop.begin(), stop.end());
        ban_views.assign(ban.begin(), ban.end());
        config.stop = Span<const Text>(stop_views.data(), stop_views.size());
        config.banned = Span<const Text>(ban_views.data(), ban_views.size());
        return config;
    }
};

// Beam search in place of drawing tokens.
struct Searching {
    BeamConfig config;
    string early_stopping = "no";
    vector<Option> options() {
        config.beams = 0;
        return {{nullptr, nullptr, "Or the likeliest text, by beam search"},
                {"--beams", "N", "so many texts go on side by side; 1 is greedy", &config.beams, 1, 4096},
                {"--best", "N", "write the N best of them (1)", &config.best, 1, 4096},
                {"--length-penalty", "X", "score = log-probability / tokens^X: above 0 for longer texts, below for shorter (1)",
                 &config.length_penalty, -10, 10},
                {"--early-stopping", "no|yes|never",
                 "yes: end with the first N texts; never: when none better can come; no: likely none (no)", &early_stopping}};
    }
    bool wanted(const Arguments& in) const {
        for (const char* option : {"--best", "--length-penalty", "--early-stopping"})
            if (!in.has("--beams") && in.has(option)) usage(format("%s belongs to --beams", option));
        for (const char* option : {"--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"})
            if (in.has("--beams") && in.has(option)) usage(format("%s draws tokens, but --beams looks for the likeliest text", option));
        if (in.has("--beams") && config.best > config.beams)
            usage(format("--best %d: must be at most --beams, %d", config.best, config.beams));
        return in.has("--beams");
    }
    const BeamConfig& ready(const SampleConfig& sampling) {
        if (sampling.tokens < 1) usage("--tokens 0: a search needs at least 1");
        config.tokens = sampling.tokens, config.stop = sampling.stop, config.banned = sampling.banned, config.guard = sampling.guard;
        config.early_stopping = early_stopping == "yes"     ? EarlyStopping::yes
                                : early_stopping == "never" ? EarlyStopping::never
                                                            : EarlyStopping::no;
        return config;
    }
};

// ngram:N in the place of a model: counts of a text. Its members stay where they are.
struct Counted {
    Corpus corpus;
    Tokenizer tokenizer;
    Data training;
    Ngram model;

    static bool is_meant(const string& name) { return starts_with(name, "ngram:"); }
    static vector<Option> options(vector<string>& files, string& tokenizer) {
        return {{"--train", "FILE", "ngram:N: the text that is counted (several may be given)", &files},
                {"--tokenizer", "byte|char|bpe:N|FILE", "ngram:N: of what (char)", &tokenizer}};
    }
    // The last part of the text, where there is a validation_fraction, is left out.
    void count(Runtime& runtime, const string& name, const vector<string>& files, const string& tokenizer_name, const CorpusConfig& how) {
        int order = 0;
        if (!read_number(name.substr(6), order) || order < 1 || order > 8) usage("'" + name + "': must be ngram:1 to ngram:8 (2: bigrams)");
        if (files.empty()) usage(name + " needs --train FILE, the text to count in");
        open_corpus(runtime, files, how, corpus);
        get_tokenizer(runtime, tokenizer_name.empty() ? "char" : tokenizer_name, corpus, tokenizer);
        must(training.create(runtime, corpus, Part::training, tokenizer));
        must(model.create(runtime, training, tokenizer.vocab, order));
    }
};

// Prints pieces as they come; called by the library, so it must not throw.
bool print_piece(void*, Text piece) noexcept { return write_output(piece) && flush_output() && !interrupted; }

void check_unknown(uint64_t count) {
    if (count > 0) note(format("%llu characters of the text are unknown to the model", static_cast<unsigned long long>(count)));
}

void print_search(Session& session, const string& prompt, const BeamConfig& config, bool json) {
    SearchResult result;
    must(session.search(prompt, config, result));
    string list;
    for (size_t i = 0; i < result.best.count; ++i) {
        const Hypothesis& found = result.best[i];
        const string text = to_string(result.text_of(i));
        if (json) {
            Json one;
            one.add("text", text).raw("ids", json_list(result.ids_of(i).data, found.ids)).add("score", found.score);
            list += (i ? "," : "") + one.add("logprob", found.logprob).add("ended", found.ended).text + "}";
        } else if (config.best > 1) put_line(format("%.4f  ", found.score) + one_line(text, "\\n"));
        else put_line((is_terminal(stdout) ? prompt : "") + text);
    }
    if (json) Json().raw("best", "[" + list + "]").add("seconds", result.seconds).add("unknown", result.unknown).print();
    else check_unknown(result.unknown);
}

// What Session::generate does, for an n-gram model.
void continue_counted(const Counted& counted, const string& prompt, const SampleConfig& how, Generation& result) {
    const double start = now();
    const Tokenizer& tokenizer = counted.tokenizer;
    Array<int32_t> ids(*counted.model.runtime);
    size_t unknown = 0;
    const int32_t first = tokenizer.begin_of_text >= 0 ? tokenizer.begin_of_text : prompt.empty() ? tokenizer.end_of_text : -1;
    if (first >= 0 && !ids.push(first)) throw std::bad_alloc();
    must(tokenizer.encode(prompt.empty() && first < 0 ? "\n\n" : prompt, ids, false, &unknown));
    result.unknown = unknown;
    vector<double> probabilities(size_t(counted.model.vocab));
    vector<float> logits(probabilities.size());
    vector<int32_t> scratch(probabilities.size());
    Utf8Stream stream;
    Array<int32_t> word(*counted.model.runtime);  // a tokenizer may put a blank before a document, which its text has not
    must(tokenizer.encode("a", word));
    const bool puts_blank = prompt.empty() && word.count > 0 && to_string(tokenizer.bytes(word[0]))[0] == ' ';
    while (result.generated < how.tokens && !result.cancelled) {
        const size_t length = std::min<size_t>(ids.count, 8);
        must(counted.model.predict(Span<const int32_t>(ids.items + (ids.count - length), length), probabilities));
        if (tokenizer.unknown >= 0) probabilities[size_t(tokenizer.unknown)] = 0;
        for (size_t i = 0; i < logits.size(); ++i) logits[i] = float(std::log(probabilities[i]));
        int32_t id = 0;
        must(sample(logits, how, uint64_t(result.generated++), scratch, id));
        const float logprob = float(std::log(probabilities[size_t(id)]));
        if (!ids.push(id) || (result.ids && !(result.ids->push(id) && result.logprobs->push(logprob)))) throw std::bad_alloc();
        result.stopped = id == tokenizer.end_of_text;
        if (result.stopped) break;
        Text bytes = id == tokenizer.begin_of_text ? Text() : tokenizer.bytes(id);
        if (puts_blank && result.generated == 1 && bytes.size > 0 && bytes[0] == ' ') bytes = Text(bytes.data + 1, bytes.size - 1);
        vector<char> whole(bytes.size + 3);
        const Text piece(whole.data(), stream.push(bytes, whole.data()));
        if (result.text && !result.text->append(piece.data, piece.size)) throw std::bad_alloc();
        if (result.stream) result.cancelled = !result.stream(result.user, piece);
    }
    char rest[3];
    const Text piece(rest, stream.finish(rest));
    if (result.text && !result.text->append(piece.data, piece.size)) throw std::bad_alloc();
    if (result.stream && !result.cancelled) result.cancelled = !result.stream(result.user, piece);
    result.seconds = now() - start;
}

int generate(Arguments& in) {
    Common common;
    Sampling sampling;
    Searching searching;
    TextOptions how_read;
    string prompt, tokenizer, source;
    vector<string> training_files;
    Beside beside;
    bool json = false;
    in.parse(
        common,
        vector<Option>{{"--prompt", "TEXT", "what the text begins with (without: a new document)", &prompt},
                       beside.option(),
                       {"--source", "TEXT", "what the encoder of a model that translates reads (see also: babygpt translate)", &source},
                       {"--json", nullptr, "one JSON object: text and ids without the prompt, log-probabilities, tokens/s", &json}} +
            sampling.options() + searching.options() + vector<Option>{{nullptr, nullptr, "Counting instead of a model (M is ngram:N)"}} +
            Counted::options(training_files, tokenizer) + how_read.options(),
        1, 1);
    const bool counts = Counted::is_meant(in.operands[0]);
    for (const char* option : {"--train", "--tokenizer", "--field", "--column", "--dialogues"})
        if (!counts && in.has(option)) usage(string(option) + " belongs to ngram:N");
    for (const char* option : {"--stop", "--ban", "--ban-pattern", "--repetition-penalty", "--beams", "--source", "--adapter"})
        if (counts && in.has(option)) usage(string(option) + " does not go with " + in.operands[0]);
    const bool searches = searching.wanted(in);
    if (searches) searching.ready(sampling.ready(common.runtime));
    Model model;
    Session session;
    Counted counted;
    if (counts) {
        counted.count(common.runtime, in.operands[0], training_files, tokenizer, how_read.config(0));
    } else {
        must(model.load(common.runtime, in.operands[0], Purpose::running));
        need_tokenizer(model, in.operands[0]);
        must(session.create(common.runtime, model));
        must(session.use(beside.load(common.runtime, model)));
        if (in.has("--source")) must_be("--source", session.read_source(source));
        if (searches) return print_search(session, prompt, searching.config, json), 0;
    }
    Array<char> text(common.runtime);
    Array<int32_t> ids(common.runtime);
    Array<float> logprobs(common.runtime);
    Generation result;
    if (json) {
        result.text = &text, result.ids = &ids, result.logprobs = &logprobs;
    } else {
        result.stream = print_piece;
        if (is_terminal(stdout)) put_now(prompt);
    }
    if (counts) continue_counted(counted, prompt, sampling.ready(common.runtime), result);
    else must(session.generate(prompt, sampling.ready(common.runtime), result));
    if (result.cancelled) output_failed();
    const double speed = result.seconds > 0 ? result.generated / result.seconds : 0;
    if (json) {
        Json line;
        line.add("text", to_string(text))
            .raw("ids", json_list(ids.items, ids.count))
            .raw("logprobs", json_list(logprobs.items, logprobs.count));
        line.add("tokens_per_second", speed).add("stopped", result.stopped).add("unknown", result.unknown).print();
        return 0;
    }
    put_line("");
    check_unknown(result.unknown);
    if (is_terminal(stderr)) note(format("%d tokens, %.0f tokens/s", result.generated, speed));
    return 0;
}

// A line of FILE, or of standard input, in, a line out: the likeliest translation that so many beams find.
int translate(Arguments& in) {
    Common common;
    BeamConfig how;
    how.beams = 1, how.tokens = 65536;
    Beside beside;
    bool json = false;
    in.parse(common,
             {beside.option(),
              {"--beams", "N", "so many translations of a line go on side by side; 1 is greedy (1)", &how.beams, 1, 4096},
              {"--length-penalty", "X", "score = log-probability / tokens^X: above 0 for longer ones, below for shorter (1)",
               &how.length_penalty, -10, 10},
              {"--tokens", "N", "at most so many for a line (as the context holds)", &how.tokens, 1, 65536},
              {"--json", nullptr, "one JSON object a line: source, text, score, logprob, tokens, ended", &json}},
             1, 2);
    Model model;
    must(model.load(common.runtime, in.operands[0], Purpose::running));
    need_tokenizer(model, in.operands[0]);
    how.tokens = std::min(how.tokens, model.config.context);
    const string name = in.operands.size() > 1 && in.operands[1] != "-" ? in.operands[1] : "standard input";
    if (name != "standard input" && !freopen(name.c_str(), "rb", stdin)) error("cannot open " + name + ": " + strerror(errno));
    Session session;
    must(session.create(common.runtime, model));
    must(session.use(beside.load(common.runtime, model)));
    string line;
    for (size_t number = 1; read_line(line, name) == Line::text; ++number) {
        SearchResult result;
        Hypothesis best;
        string text;
        if (!line.empty()) {
            const Status status = session.read_source(line);
            if (!status.ok()) error(format("%s, line %zu: %s", name.c_str(), number, status.message));
            must(session.search("", how, result));
            best = result.best[0], text = one_line(to_string(result.text_of(0)), " ");
        }
        if (json) {
            Json object;
            object.add("source", line).add("text", text).add("score", best.score).add("logprob", best.logprob);
            object.add("tokens", best.ids).add("ended", best.ended).print();
        } else put_now(text + "\n");
    }
    return 0;
}

const char* const chat_help =
    "  /reset  forget the conversation\n"
    "  /quit   leave (or Ctrl-D); Ctrl-C stops a reply\n";

int chat(Arguments& in) {
    Common common;
    Sampling sampling;
    sampling.config.temperature = 0.7;
    string reply_turn;
    Beside beside;
    bool json = false;
    in.parse(common,
             vector<Option>{{"--reply-turn", "TEXT", "let another character reply, e.g. 'Smith: '", &reply_turn},
                            beside.option(),
                            {"--json", nullptr, "one JSON object a reply", &json}} +
                 sampling.options(),
             1, 1);
    Runtime& runtime = common.runtime;
    Model model;
    must(model.load(runtime, in.operands[0], Purpose::running));
    need_tokenizer(model, in.operands[0]);
    const bool terminal = is_terminal(stdin) && !json, talks = !model.chat.empty();
    if (!talks) {
        if (!reply_turn.empty())
            error(in.operands[0] + " has no chat template, so --reply-turn has no meaning; train with --user-turn and --reply-turn");
        note("the model has no chat template: it goes on with what you write");
    }
    if (terminal) put_line(format("Say something to the model. Commands:\n%s", chat_help)), catch_interrupts(false);
    Session session;
    must(session.create(runtime, model));
    must(session.use(beside.load(runtime, model)));
    const SampleConfig& how = sampling.ready(common.runtime);
    string line;
    for (;;) {
        if (terminal) put_now("> ");
        interrupted = 0;
        const Line got = read_line(line);
        if (got == Line::end) break;
        if (got == Line::broken_off) {
            put_now("\n");
            continue;
        }
        if (terminal && line == "/quit") return 0;
        if (line == "/reset") {
            session.reset();
            continue;
        }
        if (terminal && line == "/help") put(chat_help);
        if (terminal && (line.empty() || line[0] == '/')) continue;
        Array<char> text(runtime);
        Array<float> logprobs(runtime);
        Generation result;
        result.text = &text, result.logprobs = &logprobs;
        if (terminal) result.stream = print_piece;
        interrupted = 0;
        must(talks ? session.reply(line, how, result, reply_turn) : session.generate(line, how, result));
        if (result.cancelled && !interrupted) output_failed();
        if (interrupted) clearerr(stdout);  // a write that waited was broken off, too
        if (json) {
            double sum = 0;
            for (const float logprob : logprobs) sum += double(logprob);
            Json reply;
            reply.add("text", to_string(text))
                .add("tokens", result.generated)
                .add("mean_logprob", result.generated > 0 ? sum / result.generated : none);
            reply.add("unknown", result.unknown).print();
            continue;
        }
        put_now(terminal ? "\n" : one_line(to_string(text), " ") + "\n");  // in a pipe a reply is one line
        if (terminal) check_unknown(result.unknown);
    }
    if (terminal) put_line("");
    return 0;
}

string ids_line(const Array<int32_t>& ids) {
    string line;
    line.reserve(ids.count * 6);
    char digits[16];
    for (size_t i = 0; i < ids.count; ++i) {
        if (i) line += ' ';
        line.append(digits, std::to_chars(digits, digits + sizeof digits, ids[i]).ptr);
    }
    return line;
}

int encode(Arguments& in) {
    Common common;
    bool special = false, jsonl = false;
    in.parse(common,
             {{"--special", nullptr, "names of special tokens in the text become their ids", &special},
              {"--jsonl", nullptr, "lines {\"text\":..} or {\"hex\":..} -> {\"ids\":[..]}", &jsonl}},
             1, 1);
    Tokenizer tokenizer;
    load_tokenizer(common.runtime, in.operands[0], tokenizer);
    size_t unknown = 0;
    if (!jsonl) {
        const string text = read_all(stdin, "standard input");
        Array<int32_t> ids(common.runtime);
        must(tokenizer.encode(text, ids, special, &unknown));
        put_line(ids_line(ids));
        check_unknown(unknown);
        return 0;
    }
    string line;
    JsonLine object;
    for (size_t number = 1; read_line(line) == Line::text; ++number) {
        if (line.empty()) continue;
        object.parse(line, number);
        if (object.has_text == object.has_hex) object.bad("either \"text\" or \"hex\" in the object");
        Array<int32_t> ids(common.runtime);
        must(tokenizer.encode(object.has_text ? object.text : object.hex, ids, special));
        put("{\"ids\":" + json_list(ids.items, ids.count) + "}\n");
    }
    return 0;
}

int decode(Arguments& in) {
    Common common;
    bool jsonl = false;
    in.parse(common, {{"--jsonl", nullptr, "lines {\"ids\":[..]} -> {\"hex\":..,\"text\":..}", &jsonl}}, 1, 1);
    Tokenizer tokenizer;
    load_tokenizer(common.runtime, in.operands[0], tokenizer);
    const auto decoded = [&](const vector<int32_t>& ids, const string& where) {
        Array<char> bytes(common.runtime);
        const Status status = tokenizer.decode(Span<const int32_t>(ids.data(), ids.size()), bytes);
        if (status.error == Error::invalid_argument) error(where + ": " + status.message);
        must(status);
        return to_string(bytes);
    };
    if (!jsonl) {
        const string text = read_all(stdin, "standard input");
        vector<int32_t> ids;
        for (size_t at = 0; (at = text.find_first_not_of(" \t\r\n,", at)) != string::npos;) {
            const size_t end = std::min(text.find_first_of(" \t\r\n,", at), text.size());
            int32_t id = 0;
            if (!read_number(text.substr(at, end - at), id))
                error(format("standard input, byte %zu: '%s' is no token's number", at + 1,
                             text.substr(at, std::min<size_t>(end - at, 40)).c_str()));
            ids.push_back(id);
            at = end;
        }
        put(decoded(ids, "standard input"));
        return 0;
    }
    string line;
    JsonLine object;
    for (size_t number = 1; read_line(line) == Line::text; ++number) {
        if (line.empty()) continue;
        object.parse(line, number);
        if (!object.has_ids) object.bad("\"ids\" in the object");
        const string bytes = decoded(object.ids, format("standard input, line %zu", number));
        string hex;
        for (const char c : bytes) {
            const unsigned value = static_cast<unsigned char>(c);
            (hex += "0123456789abcdef"[value >> 4]) += "0123456789abcdef"[value & 15];
        }
        put("{\"hex\":\"" + hex + "\",\"text\":" + json_string(bytes) + "}\n");
    }
    return 0;
}

// =====================================================================================================================
// Looking: eval, score, info, attention
// =====================================================================================================================

// unit: of what each loss is.
int show_evaluation(const Evaluation& result, const NgramResult& counting, uint64_t left_out, bool json, const string& unit = "token") {
    const bool classes = unit == "text";
    if (json) {
        Json line;
        line.add("loss", result.loss)
            .add("bits_per_byte", result.bits_per_byte)
            .add("perplexity", result.perplexity)
            .add("tokens", result.tokens);
        line.add("top1", result.top1).add("top5", result.top5).add("unknown", result.unknown);
        if (left_out > 0) line.add("left_out", left_out);
        if (counting.order > 0) line.add("ngram_loss", counting.loss).add("ngram_order", counting.order);
        line.print();
        return 0;
    }
    put_line(format("loss           %.4f nats a %s", result.loss, unit.c_str()));
    if (result.bits_per_byte > 0) put_line(format("bits a byte    %.4f", result.bits_per_byte));
    put_line(format("perplexity     %.3f", result.perplexity));
    if (classes) put_line(format("accuracy       %.2f %%", 100 * result.top1));
    else put_line(format("accuracy       top-1 %.2f %%, top-5 %.2f %%", 100 * result.top1, 100 * result.top5));
    put_line(format("%s%s", classes ? "texts          " : "tokens         ", grouped(int64_t(result.tokens)).c_str()));
    if (left_out > 0) put_line(format("left out       %s pairs, which are too long", grouped(int64_t(left_out)).c_str()));
    if (result.unknown > 0)
        put_line(format("unknown        %s characters that the model has never seen", grouped(int64_t(result.unknown)).c_str()));
    if (counting.order > 0) put_line(format("counting       %.4f nats a token, the best n-gram (order %d)", counting.loss, counting.order));
    return 0;
}

int eval(Arguments& in) {
    Common common;
    TextOptions text;
    vector<string> training_files;
    string tokenizer;
    Beside beside;
    bool json = false, answers_only = false;
    in.parse(
        common,
        vector<Option>{beside.option(),
                       {"--answers-only", nullptr, "a chat: count what the model says in its turns, and only read the rest", &answers_only},
                       {"--train", "FILE", "also say what counting n-grams in this text achieves (several may be given)", &training_files},
                       {"--json", nullptr, "one JSON object", &json}} +
            text.options() +
            vector<Option>{{nullptr, nullptr,
                            "Counting instead of a model (M is ngram:N; without FILE the last tenth of --train is left "
                            "out and evaluated)"},
                           {"--tokenizer", "byte|char|bpe:N|FILE", "of what (char)", &tokenizer}},
        1, 1000000);
    Runtime& runtime = common.runtime;
    const string& name = in.operands[0];
    const vector<string> files(in.operands.begin() + 1, in.operands.end());
    const bool counts = Counted::is_meant(name);
    if (!counts && files.empty()) usage("eval needs M FILE... (see babygpt eval --help)");
    if (!counts && in.has("--tokenizer")) usage("--tokenizer belongs to ngram:N");
    for (const char* option : {"--adapter", "--answers-only"})
        if (counts && in.has(option)) usage(string(option) + " does not go with " + name);
    Model model;
    Counted counted;
    if (counts) {
        counted.count(runtime, name, training_files, tokenizer, text.config(files.empty() ? 0.1 : 0));
    } else {
        must(model.load(runtime, name));
        need_tokenizer(model, name);
        if (!model.chat.empty()) text.dialogues = true;
        else if (answers_only) usage("--answers-only needs a chat, but " + name + " has no chat template");
    }
    Corpus corpus, training_corpus;
    Data data, training;
    Labelled labelled;
    const bool classes = !counts && model.config.classes > 0, gaps = !counts && !model.config.causal && !classes;
    const string unit = classes ? "text" : gaps ? "hidden token" : "token";
    if ((classes || gaps) && !training_files.empty()) usage("--train: counting n-grams says nothing about this model");
    const Tokenizer& reader = counts ? counted.tokenizer : model.tokenizer;
    const bool pairs = !counts && model.config.encoder_layers > 0;
    if (pairs && !training_files.empty()) usage("--train is not for a model with an encoder: there is nothing to count");
    if (pairs && answers_only) usage("--answers-only is not for a model with an encoder");
    const string answers = answers_only ? to_string(model.chat.reply_turn) : "";
    CorpusConfig read = text.config(0);
    if (pairs) read.format = TextFormat::tsv;
    if (!files.empty() && !classes) open_corpus(runtime, files, read, corpus);
    if (classes) {
        labelled.read(files);
        labelled.tokenize(runtime, model.tokenizer, to_string(model.labels));
        labelled.cut_to(model.config.context);
        must(data.create(runtime, labelled.part(0, labelled.examples.size())));
    } else if (pairs) must(data.create_pairs(runtime, corpus, Part::all, reader, model.config.context));
    else
        must(data.create(runtime, files.empty() ? counted.corpus : corpus, files.empty() ? Part::validation : Part::all, reader, Text(),
                         uint64_t(256) << 20, answers));
    if (!classes && data.tokens < 2) error("the text has fewer than two tokens: there is nothing to predict");
    Evaluation result;
    NgramResult counting;
    if (counts) {
        must(evaluate(runtime, counted.model, data, result));
        return show_evaluation(result, counting, data.left_out, json);
    }
    ReadingView view{double(data.tokens)};
    must(evaluate(runtime, model, data, result, 8, ReadingView::show, &view, beside.load(runtime, model)));
    view.end_line();
    if (!training_files.empty()) {
        open_corpus(runtime, training_files, text.config(0), training_corpus);
        must(training.create(runtime, training_corpus, Part::all, model.tokenizer));
        must(ngram_baseline(runtime, training, data, model.config.vocab, counting));
    }
    return show_evaluation(result, counting, data.left_out, json, unit);
}

// What a classifier, or an encoder, needs to read lines of text.
struct LineReader {
    Common common;
    Model model;
    Encoder encoder;
    Array<int32_t> ids{common.runtime};
    size_t number = 0;

    void load(const string& path) {
        must(model.load(common.runtime, path, Purpose::running));
        need_tokenizer(model, path);
        const Status made = encoder.create(common.runtime, model);
        if (made.error == Error::unsupported) error(path + ": " + made.message);
        must(made);
    }
    Example example() const { return Example{{ids.items, ids.count}, {}, {}, {}}; }
    // Calls f for each line of standard input, with its ids ready.
    template <class F>
    void each(const F& f) {
        string line;
        for (number = 1; read_line(line) == Line::text; ++number) {
            must(encoder.encode(line, ids));
            if (ids.count == 0) error(format("standard input, line %zu: there is no text in it", number));
            f();
        }
    }
};

int classify(Arguments& in) {
    LineReader reader;
    bool json = false;
    in.parse(reader.common, {{"--json", nullptr, "one JSON object a line, with the probability of each class", &json}}, 1, 1);
    reader.load(in.operands[0]);
    const Model& model = reader.model;
    if (model.config.classes == 0) error(in.operands[0] + " has no classes; train a classifier with train --classes");
    vector<float> probabilities(size_t(model.config.classes));
    const auto name = [&](size_t i) { return model.labels.count ? to_string(model.label(int(i))) : std::to_string(i); };
    reader.each([&] {
        must(reader.encoder.classify(reader.example(), probabilities));
        const size_t best = size_t(std::max_element(probabilities.begin(), probabilities.end()) - probabilities.begin());
        if (!json) return put_now(format("%s\t%.4f\n", name(best).c_str(), double(probabilities[best])));
        Json all;
        for (size_t i = 0; i < probabilities.size(); ++i) all.add(name(i).c_str(), probabilities[i]);
        Json().add("label", name(best)).add("probability", probabilities[best]).raw("probabilities", all.text + "}").print();
    });
    return 0;
}

int fill_gaps(Arguments& in) {
    LineReader reader;
    bool json = false;
    int top = 5;
    in.parse(reader.common,
             {{"--top", "N", "how many of the likeliest tokens for each gap (5)", &top, 1, 1000},
              {"--json", nullptr, "one JSON object for each gap", &json}},
             2, 2);
    reader.load(in.operands[0]);
    const Model& model = reader.model;
    if (model.config.classes > 0) error(in.operands[0] + " is a classifier, which fills no gaps");
    must(reader.encoder.encode(in.operands[1], reader.ids, true));
    const int32_t mask = mask_id(model);
    vector<float> probabilities(size_t(model.config.vocab));
    vector<int32_t> order(size_t(model.tokenizer.vocab));
    int gaps = 0;
    for (size_t at = 0; at < reader.ids.count; ++at) {
        if (reader.ids[at] != mask) continue;
        must(reader.encoder.fill(reader.example(), int(at), probabilities));
        for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
        const size_t shown = std::min(size_t(top), order.size());
        std::partial_sort(order.begin(), order.begin() + std::ptrdiff_t(shown), order.end(), [&](int32_t a, int32_t b) {
            const float p = probabilities[size_t(a)], q = probabilities[size_t(b)];
            return p > q || (p == q && a < b);
        });
        string list;
        if (!json) put_line(format("gap %d:", ++gaps));
        for (size_t i = 0; i < shown; ++i) {
            const Text token = model.tokenizer.bytes(order[i]);
            const double p = double(probabilities[size_t(order[i])]);
            if (!json) put_line("  " + pad("'" + visible(token, false) + "'", 18) + format("%8.2f%%", 100 * p));
            Json one;
            one.add("id", order[i]).add("text", to_string(token)).add("probability", p);
            list += (i ? "," : "") + one.text + "}";
        }
        if (json) Json().add("gap", ++gaps).raw("tokens", "[" + list + "]").print();
    }
    if (gaps == 0) error("there is no [MASK] in the first " + std::to_string(model.config.context) + " tokens of the text");
    return 0;
}

int embed(Arguments& in) {
    LineReader reader;
    in.parse(reader.common, {}, 1, 1);
    reader.load(in.operands[0]);
    vector<float> vector_of(size_t(reader.model.config.width));
    reader.each([&] {
        must(reader.encoder.embed(reader.example(), vector_of));
        Json().raw("vector", json_list(vector_of.data(), vector_of.size())).print();
    });
    return 0;
}

int score(Arguments& in) {
    Common common;
    Beside beside;
    bool jsonl = false, json = false;
    in.parse(common,
             {beside.option(),
              {"--jsonl", nullptr, "lines {\"text\":..} -> {\"ids\":[..],\"logprobs\":[..],\"sum\":..}", &jsonl},
              {"--json", nullptr, "the same object for all of standard input", &json}},
             1, 1);
    Model model;
    must(model.load(common.runtime, in.operands[0], Purpose::running));
    need_tokenizer(model, in.operands[0]);
    Session session;
    must(session.create(common.runtime, model));
    must(session.use(beside.load(common.runtime, model)));
    Array<int32_t> ids(common.runtime);
    Array<float> logprobs(common.runtime);
    double sum = 0;
    const auto measure = [&](const string& text) {
        session.reset();
        must(session.score(text, ids, logprobs, sum));
    };
    const auto print = [&] {
        Json()
            .raw("ids", json_list(ids.items, ids.count))
            .raw("logprobs", json_list(logprobs.items, logprobs.count))
            .add("sum", sum)
            .print();
    };
    string line;
    JsonLine object;
    for (size_t number = 1; jsonl && read_line(line) == Line::text; ++number) {
        if (line.empty()) continue;
        object.parse(line, number);
        if (!object.has_text && !object.has_hex) object.bad("\"text\" in the object");
        measure(object.has_text ? object.text : object.hex);
        print();
    }
    if (jsonl) return 0;
    measure(read_all(stdin, "standard input"));
    if (json) {
        print();
        return 0;
    }
    put_line("token                   id    log-prob.  probability");
    for (size_t i = 0; i < ids.count; ++i) {
        const string name = pad("'" + visible(model.tokenizer.bytes(ids[i]), false) + "'", 18);
        const double logprob = double(logprobs[i]);
        put_line(name + (i == 0 && model.tokenizer.begin_of_text < 0
                             ? format("%8d            -            -", ids[i])
                             : format("%8d  %11.4f  %10.2f%%", ids[i], logprob, 100 * std::exp(logprob))));
    }
    put_line(format("sum of %zu tokens: %.4f", ids.count, sum));
    return 0;
}

string memory_json(const Memory& m) {
    Json object;
    object.add("weights", m.weights).add("gradients", m.gradients).add("moments", m.moments).add("activations", m.activations);
    object.add("kv", m.kv).add("scratch", m.scratch).add("records", m.records).add("total", m.total());
    if (m.device > 0) object.add("device", m.device);
    return object.text + "}";
}

void show_memory(const string& title, const Memory& m) {
    string parts;
    const std::pair<const char*, uint64_t> all[] = {{"weights", m.weights},         {"gradients", m.gradients}, {"moments", m.moments},
                                                    {"activations", m.activations}, {"KV cache", m.kv},         {"scratch", m.scratch},
                                                    {"records", m.records}};
    for (const auto& [name, bytes] : all)
        if (bytes > 0) parts += (parts.empty() ? "" : ", ") + string(name) + " " + bytes_text(bytes);
    put_line(pad(title, 26) + pad(grouped(int64_t(m.total())), 16, true) + " bytes (" + parts + ")");
    if (m.device > 0) put_line(pad("  and on the GPU", 26) + pad(grouped(int64_t(m.device)), 16, true) + " bytes");
}

const char* const dtype_names[] = {"f32", "bf16", "int8"};
Dtype dtype_named(const string& name) { return name == "int8" ? Dtype::int8 : name == "bf16" ? Dtype::bf16 : Dtype::f32; }

int info(Arguments& in) {
    Common common;
    string name, architecture = "gpt2";
    Config shape;
    int batch = 1;
    bool json = false;
    in.parse(common,
             {{"--preset", "NAME", "a preset instead of a model file", &name},
              {"--arch", "gpt2|llama|transformer|lecture", "the preset's architecture; transformer: with an encoder (gpt2)", &architecture},
              {"--vocab", "N", "the preset's vocabulary (96, GPT-2's own for gpt2...)", &shape.vocab, 1, 1e8},
              {"--context", "N", "the preset with another context", &shape.context, 1, 1e6},
              {"--batch", "N", "sequences at once (1)", &batch, 1, 1e6},
              {"--json", nullptr, "one JSON object", &json}},
             0, 1);
    if (in.operands.empty() == name.empty()) usage("info needs either a model file or --preset NAME");
    Model model;
    Config config;
    if (name.empty()) {
        for (const char* option : {"--vocab", "--context", "--arch"})
            if (in.has(option)) usage(format("%s belongs to --preset", option));
        must(model.load(common.runtime, in.operands[0]));
        config = model.config;
    } else {
        config.vocab = 0;
        must_be("--preset", preset(name, config));
        must_be("--arch", preset_architecture(architecture, config));
        if (architecture == "transformer") config.encoder_layers = config.layers;
        if (in.has("--vocab")) config.vocab = shape.vocab;
        else if (config.vocab == 0) config.vocab = 96;
        if (in.has("--context")) config.context = shape.context;
        must_be("--preset", check(config));
    }
    Array<SummaryRow> rows(common.runtime);
    must(summary(common.runtime, config, batch, rows));
    Memory training, running;
    must(memory_needed(common.runtime, config, Purpose::training, batch, training));
    must(memory_needed(common.runtime, config, Purpose::running, 1, running));
    int64_t parameters = 0, multiply_adds = 0;
    for (const SummaryRow& row : rows) parameters += row.parameters, multiply_adds += row.multiply_adds;
    const char* kinds[] = {"none", "byte", "char", "bpe", "wordpiece", "sentencepiece"};
    const string activation = activation_name(config);
    const char *positions = position_names[int(config.positions)], *norm = norm_names[int(config.norm)];
    if (json) {
        string table;
        for (const SummaryRow& row : rows) {
            Json object;
            object.add("layer", row.layer)
                .add("shape", row.shape)
                .add("parameters", row.parameters)
                .add("multiply_adds", row.multiply_adds)
                .add("bytes", row.bytes);
            table += (table.empty() ? "" : ",") + object.text + "}";
        }
        Json line;
        line.add("layers", config.layers)
            .add("encoder_layers", config.encoder_layers)
            .add("heads", config.heads)
            .add("width", config.width)
            .add("context", config.context)
            .add("vocab", config.vocab);
        line.add("tied", config.tied).add("bias", config.bias).add("activation", activation).add("positions", positions);
        line.add("architecture", architecture_names[int(config.architecture)]).add("norm", norm).add("norm_after", config.norm_after);
        line.add("causal", config.causal).add("classes", config.classes).add("features", config.features);
        line.add("kv_heads", config.kv_heads ? config.kv_heads : config.heads).add("hidden", config.hidden);
        line.add("dtype", dtype_names[int(config.dtype)]).add("batch", batch);
        line.add("parameters", parameters).add("multiply_adds", multiply_adds).add("flops_per_token", flops_per_token(config));
        line.raw("memory_to_train", memory_json(training)).raw("memory_to_run", memory_json(running)).raw("table", "[" + table + "]");
        if (name.empty())
            line.add("tokenizer", kinds[int(model.tokenizer.kind)])
                .add("user_turn", to_string(model.chat.user_turn))
                .add("reply_turn", to_string(model.chat.reply_turn));
        line.print();
        return 0;
    }
    const auto row_text = [](const string& layer, const string& out, const string& count, const string& adds, const string& bytes) {
        return pad(layer, 28) + "  " + pad(out, 18) + pad(count, 14, true) + pad(adds, 18, true) + pad(bytes, 15, true);
    };
    const string rule(93, '-');
    put_line(row_text("layer", "output", "parameters", "multiply-adds", "bytes") + "\n" + rule);
    for (const SummaryRow& row : rows)
        put_line(row_text(row.layer, row.shape, grouped(row.parameters), grouped(row.multiply_adds), grouped(row.bytes)));
    put_line(rule);
    put_line(row_text("total", "", grouped(parameters), grouped(multiply_adds), ""));
    put_line("");
    put_line(
        format("%s, %s%d layers, %d heads (%d of keys and values), width %d, context %d, vocabulary %d, %s head, %s, %s, %s norm %s, %s "
               "positions, %s",
               architecture_names[int(config.architecture)],
               config.encoder_layers > 0 ? format("%d encoder and ", config.encoder_layers).c_str() : "", config.layers, config.heads,
               config.kv_heads ? config.kv_heads : config.heads, config.width, config.context, config.vocab,
               config.tied ? "tied" : "untied", config.bias ? "biases" : "no biases", activation.c_str(), norm,
               config.norm_after ? "after" : "before", positions, dtype_names[int(config.dtype)]));
    if (config.classes > 0) put_line(format("a classifier of %d classes: ", config.classes) + one_line(to_string(model.labels), " "));
    else if (!config.causal) put_line("an encoder: each token sees all others");
    if (name.empty()) {
        put_line(format("tokenizer %s%s", kinds[int(model.tokenizer.kind)], model.chat.empty() ? "; no chat template" : ""));
        if (!model.chat.empty())
            put_line("chat: '" + visible(model.chat.user_turn, false) + "' ... '" + visible(model.chat.reply_turn, false) + "' ...");
    }
    put_line(format("%.2f MFLOP a token, forward; training takes three times that", flops_per_token(config) / 1e6));
    show_memory(format("to train, batch %d:", batch), training);
    show_memory("to run, one conversation:", running);
    return 0;
}

struct HeatMap {
    vector<string> tokens, seen;  // of the rows, and of the columns
    bool causal = true;           // those after the row's token are not seen
    vector<float> cells;          // [row][column], 0..1: how much the row's token looks at the column's
    float at(size_t row, size_t column) const { return cells[row * seen.size() + column]; }
    bool sees(size_t row, size_t column) const { return !causal || column <= row; }
};

void draw_heat_terminal(const HeatMap& map) {
    size_t width = 5;
    for (const string& token : map.tokens) width = std::max(width, std::min<size_t>(code_points(token), 16));
    const char* shades[] = {"  ", "\xE2\x96\x91\xE2\x96\x91", "\xE2\x96\x92\xE2\x96\x92", "\xE2\x96\x93\xE2\x96\x93",
                            "\xE2\x96\x88\xE2\x96\x88"};
    string header = string(width + 6, ' ');
    for (size_t i = 0; i < map.seen.size(); ++i) header += format("%2zu ", (i + 1) % 100);
    put_line(header + "  looks most at");
    for (size_t row = 0; row < map.tokens.size(); ++row) {
        string line = format("%3zu  ", row + 1) + pad(cut(map.tokens[row], 13), width) + " ";
        size_t most = 0;
        for (size_t column = 0; column < map.seen.size(); ++column) {
            const float share = map.sees(row, column) ? map.at(row, column) : 0;
            const size_t shade = share < 0.05f ? 0 : std::min<size_t>(4, 1 + size_t(share * 5));
            line += (map.sees(row, column) && shade == 0 ? "\xC2\xB7 " : string(shades[shade])) + " ";
            if (share > map.at(row, most)) most = column;
        }
        put_line(line + format("  %zu %s %.0f %%", most + 1, map.seen[most].c_str(), 100 * double(map.at(row, most))));
    }
}

void draw_heat_svg(const HeatMap& map, const string& title, const string& path) {
    const size_t rows = map.tokens.size(), columns = map.seen.size();
    const double cell = std::clamp(640.0 / double(std::max(rows, columns)), 10.0, 44.0);
    size_t longest = 1;
    for (const auto* tokens : {&map.tokens, &map.seen})
        for (const string& token : *tokens) longest = std::max(longest, code_points(token));
    const double margin = 30 + 8.5 * double(std::min<size_t>(longest, 16)), top = margin + 34;
    Svg svg;
    svg.text(16, 26, title, "font-size=\"16\" font-weight=\"600\" fill=\"#111\"");
    for (size_t j = 0; j < columns; ++j)
        svg.text(
            0, 0, cut(map.seen[j], 13),
            format("fill=\"#111\" transform=\"translate(%.1f %.1f) rotate(-60)\"", margin + (double(j) + 0.5) * cell + 4, top - 8).c_str());
    for (size_t i = 0; i < rows; ++i) {
        const double centre = (double(i) + 0.5) * cell;
        svg.text(margin - 8, top + centre + 4.5, cut(map.tokens[i], 13), "text-anchor=\"end\" fill=\"#111\"");
        for (size_t j = 0; j < columns; ++j) {
            const double share = map.sees(i, j) ? double(map.at(i, j)) : 0;
            const string style = !map.sees(i, j)
                                     ? string("fill=\"#f3f4f6\"")
                                     : format("fill=\"#1d4ed8\" fill-opacity=\"%.3f\" stroke=\"#e5e7eb\" stroke-width=\"0.5\"", share);
            svg.rectangle(margin + double(j) * cell, top + double(i) * cell, cell, cell, style.c_str());
            if (cell >= 30 && share >= 0.005)
                svg.text(margin + (double(j) + 0.5) * cell, top + centre + 4, format("%.0f", 100 * share),
                         format("text-anchor=\"middle\" font-size=\"11\" fill=\"%s\"", share > 0.5 ? "#fff" : "#374151").c_str());
        }
    }
    svg.text(margin, top + double(rows) * cell + 24, "Each row: where this token looks; the darker, the more", "fill=\"#4b5563\"");
    svg.save(path, std::max(margin + double(columns) * cell + margin, 360.0), top + double(rows) * cell + 44);
}

int attention(Arguments& in) {
    Common common;
    int layer = -1, head = -1;
    string svg;
    bool json = false;
    in.parse(common,
             {{"--layer", "N", "0 is the first (the last)", &layer, 0, 1e6},
              {"--head", "N", "0 is the first (the mean of all)", &head, 0, 1e6},
              {"--svg", "FILE", "writes a picture as well", &svg},
              {"--json", nullptr, "one JSON object", &json}},
             2, 2);
    need_other_than({in.operands[0]}, "--svg", svg);
    Model model;
    must(model.load(common.runtime, in.operands[0]));
    need_tokenizer(model, in.operands[0]);
    const Config& config = model.config;
    if (layer < 0) layer = config.layers - 1;
    if (layer >= config.layers) usage(format("--layer %d: the model has layers 0 to %d", layer, config.layers - 1));
    if (head >= config.heads) usage(format("--head %d: the model has heads 0 to %d", head, config.heads - 1));
    Array<int32_t> ids(common.runtime);
    const bool begins = config.encoder_layers == 0 && model.tokenizer.begin_of_text >= 0;
    if (begins && !ids.push(model.tokenizer.begin_of_text)) throw std::bad_alloc();
    must(model.tokenizer.encode(in.operands[1], ids));
    if (ids.count == size_t(begins)) usage("TEXT is empty");
    if (ids.count > size_t(config.context))
        error(format("TEXT has %zu tokens, but the model's context holds %d", ids.count, config.context));
    Session session;
    must(session.create(common.runtime, model));
    Array<float> all(common.runtime);
    HeatMap map;
    for (const int32_t id : ids) map.seen.push_back(visible(model.tokenizer.bytes(id), true));
    if (config.encoder_layers > 0) {  // the first row looks where the translation's first token comes from
        Array<int32_t> said(common.runtime);
        Generation reply;
        reply.ids = &said;
        SampleConfig greedy;
        greedy.temperature = 0, greedy.tokens = config.context - 1;
        must(session.read_source(in.operands[1]));
        must(session.generate("", greedy, reply));
        if (model.tokenizer.end_of_text >= 0) map.seen.push_back("(end)");
        for (const int32_t id : said) map.tokens.push_back(visible(model.tokenizer.bytes(id), true));
        map.causal = false;
    } else {
        must(session.feed(Span<const int32_t>(ids.items, ids.count)));
        map.tokens = map.seen;
    }
    must(session.attention(layer, all, !map.causal));
    const size_t heads = size_t(config.heads), step = all.count / heads, columns = map.seen.size();
    map.tokens.resize(std::min(map.tokens.size(), step / columns));  // what came last may have been read, or not
    const size_t cells = map.tokens.size() * columns;
    map.cells.assign(cells, 0);
    for (size_t h = 0; h < heads; ++h) {
        if (head >= 0 && h != size_t(head)) continue;
        for (size_t i = 0; i < cells; ++i) map.cells[i] += all[h * step + i] / (head >= 0 ? 1.0f : float(heads));
    }
    const string title = format(map.causal ? "Attention of layer %d, " : "Attention of layer %d to the source, ", layer) +
                         (head >= 0 ? format("head %d", head) : format("mean of %zu heads", heads));
    if (!svg.empty()) draw_heat_svg(map, title, svg);
    if (json) {
        string rows;
        for (size_t i = 0; i < map.tokens.size(); ++i) rows += (i ? "," : "") + json_list(map.cells.data() + i * columns, columns);
        Json line;
        line.raw("tokens", json_list(map.tokens.data(), map.tokens.size()));
        if (!map.causal) line.raw("source", json_list(map.seen.data(), columns));
        line.add("layer", layer);
        if (head >= 0) line.add("head", head);
        line.raw("attention", "[" + rows + "]").print();
        return 0;
    }
    put_line(title);
    draw_heat_terminal(map);
    return 0;
}

// A word's vector: the mean of its tokens', of length 1. In a text a blank stands before a word; where that takes no more tokens, it is that one.
vector<double> word_vector(const Model& model, const Weight& table, const string& word, std::set<int32_t>& used) {
    Array<int32_t> alone(*model.runtime), inside(*model.runtime);
    size_t unknown = 0;
    must(model.tokenizer.encode(word, alone, false, &unknown));
    must(model.tokenizer.encode(" " + word, inside));
    if (unknown > 0 || alone.count == 0) error("'" + word + "' has characters that the model has never seen, or none");
    const Array<int32_t>& ids = inside.count <= alone.count ? inside : alone;
    vector<double> sum(size_t(table.cols), 0);
    for (const int32_t id : ids) {
        used.insert(id);
        const float* row = model.weights + table.offset + id * table.cols;
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += double(row[i]);
    }
    double squares = 0;
    for (const double x : sum) squares += x * x;
    for (double& x : sum) x /= std::sqrt(std::max(squares, 1e-300));
    return sum;
}

int neighbours(Arguments& in) {
    Common common;
    int count = 10;
    bool json = false;
    in.parse(common, {{"--count", "N", "how many (10)", &count, 1, 1e6}, {"--json", nullptr, "one JSON object", &json}}, 2, 1000);
    Model model;
    must(model.load(common.runtime, in.operands[0]));
    need_tokenizer(model, in.operands[0]);
    const Weight* table = model.find("wte.weight");
    if (!table) table = model.find("model.embed_tokens.weight");
    if (!table) error(in.operands[0] + " has no table of its tokens' vectors");
    std::set<int32_t> used;
    vector<double> aim(size_t(table->cols), 0);
    double sign = 1;
    for (size_t i = 1; i < in.operands.size(); ++i) {
        const string& word = in.operands[i];
        const bool is_sign = i % 2 == 0;
        if (is_sign ? word != "+" && word != "-" : i + 2 == in.operands.size())
            usage("nearest: give words with + or - between them, such as: king - man + woman");
        if (is_sign) {
            sign = word == "+" ? 1 : -1;
            continue;
        }
        const vector<double> vector_of = word_vector(model, *table, word, used);
        for (size_t j = 0; j < aim.size(); ++j) aim[j] += sign * vector_of[j];
    }
    double squares = 0;
    for (const double x : aim) squares += x * x;
    if (!(squares > 1e-20)) error("the words' vectors cancel out: there is no direction to look in");
    vector<std::pair<double, int32_t>> found;  // minus the cosine, so that the nearest stands first
    for (int32_t id = 0; id < std::min(model.config.vocab, model.tokenizer.vocab); ++id) {
        const Tokenizer& known = model.tokenizer;
        if (used.count(id) || id == known.end_of_text || id == known.begin_of_text || id == known.unknown || known.bytes(id).size == 0)
            continue;
        const float* row = model.weights + table->offset + id * table->cols;
        double dot = 0, own = 0;
        for (size_t j = 0; j < aim.size(); ++j) dot += aim[j] * double(row[j]), own += double(row[j]) * double(row[j]);
        if (own > 0) found.push_back({-dot / std::sqrt(squares * own), id});
    }
    const size_t shown = std::min(found.size(), size_t(count));
    std::partial_sort(found.begin(), found.begin() + std::ptrdiff_t(shown), found.end());
    string list;
    for (size_t i = 0; i < shown; ++i) {
        const Text token = model.tokenizer.bytes(found[i].second);
        Json object;
        object.add("token", to_string(token)).add("id", found[i].second).add("cosine", -found[i].first);
        if (json) list += (i ? "," : "") + object.text + "}";
        else put_line(format("%8.4f  ", -found[i].first) + visible(token, true));
    }
    if (json) {
        const vector<int32_t> ids(used.begin(), used.end());
        Json().raw("ids", json_list(ids.data(), ids.size())).raw("neighbours", "[" + list + "]").print();
    }
    return 0;
}

// =====================================================================================================================
// Measuring texts (the arithmetic is in measures.h)
// =====================================================================================================================

// A line of the one belongs to a line of the other.
void need_as_many(const string& a_name, const vector<string>& a, const string& b_name, const vector<string>& b) {
    if (a.size() != b.size()) error(format("%s has %zu lines, but %s %zu", a_name.c_str(), a.size(), b_name.c_str(), b.size()));
    if (a.empty()) error(a_name + " is empty: there is nothing to measure");
}

// Calls f(bytes, end_of_document) with all text of the files.
template <class F>
void read_text(Runtime& runtime, const vector<string>& files, const CorpusConfig& config, F f) {
    struct Reader {
        F& f;
        std::exception_ptr failure;
        static bool read(void* user, Text bytes, bool end_of_document) noexcept {  // called by the library
            Reader& reader = *static_cast<Reader*>(user);
            try {
                reader.f(std::string_view(bytes.data, bytes.size), end_of_document);
            } catch (...) {
                reader.failure = std::current_exception();
            }
            return !reader.failure;
        }
    } reader{f, nullptr};
    Corpus corpus;
    open_corpus(runtime, files, config, corpus);
    const Status status = corpus.read(Part::all, Reader::read, &reader);
    if (reader.failure) std::rethrow_exception(reader.failure);
    must(status);
}

void measure_bleu(const vector<string>& files, bool json) {
    const vector<string> hypotheses = read_lines(files[0]);
    vector<vector<string>> references;
    for (size_t i = 1; i < files.size(); ++i) {
        references.push_back(read_lines(files[i]));
        need_as_many(files[i], references.back(), files[0], hypotheses);
    }
    const measures::Bleu bleu = measures::bleu(hypotheses, references);
    if (json) {
        Json line;
        line.add("bleu", bleu.score).raw("precisions", json_list(bleu.precisions, 4)).add("brevity_penalty", bleu.brevity_penalty);
        line.add("hypothesis_words", bleu.hypothesis_words).add("reference_words", bleu.reference_words).add("lines", hypotheses.size());
        line.print();
        return;
    }
    put_line(format("BLEU           %.2f", bleu.score));
    put_line(format("precisions     %.1f / %.1f / %.1f / %.1f %% of the 1- to 4-grams", bleu.precisions[0], bleu.precisions[1],
                    bleu.precisions[2], bleu.precisions[3]));
    put_line(format("brevity        penalty %.3f (%s words, the references %s)", bleu.brevity_penalty,
                    grouped(int64_t(bleu.hypothesis_words)).c_str(), grouped(int64_t(bleu.reference_words)).c_str()));
}

void measure_variety(const vector<string>& files, bool json) {
    vector<string> lines;
    for (const string& file : files)
        for (string& line : read_lines(file)) lines.push_back(std::move(line));
    const measures::Variety variety = measures::variety(lines);
    if (variety.words == 0) error(files[0] + " has no words: there is nothing to measure");
    if (json) {
        Json line;
        line.add("distinct_1", variety.distinct1).add("distinct_2", variety.distinct2).add("repetition", variety.repetition);
        line.add("words", variety.words).print();
        return;
    }
    put_line(format("distinct-1     %.4f of the words are different ones", variety.distinct1));
    put_line(format("distinct-2     %.4f of the pairs", variety.distinct2));
    put_line(format("repetition     %.4f of the 4-grams had been said before", variety.repetition));
    put_line(format("words          %s", grouped(int64_t(variety.words)).c_str()));
}

void measure_accuracy(const vector<string>& files, string positive, bool json) {
    const vector<string> predictions = read_lines(files[0]), real = read_lines(files[1]);
    need_as_many(files[0], predictions, files[1], real);
    const measures::Classification result = measures::classification(predictions, real);
    const auto& labels = result.labels;
    if (!positive.empty() && labels.count(positive) == 0) usage("--positive '" + positive + "': no line of either file is this label");
    const bool zeros_and_ones =
        std::all_of(labels.begin(), labels.end(), [](const auto& label) { return label.first == "0" || label.first == "1"; });
    if (positive.empty() && zeros_and_ones) positive = "1";
    const auto chosen = labels.find(positive);
    const double f1 = positive.empty() ? none : chosen == labels.end() ? 0 : chosen->second.f1();
    if (json) {
        string table;
        for (const auto& [name, score] : labels) {
            Json label;
            label.add("label", name).add("precision", score.precision()).add("recall", score.recall()).add("f1", score.f1());
            table += (table.empty() ? "" : ",") + label.add("lines", score.real).text + "}";
        }
        Json line;
        line.add("accuracy", result.accuracy).add("f1_macro", result.f1_macro);
        if (!positive.empty()) line.add("f1", f1).add("positive", positive);
        line.add("lines", real.size()).raw("labels", "[" + table + "]").print();
        return;
    }
    put_line(format("accuracy       %.2f %% of %s lines", 100 * result.accuracy, grouped(int64_t(real.size())).c_str()));
    if (!positive.empty()) put_line(format("F1             %.4f of %s", f1, visible(positive, false).c_str()));
    put_line(format("F1, macro      %.4f, the mean of %zu labels", result.f1_macro, labels.size()));
    put_line("\n" + pad("label", 20) + " precision    recall        F1     lines");
    for (const auto& [name, score] : labels)
        put_line(pad(cut(visible(name, false), 17), 20) +
                 format("%10.4f%10.4f%10.4f%10s", score.precision(), score.recall(), score.f1(), grouped(int64_t(score.real)).c_str()));
}

void measure_copied(Runtime& runtime, const vector<string>& files, const TextOptions& text, int span, bool json) {
    measures::CopyMeter meter{size_t(span)};
    read_text(runtime, {files[0]}, text.config(0), [&](std::string_view bytes, bool end) {
        if (!meter.output(bytes, end)) error(files[0] + " is too long to look for its parts elsewhere: give a gigabyte at most");
    });
    meter.finish_output();
    read_text(runtime, vector<string>(files.begin() + 1, files.end()), text.config(0),
              [&](std::string_view bytes, bool end) { meter.training(bytes, end); });
    const measures::Copied copied = meter.result();
    if (json) {
        Json line;
        line.add("longest", copied.longest).add("text", copied.text).add("document", copied.document).add("span", span);
        line.add("spans", copied.spans).add("copied_spans", copied.found).add("copied_share", copied.spans > 0 ? copied.share() : none);
        line.add("characters", copied.characters).print();
        return;
    }
    put_line(format("longest        %s of %s characters stand in the training text as they are, in document %s:",
                    grouped(int64_t(copied.longest)).c_str(), grouped(int64_t(copied.characters)).c_str(),
                    grouped(int64_t(copied.document)).c_str()));
    put_line("               " + visible(cut(copied.text, 400), false));
    if (copied.spans > 0)
        put_line(format("copied         %.2f %% of the spans of %d characters (%s of %s)", 100 * copied.share(), span,
                        grouped(int64_t(copied.found)).c_str(), grouped(int64_t(copied.spans)).c_str()));
    else put_line(format("copied         there is no span of %d characters", span));
}

int measure(Arguments& in) {
    Common common;
    TextOptions text;
    string positive;
    int span = 50;
    bool json = false;
    in.parse(common,
             vector<Option>{{"--json", nullptr, "one JSON object", &json},
                            {"--positive", "LABEL", "accuracy: the label whose F1 is said (1, where the labels are 0 and 1)", &positive},
                            {"--span", "N", "copied: characters of a span (50)", &span, 1, 1e6},
                            {nullptr, nullptr, "How copied reads its texts"}} +
                 text.options(),
             2, 1000000);
    const string what = in.operands[0];
    const vector<string> files(in.operands.begin() + 1, in.operands.end());
    const std::pair<const char*, const char*> kinds[] = {{"bleu", "HYPOTHESES REFERENCES..."},
                                                         {"distinct", "FILE..."},
                                                         {"accuracy", "PREDICTIONS LABELS"},
                                                         {"copied", "OUTPUT TRAINING_FILE..."}};
    const auto kind = std::find_if(std::begin(kinds), std::end(kinds), [&](const auto& k) { return what == k.first; });
    if (kind == std::end(kinds)) usage("measure '" + what + "': must be bleu, distinct, accuracy or copied");
    if (what != "distinct" && files.size() < 2) usage("measure " + what + " needs " + kind->second);
    if (what == "accuracy" && files.size() > 2) usage("measure accuracy: '" + files[2] + "' is one argument too many");
    for (const auto& [option, owner] : {std::pair{"--positive", "accuracy"},
                                        {"--span", "copied"},
                                        {"--field", "copied"},
                                        {"--column", "copied"},
                                        {"--dialogues", "copied"}})
        if (in.has(option) && what != owner) usage(format("%s belongs to measure %s", option, owner));
    if (what == "bleu") measure_bleu(files, json);
    else if (what == "distinct") measure_variety(files, json);
    else if (what == "accuracy") measure_accuracy(files, positive, json);
    else measure_copied(common.runtime, files, text, span, json);
    return 0;
}

// =====================================================================================================================
// Measuring and checking: bench, compare, selftest
// =====================================================================================================================

// A model of random weights. Its vocabulary is as many characters as asked for, so that any size is possible.
void random_model(Runtime& runtime, const Config& config, Model& model) {
    string text = "\n";
    unsigned code = 0x21;
    for (int c = 1; c + 1 < config.vocab; ++c, ++code) {
        if (code == 0xD800) code = 0xE000;
        append_utf8(text, code);
    }
    TokenizerConfig characters;
    characters.kind = TokenizerKind::characters;
    Tokenizer tokenizer;
    must(tokenizer.train(runtime, characters, text));
    must(model.create(runtime, config, std::move(tokenizer)));
}

// Calls work() until the time is over, at least three times after one that does not count; returns the middle one of what it says it took.
template <class Work>
double middle_of(double seconds, const Work& work) {
    vector<double> times;
    (void)work();
    for (const double start = now(); times.size() < 3 || now() - start < seconds;) times.push_back(work());
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}
template <class Work>
double middle_time(double seconds, const Work& work) {
    return middle_of(seconds, [&] {
        const double before = now();
        work();
        return now() - before;
    });
}

double cpu_seconds() {  // of all threads of this process
#if defined(_WIN32)
    FILETIME created, ended, system, user;
    GetProcessTimes(GetCurrentProcess(), &created, &ended, &system, &user);
    const auto value = [](FILETIME time) { return double(uint64_t(time.dwHighDateTime) << 32 | time.dwLowDateTime); };
    return (value(system) + value(user)) * 1e-7;
#else
    return double(std::clock()) / double(CLOCKS_PER_SEC);
#endif
}

// What there is at most: GFLOP/s of the processors' loop, or of a GPU's large product, and there the bytes/s of a copy.
struct Ceilings {
    double gflops = 0, bytes = 0;
    explicit Ceilings(Runtime& runtime) {
        if (runtime.backend != Backend::cuda) gflops = fma_ceiling(runtime, runtime.thread_count());
        else must(gpu_ceilings(runtime, gflops, bytes)), gflops /= 1e9;
    }
    string text() const {
        if (bytes > 0) return format("a large product %.1f TFLOP/s, a copy %.0f GB/s", gflops / 1e3, bytes / 1e9);
        return format("FMA ceiling %.0f GFLOP/s", gflops);
    }
    // The least time that a GPU needs for an op: that of its FLOPs, or of its bytes.
    double bound(const ProfileRow& row) const { return std::max(row.flops / gflops / 1e9, row.bytes / bytes); }
};

// Where the time of a training step goes: one line for each kind of op, forward and backward.
void show_profile(Runtime& runtime, const Config& config, int batch, double seconds, bool json) {
    const Ceilings ceilings(runtime);
    const double ceiling = ceilings.gflops;
    const bool is_gpu = ceilings.bytes > 0;
    Array<ProfileRow> rows(runtime);
    must(profile(runtime, config, batch, seconds, rows));
    if (json) {
        for (const ProfileRow& row : rows) {
            Json line;
            line.add("op", row.op).add("kind", row.kind).add("backward", row.backward).add("ms", row.seconds * 1e3);
            line.add("gflops", row.flops / row.seconds / 1e9).add("gb_per_second", row.bytes / row.seconds / 1e9);
            line.add("flops", row.flops).add("bytes", row.bytes).add("percent_of_ceiling", row.flops / row.seconds / 1e7 / ceiling);
            if (is_gpu) line.add("percent_of_bound", 100 * ceilings.bound(row) / row.seconds);
            line.print();
        }
        return;
    }
    double whole = 0, bounds = 0;
    vector<std::pair<string, ProfileRow>> kinds;  // in the order of their first op
    for (const ProfileRow& row : rows) {
        string name = row.kind;
        if (name == "linear") name = strrchr(row.op, '.') ? strrchr(row.op, '.') + 1 : row.op;
        if (row.backward) name += " backward";
        auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const auto& k) { return k.first == name; });
        if (kind == kinds.end()) kind = kinds.insert(kinds.end(), {name, ProfileRow()});
        kind->second.seconds += row.seconds, kind->second.flops += row.flops, kind->second.bytes += row.bytes;
        whole += row.seconds;
    }
    if (is_gpu) {
        put_line(ceilings.text());
        put_line(format("%-20s %9s %7s %9s %9s %9s %11s", "op (all layers)", "ms", "share", "GFLOP", "MB", "bound ms", "of bound"));
        for (const auto& [name, row] : kinds) {
            const double bound = ceilings.bound(row);
            bounds += bound;
            put_line(format("%-20s %9.3f %5.1f %% %9.1f %9.1f %9.3f %9.1f %%", name.c_str(), row.seconds * 1e3, 100 * row.seconds / whole,
                            row.flops / 1e9, row.bytes / 1e6, bound * 1e3, row.seconds > 0 ? 100 * bound / row.seconds : 0.0));
        }
        put_line(format("%-20s %9.3f %7s %9s %9s %9.3f %9.1f %%", "a step", whole * 1e3, "", "", "", bounds * 1e3, 100 * bounds / whole));
        return;
    }
    put_line(format("%-20s %9s %7s %9s %11s %7s", "op (all layers)", "ms", "share", "GFLOP/s", "of ceiling", "GB/s"));
    for (const auto& [name, row] : kinds) {
        string flops = format("%9s %11s", "", "");
        if (row.flops > 0) flops = format("%9.1f %9.1f %%", row.flops / row.seconds / 1e9, row.flops / row.seconds / 1e7 / ceiling);
        put_line(format("%-20s %9.2f %5.1f %% %s %7.1f", name.c_str(), row.seconds * 1e3, 100 * row.seconds / whole, flops.c_str(),
                        row.bytes / row.seconds / 1e9));
    }
    put_line(format("%-20s %9.2f", "a step", whole * 1e3));
}

int bench(Arguments& in) {
    Common common;
    bool profiled = false;
    string name = "baby", file, architecture = "gpt2", dtype = "f32";
    int vocab = 96, context_size = 0, width = 0, batch = 8, several = 1;
    double seconds = 5;
    bool json = false;
    in.parse(common,
             {{"--preset", "NAME", "(baby)", &name},
              {"--arch", "gpt2|llama", "(gpt2)", &architecture},
              {"--vocab", "N", "(96)", &vocab, 2, 1000000},
              {"--context", "N", "the preset with another context", &context_size, 1, 1e6},
              {"--width", "N", "the preset with another width, in heads of the same size", &width, 1, 1e6},
              {"--model", "M", "this model, instead of a preset with random weights", &file},
              {"--batch", "N", "sequences a training step (8)", &batch, 1, 1e6},
              {"--sessions", "N", "that generate at once in decode, token by token (1)", &several, 1, 1000},
              {"--seconds", "X", "how long each is measured (5)", &seconds, 0.01, 1e6},
              {"--dtype", "f32|bf16|int8", "of the matrices in prefill and decode; training has --precision (the model's own)", &dtype},
              {"--profile", nullptr, "where the time of a training step goes, op by op", &profiled},
              {"--json", nullptr, "one JSON object each", &json}},
             0, 1);
    const string what = in.operands.empty() ? "" : in.operands[0];
    if (!what.empty() && what != "train" && what != "prefill" && what != "decode" && what != "idle")
        usage("bench '" + what + "': must be train, prefill, decode or idle");
    Runtime& runtime = common.runtime;
    if (runtime.backend == Backend::cpu && runtime.precision == Precision::bf16 && !profiled && what != "train")
        usage("bench: on a processor --precision bf16 is of training: say bench train");
    Model model;
    Config config;
    if (!file.empty()) {
        for (const char* option : {"--preset", "--arch", "--vocab", "--context", "--width"})
            if (in.has(option)) usage(format("%s belongs to a preset, not to --model", option));
        must(model.load(runtime, file));
        config = model.config, name = file, vocab = config.vocab;
        architecture = config.architecture == Architecture::llama ? "llama" : "gpt2";
        if (!in.has("--dtype")) dtype = dtype_names[int(config.dtype)];
    } else {
        must_be("--preset", preset(name, config));
        must_be("--arch", preset_architecture(architecture, config));
        config.vocab = vocab;
        if (in.has("--context")) config.context = context_size;
        if (in.has("--width")) {
            const int head = config.width / config.heads;
            if (width % head != 0)
                usage(format("--width '%d': must be a multiple of %d, the size of a head of %s", width, head, name.c_str()));
            config.heads = width / head, config.width = width;
        }
        must_be("--preset " + name, check(config));
    }
    if (profiled) {
        show_profile(runtime, config, batch, seconds, json);
        return 0;
    }
    if (file.empty()) random_model(runtime, config, model);
    uint64_t state = 1;
    vector<int32_t> ids(size_t(batch) * size_t(config.context) + 1);
    for (int32_t& id : ids) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        id = int32_t((state >> 33) % uint64_t(vocab));
    }
    const Ceilings ceilings(runtime);
    const double ceiling = ceilings.gflops;
    double device = 0;  // bytes of a GPU's
    if (!json)
        put_line(format("%s (%s), vocabulary %d; %s %s, %d threads; %s", name.c_str(), architecture.c_str(), vocab, common.backend.c_str(),
                        runtime.isa_name(), runtime.thread_count(), ceilings.text().c_str()));
    const auto report = [&](const char* kind, double tokens, double time, double flops) {
        const double gflops = tokens / time * flops / 1e9;
        if (json) {
            Json line;
            line.add("bench", kind)
                .add("tokens_per_second", tokens / time)
                .add("ms", time * 1e3)
                .add("gflops", gflops)
                .add("ceiling_gflops", ceiling);
            line.add("percent_of_ceiling", 100 * gflops / ceiling)
                .add(file.empty() ? "preset" : "model", name)
                .add("architecture", architecture)
                .add("vocab", vocab)
                .add("context", config.context)
                .add("width", config.width)
                .add("batch", batch)
                .add("sessions", several);
            line.add("dtype", strcmp(kind, "train") == 0 ? common.precision : dtype);
            if (device > 0) line.add("device_bytes", device);
            line.add("threads", runtime.thread_count()).add("backend", common.backend).add("isa", runtime.isa_name()).print();
        } else {
            put_now(format("%-8s %9s tokens/s  %10.3f ms %-12s %8.1f GFLOP/s  %5.1f %% of the ceiling\n", kind,
                           grouped(int64_t(tokens / time)).c_str(), time * 1e3,
                           strcmp(kind, "train") == 0     ? "a step"
                           : strcmp(kind, "prefill") == 0 ? "a context"
                           : several > 1                  ? "a round"
                                                          : "a token",
                           gflops, 100 * gflops / ceiling));
        }
    };
    if (what.empty() || what == "train") {
        Data data;
        must(data.create(runtime, Span<const int32_t>(ids.data(), ids.size())));
        TrainConfig learning;
        learning.batch = batch;
        learning.steps = 1000000000;
        learning.schedule = Schedule::constant;
        Trainer trainer;
        must(trainer.create(runtime, model, learning, data));
        Memory memory;
        must(memory_needed(runtime, model.config, Purpose::training, batch, memory, 0, nullptr, data.tokens));
        device = double(memory.device);
        const size_t tokens = ids.size() - 1;
        const int together = runtime.backend == Backend::cuda ? steps_ahead / 2 : 1;  // as in a run, they do not wait for each other
        const double time = middle_time(seconds, [&] {
            StepResult result;
            for (int i = 0; i < together; ++i) must(trainer.begin_step());
            while (trainer.under_way >= together) must(trainer.finish_step(result));
        });
        report("train", double(tokens), time / together, 3 * flops_per_token(config));
    }
    Session session;
    if (what != "train") must(model.convert(dtype_named(dtype))), must(session.create(runtime, model));
    const size_t context = size_t(config.context);
    if (what.empty() || what == "prefill") {
        const double time = middle_time(seconds, [&] {
            session.reset();
            must(session.feed(Span<const int32_t>(ids.data(), context)));
        });
        report("prefill", double(context), time, flops_per_token(config));
    }
    if (what.empty() || what == "decode") {  // a whole context, token by token
        vector<Session> sessions{size_t(several)};
        vector<Session*> all;
        vector<SampleConfig> how{size_t(several)};
        for (Session& one : sessions) must(one.create(runtime, model)), all.push_back(&one), how[all.size() - 1].seed = all.size();
        vector<int32_t> said(all.size());
        const double time = middle_of(seconds, [&] {
            for (Session* one : all) one->reset(), must(one->feed(Span<const int32_t>(ids.data(), 1)));
            const double before = now();  // what each reads first, it reads alone
            for (size_t i = 1; i < context; ++i)
                if (several == 1) must(sessions[0].next(how[0], said[0]));
                else
                    must(next(Span<Session* const>(all.data(), all.size()), Span<const SampleConfig>(how.data(), how.size()), said.data()));
            return now() - before;
        });
        report("decode", several, time / double(context - 1), flops_per_token(config));
    }
    if (what.empty() || what == "idle") {  // what a host pays for threads that have nothing to do, right after a token
        session.reset();
        must(session.feed(Span<const int32_t>(ids.data(), 1)));
        const double start = now(), before = cpu_seconds();
        std::this_thread::sleep_for(std::chrono::duration<double>(std::min(seconds, 1.0)));
        const double percent = 100 * (cpu_seconds() - before) / (now() - start);
        if (json) Json().add("bench", "idle").add("percent_of_a_core", percent).add("threads", runtime.thread_count()).print();
        else put_now(format("%-8s %9.2f %% of a core's time, between two tokens\n", "idle", percent));
    }
    return 0;
}

enum class Form { checkpoint, folder, llama2c, gguf };
const char* const form_names[] = {"babygpt checkpoint", "Hugging Face folder", "llama2.c file", "GGUF file"};

// Of a file to read, by content; of one to write, by name.
Form form_of(const string& path, bool reading) {
    std::error_code ignored;
    if (reading && fs::is_directory(path_of(path), ignored)) return Form::folder;
    if (reading) return is_checkpoint(path) ? Form::checkpoint : is_gguf(path) ? Form::gguf : Form::llama2c;
    if (ends_with(path, ".bin")) return Form::llama2c;
    if (ends_with(path, ".gguf")) return Form::gguf;
    const bool is_folder = fs::is_directory(path_of(path), ignored) || ends_with(path, "/") || path_of(path).extension().empty();
    return is_folder ? Form::folder : Form::checkpoint;
}
uint64_t bytes_in(const string& path) {
    std::error_code ignored;
    if (!fs::is_directory(path_of(path), ignored)) return fs::file_size(path_of(path), ignored);
    uint64_t sum = 0;
    for (const auto& file : fs::directory_iterator(path_of(path), ignored))
        if (file.is_regular_file(ignored)) sum += file.file_size(ignored);
    return sum;
}

int convert(Arguments& in) {
    Common common;
    string dtype, out, tokenizer;
    Beside beside, rewritten;
    bool overwrite = false, json = false;
    in.parse(common,
             {{"--merge", "A", "add this adapter (of train --lora, or PEFT's folder) to the model's own matrices", &beside.path},
              {"--adapter", "A", "write this adapter alone, as PEFT's folder or, from there, as a file; IN is its model", &rewritten.path},
              {"--dtype", "f32|bf16|int8", "bf16: half the bytes; int8: a quarter; f32: as they are", &dtype},
              {"--tokenizer", "FILE", "give the model this one: a llama2.c file comes without (tok512.bin)", &tokenizer},
              {"--out", "OUT", "what is written, where OUT does not stand behind IN", &out},
              {"--overwrite", nullptr, "although OUT exists", &overwrite},
              {"--json", nullptr, "one JSON object", &json}},
             1, 2);
    if (in.operands.size() == 2 && !out.empty()) usage("say OUT only once");
    if (in.operands.size() == 2) out = in.operands[1];
    if (out.empty()) usage("convert needs OUT: M.safetensors, M.gguf, M.bin (llama2.c's) or a folder (Hugging Face's); see convert --help");
    const string& from = in.operands[0];
    const Form read = form_of(from, true), written = form_of(out, false);
    if (in.has("--adapter") && (in.has("--merge") || in.has("--dtype"))) usage("--adapter goes with neither --merge nor --dtype");
    if (in.has("--adapter") && in.has("--tokenizer")) usage("--tokenizer is for a model, not for an adapter");
    if (dtype.empty() && tokenizer.empty() && beside.path.empty() && rewritten.path.empty() && read == written)
        usage("convert from one " + string(form_names[int(read)]) + " to another needs --dtype f32|bf16|int8");
    const char* const inside = in.has("--adapter") ? "/adapter_config.json" : "/config.json";
    const bool is_there = exists(written == Form::folder ? out + inside : out);
    if (!overwrite && is_there) error(out + " exists; replace it with --overwrite, or choose another --out");
    Model model;
    must(model.load(common.runtime, from));
    if (rewritten.load(common.runtime, model)) {
        std::error_code failed;
        if (written == Form::folder) fs::create_directories(path_of(out), failed);
        if (failed) error(out + ": the folder cannot be made: " + failed.message());
        must(written == Form::folder ? rewritten.adapter.save_peft(out) : rewritten.adapter.save(out));
        const AdapterConfig& c = rewritten.adapter.config;
        if (json) Json().add("out", out).add("rank", c.rank).add("alpha", c.alpha).add("targets", to_string(c.targets)).print();
        else put_line(format("%s: an adapter of rank %d, alpha %g, of %s", out.c_str(), c.rank, c.alpha, to_string(c.targets).c_str()));
        return 0;
    }
    if (!tokenizer.empty()) {
        load_tokenizer(common.runtime, tokenizer, model.tokenizer);
        if (model.tokenizer.vocab > model.config.vocab)
            error(format("%s has %d tokens, but the model %s has vocab %d: it was trained with another tokenizer", tokenizer.c_str(),
                         model.tokenizer.vocab, from.c_str(), model.config.vocab));
    }
    const uint64_t before = bytes_in(from);  // it may be replaced
    const Dtype stored = model.config.dtype;
    if (beside.load(common.runtime, model)) {
        must(merge(model, beside.adapter));
        if (dtype.empty() && stored != Dtype::f32) dtype = dtype_names[int(stored)];
    }
    if (!dtype.empty()) must(model.convert(dtype_named(dtype)));
    dtype = dtype_names[int(model.config.dtype)];
    if (written == Form::folder) {
        std::error_code failed;
        fs::create_directories(path_of(out), failed);
        if (failed) error(out + ": the folder cannot be made: " + failed.message());
        must(model.save_huggingface(out));
    } else must(written == Form::llama2c ? model.save_llama2c(out) : written == Form::gguf ? model.save_gguf(out) : model.save(out));
    const uint64_t after = bytes_in(out);
    const char* architecture = architecture_names[int(model.config.architecture)];
    if (json)
        Json()
            .add("out", out)
            .add("dtype", dtype)
            .add("bytes", after)
            .add("bytes_before", before)
            .add("read", form_names[int(read)])
            .add("wrote", form_names[int(written)])
            .add("architecture", architecture)
            .print();
    else {
        put_line(format("%s: %s in %s (%s before)", out.c_str(), bytes_text(after).c_str(), dtype.c_str(), bytes_text(before).c_str()));
        put_line(format("a %s from a %s; %s, %s parameters, %s", form_names[int(written)], form_names[int(read)], architecture,
                        grouped(model.parameters).c_str(),
                        model.tokenizer.kind == TokenizerKind::none ? "no tokenizer"
                        : written == Form::llama2c                  ? "without its tokenizer, for which such a file has no room"
                                                                    : "with its tokenizer"));
    }
    return 0;
}

int compare(Arguments& in) {
    Common common;
    bool json = false;
    in.parse(common, {{"--json", nullptr, "one JSON object", &json}}, 2, 2);
    Model a, b;
    must(a.load(common.runtime, in.operands[0]));
    must(b.load(common.runtime, in.operands[1]));
    Array<Difference> rows(common.runtime);
    must(babygpt::compare(a, b, rows));
    const Difference* first = nullptr;
    size_t different = 0;
    for (const Difference& row : rows) {
        if (row.same_bits && row.same_shape) continue;
        if (!first) first = &row;
        ++different;
    }
    const double relative = first && first->max_reference > 0 ? first->max_difference / first->max_reference : none;
    if (json) {
        Json line;
        line.add("same", !first).add("tensors", rows.count).add("different", different);
        if (first)
            line.add("tensor", first->name)
                .add("same_shape", first->same_shape)
                .add("index", first->index)
                .add("max_difference", first->max_difference)
                .add("relative", relative);
        line.print();
    } else if (!first) {
        put_line(format("the same bits in all %zu tensors of weights", rows.count));
    } else if (!first->same_shape) {
        put_line(format("%s is the first of %zu tensors that differ: it is missing in one, or has another shape", first->name, different));
    } else {
        put_line(format("%s is the first of %zu tensors that differ (of %zu): from element %lld on, by at most %.3g (relative %.3g)",
                        first->name, different, rows.count, static_cast<long long>(first->index), first->max_difference, relative));
    }
    return first ? 1 : 0;
}

int selftest(Arguments& in) {
    Common common;
    bool json = false;
    in.parse(common, {{"--json", nullptr, "one JSON object a check", &json}}, 0, 0);
    Array<CheckResult> results(common.runtime);
    must(babygpt::selftest(common.runtime, results));
    size_t failed = 0;
    for (const CheckResult& check : results) {
        failed += !check.passed;
        if (json) Json().add("check", check.what).add("error", check.error).add("limit", check.limit).add("passed", check.passed).print();
        else put_line(format("%-6s  %-52s  error %.2e  limit %.0e", check.passed ? "ok" : "FAILED", check.what, check.error, check.limit));
    }
    if (!json) put_line(format("%zu passed, %zu failed", results.count - failed, failed));
    return failed > 0 ? 1 : 0;
}

// =====================================================================================================================
// main
// =====================================================================================================================

const vector<Command> commands = {
    {"train", "FILE... --out M.safetensors [options]",
     "Trains a model on text. Without further options it takes about two minutes and does something sensible.",
     "  babygpt train story.txt --out story.safetensors\n"
     "  babygpt train talks.jsonl --field dialogue --user-turn '#Person1#: ' --reply-turn '#Person2#: ' --preset baby --tokenizer char "
     "--time 3600 --out m.safetensors\n"
     "  babygpt train story.txt --out story.safetensors --resume\n"
     "  babygpt train talks.txt --from m.safetensors --answers-only --out n.safetensors\n"
     "  babygpt train talks.txt --from m.safetensors --lora 8 --out adapter.safetensors\n",
     train},
    {"generate", "M [options]", "Continues a text. M may be ngram:N, which counts in --train FILE how tokens follow N - 1 others.",
     "  babygpt generate story.safetensors --prompt 'Once upon' --temperature 0.6 --tokens 300\n"
     "  babygpt generate story.safetensors --prompt 'Once upon' --tokens 20 --beams 8 --best 3\n"
     "  babygpt generate ngram:5 --train story.txt --prompt 'Once upon' --temperature 1\n",
     generate},
    {"translate", "M [FILE] [options]", "Translates with a model that was trained with an encoder: a line in, a line out.",
     "  babygpt train en-tr.tsv --arch transformer --out en-tr.safetensors\n  echo 'Good morning.' | babygpt translate en-tr.safetensors\n",
     translate},
    {"chat", "M [options]",
     "Talks with a model. When standard input is no terminal, each line gets a reply of one line; the line /reset forgets the "
     "conversation.",
     "  babygpt chat village.safetensors\n  printf 'Hello\\nWho are you?\\n' | babygpt chat village.safetensors --reply-turn 'Smith: ' "
     "--json\n",
     chat},
    {"eval", "M FILE... [options]", "How well a model predicts a text. M may be ngram:N, counting in --train FILE.",
     "  babygpt eval m.safetensors test.txt --train train.txt\n  babygpt eval ngram:2 test.txt --train train.txt\n"
     "  babygpt eval ngram:2 --train story.txt\n",
     eval},
    {"score", "M [options]",
     "The log-probability of each token of a text (standard input), and their sum. The first one's is 0, but where the model's texts begin "
     "with a token of their own (<s>).",
     "  echo 'To be or not to be' | babygpt score m.safetensors\n", score},
    {"classify", "M [options]", "Lines of standard input -> the label of each, and how probable it is. M: of train --classes.",
     "  echo 'a moving film' | babygpt classify sentiment.safetensors\n", classify},
    {"fill", "M TEXT [options]", "What may stand where TEXT has [MASK]. M: of train --encoder-only.",
     "  babygpt fill encoder.safetensors 'the [MASK] sat on the mat'\n", fill_gaps},
    {"embed", "M [options]", "Lines of standard input -> a vector of each, as JSON. M: of train --encoder-only, or --classes.",
     "  echo 'a moving film' | babygpt embed encoder.safetensors\n", embed},
    {"encode", "T [options]",
     "Text from standard input -> token ids. T: a model, a tokenizer's file (also vocab.txt:uncased, .model, .gguf, tok.bin) or folder, or "
     "byte. The ids are those of the text alone: the token that some models have read before each text (<s>) is not among them; generate, "
     "chat, score, train and eval put it there by themselves.",
     "  echo hello | babygpt encode tokenizer.json\n", encode},
    {"decode", "T [options]",
     "Token ids from standard input -> the exact bytes. T: a model, a tokenizer's file (also vocab.txt:uncased, .model, .gguf, tok.bin) or "
     "folder, or byte.",
     "  echo 104 105 | babygpt decode byte\n", decode},
    {"tokenizer", "FILE... --vocab N --out T", "Learns a tokenizer from text: byte-level BPE, WordPiece or a unigram model.",
     "  babygpt tokenizer story.txt --vocab 1024 --out tokenizer.json\n"
     "  babygpt tokenizer metin.txt --kind wordpiece --cased --vocab 4000 --out tokenizer.json\n"
     "  babygpt tokenizer story.txt --kind unigram --vocab 4000 --out story.model\n",
     make_tokenizer},
    {"info", "M | --preset NAME [options]", "What a model is made of, and how much memory it takes.",
     "  babygpt info --preset baby --batch 8\n", info},
    {"measure", "bleu|distinct|accuracy|copied FILE... [options]",
     "How good a text is. bleu HYPOTHESES REFERENCES...: sacrebleu's corpus BLEU, a segment a line. distinct FILE...: the share of "
     "different "
     "words and pairs of words, and of 4-grams that repeat. accuracy PREDICTIONS LABELS: and F1, a label a line. copied OUTPUT "
     "TRAINING_FILE...: the longest part of a model's output that stands in the training text, and the share that is copied.",
     "  babygpt measure bleu ours.txt reference.txt\n  babygpt measure distinct written.txt\n"
     "  babygpt measure accuracy predicted.txt labels.txt --positive yes\n"
     "  babygpt measure copied written.txt train.jsonl --field dialogue\n",
     measure},
    {"attention", "M TEXT [options]",
     "Which earlier tokens each token looks at; with an encoder, at which of TEXT's each token of its translation does.",
     "  babygpt attention m.safetensors 'Kedi mama yer' --layer 1 --svg cat.svg\n", attention},
    {"nearest", "M WORD [+ WORD] [- WORD]... [options]",
     "The tokens whose vectors in the model's table point most nearly to a word, or where sums of words point.",
     "  babygpt nearest m.safetensors king - man + woman\n", neighbours},
    {"plot", "LOG.csv... [options]", "Draws the loss curves of logs (train --log).", "  babygpt plot a.csv b.csv --svg curves.svg\n", plot},
    {"bench", "[train|prefill|decode|idle] [options]", "How fast this machine trains, reads and writes, on random tokens.",
     "  babygpt bench train --threads 2\n  babygpt bench decode --model story.safetensors --dtype int8\n", bench},
    {"convert", "IN OUT [options]",
     "From one kind of file to another: checkpoints (.safetensors), folders of Hugging Face's (GPT-2 and Llama), llama.cpp's .gguf (int8 "
     "as "
     "Q8_0), llama2.c's .bin. IN is told by its content, OUT by its name. With --dtype it rounds the matrices to numbers of fewer bits: a "
     "smaller file, and replies that come sooner (`babygpt eval` says what it costs).",
     "  babygpt convert stories260K.bin stories.safetensors --tokenizer tok512.bin\n  babygpt convert m.safetensors folder/\n"
     "  babygpt convert m.safetensors m.gguf\n"
     "  babygpt convert m.safetensors --dtype int8 --out small.safetensors\n",
     convert},
    {"compare", "A B [options]", "The first tensor at which two checkpoints differ, and by how much. Exit status 0: the same bits, 1: not.",
     "  babygpt compare a.safetensors b.safetensors\n", compare},
    {"selftest", "[options]", "Gradient checks and golden numbers of this very program.", "", selftest},
};

string overview() {
    string text = "babygpt COMMAND ... : tokenize, train a small GPT and talk to it\n\n";
    for (const Command& command : commands) text += format("  %-10s %s\n", command.name, command.summary);
    return text + "\nbabygpt help COMMAND, or babygpt COMMAND --help, lists a command's options.\n";
}

int dispatch(vector<string> words) {
    if (words.empty()) usage("which command? babygpt --help lists them");
    const string version = format("babygpt %d.%d.%d", BABYGPT_VERSION_MAJOR, BABYGPT_VERSION_MINOR, BABYGPT_VERSION_PATCH);
    if (words[0] == "--version") return put_line(version), 0;
    if (words[0] == "--help" || words[0] == "-h" || (words[0] == "help" && (words.size() == 1 || words[1] == "help")))
        return put(overview()), 0;
    if (words[0] == "help") words = {words[1], "--help"};
    vector<string> names = {"help"};
    for (const Command& command : commands) {
        names.push_back(command.name);
        if (words[0] != command.name) continue;
        Arguments arguments{command, vector<string>(words.begin() + 1, words.end()), {}};
        return command.run(arguments);
    }
    usage("unknown command '" + words[0] + "'" + nearest(words[0], names));
}

void report(const string& message) {
    string line = message;
    for (char& c : line)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
    fprintf(stderr, "babygpt: error: %s\n", line.c_str());
}

vector<string> command_line(int count, char** words) {
#if defined(_WIN32)  // UTF-8 in, UTF-8 and exact bytes out
    SetConsoleOutputCP(CP_UTF8);
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    wchar_t** wide = CommandLineToArgvW(GetCommandLineW(), &count);
    vector<string> result;
    for (int i = 1; i < count; ++i) result.push_back(to_string(fs::path(wide[i])));
    LocalFree(wide);
    (void)words;
    return result;
#else
    return vector<string>(words + std::min(count, 1), words + count);
#endif
}

}  // namespace

int main(int count, char** words) {
#if !defined(_WIN32)
    std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error that a write reports
    // What was closed by the caller must not become the number of a file that we open; writing to it, or reading, fails as it should.
    for (int fd = 0; fd < 3; ++fd)
        if (fcntl(fd, F_GETFD) == -1) (void)!open("/dev/null", fd == 0 ? O_WRONLY : fd == 1 ? O_RDONLY : O_RDWR);
#endif
    int code = 0;
    try {
        code = dispatch(command_line(count, words));
    } catch (const Failure& failure) {
        code = failure.code;
        if (code != 0) report(failure.message);
    } catch (const std::bad_alloc&) {
        code = 1;
        report("out of memory");
    } catch (const std::exception& fault) {
        code = 1;
        report(fault.what());
    }
    errno = 0;
    if (!flush_output() && code == 0) {
        code = 1;
        report(string("cannot write to standard output: ") + strerror(errno));
    }
    return code;
}
