#!/usr/bin/env python3
"""Golden values for dev/test/lstm.c: PyTorch's nn.LSTM in double precision, with and without a projection.

    pip install torch                      (any 2.x; the CPU is enough)
    python dev/test/lstm.py                writes dev/test/lstm_golden.h

Weights and inputs come from the hash of dev/test/golden.py, so no file is shared.
"""
import math
import os

import torch

from golden import hash32

SIZES = [dict(B=3, T=6, C=5, M=7, P=7), dict(B=2, T=9, C=4, M=11, P=6)]  # P unlike M: a projection


def numbers(tensor, shape):
    """Numbers of tensor number `tensor`, between -0.5 and 0.5."""
    u = [hash32(tensor * 1000003 + i) / 2**32 - 0.5 for i in range(math.prod(shape))]
    return torch.tensor(u, dtype=torch.float64).reshape(shape)


def run(B, T, C, M, P):
    """[(name, numbers)] of the output and of all gradients, for the objective sum(out * g)."""
    lstm = torch.nn.LSTM(C, M, batch_first=True, proj_size=0 if P == M else P, dtype=torch.float64)
    shapes = [("in", "weight_ih_l0", (4 * M, C)), ("state", "weight_hh_l0", (4 * M, P)), ("bias", "bias_ih_l0", (4 * M,))]
    if P != M:
        shapes.append(("proj", "weight_hr_l0", (P, M)))
    with torch.no_grad():
        lstm.bias_hh_l0.zero_()
        for i, (_, theirs, shape) in enumerate(shapes):
            getattr(lstm, theirs).copy_(2 * numbers(i, shape))
    x = (4 * numbers(10, (B, T, C))).requires_grad_()
    out, (h, c) = lstm(x)
    (out * numbers(11, (B, T, P))).sum().backward()
    return [("out", out), ("cell", c), ("dx", x.grad)] + [("d" + name, getattr(lstm, theirs).grad) for name, theirs, _ in shapes]


def main():
    lines = ["// Golden values of nn.LSTM, which dev/test/lstm.py computes (PyTorch, float64).", "#pragma once", "",
             "typedef struct {", "    const char *name;  // out (N,P), the cell after the last step (B,M), or a gradient",
             "    int size;", "    double norm;       // Frobenius norm", "    double sample[5];  // elements 0, size/4, size/2, 3*size/4 and size-1",
             "} LstmGoldenArray;", "", "typedef struct {", "    int B, T, C, M, P;", "    int count;", "    LstmGoldenArray list[8];",
             "} LstmGolden;", "", f"static const LstmGolden lstm_golden[{len(SIZES)}] = {{"]
    for size in SIZES:
        arrays = run(**size)
        lines += [f"    {{{', '.join(str(size[k]) for k in 'BTCMP')}, {len(arrays)}, {{"]
        for name, x in arrays:
            flat = x.detach().reshape(-1)
            n = flat.numel()
            sample = ", ".join(f"{flat[i].item():.17g}" for i in (0, n // 4, n // 2, 3 * n // 4, n - 1))
            lines.append(f'        {{"{name}", {n}, {flat.norm().item():.17g},\n         {{{sample}}}}},')
        lines.append("    }},")
    lines.append("};")
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lstm_golden.h")
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    print("wrote", path, "by PyTorch", torch.__version__)


if __name__ == "__main__":
    main()
