#!/bin/sh
# The header under every compiler, standard and set of flags that a host may have, and what it leaves behind there.
# matrix.sh [COMPILER...]: g++ and clang++ where none is named. Runs from the repository's root; what the machine lacks is skipped with a line.
. tests/check.sh

compilers=
for compiler in ${*:-g++ clang++}; do
    if command -v $compiler > /dev/null; then compilers="$compilers $compiler"; else echo "skipped: $compiler is not here"; fi
done

echo '#include "babygpt.h"' > declarations.cpp
printf '#define BABYGPT_IMPLEMENTATION\n#include "babygpt.h"\n' > implementation.cpp
: > empty.cpp
# What the header itself includes, to tell its macros from theirs.
printf '#include <stddef.h>\n#include <stdint.h>\n' > declarations_alone.cpp
{ cat declarations_alone.cpp; grep -o '^ *#include <[a-z_/.]*>' "$root/babygpt.h" | grep -v -e windows -e '<io\.h>' -e arm -e intrin; } > implementation_alone.cpp

cat > other.cpp <<'END'
#include "babygpt.h"
babygpt::Config other_config();
babygpt::Config other_config() {
    babygpt::Config config;
    (void)babygpt::preset("nano", config);
    return config;
}
END
cat > main.cpp <<'END'
#define BABYGPT_IMPLEMENTATION
#include "babygpt.h"
#include "babygpt.h"  // twice, as headers are
babygpt::Config other_config();
int main() { return other_config().layers == 2 ? 0 : 1; }
END

cat > selftest.cpp <<'END'
#define BABYGPT_IMPLEMENTATION
#include "babygpt.h"
int main() {
    for (int slow = 0; slow < 2; ++slow) {
        babygpt::Runtime runtime;
        if (slow) runtime.isa = babygpt::Isa::portable;
        babygpt::Array<babygpt::CheckResult> results;
        if (!babygpt::selftest(runtime, results).ok()) return 1;
        for (const babygpt::CheckResult& result : results)
            if (!result.passed) printf("%s: %g, but at most %g\n", result.what, result.error, result.limit);
    }
}
END

# Macros that system headers and other people's define: windows.h, complex.h, termios.h, X11, Arduino.
cat > hostile.cpp <<'END'
#include <atomic>
#include <new>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define abs(x) ((x) < 0 ? -(x) : (x))
#define round(x) ((int)(x))
#define sq(x) ((x) * (x))
#define near
#define far
#define small char
#define interface struct
#define I (0)
#define IN
#define OUT
#define OPTIONAL
#define CONST const
#define VOID void
#define DELETE 1
#define ERROR 0
#define TRUE 1
#define FALSE 0
#define Bool int
#define None 0L
#define Always 2
#define Success 0
#define B0 0
#define B1 1
#define PI 3.14
#define DEBUG 1
#include "babygpt.h"
int main() { return min(1, 0) + max(0, 0); }
END

