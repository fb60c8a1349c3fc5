# What the scripts beside it share: `. tests/check.sh` from the repository's root goes on in an empty folder.
root=$PWD
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast -Wundef -Wdouble-promotion"
passed=0 failed=0

# check WHAT COMMAND...: the command must succeed and say nothing.
check() {
    what=$1; shift
    if "$@" > output 2>&1 && [ ! -s output ]; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAILED $what"; head -n 5 output; return 1; fi
}
