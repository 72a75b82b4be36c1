#!/usr/bin/env python3
"""Golden values for test_moe.c: one small model, computed by PyTorch autograd in double precision.

    pip install torch numpy                 (any 2.x; the CPU is enough)
    python dev/test/golden.py                    writes dev/test/golden.h
    python dev/test/golden.py --float32          how far the same computation in float32 comes out
    pip install transformers safetensors
    python dev/test/golden.py --check-transformers   ties this model to MixtralForCausalLM and LlamaForCausalLM

Written from the specification of the model (plain tensor operations, no nn modules), not from train_moe.c, so
that an error would have to be made twice. Weights and tokens come from a hash, so no file is shared either.
"""
import argparse
import math
import os
import tempfile
import types

import torch

EPS, THETA, AUX_WEIGHT = 1e-5, 10000.0, 0.01
SIZES = dict(V=50, L=2, C=16, H=4, KV=2, D=4, E=4, K=2, F=12, T=8, B=2)
RECIPES = {  # moe: which layers are (the others are dense, K*F wide)
    "mixtral": dict(SIZES, swiglu=True, renormalise=True, group="batch", capacity=None, moe=[True, True]),
    "switch": dict(SIZES, K=1, swiglu=False, renormalise=False, group="sequence", capacity=1.25, moe=[False, True]),
    "dense": dict(SIZES, swiglu=True, moe=[False, False]),
    # experts in attention: AE of them, of which a head takes AK; with moa AE heads, of which a token takes H
    "switchhead": dict(SIZES, swiglu=True, renormalise=True, group="batch", capacity=None, moe=[True, True],
                       heads="switchhead", D=8, AE=3, AK=2, options="--attention-aux-weight 0.01"),
    "moa": dict(SIZES, swiglu=True, renormalise=True, group="batch", capacity=None, moe=[True, True],
                heads="moa", KV=1, D=8, AE=6, options="--attention-z-weight 0.003"),
}
STEPS = 5
LR, BETA1, BETA2, ADAM_EPS, DECAY, CLIP = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0


# ---- weights and tokens from a hash ----------------------------------------------------------------------------------

def hash32(key):
    x = (key * 2654435761 + 12345) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def attention_shapes(l, c):
    heads = getattr(c, "heads", None)
    if heads == "switchhead":
        return [(f"query_key.{l}", ((c.H + c.KV) * c.D, c.C)), (f"value_router.{l}", (c.KV * c.AE, c.C)),
                (f"value_experts.{l}", (c.KV * c.AE, c.D, c.C)), (f"output_router.{l}", (c.H * c.AE, c.C)),
                (f"output_experts.{l}", (c.H * c.AE, c.C, c.D))]
    if heads == "moa":
        return [(f"query_experts.{l}", (c.AE, c.D, c.C)), (f"key_value.{l}", (2 * c.D, c.C)),
                (f"output_router.{l}", (c.AE, c.C)), (f"output_experts.{l}", (c.AE, c.C, c.D))]
    return [(f"qkv.{l}", ((c.H + 2 * c.KV) * c.D, c.C)), (f"proj.{l}", (c.C, c.H * c.D))]


def tensor_shapes(c):
    """[(name, shape)] in the order of the model's parameters; t, the hash's first number, counts this list."""
    shapes = [("embed", (c.V, c.C))]
    inputs = 2 if c.swiglu else 1  # SwiGLU: F gate rows, then F up rows
    for l in range(c.L):
        shapes += [(f"norm1.{l}", (c.C,))] + attention_shapes(l, c) + [(f"norm2.{l}", (c.C,))]
        if c.moe[l]:
            shapes += [(f"router.{l}", (c.E, c.C)), (f"w_in.{l}", (c.E, inputs * c.F, c.C)),
                       (f"w_out.{l}", (c.E, c.C, c.F))]
        else:
            shapes += [(f"dense_in.{l}", (inputs * c.K * c.F, c.C)), (f"dense_out.{l}", (c.C, c.K * c.F))]
    return shapes + [("norm", (c.C,))]


