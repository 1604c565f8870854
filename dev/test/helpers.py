"""What the tests share: running the built programs, and writing their files.

The writers and readers here use struct and nothing of the project, so that a mistake in the trainer's or prepro's idea of a format
cannot hide behind the same mistake here."""
import functools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "dev/test/fixtures"

# ---- programs, as `make variants` leaves them ----------------------------------------------------

NO_NVCC = "nvcc is not installed (CUDA Toolkit)"
ON_GPU = os.environ.get("ON_GPU") == "1"   # dev/bench/gpu.sh check: tests that name a build for the CPU get the GPU's

@functools.lru_cache(None)
def nvcc():
    there = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return there if os.access(there, os.X_OK) else None

@functools.lru_cache(None)
def gpu():
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return done.stdout.startswith("GPU")

def program(variant, name="train_gpt2"):
    """The path of a built program. What this machine cannot build is a skip, what was not built a failure."""
    if ON_GPU and not variant.startswith("gpu-"):
        if not variant.startswith("cpu-") or "multi" in variant:
            pytest.skip(f"{variant} is for the CPU alone")
        variant = variant.replace("cpu-", "gpu-")
    if variant.startswith(("nvcc", "gpu")) and not nvcc():
        pytest.skip(NO_NVCC)
    if variant.startswith("gpu") and not gpu():
        pytest.skip("no GPU is visible")
    if "multi" in variant and not shutil.which("mpicxx"):
        pytest.skip("mpicxx is not installed (Debian: libopenmpi-dev)")
    path = ROOT / "build" / variant / name
    if variant not in os.environ.get("VARIANTS", variant).split():
        pytest.skip(f"make quick does not build {variant}")
    if not path.exists():
        pytest.fail(f"{path} was not built: make variants", pytrace=False)
    return without_tf32(path) if ON_GPU and "fp32" in variant and name.startswith("train") else path

def without_tf32(path):
    """A script that runs a trainer so that its fp32 is fp32, unless -f says otherwise: what tests expect is of the CPU."""
    wrapper = path.parent / "exact" / path.name
    if not wrapper.exists():
        wrapper.parent.mkdir(exist_ok=True)
        own = wrapper.with_name(f"{path.name}.{os.getpid()}")   # others may be writing it, too
        own.write_text(f"""#!/bin/sh
case " $* " in *" -f "*|*tf32*) exec {path} "$@";; *) exec {path} "$@" -f 0;; esac
""")
        own.chmod(0o755)
        own.rename(wrapper)
    return wrapper

def allocated_peak(ran):
    """What the CPU backend saw allocated at the most; a GPU has nobody who counts but the program."""
    return ran.done["peak_bytes"] if ON_GPU else int(re.search(r"simt: peak (\d+) bytes", ran.err)[1])

def library(name, package=None):
    """A Python library that some tests use, or a skip that says what would bring it."""
    return pytest.importorskip(name, reason=f"Python's {name} is not installed ({f'Debian: {package}' if package else f'PyPI: {name}'})")

def heeding_modes():
    """What goes before a command to which the modes of files are to matter, as they do not to root."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

def mpirun(ranks):
    """The command that starts so many processes, whoever we are and however few cores there are."""
    if not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    return ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-np", str(ranks)]

def environment(**extra):
    """Ours, without what would change a program behind a test's back."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SIMT_", "OMP_", "MAKE", "MFLAGS"))}
    env["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait take minutes where the cores are busy with something else
    env.update({k: str(v) for k, v in extra.items()})
    return env

def execute(*command, cwd, env=None, timeout=120, before=None, input=None):
    """Runs a program to its end; before() is called in the new process first."""
    reads = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment(**(env or {})), timeout=timeout, preexec_fn=before,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **reads)
    return SimpleNamespace(status=done.returncode, out=done.stdout.decode(errors="replace"), err=done.stderr.decode(errors="replace"))

def script(path, *arguments, status=0, cwd=ROOT, timeout=900, prefix=(), **how):
    """Runs a Python script of the tree, which shows no traceback. Returns its output, or what it says on stderr if it is to fail."""
    done = execute(*prefix, sys.executable, "-B", ROOT / path, *arguments, cwd=cwd, timeout=timeout, **how)
    assert done.status == status and "Traceback" not in done.err, done.out[-1500:] + done.err[-1500:]
    return done.err if status else done.out

# ---- token files ---------------------------------------------------------------------------------

def header(*values):
    return struct.pack("<256i", *values, *[0] * (256 - len(values)))

