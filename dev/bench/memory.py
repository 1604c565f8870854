"""Where a run's memory goes, mode by mode: a bar per mode, stacked from what --estimate=json says of its program.

    make variants && python3 dev/bench/memory.py        draws dev/bench/results/cpu/memory.png
"""
import os

from common import ROOT, ledger, pyplot, save

# what a bar is called, which build it is of, and its options
MODES = [("exact\n-r 0", "cpu-bf16", "-r 0"), ("exact\n-r 1", "cpu-bf16", "-r 1"), ("exact\n-r 2", "cpu-bf16", "-r 2"),
         ("APPROX_ACT=2\n-r 0", "cpu-act-bf16", "-r 0"), ("MS_NORM=1\n-r 0", "cpu-norm-bf16", "-r 0"),
         ("MS_NORM=1\n-r 1", "cpu-norm-bf16", "-r 1"), ("USE_APPROXBP=1", "cpu-approxbp-bf16", "-r 0")]
KINDS = {"param": "parameters", "optimizer": "optimizer", "saved": "activations kept for backward"}
PARTS = [*KINDS.values(), "logits", "gradients and the rest"]

def parts(rows):
    """{part: bytes} of a ledger, the parts in order."""
    of = [(KINDS.get(row["kind"], PARTS[-1]) if row["name"] != "logits" else "logits", row["bytes"]) for row in rows]
    return {name: sum(n for part, n in of if part == name) for name in PARTS}

def draw(bars, title, path):
    """bars: {mode: {part: bytes}}."""
    plt = pyplot()
    if not plt:
        raise SystemExit(1)
    figure, ax = plt.subplots(figsize=(10, 4.2), constrained_layout=True)
    below = [0.0] * len(bars)
    for name, color in zip(PARTS, ("tab:blue", "tab:cyan", "tab:orange", "tab:green", "0.7")):
        heights = [of[name] / 2**30 for of in bars.values()]
        ax.bar(list(bars), heights, 0.65, below, label=name, color=color)
        below = [b + h for b, h in zip(below, heights)]
    for i, total in enumerate(below):
        ax.text(i, total + 0.2, f"{total:.1f}", ha="center")
    ax.set(ylabel="GiB", title=title, ylim=(0, 1.25 * max(below)))
    ax.legend(frameon=False, ncols=3, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    save(plt, figure, path)

def main():
    shape = "-e d12 -b 64 -t 1024".split()
    bars = {name: parts(ledger(os.path.join(ROOT, "build", variant, "train_gpt2"), [*shape, *options.split()]))
            for name, variant, options in MODES}
    draw(bars, f"Memory of a training step, --estimate {' '.join(shape)}, bf16", os.path.join(ROOT, "dev/bench/results/cpu/memory.png"))

if __name__ == "__main__":
    main()
