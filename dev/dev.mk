# The workshop's part of the Makefile: the tests of dev/test, sanitizers, valgrind, other processors, the CUDA twin's emulator,
# benchmarks. What is built lies in dev/build, benchmarks beside their sources.

.PHONY: test_rest test_builds test_posix check_hf check_peft check_gguf check_stories test_mpi test_emulated draws test_emulated_small test_cu test_nccl check_nccl \
    faults kills fuzz test_in test_sse2 test_avx2 test_arm64 sanitize sanitize_double sanitize_emulated race_emulated \
    count_emulated sanitize_cu gate_cu gpu_check tsan valgrind bench bench_all contest bench_mpi bench_cu format

# ---- the tests of the C program: one program for each subject, dev/build/SUBJECT and SUBJECT_double, and all of them in one

TESTS        = $(addprefix dev/build/,layers lstm routers attention shapes classes recipes training numbers json tokenizer tokenize loader checkpoint options evaluate program files machine learning stories minutes precision adapters gguf quantized tokenizers teacher compress offload)
TESTS_DOUBLE = $(addprefix dev/build/,layers_double lstm_double routers_double attention_double shapes_double recipes_double training_double numbers_double learning_double precision_double adapters_double quantized_double teacher_double compress_double offload_double)

$(TESTS) dev/build/all dev/build/mpi: dev/build/%: dev/test/%.c $(CHOICE) | cmocka
	$(TEST_BUILD) $(DEPS) $(LOOPS) $(OPENMP) $< -o $@ -lcmocka $(LIBS)

$(TESTS_DOUBLE) dev/build/all_double: dev/build/%_double: dev/test/%.c $(CHOICE) | cmocka
	$(TEST_BUILD) $(DEPS) $(LOOPS) $(OPENMP) -DREAL=double $< -o $@ -lcmocka $(LIBS)

##test_rest: the tests of the C program in one program, in float and in double, and those of the CUDA twin
test_rest:
	@$(PAIR) dev/build/all dev/build/all_double train_moe train_moe_double data/tokenize data/make_stories dev/build/check_stories
	$(call TOGETHER,dev/build/all,dev/build/all_double)
	@if command -v $(CXX) >/dev/null; then $(PAIR) test_emulated; \
	else echo "the CUDA twin's tests are not run: they need a C++ compiler"; fi

dev/build/check_stories: dev/test/check_stories.c $(CHOICE)
	$(TEST_BUILD) $(DEPS) $< -o $@

##check_stories: lets the run RUN tell 200 stories, and says in how many the hero, the lost thing and the places agree to the end
RUN ?= runs/mixtral
check_stories: train_moe dev/build/check_stories
	dev/test/stories.sh $(RUN)

##check_hf: directories that Hugging Face's transformers makes, read by --init with the loss that it gives them; needs Python with it
PYTHON ?= python3
check_hf: train_moe data/tokenize dev/test/logits
	$(PYTHON) dev/test/check_hf.py --foreign

##check_peft: adapters of --lora, opened by Hugging Face's PEFT, and merged by --merge, with our logits; needs Python with it
check_peft: train_moe dev/test/logits
	$(PYTHON) dev/test/check_peft.py

##check_gguf: GGUF files of --export, read by llama.cpp with the ids, logits and text that are ours; needs Python with gguf and llama-cpp-python
check_gguf: train_moe data/tokenize dev/test/logits
	$(PYTHON) dev/test/check_gguf.py

##test_builds: builds that must be refused, the probes of the Makefile, other C libraries; what is not installed is left out
test_builds: data/stories/tokenizer.json
	CC=$(CC) dev/test/builds.sh

##test_posix: the programs as a system sees them that is neither Linux nor GNU: clang, strict C11 and POSIX, a short training
# It is the nearest that there is here to macOS, on which nothing was tried.
POSIX_CC = clang -std=c11 -D_XOPEN_SOURCE=700 -DSTRICT_POSIX -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -I.
test_posix: data/stories/tokenizer.json
	$(POSIX_CC) data/stories.c -o dev/build/make_stories_posix
	$(POSIX_CC) -pthread data/tokenize.c -o dev/build/tokenize_posix $(LIBS)
	$(POSIX_CC) train_moe.c -o dev/build/train_moe_posix $(LIBS)
	dev/build/make_stories_posix --count 20 > dev/build/posix.txt
	dev/build/tokenize_posix --vocab 300 --out dev/build/posix_data dev/build/posix.txt
	$(call SHORT_RUN,dev/build/train_moe_posix,dev/build/posix_run)
	rm -rf dev/build/posix.txt dev/build/posix_data

