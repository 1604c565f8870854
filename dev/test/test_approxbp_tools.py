"""What USE_APPROXBP stands on in Python: the table of the codes, its fit, the reference with codes, and merging norms. What needs SciPy,
Matplotlib or PyTorch is skipped where they are missing."""
import importlib
import json
import math
import os
import re
import sys

import numpy as np
import pytest

import helpers
from helpers import FIXTURES, ROOT, library, script

sys.path[:0] = [str(ROOT / "prepro"), str(ROOT / "dev/bench")]
import binfmt  # noqa: E402
import codes  # noqa: E402
import merge_norm  # noqa: E402

TABLE = [(function, bits) for function in ("gelu-tanh", "silu") for bits in (1, 2, 3, 4)]

# ---- the table -----------------------------------------------------------------------------------

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

@pytest.mark.parametrize("bits", [1, 2, 3, 4, "slope"])
@pytest.mark.parametrize("trainer, steps, function", [("train_gpt2", "gelu_steps", "gelu-tanh"), ("train_llama", "silu_steps", "silu")])
def test_the_trainer_has_the_table(trainer, steps, function, bits):
    text = (ROOT / f"{trainer}.cu").read_text()
    bodies = re.findall(r"return \{(.*?)\};", re.search(rf"StepFunction<BITS> {steps}\(\) \{{(.*?)\n\}}", text, re.S)[1], re.S)
    body = bodies[[1, "slope", 2, 3, 4].index(bits)]
    found = [[float(x.rstrip("f")) for x in part.split(",")] for part in re.findall(r"\{([^{}]*)\}", body)]
    assert found == [list(part) for part in codes.CODES[function][bits]]

@pytest.mark.parametrize("function, bits", TABLE)
def test_codes_by_a_loop(function, bits):
    """Of numbers, of each threshold and its neighbours in float32, and of what is not a number."""
    c = [np.float32(t) for t in codes.CODES[function][bits][0]]
    far = np.float32(np.inf)
    x = np.concatenate([np.random.RandomState(bits).randn(1500) * 4, [0, -0.0, -far, far, -1e38, 1e38],
                        *([np.nextafter(t, -far), t, np.nextafter(t, far)] for t in c)]).astype(np.float32)
    got = codes.codes(x, function, bits)
    assert got.dtype == np.uint8 and got.tolist() == [sum(t < value for t in c) for value in x]
    assert codes.slopes(x, function, bits).tolist() == [codes.CODES[function][bits][1][code] for code in got]
    assert codes.codes(np.float32([np.nan, -np.nan]), function, bits).tolist() == 2 * [2**bits - 1]
    assert codes.slopes(np.float32([-far, far, np.nan]), function, bits).tolist() == [0, 1, 1]

# ---- fit_codes.py --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fit_codes():
    library("scipy", "python3-scipy")
    return importlib.import_module("fit_codes")

@pytest.mark.parametrize("function", ["gelu-tanh", "silu"])
def test_the_table_is_the_fit(fit_codes, function):
    """3 bits: not symmetric for GELU. Of 2 bits the published constants are near the optimum, and not it."""
    for found, table in zip(fit_codes.fit(function, 3), codes.CODES[function][3]):
        np.testing.assert_allclose(found, table, rtol=0, atol=1e-9)
    problem = fit_codes.Problem(fit_codes.FUNCTIONS[function][0])
    best, published = (problem.solve(np.array(c))[0] for c in (fit_codes.fit(function, 2)[0], codes.CODES[function][2][0]))
    assert best < published < 1.0005 * best
    for found, table in zip(fit_codes.fit_slope(function), codes.CODES[function]["slope"]):
        np.testing.assert_allclose(found, table, rtol=0, atol=1e-12)

@pytest.mark.parametrize("function", ["gelu-tanh", "silu"])
def test_no_step_function_is_nearer_to_the_slope(fit_codes, function):
    """Whichever of its numbers is moved, the error grows; and it is a tenth of the published one's."""
    slope, (c, s) = fit_codes.FUNCTIONS[function][1], map(np.array, codes.CODES[function]["slope"])
    best = fit_codes.slope_error(slope, c, s)
    assert best < 0.15 * fit_codes.slope_error(slope, *map(np.array, codes.CODES[function][2]))
    for by in (1e-2, -1e-2):
        for i in range(3):
            assert fit_codes.slope_error(slope, c + by * (np.arange(3) == i), s) > best
        for i in range(4):
            assert fit_codes.slope_error(slope, c, s + by * (np.arange(4) == i)) > best

