#!/usr/bin/env bash
# The contest: what learns most in ten minutes? `fast`, our best dense model and PyTorch's best train one after the other, for
# so many minutes each, with the same threads, on the same text and tokenizer, and are judged on the same held-out text. And
# what does `fast` learn in a third of the time, with a schedule of its own?
#
#     make contest                                        ten minutes each, data/tinystories or else the built-in stories
#     make contest MINUTES=2 PYTHON=/path/to/python       PYTHON: one that has PyTorch; without it our models run alone
#     dev/bench/contest.sh --from DIR_OF_TEXTS            other options: -h
#
# What is finished is kept: after an interruption the same command goes on with the next entrant.
set -eu
export LC_ALL=C
unset OMP_WAIT_POLICY # which make sets, and a user would not have

# The entrants. A model's sizes are what all share; each has what suits it best besides (doc/clock.md says how it was found).
# FAST and DENSE are options of train_moe, TORCH_... of dev/bench/torch_train.py. DENSE has all that `fast` has but the experts.
SIZES="--layers 4 --dim 64 --heads 4 --ffn 128 --topk 2 --seq 128"
OURS="--batch 8"
FAST="--recipe fast --experts 8 --lr 8e-3"
DENSE="--recipe dense --qk-norm --value-embedding --ngrams 16384 --lr 8e-3"
TORCH="--batch 8 --lr 12e-3"
TORCH_DENSE="$TORCH --compile"
TORCH_MIXTURE="$TORCH --experts 8 --by all --compile"
entrants="fast fast-third dense torch-dense torch-mixture"

