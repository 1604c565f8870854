"""What nvcc says of the trainers: no warning, and no kernel that spills registers. Compiled here, run nowhere."""
import re

import pytest

from helpers import NO_NVCC, ROOT, execute, nvcc, program

pytestmark = pytest.mark.skipif(not nvcc(), reason=NO_NVCC)
TARGETS = {"sm_80", "sm_89", "sm_90"}


def build_log(variant, name):
    program(variant, name)
    return (ROOT / f"build/{variant}/{name}.log").read_text()


@pytest.mark.parametrize("variant", ["nvcc-bf16", "nvcc-fp32", "nvcc-approxbp-bf16"])
def test_no_kernel_spills(variant):
    log = build_log(variant, "train_gpt2")
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+\w*)'", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    entries = len(re.findall(r"__global__", (ROOT / "train_gpt2.cu").read_text()))
    assert {target for _, target in kernels} == TARGETS
    assert len(kernels) >= 3 * 0.8 * entries, "fewer kernels than the source has: is this log whole?"
    assert len(spills) >= len(kernels)
    assert [s for s in spills if s != ("0", "0")] == [], [line for line in log.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]


@pytest.mark.parametrize("variant", ["nvcc-bf16", "nvcc-fp32"])
def test_no_warning(variant):
    log = build_log(variant, "train_gpt2")
    assert [line for line in log.splitlines() if re.search(r"warning|error", line, re.I)] == []


def test_nvcc_takes_the_check_of_numbers(tmp_path):
    """test_gpt2 has the trainer's kernels, so for one architecture, and not linked."""
    done = execute(nvcc(), "-O3", "-std=c++17", "-arch=sm_90", "-c", "-Xcompiler", "-fsyntax-only", "test_gpt2.cu", "-o", tmp_path / "x.o", cwd=ROOT,
                   timeout=300)
    assert (done.status, done.out, done.err) == (0, "", "")


def test_attention_runs_on_tensor_cores(tmp_path):
    """Heads of 64 and 128 channels: products by mma.sync from ldmatrix, tiles by cp.async, nothing in local memory."""
    done = execute(nvcc(), "-ptx", "-O3", "-std=c++17", "-arch=compute_80", "train_gpt2.cu", "-o", tmp_path / "x.ptx", cwd=ROOT, timeout=300)
    assert done.status == 0, done.err
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", (tmp_path / "x.ptx").read_text(), re.S))
    kernels = [name for name in entries if re.search(r"attention_\w+_tc_kernel", name)]
    assert len(kernels) == 6, kernels
    for name in kernels:
        body = entries[name]
        for instruction in ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "ldmatrix.sync.aligned.m8n8.x4.shared",
                            "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "cp.async.cg.shared.global", "cp.async.wait_all", "ex2.approx"):
            assert instruction in body, (name, instruction)
        assert ".local" not in body, name


def test_the_plain_command(tmp_path):
    """The file alone, in an empty folder, with the command that its first lines and the README give."""
    (tmp_path / "train_gpt2.cu").write_bytes((ROOT / "train_gpt2.cu").read_bytes())
    done = execute(nvcc(), "-O3", "-std=c++17", "-arch=sm_90", "train_gpt2.cu", "-lcublas", "-lcublasLt", "-o", "train_gpt2", cwd=tmp_path, timeout=300)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert (tmp_path / "train_gpt2").exists()
