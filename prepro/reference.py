"""What a GPT-2 must compute, from PyTorch: a model .bin and a debug state .bin for test_gpt2.

    python3 prepro/reference.py --config L2,H3,C96,T48,V301 --batch 2 --seq 40 --seed 1 --out PREFIX
        writes PREFIX.bin, a random model, and PREFIX_state.bin
    python3 prepro/reference.py --from MODEL.bin --batch 4 --seq 64 --out PREFIX
        writes PREFIX_state.bin for a model that is there, fp32 or bf16
    ... --approxbp [--act-bits 2]
        what a build with APPROX_ACT=2 must compute: GELU is exact, its derivative is that of the
        codes (prepro/codes.py). MS_NORM=1 is exact, so the numbers without --approxbp are its own

The state holds a batch, the logits, the loss, all gradients and the losses of --steps AdamW steps
on that batch (the i-th before update i; rate 1e-4, betas 0.9 and 0.999, eps 1e-8, decay 0.01 on
2-D tensors alone, no clipping). ./test_gpt2 PREFIX.bin PREFIX_state.bin checks a trainer by it.

The model is written from the papers (Vaswani 2017, Radford 2019, Hendrycks 2016), not from a trainer. It computes in float64 and
writes float32, so of a difference the reference's own rounding is 6e-8, and the rest is the trainer's. PyTorch 1.13 and later; a
parameter takes about 40 bytes, so a GPT-2 124M needs 5 GB and its activations.
"""
import argparse
import math
import os

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
import codes
from binfmt import Config, Error

try:
    import torch
except ImportError:
    raise SystemExit("reference.py needs PyTorch: apt-get install python3-torch, or pip install torch in a venv") from None

# ---- the model -------------------------------------------------------------------------------------

def layernorm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w + b

def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

class CodedGelu(torch.autograd.Function):
    """The forward pass is GELU's own. The backward pass knows of x just its code."""

    @staticmethod
    def forward(ctx, x, bits):
        ctx.bits = bits
        ctx.save_for_backward(torch.from_numpy(codes.codes(x.detach().numpy(), "gelu-tanh", bits)))
        return gelu(x)

    @staticmethod
    def backward(ctx, dout):
        (code,) = ctx.saved_tensors
        slopes = torch.tensor(codes.CODES["gelu-tanh"][ctx.bits][1], dtype=dout.dtype)
        return dout * slopes[code.long()], None

class CodedActivation:
    """GELU by codes of so many bits, which notes per call how near an x came to a threshold: nearer
    than a trainer's rounding, and its code may be another."""

    def __init__(self, bits):
        self.bits, self.thresholds, self.calls = bits, codes.thresholds("gelu-tanh", bits), []

    def __call__(self, x):
        distance = np.abs(x.detach().numpy()[..., None] - self.thresholds).min()
        self.calls.append((x.numel(), float(distance)))
        return CodedGelu.apply(x, self.bits)

