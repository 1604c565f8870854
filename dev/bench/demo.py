"""make demo: text to tokens, tokens to a small GPT-2 trained twice, exactly and with USE_APPROXBP=1, and the two side by side.

    python3 dev/bench/demo.py ./train_gpt2 build/demo/approxbp/train_gpt2 [--gpu] FILE...

Leaves everything in build/demo; exact.jsonl and approxbp.jsonl are the logs of the runs.
"""
import argparse
import contextlib
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

DIR = "build/demo"
SHOW = 25  # of the trainer's lines, one a step, those of every 25th


def title(words):
    print(f"\n==== {words}\n", flush=True)


def tokens(files):
    """Writes the token files; returns how many tokens train and val have."""
    title("Text")
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        text.prepare(files, out=DIR)
    train, val = (len(binfmt.read_tokens(f"{DIR}/{name}.bin")) for name in ("train", "val"))
    what = files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"
    print(f"{what}: {train + val} bytes, each of them a token.\nThe model learns {train} and is examined on the other {val}.")
    return train, val


def sizes(gpu, shortest):
    """Model, batch (one that the shortest of the files can fill), steps and learning rate: a minute or two on two CPU cores."""
    if gpu and shortest > 32 * 256:
        return "gpt2:L6,H6,C384,T256,V257", 32, 256, 400, "1e-3"
    B, T = text.batch_that_fits(shortest)
    return "gpt2:L4,H4,C128,T64,V257", B, T, 300, "2e-3"


def train(command, words):
    """Runs the trainer and passes on what it prints, but of its steps only some."""
    title(words)
    print(" ".join(map(shlex.quote, command)) + "\n", flush=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    for line in process.stdout:
        step = re.match(rb"step +(\d+)/(\d+)", line)
        if not step or int(step[1]) in (1, int(step[2])) or int(step[1]) % SHOW == 0:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    if process.wait() != 0:
        sys.exit(process.returncode if process.returncode > 0 else 1)


def units(estimate):
    """What a layer keeps for backward, in units of B*T*C elements: from the rows that --estimate=json prints."""
    rows = estimate["rows"]
    L, *_, C = next(r["shape"] for r in rows if r["name"] == "qkvw")
    _, B, T, _ = next(r["shape"] for r in rows if r["name"] == "qkv")
    element = 2 if next(r["dtype"] for r in rows if r["name"] == "qkv") == "bf16" else 4
    return sum(r["bytes"] for r in rows if r["kind"] == "saved" and r["scope"] == "layer") / (L * B * T * C * element)


def table(columns):
    """columns: name -> (log lines, what a layer keeps). Returns the lines of the closing table."""
    rows = [("", list(columns))]
    val = {name: [line["val_loss"] for line in log if "val_loss" in line] for name, (log, _) in columns.items()}
    rows.append(("validation loss at first", [f"{v[0]:.3f}" for v in val.values()]))
    rows.append(("validation loss at last", [f"{v[-1]:.3f}" for v in val.values()]))
    rows.append(("device memory, peak bytes", [str(log[-1]["peak_bytes"]) for log, _ in columns.values()]))
    rows.append(("kept per layer, units of B*T*C", [f"{u:.2f}" for _, u in columns.values()]))
    return [f"{left:32s}" + "".join(f"{cell:>18s}" for cell in cells) for left, cells in rows]


def main():
    parser = argparse.ArgumentParser(description="The demo behind make demo.")
    parser.add_argument("exact", help="the trainer")
    parser.add_argument("approxbp", help="the trainer built with USE_APPROXBP=1")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--gpu", action="store_true", help="the trainers run on a GPU: take a larger model")
    a = parser.parse_args()
    a.exact, a.approxbp = (p if os.path.isabs(p) else os.path.join(".", p) for p in (a.exact, a.approxbp))

    os.makedirs(DIR, exist_ok=True)
    try:
        model, B, T, steps, lr = sizes(a.gpu, min(tokens(a.files)))
    except binfmt.Error as e:
        sys.exit(f"demo: {e}")
    data = ["-i", f"{DIR}/train.bin", "-j", f"{DIR}/val.bin"]
    columns = {}
    begin = time.time()
    for name, program in (("exact", a.exact), ("approxbp", a.approxbp)):
        checkpoint = f"{DIR}/checkpoint-{name}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        command = [program, "-e", model, *data, "-b", str(B), "-t", str(T), "-x", str(steps), "-l", lr, "-u", "30", "-q", "0.05", "-c", "0.1",
                   "-v", "100", "-s", "150", "-g", "200", "-o", checkpoint, "--log", f"{DIR}/{name}.jsonl"]
        train(command, "Training, exact" if name == "exact" else "Training, USE_APPROXBP=1")
        estimate = subprocess.run([program, "-e", model, "-b", str(B), "-t", str(T), "--estimate=json"], check=True, capture_output=True)
        with open(f"{DIR}/{name}.jsonl") as f:
            columns["exact" if name == "exact" else "USE_APPROXBP=1"] = [json.loads(line) for line in f], units(json.loads(estimate.stdout))
    seconds = time.time() - begin

    title("Result")
    print("\n".join(table(columns)))
    print(f"\n{steps} steps each, {seconds:.0f} seconds in all. A larger model is activations for the most part:\n"
          f"  {a.exact} --estimate -e d12 -b 64      GPT-2 124M, tensor by tensor\n")
    rows = [
        (f"{DIR}/exact.jsonl, approxbp.jsonl", "loss, gradient norm, rate and time of each step"),
        (f"{DIR}/checkpoint-exact/, -approxbp/", "the models, and what a run needs to go on"),
        (f"{DIR}/*.bin", "tokens and tokenizer"),
        ("make demo TEXT=my.txt", "learns another text"),
        (f"{a.exact} --help", "all options"),
        ("make test", "tests everything"),
    ]
    print("What is where, and what to try next:")
    for left, right in rows:
        print(f"  {left:42s} {right}")
    more = [a.exact, *data, "-b", str(B), "-t", str(T), "-x", str(4 * steps), "-l", lr, "-q", "0.05", "-c", "0.1", "-o", f"{DIR}/checkpoint-exact", "-y", "1"]
    print(f"To go on with the exact run to step {4 * steps}:\n  {' '.join(more)}")


if __name__ == "__main__":
    main()