# ---- several processes

##train_moe_mpi_double: the trainer for several processes, in double
train_moe_mpi_double: train_moe.c $(CHOICE)
	$(NEED_MPI)
	$(WITH_MPI) $(FLAGS) $(DEPS) $(LOOPS) $(OPENMP) -DUSE_MPI -DREAL=double train_moe.c -o $@ $(LIBS) $(RT)

dev/build/ranks dev/build/ranks_double: dev/test/ranks.c $(CHOICE) | cmocka
	$(NEED_MPI)
	$(WITH_MPI) $(TEST_FLAGS) $(DEPS) $(LOOPS) $(OPENMP) -DUSE_MPI $(if $(findstring double,$@),-DREAL=double) \
	    $< -o $@ -lcmocka $(LIBS) $(RT)

# More processes than cores, and, in a container, by root.
MPIRUN ?= OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 mpirun

##test_mpi: several processes against one: every recipe, uneven loads, crashes; needs MPI
test_mpi: dev/build/ranks dev/build/ranks_double dev/build/mpi train_moe_mpi
	$(MPIRUN) -np 4 dev/build/ranks_double
	$(MPIRUN) -np 4 dev/build/ranks
	MPIRUN="env $(MPIRUN)" TRAIN_MOE_MPI=./train_moe_mpi dev/build/mpi

# ---- the CUDA twin on the processor: dev/emulator looks like the few headers that train_moe.cu includes, and sed writes a
# kernel's start as a function call. The compiler may not invent operations here, since invalid ones are errors (hence no
# -fno-trapping-math).

EMULATED_FLAGS = -x c++ -std=gnu++17 -O2 -g $(WARN) -Wno-unknown-pragmas -Wno-missing-field-initializers $(ARCH) \
    -ffp-contract=fast -fno-math-errno \
    $(if $(findstring clang,$(CXX)),-ffp-exception-behavior=maytrap) $(LOOPS) $(OPENMP) -DCUDACPU -Idev/emulator -I.
EMULATED = $(CXX) $(EMULATED_FLAGS)
# With NCCL, which MPI answers: mpicxx calls the same compiler.
EMULATED_NCCL = OMPI_CXX=$(CXX) MPICH_CXX=$(CXX) $(MPICXX) $(EMULATED_FLAGS) $(USE_NCCL)
TWIN     = -DTWIN='"dev/build/emulated/train_moe_cu.cpp"'
E        = dev/build/emulated
# The text as the emulator takes it. The kernels' headers are rewritten too, into a folder that has the same paths: a file finds
# them there first.
REWRITE  = @mkdir -p $(@D) && (echo '\#line 1 "$(or $(NAME),$<)"'; sed -E -f dev/emulator/rewrite.sed $<) > $@
KERNELS  = $(patsubst %,$(E)/%,$(wildcard dev/cuda/*.cuh dev/cuda/*/*.cuh))

$(E)/train_moe_cu.cpp: train_moe.cu dev/emulator/rewrite.sed $(KERNELS)
	$(REWRITE)
$(KERNELS): $(E)/%: % dev/emulator/rewrite.sed
	$(REWRITE)
# These two look for their own short name in messages.
$(E)/check.cpp $(E)/check_nccl.cpp: NAME = $(<F)
$(E)/check.cpp $(E)/check_nccl.cpp: $(E)/%.cpp: dev/emulator/%.cu dev/emulator/rewrite.sed
	$(REWRITE)
$(E)/bench_cu.cpp: dev/bench/bench.cu dev/emulator/rewrite.sed
	$(REWRITE)

$(E)/train_moe_cu $(E)/check: $(E)/%: $(E)/%.cpp $(CHOICE)
	$(EMULATED) $(DEPS) $< -o $@ $(LIBS)

