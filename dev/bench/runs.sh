# What clock.sh and mixers.sh share: runs of several models with several seeds, one thread each, side by side. What is finished
# is not trained again, and what was stopped goes on. Sourced after data.sh.
# Gives: prepare_runs, train_all, end_runs. Needs: data.sh; $out, in which MODEL.txt has the options of a model; and of the script
# three functions that tell how far it is, see train_all.

# Sets $cores, those that this program may use, where this system lets a program choose: "0-3,8" becomes 0 1 2 3 8. Sets $where,
# what the figures are measured on. From here on, a signal stops the runs, too.
prepare_runs() {
    local mine range core pinned="not pinned"
    cores=() children=()
    if command -v taskset > /dev/null && mine=$(taskset -cp $$ 2> /dev/null); then
        for range in $(echo "${mine##*: }" | tr , ' '); do
            for ((core = ${range%-*}; core <= ${range#*-}; core++)); do cores+=("$core"); done
        done
    fi
    describe_machine
    [ ${#cores[@]} -lt 2 ] || pinned="a core each"
    where="$machine, one thread and $pinned, commit $commit, $(date +%Y-%m-%d)"
    trap stop INT TERM HUP
}

stop() { # train_moe saves, and goes on next time
    trap '' INT TERM HUP
    [ ${#children[@]} -eq 0 ] || kill -TERM "${children[@]}" 2> /dev/null || :
    wait
    echo "stopped; the same command goes on from here" >&2
    exit 130
}

start() { # $1: model, $2: seed, $3: which of the cores
    local dir=$out/$1-seed$2 pin=()
    mkdir -p "$dir"
    ! finished "$dir/log.jsonl" || return 0
    [ ${#cores[@]} -lt 2 ] || pin=(taskset -c "${cores[$3]}")
    echo "$where" >> "$dir/where.txt"
    # In the background, so that a signal to this script need not wait for the end of the run.
    eval "exec_options=($(cat "$out/$1.txt"))"
    OMP_NUM_THREADS=1 ${pin[@]+"${pin[@]}"} "$train" --resume --out "$dir" "${exec_options[@]}" --seed "$2" \
        < /dev/null >> "$dir/train.txt" 2>&1 &
    children+=($!)
}

# $1: seeds, $2: runs at a time, $3: the cores that these change among from seed to seed, or 0: as many as start together;
# the rest: models. The script's functions say_seed, say_model and say_end print the text that each of them is given. Sets $failed.
train_all() {
    local list seed some first k child rc name dir i=0 together=$2 turns=$3
    read -r -a list <<< "$1"
    shift 3
    failed=''
    for seed in "${list[@]}"; do
        say_seed "[$((i + 1))/${#list[@]}] seed $seed:"
        for ((first = 1; first <= $#; first += together)); do
            some=("${@:first:together}")
            for k in "${!some[@]}"; do
                start "${some[k]}" "$seed" $(((k + i) % (turns > 0 ? turns : ${#some[@]})))
            done
            for child in ${children[@]+"${children[@]}"}; do
                rc=0
                wait "$child" || rc=$?
                [ $rc -ne 130 ] || stop
            done
            children=()
        done
        i=$((i + 1))
        for name in "$@"; do
            dir=$out/$name-seed$seed
            if finished "$dir/log.jsonl"; then
                say_model "$name $(sed -n 's/^."type":"eval",.*"val_bpb":\([0-9.]*\).*/\1/p' "$dir/log.jsonl" | tail -n 1)"
            else
                failed="$failed ${dir##*/}"
                say_model "$name FAILED: $(tail -n 1 "$dir/train.txt")"
            fi
        done
        say_end
    done
}

# Prints what is finished, by function $1, and ends the script.
end_runs() {
    local rc=0
    ("$1") || rc=1
    [ -z "$failed" ] || fail "failed:$failed; the reason is at the end of train.txt in each one's folder in $out"
    exit $rc
}
