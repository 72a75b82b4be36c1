#!/usr/bin/env bash
# Trains every recipe at equal active size on TinyStories and prints a Markdown table of what came of it.
# What is finished is not trained again and what was cut off goes on: after Ctrl-C, type the same command again.
set -eu
export LC_ALL=C

# The model and its training, the same for all.
layers=4 dim=128 heads=4 seq=256
batch=8 steps=300 warmup=50 lr=2.5e-3
seeds="1 2 3" # the first for every recipe, the others for these:
several="dense mixtral switch deepseek-v3 expert-choice"

# Equal active size: in each layer a token passes dim*1536 feed-forward weights, those of dense: K=2 times F=256 wide,
# and gated (SwiGLU, GEGLU), which takes three matrices. K chosen and S shared experts of width F have 3*(K+S)*F = 1536
# if they are gated, and if not (ReLU, GELU: two matrices) 2*(K+S)*F = 1536. F is rounded to a multiple of 8.
# The columns: recipe, its options (which override the recipe's own and those above), what they come to.
rows=$(cat << 'END'
dense          --ffn 256    # 3*2*256
mixtral        --ffn 256    # 3*2*256
jacobs         --ffn 64     # 3*8*64: all eight experts work
shazeer        --ffn 192    # 2*4*192
hierarchical   --ffn 192    # 2*4*192
gshard         --ffn 384    # 2*2*384
switch         --ffn 768    # 2*1*768
glam           --ffn 304    # dense layers are gated, 3*2*304, experts are not, 2*2*304: mean 1520 (exact: 307.2)
st-moe         --ffn 256    # 3*2*256
base           --ffn 512    # 3*1*512
hash           --ffn 512    # 3*1*512
history        --ffn 256    # 3*2*256
expert-choice  --ffn 256    # 3*2*256: two experts a token in the mean
threshold      --ffn 256    # 3*2*256 for two experts a token; how many there are, the router decides
variance       --ffn 256    # 3*2*256
multirouter    --ffn 128    # 3*4*128: two routers choose two each
deepseekmoe    --ffn 64     # 3*(7+1)*64
deepseek-v2    --ffn 64     # 3*(6+2)*64
deepseek-v3    --ffn 64     # 3*(7+1)*64
olmoe          --ffn 64     # 3*8*64
qwen3          --ffn 64     # 3*8*64
cmoe           --ffn 320    # two of (3*F/2 + 2*F + 3*F + 2*3*F/2)/4 = 2.375*F in the mean: 1520 (exact: 323.4)
mh-moe         --ffn 216    # 3*2*216, split and merge 2*128 (for dim 128): 1552 (exact: 213.3)
rmoe           --ffn 256    # 3*2*256, and the GRU besides
END
)

