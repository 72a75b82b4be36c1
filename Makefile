# train_moe: `make train_moe` needs a C compiler and make; `make help` lists the rest.

ifeq ($(origin CC),default)
CC := $(shell command -v gcc || command -v clang || echo cc)
endif
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v clang++ || echo c++)
endif
# $(call accepts,FLAGS,PROGRAM): FLAGS, if the compiler builds PROGRAM with them
# (not to /dev/null: there are compilers that remove what they write to, and root can remove that)
accepts = $(shell d=$$(mktemp -d) && printf '$(2)\nint main(void) { return 0; }\n' | $(CC) $(1) -x c - -o "$$d/a" >/dev/null 2>&1 && \
    echo "$(1)"; rm -rf "$$d")

ARCH   := $(or $(call accepts,-march=native -mprefer-vector-width=512),$(call accepts,-march=native),$(call accepts,-mcpu=native))
RT     := $(call accepts,-lrt) # aio_fsync, before glibc 2.34
# $(call runs,FLAGS): FLAGS, if a program of OpenMP that is built with them runs here. Where no program at all runs, because the
# compiler builds for another processor, it is enough that it is built.
runs = $(shell d=$$(mktemp -d) && printf '\043include <omp.h>\nint main(void) { return omp_get_num_procs() < 1; }\n' > "$$d/a.c" && \
    printf 'int main(void) { return 0; }\n' > "$$d/b.c" && $(CC) $(1) "$$d/a.c" -o "$$d/a" >/dev/null 2>&1 && \
    { "$$d/a" >/dev/null 2>&1 || { $(CC) "$$d/b.c" -o "$$d/b" >/dev/null 2>&1 && ! "$$d/b" >/dev/null 2>&1; }; } && \
    echo "$(1)"; rm -rf "$$d")
# Apple's compiler has no -fopenmp, but it takes Homebrew's libomp.
LIBOMP := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
OPENMP := $(or $(call runs,-fopenmp),$(if $(LIBOMP),$(call runs,-Xpreprocessor -fopenmp -I$(LIBOMP)/include -L$(LIBOMP)/lib \
    -lomp)),-Wno-unknown-pragmas)
CFLAGS ?= -O3
# CI sets WERROR=-Werror
WARN    = -Wall -Wextra $(WERROR)
# One rounding for a multiply-add, and arithmetic that sets no errno and no flags, which lets sqrt and conditions become vectors;
# never -ffast-math, which would break the checks for NaN and the same bits every time.
FLOATS  = -ffp-contract=fast -fno-math-errno -fno-trapping-math
# No function needs more than 16 KiB of stack, of which some systems give a thread very little.
STACK   = -Wframe-larger-than=16384
FLAGS   = -std=gnu11 $(CFLAGS) $(WARN) $(STACK) $(ARCH) $(FLOATS) -I.
BUILD   = $(CC) $(FLAGS)
LIBS   := -lm

# The compiler writes down which headers a program was made of; the last lines of this file read it.
DEPS = -MMD -MP -MT $@ -MF dev/build/$(subst /,_,$@).d

# PLAIN=1 builds the plain loops of train_moe.c, without the fast ones of dev/cpu. These empty files tell make that another
# PLAIN, or another PRECISION, is another program.
LOOPS      = $(if $(filter 1,$(PLAIN)),-DPLAIN)
PRECISION ?= bf16
CHOICE     = dev/build/plain_$(if $(LOOPS),1,0)
CU_CHOICE  = $(CHOICE) dev/build/precision_$(PRECISION)
dev/build/plain_% dev/build/precision_%:
	@mkdir -p dev/build && rm -f $(@:$*=)* && touch $@

.PHONY: help test test_moe cmocka clean

##train_moe: the trainer, the data tools and the built-in stories. PLAIN=1 builds it of the plain loops alone
train_moe: train_moe.c $(CHOICE) | data/stories/tokenizer.json
	$(BUILD) $(DEPS) $(LOOPS) $(OPENMP) train_moe.c -o $@ $(LIBS)

##train_moe_double: the same in double precision
train_moe_double: train_moe.c $(CHOICE)
	$(BUILD) $(DEPS) $(LOOPS) $(OPENMP) -DREAL=double train_moe.c -o $@ $(LIBS)

