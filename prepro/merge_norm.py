"""Merges the norms of a GPT-2 model's blocks into the weights behind them.

    python3 prepro/merge_norm.py IN.bin OUT.bin

With z the normalised x, a block computes (gamma z + beta) W^T + b. That is z W'^T + b' with W' = W gamma (column by column) and b'
= b + W beta. For ln1 into qkvw and qkvb, and ln2 into fcw and fcb, this writes W' and b', computed in float64, and sets gamma to 1
and beta to 0: the model of the published MS-LayerNorm (Yang et al., ICML 2024, arXiv 2406.16282). OUT computes what IN computes,
within the rounding of its precision, which is IN's; but training it trains other parameters. A trainer built with MS_NORM=1 does
not need it: it folds gamma and beta at use.

The final norm keeps its gamma and beta. The matrix behind it is the embedding, so scaling its
columns would also change what enters the first block, and the head has no bias to take beta.
"""
import argparse
import os

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
from binfmt import Error

PAIRS = [("ln1", "qkv"), ("ln2", "fc")]

def merge(tensors):
    """Returns a dict like tensors, merged: what has changed in float64, the rest as it was."""
    merged = dict(tensors)
    for norm, matmul in PAIRS:
        gamma, beta, w, b = (tensors[name].astype(np.float64) for name in (norm + "w", norm + "b", matmul + "w", matmul + "b"))
        merged[matmul + "w"] = w * gamma[:, None, :]  # (L, out, C) by the columns
        merged[matmul + "b"] = b + np.einsum("loc,lc->lo", w, beta)
        merged[norm + "w"], merged[norm + "b"] = np.ones_like(gamma), np.zeros_like(beta)
    return merged

def work(a):
    if os.path.exists(a.out) and os.path.exists(a.model) and os.path.samefile(a.model, a.out):
        raise Error(f"{a.out}: this is {a.model} itself, and merging cannot be undone; name another file")
    config, tensors = binfmt.read_model(a.model)
    version = binfmt.model_version(a.model)
    with np.errstate(all="ignore"):  # infinities are said below
        merged = merge(tensors)
    limit = np.finfo(np.float32).max
    for name in ("qkvw", "qkvb", "fcw", "fcb"):
        if not (np.abs(merged[name]) <= limit).all():  # a NaN is not, either
            raise Error(f"{a.model}: {name} is not finite after merging; check the model for NaN and infinities")
    with binfmt.writing(a.out):
        binfmt.write_model(a.out, config, merged, version)
    binfmt.say(f"{a.model}: {config}, {'bf16' if version == 5 else 'fp32'}")
    for norm, matmul in PAIRS:
        gamma, beta = tensors[norm + "w"], tensors[norm + "b"]
        nothing = ", so nothing to merge" if (gamma == 1).all() and (beta == 0).all() else ""
        binfmt.say(f"{norm} into {matmul}w and {matmul}b, {config.L} layer{'s' * (config.L > 1)}: gamma was "
              f"{gamma.min():.6g} to {gamma.max():.6g}, beta {beta.min():.6g} to {beta.max():.6g}{nothing}")
    binfmt.say("the final norm keeps its gamma and beta: the matrix behind it is the embedding")
    binfmt.say(f"wrote {a.out}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="IN.bin", help="a GPT-2 model, fp32 or bf16")
    parser.add_argument("out", metavar="OUT.bin")
    a = parser.parse_args()
    binfmt.run("merge_norm.py", lambda: work(a))

if __name__ == "__main__":
    main()
