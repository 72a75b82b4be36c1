#!/usr/bin/env python3
"""Holds data/tokenize against PyPI tokenizers and tiktoken: the same ids, and how fast.

    pip install tokenizers==0.23.3 tiktoken==0.14.0
    python3 dev/test/check_tokenizer.py GPT2_DIR SAMPLE.txt [--tool data/tokenize] [--megabytes 20]

GPT2_DIR holds GPT-2's vocab.json and merges.txt; SAMPLE.txt is a text with <|endoftext|> between documents, such as
TinyStories. Nothing is downloaded. Tokenizers in the shapes of other models (dev/test/tokenizer_shapes.py) are made on the
spot; --shapes compares these alone, and then GPT2_DIR may be anything. Ends with status 1 where one id differs."""
import argparse
import atexit
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizer_shapes
from tokenizers import Tokenizer

END = "<|endoftext|>"
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

parser = argparse.ArgumentParser()
parser.add_argument("gpt2")
parser.add_argument("sample")
parser.add_argument("--tool", default=os.path.join(os.path.dirname(__file__), "..", "..", "data", "tokenize"))
parser.add_argument("--shapes", action="store_true", help="only the shapes of other models")
parser.add_argument("--megabytes", type=int, default=20, help="size of the text for the speed test")
args = parser.parse_args()
folder = tempfile.mkdtemp(prefix="check_tokenizer-")
atexit.register(shutil.rmtree, folder)
failed = 0


def path(name):
    return os.path.join(folder, name)


def write(name, data):
    with open(path(name), "wb") as file:
        file.write(data)
    return path(name)


def our_ids(tokenizer, text):
    out = subprocess.run([args.tool, "--tokenizer", tokenizer, "--ids", write("text", text)], capture_output=True)
    if out.returncode:
        sys.exit(out.stderr.decode())
    return list(map(int, out.stdout.split()))


def check(what, ours, theirs):
    global failed
    same = sum(a == b for a, b in zip(ours, theirs))
    equal = ours == theirs
    failed += not equal
    print(f"{'ok ' if equal else 'BAD'} {what}: {len(ours)} and {len(theirs)} ids, "
          f"{100 * same / max(1, len(ours), len(theirs)):.4g}% equal in place")


# GPT-2's byte alphabet, for tiktoken, which wants bytes.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
alphabet = {chr(byte): byte for byte in printable}
alphabet.update({chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)})


def gpt2_json():
    """GPT-2's two files as one tokenizer.json, merges as strings; and the same for tiktoken."""
    import tiktoken

    with open(os.path.join(args.gpt2, "vocab.json"), encoding="utf-8") as file:
        vocab = json.load(file)
    with open(os.path.join(args.gpt2, "merges.txt"), encoding="utf-8") as file:
        merges = [line.rstrip("\n") for line in file if line.strip() and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocab[END], "content": END, "special": True, "normalized": False, "single_word": False,
           "lstrip": False, "rstrip": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
             "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                       "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                       "merges": merges}}
    ranks = {bytes(alphabet[c] for c in token): id for token, id in vocab.items() if token != END}
    return whole, tiktoken.Encoding("gpt2-offline", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                    special_tokens={END: vocab[END]})


