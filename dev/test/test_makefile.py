"""The Makefile, on a program of one line in place of the trainer; and the rule that a trainer is one file."""
import os
import re
import shutil
import sys
import time

import pytest

from helpers import ROOT, execute

@pytest.fixture
def tree(tmp_path):
    """The Makefile, the CPU backend, and two programs that build in no time. make() runs there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "dev/cpu", tmp_path / "dev/cpu", ignore=shutil.ignore_patterns("test", "__pycache__"))
    (tmp_path / "train_gpt2.cu").write_text("#ifndef FP32\n#define FP32 0\n#endif\n#include <stdio.h>\n"
                                            "#ifndef TESTING\nint main() { printf(\"fp32 %d\\n\", FP32); }\n#endif\n")
    (tmp_path / "test_gpt2.cu").write_text("#define TESTING\n#include \"train_gpt2.cu\"\nint main() { printf(\"test\\n\"); }\n")

    def make(*arguments, status=0):
        done = execute("make", *arguments, cwd=tmp_path, timeout=200, env={"CXXFLAGS": "-O0"})
        assert status is None or done.status == status, done.out + done.err
        return done
    make.folder = tmp_path
    return make

def says(tree, program):
    return execute(tree.folder / program, cwd=tree.folder).out.strip()

def up_to_date(tree, *arguments):
    """make -q: 0 if there is nothing to do, 1 if there is."""
    return {0: True, 1: False}[tree("-q", *arguments, status=None).status]

def touch(tree, *names):
    """As if they had been written a little later than all that was written before."""
    later = time.time() + 5
    for name in names:
        os.utime(tree.folder / name, (later, later))

def test_help(tree):
    text = tree().out
    assert text == tree("help").out and not list(tree.folder.glob("build*"))
    for word in "setup setup-test demo test quick twins clean train_gpt2 test_gpt2 dev/cuda/NAME".split():
        assert re.search(rf"^make {word}\b", text, re.M), word
    flags = re.search(r"^FLAG_NAMES := (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert len(flags) > 15 and [flag for flag in flags if not re.search(rf"^ *{flag}=", text, re.M)] == []

def test_builds_and_rebuilds(tree):
    flags = ["train_gpt2", "test_gpt2", "CPU=1"]
    assert not up_to_date(tree, *flags)
    tree(*flags)
    assert says(tree, "train_gpt2") == "fp32 0" and says(tree, "test_gpt2") == "test" and up_to_date(tree, *flags)
    for changed in (["PRECISION=FP32"], ["CXXFLAGS=-DX='\"a, b\"'"], ["SAN=1"]):
        assert not up_to_date(tree, *flags, *changed), changed
    fp32 = [*flags, "PRECISION=FP32"]
    tree(*fp32)
    assert says(tree, "train_gpt2") == "fp32 1" and up_to_date(tree, *fp32) and not up_to_date(tree, *flags)
    for source in ("train_gpt2.cu", "dev/cpu/cu2cpp.py"):
        touch(tree, source)
        for program in ("train_gpt2", "test_gpt2"):   # which includes the trainer
            assert not up_to_date(tree, program, *fp32[2:]), (source, program)
        touch(tree, "train_gpt2", "test_gpt2")
        assert up_to_date(tree, *fp32)
    tree("clean")
    assert not any((tree.folder / name).exists() for name in ("build", "train_gpt2", "test_gpt2")) and (tree.folder / "train_gpt2.cu").exists()

def test_variants_side_by_side(tree):
    before = set(tree.folder.iterdir())
    tree("-j2", "train_gpt2", "test_gpt2", "CPU=1", "BUILD=one")
    tree("train_gpt2", "CPU=1", "BUILD=two/deep/", "PRECISION=FP32")
    assert says(tree, "one/train_gpt2") == "fp32 0" and says(tree, "two/deep/train_gpt2") == "fp32 1"
    assert set(tree.folder.iterdir()) - before == {tree.folder / "one", tree.folder / "two"}
    assert up_to_date(tree, "train_gpt2", "test_gpt2", "CPU=1", "BUILD=one")

def test_a_build_that_fails_leaves_no_old_program(tree):
    tree("train_gpt2", "CPU=1")
    (tree.folder / "train_gpt2.cu").write_text("int main() { return wrong; }\n")
    touch(tree, "train_gpt2.cu")
    assert "train_gpt2.cu:1" in tree("train_gpt2", "CPU=1", status=2).err
    assert not (tree.folder / "train_gpt2").exists()

def test_a_build_that_cannot_begin_leaves_the_old_program(tree, monkeypatch):
    """Tools are hidden by a PATH that has all the others."""
    tree("train_gpt2", "CPU=1")
    for i, (flags, hidden) in enumerate([(["CPU=0", "NVCC="], ""), (["CPU=0", "NVCC=/no/nvcc"], ""), (["CPU=0", "NVCC=true"], "g++"), (["CPU=1"], "g++"),
                                         (["CPU=1"], "python3"), (["MULTI_GPU=1"], "mpicxx"), (["CPU=2"], ""), (["PRECISON=FP32"], "")]):
        monkeypatch.setenv("PATH", str(path_without(tree.folder / f"bin{i}", hidden)))
        assert tree("-W", "train_gpt2.cu", "train_gpt2", *flags, status=2).err and says(tree, "train_gpt2") == "fp32 0", (flags, hidden)

def path_without(folder, *hidden):
    folder.mkdir()
    for tool in "bash sh make python3 g++ as ld rm mkdir printf grep dirname uname nproc cat true mpicxx id tail sed head cut".split():
        if tool not in hidden and shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))
    return folder

@pytest.mark.parametrize("flags, said", [
    *[([f"PRECISION={value}"], "BF16 or FP32") for value in ("FP16", "", "BF16 FP32", "fp32")], (["APPROX_ACT=5"], "one of 0 1 2 3 4"),
    (["ARCH=80 75", "CPU=0", "NVCC=nvcc"], "compute capability 75, expected 80 or more"), (["APPROX_FIT=h"], "function or slope"), (["APPROX_ACT=3", "APPROX_FIT=slope"], "expected APPROX_ACT=2"),
    *[([flag], "0 or 1") for flag in ("CPU=2", "SAN=yes", "MULTI_GPU=2", "PTXAS=v", "USE_APPROXBP=2", "MS_NORM=2")],
    *[([f"BUILD={name}"], "a folder of its own") for name in (".", "./", "..", "/")],
    *[([f"BUILD={name}"], "without spaces") for name in ("my build", "a\tb", "a$b", "a#b", "a%", "a=b", "a;b", "a'b", 'a"b', "a\\b", "a*", "a(b", "-x", "~/x")],
    (["PRECISON=FP32"], "unknown flag PRECISON: expected one of"), (["SAN=1", "CPU=0"], "expected CPU=1"), (["PTXAS=1", "CPU=1"], "expected CPU=0"),
    (["ARCH=sm_90", "CPU=0"], "without the dot"), (["ARCH=8.0", "CPU=0"], "without the dot"), (["CPU=0", "NVCC="], "CUDA Toolkit")], ids=str)
def test_bad_flags(tree, flags, said):
    done = tree("train_gpt2", *flags, status=2)
    assert flags[0].split("=")[0] in done.err and said in done.err
    assert not (tree.folder / "train_gpt2").exists()

def commands(tree, *arguments):
    """What would be called; needs no nvcc."""
    return tree("-n", "train_gpt2", "NVCC=nvcc", *arguments).out

def test_gpu_commands(tree):
    default = commands(tree, "CPU=0", "ARCH=80 89 90")
    for part in ("-O3", "-std=c++17", "-lineinfo", "--threads 0", "code=sm_80", "code=sm_89", "code=sm_90", "-lcublasLt"):
        assert part in default, part
    assert "-lcublas" not in default.split() and "use_fast_math" not in default and "FP32" not in default
    one = commands(tree, "CPU=0", "ARCH=90", "PRECISION=FP32", "PTXAS=1", "NVCCFLAGS=-DMORE")
    assert "sm_80" not in one and "--threads" not in one and all(part in one for part in ("-DFP32=1", "-Xptxas -v", "-DMORE"))

@pytest.mark.parametrize("capabilities, chosen", [(["9.0", "9.0"], ["sm_90"]), (["8.9", "12.0"], ["sm_89", "sm_120"]), ([], [])])
def test_visible_gpus_decide(tree, monkeypatch, capabilities, chosen):
    (tree.folder / "bin").mkdir()
    lines = "\n".join(f"GPU {i}: NVIDIA" for i, _ in enumerate(capabilities)) or "No devices were found"
    script = f"#!/bin/sh\ncase $1 in -L) echo '{lines}';; *) echo '" + "\n".join(capabilities) + "';; esac\n"
    (tree.folder / "bin/nvidia-smi").write_text(script)
    (tree.folder / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tree.folder}/bin:{os.environ['PATH']}")
    found = commands(tree)
    assert set(re.findall(r"code=(\w+)", found)) == set(chosen) and ("nvcc -O3" in found) == bool(chosen) and "g++" in commands(tree, "CPU=1")
    if not chosen:   # builds for the CPU, and says so; for a GPU when told to, of any kind
        assert "No GPU is visible" in tree("train_gpt2", "NVCC=nvcc").out and (tree.folder / "build/train_gpt2.cpp").exists()
        assert "No GPU" not in tree("train_gpt2", "CPU=1", "BUILD=quiet").out
        assert set(re.findall(r"code=(\w+)", commands(tree, "CPU=0"))) == {"sm_80", "sm_89", "sm_90", "compute_90"}

# ---- what is installed, and by whom --------------------------------------------------------------

@pytest.fixture
def somebody(tree, monkeypatch):
    """make as somebody who is not root, with these tools besides; apt-get, sudo and Python write down what they are called with."""
    folder = path_without(tree.folder / "bin", "python3")
    monkeypatch.setenv("PATH", str(folder))
    scripts = {"id": "echo 1000", "apt-get": "exit 100", "python3": 'case "$*" in *numpy*|*ensurepip*|*torch*) exit 1;; esac'}

    def make(*arguments, status=0, **more):
        for name, script in {**scripts, **more}.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tree.folder}/calls\n{script}\n')
            (folder / name).chmod(0o755)
        done = tree(*arguments, f"PYTHON={folder}/python3", status=status)
        done.calls = (tree.folder / "calls").read_text()
        return done
    return make

def test_without_root_one_line_says_what_to_install(somebody):
    """What we can do without is said, and skipped."""
    for sudo in ({}, {"sudo": "exit 1"}):
        done = somebody("setup-test", status=2, **sudo)
        lines = [line for line in done.err.splitlines() if not line.startswith("make")]
        assert len(lines) == 1 and "root must run: apt-get install python3-numpy" in lines[0] and "python3-venv" in lines[0], done.err
        assert "python3-torch" in lines[0] and "apt-get -qq" not in done.calls and done.out == ""
    done = somebody("setup-test", python3='case "$*" in *ensurepip*|*torch*) exit 1;; esac')
    assert re.fullmatch(r"Tests that need these are skipped: no sudo here; root must run: apt-get install python3-venv .*python3-torch.*\n", done.out), done.out

def test_what_apt_does_not_know_is_left_out(somebody):
    done = somebody("setup-test", sudo='case "$1" in -*) exit 0;; esac; "$@"',
                    **{"apt-get": 'case "$*" in *-s*torch) exit 100;; esac', "env": 'shift; exec "$@"'})
    install = [line for line in done.calls.splitlines() if line.startswith("apt-get") and " install " in line and " -s " not in line]
    assert len(install) == 1 and "python3-numpy" in install[0] and "python3-venv" in install[0] and "torch" not in install[0], done.calls

def test_pips_reason_is_shown(tree, somebody):
    venv = tree.folder / "build/venv/bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text("#!/bin/sh\ncase \"$*\" in *version*check*) echo WARNING: x; echo 'ERROR: No matching distribution for it'; exit 1;; *import*) exit 1;; esac\n")
    (venv / "python").chmod(0o755)
    done = somebody("setup-test", python3="exit 0")
    assert done.out.count("pip could not install") == done.out.count(": No matching distribution for it") >= 3, done.out

@pytest.mark.parametrize("target, given", [("test", "TESTS=dev/test/nowhere.py"), ("quick", "TESTS=dev/cpu/nowhere"), ("demo", "TEXT=nowhere.txt"),
                                           ("demo", "TEXT=Makefile no where"), ("demo", "TEXT=dev"), ("demo", "TEXT='x"), ("demo", "TEXT=no*.txt")])
def test_what_is_not_there_is_said_before_anything_is_built(tree, monkeypatch, target, given):
    for name, script in (("id", "echo 1000"), ("sudo", "exit 1")):  # installs nothing
        (tree.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (tree.folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tree.folder}:{os.environ['PATH']}")
    shutil.copytree(ROOT / "dev/bench", tree.folder / "dev/bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tree.folder / "build/venv/bin").mkdir(parents=True)
    (tree.folder / "build/venv/bin/python").write_text(f'#!/bin/sh\ncase "$*" in *pip*|*import*) exit 0;; esac\nexec {sys.executable} "$@"\n')
    (tree.folder / "build/venv/bin/python").chmod(0o755)
    done = tree(target, given, status=2)
    assert given.split("=")[0] in done.err and not re.search("[Bb]uilding", done.out + done.err), done.out + done.err
    assert [p.name for p in (tree.folder / "build").iterdir()] == ["venv"]

# ----------------------------------------------------------------------------

@pytest.mark.parametrize("trainer", sorted(ROOT.glob("train_*.cu")), ids=lambda path: path.name)
def test_a_trainer_is_one_file(trainer):
    included = re.findall(r'^\s*#\s*include\s*(.*)', trainer.read_text(), re.M)
    assert included and [name for name in included if not name.startswith("<")] == []
    names = {p.name for folder in ("dev", "prepro") for p in (ROOT / folder).rglob("*") if p.suffix in (".h", ".cuh") and "cpu" not in p.parts}
    assert not names & {name.strip("<>") for name in included}

def test_continuous_integration_is_make_test():
    assert os.access(ROOT / ".ci/run", os.X_OK) and "make test" in (ROOT / ".ci/run").read_text()
