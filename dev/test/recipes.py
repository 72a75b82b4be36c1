#!/usr/bin/env python3
"""Golden values for dev/test/recipes.c: one MoE layer of every router recipe, computed by NumPy in double precision.

    pip install numpy                       (any version from 1.20 on; nothing else is needed)
    python dev/test/recipes.py                   writes dev/test/recipes.h (takes a second)

Written from the papers' formulas, token by token and expert by expert, and not from train_moe.c, so that an error
would have to be made twice. Inputs and weights come from a hash, so no file is shared either.

A case is a recipe and the options that differ from its row. It is computed in training mode (noise, declined seconds,
capacity) and in evaluation mode. Each case names what it is there to show (a dropped choice, a declined second, ...).
The script takes the first input x that shows it and that has no near-tie: every gap that decides a choice is at least
GAP, so that float32 decides alike.
"""
import argparse
import functools
import heapq
import math
import os
import types

import numpy as np

GAP = 1e-4
BASE = "--dim 16 --seq 6 --batch 2 --vocab 50 --seed 1 --step 1"
DEFAULTS = """--experts 8 --topk 2 --shared 0 --ffn 6 --activation swiglu --mixed 0 --score softmax --gate renormalized
    --scale 1 --select topk --group batch --balance switch --aux-weight 0.01 --load-weight 0 --device-weight 0
    --comm-weight 0 --z-weight 0 --sparsity-weight 0 --capacity-factor 0 --eval-capacity-factor 0
    --capacity-unit expert --drop-order choice --drop-exempt 0 --overflow drop --second-threshold 0 --jitter 0
    --noise 0 --routers 1 --groups 1 --group-topk 0 --group-score best --history-decay 0 --bias-rate 0
    --max-active 0 --threshold 0 --subtokens 1 --recurrent 0"""
RECIPES = {
    "mixtral": "",
    "jacobs": "--topk 8 --ffn 64 --gate probability --aux-weight 0",
    "shazeer": "--topk 4 --ffn 128 --noise 1 --balance cv2 --aux-weight 0.1 --load-weight 0.1 --activation relu",
    "hierarchical": "--experts 16 --topk 4 --ffn 128 --select hierarchical --groups 4 --group-topk 2 --noise 1 "
                    "--balance cv2 --aux-weight 0.1 --load-weight 0.1 --activation relu",
    "gshard": "--activation relu --group sequence --balance gshard --capacity-factor 1 --second-threshold 0.5 "
              "--moe-every 2",
    "switch": "--topk 1 --activation relu --gate probability --group sequence --capacity-factor 1.25 --jitter 0.01 "
              "--moe-every 2 --init-scheme truncated",
    "glam": "--activation relu --group sequence --balance gshard --capacity-factor 1 --moe-every 2 "
            "--dense-activation geglu",
    "deepseekmoe": "--experts 31 --topk 7 --shared 1 --ffn 64 --gate probability --groups 4 --device-weight 0.05 "
                   "--dense-first 1",
    "deepseek-v2": "--experts 32 --topk 6 --shared 2 --ffn 64 --gate probability --group sequence --groups 4 "
                   "--group-topk 2 --group-score best --aux-weight 0.003 --device-weight 0.05 --comm-weight 0.02 "
                   "--capacity-factor 1 --capacity-unit group --drop-order score --drop-exempt 0.1 --dense-first 1",
    "deepseek-v3": "--experts 32 --topk 7 --shared 1 --ffn 64 --score sigmoid --scale 2.5 --bias-rate 0.001 "
                   "--group sequence --balance unbiased --aux-weight 0.0001 --group-score top2 --dense-first 1",
    "cmoe": "--mixed 1 --balance width",
    "multirouter": "--routers 2 --topk 4 --ffn 128",
    "history": "--history-decay 0.99",
    "threshold": "--select threshold --gate probability --sparsity-weight 0.01",
    "variance": "--balance variance",
    "st-moe": "--layers 4 --activation geglu --second-threshold 0.2 --capacity-factor 0.625 --eval-capacity-factor 1 "
              "--balance gshard --z-weight 0.001 --moe-every 4",
    "olmoe": "--experts 64 --topk 8 --ffn 64 --gate probability --z-weight 0.001",
    "qwen3": "--experts 64 --topk 8 --ffn 64 --group step --aux-weight 0.008",
    "expert-choice": "--select expert-choice --gate probability --aux-weight 0",
    "hash": "--select hash --topk 1 --ffn 512 --gate probability --aux-weight 0",
    "base": "--select balanced --topk 1 --ffn 512 --score sigmoid --gate probability --aux-weight 0",
    "mh-moe": "--subtokens 4",
    "rmoe": "--recurrent 64",
}

