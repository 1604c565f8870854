"""Checkpoints: a run that stops and goes on is, to the bit, the run that did not stop."""
import os
import random
import shutil
import signal
import struct
import subprocess
import time

import pytest

from helpers import ROOT, Shape, ends, environment, learned, names, options, program, random_model, says, write_model, write_tokens, words

def checkpoint(files, step):
    return {name: files[name] for name in names(step)}

def copy_of_step(lab, source, step, to):
    """A folder as it was when this checkpoint was the last."""
    shutil.copytree(lab.path(source) / f"step_{step:08d}", lab.path(to) / f"step_{step:08d}")

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("mode", [
    "-k cosine -u 3 -q 0.1 -c 0.1 -r 2",
    "-i shard_*.bin",                                    # shuffled, and over the end of an epoch
    "-i shard_*.bin -w 0 -d 128 --seed 5 -v 3 -s 4",
    "-a 1",
])
def test_resume_is_exact(lab, mode, variant):
    """Of one file, several micro-batches, without master weights: test_determinism.py."""
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
    lab.train(*chosen, "-x", 6, "-n", 3, "-o", "straight", env=tight)
    copy_of_step(lab, "straight", 3, "resumed")
    resumed = lab.train(*now, "-x", 6, "-n", 3, "-o", "resumed", "-y", 1, env={"SIMT_MEMORY": "1G"})
    assert checkpoint(lab.files("resumed"), 6) == checkpoint(lab.files("straight"), 6)
    assert len(resumed.steps) == 3 and "note:" not in resumed.out
    free = lab.train(*now, "-x", 6, "-o", "free", env={"SIMT_MEMORY": "1G"})   # left to itself it would have chosen otherwise
    assert checkpoint(lab.files("free"), 6) != checkpoint(lab.files("straight"), 6) and len(free.steps) == 6
    if chosen[1] == 3:
        copy_of_step(lab, "straight", 3, "other")
        says(lab.train("--loss-chunks", 2, "-x", 6, "-o", "other", "-y", 1).out, "note: --loss-chunks was 3, is 2")

def test_keep(lab):
    """The newest -nk checkpoints, 0 for all; without -n there is one, at the end. That they are written changes nothing."""
    mine = ["model_best.bin", "notes.txt", "step_00000001", "step_00000001.copy/x", "step_1/x", "step_000000001/x"]
    for name in mine:
        lab.path(f"out/{name}").parent.mkdir(parents=True, exist_ok=True)
        lab.path(f"out/{name}").write_text("mine")
    lab.train("-x", 6, "-n", 1, "-nk", 2, "-o", "out")
    assert sorted(lab.files("out")) == sorted(names(5) + names(6) + mine)
    lab.train("-x", 8, "-n", 1, "-nk", 1, "-o", "out", "-y", 1)
    assert sorted(lab.files("out")) == sorted(names(8) + mine)
    every, one = lab.train("-x", 3, "-n", 1, "-nk", 0, "-o", "all"), lab.train("-x", 3, "-o", "one")
    assert sorted(lab.files("all")) == sorted(names(1) + names(2) + names(3)) and sorted(lab.files("one")) == sorted(names(3))
    assert learned(every) == learned(one)

def test_leftovers_of_a_killed_run_do_not_disturb(lab):
    """What is not whole has another name, does not count, and goes."""
    lab.train("-x", 4, "-n", 2, "-o", "out")
    before = lab.files("out")
    lab.path("out/step_00000004").rename(lab.path("out/step_00000004.tmp"))
    for name in ("model.safetensors", "state_00000.bin.tmp"):
        lab.path(f"out/step_00000004.tmp/{name}").write_bytes(b"half")
    assert len(lab.train("-x", 4, "-o", "out", "-y", 1).steps) == 2
    assert lab.files("out") == before

def test_resume_of_a_finished_run(lab):
    lab.train("-x", 3, "-o", "out", "-v", 1, "-s", 1)
    before, log = lab.files("out"), lab.path("log1.jsonl").read_bytes()
    for steps in (3, 2):
        done = lab.run(*options("-x", steps, "-o", "out", "-y", 1, "-v", 1, "-s", 1, "--log", "log1.jsonl"))
        says(done.out, "already at step 3: nothing left to do", f"--steps is {steps}", "larger -x")
        assert "val loss" not in done.out and "---- sample" not in done.out
    assert lab.files("out") == before and lab.path("log1.jsonl").read_bytes() == log

