#!/usr/bin/env python3
"""Trains each recipe for a few steps and opens its checkpoint in Python, as anybody would who has no class for it.

    pip install numpy safetensors
    python dev/test/check_recipes.py [RECIPE...]             (./train_moe has to be built; all recipes where none is named)

For each: model.safetensors and optimizer.safetensors load, all numbers are finite, the weights are as many as the log
says, and config.json names a class or says that there is none, and gives every option that makes the model.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

TINY = ("--layers 4 --dim 32 --ffn 16 --seq 32 --batch 2 --steps 3 --warmup 2 --eval-tokens 64 "
        "--tokens 1").split()
OF_A_CALL = {"out", "init", "tokenizer", "resume", "list-recipes", "threads", "prompt", "tokens", "temperature",
             "top-k", "top-p", "help"}  # options that belong to one call and to no checkpoint
BUFFERS = ("e_score_correction_bias", "moving_average", "gate.level", "table")  # saved, but not trained


def options():
    text = subprocess.run(["./train_moe", "--help"], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)) - OF_A_CALL


def recipes():
    text = subprocess.run(["./train_moe", "--list-recipes"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^([a-z0-9-]+) \(", text, re.MULTILINE)


def check(recipe, wanted):
    with tempfile.TemporaryDirectory() as folder:
        run = os.path.join(folder, "run")
        heads = [] if recipe == "shazeer-lstm" else ["--heads", "2"]  # an LSTM has none
        subprocess.run(["./train_moe", "--recipe", recipe, "--out", run, *TINY, *heads], check=True, capture_output=True)
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as log:
            params = json.loads(log.readline())["params"]
        weights = load_file(os.path.join(run, "latest", "model.safetensors"))
        moments = load_file(os.path.join(run, "latest", "optimizer.safetensors"))
        with open(os.path.join(run, "latest", "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    for name, array in {**weights, **moments}.items():
        assert np.isfinite(array).all(), f"{recipe}: {name} is not finite"
    buffers = [name for name in weights if name.endswith(BUFFERS)]
    count = sum(array.size for name, array in weights.items() if name not in buffers)
    assert count == params, f"{recipe}: {count} weights, {params} in the log"
    missing = wanted - set(config["train_moe"])
    assert not missing, f"{recipe}: config.json does not give {missing}"
    name = config["architectures"][0]
    assert (name == "TrainMoeForCausalLM") == ("comment" in config), f"{recipe}: {name}"
    kinds = " ".join(sorted({buffer.split(".")[-1] for buffer in buffers}))
    print(f"{recipe:14} {name:20} {len(weights):4} tensors {count:8} weights  {kinds}")


if __name__ == "__main__":
    names = options()
    for one in sys.argv[1:] or recipes():
        check(one, names)
