# make            build/babygpt, the command line
# make run        train a small GPT on the talk of a village (at most two minutes), then chat with it
# make test       the tests that need a compiler and make, nothing more (some two minutes on two cores)
# make test-all   these, some with sanitizers, too, and what needs Python, PyTorch, clang, cross-compilers or ../shared: says in a line what is not here and is left out
# make damage     damaged files for the readers: small ones cut at every byte and changed some 20,000 times, large ones cut at 1,000 places
# make exam       asks the villagers that make run trained 78 questions, each in three spellings
# make examples   every program in examples/
# make bench      how fast it is, in turns with PyTorch and llama.cpp where tools/bench/peers.sh installed them (half an hour;
#                 make bench options="--pairs 1 'train-*'" takes less; options=--help says what else)
# make cuda       build/cuda/babygpt, which trains on an NVIDIA GPU with --backend cuda; needs nvcc (nvcc=PATH, arch=native: for this machine alone)
# make cuda-test  babygpt_cuda.cu on the GPU that is here, against the processor; then under compute-sanitizer where that is installed
# make cuda-bench how fast it is there, in turns with PyTorch where python3 has it, and where the time of a step goes
# make matrix     compilers, standards, flags, hostile macros, leaked names
# make clean
#
# config=debug, config=sanitize (memory, undefined behaviour) and config=threads (races) build all this another way, into build/debug
# and so on: make test config=sanitize

MAKEFLAGS += -j$(shell getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)

config ?= release
standard ?= c++17
build := build$(if $(filter-out release,$(config)),/$(config))

flags.release := -O2
flags.debug := -O0 -g
flags.threads := -O1 -g -fsanitize=thread
flags.sanitize := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
ifeq ($(flags.$(config)),)
$(error config is "$(config)", but may be release, debug, sanitize or threads)
endif
warnings := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast -Wundef -Wdouble-promotion
compile = $(CXX) -I. -std=$(standard) $(flags.$(config)) $(warnings) -pthread $(CXXFLAGS)

