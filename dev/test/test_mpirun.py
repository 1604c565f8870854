"""Several processes compute what one does: summed gradients, a shared-out optimizer, checkpoints of all ranks.

On the CPU backend NCCL's calls go to MPI, so what is tested is the trainer's part, not the network.
"""
import pytest

from helpers import close, execute, mpirun, options, program, read_log, several_programs_run

RANKS = 2


def train(lab, name, *given, ranks=RANKS, status=0):
    """A run of so many processes; returns its log."""
    done = execute(*mpirun(ranks), program("cpu-multi-fp32"), *options("--log", f"{name}.jsonl", "-f", 0, *given), cwd=lab.folder,
                   env={"OMP_NUM_THREADS": 1, "OMPI_MCA_rmaps_base_oversubscribe": 1})
    assert done.status == status, done.out[-1000:] + done.err[-3000:]
    return (done, read_log(lab.path(f"{name}.jsonl"))) if status == 0 else (done, [])


def losses(log):
    return [line["train_loss"] for line in log if "train_loss" in line]


@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_train_as_one_does_with_twice_the_batch(lab, zero):
    _, one = train(lab, "one", "-b", 4, "-x", 6, ranks=1)
    _, two = train(lab, "two", "-b", 2, "-x", 6, "-z", zero)
    assert len(losses(one)) == 6 and close(losses(one), losses(two), 1e-5)


def test_a_shared_out_optimizer_is_smaller_and_equal(lab):
    _, whole = train(lab, "whole", "-x", 4, "-o", "whole")
    _, shared = train(lab, "shared", "-x", 4, "-o", "shared", "-z", 1)
    assert losses(whole) == losses(shared)
    assert lab.files("whole")["model_00000004.bin"] == lab.files("shared")["model_00000004.bin"]
    assert shared[-1]["peak_bytes"] < whole[-1]["peak_bytes"] and shared[-1]["peak_bytes"] == shared[-1]["estimate_bytes"]


@pytest.mark.parametrize("zero", [0, 1])
def test_resume(lab, zero):
    how = ["-z", zero, "-d", 256]
    _, straight = train(lab, "straight", "-x", 6, "-o", "straight", *how)
    train(lab, "half", "-x", 3, "-o", "half", *how)
    assert {"state_00000003_00000.bin", "state_00000003_00001.bin"} <= set(lab.files("half"))
    _, resumed = train(lab, "resumed", "-x", 6, "-o", "half", "-y", 1, *how)
    assert losses(resumed) == losses(straight)[3:]
    assert lab.files("half")["model_00000006.bin"] == lab.files("straight")["model_00000006.bin"]


def test_another_number_of_ranks_is_refused(lab):
    train(lab, "two", "-x", 2, "-o", "out")
    done, _ = train(lab, "one", "-x", 4, "-o", "out", "-y", 1, ranks=1, status=1)
    assert "rank 0 of 2" in done.err and "rank 0 of 1" in done.err


def test_ranks_with_different_memory_take_one_batch(lab):
    launcher, trainer = mpirun(1), program("cpu-multi-fp32")
    if not several_programs_run():
        pytest.skip("this Open MPI's mpirun cannot run A : B")
    command = options("--log", "auto.jsonl", "-b", "auto", "-x", 2)
    first, second = (["-x", f"SIMT_MEMORY={memory}", trainer, *command] for memory in ("200M", "40M"))
    done = execute(*launcher, *first, ":", "-np", 1, *second, cwd=lab.folder, env={"OMP_NUM_THREADS": 1})
    assert done.status == 0, done.err[-2000:]
    assert 5 < losses(read_log(lab.path("auto.jsonl")))[0] < 6   # ln 257 = 5.55; another divisor would show


def test_a_build_for_one_process_says_so_under_mpirun(lab):
    done = execute(program("cpu-fp32"), *options(), cwd=lab.folder, env={"OMPI_COMM_WORLD_SIZE": 2})
    assert done.status == 1 and "MULTI_GPU=1" in done.err
