"""Tests of what USE_APPROXBP stands on in Python: the fit of the codes, their table, the reference with
codes and its fixtures, and merging norms.

    python3 -m pytest -q dev/test/test_approxbp_tools.py

Needs numpy and pytest. What needs SciPy, Matplotlib or PyTorch is skipped where they are missing.
"""
import importlib
import math
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from helpers import library

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
FIXTURES = os.path.join(ROOT, "dev/test/fixtures")
sys.path[:0] = [os.path.join(ROOT, "prepro"), os.path.join(ROOT, "dev/bench")]
import binfmt  # noqa: E402
import codes  # noqa: E402
import merge_norm  # noqa: E402

TABLE = [(function, bits) for function in codes.CODES for bits in codes.CODES[function]]


def run(script, *args, status=0):
    """Runs a script of the tree; returns what it printed to stdout, or to stderr if it is to fail."""
    p = subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, args)], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.returncode == status, p.stderr.decode()
    assert b"Traceback" not in p.stderr
    return (p.stderr if status else p.stdout).decode()


# ----------------------------------------------------------------------------
# the table

def test_the_table_is_whole():
    assert TABLE == [(function, bits) for function in ("gelu-tanh", "silu") for bits in (1, 2, 3, 4)]


@pytest.mark.parametrize("function, bits", TABLE)
def test_constraints(function, bits):
    c, slopes = map(np.array, codes.CODES[function][bits])
    assert len(c) == 2**bits - 1 and len(slopes) == 2**bits
    assert (np.diff(c.astype(np.float32)) > 0).all()
    assert slopes[0] == 0 and slopes[-1] == 1
    assert abs(math.fsum(np.diff(slopes) * c)) < 3e-15  # sum a c; sum a = 1 is the line above


