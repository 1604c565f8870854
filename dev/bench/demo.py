"""make demo: text to tokens, tokens to a small GPT-2, trained twice, and what came of it.

    python3 dev/bench/demo.py EXACT_PROGRAM APPROXBP_PROGRAM [--gpu] [FILE...]
    python3 dev/bench/demo.py --check [FILE...]       # only: are there such files?

The second program is a build with USE_APPROXBP=1; both learn the same tokens from the same weights. Without FILEs they learn
what the environment's DEMO_TEXT names (make demo TEXT=...), and without that two of Shakespeare's plays,
dev/bench/fixtures/shakespeare.txt. Leaves everything in build/demo; exact.jsonl and approxbp.jsonl are the logs of the runs.
"""
import argparse
import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

from common import ROOT, kept, ledger, prepare, read_log

DIR = "build/demo"
ALL = rb""
SHORT = rb"val loss|step +\d+/|kept for backward|device memory|stop"  # the lines that a second training is worth

def title(words):
    print(f"\n==== {words}\n", flush=True)

def find_texts(typed):
    """The files that TEXT names: one whose name it is, spaces and all, or several, with a shell's patterns and quotes."""
    if os.path.exists(typed):
        return [typed]
    try:
        words = typed.split() if all(map(os.path.exists, typed.split())) else shlex.split(typed)
    except ValueError as e:  # a quote that is not closed
        sys.exit(f"demo: TEXT={typed}: expected names of files, found {e}".replace("No closing", "no closing"))
    found = [[word] if os.path.exists(word) else sorted(glob.glob(os.path.expanduser(word))) or [word] for word in words]
    return sum(found, []) or [os.path.relpath(os.path.join(ROOT, "dev/bench/fixtures/shakespeare.txt"))]

def check(files):
    """Ends with the first that cannot be read, before anything is built."""
    for path in files:
        wrong = "is a folder" if os.path.isdir(path) else "" if os.path.exists(path) else "no such file"
        if wrong or not os.access(path, os.R_OK):
            sys.exit(f"demo: {path}: {wrong or 'cannot be read'}; expected a text, as in: make demo TEXT=my.txt, or "
                     "TEXT=\"'my text.txt' b.txt\"")

def tokens(files):
    """Writes the token files; returns how many tokens train and val have."""
    title("Text")
    train, val = prepare(files, DIR)
    what = files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"
    print(f"{what}: {train + val} bytes, each of them a token.\nThe model learns {train} and is examined on the other {val}.")
    return train, val

def sizes(gpu, shortest):
    """Model, batch (one that the shortest of the files can fill), steps and learning rate: a minute or so on two CPU cores."""
    if gpu and shortest > 32 * 256:
        return "gpt2:L6,H6,C384,T256,V257", 32, 256, 400, "1e-3"
    import text
    B, T = text.batch_that_fits(shortest)
    return "gpt2:L4,H4,C128,T64,V257", B, T, 300, "2e-3"

def train(command, every, lines=ALL, since=b""):
    """Runs the trainer and passes on the lines that begin so, from the first that begins with `since` on, but of its steps only some;
    a terminal shows the others for a moment. Returns the seconds it took. Ctrl-C goes to the trainer too, which ends with its step; a
    second one ends it at once."""
    print(" ".join(map(shlex.quote, command)) + "\n", flush=True)
    begin, out, terminal = time.time(), sys.stdout.buffer, sys.stdout.isatty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    caught, begun = [], not since

    def stop(number, _):
        if caught:
            return process.kill()
        caught.append(number)
        process.send_signal(signal.SIGINT)
        # not by print: the signal may have come within another one
        os.write(1, b"\nInterrupted: the trainer stops with its step; once more, and it stops at once.\n")
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for line in process.stdout:
        step = re.match(rb"step +(\d+)/(\d+)", line)
        begun = begun or line.startswith(since)
        shown = begun and re.match(lines, line) and (not step or int(step[1]) in (1, int(step[2])) or int(step[1]) % every == 0)
        if shown or terminal and step:
            out.write((b"\r\x1b[K" if terminal else b"") + (line if shown else line.rstrip(b"\n")))
            out.flush()
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if caught:
        sys.exit(128 + caught[0])
    if status != 0:
        sys.exit(status if status > 0 else 1)
    return time.time() - begin