def test_an_earlier_run_is_not_written_over(lab):
    """Without -y 1, a folder that holds checkpoints is refused before the first step."""
    lab.train("-x", 2, "-o", "out")
    before = lab.files("out")
    done = lab.run(*options("-x", 4, "-o", "out"), status=1)
    says(done.err, "-o out", "step 2", "--resume 1")
    assert lab.files("out") == before

def test_killed_at_any_moment(lab):
    """SIGKILL again and again while it writes a checkpoint at each step; at last the run is as if nothing had happened."""
    lab.train("-x", 40, "-n", 40, "-o", "straight")
    lab.train("-x", 1, "-o", "out")
    rng, kills = random.Random(1), 0

    def newest():
        return max(int(name[5:]) for name in os.listdir(lab.path("out")) if name[5:].isdigit())
    for _ in range(8):
        with subprocess.Popen([program("cpu-bf16"), *options("-x", 40, "-n", 1, "-nk", 3, "-o", "out", "-y", 1)], cwd=lab.folder, env=environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            before, deadline = newest(), time.time() + 60
            while newest() < before + 2 and process.poll() is None and time.time() < deadline:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.03)
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 4
    lab.train("-x", 40, "-n", 40, "-o", "out", "-y", 1)
    assert checkpoint(lab.files("out"), 40) == checkpoint(lab.files("straight"), 40)

# ---- states that cannot be gone on from ----------------------------------------------------------

@pytest.fixture
def stopped(lab):
    """A folder with one checkpoint, at step 2."""
    lab.train("-x", 2, "-o", "out")
    return lab

STATE = "out/step_00000002/state_00000.bin"

def damage(path, at=None, value=None, cut=None):
    data = bytearray(path.read_bytes())
    if at is not None:
        struct.pack_into("<i", data, at, value)
    path.write_bytes(data[:cut])

@pytest.mark.parametrize("how, named", [
    (dict(cut=-1), ["expected", "found"]), (dict(cut=600), [600]), (dict(cut=0), [0]), (None, []),
    (dict(at=0, value=20240326), [20240527, 20240326]), (dict(at=4, value=99), [99]),   # magic, version
    (dict(at=8, value=2), [2]), (dict(at=12, value=1), []), (dict(at=40, value=3), [3]),   # ranks, this one's number, step
    (dict(at=44, value=0), []), (dict(at=44, value=-5), [])],   # T
    ids=str)
def test_damaged_state(stopped, how, named):
    damage(stopped.path(STATE), **how) if how else stopped.path(STATE).unlink()
    before = stopped.files("out")
    done = stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1)
    says(done.err, "step_00000002/state_00000.bin", *named)
    assert stopped.files("out") == before

def test_a_state_without_its_model_or_with_another(stopped):
    stopped.train("-e", Shape(C=64).size(), "-x", 2, "-o", "other")
    stopped.path("out/step_00000002/model.safetensors").unlink()
    says(stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1).err, "step_00000002/model.safetensors")
    for name in names(2)[:2]:
        shutil.copy(stopped.path(f"other/{name}"), stopped.path(f"out/{name}"))
    says(stopped.run(*options("-e", None, "-x", 4, "-o", "out", "-y", 1), status=1).err, "step_00000002/state_00000.bin")

def test_other_data_than_the_state_was_made_with(stopped):
    """A position in the data means nothing in others: longer, shorter, or as long and with one other token."""
    ids = words(4000)
    for name, other in [("short", ids[:65]), ("long", ids + ids), ("one", ids[:-1] + [0]), ("order", ids[2000:] + ids[:2000])]:
        write_tokens(stopped.path(f"{name}.bin"), other)
        done = stopped.run(*options("-i", f"{name}.bin", "-x", 4, "-o", "out", "-y", 1), status=1)
        says(done.err, "step_00000002/state_00000.bin", "same -i", "-e out/step_00000002")

def test_the_same_data_under_another_name(stopped):
    """What counts is the tokens: neither the name nor the type of an id."""
    write_tokens(stopped.path("moved.bin"), words(4000), bits=32)
    result = stopped.train("-i", "moved.bin", "-x", 4, "-o", "out", "-y", 1)
    assert len(result.losses) == 2 and "note: --steps was 2, is 4" in result.out

# ---- what a resumed run does otherwise -----------------------------------------------------------

