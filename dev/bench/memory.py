"""Where a run's memory goes, and how far a card reaches: pictures of what --estimate=json and --fit=json say of the programs.

    make variants && python3 dev/bench/memory.py        draws memory.png, recipes.png and longest.png in dev/bench/results/cpu

memory.png    a bar per mode, stacked
recipes.png   bytes against matmuls that are computed again, for each way to train and to keep less
longest.png   the longest sequence at a batch of 1 on cards of some sizes
"""
import json
import os
import subprocess
import sys

from common import ROOT, ledger, pyplot, save

# what a bar is called, which build it is of, and its options
MODES = [("exact\n-r 0", "cpu-bf16", "-r 0"), ("exact\n-r 1", "cpu-bf16", "-r 1"), ("exact\n-r 2", "cpu-bf16", "-r 2"),
         ("APPROX_ACT=2\n-r 0", "cpu-act-bf16", "-r 0"), ("MS_NORM=1\n-r 0", "cpu-norm-bf16", "-r 0"),
         ("MS_NORM=1\n-r 1", "cpu-norm-bf16", "-r 1"), ("USE_APPROXBP=1", "cpu-approxbp-bf16", "-r 0")]
KINDS = {"param": "parameters", "optimizer": "optimizer", "saved": "activations kept for backward"}
PARTS = [*KINDS.values(), "logits", "gradients and the rest"]
RESULTS = os.path.join(ROOT, "dev/bench/results/cpu")

# ---- recipes.png: the panels' models, at the batch and length of published figures where there are some
BUILDS = {"exact": "cpu-bf16", "MS_NORM=1": "cpu-norm-bf16", "USE_APPROXBP=1": "cpu-approxbp-bf16"}
SAVINGS = ["-r 0", "-r 1", "-r 2", "-r 3", "-r 4", "-r 4 --offload 1"]
PANELS = {  # title: (program, model and shape, {recipe: options})
    "Llama-3.1-8B, 2 x 2048 tokens": ("train_llama", "-e llama3.1-8b -b 2 -t 2048",
                                      {"full, AdamW": "", "full, AdaLomo": "--optimizer adalomo -w 0", "LoRA": "--lora 8",
                                       "QLoRA": "--lora 8 --base nf4"}),
    "GPT-2 124M, 64 x 1024 tokens": ("train_gpt2", "-e d12 -b 64 -t 1024", {"full, AdamW": "", "full, AdamW in 8 bits": "--optimizer adamw8", "LoRA q,v": "--lora 8 --lora-targets q,v"}),
}
# torchtune's README: 8B, batch 2, packed to 2048, compile, checkpointing, in GiB. Checkpointing computes a
# block's matmuls a second time: 2 operations a weight and token, to the 6 of full training or the 4 of an adapter's.
PUBLISHED = {"Llama-3.1-8B, 2 x 2048 tokens": [("full, AdaLomo", 1 / 3, 18.9), ("LoRA", 1 / 2, 16.2), ("QLoRA", 1 / 2, 7.4)]}

# ---- longest.png. Published: docs.unsloth.ai, basics/unsloth-benchmarks: QLoRA r=32 on all matrices, batch 1; None: out of memory
SIZES = [8, 12, 16, 24, 40, 48, 80]
LONGEST = {
    "Llama-3.1-8B": ("llama3.1-8b", {"Hugging Face + FA2, published": [None, 932, 2551, 5789, 12264, 15502, 28454],
                                     "Unsloth, published": [2972, 21848, 40724, 78475, 153977, 191728, 342733]}),
    "Llama-3.1-70B": ("llama3.1-70b", {"Hugging Face + FA2, published": [None, None, None, None, None, None, 6916],
                                       "Unsloth, published": [None, None, None, None, None, 12106, 89389]}),
}
OURS = "train_llama -r 4 --offload 1, by --fit"

def program(variant, name):
    return os.path.join(ROOT, "build", variant, name)

