"""What a kernel takes of a multiprocessor: registers, and how many blocks and warps fit there, on each architecture.

    make variants VARIANTS="nvcc-bf16 nvcc-approxbp-bf16"
    python3 dev/bench/occupancy.py [--write]

Reads what ptxas says of train_gpt2's kernels (build/nvcc-bf16/train_gpt2.log), assembles those that only build/nvcc-approxbp-bf16 has,
compiles those that only train_llama has, and prints a table, or with --write puts it into dev/cuda/README.md. Compiled, not run: no GPU
is needed.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import report
from common import ROOT

sys.path.insert(0, os.path.join(ROOT, "dev/test"))
from ptx import template  # noqa: E402

BUILDS = [Path(ROOT) / "build" / variant for variant in ("nvcc-bf16", "nvcc-approxbp-bf16")]
# Of train_llama, with the kernels of the mode that it is not built for
LLAMA = """#include "train_llama.cu"
namespace other_mode {
auto forward = swiglu_forward<2>, again = swiglu_forward<2, true>;
auto backward = swiglu_backward<2>;
auto norm_forward = add_norm_forward<true>;
auto norm_backward = add_norm_backward<true>;
}
"""

# Of a multiprocessor: warps and blocks at most, KB of shared memory (CUDA C++ programming guide, technical specifications).
# All have 65,536 registers, a quarter for each of their four schedulers, and take 1 KB of shared memory a block for themselves.
Limits = namedtuple("Limits", "example warps blocks shared")
LIMITS = {"sm_80": Limits("A100", 64, 32, 164), "sm_86": Limits("RTX 3090", 48, 16, 100), "sm_89": Limits("RTX 4090", 48, 24, 100),
          "sm_90": Limits("H100, H200", 64, 32, 228), "sm_100": Limits("B200", 64, 32, 228), "sm_120": Limits("RTX 5090", 48, 24, 100)}

# kernel: (threads, bytes of dynamic shared memory) of a block in bf16, GPT-2 124M; with 128 channels a head for the kernels of
# those. dev/test/test_ptxas.py holds this to what the program launches.
LAUNCHES = {
    "embedding_forward_kernel": (256, 0), "embedding_backward_wte_kernel": (256, 0), "embedding_backward_wpe_kernel": (256, 0),
    "add_norm_forward_kernel": (128, 4 * 768 * 2), "add_norm_backward_kernel": (96, 0),
    "colsum_kernel": (256, 0), "colsum_finish_kernel": (1024, 0), "norm_fold_kernel": (256, 0), "norm_unfold_kernel": (256, 0),
    "attention_forward_kernel<1>": (64, 0), "attention_forward_kernel<2>": (128, 0), "attention_forward_kernel<4>": (256, 0),
    "attention_backward_kernel<1>": (64, 0), "attention_backward_kernel<2>": (128, 0), "attention_backward_kernel<4>": (256, 0),
    "attention_forward_tc_kernel<64>": (128, 32 << 10), "attention_forward_tc_kernel<128>": (128, 64 << 10),
    "attention_backward_dq_tc_kernel<64>": (128, 32 << 10), "attention_backward_dq_tc_kernel<128>": (128, 64 << 10),
    "attention_backward_dkv_tc_kernel<64>": (128, 48 << 10), "attention_backward_dkv_tc_kernel<128>": (128, 80 << 10),
    "attention_delta_kernel": (256, 0), "round_kernel": (256, 0),
    "act_forward_kernel": (256, 0), "act_backward_kernel": (256, 0), "classifier_kernel": (1024, 0), "square_sum_kernel": (256, 0),
    "adamw_kernel": (256, 0), "adamw8_kernel": (256, 0), "lomo_rows_kernel": (256, 0), "lomo_cols_kernel": (256, 0), "lomo_kernel": (256, 0),
    "dropout_kernel": (256, 0), "adapter_unfold_kernel": (256, 0), "likeliest_kernel": (256, 0),
    "rope_kernel": (256, 0), "qk_norm_rope_kernel": (256, 0), "qk_norm_rope_backward_kernel": (256, 0), "swiglu_forward_kernel": (256, 0),
    "swiglu_backward_kernel": (256, 0)}
# In one block, or before the first step: how many of them fit is of no interest
ALONE = ["sum_kernel", "verdict_kernel", "init_kernel", "widen_kernel", "lomo_factors_kernel", "lomo_step_kernel"]

Used = namedtuple("Used", "registers shared spills")

def launch_of(kernel):
    """A kernel's launch: by its name with the first of its template's arguments, or without."""
    name, numbers = re.fullmatch(r"(\w+)(?:<(.*)>)?", kernel).groups()
    return LAUNCHES.get(f"{name}<{(numbers or '').split(',')[0]}>", LAUNCHES.get(name))

def read_log(text):
    """{(kernel, architecture): Used}; spills: bytes that go to local memory and come back, or lie there."""
    used = {}
    for mangled, target, lines in re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)\w*'\n(.*?)(?=\nptxas info    : Comp|\Z)", text, re.S):
        took = re.findall(r"Used (\d+) registers", lines)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", lines)
        if len(took) != 1 or len(memory) != 1:
            raise ValueError(f"what ptxas says of {mangled} for {target} is not understood:\n{lines}")
        stack, stores, loads = map(int, memory[0])
        shared = re.search(r"(\d+) bytes smem", lines)
        used["".join(template(mangled)), target] = Used(int(took[0]), int(shared[1]) if shared else 0, max(stores + loads, stack))
    return used

def toolkit(program):
    return shutil.which(program) or f"/usr/local/cuda/bin/{program}"

def kept_ptx(build):
    """{architecture: PTX} of a build of train_gpt2 with --keep."""
    return {a: file.read_text() for a in (80, 90, 100) for file in [build / f"train_gpt2.compute_{a}.ptx"]}

def compile_llama(folder, *flags, architectures=(80, 100)):
    """What nvcc says, and the PTX by architecture. Those from 100 on have instructions of their own that it makes use of."""
    (folder / "llama.cu").write_text(LLAMA)
    said, texts = "", {}
    for a in architectures:
        done = subprocess.run([toolkit("nvcc"), "-ptx", "-O3", "-std=c++17", f"-arch=compute_{a}", *flags, "-I", ROOT, "llama.cu", "-o", f"{a}.ptx"],
                              cwd=folder, text=True, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, texts[a] = said + done.stdout, (folder / f"{a}.ptx").read_text()
    return said, texts

def assemble(folder, texts, without):
    """What ptxas says of the kernels that are not `without`, and {(kernel, architecture): Used} of them, of the newest PTX that an
    architecture takes. Attention takes ptxas most of its time, and is in both trainers."""
    said = ""
    for target in LIMITS:
        text = re.sub(r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?\n}\n", lambda m: "" if "".join(template(m[1])) in without else m[0],
                      texts[max(a for a in texts if a <= int(target[3:]))], flags=re.S | re.M)
        (folder / "own.ptx").write_text(text)
        said += subprocess.run([toolkit("ptxas"), "-v", f"-arch={target}", "own.ptx", "-o", "own.cubin"], cwd=folder, text=True, check=True,
                               stderr=subprocess.PIPE).stderr
    return said, read_log(said)

def resident(target, registers, shared, threads):
    """Blocks of so many threads that a multiprocessor holds at a time."""
    limits, warps = LIMITS[target], -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256  # handed out by 256
    by_registers = 4 * (65536 // 4 // of_warp) // warps
    by_shared = (limits.shared << 10) // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)

def table(used):
    """Markdown: a kernel a row, an architecture a column."""
    order = {name: i for i, name in enumerate(LAUNCHES)}
    place = {kernel: order.get(kernel.split("<")[0], min([i for n, i in order.items() if n.split("<")[0] == kernel.split("<")[0]], default=99))
             for kernel, _ in used}
    lines = ["| kernel | threads | shared memory | " + " | ".join(f"{t}: {l.example}" for t, l in LIMITS.items()) + " |", "|---|---:|---:|" + "---:|" * len(LIMITS)]
    for kernel in sorted(place, key=lambda k: (place[k], [int(n) for n in re.findall(r"\d+", k)])):
        if kernel in ALONE:
            continue
        threads, dynamic = launch_of(kernel)
        cells = []
        for target in LIMITS:
            u = used.get((kernel, target))
            blocks = resident(target, u.registers, u.shared + dynamic, threads) if u else 0
            cells.append(f"{u.registers}, {blocks} x {-(-threads // 32)}" + (f", spills {u.spills}" if u.spills else "") if u else "–")
        shared = {used[k].shared + dynamic for k in used if k[0] == kernel}
        lines.append(f"| `{kernel}` | {threads} | {max(shared):,} | " + " | ".join(cells) + " |")
    return lines

def main():
    parser = argparse.ArgumentParser(description="Registers, blocks and warps of the kernels, by architecture.")
    parser.add_argument("--write", action="store_true", help="puts the table into dev/cuda/README.md, between its markers")
    a = parser.parse_args()
    try:
        used = read_log((BUILDS[0] / "train_gpt2.log").read_text())
        texts = kept_ptx(BUILDS[1])
    except OSError as e:
        parser.error(f"{e.filename}: {e.strerror}; expected what a build leaves (--help has the command)")
    with tempfile.TemporaryDirectory() as folder:
        for of in (texts, compile_llama(Path(folder))[1]):
            used.update(assemble(Path(folder), of, {kernel for kernel, _ in used})[1])
    lines = table(used)
    if not a.write:
        print("\n".join(lines))
        return
    path = os.path.join(ROOT, "dev/cuda/README.md")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8") as f:
        f.write(report.between(text, "occupancy", lines, path))

if __name__ == "__main__":
    main()
