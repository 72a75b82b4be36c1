#!/bin/sh
# What the compiler says of the CUDA twin's kernels, as a gate: make gate_cu, or
#
#     dev/cuda/gate.sh [SOURCE]           train_moe.cu; CHIPS="80 90 120" and PRECISION=bf16 (or fp32) say what is compiled
#
# Needs nvcc, awk and c++filt. With cuobjdump, it prints the inner loops, too. No GPU is needed.
# It fails where registers are spilled to memory, and where a block has more registers than a multiprocessor: it would not start.
#
# The threads of a block are those of __launch_bounds__, else the most that a launch in the sources asks for; a kernel of
# which neither is known counts as one of 1024 threads.
set -eu
cd "$(dirname "$0")/../.."
source=${1:-train_moe.cu} chips=${CHIPS:-80 90 120} precision=${PRECISION:-bf16} nvcc=${NVCC:-nvcc}
out=dev/build/gate_$precision
command -v "$nvcc" >/dev/null || { echo "no nvcc here: install the CUDA Toolkit, or say where it is: NVCC=/path/nvcc"; exit 1; }
disassembler=${CUOBJDUMP:-$(command -v cuobjdump || command -v "$(dirname "$(command -v "$nvcc")")/cuobjdump" || true)}
rm -rf "$out" && mkdir -p "$out"

# All chips at the same time. One process for each, since ptxas' messages do not say which chip they are about.
start=$(date +%s)
for chip in $chips; do
    "$nvcc" -std=c++17 -O3 -I. -diag-suppress 1675,128 -Xptxas -v -arch="sm_$chip" $([ "$precision" = bf16 ] || echo -DFP32) \
        -cubin "$source" -o "$out/$chip.cubin" >"$out/$chip.txt" 2>&1 || echo failed >"$out/$chip.failed" &
done
wait
for chip in $chips; do
    [ ! -f "$out/$chip.failed" ] || { grep -v '^ptxas info' "$out/$chip.txt"; echo "nvcc failed for sm_$chip"; exit 1; }
done
echo "$source, $precision, $("$nvcc" --version | sed -n 's/.*release/nvcc/p'): compiled for $chips in $(($(date +%s) - start)) s"

