#!/usr/bin/env python3
"""The yardstick of learning: a small GPT in PyTorch, dense or with experts, trained on a CPU for so many minutes.

    pip install torch                       (the newest)
    python dev/bench/torch_train.py --data data/tinystories --out runs/torch --minutes 10 --threads 2
    python dev/bench/torch_train.py ... --experts 8 --topk 2 --ffn 128     a mixture; without --experts the model is dense
    python dev/bench/torch_train.py ... --compile                          under torch.compile

The model has the shapes of ours: RMSNorm, rotary positions, SwiGLU, embedding and output tied; the training has AdamW
(ours has Muon for the matrices), the same shape of the schedule and the same data, files of data/tokenize. It is written as a careful user of
PyTorch would, who wants it fast on a CPU: one product for queries, keys and values, PyTorch's own attention, AdamW fused,
the batch on disk mapped, nothing read back but one number in fifty steps.

Time is that of the training steps alone: neither start, compiling nor validation counts. The learning rate follows that
time, so the run takes exactly --minutes whatever the machine does meanwhile (--steps N: so many steps instead, for sweeps on
a busy machine). At the end all validation tokens are read, in the windows that train_moe reads. --out gets a log.jsonl in
the manner of train_moe's.
"""
import argparse
import json
import math
import os
import re
import sys
import time

os.environ.pop("OMP_WAIT_POLICY", None)  # make sets it for our own programs; PyTorch shall wait as it does by itself
try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    sys.exit(f"PyTorch is not installed for {sys.executable}: pip install torch, or name another python by PYTHON=...")

ROLES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval")}


# ---- the data

def read_tokens(folder, role):
    """The token files of a role, in the order of their names, each as a tensor that is mapped from its file."""
    files = []
    for name in sorted(os.listdir(folder)):
        words = re.findall(r"[A-Za-z]+", name[:-4])
        if not name.endswith(".bin") or not any(w.lower() in ROLES[role] for w in words):
            continue
        path = os.path.join(folder, name)
        magic, version, count = torch.from_file(path, size=3, dtype=torch.int32).tolist()
        if (magic, version) != (20240520, 1):
            sys.exit(f"{path}: this is no token file of data/tokenize")
        files.append(torch.from_file(path, size=512 + count, dtype=torch.uint16)[512:])
    if not files:
        sys.exit(f"{folder}: no token files for {role} there; make them with data/tokenize")
    return files


class Windows:
    """All windows of T tokens, and the token behind each, of some files."""

    def __init__(self, files, T):
        self.files, self.T = files, T
        self.starts = [(f, w * T) for f, tokens in enumerate(files) for w in range((len(tokens) - 1) // T)]
        self.order = []

    def cut(self, windows):
        rows = [self.files[f][at:at + self.T + 1] for f, at in windows]
        rows = torch.stack(rows).to(torch.long)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, size):  # each window once in an epoch, in another order each time, cut at another place
        if len(self.order) < size:
            move = int(torch.randint(self.T, ()))
            all_windows = [(f, at + move) for f, at in self.starts if at + move + self.T < len(self.files[f])]
            self.order = [all_windows[i] for i in torch.randperm(len(all_windows)).tolist()]
        chosen, self.order = self.order[:size], self.order[size:]
        return self.cut(chosen)


def token_bytes(folder):
    """How many bytes of text each token stands for; <|endoftext|> stands for none."""
    with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
        tokenizer = json.load(file)
    added = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    vocab = {**tokenizer["model"]["vocab"], **added}
    size = torch.zeros(max(vocab.values()) + 1)
    for text, token in vocab.items():  # of a byte-level tokenizer a token has a letter for each byte
        size[token] = len(text.encode()) if text in added else len(text)
    size[added["<|endoftext|>"]] = 0
    return size


# ---- the model

def matrix(rows, columns, deviation=0.02):
    return nn.Parameter(deviation * torch.randn(rows, columns))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = matrix(3 * c.dim, c.dim)
        self.proj = matrix(c.dim, c.dim, c.residual)

    def forward(self, x, cos, sin):  # x (B,T,C); cos, sin (T,D/2)
        B, T, C = x.shape
        q, k, v = F.linear(x, self.qkv).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        qk = torch.stack((q, k))
        low, high = qk.chunk(2, -1)
        q, k = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(B, T, C), self.proj)


