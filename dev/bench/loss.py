"""Does training mind what backward forgets? The same model, tokens and seeds in each mode, and the losses beside each other.

    python3 dev/bench/loss.py [--text FILE...] [--seeds 3] [--steps 600] [--model SIZE] [--write dev/bench/results/cpu]

Builds train_gpt2 exact, with APPROX_ACT=2, with MS_NORM=1 and with both, side by side in
build/loss/MODE, and trains each with every seed: a seed is the same weights and the same order of
the same tokens in each mode. Runs go one after the other; one that was interrupted is run again, one
that is complete is not, unless program, data or options have changed. The text (default: this
project's own sources) is read as bytes, its last tenth is what every run is validated on.

Leaves loss.json, loss.md (a table) and loss.png in build/loss, and in --write. The default size
takes less than 25 minutes on two idle cores. Needs Matplotlib for the plot: apt-get install python3-matplotlib.
"""
import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "prepro"))
import binfmt  # noqa: E402
import text  # noqa: E402

# mode: the flag of its build
MODES = {"exact": "USE_APPROXBP=0", "act": "APPROX_ACT=2", "norm": "MS_NORM=1", "both": "USE_APPROXBP=1"}
NAMES = {"exact": "exact", "act": "APPROX_ACT=2", "norm": "MS_NORM=1", "both": "USE_APPROXBP=1"}
SOURCES = ["README.md", "Makefile", "*.cu", "prepro/*.py", "dev/cpu/*.py", "dev/bench/*.py", "dev/test/*.py", "dev/cpu/include/**/*.h"]


def stop(message):
    sys.exit(f"loss.py: {message}")


def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def commit():
    """This tree's, with a + where files differ from it."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ----------------------------------------------------------------------------
# building and running

def build_command(mode, out, flags):
    return ["make", "-s", "train_gpt2", f"BUILD={out}/{mode}", MODES[mode], *flags]


def build(mode, out, flags):
    command = build_command(mode, out, flags)
    print(" ".join(map(shlex.quote, command)), flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        stop(f"{mode} could not be built")
    return f"{out}/{mode}/train_gpt2"


def tokens(files, out):
    """Writes out/train.bin and val.bin, and says what they are."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        text.prepare(files, out=out)
    train, val = f"{out}/train.bin", f"{out}/val.bin"
    return {"files": [os.path.basename(f) for f in files], "train_tokens": len(binfmt.read_tokens(train)), "val_tokens": len(binfmt.read_tokens(val)),
            "sha256": {"train.bin": digest(train), "val.bin": digest(val)}}


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def read_log(path):
    """The lines of a run that came to its end; None of any other."""
    try:
        with open(path) as f:
            lines = [json.loads(line) for line in f]
    except (OSError, ValueError):
        return None
    return lines if lines and lines[-1].get("done") else None


class Clock:
    """How long the rest will take: from whole runs, or from the steps of the first."""

    def __init__(self, runs, steps):
        self.left, self.steps, self.seconds, self.runs = runs, steps, 0.0, 0

    def ran(self, seconds):
        self.left -= 1
        self.seconds += seconds
        self.runs += 1

    def rest(self):
        return f"about {self.left * self.seconds / self.runs / 60:.0f} minutes left" if self.left else "that was the last"

    def first_steps(self, done, seconds):
        print(f"  {seconds / done * 1e3:.0f} ms a step: about {seconds / done * self.steps * self.left / 60:.0f} minutes for "
              f"{self.left} runs, and validation", flush=True)


