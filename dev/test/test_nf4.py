"""Weights in NF4, as bitsandbytes has them: a quantizer of NumPy's, of which the trainers must know every bit, and the directories it writes."""
import json
import shutil

import numpy as np
import pytest

from finetune import PLAIN, adapters, arrays, batch, check_gradients, config_json, hf_names, model, modules, reference, trainer_of, write_adapter
from helpers import Lab, Tensor, close, learned, options, pack, safetensors_bytes, says, words, write_tokens

# ---- the rule, in NumPy ---------------------------------------------------------------------------------

F = np.float32
NF4 = np.array([-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0,
                0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                0.7229568362236023, 1], F)
BOUNDS = np.array([-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984, -0.13791173323988914,
                   -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
                   0.5016634166240692, 0.6427869200706482, 0.8614784178118011], F)

def dynamic_map():
    """The 256 values of an absmax's 8 bits: in each of 7 decades the middles of 2^i equal parts of [0.1, 1], of both signs; 0; 1. In
    float32 as PyTorch's linspace counts: from the nearer end, with one rounding."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i + 1
        step = float(F((F(1) - F(0.1)) / F(n - 1)))
        ends = np.array([float(F(0.1)) + step * j if j < n // 2 else 1 - step * (n - 1 - j) for j in range(n)]).astype(F)
        middles = F(10.0**(i - 6)) * ((ends[:-1] + ends[1:]) / F(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.array(sorted(values), F)

DYNAMIC = dynamic_map()
MIDDLES = (DYNAMIC[:-1] + DYNAMIC[1:]) * F(0.5)

def blocks(flat, size):
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)

def scaled(rows):
    """Each row's largest absolute value, and the row times its reciprocal: NaN where all is 0, which no bound is below."""
    most = np.abs(rows).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return most, rows * (F(1) / most)[:, None]

def quantize_absmax(absmax):
    """8-bit codes, one scale for 256 of them, the offset. To the nearest value; from the middle of two to the one with the even index."""
    offset = F(absmax.astype(np.float64).mean())
    scale, x = scaled(blocks(absmax - offset, 256))
    low = np.where(np.isnan(x), 0, np.searchsorted(MIDDLES, x, side="left"))
    tie = np.isin(x, MIDDLES) & (low % 2 == 1)
    return (low + tie).astype(np.uint8).flatten()[:len(absmax)], scale, offset

def absmax_of(codes, scale, offset, map):
    return (blocks(map[codes], 256) * scale[:, None]).flatten()[:len(codes)] + offset

class Quantized:
    """A matrix (out, in) in NF4."""

    def __init__(self, w, double):
        self.shape, self.double = w.shape, double
        self.absmax, x = scaled(blocks(w.astype(F).flatten(), 64))
        self.codes = (x[:, :, None] > BOUNDS).sum(2).astype(np.uint8).flatten()[:w.size]   # how many bounds are below
        if double:
            self.nested = quantize_absmax(self.absmax)

    def values(self, map=DYNAMIC):
        absmax = absmax_of(*self.nested, map) if self.double else self.absmax
        return (blocks(NF4[self.codes], 64) * absmax[:, None]).flatten()[:len(self.codes)].reshape(self.shape)

    def tensors(self, name, dtype="float32", map=DYNAMIC, **change):
        """{name: Tensor} as bitsandbytes saves them beside each other."""
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(self.shape)}
        packed = blocks(self.codes, 2)
        found = {name: Tensor("U8", [len(packed), 1], (packed[:, 0] << 4 | packed[:, 1]).astype(np.uint8).tobytes()),
                 f"{name}.quant_map": f32(NF4)}
        if self.double:
            codes, scale, offset = self.nested
            found |= {f"{name}.absmax": Tensor("U8", [len(codes)], codes.tobytes()), f"{name}.nested_absmax": f32(scale),
                      f"{name}.nested_quant_map": f32(map)}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            found[f"{name}.absmax"] = f32(self.absmax)
        text = json.dumps({key: value for key, value in {**state, **change}.items() if value != "absent"}).encode()
        return found | {f"{name}.quant_state.bitsandbytes__nf4": Tensor("U8", [len(text)], text)}

def f32(values):
    return Tensor("F32", list(values.shape), pack("F32", values.flatten().tolist()))

