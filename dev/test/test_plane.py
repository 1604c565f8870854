"""The memory plane: what -r, --row-chunks and --offload leave away, compute again, or move changes nothing that is computed, and all of
it is on the ledger, the host's part too; streams that are late, or come in another order, give the same bits.

In every build, runs with one number of chunks have the same bits, whatever is computed again or was on the host in between: the same
kernels add the same numbers in the same order. Another number of chunks adds up weights' gradients in other parts, so there runs agree
within rounding.
"""
import json
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from finetune import PLAIN, adapters, arrays, distance, model, trainer_of, write_adapter, write_base, write_marked
from helpers import ON_GPU, Lab, close, ends, environment, execute, mpirun, options, program, read_log, says, write_tokens

B, T = 3, 19   # 57 rows: in 7 chunks of 9, of which the last has 3, and most end within a sequence

# ---- models, adapters, data ---------------------------------------------------------------------------------------------

LLAMA, GPT2 = "llama:L3,H4,K2,C40,F56,T64,V131,HS8", "gpt2:L3,H2,C48,T64,V131"
HEADS_OF_64 = "llama:L2,H2,K1,C64,F72,T80,V131,HS64", "gpt2:L2,H1,C64,T80,V131"   # tensor cores' in bf16
ONE_LAYER = "llama:L1,H4,K2,C40,F56,T64,V131,HS8", "gpt2:L1,H2,C48,T64,V131"
ALL = {**{name: 5 for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
       **{name: 5 for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}}
LOW = {"q_proj": 3, "v_proj": 12, "attn.c_attn": 3}
MIDDLE = {"o_proj": 3, "up_proj": 5, "attn.c_proj": 3, "mlp.c_fc": 5}   # in the second layer alone: backward stops within it

def ids_of(n, seed):
    return [int(131 * x**2) for x in np.random.RandomState(seed).rand(n)]

class Bench(Lab):
    """Models and adapters, made when a test first wants one, and two files of tokens each to train on and to validate with: plain.bin,
    and marked.bin, which says where documents begin and what has no loss."""

    def __init__(self, folder):
        super().__init__(folder)
        rng = random.Random(5)
        for name, n, seed in (("", 3000, 1), ("v", 400, 2)):
            ids = ids_of(n, seed)
            write_tokens(self.path(f"{name}plain.bin"), ids)
            write_marked(self.path(f"{name}marked.bin"), ids, [i for i in range(1, n) if rng.random() < 0.06], [i for i in range(n) if rng.random() < 0.4])

    def base(self, sizes, tied=False, kind="llama"):
        name = f"{sizes.replace(':', '-')}-{tied}-{kind}"
        config, tensors = model(sizes, 4, tied, kind)
        if not self.path(name).exists():
            write_base(self.path(name), config, tensors)
        for adapter, wanted, layers in (("all", ALL, None), ("low", LOW, None), ("middle", MIDDLE, [1])):
            if not self.path(f"{name}-{adapter}").exists() and config.L > 1:
                write_adapter(self.path(f"{name}-{adapter}"), adapters(config, wanted, seed=4, layers=layers))
        return name, trainer_of(config)

@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("plane"))

