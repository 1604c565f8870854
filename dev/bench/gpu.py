"""The stages of gpu.sh: check, bench and peers, on one CUDA GPU, each in less than 9 minutes.

    dev/bench/gpu.sh [check|bench|peers|all] [--out DIR] [--minutes N] [--again] [--dry-run]

A stage is a list of jobs: a name, a command, and what its output must have. What came of a job is a line of JSON in
results/GPU/STAGE.jsonl, written as soon as it ended. Called again, a stage goes on with what is missing or has failed, as long
as sources, GPU, driver and CUDA are the same. README.md says what the lines hold; report.py makes tables of them.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import glob
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

from common import ROOT, commit, digest

from atomic import atomic

SCRATCH = os.path.join(ROOT, "build/scratch")
TOKENS, TINY_TOKENS = os.path.join(SCRATCH, "tokens.bin"), os.path.join(SCRATCH, "tiny.bin")

# ---- modes, peers, sizes ---------------------------------------------------------------------------

# variant: the parts of its name are the flags of its build, or a peer's. BEST: the faster of -ge 0 and 2, as measured at -r 0
Mode = namedtuple("Mode", "row variant options")
EXACT = Mode("exact, -r 0", "gpu-bf16", "-r 0 -ge 0")
FUSED = Mode("exact, -r 0 -ge 2", "gpu-bf16", "-r 0 -ge 2")
EXACT_R1 = Mode("exact, -r 1", "gpu-bf16", "-r 1 -ge BEST")
EXACT_R2 = Mode("exact, -r 2", "gpu-bf16", "-r 2 -ge BEST")
ACT = Mode("APPROX_ACT=2", "gpu-act-bf16", "-r 0 -ge 0")
NORM = Mode("MS_NORM=1, -r 1", "gpu-norm-bf16", "-r 1 -ge BEST")
BOTH = Mode("USE_APPROXBP=1", "gpu-approxbp-bf16", "-r 0 -ge 0")
MODES = [EXACT, FUSED, EXACT_R1, EXACT_R2, ACT, NORM, BOTH]  # as tables have them
FLAGS = {"gpu": "CPU=0", "bf16": "PRECISION=BF16", "fp32": "PRECISION=FP32", "approxbp": "USE_APPROXBP=1",
         "norm": "MS_NORM=1", "act": "APPROX_ACT=2"}
# what is set by hand and may be wrong on this GPU: chunks of the loss, cuBLASLt's workspace (MiB), GELU in the matmul's epilogue
SWEPT = [*(f"-ge 0 --loss-chunks {n}" for n in (4, 8, 13, 25)), *(f"-ge 0 --workspace {n}" for n in (32, 64, 128)), "-ge 1"]
SWEEPS = [Mode(f"exact, {option}", "gpu-bf16", f"-r 0 {option}") for option in SWEPT]

COMPILED = Mode("torch.compile", "torch", "--compile")
EAGER = Mode("PyTorch, eager", "torch", "")
COMPILED_BF16 = Mode("torch.compile, bf16 parameters", "torch", "--compile --parameters bf16")
LLMC_R0, LLMC_R1 = Mode("llm.c, -r 0", "llm.c", "-r 0"), Mode("llm.c, -r 1", "llm.c", "-r 1")
PEERS = [COMPILED, EAGER, COMPILED_BF16, LLMC_R0, LLMC_R1]

# size: what -e takes; B: the batch that modes are compared at, halved until gib, what exact -r 0 takes at it, fits the GPU
Model = namedtuple("Model", "name size B T gib")
SMALL = Model("124M", "d12", 64, 1024, 23)
LARGE = Model("1558M", "d48", 8, 1024, 45)
# --try: the same stages in seconds, to see that they run
TRY = [Model("124M", "gpt2:L2,H2,C64,T32,V50257", 2, 32, 0), Model("1558M", "gpt2:L3,H2,C64,T32,V50257", 2, 32, 0)]
STEPS, TRY_STEPS = {"fixed": 30, "largest": 26}, {"fixed": 8, "largest": 8}
WARMUP = 5  # steps that are not timed; the median is of the others: 25, or 21

# ---- jobs ------------------------------------------------------------------------------------------

# expect: what the output must match; need: seconds without which it is not begun; read: makes figures of (output, about); about:
# what else its line of results says
Job = namedtuple("Job", "name command expect need read about", defaults=[lambda text, about: {}, {}])

def path(variant, program):
    return os.path.join(ROOT, "build", variant, program)

def kernel_programs():
    return sorted("dev/cuda/" + os.path.basename(p)[:-3] for p in glob.glob(os.path.join(ROOT, "dev/cuda/*.cu")))

# a run of each trainer, on tensor cores in bf16
TINY = {program: ["-e", size, "-b", "2", "-t", "64", "-x", "3", "-v", "0", "-s", "0", "-i", TINY_TOKENS]
        for program, size in (("train_gpt2", "gpt2:L2,H2,C128,T64,V257"), ("train_llama", "llama:L2,H4,K2,C128,D64,F192,T64,V257"))}
# and what the memory plane and the other optimizers do besides: (program, what, options)
MORE = [(program, what, [*TINY[program], *options.split()]) for program in TINY for what, options in
        (("-r 4 --offload 1", "-r 4 --offload 1 --row-chunks 3"), ("adamw8", "--optimizer adamw8"), ("adalomo", "--optimizer adalomo -r 4"))]
# three steps, and the same losses and norms once more
TWICE = "(?s)" + ".*".join([r"loss (\d\.\d+) \| norm (\d{1,2}\.\d+) "] * 3 + [rf"loss \{i} \| norm \{i + 1} " for i in (1, 3, 5)])
# tests of make test that run as well with programs for a GPU in place of the CPU's
SUITE = [f"dev/test/test_{name}.py" for name in ("train", "llama", "masks", "nf4", "modes", "lora", "hf", "resume", "ends", "files", "determinism",
                                                   "plane", "optimizers")]
CHECKED = ["gpu-bf16", "gpu-fp32", "gpu-approxbp-bf16", "gpu-approxbp-fp32", "gpu-norm-bf16", "gpu-norm-fp32"]

def check_jobs(a, m):
    """In the order in which they are wanted when time is short."""
    kernels = kernel_programs()
    jobs = [Job(f"{v} test_gpt2", [path(v, "test_gpt2")], r"^(?P<passed>[1-9]\d*) passed, 0 failed$", 10) for v in CHECKED]
    jobs += [Job(f"{v} {k}", [path(v, k)], "^all is well$", 10) for v in ("gpu-bf16", "gpu-fp32") for k in kernels]
    jobs += [Job(f"{v} {program}, twice", ["sh", "-c", '"$@" && "$@"', "sh", path(v, program), *run], TWICE, 10)
             for v in (*CHECKED, "gpu-act-bf16") for program, run in TINY.items()]
    jobs += [Job(f"gpu-bf16 {program} {what}, twice", ["sh", "-c", '"$@" && "$@"', "sh", path("gpu-bf16", program), *run], TWICE, 10)
             for program, what, run in MORE]
    jobs += [Job("make test's, on the GPU", ["env", "ON_GPU=1", sys.executable, "-B", "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *a.pytest,
                                            *SUITE], r"^(?P<passed>[1-9]\d*) passed, 0 failed, ", 200)] * (a.pytest is not None)

    def sanitized(tool, variant, program, *options, what=""):
        # racecheck looks at our kernels alone: cuBLAS's are not ours to check, and slow to
        more = ["--kernel-name", "kns=_kernel"] if tool == "racecheck" else []
        return Job(f"{variant} {program} {what}{tool}", [m.sanitizer, "--tool", tool, "--error-exitcode", "77", "--print-limit", "20",
                   "--target-processes", "application-only", *more, path(variant, program), *options],
                   "ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", 30)
    # initcheck does not see what bf16 matmuls write through the copy engine, so it gets builds whose matmuls write plainly
    checked = [sanitized(tool, v, program, *run) for tool in ("memcheck", "racecheck") for v in ("gpu-bf16", "gpu-approxbp-bf16")
               for program, run in TINY.items()]
    checked += [sanitized(tool, "gpu-bf16", program, *run, what=f"{what}, ") for program, what, run in MORE for tool in ("memcheck", "racecheck")]
    checked += [sanitized("initcheck", v, program, *run, "-f", "0") for v in ("gpu-fp32", "gpu-approxbp-fp32") for program, run in TINY.items()]
    checked += [sanitized(tool, v, k, "--tight", "--small") for v in ("gpu-bf16", "gpu-fp32")
                for tool in ("memcheck", "racecheck", "initcheck") for k in kernels]
    return jobs + (checked if m.sanitizer else [])

def train(a, m, model, batch, who, round=1, steps=None):
    """A training run of ours or a peer's, at the batch for all or at the largest power of two that fits."""
    B, steps = model.B, str(steps or a.steps[batch])
    while B > 1 and m.memory and model.gib * B / model.B > m.memory / 2**30:
        B //= 2
    b = str(B) if batch == "fixed" else "auto" if who.variant.startswith("gpu-") else "LARGEST"
    shape = ["-e", model.size, "-i", TOKENS, "-b", b, "-t", str(model.T), "-x", steps, *who.options.split()]
    command = [path(who.variant, "train_gpt2"), *shape, "-v", "0", "-s", "0"]
    if who.variant == "llm.c":  # -v 0 would divide by zero there
        command = ["env", "-C", a.llmc, "./train_gpt2cu", *shape, "-j", TOKENS, "-d", str(B * model.T),
                   *"-ge 0 -z 0 -l 0.0003 -q 1.0 -u 0 -c 0 -v 1000000 -m 1 -s 0 -h 0".split()]
    elif who.variant == "torch":
        command = [a.python, "-B", os.path.join(ROOT, "dev/bench/torch_baseline.py"), *shape]
    about = {"program": who.row if who in PEERS else "ours", "model": model.name, "batch": batch, "row": who.row, "round": round,
             "B": B, "T": model.T, "warmup": a.warmup}
    need = (45 if batch == "largest" else 20) * (2 if model.name == LARGE.name else 1) + 60 * ("compile" in who.options)
    return Job(f"{model.name}, {batch}, {who.row}, round {round}", command, rf"^step +{steps}/{steps} ", need, read_steps, about)

