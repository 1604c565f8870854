"""Does fine-tuning mind what backward forgets, and what does it save? Adapters of three kinds in each mode, the losses beside each other.

    python3 dev/bench/finetune.py gpt2 [--seeds 3] [--steps N] [--minutes N] [--write dev/bench/results/cpu]
    build/venv/bin/python dev/bench/finetune.py smollm2 [--task shakespeare|instructions] ...        # after make demo-llama

LoRA on q and v, LoRA on all matrices and LoRA-FA on all (A frozen), each exact, with APPROX_ACT=2, with MS_NORM=1 and with both, every
seed: a seed is the same adapters at the start and the same order of the same tokens. gpt2: a small GPT-2 that has first learnt
train_gpt2.cu, byte by byte, is tuned on two of Shakespeare's plays, also in full (exact) to compare with. smollm2: SmolLM2-135M on the
same plays, or on instructions.py's, where validation counts the answers that greedy decoding gets right.

Runs go one after the other, the most telling first: LoRA on all in each mode with every seed, then seed 1 of the others, and so on.
As in loss.py a complete one is not run again. --minutes begins no run that would not be done by then, and says what is left out; the
same command goes on with that. Leaves finetune_gpt2.json, .md, .png (finetune_smollm2_TASK...) in build/finetune, and in --write.
"""
import argparse
import contextlib
import os
import shlex
import shutil
import sys
import time

import common
import demo_llama
import loss
from loss import NAMES, stop

SETS = {"qv": "LoRA on q, v", "all": "LoRA on all", "fa": "LoRA-FA on all", "full": "full training"}
ORDER = ["all", "qv", "fa", "full"]
PLAYS = "dev/bench/fixtures/shakespeare.txt"
# what the command line leaves open: steps, sequences a step, their tokens, rank, rates of adapters and of full training
FIELDS = ("steps", "batch", "seq_len", "rank", "lr", "full_lr")
USUAL = {"gpt2": (120, 8, 64, 8, "1e-2", "1e-3"), "smollm2_shakespeare": (40, 1, 256, 16, "1e-3", "5e-5"),
         "smollm2_instructions": (40, 4, 64, 16, "1e-3", "1e-4")}

def options_of(which, a):
    """What makes a run one with these adapters."""
    return {"full": ["-l", a.full_lr], "qv": ["-l", a.lr, "--lora", str(a.rank), "--lora-targets", "q,v"], "all": ["-l", a.lr, "--lora", str(a.rank)],
            "fa": ["-l", a.lr, "--lora", str(a.rank), "--lora-freeze-a", "1"]}[which]

def plan(a):
    """(seed, adapters, mode) of every run, in their order. Full training is there to compare with: exact alone."""
    runs = [(seed, which, mode) for seed in range(1, a.seeds + 1) for which in ORDER if which in a.sets for mode in a.modes
            if which != "full" or mode == a.modes[0]]
    return sorted(runs, key=lambda run: run[1] != ORDER[0])

def gpt2_base(a, program):
    """A small GPT-2 that has learnt train_gpt2.cu, from before if it is still that; returns its directory."""
    base = f"{a.out}/gpt2/base"
    os.makedirs(base, exist_ok=True)
    data = loss.tokens([a.base_text or "train_gpt2.cu"], base)
    folder = f"{base}/run/step_{a.base_steps:08d}"
    command = [program, "-e", a.model, "-i", f"{base}/train.bin", "-j", f"{base}/val.bin", "-b", str(a.batch), "-t", str(a.seq_len),
               *f"-x {a.base_steps} -l 1e-3 -u {a.base_steps // 10} -c 0.1 -v {a.base_steps} -s 0 --seed 1 -o {base}/run --log {base}/run.jsonl".split()]
    if not os.path.exists(folder):  # somebody tidied up
        with contextlib.suppress(OSError):
            os.unlink(f"{base}/run.key")
    print(f"the base: {a.model} on {data['files'][0]}", flush=True)
    log, how = loss.run(f"{base}/run", command, {"command": command, "program": common.digest(os.path.abspath(program)), "data": data["sha256"]},
                        lambda: shutil.rmtree(f"{base}/run", ignore_errors=True) or True)
    val = [line["val_loss"] for line in log if "val_loss" in line]
    print(f"  validation loss {val[0]:.3f} {val[-1]:.3f}; {how}", flush=True)
    return folder, {"text": data, "steps": a.base_steps, "val_loss": val[-1], "command": shlex.join(command)}