for compiler in $compilers; do
    for standard in c++17 c++20 c++2b; do
        build="$compiler -std=$standard -I$root $warnings -pthread"
        check "$compiler $standard, declarations" $build -fsyntax-only declarations.cpp
        check "$compiler $standard, implementation" $build -fsyntax-only implementation.cpp
    done
    build="$compiler -std=c++17 -I$root -pthread"
    for flags in "-fno-exceptions -fno-rtti" "-O0" "-ffast-math" "-Os -fshort-enums" "-funsigned-char" "-m32"; do
        if ! $build $flags -fsyntax-only implementation_alone.cpp > /dev/null 2>&1; then echo "skipped: $compiler cannot compile with $flags here"; continue; fi
        check "$compiler $flags" $build $warnings $flags -fsyntax-only implementation.cpp
    done
    check "$compiler, hostile macros around the declarations" $build $warnings -Wno-unused-macros -fsyntax-only hostile.cpp
    check "$compiler, hostile macros around the implementation" $build $warnings -DBABYGPT_IMPLEMENTATION -fsyntax-only hostile.cpp
    check "$compiler, two translation units" sh -c "$build $warnings -O0 main.cpp other.cpp -o two && ./two"

    # Macros: all that are new have the prefix; of the implementation nothing stays but that it was here.
    for part in declarations implementation; do
        $build -dM -E ${part}_alone.cpp | cut -d ' ' -f 2 | sed 's/(.*//' | sort -u > before
        $build -dM -E $part.cpp | cut -d ' ' -f 2 | sed 's/(.*//' | sort -u > after
        comm -13 before after > new
        grep -v '^BABYGPT_' new > foreign
        check "$compiler, macros without BABYGPT_ in the $part" cat foreign
        grep -v -x -E 'BABYGPT_(H|VERSION_(MAJOR|MINOR|PATCH)|FORMAT_VERSION|ERRORS|IMPLEMENTATION|IMPLEMENTED|RECORDS)' new | grep '^BABYGPT_' > left
        check "$compiler, internal macros that the $part leaves behind" cat left
    done

    # Numbers: the same bits whatever the flags. (What no pragma stops: Clang's -ffast-math together with -march=native fuses
    # products and sums of the plain backend.) A host may write its assembly as Intel does.
    case $(uname -m) in x86_64 | i?86) dialect=" -masm=intel" ;; *) dialect= ;; esac
    for flags in "-O0" "-O2 -frounding-math" "-O2 -ffast-math" "-O3 -march=native$dialect"; do
        check "$compiler $flags, selftest" sh -c "$build $flags selftest.cpp -o selftest && ./selftest"
    done

    # Time of a processor, for the declarations of ten runs, as the clock ticks slowly. A busy machine gets further tries.
    seconds() { sh -c '"$@" > /dev/null 2>&1; times' sh "$@" | tail -n 1 | tr 'ms' '  ' | awk '{ print $1 * 60 + $2 + $3 * 60 + $4 }'; }
    tenth() { seconds sh -c 'for i in 0 1 2 3 4 5 6 7 8 9; do "$@"; done' sh $build -O2 -c "$1" -o time.o | awk '{ print $1 / 10 }'; }
    for i in 1 2 3 4 5; do
        nothing=$(tenth empty.cpp) declarations=$(tenth declarations.cpp)
        if awk "BEGIN { exit !($declarations - $nothing < 0.05) }"; then break; fi
    done
    for i in 1 2 3; do
        implementation=$(seconds $build -O2 -c implementation.cpp -o object.o)
        if awk "BEGIN { exit !($implementation <= 45) }"; then break; fi
    done
    echo "$compiler: empty file $nothing s, declarations $declarations s, implementation at -O2 $implementation s"
    check "$compiler, declarations take less than 0.05 s" awk "BEGIN { if (!($declarations - $nothing < 0.05)) print \"$declarations\" }"
    check "$compiler, the implementation takes at most 45 s" awk "BEGIN { if (!($implementation <= 45)) print \"$implementation\" }"

    # Symbols: everything that a linker sees is in namespace babygpt, and nothing is asked for that throws, prints, ends the program,
    # reads the environment, allocates behind the Runtime's back, or computes otherwise on another system's libm.
    nm -C --defined-only --extern-only object.o 2>&1 | cut -d ' ' -f 3- | grep -v -e 'babygpt::' -e '^DW\.ref\.' -e '^__clang_call_terminate$' > foreign
    check "$compiler, symbols outside of namespace babygpt" cat foreign
    nm -C --undefined-only object.o 2>&1 | sed 's/^ *[Uuvw] //' | grep -E '^(operator (new|delete)|__cxa_(throw|allocate|guard)|std::|(v|f|s|sn|vsn)?printf|puts|putchar|perror|exit|_exit|abort|__assert|getenv|setlocale|signal|raise|exp|log|pow|tanh?|sin|cos|erf|fma|exp2|log2)f?(@|$|\()' > unwanted
    check "$compiler, calls to what a guest does not do" cat unwanted
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
