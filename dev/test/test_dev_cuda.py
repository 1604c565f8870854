"""The kernels of dev/cuda against double precision: on the CPU backend in three orders of threads, with equal bits, and once with
sanitizers; compiled by nvcc where that is installed. Programs are built into build/dev_cuda.
"""
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import sys

import pytest

from helpers import NO_NVCC, ROOT, execute, nvcc

sys.path.insert(0, str(ROOT / "dev/bench"))
import l2  # noqa: E402
import traffic  # noqa: E402

OUT = ROOT / "build/dev_cuda"
NAMES = sorted(path.stem for path in (ROOT / "dev/cuda").glob("*.cu"))
PRECISIONS = {"bf16": 0, "fp32": 1}
BOTH = [(name, precision) for name in NAMES for precision in PRECISIONS]
ORDERS = {"forward": {}, "reverse": {}, "priority": {"SIMT_SEED": 1, "OMP_NUM_THREADS": 2}}   # the last on two threads

# ---- building, all of it at once on two cores, as soon as the first test wants something -----------

@functools.lru_cache(None)
def make_variable(name):
    makefile = f"include dev/cpu/cpu.mk\nshow:\n\t@echo $({name})\n"
    return subprocess.run(["make", "-s", "-f", "-", "show"], input=makefile, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE).stdout.split()

def build_cpu(name, precision, san):
    """A warning is an error. -fwhole-program: what a file does not use of the trainer is not compiled, which is most of it. -O1
    takes half the time to compile that `make`'s -O3 takes, and with sanitizers -Og two thirds of what -O1 takes."""
    program = OUT / f"{name}-{precision}{'-san' if san else ''}"
    done = execute(*make_variable("CPU_TRANSLATE"), f"dev/cuda/{name}.cu", "-o", f"{program}.cpp", cwd=ROOT)
    if done.status == 0:
        flags = make_variable("CPU_CXXFLAGS") + (make_variable("CPU_SANFLAGS") + ["-Og"] if san else ["-O1"])
        done = execute(*make_variable("CPU_CXX"), *flags, "-Werror", "-fwhole-program", f"-DFP32={PRECISIONS[precision]}", f"{program}.cpp",
                       "-o", program, *make_variable("CPU_LDLIBS"), cwd=ROOT, timeout=600)
    return done, program

def build_gpu(name):
    """The kernels' PTX, and little care for it, which is a third of the time. What ptxas makes of the trainer's own is looked at in
    test_ptxas.py, and the rest is compiled for the CPU."""
    return execute(nvcc(), "-Xcicc", "-O0", "-std=c++17", "-arch=sm_90", "-ptx", "-Idev/cuda", f"dev/cuda/{name}.cu", "-o", OUT / f"{name}.ptx", cwd=ROOT, timeout=600)

def build_and_run(name, precision, san=False):
    """A build, and {which run: what it said} in each order (fp32: in the first and the last), and in bf16 with another seed."""
    done, program = build_cpu(name, precision, san)
    if done.status != 0:
        return done, {}
    if san:
        return done, {"san": run(program)}
    runs = {order: run(program, SIMT_ORDER=order, **env) for order, env in ORDERS.items() if precision == "bf16" or order != "reverse"}
    if precision == "bf16":
        runs.update(seed=run(program, "--seed", 7), bench=run(program, "--bench"), json=run(program, "--json"))
    return done, runs

@pytest.fixture(scope="module")
def runs():
    """runs(name, precision, or san, or nvcc): its runs, or the build by nvcc. All is built and run on all cores, as soon as the first
    test wants something."""
    OUT.mkdir(parents=True, exist_ok=True)
    make_variable("CPU_CXX")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {(name, precision): pool.submit(build_and_run, name, precision) for name, precision in BOTH}
        jobs.update({(name, "san"): pool.submit(build_and_run, name, "bf16", True) for name in NAMES})
        jobs.update({(name, "nvcc"): pool.submit(build_gpu, name) for name in NAMES if nvcc()})

        def of(name, what):
            result = jobs[name, what].result()
            done, runs = result if what != "nvcc" else (result, result)
            assert done.status == 0, done.out + done.err
            return runs
        yield of

