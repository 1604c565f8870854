"""test_gpt2 against PyTorch's numbers, in both precisions and with sanitizers."""
import struct

import pytest

from helpers import FIXTURES, ROOT, execute, program

EXACT = ["gpt2_c96", "gpt2_hs64", "gpt2_hs80"]
CODES = ["gpt2_approx_c96", "gpt2_approx_hs64"]  # for builds whose GELU keeps 2 bits; a shared norm is exact
VARIANTS = {"bf16": EXACT, "fp32": EXACT, "approxbp-bf16": CODES, "approxbp-fp32": CODES}   # the halves of approxbp: test_modes.py

def check(variant, pair, status=0, state=None, cwd=FIXTURES, **env):
    done = execute(program(variant, "test_gpt2"), FIXTURES / f"{pair}.bin", state or FIXTURES / f"{pair}_state.bin", cwd=cwd, env=env, timeout=400)
    assert done.status == status, done.out[-4000:] + done.err[-4000:]
    return done

@pytest.mark.parametrize("variant, pair", [(f"{where}-{mode}", pair) for where in ("cpu", "gpu") for mode, pairs in VARIANTS.items() for pair in pairs])
def test_numbers(variant, pair, tmp_path):
    check(variant, pair, cwd=tmp_path)

def test_sanitized(tmp_path):
    """Exact and in bf16: the trainer, in test_determinism.py."""
    check("san-approxbp-fp32", "gpt2_approx_c96", cwd=tmp_path, SIMT_POISON=1)

def fused(done):
    """The lines about GELU in cuBLASLt's epilogue, and the others."""
    lines = done.out.splitlines()
    return [x for x in lines if "--gelu-fusion" in x], [x for x in lines if "--gelu-fusion" not in x]

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_another_gelu_in_the_epilogue(variant, tmp_path):
    """None, one as exact as a GPU's tanh, and a wrong one."""
    pair = "gpt2_hs80"
    ways, others = fused(check(variant, pair, cwd=tmp_path, SIMT_GELU=0))
    assert len(ways) == 2 and all(line.startswith("  skip ") for line in ways) and others[-1].endswith(" 0 failed")
    assert not any("skip" in line for line in others)
    check(variant, pair, cwd=tmp_path, SIMT_GELU_ERROR=488)   # 2^-11
    ways, others = fused(check(variant, pair, cwd=tmp_path, status=1, SIMT_GELU_ERROR=10000))
    assert {way for way in (1, 2) if any(f"--gelu-fusion {way}" in line and "FAIL" in line for line in ways)} == {1, 2}
    assert not any("FAIL" in line for line in others)

@pytest.fixture(scope="module")
def other_shapes(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("shapes"), []
    if execute("/usr/bin/python3", "-c", "import torch", cwd=folder).status != 0:
        pytest.skip("PyTorch is not installed (python3-torch)")
    for seed, T, sizes in ((1, 67, "L3,H5,C160,T67,V301"), (2, 29, "L7,H2,C64,T29,V100"), (3, 9, "L1,H1,C8,T9,V40")):
        made = execute("/usr/bin/python3", ROOT / "prepro/reference.py", "--config", sizes, "--batch", 2, "--seq", T, "--seed", seed,
                       "--steps", 0, "--out", f"s{seed}", cwd=folder)
        assert made.status == 0, made.err
        files += [folder / f"s{seed}.bin", folder / f"s{seed}_state.bin"]
    return files

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_other_shapes(variant, other_shapes, tmp_path):
    done = execute(program(variant, "test_gpt2"), *other_shapes, cwd=tmp_path, timeout=400)
    assert done.status == 0, "\n".join(line for line in done.out.splitlines() if "ok" not in line) + done.err[-2000:]

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_wrong_numbers_fail(variant, tmp_path):
    """Of gpt2_c96_state.bin, whose batch is 2 x 40 and vocabulary 301: half of the logits, the loss, a row of wte's gradient, the last step."""
    data = bytearray((FIXTURES / "gpt2_c96_state.bin").read_bytes())
    logits = 1024 + 2 * 2 * 40 * 4
    loss = logits + 2 * 40 * 301 * 4
    for at, n in ((logits, 40 * 301), (loss, 1), (loss + 4, 96), (len(data) - 4, 1)):
        struct.pack_into(f"<{n}f", data, at, *[1.1 * x + 0.1 for x in struct.unpack_from(f"<{n}f", data, at)])
    (tmp_path / "wrong.bin").write_bytes(data)
    out = check(variant, "gpt2_c96", state=tmp_path / "wrong.bin", status=1, cwd=tmp_path).out
    failed = [line.split("FAIL ")[1] for line in out.splitlines() if "FAIL" in line]
    assert [what for what in ("logits", "loss", "gradient d_wte", "AdamW step  9") if not any(x.startswith(what) for x in failed)] == []
    assert not any(x.startswith("gradient d_") and "d_wte" not in x for x in failed) and "nan" not in out.lower()

def test_files_that_do_not_fit_are_refused(tmp_path):
    model, state, none = FIXTURES / "gpt2_c96.bin", FIXTURES / "gpt2_c96_state.bin", tmp_path / "none.bin"
    for files, named in (((none, state), none), ((model, none), none), ((model, FIXTURES / "gpt2_hs64_state.bin"), "gpt2_hs64_state.bin")):
        done = execute(program("cpu-fp32", "test_gpt2"), *files, cwd=tmp_path)
        assert done.status == 1 and str(named) in done.err