def test_the_rule():
    """Of values in the middle of two, at the ends, in blocks of zeros; what is there comes back."""
    assert len(set(DYNAMIC)) == 256 and DYNAMIC[127] == 0 and DYNAMIC[255] == 1 and (np.diff(DYNAMIC) > 0).all()
    np.testing.assert_allclose(DYNAMIC[[0, 1, 126, 128, 254]], [-0.99296875, -0.97890625, -5.5e-7, 5.5e-7, 0.99296875], rtol=1e-6)
    np.testing.assert_allclose(BOUNDS, (NF4[:-1].astype(np.float64) + NF4[1:]) / 2, atol=3e-8)
    w = np.concatenate([NF4, BOUNDS, np.nextafter(BOUNDS, F(2)), np.zeros(18, F), np.zeros(64, F)]).reshape(8, 16)
    q = Quantized(w, False)
    assert q.absmax.tolist() == [1, 0] and q.codes[:16].tolist() == list(range(16)) and not q.codes[64:].any() and not q.values()[4:].any()
    assert q.codes[16:31].tolist() == list(range(15)) and q.codes[31:46].tolist() == list(range(1, 16)) and (q.values().flatten()[:16] == NF4).all()
    rng = np.random.RandomState(1)
    values = Quantized(rng.randn(96, 200), True).values()
    assert (Quantized(values, False).values() == values).all()
    ties = np.concatenate([1 + TIES, 1 - TIES, [0, 2]]).astype(F)
    codes, scale, offset = quantize_absmax(ties)
    assert scale.tolist() == [1] and offset == 1 and (codes[:22] % 2 == 0).all() and codes[22:].tolist() == [0, 255]
    w = rng.randn(300, 64).astype(F)
    assert close(np.linalg.norm(Quantized(w, True).values() - w) / np.linalg.norm(w), 0.0905, 0.05)

# Above 1/2, middles of two values of the map that 1 + x and 1 - x hold without rounding
TIES = np.array([x for x in MIDDLES if x >= 0.5 and (F(1) + x) - F(1) == x], F)[:11]

# ---- models ----------------------------------------------------------------------------------------------

# C and F are no multiples of 64, so that blocks straddle rows; in the second, matrices have more than 256 blocks
CASES = {"llama": ("llama:L2,H5,K1,C40,F88,T32,V131", {}), "wide": ("llama:L1,H3,K3,C96,F200,T32,V131,HS40", {}),
         "tied": ("llama:L2,H4,K2,C32,F40,T32,V131", {"tied": True, "kind": "qwen2"}), "ties": ("llama:L1,H5,K1,C40,F88,T32,V131", {}), "gpt2": ("gpt2:L2,H3,C72,T32,V131", {})}
LORA = {"q_proj": 3, "down_proj": 5, "attn.c_attn": 3, "mlp.c_proj": 4}
B, T = 2, 19

def spoil(tensors, config):
    """A block of zeros, and one in which a value is huge beside the others."""
    for module in list(modules(config))[:3]:
        name = module + ".weight"
        if name in tensors:
            flat = tensors[name].reshape(-1)
            flat[64:128], flat[200] = 0, 50
    if "qkvw" in tensors:
        tensors["qkvw"][0].reshape(-1)[64:128] = 0
        tensors["fcw"][1].reshape(-1)[200] = 50

def tie(w):
    """The 25 blocks of a matrix get absmax with a mean of 1 and no deviation beyond 1, whose 8 bits are ties."""
    rows, wanted = w.reshape(-1, 64), np.concatenate([[2, 0, 1], 1 + TIES, 1 - TIES]).astype(F)
    rows *= (wanted / np.abs(rows).max(1))[:, None]
    rows[np.arange(25), np.abs(rows).argmax(1)] = wanted

def linear(config, name):
    return name.removesuffix(".weight") in modules(config)

