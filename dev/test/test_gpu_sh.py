"""gpu.sh without a GPU: its commands, and its stages on a make-believe machine (nvidia-smi, nvcc, compute-sanitizer, ncu and a
Python with PyTorch that are scripts of a few lines), where runs fail, hang and run out of memory.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, execute, program

sys.path.insert(0, str(ROOT / "dev/bench"))
import gpu  # noqa: E402

SCRIPT = ROOT / "dev/bench/gpu.sh"


# ----------------------------------------------------------------------------
# commands

def dry(stage, *more):
    done = execute(SCRIPT, stage, "--dry-run", *more, cwd=ROOT, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"})
    assert done.status == 0, done.err
    return [shlex.split(line) for line in done.out.splitlines()]


def test_dry_run_needs_no_gpu_and_names_every_program():
    check = dry("check")
    kernels = gpu.kernel_programs()
    assert kernels and all(["./build/gpu-bf16/" + k] in check and ["./build/gpu-fp32/" + k] in check for k in kernels)
    assert sum("compute-sanitizer" in c[0] for c in check) == 6 + 6 * len(kernels)
    builds = [c for c in check if c[0] == "make"]
    assert any("USE_APPROXBP=1" in c for c in builds) and any("MS_NORM=1" in c for c in builds)
    assert [c for c in dry("bench") if c[-1] == "--json"] == [["./build/gpu-bf16/" + k, "--json"] for k in kernels]
    swept = [" ".join(c[c.index("-ge"):c.index("-v")]) for c in dry("bench") if "--log" in c and "d12" in c and "-ge" in c]
    for option in ("-ge 0", "-ge 1", "-ge 2", *(f"-ge 0 --loss-chunks {n}" for n in (4, 8, 13, 25)), *(f"-ge 0 --workspace {n}" for n in (32, 64, 128))):
        assert option in swept, option
    peers = dry("peers", "--llmc", "/nowhere")
    assert sum("train_gpt2cu" in c[0] for c in peers) == 3 and sum("--compile" in c for c in peers) > 3
    assert len(dry("all")) == len(check) + len(dry("bench")) + len(dry("peers"))


def test_the_trainer_takes_every_command():
    """Every run of bench and peers, asked of the CPU build of the same variant for its memory."""
    asked = set()
    for command in dry("bench") + dry("peers"):
        variant = re.match(r"\./build/gpu-(\S+)/train_gpt2$", command[0])
        if variant:
            options = ["64" if x == "auto" else x for x in command[1:]]
            asked.add((variant[1], *options))
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


# ----------------------------------------------------------------------------
# a machine that is not there

PROGRAM = r"""
import json, os, re, sys, time
me, name, a = os.environ["FAKE"], os.path.basename(sys.argv[0]), sys.argv[1:]
variant = next(part for part in sys.argv[0].split("/") if part.startswith("gpu-"))
with open(me + "/calls", "a") as f:
    f.write(variant + " " + name + " " + " ".join(a) + "\n")
with open(me + "/pid", "w") as f:
    f.write(str(os.getpid()))
broken = open(me + "/broken").read().split("\n") if os.path.exists(me + "/broken") else []
if variant + "/" + name in broken:
    sys.exit("this program is broken")
if name == "test_gpt2":
    print("7 passed, 0 failed")
elif name != "train_gpt2" and "--help" in a:
    print("  --small   for sanitizers")
elif name != "train_gpt2" and "--json" in a:
    print(json.dumps({"program": name, "case": "c", "version": "v", "bytes_per_element": 4, "ms": 0.5, "gb_s": 4000.0, "share": 0.9}))
elif name != "train_gpt2":
    print("checksum 0123456789abcdef (seed 1)\nall is well")
elif "--estimate=json" in a:
    print(json.dumps({"total_bytes": 3 << 30, "rows": []}))
