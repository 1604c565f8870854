"""Tables of what gpu.sh has measured, put where they are read.

    python3 dev/bench/report.py [--write | --check]

Reads dev/bench/results/GPU/*.jsonl and prints, or with --write puts between their markers,

    README.md              <!-- results:begin -->   tokens/s and memory of each mode, and of peers
    dev/bench/README.md    <!-- budget:begin -->    the speed-of-light budget, term by term, measured terms beside it
    dev/cuda/README.md     <!-- shares:begin -->    what the kernels reach of a copy, or of a matmul

--check exits with 1 if a file is not what --write would make of it. What no GPU has run has no row, no column and no table.
"""
import argparse
import glob
import os
import re
import sys
from collections import Counter

import gpu
import traffic
from common import ROOT, padded

from atomic import atomic

NOTHING = "–"
PLACES = [("README.md", "results"), ("dev/bench/README.md", "budget"), ("dev/cuda/README.md", "shares")]
NOT_YET = ["No GPU has run this yet; what `dev/bench/gpu.sh` measures will stand here."]

# ---- what there is ---------------------------------------------------------------------------------

def load(folder):
    """{GPU's folder: {stage: (head, [entry])}}; a try is no measurement."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*", "*.jsonl"))):
        head, entries = gpu.load(path)
        if not head:
            sys.exit(f"report.py: {path}: is not a file of gpu.sh's: its first line does not say which GPU")
        if head["source"].endswith("-try"):
            print(f"{path}: a try, not a measurement; left out", file=sys.stderr)
            continue
        found.setdefault(os.path.basename(os.path.dirname(path)), {})[os.path.basename(path)[:-6]] = head, list(entries.values())
    return found

def entries(data, stage, what):
    """Of a stage, those that have such a figure."""
    return [e for e in data.get(stage, ({}, []))[1] if what in e]

def of(data, stage, model, batch, row):
    """The runs of a row, one per round, whatever came of them."""
    return [e for e in entries(data, stage, "model") if (e["model"], e["batch"], e["row"]) == (model, batch, row)]

def measured(data, stage, model, batch, row):
    return [e for e in of(data, stage, model, batch, row) if "tokens_per_s" in e]

def mean(runs, what):
    values = [e[what] for e in runs if e.get(what) is not None]
    return sum(values) / len(values) if values else None

def why(runs):
    """In place of a number."""
    return "failed" if any(e["status"] == "failed" for e in runs) else NOTHING

def gib(n):
    return f"{n / 2**30:.1f}" if n else NOTHING

def percent(part, whole):
    return f"{100 * part / whole:.0f} %" if whole else NOTHING

def table(head, rows, left=1):
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return ["| " + " | ".join(map(str, cells)) + " |" if i != 1 else "|" + "|".join(cells) + "|" for i, cells in enumerate(lines)]

# ---- README.md: modes and peers --------------------------------------------------------------------

def peak_flops(name):
    """What the trainer takes for the GPU's peak, or None."""
    with open(os.path.join(ROOT, "train_gpt2.cu")) as f:
        known = re.search(r"known\[\] = \{(.*?)\};", f.read(), re.S)
    known = re.findall(r'\{"([^"]+)", (\d+)\}', known[1]) if known else []
    return next((float(tflops) * 1e12 for part, tflops in known if part in (name or "")), None)

def model_flops(s):
    """A token's flops as the trainer's MFU has them: 6 for each weight of a matmul, and attention."""
    return 6 * (s.V * s.C + 12 * s.L * s.C * s.C) + 6 * s.L * s.C * s.T

