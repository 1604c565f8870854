"""What nvcc makes of the trainer: no warning, no kernel that spills registers, 16 bytes a load. Compiled here, run nowhere."""
import functools
import re
import sys

import pytest

import ptx
from helpers import NO_NVCC, ROOT, execute, nvcc, program, write_tokens

sys.path.insert(0, str(ROOT / "dev/bench"))
import l2  # noqa: E402
import occupancy  # noqa: E402

pytestmark = pytest.mark.skipif(not nvcc(), reason=NO_NVCC)
each_variant = pytest.mark.parametrize("variant", ["nvcc-bf16", "nvcc-approxbp-bf16", "fp32"])

@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(variant): what nvcc said, and its PTX for sm_80. The first two are built by `make variants`, for all architectures; fp32
    here, for one: test_gpt2, which has all of the trainer, so that nvcc has seen the test too."""
    @functools.lru_cache(None)
    def of(variant):
        if variant != "fp32":
            program(variant)
            folder = ROOT / f"build/{variant}"
            return (folder / "train_gpt2.log").read_text(), (folder / "train_gpt2.compute_80.ptx").read_text()
        folder = tmp_path_factory.mktemp("fp32")
        done = execute(nvcc(), "-cubin", "-O3", "-std=c++17", "-arch=sm_80", "-DFP32=1", "-Xptxas", "-v", "--keep", "--keep-dir", folder, "test_gpt2.cu",
                       "-o", folder / "x.cubin", cwd=ROOT, timeout=600)
        assert done.status == 0, done.err
        return done.out + done.err, next(folder.glob("*.ptx")).read_text()
    return of

# ---- registers -------------------------------------------------------------------------------------

@each_variant
def test_no_kernel_spills(build, variant):
    """And nvcc has no warning."""
    log = build(variant)[0]
    assert [line for line in log.splitlines() if re.search(r"warning|error", line, re.I)] == []
    used = occupancy.read_log(log)
    entries = len(re.findall(r"__global__", trainer()))
    assert {target for _, target in used} == ({"sm_80"} if variant == "fp32" else set(occupancy.LIMITS))
    for target in {target for _, target in used}:
        assert sum(t == target for _, t in used) >= 0.8 * entries, "fewer kernels than the source has: is this log whole?"
    # sines of large numbers, before the first step, have an array of their own
    spills = [f"{kernel} on {target}: {u.spills} bytes" for (kernel, target), u in sorted(used.items()) if u.spills and kernel != "init_kernel"]
    assert not spills, "registers are spilled to memory, or arrays lie there, in\n" + "\n".join(spills)

def test_the_table_of_occupancy(build):
    """It is the README's, and the simulation of the L2 cache has its blocks."""
    used = {**occupancy.read_log(build("nvcc-approxbp-bf16")[0]), **occupancy.read_log(build("nvcc-bf16")[0])}
    kernels = {kernel for kernel, _ in used}
    assert all(occupancy.launch_of(kernel) or kernel in occupancy.ALONE for kernel in kernels), "a kernel is missing in occupancy.py"
    for (kernel, target), u in used.items():
        tensor_cores = re.fullmatch(r"attention_(?:backward_)?(\w+)_tc_kernel<(\d+).*>", kernel)
        if tensor_cores:
            threads, dynamic = occupancy.launch_of(kernel)
            assert occupancy.resident(target, u.registers, u.shared + dynamic, threads) == l2.blocks(tensor_cores[1], int(tensor_cores[2]), target), kernel
    text = (ROOT / "dev/cuda/README.md").read_text()
    written = re.search(r"nvcc (\S+):\n\n<!-- occupancy:begin -->\n(.*)\n<!-- occupancy:end -->", text, re.S)
    if written[1] in execute(nvcc(), "--version", cwd=ROOT).out:  # another compiler's registers are others
        assert written[2].split("\n") == occupancy.table(used), "python3 dev/bench/occupancy.py --write"

