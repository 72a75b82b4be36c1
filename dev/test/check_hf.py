#!/usr/bin/env python3
"""Shows that a checkpoint directory of ours is a Hugging Face model directory, and makes such directories.

    pip install torch transformers safetensors tokenizers        (transformers 4.56 or newer, 5 too)
    python dev/test/check_hf.py DIR                          loads DIR as any user would; prints a greedy continuation
    python dev/test/check_hf.py DIR --logits dev/test/logits      and compares logits with ours, to 1e-4
    python dev/test/check_hf.py DIR --tokenize data/tokenize and token ids with ours, all of them
    python dev/test/check_hf.py --make DIR [--kind Qwen3Moe] [--llama] [--untied] [--bfloat16] [--sharded] [--fused]
                                                        a tiny random model of theirs, for ./train_moe --init DIR
    python dev/test/check_hf.py --foreign                    makes some two hundred directories of theirs, of all classes that this
                                                        program knows, each with something in its config.json or its weights,
                                                        and brings them home by ./train_moe --init: the loss is theirs to 1e-5,
                                                        what is written back, also after some steps, is the same class with the
                                                        loss that we give it; or the directory is refused by name.
                                                        Needs make train_moe data/tokenize dev/test/logits; ONLY=text picks some

dev/test/logits DIR reads token ids from standard input and writes float32 logits (T,V).
"""
import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
except ImportError as error:
    print(f"check_hf.py: not run: {error}; pip install torch transformers safetensors tokenizers")
    sys.exit(0 if "--foreign" in sys.argv else 1)

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


FEW = dict(num_experts=4, num_experts_per_tok=2)
FEW_LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
GRANITE = dict(FEW_LOCAL, embedding_multiplier=12.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=3.0)
# Sizes that only some classes have.
KINDS = {
    "Mixtral": FEW_LOCAL, "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": dict(head_dim=16),
    "Qwen2Moe": dict(FEW, moe_intermediate_size=40, shared_expert_intermediate_size=56),
    "Qwen3Moe": dict(FEW, moe_intermediate_size=40, head_dim=16),
    "Olmoe": dict(FEW), "GraniteMoe": GRANITE, "GraniteMoeShared": dict(GRANITE, shared_intermediate_size=56),
}


def make(folder, args, **more):
    tokenizer = make_tokenizer()
    kind = more.pop("kind", None) or args.kind or ("Llama" if args.llama else "Mixtral")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
                 rope_theta=10000.0, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=not args.untied,
                 initializer_range=0.1)  # large, so that a wrong place shows in the logits
    sizes.update(KINDS[kind])
    sizes.update(more)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):  # all one at the start, which would hide a norm that is left out
                p += 0.2 * torch.randn_like(p)
            if name.endswith(".bias"):
                p += 0.3 * torch.randn_like(p)
    model = model.to(torch.float16 if args.float16 else torch.bfloat16 if args.bfloat16 else torch.float32)
    how = {"max_shard_size": "60KB"} if args.sharded else {}
    if args.fused:  # the names inside version 5, all experts of a layer in one tensor; it saves so only by request
        if int(transformers.__version__.split(".")[0]) < 5 or kind not in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"):
            sys.exit("--fused needs transformers 5 and a class with experts")
        how["save_original_format"] = False
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    if not args.foreign:
        print("made", folder, "by transformers", transformers.__version__, sorted(os.listdir(folder)))


# ---- other makers' checkpoints: what is made, and whether it has to load or be refused

def edit(folder, **fields):
    """Sets fields of config.json; None takes one out, "null" writes null."""
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    for name, value in fields.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = None if value == "null" else value
    with open(path, "w") as file:
        json.dump(config, file, indent=2)


def old_form(folder, **fields):
    """A config.json as version 4 wrote it: rotary positions beside the other fields."""
    edit(folder, rope_parameters=None, dtype=None, torch_dtype="float32", rope_theta=10000.0, rope_scaling="null")
    edit(folder, **fields)


def weights(folder, change):
    """Changes the tensors of model.safetensors: change(tensors) works on the dictionary."""
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, {"format": "pt"})