def speed_table(data, model):
    """A row for each mode and peer at the fixed batch, and at the largest that fits."""
    name = next((head["gpu"] for head, _ in data.values()), None)
    shape, peak = traffic.shape(model.size, 1, model.T), peak_flops(name)
    def stage_of(row):   # peers runs some of our modes too, for comparison: where bench has not come to them, theirs stand here
        return "peers" if measured(data, "peers", model.name, "fixed", row) and not of(data, "bench", model.name, "fixed", row) else "bench"
    wanted = [(m.row, stage_of(m.row)) for m in gpu.MODES] + [(p.row, "peers") for p in gpu.PEERS]
    base = {stage: mean(measured(data, stage, model.name, "fixed", gpu.EXACT.row), "tokens_per_s") for stage in ("bench", "peers")}
    rows, B = [], model.B
    for label, stage in wanted:
        fixed, largest = (measured(data, stage, model.name, batch, label) for batch in ("fixed", "largest"))
        speed, against = mean(fixed, "tokens_per_s"), base[stage] or base["bench"]
        if fixed:
            B = fixed[0]["B"]
            cells = [f"{speed:,.0f}", percent(speed, against), percent(speed * model_flops(shape), peak),
                     gib(mean(fixed, "peak_bytes")), gib(mean(fixed, "ledger_bytes"))]
        else:
            cells = [why(of(data, stage, model.name, "fixed", label)), *[NOTHING] * 4]
        if largest:
            cells += [largest[-1]["B"], f"{largest[-1]['tokens_per_s']:,.0f}", gib(largest[-1].get("peak_bytes"))]
        else:
            cells += [NOTHING, why(of(data, stage, model.name, "largest", label)), NOTHING]
        if set(cells) != {NOTHING}:
            rows.append([label, *cells])
    head = [f"GPT-2 {model.name}, T={model.T}", f"B={B}: tokens/s", "of exact", "MFU", "GPU's peak, GiB", "the ledger, GiB",
            "largest B", "tokens/s", "GPU's peak, GiB"]
    return [*table(head, rows), ""] if rows else []

def tally(these):
    """How many passed, and which did not: the program, or where several have the same last word (the tool) that, with their number."""
    count, said = Counter(e["status"] for e in these), []
    for status, words in (("failed", "failed"), ("unfinished", "not finished")):
        which = Counter(e["id"].split()[-1] for e in these if e["status"] == status)
        names = ", ".join(f"{name} of {n} programs" if n > 1 else name for name, n in which.items())
        said.append(f"{count[status]} {words}" + (f" ({names})" if names else ""))
    return f"{count['ok']} passed, {', '.join(said)}"

def results_section(found):
    lines = []
    for data in found.values():
        head = next(iter(data.values()))[0]
        peers = data.get("peers", ({},))[0].get("python")
        commits = {stage: data[stage][0]["commit"][:12] for stage in ("bench", "peers") if stage in data} or {"check": head["commit"][:12]}
        at = f"commit {head['commit'][:12]}" if len(set(commits.values())) == 1 else " and ".join(f"{stage} at commit {c}" for stage, c in commits.items())
        lines += [f"**{head['gpu']}**, driver {head['driver']}, CUDA {head['cuda']}, {at}"
                  + (f"; peers: {peers}" if peers else "") + ".", ""]
        lines += speed_table(data, gpu.SMALL) + speed_table(data, gpu.LARGE)
        twice = [f"{row} {' and '.join(format(e['tokens_per_s'], ',.0f') for e in both)}" for stage in ("bench", "peers")
                 for row in dict.fromkeys(e["row"] for e in entries(data, stage, "tokens_per_s"))
                 for both in [measured(data, stage, gpu.SMALL.name, "fixed", row)] if len(both) > 1]
        if twice:  # how far two measurements of one mode lie apart
            lines += ["Measured twice, at the beginning and at the end (tokens/s): " + "; ".join(twice) + ".", ""]
        stages = sorted((stage for stage in data if re.match("check(_|$)", stage)), key=lambda stage: stage == "check")   # the newest last
        checks = [(data[stage][0], tally(entries(data, stage, "status"))) for stage in stages]
        if checks:
            lines += ["Tests on this GPU (`dev/bench/gpu.sh check`): " + "; ".join(
                f"at commit {of['commit'][:12]} {how}" for of, how in checks) + ".", ""]
    lines += ["tokens/s: of the median step of 25 after 5 (of 21 at the largest B). \"Of exact\": against `exact, -r 0` measured "
              "in the same call. GPU's peak: what the GPU holds more than before the run, by nvidia-smi ten times a second. –: not run. Modes "
              "and peers are explained in [dev/bench/README.md](dev/bench/README.md)."]
    return lines if found else NOT_YET

# ---- dev/bench/README.md: the budget ---------------------------------------------------------------

# What the budget takes for granted of an H200: flops/s of matmuls and of attention, bytes/s of element-wise kernels.
# Seen there at most: 790e12 of one large bf16 matmul, 4.3e12 of a copy.
MATMUL, FORWARD, BACKWARD, BACKWARD_MMA, COPY = 600e12, 230e12, 190e12, 130e12, 4e12
MATMUL_CEILING, COPY_CEILING = 790e12, 4.3e12

