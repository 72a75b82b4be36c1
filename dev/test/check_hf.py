#!/usr/bin/env python3
"""Shows that a checkpoint directory of ours is a Hugging Face model directory, and makes such directories.

    pip install torch transformers safetensors tokenizers        (transformers 4.56 or newer, 5 too)
    python dev/test/check_hf.py DIR                          loads DIR as any user would; prints a greedy continuation
    python dev/test/check_hf.py DIR --logits dev/test/logits      and compares logits with ours, to 1e-4
    python dev/test/check_hf.py DIR --tokenize data/tokenize and token ids with ours, all of them
    python dev/test/check_hf.py --make DIR [--llama] [--untied] [--bfloat16] [--sharded] [--fused]
                                                        a tiny random model of theirs, for ./train_moe --init DIR

dev/test/logits DIR reads token ids from standard input and writes float32 logits (T,V).
"""
import argparse
import logging
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

END = "<|endoftext|>"
STORY = ("Once upon a time, there was a little fox named Pip. Pip lived near the sea and didn't like the rain. "
         "One day, a big wave took Pip's red boat away. \"Oh no!\" said Pip. \"I can't reach it.\" "
         "A kind crab came by and said, \"I'll help you.\" They pulled and pulled, and the boat came back.\n\n"
         "Pip was happy. The two friends shared 3 sweet plums and watched the stars.")
TEXTS = [
    STORY,
    f"{END}{STORY}\n{END}The end of one story is where the next one begins: {STORY} {STORY}",
    "  Two spaces first,\ttabs\t\tand\n\n\n   ragged   lines  \r\nwe'll, they've, I'M; x=12345.67!?... "
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e\u306e\u6587 \u0421\u043a\u0430\u0437\u043a\u0430 \u0645\u0631\u062d\u0628 "
    "\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00bd\u00b2 \u201cquoted\u201d\u2026 end  \n",
]


class Warnings(logging.Handler):
    """Collects what transformers complains about."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.seen = []
        logging.getLogger("transformers").addHandler(self)

    def emit(self, record):
        self.seen.append(record.getMessage())


def check_ids(tokenizer, folder, program):
    for text in TEXTS:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text, f"decoding gives another text: {tokenizer.decode(ids)!r}"
        if program:
            with tempfile.NamedTemporaryFile(suffix=".txt") as file:
                file.write(text.encode())
                file.flush()
                command = [program, "--tokenizer", os.path.join(folder, "tokenizer.json"), "--ids", file.name]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ours = [int(x) for x in out.split()]
            first = next((i for i, (a, b) in enumerate(zip(ours, ids)) if a != b), min(len(ours), len(ids)))
            assert ours == ids, (f"ids differ from place {first} on: ours {ours[first:first + 8]}, "
                                 f"theirs {ids[first:first + 8]}, text {text[:60]!r}...")
    against = f"equal to {program}'s" if program else "not compared with ours (--tokenize)"
    print(f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} tokens; {len(TEXTS)} texts survive; ids {against}")


def check_logits(model, tokenizer, folder, program):
    largest = scale = 0.0
    longest = min(200, model.config.max_position_embeddings)
    for text in TEXTS:
        ids = tokenizer(text, verbose=False)["input_ids"][:longest]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        out = subprocess.run([program, folder], input=" ".join(map(str, ids)).encode(), check=True, capture_output=True)
        ours = np.frombuffer(out.stdout, "<f4")
        assert ours.size == theirs.size, f"{program} wrote {ours.size} numbers, {len(ids)} x {theirs.shape[1]} expected"
        error = np.abs(ours.reshape(theirs.shape) - theirs).max()
        assert np.isfinite(error)
        largest, scale = max(largest, float(error)), max(scale, float(np.abs(theirs).max()))
    print(f"logits: largest difference {largest:.1e} (largest logit {scale:.2f})")
    assert largest <= 1e-4, "our logits differ"


def check(folder, logits, tokenize):
    warnings = Warnings()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    print(f"model: {type(model).__name__}, {model.num_parameters()} parameters")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], f"{kind}: {sorted(info[kind])[:8]}"
    print("weights: none missing, unexpected or of another shape")
    assert len(tokenizer) == model.config.vocab_size, (len(tokenizer), model.config.vocab_size)
    end = tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer.bos_token_id == model.config.bos_token_id == model.generation_config.bos_token_id == end
    check_ids(tokenizer, folder, tokenize)
    if logits:
        check_logits(model, tokenizer, folder, logits)
    prompt = tokenizer(END + "Once upon a time", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    print("greedy:", repr(tokenizer.decode(out[0])))
    for message in warnings.seen:
        print("warning:", message)
    print(f"{folder} is a {model.config.model_type} directory that transformers {transformers.__version__} loads")


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([STORY], trainer)
    # without these names version 4 also returns token_type_ids, which generate() refuses
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END,
                                   model_input_names=["input_ids", "attention_mask"])


def make(folder, args):
    tokenizer = make_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
                 rope_theta=10000.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=not args.untied,
                 initializer_range=0.1)  # large, so that a wrong place shows in the logits
    torch.manual_seed(1)
    config = LlamaConfig(**sizes) if args.llama else MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):  # all one at the start, which would hide a norm that is left out
                p += 0.2 * torch.randn_like(p)
    model = model.to(torch.bfloat16 if args.bfloat16 else torch.float32)
    how = {"max_shard_size": "60KB"} if args.sharded else {}
    if args.fused:  # the names inside version 5, all experts of a layer in one tensor; it saves so only by request
        if int(transformers.__version__.split(".")[0]) < 5 or args.llama:
            sys.exit("--fused needs transformers 5 and a Mixtral")
        how["save_original_format"] = False
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    print("made", folder, "by transformers", transformers.__version__, sorted(os.listdir(folder)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--logits", metavar="PROGRAM")
    parser.add_argument("--tokenize", metavar="PROGRAM")
    parser.add_argument("--make", metavar="DIR")
    for option in ("llama", "untied", "bfloat16", "sharded", "fused"):
        parser.add_argument("--" + option, action="store_true")
    args = parser.parse_args()
    if not args.folder and not args.make:
        parser.error("a checkpoint directory, or --make DIR")
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
    if args.make:
        make(args.make, args)
    if args.folder:
        if not os.path.isfile(os.path.join(args.folder, "config.json")):
            sys.exit(f"{args.folder}: holds no config.json")
        check(args.folder, args.logits, args.tokenize)


if __name__ == "__main__":
    main()
