#!/usr/bin/env python3
"""Shows that llama.cpp reads the GGUF files of --export as they are: the same ids, logits and greedy text as ours.

    pip install gguf llama-cpp-python                   (the second compiles llama.cpp, which takes some minutes)
    python dev/test/check_gguf.py                       trains small runs on the built-in stories, one for each architecture, exports
                                                        each in every type and checks the files; needs make train_moe
                                                        data/tokenize dev/test/logits; ONLY=text picks some of the runs
    python dev/test/check_gguf.py DIR [--data FOLDER]   the same for one checkpoint or Hugging Face directory

Without llama-cpp-python only the gguf package looks at the files.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import numpy as np
    from gguf import GGUFReader
except ImportError as error:
    print(f"check_gguf.py: not run: {error}; pip install gguf llama-cpp-python")
    sys.exit(0)
try:
    from llama_cpp import Llama
except ImportError:
    Llama = None

END = "<|endoftext|>"
STORY = ("Once upon a time, there was a little fox named Pip. Pip lived near the sea and didn't like the rain. "
         "One day, a big wave took Pip's red boat away. \"Oh no!\" said Pip. \"I can't reach it.\" "
         "A kind crab came by and said, \"I'll help you.\" They pulled and pulled, and the boat came back.\n\n"
         "Pip was happy. The two friends shared 3 sweet plums and watched the stars.")
TEXTS = [
    STORY,
    f"{END}{STORY}\n{END}The end of one story is where the next one begins: {STORY}",
    "  Two spaces first,\ttabs\t\tand\n\n\n   ragged   lines  \r\nwe'll, they've, I'M; x=12345.67!?... "
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e\u306e\u6587 \u0421\u043a\u0430\u0437\u043a\u0430 \u0645\u0631\u062d\u0628 "
    "\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00bd\u00b2 \u201cquoted\u201d\u2026 end  \n",
]
LONGEST = 128  # tokens of a text whose logits are compared
TYPES = {"f32": 1e-5, "f16": 0.005, "q8_0": 0.02, "q4_0": 0.2}  # by how much the perplexity may differ

SMALL = ("--layers 2 --dim 64 --heads 4 --kv-heads 2 --ffn 64 --seq 128 --steps 200 --warmup 20 --eval-tokens 2048 --eval-every 0 "
         "--sample-every 0 --save-every 0 --tokens 20")
RUNS = {  # the architectures of dev/export.h
    "mixtral": "",
    "dense": "--recipe dense",
    "dense-qk-norm": "--recipe dense --qk-norm --untied",
    "dense-bias": "--recipe dense --qkv-bias",
    "dense-llama3": "--recipe dense --head-width 48 --rope-scaling llama3 --rope-original 64",
    "dense-linear": "--recipe dense --rope-scaling linear --rope-factor 4",
    "qwen3": "--recipe qwen3 --experts 16 --topk 4",
    "qwen3-qk-norm": "--recipe qwen3 --experts 16 --topk 4 --qk-norm --head-width 48",
    "olmoe": "--recipe olmoe --experts 16 --topk 4",
    "olmoe-qk-norm": "--recipe olmoe --experts 16 --topk 4 --kv-heads 4 --qk-norm --qk-norm-over row",
    "qwen2moe": "--gate probability --qkv-bias --shared 1 --shared-gate --shared-ffn 192",
    "granite": "--shared 1 --shared-ffn 96",
    "scale": "--shared 2 --scale 1.5",
    "deepseekmoe": "--recipe deepseekmoe --experts 15 --topk 3 --shared 1 --dense-first 1",
}


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def our_ids(folder, text):
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(text.encode())
        file.flush()
        out = run("data/tokenize", "--tokenizer", os.path.join(folder, "tokenizer.json"), "--ids", file.name)
    return [int(x) for x in out.split()]


def our_logits(folder, ids):
    return np.frombuffer(run("dev/test/logits", folder, input=" ".join(map(str, ids)).encode()), "<f4").reshape(len(ids), -1)


def their_logits(llama, ids):
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[:len(ids)], dtype=np.float32)


def perplexity(logits, ids):
    """exp of the mean loss of ids[1:]"""
    x = logits[:-1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return float(np.exp(np.mean(np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(ids) - 1), ids[1:]])))


def validation_ids(data, count):
    names = sorted(n for n in os.listdir(data) if n.endswith(".bin") and "val" in n)
    return np.fromfile(os.path.join(data, names[0]), "<u2", offset=1024, count=count).astype(int).tolist()


def greedy(llama, ids, count):
    """Bytes of the likeliest continuation."""
    llama.reset()
    out = b""
    for _ in range(count):
        llama.eval(ids)
        ids = [int(np.argmax(llama.scores[llama.n_tokens - 1]))]
        if ids[0] == llama.token_eos():
            break
        out += llama.detokenize(ids, special=True) if llama.n_tokens else b""
    return out


def check_file(path, folder, kind, texts, data):
    """One file against our model; returns what a line of the table has."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    kinds = sorted({t.tensor_type.name for t in reader.tensors})
    size = os.path.getsize(path) / 1e6
    if not Llama:
        return f"{kind:5} {architecture:11} {size:8.2f} MB, {len(reader.tensors)} tensors of {' '.join(kinds)}"
    context = max(fields[f"{architecture}.context_length"], LONGEST)
    llama = Llama(path, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, verbose=False, n_threads=2, flash_attn=False,
                  type_k=0, type_v=0)  # keys and values in float32, as here
    largest = 0.0
    for text, ids, ours in texts:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == ids, f"{path}: other ids of {text[:40]!r}: {theirs[:20]}, ours {ids[:20]}"
        error = np.abs(their_logits(llama, ids[:LONGEST]) - ours).max()
        assert np.isfinite(error)
        largest = max(largest, float(error))
    assert kind != "f32" or largest <= 1e-4, f"{path}: logits differ by {largest}"
    ids = validation_ids(data, 4 * context)
    mean = np.exp(np.mean([np.log(perplexity(their_logits(llama, ids[i:i + context]), ids[i:i + context]))
                           for i in range(0, 4 * context, context)]))
    mine = np.exp(np.mean([np.log(perplexity(our_logits(folder, ids[i:i + context]), ids[i:i + context]))
                           for i in range(0, 4 * context, context)]))
    assert abs(mean / mine - 1) <= TYPES[kind], f"{path}: perplexity {mean}, ours {mine}"
    same = ""
    if kind == "f32":
        begin = llama.tokenize(b"Once upon a time", add_bos=True, special=True)
        ours = run("./train_moe", "--out", folder, "--prompt", "Once upon a time", "--temperature", "0", "--tokens", "60").rstrip(b"\n")
        theirs = b"Once upon a time" + greedy(llama, begin, 60)
        assert ours == theirs.rstrip(b"\n"), f"{path}: greedy text {theirs!r}, ours {ours!r}"
        same = ", the same greedy text"
    return (f"{kind:5} {architecture:11} {size:8.2f} MB, logits differ by {largest:.1e}, perplexity {mean:.4f}, ours {mine:.4f}{same}")


def check(folder, data, where):
    texts = []
    for text in TEXTS:
        ids = our_ids(folder, text)
        texts.append((text, ids, our_logits(folder, ids[:LONGEST])))
    for kind in TYPES:
        path = os.path.join(where, f"model-{kind}.gguf")
        run("./train_moe", "--out", folder, "--export", path, "--export-type", kind)
        print("   ", check_file(path, folder, kind, texts, data), flush=True)
        os.remove(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--data", default="data/stories")
    args = parser.parse_args()
    where = tempfile.mkdtemp()
    try:
        if args.folder:
            check(args.folder, args.data, where)
        for name, options in RUNS.items():
            if not args.folder and os.environ.get("ONLY", "") in name:
                out = os.path.join(where, name)
                run("./train_moe", *SMALL.split(), *options.split(), "--data", args.data, "--out", out)
                print(f"{name}: {options}", flush=True)
                check(os.path.join(out, "latest"), args.data, where)
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