def run(program, *arguments, **env):
    return execute(program, *arguments, cwd=ROOT, env={"OMP_NUM_THREADS": 1, **env}, timeout=600)

# ----------------------------------------------------------------------------

@pytest.mark.parametrize("name,precision", BOTH)
def test_in_every_order(runs, name, precision):
    """What is printed has every error that was found and a digest of every result: all of it is the same in any order."""
    of = runs(name, precision)
    orders = [order for order in ORDERS if order in of]
    for order in orders:
        assert of[order].status == 0, f"{order}\n{of[order].out}{of[order].err}"
        assert re.search(r"^checksum [0-9a-f]{16} \(seed 1337\)\nall is well$", of[order].out, re.M), of[order].out
    assert len(orders) > 1 and len({of[order].out for order in orders}) == 1, [of[order].out for order in orders]

@pytest.mark.parametrize("name", NAMES)
def test_with_sanitizers(runs, name):
    done = runs(name, "san")["san"]
    assert (done.status, done.err) == (0, ""), done.out[-500:] + done.err

@pytest.mark.parametrize("name", NAMES)
def test_another_seed(runs, name):
    """Other numbers; the digest tells that they are others."""
    of = runs(name, "bf16")
    assert of["seed"].status == 0 and "(seed 7)" in of["seed"].out, of["seed"].out
    assert of["seed"].out.splitlines()[-2].split()[1] != of["forward"].out.splitlines()[-2].split()[1]

BYTES = {"layernorm": {"forward, version 1": 14, "forward, version 2: the": 8, "backward, version 1": 26, "backward, version 2: the": 8,
                       "unfold": 10},
         "classifier": {"loss, version 3": 2, "loss and gradient, version 3": 4},
         "optimizer": {"norm, version 2: the trainer's, added up by a kernel, fp32": 4, "AdamW, version 1": 22, "AdamW, version 2: the": 22,
                       "AdamW, version 2 with a master copy, gradients": 30},
         "gelu": {"forward, version 1": 8, "forward, version 2": 4, "2 bits: forward, version 2": 4.25, "backward, version 1": 8,
                  "backward, version 2": 6, "2 bits: backward, version 2": 4.25},
         "nf4": {"version 1": 8.562, "version 2: the": 2.562, "version 2, double": 2.516, "dropout, version 1": 6, "dropout, version 2: the": 4},
         "rmsnorm": {"forward, version 1": 12, "forward, version 2: the": 8, "backward, version 1": 24, "backward, version 2: the": 8},
         "rope": {"version 2": 4},
         "swiglu": {"forward, version 1": 10, "forward, version 2": 6, "2 bits: forward, version 2": 8.25, "backward, version 1": 18,
                    "backward, version 2": 10, "2 bits: backward, version 2": 10.25, "2 bits: h once more": 6}}

@pytest.mark.parametrize("name", NAMES)
def test_bench_without_a_gpu(runs, name):
    """Bytes or flops, and no times, for both models; the same as JSON."""
    of = runs(name, "bf16")
    text = of["bench"].out
    assert of["bench"].status == of["json"].status == 0, of["bench"].err + of["json"].err
    assert "Times mean nothing" in text and not re.search(r"GB/s|TFLOP/s|\bms\b", text)
    assert ("124M" in text and "1558M" in text) or ("135M" in text and "8B" in text)
    rows = [json.loads(line) for line in of["json"].out.splitlines()]
    printed = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("  ") and re.search(r" [\d.]+$", line)]
    assert len(rows) == len(printed) >= 4
    for row, value in zip(rows, printed):
        assert row["program"] == f"{name}-bf16" and set(row) - {"bytes_per_element", "flops_per_element"} == {"program", "case", "version"}
        assert row.get("bytes_per_element", row.get("flops_per_element")) == pytest.approx(value, rel=0.01) and value > 0
    for row, count in BYTES.get(name, {}).items():
        found = [r["bytes_per_element"] for r in rows if r["version"].startswith(row) and "bytes_per_element" in r]
        assert found == [count, count], (row, found)