def torture():
    r = random.Random(1)
    parts = [
        "\U0001F468\u200d\U0001F469\u200d\U0001F467\u200d\U0001F466 \U0001F1E9\U0001F1EA\U0001F1EB\U0001F1F7 "
        "\U0001F44B\U0001F3FD 1\ufe0f\u20e3 \u2764\ufe0f",
        "e\u0301 n\u0303a a\u0300\u0316\u0330 Z\u0351\u0343\u0314algo \u1e9b\u0323",
        "中文沒有空格，日本語のひらがなとカタカナ。한국어 문장입니다 ㈱①⑩㊿ 〇一二三",
        "مرحبا بالعالم ٠١٢٣٤٥٦٧٨٩ ﷺ \u202bשלום עוֹלָם\u202c",
        "สวัสดีชาวโลก ๐๑๒๓ नमस्ते दुनिया ०१२३ क्षत्रिय বাংলা தமிழ்",
        "x² x₃ ½ ¾ Ⅷ ⅷ ٣ ৪ ௧௨ 𝟘𝟙𝟚 ꘠ 1st 2nd 3.14159 1,000,000 0x1F",
        "don't DON'T we'll WE'LL I'm I'M they've THEY'VE you're he'd 's 'S ''s '''ll 't'd 'x 're've it\u2019s",
        "for (int i = 0; i < n; i++) {\n\t\tx[i] += y[i] * 2.0f;  // add\n\t}\n\n\n"
        "#define A(x) ((x)<<1)\r\n\r\n\tend\r",
        "a\u00a0b \u00a0 c\u2028d\u2029e\u200bf\u200dg\ufeffh\u3000i"
        "\u0085j\u1680k\u202fl\u205fm\u180en\x1co\x1fp\x0bq\x0cr",
        "".join(" " * n + "x" for n in range(1, 40)) + "\n" * 30 + "y" + "\t" * 20,
        "z" + " \n" * 10 + "  \n\n  \t end   ",
        "ÄÖÜäöüß Straße İıŞş ÀÉÎÕÜ ﬁﬂ Ǆǅǆ ʰʱ ªº µ Ωℵ℧ ſ 𝔘𝔫𝔦 ⓐⓑ ᛗᛖ Ⴀ ꙮ \U00010D40\U0001F100",
        END, f"{END}{END} {END}\n{END}x", "<|endoftext", "<|endoftext|", "|>", "<|", "\0\x01\x7f\ufffd",
    ]
    text = " ".join(parts) + "".join(parts) + "\n".join(reversed(parts))
    text += " " + "a" * 100000 + " " + "".join(r.choice("etaoinshrdlu") for _ in range(100000)) + "!" * 5000
    signs = "".join(parts)
    return text + "".join(r.choice(signs) for _ in range(200000))


def every_character():
    """Every character between letters, digits and signs: wrong classes show."""
    return "".join(f"a{c}1{c}!{c} {c}" for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000)


def decode(vocabulary, ids):
    return b"".join(bytes(alphabet[c] for c in vocabulary[id]) for id in ids)


def some_characters():
    """All below U+3000, one in thirteen above, and the numbers of Unicode 17."""
    points = [*range(0x3000), *range(0x3000, 0x110000, 13), *range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]
    return "".join(f"a{c}1{c}!{c} {c}" for c in map(chr, points) if not 0xD800 <= ord(c) < 0xE000)


def mixed(parts):
    r = random.Random(5)
    return "".join(r.choice(parts) for _ in range(30000))


def marks():
    """Letters, Hangul and many combining marks, for NFC."""
    r = random.Random(6)
    all_marks = [chr(c) for c in range(0x300, 0x110000) if unicodedata.combining(chr(c))]
    letters = [chr(c) for c in range(0xC0, 0x30000) if unicodedata.decomposition(chr(c))]
    kinds = [all_marks, all_marks, letters, list("aeoAE "), [chr(c) for c in range(0x1100, 0x1200)],
             [chr(c) for c in range(0xAC00, 0xD7B0)]]
    return "".join(r.choice(r.choice(kinds)) for _ in range(30000)) + "a" + "".join(r.choice(all_marks) for _ in range(20000))


def check_shapes():
    """The same ids for the shapes of other models, and how fast."""
    bits = [" ", "  ", "\n", "\t", "a", "é", "hello you", "hello", "1", "23", "<mask>", "<right>", "<both>", "<x>", "<s>", "</s>",
            "▁", "▁▁", "story", " " * 9, "q", "café", "cafe\u0301", "'s", "'ſ", "'S", "!", "\r", "<|eot_id|>", "<tool_call>",
            "🙂", END]
    few = [*("", " ", "a", " a", "  a", "▁", "▁a", "\n", "<s>", "<s>a", "a<s> a", END, f"x{END}y", "hello you")]
    text, hard = sample.decode()[:300000], torture()
    texts = [("the sample", text), ("torture text", hard[:25000] + hard[-20000:]), ("many characters", some_characters()),
             ("mixed", mixed(bits)), ("marks", marks()), *((repr(bit), bit) for bit in few)]
    big = write("big.txt", sample * max(1, round(args.megabytes * 1e6 / len(sample))))
    for name, made in tokenizer_shapes.shapes([text, hard.split("a" * 1000)[0].replace("\0", "")], 1500):
        file, bad = tokenizer_shapes.save(made, path(name)), failed
        made = Tokenizer.from_file(file)
        for what, text in texts:
            ours, theirs = our_ids(file, text.encode()), made.encode(text, add_special_tokens=False).ids
            if ours != theirs or what == "the sample":
                check(f"{name}, {what}", ours, theirs)
        start = os.times().children_user
        subprocess.run([args.tool, "--tokenizer", file, "--threads", "1", big, "--out", path("speed")], check=True,
                       stdout=subprocess.DEVNULL)
        print(f"{'ok ' if failed == bad else 'BAD'} {name}, {len(texts)} texts; {os.path.getsize(big) / 1e6:.1f} MB in "
              f"{os.times().children_user - start:.2f} s of one processor, with reading and writing", flush=True)