# Recipe, options over its row (--ffn 6 is added to all), what the case has to show (see SHOWS), options under which it
# has to choose or keep otherwise, bias_shift. What is in CAPITALS is a mistake that only this script can make.
CASES = [
    ("jacobs", "--experts 8 --topk 8", [], []),
    ("shazeer", "--experts 8 --topk 4 --aux-weight 0.5 --load-weight 0.25", [], ["--noise 0 --load-weight 0"]),
    ("hierarchical", "--experts 16 --topk 4 --groups 4 --group-topk 2 --aux-weight 0.5 --load-weight 0.25", [],
     ["--noise 0 --load-weight 0"]),
    ("hierarchical", "--experts 16 --topk 4 --groups 4 --group-topk 2 --group sequence --aux-weight 0.2 "
     "--load-weight 0.9", ["a group that no token reaches"], ["--noise 0 --load-weight 0"]),
    ("gshard", "--experts 8 --topk 2 --aux-weight 0.5", ["drops", "declines"],
     ["--DECLINED-TAKE-ROOM 1", "--drop-order TOKEN"]),
    ("switch", "--experts 8 --topk 1 --aux-weight 0.5", ["drops"], []),
    ("switch", "--experts 8 --topk 1 --aux-weight 0.5 --balance cv2", ["drops"], []),
    ("switch", "--experts 8 --topk 1 --aux-weight 0.5 --jitter 0.3", ["drops"], ["--jitter 0"]),
    ("glam", "--experts 8 --topk 2 --aux-weight 0.5", ["drops"], ["--drop-order TOKEN"]),
    ("mixtral", "--experts 8 --topk 2 --aux-weight 0.5", [], []),
    ("mixtral", "--experts 8 --topk 2 --aux-weight 0.5 --capacity-factor 0.75 --overflow next", ["moves", "drops"],
     ["--overflow drop", "--REPEAT 1"]),
    ("mixtral", "--experts 8 --topk 2 --aux-weight 0.5 --capacity-factor 0.5 --drop-order score", ["drops"],
     ["--drop-order choice"]),
    ("mixtral", "--experts 8 --topk 2 --aux-weight 0.5 --group sequence --capacity-factor 0.5", ["drops"],
     ["--drop-order TOKEN", "--group batch"]),
    ("deepseekmoe", "--experts 7 --topk 3 --shared 1 --groups 4 --aux-weight 0.5 --device-weight 0.3", [], []),
    ("deepseek-v2", "--experts 8 --topk 3 --shared 2 --groups 4 --group-topk 2 --aux-weight 0.5 --device-weight 0.3 "
     "--comm-weight 0.2", ["drops"], ["--group-topk 4", "--drop-order choice", "--capacity-unit expert"]),
    ("deepseek-v2", "--experts 8 --topk 3 --shared 2 --groups 4 --group-topk 2 --aux-weight 0.5 --device-weight 0.3 "
     "--comm-weight 0.2 --drop-exempt 0.5", ["drops", "exempt sequences and others"], ["--drop-exempt 0"]),
    ("deepseek-v3", "--experts 8 --topk 3 --shared 1 --aux-weight 0.5", ["unbiased counts differ"], ["--bias-rate 0"]),
    ("deepseek-v3", "--experts 8 --topk 3 --shared 1 --groups 4 --group-topk 2 --aux-weight 0.5",
     ["unbiased counts differ"], ["--bias-rate 0", "--group-topk 4", "--group-score best"]),
    ("deepseek-v3", "--experts 8 --topk 3 --shared 1 --groups 4 --group-topk 2 --aux-weight 0.5",
     ["unbiased counts differ"], ["--MASK 0", "--bias-rate 0"], -3.0),
    ("cmoe", "--experts 8 --topk 2 --aux-weight 0.5", ["every width"], []),
    ("multirouter", "--experts 8 --topk 4 --routers 2 --aux-weight 0.5", ["an expert twice"], []),
    ("multirouter", "--experts 8 --topk 4 --routers 2 --aux-weight 0.5 --z-weight 0.1 --group sequence",
     ["an expert twice"], []),
    ("history", "--experts 8 --topk 2 --aux-weight 0.5", [], ["--history-decay 0"]),
    ("threshold", "--experts 8 --topk 2 --aux-weight 0.5 --sparsity-weight 0.4", ["one choice and several"], []),
    ("threshold", "--experts 8 --topk 2 --max-active 2 --aux-weight 0.5 --sparsity-weight 0.4",
     ["one choice and several", "more above the threshold than places"], []),
    ("variance", "--experts 8 --topk 2 --aux-weight 0.5", [], []),
    ("st-moe", "--experts 8 --topk 2 --aux-weight 0.5 --z-weight 0.1",
     ["drops", "declines", "drops at evaluation"],
     ["--DECLINED-TAKE-ROOM 1", "--drop-order TOKEN", "--EVALUATE-BY-CHOICE 1"]),
    ("olmoe", "--experts 16 --topk 4 --aux-weight 0.5 --z-weight 0.1", [], []),
    ("qwen3", "--experts 16 --topk 4 --aux-weight 0.5", [], []),
    ("expert-choice", "--experts 8 --topk 2", ["a token without an expert", "more than two experts"], []),
    ("hash", "--experts 8 --topk 1", [], []),
    ("base", "--experts 8 --topk 1", [], ["--select topk"]),
    ("mh-moe", "--experts 8 --topk 2 --subtokens 4 --aux-weight 0.5", [], []),
    ("mh-moe", "--experts 8 --topk 2 --subtokens 4 --aux-weight 0.5 --group sequence --capacity-factor 1", ["drops"],
     ["--drop-order TOKEN", "--group batch"]),
    ("rmoe", "--experts 8 --topk 2 --recurrent 64 --aux-weight 0.5", ["gates that are open halfway"], []),
]


def parse(options):
    """'--name value --name value' -> {name: value}"""
    words = options.split()
    assert all(name.startswith("--") for name in words[::2]) and len(words) % 2 == 0, options
    return {name[2:].replace("-", "_"): number(text) for name, text in zip(words[::2], words[1::2])}


def number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# ---- inputs and random numbers ---------------------------------------------------------------------------------------

def golden_hash(key):
    """32-bit; key may be an array."""
    x = np.asarray(key, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    x = (x * np.uint64(2654435761) + np.uint64(12345)) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x7FEB352D) & mask
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x846CA68B) & mask
    return x ^ x >> np.uint64(16)


def keys(seed, size):
    return (seed * 1000003 + np.arange(size, dtype=np.uint64)) & np.uint64(0xFFFFFFFF)


