"""How many bytes a training step of train_gpt2 moves, kernel by kernel, counted from the shapes.

    python3 dev/bench/traffic.py [-e d12] [-b 64] [-t 1024] [-d TOKENS] [-w 1] [--precision BF16] [--json]

Memory-bound kernels take the time that their bytes take, so this is what the modes of the backward
pass cost or give back before any GPU has run them. A kernel counts each tensor that it reads or
writes once a launch, matmuls too, each chunk of the loss with its own pass over the embedding's
gradient. What a launch reads a second time it is taken to find in a cache where a block does so
shortly after (a row of a norm, when it has its sums; a row of logits). Keys and values, which every
block of queries reads again, come from memory as often as the simulation of the L2 cache says (l2.py;
AGAIN below). The embedding's backward is counted with every token of the vocabulary in the batch, or
as many as it has places.

The table below follows train_gpt2.cu launch by launch, and dev/test/test_bench.py holds it to that:
kernels and calls against the profile of the CPU build, tensors against --estimate=json.
"""
import argparse
import json
import re
from collections import Counter, namedtuple

# ----------------------------------------------------------------------------
# modes and shapes

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
# B 64, T 1024, with 50 MB of L2; dev/test/test_l2.py compares.
AGAIN = {"forward": 1.0, "dq": 1.0, "dkv": 1.0}

# element: bytes of a weight or an activation; micro: micro-batches a step; master: fp32 copies of bf16 weights
Shape = namedtuple("Shape", "L NH C maxT V B T micro element master chunks")
DEPTHS = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30), 72: (2880, 30), 84: (3456, 36)}