with open(args.sample, "rb") as file:
    sample = file.read()
check_shapes()
if args.shapes:
    print("all equal" if not failed else f"{failed} checks failed")
    sys.exit(failed > 0)
whole, tik = gpt2_json()
gpt2 = write("gpt2.json", json.dumps(whole).encode())
whole["model"]["merges"] = [merge.split(" ") for merge in whole["model"]["merges"]]
gpt2_pairs = write("gpt2-pairs.json", json.dumps(whole, ensure_ascii=False).encode())
reference = Tokenizer.from_file(gpt2)

texts = [("the sample", sample.decode()), ("torture text", torture()), ("every character", every_character())]
for what, text in texts:
    ids = our_ids(gpt2, text.encode())
    check(f"GPT-2, {what}, tokenizers", ids, reference.encode(text, add_special_tokens=False).ids)
    check(f"GPT-2, {what}, tiktoken", ids, tik.encode(text, allowed_special="all"))
    check(f"GPT-2, {what}, merges as pairs", our_ids(gpt2_pairs, text.encode()), ids)

# A vocabulary of our own, and token files.
sample_path, mine = write("sample.txt", sample), path("mine")
subprocess.run([args.tool, sample_path, "--vocab", "4096", "--out", mine], check=True, stdout=subprocess.DEVNULL)
own = Tokenizer.from_file(os.path.join(mine, "tokenizer.json"))
for what, text in texts[:2]:
    check(f"our vocabulary, {what}, tokenizers", our_ids(os.path.join(mine, "tokenizer.json"), text.encode()),
          own.encode(text, add_special_tokens=False).ids)
ids = []
for split in "train", "val":
    with open(os.path.join(mine, f"{split}_000000.bin"), "rb") as file:
        data = memoryview(file.read())
    ids += list(data[1024:].cast("H"))
documents = [d.strip() for d in sample.decode().split(END)]
whole_text = "".join(END + d for d in documents if d)
check("our vocabulary, token files", ids, own.encode(whole_text, add_special_tokens=False).ids)

# Text that is no UTF-8, byte for byte.
r = random.Random(2)
broken = bytes(r.randrange(256) for _ in range(200000)) + sample[:50000]
broken += b"\xc3(\xe2\x82\xff\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80"
vocabulary = {id: token for token, id in reference.get_vocab(True).items()}
check("GPT-2, bytes that are no UTF-8, there and back", list(decode(vocabulary, our_ids(gpt2, broken))), list(broken))

# Speed on one core: both read a file of documents and encode it (tokenizers in batches of documents, its fastest way).
repeat = max(1, round(args.megabytes * 1e6 / len(sample)))
big = write("big.txt", sample * repeat)
for name, tokenizer in ("GPT-2", gpt2), ("our vocabulary", os.path.join(mine, "tokenizer.json")):
    start = time.time()
    subprocess.run([args.tool, "--tokenizer", tokenizer, "--threads", "1", big, "--out", path("speed")], check=True,
                   stdout=subprocess.DEVNULL)
    ours = time.time() - start
    other = Tokenizer.from_file(tokenizer)
    start = time.time()
    with open(big, encoding="utf-8", newline="") as file:
        documents = [d.strip() for d in file.read().split(END)]
    for i in range(0, len(documents), 1000):
        other.encode_batch_fast(documents[i : i + 1000], add_special_tokens=False)
    theirs = time.time() - start
    size = len(sample) * repeat / 1e6
    print(f"speed, {name}, {size:.0f} MB, one thread: data/tokenize, with reading and writing, {size / ours:.1f} MB/s; "
          f"tokenizers {size / theirs:.1f} MB/s; ratio {theirs / ours:.1f}")

print("all equal" if not failed else f"{failed} checks failed")
sys.exit(failed > 0)
