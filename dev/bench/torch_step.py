#!/usr/bin/env python3
"""The yardstick of speed: a training step of the same model in eager PyTorch on the CPU, in float32 or bfloat16.

    pip install torch                       (the newest)
    python dev/bench/torch_step.py --layers 4 --dim 256 --heads 8 --experts 8 --topk 2 --ffn 512 --seq 256 --batch 16
    python dev/bench/torch_step.py ... --dense    no experts, but an FFN of the width that a token sees, topk*ffn
    python dev/bench/torch_step.py ... --compile  under torch.compile: for information
    python dev/bench/torch_step.py ... --bf16     under autocast: products in bfloat16, weights and moments in float32
    python dev/bench/torch_step.py ... --turns    a step for each line that it reads, which it answers: dev/bench/bench uses it

Plain PyTorch as a careful user writes it, the experts in Mixtral's reference loop, everything else by PyTorch's own
functions. Of several ways to say the same it takes the one that costs a CPU less: index_select, whose backward adds whole
rows; a parameter per expert, since each slice of a common one would get a gradient of the whole one's size; chunk and
split, whose backward is one copy; AdamW fused. Loss and gradients are those of dev/test/golden.py's model. Prints one line.
"""
import argparse
import os
import statistics
import sys
import time

os.environ.pop("OMP_WAIT_POLICY", None)  # make sets it for our own programs; PyTorch shall wait as it does by itself
try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    print("PyTorch: not installed for", sys.executable, "(TORCH_PYTHON names another python)")
    sys.exit(0)

EPS, THETA, AUX_WEIGHT, CLIP = 1e-5, 10000.0, 0.01, 1.0


def matrix(rows, columns, std=0.02):
    return nn.Parameter(std * torch.randn(rows, columns))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = matrix(3 * c.dim, c.dim)
        self.proj = matrix(c.dim, c.dim, c.out_std)

    def forward(self, x, cos, sin):  # x (B,T,C); cos, sin (T,D/2)
        B, T, C = x.shape
        qk, v = F.linear(x, self.qkv).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).split([2, 1])
        a, b = qk.chunk(2, -1)  # element j of a head turns together with element j + D/2
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).unbind()  # (B,H,T,D)
        out = F.scaled_dot_product_attention(q, k, v[0], is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(B, T, C), self.proj)


class FeedForward(nn.Module):
    def __init__(self, c, width):
        super().__init__()
        self.w_in = matrix(2 * width, c.dim)  # gate, then up
        self.w_out = matrix(c.dim, width, c.out_std)

    def forward(self, x):
        gate, up = F.linear(x, self.w_in).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w_out)


class Mixture(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.topk = c.topk
        self.router = matrix(c.experts, c.dim)
        self.experts = nn.ModuleList(FeedForward(c, c.ffn) for _ in range(c.experts))

    def forward(self, x):  # x (N,C) -> (N,C) and the balance loss of Switch, 1 at balance
        E = len(self.experts)
        p = F.linear(x, self.router).softmax(-1)
        weight, chosen = p.topk(self.topk, -1)  # (N,K)
        weight = weight / weight.sum(-1, keepdim=True)
        load = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(chosen == e)
            answer = expert(x.index_select(0, token)) * weight[token, k, None]
            y.index_add_(0, token, answer.to(y.dtype))  # under autocast it is in bfloat16
        return y, E * (load * p.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, EPS), nn.RMSNorm(c.dim, EPS)
        self.attention = Attention(c)
        self.ffn = FeedForward(c, c.topk * c.ffn) if c.dense else Mixture(c)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        h = self.norm2(x)
        if isinstance(self.ffn, FeedForward):
            return x + self.ffn(h), 0.0
        y, aux = self.ffn(h.flatten(0, 1))
        return x + y.view_as(x), aux


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.dim // c.heads
        angle = torch.arange(c.seq)[:, None] * THETA ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.embed = matrix(c.vocab, c.dim)  # the head, too
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, EPS)

    def forward(self, tokens, targets):
        x, aux = F.embedding(tokens, self.embed), 0.0
        for layer in self.layers:
            x, a = layer(x, self.cos, self.sin)
            aux = aux + a
        logits = F.linear(self.norm(x), self.embed)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + AUX_WEIGHT * aux


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(layers=2, dim=128, heads=8, ffn=256, experts=8, topk=2, seq=256, batch=2, vocab=4096,
                            threads=0, steps=12).items():
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--turns", action="store_true")
    c = parser.parse_args()
    c.out_std = 0.02 / (2 * c.layers) ** 0.5
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(1)
    model = Model(c)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if c.compile else model

    def seconds():  # of a step
        tokens, targets = torch.randint(c.vocab, (2, c.batch, c.seq))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            loss = forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - start

    experts = [p for layer in model.layers if not c.dense for p in layer.ffn.experts.parameters()]
    idle = sum(p.numel() for p in experts) * (c.experts - c.topk) / c.experts
    active = sum(p.numel() for p in parameters) - idle
    flops = 6 * active + 6 * c.layers * c.seq * c.dim  # per token; dev/bench/bench counts the same
    N = c.batch * c.seq
    name = (f"PyTorch {torch.__version__}{', compiled' if c.compile else ''}{', bfloat16' if c.bf16 else ''}, "
            f"{'dense' if c.dense else 'mixtral'}, {torch.get_num_threads()} threads")
    seconds(), seconds()  # warms up
    if c.turns:
        print("ready:", name, flush=True)
        for _ in sys.stdin:
            print(N * flops / seconds() / 1e9, flush=True)
        return
    step = statistics.median(seconds() for _ in range(c.steps))
    print(f"{name}: step {step * 1e3:.1f} ms  {N / step:.0f} tokens/s  "
          f"{N * flops / step / 1e9:.1f} GFLOP/s  (median of {c.steps})")


if __name__ == "__main__":
    main()
