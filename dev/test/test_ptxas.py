"""What nvcc makes of the trainers: no warning, no kernel that spills registers, 16 bytes a load. Compiled here, run nowhere."""
import functools
import re
import sys
from types import SimpleNamespace

import pytest

import ptx
from helpers import NO_NVCC, ROOT, execute, nvcc, program, write_tokens

sys.path.insert(0, str(ROOT / "dev/bench"))
import l2  # noqa: E402
import occupancy  # noqa: E402

pytestmark = pytest.mark.skipif(not nvcc(), reason=NO_NVCC)
GPT2, LLAMA = ["nvcc-bf16", "nvcc-approxbp-bf16", "fp32"], ["llama-bf16", "llama-fp32"]
FP32 = [80, 100]   # the architectures that fp32 is compiled for: one of each kind of register allocation
each_variant = pytest.mark.parametrize("variant", GPT2 + LLAMA)

@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(variant): what was said, what its kernels take, its PTX for sm_80, and the source of the trainer. The first two are built by
    `make variants`, one for all architectures and one for three: what that has and the first has not is assembled for all. fp32 is built
    here, for two: test_gpt2, which has all of the trainer, so that nvcc has seen the test too. Of train_llama it is the kernels that
    train_gpt2 has not, in every mode."""
    @functools.lru_cache(None)
    def of(variant):
        folder, source = tmp_path_factory.mktemp(variant), (ROOT / f"train_{'llama' if variant in LLAMA else 'gpt2'}.cu").read_text()
        if variant in LLAMA:
            said, texts = occupancy.compile_llama(folder, *(["-DFP32=1"] if variant == "llama-fp32" else []),
                                                   architectures=(80,) if variant == "llama-fp32" else (80, 100))
            assembled, used = occupancy.assemble(folder, texts, {kernel for twin in GPT2[:2] for kernel, _ in of(twin).used})
            return SimpleNamespace(said=said + assembled, used=used, ptx=texts[80], source=source)
        if variant == "fp32":
            done = execute(nvcc(), "-fatbin", "-O3", "-std=c++17", *(x for a in FP32 for x in ("-gencode", f"arch=compute_{a},code=sm_{a}")), "-DFP32=1",
                           "-Xptxas", "-v", "--keep", "--keep-dir", folder, "test_gpt2.cu", "-o", folder / "x.fatbin", cwd=ROOT, timeout=600)
            assert done.status == 0, done.err
            said, file = done.out + done.err, next(folder.glob("*compute_80.ptx"))
        else:
            file = program(variant).parent / "train_gpt2.compute_80.ptx"
            said = (file.parent / "train_gpt2.log").read_text()
            if variant != GPT2[0]:
                said += occupancy.assemble(folder, occupancy.kept_ptx(file.parent), {kernel for kernel, _ in of(GPT2[0]).used})[0]
        return SimpleNamespace(said=said, used=occupancy.read_log(said), ptx=file.read_text(), source=source)
    return of

# ---- registers -------------------------------------------------------------------------------------

@each_variant
def test_no_kernel_spills(build, variant):
    """And nvcc has no warning."""
    b = build(variant)
    assert [line for line in b.said.splitlines() if re.search(r"warning|error", line, re.I)] == []
    assert {target for _, target in b.used} == ({f"sm_{a}" for a in FP32} if variant == "fp32" else set(occupancy.LIMITS))
    for target in {target for _, target in b.used}:
        kernels = [kernel for kernel, t in b.used if t == target]
        if variant in LLAMA:   # 6 each of RoPE and SwiGLU, 8 of the norm
            assert len(kernels) == 20 and all(re.search("rope|swiglu|add_norm", kernel) for kernel in kernels), kernels
        elif variant == GPT2[1] and target not in ("sm_80", "sm_90", "sm_100"):   # its own: activation and norm forward and backward, fold, unfold
            assert len(kernels) >= 6 and all(re.match("act_|add_norm|norm_", kernel) for kernel in kernels), kernels
        else:
            assert len(kernels) >= 0.8 * len(re.findall(r"__global__", b.source)), "fewer kernels than the source has: is this log whole?"
    # sines of large numbers, before the first step, have an array of their own
    spills = [f"{kernel} on {target}: {u.spills} bytes" for (kernel, target), u in sorted(b.used.items()) if u.spills and kernel != "init_kernel"]
    assert not spills, "registers are spilled to memory, or arrays lie there, in\n" + "\n".join(spills)

def test_train_llama_is_built():
    """By nvcc as it ships, for one architecture, and without a warning."""
    log = (program("nvcc-llama-bf16", "train_llama").parent / "train_llama.log").read_text()
    assert [line for line in log.splitlines() if re.search(r"warning|error", line, re.I)] == []
    assert not [kernel for (kernel, _), u in occupancy.read_log(log).items() if u.spills and kernel != "init_kernel"]

def test_the_table_of_occupancy(build):
    """It is the README's, and the simulation of the L2 cache has its blocks."""
    used = {**build("llama-bf16").used, **build("nvcc-approxbp-bf16").used, **build("nvcc-bf16").used}
    kernels = {kernel for kernel, _ in used}
    assert all(occupancy.launch_of(kernel) or kernel in occupancy.ALONE for kernel in kernels), "a kernel is missing in occupancy.py"
    for (kernel, target), u in used.items():
        tensor_cores = re.fullmatch(r"attention_(?:backward_)?(\w+)_tc_kernel<(\d+), 0>", kernel)  # without documents
        if tensor_cores:
            threads, dynamic = occupancy.launch_of(kernel)
            assert occupancy.resident(target, u.registers, u.shared + dynamic, threads) == l2.blocks(tensor_cores[1], int(tensor_cores[2]), target), kernel
    text = (ROOT / "dev/cuda/README.md").read_text()
    written = re.search(r"nvcc (\S+):\n\n<!-- occupancy:begin -->\n(.*)\n<!-- occupancy:end -->", text, re.S)
    if written[1] in execute(nvcc(), "--version", cwd=ROOT).out:  # another compiler's registers are others
        assert written[2].split("\n") == occupancy.table(used), "python3 dev/bench/occupancy.py --write"

