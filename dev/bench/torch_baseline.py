"""GPT-2 in plain PyTorch, timed: what someone trains with who does not use this project.

    python3 dev/bench/torch_baseline.py [-e d12] [-b 64] [-t 1024] [-x 30] [-i TOKENS.bin] [--compile] [--parameters bf16]

The way of training is the common one: parameters, gradients and AdamW's state in fp32, torch.autocast to bf16 for the
arithmetic, F.scaled_dot_product_attention, AdamW(fused=True), gradients clipped to norm 1, the vocabulary padded to a multiple
of 128, TF32 allowed for what is left in fp32. --compile adds torch.compile on the whole model. --parameters bf16 keeps
parameters and AdamW's state in bf16, which takes less memory and rounds small updates away; it is the other end of the scale.

Steps are timed by events on the GPU, which is waited for once, at the end; then each has its line, as the trainer prints it.
Memory is PyTorch's own account, without the driver's share. Runs on a CPU too, slowly, to be tried. (prepro/reference.py is
another GPT-2 in PyTorch: every formula written out, in float64, to test by.)
"""
import argparse
import contextlib
import math
import sys
import time
from array import array

from common import model_size, padded

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    sys.exit("torch_baseline.py: this Python has no PyTorch; install it (pytorch.org) or run another Python")

def attention_by_hand(q, k, v, is_causal):
    """For a PyTorch before 2.0, which does not have the function: it stores T x T scores."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v

attention = getattr(F, "scaled_dot_product_attention", attention_by_hand)

class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        return self.out(attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))

class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(C), Attention(C, heads)
        self.ln2, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))

class GPT2(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(padded(size.V), size.C), nn.Embedding(size.T, size.C)
        self.blocks = nn.ModuleList(Block(size.C, size.H) for _ in range(size.L))
        self.norm = nn.LayerNorm(size.C)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                into_stream = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * size.L) if into_stream else 0.02)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # the head is the embedding
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

def read_tokens(path, V):
    """A token file of 16 bits: a header of 256 int32, then the ids."""
    with open(path, "rb") as f:
        head, body = array("i", f.read(1024)), array("H", f.read())
    if list(head[:2]) != [20240520, 1] or head[2] != len(body) or max(body) >= V:
        sys.exit(f"torch_baseline.py: {path}: expected a token file of 16 bits, as prepro/text.py writes, with ids below {V}")
    return torch.tensor(body.tolist(), dtype=torch.long)

def batches(ids, B, T, device):
    """Sequences one after the other; moved to the device from pinned memory."""
    at = 0
    while True:
        part = ids[at:at + B * T + 1]
        pair = torch.stack([part[:-1], part[1:]])
        if device.type == "cuda":
            pair = pair.pin_memory().to(device, non_blocking=True)
        yield pair.view(2, B, T)
        at = at + B * T if at + 2 * B * T + 1 <= len(ids) else 0

def train(a, device):
    """(losses, milliseconds) of the steps."""
    cuda, low = device.type == "cuda", a.parameters == "bf16"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    with device if hasattr(device, "__enter__") else contextlib.nullcontext():  # parameters are made where they stay
        model = GPT2(a.size)
    model = model.to(device, torch.bfloat16 if low else torch.float32)
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **({"fused": True} if cuda else {}))
    run = torch.compile(model) if a.compile else model
    ids = read_tokens(a.data, a.size.V) if a.data else torch.randint(a.size.V, (max(1 << 16, 4 * a.batch * a.seq_len),))
    if len(ids) <= a.batch * a.seq_len:
        sys.exit(f"torch_baseline.py: {a.data}: {len(ids)} tokens are fewer than a batch")
    data, marks, losses = batches(ids, a.batch, a.seq_len, device), [], []

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    for step in range(a.steps):
        marks.append(mark())
        with torch.autocast(device.type, dtype=torch.bfloat16) if not low else contextlib.nullcontext():
            loss = run(*next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    ms = [begun.elapsed_time(ended) if cuda else (ended - begun) * 1e3 for begun, ended in zip(marks, marks[1:])]
    return [float(loss) for loss in losses], ms

def main():
    parser = argparse.ArgumentParser(description="Times GPT-2's training in PyTorch.")
    parser.add_argument("-e", "--model", default="d12", metavar="SIZE", help="d12, or a size like gpt2:L2,H2,C64,T32,V257 (d12)")
    parser.add_argument("-b", "--batch", type=int, default=64, metavar="B", help="sequences in a step (64)")
    parser.add_argument("-t", "--seq-len", type=int, default=1024, metavar="T", help="tokens in a sequence (1024)")
    parser.add_argument("-x", "--steps", type=int, default=30, metavar="N", help="(30)")
    parser.add_argument("-i", "--data", metavar="FILE", help="a token file of 16 bits (random tokens)")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--parameters", choices=("fp32", "bf16"), default="fp32", help="and AdamW's state are kept in (fp32)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(the GPU, if there is one)")
    a = parser.parse_args()
    try:
        a.size = model_size(a.model)
    except ValueError as e:
        parser.error(f"-e {e}")
    if min(a.batch, a.seq_len, a.steps) < 1 or a.seq_len > a.size.T:
        parser.error(f"-b {a.batch} -t {a.seq_len} -x {a.steps}: expected 1 or more, and at most {a.size.T} tokens in a sequence")
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"step       {a.batch} sequences x {a.seq_len} tokens; PyTorch {torch.__version__} on {a.device}", flush=True)
    try:
        losses, ms = train(a, torch.device(a.device))
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"torch_baseline.py: out of memory at -b {a.batch}; take a smaller one")
    for step, pair in enumerate(zip(losses, ms), 1):
        print(f"step {step:5d}/{a.steps} | loss {pair[0]:.4f} | {pair[1]:.2f} ms")
    if a.device == "cuda":
        print(f"{torch.cuda.max_memory_allocated()} bytes allocated, {torch.cuda.max_memory_reserved()} bytes reserved")

if __name__ == "__main__":
    main()