@pytest.mark.parametrize("function", ["gelu-tanh", "silu"])
def test_errors_of_the_slope(fit_codes, function):
    """By sampling; of GELU the figures that train_gpt2.cu quotes."""
    h, slope = fit_codes.FUNCTIONS[function]
    x = np.random.RandomState(1).randn(200000)
    np.testing.assert_allclose((h(x + 1e-5) - h(x - 1e-5)) / 2e-5, slope(x), atol=1e-9)
    for bits, said in ((1, 0.1025), (2, 0.1273), (3, None), (4, None)):
        error = fit_codes.slope_error(slope, *map(np.array, codes.CODES[function][bits]))
        assert ((codes.slopes(x, function, bits) - slope(x))**2).mean() / (slope(x)**2).mean() == pytest.approx(error, rel=0.05)
        assert function == "silu" or said is None or error == pytest.approx(said, abs=1e-4)

def test_fit_codes_program(fit_codes, tmp_path):
    library("matplotlib", "python3-matplotlib")
    out = script("dev/bench/fit_codes.py", "--function", "gelu-tanh", "--bits", 1, 2, "--plot", tmp_path / "new/codes.png")
    assert "{0.0, 1.0}," in out and "-3.1858810036855245" in out
    assert (tmp_path / "new/codes.png").read_bytes()[:4] == b"\x89PNG"
    assert "choose from" in script("dev/bench/fit_codes.py", "--bits", 5, status=2)

# ---- reference.py --approxbp ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def reference():
    library("torch", "python3-torch")
    return importlib.import_module("reference")