def write_tokens(path, ids, bits=16, magic=None, version=None, count=None, cut=0):
    """A token file; magic, version and count can be told to lie, and cut bytes be missing at its end."""
    default_magic, default_version, letter = {16: (20240520, 1, "H"), 32: (20240801, 7, "I")}[bits]
    body = struct.pack(f"<{len(ids)}{letter}", *ids)
    Path(path).write_bytes((header(magic or default_magic, version or default_version, len(ids) if count is None else count)
                            + body)[:1024 + len(body) - cut])

def write_tokenizer(path, tokens, eot):
    Path(path).write_bytes(header(20240328, 2, len(tokens), eot) + b"".join(bytes([len(t)]) + t for t in tokens))

def words(n, vocab=257, seed=1):
    """n tokens that a model can learn something about: a few words of letters, in random order."""
    rng = random.Random(seed)
    vocabulary = [bytes(rng.choices(b"etaoinshrdlu", k=rng.randint(2, 6))) + b" " for _ in range(20)]
    text = b""
    while len(text) < n:
        text += rng.choice(vocabulary)
    return [c % vocab for c in text[:n]]

# ---- models --------------------------------------------------------------------------------------

SLOTS = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b",
         "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb"]
MATRICES = ["wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"]

def padded(V):
    return (V + 127) // 128 * 128

class Shape:
    """Sizes of a GPT-2; size() is what -e takes."""

    def __init__(self, L=2, H=2, C=32, T=32, V=257):
        self.L, self.H, self.C, self.T, self.V, self.Vp = L, H, C, T, V, padded(V)

    def size(self):
        return f"gpt2:L{self.L},H{self.H},C{self.C},T{self.T},V{self.V}"

    def counts(self):
        """Elements of each tensor, in the order of the file."""
        L, C = self.L, self.C
        return dict(zip(SLOTS, [self.Vp * C, self.T * C, L * C, L * C, L * 3 * C * C, L * 3 * C, L * C * C, L * C,
                                L * C, L * C, L * 4 * C * C, L * 4 * C, L * 4 * C * C, L * C, C, C]))

    def header(self, version):
        return header(20240326, version, self.T, self.V, self.L, self.H, self.C, self.Vp)

def to_bf16(values):
    """float32 values to the upper 16 bits, to nearest, ties to even."""
    bits = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return [(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits]

def from_bf16(bits):
    return list(struct.unpack(f"<{len(bits)}f", struct.pack(f"<{len(bits)}I", *[b << 16 for b in bits])))

def random_model(shape, seed=1, std=0.08):
    """{name: values}, in float32 that bf16 can hold, so that both versions of the file say the same."""
    rng = random.Random(seed)
    tensors = {name: from_bf16(to_bf16([rng.gauss(1 if name in ("ln1w", "ln2w", "lnfw") else 0, std) for _ in range(n)]))
               for name, n in shape.counts().items()}
    for i in range(shape.V * shape.C, shape.Vp * shape.C):
        tensors["wte"][i] = 0.0
    return tensors

def model_bytes(shape, tensors, version):
    flat = [x for name in SLOTS for x in tensors[name]]
    body = struct.pack(f"<{len(flat)}f", *flat) if version == 3 else struct.pack(f"<{len(flat)}H", *to_bf16(flat))
    return shape.header(version) + body

def write_model(path, shape, tensors, version=3):
    Path(path).write_bytes(model_bytes(shape, tensors, version))

def read_model(path, shape):
    """{name: values} after checking what any model of this shape must be, llm.c's file or a directory. Values are as stored, widened
    to float; a directory has no padding, so its rows come from here."""
    if Path(path).is_dir():
        found = read_safetensors(Path(path) / "model.safetensors")
        expected = hf_tensors(shape, {name: [0.0] * n for name, n in shape.counts().items()})
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
        return from_hf(shape, found)
    data = Path(path).read_bytes()
    head = struct.unpack("<256i", data[:1024])
    version = head[1]
    assert head[:8] == (20240326, version, shape.T, shape.V, shape.L, shape.H, shape.C, shape.Vp)
    total = sum(shape.counts().values())
    assert len(data) == 1024 + total * {3: 4, 5: 2}[version]
    flat = struct.unpack(f"<{total}f", data[1024:]) if version == 3 else from_bf16(struct.unpack(f"<{total}H", data[1024:]))
    tensors, at = {}, 0
    for name, n in shape.counts().items():
        tensors[name] = list(flat[at:at + n])
        at += n
    return tensors

# ---- models in Hugging Face's format --------------------------------------------------------------

Tensor = namedtuple("Tensor", "dtype shape data")   # as in a file: F32, [2, 3], bytes

def pack(dtype, values):
    return struct.pack(f"<{len(values)}H", *to_bf16(values)) if dtype == "BF16" else struct.pack(f"<{len(values)}{FLOATS[dtype]}", *values)

def unpack(t):
    n = len(t.data) // struct.calcsize(FLOATS[t.dtype])
    numbers = struct.unpack(f"<{n}{FLOATS[t.dtype]}", t.data)
    return from_bf16(numbers) if t.dtype == "BF16" else list(numbers)

FLOATS = {"F32": "f", "F16": "e", "BF16": "H"}

def safetensors_bytes(tensors, change=None, header=None, length=None):
    """A file of {name: Tensor}. change(entries) may lie in what the header says; header and length replace its bytes and their count."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        entries[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    if change:
        change(entries)
    text = json.dumps(entries).encode() if header is None else header
    return struct.pack("<Q", len(text) if length is None else length) + text + b"".join(t.data for t in tensors.values())

def read_safetensors(path):
    """{name: Tensor} of a file that has neither gaps nor overlaps, and says that it is PyTorch's."""
    data = Path(path).read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:begin])
    metadata = entries.pop("__metadata__")
    assert metadata.pop("format") == "pt" and set(metadata) <= {"lora_targets"} and begin % 8 == 0
    tensors, at = {}, begin
    for name, e in sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"]):
        assert begin + e["data_offsets"][0] == at
        tensors[name] = Tensor(e["dtype"], e["shape"], data[at:begin + e["data_offsets"][1]])
        at += len(tensors[name].data)
        assert len(tensors[name].data) == math.prod(e["shape"]) * struct.calcsize(FLOATS[e["dtype"]]), name
    assert at == len(data)
    return tensors

