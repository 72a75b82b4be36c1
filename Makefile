# train_moe: `make train_moe` needs a C compiler and make; `make help` lists the rest.

ifeq ($(origin CC),default)
CC := $(shell command -v gcc || command -v clang || echo cc)
endif
# $(call accepts,FLAGS,PROGRAM): FLAGS, if the compiler builds PROGRAM with them
accepts = $(shell printf '$(2)\nint main(void) { return 0; }\n' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo "$(1)")

ARCH   := $(or $(call accepts,-march=native -mprefer-vector-width=512),$(call accepts,-march=native),$(call accepts,-mcpu=native))
RT     := $(call accepts,-lrt) # aio_fsync, before glibc 2.34
OPENMP := $(or $(call accepts,-fopenmp,\043include <omp.h>),-Wno-unknown-pragmas)
CFLAGS ?= -O3
# CI sets WERROR=-Werror
WARN    = -Wall -Wextra $(WERROR)
# One rounding for a multiply-add, and arithmetic that sets no errno and no flags, which lets sqrt and conditions become vectors;
# never -ffast-math, which would break the checks for NaN and the same bits every time.
FLOATS  = -ffp-contract=fast -fno-math-errno -fno-trapping-math
BUILD   = $(CC) -std=gnu11 $(CFLAGS) $(WARN) $(ARCH) $(FLOATS)
LIBS   := -lm

# Tests and benchmarks do not spin while they wait; train_moe sees to that by itself.
export OMP_WAIT_POLICY ?= passive

