"""Tables of what gpu.sh has measured, put where they are read.

    python3 dev/bench/report.py [--write | --check]

Reads dev/bench/results/GPU/*.json and prints, or with --write puts between their markers,

    README.md              <!-- results:begin -->   tokens/s and memory of each mode, and of peers
    dev/bench/README.md    <!-- budget:begin -->    the speed-of-light budget, term by term, measured terms beside it
    dev/cuda/README.md     <!-- shares:begin -->    what the kernels reach of a copy, or of a matmul

and a plot, results/GPU/speed.png, where Matplotlib is installed. --check exits with 1 if a file is not what --write would make
of it. What no GPU has run has no row, no column and no table.
"""
import argparse
import glob
import json
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gpu  # noqa: E402
import traffic  # noqa: E402

ROOT = gpu.ROOT
NOTHING = "–"
PLACES = [("README.md", "results"), ("dev/bench/README.md", "budget"), ("dev/cuda/README.md", "shares")]
FIXED, LARGEST = "fixed", "largest"


def stop(message):
    sys.exit(f"report.py: {message}")


# ----------------------------------------------------------------------------
# what there is

def load(folder):
    """{GPU's folder: {stage's file: what it holds}}; results/cpu has losses, and a try is no measurement."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*", "*.json"))):
        try:
            with open(path) as f:
                value = json.load(f)
        except ValueError as e:
            stop(f"{path}: is not JSON ({e})")
        if isinstance(value, dict) and "gpu" in value and "source" in value:
            if value["source"].endswith("-try"):
                print(f"{path}: a try, not a measurement; left out", file=sys.stderr)
                continue
            found.setdefault(os.path.basename(os.path.dirname(path)), {})[os.path.basename(path)[:-5]] = value
    return found


def runs(data, file):
    return data.get(file, {}).get("runs", [])


def of(entries, model, batch, row):
    """The runs of a row: one a round, measured or not."""
    return [e for e in entries if (e.get("model"), e.get("batch"), e.get("row")) == (model, batch, row)]


def measured(entries, model, batch, row):
    return [e for e in of(entries, model, batch, row) if "tokens_per_s" in e]


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def why(entries):
    """In place of a number."""
    return "failed" if any("error" in e for e in entries) else NOTHING


def peak_flops(name):
    """What the trainer takes for the GPU's peak, or None."""
    with open(os.path.join(ROOT, "train_gpt2.cu")) as f:
        table = re.search(r"known\[\] = \{(.*?)\};", f.read(), re.S)
    known = re.findall(r'\{"([^"]+)", (\d+)\}', table[1]) if table else []
    return next((float(tflops) * 1e12 for part, tflops in known if part in (name or "")), None)


def model_flops(s):
    """A token's flops as the trainer's MFU has them: 6 for each weight of a matmul, and attention."""
    return 6 * (s.V * s.C + 12 * s.L * s.C * s.C) + 6 * s.L * s.C * s.T


def gib(n):
    return f"{n / 2**30:.1f}" if n else "–"


def row(cells):
    return "| " + " | ".join(str(c) for c in cells) + " |"


def table(head, rows, left=1):
    return [row(head), "|" + "---|" * left + "---:|" * (len(head) - left), *map(row, rows)]


# ----------------------------------------------------------------------------
# README.md: modes and peers