HF_NAMES = dict(zip(SLOTS, [  # of our tensors; those that Conv1D has lie transposed
    "wte.weight", "wpe.weight", "h.{}.ln_1.weight", "h.{}.ln_1.bias", "h.{}.attn.c_attn.weight", "h.{}.attn.c_attn.bias", "h.{}.attn.c_proj.weight",
    "h.{}.attn.c_proj.bias", "h.{}.ln_2.weight", "h.{}.ln_2.bias", "h.{}.mlp.c_fc.weight", "h.{}.mlp.c_fc.bias", "h.{}.mlp.c_proj.weight",
    "h.{}.mlp.c_proj.bias", "ln_f.weight", "ln_f.bias"]))

def hf_places(shape):
    """Of each tensor of a model's directory: (name, ours, where it begins in ours, rows, columns or 0, is it transposed?)."""
    C = shape.C
    columns = {"wte": C, "wpe": C, "qkvw": C, "attprojw": C, "fcw": C, "fcprojw": 4 * C}
    for slot, n in shape.counts().items():
        for layer in range(shape.L if "{}" in HF_NAMES[slot] else 1):
            size = shape.V * C if slot == "wte" else n // shape.L if "{}" in HF_NAMES[slot] else n
            cols = columns.get(slot, 0)
            yield "transformer." + HF_NAMES[slot].format(layer), slot, layer * size, size // max(cols, 1), cols, slot in MATRICES[2:]

def transpose(values, rows, cols):
    return [values[r * cols + c] for c in range(cols) for r in range(rows)]

def hf_tensors(shape, tensors, dtype="F32"):
    """{name: Tensor} of {our name: values}."""
    found = {}
    for name, slot, begin, rows, cols, turned in hf_places(shape):
        values = tensors[slot][begin:begin + rows * max(cols, 1)]
        dims = [cols, rows] if turned else [rows, cols] if cols else [rows]
        found[name] = Tensor(dtype, dims, pack(dtype, transpose(values, rows, cols) if turned else values))
    return found

def from_hf(shape, found):
    """The other way."""
    tensors = {slot: [0.0] * n for slot, n in shape.counts().items()}
    for name, slot, begin, rows, cols, turned in hf_places(shape):
        values = unpack(found[name])
        tensors[slot][begin:begin + len(values)] = transpose(values, cols, rows) if turned else values
    return tensors

def hf_config(shape, **more):
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": shape.V, "n_positions": shape.T, "n_embd": shape.C,
            "n_layer": shape.L, "n_head": shape.H, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, **more}