class Seen:
    """What a run has computed, and what it has taken."""

    def __init__(self, lab, case, variant, *given, **how):
        name, trainer = lab.base(*case.model)
        more = [f"{name}-{x[1:]}" if str(x).startswith("@") else x for x in case.given]
        data = "marked" if case.marked else "plain"
        given = ["-e", name, "-i", f"{data}.bin", "-j", f"v{data}.bin", "-b", B, "-t", T, "-d", case.micro_batches * B * T, "-x", 2, "-l", 1e-3, "-f", 0,
                 "-v", 1, "-m", 1, "-s", 2, "-g", 4, *more, *given]
        ran = lab.train(*given, "--dump-gradients", "g.safetensors", variant=variant, trainer=trainer,
                        **{**how, "env": {"SIMT_REPORT": 1, "OMP_NUM_THREADS": 1, **how.get("env", {})}})
        self.numbers = [{k: v for k, v in line.items() if k in ("train_loss", "grad_norm", "val_loss")} for line in ran.log[:-1]]
        self.sample = re.findall(r"^---- .*?^----$", ran.out, re.M | re.S)
        assert len(self.numbers) >= 1 and (self.sample or "-s" in case.given)
        self.bytes = lab.path("g.safetensors").read_bytes()
        self.gradients = arrays(lab.path("g.safetensors"))
        self.device, announced, self.host, pinned = map(int, re.search(r"^device memory: (\d+) bytes at the peak, (\d+) announced; of the host, pinned: "
                                                                       r"(\d+), (\d+)$", ran.out, re.M).groups())
        if not ON_GPU:   # which has nobody else who counts
            counted = re.search(r"simt: peak (\d+) bytes, now 0 bytes; of the host, pinned: peak (\d+), now 0", ran.err)
            assert int(counted[1]) == self.device and int(counted[2]) == self.host
        estimate = json.loads(lab.run(*options("--estimate=json", *given), variant=variant, trainer=trainer).out)
        assert self.device == announced == ran.done["peak_bytes"] == ran.done["estimate_bytes"] == estimate["total_bytes"]
        assert self.host == pinned == estimate["host_bytes"]
        self.share, self.rows = estimate["recompute_share"], {row["name"]: row for row in estimate["rows"]}

    def is_the_same_as(self, other):
        return (self.numbers, self.sample, self.bytes) == (other.numbers, other.sample, other.bytes)

    def is_near(self, other, for_gradients, for_losses):
        pairs = [(line[name], there[name]) for line, there in zip(self.numbers, other.numbers) for name in line]
        assert all(close(a, b, for_losses) for a, b in pairs), pairs
        assert self.gradients.keys() == other.gradients.keys()
        for name, values in other.gradients.items():
            assert distance(self.gradients[name], values) <= for_gradients, (name, distance(self.gradients[name], values))

class Case:
    def __init__(self, *model, given=(), marked=False, micro_batches=2):
        self.model, self.given, self.marked, self.micro_batches = model, given, marked, micro_batches

LORA = ["--adapter", "@all"]
NF4 = [*LORA, "--base", "nf4"]
CASES = {
    "llama": Case(LLAMA),
    "llama tied, marked": Case(LLAMA, True, marked=True),
    "qwen2 marked": Case(LLAMA, False, "qwen2", marked=True),
    "qwen3": Case("llama:L3,H2,K1,C32,F48,T64,V131,HS24", True, "qwen3"),
    "qwen3 marked, lora": Case("llama:L3,H2,K1,C32,F48,T64,V131,HS24", False, "qwen3", given=LORA, marked=True),
    "one layer": Case(ONE_LAYER[0]),
    "llama lora": Case(LLAMA, given=[*LORA, "--lora-dropout", 0.3, "--embedding-on", "host"]),
    "llama lora marked, norms": Case(LLAMA, given=[*LORA, "--lora-train-norms", 1, "--lora-dropout", 0.3], marked=True),
    "llama q,v": Case(LLAMA, given=["--adapter", "@low"]),
    "llama the middle": Case(LLAMA, given=["--adapter", "@middle", "--embedding-on", "host"]),
    "llama frozen A": Case(LLAMA, given=[*LORA, "--lora-freeze-a", 1, "--lora-dropout", 0.2]),
    "llama nf4": Case(LLAMA, given=[*NF4, "--double-quant", 1, "--lora-dropout", 0.3, "--embedding-on", "host"], marked=True),
    "llama nf4 single": Case(LLAMA, True, given=[*NF4, "--double-quant", 0]),
    "gpt2": Case(GPT2),
    "gpt2 marked": Case(GPT2, marked=True),
    "gpt2 one layer": Case(ONE_LAYER[1]),
    "gpt2 lora": Case(GPT2, given=[*LORA, "--lora-dropout", 0.3, "--lora-train-norms", 1], marked=True),
    "gpt2 c_attn": Case(GPT2, given=["--adapter", "@low"]),
    "gpt2 the middle": Case(GPT2, given=["--adapter", "@middle"]),
    "gpt2 frozen A": Case(GPT2, given=[*LORA, "--lora-freeze-a", 1]),
    "gpt2 nf4": Case(GPT2, given=[*NF4, "--lora-dropout", 0.3]),
}