def speed_table(data, model):
    """A row for each mode and peer at the fixed batch, and at the largest that fits."""
    ours, peers = runs(data, "bench"), runs(data, "peers")
    name = next((d["gpu"] for d in data.values()), None)
    shape = traffic.shape(model.size, 1, model.T)
    peak = peak_flops(name) if name else None
    fixed = [e["B"] for e in [*ours, *peers] if (e.get("model"), e.get("batch")) == (model.name, FIXED) and "tokens_per_s" in e]
    B = fixed[0] if fixed else model.B
    base = mean([e["tokens_per_s"] for e in measured(ours, model.name, FIXED, gpu.EXACT.row)])
    base_peers = mean([e["tokens_per_s"] for e in measured(peers, model.name, FIXED, gpu.EXACT.row)]) or base
    head = [f"GPT-2 {model.name}, T={model.T}", f"B={B}: tokens/s", "of exact", "MFU", "driver's peak, GiB", "the ledger, GiB",
            "largest B", "tokens/s", "driver's peak, GiB"]
    rows = []
    wanted = [(m.row, ours, base) for m in gpu.MODES]
    wanted += [(p.program, peers, base_peers) for p in gpu.PEER_ROWS
               if not p.program.startswith("llm.c") or of(peers, model.name, FIXED, p.program)]
    for label, entries, against in wanted:
        if label == gpu.COMPILED_BF16.program and model.name != gpu.SMALL.name:
            continue
        fixed = measured(entries, model.name, FIXED, label)
        largest = measured(entries, model.name, LARGEST, label)
        speed = mean([e["tokens_per_s"] for e in fixed])
        cells = [label]
        if fixed:
            cells += [f"{speed:,.0f}", f"{100 * speed / against:.0f} %" if against else "–",
                      f"{100 * speed * model_flops(shape) / peak:.0f} %" if peak else "–",
                      gib(mean([e.get("peak_bytes") for e in fixed])), gib(mean([e.get("ledger_bytes") for e in fixed]))]
        else:
            cells += [why(of(entries, model.name, FIXED, label)), *["–"] * 4]
        if largest:
            e = largest[-1]
            cells += [e["B"], f"{e['tokens_per_s']:,.0f}", gib(e.get("peak_bytes"))]
        else:
            cells += ["–", why(of(entries, model.name, LARGEST, label)), "–"]
        if set(cells[1:]) != {NOTHING}:
            rows.append(cells)
    return [*table(head, rows), ""] if rows else []


def twice(data):
    """How far two measurements of one mode, at the beginning and at the end, lie apart."""
    said = []
    for file in ("bench", "peers"):
        for label in dict.fromkeys(e.get("row") for e in runs(data, file)):
            both = measured(runs(data, file), gpu.SMALL.name, FIXED, label)
            if len(both) > 1:
                said.append(f"{label} {' and '.join(format(e['tokens_per_s'], ',.0f') for e in both)}")
    return "Measured twice, at the beginning and at the end (tokens/s): " + "; ".join(said) + "." if said else ""


def results_section(found, folder):
    if not found:
        return ["No GPU has run this yet; what `dev/bench/gpu.sh` measures will stand here."]
    lines = []
    for where, data in found.items():
        head = next(iter(data.values()))
        lines += [f"**{head['gpu']}**, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit'][:12]}"
                  + (f"; peers: {data['peers'].get('python', '?')}" if "peers" in data else "") + ".", ""]
        for model in (gpu.SMALL, gpu.LARGE):
            lines += speed_table(data, model)
        drift = twice(data)
        lines += [drift, ""] if drift else []
        if os.path.exists(os.path.join(folder, where, "speed.png")):
            lines += [f"![Memory against tokens/s]({os.path.relpath(os.path.join(folder, where, 'speed.png'), ROOT)})", ""]
        tests = data.get("check", {}).get("tests")
        if tests:
            lines += [f"Tests on this GPU (`dev/bench/gpu.sh check`): {tests['passed']} passed, {tests['failed']} failed, "
                      f"{tests['unfinished']} not finished.", ""]
    lines += ["tokens/s: of the median step of 25 after 5 (of 21 at the largest B). \"Of exact\": against `exact, -r 0` "
              "measured in the same call. Driver's peak: what nvidia-smi says the process holds, read ten times a second. "
              "Modes and peers are explained in "
              "[dev/bench/README.md](dev/bench/README.md)."]
    return lines


# ----------------------------------------------------------------------------
# dev/bench/README.md: the budget

