"""What do AdamW in 8 bits and AdaLomo do to the loss? The same model, tokens and seeds with each optimizer.

    python3 dev/bench/optimizers.py [--text FILE...] [--seeds 3] [--steps 300] [--write dev/bench/results/cpu]

As loss.py, which has the rest of it: one program, train_gpt2 as it ships, in build/optimizers, and the demo's text, model and schedule.
Each optimizer has the rate that suits it (--rates). AdaLomo's is a share of a matrix's own size, so it is another number.

Leaves optimizers.json and optimizers.md in build/optimizers, and in --write.
"""
import argparse
import shlex
import time

import common
import loss

RATES = {"adamw": "2e-3", "adamw8": "2e-3", "adalomo": "4e-2"}
TEXT = "dev/bench/fixtures/shakespeare.txt"

def markdown(a, data, of):
    lines = ["| `--optimizer` | `--lr` | " + " | ".join(f"seed {s}" for s in range(1, a.seeds + 1)) + " | mean | spread | peak bytes |",
             "|---|---:|" + "---:|" * (a.seeds + 3)]
    for name, x in of.items():
        cells = [f"`{name}`", a.rates[name], *(f"{final:.4f}" for final in x["final"]), f"{x['mean']:.4f}", f"{x['spread']:.4f}", f"{x['peak_bytes']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Validation loss after {a.steps} steps of {a.batch} x {a.seq_len} bytes of {data['files'][0]} ({a.model}). Spread: largest "
                      "less smallest over the seeds."]) + "\n"

def main():
    parser = argparse.ArgumentParser(description="Losses of the optimizers beside each other.")
    parser.add_argument("--text", nargs="+", metavar="FILE", help=f"what to learn ({TEXT})")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="(300)")
    parser.add_argument("--model", default="gpt2:L4,H4,C128,T64,V257", metavar="SIZE", help="(gpt2:L4,H4,C128,T64,V257)")
    parser.add_argument("-b", dest="batch", type=int, default=16, metavar="B", help="sequences a step (16)")
    parser.add_argument("-t", dest="seq_len", type=int, default=64, metavar="T", help="tokens a sequence (64)")
    parser.add_argument("--rates", default=",".join(RATES.values()), metavar="A,B,C", help=f"of {', '.join(RATES)} ({','.join(RATES.values())})")
    loss.NAMES = {name: f"--optimizer {name}" for name in RATES}   # what a mode is here
    loss.common_arguments(parser, "build/optimizers")
    a = parser.parse_args()
    rates = a.rates.split(",")
    if len(rates) != len(RATES):
        parser.error(f"--rates {a.rates}: expected {len(RATES)} numbers")
    a.rates = dict(zip(RATES, rates))
    files, built = loss.settle(parser, a, *(a.text or []))

    begin = time.time()
    data = loss.tokens(files or [TEXT], a.out)
    program = next(iter(built.values()), None) or loss.build("exact", a.out, shlex.split(a.flags))
    runs = []
    for seed in range(1, a.seeds + 1):
        for name in a.modes:
            print(f"{name}, seed {seed}", flush=True)
            options = ["-e", a.model, "-i", f"{a.out}/train.bin", "-j", f"{a.out}/val.bin", "-l", a.rates[name], "-c", "0.1", "--optimizer", name, *loss.schedule(a)]
            runs.append(loss.measure(f"{a.out}/{name}-seed{seed}", program, name, options, seed, {"data": data["sha256"]}))
    of = loss.summary(runs)
    result = {"what": "validation loss with each optimizer, the same tokens and seeds (dev/bench/optimizers.py)", "commit": common.commit(),
              "device": loss.device(f"{a.out}/{a.modes[0]}-seed1.txt"), "make_flags": a.flags, "text": data, "rates": a.rates,
              **{k: getattr(a, k) for k in ("model", "batch", "seq_len", "steps", "seeds")}, "summary": of, "runs": runs}
    loss.leave(a, "optimizers", result, markdown(a, data, of), lambda path: False, begin)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        loss.stop("stopped; the same command goes on with the runs that are left")