##train_moe_mpi: the trainer for several processes: mpirun -np 4 ./train_moe_mpi; needs MPI (Debian: openmpi-bin libopenmpi-dev)
# MPI's compiler wrapper goes around the compiler that builds the rest.
MPICC ?= mpicc
WITH_MPI = OMPI_CC=$(CC) MPICH_CC=$(CC) $(MPICC)
NEED_MPI = @command -v $(firstword $(MPICC)) >/dev/null || { echo "no $(MPICC) here: install MPI (Debian: openmpi-bin libopenmpi-dev)"; exit 1; }
train_moe_mpi: train_moe.c $(CHOICE) | data/stories/tokenizer.json
	$(NEED_MPI)
	$(WITH_MPI) $(FLAGS) $(DEPS) $(LOOPS) $(OPENMP) -DUSE_MPI train_moe.c -o $@ $(LIBS) $(RT)

##train_moe_cu: the trainer on an NVIDIA GPU; needs the CUDA Toolkit. PRECISION=fp32 builds it in float32, for checks
# It has machine code for the GPU that is found (GPU=90 names another), else for the A100, the H100 and the RTX 50, which run on
# their kin (sm_86, sm_89) as well. Chips without machine code of their own, as the B200, start from PTX, which the driver
# compiles at the first start: that of compute_90 serves all that are newer.
ifeq ($(filter bf16 fp32,$(PRECISION)),)
$(error PRECISION is bf16 or fp32, not $(PRECISION))
endif
CUDA      := $(patsubst %/bin/,%,$(dir $(shell command -v nvcc || echo /usr/local/cuda/bin/nvcc)))
NVCC      ?= $(CUDA)/bin/nvcc
GPU       := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -Ex '[0-9]+\.[0-9]+' | head -1 | tr -d .)
CHIPS      = $(or $(GPU),$(filter $(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code 2>/dev/null)),80 90 120),80 90)
GPU_ARCH   = $(foreach a,$(CHIPS),-gencode arch=compute_$(a),code=sm_$(a)) $(foreach a,$(or $(GPU),90),-gencode \
    arch=compute_$(a),code=compute_$(a)) --threads 0
precision  = $(if $(filter fp32,$(1)),-DFP32)
CUDA_BUILD = $(NVCC) -std=c++17 -O3 -lineinfo -I. -diag-suppress 1675,128 $(GPU_ARCH) $(LOOPS) \
    -Xcompiler "$(ARCH) $(FLOATS) $(filter -fopenmp,$(OPENMP)) $(WERROR)"
NEED_NVCC  = @command -v $(NVCC) >/dev/null || { echo "no nvcc here: install the CUDA Toolkit, or say where it is: make $@ CUDA=/path"; exit 1; }
train_moe_cu: train_moe.cu $(CU_CHOICE) | data/stories/tokenizer.json
	$(NEED_NVCC)
	$(CUDA_BUILD) $(DEPS) $(call precision,$(PRECISION)) train_moe.cu -o $@ -lcublas

##train_moe_cu_nccl: the same for several GPUs: mpirun -np 8 ./train_moe_cu_nccl; needs MPI and NCCL besides
MPICXX  ?= mpicxx
USE_NCCL = -DUSE_MPI -DUSE_NCCL -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
train_moe_cu_nccl: train_moe.cu $(CU_CHOICE) | data/stories/tokenizer.json
	$(NEED_NVCC)
	$(NEED_MPI)
	@echo '\043include <nccl.h>' | $(NVCC) -x cu -E - >/dev/null 2>&1 || { echo "no nccl.h here: install NCCL (libnccl-dev)"; exit 1; }
	OMPI_CXX=$(CXX) MPICH_CXX=$(CXX) $(CUDA_BUILD) $(DEPS) -ccbin $(MPICXX) $(USE_NCCL) $(call precision,$(PRECISION)) \
	    train_moe.cu -o $@ -lcublas -lnccl $(RT)

##data/tokenize: trains tokenizers and turns texts into token files
data/tokenize: data/tokenize.c | $(CHOICE)
	$(BUILD) $(DEPS) $(OPENMP) -pthread data/tokenize.c -o $@ $(LIBS)

# for any processor of the family: there is nothing to gain from this one's instructions
data/make_stories: data/stories.c | $(CHOICE)
	$(CC) -std=gnu11 $(CFLAGS) $(WARN) $(STACK) $(DEPS) data/stories.c -o $@

