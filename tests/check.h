// What every test program here uses: CHECK, tests with a name that says what would be broken, and the closing line.
// TEST(name, "what would be broken") { ... CHECK(condition); ... }   and   int main() { return run_tests(); }
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Test {
    const char* name;
    const char* broken;
    void (*run)();
    Test* next;
};

inline Test*& first_test() {
    static Test* first = nullptr;
    return first;
}
inline int& failures() {
    static int count = 0;
    return count;
}
inline const char*& skipped() {
    static const char* reason = nullptr;
    return reason;
}

struct AddTest {
    Test test;
    AddTest(const char* name, const char* broken, void (*run)()) : test{name, broken, run, nullptr} {
        Test** last = &first_test();
        while (*last) last = &(*last)->next;
        *last = &test;
    }
};

#define TEST(name, broken)                           \
    static void name();                              \
    static AddTest add_##name(#name, broken, &name); \
    static void name()

// Goes on after a failure, so that one run shows all of them.
#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_OK(expression) check_status((expression), #expression, __FILE__, __LINE__)
// Ends a test that cannot run here, with the reason in one line.
#define SKIP(reason)          \
    do {                      \
        skipped() = (reason); \
        return;               \
    } while (false)

inline bool check_that(bool good, const char* what, const char* file, int line) {
    if (!good && ++failures() <= 20) printf("  %s:%d: not so: %s\n", file, line, what);
    return good;
}
template <class Status>
bool check_status(const Status& status, const char* what, const char* file, int line) {
    if (!status.ok() && ++failures() <= 20) printf("  %s:%d: %s: %s\n", file, line, what, status.message);
    return status.ok();
}

// How many times as many damaged files as usual. What `make damage` asks for.
inline int& thoroughness() {
    static int times = 1;
    return times;
}

inline bool has_test(const char* word) {
    for (const Test* test = first_test(); test; test = test->next)
        if (strstr(test->name, word)) return true;
    return false;
}
// With a word as argument: only the tests whose name holds it; with a number after it: so many times as many damaged files.
inline int run_tests(int count = 0, char** words = nullptr) {
    const char* only = count > 1 ? words[1] : nullptr;
    if (count > 2) thoroughness() = atoi(words[2]);
    if (only && !has_test(only)) {
        printf("no test's name holds '%s'; there are:\n", only);
        for (const Test* test = first_test(); test; test = test->next) printf("  %s\n", test->name);
        printf("0 passed, 1 failed\n");
        return 1;
    }
    int passed = 0, failed = 0, left_out = 0;
    for (Test* test = first_test(); test; test = test->next) {
        if (only && !strstr(test->name, only)) continue;
        const int before = failures();
        skipped() = nullptr;
        test->run();
        if (failures() != before) {
            printf("FAILED %s: if this fails, %s\n", test->name, test->broken);
            ++failed;
        } else if (skipped()) {
            printf("skipped %s: %s\n", test->name, skipped());
            ++left_out;
        } else ++passed;
        fflush(stdout);
    }
    printf("%d passed, %d failed", passed, failed);
    if (left_out) printf(", %d skipped", left_out);
    printf("\n");
    return failed == 0 ? 0 : 1;
}

#endif
