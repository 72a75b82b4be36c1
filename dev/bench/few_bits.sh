#!/bin/sh
# What few bits cost: a table of bits per byte by scheme, and by which experts were cut (doc/few_bits.md).
#
#     dev/bench/few_bits.sh RUN [OPTIONS]     OPTIONS go to each --evaluate: --eval-tokens 0 reads all validation tokens
#
# Each model is written beside the run, measured, and removed. The program is ./train_moe, or what TRAIN_MOE names.
set -e
[ $# -ge 1 ] || { echo "usage: dev/bench/few_bits.sh RUN [OPTIONS]"; exit 2; }
program=${TRAIN_MOE:-./train_moe}
run=$1
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# loss FOLDER: its bits per byte
loss() {
    folder=$1
    shift
    "$program" --out "$folder" --evaluate "$@" > "$scratch/out"
    sed -n 's/.*, \([0-9.]*\) bits per byte.*/\1/p' "$scratch/out"
}

full=$(loss "$run" "$@")
size=$(sed -n 's/.*memory: \([0-9.]*\) MiB.*/\1/p' "$scratch/out")
echo "| weights of the experts | of the choices at 4 bits | weights, MiB | bits per byte | lost |"
echo "| --- | ---: | ---: | ---: | ---: |"
echo "| float32 | | $size | $full | |"

# row NAME OPTIONS: one more model
row() {
    name=$1
    shift
    rm -rf "$scratch/model"
    "$program" --out "$run" --quantized "$scratch/model" --quantize $1 > "$scratch/said"
    share=$(sed -n 's/.*theirs are \([0-9.]*%\) of the choices.*/\1/p' "$scratch/said")
    shift
    found=$(loss "$scratch/model" "$@")
    size=$(sed -n 's/.*memory: \([0-9.]*\) MiB.*/\1/p' "$scratch/out")
    lost=$(awk "BEGIN { printf \"%+.5f\", $found - $full }")
    echo "| $name | $share | $size | $found | $lost |"
}

row "8 bits" q8_0 "$@"
row "4 bits" q4_0 "$@"
for few in 0.25 0.5 0.75; do
    row "$few of the experts 4 bits, those chosen most rarely" "mixed --few $few" "$@"
    row "$few of the experts 4 bits, those chosen most often" "mixed-often --few $few" "$@"
done