class Dense(nn.Module):
    def __init__(self, c, width):
        super().__init__()
        self.w_in = matrix(2 * width, c.dim)
        self.w_out = matrix(c.dim, width, c.residual)

    def forward(self, x):
        gate, up = F.linear(x, self.w_in).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w_out), 0.0


class Mixture(nn.Module):
    """Top-k of E experts, weights renormalised, Switch's balance loss. --by says how the rows find their experts."""

    def __init__(self, c):
        super().__init__()
        self.E, self.K, self.by = c.experts, c.topk, c.by
        self.router = matrix(c.experts, c.dim)
        self.w_in = nn.ParameterList(matrix(2 * c.ffn, c.dim) for _ in range(c.experts))
        self.w_out = nn.ParameterList(matrix(c.dim, c.ffn, c.residual) for _ in range(c.experts))

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)
        p = F.linear(x, self.router).softmax(-1)
        weight, chosen = p.topk(self.K, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        load = F.one_hot(chosen.flatten(), self.E).float().mean(0)
        y = self.all(x, weight, chosen) if self.by == "all" else self.sorted(x, weight, chosen)
        return y.view(shape), self.E * (load * p.mean(0)).sum()

    def sorted(self, x, weight, chosen):
        """The rows are sorted by expert, so that each expert has its rows in one piece."""
        order = chosen.flatten().argsort(stable=True)
        token = order // self.K
        rows = x.index_select(0, token).split(torch.bincount(chosen.flatten(), minlength=self.E).tolist())
        out = []
        for r, w_in, w_out in zip(rows, self.w_in, self.w_out):
            gate, up = F.linear(r, w_in).chunk(2, -1)
            out.append(F.linear(F.silu(gate) * up, w_out))
        out = torch.cat(out) * weight.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, token, out)

    def all(self, x, weight, chosen):
        """Every expert reads every row, and most weights are 0: more work in fewer, larger products."""
        N, E = x.shape[0], self.E
        full = torch.zeros(N, E).scatter(1, chosen, weight)
        gate, up = F.linear(x, torch.cat(list(self.w_in))).view(N, E, -1).chunk(2, -1)
        hidden = F.silu(gate) * up * full[:, :, None]
        return F.linear(hidden.flatten(1), torch.cat(list(self.w_out), 1))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, 1e-5), nn.RMSNorm(c.dim, 1e-5)
        self.attention = Attention(c)
        self.ffn = Mixture(c) if c.experts else Dense(c, c.topk * c.ffn)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y, aux = self.ffn(self.norm2(x))
        return x + y, aux


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.dim // c.heads
        angle = torch.arange(c.seq)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.embed = matrix(c.vocab, c.dim)  # the output, too
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, 1e-5)

    def forward(self, tokens, targets):  # the mean loss of a token, and the balance losses' sum
        x, aux = F.embedding(tokens, self.embed), 0.0
        for layer in self.layers:
            x, a = layer(x, self.cos, self.sin)
            aux = aux + a
        logits = F.linear(self.norm(x), self.embed)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), aux


# ---- the training

def rate(c, step, done):
    """The learning rate: up over the warm-up's steps, then down to --min-lr as the time goes by (done: 0 to 1)."""
    if step <= c.warmup:
        return c.lr * step / c.warmup
    fall = 1 - done if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return c.min_lr + (c.lr - c.min_lr) * fall


