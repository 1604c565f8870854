"""Several processes compute what one does: summed gradients, a shared-out optimizer, checkpoints of all ranks.

On the CPU backend NCCL's calls go to MPI, so what is tested is the trainer's part, not the network.
"""
import signal
import subprocess
import time

import pytest

from helpers import Shape, close, ends, environment, execute, mpirun, names, options, program, read_log, says

RANKS = 2
OVERSUBSCRIBE = {"OMP_NUM_THREADS": 1, "OMPI_MCA_rmaps_base_oversubscribe": 1}

def train(lab, name, *given, ranks=RANKS, status=0, **env):
    """A run of so many processes; returns its log."""
    done = execute(*mpirun(ranks), program("cpu-multi-fp32"), *options("--log", f"{name}.jsonl", "-f", 0, *given), cwd=lab.folder,
                   env={**OVERSUBSCRIBE, **env})
    assert done.status == status, done.out[-1000:] + done.err[-3000:]
    return (done, read_log(lab.path(f"{name}.jsonl"))) if status == 0 else (done, [])

def losses(log):
    return [line["train_loss"] for line in log if "train_loss" in line]

def test_two_ranks_train_as_one_does_with_twice_the_batch(lab):
    """With -z 1 they train as with -z 0, to the bit: the next test."""
    _, one = train(lab, "one", "-b", 4, "-x", 6, ranks=1)
    _, two = train(lab, "two", "-b", 2, "-x", 6)
    assert len(losses(one)) == 6 and close(losses(one), losses(two), 1e-5)

# C 48 in 3 layers can be shared out among 3; of C 32 among 3, and of L 3 among 2 and 4, only some tensors can
@pytest.mark.parametrize("ranks, shape, seed", [(1, Shape(), 1), (2, Shape(), 2), (2, Shape(L=3, H=3, C=48), 3), (3, Shape(L=3, H=3, C=48), 1),
                                                (3, Shape(), 4), (4, Shape(L=1, H=1, C=40), 1)],
                         ids=lambda x: x if isinstance(x, int) else f"C{x.C}")
def test_a_shared_out_optimizer_is_smaller_and_equal(lab, ranks, shape, seed):
    given = ["-e", shape.size(), "-x", 4, "-b", 2, "--seed", seed]
    _, whole = train(lab, "whole", *given, "-o", "whole", ranks=ranks)
    _, shared = train(lab, "shared", *given, "-o", "shared", "-z", 1, ranks=ranks)
    same = ("step", "train_loss", "grad_norm", "lr", "done")
    assert [[line.get(k) for k in same] for line in whole] == [[line.get(k) for k in same] for line in shared]
    assert any(line["grad_norm"] > 1 for line in whole[:-1])   # it is clipped by the norm, so the norm's bits are in the model
    assert lab.files("whole")[names(4)[0]] == lab.files("shared")[names(4)[0]]
    assert (shared[-1]["peak_bytes"] < whole[-1]["peak_bytes"]) == (ranks > 1) and shared[-1]["peak_bytes"] == shared[-1]["estimate_bytes"]

@pytest.mark.parametrize("zero, dtype", [(0, "f32"), (1, "f32"), (1, "f16")])
def test_resume(lab, zero, dtype):
    how = ["-z", zero, "-d", 256, "-k", "constant", "--save-dtype", dtype]
    _, straight = train(lab, "straight", "-x", 6, "-o", "straight", *how)
    train(lab, "half", "-x", 3, "-o", "half", *how)
    assert set(names(3, RANKS)) == set(lab.files("half"))
    _, resumed = train(lab, "resumed", "-x", 6, "-o", "half", "-y", 1, *how)
    assert losses(resumed) == losses(straight)[3:]
    assert lab.files("half")[names(6)[0]] == lab.files("straight")[names(6)[0]]

def test_a_checkpoint_that_one_rank_cannot_write_is_none(lab):
    """A folder stands where the second rank's file should: what the first has written goes too, and training goes on."""
    lab.path("out/step_00000002.tmp/state_00001.bin/mine").mkdir(parents=True)
    done, log = train(lab, "log", "-x", 4, "-n", 2, "-o", "out")
    assert "no checkpoint of step 2" in done.err and len(losses(log)) == 4
    assert set(lab.files("out")) == {*names(4, RANKS), "step_00000002.tmp/state_00001.bin/mine"}