else:
    option = dict(zip(a, a[1:]))
    B = 256 if option["-b"] == "auto" else int(option["-b"])
    print(f"step       {B} sequences x {option['-t']} tokens x 1 micro-batches")
    if B > 128:
        sys.exit("out of memory at fch")
    ms = 8.0 if option.get("-ge") == "2" else 10.0
    for step in range(1, int(option["-x"]) + 1):
        print(f"step {step}/9 | loss 5.{step} | norm 1.5 | lr 1")
    if "--log" in option:
        with open(option["--log"], "w") as f:
            for step in range(1, int(option["-x"]) + 1):
                f.write(json.dumps({"step": step, "train_loss": 5.5, "ms": 500.0 if step <= 5 else ms + step % 3, "mfu": 0.25}) + "\n")
            f.write(json.dumps({"done": True, "peak_bytes": B << 20, "estimate_bytes": B << 20}) + "\n")
        time.sleep(0.35)
"""
SMI = r"""
import os, sys, time
me, a = os.environ["FAKE"], " ".join(sys.argv)
if "driver_version" in a:
    print("NVIDIA Fake 200, 999.1, 9.0, 100000, Default")
elif "memory.used" in a or "compute-apps" in a:
    while os.getppid() > 1:
        if "memory.used" in a:
            print("100")
        elif os.path.exists(me + "/pid"):
            print(open(me + "/pid").read() + ", 2048")
        sys.stdout.flush()
        time.sleep(0.05)
"""
NVCC = r"""
import os, sys
a = sys.argv[1:]
if "--version" in a:
    print("Cuda compilation tools, release 13.0, V13.0.1")
    sys.exit()
me, out, source = os.environ["FAKE"], a[a.index("-o") + 1], next(x for x in a if x.endswith(".cu"))
if source == os.environ.get("FAKE_DOES_NOT_COMPILE"):
    sys.exit(source + ": error: expected a semicolon")
with open(out, "w") as f:
    f.write("#!" + sys.executable + "\n" + open(me + "/program.py").read())
os.chmod(out, 0o755)
"""
SANITIZER = r"""
import os, subprocess, sys
a = sys.argv[1:]
at = next(i for i, x in enumerate(a) if x.startswith("/"))
status = subprocess.run(a[at:]).returncode
if a[at].endswith("regelu2") and "racecheck" in a:
    print("========= Error: Race reported between Write access at act_backward_kernel<2>(float*)+0x10")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    sys.exit(77)
print("========= ERROR SUMMARY: 0 errors")
sys.exit(status)
"""
NCU = r"""
import subprocess, sys
a = sys.argv[1:]
with open(a[a.index("--log-file") + 1], "w") as f:
    f.write('==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n')
    for kernel, unit, value in (("init_normal_kernel(float*)", "us", "9"), ("void attention_forward_tc_kernel<64>(x)", "us", "1,500.5"),
                                ("nvjet_tst_128x256", "ms", "2"), ("splitKreduce_kernel<32>", "ns", "1000"), ("adamw_kernel(t)", "nsecond", "500")):
        f.write(f'"0","{kernel}","gpu__time_duration.sum","{unit}","{value}"\n')
"""
TORCH = r"""
import json, os, sys
a = sys.argv[1:]
if a[0] == "-c":
    print("Python 3, PyTorch 2")
    sys.exit()
B = int(a[a.index("--batch") + 1])
with open(os.environ["FAKE"] + "/calls", "a") as f:
    f.write("torch " + " ".join(a) + "\n")
if B > 100:
    sys.exit("torch_baseline.py: out of memory at --batch " + str(B))
print("a warning")
print(json.dumps({"B": B, "T": 1024, "ms": 20.0, "tokens_per_s": B * 1024 / 0.02, "parameters": 1000, "parameter_bytes": 16, "loss": 5.4,
                  "allocated_bytes": B << 28, "reserved_bytes": B << 28}))