$(E)/train_moe_cu_nccl: $(E)/train_moe_cu.cpp $(CHOICE)
	$(NEED_MPI)
	$(EMULATED_NCCL) $(DEPS) $< -o $@ $(LIBS) $(RT)

$(E)/check_nccl $(E)/check_nccl_asan: $(E)/check_nccl.cpp $(CHOICE)
	$(NEED_MPI)
	$(EMULATED_NCCL) $(DEPS) $(if $(findstring asan,$@),$(SANITIZE)) $< -o $@ $(LIBS) $(RT)

$(E)/bench_cu: $(E)/bench_cu.cpp $(E)/train_moe_cu.cpp $(CHOICE)
	$(EMULATED) $(DEPS) $(TWIN) $< -o $@ $(LIBS)

# One program for each subject, and all in one, which is faster to build: dev/build/emulated/cuda_layers_bf16, cuda_all_fp32...
CUDA_TESTS = cuda_layers cuda_routers cuda_model cuda_offload cuda_all
$(CUDA_TESTS:%=$(E)/%_bf16): $(E)/%_bf16: dev/test/%.cu $(E)/train_moe_cu.cpp $(CHOICE) | cmocka
	$(EMULATED) $(DEPS) $(TWIN) $< -o $@ -lcmocka $(LIBS)
$(CUDA_TESTS:%=$(E)/%_fp32): $(E)/%_fp32: dev/test/%.cu $(E)/train_moe_cu.cpp $(CHOICE) | cmocka
	$(EMULATED) $(DEPS) $(TWIN) -DFP32 $< -o $@ -lcmocka $(LIBS)
$(E)/cuda_ranks_bf16 $(E)/cuda_ranks_fp32: $(E)/cuda_ranks_%: dev/test/cuda_ranks.cu $(E)/train_moe_cu.cpp $(CHOICE) | cmocka
	$(NEED_MPI)
	$(EMULATED_NCCL) $(DEPS) $(call precision,$*) $(TWIN) $< -o $@ -lcmocka $(LIBS) $(RT)

##test_emulated: the CUDA twin's tests on the processor, in bfloat16 and in float32
test_emulated: $(E)/check $(E)/train_moe_cu $(E)/cuda_all_bf16 $(E)/cuda_all_fp32 train_moe
	$(E)/check
	$(call TOGETHER,TRAIN_MOE_CU=$(E)/train_moe_cu $(E)/cuda_all_bf16,TRAIN_MOE_CU=$(E)/train_moe_cu $(E)/cuda_all_fp32)

##draws: the same tests with DRAWS (5) other sets of random numbers; SEED=number, which each prints, repeats one
DRAWS ?= 5
draws: $(E)/train_moe_cu $(E)/cuda_all_bf16 $(E)/cuda_all_fp32 train_moe
	for draw in $$(seq $(DRAWS)); do for precision in bf16 fp32; do \
	SEED=new TRAIN_MOE_CU=$(E)/train_moe_cu $(E)/cuda_all_$$precision || exit 1; done; done

##test_emulated_small: the kernels' tests with a consumer card's shared memory, SHARED KiB (99) a block; TEST names some
SHARED ?= 99
test_emulated_small: $(E)/cuda_all_bf16 $(E)/cuda_all_fp32
	CUDACPU_SHARED=$(SHARED) VALGRIND=1 TRAIN_MOE_CU= $(E)/cuda_all_bf16
	CUDACPU_SHARED=$(SHARED) VALGRIND=1 TRAIN_MOE_CU= $(E)/cuda_all_fp32

##check_nccl: the emulator's NCCL with one to four ranks, and its mistakes; needs MPI
check_nccl: $(E)/check_nccl
	$(E)/check_nccl

##test_nccl: the CUDA twin on several processes, in the emulator, against the C twin alone; needs MPI
test_nccl: $(E)/cuda_ranks_fp32 $(E)/cuda_ranks_bf16 dev/build/mpi train_moe_mpi
	OMP_NUM_THREADS=1 $(MPIRUN) -np 4 $(E)/cuda_ranks_fp32
	OMP_NUM_THREADS=1 $(MPIRUN) -np 4 $(E)/cuda_ranks_bf16
	AS_PROGRAM=1 TEST='test_mpi_both_*' MPIRUN="env $(MPIRUN)" TRAIN_MOE_MPI=$(E)/cuda_ranks_fp32 TRAIN_MOE_OTHER=./train_moe_mpi \
	    dev/build/mpi

