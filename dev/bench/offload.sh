#!/bin/bash
# Memory and time of --offload N, for N = E/2, E/4, E/8, in training and in generation, with a warm and a cold cache of files.
#   dev/bench/offload.sh [FOLDER [PROGRAM [STEPS [TOKENS]]]]
# FOLDER (offload_bench) must be on a disk, and not there yet; STEPS (10) are trained, TOKENS (1000) generated. Prints the most memory
# that the process held, the time of a step (the median) or of a token (a long text's less a short one's), and the processors' time
# of the whole command, which other programs disturb less. All runs of training must give the same weights, and all of generation the
# same text, or the script fails. OPTIMIZER (adamw) may be muon.
#   RANKS=2 dev/bench/offload.sh [FOLDER [PROGRAM [STEPS]]]
# The same for training on several processes, by MPIRUN (mpirun), PROGRAM being ./train_moe_mpi: each has its share of the experts and
# its file, and the memory is that of the process that held most.
set -e
ranks=${RANKS:-1} begin="" choices=("" "--offload 16" "--offload 8" "--offload 4" "--offload 16 --offload-cold" "--offload 8 --offload-cold"
    "--offload 4 --offload-cold")
[ "$ranks" = 1 ] || begin="${MPIRUN:-mpirun} -np $ranks" choices=("" "--offload 8" "--offload 4" "--offload 2")
default=./train_moe$([ "$ranks" = 1 ] || echo _mpi)
folder=${1:-offload_bench} program=${2:-$default} steps=${3:-10} tokens=${4:-1000} optimizer=${OPTIMIZER:-adamw}
size="--layers 4 --dim 256 --heads 4 --experts 32 --topk 2 --ffn 512 --seq 64 --batch 1"
quiet="--eval-every 0 --sample-every 0 --eval-tokens 64 --tokens 1 --lr 1e-4 --warmup 1 --save-every 0 --log-every 1"
mkdir "$folder"

# measure COMMAND...: prints MiB of memory at most, seconds, and seconds of processors; what the command says goes to said.txt
measure() {
    python3 -c 'import resource, subprocess, sys, time
start = time.time()
status = subprocess.call(sys.argv[2:], stdout=open(sys.argv[1], "w"), stderr=subprocess.STDOUT)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(use.ru_maxrss // 1024, time.time() - start, use.ru_utime + use.ru_stime)
sys.exit(status)' "$folder/said.txt" "$@"
}

row() { # row WHAT CHOICE MILLISECONDS MIB SECONDS SECONDS_OF_PROCESSORS
    printf '%-8s %-27s %5s MiB %8.1f ms; in all %6.1f s of processors; %s\n' "$1" "${2:-all in memory}" "$4" "$3" "$6" \
        "$(sed -n 's/^--offload [0-9]*: of \([0-9]*\) .* memory \([0-9]*\) times; \(.*\)/\2 of \1 were there, \3/p' "$folder/said.txt")"
}

for choice in "${choices[@]}"; do
    out="$folder/run${choice// /}"
    used=$(measure $begin $program --data ${DATA:-data/stories} $size $quiet --optimizer $optimizer --steps $steps --out "$out" $choice)
    step=$(sed -n 's/.*"type":"step".*"ms":\([0-9.e+]*\).*/\1/p' "$out/log.jsonl" | sort -g | sed -n "$(((steps + 1) / 2))p")
    row "a step" "$choice" "$step" $used
    cmp "$folder/run/latest/model.safetensors" "$out/latest/model.safetensors"
    cmp "$folder/run/latest/optimizer.safetensors" "$out/latest/optimizer.safetensors"
    if [ "$ranks" != 1 ]; then # one process writes stories
        [ -z "$choice" ] || rm -rf "$out"
        continue
    fi

    story="$program --out $folder/run --prompt Once --seed 5 --temperature 2 --top-p 1 $choice"
    few=$(measure $story --tokens 1)
    many=$(measure $story --tokens $((tokens + 1)))
    token=$(echo "$few $many $tokens" | awk '{ print 1000 * ($5 - $2) / $7 }')
    row "a token" "$choice" "$token" $many
    grep -av "^--offload" "$folder/said.txt" >"$folder/text.txt"
    [ -f "$folder/first.txt" ] || cp "$folder/text.txt" "$folder/first.txt"
    cmp "$folder/first.txt" "$folder/text.txt"
    [ -z "$choice" ] || rm -rf "$out"
done
rm -rf "$folder"
