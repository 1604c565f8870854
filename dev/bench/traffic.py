"""How many bytes a training step of train_gpt2 moves, kernel by kernel, counted from the shapes.

    python3 dev/bench/traffic.py [-e d12] [-b 64] [-t 1024] [-d TOKENS] [--precision BF16]

Memory-bound kernels take the time that their bytes take, so this is what the modes of the backward pass cost or give back
before any GPU has run them. A kernel counts each tensor that it reads or writes once per launch; matmuls do too, and each chunk
of the loss has its own pass over the embedding's gradient. What a launch reads a second time is taken to be in a cache, where a
block reads it shortly after (a row of a norm, a row of logits). Keys and values, which every block of queries reads again, come
from memory as often as the simulation of the L2 cache says (l2.py; AGAIN below). The embedding's backward is counted with every
token of the vocabulary in the batch, or as many as it has places.

The table of launches follows train_gpt2.cu launch by launch, and dev/test/test_bench.py holds it to that: kernels and calls
against the profile of the CPU build, tensors against --estimate=json.
"""
import argparse
from collections import Counter, namedtuple

from common import model_size, padded

# bits: of an activation, 0 is exact; norm: one tensor for a norm and its matmul; r, ge: -r and -ge
Mode = namedtuple("Mode", "name flags bits norm r ge")
BASE = "exact"
MODES = [Mode(BASE, "-r 0 -ge 0", 0, False, 0, 0),
         Mode("exact, -r 1", "-r 1 -ge 0", 0, False, 1, 0),
         Mode("exact, -r 2", "-r 2 -ge 0", 0, False, 2, 0),
         Mode("exact, -ge 1", "-r 0 -ge 1", 0, False, 0, 1),
         Mode("exact, -ge 2", "-r 0 -ge 2", 0, False, 0, 2),
         Mode("APPROX_ACT=2", "-r 0 -ge 0", 2, False, 0, 0),
         Mode("MS_NORM=1", "-r 0 -ge 0", 0, True, 0, 0),
         Mode("MS_NORM=1, -r 1", "-r 1 -ge 0", 0, True, 1, 0),
         Mode("USE_APPROXBP=1", "-r 0 -ge 0", 2, True, 0, 0)]

# How often attention's kernels read the other side's tiles from memory: k and v, or q and dout in dkv. By l2.py for GPT-2 124M,
# B 64, T 1024, with 50 MB of L2; dev/test/test_dev_cuda.py compares.
AGAIN = {"forward": 1.0, "dq": 1.0, "dkv": 1.0}

# element: bytes of a weight or an activation; micro: micro-batches per step; master: fp32 copies of bf16 weights
Shape = namedtuple("Shape", "L NH C maxT V B T micro element master chunks")

