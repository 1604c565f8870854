"""make demo: text to tokens, tokens to a small trained GPT-2, and what came of it.

    python3 dev/bench/demo.py ./train_gpt2 [--gpu] FILE...

Leaves everything in build/demo; exact.jsonl is the log of the run.
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
    return "gpt2:L4,H4,C128,T64,V257", B, T, 400, "2e-3"


def train(command):
    """Runs the trainer and passes on what it prints, but of its steps only some."""
    title("Training")
    print(" ".join(map(shlex.quote, command)) + "\n", flush=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    for line in process.stdout:
        step = re.match(rb"step +(\d+)/(\d+)", line)
        if not step or int(step[1]) in (1, int(step[2])) or int(step[1]) % SHOW == 0:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    if process.wait() != 0:
        sys.exit(process.returncode if process.returncode > 0 else 1)


def main():
    parser = argparse.ArgumentParser(description="The demo behind make demo.")
    parser.add_argument("trainer")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--gpu", action="store_true", help="the trainer runs on a GPU: take a larger model")
    a = parser.parse_args()
    program = os.path.join(".", a.trainer) if not os.path.isabs(a.trainer) else a.trainer

    os.makedirs(DIR, exist_ok=True)
    shutil.rmtree(f"{DIR}/checkpoint", ignore_errors=True)
    try:
        model, B, T, steps, lr = sizes(a.gpu, min(tokens(a.files)))
    except binfmt.Error as e:
        sys.exit(f"demo: {e}")
    data = ["-i", f"{DIR}/train.bin", "-j", f"{DIR}/val.bin"]
    begin = time.time()
    train([program, "-e", model, *data, "-b", str(B), "-t", str(T), "-x", str(steps), "-l", lr, "-u", "30", "-q", "0.05", "-c", "0.1",
           "-v", "100", "-s", "200", "-g", "200", "-o", f"{DIR}/checkpoint", "--log", f"{DIR}/exact.jsonl"])
    seconds = time.time() - begin

    with open(f"{DIR}/exact.jsonl") as f:
        val = [line["val_loss"] for line in map(json.loads, f) if "val_loss" in line]
    title("Result")
    rows = [
        (f"{DIR}/exact.jsonl", "loss, gradient norm, rate and time of each step"),
        (f"{DIR}/checkpoint/", "the model, and what a run needs to go on"),
        (f"{DIR}/*.bin", "tokens and tokenizer"),
        ("make demo TEXT=my.txt", "learns another text"),
        (f"{program} --help", "all options"),
        (f"{program} --estimate -e d12 -b 8", "what GPT-2 124M would take, tensor by tensor"),
        ("make test", "tests everything"),
    ]
    more = [program, *data, "-b", str(B), "-t", str(T), "-x", str(4 * steps), "-l", lr, "-q", "0.05", "-c", "0.1", "-o", f"{DIR}/checkpoint", "-y", "1"]
    print(f"Validation loss: {val[0]:.3f} at first, {val[-1]:.3f} at last ({100 * val[-1] / val[0]:.0f} %), "
          f"after {steps} steps in {seconds:.0f} seconds.\n")
    print("What is where, and what to try next:")
    for left, right in rows:
        print(f"  {left:38s} {right}")
    print(f"To go on with this run to step {4 * steps}:\n  {' '.join(more)}")


if __name__ == "__main__":
    main()