. "$(dirname "$0")/data.sh" # fail, find_program, find_data, awk_number, describe_machine
python=${PYTHON:-python3}
minutes=${MINUTES:-10}
called="dev/bench/contest.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
[ -z "${MINUTES:-}" ] || called="MINUTES=$MINUTES $called"
out=$root/runs/contest data='' from='' threads='' only_table=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: [MINUTES=10] [PYTHON=python3] dev/bench/contest.sh [--data DIR | --from DIR] [--out DIR] [--threads N] [--minutes M]
                    [--entrants LIST] [--table]

  --data DIR       tokens to train on (default: OUT/data if it is there, else data/tinystories, else data/stories)
  --from DIR       make OUT/data, unless it is there, of DIR/*train*.txt and DIR/*valid*.txt: 4096 tokens
  --out DIR        where the runs live (default $out)
  --threads N      of each (default: as many as there are cores)
  --minutes M      of each (default $minutes)
  --entrants LIST  some of: $entrants
  --table          train nothing, print the table of what is finished

The options of the entrants are variables at the top of this script: SIZES, OURS, FAST, DENSE, TORCH...
END
        exit ;;
    --table)
        only_table=1
        shift ;;
    --data | --from | --out | --threads | --minutes | --entrants)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
[[ $minutes =~ ^[0-9]*\.?[0-9]+$ ]] || fail "$minutes: not a number of minutes" 2
threads=${threads:-$(getconf _NPROCESSORS_ONLN)}

options_of() { # $1: entrant; the options that make it what it is
    case $1 in
    fast | fast-third) echo "$SIZES $OURS $FAST" ;;
    dense) echo "$SIZES $OURS $DENSE" ;;
    torch-dense) echo "$SIZES $TORCH_DENSE" ;;
    torch-mixture) echo "$SIZES $TORCH_MIXTURE" ;;
    *) fail "$1: there is no such entrant" 2 ;;
    esac
}
for entrant in $entrants; do options_of "$entrant" > /dev/null; done
minutes_of() { # $1: entrant
    if [ "$1" = fast-third ]; then awk -v m="$minutes" 'BEGIN { printf "%.4g", m / 3 }'; else echo "$minutes"; fi
}

ended() { [ -f "$1/log.jsonl" ] && grep -q '^{"type":"end"' "$1/log.jsonl"; } # $1: a run's folder

table() {
    local logs=() entrant
    for entrant in $entrants; do
        if ended "$out/$entrant"; then logs+=("$out/$entrant/log.jsonl"); fi
    done
    [ ${#logs[@]} -gt 0 ] || fail "$out: nothing there is finished"
    printf 'Printed on %s by `%s` from runs on\n\n' "$(date +%Y-%m-%d)" "$called"
    sort -u "$out"/*/where.txt | sed 's/^/- /'
    echo
    awk "$awk_number"'
    FNR == 1 {
        run = FILENAME; sub(/\/log.jsonl$/, "", run); sub(/.*\//, "", run)
        order[++runs] = run
        step = 0
    }
    /^."type":"run"/ {
        all[run] = number("params") / 1e6; active[run] = number("active_params") / 1e6
        title[run] = "ours, " run
        if (match($0, /"program":"[^"]*"/))
            title[run] = substr($0, RSTART + 11, RLENGTH - 12) (run ~ /mixture/ ? ", mixture" : ", dense")
    }
    /^."type":"step"/ { # ms is the mean of the steps since the line before
        seconds[run] += (number("step") - step) * number("ms") / 1000
        step = number("step"); tokens[run] = number("tokens")
    }
    /^."type":"eval"/ {
        k = ++n[run]
        at[run, k] = seconds[run]; bpb[run, k] = number("val_bpb"); judged[run] = number("val_tokens")
    }
    END {
        print "| | bits per byte | tokens, million | weights, million | at work for a token | seconds | tokens/s |"
        print "| --- | --- | --- | --- | --- | --- | --- |"
        for (i = 1; i <= runs; i++) {
            r = order[i]
            printf "| %s | %.4f | %.2f | %.2f | %.2f | %.0f | %.0f |\n", title[r], bpb[r, n[r]], tokens[r] / 1e6, all[r],
                active[r], seconds[r], tokens[r] / seconds[r]
        }
        printf "\nBits per byte are of all %d held-out tokens. Seconds are those of the training steps alone.\n\n", judged[order[1]]
        for (i = 1; i <= runs; i++) {
            r = order[i]
            if (judged[r] != judged[order[1]])
                printf "- %s was judged on %d tokens, so its figure cannot be compared.\n", title[r], judged[r]
            if (r ~ /^fast/ || !n["fast"]) continue
            goal = bpb[r, n[r]]
            for (k = 1; k <= n["fast"] && bpb["fast", k] > goal; k++)
                ;
            if (k > n["fast"]) { printf "- `fast` never had what %s ends with.\n", title[r]; continue }
            t = at["fast", k]
            if (k > 1) t = at["fast", k - 1] + (t - at["fast", k - 1]) * (bpb["fast", k - 1] - goal) / \
                (bpb["fast", k - 1] - bpb["fast", k])
            printf "- `fast` had what %s ends with, %.4f, after %s%.1f s, %.2f of its time.\n", title[r], goal,
                (k > 1 ? "" : "at most "), t, t / seconds[r]
        }
    }' "${logs[@]}"
    for entrant in $entrants; do
        if ended "$out/$entrant"; then echo "- $entrant: $(cat "$out/$entrant/options.txt")"
        else echo "- $entrant: not trained, or not to the end"; fi
    done
}

[ -d "$out" ] || [ -z "$only_table" ] || fail "$out: no such folder"
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$only_table" ]; then
    table
    exit
fi

# The program and the data.
find_program
find_data "$root/data/tinystories" "$root/data/stories"

describe_machine
where="$machine, $threads threads each, commit $commit, $(date +%Y-%m-%d)"

child=''
stop() {
    trap '' INT TERM HUP
    [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || :
    wait
    echo "stopped; the same command trains anew what is not finished" >&2
    exit 130
}
trap stop INT TERM HUP
run() { # in the background, so that a signal to this script need not wait for the end
    local rc=0
    "$@" < /dev/null &
    child=$!
    wait "$child" || rc=$?
    child=''
    return $rc
}

# Our models are evaluated some 25 times on the way, for the curve. A short try says how many steps lie between.
steps_between() { # $1: entrant, $2...: its options
    local ms
    rm -rf "$out/try"
    run "$train" --out "$out/try" --minutes 0.05 "${@:2}" > "$out/try.txt" 2>&1 || fail "a try failed: $(tail -n 1 "$out/try.txt")"
    ms=$(sed -n 's/^{"type":"minutes",.*"step_ms":\([-+0-9.e]*\).*/\1/p' "$out/try/log.jsonl")
    every=$(awk -v m="$(minutes_of "$1")" -v ms="$ms" 'BEGIN { n = int(m * 60000 / ms / 250) * 10; print n < 10 ? 10 : n }')
    rm -rf "$out/try" "$out/try.txt"
}
train_ours() { # $1: entrant
    local list
    read -r -a list <<< "$(options_of "$1") --threads $threads --eval-tokens 0 --sample-every 0 --tokens 1 --save-every 0"
    list+=(--data "$data")
    steps_between "$1" "${list[@]}" --eval-every 0
    run "$train" --out "$out/$1" --minutes "$(minutes_of "$1")" --log-every 10 --eval-every "$every" "${list[@]}" \
        > "$out/$1/train.txt" 2>&1
}
train_torch() { # $1: entrant
    local list
    read -r -a list <<< "$(options_of "$1") --threads $threads"
    run "$python" "$root/dev/bench/torch_train.py" --data "$data" --out "$out/$1" --minutes "$minutes" "${list[@]}" \
        > "$out/$1/train.txt" 2>&1
}
torch=''
"$python" -c 'import torch' 2> /dev/null && torch=1
[ -n "$torch" ] || echo "$python has no PyTorch, so its entrants do not run: pip install torch, or name a python that has it \
by PYTHON=..." >&2
failed=''
for entrant in $entrants; do
    line="$(minutes_of "$entrant") minutes, $threads threads, $(options_of "$entrant") --data $data"
    dir=$out/$entrant
    if ended "$dir"; then
        [ "$(cat "$dir/options.txt")" = "$line" ] || fail "$dir was trained with other options; remove it or choose another \
--out. They were $(cat "$dir/options.txt")" 2
        continue
    fi
    [[ $entrant != torch-* ]] || [ -n "$torch" ] || continue
    rm -rf "$dir"
    mkdir -p "$dir"
    echo "$line" > "$dir/options.txt"
    echo "$where" > "$dir/where.txt"
    echo "$entrant: $(minutes_of "$entrant") minutes" >&2
    rc=0
    if [[ $entrant = torch-* ]]; then train_torch "$entrant" || rc=$?; else train_ours "$entrant" || rc=$?; fi
    if [ $rc -ne 0 ] || ! ended "$dir"; then
        echo "$entrant FAILED: $(tail -n 1 "$dir/train.txt")" >&2
        failed="$failed $entrant"
    fi
done
rc=0
(table) || rc=1
[ -z "$failed" ] || fail "failed:$failed; the reason is at the end of train.txt in each one's folder in $out"
exit $rc
