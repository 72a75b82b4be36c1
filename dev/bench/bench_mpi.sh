#!/usr/bin/env bash
# Prints one table of a training step on one process and on two: time, waiting, bytes moved; with overlap and without,
# with experts divided or not, with copies of them. Then checks the bytes counted against what they should be.
set -euo pipefail
export LC_ALL=C

fail() {
    echo "bench_mpi.sh: $1" >&2
    exit "${2:-1}"
}

root=$(cd "$(dirname "$0")/../.." && pwd)
train=${TRAIN_MOE_MPI:-$root/train_moe_mpi}
cores=$(getconf _NPROCESSORS_ONLN)
layers=2 dim=256 heads=8 experts=8 ffn=512 seq=256 batch=8 # of all ranks together
steps=8 first=4 rounds=3                                   # steps of a run, the first that counts, runs of each row
called="dev/bench/bench_mpi.sh${1:+ $1}"
case ${1:-} in
'') ;;
--quick) dim=128 ffn=256 batch=4 steps=6 first=3 rounds=1 ;;
-h | --help)
    cat << END
usage: dev/bench/bench_mpi.sh [--quick]

Needs train_moe_mpi and data/stories (make train_moe_mpi). The variable TRAIN_MOE_MPI names another program, MPIRUN
another mpirun, with its options. All rows train on the same global batch with all cores of the machine, and take turns,
run by run, so that its noise hits all of them; --quick makes them smaller, for CI.
END
    exit ;;
*) fail "$1: unknown option (-h shows the options)" 2 ;;
esac
[ $# -le 1 ] || fail "$2: one option at most (-h shows the options)" 2
[ -x "$train" ] || fail "$train: cannot run it; build it by make train_moe_mpi"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# More processes than cores, and, in a container, by root; variables for env, then the command.
anywhere="OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1"
read -ra mpirun <<< "${MPIRUN:-$anywhere mpirun}"

run() { # $1: name, $2: ranks, $3: sequences of each, then options of train_moe_mpi
    local name=$1 ranks=$2 each=$3 threads=$((cores / $2 > 0 ? cores / $2 : 1))
    shift 3
    rm -rf "$work/run"
    # make sets OMP_WAIT_POLICY, which a user would not have
    env -u OMP_WAIT_POLICY "${mpirun[@]}" -np "$ranks" --bind-to none "$train" --threads "$threads" \
        --data "$root/data/stories" --out "$work/run" --layers $layers --dim $dim --heads $heads --experts $experts \
        --topk 2 --ffn $ffn --seq $seq --batch "$each" --steps $steps --log-every 1 --eval-tokens 64 --tokens 1 "$@" \
        > "$work/said" 2>&1 < /dev/null ||
        { status=$?; cat "$work/said" >&2; fail "$name: the run failed with status $status"; }
    cat "$work/run/log.jsonl" >> "$work/$name.jsonl"
}

# shellcheck disable=SC2016 # awk's $0
number='function number(name) { # what this line of the log gives for that name, "" where it does not
    if (!match($0, "\"" name "\":-?[0-9][-+.0-9e]*")) return ""
    return substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0
}'
step_of() { # $1: log, $2: step, $3: name
    awk -v s="$2" -v name="$3" "$number"'
        /^."type":"step"/ && number("step") == s { printf "%.0f\n", number(name); exit }' "$1"
}

# ---- the table: name, ranks, options, what the row is called
rows=$(cat << END
one 1 --overlap 1                          | 1 rank
two 2 --overlap 1                          | 2 ranks
wait 2 --overlap 0                         | 2 ranks, --overlap 0
copy 2 --replicate 2 --replicate-every 2   | 2 ranks, --replicate 2
data 2 --ep 1                              | 2 ranks, --ep 1: each has all experts
END
)
for round in $(seq $rounds); do
    echo "round $round of $rounds" >&2
    while IFS='|' read -r row _; do
        read -r name ranks row <<< "$row"
        read -ra options <<< "$row"
        run "$name" "$ranks" $((batch / ranks)) "${options[@]}"
    done <<< "$rows"
done

