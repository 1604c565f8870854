"""What the order of attention's blocks costs, GPT-2 124M at B=64 and T=1024: a simulation of the L2 cache, and of multiprocessors that run dry at the end.

    make dev/cuda/attention CPU=1 BUILD=build/cpu && python3 dev/bench/l2.py [PROGRAM]

A block of forward or dq reads the tiles (64 rows) of keys and values that its queries see; one of dkv the tiles of q and dout of the
queries that see its keys. Which head and which rows a block has is asked of the trainer: dev/cuda/attention --order prints what the
kernels compute. The GPU holds so many blocks at a time, and gives the next one to whoever is done. A tile takes a block one unit of
time, and its beginning and end take BETWEEN of them; what a block reads and writes of its own rows passes through the cache too,
which forgets what was used least recently. Real caches are less orderly and real blocks not equally fast: the figures say which
order is good, not what a GPU will show.
"""
import heapq
import os
import random
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple

from common import ROOT

TILE = 64       # rows
BETWEEN = 1.5   # tiles
JITTER = 0.05   # of a tile's time, so that blocks do not march in step

# multiprocessors; MB of L2, as the driver says and as much of it as is counted on; architecture. An H100's L2 has two halves, and
# what both need stands in both.
Gpu = namedtuple("Gpu", "sms l2 usable arch")
GPUS = {"H100, H200": Gpu(132, 50, 50, "sm_90"), "the same": Gpu(132, 50, 30, "sm_90"), "A100": Gpu(108, 40, 40, "sm_80"),
        "RTX 3090": Gpu(82, 6, 6, "sm_86"), "RTX 4090": Gpu(128, 72, 72, "sm_89"), "B200": Gpu(148, 126, 126, "sm_100"),
        "RTX 5090": Gpu(170, 96, 96, "sm_120")}

def blocks(kernel, HS, arch):
    """That a multiprocessor holds at a time; dev/test/test_ptxas.py holds this to what the kernels take."""
    if HS == 128:
        return 1 if arch in ("sm_86", "sm_89", "sm_120") else 2  # where shared memory is small
    return 3 if kernel == "forward" and arch not in ("sm_100", "sm_120") else 2

# shape: B sequences of T, NH query heads, NKV key-value heads, HS channels. rows of a block; order: (head, first row) of each
Shape = namedtuple("Shape", "B T NH NKV HS")
Launch = namedtuple("Launch", "kernel rows order")

def orders(program, shape, l2):
    """[Launch] of the three kernels, as the trainer has them where the L2 cache has so many MB."""
    command = [program, "--order", *map(str, shape), str(l2 << 20)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    launches = []
    for line in lines:
        kernel = re.fullmatch(r"(\w+): (\d+) rows a block", line)
        if kernel:
            launches.append(Launch(kernel[1], int(kernel[2]), []))
        else:
            launches[-1].order.append(tuple(map(int, line.split())))
    return launches

def tiles_of(launch, shape, head, first):
    """The tiles that a block reads, and the head that they are of (its own rows' head aside)."""
    group = shape.NH // shape.NKV
    if launch.kernel == "dkv":
        return [(head * group + h, i) for h in range(group) for i in range(first // TILE, -(-shape.T // TILE))]
    return [(head // group, i) for i in range(-(-min(first + launch.rows, shape.T) // TILE))]

# bytes that come from memory if each tile does so once, and that do come; how long it takes, of the time if all were busy to the end
Result = namedtuple("Result", "once read makespan")

def simulate(launch, shape, slots, l2, seed=1):
    """slots: blocks that the GPU holds at a time. l2: MB."""
    rng = random.Random(seed)
    pair = 2 * TILE * shape.HS * 2         # bytes of a tile of k and one of v, or of q and dout, in bf16
    own = {"forward": (1, 1), "dq": (3, 1), "dkv": (2, 2)}[launch.kernel]   # tensors of the block's rows: read first, written last
    capacity, used = l2 << 20, 0
    cache = OrderedDict()                  # key: bytes, the least recently used first

    def touch(key, size):
        """Bytes that come from memory."""
        nonlocal used
        if key in cache:
            cache.move_to_end(key)
            return 0
        cache[key] = size
        used += size
        while used > capacity:
            used -= cache.popitem(last=False)[1]
        return size

    read = work = 0
    seen = set()
    todo = iter(launch.order)
    events = []                            # (time, slot, the block's tiles, which of them comes next)

    def begin(time, slot):
        nonlocal work
        block = next(todo, None)
        if block is None:
            return
        tiles = tiles_of(launch, shape, *block)
        work += len(tiles) + BETWEEN
        touch(("in", block), own[0] * launch.rows * shape.HS * 2)
        heapq.heappush(events, (time + BETWEEN, slot, block, tiles, 0))

    for slot in range(slots):
        begin(JITTER * rng.random(), slot)
    end = 0
    while events:
        time, slot, block, tiles, i = heapq.heappop(events)
        if i == len(tiles):
            touch(("out", block), own[1] * launch.rows * shape.HS * 2)
            end = time
            begin(time, slot)
            continue
        seen.add(tiles[i])
        read += touch(tiles[i], pair)
        heapq.heappush(events, (time + 1 + JITTER * (rng.random() - 0.5), slot, block, tiles, i + 1))
    return Result(len(seen) * pair, read, end * slots / work)

def main():
    program, shape = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build/cpu/dev/cuda/attention"), Shape(64, 1024, 12, 12, 64)
    print(f"{'GPU':12s} {'L2, MB':>7s}  {'kernel':8s} {'blocks':>7s} {'at once':>8s} {'MB, once':>9s} {'MB read':>8s} {'times':>6s} {'makespan/ideal':>15s}")
    for name, gpu in GPUS.items():
        for launch in orders(program, shape, gpu.l2):
            slots = gpu.sms * blocks(launch.kernel, shape.HS, gpu.arch)
            r = simulate(launch, shape, slots, gpu.usable)
            print(f"{name:12s} {gpu.usable:7d}  {launch.kernel:8s} {len(launch.order):7d} {slots:8d} {r.once / 1e6:9.0f} {r.read / 1e6:8.0f} "
                  f"{r.read / r.once:6.2f} {r.makespan:15.3f}")

if __name__ == "__main__":
    main()