# What the budget takes for granted of an H200: flops/s of matmuls and of attention, bytes/s of element-wise kernels.
# Seen there at most: 790e12 of one large bf16 matmul, 4.3e12 of a copy.
MATMUL, FORWARD, BACKWARD, BACKWARD_MMA, COPY = 600e12, 230e12, 190e12, 130e12, 4e12
MATMUL_CEILING, COPY_CEILING = 790e12, 4.3e12


def flops(s):
    """{term: (from the shapes, flops of a token)}, forward."""
    C, L, Vp = s.C, s.L, traffic.padded(s.V)
    return {"qkv": (f"2 · {C} · 3·{C} · {L}", 2 * C * 3 * C * L), "attproj": (f"2 · {C} · {C} · {L}", 2 * C * C * L),
            "fc": (f"2 · {C} · 4·{C} · {L}", 2 * C * 4 * C * L),
            "fcproj": (f"2 · 4·{C} · {C} · {L}", 2 * 4 * C * C * L),
            "lm-head": (f"2 · {C} · {Vp}", 2 * C * Vp)}


def attention_flops(s):
    """Forward: two products (scores; their sum of values), of which causality leaves (T+1)/2 keys to a query on average."""
    return 4 * s.C * (s.T + 1) / 2 * s.L


def element_wise(count):
    """{kernel: bytes of a step}: all but matmuls and attention."""
    return {k: n for k, n in count.bytes().items() if k != traffic.MATMUL and not k.startswith("attention")}


def microseconds(count, backward=BACKWARD):
    """(matmuls, attention forward, attention backward, element-wise) of a token, by the budget."""
    s = count.shape
    return (3 * sum(n for _, n in flops(s).values()) / MATMUL * 1e6, attention_flops(s) / FORWARD * 1e6,
            2.5 * attention_flops(s) / backward * 1e6, sum(element_wise(count).values()) / COPY / (s.B * s.T) * 1e6)


def profiled(data, mode):
    """{kernel: microseconds of a token} from the profile of a step, or None."""
    for e in runs(data, "profile"):
        if e.get("row") == mode.row and "kernels" in e:
            return {k: v["ms"] * 1e3 / (e["B"] * e["T"]) for k, v in e["kernels"].items()}
    return None


def profiles_of(found, *modes):
    """[(GPU's folder, mode, profile)] of what was profiled."""
    return [(where, mode, p) for where, data in found.items() for mode in modes for p in [profiled(data, mode)] if p]


def sum_of(profile, choose):
    return sum(us for k, us in profile.items() if choose(k))


def is_forward(k):
    return k.startswith("attention_forward")


def is_backward(k):
    return k.startswith("attention_backward")


def is_element_wise(k):
    return k != gpu.LIBRARY and not k.startswith("attention")


def counted(s, name):
    return traffic.Count(s, next(m for m in traffic.MODES if m.name == name))


# the budget's name of each mode of gpu.py
BUDGETED = {gpu.EXACT.row: "exact", gpu.FUSED.row: "exact, -ge 2", gpu.EXACT_R1.row: "exact, -r 1",
            gpu.EXACT_R2.row: "exact, -r 2", gpu.ACT.row: "APPROX_ACT=2", gpu.NORM.row: "MS_NORM=1, -r 1",
            gpu.BOTH.row: "USE_APPROXBP=1"}