def bench_jobs(a, m):
    """The modes that are compared most come first and again after a while, so that a GPU that gets slower shows."""
    small, large = a.models

    def trains(model, batch, modes, round=1):
        return [train(a, m, model, batch, mode, round) for mode in modes]
    profiles = []
    for job in [train(a, m, small, "fixed", mode, steps=1) for mode in (EXACT, BOTH)]:
        command = [m.ncu, *"--csv --metrics gpu__time_duration.sum --clock-control none --cache-control none".split(), *job.command]
        about = {k: job.about[k] for k in ("row", "B", "T")}
        profiles.append(Job(f"profile, {about['row']}", command, '^".*gpu__time_duration.sum', 45, read_profile, about))
    kernels = [Job(k, [path("gpu-bf16", k), "--json"], '^{.*"ms"', 15, read_rows) for k in kernel_programs()]
    return [*trains(small, "fixed", [EXACT, FUSED, BOTH, EXACT_R1, EXACT_R2, ACT, NORM]),
            *trains(small, "fixed", [EXACT, FUSED, BOTH], round=2), *kernels,
            *trains(large, "fixed", [BOTH, EXACT_R1, EXACT, NORM]), *(profiles if m.ncu else []), *trains(small, "fixed", SWEEPS),
            *trains(small, "largest", [BOTH, EXACT, EXACT_R1, NORM, EXACT_R2]),
            *trains(large, "largest", [BOTH, EXACT_R1, NORM, EXACT_R2, EXACT]), *trains(large, "fixed", [EXACT_R2, ACT, FUSED]),
            *trains(small, "largest", [ACT, FUSED]), *trains(large, "largest", [ACT, FUSED])]

