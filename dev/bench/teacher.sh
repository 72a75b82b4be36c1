#!/usr/bin/env bash
# What a teacher is worth: trains a teacher, then small students, each alone and with it (--teacher), and prints a Markdown table:
# at equal tokens, and at equal time, since a step with a teacher takes longer. What is finished is not trained again.
set -eu
export LC_ALL=C

. "$(dirname "$0")/data.sh" # fail, find_program, find_data, is_number, finished, trained_with, awk_number, describe_machine
called="dev/bench/teacher.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
out=$root/runs/teacher data='' from='' seeds="1 2 3" steps=2000 teacher_steps=4000 weights="0.5" temperature=2 text=0
teacher="--recipe mixtral" student="--recipe dense --dim 64 --heads 4 --ffn 64"
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/teacher.sh [--data DIR] [--out DIR] [--seeds "1 2 3"] [--steps N] [--teacher-steps N]
                     [--teacher OPTIONS] [--student OPTIONS] [--weights "0.5 0.9"] [--temperature X] [--text N]

  --data DIR          tokens to train on (default data/stories)
  --out DIR           where the runs live (default $out)
  --seeds LIST        students with these seeds (default $seeds); the teacher has seed 1
  --steps N           steps of a student that has a teacher, and of one that is alone at equal tokens (default $steps)
  --teacher-steps N   steps of the teacher (default $teacher_steps)
  --teacher OPTIONS   of train_moe, for the teacher ($teacher)
  --student OPTIONS   for the students ($student)
  --weights LIST      values of --distill-weight (default $weights)
  --temperature X     --distill-temperature (default $temperature)
  --text N            the students read only the first N tokens of the text, again and again; 0: all of it (default $text)

The table goes to standard output, progress to standard error. The variable TRAIN_MOE names another train_moe. All runs have one
thread, and are one after the other. How much longer a step takes with the teacher is measured by turns before the students are trained.
END
        exit ;;
    --data | --out | --seeds | --steps | --teacher-steps | --teacher | --student | --weights | --temperature | --text)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
is_number "$steps" || fail "--steps $steps: not a number of steps" 2
is_number "$teacher_steps" || fail "--teacher-steps $teacher_steps: not a number of steps" 2
[ "$text" = 0 ] || is_number "$text" || fail "--text $text: not a number of tokens" 2
[ -n "${seeds// /}" ] || fail "--seeds: empty; give at least one number" 2
find_program
mkdir -p "$out"
find_data "$root/data/stories"
describe_machine

# A folder with the beginning of the training text. In a token file 1024 bytes, of which the third int32 is the number of tokens,
# stand before tokens of two bytes each.
learned=$data
if [ "$text" -gt 0 ]; then
    learned=$out/data-$text
    mkdir -p "$learned"
    cp "$data"/tokenizer.json "$data"/*val*.bin "$learned"
    for file in "$data"/*train*.bin; do
        {
            head -c 8 "$file"
            for shift in 0 8 16 24; do printf "\\x$(printf %02x $((text >> shift & 255)))"; done
            head -c 1012 /dev/zero
            tail -c +1025 "$file" | head -c $((2 * text))
        } > "$learned/train_000000.bin"
        break
    done
fi

folder_of() { # $1: a run
    [ "$1" = teacher ] && echo "$data" || echo "$learned"
}

run() { # $1: name, the rest: options
    local dir=$out/$1
    shift
    trained_with "$dir/log.jsonl" --data "$(folder_of "${dir##*/}")" "$@"
    finished "$dir/log.jsonl" && return
    echo "${dir##*/} ..." >&2
    OMP_NUM_THREADS=1 "$train" --resume --out "$dir" --data "$(folder_of "${dir##*/}")" --threads 1 --sample-every 0 --save-every 500 --eval-every 200 "$@" \
        > "$dir/train.txt" 2>&1 || fail "${dir##*/} failed: $(tail -n 1 "$dir/train.txt")"
}

