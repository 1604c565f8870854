"""Does training mind what backward forgets? The same model, tokens and seeds in each mode, and the losses beside each other.

    python3 dev/bench/loss.py [--text FILE...] [--seeds 3] [--steps 600] [--model SIZE] [--write dev/bench/results/cpu]

Builds train_gpt2 exact, with APPROX_ACT=2, with MS_NORM=1 and with both, side by side in build/loss/MODE, and trains each with
every seed: a seed is the same weights and the same order of the same tokens in each mode. Runs go one after the other; one that
was interrupted is run again, one that is complete is not, unless program, data or options have changed. The text (default: this
project's own sources) is read as bytes; every run is validated on its last tenth.

Leaves loss.json, loss.md (a table) and loss.png in build/loss, and in --write. The default size takes less than 25 minutes on
two idle cores. Needs Matplotlib for the plot: apt-get install python3-matplotlib.
"""
import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import common
from common import ROOT, read_log

from atomic import atomic

# mode: what it is called, and the flag of its build
NAMES = {"exact": "exact", "act": "APPROX_ACT=2", "norm": "MS_NORM=1", "both": "USE_APPROXBP=1",
         "slope": "APPROX_ACT=2 APPROX_FIT=slope", "both-slope": "USE_APPROXBP=1 APPROX_FIT=slope"}
WHEN_ASKED = ["slope", "both-slope"]   # the others are run without a word
SOURCES = "README.md Makefile *.cu prepro/*.py dev/cpu/*.py dev/bench/*.py dev/test/*.py dev/cpu/include/**/*.h".split()

def stop(message):
    sys.exit(f"{os.path.basename(sys.argv[0])}: {message}")

def build_command(mode, out, flags, program="train_gpt2"):
    return ["make", "-s", program, f"BUILD={out}/{mode}", *("USE_APPROXBP=0" if mode == "exact" else NAMES[mode]).split(), *flags]

def build(mode, out, flags, program="train_gpt2"):
    command = build_command(mode, out, flags, program)
    print(shlex.join(command), flush=True)
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        stop(f"{mode} could not be built")
    return f"./{out}/{mode}/{program}"

def tokens(files, out):
    """Writes out/train.bin and val.bin, and says what they are."""
    train, val = common.prepare(files, out)
    return {"files": [os.path.basename(f) for f in files], "train_tokens": train, "val_tokens": val, "sha256": digests(out)}

def digests(out):
    return {name: common.digest(os.path.abspath(f"{out}/{name}")) for name in ("train.bin", "val.bin")}

def run(name, command, key, begin=lambda: True):
    """A run's log, from before if it is of the same program, text and options and came to its end; None if it did not and begin() is
    against running it."""
    log = read_log(f"{name}.jsonl")
    if read_log(f"{name}.key") == [key] and log and log[-1].get("done"):
        return log, "from before"
    if not begin():
        return None, ""
    with contextlib.suppress(OSError):
        os.unlink(f"{name}.jsonl")
    with open(f"{name}.key", "w") as f:
        json.dump(key, f)
    since = time.time()
    with open(f"{name}.txt", "w") as f:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT).returncode
    log = read_log(f"{name}.jsonl")
    if status != 0 or not log or not log[-1].get("done"):
        with open(f"{name}.txt") as f:
            stop(f"{shlex.join(command)}\nended with status {status}:\n" + "".join(f.readlines()[-5:]).rstrip())
    return log, f"{time.time() - since:.0f} seconds"

def schedule(a):
    """What every run of a comparison has."""
    return ["-b", str(a.batch), "-t", str(a.seq_len), "-x", str(a.steps), "-u", str(a.warmup), "-q", "0.1", "-v", str(a.val_every),
            "-m", str(a.val_batches), "-s", "0", *a.options]

def measure(name, program, mode, options, seed, key, begin=lambda: True):
    """A run, as the results have it, or None, as of run(). key: what else it depends on."""
    command = [program, *options, "--seed", str(seed), "--log", f"{name}.jsonl"]
    log, how = run(name, command, {"command": command, "program": common.digest(os.path.abspath(program)), **key}, begin)
    if log is None:
        return None
    lines = [line for line in log if "val_loss" in line]
    val = [[line["step"], line["val_loss"]] for line in lines]
    if any(loss is None for _, loss in val):
        stop(f"{name}: a validation loss that is not finite; lower the rate (--lr)")
    right = [[line["step"], line["right"], line["answers"]] for line in lines if "right" in line]
    print(f"  validation loss {' '.join(f'{loss:.3f}' for _, loss in val)}"
          + "".join(f"; {r} of {n} answers right" for _, r, n in right[-1:]) + f"; {how}", flush=True)
    return {"mode": mode, "seed": seed, "val": val, **({"right": right} if right else {}), **{k: log[-1][k] for k in ("peak_bytes", "estimate_bytes")},
            "units_per_layer": common.kept(common.ledger(program, options))[1], "command": shlex.join(command)}