def data_of(a, files):
    """The tokens to tune on, in OUT/NAME; returns what they are."""
    out = f"{a.out}/{a.name}"
    if a.size == "gpt2":
        return loss.tokens(files, out)
    if a.task == "instructions":
        demo_llama.instructions(a.model, out, a.seq_len, a.examples, a.answers)
        files = ["dev/bench/instructions.py"]
    else:
        common.script("prepro/text.py", *files, "--tokenizer", a.model, "--out", out, *common.rows_of(files, a.seq_len))
    count = {f"{part}_tokens": common.count_tokens(f"{out}/{part}.bin") for part in ("train", "val")}
    return {"files": [os.path.basename(f) for f in files], **count, "sha256": loss.digests(out)}

def seconds(name):
    """What a complete run took: its key is written before it, its log's last line at its end."""
    return os.path.getmtime(f"{name}.jsonl") - os.path.getmtime(f"{name}.key")

def run_all(a, programs, base, key, since):
    """Returns the runs, and what of the plan is left out for want of time."""
    out = f"{a.out}/{a.name}"
    common_options = ["-e", base, "-i", f"{out}/train.bin", "-j", f"{out}/val.bin", *loss.schedule(a)]
    todo, runs, left, took = plan(a), [], [], {}

    def fits():
        needed = max(took.get(which) or sum(took.values(), []) or [0])
        return not a.minutes or time.time() - since + needed <= 60 * a.minutes
    for i, (seed, which, mode) in enumerate(todo):
        print(f"run {i + 1}/{len(todo)}: {SETS[which]}, {NAMES[mode]}, seed {seed}", flush=True)
        name, options = f"{out}/{which}-{mode}-seed{seed}", [*common_options, *options_of(which, a)]
        found = loss.measure(name, programs[mode], mode, options, seed, key, fits)
        if found is None:
            print("  left out for want of time", flush=True)
            left.append([which, mode, seed])
            continue
        took.setdefault(which, []).append(seconds(name))
        rows = common.ledger(programs[mode], [*options, "-r", "2"])
        runs.append({"adapters": which, **found, "units_per_layer_r2": common.kept(rows)[1], "seconds": round(took[which][-1])})
    return runs, left

# ---- what came of it -------------------------------------------------------------------------------

def summary(runs):
    """{adapters: {mode: ...}}, each of them as loss.summary has it, with the share of answers right at first and at last."""
    found = {}
    for which in SETS:
        of = [r for r in runs if r["adapters"] == which]
        if not of:
            continue
        found[which] = loss.summary(of)
        for mode, x in found[which].items():
            mine = sorted((r for r in of if r["mode"] == mode), key=lambda r: r["seed"])
            x["seeds"], x["units_per_layer_r2"] = [r["seed"] for r in mine], mine[0]["units_per_layer_r2"]
            if "right" in mine[0]:
                x["right"] = [sum(r["right"][i][1] / r["right"][i][2] for r in mine) / len(mine) for i in (0, -1)]
    return found

def left_out(left):
    """The runs that are not there, seeds of a kind together."""
    kinds = {}
    for which, mode, seed in left:
        kinds.setdefault((which, mode), []).append(str(seed))
    return "; ".join(f"{SETS[which]}, {NAMES[mode]}, seed{'s' * (len(of) > 1)} {', '.join(of)}" for (which, mode), of in kinds.items())

