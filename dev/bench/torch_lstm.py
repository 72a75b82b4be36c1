#!/usr/bin/env python3
"""The yardstick of the LSTM: forward and backward of PyTorch's nn.LSTM on the CPU, in float32.

    pip install torch                       (the newest)
    python dev/bench/torch_lstm.py --dim 512 --cell 512 --seq 256 --batch 8 --threads 2
    python dev/bench/torch_lstm.py ... --turns    once for each line that it reads, which it answers: dev/bench/bench uses it

--cell unlike --dim: with a projection (proj_size). Sequences come first or second in the input, whichever is faster here. The
gradients are those of all weights and of the input. Prints one line.
"""
import argparse
import os
import statistics
import sys
import time

os.environ.pop("OMP_WAIT_POLICY", None)  # make sets it for our own programs; PyTorch shall wait as it does by itself
try:
    import torch
except ImportError:
    print("PyTorch: not installed for", sys.executable, "(TORCH_PYTHON names another python)")
    sys.exit(0)


class Layer:
    def __init__(self, c, batch_first):
        self.lstm = torch.nn.LSTM(c.dim, c.cell, batch_first=batch_first, proj_size=0 if c.cell == c.dim else c.dim)
        shape = (c.batch, c.seq, c.dim) if batch_first else (c.seq, c.batch, c.dim)
        self.x, self.g = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def seconds(self):
        start = time.perf_counter()
        out, _ = self.lstm(self.x)
        out.backward(self.g)
        taken = time.perf_counter() - start
        self.lstm.zero_grad()
        self.x.grad = None
        return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(dim=128, cell=128, seq=256, batch=8, threads=0, steps=12).items():
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--turns", action="store_true")
    c = parser.parse_args()
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(1)
    both = [Layer(c, False), Layer(c, True)]
    for layer in both:
        layer.seconds()  # warms up
    layer = min(both, key=lambda each: min(each.seconds() for _ in range(3)))
    M, C, N = c.cell, c.dim, c.batch * c.seq
    flops = 6 * N * (8 * M * C + (M * C if M != C else 0))  # dev/bench/lstm.h counts the same
    name = f"PyTorch {torch.__version__}, nn.LSTM, {torch.get_num_threads()} threads"
    if c.turns:
        print("ready:", name, flush=True)
        for _ in sys.stdin:
            print(flops / layer.seconds() / 1e9, flush=True)
        return
    step = statistics.median(layer.seconds() for _ in range(c.steps))
    print(f"{name}: {step * 1e3:.2f} ms  {N / step:.0f} tokens/s  {flops / step / 1e9:.1f} GFLOP/s  (median of {c.steps})")


if __name__ == "__main__":
    main()