def run_all(a, programs, data):
    """Every mode with every seed, or what is left of that; returns the runs."""
    options = ["-e", a.model, "-i", f"{a.out}/train.bin", "-j", f"{a.out}/val.bin", "-l", a.lr, "-c", "0.1", *schedule(a)]
    plan = [(seed, mode) for seed in range(1, a.seeds + 1) for mode in programs]  # after a third of the time there is one of each
    runs = []
    for i, (seed, mode) in enumerate(plan):
        print(f"run {i + 1}/{len(plan)}: {NAMES[mode]}, seed {seed}", flush=True)
        runs.append(measure(f"{a.out}/{mode}-seed{seed}", programs[mode], mode, options, seed, {"data": data["sha256"]}))
    return runs

# ---- what came of it -------------------------------------------------------------------------------

def summary(runs):
    """{mode: ...} in the order of the runs. The spread is the largest loss of a mode's seeds less the smallest. A mode is no worse
    than exact if its mean is not above exact's by more than exact's spread; None with one seed, which has no spread."""
    result = {}
    for mode in dict.fromkeys(r["mode"] for r in runs):
        of = sorted((r for r in runs if r["mode"] == mode), key=lambda r: r["seed"])
        final = [r["val"][-1][1] for r in of]
        result[mode] = {"final": final, "mean": sum(final) / len(final), "spread": max(final) - min(final),
                        "peak_bytes": max(r["peak_bytes"] for r in of), "units_per_layer": of[0]["units_per_layer"]}
    exact = result.get("exact")
    for mode, of in result.items():
        of["difference"] = of["mean"] - exact["mean"] if exact and len(of["final"]) == len(exact["final"]) else None
        known = of["difference"] is not None and len(exact["final"]) > 1 and mode != "exact"
        of["no_worse"] = of["difference"] <= exact["spread"] if known else None
    return result

def verdict(of):
    known = {None: "not known (that takes exact and two seeds)", True: "yes", False: "NO"}
    return [f"{NAMES[mode]}: no worse than exact by more than the spread over seeds: {known[x['no_worse']]}" + (
            "" if x["no_worse"] is None else f" ({x['difference']:+.4f}; exact's seeds spread over {of['exact']['spread']:.4f})")
            for mode, x in of.items() if mode != "exact"]

