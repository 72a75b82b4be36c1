#!/usr/bin/env bash
# What compressed gradients cost: trains small models on several processes (make train_moe_mpi), with each way of --compress and
# without, and prints Markdown tables: the training loss on the way, and the bytes that all ranks send in a step for gradients and
# weights, as the log counts them. What is finished is not trained again.
set -eu
export LC_ALL=C

. "$(dirname "$0")/data.sh" # fail, find_data, is_number, finished, trained_with, awk_number, describe_machine
called="dev/bench/compress.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
out=$root/runs/compress data='' from='' ranks="2 4" seeds=1 steps=300 every=50 sequences=8
options="--dim 64 --ffn 64 --heads 4 --seq 64 --ep 1"
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/compress.sh [--data DIR] [--out DIR] [--ranks "2 4"] [--seeds "1 2 3"] [--steps N] [--every N] [--sequences N]
                             [--options OPTIONS]

  --data DIR         tokens to train on (default data/stories)
  --out DIR          where the runs live (default $out)
  --ranks LIST       how many processes (default $ranks)
  --seeds LIST       a run each; the tables have their means, and of the validation loss the lowest and the highest (default $seeds)
  --steps N          steps of a run (default $steps)
  --every N          a column of the table for so many steps (default $every)
  --sequences N      of a step, of all processes together (default $sequences)
  --options OPTIONS  of train_moe_mpi ($options)

The tables go to standard output, progress to standard error. The variable TRAIN_MOE_MPI names another train_moe_mpi, MPIRUN another
mpirun. Each process has one thread.
END
        exit ;;
    --data | --out | --ranks | --seeds | --steps | --every | --sequences | --options)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
[ -n "${ranks// /}" ] || fail "--ranks: empty; give at least one number" 2
[ -n "${seeds// /}" ] || fail "--seeds: empty; give at least one number" 2
for name in steps every sequences; do
    is_number "${!name}" || fail "--$name ${!name}: not a whole number above 0" 2
done
for n in $ranks; do
    is_number "$n" && [ "$n" -gt 1 ] || fail "--ranks $n: not a number of processes above 1, and one sends nothing" 2
    [ $((sequences % n)) -eq 0 ] || fail "--sequences $sequences: $n ranks cannot share them evenly" 2
done
[ $((steps % every)) -eq 0 ] || fail "--every $every: it must divide the $steps steps, so that each column of the table is full" 2
train=${TRAIN_MOE_MPI:-$root/train_moe_mpi}
[ -x "$train" ] || fail "$train: not there; build it by: make train_moe_mpi" 2
mkdir -p "$out"
find_data "$root/data/stories"
describe_machine
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1

schemes=("" "--compress bf16" "--compress int8" "--compress topk --compress-ratio 0.1" "--compress topk --compress-ratio 0.01")

folder() { # $1: ranks, $2: scheme, $3: seed
    local name=${2//--compress/}
    echo "$out/$1${name// /-}-seed$3"
}

train_one() { # the same three
    local dir
    dir=$(folder "$@")
    finished "$dir/log.jsonl" || rm -rf "$dir"
    # shellcheck disable=SC2086 # the options are several words
    trained_with "$dir/log.jsonl" --data "$data" $options --batch $((sequences / $1)) --steps "$steps" --log-every "$every"
    [ ! -f "$dir/log.jsonl" ] || return 0
    echo "${dir##*/} ..." >&2
    # shellcheck disable=SC2086 # the options are several words
    ${MPIRUN:-mpirun} -np "$1" "$train" --out "$dir" --data "$data" --threads 1 $options --batch $((sequences / $1)) --steps "$steps" \
        --seed "$3" --log-every "$every" --eval-every 0 --sample-every 0 --save-every 0 $2 > "$out/train.txt" 2>&1 ||
        fail "${dir##*/} failed: $(grep -m 1 '^train_moe_mpi: ' "$out/train.txt" || tail -n 1 "$out/train.txt")"
}

for n in $ranks; do
    for scheme in "${schemes[@]}"; do
        for seed in $seeds; do
            train_one "$n" "$scheme" "$seed"
        done
    done
done

row() { # $1: ranks, $2: scheme
    local seed logs=()
    for seed in $seeds; do
        logs+=("$(folder "$1" "$2" "$seed")/log.jsonl")
    done
    awk -v n="$1" -v every="$every" -v scheme="${2:-as they are}" "$awk_number"'
        FNR == 1 { runs++; count = 0 }
        /^."type":"step"/ && number("step") % every == 0 { loss[++count] += number("loss"); bytes = number("reduce_bytes") }
        /^."type":"eval"/ { validation[runs] = number("val_loss") }
        END {
            for (i = 1; i <= count; i++) row = row sprintf(" %.4f |", loss[i] / runs)
            low = high = validation[1]
            for (i = 1; i <= runs; i++) {
                sum += validation[i]
                low = validation[i] < low ? validation[i] : low
                high = validation[i] > high ? validation[i] : high
            }
            spread = runs > 1 ? sprintf(" (%.4f to %.4f)", low, high) : ""
            printf "| %d | `%s` |%s %.4f%s | %d |\n", n, scheme, row, sum / runs, spread, bytes
        }' "${logs[@]}"
}

echo "Printed on $(date +%Y-%m-%d) by \`$called\` on $machine, commit $commit: \`train_moe_mpi $options --batch $sequences/ranks --steps $steps\`, seeds $seeds."
echo
{
    printf '| ranks | gradients |'
    for ((s = every; s <= steps; s += every)); do printf ' %d |' "$s"; done
    printf ' validation | bytes of a step |\n| --- | --- | --- | --- |'
    for ((s = every; s <= steps; s += every)); do printf ' --- |'; done
    echo
    for n in $ranks; do
        for scheme in "${schemes[@]}"; do
            row "$n" "$scheme"
        done
    done
}
