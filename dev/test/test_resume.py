"""Checkpoints: a run that stops and goes on is, to the bit, the run that did not stop."""
import os
import random
import shutil
import signal
import struct
import subprocess
import time

import pytest

from helpers import Shape, environment, learned, options, program, says, write_tokens, words


def names(step):
    return [f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}"]


def checkpoint(files, step):
    return {name: files[name] for name in names(step)}


def copy_of_step(lab, source, step, to):
    """A folder as it was when this checkpoint was the last."""
    lab.path(to).mkdir()
    for name in names(step):
        shutil.copy(lab.path(source) / name, lab.path(to) / name)


@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("mode", [
    "",
    "-w 0",                                              # bf16 weights, rounded stochastically
    "-d 256",                                            # four micro-batches a step
    "-k cosine -u 3 -q 0.1 -c 0.1 -r 2",
    "-i shard_*.bin",                                    # shuffled, and over the end of an epoch
    "-i shard_*.bin -w 0 -d 128 --seed 5 -v 3 -s 4",
    "-a 1",
])
def test_resume_is_exact(lab, mode, variant):
    for i in range(3):
        write_tokens(lab.path(f"shard_{i}.bin"), words(64 * 2 + 1 + 17 * i, seed=30 + i))
    mode = mode.split()
    straight = lab.train(*mode, "-x", 10, "-n", 5, "-o", "straight", variant=variant)
    copy_of_step(lab, "straight", 5, "resumed")
    resumed = lab.train(*mode, "-x", 10, "-n", 5, "-o", "resumed", "-y", 1, variant=variant)
    assert len(resumed.steps) == 5
    assert [line for line in learned(resumed)[:-1] if line not in learned(straight)] == []
    assert checkpoint(lab.files("resumed"), 10) == checkpoint(lab.files("straight"), 10)


@pytest.mark.parametrize("chosen", [["--loss-chunks", 3], ["-b", "auto"]], ids=["chunks", "batch"])
def test_what_memory_decides_is_decided_once(lab, chosen):
    """A resumed run has the chunks of the loss, and the batch, that it began with, however much memory is free now."""
    now = ["--loss-chunks", "auto"] if chosen[1] == 3 else chosen
    tight = {"SIMT_MEMORY": "3M" if chosen[1] == "auto" else "1G"}
    straight = lab.train(*chosen, "-x", 6, "-n", 3, "-o", "straight", env=tight)
    copy_of_step(lab, "straight", 3, "resumed")
    resumed = lab.train(*now, "-x", 6, "-n", 3, "-o", "resumed", "-y", 1, env={"SIMT_MEMORY": "1G"})
    assert checkpoint(lab.files("resumed"), 6) == checkpoint(lab.files("straight"), 6)
    assert len(resumed.steps) == 3 and "note:" not in resumed.out
    free = lab.train(*now, "-x", 6, "-o", "free", env={"SIMT_MEMORY": "1G"})   # left to itself it would have chosen otherwise
    assert checkpoint(lab.files("free"), 6) != checkpoint(lab.files("straight"), 6) and len(free.steps) == 6
    if chosen[1] == 3:
        copy_of_step(lab, "straight", 3, "other")
        says(lab.train("--loss-chunks", 2, "-x", 6, "-o", "other", "-y", 1).out, "note: logits come in chunks of 32 rows, of 22 until now")


def test_a_checkpoint_at_the_end_by_default(lab):
    lab.train("-x", 3, "-o", "out")
    assert sorted(lab.files("out")) == sorted(names(3))


def test_checkpoints_change_nothing(lab):
    assert learned(lab.train("-x", 6, "-n", 1, "-o", "out")) == learned(lab.train("-x", 6))


def test_keep(lab):
    lab.train("-x", 6, "-n", 1, "-nk", 2, "-o", "out")
    assert sorted(lab.files("out")) == sorted(names(5) + names(6))
    lab.train("-x", 8, "-n", 1, "-nk", 1, "-o", "out", "-y", 1)
    assert sorted(lab.files("out")) == sorted(names(8))
    lab.train("-x", 3, "-n", 1, "-nk", 0, "-o", "all")
    assert sorted(lab.files("all")) == sorted(names(1) + names(2) + names(3))


def test_keep_leaves_other_files_alone(lab):
    lab.path("out").mkdir()
    mine = ["model_best.bin", "notes.txt", "model_00000001.bin.copy"]
    for name in mine:
        lab.path(f"out/{name}").write_text("mine")
    lab.train("-x", 3, "-n", 1, "-nk", 1, "-o", "out")
    assert sorted(lab.files("out")) == sorted(names(3) + mine)