def peers_jobs(a, m):
    """Ours run again in the same call, so that a peer is compared with a figure of the same minutes."""
    small, large = a.models
    plan = [*((small, "fixed", who) for who in (EXACT, BOTH, COMPILED, EAGER, LLMC_R0, LLMC_R1)),
            *((large, "fixed", who) for who in (BOTH, EXACT_R1, COMPILED, EAGER, LLMC_R1)), (small, "fixed", COMPILED, 2),
            (small, "largest", COMPILED), (small, "largest", EAGER), (small, "fixed", COMPILED_BF16),
            (large, "largest", COMPILED), (large, "largest", EAGER)]
    there = {"torch": a.python, "llm.c": a.llmc}
    return [train(a, m, *want) for want in plan if there.get(want[2].variant, True)]

def fill(job, known, memory):
    """A job's command, with what only earlier runs can tell: the faster -ge, and the largest batch that a peer's memory at the
    fixed one promises. None if they cannot tell, or nothing larger fits."""
    def fastest(mode):
        return max((e["tokens_per_s"] for e in known.values() if "tokens_per_s" in e
                    and (e["model"], e["batch"], e["row"]) == (SMALL.name, "fixed", mode.row)), default=0)
    best = "2" if fastest(FUSED) > fastest(EXACT) else "0"
    e = known.get(job.name.replace("largest", "fixed"), {})
    largest = B = e.get("B", 0)
    while e.get("peak_bytes") and 2 * largest * e["peak_bytes"] / B < 0.97 * memory and largest < 4096:
        largest *= 2
    if "LARGEST" in job.command and largest == B:
        return None
    return [{"BEST": best, "LARGEST": str(largest)}.get(x, x) for x in job.command]

