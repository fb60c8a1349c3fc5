#!/bin/sh
# cuda.sh PROGRAM: tests/cuda.cpp on the GPU that is here, then its smallest tests under compute-sanitizer's tools.
program=$1
"$program" || exit 1
if ! command -v compute-sanitizer > /dev/null; then
    echo "skipped: compute-sanitizer is not here"
    exit 0
fi
failed=0
for tool in memcheck racecheck initcheck synccheck; do
    options=
    [ $tool != synccheck ] || options="--num-cuda-barriers 4096"  # generation has nine a block
    for test in sanitized_f32 sanitized_bf16 sanitized_fp16 sanitized_muon generation_learnt; do
        start=$(date +%s)
        if output=$(timeout 60 compute-sanitizer --tool $tool $options --error-exitcode 9 "$program" $test 2>&1); then verdict=clean
        else verdict="FAILED ($?)" failed=1; fi
        echo "compute-sanitizer $tool, $test: $verdict ($(($(date +%s) - start)) s)"
        [ "$verdict" = clean ] || echo "$output" | grep -v '^$' | head -n 25
    done
done
exit $failed