@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_coded_gelu(reference, bits):
    import torch
    edges = np.float32(codes.CODES["gelu-tanh"][bits][0])
    x = np.concatenate([np.random.RandomState(bits).randn(1000) * 2, edges, np.nextafter(edges, np.float32(9)), [np.inf, -np.inf]])
    dout = np.random.RandomState(9).randn(*x.shape)
    leaf = torch.tensor(x, requires_grad=True)
    activation = reference.CodedActivation(bits)
    out = activation(leaf)
    assert torch.equal(out[:-1], reference.gelu(torch.tensor(x))[:-1])  # forward is GELU's own, to the bit
    out.backward(torch.tensor(dout))
    assert (leaf.grad.numpy() == dout * codes.slopes(x, "gelu-tanh", bits)).all()
    assert activation.calls == [(x.size, 0.0)]
    assert reference.CodedActivation(bits)(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()

@pytest.mark.parametrize("args, what", [(["--act-bits", 3], "--approxbp"), (["--approxbp", "--act-fit", "slope", "--act-bits", 3], "--act-fit slope"),
                                        (["--act-fit", "slope"], "--act-fit slope"), (["--margin", 1e-5], "--approxbp"),
                                        (["--approxbp", "--margin", 0], "above 0"), (["--approxbp", "--margin", "nan"], "above 0"),
                                        (["--approxbp", "--margin", 5, "--steps", 0], "no seed from 1 to 1000")])
def test_reference_errors(reference, tmp_path, monkeypatch, args, what):
    small = ["--config", "L1,H1,C4,T2,V11", "--seq", 2, "--batch", 1]
    monkeypatch.setattr(sys, "argv", ["reference.py", *map(str, [*small, *args, "--out", tmp_path / "x"])])
    with pytest.raises(SystemExit, match=what):
        reference.main()
    assert os.listdir(tmp_path) == []

# ---- merge_norm.py -------------------------------------------------------------------------------

@pytest.mark.parametrize("version", [3, 5])
def test_merge_norm(tmp_path, version):
    """By a loop, to the file's rounding; merging once more changes nothing."""
    config = binfmt.Config.parse("L2,H2,C12,T7,V19")
    rng, near = np.random.RandomState(1), {3: 2**-23, 5: 2**-8}[version]
    model = {name: rng.randn(*shape).astype(np.float32) for name, shape in config.shapes().items()}
    binfmt.write_model(tmp_path / "in.bin", config, model, version)
    out = script("prepro/merge_norm.py", tmp_path / "in.bin", tmp_path / "out.bin")
    assert "ln1 into qkvw and qkvb, 2 layers" in out and "nothing to merge" not in out
    (_, old), (_, new) = (binfmt.read_model(tmp_path / f"{name}.bin") for name in ("in", "out"))
    for norm, matmul in (("ln1", "qkv"), ("ln2", "fc")):
        for l in range(config.L):
            w, b, gamma, beta = (old[name][l].astype(np.float64) for name in (matmul + "w", matmul + "b", norm + "w", norm + "b"))
            for o in range(len(b)):
                assert new[matmul + "w"][l, o] == pytest.approx([w[o, c] * gamma[c] for c in range(config.C)], rel=near)
                b[o] += sum(w[o, c] * beta[c] for c in range(config.C))
            assert new[matmul + "b"][l] == pytest.approx(b, rel=near)
        assert (new[norm + "w"] == 1).all() and (new[norm + "b"] == 0).all()
    for name in ("wte", "wpe", "attprojw", "attprojb", "fcprojw", "fcprojb", "lnfw", "lnfb"):
        assert (new[name] == old[name]).all()
    assert script("prepro/merge_norm.py", tmp_path / "out.bin", tmp_path / "again.bin").count("nothing to merge") == 2
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()

@pytest.mark.parametrize("dtype, shards, near", [("F32", 1, 2**-23), ("BF16", 3, 2**-8), ("F16", 1, 2**-10)])
def test_merge_norm_of_a_directory(tmp_path, dtype, shards, near):
    """The same model as llm.c's file gives; what lies beside the weights goes along, but for the state of a run."""
    shape = helpers.Shape(C=16, V=19)
    helpers.write_model(tmp_path / "in.bin", shape, helpers.random_model(shape, std=0.2))
    given = helpers.hf_tensors(shape, helpers.read_model(tmp_path / "in.bin", shape), dtype)
    helpers.write_hf(tmp_path / "in", shape, {name.replace("transformer.", ""): t for name, t in given.items()} if shards > 1 else given, shards)
    (tmp_path / "in/tokenizer.json").write_text("{}")
    (tmp_path / "in/state_00000.bin").write_text("")
    assert "nothing to merge" not in script("prepro/merge_norm.py", tmp_path / "in", tmp_path / "out/")
    script("prepro/merge_norm.py", tmp_path / "in.bin", tmp_path / "out.bin")
    assert sorted(os.listdir(tmp_path / "out")) == sorted({*os.listdir(tmp_path / "in")} - {"state_00000.bin"})
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()   # as the writer here left it: read_safetensors wants the trainer's alignment
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, e in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                found["transformer." + name.replace("transformer.", "")] = helpers.Tensor(e["dtype"], e["shape"], data[begin:][slice(*e["data_offsets"])])
    merged, expected = helpers.from_hf(shape, found), helpers.read_model(tmp_path / "out.bin", shape)
    for name in expected:
        assert merged[name] == pytest.approx(expected[name], rel=near, abs=near), name
    assert set(merged["ln1w"]) == {1.0} and set(merged["ln2b"]) == {0.0} and {t.dtype for t in found.values()} == {dtype}
    assert script("prepro/merge_norm.py", tmp_path / "out", tmp_path / "again").count("nothing to merge") == 2

def test_merge_errors_of_directories(tmp_path):
    shape = helpers.Shape(C=16, V=19)
    good = helpers.hf_tensors(shape, helpers.random_model(shape), "F16")
    gamma, weight = "transformer.h.1.ln_1.weight", "transformer.h.1.attn.c_attn.weight"
    changes = {"missing": {gamma: None}, "type": {gamma: helpers.Tensor("I16", [16], bytes(32))}, "shape": {weight: good[weight]._replace(shape=[48, 16])},
               "big": {gamma: helpers.Tensor("F16", [16], helpers.pack("F16", [6e4] * 16)), weight: good[weight]._replace(data=helpers.pack("F16", [6e4] * 768))}}
    for name, change in changes.items():
        helpers.write_hf(tmp_path / name, shape, {n: t for n, t in {**good, **change}.items() if t})
    for name, cut in (("cut", -1), ("header", 100), ("empty", 0)):
        helpers.write_hf(tmp_path / name, shape, good)
        (tmp_path / name / "model.safetensors").write_bytes(helpers.safetensors_bytes(good)[:cut])
    (tmp_path / "none").mkdir()
    there = sorted(os.listdir(tmp_path))
    for name, said in (("missing", gamma[12:]), ("type", "I16"), ("shape", "[16, 48], found [48, 16]"), ("big", "not finite"), ("cut", "cut off"),
                       ("header", "cut off"), ("empty", "cut off"), ("none", "expected a GPT-2")):
        assert said in script("prepro/merge_norm.py", tmp_path / name, tmp_path / "out", status=1), name
    assert "a new name" in script("prepro/merge_norm.py", tmp_path / "none", tmp_path / "cut", status=1)
    assert sorted(os.listdir(tmp_path)) == there

def test_merge_errors(tmp_path):
    model, out = FIXTURES / "gpt2_c96.bin", tmp_path / "out.bin"
    config, tensors = binfmt.read_model(model)
    (tmp_path / "in.bin").write_bytes(model.read_bytes())
    (tmp_path / "short.bin").write_bytes(model.read_bytes()[:-4])
    os.link(tmp_path / "in.bin", tmp_path / "link.bin")
    for name, value in (("nan", np.nan), ("big", 1e30)):
        tensors["ln1w"][:] = tensors["qkvw"][:] = value
        binfmt.write_model(tmp_path / f"{name}.bin", config, tensors)
    there = sorted(os.listdir(tmp_path))
    for name, to, said in (("none", out, "none.bin"), ("in", tmp_path / "link.bin", "this is"), ("short", out, "expected"),
                           ("in", tmp_path / "none/out.bin", "could not write"), ("nan", out, "not finite"),
                           ("big", out, "qkvw is not finite")):
        assert said in script("prepro/merge_norm.py", tmp_path / f"{name}.bin", to, status=1)
    assert sorted(os.listdir(tmp_path)) == there
