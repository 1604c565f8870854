"""make demo-llama: SmolLM2-135M, a Llama that people have, fine-tuned on a text, and its directory before and after.

    build/venv/bin/python dev/bench/demo_llama.py PROGRAM [--gpu] [FILE...]

Without FILEs the model learns what the environment's DEMO_TEXT names, and without that two of Shakespeare's plays. Leaves everything in
build/demo: smollm2/ is the model as it came (prepro/smollm2.py), llama/ its tokens, llama/run/step_... what came of it.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

from common import ROOT, read_log
from demo import check, find_texts, title, train

DIR = "build/demo/llama"
MODEL = "build/demo/smollm2"

def run_script(*command):
    status = subprocess.run([sys.executable, "-B", os.path.join(ROOT, "prepro", command[0]), *command[1:]]).returncode
    if status != 0:
        sys.exit(status if status > 0 else 1)

def main():
    parser = argparse.ArgumentParser(description="The demo behind make demo-llama.")
    parser.add_argument("--gpu", action="store_true", help="the trainer runs on a GPU: take more steps")
    parser.add_argument("names", nargs="+", metavar="PROGRAM FILE")
    a = parser.parse_args()
    program, files = a.names[0], a.names[1:] or find_texts(os.environ.get("DEMO_TEXT", ""))
    program = program if os.path.isabs(program) else os.path.join(".", program)
    check(files)

    title("The model: SmolLM2-135M-Instruct, as Hugging Face has models")
    if os.path.exists(f"{MODEL}/config.json"):
        print(f"{MODEL} is there already")
    else:
        run_script("smollm2.py", "--out", MODEL)
    title("The text, in the model's tokens")
    shutil.rmtree(f"{DIR}/run", ignore_errors=True)
    run_script("text.py", *files, "--tokenizer", MODEL, "--out", DIR)

    B, T, steps, batches = (8, 512, 100, 10) if a.gpu else (1, 256, 16, 4)
    data = ["-i", f"{DIR}/train.bin", "-j", f"{DIR}/val.bin", "-b", str(B), "-t", str(T), "-m", str(batches), "-g", "48"]
    title("Before: the loss on the end of the text, and what the model writes")
    train([program, "-e", MODEL, *data, "-x", "0", "--log", f"{DIR}/before.jsonl"], every=1, since=b"val loss")
    before = read_log(f"{DIR}/before.jsonl")[0]["val_loss"]
    title(f"Training: {steps} steps of {B * T} tokens")
    seconds = train([program, "-e", MODEL, *data, "-x", str(steps), "-l", "5e-5", "-u", "2", "-v", str(steps), "-s", str(steps),
                     "-o", f"{DIR}/run", "--log", f"{DIR}/log.jsonl"], every=4)
    log = read_log(f"{DIR}/log.jsonl")
    after = [line["val_loss"] for line in log if "val_loss" in line][-1]

    title(f"Result: {steps} steps in {seconds:.0f} seconds")
    print(f"validation loss {before:.3f} before, {after:.3f} after; device memory {log[-1]['peak_bytes']:,} bytes at the peak, as announced")
    checkpoint = f"{DIR}/run/step_{steps:08d}"
    with open(f"{checkpoint}/config.json") as f:
        architecture = json.load(f)["architectures"][0]
    print(f"{checkpoint} is a model's directory again ({architecture}):\n"
          f"  transformers.AutoModelForCausalLM.from_pretrained('{checkpoint}')\n"
          f"  {program} -e {checkpoint} -i TOKENS -o ANOTHER")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