def shape(model, B, T, total=None, precision="BF16", chunks=None):
    """What -e, -b, -t, -d and --loss-chunks say; a size that makes no sense is a ValueError."""
    n = model_size(model)
    if T > n.T:
        raise ValueError(f"-t {T}: the model's longest sequence is {n.T}")
    if (total or B * T) % (B * T):
        raise ValueError(f"-d {total}: expected a multiple of -b {B} times -t {T}")
    element = {"BF16": 2, "FP32": 4}[precision]
    if chunks is None:  # the trainer's, where memory is plenty: below 1 GiB of logits each
        chunks = -(-B * T // max(256, (1 << 30) // (padded(n.V) * element) // 256 * 256))
    rows = -(-B * T // min(chunks, B * T))
    whole = -(-rows // 256) * 256  # as loss_chunk_rows has it
    if -(-B * T // whole) == -(-B * T // rows):
        rows = whole
    return Shape(n.L, n.H, n.C, n.T, n.V, B, T, (total or B * T) // (B * T), element, element == 2, -(-B * T // rows))

def tensors(s, m):
    """Bytes of each tensor, of one layer or of the model, under the ledger's name where it is on the ledger.
    What a mode does without is 0."""
    C, BT, X, Vp = s.C, s.B * s.T, s.element, padded(s.V)
    cap = min(BT, s.V)
    grad = 4 if s.micro > 1 else X
    act, exact_norm = BT * C * X, not m.norm
    weights = dict(wte=Vp * C, wpe=s.maxT * C, lnfw=C, lnfb=C, ln1w=C, ln1b=C, ln2w=C, ln2b=C, qkvw=3 * C * C, qkvb=3 * C,
                   attprojw=C * C, attprojb=C, fcw=4 * C * C, fcb=4 * C, fcprojw=4 * C * C, fcprojb=C)
    t = {name: n * X for name, n in weights.items()}
    t.update({"d_" + name: n * (4 if name == "wte" else grad) for name, n in weights.items()})
    # kept for backward; the residual stream is one tensor per norm, kept or not
    for ln in ("ln1", "ln2", "lnf"):
        t.update({ln: act, ln + "_mean": 4 * BT * (exact_norm or ln == "lnf"), ln + "_rstd": 4 * BT})
    t.update(qkv=3 * act, atty=act, lse=4 * s.B * s.NH * s.T, stream=act, fch=0 if m.bits else 4 * act,
             fch_codes=4 * BT * C * m.bits // 8, fch_gelu=4 * act)
    # in between
    t.update(scratch_c=act, dresid=act, dfch=4 * act, dq=act, dkv=2 * act, dqkv=3 * act, delta=4 * s.B * s.NH * s.T, losses=4 * BT,
             inputs=4 * BT, positions=4 * BT, buckets=4 * (2 * cap + 1))
    # of one chunk of the loss, on average
    t.update(logits=BT * Vp * X / s.chunks, lnf_chunk=act / s.chunks, losses_chunk=4 * BT / s.chunks, targets=4 * BT / s.chunks)
    # what attention on tensor cores reads once more, beyond the first time
    again = {"kv_forward": "forward", "kv_dq": "dq", "qdout_dkv": "dkv"}
    t.update({name: (AGAIN[kernel] - 1) * 2 * act for name, kernel in again.items()})
    # gamma and beta where the norm's kernels read them, folded weights, the rows of an embedding that a batch uses
    t.update(affine=2 * C * X * exact_norm, affine_f=2 * C * X, gamma=C * X, fold_qkv=t["qkvw"] + t["qkvb"],
             fold_fc=t["fcw"] + t["fcb"], d_ln1=exact_norm * (t["d_ln1w"] + t["d_ln1b"]), d_ln2=exact_norm * (t["d_ln2w"] + t["d_ln2b"]),
             wte_rows=cap * C * X, d_wte_rows=4 * cap * C, wpe_rows=s.T * C * X, d_wpe_rows=s.T * C * grad)
    # partial sums: as many parts as the kernels have blocks, of C, 3C or 4C columns; a norm's backward sums gamma, beta and a bias
    slices = min(max(BT // 64, 1), 64)  # colsum_slices
    norm_sum = 4 * C * min(max(BT // 16, 1), 512)
    blocks = s.B * -(-s.T // (128 if C // s.NH == 64 else 64))  # of attention's on tensor cores
    t.update(sums_3c=12 * C * slices, sums_4c=16 * C * slices, sums_lnf=3 * norm_sum, sums_affine=2 * norm_sum,
             sums_norm=(3 if exact_norm else 1) * norm_sum, sums_q=4 * C * blocks, sums_kv=8 * C * blocks,
             sums_qkvw=8 * C * min(max(3 * C // 64, 1), 64), sums_fcw=8 * C * min(max(4 * C // 64, 1), 64))
    # all parameters together
    layered = {name: n * (1 if name in ("wte", "wpe", "lnfw", "lnfb") else s.L) for name, n in weights.items()}
    t["params"], t["m"] = X * sum(layered.values()), 4 * sum(layered.values())
    t["grads"] = sum(t["d_" + name] * n // weights[name] for name, n in layered.items())
    t["v"], t["master"] = t["m"], t["m"] if s.master else 0
    t["optimized"] = t["master"] or t["params"]
    t["squares"], t["step_state"] = 4 * sum(-(-n // 2048) for n in layered.values()), 4 * (2 + 6 + 2 * 128 + 1)
    return t

# ---- the launches of a step, in their order --------------------------------------------------------
#
#   phase, how often, kernel, of what, tensors read > written + gradients written, in which modes
#
# A gradient is read too where the launch is not the first of the step to write it. How often: layer, once per layer and
# micro-batch; next, the same but for the last layer; micro, once per micro-batch; chunk, once per chunk of the loss; unfold, once
# per layer and step; step; tensor, once per step over all of the 16 tensors, by a launch for each. A norm's backward reads its input or, where the norm is shared, z: both have the stream's size.

MATMUL = "[matmul]"  # as the profile has it
TABLE = """
forward  | micro  | embedding_forward         |                      | inputs wte_rows wpe_rows > stream
forward  | micro  | add_norm_forward         | ln1, layer 0         | stream affine > ln1 ln1_mean ln1_rstd
forward  | layer  | norm_fold                 | ln1 + qkv            | qkvw qkvb ln1w ln1b > fold_qkv | norm
forward  | layer  | [matmul]                  | qkv                  | ln1 qkvw qkvb > qkv
forward  | layer  | attention_forward_tc      |                      | qkv kv_forward > atty lse | tc
forward  | layer  | attention_forward         |                      | qkv > atty lse | not tc
forward  | layer  | [matmul]                  | attproj              | atty attprojw attprojb > scratch_c
forward  | layer  | add_norm_forward         | residual, ln2        | stream scratch_c affine > stream ln2 ln2_mean ln2_rstd
forward  | layer  | norm_fold                 | ln2 + fc             | fcw fcb ln2w ln2b > fold_fc | norm
forward  | layer  | [matmul]                  | fc, GELU             | ln2 fcw fcb > fch fch_gelu | not bits and ge >= 1
forward  | layer  | [matmul]                  | fc                   | ln2 fcw fcb > fch | not bits and ge == 0
forward  | layer  | act_forward               | GELU                 | fch > fch_gelu | not bits and ge == 0
forward  | layer  | [matmul]                  | fc                   | ln2 fcw > fch_gelu | bits
forward  | layer  | act_forward               | GELU, codes          | fch_gelu fcb > fch_gelu fch_codes | bits
forward  | layer  | [matmul]                  | fcproj               | fch_gelu fcprojw fcprojb > scratch_c
forward  | next   | add_norm_forward         | residual, next ln1   | stream scratch_c affine > stream ln1 ln1_mean ln1_rstd
forward  | micro  | add_norm_forward         | residual, lnf        | stream scratch_c affine_f > stream lnf lnf_mean lnf_rstd
loss     | chunk  | [matmul]                  | lm-head              | lnf_chunk wte > logits
loss     | chunk  | classifier                |                      | logits targets > logits losses_chunk
loss     | chunk  | [matmul]                  | lm-head, weight      | logits lnf_chunk > + d_wte
loss     | chunk  | [matmul]                  | lm-head, input       | logits wte > lnf_chunk
loss     | micro  | sum                       |                      | losses >
backward | micro  | add_norm_backward        | lnf                  | lnf stream lnf_mean lnf_rstd gamma > dresid sums_lnf
backward | micro  | colsum_finish             | lnf                  | sums_lnf > + d_lnfb d_lnfw d_fcprojb
backward | layer  | act_forward               | GELU, again          | fch > fch_gelu | not bits and r >= 1
backward | layer  | [matmul]                  | fcproj, weight       | dresid fch_gelu > + d_fcprojw
backward | layer  | [matmul]                  | fcproj, input, GELU' | dresid fcprojw fch > dfch | not bits and ge == 2
backward | layer  | colsum                    | fc, bias             | dfch > sums_4c | not bits and ge == 2
backward | layer  | [matmul]                  | fcproj, input        | dresid fcprojw > dfch | bits or ge < 2
backward | layer  | act_backward              | GELU', fc's bias     | dfch fch fch_codes > dfch sums_4c | bits or ge < 2
backward | layer  | colsum_finish             | fc, bias             | sums_4c > + d_fcb
backward | layer  | add_norm_forward         | ln2, again           | stream affine > ln2 ln2_mean ln2_rstd | r == 2 and not norm
backward | layer  | [matmul]                  | fc, weight           | dfch ln2 > + d_fcw
backward | layer  | [matmul]                  | fc, input            | dfch fcw > scratch_c
backward | layer  | add_norm_backward        | ln2                  | scratch_c stream ln2_mean ln2_rstd gamma dresid > dresid sums_norm
backward | layer  | colsum_finish             | ln2                  | sums_norm > + d_ln2 d_attprojb
backward | unfold | norm_unfold               | ln2 + fc             | d_fcw d_fcb fcw ln2w ln2b > d_fcw sums_fcw | norm
backward | unfold | colsum_finish             | ln2 + fc             | sums_fcw > + d_ln2w d_ln2b | norm
backward | layer  | [matmul]                  | attproj, weight      | dresid atty > + d_attprojw
backward | layer  | [matmul]                  | attproj, input       | dresid attprojw > scratch_c
backward | layer  | attention_backward_dq_tc  |                      | scratch_c qkv kv_dq atty lse > dq delta sums_q | tc
backward | layer  | attention_backward_dkv_tc |                      | scratch_c qkv qdout_dkv lse delta > dkv sums_kv | tc
backward | layer  | colsum_finish             | qkv, bias            | sums_q sums_kv > + d_qkvb | tc
backward | layer  | attention_backward        | by queries           | scratch_c qkv atty lse > dq delta | not tc
backward | layer  | attention_backward        | by keys              | scratch_c qkv lse delta > dkv | not tc
backward | layer  | colsum                    | qkv, bias            | dqkv > sums_3c | not tc
backward | layer  | colsum_finish             | qkv, bias            | sums_3c > + d_qkvb | not tc
backward | layer  | add_norm_forward         | ln1, again           | stream affine > ln1 ln1_mean ln1_rstd | r == 2 and not norm
backward | layer  | [matmul]                  | qkv, weight          | dqkv ln1 > + d_qkvw
backward | layer  | [matmul]                  | qkv, input           | dqkv qkvw > scratch_c
backward | next   | add_norm_backward        | ln1                  | scratch_c stream ln1_mean ln1_rstd gamma dresid > dresid sums_norm
backward | micro  | add_norm_backward        | ln1, layer 0         | scratch_c stream ln1_mean ln1_rstd gamma dresid > dresid sums_affine | not norm
backward | micro  | add_norm_backward        | ln1, layer 0         | scratch_c stream ln1_mean ln1_rstd gamma dresid > dresid | norm
backward | next   | colsum_finish             | ln1                  | sums_norm > + d_ln1 d_fcprojb
backward | micro  | colsum_finish             | ln1, layer 0         | sums_affine > + d_ln1 | not norm
backward | unfold | norm_unfold               | ln1 + qkv            | d_qkvw d_qkvb qkvw ln1w ln1b > d_qkvw sums_qkvw | norm
backward | unfold | colsum_finish             | ln1 + qkv            | sums_qkvw > + d_ln1w d_ln1b | norm
backward | micro  | embedding_backward_wte    |                      | dresid positions buckets d_wte_rows > d_wte_rows
backward | micro  | embedding_backward_wpe    |                      | dresid > + d_wpe_rows
update   | tensor | square_sum                |                      | grads > squares
update   | step   | sum                       |                      | squares >
update   | step   | verdict                   |                      | step_state > step_state
update   | tensor | adamw                     |                      | grads m v optimized > m v master params
"""
Launch = namedtuple("Launch", "phase per kernel what reads writes grads modes")

def launch(line):
    phase, per, kernel, what, moved, *modes = (x.strip() for x in line.split("|"))
    reads, _, writes = moved.partition(">")
    writes, _, grads = writes.partition("+")
    kernel += "" if kernel == MATMUL else "_kernel"
    return Launch(phase, per, kernel, what, *(tuple(x.split()) for x in (reads, writes, grads)), modes[0] if modes else "True")

LAUNCHES = [launch(line) for line in TABLE.strip().splitlines()]
WIDE = {"fch", "fch_gelu", "dfch"}  # the (B,T,4C) tensors

class Count:
    """A mode's launches with their bytes. rows: (launch, calls, bytes read, bytes written in a step)."""
    def __init__(self, s, m):
        self.shape, self.mode, self.tensors = s, m, tensors(s, m)
        # how often, and how many tensors a gradient of that kind is in a step
        often = {"layer": (s.L * s.micro, s.L), "next": ((s.L - 1) * s.micro, s.L - 1), "micro": (s.micro, 1),
                 "chunk": (s.chunks * s.micro, 1), "unfold": (s.L, s.L), "step": (1, 1), "tensor": (1, 1)}
        tc = s.element == 2 and s.C // s.NH in (64, 128)  # is attention on tensor cores?
        self.rows = []
        for a in LAUNCHES:
            if eval(a.modes, {"tc": tc, **m._asdict()}):
                n, first = often[a.per]
                reads, writes, grads = (sum(self.tensors[name] for name in names) for names in (a.reads, a.writes, a.grads))
                self.rows.append((a, n, n * reads + (n - first) * grads, n * (writes + grads)))

    def calls(self):
        """{kernel: launches in a step}"""
        total = Counter()
        for a, n, _, _ in self.rows:
            total[a.kernel] += 16 * n if a.per == "tensor" else n
        return dict(total)

    def bytes(self):
        """{kernel: bytes in a step}"""
        total = Counter()
        for a, _, reads, writes in self.rows:
            total[a.kernel] += round(reads + writes)
        return dict(total)

    def unit(self):
        return self.shape.B * self.shape.T * self.shape.C * self.shape.element

    def block(self):
        """{launch: units of B*T*C elements that it reads and writes} of a block in the middle, for a micro-batch."""
        return {a: (reads + writes) / n / (self.shape.micro if a.per == "unfold" else 1) / self.unit()
                for a, n, reads, writes in self.rows if n and a.per in ("layer", "next", "unfold")}

    def units(self, phase=None):
        return sum(units for a, units in self.block().items() if phase in (None, a.phase))

    def wide(self):
        """How often a block reads or writes a (B,T,4C) tensor, and how many of its kernels do."""
        names = [sum(name in WIDE and self.tensors[name] > 0 for name in a.reads + a.writes) for a in self.block()]
        return sum(names), sum(map(bool, names))

    def kept(self):
        """Units that a layer keeps for its backward."""
        m = self.mode
        names = "qkv atty lse fch fch_codes ln1_mean ln1_rstd ln2_mean ln2_rstd".split()
        names += ["ln1", "ln2"] * (m.norm or m.r < 2) + ["stream"] * (0 if m.norm else 2) + ["fch_gelu"] * (m.bits > 0 or m.r < 1)
        return sum(self.tensors[name] for name in names) / self.unit()

def report(s, counts):
    """Three tables, a column per mode."""
    def table(title, rows):
        print(f"\n{title}\n{'':58s}" + "".join(f"{c.mode.name.replace('USE_APPROXBP', 'BOTH'):>17s}" for c in counts))
        for name, *values in rows:
            print(f"{name:58s}" + "".join(f"{v:>17}" if isinstance(v, (int, str)) else f"{v:17.2f}" for v in values))
    print(f"L {s.L}, C {s.C}, B {s.B}, T {s.T}, {s.micro} micro-batches per step, {s.chunks} chunks of the loss, "
          f"{'bf16' if s.element == 2 else 'fp32'}: a unit is B*T*C elements, {counts[0].unit() / 2**20:.2f} MiB")
    blocks = [c.block() for c in counts]
    table("Units that a block in the middle reads and writes, by launch", [
        [f"{a.phase:9s} {a.kernel:32s} {a.what}", *(b.get(a, "-") for b in blocks)]
        for a in LAUNCHES if any(a in b for b in blocks)])
    calls, moved = [c.calls() for c in counts], [c.bytes() for c in counts]
    table("GB (1e9 bytes) that a step reads and writes, by kernel, and calls", [
        [k, *(f"{b[k] / 1e9:.2f} {n[k]:4d}" if k in b else "-" for b, n in zip(moved, calls))]
        for k in dict.fromkeys(a.kernel for a in LAUNCHES) if any(k in b for b in moved)]
        + [["sum", *(f"{sum(b.values()) / 1e9:.2f} {sum(n.values()):4d}" for b, n in zip(moved, calls))]])
    base = {c.mode.name: c.units() for c in counts}
    against = [[f"  against exact -r 0 {ge}", *(f"{c.units() - base[of]:+.2f}" for c in counts)]
               for ge, of in (("-ge 0", BASE), ("-ge 1", "exact, -ge 1"), ("-ge 2", "exact, -ge 2"))]
    table("A layer, in units", [
        ["kept for backward", *(c.kept() for c in counts)], ["traffic, forward", *(c.units("forward") for c in counts)],
        ["traffic, backward", *(c.units("backward") for c in counts)], ["traffic", *(c.units() for c in counts)], *against,
        ["reads and writes of (B,T,4C) tensors", *(c.wide()[0] for c in counts)],
        ["kernels with such a tensor", *(c.wide()[1] for c in counts)]])

def main():
    parser = argparse.ArgumentParser(description="Bytes that a step moves, by kernel and mode.")
    parser.add_argument("-e", "--model", default="d12", help="d12, or a size like gpt2:L4,H4,C128,T64,V257 (d12)")
    parser.add_argument("-b", "--batch", dest="B", type=int, default=64, help="sequences in a micro-batch (64)")
    parser.add_argument("-t", "--seq-len", dest="T", type=int, default=1024, help="tokens in a sequence (1024)")
    parser.add_argument("-d", "--total-batch", dest="total", type=int, help="tokens in a step (one micro-batch)")
    parser.add_argument("--precision", choices=("BF16", "FP32"), default="BF16")
    a = parser.parse_args()
    try:
        s = shape(a.model, a.B, a.T, a.total, a.precision)
    except ValueError as e:
        parser.error(str(e))
    report(s, [Count(s, m) for m in MODES])

if __name__ == "__main__":
    main()