def markdown(a, data, of, left, command):
    answers = any("right" in x for modes in of.values() for x in modes.values())
    head = ["", "", *(f"seed {s}" for s in range(1, a.seeds + 1)), "mean", "spread", "mean - exact's", *["right, at first", "at last"] * answers,
            "peak bytes", "units a layer", "at -r 2"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for which, modes in of.items():
        for mode, x in modes.items():
            final = dict(zip(x["seeds"], x["final"]))
            difference = "" if mode == "exact" or x["difference"] is None else f"{x['difference']:+.4f}"
            cells = [SETS[which], NAMES[mode], *(f"{final[s]:.4f}" if s in final else "" for s in range(1, a.seeds + 1)), f"{x['mean']:.4f}",
                     f"{x['spread']:.4f}" if len(final) > 1 else "", difference, *(f"{100 * share:.1f} %" for share in x.get("right", [])),
                     f"{x['peak_bytes']:,}", f"{x['units_per_layer']:.2f}", f"{x['units_per_layer_r2']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    what = data["files"][0] if len(data["files"]) == 1 else f"{len(data['files'])} files"
    lines += ["", f"Validation loss after {a.steps} steps of {a.batch} x {a.seq_len} tokens of {what} ({data['train_tokens']:,} to learn, "
              f"{data['val_tokens']:,} to be examined on): {a.what}. Rank {a.rank}, rate {a.lr}" + f", of full training {a.full_lr}" * ("full" in of) + ". "
              "Spread: largest less smallest over the seeds. Units: B\\*T\\*C elements that a layer keeps for its backward, statistics included, "
              "at -r 1, the default, and at -r 2, which computes norms again." + " Right: answers that greedy decoding gets right." * answers, ""]
    lines += [f"{SETS[which]}, {line}" for which, modes in of.items() for line in loss.verdict(modes)]
    lines += [""] + [f"Left out for want of time: {left_out(left)}", ""] * bool(left) + [f"`{command}`"]
    return "\n".join(lines) + "\n"

def plot(a, runs, path):
    """Of each kind of adapters and each mode: the final loss, a point a seed and a line at their mean; the answers right; what a layer keeps.
    False without Matplotlib."""
    plt = common.pyplot()
    if not plt:
        return False
    of = summary(runs)
    panels = [("validation loss at the end", "final"), *[("answers right, %", "right")] * any("right" in r for r in runs),
              ("kept by a layer, units of B*T*C", "units_per_layer")]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 4), constrained_layout=True)
    colors = {"exact": "black", "act": "tab:orange", "norm": "tab:blue", "both": "tab:green", "slope": "tab:red", "both-slope": "tab:purple"}
    for ax, (label, what) in zip(axes, panels):
        for i, (which, modes) in enumerate(of.items()):
            for j, mode in enumerate(mode for mode in a.modes if mode in modes):
                x, y = i + (j - (len(modes) - 1) / 2) * 0.2, modes[mode][what]
                if what == "final":
                    ax.plot([x] * len(y), y, "o", color=colors[mode], markersize=4, alpha=0.5)
                    ax.hlines(sum(y) / len(y), x - 0.08, x + 0.08, color=colors[mode])
                else:
                    ax.bar(x, 100 * y[-1] if what == "right" else y, 0.18, color=colors[mode])
        ax.set(xticks=range(len(of)), xticklabels=[SETS[which] for which in of], ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], color=colors[mode], marker="o", linestyle="", label=NAMES[mode]) for mode in a.modes]
    axes[0].legend(handles=handles, frameon=False)
    figure.suptitle(f"{a.what}, {a.seeds} seed{'s' * (a.seeds > 1)}", fontsize=10)
    common.save(plt, figure, path)
    return True