def test_without_done_a_checkpoint_does_not_count(lab):
    lab.train("-x", 6, "-n", 2, "-o", "out")
    lab.path("out/DONE_00000006").unlink()
    result = lab.train("-x", 6, "-n", 2, "-o", "out", "-y", 1)
    assert len(result.steps) == 2
    assert lab.path("out/DONE_00000006").exists()


def test_leftovers_of_a_killed_run_do_not_disturb(lab):
    lab.train("-x", 2, "-o", "out")
    for name in names(4)[:2]:
        lab.path(f"out/{name}").write_bytes(b"half")
        lab.path(f"out/{name}.tmp").write_bytes(b"half")
    assert len(lab.train("-x", 4, "-o", "out", "-y", 1).steps) == 2
    assert len(lab.path("out/model_00000004.bin").read_bytes()) == len(lab.path("out/model_00000002.bin").read_bytes())


def test_resume_of_a_finished_run(lab):
    lab.train("-x", 3, "-o", "out")
    before = lab.files("out")
    assert lab.train("-x", 3, "-o", "out", "-y", 1).losses == []
    assert lab.files("out") == before


def test_an_earlier_run_is_not_written_over(lab):
    """Without -y 1, a folder that holds checkpoints is refused before the first step."""
    lab.train("-x", 2, "-o", "out")
    before = lab.files("out")
    done = lab.run(*options("-x", 4, "-o", "out"), status=1)
    says(done.err, "-o out", "step 2", "--resume 1")
    assert lab.files("out") == before


def test_killed_at_any_moment(lab):
    """SIGKILL again and again while it writes a checkpoint at each step; at last the run is as if nothing had happened."""
    straight = lab.train("-x", 40, "-n", 40, "-o", "straight")
    rng = random.Random(1)
    given = options("-x", 40, "-n", 1, "-nk", 3, "-o", "out", "-y", 1)
    lab.path("out").mkdir()
    lab.train("-x", 1, "-o", "out")
    kills = 0
    for _ in range(8):
        process = subprocess.Popen([program("cpu-bf16"), *given], cwd=lab.folder, env=environment(), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        before = newest(lab)
        deadline = time.time() + 60
        while newest(lab) < before + 2 and process.poll() is None and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 4
    lab.train("-x", 40, "-n", 40, "-o", "out", "-y", 1)
    after = lab.files("out")
    assert checkpoint(after, 40) == checkpoint(lab.files("straight"), 40)
    assert straight.losses


def newest(lab):
    done = [int(name[5:]) for name in os.listdir(lab.path("out")) if name.startswith("DONE_") and name[5:].isdigit()]
    return max(done, default=0)


# ----------------------------------------------------------------------------
# states that cannot be gone on from

@pytest.fixture
def stopped(lab):
    """A folder with one checkpoint, at step 2."""
    lab.train("-x", 2, "-o", "out")
    return lab


STATE = "out/state_00000002_00000.bin"


def damage(path, at=None, value=None, cut=None):
    data = bytearray(path.read_bytes())
    if at is not None:
        struct.pack_into("<i", data, at, value)
    path.write_bytes(data[:cut])


@pytest.mark.parametrize("name, how, named", [
    ("cut", dict(cut=-1), ["expected", "found"]),
    ("header cut", dict(cut=600), ["600"]),
    ("empty", dict(cut=0), ["0"]),
    ("magic", dict(at=0, value=20240326), ["20240527", "20240326"]),
    ("version", dict(at=4, value=99), ["99"]),
    ("ranks", dict(at=8, value=2), ["2"]),
    ("rank", dict(at=12, value=1), []),
    ("step", dict(at=40, value=3), ["3"]),
])
def test_damaged_state(stopped, name, how, named):
    damage(stopped.path(STATE), **how)
    before = stopped.files("out")
    done = stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1)
    says(done.err, "state_00000002_00000.bin", *named)
    assert stopped.files("out") == before


@pytest.mark.parametrize("missing", names(2)[:2])
def test_a_file_of_a_complete_checkpoint_is_missing(stopped, missing):
    stopped.path(f"out/{missing}").unlink()
    says(stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1).err, missing)


def test_state_of_another_model(stopped):
    """The state of one run beside the model of another."""
    stopped.train("-e", Shape(C=64).size(), "-x", 2, "-o", "other")
    shutil.copy(stopped.path("other/model_00000002.bin"), stopped.path("out/model_00000002.bin"))
    says(stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1).err, "state_00000002_00000.bin")


def test_other_data_than_the_state_was_made_with(stopped):
    """A loader position beyond the data that is there now is said, not read."""
    write_tokens(stopped.path("short.bin"), words(65))
    done = stopped.run(*options("-i", "short.bin", "-x", 4, "-o", "out", "-y", 1), status=None)
    assert done.status in (0, 1)
    if done.status == 1:
        says(done.err, "state_00000002_00000.bin")
