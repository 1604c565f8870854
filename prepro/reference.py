"""What a GPT-2 or a Llama must compute, from PyTorch: a model, and beside it the numbers that a trainer has to find.

    python3 prepro/reference.py --config L2,H3,C96,T48,V301 --batch 2 --seq 40 --seed 1 --out PREFIX
        writes PREFIX.bin, a random GPT-2, and PREFIX_state.bin, a debug state for test_gpt2
    python3 prepro/reference.py --from MODEL.bin --batch 4 --seq 64 --out PREFIX
        writes PREFIX_state.bin for a model that is there, fp32 or bf16
    python3 prepro/reference.py llama --config L2,H4,K2,C96,F256,T48,V301,HS24 --rope llama3 --tied --out DIR
        writes DIR, a random Llama as a directory of Hugging Face's, and DIR_expected.safetensors
    ... --approxbp [--act-bits 2 | --act-fit slope]
        what a build with APPROX_ACT=2 must compute: the activation is exact, its derivative is that of the
        codes (prepro/codes.py). MS_NORM=1 is exact, so the numbers without --approxbp are its own

A state holds a batch, the logits, the loss, all gradients and the losses of --steps AdamW steps on that batch (the i-th before
update i; rate 1e-4, betas 0.9 and 0.999, eps 1e-8, decay 0.01 on 2-D tensors alone, no clipping). ./test_gpt2 PREFIX.bin
PREFIX_state.bin checks a trainer by it. DIR_expected.safetensors holds the same as tensors: x, y, logits, loss, losses, and each
gradient under its weight's name (of a tied weight: the embedding's). There beta2 is 0.95 and the decay --decay.

From Python, compute() also trains adapters beside a frozen model (tune=Tuning(...)), and documents packed into rows, some of whose
tokens have no loss (begins=, trained=). A base of NF4 is its matrices as they are dequantized: tensors like any others.

The models are written from the papers (Vaswani 2017, Radford 2019, Hendrycks 2016; Zhang 2019, Shazeer 2020, Su 2021, Ainslie 2023,
Touvron 2023; Hu 2021), not from a trainer. All is computed in float64 and written as float32, so of a difference the reference's own rounding
is 6e-8, and the rest is the trainer's. PyTorch 1.13 and later; a parameter takes about 40 bytes, so a GPT-2 124M needs 5 GB and its
activations.
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
import codes
import hf
from binfmt import Config, Error

try:
    import torch
except ImportError:
    raise SystemExit("reference.py needs PyTorch: apt-get install python3-torch, or pip install torch in a venv") from None

# ---- what both have --------------------------------------------------------------------------------

def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

def silu(x):
    return x * torch.sigmoid(x)

ACTIVATIONS = {"gelu-tanh": gelu, "silu": silu}

class Coded(torch.autograd.Function):
    """The forward pass is the activation's own. The backward pass knows of x just its code."""

    @staticmethod
    def forward(ctx, x, function, bits):
        ctx.slopes = codes.CODES[function][bits][1]
        ctx.save_for_backward(torch.from_numpy(codes.codes(x.detach().numpy(), function, bits)))
        return ACTIVATIONS[function](x)

    @staticmethod
    def backward(ctx, dout):
        (code,) = ctx.saved_tensors
        return dout * torch.tensor(ctx.slopes, dtype=dout.dtype)[code.long()], None, None

class CodedActivation:
    """An activation by codes of so many bits, which notes per call how near an x came to a threshold: nearer
    than a trainer's rounding, and its code may be another."""

    def __init__(self, bits, function="gelu-tanh"):
        self.bits, self.function, self.thresholds, self.calls = bits, function, codes.thresholds(function, bits), []

    def __call__(self, x):
        distance = np.abs(x.detach().numpy()[..., None] - self.thresholds).min()
        self.calls.append((x.numel(), float(distance)))
        return Coded.apply(x, self.function, self.bits)

def heads(x, n):
    """(B,T,n*HS) to (B,n,T,HS)."""
    return x.reshape(*x.shape[:2], n, -1).transpose(1, 2)