processor=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2> /dev/null | head -n 1 || true)
mpi=$(env "${mpirun[@]}" --version 2> /dev/null | head -n 1)
commit=$(git -C "$root" rev-parse --short HEAD 2> /dev/null || echo unknown)
cat << END
\`$called\`, $(date +%Y-%m-%d), ${processor:-$(uname -m)}, $cores cores, ${mpi:-MPI}, commit $commit:
$layers layers of width $dim, $experts experts of $ffn of which a token sees 2, a step of $batch sequences of
$seq tokens. A row is the median of steps $first to $steps of $rounds runs, in turns with the other rows. Computing
and waiting are those of the mean rank, bytes those of all ranks in a step.

| what | threads each | step, ms | computing, ms | waiting, ms | all-to-all, bytes | sums, bytes | tokens/s |
| --- | --- | --- | --- | --- | --- | --- | --- |
END
while IFS='|' read -r row what; do
    read -r name ranks _ <<< "$row"
    awk -v what="${what# }" -v threads=$((cores / ranks > 0 ? cores / ranks : 1)) -v first=$first "$number"'
    function median(name,    i, j, t, n, v) {
        n = count[name]
        if (!n) return "-"
        for (i = 1; i <= n; i++) v[i] = value[name, i]
        for (i = 2; i <= n; i++)
            for (j = i; j > 1 && v[j - 1] > v[j]; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
        return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    function show(name, digits,    m) { m = median(name); return m == "-" ? m : sprintf("%." digits "f", m) }
    /^."type":"step"/ && number("step") >= first {
        for (i = split("ms compute_ms wait_ms all_to_all_bytes reduce_bytes tok_s", names, " "); i; i--)
            if (number(names[i]) != "") value[names[i], ++count[names[i]]] = number(names[i])
    }
    END {
        printf "| %s | %d | %s | %s | %s | %s | %s | %s |\n", what, threads, show("ms", 1), show("compute_ms", 1),
               show("wait_ms", 1), show("all_to_all_bytes", 0), show("reduce_bytes", 0), show("tok_s", 0)
    }' "$work/$name.jsonl"
done <<< "$rows"

# ---- the checks: but for one, nothing of what is expected comes from the program's counters
echo
wrong=0
check() { # $1: what, $2: expected, $3: found
    if [ "$2" = "$3" ]; then
        echo "as it should be: $1: $3 bytes"
    else
        echo "WRONG: $1: expected $2 bytes, found $3"
        wrong=1
    fi
}
check "all-to-all of 2 ranks, --overlap 0, as with --overlap 1" "$(step_of "$work/two.jsonl" 1 all_to_all_bytes)" \
    "$(step_of "$work/wait.jsonl" 1 all_to_all_bytes)"
per_row() { echo $(((4 * dim + 3 * $1) * 4)); } # a row there and back, forward and backward, with K weights and numbers

# Sums: in a ring each rank sends 2(N-1)/N of what is summed; with the shares of Muon's directions and of the new weights
# that makes 4(N-1) times what all have, filled up to 16 N numbers. Experts are summed by the ranks that have the same ones.
params=$(awk "$number"' /^."type":"run"/ { printf "%.0f\n", number("params"); exit }' "$work/two.jsonl")
of_experts=$((layers * experts * 3 * ffn * dim)) copy=$((3 * ffn * dim))
all_have=$(((params - of_experts + 31) / 32 * 32))
check "sums of 2 ranks" $((4 * all_have * 4)) "$(step_of "$work/two.jsonl" $steps reduce_bytes)"
check "sums of 2 ranks, --ep 1" $(((4 * all_have + 2 * of_experts) * 4)) \
    "$(step_of "$work/data.jsonl" $steps reduce_bytes)"
check "sums of 2 ranks and of $((2 * layers)) copies" $(((4 * all_have + 2 * 2 * layers * copy) * 4)) \
    "$(step_of "$work/copy.jsonl" $steps reduce_bytes)"
check "all-to-all of 2 ranks, --ep 1" 0 "$(step_of "$work/data.jsonl" $steps all_to_all_bytes)"

# A table that is looked up, of 16 rows, which all ranks read in each step: each hears the numbers of the others' rows, and in
# a ring it sends 2(N-1)/N of the rows' gradients. No weights travel.
table=16
run rows 2 $((batch / 2)) --ngrams $table
check "sums of 2 ranks and of a table of $table rows" $((4 * all_have * 4 + (2 * dim + 2) * table * 4)) \
    "$(step_of "$work/rows.jsonl" $steps reduce_bytes)"

# Each token to all experts: each goes once to each other rank, whatever the router does.
layers=2 dim=64 heads=4 ffn=64 batch=4 steps=1
for ranks in 2 4; do
    run all$ranks $ranks $((batch / ranks)) --topk $experts
    check "all-to-all of $ranks ranks, every token to all experts" \
        $((layers * batch * seq * (ranks - 1) * $(per_row $experts))) \
        "$(step_of "$work/all$ranks.jsonl" 1 all_to_all_bytes)"
done

# Each token to one expert: from one process alone, its log says how many tokens of the first 1, 2, 3, 4 sequences each
# expert has, and so how many of each rank's tokens go to experts of others. Rank r has experts r E/N to (r+1) E/N - 1.
for sequences in $(seq $batch); do
    run alone 1 "$sequences" --topk 1 --gate probability
done
for ranks in 2 4; do
    each=$((batch / ranks))
    run one$ranks $ranks $each --topk 1 --gate probability
    expected=$(awk -v ranks=$ranks -v experts=$experts -v tokens=$seq -v each=$each -v row="$(per_row 1)" "$number"'
        /^."type":"run"/ { sequences++ }
        /^."type":"router"/ && number("step") == 1 && match($0, /"load":\[[^]]*/) {
            split(substr($0, RSTART + 8), load, ",")
            for (e = 1; e <= experts; e++)
                sum[number("layer"), sequences, e] = int(load[e] * sequences * tokens + 0.5)
            layers = number("layer") + 1
        }
        END {
            for (l = 0; l < layers; l++)
                for (r = 1; r <= ranks; r++)
                    for (e = 1; e <= experts; e++)
                        if (int((e - 1) / (experts / ranks)) != r - 1)
                            rows += sum[l, r * each, e] - sum[l, (r - 1) * each, e]
            printf "%.0f\n", rows * row
        }' "$work/alone.jsonl")
    check "all-to-all of $ranks ranks, every token to one expert" "$expected" \
        "$(step_of "$work/one$ranks.jsonl" 1 all_to_all_bytes)"
done
exit $wrong