"""


class MakeBelieve:
    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        tools = {"nvidia-smi": SMI, "nvcc": NVCC, "compute-sanitizer": SANITIZER, "ncu": NCU, "torch": TORCH}
        (folder / "bin").mkdir()
        for name, text in tools.items():
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
            (folder / "bin" / name).chmod(0o755)
        (folder / "program.py").write_text(PROGRAM)
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        for name in ("CUDA_VISIBLE_DEVICES", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(gpu, "kernel_programs", lambda: ["dev/cuda/mslayernorm", "dev/cuda/regelu2"])
        monkeypatch.setattr(gpu.Stage, "token_count", 1 << 12, raising=False)

    def run(self, stage, *more):
        """Exit status."""
        self.monkeypatch.setattr(sys, "argv", ["gpu.py", stage, "--out", str(self.folder / "out"), "--build", str(self.folder / "build"),
                                               "--python", str(self.folder / "bin/torch"), *more])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return ended.value.code

    def read(self, name):
        return json.loads((self.folder / f"out/fake-200/{name}.json").read_text())

    def calls(self):
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []

    def break_(self, *programs):
        (self.folder / "broken").write_text("\n".join(programs))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return MakeBelieve(tmp_path, monkeypatch)


def test_no_gpu(machine, capsys):
    (machine.folder / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "no GPU is visible" in machine.run("check")
    assert not (machine.folder / "out").exists()


def test_check(machine):
    machine.break_("gpu-fp32/mslayernorm")
    assert machine.run("check") == 1
    found = machine.read("check")
    assert (found["gpu"], found["driver"], found["cuda"]) == ("NVIDIA Fake 200", "999.1", "13.0")
    by = {item["id"]: item for item in found["items"]}
    states = {key: item.get("status") for key, item in by.items()}
    failed = {key for key, state in states.items() if state == "failed"}
    assert failed == {"gpu-fp32 dev/cuda/mslayernorm", *[f"gpu-fp32 dev/cuda/mslayernorm {t}" for t in gpu.TOOLS],
                      "gpu-bf16 dev/cuda/regelu2 racecheck", "gpu-fp32 dev/cuda/regelu2 racecheck"}
    assert found["tests"] == {"passed": len(by) - len(failed) - 1, "failed": len(failed), "unfinished": 1}  # pytest wants build/
    assert by["gpu-bf16 test_gpt2"]["passed"] == 7
    race = by["gpu-bf16 dev/cuda/regelu2 racecheck"]
    assert race["named"] == ["act_backward_kernel"] and race["errors"] == 1 and "--small" in race["command"]
    assert "this program is broken" in by["gpu-fp32 dev/cuda/mslayernorm"]["output"][-1]

    # again: what passed is not run again
    before = len(machine.calls())
    machine.break_()
    assert machine.run("check") == 1
    again = machine.calls()[before:]
    assert {line.split(" ", 1)[0] + " " + line.split(" ")[1] for line in again if "--help" not in line} \
        == {"gpu-fp32 mslayernorm", "gpu-bf16 regelu2", "gpu-fp32 regelu2"}
    assert machine.read("check")["tests"]["failed"] == 2
    # but all of it where sources, GPU or driver are others; the old results stay beside
    smi = machine.folder / "bin/nvidia-smi"
    smi.write_text(smi.read_text().replace("999.1", "999.2"))
    before = len(machine.calls())
    machine.run("check")
    assert len(machine.calls()) - before > 20
    assert json.loads((machine.folder / "out/fake-200/check.json.before").read_text())["driver"] == "999.1"


def test_a_program_that_does_not_compile(machine, monkeypatch):
    monkeypatch.setenv("FAKE_DOES_NOT_COMPILE", "dev/cuda/regelu2.cu")
    assert machine.run("check") == 1
    by = {item["id"]: item for item in machine.read("check")["items"]}
    assert {key for key, item in by.items() if item.get("status") == "failed"} == {f"gpu-{p} dev/cuda/regelu2" for p in ("bf16", "fp32")}
    assert any("expected a semicolon" in line for line in by["gpu-bf16 dev/cuda/regelu2"]["output"])
    assert by["gpu-bf16 dev/cuda/regelu2 memcheck"]["skipped"] == "it was not built"
    assert by["gpu-bf16 test_gpt2"]["status"] == "ok"


def test_bench(machine, monkeypatch):
    first = [gpu.Want("124M", "fixed", m, 1) for m in (gpu.EXACT, gpu.FUSED, gpu.BOTH, gpu.EXACT_R1)]
    last = [gpu.Want("124M", "largest", gpu.BOTH, 1), gpu.Want("1558M", "fixed", gpu.ACT, 1)]
    for name, plan in (("BENCH", first + last), ("BENCH_FIRST", first), ("BENCH_NEXT", []), ("BENCH_SWEEPS", []), ("BENCH_LAST", last)):
        monkeypatch.setattr(gpu, name, plan)
    machine.break_("gpu-act-bf16/train_gpt2")
    assert machine.run("bench") == 1
    found = machine.read("bench")
    runs = {(e["model"], e["batch"], e["row"]): e for e in found["runs"]}
    exact = runs["124M", "fixed", "exact, -r 0"]
    assert (exact["program"], exact["mode"], exact["B"], exact["T"], exact["steps"], exact["timed_steps"]) == ("ours", "exact -r 0 -ge 0", 64, 1024, 30, 25)
    assert exact["ms"] == 11.0 and exact["tokens_per_s"] == pytest.approx(64 * 1024 / 0.011, rel=1e-6)  # the slow first five are not in it
    assert (exact["peak_bytes"], exact["peak_of"], exact["ledger_bytes"], exact["loss"], exact["mfu"]) == (2048 << 20, "process", 64 << 20, 5.5, 0.25)
    assert runs["124M", "fixed", "exact, -r 1"]["mode"] == "exact -r 1 -ge 2"  # the faster of the two
    largest = runs["124M", "largest", "USE_APPROXBP=1"]
    assert largest["B"] == 128 and "256" in largest["note"] and largest["timed_steps"] == 21
    broken = runs["1558M", "fixed", "APPROX_ACT=2"]
    assert "this program is broken" in broken["error"][-1] and "tokens_per_s" not in broken
    assert str(ROOT) not in exact["command"]

    kernels = machine.read("kernels")["programs"]
    assert [k["name"] for k in kernels] == gpu.kernel_programs() and kernels[0]["rows"][0]["gb_s"] == 4000
    profile = machine.read("profile")["runs"][0]
    assert profile["kernels"] == {"attention_forward_tc_kernel": {"calls": 1, "ms": 1.5005}, gpu.LIBRARY: {"calls": 2, "ms": 2.001},
                                  "adamw_kernel": {"calls": 1, "ms": 0.0005}}
    # again: what failed, and nothing else
    before = len(machine.calls())
    assert machine.run("bench") == 1
    assert [line.split()[0] for line in machine.calls()[before:] if "--estimate=json" not in line] == ["gpu-act-bf16"]
    assert machine.read("bench")["runs"][0] == found["runs"][0]


def test_out_of_time(machine, monkeypatch):
    monkeypatch.setattr(gpu.Clock, "left", lambda self: 8)
    assert machine.run("bench") == 0
    found = machine.read("bench")
    assert len(found["runs"]) == len(gpu.BENCH) and all("out of time" in e["skipped"] for e in found["runs"])
    assert not any("--log" in line for line in machine.calls())


def test_peers(machine, monkeypatch):
    plan = [gpu.Want("124M", "fixed", gpu.BOTH, 1), gpu.Want("124M", "fixed", gpu.EAGER, 1), gpu.Want("124M", "largest", gpu.EAGER, 1),
            gpu.Want("1558M", "largest", gpu.EAGER, 1), gpu.Want("124M", "fixed", gpu.LLMC_R1, 1)]
    monkeypatch.setattr(gpu, "PEERS", plan)
    llmc = machine.folder / "llmc"
    llmc.mkdir()
    (llmc / "train_gpt2cu").write_text("#!/bin/sh\nfor i in $(seq 30); do echo \"step $i/30 | loss 10.5 (+nanz)| norm 1.0 (+nanz)| lr 3.00e-04 | "
                                       "25.00 ms | 40.0% bf16 MFU | 99 tok/s\"; done\n")
    (llmc / "train_gpt2cu").chmod(0o755)
    assert machine.run("peers", "--llmc", str(llmc)) == 1
    found = machine.read("peers")
    runs = {(e["model"], e["batch"], e["row"]): e for e in found["runs"]}
    assert found["python"] == "Python 3, PyTorch 2"
    eager = runs["124M", "fixed", "PyTorch, eager"]
    assert (eager["program"], eager["B"], eager["ms"], eager["loss"]) == ("PyTorch, eager", 64, 20.0, 5.4)
    # by its memory 256 would fit; 256 and 128 did not
    assert [line.split("--batch ")[1].split()[0] for line in machine.calls() if line.startswith("torch")] == ["64", "256", "128"]
    assert "out of memory" in runs["124M", "largest", "PyTorch, eager"]["error"][-1]
    assert "skipped" in runs["1558M", "largest", "PyTorch, eager"]
    assert runs["124M", "fixed", "llm.c, -r 1"]["tokens_per_s"] == pytest.approx(64 * 1024 / 0.025)
    assert runs["124M", "fixed", "USE_APPROXBP=1"]["tokens_per_s"] > 0


def test_what_hangs_is_ended(machine):
    env = dict(os.environ)
    done = gpu.execute(["sh", "-c", "echo before; sleep 60 & sleep 60"], 1, env)
    assert done.timed_out and done.text == "before\n" and done.seconds < 10
    assert gpu.ending(done)[0].startswith("out of time")
    assert gpu.execute(["/no/such/program"], 1, env).status == 127


def test_memory_where_processes_are_not_listed():
    memory = gpu.DriverMemory.__new__(gpu.DriverMemory)
    memory.lock, memory.of = gpu.threading.Lock(), {}
    memory.used = memory.most = memory.before = 100 << 20
    assert memory.peak(1) == (None, None)
    for line in ("300", "[N/A]", "200"):
        memory.gpu_line(line)
    memory.process_line("7, [N/A]")
    assert memory.peak(7) == (200 << 20, "GPU")
    for line in ("7, 150", "7, 170", "7, 160", "8, 999"):
        memory.process_line(line)
    assert memory.peak(7) == (170 << 20, "process")


# ----------------------------------------------------------------------------
# the PyTorch side

@pytest.fixture(scope="module")
def torch_python():
    for path in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([path, "-c", "import torch"], capture_output=True).returncode == 0:
            return path
    return pytest.skip("Python's torch is not installed (Debian: python3-torch)")


def test_torch_baseline(torch_python, tmp_path):
    def run(*arguments, status=0):
        done = execute(torch_python, "-B", ROOT / "dev/bench/torch_baseline.py", "--device", "cpu", *arguments, cwd=tmp_path)
        assert done.status == status and "Traceback" not in done.err, done.err
        return done
    shape = ["--model", "gpt2:L2,H2,C32,T32,V257", "-b", 2, "-t", 16]
    ids = [3, 5, 7, 11] * 100
    (tmp_path / "t.bin").write_bytes(b"".join(n.to_bytes(4, "little") for n in (20240520, 1, len(ids), *[0] * 253))
                                     + b"".join(n.to_bytes(2, "little") for n in ids))
    found = json.loads(run(*shape, "-x", 12, "--warmup", 2, "--data", "t.bin", "--json").out.splitlines()[-1])
    assert (found["B"], found["T"], found["steps"], found["timed_steps"]) == (2, 16, 12, 10)
    assert found["parameters"] == 384 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert found["loss"] < 5.95 and found["tokens_per_s"] == pytest.approx(32 / found["ms"] * 1e3, rel=1e-3)  # log 384 is 5.95
    assert "tokens/s" in run(*shape, "-x", 2, "--parameters", "bf16").out
    for wrong in (["--model", "d13"], ["-t", "64"], ["-b", "0"]):
        assert wrong[1] in run(*shape, *wrong, status=2).err
    (tmp_path / "t.bin").write_bytes(b"x" * 2000)
    assert "t.bin" in run(*shape, "--data", "t.bin", status=1).err
