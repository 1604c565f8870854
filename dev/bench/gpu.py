"""The stages of gpu.sh: check, bench and peers, on one CUDA GPU, each in less than 9 minutes.

    dev/bench/gpu.sh [check|bench|peers|all] [--out DIR] [--minutes N] [--again] [--dry-run]

A stage writes what it has after every run, so that nothing is lost when one fails, hangs or is cut off. What failed is
recorded with its last lines, what was not reached with the reason. Called again, a stage goes on with what is missing, as long
as sources, GPU and driver are the same. dev/bench/README.md says what the files hold, report.py makes tables of them.
"""
import argparse
import contextlib
import csv
import glob
import hashlib
import itertools
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import namedtuple

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "prepro"))
from atomic import atomic  # noqa: E402

STAGES = ["check", "bench", "peers"]
VOCABULARY = 50257


def stop(message):
    sys.exit(f"gpu.sh: {message}")


def say(message):
    print(message, flush=True)


# ----------------------------------------------------------------------------
# what is run: modes, sizes, and the order in which they are wanted

# variant: a name's parts are the flags of its build. BEST is the faster of -ge 0 and 2, as measured here at -r 0
Mode = namedtuple("Mode", "row build variant options")
EXACT = Mode("exact, -r 0", "exact", "gpu-bf16", "-r 0 -ge 0")
FUSED = Mode("exact, -r 0 -ge 2", "exact", "gpu-bf16", "-r 0 -ge 2")
EXACT_R1 = Mode("exact, -r 1", "exact", "gpu-bf16", "-r 1 -ge BEST")
EXACT_R2 = Mode("exact, -r 2", "exact", "gpu-bf16", "-r 2 -ge BEST")
ACT = Mode("APPROX_ACT=2", "APPROX_ACT=2", "gpu-act-bf16", "-r 0 -ge 0")
NORM = Mode("MS_NORM=1, -r 1", "MS_NORM=1", "gpu-norm-bf16", "-r 1 -ge BEST")
BOTH = Mode("USE_APPROXBP=1", "USE_APPROXBP=1", "gpu-approxbp-bf16", "-r 0 -ge 0")
MODES = [EXACT, FUSED, EXACT_R1, EXACT_R2, ACT, NORM, BOTH]  # as tables have them

FLAGS = {"gpu": "CPU=0", "bf16": "PRECISION=BF16", "fp32": "PRECISION=FP32", "approxbp": "USE_APPROXBP=1",
         "norm": "MS_NORM=1", "act": "APPROX_ACT=2"}

# name: what -e takes, the batch that modes are compared at, and the tokens of a sequence
Model = namedtuple("Model", "name size B T")
SMALL = Model("124M", "d12", 64, 1024)
LARGE = Model("1558M", "d48", 8, 1024)
# --try: the same stages in seconds, to see that they run
TRY = {"124M": Model("124M", "gpt2:L2,H2,C64,T32,V50257", 2, 32), "1558M": Model("1558M", "gpt2:L3,H2,C64,T32,V50257", 2, 32)}

# batch: "fixed" is the model's, "largest" the largest power of two that fits. The modes that are compared most come first and
# last, so that a GPU that gets slower shows.
Want = namedtuple("Want", "model batch mode round")
COMPARED = [EXACT, FUSED, BOTH]
BENCH_FIRST = [Want("124M", "fixed", m, 1) for m in (*COMPARED, EXACT_R1, EXACT_R2, ACT, NORM)]
BENCH_FIRST += [Want("124M", "fixed", m, 2) for m in COMPARED]
BENCH_NEXT = [Want("1558M", "fixed", m, 1) for m in (BOTH, EXACT_R1, EXACT, NORM)]
BENCH_LAST = [Want("124M", "largest", m, 1) for m in (BOTH, EXACT, EXACT_R1, NORM, EXACT_R2)]
BENCH_LAST += [Want("1558M", "largest", m, 1) for m in (BOTH, EXACT_R1, NORM, EXACT_R2, EXACT)]
BENCH_LAST += [Want("1558M", "fixed", m, 1) for m in (EXACT_R2, ACT, FUSED)]
BENCH_LAST += [Want(m, "largest", mode, 1) for m in ("124M", "1558M") for mode in (ACT, FUSED)]
# what is set by hand and may be wrong on this GPU: chunks of the loss, cuBLASLt's workspace (MiB), GELU in the matmul's epilogue
SWEEPS = [Mode(f"exact, {option}", "exact", "gpu-bf16", f"-r 0 {option}") for option in
          (*(f"-ge 0 --loss-chunks {n}" for n in (4, 8, 13, 25)), *(f"-ge 0 --workspace {n}" for n in (32, 64, 128)), "-ge 1")]
BENCH_SWEEPS = [Want("124M", "fixed", m, 1) for m in SWEEPS]
BENCH = BENCH_FIRST + BENCH_NEXT + BENCH_SWEEPS + BENCH_LAST

# what the peers are called in tables, and torch_baseline.py's options
Peer = namedtuple("Peer", "program options")
COMPILED = Peer("torch.compile", "--compile")
EAGER = Peer("PyTorch, eager", "")
COMPILED_BF16 = Peer("torch.compile, bf16 parameters", "--compile --parameters bf16")
LLMC_R0 = Peer("llm.c, -r 0", "-r 0")
LLMC_R1 = Peer("llm.c, -r 1", "-r 1")
PEER_ROWS = [COMPILED, EAGER, COMPILED_BF16, LLMC_R0, LLMC_R1]
PEERS = [Want("124M", "fixed", EXACT, 1), Want("124M", "fixed", BOTH, 1), Want("124M", "fixed", COMPILED, 1),
         Want("124M", "fixed", EAGER, 1), Want("124M", "fixed", LLMC_R0, 1), Want("124M", "fixed", LLMC_R1, 1),
         Want("1558M", "fixed", BOTH, 1), Want("1558M", "fixed", EXACT_R1, 1), Want("1558M", "fixed", COMPILED, 1),
         Want("1558M", "fixed", EAGER, 1), Want("1558M", "fixed", LLMC_R1, 1), Want("124M", "fixed", COMPILED, 2),
         Want("124M", "largest", COMPILED, 1), Want("124M", "largest", EAGER, 1), Want("124M", "fixed", COMPILED_BF16, 1),
         Want("1558M", "largest", COMPILED, 1), Want("1558M", "largest", EAGER, 1)]

WARMUP, STEPS, STEPS_LARGEST = 5, 30, 26  # the median is of the steps after the first 5: 25, or 21
PROFILED = [EXACT, BOTH]


# ----------------------------------------------------------------------------
# the machine

