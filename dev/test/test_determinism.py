"""Two runs with one seed are equal to the bit: on any number of threads, in any order of a block's threads."""
import shutil

import pytest

from helpers import Lab, learned

WORK = ["-x", 4, "-n", 2, "-v", 2, "-s", 2, "-d", 128, "-o", "out", "-c", 0.1, "--loss-chunks", 3]

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """variant and further options -> what the first run gave; made once each."""
    made = {}

    def of(variant, *more):
        key = (variant, *more)
        if key not in made:
            made[key] = outcome(Lab(tmp_path_factory.mktemp("reference")), variant, *more)
        return made[key]
    return of

def outcome(lab, variant, *more, **env):
    log = learned(lab.train(*WORK, *more, variant=variant, env=env))
    return log, lab.files("out")

def resumed(lab, variant, *more, **env):
    """The files of the run in this lab, whose last checkpoint is made once more."""
    shutil.rmtree(lab.path("out/step_00000004"))
    assert len(lab.train(*WORK, *more, "-y", 1, variant=variant, env=env).steps) == 2
    return lab.files("out")

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32", "gpu-bf16", "gpu-fp32"])
@pytest.mark.parametrize("more", ["", "-w 0", "-r 0", "-r 2", "-b 1 -t 31 -d 62"])
def test_again(lab, reference, variant, more):
    """From the start, and from the checkpoint in its middle."""
    more = more.split()
    assert outcome(lab, variant, *more) == reference(variant, *more)
    assert resumed(lab, variant, *more) == reference(variant, *more)[1]

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("order, seed, threads", [("forward", 0, 1), ("forward", 0, 2), ("forward", 0, 3), ("reverse", 0, 1), ("priority", 1, 2), ("priority", 2, 1)])
def test_orders(lab, reference, variant, order, seed, threads):
    assert outcome(lab, variant, SIMT_ORDER=order, SIMT_SEED=seed, OMP_NUM_THREADS=threads) == reference(variant)

@pytest.mark.parametrize("order", ["reverse", "priority"])
@pytest.mark.parametrize("variant, more", [("cpu-bf16", "-w 0"), ("cpu-bf16", "-r 2 -ge 2"), ("cpu-approxbp-bf16", "")])
def test_orders_in_other_modes(lab, reference, order, variant, more):
    assert outcome(lab, variant, *more.split(), SIMT_ORDER=order) == reference(variant, *more.split())

def test_sanitized(lab, reference):
    """Addresses and undefined behaviour are checked, and the numbers are those of the fast build. fp32: test_gpt2_numbers.py"""
    log, files = outcome(lab, "san-bf16", SIMT_POISON=1)
    losses = [[line.get("train_loss", line.get("val_loss")) for line in x] for x in (log, reference("cpu-bf16")[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and resumed(lab, "san-bf16", SIMT_POISON=1) == files

@pytest.mark.parametrize("more", [[], ["-w", "0"]], ids=["master", "no-master"])
def test_another_seed_is_another_run(lab, reference, more):
    """Initialisation and the order of the data are from the seed, and without master weights stochastic rounding."""
    log, files = outcome(lab, "cpu-bf16", *more, "--seed", "2")
    assert log != reference("cpu-bf16", *more)[0] and files != reference("cpu-bf16", *more)[1]
