#!/usr/bin/env python3
"""The GPU's yardstick of speed: a training step of the same model in PyTorch, compiled, with its grouped product.

    pip install torch                       (2.8 or newer has the grouped product)
    python dev/bench/torch_step_cu.py --layers 12 --dim 1024 --heads 16 --experts 8 --topk 2 --ffn 2048 --seq 1024 --batch 16
    python dev/bench/torch_step_cu.py ... --eager not compiled
    python dev/bench/torch_step_cu.py ... --cpu   on the processor: to see that it is right
    python dev/bench/torch_step_cu.py ... --turns steps for each line that it reads, answered with milliseconds and loss: dev/bench/bench_cu

As a careful user writes it, and as ours does: weights, moments, gradients, the residual stream, the router and the losses
are float32 (the router may use TF32), and what the tensor cores multiply is bfloat16, for which weights are rounded at
use, as autocast would. Attention is PyTorch's own (flash), experts' rows are sorted by expert, all sizes stay on the
device, and AdamW is fused. A step is forward, backward, clipping and update. Prints one line.
"""
import argparse
import statistics
import sys
import time

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    print("PyTorch: not installed for", sys.executable, "(TORCH_PYTHON names another python)")
    sys.exit(0)

EPS, THETA, AUX_WEIGHT, CLIP = 1e-5, 10000.0, 0.01, 1.0
LOW = torch.bfloat16
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def weight(*shape, std=0.02):
    return nn.Parameter(std * torch.randn(*shape))


def product(x, w):  # x (...,K), w (M,K)
    return F.linear(x.to(LOW), w.to(LOW))


def grouped(x, w, ends):  # x (rows,K) sorted by expert, w (E,M,K), ends (E): where each expert's rows end
    if grouped_mm:
        return grouped_mm(x, w.to(LOW).transpose(-2, -1), offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()  # the host waits
    return torch.cat([F.linear(rows, m) for rows, m in zip(x.split(sizes), w.to(LOW))])


class Permute(torch.autograd.Function):
    """x[order], whose gradient is dout[inverse]: plain indexing would add row by row, since it does not know."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse, order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dout):
        inverse, order = ctx.saved_tensors
        return dout.index_select(0, inverse), None, None


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = weight(3 * c.dim, c.dim)
        self.proj = weight(c.dim, c.dim, std=c.out_std)

    def forward(self, x, cos, sin):  # x (B,T,C); cos, sin (T,D/2)
        B, T, C = x.shape
        q, k, v = product(x, self.qkv).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()

        def turn(x):  # element j of a head turns together with element j + D/2
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(LOW)

        out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        return product(out.transpose(1, 2).reshape(B, T, C), self.proj)


class Mixture(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.experts, self.topk = c.experts, c.topk
        self.router = weight(c.experts, c.dim)
        self.w_in = weight(c.experts, 2 * c.ffn, c.dim)  # gate, then up
        self.w_out = weight(c.experts, c.dim, c.ffn, std=c.out_std)

    def forward(self, x):  # x (N,C) float32 -> (N,C) and the balance loss of Switch, 1 at balance
        E, K, (N, C) = self.experts, self.topk, x.shape
        p = F.linear(x, self.router).softmax(-1)
        score, chosen = p.topk(K, -1)  # (N,K)
        score = score / score.sum(-1, keepdim=True)
        by_expert, order = chosen.flatten().to(torch.int16).sort(stable=True)  # narrow numbers are sorted faster
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=x.device))
        ends = torch.searchsorted(by_expert, torch.arange(E, dtype=torch.int16, device=x.device), right=True, out_int32=True)
        rows = Permute.apply(x.to(LOW)[:, None].expand(N, K, C).reshape(N * K, C), order, inverse)
        gate, up = grouped(rows, self.w_in, ends).chunk(2, -1)
        rows = grouped(F.silu(gate) * up, self.w_out, ends)
        y = (Permute.apply(rows, inverse, order).view(N, K, C).float() * score[..., None]).sum(1)
        load = torch.diff(ends, prepend=ends.new_zeros(1)) / (N * K)
        return y, E * (load * p.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, EPS), nn.RMSNorm(c.dim, EPS)
        self.attention, self.ffn = Attention(c), Mixture(c)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y, aux = self.ffn(self.norm2(x).flatten(0, 1))
        return x + y.view_as(x), aux


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.dim // c.heads
        angle = torch.arange(c.seq)[:, None] * THETA ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.embed = weight(c.vocab, c.dim)  # the head, too
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, EPS)

    def forward(self, tokens, targets):
        x, aux = F.embedding(tokens, self.embed), 0.0
        for layer in self.layers:
            x, a = layer(x, self.cos, self.sin)
            aux = aux + a
        loss = F.cross_entropy(product(self.norm(x), self.embed).flatten(0, 1).float(), targets.flatten())
        return loss + AUX_WEIGHT * aux, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(layers=2, dim=128, heads=8, ffn=256, experts=8, topk=2, seq=256, batch=2, vocab=50304).items():
        parser.add_argument("--" + name, type=int, default=value)
    for name in ("eager", "cpu", "turns"):
        parser.add_argument("--" + name, action="store_true")
    c = parser.parse_args()
    c.out_std = 0.02 / (2 * c.layers) ** 0.5
    if not c.cpu and not torch.cuda.is_available():
        print("PyTorch", torch.__version__, "finds no GPU")
        return
    wait = (lambda: None) if c.cpu else torch.cuda.synchronize
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    with torch.device("cpu" if c.cpu else "cuda"):
        model = Model(c)
        tokens, targets = torch.randint(c.vocab, (2, c.batch, c.seq))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=1e-9, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = model if c.eager else torch.compile(model, dynamic=False)

    def step():  # its seconds and its loss
        wait()
        start = time.perf_counter()
        total, loss = forward(tokens, targets)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        wait()
        return time.perf_counter() - start, loss

    name = (f"{sum(p.numel() for p in parameters)} parameters; PyTorch {torch.__version__}, "
            f"{'eager' if forward is model else 'compiled'}{'' if grouped_mm else ', WITHOUT a grouped product'}")
    for _ in range(1 if c.cpu else 5):  # compiles and warms up
        step()

    def several():
        steps = [step() for _ in range(1 if c.cpu else 3)]
        return f"{statistics.median(s[0] for s in steps) * 1e3:.3f} {steps[-1][1]:.4f}"

    if c.turns:
        print("ready:", name, flush=True)
        for _ in sys.stdin:
            print(several(), flush=True)
    else:
        print("ms and loss:", several(), name)


if __name__ == "__main__":
    main()