# ---- figures, from what a program prints -----------------------------------------------------------

def read_steps(text, about):
    """Ours, llm.c's and torch_baseline.py's print steps alike."""
    steps = re.findall(r"^step +\d+/\d+ .*?loss +([\d.]+).*?\| +([\d.]+) ms\b", text, re.M)
    ms = [float(t) for _, t in steps][about["warmup"]:]
    figures = {"B": r"^step +(\d+) sequences", "ledger_bytes": r"(\d+) bytes at the peak",
               "allocated_bytes": r"(\d+) bytes allocated", "reserved_bytes": r"(\d+) bytes reserved"}
    found = {name: int(value[1]) for name, value in ((name, re.search(p, text, re.M)) for name, p in figures.items()) if value}
    tokens, middle = found.get("B", about["B"]) * about["T"], statistics.median(ms)
    return {**found, "loss": float(steps[-1][0]), "timed_steps": len(ms), "ms": round(middle, 3), "ms_least": min(ms),
            "ms_most": max(ms), "tokens_per_s": round(tokens / middle * 1e3, 1)}

def read_rows(text, about):
    return {"rows": [json.loads(line) for line in text.splitlines() if line.startswith("{") and '"ms"' in line]}

LIBRARY = "[library]"
BEFORE_THE_FIRST_STEP = {"init_kernel", "widen_kernel"}
UNITS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1, "msecond": 1, "s": 1e3, "second": 1e3}

def read_profile(text, about):
    """{kernel: calls and ms} of ncu's CSV; what is not ours is the library's, which is matmuls."""
    with open(os.path.join(ROOT, "train_gpt2.cu")) as f:
        ours = set(re.findall(r"\b(\w+_kernel)\s*\(", f.read()))
    kernels = {}
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        name = next((n for n in re.findall(r"\w+_kernel\b", row["Kernel Name"]) if n in ours), LIBRARY)
        if row["Metric Name"] == "gpu__time_duration.sum" and name not in BEFORE_THE_FIRST_STEP:
            k = kernels.setdefault(name, {"calls": 0, "ms": 0.0})
            k["calls"] += 1
            k["ms"] = round(k["ms"] + float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]], 6)
    return {"kernels": kernels}

# ---- running ---------------------------------------------------------------------------------------