def markdown(a, data, of):
    """The table, and the verdict on each mode."""
    head = ["", *(f"seed {s}" for s in range(1, a.seeds + 1)), "mean", "spread", "mean - exact's", "peak bytes", "units a layer"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for mode, x in of.items():
        difference = "" if mode == "exact" or x["difference"] is None else f"{x['difference']:+.4f}"
        cells = [NAMES[mode], *(f"{loss:.4f}" for loss in x["final"]), f"{x['mean']:.4f}", f"{x['spread']:.4f}", difference,
                 f"{x['peak_bytes']:,}", f"{x['units_per_layer']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    what = data["files"][0] if len(data["files"]) == 1 else f"{len(data['files'])} files"
    lines += ["", f"Validation loss after {a.steps} steps of {a.batch} x {a.seq_len} bytes of {what} ({a.model}, "
              f"{data['train_tokens']:,} bytes to learn, {data['val_tokens']:,} to be examined on). Spread: largest less smallest "
              "over the seeds. Units: B\\*T\\*C elements that a layer keeps for its backward, statistics included.", ""]
    return "\n".join(lines + verdict(of)) + "\n"

def plot(a, runs, path):
    """Validation loss over steps, a band from the smallest to the largest over seeds around the mean; beside it the same less
    exact's mean, where the eye can tell the modes apart. False without Matplotlib."""
    plt = common.pyplot()
    if not plt:
        return False
    import numpy as np
    curves = {mode: np.array([r["val"] for r in runs if r["mode"] == mode]) for mode in dict.fromkeys(r["mode"] for r in runs)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    looks = {"exact": ("-", "black"), "act": ("--", "tab:orange"), "norm": ("-.", "tab:blue"), "both": (":", "tab:green"),
             "slope": ("--", "tab:red"), "both-slope": (":", "tab:purple")}
    for ax, less in zip(axes, (False, "exact" in curves)):
        for mode, of in curves.items():
            style, color = looks[mode]
            steps, y = of[0, :, 0], of[:, :, 1] - (curves["exact"][:, :, 1].mean(0) if less else 0)
            ax.fill_between(steps, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
            ax.plot(steps, y.mean(0), style, color=color, label=NAMES[mode])
        ax.set(xlabel="step", ylabel="validation loss, less the mean of exact" if less else "validation loss")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{a.model}, {a.seeds} seed{'s' * (a.seeds > 1)}: mean, and from smallest to largest", fontsize=10)
    common.save(plt, figure, path)
    return True

def common_arguments(parser, out, validations=6, batches=30):
    parser.set_defaults(validations=validations)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N in each mode (3)")
    parser.add_argument("--warmup", type=int, metavar="N", help="steps (a tenth of all, 50 at most)")
    parser.add_argument("--val-every", type=int, metavar="N", help=f"steps (1/{validations} of all)")
    parser.add_argument("--val-batches", type=int, default=batches, metavar="N", help=f"in a validation ({batches})")
    usual = [name for name in NAMES if name not in WHEN_ASKED]
    parser.add_argument("--modes", default=",".join(usual), metavar="A,B", help=f"of {','.join(NAMES)} ({','.join(usual)})")
    parser.add_argument("--flags", default="", metavar="'A=B'", help="more flags for make, as in --flags 'CPU=1 PRECISION=FP32'")
    parser.add_argument("--options", default="", metavar="'-r 0'", help="more options for the trainer, as in --options='-r 0'")
    parser.add_argument("--program", action="append", default=[], metavar="MODE=PATH", help="a program that is built already")
    parser.add_argument("--out", default=out, metavar="DIR", help=f"({out})")
    parser.add_argument("--write", metavar="DIR", help="copies the results there, too")

def settle(parser, a, *paths):
    """Checks the common arguments, fills in what follows from others, and goes to the project's folder, so that commands read alike
    everywhere. Returns the paths as they are called there, and {mode: program that is built already}."""
    a.options = shlex.split(a.options)
    a.warmup = min(50, a.steps // 10) if a.warmup is None else a.warmup
    a.val_every = max(1, a.steps // a.validations) if a.val_every is None else a.val_every
    a.modes = a.modes.split(",")
    if not set(a.modes) <= set(NAMES):
        parser.error(f"--modes {','.join(a.modes)}: expected some of {','.join(NAMES)}")
    for name in ("seeds", "steps", "val_every"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: expected 1 or more")
    a.out, a.write, *paths = (p and os.path.relpath(p, ROOT) for p in (a.out, a.write, *paths))
    built = {mode: os.path.join(".", os.path.relpath(p, ROOT)) for mode, p in (p.split("=", 1) for p in a.program)}
    os.chdir(ROOT)
    os.makedirs(a.out, exist_ok=True)
    return paths, built

def device(log):
    """What a run's output says that it ran on."""
    with open(log) as f:
        found = re.search(r"^device +(.*?),", f.read(), re.M)
    return found[1] if found else "unknown"

def leave(a, name, result, table, draw, begin):
    """Writes name.json, .md and .png to --out and --write; draw(path) draws, and says whether it could."""
    with atomic(f"{a.out}/{name}.json", f"{a.out}/{name}.md") as (f, g):
        f.write(json.dumps(result, indent=1).encode() + b"\n")
        g.write(table.encode())
    names = [f"{name}.json", f"{name}.md"] + [f"{name}.png"] * draw(f"{a.out}/{name}.png")
    print(f"\n{table}\nin {a.out}: {' '.join(names)}; {(time.time() - begin) / 60:.1f} minutes")
    if a.write:
        os.makedirs(a.write, exist_ok=True)
        for name in names:
            shutil.copyfile(f"{a.out}/{name}", f"{a.write}/{name}")

def main():
    parser = argparse.ArgumentParser(description="Losses of exact and approximate training beside each other.")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="what to learn (this project's own sources)")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="(600)")
    parser.add_argument("--model", default="gpt2:L4,H4,C128,T64,V257", metavar="SIZE", help="(gpt2:L4,H4,C128,T64,V257)")
    parser.add_argument("-b", dest="batch", type=int, default=16, metavar="B", help="sequences a step (16)")
    parser.add_argument("-t", dest="seq_len", type=int, default=64, metavar="T", help="tokens a sequence (64)")
    parser.add_argument("--lr", default="1e-3", help="at its peak; cosine to a tenth (1e-3)")
    common_arguments(parser, "build/loss")
    a = parser.parse_args()
    files, built = settle(parser, a, *(a.text or []))
    files = files or sorted({f for pattern in SOURCES for f in glob.glob(pattern, recursive=True)})

    begin = time.time()
    data = tokens(files, a.out)
    print(f"{data['train_tokens']} bytes to learn, {data['val_tokens']} to be examined on")
    runs = run_all(a, {mode: built.get(mode) or build(mode, a.out, shlex.split(a.flags)) for mode in a.modes}, data)
    of = summary(runs)
    result = {"what": "validation loss of exact and approximate training, the same tokens and seeds (dev/bench/loss.py)",
              "commit": common.commit(), "device": device(f"{a.out}/{a.modes[0]}-seed1.txt"), "make_flags": a.flags, "text": data,
              **{k: getattr(a, k) for k in ("model", "batch", "seq_len", "steps", "seeds")}, "summary": of, "runs": runs}
    leave(a, "loss", result, markdown(a, data, of), lambda path: plot(a, runs, path), begin)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped; the same command goes on with the runs that are left")