# ---- the CUDA twin on a GPU

dev/build/cuda_all_bf16 dev/build/cuda_all_fp32: dev/build/cuda_all_%: dev/test/cuda_all.cu $(CHOICE) | cmocka
	$(NEED_NVCC)
	$(CUDA_BUILD) $(DEPS) $(call precision,$*) $< -o $@ -lcmocka -lcublas

##gate_cu: what nvcc says of the CUDA twin's kernels on three chips: registers, spills (an error), inner loops; needs no GPU
gate_cu:
	NVCC="$(NVCC)" dev/cuda/gate.sh

##test_cu: the same tests on a GPU
test_cu: dev/build/cuda_all_bf16 dev/build/cuda_all_fp32 train_moe_cu train_moe
	dev/build/cuda_all_bf16
	dev/build/cuda_all_fp32

##gpu_check: all that only a GPU can tell, in ten minutes at most, into gpu_check.txt (dev/gpu_check.sh)
gpu_check:
	dev/gpu_check.sh

##sanitize_cu: the CUDA twin's tests on a GPU under compute-sanitizer
sanitize_cu: test_cu
	for tool in memcheck racecheck initcheck synccheck; do \
	compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 9 dev/build/cuda_all_bf16 || exit 1; done

# ---- all tests of the C program in another build

# $(call SHORT_RUN,PROGRAM,FOLDER): a short training, a resumed one, and a story
define SHORT_RUN
	rm -rf $(2)
	$(1) --out $(2) --steps 3 --layers 2 --dim 32 --heads 2 --ffn 32 --seq 32 --batch 2 --eval-tokens 128 --tokens 20 --save-every 2
	$(1) --out $(2) --resume --steps 4
	$(1) --out $(2) --prompt "Once upon" --tokens 20
	rm -rf $(2)
endef

# In a folder laid out like this one. EMULATOR runs them where this machine's processor cannot.
CMOCKA = -lcmocka
test_in:
	mkdir -p $(IN)/data
	$(TEST_BUILD) $(OPENMP) -pthread data/tokenize.c -o $(IN)/data/tokenize $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) train_moe.c -o $(IN)/train_moe $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) -DREAL=double train_moe.c -o $(IN)/train_moe_double $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) dev/test/all.c -o $(IN)/all $(CMOCKA) $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) -DREAL=double dev/test/all.c -o $(IN)/all_double $(CMOCKA) $(LIBS)
ifdef EMULATOR
	cd $(IN) && for program in train_moe train_moe_double data/tokenize; do mv $$program $$program.bin && \
	printf '#!/bin/sh\nexec $(EMULATOR) -0 "$$0" "$$0.bin" "$$@"\n' > $$program && chmod +x $$program || exit 1; done
	$(call SHORT_RUN,$(IN)/train_moe,$(IN)/run)
endif
	cd $(IN) && $(EMULATOR) ./all
	cd $(IN) && $(EMULATOR) ./all_double

##test_sse2: the tests built for any processor of this family: SSE2 alone, on x86-64
test_sse2: cmocka
	@$(MAKE) --no-print-directory test_in IN=dev/build/sse2 ARCH=

##test_avx2: the tests built for AVX2 and FMA, without AVX-512
test_avx2: cmocka
	@if ! grep -qsw avx2 /proc/cpuinfo; then echo "not run: this processor has no AVX2"; \
	elif ! grep -qsw avx512f /proc/cpuinfo; then echo "not run: this processor has no AVX-512, so make test is the same"; \
	else $(MAKE) --no-print-directory test_in IN=dev/build/avx2 ARCH=-march=haswell; fi

# cmocka for arm64: apt with lists of its own fetches Debian's, and nothing of the system changes.
A := dev/build/arm64
ARM64_APT = apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Dir::State::Lists=$(CURDIR)/$(A)/lists -o Dir::State::status=/dev/null -o Dir::Cache=$(CURDIR)/$(A)
$(A)/usr/include/cmocka.h:
	rm -rf $(A) && mkdir -p $(A)/lists/partial $(A)/archives/partial
	cd $(A) && $(ARM64_APT) update && $(ARM64_APT) download libcmocka-dev libcmocka0
	cd $(A) && for package in *.deb; do dpkg-deb -x $$package . || exit 1; done