def padded(V):
    return -(-V // 128) * 128


def shape(model, B, T, total=None, precision="BF16", master=True, chunks=None):
    """What -e, -b, -t, -d, -w and --loss-chunks say; a size that makes no sense is a ValueError."""
    sizes = dict(T="1024", V="50257")
    depth = re.fullmatch(r"(?:gpt2:)?d(\d+)", model)
    if depth and int(depth[1]) in DEPTHS:
        C, H = DEPTHS[int(depth[1])]
        sizes.update(L=depth[1], C=C, H=H)
    elif re.fullmatch(r"gpt2:([LHCTV]\d+)(,[LHCTV]\d+)*", model):
        sizes.update((part[0], part[1:]) for part in model[5:].split(","))
    if not {"L", "H", "C"} <= set(sizes):
        raise ValueError(f"-e {model}: expected one of {' '.join(f'd{d}' for d in DEPTHS)}, or a size like gpt2:L4,H4,C128,T64,V257")
    n = {k: int(v) for k, v in sizes.items()}
    if T > n["T"]:
        raise ValueError(f"-t {T}: the model's longest sequence is {n['T']}")
    if (total or B * T) % (B * T):
        raise ValueError(f"-d {total}: expected a multiple of -b {B} times -t {T}")
    element = {"BF16": 2, "FP32": 4}[precision]
    if chunks is None:  # the trainer's, where memory is plenty: below 1 GiB of logits each
        chunks = -(-B * T // max(256, (1 << 30) // (padded(n["V"]) * element) // 256 * 256))
    rows = -(-B * T // min(chunks, B * T))
    whole = -(-rows // 256) * 256  # as loss_chunk_rows has it
    if -(-B * T // whole) == -(-B * T // rows):
        rows = whole
    return Shape(n["L"], n["H"], n["C"], n["T"], n["V"], B, T, (total or B * T) // (B * T), element,
                 master and element == 2, -(-B * T // rows))


def slices(rows):
    """In how many parts a column sum is taken (colsum_slices in the trainer)."""
    return min(max(rows // 64, 1), 64)


def norm_slices(rows):
    return min(max(rows // 16, 1), 512)


def tensor_cores(s):
    """Does attention run on them? (heads of 64 and 128 channels, in bf16)"""
    return s.element == 2 and s.C // s.NH in (64, 128)


def tensors(s, m):
    """Bytes of each tensor, of one layer or of the model, under the ledger's name where it is on the ledger.
    What a mode does without is 0."""
    C, BT, X, Vp = s.C, s.B * s.T, s.element, padded(s.V)
    cap = min(BT, s.V)
    grad = 4 if s.micro > 1 else X
    t = {}
    weights = dict(wte=Vp * C, wpe=s.maxT * C, lnfw=C, lnfb=C, ln1w=C, ln1b=C, ln2w=C, ln2b=C, qkvw=3 * C * C, qkvb=3 * C,
                   attprojw=C * C, attprojb=C, fcw=4 * C * C, fcb=4 * C, fcprojw=4 * C * C, fcprojb=C)
    for name, n in weights.items():
        t[name] = n * X
        t["d_" + name] = n * (4 if name == "wte" else grad)
    # kept
    for ln in ("ln1", "ln2"):
        t.update({ln: BT * C * X, ln + "_mean": 0 if m.norm else 4 * BT, ln + "_rstd": 4 * BT})
    t.update(qkv=3 * BT * C * X, atty=BT * C * X, lse=4 * s.B * s.NH * s.T, fch=0 if m.bits else 4 * BT * C * X,
             fch_codes=4 * BT * C * m.bits // 8, fch_gelu=4 * BT * C * X, lnf_mean=4 * BT, lnf_rstd=4 * BT)
    # what attention on tensor cores reads of the same once more, beyond the first time
    t.update(kv_forward=(AGAIN["forward"] - 1) * 2 * BT * C * X, kv_dq=(AGAIN["dq"] - 1) * 2 * BT * C * X, qdout_dkv=(AGAIN["dkv"] - 1) * 2 * BT * C * X)
    # in between; the residual stream is one tensor a norm, kept or not
    t.update(stream=BT * C * X, work_c=BT * C * X, lnf=BT * C * X, dresid=BT * C * X, dfch=4 * BT * C * X, dq=BT * C * X, dkv=2 * BT * C * X,
             dqkv=3 * BT * C * X, delta=4 * s.B * s.NH * s.T, losses=4 * BT, inputs=4 * BT, positions=4 * BT, buckets=4 * (2 * cap + 1))
    # of one chunk, on average
    t.update(logits=BT * Vp * X / s.chunks, lnf_chunk=BT * C * X / s.chunks, losses_chunk=4 * BT / s.chunks, targets=4 * BT / s.chunks)
    # gamma and beta where the norm's kernels read them, a folded weight, the rows of an embedding that a batch uses
    t.update(affine1=0 if m.norm else 2 * C * X, affine2=0 if m.norm else 2 * C * X, affine_f=2 * C * X, gamma=C * X,
             fold_qkvw=t["qkvw"], fold_qkvb=t["qkvb"], fold_fcw=t["fcw"], fold_fcb=t["fcb"], wte_rows=cap * C * X, d_wte_rows=4 * cap * C,
             wpe_rows=s.T * C * X, d_wpe_rows=s.T * C * grad)
    # partial sums: over rows of (B,T), of columns C in the norm's backward, 3C and 4C; over the rows of a weight, for each of
    # gamma and beta
    t.update({f"sums_{k}c": 4 * k * C * slices(BT) for k in (3, 4)}, sums_qkvw=4 * C * slices(3 * C), sums_fcw=4 * C * slices(4 * C))
    att_rows = 128 if C // s.NH == 64 else 64  # of a block of attention's on tensor cores
    t.update({f"sums_{n}": 4 * k * C * (s.B * -(-s.T // att_rows)) for n, k in (("q", 1), ("kv", 2))}, sums_norm=4 * C * norm_slices(BT))
    # all parameters together
    outside = ("wte", "wpe", "lnfw", "lnfb")
    times = {name: 1 if name in outside else s.L for name in weights}
    layered = {name: n * times[name] for name, n in weights.items()}
    t["params"] = X * sum(layered.values())
    t["grads"] = sum(t["d_" + name] * times[name] for name in weights)
    t["m"] = t["v"] = 4 * sum(layered.values())
    t["master"] = t["m"] if s.master else 0
    t["squares"] = 4 * sum(-(-n // 2048) for n in layered.values())
    t["step_state"] = 4 * (2 + 6 + 2 * 128 + 1)
    return t


# ----------------------------------------------------------------------------
# the table: a launch's kernel, how often, and its tensors
#
# grads is what a launch writes, and reads too if it is not the first of the step to write it.
# per: layer, once a layer and micro-batch; next, the same but for the last layer; micro, once a micro-batch; chunk, once a chunk
# of the loss; unfold, once a layer and step; step.

Launch = namedtuple("Launch", "phase kernel what per reads writes grads", defaults=[""])
MATMUL = "[matmul]"  # as the profile has it
WIDE = {"fch", "fch_gelu", "dfch"}  # the (B,T,4C) tensors


def bias_backward(of, sums, what, dbias, per="layer"):
    return [Launch("backward", "colsum_kernel", what, per, of, sums),
            Launch("backward", "colsum_finish_kernel", what, per, sums, "", dbias)]


def layernorm_backward(m, ln, per, below):
    """dx, and of the same reading dgamma, dbeta and the gradient of the bias that was added to the stream before the norm,
    d_{below}. A shared norm has the bias alone."""
    stats, shared = f"{ln}_mean {ln}_rstd", m.norm and ln != "lnf"
    dout, kept, dresid = ("lnf", "stream", "") if ln == "lnf" else ("work_c", ln if shared else "stream", "dresid")
    affine, sums = ("", "sums_norm") if shared else (f"d_{ln}b d_{ln}w", "sums_norm sums_norm sums_norm")
    rows = [Launch("backward", "layernorm_backward_kernel", ln, "layer" if per == "next" else per,
                   f"{dout} {kept} {stats} gamma {dresid}", f"dresid {sums}")]
    rows += [Launch("backward", "colsum_finish_kernel", ln, per, sums, "", f"{affine} d_{below}")]
    if per == "next" and not shared:  # the first block of all has nothing below
        rows += [Launch("backward", "colsum_finish_kernel", f"{ln}, layer 0", "micro", "sums_norm sums_norm", "", affine)]
    return rows


def norm_matmul_backward(m, ln, matmul, dout, per, below):
    """From the gradient of a matmul's output, through the norm before it, to the residual stream's."""
    W, b, gamma, beta, stats = f"{matmul}w", f"{matmul}b", f"{ln}w", f"{ln}b", f"{ln}_mean {ln}_rstd"
    what, sums = f"{ln} + {matmul}", f"sums_{matmul}w"
    rows = [Launch("backward", MATMUL, f"{matmul}, weight", "layer", f"{dout} {ln}", "", f"d_{W}"),
            Launch("backward", MATMUL, f"{matmul}, input", "layer", f"{dout} {W}", "work_c")]
    if m.r >= 2 and not m.norm:
        rows.insert(0, Launch("backward", "layernorm_forward_kernel", f"{ln}, again", "layer", f"stream affine{ln[-1]}", f"{ln} {stats}"))
    rows += layernorm_backward(m, ln, per, below)
    if m.norm:
        rows += [Launch("backward", "norm_unfold_kernel", what, "unfold", f"d_{W} d_{b} {W} {gamma} {beta}", f"d_{W} {sums} {sums}"),
                 Launch("backward", "colsum_finish_kernel", what, "unfold", f"{sums} {sums}", "", f"d_{gamma} d_{beta}")]
    return rows


def attention_backward(tc):
    if not tc:
        return [Launch("backward", "attention_backward_dq_kernel", "", "layer", "work_c qkv atty lse", "dq delta"),
                Launch("backward", "attention_backward_dkv_kernel", "", "layer", "work_c qkv lse delta", "dkv"),
                *bias_backward("dqkv", "sums_3c", "qkv, bias", "d_qkvb")]
    return [Launch("backward", "attention_backward_dq_tc_kernel", "", "layer", "work_c qkv kv_dq atty lse", "dq delta sums_q"),
            Launch("backward", "attention_backward_dkv_tc_kernel", "", "layer", "work_c qkv qdout_dkv lse delta", "dkv sums_kv"),
            Launch("backward", "colsum_finish_kernel", "qkv, bias", "layer", "sums_q sums_kv", "", "d_qkvb")]


def forward_act(m):
    """From the norm's output to GELU's: what is in fch_gelu before GELU is the matmul's output, of the same size."""
    if m.bits:
        return [Launch("forward", MATMUL, "fc", "layer", "ln2 fcw", "fch_gelu"),
                Launch("forward", "act_forward_kernel", "GELU, codes", "layer", "fch_gelu fcb", "fch_gelu fch_codes")]
    if m.ge >= 1:
        return [Launch("forward", MATMUL, "fc, GELU", "layer", "ln2 fcw fcb", "fch fch_gelu")]
    return [Launch("forward", MATMUL, "fc", "layer", "ln2 fcw fcb", "fch"),
            Launch("forward", "act_forward_kernel", "GELU", "layer", "fch", "fch_gelu")]


def backward_act(m):
    if m.ge >= 2 and not m.bits:
        return [Launch("backward", MATMUL, "fcproj, input, GELU'", "layer", "dresid fcprojw fch", "dfch"),
                *bias_backward("dfch", "sums_4c", "fc, bias", "d_fcb")]
    return [Launch("backward", MATMUL, "fcproj, input", "layer", "dresid fcprojw", "dfch"),
            Launch("backward", "act_backward_kernel", "GELU', fc's bias", "layer", f"dfch {'fch_codes' if m.bits else 'fch'}", "dfch sums_4c"),
            Launch("backward", "colsum_finish_kernel", "fc, bias", "layer", "sums_4c", "", "d_fcb")]


def launches(m, tc):
    """All launches of a step, in their order; tc: attention on tensor cores."""
    def fold(ln, matmul):
        if not m.norm:
            return []
        return [Launch("forward", "norm_fold_kernel", f"{ln} + {matmul}", "layer", f"{matmul}w {matmul}b {ln}w {ln}b", f"fold_{matmul}w fold_{matmul}b")]

    return [
        Launch("forward", "embedding_forward_kernel", "", "micro", "inputs wte_rows wpe_rows", "stream"),
        Launch("forward", "layernorm_forward_kernel", "ln1, layer 0", "micro", "stream affine1", "ln1 ln1_mean ln1_rstd"),
        *fold("ln1", "qkv"),
        Launch("forward", MATMUL, "qkv", "layer", "ln1 qkvw qkvb", "qkv"),
        Launch("forward", "attention_forward_tc_kernel" if tc else "attention_forward_kernel", "", "layer", "qkv kv_forward" if tc else "qkv", "atty lse"),
        Launch("forward", MATMUL, "attproj", "layer", "atty attprojw attprojb", "work_c"),
        Launch("forward", "layernorm_forward_kernel", "residual, ln2", "layer", "stream work_c affine2", "stream ln2 ln2_mean ln2_rstd"),
        *fold("ln2", "fc"),
        *forward_act(m),
        Launch("forward", MATMUL, "fcproj", "layer", "fch_gelu fcprojw fcprojb", "work_c"),
        Launch("forward", "layernorm_forward_kernel", "residual, next ln1", "next", "stream work_c affine1", "stream ln1 ln1_mean ln1_rstd"),
        Launch("forward", "layernorm_forward_kernel", "residual, lnf", "micro", "stream work_c affine_f", "stream lnf lnf_mean lnf_rstd"),

        Launch("loss", MATMUL, "lm-head", "chunk", "lnf_chunk wte", "logits"),
        Launch("loss", "classifier_kernel", "", "chunk", "logits targets", "logits losses_chunk"),
        Launch("loss", MATMUL, "lm-head, weight", "chunk", "logits lnf_chunk", "", "d_wte"),
        Launch("loss", MATMUL, "lm-head, input", "chunk", "logits wte", "lnf_chunk"),
        Launch("loss", "loss_sum_kernel", "", "micro", "losses", ""),

        *layernorm_backward(m, "lnf", "micro", "fcprojb"),
        *([Launch("backward", "act_forward_kernel", "GELU, again", "layer", "fch", "fch_gelu")] if m.r >= 1 and not m.bits else []),
        Launch("backward", MATMUL, "fcproj, weight", "layer", "dresid fch_gelu", "", "d_fcprojw"),
        *backward_act(m),
        *norm_matmul_backward(m, "ln2", "fc", "dfch", "layer", "attprojb"),
        Launch("backward", MATMUL, "attproj, weight", "layer", "dresid atty", "", "d_attprojw"),
        Launch("backward", MATMUL, "attproj, input", "layer", "dresid attprojw", "work_c"),
        *attention_backward(tc),
        *norm_matmul_backward(m, "ln1", "qkv", "dqkv", "next", "fcprojb"),
        Launch("backward", "embedding_backward_wte_kernel", "", "micro", "dresid positions buckets d_wte_rows", "d_wte_rows"),
        Launch("backward", "embedding_backward_wpe_kernel", "", "micro", "dresid", "", "d_wpe_rows"),

        Launch("update", "square_sum_kernel", "", "step", "grads", "squares"),
        Launch("update", "partial_sum_kernel", "", "step", "squares", ""),
        Launch("update", "verdict_kernel", "", "step", "step_state", "step_state"),
        Launch("update", "adamw_kernel", "", "step", "grads m v optimized", "m v master params"),
    ]


def calls(s, per):
    """(launches in a step, tensors that they write their gradients to)."""
    return {"layer": (s.L * s.micro, s.L), "next": ((s.L - 1) * s.micro, s.L - 1), "micro": (s.micro, 1),
            "chunk": (s.chunks * s.micro, 1), "unfold": (s.L, s.L), "step": (1, 1)}[per]


class Count:
    """A mode's launches with their bytes. rows: (launch, calls in a step, bytes read, bytes written in a step)."""

    def __init__(self, s, m):
        self.shape, self.mode, self.tensors = s, m, tensors(s, m)
        size = dict(self.tensors, optimized=self.tensors["master"] or self.tensors["params"])
        self.rows = []
        for a in launches(m, tensor_cores(s)):
            n, first = calls(s, a.per)
            reads, writes, grads = (sum(size[name] for name in names.split()) for names in (a.reads, a.writes, a.grads))
            self.rows.append((a, n, n * reads + (n - first) * grads, n * (writes + grads)))

    def calls(self):
        """{kernel: launches in a step}"""
        total = Counter()
        for a, n, _, _ in self.rows:
            total[a.kernel] += n
        return dict(total)

    def bytes(self):
        """{kernel: bytes in a step}"""
        total = Counter()
        for a, _, reads, writes in self.rows:
            total[a.kernel] += round(reads + writes)
        return dict(total)

    def block(self):
        """[(launch, units)] of a block in the middle, for a micro-batch: units of B*T*C elements, read and written."""
        s = self.shape
        unit = s.B * s.T * s.C * s.element
        return [(a, (reads + writes) / n * (1 / s.micro if a.per == "unfold" else 1) / unit)
                for a, n, reads, writes in self.rows if n and a.per in ("layer", "next", "unfold")]

    def units(self, phase=None):
        return sum(units for a, units in self.block() if phase in (None, a.phase))

    def wide(self):
        """How often a block reads or writes a (B,T,4C) tensor, and how many of its kernels do."""
        names = [[name for name in f"{a.reads} {a.writes}".split() if name in WIDE] for a, _ in self.block()]
        return sum(map(len, names)), sum(map(bool, names))

    def kept(self):
        """Units that a layer keeps for its backward."""
        s, m, t = self.shape, self.mode, self.tensors
        names = ["qkv", "atty", "lse", "fch", "fch_codes", "ln1_mean", "ln1_rstd", "ln2_mean", "ln2_rstd"]
        names += ["ln1", "ln2"] if m.norm or m.r < 2 else []
        names += [] if m.norm else ["stream", "stream"]
        names += ["fch_gelu"] if m.bits or m.r < 1 else []
        return sum(t[name] for name in names) / (s.B * s.T * s.C * s.element)


# ----------------------------------------------------------------------------
# output

def table(head, rows, left=1):
    """Columns as wide as they must be; the first `left` of them flush left."""
    cells = [head] + [[x if isinstance(x, str) else f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(row, width))).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def by_name(counts, rows_of, key):
    """[[key parts..., value of each mode]] in the order of launches: values of a mode summed over equal keys, - where it has none."""
    order, values = {}, []
    for c in counts:
        total, place = {}, 0
        for a, value in rows_of(c):
            k = key(a)
            total[k] = total.get(k, 0) + value
            # a key that this mode has and earlier ones had not goes behind the one before it
            if k not in order:
                order = {old: i + (i >= place) for old, i in order.items()}
                order[k] = place
            place = max(place, order[k] + 1)
        values.append(total)
    return [[*k, *(v.get(k, "-") for v in values)] for k in sorted(order, key=order.get)]


def verdict(counts):
    """What USE_APPROXBP=1 promises, as {what: holds}, and its lines."""
    by = {c.mode.name: c for c in counts}
    base, approx = by[BASE], by["USE_APPROXBP=1"]
    less = base.units() - approx.units()
    passes, base_passes = approx.wide(), base.wide()
    matmuls, base_matmuls = approx.calls()[MATMUL], base.calls()[MATMUL]
    holds = {"no more passes over (B,T,4C) than exact -ge 0": all(a <= b for a, b in zip(passes, base_passes)),
             "less traffic than exact -ge 0": less > 0,
             "no matmul more": matmuls <= base_matmuls}
    yes = {True: "yes", False: "NO"}
    lines = ["USE_APPROXBP=1 against exact with a separate GELU kernel (-ge 0):",
             f"  no more passes over (B,T,4C) tensors: {yes[list(holds.values())[0]]} ({passes[0]} against {base_passes[0]}, "
             f"in {passes[1]} kernels against {base_passes[1]})",
             f"  less traffic: {yes[less > 0]} ({less:.2f} units a layer; the codes alone {base.units() - by['APPROX_ACT=2'].units():.2f}, "
             f"the shared norm alone {base.units() - by['MS_NORM=1'].units():.2f})",
             f"  no matmul more: {yes[matmuls <= base_matmuls]} ({matmuls} against {base_matmuls} a step)"]
    for ge in (1, 2):
        more = approx.units() - by[f"exact, -ge {ge}"].units()
        lines.append(f"against exact with GELU in the matmul's epilogue (-ge {ge}): {abs(more):.2f} units a layer {'more' if more > 0 else 'less'}")
    return holds, lines


def report(s, counts):
    heads = [c.mode.name for c in counts]
    short = [h.replace("exact, ", "").replace("USE_APPROXBP", "BOTH").replace("APPROX_ACT", "ACT").replace("MS_NORM", "NORM").replace(", ", " ") for h in heads]
    print(f"L {s.L}, C {s.C}, B {s.B}, T {s.T}, {s.micro} micro-batches a step, {s.chunks} chunks of the loss, "
          f"{'bf16' if s.element == 2 else 'fp32'}: a unit is B*T*C elements, {s.B * s.T * s.C * s.element / 2**20:.2f} MiB")
    print("ACT=2: APPROX_ACT=2; NORM=1: MS_NORM=1; BOTH=1: USE_APPROXBP=1. -r 0 and -ge 0 where nothing else is said.\n")
    print("Units that a block in the middle reads and writes, by launch:")
    rows = by_name(counts, Count.block, lambda a: (a.phase, a.kernel, a.what))
    print(table(["phase", "kernel", "of", *short], rows, left=3) + "\n")
    print("GB (1e9 bytes) that a step reads and writes, by kernel, and calls:")
    rows = by_name(counts, lambda c: [(a, (r + w) / 1e9) for a, n, r, w in c.rows], lambda a: (a.kernel,))
    numbers = by_name(counts, lambda c: [(a, n) for a, n, r, w in c.rows], lambda a: (a.kernel,))
    rows = [[row[0]] + [gb if gb == "-" else f"{gb:.2f} {n:4d}" for gb, n in zip(row[1:], number[1:])] for row, number in zip(rows, numbers)]
    rows.append(["sum"] + [f"{sum(r + w for _, _, r, w in c.rows) / 1e9:.2f} {sum(n for _, n, _, _ in c.rows):4d}" for c in counts])
    print(table(["kernel", *short], rows) + "\n")
    print("A layer, in units:")
    base = {c.mode.name: c.units() for c in counts}
    rows = [["kept for backward", *(c.kept() for c in counts)],
            ["traffic, forward", *(c.units("forward") for c in counts)],
            ["traffic, backward", *(c.units("backward") for c in counts)],
            ["traffic", *(c.units() for c in counts)]]
    for name, of in (("-ge 0", BASE), ("-ge 1", "exact, -ge 1"), ("-ge 2", "exact, -ge 2")):
        rows.append([f"against exact -r 0 {name}", *(f"{c.units() - base[of]:+.2f}" for c in counts)])
    rows += [["reads and writes of (B,T,4C) tensors", *(c.wide()[0] for c in counts)],
             ["kernels with such a tensor", *(c.wide()[1] for c in counts)]]
    print(table(["", *short], rows) + "\n")
    print("\n".join(verdict(counts)[1]))


def as_json(s, counts):
    return json.dumps({
        "shape": s._asdict(),
        "modes": [{"mode": c.mode.name, "options": c.mode.flags, "kept_units": c.kept(), "units_per_layer": c.units(),
                   "units_forward": c.units("forward"), "units_backward": c.units("backward"),
                   "passes_4c": c.wide()[0], "kernels_4c": c.wide()[1], "bytes_per_step": sum(c.bytes().values()),
                   "launches": [{"phase": a.phase, "kernel": a.kernel, "of": a.what, "calls": n, "read": round(r), "written": round(w)}
                                for a, n, r, w in c.rows]} for c in counts],
        "holds": verdict(counts)[0]}, indent=1)


def main():
    parser = argparse.ArgumentParser(description="Bytes that a step moves, by kernel and mode.")
    parser.add_argument("-e", "--model", default="d12", help="d12, or a size like gpt2:L4,H4,C128,T64,V257 (d12)")
    parser.add_argument("-b", "--batch", dest="B", type=int, default=64, help="sequences in a micro-batch (64)")
    parser.add_argument("-t", "--seq-len", dest="T", type=int, default=1024, help="tokens in a sequence (1024)")
    parser.add_argument("-d", "--total-batch", dest="total", type=int, help="tokens in a step (one micro-batch)")
    parser.add_argument("-w", "--master-weights", dest="master", type=int, choices=(0, 1), default=1, help="fp32 copies of bf16 weights (1)")
    parser.add_argument("--precision", choices=("BF16", "FP32"), default="BF16")
    parser.add_argument("--json", action="store_true", help="launch by launch, for programs")
    a = parser.parse_args()
    try:
        s = shape(a.model, a.B, a.T, a.total, a.precision, a.master)
    except ValueError as e:
        parser.error(str(e))
    counts = [Count(s, m) for m in MODES]
    if a.json:
        print(as_json(s, counts))
    else:
        report(s, counts)


if __name__ == "__main__":
    main()
