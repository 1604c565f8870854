"""What a tile costs in attention's kernels on tensor cores, counted from machine code.

    nvcc -cubin -O3 -std=c++17 -arch=sm_90 train_gpt2.cu -o x.cubin && nvdisasm -c x.cubin | python3 dev/bench/sass.py

A kernel's loop over tiles is walked on the way that an unmasked tile takes: all products and copies, and of the rest as few
instructions as there are. Cycles of a multiprocessor for 64 queries and 64 keys: its tensor cores make one mma.sync.m16n8k16 a cycle at their peak,
of which mma.sync reaches 62 % on Hopper; its shared memory gives one wavefront of 128 bytes a cycle; each of its four schedulers,
one warp of a block each, issues one instruction a cycle. The largest of the three is the least that a tile takes.
"""
import itertools
import math
import os
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "test"))
from ptx import template  # noqa: E402

MMA_SHARE = 0.62

def wavefronts(op):
    """Of shared memory, for a warp's instruction without bank conflicts."""
    if op.startswith("LDSM"):
        return int(re.search(r"\.(\d)$", op)[1]) if re.search(r"\.\d$", op) else 1
    if op.startswith("LDGSTS"):
        return 4 if ".128" in op else 1
    return 1 if op.startswith(("LDS", "STS", "LDL", "STL")) else 0  # those here are of 4 or 8 bytes a lane, or lanes share them

def unmasked_tile(code, products):
    """Counter of a warp's instructions for a tile that has so many products, where no pair is masked."""
    ops, labels = [], {}  # (instruction, where it may jump to, whether only on a condition)
    for line in code.splitlines():
        label, instruction = re.match(r"(\.L_x_\d+):", line), re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(\S+)(.*?) ;", line)
        if label:
            labels[label[1]] = len(ops)
        elif instruction:
            predicate, op, rest = instruction.groups()
            target = re.search(r"\.L_x_\d+", rest) if op.startswith("BRA") else None
            ops.append((op, target and target[0], bool(predicate) or "P" in rest.split("`")[0]))

    def is_product(i):
        return ops[i][0].startswith("HMMA")

    def has(loop, what):
        return sum(ops[i][0].startswith(what) for i in range(loop[0], loop[1] + 1))

    loops = [(labels[t], i) for i, (_, t, _) in enumerate(ops) if t and labels[t] <= i and has((labels[t], i), "HMMA")]
    # the one over tiles is the smallest that has all products and copies the next tile
    begin, end = max((loop for loop in loops if has(loop, "LDGSTS")), key=lambda loop: (has(loop, "HMMA"), loop[0] - loop[1]))
    best = {}  # where: (less is better, the instructions from there to the loop's end)
    for i in range(end, begin - 1, -1):
        op, target, conditional = ops[i]
        after = [i + 1] if not target or conditional else []
        after += [labels[target]] if target and i < labels[target] <= end else []
        ways = [best[j] for j in after if j in best] if i != end else [((0, 0), ())]
        if ways:
            (must, rest), way = min(ways, key=lambda way: way[0])
            wanted = op.startswith(("HMMA", "LDSM", "LDGSTS"))
            best[i] = ((must - wanted, rest + (not wanted)), (i, way))
    path, way = [], best[begin][1]
    while way:
        path.append(way[0])
        way = way[1]
    # loops within it have as many turns as make all products
    inner = [loop for loop in loops if begin <= loop[0] and loop[1] < end]
    for turns in itertools.product((1, 2, 4, 8), repeat=len(inner)):
        times = {i: math.prod(n for n, loop in zip(turns, inner) if loop[0] <= i <= loop[1]) for i in path}
        if sum(times[i] for i in path if is_product(i)) == products:
            return sum((Counter({ops[i][0]: times[i]}) for i in path), Counter())
    raise ValueError(f"found no way to make {products} products")

def main():
    text = sys.stdin.read()
    print(f"{'kernel':44s} {'HMMA':>5s} {'LDSM':>5s} {'instructions':>12s}   cycles of a 64 x 64 tile: tensor  shared memory  issue")
    for mangled, code in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", text, re.S | re.M):
        name, numbers = template(mangled) if "_kernel" in mangled else ("", "")
        if not re.fullmatch(r"attention_\w+_tc_kernel", name):
            continue
        sizes = [int(n) for n in re.findall(r"\d+", numbers)]
        channels = sizes[0]
        tiles = 2 if channels == 64 else 1  # of 64 x 64 that a block makes at a time: TC_M
        products = {"forward": 2, "dq": 3, "dkv": 4}[name.split("_")[-3]] * channels // 2 * tiles
        count = unmasked_tile(code, products)
        of = Counter()
        for op, n in count.items():
            of[op.split(".")[0]] += n
        shared = sum(wavefronts(op) * n for op, n in count.items())
        print(f"{name + numbers:44s} {of['HMMA']:5d} {of['LDSM']:5d} {sum(count.values()):12d}   {4 * of['HMMA'] / MMA_SHARE / tiles:31.0f}"
              f" {4 * shared / tiles:14.0f} {sum(count.values()) / tiles:6.0f}")

if __name__ == "__main__":
    main()