# Threads of a block of each kernel, as the sources say it: "name threads", several times for a kernel of several launches.
find "$source" dev/cuda -name '*.cu' -o -name '*.cuh' | xargs cat | awk '
    BEGIN { value["row_threads"] = 512; value["threads_for"] = 1024; value["A::WARPS"] = 4 }
    function evaluate(text, factors, n, i, product) { # numbers and words, multiplied
        gsub(/[ ()]/, "", text)
        product = (n = split(text, factors, "*")) > 0
        for (i = 1; i <= n; i++) {
            if (factors[i] in value) factors[i] = value[factors[i]]
            product *= factors[i] ~ /^[0-9]+$/ ? factors[i] : 1024
        }
        return product > 1024 ? 1024 : product
    }
    /^#define +[A-Z_]+ +[0-9]+/ { value[$2] = $3 }
    match($0, /[A-Z_]+ = [0-9]+[,; ]/) { split(substr($0, RSTART, RLENGTH - 1), part, " = "); value[part[1]] = part[2] }
    { line[NR] = $0 }
    END {
        for (i = 1; i <= NR; i++) {
            $0 = line[i]
            if (match($0, /[ ,]threads = [^,;]+/)) value["threads"] = evaluate(substr($0, RSTART + 11, RLENGTH - 11))
            if (match($0, /__launch_bounds__\([^,)]*/)) {
                bound = evaluate(substr($0, RSTART + 18, RLENGTH - 18))
                $0 = substr($0, RSTART + RLENGTH)
            }
            if (bound && match($0, /[a-z_0-9]+_kernel\(/)) { print substr($0, RSTART, RLENGTH - 1) "\t" bound; bound = 0 }
            if (match($0, /[a-z_0-9]+_kernel(<[^<>]*(<[^<>]*>)?[^<>]*>)?<<</)) { # name<...><<<grid, threads, bytes, stream>>>(
                split(substr($0, RSTART, RLENGTH), part, "<")
                sub(/, [^,]*, stream>>>.*/, "")
                if (match($0, /(row_threads|threads_for)\(/)) $0 = substr($0, RSTART, RLENGTH - 1)
                else sub(/.*, */, "")
                print part[1] "\t" evaluate($0)
            }
        }
    }' >"$out/threads"

# "kernel chip registers spilled stack shared", bytes.
for chip in $chips; do
    awk -v OFS='\t' -v chip="$chip" '
        /Compiling entry function/ { split($0, part, "\047"); name = part[2]; spilled = stack = shared = 0 }
        /bytes stack frame/ { stack = $1; spilled += $5 + $9 }
        /Used [0-9]+ registers/ {
            for (i = 1; i < NF; i++) {
                if ($i == "Used") registers = $(i + 1)
                if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared = $i }
            print name, chip, registers, spilled, stack, shared
        }' "$out/$chip.txt"
done >"$out/usage"

# Innermost loops that multiply on tensor cores: from a backward branch's target to the branch.
# "kernel chip instructions HMMA LDSM LDGSTS integer-and-predicate-instructions"
if [ -n "$disassembler" ]; then
    for chip in $chips; do
        "$disassembler" -sass "$out/$chip.cubin" | awk -v OFS='\t' -v chip="$chip" '
            function hex(text, i, n) {
                for (n = i = 0; i++ < length(text);) n = 16 * n + index("0123456789abcdef", substr(text, i, 1)) - 1
                return n
            }
            function count(word, from, to, i, n) { for (i = from; i <= to; i++) n += code[i] ~ word; return n + 0 }
            function products(loop) { return so_far[last[loop]] - so_far[first[loop] - 1] }
            function finish(i, k, inner) {
                for (i = 1; i <= loops; i++) {
                    inner = products(i) > 0
                    for (k = 1; k <= loops && inner; k++)
                        if (k != i && first[k] >= first[i] && last[k] <= last[i] && products(k)) inner = 0
                    if (inner)
                        print name, chip, last[i] - first[i] + 1, products(i), count("^LDSM", first[i], last[i]),
                            count("^LDGSTS", first[i], last[i]), count("^(U?I|U?LOP|U?SEL|U?LEA|U?P?PRMT|U?SHF|PLOP|VIADD|U?MOV)", first[i], last[i])
                }
                loops = n = 0
            }
            /Function :/ { finish(); name = $3 }
            match($0, /\/\*[0-9a-f]+\*\/ +[@!A-Z]/) {
                split(substr($0, RSTART + 2), part, "*")
                at[part[1]] = ++n
                text = substr($0, RSTART)
                sub(/^[^ ]+ +(@!?U?P[0-9T]+ +)?/, "", text)
                code[n] = text
                so_far[n] = so_far[n - 1] + (text ~ /^HMMA/)
                if (text ~ /^BRA/ && match(text, /0x[0-9a-f]+/)) {
                    target = substr(text, RSTART + 2, RLENGTH - 2)
                    while (length(target) < 4) target = "0" target
                    if (target in at && hex(target) < hex(part[1])) { first[++loops] = at[target]; last[loops] = n }
                }
            }
            /^\t*\.+$/ { finish() }
            END { finish() }'
    done >"$out/loops"
else
    echo "no cuobjdump here (pip install nvidia-cuda-cuobjdump; CUOBJDUMP=/path): the inner loops are not shown"
fi

show() { c++filt -p | sed -e 's/gpu:://g' -e 's/(anonymous namespace):://g' -e 's/, /,/g' -e 's/ >/>/g'; }
printf '\nregisters a thread, bytes spilled, bytes of stack, static shared memory; blocks that the registers of a multiprocessor hold\n'
show <"$out/usage" | awk -F '\t' -v chips="$chips" '
    FILENAME != "-" { if ($2 > threads[$1]) threads[$1] = $2; next }
    { key = $1; plain = $1; sub(/<.*/, "", plain)
      t = plain in threads ? threads[plain] : 1024
      used = int(($3 + 7) / 8) * 8 * t # registers are given to a warp in units of 256
      row[key, $2] = sprintf("%4d %5d %5d %6d %2d", $3, $4, $5, $6, int(65536 / used))
      if ($3 > most[key]) most[key] = $3
      size[key] = t; total++
      if ($4) { spills++; bad = bad sprintf("sm_%s: %s spills %d bytes\n", $2, key, $4) }
      if (used > 65536) { large++
          bad = bad sprintf("sm_%s: %s: %d registers x %d threads are too many: say __launch_bounds__\n", $2, key, $3, t) } }
    END { n = split(chips, chip, " ")
        line = sprintf("%-44s %7s", "kernel", "threads") # the most registers first
        for (i = 1; i <= n; i++) line = line sprintf(" | sm_%-4s  reg spill stack shared bl", chip[i])
        print line
        for (r = 255; r >= 0; r--) for (key in size) if (most[key] == r) {
            line = sprintf("%-44s %7d", substr(key, 1, 44), size[key])
            for (i = 1; i <= n; i++) line = line " |         " row[key, chip[i]]
            print line }
        printf "%d kernels and chips: %d spill, %d have too many registers\n%s", total, spills, large, bad
        exit spills + large > 0 }' "$out/threads" - && result=0 || result=1

if [ -n "$disassembler" ]; then
    printf '\ninnermost loops with tensor products: instructions in all, and of these HMMA, LDSM, LDGSTS, integers and predicates\n'
    show <"$out/loops" | awk -F '\t' '{ printf "%-34s sm_%-4s %5d  HMMA %4d  LDSM %3d  LDGSTS %3d  integer %4d  a HMMA: %.1f\n", $1, $2, $3, $4, $5, $6, $7, $3 / $4 }' \
        | sort -k1,1 -k2,2V
fi
exit $result
