"""USE_APPROXBP=1 and its halves: what a layer keeps, that the ledger is the truth, and that forward is the exact one."""
import json

import pytest

from helpers import Shape, allocated_peak, close, names, random_model, read_model, write_model

MODES = {"exact": "cpu-bf16", "act": "cpu-act-bf16", "norm": "cpu-norm-bf16", "both": "cpu-approxbp-bf16"}

def estimate(lab, mode, *given):
    return json.loads(lab.run("--estimate=json", *given, variant=MODES[mode]).out)

@pytest.mark.parametrize("mode, r, units", [("exact", 0, 16), ("exact", 1, 12), ("exact", 2, 10), ("act", 0, 12.5), ("act", 1, 12.5), ("act", 2, 10.5),
                                            ("norm", 0, 14), ("norm", 1, 10), ("norm", 2, 10), ("both", 0, 10.5), ("both", 1, 10.5), ("both", 2, 10.5)])
def test_units(lab, mode, r, units):
    kept = sum(row["bytes"] for row in estimate(lab, mode, "-e", "d12", "-b", 64, "-t", 1024, "-r", r)["rows"]
               if row["kind"] == "saved" and row["scope"] == "layer")
    assert close(kept / (12 * 64 * 1024 * 768 * 2), units, 0.015)

def test_the_flag_saves_what_it_says(lab):
    """Of a plan whose logits are small: what the flag does not touch, a larger chunk of them, would hide what it saves."""
    exact, both = (estimate(lab, mode, "-e", "d12", "-b", 64, "-t", 1024, "-r", 0, "--loss-chunks", 32)["total_bytes"] for mode in ("exact", "both"))
    assert both <= 0.71 * exact

@pytest.mark.parametrize("like, mode", [("exact", "norm"), ("both", "act")])
def test_modes_with_one_derivative_compute_the_same(lab, like, mode):
    """But for rounding: the losses, and of every tensor the signs of its gradient, which are the directions of AdamW's first step. In
    either mode all levels of --recompute give the same bits, and the ledger is what is taken."""
    shape, moves, losses = Shape(), {}, {}
    start = random_model(shape, std=0.1)
    write_model(lab.path("start.bin"), shape, start)
    for way in (like, mode):
        for r in (0, 1, 2):
            ran = lab.train("-e", "start.bin", "-r", r, "-d", 128, "-l", 1e-2, "-x", 3, "-n", 1, "-o", f"{way}{r}", variant=MODES[way], env={"SIMT_REPORT": 1})
            assert allocated_peak(ran) == ran.done["peak_bytes"] == ran.done["estimate_bytes"]
            assert lab.files(f"{way}{r}")[names(3)[0]] == lab.files(f"{way}0")[names(3)[0]]
        losses[way] = ran.losses
        after = read_model(lab.path(f"{way}0/step_00000001"), shape)
        moves[way] = {name: [(x > a) - (x < a) for x, a in zip(after[name], start[name])] for name in start}
    assert close(losses[mode], losses[like], 2e-2)
    for name, signs in moves[like].items():   # a third of qkvb, the keys' bias, has a gradient of rounding alone
        there = [(a, b) for a, b in zip(signs, moves[mode][name]) if a]
        assert sum(a == b for a, b in there) > (0.75 if name == "qkvb" else 0.9) * len(there) > 0, name

def test_the_ledger_names_the_mode(lab):
    for mode, words in {"exact": "exact GELU, separate norms", "act": "GELU in 2 bits, separate norms",
                        "norm": "exact GELU, one tensor for a norm and its matmul", "both": "nothing is left to compute again"}.items():
        assert words in lab.run("--estimate", "-e", "d12", "-r", 1, variant=MODES[mode]).out

def test_no_epilogue_makes_codes(lab):
    done = lab.run("--estimate", "-e", "d12", "-ge", 1, variant="cpu-act-bf16", status=2)
    assert "-ge 1" in done.err and "APPROX_ACT=0" in done.err

def test_a_checkpoint_goes_from_mode_to_mode(lab):
    """Parameters mean the same in every mode: gamma and beta are not merged into the weights. Forward is the exact one in each."""
    lab.train("-x", 3, "-o", "out", variant=MODES["both"])
    how = ["-e", "out/step_00000003", "-x", 0, "-v", 1]
    vals = [lab.train(*how, variant=variant).vals[-1] for variant in MODES.values()]
    assert all(close(v, vals[0], 2e-3) for v in vals)
