#!/usr/bin/env python3
"""Shows that an adapter of ours is one of Hugging Face's PEFT, beside bases of ours and of transformers.

    pip install torch transformers peft safetensors          (transformers 5, peft 0.21 or newer)
    make train_moe dev/test/logits && python dev/test/check_peft.py         ONLY=text picks some bases

For each base ./train_moe --lora trains pairs beside it. Then PEFT opens the adapter on the base, and transformers opens what
--merge makes of both. Their logits are ours, to 1e-4, and far from the base's own. make check_peft runs it.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import warnings

try:
    import numpy as np
    import peft
    import torch
    import transformers
except ImportError as error:
    print(f"check_peft.py: not run: {error}; pip install torch transformers peft safetensors")
    sys.exit(0)

TOKENS = [(37 * i + 11) % 1900 for i in range(48)]
SIZES = dict(vocab_size=1900, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False)
CLASSES = {
    "Mixtral": dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "Llama": dict(intermediate_size=96),
    "Olmoe": dict(intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    "Qwen3Moe": dict(intermediate_size=64, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, head_dim=12,
                     norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "Qwen2Moe": dict(intermediate_size=64, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3,
                     shared_expert_intermediate_size=40, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[]),
    "GraniteMoe": dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **(factors := dict(
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=2.0))),
    "GraniteMoeShared": dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40, **factors),
    "Qwen3": dict(intermediate_size=96, head_dim=12),
}


def run(*command, **more):
    return subprocess.run([str(word) for word in command], capture_output=True, **more)


def make_base(name, folder):
    """A random model of a class of transformers, or, of ours, one that ./train_moe has trained a little."""
    if name.startswith("ours"):
        dense = ["--recipe", "dense"] if name.endswith("dense") else ["--experts", 4]
        done = run("./train_moe", "--out", folder, "--layers", 2, "--dim", 32, "--heads", 4, "--kv-heads", 2, *dense, "--ffn", 32,
                   "--seq", 48, "--steps", 20, "--warmup", 2, "--eval-tokens", 48, "--tokens", 1, "--data", "data/stories")
        assert done.returncode == 0, done.stdout + done.stderr
        return os.path.realpath(folder + "/latest")
    torch.manual_seed(1)
    config = getattr(transformers, name + "Config")(**SIZES, **CLASSES[name])
    model = getattr(transformers, name + "ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + (weight.dim() == 1))
    model.save_pretrained(folder)
    return folder


def our_logits(folder):
    done = run("dev/test/logits", folder, input=" ".join(map(str, TOKENS)).encode())
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, dtype=np.float32).reshape(len(TOKENS), -1)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].float().numpy()


def open_whole(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def check(name, work):
    base, out, merged = make_base(name, work + "/base"), work + "/run", work + "/merged"
    experts = not (name.endswith("dense") or name in ("Llama", "Qwen3"))
    targets = "attention,experts" + (",router" if experts else "")
    done = run("./train_moe", "--init", base, "--out", out, "--lora", 3, "--lora-alpha", 6, "--lora-targets", targets,
               "--steps", 12, "--warmup", 2, "--lr", 0.02, "--seq", 48, "--eval-tokens", 48, "--tokens", 1, "--data", "data/stories")
    if done.returncode and b"model_type" in done.stderr:
        return f"{name}: ./train_moe does not read this class: " + done.stderr.decode().strip()[-160:]
    assert done.returncode == 0, done.stdout + done.stderr
    ours, alone = our_logits(out + "/latest"), our_logits(base)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(open_whole(base), out + "/latest")
    complaints = [str(w.message) for w in seen if "adapter" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    assert not complaints, complaints
    theirs = logits_of(model)
    done = run("./train_moe", "--out", out, "--merge", merged)
    assert done.returncode == 0, done.stderr
    whole = open_whole(merged)
    wanted = type(open_whole(base)).__name__
    assert type(whole).__name__ == wanted, f"{type(whole).__name__}, not {wanted}"
    apart = [np.abs(x - ours).max() for x in (theirs, logits_of(whole), alone)]
    assert apart[0] < 1e-4 and apart[1] < 1e-4 and apart[2] > 1e-2, f"{name}: PEFT, merged, the base alone: {apart}"
    return f"{name}: PEFT's logits are ours to {apart[0]:.1e}, the merged model's to {apart[1]:.1e}; the base's are {apart[2]:.1e} apart"


def main():
    names = ["ours", "ours, dense", *CLASSES]
    print(f"peft {peft.__version__}, transformers {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names:
        if os.environ.get("ONLY", "") not in name:
            continue
        work = tempfile.mkdtemp(prefix="check_peft-")
        try:
            print(check(name, work))
        finally:
            shutil.rmtree(work)


main()