class Clock:
    """The stage's time, less what writing the results takes. A signal ends it, and what runs."""
    def __init__(self, minutes):
        self.end, self.running, self.signal = time.monotonic() + 60 * minutes - 10, set(), 0

    def left(self):
        return self.end - time.monotonic()

    def stop(self, number, _):
        self.end, self.signal = 0, number
        for group in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

Done = namedtuple("Done", "status text seconds timed_out")

def execute(command, seconds, clock, env=None, given=""):
    """Runs a command to its end, or for so many seconds; what it has started ends with it. Its output is the last MB."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out:
        try:
            p = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
                                 start_new_session=True)
        except OSError as e:
            return Done(127, str(e), 0.0, False)
        clock.running.add(p.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.communicate(given.encode(), timeout=max(min(seconds, clock.left()), 1))
        timed_out = p.poll() is None or clock.left() <= 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        clock.running.discard(p.pid)
        out.seek(max(0, out.seek(0, os.SEEK_END) - (1 << 20)))
        return Done(p.returncode, out.read().decode(errors="replace"), round(time.monotonic() - begin, 2), timed_out)

class Memory:
    """What the whole GPU holds at its most during a run, more than before it: nvidia-smi, asked ten times a second."""
    def __init__(self, command):
        self.used = []
        ours, theirs = pty.openpty()  # into a pipe it might keep its lines for a while
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL)
        os.close(theirs)
        self.thread = threading.Thread(target=self.read, args=(ours,), daemon=True)
        self.thread.start()
        begin = time.monotonic()
        while not self.used and time.monotonic() < begin + 5:
            time.sleep(0.05)

    def read(self, fd):
        with contextlib.suppress(OSError), open(fd, errors="replace") as lines:  # a terminal ends with an error
            for line in lines:
                self.used += [int(line) << 20] if line.strip().isdigit() else []

    def peak(self):
        self.process.terminate()
        self.process.wait()
        self.thread.join()
        return (max(self.used) - self.used[0] or None) if self.used else None

def written(command):
    """A command as one would type it in the project's folder."""
    return shlex.join(os.path.join(".", os.path.relpath(x, ROOT)) if x.startswith(ROOT + os.sep) else x for x in command)

ERROR = r"^=+ (Invalid|Uninitialized|Error: Race|Warning: Race)"  # as compute-sanitizer says it

def state(job, done):
    """What ran out of time without an error has neither passed nor failed, nor has a sanitizer that does not know the GPU or fails itself."""
    if done.status == 0 and re.search(job.expect, done.text, re.M):
        return "ok"
    no_answer = done.timed_out or re.search("Device not supported|Internal Sanitizer Error", done.text)
    return "unfinished" if no_answer and not re.search(ERROR, done.text, re.M) else "failed"

def load(file):
    """(head, {id: entry}) of a stage's lines; the last of them may be cut off."""
    lines = []
    with contextlib.suppress(OSError), open(file) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return (lines[0] if lines and "gpu" in lines[0] else {}), {x["id"]: x for x in lines if "id" in x}

