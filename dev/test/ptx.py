"""How wide the kernels' loads are, read from their PTX.

    nvcc -ptx -O3 -std=c++17 -arch=compute_80 train_gpt2.cu -o x.ptx && python3 dev/test/ptx.py x.ptx [more.ptx, of either trainer ...]

A thread that takes 8 neighbouring elements must fetch them 16 bytes at a time: by 2 bytes it takes eight times the instructions,
and a warp's loads touch four times the lines. What the compiler does of it shows in no result, so it is read here. Each load of
global memory is traced back to the kernel's parameter that its address came from. A tensor is read by 16 bytes alone, unless it
stands in one of the two lists below.
"""
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Tensors that any kernel may read by element: they are small, or neighbouring lanes read neighbouring floats
SMALL = {
    "tokens": "one index per position", "positions": "one index per row of dout", "bucket_token": "one index per block",
    "bucket_start": "two indices per block", "targets": "one index per row", "mean": "one float per row", "rstd": "one float per row",
    "document": "one index per token", "documents": "one index per token", "shape": "of RoPE, one index per token",
    "lse": "one float per row and head", "delta": "one float per row and head", "losses": "neighbouring lanes, neighbouring floats",
    "partial": "neighbouring lanes, neighbouring floats", "sum": "one float", "verdict": "what to do with a step, 16 bytes in all",
    "s": "the step's state, read by one thread"}
FRAGMENT = "operands of mma.sync, 4 bytes per lane: once per block, where the other side is read again and again"
HALVES = "a head's halves are aligned to 8 bytes, where HS is no multiple of 16"
EIGHT_CODES = "a thread's 8 codes, all of them in one load"
# (kernel, tensor): how many loads by element its code may have, whether it has wide ones besides, and why
ANY = 999
ONE_BY_ONE = {
    ("embedding_backward_wte_kernel", "dwte"): (ANY, False, "sums over warps: lane i adds to element i"),
    ("colsum_finish_kernel", "out"): (ANY, False, "one sum per lane, in neighbouring elements"),
    **{(f"norm_fold_kernel<{weight}>", "bias"): (1, False, "one per row of the weight") for weight in ("PlainWeight", "Nf4")},
    ("norm_fold_kernel<Nf4>", "weight"): (ANY, False, "4 bytes of codes for 8 elements, and their absmax"),
    ("adapter_unfold_kernel", "dt_sum"): (1, False, "one per row of the adapter"),
    ("likeliest_kernel", "logits"): (ANY, False, "in validation alone: neighbouring lanes, neighbouring logits"),
    ("norm_unfold_kernel", "dbias"): (2, False, "one per row of the weight, in bf16 or fp32"),
    ("classifier_kernel", "logits"): (1, True, "the target's logit"),
    **{(f"act_backward_kernel<{bits}>", "kept"): (1, False, EIGHT_CODES) for bits in (1, 2, 3, 4)},
    **{(f"swiglu_backward_kernel<{bits}>", "codes"): (1, False, EIGHT_CODES) for bits in (1, 2, 3, 4)},
    **{(f"{kernel}<4>", tensor): (2, False, HALVES)
       for kernel, tensors in (("rope_kernel", ["qkv"]), ("qk_norm_rope_kernel", ["qkv", "k_gamma or q_gamma"]),
                               ("qk_norm_rope_backward_kernel", ["qkv", "d", "gamma"])) for tensor in tensors},
    ("adamw8_kernel", "q"): (6, False, "a thread's 8 codes, all of them in one load, a scale for a warp's 256, and the maps, once per block"),
    ("lomo_rows_kernel<1>", "m"): (1, True, "a row's factor"), ("lomo_kernel", "m"): (1, True, "a row's factor"),
    ("lomo_factors_kernel", "m"): (2, False, "neighbouring lanes, neighbouring floats"), ("lomo_factors_kernel", "square_sum"): (1, False, "one float"),
    ("widen_kernel", "inp"): (1, False, "once, before the first step"),
    ("sum_kernel", "x"): (ANY, False, "neighbouring lanes, neighbouring floats"),
    ("attention_forward_tc_kernel", "qkv"): (ANY, True, FRAGMENT),
    ("attention_backward_dq_tc_kernel", "qkv"): (ANY, True, FRAGMENT),
    ("attention_backward_dq_tc_kernel", "out"): (ANY, False, FRAGMENT),
    ("attention_backward_dq_tc_kernel", "dout"): (ANY, False, FRAGMENT),
    ("attention_backward_dkv_tc_kernel", "qkv"): (ANY, True, FRAGMENT)}
CONSTANTS = ("__cudart_i2opi_f",)  # a table of the compiler's own, for sines of large numbers