def attention(x, NH):
    """x (B,T,3C): the queries of all heads, then the keys, then the values. Returns (B,T,C)."""
    B, T, C = x.shape[0], x.shape[1], x.shape[2] // 3
    q, k, v = (part.reshape(B, T, NH, C // NH).transpose(1, 2) for part in x.split(C, dim=2))  # (B,NH,T,HS)
    scores = q @ k.transpose(2, 3) / math.sqrt(C // NH)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    p = torch.softmax(scores.masked_fill(future, -math.inf), -1)
    return (p @ v).transpose(1, 2).reshape(B, T, C)

def forward(params, config, x, activation=gelu):
    """params: {name: tensor, or a list with one per layer}. Returns logits (B,T,V)."""
    h = params["wte"][x] + params["wpe"][: x.shape[1]]
    for l in range(config.L):
        p = {name: value[l] for name, value in params.items() if isinstance(value, list)}
        a = layernorm(h, p["ln1w"], p["ln1b"])
        a = attention(a @ p["qkvw"].T + p["qkvb"], config.NH)
        h = h + a @ p["attprojw"].T + p["attprojb"]
        a = layernorm(h, p["ln2w"], p["ln2b"])
        a = activation(a @ p["fcw"].T + p["fcb"])
        h = h + a @ p["fcprojw"].T + p["fcprojb"]
    h = layernorm(h, params["lnfw"], params["lnfb"])
    return h @ params["wte"][: config.V].T  # the head is the embedding; its padding has no logits

def cross_entropy(logits, y):
    logp = logits - torch.logsumexp(logits, -1, keepdim=True)
    return -logp.gather(-1, y.unsqueeze(-1)).mean()

# ---- its numbers -----------------------------------------------------------------------------------

def random_model(config, seed):
    """Weights under which every path carries something of order one.

    GPT-2's own initialisation would not test much: gammas of one and zero biases hide a missing
    factor, and near-equal scores hide a wrong mask. Values are rounded to what bf16 can hold, so
    that a bf16 build starts from the same model, and what is measured is how it computes.
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
        tensors[name] = binfmt.from_bf16(binfmt.to_bf16(values.astype(np.float32)))
    tensors["wte"][config.V:] = 0
    return tensors

def random_batch(config, B, T, seed):
    """Small ids come often, so that rows of the embedding collect from many places; the first and the last id always come."""
    ids = (config.V * np.random.RandomState(seed + 1000003).rand(B, T + 1) ** 2).astype(np.int64)
    ids[0, 0], ids[0, -1] = config.V - 1, 0
    return ids[:, :-1], ids[:, 1:]

def to_params(tensors):
    """One leaf per layer, in float64: decay goes by a tensor's own rank, not by the file's stack."""
    def leaf(values):
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)
    outside = ("wte", "wpe", "lnfw", "lnfb")
    return {name: leaf(t) if name in outside else [leaf(layer) for layer in t] for name, t in tensors.items()}

def leaves(params):
    return [leaf for value in params.values() for leaf in (value if isinstance(value, list) else [value])]

def gradients(params):
    """As the model's file has them: the layers stacked."""
    return {name: np.stack([leaf.grad.numpy() for leaf in value]) if isinstance(value, list)
            else value.grad.numpy().copy() for name, value in params.items()}

def compute(config, tensors, x, y, steps, activation=gelu):
    """Returns logits, loss, gradients and the losses of the steps."""
    params = to_params(tensors)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    logits = forward(params, config, x, activation)
    loss = cross_entropy(logits, y)
    loss.backward()
    result = logits.detach().numpy(), loss.item(), gradients(params)

    losses = []
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in leaves(params) if p.dim() == 2], "weight_decay": 0.01},
         {"params": [p for p in leaves(params) if p.dim() < 2], "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(forward(params, config, x, activation), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return (*result, losses)

# ----------------------------------------------------------------------------

MOST_SEEDS = 1000

def work(a):
    if a.model:
        config, tensors = binfmt.read_model(a.model)
    else:
        config = Config.parse(a.config)
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
    bits = a.act_bits or 2
    for seed in range(a.seed, a.seed + MOST_SEEDS):
        if not a.model:
            tensors = random_model(config, seed)
        x, y = random_batch(config, a.batch, a.seq, seed)
        activation = CodedActivation(bits) if a.approxbp else gelu
        logits, loss, grads, losses = compute(config, tensors, x, y, a.steps, activation)
        if a.margin is None or min(distance for _, distance in activation.calls) >= a.margin:
            break
    else:
        raise Error(f"--margin {a.margin:g}: no seed from {a.seed} to {seed} keeps every pre-activation that "
                    "far from a threshold; take a smaller batch, fewer steps or a smaller margin")
    with binfmt.writing(a.out):
        if not a.model:
            os.makedirs(os.path.dirname(os.path.abspath(a.out)), exist_ok=True)
            binfmt.write_model(f"{a.out}.bin", config, tensors)
        binfmt.write_state(f"{a.out}_state.bin", config, x, y, logits, loss, grads, losses)
    binfmt.say(f"{config}, {config.count()} parameters, B={a.batch} T={a.seq}")
    if a.approxbp:
        first, later = activation.calls[:config.L], activation.calls[2 * config.L:]  # step 1 computes the first again
        binfmt.say(f"seed {seed}: {sum(n for n, _ in first)} pre-activations, codes of {bits} bit{'s' * (bits > 1)}, "
              f"none nearer to a threshold than {min(d for _, d in first):.3g}"
              + (f"; in steps 2 to {a.steps} {min(d for _, d in later):.3g}" if later else ""))
    binfmt.say(f"loss {loss:.9f}")
    binfmt.say(f"losses of {a.steps} steps: {' '.join(f'{v:.6f}' for v in losses)}")
    binfmt.say(f"norms of the gradients: {' '.join(f'{name} {np.linalg.norm(g):.3g}' for name, g in grads.items())}")
    binfmt.say(f"wrote {'' if a.model else a.out + '.bin and '}{a.out}_state.bin")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="SIZES", help="a random model of these sizes, as in L2,H3,C96,T48,V301")
    source.add_argument("--from", dest="model", metavar="MODEL.bin", help="a model that is there")
    parser.add_argument("--batch", type=int, default=2, metavar="B")
    parser.add_argument("--seq", type=int, default=40, metavar="T")
    parser.add_argument("--seed", type=int, default=1, help="of the random model and of the batch")
    parser.add_argument("--steps", type=int, default=10, help="AdamW steps (10); 0 for none")
    parser.add_argument("--approxbp", action="store_true", help="GELU's derivative from codes, as with APPROX_ACT")
    parser.add_argument("--act-bits", type=int, choices=[1, 2, 3, 4], help="of a code (2)")
    parser.add_argument("--margin", type=float, metavar="X", help="with --approxbp: take the first seed from --seed on "
                        "with which no pre-activation of any step comes nearer than X to a threshold")
    parser.add_argument("--out", required=True, metavar="PREFIX")
    a = parser.parse_args()
    binfmt.run("reference.py", lambda: work(a))

if __name__ == "__main__":
    main()