@functools.lru_cache(maxsize=200)
def tensor(seed, scale, *shape):
    value = golden_hash(keys(seed, math.prod(shape))) / 2.0**32 - 0.5
    return (scale * value).reshape(shape)


JITTER, NOISE, SECOND, EXEMPT = 2, 4, 5, 6
MASK64 = (1 << 64) - 1


def hash64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def stream(seed, purpose, a, b):
    return hash64(hash64(hash64(hash64(seed) ^ purpose) ^ a) ^ b)


def uniform(stream, i):
    return (hash64(stream ^ hash64(i)) >> 11) / 2.0**53


def normal(stream, i):
    return math.sqrt(-2 * math.log(1 - uniform(stream, 2 * i))) * math.cos(2 * math.pi * uniform(stream, 2 * i + 1))


# ---- small functions -------------------------------------------------------------------------------------------------

def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + np.maximum(x, 0)


def normal_cdf(z):
    return np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])


def gelu(x):
    return x * normal_cdf(x)


def silu(x):
    return x * sigmoid(x)


def relu(x):
    return np.maximum(x, 0)


ACTIVATIONS = {"swiglu": silu, "geglu": gelu, "relu": relu, "gelu": gelu}


def gated(activation):
    return activation in ("swiglu", "geglu")


def ffn(x, w_in, w_out, activation):
    """One token x (C). Gated: the first half of w_in's rows are gates, the second half the values they gate."""
    h = w_in @ x
    f = ACTIVATIONS[activation]
    if gated(activation):
        half = len(h) // 2
        return w_out @ (f(h[:half]) * h[half:])
    return w_out @ f(h)


def gru_cell(x, h, gru_x, gru_h, gru_bx, gru_bh):
    """Cho et al. 2014, in the form of torch.nn.GRUCell; row blocks: reset, update, new."""
    R = len(h)
    a, b = gru_x @ x + gru_bx, gru_h @ h + gru_bh
    reset = sigmoid(a[:R] + b[:R])
    update = sigmoid(a[R:2 * R] + b[R:2 * R])
    new = np.tanh(a[2 * R:] + reset * b[2 * R:])
    return (1 - update) * new + update * h


def best(score, k, gaps, ordered=True):
    """The k largest, best first, ties to the lower index. Notes the gaps that decided; ordered: the order matters."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    for j in range(0 if ordered else k - 1, min(k, len(order) - 1)):
        gaps.append(score[order[j]] - score[order[j + 1]])
    return order[:k]


def group_of(e, groups, experts):
    return e * groups // experts


def members(g, groups, experts):
    return [e for e in range(experts) if group_of(e, groups, experts) == g]


# ---- balance losses: all are 1 at balance ----------------------------------------------------------------------------

def switch_form(f, P):
    """Fedus et al. 2021, equation 4, without its weight: E sum f_i P_i."""
    return len(f) * sum(f[i] * P[i] for i in range(len(f)))


def cv2(v):
    """Shazeer et al. 2017, equations 7 and 11: squared coefficient of variation, 0 at balance."""
    mean = sum(v) / len(v)
    return sum((u - mean)**2 for u in v) / len(v) / mean**2


def variance_form(usage):
    mean = sum(usage) / len(usage)
    return 1 + len(usage)**2 * sum((u - mean)**2 for u in usage) / len(usage)


def width_shares(count, widths):
    """cmoe: share of the work instead of share of the choices."""
    work = [c * F for c, F in zip(count, widths)]
    return [u / sum(work) for u in work]


def device_form(f, P, groups):
    """DeepSeekMoE, equation 15 and DeepSeek-V2, equation 26; f here sums to 1, theirs to E."""
    E, loss = len(f), 0.0
    for g in range(groups):
        inside = members(g, groups, E)
        loss += sum(E * f[i] for i in inside) / len(inside) * sum(P[i] for i in inside)
    return loss


def communication_form(sent, P, groups, limit, tokens):
    """DeepSeek-V2, equation 29; sent[g]: tokens with a choice in group g, limit: groups a token may use."""
    loss = 0.0
    for g in range(groups):
        loss += groups / (limit * tokens) * sent[g] * sum(P[i] for i in members(g, groups, len(P)))
    return loss


def z_loss(logits):
    """Zoph et al. 2022, equation 5, without its weight. logits (tokens,E)"""
    return sum(np.log(np.exp(row).sum())**2 for row in logits) / len(logits)


def smooth_load(clean, H, sigma, k):
    """Shazeer et al. 2017, equation 9: P(x,i), the chance that i is chosen if only its own noise is drawn again."""
    P = []
    for i in range(len(H)):
        others = sorted((H[j] for j in range(len(H)) if j != i), reverse=True)
        P.append((clean[i] - others[k - 1]) / sigma[i])  # others[k-1]: what H_i has to beat
    return normal_cdf(P)


# ---- weights ---------------------------------------------------------------------------------------------------------

def make_weights(o, layer, bias_shift):
    C, E, h = o.dim, o.experts, o.subtokens
    width, at = C // h, 100 * layer
    rows = o.routers * E + (o.groups if o.select == "hierarchical" else 0)
    w = types.SimpleNamespace(rows=rows)
    w.router = tensor(2 + at, 2.0, rows * (2 if o.noise else 1), o.recurrent or width)
    w.slow = tensor(13 + at, 2.0, rows, width)
    w.bias = tensor(12 + at, 1.0, E) + bias_shift
    w.tau = 0.1 + tensor(14 + at, 0.1, E)
    w.table = [int(key) % E for key in golden_hash(keys(17 + at, o.vocab))]
    w.split, w.merge = tensor(5 + at, 2.0, C, C), tensor(6 + at, 2.0, C, C)
    if o.recurrent:
        R = o.recurrent
        w.project = [tensor(7 + 100 * l, 2.0, R, C) for l in range(layer + 1)]
        w.gru = (tensor(8, 2.0, 3 * R, R), tensor(9, 2.0, 3 * R, R), tensor(10, 2.0, 3 * R), tensor(11, 2.0, 3 * R))
    # experts, of different widths and activations in cmoe, one after another
    w.F, w.activation = [o.ffn] * E, [o.activation] * E
    if o.mixed:
        w.F = [{0: o.ffn // 2, 3: o.ffn * 3 // 2}.get(e % 4, o.ffn) for e in range(E)]
        w.activation = ["gelu" if e % 2 else "swiglu" for e in range(E)]
    in_rows = [F * (2 if gated(a) else 1) for F, a in zip(w.F, w.activation)]
    all_in, all_out = tensor(3 + at, 2.0, sum(in_rows) * width), tensor(4 + at, 2.0, sum(w.F) * width)
    w.w_in, w.w_out, i, j = [], [], 0, 0
    for e in range(E):
        w.w_in.append(all_in[i:i + in_rows[e] * width].reshape(in_rows[e], width))
        w.w_out.append(all_out[j:j + w.F[e] * width].reshape(width, w.F[e]))
        i, j = i + in_rows[e] * width, j + w.F[e] * width
    SF = o.shared * o.ffn
    w.dense_in = tensor(15 + at, 2.0, SF * (2 if gated(o.activation) else 1), C)
    w.dense_out = tensor(16 + at, 2.0, C, SF)
    return w


# ---- choosing: each fills r.expert (a list a token, best first) and r.weight -----------------------------------------

def gate_weights(o, p, chosen):
    """The weights of one router's choices for one token."""
    total = sum(p[e] for e in chosen) if o.gate == "renormalized" else 1.0
    return [o.scale * p[e] / total / o.routers for e in chosen]


