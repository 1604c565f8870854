"""gpu.sh without a GPU: its commands; how jobs are run, judged, recorded and taken up again, on jobs of sh; how output is read."""
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from helpers import ROOT, execute, program, write_tokens

sys.path.insert(0, str(ROOT / "dev/bench"))
import gpu  # noqa: E402

SCRIPT = ROOT / "dev/bench/gpu.sh"

def dry(stage, *more):
    done = execute(SCRIPT, stage, "--dry-run", *more, cwd=ROOT, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"})
    assert done.status == 0, done.err
    return [shlex.split(line) for line in done.out.splitlines()]

def test_dry_run_needs_no_gpu_and_names_every_program():
    check, bench, peers = dry("check"), dry("bench"), dry("peers", "--llmc", "/nowhere")
    kernels = gpu.kernel_programs()
    assert kernels and all(["./build/gpu-bf16/" + k] in check and ["./build/gpu-fp32/" + k] in check for k in kernels)
    assert sum("compute-sanitizer" in c[0] for c in check) == 24 + 6 * len(kernels)
    builds = [c for c in check if c[0] == "make"]
    assert any("USE_APPROXBP=1" in c for c in builds) and any("MS_NORM=1" in c for c in builds)
    assert [c for c in bench if c[-1] == "--json"] == [["./build/gpu-bf16/" + k, "--json"] for k in kernels]
    swept = [" ".join(c[c.index("-ge"):c.index("-v")]) for c in bench if "-ge" in c and "d12" in c]
    assert {"-ge 0", "-ge 2", *gpu.SWEPT} <= set(swept) and len(gpu.SWEPT) == 8
    assert sum("./train_gpt2cu" in c for c in peers) == 3 and sum("--compile" in c for c in peers) > 3
    assert len(dry("all")) == len(check) + len(bench) + len(dry("peers"))
    for jobs in (gpu.check_jobs, gpu.bench_jobs, gpu.peers_jobs):  # a name is what a line of results is found by
        names = [job.name for job in jobs(ARGUMENTS, gpu.Machine())]
        assert len(set(names)) == len(names)

ARGUMENTS = SimpleNamespace(models=[gpu.SMALL, gpu.LARGE], steps=gpu.STEPS, warmup=gpu.WARMUP, pytest=[], python="python3", llmc=None)

def test_the_trainer_takes_every_command():
    """Every run of bench and peers, asked of the CPU build of the same variant for its memory."""
    asked = set()
    for command in dry("bench") + dry("peers"):
        variant = re.match(r"\./build/gpu-(\S+)/train_gpt2$", command[0])
        if variant:
            asked.add((variant[1], *("64" if x == "auto" else x for x in command[1:])))
    assert len(asked) > 20
    for variant, *options in sorted(asked):
        done = execute(program(f"cpu-{variant}"), *options, "--estimate=json", cwd=ROOT)
        assert done.status == 0 and json.loads(done.out)["total_bytes"] > 1e9, (variant, options, done.err)

def test_wrong_arguments():
    for wrong, said in ((["chekc"], "chekc"), (["check", "--minutes", "0"], "--minutes 0"), (["peers", "--llmc", "/nowhere"], "/nowhere")):
        done = execute(SCRIPT, *wrong, cwd=ROOT, env={"PYTHON": sys.executable})
        assert done.status == 2 and said in done.err and ("expected" in done.err or "choose from" in done.err), done.err
    done = execute(SCRIPT, cwd=ROOT, env={"PYTHON": "no-such-python"})
    assert done.status == 1 and "no-such-python" in done.err

@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck():
    assert execute("shellcheck", SCRIPT, cwd=ROOT).out == ""

def test_no_gpu(tmp_path, monkeypatch):
    for name, script in (("nvidia-smi", "exit 9"), ("nvcc", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no GPU is visible"):
        gpu.Machine().find()

# ---- running -------------------------------------------------------------------------------------

HEAD = {"gpu": "a GPU", "driver": "1", "cuda": "13.0", "source": "s"}

def sh(name, script, expect="done", need=0, **more):
    return gpu.Job(name, ["sh", "-c", script], expect, need, **more)

def run(file, *jobs, clock=None, **more):
    entries = gpu.run_jobs(str(file), {**HEAD, **more}, jobs, clock or gpu.Clock(1), gpu.Machine())
    assert gpu.load(file)[1] == entries  # the file has it all
    return {name: e["status"] for name, e in entries.items()}

def test_jobs(tmp_path):
    """What passes, fails, or finds no time; and the second call, which runs no more than what did not pass."""
    def jobs(broken):
        return [sh("passes", f"echo x >>{tmp_path}/ran; echo 7 passed, 0 failed", r"^(?P<passed>\d+) passed, 0 failed$"),
                sh("says nothing", f"{'true' if broken else 'echo done'}"), sh("exits with 1", "echo done; exit 1"),
                gpu.Job("is not there", ["/no/such/program"], "", 0), sh("needs much time", "echo done", need=1000)]
    file = tmp_path / "check.jsonl"
    states = run(file, *jobs(True))
    assert states == {"passes": "ok", "says nothing": "failed", "exits with 1": "failed", "is not there": "failed"}
    head, entries = gpu.load(file)
    assert head == HEAD and entries["passes"]["passed"] == 7 and entries["exits with 1"]["output"] == ["done"]
    again = gpu.run_jobs(str(file), HEAD, [sh("exits with 1", "echo done")], gpu.Clock(1), gpu.Machine(), again=True)  # others keep their lines
    assert again == gpu.load(file)[1] and {name: e["status"] for name, e in again.items()} == {**states, "exits with 1": "ok"}
    run(file, sh("exits with 1", "echo done; exit 1"))
    file.write_text(file.read_text() + '{"id": "cut o')  # killed while it wrote
    assert run(file, *jobs(False))["says nothing"] == "ok" and (tmp_path / "ran").read_text() == "x\n"
    # but all of it where sources, GPU or driver are others; the old results stay beside
    assert run(file, *jobs(False), driver="2")["passes"] == "ok" and (tmp_path / "ran").read_text() == "x\nx\n"
    assert gpu.load(f"{file}.before")[0] == HEAD
    gpu.run_jobs(str(file), {**HEAD, "driver": "2"}, jobs(False), gpu.Clock(1), gpu.Machine(), again=True)
    assert (tmp_path / "ran").read_text() == "x\nx\nx\n"

def test_what_hangs_is_ended(tmp_path):
    done = gpu.execute(["sh", "-c", "echo before; sleep 60 & sleep 60"], 1, gpu.Clock(1))
    assert done.timed_out and done.text == "before\n" and done.seconds < 30
    # out of time it has neither passed nor failed, but for a sanitizer that has found something; a signal ends all of it
    clock = gpu.Clock(1)
    threading.Timer(1, clock.stop, (signal.SIGTERM, None)).start()
    begin = time.time()
    assert run(tmp_path / "x.jsonl", sh("hangs", "sleep 60"), sh("is not begun", "echo done"), clock=clock)["hangs"] == "unfinished"
    assert time.time() - begin < 30 and clock.signal == signal.SIGTERM and "is not begun" not in gpu.load(tmp_path / "x.jsonl")[1]
    for text, expected in (("", "unfinished"), ("========= Invalid __global__ write\n", "failed")):
        assert gpu.state(sh("x", ""), gpu.Done(-9, text, 1, True)) == expected
    for text in ("Device not supported", "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception."):
        assert gpu.state(sh("x", ""), gpu.Done(1, text, 1, False)) == "unfinished"

def test_twice():
    steps = "".join(f"step {i}/3 | loss 5.{i} | norm 1.{i} | lr 1e-3 | 7.{i} ms |\n" for i in (1, 2, 3))
    assert re.search(gpu.TWICE, steps + "more\n" + steps)
    assert not re.search(gpu.TWICE, steps + steps.replace("1.2 ", "1.7 ")) and not re.search(gpu.TWICE, steps)
    assert not re.search(gpu.TWICE, 2 * steps.replace("5.2", "nan")) and not re.search(gpu.TWICE, 2 * steps.replace("1.2 ", "321.2 "))

def test_memory():
    memory = gpu.Memory(["sh", "-c", "echo 100; sleep 0.2; echo '[N/A]'; echo 300; echo 200; exec sleep 60"])
    begin = time.time()
    while len(memory.used) < 3 and time.time() < begin + 30:
        time.sleep(0.05)
    assert memory.peak() == 200 << 20
    assert gpu.Memory(["true"]).peak() is None

def test_programs_that_did_not_compile(tmp_path, monkeypatch):
    """make's failure, and what is left of an earlier build: neither counts as built."""
    monkeypatch.setattr(gpu, "ROOT", str(tmp_path))
    monkeypatch.setattr(gpu, "SCRATCH", str(tmp_path))
    (tmp_path / "Makefile").write_text("build/gpu-bf16/%:\ntest_gpt2:\n\t@mkdir -p build/gpu-bf16; touch build/gpu-bf16/test_gpt2\n"
                                       "train_gpt2:\n\t@echo an error; false\n")
    jobs = [gpu.Job("x", [gpu.path("gpu-bf16", name)], "", 0) for name in ("test_gpt2", "train_gpt2", "dev/cuda/old")]
    old = tmp_path / "build/gpu-bf16/dev/cuda/old"
    old.parent.mkdir(parents=True)
    old.write_text("")
    os.utime(old, (1, 1))
    missing = [gpu.path("gpu-bf16", name) for name in ("train_gpt2", "dev/cuda/old")]
    assert gpu.build(jobs, "90", gpu.Clock(1), None, ["Makefile"]) == missing
    assert "an error" in (tmp_path / "build.log").read_text()

# ---- what programs print -------------------------------------------------------------------------

def test_steps():
    """Of a run of ours and of one of llm.c: the slow first five are not in the median."""
    lines = [f"step {i:5d}/30 | loss 5.{i:04d} | norm 1.0 | lr 3e-4 | {500 if i <= 5 else 10 + i % 3}.0 ms | 9 tok/s | MFU 25.0%"
             for i in range(1, 31)]
    text = "step       128 sequences x 1024 tokens\n" + "\n".join(lines) + "\ndevice memory: 777 bytes at the peak, 777 announced\n"
    found = gpu.read_steps(text, {"B": 64, "T": 1024, "warmup": 5})
    assert (found["B"], found["ms"], found["timed_steps"], found["ledger_bytes"], found["loss"]) == (128, 11.0, 25, 777, 5.003)
    assert found["tokens_per_s"] == pytest.approx(128 * 1024 / 0.011, rel=1e-6)
    llmc = "".join(f"step   {i}/30 | loss 10.5 (+nanz)| norm 1.0 (+nanz)| lr 3.00e-04 | 25.00 ms | 40.0% bf16 MFU | 99 tok/s\n"
                   for i in range(1, 31))
    assert gpu.read_steps(llmc, {"B": 64, "T": 1024, "warmup": 5})["tokens_per_s"] == pytest.approx(64 * 1024 / 0.025)
    job = gpu.bench_jobs(ARGUMENTS, gpu.Machine())[0]
    assert re.search(job.expect, text, re.M) and not re.search(job.expect, text.replace(" 30/30", " 29/30"), re.M)

def test_profile():
    rows = (("init_kernel(float*)", "us", "9"), ("void attention_forward_tc_kernel<64>(x)", "us", "1,500.5"),
            ("nvjet_128x256", "ms", "2"), ("splitKreduce_kernel<32>", "ns", "1000"), ("adamw_kernel(t)", "nsecond", "500"))
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n' + "".join(
        f'"0","{kernel}","gpu__time_duration.sum","{unit}","{value}"\n' for kernel, unit, value in rows)
    assert gpu.read_profile(text, {})["kernels"] == {"attention_forward_tc_kernel": {"calls": 1, "ms": 1.5005},
                                                     gpu.LIBRARY: {"calls": 2, "ms": 2.001}, "adamw_kernel": {"calls": 1, "ms": 0.0005}}

def test_what_earlier_runs_decide():
    def entry(row, **more):
        return {"model": "124M", "batch": "fixed", "row": row, **more}
    slow, fast = entry(gpu.EXACT.row, tokens_per_s=9), entry(gpu.FUSED.row, tokens_per_s=10)
    r1 = next(j for j in gpu.bench_jobs(ARGUMENTS, gpu.Machine()) if j.about["row"] == gpu.EXACT_R1.row)
    for known, ge in (([slow, fast], "2"), ([slow], "0"), ([], "0")):
        command = gpu.fill(r1, dict(enumerate(known)), 0)
        assert command[command.index("-ge") + 1] == ge
    eager = next(j for j in gpu.peers_jobs(ARGUMENTS, gpu.Machine()) if j.name == "124M, largest, PyTorch, eager, round 1")
    for known, B in (({}, None), ({"B": 64, "peak_bytes": 30 << 30}, "128"), ({"B": 64, "peak_bytes": 60 << 30}, None)):
        command = gpu.fill(eager, {"124M, fixed, PyTorch, eager, round 1": entry(gpu.EAGER.row, **known)}, 80 << 30)
        assert command is None if B is None else command[command.index("-b") + 1] == B

# ---- the PyTorch side ----------------------------------------------------------------------------

def test_torch_baseline(tmp_path):
    pythons = [p for p in (sys.executable, "/usr/bin/python3") if execute(p, "-c", "import torch", cwd=tmp_path, timeout=600).status == 0]
    if not pythons:
        pytest.skip("Python's torch is not installed (Debian: python3-torch)")

    def run(*arguments, status=0):
        shape = ["-e", "gpt2:L2,H2,C32,T32,V257", "-b", 2, "-t", 16, "--device", "cpu"]
        done = execute(pythons[0], "-B", ROOT / "dev/bench/torch_baseline.py", *shape, *arguments, cwd=tmp_path, timeout=600)
        assert done.status == status and "Traceback" not in done.err, done.err
        return done
    write_tokens(tmp_path / "t.bin", [3, 5, 7, 11] * 100)
    found = gpu.read_steps(run("-x", 12, "-i", "t.bin").out, {"B": 64, "T": 16, "warmup": 2})
    assert (found["B"], found["timed_steps"]) == (2, 10) and 4 < found["loss"] < 5.95  # log 384, of an untrained model, is 5.95
    assert "step     2/2" in run("-x", 2, "--parameters", "bf16").out
    for wrong in (["-e", "d13"], ["-t", "64"]):
        assert wrong[1] in run(*wrong, status=2).err
    (tmp_path / "t.bin").write_bytes(b"x" * 2000)
    assert "t.bin" in run("-i", "t.bin", status=1).err