def terms_table(s, found):
    """The budget of exact, -r 0 -ge 0; measured is a profile of that mode."""
    count = counted(s, traffic.BASE)
    us, tokens = microseconds(count), s.B * s.T
    profiles = {where: p for where, _, p in profiles_of(found, gpu.EXACT)}
    head = ["a token's", "from the shapes", "MFLOP or KB", "at", "µs"]
    head += [f"measured, µs ({where})" for where in profiles]

    def beside(choose, work, unit):
        """Measured microseconds, and the rate that they are."""
        cells = []
        for p in profiles.values():
            t = sum_of(p, choose)
            cells.append(f"{t:.3f} ({work / t * 1e6 / 1e12:,.{1 if unit == 'TB/s' else 0}f} {unit})" if t else NOTHING)
        return cells

    nothing = [""] * len(profiles)
    forward = sum(n for _, n in flops(s).values())
    rows = [[f"{name}, forward", text, f"{n / 1e6:.1f}", "", "", *nothing] for name, (text, n) in flops(s).items()]
    rows += [["matmuls, forward", "their sum", f"{forward / 1e6:.1f}", "", "", *nothing],
             ["matmuls, backward", "weight and input: twice that", f"{2 * forward / 1e6:.1f}", "", "", *nothing],
             ["**matmuls**", "", f"{3 * forward / 1e6:.1f}", f"{MATMUL / 1e12:.0f} TFLOP/s", f"**{us[0]:.3f}**",
              *beside(lambda k: k == gpu.LIBRARY, 3 * forward, "TFLOP/s")]]
    a = attention_flops(s)
    rows += [["**attention, forward**", f"2 products · 2 · {s.C} · ({s.T}+1)/2 · {s.L}", f"{a / 1e6:.1f}",
              f"{FORWARD / 1e12:.0f} TFLOP/s", f"**{us[1]:.3f}**", *beside(is_forward, a, "TFLOP/s")],
             ["**attention, backward**", "5 products: scores again, dP, dV, dK, dQ", f"{2.5 * a / 1e6:.1f}",
              f"{BACKWARD / 1e12:.0f} TFLOP/s", f"**{us[2]:.3f}**", *beside(is_backward, 2.5 * a, "TFLOP/s")]]
    n = sum(element_wise(count).values()) / tokens
    rows += [["**all other kernels**", "the next table", f"{n / 1e3:.1f} KB", f"{COPY / 1e12:.0f} TB/s", f"**{us[3]:.3f}**",
              *beside(is_element_wise, n, "TB/s")]]
    whole = [f"{sum(p.values()):.3f}" for p in profiles.values()]
    rows += [["**sum**", f"{(3 * forward + 3.5 * a) / 1e9:.3f} GFLOP", "", "", f"**{sum(us):.3f}**", *whole]]
    return table(head, rows, left=2)


def passes_table(s, found):
    """Bytes and microseconds of each element-wise kernel, exact -r 0 and USE_APPROXBP=1."""
    exact, both = element_wise(counted(s, traffic.BASE)), element_wise(counted(s, "USE_APPROXBP=1"))
    tokens = s.B * s.T
    profiles = profiles_of(found, gpu.EXACT, gpu.BOTH)
    head = ["kernel", "exact, KB a token", "µs at 4 TB/s", "USE_APPROXBP=1, KB", "µs"]
    short = {gpu.EXACT: "exact", gpu.BOTH: gpu.BOTH.row}
    head += [f"measured, {short[mode]} ({where})" for where, mode, _ in profiles]
    rows = []
    small = {k for k in {**exact, **both} if max(exact.get(k, 0), both.get(k, 0)) < 0.002 * sum(exact.values())}
    for k in [k for k in {**exact, **both} if k not in small] + ["the rest", "sum"]:
        names = small if k == "the rest" else {**exact, **both} if k == "sum" else [k]
        cells = [k if k in ("sum", "the rest") else f"`{k}`"]
        for bytes_of in (exact, both):
            n = sum(bytes_of.get(name, 0) for name in names) / tokens
            cells += [f"{n / 1e3:.1f}", f"{n / COPY * 1e6:.4f}"] if n else ["–", "–"]
        for _, mode, p in profiles:
            n = sum((exact if mode is gpu.EXACT else both).get(name, 0) for name in names) / tokens
            t = sum_of(p, lambda name: name in names)
            cells.append(f"{t:.4f} ({n / t * 1e6 / 1e12:.1f} TB/s)" if t else NOTHING)
        rows.append(cells)
    return table(head, rows)