# A test that defines BABYGPT_IMPLEMENTATION looks inside and compiles the header itself; the others link build/babygpt.o.
tests := $(patsubst tests/%.cpp,%,$(wildcard tests/*.cpp))
drivers := torch_steps
programs := $(filter-out $(drivers),$(tests))
inside := $(patsubst tests/%.cpp,%,$(shell grep -l '^.define BABYGPT_IMPLEMENTATION' tests/*.cpp))
nvcc ?= $(or $(shell command -v nvcc 2> /dev/null),/usr/local/cuda/bin/nvcc)
arch ?= all-major
# Those that run kernels on the CPU: tests/cuda_emulator.h takes the place of the thread sanitizer's library, so that it sees each access.
emulated := $(patsubst tests/%.cpp,%,$(shell grep -l '^.include "cuda_emulator.h"' tests/*.cpp))
watch := $(if $(filter sanitize,$(config)),,-DEMULATOR_WATCH -fsanitize=thread)
examples := $(patsubst examples/%.cpp,$(build)/examples/%,$(wildcard examples/*.cpp))

.PHONY: all always run test test-all damage exam examples bench cuda cuda-test cuda-bench matrix clean help
all: $(build)/babygpt

$(build)/babygpt.o: babygpt.h Makefile
	@mkdir -p $(@D)
	echo '#include "babygpt.h"' | $(compile) -DBABYGPT_IMPLEMENTATION -c -x c++ - -o $@
$(build)/babygpt: tools/babygpt.cpp $(build)/babygpt.o tools/measures.h
	$(compile) $(filter-out %.h,$^) $(LDFLAGS) -o $@
# Only what is timed needs -O2; the others compile sooner.
$(build)/babygpt: private flags.release := -Og
$(patsubst %,$(build)/tests/%,$(filter-out fast,$(tests))): private flags.release := -Og
$(build)/tests/golden $(build)/tests/json: private flags.release := -O0
$(emulated:%=$(build)/tests/%): private flags.release := -O1 -g
$(emulated:%=$(build)/tests/%): $(build)/tests/%: tests/%.cpp tests/check.h tests/cuda_emulator.h $(wildcard babygpt_cuda.cu) $(build)/babygpt.o
	@mkdir -p $(@D)
	$(compile) $(watch) -c $< -o $@.o
	$(compile) $@.o $(build)/babygpt.o $(LDFLAGS) -o $@
$(inside:%=$(build)/tests/%): $(build)/tests/%: tests/%.cpp tests/check.h babygpt.h
	@mkdir -p $(@D)
	$(compile) $< $(LDFLAGS) -o $@
$(filter-out $(patsubst %,$(build)/tests/%,$(inside) $(emulated)),$(tests:%=$(build)/tests/%)): $(build)/tests/%: tests/%.cpp tests/check.h $(build)/babygpt.o
	@mkdir -p $(@D)
	$(compile) $< $(build)/babygpt.o $(LDFLAGS) -o $@
$(build)/tests/measures: tools/measures.h
$(build)/tests/pictures: examples/vision.cpp
$(build)/ceilings: tools/bench/ceilings.cpp
	@mkdir -p $(@D)
	$(compile) $< $(LDFLAGS) -o $@
ifneq ($(filter test-all,$(MAKECMDGOALS)),)
$(examples): flags.release := -O0  # there they need no speed, and compile sooner
endif
$(examples): $(build)/examples/%: examples/%.cpp babygpt.h
	@mkdir -p $(@D)
	$(compile) $< $(LDFLAGS) -o $@

village := $(build)/village.safetensors
run: $(build)/babygpt
	$< train examples/village.txt --out $(village) --overwrite --time 110 --tokenizer bpe:1536 --layers 3 --heads 4 --width 96 --context 48 \
	    --batch 10 --lr 5e-3 --min-lr 1e-4 --validation-fraction 0 --user-turn "You: " --reply-turn "Mira: " --plain-words \
	    --log $(village:.safetensors=.csv) --plot $(village:.safetensors=.svg)
	@if [ -t 0 ]; then $< chat $(village); else $< chat $(village) < examples/village_talk.txt; fi

# Tests run side by side, as many as there are cores; each keeps its closing line.
results := $(build)/results
quick := $(patsubst %,$(results)/%,$(filter-out $(emulated),$(programs)) test_cli.sh)
# The longest stand first.
side_by_side := $(patsubst %,$(results)/%,$(emulated) nvcc.sh matrix.g++ matrix.clang++ compared platforms.sh sanitized damaged) $(quick)
$(programs:%=$(results)/%): $(results)/%: $(build)/tests/% always
	@sh tests/run.sh $@ $<
$(results)/%.sh: tests/%.sh $(build)/babygpt always
	@BABYGPT=$(build)/babygpt sh tests/run.sh $@ $<
$(results)/matrix.%: tests/matrix.sh always
	@sh tests/run.sh $@ '$< $*'
test: $(quick)
	@sh tests/run.sh --sum $^
# Damaged files: what make test does less often.
damage := '$(build)/tests/tokenizer small_gpt2_damage 20' '$(build)/tests/tokenizer large_gpt2_damage 100' '$(build)/tests/tokenizer piece_damage 40' '$(build)/tests/tokenizer real_damage 40' \
    '$(build)/tests/files huggingface 14' '$(build)/tests/files gguf_damage 3' '$(build)/tests/files damaged_resume 7' \
    '$(build)/tests/adapters damaged 7' '$(build)/tests/pictures damaged 20'
$(results)/damaged: $(patsubst %,$(build)/tests/%,tokenizer files adapters pictures) always
	@sh tests/run.sh $@ $(damage)
damage: $(patsubst %,$(build)/tests/%,tokenizer files data adapters pictures)
	@sh tests/run.sh $(results)/damage '$(build)/tests/tokenizer damage' '$(build)/tests/files' '$(build)/tests/data damaged' $(damage)
	@sh tests/run.sh --sum $(results)/damage
# What reads other people's files: with the sanitizers, too.
sanitized := $(patsubst %,build/sanitize/results/%,tokenizer files)
$(results)/sanitized: always
	@mkdir -p $(@D); echo 'with sanitizers:'; MAKEFLAGS= $(MAKE) -s config=sanitize $(sanitized) && cat $(sanitized) > $@
# With other people's programs. What times something stands alone, at the end.
compared := 'tools/compare_torch.py $(build)/tests/torch_steps' 'tools/compare_transformers.py --babygpt $(build)/babygpt' \
    'tools/compare_gguf.py --babygpt $(build)/babygpt' 'tools/compare_peft.py --babygpt $(build)/babygpt'
$(results)/compared: $(build)/babygpt $(build)/tests/torch_steps always
	@sh tests/run.sh $@ $(compared)
further := $(wildcard tests/test_*.py) 'tools/compare_tokenizers.py --babygpt $(build)/babygpt' \
    'tools/compare_measures.py --babygpt $(build)/babygpt --retrieval $(build)/examples/retrieval'
test-all: $(side_by_side) $(build)/ceilings $(tests:%=$(build)/tests/%) examples
	@BABYGPT=$(build)/babygpt sh tests/run.sh $(results)/further $(further)
	@sh tests/run.sh --sum $(side_by_side) $(results)/further
exam: $(build)/babygpt
	python3 tools/village_exam.py $(build)/babygpt $(village)

bench: $(build)/babygpt $(build)/ceilings
	@python3 tools/bench/bench.py --babygpt $(build)/babygpt --ceilings $(build)/ceilings --folder $(build)/bench $(options)

examples: $(examples)

# cuBLASLt is part of the toolkit; where that has been taken apart, of Python's packages.
cuda_places = $(dir $(nvcc)).. $(shell python3 -c 'import sys; print(*(p + "/nvidia/cu13" for p in sys.path if p))' 2> /dev/null)
cuda_has = $(firstword $(wildcard $(foreach place,$(cuda_places),$(1:%=$(place)/%))))
cuda_include = $(patsubst %/cublasLt.h,-isystem %,$(call cuda_has,include/cublasLt.h))
cuda_cublas = $(call cuda_has,lib64/libcublasLt.so lib64/libcublasLt.so.* lib/libcublasLt.so lib/libcublasLt.so.*)
cuda_libraries = $(cuda_cublas) -Wl,-rpath,$(dir $(cuda_cublas)) $(call cuda_has,lib64/libcudart_static.a lib/libcudart_static.a lib64/libcudart.so lib/libcudart.so.*) -ldl -lrt
cuda: $(build)/cuda/babygpt
$(build)/cuda/babygpt_cuda.o: babygpt_cuda.cu babygpt.h
	@mkdir -p $(@D)
	@command -v $(nvcc) > /dev/null || { echo "make cuda needs nvcc, of NVIDIA's CUDA toolkit, which is not here (nvcc=PATH says where)"; exit 1; }
	$(nvcc) -t 0 -std=$(standard) -O3 -arch=$(arch) -Xcompiler -Wall,-Wextra $(cuda_include) -c $< -o $@
$(build)/cuda/babygpt: tools/babygpt.cpp $(build)/babygpt.o $(build)/cuda/babygpt_cuda.o tools/measures.h
	$(compile) $(filter-out %.h,$^) $(LDFLAGS) $(cuda_libraries) -o $@
$(build)/cuda/test: tests/cuda.cpp tests/check.h $(build)/babygpt.o $(build)/cuda/babygpt_cuda.o
	$(compile) -DON_A_GPU $(cuda_include) -isystem $(dir $(nvcc))../include $(filter-out %.h,$^) $(LDFLAGS) $(cuda_libraries) -o $@
$(build)/cuda/products: tools/bench/products.cu
	@mkdir -p $(@D)
	$(nvcc) -std=$(standard) -O3 -arch=$(arch) -Xcompiler -Wall,-Wextra $(cuda_include) -c $< -o $@.o
	$(CXX) $@.o $(LDFLAGS) $(cuda_libraries) -o $@
cuda-test: $(build)/cuda/test
	@sh tests/cuda.sh $<
cuda-bench: $(build)/cuda/babygpt $(build)/cuda/products
	@python3 -u tools/bench/bench.py --cuda --babygpt $< --folder $(build)/bench --pairs 1 --seconds 3 --save $(build)/cuda/bench.json $(options)
	@for batch in 512 64; do echo; $< bench --profile --backend cuda --precision bf16 --batch $$batch --seconds 2 || exit 0; \
	    python3 tools/bench/kernels.py $< --batch $$batch --precision bf16; $(build)/cuda/products $$batch; done
matrix: $(results)/matrix.g++ $(results)/matrix.clang++
	@sh tests/run.sh --sum $^
clean:
	rm -rf build
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
