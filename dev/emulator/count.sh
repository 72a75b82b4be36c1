#!/bin/sh
# count.sh: how many kernels the CUDA twin starts in one layer, and how many bytes of device memory they move, for one token.
#
#   dev/emulator/count.sh PROGRAM [OPTIONS]     `make count_emulated` builds PROGRAM and calls this
#
# It needs the emulator's build that counts bytes (count.h), data/make_stories, data/tokenize and data/stories. It trains small
# models of two and of three layers for one and for two steps, and subtracts: what remains is one layer in one step. A second
# window of a validation, subtracted in the same way, is the forward pass; a window is one sequence, so a step has one, too. The
# rest of the step is the backward pass, and what only training starts in the forward pass: balance losses, statistics.
#
# Bytes are different ones (count.h): each number read once and written once by each kernel, the least there can be. Kernels
# are told apart by their names alone. Change these patterns with the names:
PRODUCTS='gemm|rows_kernel|weights_kernel|attention_'   # matrix products and attention
OPTIMIZER='adamw|sum_squares|root_of_sum|convert'      # once a step, over all weights
COPIES='^copy |^memset'                                # no kernels
FORWARD='forward'                                      # of what only training starts: what belongs to the forward pass
DIM=${DIM:-192} SEQ=${SEQ:-64} BATCH=1 # not 128: products of that size measure the peak, and are left out

set -e
program=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# Stories so few that the validation at the end of a run takes no longer than the step.
data/make_stories --count 100 > "$work/train.txt"
data/make_stories --first 24000 --count 4 > "$work/valid.txt"
data/tokenize --tokenizer data/stories/tokenizer.json "$work/train.txt" "$work/valid.txt" --out "$work/data" > /dev/null

# run LAYERS STEPS WINDOWS OPTIONS: the table of one run
run() {
    layers=$1 steps=$2 windows=$3
    shift 3
    CUDACPU_COUNT="$work/$layers$steps$windows" "$program" --out "$work/run" --data "$work/data" --layers "$layers" \
        --steps "$steps" --eval-tokens $((windows * SEQ)) --dim "$DIM" --seq "$SEQ" --batch "$BATCH" --eval-every 0 \
        --sample-every 0 --save-every 0 --tokens 1 "$@" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    rm -rf "$work/run"
}
for layers in 2 3; do
    run $layers 1 1 "$@"
    run $layers 2 1 "$@"
    run $layers 1 2 "$@"
done

echo "One layer, one step of $BATCH x $SEQ tokens, dim $DIM, options: ${*:-none}. Bytes are those of one token."
cd "$work"
awk -F '\t' -v dim="$DIM" -v tokens="$((SEQ * BATCH))" -v products="$PRODUCTS" -v optimizer="$OPTIMIZER" \
    -v copies="$COPIES" -v forward="$FORWARD" '
function layer(table, name, more, less) { # what a third layer adds to the difference of two runs
    return table["3" more, name] - table["3" less, name] - table["2" more, name] + table["2" less, name]
}
function show(title, n_f, n_b, r_f, w_f, r_b, w_b) {
    printf "%-52.52s %5d %5d %9.0f %9.0f %9.0f %9.0f\n", title, n_f, n_b, r_f, w_f, r_b, w_b
}
FNR > 1 && $4 !~ /m 128 n 128 k 128/ { names[$4]; count[FILENAME, $4] = $1; read[FILENAME, $4] = $2; written[FILENAME, $4] = $3 }
END {
    printf "%-52s %11s %19s %19s\n", "", "launches", "forward bytes", "bytes of the rest"
    printf "%-52s %5s %5s %9s %9s %9s %9s\n", "kernel", "forw.", "rest", "read", "written", "read", "written"
    split("elementwise,products and attention,optimizer,copies and memsets", kinds, ",")
    for (k = 1; k <= 4; k++) {
        n_f = n_b = r_f = w_f = r_b = w_b = 0
        lines = 0
        for (name in names) {
            kind = name ~ copies ? 4 : name ~ optimizer ? 3 : name ~ products ? 2 : 1
            if (kind != k)
                continue
            n = layer(count, name, "21", "11"); f = layer(count, name, "12", "11")
            r = layer(read, name, "21", "11") / tokens; rf = layer(read, name, "12", "11") / tokens
            w = layer(written, name, "21", "11") / tokens; wf = layer(written, name, "12", "11") / tokens
            if (n == 0 && f == 0 && r == 0 && w == 0)
                continue
            if (kind == 4 && name !~ /device|memset/) # what the host sees of a layer is no part of the step
                continue
            if (f == 0 && name ~ forward) { f = n; rf = r; wf = w }
            row[++lines] = sprintf("%-52.52s %5d %5d %9.0f %9.0f %9.0f %9.0f", name, f, n - f, rf, wf, r - rf, w - wf)
            n_f += f; n_b += n - f; r_f += rf; w_f += wf; r_b += r - rf; w_b += w - wf
        }
        for (i = 2; i <= lines; i++) # by name
            for (j = i; j > 1 && row[j] < row[j - 1]; j--) { line = row[j]; row[j] = row[j - 1]; row[j - 1] = line }
        print ""
        for (i = 1; i <= lines; i++)
            print row[i]
        show(kinds[k] " together", n_f, n_b, r_f, w_f, r_b, w_b)
        if (k == 4) copied = n_f + n_b
        if (k < 3) { all_f += n_f; all_b += n_b }
        if (k == 1) { bytes_f = r_f + w_f; bytes_b = r_b + w_b }
    }
    print ""
    printf "kernels started in a layer: %d forward, %d in the rest of the step, %d together; copies and memsets: %d\n",
        all_f, all_b, all_f + all_b, copied
    printf "elementwise bytes of a token and layer: %.0f forward (%.1f C), %.0f in the rest (%.1f C), %.0f (%.1f C)\n",
        bytes_f, bytes_f / dim, bytes_b, bytes_b / dim, bytes_f + bytes_b, (bytes_f + bytes_b) / dim
}' 211 221 212 311 321 312