def modes_table(s, found):
    """The budget of each mode, and what a run reaches of it."""
    head = ["mode", "matmuls", "attention", "other kernels", "sum, µs a token", "tokens/s"]
    found = {where: data for where, data in found.items() if runs(data, "bench")}
    head += [f"measured, tokens/s ({where})" for where in found]
    rows = []
    for mode in gpu.MODES:
        us = microseconds(counted(s, BUDGETED[mode.row]))
        cells = [mode.row, f"{us[0]:.3f}", f"{us[1] + us[2]:.3f}", f"{us[3]:.3f}", f"{sum(us):.3f}", f"{1e6 / sum(us):,.0f}"]
        for data in found.values():
            entries = of(runs(data, "bench"), gpu.SMALL.name, FIXED, mode.row)
            speed = mean([e["tokens_per_s"] for e in entries if "tokens_per_s" in e])
            cells.append(f"{speed:,.0f} ({100 * speed * sum(us) / 1e6:.0f} %)" if speed else why(entries))
        rows.append(cells)
    return table(head, rows)


def sweeps_table(found):
    """What gpu.sh has tried of settings that are chosen by hand; nothing where no GPU has."""
    found = {where: data for where, data in found.items() if runs(data, "bench")}
    rows = []
    for mode in (gpu.EXACT, gpu.FUSED, *gpu.SWEEPS):
        speeds = [mean([e["tokens_per_s"] for e in measured(runs(data, "bench"), gpu.SMALL.name, FIXED, mode.row)]) for data in found.values()]
        rows.append([f"`{mode.options}`", *(f"{v:,.0f}" if v else NOTHING for v in speeds)])
    if all(cell == NOTHING for cells in rows[2:] for cell in cells[1:]):
        return []
    return ["", "Settings that are chosen by hand, tokens/s (exact; the first two with what is the default):", "",
            *table(["options", *found], rows)]


def budget_section(found):
    s = traffic.shape(gpu.SMALL.size, gpu.SMALL.B, gpu.SMALL.T)
    count = counted(s, traffic.BASE)
    us, mma = microseconds(count), microseconds(count, BACKWARD_MMA)
    forward, a = 3 * sum(n for _, n in flops(s).values()), attention_flops(s)
    n = sum(element_wise(count).values()) / (s.B * s.T)

    def speed(microseconds_of):
        return f"{round(1e6 / sum(microseconds_of), -3):,.0f}"
    ceiling = ((forward + 3.5 * a) / MATMUL_CEILING + n / COPY_CEILING) * 1e6
    return [f"GPT-2 {gpu.SMALL.name}, B={s.B}, T={s.T}, `exact -r 0 -ge 0`, per token:", "", *terms_table(s, found), "",
            f"So the budget is {sum(us):.2f} µs a token, {speed(us)} tokens/s. With {BACKWARD_MMA / 1e12:.0f} TFLOP/s in "
            f"attention's backward, a cautious figure for mma.sync, it is {sum(mma):.2f} µs, {speed(mma)}. If everything ran "
            f"at the ceilings ({MATMUL_CEILING / 1e12:.0f} TFLOP/s, attention too, and {COPY_CEILING / 1e12:.1f} TB/s), it "
            f"would be {ceiling:.2f} µs, {speed([ceiling])}.", "",
            "The kernels that only move memory, one by one (`dev/bench/traffic.py` counts the bytes):", "",
            *passes_table(s, found), "",
            "And the modes. What a recomputation reads and writes again is in these bytes; what GELU in an epilogue "
            "(`-ge 2`) costs the matmul is not. `-r 1`, `-r 2` and `MS_NORM=1` are counted at `-ge 0`, and run at what is "
            "faster:", "",
            *modes_table(s, found), *sweeps_table(found)]


# ----------------------------------------------------------------------------
# dev/cuda/README.md: the kernels

