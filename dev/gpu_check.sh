#!/usr/bin/env bash
# Everything that only a GPU can tell about the CUDA twin, in the order of its worth, in at most ten minutes: make gpu_check, or
#
#     dev/gpu_check.sh                on a machine with a GPU and the CUDA Toolkit
#     EMULATED=1 dev/gpu_check.sh     the same commands with the programs of dev/emulator, in small sizes: to try this script
#     dev/gpu_check.sh --pack         copies this machine's cmocka to dev/build/cmocka, for a GPU machine without a network:
#                                     the tests need it, and it is found there
#
# Each step has a time limit, and its output is appended at once to gpu_check.txt, in the folder $OUT or here. A step that
# fails or runs out of time is written down, and the next one goes on. The last lines say how each went; the exit status is
# 1 where one failed. TORCH_PYTHON names a python that has PyTorch. SLOWER=3 makes all limits three times as long.
set -u
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/cuda/bin
report=${OUT:-.}/gpu_check.txt
emulated=${EMULATED:-0}
slower=${SLOWER:-1}
kit=$PWD/dev/build/cmocka
python=${TORCH_PYTHON:-python3}
jobs=$(nproc)
outcomes= failures=0 limits=0 began=$(date +%s)

if [ "${1:-}" = --pack ]; then
    header=$(echo '#include <cmocka.h>' | cc -M -x c - 2>/dev/null | tr ' ' '\n' | grep -m 1 'cmocka\.h$')
    library=$(cc -print-file-name=libcmocka.so)
    [ -f "$header" ] && [ -f "$library" ] || { echo "no cmocka here to be packed"; exit 1; }
    mkdir -p "$kit" && cp -L "$header" "$library" "$kit/" && cp -L "$library" "$kit/libcmocka.so.0"
    echo "packed: $(ls "$kit" | tr '\n' ' ')in $kit"
    exit
fi

say() { echo "$*" | tee -a "$report"; }

# step NAME SECONDS COMMAND: runs it, and writes down what it says and how it ended.
step() {
    local name=$1 limit=$(($2 * slower)) start=$(date +%s) status=0 how
    limits=$((limits + limit))
    say
    say "== $(date +%T) $name (at most $limit s): $3"
    timeout -k 5 "$limit" bash -c "$3" >>"$report" 2>&1 </dev/null || status=$?
    case $status in
    0) how=passed ;;
    124 | 137) how="OUT OF TIME" failures=$((failures + 1)) ;;
    *) how="FAILED with $status" failures=$((failures + 1)) ;;
    esac
    how="$name: $how after $(($(date +%s) - start)) s"
    outcomes="$outcomes$how"$'\n'
    say "== $how"
}

skip() {
    outcomes="$outcomes$1: skipped, $2"$'\n'
    say
    say "== $1: skipped, $2"
}

mkdir -p "${OUT:-.}" dev/build
: >"$report"
say "gpu_check of $(date); commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); $jobs cores"

# The tests need cmocka: the system's, or a packed one.
can_test=1
if ! echo '#include <cmocka.h>' | cc -E -include stdarg.h -include stddef.h -include stdint.h -include setjmp.h -x c - >/dev/null 2>&1; then
    if [ -f "$kit/cmocka.h" ]; then
        export CPATH=$kit LIBRARY_PATH=$kit LD_LIBRARY_PATH=$kit${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        say "cmocka: from $kit"
    else
        can_test=0
        say "cmocka is missing: the tests are skipped. Run dev/gpu_check.sh --pack where it is installed, and take dev/build/cmocka along."
    fi
fi

if [ "$emulated" = 1 ]; then
    folder=dev/build/emulated
    trainer=$folder/train_moe_cu
    bench="$folder/bench_cu --quick"
    tests=$folder/${TEST_PROGRAM:-cuda_all}
    few="VALGRIND=1 TEST='test_gpu_e*'" # experts and errors
    size='--layers 1 --dim 32 --heads 2 --ffn 32 --seq 32 --batch 2 --eval-tokens 128 --tokens 20 --steps 1000000'
    short='--layers 2 --dim 32 --ffn 32 --seq 16 --batch 2 --eval-tokens 64 --tokens 10 --steps 3'
    heads='--heads 2'
    train_limit=15
    skip device "emulated"
else
    folder=dev/build
    trainer=./train_moe_cu
    bench=dev/bench/bench_cu
    tests=$folder/cuda_all
    few=
    size=
    short='--steps 300'
    heads=
    train_limit=65
    step device 10 'nvidia-smi --format=csv --query-gpu=name,compute_cap,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu; nvidia-smi -q -d CLOCK | head -40; nvcc --version | tail -2'
fi

# Programs are built one after the other in the order in which they are needed, or, with many cores, together.
programs="train_moe $trainer ${bench%% *}"
[ $can_test = 0 ] || programs="${tests}_bf16 $programs ${tests}_fp32"
step build 120 "time make -k -j$jobs ${programs//.\//}"

if [ $can_test = 1 ]; then
    export TRAIN_MOE_CU=$trainer
    step "tests, bfloat16" 65 "time $few stdbuf -oL ${tests}_bf16"
    step "tests, float32" 40 "time $few stdbuf -oL ${tests}_fp32"
else
    skip tests "no cmocka"
fi

# Each kernel's time in a step beside its bytes and operations; steps beside dense ones of the same active size.
step kernels 40 "stdbuf -oL $bench peak kernels D E"
step steps 50 "stdbuf -oL $bench steps D E"

step "training on the built-in stories" $((train_limit + 15)) \
    "rm -rf dev/build/gpu_check_run; timeout -s INT $train_limit $trainer --out dev/build/gpu_check_run $size; status=\$?
    echo; grep '\"type\":\"step\"' dev/build/gpu_check_run/log.jsonl | tail -1; [ \$status = 0 ] || [ \$status = 124 ]"

# An LSTM, whose steps wait for each other, and dropout: do the losses fall, and how many tokens a second are there?
step "training an LSTM, and with dropout" 40 \
    "for options in '--recipe shazeer-lstm' '--recipe mixtral --dropout 0.1 $heads'; do rm -rf dev/build/gpu_check_run
    echo \"\$options\"; timeout -s INT 18 $trainer --out dev/build/gpu_check_run $short \$options; status=\$?
    echo; grep '\"type\":\"step\"' dev/build/gpu_check_run/log.jsonl | tail -1
    [ \$status = 0 ] || [ \$status = 124 ] || exit 1; done"

if [ "$emulated" = 1 ]; then
    skip compute-sanitizer "emulated"
elif [ $can_test = 1 ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step $tool 40 "for test in experts attention lstm accumulation; do VALGRIND=1 TEST=test_gpu_\$test TRAIN_MOE_CU= \\
            compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 ${tests}_bf16 || exit 1; done"
    done
else
    skip compute-sanitizer "no cmocka or no compute-sanitizer here"
fi

if "$python" -c 'import torch' 2>/dev/null; then
    step "beside PyTorch" 65 "stdbuf -oL $bench torch D E"
else
    skip "beside PyTorch" "$python has no PyTorch (TORCH_PYTHON names another)"
fi

say
say "$outcomes$failures failed; $(($(date +%s) - began)) s of $limits at most; all is in $report"
[ $failures = 0 ]
