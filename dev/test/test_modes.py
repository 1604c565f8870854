"""USE_APPROXBP=1 and its halves: what a layer keeps, that the ledger is the truth, and that forward is the exact one."""
import json
import re

import pytest

from helpers import close, learned

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


@pytest.mark.parametrize("r", [0, 1, 2])
@pytest.mark.parametrize("mode", ["act", "norm", "both"])   # exact: test_cli.py
def test_the_ledger_is_what_is_taken(lab, mode, r):
    ran = lab.train("-r", r, "-d", 128, variant=MODES[mode], env={"SIMT_REPORT": 1})
    backend = int(re.search(r"simt: peak (\d+) bytes", ran.err)[1])
    assert backend == ran.done["peak_bytes"] == ran.done["estimate_bytes"]


def test_the_ledger_names_the_mode(lab):
    for mode, words in {"exact": "exact GELU, separate norms", "act": "GELU in 2 bits, separate norms",
                        "norm": "exact GELU, one tensor for a norm and its matmul", "both": "nothing is left to compute again"}.items():
        assert words in lab.run("--estimate", "-e", "d12", "-r", 1, variant=MODES[mode]).out


def test_forward_is_exact(shared_lab):
    """The codes change backward alone; folding a norm's affine rounds elsewhere."""
    first = {mode: shared_lab.train("-x", 1, variant=variant).losses[0] for mode, variant in MODES.items()}
    assert all(close(loss, first["exact"], 2e-3) for loss in first.values())


def test_any_order_gives_the_same_bits(lab):
    runs = []
    for order, seed in (("forward", 0), ("reverse", 0), ("priority", 1), ("priority", 2)):
        log = learned(lab.train("-d", 128, "-x", 3, "-o", f"{order}{seed}", variant=MODES["both"], env={"SIMT_ORDER": order, "SIMT_SEED": seed}))
        runs.append((log, lab.files(f"{order}{seed}")))
    assert all(run == runs[0] for run in runs)


def test_no_epilogue_makes_codes(lab):
    done = lab.run("--estimate", "-e", "d12", "-ge", 1, variant="cpu-act-bf16", status=2)
    assert "-ge 1" in done.err and "APPROX_ACT=0" in done.err


def test_a_checkpoint_goes_from_mode_to_mode(lab):
    """Parameters mean the same in every mode: gamma and beta are not merged into the weights."""
    lab.train("-x", 3, "-o", "out", variant=MODES["both"])
    how = ["-e", "out/model_00000003.bin", "-x", 0, "-v", 1]
    vals = [lab.train(*how, variant=variant).vals[-1] for variant in MODES.values()]
    assert all(close(v, vals[0], 2e-3) for v in vals)