class Machine:
    """The GPU that the programs will see, and the tools."""

    def __init__(self, pretend=False):
        if pretend:
            self.gpu, self.driver, self.arch, self.memory, self.cuda, self.alone = "GPU", "?", "ARCH", 0, "?", False
            self.index = "0"
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        self.index = visible
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not os.access(nvcc, os.X_OK):
            stop("there is no nvcc, neither on PATH nor in /usr/local/cuda/bin; this needs the CUDA Toolkit, 12 or 13.\n"
                 "Without a GPU, make test tests everything on the CPU backend.")
        self.nvcc = nvcc
        fields = "name,driver_version,compute_cap,memory.total,compute_mode"
        try:
            asked = subprocess.run(["nvidia-smi", "-i", visible, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                                   capture_output=True, text=True, timeout=60)
            row = [x.strip() for x in asked.stdout.splitlines()[0].split(",")]
            self.gpu, self.driver, self.memory = row[0], row[1], int(float(row[3])) << 20
            self.arch = re.fullmatch(r"(\d+)\.(\d)", row[2]).expand(r"\1\2")
            self.alone = "exclusive" in row[4].lower()  # one process at a time
        except (OSError, IndexError, ValueError, AttributeError, subprocess.TimeoutExpired):
            stop("no GPU is visible: nvidia-smi lists none. This needs one.\n"
                 "Without a GPU, make test tests everything on the CPU backend.")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release ([\d.]+)", version)
        self.cuda = found[1] if found else "?"

    def folder(self):
        """'NVIDIA H200' is h200."""
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"^nvidia\s+", "", self.gpu.lower())).strip("-") or "gpu"

    def tool(self, name, *places):
        """Its path, or None."""
        found = [shutil.which(name) or "", os.path.join(os.path.dirname(self.nvcc), name), *places]
        found += sorted(itertools.chain(*map(glob.glob, places)), reverse=True)
        return next((path for path in found if os.access(path, os.X_OK) and os.path.isfile(path)), None)

    def sanitizer(self):
        return self.tool("compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
                         "/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/*/compute-sanitizer")

    def profiler(self):
        return self.tool("ncu", "/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")


def commit():
    """This tree's, with a + where files differ from it."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def digest(*patterns):
    """Of the files that a stage's figures depend on."""
    h = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in glob.glob(os.path.join(ROOT, pattern))}):
        with open(path, "rb") as f:
            h.update(os.path.relpath(path, ROOT).encode() + b"\0" + f.read())
    return h.hexdigest()[:16]


# ----------------------------------------------------------------------------
# running programs

class Clock:
    """The stage's time. A command gets no more of it than is left, less what writing the results takes."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes - 10

    def left(self):
        return self.end - time.monotonic()


Done = namedtuple("Done", "status text seconds timed_out pid")
running = set()  # process groups of ours
OUR_VARIABLES = ("ARCH", "PRECISION", "USE_APPROXBP", "APPROX_ACT", "MS_NORM", "CPU", "SAN", "MULTI_GPU", "PTXAS", "BUILD",
                 "MAKEFLAGS", "MFLAGS", "MAKELEVEL")


def environment(machine):
    env = {k: v for k, v in os.environ.items() if k not in OUR_VARIABLES}
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's
    env["CUDA_VISIBLE_DEVICES"] = machine.index
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    return env


def execute(command, seconds, env, cwd=ROOT):
    """Runs a command to its end, or for so many seconds; it and what it has started end with us. Its output is the last MB."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out:
        try:
            p = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                 start_new_session=True)
        except OSError as e:
            return Done(127, str(e), 0.0, False, 0)
        timed_out = False
        running.add(p.pid)
        try:
            p.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()
            running.discard(p.pid)
        size = out.seek(0, os.SEEK_END)
        out.seek(max(0, size - (1 << 20)))
        text = out.read().decode(errors="replace")
    return Done(p.returncode, text, round(time.monotonic() - begin, 2), timed_out, p.pid)


def end_all():
    """What still runs on other threads."""
    for group in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def last_lines(text, n):
    return [line[:300] for line in text.rstrip().splitlines()[-n:]]


def written(command):
    """A command as one would type it in the project's folder."""
    parts = [os.path.relpath(str(x), ROOT) if str(x).startswith(ROOT + os.sep) else str(x) for x in command]
    if os.sep in str(command[0]) and not parts[0].startswith(("/", ".")):
        parts[0] = "./" + parts[0]
    return " ".join(map(shlex.quote, parts))


class DriverMemory:
    """What the driver says a process holds at its most: nvidia-smi, asked ten times a second. Where it does not know processes
    (in some containers), what the whole GPU holds more than before."""

    def __init__(self, machine, env):
        self.lock = threading.Lock()
        self.used = self.most = self.before = None
        self.of, self.streams = {}, []
        asked = {"--query-gpu=memory.used": self.gpu_line, "--query-compute-apps=pid,used_memory": self.process_line}
        for what, take in asked.items():
            try:
                ours, theirs = pty.openpty()  # into a pipe it might keep its lines for a while
                command = ["nvidia-smi", "-i", machine.index, what, "--format=csv,noheader,nounits", "-lms", "100"]
                p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL, env=env)
                os.close(theirs)
            except OSError:
                continue
            self.streams.append(p)
            threading.Thread(target=self.read, args=(ours, take), daemon=True).start()

    @staticmethod
    def read(fd, take):
        rest = b""
        while True:
            try:
                data = os.read(fd, 4096)
            except OSError:  # its end, on a terminal
                data = b""
            if not data:
                os.close(fd)
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                take(line.decode(errors="replace").strip())

    def gpu_line(self, line):
        if line.isdigit():
            with self.lock:
                self.used = int(line) << 20
                self.most = max(self.most or 0, self.used)

    def process_line(self, line):
        found = re.fullmatch(r"(\d+), *(\d+)", line)
        if found:
            with self.lock:
                pid, used = int(found[1]), int(found[2]) << 20
                self.of[pid] = max(self.of.get(pid, 0), used)

    def begin(self):
        """Before a process starts, when the one before it has left."""
        for _ in range(30):
            time.sleep(0.15)
            if self.used is not None:
                break
        with self.lock:
            self.before = self.most = self.used
            self.of.clear()

    def peak(self, pid):
        """(bytes, where they are from), or (None, None)."""
        with self.lock:
            if self.of.get(pid):
                return self.of[pid], "process"
            if self.most is not None and self.before is not None and self.most > self.before:
                return self.most - self.before, "GPU"
        return None, None

    def close(self):
        for p in self.streams:
            p.terminate()
            p.wait()