def test_launches_of_the_table(tmp_path):
    """Threads and shared memory of a block are those of a step of GPT-2 124M: a layer of it, on the CPU; and one of a Llama."""
    write_tokens(tmp_path / "t.bin", [i * 7919 % 8193 for i in range(600)])
    seen = {}
    models = [("cpu-bf16", "train_gpt2", f"gpt2:L1,H{heads},C768") for heads in (12, 6, 24)]  # of 64, 128 and 32 channels
    models += [("cpu-approxbp-bf16", "train_gpt2", "gpt2:L1,H12,C768"), ("cpu-bf16", "train_llama", "llama:L1,H12,K4,C768,F2048", "--row-chunks", 2)]
    for variant, name, model, *more in models:
        done = execute(program(variant, name), "-e", f"{model},T64,V8193", "-i", "t.bin", "-b", 8, "-t", 64, "-x", 1, "-v", 0, "-s", 0, *more,
                       cwd=tmp_path, env={"SIMT_PROFILE": 1})
        assert done.status == 0, done.err
        for block, shared, kernel in re.findall(r"^ +[\d.]+ +[\d.]+% +\d+ +\d+ +\d+ +(\d+) +(\d+)  (\w+)", done.err, re.M):
            seen.setdefault(kernel, set()).add((int(block), int(shared)))
    table = {}
    for kernel, launch in occupancy.LAUNCHES.items():
        table.setdefault(kernel.split("<")[0], set()).add(launch)
    for kernel, launches in seen.items():
        kernel = {"kernel": "add_norm_backward_kernel"}.get(kernel, kernel)  # called by a variable
        if kernel == "colsum_finish_kernel":  # a warp for 8 slices, of which so few rows have fewer
            assert max(launches) <= max(table[kernel])
        elif kernel not in occupancy.ALONE:
            assert launches <= table[kernel], kernel
    assert len(seen) > 20 and {"rope_kernel", "swiglu_forward_kernel", "swiglu_backward_kernel", "attention_delta_kernel"} <= set(seen)

# ---- loads -----------------------------------------------------------------------------------------

@each_variant
def test_loads_are_16_bytes(build, variant):
    found = ptx.flags(build(variant).ptx, build(variant).source)
    assert not found, "narrow loads of global memory:\n" + "\n".join(found)

@pytest.mark.parametrize("variant", ["nvcc-approxbp-bf16", "llama-bf16"])
def test_a_kernel_that_reads_narrowly_is_named(build, variant):
    """Each kernel in turn, with its 16-byte loads made narrow."""
    source, changed = build(variant).source, 0
    for entry in re.findall(r"\.entry \w+\(.*?\n}", build(variant).ptx, re.S):
        ((kernel, numbers), read), = ptx.widths(entry, source).items()
        wide = {tensor for tensor, sizes in read.items() if sizes[16]}
        if not wide:
            continue
        narrow = re.sub(r"(ld\.global\S*?)\.v\d(\.[a-z]\d+\s+)\{(%\w+)[^}]*\}", r"\1\2\3", entry)
        narrow = re.sub(r"(cp\.async\.c)g(\S+ \[%\w+\], \[%\w+\], )16", r"\1a\g<2>4", narrow)
        found = ptx.flags(narrow, source)
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
    found = [(name + numbers, body) for name, numbers, body in ptx.kernels(build("nvcc-bf16").ptx) if re.match(r"attention_\w+_tc_kernel", name)]
    assert len(found) == 12, [name for name, _ in found]
    for name, body in found:
        for instruction in ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "ldmatrix.sync.aligned.m8n8.x4.shared",
                            "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "cp.async.cg.shared.global", "cp.async.wait_all", "ex2.approx"):
            assert instruction in body, (name, instruction)
        assert ".local" not in body, name

@pytest.mark.parametrize("path,name", [("train_gpt2.cu", "train_gpt2"), ("train_llama.cu", "train_llama"), ("README.md", "train_gpt2")])
def test_the_plain_command(path, name):
    """The command of a trainer's first lines and of the README is what make calls. (That the file needs no other: test_makefile.py.)"""
    made = execute("make", "-n", name, "CPU=0", "ARCH=90", "NVCC=nvcc", cwd=ROOT).out.splitlines()[-1].split()
    command = re.search(rf"^ *(nvcc .*{name}\.cu.*)", (ROOT / path).read_text(), re.M)[1]
    assert sorted(command.replace("-arch=sm_90", "-gencode arch=compute_90,code=sm_90").split()) == sorted(set(made) - {"-lineinfo"})
