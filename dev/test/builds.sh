#!/bin/sh
# Builds that must be refused, and builds by other compilers: what a test program cannot tell, because it has been built.
#
#     dev/test/builds.sh        (make test_builds) in the repository; CC is gcc, or else the compiler named so
#
# Each check prints a line. What is not installed here (clang, tcc, musl-gcc, a 32-bit C library) is left out with a word.
set -eu
cd "$(dirname "$0")/../.."
cc=${CC:-gcc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "FAILED: $1" >&2
    [ ! -s "$work/said" ] || head -n 20 "$work/said" >&2
    exit 1
}
has() { command -v "$1" > /dev/null; }

# $1: a word of the message, then the compiler and its flags: the program must not compile, and the message must say why
refused() {
    want=$1
    shift
    if "$@" -I. -fsyntax-only train_moe.c > "$work/said" 2>&1; then
        fail "this compiled: $* train_moe.c"
    fi
    grep -q "error.*$want" "$work/said" || fail "expected an error with \"$want\" from: $*"
    echo "refused, as it should be: $*"
}

# ---- flags and processors

for compiler in "$cc" $(has clang && echo clang); do
    for flag in -Ofast -ffast-math -ffinite-math-only; do
        refused "exp would be wrong" "$compiler" $flag
    done
    refused "little-endian" "$compiler" -Wno-builtin-macro-redefined -U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__
done
if "$cc" -dM -E -funsafe-math-optimizations - < /dev/null | grep -q __ASSOCIATIVE_MATH__; then
    refused "exp would be wrong" "$cc" -funsafe-math-optimizations
fi
if echo '#include <stdlib.h>' | "$cc" -m32 -fsyntax-only -x c - 2> /dev/null; then
    refused "another type" "$cc" -m32 -mno-sse
else
    echo "left out: a 32-bit C library is not installed"
fi
if has tcc; then
    if tcc -I. -c train_moe.c -o "$work/tcc.o" > "$work/said" 2>&1; then fail "tcc built this"; fi
    grep -q "needs GCC or Clang" "$work/said" || fail "expected a word on GCC from tcc"
    echo "refused, as it should be: tcc"
else
    echo "left out: tcc is not installed"
fi

# What no macro tells is found when the program starts.
"$cc" -std=gnu11 -O1 -funsafe-math-optimizations -U__ASSOCIATIVE_MATH__ -Wno-unknown-pragmas -I. train_moe.c \
    -o "$work/unsafe" -lm 2> "$work/said" || fail "this should compile, and be refused at its start"
if "$work/unsafe" -h > /dev/null 2> "$work/said"; then
    echo "left out: $cc computes exp right with -funsafe-math-optimizations"
else
    grep -q "exp comes out wrong" "$work/said" || fail "expected a word on exp"
    echo "refused at its start, as it should be: -funsafe-math-optimizations"
fi

# ---- the Makefile

# $1: the compiler; prints the flags of OpenMP that make would use
openmp_of() { printf '%s\n' 'include Makefile' 'openmp:;@echo $(OPENMP)' > "$work/probe.mk" && make -s -f "$work/probe.mk" openmp CC="$1"; }

# Compilers whose programs of OpenMP are built and do not run; and whose programs never run, since they are for another
# processor: OpenMP is taken from the second, not from the first.
cat > "$work/strange" << END
#!/bin/sh
$cc "\$@" || exit 1
for out; do :; done
case "\$*" in *-fopenmp*) printf '#!/bin/sh\nexit 127\n' > "\$out" ;; esac
END
cat > "$work/cross" << END
#!/bin/sh
$cc "\$@" || exit 1
for out; do :; done
case "\$out" in /dev/*) ;; *) printf '#!/bin/sh\nexit 126\n' > "\$out" ;; esac
END
chmod +x "$work/strange" "$work/cross"
usual=$(openmp_of "$cc")
[ "$(openmp_of "$work/strange")" = -Wno-unknown-pragmas ] || fail "OpenMP was taken from a library whose programs do not run"
[ "$(openmp_of "$work/cross")" = "$usual" ] || fail "OpenMP was not taken from a cross compiler: $(openmp_of "$work/cross")"
echo "OpenMP is taken where its programs run, or where none runs"
if has musl-gcc; then
    [ "$(openmp_of musl-gcc)" = -Wno-unknown-pragmas ] || fail "musl-gcc took the host's OpenMP"
    musl-gcc -std=gnu11 -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -I. train_moe.c -o "$work/musl" -lm 2> "$work/said" ||
        fail "musl-gcc does not build the program"
    "$work/musl" -h > "$work/said" || fail "musl-gcc's program does not run"
    echo "musl-gcc builds it, without OpenMP"

    # Each line of the log is there once: other C libraries count what is in memory in other ways.
    "$work/musl" --recipe dense --steps 3 --layers 1 --dim 32 --heads 2 --ffn 32 --seq 32 --batch 2 --warmup 0 --eval-tokens 64 \
        --tokens 4 --log-every 1 --out "$work/run" > "$work/said" 2>&1 || fail "musl-gcc's program does not train"
    [ "$(grep -c '"type":"step"' "$work/run/log.jsonl")" = 3 ] && [ -z "$(sort "$work/run/log.jsonl" | uniq -d)" ] ||
        fail "lines are twice in the log of musl-gcc's program"
    echo "musl-gcc's program writes each line of its log once"
else
    echo "left out: musl-gcc is not installed"
fi

# The built-in stories stay as they are until new ones are whole.
mkdir -p "$work/copy/data/stories" "$work/copy/dev/build"
cp Makefile "$work/copy"
cp data/stories.c data/worlds.h data/tokenize.c "$work/copy/data"
touch "$work/copy/data/stories/tokenizer.json" "$work/copy/dev/build/plain_0"
sleep 1
for program in make_stories tokenize; do
    printf '#!/bin/sh\n[ "${0##*/}" = make_stories ] || exit 1\n' > "$work/copy/data/$program"
    chmod +x "$work/copy/data/$program"
