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
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(lab, reference, variant, threads):
    assert outcome(lab, variant, OMP_NUM_THREADS=threads) == reference(variant)


@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("order, seed", [("forward", 0), ("reverse", 0), ("priority", 1), ("priority", 2), ("priority", 3)])
def test_orders(lab, reference, variant, order, seed):
    assert outcome(lab, variant, SIMT_ORDER=order, SIMT_SEED=seed, OMP_NUM_THREADS=1 + seed % 2) == reference(variant)


@pytest.mark.parametrize("order", ["reverse", "priority"])
@pytest.mark.parametrize("more", ["-w 0", "-r 2 -ge 2"])
def test_orders_in_other_modes(lab, reference, order, more):
    assert outcome(lab, "cpu-bf16", *more.split(), SIMT_ORDER=order) == reference("cpu-bf16", *more.split())


@pytest.mark.parametrize("variant", ["san-bf16", "san-fp32"])
def test_sanitized(lab, reference, variant):
    """Addresses and undefined behaviour are checked, and the numbers are those of the fast build."""
    log, _ = outcome(lab, variant, SIMT_POISON=1)
    fast, _ = reference(variant.replace("san", "cpu"))
    losses = [line.get("train_loss", line.get("val_loss")) for line in log]
    assert losses == pytest.approx([line.get("train_loss", line.get("val_loss")) for line in fast], rel=1e-2)


def test_another_seed_is_another_run(lab, reference):
    log, files = outcome(lab, "cpu-bf16", "--seed", "2")
    assert log != reference("cpu-bf16")[0]
    assert files != reference("cpu-bf16")[1]


def test_a_seed_means_something_without_master_weights(lab, reference):
    """Stochastic rounding and initialisation, both from the seed."""
    assert outcome(lab, "cpu-bf16", "-w", "0", "--seed", "2")[0] != reference("cpu-bf16", "-w", "0")[0]