##test_arm64: the tests built for 64-bit Arm, in small sizes, under qemu; needs Debian's cross compiler and qemu-user
ARM64 := /usr/aarch64-linux-gnu
test_arm64: data/stories/tokenizer.json
	@if command -v aarch64-linux-gnu-gcc && command -v qemu-aarch64 && [ -f $(ARM64)/lib/libc.so.6 ]; then \
	$(MAKE) --no-print-directory $(A)/usr/include/cmocka.h && VALGRIND=1 $(MAKE) --no-print-directory test_in IN=$(A) \
	    CC=aarch64-linux-gnu-gcc ARCH= EMULATOR="qemu-aarch64 -L $(ARM64)" CMOCKA="-isystem $(A)/usr/include \
	    -L$(A)/usr/lib/aarch64-linux-gnu -Wl,-rpath,usr/lib/aarch64-linux-gnu -lcmocka"; \
	else echo "not run: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"; fi

##sanitize: the tests and a short training under AddressSanitizer and UBSan; sanitize_double: those in double, in small sizes
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
sanitize: data/stories/tokenizer.json cmocka
	$(TEST_BUILD) $(OPENMP) -pthread $(SANITIZE) data/tokenize.c -o dev/build/tokenize_asan $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) $(SANITIZE) train_moe.c -o dev/build/train_moe_asan $(LIBS)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) $(SANITIZE) dev/test/all.c -o dev/build/all_asan -lcmocka $(LIBS)
	TRAIN_MOE=dev/build/train_moe_asan TOKENIZE=dev/build/tokenize_asan dev/build/all_asan
	$(call SHORT_RUN,dev/build/train_moe_asan,dev/build/asan_run)
	if command -v $(CXX) >/dev/null; then $(MAKE) --no-print-directory sanitize_emulated; fi

sanitize_double: cmocka | $(CHOICE)
	$(TEST_BUILD) $(LOOPS) $(OPENMP) $(SANITIZE) -DREAL=double dev/test/all.c -o dev/build/all_asan_double -lcmocka $(LIBS)
	VALGRIND=1 dev/build/all_asan_double

##race_emulated: races in the CUDA twin's kernels, in the emulator, by g++'s ThreadSanitizer; RACE_TESTS names programs and tests
# dev/emulator/race.h says what is found. One system thread, and -O1, which invents no accesses.
RACE_CXX   ?= g++
RACE        = $(RACE_CXX) $(filter-out -fopenmp,$(EMULATED_FLAGS)) -O1 -fsanitize=thread -Wno-tsan
# All in one program, which is built once. test_gpu_accumulation has whole models, forward and backward, with one kernel
# from the residual stream to the plan; CI runs that, test_gpu_rows and test_gpu_capacity.
RACE_TESTS ?= $(addprefix cuda_all:test_gpu_,rows attention lstm loss update scores select* weights capacity sort accumulation)
$(E)/check_race: $(E)/check.cpp $(CHOICE)
	$(RACE) $(DEPS) $< -o $@ $(LIBS)
$(CUDA_TESTS:%=$(E)/%_race): $(E)/%_race: dev/test/%.cu $(E)/train_moe_cu.cpp $(CHOICE) | cmocka
	$(RACE) $(DEPS) $(TWIN) $< -o $@ -lcmocka $(LIBS)
race_emulated: $(E)/check_race $(sort $(foreach t,$(RACE_TESTS),$(E)/$(firstword $(subst :, ,$(t)))_race))
	$(E)/check_race
	for t in $(foreach t,$(RACE_TESTS),'$(t)'); do \
	VALGRIND=1 TRAIN_MOE_CU= TEST="$${t#*:}" $(E)/$${t%%:*}_race || exit 1; done

##count_emulated: launches and bytes of one layer of the CUDA twin, counted in the emulator; ARGS are options of the model
# dev/emulator/count.h says what counts.
COUNT = $(RACE) --param tsan-instrument-func-entry-exit=0 -DCUDACPU_BYTES
ARGS ?= --recipe mixtral --experts 8 --topk 2
$(E)/count_cu: $(E)/train_moe_cu.cpp $(CHOICE)
	$(COUNT) $(DEPS) -c $< -o $@.o
	$(RACE_CXX) $@.o -o $@ $(LIBS)