def test_a_signal_saves(lab):
    """mpirun hands SIGUSR1 on. (After Ctrl-C it gives its processes one second.)"""
    command = [*mpirun(2), str(program("cpu-multi-fp32")), *options("-x", 100000, "-o", "out", "--log", "log")]
    with subprocess.Popen(command, cwd=lab.folder, env=environment(OMP_NUM_THREADS=1), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        while not lab.path("log").exists() or b"train_loss" not in lab.path("log").read_bytes():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        ends(process)
    assert process.returncode == 128 + signal.SIGUSR1
    step = len(losses(read_log(lab.path("log"))))
    assert set(lab.files("out")) == set(names(step, RANKS))

def test_another_number_of_ranks_is_refused(lab):
    train(lab, "two", "-x", 2, "-o", "out")
    for ranks in (1, 3):
        done, _ = train(lab, "other", "-x", 4, "-o", "out", "-y", 1, ranks=ranks, status=1)
        assert f"by a run on 2 GPUs, this one has {ranks}" in done.err
    train(lab, "look", "-x", 0, "-v", 1, "-o", "out", "-y", 1, ranks=3)  # the weights are everybody's

def test_ranks_with_different_memory_take_one_batch(lab):
    launcher, trainer = mpirun(1), program("cpu-multi-fp32")
    if execute(*launcher, "true", ":", "-np", 1, "true", cwd=lab.folder).status != 0:
        pytest.skip("this Open MPI's mpirun cannot run A : B")   # 5.0.7, which Debian 13 has, dies of it
    command = options("--log", "auto.jsonl", "-b", "auto", "-x", 2)
    first, second = (["-x", f"SIMT_MEMORY={memory}", trainer, *command] for memory in ("200M", "40M"))
    done = execute(*launcher, *first, ":", "-np", 1, *second, cwd=lab.folder, env={"OMP_NUM_THREADS": 1})
    assert done.status == 0, done.err[-2000:]
    assert 5 < losses(read_log(lab.path("auto.jsonl")))[0] < 6   # ln 257 = 5.55; another divisor would show

def test_two_processes_with_one_gpu_are_refused(lab):
    """However many GPUs each of them sees: one, number 0, is what SLURM shows to a task that has one of its own."""
    train(lab, "own", "-x", 1)
    done, _ = train(lab, "same", "-x", 1, status=1, SIMT_PCI=0x105)
    says(done.err, "processes 0 and 1 of the 2", "0001:05:00.0")
    assert done.err.count("share the GPU") == 1
    train(lab, "alone", "-x", 1, ranks=1, SIMT_PCI=0x105)

LAUNCHED = [("mpirun", {"OMPI_COMM_WORLD_SIZE": 2}), ("mpirun", {"PMI_SIZE": 4, "PMI_RANK": 0}), ("mpirun", {"MV2_COMM_WORLD_SIZE": 2}),
            ("mpirun", {"PMI_RANK": 1}), ("mpirun", {"PMIX_RANK": 1}), ("srun", {"SLURM_STEP_NUM_TASKS": 2, "SLURM_NTASKS": 2})]

# a build with MPI: Open MPI itself looks at the last two, and ends the program
@pytest.mark.parametrize("variant, launcher, env", [("cpu-fp32", *x) for x in LAUNCHED] + [("cpu-multi-fp32", *x) for x in LAUNCHED[:-2]])
def test_processes_that_do_not_know_of_each_other_are_refused(lab, variant, launcher, env):
    """Each would train alone, and write over the others' files."""
    if "multi" in variant:
        mpirun(1)  # or a skip
    done = execute(program(variant), *options("-o", "out"), cwd=lab.folder, env=env)
    assert done.status == 1 and not lab.files("out")
    name, value = list(env.items())[0]
    says(done.err, f"{launcher} started several", f"{name}={value}", "start it with mpirun" if "multi" in variant else "MULTI_GPU=1")

@pytest.mark.parametrize("env", [{"SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_JOB_ID": 1}, {"SLURM_NTASKS": 8, "SLURM_STEP_NUM_TASKS": 1},
                                 {"OMPI_COMM_WORLD_SIZE": 1, "PMIX_RANK": 0}, {"PMI_SIZE": 1, "PMI_RANK": 0}])
def test_one_process_in_a_jobs_shell_is_not(lab, env):
    lab.run(*options("-x", 1), variant="cpu-fp32", env=env)