. "$(dirname "$0")/data.sh" # fail, find_program, find_data, finished, awk_number, describe_machine
all=$(echo "$rows" | awk '{ printf "%s ", $1 }')
called="dev/bench/compare.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
out=$root/runs/compare recipes=$all data='' from='' only_table=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/compare.sh [--data DIR | --from DIR] [--out DIR] [--steps N] [--seeds "1 2 3"] [--recipes "a b c"] [--table]

  --data DIR      tokens to train on (default: OUT/data if it is there, else data/tinystories)
  --from DIR      make OUT/data, unless it is there, of DIR/*train*.txt and DIR/*valid*.txt: 4096 tokens
  --out DIR       where the runs live, about 60 MB each (default $out)
  --steps N       steps of a run (default $steps)
  --seeds LIST    the first for every recipe, the others for $several (default $seeds)
  --recipes LIST  which ones (default: all)
  --table         train nothing, print the table of what is finished

The table goes to standard output, progress to standard error. The variable TRAIN_MOE names another train_moe.
END
        exit ;;
    --table)
        only_table=1
        shift ;;
    --data | --from | --out | --steps | --seeds | --recipes)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2" # $data, $from and so on
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done

table() {
    local logs=() unfinished='' dir
    for dir in "$out"/*-seed*; do
        [ -d "$dir" ] || continue
        if finished "$dir/log.jsonl"; then logs+=("$dir/log.jsonl"); else unfinished="$unfinished ${dir##*/}"; fi
    done
    [ ${#logs[@]} -gt 0 ] || fail "$out: no run there is finished"
    echo "Printed on $(date +%Y-%m-%d) by \`$called\` from runs on"
    echo
    sort -u "$out"/*-seed*/where.txt | sed 's/^/- /'
    echo
    echo "Each is \`./train_moe --recipe RECIPE $(cat "$out/options.txt") OPTIONS --seed SEED\`"
    echo
    echo "| recipe | options | active / all weights, million | val_bpb | tokens/s | time, dense = 1 | max/mean load" \
        "| dropped | dead | experts a token |"
    echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    awk "$awk_number"'
    function median(r,    n, i) { # of speed[r, 1..n]
        n = speeds[r]
        return (speed[r, int((n + 1) / 2)] + speed[r, int(n / 2) + 1]) / 2
    }
    function mean(total, n, format) { return n ? sprintf(format, total / n) : "-" }
    /^."type":"run"/ {
        match($0, /"recipe":"[^"]*"/)
        r = substr($0, RSTART + 10, RLENGTH - 11) # the recipe, here and below
        steps = number("steps"); every = number("log-every")
        all[r] = number("params"); active[r] = number("active_params")
        file = FILENAME
        sub(/log.jsonl$/, "options.txt", file)
        getline options[r] < file
        close(file)
    }
    /^."type":"step"/ { # speeds are kept in order
        rate = number("tok_s")
        for (i = ++speeds[r]; i > 1 && speed[r, i - 1] > rate; i--)
            speed[r, i] = speed[r, i - 1]
        speed[r, i] = rate
    }
    /^."type":"router"/ && number("step") > (int((steps + every - 1) / every) - 10) * every { # of the last ten lines
        lines[r]++; load[r] += number("max_over_mean"); dropped[r] += number("dropped")
        if (number("step") == steps) dead[r] += number("dead")
        if (number("active") != "") { counted[r]++; chosen[r] += number("active") }
    }
    /^."type":"eval"/ && number("step") == steps {
        bpb = number("val_bpb"); sum[r] += bpb
        if (!seeds[r]++) low[r] = high[r] = bpb
        if (bpb < low[r]) low[r] = bpb
        if (bpb > high[r]) high[r] = bpb
    }
    END {
        for (r in seeds) {
            bpb = sum[r] / seeds[r]; n = lines[r] + 0
            printf "%.9f\t| `%s` | `%s` | ", bpb, r, options[r]
            printf "%.2f / %.2f | %.4f", active[r] / 1e6, all[r] / 1e6, bpb
            if (seeds[r] > 1) printf " (%.4f to %.4f, %d seeds)", low[r], high[r], seeds[r]
            printf " | %.0f | %s", median(r), "dense" in seeds ? sprintf("%.2f", median("dense") / median(r)) : "-"
            printf " | %s | %s", mean(load[r] + 0, n, "%.2f"), mean(100 * dropped[r], n, "%.1f%%")
            printf " | %s", n ? mean(dead[r] + 0, seeds[r], "%.3g") : "-"
            printf " | %s |\n", mean(chosen[r] + 0, counted[r] + 0, "%.2f")
        }
    }' "${logs[@]}" | sort -n | cut -f 2-
    cat << 'END'

The best comes first; of several seeds the mean, the lowest and the highest. tokens/s is the median of the log's lines.
Load, dropped share and experts a token are means over the layers of the last ten logged steps; dead counts experts of
all layers. In every recipe a token passes equally many feed-forward weights a layer, within about 1%, but the papers
place the experts differently: of four layers, `st-moe` has one with experts, `gshard`, `switch` and `glam` have two,
`deepseekmoe`, `deepseek-v2` and `deepseek-v3` three, the others all. `glam` (gated dense layers, ungated experts) and
`cmoe` (experts that differ) are equal in the mean, `mh-moe` in work, its two projections included; `rmoe` has its GRU
besides. `gshard` and `st-moe` leave out some second experts, `threshold` decides how many there are, and for what is
dropped no expert works.
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

# The program, the data, the list of runs: the first seed of all, then the others of some.
find_program
find_data "$root/data/tinystories"
runs=() first=''
for seed in $seeds; do
    first=${first:-$seed}
    for recipe in $recipes; do
        [[ " $all" == *" $recipe "* ]] || fail "--recipes: no $recipe; there are $all" 2
        [[ $seed != "$first" && " $several " != *" $recipe "* ]] || runs+=("$recipe $seed")
    done
done

common=(--layers "$layers" --dim "$dim" --heads "$heads" --seq "$seq" --batch "$batch" --steps "$steps"
    --warmup "$warmup" --lr "$lr" --optimizer adamw --beta2 0.95 --log-every 10 --eval-every 0 --eval-tokens 0 --sample-every 0 --tokens 1
    --save-every 100 --keep 1)
remember() { # $1: file, $2: the options of the runs there; fails where they were others
    [ -s "$1" ] || echo "$2" > "$1"
    [ "$(cat "$1")" = "$2" ] || {
        echo "${1%/*} was trained with other options; remove it or choose another --out. They were $(cat "$1")" >&2
        return 1
    }
}
remember "$out/options.txt" "--data $(printf %q "$data") ${common[*]}" || exit 2

describe_machine
threads=${OMP_NUM_THREADS:+, OMP_NUM_THREADS=$OMP_NUM_THREADS}
where="$machine$threads, commit $commit"

child=''
stop() { # train_moe saves, and goes on next time
    trap '' INT TERM HUP
    [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || :
    wait
    echo "stopped; the same command goes on from here" >&2
    exit 130
}
trap stop INT TERM HUP
echo "${#runs[@]} runs; what train_moe says goes to train.txt in each one's folder in $out" >&2
failed='' i=0
for run in "${runs[@]}"; do
    recipe=${run% *} seed=${run#* } dir=$out/${run% *}-seed${run#* } rc=0
    mkdir -p "$dir"
    read -r -a options <<< "$(echo "$rows" | awk -v r="$recipe" '$1 == r { sub(/#.*/, ""); $1 = ""; print }')"
    printf '[%d/%d] %s, seed %s: ' $((i += 1)) ${#runs[@]} "$recipe" "$seed" >&2
    if ! remember "$dir/options.txt" "${options[*]}" 2>> "$dir/train.txt"; then
        rc=1
    elif ! finished "$dir/log.jsonl"; then
        echo "$where, $(date +%Y-%m-%d)" >> "$dir/where.txt"
        # In the background, so that a signal to this script need not wait for the end of the run.
        "$train" --resume --out "$dir" --recipe "$recipe" --data "$data" "${common[@]}" "${options[@]}" --seed "$seed" \
            < /dev/null >> "$dir/train.txt" 2>&1 &
        child=$!
        wait "$child" || rc=$?
        child=''
        [ $rc -ne 130 ] || stop
    fi
    if [ $rc -eq 0 ] && finished "$dir/log.jsonl"; then
        sed -n 's/^."type":"eval",.*"val_bpb":\([0-9.]*\).*/val_bpb \1/p' "$dir/log.jsonl" | tail -n 1 >&2
    else
        failed="$failed ${dir##*/}"
        echo "FAILED: $(tail -n 1 "$dir/train.txt")" >&2
    fi
done
rc=0
(table) || rc=1
[ -z "$failed" ] || fail "failed:$failed; the reason is at the end of train.txt in each one's folder in $out"
exit $rc