done
if make -s -C "$work/copy" data/stories/tokenizer.json > "$work/said" 2>&1; then fail "make went on without the stories"; fi
[ -f "$work/copy/data/stories/tokenizer.json" ] || fail "the built-in stories were removed before there were new ones"
printf '#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\necho new > "$2/tokenizer.json"\n' > "$work/copy/data/tokenize"
make -s -C "$work/copy" data/stories/tokenizer.json > "$work/said" 2>&1 || fail "the stories were not made again"
[ "$(cat "$work/copy/data/stories/tokenizer.json")" = new ] || fail "the new stories did not replace the old ones"
[ "$(ls "$work/copy/data" | tr '\n' ' ')" = "make_stories stories stories.c tokenize tokenize.c worlds.h " ] || fail "something was left: $(ls "$work/copy/data")"
echo "the built-in stories are replaced by whole ones"

# ---- POSIX

# Headers that POSIX or all of Linux, musl and macOS have. The rest stands behind #ifdef in dev/portable.h.
allowed="aio ctype dirent errno fcntl float inttypes limits math poll pthread sched setjmp signal stdarg stddef stdint stdio
    stdlib string strings sys/file sys/ioctl sys/mman sys/resource sys/stat sys/time sys/types sys/wait termios time unistd
    getopt libgen mpi omp sys/socket sys/statvfs sys/uio
    immintrin arm_neon" # the last two are the compiler's own
grep -ho '#include <[^>]*>' train_moe.c data/*.[ch] dev/*.h dev/cpu/*.h dev/mixers/*.h dev/routers/*.h dev/ranks/*.h | sort -u |
    sed 's/.*<\(.*\)\.h>/\1/' > "$work/headers"
while read -r header; do
    case " $(echo $allowed) mach-o/dyld sys/sysctl " in
    *" $header "*) ;;
    *) fail "<$header.h> is not in POSIX: use another, or put it into dev/portable.h and into the list of $0" ;;
    esac
done < "$work/headers"
if grep -nE 'date -d|date --|date \+%N|sed -i|readlink -f|ln -[a-z]*[Tr]|grep -P|stat -c|cp -a|sort -V|xargs -r|mapfile|readarray|declare -[An]|local -n|,,\}|\^\^\}' \
    data/*.sh dev/bench/*.sh dev/emulator/*.sh dev/ranks/*.sh > "$work/said"; then
    fail "scripts with calls that only GNU's programs or newer shells know"
fi

# What has another name on macOS is named in dev/portable.h alone. Its lines for macOS are compiled with stand-ins.
if grep -nE 'st_mtim|_SC_NPROCESSORS_CONF|MADV_|sched_getaffinity|fdatasync|posix_fallocate|pipe2|memrchr|strchrnul' \
    train_moe.c data/*.[ch] dev/*.h dev/cpu/*.h dev/mixers/*.h dev/routers/*.h dev/ranks/*.h | grep -v '^dev/portable.h' > "$work/said"; then
    fail "calls and fields that macOS does not have, outside dev/portable.h"
fi
if has clang; then
    mkdir -p "$work/apple/mach-o" "$work/apple/sys"
    echo 'int _NSGetExecutablePath(char *path, uint32_t *size);' > "$work/apple/mach-o/dyld.h"
    echo 'int sysctlbyname(const char *name, void *to, size_t *size, void *from, size_t length);' > "$work/apple/sys/sysctl.h"
    clang -std=c11 -D_XOPEN_SOURCE=700 -DSTRICT_POSIX -D__APPLE__ -Dst_mtimespec=st_mtim -Wall -Wextra -Werror \
        -Wno-unknown-pragmas -I"$work/apple" -I. -fsyntax-only train_moe.c 2> "$work/said" || fail "the lines for macOS do not compile"
fi
echo "headers and scripts keep to what POSIX, macOS and bash 3.2 have"