def train(command, output, clock):
    """Runs the trainer, its output into a file. After 20 steps of the first run it says how long all will take."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    ms = []
    try:
        with open(output, "w") as f:
            for line in process.stdout:
                f.write(line)
                step = re.match(r"step +\d+/\d+ .*\| ([\d.]+) ms", line)
                if step:
                    ms.append(float(step[1]))
                if step and clock.runs == 0 and len(ms) == 21:  # the first one prepares
                    clock.first_steps(20, sum(ms[1:]) / 1e3)
    finally:
        if process.poll() is None and sys.exc_info()[0]:
            process.terminate()
        status = process.wait()
    if status != 0:
        with open(output) as f:
            stop(f"{' '.join(command)}\nended with status {status}:\n" + "".join(f.readlines()[-5:]).rstrip())


def units(program, options):
    """What a layer keeps for its backward, in units of B*T*C elements."""
    done = subprocess.run([program, *options, "--estimate=json"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        stop(done.stderr.strip())
    table = json.loads(done.stdout)
    rows = {row["name"]: row for row in table["rows"]}
    saved = sum(row["bytes"] for row in table["rows"] if row["kind"] == "saved" and row["scope"] == "layer")
    return saved / rows["atty"]["bytes"]  # atty is (L, B, T, C), one unit


def run_all(a, programs, data):
    """Every mode with every seed, or what is left of that; returns the runs."""
    options = ["-e", a.model, "-i", f"{a.out}/train.bin", "-j", f"{a.out}/val.bin", "-b", str(a.batch), "-t", str(a.seq_len), "-x", str(a.steps),
               "-l", a.lr, "-u", str(a.warmup), "-q", "0.1", "-c", "0.1", "-v", str(a.val_every), "-m", str(a.val_batches), "-s", "0", *a.options]
    plan = []
    for seed in range(1, a.seeds + 1):  # seeds outside: after a third of the time there is one of each
        for mode, program in programs.items():
            name = f"{a.out}/{mode}-seed{seed}"
            command = [program, *options, "--seed", str(seed), "--log", f"{name}.jsonl"]
            key = {"command": command, "program": digest(program), "data": data["sha256"]}
            if read_json(f"{name}.key") != key:  # another program, text or option: what is there is not this run
                with contextlib.suppress(OSError):
                    os.unlink(f"{name}.jsonl")
            plan.append((mode, seed, name, command, key))
    clock = Clock(sum(read_log(f"{name}.jsonl") is None for _, _, name, _, _ in plan), a.steps)
    runs = []
    for i, (mode, seed, name, command, key) in enumerate(plan):
        print(f"run {i + 1}/{len(plan)}: {NAMES[mode]}, seed {seed}", flush=True)
        log, ran = read_log(f"{name}.jsonl"), False
        if log is None:
            with open(f"{name}.key", "w") as f:
                json.dump(key, f)
            begin, ran = time.time(), True
            train(command, f"{name}.txt", clock)
            clock.ran(time.time() - begin)
            log = read_log(f"{name}.jsonl")
            if log is None:
                stop(f"{name}.jsonl: expected the log of a whole run, found none")
        val = [[line["step"], line["val_loss"]] for line in log if "val_loss" in line]
        if any(loss is None for _, loss in val):
            stop(f"{name}.jsonl: a validation loss that is not finite; lower the rate (--lr)")
        losses = " ".join(f"{loss:.3f}" for _, loss in val)
        print(f"  validation loss {losses}" + (f"; {clock.rest()}" if ran else "; from before"), flush=True)
        runs.append({"mode": mode, "flags": MODES[mode], "seed": seed, "val": val, "peak_bytes": log[-1]["peak_bytes"],
                     "estimate_bytes": log[-1]["estimate_bytes"], "units_per_layer": units(command[0], options),
                     "command": " ".join(map(shlex.quote, command))})
    return runs


# ----------------------------------------------------------------------------
# what came of it

def summary(runs):
    """{mode: ...} in the order of the runs. The spread is the largest loss of a mode's seeds less the smallest. A mode is no worse
    than exact if its mean is not above exact's by more than exact's spread; None with one seed, which has no spread."""
    result = {}
    for mode in dict.fromkeys(r["mode"] for r in runs):
        of = sorted((r for r in runs if r["mode"] == mode), key=lambda r: r["seed"])
        final = [r["val"][-1][1] for r in of]
        result[mode] = {"flags": MODES[mode], "final": final, "mean": sum(final) / len(final), "spread": max(final) - min(final),
                        "peak_bytes": max(r["peak_bytes"] for r in of), "units_per_layer": of[0]["units_per_layer"]}
    exact = result.get("exact")
    for mode, of in result.items():
        of["difference"] = of["mean"] - exact["mean"] if exact else None
        known = exact is not None and len(exact["final"]) > 1 and mode != "exact"
        of["no_worse"] = of["difference"] <= exact["spread"] if known else None
    return result


def markdown(a, data, of):
    """The table, and the verdict on each mode."""
    seeds = range(1, a.seeds + 1)
    head = ["", *(f"seed {s}" for s in seeds), "mean", "spread", "mean - exact's", "peak bytes", "units a layer"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for mode, x in of.items():
        difference = "" if mode == "exact" or x["difference"] is None else f"{x['difference']:+.4f}"
        cells = [NAMES[mode], *(f"{loss:.4f}" for loss in x["final"]), f"{x['mean']:.4f}", f"{x['spread']:.4f}", difference, f"{x['peak_bytes']:,}",
                 f"{x['units_per_layer']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    files = data["files"]
    what = files[0] if len(files) == 1 else f"{len(files)} files"
    lines += ["", f"Validation loss after {a.steps} steps of {a.batch} x {a.seq_len} bytes of {what} ({a.model}, {data['train_tokens']:,} bytes to learn, "
              f"{data['val_tokens']:,} to be examined on). Spread: largest less smallest over the seeds. Units: B\\*T\\*C elements that a layer keeps for its "
              "backward, statistics included.", ""]
    return "\n".join(lines + verdict(of)) + "\n"


def verdict(of):
    return [f"{NAMES[mode]}: no worse than exact by more than the spread over seeds: "
            + ("not known (that takes exact and two seeds)" if x["no_worse"] is None else
               f"{'yes' if x['no_worse'] else 'NO'} ({x['difference']:+.4f}; exact's seeds spread over {of['exact']['spread']:.4f})")
            for mode, x in of.items() if mode != "exact"]


def one_run_a_line(result):
    """JSON that a person can read: every value on a line of its own, but a run or a mode as one."""
    def lines(values):
        return ",\n  ".join(values)
    parts = {key: json.dumps(value) for key, value in result.items()}
    parts["summary"] = "{\n  " + lines(f"{json.dumps(mode)}: {json.dumps(of)}" for mode, of in result["summary"].items()) + "}"
    parts["runs"] = "[\n  " + lines(map(json.dumps, result["runs"])) + "]"
    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {value}" for key, value in parts.items()) + "\n}\n"


def plot(a, runs, path):
    """Validation loss over steps, a band from the smallest to the largest over seeds around the mean; beside it the same less
    exact's mean, where the eye can tell the modes apart. False without Matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: that needs Matplotlib (apt-get install python3-matplotlib)")
        return False
    import numpy as np
    curves = {}
    for mode in dict.fromkeys(r["mode"] for r in runs):
        of = [r["val"] for r in runs if r["mode"] == mode]
        curves[mode] = (np.array([s for s, _ in of[0]]), np.array([[loss for _, loss in val] for val in of]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    colors = {"exact": "black", "act": "tab:orange", "norm": "tab:blue", "both": "tab:green"}
    styles = {"exact": "-", "act": "--", "norm": "-.", "both": ":"}
    for ax, less in zip(axes, (False, "exact" in curves)):
        base = curves["exact"][1].mean(0) if less else 0
        for mode, (steps, losses) in curves.items():
            y = losses - base
            ax.fill_between(steps, y.min(0), y.max(0), color=colors[mode], alpha=0.15, linewidth=0)
            ax.plot(steps, y.mean(0), styles[mode], color=colors[mode], label=NAMES[mode])
        ax.set_xlabel("step")
    axes[0].set_ylabel("validation loss")
    axes[0].legend(frameon=False)
    axes[1].set_ylabel("less the mean of exact" if "exact" in curves else "validation loss")
    figure.suptitle(f"{a.model}, {a.seeds} seed{'s' * (a.seeds > 1)}: mean, and from smallest to largest", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def main():
    parser = argparse.ArgumentParser(description="Losses of exact and approximate training beside each other.")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="what to learn (this project's own sources)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N in each mode (3)")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="(600)")
    parser.add_argument("--model", default="gpt2:L4,H4,C128,T64,V257", metavar="SIZE", help="(gpt2:L4,H4,C128,T64,V257)")
    parser.add_argument("-b", dest="batch", type=int, default=16, metavar="B", help="sequences a step (16)")
    parser.add_argument("-t", dest="seq_len", type=int, default=64, metavar="T", help="tokens a sequence (64)")
    parser.add_argument("--lr", default="1e-3", help="at its peak; cosine to a tenth (1e-3)")
    parser.add_argument("--warmup", type=int, metavar="N", help="steps (a tenth of all, 50 at most)")
    parser.add_argument("--val-every", type=int, metavar="N", help="steps (a sixth of all)")
    parser.add_argument("--val-batches", type=int, default=30, metavar="N", help="in a validation (30)")
    parser.add_argument("--modes", default=",".join(MODES), metavar="A,B", help=f"of {','.join(MODES)} (all)")
    parser.add_argument("--flags", default="", metavar="'A=B'", help="more flags for make, as in --flags 'CPU=1 PRECISION=FP32'")
    parser.add_argument("--options", default="", metavar="'-r 0'", help="more options for the trainer, as in --options='-r 0'")
    parser.add_argument("--program", action="append", default=[], metavar="MODE=PATH", help="a program that is built, instead of building one")
    parser.add_argument("--out", default="build/loss", metavar="DIR", help="(build/loss)")
    parser.add_argument("--write", metavar="DIR", help="copies the results there, too")
    a = parser.parse_args()
    a.options = shlex.split(a.options)
    a.warmup = min(50, a.steps // 10) if a.warmup is None else a.warmup
    a.val_every = max(1, a.steps // 6) if a.val_every is None else a.val_every
    here = os.getcwd()
    modes = a.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            parser.error(f"--modes {mode}: expected some of {','.join(MODES)}")
    for name in ("seeds", "steps", "val_every"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: expected 1 or more")
    built = dict(p.partition("=")[::2] for p in a.program)
    # paths as typed; the rest happens in the project's folder, so that commands read alike everywhere
    a.out, a.write, *files = (p and os.path.relpath(os.path.join(here, p), ROOT) for p in (a.out, a.write, *(a.text or [])))
    built = {mode: os.path.join(".", os.path.relpath(os.path.join(here, p), ROOT)) for mode, p in built.items()}
    os.chdir(ROOT)
    if not a.text:
        files = sorted({f for pattern in SOURCES for f in glob.glob(pattern, recursive=True)})

    os.makedirs(a.out, exist_ok=True)
    try:
        data = tokens(files, a.out)
    except binfmt.Error as e:
        stop(e)
    print(f"{data['train_tokens']} bytes to learn, {data['val_tokens']} to be examined on")
    programs = {mode: built.get(mode) or os.path.join(".", build(mode, a.out, shlex.split(a.flags))) for mode in modes}
    begin = time.time()
    runs = run_all(a, programs, data)
    of = summary(runs)
    table = markdown(a, data, of)
    with open(f"{a.out}/exact-seed1.txt" if "exact" in modes else f"{a.out}/{modes[0]}-seed1.txt") as f:
        device = re.search(r"^device +(.*?),", f.read(), re.M)
    result = {"what": "validation loss of exact and approximate training, the same tokens and seeds in each mode (dev/bench/loss.py)",
              "commit": commit(), "device": device[1] if device else "unknown", "make_flags": a.flags, "text": data, "model": a.model, "batch": a.batch,
              "seq_len": a.seq_len, "steps": a.steps, "seeds": a.seeds, "summary": of, "runs": runs}
    with binfmt.atomic(f"{a.out}/loss.json", f"{a.out}/loss.md") as (f, g):
        f.write(one_run_a_line(result).encode())
        g.write(table.encode())
    names = ["loss.json", "loss.md"] + ["loss.png"] * plot(a, runs, f"{a.out}/loss.png")
    print(f"\n{table}\nin {a.out}: {' '.join(names)}; {(time.time() - begin) / 60:.1f} minutes")
    if a.write:
        os.makedirs(a.write, exist_ok=True)
        for name in names:
            shutil.copyfile(f"{a.out}/{name}", f"{a.write}/{name}")
        print(f"and in {a.write}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped; the same command goes on with the runs that are left")