def shares_section(found):
    lines = []
    for file in [data["kernels"] for data in found.values() if "kernels" in data]:
        lines += [f"{file['gpu']}, driver {file['driver']}, CUDA {file['cuda']}, commit {file['commit'][:12]}, bf16:", ""]
        rows = []
        for program in file["programs"]:
            name = f"`{os.path.basename(program['name'])}.cu`"
            for r in program.get("rows", []):
                rate = f"{r['gb_s']:,.0f} GB/s" if "gb_s" in r else f"{r.get('tflop_s', 0):,.0f} TFLOP/s"
                rows.append([name, f"{r['case']}: {r['version']}", f"{r['ms']:.3f}", rate, f"{100 * r['share']:.0f} %"])
            if "rows" not in program:
                rows.append([name, why([program]), "–", "–", "–"])
        lines += [*table(["program", "case: version", "ms", "rate", "of a copy, or of a matmul"], rows, left=2), ""]
    return lines[:-1] or ["No GPU has run this yet; what `dev/bench/gpu.sh` measures will stand here."]


# ----------------------------------------------------------------------------

def plot(data, path):
    """Memory against tokens/s, a point a mode and a peer; hollow at the largest batch. False without Matplotlib, or points."""
    points = {m.name: [(e["row"], e["batch"], e["peak_bytes"] / 2**30, e["tokens_per_s"], e["program"] == "ours")
                       for file in ("bench", "peers") for e in runs(data, file)
                       if e.get("model") == m.name and "tokens_per_s" in e and e.get("peak_bytes") and e.get("round") == 1
                       and not (file == "peers" and e["program"] == "ours")] for m in (gpu.SMALL, gpu.LARGE)}
    points = {name: of_model for name, of_model in points.items() if of_model}
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: that needs Matplotlib (apt-get install python3-matplotlib)")
        return False
    if not points:
        return False
    figure, axes = plt.subplots(1, len(points), figsize=(6.5 * len(points), 5), constrained_layout=True, squeeze=False)
    labels = [m.row for m in gpu.MODES] + [p.program for p in gpu.PEER_ROWS]
    for ax, (name, of_model) in zip(axes[0], points.items()):
        for label in [x for x in labels if any(p[0] == x for p in of_model)]:
            color, ours = f"C{labels.index(label) % 10}", any(p[0] == label and p[4] for p in of_model)
            for i, (_, batch, x, y, _) in enumerate(p for p in of_model if p[0] == label):
                filled = color if batch == FIXED else "none"
                ax.scatter(x, y, marker="o" if ours else "s", s=50, edgecolors=color, facecolors=filled,
                           label=None if i else label)
        ax.set_xlabel("driver's peak, GiB")
        ax.set_ylabel("tokens/s")
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.set_title(f"GPT-2 {name}; filled: one batch for all, hollow: the largest that fits", fontsize=9)
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(next(d["gpu"] for d in data.values()), fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def between(text, name, lines, path):
    """The text with these lines between its markers; None if it has no such markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text and end not in text:
        return None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        stop(f"{path}: expected one {begin} and one {end} behind it")
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
    if a.write:
        for where, data in found.items():
            plot(data, os.path.join(a.results, where, "speed.png"))
    sections = {"results": results_section(found, a.results), "budget": budget_section(found), "shares": shares_section(found)}
    stale = []
    for name, section in PLACES:
        path = os.path.join(a.root, name)
        try:
            with open(path, encoding="utf-8") as f:
                old = f.read()
        except OSError as e:
            stop(f"{path}: {e.strerror}")
        new = between(old, section, sections[section], name)
        if not a.write and not a.check:
            print(f"==== {name}, {section}\n\n" + "\n".join(sections[section]) + "\n")
        elif new is None:
            print(f"{name}: has no markers <!-- {section}:begin --> and <!-- {section}:end -->; left as it is")
        elif new != old and a.check:
            stale.append(name)
        elif new != old:
            with gpu.atomic(path) as (f,):
                f.write(new.encode())
            print(f"{name}: written")
    for name in stale:
        print(f"{name}: not in step with dev/bench/results; run: python3 dev/bench/report.py --write", file=sys.stderr)
    sys.exit(1 if stale else 0)


if __name__ == "__main__":
    main()