@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_a_table_of_it(name):
    assert f"`{name}.cu`" in (ROOT / "dev/cuda/README.md").read_text()

def test_attention_over_1000_positions(runs):
    """All of it, where the usual run takes the blocks with the most to do."""
    runs("attention", "bf16")
    done = run(OUT / "attention-bf16", "--large")
    assert done.status == 0 and "all is well" in done.out, done.out + done.err

def test_arguments(runs):
    runs(NAMES[0], "bf16")
    program = OUT / f"{NAMES[0]}-bf16"
    assert run(program, "--help").status == 0
    for wrong in (["--sede", "1"], ["--seed"], ["--seed", "x"]):
        done = run(program, *wrong)
        assert done.status == 2 and wrong[0] in done.err and "expected" in done.err

@pytest.mark.skipif(not nvcc(), reason=NO_NVCC)
@pytest.mark.parametrize("name", NAMES)
def test_nvcc(runs, name):
    """No warning."""
    done = runs(name, "nvcc")
    assert done.status == 0 and done.out + done.err == "", done.out + done.err

# ---- the order of attention's blocks ---------------------------------------------------------------

H100 = l2.GPUS["H100, H200"]
GPT2 = l2.Shape(64, 1024, 12, 12, 64)

def simulated(launch, shape, gpu=H100):
    result = l2.simulate(launch, shape, gpu.sms * l2.blocks(launch.kernel, shape.HS, gpu.arch), gpu.usable)
    print(f"{tuple(shape)} {launch.kernel}: tiles are read {result.read / result.once:.2f} times, makespan/ideal {result.makespan:.3f}")
    return result.read / result.once, result.makespan

def all_heads_at_once(launch):
    """The longest blocks of all heads, then the next ones: best for the makespan, worst for the cache."""
    return launch._replace(order=sorted(launch.order, key=lambda block: block[1] if launch.kernel == "dkv" else -block[1]))

@pytest.mark.parametrize("gpu", l2.GPUS)
def test_attention_reads_tiles_once(runs, gpu):
    """k and v (dkv: q and dout) of a layer of GPT-2 124M; a little more often where the cache is small, or smaller than the driver says."""
    runs("attention", "bf16")
    gpu = l2.GPUS[gpu]
    for launch in l2.orders(OUT / "attention-bf16", GPT2, gpu.l2):
        assert len(set(launch.order)) == len(launch.order) == 64 * 12 * -(-1024 // launch.rows)
        times, makespan = simulated(launch, GPT2, gpu)
        assert times <= (1.3 if gpu.usable >= 40 else 1.5) and makespan <= (1.03 if gpu.l2 >= 50 else 1.1)
        if gpu is H100:
            assert abs(times - traffic.AGAIN[launch.kernel]) < 0.05
            times, makespan = simulated(all_heads_at_once(launch), GPT2)
            assert times > 4 and makespan < 1.03, "the simulation does not see what the order is for"

# Few heads, or few that fit the cache: then some multiprocessors are idle at the end whatever the order, and the makespan is held
# against the best order's.
@pytest.mark.parametrize("shape", [(4, 1024, 12, 12, 64), (1, 1024, 12, 12, 64), (8, 1024, 25, 25, 64), (4, 8192, 12, 12, 64), (1, 32768, 4, 4, 64),
                                   (8, 2048, 32, 8, 128), (1, 8192, 32, 8, 128), (2, 1000, 12, 12, 64)])
def test_attention_order_of_other_shapes(runs, shape):
    runs("attention", "bf16")
    shape = l2.Shape(*shape)
    for launch in l2.orders(OUT / "attention-bf16", shape, H100.l2):
        assert len(set(launch.order)) == len(launch.order) and {first % launch.rows for _, first in launch.order} == {0}
        times, makespan = simulated(launch, shape)
        _, best = simulated(all_heads_at_once(launch), shape)
        assert times <= 1.3 and makespan <= 1.1 * best