def put(name, *shape):
    def change(tensors):
        tensors[name] = 0.1 * torch.randn(*shape)
    return lambda folder: weights(folder, change)


def take(name):
    return lambda folder: weights(folder, lambda tensors: tensors.pop(name))


def fields(**values):
    return lambda folder: edit(folder, **values)


def old(**values):
    return lambda folder: old_form(folder, **values)


def both(*changes):
    def change(folder):
        for c in changes:
            c(folder)
    return change


def rope(**values):
    return fields(rope_parameters={"rope_theta": 10000.0, **values})


def old_shards(folder):
    """An index with shards of other weights, beside the whole file."""
    whole = os.path.join(folder, "model.safetensors")
    tensors = {name: t + 0.3 for name, t in load_file(whole).items()}
    save_file(tensors, os.path.join(folder, "old.safetensors"), {"format": "pt"})
    with open(whole + ".index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": {name: "old.safetensors" for name in tensors}}, file)


def as_bin(folder):
    torch.save(load_file(os.path.join(folder, "model.safetensors")), os.path.join(folder, "pytorch_model.bin"))
    os.remove(os.path.join(folder, "model.safetensors"))


def as_adapter(folder):
    for name in ("config.json", "model.safetensors"):
        os.remove(os.path.join(folder, name))
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump({"peft_type": "LORA", "base_model_name_or_path": "someone/model"}, file)


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_model(folder):
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)


M, L = dict(), dict(llama=True)
LINEAR = {"factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
HEAD = put("lm_head.weight", 384, 64)


def of_class(kind, **more):
    return dict(kind=kind, **more)


# What every class is asked, and then what only one of them has. One expert of a router with weights that are not divided learns.
OF_CLASSES = []
for kind in KINDS:
    OF_CLASSES += [
        (f"{kind} as it is", of_class(kind), None, None),
        (f"{kind} untied bfloat16", of_class(kind, untied=True, bfloat16=True), None, None),
        (f"{kind} float16 sharded", of_class(kind, float16=True, sharded=True), None, None),
        (f"{kind} one head of keys, five layers", of_class(kind, num_key_value_heads=1, num_hidden_layers=5), None, None),
        (f"{kind} as many heads of keys", of_class(kind, num_key_value_heads=4), None, None),
        (f"{kind} old form", of_class(kind), old(), None),
        (f"{kind} theta and eps", of_class(kind, rope_theta=700.0, rms_norm_eps=0.01), None, None),
        (f"{kind} llama3", of_class(kind), rope(**LLAMA3), None),
        (f"{kind} yarn", of_class(kind), rope(**YARN), "rope_type is yarn"),
        (f"{kind} a bias of attention's output", of_class(kind), put("model.layers.0.self_attn.o_proj.bias", 64),
         "self_attn.o_proj.bias is no tensor"),
        (f"{kind} a tensor is missing", of_class(kind), take("model.layers.1.self_attn.v_proj.weight"),
         "there is no model.layers.1.self_attn.v_proj.weight"),
        (f"{kind} gelu", of_class(kind, hidden_act="gelu"), None, "hidden_act is gelu"),
    ]
    if "num_experts" in KINDS[kind] or "num_local_experts" in KINDS[kind]:
        local = "num_local_experts" in KINDS[kind]
        OF_CLASSES += [
            (f"{kind} three of six experts", of_class(kind, num_experts_per_tok=3, **({"num_local_experts": 6} if local else {"num_experts": 6})),
             None, None),
            (f"{kind} too few experts", of_class(kind), fields(num_experts_per_tok=5), "num_experts_per_tok 5 is more than"),
        ]
for kind in ("Qwen2Moe", "Qwen3Moe", "Olmoe"):
    OF_CLASSES += [
        (f"{kind} fused", of_class(kind, fused=True), None, None),
        (f"{kind} fused sharded bfloat16", of_class(kind, fused=True, sharded=True, bfloat16=True), None, None),
        (f"{kind} renormalised", of_class(kind, norm_topk_prob=True), None, None),
        (f"{kind} one expert a token", of_class(kind, num_experts_per_tok=1), None, None),
        (f"{kind} one expert a token, renormalised", of_class(kind, num_experts_per_tok=1, norm_topk_prob=True), None,
         "num_experts_per_tok is 1"),
    ]
for kind in ("Qwen2Moe", "Qwen3Moe"):
    OF_CLASSES += [
        (f"{kind} first layer dense", of_class(kind, mlp_only_layers=[0]), None, None),
        (f"{kind} two dense layers of five", of_class(kind, num_hidden_layers=5, mlp_only_layers=[0, 1]), None, None),
        (f"{kind} every second layer", of_class(kind, num_hidden_layers=4, decoder_sparse_step=2), None, None),
        (f"{kind} sparse and listed", of_class(kind, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]), None, None),
        (f"{kind} no even pattern", of_class(kind, mlp_only_layers=[1]), None, "mlp_only_layers"),
    ]
