#!/bin/sh
# Installs what `make bench` compares babygpt with, PyTorch (for the CPU) and llama.cpp (llama-cpp-python, gguf), into a virtual environment:
#
#     sh tools/bench/peers.sh [FOLDER]      (build/peers)
#
# llama.cpp is built from source for this very processor, which takes about ten minutes and needs cmake's package and a C++ compiler.
set -eu
folder=${1:-build/peers}
python=${PYTHON:-python3}
"$python" -m venv "$folder"
# Where PyTorch's own index does not answer, PyPI's build serves as well; on Linux it brings CUDA's libraries along, five gigabytes.
"$folder/bin/pip" install --extra-index-url https://download.pytorch.org/whl/cpu torch
CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}" "$folder/bin/pip" install --no-binary llama-cpp-python llama-cpp-python gguf numpy
"$folder/bin/python" -c '
import gguf, llama_cpp, torch
print(f"PyTorch {torch.__version__} and llama-cpp-python {llama_cpp.__version__} are in {__import__(\"sys\").prefix}")'
