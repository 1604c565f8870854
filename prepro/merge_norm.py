"""Merges the norms of a GPT-2 model's blocks into the weights behind them.

    python3 prepro/merge_norm.py IN OUT              directories, as transformers and our checkpoints have them
    python3 prepro/merge_norm.py IN.bin OUT.bin      llm.c's files

With z the normalised x, a block computes (gamma z + beta) W^T + b. That is z W'^T + b' with W' = W gamma (column by column) and b'
= b + W beta. For ln1 into qkvw and qkvb, and ln2 into fcw and fcb, this writes W' and b', computed in float64, and sets gamma to 1
and beta to 0: the model of the published MS-LayerNorm (Yang et al., ICML 2024, arXiv 2406.16282). OUT computes what IN computes,
within the rounding of its precision, which is IN's; but training it trains other parameters. A trainer built with MS_NORM=1 does
not need it: it folds gamma and beta at use.

The final norm keeps its gamma and beta. The matrix behind it is the embedding, so scaling its
columns would also change what enters the first block, and the head has no bias to take beta.
The state of a run, which a checkpoint holds, is not taken along: it is that of other parameters.
"""
import argparse
import json
import math
import os
import shutil

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
from binfmt import Error

PAIRS = [("ln1", "qkv"), ("ln2", "fc")]
HF_PAIRS = [("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")]

def merge_one(gamma, beta, w, b):
    """gamma, beta (..., C), w (..., out, C) by the columns, b (..., out): what becomes of them, in float64."""
    gamma, beta, w, b = (x.astype(np.float64) for x in (gamma, beta, w, b))
    with np.errstate(all="ignore"):  # infinities are said by those who call
        return np.ones_like(gamma), np.zeros_like(beta), w * gamma[..., None, :], b + np.einsum("...oc,...c->...o", w, beta)

def merge(tensors):
    """Returns a dict like tensors, merged: what has changed in float64, the rest as it was."""
    merged = dict(tensors)
    for norm, matmul in PAIRS:
        names = norm + "w", norm + "b", matmul + "w", matmul + "b"
        merged.update(zip(names, merge_one(*(tensors[name] for name in names))))
    return merged

def report(norm, matmul, L, gamma, beta):
    nothing = ", so nothing to merge" if (gamma == 1).all() and (beta == 0).all() else ""
    binfmt.say(f"{norm} into {matmul}, {L} layer{'s' * (L > 1)}: gamma was {gamma.min():.6g} to {gamma.max():.6g}, "
               f"beta {beta.min():.6g} to {beta.max():.6g}{nothing}")

# ---- directories -----------------------------------------------------------------------------------

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

def find_tensors(folder):
    """{name without transformer.: (path, dtype, shape, where it begins)} of all of a folder's safetensors."""
    found = {}
    for file in sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")):
        path = os.path.join(folder, file)
        with open(path, "rb") as f:
            begin = 8 + int.from_bytes(f.read(8), "little")
            try:
                header = json.loads(f.read(min(begin - 8, 100 << 20)))
                header.pop("__metadata__", None)
                for name, t in header.items():
                    (first, end), count = t["data_offsets"], math.prod(t["shape"])
                    if not 0 <= first <= end <= os.path.getsize(path) - begin:
                        raise ValueError(f"{name} is at bytes {first} to {end} of {os.path.getsize(path) - begin}")
                    if t["dtype"] in DTYPES and count * np.dtype(DTYPES[t["dtype"]]).itemsize != end - first:
                        raise ValueError(f"{name} has {end - first} bytes for the shape {t['shape']}")
                    found[name.removeprefix("transformer.")] = path, t["dtype"], t["shape"], begin + first
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                raise Error(f"{path}: expected safetensors, found something else ({e}); was it cut off?") from None
    return found