def run_jobs(file, head, jobs, clock, m, env=None, known={}, again=False):
    """Runs those of the jobs that are not done yet; returns {name: entry} of all that have run. known: other stages' entries."""
    old, entries = load(file)
    other = any(old.get(k) != head[k] for k in ("gpu", "driver", "cuda", "source"))
    if other and old:
        os.replace(file, file + ".before")
        print(f"{file}: is of other sources, another GPU or another driver; kept as {os.path.basename(file)}.before")
    again = {job.name for job in jobs} if again else set()   # not those that --only leaves out
    entries = {} if other else {name: e for name, e in entries.items() if name not in again}
    with atomic(file) as (f,):
        f.write("".join(json.dumps(x) + "\n" for x in (head, *entries.values())).encode())
    lock = threading.Lock()

    def one(job):
        command = fill(job, {**known, **entries}, m.memory)
        if clock.left() < job.need or command is None:
            return
        memory = Memory(m.ask_memory) if job.read is read_steps and m.ask_memory else None
        done = execute(command, max(100, 4 * job.need), clock, env)
        entry = {"id": job.name, "status": state(job, done), "seconds": done.seconds, "command": written(command), **job.about}
        if memory:
            entry["peak_bytes"] = memory.peak()
        if entry["status"] == "ok":
            found = re.search(job.expect, done.text, re.M).groupdict()
            entry.update({k: int(v) for k, v in found.items()}, **job.read(done.text, job.about))
        else:
            entry["output"] = [line[:300] for line in done.text.rstrip().splitlines()[-30:]]
        with lock, open(file, "a") as f:
            entries[job.name] = entry
            f.write(json.dumps(entry) + "\n")
            print(f"  {entry['status']:10s} {job.name:44s} {done.seconds:6.1f} s" + (
                f"  B {entry['B']}  {entry['ms']:.2f} ms  {entry['tokens_per_s']:,.0f} tokens/s" if "ms" in entry else ""))
    todo = [job for job in jobs if entries.get(job.name, {}).get("status") != "ok"]
    todo.sort(key=lambda job: ("sanitizer" in job.command[0], job.name in entries))  # first what has never run
    for sanitizers, group in itertools.groupby(todo, key=lambda job: "sanitizer" in job.command[0]):
        with concurrent.futures.ThreadPoolExecutor(m.at_once if sanitizers else 1) as pool:  # they leave most of the GPU idle
            list(pool.map(one, group))
    return entries

# ---- the machine, and what is built and made for it ------------------------------------------------

class Machine:
    """The GPU that the programs will see, and the tools; of a dry run, none."""
    gpu, driver, cuda, arch, memory, at_once, ask_memory = "GPU", "?", "?", "ARCH", 0, 1, None
    sanitizer, ncu = "compute-sanitizer", "ncu"

    def find(self):
        without = "\nWithout a GPU, make test tests everything on the CPU backend."
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not os.access(nvcc, os.X_OK):
            sys.exit("gpu.sh: there is no nvcc, neither on PATH nor in /usr/local/cuda/bin; this needs CUDA, 12 or 13." + without)
        self.index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        ask = ["nvidia-smi", "-i", self.index, "--format=csv,noheader,nounits"]
        fields = "name,driver_version,memory.total,compute_cap,compute_mode"
        try:
            asked = subprocess.run([*ask, f"--query-gpu={fields}"], capture_output=True, text=True, timeout=60).stdout
            self.gpu, self.driver, memory, arch, mode = (x.strip() for x in asked.splitlines()[0].split(","))
            self.memory, self.arch = int(memory) << 20, arch.replace(".", "")
        except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
            sys.exit("gpu.sh: no GPU is visible: nvidia-smi lists none. This needs one." + without)
        self.cuda = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]
        self.at_once = max(1, min(4, (os.cpu_count() or 1) // 3)) if mode == "Default" else 1  # or one process at a time
        self.ask_memory = [*ask, "--query-gpu=memory.used", "-lms", "100"]

        def tool(name, *places):
            found = [shutil.which(name) or "", os.path.join(os.path.dirname(nvcc), name)]
            return next((x for x in [*found, *sorted(sum(map(glob.glob, places), []), reverse=True)] if os.path.isfile(x)), None)
        self.sanitizer = tool("compute-sanitizer", "/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/*/compute-sanitizer")
        self.ncu = tool("ncu", "/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
        return self

    def folder(self):
        """'NVIDIA H200' is h200."""
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"^nvidia\s+", "", self.gpu.lower())).strip("-") or "gpu"

def wanted(jobs):
    """{variant: [program]} that the jobs run."""
    found = [re.fullmatch(re.escape(path("", "")) + r"(gpu-[^/]+)/(.+)", x) for job in jobs for x in job.command]
    pairs = dict.fromkeys((x[1], x[2]) for x in found if x)
    return {v: [program for variant, program in pairs if variant == v] for v, _ in pairs}

def make_command(variant, programs, arch):
    flags = [FLAGS[part] for part in variant.split("-")]
    return ["make", "-k", "-Otarget", *programs, f"BUILD={path(variant, '')}", f"ARCH={arch}", *flags]

def build(jobs, arch, clock, env, sources):
    """All variants at once, on all cores; returns the programs that did not compile."""
    variants = wanted(jobs)
    rules = [f".PHONY: all {' '.join(variants)}", f"all: {' '.join(variants)}"]
    rules += [f"{v}:\n\t@$(MAKE) {shlex.join(make_command(v, programs, arch)[1:])}" for v, programs in variants.items()]
    print(f"building {sum(map(len, variants.values()))} programs on {os.cpu_count()} cores")
    done = execute(["make", "-k", f"-j{os.cpu_count()}", "-f", "-"], clock.left(), clock, env, "\n".join(rules) + "\n")
    print(f"built in {done.seconds:.0f} seconds; build/scratch/build.log has what make said")
    with open(os.path.join(SCRATCH, "build.log"), "w") as f:
        f.write(done.text)
    newest = max(os.path.getmtime(p) for pattern in sources for p in glob.glob(os.path.join(ROOT, pattern)))
    programs = [path(v, program) for v, programs in variants.items() for program in programs] if done.status else []
    return [p for p in programs if not os.path.exists(p) or os.path.getmtime(p) < newest]

def write_tokens(file, ids):
    if not os.path.exists(file):
        with atomic(file) as (f,):
            f.write(b"".join(n.to_bytes(4, "little") for n in (20240520, 1, len(ids), *[0] * 253)))
            array("H", ids).tofile(f)

def make_tokens(count):
    """Few ids are frequent and most are rare, as in a text: the embedding's backward minds, nothing else does."""
    rng, ids = random.Random(1), list(range(50257))
    rng.shuffle(ids)
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(ids))))
    write_tokens(TINY_TOKENS, rng.choices(range(256), k=4000))
    write_tokens(TOKENS, rng.choices(ids, cum_weights=weights, k=count))

