"""make demo-llama: SmolLM2-135M, a Llama that people have, taught by QLoRA to answer short instructions, before and after.

    build/venv/bin/python dev/bench/demo_llama.py PROGRAM [--gpu] [FILE...]

Its weights stay as they are, in 4 bits (--base nf4); adapters of rank 16 are trained on instructions.py's examples, of which only the
answers have a loss. With FILEs, or those that the environment's DEMO_TEXT names, it learns that text instead, in the same way. Leaves
everything in build/demo: smollm2/ is the model as it came (prepro/smollm2.py), llama/ the tokens, llama/run/step_... the adapters.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

from common import read_log, rows_of, script
from demo import check, find_texts, title, train

DIR = "build/demo/llama"
MODEL = "build/demo/smollm2"
KINDS = "sum,larger,join,capitals"  # of instructions.py's, those that a hundred examples of each teach
TEST = 64  # instructions to be examined on: 32 rows of 64 tokens
ADAPTERS = ["--base", "nf4", "--lora", "16"]

def get_model(folder=MODEL):
    """Makes the model's directory where it is not there."""
    if os.path.exists(f"{folder}/config.json"):
        print(f"{folder} is there already")
    else:
        script("prepro/smollm2.py", "--out", folder)

def instructions(model, out, T, train, test, show=0):
    """Writes out/train.bin and val.bin, so many questions and answers in the model's tokens, packed into rows of T."""
    script("dev/bench/instructions.py", "--out", f"{out}/examples", "--train", train, "--test", test, "--kinds", KINDS)
    for part, becomes, more in (("test", "val.bin", ["--show", show] * (show > 0)), ("train", "train.bin", [])):
        script("prepro/text.py", f"{out}/examples/{part}.jsonl", "--tokenizer", model, "-t", T, "--val-fraction", 0, "--out", f"{out}/{part}", *more)
        os.replace(f"{out}/{part}/train.bin", f"{out}/{becomes}")
    os.replace(f"{out}/train/tokenizer.bin", f"{out}/tokenizer.bin")

def ledger(program, options):
    """{what: bytes} of --estimate on the device, in a few lines, and the bytes of the host."""
    done = subprocess.run([program, *options, "--estimate=json"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    host, found = 0, {"weights that stay as they are": 0, "adapters": 0, "their gradients and AdamW's state": 0, "kept for backward": 0, "scratch": 0}
    for row in json.loads(done.stdout)["rows"]:
        kind = row["kind"]
        what = ("adapters" if row["name"].endswith(("_A", "_B")) else "weights that stay as they are") if kind == "param" else \
            "their gradients and AdamW's state" if kind in ("grad", "optimizer") else "kept for backward" if kind == "saved" else "scratch"
        size = 0 if "alias_of" in row else row["bytes"]
        if row["scope"] == "host":
            host += size
        else:
            found[what] += size
    return found, host

def say_ledger(program, shape):
    (of, host), (plain, _) = ledger(program, [*shape, *ADAPTERS]), ledger(program, [*shape])
    for what, size in of.items():
        print(f"  {what:36s} {size / 2**20:8.1f} MiB")
    print(f"  {'sum':36s} {sum(of.values()) / 2**20:8.1f} MiB; training all weights, in 16 bits, would take {sum(plain.values()) / 2**20:.1f}\n"
          f"  {'and on the host, pinned':36s} {host / 2**20:8.1f} MiB\n"
          f"Tensor by tensor: {program} {' '.join([*shape, *ADAPTERS])} --estimate")

def main():
    parser = argparse.ArgumentParser(description="The demo behind make demo-llama.")
    parser.add_argument("--gpu", action="store_true", help="the trainer runs on a GPU: take more rows a step")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="of training (48)")
    parser.add_argument("names", nargs="+", metavar="PROGRAM FILE")
    a = parser.parse_args()
    program, typed = a.names[0], os.environ.get("DEMO_TEXT", "")
    program = program if os.path.isabs(program) else os.path.join(".", program)
    files = a.names[1:] or (find_texts(typed) if typed.strip() else [])
    check(files)

    title("The model: SmolLM2-135M-Instruct, as Hugging Face has models")
    get_model()
    shutil.rmtree(DIR, ignore_errors=True)
    if files:
        title("The text, in the model's tokens")
        B, T, lr, sample, batches = 4 if a.gpu else 1, 256, "5e-4", ["-g", "48"], "4"
        script("prepro/text.py", *files, "--tokenizer", MODEL, "--out", DIR, *rows_of(files, T))
    else:
        title("Instructions, in the model's tokens: only answers are trained on")
        # Packing puts examples of one length, which are of one kind, into a row: of short rows a step has several kinds.
        B, T, lr, sample, batches = 16 if a.gpu else 4, 64, "2e-3", ["-g", "16", "--temperature", "0"], "100"
        instructions(MODEL, DIR, T, train=600, test=TEST, show=2)
    how = ["-e", MODEL, "-i", f"{DIR}/train.bin", "-j", f"{DIR}/val.bin", "-b", str(B), "-t", str(T), *sample]
    title("Where memory goes")
    say_ledger(program, ["-e", MODEL, "-b", str(B), "-t", str(T)])
    title("Before: what the model writes")
    train([program, *how, "-x", "0", "-m", "1"], every=1, since=b"----")
    title(f"Training adapters: {a.steps} steps of {B * T} tokens")
    steps = str(a.steps)
    seconds = train([program, *how, *ADAPTERS, "-x", steps, "-l", lr, "-u", str(min(4, a.steps)), "-v", steps, "-m", batches, "-s", steps, "-o", f"{DIR}/run",
                     "--log", f"{DIR}/log.jsonl"], every=4, since=b"val loss")

    title(f"Result: {steps} steps, with validation {seconds:.0f} seconds")
    log = read_log(f"{DIR}/log.jsonl")
    before, *_, after = (line for line in log if "val_loss" in line)
    print(f"validation loss {before['val_loss']:.3f} before, {after['val_loss']:.3f} after; "
          f"device memory {log[-1]['peak_bytes']:,} bytes at the peak, as announced")
    if "right" in after:
        print(f"of {after['answers']} answers {before['right']} right before, {after['right']} after")
    checkpoint = f"{DIR}/run/step_{a.steps:08d}"
    print(f"{checkpoint} is an adapter as PEFT has it:\n"
          f"  model = transformers.AutoModelForCausalLM.from_pretrained('{MODEL}')\n"
          f"  model = peft.PeftModel.from_pretrained(model, '{checkpoint}')\n"
          f"  {program} -e {MODEL} --adapter {checkpoint} --merge build/demo/merged      # base and adapter as one model")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
