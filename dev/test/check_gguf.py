#!/usr/bin/env python3
"""Shows that llama.cpp reads the GGUF files of --export as they are: the same ids, logits and greedy text as ours.

    pip install gguf llama-cpp-python                   (the second compiles llama.cpp, which takes some minutes)
    python dev/test/check_gguf.py                       trains small runs on the built-in stories, one for each architecture, exports
                                                        each in every type and checks the files; needs make train_moe
                                                        data/tokenize dev/test/logits; ONLY=text picks some of the runs
    python dev/test/check_gguf.py DIR [--data FOLDER]   the same for one checkpoint or Hugging Face directory, as those that
                                                        dev/test/check_hf.py --make DIR makes

Without llama-cpp-python only the gguf package looks at the files.
"""
import argparse
import json
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
SPACES = ["", "a", "12 345 6789", "don't DON'T we'LL", "x\n\n y\r\n  z", "a  b   c", "\t\tif (x):\n\treturn 1  # \u00e9"]
LONGEST = 128  # tokens of a text whose logits are compared
TYPES = {"f32": 1e-5, "f16": 0.005, "q8_0": 0.02, "q4_0": 0.2}  # by how much the perplexity may differ

SMALL = ("--threads 1 --layers 2 --dim 64 --heads 4 --kv-heads 2 --ffn 64 --seq 128 --steps 200 --warmup 20 --eval-tokens 2048 --eval-every 0 "
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


def mean_perplexity(logits, windows):
    return float(np.exp(np.mean([np.log(perplexity(logits(ids), ids)) for ids in windows])))


def check_file(path, folder, kind, texts, windows, mine):
    """One file against our model; returns what a line of the table has."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    kinds = sorted({t.tensor_type.name for t in reader.tensors})
    size = os.path.getsize(path) / 1e6
    if not Llama:
        return f"{kind:5} {architecture:11} {size:8.2f} MB, {len(reader.tensors)} tensors of {' '.join(kinds)}"
    context = max(fields[f"{architecture}.context_length"], LONGEST)
    llama = Llama(path, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, verbose=False, n_threads=1, flash_attn=False,
                  type_k=0, type_v=0)  # keys and values in float32, as here
    largest = 0.0
    for text, ids, ours in texts:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == ids, f"{path}: other ids of {text[:40]!r}: {theirs[:20]}, ours {ids[:20]}"
        error = np.abs(their_logits(llama, ids[:LONGEST]) - ours).max()
        assert np.isfinite(error)
        largest = max(largest, float(error))
    assert kind != "f32" or largest <= 1e-4, f"{path}: logits differ by {largest}"
    mean = mean_perplexity(lambda ids: their_logits(llama, ids), windows)
    assert abs(mean / mine - 1) <= TYPES[kind], f"{path}: perplexity {mean}, ours {mine}"
    same = ""
    if kind == "f32":
        begin = [llama.token_eos()] + llama.tokenize(b"Once upon a time", add_bos=False, special=True)  # as --prompt begins
        if fields["tokenizer.ggml.add_bos_token"]:
            assert begin == llama.tokenize(b"Once upon a time", add_bos=True, special=True)
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
    windows = [ids[:LONGEST] for _, ids, _ in texts]
    if data:
        ids = validation_ids(data, 4 * LONGEST)
        windows = [ids[i:i + LONGEST] for i in range(0, len(ids), LONGEST)]
    mine = mean_perplexity(lambda ids: our_logits(folder, ids), windows) if Llama else 0
    for kind in TYPES:
        path = os.path.join(where, f"model-{kind}.gguf")
        run("./train_moe", "--out", folder, "--export", path, "--export-type", kind)
        print("   ", check_file(path, folder, kind, texts, windows, mine), flush=True)
        os.remove(path)


# ---- tokenizers in the shapes of models that exist, with the tokens of the built-in stories

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")


def byte_level(tokenizer, shape):
    """The same tokens and merges, with texts cut as another model does."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": shape == "smollm"}
    first = {"type": "Digits", "individual_digits": True}
    if shape != "smollm":
        pattern = WORDS % (r"\p{N}{1,3}" if shape == "llama-bpe" else r"\p{N}")
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, last]}
    tokenizer["model"]["ignore_merges"] = shape == "llama-bpe"
    return tokenizer


def fallback(tokenizer):
    """SentencePiece's form: characters, with bytes for those that are no token, and all merges that make a token."""
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in visible]
    of = {**{chr(b): b for b in visible}, **{chr(256 + i): b for i, b in enumerate(hidden)}}
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + ["\u2581"]
    tokens += [chr(b) for b in range(33, 127)] + ["\u00e9", "\u65e5"]
    for token in tokenizer["model"]["vocab"]:
        text = bytes(of.get(c, 0) for c in token).decode(errors="replace").replace(" ", "\u2581")
        if len(text) > 1 and text.isprintable() and "\ufffd" not in text and text not in tokens and len(tokens) < 1900 and "<|" not in text:
            tokens.append(text)
    known = set(tokens[259:])
    merges = [[t[:i], t[i:]] for t in tokens[259:] for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
    underscore = {"String": "\u2581"}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                         for i, t in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                                           {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": underscore, "content": " "}, {"type": "ByteFallback"},
                                                     {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }


def check_shapes(run_folder, where):
    """llama.cpp's ids of the texts are ours, with each shape of tokenizer."""
    for shape in ("llama-bpe", "qwen2", "smollm", "fallback"):
        with open("data/stories/tokenizer.json") as file:
            tokenizer = json.load(file)
        folder = os.path.join(where, shape)
        os.makedirs(folder)
        with open(os.path.join(folder, "tokenizer.json"), "w") as file:
            json.dump(fallback(tokenizer) if shape == "fallback" else byte_level(tokenizer, shape), file)
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
            json.dump({"eos_token": "</s>" if shape == "fallback" else END}, file)
        path = os.path.join(folder, "model.gguf")
        run("./train_moe", "--out", run_folder, "--export", path, "--tokenizer", os.path.join(folder, "tokenizer.json"))
        llama = Llama(path, vocab_only=True, verbose=False)
        count = 0
        for text in TEXTS + SPACES:
            text = text.replace(END, "") if shape == "fallback" else text
            ours, theirs = our_ids(folder, text), llama.tokenize(text.encode(), add_bos=False, special=True)
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            assert ours == theirs, f"{shape}: from id {first} on ours are {ours[first:first + 8]}, theirs {theirs[first:first + 8]}: {text[:60]!r}"
            count += len(ours)
        print(f"tokenizer in the shape {shape}: {count} ids, all the same", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--data", help="folder whose validation tokens are read for the perplexity [the built-in texts; of runs data/stories]")
    args = parser.parse_args()
    where = tempfile.mkdtemp()
    try:
        if args.folder:
            check(args.folder, args.data, where)
        for name, options in RUNS.items():
            if not args.folder and os.environ.get("ONLY", "") in name:
                out = os.path.join(where, name)
                run("./train_moe", *SMALL.split(), *options.split(), "--data", "data/stories", "--out", out)
                print(f"{name}: {options}", flush=True)
                check(os.path.join(out, "latest"), "data/stories", where)
                if Llama and name == "mixtral":
                    check_shapes(out, where)
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
