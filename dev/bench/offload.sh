#!/bin/bash
# Memory and time of --offload N, for N = E/2, E/4, E/8, in training and in generation, with a warm and a cold cache of files.
#   dev/bench/offload.sh [FOLDER [PROGRAM [STEPS [TOKENS]]]]
# FOLDER (offload_bench) must be on a disk, and not there yet; STEPS (10) are trained, TOKENS (40) generated. Prints a table of the
# largest memory that the process held, its wall-clock time less that of a run of a single step or token, and its processor time.
# All runs of training must give the same weights, and all of generation the same text, or the script fails.
set -e
folder=${1:-offload_bench} program=${2:-./train_moe} steps=${3:-10} tokens=${4:-40}
size="--layers 4 --dim 256 --heads 4 --experts 32 --topk 2 --ffn 512 --seq 64 --batch 1"
quiet="--eval-every 0 --sample-every 0 --eval-tokens 64 --tokens 1 --warmup 1 --save-every 0"
data=${DATA:-data/stories}
mkdir "$folder"

# measure NAME COMMAND...: its output goes to NAME.txt; sets peak (MiB), wall and cpu (seconds)
measure() {
    local name=$1
    shift
    python3 - "$folder/$name.txt" "$@" >"$folder/use.txt" <<'PYTHON'
import resource, subprocess, sys, time
start = time.time()
with open(sys.argv[1], "w") as out:
    status = subprocess.call(sys.argv[2:], stdout=out, stderr=subprocess.STDOUT)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print("%d %.2f %.2f" % (use.ru_maxrss / 1024, time.time() - start, use.ru_utime + use.ru_stime))
sys.exit(status)
PYTHON
    read -r peak wall cpu <"$folder/use.txt"
}

less() { awk -v a="$1" -v b="$2" -v n="$3" 'BEGIN { printf "%.3f", (a - b) / n }'; }

row() { # row WHAT COUNT LABEL RUN_OF_ONE RUN_OF_MANY: two commands as strings
    measure one $4
    local first=$wall first_cpu=$cpu
    measure many $5
    printf '%-11s %-22s %7s MiB %9s s wall %9s s processor, each\n' "$1" "$3" "$peak" "$(less $wall $first $2)" "$(less $cpu $first_cpu $2)"
    grep -h "^--offload" "$folder/many.txt" | sed 's/^/            /' || true
}

choices() { # the options of each row
    echo ""
    for n in 16 8 4; do echo "--offload $n"; done
    for n in 16 8 4; do echo "--offload $n --offload-cold"; done
}

for optimizer in ${OPTIMIZERS:-adamw}; do
    choices | while read -r choice; do
        out="$folder/run-$optimizer$(echo "$choice" | tr -d ' ')"
        train="$program --data $data $size $quiet --optimizer $optimizer $choice"
        row "$optimizer" "$steps" "${choice:-all in memory}" "$train --out $folder/one --steps 2" "$train --out $out --steps $((steps + 2))"
        rm -rf "$folder/one"
        cmp "$folder/run-$optimizer/latest/model.safetensors" "$out/latest/model.safetensors"
        cmp "$folder/run-$optimizer/latest/optimizer.safetensors" "$out/latest/optimizer.safetensors"
        [ -z "$choice" ] || rm -rf "$out"
    done
done
run=$(ls -d "$folder"/run-* | head -1)
choices | while read -r choice; do
    story="$program --out $run --prompt Once --seed 5 $choice"
    row generation "$tokens" "${choice:-all in memory}" "$story --tokens 1" "$story --tokens $((tokens + 1))"
    grep -v "^--offload" "$folder/many.txt" >"$folder/text.txt"
    [ -f "$folder/first.txt" ] || cp "$folder/text.txt" "$folder/first.txt"
    cmp "$folder/first.txt" "$folder/text.txt"
done
rm -rf "$folder"
