"""GPT-2 in plain PyTorch, timed: what someone trains with who does not use this project.

    python3 dev/bench/torch_baseline.py [--model d12] [--batch 64] [--seq-len 1024] [--steps 30] [--compile] [--json]

The way of training is the common one: parameters, gradients and AdamW's state in fp32, torch.autocast to bf16 for the
arithmetic, F.scaled_dot_product_attention, AdamW(fused=True), gradients clipped to norm 1, the vocabulary padded to a multiple
of 128, TF32 allowed for what is left in fp32. --compile adds torch.compile on the whole model. --parameters bf16 keeps
parameters and AdamW's state in bf16, which takes less memory and rounds small updates away; it is the other end of the scale.

Steps are timed by events on the GPU, which is waited for once, at the end. Prints a line of JSON with --json; memory there is
PyTorch's own account (allocated_bytes, reserved_bytes), without the driver's share. Runs on a CPU too, slowly, to be tried.
"""
import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import time
from array import array

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    sys.exit("torch_baseline.py: this Python has no PyTorch; install it (pytorch.org) or run another Python")

DEPTHS = {"d12": (12, 12, 768), "d24": (24, 16, 1024), "d36": (36, 20, 1280), "d48": (48, 25, 1600)}  # layers, heads, channels


def sizes(text):
    """(layers, heads, channels, positions, vocabulary) of d12 or gpt2:L2,H2,C64,T32,V257"""
    name = text[5:] if text.startswith("gpt2:") else text
    if name in DEPTHS:
        return (*DEPTHS[name], 1024, 50257)
    if re.fullmatch(r"([LHCTV]\d+)(,[LHCTV]\d+)*", name):
        given = {"T": 1024, "V": 50257, **{part[0]: int(part[1:]) for part in name.split(",")}}
        if {"L", "H", "C"} <= set(given) and min(given.values()) > 0 and given["C"] % given["H"] == 0:
            return tuple(given[k] for k in "LHCTV")
    raise argparse.ArgumentTypeError(f"{text}: expected one of {' '.join(DEPTHS)}, or a size like gpt2:L2,H2,C64,T32,V257")


def attention_by_hand(q, k, v):
    """For a PyTorch that is too old to have the function: it stores T x T scores."""
    T = q.size(-2)
    s = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return s.softmax(-1).to(v.dtype) @ v


HAS_SDPA = hasattr(F, "scaled_dot_product_attention")