def write_hf(folder, shape, tensors, shards=1, **config):
    """A model's directory of {name: Tensor}, in one file or so many shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, **config)))
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts):
        (folder / file).write_bytes(safetensors_bytes(part))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({
            "metadata": {"total_size": sum(len(t.data) for t in tensors.values())},
            "weight_map": {name: file for file, part in zip(files, parts) for name in part}}))

# ---- training ------------------------------------------------------------------------------------

LONG = {  # alias: long option
    "-i": "--train-data", "-j": "--val-data", "-e": "--model", "-o": "--out", "-b": "--batch", "-t": "--seq-len", "-d": "--total-batch",
    "-x": "--steps", "-k": "--schedule", "-l": "--lr", "-u": "--warmup", "-q": "--final-lr-fraction", "-c": "--weight-decay",
    "-sl": "--skip-loss-z", "-sg": "--skip-grad-z", "-v": "--val-every", "-m": "--val-batches", "-s": "--sample-every",
    "-g": "--sample-tokens", "-a": "--overfit", "-f": "--tf32", "-w": "--master-weights", "-ge": "--gelu-fusion", "-z": "--zero",
    "-r": "--recompute", "-n": "--checkpoint-every", "-nk": "--keep", "-y": "--resume"}

# a run of a second or less; "None" leaves an option out
SMALL = {"--train-data": "train.bin", "--val-data": "val.bin", "--model": Shape().size(), "--batch": 2, "--seq-len": 32, "--steps": 4,
         "--lr": 1e-3, "--val-every": 0, "--sample-every": 0}

def options(*given):
    """SMALL's options with those given in their place, as typed: options("--steps", 3) or options("-x", 3)."""
    merged, flags, given = {name: (name, value) for name, value in SMALL.items()}, [], list(given)
    while given:
        typed = given.pop(0)
        if "=" in typed or typed == "--estimate":
            flags.append(typed)
            continue
        value = given.pop(0)
        merged[LONG.get(typed, typed)] = (typed, value)
    return [str(x) for pair in merged.values() if pair[1] is not None for x in pair] + flags

def read_log(path):
    """The lines of a --log file, each checked to be JSON (which has no NaN)."""
    with open(path) as f:
        return [json.loads(line, parse_constant=pytest.fail) for line in f]

class Lab:
    """A folder with train.bin, val.bin and tokenizer.bin in it, in which the trainer runs."""

    def __init__(self, folder, tokens=4000):
        self.folder, self.runs = folder, 0
        write_tokens(folder / "train.bin", words(tokens))
        write_tokens(folder / "val.bin", words(1000, seed=2))
        write_tokenizer(folder / "tokenizer.bin", [bytes([i]) for i in range(256)] + [b"<|endoftext|>"], 256)

    def path(self, name):
        return self.folder / name

    def run(self, *arguments, variant="cpu-bf16", trainer="train_gpt2", status=0, **how):
        """Exactly these arguments."""
        done = execute(program(variant, trainer), *arguments, cwd=self.folder, **how)
        assert status is None or done.status == status, \
            f"{' '.join(map(str, arguments))}\nexit status {done.status}, expected {status}\n{done.out[-600:]}\n{done.err[-2000:]}"
        return done

    def train(self, *given, **how):
        """SMALL's arguments and these. The result has the log: .log all lines, .steps, .losses, .vals, .done."""
        self.runs += 1
        name = f"log{self.runs}.jsonl"
        result = self.run(*options("--log", name, *given), **how)
        result.log = read_log(self.path(name)) if self.path(name).exists() else []
        result.steps = [line for line in result.log if "train_loss" in line]
        result.losses = [line["train_loss"] for line in result.steps]
        result.vals = [line["val_loss"] for line in result.log if "val_loss" in line]
        result.done = result.log[-1] if result.log and result.log[-1].get("done") else None
        return result

    def files(self, folder):
        """{path: bytes} of what is in a folder and its folders, but for the lock of the runs that write there. An empty folder is b""."""
        where = self.path(folder)
        return {str(p.relative_to(where)): p.read_bytes() if p.is_file() else b"" for p in sorted(where.rglob("*"))
                if p.name != ".lock" and (p.is_file() or not any(p.iterdir()))}

def names(step, ranks=1):
    """Of the files of a checkpoint: the model first."""
    return [f"step_{step:08d}/{name}" for name in ("model.safetensors", "config.json", *(f"state_{rank:05d}.bin" for rank in range(ranks)))]

def learned(result):
    """What two runs that compute the same have in common: the log without its clock."""
    clock = ("ms", "tokens_per_s", "mfu")
    return [{k: v for k, v in line.items() if k not in clock} for line in result.log]

def close(a, b, tolerance):
    """Two lists of numbers, or two numbers, to a relative tolerance."""
    return a == pytest.approx(b, rel=tolerance, abs=0)

def ends(process, seconds=60):
    """What a process says until it ends; one that does not is killed, or leaving its `with` would wait for ever."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise

def says(message, *parts):
    """Every part stands in a message, whatever its line breaks."""
    flat = " ".join(message.split())
    missing = [p for p in parts if str(p) not in flat]
    assert not missing, f"expected {missing} in: {message}"
