"""test_gpt2 against PyTorch's numbers, in both precisions, in each order of threads, and with sanitizers."""
import struct

import pytest

from helpers import FIXTURES, execute, program

EXACT = ["gpt2_c96", "gpt2_hs64", "gpt2_hs80"]
CODES = ["gpt2_approx_c96", "gpt2_approx_hs64"]  # for builds whose GELU keeps 2 bits; a shared norm is exact
VARIANTS = {"bf16": EXACT, "fp32": EXACT, "norm-bf16": EXACT, "act-bf16": CODES, "approxbp-bf16": CODES, "approxbp-fp32": CODES}


def check(variant, pair, status=0, state=None, cwd=FIXTURES, **env):
    done = execute(program(variant, "test_gpt2"), FIXTURES / f"{pair}.bin", state or FIXTURES / f"{pair}_state.bin", cwd=cwd, env=env, timeout=400)
    assert done.status == status, done.out[-4000:] + done.err[-4000:]
    return done


@pytest.mark.parametrize("variant, pair", [(f"cpu-{mode}", pair) for mode, pairs in VARIANTS.items() for pair in pairs])
def test_numbers(variant, pair, tmp_path):
    check(variant, pair, cwd=tmp_path)


@pytest.mark.parametrize("mode", ["bf16", "fp32", "approxbp-bf16", "approxbp-fp32"])
def test_numbers_on_a_gpu(mode, tmp_path):
    for pair in VARIANTS[mode]:
        check(f"gpu-{mode}", pair, cwd=tmp_path)


@pytest.mark.parametrize("order, seed", [("reverse", 0), ("priority", 1)])
@pytest.mark.parametrize("mode", ["bf16", "fp32", "approxbp-bf16", "approxbp-fp32"])
def test_orders(mode, order, seed, tmp_path):
    check(f"cpu-{mode}", VARIANTS[mode][0], cwd=tmp_path, SIMT_ORDER=order, SIMT_SEED=seed)


@pytest.mark.parametrize("mode, pair", [("fp32", "gpt2_c96"), ("approxbp-bf16", "gpt2_approx_c96")])
def test_sanitized(mode, pair, tmp_path):
    """Exact bf16: the trainer, in test_determinism.py."""
    check(f"san-{mode}", pair, cwd=tmp_path, SIMT_POISON=1)


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
        made = execute("/usr/bin/python3", FIXTURES.parents[2] / "prepro/reference.py", "--config", sizes, "--batch", 2, "--seq", T, "--seed", seed,
                       "--steps", 0, "--out", f"s{seed}", cwd=folder)
        assert made.status == 0, made.err
        files += [folder / f"s{seed}.bin", folder / f"s{seed}_state.bin"]
    return files


@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-norm-bf16", "cpu-fp32"])
def test_other_shapes(variant, other_shapes, tmp_path):
    done = execute(program(variant, "test_gpt2"), *other_shapes, cwd=tmp_path, timeout=400)
    assert done.status == 0, "\n".join(line for line in done.out.splitlines() if "ok" not in line) + done.err[-2000:]


# offsets into gpt2_c96_state.bin, whose batch is 2 x 40 and vocabulary 301
TOKENS = 2 * 2 * 40 * 4
LOGITS = 2 * 40 * 301 * 4


@pytest.mark.parametrize("what, offset", [("logits", 1024 + TOKENS), ("loss", 1024 + TOKENS + LOGITS), ("a gradient", 1024 + TOKENS + LOGITS + 4),
                                          ("the last AdamW step", -4)])
def test_a_wrong_number_fails(what, offset, tmp_path):
    data = bytearray((FIXTURES / "gpt2_c96_state.bin").read_bytes())
    n = 40 * 301 if what == "logits" else 96 if what == "a gradient" else 1  # of logits a half, of wte's gradient a row
    at = offset % len(data)
    values = struct.unpack_from(f"<{n}f", data, at)
    struct.pack_into(f"<{n}f", data, at, *[1.1 * x + 0.1 for x in values])
    (tmp_path / "wrong.bin").write_bytes(data)
    for variant in ("cpu-fp32", "cpu-bf16"):
        done = check(variant, "gpt2_c96", state=tmp_path / "wrong.bin", status=1, cwd=tmp_path)
        assert "nan" not in done.out.lower()


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, state, none = FIXTURES / "gpt2_c96.bin", FIXTURES / "gpt2_c96_state.bin", tmp_path / "none.bin"
    for files, named in (((none, state), none), ((model, none), none), ((model, FIXTURES / "gpt2_hs64_state.bin"), "gpt2_hs64_state.bin")):
        done = execute(program("cpu-fp32", "test_gpt2"), *files, cwd=tmp_path)
        assert done.status == 1 and str(named) in done.err
