"""Two runs with one seed are equal to the bit: on any number of threads, in any order of a block's threads."""
import pytest

from helpers import Lab, learned

WORK = ["-x", 4, "-v", 2, "-s", 2, "-d", 128, "-o", "out", "-c", 0.1, "--loss-chunks", 3]


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


@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32", "gpu-bf16", "gpu-fp32"])
@pytest.mark.parametrize("more", ["", "-w 0", "-r 0", "-r 2", "-b 1 -t 31 -d 62"])
def test_again(lab, reference, variant, more):
    more = more.split()
    assert outcome(lab, variant, *more) == reference(variant, *more)


@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("order, seed, threads", [("forward", 0, 1), ("forward", 0, 2), ("forward", 0, 3), ("reverse", 0, 1), ("priority", 1, 2), ("priority", 2, 1)])
def test_orders(lab, reference, variant, order, seed, threads):
    assert outcome(lab, variant, SIMT_ORDER=order, SIMT_SEED=seed, OMP_NUM_THREADS=threads) == reference(variant)


@pytest.mark.parametrize("order", ["reverse", "priority"])
@pytest.mark.parametrize("more", ["-w 0", "-r 2 -ge 2"])
def test_orders_in_other_modes(lab, reference, order, more):
    assert outcome(lab, "cpu-bf16", *more.split(), SIMT_ORDER=order) == reference("cpu-bf16", *more.split())


def test_sanitized(lab, reference):
    """Addresses and undefined behaviour are checked, and the numbers are those of the fast build. fp32: test_gpt2_numbers.py"""
    losses = [[line.get("train_loss", line.get("val_loss")) for line in log]
              for log in (outcome(lab, "san-bf16", SIMT_POISON=1)[0], reference("cpu-bf16")[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("more", [[], ["-w", "0"]], ids=["master", "no-master"])
def test_another_seed_is_another_run(lab, reference, more):
    """Initialisation and the order of the data are from the seed, and without master weights stochastic rounding."""
    log, files = outcome(lab, "cpu-bf16", *more, "--seed", "2")
    assert log != reference("cpu-bf16", *more)[0] and files != reference("cpu-bf16", *more)[1]
