#!/usr/bin/env bash
# Lets a trained model tell stories, each with a seed of its own, and says in how many of them the hero's name, "he" or "she",
# the lost thing and the places agree to the end. Gives: make check_stories. Needs: train_moe, dev/build/check_stories.
set -eu
export LC_ALL=C

root=$(cd "$(dirname "$0")/../.." && pwd)
if [ $# -lt 1 ] || [[ ! ${2-200} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: dev/test/stories.sh RUN_DIR [COUNT [OPTIONS of train_moe]]; STORIES=FILE keeps what was told" >&2
    exit 2
fi
export RUN=$1 TRAIN_MOE=${TRAIN_MOE:-$root/train_moe} OPTIONS="${*:3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export WORK=$work

# A process tells one story; there are as many at a time as there are processors. 600 tokens are more than any story has.
tell='"$TRAIN_MOE" --out "$RUN" --prompt "" --tokens 600 --threads 1 --seed "$1" $OPTIONS > "$WORK/$1" 2> "$WORK/$1.err" ||
    { cat "$WORK/$1.err" >&2; exit 255; }; echo "<|endoftext|>" >> "$WORK/$1"'
start=$SECONDS
seq "${2-200}" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c "$tell" sh {}
seq "${2-200}" | sed "s|^|$work/|" | xargs cat > "$work/stories"
[ -z "${STORIES-}" ] || cp "$work/stories" "$STORIES"
echo "${2-200} stories told by $RUN in $((SECONDS - start)) s"
"$root/dev/build/check_stories" "$work/stories"
