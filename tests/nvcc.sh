#!/bin/sh
# babygpt_cuda.cu under nvcc: for the oldest and a present architecture, with g++ and clang++ as hosts, without a warning, and linked into a
# program that says clearly what it lacks. No GPU is needed. all=1 in the environment: for every major architecture instead of these two.
# nvcc is the one on the PATH, in /usr/local/cuda, or of Python's packages nvidia-cuda-nvcc, -runtime, -crt, -cccl, nvidia-nvvm and nvidia-cublas.
nvcc=
for place in "$(command -v nvcc)" /usr/local/cuda/bin/nvcc \
    $(python3 -c 'import sys; print(*(p + "/nvidia/cu13/bin/nvcc" for p in sys.path if p))' 2> /dev/null); do
    if [ -z "$nvcc" ] && [ -x "$place" ]; then nvcc=$place; fi
done
if [ ! -f babygpt_cuda.cu ] || [ -z "$nvcc" ]; then
    echo "skipped: nvcc is not here (pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cublas)"
    echo "0 passed, 0 failed"
    exit 0
fi
toolkit=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
if [ ! -f "$toolkit/include/cublasLt.h" ]; then
    echo "skipped: nvcc is here, but not cublasLt.h (pip install nvidia-cublas)"
    echo "0 passed, 0 failed"
    exit 0
fi
. tests/check.sh

compile="$nvcc -std=c++17 -I$root -Werror all-warnings -Xcompiler -Wall,-Wextra -c $root/babygpt_cuda.cu"
quick=  # where nvcc can: half the minutes, the same warnings
if $nvcc --help | grep -q -e --Ofast-compile; then quick=-Ofc=max; fi
if [ -n "$all" ]; then check "every major architecture with g++" $compile -O3 $quick -arch=all-major -t 0 -o cuda.o
else
    check "sm_75 with g++" $compile -O3 -arch=sm_75 -o old.o
    check "sm_90 with g++" $compile -O3 -arch=sm_90 -o cuda.o
fi
if command -v clang++ > /dev/null; then check "sm_80 with clang++" $compile -O1 -arch=sm_80 -ccbin clang++ -o clang.o
else echo "skipped: clang++ is not here"; fi
check "tools/bench/products.cu" $nvcc -std=c++17 -Werror all-warnings -Xcompiler -Wall,-Wextra -O1 -arch=sm_80 -c $root/tools/bench/products.cu -o products.o

cat > program.cpp <<'END'
#include <stdio.h>

#include "babygpt.h"
int main() {
    babygpt::Runtime runtime;
    runtime.backend = babygpt::Backend::cuda;
    const int32_t ids[64] = {1, 2, 3};
    babygpt::Config config;
    config.layers = 1, config.heads = 1, config.width = 8, config.context = 8, config.vocab = 8;
    babygpt::Model model;
    babygpt::Data data;
    babygpt::Trainer trainer;
    babygpt::Status status = model.create(runtime, config, babygpt::Tokenizer());
    if (status.ok()) status = data.create(runtime, babygpt::Span<const int32_t>(ids, 64));
    if (status.ok()) status = trainer.create(runtime, model, babygpt::TrainConfig(), data);
    printf("%s\n", status.ok() ? "trains" : status.message);
}
END
echo '#include "babygpt.h"' > library.cpp
cudart=$(ls "$toolkit"/lib64/libcudart_static.a "$toolkit"/lib/libcudart_static.a 2> /dev/null | head -n 1)
cublas=$(ls "$toolkit"/lib64/libcublasLt.so* "$toolkit"/lib/libcublasLt.so* 2> /dev/null | head -n 1)
check "the library" g++ -std=c++17 -O0 -I"$root" -pthread -DBABYGPT_IMPLEMENTATION -c library.cpp -o library.o
check "a program without the file" g++ -std=c++17 -I"$root" -pthread program.cpp library.o -o without
check "a program with the file" g++ -std=c++17 -I"$root" -pthread program.cpp library.o cuda.o "$cublas" -Wl,-rpath,"$(dirname "$cublas")" "$cudart" -ldl -lrt -o with
check "what it says without the file" sh -c './without | grep -q "without CUDA" || ./without'
check "what it says with the file" sh -c './with | grep -q -e "^trains" -e GPU -e NVIDIA -e "^CUDA" || ./with'
check "that the file changes it" sh -c './with | grep "without CUDA"; :'
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