loss() { # $1: name; nats a token and bits a byte at the end, and the lowest nats a token on the way
    awk "$awk_number"'
        /^."type":"eval"/ { l = number("val_loss"); b = number("val_bpb"); if (low == "" || l < low) low = l }
        END { print l, b, low }' "$out/$1/log.jsonl"
}

# The median milliseconds of a step of a short run, which is removed.
step_time() { # options
    rm -rf "$out/try"
    mkdir -p "$out/try"
    OMP_NUM_THREADS=1 "$train" --out "$out/try" --data "$data" --threads 1 --steps 30 --warmup 5 --log-every 3 --eval-every 0 \
        --eval-tokens 256 --sample-every 0 --tokens 1 "$@" > "$out/try/train.txt" 2>&1 || fail "a trial failed: $(tail -n 1 "$out/try/train.txt")"
    awk "$awk_number"' /^."type":"step"/ { print number("ms") }' "$out/try/log.jsonl" | sort -g | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'
    rm -rf "$out/try"
}

run teacher $teacher --steps "$teacher_steps"
by=(--teacher "$out/teacher" --distill-temperature "$temperature")

# By turns, so that what else the machine does meets both alike.
trained_with "$out/ratio.txt" $student "${by[@]}"
if [ ! -f "$out/ratio.txt" ]; then
    for turn in 1 2 3; do
        alone_ms=$(step_time $student)
        taught_ms=$(step_time $student "${by[@]}")
        echo "$alone_ms $taught_ms"
    done > "$out/times.txt"
    awk '{ print $2 / $1, $1, $2 }' "$out/times.txt" | sort -g | sed -n 2p > "$out/ratio.txt"
fi
read -r ratio alone_ms taught_ms < "$out/ratio.txt"
longer=$(awk "BEGIN { print int($steps * $ratio + 0.5) }")

for seed in $seeds; do
    run "alone-seed$seed" $student --steps "$steps" --seed "$seed"
    run "longer-seed$seed" $student --steps "$longer" --seed "$seed"
    for w in $weights; do
        run "taught$w-seed$seed" $student "${by[@]}" --distill-weight "$w" --steps "$steps" --seed "$seed"
    done
done

row() { # $1: what it is called in the table, $2: the runs' name, $3: steps, $4: time of a step
    local seed
    for seed in $seeds; do loss "$2-seed$seed"; done | awk -v name="$1" -v steps="$3" -v ms="$4" '
        { l[NR] = $1; sum += $1; bits += $2; best += $3 }
        END {
            low = high = l[1]
            for (i in l) { if (l[i] < low) low = l[i]; if (l[i] > high) high = l[i] }
            printf "| %s | %d | %.0f | %.4f (%.4f to %.4f) | %.4f | %.4f |\n", name, steps, steps * ms / 1000, sum / NR, low, high, best / NR, bits / NR
        }'
}

cat << END
Printed on $(date +%Y-%m-%d) by \`$called\` on $machine, one thread, commit $commit.

- teacher: \`./train_moe $teacher --steps $teacher_steps\`, which ends at $(loss teacher | cut -d' ' -f1) nats a token, $(loss teacher | cut -d' ' -f2) bits a byte
- student: \`./train_moe $student --seed SEED\`; a step takes $alone_ms ms alone and $taught_ms ms with the teacher, $ratio times as long

| student | steps | seconds | loss, nats a token | the lowest on the way | bits a byte |
| --- | --- | --- | --- | --- | --- |
END
row "alone, equal tokens" alone "$steps" "$alone_ms"
row "alone, equal time" longer "$longer" "$alone_ms"
for w in $weights; do
    row "with the teacher, weight $w" "taught$w" "$steps" "$taught_ms"
done
echo
echo "Of the seeds $seeds the mean, the lowest and the highest; the loss is that of the validation text alone; the lowest on the way is the mean over seeds, which is evaluated every 200 steps. Seconds are steps times the measured time of a step."