def edit(place, values=None):
    """A tensor's values as float64, or puts these in their place: rounded once to its type."""
    path, dtype, shape, begin = place
    with open(path, "rb" if values is None else "r+b") as f:
        f.seek(begin)
        if values is None:
            raw = np.fromfile(f, DTYPES[dtype], math.prod(shape)).reshape(shape)
            return (binfmt.from_bf16(raw) if dtype == "BF16" else raw).astype(np.float64)
        with np.errstate(all="ignore"):
            stored = values.astype("<f2" if dtype == "F16" else "<f4")
        if not np.isfinite(stored).all():
            return False
        f.write((binfmt.to_bf16(stored) if dtype == "BF16" else stored).tobytes())
        return True

def merge_folder(folder):
    """In place, in a folder that is ours."""
    places = find_tensors(folder)
    L = len({name.split(".")[1] for name in places if name.startswith("h.")})
    if L == 0:
        raise Error(f"{folder}: expected a GPT-2, found no tensor h.0.ln_1.weight in its safetensors")
    for norm, matmul in HF_PAIRS:
        before = []
        for l in range(L):
            names = [f"h.{l}.{x}.{kind}" for x in (norm, matmul) for kind in ("weight", "bias")]
            for name in names:
                if name not in places or places[name][1] not in DTYPES:
                    raise Error(f"{folder}: expected tensor {name} of type {', '.join(DTYPES)}, found "
                                f"{places[name][1] if name in places else 'none'}")
            gamma, beta, w, b = (edit(places[name]) for name in names)
            if w.shape != (*gamma.shape, *b.shape) or gamma.shape != beta.shape:
                raise Error(f"{folder}: {names[2]}: expected the shape [{gamma.size}, {b.size}], found {list(w.shape)}")
            before.append((gamma, beta))
            gamma, beta, w, b = merge_one(gamma, beta, w.T, b)  # Conv1D's weights are (in, out)
            for name, values in zip(names, (gamma, beta, w.T, b)):
                if not edit(places[name], values):
                    raise Error(f"{folder}: {name} is not finite after merging; check the model for NaN and infinities")
        report(norm, matmul, L, *map(np.array, zip(*before)))

def work_folder(a):
    if os.path.lexists(a.out):
        raise Error(f"{a.out}: expected a new name, found something there; name another folder")
    temporary = f"{a.out.rstrip('/')}.{os.getpid()}.tmp"
    with binfmt.writing(a.out):
        try:
            shutil.copytree(a.model, temporary, ignore=shutil.ignore_patterns("state_*.bin"))
            merge_folder(temporary)
            for name in os.listdir(temporary):
                with open(os.path.join(temporary, name), "rb") as f:
                    os.fsync(f.fileno())
            os.rename(temporary, a.out)
        except shutil.Error as e:
            raise Error(f"{a.model}: could not be copied: {e.args[0][0][2]}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

# ----------------------------------------------------------------------------------------------------

def work_bin(a):
    if os.path.exists(a.out) and os.path.exists(a.model) and os.path.samefile(a.model, a.out):
        raise Error(f"{a.out}: this is {a.model} itself, and merging cannot be undone; name another file")
    config, tensors = binfmt.read_model(a.model)
    version = binfmt.model_version(a.model)
    merged = merge(tensors)
    limit = np.finfo(np.float32).max
    for name in ("qkvw", "qkvb", "fcw", "fcb"):
        if not (np.abs(merged[name]) <= limit).all():  # a NaN is not, either
            raise Error(f"{a.model}: {name} is not finite after merging; check the model for NaN and infinities")
    with binfmt.writing(a.out):
        binfmt.write_model(a.out, config, merged, version)
    binfmt.say(f"{a.model}: {config}, {'bf16' if version == 5 else 'fp32'}")
    for norm, matmul in PAIRS:
        report(norm, f"{matmul}w and {matmul}b", config.L, tensors[norm + "w"], tensors[norm + "b"])

def work(a):
    (work_folder if os.path.isdir(a.model) else work_bin)(a)
    binfmt.say("the final norm keeps its gamma and beta: the matrix behind it is the embedding")
    binfmt.say(f"wrote {a.out}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="IN", help="a GPT-2: a model's directory, or llm.c's file, fp32 or bf16")
    parser.add_argument("out", metavar="OUT")
    a = parser.parse_args()
    binfmt.run("merge_norm.py", lambda: work(a))

if __name__ == "__main__":
    main()