def write(folder, config, named, **more):
    """A directory of {name: Tensor}."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_json(config), **more}))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(named))

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "_load_in_4bit": True, "_load_in_8bit": False, "llm_int8_threshold": 6.0,
       "llm_int8_skip_modules": None, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False}

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """make(case): folders "in" in F32, "plain0" and "plain1" of its values dequantized without and with double quantization, "bnb0" and
    "bnb1" as bitsandbytes has them, an adapter and a batch."""
    labs = {}

    def make(case):
        if case not in labs:
            lab = labs[case] = Lab(tmp_path_factory.mktemp("nf4"))
            sizes, how = CASES[case]
            lab.config, lab.tensors = model(sizes, 3, **how)
            if case in ("llama", "gpt2"):
                spoil(lab.tensors, lab.config)
            if case == "ties":
                tie(lab.tensors["model.layers.0.self_attn.o_proj.weight"])
            lab.how = {"trainer": trainer_of(lab.config)}
            gpt2, named = trainer_of(lab.config) == "train_gpt2", hf_names(lab.config, lab.tensors)
            write(lab.path("in"), lab.config, {name: f32(t) for name, t in named.items()})
            lab.quantized = {}
            for double in (0, 1):
                q = lab.quantized[double] = {name: Quantized(t.T if gpt2 else t, double) for name, t in named.items() if linear(lab.config, name)}
                values = {name: (q[name].values().T if gpt2 else q[name].values()) if name in q else t for name, t in named.items()}
                write(lab.path(f"plain{double}"), lab.config, {name: f32(t) for name, t in values.items()})
                bnb = {}
                for name, t in named.items():
                    bnb |= q[name].tensors(name) if name in q else {name: f32(t)}
                write(lab.path(f"bnb{double}"), lab.config, bnb, quantization_config={**BNB, "bnb_4bit_use_double_quant": bool(double)})
            lab.given = adapters(lab.config, LORA, seed=5)
            write_adapter(lab.path("adapter"), lab.given)
            lab.ids = words(B * T + 1, 131)
            write_tokens(lab.path("batch.bin"), lab.ids)
        return labs[case]
    return make

def run(lab, base, *given, name="g.safetensors", **how):
    """Its log, and loss and gradients."""
    ran = lab.train("-e", base, "--adapter", "adapter", "-i", "batch.bin", "-b", B, "-t", T, "-x", 3, *PLAIN, "--dump-gradients", name, *given, **{**lab.how, **how})
    assert ran.done["peak_bytes"] == ran.done["estimate_bytes"]
    return learned_of(ran), arrays(lab.path(name))

def learned_of(ran):
    """What does not depend on what the base is stored in: losses and norms."""
    return [(line["train_loss"], line["grad_norm"]) for line in learned(ran) if "train_loss" in line]

def same(one, other):
    """To the bit."""
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all((one[1][name] == t).all() for name, t in other[1].items())

@pytest.mark.parametrize("double", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_every_bit(made, case, double):
    """Quantized on load, it is to the bit the model of the dequantized values, which the reference differentiates; and what bitsandbytes
    wrote is the same."""
    lab, ref = made(case), reference()
    nf4 = run(lab, "in", "--base", "nf4", "--double-quant", double, variant="cpu-fp32")
    values = {name: q.values() for name, q in lab.quantized[double].items()}
    tensors = {name: values.get(name, t) for name, t in lab.tensors.items()}
    if lab.how["trainer"] == "train_gpt2":
        for ours, theirs in {"qkvw": "attn.c_attn", "attprojw": "attn.c_proj", "fcw": "mlp.c_fc", "fcprojw": "mlp.c_proj"}.items():
            tensors[ours] = np.stack([values[f"transformer.h.{l}.{theirs}.weight"] for l in range(lab.config.L)])
    x, y, _, _ = batch(lab.ids, B, T)
    _, loss, gradients, _, _ = ref.compute(lab.config, tensors, x, y, 0, tune=ref.Tuning(lab.given))
    check_gradients(nf4[1], loss, gradients, 2e-6, 1e-5)
    same(run(lab, f"plain{double}", variant="cpu-fp32"), nf4)
    same(run(lab, f"bnb{double}", "--base", "nf4", variant="cpu-fp32"), nf4)

@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_modes(made, case):
    """-r 0 to 2 and embeddings on the host give the same bits; the default is double quantization."""
    lab = made(case)
    first = run(lab, "in", "--base", "nf4", "-r", 0, variant="cpu-fp32")
    for given in (["-r", 1, "--double-quant", 1], ["-r", 2], *([["--embedding-on", "device"], ["--embedding-on", "host"]] if case == "llama" else [])):
        same(run(lab, "in", "--base", "nf4", *given, variant="cpu-fp32"), first), given

@pytest.mark.parametrize("case, variant", [("llama", "cpu-approxbp-fp32"), ("gpt2", "cpu-approxbp-fp32"), ("llama", "cpu-bf16"), ("gpt2", "cpu-bf16"), ("wide", "cpu-norm-bf16")])
def test_builds(made, case, variant):
    """With gamma folded in while it is dequantized, and in bf16: near the model of the dequantized values, and bitsandbytes' directory to the bit."""
    lab = made(case)
    nf4, plain = (run(lab, *given, variant=variant) for given in (["in", "--base", "nf4"], ["plain1"]))
    loss, gradients = plain[1].pop("loss"), plain[1]
    check_gradients(nf4[1], loss, gradients, 1e-6 if "fp32" in variant else 2e-3, 1e-5 if "fp32" in variant else 4e-2)
    same(run(lab, "bnb1", "--base", "nf4", variant=variant), nf4)

