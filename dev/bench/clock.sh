#!/usr/bin/env bash
# Trains dense and a mixture of equal active size at the same time, one thread each, and prints Markdown tables of
# val_bpb against time: when does the mixture reach the value that dense ends with? --also adds more models.
# What is finished is not trained again and what was cut off goes on: after Ctrl-C, type the same command again.
set -eu
export LC_ALL=C

# The model and its training, the same for both, and what each has of its own (these override).
common="--layers 4 --dim 32 --heads 2 --seq 128 --batch 8 --warmup 100"
dense="--recipe dense --topk 2 --ffn 64 --lr 8e-3"
mixture="--recipe mixtral --experts 16 --topk 4 --ffn 32 --lr 8e-3"
steps=2000 mixture_steps='' seeds="1 2 3"

. "$(dirname "$0")/data.sh" # fail, find_program, find_data, finished, awk_number
. "$(dirname "$0")/runs.sh" # prepare_runs, train_all, end_runs
called="dev/bench/clock.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
out=$root/runs/clock data='' from='' only_table=''
sides=(dense mixture)
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/clock.sh [--data DIR | --from DIR] [--out DIR] [--seeds "1 2 3"] [--steps N] [--mixture-steps N]
                    [--common OPTIONS] [--dense OPTIONS] [--mixture OPTIONS] [--also NAME OPTIONS]... [--table]

  --data DIR          tokens to train on (default: OUT/data if it is there, else data/tinystories, else data/stories)
  --from DIR          make OUT/data, unless it is there, of DIR/*train*.txt and DIR/*valid*.txt: 4096 tokens
  --out DIR           where the runs live (default $out)
  --seeds LIST        one pair of runs each (default $seeds)
  --steps N           steps of a run (default $steps)
  --mixture-steps N   steps of the mixture's runs, which are also the length of its schedule (default: as --steps)
  --common OPTIONS    of train_moe, for both ($common)
  --dense OPTIONS     for dense alone ($dense)
  --mixture OPTIONS   for the mixture alone ($mixture)
  --also NAME OPTIONS one more model beside dense, with tables of its own, and as many steps as the mixture
  --table             train nothing, print the tables of what is finished

The tables go to standard output, progress to standard error. The variable TRAIN_MOE names another train_moe. All runs
of a seed start together, one thread each, each on a core of its own where taskset exists, so that they suffer the same
noise. With two cores or more, but fewer than models, the rest of a seed follows when the first ones have ended; with one
core, or without taskset, all run at once, not pinned. Time is that of the steps alone: no evaluation, no checkpoint.
END
        exit ;;
    --table)
        only_table=1
        shift ;;
    --also)
        [ $# -ge 3 ] || fail "$1 needs a name and options" 2
        [[ $2 =~ ^[a-z][a-z0-9_]*$ ]] || fail "--also $2: a name has small letters, digits and _" 2
        [[ " ${sides[*]} data from out steps mixture_steps seeds common " != *" $2 "* ]] || fail "--also $2: this name is taken" 2
        sides+=("$2")
        printf -v "also_$2" %s "$3"
        shift 3 ;;
    --data | --from | --out | --steps | --mixture-steps | --seeds | --common | --dense | --mixture)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        name=${1#--}
        printf -v "${name//-/_}" %s "$2" # $data, $from and so on
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
mixture_steps=${mixture_steps:-$steps}
for number in "$steps" "$mixture_steps"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number: not a number of steps" 2
done

tables() {
    local side
    for side in "${sides[@]:1}"; do
        [ "$side" = mixture ] || echo
        table "$side"
    done
}

table() { # $1: what is compared with dense
    local other=$1 logs=() unfinished='' dir pair
    for dir in "$out"/dense-seed*; do
        pair=$out/$other-${dir##*/dense-}
        if finished "$dir/log.jsonl" && finished "$pair/log.jsonl"; then
            logs+=("$dir/log.jsonl" "$pair/log.jsonl")
        elif [ -d "$dir" ]; then
            unfinished="$unfinished ${dir##*/dense-}"
        fi
    done
    [ ${#logs[@]} -gt 0 ] || fail "$out: no pair of runs of dense and $other there is finished"
    echo "Printed on $(date +%Y-%m-%d) by \`$called\` from pairs of runs on"
    echo
    sort -u "$out"/*-seed*/where.txt | sed 's/^/- /'
    echo
    echo "- dense: \`./train_moe $(cat "$out/dense.txt") --seed SEED\`"
    echo "- $other: \`./train_moe $(cat "$out/$other.txt") --seed SEED\`"
    awk -v other="$other" "$awk_number"'
    # The curve of run r, side and seed: at[r, 1..n[r]] seconds, of[r, .] tokens, bpb[r, .].
    function value(y, r, t,    k) { # y of run r at t seconds: linear between evaluations, "" outside of them
        for (k = 1; k <= n[r] && at[r, k] < t; k++)
            ;
        if (k > n[r]) return t < at[r, n[r]] * 1.000001 ? y[r, n[r]] : ""
        if (k == 1) return at[r, 1] == t ? y[r, 1] : ""
        return y[r, k - 1] + (y[r, k] - y[r, k - 1]) * (t - at[r, k - 1]) / (at[r, k] - at[r, k - 1])
    }
    function tokens(r, t) { return t < at[r, 1] ? of[r, 1] * t / at[r, 1] : value(of, r, t) }
    function reach(x, r, goal,    k) { # x (seconds or tokens) at which run r first has bpb <= goal, "" if it never does
        for (k = 1; k <= n[r] && bpb[r, k] > goal; k++)
            ;
        if (k > n[r]) return ""
        if (k == 1) return x[r, 1]
        return x[r, k - 1] + (x[r, k] - x[r, k - 1]) * (bpb[r, k - 1] - goal) / (bpb[r, k - 1] - bpb[r, k])
    }
    function spread(y, side, part,    i, v, sum, low, high) { # over seeds, at that part of dense'\''s time
        for (i = 1; i <= seeds; i++) {
            v = value(y, side seed[i], part * total["dense" seed[i]])
            if (v == "") return "-"
            sum += v
            if (i == 1 || v < low) low = v
            if (i == 1 || v > high) high = v
        }
        return sprintf("%.4f", sum / seeds) (seeds > 1 ? sprintf(" (%.4f to %.4f)", low, high) : "")
    }
    function mean_tokens(side, part,    i, v, sum) {
        for (i = 1; i <= seeds; i++) {
            v = tokens(side seed[i], part * total["dense" seed[i]])
            if (v == "") return "-"
            sum += v
        }
        return sprintf("%.2f", sum / seeds / 1e6)
    }
    function ratio(name, v) { # prints v in its column, and remembers it for the last line
        if (v == "") { printf " | never"; never[name] = 1; return }
        printf " | %.3f", v
        sums[name] += v
        if (!counted[name]++) low[name] = high[name] = v
        if (v < low[name]) low[name] = v
        if (v > high[name]) high[name] = v
    }
    FNR == 1 {
        match(FILENAME, /[^\/]*-seed[^\/]*\/log.jsonl$/)
        name = substr(FILENAME, RSTART, RLENGTH - 10)
        side = name; sub(/-.*/, "", side)
        if (side != "dense") side = "mixture" # whatever its name is
        sub(/.*-seed/, "", name)
        run = side name
        if (side == "dense") seed[++seeds] = name
        step = seconds = 0
    }
    /^."type":"run"/ {
        if ((from = number("start_step")) > 0) {
            step = from
            stopped[name] = "*"; any_stopped = 1
        }
        active[side] = number("active_params") / 1e6; all[side] = number("params") / 1e6
    }
    /^."type":"step"/ { # ms is the mean of the steps since the line before
        seconds += (number("step") - step) * number("ms") / 1000
        step = number("step"); seen = number("tokens")
    }
    /^."type":"eval"/ {
        k = ++n[run]
        at[run, k] = seconds; of[run, k] = seen; bpb[run, k] = number("val_bpb")
        total[run] = seconds
        all_tokens[run] = seen
    }
    END {
        printf "\nWeights, active / all: dense %.2f / %.2f million, ", active["dense"], all["dense"]
        printf "%s %.2f / %.2f million.\n\n", other, active["mixture"], all["mixture"]
        print "| time, dense = 1 | seconds | dense: tokens, million | dense: val_bpb | " other ": tokens, million |" \
            " " other ": val_bpb |"
        print "| --- | --- | --- | --- | --- | --- |"
        longest = 1
        for (i = 1; i <= seeds; i++) {
            mean += total["dense" seed[i]] / seeds
            part = total["mixture" seed[i]] / total["dense" seed[i]]
            if (part > longest) longest = part
        }
        for (i = 1; i <= 12 || (i - 1) / 12 < longest; i++) {
            part = i / 12
            if (part > 1 && spread(bpb, "mixture", part) == "-") break
            printf "| %.2f | %.0f | %s | %s", part, part * mean, mean_tokens("dense", part), spread(bpb, "dense", part)
            printf " | %s | %s |\n", mean_tokens("mixture", part), spread(bpb, "mixture", part)
        }
        print "\n| seed | dense: val_bpb at its end | " other ": val_bpb at its end | its time | " other " reaches the end" \
            " of dense: time | tokens | a token of it takes |"
        print "| --- | --- | --- | --- | --- | --- | --- |"
        for (i = 1; i <= seeds; i++) {
            d = "dense" seed[i]; m = "mixture" seed[i]
            goal = bpb[d, n[d]]
            printf "| %s%s | %.4f | %.4f", seed[i], stopped[seed[i]], goal, bpb[m, n[m]]
            sums["dense"] += goal; sums["mixture"] += bpb[m, n[m]]
            ratio("end", total[m] / total[d])
            t = reach(at, m, goal)
            ratio("time", t == "" ? "" : t / total[d])
            ratio("tokens", t == "" ? "" : reach(of, m, goal) / all_tokens[d])
            t = total[d] < total[m] ? total[d] : total[m] # both still ran
            ratio("tax", tokens(d, t) / tokens(m, t))
            print " |"
            t = reach(at, d, goal) / total[d]
            if (t < 0.98) early = early sprintf("\nSeed %s: dense itself first had the val_bpb of its end at %.2f of" \
                " its time.\n", seed[i], t)
        }
        printf "| mean | %.4f | %.4f", sums["dense"] / seeds, sums["mixture"] / seeds
        split("end time tokens tax", names, " ")
        for (i = 1; i <= 4; i++)
            if (never[names[i]]) printf " | -"
            else printf " | %.3f (%.3f to %.3f)", sums[names[i]] / seeds, low[names[i]], high[names[i]]
        print " |"
        if (any_stopped) print "\n\\* stopped and gone on with: its two runs were not beside each other all the time."
        printf "%s", early
    }' "${logs[@]}"
    cat << 'END'

Of several seeds the mean, the lowest and the highest. Time is that of the steps alone, without evaluations and
checkpoints, and between evaluations curves are straight. Times and tokens are shares of those of the dense run of the same
seed; the last column compares the time of a token with that of dense, as long as both ran.
END
    [ -z "$unfinished" ] || printf '\nNot finished:%s\n' "$unfinished"
}

[ -d "$out" ] || [ -z "$only_table" ] || fail "$out: no such folder"
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$only_table" ]; then
    tables
    exit
fi

# The program and the data.
find_program
find_data "$root/data/tinystories" "$root/data/stories"

options() { # $1: side, $2: steps; some 25 evaluations, each behind a step that is logged
    local every=$(($2 / 250 * 10))
    [ $every -gt 0 ] || every=10
    local own=$1
    [ "$1" = dense ] || [ "$1" = mixture ] || own=also_$1
    echo "--data $(printf %q "$data") $common --steps $2 ${!own} --threads 1 --log-every 10 --eval-every $every" \
        "--eval-tokens 0 --sample-every 0 --tokens 1 --save-every $every --keep 1"
}
remember() { # $1: file, $2: the options of the runs there; fails where they were others
    [ -s "$1" ] || echo "$2" > "$1"
    [ "$(cat "$1")" = "$2" ] || fail "$out was trained with other options; remove it or choose another --out. They were \
$(cat "$1")" 2
}
remember "$out/dense.txt" "$(options dense "$steps")"
for side in "${sides[@]:1}"; do
    remember "$out/$side.txt" "$(options "$side" "$mixture_steps")"
done

prepare_runs
say_seed() { printf %s "$1" >&2; }
say_model() { printf ' %s' "$1" >&2; }
say_end() { echo >&2; }
read -r -a list <<< "$seeds"
together=${#cores[@]} # runs at a time
[ $together -ge 2 ] || together=${#sides[@]} # one core, or none that can be chosen: all share what there is
echo "${#list[@]} seeds of ${sides[*]}; what train_moe says goes to train.txt in each one's folder in $out" >&2
train_all "$seeds" "$together" 0 "${sides[@]}"
end_runs tables
