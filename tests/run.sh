#!/bin/sh
# Runs test programs from the repository's root, shows their closing lines, and adds these up in one line at the end.
# A name that ends in .sh or .py is a script; arguments may follow a name. A test that is skipped says so in a line of its own.
passed=0 failed=0
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
    if [ $status -ne 0 ] && [ "${bad:-0}" -eq 0 ]; then bad=1 line="ended with status $status"; cat "$output"
    elif [ "${bad:-0}" -ne 0 ]; then cat "$output"
    else grep -E '^skipped' "$output"; fi
    name=${test%% *}
    [ -z "$line" ] || echo "$(basename "$name"): $line ($(($(date +%s) - start)) s)"
    passed=$((passed + ${good:-0})) failed=$((failed + ${bad:-0}))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
