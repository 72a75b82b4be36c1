#!/usr/bin/env bash
# What an adapter learns of a new text and forgets of the old one, beside full fine-tuning: a model of the built-in stories
# learns TinyStories, and a model of TinyStories learns the built-in stories. Prints a Markdown table (doc/adapters.md).
# What is finished is not trained again: after Ctrl-C, type the same command again.
set -eu
export LC_ALL=C

common="--layers 2 --dim 64 --heads 4 --experts 4 --ffn 128"
training="--seq 128 --batch 8 --warmup 20 --eval-every 0 --sample-every 0 --save-every 0 --log-every 100"
base_steps=600 steps=200 eval_tokens=65536

. "$(dirname "$0")/data.sh" # fail, root, train, find_program, awk_number, describe_machine
out=$root/runs/adapters from=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        cat << END
usage: dev/bench/adapters.sh --from DIR [--out DIR] [--steps N] [--base-steps N]

  --from DIR        TinyStories: DIR/*train*.txt and DIR/*valid*.txt
  --out DIR         where tokens and runs live (default $out)
  --steps N         steps on the new text (default $steps)
  --base-steps N    steps of the two bases (default $base_steps)

Both texts get one vocabulary, of 2048 tokens. The table goes to standard output, progress to standard error.
END
        exit ;;
    --from | --out | --steps | --base-steps)
        [ $# -ge 2 ] || fail "$1 needs a value" 2
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
done
[ -n "$from" ] || [ -f "$out/tiny/tokenizer.json" ] || fail "--from DIR: a folder with TinyStories' texts is needed" 2
find_program
describe_machine
mkdir -p "$out"

# ---- the two texts as tokens of one vocabulary

if [ ! -f "$out/stories/tokenizer.json" ]; then
    [ -x "$root/data/tokenize" ] || make -C "$root" data/tokenize >&2
    [ -x "$root/data/make_stories" ] || make -C "$root" data/make_stories >&2
    mkdir -p "$out/text"
    "$root/data/make_stories" --count 12000 > "$out/text/stories.train.txt"
    "$root/data/make_stories" --first 100000 --count 300 > "$out/text/stories.valid.txt"
    "$root/data/tokenize" --clean --vocab 2048 --out "$out/both" "$out"/text/*.train.txt "$from"/*train*.txt >&2
    "$root/data/tokenize" --clean --tokenizer "$out/both/tokenizer.json" --out "$out/tiny" "$from"/*train*.txt "$from"/*valid*.txt >&2
    "$root/data/tokenize" --clean --tokenizer "$out/both/tokenizer.json" --out "$out/stories" "$out"/text/*.txt >&2
fi

# ---- runs

run() { # $1: name; the rest: options
    local name=$1
    shift
    [ -f "$out/$name/done" ] || {
        rm -rf "${out:?}/$name"
        echo "$name: $*" >&2
        "$train" --out "$out/$name" $training "$@" < /dev/null > "$out/$name.txt" 2>&1 || fail "$name failed, see $out/$name.txt"
        touch "$out/$name/done"
    }
}

model_of() { # $1: run. The folder of its whole model; an adapter is merged with its base
    if [ -f "$out/$1/latest/adapter_config.json" ]; then
        [ -d "$out/$1/merged" ] || "$train" --out "$out/$1" --merge "$out/$1/merged" > /dev/null
        echo "$out/$1/merged"
    else
        echo "$out/$1/latest"
    fi
}

bpb() { # $1: run, $2: text. Bits per byte: a run of one step at a rate of 0 evaluates the model
    local name=$1-on-$2
    run "$name" --init "$(model_of "$1")" --data "$out/$2" --steps 1 --warmup 0 --lr 0 --eval-tokens "$eval_tokens" --tokens 1
    awk "$awk_number"' /^."type":"eval"/ { bpb = number("val_bpb") } END { printf "%.3f", bpb }' "$out/$name/log.jsonl"
}

weights() { # $1: run. Its trained weights, in percent of all
    if [[ $1 == base-* ]]; then
        return
    fi
    if grep -q 'million more are trained' "$out/$1.txt"; then
        sed -n 's/.*million more are trained.*: \([0-9.]*%\);.*/\1/p' "$out/$1.txt"
    else
        echo "100%"
    fi
}

kilobytes() { # $1: run. Of what was learned, in files
    du -ck "$out/$1"/latest/*model.safetensors | awk 'END { print $1 }'
}

row() { # $1: run, $2: what it is, $3: old text, $4: new text
    printf '| %s | %s | %s | %s | %s |\n' "$2" "$(weights "$1")" "$(bpb "$1" "$4")" "$(bpb "$1" "$3")" "$(kilobytes "$1")"
}

direction() { # $1: old text, $2: new text
    local base=base-$1
    local more="--data $out/$2 --init $out/base-$1/latest --steps $steps"
    run "$base" $common --data "$out/$1" --steps "$base_steps" --lr 8e-3
    run "$1-full" $more --lr 2e-3 --optimizer adamw
    run "$1-attention4" $more --lora 4 --lora-targets attention --lr 1e-2
    run "$1-all1" $more --lora 1 --lr 1e-2
    run "$1-all3" $more --lora 3 --lr 1e-2
    printf '\nFrom `%s` to `%s`:\n\n' "$1" "$2"
    echo "| | trained | bits per byte, new text | old text | KB in files |"
    echo "| --- | --- | --- | --- | --- |"
    row "$base" "the base as it is" "$1" "$2"
    row "$1-full" "all weights" "$1" "$2"
    row "$1-attention4" "\`--lora 4 --lora-targets attention\`" "$1" "$2"
    row "$1-all1" "\`--lora 1\`" "$1" "$2"
    row "$1-all3" "\`--lora 3\`" "$1" "$2"
}

direction stories tiny
direction tiny stories
printf '\n%s; commit %s, %s\n' "$machine" "$commit" "$(date +%Y-%m-%d)"