def make_weights(c, dtype):
    weights = {}
    for t, (name, shape) in enumerate(tensor_shapes(c)):
        u = [hash32(t * 1000003 + i) / 2**32 - 0.5 for i in range(math.prod(shape))]
        u = torch.tensor(u, dtype=torch.float64).reshape(shape)
        weights[name] = (1 + 0.5 * u if len(shape) == 1 else u).to(dtype).requires_grad_()
    return weights


def make_tokens(c):
    block = torch.tensor([hash32(999 * 1000003 + i) % c.V for i in range(c.B * (c.T + 1))]).reshape(c.B, c.T + 1)
    return block[:, :-1], block[:, 1:]


# ---- the model -------------------------------------------------------------------------------------------------------

def rmsnorm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x):
    """Rotary positions, half-split: element j of a head turns together with element j + D/2. x (B,T,heads,D)"""
    T, D = x.shape[1], x.shape[3]
    frequency = THETA ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency  # (T, D/2)
    cos, sin = (f(angle)[None, :, None, :].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x[..., :D // 2], x[..., D // 2:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def look_back(q, k, v):
    """q (B,T,heads,D) looks at k, v (B,T,kv heads,D) of its own and earlier tokens -> (B,T,heads,D)"""
    q, k = rotate(q), rotate(k)
    T, heads = q.shape[1:3]
    owner = torch.arange(heads) // (heads // k.shape[2])  # the kv head that query head h reads
    k, v = k[:, :, owner], v[:, :, owner]
    score = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[3])
    score = score.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", score.softmax(-1), v)


def attention(x, qkv, proj, c):
    B, T, _ = x.shape
    q, k, v = (x @ qkv.T).reshape(B, T, c.H + 2 * c.KV, c.D).split([c.H, c.KV, c.KV], dim=2)
    return look_back(q, k, v).reshape(B, T, c.H * c.D) @ proj.T


# ---- experts in attention: here every expert sees every token, and the weights of those not chosen are 0

def chosen_of(p, K, notes):
    """p (B,T,heads,E) -> 1 where an expert is among the K best of its head, else 0; and the heads' balance loss"""
    E = p.shape[3]
    order = p.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(p).scatter(-1, order[..., :K], 1.0).detach()
    share = mask.mean((0, 1)) / K  # (heads,E)
    mean = (p / p.sum(-1, keepdim=True)).mean((0, 1))
    best = p.sort(dim=-1, descending=True)[0]
    notes.append(dict(aux=(E * share * mean).sum(-1).mean(), margin=(best[..., K - 1] - best[..., K]).min().item()))
    return mask


def switchhead(x, w, l, c, notes):
    B, T, C = x.shape
    q, k = (x @ w[f"query_key.{l}"].T).reshape(B, T, c.H + c.KV, c.D).split([c.H, c.KV], dim=2)
    score = (x @ w[f"value_router.{l}"].T).reshape(B, T, c.KV, c.AE).sigmoid()
    score = score * chosen_of(score, c.AK, notes)
    experts = w[f"value_experts.{l}"].reshape(c.KV, c.AE, c.D, C)
    v = torch.einsum("bthe,hedc,btc->bthd", score, experts, x)
    att = look_back(q, k, v)
    score = (x @ w[f"output_router.{l}"].T).reshape(B, T, c.H, c.AE).sigmoid()
    score = score * chosen_of(score, c.AK, notes)
    return torch.einsum("bthe,hecd,bthd->btc", score, w[f"output_experts.{l}"].reshape(c.H, c.AE, C, c.D), att)


def moa(x, w, l, c, notes):
    B, T, C = x.shape
    logits = x @ w[f"output_router.{l}"].T
    p = logits.softmax(-1)
    weight = p * chosen_of(p[:, :, None], c.H, notes)[:, :, 0]
    weight = weight / weight.sum(-1, keepdim=True)
    # the balance losses count 0.01; the z-loss 0.003
    notes.append(dict(aux=0.3 * logits.logsumexp(-1).pow(2).mean(), margin=math.inf))
    k, v = (x @ w[f"key_value.{l}"].T).reshape(B, T, 2, c.D).split(1, dim=2)
    att = look_back(torch.einsum("edc,btc->bted", w[f"query_experts.{l}"], x), k, v)
    return torch.einsum("bte,ecd,bted->btc", weight, w[f"output_experts.{l}"], att)


def mix(x, w, l, c, notes):
    """What mixes along the sequence in layer l"""
    heads = getattr(c, "heads", None)
    if heads:
        return (switchhead if heads == "switchhead" else moa)(x, w, l, c, notes)
    return attention(x, w[f"qkv.{l}"], w[f"proj.{l}"], c)


def ffn(x, w_in, w_out, swiglu):
    h = x @ w_in.T
    if swiglu:
        gate, up = h.chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up) @ w_out.T
    return h.clamp(min=0) @ w_out.T