count_emulated: $(E)/count_cu data/stories/tokenizer.json
	dev/emulator/count.sh $(E)/count_cu $(ARGS)

##sanitize_emulated: the CUDA twin's tests on the processor, under AddressSanitizer
sanitize_emulated: $(E)/check.cpp $(E)/train_moe_cu.cpp train_moe cmocka
	$(EMULATED) $(SANITIZE) $< -o $(E)/check_asan $(LIBS)
	$(E)/check_asan
	$(EMULATED) -O1 $(SANITIZE) $(TWIN) dev/test/cuda_all.cu -o $(E)/cuda_all_asan -lcmocka $(LIBS)
	VALGRIND=1 TRAIN_MOE_CU= $(E)/cuda_all_asan # without the longest

##tsan: short trainings under ThreadSanitizer (clang and its OpenMP runtime, with Archer, which knows OpenMP's barriers)
ARCHER := $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
tsan: data/stories/tokenizer.json
	clang -std=gnu11 -O1 -g $(WARN) $(ARCH) $(LOOPS) -I. -fsanitize=thread -fopenmp train_moe.c -o dev/build/train_moe_tsan $(LIBS)
	for recipe in mixtral hierarchical deepseek-v2 cmoe expert-choice base mh-moe rmoe moa "shazeer-lstm --cell 40" \
	    "switchhead --ngrams 500 --ngram-order 3 --ngram-gate --dropout 0.1 --recompute"; do rm -rf dev/build/tsan_run; \
	OMP_TOOL_LIBRARIES=$(ARCHER) TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" dev/build/train_moe_tsan --threads 4 \
	    --out dev/build/tsan_run --recipe $$recipe --steps 4 --layers 2 --dim 32 --ffn 32 --seq 32 --eval-tokens 128 \
	    --tokens 20 --moments bf16 || exit 1; done
	rm -rf dev/build/tsan_run

# ---- campaigns: calls that fail, kills, random inputs

CAMPAIGN = dev/build/faults dev/build/faults_preload.so train_moe data/tokenize data/make_stories
dev/build/faults: dev/test/faults.c $(CHOICE)
	$(TEST_BUILD) $(DEPS) $(OPENMP) $< -o $@ $(LIBS)
dev/build/faults_preload.so: dev/test/faults_preload.c $(CHOICE)
	$(CC) -std=gnu11 -O2 -g $(WARN) -shared -fPIC $(DEPS) $< -o $@

##faults: every allocation and every call on files fails once, in the trainer and the data tools; EVERY=20 takes each 20th
# JOBS (2) at a time; FROM=n goes on from fault n of each scenario; SCENARIO=train takes one. What went wrong is in dev/build/faults.txt.
faults: $(CAMPAIGN)
	dev/build/faults faults $(or $(EVERY),1)

##kills: the trainer is killed N times (1000), at every call on files and at random moments, and goes on with the same bits
kills: $(CAMPAIGN)
	dev/build/faults kills $(or $(N),1000)

##fuzz: random inputs (INPUTS: 10000000 in all) for everything that is read, by clang's libFuzzer, under the sanitizers
# Inputs that lead to new code stay in dev/build/fuzzing, where the next call goes on; one that crashes is FORMAT-crash-... there.
FUZZ = texts tokenizer config safetensors index prompt json options state log tokens logits
dev/build/fuzz: dev/test/fuzz.c $(CHOICE)
	clang -std=gnu11 -O1 -g $(WARN) -Wno-unknown-pragmas $(ARCH) -I. $(DEPS) -DPLAIN \
	    -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all $< -o $@ $(LIBS)
fuzz: dev/build/fuzz train_moe data/tokenize data/make_stories
	@mkdir -p dev/build/fuzzing
	@echo $(FUZZ) | tr ' ' '\n' | INPUTS=$(or $(INPUTS),10000000) xargs -P $(or $(JOBS),2) -I@ sh -c \
	    'if FUZZ=@ dev/build/fuzz >dev/build/fuzzing/@.txt 2>&1; then echo "@: $$(sed -n "s/^Done //p" dev/build/fuzzing/@.txt)"; \
	    else tail -40 dev/build/fuzzing/@.txt; echo "@: it ended by more than a message"; exit 255; fi'
	@cat $(FUZZ:%=dev/build/fuzzing/%.txt) | awk '/^Done/ { n += $$2 } END { print "fuzz: " n " inputs without a crash" }'

