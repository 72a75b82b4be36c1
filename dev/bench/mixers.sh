#!/usr/bin/env bash
# Trains models that differ in a few options on the same tokens, with several seeds, and prints a Markdown table: loss and
# bits per byte at the end, time of the steps, weights, operations, and what generation keeps of a text.
# What is finished is not trained again and what was cut off goes on: after Ctrl-C, type the same command again.
set -eu
export LC_ALL=C

common="--layers 4 --dim 64 --heads 4 --ffn 64 --seq 128 --batch 8 --warmup 100 --lr 8e-3"
steps=2000 seeds="1 2 3"

. "$(dirname "$0")/data.sh" # fail, find_program, find_data, finished, awk_number
. "$(dirname "$0")/runs.sh" # prepare_runs, train_all, end_runs
called="dev/bench/mixers.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
out=$root/runs/mixers data='' from='' only_table=''
names=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/mixers.sh [--data DIR | --from DIR] [--out DIR] [--seeds "1 2 3"] [--steps N] [--common OPTIONS]
                     [--table] --model NAME OPTIONS [--model NAME OPTIONS]...

  --data DIR          tokens to train on (default: OUT/data if it is there, else data/tinystories, else data/stories)
  --from DIR          make OUT/data, unless it is there, of DIR/*train*.txt and DIR/*valid*.txt: 4096 tokens
  --out DIR           where the runs live (default $out)
  --seeds LIST        one run of each model each (default $seeds)
  --steps N           steps of a run (default $steps)
  --common OPTIONS    of train_moe, for all models ($common)
  --model NAME ...    a model and its own options, which override the common ones; a row of the table
  --table             train nothing, print the table of what is finished

For example, dense attention beside experts in attention:
  dev/bench/mixers.sh --model attention "" --model switchhead "--recipe switchhead" --model moa "--recipe moa"

The table goes to standard output, progress to standard error. The variable TRAIN_MOE names another train_moe. Runs have
one thread each; as many start together as there are cores, each on a core of its own where taskset exists, and models
change cores from seed to seed. Time is that of the steps alone: no evaluation, no checkpoint.
END
        exit ;;
    --table)
        only_table=1
        shift ;;
    --model)
        [ $# -ge 3 ] || fail "$1 needs a name and options" 2
        [[ $2 =~ ^[a-z][a-z0-9_]*$ ]] || fail "--model $2: a name has small letters, digits and _" 2
        [[ " ${names[*]-} " != *" $2 "* ]] || fail "--model $2: this name is taken" 2
        names+=("$2")
        printf -v "options_$2" %s "$3"
        shift 3 ;;
    --data | --from | --out | --steps | --seeds | --common)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || fail "--steps $steps: not a number of steps" 2
[ ${#names[@]} -gt 0 ] || fail "no --model is named (-h shows an example)" 2

table() {
    local name dir logs=() unfinished=''
    for name in "${names[@]}"; do
        for dir in "$out/$name"-seed*; do
            if finished "$dir/log.jsonl"; then
                logs+=("$dir/log.jsonl")
            elif [ -d "$dir" ]; then
                unfinished="$unfinished ${dir##*/}"
            fi
        done
    done
    [ ${#logs[@]} -gt 0 ] || fail "$out: no run of these models is finished there"
    echo "Printed on $(date +%Y-%m-%d) by \`$called\` from runs on"
    echo
    sort -u "$out"/*-seed*/where.txt | sed 's/^/- /'
    echo
    for name in "${names[@]}"; do
        echo "- $name: \`./train_moe $(cat "$out/$name.txt") --seed SEED\`"
    done
    awk "$awk_number"'
    function add(what, value) { # one more seed
        sum[what] += value
        if (!counted[what]++) low[what] = high[what] = value
        if (value < low[what]) low[what] = value
        if (value > high[what]) high[what] = value
    }
    function mean(what, format) {
        if (counted[what] == 1) return sprintf(format, sum[what])
        return sprintf(format " (" format " to " format ")", sum[what] / counted[what], low[what], high[what])
    }
    function close_run() {
        if (model == "") return
        add(model " loss", loss); add(model " bpb", bpb); add(model " seconds", seconds)
        add(model " time", 1e6 * seconds / tokens)
    }
    FNR == 1 {
        close_run()
        match(FILENAME, /[^\/]*-seed[^\/]*\/log.jsonl$/)
        model = substr(FILENAME, RSTART, RLENGTH - 10)
        sub(/-seed.*/, "", model)
        if (!seen[model]++) list[++models] = model
        step = seconds = 0
    }
    /^."type":"run"/ {
        active[model] = number("active_params") / 1e6; all[model] = number("params") / 1e6
        flops[model] = number("flops_per_token") / 1e6; cache[model] = number("cache_bytes") / 1024
        length_of[model] = number("seq")
        if (number("start_step") > 0) step = number("start_step")
    }
    /^."type":"step"/ { # ms is the mean of the steps since the line before
        seconds += (number("step") - step) * number("ms") / 1000
        step = number("step"); tokens = number("tokens")
    }
    /^."type":"eval"/ { loss = number("val_loss"); bpb = number("val_bpb") }
    END {
        close_run()
        print "\n| | weights at work / all, million | operations a token, million | generation keeps of " length_of[list[1]] \
            " tokens, KiB | loss at the end | bits per byte | seconds | microseconds a token |"
        print "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for (i = 1; i <= models; i++) {
            m = list[i]
            printf "| %s | %.3f / %.3f | %.2f | %.1f | %s | %s | %s | %s |\n", m, active[m], all[m], flops[m], cache[m],
                mean(m " loss", "%.4f"), mean(m " bpb", "%.4f"), mean(m " seconds", "%.0f"), mean(m " time", "%.1f")
        }
    }' "${logs[@]}"
    cat << 'END'

Of several seeds the mean, the lowest and the highest. Loss is the cross-entropy of the validation text, in nats a token.
Operations are those of training. Time is that of the steps alone, without evaluations and checkpoints; runs stood beside
each other, one thread each.
END
    [ -z "$unfinished" ] || printf '\nNot finished:%s\n' "$unfinished"
}

[ -d "$out" ] || [ -z "$only_table" ] || fail "$out: no such folder"
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$only_table" ]; then
    table
    exit
fi
find_program
find_data "$root/data/tinystories" "$root/data/stories"

every=$((steps / 100 * 10))
[ $every -gt 0 ] || every=$steps
for name in "${names[@]}"; do # fails where the runs there had other options
    own=options_$name
    line="--data $(printf %q "$data") $common --steps $steps ${!own} --threads 1 --log-every 10 --eval-every $every \
--eval-tokens 0 --sample-every 0 --tokens 1 --save-every $every --keep 1"
    [ -s "$out/$name.txt" ] || echo "$line" > "$out/$name.txt"
    [ "$(cat "$out/$name.txt")" = "$line" ] || fail "$out: $name was trained with other options; remove it or choose another --out. \
They were $(cat "$out/$name.txt")" 2
done

prepare_runs
say_seed() { echo "$1 ${names[*]}; what train_moe says goes to train.txt in each one's folder in $out" >&2; }
say_model() { echo "$1" >&2; }
say_end() { :; }
together=${#cores[@]} # runs at a time
[ $together -ge 2 ] || together=1
train_all "$seeds" "$together" "$together" "${names[@]}"
end_runs table