def test_launches_of_the_table(tmp_path):
    """Threads and shared memory of a block are those of a step of GPT-2 124M: a layer of it, on the CPU."""
    write_tokens(tmp_path / "t.bin", [i * 7919 % 8193 for i in range(600)])
    seen = {}
    for variant, heads in (("cpu-bf16", 12), ("cpu-bf16", 6), ("cpu-bf16", 24), ("cpu-approxbp-bf16", 12)):  # of 64, 128 and 32 channels
        done = execute(program(variant), "-e", f"gpt2:L1,H{heads},C768,T64,V8193", "-i", "t.bin", "-b", 8, "-t", 64, "-x", 1, "-v", 0, "-s", 0,
                       cwd=tmp_path, env={"SIMT_PROFILE": 1})
        assert done.status == 0, done.err
        for block, shared, kernel in re.findall(r"^ +[\d.]+ +[\d.]+% +\d+ +\d+ +\d+ +(\d+) +(\d+)  (\w+)", done.err, re.M):
            seen.setdefault(kernel, set()).add((int(block), int(shared)))
    table = {}
    for kernel, launch in occupancy.LAUNCHES.items():
        table.setdefault(kernel.split("<")[0], set()).add(launch)
    for kernel, launches in seen.items():
        kernel = {"kernel": "attention_forward_tc_kernel", "dq_kernel": "attention_backward_dq_tc_kernel",
                  "dkv_kernel": "attention_backward_dkv_tc_kernel"}.get(kernel, kernel)  # called by a variable
        if kernel == "colsum_finish_kernel":  # a warp for 8 slices, of which so few rows have fewer
            assert max(launches) <= max(table[kernel])
        elif kernel not in occupancy.ALONE:
            assert launches <= table[kernel], kernel
    assert len(seen) > 20

# ---- loads -----------------------------------------------------------------------------------------

def trainer():
    return (ROOT / "train_gpt2.cu").read_text()

@each_variant
def test_loads_are_16_bytes(build, variant):
    found = ptx.flags(build(variant)[1], trainer())
    assert not found, "narrow loads of global memory:\n" + "\n".join(found)

def test_a_kernel_that_reads_narrowly_is_named(build):
    """Each kernel in turn, with its 16-byte loads made narrow."""
    whole, changed = build("nvcc-approxbp-bf16")[1], 0
    for (kernel, numbers), read in ptx.widths(whole, trainer()).items():
        wide = {tensor for tensor, sizes in read.items() if sizes[16]}
        if not wide:
            continue
        body = next(b for k, n, b in ptx.kernels(whole) if (k, n) == (kernel, numbers))
        narrow = re.sub(r"(ld\.global\S*?)\.v\d(\.[a-z]\d+\s+)\{(%\w+)[^}]*\}", r"\1\2\3", body)
        narrow = re.sub(r"(cp\.async\.c)g(\S+ \[%\w+\], \[%\w+\], )16", r"\1a\g<2>4", narrow)
        found = ptx.flags(whole.replace(body, narrow), trainer())
        assert {tuple(line.split(" is read")[0].split(": ")) for line in found} == {(kernel + numbers, tensor) for tensor in wide}
        changed += 1
    assert changed >= 15

def test_a_vector_by_reference_is_found(tmp_path):
    """The way it came about: nvcc reads a vector that a function takes by reference element by element."""
    source = "".join("""
struct alignas(16) NAME_vec { unsigned short x[8]; };
__device__ inline float sum_NAME(TYPE v) { float s = 0; for (int i = 0; i < 8; i++) s += v.x[i]; return s; }
__global__ void NAME_kernel(float* out, const NAME_vec* inp, size_t n) { if (threadIdx.x < n) out[threadIdx.x] = sum_NAME(inp[threadIdx.x + n]); }
""".replace("TYPE", how).replace("NAME", name) for name, how in (("value", "NAME_vec"), ("reference", "const NAME_vec&")))
    (tmp_path / "x.cu").write_text(source)
    done = execute(nvcc(), "-ptx", "-O3", "-std=c++17", "-arch=compute_80", "x.cu", cwd=tmp_path)
    assert done.status == 0, done.err
    assert ptx.flags((tmp_path / "x.ptx").read_text(), source) == ["reference_kernel: inp is read by 8 of 2 bytes; expected 16 bytes a load"]

def test_attention_runs_on_tensor_cores(build):
    """Heads of 64 and 128 channels: products by mma.sync from ldmatrix, tiles by cp.async, nothing in local memory."""
    found = [(name + numbers, body) for name, numbers, body in ptx.kernels(build("nvcc-bf16")[1]) if re.match(r"attention_\w+_tc_kernel", name)]
    assert len(found) == 6, [name for name, _ in found]
    for name, body in found:
        for instruction in ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "ldmatrix.sync.aligned.m8n8.x4.shared",
                            "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "cp.async.cg.shared.global", "cp.async.wait_all", "ex2.approx"):
            assert instruction in body, (name, instruction)
        assert ".local" not in body, name

def test_the_plain_command():
    """The command of the trainer's first lines and of the README is what make calls. (That the file needs no other: test_makefile.py.)"""
    made = execute("make", "-n", "train_gpt2", "CPU=0", "ARCH=90", "NVCC=nvcc", cwd=ROOT).out.splitlines()[-1].split()
    for path in ("train_gpt2.cu", "README.md"):
        command = re.search(r"^ *(nvcc .*train_gpt2\.cu.*)", (ROOT / path).read_text(), re.M)[1]
        assert sorted(command.replace("-arch=sm_90", "-gencode arch=compute_90,code=sm_90").split()) == sorted(set(made) - {"-lineinfo"})