def attention(q, k, v, begins):
    """q (B,NH,T,HS); k and v may have fewer heads, each of which serves NH/NKV neighbours. Returns (B,T,NH*HS). begins (B,T) is where
    each token's document begins: it sees nothing before."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    at = torch.arange(q.shape[2])
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    hidden = (at > at[:, None]) | (at < begins[:, None, :, None])
    p = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    return (p @ v).transpose(1, 2).flatten(2)

def delta(x, adapter):
    """What an adapter (A, B, s) adds: s (x A^T) B^T."""
    A, B, s = adapter
    return s * ((x @ A.T) @ B.T)

def cross_entropy(logits, y, trained=None):
    """The mean over all tokens, or over those that are trained (B,T)."""
    logp = logits - torch.logsumexp(logits, -1, keepdim=True)
    losses = -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return losses.mean() if trained is None else losses[trained].mean()

def for_bf16(values):
    """Rounded to what bf16 can hold, so that a bf16 build starts from the same model, and what is measured is how it computes."""
    return binfmt.from_bf16(binfmt.to_bf16(values.astype(np.float32)))

# ---- GPT-2 -----------------------------------------------------------------------------------------

def layernorm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w + b

GPT2_MODULES = {"qkv": "attn.c_attn", "attproj": "attn.c_proj", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}

def gpt2_forward(params, config, x, begins, activation=gelu, adapters=None):
    """params: {name: tensor, or a list with one per layer}. Returns logits (B,T,V). q, k and v may have adapters of their own, which
    adapters calls transformer.h.0.attn.c_attn.q and so on."""
    adapters = adapters or {}
    h = params["wte"][x] + params["wpe"][torch.arange(x.shape[1]) - begins]
    for l in range(config.L):
        p = {name: value[l] for name, value in params.items() if isinstance(value, list)}

        def linear(x, name):
            module = f"transformer.h.{l}.{GPT2_MODULES[name]}"
            y = x @ p[f"{name}w"].T + p[f"{name}b"]
            if module in adapters:
                y = y + delta(x, adapters[module])
            if name == "qkv":
                return [part + delta(x, adapters[f"{module}.{which}"]) if f"{module}.{which}" in adapters else part
                        for which, part in zip("qkv", y.split(config.C, dim=2))]
            return y
        a = layernorm(h, p["ln1w"], p["ln1b"])
        a = attention(*(heads(part, config.NH) for part in linear(a, "qkv")), begins)
        h = h + linear(a, "attproj")
        a = layernorm(h, p["ln2w"], p["ln2b"])
        h = h + linear(activation(linear(a, "fc")), "fcproj")
    h = layernorm(h, params["lnfw"], params["lnfb"])
    return h @ params["wte"][: config.V].T  # the head is the embedding; its padding has no logits

def gpt2_model(config, seed):
    """Weights under which every path carries something of order one.

    GPT-2's own initialisation would not test much: gammas of one and zero biases hide a missing
    factor, and near-equal scores hide a wrong mask.
    """
    rng = np.random.RandomState(seed)  # the one generator whose numbers numpy has frozen for good
    tensors = {}
    for name, shape in config.shapes().items():
        values = rng.randn(*shape)
        if name == "wpe":
            values *= 0.5
        elif name in ("ln1w", "ln2w", "lnfw"):
            values = 1 + 0.2 * values
        elif name.endswith("b"):
            values *= 0.2
        else:  # a matrix, or wte as the head: outputs as large as inputs
            values /= math.sqrt(shape[-1])
        tensors[name] = for_bf16(values)
    tensors["wte"][config.V:] = 0
    return tensors

# ---- Llama and its like ----------------------------------------------------------------------------

@dataclass(frozen=True)
class LlamaConfig:
    kind: str           # model_type: llama, mistral, qwen2 (biases of q, k, v), qwen3 (norms of each head's q and k)
    L: int              # layers
    NH: int             # heads
    NKV: int            # of keys and values
    C: int              # channels
    F: int              # channels inside the MLP
    maxT: int           # positions
    V: int              # vocabulary
    HS: int             # channels of a head
    theta: float
    scaling: dict       # rope_scaling, or None
    eps: float
    tied: bool          # the head is the embedding

    @staticmethod
    def parse(text, kind, theta, scaling, eps, tied):
        """'L2,H4,K2,C96,F256,T48,V301,HS24', with or without a leading 'llama:'; K is H, and HS is C/H, where they are left out."""
        found = binfmt.sizes(text, "llama", "L H C F T V".split(), ("K", "HS"), "layers, heads, heads of keys and values, channels, "
                             "the MLP's, positions, vocabulary, a head's channels as in L2,H4,K2,C96,F256,T48,V301,HS24")
        L, H, C, F, T, V = (found[name] for name in "LHCFTV")
        K, HS = found.get("K", H), found.get("HS", C // H)
        if H % K or HS % 2:
            raise Error(f"{text}: {H} heads with {K} of keys and values, {HS} channels each: expected a multiple, and an even number")
        return LlamaConfig(kind, L, H, K, C, F, T, V, HS, theta, scaling, eps, tied)

    def shapes(self):
        C, Q, KV = self.C, self.NH * self.HS, self.NKV * self.HS
        layer = {"input_layernorm.weight": (C,), "self_attn.q_proj.weight": (Q, C), "self_attn.k_proj.weight": (KV, C),
                 "self_attn.v_proj.weight": (KV, C), "self_attn.o_proj.weight": (C, Q), "post_attention_layernorm.weight": (C,),
                 "mlp.gate_proj.weight": (self.F, C), "mlp.up_proj.weight": (self.F, C), "mlp.down_proj.weight": (C, self.F)}
        if self.kind == "qwen2":
            layer |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", Q), ("k", KV), ("v", KV))}
        if self.kind == "qwen3":
            layer |= {f"self_attn.{name}_norm.weight": (self.HS,) for name in "qk"}
        return {"model.embed_tokens.weight": (self.V, C),
                **{f"model.layers.{l}.{name}": shape for l in range(self.L) for name, shape in layer.items()},
                "model.norm.weight": (C,), **({} if self.tied else {"lm_head.weight": (self.V, C)})}

    def count(self):
        return sum(map(math.prod, self.shapes().values()))

    def json(self, version, dtype):
        """config.json, as transformers 4 or 5 writes it."""
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[self.kind]
        found = {
            "architectures": [f"{name}ForCausalLM"], "model_type": self.kind, "hidden_size": self.C, "intermediate_size": self.F,
            "num_hidden_layers": self.L, "num_attention_heads": self.NH, "num_key_value_heads": self.NKV, "head_dim": self.HS,
            "max_position_embeddings": self.maxT, "vocab_size": self.V, "rms_norm_eps": self.eps, "tie_word_embeddings": self.tied,
            "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
        if self.kind != "mistral":
            found["attention_bias"] = False  # qwen2 has its biases whatever this says
        if self.kind == "llama":
            found["mlp_bias"] = False
        else:
            found["sliding_window"] = None
        if self.kind.startswith("qwen"):
            found["use_sliding_window"] = False
        if version == 5:
            return found | {"rope_parameters": {"rope_theta": self.theta, **(self.scaling or {"rope_type": "default"})}, "dtype": dtype}
        return found | {"rope_theta": self.theta, "rope_scaling": self.scaling, "torch_dtype": dtype}

    def branches(self):
        """Of the frequencies, how many llama3's scaling leaves, mixes and divides: where it meets a case of three."""
        wave, s = 2 * math.pi / self.inv_freq(scaled=False), self.scaling
        fast, slow = (s["original_max_position_embeddings"] / s[f"{which}_freq_factor"] for which in ("high", "low"))
        return [int(n.sum()) for n in (wave < fast, (wave >= fast) & (wave <= slow), wave > slow)]

    def inv_freq(self, scaled=True):
        """Radians that a position turns each pair of channels by, (HS/2)."""
        f = self.theta ** (-torch.arange(0, self.HS, 2, dtype=torch.float64) / self.HS)
        s = self.scaling
        if not scaled or s is None:
            return f
        if s["rope_type"] == "linear":
            return f / s["factor"]
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)  # in the context that the model was first trained on
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast ones stay; 0: slow ones are divided
        return keep * f + (1 - keep) * f / s["factor"]

