#!/bin/sh
# run.sh RESULT TEST...: runs test programs from the repository's root, one after the other, shows their closing lines and keeps them in RESULT.
# run.sh --sum RESULT...: adds these up in one line, and fails where a test failed.
# A name that ends in .sh or .py is a script; arguments may follow a name. A test that is skipped says so in a line of its own.
if [ "$1" = --sum ]; then
    shift
    awk '{ passed += $2; failed += $4 } END { print passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 }' "$@"
    exit
fi
result=$1
shift
mkdir -p "$(dirname "$result")" && : > "$result" || exit 1
output=$(mktemp) || exit 1
trap 'rm -f "$output"' EXIT
for test in "$@"; do
    start=$(date +%s)
    case "$test" in
        *.sh*) sh $test ;;
        *.py*) if command -v python3 > /dev/null; then python3 $test; else echo "skipped: python3 is not here"; fi ;;
        *) $test ;;
    esac > "$output" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$output" | tail -n 1)
    good=${line%% *} rest=${line#*, } bad=${line:+${rest%% *}}
    if [ $status -ne 0 ] && [ "${bad:-0}" -eq 0 ]; then
        cat "$output"
        bad=1 line="${good:-0} passed, 1 failed: ended with status $status"
    elif [ "${bad:-0}" -ne 0 ]; then cat "$output"
    else grep -E '^skipped' "$output"; fi
    name=${test%% *}
    [ -z "$line" ] || echo "$(basename "$name"): $line ($(($(date +%s) - start)) s)" | tee -a "$result"
done