# ----------------------------------------------------------------------------
# results

def write_json(path, value):
    """All of it or nothing; an entry of a list a line."""
    def lines(x):
        return "[\n  " + ",\n  ".join(map(json.dumps, x)) + "\n ]" if x else "[]"
    parts = [f"{json.dumps(k)}: {lines(v) if isinstance(v, list) else json.dumps(v)}" for k, v in value.items()]
    with atomic(path) as (f,):
        f.write(("{\n " + ",\n ".join(parts) + "\n}\n").encode())


def read_json(path):
    try:
        with open(path) as f:
            value = json.load(f)
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


class Results:
    """A file of results: its head, and entries in the order of a plan. What an earlier call has done of the same is kept."""

    def __init__(self, path, head, entries, plan, again=False):
        self.path, self.head, self.entries = path, head, entries  # entries: "runs", "items", ...
        self.by = {key: dict(entry, skipped="not reached") for key, entry in plan.items()}
        self.kept = set()
        old = read_json(path)
        if old and not same(old, head):
            os.replace(path, path + ".before")  # another tree's, or another machine's; here for you to keep or to delete
            say(f"{path}: is of other sources, another GPU or another driver; kept as {os.path.basename(path)}.before")
            old = {}
        for entry in [] if again else old.get(entries, []):
            key = entry.get("id")
            if key in self.by:
                self.by[key] = entry
                if finished(entry):
                    self.kept.add(key)
        if self.kept and head["commit"] == "unknown":  # no git here, but there was when it began
            head["commit"] = old.get("commit", "unknown")
        self.write()

    def has(self, key):
        return key in self.kept

    def put(self, key, **what):
        """What came of it. Being skipped does not replace an error of an earlier call."""
        plan = ("id", "name", "program", "model", "mode", "row", "batch", "round", "T")
        entry = {k: v for k, v in self.by[key].items() if k in plan}
        if "skipped" in what and "error" in self.by[key]:
            return
        self.by[key] = {**entry, **what}
        self.write()

    def write(self):
        write_json(self.path, {**self.head, **self.summary(), self.entries: list(self.by.values())})

    def summary(self):
        return {}

    def failed(self):
        return [key for key, e in self.by.items() if "error" in e or e.get("status") == "failed"]

    def missing(self):
        return [key for key, e in self.by.items() if "skipped" in e]


class Checks(Results):
    def summary(self):
        states = [e.get("status", "not reached") for e in self.by.values()]
        return {"tests": {"passed": states.count("ok"), "failed": states.count("failed"),
                          "unfinished": len(states) - states.count("ok") - states.count("failed")}}


def same(old, head):
    return all(old.get(k) == head[k] for k in ("gpu", "driver", "cuda", "source"))


def finished(entry):
    if "error" in entry or "skipped" in entry or entry.get("status", "ok") != "ok":
        return False
    return any(what in entry for what in ("status", "tokens_per_s", "rows", "kernels"))


# ----------------------------------------------------------------------------
# a stage