def moe(x, router, w_in, w_out, c, notes):
    """x (B,T,C) -> (B,T,C); appends what the router did to notes."""
    B, T, C = x.shape
    x = x.reshape(B * T, C)
    p = (x @ router.T).softmax(-1)
    score, order = p.sort(dim=-1, descending=True, stable=True)  # stable: of equal scores the lower index wins
    chosen, weight = order[:, :c.K], score[:, :c.K]
    if c.renormalise:
        weight = weight / weight.sum(-1, keepdim=True)

    group = B * T if c.group == "batch" else T  # tokens over which balance and capacity are taken
    groups = B * T // group
    # f: share of the choices before capacity, P: mean probability; E sum f P is 1 at balance
    count = torch.stack([torch.bincount(g, minlength=c.E) for g in chosen.reshape(groups, -1)])
    f = count.to(p.dtype) / (group * c.K)
    P = p.reshape(groups, group, c.E).mean(1)
    aux = (c.E * (f * P).sum(-1)).mean()

    keep = torch.ones_like(chosen, dtype=torch.bool)
    if c.capacity:
        capacity = math.ceil(c.capacity * c.K * group / c.E)
        for g in range(groups):
            used = [0] * c.E
            for k in range(c.K):  # every token's first choice before any token's second
                for n in range(g * group, (g + 1) * group):
                    e = int(chosen[n, k])
                    keep[n, k] = used[e] < capacity
                    used[e] += bool(keep[n, k])

    y = torch.zeros_like(x)
    for e in range(c.E):
        token, k = torch.where((chosen == e) & keep)
        y = y.index_add(0, token, weight[token, k, None] * ffn(x[token], w_in[e], w_out[e], c.swiglu))
    notes.append(dict(chosen=chosen, dropped=int((~keep).sum()), aux=aux,
                      margin=(score[:, :c.K] - score[:, 1:c.K + 1]).min().item()))
    return y.reshape(B, T, C)


def forward(w, tokens, c):
    """-> logits (B,T,V), aux (sum of all balance losses), the notes of every router"""
    notes = []
    x = w["embed"][tokens]
    for l in range(c.L):
        x = x + mix(rmsnorm(x, w[f"norm1.{l}"]), w, l, c, notes)
        h = rmsnorm(x, w[f"norm2.{l}"])
        if c.moe[l]:
            x = x + moe(h, w[f"router.{l}"], w[f"w_in.{l}"], w[f"w_out.{l}"], c, notes)
        else:
            x = x + ffn(h, w[f"dense_in.{l}"], w[f"dense_out.{l}"], c.swiglu)
    aux = sum((note["aux"] for note in notes), torch.zeros((), dtype=x.dtype))
    return rmsnorm(x, w["norm"]) @ w["embed"].T, aux, notes