for kind in ("Qwen2", "Qwen3"):
    OF_CLASSES += [
        (f"{kind} short window", of_class(kind, use_sliding_window=True, sliding_window=16, max_window_layers=1), None, "sliding_window is 16"),
        (f"{kind} window as long as seq", of_class(kind, use_sliding_window=True, sliding_window=64, max_window_layers=1), None, None),
        (f"{kind} window not used", of_class(kind, use_sliding_window=False, sliding_window=16), None, None),
    ]
for kind in ("Mixtral", "Llama", "Mistral", "Qwen3", "Qwen3Moe"):
    OF_CLASSES += [(f"{kind} wide heads", of_class(kind, head_dim=32), None, None)]
OF_CLASSES += [
    ("Qwen3 attention_bias", of_class("Qwen3", attention_bias=True), None, "attention_bias is true"),
    ("Qwen3Moe attention_bias", of_class("Qwen3Moe", attention_bias=True), None, "attention_bias is true"),
    ("Qwen3Moe experts under the other name", of_class("Qwen3Moe"), fields(num_experts=None, num_local_experts=4), None),
    ("Qwen2Moe without biases", of_class("Qwen2Moe", qkv_bias=False), None, None),
    ("Qwen2Moe narrow shared expert", of_class("Qwen2Moe", shared_expert_intermediate_size=8), None, None),
    ("Qwen2 no bias", of_class("Qwen2"), take("model.layers.2.self_attn.q_proj.bias"), "there is no model.layers.2.self_attn.q_proj.bias"),
    ("Qwen3 no norm", of_class("Qwen3"), take("model.layers.2.self_attn.q_norm.weight"), "there is no model.layers.2.self_attn.q_norm.weight"),
    ("Mistral short window", of_class("Mistral", sliding_window=16), None, "sliding_window is 16"),
    ("Mistral no window", of_class("Mistral", sliding_window=None), None, None),
    ("Olmoe clipped", of_class("Olmoe", clip_qkv=0.5), None, "clip_qkv is 0.5"),
    ("GraniteMoe plain", of_class("GraniteMoe", embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0), None, None),
    ("GraniteMoe without factors", of_class("GraniteMoe"), fields(embedding_multiplier=None, attention_multiplier=None,
                                                                  residual_multiplier=None, logits_scaling=None), None),
    ("GraniteMoe bad factor", of_class("GraniteMoe"), fields(logits_scaling=0.0), "logits_scaling is 0"),
    ("GraniteMoeShared nothing shared", of_class("GraniteMoeShared", shared_intermediate_size=0), None, None),
    ("a factor of another class", of_class("Qwen3Moe"), fields(embedding_multiplier=2.0), "only a Granite"),
]
# name, how make() makes it, what is changed then, and None if it has to load with the loss that transformers gives it, else
# what the refusal says
FOREIGN = [
    ("mixtral", M, None, None),
    ("mixtral untied", dict(untied=True), None, None),
    ("mixtral bfloat16", dict(bfloat16=True), None, None),
    ("mixtral sharded", dict(sharded=True), None, None),
    ("mixtral fused", dict(fused=True), None, None),
    ("mixtral fused sharded untied", dict(fused=True, sharded=True, untied=True), None, None),
    ("mixtral one head of keys", dict(num_key_value_heads=1), None, None),
    ("mixtral three of six experts", dict(num_local_experts=6, num_experts_per_tok=3), None, None),
    ("mixtral all experts", dict(num_local_experts=2), None, None),
    ("mixtral theta", dict(rope_theta=500.0), None, None),
    ("mixtral eps", dict(rms_norm_eps=0.1), None, None),
    ("mixtral one expert a token", dict(num_experts_per_tok=1), None, "num_experts_per_tok is 1"),
    ("llama", L, None, None),
    ("llama untied", dict(llama=True, untied=True), None, None),
    ("llama bfloat16 sharded", dict(llama=True, bfloat16=True, sharded=True), None, None),
    ("llama old form", L, old(), None),
    ("llama wide head", dict(llama=True, head_dim=32), None, None),
    ("llama gelu", dict(llama=True, hidden_act="gelu"), None, "hidden_act is gelu"),
    ("mixtral relu", dict(hidden_act="relu"), None, "hidden_act is relu"),
    ("mixtral swish", dict(hidden_act="swish"), None, None),
    # fields
    ("old form", M, old(), None),
    ("no theta", M, old(rope_theta=None), None),
    ("llama no theta", L, old(rope_theta=None), None),
    ("llama no eps", L, fields(rms_norm_eps=None), None),
    ("no eps", M, fields(rms_norm_eps=None), None),
    ("llama no key heads", dict(llama=True, num_key_value_heads=4), fields(num_key_value_heads=None), None),
    ("key heads null", dict(llama=True, num_key_value_heads=4), fields(num_key_value_heads="null"), None),
    ("no position embeddings", M, fields(max_position_embeddings=None), None),
    ("no experts", dict(num_local_experts=8), fields(num_local_experts=None, num_experts_per_tok=None), None),
    ("experts by another name", M, fields(num_local_experts=None, num_experts=4), None),
    ("no tie", dict(untied=True), fields(tie_word_embeddings=None), None),
    ("no head_dim", M, fields(head_dim=None), None),
    ("head_dim null", L, fields(head_dim="null"), None),
    ("rope type default", M, rope(type="default"), None),
    ("rope_scaling type default", M, old(rope_scaling={"type": "default"}), None),
    ("rope_scaling default", L, old(rope_scaling={"rope_type": "default"}), None),
    ("rope_scaling with theta", L, old(rope_scaling={"rope_type": "default", "rope_theta": 77.0}), None),
    ("rope_scaling before rope_parameters", L, both(rope(rope_type="default"), fields(rope_scaling={"rope_theta": 77.0})), None),
    ("theta in both places", L, both(rope(rope_type="default"), fields(rope_theta=77.0)), None),
    ("rope linear", M, rope(rope_type="linear", **LINEAR), None),
    ("rope type linear", M, rope(type="linear", **LINEAR), None),
    ("rope_scaling linear", L, old(rope_scaling={"type": "linear", **LINEAR}), None),
    ("rope_scaling beside rope_parameters", L, both(rope(rope_type="default"), fields(rope_scaling={"type": "linear", **LINEAR})), None),
    ("rope dynamic", L, rope(rope_type="dynamic", **LINEAR), "rope_type is dynamic"),
    ("rope yarn", L, rope(**YARN), "rope_type is yarn"),
    ("rope llama3", L, rope(**LLAMA3), None),
    ("rope llama3 old form", L, old(rope_scaling=LLAMA3), None),
    ("rope llama3 mixtral", M, rope(**LLAMA3), None),
    ("rope llama3 without a number", L, rope(rope_type="llama3", factor=8.0), "has no number low_freq_factor"),
    ("partial_rotary_factor", L, fields(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("partial in rope_parameters", L, rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("window shorter than seq", dict(sliding_window=16), None, "sliding_window is 16"),
    ("window as long as seq", dict(sliding_window=64), None, None),
    ("window null", M, fields(sliding_window="null"), None),
    ("llama with window", L, fields(sliding_window=16), None),
    ("attention_bias", dict(llama=True, attention_bias=True), None, "attention_bias is true"),
    ("mlp_bias", dict(llama=True, mlp_bias=True), None, "mlp_bias is true"),
    ("clip_qkv", M, fields(clip_qkv=1.0), "clip_qkv is 1"),
    ("soft cap of attention", M, fields(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50"),
    ("soft cap of logits", M, fields(final_logit_softcapping=30.0), "final_logit_softcapping is 30"),
    ("not renormalised", M, fields(norm_topk_prob=False), "norm_topk_prob is false"),
    ("renormalised", M, fields(norm_topk_prob=True), None),
    ("quantized", M, fields(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config is an object"),
    ("dropout", dict(attention_dropout=0.3), None, None),
    ("jitter", dict(router_jitter_noise=0.3), None, None),
    ("logits of the router", dict(output_router_logits=True, router_aux_loss_coef=0.5), None, None),
    ("pretraining_tp", dict(llama=True, pretraining_tp=2), None, None),
    ("gpt2", M, fields(model_type="gpt2"), "model_type is gpt2; expected one of mixtral, llama, mistral, qwen2"),
    # tensors
    ("tied, another lm_head", M, HEAD, None),
    ("llama tied, another lm_head", L, HEAD, None),
    ("tied, the same lm_head", M,
     lambda folder: weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})), None),
    ("tied, lm_head alone", M,
     lambda folder: weights(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})), None),
    ("untied, lm_head alone", dict(untied=True), take("model.embed_tokens.weight"), "there is no model.embed_tokens.weight"),
    ("untied, no lm_head", dict(untied=True), take("lm_head.weight"), "there is no lm_head.weight"),
    ("biases of queries", M, put("model.layers.0.self_attn.q_proj.bias", 64), "self_attn.q_proj.bias is no tensor"),
    ("norms of keys", L, put("model.layers.1.self_attn.k_norm.weight", 16), "self_attn.k_norm.weight is no tensor"),
    ("a layer too many", M, fields(num_hidden_layers=2), "model.layers.2."),
    ("a classifier's head", L, put("score.weight", 2, 64), "score.weight is no tensor"),
    ("frequencies", L, put("model.layers.0.self_attn.rotary_emb.inv_freq", 8), None),
    ("a tensor is missing", L, take("model.norm.weight"), "there is no model.norm.weight"),
    ("no head", M, base_model, "AutoModelForCausalLM"),
    ("interleaved", L, fields(rope_interleaved=True), "rope_interleaved is true"),
    *OF_CLASSES,
    # files
    ("whole and old shards", M, old_shards, None),
    ("pytorch_model.bin", M, as_bin, "save_pretrained"),
    ("adapter", M, as_adapter, "merge_and_unload"),
    ("an added token", M, add_token, None),
]


def run(command, **more):
    return subprocess.run(command, capture_output=True, **more)


def their_loss(folder, ids):
    """The loss, and the class."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], f"{kind}: {sorted(info[kind])[:8]}"
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))), type(model).__name__


def our_loss(folder, ids):
    out = run(["dev/test/logits", folder], input=" ".join(map(str, ids)).encode())
    assert out.returncode == 0, out.stderr.decode()
    logits = torch.tensor(np.frombuffer(out.stdout, "<f4").reshape(len(ids), -1).astype("f8"))
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def bring_home(folder, home, data, steps=1, rate=0):
    """./train_moe --init: one step with a learning rate of 0, whose checkpoint has the same weights; or some that change them."""
    return run(["./train_moe", "--init", folder, "--data", data, "--out", home, "--steps", str(steps), "--lr", str(rate), "--warmup", "0",
                "--batch", "1", "--seq", "64", "--eval-tokens", "64", "--tokens", "4"])


def check_foreign(folder, data, ids, refusal):
    """Returns what is wrong, or a line about what was found."""
    home = folder + "-home"
    out = bring_home(folder, home, data)
    said = out.stderr.decode()
    if refusal:
        good = out.returncode == 1 and refusal in said
        return good, f"refused: {said.strip()}" if good else f"should be refused with '{refusal}': {out.returncode} {said}"
    if out.returncode:
        return False, f"should load: {said}"
    try:
        theirs, name = their_loss(folder, ids)
        ours, again = our_loss(folder, ids), our_loss(os.path.join(home, "latest"), ids)
        back, same = their_loss(os.path.join(home, "latest"), ids)
        out = bring_home(folder, home + "-on", data, 3, 0.001)
        if out.returncode:
            return False, f"should train: {out.stderr.decode()}"
        trained, trained_theirs = our_loss(os.path.join(home + "-on", "latest"), ids), their_loss(os.path.join(home + "-on", "latest"), ids)
    except Exception as error:  # transformers refuses it
        return False, f"{type(error).__name__}: {str(error)[:300]}"
    errors = [ours - theirs, again - theirs, back - theirs, trained_theirs[0] - trained]
    good = max(map(abs, errors)) < 1e-5 and name == same == trained_theirs[1] and trained != ours
    if AutoTokenizer.from_pretrained(folder).get_vocab() != AutoTokenizer.from_pretrained(os.path.join(home, "latest")).get_vocab():
        return False, "the tokenizer that comes home has other tokens"
    return good, (f"loss {theirs:.6f}, ours {ours:.6f}, brought home {again:.6f}, there {back:.6f} ({same}), trained {trained:.6f}, "
                  f"there {trained_theirs[0]:.6f} ({trained_theirs[1]})  {said.strip()}")


def change_ours(kind, model):
    """What other tools do to a checkpoint of ours, by transformers."""
    config = model.config
    with torch.no_grad():
        if kind == "untied":
            config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1 * torch.randn_like(model.lm_head.weight))
        if kind == "pruned by a layer":
            model.model.layers = model.model.layers[:-1]
            config.num_hidden_layers -= 1
        if kind == "more experts":
            for layer in model.model.layers:
                experts, gate = layer.mlp.experts, layer.mlp.gate
                for part in ("gate_up_proj", "down_proj"):
                    old_ones = getattr(experts, part)
                    setattr(experts, part, torch.nn.Parameter(torch.cat([old_ones, old_ones[:1] * 1.1])))
                gate.weight = torch.nn.Parameter(torch.cat([gate.weight, gate.weight[:1] * 1.1]))
                experts.num_experts = gate.num_experts = experts.num_experts + 1
            config.num_local_experts += 1
        if kind == "more tokens":
            model.resize_token_embeddings(config.vocab_size + 8)
    return model.to(torch.bfloat16) if kind == "bfloat16" else model


def check_there_and_back(scratch, data, ids):
    """Our run, opened and saved by transformers in many ways, and brought home."""
    for recipe in ("mixtral", "dense"):
        out = os.path.join(scratch, "our-" + recipe)
        experts = ["--experts", "4"] if recipe == "mixtral" else []
        made = run(["./train_moe", "--recipe", recipe, "--data", data, "--out", out, "--layers", "3", "--dim", "64", "--heads", "4",
                    "--kv-heads", "2", *experts, "--ffn", "48", "--seq", "64", "--batch", "1", "--steps", "20", "--warmup", "2",
                    "--eval-tokens", "64", "--tokens", "4"])
        assert made.returncode == 0, made.stderr.decode()
        kinds = ["whole", "shards", "bfloat16", "untied", "pruned by a layer", "more tokens"]
        for kind in kinds + (["fused", "more experts"] if recipe == "mixtral" else []):
            folder = os.path.join(scratch, f"our-{recipe}-{kind}".replace(" ", "-"))
            model = change_ours(kind, AutoModelForCausalLM.from_pretrained(os.path.join(out, "latest"), dtype=torch.float32))
            how = {"max_shard_size": "60KB"} if kind == "shards" else {}
            if kind == "fused":
                how["save_original_format"] = False
            model.save_pretrained(folder, **how)
            AutoTokenizer.from_pretrained(os.path.join(out, "latest")).save_pretrained(folder)
            with open(os.path.join(folder, "config.json")) as file:
                assert "train_moe" in json.load(file)
            yield f"our {recipe}, {kind}", folder


def check_padding(folder):
    """Batches of texts of different lengths, as pipelines make them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["Once upon a time", "The boat"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[0] == 2 and tokenizer.pad_token == END
    generator = transformers.pipeline("text-generation", model=folder, tokenizer=folder)
    told = generator(["Once upon a time", "The boat"], max_new_tokens=4, batch_size=2, do_sample=False)
    assert len(told) == 2


def foreign(args):
    if int(transformers.__version__.split(".")[0]) < 5:
        print(f"check_hf.py: not run: --foreign needs transformers 5, this is {transformers.__version__}")
        return
    transformers.logging.set_verbosity_error()
    scratch, failed, count = tempfile.mkdtemp(prefix="check_hf-"), 0, 0
    only = os.environ.get("ONLY", "")
    try:
        # The data: STORY again and again, in the tokens of make_tokenizer().
        first = os.path.join(scratch, "first")
        make(first, args)
        for name in ("train.txt", "valid.txt"):
            with open(os.path.join(scratch, name), "w") as file:
                file.write(END.join([STORY] * 40))
        data = os.path.join(scratch, "data")
        out = run(["data/tokenize", "--tokenizer", os.path.join(first, "tokenizer.json"), os.path.join(scratch, "train.txt"),
                   os.path.join(scratch, "valid.txt"), "--out", data])
        assert out.returncode == 0, out.stderr.decode()
        ids = AutoTokenizer.from_pretrained(first)(STORY)["input_ids"][:64]

        def report(name, good, line):
            nonlocal failed, count
            count += 1
            failed += not good
            print("ok    " if good else "FAILED", f"{name}: {line}", flush=True)

        for name, how, change, refusal in FOREIGN:
            if only not in name:
                continue
            folder = os.path.join(scratch, name.replace(" ", "-").replace(",", ""))
            made = argparse.Namespace(**vars(args))
            more = {}
            for key, value in how.items():
                if hasattr(made, key):
                    setattr(made, key, value)
                else:
                    more[key] = value
            make(folder, made, **more)
            if change:
                change(folder)
            report(name, *check_foreign(folder, data, ids, refusal))
            shutil.rmtree(folder)
        for name, folder in check_there_and_back(scratch, data, ids) if only in "our" else ():
            report(name, *check_foreign(folder, data, ids, None))
        if only in "our":
            check_padding(os.path.join(scratch, "our-mixtral", "latest"))
            report("padding", True, "a batch of two texts, and a pipeline of them")
            home = bring_home(os.path.join(scratch, "our-mixtral"), os.path.join(scratch, "of-run"), data)
            report("a run directory", home.returncode == 0, home.stderr.decode().strip())
            hub = bring_home("someone/some-model", os.path.join(scratch, "of-hub"), data)
            report("a hub's name", hub.returncode == 1 and b"hf download" in hub.stderr, hub.stderr.decode().strip())
    finally:
        shutil.rmtree(scratch)
    print(f"{count} directories, {failed} failed; transformers {transformers.__version__}, torch {torch.__version__}")
    sys.exit(failed != 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--logits", metavar="PROGRAM")
    parser.add_argument("--tokenize", metavar="PROGRAM")
    parser.add_argument("--make", metavar="DIR")
    parser.add_argument("--kind", choices=list(KINDS))
    for option in ("llama", "untied", "bfloat16", "float16", "sharded", "fused", "foreign"):
        parser.add_argument("--" + option, action="store_true")
    args = parser.parse_args()
    if not args.folder and not args.make and not args.foreign:
        parser.error("a checkpoint directory, --make DIR, or --foreign")
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
    if args.make:
        make(args.make, args)
    if args.foreign:
        foreign(args)
    if args.folder:
        if not os.path.isfile(os.path.join(args.folder, "config.json")):
            sys.exit(f"{args.folder}: holds no config.json")
        check(args.folder, args.logits, args.tokenize)


if __name__ == "__main__":
    main()