def go_on(command, more):
    """The command that takes a run on to more steps: the same, but for how many, and that it resumes."""
    at = command.index("-x")
    return [*command[:at], "-x", str(more), *command[at + 2:], "-y", "1"]

def result_table(exact, approxbp):
    """Lines that set two runs beside each other; a run is (the lines of its log, what it keeps)."""
    def column(log, saved):
        val = [line["val_loss"] for line in log if "val_loss" in line]
        return [f"{val[0]:.3f}", f"{val[-1]:.3f}", f"{100 * val[-1] / val[0]:.0f} %", f"{log[-1]['peak_bytes']:,}",
                f"{saved[0]:,}", f"{saved[1]:.2f}"]
    rows = ["validation loss at first", "validation loss at last", "  of the first", "device memory, peak bytes",
            "  of them kept for backward", "kept per layer, units of B*T*C"]
    columns = [["exact", *column(*exact)], ["USE_APPROXBP=1", *column(*approxbp)]]
    return [f"{row:30s} {left:>16s} {right:>16s}" for row, left, right in zip(["", *rows], *columns)]

def main():
    parser = argparse.ArgumentParser(description="The demo behind make demo.")
    parser.add_argument("--check", action="store_true", help="only look whether the files are there")
    parser.add_argument("--gpu", action="store_true", help="the trainers run on a GPU: take a larger model")
    parser.add_argument("names", nargs="*", metavar="EXACT_PROGRAM APPROXBP_PROGRAM FILE",
                        help="the second program is one with USE_APPROXBP=1")
    a = parser.parse_args()
    programs, files = ([], a.names) if a.check else (a.names[:2], a.names[2:])
    files = files or find_texts(os.environ.get("DEMO_TEXT", ""))
    check(files)
    if a.check:
        return
    if len(programs) < 2:
        parser.error("expected EXACT_PROGRAM and APPROXBP_PROGRAM")
    exact, approxbp = (program if os.path.isabs(program) else os.path.join(".", program) for program in programs)

    os.makedirs(DIR, exist_ok=True)
    shutil.rmtree(f"{DIR}/checkpoint", ignore_errors=True)
    model, B, T, steps, lr = sizes(a.gpu, min(tokens(files)))
    shape = ["-e", model, "-b", str(B), "-t", str(T)]
    how = [*shape, "-i", f"{DIR}/train.bin", "-j", f"{DIR}/val.bin", "-x", str(steps), "-l", lr, *"-u 30 -q 0.05 -c 0.1 -v 100".split()]
    first = [exact, *how, "-s", "150", "-g", "200", "-o", f"{DIR}/checkpoint", "--log", f"{DIR}/exact.jsonl"]

    title("Training")
    seconds = train(first, every=25)
    title("Training again, with USE_APPROXBP=1: backward has 2 bits per activation, and one tensor for a norm and its matmul")
    seconds_approxbp = train([approxbp, *how, "-s", "0", "--log", f"{DIR}/approxbp.jsonl"], every=100, lines=SHORT)

    title("What is where, and what to try next")
    for left, right in ((f"{DIR}/exact.jsonl, approxbp.jsonl", "loss, gradient norm, rate and time of each step"),
                        (f"{DIR}/checkpoint/", "a model for transformers, and the run's state"), (f"{DIR}/*.bin", "tokens and tokenizer"),
                        ("make demo TEXT=my.txt", "learns another text"),
                        ("make train_gpt2 USE_APPROXBP=1", "builds the second of the two as ./train_gpt2"),
                        (f"{exact} --help", "all options"),
                        (f"{exact} --estimate -e d12 -b 8", "what GPT-2 124M would take, tensor by tensor"),
                        ("make test", "tests everything")):
        print(f"  {left:40s} {right}")
    print(f"To go on with the first run to step {4 * steps}:\n  {' '.join(go_on(first, 4 * steps))}")

    title(f"Result: {steps} steps each, {seconds:.0f} and {seconds_approxbp:.0f} seconds")
    print(f"The exact run computes GELU a second time in backward (--recompute 1, the default), the other has no need to;\n"
          f"with --recompute 0 the exact one keeps {kept(ledger(exact, [*shape, '-r', '0']))[1]:.2f} units a layer.\n")
    print("\n".join(result_table(*((read_log(f"{DIR}/{name}.jsonl"), kept(ledger(program, shape)))
                                  for name, program in (("exact", exact), ("approxbp", approxbp))))))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