def cross_entropy(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


# ---- training --------------------------------------------------------------------------------------------------------

def adamw(w, g, m, v, step):
    """One step, in place; g is clipped to a global norm of CLIP. step counts from 1."""
    norm = math.sqrt(sum(float(x.double().pow(2).sum()) for x in g.values()))
    with torch.no_grad():
        for name, p in w.items():
            grad = g[name] * min(1.0, CLIP / norm)
            m[name] = BETA1 * m[name] + (1 - BETA1) * grad
            v[name] = BETA2 * v[name] + (1 - BETA2) * grad * grad
            update = m[name] / (1 - BETA1**step) / ((v[name] / (1 - BETA2**step)).sqrt() + ADAM_EPS)
            decay = DECAY if p.dim() > 1 else 0.0
            p -= LR * (update + decay * p)


def golden(recipe, dtype=torch.float64):
    c = types.SimpleNamespace(**RECIPES[recipe])
    w = make_weights(c, dtype)
    tokens, targets = make_tokens(c)
    m, v = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    out = types.SimpleNamespace(recipe=recipe, losses=[], auxes=[], norms=[], margin=math.inf)
    for step in range(STEPS + 1):  # what is seen after `step` updates
        logits, aux, notes = forward(w, tokens, c)
        loss = cross_entropy(logits, targets)
        total = loss + AUX_WEIGHT * aux
        g = dict(zip(w, torch.autograd.grad(total, list(w.values()))))
        out.losses.append(loss.item())
        out.auxes.append(aux.item())
        out.norms.append(math.sqrt(sum(float(x.double().pow(2).sum()) for x in g.values())))
        out.margin = min([out.margin] + [note["margin"] for note in notes])
        if step == 0:
            out.total = total.item()
            out.logits = logits[:, -1, :8].flatten().tolist()
            out.chosen = [note["chosen"].flatten().tolist() for note in notes if "chosen" in note]
            out.dropped = sum(note.get("dropped", 0) for note in notes)
            out.options = getattr(c, "options", "")
            out.least = min(x[x != 0].abs().min().item() for x in g.values()) * min(1.0, CLIP / out.norms[0])
            out.tensors = []
            for name, x in g.items():
                flat = x.flatten()
                sample = [float(flat[i]) for i in (0, flat.numel() // 2, flat.numel() - 1)]
                out.tensors.append((name, flat.numel(), float(x.norm()), sample))
        adamw(w, g, m, v, step + 1)
    return out


HEADER = """\
// Golden values of one small model, which dev/test/golden.py defines and computes (PyTorch, float64).
#pragma once

typedef struct {
    const char *name;   // as in dev/test/golden.py; the order is that of the parameters
    int size;           // number of elements
    double norm;        // Frobenius norm of the gradient
    double sample[3];   // its elements 0, size/2 and size-1
} GoldenTensor;

typedef struct {
    const char *recipe;
    const char *options; // besides
    double total;       // loss[0] + 0.01 aux[0]: the gradients are this one's
    double loss[6], aux[6], grad_norm[6];  // after 0 to 5 AdamW steps; the norm is that before clipping
    double logits[16];  // of the last token of each of the two sequences, the first 8 entries
    int dropped;        // choices beyond capacity, all layers
    int tensors;
    GoldenTensor tensor[22];
    int moe_layers;
    int chosen[2][32];  // per MoE layer (N,K) experts, best first
} Golden;
"""


def write_header(path, results):
    number = "{:.17g}".format

    def numbers(xs, per_line):
        xs = [number(x) for x in xs]
        return ",\n     ".join(", ".join(xs[i:i + per_line]) for i in range(0, len(xs), per_line))

    lines = HEADER.splitlines() + ["", f"static const Golden golden[{len(results)}] = {{"]
    for r in results:
        lines += [f'    {{"{r.recipe}", "{r.options}", {number(r.total)},']
        lines += [f"     {{{numbers(xs, 4)}}}," for xs in (r.losses, r.auxes, r.norms, r.logits)]
        lines += [f"     {r.dropped}, {len(r.tensors)},", "     {"]
        for name, size, norm, sample in r.tensors:
            lines.append(f'      {{"{name}", {size}, {number(norm)}, {{{", ".join(map(number, sample))}}}}},')
        rows = [f"{{{', '.join(map(str, layer))}}}" for layer in r.chosen] or ["{0}"]
        lines += ["     },", f"     {len(r.chosen)}, {{" + ",\n         ".join(rows) + "}},"]
    lines += ["};"]
    assert len(lines) <= 200 and max(map(len, "\n".join(lines).split("\n"))) <= 126
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def report_float32():
    print("largest difference of float32 from float64 (gradient samples relative to the tensor's gradient norm)")
    for recipe in RECIPES:
        a, b = golden(recipe), golden(recipe, torch.float32)

        def worst(xs, ys):
            return max(abs(x - y) for x, y in zip(xs, ys))
        grads = max(max(abs(x - y) for x, y in zip([p[2]] + p[3], [q[2]] + q[3])) / p[2]
                    for p, q in zip(a.tensors, b.tensors))
        print(f"{recipe:8} loss {worst(a.losses[:1], b.losses[:1]):.1e}  logits {worst(a.logits, b.logits):.1e}"
              f"  gradients {grads:.1e}  steps: loss {worst(a.losses, b.losses):.1e}"
              f"  grad_norm {worst(a.norms, b.norms):.1e}  same choices {a.chosen == b.chosen}")


# ---- the tie to the ecosystem ----------------------------------------------------------------------------------------

class InDouble(torch.overrides.TorchFunctionMode):
    """transformers casts norms, softmaxes and rotary angles to float32 by name; here such casts give float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def hf_weights(w, c):
    """Our tensors under the names of a Mixtral or Llama checkpoint: slices, never a permutation."""
    out = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"]}
    for l in range(c.L):
        at = f"model.layers.{l}."
        q, k, v = w[f"qkv.{l}"].split([c.H * c.D, c.KV * c.D, c.KV * c.D])
        out |= {at + "self_attn.q_proj.weight": q, at + "self_attn.k_proj.weight": k, at + "self_attn.v_proj.weight": v,
                at + "self_attn.o_proj.weight": w[f"proj.{l}"], at + "input_layernorm.weight": w[f"norm1.{l}"],
                at + "post_attention_layernorm.weight": w[f"norm2.{l}"]}
        if c.moe[l]:
            out[at + "block_sparse_moe.gate.weight"] = w[f"router.{l}"]
            for e in range(c.E):
                gate, up = w[f"w_in.{l}"][e].chunk(2)
                expert = at + f"block_sparse_moe.experts.{e}."
                out |= {expert + "w1.weight": gate, expert + "w3.weight": up, expert + "w2.weight": w[f"w_out.{l}"][e]}
        else:
            gate, up = w[f"dense_in.{l}"].chunk(2)
            out |= {at + "mlp.gate_proj.weight": gate, at + "mlp.up_proj.weight": up,
                    at + "mlp.down_proj.weight": w[f"dense_out.{l}"]}
    return out


def unfuse(grads):
    """Newer versions of transformers hold all experts of a layer in two tensors: back to the names of the file."""
    out = {}
    for name, x in grads.items():
        name = name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
        layer = name.split(".mlp.experts.")[0] + ".block_sparse_moe.experts."
        for e in range(x.shape[0] if ".mlp.experts." in name else 0):
            if name.endswith("gate_up_proj"):
                out[f"{layer}{e}.w1.weight"], out[f"{layer}{e}.w3.weight"] = x[e].chunk(2)
            else:
                out[f"{layer}{e}.w2.weight"] = x[e]
        if ".mlp.experts." not in name:
            out[name] = x
    return out


def check_transformers():
    import transformers
    from safetensors.torch import save_file
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    transformers.logging.set_verbosity_error()
    print("transformers", transformers.__version__)
    for recipe in ("mixtral", "dense"):
        c = types.SimpleNamespace(**dict(RECIPES[recipe], V=61, L=3, C=48, H=6, KV=3, D=8, E=5, K=2, F=20, T=40, B=3))
        c.moe = [recipe == "mixtral"] * c.L
        torch.manual_seed(1)
        w = {name: 0.3 * torch.randn(shape, dtype=torch.float64) + (len(shape) == 1)
             for name, shape in tensor_shapes(c)}
        block = torch.randint(c.V, (c.B, c.T + 1))
        tokens, targets = block[:, :-1], block[:, 1:]
        sizes = dict(vocab_size=c.V, hidden_size=c.C, num_hidden_layers=c.L, num_attention_heads=c.H,
                     num_key_value_heads=c.KV, rms_norm_eps=EPS, rope_theta=THETA, tie_word_embeddings=True,
                     max_position_embeddings=c.T, bos_token_id=0, eos_token_id=0)
        if recipe == "mixtral":
            config = transformers.MixtralConfig(intermediate_size=c.F, num_local_experts=c.E, num_experts_per_tok=c.K,
                                                architectures=["MixtralForCausalLM"], **sizes)
        else:
            config = transformers.LlamaConfig(intermediate_size=c.K * c.F, architectures=["LlamaForCausalLM"], **sizes)
        config._experts_implementation = "eager"
        with tempfile.TemporaryDirectory() as folder, InDouble():
            config.save_pretrained(folder)
            save_file({name: x.contiguous() for name, x in hf_weights(w, c).items()},
                      os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, config=config,
                                                                      attn_implementation="eager")
            extra = {"output_router_logits": True} if recipe == "mixtral" else {}
            theirs = model(tokens, use_cache=False, **extra)
            cross_entropy(theirs.logits, targets).backward()
            # theirs is K at balance, and taken over all layers at once: layer by layer, divided by K, it is ours
            router_logits = theirs.router_logits if extra else ()
            their_aux = sum(load_balancing_loss_func((x,), c.E, c.K) / c.K for x in router_logits)
        for x in w.values():
            x.requires_grad_()
        logits, aux, _ = forward(w, tokens, c)
        cross_entropy(logits, targets).backward()
        ours = hf_weights({name: x.grad for name, x in w.items()}, c)
        grads = unfuse({name: x.grad for name, x in model.named_parameters()})
        assert set(ours) == set(grads), set(ours) ^ set(grads)
        errors = [(logits - theirs.logits).abs().max().item(), abs((aux - their_aux).item()),
                  max((ours[name] - grads[name]).abs().max().item() for name in ours)]
        print(f"{recipe}: largest difference of logits {errors[0]:.1e}, balance loss {errors[1]:.1e}, "
              f"gradients of {len(ours)} tensors {errors[2]:.1e}")
        assert max(errors) < 1e-10
    # our AdamW against PyTorch's own
    ours = {"a": torch.randn(5, 7, dtype=torch.float64), "b": torch.randn(9, dtype=torch.float64)}
    theirs = {name: x.clone().requires_grad_() for name, x in ours.items()}
    m, v = ({name: torch.zeros_like(x) for name, x in ours.items()} for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [theirs["a"]], "weight_decay": DECAY},
                                   {"params": [theirs["b"]], "weight_decay": 0.0}],
                                  lr=LR, betas=(BETA1, BETA2), eps=ADAM_EPS)
    for step in range(1, 8):
        g = {name: torch.randn_like(x) / step for name, x in ours.items()}
        for name, x in theirs.items():
            x.grad = g[name].clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), CLIP)  # differs from ours by an epsilon of 1e-6
        optimizer.step()
        adamw(ours, g, m, v, step)
    error = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    print(f"AdamW: largest difference after 7 steps {error:.1e} (PyTorch's clipping adds 1e-6 to the norm)")
    assert error < 1e-7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden.h"))
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--check-transformers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check_transformers:
        return check_transformers()
    if args.float32:
        return report_float32()
    results = [golden(recipe) for recipe in RECIPES]
    for r in results:
        print(f"{r.recipe:8} loss {r.losses[0]:.6f} -> {r.losses[-1]:.6f}  aux {r.auxes[0]:.6f}  "
              f"grad_norm {r.norms[0]:.6f}  dropped {r.dropped}  smallest margin of a choice {r.margin:.2e}"
              f"  smallest gradient {r.least:.2e}")
        assert r.margin > 1e-4, "a near-tie: float32 may choose otherwise"
        assert r.least > 1e-7, "AdamW's first step would make much of a gradient of which float32 knows little"
    assert results[1].dropped > 0
    write_header(args.out, results)
    print("wrote", args.out)


if __name__ == "__main__":
    main()