def ways(chunks, *levels):
    """Options, of -r and more."""
    return [["-r", level, "--row-chunks", chunks] for level in levels] + [["-r", 4, "--row-chunks", chunks, "--offload", 1]]

IN_ONE, IN_FEW, IN_SEVEN = ways(1, 0, 3), ways(3, 0), ways(7, 0)

def check(lab, case, variant, tolerances, *families):
    """Runs of a family have one number of chunks, and the same bits; those of another are near."""
    first = None
    for family in families:
        whole = Seen(lab, case, variant, *family[0])
        for way in family[1:]:
            assert Seen(lab, case, variant, *way).is_the_same_as(whole), way
        first = first or whole
        whole.is_near(first, *tolerances)

@pytest.mark.parametrize("case", CASES)
def test_exact(bench, case):
    """Dequantizing, once a chunk, takes most of the time with NF4."""
    check(bench, CASES[case], "cpu-fp32", (1e-5, 1e-5), IN_ONE, IN_FEW if "nf4" in case else IN_SEVEN)

@pytest.mark.parametrize("case", ["llama", "gpt2", "llama lora", "gpt2 lora"])
def test_every_level(bench, case):
    """And without a word about chunks; in as many as a micro-batch has sequences; and of two rows, of which the last has one."""
    plain = [["-r", r] for r in (1, 2, 4)] + [["-r", 4, "--offload", 1]]
    check(bench, CASES[case], "cpu-fp32", (1e-5, 1e-5), IN_ONE[:1] + plain, ways(7, 1, 2, 3, 4), ways(3), ways(29))

@pytest.mark.parametrize("case", ["llama", "qwen2 marked", "qwen3", "llama lora marked, norms", "llama frozen A", "llama nf4", "gpt2 marked", "gpt2 lora",
                                  "gpt2 frozen A", "gpt2 c_attn"])
def test_codes_and_shared_norms(bench, case):
    check(bench, CASES[case], "cpu-approxbp-fp32", (1e-5, 1e-5), IN_ONE, IN_FEW if "nf4" in case else IN_SEVEN)

BF16 = [("llama 64", "cpu-bf16"), ("llama 64", "cpu-norm-bf16"), ("llama 64", "cpu-act-bf16"), ("llama 64", "cpu-approxbp-bf16"), ("gpt2 64", "cpu-bf16"), ("gpt2 64", "cpu-act-bf16"),
        ("gpt2 64", "cpu-approxbp-bf16"), ("llama frozen A", "cpu-norm-bf16"), ("gpt2 lora", "cpu-act-bf16"), ("gpt2 c_attn", "cpu-norm-bf16"),
        ("llama nf4", "cpu-bf16")]

@pytest.mark.parametrize("case, variant", BF16)
def test_bf16(bench, case, variant):
    """Heads of 64, which tensor cores do, and others. In chunks gradients are in fp32, which is nearer."""
    cases = {**CASES, **{f"{name} 64": Case(sizes, given=["-v", 0, "-s", 0], marked=True) for name, sizes in zip(("llama", "gpt2"), HEADS_OF_64)}}
    check(bench, cases[case], variant, (3e-2, 2e-2), ways(1, 1), ways(3) if "nf4" in case else ways(7))

@pytest.mark.parametrize("variant, fusion", [("cpu-fp32", 1), ("cpu-fp32", 2), ("cpu-bf16", 2)])
def test_gelu_in_the_matmul(bench, variant, fusion):
    """By cuBLASLt's epilogues, which also makes GELU again."""
    case = Case(GPT2, given=["-ge", fusion])
    whole, *others = [Seen(bench, case, variant, *way) for way in (*ways(1, 0, 3), *ways(7))]
    for seen in others:
        seen.is_near(whole, *((1e-5, 1e-5) if "fp32" in variant else (3e-2, 2e-2)))