def torch_of(python):
    code = "import torch; print('PyTorch', torch.__version__, 'CUDA', torch.version.cuda)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()

# what a stage's figures depend on
SOURCES = {"check": ["*.cu", "Makefile", "dev/cuda/*.cu*", "dev/test/fixtures/*"],
           "bench": ["train_*.cu", "Makefile", "dev/cuda/*.cu*"],
           "peers": ["train_gpt2.cu", "Makefile", "dev/bench/torch_baseline.py"]}
OUR_VARIABLES = "ARCH PRECISION USE_APPROXBP APPROX_ACT APPROX_FIT MS_NORM CPU SAN MULTI_GPU PTXAS BUILD MAKEFLAGS MFLAGS MAKELEVEL".split()

def run_stage(name, a, m):
    """Returns how many jobs failed."""
    clock = Clock(a.minutes)
    signal.signal(signal.SIGINT, clock.stop)
    signal.signal(signal.SIGTERM, clock.stop)
    jobs = [job for job in {"check": check_jobs, "bench": bench_jobs, "peers": peers_jobs}[name](a, m) if re.search(a.only or "", job.name)]
    if not jobs:
        sys.exit(f"gpu.sh: --only {a.only}: no job of {name} has that in its name; --dry-run lists their commands")
    if a.dry_run:
        makes = [make_command(*item, m.arch) for item in wanted(jobs).items()]
        for command in makes + [fill(job, {}, 0) or job.command for job in jobs]:
            print(written(command))
        return 0
    print(f"{m.gpu}, driver {m.driver}, CUDA {m.cuda}: {name}, {a.minutes:g} minutes")
    folder = os.path.join(os.path.abspath(a.out), m.folder())
    os.makedirs(folder, exist_ok=True)
    os.makedirs(SCRATCH, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in OUR_VARIABLES}
    env.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=m.index, PYTHONDONTWRITEBYTECODE="1")  # nvidia-smi's order
    head = {"gpu": m.gpu, "driver": m.driver, "cuda": m.cuda, "commit": a.commit or commit(),
            "source": digest(*SOURCES[name])[:16] + "-try" * a.try_it, "command": "dev/bench/gpu.sh " + shlex.join(sys.argv[1:]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": a.python and torch_of(a.python)}
    missing = build(jobs, m.arch, clock, env, SOURCES[name])
    make_tokens((1 << (11 if a.try_it else 21)) + 1)
    log = os.path.join(SCRATCH, "build.log")
    jobs = [Job(f"build {written([p])}", ["grep", "-n", "rror", log], "(?!)", 0) for p in missing] + [
        job for job in jobs if not set(job.command) & set(missing)]
    known = load(os.path.join(folder, "bench.jsonl"))[1] if name == "peers" else {}
    file = os.path.join(folder, f"{name}.jsonl")
    entries = run_jobs(file, head, jobs, clock, m, env, known, a.again)
    states = [entries.get(job.name, {}).get("status") for job in jobs]
    failed = [job.name for job, found in zip(jobs, states) if found == "failed"]
    left = len(jobs) - states.count("ok") - len(failed)
    print(f"{os.path.relpath(file)}: {states.count('ok')} in order, {len(failed)} failed, {left} not run to the end"
          + ("; the same command goes on with them" if left else "") + "".join(f"\n  FAILED {job}" for job in failed))
    if clock.signal:
        sys.exit(128 + clock.signal)
    return len(failed)

def main():
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Tests and measures on one GPU; dev/bench/README.md explains.")
    parser.add_argument("stage", nargs="?", choices=["check", "bench", "peers", "all"], default="all")
    parser.add_argument("--out", default=os.path.join(ROOT, "dev/bench/results"), metavar="DIR",
                        help="results go into a folder there, named by the GPU (dev/bench/results)")
    parser.add_argument("--minutes", type=float, default=8.5, metavar="N", help="of each stage (8.5)")
    parser.add_argument("--llmc", metavar="DIR", help="a folder that holds a built llm.c (train_gpt2cu), to time it as well")
    parser.add_argument("--python", metavar="PATH", help="the Python that has PyTorch (one that is found)")
    parser.add_argument("--commit", metavar="ID", help="what to record as the commit where there is no git")
    parser.add_argument("--only", metavar="REGEX", help="of a stage's jobs those in whose name it is found")
    parser.add_argument("--again", action="store_true", help="runs everything, also what an earlier call has done")
    parser.add_argument("--try", dest="try_it", action="store_true", help="toy models: to see that it runs, not to measure")
    parser.add_argument("--dry-run", action="store_true", help="prints the commands, and runs none; needs no GPU")
    a = parser.parse_args()
    if not a.minutes > 0:
        parser.error(f"--minutes {a.minutes:g}: expected more than 0")
    if a.llmc and not a.dry_run and not os.access(os.path.join(a.llmc, "train_gpt2cu"), os.X_OK):
        parser.error(f"--llmc {a.llmc}: there is no program train_gpt2cu in it; expected a folder in which llm.c was built")
    a.llmc = a.llmc and os.path.abspath(a.llmc)
    a.models, a.steps, a.warmup = (TRY, TRY_STEPS, 2) if a.try_it else ([SMALL, LARGE], STEPS, WARMUP)
    m = Machine() if a.dry_run else Machine().find()
    can = {what: subprocess.run([sys.executable, "-c", f"import {what}"], capture_output=True).returncode == 0 for what in ("pytest", "xdist")}
    # its options; None: it is not there
    a.pytest = (["-n", str(max(1, (os.cpu_count() or 1) - 4))] if can["xdist"] else []) if a.dry_run or can["pytest"] else None
    if not a.python:
        pythons = [sys.executable, shutil.which("python3"), "/usr/bin/python3"]
        a.python = "python3" if a.dry_run else next((p for p in pythons if p and torch_of(p)), None)
    for tool, what in ((m.sanitizer, "compute-sanitizer"), (m.ncu, "ncu"), (a.pytest is not None, "pytest"), (a.python, "PyTorch")):
        if not tool:
            print(f"{what} is not installed: what needs it is left out")
    failed = [run_stage(name, a, m) for name in (["check", "bench", "peers"] if a.stage == "all" else [a.stage])]
    sys.exit(1 if any(failed) else 0)

if __name__ == "__main__":
    main()