def flops(s):
    """{term: (from the shapes, flops of a token)}, forward."""
    C, L, Vp = s.C, s.L, padded(s.V)
    terms = {"qkv": f"2 · {C} · 3·{C} · {L}", "attproj": f"2 · {C} · {C} · {L}", "fc": f"2 · {C} · 4·{C} · {L}",
             "fcproj": f"2 · 4·{C} · {C} · {L}", "lm-head": f"2 · {C} · {Vp}"}
    return {name: (text, eval(text.replace("·", "*"))) for name, text in terms.items()}

def attention_flops(s):
    """Forward: two products (scores; their sum of values), of which causality leaves (T+1)/2 keys to a query on average."""
    return 4 * s.C * (s.T + 1) / 2 * s.L

def term(kernel):
    """Which of the budget's terms a kernel of a profile, or of traffic.py, belongs to."""
    terms = {"attention_forward": "forward", "attention_backward": "backward", gpu.LIBRARY: "matmuls", traffic.MATMUL: "matmuls"}
    return next((name for begin, name in terms.items() if kernel.startswith(begin)), "others")

def counted(s, mode):
    """What traffic.py counts of a mode of gpu.py."""
    name = {gpu.EXACT.row: traffic.BASE, gpu.FUSED.row: "exact, -ge 2"}.get(mode.row, mode.row)
    return traffic.Count(s, next(m for m in traffic.MODES if m.name == name))

def element_wise(count):
    """{kernel: bytes of a step}: all but matmuls and attention."""
    return {k: n for k, n in count.bytes().items() if term(k) == "others"}

def microseconds(count, backward=BACKWARD):
    """(matmuls, attention forward, attention backward, element-wise) of a token, by the budget."""
    s = count.shape
    return (3 * sum(n for _, n in flops(s).values()) / MATMUL * 1e6, attention_flops(s) / FORWARD * 1e6,
            2.5 * attention_flops(s) / backward * 1e6, sum(element_wise(count).values()) / COPY / (s.B * s.T) * 1e6)

def profiles_of(found, *modes):
    """[(GPU's folder, mode, {kernel: microseconds of a token})] of what was profiled."""
    return [(where, mode, {k: v["ms"] * 1e3 / (e["B"] * e["T"]) for k, v in e["kernels"].items()})
            for where, data in found.items() for mode in modes for e in entries(data, "bench", "kernels") if e["row"] == mode.row]

def took(profile, choose, work, unit, digits):
    """Measured microseconds of some kernels, and the rate that they are."""
    t = sum(us for k, us in profile.items() if choose(k))
    return f"{t:.{digits}f} ({work / t * 1e6 / 1e12:,.{1 if unit == 'TB/s' else 0}f} {unit})" if t else NOTHING

def terms_table(s, found):
    """The budget of exact, -r 0 -ge 0; measured is a profile of that mode."""
    count = counted(s, gpu.EXACT)
    us, profiles = microseconds(count), profiles_of(found, gpu.EXACT)

    def row(name, text, amount, at="", us="", which=None, work=0, unit="TFLOP/s"):
        beside = [took(p, lambda k: term(k) == which, work, unit, 3) if which else "" for *_, p in profiles]
        return [name, text, amount, at, us, *beside]
    forward, a = sum(n for _, n in flops(s).values()), attention_flops(s)
    n = sum(element_wise(count).values()) / (s.B * s.T)
    rows = [row(f"{name}, forward", text, f"{x / 1e6:.1f}") for name, (text, x) in flops(s).items()]
    rows += [row("matmuls, forward", "their sum", f"{forward / 1e6:.1f}"),
             row("matmuls, backward", "weight and input: twice that", f"{2 * forward / 1e6:.1f}"),
             row("**matmuls**", "", f"{3 * forward / 1e6:.1f}", f"{MATMUL / 1e12:.0f} TFLOP/s", f"**{us[0]:.3f}**",
                 "matmuls", 3 * forward),
             row("**attention, forward**", f"2 products · 2 · {s.C} · ({s.T}+1)/2 · {s.L}", f"{a / 1e6:.1f}",
                 f"{FORWARD / 1e12:.0f} TFLOP/s", f"**{us[1]:.3f}**", "forward", a),
             row("**attention, backward**", "5 products: scores again, dP, dV, dK, dQ", f"{2.5 * a / 1e6:.1f}",
                 f"{BACKWARD / 1e12:.0f} TFLOP/s", f"**{us[2]:.3f}**", "backward", 2.5 * a),
             row("**all other kernels**", "the next table", f"{n / 1e3:.1f} KB", f"{COPY / 1e12:.0f} TB/s", f"**{us[3]:.3f}**",
                 "others", n, "TB/s"),
             ["**sum**", f"{(3 * forward + 3.5 * a) / 1e9:.3f} GFLOP", "", "", f"**{sum(us):.3f}**",
              *(f"{sum(p.values()):.3f}" for *_, p in profiles)]]
    head = ["a token's", "from the shapes", "MFLOP or KB", "at", "µs"]
    return table([*head, *(f"measured, µs ({where})" for where, *_ in profiles)], rows, left=2)