# ---- what is kept ---------------------------------------------------------------------------------------------------------

def estimate(lab, *given, variant="cpu-bf16", trainer="train_llama"):
    return json.loads(lab.run("--estimate=json", *given, variant=variant, trainer=trainer).out)

def test_a_token_on_the_device(lab):
    """Of one layer its input, a second one that comes or goes, the gradient of the stream, q, k and v, the output of attention, gradients
    of k and v: 5 + 4 k units of C, statistics besides; and no more, however many layers there are."""
    given = ["-e", "llama3.1-8b", "--base", "nf4", "--lora", 32, "-b", 1, "-r", 4, "--offload", 1]
    short, long = (estimate(lab, *given, "-t", T, "--loss-chunks", T // 1024) for T in (65536, 131072))
    per_token = (long["total_bytes"] - short["total_bytes"]) / 65536
    assert 6 * 4096 * 2 < per_token <= 7 * 4096 * 2
    host, = (row for row in long["rows"] if row["name"] == "host_stream")
    one = 131072 * 4096 * 2   # the last block's input stays where it is
    assert host["scope"] == "host" and host["bytes"] == 31 * one < long["host_bytes"] < 1.1 * 31 * one
    assert not [row for row in long["rows"] if row["scope"] == "layer" and row["kind"] == "saved"]
    beside = estimate(lab, *given[:-2], "-t", 131072, "--loss-chunks", 128)
    kept = [row for row in beside["rows"] if row["scope"] == "layer" and row["kind"] == "saved"]
    assert [row["name"] for row in kept] == ["resid_out"] and kept[0]["bytes"] == 32 * one
    assert beside["total_bytes"] == long["total_bytes"] + 31 * one and beside["host_bytes"] == long["host_bytes"] - 31 * one

@pytest.mark.parametrize("trainer, size, layers", [("train_llama", "llama:L{},H4,K2,C64,F96,T64,V257", (2, 7)), ("train_gpt2", "gpt2:L{},H4,C64,T64,V257", (2, 7))])
def test_layers_share_all_but_their_input(lab, trainer, size, layers):
    """A layer more has its parameters, gradients and moments, and its input: on the device, or with --offload on the host."""
    for more, where in ([], "device"), (["--offload", 1], "host"), (["--offload", 1, "--row-chunks", 5], "host"):
        tables = [estimate(lab, "-e", size.format(L), "-b", 3, "-t", 64, "-r", 4, *more, variant="cpu-fp32", trainer=trainer) for L in layers]
        grown = {place: sum(row["bytes"] * sign for table, sign in zip(tables, (-1, 1)) for row in table["rows"]
                            if row["kind"] not in ("param", "grad", "optimizer") and row["name"] != "squares" and (row["scope"] == "host") == (place == "host"))
                 for place in ("device", "host")}
        assert grown == {"device": 0, "host": 0, where: (layers[1] - layers[0]) * 3 * 64 * 64 * 4}, (more, grown)

def test_chunks_shrink_scratch(lab):
    """And auto takes as few as keep it near 256 MiB, of whole 256 rows."""
    given = ["-e", "llama3.1-8b", "--base", "nf4", "--lora", 32, "-b", 1, "-t", 32768, "-r", 4]
    one, auto, many = ({row["name"]: row for row in estimate(lab, *given, *more)["rows"]} for more in (["--row-chunks", 1], [], ["--row-chunks", 128]))
    wide = ("scratch_f", "scratch_gateup", "scratch_mid", "scratch_c", "scratch_ln")
    rows, all_of_them = auto["scratch_gateup"]["shape"][0], sum(one[name]["bytes"] for name in wide)
    assert rows % 256 == 0 < rows and sum(auto[name]["bytes"] for name in wide) <= 256 << 20 < all_of_them * (rows + 256) / 32768
    assert all(auto[name]["bytes"] * 32768 == one[name]["bytes"] * rows for name in wide)
    assert all(many[name]["bytes"] * 128 == one[name]["bytes"] for name in wide)

def test_what_is_computed_again(lab):
    """Matmul operations, counted by hand: of a weight 2 a token forward, 4 backward, 2 where it is frozen; of causal attention 2 C T
    forward and 4 backward."""
    L, NH, NKV, HS, C, F, V, T, r = 2, 4, 2, 16, 64, 96, 257, 64, 8
    qkv, o, gate_up, down = (NH + 2 * NKV) * HS * C, C * C, 2 * F * C, F * C
    step = 6 * (L * (qkv + o + gate_up + down) + V * C) + 6 * L * C * T
    again = {0: 0, 1: 0, 2: 0, 3: 2 * L * gate_up, 4: 2 * L * (qkv + o + gate_up) + 2 * L * C * T}
    size = ["-e", f"llama:L{L},H{NH},K{NKV},C{C},F{F},T{T},V{V}", "-b", 2, "-t", T]
    for level, operations in again.items():
        for more in ([], ["--row-chunks", 4]):
            assert estimate(lab, *size, "-r", level, *more)["recompute_share"] == pytest.approx(operations / step, abs=1e-6)
    # adapters of q, v and up, and an untrained rest: 4 for 6
    pairs = r * (2 * C + NH * HS + NKV * HS), r * (C + F)
    lora = 4 * (L * (qkv + o + gate_up + down) + V * C) + 6 * L * sum(pairs) + 6 * L * C * T
    again = {3: 2 * L * (gate_up + pairs[1]), 4: 2 * L * (qkv + o + gate_up + sum(pairs)) + 2 * L * C * T}
    for level, operations in again.items():
        found = estimate(lab, *size, "-r", level, "--lora", r, "--lora-targets", "q,v,up")["recompute_share"]
        assert found == pytest.approx(operations / lora, rel=0.02)   # stacked with their neighbours, q and v have more zeros than these
    step = 6 * (L * 12 * C * C + V * C) + 6 * L * C * T
    for level, operations in {2: 0, 3: 2 * L * 4 * C * C, 4: 2 * L * 8 * C * C + 2 * L * C * T}.items():
        size = ["-e", f"gpt2:L{L},H{NH},C{C},T{T},V{V}", "-b", 2, "-t", T, "-r", level]
        assert estimate(lab, *size, trainer="train_gpt2")["recompute_share"] == pytest.approx(operations / step, abs=1e-6)
        said = lab.run("--estimate", *size, variant="cpu-bf16").out
        assert (f"computed again for backward: {100 * operations / step:.1f} % of a step's matmul operations" in said) == (operations > 0)

@pytest.mark.parametrize("trainer, size, more", [("train_llama", "llama:L2,H4,C512,F1024,T64,V131", ["--lora", 4]), ("train_gpt2", "gpt2:L2,H4,C256,T64,V131", []),
                                                 ("train_llama", "llama:L2,H4,C512,F1024,T64,V131", ["--lora", 4, "--base", "nf4"])])
def test_out_of_memory_is_about_the_device(bench, trainer, size, more):
    """No tensor of the host is named, and no option that is set already."""
    given = options("-e", size, "-i", "plain.bin", "-b", B, "-t", 64, "-x", 1, "-r", 4, "--offload", 1, "--workspace", 1, *more)
    table = json.loads(bench.run(*given, "--estimate=json", variant="cpu-bf16", trainer=trainer).out)
    done = bench.run(*given, variant="cpu-bf16", trainer=trainer, status=1, env={"SIMT_MEMORY": table["total_bytes"] // 2})
    named = re.findall(r"^    (\w+) +[\d.]+ MiB   (.+)$", done.err, re.M)
    rows = sorted((row for row in table["rows"] if row["scope"] != "host" and "alias_of" not in row), key=lambda row: -row["bytes"])
    assert [next(r["bytes"] for r in rows if r["name"] == name) for name, _ in named] == [row["bytes"] for row in rows[:3]]
    hints = " ".join(hint for _, hint in named)
    assert len(named) == 3 and not re.search(r"--recompute|--offload|--embedding-on device", hints) and ("--base nf4" in hints) == (more == ["--lora", 4]), hints
    says(done.err, "--fit", "--estimate")

# ---- what is refused ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainer", ["train_gpt2", "train_llama"])
def test_contradictions(bench, trainer):
    name, _ = bench.base(GPT2 if trainer == "train_gpt2" else LLAMA)
    for given, *said in [(["--offload", 1], "--offload 1", "-r 4"), (["-r", 3, "--offload", 1], "--offload 1", "-r 4"), (["-r", 4, "--offload", 2], "--offload 2"),
                         (["-r", 5], "-r 5", "4"), (["--recompute", -1], "--recompute -1"), (["--row-chunks", 0], "--row-chunks 0"),
                         (["--row-chunks", "some"], "--row-chunks some", "auto"), (["-r", 4, "--row-chunks", B * T + 1], f"--row-chunks {B * T + 1}", f"{B * T} rows")]:
        done = bench.run(*options("-e", name, "-i", "plain.bin", "-b", B, "-t", T, *given), variant="cpu-fp32", trainer=trainer, status=2)
        says(done.err, "expected", *said)
        assert len(done.err.strip().splitlines()) == 1, done.err

# ---- resume ---------------------------------------------------------------------------------------------------------------

RESUMED = {"gpt2": (Case(GPT2), ["--row-chunks", 3]), "llama": (Case(LLAMA, given=[*LORA, "--lora-dropout", 0.3, "--embedding-on", "host"]), [])}

@pytest.mark.parametrize("which", RESUMED)
def test_resume_after_a_kill(bench, which):
    """Without a word to the process, whatever it is at: what goes on from its last checkpoint is what would have been."""
    case, more = RESUMED[which]
    name, trainer = bench.base(*case.model)
    given = options("-e", name, "-i", "plain.bin", "-b", B, "-t", T, "-d", 2 * B * T, "-k", "constant", "-f", 0, "-r", 4, "--offload", 1, *more,
                    *(f"{name}-{x[1:]}" if str(x).startswith("@") else x for x in case.given), "-n", 1, "-nk", 3, "-x", 100000, "-o", which)
    path = bench.path(which)
    shutil.rmtree(path, ignore_errors=True)
    with subprocess.Popen([str(program("cpu-fp32", trainer)), *given], cwd=bench.folder, env=environment(), stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not list(path.glob("step_0000000[2-9]")):
            assert process.poll() is None and time.monotonic() < until, process.stderr.read() if process.poll() is not None else "no step in a minute"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        ends(process)
    assert process.returncode == -signal.SIGKILL
    last = max(int(folder.name[5:]) for folder in path.glob("step_*") if not folder.name.endswith(".tmp"))
    how = ["-x", last + 2, "-n", 0, "-k", "constant", "-e", name, "-i", "plain.bin", "-b", B, "-t", T, "-d", 2 * B * T, "-f", 0, "-r", 4, "--offload", 1, *more]
    adapter = [f"{name}-{x[1:]}" if str(x).startswith("@") else x for x in case.given]
    went_on = bench.train(*how, "-o", which, "-y", 1, *(adapter if which == "gpt2" else adapter[2:]), variant="cpu-fp32", trainer=trainer)
    straight = bench.train(*how, "-o", f"{which}-straight", *adapter, variant="cpu-fp32", trainer=trainer)
    assert [line["train_loss"] for line in went_on.steps] == straight.losses[last:] and len(went_on.steps) == 2
    folder = f"step_{last + 2:08d}"
    assert bench.files(f"{which}/{folder}") == bench.files(f"{which}-straight/{folder}")

def test_a_resumed_run_says_what_is_otherwise(bench):
    """Chunks change the last bits; and what validates alone keeps nothing, with any of the options."""
    given = ["-e", GPT2, "-i", "plain.bin", "-j", "vplain.bin", "-b", B, "-t", T, "-f", 0, "-r", 4, "-o", "said"]
    bench.train(*given, "-x", 1, "--row-chunks", 3, variant="cpu-fp32")
    ran = bench.train(*given, "-x", 2, "-y", 1, "--row-chunks", 7, "--offload", 1, variant="cpu-fp32")
    says(ran.out, "--row-chunks was 3, is 7", "--offload was 0, is 1")
    straight = bench.train(*given[:-1], "straight", "-x", 3, "--row-chunks", 3, "-k", "constant", variant="cpu-fp32")
    bench.train(*given[:-1], "parts", "-x", 2, "-n", 2, "--row-chunks", 3, "-k", "constant", variant="cpu-fp32")
    went_on = bench.train(*given[:-1], "parts", "-x", 3, "-y", 1, "-k", "constant", variant="cpu-fp32")   # auto: as it was
    assert "--row-chunks was" not in went_on.out and [line["train_loss"] for line in went_on.steps] == straight.losses[2:]
    vals = [bench.train("-e", "said/step_00000002", "-j", "vplain.bin", "-b", B, "-t", T, "-x", 0, "-v", 1, "-f", 0, *more, variant="cpu-fp32").vals
            for more in ([], ["-r", 0], ["--row-chunks", 7], ["-r", 4, "--row-chunks", 7, "--offload", 1])]
    assert len(vals[0]) == 1 and all(close(v, vals[0], 1e-6) for v in vals)

# ---- streams --------------------------------------------------------------------------------------------------------------

LATE = ["late", "random:1", "random:2", "random:3"]

@pytest.mark.parametrize("case, variant, chunks", [("llama", "cpu-fp32", 3), ("llama lora", "cpu-fp32", 3), ("llama the middle", "cpu-fp32", 1), ("qwen3", "cpu-fp32", 1),
                                                   ("gpt2", "cpu-fp32", 1), ("gpt2 lora", "cpu-approxbp-fp32", 3), ("one layer", "cpu-fp32", 1)])
def test_late_streams(bench, case, variant, chunks):
    """Copies to the host and back, validation and samples between the steps; and the embedding's rows from the host."""
    way, case = ways(chunks)[0], CASES[case]
    if "host" in case.given:   # the third micro-batch's rows come into a buffer that a copy may still read
        case = Case(*case.model, given=case.given, marked=case.marked, micro_batches=3)
    eager = Seen(bench, case, variant, *way)
    for streams in LATE:
        assert Seen(bench, case, variant, *way, env={"SIMT_STREAMS": streams}).is_the_same_as(eager), streams

@pytest.mark.parametrize("trainer, size", [("train_gpt2", "gpt2:L3,H2,C48,T64,V131"), ("train_llama", "llama:L3,H4,K2,C32,F56,T64,V131")])
def test_late_streams_of_two_ranks(bench, trainer, size):
    """Collectives run in their stream, on both ranks; and blocks' inputs are on the host meanwhile."""
    logs = {}
    for streams in ("eager", *LATE):
        done = execute(*mpirun(2), program("cpu-multi-fp32", trainer),
                       *options("--log", f"{streams}.jsonl", "-e", size, "-i", "plain.bin", "-j", "vplain.bin", "-b", B, "-t", T, "-d", 4 * B * T, "-x", 2, "-f", 0,
                                "-v", 1, "-m", 1, "-z", 1, "-r", 4, "--offload", 1, "--row-chunks", 2), cwd=bench.folder,
                       env={"OMP_NUM_THREADS": 1, "OMPI_MCA_rmaps_base_oversubscribe": 1, "SIMT_STREAMS": streams})
        assert done.status == 0, done.out[-1000:] + done.err[-3000:]
        logs[streams] = [{k: line.get(k) for k in ("train_loss", "grad_norm", "val_loss", "peak_bytes")} for line in read_log(bench.path(f"{streams}.jsonl"))]
        bench.path(f"{streams}.jsonl").unlink()
    assert len(logs["eager"]) >= 5 and all(log == logs["eager"] for log in logs.values()), logs