def limit_groups(o, score, gaps):
    """DeepSeek-V2 (best) and V3 (sum of the two best): the score outside the best groups becomes -inf."""
    if not o.group_topk:
        return score
    worth = []
    for g in range(o.groups):
        inside = sorted((score[e] for e in members(g, o.groups, o.experts)), reverse=True)
        worth.append(sum(inside[:2]) if o.group_score == "top2" else inside[0])
    allowed = best(worth, o.group_topk, gaps, ordered=False)
    return [score[e] if group_of(e, o.groups, o.experts) in allowed else o.MASK for e in range(o.experts)]


def choose_topk(o, w, r):
    """Also several routers (each its own choices, router after router), biased scores, the slow router and groups."""
    k = o.topk // o.routers
    for n in range(r.M):
        experts, weights = [], []
        for j in range(o.routers):
            p, block = r.p[j][n], slice(j * o.experts, (j + 1) * o.experts)
            score = r.H[n][block]  # in the order of p
            if o.history_decay:
                score = (w.slow @ r.router_in[n])[block]
            if o.bias_rate:  # DeepSeek-V3: the bias chooses, it does not weigh
                score = p + w.bias
            score = limit_groups(o, score, r.gaps)
            chosen = best(score, k, r.gaps)
            assert all(score[e] > -math.inf for e in chosen)  # K <= group_topk * E / groups
            experts += chosen
            weights += gate_weights(o, p, chosen)
        r.expert.append(experts)
        r.weight.append(weights)


def choose_hierarchical(o, w, r):
    """Shazeer et al. 2017, appendix B: the best groups, in each the best experts; group after group."""
    G, k = o.groups, o.topk // o.group_topk
    for n in range(r.M):
        H, experts, weights = r.H[n], [], []
        groups = best(H[:G], o.group_topk, r.gaps)
        for g, G_i in zip(groups, softmax(np.array([H[g] for g in groups]))):
            inside = members(g, G, o.experts)
            chosen = [inside[j] for j in best([H[G + e] for e in inside], k, r.gaps)]
            for e, G_ij in zip(chosen, softmax(np.array([H[G + e] for e in chosen]))):
                experts.append(e)
                weights.append(o.scale * G_i * G_ij)
        r.groups.append(groups)
        r.expert.append(experts)
        r.weight.append(weights)


def choose_threshold(o, w, r):
    """sparse(p, eps): all with p > eps, always the best, at most K."""
    eps = o.threshold or 1 / o.experts
    for n in range(r.M):
        p = r.p[0][n]
        r.gaps += [abs(v - eps) for v in p]
        above = max(1, sum(v > eps for v in p))
        r.above.append(above)
        r.expert.append(best(r.H[n], min(above, r.K), r.gaps))
        r.weight.append([o.scale * p[e] for e in r.expert[n]])


