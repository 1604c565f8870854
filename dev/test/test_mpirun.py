"""Several processes compute what one does: summed gradients, a shared-out optimizer, checkpoints of all ranks.

On the CPU backend NCCL's calls go to MPI, so what is tested is the trainer's part, not the network.
"""
import os
import shutil
import signal
import subprocess
import time

import pytest

from helpers import close, environment, execute, options, program, read_log

RANKS = 2


def train(lab, name, *given, ranks=RANKS, status=0):
    """A run of so many processes; returns its log."""
    if not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed")
    launcher = ["mpirun", "--oversubscribe", "-np", ranks] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    done = execute(*launcher, program("cpu-multi-fp32"), *options("--log", f"{name}.jsonl", "-f", 0, *given), cwd=lab.folder,
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
    how = ["-z", zero, "-d", 256, "-k", "constant"]
    _, straight = train(lab, "straight", "-x", 6, "-o", "straight", *how)
    train(lab, "half", "-x", 3, "-o", "half", *how)
    assert {"state_00000003_00000.bin", "state_00000003_00001.bin"} <= set(lab.files("half"))
    _, resumed = train(lab, "resumed", "-x", 6, "-o", "half", "-y", 1, *how)
    assert losses(resumed) == losses(straight)[3:]
    assert lab.files("half")["model_00000006.bin"] == lab.files("straight")["model_00000006.bin"]


def test_a_checkpoint_that_one_rank_cannot_write_is_none(lab):
    """A folder stands where the second rank's temporary file should: what the first has written goes too, and training goes on."""
    lab.path("out/state_00000002_00001.bin.tmp/x").mkdir(parents=True)
    done, log = train(lab, "log", "-x", 4, "-n", 2, "-o", "out")
    assert "no checkpoint of step 2" in done.err and len(losses(log)) == 4
    assert set(lab.files("out")) == {"model_00000004.bin", "state_00000004_00000.bin", "state_00000004_00001.bin", "DONE_00000004"}


def test_a_signal_saves(lab):
    """mpirun hands SIGUSR1 on. (After Ctrl-C it gives its processes one second.)"""
    if not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", "--oversubscribe", "-np", "2", *root, str(program("cpu-multi-fp32")), *options("-x", 100000, "-o", "out", "--log", "log")]
    with subprocess.Popen(command, cwd=lab.folder, env=environment(OMP_NUM_THREADS=1), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        while not lab.path("log").exists() or b"train_loss" not in lab.path("log").read_bytes():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    step = len(losses(read_log(lab.path("log"))))
    assert set(lab.files("out")) == {f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"state_{step:08d}_00001.bin", f"DONE_{step:08d}"}


def test_another_number_of_ranks_is_refused(lab):
    train(lab, "two", "-x", 2, "-o", "out")
    done, _ = train(lab, "one", "-x", 4, "-o", "out", "-y", 1, ranks=1, status=1)
    assert "rank 0 of 2" in done.err and "rank 0 of 1" in done.err


def test_ranks_with_different_memory_take_one_batch(lab):
    if not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = options("--log", "auto.jsonl", "-b", "auto", "-x", 2)
    parts = []
    for memory in ("200M", "40M"):
        parts += (":" if parts else "", "-np", 1, "-x", f"SIMT_MEMORY={memory}", program("cpu-multi-fp32"), *command)
    done = execute("mpirun", "--oversubscribe", *root, *[p for p in parts if p != ""], cwd=lab.folder, env={"OMP_NUM_THREADS": 1})
    assert done.status == 0, done.err[-2000:]
    assert 5 < losses(read_log(lab.path("auto.jsonl")))[0] < 6   # ln 257 = 5.55; another divisor would show


def test_a_build_for_one_process_says_so_under_mpirun(lab):
    done = execute(program("cpu-fp32"), *options(), cwd=lab.folder, env={"OMPI_COMM_WORLD_SIZE": 2})
    assert done.status == 1 and "MULTI_GPU=1" in done.err
