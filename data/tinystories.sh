#!/bin/sh
# Prepares TinyStories (Eldan & Li 2023, arXiv:2305.07759; CDLA-Sharing-1.0) for training: fetches the text, cleans it,
# trains a vocabulary and writes token files. Where fetching was cut off, the same command goes on.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
url=${TINYSTORIES_URL:-https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main}
files="TinyStoriesV2-GPT4-valid.txt TinyStoriesV2-GPT4-train.txt"

help() {
    cat << END
usage: data/tinystories.sh [--from FILE_OR_DIR] [--out DIR] [--vocab N]

  --from FILE_OR_DIR  take this text, or the *.txt of this folder (not of folders in it), instead of fetching it;
                      the word "valid" in a file's name makes it validation text
  --out DIR           where to write (default $here/tinystories)
  --vocab N           tokens of the vocabulary (default 4096)

Without --from it fetches $files (2.2 GB together) from
$url
(environment variable TINYSTORIES_URL), with curl, into DIR, and goes on where it was cut off.
END
}

fail() {
    echo "tinystories.sh: $1" >&2
    exit "${2:-1}"
}

from= out=$here/tinystories vocab=4096
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) help && exit 0 ;;
    --from | --out | --vocab) [ $# -ge 2 ] || fail "$1 needs a value (-h shows the options)" 2 ;;
    *) fail "$1: unknown option (-h shows the options)" 2 ;;
    esac
    case $1 in
    --from) from=$2 ;;
    --out) out=$2 ;;
    --vocab) vocab=$2 ;;
    esac
    shift 2
done
case $vocab in
'' | *[!0-9]*) fail "--vocab $vocab: expected a whole number (-h shows the options)" 2 ;;
esac

size_of() { # bytes of a file, 0 where there is none
    if [ -f "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi
}

fetch() { # $1: name of the file
    file=$out/$1
    head=$(curl -fsSIL --retry 3 --connect-timeout 20 "$url/$1") ||
        fail "cannot reach $url/$1. Without a network, bring the
text by other means and type: data/tinystories.sh --from FILE_OR_DIR"
    size=$(echo "$head" | tr -d '\r' | awk 'tolower($1) == "content-length:" { size = $2 } END { print size + 0 }')
    if [ "$size" -gt 0 ] && [ "$(size_of "$file")" -eq "$size" ]; then
        echo "$1: already here"
        return
    fi
    have=$(size_of "$file.part")
    if [ "$size" -gt 0 ] && [ "$have" -gt "$size" ]; then # of another version: start anew
        rm "$file.part"
        have=0
    fi
    echo "$1: fetching $(((size - have) / 1000000)) MB of $((size / 1000000)) MB," \
        "about $(((size - have) / 600000000 + 1)) min at 10 MB/s"
    if [ "$size" -eq 0 ] || [ "$have" -lt "$size" ]; then
        tries=5
        quiet=-sS
        [ ! -t 2 ] || quiet=--progress-bar
        until curl -fL $quiet --connect-timeout 20 --speed-limit 1000 --speed-time 60 -C - -o "$file.part" "$url/$1"; do
            tries=$((tries - 1))
            [ $tries -gt 0 ] || fail "$1: the connection broke again and again. What came is kept: try again"
            sleep 2
        done
    fi
    have=$(size_of "$file.part")
    [ "$size" -eq 0 ] || [ "$have" -eq "$size" ] ||
        fail "$1: $have bytes came, but the server says that it has $size. Type the command again"
    mv "$file.part" "$file"
}

if [ -z "$from" ]; then
    command -v curl > /dev/null || fail "curl is missing: install it, or fetch the text yourself and give it by --from"
    mkdir -p "$out"
    echo "TinyStories goes to $out"
    set --
    for name in $files; do
        fetch "$name"
        set -- "$@" "$out/$name"
    done
elif [ -d "$from" ]; then
    set -- "$from"/*.txt
    [ -e "$1" ] || fail "$from: no *.txt in this folder"
else
    [ -e "$from" ] || fail "$from: no such file or folder"
    set -- "$from"
fi

[ -x "$here/tokenize" ] || make -C "$here/.." data/tokenize
echo "cleaning, training a vocabulary of $vocab and tokenizing: about a minute for each gigabyte and core"
"$here/tokenize" --clean --vocab "$vocab" --out "$out" "$@"
[ -n "$from" ] || echo "the text in $out/*.txt is no longer needed"
case $out in *[!A-Za-z0-9_./-]*) out="'$(printf %s "$out" | sed "s/'/'\\\\''/g")'" ;; esac # as a shell takes it
echo "next: ./train_moe --data $out"