def validate(forward, c, val, size):
    """Nats and bytes of all validation windows, and their number of tokens."""
    nats = text = 0.0
    with torch.no_grad():
        for i in range(0, len(val.starts), c.batch):
            inputs, targets = val.cut(val.starts[i:i + c.batch])
            nats += forward(inputs, targets)[0].item() * targets.numel()
            text += size[targets].sum().item()
    return nats, text, len(val.starts) * c.seq


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    numbers = dict(layers=4, dim=64, heads=4, ffn=128, experts=0, topk=2, seq=128, batch=8, warmup=100, threads=0, seed=1,
                   steps=0)
    for name, value in numbers.items():
        parser.add_argument("--" + name, type=int, default=value)
    for name, value in dict(minutes=10, lr=8e-3, min_lr=-1, weight_decay=0.1, beta1=0.9, beta2=0.99, clip=1,
                            aux_weight=0.01).items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value)
    parser.add_argument("--by", choices=["sorted", "all"], default="sorted", help="how rows find their experts")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, by autocast")
    c = parser.parse_args()
    c.min_lr = c.lr / 10 if c.min_lr < 0 else c.min_lr
    c.residual = 0.02 / (2 * c.layers) ** 0.5
    return c


def main():
    c = options()
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    size = token_bytes(c.data)
    c.vocab = len(size)
    train, val = Windows(read_tokens(c.data, "train"), c.seq), Windows(read_tokens(c.data, "val"), c.seq)
    model = Model(c)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": c.weight_decay},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=c.lr, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)
    forward = torch.compile(model, dynamic=False) if c.compile else model

    def step(number, done):
        inputs, targets = train.batch(c.batch)
        for group in optimizer.param_groups:
            group["lr"] = rate(c, number, done)
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            loss, aux = forward(inputs, targets)
        (loss + c.aux_weight * aux).backward()
        nn.utils.clip_grad_norm_(parameters, c.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    # What compiles, and what wakes threads, happens before: three steps that are undone.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        step(1, 0)
    model.load_state_dict(before)
    optimizer.state.clear()

    os.makedirs(c.out, exist_ok=True)
    count = sum(p.numel() for p in parameters)
    idle = sum(p.numel() for name, p in model.named_parameters() if ".ffn.w_" in name) if c.experts else 0
    active = count - idle * (c.experts - c.topk) // max(c.experts, 1)
    name = f"PyTorch {torch.__version__}{', compiled' if c.compile else ''}{', bfloat16' if c.bf16 else ''}"
    with open(os.path.join(c.out, "log.jsonl"), "w") as log:
        def write(**values):
            print(json.dumps(values, separators=(",", ":")), file=log, flush=True)

        write(type="run", program=name, threads=torch.get_num_threads(), params=count, active_params=active,
              **{k: v for k, v in vars(c).items() if k != "threads"})
        number, logged, budget, start = 0, 0, 60 * c.minutes, time.perf_counter()
        passed = before_passed = done = 0.0
        best = math.inf  # the fastest step, by which batches are compared on a busy machine
        while done < 1:
            number += 1
            loss = step(number, done)
            now = time.perf_counter() - start
            best, passed = min(best, now - passed), now
            done = number / c.steps if c.steps else passed / budget
            if number % 50 == 0 or done >= 1:
                write(type="step", step=number, tokens=number * c.batch * c.seq, loss=round(loss.item(), 5),
                      ms=round(1000 * (passed - before_passed) / (number - logged), 4))
                logged, before_passed = number, passed
        nats, text, tokens = validate(model, c, val, size)
        bpb = nats / text / math.log(2)
        write(type="eval", step=number, val_loss=round(nats / tokens, 5), val_bpb=round(bpb, 5), val_tokens=tokens)
        write(type="end", step=number, minutes=c.minutes, took=round(passed / 60, 4), best_ms=round(1000 * best, 3))
    print(f"{name}: {number} steps, {number * c.batch * c.seq / passed:.0f} tokens/s, {count / 1e6:.2f} million weights, "
          f"{active / 1e6:.2f} at work, {bpb:.4f} bits per byte; fastest step {1000 * best:.2f} ms")


if __name__ == "__main__":
    main()