def test_a_bnb_directory_needs_no_option(made):
    """It is what it is: without --base, too; and the memory is that of 4 bits."""
    lab = made("wide")
    same(run(lab, "bnb1", variant="cpu-fp32"), run(lab, "bnb1", "--base", "nf4", variant="cpu-fp32"))

def test_a_bnb_directorys_own_map_counts(made):
    """It has the last bits of the PyTorch that made it."""
    lab, named, rng = made("llama"), {}, np.random.RandomState(1)
    other = np.where(rng.rand(256) < 0.3, np.nextafter(DYNAMIC, F(2)), DYNAMIC).astype(F)
    other[[127, 255]] = 0, 1
    values = {name: q.values(other) for name, q in lab.quantized[1].items()}
    for name, t in hf_names(lab.config, lab.tensors).items():
        named |= lab.quantized[1][name].tensors(name, map=other) if name in values else {name: f32(t)}
    write(lab.path("other"), lab.config, named, quantization_config=BNB)
    write(lab.path("plain"), lab.config, {name: f32(values.get(name, t)) for name, t in hf_names(lab.config, lab.tensors).items()})
    same(run(lab, "other", variant="cpu-fp32"), run(lab, "plain", variant="cpu-fp32"))

def test_memory(made):
    """The matrices take 4 bits and an absmax: 8 bits for 64 of them and 32 for 256 of those, or 32 for 64."""
    lab = made("wide")
    weights = sum(outs * ins for outs, ins in modules(lab.config).values())
    for double, most in ((1, 0.5 + 1 / 64 + 4 / 64 / 256), (0, 0.5 + 4 / 64)):
        found = [json.loads(lab.run("--estimate=json", "-e", "in", "-b", 1, "-t", 16, "--lora", 8, *given, variant="cpu-fp32", **lab.how).out)
                 for given in (["--base", "nf4", "--double-quant", double, "--embedding-on", "device"], [])]
        kept = [sum(row["bytes"] for row in table["rows"] if row["kind"] == "param") for table in found]
        saved = kept[1] - kept[0]
        assert weights * (4 - most) * 0.99 < saved <= weights * (4 - most) * 1.01

def test_the_embedding_stays_on_the_host(made):
    """By default, where the head is another matrix: of it the device has a batch's rows."""
    def kept(case, *given):
        lab = made(case)
        table = json.loads(lab.run("--estimate=json", "-e", "in", "-b", 1, "-t", 16, "--lora", 8, "--base", "nf4", *given, variant="cpu-fp32", **lab.how).out)
        return table["total_bytes"]
    assert kept("wide") == kept("wide", "--embedding-on", "host") < kept("wide", "--embedding-on", "device") - 100 * 96 * 4
    assert kept("tied") == kept("tied", "--embedding-on", "device")