def main():
    parser = argparse.ArgumentParser(description="Fine-tuning in each mode: losses and memory beside each other.")
    parser.add_argument("size", choices=["gpt2", "smollm2"], metavar="gpt2|smollm2", help="a small GPT-2 of its own, or SmolLM2-135M")
    parser.add_argument("--task", choices=["shakespeare", "instructions"], default="shakespeare", help="smollm2: what to tune on (shakespeare)")
    parser.add_argument("--text", metavar="FILE", help=f"in place of {PLAYS}")
    parser.add_argument("--minutes", type=float, default=0, metavar="N", help="begins no run that would not be done by then (no limit)")
    parser.add_argument("--sets", metavar="A,B", help=f"of {','.join(SETS)} (all; smollm2: all but full)")
    parser.add_argument("--model", metavar="WHAT", help=f"gpt2: its size (gpt2:L4,H4,C128,T64,V257); smollm2: a directory ({demo_llama.MODEL})")
    parser.add_argument("--base-text", metavar="FILE", help="gpt2: what it has learnt before (train_gpt2.cu)")
    parser.add_argument("--base-steps", type=int, default=800, metavar="N", help="gpt2: steps in which it did (800)")
    parser.add_argument("--examples", type=int, default=600, metavar="N", help="instructions: how many to learn from (600)")
    parser.add_argument("--answers", type=int, default=demo_llama.TEST, metavar="N", help=f"instructions: how many to be examined on ({demo_llama.TEST})")
    for i, (field, option, what) in enumerate(zip(FIELDS, ("--steps", "-b", "-t", "--rank", "--lr", "--full-lr"),
                                                  ("", "sequences a step ", "tokens a sequence ", "of adapters ", "of adapters ", "of full training "))):
        kind, *others = (usual[i] for usual in USUAL.values())
        parser.add_argument(option, dest=field, type=type(kind), metavar="X" if "lr" in field else "N",
                            help=f"{what}({kind}; smollm2 {' or '.join(map(str, dict.fromkeys(others)))})")
    loss.common_arguments(parser, "build/finetune", validations=2, batches=20)
    a = parser.parse_args()
    a.name = a.size if a.size == "gpt2" else f"{a.size}_{a.task}"
    for field, usual in zip(FIELDS, USUAL[a.name]):
        if getattr(a, field) is None:
            setattr(a, field, usual)
    if a.size == "gpt2" and a.task != "shakespeare":
        parser.error(f"gpt2 --task {a.task}: expected smollm2, which has a chat template")
    a.sets = (a.sets or ",".join(SETS if a.size == "gpt2" else ["qv", "all", "fa"])).split(",")
    if not set(a.sets) <= set(SETS):
        parser.error(f"--sets {','.join(a.sets)}: expected some of {','.join(SETS)}")
    given = shlex.join(["python3" if a.size == "gpt2" else "build/venv/bin/python", "dev/bench/finetune.py", *sys.argv[1:]])
    directory = a.model if a.size == "smollm2" else None
    (text, base_text, directory), built = loss.settle(parser, a, a.text, a.base_text, directory)
    a.base_text, a.model = base_text, directory or a.model or (demo_llama.MODEL if a.size == "smollm2" else "gpt2:L4,H4,C128,T64,V257")

    since, program = time.time(), "train_gpt2" if a.size == "gpt2" else "train_llama"
    os.makedirs(f"{a.out}/{a.name}", exist_ok=True)
    programs = {mode: built.get(mode) or loss.build(mode, a.out, shlex.split(a.flags), program) for mode in a.modes}
    if a.size == "smollm2":
        demo_llama.get_model(a.model)
    data = data_of(a, [text or PLAYS])
    if a.size == "gpt2":
        model, base = gpt2_base(a, programs[a.modes[0]])
        a.what = f"{a.model} after {a.base_steps} steps on {base['text']['files'][0]}"
    else:
        model, base = a.model, {"model": os.path.basename(a.model)}
        a.what = "SmolLM2-135M-Instruct" if a.model == demo_llama.MODEL else os.path.basename(a.model)
    key = {"data": data["sha256"], "base": common.digest(os.path.abspath(f"{model}/model*.safetensors"))}
    runs, left = run_all(a, programs, model, key, since)
    if not runs:
        stop(f"--minutes {a.minutes:g}: no run was done; give it more")
    of = summary(runs)
    result = {"what": "fine-tuning, exact and approximate, the same tokens and seeds (dev/bench/finetune.py)", "command": given,
              "commit": common.commit(), "device": loss.device(f"{a.out}/{a.name}/{runs[0]['adapters']}-{runs[0]['mode']}-seed{runs[0]['seed']}.txt"),
              "make_flags": a.flags, "text": data, "base": base, "left_out": left,
              **{k: getattr(a, k) for k in ("model", "seeds", *FIELDS)}, "summary": of, "runs": runs}
    loss.leave(a, f"finetune_{a.name}", result, markdown(a, data, of, left, given), lambda path: plot(a, runs, path), since)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped; the same command goes on with the runs that are left")