class Stage:
    """What the stages share."""

    def __init__(self, name, a):
        self.name, self.a = name, a
        self.dry = a.dry_run
        self.machine = Machine(self.dry)
        self.env = environment(self.machine)
        self.clock = Clock(a.minutes)
        self.models = TRY if a.try_it else {m.name: m for m in (SMALL, LARGE)}
        self.steps = {"fixed": 8, "largest": 8} if a.try_it else {"fixed": STEPS, "largest": STEPS_LARGEST}
        self.warmup = 2 if a.try_it else WARMUP
        self.folder = os.path.join(os.path.abspath(a.out), self.machine.folder())
        self.scratch = os.path.join(os.path.abspath(a.build), "gpu-scratch")
        self.data = os.path.join(self.scratch, "tokens.bin")
        self.token_count = 1 << (11 if a.try_it else 21)  # a batch is no larger
        self.memory = None
        self.cores = os.cpu_count() or 1
        if not self.dry:
            os.makedirs(self.folder, exist_ok=True)
            os.makedirs(self.scratch, exist_ok=True)
            say(f"{self.machine.gpu}, driver {self.machine.driver}, CUDA {self.machine.cuda}: {name}, {a.minutes:g} minutes")

    def path(self, variant, program):
        return os.path.join(os.path.abspath(self.a.build), variant, program)

    def results(self, name, patterns, entries, plan, kind=Results, **more):
        m = self.machine
        head = {"gpu": m.gpu, "driver": m.driver, "cuda": m.cuda, "commit": self.a.commit or commit(),
                "source": digest(*patterns) + ("-try" if self.a.try_it else ""),
                "command": "dev/bench/gpu.sh " + " ".join(map(shlex.quote, sys.argv[1:])),
                "date": time.strftime("%Y-%m-%d", time.gmtime()), **more}
        return kind(os.path.join(self.folder, f"{name}.json"), head, entries, plan, self.a.again)

    # ---- building

    def make_command(self, variant, targets):
        flags = [FLAGS[part] for part in variant.split("-")]
        into = os.path.join(os.path.abspath(self.a.build), variant)
        flags = [f"BUILD={into}", f"ARCH={self.machine.arch}", *flags]
        return ["make", "-k", "-Otarget", "--no-print-directory", *targets, *flags]

    def build(self, wanted):
        """wanted: {variant: [program]}. All at once on all cores; returns {(variant, program): None or what went wrong}."""
        if self.dry:
            for variant, targets in wanted.items():
                say(written(self.make_command(variant, targets)))
            return {(v, t): None for v, targets in wanted.items() for t in targets}
        say(f"building {sum(map(len, wanted.values()))} programs in {len(wanted)} variants on {self.cores} cores")
        begin, logs = time.time(), {v: os.path.join(self.scratch, f"{v}.log") for v in wanted}
        rules = [f".PHONY: all {' '.join(wanted)}", f"all: {' '.join(wanted)}"]
        for variant, targets in wanted.items():
            command = self.make_command(variant, targets)
            line = " ".join(["$(MAKE)", *map(shlex.quote, command[1:])])
            rules += [f"{variant}:", f"\t@{line} >{shlex.quote(logs[variant])} 2>&1"]
        makefile = os.path.join(self.scratch, "variants.mk")
        with open(makefile, "w") as f:
            f.write("\n".join(rules) + "\n")
        done = execute(["make", "-k", f"-j{self.cores}", "-f", makefile], self.clock.left(), self.env)
        came = {}
        for variant, targets in wanted.items():
            try:
                with open(logs[variant], errors="replace") as f:
                    log = f.read()
            except OSError:
                log = done.text
            up_to_date = re.findall(r"^make\S* '(\S+)' is up to date|^make\S* Nothing to be done for '(\S+)'", log, re.M)
            fine = {os.path.basename(x or y) for x, y in up_to_date}
            for target in targets:
                path = self.path(variant, target)
                new = os.path.exists(path) and os.path.getmtime(path) >= begin - 2
                current = new or done.status == 0 or os.path.basename(target) in fine
                ok = os.access(path, os.X_OK) and not done.timed_out and current
                wrong = ["it was not built:", *build_errors(log or done.text, target)]
                came[variant, target] = None if ok else "\n".join(wrong)
        failed = [f"{v}/{t}" for (v, t), wrong in came.items() if wrong]
        say(f"built in {done.seconds:.0f} seconds" + (f"; NOT built: {' '.join(failed)}" if failed else ""))
        return came

    # ---- training runs

    def tokens(self):
        """A token file in which few ids are frequent and most are rare, as in a text: the embedding's backward minds, nothing
        else does."""
        if self.dry or os.path.exists(self.data):
            return
        rng, total, weights = random.Random(1), 0.0, []
        for rank in range(VOCABULARY):
            total += 1 / (rank + 2.7)
            weights.append(total)
        ids = list(range(VOCABULARY))
        rng.shuffle(ids)
        count = self.token_count + 1
        body = array("H", rng.choices(ids, cum_weights=weights, k=count))
        if sys.byteorder == "big":
            body.byteswap()
        with atomic(self.data) as (f,):
            f.write(b"".join(n.to_bytes(4, "little") for n in (20240520, 1, count, *[0] * 253)))
            body.tofile(f)

    def train_command(self, model, batch, mode, ge, B, log, steps):
        options = mode.options.replace("BEST", str(ge)).split()
        return [self.path(mode.variant, "train_gpt2"), "-e", model.size, "-i", self.data, "-b", str(B), "-t", str(model.T),
                "-x", str(steps), *options, "-v", "0", "-s", "0", "--log", log]

    def measure(self, command, seconds, cwd=ROOT):
        """(what the driver saw, and how it ended)"""
        if self.memory is None:
            self.memory = DriverMemory(self.machine, self.env)
        self.memory.begin()
        done = execute(command, seconds, self.env, cwd)
        peak, source = self.memory.peak(done.pid)
        return {"peak_bytes": peak, "peak_of": source, "seconds": done.seconds}, done

    def train(self, want, ge, B, seconds):
        """One run of the trainer: an entry of the results."""
        model, mode = self.models[want.model], want.mode
        log = os.path.join(self.scratch, "run.jsonl")
        if os.path.exists(log):
            os.unlink(log)
        steps = self.steps[want.batch]
        command = self.train_command(model, want.batch, mode, ge, B, log, steps)
        if self.dry:
            say(written(command))
            return {"skipped": "dry run"}
        seen, done = self.measure(command, seconds)
        entry = {"variant": mode.variant, "command": written(command), "steps": steps, **seen}
        shape = re.search(r"^step +(\d+) sequences x (\d+) tokens", done.text, re.M)
        if shape:
            entry.update(B=int(shape[1]), T=int(shape[2]))
        elif B != "auto":
            entry.update(B=B, T=model.T)
        others = re.search(r"driver, libraries and others hold ([\d.]+)", done.text)
        if others:
            entry["others_bytes"] = round(float(others[1]) * 2**20)
        lines = read_log(log)
        ms = [line["ms"] for line in lines if "train_loss" in line][self.warmup:]
        if len(ms) >= (20 if not self.a.try_it else 1) and "B" in entry:
            last = [line for line in lines if "train_loss" in line][-1]
            mfu = [x["mfu"] for x in lines if x.get("mfu")]
            entry.update(timing(ms, entry["B"] * entry["T"]), loss=last["train_loss"],
                         ledger_bytes=next((x["peak_bytes"] for x in lines if "peak_bytes" in x), None),
                         mfu=statistics.median(mfu) if mfu else None)
            if done.status != 0:
                entry["note"] = f"the run ended with status {done.status}" + (", out of time" if done.timed_out else "")
        else:
            entry["error"] = ending(done)
        return entry

    def fixed_batch(self, model):
        """The model's batch, or on a smaller GPU the largest power of two that the exact mode fits with."""
        if self.dry or not self.machine.memory:
            return model.B
        B = model.B
        while B > 1:
            command = [self.path(EXACT.variant, "train_gpt2"), "-e", model.size, "-t", str(model.T), "-b", str(B),
                       *EXACT.options.split(), "--estimate=json"]
            done = execute(command, 60, self.env)
            found = re.search(r'"total_bytes": (\d+)', done.text)
            if not found or int(found[1]) < 0.94 * self.machine.memory - (1 << 30):
                break
            B //= 2
        return B

    def best_ge(self, results):
        """The faster of -ge 0 and 2 at -r 0, of what is measured so far."""
        speed = {}
        measured = list(results.by.values())
        if self.name == "peers":
            measured += read_json(os.path.join(self.folder, "bench.json")).get("runs", [])
        for e in measured:
            of = e.get("model") == "124M" and e.get("batch") == "fixed" and e.get("row") in (EXACT.row, FUSED.row)
            if of and "tokens_per_s" in e:
                speed.setdefault(e["row"], []).append(e["tokens_per_s"])
        if FUSED.row in speed and EXACT.row in speed:
            return 2 if max(speed[FUSED.row]) >= max(speed[EXACT.row]) else 0
        return 2 if self.dry else 0

    def wants(self, results, plan, built, batches):
        """Goes through a plan of runs of the trainer, ours."""
        for want in plan:
            key = identity(want)
            if results.has(key) and not self.dry:
                continue
            wrong = built.get((want.mode.variant, "train_gpt2"))
            if wrong:
                results.put(key, error=wrong.splitlines()[-12:])
                continue
            B = batches[want.model] if want.batch == "fixed" else "auto"
            need = self.needed(results, want)
            if not self.dry and self.clock.left() < need:
                results.put(key, skipped=f"out of time: it takes about {need:.0f} s, {max(self.clock.left(), 0):.0f} were left")
                continue
            ge = self.best_ge(results)
            entry = self.train(want, ge, B, min(self.clock.left(), 200))
            if B == "auto" and "error" in entry and entry.get("B", 1) > 1 and out_of_memory(entry["error"]):
                first = entry
                entry = self.train(want, ge, first["B"] // 2, min(self.clock.left(), 200))
                entry["note"] = f"-b auto chose {first['B']}, which did not fit"
            if self.dry:
                continue
            results.put(key, mode=f"{want.mode.build} {want.mode.options.replace('BEST', str(ge))}", **entry)
            say(f"  {want.model} {want.batch:7s} {want.mode.row:18s} {describe(results.by[key])}")

    def needed(self, results, want):
        """About how many seconds a run takes: from runs of the same model, or by default."""
        rates = [e for e in results.by.values()
                 if e.get("model") == want.model and e.get("tokens_per_s") and e.get("ledger_bytes")]
        if not rates:
            return 20 if want.model == "124M" else 40
        e = next((x for x in rates if x.get("row") == getattr(want.mode, "row", None)), rates[0])
        B = e["B"]
        if want.batch == "largest" and self.machine.memory:
            fits = self.machine.memory * e["B"] // e["ledger_bytes"]
            B = max(B, 1 << (min(fits, self.token_count // e["T"]).bit_length() - 1))
        steps = self.steps[want.batch]
        return 6 + max(e["seconds"] - e["steps"] * e["ms"] / 1e3, 2) + 1.2 * steps * B * e["T"] / e["tokens_per_s"]

    def close(self):
        if self.memory:
            self.memory.close()


def read_log(path):
    lines = []
    try:
        with open(path) as f:
            for line in f:
                lines.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return lines


def timing(ms, tokens):
    middle = statistics.median(ms)
    return {"timed_steps": len(ms), "ms": round(middle, 3), "ms_least": round(min(ms), 3), "ms_most": round(max(ms), 3),
            "tokens_per_s": round(tokens / middle * 1e3, 1)}


def build_errors(log, target):
    """What make said of one of its targets."""
    lines = [line for line in log.splitlines() if "not remade because" not in line]
    failed = re.compile(rf"\*\*\* \[.*{re.escape(target)}\] Error")
    at = next((i for i, line in enumerate(lines) if failed.search(line)), len(lines) - 1)
    begin = max((i + 1 for i, line in enumerate(lines[:at]) if "*** [" in line), default=0)
    return [line[:300] for line in lines[max(begin, at - 29):at + 1]]


def ending(done):
    why = "out of time" if done.timed_out else f"exit status {done.status}"
    return [f"{why} after {done.seconds:.0f} s", *last_lines(done.text, 12)]


def out_of_memory(error):
    return re.search("out of memory|does not fit|ALLOC_FAILED", "\n".join(error), re.I) is not None


def identity(want):
    who = getattr(want.mode, "row", None) or want.mode.program
    return f"{want.model}, {want.batch}, {who}, round {want.round}"


def planned(plan, models):
    """{id: the entry before it has run}"""
    entries = {}
    for w in plan:
        ours = isinstance(w.mode, Mode)
        entries[identity(w)] = {"id": identity(w), "program": "ours" if ours else w.mode.program, "model": w.model,
                                "mode": f"{w.mode.build} {w.mode.options}" if ours else w.mode.options,
                                "row": w.mode.row if ours else w.mode.program, "batch": w.batch, "round": w.round,
                                "T": models[w.model].T}
    return entries


def describe(e):
    if "skipped" in e:
        return f"skipped: {e['skipped']}"
    if "error" in e:
        return "FAILED: " + " | ".join(e["error"])[-300:]
    peak = f"{e['peak_bytes'] / 2**30:.2f} GiB" if e.get("peak_bytes") else "peak unknown"
    return f"B {e['B']:4d}  {e['ms']:9.2f} ms  {e['tokens_per_s']:11,.0f} tokens/s  {peak}"


# ----------------------------------------------------------------------------
# check

TINY = ["-e", "gpt2:L2,H2,C128,T64,V257", "-b", "2", "-t", "64", "-x", "3", "-v", "0", "-s", "0"]
TOOLS = ["memcheck", "racecheck", "initcheck"]
ERRORS = 77  # what compute-sanitizer ends with when it has found some
CHECKED = ["gpu-bf16", "gpu-fp32", "gpu-approxbp-bf16", "gpu-approxbp-fp32", "gpu-norm-bf16", "gpu-norm-fp32"]

# kind: numbers, kernel, train, pytest or a sanitizer's tool
Item = namedtuple("Item", "kind variant program")


def kernel_programs():
    return sorted("dev/cuda/" + os.path.basename(p)[:-3] for p in glob.glob(os.path.join(ROOT, "dev/cuda/*.cu")))


def check_plan():
    """In the order in which they are wanted when time is short."""
    kernels = kernel_programs()
    plan = [Item("numbers", v, "test_gpt2") for v in CHECKED]
    plan += [Item("kernel", v, k) for v in ("gpu-bf16", "gpu-fp32") for k in kernels]
    plan += [Item("train", v, "train_gpt2") for v in CHECKED]
    plan += [Item("pytest", "gpu-bf16", "dev/test/test_determinism.py")]
    # initcheck does not see what bf16 matmuls write through the copy engine, so it gets builds whose matmuls write plainly
    plan += [Item(tool, v, "train_gpt2") for tool in TOOLS
             for v in (("gpu-fp32", "gpu-approxbp-fp32") if tool == "initcheck" else ("gpu-bf16", "gpu-approxbp-bf16"))]
    plan += [Item(tool, "gpu-bf16", k) for tool in TOOLS for k in kernels]
    plan += [Item(tool, "gpu-fp32", k) for tool in TOOLS for k in kernels]
    return plan


class Check(Stage):
    def command(self, item, small=()):
        program = self.path(item.variant, item.program)
        if item.kind == "numbers" or item.kind == "kernel":
            return [program]
        if item.kind == "train":
            return [program, *TINY, "-i", self.tiny_data()]
        if item.kind == "pytest":
            return [sys.executable, "-B", "-m", "pytest", "-q", "-k", "gpu", "-p", "no:cacheprovider", item.program]
        checked = [self.machine.sanitizer() if not self.dry else "compute-sanitizer", "--tool", item.kind,
                   "--error-exitcode", str(ERRORS), "--print-limit", "20", "--target-processes", "application-only"]
        if item.kind == "racecheck":  # cuBLAS's kernels are not ours to check, and slow to
            checked += ["--kernel-name", "kns=_kernel"]
        if item.program == "train_gpt2":
            plain = ["-f", "0"] if item.variant.endswith("fp32") else []
            return [*checked, program, *TINY, *plain, "-i", self.tiny_data()]
        return [*checked, program, "--tight", *small]

    def tiny_data(self):
        path = os.path.join(self.scratch, "tiny.bin")
        if not self.dry and not os.path.exists(path):
            ids = bytes(random.Random(2).choices(range(256), k=4000))
            with open(path, "wb") as f:
                f.write(b"".join(n.to_bytes(4, "little") for n in (20240520, 1, len(ids), *[0] * 253)))
                f.write(b"".join(bytes([c, 0]) for c in ids))
        return path

    def run(self):
        plan = check_plan()
        entries = {self.key(i): {"id": self.key(i), "name": self.key(i)} for i in plan}
        wanted = {}
        for item in plan:
            if item.kind != "pytest" and item.program not in wanted.setdefault(item.variant, []):
                wanted[item.variant].append(item.program)
        if self.dry:
            self.build(wanted)
            for item in plan:
                say(written(self.command(item)))
            return []
        results = self.results("check", ["train_gpt2.cu", "test_gpt2.cu", "Makefile", "dev/cuda/*.cu*", "dev/test/fixtures/*"],
                               "items", entries, Checks)
        built = self.build({v: t for v, t in wanted.items() if t})
        self.tiny_data()
        lock = threading.Lock()

        def put(item, **what):
            with lock:
                results.put(self.key(item), **what)
                took = f"  {what['seconds']:.1f} s" if "seconds" in what else ""
                say(f"  {what.get('status', 'skipped'):9s} {self.key(item)}{took}  {what.get('skipped', '')}".rstrip())

        # First what runs natively, one after the other; then the sanitizers, which leave most of the GPU idle, side by side.
        native = [i for i in plan if i.kind not in TOOLS]
        checked = [i for i in plan if i.kind in TOOLS]
        for item in native:
            if not results.has(self.key(item)):
                self.native(item, built, put)
        if self.machine.sanitizer() is None:
            for item in checked:
                put(item, skipped="compute-sanitizer is not installed")
            return [results]
        self.far = threading.Lock()
        self.small = {k: self.small_option(k) for k in kernel_programs()}
        queue = iter([i for i in checked if not results.has(self.key(i))])

        def work():
            while True:
                with lock:
                    item = next(queue, None)
                if item is None:
                    return
                self.sanitized(item, built, put)
        many = 1 if self.machine.alone else max(1, min(4, self.cores // 3))
        workers = [threading.Thread(target=work, daemon=True) for _ in range(many)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        return [results]

    @staticmethod
    def key(item):
        what = {"numbers": "", "kernel": "", "train": "3 steps, twice", "pytest": "pytest -k gpu"}.get(item.kind, item.kind)
        return " ".join(x for x in (item.variant, item.program, what) if x)

    def small_option(self, kernel):
        """--small, if the program has it: the sanitizers make everything ten to a hundred times slower."""
        done = execute([self.path("gpu-bf16", kernel), "--help"], 20, self.env)
        return ["--small"] if re.search(r"^ *--small\b", done.text, re.M) else []

    def not_possible(self, item, built, put):
        wrong = built.get((item.variant, item.program))
        if wrong and item.kind in ("numbers", "kernel"):
            put(item, status="failed", output=wrong.splitlines())
        elif wrong:
            put(item, skipped="it was not built")
        elif self.clock.left() < 5:
            put(item, skipped="out of time")
        return wrong or self.clock.left() < 5

    def native(self, item, built, put):
        if self.not_possible(item, built, put):
            return
        if item.kind == "pytest":
            if os.path.abspath(self.a.build) != os.path.join(ROOT, "build"):
                put(item, skipped="it wants the programs in build")
                return
            if subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True).returncode != 0:
                put(item, skipped="pytest is not installed")
                return
        command = self.command(item)
        done = execute(command, min(120, self.clock.left()), self.env)
        entry = {"seconds": done.seconds, "command": written(command)}
        fine = done.status == 0
        if item.kind == "numbers":
            found = re.search(r"^(\d+) passed, (\d+) failed$", done.text, re.M)
            fine = fine and found is not None and int(found[2]) == 0 and int(found[1]) > 0
            if found:
                entry.update(passed=int(found[1]), failed=int(found[2]))
        elif item.kind == "kernel":
            fine = fine and re.search(r"^all is well$", done.text, re.M) is not None
            entry["checksum"] = (re.findall(r"^checksum ([0-9a-f]+)", done.text, re.M) or [None])[-1]
        elif item.kind == "train" and fine:
            again = execute(command, min(60, self.clock.left()), self.env)
            losses = [re.findall(r"loss (\S+) \| norm (\S+)", x.text) for x in (done, again)]
            numbers = [float(x) for pair in losses[0] for x in pair]
            fine = len(losses[0]) == 3 and losses[0] == losses[1] and all(abs(x) < 100 for x in numbers)
            entry["losses"] = [loss for loss, _ in losses[0]]
            done = done._replace(text=done.text + "\n---- again\n" + again.text)
        if not fine:
            entry["output"] = ending(done)[:1] + last_lines(done.text, 30)
        put(item, status="ok" if fine else "failed", **entry)

    def sanitized(self, item, built, put):
        if self.not_possible(item, built, put):
            return
        command = self.command(item, self.small.get(item.program, ()))
        limit = 150 if item.program == "train_gpt2" else 100
        # Tests of far offsets want half of the GPU's memory: not two of them at a time.
        alone = contextlib.nullcontext() if item.program == "train_gpt2" or self.small.get(item.program) else self.far
        with alone:
            done = execute(command, min(limit, self.clock.left()), self.env)
        entry = {"seconds": done.seconds, "command": written(command)}
        errors = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.text)
        found = int(errors[1] or errors[2]) if errors else None
        entry["errors"] = found
        if "Device not supported" in done.text:
            put(item, skipped="compute-sanitizer says: Device not supported", **entry)
        elif done.status == 0 and not found:
            put(item, status="ok", **entry)
        elif done.timed_out and not re.search(r"^=+ (Invalid|Uninitialized|Error: Race|Warning: Race)", done.text, re.M):
            put(item, skipped=f"out of time after {done.seconds:.0f} s, without an error so far", **entry)
        else:
            where = set(re.findall(r"\bat (?:void )?([\w:~]+)[<(]", done.text)) | set(re.findall(r"(\w+_kernel)\b", done.text))
            ours = sorted(name for name in where if name in our_kernels())
            if where and not ours and done.status == ERRORS:
                entry["note"] = "every kernel that it names is a library's: " + " ".join(sorted(where)[:5])
            put(item, status="failed", named=ours, output=ending(done)[:1] + last_lines(done.text, 30), **entry)


def our_kernels():
    names = set()
    for path in glob.glob(os.path.join(ROOT, "*.cu")) + glob.glob(os.path.join(ROOT, "dev/cuda/*.cu*")):
        with open(path, errors="replace") as f:
            names |= set(re.findall(r"\b(\w+_kernel)\s*\(", f.read()))
    return names


# ----------------------------------------------------------------------------
# bench

class Bench(Stage):
    def run(self):
        kernels = kernel_programs()
        variants = dict.fromkeys(m.variant for m in MODES)
        wanted = {v: ["train_gpt2"] for v in variants}
        wanted["gpu-bf16"] = ["train_gpt2", *kernels]
        if self.dry:
            self.build(wanted)
            results = None
        else:
            source = ["train_gpt2.cu", "Makefile"]
            plan = planned(BENCH, self.models)
            results = self.results("bench", source, "runs", plan, steps=self.steps["fixed"], warmup=self.warmup)
            programs = {k: {"id": k, "name": k} for k in kernels}
            self.kernels = self.results("kernels", [*source, "dev/cuda/*.cu*"], "programs", programs)
            steps = planned([Want("124M", "fixed", m, 1) for m in PROFILED], self.models)
            self.profile = self.results("profile", source, "runs", steps)
            built = self.build(wanted)
            self.tokens()
        if self.dry:
            results, built = Nothing(), {}
            self.kernels = self.profile = results
        batches = {name: self.fixed_batch(model) for name, model in self.models.items()}
        self.wants(results, BENCH_FIRST, built, batches)
        self.time_kernels(kernels, built)
        self.wants(results, BENCH_NEXT, built, batches)
        self.profile_steps(built, batches)
        self.wants(results, BENCH_SWEEPS, built, batches)
        self.wants(results, BENCH_LAST, built, batches)
        return [] if self.dry else [results, self.kernels, self.profile]

    def time_kernels(self, kernels, built):
        for k in kernels:
            command = [self.path("gpu-bf16", k), "--json"]
            if self.dry:
                say(written(command))
                continue
            if self.kernels.has(k):
                continue
            if built.get(("gpu-bf16", k)):
                self.kernels.put(k, error=built["gpu-bf16", k].splitlines()[-12:])
                continue
            if self.clock.left() < 15:
                self.kernels.put(k, skipped="out of time")
                continue
            done = execute(command, min(60, self.clock.left()), self.env)
            rows = []
            for line in done.text.splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    pass
            rows = [r for r in rows if isinstance(r, dict) and "ms" in r]
            entry = {"command": written(command), "seconds": done.seconds, "rows": rows}
            if done.status != 0 or not rows:
                entry["error"] = ending(done)
                if not rows:
                    del entry["rows"]
            self.kernels.put(k, **entry)
            say(f"  {k:24s} {len(rows)} rows" + ("" if done.status == 0 else "  FAILED"))

    def profile_steps(self, built, batches):
        """Every kernel of one step, each timed alone by Nsight Compute."""
        model, B = self.models["124M"], batches["124M"]
        ncu = "ncu" if self.dry else self.machine.profiler()
        for mode in PROFILED:
            key = identity(Want("124M", "fixed", mode, 1))
            table = os.path.join(self.scratch, "ncu.csv")
            program = self.train_command(model, "fixed", mode, 0, B, os.path.join(self.scratch, "profile.jsonl"), 1)
            command = [ncu or "ncu", "--csv", "--metrics", "gpu__time_duration.sum", "--clock-control", "none",
                       "--cache-control", "none", "--log-file", table, *program]
            if self.dry:
                say(written(command))
                continue
            if self.profile.has(key):
                continue
            if ncu is None:
                self.profile.put(key, skipped="ncu (Nsight Compute) is not installed")
                continue
            if built.get((mode.variant, "train_gpt2")) or self.clock.left() < 45:
                self.profile.put(key, skipped="not built" if built.get((mode.variant, "train_gpt2")) else "out of time")
                continue
            if os.path.exists(table):
                os.unlink(table)
            done = execute(command, min(100, self.clock.left()), self.env)
            kernels = read_profile(table)
            if done.status == 0 and kernels:
                self.profile.put(key, B=B, T=model.T, variant=mode.variant, command=written(command), seconds=done.seconds,
                                 kernels=kernels)
                ms, calls = (sum(k[what] for k in kernels.values()) for what in ("ms", "calls"))
                say(f"  profile of {mode.row}: {ms:.1f} ms in {calls} kernels")
            else:
                self.profile.put(key, command=written(command), error=ending(done))
                say(f"  profile of {mode.row}: FAILED")


class Nothing:
    """Results of a dry run."""
    by = {}

    def has(self, key):
        return False

    def put(self, key, **what):
        pass


BEFORE_THE_FIRST_STEP = {"init_normal_kernel", "init_constant_kernel", "widen_kernel"}
UNITS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1, "msecond": 1, "s": 1e3, "second": 1e3}
LIBRARY = "[library]"


def read_profile(path):
    """{kernel: {calls, ms}} of ncu's CSV; what is not ours is the library's, which is matmuls."""
    try:
        with open(path, newline="", errors="replace") as f:
            lines = [line for line in f if line.startswith('"')]
    except OSError:
        return {}
    ours, kernels = our_kernels(), {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") != "gpu__time_duration.sum":
            continue
        named = re.findall(r"\w+_kernel\b", row.get("Kernel Name") or "")
        name = next((n for n in named if n in ours), LIBRARY)
        try:
            ms = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        except (KeyError, TypeError, ValueError):
            continue
        if name not in BEFORE_THE_FIRST_STEP:
            k = kernels.setdefault(name, {"calls": 0, "ms": 0.0})
            k["calls"] += 1
            k["ms"] = round(k["ms"] + ms, 6)
    return kernels


# ----------------------------------------------------------------------------
# peers

class Peers(Stage):
    def run(self):
        plan = [w for w in PEERS if self.a.llmc or w.mode not in (LLMC_R0, LLMC_R1)]
        wanted = {m.variant: ["train_gpt2"] for m in (EXACT, BOTH)}
        python = self.python()
        if self.dry:
            results, built = Nothing(), self.build(wanted)
        else:
            source = ["train_gpt2.cu", "Makefile", "dev/bench/torch_baseline.py"]
            results = self.results("peers", source, "runs", planned(plan, self.models),
                                   steps=self.steps["fixed"], warmup=self.warmup, python=self.versions(python))
            built = self.build(wanted)
            self.tokens()
        batches = {name: self.fixed_batch(model) for name, model in self.models.items()}
        for want in plan:
            if isinstance(want.mode, Mode):
                self.wants(results, [want], built, batches)
            elif self.dry or not results.has(identity(want)):
                self.peer(results, want, python, batches[want.model])
        return [] if self.dry else [results]

    def python(self):
        """A Python that has PyTorch: --python, the one that runs this, or what is on PATH."""
        if self.a.python or self.dry:
            return self.a.python or "python3"
        for path in dict.fromkeys([sys.executable, shutil.which("python3"), "/usr/bin/python3"]):
            if path and subprocess.run([path, "-c", "import torch"], capture_output=True).returncode == 0:
                return path
        return None

    @staticmethod
    def versions(python):
        if python is None:
            return "none has PyTorch"
        code = ("import sys, torch\n"
                "print(f'Python {sys.version.split()[0]}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}')")
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else "unknown"

    def peer_command(self, want, python, B):
        model, steps = self.models[want.model], str(self.steps[want.batch])
        if want.mode in (LLMC_R0, LLMC_R1):
            # -v 0 would divide by zero there
            return ["./train_gpt2cu", "-i", self.data, "-j", self.data, "-e", model.size, "-b", str(B), "-t", str(model.T),
                    "-d", str(B * model.T), "-x", steps, *want.mode.options.split(), "-ge", "0", "-z", "0",
                    "-l", "0.0003", "-q", "1.0", "-u", "0", "-c", "0", "-v", "1000000", "-m", "1", "-s", "0", "-h", "0"]
        baseline = os.path.join(ROOT, "dev/bench/torch_baseline.py")
        return [python or "python3", "-B", baseline, "--model", model.size, "--batch", str(B),
                "--seq-len", str(model.T), "--steps", steps, "--warmup", str(self.warmup), "--data", self.data, "--json",
                *want.mode.options.split()]

    def peer(self, results, want, python, B0):
        key, llmc = identity(want), want.mode in (LLMC_R0, LLMC_R1)
        if self.dry:
            say(written(self.peer_command(want, python, B0 if want.batch == "fixed" else 2 * B0)))
            return
        if not llmc and python is None:
            results.put(key, skipped="no Python here has PyTorch")
            return
        sizes = [B0]
        if want.batch == "largest":
            sizes = self.largest(results, want, B0)
            if not sizes:
                results.put(key, skipped="no run at the fixed batch to go by, or nothing larger fits")
                return
        entry = {}
        for B in sizes:
            need = 25 + (60 if want.model == "124M" else 90) * ("compile" in want.mode.options)
            if self.clock.left() < need:
                entry = entry or {"skipped": f"out of time: it takes about {need} s, {max(self.clock.left(), 0):.0f} were left"}
                break
            command = self.peer_command(want, python, B)
            seen, done = self.measure(command, min(self.clock.left(), 240), self.a.llmc if llmc else ROOT)
            entry = {"command": written(command), "steps": self.steps[want.batch], "B": B, **seen}
            entry.update(self.read_llmc(done, B, self.models[want.model].T) if llmc else self.read_torch(done))
            if not out_of_memory(entry.get("error", [])):
                break
        results.put(key, **entry)
        say(f"  {want.model} {want.batch:7s} {want.mode.program:30s} {describe(results.by[key])}")

    def largest(self, results, want, B0):
        """Batches to try, the largest first: powers of two that the memory at the fixed batch promises."""
        e = results.by.get(identity(want._replace(batch="fixed")), {})
        if not e.get("allocated_bytes") or not e.get("parameters"):
            return []
        fixed = e["parameters"] * e["parameter_bytes"]
        each = max(e["allocated_bytes"] - fixed, 1) / e["B"]
        B = B0
        while fixed + 2 * B * each < 0.97 * self.machine.memory - (1 << 30) and B < 4096:
            B *= 2
        if self.a.try_it:
            B = min(B, 4 * B0)
        sizes = []
        while B > B0:
            sizes.append(B)
            B //= 2
        return sizes

    @staticmethod
    def read_torch(done):
        for line in reversed(done.text.splitlines()):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "tokens_per_s" in found:
                return found
        return {"error": ending(done)}

    def read_llmc(self, done, B, T):
        steps = re.findall(r"^step +\d+/\d+ .*?loss +([\d.]+).*?\| +([\d.]+) ms +\|", done.text, re.M)
        ms = [float(x) for _, x in steps][self.warmup:]
        if len(ms) < (20 if not self.a.try_it else 1):
            return {"error": ending(done)}
        return {**timing(ms, B * T), "loss": float(steps[-1][0])}


# ----------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Tests and measures on one GPU; dev/bench/README.md explains.")
    parser.add_argument("stage", nargs="?", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--out", default=os.path.join(ROOT, "dev/bench/results"), metavar="DIR",
                        help="results go into a folder there, named by the GPU (dev/bench/results)")
    parser.add_argument("--minutes", type=float, default=8.5, metavar="N", help="of each stage (8.5)")
    parser.add_argument("--build", default=os.path.join(ROOT, "build"), metavar="DIR", help="where programs are built (build)")
    parser.add_argument("--llmc", metavar="DIR", help="a folder that holds a built llm.c (train_gpt2cu), to time it as well")
    parser.add_argument("--python", metavar="PATH", help="the Python that has PyTorch (one that is found)")
    parser.add_argument("--commit", metavar="ID", help="what to record as the commit where there is no git")
    parser.add_argument("--again", action="store_true", help="runs everything, also what an earlier call has done")
    parser.add_argument("--try", dest="try_it", action="store_true", help="toy models: to see that it runs, not to measure")
    parser.add_argument("--dry-run", action="store_true", help="prints the commands, and runs none; needs no GPU")
    a = parser.parse_args()
    if not a.minutes > 0:
        parser.error(f"--minutes {a.minutes:g}: expected more than 0")
    if a.llmc:
        a.llmc = os.path.abspath(a.llmc)
        if not a.dry_run and not os.access(os.path.join(a.llmc, "train_gpt2cu"), os.X_OK):
            parser.error(f"--llmc {a.llmc}: there is no program train_gpt2cu in it; expected a folder in which llm.c was built")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.sh: ended from outside; what was measured is written"))
    kinds = {"check": Check, "bench": Bench, "peers": Peers}
    bad = 0
    for name in STAGES if a.stage == "all" else [a.stage]:
        stage = kinds[name](name, a)
        try:
            files = stage.run()
        finally:
            end_all()
            stage.close()
        for results in files:
            failed, missing = results.failed(), results.missing()
            done = len(results.by) - len(failed) - len(missing)
            say(f"{os.path.basename(results.path)}: {done} done, {len(failed)} failed, {len(missing)} not run"
                + ("; the same command goes on with them" if missing else ""))
            for key in failed[:20]:
                say(f"  FAILED {key}")
            if len(failed) > 20:
                say(f"  and {len(failed) - 20} more")
            bad += len(failed)
        if files:
            say("results are in " + " ".join(os.path.relpath(results.path) for results in files))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped; what was measured is written, and the same command goes on with the rest")