def test_two_bits_are_the_published_ones():
    assert codes.CODES["gelu-tanh"][2] == ((-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
                                           (0, -0.04922261145617846, 1.0487405950855512, 1))
    assert codes.CODES["silu"][2] == ((-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
                                      (0, -0.04060357190528599, 1.0403218566243820, 1))


@pytest.mark.parametrize("function, bits", TABLE)
def test_codes_at_the_thresholds(function, bits):
    """At a threshold and below it the lower code, one float above it the higher one."""
    for j, constant in enumerate(codes.CODES[function][bits][0]):
        t = np.float32(constant)
        around = np.array([np.nextafter(t, np.float32(-np.inf)), t, np.nextafter(t, np.float32(np.inf))])
        assert around.dtype == np.float32
        assert codes.codes(around, function, bits).tolist() == [j, j, j + 1]
        nearest = np.abs(around.astype(np.float64) - constant)
        assert nearest[1] == nearest.min()


@pytest.mark.parametrize("function, bits", TABLE)
def test_codes_of_what_is_not_a_number(function, bits):
    x = np.array([-np.inf, np.inf, np.nan, -np.nan, -1e38, 1e38], np.float32)
    top = 2**bits - 1
    assert codes.codes(x, function, bits).tolist() == [0, top, top, top, 0, top]
    assert codes.codes(np.float32([0.0, -0.0]), function, bits).tolist() == [sum(c < 0 for c in codes.CODES[function][bits][0])] * 2
    assert codes.slopes(x, function, bits).tolist() == [0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("function, bits", TABLE)
def test_codes_by_a_loop(function, bits):
    x = (np.random.RandomState(bits).randn(3, 500) * 4).astype(np.float32)
    got = codes.codes(x, function, bits)
    assert got.dtype == np.uint8 and got.shape == x.shape
    for value, code in zip(x.ravel(), got.ravel()):
        assert code == sum(1 for c in codes.CODES[function][bits][0] if np.float32(c) < value)


# ----------------------------------------------------------------------------
# fit_codes.py

@pytest.fixture(scope="module")
def fit_codes():
    library("scipy", "python3-scipy")
    return importlib.import_module("fit_codes")


@pytest.fixture(scope="module")
def fitted(fit_codes):
    made = {}

    def get(function, bits):
        if (function, bits) not in made:
            made[function, bits] = fit_codes.fit(function, bits)
        return made[function, bits]
    return get


@pytest.mark.parametrize("function, objective, threshold, published", [
    ("gelu-erf", 0.0095069, 3.17131, 0.0095093), ("gelu-tanh", 0.0095522, 3.16288, 0.0095560), ("silu", 0.0399413, 6.31993, 0.0399438)])
def test_two_bits(fit_codes, fitted, function, objective, threshold, published):
    result = fitted(function, 2)
    h, _ = fit_codes.FUNCTIONS[function]
    assert result["objective"] == pytest.approx(objective, abs=5.1e-8)
    assert result["c"] == pytest.approx([-threshold, 0, threshold], abs=5.1e-6)
    assert fit_codes.objective(h, *map(np.array, fit_codes.PUBLISHED[function])) == pytest.approx(published, abs=5.1e-8)


def test_errors_of_the_slope(fit_codes):
    """The figures that the documentation quotes."""
    for function in ("gelu-erf", "gelu-tanh"):
        _, slope = fit_codes.FUNCTIONS[function]
        assert fit_codes.slope_error(slope, *map(np.array, fit_codes.PUBLISHED[function])) == pytest.approx(0.127, abs=5e-4)
        assert fit_codes.slope_error(slope, np.zeros(1), np.array([0, 1])) == pytest.approx(0.102, abs=6e-4)
        assert fit_codes.best_step_error(slope, 4) == pytest.approx(0.018, abs=5e-4)


def test_slope_error_by_sampling(fit_codes):
    x = np.random.RandomState(1).randn(1000000)
    exact = fit_codes.gelu_tanh_slope(x)
    for bits in (1, 2, 3, 4):
        c, slopes = map(np.array, codes.CODES["gelu-tanh"][bits])
        sampled = ((codes.slopes(x, "gelu-tanh", bits) - exact)**2).mean() / (exact**2).mean()
        assert sampled == pytest.approx(fit_codes.slope_error(fit_codes.gelu_tanh_slope, c, slopes), rel=0.02)


@pytest.mark.parametrize("function", ["gelu-tanh", "gelu-erf", "silu"])
def test_slopes_are_the_derivatives(fit_codes, function):
    h, slope = fit_codes.FUNCTIONS[function]
    x = np.linspace(-9, 9, 501)
    np.testing.assert_allclose((h(x + 1e-5) - h(x - 1e-5)) / 2e-5, slope(x), atol=1e-9)
    np.testing.assert_allclose(h(x) - h(-x), x, rtol=1e-14, atol=1e-15)  # h(x) - x/2 is even


@pytest.mark.parametrize("function, bits", [(f, b) for f, b in TABLE if b != 2])
def test_the_table_is_the_fit(fitted, function, bits):
    result = fitted(function, bits)
    c, slopes = codes.CODES[function][bits]
    np.testing.assert_allclose(result["c"], c, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result["slopes"], slopes, rtol=0, atol=1e-9)
    assert (np.float32(result["c"]) == np.float32(c)).all()


@pytest.mark.parametrize("function, bits", [(f, b) for f in ("gelu-tanh", "gelu-erf", "silu") for b in (2, 3, 4)])
def test_the_fit_is_an_optimum(fit_codes, fitted, function, bits):
    """By sums over a grid and numpy's least squares: nothing of fit_codes.py but h and the answer."""
    result = fitted(function, bits)
    assert result["agree"] >= 5 and result["spread"] < 1e-9
    h, _ = fit_codes.FUNCTIONS[function]
    step = 1 / 256
    x = np.arange(-40, 40, step) + step / 2

    def best(c):
        """The objective with the best a for these thresholds: a = one that is allowed + what the constraints leave."""
        constraints = np.stack([np.ones_like(c), c])
        allowed = np.linalg.lstsq(constraints, np.array([1.0, 0.0]), rcond=None)[0]
        free = np.linalg.svd(constraints)[2][2:].T
        bends = np.maximum(x[:, None] - c, 0)
        target = h(x) - bends @ allowed
        z = np.linalg.lstsq(bends @ free, target, rcond=None)[0]
        return step * ((target - bends @ free @ z)**2).sum(), allowed + free @ z

    c = result["c"]
    value, a = best(c)
    assert value == pytest.approx(result["objective"], rel=1e-3)
    np.testing.assert_allclose(np.cumsum(a), result["slopes"][1:], atol=1e-3)
    rng = np.random.RandomState(1)
    for i in range(12):
        away = 0.02 * rng.randn(len(c))
        assert best(c + away)[0] > value


def test_fit_is_deterministic_and_symmetric(fit_codes, fitted):
    again = fit_codes.fit("gelu-tanh", 3)
    assert (again["c"] == fitted("gelu-tanh", 3)["c"]).all() and (again["slopes"] == fitted("gelu-tanh", 3)["slopes"]).all()
    assert not again["symmetric"] and (again["c"] < 0).sum() == 4
    for function, bits in (("gelu-tanh", 2), ("gelu-tanh", 4), ("silu", 3), ("silu", 4)):
        result = fitted(function, bits)
        assert result["symmetric"] and (result["c"] == -result["c"][::-1]).all()
        assert np.abs(result["slopes"] + result["slopes"][::-1] - 1).max() < 3e-16


def test_fit_codes_program(tmp_path):
    library("scipy", "python3-scipy")
    library("matplotlib", "python3-matplotlib")
    args = ["--function", "gelu-tanh", "--bits", 1, 2]
    out = run("dev/bench/fit_codes.py", *args, "--plot", tmp_path / "new" / "codes.png")
    assert out.startswith(run("dev/bench/fit_codes.py", *args))
    assert "ReLU" in out and "-3.1858810036855245" in out and "of 40 random starts" in out
    assert "{{0.0},\n     {0.0, 1.0}}," in out
    png = (tmp_path / "new" / "codes.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">2I", png[16:24])) > 500
    (tmp_path / "file").write_text("")
    assert "could not write" in run("dev/bench/fit_codes.py", *args, "--plot", tmp_path / "file" / "codes.png", status=1)
    assert "choose from" in run("dev/bench/fit_codes.py", "--bits", 5, status=2)


# ----------------------------------------------------------------------------
# reference.py --approxbp

@pytest.fixture(scope="module")
def reference():
    library("torch", "python3-torch")
    return importlib.import_module("reference")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_coded_gelu_by_a_loop(reference, bits):
    import torch
    rng = np.random.RandomState(bits)
    x = rng.randn(4, 5, 60) * 2
    edges = np.float32(codes.CODES["gelu-tanh"][bits][0])
    for i, t in enumerate(edges):  # both neighbours too, which only float32 thresholds tell apart
        x[0, 0, 3 * i:3 * i + 3] = np.nextafter(t, np.float32(-9)), t, np.nextafter(t, np.float32(9))
    dout = rng.randn(*x.shape)
    leaf = torch.tensor(x, requires_grad=True)
    activation = reference.CodedActivation(bits)
    out = activation(leaf)
    assert torch.equal(out, reference.gelu(torch.tensor(x)))  # forward is GELU's own, to the bit
    out.backward(torch.tensor(dout))
    slopes = codes.CODES["gelu-tanh"][bits][1]
    expected = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        code = 0
        for t in edges:
            if x[at] > float(t):
                code += 1
        expected[at] = dout[at] * slopes[code]
    assert (leaf.grad.numpy() == expected).all()
    assert activation.calls == [(x.size, 0.0)]


def test_coded_gelu_of_nan(reference):
    import torch
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.float64, requires_grad=True)
    out = reference.CodedActivation(2)(x)
    assert out[0].isnan()
    out.backward(torch.ones(4, dtype=torch.float64))
    assert x.grad.tolist()[:3] == [1, 1, 0]


def test_coded_gradients_are_those_of_h_tilde(reference):
    """The gradient before the activation equals, by finite differences of h~ itself, dout h~'."""
    for bits in (2, 3, 4):
        c, slopes = map(np.array, codes.CODES["gelu-tanh"][bits])

        def h_tilde(x):
            return (np.diff(slopes) * np.maximum(x[:, None] - c, 0)).sum(1)
        x = np.random.RandomState(0).randn(1000) * 3
        x = x[np.abs(x[:, None] - c).min(1) > 1e-4]
        np.testing.assert_allclose((h_tilde(x + 1e-5) - h_tilde(x - 1e-5)) / 2e-5, codes.slopes(x, "gelu-tanh", bits), atol=1e-9)


def test_what_codes_change(reference):
    """Not the forward pass, not the gradients behind the last activation; all before it."""
    config = binfmt.Config.parse("L1,H2,C8,T6,V11")
    tensors = reference.random_model(config, 2)
    x, y = reference.random_batch(config, 2, 6, 2)
    exact = reference.compute(config, tensors, x, y, 2)
    coded = reference.compute(config, tensors, x, y, 2, reference.CodedActivation(2))
    assert (exact[0] == coded[0]).all() and exact[1] == coded[1]
    behind = {"fcprojw", "fcprojb", "lnfw", "lnfb"}
    for name, g in exact[2].items():
        near = np.abs(g - coded[2][name]).max() <= 1e-3 * np.abs(g).max()
        assert near == (name in behind), name
        if near:
            assert (g == coded[2][name]).all()
    assert exact[3][0] == coded[3][0] and exact[3][1] != coded[3][1]  # AdamW takes the coded gradients


def test_reference_options(reference, tmp_path):
    sizes = ["--config", "L1,H2,C8,T6,V11", "--seq", 6, "--steps", 2]
    out = run("prepro/reference.py", *sizes, "--approxbp", "--margin", 1e-4, "--out", tmp_path / "two")
    seed = re.search(r"^seed (\d+): 384 pre-activations, codes of 2 bits", out, re.M)
    again = run("prepro/reference.py", *sizes, "--approxbp", "--seed", seed[1], "--out", tmp_path / "again")
    assert out.split("\n")[:-2] == again.split("\n")[:-2]
    assert (tmp_path / "two_state.bin").read_bytes() == (tmp_path / "again_state.bin").read_bytes()
    for bits in (1, 3, 4):
        assert f"codes of {bits} bit" in run("prepro/reference.py", *sizes, "--approxbp", "--act-bits", bits, "--out", tmp_path / f"{bits}")
    run("prepro/reference.py", *sizes, "--seed", seed[1], "--out", tmp_path / "exact")
    config, _ = binfmt.read_model(tmp_path / "two.bin")
    exact, two = (binfmt.read_state(tmp_path / f"{name}_state.bin", config) for name in ("exact", "two"))
    assert (exact["logits"] == two["logits"]).all() and (exact["grads"]["fcw"] != two["grads"]["fcw"]).any()


@pytest.mark.parametrize("args, what", [(["--act-bits", 3], "--approxbp"), (["--margin", 1e-5], "--approxbp"),
                                        (["--approxbp", "--margin", 0], "above 0"), (["--approxbp", "--margin", "nan"], "above 0"),
                                        (["--approxbp", "--margin", 5, "--steps", 0], "no seed from 1 to 1000")])
def test_reference_errors(reference, tmp_path, args, what):
    assert what in run("prepro/reference.py", "--config", "L1,H1,C4,T2,V11", "--seq", 2, "--batch", 1, *args, "--out", tmp_path / "x", status=1)
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------
# the fixtures

def fixture_commands():
    lines = open(os.path.join(FIXTURES, "README.md")).read()
    return re.findall(r"^python3 prepro/reference\.py (.*) --out dev/test/fixtures/(gpt2_approx_\w+) (--approxbp.*)$", lines, re.M)


def test_the_fixtures_have_their_command():
    assert [name for _, name, _ in fixture_commands()] == ["gpt2_approx_c96", "gpt2_approx_hs64"]


@pytest.mark.parametrize("name", ["gpt2_approx_c96", "gpt2_approx_hs64"])
def test_fixtures_are_sound(name):
    config, tensors = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    state = binfmt.read_state(f"{FIXTURES}/{name}_state.bin", config)
    assert sum(os.path.getsize(f"{FIXTURES}/{name}{end}.bin") for end in ("", "_state")) < 2.5e6
    B, T = state["x"].shape
    assert B >= 2 and config.L * B * T * 4 * config.C < 20000
    assert len(state["losses"]) == 10 and state["losses"][0] == state["loss"] and (np.diff(state["losses"]) < 0).all()
    for key, g in state["grads"].items():  # a test by relative error needs something to be relative to
        assert np.linalg.norm(g) > 0.03, key
        assert (tensors[key].view("<u4") & 0xFFFF == 0).all(), f"{key} does not fit into bf16"


@pytest.mark.parametrize("args, name, more", fixture_commands())
def test_fixtures_regenerate(reference, tmp_path, args, name, more):
    """As in test_prepro.py: the model to the bit, the rest to what versions of PyTorch may differ by."""
    run("prepro/reference.py", *args.split(), "--out", tmp_path / name, *more.split())
    assert (tmp_path / f"{name}.bin").read_bytes() == open(f"{FIXTURES}/{name}.bin", "rb").read()
    config, _ = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    new, old = (binfmt.read_state(f"{folder}/{name}_state.bin", config) for folder in (tmp_path, FIXTURES))
    for key in ("x", "y"):
        assert (new[key] == old[key]).all()
    for key in ("logits", "loss", "losses"):
        np.testing.assert_allclose(new[key], old[key], rtol=1e-6, atol=1e-9)
    for key, g in old["grads"].items():
        np.testing.assert_allclose(new["grads"][key], g, rtol=1e-6, atol=1e-9 * abs(g).max(), err_msg=key)


@pytest.mark.parametrize("name", ["gpt2_approx_c96", "gpt2_approx_hs64"])
def test_fixtures_keep_their_distance(reference, monkeypatch, name):
    """In float64 no input of GELU is within 2e-5 of a threshold in any step, and all four codes occur;
    computed in float32 throughout, all codes of all steps are the same ones."""
    import torch
    config, tensors = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    state = binfmt.read_state(f"{FIXTURES}/{name}_state.bin", config)
    x, y = (state[key].astype(np.int64) for key in "xy")

    def inputs(dtype):
        seen = []

        def activation(a):
            seen.append(a.detach().numpy().copy())
            return reference.CodedGelu.apply(a, 2)

        def to_params(tensors):
            def leaf(values):
                return torch.tensor(values, dtype=dtype, requires_grad=True)
            outside = ("wte", "wpe", "lnfw", "lnfb")
            return {key: leaf(t) if key in outside else [leaf(layer) for layer in t] for key, t in tensors.items()}
        monkeypatch.setattr(reference, "to_params", to_params)
        losses = reference.compute(config, tensors, x, y, 10, activation)[3]
        return np.stack(seen), losses
    exact, losses = inputs(torch.float64)
    single, single_losses = inputs(torch.float32)
    assert exact.dtype == np.float64 and single.dtype == np.float32
    assert len(exact) == 11 * config.L and exact[:config.L].size == config.L * x.size * 4 * config.C
    thresholds = np.float64(np.float32(codes.CODES["gelu-tanh"][2][0]))
    first, later = (np.abs(part[..., None] - thresholds).min() for part in (exact[:config.L], exact[config.L:]))
    assert first > 4e-5 and later > 2e-5
    assert set(np.unique(codes.codes(exact[:config.L]))) == {0, 1, 2, 3}
    print(f"{name}: float32 is off by {np.abs(single - exact)[:config.L].max():.2g} in the first step, "
          f"{np.abs(single - exact)[-config.L:].max():.2g} in the last")
    assert np.abs(single - exact)[:config.L].max() < 5e-6
    assert (codes.codes(single) == codes.codes(exact)).all()
    np.testing.assert_allclose(losses, state["losses"], rtol=1e-6)
    np.testing.assert_allclose(single_losses, state["losses"], rtol=1e-5)


# ----------------------------------------------------------------------------
# merge_norm.py

SIZES = binfmt.Config.parse("L2,H2,C12,T7,V19")


def any_model(config=SIZES, seed=1):
    rng = np.random.RandomState(seed)
    return {name: (rng.randn(*shape) / math.sqrt(shape[-1]) + (name in ("ln1w", "ln2w", "lnfw"))).astype(np.float32)
            for name, shape in config.shapes().items()}


def test_merge_by_a_loop():
    tensors = any_model()
    before = {name: t.copy() for name, t in tensors.items()}
    merged = merge_norm.merge(tensors)
    assert all((tensors[name] == before[name]).all() for name in before)
    C = SIZES.C
    for norm, matmul, out in (("ln1", "qkv", 3 * C), ("ln2", "fc", 4 * C)):
        for l in range(SIZES.L):
            for o in range(out):
                b = float(tensors[matmul + "b"][l, o])
                for c in range(C):
                    w = float(tensors[matmul + "w"][l, o, c])
                    assert merged[matmul + "w"][l, o, c] == w * float(tensors[norm + "w"][l, c])
                    b += w * float(tensors[norm + "b"][l, c])
                assert merged[matmul + "b"][l, o] == pytest.approx(b, rel=1e-12, abs=1e-14)
        assert (merged[norm + "w"] == 1).all() and (merged[norm + "b"] == 0).all()
    for name in ("wte", "wpe", "attprojw", "attprojb", "fcprojw", "fcprojb", "lnfw", "lnfb"):
        assert (merged[name] == tensors[name]).all()


@pytest.mark.parametrize("version", [3, 5])
def test_merge_program(tmp_path, version):
    binfmt.write_model(tmp_path / "in.bin", SIZES, any_model(), version)
    source = (tmp_path / "in.bin").read_bytes()
    out = run("prepro/merge_norm.py", tmp_path / "in.bin", tmp_path / "out.bin")
    assert ("bf16" if version == 5 else "fp32") in out and "ln1 into qkvw and qkvb, 2 layers" in out
    assert "final norm keeps" in out and "nothing to merge" not in out
    assert (tmp_path / "in.bin").read_bytes() == source
    assert (tmp_path / "out.bin").read_bytes()[:1024] == source[:1024] and os.path.getsize(tmp_path / "out.bin") == len(source)
    config, tensors = binfmt.read_model(tmp_path / "in.bin")
    _, merged = binfmt.read_model(tmp_path / "out.bin")
    for name, value in merge_norm.merge(tensors).items():
        np.testing.assert_allclose(merged[name], value, rtol=2**-23 if version == 3 else 2**-8, err_msg=name)
    again = run("prepro/merge_norm.py", tmp_path / "out.bin", tmp_path / "again.bin")
    assert again.count("nothing to merge") == 2
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.bin", "in.bin", "out.bin"]


@pytest.mark.parametrize("name", ["gpt2_c96", "gpt2_hs64"])
@pytest.mark.parametrize("dtype, file, bar", [("float64", False, 1e-13), ("float64", True, 2e-6), ("float32", True, 1e-5)])
def test_merging_leaves_the_forward_pass(reference, tmp_path, name, dtype, file, bar):
    """In float64 without a file between, and with the merged weights rounded to the file's float32."""
    import torch
    config, tensors = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    merged = merge_norm.merge(tensors)
    if file:
        run("prepro/merge_norm.py", f"{FIXTURES}/{name}.bin", tmp_path / "merged.bin")
        _, merged = binfmt.read_model(tmp_path / "merged.bin")
    x, _ = reference.random_batch(config, 2, 40, 1)

    def logits(tensors):
        outside = ("wte", "wpe", "lnfw", "lnfb")
        params = {key: torch.tensor(t, dtype=getattr(torch, dtype)) if key in outside
                  else [torch.tensor(layer, dtype=getattr(torch, dtype)) for layer in t] for key, t in tensors.items()}
        return reference.forward(params, config, torch.from_numpy(x)).numpy()
    before, after = logits(tensors), logits(merged)
    assert not (before == after).all() and before.std() > 0.5
    assert np.abs(before - after).max() < bar * np.abs(before).max()
    merged["lnfw"] = merged["lnfw"] * 1.01  # and the bar sees a hundredth
    assert np.abs(before - logits(merged)).max() > 100 * bar * np.abs(before).max()


def test_merge_errors(tmp_path):
    model, out = tmp_path / "in.bin", tmp_path / "out.bin"
    binfmt.write_model(model, SIZES, any_model())

    def fails(*args):
        return run("prepro/merge_norm.py", *args, status=1)
    assert "none.bin" in fails(tmp_path / "none.bin", out)
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in fails(tmp_path / "pipe", out)  # and nobody waits for its writer
    assert "this is" in fails(model, model)
    os.link(model, tmp_path / "link.bin")
    assert "this is" in fails(model, tmp_path / "link.bin")
    (tmp_path / "short.bin").write_bytes(model.read_bytes()[:-4])
    assert "expected" in fails(tmp_path / "short.bin", out)
    llama = bytearray(model.read_bytes())
    llama[:4] = struct.pack("<i", 20240803)
    (tmp_path / "llama.bin").write_bytes(llama)
    assert "a Llama model" in fails(tmp_path / "llama.bin", out)
    assert "could not write" in fails(model, tmp_path / "none" / "out.bin")
    for value, tensor in ((np.nan, "ln2b"), (np.inf, "fcw")):
        bad = any_model()
        bad[tensor].flat[5] = value
        binfmt.write_model(tmp_path / "bad.bin", SIZES, bad)
        assert "not finite" in fails(tmp_path / "bad.bin", out)
    big = any_model()
    big["ln1w"][:] = big["qkvw"][:] = 1e30
    binfmt.write_model(tmp_path / "bad.bin", SIZES, big)
    assert "qkvw is not finite" in fails(tmp_path / "bad.bin", out)
    assert sorted(os.listdir(tmp_path)) == ["bad.bin", "in.bin", "link.bin", "llama.bin", "pipe", "short.bin"]
