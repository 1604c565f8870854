"""The kernels of dev/cuda against double precision: on the CPU backend in four orders of threads, with equal bits, and once with
sanitizers; compiled by nvcc where that is installed. Programs are built into $BUILD/dev_cuda (default: build).
"""
import concurrent.futures
import functools
import os
import re
import subprocess

import pytest

from helpers import ROOT, execute, nvcc

OUT = ROOT / os.environ.get("BUILD", "build") / "dev_cuda"
NAMES = ["regelu2", "mslayernorm"]
PRECISIONS = {"bf16": 0, "fp32": 1}
BOTH = [(name, precision) for name in NAMES for precision in PRECISIONS]
ORDERS = {"forward": {}, "reverse": {}, "priority1": {"SIMT_SEED": 1}, "priority2": {"SIMT_SEED": 2}}


# ----------------------------------------------------------------------------
# building, all of it at once on two cores, as soon as the first test wants something

@functools.lru_cache(None)
def make_variable(name):
    makefile = f"include dev/cpu/cpu.mk\nshow:\n\t@echo $({name})\n"
    done = subprocess.run(["make", "-s", "-f", "-", "show"], input=makefile, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE)
    return done.stdout.split()


def build_cpu(name, precision, san):
    """A warning is an error. -fwhole-program: what a file does not use of the trainer is not compiled, which is most of it. One
    precision is built as `make` builds, the other with -O1, in half the time."""
    program = OUT / f"{name}-{precision}{'-san' if san else ''}"
    done = execute(*make_variable("CPU_TRANSLATE"), f"dev/cuda/{name}.cu", "-o", f"{program}.cpp", cwd=ROOT)
    if done.status == 0:
        flags = make_variable("CPU_CXXFLAGS") + (make_variable("CPU_SANFLAGS") if san else ["-O1"] if precision == "fp32" else [])
        done = execute(*make_variable("CPU_CXX"), *flags, "-Werror", "-fwhole-program", f"-DFP32={PRECISIONS[precision]}", f"{program}.cpp",
                       "-o", program, *make_variable("CPU_LDLIBS"), cwd=ROOT, timeout=300)
    return done, program


def build_gpu(name, precision):
    """What nvcc makes of the kernels, and for bf16 whether g++ takes what nvcc makes of the rest; neither is linked, to save time."""
    program = OUT / f"{name}-{precision}-nvcc"
    last = ["-cubin"] if precision == "fp32" else ["-c", "-Xcompiler", "-fsyntax-only"]
    return execute(nvcc(), "-O3", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", f"-DFP32={PRECISIONS[precision]}", "-Idev/cuda",
                   f"dev/cuda/{name}.cu", "-o", program, *last, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def builds():
    """{key: future}: tests begin while others still compile."""
    OUT.mkdir(parents=True, exist_ok=True)
    make_variable("CPU_CXX")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {(name, precision): pool.submit(build_cpu, name, precision, False) for name, precision in BOTH}
        jobs.update({(name, "san"): pool.submit(build_cpu, name, "bf16", True) for name in NAMES})
        if nvcc():
            jobs.update({(name, precision, "nvcc"): pool.submit(build_gpu, name, precision) for name, precision in BOTH})
        yield jobs


def built(builds, *key):
    done, program = builds[key].result()
    assert done.status == 0, done.out + done.err
    return program


@functools.lru_cache(None)
def run_cached(program):
    return run(program)


def run(program, *arguments, **env):
    return execute(program, *arguments, cwd=ROOT, env={"OMP_NUM_THREADS": 1, **env}, timeout=120)


# ----------------------------------------------------------------------------

@pytest.mark.parametrize("name,precision", BOTH)
def test_in_every_order(builds, name, precision):
    """What is printed has every error that was found and a digest of every result: all of it is the same in any order."""
    program = built(builds, name, precision)
    printed = {}
    for order, env in ORDERS.items():
        done = run_cached(program) if order == "forward" else run(program, SIMT_ORDER=order.rstrip("12"), **env)
        assert done.status == 0, f"{order}\n{done.out}{done.err}"
        assert re.search(r"^checksum [0-9a-f]{16} \(seed 1337\)\nall is well$", done.out, re.M), done.out
        printed[order] = done.out
    assert len(set(printed.values())) == 1, printed


@pytest.mark.parametrize("name", NAMES)
def test_with_sanitizers(builds, name):
    done = run(built(builds, name, "san"))
    assert (done.status, done.err) == (0, ""), done.out[-500:] + done.err


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_another_seed(builds, name):
    """Blocks on two threads, and other numbers; the digest tells that they are others."""
    program = built(builds, name, "bf16")
    one, two = (run(program, "--seed", 7, OMP_NUM_THREADS=n) for n in (1, 2))
    assert one.status == two.status == 0, one.out + two.out
    assert one.out == two.out and "(seed 7)" in one.out
    assert one.out.splitlines()[-2].split()[1] != run_cached(program).out.splitlines()[-2].split()[1]


BYTES = {"regelu2": {"forward, exact": 4, "forward, version 3": 4.25, "backward, exact": 6, "backward, version 3": 4.25},
         "mslayernorm": {"backward, version 2": 8, "backward, version 3": 8}}


@pytest.mark.parametrize("name,rows", BYTES.items(), ids=NAMES)
def test_bench_without_a_gpu(builds, name, rows):
    """Bytes, and no times."""
    done = run(built(builds, name, "bf16"), "--bench")
    assert done.status == 0 and "Times mean nothing" in done.out and "GB/s" not in done.out
    for row, count in rows.items():
        found = [float(line.split()[-1]) for line in done.out.splitlines() if line.strip().startswith(row)]
        assert found == [count, count], (row, found)


def test_arguments(builds):
    program = built(builds, "regelu2", "bf16")
    assert run(program, "--help").status == 0
    for wrong in (["--sede", "1"], ["--seed"], ["--seed", "x"]):
        done = run(program, *wrong)
        assert done.status == 2 and wrong[0] in done.err and "expected" in done.err


@pytest.mark.skipif(not nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize("name,precision", BOTH)
def test_nvcc(builds, name, precision):
    """No warning, and no kernel that spills registers."""
    done = builds[name, precision, "nvcc"].result()
    said = done.out + done.err
    assert done.status == 0, said
    assert [line for line in said.splitlines() if re.search("warning|error", line, re.I)] == []
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) > 30 and set(spills) == {("0", "0")}, said