TRAINER = train_moe.c $(wildcard data/*.h dev/*.h dev/cpu/*.h dev/ranks/*.h dev/routers/*.h)

.PHONY: help test test_mpi test_plain test_avx2 test_arm64 bench_mpi sanitize tsan valgrind check_tokenizer check_hf bench bench_all format clean

##train_moe: the trainer, the data tools and the built-in stories
train_moe: $(TRAINER) | data/stories/tokenizer.json
	$(BUILD) $(OPENMP) train_moe.c -o $@ $(LIBS)

##train_moe_double: the same in double precision
train_moe_double: $(TRAINER)
	$(BUILD) $(OPENMP) -DREAL=double train_moe.c -o $@ $(LIBS)

# MPI's compiler wrapper, around the compiler that the rest is built by; Debian: openmpi-bin libopenmpi-dev
MPICC ?= mpicc
MPI_BUILD = OMPI_CC=$(CC) MPICH_CC=$(CC) $(MPICC) -std=gnu11 $(CFLAGS) $(WARN) $(ARCH) $(FLOATS) $(OPENMP) -DUSE_MPI
NEED_MPI = @command -v $(firstword $(MPICC)) >/dev/null || { echo "no $(MPICC) here: install MPI (Debian: openmpi-bin libopenmpi-dev)"; exit 1; }

##train_moe_mpi: the trainer for several processes: mpirun -np 4 ./train_moe_mpi; needs MPI
train_moe_mpi: $(TRAINER) | data/stories/tokenizer.json
	$(NEED_MPI)
	$(MPI_BUILD) train_moe.c -o $@ $(LIBS)

##train_moe_mpi_double: the same in double
train_moe_mpi_double: $(TRAINER)
	$(NEED_MPI)
	$(MPI_BUILD) -DREAL=double train_moe.c -o $@ $(LIBS)

train_moe_mpi train_moe_mpi_double dev/test_ranks dev/test_ranks_double dev/emulated/%: LIBS += $(RT)

##bench_mpi: a step on one process and on two, with and without overlap; the bytes sent against what they should be
bench_mpi: train_moe_mpi
	dev/bench_mpi.sh

##dev/scale: simulates a step on 8 to 2,048 devices (doc/scale.md); --check holds it against published figures
dev/scale: dev/scale.c $(TRAINER)
	$(BUILD) $(OPENMP) dev/scale.c -o $@ $(LIBS)

# PRECISION=fp32: everything in float32, to be compared with the C twin. Without a GPU to ask, for the A100 and the H100.
PRECISION ?= bf16
ifeq ($(filter bf16 fp32,$(PRECISION)),)
$(error PRECISION is bf16 or fp32, not $(PRECISION))
endif
CUDA      := $(patsubst %/bin/,%,$(dir $(shell command -v nvcc || echo /usr/local/cuda/bin/nvcc)))
NVCC      ?= $(CUDA)/bin/nvcc
GPU       := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -Ex '[0-9]+\.[0-9]+' | head -1 | tr -d .)
GPU_ARCH  := $(foreach a,$(or $(GPU),80 90),-gencode arch=compute_$(a),code=sm_$(a))
precision  = $(if $(filter fp32,$(1)),-DFP32)
CUDA_BUILD = $(NVCC) -std=c++17 -O3 -lineinfo -I. -diag-suppress 1675,128 $(GPU_ARCH) \
    -Xcompiler "$(ARCH) $(FLOATS) $(filter -fopenmp,$(OPENMP)) $(WERROR)"

NEED_NVCC  = @command -v $(NVCC) >/dev/null || { echo "no nvcc here: install the CUDA Toolkit, or say where it is: make $@ CUDA=/path"; exit 1; }

##train_moe_cu: the trainer on an NVIDIA GPU; needs the CUDA Toolkit. PRECISION=fp32 builds it in float32, for checks
train_moe_cu: train_moe.cu $(TRAINER) dev/built_$(PRECISION) | data/stories/tokenizer.json
	$(NEED_NVCC)
	$(CUDA_BUILD) $(call precision,$(PRECISION)) train_moe.cu -o $@ -lcublas

##train_moe_cu_nccl: the same for several GPUs: mpirun -np 8 ./train_moe_cu_nccl; needs MPI and NCCL besides
MPICXX ?= mpicxx
USE_NCCL = -DUSE_MPI -DUSE_NCCL -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
train_moe_cu_nccl: train_moe.cu $(TRAINER) dev/built_$(PRECISION) | data/stories/tokenizer.json
	$(NEED_NVCC)
	$(NEED_MPI)
	@echo '\043include <nccl.h>' | $(NVCC) -x cu -E - >/dev/null 2>&1 || { echo "no nccl.h here: install NCCL (libnccl-dev)"; exit 1; }
	OMPI_CXX=$(CXX) MPICH_CXX=$(CXX) $(CUDA_BUILD) -ccbin $(MPICXX) $(USE_NCCL) $(call precision,$(PRECISION)) \
	    train_moe.cu -o $@ -lcublas -lnccl $(RT)

# Another PRECISION is another program.
dev/built_%:
	@rm -f dev/built_*; touch $@

##data/tokenize: trains tokenizers and turns texts into token files
data/tokenize: data/tokenize.c $(TRAINER)
	$(BUILD) $(OPENMP) data/tokenize.c -o $@ $(LIBS)

data/make_stories: data/stories.c
	$(BUILD) data/stories.c -o $@

##data/stories/tokenizer.json: the built-in stories as tokens
data/stories/tokenizer.json: data/make_stories data/tokenize
	rm -rf data/stories data/stories.new && mkdir data/stories.new
	data/make_stories --count 24000 > data/stories.new/train.txt
	data/make_stories --first 24000 --count 500 > data/stories.new/valid.txt
	data/tokenize --vocab 1900 data/stories.new/train.txt data/stories.new/valid.txt --out data/stories.new
	rm data/stories.new/train.txt data/stories.new/valid.txt
	mv data/stories.new data/stories

# What Debian, Fedora, Arch and Homebrew call cmocka.
define GET_CMOCKA
	@printf '\043include <stdarg.h>\n\043include <stddef.h>\n\043include <stdint.h>\n\043include <setjmp.h>\n\043include <cmocka.h>\nint main(void) { return 0; }\n' \
	| $(CC) -x c - -o /dev/null >/dev/null 2>&1 || { echo "cmocka is missing; installing it with the system's package manager"; \
	s=; [ "$$(id -u)" = 0 ] || s=sudo; \
	if command -v apt-get >/dev/null; then $$s apt-get update -qq && $$s apt-get install -y -qq libcmocka-dev; \
	elif command -v dnf >/dev/null; then $$s dnf install -y libcmocka-devel; \
	elif command -v pacman >/dev/null; then $$s pacman -S --noconfirm cmocka; \
	elif command -v brew >/dev/null; then brew install cmocka; \
	else echo "no known package manager: install cmocka by hand"; exit 1; fi; }
endef

TEST_BUILD = $(CC) -std=gnu11 -O2 -g $(WARN) $(ARCH) $(FLOATS)
CMOCKA = -lcmocka
TEST_FILES = test_moe.c $(TRAINER)

dev/test_moe: $(TEST_FILES)
	$(GET_CMOCKA)
	$(TEST_BUILD) $(OPENMP) test_moe.c -o $@ -lcmocka $(LIBS)

dev/test_moe_double: $(TEST_FILES)
	$(GET_CMOCKA)
	$(TEST_BUILD) $(OPENMP) -DREAL=double test_moe.c -o $@ -lcmocka $(LIBS)

##test: the tests, in float and in double, and the CUDA twin's; installs cmocka if it is missing
test: dev/test_moe dev/test_moe_double train_moe train_moe_double data/tokenize
	dev/test_moe
	dev/test_moe_double
	@if command -v $(CXX) >/dev/null; then $(MAKE) --no-print-directory -j2 test_emulated; \
	else echo "the CUDA twin's tests are not run: they need a C++ compiler"; fi

dev/test_ranks dev/test_ranks_double: $(TEST_FILES)
	$(GET_CMOCKA)
	$(NEED_MPI)
	OMPI_CC=$(CC) MPICH_CC=$(CC) $(MPICC) -std=gnu11 -O2 -g $(WARN) $(ARCH) $(FLOATS) $(OPENMP) -DUSE_MPI -Wno-unused-function \
	    $(if $(findstring double,$@),-DREAL=double) test_moe.c -o $@ -lcmocka $(LIBS)

# More processes than cores, and, in a container, by root.
MPIRUN ?= OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 mpirun

##test_mpi: several processes against one: every recipe, uneven loads, crashes; needs MPI
test_mpi: dev/test_ranks dev/test_ranks_double dev/test_moe train_moe_mpi
	$(MPIRUN) -np 4 dev/test_ranks_double
	$(MPIRUN) -np 4 dev/test_ranks
	MPIRUN="env $(MPIRUN)" TRAIN_MOE_MPI=./train_moe_mpi TEST='test_mpi_*' dev/test_moe

# The CUDA twin on the processor: dev/cudacpu looks like the few headers that train_moe.cu includes, and sed writes a kernel's
# start as a function call. The compiler may not invent operations here, since invalid ones are errors (hence no
# -fno-trapping-math).
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v clang++ || echo c++)
endif
EMULATED_FLAGS = -x c++ -std=gnu++17 -O2 -g $(WARN) -Wno-unknown-pragmas $(ARCH) -ffp-contract=fast -fno-math-errno \
    $(if $(findstring clang,$(CXX)),-ffp-exception-behavior=maytrap) $(OPENMP) -DCUDACPU -Idev/cudacpu -I.
EMULATED = $(CXX) $(EMULATED_FLAGS)
# With NCCL, which MPI answers: mpicxx calls the same compiler.
EMULATED_NCCL = OMPI_CXX=$(CXX) MPICH_CXX=$(CXX) $(MPICXX) $(EMULATED_FLAGS) $(USE_NCCL)
CUDACPU  = $(wildcard dev/cudacpu/*.h) dev/cudacpu/rewrite.sed
TWIN     = -DTWIN='"dev/emulated/train_moe_cu.cpp"'

dev/emulated/train_moe_cu.cpp: train_moe.cu dev/cudacpu/rewrite.sed
	@mkdir -p dev/emulated
	(echo '#line 1 "train_moe.cu"'; sed -E -f dev/cudacpu/rewrite.sed train_moe.cu) > $@

dev/emulated/check.cpp: dev/cudacpu/check.cu dev/cudacpu/rewrite.sed
	@mkdir -p dev/emulated
	(echo '#line 1 "check.cu"'; sed -E -f dev/cudacpu/rewrite.sed dev/cudacpu/check.cu) > $@

dev/emulated/train_moe_cu: dev/emulated/train_moe_cu.cpp $(TRAINER) $(CUDACPU)
	$(EMULATED) $< -o $@ $(LIBS)

dev/emulated/check: dev/emulated/check.cpp $(CUDACPU)
	$(EMULATED) $< -o $@ $(LIBS)

dev/emulated/check_nccl.cpp: dev/cudacpu/check_nccl.cu dev/cudacpu/rewrite.sed
	@mkdir -p dev/emulated
	(echo '#line 1 "check_nccl.cu"'; sed -E -f dev/cudacpu/rewrite.sed dev/cudacpu/check_nccl.cu) > $@

dev/emulated/check_nccl: dev/emulated/check_nccl.cpp $(CUDACPU)
	$(NEED_MPI)
	$(EMULATED_NCCL) $< -o $@ $(LIBS)

dev/emulated/check_nccl_asan: dev/emulated/check_nccl.cpp $(CUDACPU)
	$(EMULATED_NCCL) $(SANITIZE) $< -o $@ $(LIBS)

dev/emulated/test_%: dev/emulated/train_moe_cu.cpp $(TEST_FILES) $(CUDACPU)
	$(GET_CMOCKA)
	$(EMULATED) $(call precision,$*) $(TWIN) test_moe.c -o $@ -lcmocka $(LIBS)

##check_nccl: the emulator's NCCL with one to four ranks, and its mistakes; needs MPI
.PHONY: check_nccl
check_nccl: dev/emulated/check_nccl
	dev/emulated/check_nccl

dev/emulated/train_moe_cu_nccl: dev/emulated/train_moe_cu.cpp $(TRAINER) $(CUDACPU)
	$(NEED_MPI)
	$(EMULATED_NCCL) $< -o $@ $(LIBS)

dev/emulated/test_ranks_%: dev/emulated/train_moe_cu.cpp $(TEST_FILES) $(CUDACPU)
	$(GET_CMOCKA)
	$(NEED_MPI)
	$(EMULATED_NCCL) $(call precision,$*) $(TWIN) -Wno-unused-function test_moe.c -o $@ -lcmocka $(LIBS)

##test_emulated: the CUDA twin's tests on the processor, in bfloat16 and in float32
.PHONY: test_emulated test_cu sanitize_cu
test_emulated: dev/emulated/check dev/emulated/train_moe_cu dev/emulated/test_bf16 dev/emulated/test_fp32 train_moe
	dev/emulated/check
	TRAIN_MOE_CU=dev/emulated/train_moe_cu dev/emulated/test_bf16
	TRAIN_MOE_CU=dev/emulated/train_moe_cu dev/emulated/test_fp32

##test_nccl: the CUDA twin on several processes, in the emulator, against the C twin alone; needs MPI
.PHONY: test_nccl
test_nccl: dev/emulated/test_ranks_fp32 dev/emulated/test_ranks_bf16
	OMP_NUM_THREADS=1 $(MPIRUN) -np 4 dev/emulated/test_ranks_fp32
	OMP_NUM_THREADS=1 $(MPIRUN) -np 4 dev/emulated/test_ranks_bf16

##bench_cu: the CUDA twin's speed: peak, steps beside dense, each kernel, experts, attention, generation, PyTorch (TORCH_PYTHON)
.PHONY: bench_cu
bench_cu: dev/bench_cu
	dev/bench_cu $(BENCH)

dev/bench_cu: dev/bench.cu train_moe.cu $(TRAINER) dev/built_$(PRECISION)
	$(CUDA_BUILD) $(call precision,$(PRECISION)) dev/bench.cu -o $@ -lcublas

dev/emulated/bench_cu.cpp: dev/bench.cu dev/cudacpu/rewrite.sed
	@mkdir -p dev/emulated
	(echo '#line 1 "dev/bench.cu"'; sed -E -f dev/cudacpu/rewrite.sed dev/bench.cu) > $@

dev/emulated/bench_cu: dev/emulated/bench_cu.cpp dev/emulated/train_moe_cu.cpp $(TRAINER) $(CUDACPU)
	$(EMULATED) $(TWIN) $< -o $@ $(LIBS)

##test_cu: the same tests on a GPU
test_cu: train_moe_cu train_moe
	$(GET_CMOCKA)
	$(CUDA_BUILD) -DTWIN='"train_moe.cu"' -x cu test_moe.c -o dev/test_moe_cu_bf16 -lcmocka -lcublas
	$(CUDA_BUILD) -DTWIN='"train_moe.cu"' -DFP32 -x cu test_moe.c -o dev/test_moe_cu_fp32 -lcmocka -lcublas
	dev/test_moe_cu_bf16
	dev/test_moe_cu_fp32

##sanitize_cu: the CUDA twin's tests on a GPU under compute-sanitizer
sanitize_cu: test_cu
	for tool in memcheck racecheck initcheck synccheck; do \
	compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 9 dev/test_moe_cu_bf16 || exit 1; done

# $(call SHORT_RUN,PROGRAM,FOLDER): a short training, a resumed one, and a story
define SHORT_RUN
	rm -rf $(2)
	$(1) --out $(2) --steps 3 --layers 2 --dim 32 --heads 2 --ffn 32 --seq 32 --batch 2 --eval-batches 2 --tokens 20 --save-every 2
	$(1) --out $(2) --resume --steps 4
	$(1) --out $(2) --prompt "Once upon" --tokens 20
	rm -rf $(2)
endef

# The tests of another build, in a folder laid out like this one. EMULATOR runs them where this machine's processor cannot.
.PHONY: test_in
test_in:
	mkdir -p $(IN)/data
	$(TEST_BUILD) $(OPENMP) data/tokenize.c -o $(IN)/data/tokenize $(LIBS)
	$(TEST_BUILD) $(OPENMP) train_moe.c -o $(IN)/train_moe $(LIBS)
	$(TEST_BUILD) $(OPENMP) -DREAL=double train_moe.c -o $(IN)/train_moe_double $(LIBS)
	$(TEST_BUILD) $(OPENMP) test_moe.c -o $(IN)/test_moe $(CMOCKA) $(LIBS)
	$(TEST_BUILD) $(OPENMP) -DREAL=double test_moe.c -o $(IN)/test_moe_double $(CMOCKA) $(LIBS)
ifdef EMULATOR
	cd $(IN) && for program in train_moe train_moe_double data/tokenize; do mv $$program $$program.bin && \
	printf '#!/bin/sh\nexec $(EMULATOR) -0 "$$0" "$$0.bin" "$$@"\n' > $$program && chmod +x $$program || exit 1; done
	$(call SHORT_RUN,$(IN)/train_moe,$(IN)/run)
endif
	cd $(IN) && $(EMULATOR) ./test_moe
	cd $(IN) && $(EMULATOR) ./test_moe_double

##test_plain: the tests built for any processor of this family: SSE2 alone, on x86-64
test_plain:
	$(GET_CMOCKA)
	@$(MAKE) --no-print-directory test_in IN=dev/plain ARCH=

##test_avx2: the tests built for AVX2 and FMA, without AVX-512
test_avx2:
	$(GET_CMOCKA)
	@if grep -qsw avx2 /proc/cpuinfo; then $(MAKE) --no-print-directory test_in IN=dev/avx2 ARCH=-march=haswell; \
	else echo "not run: this processor has no AVX2"; fi

# cmocka for arm64: apt with lists of its own fetches Debian's, and nothing of the system changes.
ARM64_APT = apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Dir::State::Lists=$(CURDIR)/dev/arm64/lists -o Dir::State::status=/dev/null -o Dir::Cache=$(CURDIR)/dev/arm64
dev/arm64/usr/include/cmocka.h:
	rm -rf dev/arm64 && mkdir -p dev/arm64/lists/partial dev/arm64/archives/partial
	cd dev/arm64 && $(ARM64_APT) update && $(ARM64_APT) download libcmocka-dev libcmocka0
	cd dev/arm64 && for package in *.deb; do dpkg-deb -x $$package . || exit 1; done

##test_arm64: the tests built for 64-bit Arm, in small sizes, under qemu; needs Debian's cross compiler and qemu-user
ARM64 := /usr/aarch64-linux-gnu
test_arm64: data/stories/tokenizer.json
	@if command -v aarch64-linux-gnu-gcc && command -v qemu-aarch64 && [ -f $(ARM64)/lib/libc.so.6 ]; then \
	$(MAKE) --no-print-directory dev/arm64/usr/include/cmocka.h && VALGRIND=1 $(MAKE) --no-print-directory test_in IN=dev/arm64 \
	    CC=aarch64-linux-gnu-gcc ARCH= EMULATOR="qemu-aarch64 -L $(ARM64)" CMOCKA="-isystem dev/arm64/usr/include \
	    -Ldev/arm64/usr/lib/aarch64-linux-gnu -Wl,-rpath,usr/lib/aarch64-linux-gnu -lcmocka"; \
	else echo "not run: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"; fi

##sanitize: the tests and a short training under AddressSanitizer and UBSan; sanitize_double: those in double, in small sizes
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
.PHONY: sanitize sanitize_double
sanitize: data/stories/tokenizer.json
	$(GET_CMOCKA)
	$(TEST_BUILD) $(OPENMP) $(SANITIZE) data/tokenize.c -o dev/tokenize_asan $(LIBS)
	$(TEST_BUILD) $(OPENMP) $(SANITIZE) train_moe.c -o dev/train_moe_asan $(LIBS)
	$(TEST_BUILD) $(OPENMP) $(SANITIZE) test_moe.c -o dev/test_moe_asan -lcmocka $(LIBS)
	TRAIN_MOE=dev/train_moe_asan TOKENIZE=dev/tokenize_asan dev/test_moe_asan
	$(call SHORT_RUN,dev/train_moe_asan,dev/asan_run)
	if command -v $(CXX) >/dev/null; then $(MAKE) --no-print-directory sanitize_emulated; fi

sanitize_double:
	$(GET_CMOCKA)
	$(TEST_BUILD) $(OPENMP) $(SANITIZE) -DREAL=double test_moe.c -o dev/test_moe_asan_double -lcmocka $(LIBS)
	VALGRIND=1 dev/test_moe_asan_double

##sanitize_emulated: the CUDA twin's tests on the processor, under AddressSanitizer
.PHONY: sanitize_emulated
sanitize_emulated: dev/emulated/check.cpp dev/emulated/train_moe_cu.cpp train_moe
	$(EMULATED) $(SANITIZE) $< -o dev/emulated/check_asan $(LIBS)
	dev/emulated/check_asan
	$(EMULATED) -O1 $(SANITIZE) $(TWIN) test_moe.c -o dev/emulated/test_asan -lcmocka $(LIBS)
	VALGRIND=1 TRAIN_MOE_CU= dev/emulated/test_asan # without the longest

##tsan: short trainings under ThreadSanitizer (clang and its OpenMP runtime, with Archer, which knows OpenMP's barriers)
ARCHER := $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
tsan: data/stories/tokenizer.json
	clang -std=gnu11 -O1 -g $(WARN) $(ARCH) -fsanitize=thread -fopenmp train_moe.c -o dev/train_moe_tsan $(LIBS)
	rm -rf dev/tsan_run
	for recipe in mixtral hierarchical deepseek-v2 cmoe expert-choice base mh-moe rmoe; do rm -rf dev/tsan_run; \
	OMP_TOOL_LIBRARIES=$(ARCHER) TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" dev/train_moe_tsan --threads 4 \
	    --out dev/tsan_run --recipe $$recipe --steps 4 --layers 2 --dim 32 --heads 2 --ffn 32 --seq 32 --eval-batches 2 \
	    --tokens 20 || exit 1; done
	rm -rf dev/tsan_run

# valgrind 3.19 does not know AVX-512, hence another ARCH; one thread, since libgomp is not made for it.
##valgrind: a short training and the tests under valgrind
# In the tests, children that are meant to fail end without freeing; AddressSanitizer looks for the tests' leaks.
VALGRIND := valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,possible
valgrind: data/stories/tokenizer.json
	$(GET_CMOCKA)
	$(CC) -std=gnu11 -O2 -g $(WARN) -Wno-unknown-pragmas train_moe.c -o dev/train_moe_valgrind $(LIBS)
	$(CC) -std=gnu11 -O2 -g $(WARN) -Wno-unknown-pragmas test_moe.c -o dev/test_moe_valgrind -lcmocka $(LIBS)
	$(call SHORT_RUN,$(VALGRIND) dev/train_moe_valgrind,dev/valgrind_run)
	VALGRIND=1 $(VALGRIND) --leak-check=no --child-silent-after-fork=yes dev/test_moe_valgrind

# OpenBLAS is only there to be compared with. What it finds out about a processor may be too little, so it is told of AVX-512;
# and its threads shall not spin for long while ours work.
BLAS := $(call accepts,-DOPENBLAS -lopenblas,\043include <cblas.h>)
dev/bench: dev/bench.c train_moe.c dev/plain.h data/unicode.h
	$(BUILD) $(OPENMP) dev/bench.c -o $@ $(BLAS) $(LIBS)

# llm.c's own flags
dev/llmc_step: dev/llmc_step.c
	$(CC) -Ofast $(WARN) $(ARCH) $(OPENMP) dev/llmc_step.c -o $@ $(LIBS)

##bench: peak, products, layers, steps, the mixture's tax, generation, and PyTorch (TORCH_PYTHON names one that has it), in one run
##bench_all: the same, and a larger model beside PyTorch
bench bench_all: dev/bench dev/llmc_step
	export OPENBLAS_THREAD_TIMEOUT=20; ! grep -qsw avx512f /proc/cpuinfo || export OPENBLAS_CORETYPE=SkylakeX; \
	dev/bench $(if $(filter bench_all,$@),--all) $(BENCH)

dev/logits: dev/logits.c $(TRAINER)
	$(BUILD) $(OPENMP) dev/logits.c -o $@ $(LIBS)

##format: lays the code out as .clang-format says
format:
	clang-format -i train_moe.c test_moe.c data/*.c

##clean: removes what was built (the built-in stories too), but not other data and the runs
clean:
	rm -f train_moe train_moe_double data/tokenize data/make_stories dev/logits dev/bench dev/llmc_step dev/test_moe \
	    dev/test_moe_double dev/scale train_moe_mpi train_moe_mpi_double train_moe_cu_nccl dev/test_ranks dev/test_ranks_double
	rm -rf dev/plain dev/avx2 dev/arm64 dev/emulated
	rm -f train_moe_cu dev/bench_cu dev/test_moe_cu_* dev/built_*
	rm -f dev/*_asan dev/*_asan_double dev/*_valgrind dev/*_tsan
	rm -rf data/stories data/stories.new

help:
	@sed -n 's/^##//p' Makefile