def choose_by_experts(o, w, r):
    """Zhou et al. 2022: each expert takes its best tokens; at evaluation a token takes p > tau."""
    taken = [set() for _ in range(r.M)]
    if r.train:
        for tokens in r.token_groups:
            for e in range(o.experts):
                column = [r.p[0][n][e] for n in tokens]
                for j in best(column, max(1, len(tokens) * o.topk // o.experts), r.gaps, ordered=False):
                    taken[tokens[j]].add(e)
    else:
        for n in range(r.M):
            r.gaps += [abs(v) for v in r.p[0][n] - w.tau]
            taken[n] = {e for e in range(o.experts) if r.p[0][n][e] > w.tau[e]}
    for n in range(r.M):
        score = [r.H[n][e] if e in taken[n] else -math.inf for e in range(o.experts)]
        r.expert.append(best(score, len(taken[n]), r.gaps))
        r.weight.append([o.scale * r.p[0][n][e] for e in r.expert[n]])


def balanced_assignment(score, gaps):
    """Lewis et al. 2021: the assignment with the largest sum of scores; expert e has a fixed number of seats.

    Exact: for every number of seats left in each expert, the best two ways to get there, token by token.
    """
    N, E = len(score), len(score[0])
    table = {tuple(N // E + (e < N % E) for e in range(E)): [(0.0, ())]}
    for n in range(N):
        ways = {}
        for left, paths in table.items():
            for e in range(E):
                if left[e]:
                    after = left[:e] + (left[e] - 1,) + left[e + 1:]
                    ways.setdefault(after, []).extend((total + score[n][e], path + (e,)) for total, path in paths)
        table = {left: heapq.nlargest(2, paths) for left, paths in ways.items()}
    (first, path), (second, _) = table[(0,) * E]
    gaps.append(first - second)
    return path


def choose_balanced(o, w, r):
    r.expert = [None] * r.M
    if r.train:
        for tokens in r.token_groups:
            for n, e in zip(tokens, balanced_assignment([r.H[n] for n in tokens], r.gaps)):
                r.expert[n] = [e]
    else:
        r.expert = [best(r.H[n], 1, r.gaps) for n in range(r.M)]
    r.weight = [gate_weights(o, r.p[0][n], r.expert[n]) for n in range(r.M)]


def choose_hash(o, w, r):
    """Roller et al. 2021."""
    r.expert = [[w.table[token]] for token in r.ids]
    r.weight = [[o.scale * 1.0] for _ in r.ids]


CHOOSE = {"topk": choose_topk, "hierarchical": choose_hierarchical, "threshold": choose_threshold,
          "expert-choice": choose_by_experts, "balanced": choose_balanced, "hash": choose_hash}


# ---- what happens to a choice afterwards -----------------------------------------------------------------------------

def decline_seconds(o, r):
    """Lepikhin et al. 2020, algorithm 1 (threshold 0.5) and Zoph et al. 2022 (0.2): u < g2 / threshold keeps."""
    draws = stream(o.seed, SECOND, o.step, r.layer)
    for n in range(r.M):
        u, chance = uniform(draws, n), r.weight[n][1] / o.second_threshold
        r.gaps.append(abs(u - chance))
        if not u < chance:
            r.key[n][1] = -1


def bin_of(o, e):
    return group_of(e, o.groups, o.experts) if o.capacity_unit == "group" else e


def apply_capacity(o, r, tokens):
    """Experts (or groups of them) fill up in the order of priority; what finds no room moves on or is dropped."""
    factor = o.capacity_factor if r.train else o.eval_capacity_factor
    if not factor:
        return
    bins = o.groups if o.capacity_unit == "group" else o.experts
    limit = math.ceil(factor * o.topk * len(tokens) / bins)
    choices = [(n, k) for n in tokens for k in range(len(r.expert[n])) if r.key[n][k] >= 0 or o.DECLINED_TAKE_ROOM]
    if o.drop_order == "choice" if r.train else o.EVALUATE_BY_CHOICE:  # else token by token
        choices.sort(key=lambda nk: nk[1])
    if r.train and o.drop_order == "score":
        choices.sort(key=lambda nk: -r.weight[nk[0]][nk[1]])
    choices.sort(key=lambda nk: nk[0] not in r.exempt)
    used = [0] * bins
    lowest = {}  # the weight of the last choice a bin took, for the gap
    for n, k in choices:
        e = r.expert[n][k]
        if used[bin_of(o, e)] < limit or n in r.exempt:
            used[bin_of(o, e)] += 1
            lowest[bin_of(o, e)] = r.weight[n][k]
        elif r.key[n][k] >= 0:
            if o.drop_order == "score" and r.train:
                r.gaps.append(lowest[bin_of(o, e)] - r.weight[n][k])
            r.key[n][k] = -1
            if o.overflow == "next":
                move_on(o, r, n, k, used, limit)


def move_on(o, r, n, k, used, limit):
    """To the best expert that has room and that the token does not have yet."""
    free = [e for e in range(o.experts) if used[e] < limit and (e not in r.expert[n] or o.REPEAT)]
    if free:
        e = free[best([r.H[n][e] for e in free], 1, r.gaps)[0]]
        r.expert[n][k] = r.key[n][k] = e
        used[e] += 1
        r.moved += 1


# ---- the losses of one token group -----------------------------------------------------------------------------------

def load_loss(o, w, r, tokens):
    """1 + CV2(Load); Load_H of the hierarchical mixture: Shazeer et al. 2017, appendix B."""
    if o.select != "hierarchical":
        load = sum(smooth_load(r.clean[n], r.H[n], r.sigma[n], o.topk) for n in tokens)
        return 1 + cv2(load)
    G = o.groups
    primary = sum(smooth_load(r.clean[n][:G], r.H[n][:G], r.sigma[n][:G], o.group_topk) for n in tokens)
    load = np.zeros(o.experts)
    for g in range(G):
        columns = [G + e for e in members(g, G, o.experts)]
        reach = [n for n in tokens if g in r.groups[n]]
        r.unreached += not reach
        for n in reach:
            inside = smooth_load(r.clean[n][columns], r.H[n][columns], r.sigma[n][columns], o.topk // o.group_topk)
            for column, P in zip(columns, inside):
                load[column - G] += primary[g] * P / len(reach)
    return 1 + cv2(load)


def balance_losses(o, w, r, tokens):
    """The weighted sum of all losses over one token group; choices and weights as they were before capacity."""
    E, n_tokens, loss = o.experts, len(tokens), 0.0
    k = r.K // o.routers
    importance = np.zeros(E)
    for n in tokens:
        for e, weight in zip(r.expert[n], r.weight[n]):
            importance[e] += weight
    for j in range(o.routers):
        if o.select == "hierarchical" or o.select == "hash":
            break  # no p over all experts
        p = r.p[j]
        P = sum(p[n] / p[n].sum() for n in tokens) / n_tokens
        count = [0] * E
        for n in tokens:
            if o.balance == "unbiased":
                chosen = best(p[n], o.topk, r.gaps, ordered=False)
                r.unbiased_differs |= set(chosen) != set(r.expert[n])
            elif o.balance == "gshard":
                chosen = r.expert[n][:1]
            else:
                chosen = [e for e in r.key[n][j * k:(j + 1) * k] if e >= 0]  # no declined ones
            for e in chosen:
                count[e] += 1
        f = [c / sum(count) for c in count]
        if o.balance == "width":
            loss += o.aux_weight * switch_form(width_shares(count, w.F), P)
        elif o.balance not in ("cv2", "variance"):
            loss += o.aux_weight * switch_form(f, P) / o.routers
        loss += o.device_weight * device_form(f, P, o.groups)
        if o.comm_weight:
            sent = [sum(any(group_of(e, o.groups, E) == g for e in r.expert[n]) for n in tokens)
                    for g in range(o.groups)]
            loss += o.comm_weight * communication_form(sent, P, o.groups, o.group_topk, n_tokens)
        if o.z_weight:
            loss += o.z_weight * z_loss([r.H[n][j * E:(j + 1) * E] for n in tokens]) / o.routers
    if o.balance == "cv2":
        loss += o.aux_weight * (1 + cv2(importance))
    if o.balance == "variance":
        loss += o.aux_weight * variance_form(importance / n_tokens)
    if o.load_weight:
        loss += o.load_weight * load_loss(o, w, r, tokens)
    return loss + o.sparsity_weight * sum(len(r.expert[n]) for n in tokens) / n_tokens / E


# ---- the layer -------------------------------------------------------------------------------------------------------

def router_logits(o, w, r, x, rows):
    """r.router_in, r.clean (no noise), r.H (what chooses), r.sigma and r.p[j] (M,E) of router j."""
    r.router_in = rows
    if o.jitter and r.train:  # Fedus et al. 2021
        draws = stream(o.seed, JITTER, o.step, r.layer)
        r.router_in = np.array([[v * (1 + o.jitter * (2 * uniform(draws, n * len(row) + c) - 1))
                                 for c, v in enumerate(row)] for n, row in enumerate(rows)])
    if o.recurrent:  # Qiu et al. 2024; every layer sees the same x here
        h = np.zeros((r.M, o.recurrent))
        for project in w.project:
            for n in range(r.M):
                step = w.gru[0] @ (project @ x[n]) + w.gru[1] @ h[n] + w.gru[2] + w.gru[3]
                r.halfway += sum(0.1 < v < 0.9 for v in sigmoid(step[:2 * o.recurrent]))
                h[n] = gru_cell(project @ x[n], h[n], *w.gru)
        r.router_in = h
    r.clean = r.router_in @ w.router[:w.rows].T
    r.H = r.clean.copy()
    if o.noise and r.train:  # Shazeer et al. 2017, equation 4
        r.sigma = softplus(r.router_in @ w.router[w.rows:].T) + 0.01
        draws = stream(o.seed, NOISE, o.step, r.layer)
        for n in range(r.M):
            for j in range(w.rows):
                r.H[n, j] += normal(draws, n * w.rows + j) * r.sigma[n, j]
    for j in range(o.routers):
        block = r.H[:, j * o.experts:(j + 1) * o.experts]
        r.p.append(np.array([sigmoid(row) if o.score == "sigmoid" else softmax(row) for row in block]))


def layer_forward(o, w, x, layer, train):
    """x (N,C) -> the plan, the losses and out (N,C), all in the namespace r."""
    C, T, h = o.dim, o.seq, o.subtokens
    N = o.batch * T
    r = types.SimpleNamespace(layer=layer, train=train, M=N * h, p=[], expert=[], weight=[], gaps=[], groups=[],
                              above=[], moved=0, unreached=0, halfway=0, unbiased_differs=False, exempt=set())
    r.K = {"threshold": o.max_active or o.experts // 2, "expert-choice": o.experts}.get(o.select, o.topk)
    r.ids = [int(key) % o.vocab for key in golden_hash(keys(18, N))]
    of_sequence = [list(range(q * T * h, (q + 1) * T * h)) for q in range(o.batch)]
    r.token_groups = of_sequence if o.group == "sequence" else [list(range(r.M))]

    rows = (x @ w.split.T).reshape(N * h, C // h) if h > 1 else x  # Wu et al. 2024, sub-tokens
    router_logits(o, w, r, x, rows)
    CHOOSE[o.select](o, w, r)
    r.key = [list(chosen) for chosen in r.expert]
    if o.second_threshold and train:
        decline_seconds(o, r)
    r.declined = count_gone(r)
    r.aux = 0.0
    if train:
        r.aux = sum(balance_losses(o, w, r, tokens) for tokens in r.token_groups) / len(r.token_groups)
        draws = stream(o.seed, EXEMPT, o.step, 0)
        r.exempt_sequences = [q for q in range(o.batch) if uniform(draws, q) < o.drop_exempt]
        if o.drop_exempt:
            r.gaps += [abs(uniform(draws, q) - o.drop_exempt) for q in range(o.batch)]
        r.exempt = {n for q in r.exempt_sequences for n in of_sequence[q]}
    for tokens in r.token_groups:
        apply_capacity(o, r, tokens)
    if r.moved:  # the gate's formula on the experts that the token has now
        r.weight = [gate_weights(o, r.p[0][n], r.expert[n]) for n in range(r.M)]
    r.dropped = count_gone(r) - r.declined

    y = np.zeros_like(rows)
    for n in range(r.M):
        for e, weight in zip(r.key[n], r.weight[n]):
            if e >= 0:
                y[n] += weight * ffn(rows[n], w.w_in[e], w.w_out[e], w.activation[e])
    r.out = y.reshape(N, C) @ w.merge.T if h > 1 else y
    if o.shared:
        for n in range(N):
            r.out[n] += ffn(x[n], w.dense_in, w.dense_out, o.activation)
    return r


def count_gone(r):
    return sum(key < 0 for keys in r.key for key in keys)


# ---- cases -----------------------------------------------------------------------------------------------------------

def run(case, x_seed, train, change=""):
    o = dict(parse(DEFAULTS), MASK=-math.inf, DECLINED_TAKE_ROOM=0, REPEAT=0, EVALUATE_BY_CHOICE=0, **parse(BASE))
    o.update(parse(RECIPES[case.recipe]))
    o.update(parse(case.options))
    o.update(parse(change))
    o = types.SimpleNamespace(**o)
    x = tensor(x_seed, 4.0, o.batch * o.seq, o.dim)
    return layer_forward(o, make_weights(o, case.layer, case.bias_shift), x, case.layer, train)


def active(r):
    return [len(chosen) for chosen in r.expert]


# what a case may have to show: t is its training mode, e its evaluation mode
SHOWS = {
    "drops": lambda t, e: t.dropped > 0,
    "declines": lambda t, e: 0 < t.declined < t.M and e.declined == 0,
    "moves": lambda t, e: t.moved > 0,
    "drops at evaluation": lambda t, e: e.dropped > 0,
    "exempt sequences and others": lambda t, e: len(t.exempt_sequences) == 1,
    "unbiased counts differ": lambda t, e: t.unbiased_differs,
    "a group that no token reaches": lambda t, e: t.unreached > 0,
    "every width": lambda t, e: {x % 4 for chosen in t.expert for x in chosen} == {0, 1, 2, 3},
    "an expert twice": lambda t, e: any(len(set(chosen)) < len(chosen) for chosen in t.expert),
    "one choice and several": lambda t, e: min(active(t)) == 1 and max(active(t)) > 1,
    "more above the threshold than places": lambda t, e: max(t.above) > t.K,
    "a token without an expert": lambda t, e: min(active(t)) == 0 and min(active(e)) < max(active(e)),
    "more than two experts": lambda t, e: max(active(t)) > 2,
    "gates that are open halfway": lambda t, e: t.halfway >= 100,
}


def plans(t, e):
    return t.expert, t.key, e.expert, e.key


def find_input(case):
    """The first x_seed whose x shows all that the case is for, without a near-tie."""
    for x_seed in [1, *range(1001, 1300)]:
        t, e = run(case, x_seed, True), run(case, x_seed, False)
        if (min(t.gaps + e.gaps, default=math.inf) >= GAP and all(SHOWS[name](t, e) for name in case.shows)
                and all(plans(run(case, x_seed, True, change), run(case, x_seed, False, change)) != plans(t, e)
                    for change in case.unlike)):
            return x_seed, t, e
    raise SystemExit(f"{case.recipe} {case.options}: no input shows {case.shows} unlike {case.unlike}")


def check_forms():
    """The constants that references disagree on: every loss is 1 at balance, whatever E, K and D."""
    for E in (8, 16):
        even = np.full(E, 1 / E)
        assert switch_form(even, even) == 1  # K even counts a token give the same f: 1, and not K
        one = np.eye(E)[0]
        assert switch_form(one, one) == E  # the largest value: all to one expert
        assert cv2(np.full(E, 2.5)) == 0 and variance_form(even) == 1
        assert cv2(one) == E - 1 and variance_form(one) == E  # one expert gets all
        assert switch_form(width_shares([3] * E, [6] * E), even) == 1
        assert width_shares([3, 6, 2], [6, 3, 9]) == [1 / 3, 1 / 3, 1 / 3]
        assert device_form(even, even, 4) == 1
        assert communication_form([6] * 4, even, 4, 2, 12) == 1  # 12 tokens, each in 2 of 4 groups
    even = np.full(7, 1 / 7)
    assert [len(members(g, 4, 7)) for g in range(4)] == [2, 2, 2, 1]
    assert abs(device_form(even, even, 4) - 1) < 1e-15  # also where groups differ in size
    assert abs(z_loss(np.zeros((3, 8))) - math.log(8)**2) < 1e-15
    # the chance to be among the k: without noise drawn again, k of E on average if all are alike
    assert abs(smooth_load(np.zeros(8), np.zeros(8), np.ones(8), 4).sum() - 4) < 1e-15
    path = balanced_assignment([[5.0, 4.0], [4.0, 1.0], [3.0, 2.9]], [])
    assert path == (0, 0, 1)  # 5 + 4 + 2.9: expert 0 has two seats, though all like it best
    assert balanced_assignment([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]], []) == (0, 1, 0)
    assert best([1.0, 3.0, 3.0, 2.0], 2, []) == [1, 2]  # ties: the lower index


def check_case(case, r):
    """What must hold of every plan and of every p."""
    if case.recipe not in ("deepseek-v3", "base", "hierarchical"):
        assert all(abs(p.sum(1) - 1).max() < 1e-12 for p in r.p)  # over all experts, those out of reach included
    for n in range(r.M):
        assert len(r.expert[n]) == len(r.weight[n]) == len(r.key[n]) <= r.K
        assert all(key in (-1, e) for e, key in zip(r.expert[n], r.key[n]))
        if case.recipe != "multirouter":
            assert len(set(r.expert[n])) == len(r.expert[n])
        if case.recipe in ("shazeer", "hierarchical", "gshard", "glam", "mixtral", "multirouter", "qwen3", "history"):
            assert abs(sum(r.weight[n]) - 1) < 1e-12  # declined and dropped ones included
        if case.recipe == "deepseek-v3":
            assert abs(sum(r.weight[n]) - 2.5) < 1e-12
    if case.recipe == "expert-choice" and r.train:
        assert sum(active(r)) == 24 and r.K == 8  # 8 experts, each 12*2/8 tokens
    if case.recipe == "base" and r.train:
        assert [sum(chosen == [e] for chosen in r.expert) for e in range(8)] == [2, 2, 2, 2, 1, 1, 1, 1]
    if case.recipe == "threshold":
        assert max(active(r)) <= r.K == (2 if "max-active" in case.options else 4) and min(active(r)) >= 1
    if case.recipe == "mh-moe":
        assert (r.M, r.K) == (48, 2)
    if not r.train:
        assert r.aux == 0 and r.declined == 0 and (r.dropped == 0 or case.recipe == "st-moe")


# ---- the header ------------------------------------------------------------------------------------------------------

HEADER = """\
// Golden values of one MoE layer of every recipe, which dev/test/recipes.py defines and computes (NumPy, float64).
#pragma once

// One case in one mode. Over the recipe's row go: width C 16, T 6, B 2 (N = 12 tokens), vocabulary 50, seed 1, step 1,
// every layer with experts; then the options. Element i of a tensor is scale * value(seed, i), row-major, with
// value(seed, i) = golden_hash(seed * 1000003 + i) / 2^32 - 0.5, all 32-bit. Seed, and scale where it is not 2:
//   x (x_seed, scale 4)  router 2  w_in 3  w_out 4  split 5  merge 6  project 7  gru_x 8  gru_h 9  gru_bx 10  gru_bh 11
//   bias 12 (scale 1, plus bias_shift)  slow router 13  tau 14 (scale 0.1, plus 0.1)  dense_in 15  dense_out 16
//   table[v] = golden_hash(17 * 1000003 + v) % E    token id of token n = golden_hash(18 * 1000003 + n) % 50
// Layer l adds 100 l to the seed of all but x, gru_* and the token ids. With layer 1 (rmoe), layer 0 has the same x.
typedef struct {
    const char *recipe, *options;
    int x_seed, layer;
    double bias_shift;
    int train;          // 1: training mode, 0: evaluation mode
    int M, K;           // rows of the plan (N, or the sub-tokens) and places a row
    int expert[96];     // (M,K), best first (of each group or router, these one after another); -1: there is none
    int key[96];        // the same, also -1 where the choice is declined or dropped
    double weight[96];  // (M,K), 0 where there is no choice; declined and dropped ones keep theirs
    double aux;         // sum of the weighted losses; 0 in evaluation mode
    double out[12];     // of token n: sum over c of out[n][c] * value(99, c)
} RecipeGolden;
"""


def padded(rows, K, filler):
    return [v for row in rows for v in list(row) + [filler] * (K - len(row))]


def wrapped(items, indent):
    """{items} in lines of at most 120 columns."""
    lines, line = [], " " * indent + "{"
    for i, item in enumerate(items):
        item += "}," if i == len(items) - 1 else ","
        if len(line) + len(item) + 1 > 120:
            lines.append(line.rstrip())
            line = " " * (indent + 1)
        line += item + " "
    return lines + [line.rstrip()]


def write_header(path, results):
    real = "{:.17g}".format
    lines = HEADER.splitlines() + ["", f"static const RecipeGolden recipe_golden[{len(results)}] = {{"]
    for case, x_seed, r in results:
        lines += [f'    {{"{case.recipe}",', f'     "{case.options}",',
                  f"     {x_seed}, {case.layer}, {real(case.bias_shift)}, {int(r.train)}, {r.M}, {r.K},"]
        for rows in (r.expert, r.key):
            lines += wrapped([str(e) for e in padded(rows, r.K, -1)], 5)
        lines += wrapped([real(v) for v in padded(r.weight, r.K, 0)], 5)
        lines += [f"     {real(r.aux)},"]
        v = tensor(99, 1.0, r.out.shape[1])
        lines += wrapped([real(out @ v) for out in r.out], 5)
        lines[-1] = lines[-1][:-1] + "},"
    lines += ["};"]
    lines = [part for line in lines for part in split_string(line)]
    assert max(map(len, lines)) <= 120
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def split_string(line):
    """A string literal that is too long goes on in the next line."""
    if len(line) <= 120:
        return [line]
    cut = line.rindex(" --", 0, 118)
    return [line[:cut] + '"', '     "' + line[cut:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes.h"))
    args = parser.parse_args()
    check_forms()
    results = []
    for recipe, options, shows, unlike, *bias_shift in CASES:
        case = types.SimpleNamespace(recipe=recipe, options=options + " --ffn 6", shows=shows, unlike=unlike,
                                     layer=int(recipe == "rmoe"), bias_shift=(bias_shift or [0.0])[0])
        x_seed, t, e = find_input(case)
        for r in (t, e):
            check_case(case, r)
            results.append((case, x_seed, r))
        print(f"{recipe:13} x_seed {x_seed:4}  gap {min(t.gaps + e.gaps, default=math.inf):.1e}  aux {t.aux:.6f}  "
              f"declined {t.declined}  dropped {t.dropped}, {e.dropped} at evaluation  moved {t.moved}  {options}")
    write_header(args.out, results)
    print("wrote", args.out)


if __name__ == "__main__":
    main()