##valgrind: a short training and the tests under valgrind
# valgrind 3.19 does not know AVX-512, hence another ARCH; one thread, since libgomp is not made for it. In the tests, children
# that are meant to fail end without freeing; AddressSanitizer looks for the tests' leaks.
VALGRIND := valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,possible
VALGRIND_BUILD = $(CC) -std=gnu11 -O2 -g $(WARN) -Wno-unknown-pragmas $(LOOPS) -I.
valgrind: data/stories/tokenizer.json cmocka
	$(VALGRIND_BUILD) train_moe.c -o dev/build/train_moe_valgrind $(LIBS)
	$(VALGRIND_BUILD) dev/test/all.c -o dev/build/all_valgrind -lcmocka $(LIBS)
	$(call SHORT_RUN,$(VALGRIND) dev/build/train_moe_valgrind,dev/build/valgrind_run)
	VALGRIND=1 $(VALGRIND) --leak-check=no --child-silent-after-fork=yes dev/build/all_valgrind

# ---- benchmarks, and programs that others are compared with

# OpenBLAS is only there to be compared with. What it finds out about a processor may be too little, so it is told of AVX-512;
# and its threads shall not spin for long while ours work.
BLAS = $(call accepts,-DOPENBLAS -lopenblas,\043include <cblas.h>)
dev/bench/bench: STACK = # its lists of measurements are long
dev/bench/bench: dev/bench/bench.c $(CHOICE)
	$(BUILD) $(DEPS) $(LOOPS) $(OPENMP) $< -o $@ $(BLAS) $(LIBS)

# llm.c's own flags
dev/bench/llmc_step: dev/bench/llmc_step.c | $(CHOICE)
	$(CC) -Ofast $(WARN) $(ARCH) $(DEPS) $(OPENMP) $< -o $@ $(LIBS)

##bench: peak, products, layers, steps, the mixture's tax, generation, and PyTorch (TORCH_PYTHON names one that has it), in one run
##bench_all: the same, and a larger model beside PyTorch
bench bench_all: dev/bench/bench dev/bench/llmc_step
	export OPENBLAS_THREAD_TIMEOUT=20; ! grep -qsw avx512f /proc/cpuinfo || export OPENBLAS_CORETYPE=SkylakeX; \
	dev/bench/bench $(if $(filter bench_all,$@),--all) $(BENCH)

##contest: what learns most in ten minutes (MINUTES=10): ours or PyTorch's (PYTHON names one that has it); CONTEST: dev/bench/contest.sh -h
contest: train_moe
	MINUTES=$(or $(MINUTES),10) PYTHON=$(PYTHON) dev/bench/contest.sh $(CONTEST)

##bench_mpi: a step on one process and on two, with and without overlap; the bytes sent against what they should be
bench_mpi: train_moe_mpi
	dev/bench/bench_mpi.sh

##bench_cu: the CUDA twin's speed: peak, steps beside dense, each kernel, experts, attention, generation, PyTorch (TORCH_PYTHON)
bench_cu: dev/bench/bench_cu
	dev/bench/bench_cu $(BENCH)

dev/bench/bench_cu: dev/bench/bench.cu $(CU_CHOICE)
	$(CUDA_BUILD) $(DEPS) $(call precision,$(PRECISION)) $< -o $@ -lcublas

##dev/bench/scale: simulates a step on 8 to 2,048 devices (doc/scale.md); --check holds it against published figures
dev/bench/scale: dev/bench/scale.c $(CHOICE)
	$(BUILD) $(DEPS) $(OPENMP) $< -o $@ $(LIBS)

dev/test/logits: dev/test/logits.c $(CHOICE)
	$(BUILD) $(DEPS) $(LOOPS) $(OPENMP) $< -o $@ $(LIBS)

##format: lays the code out as .clang-format says
format:
	clang-format -i train_moe.c test_moe.c data/*.c dev/test/*.c