def test_training_on_it(made):
    """Losses fall; the base is not written, and resumes to the bit from what bitsandbytes wrote."""
    lab = made("llama")
    how = ["-e", "bnb1", "--lora", 3, "-k", "constant", "-l", 1e-2]
    for name in ("whole", "parts"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    whole = lab.train(*how, "-x", 6, "-o", "whole", **lab.how)
    lab.train(*how, "-x", 3, "-o", "parts", **lab.how)
    lab.train(*how, "-x", 6, "-o", "parts", "-y", 1, **lab.how)
    assert lab.files("whole")["step_00000006/adapter_model.safetensors"] == lab.files("parts")["step_00000006/adapter_model.safetensors"]
    assert whole.losses[-1] < whole.losses[0] and not any("model.safetensors" in name and "adapter" not in name for name in lab.files("whole"))

def test_merge_goes_into_the_16_bit_base(made):
    """Not into what was rounded to 4 bits."""
    lab = made("wide")
    for name, given in (("a", []), ("b", ["--base", "nf4"])):
        shutil.rmtree(lab.path(name), ignore_errors=True)
        lab.run("-e", "in", "--adapter", "adapter", *given, "--merge", name, **lab.how)
    assert lab.files("a")["model.safetensors"] == lab.files("b")["model.safetensors"]

# ---- what is wrong with a directory of 4 bits ---------------------------------------------------------------

NAME = "model.layers.0.mlp.up_proj.weight"

def state(**change):
    """The JSON of the quantization says something else."""
    def lie(tensors):
        key = NAME + ".quant_state.bitsandbytes__nf4"
        said = {**json.loads(tensors[key].data), **change}
        text = json.dumps({k: v for k, v in said.items() if v != "absent"}).encode()
        tensors[key] = Tensor("U8", [len(text)], text)
    return lie

def put(part, tensor):
    return lambda tensors: tensors.update({NAME + part: tensor})

def changed(part, edit):
    def change(tensors):
        t = tensors[NAME + part]
        values = np.frombuffer(t.data, "<f4").copy()
        edit(values)
        tensors[NAME + part] = Tensor(t.dtype, t.shape, values.tobytes())
    return change

N = 88 * 40
BAD = {
    **{f"no{part}": (lambda t, part=part: t.pop(NAME + part), [NAME + part])
       for part in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")},
    "no weight": (lambda t: t.pop(NAME), [NAME]),
    "fp4": (lambda t: t.update({NAME + ".quant_state.bitsandbytes__fp4": t.pop(NAME + ".quant_state.bitsandbytes__nf4")}), [NAME]),
    "fp4 in the state": (state(quant_type="fp4"), ["fp4"]), "blocks of 128": (state(blocksize=128), ["blocksize", "128"]),
    "nested blocks of 64": (state(nested_blocksize=64), ["nested_blocksize"]), "another shape": (state(shape=[40, 88]), ["shape", "[88, 40]", "[40, 88]"]),
    "no shape": (state(shape="absent"), ["shape"]), "a shape in words": (state(shape="x"), ["shape"]), "no offset": (state(nested_offset="absent"), ["nested_offset"]),
    "an offset that is none": (state(nested_offset=None), ["nested_offset"]), "no type": (state(quant_type="absent"), ["quant_type"]),
    "a state that is no JSON": (put(".quant_state.bitsandbytes__nf4", Tensor("U8", [3], b"{1}")), [NAME + ".quant_state"]),
    "a state that is a list": (put(".quant_state.bitsandbytes__nf4", Tensor("U8", [2], b"[]")), [NAME + ".quant_state"]),
    "a state in F32": (put(".quant_state.bitsandbytes__nf4", f32(np.zeros(4))), [NAME + ".quant_state"]),
    "too few bytes": (put("", Tensor("U8", [N // 2 - 1, 1], bytes(N // 2 - 1))), [NAME]), "too many": (put("", Tensor("U8", [N // 2 + 1, 1], bytes(N // 2 + 1))), [NAME]),
    "of another type": (put("", Tensor("BF16", [N // 4, 1], bytes(N // 2))), [NAME]), "int8": (put("", Tensor("I8", [88, 40], bytes(N))), [NAME]),
    "too few absmax": (put(".absmax", Tensor("U8", [N // 64 - 1], bytes(N // 64 - 1))), [NAME + ".absmax"]),
    "an absmax of F16": (put(".absmax", Tensor("F16", [N // 64], bytes(N // 32))), [NAME + ".absmax"]),
    "too many nested absmax": (put(".nested_absmax", f32(np.ones(2))), [NAME + ".nested_absmax"]),
    "another map": (changed(".quant_map", lambda v: v.__setitem__(3, -0.5)), [NAME + ".quant_map"]), "a short map": (put(".quant_map", f32(NF4[:15])), [NAME + ".quant_map"]),
    "a short nested map": (put(".nested_quant_map", f32(DYNAMIC[:255])), [NAME + ".nested_quant_map"]),
    "NaN in the nested map": (changed(".nested_quant_map", lambda v: v.__setitem__(9, np.nan)), [NAME + ".nested_quant_map"]),
    "NaN in the nested absmax": (changed(".nested_absmax", lambda v: v.__setitem__(0, np.nan)), [NAME, "nan"]),
    "infinity in the nested absmax": (changed(".nested_absmax", lambda v: v.__setitem__(0, np.inf)), [NAME, "inf"]),
    "another nested map": (changed(".nested_quant_map", lambda v: v.__setitem__(126, -4e-7)), [NAME, "nested_quant_map"]),
    "a weight of int8": (lambda t: t.update({NAME.replace("weight", "SCB"): f32(np.ones(88))}), ["SCB"]),
}

def refused(lab, *parts):
    shutil.rmtree(lab.path("out"), ignore_errors=True)
    done = lab.run(*options("-e", "bad", "--lora", 3, "-o", "out"), status=None, timeout=30, **lab.how)
    assert done.status in (1, 2), done.out[-500:]
    says(done.err, *parts)
    assert done.err.count(f"{lab.how['trainer']}: ") == 1 and "simt" not in done.err
    assert not lab.path("out").exists() or not lab.files("out")

def of_bnb(lab, double=1):
    named, tensors = hf_names(lab.config, lab.tensors), {}
    for name, t in named.items():
        tensors |= lab.quantized[double][name].tensors(name) if name in lab.quantized[double] else {name: f32(t)}
    return tensors

@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(made, name):
    """Each that is missing or damaged is named."""
    change, parts = BAD[name]
    lab = made("llama")
    tensors = of_bnb(lab)
    change(tensors)
    write(lab.path("bad"), lab.config, tensors, quantization_config=BNB)
    refused(lab, "bad", *parts)

@pytest.mark.parametrize("change, parts", [
    (lambda t: t.pop(NAME + ".absmax"), [NAME + ".absmax"]), (changed(".absmax", lambda v: v.__setitem__(54, np.nan)), [NAME, "nan"]),
    (put(".absmax", f32(np.ones(56))), [NAME + ".absmax"]), (lambda t: t.update(Quantized(np.ones((88, 40)), 1).tensors(NAME)), [NAME + ".absmax"])])
def test_bad_tensors_without_double_quantization(made, change, parts):
    lab = made("llama")
    tensors = of_bnb(lab, 0)
    change(tensors)
    write(lab.path("bad"), lab.config, tensors, quantization_config={**BNB, "bnb_4bit_use_double_quant": False})
    refused(lab, "bad", *parts)

@pytest.mark.parametrize("change, parts", [
    ({"bnb_4bit_quant_type": "fp4"}, ["fp4"]), ({"load_in_4bit": False, "load_in_8bit": True, "_load_in_8bit": True, "_load_in_4bit": False}, ["load_in_4bit"]),
    ({"bnb_4bit_quant_storage": "bfloat16"}, ["bnb_4bit_quant_storage", "bfloat16"]), ({"quant_method": "gptq"}, ["gptq"]), ({"quant_method": "absent"}, ["quant_method"])],
    ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "")
def test_other_quantizations(made, change, parts):
    lab = made("llama")
    said = {name: value for name, value in {**BNB, **change}.items() if value != "absent"}
    write(lab.path("bad"), lab.config, of_bnb(lab), quantization_config=said)
    refused(lab, "quantization_config", *parts)

def test_4_bits_without_a_word_in_the_config(made):
    """And a config that speaks of 4 bits where there are none."""
    lab = made("llama")
    write(lab.path("bad"), lab.config, {name: f32(t) for name, t in hf_names(lab.config, lab.tensors).items()}, quantization_config=BNB)
    refused(lab, "bad", "q_proj.weight")
    write(lab.path("bad"), lab.config, of_bnb(lab))
    refused(lab, "bad", "U8")

def test_full_training_of_4_bits_is_refused(made):
    lab = made("llama")
    done = lab.run(*options("-e", "bnb1"), status=None, **lab.how)
    assert done.status in (1, 2)
    says(done.err, "--lora")