def rmsnorm(x, w, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w

def rope(x, angles):
    """x (B,n,T,HS): channels i and i + HS/2 turn by angles (...,T,HS/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

def llama_forward(params, config, x, begins, activation=silu, adapters=None):
    """params: {name: tensor}. Returns logits (B,T,V)."""
    adapters = adapters or {}
    h = params["model.embed_tokens.weight"][x]
    angles = (torch.arange(x.shape[1]) - begins)[:, None, :, None] * config.inv_freq()
    for l in range(config.L):
        start = f"model.layers.{l}."
        p = {name.removeprefix(start): t for name, t in params.items() if name.startswith(start)}

        def linear(x, name):
            y = x @ p[f"{name}_proj.weight"].T + p.get(f"{name}_proj.bias", 0)
            module = f"{start}{name}_proj"
            return y + delta(x, adapters[module]) if module in adapters else y
        a = rmsnorm(h, p["input_layernorm.weight"], config.eps)
        q, k, v = (heads(linear(a, f"self_attn.{name}"), n) for name, n in (("q", config.NH), ("k", config.NKV), ("v", config.NKV)))
        if config.kind == "qwen3":
            q, k = (rmsnorm(t, p[f"self_attn.{name}_norm.weight"], config.eps) for name, t in (("q", q), ("k", k)))
        h = h + linear(attention(rope(q, angles), rope(k, angles), v, begins), "self_attn.o")
        a = rmsnorm(h, p["post_attention_layernorm.weight"], config.eps)
        h = h + linear(activation(linear(a, "mlp.gate")) * linear(a, "mlp.up"), "mlp.down")
    h = rmsnorm(h, params["model.norm.weight"], config.eps)
    return h @ params.get("lm_head.weight", params["model.embed_tokens.weight"]).T

def llama_model(config, seed):
    """As gpt2_model. Gates are three times as large as the rest: the outer thresholds of the codes are at 6.3."""
    rng = np.random.RandomState(seed)
    tensors = {}
    for name, shape in config.shapes().items():
        values = rng.randn(*shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith("bias") or name == "model.embed_tokens.weight" and not config.tied:
            values *= 0.5
        else:
            values *= (3 if "gate" in name else 1) / math.sqrt(shape[-1])
        tensors[name] = for_bf16(values)
    return tensors

# ---- its numbers -----------------------------------------------------------------------------------

def random_batch(config, B, T, seed):
    """Small ids come often, so that rows of the embedding collect from many places; the first and the last id always come."""
    ids = (config.V * np.random.RandomState(seed + 1000003).rand(B, T + 1) ** 2).astype(np.int64)
    ids[0, 0], ids[0, -1] = config.V - 1, 0
    if isinstance(config, LlamaConfig):  # the rows are one text, as a trainer reads it from a file of tokens
        ids[1:, 0] = ids[:-1, -1]
    return ids[:, :-1], ids[:, 1:]

@dataclass
class Tuning:
    """What is trained beside a frozen model."""
    adapters: dict           # {module: (A (r, in), B (out, r), s)}; the modules are Hugging Face's, as in model.layers.0.self_attn.q_proj
    freeze_a: bool = False   # LoRA-FA
    norms: bool = False      # the norms' parameters are trained, too

def leaf(values, trained=True):
    return torch.tensor(values, dtype=torch.float64, requires_grad=trained)

def to_params(config, tensors, tune=None):
    """One leaf per layer, in float64: decay goes by a tensor's own rank, not by a file's stack of layers."""
    stacked = set() if isinstance(config, LlamaConfig) else set(tensors) - {"wte", "wpe", "lnfw", "lnfb"}
    trained = {name: tune is None or tune.norms and (name.startswith("ln") or name.endswith("norm.weight")) for name in tensors}
    return {name: [leaf(layer, trained[name]) for layer in t] if name in stacked else leaf(t, trained[name]) for name, t in tensors.items()}

GPT2_NORMS = {"ln1": "transformer.h.{}.ln_1", "ln2": "transformer.h.{}.ln_2", "lnf": "transformer.ln_f"}

def trained_leaves(params, adapters):
    """{name: leaf}: PEFT's names where a base is frozen, else a model's; of GPT-2's layers, (name, layer)."""
    named = {}
    for name, value in params.items():
        for layer, p in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if p.requires_grad and adapters is None:
                named[name if layer is None else (name, layer)] = p
            elif p.requires_grad:
                hf_name = f"{GPT2_NORMS[name[:3]].format(layer)}.{'weight' if name[3] == 'w' else 'bias'}" if name[:3] in GPT2_NORMS else name
                named[f"base_model.model.{hf_name}"] = p
    for module, (A, B, _) in (adapters or {}).items():
        named |= {f"base_model.model.{module}.lora_{which}.weight": p for which, p in (("A", A), ("B", B)) if p.requires_grad}
    return named

def as_arrays(named):
    """{name: array}, with GPT-2's layers stacked as the model's file has them."""
    found = {}
    for name, t in named.items():
        found.setdefault(name[0] if isinstance(name, tuple) else name, []).append(t.detach().numpy().copy())
    return {name: np.stack(parts) if any(isinstance(key, tuple) and key[0] == name for key in named) else parts[0] for name, parts in found.items()}

def compute(config, tensors, x, y, steps, activation=None, beta2=0.999, decay=0.01, lr=1e-4, tune=None, begins=None, trained=None):
    """Returns logits, loss, gradients, the losses of the steps, and what is trained as it is after them. begins (B,T): where in its row
    each token's document begins; trained (B,T): which targets have a loss."""
    params = to_params(config, tensors, tune)
    adapters = tune and {module: (leaf(A, not tune.freeze_a), leaf(B), s) for module, (A, B, s) in tune.adapters.items()}
    named = trained_leaves(params, adapters)
    begins = torch.zeros_like(torch.from_numpy(x)) if begins is None else torch.from_numpy(begins)
    x, y, trained = torch.from_numpy(x), torch.from_numpy(y), None if trained is None else torch.from_numpy(trained)

    def forward():
        model, exact = (llama_forward, silu) if isinstance(config, LlamaConfig) else (gpt2_forward, gelu)
        return model(params, config, x, begins, activation or exact, adapters)
    logits = forward()
    loss = cross_entropy(logits, y, trained)
    loss.backward()
    result = logits.detach().numpy(), loss.item(), as_arrays({name: p.grad for name, p in named.items()})

    losses = []
    optimizer = torch.optim.AdamW([{"params": [p for p in named.values() if p.dim() == 2], "weight_decay": decay},
                                   {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, beta2), eps=1e-8)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(forward(), y, trained)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return (*result, losses, as_arrays(named))

# ----------------------------------------------------------------------------

def gpt2_write(a, config, tensors, x, y, logits, loss, grads, losses):
    """Returns the names of what it wrote."""
    with binfmt.writing(a.out):
        if not a.model:
            os.makedirs(os.path.dirname(os.path.abspath(a.out)), exist_ok=True)
            binfmt.write_model(f"{a.out}.bin", config, tensors)
        binfmt.write_state(f"{a.out}_state.bin", config, x, y, logits, loss, grads, losses)
    return f"{'' if a.model else a.out + '.bin and '}{a.out}_state.bin"

def llama_write(a, config, tensors, x, y, logits, loss, grads, losses):
    out = a.out.rstrip("/")
    numbers = {"x": np.asarray(x, np.int32), "y": np.asarray(y, np.int32)}
    numbers |= {name: np.asarray(t, np.float32) for name, t in {"logits": logits, "loss": loss, "losses": losses, **grads}.items()}
    weights = {name: binfmt.to_bf16(t) for name, t in tensors.items()} if a.dtype == "bf16" else tensors
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[a.dtype]
    hf.write_directory(out, {"config.json": config.json(a.transformers, dtype), "model.safetensors": weights},
                       {f"{out}_expected.safetensors": numbers})
    return f"{out}/ and {out}_expected.safetensors"

def llama_config(a):
    given = {name: value for name in ("factor", "low", "high", "original") if (value := getattr(a, f"rope_{name}")) is not None}
    allowed = {"none": (), "linear": ("factor",), "llama3": ("factor", "low", "high", "original")}[a.rope]
    for name in given:
        if name not in allowed:
            raise Error(f"--rope-{name} {given[name]:g}: is not for --rope {a.rope}")
    for name, value in {**given, "theta": a.theta}.items():
        if not 0 < value < math.inf:
            raise Error(f"--{'' if name == 'theta' else 'rope-'}{name} {value:g}: expected a number above 0")
    if not 0 <= a.eps < math.inf or not 0 <= a.decay < math.inf:
        raise Error(f"--eps {a.eps:g} --decay {a.decay:g}: expected numbers of 0 or more")
    scaling = None if a.rope == "none" else {"rope_type": a.rope, "factor": given.get("factor", 8.0)}
    if a.rope == "llama3":
        scaling |= {"low_freq_factor": given.get("low", 1.0), "high_freq_factor": given.get("high", 4.0),
                    "original_max_position_embeddings": given.get("original", 32)}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise Error(f"--rope-high {scaling['high_freq_factor']:g}: expected more than --rope-low, {scaling['low_freq_factor']:g}")
    return LlamaConfig.parse(a.config, a.type, a.theta, scaling, a.eps, a.tied)

MOST_SEEDS = 1000

def work(a):
    llama = a.family == "llama"
    tensors, make, write, function = None, *((llama_model, llama_write, "silu") if llama else (gpt2_model, gpt2_write, "gelu-tanh"))
    if llama:
        config, adamw = llama_config(a), {"beta2": 0.95, "decay": a.decay}
    elif a.model:
        (config, tensors), adamw = binfmt.read_model(a.model), {}
    else:
        config, adamw = Config.parse(a.config), {}
    if not 0 < a.seq <= config.maxT or a.batch <= 0:
        raise Error(f"--batch {a.batch} --seq {a.seq}: expected at least 1, and 1 to {config.maxT}, the model's positions")
    if not 0 <= a.seed < 2**31:
        raise Error(f"--seed {a.seed}: expected 0 to {2**31 - 1}")
    if a.steps < 0:
        raise Error(f"--steps {a.steps}: expected 0 or more")
    if a.act_bits is not None and not a.approxbp:
        raise Error(f"--act-bits {a.act_bits}: codes come with --approxbp; add it")
    if a.margin is not None and not (a.approxbp and 0 < a.margin < math.inf):
        raise Error(f"--margin {a.margin:g}: expected a distance above 0, and --approxbp")
    if a.act_fit == "slope" and not (a.approxbp and a.act_bits in (None, 2)):
        raise Error("--act-fit slope: is for --approxbp with 2 bits; leave --act-bits out")
    bits, given = a.act_bits or 2, tensors
    for seed in range(a.seed, a.seed + MOST_SEEDS):
        tensors = given or make(config, seed)
        x, y = random_batch(config, a.batch, a.seq, seed)
        activation = CodedActivation("slope" if a.act_fit == "slope" else bits, function) if a.approxbp else None
        logits, loss, grads, losses, _ = compute(config, tensors, x, y, a.steps, activation, **adamw)
        if a.margin is None or min(distance for _, distance in activation.calls) >= a.margin:
            break
    else:
        raise Error(f"--margin {a.margin:g}: no seed from {a.seed} to {seed} keeps every pre-activation that "
                    "far from a threshold; take a smaller batch, fewer steps or a smaller margin")
    wrote = write(a, config, tensors, x, y, logits, loss, grads, losses)
    binfmt.say(f"{config}, {config.count()} parameters, B={a.batch} T={a.seq}")
    if llama and a.rope == "llama3":
        binfmt.say("frequencies that llama3's scaling leaves, mixes, divides: {}, {}, {}".format(*config.branches()))
    if a.approxbp:
        first, later = activation.calls[:config.L], activation.calls[2 * config.L:]  # step 1 computes the first again
        binfmt.say(f"seed {seed}: {sum(n for n, _ in first)} pre-activations, codes of {bits} bit{'s' * (bits > 1)}, "
              f"none nearer to a threshold than {min(d for _, d in first):.3g}"
              + (f"; in steps 2 to {a.steps} {min(d for _, d in later):.3g}" if later else ""))
    binfmt.say(f"loss {loss:.9f}")
    binfmt.say(f"losses of {a.steps} steps: {' '.join(f'{v:.6f}' for v in losses)}")
    binfmt.say(f"norms of the gradients: {' '.join(f'{name} {np.linalg.norm(g):.3g}' for name, g in grads.items())}")
    binfmt.say(f"wrote {wrote}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    family = "llama" if sys.argv[1:2] == ["llama"] else "gpt2"
    if family == "llama":
        parser.prog += " llama"
        parser.add_argument("--config", metavar="SIZES", required=True, help="as in L2,H4,K2,C96,F256,T48,V301,HS24; K and HS may be left out")
        parser.add_argument("--type", choices=["llama", "mistral", "qwen2", "qwen3"], default="llama",
                            help="llama (default); mistral, of which only the name differs; qwen2 with biases of q, k, v; qwen3 with norms of q, k")
        parser.add_argument("--tied", action="store_true", help="the head is the embedding")
        parser.add_argument("--theta", type=float, default=10000.0, help="of RoPE (10000)")
        parser.add_argument("--rope", choices=["none", "linear", "llama3"], default="none", help="scaling of RoPE")
        parser.add_argument("--rope-factor", type=float, metavar="X", help="of the scaling (8)")
        parser.add_argument("--rope-low", type=float, metavar="X", help="llama3's low_freq_factor (1)")
        parser.add_argument("--rope-high", type=float, metavar="X", help="llama3's high_freq_factor (4)")
        parser.add_argument("--rope-original", type=int, metavar="N", help="llama3's original_max_position_embeddings (32)")
        parser.add_argument("--eps", type=float, default=1e-5, help="of the norms (1e-5)")
        parser.add_argument("--decay", type=float, default=0.01, metavar="X", help="of 2-D tensors, in the steps (0.01)")
        parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of model.safetensors: the same values (fp32)")
        parser.add_argument("--transformers", type=int, choices=[4, 5], default=4, help="whose config.json: rope_theta (4), or rope_parameters")
    else:
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--config", metavar="SIZES", help="a random model of these sizes, as in L2,H3,C96,T48,V301")
        source.add_argument("--from", dest="model", metavar="MODEL.bin", help="a model that is there")
    parser.add_argument("--batch", type=int, default=2, metavar="B")
    parser.add_argument("--seq", type=int, default=40, metavar="T")
    parser.add_argument("--seed", type=int, default=1, help="of the random model and of the batch")
    parser.add_argument("--steps", type=int, default=10, help="AdamW steps (10); 0 for none")
    parser.add_argument("--approxbp", action="store_true", help="the activation's derivative from codes, as with APPROX_ACT")
    parser.add_argument("--act-bits", type=int, choices=[1, 2, 3, 4], help="of a code (2)")
    parser.add_argument("--act-fit", choices=["function", "slope"], default="function", help="what 2 bits are near: h itself (function), or h'")
    parser.add_argument("--margin", type=float, metavar="X", help="with --approxbp: take the first seed from --seed on "
                        "with which no pre-activation of any step comes nearer than X to a threshold")
    parser.add_argument("--out", required=True, metavar="DIR" if family == "llama" else "PREFIX")
    a = parser.parse_args(sys.argv[1 + (family == "llama"):])
    a.family = family
    binfmt.run("reference.py", lambda: work(a))

if __name__ == "__main__":
    main()