def passes_table(s, found):
    """Bytes and microseconds of each element-wise kernel, exact -r 0 and USE_APPROXBP=1."""
    bytes_of = {mode: element_wise(counted(s, mode)) for mode in (gpu.EXACT, gpu.BOTH)}
    profiles, tokens = profiles_of(found, gpu.EXACT, gpu.BOTH), s.B * s.T
    kernels = list(dict.fromkeys(k for counts in bytes_of.values() for k in counts))
    least = 0.002 * sum(bytes_of[gpu.EXACT].values())
    small = [k for k in kernels if all(counts.get(k, 0) < least for counts in bytes_of.values())]
    rows = []
    for name, names in [*((f"`{k}`", [k]) for k in kernels if k not in small), ("the rest", small), ("sum", kernels)]:
        moved = {mode: sum(counts.get(k, 0) for k in names) / tokens for mode, counts in bytes_of.items()}
        cells = [name]
        for n in moved.values():
            cells += [f"{n / 1e3:.1f}", f"{n / COPY * 1e6:.4f}"] if n else [NOTHING, NOTHING]
        rows.append(cells + [took(p, names.__contains__, moved[mode], "TB/s", 4) for _, mode, p in profiles])
    return table(["kernel", "exact, KB a token", "µs at 4 TB/s", "USE_APPROXBP=1, KB", "µs",
                  *(f"measured, {'exact' if mode is gpu.EXACT else mode.row} ({where})" for where, mode, _ in profiles)], rows)

def modes_table(s, found):
    """The budget of each mode, and what a run reaches of it."""
    rows = []
    for mode in gpu.MODES:
        us = microseconds(counted(s, mode))
        cells = [mode.row, f"{us[0]:.3f}", f"{us[1] + us[2]:.3f}", f"{us[3]:.3f}", f"{sum(us):.3f}", f"{1e6 / sum(us):,.0f}"]
        for data in found.values():
            runs = of(data, "bench", gpu.SMALL.name, "fixed", mode.row)
            speed = mean(runs, "tokens_per_s")
            cells.append(f"{speed:,.0f} ({percent(speed * sum(us), 1e6)})" if speed else why(runs))
        rows.append(cells)
    return table(["mode", "matmuls", "attention", "other kernels", "sum, µs a token", "tokens/s",
                  *(f"measured, tokens/s ({where})" for where in found)], rows)

def sweeps_table(found):
    """What gpu.sh has tried of settings that are chosen by hand; nothing where no GPU has."""
    speeds = {mode: [mean(measured(data, "bench", gpu.SMALL.name, "fixed", mode.row), "tokens_per_s") for data in found.values()]
              for mode in (gpu.EXACT, gpu.FUSED, *gpu.SWEEPS)}
    if not any(v for mode in gpu.SWEEPS for v in speeds[mode]):
        return []
    rows = [[f"`{mode.options}`", *(f"{v:,.0f}" if v else NOTHING for v in values)] for mode, values in speeds.items()]
    return ["", "Settings that are chosen by hand, tokens/s (exact; the first two with what is the default):", "",
            *table(["options", *found], rows)]