class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if HAS_SDPA else attention_by_hand(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(C), Attention(C, heads)
        self.ln2, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, L, heads, C, positions, V):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(-(-V // 128) * 128, C), nn.Embedding(positions, C)
        self.blocks = nn.ModuleList(Block(C, heads) for _ in range(L))
        self.norm = nn.LayerNorm(C)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                into_stream = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if into_stream else 0.02)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # the head is the embedding
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def read_tokens(path, V):
    """A token file of 16 bits: a header of 256 int32, then the ids."""
    with open(path, "rb") as f:
        head = array("i", f.read(1024))
        body = array("H", f.read())
    if len(head) < 3 or head[0] != 20240520 or head[1] != 1 or head[2] != len(body):
        sys.exit(f"torch_baseline.py: {path}: expected a token file of 16 bits, as gpu.sh or prepro/text.py writes")
    ids = torch.tensor(body.tolist(), dtype=torch.long)
    if int(ids.max()) >= V:
        sys.exit(f"torch_baseline.py: {path}: token {int(ids.max())} is not in the vocabulary of {V}")
    return ids


class Batches:
    """Sequences one behind the other, from the file or at random; moved to the device from pinned memory."""

    def __init__(self, path, B, T, V, device):
        n = B * T + 1
        if path:
            self.ids = read_tokens(path, V)
        else:
            self.ids = torch.randint(V, (max(1 << 16, 4 * n),), generator=torch.Generator().manual_seed(1))
        if len(self.ids) < n:
            sys.exit(f"torch_baseline.py: {path}: {len(self.ids)} tokens are fewer than a batch, {n}")
        self.at, self.shape, self.device = 0, (B, T), device

    def next(self):
        B, T = self.shape
        if self.at + B * T + 1 > len(self.ids):
            self.at = 0
        part = self.ids[self.at:self.at + B * T + 1]
        self.at += B * T
        pair = torch.stack([part[:-1], part[1:]])
        if self.device.type == "cuda":
            pair = pair.pin_memory().to(self.device, non_blocking=True)
        return pair[0].view(B, T), pair[1].view(B, T)


def train(a, device):
    notes = []
    cuda = device.type == "cuda"
    torch.manual_seed(1)
    if hasattr(torch, "set_float32_matmul_precision"):
        torch.set_float32_matmul_precision("high")
    L, heads, C, positions, V = a.model
    with device if hasattr(device, "__enter__") else contextlib.nullcontext():  # parameters are made where they stay
        model = GPT2(L, heads, C, positions, V)
    model = model.to(device)
    low = a.parameters == "bf16"
    if low:
        model = model.to(torch.bfloat16)
    parameters = list(model.parameters())
    fused = cuda
    groups = [{"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    try:
        optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **({"fused": True} if fused else {}))
    except TypeError:
        optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
        notes.append("this PyTorch has no fused AdamW")
    if not HAS_SDPA:
        notes.append("this PyTorch has no scaled_dot_product_attention: attention is written out")
    run = model
    if a.compile:
        if not hasattr(torch, "compile"):
            sys.exit(f"torch_baseline.py: --compile: PyTorch {torch.__version__} has no torch.compile; expected 2.0 or later")
        run = torch.compile(model)

    batches = Batches(a.data, a.batch, a.seq_len, V, device)
    marks, losses, begin, first = [], [], time.perf_counter(), None

    def mark():
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    for step in range(a.steps):
        marks.append(mark())
        ids, targets = batches.next()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not low):
            loss = run(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            if cuda:
                torch.cuda.synchronize()
            first = time.perf_counter() - begin
    marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    ms = [begun.elapsed_time(ended) if cuda else (ended - begun) * 1e3 for begun, ended in zip(marks, marks[1:])]
    ms = ms[min(a.warmup, a.steps - 1):]
    middle = statistics.median(ms)
    result = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
              "torch_cuda": torch.version.cuda, "compiled": a.compile,
              "parameters": sum(p.numel() for p in parameters), "parameter_bytes": 8 if low else 16,
              "B": a.batch, "T": a.seq_len, "steps": a.steps, "timed_steps": len(ms), "ms": round(middle, 3),
              "ms_least": round(min(ms), 3), "ms_most": round(max(ms), 3),
              "tokens_per_s": round(a.batch * a.seq_len / middle * 1e3, 1),
              "loss": round(float(losses[-1]), 4), "first_step_s": round(first, 2),
              "allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
              "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None}
    if notes:
        result["note"] = "; ".join(notes)
    return result


def main():
    parser = argparse.ArgumentParser(description="Times GPT-2's training in PyTorch.")
    parser.add_argument("--model", type=sizes, default=sizes("d12"), metavar="SIZE",
                        help="d12, d24, d36, d48, or a size like gpt2:L2,H2,C64,T32,V257 (d12)")
    parser.add_argument("-b", "--batch", type=int, default=64, metavar="B", help="sequences in a step (64)")
    parser.add_argument("-t", "--seq-len", type=int, default=1024, metavar="T", help="tokens in a sequence (1024)")
    parser.add_argument("-x", "--steps", type=int, default=30, metavar="N", help="(30)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps that are not timed (5)")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--parameters", choices=("fp32", "bf16"), default="fp32",
                        help="what parameters and AdamW's state are kept in (fp32)")
    parser.add_argument("--data", metavar="FILE", help="a token file of 16 bits (random tokens)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(the GPU, if there is one)")
    parser.add_argument("--json", action="store_true", help="prints a line of JSON")
    a = parser.parse_args()
    for name in ("batch", "seq_len", "steps"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: expected 1 or more")
    if a.warmup < 0:
        parser.error(f"--warmup {a.warmup}: expected 0 or more")
    if a.seq_len > a.model[3]:
        parser.error(f"--seq-len {a.seq_len}: the model's longest sequence is {a.model[3]}")
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch_baseline.py: --device cuda: PyTorch sees no GPU")
    device = torch.device("cuda" if a.device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        result = train(a, device)
    except RuntimeError as e:
        if "out of memory" in str(e).lower():
            sys.exit(f"torch_baseline.py: out of memory at --batch {a.batch}; take a smaller one")
        raise
    if a.json:
        print(json.dumps(result))
    else:
        peak = f", {result['reserved_bytes'] / 2**30:.2f} GiB reserved" if result["reserved_bytes"] else ""
        print(f"{result['device']}, PyTorch {result['torch']}: {result['ms']:.2f} ms a step, "
              f"{result['tokens_per_s']:,.0f} tokens/s{peak}, loss {result['loss']:.4f}"
              + (f" ({result['note']})" if "note" in result else ""))


if __name__ == "__main__":
    main()