def asked(command):
    """The JSON that a program prints."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout)

def parts(rows):
    """{part: bytes} of a ledger, the parts in order; on the device."""
    of = [(KINDS.get(row["kind"], PARTS[-1]) if row["name"] != "logits" else "logits", row["bytes"]) for row in rows if row["scope"] != "host"]
    return {name: sum(n for part, n in of if part == name) for name in PARTS}

def bars():
    """{mode: {part: bytes}}, and the options of all."""
    shape = "-e d12 -b 64 -t 1024".split()
    return {name: parts(ledger(program(variant, "train_gpt2"), [*shape, *options.split()])) for name, variant, options in MODES}, shape

def points(title):
    """{(recipe, build): [(share of matmuls computed again, bytes) of each of SAVINGS]}."""
    name, shape, recipes = PANELS[title]
    found = {}
    for recipe, more in recipes.items():
        for build, variant in BUILDS.items():
            if build == "USE_APPROXBP=1" and name == "train_llama":  # on SwiGLU codes add to what is kept
                continue
            ledgers = [asked([program(variant, name), "--estimate=json", *shape.split(), *more.split(), *saving.split()]) for saving in SAVINGS]
            found[recipe, build] = [(x["recompute_share"], x["total_bytes"]) for x in ledgers]
    return found

def longest(model):
    """Of each of SIZES the longest sequence, or None."""
    found = []
    for size in SIZES:
        table = asked([program("cpu-bf16", "train_llama"), f"--fit={size}G,json", "-e", model, "--lora", "32"])
        plan = next(row for row in table["recipes"] if (row["recipe"], row["options"]) == ("QLoRA", "--lora 32 --base nf4 -r 4 --offload 1"))
        found.append(plan["longest_sequence"] and plan["longest_sequence"]["seq_len"])
    return found

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

def draw_recipes(panels, path):
    """panels: {title: points(title)}."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.6), constrained_layout=True)
    marks = dict(zip(BUILDS, (("o", "-"), ("s", "--"), ("^", ":"))))
    for ax, (title, found) in zip(axes, panels.items()):
        recipes = dict(zip(PANELS[title][2], ("tab:blue", "tab:purple", "tab:orange", "tab:green")))
        for (recipe, build), of in found.items():
            marker, style = marks[build]
            ax.plot([100 * x for x, _ in of], [y / 2**30 for _, y in of], style, marker=marker, color=recipes[recipe], markersize=4, linewidth=1)
        for name, (x, y) in zip(SAVINGS, found.get(("QLoRA", "exact"), [])):  # along one line
            ax.annotate(name, (100 * x, y / 2**30), textcoords="offset points", xytext=(-6, -8) if "-r 3" <= name else (6, -2), fontsize=6,
                        ha="right" if "-r 3" <= name else "left", color="0.4")
        for color, name in zip(recipes.values(), recipes):
            ax.plot([], [], color=color, linewidth=3, label=name)
        for build in dict.fromkeys(build for _, build in found):
            ax.plot([], [], marks[build][1], marker=marks[build][0], color="0.4", markersize=4, linewidth=1, label=build)
        for recipe, share, size in PUBLISHED.get(title, []):
            ax.plot(100 * share, size, "*", color=recipes[recipe], markersize=11, markeredgecolor="black",
                    label="torchtune, published" if recipe == "QLoRA" else None)
        ax.set(title=title, xlabel="matmuls computed again, % of a step's", yscale="log")
        top = max(y for of in found.values() for _, y in of) / 2**30
        low = min(y for of in found.values() for _, y in of) / 2**30
        ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if low / 2 < t < 2 * top]
        ax.set_yticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(low / 1.4, top * 1.3)
        ax.grid(axis="y", linewidth=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7, loc="upper right")
    axes[0].set_ylabel("GiB on the device")
    save(plt, figure, path)

def draw_longest(panels, path):
    """panels: {title: {line: the longest sequence of each of SIZES}}."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.2), sharey=True, constrained_layout=True)
    for ax, (title, lines) in zip(axes, panels.items()):
        for (name, found), color in zip(lines.items(), ("0.5", "tab:orange", "tab:blue")):
            shown = [(size, n) for size, n in zip(SIZES, found) if n]
            ax.plot([size for size, _ in shown], [n for _, n in shown], "o-", color=color, label=name, markersize=4)
            for size, n in shown:
                if size == 80 or (name == OURS and size in (8, 24, 48)):
                    steep = size == 8
                    ax.annotate(f"{n:,}", (size, n), textcoords="offset points", xytext=(-6, -2) if steep else (-4 if size < 80 else 0, 6),
                                ha="right" if steep else "center", fontsize=7, color=color)
        ax.set(title=f"{title}, QLoRA r=32, batch 1", xlabel="GiB of the card (ours: less 0.75)", yscale="log", xlim=(-1, 88), ylim=(5e2, 6e6))
        ax.set_xticks(SIZES)
        ax.grid(axis="y", linewidth=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("longest sequence, tokens")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save(plt, figure, path)

def main():
    modes, shape = bars()
    draw(modes, f"Memory of a training step, --estimate {' '.join(shape)}, bf16", os.path.join(RESULTS, "memory.png"))
    draw_recipes({title: points(title) for title in PANELS}, os.path.join(RESULTS, "recipes.png"))
    charts = {title: {**others, OURS: longest(model)} for title, (model, others) in LONGEST.items()}
    draw_longest(charts, os.path.join(RESULTS, "longest.png"))
    for title, lines in charts.items():  # as text too
        print(f"longest sequence, {title}, QLoRA r=32, batch 1" + "".join(f"{f'{size} GiB':>12}" for size in SIZES))
        for name, found in lines.items():
            print(f"{name:46s}" + "".join(f"{n or '-':>12}" for n in found))

if __name__ == "__main__":
    main()
