# What clock.sh, mixers.sh, compare.sh and contest.sh share: the program, the tokens to train on, what a log says, and what the
# figures were measured on. Gives: fail, root, train; find_program, find_data, is_number, finished, trained_with, awk_number, describe_machine. Needs: bash and set -eu of the script that sources it.

fail() { # $1: what is wrong, $2: exit status
    echo "${0##*/}: $1" >&2
    exit "${2:-1}"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
train=${TRAIN_MOE:-$root/train_moe}

# Builds $train where it is not there, unless TRAIN_MOE names another program.
find_program() {
    if [ ! -x "$train" ]; then
        [ "$train" = "$root/train_moe" ] || fail "$train: no such program"
        make -C "$root" train_moe >&2 || fail "train_moe is not built, and make train_moe failed, see above"
    fi
}

# Takes $data and $from, what the options --data and --from named, and $out, which exists. $data becomes the full path of a
# folder with tokens. $1...: folders of the project, in which to look last.
find_data() {
    local text dir
    [ -z "$data" ] || [ -z "$from" ] || fail "--data names tokens, --from text to make them of: give one of them" 2
    if [ -n "$from" ] && [ ! -f "$out/data/tokenizer.json" ]; then
        for text in "$from"/*train*.txt "$from"/*valid*.txt; do
            [ -f "$text" ] || fail "--from: no $text"
        done
        [ -x "$root/data/tokenize" ] || make -C "$root" data/tokenize >&2 || fail "make data/tokenize failed, see above"
        [ ! -e "$out/data" ] || fail "$out/data is there and has no tokenizer.json; remove it, or choose another --out"
        rm -rf "$out/data.new"
        "$root/data/tokenize" --clean --vocab 4096 --out "$out/data.new" "$from"/*train*.txt "$from"/*valid*.txt >&2
        mv "$out/data.new" "$out/data"
    fi
    for dir in "$out/data" "$@"; do
        [ -n "$data" ] || [ ! -f "$dir/tokenizer.json" ] || data=$dir
    done
    [ -n "$data" ] || fail "nothing to train on: give --data DIR with tokens, or --from DIR with *train*.txt, *valid*.txt"
    data=$(cd "$data" 2> /dev/null && pwd) || fail "--data: no such folder"
}

is_number() { # $1: a whole number above 0, in at most nine digits?
    [[ $1 =~ ^[1-9][0-9]{0,8}$ ]]
}

# What is there is not made again, so the same name must mean the same options. They stand in a file beside it. Call it before
# that file is made.
trained_with() { # $1: log.jsonl, or another result; the rest: the options
    local file=$1 line before
    shift
    line=$(printf '%q ' "$@")
    if [ ! -f "$file" ]; then
        mkdir -p "${file%/*}"
        echo "$line" > "$file.options"
    fi
    before=$(cat "$file.options" 2> /dev/null || echo "not written down")
    [ "$before" = "$line" ] || fail "$file was made with other options; remove it or choose another --out. They were $before" 2
}

finished() { # $1: log.jsonl; is its last step evaluated?
    [ -f "$1" ] && awk '
        /^."type":"run"/ && match($0, /"steps":[0-9]+/) { steps = substr($0, RSTART + 8, RLENGTH - 8) }
        /^."type":"eval"/ && match($0, /"step":[0-9]+/) { done = substr($0, RSTART + 7, RLENGTH - 7) }
        END { exit !(steps && steps == done) }' "$1"
}

# The beginning of an awk program that reads log.jsonl.
awk_number='
    function number(name) { # what this line gives for that name, "" where it does not
        if (!match($0, "\"" name "\":-?[0-9][-+.0-9e]*"))
            return ""
        return substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0
    }'

# Sets $machine, the processor and its cores, and $commit.
describe_machine() {
    local processor
    processor=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2> /dev/null | head -n 1)
    [ -n "$processor" ] || processor=$(sysctl -n machdep.cpu.brand_string 2> /dev/null || uname -m)
    machine="$processor, $(getconf _NPROCESSORS_ONLN) cores"
    commit=$(git -C "$root" rev-parse --short HEAD 2> /dev/null || echo unknown)
    [ "$commit" = unknown ] || git -C "$root" diff --quiet HEAD -- train_moe.c dev data Makefile ||
        commit="$commit with changes"
}