def parameters(source):
    """{kernel: names of its parameters}, None for those that are numbers"""
    found = {}
    for name, arguments in re.findall(r"\b(\w+_kernel)\(([^;{]*?)\)\s*\{", source):
        depth, parts = 0, [""]
        for c in arguments:
            depth += (c in "<(") - (c in ">)")
            parts = parts + [""] if c == "," and depth == 0 else parts[:-1] + [parts[-1] + c]
        number = re.compile(r"\s*(const )?(bool|int|unsigned|float|size_t|u?int\d+_t)\s+\w+$")
        found[name] = [None if number.match(part) else re.findall(r"\w+", part)[-1] for part in parts]
    return found

def template(mangled):
    """A kernel's name, and its template's numbers and types: <64, 2>, <Nf4>"""
    name = re.search(r"[a-z]\w*?_kernel", mangled)[0]
    rest, found = mangled[mangled.index(name) + len(name):], []
    while rest[:1] in ("I", "L") or (found and rest[:1].isdigit()):
        literal, length, rest = re.match(r"I?(L?)(?:[a-z]|(\d*))(.*)", rest).groups()   # of a type: its letter, or length and name
        word, rest = rest[:int(length or 0)], rest[int(length or 0):]
        value, rest = re.match(r"(n?\d+)E(.*)", rest).groups() if literal else (word, rest)
        found.append(value)
    return name, f"<{', '.join(found)}>" if found else ""

def kernels(ptx):
    """[(a kernel's name, its template's numbers, its body)]"""
    return [(*template(mangled), body) for mangled, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.S)]

def loads(body):
    """[(where an address came from, bytes)]: the number of a parameter, or a symbol's name; ? where it is not clear."""
    sources, addresses = defaultdict(set), []
    for statement in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(.*?);", body, re.M):
        op, rest = statement[0].split("."), statement[1]
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+", rest)
        if op[0] == "ld":
            space = {part.split("::")[0] for part in op}
            lanes = next((int(part[1]) for part in op if re.fullmatch(r"v\d", part)), 1)
            size = lanes * int(re.search(r"\d+$", op[-1])[0]) // 8
            if "param" in space:
                sources[operands[0]].add(operands[1])
            elif "shared" not in space and "local" not in space:
                addresses.append((operands[1], size))
            elif "shared" in space and size == 2:
                addresses.append(("[bf16 in shared memory]", size))
        elif op[:2] == ["cp", "async"] and len(operands) > 2:
            addresses.append((operands[1], int(operands[2])))
        elif op[0] in ("add", "sub", "mov", "cvta", "selp", "or") and operands:
            sources[operands[0]].update(operands[1:3])
        elif op[0] == "mad" and operands:
            sources[operands[0]].add(operands[3])

    def origins(address):
        found, seen, todo = set(), set(), [address]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            parameter = re.search(r"_param_(\d+)", name)
            if parameter:
                found.add(int(parameter[1]))
            elif name.startswith("%"):
                todo.extend(sources[name])
            elif name.startswith("["):
                todo.append(name.strip("[]").split("+")[0])
            elif re.match(r"[A-Za-z_]", name):
                found.add(name)
        return found
    return [(origins(address), size) for address, size in addresses]

def widths(ptx, source):
    """{(kernel, template's numbers): {tensor: Counter of bytes a load}}"""
    names, found = parameters(source), {}
    for name, numbers, body in kernels(ptx):
        read = found.setdefault((name, numbers), defaultdict(Counter))
        for origins, size in loads(body):
            of = {names[name][o] if isinstance(o, int) else o for o in origins} - {None}
            read[" or ".join(sorted(of)) or "?"][size] += 1
    return found

def flags(ptx, source):
    """What is read more narrowly than it should be: a line each, with the kernel's name."""
    lines = []
    for (kernel, numbers), read in widths(ptx, source).items():
        for tensor, sizes in read.items():
            narrow = sum(n for size, n in sizes.items() if size < 16)
            if all(name in SMALL or name in CONSTANTS for name in tensor.split(" or ")):
                continue
            key = next((k for k in ((kernel, tensor), (kernel + numbers, tensor)) if k in ONE_BY_ONE), None)
            most, besides, _ = ONE_BY_ONE.get(key, (0, True, ""))
            seen = ", ".join(f"{n} of {size} bytes" for size, n in sorted(sizes.items()))
            if narrow > most:
                lines.append(f"{kernel}{numbers}: {tensor} is read by {seen}; expected 16 bytes a load" + (f", but for {most} of them" if most else ""))
            elif besides and narrow == sum(sizes.values()):
                lines.append(f"{kernel}{numbers}: {tensor} is read by {seen}; expected loads of 16 bytes besides")
    return lines

def main():
    wrong = 0
    for path in sys.argv[1:]:
        found = flags(Path(path).read_text(), "".join((ROOT / name).read_text() for name in ("train_gpt2.cu", "train_llama.cu")))
        wrong += len(found)
        print(*found, f"{path}: {len(found)} tensors are read too narrowly", sep="\n")
    sys.exit(wrong > 0)

if __name__ == "__main__":
    main()