def budget_section(found):
    found = {where: data for where, data in found.items() if "bench" in data}
    s = traffic.shape(gpu.SMALL.size, gpu.SMALL.B, gpu.SMALL.T)
    count = counted(s, gpu.EXACT)
    us, mma = sum(microseconds(count)), sum(microseconds(count, BACKWARD_MMA))
    ceiling = ((3 * sum(n for _, n in flops(s).values()) + 3.5 * attention_flops(s)) / MATMUL_CEILING
               + sum(element_wise(count).values()) / (s.B * s.T) / COPY_CEILING) * 1e6

    def speed(us):
        return f"{round(1e6 / us, -3):,.0f}"
    return [f"GPT-2 {gpu.SMALL.name}, B={s.B}, T={s.T}, `exact -r 0 -ge 0`, per token:", "", *terms_table(s, found), "",
            f"So the budget is {us:.2f} µs a token, {speed(us)} tokens/s. With {BACKWARD_MMA / 1e12:.0f} TFLOP/s in attention's "
            f"backward, a cautious figure for mma.sync, it is {mma:.2f} µs, {speed(mma)}. If everything ran at the ceilings "
            f"({MATMUL_CEILING / 1e12:.0f} TFLOP/s, attention too, and {COPY_CEILING / 1e12:.1f} TB/s), it would be {ceiling:.2f} "
            f"µs, {speed(ceiling)}.", "",
            "The kernels that only move memory, one by one (`dev/bench/traffic.py` counts the bytes):", "", *passes_table(s, found), "",
            "And the modes. What a recomputation reads and writes again is in these bytes; what GELU in an epilogue (`-ge 2`) costs "
            "the matmul is not. `-r 1`, `-r 2` and `MS_NORM=1` are counted at `-ge 0`, and run at what is faster:", "",
            *modes_table(s, found), *sweeps_table(found)]

# ---- dev/cuda/README.md: the kernels ---------------------------------------------------------------

def shares_section(found):
    lines = []
    for head, runs in (data["bench"] for data in found.values() if "bench" in data):
        rows = []
        for e in (e for e in runs if e["id"].startswith("dev/cuda/")):
            name = f"`{os.path.basename(e['id'])}.cu`"
            for r in e.get("rows", []):
                rate = f"{r['gb_s']:,.0f} GB/s" if "gb_s" in r else f"{r['tflop_s']:,.0f} TFLOP/s"
                rows.append([name, f"{r['case']}: {r['version']}", f"{r['ms']:.3f}", rate, percent(r["share"], 1)])
            rows += [] if "rows" in e else [[name, why([e]), *[NOTHING] * 3]]
        lines += [f"{head['gpu']}, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit'][:12]}, bf16:", "",
                  *table(["program", "case: version", "ms", "rate", "of a copy, or of a matmul"], rows, left=2), ""]
    return lines[:-1] or NOT_YET


def between(text, name, lines, path):
    """The text with these lines between its markers; None if it has no such markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text and end not in text:
        return None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"report.py: {path}: expected one {begin} and one {end} after it")
    return text[:text.index(begin) + len(begin)] + "\n" + "\n".join(lines) + "\n" + text[text.index(end):]

def main():
    parser = argparse.ArgumentParser(description="Tables and plots of dev/bench/results.")
    parser.add_argument("--write", action="store_true", help="puts them into the files, between their markers")
    parser.add_argument("--check", action="store_true", help="says which files are not in step, and exits with 1 if one is not")
    parser.add_argument("--results", default=os.path.join(ROOT, "dev/bench/results"), metavar="DIR", help="(dev/bench/results)")
    parser.add_argument("--root", default=ROOT, metavar="DIR", help="the folder of the files that are written (this project's)")
    a = parser.parse_args()
    if a.write and a.check:
        parser.error("--write and --check: expected one of them")
    found = load(a.results)
    sections = {"results": results_section(found), "budget": budget_section(found), "shares": shares_section(found)}
    stale = []
    for name, section in PLACES:
        path = os.path.join(a.root, name)
        with open(path, encoding="utf-8") as f:
            old = f.read()
        new = between(old, section, sections[section], name)
        if not a.write and not a.check:
            print(f"==== {name}, {section}\n\n" + "\n".join(sections[section]) + "\n")
        elif new is None:
            print(f"{name}: has no markers <!-- {section}:begin --> and <!-- {section}:end -->; left as it is")
        elif new != old and a.check:
            stale.append(name)
            print(f"{name}: not in step with dev/bench/results; run: python3 dev/bench/report.py --write", file=sys.stderr)
        elif new != old:
            with atomic(path) as (f,):
                f.write(new.encode())
            print(f"{name}: written")
    sys.exit(1 if stale else 0)

if __name__ == "__main__":
    main()
