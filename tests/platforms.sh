#!/bin/sh
# Other processors than this machine's: AArch64 (NEON, in QEMU) and 32-bit x86, with their cross-compilers (Debian: g++-aarch64-linux-gnu,
# g++-i686-linux-gnu, qemu-user-static). If this fails, the header no longer compiles there without a warning, its self-test fails there, or
# training, checkpoints and talking no longer give the bytes that this machine's BABYGPT gives. Run from the repository's root.
# (AVX-512 on a machine that lacks it: Bochs emulates it, cpu: model=corei7_skylake_x, booting a Linux kernel with clearcpuid=321,323.)
babygpt=${BABYGPT:-build/babygpt}
case "$babygpt" in /*) ;; *) babygpt=$PWD/$babygpt ;; esac
. tests/check.sh

# work_with NAME COMMAND...: trains, rounds and talks with that babygpt, into NAME.*
work_with() {
    name=$1; shift
    "$@" train text --out $name.f32.safetensors --overwrite --tokenizer bpe:300 --layers 2 --heads 2 --width 36 --context 20 --batch 3 --dropout 0.1 \
        --steps 6 --threads 1 > $name.log 2>&1 || cat $name.log
    for dtype in bf16 int8; do "$@" convert $name.f32.safetensors $name.$dtype.safetensors --dtype $dtype > /dev/null; done
    for dtype in f32 bf16 int8; do
        "$@" generate $name.$dtype.safetensors --prompt "You: " --tokens 16 --seed 7 --threads 1 > $name.$dtype.said
        "$@" score $name.$dtype.safetensors --threads 1 < line > $name.$dtype.score
    done
}

head -c 6000 "$root/examples/village.txt" > text
head -n 1 text > line
work_with here "$babygpt"
for platform in aarch64 i686; do
    compiler=$platform-linux-gnu-g++ run=
    if ! command -v $compiler > /dev/null; then echo "skipped: $compiler is not here"; continue; fi
    if [ $platform = aarch64 ]; then run=$(command -v qemu-aarch64-static || command -v qemu-aarch64); fi
    build="$compiler -std=c++17 -I$root $warnings -pthread -static"
    check "$platform, implementation" sh -c "echo '#include \"babygpt.h\"' | $build -O1 -DBABYGPT_IMPLEMENTATION -c -x c++ - -o $platform.o" || continue
    check "$platform, command line" $build -O0 "$root/tools/babygpt.cpp" $platform.o -o $platform || continue
    if ! $run ./$platform --version > /dev/null 2>&1; then echo "skipped: programs for $platform do not run here (no QEMU?)"; continue; fi
    check "$platform, selftest" sh -c "$run ./$platform selftest > selftest 2>&1 || grep -v '^ok' selftest"
    work_with $platform $run ./$platform
    for what in f32.safetensors bf16.safetensors int8.safetensors f32.said bf16.said int8.said f32.score bf16.score int8.score; do
        check "$platform, the bytes of $what" cmp here.$what $platform.$what
    done
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
