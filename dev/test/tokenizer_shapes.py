"""Small tokenizers in the shapes of models that exist, for check_tokenizer.py: PyPI tokenizers trains them on a text, with
the normalizer, the pre-tokenizer, the added tokens and the flags that the tokenizer.json of those models has."""
import json
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SENTENCE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def special(text, **flags):
    return AddedToken(text, special=True, normalized=False, **flags)


def plain(text, normalized=False, **flags):
    return AddedToken(text, special=False, normalized=normalized, **flags)


def byte_level(texts, vocab, steps, added, normalizer=None, ignore_merges=False):
    """GPT-2's alphabet behind other steps."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if normalizer:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False))
    add(made, [special(END), *added])
    return made


def byte_fallback(texts, vocab, normalizer=None, steps=None, added=()):
    """SentencePiece's way: characters, and bytes for those that are no token. It is trained on words, since the package
    would take hours for a whole text without a pre-tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=tokens, limit_alphabet=200,
                                                         show_progress=False))
    empty = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer:
        empty.normalizer = normalizer
    if steps:
        empty.pre_tokenizer = steps
    whole, learned = json.loads(empty.to_str()), json.loads(words.to_str())["model"]
    whole["model"].update(vocab=learned["vocab"], merges=learned["merges"])
    made = Tokenizer.from_str(json.dumps(whole))
    add(made, [special("<unk>"), special("<s>"), special("</s>"), *added])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return made


def add(made, tokens):
    for token in tokens:
        (made.add_special_tokens if token.special else made.add_tokens)([token])


def shapes(texts, vocab):
    """Yields each tokenizer with a name."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    digits = pre_tokenizers.Digits
    yield "Llama 3", byte_level(texts, vocab, [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_only],
                                [special("<|begin_of_text|>"), special("<|eot_id|>")], ignore_merges=True)
    yield "Qwen2", byte_level(texts, vocab, [pre_tokenizers.Split(Regex(QWEN2), "isolated"), bytes_only],
                              [special("<|im_start|>"), plain("<tool_call>")], normalizers.NFC())
    yield "SmolLM, StarCoder, Granite", byte_level(texts, vocab, [digits(individual_digits=True), gpt2],
                                                   [special("<fim_prefix>")])
    yield "OLMo, NeoX", byte_level(texts, vocab, [gpt2], [*(plain(" " * n, True) for n in range(24, 1, -1)),
                                                          plain("cafe\u0301", True), plain("q", True)], normalizers.NFC())
    yield "a space first", byte_level(texts, vocab, [spaced], [special("<mask>", lstrip=True), special("<right>", rstrip=True),
                                                               plain("<both>", lstrip=True, rstrip=True)])
    yield "numbers apart", byte_level(texts, vocab, [digits(individual_digits=False), spaced], [])
    yield "Llama 2, Mistral", byte_fallback(texts, vocab, SENTENCE)
    yield "Llama 2 and more tokens", byte_fallback(texts, vocab, SENTENCE, None, [plain("hello you", True), plain("▁▁"), special(
        "<x>", lstrip=True, rstrip=True)])
    yield "Gemma", byte_fallback(texts, vocab, normalizers.Replace(" ", "▁"))
    for scheme in "first", "always", "never":
        for split in False, True:
            yield f"Metaspace {scheme} {'split' if split else 'whole'}", byte_fallback(
                texts, vocab, None, pre_tokenizers.Metaspace("▁", scheme, split), [plain("story", True)])


def save(made, folder):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "tokenizer.json")
    made.save(path)
    if made.token_to_id("</s>") is not None:
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
            json.dump({"eos_token": "</s>"}, file)
    return path