##data/stories/tokenizer.json: the built-in stories as tokens
##data/stories_large/tokenizer.json: the same with a hero and a friend of forty names in each story
# The old ones are removed when the new ones are whole.
data/stories/tokenizer.json: CAST = small
data/stories_large/tokenizer.json: CAST = large
data/stories/tokenizer.json data/stories_large/tokenizer.json: data/make_stories data/tokenize
	rm -rf $(@D).new && mkdir $(@D).new
	data/make_stories --cast $(CAST) --count 24000 > $(@D).new/train.txt
	data/make_stories --cast $(CAST) --first 24000 --count 500 > $(@D).new/valid.txt
	data/tokenize --vocab 1900 $(@D).new/train.txt $(@D).new/valid.txt --out $(@D).new
	rm $(@D).new/train.txt $(@D).new/valid.txt
	rm -rf $(@D).old && if [ -d $(@D) ]; then mv $(@D) $(@D).old; fi
	mv $(@D).new $(@D) && rm -rf $(@D).old

# What make starts sleeps while it waits; started by hand, train_moe stays awake for a moment (dev/machine.h).
export OMP_WAIT_POLICY ?= passive
TEST_FLAGS = -std=gnu11 -O2 -g $(WARN) $(ARCH) $(FLOATS) -I.
TEST_BUILD = $(CC) $(TEST_FLAGS)
# Builds two things at a time, unless make was told how many.
PAIR       = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j2)

# $(call TOGETHER,A,B): runs both programs at the same time; what B says is shown when A has ended.
TOGETHER   = @log=dev/build/second.$$$$; $(2) > $$log 2>&1 & second=$$!; $(1); first=$$?; wait $$second; second=$$?; \
    cat $$log; rm -f $$log; [ $$first = 0 ] && [ $$second = 0 ]

##test_moe: the proof of the lesson, in float and in double; installs cmocka if it is missing
test_moe:
	@$(PAIR) dev/test_moe dev/test_moe_double
	dev/test_moe
	dev/test_moe_double

dev/test_moe: test_moe.c $(CHOICE) | cmocka
	$(TEST_BUILD) $(DEPS) $(LOOPS) $(OPENMP) test_moe.c -o $@ -lcmocka $(LIBS)

dev/test_moe_double: test_moe.c $(CHOICE) | cmocka
	$(TEST_BUILD) $(DEPS) $(LOOPS) $(OPENMP) -DREAL=double test_moe.c -o $@ -lcmocka $(LIBS)

# What Debian, Fedora, Arch and Homebrew call cmocka.
cmocka:
	@mkdir -p dev/build
	@printf '\043include <stdarg.h>\n\043include <stddef.h>\n\043include <stdint.h>\n\043include <setjmp.h>\n\043include <cmocka.h>\nint main(void) { return 0; }\n' \
	| $(CC) -x c - -o dev/build/cmocka >/dev/null 2>&1 || { echo "cmocka is missing; installing it with the system's package manager"; \
	s=; [ "$$(id -u)" = 0 ] || s=sudo; \
	if command -v apt-get >/dev/null; then $$s apt-get update -qq && $$s apt-get install -y -qq libcmocka-dev; \
	elif command -v dnf >/dev/null; then $$s dnf install -y libcmocka-devel; \
	elif command -v pacman >/dev/null; then $$s pacman -S --noconfirm cmocka; \
	elif command -v brew >/dev/null; then brew install cmocka; \
	else echo "no known package manager: install cmocka by hand"; exit 1; fi; }

##test: the proof and all other tests (dev/test), the CUDA twin's too, in an emulator; TEST='test_name*' runs only some
test: test_rest

##clean: removes what was built (the built-in stories too), but not other data and the runs
clean:
	rm -f train_moe train_moe_double train_moe_mpi train_moe_mpi_double train_moe_cu train_moe_cu_nccl data/tokenize data/make_stories
	rm -f dev/test_moe dev/test_moe_double dev/test/logits dev/bench/bench dev/bench/bench_cu dev/bench/llmc_step dev/bench/scale
	rm -rf dev/build $(wildcard data/stories data/stories_large data/stories*.new data/stories*.old)

help:
	@sed -n 's/^##//p' Makefile dev/dev.mk

-include dev/dev.mk
-include $(wildcard dev/build/*.d)