CHANGES = [("-x", 4, "--steps was 2, is 4"), ("-k", "wsd", "--schedule was cosine, is wsd"), ("-l", 3e-4, "--lr was 0.001, is 0.0003"),
           ("-u", 1, "--warmup was 0, is 1"), ("-q", 0.5, "--final-lr-fraction was 0.1, is 0.5"), ("-c", 0.1, "--weight-decay was 0, is 0.1"),
           ("--grad-clip", 2, "--grad-clip was 1, is 2"), ("-sl", 3, "--skip-loss-z was 0, is 3"), ("-sg", 3, "--skip-grad-z was 0, is 3"),
           ("-b", 4, "--batch was 2, is 4"), ("-d", 128, "--total-batch was 64, is 128"), ("--loss-chunks", 2, "--loss-chunks was 1, is 2"),
           ("-a", 1, "--overfit was 0, is 1"), ("-ge", 1, "--gelu-fusion was 0, is 1"), ("--seed", 5, "its own --seed, 1337")]

def notes(result):
    return {line[6:] for line in result.out.splitlines() if line.startswith("note: ")}

@pytest.mark.parametrize("option, value, note", CHANGES, ids=[c[0] for c in CHANGES])
def test_a_change_is_said(stopped, option, value, note):
    result = stopped.train("-x", 3, "-o", "out", "-y", 1, option, value)
    expected = {note, "--steps was 2, is 3"} - ({"--steps was 2, is 3"} if option == "-x" else set())
    seen = {"its own --seed, 1337" if "seed" in n else n for n in notes(result)}
    assert seen == expected | ({"--total-batch was 64, is 128"} if option == "-b" else set())
    assert notes(stopped.train("-x", 4, "-o", "out", "-y", 1)) or option == "-x"  # and the next one compares with this one

def test_another_build_is_said(lab):
    lab.train("-x", 2, "-w", 0, "--save-dtype", "f32", "-o", "out")
    assert {"PRECISION was BF16, is FP32", "--tf32 was 0, is 1"} <= notes(lab.train("-x", 3, "-w", 0, "-o", "out", "-y", 1, variant="cpu-fp32"))
    if (ROOT / "build/cpu-approxbp-bf16").exists():   # make quick has none
        more = notes(lab.train("-x", 4, "-w", 0, "-o", "out", "-y", 1, variant="cpu-approxbp-bf16"))
        assert {"APPROX_ACT was 0, is 2", "MS_NORM was 0, is 1", "PRECISION was FP32, is BF16"} <= more

def test_a_state_without_settings_is_gone_on_from(stopped):
    """As older programs wrote it: without them, and without a checksum of the data."""
    for at in (*range(36 * 4, 256 * 4, 4),):
        damage(stopped.path(STATE), at=at, value=0)
    assert notes(stopped.train("-x", 3, "-l", 5e-3, "-o", "out", "-y", 1)) == set()
    damage(stopped.path("out/step_00000003/state_00000.bin"), at=40 * 4, value=2**30)
    says(stopped.run(*options("-x", 4, "-o", "out", "-y", 1), status=1).err, "step_00000003/state_00000.bin", "settings")

@pytest.mark.parametrize("other", [dict(L=1), dict(H=4), dict(C=64), dict(T=64), dict(V=258)], ids=str)
def test_another_model_is_refused(stopped, other):
    """By size or by file; a file of the same size is not read, and that is said."""
    write_model(stopped.path("start.bin"), Shape(**other), random_model(Shape(**other)))
    for model in (Shape(**other).size(), "start.bin"):
        says(stopped.run(*options("-e", model, "-x", 3, "-o", "out", "-y", 1), status=2).err, f"-e {model}", "another model", "leave -e out")
    write_model(stopped.path("start.bin"), Shape(), random_model(Shape()))
    assert any("start.bin is not read" in note for note in notes(stopped.train("-e", "start.bin", "-x", 3, "-o", "out", "-y", 1)))

def test_a_shard_that_is_gone_costs_no_checkpoint(lab):
    """The tokens of the next step are prepared early; what is wrong with them is said when the step comes, after the checkpoint before."""
    for i in range(2):
        write_tokens(lab.path(f"shard_{i}.bin"), words(64 * 20 + 1, seed=i))
    process = subprocess.Popen([program("cpu-bf16"), *options("-i", "shard_*.bin", "-x", 40, "-n", 1, "-nk", 1, "-o", "out")], cwd=lab.folder,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     1/"):
            for i in range(2):
                lab.path(f"shard_{i}.bin").unlink()
    assert "shard_" in ends(process)[1] and process.returncode == 1
    assert sorted(lab.files("out")) == sorted(names(20))
